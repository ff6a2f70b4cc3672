"""vf_loss.py, and train_vae.py's train_step that uses it: float64 loops, gradients by hand, and the total loss written down in one line."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import vf_loss
from train_vae import Run, Settings, Stage, World, train_step
from vae import SPECS
from vf_loss import FoundationModel, MiniTeacher, adaptive_weight, load_foundation_model, marginal_cosine_loss, marginal_distance_matrix_loss

# --- Eq. 2 and 3 ------------------------------------------------------------------------------------------------------------------------------

def maps(channels_z=6, channels_f=6, batch=2, h=3, w=4):
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(batch, channels_f, h, w, generator=generator)
    z = torch.randn(batch, channels_z, h, w, generator=generator)
    return (z + f if channels_z == channels_f else z) * 3, f                            # partly aligned; not of unit length


def dot(a, b):
    return sum(float(u) * float(v) for u, v in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a)) / math.sqrt(dot(b, b))


@pytest.mark.parametrize("margin", [0.0, 0.4, 0.5, 1.0])
def test_eq_2_equals_loops_in_float64(margin):
    z, f = maps()
    terms = [max(0.0, 1 - margin - cosine(z[b, :, i, j], f[b, :, i, j])) for b in range(2) for i in range(3) for j in range(4)]
    want = sum(terms) / len(terms)
    assert 0 < want and (margin == 0 or 0.0 in terms)                                   # the margin does something here
    assert marginal_cosine_loss(z, f, margin).item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("channels_z", [6, 3])
def test_eq_3_equals_loops_in_float64(margin, channels_z):
    z, f = maps(channels_z)
    terms = []
    for b in range(2):
        zs, fs = ([m[b, :, i, j] for i in range(3) for j in range(4)] for m in (z, f))
        terms += [max(0.0, abs(cosine(zs[i], zs[j]) - cosine(fs[i], fs[j])) - margin) for i in range(12) for j in range(12)]
    want = sum(terms) / len(terms)
    assert want > 0.01 and len(terms) == 2 * 12 * 12
    assert marginal_distance_matrix_loss(z, f, margin).item() == pytest.approx(want, abs=1e-6)


def test_margins_of_the_paper_are_the_defaults():
    z, f = maps()
    assert torch.equal(marginal_cosine_loss(z, f), marginal_cosine_loss(z, f, 0.5)) and Settings.cos_margin == 0.5
    assert torch.equal(marginal_distance_matrix_loss(z, f), marginal_distance_matrix_loss(z, f, 0.25)) and Settings.mdms_margin == 0.25


def test_both_losses_are_zero_for_features_that_agree():
    _, f = maps()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    assert marginal_cosine_loss(2 * f, f, 0.0) == pytest.approx(0, abs=1e-6)
    assert marginal_distance_matrix_loss(torch.einsum("dc,bchw->bdhw", rotation, f), f, 0.0) == pytest.approx(0, abs=1e-6)   # angles only
    assert marginal_cosine_loss(-f, f, 0.0) == pytest.approx(2)


def test_switched_off_terms_and_precision():
    z, f = maps()
    mcos, mdms = vf_loss.vf_loss(z, f, 0.1, 0.0)
    assert torch.equal(mcos, marginal_cosine_loss(z, f, 0.1)) and torch.equal(mdms, marginal_distance_matrix_loss(z, f, 0.0))
    assert [v.item() > 0 for v in vf_loss.vf_loss(z, f, 0.1, 0.0, use_mcos=False)] == [False, True]
    assert [v.item() > 0 for v in vf_loss.vf_loss(z, f, 0.1, 0.0, use_mdms=False)] == [True, False]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vf_loss.vf_loss(z, f, 0.1, 0.0)[1], mdms)                    # fp32 inside an autocast


# --- Eq. 4 ------------------------------------------------------------------------------------------------------------------------------------

def test_eq_4_by_hand_on_a_linear_layer():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    x, a, b = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.5])
    out = weight @ x
    # d (a . W x) / dW = a x^T, of norm |a| |x| = sqrt(5) 5; and |b| |x| = 2.5
    w = adaptive_weight(a @ out, b @ out, weight)
    assert w.item() == pytest.approx(math.sqrt(5) * 5 / (2.5 + 1e-4), rel=1e-6) and not w.requires_grad
    assert weight.grad is None
    (a @ out + w * (b @ out)).backward()                                                # the graph is still there
    torch.testing.assert_close(weight.grad, torch.outer(a + w * b, x))


@pytest.mark.parametrize("rec, vf", [(1.0, 1.0), (300.0, 1e-2), (1e-3, 50.0)])
def test_eq_4_makes_the_two_gradients_equally_long(rec, vf):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8)
    z = layer(x)
    rec_loss, vf_term = rec * z.square().mean(), vf * z.sin().abs().mean()
    w = adaptive_weight(rec_loss, vf_term, layer.weight)
    a, b = (torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm().item() for loss in (rec_loss, w * vf_term))
    assert b == pytest.approx(a / (1 + 1e-4 * w.item() / a * b / b), rel=0.05 if vf == 1e-2 else 1e-3)


def test_eq_4_is_clamped():
    weight = torch.ones(1, requires_grad=True)
    assert adaptive_weight(2.5 * weight.sum(), 0 * weight.sum(), weight).item() == pytest.approx(2.5e4)   # 1e-4 in the denominator
    assert adaptive_weight(1e9 * weight.sum(), 0 * weight.sum(), weight).item() == 1e8
    assert adaptive_weight(1e9 * weight.sum(), 0 * weight.sum(), weight, max_weight=1e4).item() == 1e4
    assert adaptive_weight(0 * weight.sum(), weight.sum(), weight).item() == 0


# --- the training step: the total loss in one line -------------------------------------------------------------------------------------------

class Teacher(nn.Module):
    """Fixed features of the image: what train_step needs of a foundation model."""
    width = 12

    def forward(self, x, grid):
        generator = torch.Generator().manual_seed(5)
        return F.conv2d(F.adaptive_avg_pool2d(x, grid), torch.randn(12, 3, 1, 1, generator=generator)).sin()


def make_run(monkeypatch, **settings):
    """A Run whose optimizers do nothing, so that the gradients of train_step stay readable."""
    monkeypatch.setitem(SPECS, "tiny", dict(embed_dim=4, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=32))
    settings = Settings(**{**dict(spec="tiny", image_size=32, compile=False, device="cpu", batch_size=3, lpips_weight=0.0), **settings})
    run = Run(settings, World(0, 1, torch.device("cpu")), Teacher() if settings.vf != "none" else None, pretrained=False)
    for optimizer in (run.opt, run.opt_disc):
        if optimizer is not None:
            optimizer.step = lambda: None
    torch.manual_seed(11)
    with torch.no_grad():                                                               # a latent with a spread: sample and mean must differ
        run.tokenizer.vae.quant_conv.bias[4:] = 0.5
        run.tokenizer.vae.quant_conv.weight.mul_(torch.logspace(-1.5, 1, 8)[:, None, None, None].flip(0)[torch.tensor([3, 0, 5, 7, 2, 6, 1, 4])])
    x, noise = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 4, 8, 8)
    return run, x, noise


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def straightforward(run, x, noise, stage, adversarial, layer="encoder.conv_out.weight", sample=True, disc_layer="decoder.conv_out.weight"):
    """rec + w_disc g + kl + w_hyper w_adaptive vf with no tricks: one graph, naive autograd.grad, one backward. Returns gradients and numbers."""
    s, vae, tokenizer = run.settings, run.tokenizer.vae, run.tokenizer
    parameters = dict(vae.named_parameters())
    posterior = vae.encode(x)
    std = (0.5 * posterior.logvar).exp()
    z = posterior.mean + std * noise
    x_hat = vae.decode(z)
    pixels = (x - x_hat).abs()
    if run.lpips is not None:
        pixels = pixels + s.lpips_weight * run.lpips(x, x_hat)
    rec = pixels.sum() / len(x)
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(posterior.mean, std), prior).sum() / len(x)
    norm = lambda loss, name: torch.autograd.grad(loss, parameters[name], retain_graph=True)[0].norm()   # noqa: E731
    loss, numbers = rec + s.kl_weight * kl, dict(rec=rec, kl=kl)
    if adversarial:
        g = -run.disc(x_hat).mean()
        w_disc = s.disc_weight * (norm(rec, disc_layer) / (norm(g, disc_layer) + 1e-4)).clamp(0, 1e4).detach()
        loss, numbers = loss + w_disc * g, {**numbers, "g": g, "w_disc": w_disc}
    if run.foundation is not None:
        z_proj = tokenizer.linear_proj(z if sample else posterior.mean)
        f = run.foundation(x, z.shape[-2:])
        vf = s.mcos * marginal_cosine_loss(z_proj, f, stage.cos_margin) + s.mdms * marginal_distance_matrix_loss(z_proj, f, stage.mdms_margin)
        w_adaptive = (norm(rec, layer) / (norm(vf, layer) + 1e-4)).clamp(0, 1e8).detach()
        loss = loss + stage.vf_weight * w_adaptive * vf
        numbers |= dict(w_vf=stage.vf_weight * w_adaptive, vf=vf)
    names = [name for name, _ in tokenizer.named_parameters()]
    grads = torch.autograd.grad(loss, [p for _, p in tokenizer.named_parameters()])
    return dict(zip(names, grads)), {k: v.item() for k, v in numbers.items()}


def distance(got, want):
    """The largest difference of a weight's gradient, relative to that gradient. A bias in front of a GroupNorm has no influence, and
    a gradient of rounding errors only: it counts relative to all weights' gradient together, hence the second term."""
    assert got.keys() == want.keys()
    total = torch.cat([g.flatten() for g in want.values()]).norm()
    return max(((got[k] - want[k]).norm() / (want[k].norm() + 1e-3 * total)).item() for k in want)


STAGE = Stage(steps=100, vf_weight=0.1, cos_margin=0.5, mdms_margin=0.25, disc_start=0)


@pytest.mark.parametrize("case", ["everything", "no LPIPS", "no discriminator", "before its start", "no vf", "no mcos", "no mdms"])
def test_train_step_s_gradients_are_those_of_the_sum_of_losses(monkeypatch, case):
    """The cut at x_hat, the shared passes and the order of the optimizers change nothing."""
    settings = {"everything": dict(lpips_weight=1.0, kl_weight=0.01), "no discriminator": dict(disc_weight=0.0), "no vf": dict(vf="none"),
                "no mcos": dict(mcos=False), "no mdms": dict(mdms=False)}.get(case, {})
    run, x, noise = make_run(monkeypatch, **settings)
    stage, adversarial = STAGE._replace(disc_start=7), case not in ("no discriminator", "before its start")
    want, numbers = straightforward(run, x, noise, stage, adversarial)
    terms, posterior = train_step(run, x, noise, stage, 6 if case == "before its start" else 7)
    assert distance(gradients(run.tokenizer), want) < 1e-4
    assert (run.disc is not None and run.disc.main[0].weight.grad is not None) == adversarial and ("w_disc" in terms) == adversarial
    if "vf" in numbers:
        assert terms["mcos"].item() + terms["mdms"].item() == pytest.approx(numbers.pop("vf"), rel=1e-5)
    for name, value in numbers.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name
    assert terms["l1"].item() == pytest.approx((x - run.tokenizer.vae(x, noise)[0]).abs().mean().item(), rel=1e-5)


def test_that_comparison_sees_a_wrong_layer_or_the_mean(monkeypatch):
    """The oracle with one thing wrong is far away, so the test above would notice the same thing wrong in train_step."""
    run, x, noise = make_run(monkeypatch)
    train_step(run, x, noise, STAGE, 0)
    got = gradients(run.tokenizer)
    assert distance(got, straightforward(run, x, noise, STAGE, True)[0]) < 1e-4
    for wrong in (dict(layer="quant_conv.weight"), dict(layer="encoder.conv_in.weight"), dict(layer="encoder.conv_out.bias"), dict(sample=False),
                  dict(disc_layer="decoder.conv_in.weight"), dict(disc_layer="decoder.norm_out.weight")):
        assert distance(got, straightforward(run, x, noise, STAGE, True, **wrong)[0]) > 1e-2, wrong


def test_vf_and_reconstruction_pull_equally_at_the_encoder_s_last_layer(monkeypatch):
    """[Sec. 3.3] The VF part of what train_step left in .grad is w_hyper times as long as the reconstruction's, on encoder.conv_out.weight alone."""
    run, x, noise = make_run(monkeypatch, disc_weight=0.0, kl_weight=0.0, lpips_weight=1.0)
    stage = STAGE._replace(vf_weight=0.3, cos_margin=0.0, mdms_margin=0.0)
    train_step(run, x, noise, stage, 0)
    both = gradients(run.tokenizer)
    train_step(run, x, noise, stage._replace(vf_weight=0.0), 0)
    rec = gradients(run.tokenizer)
    ratio = {name: ((both[name] - rec[name]).norm() / rec[name].norm()).item() for name in both if rec[name].norm() > 0}
    assert ratio["vae.encoder.conv_out.weight"] == pytest.approx(0.3, rel=5e-3)
    for other in ("vae.quant_conv.weight", "vae.encoder.conv_in.weight", "vae.encoder.mid.block_1.conv1.weight"):
        assert abs(ratio[other] - 0.3) > 0.015, other
    assert rec["linear_proj.weight"].abs().max() == 0 and both["linear_proj.weight"].abs().max() > 0   # W is trained, by VF loss only
    assert torch.equal(both["vae.decoder.conv_out.weight"], rec["vae.decoder.conv_out.weight"])        # VF loss stops at z


def test_train_step_s_clamps(monkeypatch):
    """1e8 for VF, 1e4 for the discriminator: both gradients made to vanish, and the reconstruction's made huge."""
    run, x, noise = make_run(monkeypatch)
    with torch.no_grad():
        run.tokenizer.vae.decoder.conv_out.weight.mul_(1e5)
        run.disc.main[-1].weight.zero_()
    terms, _ = train_step(run, x, noise, STAGE._replace(cos_margin=3.0, mdms_margin=3.0), 0)   # margins that nothing exceeds
    assert terms["w_vf"].item() == pytest.approx(0.1 * 1e8) and terms["w_disc"].item() == pytest.approx(0.5 * 1e4)
    assert terms["mcos"] == terms["mdms"] == 0


def test_the_discriminator_s_step(monkeypatch):
    """Hinge loss on the real images and on the generator's, detached; its gradients hold nothing of the generator's loss."""
    run, x, noise = make_run(monkeypatch)
    with torch.no_grad():
        x_hat = run.tokenizer.vae(x, noise)[0]
        for m in run.disc.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(8)                                                        # logits on both sides of the hinge
    real, fake = run.disc(x), run.disc(x_hat)
    want = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    assert (real > 1).any() and (real < 1).any() and (fake > -1).any() and (fake < -1).any()
    grads = torch.autograd.grad(want, list(run.disc.parameters()))
    for _ in range(2):                                                                  # the second step adds nothing to the first's gradients
        terms, _ = train_step(run, x, noise, STAGE, 0)
    assert terms["d"].item() == pytest.approx(want.item(), rel=1e-5)
    assert distance(gradients(run.disc), dict(zip([n for n, _ in run.disc.named_parameters()], grads))) < 1e-4


def test_both_optimizers_are_adam_with_the_paper_s_rate_over_the_right_weights(monkeypatch):
    run, *_ = make_run(monkeypatch, lr=1e-4)
    for optimizer, module in ((run.opt, run.tokenizer), (run.opt_disc, run.disc)):
        assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["lr"] == 1e-4 and optimizer.defaults["betas"] == (0.5, 0.9)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in module.parameters()}


def test_bf16_train_step_is_near_fp32(monkeypatch):
    """Autocast for the networks only. Losses stay near; Eq. 4's ratio of norms, taken through bf16 backward passes of random networks, roughly so."""
    run, x, noise = make_run(monkeypatch, lpips_weight=1.0)
    exact, _ = train_step(run, x, noise, STAGE, 0)
    run, x, noise = make_run(monkeypatch, lpips_weight=1.0, precision="bf16")
    near, _ = train_step(run, x, noise, STAGE, 0)
    for name, tolerance in dict(rec=0.01, l1=0.01, kl=0.02, mcos=0.01, mdms=0.02, w_vf=0.25, w_disc=0.25).items():
        assert near[name].dtype == torch.float32 and near[name].item() == pytest.approx(exact[name].item(), rel=tolerance), name


# --- foundation models ------------------------------------------------------------------------------------------------------------------------

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalised(x, mean, std):
    return torch.stack([((x[:, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)], dim=1)


def spy_model(patch=14, shift=0):
    """A FoundationModel that keeps what its network was shown."""
    seen = []

    def tokens(net, x):
        seen.append((x, torch.is_grad_enabled()))
        return torch.zeros(len(x), 5, x.shape[-2] // patch + shift, x.shape[-1] // patch)
    return FoundationModel(nn.Linear(2, 2), tokens, 5, patch, *IMAGENET), seen


@pytest.mark.parametrize("size, f, want", [((256, 256), 16, (224, 224)), ((256, 256), 32, (112, 112)), ((128, 192), 16, (112, 168)), ((32, 32), 4, (112, 112))])
def test_the_image_is_resized_so_that_the_grids_agree(size, f, want):
    model, seen = spy_model()
    x = torch.rand(1, 3, *size) * 2 - 1
    assert model(x, (size[0] // f, size[1] // f)).shape == (1, 5, size[0] // f, size[1] // f)
    torch.testing.assert_close(seen[0][0], F.interpolate(normalised(x, *IMAGENET), want, mode="bilinear"), atol=1e-5, rtol=1e-4)
    assert seen[0][1] is False                                                          # no graph


def test_a_grid_that_does_not_match_is_an_error():
    model, _ = spy_model(shift=1)
    with pytest.raises(ValueError, match=r"grid \(17, 16\) is not the latent's grid \(16, 16\)"):
        model(torch.zeros(1, 3, 256, 256), (16, 16))
    mini = load_foundation_model("mini", mini=MiniTeacher(3, 4))
    with pytest.raises(ValueError, match=r"grid \(8, 8\) is not the latent's grid \(4, 4\)"):
        mini(torch.zeros(1, 3, 32, 32), (4, 4))


def test_a_foundation_model_is_frozen_for_good():
    model, _ = spy_model()
    assert not any(p.requires_grad for p in model.parameters()) and not model.train().training and not model.net.training
    assert not model.state_dict().keys() - {"net.weight", "net.bias"}


def test_an_unknown_foundation_model_is_an_error():
    with pytest.raises(ValueError, match="unknown foundation model 'dino'"):
        load_foundation_model("dino")


HUBCONF = '''
import torch
import torch.nn as nn

class ViT(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed_dim, self.patch_embed = width, nn.Conv2d(3, width, 14, stride=14)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    def forward_features(self, x, masks=None):
        h = self.patch_embed(x).flatten(2).transpose(1, 2)
        h = nn.functional.layer_norm(torch.cat([self.cls_token.expand(len(h), -1, -1), h], 1), (self.embed_dim,))
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


@pytest.fixture
def dinov2_cache(torch_home):
    """What a user without a network puts in place: the repository at the pinned commit and the weights, here small and random."""
    repository = torch_home.hub / f"facebookresearch_dinov2_{vf_loss.DINOV2_COMMIT}"
    repository.mkdir()
    (repository / "hubconf.py").write_text(HUBCONF)
    torch.manual_seed(0)
    for name, width in (("dinov2_vits14", 24), ("dinov2_vitl14", 32)):
        torch.save({"patch_embed.weight": torch.randn(width, 3, 14, 14) * 0.1, "patch_embed.bias": torch.randn(width), "cls_token": torch.randn(1, 1, width)},
                   torch_home.checkpoints / f"{name}_pretrain.pth")
    return torch_home


@pytest.mark.parametrize("name, file, vf_input", [
    ("dinov2", "dinov2_vitl14", "model"), ("dinov2-l", "dinov2_vitl14", "authors"), ("dinov2-s", "dinov2_vits14", "model")])
def test_dinov2_through_the_real_hub_call(dinov2_cache, name, file, vf_input):
    model = load_foundation_model(name, (16, 12), vf_input)
    weights = torch.load(dinov2_cache.checkpoints / f"{file}_pretrain.pth", weights_only=True)
    x = torch.rand(2, 3, 256, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shown = F.interpolate(x if vf_input == "authors" else normalised(x, *IMAGENET), (224, 168), mode="bilinear")
    want = F.conv2d(shown, weights["patch_embed.weight"], weights["patch_embed.bias"], stride=14)
    want = (want - want.mean(1, keepdim=True)) / (want.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    got = model(x.requires_grad_(), (16, 12))
    assert model.width == got.shape[1] == len(weights["patch_embed.bias"]) and not got.requires_grad
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert not dinov2_cache.attempts


@pytest.mark.parametrize("missing", ["code", "weights"])
def test_dinov2_without_network_says_what_to_put_where(dinov2_cache, missing):
    if missing == "code":
        (dinov2_cache.hub / f"facebookresearch_dinov2_{vf_loss.DINOV2_COMMIT}").rename(dinov2_cache.hub / "elsewhere")
    else:
        (dinov2_cache.checkpoints / "dinov2_vitl14_pretrain.pth").unlink()
    with pytest.raises(SystemExit) as error:
        load_foundation_model("dinov2")
    message = error.value.code
    assert len(dinov2_cache.attempts) == 1 and ("github.com" if missing == "code" else "dinov2_vitl14_pretrain.pth") in dinov2_cache.attempts[0]
    assert f"facebookresearch_dinov2_{vf_loss.DINOV2_COMMIT}" in message and "dinov2_vitl14_pretrain.pth" in message
    assert str(dinov2_cache.checkpoints) in message and "--vf mini" in message and "\n" not in message


SMALL_VITS = dict(mae=dict(depth=2, embed_dim=64, num_heads=2), clip=dict(depth=2, embed_dim=64, num_heads=2),
                  sam=dict(depth=2, embed_dim=64, num_heads=2, global_attn_indexes=(1,), window_size=6))


@pytest.fixture
def timm_cache(torch_home, monkeypatch):
    """The real names, configurations and file names, as narrow networks: create_model gets depth and width on top of what load_timm asks for."""
    timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
    create = timm.create_model
    small = {vf_loss.TIMM_MODELS[name]: kwargs for name, kwargs in SMALL_VITS.items()}
    monkeypatch.setattr(timm, "create_model", lambda model, **kwargs: create(model, **{**kwargs, **small[model]}))
    reference = {}
    for name, model in vf_loss.TIMM_MODELS.items():                                     # saved at the released files' sizes: 224, 224, 1024
        torch.manual_seed(0)
        net = create(model, pretrained=False, **small[model]).eval()
        for p in net.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        safetensors.save_file(net.state_dict(), torch_home.checkpoints / f"{model}.safetensors")
        reference[name] = net
    torch_home.reference = reference
    return torch_home


@pytest.mark.parametrize("name, grid", [
    ("mae", (14, 14)), ("mae", (16, 16)), ("clip", (16, 16)), ("clip", (8, 12)), ("sam", (16, 16)), ("sam", (8, 12)), ("sam", (64, 64))])
def test_mae_clip_and_sam_through_timm(timm_cache, name, grid):
    model, net = load_foundation_model(name, grid), timm_cache.reference[name]
    assert not timm_cache.attempts
    loaded, saved = model.net.state_dict(), net.state_dict()
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[k], saved[k]) for k in saved)   # the file's weights, as they are
    patch = net.patch_embed.patch_size[0]
    x = torch.rand(1, 3, grid[0] * 16, grid[1] * 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    got = model(x, grid)
    assert got.shape == (1, model.width, *grid) and model.width == {"mae": 64, "clip": net.head.out_features if name == "clip" else 0, "sam": 256}[name]
    shown = F.interpolate(normalised(x, *(OPENAI if name == "clip" else IMAGENET)), (grid[0] * patch, grid[1] * patch), mode="bilinear")
    with torch.no_grad():
        if name == "sam":
            want = net.forward_features(shown)
        else:                                                                           # the tokens by hand, one block after another
            import timm.layers
            h = net.patch_embed.proj(shown).flatten(2).transpose(1, 2)
            pos = timm.layers.resample_abs_pos_embed(net.pos_embed, grid, num_prefix_tokens=1)
            h = net.norm_pre(torch.cat([net.cls_token, h], 1) + pos)
            for block in net.blocks:
                h = block(h)
            h = net.norm(h)[:, 1:]
            h = h @ net.head.weight.T + net.head.bias if name == "clip" else h          # CLIP: to the joint space of images and texts
            want = torch.empty(1, h.shape[2], *grid)
            for n in range(grid[0] * grid[1]):
                want[:, :, n // grid[1], n % grid[1]] = h[:, n]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_timm_s_file_missing_says_where_to_put_it(torch_home):
    pytest.importorskip("timm")
    with pytest.raises(SystemExit) as error:
        load_foundation_model("mae")
    assert str(torch_home.checkpoints / "vit_large_patch16_224.mae.safetensors") in error.value.code
    assert torch_home.attempts == ["https://huggingface.co/timm/vit_large_patch16_224.mae/resolve/main/model.safetensors"]


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(SystemExit, match="--vf clip needs the package timm: pip install timm"):
        load_foundation_model("clip")


# --- the stand-in -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_mini_teacher_s_grid(stride):
    torch.manual_seed(0)
    net = MiniTeacher(7, stride).eval()
    model = load_foundation_model("mini", mini=net)
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    f = model(x, (16 // stride, 24 // stride))
    torch.testing.assert_close(f, net.features(x))                                      # the image goes in as it is
    assert model.width == f.shape[1] and net(x).shape == (2, 7)


def test_mini_teacher_s_features_are_standardised():
    torch.manual_seed(0)
    net = MiniTeacher(3, 2).train()
    f = net.features(torch.rand(8, 3, 16, 16) * 2 - 1)
    torch.testing.assert_close(f.mean((0, 2, 3)), torch.zeros(f.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(f.var((0, 2, 3), unbiased=False), torch.ones(f.shape[1]), atol=1e-2, rtol=0)


def colour_images(n=192, size=8):
    """Three classes told apart by their strongest colour."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 160, (n, 3, size, size), generator=generator)
    images[torch.arange(n), labels] += 60
    return images.to(torch.uint8), labels


def test_the_classifier_learns_and_is_a_function_of_its_seed():
    images, labels = colour_images()

    def trained(seed, elsewhere):
        torch.manual_seed(4)
        net = MiniTeacher(3, 2, ch=8, width=16)
        torch.manual_seed(elsewhere)                                                    # the global generator must not matter
        return vf_loss.train_classifier(net, images, labels, 80, seed, "cpu", "test", batch_size=48)
    one, two, other = trained(0, 1), trained(0, 2), trained(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    accuracy = (one(images.float() / 127.5 - 1).argmax(1) == labels).float().mean()
    assert accuracy > 0.9
