"""Training LightningDiT on the latents of a tokenizer.

Paper: arXiv 2501.01423, Sec. 4 and Table 1 (training strategies), Sec. 5.1 (latents), Sec. 5.4 (800 epochs).
Read it top to bottom: Settings; LADDER, Table 1 as presets, and the paper's systems; sample_time and
flow_matching_loss; ddpm_loss, where Table 1 starts; Run.step and train, the loop. Below the banner: extract
and Latents, by which images become latents on disk that are read at random.
Convention (the authors'): t = 0 is noise, t = 1 is data, x_t = t x1 + (1 - t) x0, v = x1 - x0.

    python train_dit.py                          preset mini, on runs/mini/vae.pt
    torchrun --nproc_per_node=8 train_dit.py --preset lightningdit-xl-64ep --vae VAE --data DIR
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is loading: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# Before torch is loaded: a waiting CPU thread spins for a moment, then sleeps (see train_vae.py).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dit import SIZES, LightningDiT, read_released_dit
from train_vae import Log, Stop, loader, opt, peak_memory, resume, save_checkpoint, step_generator
from vae import SPECS, autocast, load_weights


@dataclass
class Settings:
    # The defaults are preset imagenet256: LightningDiT-XL/1 on VA-VAE f16d32 for 64 epochs [Sec. 4, 5.4].
    # Each setting is a flag; what stands beside or below it is its text in --help.
    preset: str = opt("imagenet256", same=False)  # named settings; every other flag overrides one of them
    # --- latents [Sec. 5.1]: "We pre-extract all latent features". SD-VAE's 0.18215 is LDM's: 1 / std of its
    # latents, one number for all channels. VA-VAE's get the mean and std of each channel (the authors' code).
    vae: str = opt("", same=False)  # tokenizer, ours or the authors'; default OUT/vae.pt
    unfinished: bool = opt(False, same=False)  # take a tokenizer whose training is not finished
    tokenizer_spec: str = opt("", choices=("", *SPECS))  # refuse a tokenizer of another spec; empty: any
    data: str = opt("", same=False)  # images, as in train_vae.py; default: those of the tokenizer
    image_size: int = opt(0, "[0, 8192]")  # side of the images; 0: as in the tokenizer's training
    latents: str = opt("", same=False)
        # folder of latents, made if it is not there, or one of the authors'; default: beside the tokenizer
    latent_norm: str = opt("channel", choices=("channel", "sd-vae"))  # mean and std, or times 0.18215
    extract_batch: int = opt(64, "[1, 1e5]", same=False)  # images encoded at once, in each process
    # --- network: Table 1's architecture rows [Sec. 4]; qknorm and no shift are options of the authors' code.
    # Dropping 0.1 of the labels is DiT's, from the authors of guidance; the paper gives no reason.
    size: str = opt("XL", choices=tuple(SIZES))  # depth and width
    # patch size 1: "all compression steps are handled by the VAE" [Sec. 5.1]
    patch_size: int = opt(1, "[1, inf)")  # latent pixels a token on each side
    swiglu: bool = True  # SwiGLU FFN instead of GELU
    rmsnorm: bool = True  # RMS Norm instead of LayerNorm
    rope: bool = True  # rotary position embedding
    qknorm: bool = False  # normalise q and k: against NaN late in training
    shift: bool = True  # adaLN with shifts; --no-shift is the authors' wo_shift
    class_dropout: float = opt(0.1, "[0, 1]")  # share of labels that become the null class, for guidance
    init: str = ""  # start from these weights: the authors' LightningDiT, or ours (EMA first)
    # --- training strategies [Sec. 4]. Large batch and beta2 are AuraFlow's: PyTorch's 0.999 remembers the
    # gradients' sizes for 1,000 steps, 0.95 for 20. A constant rate, no warm-up, no weight decay, first beta
    # 0.9 and EMA 0.9999 are DiT's; the paper gives no reason. adaLN-Zero starts gently by itself. EMA is the
    # mean of some 10,000 steps: at a constant rate the weights never settle, but their mean does.
    objective: str = opt("flow", choices=("flow", "ddpm"))  # rectified flow, or DiT's noise prediction
    lognorm: bool = True  # logit-normal time sampling instead of uniform
    uniform_from_epoch: float = 0.0  # epoch from which time is uniform [Sec. 5.4: 480 of 800]; 0: never
    direction_loss: bool = True  # add the velocity direction loss
    batch_size: int = opt(1024, "[1, 1e5]")  # latents a step, over all processes and accumulation steps
    lr: float = opt(2e-4, "(0, inf)")  # learning rate of AdamW, constant
    beta2: float = opt(0.95, "[0, 1)")  # second beta of AdamW
    grad_clip: float = 0.0
        # clip the gradient's norm to this; 0: off, it "tends to reduce performance when combined" [Sec. 4]
    ema: float = opt(0.9999, "[0, 1)")  # decay of the moving average of the weights, a step
    epochs: float = opt(64.0, "(0, 1e6]")  # passes over the latents
    steps: int = 0  # training steps; 0: as many as the epochs make
    # --- how it runs: only seed and precision change what is learned
    seed: int = opt(0, "[0, 9e18]")  # of weights, posterior samples, order, noise and time
    out: str = opt("", same=False)  # folder of the run; default runs/PRESET
    device: str = opt("auto", choices=("auto", "cuda", "cpu"), same=False)  # auto: CUDA if there is one
    precision: str = opt("auto", choices=("auto", "bf16", "fp32"))  # bf16: autocast; auto: bf16 on CUDA
    compile: bool = opt(torch.cuda.is_available(), same=False)  # torch.compile the model
    accumulate: int = opt(1, "[1, inf)", same=False)  # split each process's batch into so many parts
    checkpointing: bool = opt(False, same=False)  # recompute activations: less memory, a third more time
    workers: int = opt(4, "[0, 512]", same=False)  # loading processes of each training process
    log_every: int = opt(100, "[1, inf)", same=False)  # steps between lines of metrics_dit.csv
    save_every: int = opt(5000, "[1, inf)", same=False)  # steps between checkpoints
    keep_every: int = opt(0, same=False)  # steps between copies OUT/dit-STEP.pt that are kept; 0: none
    sample_every: int = opt(5000, same=False)  # steps between pictures progress.png of the EMA; 0: none
    fresh: bool = opt(False, same=False)  # start over instead of resuming; latents are kept

# [Table 1] The trick and what it changes; every row keeps the changes above it. Rows 1 to 5 are training, in
# this file; rows 6 to 8 are the network, in dit.py. So row 5 adds a loss; row 6 changes no training, only the
# feed-forward network. f8 in tokens of 2x2 and row 9's f16 in tokens of 1 are both 16x16 tokens: equal cost.
# 80 epochs are 400,000 steps of 256 or 100,000 of 1024. Beside a row: the paper's FID-50k, without guidance.
LADDER = [
    ("DiT-XL/2", {  # row 0: 19.50
        "tokenizer_spec": "f8d4", "latent_norm": "sd-vae", "patch_size": 2, "swiglu": False, "rmsnorm": False,
        "rope": False, "objective": "ddpm", "lognorm": False, "direction_loss": False, "batch_size": 256,
        "lr": 1e-4, "beta2": 0.999, "epochs": 80.0}),
    ("+ Rectified Flow", {"objective": "flow"}),  # row 1: 17.20
    ("+ batchsize x 4 & lr x 2", {"batch_size": 1024, "lr": 2e-4}),  # row 2: 16.59
    ("+ AdamW beta2 = 0.95", {"beta2": 0.95}),  # row 3: 16.61
    ("+ Logit Normal Sampling", {"lognorm": True}),  # row 4: 13.99
    ("+ Velocity Direction Loss", {"direction_loss": True}),  # row 5: 12.52
    ("+ SwiGLU FFN", {"swiglu": True}),  # row 6: 10.10
    ("+ RMS Norm", {"rmsnorm": True}),  # row 7: 9.25
    ("+ Rotary Pos Embed", {"rope": True}),  # row 8: 7.13
    ("+ patch size = 1 & VA-VAE",  # row 9: 4.29
     {"patch_size": 1, "tokenizer_spec": "f16d32", "latent_norm": "channel"}),
]
# Ours, for two CPU cores: 8x8 latents in 16 tokens of 2x2, a quarter of the work of patch size 1. A short run
# wants a higher rate and a shorter memory of the EMA.
MINI = {"size": "mini-S", "patch_size": 2, "batch_size": 32, "lr": 2e-3, "ema": 0.998, "steps": 3000,
        "workers": 0, "log_every": 50, "save_every": 1000, "sample_every": 1000}
PRESETS = {
    "mini": MINI,
    "imagenet256": {},
    "lightningdit-xl-64ep": {},  # [Table 3] gFID 5.14, with guidance 2.11; 80,073 steps
    "lightningdit-xl-800ep": {"epochs": 800.0, "uniform_from_epoch": 480.0},  # 2.17, 1.35; 1,000,912 steps
    "lightningdit-b": {"size": "B", "epochs": 160.0},  # [Table 2] FID-10K 15.82 on f16d32 (DINOv2)
    "lightningdit-l": {"size": "L", "epochs": 80.0},  # 9.82
    "lightningdit-xl": {"size": "XL", "epochs": 80.0},  # 8.22
    "lightningdit-1.0b": {"size": "1.0B", "epochs": 80.0},  # [Fig. 4c], which prints no numbers
    "lightningdit-1.6b": {"size": "1.6B", "epochs": 80.0},
}
row = {}
for i, (_, change) in enumerate(LADDER):
    row = row | change
    # the ladder in miniature: its steps in batch size and rate are the paper's; --vae names the tokenizer
    mini = {"batch_size": row["batch_size"] // 32, "lr": 10 * row["lr"], "epochs": 8.0, "steps": 0,
            "tokenizer_spec": "", "latent_norm": "channel"}
    PRESETS |= {f"table1-{i}": row, f"mini-table1-{i}": MINI | row | mini}

def sample_time(n, lognorm, generator, device):
    """How many -> times (n,) in (0, 1), logit-normal or uniform."""
    if lognorm:
        # [Table 1, + Logit Normal Sampling] t = sigmoid(u), u ~ N(0, 1): more training in the middle. At the
        # ends the best answer is easy: x1 less the mean noise, or the mean image less x0. Mean, std: SD3's.
        return torch.sigmoid(torch.randn(n, device=device, generator=generator))
    return torch.rand(n, device=device, generator=generator)

def flow_matching_loss(model, x1, y, t, x0, drop=None, direction=True):
    """Rectified flow -> (loss, {"mse": (B,), "direction": (B,)}), the two terms for each latent.
    model(x, t, y, drop) -> velocity. x1 (B, C, H, W): normalised latents. y (B,): labels. t (B,) in [0, 1].
    x0: noise, like x1. drop (B,) bool: labels to drop. direction: add the second term to the loss."""
    t_ = t.view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    # [Table 1, + Rectified Flow] x_t = t x1 + (1 - t) x0: a straight line from noise to data ...
    x_t = t_ * x1 + (1 - t_) * x0
    # ... on which the velocity v = dx_t / dt = x1 - x0 is the same all along: few steps follow it well
    v = x1 - x0
    pred = model(x_t, t, y, drop).float()  # (B, C, H, W); under bf16, too, the losses are fp32
    # L_mse = mean (pred - v)^2
    mse = ((pred - v) ** 2).mean((1, 2, 3))  # (B,)
    # [Table 1, + Velocity Direction Loss] L_dir = mean (1 - cos(pred, v)), the cosine over channels:
    # L_mse hardly sees the direction of a short v (FasterDiT). Weight 1: the paper gives no reason.
    cosine = F.cosine_similarity(pred, v, dim=1)  # (B, H, W)
    terms = {"mse": mse, "direction": (1 - cosine).mean((1, 2))}
    return mse.mean() + (terms["direction"].mean() if direction else 0.0), terms

# DDPM's and DiT's number of noise levels
DDPM_STEPS = 1000

def ddpm_alphas(device):
    """alpha_bar (1000,) float64 of DDPM's linear schedule; index 0 is the least noise."""
    # beta goes from 1e-4 to 0.02 (DDPM, DiT); alpha_bar_k = prod_{i <= k} (1 - beta_i)
    beta = torch.linspace(1e-4, 0.02, DDPM_STEPS, dtype=torch.float64, device=device)
    return torch.cumprod(1 - beta, 0)

def ddpm_loss(model, x1, y, t, x0, drop=None):
    """The original DiT's noise prediction [Table 1, row 0], without its learned variance: the paper samples
    every row with dopri5 [Sec. 4], and an ODE has no variance (ours; the paper does not say).
    In and out as in flow_matching_loss; there is no velocity here, so the direction term is 0."""
    # our t = 1 is data, DDPM's step 0: k = floor(1000 (1 - t))
    k = (DDPM_STEPS * (1 - t)).long().clamp(0, DDPM_STEPS - 1)  # (B,)
    a = ddpm_alphas(x1.device)[k].float().view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    # L = mean (x0 - model(sqrt(a) x1 + sqrt(1 - a) x0))^2; DiT tells the network k itself, 0 to 999
    pred = model(a.sqrt() * x1 + (1 - a).sqrt() * x0, k.float(), y, drop).float()
    mse = ((pred - x0) ** 2).mean((1, 2, 3))  # (B,)
    return mse.mean(), {"mse": mse, "direction": torch.zeros_like(mse)}

def ddpm_velocity(model):
    """Noise predictor -> rectified flow's velocity (x, t, y), so that one sampler serves both.
    DDPM's sqrt(a) x1 + sqrt(1 - a) x0, divided by sqrt(a) + sqrt(1 - a), lies on the straight line from x0 to
    x1, at t = sqrt(a) / (sqrt(a) + sqrt(1 - a)): the same noisy latent on another scale."""
    def velocity(x, t, y):
        a = ddpm_alphas(x.device)
        grid = (a.sqrt() / (a.sqrt() + (1 - a).sqrt())).flip(0)  # (1000,) t of each step, rising
        # the schedule ends short of pure noise and of pure data
        t = t.double().clamp(grid[0], grid[-1])
        # which step has this t: between two of them, a fraction
        right = torch.searchsorted(grid, t).clamp(1, DDPM_STEPS - 1)
        position = (right - 1) + (t - grid[right - 1]) / (grid[right] - grid[right - 1])
        k = (DDPM_STEPS - 1 - position).float()  # (B,)
        # back to DDPM's scale: sqrt(a) + sqrt(1 - a) = 1 / sqrt(t^2 + (1 - t)^2)
        scale = (t ** 2 + (1 - t) ** 2).rsqrt().float().view(-1, 1, 1, 1)
        eps = model(x * scale, k, y).float()
        # x = t x1 + (1 - t) eps, so v = x1 - eps = (x - eps) / t
        return (x - eps) / t.float().view(-1, 1, 1, 1)
    return velocity

def update_ema(averages, weights, decay):
    """Two lists of tensors: each average moves towards its weight, in place, without gradient."""
    with torch.no_grad():
        # ema <- decay ema + (1 - decay) weights = ema + (1 - decay) (weights - ema), all tensors in one sweep
        torch._foreach_lerp_(averages, weights, 1 - decay)

class Run:
    """model; ema, its average, which is sampled from; opt; net, the model as training calls it (compiled, and
    exchanging gradients). The names of weights in a checkpoint are model's: nothing of net is in them."""
    def __init__(self, s, arch, world):
        # the same weights in every process
        torch.manual_seed(s.seed)
        self.settings, self.world = s, world
        self.model = LightningDiT(**arch).to(world.device)
        if s.init:
            load_weights(self.model, read_released_dit(s.init), s.init)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.model.checkpointing = s.checkpointing
        self.bf16 = s.precision == "bf16" or (s.precision == "auto" and world.device.type == "cuda")
        # all but the fixed positions
        pairs = zip(self.model.parameters(), self.ema.parameters())
        self.params, self.averages = zip(*[(p, e) for p, e in pairs if p.requires_grad])
        # [Table 1, + AdamW beta2 = 0.95]
        self.opt = torch.optim.AdamW(self.params, s.lr, betas=(0.9, s.beta2), weight_decay=0.0, fused=True)
        self.ddp = world.parallel(self.model)
        if s.compile and s.checkpointing:
            # torch.compile would cut the graph at DDP's buckets, and a checkpointed block cannot be cut
            torch._dynamo.config.optimize_ddp = False
        # [Sec. 4] "torch.compile and bfloat16 training"
        self.net = torch.compile(self.ddp) if s.compile else self.ddp

    def step(self, x1, y, t, x0, drop, want_norm):
        """This process's batch, (b, ...) each -> the loss's terms (b,), and the gradient's norm or None. One
        step of AdamW and of the EMA. Nothing here waits for the GPU."""
        s, found = self.settings, []
        self.opt.zero_grad()
        parts = zip(*(v.chunk(s.accumulate) for v in (x1, y, t, x0, drop)))
        for i, part in enumerate(parts, 1):
            # processes exchange gradients only once, with the last part: what DDP's no_sync sets
            self.ddp.require_backward_grad_sync = i == s.accumulate
            with autocast(x1, self.bf16):
                if s.objective == "flow":
                    loss, terms = flow_matching_loss(self.net, *part, s.direction_loss)
                else:
                    loss, terms = ddpm_loss(self.net, *part)
            (loss / s.accumulate).backward()
            found.append({name: v.detach() for name, v in terms.items()})
        norm = None
        # a sweep over all gradients: only where it is used or logged
        if s.grad_clip or want_norm:
            norm = torch.nn.utils.clip_grad_norm_(self.params, s.grad_clip or math.inf)
        self.opt.step()
        update_ema(self.averages, self.params, s.ema)
        return {name: torch.cat([terms[name] for terms in found]) for name in found[0]}, norm

def draw(s, step, epoch, shape, device):
    """Step, from 0 -> t (B,), noise x0 (B, *shape) and dropped labels (B,) bool of its whole batch.
    A function of (seed, step), as the choice of the latents is. So a resumed run needs no random state to be
    exact, and each of several processes takes its share of what one alone would draw."""
    g = step_generator(device, s.seed, "train", step)
    # [Sec. 5.4] "at 480 epochs, we disable the lognorm parameter to enable the near-converged network to
    # learn more effectively across all noise intervals"
    uniform = s.uniform_from_epoch and epoch >= s.uniform_from_epoch
    t = sample_time(s.batch_size, s.lognorm and not uniform, g, device)
    drop = torch.rand(s.batch_size, device=device, generator=g) < s.class_dropout
    return t, torch.randn(s.batch_size, *shape, device=device, generator=g), drop

def train(s, world):
    """The loop. A run that is killed and resumed ends as the one that was not; on a CPU bit for bit."""
    path, part, device = Path(s.out) / "dit.pt", world.share(s.batch_size, s.accumulate), world.device
    state = resume(path, "dit", s)
    if state and state["step"] == state["total_steps"]:
        return world.print(f"{path} is finished ({state['step']} steps); --fresh starts over, another --out "
                           "keeps it")
    run, latents, vae, facts, step, bins = begin(s, world, state, path)
    del state
    n, total = len(latents.labels), facts["total_steps"]
    mean, std = latents.mean.to(device), latents.std.to(device)  # (1, d, 1, 1)
    log, stop = Log(Path(s.out) / "metrics_dit.csv", world, step, s.batch_size), Stop(world)
    advice = "ways out: --qknorm, --grad-clip 1, a smaller --lr"

    def save(to):
        # a checkpoint with NaN in it would replace the last good one
        log.check(path, advice, run.params)
        # what a log line has gathered when the run stops: it goes on as if there had been no stop
        kept = {"step": step, "bins": world.mean(bins.clone()).cpu()}
        if world.rank == 0:
            parts = {"model": run.model, "ema": run.ema, "optimizer": run.opt}
            save_checkpoint(facts | kept | {name: part.state_dict() for name, part in parts.items()}, to)

    batches = loader(LatentBatches(latents, s.batch_size, s.seed, part), s.workers, device, batch_size=None,
                     sampler=range(step, total))
    bar = tqdm(batches, "LightningDiT", total, initial=step, unit="step", disable=world.rank > 0)
    for z, y in bar:
        # normalised latent x1 = (z - mean) / std: data on the scale of the noise
        x1 = (z.to(device, non_blocking=True).float() - mean) / std  # (b, d, h, w)
        y = y.to(device, non_blocking=True)  # (b,)
        t, x0, drop = (v[part] for v in draw(s, step, step * s.batch_size / n, latents.shape, device))
        logging = (step + 1) % s.log_every == 0 or step + 1 == total
        terms, norm = run.step(x1, y, t, x0, drop, logging)
        step += 1  # from here on: steps done
        loss = terms["mse"] + (terms["direction"] if s.direction_loss else 0)  # (b,)
        log.watch(step, {"loss": loss.mean()})
        # the mean hides where in the flow the loss falls: also by t in [0, .2), [.2, .4), ...
        bins.index_add_(1, (t * BINS).long().clamp(max=BINS - 1), torch.stack([loss, torch.ones_like(loss)]))
        if logging:
            log.check(path, advice)
            values = {"epoch": step * s.batch_size / n, "loss": loss.mean(), "mse": terms["mse"].mean(),
                      "direction": terms["direction"].mean(), "grad_norm": norm}
            values = log.write(step, values | by_time(world.mean(bins)) | {"lr": s.lr})
            bins.zero_()
            bar.set_postfix(loss=f"{values['loss']:.3f}", mse=f"{values['mse']:.3f}")
        if s.keep_every and step % s.keep_every == 0:
            save(Path(s.out) / f"dit-{step}.pt")
        stopping = stop.agreed() and step < total
        # before the save, after which this step is not done again
        if world.rank == 0 and (step == total or (s.sample_every and step % s.sample_every == 0)):
            preview(run, vae, latents, Path(s.out) / "progress.png")
        if stopping or step % s.save_every == 0 or step == total:
            save(path)
        if stopping:
            stop.leave(f"stopped after step {step} and saved {path}; the same command goes on from there")
    world.print(f"saved {path} and {s.out}/progress.png; peak memory {peak_memory(device):.2f} GiB. "
                "Next: python sample.py")

# === Plumbing: nothing of the paper below this line ===
import numpy as np
from torch.utils.data import Dataset

from train_vae import batch_indices, load_optimizer, run_script, save_grid, to_float
from vae import fingerprint, load_tokenizer, reading, require, torch_load

BINS = 5

def by_time(bins):
    """bins (2, BINS), sums of losses and numbers of latents -> {column: mean loss, NaN if there is none}."""
    return {f"loss_t{i / BINS:.1f}": mean for i, mean in enumerate(bins[0] / bins[1])}

def architecture(s, shape, num_classes):
    """Settings, (d, h, w) of a latent, number of classes -> keyword arguments of LightningDiT."""
    require(shape[1] % s.patch_size == 0,
            f"--patch-size {s.patch_size} does not divide latents of {shape[1]}x{shape[2]}")
    return {"input_size": shape[1], "patch_size": s.patch_size, "in_channels": shape[0],
            "num_classes": num_classes, "class_dropout_prob": s.class_dropout, "use_qknorm": s.qknorm,
            "use_swiglu": s.swiglu, "use_rope": s.rope, "use_rmsnorm": s.rmsnorm, "wo_shift": not s.shift,
            **SIZES[s.size]}

def begin(s, world, state, path):
    """Settings, a checkpoint's state or None -> Run; latents; tokenizer; what a checkpoint tells beside its
    weights, so that sample.py asks for nothing; the steps done; the loss by time since the log's last line.
    UserError if the checkpoint's latents were others."""
    latents, vae = open_latents(s, world)
    n, shape, classes, meta = len(latents.labels), latents.shape, latents.classes, latents.meta
    if s.latent_norm == "sd-vae":
        # LDM's z * 0.18215 in the form of (z - mean) / std: no mean is taken away
        latents.mean, latents.std = latents.mean * 0, torch.full_like(latents.std, 1 / 0.18215)
    total = s.steps or max(1, round(s.epochs * n / s.batch_size))
    facts = {
        "stage": "dit", "total_steps": total, "settings": asdict(s), "objective": s.objective,
        "arch": architecture(s, shape, len(classes)), "classes": classes, "image_size": meta["image_size"],
        "data": meta["data"], "identity": meta["identity"],
        "latents": {"mean": latents.mean, "std": latents.std, "shape": list(shape)},
        "tokenizer": {"fingerprint": meta["fingerprint"], "path": s.vae}}
    run, step, bins = Run(s, facts["arch"], world), 0, torch.zeros(2, BINS, device=world.device)
    if state:
        with reading(path):
            same = state["tokenizer"]["fingerprint"] == meta["fingerprint"]
            require(same and (state["identity"], state["total_steps"]) == (meta["identity"], total),
                    f"{path} was trained on latents of another tokenizer or other images than {s.vae} and "
                    f"{s.latents}: name those with --vae and --latents, or start over with --fresh")
            load_weights(run.model, state["model"], path)
            load_weights(run.ema, state["ema"], path)
            load_optimizer(run.opt, state["optimizer"], path)
            step, bins = state["step"], bins + state["bins"].to(world.device)
    size, images = sum(p.numel() for p in run.model.parameters()) / 1e6, total * s.batch_size
    world.print(f"LightningDiT {s.size}/{s.patch_size}, {size:.2f} M parameters, on {n} latents {shape} of "
                f"{len(classes)} classes, {world.device} x {world.size}: {total} steps of {s.batch_size} = "
                f"{images / n:.1f} epochs = {images:,} images; from step {step}")
    return run, latents, vae, facts, step, bins

@torch.no_grad()
def preview(run, vae, latents, path, columns=4, steps=25, guidance=2.0):
    """A PNG of what the EMA draws: the first 8 classes, a row each, from the same noise every time, so that
    one sees it learn. Euler's method with guidance, as in sample.py."""
    s, model, device = run.settings, run.ema, run.world.device
    velocity = model if s.objective == "flow" else ddpm_velocity(model)
    y = torch.arange(min(8, model.num_classes), device=device).repeat_interleave(columns)  # (B,)
    x = torch.randn(len(y), *latents.shape, generator=step_generator("cpu", s.seed, "preview")).to(device)
    grid = torch.linspace(0, 1, steps + 1, device=device)
    for t, dt in zip(grid.expand(len(y), -1).T, grid.diff()):  # t (B,)
        with autocast(x, run.bf16):
            v = velocity(x, t, y).float()
            if s.class_dropout > 0:  # else there is no null class
                # v = v_null + w (v_class - v_null)
                v_null = velocity(x, t, torch.full_like(y, model.num_classes)).float()
                v = v_null + guidance * (v - v_null)
        x = x + dt * v
    z = x * latents.std.to(device) + latents.mean.to(device)
    save_grid(torch.cat([vae.decode(part) for part in z.split(columns)]), path, columns)

# --- Latents on disk -------------------------------------------------------------------------------
from train_vae import DiskArrays, Images, read_json, write_json


def extract(s, world, vae, images, key, folder):
    """Encode the images, plain and flipped, into `folder`; chunks that are there already are kept.
    latents.npy (N, 2, d, h, w) float16: [i, 0] plain, [i, 1] flipped, each a SAMPLE of the posterior, not its
    mean: what the decoder was trained on (the authors' code). labels.npy (N,) int64. latents.json, written
    last, so that it says "finished": whose latents these are, and their statistics. The noise is a function
    of (seed, chunk): neither a kill nor the number of processes changes a bit (on a CPU)."""
    key, shape, device = key | {"seed": s.seed}, key["shape"], world.device
    # float16: rounding moves a latent by 2e-4 of its std, the posterior's own noise by far more, and
    # ImageNet's 2 x 1,281,167 latents of f16d32 take 42 GB instead of 84
    arrays = {"latents": ((2, *shape), np.float16), "labels": ((), np.int64)}
    disk = DiskArrays(folder, len(images), s.extract_batch, arrays, key, world)
    todo = disk.missing()
    # loading processes decode images while the GPU encodes
    work = loader(images, s.workers, device, batch_sampler=[range(*chunk) for chunk in todo])
    for (start, stop), x in zip(todo, tqdm(work, f"latents to {folder}", len(todo), disable=world.rank > 0)):
        x = to_float(x.to(device))  # (b, 3, S, S)
        g = step_generator("cpu", s.seed, "posterior", start // s.extract_batch)
        # drawn on the CPU, so that it is the same for any device
        noise = torch.randn(2, len(x), *shape, generator=g).to(device)
        with torch.inference_mode():
            views = [vae.encode(x).sample(noise[0]), vae.encode(x.flip(3)).sample(noise[1])]
        z = torch.stack(views, dim=1).cpu()  # (b, 2, d, h, w)
        require(z.abs().max() < np.finfo(np.float16).max,
                f"the tokenizer {s.vae} is broken: its latents are not finite in float16")
        disk.write(start, latents=z, labels=images.labels[start:stop])
    world.barrier()
    if world.rank == 0:
        mean, std = statistics(disk.array("latents"))
        facts = {"classes": images.classes, "data": images.data, "mean": mean.tolist(), "std": std.tolist()}
        write_json(folder / "latents.json", key | facts)
        disk.finish()
    world.barrier()

def statistics(latents):
    """(N, 2, d, h, w) -> mean, std (d,) over all of them, in float64 (the authors': over 10,000)."""
    sums, n = np.zeros((2, latents.shape[2])), latents[:, :, 0].size
    for i in range(0, len(latents), 1024):
        block = latents[i:i + 1024].astype(np.float64)
        sums += block.sum((0, 1, 3, 4)), (block ** 2).sum((0, 1, 3, 4))
    # var = (sum z^2 - n mean^2) / (n - 1); float64, since the two sums are nearly equal where mean >> std
    mean = sums[0] / n
    return mean, np.sqrt((sums[1] - n * mean ** 2) / (n - 1))

class Latents:
    """A folder that `extract` made. Memory-mapped: processes share the pages, and reading at random is 70
    times as fast as opening one of the authors' files for every latent."""
    def __init__(self, folder):
        meta = read_json(folder / "latents.json", "classes", "shape", "mean", "std", "fingerprint",
                         "identity", "image_size")
        self.meta, self.classes = meta, meta["classes"]
        # (1, d, 1, 1)
        self.mean, self.std = (torch.tensor(meta[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        with reading(folder / "labels.npy"):
            self.labels = torch.from_numpy(np.load(folder / "labels.npy"))
        with reading(folder / "latents.npy"):
            self.file = np.load(folder / "latents.npy", mmap_mode="r")
            whole = self.file.shape == (len(self.labels), 2, *meta["shape"]) and self.file.dtype == np.float16
            require(whole, f"{folder}/latents.npy and labels.npy are not what latents.json describes")
        self.shape = self.file.shape[2:]

    def read(self, index, flip):
        """index (b,) int64, flip (b,) 0 or 1 -> (b, d, h, w) float16."""
        return torch.from_numpy(self.file[index.numpy(), flip.numpy()])

class AuthorsLatents:
    """The same access to the authors' folder: *.safetensors with latents, latents_flip and labels;
    latents_stats.pt with mean and std, each (1, d, 1, 1)."""
    def __init__(self, folder):
        from safetensors import safe_open
        self.views, labels = [], []
        for path in sorted(folder.glob("*.safetensors")):
            with reading(path):
                shard = safe_open(str(path), "pt")  # opened once, not once an item
                labels.append(shard.get_tensor("labels"))
                self.views.append([shard.get_slice("latents"), shard.get_slice("latents_flip")])
            shape = self.views[0][0].get_shape()[1:]
            whole = all(view.get_shape() == [len(labels[-1]), *shape] for view in self.views[-1])
            require(whole, f"{path}: latents, latents_flip and labels are not of one length and shape")
        self.labels, self.starts = torch.cat(labels), torch.tensor([0, *map(len, labels)]).cumsum(0)
        self.classes = [str(i) for i in range(int(self.labels.max()) + 1)]  # their names are not told
        self.shape, self.meta = tuple(shape), {"shape": shape}
        stats = torch_load(folder / "latents_stats.pt")
        self.mean, self.std = stats["mean"].float(), stats["std"].float()

    def read(self, index, flip):
        # of each latent its shard, then its row there
        shard = torch.searchsorted(self.starts, index, right=True) - 1
        rows = zip(shard.tolist(), flip.tolist(), (index - self.starts[shard]).tolist())
        return torch.cat([self.views[k][side][i:i + 1] for k, side, i in rows])

def read_latents(folder):
    """Either kind of folder -> latents: .labels, .classes, .mean, .std, .shape, .meta, .read(index, flip).
    UserError if a file is damaged or if they do not fit together: found here, not after an hour."""
    with reading(folder):
        latents = AuthorsLatents(folder) if any(folder.glob("*.safetensors")) else Latents(folder)
        labels, stats = latents.labels, torch.cat([latents.mean, latents.std])  # (N,), (2, d, 1, 1)
        whole = labels.dtype == torch.int64 and stats.shape == (2, latents.shape[0], 1, 1)
        whole = whole and labels.dim() == 1 and 0 <= labels.min() and labels.max() < len(latents.classes)
        whole = whole and stats.abs().max() < 1e6 and latents.std.min() > 1e-6
        require(whole, f"the labels or statistics in {folder} are damaged: remove it, or name another")
    latents.name = folder
    return latents

def open_latents(s, world):
    """Settings -> latents, whose .meta tells their images and tokenizer; the tokenizer. They are extracted if
    they are not there, and refused (UserError) if they are another tokenizer's or other images'. Images are
    known by the list of their files: a folder that was moved costs no second extraction."""
    vae, tokenizer = load_tokenizer(s.vae, world.device, unfinished=s.unfinished)
    require(not s.tokenizer_spec or tokenizer["spec"] == SPECS[s.tokenizer_spec],
            f"--vae {s.vae} is not a tokenizer of spec {s.tokenizer_spec}, which preset {s.preset} asks for")
    folder, trained_on = Path(s.latents), tokenizer["settings"]
    data, size = s.data or trained_on.get("data", ""), s.image_size or trained_on.get("image_size", 256)
    require(size % vae.f == 0,
            f"--image-size {size} is not divisible by the tokenizer's downsampling rate {vae.f}")
    key = {"fingerprint": fingerprint(tokenizer["state_dict"]), "identity": tokenizer.get("identity", ""),
           "image_size": size, "shape": [vae.embed_dim, size // vae.f, size // vae.f]}
    # a kill may have come between latents.json and the last line of extract
    made = (folder / "latents.json").exists() and not (folder / "filling.json").exists()
    # the authors' folders say nothing of their images or tokenizer
    if not any(folder.glob("*.safetensors")) and (s.data or not made):
        require(data, f"the tokenizer {s.vae} does not say which images it knows: name them with --data")
        with world.first():  # it may download them
            images = Images(data, "train", size)
        key["identity"] = images.identity
        if not made:
            extract(s, world, vae, images, key, folder)
    latents = read_latents(folder)
    latents.meta = {"data": ""} | key | latents.meta
    other = [f"{name} {latents.meta[name]} instead of {value}" for name, value in key.items()
             if value and latents.meta[name] != value]
    require(not other, f"the latents in {folder} are not those of {s.vae} and its images "
            f"({', '.join(other)}): name others with --latents, or see --vae, --data and --image-size")
    return latents, vae

class LatentBatches(Dataset):
    """[step] -> this process's share of the step's latents, (b, d, h, w) as stored, and labels (b,). Plain or
    flipped with p = 0.5, the only augmentation (the authors' code). A function of (seed, step)."""
    def __init__(self, latents, batch_size, seed, part):
        self.latents, self.batch_size, self.seed, self.part = latents, batch_size, seed, part

    def __getitem__(self, step):
        index = batch_indices(len(self.latents.labels), self.batch_size, step, self.seed)[self.part]
        g = step_generator("cpu", self.seed, "flip", step)
        flip = torch.randint(2, (self.batch_size,), generator=g)[self.part]
        z = self.latents.read(index, flip)
        require(z.isfinite().all(), f"{self.latents.name} holds latents that are not finite: remove them")
        return z, self.latents.labels[index]

def main(s, world):
    s.vae = s.vae or f"{s.out}/vae.pt"
    s.latents = s.latents or str(Path(s.vae).parent / "latents")
    train(s, world)

if __name__ == "__main__":
    run_script(Settings, PRESETS, __doc__, main)
