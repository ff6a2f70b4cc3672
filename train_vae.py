"""Training the tokenizer; below the banner, what all scripts share.

Paper: arXiv 2501.01423, Sec. 3 (the loss), Sec. 5.1 (training), Sec. 5.4 (the long recipe), Sec. 6 and the
supplement (ablations).

Read it top to bottom:
    Settings               every hyperparameter on one screen
    train_step             Eq. 1 to 5 put together with LDM's loss: what happens to a batch of images
    Run, train             the networks and optimizers, and the loop
    PRESETS                rows of the paper's tables, the paper's numbers beside them
    (below the banner)     flags, processes, files, signals, images: imported by the later scripts

    python train_vae.py                                    preset mini, minutes on two CPU cores
    python train_vae.py --preset imagenet256 --data DIR    the paper's f16d32 VA-VAE; or under torchrun
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is loading: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# Before torch is loaded: how long a CPU thread that waits for the others spins before it sleeps. Seconds for
# 200 steps of train_dit.py on two cores, alone / two runs at once: 14 / 27; without 31 / 25; always 15 / 117.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from vae import LPIPS, SPECS, AutoencoderKL, PatchDiscriminator, autocast
from vf_loss import adaptive_weight, load_foundation_model, vf_loss


def opt(default, valid="[0, inf)", choices=None, same=True):
    """A setting with more than a default: what it may be, and whether a resumed run must repeat it."""
    return field(default=default, metadata={"valid": valid, "choices": choices, "same": same})

@dataclass
class Settings:
    # The values are preset imagenet256's: f16d32, VF loss (DINOv2), 50 epochs [Sec. 5.1, 6.2, 6.3]; without
    # --preset a script takes preset mini. Each setting is a flag, and its comment the flag's text in --help.
    preset: str = opt("imagenet256", same=False)  # named settings; every other flag overrides one of them
    # --- images
    data: str = opt("imagenet", same=False)
        # shapes (drawn by the code), cifar10, fashion-mnist, imagenette (torchvision, in ./data), or a folder
        # DIR/<class>/*.jpg, split by DIR/train and DIR/val, else every tenth image is a test image
    image_size: int = opt(256, "[1, 8192]")  # side of the square image in pixels
    crop: str = opt("random", choices=("random", "adm"))
        # of training images: random, a new square each time (the authors' code), or adm, ADM's centre crop
    flip: bool = False  # mirror every second training image (ours; the authors do not)
    # --- the network [Sec. 3]
    spec: str = opt("f16d32", choices=tuple(SPECS))  # downsampling rate f and latent dimension d
    init: str = ""
        # start from the weights in this file: the authors' VA-VAE, CompVis' kl-f8, or ours; with W of Eq. 1
        # and the discriminator, if it holds them and they fit
    # --- LDM's loss. L_rec and KL are sums over the 196,608 values of an image and the 8,192 of its latent
    # (f16d32) [Sec. 3.3], as likelihood and KL of a VAE are: weight 1 would be its bound. LDM's 1e-6 leaves
    # a slight pull to N(0, I); of means it would be 1e-6 * 8,192 / 196,608 = 4e-8.
    kl_weight: float = 1e-6  # weight of the KL loss
    lpips_weight: float = 1.0  # weight of LPIPS against the L1 loss of a pixel; 0: no VGG weights needed
    disc_weight: float = 0.5  # weight of the adversarial loss, times its adaptive weight; 0: none
    # The authors' `disc_start: 5001` counts the steps of both optimizers, two a batch: batch 2501 is the
    # first with 2 * batch >= 5001. A delay: an untrained decoder's images are told at a glance.
    disc_start: int = 2501  # training batch, counted from 0, at which the discriminator begins
    # --- VF loss [Sec. 3.1-3.3]; "Empirically, we set m1 = 0.5, m2 = 0.25, and w_hyper = 0.1" [Sec. 5.1]
    vf: str = opt("dinov2", choices=("none", "mini", "dinov2", "dinov2-s", "dinov2-b", "dinov2-l", "dinov2-g",
                                     "mae", "clip", "sam"))
        # foundation model F; mini: a small classifier trained on the spot
    vf_weight: float = 0.1  # w_hyper of Eq. 5
    cos_margin: float = opt(0.5, "[0, 2]")  # m1 of Eq. 2
    mdms_margin: float = opt(0.25, "[0, 2]")  # m2 of Eq. 3
    mcos: bool = True  # use the marginal cosine similarity loss, Eq. 2
    mdms: bool = True  # use the marginal distance matrix similarity loss, Eq. 3
    vf_input: str = opt("model", choices=("model", "authors"))
        # what F sees: images normalised by its own mean and std, or all as in the authors' code
    teacher_steps: int = opt(400, "[1, inf)")  # training steps of the stand-in of --vf mini
    teacher_data: str = ""  # images and classes the stand-in learns from, as --data; default: the run's own
    # --- the schedule [Sec. 5.1]: "we scale the learning rate and global batch size to 1e-4 and 256"
    batch_size: int = opt(256, "[1, 1e5]")  # images a step, over all processes
    lr: float = opt(1e-4, "(0, inf)")  # learning rate of Adam, constant
    warmup: int = 0  # steps over which the rate rises to --lr (ours, for the miniature's high rate)
    epochs: float = opt(50.0, "(0, 1e6]")  # passes over the training images [Sec. 6.2]
    steps: int = 0  # training steps; 0: as many as the epochs make
    # --- how it runs: only seed and precision change what is learned (and accumulate, by BatchNorm)
    seed: int = opt(0, "[0, 9e18]")  # of weights, order of images, crops and noise
    out: str = opt("", same=False)  # folder of the run; default runs/PRESET
    device: str = opt("auto", choices=("auto", "cuda", "cpu"), same=False)  # auto: CUDA if there is one
    precision: str = opt("fp32", choices=("fp32", "bf16"))
        # of the tokenizer: fp32 (TF32 on CUDA) or bf16 autocast; losses are fp32
    compile: bool = opt(torch.cuda.is_available(), same=False)  # torch.compile encoder and decoder
    accumulate: int = opt(1, "[1, inf)", same=False)
        # parts of each process's batch, one after the other: less memory, every forward pass twice
    checkpointing: bool = opt(False, same=False)  # compute activations twice: less memory, a third more time
    workers: int = opt(8, "[0, 512]", same=False)  # loading processes for each training process
    log_every: int = opt(50, "[1, inf)", same=False)  # steps between lines of metrics_vae.csv
    save_every: int = opt(1000, "[1, inf)", same=False)  # steps between checkpoints
    fresh: bool = opt(False, same=False)  # start over instead of resuming the run in --out

class Tokenizer(nn.Module):
    """What the generator's optimizer holds: the autoencoder and W of Eq. 1, as one module for DDP."""
    def __init__(self, vae, width):
        super().__init__()
        self.vae = vae
        self.linear_proj = nn.Conv2d(vae.embed_dim, width, 1, bias=False) if width else None

    def forward(self, x, noise):
        x_hat, z, posterior = self.vae(x, noise)
        z_proj = None
        if self.linear_proj is not None:
            # [Eq. 1] z' = W z at each position. z is a SAMPLE of the posterior, not its mean (the authors'
            # code): the vector that the decoder sees, and LightningDiT later.
            z_proj = self.linear_proj(z)  # (b, d, h, w) -> (b, d_f, h, w)
        return x_hat, z, posterior, z_proj

def reconstruction_loss(x, x_hat, lpips, lpips_weight):
    """x, x_hat (b, 3, H, W) in [-1, 1] -> L_rec, a scalar: LDM's sum over C, H, W, divided by the batch.
    LDM's learned variance of the likelihood stays 1: in the authors' code no optimizer holds it."""
    # L_rec = sum_chw(|x - x_hat| + lpips_weight * LPIPS(x, x_hat)) / b, LPIPS broadcast over the pixels
    loss = (x - x_hat).abs()  # (b, 3, H, W)
    if lpips is not None:
        loss = loss + lpips_weight * lpips(x, x_hat)  # + (b, 1, 1, 1)
    return loss.sum() / len(x)

def hinge_generator(fake):
    """Logits of reconstructions, any shape -> the generator's loss -mean(fake): raise them, no bound."""
    return -fake.mean()

def hinge_discriminator(real, fake):
    """Logits, any shape -> the discriminator's loss: push real ones above 1 and fake ones below -1."""
    # d = 1/2 (mean relu(1 - real) + mean relu(1 + fake))
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())

def train_step(run, x, noise, batch):
    """One batch through the loss of Sec. 3 and both optimizers -> the terms {name: scalar} for the log.
    x (b, 3, H, W) in [-1, 1]; noise (b, d, h, w), standard normal; batch: its number, from 0."""
    s, vae = run.settings, run.tokenizer.vae
    # reconstruct, and [Eq. 1] z' = W z
    with autocast(x, s.precision == "bf16"):
        x_hat, z, posterior, z_proj = run.ddp(x, noise)  # (b, 3, H, W), (b, d, h, w), -, (b, d_f, h, w)
    x_hat = x_hat.float()  # every loss below is fp32

    # LDM's loss [Sec. 3, Fig. 3]: reconstruction and KL, each a sum divided by the batch
    rec = reconstruction_loss(x, x_hat, run.lpips, s.lpips_weight)
    kl = posterior.kl().sum() / len(x)
    loss = rec + s.kl_weight * kl
    terms = {"rec": rec, "l1": (x - x_hat).abs().mean(), "kl": kl}

    # VQGAN's adversarial loss, weighted as in Eq. 4, but at the decoder's last layer
    adversarial = run.disc is not None and batch >= s.disc_start
    if adversarial:
        run.disc.requires_grad_(False)  # g trains the decoder only
        g = hinge_generator(run.disc(x_hat))
        w_disc = s.disc_weight * adaptive_weight(rec, g, vae.decoder.conv_out.weight, max_weight=1e4)
        loss = loss + w_disc * g
        terms |= {"g": g, "w_disc": w_disc}

    # VF loss [Eq. 2] L_mcos, [Eq. 3] L_mdms, [Eq. 4] w_adaptive at the encoder's last layer
    if z_proj is not None:
        f = run.foundation(x, z.shape[-2:])  # (b, d_f, h, w), no gradient
        mcos, mdms = vf_loss(z_proj, f, s.cos_margin, s.mdms_margin, s.mcos, s.mdms)
        w_adaptive = adaptive_weight(rec, mcos + mdms, vae.encoder.conv_out.weight)
        # [Eq. 5] L_vf = w_hyper * w_adaptive * (L_mcos + L_mdms)
        loss = loss + s.vf_weight * w_adaptive * (mcos + mdms)
        terms |= {"mcos": mcos, "mdms": mdms, "w_vf": s.vf_weight * w_adaptive}

    run.opt.zero_grad(set_to_none=True)
    loss.backward()
    run.opt.step()

    # The discriminator's step, on the same reconstruction; detached: nothing flows into the decoder.
    if adversarial:
        run.disc.requires_grad_(True)
        d = hinge_discriminator(run.ddp_disc(x), run.ddp_disc(x_hat.detach()))
        run.opt_disc.zero_grad(set_to_none=True)
        d.backward()
        run.opt_disc.step()
        terms["d"] = d
    return {name: value.detach() for name, value in terms.items()}

class Run:
    """What one training holds: networks, losses, optimizers. foundation: a FoundationModel or None."""
    def __init__(self, settings, world, foundation, pretrained=True):
        s, device = settings, world.device
        self.settings, self.foundation = settings, foundation
        torch.manual_seed(s.seed)  # weights: the same on every process
        vae = AutoencoderKL(**SPECS[s.spec])
        self.tokenizer = Tokenizer(vae, foundation.width if foundation else 0).to(device)
        with world.first():
            self.lpips = LPIPS(pretrained).to(device) if s.lpips_weight else None
        self.disc = PatchDiscriminator().to(device) if s.disc_weight else None
        if device.type == "cuda":
            for net in filter(None, (self.tokenizer, self.lpips, self.disc)):
                net.to(memory_format=torch.channels_last)
        if s.checkpointing:
            for level in [*vae.encoder.down, *vae.decoder.up]:
                level.forward = in_parts(level.forward, 1)
        # Only `features`: the last convolutions stay outside, where Eq. 4 takes its gradients. These backward
        # passes need the graph's buffers again, which torch.compile would give away.
        torch._functorch.config.donated_buffer = False
        for net in (vae.encoder, vae.decoder):
            if s.compile:
                net.features = torch.compile(net.features)
            if s.accumulate > 1:
                net.features = in_parts(net.features, s.accumulate)
        for net in filter(None, (self.lpips, self.disc)):
            if s.accumulate > 1:
                net.forward = in_parts(net.forward, s.accumulate)
        # Betas (0.5, 0.9) are LDM's and VQGAN's: against a moving discriminator a short memory helps.
        options = {"lr": s.lr, "betas": (0.5, 0.9), "fused": True}
        self.opt = torch.optim.Adam(self.tokenizer.parameters(), **options)
        self.ddp = world.parallel(self.tokenizer)
        if world.size > 1 and device.type == "cuda" and self.disc:  # a CPU normalises each share, as LDM does
            self.disc = nn.SyncBatchNorm.convert_sync_batchnorm(self.disc)
        self.opt_disc = torch.optim.Adam(self.disc.parameters(), **options) if self.disc else None
        self.ddp_disc = world.parallel(self.disc) if self.disc else None
        self.optimizers = [self.opt, self.opt_disc] if self.disc else [self.opt]

    def parts(self):
        """{name in the checkpoint: module or optimizer}."""
        teacher = self.foundation.net if self.settings.vf == "mini" else None
        parts = {"state_dict": self.tokenizer.vae, "optimizer": self.opt,
                 "linear_proj": self.tokenizer.linear_proj, "teacher": teacher,
                 "discriminator": self.disc, "optimizer_disc": self.opt_disc}
        return {name: part for name, part in parts.items() if part is not None}

    def load(self, state, path):
        """A checkpoint into all parts -> the steps done."""
        for name, part in self.parts().items():
            load = load_optimizer if part in self.optimizers else load_weights
            load(part, state.get(name), path)
        return state["step"]

def train(s, world):
    """The loop. A step's images, crops and noise are functions of (seed, step): a run killed and resumed is
    the run that was not, with no random state saved (on a CPU to the bit)."""
    path, share = Path(s.out) / "vae.pt", world.share(s.batch_size, s.accumulate)
    state = resume(path, "vae", s)
    if state and state["step"] == state["total_steps"]:
        return world.print(f"{path} is finished ({state['step']} steps); --fresh starts over")
    with world.first():
        images = Images(s.data, "train", s.image_size, random_crop if s.crop == "random" else center_crop)
        test = Images(s.data, "test", s.image_size)
    total = s.steps or max(1, round(s.epochs * len(images) / s.batch_size))
    require(not state or (state["identity"], state["total_steps"]) == (images.identity, total),
            f"the images of --data {s.data} are not those of {path}: use those, another --out, or --fresh")
    run = build(s, images, world, state is not None)
    step = run.load(state, path) if state else 0
    state = None  # lets go of the file, which is memory-mapped
    vae = run.tokenizer.vae
    log, stop = Log(Path(s.out) / "metrics_vae.csv", world, step, s.batch_size), Stop(world)
    shape = (s.batch_size, vae.embed_dim, s.image_size // vae.f, s.image_size // vae.f)

    def save():
        log.check(path, "try a smaller --lr, or --precision fp32", run.tokenizer.parameters())
        if world.rank == 0:
            weights = {name: part.state_dict() for name, part in run.parts().items()}
            save_checkpoint({"stage": "vae", "step": step, "total_steps": total, "settings": asdict(s),
                             "spec": SPECS[s.spec], "classes": images.classes, "identity": images.identity,
                             "num_classes": len(images.classes), **weights}, path)

    world.print(f"{s.spec} on {s.data} ({len(images)} images of {s.image_size}x{s.image_size}), VF loss "
                f"{s.vf}, {world.device} x {world.size}: {total} steps of {s.batch_size} = "
                f"{total * s.batch_size / len(images):.1f} epochs; from step {step}")
    batches = loader(ImageBatches(images, s, share), s.workers, world.device, batch_size=None,
                     sampler=range(step, total))
    bar = tqdm(batches, "tokenizer", total, initial=step, unit="step", disable=world.rank > 0)
    for x in bar:
        for optimizer in run.optimizers:
            optimizer.param_groups[0]["lr"] = s.lr * min(1.0, (step + 1) / max(1, s.warmup))
        x = to_float(x.to(world.device, non_blocking=True))  # (b, 3, S, S) in [-1, 1]
        # the noise of the global batch, of which each process takes its share
        generator = step_generator(world.device, s.seed, "noise", step)
        noise = torch.randn(shape, device=world.device, generator=generator)[share]  # (b, d, h, w)
        terms = train_step(run, x, noise, step)
        step += 1  # from here on: steps done
        log.watch(step, terms)
        if step % s.log_every == 0 or step == total:
            log.check(path, "try a smaller --lr, or --precision fp32")
            columns = dict.fromkeys(("rec", "l1", "kl", "g", "d", "w_disc", "mcos", "mdms", "w_vf"), 0.0)
            values = log.write(step, {"epoch": step * s.batch_size / len(images)} | columns | terms)
            bar.set_postfix({name: f"{values[name]:.3g}" for name in ("rec", "mcos", "mdms")})
        stopping = stop.agreed() and step < total
        if step == total and world.rank == 0:  # before the last save, after which nothing is done again
            psnr = save_reconstructions(vae.eval(), test, Path(s.out) / "reconstructions.png", world.device)
        if stopping or step % s.save_every == 0 or step == total:
            save()
        if stopping:
            stop.leave(f"stopped after step {step} and saved {path}; the same command goes on from there")
    if world.rank == 0:
        print(f"saved {path} and {s.out}/reconstructions.png (test images and what is left of them, "
              f"{psnr:.2f} dB); peak memory {peak_memory(world.device):.2f} GiB. Next: python train_dit.py")

# Ours, for two CPU cores. VF loss as in the second stage of the long recipe: weight 0.1, margins 0. No LPIPS,
# which needs a download, and no discriminator, whose first hundred steps take more than they give.
MINI = {"data": "shapes", "image_size": 32, "crop": "adm", "flip": True, "spec": "mini-f4d8", "vf": "mini",
        "lpips_weight": 0.0, "disc_weight": 0.0, "cos_margin": 0.0, "mdms_margin": 0.0, "teacher_steps": 200,
        "batch_size": 16, "lr": 1e-3, "warmup": 100, "steps": 600, "workers": 0, "log_every": 25,
        "save_every": 200}
NO_VF = {"vf": "none"}
NO_MARGIN = {"cos_margin": 0.0, "mdms_margin": 0.0}
# "when we use a single loss individually, we halve the hyper weight to ensure a fair comparison" [Sec. 6.3]
ONLY_MDMS = {"mcos": False, "vf_weight": 0.05}
ONLY_MCOS = {"mdms": False, "vf_weight": 0.05}
# The authors' three stages, 100 + 15 + 15 epochs (Sec. 5.4 says 125): a strong pull without margins, then a
# weak one, then the margins. The paper gives no reason. Each is a run that starts from the one before:
# --preset vavae-long-2 --init runs/vavae-long-1/vae.pt. Adam's moments start anew in each. Their disc_start
# is 1 in the last two: the discriminator from batch 0, its term from batch 1.
LONG = [{"epochs": 100.0, "vf_weight": 0.5} | NO_MARGIN,
        {"epochs": 15.0, "disc_start": 0} | NO_MARGIN,
        {"epochs": 15.0, "disc_start": 0}]
# The paper's numbers, in this order: rFID, PSNR, LPIPS, SSIM, gFID. gFID is FID-10K of LightningDiT-B (160
# epochs; Table A1 80; Tables A2, A3 name none). Tables A1 and A2 print other scores for settings of Table 2
# and do not say what differed.
ROWS = {
    "table1-sdvae": {"spec": "f8d4"} | NO_VF,  # trains one; Table 1 takes a released one (README)
    "table2-f16d16-none": {"spec": "f16d16"} | NO_VF,  # 0.49 26.10 0.132 0.72 16.24
    "table2-f16d16-mae": {"spec": "f16d16", "vf": "mae"},  # 0.51 26.01 0.137 0.71 16.86
    "table2-f16d16-dinov2": {"spec": "f16d16"},  # 0.55 25.29 0.147 0.69 15.79
    # Tables 4 and 5 compare with three rows of Table 2: the same settings and numbers
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

# === Plumbing: nothing of the paper below this line ===
import argparse
import contextlib
import fcntl
import hashlib
import inspect
import json
import math
import re
import resource
import sys
import time
import warnings
from datetime import timedelta
from functools import lru_cache

import numpy as np
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from vae import UserError, check_entries, load_weights, read_released_tokenizer, reading, require, torch_load
from vf_loss import Classifier, train_classifier


def build(s, images, world, resumed):
    """The Run of these settings with its foundation model, checked against each other before any step."""
    f = 2 ** (len(SPECS[s.spec]["ch_mult"]) - 1)
    require(s.image_size % f == 0,
            f"--image-size {s.image_size} is not divisible by the downsampling rate {f} of --spec {s.spec}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    require(s.batch_size // world.size * 3 * s.image_size ** 2 < memory, f"--batch-size {s.batch_size} "
            f"images of --image-size {s.image_size} are more than the memory of this machine")
    require(not s.disc_weight or s.image_size >= 24, f"--image-size {s.image_size} is too small for the "
            "discriminator, which needs 24 pixels; use --disc-weight 0 to train without")
    require(s.vf == "none" or s.mcos or s.mdms, "--no-mcos --no-mdms leave nothing of VF loss; use --vf none")
    foundation = None
    if s.vf != "none":
        mini = stand_in(s, images, f, world.device, resumed) if s.vf == "mini" else None
        grid = (s.image_size // f, s.image_size // f)
        with world.first():
            foundation = load_foundation_model(s.vf, grid, s.vf_input, mini).to(world.device)
    run = Run(s, world, foundation)
    if s.init and not resumed:
        spec, weights = read_released_tokenizer(s.init)
        require(spec == SPECS[s.spec], f"--init {s.init} holds another tokenizer than --spec {s.spec}")
        load_weights(run.tokenizer.vae, weights, s.init)
        with reading(s.init):
            ours = torch_load(s.init)
            theirs = ours.get("state_dict", ours)
            for name, prefix in (("linear_proj", "linear_proj."), ("discriminator", "loss.discriminator.")):
                part = run.parts().get(name)
                if part is not None:
                    found = {k.removeprefix(prefix): theirs[k] for k in theirs if k.startswith(prefix)}
                    found, own = ours.get(name, found), part.state_dict()
                    # W belongs to one foundation model, and of another one it has another shape
                    fits = own.keys() == found.keys() and all(own[k].shape == found[k].shape for k in own)
                    world.print(f"--init {s.init}: {name} {'comes from it, too' if fits else 'starts anew'}")
                    load_weights(part, found if fits else own, s.init)
    return run

def in_parts(forward, n):
    """A network's forward pass over its batch in n parts, each computed again in the backward pass: autograd
    keeps what goes in and comes out, and the activations of one part at a time. A BatchNorm sees a part; all
    else, and so train_step, is the same for any n."""
    def call(*batches):
        parts = zip(*(batch.chunk(n) for batch in batches))
        return torch.cat([checkpoint(forward, *part, use_reentrant=False) for part in parts])
    return call

def stand_in(s, images, f, device, resumed):
    """The foundation model of --vf mini: a Classifier trained on the spot, or empty for a resumed run, whose
    checkpoint holds it. Its seed is not the run's: runs share it, as the paper's share one DINOv2."""
    if s.teacher_data:
        images = Images(s.teacher_data, "train", s.image_size)
    torch.manual_seed(1)
    net = Classifier(len(images.classes), f)
    if resumed:
        return net
    chosen = epoch_order(len(images), 1, 0)[:50_000]  # a folder is sorted by class
    x = torch.stack([images[i] for i in chosen.tolist()])
    net = train_classifier(net, x, images.labels[chosen], s.teacher_steps, 1, device, "stand-in teacher")
    for tensor in net.state_dict().values() if dist.is_initialized() else ():
        dist.broadcast(tensor, 0)  # on GPUs each process has rounded in its own way
    return net

@torch.no_grad()
def save_reconstructions(vae, images, path, device):
    """Rows of test images, the reconstructions of the posterior's mode below each -> their PSNR in dB."""
    n = min(8, len(images))
    count = n * min(2, len(images) // n)  # whole rows only
    x = torch.stack([to_float(images[i]) for i in torch.linspace(0, len(images) - 1, count).long().tolist()])
    x_hat = torch.cat([vae.decode(vae.encode(part.to(device)).mode()).cpu() for part in x.split(4)])
    x_hat = x_hat.clamp(-1, 1)  # like x (count, 3, S, S)
    save_grid(torch.cat([torch.cat(rows) for rows in zip(x.split(n), x_hat.split(n))]), path, n)
    return (10 * torch.log10(4 / ((x - x_hat) ** 2).mean((1, 2, 3)))).mean().item()

# --- Flags and errors ------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its whole usage first
        raise UserError(f"{message}; see --help")

def inside(value, interval):
    """Is a number in an interval such as "[0, 1)"? NaN and infinity are in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    closed = value == low and interval[0] == "[" or value == high and interval[-1] == "]"
    return abs(value) < 2 ** 63 and (low < value < high or closed)

def flag(name):
    return "--" + name.replace("_", "-")  # image_size -> --image-size

def parse_settings(cls, presets, doc, argv=None):
    """argv -> a Settings: the class's values, under the preset's, under the flags. --image-size for
    image_size, --mcos / --no-mcos for a bool. UserError on unknown flags and on values out of range."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="mini", choices=tuple(presets))
    settings = cls(**{"preset": "mini"} | presets[first.parse_known_args(argv)[0].preset])
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # --help says what a reader of the source sees: the comment beside a setting or below it
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
        value = getattr(settings, setting.name)
        interval = setting.metadata.get("valid", "[0, inf)")
        require(type(value) not in (int, float) or inside(value, interval),
                f"{flag(setting.name)} {value} is not in {interval}; see --help")
    settings.out = settings.out or f"runs/{settings.preset}"
    return settings

def run_script(cls, presets, doc, work):
    """Parse, set up, work(settings, world): the one place where errors end in one line and a status."""
    message, status = "", 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see the top of the script
    # stderr is for our one line: no warnings of libraries, nor of loaders that are torn down
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda broken: None
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        settings = parse_settings(cls, presets, doc)
        if settings.device == "cpu":
            settings.compile = "--compile" in sys.argv  # a CPU compiles only when asked
        work(settings, World(settings.device))
        status = 0
    except KeyboardInterrupt:
        message, status = "interrupted", 128 + signal.SIGINT
    except (UserError, OSError, ValueError) as error:  # of files; of the networks, a size that does not fit
        message, status = one_line(error), getattr(error, "status", 1)
    except (RuntimeError, MemoryError) as error:
        message = one_line(error)
        if isinstance(error, dist.DistError) or "gloo" in message.lower():
            # another process has ended and said why, or it never came
            message = "" if dist.is_initialized() else message
        elif isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "allocate memory" in message:
            message = "the memory is too small: use a smaller --batch-size or --image-size, or more processes"
        elif "DataLoader worker" not in message:  # a loading process that the system has killed
            raise
    if message:
        print(f"{Path(sys.argv[0]).name}: {'error: ' * (status == 1)}{message}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        # the others may wait in a collective: leaving politely would wait with them. And if all went well,
        # destroy_process_group may still wait for ever (torch 2.6: for a thread that waits for Python's lock)
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)

def one_line(error):
    """An error's message; of one from a loading process, which comes with a traceback, the last line's."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    from_worker = lines[1:2] == ["Original Traceback (most recent call last):"]
    return lines[-1].partition(": ")[2] if from_worker else " ".join(lines)

# --- Processes and signals -------------------------------------------------------------------------
class World:
    """The processes that work together: rank, size, device. Plain python is rank 0 of 1; under torchrun they
    join a group, NCCL on CUDA and gloo on CPU."""
    def __init__(self, device="cpu"):
        cuda = torch.cuda.is_available() and device != "cpu"
        require(cuda or device != "cuda", "--device cuda: there is no CUDA GPU here; use --device cpu")
        port = "0" if os.environ.get("WORLD_SIZE", "1") == "1" else ""
        env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": port}
        env = {name: os.environ.get(name, default) for name, default in env.items()}
        numbers = all(re.fullmatch(r"\d{1,5}", text) for text in env.values())
        require(numbers and int(env["RANK"]) < int(env["WORLD_SIZE"]), f"{env} is not what torchrun sets")
        self.rank, self.size, self.local, port = map(int, env.values())
        require("WORLD_SIZE" in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1",
                "srun started processes that do not know of each other: one torchrun a node (see README)")
        self.device = torch.device("cuda", self.local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            # fp32 means TF32 on CUDA, as in the authors' LightningDiT (their tokenizer: convolutions only)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        if self.size > 1:
            where = f"{os.environ.get('MASTER_ADDR')}:{port}"
            self.print(f"waiting up to ten minutes for all {self.size} processes at {where}")
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # or Ctrl-C would wait, too
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # for waits longer than a collective's ten minutes, and for flags that no GPU should wait for
            self.patient = dist.new_group(backend="gloo", timeout=timedelta(hours=6))

    def print(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def barrier(self):
        if self.size > 1:  # in the patient group: one may be downloading, or training the stand-in
            dist.barrier(group=self.patient)

    def mean(self, tensor):
        """The mean of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def share(self, batch_size, accumulate=1):
        """The slice of a global batch that this process works on, in `accumulate` parts."""
        require(batch_size % (self.size * accumulate) == 0, f"--batch-size {batch_size} is not divisible by "
                f"{self.size} process(es) times --accumulate {accumulate}")
        part = batch_size // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    @contextlib.contextmanager
    def first(self):
        """One process of each node goes through the block first (it downloads what is missing)."""
        if self.local > 0:
            self.barrier()
        yield
        if self.local == 0:
            self.barrier()

    def parallel(self, net):
        """The module as training calls it: DistributedDataParallel if there are several processes."""
        if self.size == 1:
            return net
        return DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

class Stop:
    """SIGTERM and Ctrl-C ask to stop: the step is finished and saved. A second Ctrl-C kills."""
    def __init__(self, world):
        self.world, self.asked = world, 0  # the signal's number
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        self.asked = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """Whether to stop after this step: all processes stop at the same one, so they ask each other, in the
        CPU's group, which no GPU waits for."""
        if self.world.size > 1:
            number = torch.tensor(self.asked)
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.world.patient)
            self.asked = int(number)
        return self.asked > 0

    def end(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def leave(self, message):
        stopped = UserError(message)
        stopped.status = 128 + self.asked  # as shells expect
        raise stopped

def step_generator(device, *numbers):
    """A random generator that is a function of the numbers (seed, purpose, step): nothing to save."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

def peak_memory(device):
    """Peak memory so far in GiB: the GPU's allocations, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20

# --- Files -----------------------------------------------------------------------------------------
def atomic_write(path, write):
    """write(file) under a temporary name, flush to disk, rename: the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # what a kill leaves behind is replaced
    try:
        temporary.unlink(missing_ok=True)  # it might be a link
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk's error names no file; torch.save's hides it
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"{path} cannot be written: {reason}; an old file is kept") from error
    finally:
        temporary.unlink(missing_ok=True)

def locked(path):
    """Descriptor of a file, to append to, that this process alone holds until it ends (its loading processes
    do not: lockf, not flock). UserError if another one does."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o666)  # no program
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is writing {path}: wait for it, or use another folder")
    return file

def save_checkpoint(state, path):
    atomic_write(path, lambda file: torch.save(state, file))

def write_json(path, value):
    atomic_write(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))

def read_json(path, *names):
    """A dict with these entries, as check_entries knows them."""
    with reading(path):
        value = {} | json.loads(Path(path).read_text())
    check_entries(value, path, *names)
    return value

def load_checkpoint(path, stage, hint):
    """A checkpoint of ours of this stage: "vae", "dit", "score_net". hint: what to do if it is not there."""
    state = torch_load(path) if Path(path).exists() else None
    fits = isinstance(state, dict) and state.get("stage") == stage
    require(fits, f"{path} is not there, or no {stage} checkpoint: {hint}")
    return state

def resume(path, stage, settings):
    """The state to go on from, or None. UserError lists the settings that differ from the checkpoint's."""
    if settings.fresh or not Path(path).exists():
        return None
    state = load_checkpoint(path, stage, "remove it, or start over with --fresh")
    check_entries(state, path, "step", "total_steps", "settings", "identity")
    # a setting that is younger than the file had its default
    then = {setting.name: setting.default for setting in fields(settings)} | state["settings"]
    now = {setting.name: getattr(settings, setting.name) for setting in fields(settings)
           if setting.metadata.get("same", True)}
    with reading(path):
        changed = [f"{flag(k)} {now[k]!r} (checkpoint: {then[k]!r})" for k in now if now[k] != then[k]]
    require(not changed, f"{path} was made with other settings: {', '.join(changed)}; use those, another "
            "--out, or --fresh to start over")
    return state

def load_optimizer(optimizer, state, path):
    """Restore an optimizer, also on another kind of device: moments in the memory layout of their weights."""
    with reading(path):
        own = dict(optimizer.param_groups[0])
        optimizer.load_state_dict(state)
        optimizer.param_groups[0].update(own)  # rate and betas are the settings', not the file's
        for weight in own["params"] if optimizer.state else ():
            moments = optimizer.state[weight]
            require(moments["step"] > 0, f"{path} is damaged: the step of Adam is not above 0")
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(weight).copy_(moments[name].view_as(weight))
                require(moments[name].isfinite().all(), f"{path} is damaged: {name} of Adam is not finite")

class Log:
    """A line of metrics every so often, CSV and TensorBoard (if installed), and a watch over NaN. A run logs
    the same columns every time."""
    def __init__(self, path, world, step, batch_size):
        self.path, self.world, self.batch_size = Path(path), world, batch_size
        self.bad = {}  # term -> the first step at which it was not finite, kept on the device
        self.then = (time.time(), step)
        self.board = None
        if world.rank > 0:
            return
        self.file = locked(self.path)  # two runs in one folder would mix their files
        with reading(path):
            text = os.pread(self.file, os.fstat(self.file).st_size, 0)
            # a full disk leaves half a line
            whole = re.fullmatch(rb"(step,[\w,.]*(\n\d+,[\w,.+-]*)*(\n[\d,.e+-]*)?)?", text)
            require(whole, f"{path} is damaged, or not this script's: move it away to go on")
            ends = [line.end() for line in re.finditer(rb"(?m)^(\d+),.*\n", text) if int(line[1]) <= step]
            os.truncate(self.file, max(ends, default=0))  # lines after the checkpoint will be written again
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step)

    def watch(self, step, terms):
        """Remember the first step at which a term is not finite. On the device: nothing waits."""
        for name, value in terms.items():
            first = self.bad.get(name, torch.full_like(value, -1, dtype=torch.int64))
            self.bad[name] = torch.where((first < 0) & ~torch.isfinite(value), step, first)

    def check(self, saved, advice, weights=()):
        """UserError if a watched term or a weight is not finite: before a save, so that no file is broken."""
        way_out = f"{advice}; the last good checkpoint, if there is one, is {saved}"
        for step, name in sorted((int(first), name) for name, first in self.bad.items()):
            require(step < 0, f"{name} is not finite at step {step}; {way_out}")
        # the loss was finite, its gradient may not have been
        require(all(torch.isfinite(weight).all() for weight in weights),
                f"a weight is not finite after the last step; {way_out}")

    def write(self, step, values):
        """values {name: scalar} of this process -> their means over all, written as a line of the CSV."""
        device, (then, at) = self.world.device, self.then
        means = self.world.mean(torch.tensor([float(value) for value in values.values()], device=device))
        self.then = (time.time(), step)
        values = dict(zip(values, means.tolist()))
        values["images_per_s"] = self.batch_size * (step - at) / max(time.time() - then, 1e-9)
        values["memory_gib"] = peak_memory(device)
        if self.world.rank == 0:
            header = ",".join(["step", *values]) + "\n"
            old = os.pread(self.file, len(header), 0).decode()
            require(old in ("", header), f"{self.path} has other columns: move it away to go on")
            text = "" if old else header
            # empty: not measured
            cells = ["" if math.isnan(value) else f"{value:.6g}" for value in values.values()]
            with reading(self.path):  # through the one descriptor: closing another would end the lock
                os.write(self.file, (text + ",".join([str(step), *cells]) + "\n").encode())
            for name in values if self.board else ():
                self.board.add_scalar(name, values[name], step)
                self.board.flush()
        return values

class DiskArrays:
    """Arrays (n, *shape) in folder/NAME.npy that several processes fill chunk by chunk, and a killed run goes
    on filling. arrays: {name: (shape of a row, dtype)}; key: what must be equal to go on."""
    def __init__(self, folder, n, chunk, arrays, key, world, fresh=False):
        self.folder, self.world, self.chunk = Path(folder), world, chunk
        self.chunks = [(start, min(start + chunk, n)) for start in range(0, n, chunk)]
        self.note, self.marks = self.folder / "filling.json", self.folder / "marks"
        if world.rank == 0:
            self.prepare(n, arrays, json.loads(json.dumps({"n": n, "chunk": chunk} | key)), fresh)
        world.barrier()

    def prepare(self, n, arrays, key, fresh):
        """The note of what this folder is for, the empty arrays, the marks, in this order: a kill may come
        between any two. UserError if the folder is another's, in use, or damaged."""
        for path in (self.folder / f"{name}.npy" for name in arrays):
            require(self.note.exists() or not path.exists(), f"{path} is not this run's: use another folder")
        self.lock = locked(self.folder / "lock")  # until the process ends
        if self.note.exists() and not fresh:
            made = read_json(self.note)
            other = [f"{k} {made.get(k)!r} (now {key[k]!r})" for k in key if made.get(k) != key[k]]
            require(not other, f"{self.folder} was begun with other settings: {', '.join(other)}; use those, "
                    "or remove the folder")
            if self.marks.exists():
                found = [(a.shape, a.dtype, a.flags.c_contiguous) for a in map(self.array, arrays)]
                whole = found == [((n, *shape), dtype, True) for shape, dtype in arrays.values()]
                marks = self.marks.read_bytes()
                whole = whole and len(marks) == len(self.chunks) and set(marks) <= {0, 1}
                return require(whole, f"{self.folder} is damaged: remove it")
        self.marks.unlink(missing_ok=True)  # else a kill now would leave the old ones
        write_json(self.note, key)
        for name, (shape, dtype) in arrays.items():
            path = self.folder / f"{name}.npy"
            with reading(path):
                np.lib.format.open_memmap(path, "w+", dtype, (n, *shape))
                with open(path, "r+b") as file:  # a full disk is found out now
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        atomic_write(self.marks, lambda file: file.write(bytes(len(self.chunks))))

    def missing(self):
        """This process's chunks (start, stop) that are not done: chunk k is process k mod size's."""
        marks = self.marks.read_bytes()
        mine = range(self.world.rank, len(self.chunks), self.world.size)
        return [self.chunks[k] for k in mine if not marks[k]]

    def count(self):
        """Rows that all processes together have done."""
        return sum(stop - start for (start, stop), mark in zip(self.chunks, self.marks.read_bytes()) if mark)

    def write(self, start, **rows):
        """The chunk from row `start` of every array: its data is on the disk before its mark."""
        for name, values in rows.items():
            array = self.array(name)
            data = np.asarray(values, array.dtype).tobytes()
            self.put(f"{name}.npy", array.offset + start * array[:1].nbytes, data)
        self.put("marks", start // self.chunk, b"\1")

    def put(self, name, offset, data):
        """Bytes into a file, onto the disk. No shared memory map: two nodes on NFS can lose its pages, and on
        a full disk it is a SIGBUS."""
        with reading(self.folder / name), open(self.folder / name, "r+b") as file:
            file.seek(offset)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def array(self, name):
        with reading(self.folder / f"{name}.npy"):
            return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def finish(self):
        """Called by the first process when nothing is missing: the arrays stay, the rest goes."""
        self.remove(self.folder)

    @staticmethod
    def remove(folder, *arrays):
        """Our files in the folder, if it is one of ours, and the folder if nothing is left; the note last."""
        names = [*(f"{name}.npy" for name in arrays), "marks", "lock", "filling.json"]
        for name in names if (folder / "filling.json").exists() else ():
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()

def npz_array(path, name="arr_0"):
    """An array of an .npz. UserError if it is damaged, lacks it, or holds objects."""
    with reading(path, f" than an .npz with {name}"), np.load(path, allow_pickle=False) as archive:
        return np.asarray(archive[name])

# --- Images ----------------------------------------------------------------------------------------
def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0

def to_uint8(images):
    """float in [-1, 1], clipped -> uint8, rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def save_grid(images, path, nrow):
    """images (N, 3, H, W) in [-1, 1] -> a PNG with nrow of them in a row, small ones enlarged."""
    # (3, height, width), two white pixels between images
    grid = torchvision.utils.make_grid(to_uint8(images).cpu(), nrow=nrow, padding=2, pad_value=255)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    picture = ImageOps.scale(picture, max(1, 96 // images.shape[-1]), Image.NEAREST)
    atomic_write(path, lambda file: picture.save(file, "PNG"))

def center_crop(image, size, where=None):
    """ADM's centre crop of an RGB PIL image -> uint8 (3, size, size): halve by box filter while twice too
    large, bicubic to the exact short side, cut out the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    return random_crop(image, size, None, Image.BICUBIC)

def random_crop(image, size, where, method=Image.BILINEAR):
    """The authors' crop for training, (3, size, size): bilinear to the exact short side, then the square at
    `where` (top, left), two uniform numbers in [0, 1); None: in the middle."""
    image = ImageOps.scale(image, size / min(image.size), method)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    if where:
        top, left = int(where[0] * (image.height - size + 1)), int(where[1] * (image.width - size + 1))
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, size, size)

def outline(n, inner=1.0):
    """(2n, 2) points around 0 with radius 1 and `inner` in turn, the first at the top: n = 5 is a star."""
    angle = np.arange(2 * n) * math.pi / n
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1) * np.tile([1.0, inner], n)[:, None]

DISC = outline(24)  # nearly a circle
ANGLE = np.arange(48) * math.pi / 24
HEART = 13 * np.cos(ANGLE) - 5 * np.cos(2 * ANGLE) - 2 * np.cos(3 * ANGLE) - np.cos(4 * ANGLE)
# Outlines in [-1, 1]^2, y downwards. A second one is cut out.
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
    """Picture `index` of set `seed`, an RGB PIL image whose class is index % 10. Ours.
    A flat shape on a flat ground: only the shape tells the class. A pure function of its arguments, so no
    picture depends on worker, batch or order. Drawn four times too large, then averaged."""
    rng = np.random.default_rng([seed, index])
    # 65 to 80 % of the frame, turned by up to 10 degrees, near the middle: so much two cores learn in minutes
    radius, turn = rng.uniform(0.65, 0.8), rng.uniform(-1, 1) * math.pi / 18
    centre = rng.uniform(-0.5, 0.5, 2) * (1 - radius)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    # two shades of orange or of blue, either the dark one: a tokenizer of minutes finds no third hue
    hue = rng.choice([30, 210]) + rng.uniform(-20, 20)
    lightness = rng.permutation([rng.uniform(15, 30), rng.uniform(70, 85)])
    ink, ground = (f"hsl({hue:.0f},60%,{light:.0f}%)" for light in lightness)
    image = Image.new("RGB", (4 * size, 4 * size), ground)
    for points, colour in zip(list(SHAPES.values())[index % len(SHAPES)], (ink, ground)):
        points = (1 + centre + radius * np.asarray(points) @ rotation) * (2 * size)
        ImageDraw.Draw(image).polygon([tuple(point) for point in points], fill=colour)
    return image.reduce(4)

TORCHVISION = {"cifar10": torchvision.datasets.CIFAR10, "fashion-mnist": torchvision.datasets.FashionMNIST,
               "imagenette": torchvision.datasets.Imagenette}

class Images(Dataset):
    """Labelled images: [i] -> crop(image i, size), uint8 (3, S, S). .labels (N,) int64, .classes names,
    .identity a hash of the list of files and classes: a folder may move.
    data: see Settings. split: "train" or "test"."""
    def __init__(self, data, split, image_size, crop=center_crop):
        self.data, self.size, self.crop = data, image_size, crop
        if data == "shapes":
            self.source = range(10_000) if split == "train" else range(10_000, 12_000)  # of set 0, always
            self.classes, labels, names = list(SHAPES), [i % len(SHAPES) for i in self.source], (split,)
        elif data in TORCHVISION:
            self.source = torchvision_set(data, split)
            self.classes = [name[0] if isinstance(name, tuple) else name for name in self.source.classes]
            labels, names = getattr(self.source, "targets", None), (data, split)
            if labels is None:  # Imagenette's: files
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
        """Image i; where (top, left): for a random crop."""
        item = self.source[i]
        if self.data == "shapes":
            item = draw_shape(0, item, self.size)
        elif isinstance(item, tuple):  # of torchvision: image, label
            item = item[0].convert("RGB")
        else:
            item = open_image(item)
        return self.crop(item, self.size, where)
    __getitem__ = load

# of IMG_EXTENSIONS: Pillow would run PostScript, whatever the name
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")

def open_image(path):
    """A file -> an RGB PIL image. UserError names a file that cannot be read."""
    require(os.path.isfile(path), f"cannot read the image {path}: it is not there, or no file")
    with reading(path, " than an image"), Image.open(path, formats=FORMATS) as image:
        require(image.mode != "F", f"{path} is an image of floats, whose range it does not say")
        require(max(image.size) <= 100 * min(image.size), f"{path} is too narrow a strip: {image.size}")
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's conversion clips to white
            image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")

def torchvision_set(data, split):
    """One of torchvision's sets in ./data, downloaded if it is not there."""
    which = {"train": split == "train"}
    if data == "imagenette":
        which = {"split": "train" if split == "train" else "val", "size": "320px"}
    for download in (False, True):
        try:
            return TORCHVISION[data]("data", download=download, **which)
        except (OSError, RuntimeError, AssertionError, ValueError, LookupError) as error:  # or damaged
            reason = one_line(error)
    raise UserError(f"--data {data} is not in ./data and cannot be downloaded: {reason}")

def list_folder(folder, split):
    """DIR/<class>/**/image, or DIR/train and DIR/val -> ([(file, label)], classes): the classes of the
    training images for both. Without a split of its own, every tenth image is a test image."""
    require(folder.is_dir(), f"--data {folder} is neither a folder nor shapes, {', '.join(TORCHVISION)}")
    train = folder / "train" if (folder / "train").is_dir() else folder
    root, pairs = train, []
    if split == "test" and train != folder:
        root = next(filter(Path.is_dir, map(folder.joinpath, ("val", "test", "validation"))), None)
        require(root, f"{folder} has a folder train but none of val, test, validation")
    classes, _ = find_classes(train)
    unknown = sorted(set(find_classes(root)[0]) - set(classes))
    require(not unknown, f"{root} has classes that {train} lacks: {', '.join(unknown[:3])}")
    for label, name in enumerate(classes):
        place = root / name
        # rglob follows no links: a folder that is linked twice would count its images twice
        found = sorted(path for path in place.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        above = root.resolve().is_relative_to(place.resolve())  # a link, to where it stands or further up
        require(not above and (found or root != train), f"the class folder {place} has no images of its own")
        pairs += [(path, label) for path in found]
    if train == folder:
        pairs = [pair for i, pair in enumerate(pairs) if (i % 10 == 9) == (split == "test")]
    require(pairs, f"--data {folder} has too few images in class folders to split (10 or more)")
    return pairs, classes

@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=step_generator("cpu", seed, "order", epoch))

def batch_indices(n, batch_size, step, seed):
    """Indices (batch_size,) of training step `step`, from 0: within an epoch none twice and none lost.
    The epochs' orders stand one behind the other and are cut into batches: a function of (seed, step)."""
    place = torch.arange(step * batch_size, (step + 1) * batch_size)  # in the epochs' orders, all in a row
    epochs = range(int(place[0]) // n, int(place[-1]) // n + 1)
    return torch.cat([epoch_order(n, seed, epoch)[place[place // n == epoch] % n] for epoch in epochs])

class ImageBatches(Dataset):
    """[step] -> this process's share of the step's images, uint8 (b, 3, S, S), cropped and mirrored."""
    def __init__(self, images, settings, share):
        self.images, self.settings, self.share = images, settings, share

    def __getitem__(self, step):
        s = self.settings
        index = batch_indices(len(self.images), s.batch_size, step, s.seed)[self.share]
        # three uniform numbers an image: mirrored or not, top and left of the crop
        generator = step_generator("cpu", s.seed, "crop", step)
        chance = torch.rand(s.batch_size, 3, generator=generator)[self.share]  # (b, 3)
        x = torch.stack([self.images.load(i, c[1:]) for i, c in zip(index.tolist(), chance.tolist())])
        if s.flip:
            x = torch.where(chance[:, :1, None, None] < 0.5, x.flip(3), x)
        return x

def loader(data, workers, device, **order):
    """Iterator over a DataLoader's batches, read ahead by `workers` processes (0: this one). order: its
    sampler. Signals wait while they start, and never reach them: a stop is the parent's business."""
    options = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    if workers:  # fork: Python 3.14's default would have to pickle memory maps
        options |= {"prefetch_factor": 4, "multiprocessing_context": "fork"}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return iter(DataLoader(data, **order, **options))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

if __name__ == "__main__":
    run_script(Settings, PRESETS, __doc__, train)
