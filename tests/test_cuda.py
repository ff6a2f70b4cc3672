"""What acts differently on a GPU. Tests that ask a question only a GPU can answer skip themselves without
one; all others run on both, on a CPU with the compiler's graphs but without its code generation."""
import copy
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train_dit
import train_vae
from dit import LightningDiT
from fid import FIDInception
from vae import SPECS, AutoencoderKL

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ARCH = {"input_size": 4, "patch_size": 1, "in_channels": 4, "num_classes": 10, "depth": 3, "hidden_size": 64,
        "num_heads": 2}
# five levels of three widths, like f16d32: the norms meet as many sizes as there
NARROW = SPECS["f16d32"] | {"embed_dim": 4, "ch": 32, "num_res_blocks": 1, "attn_resolutions": ()}

@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_CUDA)])
def world(request, monkeypatch):
    """A World of one process. On a CPU torch.compile cuts its graphs and stops there (aot_eager)."""
    if request.param == "cpu":
        compiled = partialmethod(torch.nn.Module.compile, backend="aot_eager")
        monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    torch.compiler.reset()
    counters.clear()
    # what the scripts set is put back
    with torch._dynamo.config.patch(optimize_ddp=True), torch._functorch.config.patch(donated_buffer=True):
        yield train_vae.World(request.param)

class Teacher(torch.nn.Module):
    """Features of an image that need no weights: its pixels, repeated."""
    width = 16

    def forward(self, x, grid):
        return torch.nn.functional.adaptive_avg_pool2d(x, grid).repeat(1, 6, 1, 1)[:, :16]

def awake(net):
    """Random weights where training begins with zeros, so that every layer matters."""
    torch.manual_seed(2)
    for weight in net.parameters():
        if weight.dim() > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return net

def dit_steps(world, steps=3, state=None, **settings):
    """A Run of a small LightningDiT after some steps on fixed latents, and the terms of each step."""
    s = train_dit.Settings(batch_size=8, **{"precision": "fp32", "compile": False} | settings)
    run = train_dit.Run(s, ARCH, world)
    awake(run.model)
    for name, part in run.states().items() if state else ():
        part.load_state_dict(state[name])
    shape, share = (4, 4, 4), world.share(8, s.accumulate)
    x1 = torch.randn(8, *shape, generator=torch.Generator().manual_seed(3)).to(world.device)[share]
    y, terms = torch.arange(8, device=world.device)[share], []
    for step in range(steps):
        t, x0, drop = (v[share].to(world.device) for v in train_dit.draw(s, step, 0.0, shape, "cpu"))
        found, norm = run.step(x1, y, t, x0, drop, True)
        values = world.mean(torch.stack([*(value.mean() for value in found.values()), norm]))
        terms.append(values.tolist())
    return run, terms

def vae_steps(world, steps=2, **settings):
    """The terms of some steps of a narrow tokenizer with VF loss; from step 1 on with a discriminator."""
    SPECS["narrow"] = NARROW
    s = train_vae.Settings(spec="narrow", image_size=32, batch_size=4, lpips_weight=0.0, disc_start=1,
                           **{"compile": False} | settings)
    run = train_vae.Run(s, world, Teacher(), pretrained=False)
    generator, share = torch.Generator().manual_seed(5), world.share(4, s.chunks)
    x = (torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1).to(world.device)[share]
    noise, found = torch.randn(4, 4, 2, 2, generator=generator).to(world.device)[share], []
    for step in range(steps):
        terms = train_vae.train_step(run, x, noise, step)
        names = ("rec", "kl", "mcos", "mdms", "w_vf")
        found.append(world.mean(torch.stack([terms[name].float() for name in names])).tolist())
    return run, found

def same(found, wanted, rel=2e-3):
    for values, others in zip(found, wanted, strict=True):
        assert values == pytest.approx(others, rel=rel)

# --- LightningDiT ----------------------------------------------------------------------------------
def test_residual_is_contiguous_and_qkv_gradient_is_written_once(world):
    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if func._overloadpacket is torch.ops.aten.clone and out.numel() == 2 * 16 * 3 * 64:
                seen.append(out.shape)
            return out
    model, seen, inputs = awake(LightningDiT(**ARCH)).to(world.device), [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].is_contiguous()))
    x = torch.randn(2, 4, 4, 4, device=world.device)
    out = model(x, torch.rand(2, device=world.device), torch.zeros(2, dtype=torch.long, device=world.device))
    with Copies():
        out.square().mean().backward()
    assert inputs == [True] * 3 and not seen

@pytest.mark.parametrize("settings", [{}, {"checkpointing": True, "accumulate": 2}])
def test_compiled_blocks_have_the_same_losses_and_gradients(world, settings):
    run, terms = dit_steps(world)
    fast, found = dit_steps(world, compile=True, **settings)
    same(found, terms)
    for a, b in zip(run.params, fast.params, strict=True):
        assert (a.grad - b.grad).norm() <= 0.01 * a.grad.norm() + 1e-6
    # one graph serves all blocks and all steps (checkpointing may compile for its second pass)
    assert counters["stats"]["unique_graphs"] <= 1 + len(settings) and not counters["graph_break"]

def test_a_resumed_run_has_the_same_losses(world):
    half, _ = dit_steps(world, 2)
    state = {name: copy.deepcopy(part.state_dict()) for name, part in half.states().items()}
    _, one = dit_steps(world, 1, state)
    _, two = dit_steps(world, 1, state)
    _, other = dit_steps(world, 1)
    same(one, two, 1e-6)
    assert one != other

@pytest.mark.parametrize("name", ["dit", "vae"])
def test_bf16_and_tf32_are_near_fp32(world, name):
    if name == "dit":
        net = awake(LightningDiT(**ARCH)).to(world.device).eval()
        args = (torch.randn(2, 4, 4, 4), torch.rand(2), torch.zeros(2, dtype=torch.long))
    else:
        net, args = AutoencoderKL(**NARROW).to(world.device).eval(), (torch.randn(2, 3, 32, 32),)
        net.forward = lambda x: net.decode(net.encode(x).mode())
    args = [v.to(world.device) for v in args]
    found = {}
    with torch.no_grad():
        for mode in ("fp32", "tf32", "bf16"):
            allowed = mode == "tf32"
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
            with torch.autocast(world.device.type, torch.bfloat16, enabled=mode == "bf16"):
                found[mode] = net(*args).double()
    error = {mode: ((v - found["fp32"]).norm() / found["fp32"].norm()).item() for mode, v in found.items()}
    assert error["tf32"] < 5e-3 and 0 < error["bf16"] < 5e-2, error

# --- The tokenizer ---------------------------------------------------------------------------------
def test_equation_4_goes_through_compiled_norms(world):
    """Several backward passes through one graph, whose buffers torch.compile would give away after the first.
    With --checkpointing: see the test of torchrun."""
    _, terms = vae_steps(world)
    run, found = vae_steps(world, compile=True)
    same(found, terms)
    graphs = counters["stats"]["unique_graphs"]
    # one per width and one more; beyond the limit dynamo would silently run the rest uncompiled
    assert 1 < graphs <= 6 < torch._dynamo.config.recompile_limit and not counters["graph_break"]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # as for reconstructions.png
        run.tokenizer.vae.eval().encode(torch.zeros(1, 3, 64, 64, device=world.device))
    assert counters["stats"]["unique_graphs"] == graphs

DRIVER = """
import json, os, sys
sys.path[:0] = {paths}
import torch, torch.distributed as dist
from test_cuda import dit_steps, train_vae, vae_steps
from functools import partialmethod
world = train_vae.World({device!r})
if world.size == 1:  # a lone GPU: NCCL and DistributedDataParallel, with a group of one
    dist.init_process_group("nccl")
    world.patient, world.mean = dist.new_group(backend="gloo"), lambda tensor: tensor
    world.parallel = lambda net: torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
else:
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")
terms = [dit_steps(world, compile=True, checkpointing=True, accumulate=2)[1],
         vae_steps(world, compile=True, checkpointing=True)[1]]
if world.rank == 0:
    print("TERMS", json.dumps(terms), flush=True)
os._exit(0)
"""

@pytest.mark.parametrize("device, processes", [("cpu", 2), pytest.param("cuda", 1, marks=ON_CUDA)])
def test_processes_of_torchrun_do_what_one_does(tmp_path, device, processes):
    """Compiled blocks and norms and Eq. 4's passes in DistributedDataParallel, by gloo or NCCL."""
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent)]
    (tmp_path / "driver.py").write_text(DRIVER.format(paths=paths, device=device))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    done = subprocess.run([*torchrun, str(processes), str(tmp_path / "driver.py")], capture_output=True,
                          text=True, timeout=540, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("TERMS ")), "")
    assert line, done.stdout + done.stderr
    world = train_vae.World(device)
    for found, (_, wanted) in zip(json.loads(line[6:]), (dit_steps(world), vae_steps(world)), strict=True):
        same(found, wanted)

@ON_CUDA
def test_synchronized_discriminator_has_one_process_statistics():
    world = train_vae.World("cuda")
    disc = train_vae.PatchDiscriminator().to(world.device)
    other = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(disc))
    x = torch.rand(4, 3, 64, 64, device=world.device)
    assert torch.allclose(disc(x), other(x), rtol=1e-3, atol=1e-3)

# --- Sampling, scores, attention -------------------------------------------------------------------
def test_sampling_in_a_thread_compiles_two_graphs(world):
    model = awake(LightningDiT(**ARCH)).to(world.device).eval().requires_grad_(False)
    fast = copy.deepcopy(model)
    for block in fast.blocks:
        block.compile(dynamic=False)
    zero = torch.zeros(1, 4, 1, 1, device=world.device)
    vae = AutoencoderKL(**SPECS["mini-f2d4"]).to(world.device).eval()
    s = sample.Settings(batch_size=2, sampling_steps=5, timestep_shift=1.0, cfg_interval_start=0.3)
    images = []
    for net in (model, fast):
        system = SimpleNamespace(model=net, tokenizer=vae, mean=zero, std=zero + 1, shape=(4, 4, 4),
                                 listed=[], classes=range(10), device=world.device, dit="", vae="")
        with ThreadPoolExecutor(1) as pool:
            done = pool.map(lambda i, system=system: sample.sample_batch(system, s, [i, i + 1],
                                                                         sample.time_grid(s))[0], (0, 2))
            images.append(torch.cat(list(done)))
    assert torch.allclose(*images, rtol=1e-2, atol=1e-2)
    assert counters["stats"]["unique_graphs"] == 2  # with guidance and without

@ON_CUDA
def test_inception_features_are_those_of_a_cpu():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    net = FIDInception(net.state_dict())
    x = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    for a, b in zip(net(x), net.cuda()(x.cuda()), strict=True):
        assert (a - b.cpu()).norm() < 1e-3 * a.norm()

@ON_CUDA
@pytest.mark.parametrize("dim, dtype", [(64, torch.bfloat16), (72, torch.bfloat16), (512, torch.float32)])
def test_attention_never_takes_cudnn(dim, dtype):
    """Head sizes of LightningDiT-B, of XL, and of the tokenizer."""
    train_vae.World("cuda")
    q, k, v = torch.randn(3, 2, 1 if dim == 512 else 16, 256, dim, dtype=dtype, device="cuda")
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v))
    print(dim, dtype, chosen)
    assert chosen != SDPBackend.CUDNN_ATTENTION and (dim == 512 or chosen != SDPBackend.MATH)
