"""Training LightningDiT on the latents of a tokenizer.

Paper: arXiv 2501.01423, Sec. 4 (training strategies, Table 1), Sec. 5.1 ("We pre-extract all latent features"), Sec. 5.4 (800 epochs).

How to read it, top to bottom:
    Settings, PRESETS      every hyperparameter on one screen; Table 1 as a ladder of ten presets; the paper's systems
    extract, Latents       Sec. 5.1: from images to latents on disk, and random access to them
    flow_matching_loss     Sec. 4: rectified flow, lognorm time sampling, velocity direction loss; beside it DDPM, where Table 1 starts
    train                  the loop
    bench                  what a step costs on this machine, and the hours that 64 and 800 epochs would take

Convention (the authors'): t = 0 is noise, t = 1 is data, x_t = t x1 + (1 - t) x0, v = x1 - x0.

    python train_dit.py                                      preset mini, on runs/mini/vae.pt
    torchrun --nproc_per_node=8 train_dit.py --preset lightningdit-xl-64ep --vae VAE --data DIR
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")                            # before torch is loaded; see train_vae.py
import contextlib
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from dit import SIZES, LightningDiT
from train_vae import (Finite, Images, Metrics, Stop, atomic_write, average, batch_indices, fingerprint, first_alone, load_optimizer,
                       load_tokenizer, loader, opt, peak_memory, resume, run_script, save_checkpoint, save_grid, share, step_generator, to_float,
                       torch_load)
from vae import SPECS, autocast, fail


# --- Settings -----------------------------------------------------------------------------------------------------------------------------------
# The defaults are preset imagenet256: LightningDiT-XL/1 on VA-VAE f16d32, 64 epochs [Sec. 4, 5.4; Table 3, gFID 5.14 without and 2.11 with guidance].
@dataclass
class Settings:
    preset: str = opt("imagenet256", "named settings; every other flag overrides one of them", same=False)
    # latents [Sec. 5.1]
    vae: str = opt("", "tokenizer checkpoint: ours, or the authors' released file; default OUT/vae.pt", same=False)
    tokenizer_spec: str = opt("", "refuse a tokenizer of another spec than this; empty: any", choices=("", *SPECS))
    data: str = opt("", "images to extract latents from, as in train_vae.py; default: those of the tokenizer")
    image_size: int = opt(0, "side of the images in pixels; 0: as in the tokenizer's training")
    latents: str = opt("", "folder of extracted latents, made if it is not there; or one of the authors', with *.safetensors and latents_stats.pt; "
                       "default: latents beside the tokenizer", same=False)
    latent_norm: str = opt("channel", "channel: per-channel mean and std of all latents; sd-vae: times 0.18215 [Table 1's f8d4]", choices=("channel", "sd-vae"))
    extract_batch: int = opt(64, "images encoded at once during extraction, in each process", same=False)
    # network [Sec. 4, Table 1: architecture improvements]
    size: str = opt("XL", "depth and width", choices=tuple(SIZES))
    patch_size: int = opt(1, "latent pixels a token, along one side [Sec. 5.1]")
    swiglu: bool = opt(True, "SwiGLU FFN instead of GELU")
    rmsnorm: bool = opt(True, "RMS Norm instead of LayerNorm")
    rope: bool = opt(True, "rotary position embedding")
    qknorm: bool = opt(False, "normalise q and k: against NaN late in training")
    shift: bool = opt(True, "adaLN with shifts; --no-shift is the authors' wo_shift")
    class_dropout: float = opt(0.1, "probability of training with the null class, for classifier-free guidance")
    init: str = opt("", "start from these weights: the authors' released LightningDiT, or ours (EMA first)")
    # training strategies [Sec. 4, Table 1]
    objective: str = opt("flow", "flow: rectified flow; ddpm: the original DiT's noise prediction on the linear schedule", choices=("flow", "ddpm"))
    lognorm: bool = opt(True, "logit-normal time sampling instead of uniform")
    uniform_from_epoch: float = opt(0.0, "epoch from which time sampling is uniform [Sec. 5.4: 480 of 800]; 0: never")
    direction_loss: bool = opt(True, "add the velocity direction loss")
    batch_size: int = opt(1024, "latents a step, over all processes and accumulation steps")
    lr: float = opt(2e-4, "learning rate of AdamW, constant, no weight decay")
    beta2: float = opt(0.95, "second beta of AdamW; the first is 0.9")
    grad_clip: float = opt(0.0, "clip the gradient's norm to this; 0: off ('tends to reduce performance when combined' with lognorm [Sec. 4])")
    ema: float = opt(0.9999, "decay of the moving average of the weights, a step")
    epochs: float = opt(64.0, "passes over the latents")
    steps: int = opt(0, "training steps; 0: as many as the epochs make")
    # conduct
    seed: int = opt(0, "seed of weights, posterior samples, order, noise and time")
    out: str = opt("", "folder of the run; default runs/<preset>", same=False)
    device: str = opt("auto", "auto: CUDA if there is one", choices=("auto", "cuda", "cpu"), same=False)
    precision: str = opt("auto", "bf16 autocast or fp32; auto: bf16 on CUDA", choices=("auto", "bf16", "fp32"))
    compile: bool = opt(torch.cuda.is_available(), "torch.compile the whole model; default: on CUDA", same=False)
    accumulate: int = opt(1, "gradient accumulation: split each process's batch into so many parts", same=False)
    checkpointing: bool = opt(False, "activation checkpointing: less memory, a third more time", same=False)
    workers: int = opt(4, "data loading processes for each training process", same=False)
    log_every: int = opt(100, "steps between lines of metrics_dit.csv", same=False)
    save_every: int = opt(5000, "steps between checkpoints", same=False)
    keep_every: int = opt(0, "steps between copies of the checkpoint that are kept, OUT/dit-STEP.pt; 0: none", same=False)
    sample_every: int = opt(5000, "steps between small pictures from the EMA weights, with fixed noise, progress.png; 0: never", same=False)
    fresh: bool = opt(False, "start over instead of resuming the run in --out (latents are kept)", same=False)
    bench: bool = opt(False, "time training steps on synthetic latents and exit", same=False)


# [Table 1] "Performance of LightningDiT": row, the trick, what it changes, the paper's FID-50k (no guidance). Each row keeps all earlier changes.
LADDER = [
    ("DiT-XL/2", dict(tokenizer_spec="f8d4", latent_norm="sd-vae", patch_size=2, swiglu=False, rmsnorm=False, rope=False, objective="ddpm", lognorm=False,
                      direction_loss=False, batch_size=256, lr=1e-4, beta2=0.999, epochs=80.0), 19.50),
    ("+ Rectified Flow", dict(objective="flow"), 17.20),
    ("+ batchsize x 4 & lr x 2", dict(batch_size=1024, lr=2e-4), 16.59),
    ("+ AdamW beta2 = 0.95", dict(beta2=0.95), 16.61),
    ("+ Logit Normal Sampling", dict(lognorm=True), 13.99),
    ("+ Velocity Direction Loss", dict(direction_loss=True), 12.52),
    ("+ SwiGLU FFN", dict(swiglu=True), 10.10),
    ("+ RMS Norm", dict(rmsnorm=True), 9.25),
    ("+ Rotary Pos Embed", dict(rope=True), 7.13),
    ("+ patch size = 1 & VA-VAE", dict(patch_size=1, tokenizer_spec="f16d32", latent_norm="channel"), 4.29),
]
# Ours, for two CPU cores: 8x8 latents in 16 tokens of 2x2, a quarter of the work of the paper's patch size 1.
MINI = dict(size="mini-S", patch_size=2, batch_size=64, lr=2e-3, ema=0.995, steps=2500, workers=0, log_every=25, save_every=100, sample_every=500)
# The same ladder at small scale: the same tricks, the same factors of batch and rate. Its tokenizers are miniatures too, so the last step is patch 1
# (with --vae of a tokenizer trained with VF loss, as in the paper).
MINI_LADDER = [dict(LADDER[0][1], tokenizer_spec="", latent_norm="channel", batch_size=16, lr=5e-4, epochs=64.0), dict(objective="flow"),
               dict(batch_size=64, lr=1e-3), *(change for _, change, _ in LADDER[3:9]), dict(patch_size=1)]


def ladder(start, changes):
    """Settings of each row: those of the row before, and its own trick."""
    rows = [{**start, **changes[0]}]
    for change in changes[1:]:
        rows.append({**rows[-1], **change})
    return rows


PRESETS = {
    "mini": MINI,
    "imagenet256": {},
    "lightningdit-xl-64ep": {},                                                # Table 3: gFID 5.14, with guidance 2.11; 80,073 steps
    "lightningdit-xl-800ep": dict(epochs=800.0, uniform_from_epoch=480.0),     # Table 3: gFID 2.17, with guidance 1.35; 1,000,912 steps
    "lightningdit-b": dict(size="B", epochs=160.0),                            # Table 2: FID-10K 15.82 on VA-VAE f16d32 (DINOv2)
    "lightningdit-l": dict(size="L", epochs=80.0),                             # Table 2: 9.82
    "lightningdit-xl": dict(size="XL", epochs=80.0),                           # Table 2: 8.22
    "lightningdit-1.0b": dict(size="1.0B", epochs=80.0),                       # Fig. 4c (its points are not printed as numbers)
    "lightningdit-1.6b": dict(size="1.6B", epochs=80.0),
    **{f"table1-{i}": row for i, row in enumerate(ladder({}, [change for _, change, _ in LADDER]))},
    **{f"mini-table1-{i}": row for i, row in enumerate(ladder({**MINI, "steps": 0}, MINI_LADDER))},
}
PAPER_FID = {f"table1-{i}": fid for i, (_, _, fid) in enumerate(LADDER)}


# --- Latents [Sec. 5.1] ---------------------------------------------------------------------------------------------------------------------------
# Stored as float16. Measured on 500 latents of mini-f4d16 (450 steps): rounding moves a latent by 2.2e-4 of its channel's std (rms) and a decoded pixel by
# at most 5e-4 of a range of 2, while the posterior's own noise, added on purpose, is 0.07 of it. bfloat16: 1.8e-3 and 4e-3. float32 doubles the disk:
# ImageNet's 1,281,167 x 2 latents of 32x16x16 are 84 GB instead of 42.
STORED = np.float16


def extract(s, world, vae, state, folder):
    """Encode all training images, plain and horizontally flipped, into `folder`; whatever is there already is kept. A posterior SAMPLE is stored.

    latents.npy (N, 2, d, h, w) float16, [i, 0] plain and [i, 1] flipped; labels.npy (N,); done.npy, one flag a chunk of extract_batch images; latents.json,
    written last: tokenizer fingerprint, classes, statistics over all latents. The noise is a function of (seed, chunk), so neither an interruption nor the
    number of processes changes a bit (on a CPU; on CUDA within its rounding).
    """
    data, size = s.data or state["settings"].get("data", ""), s.image_size or state["settings"].get("image_size", 256)
    if not data:
        fail(f"the tokenizer {s.vae} does not say which images it was trained on: name them with --data")
    with first_alone(world):
        images = Images(data, "train", size)
    n, shape = len(images), (vae.embed_dim, size // vae.f, size // vae.f)
    if size % vae.f:
        fail(f"--image-size {size} is not divisible by the tokenizer's downsampling rate {vae.f}")
    key = dict(fingerprint=fingerprint(state["state_dict"]), data=data, image_size=size, seed=s.seed, n=n, shape=list(shape), chunk=s.extract_batch)
    chunks, plan = math.ceil(n / s.extract_batch), folder / "extracting.json"
    if world.rank == 0 and not (plan.exists() and json.loads(plan.read_text()) == key):
        folder.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(folder / "latents.npy", "w+", STORED, (n, 2, *shape))
        np.lib.format.open_memmap(folder / "done.npy", "w+", np.uint8, (chunks,))
        atomic_write(folder / "labels.npy", lambda f: np.save(f, images.labels.numpy()))
        atomic_write(plan, lambda f: f.write(json.dumps(key).encode()))
    if world.size > 1:
        dist.barrier()
    latents, done = np.load(folder / "latents.npy", mmap_mode="r+"), np.load(folder / "done.npy", mmap_mode="r+")
    for k in tqdm(range(world.rank, chunks, world.size), desc=f"latents to {folder}", unit="chunk", disable=world.rank > 0):
        if done[k]:
            continue
        rows = range(k * s.extract_batch, min((k + 1) * s.extract_batch, n))
        x = to_float(torch.stack([images[i] for i in rows]).to(world.device))  # (b, 3, S, S)
        noise = torch.randn(2, len(x), *shape, generator=step_generator("cpu", s.seed, "posterior", k)).to(world.device)
        with torch.inference_mode():
            z = torch.stack([vae.encode(view).sample(noise[i]) for i, view in enumerate((x, x.flip(3)))], dim=1)   # (b, 2, d, h, w)
        if not z.abs().max() < np.finfo(STORED).max:
            fail(f"latents of images {rows.start} to {rows.stop - 1} are not finite in {STORED.__name__}: the tokenizer {s.vae} is broken")
        latents[rows.start:rows.stop] = z.cpu().numpy().astype(STORED)
        latents.flush()
        done[k] = 1                                                            # only now: a chunk is whole or not there
        done.flush()
    if world.size > 1:
        dist.barrier()
    if world.rank == 0:
        total, square, count = 0.0, 0.0, 2 * n * shape[1] * shape[2]           # statistics over all of them, in float64 (authors: 10,000 latents)
        for i in tqdm(range(0, n, 1024), desc="latent statistics", unit="chunk", disable=n < 100_000):
            block = latents[i:i + 1024].astype(np.float64)
            total, square = total + block.sum((0, 1, 3, 4)), square + (block ** 2).sum((0, 1, 3, 4))
        mean = total / count
        std = np.sqrt((square - count * mean ** 2) / (count - 1))
        meta = dict(key, mean=mean.tolist(), std=std.tolist(), classes=images.classes)
        atomic_write(folder / "latents.json", lambda f: f.write(json.dumps(meta).encode()))
        plan.unlink()
        (folder / "done.npy").unlink()
    if world.size > 1:
        dist.barrier()


class Latents:
    """Random access to a folder that `extract` made: memory-mapped, so nothing is read before it is asked for and processes share the pages."""

    def __init__(self, folder):
        self.meta = json.loads((folder / "latents.json").read_text())
        self.folder, self.shape, self.classes = folder, tuple(self.meta["shape"]), self.meta["classes"]
        self.labels = torch.from_numpy(np.load(folder / "labels.npy"))
        self.mean, self.std = (torch.tensor(self.meta[k]).view(1, -1, 1, 1) for k in ("mean", "std"))   # (1, d, 1, 1)
        self.file = np.load(folder / "latents.npy", mmap_mode="r")

    def __len__(self):
        return len(self.labels)

    def read(self, index, flip):
        """index (b,) int64, flip (b,) 0 or 1 -> (b, d, h, w) float16."""
        return torch.from_numpy(self.file[index.numpy(), flip.numpy()])


class AuthorsLatents:
    """The same access to the authors' format: shards *.safetensors with latents, latents_flip, labels, and latents_stats.pt with mean and std."""

    def __init__(self, folder):
        try:
            from safetensors import safe_open
        except ImportError:
            fail(f"{folder} holds safetensors; reading them needs: pip install safetensors")
        self.folder, self.meta = folder, {}
        self.shards = [safe_open(str(path), "pt") for path in sorted(folder.glob("*.safetensors"))]   # opened once, not once an item
        labels = [shard.get_tensor("labels") for shard in self.shards]
        self.labels, self.starts = torch.cat(labels).long(), np.cumsum([0] + [len(part) for part in labels])
        self.views = [(shard.get_slice("latents"), shard.get_slice("latents_flip")) for shard in self.shards]
        self.shape = tuple(self.views[0][0].get_shape()[1:])
        if not (folder / "latents_stats.pt").exists():
            fail(f"{folder} has *.safetensors but no latents_stats.pt")
        stats = torch_load(folder / "latents_stats.pt")
        self.mean, self.std = stats["mean"].float(), stats["std"].float()      # (1, d, 1, 1)
        self.classes = [str(i) for i in range(int(self.labels.max()) + 1)]

    def __len__(self):
        return len(self.labels)

    def read(self, index, flip):
        shard = np.searchsorted(self.starts, index.numpy(), side="right") - 1
        return torch.cat([self.views[k][side][i - self.starts[k]:i - self.starts[k] + 1]
                          for i, side, k in zip(index.tolist(), flip.tolist(), shard)])


def open_latents(s, world):
    """(latents, tokenizer, its checkpoint): extracted first if they are not there yet, refused if they are another tokenizer's or other images'."""
    vae, state = load_tokenizer(s.vae, world.device)
    if s.tokenizer_spec and state["spec"] != SPECS[s.tokenizer_spec]:
        fail(f"--vae {s.vae} is not a tokenizer of spec {s.tokenizer_spec}, which preset {s.preset} asks for")
    folder = Path(s.latents)
    if any(folder.glob("*.safetensors")):
        latents = AuthorsLatents(folder)                                       # they carry no fingerprint: only the width can be checked
    else:
        if not (folder / "latents.json").exists():
            extract(s, world, vae, state, folder)
        latents = Latents(folder)
        wanted = dict(fingerprint=fingerprint(state["state_dict"]), data=s.data or latents.meta["data"], image_size=s.image_size or latents.meta["image_size"])
        other = [f"{k} {latents.meta[k]} instead of {v}" for k, v in wanted.items() if latents.meta[k] != v]
        if other:
            fail(f"the latents in {folder} are not those of {s.vae}: {', '.join(other)}; remove them, or name another folder with --latents")
    if latents.shape[0] != vae.embed_dim:
        fail(f"the latents in {folder} have {latents.shape[0]} channels, the tokenizer {s.vae} has {vae.embed_dim}")
    return latents, vae, state


class LatentBatches(Dataset):
    """[step] -> this process's share of the step's latents, (b, d, h, w) float16 and labels (b,). Plain or flipped with p = 0.5 (the authors' code)."""

    def __init__(self, latents, batch_size, seed, part):
        self.latents, self.batch_size, self.seed, self.part = latents, batch_size, seed, part

    def __getitem__(self, step):
        index = batch_indices(len(self.latents), self.batch_size, step, self.seed)[self.part]
        flip = torch.randint(2, (self.batch_size,), generator=step_generator("cpu", self.seed, "flip", step))[self.part]
        return self.latents.read(index, flip), self.latents.labels[index]


# --- The training loss [Sec. 4] ---------------------------------------------------------------------------------------------------------------------
def sample_time(n, lognorm, generator, device):
    """t (n,) in (0, 1). lognorm [Table 1, + Logit Normal Sampling]: t = sigmoid(n), n ~ N(0, 1): more training in the middle; else uniform."""
    if lognorm:
        return torch.sigmoid(torch.randn(n, device=device, generator=generator))
    return torch.rand(n, device=device, generator=generator)


def flow_matching_loss(model, x1, y, t=None, x0=None, drop=None, direction=True):
    """Rectified flow with the velocity direction loss. Returns (loss, {"mse": (B,), "direction": (B,)}), the two terms for each sample.

    model(x, t, y, drop) -> velocity. x1 (B, C, H, W): normalised latents; y (B,): labels; t (B,) in [0, 1], default lognorm; x0: noise, default drawn;
    drop (B,) bool: labels to drop; direction: add the second term.
    """
    t = sample_time(len(x1), True, None, x1.device) if t is None else t
    x0 = torch.randn_like(x1) if x0 is None else x0
    # [Table 1, + Rectified Flow] x_t = t x1 + (1 - t) x0, the target velocity is v = dx_t/dt = x1 - x0
    t_ = t.view(-1, 1, 1, 1)                                                   # (B, 1, 1, 1)
    x_t, v = t_ * x1 + (1 - t_) * x0, x1 - x0
    pred = model(x_t, t, y, drop).float()                                      # (B, C, H, W)
    # loss = mean (pred - v)^2 + mean (1 - cos(pred, v)), the cosine over channels [Table 1, + Velocity Direction Loss]
    terms = {"mse": ((pred - v) ** 2).mean((1, 2, 3)), "direction": (1 - F.cosine_similarity(pred, v, dim=1)).mean((1, 2))}   # (B,), (B,)
    return terms["mse"].mean() + (terms["direction"].mean() if direction else 0.0), terms


DDPM_STEPS = 1000


def ddpm_alphas(device):
    """alpha_bar (1000,) of DDPM's linear schedule, beta from 1e-4 to 0.02; index 0 is the least noise."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, DDPM_STEPS, dtype=torch.float64, device=device), 0)


def ddpm_loss(model, x1, y, t, x0, drop=None):
    """Noise prediction, the objective of the original DiT [Table 1, row 0], without its learned variance. t (B,) in [0, 1) -> one of 1000 steps.

    Our t = 1 is data, so step = floor(1000 (1 - t)). Returns as flow_matching_loss; there is no velocity, so its direction term is 0.
    """
    step = (DDPM_STEPS * (1 - t)).long().clamp(0, DDPM_STEPS - 1)              # (B,)
    a = ddpm_alphas(x1.device)[step].float().view(-1, 1, 1, 1)                 # (B, 1, 1, 1)
    # loss = mean (eps - model(sqrt(a) x1 + sqrt(1 - a) eps))^2; the network is told the step, 0 to 999, as in DiT
    pred = model(a.sqrt() * x1 + (1 - a).sqrt() * x0, step.float(), y, drop).float()
    mse = ((pred - x0) ** 2).mean((1, 2, 3))
    return mse.mean(), {"mse": mse, "direction": torch.zeros_like(mse)}


def ddpm_velocity(model):
    """The noise predictor's probability-flow ODE in the coordinates of rectified flow: (x, t, y) -> velocity, so that every integrator serves both.

    DDPM's sqrt(a) x1 + sqrt(1 - a) eps, divided by sqrt(a) + sqrt(1 - a), is t x1 + (1 - t) eps with t = sqrt(a) / (sqrt(a) + sqrt(1 - a)). So at time t
    the network sees x * (sqrt(a) + sqrt(1 - a)) at the step with that t, and v = x1 - eps = (x - eps) / t.
    """
    def velocity(x, t, y):
        a = ddpm_alphas(x.device)
        grid = (a.sqrt() / (a.sqrt() + (1 - a).sqrt())).flip(0)                # (1000,) t of each step, increasing
        t = t.double().clamp(grid[0], grid[-1])                                # DDPM's schedule ends short of pure noise and of pure data
        right = torch.searchsorted(grid, t).clamp(1, DDPM_STEPS - 1)
        position = (right - 1) + (t - grid[right - 1]) / (grid[right] - grid[right - 1])   # between two steps: interpolate
        step = (DDPM_STEPS - 1 - position).float()                             # (B,)
        scale = (t ** 2 + (1 - t) ** 2).rsqrt().float().view(-1, 1, 1, 1)      # sqrt(a) + sqrt(1 - a) = 1 / sqrt(t^2 + (1 - t)^2)
        eps = model(x * scale, step, y).float()
        return (x - eps) / t.float().view(-1, 1, 1, 1)
    return velocity


# --- Training -----------------------------------------------------------------------------------------------------------------------------------------
BINS = 5                                                                       # the loss is logged for t in [0, .2), [.2, .4), ...


def read_released_dit(path):
    """state_dict of the authors' checkpoint or of ours: `ema`, else `model`, else the file itself; prefixes module. and _orig_mod. removed."""
    state = torch_load(path)
    for key in ("ema", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        fail(f"{path} holds no LightningDiT weights: neither ema nor model nor tensors by name")
    return {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in state.items()}


def load_weights(model, weights, path):
    """Strict: any weight missing, unexpected or of another shape ends in one line that names the first of them."""
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in weights.items()}
    wrong = [f"{k}: {given.get(k, 'missing')} in the file, {own.get(k, 'nowhere')} in the model" for k in sorted(own.keys() | given.keys()) if own.get(k) != given.get(k)]
    if wrong:
        fail(f"{path} does not fit this LightningDiT ({len(wrong)} differences: {'; '.join(wrong[:3])})")
    model.load_state_dict(weights)


def architecture(s, shape, num_classes):
    """Keyword arguments of LightningDiT for latents of `shape` (d, h, w)."""
    if shape[1] != shape[2] or shape[1] % s.patch_size:
        fail(f"--patch-size {s.patch_size} does not divide latents of {shape[1]}x{shape[2]}")
    return dict(input_size=shape[1], patch_size=s.patch_size, in_channels=shape[0], num_classes=num_classes, class_dropout_prob=s.class_dropout,
                use_qknorm=s.qknorm, use_swiglu=s.swiglu, use_rope=s.rope, use_rmsnorm=s.rmsnorm, wo_shift=not s.shift, **SIZES[s.size])


class Run:
    """Model, EMA and optimizer; and `net`, the model as training calls it: DistributedDataParallel, compiled."""

    def __init__(self, s, arch, world):
        torch.manual_seed(s.seed)                                              # weights: the same on every process
        self.settings, self.world = s, world
        self.model = LightningDiT(**arch).to(world.device)
        if s.init:
            load_weights(self.model, read_released_dit(s.init), s.init)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.model.checkpointing = s.checkpointing
        self.bf16 = s.precision == "bf16" or (s.precision == "auto" and world.device.type == "cuda")   # the one place of precision
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.averages = [e for e, p in zip(self.ema.parameters(), self.model.parameters()) if p.requires_grad]
        # [Table 1, + AdamW beta2 = 0.95]; no weight decay and no warm-up (the authors' code)
        self.opt = torch.optim.AdamW(self.params, s.lr, betas=(0.9, s.beta2), weight_decay=0.0, fused=world.device.type == "cuda")
        self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True) if world.size > 1 else self.model
        if s.compile and s.checkpointing:
            torch._dynamo.config.optimize_ddp = False                          # it cuts the graph at its buckets and cannot cut a checkpointed block
        self.net = torch.compile(self.ddp) if s.compile else self.ddp          # [Sec. 4]: "torch.compile and bfloat16 training"

    def step(self, x1, y, t, x0, drop, want_norm):
        """One optimizer step. All (b, ...) on the device. Returns loss terms a sample, and the gradient's norm or None. Nothing here synchronises."""
        s, parts, found = self.settings, self.settings.accumulate, []
        self.opt.zero_grad(set_to_none=True)
        for i, (x1_, y_, t_, x0_, drop_) in enumerate(zip(*(v.chunk(parts) for v in (x1, y, t, x0, drop)))):
            local = i < parts - 1 and self.world.size > 1                      # gradients are exchanged with the last part only
            with self.ddp.no_sync() if local else contextlib.nullcontext():
                with autocast(x1, self.bf16):
                    if s.objective == "flow":
                        loss, terms = flow_matching_loss(self.net, x1_, y_, t_, x0_, drop_, s.direction_loss)
                    else:
                        loss, terms = ddpm_loss(self.net, x1_, y_, t_, x0_, drop_)
                (loss / parts).backward()
            found.append({k: v.detach() for k, v in terms.items()})
        norm = torch.nn.utils.clip_grad_norm_(self.params, s.grad_clip or math.inf) if s.grad_clip or want_norm else None
        self.opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.params, 1 - s.ema)        # ema = ema + (1 - decay) (weights - ema), all tensors in one sweep
        return {k: torch.cat([part[k] for part in found]) for k in found[0]}, norm


@torch.no_grad()
def preview(run, vae, latents, scale_shift, path, columns=4, steps=25, guidance=2.0):
    """A small picture of what the EMA weights draw: the first 8 classes, a row each, the same noise every time; Euler with guidance (see sample.py)."""
    model, device = run.ema, run.world.device
    rows = min(8, model.num_classes)
    y = torch.arange(rows, device=device).repeat_interleave(columns)           # (B,)
    x = torch.randn(len(y), *latents.shape, generator=step_generator("cpu", run.settings.seed, "preview")).to(device)
    field = model if run.settings.objective == "flow" else ddpm_velocity(model)
    null, grid = torch.full_like(y, model.num_classes), torch.linspace(0, 1, steps + 1, device=device)
    for t, dt in zip(grid[:-1], grid.diff()):
        with autocast(x, run.bf16):
            v = field(x, t.expand(len(y)), y).float()
            if run.settings.class_dropout > 0:
                v_null = field(x, t.expand(len(y)), null).float()
                v = v_null + guidance * (v - v_null)
        x = x + dt * v
    mean, std = scale_shift
    save_grid(torch.cat([vae.decode(part) for part in (x * std + mean).split(columns)]), path, columns)


def train(s, world):
    """The loop: every step is a function of (settings, step), so a run that is killed and resumed is the run that was not (on a CPU bit for bit)."""
    path, part = Path(s.out) / "dit.pt", share(world, s.batch_size)
    if (part.stop - part.start) % s.accumulate:
        fail(f"--accumulate {s.accumulate} does not divide the {part.stop - part.start} latents of each process")
    state = resume(path, "dit", s, world)
    if state and state["step"] == state["total_steps"]:
        return print(f"{path} is finished ({state['step']} steps); --fresh starts over, another --out keeps it")
    latents, vae, tokenizer = open_latents(s, world)
    n, num_classes = len(latents), len(latents.classes)
    total, step = s.steps or max(1, round(s.epochs * n / s.batch_size)), state["step"] if state else 0
    arch = architecture(s, latents.shape, num_classes)
    run, mark = Run(s, arch, world), fingerprint(tokenizer["state_dict"])
    if state:
        if state["tokenizer"]["fingerprint"] != mark:
            fail(f"{path} was trained on the latents of another tokenizer than {s.vae}; name that one with --vae, or start over with --fresh")
        run.model.load_state_dict(state["model"])
        run.ema.load_state_dict(state["ema"])
        load_optimizer(run.opt, state["optimizer"], world.device)
    # normalised latent = (z - mean) / std. SD-VAE's z * 0.18215 is the same formula with mean 0, std 1 / 0.18215.
    mean, std = (latents.mean, latents.std) if s.latent_norm == "channel" else (torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1 / 0.18215))
    scale_shift = mean.to(world.device), std.to(world.device)
    finite, stop, metrics = Finite(world.device), Stop(world), Metrics(Path(s.out) / "metrics_dit.csv", world, step)
    advice = "ways out: --qknorm, --grad-clip 1, a smaller --lr"

    def save(to=path):
        finite.check(path, advice, run.params)
        if world.rank == 0:
            save_checkpoint({"stage": "dit", "step": step, "total_steps": total, "settings": asdict(s), "arch": arch, "objective": s.objective,
                             "model": run.model.state_dict(), "ema": run.ema.state_dict(), "optimizer": run.opt.state_dict(),
                             "classes": latents.classes, "num_classes": num_classes, "data": latents.meta.get("data", ""),
                             "image_size": latents.shape[1] * vae.f, "latents": dict(mean=mean, std=std, norm=s.latent_norm, shape=list(latents.shape)),
                             "tokenizer": dict(fingerprint=mark, spec=tokenizer["spec"], path=s.vae, vf=tokenizer["settings"].get("vf", ""))}, to)

    if world.rank == 0:
        millions = sum(p.numel() for p in run.model.parameters()) / 1e6
        print(f"LightningDiT {s.size}/{s.patch_size}, {millions:.2f} M parameters, on {n} latents {latents.shape} of {num_classes} classes, {world.device} x "
              f"{world.size}: {total} steps of {s.batch_size} = {total * s.batch_size / n:.1f} epochs = {total * s.batch_size:,} images; from step {step}")
    bins = torch.zeros(2, BINS, device=world.device)                           # sum of losses and count for each time bin, since the last log line
    bar = tqdm(loader(LatentBatches(latents, s.batch_size, s.seed, part), step, total, s.workers, world.device), initial=step, total=total,
               desc="LightningDiT", unit="step", disable=world.rank > 0)
    clock, clock_step = time.time(), step
    for z, y in bar:
        x1 = (z.to(world.device, non_blocking=True).float() - scale_shift[0]) / scale_shift[1]   # (b, d, h, w)
        y = y.to(world.device, non_blocking=True)                              # (b,)
        # Noise, time and dropped labels of the global batch are functions of (seed, step); each process takes its share of them.
        g = step_generator(world.device, s.seed, "train", step)
        lognorm = s.lognorm and not (s.uniform_from_epoch and step * s.batch_size >= s.uniform_from_epoch * n)   # [Sec. 5.4]
        t = sample_time(s.batch_size, lognorm, g, world.device)[part]          # (b,)
        drop = (torch.rand(s.batch_size, device=world.device, generator=g) < s.class_dropout)[part]
        x0 = torch.randn(s.batch_size, *latents.shape, device=world.device, generator=g)[part]
        now = (step + 1) % s.log_every == 0 or step + 1 == total
        terms, norm = run.step(x1, y, t, x0, drop, now)
        step += 1
        loss = terms["mse"] + (terms["direction"] if s.direction_loss else 0)  # (b,)
        finite.watch(step, loss=loss.mean())
        bins.index_add_(1, (t * BINS).long().clamp(max=BINS - 1), torch.stack([loss, torch.ones_like(loss)]))
        if now:
            finite.check(path, advice)
            values = average(world, torch.stack([loss.mean(), terms["mse"].mean(), terms["direction"].mean(), norm])).tolist()
            speed, clock, clock_step = s.batch_size * (step - clock_step) / (time.time() - clock), time.time(), step
            average(world, bins)
            by_time = {f"loss_t{i / BINS:.1f}": v for i, v in enumerate((bins[0] / bins[1].clamp(min=1e-9)).tolist())}
            bins.zero_()
            metrics.write(step, epoch=step * s.batch_size / n, **dict(zip(("loss", "mse", "direction", "grad_norm"), values)), **by_time, lr=s.lr,
                          images_per_s=speed, memory_gib=peak_memory(world.device))
            bar.set_postfix(loss=f"{values[0]:.3f}", mse=f"{values[1]:.3f}", img_s=f"{speed:.0f}")
        stopping = stop.agreed(now) and step < total
        if s.keep_every and step % s.keep_every == 0:
            save(Path(s.out) / f"dit-{step}.pt")
        if stopping or step % s.save_every == 0 or step == total:
            save()
        if stopping:
            return print(f"\nstopped after step {step} and saved {path}; the same command goes on from there") if world.rank == 0 else None
        if world.rank == 0 and (step == total or (s.sample_every and step % s.sample_every == 0)):
            preview(run, vae, latents, scale_shift, Path(s.out) / "progress.png")
    if world.rank == 0:
        print(f"saved {path} and {s.out}/progress.png; peak memory {peak_memory(world.device):.2f} GiB. Next: python sample.py")


# --- What it costs ------------------------------------------------------------------------------------------------------------------------------------
PEAK = {"H100": 989, "H200": 989, "H800": 989, "A100": 312, "B200": 2250}      # dense bf16 TFLOP/s, from the makers' data sheets


def training_flops(arch):
    """FLOPs of one training image: 3 x the forward pass (forward; backward for inputs and weights), counted by torch; a multiply-add is two."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        shape = (1, arch["in_channels"], arch["input_size"], arch["input_size"])
        LightningDiT(**arch).eval()(torch.zeros(shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return 3 * counter.get_total_flops()


def bench(s, world, steps=20, shape=(32, 16, 16), epoch=1_281_167):
    """Median time of a training step on synthetic latents of f16d32 at 256x256 (with --size and the other flags), and what it means for ImageNet."""
    share(world, s.batch_size)                                                 # fails if the batch does not divide
    arch = architecture(s, shape, 1000)
    run, marks, b = Run(s, arch, world), [], s.batch_size // world.size
    latents = torch.randn(4 * b, *shape, device=world.device)
    for i in tqdm(range(steps + 5), desc=f"bench {s.size}/{s.patch_size}", unit="step", disable=world.rank > 0):
        g = step_generator(world.device, s.seed, i)
        x1, y = latents[(i % 4) * b:(i % 4 + 1) * b], torch.randint(1000, (b,), device=world.device, generator=g)
        t, drop = sample_time(b, True, g, world.device), torch.rand(b, device=world.device, generator=g) < 0.1
        run.step(x1, y, t, torch.randn(x1.shape, device=world.device, generator=g), drop, False)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    if world.rank == 0:
        seconds, work = float(np.median(np.diff(marks)[4:])), training_flops(arch)   # the first steps compile
        rate = s.batch_size / seconds
        name = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
        peak = next((v for k, v in PEAK.items() if k in name), None)
        used = f" = {100 * rate * work / 1e12 / world.size / peak:.1f} % of {peak}" if peak else ""
        print(f"{s.size}/{s.patch_size}, batch {s.batch_size}, {'bf16' if run.bf16 else 'fp32'}, compile {s.compile}, accumulate {s.accumulate}, checkpointing "
              f"{s.checkpointing}, {name} x {world.size}; median of {steps} steps: {seconds * 1e3:.1f} ms a step, {rate:.1f} images/s")
        print(f"{work / 1e9:.0f} GFLOP an image for training, {rate * work / 1e12 / world.size:.2f} TFLOP/s a device{used}; peak memory {peak_memory(world.device):.2f} GiB")
        for epochs in (64, 800):
            hours = epochs * epoch / rate / 3600
            print(f"{epochs} epochs of ImageNet: {hours:.0f} h on {world.size}, {hours / 8 * world.size:.0f} h on 8, {hours / 32 * world.size:.0f} h on 32 such devices, "
                  "if they scale perfectly")


def main(s, world):
    if s.bench:
        return bench(s, world)
    s.vae = s.vae or str(Path(s.out) / "vae.pt")
    s.latents = s.latents or str(Path(s.vae).parent / "latents")
    train(s, world)


if __name__ == "__main__":
    run_script(Settings, PRESETS, __doc__, main)
