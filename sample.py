"""Images from a trained LightningDiT: the ODE, its guidance, and the batch from which scores are computed.

Paper: arXiv 2501.01423, Sec. 5.4: "we use a 250-step Euler integrator [...] we adopt cfg interval [19]
and timestep shift similar to FLUX [20]". Time is as in training: t = 0 is noise, t = 1 is data.

Read it top to bottom: Settings; PRESETS, which has a preset for each score of the paper; sample_batch, which
is all of sampling in three lines; then its steps: noise, time grid, integrators, guidance, decoder.

    python sample.py                                   the mini run: samples.npz, samples.png
    torchrun --nproc_per_node=8 -- sample.py --preset imagenet256 --out RUN --vae VAE
    python sample.py --preset official-demo            the authors' weights, eight images
"""
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.integrate import RK45

from train_vae import opt, step_generator
from vae import autocast, require


@dataclass
class Settings:
    # The values are preset imagenet256's: LightningDiT-XL after 64 epochs, with guidance [Table 3]. Without
    # --preset, the script takes preset mini. Each setting is a flag, and its comment is the flag's help.
    preset: str = "imagenet256"  # named settings; every other flag overrides one of them
    # --- the integrator: [Sec. 4] "sampled with a dopri5 integrator" for Table 1; [Sec. 5.4] Euler for Table
    # 3, with 250 steps as in REPA and DiT, so that the cost is the same. In the authors' code these are the
    # 249 steps between the points of linspace(0, 1, 250).
    integrator: str = opt("euler", choices=("euler", "heun", "dopri5"))  # dopri5 chooses its own steps
    sampling_steps: int = 250  # points of the time grid, one more than Euler's steps (the authors' count)
    # 0.3 puts 192 of the 250 points below t = 0.5, near noise; without a shift there are 125. The usual
    # reason (SD3): the more values a latent has, the more noise it takes to hide its image, so the image is
    # decided closer to pure noise. FLUX counts time the other way round: 0.3 here is 1 / 0.3 = 3.3 there.
    timestep_shift: float = 0.3  # shift s of the time grid: below 1, more points near noise; 1: no shift
    # --- guidance. The authors' code guides 3 of the 32 channels, as DiT's code guides 3 of its 4. A comment
    # in DiT's code says that this is for reproducibility, and DiT's author called it unintended. Guiding few
    # channels has less effect, which would explain scales as large as 10.0 and 6.7: a user of their code
    # finds about 4 right if all channels are guided.
    cfg_scale: float = 10.0  # guidance w in v_null + w (v_class - v_null); 1: none
    cfg_channels: int = 3  # guide the first k latent channels only; 0: all
    # [19] guides only in the middle, since guidance near noise costs variety. The authors' code has a
    # beginning and no end: v_class alone before this t, guidance from there to t = 1.
    cfg_interval_start: float = 0.10  # guidance acts from this t on
    # Guidance would multiply the rounding errors of bf16, so LightningDiT runs in fp32 here (authors' code).
    precision: str = opt("fp32", choices=("fp32", "bf16"))  # of LightningDiT; fp32 is TF32 on CUDA
    # --- what to draw
    num: int = 50000  # images (with torchrun, write -- before sample.py, or torchrun takes --num for its own)
    labels: str = "random"  # random, balanced (image i has class i mod classes), or a list such as 3,207
    seed: int = 0  # sample i is a function of (seed, i), and with dopri5 also of its batch
    batch_size: int = 125  # images drawn at once; with guidance, the network's batch is twice as large
    # --- how it runs
    out: str = opt("", same=False)  # folder of the run; default runs/PRESET
    dit: str = opt("", same=False)  # checkpoint of train_dit.py; default OUT/dit.pt
    vae: str = opt("", same=False)  # checkpoint of train_vae.py; default OUT/vae.pt
    weights: str = opt("ema", choices=("ema", "model"))  # which weights of dit.pt
    unfinished: bool = opt(False, same=False)  # accept checkpoints whose training is not finished
    device: str = opt("auto", choices=("auto", "cuda", "cpu"), same=False)  # auto: CUDA if there is a GPU
    compile: bool = opt(torch.cuda.is_available(), same=False)  # torch.compile the blocks of LightningDiT
    fresh: bool = opt(False, same=False)  # start over: delete all samples in OUT, PNGs, too
    png: bool = opt(False, same=False)  # also write every image as OUT/samples/000000.png and so on
    sweep: str = opt("", same=False)  # picture sweep.png: a row for each guidance scale, such as 1,2,4
    trajectory: str = opt("", same=False)  # picture trajectory.png: x_t decoded at times such as 0,0.5,1

# For two CPU cores (our choice): no shift, and guidance of all channels from t = 0 on with a small scale.
MINI = {"num": 1000, "labels": "balanced", "batch_size": 100, "sampling_steps": 25, "timestep_shift": 1.0,
        "cfg_scale": 2.0, "cfg_interval_start": 0.0, "cfg_channels": 0}
# [Sec. 4] "no sample optimization methods such as cfg interval and timestep shift are used"
DOPRI5 = {"integrator": "dopri5", "timestep_shift": 1.0, "cfg_scale": 1.0}
PLAIN, LATE = {"cfg_scale": 1.0}, {"cfg_scale": 6.7, "cfg_interval_start": 0.125}
PRESETS = {
    "mini": MINI, "imagenet256": {},
    "table1": DOPRI5,  # FID-50k: 19.50 (DiT-XL/2) to 7.13 (LightningDiT-XL/2), 4.29 (XL/1 on VA-VAE)
    # Table 2 (and 4, 5, A1 to A3) names no integrator; this is Table 1's. B, L, XL on f16d32 with DINOv2:
    "table2": DOPRI5 | {"num": 10000},  # FID-10K 15.82, 9.82, 8.22
    # Without guidance, Table 3 keeps the timestep shift (authors' code).
    "table3-64ep": PLAIN,  # gFID 5.14, sFID 4.22, IS 130.2, precision 0.76, recall 0.62
    "table3-64ep-cfg": {},  # 2.11, 4.16, 252.3, 0.81, 0.58
    "table3-800ep": PLAIN,  # 2.17, 4.36, 205.6, 0.77, 0.65
    "table3-800ep-cfg": LATE,  # 1.35, 4.15, 295.3, 0.79, 0.65
    # the same with the authors' released weights; official-demo draws the eight classes of their README with
    # the 800-epoch weights
    "official-64ep": {}, "official-800ep": LATE,
    "official-demo": {"num": 8, "labels": "975,3,207,387,388,88,979,279", "timestep_shift": 1.0,
                      "cfg_scale": 9.0, "cfg_interval_start": 0.0},
}

@torch.inference_mode()
def sample_batch(system, s, indices, ts):
    """Indices of B samples, times ts (time_grid) -> images (B, 3, H, W), roughly in [-1, 1], and classes
    (B,)."""
    x0, y = draw(system, s, indices)
    x1 = integrate(system, s, x0, y, ts)
    return decode(system, x1), y

def draw(system, s, indices):
    """Indices -> noise x0 (B, C, h, w) and classes (B,). Sample i has its own generator, a function of (seed,
    i), so neither its batch nor its process matters."""
    noise = [torch.randn(system.shape, generator=step_generator("cpu", s.seed, i)) for i in indices]
    y = [class_of(system, s, i) for i in indices]
    return torch.stack(noise).to(system.device), torch.tensor(y, device=system.device)

def class_of(system, s, i):
    """The class of sample i."""
    if s.labels == "random":
        generator = step_generator("cpu", s.seed, "class", i)
        return int(torch.randint(len(system.classes), (), generator=generator))
    return system.listed[i % len(system.listed)]

# --- The ODE dx/dt = v(x, t), from t = 0 (noise) to t = 1 (data) -------------------------------------
def time_grid(s):
    """(sampling_steps,) times from 0 to 1, float64 and on the CPU, where comparing them costs no wait."""
    return shift_timesteps(torch.linspace(0, 1, s.sampling_steps, dtype=torch.float64), s.timestep_shift)

def shift_timesteps(t, shift):
    """Times t in [0, 1] (tensor or number) -> the same shape. A shift below 1 moves them towards noise; 0 and
    1 stay. Why 0.3: see Settings.timestep_shift."""
    # [Sec. 5.4] t' = s t / (1 + (s - 1) t), the denominator written so that 1 stays exactly 1
    return shift * t / (shift * t + (1 - t))

def integrate(system, s, x, y, ts):
    """x (B, C, h, w) at ts[0], classes y (B,) -> x at ts[-1], by the settings."""
    def velocity(x, t):
        return guided_velocity(system.model, x, t, y, s.cfg_scale, len(system.classes), s.cfg_interval_start,
                               s.cfg_channels or None)

    with autocast(x, s.precision == "bf16"):
        return {"euler": euler, "heun": heun, "dopri5": dopri5}[s.integrator](velocity, x, ts)

def euler(velocity, x, ts):
    """x (B, ...) at ts[0] -> x at ts[-1], for velocity(x, t) with t 0-d. N points are N - 1 evaluations."""
    for t, t_next in pairwise(ts):
        # x_{i+1} = x_i + (t_{i+1} - t_i) v(x_i, t_i)
        x = x + (t_next - t) * velocity(x, t)
    return x

def heun(velocity, x, ts):
    """The same by the trapezoidal rule, which is of second order: 2 (N - 1) evaluations (our choice)."""
    for t, t_next in pairwise(ts):
        v = velocity(x, t)
        # x_{i+1} = x_i + (t_{i+1} - t_i) (v(x_i, t_i) + v(x_euler, t_{i+1})) / 2
        x = x + (t_next - t) * (v + velocity(x + (t_next - t) * v, t_next)) / 2
    return x

def dopri5(velocity, x, ts, rtol=1e-3, atol=1e-6):
    """The same by Dormand-Prince 5(4), which chooses its steps. UserError if it cannot continue.
    Only the ends of ts count, so a shift changes nothing. The batch has ONE step size, from the error over
    all of it: with dopri5, a sample depends a little on its neighbours. The tolerances are the authors'."""
    def slope(t, flat):
        v = velocity(torch.from_numpy(flat).view(x.shape).to(x), t)
        # at a NaN, RK45 would halve its step for ever
        require(v.isfinite().all(), f"dopri5: the velocity at t = {t:.4f} is not finite: broken weights?")
        return v.double().flatten().cpu().numpy()

    start = x.double().flatten().cpu().numpy()
    solver = RK45(slope, float(ts[0]), start, float(ts[-1]), rtol=rtol, atol=atol)
    while solver.status == "running":
        solver.step()
    require(solver.status == "finished", f"dopri5: no step is small enough at t = {solver.t:.4f}: use euler")
    return torch.from_numpy(solver.y).view(x.shape).to(x)

def guided_velocity(model, x, t, y, scale, null_class=None, interval_start=0.0, channels=None):
    """Classifier-free guidance: x (B, C, H, W) at time t (a number or 0-d) -> velocity, shaped like x.
    model(x, t, y): velocity for times (B,) and classes y (B,). null_class: default model.num_classes, the
    last row of the class table, which training used for a tenth of the labels. channels: guide the first k;
    None: all. With scale 1, or for t < interval_start, the unconditional half is not computed."""
    times = torch.full((len(x),), float(t), dtype=x.dtype, device=x.device)
    # [Sec. 5.4, "cfg interval"] near noise, v = v_class
    if scale == 1 or t < interval_start:
        return model(x, times, y).to(x.dtype)
    null = torch.full_like(y, model.num_classes if null_class is None else null_class)
    # both halves as one batch, (2B, C, H, W)
    both = model(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, null])).to(x.dtype)
    v_class, v_null = both.chunk(2)
    # v = v_null + w (v_class - v_null) on the first k channels, v_class on the others
    guided = v_null + scale * (v_class - v_null)
    k = x.shape[1] if channels is None else channels
    return torch.cat([guided[:, :k], v_class[:, k:]], dim=1)

def decode(system, x1):
    """Normalised latents x1 (B, C, h, w) -> images (B, 3, H, W)."""
    # Undo train_dit.py's (z - mean) / std per channel, with the statistics that its checkpoint keeps. Nothing
    # else is done to a latent before the decoder: no clipping, no noise of the posterior.
    z = x1 * system.std + system.mean
    images = torch.cat([system.tokenizer.decode(part) for part in z.split(16)])  # 16 at a time, for memory
    # clipping would turn NaN into black pixels
    require(images.isfinite().all(), f"{system.dit} and {system.vae} give images that are not finite: their "
            "weights are broken")
    return images

# === Plumbing: files, flags, processes ===
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dit import SIZES, LightningDiT, read_released_dit
from train_dit import ddpm_velocity, flags_of_run, warn_of_ema
from train_vae import ChunkFiles, Stop, atomic_write, open_npz, run_script, save_grid, to_float, to_uint8
from vae import file_hash, fingerprint, hub_file, load_checkpoint, load_tokenizer, load_weights
from vae import require_finished, torch_load


class System:
    """What turns noise into images: a LightningDiT and the tokenizer on which it was trained, ours or the
    authors', on this process's device. UserError if they do not belong together."""
    def __init__(self, s, world):
        if s.preset in OFFICIAL:
            self.dit, self.vae, state = read_official(s.preset, world)
        else:
            self.dit, self.vae = s.dit or f"{s.out}/dit.pt", s.vae or f"{s.out}/vae.pt"
            hint = ": run python train_dit.py first, or name one with --dit"
            state = load_checkpoint(self.dit, "dit", hint)
            require_finished(state, self.dit, "train_dit.py", s.unfinished)
            if s.weights == "ema" and (warning := warn_of_ema(state["settings"]["ema"], state["step"])):
                world.print(f"{self.dit}:{warning}")
        self.tokenizer, tokenizer = load_tokenizer(self.vae, world.device, unfinished=s.unfinished)
        own, its = fingerprint(tokenizer["model"]), state["tokenizer"]["fingerprint"]
        require(its in ("", own), f"{self.dit} was trained on latents of another tokenizer than {self.vae}: "
                "name that one with --vae, or run train_dit.py again")
        model = LightningDiT(**state["arch"])
        load_weights(model, state[s.weights], self.dit)
        model = model.to(world.device).eval().requires_grad_(False)
        for block in model.blocks if s.compile else ():
            block.compile(dynamic=False)  # one graph with guidance and one without
        self.device, self.classes = world.device, state["classes"]
        self.model = ddpm_velocity(model) if state["objective"] == "ddpm" else model
        # statistics (1, C, 1, 1) of all latents, shape (C, h, w) of one
        self.mean, self.std = (state["latents"][key].float().to(world.device) for key in ("mean", "std"))
        self.shape = tuple(state["latents"]["shape"])
        # what samples.npz says of its origin
        size = next((name for name, size in SIZES.items() if size.items() <= state["arch"].items()), "other")
        self.origin = {name: state[name] for name in ("objective", "data", "image_size")} | {
            "model": f"{size}/{model.patch_size}", "dit_step": state["step"],
            "dit_fingerprint": fingerprint(state[s.weights]), "tokenizer_fingerprint": own}
        # read these flags now, so that a mistake is found before sampling
        listed = "" if s.labels in ("random", "balanced") else s.labels
        self.listed = numbers("--labels", listed, len(self.classes) - 1, int) or range(len(self.classes))
        self.scales, self.times = numbers("--sweep", s.sweep, 1000), numbers("--trajectory", s.trajectory, 1)
        require(model.y_embedder.dropout_prob or {s.cfg_scale, *self.scales} == {1}, f"{self.dit} was "
                "trained with --class-dropout 0, so it has no null class for guidance: use --cfg-scale 1")
        require(s.cfg_channels <= self.shape[0],
                f"--cfg-channels {s.cfg_channels}: the latents have {self.shape[0]} channels")
        require(s.sampling_steps > 1, "--sampling-steps: the time grid needs at least its two ends")

OFFICIAL = {"official-64ep": 64, "official-800ep": 800, "official-demo": 800}  # epochs

def read_official(preset, world):
    """Preset -> files of LightningDiT-XL/1 and VA-VAE in torch.hub's cache, and a state like that of dit.pt.
    We have never seen the authors' files, so their hashes are printed and not checked."""
    vae, dit = "vavae-imagenet256-f16d32-dinov2", f"lightningdit-xl-imagenet256-{OFFICIAL[preset]}ep"
    files = (vae, vae), (vae, "latents_stats"), (dit, dit)
    urls = [f"https://huggingface.co/hustvl/{place}/resolve/main/{name}.pt" for place, name in files]
    with world.first():
        vae, stats, dit = paths = [hub_file(url) for url in urls]
    for path in paths:
        world.print(f"{path}\n  {file_hash(path)}")
    weights, latents = read_released_dit(dit), torch_load(stats)
    latents = {key: latents[key].view(1, 32, 1, 1) for key in ("mean", "std")}
    # The 800-epoch release is said to have no QK-norm (the authors' issue 68), so the names of its weights
    # decide.
    arch = SIZES["XL"] | {"use_qknorm": any(".q_norm." in key for key in weights)}
    return dit, vae, {"step": 0, "arch": arch, "ema": weights, "model": weights, "objective": "flow",
                      "data": "imagenet", "image_size": 256, "classes": list(range(1000)),
                      "tokenizer": {"fingerprint": ""}, "latents": latents | {"shape": (32, 16, 16)}}

def numbers(flag, text, high, kind=float):
    """'1,2.5' -> [1.0, 2.5], '' -> []. UserError unless all are numbers from 0 to high."""
    try:
        values = [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        values = [-1]
    require(all(0 <= v <= high for v in values), f"{flag} {text}: give numbers from 0 to {high}, with commas")
    return values

def sample_all(system, s, world, identity, path):
    """All samples into the file `path`, which is complete when rank 0 returns. The work is dealt in batches,
    each of them the same arithmetic whoever does it: the file has the same bytes for any number of processes
    and after any interruption."""
    parts = path.with_name("samples_parts")
    if s.fresh and world.rank == 0:
        shutil.rmtree(parts, ignore_errors=True)
        for old in [path, *path.parent.glob("samples/" + 6 * "[0-9]" + ".png")]:
            old.unlink(missing_ok=True)
    files = ChunkFiles(parts, "images", s.num, s.batch_size, identity, world)
    stop, ts, mine, on_gpu = Stop(world, s.fresh), time_grid(s), files.missing(), world.device.type == "cuda"

    def work(chunk):
        k, rows = chunk
        if stop.asked:
            return
        # The last bits of a sum depend on the number of threads, which each thread sets for itself: one.
        torch.set_num_threads(1)
        if on_gpu:
            torch.cuda.set_device(world.device)
        # The last batch is filled up with samples that are thrown away: another size would be compiled again.
        indices = range(rows[0], rows[0] + min(s.batch_size, s.num))
        images, _ = sample_batch(system, s, indices, ts)
        files.write(k, to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()[:len(rows)])

    # On a CPU, one batch per core at a time. A GPU does one at a time, and the compiler is not made for
    # threads.
    cores = 1 if on_gpu or s.compile else max(1, (os.cpu_count() or 1) // world.size)
    with ThreadPoolExecutor(cores) as pool:
        list(tqdm(pool.map(work, mine), "sampling", len(mine), unit="batch", disable=world.rank > 0))
    if stop.agreed():  # it also waits for the other processes
        stop.leave("stopped and kept what is done")
    stop.end()
    if world.rank == 0:
        # An ADM batch: arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,) classes; and meta, a JSON string. Nothing
        # in it depends on when, where or by how many processes it was made.
        images = np.concatenate(files.arrays())
        labels = np.array([class_of(system, s, i) for i in range(s.num)])
        class_picture(images, labels, system.classes, path.with_name("samples.png"))
        atomic_write(path, lambda file: np.savez(file, arr_0=images, arr_1=labels, meta=json.dumps(identity)))
        shutil.rmtree(parts)
        print(f"{path}: {s.num} images")

def require_same(path, identity):
    """UserError if an .npz that is there was made with other settings: nothing is replaced unasked."""
    archive = open_npz(path)
    made = json.loads(str(archive["meta"])) if "meta" in archive else {}
    changed = [f"{k} {made.get(k)} (now {v})" for k, v in identity.items() if made.get(k) != v]
    require(not changed, f"{path} was made with other settings: {', '.join(changed)}. Repeat those, or use "
            "--fresh to start over, or another --out with --dit and --vae")

def class_picture(images, labels, classes, path):
    """A row for each class (at most 20), its first samples (at most 10); rows of four if each has one."""
    shown = list(dict.fromkeys(labels.tolist()))[:20]
    n = min(10, *(int((labels == c).sum()) for c in shown))
    rows = np.concatenate([images[np.flatnonzero(labels == c)[:n]] for c in shown])
    save_grid(to_float(torch.from_numpy(rows).permute(0, 3, 1, 2)), path, n if n > 1 else 4)
    print(f"{path}, classes:", *(classes[c] for c in shown))

def pictures(system, s, path):
    """What the flags ask for: sweep.png and trajectory.png of samples 0 to 7, every image as a PNG."""
    out, ts = path.parent, time_grid(s)
    if system.scales:
        rows = [sample_batch(system, replace(s, cfg_scale=w), range(8), ts)[0] for w in system.scales]
        save_grid(torch.cat(rows), out / "sweep.png", 8)
        print(f"{out}/sweep.png, rows: guidance", s.sweep)
    if system.times:
        # columns: x_t at the grid points nearest to the times, decoded
        stops = sorted({int((ts - t).abs().argmin()) for t in system.times})
        columns = [sample_batch(system, s, range(8), ts[:k + 1])[0] for k in stops]
        save_grid(torch.stack(columns, dim=1).flatten(0, 1), out / "trajectory.png", len(stops))
        print(f"{out}/trajectory.png, columns: t =", *(f"{ts[k]:.3f}" for k in stops))
    if s.png:
        for i, image in enumerate(tqdm(open_npz(path)["arr_0"], "PNG", unit="image")):
            picture = Image.fromarray(image)
            atomic_write(out / "samples" / f"{i:06d}.png", lambda file, p=picture: p.save(file, "PNG"))
        print(f"{out}/samples: {s.num} PNG files")

def main(s, world):
    system, path = System(s, world), Path(s.out, "samples.npz")
    settings = {f.name: getattr(s, f.name) for f in fields(s) if f.metadata.get("same", True)}
    identity = settings | system.origin
    if path.exists() and not s.fresh:
        require_same(path, identity)
        if world.rank == 0:  # left by a kill just before the end of sample_all
            shutil.rmtree(path.with_name("samples_parts"), ignore_errors=True)
        world.print(f"{path} is finished: {s.num} images with these settings; --fresh makes them again")
    else:
        sample_all(system, s, world, identity, path)
    if world.rank == 0:
        pictures(system, s, path)
        reference = "" if s.preset == "mini" else " --reference VIRTUAL_imagenet256_labeled.npz"
        print(f"Next: python fid.py {flags_of_run(s, system.vae)}{reference}")

if __name__ == "__main__":
    run_script(Settings, PRESETS, __doc__, main)
