"""vf_loss.py, and train_step of train_vae.py, which uses it. The oracles are loops in float64, gradients by
hand, and the gradient of each loss alone, put together with the paper's weights."""
import math
import os
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import user_error
from torch import nn

import vf_loss
from train_vae import Run, Settings, World, train_step
from vae import SPECS
from vf_loss import Classifier, FoundationModel, load_foundation_model


# --- Eq. 2 and 3 -----------------------------------------------------------------------------------------
def maps(channels_z=6, channels_f=6, batch=2, h=3, w=4):
    """z and f, which are partly aligned and not of unit length."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(batch, channels_f, h, w, generator=generator)
    z = torch.randn(batch, channels_z, h, w, generator=generator)
    return (z + f if channels_z == channels_f else z) * 3, f


def dot(a, b):
    return sum(float(u) * float(v) for u, v in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a)) / math.sqrt(dot(b, b))


def vectors(m, b):
    """The vectors of map b, row by row."""
    return list(m[b].flatten(1).T)


@pytest.mark.parametrize("margin", [0.0, 0.4, 0.5, 1.0])
def test_eq_2_equals_loops_in_float64(margin):
    z, f = maps()
    terms = []
    for b in range(2):
        pairs = zip(vectors(z, b), vectors(f, b), strict=True)
        terms += [max(0.0, 1 - margin - cosine(u, v)) for u, v in pairs]
    want = sum(terms) / len(terms)
    assert len(terms) == 2 * 12 and want > 0 and (margin == 0 or 0.0 in terms)  # the margin does something
    assert vf_loss.marginal_cosine_loss(z, f, margin).item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("channels_z", [6, 3])
def test_eq_3_equals_loops_in_float64(margin, channels_z):
    z, f = maps(channels_z)
    terms = []
    for b in range(2):
        zs, fs = vectors(z, b), vectors(f, b)
        for i in range(12):
            gaps = [abs(cosine(zs[i], zs[j]) - cosine(fs[i], fs[j])) for j in range(12)]
            terms += [max(0.0, gap - margin) for gap in gaps]
    want = sum(terms) / len(terms)
    assert want > 0.01 and len(terms) == 2 * 12 * 12
    assert vf_loss.marginal_distance_matrix_loss(z, f, margin).item() == pytest.approx(want, abs=1e-6)


def test_margins_of_the_paper_are_the_defaults():
    z, f = maps()
    mcos, mdms = vf_loss.marginal_cosine_loss, vf_loss.marginal_distance_matrix_loss
    assert torch.equal(mcos(z, f), mcos(z, f, 0.5)) and Settings.cos_margin == 0.5
    assert torch.equal(mdms(z, f), mdms(z, f, 0.25)) and Settings.mdms_margin == 0.25


def test_both_losses_are_zero_for_features_that_agree():
    _, f = maps()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    turned = torch.einsum("dc,bchw->bdhw", rotation, f)  # keeps the angles
    assert vf_loss.marginal_cosine_loss(2 * f, f, 0.0) == pytest.approx(0, abs=1e-6)
    assert vf_loss.marginal_distance_matrix_loss(turned, f, 0.0) == pytest.approx(0, abs=1e-6)
    assert vf_loss.marginal_cosine_loss(-f, f, 0.0) == pytest.approx(2)


def test_switched_off_terms_and_precision():
    z, f = maps()
    both = vf_loss.vf_losses(z, f, 0.1, 0.0)
    mdms = vf_loss.marginal_distance_matrix_loss(z, f, 0.0)
    assert torch.equal(both[0], vf_loss.marginal_cosine_loss(z, f, 0.1)) and torch.equal(both[1], mdms)
    assert [v.item() > 0 for v in vf_loss.vf_losses(z, f, 0.1, 0.0, use_mcos=False)] == [False, True]
    assert [v.item() > 0 for v in vf_loss.vf_losses(z, f, 0.1, 0.0, use_mdms=False)] == [True, False]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vf_loss.vf_losses(z, f, 0.1, 0.0)[1], mdms)  # fp32 even under autocast
        z16 = z.bfloat16()
        near, exact = (vf_loss.vf_losses(z_proj, f, 0.1, 0.0) for z_proj in (z16, z16.float()))
        assert torch.equal(near[0], exact[0])


# --- Eq. 4 -----------------------------------------------------------------------------------------------
def test_eq_4_by_hand_on_a_linear_layer():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    x, a, b = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.5])
    out = weight @ x
    # d (a . W x) / dW = a x^T, of norm |a| |x| = sqrt(5) 5; and |b| |x| = 2.5
    w = vf_loss.adaptive_weight(a @ out, b @ out, weight)
    assert w.item() == pytest.approx(math.sqrt(5) * 5 / (2.5 + 1e-4), rel=1e-6) and not w.requires_grad
    assert weight.grad is None
    (a @ out + w * (b @ out)).backward()  # the graph is still there
    torch.testing.assert_close(weight.grad, torch.outer(a + w * b, x))


@pytest.mark.parametrize("rec, vf", [(1.0, 1.0), (300.0, 1e-2), (1e-3, 50.0)])
def test_eq_4_makes_the_two_gradients_equally_long(rec, vf):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8)
    z = layer(x)
    rec_loss, vf_term = rec * z.square().mean(), vf * z.sin().abs().mean()
    w = vf_loss.adaptive_weight(rec_loss, vf_term, layer.weight)
    a, b = (torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm().item()
            for loss in (rec_loss, w * vf_term))
    assert b == pytest.approx(a / (1 + 1e-4 * w.item() / b), rel=0.05 if vf == 1e-2 else 1e-3)


def test_eq_4_is_clamped():
    weight = torch.ones(1, requires_grad=True)
    zero = 0 * weight.sum()
    for rec, other, kwargs, want in ((2.5, zero, {}, 2.5e4),  # 1e-4 in the denominator
                                     (1e9, zero, {}, 1e8), (1e9, zero, {"max_weight": 1e4}, 1e4),
                                     (0, weight.sum(), {}, 0)):
        w = vf_loss.adaptive_weight(rec * weight.sum(), other, weight, **kwargs)
        assert w.item() == pytest.approx(want)


# --- the training step: each loss's gradient alone, put together -----------------------------------------
class Teacher(nn.Module):
    """Fixed features of the image, which is what train_step needs of a foundation model."""
    width = 12

    def forward(self, x, grid):
        kernel = torch.randn(12, 3, 1, 1, generator=torch.Generator().manual_seed(5))
        return F.conv2d(F.adaptive_avg_pool2d(x, grid), kernel).sin()


def make_run(monkeypatch, **settings):
    """A Run whose optimizers do nothing, so that the gradients of train_step stay readable."""
    monkeypatch.setitem(SPECS, "tiny", {"embed_dim": 4, "ch": 32, "ch_mult": (1, 1, 2), "num_res_blocks": 1,
                                        "attn_resolutions": (8,), "resolution": 32})
    small = {"spec": "tiny", "image_size": 32, "compile": False, "batch_size": 3, "lpips_weight": 0.0,
             "disc_start": 0}
    settings = Settings(**(small | settings))
    teacher = Teacher() if settings.vf != "none" else None
    run = Run(settings, World("cpu"), teacher, pretrained=False)
    run.opt.step = lambda: None
    if settings.disc_weight:
        run.opt_disc.step = lambda: None
    torch.manual_seed(11)
    with torch.no_grad():  # a latent with a spread, so that sample and mean differ
        quant_conv = run.tokenizer.vae.quant_conv
        quant_conv.bias[4:] = 0.5
        spread = torch.logspace(-1.5, 1, 8)[[4, 7, 2, 0, 5, 1, 6, 3]]
        quant_conv.weight.mul_(spread[:, None, None, None])
    return run, torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 4, 8, 8)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def straightforward(run, x, noise, adversarial=True, sample=True, layer="vae.encoder.conv_out.weight",
                    disc_layer="vae.decoder.conv_out.weight"):
    """The gradient of every loss alone, then their sum with the paper's weights -> (gradients, numbers)."""
    s, vae = run.settings, run.tokenizer.vae
    parameters = dict(run.tokenizer.named_parameters())

    def gradient(loss):
        found = torch.autograd.grad(loss, parameters.values(), retain_graph=True, allow_unused=True)
        found = dict(zip(parameters, found, strict=True))
        return {name: torch.zeros_like(parameters[name]) if g is None else g for name, g in found.items()}
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, 1)
    std = (logvar / 2).exp()
    z = mean + std * noise
    x_hat = vae.decode(z)
    pixels = (x - x_hat).abs()
    if run.lpips is not None:
        pixels = pixels + s.lpips_weight * run.lpips(x, x_hat)
    rec = pixels.sum() / len(x)
    q, p = torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(q, p).sum() / len(x)
    numbers = {"rec": rec, "kl": kl, "l1": (x - x_hat).abs().mean()}
    rec_gradient = gradient(rec)
    parts = [(1.0, rec_gradient), (s.kl_weight, gradient(kl))]
    if adversarial:
        g = -run.disc(x_hat).mean()
        g_gradient = gradient(g)
        ratio = rec_gradient[disc_layer].norm() / (g_gradient[disc_layer].norm() + 1e-4)
        numbers |= {"g": g, "w_disc": s.disc_weight * ratio.clamp(0, 1e4)}
        parts.append((numbers["w_disc"], g_gradient))
    if run.foundation is not None:
        z_proj, f = run.tokenizer.linear_proj(z if sample else mean), run.foundation(x, z.shape[-2:])
        mcos = vf_loss.marginal_cosine_loss(z_proj, f, s.cos_margin) * s.mcos
        mdms = vf_loss.marginal_distance_matrix_loss(z_proj, f, s.mdms_margin) * s.mdms
        vf_gradient = gradient(mcos + mdms)
        ratio = rec_gradient[layer].norm() / (vf_gradient[layer].norm() + 1e-4)
        numbers |= {"mcos": mcos, "mdms": mdms, "w_vf": s.vf_weight * ratio.clamp(0, 1e8)}
        parts.append((numbers["w_vf"], vf_gradient))
    total = {name: sum(weight * part[name] for weight, part in parts) for name in parameters}
    return total, {name: value.item() for name, value in numbers.items()}


def distance(got, want):
    """The largest difference of a weight's gradient, relative to that gradient. A bias before a GroupNorm has
    a gradient of rounding errors only, so the second term compares it with all gradients together."""
    assert got.keys() == want.keys()
    total = torch.cat([g.flatten() for g in want.values()]).norm()
    return max(((got[k] - want[k]).norm() / (want[k].norm() + 1e-3 * total)).item() for k in want)


CASES = {"everything": {"lpips_weight": 1.0, "kl_weight": 0.01}, "no LPIPS": {}, "before its start": {},
         "no discriminator": {"disc_weight": 0.0}, "no vf": {"vf": "none"}, "no mcos": {"mcos": False},
         "no mdms": {"mdms": False}}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_train_step_are_those_of_the_sum_of_losses(monkeypatch, case):
    run, x, noise = make_run(monkeypatch, disc_start=7, **CASES[case])
    adversarial = case not in ("no discriminator", "before its start")
    want, numbers = straightforward(run, x, noise, adversarial)
    terms = train_step(run, x, noise, 6 if case == "before its start" else 7)
    assert distance(gradients(run.tokenizer), want) < 1e-4
    assert (run.disc is not None and run.disc.main[0].weight.grad is not None) == adversarial
    assert terms.keys() == numbers.keys() | ({"d"} if adversarial else set())
    for name, value in numbers.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name
        assert not terms[name].requires_grad


def test_that_comparison_sees_a_wrong_layer_or_the_mean(monkeypatch):
    """An oracle with one mistake is far away, so the test above would see the same mistake in train_step."""
    run, x, noise = make_run(monkeypatch)
    train_step(run, x, noise, 0)
    got = gradients(run.tokenizer)
    assert distance(got, straightforward(run, x, noise)[0]) < 1e-4
    wrong = [{"layer": f"vae.{name}"} for name in
             ("quant_conv.weight", "encoder.conv_in.weight", "encoder.conv_out.bias")]
    wrong += [{"disc_layer": f"vae.decoder.{name}.weight"} for name in ("conv_in", "norm_out")]
    for kwargs in [*wrong, {"sample": False}]:
        assert distance(got, straightforward(run, x, noise, **kwargs)[0]) > 1e-2, kwargs


def test_vf_and_reconstruction_pull_equally_at_the_last_layer_of_the_encoder(monkeypatch):
    """[Sec. 3.3] The VF part of what train_step left in .grad is w_hyper times as long as the
    reconstruction's, on encoder.conv_out.weight alone."""
    run, x, noise = make_run(monkeypatch, disc_weight=0.0, kl_weight=0.0, lpips_weight=1.0, vf_weight=0.3,
                             cos_margin=0.0, mdms_margin=0.0)
    train_step(run, x, noise, 0)
    both = gradients(run.tokenizer)
    run.settings.vf_weight = 0.0
    train_step(run, x, noise, 0)
    rec = gradients(run.tokenizer)
    ratio = {name: ((both[name] - rec[name]).norm() / rec[name].norm()).item() for name in both}
    assert ratio["vae.encoder.conv_out.weight"] == pytest.approx(0.3, rel=5e-3)
    for other in ("quant_conv.weight", "encoder.conv_in.weight", "encoder.mid.block_1.conv1.weight"):
        assert abs(ratio[f"vae.{other}"] - 0.3) > 0.015, other
    # W is trained, by VF loss only; VF loss stops at z
    assert rec["linear_proj.weight"].abs().max() == 0 and both["linear_proj.weight"].abs().max() > 0
    assert torch.equal(both["vae.decoder.conv_out.weight"], rec["vae.decoder.conv_out.weight"])


def test_clamps_of_train_step(monkeypatch):
    """1e8 for VF loss and 1e4 for the discriminator, whose gradients vanish here; the reconstruction's is
    huge."""
    run, x, noise = make_run(monkeypatch, cos_margin=3.0, mdms_margin=3.0)  # margins that nothing exceeds
    with torch.no_grad():
        run.tokenizer.vae.decoder.conv_out.weight.mul_(1e5)
        run.disc.main[-1].weight.zero_()
    terms = train_step(run, x, noise, 0)
    assert terms["w_vf"].item() == pytest.approx(0.1 * 1e8)
    assert terms["w_disc"].item() == pytest.approx(0.5 * 1e4)
    assert terms["mcos"] == terms["mdms"] == 0


def test_the_step_of_the_discriminator(monkeypatch):
    """Its gradients are those of the hinge loss on real images and detached reconstructions, and hold nothing
    of the generator's loss."""
    run, x, noise = make_run(monkeypatch)
    with torch.no_grad():
        x_hat = run.tokenizer.vae(x, noise)[0]
        for m in run.disc.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(8)  # logits on both sides of the hinge
    real, fake = run.disc(x), run.disc(x_hat)
    want = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    assert (real > 1).any() and (real < 1).any() and (fake > -1).any() and (fake < -1).any()
    parameters = dict(run.disc.named_parameters())
    grads = torch.autograd.grad(want, parameters.values())
    for _ in range(2):  # the gradients of two steps do not add up
        terms = train_step(run, x, noise, 0)
    assert terms["d"].item() == pytest.approx(want.item(), rel=1e-5)
    assert distance(gradients(run.disc), dict(zip(parameters, grads, strict=True))) < 1e-4


def test_both_optimizers_are_adam_with_the_rate_of_the_paper_over_the_right_weights(monkeypatch):
    run, *_ = make_run(monkeypatch, lr=1e-4)
    for optimizer, module in ((run.opt, run.tokenizer), (run.opt_disc, run.disc)):
        assert isinstance(optimizer, torch.optim.Adam)
        group, = optimizer.param_groups
        assert group["lr"] == 1e-4 and group["betas"] == (0.5, 0.9)
        assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}


def test_bf16_train_step(monkeypatch):
    """Only the networks are under autocast. Losses and adaptive weights are the fp32 numbers of the bf16
    x_hat and z' on every processor, and the losses stay near those of fp32 networks."""
    run, x, noise = make_run(monkeypatch, lpips_weight=1.0)
    exact = train_step(run, x, noise, 0)
    run, x, noise = make_run(monkeypatch, lpips_weight=1.0, precision="bf16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_hat, z, posterior, z_proj = run.tokenizer(x, noise)
    assert x_hat.dtype == z_proj.dtype == torch.bfloat16  # so the networks are
    x_hat = x_hat.float()
    rec = ((x - x_hat).abs() + run.lpips(x, x_hat)).sum() / len(x)
    g, f = -run.disc(x_hat).mean(), run.foundation(x, z.shape[-2:])
    mcos = vf_loss.marginal_cosine_loss(z_proj.float(), f)
    mdms = vf_loss.marginal_distance_matrix_loss(z_proj.float(), f)

    def ratio(loss, net):
        weight = net.conv_out.weight
        a, b = (torch.autograd.grad(of, weight, retain_graph=True)[0].norm() for of in (rec, loss))
        return a / (b + 1e-4)
    want = {"rec": rec, "l1": (x - x_hat).abs().mean(), "kl": posterior.kl().mean(), "g": g, "mcos": mcos,
            "mdms": mdms, "w_disc": 0.5 * ratio(g, run.tokenizer.vae.decoder),
            "w_vf": 0.1 * ratio(mcos + mdms, run.tokenizer.vae.encoder)}
    near = train_step(run, x, noise, 0)
    for name, value in want.items():
        assert near[name].dtype == torch.float32, name
        assert near[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for name, tolerance in {"rec": 0.01, "l1": 0.01, "kl": 0.02, "mcos": 0.01, "mdms": 0.02}.items():
        assert near[name].item() == pytest.approx(exact[name].item(), rel=tolerance), name


# --- foundation models -----------------------------------------------------------------------------------
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
UNCHANGED = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def pictures(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def normalised(x, mean, std):
    return torch.stack([((x[:, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)], dim=1)


def shown(x, size, mean, std):
    """What a network must be given of images x."""
    return F.interpolate(normalised(x, mean, std), size, mode="bilinear")


def spy_model(patch=14):
    """A FoundationModel, and a list of what its network was shown."""
    seen = []

    def tokens(net, x):
        seen.append((x, torch.is_grad_enabled()))
        return torch.zeros(len(x), 5, x.shape[-2] // patch, x.shape[-1] // patch)
    return FoundationModel(nn.Linear(2, 2), tokens, 5, patch, *IMAGENET), seen


@pytest.mark.parametrize("size, f, want", [((256, 256), 16, (224, 224)), ((256, 256), 32, (112, 112)),
                                           ((128, 192), 16, (112, 168)), ((32, 32), 4, (112, 112))])
def test_the_image_is_resized_so_that_the_grids_agree(size, f, want):
    model, seen = spy_model()
    x, grid = pictures(1, 3, *size), (size[0] // f, size[1] // f)
    assert model(x, grid).shape == (1, 5, *grid)
    torch.testing.assert_close(seen[0][0], shown(x, want, *IMAGENET), atol=1e-5, rtol=1e-4)
    assert seen[0][1] is False  # no graph


def test_a_foundation_model_is_frozen():
    model, _ = spy_model()
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.net.training
    assert model.state_dict().keys() == {"net.weight", "net.bias"}


def test_an_unknown_foundation_model_is_an_error():
    with pytest.raises(KeyError, match="dino"):
        load_foundation_model("dino")


HUBCONF = '''
import torch
from torch import nn

class ViT(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed_dim, self.patch_embed = width, nn.Conv2d(3, width, 14, stride=14)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    def forward_features(self, x, masks=None):
        h = self.patch_embed(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], 1)
        h = nn.functional.layer_norm(h, (self.embed_dim,))
        return {"x_norm_clstoken": h[:, 0], "x_norm_patchtokens": h[:, 1:], "x_prenorm": h, "masks": masks}

def build(name, width, pretrained):
    net = ViT(width)
    if pretrained:
        url = f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth"
        net.load_state_dict(torch.hub.load_state_dict_from_url(url, map_location="cpu"), strict=True)
    return net

def dinov2_vits14(*, pretrained=True, **kwargs):
    return build("dinov2_vits14", 24, pretrained)

def dinov2_vitl14(*, pretrained=True, **kwargs):
    return build("dinov2_vitl14", 32, pretrained)
'''


def fill_dinov2_cache(hub):
    """What a user without a network puts in place, the repository at the pinned commit and the weights, here
    small and random."""
    repository = hub / f"facebookresearch_dinov2_{vf_loss.DINOV2_COMMIT}"
    repository.mkdir(parents=True)
    (repository / "hubconf.py").write_text(HUBCONF)
    (hub / "checkpoints").mkdir(exist_ok=True)
    torch.manual_seed(0)
    for name, width in (("dinov2_vits14", 24), ("dinov2_vitl14", 32)):
        weights = {"patch_embed.weight": torch.randn(width, 3, 14, 14) * 0.1,
                   "patch_embed.bias": torch.randn(width), "cls_token": torch.randn(1, 1, width)}
        torch.save(weights, hub / "checkpoints" / f"{name}_pretrain.pth")


@pytest.fixture
def dinov2_cache(torch_home):
    fill_dinov2_cache(torch_home.hub)
    return torch_home


@pytest.mark.parametrize("name, file, vf_input", [
    ("dinov2", "dinov2_vitl14", "model"), ("dinov2-l", "dinov2_vitl14", "authors"),
    ("dinov2-s", "dinov2_vits14", "model")])
def test_dinov2_through_the_real_hub_call(dinov2_cache, name, file, vf_input):
    model = load_foundation_model(name, (16, 12), vf_input)
    weights = torch.load(dinov2_cache.checkpoints / f"{file}_pretrain.pth", weights_only=True)
    x = pictures(2, 3, 256, 192)
    image = shown(x, (224, 168), *(UNCHANGED if vf_input == "authors" else IMAGENET))
    want = F.conv2d(image, weights["patch_embed.weight"], weights["patch_embed.bias"], stride=14)
    want = (want - want.mean(1, keepdim=True)) / (want.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    got = model(x.requires_grad_(), (16, 12))
    assert model.width == got.shape[1] == len(weights["patch_embed.bias"]) and not got.requires_grad
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not dinov2_cache.attempts and model.bf16 == (vf_input == "model")


@pytest.mark.parametrize("missing", ["code", "weights"])
def test_dinov2_without_network_says_what_to_put_where(dinov2_cache, missing):
    repository = dinov2_cache.hub / f"facebookresearch_dinov2_{vf_loss.DINOV2_COMMIT}"
    weights = dinov2_cache.checkpoints / "dinov2_vitl14_pretrain.pth"
    if missing == "code":
        repository.rename(dinov2_cache.hub / "elsewhere")
    else:
        weights.unlink()
    message = user_error(load_foundation_model, "dinov2")
    url, = dinov2_cache.attempts
    assert ("github.com" if missing == "code" else "dinov2_vitl14_pretrain.pth") in url
    for words in (repository.name, weights.name, str(weights.parent), "--vf"):
        assert words in message


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_code_in_the_weights_of_dinov2_does_not_run(dinov2_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "evil"))
    torch.save({"patch_embed.weight": Evil()}, dinov2_cache.checkpoints / "dinov2_vitl14_pretrain.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_foundation_model("dinov2")
    assert not (tmp_path / "evil").exists()


SMALL_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2}
SMALL_VITS = {"mae": SMALL_VIT, "clip": SMALL_VIT, "dinov2": SMALL_VIT,
              "sam": SMALL_VIT | {"global_attn_indexes": (1,), "window_size": 6}}


@pytest.fixture
def timm_cache(torch_home, monkeypatch):
    """Narrow networks under the real names, configurations and file names: create_model gets depth and width
    on top of what load_timm asks for."""
    timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
    create = timm.create_model
    small = {vf_loss.TIMM_MODELS[name]: kwargs for name, kwargs in SMALL_VITS.items()}
    monkeypatch.setattr(timm, "create_model", lambda model, **kwargs: create(model, **kwargs, **small[model]))
    torch_home.reference = {}
    for name, model in vf_loss.TIMM_MODELS.items():
        torch.manual_seed(0)
        net = create(model, pretrained=False, **small[model]).eval()
        for p in net.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        safetensors.save_file(net.state_dict(), torch_home.checkpoints / f"{model}.safetensors")
        torch_home.reference[name] = net
    return torch_home


def vision_transformer(name, weights, image, pos):
    """The patch tokens (1, N, C) by hand, from the weights' names. OpenAI trained CLIP with x sigmoid(1.702
    x) and a norm before the blocks; DINOv2 scales each branch."""
    def norm(h, name):
        return F.layer_norm(h, h.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def linear(h, name):
        return h @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)
    clip, eps = name == "clip", 1e-5 if name == "clip" else 1e-6
    kernel = weights["patch_embed.proj.weight"]
    h = F.conv2d(image, kernel, weights.get("patch_embed.proj.bias"), stride=kernel.shape[-1])
    h = torch.cat([weights["cls_token"], h.flatten(2).mT], 1) + pos  # (1, 1 + N, C)
    h = norm(h, "norm_pre") if clip else h
    for i in range(2):
        block = f"blocks.{i}"
        q, k, v = linear(norm(h, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(2, (3, 2, 32)).unbind(2)
        attention = (torch.einsum("bihc,bjhc->bhij", q, k) / 32 ** 0.5).softmax(-1)  # 2 heads of 32
        out = linear(torch.einsum("bhij,bjhc->bihc", attention, v).flatten(2), f"{block}.attn.proj")
        h = h + out * weights.get(f"{block}.ls1.gamma", 1)
        out = linear(norm(h, f"{block}.norm2"), f"{block}.mlp.fc1")
        out = out * torch.sigmoid(1.702 * out) if clip else 0.5 * out * (1 + torch.erf(out / 2 ** 0.5))
        h = h + linear(out, f"{block}.mlp.fc2") * weights.get(f"{block}.ls2.gamma", 1)
    h = norm(h, "norm")[:, 1:]
    return linear(h, "head") if clip else h  # CLIP: to the joint space of images and texts


@pytest.mark.parametrize("name, vf_input, mean_std, width, grid", [
    ("mae", "model", IMAGENET, 64, (14, 14)), ("mae", "model", IMAGENET, 64, (16, 16)),
    ("clip", "model", OPENAI, 768, (16, 16)), ("clip", "authors", UNCHANGED, 768, (8, 12)),
    ("sam", "model", IMAGENET, 256, (16, 16)), ("sam", "model", IMAGENET, 256, (8, 12)),
    ("sam", "authors", UNCHANGED, 256, (64, 64)), ("dinov2", "authors", UNCHANGED, 64, (16, 16))])
@torch.no_grad()
def test_mae_clip_sam_and_dinov2_through_timm(timm_cache, name, vf_input, mean_std, width, grid):
    model, net = load_foundation_model(name, grid, vf_input), timm_cache.reference[name]
    assert not timm_cache.attempts and model.bf16 == (vf_input == "model")
    loaded, saved = model.net.state_dict(), net.state_dict()
    if name != "dinov2":  # whose position table may be resized from 518 already when the file is loaded
        assert loaded.keys() == saved.keys() and all(torch.equal(loaded[k], saved[k]) for k in saved)
    patch = net.patch_embed.patch_size[0]
    x = pictures(1, 3, grid[0] * 16, grid[1] * 16)
    image = shown(x, (grid[0] * patch, grid[1] * patch), *mean_std)
    if name == "sam":
        want = net.forward_features(image)
    else:
        import timm.layers
        pos = timm.layers.resample_abs_pos_embed(net.pos_embed, grid, num_prefix_tokens=1)
        tokens = vision_transformer(name, saved, image, pos)
        want = torch.empty(1, width, *grid)
        for n in range(grid[0] * grid[1]):
            want[:, :, n // grid[1], n % grid[1]] = tokens[:, n]
    got = model(x, grid)
    assert got.shape == (1, model.width, *grid) and model.width == width
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_without_network_the_message_says_where_to_put_the_file_for_timm(torch_home):
    pytest.importorskip("timm")
    file = torch_home.checkpoints / "vit_large_patch16_224.mae.safetensors"
    assert str(file) in user_error(load_foundation_model, "mae")
    url = "https://huggingface.co/timm/vit_large_patch16_224.mae/resolve/main/model.safetensors"
    assert torch_home.attempts == [url]


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "--vf clip needs a package: pip install timm" in user_error(load_foundation_model, "clip")


# --- the teacher of the miniature -------------------------------------------------------------------------
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_the_map_of_the_classifier_is_the_grid_of_the_latent(stride):
    torch.manual_seed(0)
    net = Classifier(7, stride).eval()
    model = load_foundation_model("mini", teacher=net)
    x = pictures(2, 3, 16, 24)
    f = model(x, (16 // stride, 24 // stride))
    torch.testing.assert_close(f, net.features(x))  # the image goes in as it is
    assert model.width == f.shape[1] and net(x).shape == (2, 7)


def test_the_features_of_the_classifier_are_standardised():
    torch.manual_seed(0)
    f = Classifier(3, 2).train().features(pictures(8, 3, 16, 16))
    torch.testing.assert_close(f.mean((0, 2, 3)), torch.zeros(f.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(f.var((0, 2, 3), unbiased=False), torch.ones(f.shape[1]), atol=1e-2, rtol=0)


def test_the_classifier_learns_and_is_a_function_of_its_seed():
    """It tells three classes apart, whose strongest colours differ."""
    labels = torch.arange(192) % 3
    images = torch.randint(0, 160, (192, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images[torch.arange(192), labels] += 60
    images = images.to(torch.uint8)

    def trained(seed, elsewhere):
        torch.manual_seed(4)
        net = Classifier(3, 2, width=16)
        torch.manual_seed(elsewhere)  # the global generator must not matter
        return vf_loss.train_classifier(net, images, labels, 80, seed, "cpu", "test", batch_size=48)
    one, two, other = trained(0, 1), trained(0, 2), trained(1, 1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert not torch.equal(one.head.weight, other.head.weight)
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    accuracy = (one(images.float() / 127.5 - 1).argmax(1) == labels).float().mean()
    assert accuracy > 0.9
