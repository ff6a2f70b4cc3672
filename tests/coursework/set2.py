"""Checks of set 2, VF loss. No student's process sees the slow_ functions."""
import importlib

from checks import (F, Wrong, check, close, fill, gradient, nn, ok, randn, student, torch, train_vae, types,
                    vae, values, vf_loss)

# --- eq1 ------------------------------------------------------------------------------------------------
def small_vae():
    """A tokenizer of f = 2, d = 4 that takes a millisecond."""
    return fill(vae.AutoencoderKL(embed_dim=4, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(),
                                  resolution=8), scale=0.2)

def linear_vae(d, mean):
    """A tokenizer of single pixels: each of d means is `mean` times the sum of the colours, the variance is
    1, and each colour of x_hat is half of the sum of z."""
    net = nn.Module()
    net.embed_dim, net.encoder, net.decoder = d, nn.Module(), nn.Module()
    net.encoder.conv_out = nn.Conv2d(3, 2 * d, 1, bias=False)
    net.decoder.conv_out = nn.Conv2d(d, 3, 1, bias=False)
    net.encoder.conv_out.weight.data = torch.tensor([mean] * 3 * d + [0.0] * 3 * d).view(2 * d, 3, 1, 1)
    net.decoder.conv_out.weight.data.fill_(0.5)
    net.encode = lambda x: vae.Posterior(net.encoder.conv_out(x))
    net.decode = lambda z: net.decoder.conv_out(z)

    def forward(x, noise=None):
        posterior = net.encode(x)
        z = posterior.sample(noise)
        return net.decode(z), z, posterior
    net.forward = forward
    return net

@check("eq1", "worked example", public=True)
def eq1_example():
    x, noise = torch.ones(1, 3, 1, 1), torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)

    def work():
        tokenizer = train_vae.Tokenizer(linear_vae(2, 2 / 3), 2)
        tokenizer.linear_proj.weight.data = torch.tensor([[1.0, 1.0], [2.0, -1.0]]).view(2, 2, 1, 1)
        x_hat, z, posterior, z_proj = tokenizer(x, noise)
        without = train_vae.Tokenizer(linear_vae(2, 2 / 3), 0)(x, noise)
        return x_hat, z, posterior.mean, z_proj, without[3] is None
    x_hat, z, mean, z_proj, none = student(work)
    close([x_hat.flatten(), z.flatten(), mean.flatten()], [[1.5] * 3, [3.0, 0.0], [2.0, 2.0]],
          "x_hat comes first, then z, the sample, then the posterior")
    close(z_proj.flatten(), [3.0, 6.0], "z_proj is the fourth value: W times the sample, not the mean")
    ok(none, "if self.linear_proj is None, z_proj is None")

def projected(forward):
    """The four values of a small Tokenizer, by this function, and a gradient of the encoder."""
    x, noise = randn(2, 3, 8, 8), randn(2, 4, 4, 4, seed=1)
    tokenizer = train_vae.Tokenizer(small_vae(), 6)
    fill(tokenizer.linear_proj)
    x_hat, z, posterior, z_proj = forward(tokenizer, x, noise)
    z_proj.square().sum().backward()
    return {"x_hat": x_hat, "z": z, "the mean": posterior.mean, "z_proj": z_proj,
            "the gradient of z_proj at the encoder's last layer": tokenizer.vae.encoder.conv_out.weight.grad}

def slow_projected(tokenizer, x, noise):
    x_hat, z, posterior = tokenizer.vae(x, noise)
    w = tokenizer.linear_proj.weight[:, :, 0, 0]
    return x_hat, z, posterior, torch.einsum("oc,bchw->bohw", w, z)

@check("eq1", "any image")
def eq1_values():
    got = student(lambda: projected(train_vae.Tokenizer.forward))
    close(got, projected(slow_projected), "the values of self.vae with the given noise, and Eq. 1", 1e-3)

# --- eq2, eq3 -------------------------------------------------------------------------------------------
@check("eq2", "worked example", public=True)
def eq2_example():
    z = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 0.0]]).view(1, 2, 1, 3)
    f = torch.tensor([[1.0, 1.0, -5.0], [0.0, 0.0, 0.0]]).view(1, 2, 1, 3)
    loss = vf_loss.marginal_cosine_loss
    got, zero = student(lambda: (loss(z, f, 0.5), loss(f, f, 0.5)))
    close(got, 2 / 3, "the example of the text")
    close(zero, 0.0, "equal vectors give 0, never less")

def cosine_losses(z, f):
    return [vf_loss.marginal_cosine_loss(z, f, *m) for m in ((), (0.0,), (0.2,), (1.2,))]

def slow_cosine_losses(z, f):
    cosine = F.cosine_similarity(z, f, dim=1)
    return [(1 - m - cosine).clamp(min=0).mean() for m in (0.5, 0.0, 0.2, 1.2)]

@check("eq2", "any latents")
def eq2_values():
    values(cosine_losses, slow_cosine_losses, (randn(3, 5, 2, 4), randn(3, 5, 2, 4, seed=1) + 0.3),
           "cosines over channels, averaged over images and positions (margin not given, 0, 0.2, 1.2)")

@check("eq2", "gradient")
def eq2_gradient():
    z, f = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1)
    f[0] = 2 * z[0] + 0.05  # within the margin
    gradient(lambda z: cosine_losses(z, f), lambda z: slow_cosine_losses(z, f.double()), (z,), "z", 1e-3)

@check("eq3", "worked example", public=True)
def eq3_example():
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(1, 2, 1, 2)
    f = torch.tensor([[1.0, 3.0], [0.0, 4.0]]).view(1, 2, 1, 2)
    loss = vf_loss.marginal_distance_matrix_loss
    one, other, zero = student(lambda: (loss(z, f, 0.25), loss(f, z, 0.25), loss(z, z, 0.25)))
    close(one, 0.175, "the example of the text")
    close(other, 0.175, "the example of the text, with z and f exchanged")
    close(zero, 0.0, "equal maps give 0, never less")

def matrix_losses(z, f):
    return [vf_loss.marginal_distance_matrix_loss(z, f, *m) for m in ((), (0.0,), (0.6,))]

def slow_matrix_losses(z, f):
    a, b = (F.cosine_similarity(v.flatten(2)[..., None], v.flatten(2)[..., None, :], dim=1) for v in (z, f))
    return [((a - b).abs() - m).clamp(min=0).mean() for m in (0.25, 0.0, 0.6)]

@check("eq3", "any latents")
def eq3_values():
    values(matrix_losses, slow_matrix_losses, (randn(3, 4, 2, 3), randn(3, 5, 2, 3, seed=1) + 0.4),
           "all pairs of positions of an image, averaged over N^2 and the batch (margin not given, 0, 0.6)")

@check("eq3", "gradient")
def eq3_gradient():
    f = randn(2, 4, 2, 2, seed=1)
    gradient(lambda z: matrix_losses(z, f), lambda z: slow_matrix_losses(z, f.double()),
             (randn(2, 3, 2, 2),), "z", 1e-3)

# --- eq4 ------------------------------------------------------------------------------------------------
def weights(parameter, *cases):
    """adaptive_weight of these pairs of losses, each (rec_loss, other_loss[, max_weight])."""
    w = parameter.clone().requires_grad_()
    return [vf_loss.adaptive_weight(rec(w), other(w), w, *most) for rec, other, *most in cases]

@check("eq4", "worked example", public=True)
def eq4_example():
    def rec(w):
        return 3 * w[0] + 4 * w[1]
    got = student(lambda: weights(torch.ones(2), (rec, lambda w: 2 * w[1]), (rec, lambda w: 0 * w[1]),
                                  (rec, lambda w: 0 * w[1], 10.0)))
    close(got[0], 2.499875, "the example of the text", 1e-5, "number")
    close(got[1:], [50000.0, 10.0], "a second loss that does not depend on the weight", 1e-3, "number")

@check("eq4", "any gradients")
def eq4_values():
    w, a, b = randn(4, 3, 2, 2), 3 * randn(4, 3, 2, 2, seed=1), randn(4, 3, 2, 2, seed=2)
    got = student(lambda: weights(w, (lambda w: (w * a).sum(), lambda w: (w * b).sum()),
                                  (lambda w: (w ** 2 * a).sum(), lambda w: (w * b).tanh().sum())))
    want = [a.norm() / b.norm(), (2 * w * a).norm() / (b * (1 - (w * b).tanh() ** 2)).norm()]
    close(got, want, "norms of the gradients, over the whole of `weight`, whatever its shape", 3e-4, "number")

@check("eq4", "constants")
def eq4_constants():
    a, b = 3 * randn(5, seed=1), randn(5, seed=2)
    got = student(lambda: weights(
        randn(5), (lambda w: (w * a).sum(), lambda w: (w * b).sum() * 1e-4 / b.norm()),
        (lambda w: (w * a).sum() * 1e8, lambda w: (w * b).sum() * 0),
        (lambda w: (w * 0).sum(), lambda w: (w * 0).sum())))
    close(got[0], a.norm() / 2e-4, "1e-4 is added to the norm in the denominator", 1e-3, "number")
    close(got[1], 1e8, "max_weight is 1e8 if it is not given", kind="number")
    close(got[2], 0.0, "both gradients 0: the weight is 0", kind="number")

@check("eq4", "the graph stays")
def eq4_graph():
    def work():
        w, x = randn(3).requires_grad_(), randn(3, seed=1).requires_grad_()
        w.grad = torch.ones(3)
        h = torch.tanh(w * x)
        rec, other = h.square().sum(), (h - 1).square().sum()
        got = vf_loss.adaptive_weight(rec, other, w)
        filled = w.grad is None or not torch.equal(w.grad, torch.ones(3)) or x.grad is not None
        try:
            (rec + got * other).backward()
        except RuntimeError:
            raise Wrong("after the call both losses are differentiated again: keep the graph") from None
        return filled, isinstance(got, torch.Tensor) and got.requires_grad
    filled, has_graph = student(work)
    ok(not filled, ".grad must stay what it was: use torch.autograd.grad")
    ok(not has_graph, "the weight is a number for the optimizer: it has no gradient of its own")

# --- teacher --------------------------------------------------------------------------------------------
MEAN = (0.4, 0.5, 0.6)
STD = (0.2, 0.3, 0.4)

def small_teacher(patch, mean=MEAN, std=STD, seen=None):
    """A foundation model whose tokens are the means of patches; patch 0: of 2x2 pixels. seen: its inputs."""
    def tokens(net, x):
        if seen is not None:
            seen.append(x)
        return F.avg_pool2d(x, patch or 2)
    return vf_loss.FoundationModel(nn.Identity(), tokens, 3, patch, mean, std)

def slow_normalised(x):
    return torch.stack([((x[:, c] + 1) / 2 - MEAN[c]) / STD[c] for c in range(3)], 1).double()

@check("teacher", "worked example", public=True)
def teacher_example():
    def work():
        teacher = small_teacher(0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        return teacher(torch.ones(1, 3, 2, 2), (1, 1)), teacher(-torch.ones(1, 3, 2, 2), (1, 1))
    white, black = student(work)
    close(white, torch.full((1, 3, 1, 1), 2.0), "x = 1 is white: 1 of [0, 1], minus mean 0.5, over std 0.25")
    close(black, torch.full((1, 3, 1, 1), -2.0), "x = -1 is black")

@check("teacher", "what the network sees")
def teacher_values():
    values(lambda x: small_teacher(0)(x, (3, 5)), lambda x: F.avg_pool2d(slow_normalised(x), 2),
           (randn(2, 3, 8, 12),), "patch 0: normalised by the model's own mean and std, not resized")

@check("teacher", "the patch grid")
def teacher_grid():
    x, cases, seen = randn(2, 3, 16, 24), ((5, (4, 6)), (2, (3, 5))), []
    out, inputs = student(lambda: ([small_teacher(p, seen=seen)(x, grid) for p, grid in cases], seen))
    for (patch, (h, w)), got, image in zip(cases, out, inputs):
        want = F.interpolate(slow_normalised(x), (h * patch, w * patch), mode="bilinear")
        close(image, want, f"patch {patch}, grid {(h, w)}: resized so that each patch is a position of the "
              "latent, bilinear, without antialias", 1e-3, "any")
        close(got, F.avg_pool2d(want, patch), "the features of the resized image", 1e-3)

@check("teacher", "a frozen target")
def teacher_frozen():
    def work():
        casts, told, real = [], [], importlib.import_module("vae").autocast
        for module in ("vae", "vf_loss"):
            importlib.import_module(module).autocast = lambda x, on: told.append(bool(on)) or real(x, on)

        def tokens(net, x):
            casts.append(torch.is_autocast_enabled("cpu"))
            return net(x).to(torch.bfloat16)
        teacher = vf_loss.FoundationModel(nn.Conv2d(3, 3, 1), tokens, 3, 0, (0.5,) * 3, (0.5,) * 3)
        f = teacher(randn(1, 3, 4, 4).requires_grad_(), (4, 4))
        return str(f.dtype), f.requires_grad, casts, told
    dtype, has_gradient, casts, told = student(work)
    ok(not has_gradient, "features are a target: no gradient through the foundation model")
    ok(dtype == "torch.float32", f"features are float32 whatever the network gives: got {dtype}")
    ok(list(casts) == [False], "the network is called once, and on a CPU in float32")
    ok(list(told) == [False], "the network is called under autocast(x, self.bf16 and x.is_cuda)")

# --- step -----------------------------------------------------------------------------------------------
class Through:
    """Stands for DistributedDataParallel: lists its calls, whether they were under autocast."""
    def __init__(self, net):
        self.net, self.calls = net, []

    def __call__(self, *args):
        self.calls.append(torch.is_autocast_enabled("cpu"))
        return self.net(*args)

def make_run(net, width, adversary, rate, **changes):
    """What train_step needs, tiny, with plain gradient descent: a step is minus rate times gradient."""
    settings = {"kl_weight": 0.5, "lpips_weight": 0.7, "disc_weight": 0.5, "disc_start": 3, "vf_weight": 0.3,
                "cos_margin": 0.1, "mdms_margin": 0.05, "mcos": True, "mdms": True, "precision": "fp32"}
    run = types.SimpleNamespace(settings=train_vae.Settings(**{**settings, **changes}), disc=None, lpips=None)
    run.tokenizer = train_vae.Tokenizer(net, width)
    if width:
        fill(run.tokenizer.linear_proj, seed=7)
    run.ddp, run.opt = Through(run.tokenizer), torch.optim.SGD(run.tokenizer.parameters(), rate)
    if adversary:
        run.disc = fill(vae.PatchDiscriminator(ch=4), scale=0.3)
        run.ddp_disc, run.opt_disc = Through(run.disc), torch.optim.SGD(run.disc.parameters(), 1.0)
    return run

def small_run(width, adversary, **changes):
    """A run on 24x28 images, with stand-ins for LPIPS and the foundation model."""
    run, w = make_run(small_vae(), width, adversary, 1e-3, **changes), randn(6, 3, seed=5)
    run.lpips = lambda x, x_hat: (x - x_hat).square().mean((1, 2, 3), keepdim=True)
    run.foundation = lambda x, grid: torch.einsum("oc,bchw->bohw", w, F.adaptive_avg_pool2d(x, tuple(grid)))
    return run

def parts_of(run):
    net = run.tokenizer.vae
    parts = {"encoder": net.encoder, "decoder": net.decoder, "quant_conv": net.quant_conv,
             "post_quant_conv": net.post_quant_conv, "linear_proj": run.tokenizer.linear_proj,
             "discriminator": run.disc}
    return {name: part for name, part in parts.items() if part is not None}

def flat(run):
    return {name: torch.cat([p.detach().flatten() for p in part.parameters()])
            for name, part in parts_of(run).items()}

def one_step(run, batch, size=2):
    """train_step -> the terms, {part: its change, as one vector}, and the terms that have a gradient."""
    before = flat(run)
    terms = train_vae.train_step(run, randn(size, 3, 24, 28), randn(size, 4, 12, 14, seed=1), batch)
    change = {name: before[name] - after for name, after in flat(run).items()}
    graphs = [name for name, v in terms.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    return {name: torch.as_tensor(v).detach() for name, v in terms.items()}, change, graphs

def slow_factor(rec, other, layer, most):
    norms = [torch.autograd.grad(v, layer.weight, retain_graph=True)[0].norm() for v in (rec, other)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=most).detach()

def slow_step(run, batch, size):
    """What one_step should give: the terms, and the change of each part."""
    x, s, net = randn(size, 3, 24, 28), run.settings, run.tokenizer
    x_hat, z, q = net.vae(x, randn(size, 4, 12, 14, seed=1))
    rec = ((x - x_hat).abs().sum() + s.lpips_weight * run.lpips(x, x_hat).sum() * x[0].numel()) / size
    kl = 0.5 * (q.mean ** 2 + q.logvar.exp() - 1 - q.logvar).sum() / size
    loss, terms = rec + s.kl_weight * kl, {"rec": rec, "kl": kl, "l1": (x - x_hat).abs().mean()}
    adversarial = run.disc is not None and batch >= s.disc_start
    if adversarial:
        terms["g"] = -run.disc(x_hat).mean()
        terms["w_disc"] = s.disc_weight * slow_factor(rec, terms["g"], net.vae.decoder.conv_out, 1e4)
        loss = loss + terms["w_disc"] * terms["g"]
    if net.linear_proj is not None:
        u, f = (F.normalize(v.flatten(2), dim=1) for v in (net.linear_proj(z), run.foundation(x, (12, 14))))
        terms["mcos"] = s.mcos * (1 - s.cos_margin - (u * f).sum(1)).clamp(min=0).mean()
        terms["mdms"] = s.mdms * ((u.mT @ u - f.mT @ f).abs() - s.mdms_margin).clamp(min=0).mean()
        both = terms["mcos"] + terms["mdms"]
        terms["w_vf"] = s.vf_weight * slow_factor(rec, both, net.vae.encoder.conv_out, 1e8)
        loss = loss + terms["w_vf"] * both
    before = flat(run)
    run.opt.zero_grad()
    loss.backward()
    run.opt.step()
    if adversarial:
        real, fake = run.disc(x), run.disc(x_hat.detach())
        terms["d"] = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
        run.opt_disc.zero_grad()
        terms["d"].backward()
        run.opt_disc.step()
    return terms, {name: before[name] - after for name, after in flat(run).items()}

def same_terms(terms, right, what, tol):
    ok(set(terms) == set(right), f"{what}: the terms are {', '.join(terms)}; expected {', '.join(right)}")
    for name, value in right.items():
        close(terms[name], value, f"{what}: terms[{name!r}]", tol)

def same_steps(cases, what, size=2):
    """cases() is a list of (run, batch): a step of each must be the right one."""
    got = student(lambda: [one_step(run, batch, size) for run, batch in cases()])
    for (run, batch), (terms, change, graphs) in zip(cases(), got):
        case, (right, moved) = f"{what}, batch {batch}", slow_step(run, batch, size)
        ok(not graphs, f"{case}: these terms still have a gradient, detach them: {', '.join(graphs)}")
        same_terms(terms, right, case, 1e-3)
        for name, wanted in moved.items():
            ok((change[name] - wanted).norm() <= 5e-3 * wanted.norm() + 1e-7,
               f"{case}: the step of the {name} is not that of the loss: the norm of its change is "
               f"{change[name].norm():.4g}, expected {wanted.norm():.4g}")

@check("step", "worked example", public=True)
def step_example():
    def work():
        run = make_run(linear_vae(1, 1 / 3), 0, False, 0.1)
        terms = train_vae.train_step(run, torch.ones(2, 3, 1, 1), torch.zeros(2, 1, 1, 1), 0)
        net = run.tokenizer.vae
        return terms, net.decoder.conv_out.weight.detach(), net.encoder.conv_out.weight[0].detach()
    terms, decoder, encoder = student(work)
    same_terms(terms, {"rec": 1.5, "kl": 0.5, "l1": 0.5}, "one pixel", 1e-4)
    close(decoder.flatten(), [0.6] * 3, "the decoder's weights after the step")
    close(encoder.flatten(), [0.433333] * 3, "the mean's weights after the step")

@check("step", "all terms", public=True)
def step_terms():
    terms, change, _ = student(lambda: one_step(small_run(6, True), 3))
    right = {"rec": 3174.6, "kl": 37.567, "l1": 0.82288, "g": -0.29066, "w_disc": 138.36, "mcos": 0.90257,
             "mdms": 0.70003, "w_vf": 119.48, "d": 1.0172}
    moved = {"encoder": 0.10563, "decoder": 1.4879, "quant_conv": 0.064675, "linear_proj": 0.0090369,
             "discriminator": 3.6434}
    same_terms(terms, right, "with VF loss and discriminator", 2e-3)
    for name, value in moved.items():
        ok(abs(change[name].norm().item() - value) <= 5e-3 * value,
           f"the step of the {name} has the norm {change[name].norm().item():.5g}, expected {value:.5g}")

@check("step", "reconstruction and KL")
def step_reconstruction():    # in the second step, gradients of the first would be left
    same_steps(lambda: [(small_run(0, False), 9)] * 2, "no VF loss, no discriminator", 3)

@check("step", "with VF loss")
def step_vf():
    changes = {}, {"mcos": False}, {"vf_weight": 2.0, "cos_margin": 0.5, "mdms_margin": 0.25}
    same_steps(lambda: [(small_run(6, False, **c), 0) for c in changes], "with VF loss")

def adversarial_cases():
    run, weak = small_run(0, True), small_run(0, True)
    weak.disc.main[-1].weight.data *= 1e-6    # hardly a gradient: the weight of g is clamped
    return [(run, 2), (run, 3), (run, 4), (weak, 3)]

@check("step", "with the discriminator")
def step_adversarial():
    same_steps(adversarial_cases, "with the discriminator from batch 3 on")

@check("step", "DDP and bfloat16")
def step_plumbing():
    def work():
        run, dtypes = small_run(6, True, precision="bf16"), []

        def lpips(x, x_hat):
            dtypes.append((str(x_hat.dtype), torch.is_autocast_enabled("cpu")))
            return (x - x_hat).square().mean((1, 2, 3), keepdim=True)
        run.lpips = lpips
        one_step(run, 3)
        return run.ddp.calls, run.ddp_disc.calls, dtypes
    calls, disc_calls, dtypes = student(work)
    ok(len(calls) == 1, "the tokenizer is called once, as run.ddp")
    ok(len(disc_calls) == 2, "the discriminator's own step calls run.ddp_disc, on x and on x_hat")
    ok(calls[0], "precision bf16: run.ddp is called inside autocast(x, True)")
    ok(list(dtypes[0]) == ["torch.float32", False], "the losses are computed in float32, outside of autocast")
