"""Training the tokenizer; below the banner, what all scripts share.

Paper: arXiv 2501.01423, Sec. 3 (the loss), Sec. 5.1 (training), Sec. 5.4 (the long recipe), Sec. 6 and the
supplement (ablations).

Read it top to bottom:
    Settings, PRESETS      the hyperparameters, and a preset for every row of the paper's tables
    train_step             Eq. 1 to 5 together with LDM's loss: what happens to a batch of images
    Run, train             the networks and optimizers, and the loop
    (below the banner)     flags, processes, files, signals, images: what the later scripts import

    python train_vae.py                                    preset mini, minutes on two CPU cores
    python train_vae.py --preset imagenet256 --data DIR    the paper's f16d32 VA-VAE; also under torchrun
"""
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

# Set before torch is imported: idle CPU threads soon sleep, so that two runs do not slow each other down.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from vae import LPIPS, SPECS, AutoencoderKL, NormSiLU, PatchDiscriminator, autocast, require
from vf_loss import adaptive_weight, vf_losses


def opt(default, choices=None, same=True):
    """A setting. choices: its possible values. same=False: a resumed run may change it."""
    return field(default=default, metadata={"choices": choices, "same": same})

@dataclass
class Settings:
    # The defaults are preset imagenet256: f16d32 with VF loss (DINOv2) for 50 epochs [Sec. 5.1, 6.2, 6.3].
    # Without --preset, the script takes preset mini. Each setting is a flag, and its comment is the flag's
    # text in --help.
    preset: str = opt("imagenet256", same=False)  # named settings; every other flag overrides one of them
    # --- images
    data: str = opt("imagenet", same=False)
        # shapes (drawn by the code), cifar10, fashion-mnist or imagenette (torchvision, in ./data), or a
        # folder DIR/<class>/*.jpg; DIR/train and DIR/val split it, else every tenth image is a test image
    image_size: int = 256  # side of the square images in pixels
    crop: str = opt("random", choices=("random", "adm"))
        # of training images: random, a new random place along the longer side each time (authors' code), or
        # adm, ADM's centre crop
    flip: bool = False  # mirror each training image with probability 1/2 (our choice)
    # --- the network [Sec. 3]
    spec: str = opt("f16d32", choices=tuple(SPECS))  # downsampling rate f and latent dimension d
    init: str = ""
        # start from the weights in this file: the authors' VA-VAE, CompVis' kl-f8, one of diffusers, or a
        # vae.pt. W of Eq. 1 and the discriminator come from it, too, if it has them and they fit
    # --- LDM's loss. L_rec and the KL loss are sums over the 196,608 values of an image and the 8,192 values
    # of its latent (f16d32) [Sec. 3.3], like the likelihood and the KL divergence of a VAE. In the bound of a
    # plain VAE the KL divergence has the weight 1; LDM's 1e-6 leaves only a slight pull towards N(0, I).
    kl_weight: float = 1e-6  # weight of the KL loss
    lpips_weight: float = 1.0  # weight of LPIPS, added to the L1 loss of each value; 0 needs no VGG weights
    disc_weight: float = 0.5  # weight of the adversarial loss, times its adaptive weight; 0: no discriminator
    # The authors' `disc_start: 5001` counts the steps of both optimizers, two per batch: batch 2501 is the
    # first whose generator loss has 2 * batch >= 5001. (Their discriminator itself trains from batch 2500
    # on.)
    disc_start: int = 2501  # training batch, counted from 0, at which the discriminator begins
    # --- VF loss [Sec. 3.1-3.3]; "Empirically, we set m1 = 0.5, m2 = 0.25, and w_hyper = 0.1" [Sec. 5.1]
    vf: str = opt("dinov2", choices=("none", "mini", "dinov2", "dinov2-s", "dinov2-b", "dinov2-l", "dinov2-g",
                                     "mae", "clip", "sam"))
        # foundation model; mini: the miniature's teacher, a small classifier trained first
    vf_weight: float = 0.1  # w_hyper of Eq. 5
    cos_margin: float = 0.5  # m1 of Eq. 2
    mdms_margin: float = 0.25  # m2 of Eq. 3
    mcos: bool = True  # use the marginal cosine similarity loss, Eq. 2
    mdms: bool = True  # use the marginal distance matrix similarity loss, Eq. 3
    vf_input: str = opt("model", choices=("model", "authors"))
        # what the foundation model sees: images normalised with its own mean and std; or, as in the authors'
        # code, images in [-1, 1], in fp32 and for dinov2 through timm's port
    teacher_steps: int = 400  # training steps of the miniature's teacher (--vf mini)
    teacher_data: str = ""  # images from which the teacher learns, as --data; default: the run's own
    # --- the schedule [Sec. 5.1]: "we scale the learning rate and global batch size to 1e-4 and 256"
    batch_size: int = 256  # images per step, over all processes
    lr: float = 1e-4  # learning rate of Adam, constant between --warmup and --decay
    warmup: int = 0  # first steps, over which the rate rises to --lr (our choice, for the miniature)
    decay: int = 0
        # last steps, over which the rate falls to 0 (our choice, for the miniature); a finished run that is
        # continued with more --steps rises again and falls again
    epochs: float = opt(50.0, same=False)  # passes over the training images [Sec. 6.2]
    steps: int = opt(0, same=False)  # training steps; 0: as many as the epochs make
    # --- how it runs. Of these, only seed, device and precision (and chunks, through BatchNorm) change the
    # result by more than rounding.
    seed: int = 0  # of weights, order of images, crops and noise
    out: str = opt("", same=False)  # folder of the run; default runs/PRESET
    device: str = opt("auto", choices=("auto", "cuda", "cpu"), same=False)  # auto: CUDA if there is a GPU
    precision: str = opt("fp32", choices=("fp32", "bf16"))
        # of the tokenizer: fp32 (TF32 on CUDA) or bf16 autocast; losses are always fp32
    compile: bool = opt(torch.cuda.is_available(), same=False)
        # torch.compile each norm with its activation; convolutions stay eager
    chunks: int = opt(1, same=False)
        # split each process's batch into this many chunks, to save memory; each step then computes the
        # encoder's forward pass twice, the decoder's 3 times, LPIPS' up to 4 and the discriminator's 7
        # (instead of 3)
    checkpointing: bool = opt(False, same=False)
        # keep only the input of each resolution level, to save memory; each step then computes the encoder's
        # levels twice and the decoder's 3 times
    workers: int = opt(8, same=False)  # loading processes per training process
    log_every: int = opt(50, same=False)  # steps between rows of metrics_vae.csv
    save_every: int = opt(1000, same=False)  # steps between checkpoints
    fresh: bool = opt(False, same=False)  # start over instead of resuming the run in --out

# For two CPU cores (our choice). VF loss is that of the second stage of the long recipe: weight 0.1, margins
# 0. There is no LPIPS, which needs a download, and no discriminator, which does more harm than good in a run
# as short as this.
MINI = {"data": "shapes", "image_size": 32, "crop": "adm", "flip": True, "spec": "mini-f4d8", "vf": "mini",
        "lpips_weight": 0.0, "disc_weight": 0.0, "cos_margin": 0.0, "mdms_margin": 0.0, "teacher_steps": 200,
        "batch_size": 16, "lr": 2e-3, "warmup": 100, "decay": 300, "steps": 600, "workers": 0,
        "log_every": 25, "save_every": 200}
NO_VF = {"vf": "none"}
NO_MARGIN = {"cos_margin": 0.0, "mdms_margin": 0.0}
# "when we use a single loss individually, we halve the hyper weight to ensure a fair comparison" [Sec. 6.3].
# For Table A1, which has such rows, too, the paper does not say so (our choice).
ONLY_MDMS = {"mcos": False, "vf_weight": 0.05}
ONLY_MCOS = {"mdms": False, "vf_weight": 0.05}
# The authors' three stages, 100 + 15 + 15 epochs (Sec. 5.4 says 125). Their configuration explains the order:
# reconstruction is easier to learn than alignment, so alignment is strong and without margins at first, and
# then relaxed. Each stage is a run that starts from the one before, with new moments of Adam:
# --preset vavae-long-2 --init runs/vavae-long-1/vae.pt. In the last two stages the discriminator takes part
# from the first batch.
LONG = [{"epochs": 100.0, "vf_weight": 0.5} | NO_MARGIN,
        {"epochs": 15.0, "disc_start": 0} | NO_MARGIN,
        {"epochs": 15.0, "disc_start": 0}]
# The numbers are the paper's, in this order: rFID, PSNR, LPIPS, SSIM, gFID. gFID is the FID-10K of
# LightningDiT-B, trained for 160 epochs (Table A1: 80; Tables A2 and A3 do not say). Tables A1 and A2 print
# other scores for some settings of Table 2 and do not say what differed.
ROWS = {
    "table1-sdvae": {"spec": "f8d4"} | NO_VF,  # Table 1 takes a released one (see README); this trains one
    "table2-f16d16-none": {"spec": "f16d16"} | NO_VF,  # 0.49 26.10 0.132 0.72 16.24
    "table2-f16d16-mae": {"spec": "f16d16", "vf": "mae"},  # 0.51 26.01 0.137 0.71 16.86
    "table2-f16d16-dinov2": {"spec": "f16d16"},  # 0.55 25.29 0.147 0.69 15.79
    # Tables 4 and 5 repeat three rows of Table 2
    "table2-f16d32-none": NO_VF, "table4-naive": NO_VF, "table5-none": NO_VF,  # 0.26 28.59 0.089 0.80 22.62
    "table2-f16d32-mae": {"vf": "mae"}, "table4-mae": {"vf": "mae"},  # 0.28 28.33 0.091 0.80 19.89
    "table2-f16d32-dinov2": {}, "table4-dinov2": {}, "table5-full": {},  # 0.28 27.96 0.096 0.79 15.82
    "table2-f16d64-none": {"spec": "f16d64"} | NO_VF,  # 0.17 31.03 0.055 0.88 36.83
    "table2-f16d64-mae": {"spec": "f16d64", "vf": "mae"},  # 0.15 31.03 0.054 0.87 23.58
    "table2-f16d64-dinov2": {"spec": "f16d64"},  # 0.14 30.71 0.055 0.87 24.00
    "table4-sam": {"vf": "sam"},  # 0.26 28.31 0.091 0.80 19.80
    "table4-clip": {"vf": "clip"},  # 0.33 28.39 0.091 0.80 18.93
    "table5-no-mcos": ONLY_MDMS,  # 0.27 28.52 0.090 0.80 21.87
    "table5-no-mdms": ONLY_MCOS,  # 0.27 28.24 0.090 0.80 17.74
    "table5-no-margin": NO_MARGIN,  # 0.27 28.07 0.093 0.79 17.77
    "tableA1-none": NO_VF,  # 0.40 26.34 0.10 0.74 29.35
    "tableA1-m0.5-0.25": {},  # 0.42 25.88 0.10 0.72 22.11
    "tableA1-m0.4-0.25": {"cos_margin": 0.4},  # 0.41 25.91 0.10 0.73 22.70
    "tableA1-m0-0": NO_MARGIN,  # 0.44 25.91 0.10 0.73 23.43
    "tableA1-mcos": ONLY_MCOS,  # 0.37 25.38 0.12 0.71 25.70
    "tableA1-mdms": ONLY_MDMS,  # 0.39 25.55 0.12 0.71 26.99
    "tableA2-f16d32-vf": {},  # 0.33 25.81 0.110 0.72 19.93
    "tableA2-f16d16": {"spec": "f16d16"} | NO_VF,  # 0.49 24.45 0.142 0.66 21.20
    "tableA2-f16d24": {"spec": "f16d24"} | NO_VF,  # 0.34 25.40 0.118 0.71 24.59
    "tableA2-f16d28": {"spec": "f16d28"} | NO_VF,  # 0.33 26.13 0.108 0.73 26.87
    "tableA3-f16d128": {"spec": "f16d128"} | NO_VF,  # 0.13 30.00 0.047 0.86 63.92
    "tableA3-f16d128-vf": {"spec": "f16d128"},  # 0.14 29.55 0.050 0.85 46.13
    "tableA3-f32d128": {"spec": "f32d128"} | NO_VF,  # 0.38 25.21 0.119 0.69 54.52
    "tableA3-f32d128-vf": {"spec": "f32d128"},  # 0.37 24.98 0.125 0.68 38.20
    "vavae-long-1": LONG[0], "vavae-long-2": LONG[1], "vavae-long-3": LONG[2],  # Table 3: rFID 0.28
}
PRESETS = {"mini": MINI, "imagenet256": {}} | ROWS

class Tokenizer(nn.Module):
    """What one optimizer trains: the autoencoder and W of Eq. 1, in one module for
    DistributedDataParallel."""
    def __init__(self, vae, width):
        super().__init__()
        self.vae = vae
        self.linear_proj = nn.Conv2d(vae.embed_dim, width, 1, bias=False) if width else None

    def forward(self, x, noise):
        x_hat, z, posterior = self.vae(x, noise)
        z_proj = None
        if self.linear_proj is not None:
            # [Eq. 1] z' = W z at each position. z is a SAMPLE of the posterior, not its mean (authors' code):
            # it is the vector that the decoder sees, and later LightningDiT.
            z_proj = self.linear_proj(z)  # (b, d, h, w) -> (b, d_f, h, w)
        return x_hat, z, posterior, z_proj

def reconstruction_loss(x, x_hat, lpips, lpips_weight):
    """x, x_hat (b, 3, H, W) in [-1, 1] -> L_rec, a scalar: LDM's sum over C, H, W, divided by the batch size.
    LDM has a parameter for the variance of the likelihood. In the authors' code no optimizer holds it, so it
    stays 1 and is left out here."""
    # L_rec = sum_chw(|x - x_hat| + lpips_weight * LPIPS(x, x_hat)) / b, with LPIPS broadcast over the pixels
    loss = (x - x_hat).abs()  # (b, 3, H, W)
    if lpips is not None:
        loss = loss + lpips_weight * lpips(x, x_hat)  # + (b, 1, 1, 1)
    return loss.sum() / len(x)

def hinge_generator(fake):
    """Logits of reconstructions, any shape -> the generator's loss -mean(fake), which has no lower bound."""
    return -fake.mean()

def hinge_discriminator(real, fake):
    """Logits, any shape -> the discriminator's loss: push real ones above 1 and fake ones below -1."""
    # d = 1/2 (mean relu(1 - real) + mean relu(1 + fake))
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())

def train_step(run, x, noise, batch):
    """One batch through the loss of Sec. 3 and both optimizers -> the terms {name: scalar} for the log.
    x (b, 3, H, W) in [-1, 1]; noise (b, d, h, w), standard normal; batch: the number of the batch, from 0."""
    s, vae = run.settings, run.tokenizer.vae
    # reconstruct, and [Eq. 1] z' = W z
    with autocast(x, s.precision == "bf16"):
        x_hat, z, posterior, z_proj = run.ddp(x, noise)  # (b, 3, H, W), (b, d, h, w), -, (b, d_f, h, w)
    x_hat = x_hat.float()  # every loss below is fp32

    # LDM's loss [Sec. 3, Fig. 3]: reconstruction and KL, each a sum divided by the batch size
    rec = reconstruction_loss(x, x_hat, run.lpips, s.lpips_weight)
    kl = posterior.kl().sum() / len(x)
    loss = rec + s.kl_weight * kl
    terms = {"rec": rec, "l1": (x - x_hat).abs().mean(), "kl": kl}

    # VQGAN's adversarial loss, weighted as in Eq. 4, but at the decoder's last layer
    adversarial = run.disc is not None and batch >= s.disc_start
    if adversarial:
        run.disc.requires_grad_(False)  # g updates the autoencoder, not the discriminator
        g = hinge_generator(run.disc(x_hat))
        w_disc = s.disc_weight * adaptive_weight(rec, g, vae.decoder.conv_out.weight, max_weight=1e4)
        loss = loss + w_disc * g
        terms |= {"g": g, "w_disc": w_disc}

    # VF loss: [Eq. 2] L_mcos, [Eq. 3] L_mdms, [Eq. 4] w_adaptive at the encoder's last layer
    if z_proj is not None:
        f = run.foundation(x, z.shape[-2:])  # (b, d_f, h, w), no gradient
        mcos, mdms = vf_losses(z_proj, f, s.cos_margin, s.mdms_margin, s.mcos, s.mdms)
        w_adaptive = adaptive_weight(rec, mcos + mdms, vae.encoder.conv_out.weight)
        # [Eq. 5] L_vf = w_hyper * w_adaptive * (L_mcos + L_mdms)
        loss = loss + s.vf_weight * w_adaptive * (mcos + mdms)
        terms |= {"mcos": mcos, "mdms": mdms, "w_vf": s.vf_weight * w_adaptive}

    run.opt.zero_grad(set_to_none=True)
    loss.backward()
    run.opt.step()

    # The discriminator's step takes the same reconstruction, detached, so nothing flows into the decoder.
    if adversarial:
        run.disc.requires_grad_(True)
        d = hinge_discriminator(run.ddp_disc(x), run.ddp_disc(x_hat.detach()))
        run.opt_disc.zero_grad(set_to_none=True)
        d.backward()
        run.opt_disc.step()
        terms["d"] = d
    return {name: value.detach() for name, value in terms.items()}

class Run:
    """What one training holds: networks, losses and optimizers. foundation: a FoundationModel or None."""
    def __init__(self, settings, world, foundation, pretrained=True):
        s, device = settings, world.device
        self.settings, self.foundation = settings, foundation
        torch.manual_seed(s.seed)  # the same weights in every process
        vae = AutoencoderKL(**SPECS[s.spec])
        self.tokenizer = Tokenizer(vae, foundation.width if foundation else 0).to(device)
        with world.first():
            self.lpips = LPIPS(pretrained).to(device) if s.lpips_weight else None
        self.disc = PatchDiscriminator().to(device) if s.disc_weight else None
        nets = [net for net in (self.tokenizer, self.lpips, self.disc) if net is not None]
        for net in nets if device.type == "cuda" else ():
            net.to(memory_format=torch.channels_last)
        self.save_memory(vae, nets[1:])
        # Only the norms and activations are compiled: a compiled convolution would always compute the
        # gradient of its weight, which doubles the work of Eq. 4's backward pass (tests/test_bench.py counts
        # it). loss.backward() then uses the same graph again, so its buffers must not be given away.
        torch._functorch.config.donated_buffer = False
        for module in vae.modules():
            if s.compile and isinstance(module, NormSiLU):
                module.compile()
        # Betas (0.5, 0.9) are LDM's and VQGAN's: the discriminator changes, so a short memory helps. Without
        # a discriminator a longer one is better: it gives preset mini 0.8 dB (our choice).
        options = {"lr": s.lr, "betas": (0.5, 0.9) if s.disc_weight else (0.9, 0.99), "fused": True}
        self.opt = torch.optim.Adam(self.tokenizer.parameters(), **options)
        self.ddp = world.parallel(self.tokenizer)
        if world.size > 1 and device.type == "cuda" and self.disc:  # on a CPU, each process normalises alone
            self.disc = nn.SyncBatchNorm.convert_sync_batchnorm(self.disc)
        self.opt_disc = torch.optim.Adam(self.disc.parameters(), **options) if self.disc else None
        self.ddp_disc = world.parallel(self.disc) if self.disc else None
        self.optimizers = [self.opt, self.opt_disc] if self.disc else [self.opt]

    def save_memory(self, vae, others):
        """Apply --checkpointing to the resolution levels, and --chunks to all networks except the two
        conv_out layers, where the adaptive weights take their gradients."""
        s = self.settings
        if s.checkpointing:
            for level in [*vae.encoder.down, *vae.decoder.up]:
                level.forward = in_chunks(level.forward, 1)
        if s.chunks > 1:
            for net in (vae.encoder, vae.decoder):
                net.features = in_chunks(net.features, s.chunks)
            for net in others:
                net.forward = in_chunks(net.forward, s.chunks)

    def states(self):
        """{name in the checkpoint: module or optimizer}."""
        teacher = self.foundation.net if self.settings.vf == "mini" else None
        states = {"model": self.tokenizer.vae, "optimizer": self.opt,
                  "linear_proj": self.tokenizer.linear_proj, "teacher": teacher,
                  "discriminator": self.disc, "optimizer_disc": self.opt_disc}
        return {name: state for name, state in states.items() if state is not None}

def in_chunks(forward, n):
    """A network's forward pass over its batch in n chunks, each computed again in every backward pass through
    it. Autograd then keeps only what goes in and comes out, and the activations of one chunk at a time. Only
    a BatchNorm notices n, since it sees one chunk: without a discriminator, train_step gives the same for any
    n."""
    def call(*batches):
        chunks = zip(*(batch.chunk(n) for batch in batches))
        return torch.cat([checkpoint(forward, *chunk, use_reentrant=False) for chunk in chunks])
    return call

def train(s, world):
    """The loop. Images, crops and noise of a step are functions of (seed, step), so a run that was killed and
    resumed ends as one that was not, with no random state saved (on a CPU to the last bit)."""
    path = Path(s.out) / "vae.pt"
    state = resume(path, "vae", s)
    with world.first():
        images = Images(s.data, "train", s.image_size, random_crop if s.crop == "random" else center_crop)
        test = Images(s.data, "test", s.image_size)
    require(not state or state["identity"] == images.identity,
            f"the images of --data {s.data} are not those of {path}: files were added, removed or renamed. "
            "Restore them, or use another --out, or --fresh")
    total = s.steps or max(1, round(s.epochs * len(images) / s.batch_size))
    step = state["step"] if state else 0
    if step >= total:
        return world.print(f"{path} is finished ({step} steps). More --steps continue it; --fresh restarts")
    run = make_run(s, images, world, state)
    state = None  # its tensors are memory-mapped: let go of the file
    stop = Stop(world, s.fresh)  # until here there is nothing to save, and a signal ends the process at once
    vae, share = run.tokenizer.vae, world.share(s.batch_size, s.chunks)
    log = Log(Path(s.out) / "metrics_vae.csv", world, step, s.batch_size, "start over in another --out with "
              f"a smaller --lr or --precision fp32; --init {path} keeps what was learnt")

    def save():
        log.check_weights(run.tokenizer.parameters())
        if world.rank == 0:
            weights = {name: part.state_dict() for name, part in run.states().items()}
            state = {"stage": "vae", "step": step, "total_steps": total, "settings": asdict(s), **weights,
                     "classes": images.classes, "identity": images.identity, "image_size": s.image_size,
                     "data": s.data, "spec": SPECS[s.spec]}
            write_checkpoint(state, path)

    names = ", ".join(images.classes[:3]) + (", ..." if len(images.classes) > 3 else "")
    world.print(f"{s.spec} on {s.data} ({len(images)} images of {s.image_size}x{s.image_size}, "
                f"{len(images.classes)} classes: {names}), VF loss {s.vf}, {world.device} x {world.size}: "
                f"{total} steps of {s.batch_size}, or {total * s.batch_size / len(images):.1f} epochs, from "
                f"step {step}")
    batches = loader(lambda step: image_batch(images, s, step, share), range(step, total), s.workers, stop)
    bar = tqdm(batches, "tokenizer", total, initial=step, unit="step", disable=world.rank > 0)
    for x in bar:
        for optimizer in run.optimizers:
            rising, falling = (step + 1) / max(1, s.warmup), (total - step) / max(1, s.decay)
            optimizer.param_groups[0]["lr"] = s.lr * min(1.0, rising, falling)
        x = to_float(to_device(x, world.device))  # (b, 3, S, S) in [-1, 1]
        # the noise of the global batch, of which each process takes its share
        shape = (s.batch_size, vae.embed_dim, s.image_size // vae.f, s.image_size // vae.f)
        generator = step_generator(world.device, s.seed, "noise", step)
        noise = torch.randn(shape, device=world.device, generator=generator)[share]  # (b, d, h, w)
        terms = train_step(run, x, noise, step)
        step += 1  # from here on, the number of steps done
        if step % s.log_every == 0 or step == total:
            columns = dict.fromkeys(("rec", "l1", "kl", "g", "d", "w_disc", "mcos", "mdms", "w_vf"), 0.0)
            values = log.write(step, {"epoch": step * s.batch_size / len(images)} | columns | terms)
            bar.set_postfix({name: f"{values[name]:.3g}" for name in ("rec", "mcos", "mdms")})
        stopping = stop.agreed() and step < total
        if step == total and world.rank == 0:  # before the last save, after which nothing is done again
            psnr = save_reconstructions(vae.eval(), test, Path(s.out) / "reconstructions.png", world.device)
        if stopping or step % s.save_every == 0 or step == total:
            save()
        if stopping:
            stop.leave(f"stopped after step {step} and saved {path}")
    if world.rank == 0:
        mini = s.preset == "mini"
        where = f"--out {quote(s.out)}" if mini else f"--preset imagenet256 --vae {quote(str(path))}"
        print(f"saved {path} and {s.out}/reconstructions.png (test images and, below them, their "
              f"reconstructions, {psnr:.2f} dB); peak memory {peak_memory(world.device):.2f} GiB. "
              f"Next: python train_dit.py {where}")

# === Plumbing: files, flags, processes ===
import argparse
import contextlib
import hashlib
import inspect
import json
import math
import re
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from functools import lru_cache
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from shlex import quote

import numpy as np
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets.folder import IMG_EXTENSIONS

from vae import UserError, load_checkpoint, load_weights, read_released_tokenizer, torch_load
from vf_loss import Classifier, load_foundation_model, train_classifier

try:
    import fcntl
    import resource
except ImportError:
    sys.exit("These scripts run on Linux and macOS. On Windows, use WSL.")


def make_run(s, images, world, state):
    """The Run of these settings with its foundation model, from a checkpoint's state if there is one."""
    f = 2 ** (len(SPECS[s.spec]["ch_mult"]) - 1)
    require(s.image_size % f == 0,
            f"--image-size {s.image_size} is not divisible by the downsampling rate {f} of --spec {s.spec}")
    require(not s.disc_weight or s.image_size >= 24,
            f"the discriminator needs images of 24 pixels or more, not {s.image_size}: use --disc-weight 0")
    require(s.vf == "none" or s.mcos or s.mdms, "--no-mcos --no-mdms leave nothing of VF loss; use --vf none")
    require(s.init or s.preset not in ("vavae-long-2", "vavae-long-3"), f"--preset {s.preset} continues the "
            "stage before it: name its checkpoint, such as --init runs/vavae-long-1/vae.pt")
    foundation = None
    if s.vf != "none":
        teacher = make_teacher(s, images, f, world, state) if s.vf == "mini" else None
        grid = (s.image_size // f, s.image_size // f)
        with world.first():
            foundation = load_foundation_model(s.vf, grid, s.vf_input, teacher).to(world.device)
    run = Run(s, world, foundation)
    if state:
        for name, part in run.states().items():
            part.load_state_dict(state[name])
    elif s.init:
        start_from(s.init, run, world)
    return run

def start_from(path, run, world):
    """--init: the weights of the autoencoder must fit; W and the discriminator are taken only if they do."""
    state = torch_load(path)
    found = {"linear_proj": state.get("linear_proj", {}), "discriminator": state.get("discriminator", {})}
    if state.get("stage") == "vae":
        spec, weights = state["spec"], state["model"]
    else:
        spec, weights = read_released_tokenizer(path)
        state = state.get("state_dict", state)
        for part, prefix in (("linear_proj", "linear_proj."), ("discriminator", "loss.discriminator.")):
            found[part] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    require(spec == SPECS[run.settings.spec], f"--init {path} holds another tokenizer than --spec "
            f"{run.settings.spec}")
    load_weights(run.tokenizer.vae, weights, path)
    for name in found.keys() & run.states().keys():
        part = run.states()[name]
        # W belongs to one foundation model, and for another one it has another shape
        own = {k: v.shape for k, v in part.state_dict().items()}
        fits = own == {k: v.shape for k, v in found[name].items()}
        world.print(f"--init {path}: {name} {'comes from this file, too' if fits else 'starts anew'}")
        if fits:
            part.load_state_dict(found[name])

def make_teacher(s, images, f, world, state):
    """The miniature's teacher: a Classifier trained first or, in a resumed run, taken from the checkpoint.
    Its seed is fixed, so that runs on the same images get equal teachers, as the paper's runs use one
    DINOv2."""
    if s.teacher_data:
        images = Images(s.teacher_data, "train", s.image_size)
    require(len(images.classes) > 1, "the teacher of --vf mini learns to tell classes apart, and there is "
            "only one: use --vf dinov2 or --vf none")
    torch.manual_seed(1)
    net = Classifier(len(images.classes), f)
    if state:
        net.load_state_dict(state["teacher"])
        return net
    chosen = epoch_order(len(images), 1, 0)[:50_000]  # at most so many fit in memory; in random order
    x = torch.stack([images[i] for i in chosen.tolist()])
    net = train_classifier(net, x, images.labels[chosen], s.teacher_steps, 1, world.device, "teacher")
    for tensor in net.state_dict().values() if world.size > 1 else ():
        dist.broadcast(tensor, 0)  # each GPU has rounded in its own way
    return net

@torch.no_grad()
def save_reconstructions(vae, images, path, device):
    """Save a PNG of test images, each row above its reconstructions from the posterior's mode, and return
    their mean PSNR in dB."""
    n = min(8, len(images))
    count = n * min(2, len(images) // n)  # whole rows only
    x = torch.stack([to_float(images[i]) for i in torch.linspace(0, len(images) - 1, count).long().tolist()])
    with torch.compiler.set_stance("force_eager"):  # it would compile again for inference
        x_hat = torch.cat([vae.decode(vae.encode(part.to(device)).mode()).cpu() for part in x.split(4)])
    x_hat = x_hat.clamp(-1, 1)  # like x (count, 3, S, S)
    save_grid(torch.cat([torch.cat(rows) for rows in zip(x.split(n), x_hat.split(n))]), path, n)
    return (10 * torch.log10(4 / ((x - x_hat) ** 2).mean((1, 2, 3)))).mean().item()

# --- Flags and errors ------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print all flags first
        raise UserError(f"{message}; see --help")

# POSITIVE settings must not be 0, FRACTIONS not above 1. All numbers are finite and not negative.
POSITIVE = {"batch_size", "lr", "epochs", "chunks", "accumulate", "patch_size", "num", "log_every",
            "save_every", "timestep_shift"}
FRACTIONS = {"ema", "beta2", "class_dropout", "cfg_interval_start"}

def parse_settings(cls, presets, doc, argv=None):
    """argv -> a Settings: the class's values, overridden by the preset's, overridden by the flags. image_size
    becomes --image-size, and a bool such as mcos becomes --mcos and --no-mcos."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="mini", choices=tuple(presets))
    settings = cls(**{"preset": "mini"} | presets[first.parse_known_args(argv)[0].preset])
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # the help text of a setting is the comment beside or below it in the source
    found = re.findall(r"^    (\w+): [^#]*(# .*(?:\n {8}# .*)*)", inspect.getsource(cls), re.MULTILINE)
    texts = {name: " ".join(text.replace("#", " ").split()) for name, text in found}
    for setting in fields(cls):
        name, kind = setting.name, type(setting.default)
        choices = tuple(presets) if name == "preset" else setting.metadata.get("choices")
        text = texts[name] + (f": {', '.join(choices)}" if choices else "")
        text = f"{text} (default: {getattr(settings, name)!r})".replace("%", "%%")
        options = {"type": kind, "choices": choices, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag(name), help=text, **options)
    parser.parse_args(argv, settings)
    for setting in fields(cls):
        name, value = setting.name, getattr(settings, setting.name)
        if type(setting.default) in (int, float):
            possible = 0 <= value < math.inf and (value or name not in POSITIVE)
            possible = possible and (value <= 1 or name not in FRACTIONS)
            require(possible, f"{flag(name)} {value} makes no sense")
    given = {word.partition("=")[0] for word in (sys.argv if argv is None else argv)}
    if "--epochs" in given and "--steps" not in given:  # else a preset's steps would override the flag
        settings.steps = 0
    settings.out = settings.out or f"runs/{settings.preset}"
    return settings

def flag(name):
    return "--" + name.replace("_", "-")

def run_script(cls, presets, doc, work):
    """Parse the flags and call work(settings, world). A UserError ends in one line; every other exception is
    an ordinary traceback."""
    name, status = Path(sys.argv[0]).name, 1
    try:
        settings = parse_settings(cls, presets, doc)
        work(settings, World(settings.device))
        status = 0
    except UserError as error:
        status = error.status
        print(f"{name}: {'error: ' if status == 1 else ''}{error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
    finally:
        for process in active_children():  # loading processes ignore signals
            process.kill()
        while LOCKS:  # the process of a notebook goes on
            os.close(LOCKS.pop())
    if dist.is_initialized():
        # Leave at once: other processes may wait for this one in a collective, and it for them at the exit.
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)

# --- Processes and signals -------------------------------------------------------------------------
class World:
    """The processes that work together: rank, size, device. Plain python is rank 0 of 1. The processes of
    torchrun join a group: NCCL on CUDA, gloo on a CPU."""
    def __init__(self, device="cpu"):
        cuda = torch.cuda.is_available() and device != "cpu"
        require(cuda or device != "cuda", "--device cuda: there is no CUDA GPU here; use --device cpu")
        self.rank, self.size, self.local = (int(os.environ.get(name, default)) for name, default in
                                            (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.device = torch.device("cuda", self.local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            # fp32 means TF32 on CUDA in training, extraction and sampling (our choice). The authors' code
            # uses TF32 in extraction and sampling, and in the tokenizer's training and scores for
            # convolutions only.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
            # Others report NaN after some 65,000 steps with cuDNN's attention, which torch prefers on Hopper.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self.size > 1:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
            # for waits of more than ten minutes, and for Stop's messages, which should not make a GPU wait
            self.patient = dist.new_group(backend="gloo", timeout=timedelta(hours=6))

    def print(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def barrier(self):
        if self.size > 1:  # in the patient group, since one process may be downloading
            try:
                dist.barrier(group=self.patient)
            except RuntimeError as error:  # gloo's: connection closed by peer
                raise UserError("another process has ended, whose message says why") from error

    def mean(self, tensor):
        """The mean of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def share(self, batch_size, chunks=1):
        """The slice of a global batch that this process works on. UserError if it cannot be cut into `chunks`
        equal chunks."""
        require(batch_size % (self.size * chunks) == 0, f"--batch-size {batch_size} is not divisible by "
                f"{self.size} process(es) times {chunks} (--chunks or --accumulate)")
        size = batch_size // self.size
        return slice(self.rank * size, (self.rank + 1) * size)

    @contextlib.contextmanager
    def first(self):
        """One process of each node goes through the block before the others (it downloads what is
        missing)."""
        if self.local > 0:
            self.barrier()
        yield
        if self.local == 0:
            self.barrier()

    def parallel(self, net):
        """The module as training calls it: in DistributedDataParallel if there are several processes."""
        if self.size == 1:
            return net
        return DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

class Stop:
    """SIGTERM and Ctrl-C ask a run to save and stop after the current step. A second Ctrl-C ends it at
    once."""
    def __init__(self, world, fresh=False):
        self.world, self.fresh, self.asked = world, fresh, 0  # the number of the signal
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        self.asked = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def end(self):
        """From here on, a signal ends the process at once."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """Whether to stop after this step. All processes must stop at the same one, so they ask each other,
        in the CPU's group, on which no GPU waits."""
        number = torch.tensor(self.asked)
        if self.world.size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.world.patient)
        self.asked = self.asked or int(number)  # a signal that came meanwhile counts after the next step
        return int(number) > 0

    def leave(self, message):
        stopped = UserError(f"{message}; the same command {'without --fresh ' if self.fresh else ''}resumes")
        stopped.status = 128 + self.asked  # as shells expect
        raise stopped

def loader(load, items, workers, stop=None):
    """Iterator over load(item) for each item, in order, read ahead by `workers` processes (0: by this one).
    load returns a tensor or a tuple of them. Arrays come through pipes, so that Docker's small /dev/shm is
    enough. stop: a Stop, which also ends the wait for a process that is stuck."""
    if not workers:
        yield from map(load, items)
        return
    items, waiting = iter(items), deque()
    pool = ProcessPoolExecutor(workers, get_context("fork"), start_worker, (load,))
    try:
        while True:
            # The processes start here and inherit that signals are blocked: a stop is up to their parent.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            waiting.extend(pool.submit(load_item, item) for item in islice(items, 4 * workers - len(waiting)))
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if not waiting:
                return
            future, seconds = waiting.popleft(), 0
            while not wait([future], timeout=1).done:
                seconds += stop is not None and stop.asked > 0
                if seconds == 5:
                    stop.leave("stopped while waiting for a loading process; the last checkpoint is kept")
            arrays = [torch.from_numpy(array) for array in future.result()]
            yield arrays[0] if len(arrays) == 1 else tuple(arrays)
    except BrokenProcessPool:
        raise UserError("a loading process died, perhaps for lack of memory: use fewer --workers, or 0")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

def start_worker(load):
    """A new loading process, which must not outlive its parent."""
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    load_item.load = load

def load_item(item):
    loaded = load_item.load(item)
    return [tensor.numpy() for tensor in (loaded if isinstance(loaded, tuple) else (loaded,))]

def to_device(tensor, device):
    """A tensor on the device. To a GPU it goes from pinned memory, so that nothing waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

def step_generator(device, *numbers):
    """A random generator that is a function of its arguments, such as (seed, purpose, step), so that no
    random state needs saving."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # 63 bits

def peak_memory(device):
    """Peak memory so far in GiB: of the GPU's allocations, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes (not tried there), Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30

# --- Files -----------------------------------------------------------------------------------------
def atomic_write(path, write):
    """Write under a temporary name, flush and rename, so that the path always holds a whole file, the old or
    the new. UserError if the disk is full or the folder cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        disk = error if isinstance(error, OSError) else error.__context__  # behind torch.save's own error
        require(not isinstance(disk, OSError),
                f"cannot write {path} ({disk}): make room there, or name another --out")
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

def write_checkpoint(state, path):
    atomic_write(path, lambda file: torch.save(state, file))

def write_json(path, value):
    atomic_write(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))

def open_npz(path):
    """The arrays in an .npz, read on demand."""
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz: {error}") from error

LOCKS = []  # open files of lock()

def lock(folder):
    """Make this process the only one that writes into the folder, until the script ends."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        LOCKS.append(os.open(Path(folder, ".lock"), os.O_CREAT | os.O_RDWR))
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}): name another --out or --latents")
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # loading processes do not inherit it
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is writing into {folder}: wait for it, or use another folder")
    except OSError as error:  # Lustre and NFS may have none
        print(f"{folder}: no lock on this disk ({error.strerror}), so start only one run there")

def resume(path, stage, settings):
    """The state to resume from, or None. UserError lists the settings that differ from the checkpoint's."""
    if settings.fresh or not Path(path).exists():
        return None
    state = load_checkpoint(path, stage, ": remove it, or start over with --fresh")
    # a setting that did not exist when the file was written had its default
    then = {setting.name: setting.default for setting in fields(settings)} | state["settings"]
    changed = [f"{flag(name)} {now!r} (checkpoint: {then[name]!r})" for name, now in asdict(settings).items()
               if now != then[name] and settings.__dataclass_fields__[name].metadata.get("same", True)]
    require(not changed, f"{path} was made with other settings: {', '.join(changed)}; use those, another "
            "--out, or --fresh to start over")
    return state

class Log:
    """Rows of metrics in a CSV file and, if it is installed, in TensorBoard. UserError if a metric is not
    finite, with `advice`. A resumed run keeps the rows up to its checkpoint and writes the later ones
    again."""
    def __init__(self, path, world, step, batch_size, advice):
        self.path, self.world, self.batch_size, self.advice = Path(path), world, batch_size, advice
        self.then, self.board = (time.time(), step), None
        if world.rank > 0:
            return
        lock(self.path.parent)
        rows = self.path.read_text().splitlines(keepends=True) if step and self.path.exists() else []
        rows = rows[:1] + [row for row in rows[1:] if int(row.split(",")[0]) <= step]
        atomic_write(self.path, lambda file: file.write("".join(rows).encode()))
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step)

    def write(self, step, values, may_be_empty=()):
        """values {name: scalar} of this process -> their means over all processes, written as a row."""
        device, (then, at) = self.world.device, self.then
        means = self.world.mean(torch.tensor([float(value) for value in values.values()], device=device))
        values = dict(zip(values, means.tolist()))
        for name, value in values.items():
            require(math.isfinite(value) or name in may_be_empty,
                    f"{name} is not finite at step {step}; {self.advice}")
        self.then = (time.time(), step)
        values["images_per_s"] = self.batch_size * (step - at) / (time.time() - then)
        values["memory_gib"] = peak_memory(device)
        if self.world.rank == 0:
            header = ",".join(["step", *values]) + "\n"
            old = self.path.read_text().partition("\n")[0]
            require(old in ("", header.strip()), f"{self.path} has other columns: move it away to resume")
            row = ["" if math.isnan(value) else f"{value:.6g}" for value in values.values()]
            with open(self.path, "a") as file:
                file.write(("" if old else header) + ",".join([str(step), *row]) + "\n")
            for name in values if self.board else ():
                self.board.add_scalar(name, values[name], step)
                self.board.flush()
        return values

    def check_weights(self, weights):
        """UserError if one is not finite: a checkpoint of them would replace the last good one."""
        finite = all(torch.isfinite(weight).all() for weight in weights)
        require(finite, f"a weight is not finite; {self.advice}")

class ChunkFiles:
    """Rows 0 to n - 1 of an array that several processes make, `size` rows per file: folder/NAME-00000.npy
    and so on. Process r of R makes files r, r + R, ... A file is there whole or not at all, so a run that was
    killed only makes what is missing. NAME.json says what they are made from: `about`."""
    def __init__(self, folder, name, n, size, about, world):
        self.folder, self.name, self.world = Path(folder), name, world
        self.ranges = [range(start, min(start + size, n)) for start in range(0, n, size)]
        if world.rank == 0:
            lock(folder)
            about = json.loads(json.dumps(about | {"n": n, "chunk_size": size}))
            made = self.about() or about
            other = [f"{k} {made.get(k)!r} (now {v!r})" for k, v in about.items() if made.get(k) != v]
            require(not other, f"{folder} was begun with other settings: {', '.join(other)}; use those, or "
                    "remove the folder")
            write_json(self.folder / f"{name}.json", made)
        world.barrier()

    def about(self):
        path = self.folder / f"{self.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def path(self, k):
        return self.folder / f"{self.name}-{k:05d}.npy"

    def missing(self):
        """The files (k, range of rows) that this process still has to make."""
        mine = range(self.world.rank, len(self.ranges), self.world.size)
        return [(k, self.ranges[k]) for k in mine if not self.path(k).exists()]

    def write(self, k, rows):
        atomic_write(self.path(k), lambda file: np.save(file, rows))

    def arrays(self):
        """The arrays of all files, memory-mapped."""
        return [np.load(self.path(k), mmap_mode="r") for k in range(len(self.ranges))]

# --- Images ----------------------------------------------------------------------------------------
def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0

def to_uint8(images):
    """float in [-1, 1], clipped -> uint8, rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def save_grid(images, path, nrow):
    """images (N, 3, H, W) in [-1, 1] -> a PNG with nrow of them per row; small ones are enlarged."""
    # (3, height, width), two white pixels between images
    grid = torchvision.utils.make_grid(to_uint8(images).cpu(), nrow=nrow, padding=2, pad_value=255)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    picture = ImageOps.scale(picture, max(1, 96 // images.shape[-1]), Image.NEAREST)
    atomic_write(path, lambda file: picture.save(file, "PNG"))

def center_crop(image, size, where=None):
    """ADM's centre crop of an RGB PIL image -> uint8 (3, size, size): halve with a box filter while the image
    is at least twice as large as needed, resize to the exact short side (bicubic), cut out the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    return random_crop(image, size, None, Image.BICUBIC)

def random_crop(image, size, where, method=Image.BILINEAR):
    """The authors' crop for training, uint8 (3, size, size): resize to the exact short side (bilinear), cut
    out the square at `where` (top, left), two numbers in [0, 1), or in the middle if it is None."""
    image = ImageOps.scale(image, size / min(image.size), method)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    if where:
        top, left = int(where[0] * (image.height - size + 1)), int(where[1] * (image.width - size + 1))
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, size, size)

def outline(n, inner=1.0):
    """(2n, 2) points around 0, with radius 1 and `inner` in turn, the first at the top: n = 5 makes a
    star."""
    angle = np.arange(2 * n) * math.pi / n
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1) * np.tile([1.0, inner], n)[:, None]

DISC = outline(24)  # nearly a circle
ANGLE = np.arange(48) * math.pi / 24
HEART = 13 * np.cos(ANGLE) - 5 * np.cos(2 * ANGLE) - 2 * np.cos(3 * ANGLE) - np.cos(4 * ANGLE)
# Outlines in [-1, 1]^2 with y pointing down. A second outline is cut out of the first.
SHAPES = {
    "disc": [DISC],
    "ring": [DISC, 0.5 * DISC],
    "square": [[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]],
    "triangle": [[(0, -1), (0.95, 0.75), (-0.95, 0.75)]],
    "star": [outline(5, inner=0.42)],
    "cross": [[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
               (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)]],
    "heart": [np.stack([np.sin(ANGLE) ** 3, -HEART / 17], axis=1)],
    "crescent": [DISC, 0.8 * DISC - (0, 0.5)],
    "arrow": [[(0, -1), (0.8, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.8, 0)]],
    "hourglass": [[(-0.75, -0.95), (0.75, -0.95), (-0.75, 0.95), (0.75, 0.95)]],
}

def draw_shape(seed, index, size=32):
    """Picture `index` of set `seed`, an RGB PIL image whose class is index % 10 (our choice).
    It is a flat shape on a flat ground, and only the shape tells the class. The picture is drawn four times
    too large and then averaged. It is a function of the arguments alone."""
    rng = np.random.default_rng([seed, index])
    # 65 to 80 % of the frame, turned by up to 10 degrees, near the middle: two cores learn this in minutes
    radius, turn = rng.uniform(0.65, 0.8), rng.uniform(-1, 1) * math.pi / 18
    centre = rng.uniform(-0.5, 0.5, 2) * (1 - radius)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    # two shades of orange or of blue, either of them the dark one; hues between the two are not drawn, since
    # 600 steps of the tokenizer do not learn them
    hue = rng.choice([30, 210])
    lightness = rng.permutation([rng.uniform(15, 30), rng.uniform(70, 85)])
    ink, ground = (f"hsl({hue},60%,{light:.0f}%)" for light in lightness)
    image = Image.new("RGB", (4 * size, 4 * size), ground)
    for points, colour in zip(list(SHAPES.values())[index % len(SHAPES)], (ink, ground)):
        points = (1 + centre + radius * np.asarray(points) @ rotation) * (2 * size)
        ImageDraw.Draw(image).polygon([tuple(point) for point in points], fill=colour)
    return image.reduce(4)

TORCHVISION = {"cifar10": torchvision.datasets.CIFAR10, "fashion-mnist": torchvision.datasets.FashionMNIST,
               "imagenette": torchvision.datasets.Imagenette}

class Images:
    """Labelled images: [i] is crop(image i, size), uint8 (3, S, S). .labels (N,) int64; .classes, their
    names; .identity, a hash of the list of files and classes, so a folder may move. data: see Settings.
    split: "train" or "test"."""
    def __init__(self, data, split, image_size, crop=center_crop):
        self.data, self.size, self.crop = data, image_size, crop
        if data == "shapes":
            self.source = range(10_000) if split == "train" else range(10_000, 12_000)  # always of set 0
            self.classes, labels, names = list(SHAPES), [i % len(SHAPES) for i in self.source], (split,)
        elif data in TORCHVISION:
            self.source = torchvision_set(data, split)
            self.classes = [name[0] if isinstance(name, tuple) else name for name in self.source.classes]
            labels, names = getattr(self.source, "targets", None), (data, split)
            if labels is None:  # Imagenette has files
                self.source, labels = zip(*self.source._samples)
        else:
            pairs, self.classes = list_folder(Path(data), split)
            self.source, labels = zip(*pairs)
            names = [str(path.relative_to(data)) for path in self.source]
        self.labels = torch.as_tensor(labels)
        self.identity = hashlib.sha256(repr((self.classes, names)).encode()).hexdigest()[:16]

    def __len__(self):
        return len(self.labels)

    def load(self, i, where=(0.5, 0.5)):
        """Image i. where (top, left): the place of a random crop."""
        item = self.source[i]
        if self.data == "shapes":
            image = draw_shape(0, item, self.size)
        elif isinstance(item, tuple):  # of torchvision: image, label
            image = item[0].convert("RGB")
        else:
            image = open_image(item)
        return self.crop(image, self.size, where)
    __getitem__ = load

# Formats that people use. PostScript and others that run programs are not among them, whatever a file's name.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".avif", ".jfif", ".jp2")  # torchvision's and more

def open_image(path):
    """A file -> an RGB PIL image; of several frames the first. Transparency is dropped and EXIF's orientation
    is ignored, as torchvision and the authors' code do."""
    Image.init()
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            image.load()
            mode, kind = image.mode, image.format
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: {error}. Replace it with an intact picture of the "
                        "same name: a run resumes only with the files it began with") from error
    # 16-bit grey, which Pillow's own conversion would clip to white. (Older Pillow opens it as "I".)
    if mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    require(image.mode not in ("I", "F"), f"{path} has 32 bits per pixel, and nothing says which value is "
            "white: convert it to 8 bits")
    return image.convert("RGB")

def torchvision_set(data, split):
    """One of torchvision's sets in ./data, downloaded if it is not there."""
    which = {"train": split == "train"}
    if data == "imagenette":
        which = {"split": "train" if split == "train" else "val", "size": "320px"}
    for download in (False, True):
        try:
            return TORCHVISION[data]("data", download=download, **which)
        except (OSError, RuntimeError) as error:
            reason = error
    raise UserError(f"--data {data} is not in ./data and cannot be downloaded ({reason})")

LAYOUT = "images are expected in DIR/<class>/*.jpg, or in DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg"
SYSTEM = ("__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")

def subfolders(folder):
    """Folders in a folder, by name; not hidden ones and those of archives, servers and systems."""
    return sorted(path for path in folder.iterdir()
                  if path.is_dir() and not path.name.startswith((".", "@")) and path.name not in SYSTEM)

def picture_files(folder):
    """All picture files below a folder, by path; not hidden ones."""
    found, places = [], [folder]
    for place in places:  # a link may lead back
        places += [path for path in subfolders(place) if not place.resolve().is_relative_to(path.resolve())]
        found += [path for path in place.iterdir() if path.suffix.lower() in SUFFIXES
                  and not path.name.startswith(".") and path.is_file()]
    return sorted(found)

def find_splits(folder):
    """DIR -> the folder with the classes of the training images, and that of the test images or None.
    DIR is split if the names of two of its folders differ only in a word for training and one for test (train
    and Val, seg_train and seg_test; digits, signs and "set" do not count), or if it has a training folder and
    no other. Otherwise its folders are classes, one of which may be called train."""
    places = subfolders(folder)
    # "Train" and "training_set" become "*", "seg_train" becomes "seg*"; so do "val" and "seg_test"
    names = {re.sub("[^a-z]|set", "", path.name.lower()): path for path in reversed(places)}
    train = {re.sub("training|train", "*", name, count=1): path for name, path in names.items()}
    for words in ("validation|valid|val", "testing|test"):
        for name, path in names.items():
            rest = re.sub(words, "*", name, count=1)
            if "*" in rest and rest in train:
                return train[rest], path
    return (train["*"], None) if "*" in train and len(places) == 1 else (folder, None)

def list_folder(folder, split):
    """A folder -> ([(file, label)], classes), with the classes of the training images for both splits. A
    folder without a split of its own gives every tenth image to the test images."""
    require(folder.is_dir(), f"--data {folder} is neither a folder nor shapes, {', '.join(TORCHVISION)}")
    train, test = find_splits(folder)
    classes = [path.name for path in subfolders(train)]
    require(classes, f"{train} has no class folders: {LAYOUT}")
    root = test if test and split == "test" else train
    unknown = sorted({path.name for path in subfolders(root)} - set(classes))
    alone = f"{LAYOUT}. With --data {train}, every tenth image of that folder is a test image"
    require(not unknown, f"{root} has classes that {train} lacks ({', '.join(unknown[:3])}); {alone}")
    files = {name: picture_files(root / name) if (root / name).is_dir() else [] for name in classes}
    filled = [name for name in classes if files[name]]
    if len(filled) == 1 and root == train:  # one class, or folders around the classes?
        places = {path.parent for path in files[filled[0]]}
        around = Path(os.path.commonpath(places))
        require(around in places, f"all pictures of {train} are in folders inside {around}: name that with "
                "--data")
    require(len(classes) == 1 or "images" not in map(str.lower, filled),
            f"the folder called images in {train} is no class beside others: name it with --data")
    empty = sorted(set(classes) - set(filled)) if root == train else []
    require(not empty, f"the class folder {train / (empty or [''])[0]} has no images: {LAYOUT}")
    pairs = [(path, label) for label, name in enumerate(classes) for path in files[name]]
    if not test:
        pairs = [pair for i, pair in enumerate(pairs) if (i % 10 == 9) == (split == "test")]
    lack = f"no images in class folders: {alone}" if test else f"too few images (10 or more): {LAYOUT}"
    require(pairs, f"{root} has {lack}")
    return pairs, classes

@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=step_generator("cpu", seed, "order", epoch))

def batch_indices(n, batch_size, step, seed):
    """Indices (batch_size,) of training step `step`, from 0. The random orders of all epochs, one after the
    other, are cut into batches: within an epoch, no image comes twice and none is lost."""
    place = torch.arange(step * batch_size, (step + 1) * batch_size)  # in the row of all epochs' orders
    epochs = range(int(place[0]) // n, int(place[-1]) // n + 1)
    return torch.cat([epoch_order(n, seed, epoch)[place[place // n == epoch] % n] for epoch in epochs])

def image_batch(images, s, step, share):
    """This process's share of a step's images, uint8 (b, 3, S, S), cropped and mirrored."""
    index = batch_indices(len(images), s.batch_size, step, s.seed)[share]
    # three uniform numbers per image: whether it is mirrored, and the top and left of its crop
    generator = step_generator("cpu", s.seed, "crop", step)
    chance = torch.rand(s.batch_size, 3, generator=generator)[share]  # (b, 3)
    x = torch.stack([images.load(i, c[1:]) for i, c in zip(index.tolist(), chance.tolist())])
    if s.flip:
        x = torch.where(chance[:, :1, None, None] < 0.5, x.flip(3), x)
    return x

if __name__ == "__main__":
    run_script(Settings, PRESETS, __doc__, train)
