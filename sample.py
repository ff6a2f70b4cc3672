"""Images from a trained LightningDiT: the sampler of Sec. 5.4, its guidance, and the batch of images that scores are computed from.

Paper: arXiv 2501.01423, Sec. 5.4: "we use a 250-step Euler integrator [...] we adopt cfg interval and timestep shift".

How to read it, top to bottom:
    Settings, PRESETS     every choice, with the settings of the published numbers
    shift_timesteps, euler, heun, dopri5, guided_velocity      the mathematics: the ODE dx/dt = v(x, t) from noise (t = 0) to data (t = 1)
    load_run, load_official      a run of train_dit.py, or the authors' released weights
    sample_unit           indices -> noise -> latents -> images; sample i is a function of (seed, i) alone
    sample_all, merge     any number of images over any number of processes, killed and resumed, into one ADM .npz
    the pictures          classes, guidance sweep, trajectory, interpolation

    python sample.py                                             the mini run: runs/mini/samples.npz and samples.png
    torchrun --nproc_per_node=8 sample.py --preset imagenet256   50,000 images on 8 GPUs
    python sample.py --preset official-800ep                     the authors' weights, the eight images of their README
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")                            # before torch is loaded; see train_vae.py
import hashlib
import json
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from scipy.integrate import RK45
from tqdm import tqdm

from dit import SIZES, LightningDiT
from train_dit import ddpm_velocity, load_weights, read_released_dit
from train_vae import (Stop, atomic_write, fingerprint, load_checkpoint, load_tokenizer, opt, read_released_tokenizer, run_script,
                       step_generator, to_uint8, torch_load)
from vae import AutoencoderKL, autocast, fail, hub_file


# --- Settings -----------------------------------------------------------------------------------------------------------------------------------
@dataclass
class Settings:
    preset: str = opt("mini", "named settings below; any flag overrides them")
    out: str = opt("", "run directory; default runs/<preset>", same=False)
    dit: str = opt("", "checkpoint of train_dit.py; default OUT/dit.pt", same=False)
    vae: str = opt("", "checkpoint of train_vae.py; default OUT/vae.pt", same=False)
    data: str = opt("", "may repeat the data that the checkpoint was trained on; anything else is an error", same=False)
    image_size: int = opt(0, "pixels; may repeat the checkpoint's, likewise", same=False)
    # what to draw
    seed: int = opt(0, "sample i is a function of (seed, i) alone")
    num: int = opt(1000, "number of images (under torchrun write -- before sample.py, or torchrun takes --num for its own --numa-binding)")
    batch_size: int = opt(100, "images in one forward pass, twice that under guidance; whole batches are dealt to processes and, on CPU, to cores")
    labels: str = opt("balanced", "balanced (image i has class i mod classes), random (uniform), or a list like 3,207,388 that is repeated")
    weights: str = opt("ema", "which weights of a run's dit.pt", choices=("ema", "model"))
    # how to integrate and guide [Sec. 5.4]
    integrator: str = opt("euler", "dopri5 chooses its steps (rtol 1e-3, atol 1e-6); --steps is then for the trajectory picture only",
                          choices=("euler", "heun", "dopri5"))
    steps: int = opt(50, "points of the time grid, counted as in the authors' code: 250 points are 249 evaluations of euler, 498 of heun")
    shift: float = opt(1.0, "timestep shift s of the grid, t' = s t / (1 + (s - 1) t): below 1 more points near noise, 1 = none")
    cfg_scale: float = opt(2.0, "guidance w in v_null + w (v_class - v_null); 1 = none")
    cfg_interval_start: float = opt(0.0, "guidance acts for t >= this; below, near noise, the unconditional half is not computed")
    cfg_channels: int = opt(0, "guide the first k latent channels only; 0 = all")
    # conduct
    precision: str = opt("auto", "of LightningDiT, auto = bf16 on CUDA and fp32 on CPU; the decoder runs in fp32", choices=("auto", "fp32", "bf16"))
    compile: bool = opt(torch.cuda.is_available(), "torch.compile LightningDiT; default: on CUDA", same=False)
    device: str = opt("auto", "auto: CUDA if there is one", choices=("auto", "cpu", "cuda"), same=False)
    fresh: bool = opt(False, "discard samples.npz and unfinished parts in OUT and start over", same=False)
    png: bool = opt(False, "also write every image to OUT/samples/000000.png ...", same=False)
    # pictures; they may be asked for later too, of a finished run
    sweep: str = opt("", "picture sweep.png: a row for each guidance scale, e.g. 1,2,4, from the same noise", same=False)
    trajectory: str = opt("", "picture trajectory.png: decoded x_t at the grid points nearest to these t, e.g. 0,0.25,0.5,0.75,1", same=False)
    interpolate: int = opt(0, "picture interpolation.png: this many images (2 or more) between two noises of one class; 0 = none", same=False)
    sha256: str = opt("", "official presets: 'file=hash,...' (8 or more hex digits) that the downloaded files must match", same=False)
    bench: str = opt("", "instead: images/s of this LightningDiT, e.g. XL/1, with random weights at these settings; writes nothing", same=False)


# [Sec. 5.4] 250 Euler steps; the authors' code: shift 0.3, guidance on the first 3 of 32 channels, which is why the scales are so large.
PUBLISHED = dict(steps=250, shift=0.3, cfg_channels=3, batch_size=128)
README_CLASSES = "975,3,207,387,388,88,979,279"    # the eight images of the authors' README
PRESETS = {
    "mini": dict(),                                # the defaults above: ours, for two CPU cores
    "imagenet256": dict(num=50000, labels="random", cfg_scale=10.0, cfg_interval_start=0.10, **PUBLISHED),       # 64 epochs: FID 2.11
    "official-64ep": dict(num=8, labels=README_CLASSES, cfg_scale=10.0, cfg_interval_start=0.10, **PUBLISHED),
    "official-800ep": dict(num=8, labels=README_CLASSES, cfg_scale=6.7, cfg_interval_start=0.125, **PUBLISHED),  # FID 1.35
}
# The released files, huggingface.co/hustvl/<repository>/resolve/main/<file>. We have never seen them, so their hashes are printed, not stated.
HUB = "https://huggingface.co/hustvl"
RELEASED_VAE = f"{HUB}/vavae-imagenet256-f16d32-dinov2/resolve/main/vavae-imagenet256-f16d32-dinov2.pt"
RELEASED_STATS = f"{HUB}/vavae-imagenet256-f16d32-dinov2/resolve/main/latents_stats.pt"
RELEASED_DIT = {f"official-{e}ep": f"{HUB}/lightningdit-xl-imagenet256-{e}ep/resolve/main/lightningdit-xl-imagenet256-{e}ep.pt" for e in (64, 800)}


# --- The ODE dx/dt = velocity(x, t), from t = 0 (noise) to t = 1 (data) ---------------------------------------------------------------------------
# velocity(x, t): x (B, ...); t a tensor that broadcasts against x: 0-d from euler and heun, (B, 1, ...) from dopri5, where each sample has its own.
# [Sec. 5.4] "timestep shift similar to FLUX": t' = s t / (1 + (s - 1) t)
def shift_timesteps(t, shift):
    """Time grid t in [0, 1] (tensor or float) -> the same shape in [0, 1]; ends stay, shift < 1 moves points towards noise, 1 is the identity."""
    return shift * t / (shift * t + (1 - t))                                     # the same denominator, written so that 1 stays exactly 1


# x[i+1] = x[i] + (ts[i+1] - ts[i]) v(x[i], ts[i])
def euler(velocity, x, ts):
    """x (B, ...) at ts[0] -> x at ts[-1]. N points are N - 1 evaluations: the "250 steps" of [Sec. 5.4] are linspace(0, 1, 250) in code, so 249."""
    for t, t_next in zip(ts[:-1], ts[1:]):
        x = x + (t_next - t) * velocity(x, t)
    return x


# x[i+1] = x[i] + (ts[i+1] - ts[i]) (v(x[i], ts[i]) + v(x_euler, ts[i+1])) / 2
def heun(velocity, x, ts):
    """x (B, ...) at ts[0] -> x at ts[-1] by the second-order trapezoid: 2 (N - 1) evaluations for N grid points."""
    for t, t_next in zip(ts[:-1], ts[1:]):
        v = velocity(x, t)
        x = x + (t_next - t) * (v + velocity(x + (t_next - t) * v, t_next)) / 2
    return x


# x_new = x + h sum_j B_j k_j,  k_j = v(x + h sum_i A_ji k_i, t + C_j h),  error = rms(h sum_j E_j k_j / (atol + rtol max(|x|, |x_new|)))
def dopri5(velocity, x, ts, rtol=1e-3, atol=1e-6):
    """x (B, ...) at ts[0] -> x at ts[-1] > ts[0] by Dormand-Prince 5(4) with error control. Only the ends of ts count, so a shift changes nothing.

    Table 1 of the paper is sampled this way. Tableau and step rules are scipy.integrate.RK45's, but each SAMPLE has its own step. Measured on a
    mixture of 16 Gaussians, 64 samples of 256 numbers: taking a sample out of its batch moves it by 2e-5; with RK45 on the whole batch, whose error
    norm runs over all samples, by 2e-2, more than a grey level; RK45 sample by sample makes 1946 network calls instead of 56. Samples that have
    arrived wait for the others. Fails if the velocity is not finite or the step vanishes.
    """
    # A, C: where the stages look; B: their weights in the fifth-order result; E: B minus the fourth-order weights, so h E k estimates the error
    A, B, C, E = RK45.A.tolist(), RK45.B.tolist(), RK45.C.tolist(), RK45.E.tolist()
    per_sample = (len(x),) + (1,) * (x.dim() - 1)
    norm = lambda d, scale: (d / scale).square().flatten(1).mean(1).sqrt().view(per_sample)    # noqa: E731      (B, 1, ...)
    mix = lambda weights, k: sum(w * k_j for w, k_j in zip(weights, k) if w)                   # noqa: E731
    t = torch.full(per_sample, float(ts[0]), dtype=x.dtype, device=x.device)
    end = torch.full_like(t, float(ts[-1]))
    f, scale = velocity(x, t), atol + rtol * x.abs()
    # The first step (Hairer, Norsett and Wanner, Sec. II.4): a small Euler step tells how fast the velocity turns.
    d0, d1 = norm(x, scale), norm(f, scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).minimum(end - t)
    d2 = norm(velocity(x + h0 * f, t + h0) - f, scale) / h0
    turn = torch.maximum(d1, d2)
    h = torch.where(turn <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / turn) ** 0.2).minimum(100 * h0)
    growth = torch.full_like(t, 10.0)
    while (t < end).any():
        t_new = torch.minimum(t + h, end)
        if ((h < 1e-12) & (t_new < end)).any():
            fail(f"dopri5: the step size vanished at t = {t.min():.6f}; use --integrator euler")
        h, k = t_new - t, [f]                                                    # h = 0 for a sample that has arrived
        for a, c in zip(A[1:], C[1:]):
            k.append(velocity(x + h * mix(a, k), t + c * h))
        x_new = x + h * mix(B, k)
        k.append(velocity(x_new, t_new))                                         # is also the first evaluation of the next step
        error = norm(h * mix(E, k), atol + rtol * torch.maximum(x.abs(), x_new.abs()))
        if not error.isfinite().all():
            fail(f"dopri5: the velocity is not finite near t = {t.min():.6f}: check the checkpoint, or try --precision fp32")
        accept = error < 1
        # the error is of order h^5: the next h would bring it to 0.9^5 of the tolerance, within [0.2, growth] of this one
        h = h * (0.9 * error ** -0.2).clamp(min=0.2).minimum(torch.where(accept, growth, 1.0))
        growth = torch.where(accept, 10.0, 1.0)                                  # as in scipy: no growth right after a rejected step
        x, f, t = torch.where(accept, x_new, x), torch.where(accept, k[-1], f), torch.where(accept, t_new, t)
    return x


INTEGRATORS = dict(euler=euler, heun=heun, dopri5=dopri5)


# v = v_null + w (v_class - v_null) on the first `channels` channels for t >= interval_start, v = v_class elsewhere
def guided_velocity(model, x, t, y, scale, null_class=None, interval_start=0.0, channels=None):
    """Velocity under classifier-free guidance, (B, C, H, W) like x.

    model(x, t, y): velocity network; t in [0, 1]: number, 0-d or one per sample; y (B,) classes; scale w, 1 = no guidance; null_class: default
    model.num_classes, the last row of the class table; interval_start: samples with t below it get the conditional velocity alone and no
    unconditional evaluation [Sec. 5.4, "cfg interval"]; channels: guide the first k only, None = all (the authors' code: 3 of 32).
    The conditional and the unconditional half run as one batch.
    """
    t = torch.as_tensor(t).reshape(-1)
    guided = ((t >= interval_start) & (scale != 1)).expand(len(x)).nonzero().flatten().to(x.device)      # rows under guidance; no wait if t is on CPU
    t = t.to(x.device, x.dtype).expand(len(x))                                   # (B,)
    if len(guided) == 0:
        return model(x, t, y).to(x.dtype)
    # the conditional half is all B samples, the unconditional half only the G guided ones
    null = torch.full_like(y[guided], model.num_classes if null_class is None else null_class)
    v = model(torch.cat([x, x[guided]]), torch.cat([t, t[guided]]), torch.cat([y, null])).to(x.dtype)    # (B + G, C, H, W)
    v, v_null = v[:len(x)].clone(), v[len(x):]
    v[guided, :channels] = v_null[:, :channels] + scale * (v[guided, :channels] - v_null[:, :channels])
    return v


# --- What to sample from ------------------------------------------------------------------------------------------------------------------------
def make_system(s, device, model, tokenizer, latents, classes, objective="flow", model_name="", **identity):
    """Everything that turns noise into images: networks on `device`, latent statistics and shape, and `identity`, which goes into the .npz."""
    channels = latents["shape"][0]
    for ok, message in ((s.steps >= 2, f"--steps {s.steps}: a time grid has at least 2 points"),
                        (s.shift > 0, f"--shift {s.shift} must be above 0"),
                        (s.cfg_interval_start <= 1, f"--cfg-interval-start {s.cfg_interval_start} is not in [0, 1]"),
                        (s.cfg_channels <= channels, f"--cfg-channels {s.cfg_channels}: the latents have {channels} channels"),
                        (s.interpolate != 1, "--interpolate 1: at least 2 images, or 0 for no picture"),
                        (s.data in ("", identity["data"]), f"--data {s.data}: the checkpoint is for {identity['data']}; leave the flag out"),
                        (s.image_size in (0, identity["image_size"]),
                         f"--image-size {s.image_size}: the checkpoint is for {identity['image_size']}; leave the flag out")):
        if not ok:
            fail(message)
    for text, flag in ((s.sweep, "--sweep"), (s.trajectory, "--trajectory")):    # early: a typing error must not wait for the first batch
        numbers(text, flag)
    num_classes = model.num_classes
    parse_labels(s.labels, num_classes)
    # Precision and compilation are decided here and nowhere else. Fixed shapes for euler and heun: guidance on and off are two graphs.
    bf16 = s.precision == "bf16" or s.precision == "auto" and device.type == "cuda"
    model = model.eval().requires_grad_(False).to(device)
    if s.compile:
        model = torch.compile(model, dynamic=s.integrator == "dopri5")
    return SimpleNamespace(model=ddpm_velocity(model) if objective == "ddpm" else model, num_classes=num_classes, classes=classes, bf16=bf16,
                           tokenizer=tokenizer.eval().requires_grad_(False).to(device), shape=latents["shape"], device=device,
                           mean=latents["mean"].to(device), std=latents["std"].to(device),
                           identity=dict(model=model_name, objective=objective, precision="bf16" if bf16 else "fp32", **identity))


def load_run(s, device):
    """The LightningDiT of --dit and the tokenizer of --vae that it was trained on."""
    path = s.dit or f"{s.out}/dit.pt"
    dit = load_checkpoint(path, "dit", "run python train_dit.py first, or name one with --dit")
    tokenizer, vae = load_tokenizer(s.vae or f"{s.out}/vae.pt", device)
    vae_hash = fingerprint(vae["state_dict"])
    if vae_hash != dit["tokenizer"]["fingerprint"]:
        fail(f"{path} was trained on latents of another tokenizer ({dit['tokenizer']['path']}) than {s.vae or f'{s.out}/vae.pt'}: name it with --vae")
    model = LightningDiT(**dit["arch"])
    load_weights(model, dit[s.weights], path)
    arch = dit["arch"]
    name = next((f"{name}/{arch.get('patch_size', 1)}" for name, size in SIZES.items() if size.items() <= arch.items()), "other")
    return make_system(s, device, model, tokenizer, dit["latents"], dit["classes"], dit["objective"], model_name=name, data=dit["data"],
                       image_size=dit["image_size"], dit_step=dit["step"], dit_fingerprint=fingerprint(dit[s.weights]),
                       tokenizer_fingerprint=vae_hash)


def load_official(s, world):
    """The published VA-VAE f16d32 and LightningDiT-XL/1 [Table 2, Sec. 5.4] through torch.hub's cache; prints the SHA-256 of each file."""
    pins = dict(pin.split("=", 1) for pin in s.sha256.split(",") if "=" in pin)
    urls = {url.rsplit("/", 1)[1]: url for url in (RELEASED_VAE, RELEASED_STATS, RELEASED_DIT[s.preset])}
    if set(pins) - set(urls) or s.sha256.count("=") != len(s.sha256.split(",")) * bool(s.sha256) or any(len(p) < 8 for p in pins.values()):
        fail(f"--sha256 {s.sha256}: give 'file=hash,...' with 8 or more hex digits and files out of {', '.join(urls)}")
    for turn in (True, False):                                                   # rank 0 downloads, hashes and prints; then the others read
        if turn == (world.rank == 0):
            paths = [hub_file(url, sha256=pins.get(name) if turn else None) for name, url in urls.items()]
            for path in paths if turn else ():
                with open(path, "rb") as f:
                    digest = hashlib.sha256()
                    while block := f.read(1 << 22):
                        digest.update(block)
                print(f"{path}\n  sha256 {digest.hexdigest()}" + ("" if path.name in pins else "  (not pinned: see --sha256)"), flush=True)
        barrier(world)
    spec, weights = read_released_tokenizer(paths[0])
    tokenizer = AutoencoderKL(**spec)
    tokenizer.load_state_dict(weights)
    stats = torch_load(paths[1])
    released = read_released_dit(paths[2])
    side, channels = 16, spec["embed_dim"]                                       # 256 / f16
    if not isinstance(stats, dict) or any(tuple(stats.get(k, torch.empty(0)).shape) != (1, channels, 1, 1) for k in ("mean", "std")):
        fail(f"{paths[1]} does not hold 'mean' and 'std' of shape (1, {channels}, 1, 1)")
    # The facts about the 800-epoch release leave QK-norm open; the names of the weights decide.
    model = LightningDiT(input_size=side, patch_size=1, in_channels=channels, use_qknorm=any(".q_norm." in name for name in released), **SIZES["XL"])
    load_weights(model, released, paths[2])
    latents = dict(mean=stats["mean"].float(), std=stats["std"].float(), shape=[channels, side, side])
    size = side * 2 ** (len(spec["ch_mult"]) - 1)
    return make_system(s, world.device, model, tokenizer, latents, [f"class {i}" for i in range(model.num_classes)], model_name="XL/1",
                       data="imagenet", image_size=size, dit_step=None, dit_fingerprint=fingerprint(released),
                       tokenizer_fingerprint=fingerprint(weights))


# --- Sample i -----------------------------------------------------------------------------------------------------------------------------------
def parse_labels(labels, num_classes):
    """--labels -> None for 'balanced' and 'random', else the list of classes; fails on anything that is not a class."""
    if labels in ("balanced", "random"):
        return None
    listed = labels.split(",")
    if not all(c.strip().isdecimal() and int(c) < num_classes for c in listed):
        fail(f"--labels {labels}: balanced, random, or a list of classes from 0 to {num_classes - 1}")
    return [int(c) for c in listed]


def draw(system, s, indices):
    """Indices of samples -> noise x0 (B, C, H, W) and classes y (B,), each sample from its own CPU generator seeded by (seed, i)."""
    listed = parse_labels(s.labels, system.num_classes)
    noise, y = [], []
    for i in indices:
        g = step_generator("cpu", s.seed, i)
        noise.append(torch.randn(system.shape, generator=g))                     # first, so that the noise is the same whatever the labels
        drawn = int(torch.randint(system.num_classes, (), generator=g))
        y.append(listed[i % len(listed)] if listed else drawn if s.labels == "random" else i % system.num_classes)
    return torch.stack(noise).to(system.device), torch.tensor(y, device=system.device)


def time_grid(s):
    """(steps,) shifted times from 0 to 1 in float64 on the CPU, where comparing them with the guidance interval costs no GPU wait."""
    return shift_timesteps(torch.linspace(0, 1, s.steps, dtype=torch.float64), s.shift)


def integrate(system, s, x, y, ts, scale=None):
    """x (B, C, H, W) at ts[0], classes y (B,) -> x at ts[-1], and how many samples went through the network as [conditional, unconditional]."""
    rows = [0, 0]                                                                # samples asked of velocity; samples that the network saw

    def network(x, t, y):
        rows[1] += len(x)
        return system.model(x, t, y)

    def velocity(x, t):
        rows[0] += len(x)
        return guided_velocity(network, x, t, y, s.cfg_scale if scale is None else scale, system.num_classes, s.cfg_interval_start,
                               s.cfg_channels or None)

    with autocast(x, system.bf16):
        x = INTEGRATORS[s.integrator](velocity, x, ts)
    return x, [rows[0], rows[1] - rows[0]]


def decode(system, x):
    """Normalised latents x (B, C, h, w) -> uint8 images (B, H, W, 3) as a numpy array; at most 2^20 pixels at a time, for memory."""
    z = x * system.std + system.mean                                             # undo (z - mean) / std of train_dit.py
    parts = z.split(max(1, 2 ** 20 // system.identity["image_size"] ** 2))
    images = torch.cat([to_uint8(system.tokenizer.decode(part)) for part in parts])    # (B, 3, H, W)
    return images.permute(0, 2, 3, 1).cpu().numpy()                              # (B, H, W, 3)


@torch.inference_mode()
def sample_unit(system, s, indices):
    """The whole of sampling in three lines: noise and classes, the ODE, the decoder.

    One batch: indices -> uint8 images (B, H, W, 3), int64 classes (B,), evaluations [conditional, unconditional] summed over the batch.
    """
    x0, y = draw(system, s, indices)
    x1, evaluations = integrate(system, s, x0, y, time_grid(s))
    return decode(system, x1), y.cpu().numpy(), evaluations


# --- Any number of samples, over any number of processes ------------------------------------------------------------------------------------------
# Work is dealt in units of one batch, indices [k B, (k + 1) B): unit k goes to process k mod N and its images into a file of their own, so that the
# arithmetic, and with it every byte of the result, is the same for any N and after any interruption.
def barrier(world):
    """Wait for the other processes, if there are any."""
    if world.size > 1:
        dist.barrier()


def read_meta(path):
    """The "meta" of an .npz that this script wrote."""
    try:
        with np.load(path) as file:
            return json.loads(str(file["meta"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        fail(f"{path} is not a batch of this script ({error}): move it away, or --fresh to replace it")


def open_job(s, identity):
    """Rank 0, before anything is sampled: makes OUT/samples_parts, or fails if what OUT holds was made with other settings."""
    batch, parts = Path(s.out, "samples.npz"), Path(s.out, "samples_parts")
    if s.fresh:
        batch.unlink(missing_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
    note = parts / "settings.json"
    for path, made in ((batch, read_meta(batch) if batch.exists() else None), (note, json.loads(note.read_text()) if note.exists() else None)):
        different = [f"{k} {made.get(k)} (now {v})" for k, v in identity.items() if made.get(k) != v] if made else []
        if different:
            fail(f"{path} was made with other settings: {', '.join(different)}. Repeat those, --fresh to start over, or another --out with --dit "
                 "and --vae")
    # A finished batch is compared too: overwriting 50,000 images because of one forgotten flag would be worse than an error.
    if not batch.exists():
        parts.mkdir(parents=True, exist_ok=True)
        atomic_write(note, lambda f: f.write(json.dumps(identity, indent=1).encode()))


def sample_all(s, system, world, identity):
    """All images of the run into OUT/samples.npz; whatever is there already is not made again. Returns when rank 0 has merged the parts."""
    if world.rank == 0:
        open_job(s, identity)
    barrier(world)
    batch = Path(s.out, "samples.npz")
    if batch.exists():
        if world.rank == 0:
            print(f"{batch} is finished: {s.num} images with these settings; --fresh makes them again")
            shutil.rmtree(Path(s.out, "samples_parts"), ignore_errors=True)      # killed between the merge and this line
        return
    # Unit k belongs to process k mod N whether or not it exists already: processes that looked at the folder at different moments would deal
    # the missing ones differently, and lose some.
    units = [range(k, min(k + s.batch_size, s.num)) for k in range(0, s.num, s.batch_size)]
    part = lambda unit: Path(s.out, "samples_parts", f"{unit[0]:08d}.npz")       # noqa: E731
    made = lambda: sum(len(unit) for unit in units if part(unit).exists())       # noqa: E731      by all processes

    def work(unit):
        if stop.asked:
            return
        images, labels, evaluations = sample_unit(system, s, unit)
        atomic_write(part(unit), lambda f: np.savez(f, images=images, labels=labels, evaluations=evaluations))

    stop = Stop(world)
    mine = [unit for unit in units[world.rank::world.size] if not part(unit).exists()]
    # CPU: one unit a core rather than all cores on one unit. Sums are split over the threads of an operation, so the last bits of a result depend on
    # their number (measured: VA-VAE's decoder); with one thread a unit they do not. GPU: one unit at a time, and under
    # torch.compile too, since the compiler is not made for several threads.
    cores = 1 if system.device.type == "cuda" or s.compile else max(1, (os.cpu_count() or 1) // world.size)
    one_thread = None if system.device.type == "cuda" else lambda: torch.set_num_threads(1)
    with ThreadPoolExecutor(cores, initializer=one_thread) as pool, tqdm(total=s.num, initial=made(), desc="sampling", unit="image",
                                                                         disable=world.rank > 0) as bar:
        for _ in pool.map(work, mine):
            bar.update(made() - bar.n)
        while world.rank == 0 and made() < s.num and not stop.asked:             # the other processes' last units
            time.sleep(0.2)
            bar.update(made() - bar.n)
    if stop.asked:
        fail(f"stopped with {made()} of {s.num} images in {s.out}/samples_parts; the same command goes on from there")
    if world.rank == 0:
        merge(batch, [part(unit) for unit in units], identity)
        shutil.rmtree(Path(s.out, "samples_parts"))


def merge(path, parts, identity):
    """Parts -> one ADM batch: arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,) classes, meta a JSON string. Part by part: 50,000 images are 10 GB."""
    # Nothing in meta depends on when, where or by how many processes the images were made: the file is a function of settings and weights.
    labels, evaluations = [], np.zeros(2, np.int64)
    for part in parts:
        with np.load(part) as file:
            labels.append(file["labels"])
            evaluations += file["evaluations"]
            shape = file["images"].shape[1:]
    labels = np.concatenate(labels)                                              # (N,)
    mean = (evaluations / len(labels)).round(3).tolist()
    meta = {**identity, "conditional_evaluations": mean[0], "unconditional_evaluations": mean[1]}

    def write(f):
        with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
            entry = lambda name: archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)    # noqa: E731    ZipInfo: dated 1980, always
            with entry("arr_0") as out:
                header = dict(descr="|u1", fortran_order=False, shape=(len(labels), *shape))
                np.lib.format.write_array_header_1_0(out, header)
                for part in tqdm(parts, desc="writing " + path.name, unit="part"):
                    with np.load(part) as file:
                        out.write(file["images"].tobytes())
            for name, array in (("arr_1", labels), ("meta", np.array(json.dumps(meta)))):
                with entry(name) as out:
                    np.lib.format.write_array(out, array, allow_pickle=False)

    atomic_write(path, write)
    saved = 1 - sum(mean) / (2 * mean[0])
    print(f"{path}: {len(labels)} images; evaluations per image: {mean[0]:g} conditional, {mean[1]:g} unconditional"
          + (f" ({saved:.1%} of the network evaluations saved by the guidance interval)" if mean[1] and saved else ""))


def stream(path):
    """Yields the images (H, W, 3) uint8 of an .npz batch one by one, without holding them all."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as array:
        np.lib.format.read_magic(array)
        shape = np.lib.format.read_array_header_1_0(array)[0]
        for _ in range(shape[0]):
            yield np.frombuffer(array.read(int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])


# --- Pictures -------------------------------------------------------------------------------------------------------------------------------------
def sheet(path, rows, names):
    """Writes a PNG: rows of images (n, H, W, 3) uint8, with a name to the left of each; small images are enlarged to at least 64 pixels."""
    size = rows[0][0].shape[0]
    zoom = max(1, 64 // size)
    cell, pen = size * zoom + 2, ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = 8 + max(int(pen.multiline_textbbox((0, 0), name)[2]) for name in names)
    canvas = Image.new("RGB", (margin + cell * max(map(len, rows)), cell * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (row, name) in enumerate(zip(rows, names)):
        pen.multiline_text((4, i * cell + 4), name, fill="black")
        for j, image in enumerate(row):
            canvas.paste(Image.fromarray(image).resize((size * zoom,) * 2, Image.Resampling.NEAREST), (margin + j * cell, i * cell))
    atomic_write(path, lambda f: canvas.save(f, "PNG"))
    print(path)


def class_picture(s, system):
    """samples.png: a row for each class (at most 20), its first 10 images. One image a class, as in the official presets: rows of four."""
    batch, columns = Path(s.out, "samples.npz"), 10
    with np.load(batch) as file:
        labels = file["arr_1"].tolist()
    shown = list(dict.fromkeys(labels))[:20]
    if s.labels == "random":
        shown.sort()
    rows = [[i for i, label in enumerate(labels) if label == c][:columns] for c in shown]      # indices of images
    names = [system.classes[c] for c in shown]
    if max(map(len, rows)) == 1:
        rows, names = [sum(rows[k:k + 4], []) for k in range(0, len(rows), 4)], ["\n".join(names[k:k + 4]) for k in range(0, len(rows), 4)]
    # Only the images up to the last one shown are read: the file may hold 10 GB.
    wanted, last = set(sum(rows, [])), max(map(max, rows))
    images = {i: image for i, image in zip(range(last + 1), stream(batch)) if i in wanted}
    sheet(Path(s.out, "samples.png"), [[images[i] for i in row] for row in rows], names)


def numbers(text, flag):
    """'1,2.5' -> [1.0, 2.5], '' -> [], or fails naming the flag."""
    try:
        return [float(part) for part in text.split(",") if text]
    except ValueError:
        fail(f"{flag} {text}: give numbers separated by commas")


@torch.inference_mode()
def pictures(s, system):
    """The pictures that were asked for by flag, from the first (at most 8) samples of the run."""
    x0, y = draw(system, s, range(min(s.num, 8)))
    ts = time_grid(s)
    if s.sweep:                                                                  # a row for each scale: the same noise and classes
        scales = numbers(s.sweep, "--sweep")
        rows = [decode(system, integrate(system, s, x0, y, ts, w)[0]) for w in tqdm(scales, desc="guidance sweep")]
        sheet(Path(s.out, "sweep.png"), rows, [f"w = {w:g}" for w in scales])
    if s.trajectory:                                                             # a column for each t: the integration stops there and goes on
        stops = sorted({int((ts - t).abs().argmin()) for t in numbers(s.trajectory, "--trajectory")})
        x, at, columns = x0, 0, []
        for stop in tqdm(stops, desc="trajectory"):
            x, at = integrate(system, s, x, y, ts[at:stop + 1])[0] if stop > at else x, stop
            columns.append(decode(system, x))
        sheet(Path(s.out, "trajectory.png"), np.stack(columns, 1), [system.classes[c] for c in y.tolist()])
        print("  columns: t =", ", ".join(f"{ts[stop]:.3f}" for stop in stops))
    if s.interpolate:
        # a row for each pair of noises. On the sphere, since a straight line's middle is too short for noise:
        # x = (sin((1 - u) angle) a + sin(u angle) b) / sin(angle)
        u, rows = torch.linspace(0, 1, s.interpolate, device=x0.device)[:, None, None, None], []
        for a, b, c in tqdm(list(zip(x0[::2], x0[1::2], y[::2])), desc="interpolation"):
            angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
            x = (torch.sin((1 - u) * angle) * a + torch.sin(u * angle) * b) / torch.sin(angle)    # (N, C, h, w)
            rows.append(decode(system, integrate(system, s, x, c.expand(len(x)), ts)[0]))
        sheet(Path(s.out, "interpolation.png"), rows, [system.classes[c] for c in y[::2].tolist()[:len(rows)]])


def write_pngs(s):
    """OUT/samples/000000.png ...: every image of samples.npz in a file."""
    folder = Path(s.out, "samples")
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(tqdm(stream(Path(s.out, "samples.npz")), total=s.num, desc="PNG", unit="image")):
        atomic_write(folder / f"{i:06d}.png", lambda f, image=image: Image.fromarray(image).save(f, "PNG"))


def bench(s, world):
    """Images/s of a whole batch, noise to uint8, with random weights: with and without skipping the unconditional half, compiled and not."""
    name, _, patch = s.bench.partition("/")
    if name not in SIZES or patch not in ("1", "2"):
        fail(f"--bench {s.bench}: give one of {', '.join(SIZES)} and a patch size, e.g. XL/1")
    # f16d32 at 256 x 256 as published. The untrained network's velocity is 0 (adaLN-Zero), which changes no time.
    latents = dict(shape=[32, 16, 16], mean=torch.zeros(1, 32, 1, 1), std=torch.ones(1, 32, 1, 1))
    for compiled in (False, True):
        model = LightningDiT(patch_size=int(patch), **SIZES[name])
        system = make_system(replace(s, compile=compiled), world.device, model, AutoencoderKL(), latents, [], data="", image_size=256)
        for start in dict.fromkeys((0.0, s.cfg_interval_start)):
            job = replace(s, cfg_interval_start=start)
            sample_unit(system, replace(job, steps=8), range(s.batch_size))      # compiles and warms up: 8 points lie on both sides of the start
            begin = time.perf_counter()
            evaluations = sample_unit(system, job, range(s.batch_size))[2]
            rate = s.batch_size / (time.perf_counter() - begin)
            print(f"{s.bench} {system.identity['precision']} {'compiled' if compiled else 'eager'}, guidance from t = {start}: {rate:.3f} images/s, "
                  f"{sum(evaluations) / s.batch_size:g} evaluations an image", flush=True)


def main(s, world):
    if s.bench:
        return bench(s, world)
    system = load_official(s, world) if s.preset in RELEASED_DIT else load_run(s, world.device)
    settings = {f.name: getattr(s, f.name) for f in fields(s) if f.metadata["same"]}
    sample_all(s, system, world, {**settings, **system.identity, "guidance": s.cfg_scale})    # "guidance" is what fid.py looks for
    if world.rank == 0:
        class_picture(s, system)
        pictures(s, system)
        if s.png:
            write_pngs(s)


if __name__ == "__main__":
    run_script(Settings, PRESETS, __doc__, main)
