"""Training the tokenizer, and what all scripts share: settings, images, checkpoints, conduct.

Paper: arXiv 2501.01423, Sec. 5.1 (the tokenizer's training), Sec. 5.4 (the long recipe), Sec. 6 and the supplement (ablations, Table A4).

How to read it, top to bottom:
    Settings, PRESETS   every hyperparameter on one screen; the presets are rows of the paper's tables, the paper's scores beside them
    conduct             flags, devices and processes, checkpoints, metrics, stopping: imported by train_dit.py, sample.py and fid.py
    images              the built-in pictures, real image folders, and the one loading path for all
    train_step          the losses of Sec. 3 put together: start here to see what happens to an image
    train               the loop
    flops, bench        Table A4, and what the steps cost on this machine

    python train_vae.py                                    preset mini, minutes on two CPU cores
    python train_vae.py --preset imagenet256 --data DIR    the paper's f16d32 VA-VAE; under torchrun on several GPUs
"""
import os

# Before torch is loaded: threads that wait sleep instead of spinning. On a busy machine that is ten times faster (measured: a step of preset mini on two
# cores beside one other process 4.3 s spinning, 0.69 s sleeping); on an idle one it makes no difference.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import argparse
import contextlib
import csv
import hashlib
import math
import pickle
import resource
import signal
import struct
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch._functorch.config
import torchvision
from PIL import Image, UnidentifiedImageError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vae import LPIPS, SPECS, AutoencoderKL, PatchDiscriminator, autocast, fail
from vf_loss import FoundationModel, MiniTeacher, adaptive_weight, load_foundation_model, to_map, train_classifier, vf_loss


def opt(default, help, choices=None, same=True):
    """A field of a Settings dataclass: its default, the text of --help, the values allowed. same: a resumed run must have the checkpoint's value."""
    return field(default=default, metadata=dict(help=help, choices=choices, same=same))


# --- Settings -----------------------------------------------------------------------------------------------------------------------------------
# The defaults are preset imagenet256: f16d32 + VF loss (DINOv2) with the 50 epochs of the ablations [Sec. 5.1, 6.2, 6.3].
@dataclass
class Settings:
    preset: str = opt("imagenet256", "named settings; every other flag overrides one of them", same=False)
    # images
    data: str = opt("imagenet", "shapes (drawn by the code), cifar10, fashion-mnist, imagenette (torchvision, kept in ./data), or a folder DIR/<class>/"
                    "*.jpg, split by DIR/train and DIR/val if they exist, else every tenth image is a test image")
    image_size: int = opt(256, "side of the square image in pixels; ADM's centre crop")
    # the network [Sec. 3]
    spec: str = opt("f16d32", "tokenizer: downsampling rate f, latent dimension d", choices=tuple(SPECS))
    init: str = opt("", "start from the weights in this file: the authors' VA-VAE, CompVis kl-f8, or ours")
    # the loss of LDM; sums over pixels and latent, divided by the batch
    kl_weight: float = opt(1e-6, "weight of the KL loss (LDM)")
    lpips_weight: float = opt(1.0, "weight of LPIPS against the per-pixel L1 loss (LDM); 0: no VGG weights needed")
    disc_weight: float = opt(0.5, "weight of the adversarial loss, times its adaptive weight (LDM); 0: no discriminator")
    # The authors' `disc_start: 5001` counts the optimizer steps of both optimizers, two a batch: the first batch with 2 * batch >= 5001 is 2501.
    disc_start: int = opt(2501, "training batch from which the discriminator takes part; the authors' 5001 counts two steps a batch")
    # VF loss [Sec. 3.1-3.3]; "Empirically, we set m1 = 0.5, m2 = 0.25, and w_hyper = 0.1" [Sec. 5.1]
    vf: str = opt("dinov2", "foundation model F", choices=("none", "mini", "dinov2", "dinov2-s", "dinov2-b", "dinov2-l", "dinov2-g", "mae", "clip", "sam"))
    vf_weight: float = opt(0.1, "w_hyper of Eq. 5")
    cos_margin: float = opt(0.5, "m1 of Eq. 2")
    mdms_margin: float = opt(0.25, "m2 of Eq. 3")
    mcos: bool = opt(True, "use the marginal cosine similarity loss, Eq. 2")
    mdms: bool = opt(True, "use the marginal distance matrix similarity loss, Eq. 3")
    vf_input: str = opt("model", "what F sees: normalised by its own mean and std, or [-1, 1] as in the authors' code", choices=("model", "authors"))
    teacher_steps: int = opt(400, "training steps of the stand-in foundation model of --vf mini")
    teacher: str = opt("", "file of the stand-in; one that exists is taken as it is, so that runs share it; default OUT/teacher.pt, made for this run",
                       same=False)
    # the schedule [Sec. 5.1]: "we scale the learning rate and global batch size to 1e-4 and 256"
    batch_size: int = opt(256, "images a step, over all processes")
    lr: float = opt(1e-4, "learning rate of Adam, betas (0.5, 0.9), constant")
    warmup: int = opt(0, "steps over which the learning rate rises to --lr (ours, for the miniature's high rate; the paper has none)")
    epochs: float = opt(50.0, "passes over the training images [Sec. 6.2]")
    stages: str = opt("", "the long recipe: EPOCHS:W_HYPER:M1:M2:DISC_START, one a stage, joined by commas; replaces the five flags of these names")
    steps: int = opt(0, "training steps; 0: as many as the epochs make")
    # conduct: of what stands below, only seed and precision change what is learned
    seed: int = opt(0, "seed of weights, order of images and noise")
    out: str = opt("", "folder of the run; default runs/<preset>", same=False)
    device: str = opt("auto", "auto: CUDA if there is one", choices=("auto", "cuda", "cpu"), same=False)
    precision: str = opt("fp32", "fp32 (TF32 on CUDA) or bf16 autocast; losses and adaptive weights are fp32 in both", choices=("fp32", "bf16"))
    compile: bool = opt(torch.cuda.is_available(), "torch.compile encoder and decoder; default: on CUDA", same=False)
    workers: int = opt(8, "data loading processes for each training process; 0 when all images fit in memory (1 GiB)", same=False)
    log_every: int = opt(50, "steps between lines of metrics_vae.csv", same=False)
    save_every: int = opt(1000, "steps between checkpoints", same=False)
    fresh: bool = opt(False, "start over instead of resuming the run in --out", same=False)
    bench: bool = opt(False, "time training steps on synthetic images, with and without VF loss, and exit", same=False)
    flops: bool = opt(False, "print Table A4 and exit", same=False)


# Ours, for two CPU cores. VF loss as in the second stage of the authors' long recipe (weight 0.1, margins 0); no LPIPS, which needs a
# download. (Weight 0.5, as in their first stage, holds the reconstruction back: L1 0.228 instead of 0.163 after 450 steps, measured.)
MINI = dict(data="shapes", image_size=32, spec="mini-f4d4", vf="mini", lpips_weight=0.0, disc_start=600, cos_margin=0.0, mdms_margin=0.0,
            teacher_steps=250, batch_size=16, lr=1e-3, warmup=100, steps=700, workers=0, log_every=25, save_every=100)
NO_VF = dict(vf="none")
NO_MARGIN = dict(cos_margin=0.0, mdms_margin=0.0)
# "when we use a single loss individually, we halve the hyper weight to ensure a fair comparison" [Sec. 6.3]
ONLY_MDMS, ONLY_MCOS = dict(mcos=False, vf_weight=0.05), dict(mdms=False, vf_weight=0.05)
# The authors' three stages (their code: 100 + 15 + 15 epochs; Sec. 5.4 says 125). Discriminator from the start in the second and third.
LONG = dict(stages="100:0.5:0:0:2501,15:0.1:0:0:0,15:0.1:0.5:0.25:0")

# name: (settings that differ from the defaults, the paper's rFID, PSNR, LPIPS, SSIM, gFID). gFID is FID-10K of LightningDiT-B, 160 epochs; in
# Table A1 80 epochs; for Tables A2 and A3 the supplement names none. Rows that the paper prints twice (Table 4 naive = Table 2 f16d32) stand once for
# each table, with the same settings. Tables A1 and A2 print other reconstruction scores for settings of Table 2 (f16d32 plain: rFID 0.40 and 0.26),
# and do not say what differed.
ROWS = {
    "table1-sdvae": (dict(spec="f8d4", **NO_VF), None),                                       # Table 1 uses LDM's released kl-f8: --init
    **{f"table2-f16d{d}-{vf}": (dict(spec=f"f16d{d}", vf=vf), scores) for d, vf, scores in (
        (16, "none", (0.49, 26.10, 0.132, 0.72, 16.24)), (16, "mae", (0.51, 26.01, 0.137, 0.71, 16.86)), (16, "dinov2", (0.55, 25.29, 0.147, 0.69, 15.79)),
        (32, "none", (0.26, 28.59, 0.089, 0.80, 22.62)), (32, "mae", (0.28, 28.33, 0.091, 0.80, 19.89)), (32, "dinov2", (0.28, 27.96, 0.096, 0.79, 15.82)),
        (64, "none", (0.17, 31.03, 0.055, 0.88, 36.83)), (64, "mae", (0.15, 31.03, 0.054, 0.87, 23.58)), (64, "dinov2", (0.14, 30.71, 0.055, 0.87, 24.00)))},
    "table4-naive": (NO_VF, (0.26, 28.59, 0.089, 0.80, 22.62)),
    "table4-dinov2": ({}, (0.28, 27.96, 0.096, 0.79, 15.82)),
    "table4-mae": (dict(vf="mae"), (0.28, 28.33, 0.091, 0.80, 19.89)),
    "table4-sam": (dict(vf="sam"), (0.26, 28.31, 0.091, 0.80, 19.80)),
    "table4-clip": (dict(vf="clip"), (0.33, 28.39, 0.091, 0.80, 18.93)),
    "table5-none": (NO_VF, (0.26, 28.59, 0.089, 0.80, 22.62)),
    "table5-full": ({}, (0.28, 27.96, 0.096, 0.79, 15.82)),
    "table5-no-mcos": (ONLY_MDMS, (0.27, 28.52, 0.090, 0.80, 21.87)),
    "table5-no-mdms": (ONLY_MCOS, (0.27, 28.24, 0.090, 0.80, 17.74)),
    "table5-no-margin": (NO_MARGIN, (0.27, 28.07, 0.093, 0.79, 17.77)),
    "tableA1-none": (NO_VF, (0.40, 26.34, 0.10, 0.74, 29.35)),
    "tableA1-m0.5-0.25": ({}, (0.42, 25.88, 0.10, 0.72, 22.11)),
    "tableA1-m0.4-0.25": (dict(cos_margin=0.4), (0.41, 25.91, 0.10, 0.73, 22.70)),
    "tableA1-m0-0": (NO_MARGIN, (0.44, 25.91, 0.10, 0.73, 23.43)),
    "tableA1-mcos": (ONLY_MCOS, (0.37, 25.38, 0.12, 0.71, 25.70)),
    "tableA1-mdms": (ONLY_MDMS, (0.39, 25.55, 0.12, 0.71, 26.99)),
    "tableA2-f16d32-vf": ({}, (0.33, 25.81, 0.110, 0.72, 19.93)),
    "tableA2-f16d16": (dict(spec="f16d16", **NO_VF), (0.49, 24.45, 0.142, 0.66, 21.20)),
    "tableA2-f16d24": (dict(spec="f16d24", **NO_VF), (0.34, 25.40, 0.118, 0.71, 24.59)),
    "tableA2-f16d28": (dict(spec="f16d28", **NO_VF), (0.33, 26.13, 0.108, 0.73, 26.87)),
    "tableA3-f16d128": (dict(spec="f16d128", **NO_VF), (0.13, 30.00, 0.047, 0.86, 63.92)),
    "tableA3-f16d128-vf": (dict(spec="f16d128"), (0.14, 29.55, 0.050, 0.85, 46.13)),
    "tableA3-f32d128": (dict(spec="f32d128", **NO_VF), (0.38, 25.21, 0.119, 0.69, 54.52)),
    "tableA3-f32d128-vf": (dict(spec="f32d128"), (0.37, 24.98, 0.125, 0.68, 38.20)),
    "vavae-long": (LONG, (0.28, None, None, None, None)),                                     # Sec. 5.4, Table 3: the released tokenizer
}
PRESETS = {"mini": MINI, "imagenet256": {}, **{name: settings for name, (settings, _) in ROWS.items()}}
PAPER_SCORES = {name: scores for name, (_, scores) in ROWS.items() if scores}


# --- Conduct: flags -----------------------------------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):                                                  # argparse would print its whole usage first
        fail(f"{message}; see --help")


def parse_settings(cls, presets, doc, argv=None):
    """Flags made from a Settings dataclass: --image-size for image_size, --mcos / --no-mcos for a bool. Preset first, flags override it.

    presets: {name: {field: value}} over the class's defaults; the default preset is mini. Unknown or mistyped flags end in one line.
    """
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="mini", choices=tuple(presets))
    defaults = dict(presets[first.parse_known_args(argv)[0].preset])
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(cls):
        default, flag = defaults.pop(f.name, f.default), "--" + f.name.replace("_", "-")
        text = f.metadata["help"].replace("%", "%%")
        if f.name == "preset":
            parser.add_argument(flag, default="mini", choices=tuple(presets), metavar="NAME", help=f"{text}: {', '.join(presets)} (default: mini)")
        elif isinstance(f.default, bool):
            parser.add_argument(flag, default=default, action=argparse.BooleanOptionalAction, help=f"{text} (default: {default})")
        else:
            kind = next(t for t in (int, float, str) if t.__name__ in str(f.type))   # the annotation: int, float, str, or str | None
            parser.add_argument(flag, default=default, type=kind, choices=f.metadata["choices"], metavar=kind.__name__.upper(),
                                help=text + (f": {', '.join(f.metadata['choices'])}" if f.metadata["choices"] else "") + f" (default: {default!r})")
    assert not defaults, f"the preset sets unknown settings: {sorted(defaults)}"
    settings = cls(**vars(parser.parse_args(argv)))
    for f in fields(cls):                                                      # numbers are never negative, and some (where the default is not 0) are never 0
        value = getattr(settings, f.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and (value < 0 or not math.isfinite(value)):
            fail(f"--{f.name.replace('_', '-')} {value} is negative or not finite")
        if f.name in ("batch_size", "image_size", "log_every", "save_every", "lr", "num", "accumulate", "extract_batch") and f.default and value == 0:
            fail(f"--{f.name.replace('_', '-')} must be greater than 0")
    settings.out = settings.out or f"runs/{settings.preset}"
    return settings


# --- Conduct: devices and processes ---------------------------------------------------------------------------------------------------------------
World = namedtuple("World", "rank size device")


def setup(device):
    """Start this process: World(rank, size, device). Under torchrun joins the group (NCCL on CUDA, gloo on CPU); plain python is rank 0 of 1."""
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no CUDA GPU here; use --device cpu or auto")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True   # fp32 means TF32 on CUDA, for every script
        torch.backends.cudnn.benchmark = True
    if size > 1:
        # Hours, not the usual ten minutes: at the end of an extraction all wait for one that goes through every latent.
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=6))
    return World(rank, size, device)


def share(world, batch_size):
    """The slice of a global batch that this process works on; fails if the batch does not divide."""
    if batch_size % world.size:
        fail(f"--batch-size {batch_size} is not divisible by the {world.size} processes")
    part = batch_size // world.size
    return slice(world.rank * part, (world.rank + 1) * part)


@contextlib.contextmanager
def first_alone(world):
    """The first process of each node goes through the block alone (it downloads what is missing), then the others (they find it)."""
    others = world.size > 1 and int(os.environ.get("LOCAL_RANK", world.rank)) > 0
    if others:
        dist.barrier()
    yield
    if world.size > 1 and not others:
        dist.barrier()


def load_optimizer(optimizer, state, device):
    """Restore an optimizer, on another kind of device too: fused as that device wants it, moments in the memory layout of their weights."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["fused"] = device.type == "cuda"
    for weight, moments in optimizer.state.items():
        moments.update({k: torch.empty_like(weight).copy_(v) for k, v in moments.items() if v.shape == weight.shape})


def average(world, tensor):
    """Mean of a tensor over all processes."""
    if world.size > 1:
        dist.all_reduce(tensor)
        tensor /= world.size
    return tensor


def step_generator(device, *numbers):
    """A random generator that is a function of the numbers (seed, purpose, step, ...): no random state needs saving, so resuming is exact."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# --- Conduct: files -------------------------------------------------------------------------------------------------------------------------------
def atomic_write(path, write):
    """write(file) into a temporary file beside `path`, flush it to disk, rename: the old file or the whole new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)                                      # left over only if write() failed


def save_checkpoint(state, path):
    atomic_write(path, lambda f: torch.save(state, f))


def torch_load(path):
    """torch.load on the CPU, of tensors and plain values only; a missing or broken file ends in one line."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} does not exist")
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, struct.error, pickle.UnpicklingError) as error:   # torch.load's ways to fail
        fail(f"{path} cannot be read: truncated, or not a file of tensors only ({(str(error).splitlines() or ['empty'])[0][:120]})")


def load_checkpoint(path, stage, hint):
    """A checkpoint of ours of the given stage ("vae" or "dit"). hint: what to do when there is none."""
    if not Path(path).exists():
        fail(f"{path} does not exist: {hint}")
    state = torch_load(path)
    if not isinstance(state, dict) or state.get("stage") != stage:
        found = state.get("stage", "no stage of this project") if isinstance(state, dict) else "not a checkpoint"
        fail(f"{path} is a checkpoint of another kind ({found}, not {stage}): {hint}")
    return state


def resume(path, stage, settings, world):
    """The state to go on from, or None. Other settings than the checkpoint's are an error that lists them; --fresh ignores the old run."""
    if settings.fresh or not Path(path).exists():
        return None
    state = load_checkpoint(path, stage, "remove it, or start over with --fresh")
    old = {f.name: f.default for f in fields(settings)} | state["settings"]     # a setting younger than the checkpoint had its default
    changed = [f"--{f.name.replace('_', '-')} {getattr(settings, f.name)!r} (checkpoint: {old[f.name]!r})" for f in fields(settings)
               if f.metadata["same"] and old[f.name] != getattr(settings, f.name)]
    if changed:
        fail(f"{path} was made with other settings: {', '.join(changed)}; use those, another --out, or --fresh to start over")
    return state


def fingerprint(state_dict):
    """SHA-256 of a tokenizer's weights, 16 hex digits: names the latents that belong to it."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        digest.update(name.encode())
        digest.update(state_dict[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")   # what LDM's and the authors' files hold beside the tokenizer


def read_released_tokenizer(path):
    """(spec kwargs, state_dict) of the authors' VA-VAE, of CompVis kl-f8, or of ours. Training-only keys are dropped by name and listed once.

    The spec is the one of SPECS with exactly these names and shapes; none is an error that names the first differences to f16d32.
    """
    state = torch_load(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = state if isinstance(state, dict) else {}
    weights = {k: v for k, v in state.items() if torch.is_tensor(v) and not k.startswith(TRAINING_ONLY)}
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    for spec in SPECS.values():
        if shapes == expected_shapes(spec):
            dropped = sorted({prefix for prefix in TRAINING_ONLY for k in state if k.startswith(prefix)})
            if dropped:
                print(f"{path}: left out the training-only keys {', '.join(f'{prefix}*' for prefix in dropped)}")
            return spec, weights
    expected = expected_shapes(SPECS["f16d32"])
    wrong = [f"{k}: {shapes.get(k, 'missing')} in the file, {expected.get(k, 'no such weight')} in f16d32"
             for k in sorted(expected.keys() | shapes.keys()) if expected.get(k) != shapes.get(k)]
    fail(f"{path} fits no tokenizer of this project ({len(wrong)} differences to f16d32: {'; '.join(wrong[:3])})")


def expected_shapes(spec):
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in AutoencoderKL(**spec).state_dict().items()}


def load_tokenizer(path, device, hint="run python train_vae.py first, or name one with --vae"):
    """(AutoencoderKL in eval mode without gradients, its checkpoint) from our vae.pt or from a released file, which knows no settings or classes."""
    if not Path(path).exists():
        fail(f"{path} does not exist: {hint}")
    state = torch_load(path)
    if not isinstance(state, dict) or "stage" not in state:
        spec, weights = read_released_tokenizer(path)
        state = {"stage": "vae", "step": 0, "settings": {}, "spec": spec, "state_dict": weights}
    elif state["stage"] != "vae":
        fail(f"{path} is a checkpoint of another kind ({state['stage']}, not vae): {hint}")
    elif not {"spec", "settings", "state_dict", "step"} <= state.keys() or \
            expected_shapes(state["spec"]) != {k: tuple(v.shape) for k, v in state["state_dict"].items()}:
        fail(f"{path} is damaged: its weights are not those of the tokenizer that it says it holds")
    vae = AutoencoderKL(**state["spec"])
    vae.load_state_dict(state["state_dict"])
    return vae.to(device).eval().requires_grad_(False), state


# --- Conduct: watching and stopping -----------------------------------------------------------------------------------------------------------------
class Metrics:
    """A line of metrics every so often: a CSV file, and TensorBoard if it is installed. Does nothing on other processes than the first."""

    def __init__(self, path, world, step):
        self.file = None
        if world.rank:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lines = []
        if step and Path(path).exists():                                       # lines after the checkpoint will be written again
            lines = Path(path).read_text().splitlines()
            lines = lines[:1] + [line for line in lines[1:] if line.split(",")[0].isdigit() and int(line.split(",")[0]) <= step]
        atomic_write(path, lambda f: f.write("".join(line + "\n" for line in lines).encode()))
        self.file, self.header = open(path, "a", newline=""), lines[0].split(",") if lines else None
        self.csv = csv.writer(self.file, lineterminator="\n")
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(Path(path).parent / "tensorboard"), purge_step=step)
        except ImportError:
            self.board = None

    def write(self, step, **values):
        if self.file is None:
            return
        if self.header is None:
            self.header = ["step", *values]
            self.csv.writerow(self.header)
        self.csv.writerow([step] + [f"{values[k]:.6g}" if k in values else "" for k in self.header[1:]])
        self.file.flush()
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)


class Stop:
    """SIGTERM and Ctrl-C ask to stop: the step is finished and saved. A second Ctrl-C kills."""

    def __init__(self, world):
        self.world, self.asked = world, False
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, now):
        """Whether to stop after this step. Several processes must stop at the same one, so they ask each other, only when `now` (it synchronises)."""
        if self.world.size == 1 or not now:
            return self.asked and self.world.size == 1
        flag = torch.tensor(float(self.asked), device=self.world.device)
        dist.all_reduce(flag)
        return flag.item() > 0


class Finite:
    """Watches a loss term for NaN and infinity without a synchronising call a step: remembers the first bad step on the device."""

    def __init__(self, device):
        self.bad = {}
        self.device = device

    def watch(self, step, **terms):
        for name, value in terms.items():
            bad = self.bad.setdefault(name, torch.full((), -1, dtype=torch.int64, device=self.device))
            bad.copy_(torch.where((bad < 0) & ~torch.isfinite(value.detach()), step, bad))

    def check(self, path, advice, weights=()):
        """Fails if a watched term, or one of the weights, is not finite. Called before every save, with the weights, so `path` keeps the last good ones."""
        steps = {name: int(bad) for name, bad in self.bad.items() if int(bad) >= 0}
        if steps:
            name = min(steps, key=steps.get)
            fail(f"{name} is not finite at step {steps[name]}; {advice}; the last good checkpoint, if there is one, is {path}")
        if weights and not torch.stack([torch.isfinite(w).all() for w in weights]).all():   # the loss was finite, its gradient was not
            fail(f"a weight is not finite after the last step; {advice}; the last good checkpoint, if there is one, is {path}")


def peak_memory(device):
    """Peak memory so far in GiB: the GPU's allocations, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(images):
    """float in [-1, 1] (clipped) -> uint8, rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_grid(images, path, nrow):
    """images (N, 3, H, W) in [-1, 1] -> a PNG with nrow of them in a row."""
    grid = torchvision.utils.make_grid(to_uint8(images).cpu(), nrow=nrow, padding=2, pad_value=255)
    scale = max(1, 96 // images.shape[-1])                                     # 32-pixel images are shown three times as large
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    atomic_write(path, lambda f: picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST).save(f, "PNG"))


# --- Images: the built-in picture set ---------------------------------------------------------------------------------------------------------------
# Ten drawn shapes, so that every script runs offline on a CPU (ours, not the paper's).
# A point is one complex number, x + iy with y up, so turning, scaling and moving a shape is one line of arithmetic.
# A shape is a signed distance function: points (N,) -> distance to its edge (N,), negative inside; about 1 in radius.

def polygon(*corners):
    """Signed distance function of a polygon (even-odd rule); corners are complex numbers in order round the edge."""
    a = np.array(corners, np.complex64)[:, None]              # (K, 1) where each of the K sides starts; single: faster
    side = np.roll(a, -1, axis=0) - a                         # (K, 1) from a corner to the next
    length, rising = np.abs(side), side.imag > 0              # (K, 1), (K, 1)
    unit = side / length                                      # (K, 1)

    def distance(p):
        x, y = p.real.astype(np.float32) - a.real, p.imag.astype(np.float32) - a.imag  # (K, N) from a corner to p ...
        along, left = x * unit.real + y * unit.imag, y * unit.real - x * unit.imag     # ... in the frame of its side
        beyond = along - np.clip(along, 0, length)            # (K, N) how far past either end of the side
        nearest = np.sqrt((beyond * beyond + left * left).min(axis=0))         # (N,)
        # p is inside if a ray from p towards +x crosses an odd number of sides. It crosses a side whose two
        # ends lie above and below it, if p is to the left of that side (a rising one) or to its right (a falling one).
        under = y < 0                                         # (K, N)
        crossed = (under != np.roll(under, -1, axis=0)) & ((left > 0) == rising)
        return np.where(np.logical_xor.reduce(crossed, axis=0), -nearest, nearest)

    return distance


def spokes(n, radii, turn=0.25):
    """n corners at equal angles, the first `turn` of a circle from +x, with the radii repeating in order."""
    return [radii[k % len(radii)] * np.exp(2j * math.pi * (k / n + turn)) for k in range(n)]


_tip = polygon(0.4j, 0.83, -1j, -0.83)                        # a heart is this kite and two discs
SHAPES = {
    "disc": lambda p: np.abs(p) - 0.85,
    "ring": lambda p: np.abs(np.abs(p) - 0.72) - 0.23,
    "square": polygon(*spokes(4, [1.05], turn=0.125)),
    "triangle": polygon(*spokes(3, [1.1])),
    "star": polygon(*spokes(10, [1.15, 0.46])),
    "cross": polygon(*[c * 1j ** k for k in range(4) for c in (1 - 0.3j, 1 + 0.3j, 0.3 + 0.3j)]),
    "heart": lambda p: np.minimum(_tip(p), np.abs(np.abs(p.real) + 1j * p.imag - (0.45 + 0.32j)) - 0.5),
    "crescent": lambda p: np.maximum(np.abs(p) - 1, 0.85 - np.abs(p - 0.5)),
    "arrow": polygon(1.1, 0.1 + 0.85j, 0.1 + 0.3j, -1 + 0.3j, -1 - 0.3j, 0.1 - 0.3j, 0.1 - 0.85j),
    "hourglass": polygon(-0.75 + 0.95j, 0.75 + 0.95j, -0.75 - 0.95j, 0.75 - 0.95j),
}


def texture(rng, p, grain):
    """A random pattern in [-1, 1] at the points p (N,): the fine detail an autoencoder has to work for."""
    kind = rng.integers(6)
    q = p * np.exp(1j * rng.uniform(0, math.pi)) * rng.uniform(14, 24)         # a period is 4 to 7 of 32 pixels
    if kind == 0:
        return np.clip(2 * np.sin(q.real), -1, 1)                              # stripes
    if kind == 1:
        return np.clip(3 * np.sin(q.real / 1.5) * np.sin(q.imag / 1.5), -1, 1)   # checks
    if kind == 2:
        return np.clip(2 * (np.cos(q.real) + np.cos(q.imag)) - 1, -1, 1)       # dots
    if kind == 3:
        return np.clip(2 * np.sin(np.abs(q - 14 * complex(*rng.uniform(-1, 1, 2)))), -1, 1)     # ripples
    if kind == 4:
        return grain                                                           # noise
    return np.clip(q.real / 12, -1, 1)                                         # a smooth gradient


def draw_shape(seed, index, size=32):
    """Draw picture `index` of the set `seed`: a shape of random place, size, turn, colours, textures and light.

    Returns (uint8 (size, size, 3), label in 0..9). A pure function of its arguments, so no picture depends on
    worker, batch or order; seed and index must not be negative. The label is index % 10: the classes are balanced,
    and only the shape tells them apart. Another size gives the same picture with a finer or coarser grain.
    """
    rng, label = np.random.default_rng([seed, index]), index % len(SHAPES)
    axis = (np.arange(size) + 0.5) * (2 / size) - 1                            # pixel centres in [-1, 1]
    p = (axis - 1j * axis[:, None]).ravel()                                    # (N,), N = size * size, top row first

    # The shape: 60 to 78 % of the frame, turned by up to 30 degrees; no corner is over 1.21 radii out, so it stays inside. (With any size, place and
    # turn, a LightningDiT of 12 CPU minutes draws blots: measured.)
    radius, turn = rng.uniform(0.6, 0.78), np.exp(1j * math.pi / 6 * rng.uniform(-1, 1))
    centre = complex(*rng.uniform(-1, 1, 2)) * (1 - 1.2 * radius)
    distance = radius * list(SHAPES.values())[label]((p - centre) / (radius * turn))       # (N,)
    edge = np.clip(0.5 - distance * (size / 2), 0, 1)                          # (N,) 0 to 1 across one pixel ...
    cover = edge * edge * (3 - 2 * edge)                                       # ... by smoothstep: no jagged edges

    # The light comes from one direction: it tints the whole frame and catches the shape's bevelled rim.
    light = np.exp(2j * math.pi * rng.uniform())
    down, right = np.gradient(distance.reshape(size, size) * (size / 2))       # slope of the distance = outward normal
    rim = (right.ravel() * light.real - down.ravel() * light.imag) * np.clip(1 + distance / 0.2, 0, 1)
    ambient = (p * light.conjugate()).real                                     # brighter towards the light

    # A colour is brightness + saturation * hue, where hue sums to 0: the brightness is the mean of R, G, B.
    # One of shape and background is dark and the other bright, at least 0.3 apart before texture and light.
    thirds = np.array([0, 1, 2]) / 3
    bright = rng.permutation([rng.uniform(0.2, 0.36), rng.uniform(0.66, 0.82)])
    grain = np.random.default_rng([seed, index, 1]).uniform(-1, 1, size * size)    # own stream: size moves only it
    layers = []                                                                # the background, then the shape
    for brightness, relief in zip(bright, (0.08 * ambient, 0.05 * ambient + 0.1 * rim)):
        pattern = texture(rng, p, grain) * rng.uniform(0.2, 0.8)               # (N,) it shifts brightness and hue
        hues = rng.uniform() + np.array([[0], [rng.uniform(-0.1, 0.1)]]) + thirds         # (2, 3) its two ends
        tints = rng.uniform(0.1, 0.3) * np.cos(2 * math.pi * hues)[..., None]  # (2, 3, 1)
        layers.append(brightness + 0.12 * pattern + relief + tints[0] + (0.5 + 0.5 * pattern) * (tints[1] - tints[0]))
    image = layers[0] + cover * (layers[1] - layers[0])                        # (3, N)
    image = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    return np.ascontiguousarray(image.T).reshape(size, size, 3), label         # (3, N) -> (size, size, 3)


# --- Images: one loading path for all -----------------------------------------------------------------------------------------------------------------
class DataError(Exception):
    """Something is wrong with the user's images; main() turns it into one line (it may be raised in a data loading process)."""


def center_crop(image, size):
    """ADM's centre crop of a PIL image: halve by box filter while twice too large, bicubic to the exact short side, crop. -> (size, size, 3) uint8."""
    image = image.convert("RGB")                                               # grey, palette, CMYK and RGBA files too
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


# Built-in images: set 0 whatever the --seed, so that scores of runs with several seeds compare; test indices follow the training ones.
SHAPES_TRAIN, SHAPES_TEST = 10_000, 2_000


class Images(Dataset):
    """Labelled images: [i] -> uint8 (3, S, S), .labels (N,) int64, .classes names. split: "train" or "test". data: see Settings.

    If all fit into 1 GiB they are decoded once into memory. DataError names an empty class folder, a missing data set or an unreadable file.
    """

    def __init__(self, data, split, image_size):
        self.data, self.size, self.memory = data, image_size, None
        if data == "shapes":
            start, n = (0, SHAPES_TRAIN) if split == "train" else (SHAPES_TRAIN, SHAPES_TEST)
            self.items, self.classes = range(start, start + n), list(SHAPES)
            self.labels = torch.tensor([i % len(SHAPES) for i in self.items])
        else:
            self.source, index = self.open(data, split)
            targets = getattr(self.source, "targets", None)
            targets = torch.tensor([label for _, label in self.source._samples] if targets is None else targets)   # Imagenette keeps no targets
            self.items, self.classes = index or range(len(self.source)), list(self.source.classes)
            self.classes = [c[0] if isinstance(c, tuple) else c for c in self.classes]   # Imagenette has several names a class
            self.labels = targets[torch.tensor(list(self.items))].long()
        if len(self) * 3 * image_size ** 2 <= 2 ** 30:
            self.memory = torch.empty(len(self), 3, image_size, image_size, dtype=torch.uint8)
            for i in tqdm(range(len(self)), desc=f"{data} {split} images", unit="image", disable=len(self) < 2000):
                self.memory[i] = self.load(i)

    def open(self, data, split):
        """The torchvision data set, and the indices of the split where the folder itself has none."""
        train, root = split == "train", "data"
        sets = {"cifar10": lambda **k: torchvision.datasets.CIFAR10(root, train=train, **k),
                "fashion-mnist": lambda **k: torchvision.datasets.FashionMNIST(root, train=train, **k),
                "imagenette": lambda **k: torchvision.datasets.Imagenette(root, split="train" if train else "val", size="320px", **k)}
        if data in sets:
            try:
                return sets[data](download=False), None
            except RuntimeError:                                               # not in place yet
                pass
            try:
                return sets[data](download=True), None
            except (OSError, RuntimeError) as error:
                raise DataError(f"--data {data} is not in ./{root} and cannot be downloaded: {str(error).splitlines()[0]}") from error
        if not Path(data).is_dir():
            raise DataError(f"--data {data} is neither a folder nor one of shapes, {', '.join(sets)}")
        names = ("train",) if train else ("val", "test", "validation")
        folder = next((Path(data) / n for n in names if (Path(data) / n).is_dir()), Path(data))
        if folder == Path(data) and (Path(data) / "train").is_dir():
            raise DataError(f"{data} has a folder train but none of val, test, validation")
        try:
            source = torchvision.datasets.ImageFolder(folder)
        except FileNotFoundError as error:                                     # no class folders, or one without images
            raise DataError(f"--data {data}: {error}") from error
        if folder != Path(data):
            return source, None
        # A folder without a split of its own: every tenth image, counted over all classes, is a test image.
        index = [i for i in range(len(source)) if (i % 10 != 9) == train]
        if not index:
            raise DataError(f"--data {data} has {len(source)} images, too few to split (10 or more); give it folders train and val")
        return source, index

    def __len__(self):
        return len(self.items)

    def load(self, i):
        if self.data == "shapes":
            image = Image.fromarray(draw_shape(0, self.items[i])[0])
        else:
            try:
                image = self.source[self.items[i]][0]
            except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:   # Pillow's ways of meeting a broken file
                name = self.source.samples[self.items[i]][0] if hasattr(self.source, "samples") else f"image {self.items[i]} of {self.data}"
                raise DataError(f"cannot read the image {name} ({error})") from error
        return torch.from_numpy(center_crop(image, self.size)).permute(2, 0, 1)   # (3, S, S)

    def __getitem__(self, i):
        return self.load(i) if self.memory is None else self.memory[i]


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=step_generator("cpu", seed, "order", epoch))


def batch_indices(n, batch_size, step, seed):
    """Indices of the samples of training step `step` (0-based), a function of (seed, epoch): within an epoch none twice and none lost.

    The epochs' orders stand one behind the other and are cut into batches, so a batch may reach over the border of two epochs.
    """
    first, parts = step * batch_size, []
    while batch_size:
        epoch, position = divmod(first, n)
        part = epoch_order(n, seed, epoch)[position:position + batch_size]
        parts.append(part)
        first, batch_size = first + len(part), batch_size - len(part)
    return torch.cat(parts)


class ImageBatches(Dataset):
    """[step] -> this process's share of the step's images, uint8 (b, 3, S, S), each flipped with p = 0.5.

    Flipping is ours: the paper names no augmentation, but its latents are extracted plain and flipped.
    """

    def __init__(self, images, batch_size, seed, part):
        self.images, self.batch_size, self.seed, self.part = images, batch_size, seed, part

    def __getitem__(self, step):
        index = batch_indices(len(self.images), self.batch_size, step, self.seed)[self.part]
        flip = torch.rand(self.batch_size, generator=step_generator("cpu", self.seed, "flip", step))[self.part] < 0.5
        x = torch.stack([self.images[i] for i in index.tolist()])
        return torch.where(flip[:, None, None, None], x.flip(3), x)


def loader(batches, start, stop, workers, device):
    """Iterate batches[start], ..., batches[stop - 1], read ahead by `workers` processes (0: in this one)."""
    def worker(_):                                                             # a stop signal to the whole group is the parent's business
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return DataLoader(batches, batch_size=None, sampler=range(start, stop), num_workers=workers, pin_memory=device.type == "cuda",
                      worker_init_fn=worker, prefetch_factor=4 if workers else None,
                      multiprocessing_context="fork" if workers else None)     # Python 3.14's default would have to pickle memory maps


# --- The training step ------------------------------------------------------------------------------------------------------------------------------
Stage = namedtuple("Stage", "steps vf_weight cos_margin mdms_margin disc_start")


class Tokenizer(nn.Module):
    """What the generator's optimizer holds: the autoencoder and W of Eq. 1, as one module for DistributedDataParallel."""

    def __init__(self, vae, width):
        super().__init__()
        self.vae = vae
        self.linear_proj = nn.Conv2d(vae.embed_dim, width, 1, bias=False) if width else None

    def forward(self, x, noise):
        x_hat, z, posterior = self.vae(x, noise)
        # [Eq. 1] z' = W z, (B, d, h, w) -> (B, d_f, h, w). z is a SAMPLE of the posterior, not its mean (the authors' code).
        return x_hat, z, posterior.mean, posterior.logvar, self.linear_proj(z) if self.linear_proj is not None else None


def reconstruction_loss(x, x_hat, lpips, lpips_weight):
    """LDM's: per-pixel L1 plus LPIPS, broadcast over the pixels; summed over C, H, W, divided by the batch. Likelihood variance stays 1 (authors' code)."""
    loss = (x - x_hat).abs()                                                   # (B, 3, H, W)
    if lpips is not None:
        loss = loss + lpips_weight * lpips(x, x_hat)                           # + (B, 1, 1, 1)
    return loss.sum() / len(x)


def train_step(run, x, noise, stage, batch):
    """One batch through the losses of Sec. 3 and both optimizers. x (b, 3, H, W) in [-1, 1]; noise (b, d, h, w); batch: counted within the stage.

    The graph is cut at x_hat: each loss on the image is differentiated down to x_hat once (through VGG and the discriminator), and from there on a
    loss stands for its gradient, since d/dw sum(x_hat * grad) = d(loss)/dw. So Eq. 4 never walks through VGG again, the discriminator's gradient
    costs no second pass through the decoder, and what is left of Eq. 4 is one pass through the decoder that computes no weight gradients (eagerly; a
    compiled decoder's backward is one piece and computes them all).
    """
    s, vae = run.settings, run.tokenizer.vae
    with autocast(x, s.precision == "bf16"):
        x_hat, z, mean, logvar, z_proj = run.ddp(x, noise)                     # (b, 3, H, W), (b, d, h, w) x 3, (b, d_f, h, w)
    mean, logvar = mean.float(), logvar.float()
    leaf = x_hat.detach().float().requires_grad_()                             # losses in fp32 from here on
    rec = reconstruction_loss(x, leaf, run.lpips, s.lpips_weight)
    rec_grad, = torch.autograd.grad(rec, leaf)                                 # (b, 3, H, W)
    image_grad, terms = rec_grad.clone(), {"rec": rec.detach(), "l1": (x - leaf.detach()).abs().mean()}

    adversarial = run.disc is not None and batch >= stage.disc_start
    if adversarial:
        g_loss = -run.disc(leaf).mean()                                        # hinge loss of the generator
        g_grad, = torch.autograd.grad(g_loss, leaf)
        # VQGAN: the same adaptive weight as Eq. 4, on the decoder's last layer
        w_disc = s.disc_weight * adaptive_weight((x_hat * rec_grad).sum(), (x_hat * g_grad).sum(), vae.decoder.conv_out.weight, max_weight=1e4)
        image_grad += w_disc * g_grad
        terms.update(g=g_loss.detach(), w_disc=w_disc)

    kl = 0.5 * (mean ** 2 + logvar.exp() - 1.0 - logvar).sum() / len(x)       # summed over the latent, divided by the batch
    loss = (x_hat * image_grad.to(x_hat.dtype)).sum() + s.kl_weight * kl
    terms["kl"] = kl.detach()
    if z_proj is not None:
        f = run.foundation(x, z.shape[-2:])                                    # (b, d_f, h, w)
        mcos, mdms = vf_loss(z_proj, f, stage.cos_margin, stage.mdms_margin, s.mcos, s.mdms)
        w_adaptive = adaptive_weight((x_hat * rec_grad.to(x_hat.dtype)).sum(), mcos + mdms, vae.encoder.conv_out.weight)
        loss = loss + stage.vf_weight * w_adaptive * (mcos + mdms)             # [Eq. 5] L_vf = w_hyper * w_adaptive * (L_mcos + L_mdms)
        terms.update(mcos=mcos.detach(), mdms=mdms.detach(), w_vf=stage.vf_weight * w_adaptive)
    run.opt.zero_grad(set_to_none=True)
    loss.backward()
    run.opt.step()

    if adversarial:                                                            # x_hat is the generator's, detached: nothing flows into the decoder
        real, fake = run.ddp_disc(x), run.ddp_disc(x_hat.detach().float())
        d_loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())   # hinge loss of the discriminator
        run.opt_disc.zero_grad(set_to_none=True)
        d_loss.backward()
        run.opt_disc.step()
        terms["d"] = d_loss.detach()
    return terms, (z.detach(), mean.detach(), logvar.detach())


def posterior_health(z, mean, logvar):
    """Is the latent alive? Mean and spread of the posterior's std, KL in nats per latent value, smallest and largest latent std of a channel."""
    std, channel = torch.exp(0.5 * logvar), z.float().std(dim=(0, 2, 3))       # (b, d, h, w), (d,)
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1.0 - logvar).mean()
    return dict(post_std=std.mean(), post_std_spread=std.std(), kl_per_dim=kl, latent_std_min=channel.min(), latent_std_max=channel.max())


# --- Training -----------------------------------------------------------------------------------------------------------------------------------------
def schedule(s, n):
    """The run's stages, steps counted from the epochs: n training images."""
    if not s.stages:
        return [Stage(s.steps or max(1, round(s.epochs * n / s.batch_size)), s.vf_weight, s.cos_margin, s.mdms_margin, s.disc_start)]
    try:
        rows = [[float(v) for v in row.split(":")] for row in s.stages.split(",")]
        stages = [Stage(max(1, round(epochs * n / s.batch_size)), w, m1, m2, int(start)) for epochs, w, m1, m2, start in rows]
    except (ValueError, OverflowError):                                        # a word, the wrong number of fields, inf
        fail(f"--stages {s.stages!r} is not EPOCHS:W_HYPER:M1:M2:DISC_START, one a stage, joined by commas")
    if s.steps and s.steps != sum(stage.steps for stage in stages):
        fail(f"--steps {s.steps} and --stages (which make {sum(stage.steps for stage in stages)} steps of {n} images) exclude each other")
    return stages


def mini_teacher(s, images, f, world):
    """The stand-in foundation model of --vf mini: trained on the spot by the first process, kept in a file, read by the others.

    --teacher names a file that several runs share, as the paper's runs share one DINOv2. If it exists it is taken as it is, whatever images it was
    trained on; the run's own teacher.pt is made again when its key says other images, seed, steps or stride.
    """
    path = Path(s.teacher or f"{s.out}/teacher.pt")
    key = dict(data=s.data, image_size=s.image_size, seed=s.seed, steps=s.teacher_steps, f=f)
    if world.rank == 0 and not (path.exists() and (s.teacher or (not s.fresh and torch_load(path)["key"] == key))):
        torch.manual_seed(s.seed + 1)
        chosen = epoch_order(len(images), s.seed, 0)[:50_000]                  # a folder is sorted by class: not simply the first ones
        everything = images.memory[chosen] if images.memory is not None else torch.stack([images[i] for i in chosen.tolist()])
        net = train_classifier(MiniTeacher(len(images.classes), f), everything, images.labels[chosen], s.teacher_steps, s.seed + 1, world.device, "stand-in teacher")
        save_checkpoint({"stage": "teacher", "key": key, "state_dict": net.state_dict()}, path)
    if world.size > 1:
        dist.barrier()
    saved = load_checkpoint(path, "teacher", "name a teacher.pt of train_vae.py --vf mini with --teacher")
    if saved["key"]["f"] != f:
        fail(f"--teacher {path} has a feature map of stride {saved['key']['f']}, --spec {s.spec} a latent of stride {f}")
    net = MiniTeacher(len(saved["state_dict"]["head.bias"]), f)
    net.load_state_dict(saved["state_dict"])
    return net.to(world.device)


class Run:
    """Everything that one tokenizer training holds: networks, losses, optimizers."""

    def __init__(self, settings, world, foundation, pretrained=True):
        s, device = settings, world.device
        torch.manual_seed(s.seed)                                              # weights: the same on every process
        self.settings, self.foundation = s, foundation
        vae = AutoencoderKL(**SPECS[s.spec])
        self.tokenizer = Tokenizer(vae, foundation.width if foundation is not None else 0).to(device)
        with first_alone(world):
            self.lpips = LPIPS(pretrained).to(device) if s.lpips_weight else None
        self.disc = PatchDiscriminator().to(device) if s.disc_weight else None
        if device.type == "cuda":
            for net in (self.tokenizer, self.lpips, self.disc):
                if net is not None:
                    net.to(memory_format=torch.channels_last)
        if s.compile:
            # Only `features`: the last convolutions stay outside, since Eq. 4 asks for their gradients alone. Their extra backward passes reuse the
            # graph's buffers, which torch.compile would otherwise give away.
            torch._functorch.config.donated_buffer = False
            vae.encoder.features, vae.decoder.features = torch.compile(vae.encoder.features), torch.compile(vae.decoder.features)
        kwargs = dict(lr=s.lr, betas=(0.5, 0.9), fused=device.type == "cuda")  # [Sec. 5.1], betas as in LDM
        self.opt = torch.optim.Adam(self.tokenizer.parameters(), **kwargs)
        self.opt_disc = torch.optim.Adam(self.disc.parameters(), **kwargs) if self.disc is not None else None
        wrap = (lambda net: DistributedDataParallel(net, broadcast_buffers=False)) if world.size > 1 else (lambda net: net)
        self.ddp, self.ddp_disc = wrap(self.tokenizer), wrap(self.disc) if self.disc is not None else None

    def parts(self):
        """Name -> module or optimizer: what a checkpoint holds besides the tokenizer's weights."""
        named = dict(linear_proj=self.tokenizer.linear_proj, optimizer=self.opt, discriminator=self.disc, optimizer_disc=self.opt_disc)
        return {name: part for name, part in named.items() if part is not None}

    def state(self):
        return {"state_dict": self.tokenizer.vae.state_dict(), **{name: part.state_dict() for name, part in self.parts().items()}}

    def load(self, state):
        self.tokenizer.vae.load_state_dict(state["state_dict"])
        for name, part in self.parts().items():
            if isinstance(part, torch.optim.Optimizer):
                load_optimizer(part, state[name], next(self.tokenizer.parameters()).device)
            else:
                part.load_state_dict(state[name])


def build(s, images, world):
    """The Run of these settings, with its foundation model, checked against each other before the first step."""
    f = 2 ** (len(SPECS[s.spec]["ch_mult"]) - 1)
    if s.image_size % f:
        fail(f"--image-size {s.image_size} is not divisible by the downsampling rate {f} of --spec {s.spec}")
    if s.disc_weight and s.image_size < 24:
        fail(f"--image-size {s.image_size} is too small for the discriminator, which needs 24 pixels; use --disc-weight 0 to train without")
    if s.vf != "none" and not (s.mcos or s.mdms):
        fail("--no-mcos --no-mdms leave nothing of VF loss; use --vf none")
    foundation = None
    if s.vf != "none":
        mini = mini_teacher(s, images, f, world) if s.vf == "mini" else None
        with first_alone(world):
            foundation = load_foundation_model(s.vf, (s.image_size // f,) * 2, s.vf_input, mini).to(world.device)
    run = Run(s, world, foundation)
    if s.init:
        spec, weights = read_released_tokenizer(s.init)
        if spec != SPECS[s.spec]:
            fail(f"--init {s.init} holds a tokenizer of another spec than --spec {s.spec}")
        run.tokenizer.vae.load_state_dict(weights)
    return run


@torch.no_grad()
def save_reconstructions(vae, images, path, device, n=8):
    """Side by side: test images above, their reconstructions (posterior mode) below. Returns the PSNR over these images in dB."""
    n = min(n, len(images))
    picks = torch.linspace(0, len(images) - 1, 2 * n if len(images) >= 2 * n else n).long().tolist()   # whole rows only
    x = torch.stack([to_float(images[i]) for i in picks]).to(device)           # (2n or n, 3, S, S)
    x_hat = torch.cat([vae.decode(vae.encode(x[i:i + 4]).mode()) for i in range(0, len(x), 4)]).clamp(-1, 1)
    rows = [part for i in range(0, len(x), n) for part in (x[i:i + n], x_hat[i:i + n])]
    save_grid(torch.cat(rows), path, n)
    return (10 * torch.log10(4 / ((x - x_hat) ** 2).mean((1, 2, 3)))).mean().item()


def train(s, world):
    """The loop: every step is a function of (settings, step), so a run that is killed and resumed is the run that was not (on a CPU bit for bit)."""
    path, part = Path(s.out) / "vae.pt", share(world, s.batch_size)
    state = resume(path, "vae", s, world)
    if state and state["step"] == state["total_steps"]:
        return print(f"{path} is finished ({state['step']} steps); --fresh starts over, another --out keeps it")
    with first_alone(world):
        images, test = (Images(s.data, split, s.image_size) for split in ("train", "test"))
    stages = schedule(s, len(images))
    total, step = sum(stage.steps for stage in stages), state["step"] if state else 0
    run = build(s, images, world)
    if state:
        run.load(state)
    vae, finite, stop = run.tokenizer.vae, Finite(world.device), Stop(world)
    metrics = Metrics(Path(s.out) / "metrics_vae.csv", world, step)
    latent = (vae.embed_dim, s.image_size // vae.f, s.image_size // vae.f)

    def save():
        finite.check(path, "try a smaller --lr, or --precision fp32", list(run.tokenizer.parameters()))
        if world.rank == 0:
            save_checkpoint({"stage": "vae", "step": step, "total_steps": total, "settings": asdict(s), "spec": SPECS[s.spec],
                             "classes": images.classes, "num_classes": len(images.classes), **run.state()}, path)

    if world.rank == 0:
        print(f"{s.spec} on {s.data} ({len(images)} images of {s.image_size}x{s.image_size}), VF loss {s.vf}, {world.device} x {world.size}: "
              f"{total} steps of {s.batch_size} = {total * s.batch_size / len(images):.1f} epochs; from step {step}")
    batches = loader(ImageBatches(images, s.batch_size, s.seed, part), step, total, 0 if images.memory is not None else s.workers, world.device)
    bar = tqdm(batches, initial=step, total=total, desc="tokenizer", unit="step", disable=world.rank > 0)
    clock, clock_step, ends = time.time(), step, np.cumsum([stage.steps for stage in stages])
    for x in bar:
        k = int(np.searchsorted(ends, step, side="right"))                     # the stage, and the batch within it
        for optimizer in filter(None, (run.opt, run.opt_disc)):
            optimizer.param_groups[0]["lr"] = s.lr * min(1.0, (step + 1) / max(1, s.warmup))
        x = to_float(x.to(world.device, non_blocking=True))                    # (b, 3, S, S) in [-1, 1]
        noise = torch.randn(s.batch_size, *latent, device=world.device, generator=step_generator(world.device, s.seed, "noise", step))[part]
        terms, posterior = train_step(run, x, noise, stages[k], step - (ends[k] - stages[k].steps))
        step += 1
        finite.watch(step, **terms)
        now = step % s.log_every == 0 or step == total
        if now:
            finite.check(path, "try a smaller --lr, or --precision fp32")
            values = {**terms, **posterior_health(*posterior)}
            numbers = average(world, torch.stack([v.float() for v in values.values()])).tolist()
            speed, clock, clock_step = s.batch_size * (step - clock_step) / (time.time() - clock), time.time(), step
            log = dict.fromkeys(("rec", "l1", "kl", "g", "d", "w_disc", "mcos", "mdms", "w_vf"), 0.0) | dict(zip(values, numbers))
            metrics.write(step, epoch=step * s.batch_size / len(images), stage=k + 1, **log, images_per_s=speed, memory_gib=peak_memory(world.device))
            bar.set_postfix(rec=f"{log['rec']:.0f}", l1=f"{log['l1']:.3f}", vf=f"{log['mcos'] + log['mdms']:.3f}", img_s=f"{speed:.0f}")
        if stop.agreed(now) and step < total:
            save()
            return print(f"\nstopped after step {step} and saved {path}; the same command goes on from there") if world.rank == 0 else None
        if step % s.save_every == 0 or step == total:
            save()
    if world.rank == 0:
        psnr = save_reconstructions(vae.eval(), test, Path(s.out) / "reconstructions.png", world.device)
        print(f"saved {path} and {s.out}/reconstructions.png (test images and what is left of them, {psnr:.2f} dB); "
              f"peak memory {peak_memory(world.device):.2f} GiB. Next: python train_dit.py")


# --- What it costs ------------------------------------------------------------------------------------------------------------------------------------
def dinov2_shaped(image_size, f):
    """torchvision's ViT in DINOv2-L/14's shape with random weights: the same work, nothing to download. For --flops and --bench only."""
    side = image_size // f * 14
    vit = torchvision.models.VisionTransformer(side, 14, num_layers=24, num_heads=16, hidden_dim=1024, mlp_dim=4096)

    def tokens(net, x):
        h = net._process_input(x)                                              # (B, N, 1024)
        h = net.encoder(torch.cat([net.class_token.expand(len(h), -1, -1), h], dim=1))
        return to_map(h[:, 1:], x, 14)
    return FoundationModel(vit, tokens, 1024, 14, (0.5,) * 3, (0.5,) * 3)


def flops(s):
    """[Table A4] GFLOPs an image at 256x256, counted by torch on meta tensors: no weights, no GPU.

    The convention that gives the paper's numbers: a multiply-add is two operations; convolutions and matrix products only; training = 3 x inference
    of the tokenizer (forward, and backward with respect to inputs and weights); VA-VAE adds one forward pass of DINOv2-L/14 at 224x224.
    LPIPS, the discriminator and Eq. 4's extra pass through the decoder are in neither of the paper's training rows; --bench times them all.
    """
    from torch.utils.flop_counter import FlopCounterMode
    spec, size = SPECS["f16d32"], 256
    with torch.device("meta"):
        vae, teacher, x = AutoencoderKL(**spec), dinov2_shaped(size, 16), torch.zeros(1, 3, size, size)
        counts = []
        for work in (lambda: vae(x), lambda: teacher(x, (16, 16))):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                work()
            counts.append(counter.get_total_flops() / 1e9)
    inference, foundation = counts
    print("Table A4, f16d32 at 256x256, GFLOPs an image    ours   paper")
    for name, ours, paper in (("inference (encode + decode)", inference, 390), ("training, LDM = 3 x inference", 3 * inference, 1170),
                              ("training, VA-VAE = LDM + DINOv2-L forward", 3 * inference + foundation, 1325)):
        print(f"{name:45s} {ours:7.1f} {paper:7d}")


def bench(s, world, steps=10):
    """Median time of a training step on synthetic images, without and with VF loss, and what VF loss adds (the paper: +13 % FLOPs [Table A4])."""
    f = 2 ** (len(SPECS[s.spec]["ch_mult"]) - 1)
    part, times = share(world, s.batch_size), {}
    x = to_float(torch.randint(256, (s.batch_size, 3, s.image_size, s.image_size), dtype=torch.uint8)[part].to(world.device))
    noise = torch.randn(len(x), SPECS[s.spec]["embed_dim"], s.image_size // f, s.image_size // f, device=world.device)
    for vf in ("none", s.vf)[:1 if s.vf == "none" else 2]:
        foundation = None
        if vf != "none":
            net = MiniTeacher(10, f)
            foundation = (load_foundation_model("mini", mini=net) if vf == "mini" else dinov2_shaped(s.image_size, f)).to(world.device)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run, marks = Run(s, world, foundation, pretrained=False), []
        for _ in tqdm(range(steps + 3), desc=f"bench, VF loss {vf}", unit="step", disable=world.rank > 0):
            train_step(run, x, noise, Stage(1, s.vf_weight, s.cos_margin, s.mdms_margin, 0), 0)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
        times[vf] = float(np.median(np.diff(marks)[2:]))                       # the first steps compile and choose algorithms
        if world.rank == 0:
            print(f"VF loss {vf:8s} {times[vf] * 1e3:9.1f} ms a step, {s.batch_size / times[vf]:8.1f} images/s, peak memory {peak_memory(world.device):.2f} GiB")
        del run                                                                # or its memory would count as the next one's
    if world.rank == 0 and s.vf != "none":
        print(f"VF loss adds {100 * (times[s.vf] / times['none'] - 1):.1f} % to the step ({s.spec}, {s.image_size}x{s.image_size}, batch {s.batch_size}, "
              f"{s.precision}, compile {s.compile}, {torch.cuda.get_device_name() if world.device.type == 'cuda' else 'CPU'} x {world.size}; medians of {steps})")


def run_script(cls, presets, doc, work):
    """Parse, set up, work, and turn what the user can mend into one line: bad images, a batch too big for memory, a size that does not fit."""
    settings = parse_settings(cls, presets, doc)
    if settings.device == "cpu" and "--compile" not in sys.argv and hasattr(settings, "compile"):
        settings.compile = False                                               # a CPU compiles only when asked, on a machine with a GPU too
    try:
        work(settings, setup(settings.device))
    except torch.cuda.OutOfMemoryError:
        fail(f"--batch-size {settings.batch_size} is too big for the GPU's memory; use a smaller one or more processes"
             + (", --accumulate or --checkpointing" if hasattr(settings, "accumulate") else ""))
    except DataError as error:                                                 # from a loading process it comes with that process's traceback
        fail(str(error).strip().splitlines()[-1].removeprefix("train_vae.").removeprefix("__main__.").removeprefix("DataError: "))
    except ValueError as error:
        fail(str(error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(settings, world):
    if settings.flops:
        flops(settings)
    elif settings.bench:
        bench(settings, world)
    else:
        train(settings, world)


if __name__ == "__main__":
    run_script(Settings, PRESETS, __doc__, main)
