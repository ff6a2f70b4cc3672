"""Images from a trained LightningDiT: the ODE, its guidance, and the batch that scores are computed from.

Paper: arXiv 2501.01423, Sec. 5.4: "we use a 250-step Euler integrator [...] we adopt cfg interval [19]
and timestep shift similar to FLUX [20]". Time as in training: t = 0 is noise, t = 1 is data.
Read it top to bottom: Settings and PRESETS (one for every score of the paper), shift_timesteps, the
integrators, guided_velocity, and sample_unit, which is all of sampling in three lines.

    python sample.py                                   the mini run: samples.npz, samples.png
    torchrun --nproc_per_node=8 -- sample.py --preset imagenet256 --out RUN --vae VAE
    python sample.py --preset official-demo            the authors' weights, eight images
"""
import signal

if __name__ == "__main__":  # Ctrl-C while torch is loading: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.integrate import RK45

from train_vae import opt, step_generator, to_float, to_uint8
from vae import autocast, check_entries, reading, require


@dataclass
class Settings:
    # The values are preset imagenet256's: LightningDiT-XL after 64 epochs, with guidance [Table 3]; without
    # --preset the script takes preset mini. Each setting is a flag, and its comment the flag's help.
    preset: str = "imagenet256"  # named settings; every other flag overrides one of them
    # --- the integrator: [Sec. 4] "sampled with a dopri5 integrator", Table 1; [Sec. 5.4] Euler, Table 3. 250
    # steps as REPA and DiT, for equal cost; they are 249, for the authors take linspace(0, 1, 250).
    integrator: str = opt("euler", choices=("euler", "heun", "dopri5"))  # dopri5 chooses its own steps
    steps: int = opt(250, "[2, 1e5]")  # points of the time grid: 250 are 249 evaluations of euler
    # The paper gives no reason for 0.3. It puts 192 of the 250 points below t = 0.5, near noise, instead of
    # 125. The usual reason (SD3): a latent of more numbers shows its image through more noise, so it is
    # decided earlier. FLUX counts time the other way round: 0.3 here is 1 / 0.3 = 3.3 there.
    shift: float = opt(0.3, "(0, inf)")  # timestep shift s: below 1 more points near noise, 1 = none
    # --- guidance: the authors' code guides 3 channels of 32, as DiT's code does of 4; no reason is given. So
    # few must be pushed hard: hence 10.0 or 6.7, where about 4 serves for all channels (the authors' issues).
    cfg_scale: float = 10.0  # guidance w in v_null + w (v_class - v_null); 1 = none
    cfg_channels: int = 3  # guide the first k latent channels only; 0 = all
    # [19] guides in the middle only: near noise guidance costs variety. (Near data, too, it stops there, not
    # so in the authors' code.) No reason is given for 0.10 or 0.125.
    cfg_interval_start: float = opt(0.10, "[0, 1]")  # guidance acts for t >= this
    # The scale would multiply bf16's rounding errors: so LightningDiT is fp32 here, as in the authors' code.
    precision: str = opt("fp32", choices=("fp32", "bf16"))  # of LightningDiT; fp32 is TF32 on CUDA
    # --- what to draw
    num: int = opt(50000, "[1, 1e7]")  # images (torchrun: write -- before sample.py, or it takes --num)
    labels: str = "random"  # random, balanced (image i has class i mod classes), or a list like 3,207
    seed: int = opt(0, "[0, 9e18]")  # sample i is a function of (seed, i), and with dopri5 of its batch
    batch_size: int = opt(125, "[1, 1e5]")  # images in a forward pass, twice that under guidance
    # --- how it runs
    out: str = opt("", same=False)  # folder of the run; default runs/PRESET
    dit: str = opt("", same=False)  # checkpoint of train_dit.py; default OUT/dit.pt
    vae: str = opt("", same=False)  # checkpoint of train_vae.py; default OUT/vae.pt
    weights: str = opt("ema", choices=("ema", "model"))  # which weights of dit.pt
    unfinished: bool = opt(False, same=False)  # take checkpoints whose training is not finished
    data: str = opt("", same=False)  # may repeat what the checkpoint was trained on; else it is an error
    image_size: int = opt(0, same=False)  # may repeat the checkpoint's, likewise
    device: str = opt("auto", choices=("auto", "cuda", "cpu"), same=False)  # auto: CUDA if there is one
    compile: bool = opt(torch.cuda.is_available(), same=False)  # torch.compile LightningDiT
    fresh: bool = opt(False, same=False)  # discard samples.npz and unfinished samples in OUT
    png: bool = opt(False, same=False)  # also write every image to OUT/samples/000000.png ...
    sweep: str = opt("", same=False)  # picture sweep.png: a row for each guidance scale, like 1,2,4
    trajectory: str = opt("", same=False)  # picture trajectory.png: x_t decoded at times like 0,0.5,1

# Ours, for two CPU cores: eight channels need neither a shift nor a large scale.
MINI = {"num": 1000, "labels": "balanced", "batch_size": 100, "steps": 25, "shift": 1.0, "cfg_scale": 2.0,
        "cfg_interval_start": 0.0, "cfg_channels": 0}
# [Sec. 4] "no sample optimization methods such as cfg interval and timestep shift are used"
DOPRI5 = {"integrator": "dopri5", "shift": 1.0, "cfg_scale": 1.0}
PLAIN, LATE = {"cfg_scale": 1.0}, {"cfg_scale": 6.7, "cfg_interval_start": 0.125}
PRESETS = {
    "mini": MINI, "imagenet256": {},
    "table1": DOPRI5,  # FID-50k: 19.50 (DiT-XL/2) to 7.13 (LightningDiT-XL/2), 4.29 (XL/1 on VA-VAE)
    # Table 2 (4, 5, A1 to A3, too) names no integrator; ours is Table 1's. B, L, XL on f16d32 with DINOv2:
    "table2": DOPRI5 | {"num": 10000},  # FID-10K 15.82, 9.82, 8.22
    # The paper does not say whether Table 3 keeps the shift where it leaves out guidance; ours does.
    "table3-64ep": PLAIN,  # gFID 5.14, sFID 4.22, IS 130.2, precision 0.76, recall 0.62
    "table3-64ep-cfg": {},  # 2.11, 4.16, 252.3, 0.81, 0.58
    "table3-800ep": PLAIN,  # 2.17, 4.36, 205.6, 0.77, 0.65
    "table3-800ep-cfg": LATE,  # 1.35, 4.15, 295.3, 0.79, 0.65
    # the same with the authors' released weights; the classes of their README, from 800 epochs
    "official-64ep": {}, "official-800ep": LATE,
    "official-demo": {"num": 8, "labels": "975,3,207,387,388,88,979,279", "shift": 1.0, "cfg_scale": 9.0,
                      "cfg_interval_start": 0.0},
}

# --- The ODE dx/dt = v(x, t), from t = 0 (noise) to t = 1 (data) -------------------------------------
def shift_timesteps(t, shift):
    """Times t in [0, 1] (tensor or number) -> the same shape; shift < 1 moves them to noise, 0 and 1 stay.
    Why 0.3: see Settings.shift."""
    # [Sec. 5.4] t' = s t / (1 + (s - 1) t), the denominator written so that 1 stays exactly 1
    return shift * t / (shift * t + (1 - t))

def euler(velocity, x, ts):
    """x (B, ...) at ts[0] -> x at ts[-1], for velocity(x, t) with t 0-d. N points are N - 1 evaluations."""
    for t, t_next in pairwise(ts):
        # x_{i+1} = x_i + (t_{i+1} - t_i) v(x_i, t_i)
        x = x + (t_next - t) * velocity(x, t)
    return x

def heun(velocity, x, ts):
    """The same by the trapezoid rule, of second order: 2 (N - 1) evaluations (ours)."""
    for t, t_next in pairwise(ts):
        v = velocity(x, t)
        # x_{i+1} = x_i + (t_{i+1} - t_i) (v(x_i, t_i) + v(x_euler, t_{i+1})) / 2
        x = x + (t_next - t) * (v + velocity(x + (t_next - t) * v, t_next)) / 2
    return x

def dopri5(velocity, x, ts, rtol=1e-3, atol=1e-6):
    """The same by Dormand-Prince 5(4), which chooses its steps; UserError if it cannot go on.
    Only the ends of ts count, so a shift changes nothing. The batch has ONE step size, from the error over
    all of it: with dopri5 a sample depends a little on its neighbours. Tolerances: the authors' code."""
    def slope(t, flat):
        v = velocity(torch.from_numpy(flat).view(x.shape).to(x), t)
        # at a NaN, RK45 would make its step smaller for ever
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
    last row of the class table, which training put in the place of a tenth of the labels. channels: guide the
    first k, None = all. Scale 1 or t < interval_start: no unconditional half."""
    times = torch.full((len(x),), float(t), dtype=x.dtype, device=x.device)
    # [Sec. 5.4, "cfg interval"] v = v_class near noise
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

# --- A sample in three lines: noise and classes, the ODE, the decoder --------------------------------
@torch.inference_mode()
def sample_unit(system, s, indices, ts):
    """Indices of B samples, times ts (time_grid) -> images (B, 3, H, W), about [-1, 1], and classes (B,)."""
    x0, y = draw(system, s, indices)
    x1 = integrate(system, s, x0, y, ts)
    # Undo each channel's (z - mean) / std of train_dit.py, with the statistics that its checkpoint keeps.
    # Nothing else is done to a latent before the decoder: no clipping, no noise of the posterior.
    return decode(system, x1 * system.std + system.mean), y

def time_grid(s):
    """(steps,) times from 0 to 1, float64 on the CPU, where comparing them costs no wait for the GPU."""
    return shift_timesteps(torch.linspace(0, 1, s.steps, dtype=torch.float64), s.shift)

# === Plumbing: nothing of the paper below this line ===
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dit import SIZES, LightningDiT, read_released_dit
from train_dit import ddpm_velocity
from train_vae import DiskArrays, Stop, atomic_write, load_checkpoint, npz_array, run_script, save_grid
from vae import UserError, file_hash, fingerprint, hub_file, load_tokenizer, load_weights, torch_load


class System:
    """What turns noise into images: a LightningDiT and the tokenizer that it was trained on, ours or the
    authors', on this process's device. UserError if they, or the settings s, do not fit."""
    def __init__(self, s, world):
        if s.preset in OFFICIAL:
            dit, vae, state = read_official(s.preset, world)
        else:
            dit, vae = s.dit or f"{s.out}/dit.pt", s.vae or f"{s.out}/vae.pt"
            state = load_checkpoint(dit, "dit", "run python train_dit.py first, or name one with --dit")
        check_entries(state, dit, "step", "total_steps", "arch", "latents", "classes", "objective", "data",
                      "image_size", "tokenizer", s.weights)
        require(s.unfinished or state["step"] == state["total_steps"], f"{dit} is unfinished (step "
                f"{state['step']} of {state['total_steps']}): run train_dit.py again, or --unfinished")
        self.tokenizer, tokenizer = load_tokenizer(vae, world.device, unfinished=s.unfinished)
        vae_hash, trained_on = fingerprint(tokenizer["state_dict"]), state["tokenizer"]
        require(trained_on.get("fingerprint", "none") in (vae_hash, None), f"{dit} was trained on latents of "
                f"another tokenizer ({trained_on.get('path')}) than {vae}: name it with --vae")
        pixels, n = state["image_size"], len(state["classes"])
        with reading(dit):
            model = LightningDiT(**state["arch"])
            load_weights(model, state[s.weights], dit)
            # statistics (1, C, 1, 1) of all latents, shape (C, h, w) of one
            self.mean, self.std = (state["latents"][key].float().to(world.device) for key in ("mean", "std"))
            self.shape, self.classes = tuple(state["latents"]["shape"]), state["classes"]
            side, stats = pixels // self.tokenizer.f, torch.stack([self.mean, self.std])
            whole = stats.shape == (2, 1, model.in_channels, 1, 1) and stats.abs().max() < 1e6
            whole = whole and self.std.min() > 0 and self.shape == (self.tokenizer.embed_dim, side, side)
            whole = whole and state["objective"] in ("flow", "ddpm") and n == model.num_classes
        require(whole, f"{dit} is damaged: its latents or classes do not fit its network or the tokenizer")
        self.model = model.to(world.device).eval().requires_grad_(False)
        if state["objective"] == "ddpm":
            self.model = ddpm_velocity(self.model)
        # a single batch is done before it would be compiled
        if s.compile and s.num > s.batch_size:
            self.model = torch.compile(self.model)
        self.device, self.dit, self.vae = world.device, dit, vae
        # what samples.npz tells of its origin
        size = [name for name, size in SIZES.items() if size.items() <= state["arch"].items()] or ["other"]
        self.identity = {"objective": state["objective"], "data": state["data"], "image_size": pixels,
                         "model": f"{size[0]}/{model.patch_size}", "dit_step": state["step"],
                         "dit_fingerprint": fingerprint(state[s.weights]), "tokenizer_fingerprint": vae_hash}
        # the flags, now and not after the last image
        listed = "" if s.labels in ("random", "balanced") else s.labels
        self.listed = numbers("--labels", listed, n - 1, int) or range(n)
        self.scales, self.times = numbers("--sweep", s.sweep, 1000), numbers("--trajectory", s.trajectory, 1)
        require(model.y_embedder.dropout_prob or {s.cfg_scale, *self.scales} == {1}, f"{dit} was trained "
                "with --class-dropout 0: there is no null class to guide with; use --cfg-scale 1")
        require(s.cfg_channels <= self.shape[0],
                f"--cfg-channels {s.cfg_channels}: the latents have {self.shape[0]} channels")
        for flag, value, own in (("--data", s.data, state["data"]), ("--image-size", s.image_size, pixels)):
            require(value in ("", 0, own), f"{flag} {value}: the checkpoint is for {own}; leave {flag} out")

OFFICIAL = {"official-64ep": 64, "official-800ep": 800, "official-demo": 800}  # epochs

def read_official(preset, world):
    """Preset -> files of LightningDiT-XL/1 and VA-VAE in torch.hub's cache, and a state like dit.pt's.
    We have never seen the authors' files: their hashes are printed, not stated."""
    vae, dit = "vavae-imagenet256-f16d32-dinov2", f"lightningdit-xl-imagenet256-{OFFICIAL[preset]}ep"
    files = (vae, vae), (vae, "latents_stats"), (dit, dit)
    urls = [f"https://huggingface.co/hustvl/{place}/resolve/main/{name}.pt" for place, name in files]
    with world.first():
        vae, stats, dit = paths = [hub_file(url) for url in urls]
    for path in paths:
        world.print(f"{path}\n  {file_hash(path)}")
    weights, latents = read_released_dit(dit), torch_load(stats)
    with reading(stats):
        latents = {key: latents[key].view(1, 32, 1, 1) for key in ("mean", "std")}
    # The 800-epoch release is said to have no QK-norm (the authors' issue 68): its weights' names decide.
    arch = SIZES["XL"] | {"use_qknorm": any(".q_norm." in key for key in weights)}
    return dit, vae, {"step": 0, "total_steps": 0, "arch": arch, "ema": weights, "model": weights,
                      "objective": "flow", "data": "imagenet", "image_size": 256,
                      "classes": list(range(1000)), "tokenizer": {"fingerprint": None},
                      "latents": latents | {"shape": (32, 16, 16)}}

def numbers(flag, text, high, kind=float):
    """'1,2.5' -> [1.0, 2.5], '' -> []; UserError that names the flag unless all are from 0 to high."""
    try:
        values = [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        values = [-1]
    require(all(0 <= v <= high for v in values), f"{flag} {text}: give numbers from 0 to {high}, with commas")
    return values

def draw(system, s, indices):
    """Indices -> noise (B, C, h, w) and classes (B,): sample i from its own CPU generator, of (seed, i)."""
    noise, y = [], []
    for i in indices:
        generator = step_generator("cpu", s.seed, i)
        # the noise first, so that it is the same whatever the labels
        noise.append(torch.randn(system.shape, generator=generator))
        drawn = int(torch.randint(len(system.classes), (), generator=generator))
        y.append(drawn if s.labels == "random" else system.listed[i % len(system.listed)])
    return torch.stack(noise).to(system.device), torch.tensor(y, device=system.device)

def integrate(system, s, x, y, ts):
    """x (B, C, h, w) at ts[0], classes y (B,) -> x at ts[-1], by the settings."""
    def velocity(x, t):
        return guided_velocity(system.model, x, t, y, s.cfg_scale, len(system.classes), s.cfg_interval_start,
                               s.cfg_channels or None)

    with autocast(x, s.precision == "bf16"):
        return {"euler": euler, "heun": heun, "dopri5": dopri5}[s.integrator](velocity, x, ts)

def decode(system, z):
    """Latents z (B, C, h, w) -> images (B, 3, H, W); UserError, for clipping would make NaN black pixels."""
    require(z.isfinite().all(), f"{system.dit} gives latents that are not finite: its weights are broken")
    # 16 at a time, for memory
    images = torch.cat([system.tokenizer.decode(part) for part in z.split(16)])
    require(images.abs().max() < 1000, f"{system.vae} gives images that are not finite, or far from [-1, 1]: "
            "its weights are broken")
    return images

def sample_all(system, s, world, identity, batch):
    """All samples into the file `batch`, which is whole when rank 0 returns.
    Work is dealt in units of one batch, samples [k B, (k + 1) B), each of them the same arithmetic whoever
    does it: so the file has the same bytes for any number of processes and after any interruption."""
    size, on_gpu = system.identity["image_size"], world.device.type == "cuda"
    pngs = list(batch.parent.glob("samples/" + "[0-9]" * 6 + ".png"))
    require(s.fresh or not (s.png and pngs), f"{batch.parent}/samples holds PNGs, which would mix with the "
            "new ones: move them away, or --fresh to replace them")
    rows = {"arr_0": ((size, size, 3), np.uint8), "arr_1": ((), np.int64)}
    parts = DiskArrays(batch.with_name("samples_parts"), s.num, s.batch_size, rows, identity, world, s.fresh)
    if s.fresh and world.rank == 0:  # not before the folder is ours alone
        batch.unlink(missing_ok=True)
    stop, ts, mine = Stop(world), time_grid(s), parts.missing()

    def work(unit):
        start, end = unit
        if stop.asked:
            return
        # Both are this thread's own settings. A sum's last bits depend on how many threads share it: one.
        torch.set_num_threads(1)
        if on_gpu:
            torch.cuda.set_device(world.device)
        # The last unit is filled up with samples that nobody asked for: another size would be two more graphs
        # to compile, with guidance and without.
        images, y = sample_unit(system, s, range(start, start + min(s.batch_size, s.num)), ts)
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        parts.write(start, arr_0=pixels[:end - start], arr_1=y.cpu().numpy()[:end - start])

    # On the CPU one unit a core. A GPU does one at a time, and so does the compiler, not made for threads.
    cores = 1 if on_gpu or s.compile else max(1, (os.cpu_count() or 1) // world.size)
    with ThreadPoolExecutor(cores) as pool:
        list(tqdm(pool.map(work, mine), "sampling", len(mine), unit="batch", disable=world.rank > 0))
    # also waits for the other processes' last units
    if stop.agreed():
        stop.leave(f"stopped with {parts.count()} of {s.num} images; the same command goes on from there")
    stop.end()
    if world.rank == 0:
        # An ADM batch: arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,) classes, meta a JSON string. Nothing in it
        # depends on when, where or by how many processes it was made. Memory maps, for it may be 10 GB.
        arrays = {name: parts.array(name) for name in rows} | {"meta": json.dumps(identity)}
        class_picture(arrays["arr_0"], arrays["arr_1"], system.classes, batch.with_name("samples.png"))
        for old in pngs if s.fresh else ():
            old.unlink(missing_ok=True)
        atomic_write(batch, lambda file: np.savez(file, **arrays))
        print(f"{batch}: {s.num} images")

def require_same(batch, identity):
    """UserError if an .npz that is there was made with other settings: nothing is replaced unasked."""
    try:
        made = json.loads(str(npz_array(batch, "meta")))
        changed = [f"{k} {made.get(k)} (now {v})" for k, v in identity.items() if made.get(k) != v]
    except (UserError, ValueError, AttributeError):
        raise UserError(f"{batch} is not a batch of this script: move it away, or --fresh to replace it")
    require(not changed, f"{batch} was made with other settings: {', '.join(changed)}. Repeat those, --fresh "
            "to start over, or another --out with --dit and --vae")

def class_picture(images, labels, classes, path):
    """A row for each class (at most 20), its first samples (at most 10); rows of four if each has one."""
    shown = list(dict.fromkeys(labels.tolist()))[:20]
    n = min(10, *(int((labels == c).sum()) for c in shown))
    rows = np.concatenate([images[np.flatnonzero(labels == c)[:n]] for c in shown])
    save_grid(to_float(torch.from_numpy(rows).permute(0, 3, 1, 2)), path, n if n > 1 else 4)
    print(f"{path}, classes:", *(classes[c] for c in shown))

def pictures(system, s, batch):
    """What the flags ask for: sweep.png and trajectory.png of samples 0 to 7, every image as a PNG."""
    out, ts = batch.parent, time_grid(s)
    if system.scales:
        rows = [sample_unit(system, replace(s, cfg_scale=w), range(8), ts)[0] for w in system.scales]
        save_grid(torch.cat(rows), out / "sweep.png", 8)
    if system.times:
        # columns: x_t at the grid points nearest to the times, decoded
        stops = sorted({int((ts - t).abs().argmin()) for t in system.times})
        columns = [sample_unit(system, s, range(8), ts[:k + 1])[0] for k in stops]
        save_grid(torch.stack(columns, dim=1).flatten(0, 1), out / "trajectory.png", len(stops))
        print(f"{out}/trajectory.png, columns: t =", *(f"{ts[k]:.3f}" for k in stops))
    if s.png:
        images, side = npz_array(batch), system.identity["image_size"]
        require(images.dtype == np.uint8 and images.shape == (s.num, side, side, 3), f"{batch} is damaged: "
                "--fresh makes it again")
        for i, image in enumerate(tqdm(images, "PNG", unit="image")):
            picture = Image.fromarray(image)
            atomic_write(out / "samples" / f"{i:06d}.png", lambda file, p=picture: p.save(file, "PNG"))

def main(s, world):
    system, batch = System(s, world), Path(s.out, "samples.npz")
    settings = {f.name: getattr(s, f.name) for f in fields(s) if f.metadata.get("same", True)}
    # "guidance" is what fid.py looks for
    identity = {**settings, **system.identity, "guidance": s.cfg_scale}
    if batch.exists() and not s.fresh:
        require_same(batch, identity)
        world.print(f"{batch} is finished: {s.num} images with these settings; --fresh makes them again")
    else:
        sample_all(system, s, world, identity, batch)
    if world.rank == 0:
        # not with the rest of sample_all: a kill may come between samples.npz and this
        DiskArrays.remove(batch.with_name("samples_parts"), "arr_0", "arr_1")
        pictures(system, s, batch)

if __name__ == "__main__":
    run_script(Settings, PRESETS, __doc__, main)
