"""vae.py against independent implementations (torch.distributions, an explicit softmax, the package lpips,
pix2pix written out, two gloo processes), and the files that it reads."""
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import user_error
from torch import nn

import vae
from vae import LPIPS, SPECS, AutoencoderKL, PatchDiscriminator, Posterior, fingerprint
from vf_loss import adaptive_weight

LISTS = Path(__file__).resolve().parents[2] / "shared" / "facts" / "state_dicts.json"
SMALL = {"embed_dim": 4, "ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": (8,),
         "resolution": 32}


def on_meta(cls, **kwargs):
    with torch.device("meta"):
        return cls(**kwargs)


def shapes(module):
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def pictures(*shape):
    return torch.rand(*shape) * 2 - 1


# --- names, shapes, sizes --------------------------------------------------------------------------------
RELEASED = ["VA-VAE f16d32", "LightningDiT-XL/1", "LightningDiT-B/1", "LightningDiT-XL/2"]


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_are_those_of_the_released_checkpoints(name):
    if not LISTS.exists():
        pytest.skip(f"{LISTS} is missing: these lists are not part of the repository")
    from dit import SIZES, LightningDiT
    lists = json.loads(LISTS.read_text())
    kwargs = {"LightningDiT-B/1": SIZES["B"],
              "LightningDiT-XL/2": {"input_size": 32, "patch_size": 2, "in_channels": 4}}.get(name, {})
    model = on_meta(AutoencoderKL if name == "VA-VAE f16d32" else LightningDiT, **kwargs)
    assert shapes(model) == lists[name] and len(lists) == 4


def test_f16d32_without_the_list():
    """Names and shapes that LDM's checkpoints are known to have, typed by hand."""
    model = on_meta(AutoencoderKL)
    assert sum(p.numel() for p in model.parameters()) == 69_836_067  # 69.84 M
    got = shapes(model)
    for name, shape in {
        "encoder.conv_in.weight": [128, 3, 3, 3], "encoder.down.0.block.0.norm1.weight": [128],
        "encoder.down.2.block.0.nin_shortcut.weight": [256, 128, 1, 1],
        "encoder.down.3.downsample.conv.weight": [256, 256, 3, 3],
        "encoder.down.4.attn.1.q.weight": [512, 512, 1, 1], "encoder.mid.attn_1.proj_out.bias": [512],
        "encoder.conv_out.weight": [64, 512, 3, 3], "quant_conv.weight": [64, 64, 1, 1],
        "post_quant_conv.weight": [32, 32, 1, 1], "decoder.conv_in.weight": [512, 32, 3, 3],
        "decoder.up.4.attn.2.k.weight": [512, 512, 1, 1], "decoder.up.4.upsample.conv.bias": [512],
        "decoder.up.0.block.2.conv2.weight": [128, 128, 3, 3], "decoder.conv_out.weight": [3, 128, 3, 3],
    }.items():
        assert got[name] == shape, name
    assert not got.keys() & {
        "encoder.down.4.downsample.conv.weight", "decoder.up.0.upsample.conv.weight",
        "encoder.down.3.attn.0.q.weight", "encoder.down.0.block.2.conv1.weight",
        "decoder.up.0.block.3.conv1.weight"}
    assert len(got) == 342


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_builds_with_its_f_and_d(name):
    f, d = (int(v) for v in name.rsplit("f", 1)[1].split("d"))
    model = on_meta(AutoencoderKL, **SPECS[name])
    x = torch.zeros(2, 3, 4 * f, 3 * f, device="meta")
    z = model.encode(x).mean
    assert model.f == f and model.embed_dim == d
    assert z.shape == (2, d, 4, 3) and model.decode(z).shape == x.shape


def test_all_specs_of_the_paper_are_there():
    assert {"f16d16", "f16d24", "f16d28", "f16d32", "f16d64", "f16d128", "f32d128", "f8d4"} <= set(SPECS)
    for name, count in {"f16d32": 2 + 3 + 2, "f8d4": 2}.items():  # kl-f8 has attention in the middle only
        modules = on_meta(AutoencoderKL, **SPECS[name]).modules()
        assert sum(isinstance(m, vae.AttnBlock) for m in modules) == count


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (64, 96)])
def test_any_size_that_f_divides(size):
    torch.manual_seed(0)
    model, x = AutoencoderKL(**SMALL).eval(), pictures(1, 3, *size)
    with torch.no_grad():
        x_hat, z, posterior = model(x)
    assert x_hat.shape == x.shape and z.shape == posterior.mean.shape == (1, 4, size[0] // 4, size[1] // 4)
    assert torch.isfinite(x_hat).all()


def test_full_size_at_512_on_meta():
    x = torch.zeros(1, 3, 512, 512, device="meta")
    assert on_meta(AutoencoderKL).encode(x).mean.shape == (1, 32, 32, 32)


# --- the posterior ---------------------------------------------------------------------------------------
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
    assert draws.mean().item() == pytest.approx(3, abs=0.05)
    assert draws.std().item() == pytest.approx(2, abs=0.05)


def test_the_posterior_of_bf16_moments_is_computed_in_fp32():
    moments = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    got, want = Posterior(moments), Posterior(moments.float())
    assert got.kl().dtype == torch.float32 and torch.equal(got.kl(), want.kl())
    noise = torch.ones(2, 4, 3, 3)
    assert got.sample(noise).dtype == torch.float32 and torch.equal(got.sample(noise), want.sample(noise))


def test_logvar_is_clamped_to_minus_30_and_20():
    moments = torch.zeros(1, 2, 1, 3)
    moments[0, 1, 0] = torch.tensor([-100.0, 100.0, 7.0])
    posterior = Posterior(moments)
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0, 7.0]
    assert torch.isfinite(posterior.kl()).all() and torch.isfinite(posterior.sample()).all()


def test_the_forward_pass_is_its_parts_in_order():
    torch.manual_seed(0)
    model, x, noise = AutoencoderKL(**SMALL).eval(), pictures(2, 3, 32, 32), torch.randn(2, 4, 8, 8)
    quant, post_quant = model.quant_conv, model.post_quant_conv
    moments = F.conv2d(model.encoder(x), quant.weight, quant.bias)
    z = moments[:, :4] + (moments[:, 4:] / 2).exp() * noise
    x_hat, z_got, posterior = model(x, noise)
    torch.testing.assert_close(z_got, z)
    torch.testing.assert_close(posterior.logvar, moments[:, 4:])
    torch.testing.assert_close(x_hat, model.decoder(F.conv2d(z, post_quant.weight, post_quant.bias)))


# --- building blocks -------------------------------------------------------------------------------------
def group_norm(x, weight, bias, groups=32):
    g = x.reshape(len(x), groups, -1)
    g = (g - g.mean(-1, keepdim=True)) / (g.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return g.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def randomise(module):
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, 0.0, 0.1)
    return module.double()


@pytest.mark.parametrize("channels, groups", [(32, 8), (64, 16), (128, 32), (256, 32), (512, 32)])
def test_norm_and_silu_with_32_groups_and_never_fewer_than_4_channels_in_one(channels, groups):
    layer = randomise(vae.norm_silu(channels))
    x = torch.randn(2, channels, 3, 3, dtype=torch.float64) + 2
    h = group_norm(x, layer.weight, layer.bias, groups)
    torch.testing.assert_close(layer(x), h / (1 + (-h).exp()))
    assert layer.state_dict().keys() == {"weight", "bias"}  # as in LDM's files, which have a plain GroupNorm


def test_attention_block_is_the_explicit_softmax():
    def project(conv, h):
        return torch.einsum("oc,bchw->bohw", conv.weight[..., 0, 0], h) + conv.bias[:, None, None]
    block, x = randomise(vae.AttnBlock(128)), torch.randn(2, 128, 3, 5, dtype=torch.float64)
    h = group_norm(x, block.norm.weight, block.norm.bias)
    q, k, v = (project(conv, h) for conv in (block.q, block.k, block.v))
    logits = torch.einsum("bchw,bcij->bhwij", q, k) / 128 ** 0.5
    weights = logits.flatten(3).softmax(-1).reshape(logits.shape)
    h = torch.einsum("bhwij,bcij->bchw", weights, v)
    torch.testing.assert_close(block(x), x + project(block.proj_out, h))


@pytest.mark.parametrize("c_out", [128, 256])
def test_residual_block(c_out):
    b, x = randomise(vae.ResnetBlock(128, c_out)), torch.randn(2, 128, 6, 6, dtype=torch.float64)
    h = group_norm(x, b.norm1.weight, b.norm1.bias)
    h = F.conv2d(h * torch.sigmoid(h), b.conv1.weight, b.conv1.bias, padding=1)
    h = group_norm(h, b.norm2.weight, b.norm2.bias)
    h = F.conv2d(h * torch.sigmoid(h), b.conv2.weight, b.conv2.bias, padding=1)
    skip = x if c_out == 128 else F.conv2d(x, b.nin_shortcut.weight, b.nin_shortcut.bias)
    torch.testing.assert_close(b(x), skip + h)


def test_downsample_pads_right_and_below():
    down, x = randomise(vae.downsample(2)), torch.randn(1, 2, 6, 8, dtype=torch.float64)
    padded = torch.zeros(2, 7, 9, dtype=torch.float64)  # zero past the last row and column
    padded[:, :6, :8] = x[0]
    want = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    for o, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        window = padded[:, 2 * i:2 * i + 3, 2 * j:2 * j + 3]
        want[0, o, i, j] = (window * down.conv.weight[o]).sum() + down.conv.bias[o]
    torch.testing.assert_close(down(x), want)


def test_upsample_repeats_then_convolves():
    up, x = randomise(vae.upsample(3)), torch.randn(1, 3, 4, 5, dtype=torch.float64)
    want = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x), F.conv2d(want, up.conv.weight, up.conv.bias, padding=1))


def test_the_middle_is_a_block_attention_and_a_block():
    mid, x = randomise(vae.middle(64)), torch.randn(1, 64, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(mid(x), mid.block_2(mid.attn_1(mid.block_1(x))))


# --- LPIPS and the files it needs --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def vgg_and_heads(tmp_path_factory):
    """Random weights under the names and keys of torchvision's VGG16 file and of the lpips package's."""
    from torchvision.models import vgg16
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    state = {"classifier.0.weight": torch.zeros(2, 2)}
    for k, v in vgg16(weights=None, init_weights=False).features.state_dict().items():
        scale = (2 / max(v[0].numel(), 1)) ** 0.5 if v.ndim > 1 else 0.1
        state[f"features.{k}"] = scale * torch.randn_like(v)
    torch.save(state, folder / "vgg16-397923af.pth")
    heads = enumerate((64, 128, 256, 512, 512))
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in heads}
    torch.save(heads, folder / "lpips_v0.1_vgg.pth")
    return folder


@pytest.fixture
def filled_cache(vgg_and_heads, torch_home, monkeypatch):
    """The real path through torch.hub's cache, with both files in place and taken for the real ones."""
    real, known = vae.file_hash, {}
    for name, digest in (("vgg16-397923af.pth", "397923af"), ("lpips_v0.1_vgg.pth", "a78928a0")):
        os.link(vgg_and_heads / name, torch_home.checkpoints / name)
        known[real(vgg_and_heads / name)] = f"sha256:{digest}0000"

    def file_hash(path):
        found = real(path)
        return known.get(found, found)
    monkeypatch.setattr(vae, "file_hash", file_hash)
    return torch_home


@pytest.mark.filterwarnings("ignore:.*pretrained.*:UserWarning",
                            "ignore:Arguments other than a weight enum.*:UserWarning")
def test_lpips_equals_the_package(filled_cache):
    lpips = pytest.importorskip("lpips")
    theirs = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    vgg = torch.load(filled_cache.checkpoints / "vgg16-397923af.pth", weights_only=True)
    state = torch.load(filled_cache.checkpoints / "lpips_v0.1_vgg.pth", weights_only=True)
    state |= {f"lins.{i}.model.1.weight": state[f"lin{i}.model.1.weight"] for i in range(5)}
    for name, value in vgg.items():  # slice s ends before layer 4, 9, 16, 23, 30
        if name.startswith("features."):
            layer = int(name.split(".")[1])
            s = 1 + sum(layer >= end for end in (4, 9, 16, 23))
            state[f"net.slice{s}.{name.removeprefix('features.')}"] = value
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) == {"scaling_layer.shift", "scaling_layer.scale"}
    torch.manual_seed(1)
    ours, x, y = LPIPS(), pictures(3, 3, 40, 56).requires_grad_(), pictures(3, 3, 40, 56).requires_grad_()
    got = ours(x, y)
    want = theirs(x, y)
    assert got.shape == (3, 1, 1, 1) and want.min() > 0.1  # random weights see a difference
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    got_grad, want_grad = (torch.autograd.grad(d.sum(), y, retain_graph=True)[0] for d in (got, want))
    torch.testing.assert_close(got_grad, want_grad, atol=1e-5 * want_grad.abs().max().item(), rtol=1e-4)
    assert torch.autograd.grad(got.sum(), x, allow_unused=True) == (None,)  # x gets no gradient
    assert not filled_cache.attempts
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("y", ["identical", "constant", "black"])
def test_lpips_gradient_is_finite(filled_cache, y):
    torch.manual_seed(0)
    ours, x = LPIPS(), pictures(1, 3, 32, 32)
    ours.features[2].bias.data.fill_(-1e4)  # relu1_2 is 0 everywhere, and the root has no gradient at 0
    y = {"identical": x.clone(), "constant": torch.full_like(x, 0.5), "black": torch.full_like(x, -1.0)}[y]
    distance = ours(x, y.requires_grad_())
    grad, = torch.autograd.grad(distance.sum(), y)
    assert torch.isfinite(distance).all() and torch.isfinite(grad).all()


def test_lpips_of_an_image_with_itself_is_zero():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32)
    assert LPIPS(pretrained=False)(x, x).abs().max() == 0


@pytest.mark.parametrize("name", ["vgg16-397923af.pth", "lpips_v0.1_vgg.pth"])
def test_a_file_with_another_hash_is_refused(filled_cache, name):
    (filled_cache.checkpoints / name).unlink()
    (filled_cache.checkpoints / name).write_bytes(b"not these weights")
    found = hashlib.sha256(b"not these weights").hexdigest()
    line = user_error(LPIPS)
    assert str(filled_cache.checkpoints / name) in line and found in line and "delete it" in line


def test_without_network_the_message_names_the_place(torch_home):
    line = user_error(LPIPS)
    assert torch_home.attempts == ["https://download.pytorch.org/models/vgg16-397923af.pth"]
    assert str(torch_home.checkpoints / "vgg16-397923af.pth") in line
    assert not list(torch_home.checkpoints.iterdir())


def test_the_files_that_lpips_asks_for_are_the_real_ones(vgg_and_heads, monkeypatch):
    """torchvision's own URL holds 397923af, and the package lpips ships the file of the heads."""
    lpips = pytest.importorskip("lpips")
    from torchvision.models import VGG16_Weights
    asked = []

    def record(url, digest="", name=None):
        name = name or url.rsplit("/", 1)[1]
        asked.append((url, digest))
        return vgg_and_heads / name
    monkeypatch.setattr(vae, "hub_file", record)
    LPIPS()
    (vgg, vgg_digest), (heads, heads_digest) = asked
    assert vgg == VGG16_Weights.IMAGENET1K_V1.url
    assert vgg_digest.startswith("sha256:") and vgg.endswith(f"-{vgg_digest.removeprefix('sha256:')}.pth")
    shipped = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    assert vae.file_hash(shipped).startswith(heads_digest) and len(heads_digest) == len("sha256:a78928a0")
    assert heads.endswith("lpips/weights/v0.1/vgg.pth")


def test_hub_file_downloads_once(torch_home, monkeypatch):
    def download(url, path):
        calls.append(url)
        Path(path).write_bytes(b"abc")
    calls = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for digest in (f"sha256:{hashlib.sha256(b'abc').hexdigest()}", "sha256:ba7816bf", ""):
        assert vae.hub_file("https://example.org/a/b.bin", digest) == torch_home.checkpoints / "b.bin"
    assert vae.hub_file("https://example.org/b.bin", "sha256:ba7816bf", "c").name == "c"
    assert calls == ["https://example.org/a/b.bin", "https://example.org/b.bin"]
    assert "b.bin" in user_error(vae.hub_file, "https://example.org/a/b.bin", "sha256:ba7816b0")


# --- the discriminator, and two processes -------------------------------------------------------------------
def pix2pix():
    """The network of pix2pix, written out."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.LeakyReLU(0.2),
        nn.Conv2d(128, 256, 4, 2, 1, bias=False), nn.BatchNorm2d(256), nn.LeakyReLU(0.2),
        nn.Conv2d(256, 512, 4, 1, 1, bias=False), nn.BatchNorm2d(512), nn.LeakyReLU(0.2),
        nn.Conv2d(512, 1, 4, 1, 1))


def test_the_patch_discriminator_is_that_of_pix2pix():
    torch.manual_seed(0)
    ours, theirs = PatchDiscriminator(), pix2pix()
    # LDM's names: main.0.weight, ...
    theirs.load_state_dict({k.removeprefix("main."): v for k, v in ours.state_dict().items()})
    x = torch.randn(4, 3, 64, 64)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert ours(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    for module in PatchDiscriminator().modules():  # pix2pix's initialisation
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3) and not module.bias.any()


NUMBERS = torch.arange(8.0).reshape(4, 2)


def toy_losses(rows, weight):
    """The second loss is so small that the 1e-4 in the denominator counts."""
    return (rows @ weight.T).pow(2).mean(), 1e-5 * (rows @ weight.T).sum(1).mean()


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    weight = torch.ones(3, 2, requires_grad=True)
    w = adaptive_weight(*toy_losses(NUMBERS.chunk(2)[rank], weight), weight)
    torch.save(w, folder / f"result{rank}")
    dist.destroy_process_group()


def test_two_processes_agree_on_eq_4(tmp_path):
    """Each process sees half of the batch, but the norms are those of the whole batch's gradients."""
    torch.multiprocessing.start_processes(one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"result{rank}", weights_only=True) for rank in range(2))
    weight = torch.ones(3, 2, requires_grad=True)
    rec, vf = (torch.autograd.grad(loss, weight)[0].norm() for loss in toy_losses(NUMBERS, weight))
    assert first == second and first.item() == pytest.approx((rec / (vf + 1e-4)).item(), rel=1e-5)


# --- files of weights --------------------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_files_that_are_no_checkpoints_end_in_one_line(tmp_path, monkeypatch):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"x": torch.arange(100_000)}, good)
    whole = good.read_bytes()
    assert torch.equal(vae.torch_load(good)["x"], torch.arange(100_000))
    for content in (*(whole[:n] for n in (0, 1, 100, 5000, len(whole) - 100)), b"step,rec\n1,0.5\n", b"hello",
                    b"<!DOCTYPE html>", b"\x89PNG\r\n\x1a\n"):
        bad.write_bytes(content)
        line = user_error(vae.torch_load, bad, ": run this")
        assert f"{bad} is no checkpoint" in line and line.endswith(": run this"), content
    for path in (tmp_path, tmp_path / "none.pt"):  # a folder is no file
        assert f"there is no file {path}: run this" in user_error(vae.torch_load, path, ": run this")
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "owned"))
    torch.save({"x": Evil()}, bad)
    assert f"{bad} is no checkpoint" in user_error(vae.torch_load, bad)
    assert not (tmp_path / "owned").exists()


def test_fingerprint_is_of_names_and_values():
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    mark = fingerprint(weights)
    assert mark == fingerprint(dict(reversed(weights.items()))) and len(mark) == 16 and int(mark, 16) >= 0
    assert mark == fingerprint(weights | {"a": weights["a"].t().contiguous().t()})  # another memory layout
    others = [weights | {"a": weights["a"] + 1e-6 * torch.eye(2, 3)}, {"a": weights["a"], "c": weights["b"]},
              weights | {"b": torch.ones(3)}]
    assert len({mark, *map(fingerprint, others)}) == 4


def full_size(name):
    """All names and full shapes of a tokenizer's weights, each of which is a single stored number."""
    state = on_meta(AutoencoderKL, **SPECS[name]).state_dict()
    return {k: torch.zeros(1).expand(v.shape) for k, v in state.items()}


AUTHORS_EXTRA = dict.fromkeys((
    "loss.logvar", "loss.perceptual_loss.net.slice1.0.weight", "loss.discriminator.main.0.weight",
    "linear_proj.weight", "foundation_model.model.cls_token"), torch.zeros(3))


@pytest.mark.parametrize("name", ["f16d32", "f8d4", "f16d16", "f16d128", "f32d128"])
def test_released_tokenizers_are_recognised_by_their_shapes(tmp_path, name):
    """The authors' f16d32 and CompVis' kl-f8 are under state_dict, with weights that only training needs.
    The others are plain weights by name."""
    weights, path = full_size(name), tmp_path / "file.ckpt"
    state = {"f16d32": {"epoch": 49, "global_step": 5, "state_dict": weights | AUTHORS_EXTRA},
             "f8d4": {"state_dict": weights | {"loss.logvar": torch.zeros(1)}}}.get(name, weights)
    torch.save(state, path)
    spec, got = vae.read_released_tokenizer(path)
    assert spec == SPECS[name] and got.keys() == weights.keys()


@pytest.mark.parametrize("remove, add, words", [
    ("encoder.mid.attn_1.q.bias", {}, ["encoder.mid.attn_1.q.bias", "file: None", "network: (512,)"]),
    ("", {"encoder.extra.weight": torch.zeros(2)}, ["encoder.extra.weight", "file: (2,)", "network: None"]),
    ("", {"quant_conv.bias": torch.zeros(8)}, ["quant_conv.bias", "file: (8,)", "network: (64,)"])])
def test_a_weight_too_many_or_too_few_is_named(tmp_path, remove, add, words):
    weights = full_size("f16d32") | add
    weights.pop(remove, None)
    torch.save({"state_dict": weights | AUTHORS_EXTRA}, tmp_path / "wrong.pt")
    line = user_error(vae.read_released_tokenizer, tmp_path / "wrong.pt")
    assert "wrong.pt" in line and all(word in line for word in words), line


def test_load_tokenizer_checks_what_it_opens(tmp_path):
    path = tmp_path / "vae.pt"
    good = {"stage": "vae", "step": 5, "total_steps": 5, "settings": {}, "spec": SMALL,
            "model": AutoencoderKL(**SMALL).state_dict()}

    def load(change, **kwargs):
        torch.save(good | change, path)
        return vae.load_tokenizer(path, "cpu", **kwargs)
    model, state = load({})
    assert state["step"] == 5 and not model.training and not any(p.requires_grad for p in model.parameters())
    assert fingerprint(model.state_dict()) == fingerprint(good["model"])
    for change, words in (({"stage": "dit"}, ["no vae checkpoint"]), ({"spec": SMALL | {"ch": 64}}, ["fit"]),
                          ({"step": 4}, ["unfinished", "step 4 of 5", "--unfinished"])):
        line = user_error(load, change)
        assert str(path) in line and all(word in line for word in words), line
    assert load({"step": 4}, unfinished=True)[1]["step"] == 4
    assert "python train_vae.py" in user_error(vae.load_tokenizer, tmp_path / "none.pt", "cpu")


def test_safetensors_are_read_if_the_package_is_there(tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch").save_file
    weights, path = AutoencoderKL(**SPECS["mini-f4d4"]).state_dict(), tmp_path / "vae.safetensors"
    save_file(weights, path)
    model, state = vae.load_tokenizer(path, "cpu")
    assert state["spec"] == SPECS["mini-f4d4"] and fingerprint(model.state_dict()) == fingerprint(weights)
    half = tmp_path / "half.safetensors"
    half.write_bytes(path.read_bytes()[:-1000])
    assert f"{half} is no checkpoint" in user_error(vae.load_tokenizer, half, "cpu")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in user_error(vae.load_tokenizer, path, "cpu")
