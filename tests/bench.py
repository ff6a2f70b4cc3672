"""What the system costs: FLOPs on paper, and time and memory on this machine. Nothing is downloaded.

    python tests/bench.py flops                        Table A4, and GFLOPs of every LightningDiT
    python tests/bench.py tokenizer --batch-size 32    a training step without and with VF loss
    python tests/bench.py dit --batch-size 128         a training step, and hours for 64 and 800 epochs
    python tests/bench.py sample                       images/s, guided everywhere and in the interval only
    python tests/bench.py read                         latents at random, against opening a safetensors file
    python tests/bench.py memory                       what a training step of the tokenizer keeps, on paper
    python tests/bench.py all --seconds 240            everything a GPU is asked, in one table

tokenizer, dit, sample and memory also take the flags of train_vae.py, train_dit.py and sample.py; their
preset is imagenet256 here. The first two run under torchrun as well. tests/test_bench.py tests this file.
"""
import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sample
import train_dit
import train_vae
from dit import SIZES, LightningDiT
from fid import FIDInception
from vae import SPECS, AutoencoderKL
from vf_loss import HALF, FoundationModel

IMAGENET = 1_281_167
LATENT = (32, 16, 16)  # f16d32 at 256x256
# dense bf16 TFLOP/s, from the makers' data sheets
PEAK = {"H100": 989, "H200": 989, "H800": 989, "A100": 312, "B200": 2250}

def dinov2_shaped(grid=16, layers=24, width=1024):
    """torchvision's ViT in the shape of DINOv2-L/14 with random weights: the same work, no download. It is a
    FoundationModel, so it runs as in training: in bf16 on CUDA."""
    vit = torchvision.models.VisionTransformer(14 * grid, 14, layers, width // 64, width, 4 * width)

    def tokens(net, x):
        f = net._process_input(x)  # (B, N, width)
        f = torch.cat([net.class_token.expand(len(x), -1, -1), f], dim=1)
        return net.encoder(f)[:, 1:].mT.unflatten(2, (grid, grid))  # (B, width, h, w)
    return FoundationModel(vit, tokens, width, 14, HALF, HALF)

# --- FLOPs on paper --------------------------------------------------------------------------------
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

def eq4_flops(vae, x):
    """FLOPs of Eq. 4's pass for L_rec, without LPIPS: back to encoder.conv_out through decoder and
    quant_conv."""
    def pass_back(counter):
        x_hat, _, _ = vae(x)
        with counter:
            torch.autograd.grad((x - x_hat).abs().sum(), vae.encoder.conv_out.weight)
    pass_back(contextlib.nullcontext())  # compiles whatever is compiled
    counter = FlopCounterMode(display=False)
    pass_back(counter)
    return counter.get_total_flops()

def flops(flags):
    """Table A4 and every LightningDiT, by the convention that gives the paper's numbers: a multiply-add is 2;
    convolutions and matrix products only; training = 3 x a forward pass (forward; backward for inputs and for
    weights); VA-VAE adds a forward pass of DINOv2-L/14 at 224x224. LPIPS, the discriminator and Eq. 4's
    backward pass are in neither row of the paper."""
    with torch.device("meta"):
        x, net = torch.zeros(1, 3, 256, 256), AutoencoderKL(**SPECS["f16d32"])
        vae, eq4 = count_flops(net, x) / 1e9, eq4_flops(net, x) / 1e9
        teacher = count_flops(dinov2_shaped(), torch.zeros(1, 3, 224, 224), (16, 16)) / 1e9
    print("Table A4, f16d32 at 256x256, GFLOPs per image    ours   paper")
    print(f"inference (encode + decode)                   {vae:7.1f}     390")
    print(f"training, LDM = 3 x inference                 {3 * vae:7.1f}    1170")
    print(f"training, VA-VAE = LDM + DINOv2-L's forward   {3 * vae + teacher:7.1f}    1325")
    print(f"Eq. 4's pass to encoder.conv_out, no LPIPS    {eq4:7.1f}       -")
    print("\nLightningDiT with patch size 1 on 32x16x16, GFLOPs per image   forward   training")
    for size in ("B", "L", "XL", "1.0B", "1.6B"):
        forward = dit_flops({"input_size": 16, "patch_size": 1, "in_channels": 32, **SIZES[size]}) / 1e9
        print(f"{size:60s} {forward:8.0f} {3 * forward:10.0f}")

# --- Time and memory: what is measured --------------------------------------------------------------
def synchronize(world):
    if world.device.type == "cuda":
        torch.cuda.synchronize()

def measure(step, repeat, world, seconds=math.inf, warmup=3):
    """Time step() -> {"first": seconds of the warm-up, which compiles and chooses algorithms; "seconds": the
    median of at most `repeat` steps, as many as fit into `seconds`, at least one; "memory": peak in GiB}."""
    begin = time.perf_counter()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warmup):
        step()
    synchronize(world)
    marks = [time.perf_counter()]
    while len(marks) == 1 or (len(marks) <= repeat and marks[-1] - marks[0] < seconds):
        step()
        synchronize(world)
        marks.append(time.perf_counter())
    return {"first": marks[0] - begin, "seconds": statistics.median(np.diff(marks)),
            "memory": train_vae.peak_memory(world.device)}

def tokenizer_step(s, world, vf, channels_last=True):
    """Settings of train_vae.py -> a training step on synthetic images, discriminator included."""
    grid = s.image_size // 2 ** (len(SPECS[s.spec]["ch_mult"]) - 1)
    shape = {"layers": 1, "width": 64} if s.spec.startswith("mini") else {}
    with world.device:  # weights are drawn there, which takes a CPU many seconds
        teacher = dinov2_shaped(grid, **shape) if vf else None
        run = train_vae.Run(s, world, teacher, pretrained=False)
    for net in (run.tokenizer, run.lpips, run.disc) if not channels_last else ():
        net.to(memory_format=torch.contiguous_format)
    share = world.share(s.batch_size, s.chunks)
    b = share.stop - share.start
    x = torch.rand(b, 3, s.image_size, s.image_size, device=world.device) * 2 - 1
    noise = torch.randn(b, SPECS[s.spec]["embed_dim"], grid, grid, device=world.device)
    return lambda: train_vae.train_step(run, x, noise, s.disc_start)

def dit_step(s, world):
    """Settings of train_dit.py -> a training step on synthetic latents, and its FLOPs per image."""
    share = world.share(s.batch_size, s.accumulate)
    arch = train_dit.architecture(s, LATENT, 1000)
    with world.device:
        run = train_dit.Run(s, arch, world)
    x1 = torch.randn(share.stop - share.start, *LATENT, device=world.device)
    y = torch.randint(1000, (len(x1),), device=world.device)
    t, x0, drop = (v[share] for v in train_dit.draw(s, 0, 0.0, LATENT, world.device))
    return lambda: run.step(x1, y, t, x0, drop, False), 3 * dit_flops(arch)

def sample_times(s, world, size, patch, spec, seconds=math.inf):
    """Settings of sample.py -> seconds of an evaluation of LightningDiT for a batch, {1: without guidance, 2:
    with both halves}, of decoding the batch, and of everything before. Weights are random: an untrained
    network's velocity is 0 (adaLN-Zero), which changes no time. Few steps are timed, not 249."""
    arch = {"input_size": LATENT[1], "patch_size": patch, "in_channels": LATENT[0], **SIZES[size]}
    begin, device = time.perf_counter(), world.device
    with device:
        model = LightningDiT(**arch).eval().requires_grad_(False)
        vae = AutoencoderKL(**SPECS[spec]).eval().requires_grad_(False)
    for block in model.blocks if s.compile else ():
        block.compile(dynamic=False)  # as sample.py does
    zero = torch.zeros(1, LATENT[0], 1, 1, device=device)
    system = SimpleNamespace(model=model, tokenizer=vae, mean=zero, std=zero + 1, shape=LATENT, listed=[],
                             classes=range(1000), device=device, dit="random", vae="random")
    halves, first, ts = {}, time.perf_counter() - begin, torch.linspace(0.5, 1, 3)  # two evaluations of Euler
    with torch.inference_mode():
        x, y = sample.draw(system, s, range(s.batch_size))
        for n, scale in ((1, 1.0), (2, 2.0)):
            job = replace(s, integrator="euler", cfg_scale=scale, cfg_interval_start=0.0)
            found = measure(lambda job=job: sample.integrate(system, job, x, y, ts), 5, world, seconds / 4, 2)
            halves[n], first = found["seconds"] / 2, first + found["first"]
        found = measure(lambda: sample.decode(system, x), 3, world, seconds / 4, 1)
    return halves, found["seconds"], first + found["first"]

def sampling_rate(s, halves, decoding, start):
    """Images per second of sample.py's own time grid, guided from t = start, from the times of its parts."""
    ts = sample.time_grid(s)[:-1]
    guided = int((ts >= start).sum()) if s.cfg_scale != 1 else 0
    return s.batch_size / (guided * halves[2] + (len(ts) - guided) * halves[1] + decoding)

def inception_step(batch, size, world):
    """Inception's features of uint8 images; fid.py runs it in full fp32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                          init_weights=False)
    net = FIDInception(net.state_dict()).to(world.device)
    x = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=world.device)
    return torch.no_grad()(lambda: net(x))

def profile(step, steps, world, rows=12):
    """The kernels (on a CPU the operators) that take most of a step's time, as a Markdown table."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    key, cuda = "self_cpu_time_total", world.device.type == "cuda"
    if cuda:
        kinds, key = [torch.profiler.ProfilerActivity.CUDA], "self_device_time_total"
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(steps):
            step()
        synchronize(world)
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    print("\n| kernel or operator | calls per step | ms per step | share |\n|---|---|---|---|")
    for event in events[:rows]:
        print(f"| {event.key[:90]} | {event.count / steps:.1f} | {getattr(event, key) / 1e3 / steps:.2f} | "
              f"{100 * getattr(event, key) / total:.1f} % |")

# --- The table and the commands ---------------------------------------------------------------------
def device_name(world):
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    return f"{name} x {world.size}"

def head(world, command):
    world.print(f"{device_name(world)}, torch {torch.__version__}, `python tests/bench.py {command}`\n\n"
                "| measured | warm-up, s | ms per step | images/s | TFLOP/s per device | of peak | GiB |\n"
                "|---|---|---|---|---|---|---|")

def row(world, title, found, batch, work=0):
    """Print a row of the table; found: what measure() found; work: FLOPs per image -> images per second."""
    rate, peak = batch / found["seconds"], next((v for k, v in PEAK.items() if k in device_name(world)), 0)
    tera = rate * work / 1e12 / world.size
    used = f"{100 * tera / peak:.1f} %" if peak and work else "-"
    memory = f"{found['memory']:.2f}" if "memory" in found else "-"
    world.print(f"| {title} | {found['first']:.1f} | {1e3 * found['seconds']:.1f} | {rate:.4g} | "
                f"{f'{tera:.2f}' if work else '-'} | {used} | {memory} |")
    return rate

def parse(module, flags, own):
    """Flags of a script and of this file ({flag: default}) -> (the script's Settings, the values of own)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, value in own.items():
        parser.add_argument(name, type=type(value), default=value)
    own, flags = parser.parse_known_args(flags)
    if "--preset" not in flags:
        flags = ["--preset", "imagenet256", *flags]
    return train_vae.parse_settings(module.Settings, module.PRESETS, module.__doc__, flags), own

def tokenizer_row(s, world, repeat, seconds=math.inf, vf=True, channels_last=True):
    title = (f"{s.spec}, batch {s.batch_size}, {s.precision}, compile {s.compile}, "
             f"{'' if vf else 'no '}VF loss{'' if channels_last else ', not channels_last'}")
    found = measure(tokenizer_step(s, world, vf, channels_last), repeat, world, seconds)
    return row(world, title, found, s.batch_size)

def dit_row(s, world, repeat, seconds=math.inf):
    step, work = dit_step(s, world)
    title = (f"{s.size}/{s.patch_size}, batch {s.batch_size}, {s.precision}, compile {s.compile}, "
             f"checkpointing {s.checkpointing}")
    return row(world, title, measure(step, repeat, world, seconds), s.batch_size, work)

def sampling_rows(s, world, size, patch, spec, seconds=math.inf):
    halves, decoding, first = sample_times(s, world, size, patch, spec, seconds)
    for start in sorted({0.0, s.cfg_interval_start}):
        found = {"first": first, "seconds": s.batch_size / sampling_rate(s, halves, decoding, start)}
        row(world, f"sampling {size}/{patch}, {s.precision}, guidance from t = {start}", found, s.batch_size)

def tokenizer(flags):
    """A training step on synthetic images, discriminator included, without and with VF loss, which by the
    paper adds 13 % of FLOPs [Table A4]. --repeat 10: steps measured; all flags of train_vae.py."""
    s, own = parse(train_vae, flags, {"--repeat": 10})
    s.disc_start, world = 0, train_vae.World(s.device)
    head(world, " ".join(["tokenizer", *flags]))
    none, full = (tokenizer_row(s, world, own.repeat, vf=vf) for vf in (False, True))
    world.print(f"\nVF loss adds {100 * (none / full - 1):.1f} % to the step")

def dit(flags):
    """A training step on synthetic latents of f16d32 at 256x256, and what it means for ImageNet. --repeat 20:
    steps measured; all flags of train_dit.py."""
    s, own = parse(train_dit, flags, {"--repeat": 20})
    world = train_vae.World(s.device)
    head(world, " ".join(["dit", *flags]))
    rate = dit_row(s, world, own.repeat)
    for epochs in (64, 800):
        hours = epochs * IMAGENET / rate / 3600
        scaled = ", ".join(f"{hours * world.size / n:.0f} h on {n}" for n in sorted({world.size, 8, 32}))
        world.print(f"{epochs} epochs of ImageNet: {scaled} such devices, if they scale perfectly")

def sampling(flags):
    """From noise to images with random weights, guided at all times and in the interval only. A few steps are
    timed, and the rate of all --sampling-steps is computed from them. --size XL --patch 1 --spec f16d32: the
    networks; all flags of sample.py."""
    s, own = parse(sample, flags, {"--size": "XL", "--patch": 1, "--spec": "f16d32"})
    world = train_vae.World(s.device)
    head(world, " ".join(["sample", *flags]))
    sampling_rows(s, world, own.size, own.patch, own.spec)

def everything(flags):
    """All that a GPU is asked, in order of importance: the training step of LightningDiT-XL/1, the
    tokenizer's, sampling, Inception, and a profile. Each part has a share of --seconds; if less is left than
    the quickest measurement of the part took, the rest of it is skipped. On a CPU the same with mini
    networks. A measurement that fails prints its traceback, the others go on, and the exit status is 1."""
    parser = argparse.ArgumentParser(prog="bench.py all", description=everything.__doc__)
    parser.add_argument("--seconds", type=float, default=240)
    seconds, world = parser.parse_args(flags).seconds, train_vae.World("auto")
    cuda = world.device.type == "cuda"
    if cuda:
        dits, images = train_dit.Settings(batch_size=128), train_vae.Settings(batch_size=32, disc_start=0)
        samples, spec, pictures = sample.Settings(), "f16d32", 64
    else:
        dits = train_dit.Settings(size="mini-XS", patch_size=4, batch_size=2)
        images = train_vae.Settings(spec="mini-f4d4", image_size=32, batch_size=4, disc_start=0,
                                    lpips_weight=0.0)
        samples, spec, pictures = sample.Settings(batch_size=2), "mini-f2d32", 1

    def train_dit_job(**changes):
        return lambda left: dit_row(replace(dits, **changes), world, 20, left)

    def train_vae_job(vf=True, channels_last=True, **changes):
        return lambda left: tokenizer_row(replace(images, **changes), world, 10, left, vf, channels_last)

    def sample_job(precision):
        return lambda left: sampling_rows(replace(samples, precision=precision), world, dits.size,
                                          dits.patch_size, spec, left)

    def inception_job(left):
        step = inception_step(pictures, images.image_size, world)
        row(world, "Inception, fp32", measure(step, 10, world, left, 1), pictures)

    def profile_job(left):
        step, _ = dit_step(dits, world)
        measure(step, 1, world)
        profile(step, 10, world)
    # (share of the time, measurements); what is compiled by default is what training compiles on CUDA
    parts = [(0.3, [train_dit_job(compile=False), train_dit_job(), train_dit_job(checkpointing=True)]),
             (0.4, [train_vae_job(), train_vae_job(vf=False), train_vae_job(precision="bf16"),
                    train_vae_job(compile=False), train_vae_job(channels_last=False),
                    train_vae_job(channels_last=False, precision="bf16"),
                    train_vae_job(batch_size=images.batch_size // 2),
                    train_vae_job(batch_size=images.batch_size // 4)]),
             (0.15, [sample_job("fp32"), sample_job("bf16")]), (0.05, [inception_job]), (0.1, [profile_job])]
    head(world, " ".join(["all", *flags]))
    begin = until = time.perf_counter()
    failed = 0
    for share, jobs in parts:
        until, took = until + share * seconds, []
        for job in jobs:
            start = time.perf_counter()
            if start + min(took, default=0) > until:
                world.print("| skipped, for lack of time | | | | | | |")
                continue
            torch.compiler.reset()
            # Inception's measurement, like fid.py, switches TF32 off
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            try:
                job((until - start) / 3)
            except Exception:  # noqa: BLE001 - one bug should not cost a GPU's fifteen minutes
                failed += 1
                traceback.print_exc()
            gc.collect()  # or its memory would count as the next one's
            if cuda:
                torch.cuda.empty_cache()
            took.append(time.perf_counter() - start)
    world.print(f"\n{time.perf_counter() - begin:.0f} s in all, {failed} measurements failed")
    return failed

# --- Reading latents, and memory on paper -----------------------------------------------------------
def read(flags):
    """Latents of 32x16x16, each once in random order: train_dit.py's memory-mapped chunk files, and the
    authors' way, which opens the shard for each of them. --num 20000 latents take 1.3 GB of disk for a
    while."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--num", type=int, default=20_000)
    n, rng = parser.parse_args(flags).num, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for k in range(0, n, 4096):  # 64 batches of 64 images, as extract writes them
            z = rng.standard_normal((min(4096, n - k), 2, *LATENT), dtype=np.float32).astype(np.float16)
            np.save(folder / f"latents-{k // 4096:05d}.npy", z)
            plain, flipped = (torch.from_numpy(z[:, i].copy()) for i in (0, 1))
            save_file({"latents": plain, "latents_flip": flipped, "labels": torch.arange(len(z)) + k},
                      folder / f"{k}.shard")
        np.save(folder / "labels.npy", np.arange(n))
        about = {"classes": ["a"], "mean": [0.0] * LATENT[0], "std": [1.0] * LATENT[0]}
        (folder / "latents.json").write_text(json.dumps(about))
        latents = train_dit.Latents(folder)
        order, flip = torch.from_numpy(rng.permutation(n)), torch.from_numpy(rng.integers(0, 2, n))
        ours, theirs = [], []
        for index, side in zip(order.split(500), flip.split(500)):
            begin = time.perf_counter()
            latents.read(index, side)
            ours.append(len(index) / (time.perf_counter() - begin))
            begin = time.perf_counter()
            for i, flipped in zip(index[:50].tolist(), side[:50].tolist()):
                with safe_open(str(folder / f"{i // 4096 * 4096}.shard"), "pt") as shard:
                    row = slice(i % 4096, i % 4096 + 1)
                    shard.get_slice("latents_flip" if flipped else "latents")[row]
                    shard.get_slice("labels")[row]
            theirs.append(len(index[:50]) / (time.perf_counter() - begin))
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    print(f"{n} latents at random, per second: {ours:,.0f} from memory-mapped chunks, {theirs:,.0f} from "
          f"safetensors files opened for each: {ours / theirs:.1f} times as many")
    return ours / theirs

def kept_by_autograd(s, batch):
    """Settings of train_vae.py, images at once -> bytes that autograd keeps of a step until the backward
    pass, and the most that one level of the network adds. Distinct storages on meta tensors, without the
    weights."""
    class Forwards(Exception):
        """The forward pass is done."""

    def done(*args, **kwargs):
        raise Forwards

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, or its address would be another's
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
    run.opt = run.opt_disc = SimpleNamespace(zero_grad=done)  # train_step calls it before its backward pass
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
    --checkpointing, which recomputes one level at a time; with --chunks also of 32 images in so many chunks,
    at most. All flags of train_vae.py."""
    s, own = parse(train_vae, flags, {"--at-once": "1,4,8,32"})
    print(f"{s.spec}, {s.image_size}x{s.image_size}, {s.precision}: GiB that autograd keeps\n"
          "images at once    plain   --checkpointing")
    for batch in map(int, own.at_once.split(",")):
        plain, level = kept_by_autograd(replace(s, checkpointing=False, chunks=1), batch)
        inputs, _ = kept_by_autograd(replace(s, checkpointing=True, chunks=1), batch)
        print(f"{batch:14d} {plain / 2 ** 30:8.2f} {(inputs + level) / 2 ** 30:17.2f}")
        if s.chunks > 1 and batch * s.chunks == 32:
            # what goes in and comes out of the networks for 32 images, and all of one chunk
            kept, _ = kept_by_autograd(replace(s, checkpointing=False), 32)
            found = [(kept + part) / 2 ** 30 for part in (plain, inputs + level)]
            print(f"32 images in {s.chunks} chunks: {found[0]:.2f}, with --checkpointing {found[1]:.2f}")
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoencoderKL(**SPECS[s.spec]).parameters())
    print(f"and once: {16 * weights / 2 ** 30:.2f} GiB of weights, gradients, Adam's moments; "
          "DINOv2-L 1.1 GiB")

COMMANDS = {"flops": flops, "tokenizer": tokenizer, "dit": dit, "sample": sampling, "read": read,
            "memory": memory, "all": everything}

def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, work in COMMANDS.items():
        commands.add_parser(name, description=work.__doc__, help=" ".join(work.__doc__.split(".")[0].split()))
    args, flags = parser.parse_known_args(argv)
    failed = COMMANDS[args.command](flags)
    if dist.is_initialized():
        dist.destroy_process_group()
    return failed if args.command == "all" else 0

if __name__ == "__main__":
    sys.exit(main() > 0)
