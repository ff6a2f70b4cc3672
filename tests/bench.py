"""What the system costs: FLOPs on paper, and time and memory on this machine. Nothing is downloaded.

    python tests/bench.py flops                        Table A4, and GFLOPs of every LightningDiT
    python tests/bench.py tokenizer --batch-size 32    a training step without and with VF loss
    python tests/bench.py dit --batch-size 128         a training step, and hours for 64 and 800 epochs
    python tests/bench.py sample                       images/s, guided everywhere and in the interval only
    python tests/bench.py read                         latents at random, against opening a safetensors file
    python tests/bench.py memory                       what a training step of the tokenizer keeps, on paper

tokenizer, dit, sample and memory take the flags of train_vae.py, train_dit.py and sample.py, too; their
preset here is imagenet256. The first two run under torchrun as well. No pytest file; tests/test_bench.py
tests it.
"""
import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sample
import train_dit
import train_vae
from dit import SIZES, LightningDiT
from vae import SPECS, AutoencoderKL

IMAGENET = 1_281_167
LATENT = (32, 16, 16)   # f16d32 at 256x256
# Dense bf16 TFLOP/s, from the makers' data sheets
PEAK = {"H100": 989, "H200": 989, "H800": 989, "A100": 312, "B200": 2250}


class DINOv2Shaped(nn.Module):
    """torchvision's ViT in the shape of DINOv2-L/14 with random weights: the same work, no download."""
    width = 1024

    def __init__(self, grid=16):
        super().__init__()
        self.side = 14 * grid
        self.vit = torchvision.models.VisionTransformer(self.side, 14, num_layers=24, num_heads=16,
                                                        hidden_dim=1024, mlp_dim=4096)

    @torch.no_grad()
    def forward(self, x, grid):
        """x (B, 3, H, W), grid (h, w) -> patch features (B, 1024, h, w)."""
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        tokens = self.vit._process_input(x)   # (B, h w, 1024)
        tokens = torch.cat([self.vit.class_token.expand(len(x), -1, -1), tokens], dim=1)
        return self.vit.encoder(tokens)[:, 1:].mT.reshape(len(x), 1024, *grid)


def count_flops(network, *inputs):
    """FLOPs of a forward pass, counted by torch on meta tensors: no memory, no weights."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops()


def dit_flops(arch):
    """FLOPs of a LightningDiT's forward pass of one latent."""
    with torch.device("meta"):
        x = torch.zeros(1, arch["in_channels"], arch["input_size"], arch["input_size"])
        return count_flops(LightningDiT(**arch).eval(), x, torch.zeros(1), torch.zeros(1, dtype=torch.long))


def flops(flags):
    """Table A4 and every LightningDiT, by the convention that gives the paper's numbers: a multiply-add is 2;
    convolutions and matrix products only; training = 3 x a forward pass (forward; backward for inputs and for
    weights); VA-VAE adds a forward pass of DINOv2-L/14 at 224x224. LPIPS, the discriminator and Eq. 4's
    backward pass are in neither row of the paper."""
    with torch.device("meta"):
        x = torch.zeros(1, 3, 256, 256)
        vae = count_flops(AutoencoderKL(**SPECS["f16d32"]), x) / 1e9
        teacher = count_flops(DINOv2Shaped(), torch.zeros(1, 3, 224, 224), (16, 16)) / 1e9
    print("Table A4, f16d32 at 256x256, GFLOPs an image     ours   paper")
    print(f"inference (encode + decode)                   {vae:7.1f}     390")
    print(f"training, LDM = 3 x inference                 {3 * vae:7.1f}    1170")
    print(f"training, VA-VAE = LDM + DINOv2-L's forward   {3 * vae + teacher:7.1f}    1325")
    print("\nLightningDiT with patch size 1 on 32x16x16, GFLOPs an image   forward   training")
    for size in ("B", "L", "XL", "1.0B", "1.6B"):
        forward = dit_flops({"input_size": 16, "patch_size": 1, "in_channels": 32, **SIZES[size]}) / 1e9
        print(f"{size:60s} {forward:8.0f} {3 * forward:10.0f}")


def parse(module, flags, own):
    """Flags of a script and of this file ({flag: default}) -> (the script's Settings, the values of own)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, value in own.items():
        parser.add_argument(name, type=type(value), default=value)
    own, flags = parser.parse_known_args(flags)
    if "--preset" not in flags:
        flags = ["--preset", "imagenet256", *flags]
    return train_vae.parse_settings(module.Settings, module.PRESETS, module.__doc__, flags), own


def median_step(step, args, repeat, world, title, warmup=3):
    """Median seconds of step(*args) and peak memory in GiB. The first ones compile and choose algorithms."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    marks = []
    for _ in tqdm(range(warmup + repeat + 1), title, unit="step", disable=world.rank > 0):
        step(*args)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    return statistics.median(np.diff(marks)[warmup:]), train_vae.peak_memory(world.device)


def device_name(world):
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    return f"{name} x {world.size}"


def tokenizer(flags):
    """A training step on synthetic images, discriminator included, without and with VF loss, which by the
    paper adds 13 % of FLOPs [Table A4]. --repeat 10: steps measured; all flags of train_vae.py."""
    s, own = parse(train_vae, flags, {"--repeat": 10})
    s.disc_start = 0
    world = train_vae.World(s.device)
    grid = s.image_size // 2 ** (len(SPECS[s.spec]["ch_mult"]) - 1)
    share = world.share(s.batch_size)
    b = share.stop - share.start
    x = torch.rand(b, 3, s.image_size, s.image_size, device=world.device) * 2 - 1
    noise = torch.randn(b, SPECS[s.spec]["embed_dim"], grid, grid, device=world.device)
    seconds = {}
    for vf in ("none", "VF loss"):
        teacher = DINOv2Shaped(grid).to(world.device) if vf != "none" else None
        run = train_vae.Run(s, world, teacher, pretrained=False)
        seconds[vf], memory = median_step(train_vae.train_step, (run, x, noise, 0), own.repeat, world, vf)
        if world.rank == 0:
            print(f"{vf:8s} {1e3 * seconds[vf]:9.1f} ms a step, {s.batch_size / seconds[vf]:8.1f} images/s, "
                  f"peak memory {memory:.2f} GiB")
        run = None   # or its memory would count as the next one's
    if world.rank == 0:
        print(f"VF loss adds {100 * (seconds['VF loss'] / seconds['none'] - 1):.1f} % to the step ({s.spec}, "
              f"{s.image_size}x{s.image_size}, batch {s.batch_size}, {s.precision}, compile {s.compile}, "
              f"accumulate {s.accumulate}, checkpointing {s.checkpointing}, {device_name(world)}; "
              f"medians of {own.repeat})")


def dit(flags):
    """A training step on synthetic latents of f16d32 at 256x256, and what it means for ImageNet. --repeat 20:
    steps measured; all flags of train_dit.py."""
    s, own = parse(train_dit, flags, {"--repeat": 20})
    world = train_vae.World(s.device)
    share = world.share(s.batch_size)
    b = share.stop - share.start
    arch = train_dit.architecture(s, LATENT, 1000)
    run = train_dit.Run(s, arch, world)
    x1 = torch.randn(b, *LATENT, device=world.device)
    y = torch.randint(1000, (b,), device=world.device)
    t, x0, drop = (v[share] for v in train_dit.draw(s, 0, 0.0, LATENT, world.device))
    seconds, memory = median_step(run.step, (x1, y, t, x0, drop, False), own.repeat, world, "dit")
    if world.rank > 0:
        return
    rate, work = s.batch_size / seconds, 3 * dit_flops(arch)
    teraflops = rate * work / 1e12 / world.size
    peak = next((value for name, value in PEAK.items() if name in device_name(world)), None)
    used = f" = {100 * teraflops / peak:.1f} % of {peak}" if peak else ""
    print(f"{s.size}/{s.patch_size}, batch {s.batch_size}, {'bf16' if run.bf16 else 'fp32'}, "
          f"compile {s.compile}, accumulate {s.accumulate}, checkpointing {s.checkpointing}, "
          f"{device_name(world)}; median of {own.repeat} steps: {1e3 * seconds:.1f} ms, {rate:.1f} images/s")
    print(f"{work / 1e9:.0f} GFLOP an image, {teraflops:.2f} TFLOP/s a device{used}; "
          f"peak memory {memory:.2f} GiB")
    for epochs in (64, 800):
        hours = epochs * IMAGENET / rate / 3600
        scaled = ", ".join(f"{hours * world.size / n:.0f} h on {n}" for n in sorted({world.size, 8, 32}))
        print(f"{epochs} epochs of ImageNet: {scaled} such devices, if they scale perfectly")


def sampling(flags):
    """A whole batch, noise to images, with random weights: guided at all times and in the interval only,
    compiled and not. --size XL --patch 1: the LightningDiT; all flags of sample.py."""
    s, own = parse(sample, flags, {"--size": "XL", "--patch": 1})
    world = train_vae.World(s.device)
    # An untrained network's velocity is 0 (adaLN-Zero), which changes no time.
    arch = {"input_size": LATENT[1], "patch_size": own.patch, "in_channels": LATENT[0], **SIZES[own.size]}
    model = LightningDiT(**arch).to(world.device).eval().requires_grad_(False)
    vae = AutoencoderKL(**SPECS["f16d32"]).to(world.device).eval().requires_grad_(False)
    zero = torch.zeros(1, LATENT[0], 1, 1, device=world.device)
    system = SimpleNamespace(model=model, tokenizer=vae, mean=zero, std=zero + 1, shape=LATENT, listed=[],
                             classes=range(1000), device=world.device, dit="random", vae="random")
    indices, grid = range(s.batch_size), sample.time_grid(s)
    for compiled in ((False, True) if s.compile else (False,)):
        if compiled:
            system.model = torch.compile(model)
        for start in sorted({0.0, s.cfg_interval_start}):
            job = replace(s, cfg_interval_start=start)
            # Both kinds of step are compiled here: 8 points lie on both sides of the interval's start.
            sample.sample_unit(system, job, indices, sample.time_grid(replace(s, steps=8)))
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            sample.sample_unit(system, job, indices, grid)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            rate = s.batch_size / (time.perf_counter() - begin)
            halves = 1 + (s.cfg_scale != 1) * float((grid[:-1] >= start).float().mean())
            print(f"{own.size}/{own.patch}, {s.precision}, {'compiled' if compiled else 'eager'}, "
                  f"{device_name(world)}, guidance from t = {start}: {rate:.3f} images/s, "
                  f"{halves * (len(grid) - 1):.0f} forward passes an image", flush=True)


def read(flags):
    """Latents of 32x16x16, each once in random order: train_dit.py's memory map, and the authors' way, which
    opens the shard for each of them. --num 20000 latents take 1.3 GB of disk for a while."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--num", type=int, default=20_000)
    n, rng = parser.parse_args(flags).num, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        z = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, (n, 2, *LATENT))
        for i in range(0, n, 500):
            z[i:i + 500] = rng.standard_normal((1, 2, *LATENT), dtype=np.float32)
        np.save(folder / "labels.npy", np.arange(n))
        meta = {"fingerprint": "", "identity": "", "image_size": 256, "shape": LATENT,
                "classes": ["a"], "mean": [0.0] * LATENT[0], "std": [1.0] * LATENT[0]}
        (folder / "latents.json").write_text(json.dumps(meta))
        for k in range(0, n, 10_000):
            shard = torch.from_numpy(z[k:k + 10_000])
            save_file({"latents": shard[:, 0].contiguous(), "latents_flip": shard[:, 1].contiguous(),
                       "labels": torch.arange(len(shard)) + k}, folder / f"{k}.safetensors")
        latents = train_dit.Latents(folder)
        order, flip = torch.from_numpy(rng.permutation(n)), torch.from_numpy(rng.integers(0, 2, n))
        ours, theirs = [], []
        for index, side in zip(order.split(500), flip.split(500)):
            begin = time.perf_counter()
            latents.read(index, side)
            ours.append(len(index) / (time.perf_counter() - begin))
            begin = time.perf_counter()
            for i, flipped in zip(index[:50].tolist(), side[:50].tolist()):
                with safe_open(str(folder / f"{i // 10_000 * 10_000}.safetensors"), "pt") as shard:
                    row = slice(i % 10_000, i % 10_000 + 1)
                    shard.get_slice("latents_flip" if flipped else "latents")[row]
                    shard.get_slice("labels")[row]
            theirs.append(len(index[:50]) / (time.perf_counter() - begin))
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    print(f"{n} latents at random: {ours:,.0f} items/s from the memory map, {theirs:,.0f} items/s from "
          f"safetensors files opened for each: {ours / theirs:.1f} times as many")
    return ours / theirs


def kept_by_autograd(s, batch):
    """Settings of train_vae.py, images at once -> bytes that autograd keeps of a step until the backward
    pass, and the most that one level of the network adds. Distinct storages on meta tensors, weights left
    out."""
    class Forwards(Exception):
        """The forward pass is done."""

    def done(*args, **kwargs):
        raise Forwards

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage   # held, or its address would be another's
        return tensor

    def count():
        return sum(storage.nbytes() for storage in kept.values())

    def watched(forward):
        def call(*args):
            before = count()
            out = forward(*args)
            levels.append(count() - before)
            return out
        return call
    teacher = SimpleNamespace(width=1024)
    run = train_vae.Run(replace(s, compile=False), train_vae.World("cpu"), teacher, pretrained=False)
    run.opt = run.opt_disc = SimpleNamespace(zero_grad=done)   # train_step calls it before its backward pass
    run.foundation = lambda x, grid: torch.empty(len(x), 1024, *grid, device="meta")
    vae, nets = run.tokenizer.vae, [net for net in (run.tokenizer, run.lpips, run.disc) if net is not None]
    tensors = [t for net in nets for t in [*net.to("meta").parameters(), *net.buffers()]]
    weights, kept, levels = {t.untyped_storage()._cdata for t in tensors}, {}, []
    for level in [*vae.encoder.down, *vae.decoder.up]:
        level.forward = watched(level.forward)
    x = torch.empty(batch, 3, s.image_size, s.image_size, device="meta")
    noise = torch.empty(batch, vae.embed_dim, s.image_size // vae.f, s.image_size // vae.f, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), contextlib.suppress(Forwards):
        train_vae.train_step(run, x, noise, s.disc_start)
    return count(), max(levels)


def memory(flags):
    """What autograd keeps of a training step of the tokenizer with LPIPS and discriminator, without and with
    --checkpointing, which computes one level again at a time; with --accumulate also of 32 images in so many
    parts, at most. All flags of train_vae.py."""
    s, own = parse(train_vae, flags, {"--at-once": "1,4,8,32"})
    print(f"{s.spec}, {s.image_size}x{s.image_size}, {s.precision}: GiB that autograd keeps\n"
          "images at once    plain   --checkpointing")
    for batch in map(int, own.at_once.split(",")):
        plain, level = kept_by_autograd(replace(s, checkpointing=False, accumulate=1), batch)
        inputs, _ = kept_by_autograd(replace(s, checkpointing=True, accumulate=1), batch)
        print(f"{batch:14d} {plain / 2 ** 30:8.2f} {(inputs + level) / 2 ** 30:17.2f}")
        if s.accumulate > 1 and batch * s.accumulate == 32:
            # what goes in and comes out of the networks for 32 images, and all of one part
            kept, _ = kept_by_autograd(replace(s, checkpointing=False), 32)
            found = [(kept + part) / 2 ** 30 for part in (plain, inputs + level)]
            print(f"32 images in {s.accumulate} parts: {found[0]:.2f}, with --checkpointing {found[1]:.2f}")
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoencoderKL(**SPECS[s.spec]).parameters())
    print(f"and once: {16 * weights / 2 ** 30:.2f} GiB of weights, gradients, Adam's moments; "
          "DINOv2-L 1.1 GiB")


COMMANDS = {"flops": flops, "tokenizer": tokenizer, "dit": dit, "sample": sampling, "read": read,
            "memory": memory}


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, work in COMMANDS.items():
        commands.add_parser(name, description=work.__doc__, help=" ".join(work.__doc__.split(".")[0].split()))
    args, flags = parser.parse_known_args(argv)
    COMMANDS[args.command](flags)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
