"""vae.py against independent implementations: torch.distributions, explicit softmax, the package lpips, nn.BatchNorm2d, two gloo processes."""
import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import vae
from vae import LPIPS, SPECS, AutoencoderKL, PatchDiscriminator, Posterior

LISTS = Path(__file__).resolve().parents[2] / "shared" / "facts" / "state_dicts.json"
SMALL = dict(embed_dim=4, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=32)


def on_meta(cls, **kwargs):
    with torch.device("meta"):
        return cls(**kwargs)


def shapes(module):
    return {name: list(value.shape) for name, value in module.state_dict().items()}


# --- names, shapes, sizes ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["VA-VAE f16d32", "LightningDiT-XL/1", "LightningDiT-B/1", "LightningDiT-XL/2"])
def test_names_and_shapes_are_those_of_the_released_checkpoints(name):
    if not LISTS.exists():
        pytest.skip(f"{LISTS} is not here: the released checkpoints' lists are not part of the repository")
    from dit import SIZES, LightningDiT
    lists = json.loads(LISTS.read_text())
    model = {"VA-VAE f16d32": lambda: on_meta(AutoencoderKL), "LightningDiT-XL/1": lambda: on_meta(LightningDiT),
             "LightningDiT-B/1": lambda: on_meta(LightningDiT, **SIZES["B"]),
             "LightningDiT-XL/2": lambda: on_meta(LightningDiT, input_size=32, patch_size=2, in_channels=4)}[name]()
    assert shapes(model) == lists[name] and len(lists) == 4


def test_f16d32_without_the_list():
    """The same, by hand: what LDM's checkpoints are known to hold."""
    model = on_meta(AutoencoderKL)
    assert sum(p.numel() for p in model.parameters()) == 69_836_067                # 69.84 M
    got = shapes(model)
    for name, shape in {
        "encoder.conv_in.weight": [128, 3, 3, 3], "encoder.down.0.block.0.norm1.weight": [128], "encoder.down.2.block.0.nin_shortcut.weight": [256, 128, 1, 1],
        "encoder.down.3.downsample.conv.weight": [256, 256, 3, 3], "encoder.down.4.attn.1.q.weight": [512, 512, 1, 1],
        "encoder.mid.attn_1.proj_out.bias": [512], "encoder.conv_out.weight": [64, 512, 3, 3], "quant_conv.weight": [64, 64, 1, 1],
        "post_quant_conv.weight": [32, 32, 1, 1], "decoder.conv_in.weight": [512, 32, 3, 3], "decoder.up.4.attn.2.k.weight": [512, 512, 1, 1],
        "decoder.up.4.upsample.conv.bias": [512], "decoder.up.0.block.2.conv2.weight": [128, 128, 3, 3], "decoder.conv_out.weight": [3, 128, 3, 3],
    }.items():
        assert got[name] == shape, name
    for absent in ("encoder.down.4.downsample.conv.weight", "decoder.up.0.upsample.conv.weight", "encoder.down.3.attn.0.q.weight",
                   "encoder.down.0.block.2.conv1.weight", "decoder.up.0.block.3.conv1.weight"):
        assert absent not in got
    assert len(got) == 342


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_builds_with_its_f_and_d(name):
    f, d = (int(v) for v in name.rsplit("f", 1)[1].split("d"))
    model = on_meta(AutoencoderKL, **SPECS[name])
    x = torch.zeros(2, 3, 4 * f, 3 * f, device="meta")
    z = model.encode(x).mean
    assert model.f == f and model.embed_dim == d and z.shape == (2, d, 4, 3) and model.decode(z).shape == x.shape


def test_the_paper_s_specs_are_all_there():
    assert {"f16d16", "f16d24", "f16d28", "f16d32", "f16d64", "f16d128", "f32d128", "f8d4"} <= set(SPECS)
    attention = {name: sum(isinstance(m, vae.AttnBlock) for m in on_meta(AutoencoderKL, **SPECS[name]).modules()) for name in ("f16d32", "f8d4")}
    assert attention == {"f16d32": 2 + 3 + 2, "f8d4": 2}                           # kl-f8 attends in the middle only


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (64, 96)])
def test_any_size_that_f_divides(size):
    torch.manual_seed(0)
    model, x = AutoencoderKL(**SMALL).eval(), torch.rand(1, 3, *size) * 2 - 1
    with torch.no_grad():
        x_hat, z, posterior = model(x)
    assert x_hat.shape == x.shape and z.shape == posterior.mean.shape == (1, 4, size[0] // 4, size[1] // 4)
    assert torch.isfinite(x_hat).all()


def test_full_size_at_512_on_meta():
    model = on_meta(AutoencoderKL)
    assert model.encode(torch.zeros(1, 3, 512, 512, device="meta")).mean.shape == (1, 32, 32, 32)


def test_a_size_that_f_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="32x30.*f = 4"):
        AutoencoderKL(**SMALL).encode(torch.zeros(1, 3, 32, 30))
    with pytest.raises(ValueError, match="30x32"):
        AutoencoderKL(**SMALL).encode(torch.zeros(1, 3, 30, 32))


# --- the posterior ----------------------------------------------------------------------------------------------------------------------------

def test_kl_is_that_of_torch_distributions():
    torch.manual_seed(0)
    moments = torch.randn(3, 8, 5, 6, dtype=torch.float64) * 2
    q = torch.distributions.Normal(moments[:, :4], (0.5 * moments[:, 4:]).exp())
    want = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(Posterior(moments).kl(), want)
    assert Posterior(torch.zeros(2, 8, 3, 3)).kl().tolist() == [0.0, 0.0]


def test_sample_and_mode():
    torch.manual_seed(0)
    moments, noise = torch.randn(2, 8, 3, 3), torch.randn(2, 4, 3, 3)
    posterior = Posterior(moments)
    torch.testing.assert_close(posterior.sample(noise), moments[:, :4] + moments[:, 4:].exp().sqrt() * noise)
    assert torch.equal(posterior.mode(), moments[:, :4]) and torch.equal(posterior.mean, moments[:, :4])
    draws = Posterior(torch.tensor([3.0, math.log(4.0)]).view(1, 2, 1, 1).expand(50_000, 2, 1, 1)).sample()
    assert draws.mean().item() == pytest.approx(3, abs=0.05) and draws.std().item() == pytest.approx(2, abs=0.05)


def test_logvar_is_clamped_to_minus_30_and_20():
    moments = torch.zeros(1, 2, 1, 3)
    moments[0, 1, 0] = torch.tensor([-100.0, 100.0, 7.0])
    posterior = Posterior(moments)
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0, 7.0]
    assert torch.isfinite(posterior.kl()).all() and torch.isfinite(posterior.sample()).all()


def test_the_forward_pass_is_its_parts_in_order():
    torch.manual_seed(0)
    model, x, noise = AutoencoderKL(**SMALL).eval(), torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    moments = F.conv2d(model.encoder(x), model.quant_conv.weight, model.quant_conv.bias)
    z = moments[:, :4] + (moments[:, 4:] / 2).exp() * noise
    x_hat, z_got, posterior = model(x, noise)
    torch.testing.assert_close(z_got, z)
    torch.testing.assert_close(posterior.logvar, moments[:, 4:])
    torch.testing.assert_close(x_hat, model.decoder(F.conv2d(z, model.post_quant_conv.weight, model.post_quant_conv.bias)))


# --- building blocks --------------------------------------------------------------------------------------------------------------------------

def group_norm(x, weight, bias, groups=32):
    B, C, H, W = x.shape
    g = x.reshape(B, groups, -1)
    g = (g - g.mean(-1, keepdim=True)) / (g.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return g.reshape(B, C, H, W) * weight[:, None, None] + bias[:, None, None]


def randomise(module):
    for p in module.parameters():
        nn.init.normal_(p, 0.0, 0.1)
    return module.double()


@pytest.mark.parametrize("channels, groups", [(32, 8), (64, 16), (128, 32), (256, 32), (512, 32)])
def test_norm_has_32_groups_and_never_fewer_than_4_channels_in_one(channels, groups):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 3, 3, dtype=torch.float64) + 2
    torch.testing.assert_close(vae.norm(channels).double()(x), group_norm(x, torch.ones(channels), torch.zeros(channels), groups))


def test_attention_block_is_the_explicit_softmax():
    torch.manual_seed(0)
    block, x = randomise(vae.AttnBlock(128)), torch.randn(2, 128, 3, 5, dtype=torch.float64)
    h = group_norm(x, block.norm.weight, block.norm.bias)
    q, k, v = (torch.einsum("oc,bchw->bohw", f.weight[..., 0, 0], h) + f.bias[:, None, None] for f in (block.q, block.k, block.v))
    logits = torch.einsum("bchw,bcij->bhwij", q, k) / 128 ** 0.5
    weights = logits.flatten(3).softmax(-1).reshape(logits.shape)
    h = torch.einsum("bhwij,bcij->bchw", weights, v)
    want = x + torch.einsum("oc,bchw->bohw", block.proj_out.weight[..., 0, 0], h) + block.proj_out.bias[:, None, None]
    torch.testing.assert_close(block(x), want)


@pytest.mark.parametrize("c_out", [128, 256])
def test_residual_block(c_out):
    torch.manual_seed(0)
    b, x = randomise(vae.ResnetBlock(128, c_out)), torch.randn(2, 128, 6, 6, dtype=torch.float64)
    h = group_norm(x, b.norm1.weight, b.norm1.bias)
    h = F.conv2d(h * torch.sigmoid(h), b.conv1.weight, b.conv1.bias, padding=1)
    h = group_norm(h, b.norm2.weight, b.norm2.bias)
    h = F.conv2d(h * torch.sigmoid(h), b.conv2.weight, b.conv2.bias, padding=1)
    skip = x if c_out == 128 else F.conv2d(x, b.nin_shortcut.weight, b.nin_shortcut.bias)
    torch.testing.assert_close(b(x), skip + h)


def test_downsample_pads_right_and_below():
    torch.manual_seed(0)
    down, x = randomise(vae.Downsample(2)), torch.randn(1, 2, 6, 8, dtype=torch.float64)
    want = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    for o in range(2):
        for i in range(3):
            for j in range(4):
                window = torch.zeros(2, 3, 3, dtype=torch.float64)                 # rows 2i..2i+2, columns 2j..2j+2, zero past the end
                part = x[0, :, 2 * i:2 * i + 3, 2 * j:2 * j + 3]
                window[:, :part.shape[1], :part.shape[2]] = part
                want[0, o, i, j] = (window * down.conv.weight[o]).sum() + down.conv.bias[o]
    torch.testing.assert_close(down(x), want)


def test_upsample_repeats_then_convolves():
    torch.manual_seed(0)
    up, x = randomise(vae.Upsample(3)), torch.randn(1, 3, 4, 5, dtype=torch.float64)
    want = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), up.conv.weight, up.conv.bias, padding=1)
    torch.testing.assert_close(up(x), want)


# --- LPIPS and the files it needs ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vgg_and_heads(tmp_path_factory):
    """Random weights under the names and keys of torchvision's VGG16 file and of the lpips package's head file."""
    from torchvision.models import vgg16
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    features = vgg16(weights=None, init_weights=False).features.state_dict()
    state = {f"features.{k}": (torch.randn_like(v) * (2 / max(v[0].numel(), 1)) ** 0.5 if v.ndim > 1 else torch.randn_like(v) * 0.1)
             for k, v in features.items()} | {"classifier.0.weight": torch.zeros(2, 2)}
    torch.save(state, folder / "vgg16-397923af.pth")
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}, folder / "lpips_v0.1_vgg.pth")
    return folder


@pytest.fixture
def filled_cache(vgg_and_heads, torch_home, monkeypatch):
    """The real path through torch.hub's cache: both files in place, their hashes the expected ones."""
    for file in vgg_and_heads.iterdir():
        os.link(file, torch_home.checkpoints / file.name)
    sha256 = hashlib.sha256((vgg_and_heads / "vgg16-397923af.pth").read_bytes()).hexdigest()
    md5 = hashlib.md5((vgg_and_heads / "lpips_v0.1_vgg.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(vae, "VGG16", (vae.VGG16[0], {**vae.VGG16[1], "sha256": sha256[:8]}))
    monkeypatch.setattr(vae, "LPIPS_HEADS", (vae.LPIPS_HEADS[0], {**vae.LPIPS_HEADS[1], "md5": md5}))
    return torch_home


@pytest.mark.filterwarnings("ignore:.*pretrained.*:UserWarning", "ignore:Arguments other than a weight enum.*:UserWarning")
def test_lpips_equals_the_package(filled_cache):
    lpips = pytest.importorskip("lpips")
    theirs = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    state = torch.load(filled_cache.checkpoints / "vgg16-397923af.pth", weights_only=True)
    slices = {f"net.slice{s}.{i}.{n}": state[f"features.{i}.{n}"] for s, (a, b) in enumerate(((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)), 1)
              for i in range(a, b) for n in ("weight", "bias") if f"features.{i}.{n}" in state}
    slices |= torch.load(filled_cache.checkpoints / "lpips_v0.1_vgg.pth", weights_only=True)
    slices |= {f"lins.{i}.model.1.weight": slices[f"lin{i}.model.1.weight"] for i in range(5)}
    missing = theirs.load_state_dict(slices, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) == {"scaling_layer.shift", "scaling_layer.scale"}
    torch.manual_seed(1)
    ours, x, y = LPIPS(), torch.rand(3, 3, 40, 56) * 2 - 1, (torch.rand(3, 3, 40, 56) * 2 - 1).requires_grad_()
    got = ours(x, y)
    want = theirs(x, y)
    assert got.shape == (3, 1, 1, 1) and want.min() > 0.1                          # random weights see a difference
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    got_grad, want_grad = (torch.autograd.grad(d.sum(), y)[0] for d in (got, want))
    torch.testing.assert_close(got_grad, want_grad, atol=1e-5 * want_grad.abs().max().item(), rtol=1e-4)
    assert not filled_cache.attempts and not ours.training and not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("y", ["identical", "constant", "black"])
def test_lpips_gradient_is_finite(filled_cache, y):
    torch.manual_seed(0)
    ours, x = LPIPS(), torch.rand(1, 3, 32, 32) * 2 - 1
    ours.features[2].bias.data.fill_(-1e4)                                         # relu1_2 is zero everywhere: |h| = 0, whose root has no gradient
    y = {"identical": x.clone(), "constant": torch.full_like(x, 0.5), "black": torch.full_like(x, -1.0)}[y].requires_grad_()
    distance = ours(x, y)
    grad, = torch.autograd.grad(distance.sum(), y)
    assert torch.isfinite(distance).all() and torch.isfinite(grad).all()


def test_lpips_of_an_image_with_itself_is_zero():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32)
    assert LPIPS(pretrained=False)(x, x).abs().max() == 0


def test_a_file_with_another_hash_is_refused(filled_cache):
    path = filled_cache.checkpoints / "vgg16-397923af.pth"
    path.unlink()
    path.write_bytes(b"not these weights")
    with pytest.raises(SystemExit, match=r"vgg16-397923af\.pth has sha256 \w{64}, expected \w+: delete it"):
        LPIPS()


def test_heads_with_another_hash_are_refused(filled_cache):
    path = filled_cache.checkpoints / "lpips_v0.1_vgg.pth"
    path.unlink()
    path.write_bytes(b"not these weights")
    with pytest.raises(SystemExit, match=r"lpips_v0\.1_vgg\.pth has md5 \w{32}, expected \w{32}"):
        LPIPS()


def test_without_network_the_message_names_the_place(torch_home):
    with pytest.raises(SystemExit) as error:
        LPIPS()
    assert torch_home.attempts == ["https://download.pytorch.org/models/vgg16-397923af.pth"]
    assert str(torch_home.checkpoints / "vgg16-397923af.pth") in error.value.code and "\n" not in error.value.code
    assert not list(torch_home.checkpoints.iterdir())


def test_the_expected_hashes_are_the_real_files():
    """397923af is in torchvision's own URL; the heads' file is shipped in the package lpips."""
    lpips = pytest.importorskip("lpips")
    from torchvision.models import VGG16_Weights
    assert vae.VGG16[0] == VGG16_Weights.IMAGENET1K_V1.url and vae.VGG16[0].endswith(f"-{vae.VGG16[1]['sha256']}.pth")
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    assert hashlib.md5(heads.read_bytes()).hexdigest() == vae.LPIPS_HEADS[1]["md5"]


def test_hub_file_downloads_once(torch_home, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: (calls.append(url), Path(path).write_bytes(b"abc")))
    for _ in range(2):
        path = vae.hub_file("https://example.org/a/b.bin", md5=hashlib.md5(b"abc").hexdigest())
        assert path == torch_home.checkpoints / "b.bin"
    assert calls == ["https://example.org/a/b.bin"]


# --- the discriminator ----------------------------------------------------------------------------------------------------------------------------

def pix2pix():
    """The network of pix2pix, written out; plain nn.BatchNorm2d."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.LeakyReLU(0.2),
        nn.Conv2d(128, 256, 4, 2, 1, bias=False), nn.BatchNorm2d(256), nn.LeakyReLU(0.2),
        nn.Conv2d(256, 512, 4, 1, 1, bias=False), nn.BatchNorm2d(512), nn.LeakyReLU(0.2), nn.Conv2d(512, 1, 4, 1, 1))


def test_patch_discriminator_is_pix2pix_s():
    torch.manual_seed(0)
    ours, theirs = PatchDiscriminator(), pix2pix()
    theirs.load_state_dict({k.removeprefix("main."): v for k, v in ours.state_dict().items()})   # LDM's names: main.0.weight, ...
    x = torch.randn(4, 3, 64, 64)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    for a, b in zip(ours.buffers(), theirs.buffers()):
        torch.testing.assert_close(a, b)
    assert ours(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    convolutions = [m.weight for m in ours.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.std().item() == pytest.approx(0.02, rel=0.1) for w in convolutions)


# what two processes and one are given: images; features far from zero, of which the last channel is constant; the rows of a toy for Eq. 4
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 0.5, 3.0]).view(4, 1, 1, 1) + 0.5
OFFSET = 30.1 + torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 1.0, 0.0]).view(3, 1, 1)
ROWS = torch.arange(8.0).reshape(4, 2)


def small_discriminator():
    torch.manual_seed(0)
    net = PatchDiscriminator(ch=8)
    for p in net.parameters():
        nn.init.normal_(p, 0.1, 0.3)
    return net


def toy_losses(rows, weight):
    return (rows @ weight.T).pow(2).mean(), 1e-5 * (rows @ weight.T).sum(1).mean()   # the second so small that 1e-4 in the denominator counts


def one_of_two(rank, folder):
    """A process's share through the discriminator (gradients averaged as DistributedDataParallel does), BatchNorm alone, and Eq. 4."""
    from vf_loss import adaptive_weight
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net, x = small_discriminator(), IMAGES.chunk(2)[rank].clone().requires_grad_()
    out = net(x)
    F.softplus(-out).mean().backward()
    for p in net.parameters():
        dist.all_reduce(p.grad)
    offset = vae.BatchNorm(3)(OFFSET.chunk(2)[rank])
    weight = torch.ones(3, 2, requires_grad=True)
    w = adaptive_weight(*toy_losses(ROWS.chunk(2)[rank], weight), weight)
    torch.save(dict(out=out.detach(), grads=[p.grad / 2 for p in net.parameters()], x_grad=x.grad / 2, state=net.state_dict(), offset=offset.detach(), w=w),
               folder / f"result{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"result{rank}", weights_only=True) for rank in range(2)]


def test_two_processes_discriminate_as_one(two_processes):
    """Oracle: torch's BatchNorm2d in one process, on the whole batch. Outputs, gradients and running statistics."""
    net = small_discriminator()
    oracle = nn.Sequential(*[nn.BatchNorm2d(m.num_features) if isinstance(m, vae.BatchNorm) else m for m in net.main])
    oracle.load_state_dict({k.removeprefix("main."): v for k, v in small_discriminator().state_dict().items()})
    x = IMAGES.clone().requires_grad_()
    out = oracle(x)
    F.softplus(-out).mean().backward()
    near = dict(atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([r["out"] for r in two_processes]), out.detach(), **near)
    torch.testing.assert_close(torch.cat([r["x_grad"] for r in two_processes]), x.grad, **near)
    for r in two_processes:
        for got, p in zip(r["grads"], oracle.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, **near)
        for name, value in oracle.state_dict().items():
            torch.testing.assert_close(r["state"][f"main.{name}"], value, **near)


def test_two_processes_normalise_features_far_from_zero(two_processes):
    """mean(x^2) - mean^2 would lose the variance of such a channel to rounding, or make it negative."""
    torch.testing.assert_close(torch.cat([r["offset"] for r in two_processes]), nn.BatchNorm2d(3)(OFFSET).detach(), atol=5e-3, rtol=0)


def test_two_processes_agree_on_eq_4(two_processes):
    weight = torch.ones(3, 2, requires_grad=True)
    rec, vf = (torch.autograd.grad(loss, weight)[0].norm() for loss in toy_losses(ROWS, weight))
    assert two_processes[0]["w"] == two_processes[1]["w"] and two_processes[0]["w"].item() == pytest.approx((rec / (vf + 1e-4)).item(), rel=1e-5)
