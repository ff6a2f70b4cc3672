"""Training LightningDiT on the latents of a tokenizer.

Paper: arXiv 2501.01423, Sec. 4 and Table 1 (training strategies), Sec. 5.1 (latents), Sec. 5.4 (800 epochs).

Read it top to bottom:
    Settings, LADDER, PRESETS   every hyperparameter; Table 1, row by row; the paper's systems
    extract                     images become latents on disk, once, before training
    sample_time, flow_matching_loss, and ddpm_loss, where Table 1 starts
    Run, train                  a step, and the loop
Convention (authors' code): t = 0 is noise, t = 1 is data, x_t = t x1 + (1 - t) x0, v = x1 - x0.

    python train_dit.py                          preset mini, on runs/mini/vae.pt
    torchrun --nproc_per_node=8 train_dit.py --preset lightningdit-xl-64ep --vae VAE --data DIR
"""
import copy
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

# Set before torch is imported; see train_vae.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dit import SIZES, LightningDiT, read_released_dit
from train_vae import ChunkFiles, Log, Stop, batch_indices, loader, opt, resume, step_generator, to_device
from train_vae import to_float
from vae import SPECS, autocast, load_weights, require


@dataclass
class Settings:
    # The defaults are preset imagenet256: LightningDiT-XL/1 on VA-VAE f16d32 for 64 epochs [Sec. 4, 5.4].
    # Each setting is a flag, and the comment beside or below it is the flag's text in --help.
    preset: str = opt("imagenet256", same=False)  # named settings; every other flag overrides one of them
    # --- latents [Sec. 5.1]: "We pre-extract all latent features". VA-VAE's are normalised with the mean and
    # standard deviation of each channel (authors' code), SD-VAE's with LDM's factor 0.18215, which is
    # 1 / standard deviation, one number for all channels.
    vae: str = opt("", same=False)  # vae.pt of train_vae.py, or a released tokenizer; default OUT/vae.pt
    unfinished: bool = opt(False, same=False)  # accept a tokenizer whose training is not finished
    tokenizer_spec: str = opt("", choices=("", *SPECS))  # refuse a tokenizer of another spec; empty: any
    data: str = opt("", same=False)  # images, as in train_vae.py; default: those of the tokenizer
    image_size: int = 0  # side of the images in pixels; 0: as in the tokenizer's training
    latents: str = opt("", same=False)
        # folder of latents, made if it is not there, or one of the authors'; default: beside the tokenizer
    latent_norm: str = opt("channel", choices=("channel", "sd-vae"))  # mean and std, or times 0.18215
    extract_batch: int = opt(64, same=False)  # images per forward pass of the encoder, in each process
    # --- network: the architecture rows of Table 1 [Sec. 4]. Dropping 0.1 of the labels is DiT's, which took
    # it from the paper on classifier-free guidance.
    size: str = opt("XL", choices=tuple(SIZES))  # depth and width
    # patch size 1: "all compression steps are handled by the VAE" [Sec. 5.1]
    patch_size: int = 1  # side of the square of latent positions that makes a token
    swiglu: bool = True  # SwiGLU FFN instead of GELU
    rmsnorm: bool = True  # RMS Norm instead of LayerNorm
    rope: bool = True  # rotary position embedding
    qknorm: bool = False  # normalise q and k, against NaN late in training (an option of the authors' code)
    class_dropout: float = 0.1  # share of the labels that become the null class, for guidance
    init: str = ""  # start from the weights in this file: the authors' LightningDiT, or a dit.pt (its EMA)
    # --- training strategies [Sec. 4]. Large batches and beta2 = 0.95 are AuraFlow's: with PyTorch's 0.999
    # AdamW averages the squared gradients over some 1,000 steps, with 0.95 over 20. The constant rate without
    # warm-up, no weight decay, the first beta of 0.9 and the EMA are DiT's. adaLN-Zero makes the start gentle
    # by itself. At a constant rate the weights never settle, but their average over some 10,000 steps does.
    objective: str = opt("flow", choices=("flow", "ddpm"))  # rectified flow, or DiT's noise prediction
    lognorm: bool = True  # logit-normal time sampling instead of uniform
    uniform_from_epoch: float = 0.0  # epoch from which time is uniform [Sec. 5.4: 480 of 800]; 0: never
    direction_loss: bool = True  # add the velocity direction loss
    batch_size: int = 1024  # latents per step, over all processes and --accumulate
    lr: float = 2e-4  # learning rate of AdamW, constant
    beta2: float = 0.95  # second beta of AdamW
    grad_clip: float = 0.0
        # clip the gradient's norm to this; 0: off, since it "tends to reduce performance when combined" [Sec.
        # 4]
    ema: float = 0.9999  # decay per step of the moving average of the weights
    epochs: float = opt(64.0, same=False)  # passes over the latents
    steps: int = opt(0, same=False)  # training steps; 0: as many as the epochs make
    # --- how it runs. Of these, only seed, device and precision change the result by more than rounding.
    seed: int = 0  # of weights, posterior samples, order, noise and time
    out: str = opt("", same=False)  # folder of the run; default runs/PRESET
    device: str = opt("auto", choices=("auto", "cuda", "cpu"), same=False)  # auto: CUDA if there is a GPU
    precision: str = opt("auto", choices=("auto", "bf16", "fp32"))  # bf16: autocast; auto: bf16 on CUDA
    compile: bool = opt(torch.cuda.is_available(), same=False)  # torch.compile the blocks
    accumulate: int = opt(1, same=False)  # split each process's batch into this many chunks, to save memory
    checkpointing: bool = opt(False, same=False)  # recompute activations: less memory, a third more time
    workers: int = opt(4, same=False)  # loading processes per training process
    log_every: int = opt(100, same=False)  # steps between rows of metrics_dit.csv
    save_every: int = opt(5000, same=False)  # steps between checkpoints
    keep_every: int = opt(0, same=False)  # steps between copies OUT/dit-STEP.pt that are kept; 0: none
    sample_every: int = opt(5000, same=False)  # steps between pictures progress.png of the EMA; 0: none
    fresh: bool = opt(False, same=False)  # start over instead of resuming; latents are kept

# [Table 1] Each row is a trick and what it changes, and keeps the changes of the rows above. Row 9 changes
# three settings at once: the tokenizer, how its latents are normalised, and the patch size. Rows 1 to 5 are
# training, in this file; rows 6 to 8 are the network, in dit.py. f8 with patches of 2x2 and row 9's f16 with
# patches of 1 both make 16x16 tokens, so they cost the same. The tables' 80 epochs are 400,000 steps of 256
# images or 100,000 of 1024. The number beside a row is the paper's FID-50k without guidance.
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
# For two CPU cores (our choice): 8x8 latents in 16 tokens of 2x2, a quarter of the work of patch size 1. A
# short run needs a higher rate and an EMA with a shorter memory.
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
    # [Fig. 4c] prints no numbers. 80 epochs, as for L and XL, are our choice for these two.
    "lightningdit-1.0b": {"size": "1.0B", "epochs": 80.0},
    "lightningdit-1.6b": {"size": "1.6B", "epochs": 80.0},
}
row = {}
for i, (_, change) in enumerate(LADDER):
    row = row | change
    # The ladder in miniature scales batch size and learning rate as the paper's rows do; --vae names its
    # tokenizer.
    mini = {"batch_size": row["batch_size"] // 32, "lr": 10 * row["lr"], "epochs": 8.0, "steps": 0,
            "tokenizer_spec": "", "latent_norm": "channel"}
    PRESETS |= {f"table1-{i}": row, f"mini-table1-{i}": MINI | row | mini}

# --- Latents [Sec. 5.1] ----------------------------------------------------------------------------
def extract(s, world, vae, images, about, folder):
    """Encode the images, plain and flipped, into `folder`. A run that was killed resumes with the files that
    are missing. latents-00000.npy and so on: (n, 2, d, h, w) float16, where [i, 0] is plain and [i, 1] is
    flipped. Each is a SAMPLE of the posterior, not its mean, like what the decoder was trained on (authors'
    code). labels.npy: (N,) int64. latents.json: whose latents these are and, once they are all there, their
    statistics. The noise is a function of (seed, batch): neither a kill nor the number of processes changes a
    bit (on a CPU)."""
    about = about | {"seed": s.seed, "extract_batch": s.extract_batch}
    files = ChunkFiles(folder, "latents", len(images), 64 * s.extract_batch, about, world)
    batches = [(k, rows[i:i + s.extract_batch])
               for k, rows in files.missing() for i in range(0, len(rows), s.extract_batch)]
    work = loader(lambda batch: torch.stack([images[i] for i in batch[1]]), batches, s.workers)
    encoded = []
    bar = tqdm(work, f"latents to {folder}", len(batches), disable=world.rank > 0)
    for (k, rows), x in zip(batches, bar):
        x = to_float(to_device(x, world.device))  # (b, 3, S, S)
        # drawn on the CPU, so that it is the same for every device
        generator = step_generator("cpu", s.seed, "posterior", rows[0] // s.extract_batch)
        noise = torch.randn(2, len(x), *about["shape"], generator=generator).to(world.device)
        with torch.inference_mode():
            views = [vae.encode(x).sample(noise[0]), vae.encode(x.flip(3)).sample(noise[1])]
        # float16 rounds by 2e-4 of a latent's standard deviation, far less than the posterior's own noise,
        # and ImageNet's 2 x 1,281,167 latents of f16d32 take 42 GB instead of 84
        encoded.append(torch.stack(views, dim=1).half().cpu())  # (b, 2, d, h, w)
        require(encoded[-1].isfinite().all(), f"{s.vae} gives latents that are not finite: broken weights")
        if rows[-1] == files.ranges[k][-1]:
            files.write(k, torch.cat(encoded).numpy())
            encoded = []
    world.barrier()
    if world.rank == 0:
        mean, std = statistics(files.arrays())
        atomic_write(folder / "labels.npy", lambda file: np.save(file, images.labels.numpy()))
        write_json(folder / "latents.json", files.about() | {
            "classes": images.classes, "data": images.data, "mean": mean.tolist(), "std": std.tolist()})
    world.barrier()

def statistics(arrays):
    """Arrays (n, 2, d, h, w) -> mean, std (d,) of each channel over all of them, in float64. (The authors'
    are over 10,000 latents.)"""
    sums, n = np.zeros((2, arrays[0].shape[2])), sum(array[:, :, 0].size for array in arrays)
    for array in arrays:
        for i in range(0, len(array), 1024):
            block = array[i:i + 1024].astype(np.float64)
            sums += block.sum((0, 1, 3, 4)), (block ** 2).sum((0, 1, 3, 4))
    # var = (sum z^2 - n mean^2) / (n - 1), in float64, since both sums are nearly equal where mean >> std
    mean = sums[0] / n
    return mean, np.sqrt((sums[1] - n * mean ** 2) / (n - 1))

def normalise(z, latents, device):
    """Latents as stored -> x1 = (z - mean) / std per channel, data on the scale of the noise. sample.py
    undoes it before the decoder."""
    return (to_device(z, device).float() - latents.mean.to(device)) / latents.std.to(device)  # (b, d, h, w)

# --- The losses [Sec. 4, Table 1] ------------------------------------------------------------------
def sample_time(n, lognorm, generator, device):
    """Number of times -> times (n,) in (0, 1), logit-normal or uniform."""
    if lognorm:
        # [Table 1, + Logit Normal Sampling] t = sigmoid(u), u ~ N(0, 1): more training in the middle. Near
        # the ends the best prediction is easy. At t = 1 the model sees x1 and the noise is a guess, so the
        # best prediction is x1 minus the mean of the noise; at t = 0 it is the mean latent minus x0, for the
        # same reason. Mean 0 and standard deviation 1 are those of SD3.
        return torch.sigmoid(torch.randn(n, device=device, generator=generator))
    return torch.rand(n, device=device, generator=generator)

def flow_matching_loss(model, x1, y, t, x0, drop=None, direction=True):
    """Rectified flow -> (loss, {"mse": (B,), "direction": (B,)}), the two terms for each latent.
    model(x, t, y, drop) -> velocity. x1 (B, C, H, W): normalised latents. y (B,): labels. t (B,) in [0, 1].
    x0: noise, like x1. drop (B,) bool: labels to drop. direction: add the second term to the loss."""
    t_ = t.view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    # [Table 1, + Rectified Flow] x_t = t x1 + (1 - t) x0: a straight line from noise to data, ...
    x_t = t_ * x1 + (1 - t_) * x0
    # ... on which the velocity v = dx_t / dt = x1 - x0 is constant. The model learns the mean of v over all
    # pairs that pass through x_t, so its paths bend, but little: few steps can follow them.
    v = x1 - x0
    pred = model(x_t, t, y, drop).float()  # (B, C, H, W); the losses are fp32, under bf16, too
    # L_mse = mean (pred - v)^2
    mse = ((pred - v) ** 2).mean((1, 2, 3))  # (B,)
    # [Table 1, + Velocity Direction Loss] L_dir = mean (1 - cos(pred, v)), the cosine over channels. L_mse
    # hardly sees the direction of a short v (FasterDiT). The weight of L_dir is 1 (authors' code).
    # adaLN-Zero's first prediction is exactly 0, where the cosine's gradient is 1 / eps. With PyTorch's eps
    # of 1e-8 that is 1e8, and the last layer hardly moves for some 700 steps, until AdamW's second moment has
    # forgotten it. For latents of unit variance 0.1 is small: in preset mini no prediction was that short
    # after step 7, and where none is, the loss is the authors' to the last bit (our choice).
    cosine = F.cosine_similarity(pred, v, dim=1, eps=0.1)  # (B, H, W)
    terms = {"mse": mse, "direction": (1 - cosine).mean((1, 2))}
    return mse.mean() + (terms["direction"].mean() if direction else 0.0), terms

DDPM_STEPS = 1000  # noise levels of DDPM and DiT

def ddpm_alphas(device):
    """alpha_bar (1000,) float64 of DDPM's linear schedule; index 0 has the least noise."""
    # beta rises from 1e-4 to 0.02 (DDPM, DiT); alpha_bar_k = prod_{i <= k} (1 - beta_i)
    beta = torch.linspace(1e-4, 0.02, DDPM_STEPS, dtype=torch.float64, device=device)
    return torch.cumprod(1 - beta, 0)

def ddpm_loss(model, x1, y, t, x0, drop=None):
    """The noise prediction of the original DiT [Table 1, row 0], without its learned variance (our choice:
    the paper samples every row with dopri5 [Sec. 4], and an ODE has no variance). Arguments and result as in
    flow_matching_loss; without a velocity, the direction term is 0."""
    # t = 1 is data here and step 0 in DDPM: k = floor(1000 (1 - t))
    k = (DDPM_STEPS * (1 - t)).long().clamp(0, DDPM_STEPS - 1)  # (B,)
    a = ddpm_alphas(x1.device)[k].float().view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    # L = mean (x0 - model(sqrt(a) x1 + sqrt(1 - a) x0))^2; as in DiT, the network is told k itself, 0 to 999
    pred = model(a.sqrt() * x1 + (1 - a).sqrt() * x0, k.float(), y, drop).float()
    mse = ((pred - x0) ** 2).mean((1, 2, 3))  # (B,)
    return mse.mean(), {"mse": mse, "direction": torch.zeros_like(mse)}

def ddpm_velocity(model):
    """A noise predictor -> the velocity (x, t, y) of rectified flow, so that one sampler serves both.
    DDPM's sqrt(a) x1 + sqrt(1 - a) x0, divided by sqrt(a) + sqrt(1 - a), lies on the straight line from x0 to
    x1, at t = sqrt(a) / (sqrt(a) + sqrt(1 - a)): it is the same noisy latent on another scale."""
    def velocity(x, t, y):
        a = ddpm_alphas(x.device)
        grid = (a.sqrt() / (a.sqrt() + (1 - a).sqrt())).flip(0)  # (1000,) the t of each step, rising
        # the schedule ends short of pure noise and of pure data
        t = t.double().clamp(grid[0], grid[-1])
        # the step that has this t, with a fraction between two steps
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
        # ema <- decay ema + (1 - decay) weights = ema + (1 - decay) (weights - ema), all tensors at once
        torch._foreach_lerp_(averages, weights, 1 - decay)

# --- Training --------------------------------------------------------------------------------------
class Run:
    """What one training holds: model; ema, its average, which sample.py takes; opt; ddp, the model as
    training calls it, which exchanges gradients."""
    def __init__(self, s, arch, world):
        torch.manual_seed(s.seed)  # the same weights in every process
        self.settings, self.world = s, world
        self.model = LightningDiT(**arch).to(world.device)
        if s.init:
            load_weights(self.model, read_released_dit(s.init), s.init)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.model.checkpointing = s.checkpointing
        self.bf16 = s.precision == "bf16" or (s.precision == "auto" and world.device.type == "cuda")
        # everything but the fixed position embedding
        pairs = zip(self.model.parameters(), self.ema.parameters())
        self.params, self.averages = zip(*[(p, e) for p, e in pairs if p.requires_grad])
        # [Table 1, + AdamW beta2 = 0.95]
        self.opt = torch.optim.AdamW(self.params, s.lr, betas=(0.9, s.beta2), weight_decay=0.0, fused=True)
        # [Sec. 4] "torch.compile and bfloat16 training". The blocks are equal, so that one compilation serves
        # all of them. The whole network under DistributedDataParallel would be compiled anew for each block,
        # as two graphs.
        if s.compile:
            torch._dynamo.config.optimize_ddp = False
            for module in (*self.model.blocks, self.model.final_layer):
                module.compile()
        self.ddp = world.parallel(self.model)

    def states(self):
        """{name in the checkpoint: module or optimizer}."""
        return {"model": self.model, "ema": self.ema, "optimizer": self.opt}

    def step(self, x1, y, t, x0, drop, want_norm):
        """This process's batch, (b, ...) each -> the loss's terms (b,), and the gradient's norm or None. One
        step of AdamW and of the EMA. Nothing here waits for the GPU."""
        s, terms = self.settings, []
        self.opt.zero_grad()
        chunks = zip(*(v.chunk(s.accumulate) for v in (x1, y, t, x0, drop)))
        for i, chunk in enumerate(chunks, 1):
            # Processes exchange gradients only once, with the last chunk. This is what DDP's no_sync sets.
            self.ddp.require_backward_grad_sync = i == s.accumulate
            with autocast(x1, self.bf16):
                if s.objective == "flow":
                    loss, chunk_terms = flow_matching_loss(self.ddp, *chunk, s.direction_loss)
                else:
                    loss, chunk_terms = ddpm_loss(self.ddp, *chunk)
            (loss / s.accumulate).backward()
            terms.append({name: value.detach() for name, value in chunk_terms.items()})
        norm = None
        if s.grad_clip or want_norm:  # it reads all gradients, so only where it is used or logged
            norm = torch.nn.utils.clip_grad_norm_(self.params, s.grad_clip or math.inf)
        self.opt.step()
        update_ema(self.averages, self.params, s.ema)
        return {name: torch.cat([chunk[name] for chunk in terms]) for name in terms[0]}, norm

def draw(s, step, epoch, shape, device):
    """Step, from 0 -> t (B,), noise x0 (B, *shape) and dropped labels (B,) bool of the step's whole batch.
    They are a function of (seed, step), as is the choice of the latents. So a resumed run needs no random
    state to be exact, and each of several processes takes its share of what one alone would draw."""
    generator = step_generator(device, s.seed, "train", step)
    # [Sec. 5.4] "at 480 epochs, we disable the lognorm parameter to enable the near-converged network to
    # learn more effectively across all noise intervals"
    uniform = s.uniform_from_epoch and epoch >= s.uniform_from_epoch
    t = sample_time(s.batch_size, s.lognorm and not uniform, generator, device)
    drop = torch.rand(s.batch_size, device=device, generator=generator) < s.class_dropout
    return t, torch.randn(s.batch_size, *shape, device=device, generator=generator), drop

def latent_batch(latents, s, step, share):
    """This process's share of a step's latents (b, d, h, w) as stored, and their labels (b,). Each is plain
    or flipped with probability 0.5, the only augmentation (authors' code)."""
    index = batch_indices(len(latents.labels), s.batch_size, step, s.seed)[share]
    generator = step_generator("cpu", s.seed, "flip", step)
    flip = torch.randint(2, (s.batch_size,), generator=generator)[share]
    return latents.read(index, flip), latents.labels[index]

def train(s, world):
    """The loop. A run that was killed and resumed ends as one that was not (on a CPU to the last bit)."""
    path, device = Path(s.out) / "dit.pt", world.device
    state = resume(path, "dit", s)
    latents, vae = open_latents(s, world)
    n, shape = len(latents.labels), latents.shape
    total = s.steps or max(1, round(s.epochs * n / s.batch_size))
    step, bins = 0, torch.zeros(2, BINS, device=device)  # bins: sums of the losses by time, and how many
    if state:
        check_origin(state, path, latents, s)
        step, bins = state["step"], bins + state["bins"].to(device)
    if step >= total:
        return world.print(f"{path} is finished ({step} steps). More --steps continue it; --fresh restarts")
    stop, share = Stop(world, s.fresh), world.share(s.batch_size, s.accumulate)
    run = Run(s, architecture(s, shape, len(latents.classes)), world)
    for name, part in run.states().items() if state else ():
        part.load_state_dict(state[name])
    state = None  # its tensors are memory-mapped: let go of the file
    advice = ("start over in another --out with --grad-clip 1, --qknorm or a smaller --lr; what is in "
              f"{path} is still good")
    log = Log(Path(s.out) / "metrics_dit.csv", world, step, s.batch_size, advice)

    def save(to):
        log.check_weights(run.params)
        # the bins hold what was gathered since the log's last row
        gathered = {"bins": world.mean(bins.clone()).cpu()}
        if world.rank == 0:
            weights = {name: part.state_dict() for name, part in run.states().items()}
            write_checkpoint({"stage": "dit", "step": step, "total_steps": total, "settings": asdict(s),
                              **weights, **facts(s, latents), **gathered}, to)

    size = sum(p.numel() for p in run.model.parameters()) / 1e6
    world.print(f"LightningDiT {s.size}/{s.patch_size}, {size:.2f} M parameters, on {n} latents "
                f"{tuple(shape)} of {len(latents.classes)} classes, {device} x {world.size}: {total} steps "
                f"of {s.batch_size}, or {total * s.batch_size / n:.1f} epochs, from step {step}")
    batches = loader(lambda step: latent_batch(latents, s, step, share), range(step, total), s.workers, stop)
    bar = tqdm(batches, "LightningDiT", total, initial=step, unit="step", disable=world.rank > 0)
    for z, y in bar:
        x1, y = normalise(z, latents, device), to_device(y, device)  # (b, d, h, w), (b,)
        t, x0, drop = (v[share] for v in draw(s, step, step * s.batch_size / n, shape, device))
        logging = (step + 1) % s.log_every == 0 or step + 1 == total
        terms, norm = run.step(x1, y, t, x0, drop, logging)
        step += 1  # from here on, the number of steps done
        loss = terms["mse"] + (terms["direction"] if s.direction_loss else 0)  # (b,)
        # The mean hides where in the flow the loss falls, so it is logged by t in [0, .2), [.2, .4), ...,
        # too.
        bins.index_add_(1, (t * BINS).long().clamp(max=BINS - 1), torch.stack([loss, torch.ones_like(loss)]))
        if logging:
            values = {"epoch": step * s.batch_size / n, "loss": loss.mean(), "mse": terms["mse"].mean(),
                      "direction": terms["direction"].mean(), "grad_norm": norm}
            by_time = loss_by_time(world.mean(bins))
            values = log.write(step, values | by_time | {"lr": s.lr}, may_be_empty=by_time)
            bins.zero_()
            bar.set_postfix(loss=f"{values['loss']:.3f}", mse=f"{values['mse']:.3f}")
        if s.keep_every and step % s.keep_every == 0:
            save(Path(s.out) / f"dit-{step}.pt")
        stopping = stop.agreed() and step < total
        # before the last save, after which nothing is done again
        if world.rank == 0 and (step == total or (s.sample_every and step % s.sample_every == 0)):
            preview(run, vae, latents, Path(s.out) / "progress.png")
        if stopping or step % s.save_every == 0 or step == total:
            save(path)
        if stopping:
            stop.leave(f"stopped after step {step} and saved {path}")
    world.print(f"saved {path} and {s.out}/progress.png; peak memory {peak_memory(device):.2f} GiB."
                f"{warn_of_ema(s.ema, total)} Next: python sample.py {flags_of_run(s, s.vae)}")

# === Plumbing: files, flags, processes ===
import json
from shlex import quote

from train_vae import Images, atomic_write, peak_memory, run_script, save_grid, write_checkpoint, write_json
from vae import UserError, fingerprint, load_tokenizer, torch_load

BINS = 5

def loss_by_time(bins):
    """bins (2, BINS), sums of losses and numbers of latents -> {column: mean loss, NaN if there is none}."""
    return {f"loss_t{i / BINS:.1f}": mean for i, mean in enumerate(bins[0] / bins[1])}

def warn_of_ema(decay, steps):
    """A sentence if the EMA of a short run still holds much of the untrained weights, else nothing."""
    if decay ** steps < 0.01:
        return ""
    return (f" The EMA still holds {decay ** steps:.0%} of the untrained weights: train longer, use a "
            f"smaller --ema (such as {1 - 5 / max(steps, 10):.5g}), or sample with --weights model.")

def flags_of_run(s, vae):
    """The flags with which the next script finds this run and its tokenizer."""
    flags = f"--out {quote(s.out)}" + ("" if s.preset.startswith("mini") else " --preset imagenet256")
    return flags if vae == f"{s.out}/vae.pt" else f"{flags} --vae {quote(str(vae))}"

def architecture(s, shape, num_classes):
    """Settings, (d, h, w) of a latent, number of classes -> keyword arguments of LightningDiT."""
    require(shape[1] % s.patch_size == 0,
            f"--patch-size {s.patch_size} does not divide latents of {shape[1]}x{shape[2]}")
    return {"input_size": shape[1], "patch_size": s.patch_size, "in_channels": shape[0],
            "num_classes": num_classes, "class_dropout_prob": s.class_dropout, "use_qknorm": s.qknorm,
            "use_swiglu": s.swiglu, "use_rope": s.rope, "use_rmsnorm": s.rmsnorm, **SIZES[s.size]}

def check_origin(state, path, latents, s):
    """UserError if a checkpoint was trained on other latents than those at hand."""
    then, now = (state["tokenizer"]["fingerprint"], state["identity"]), latents.about
    require(then == (now["fingerprint"], now["identity"]), f"{path} was trained on latents of another "
            f"tokenizer or other images than {s.vae} and {s.latents}: start over with --fresh, or use --vae "
            "and --latents to name those it was trained on")

def facts(s, latents):
    """What dit.pt says beside its weights, so that sample.py need not ask."""
    about, arch = latents.about, architecture(s, latents.shape, len(latents.classes))
    return {"classes": latents.classes, "identity": about["identity"], "image_size": about["image_size"],
            "data": about["data"], "arch": arch, "objective": s.objective,
            "latents": {"mean": latents.mean, "std": latents.std, "shape": list(latents.shape)},
            "tokenizer": {"fingerprint": about["fingerprint"], "path": s.vae}}

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

class Latents:
    """A folder that `extract` made, or one of the authors' (*.safetensors with latents, latents_flip and
    labels; latents_stats.pt with mean and std). .labels (N,); .classes, their names; .mean and .std (1, d, 1,
    1); .shape (d, h, w); .about, what latents.json says. Files are memory-mapped: processes share the
    pages."""
    def __init__(self, folder):
        shards = sorted(folder.glob("*.safetensors"))
        if shards:
            try:
                from safetensors import safe_open
            except ImportError:
                raise UserError(f"{shards[0]} needs a package: pip install safetensors")
            files = [safe_open(str(path), "pt") for path in shards]
            # each view is a pair, plain and flipped
            self.views = [(file.get_slice("latents"), file.get_slice("latents_flip")) for file in files]
            shapes = [list(plain.get_shape()) for plain, _ in self.views]
            self.labels = torch.cat([file.get_tensor("labels") for file in files])
            stats = torch_load(folder / "latents_stats.pt")
            self.mean, self.std = stats["mean"].float(), stats["std"].float()
            self.classes = [str(i) for i in range(int(self.labels.max()) + 1)]  # the files name none
            self.about = {"data": ""}
        else:
            arrays = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("latents-*.npy"))]
            self.views = [memoryview(array).cast("B") for array in arrays]  # each view is a file's bytes
            shapes = [[len(array), *array.shape[2:]] for array in arrays]
            self.labels = torch.from_numpy(np.load(folder / "labels.npy"))
            self.about = json.loads((folder / "latents.json").read_text())
            mean_std = (torch.tensor(self.about[name]) for name in ("mean", "std"))
            self.mean, self.std = (values.view(1, -1, 1, 1) for values in mean_std)
            self.classes = self.about["classes"]
        self.shape = self.about["shape"] = shapes[0][1:]
        self.starts = np.cumsum([0, *(shape[0] for shape in shapes)])

    def read(self, index, flip):
        """index (b,) int64, flip (b,) 0 or 1 -> (b, d, h, w), as stored."""
        index, flip = index.numpy(), flip.numpy()
        # of each latent its file, then its row there
        file = np.searchsorted(self.starts, index, "right") - 1
        row = index - self.starts[file]
        if isinstance(self.views[0], tuple):
            places = zip(file.tolist(), flip.tolist(), row.tolist())
            return torch.cat([self.views[k][side][i:i + 1] for k, side, i in places])
        # For small latents, joining bytes takes half the time of indexing arrays one by one.
        size = 2 * math.prod(self.shape)  # bytes of a float16 latent
        places = zip(file.tolist(), ((2 * row + flip) * size).tolist())
        found = bytearray().join([self.views[k][place:place + size] for k, place in places])
        return torch.frombuffer(found, dtype=torch.float16).view(len(index), *self.shape)

def open_latents(s, world):
    """Settings -> latents, and the tokenizer they are of. They are extracted if they are not there, and
    refused (UserError) if they are another tokenizer's or of other images."""
    vae, tokenizer = load_tokenizer(s.vae, world.device, unfinished=s.unfinished)
    require(not s.tokenizer_spec or tokenizer["spec"] == SPECS[s.tokenizer_spec],
            f"--vae {s.vae} is not a tokenizer of spec {s.tokenizer_spec}, which preset {s.preset} asks for")
    folder, trained_on = Path(s.latents), tokenizer["settings"]
    data, size = s.data or trained_on.get("data", ""), s.image_size or trained_on.get("image_size", 256)
    require(size % vae.f == 0,
            f"--image-size {size} is not divisible by the tokenizer's downsampling rate {vae.f}")
    about = {"fingerprint": fingerprint(tokenizer["model"]), "identity": tokenizer.get("identity", ""),
             "image_size": size, "shape": [vae.embed_dim, size // vae.f, size // vae.f]}
    note = folder / "latents.json"
    finished = note.exists() and "mean" in json.loads(note.read_text())
    # the authors' folders do not say which images and tokenizer they are of
    if not any(folder.glob("*.safetensors")) and (s.data or not finished):
        require(data, f"the tokenizer {s.vae} does not say which images it knows: name them with --data")
        with world.first():  # it may download them
            images = Images(data, "train", size)
        about["identity"] = images.identity
        if not finished:
            extract(s, world, vae, images, about, folder)
    latents = Latents(folder)
    latents.about = about | latents.about
    other = [f"{name} {latents.about[name]} instead of {value}" for name, value in about.items()
             if value and latents.about[name] != value]
    require(not other, f"the latents in {folder} are not those of {s.vae} and its images "
            f"({', '.join(other)}): remove that folder to make them again, or name another with --latents")
    if s.latent_norm == "sd-vae":
        # LDM's z * 0.18215 in the form (z - mean) / std, without a mean
        latents.mean, latents.std = latents.mean * 0, torch.full_like(latents.std, 1 / 0.18215)
    return latents, vae

def main(s, world):
    s.vae = s.vae or f"{s.out}/vae.pt"
    s.latents = s.latents or str(Path(s.vae).parent / "latents")
    train(s, world)

if __name__ == "__main__":
    run_script(Settings, PRESETS, __doc__, main)
