"""Checks of set 2, VF loss. No student's process sees the slow_ functions."""
from checks import (
    F,
    Wrong,
    check,
    close,
    fill,
    gradient,
    nn,
    ok,
    randn,
    student,
    torch,
    train_vae,
    types,
    vae,
    values,
    vf_loss,
)


# --- eq1 ------------------------------------------------------------------------------------------------
def small_vae():
    """A tokenizer of f = 2, d = 4 that takes a millisecond."""
    return fill(vae.AutoencoderKL(embed_dim=4, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(),
                                  resolution=8), scale=0.2)


class LinearVAE:
    """z = 2 x + noise in each of two channels, x_hat = z / 2."""
    embed_dim = 2

    def __call__(self, x, noise=None):
        mean = 2 * x[:, :2]
        z = mean + noise
        return z / 2, z, types.SimpleNamespace(mean=mean)

    def encode(self, x):
        mean = 2 * x[:, :2]
        return types.SimpleNamespace(mean=mean, sample=lambda noise=None: mean + noise)

    def decode(self, z):
        return z / 2


def linear_tokenizer(width):
    tokenizer = train_vae.Tokenizer.__new__(train_vae.Tokenizer)
    nn.Module.__init__(tokenizer)
    tokenizer.vae = LinearVAE()
    tokenizer.linear_proj = nn.Conv2d(2, width, 1, bias=False) if width else None
    return tokenizer


@check("eq1", "worked example", public=True)
def eq1_example():
    x, noise = torch.ones(1, 3, 1, 1), torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)

    def work():
        tokenizer, without = linear_tokenizer(2), linear_tokenizer(0)
        with torch.no_grad():
            tokenizer.linear_proj.weight.copy_(torch.tensor([[1.0, 1.0], [2.0, -1.0]]).view(2, 2, 1, 1))
            x_hat, z, posterior, z_proj = tokenizer(x, noise)
            return x_hat, z, posterior.mean, z_proj, without(x, noise)[3] is None
    x_hat, z, mean, z_proj, none = student(work)
    close(x_hat.flatten(), [1.5, 0.0], "x_hat comes first")
    close(z.flatten(), [3.0, 0.0], "then z, the sample")
    close(mean.flatten(), [2.0, 2.0], "then the posterior")
    close(z_proj.flatten(), [3.0, 6.0], "z_proj is the fourth value: W times the sample, not the mean")
    ok(none, "if self.linear_proj is None, z_proj is None")


@check("eq1", "any image")
def eq1_values():
    x, noise = randn(2, 3, 8, 8), randn(2, 4, 4, 4, seed=1)

    def work():
        tokenizer = train_vae.Tokenizer(small_vae(), 6)
        fill(tokenizer.linear_proj)
        x_hat, z, posterior, z_proj = tokenizer(x, noise)
        z_proj.square().sum().backward()
        return x_hat, z, posterior.mean, z_proj, tokenizer.vae.encoder.conv_out.weight.grad
    x_hat, z, mean, z_proj, grad = student(work)
    net, w = small_vae(), fill(nn.Conv2d(4, 6, 1, bias=False)).weight[:, :, 0, 0]
    want_hat, want_z, posterior = net(x, noise)
    want = torch.einsum("oc,bchw->bohw", w, want_z)
    want.square().sum().backward()
    for got, right, name in (
        (x_hat, want_hat, "x_hat"),
        (z, want_z, "z"),
        (mean, posterior.mean, "the posterior"),
        (z_proj, want, "z_proj"),
    ):
        close(got, right, f"{name} is that of self.vae, with the given noise", 1e-3)
    ok(grad is not None, "the gradient of z_proj must reach the encoder")
    close(grad, net.encoder.conv_out.weight.grad, "the gradient of z_proj, by the encoder's last layer", 1e-3)


# --- eq2, eq3 -------------------------------------------------------------------------------------------
MARGINS = ((), (0.0,), (0.2,), (1.2,))


@check("eq2", "worked example", public=True)
def eq2_example():
    z = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 0.0]]).view(1, 2, 1, 3)
    f = torch.tensor([[1.0, 1.0, -5.0], [0.0, 0.0, 0.0]]).view(1, 2, 1, 3)
    three, zero = student(
        lambda: (vf_loss.marginal_cosine_loss(z, f, 0.5), vf_loss.marginal_cosine_loss(f, f, 0.5))
    )
    close(three, 2 / 3, "cosines 1, 0, -1 with a margin of 0.5")
    close(zero, 0.0, "equal vectors give 0, never less")


def eq2_all(z, f):
    return [vf_loss.marginal_cosine_loss(z, f, *m) for m in MARGINS]


def slow_eq2(z, f, margins=MARGINS):
    out = []
    for m in margins:
        total = 0.0
        for b in range(len(z)):
            for u, v in zip(z[b].flatten(1).T, f[b].flatten(1).T):
                cosine = (u * v).sum() / (u.square().sum() * v.square().sum()).sqrt()
                total = total + (1 - (m[0] if m else 0.5) - cosine).clamp(min=0)
        out.append(total / (len(z) * z.shape[2] * z.shape[3]))
    return out


@check("eq2", "any latents")
def eq2_values():
    values(eq2_all, slow_eq2, (randn(3, 5, 2, 4), randn(3, 5, 2, 4, seed=1) + 0.3),
           "cosines over channels, averaged over images and positions (margin not given, 0, 0.2, 1.2)")


@check("eq2", "gradient")
def eq2_gradient():
    z, f = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1)
    f[0] = 2 * z[0] + 0.05  # within the margin
    gradient(
        lambda z: vf_loss.marginal_cosine_loss(z, f, 0.3),
        lambda z: slow_eq2(z, f.double(), ((0.3,),)),
        (z,),
        "z",
        1e-3,
    )


@check("eq3", "worked example", public=True)
def eq3_example():
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(1, 2, 1, 2)
    f = torch.tensor([[1.0, 3.0], [0.0, 4.0]]).view(1, 2, 1, 2)
    loss = vf_loss.marginal_distance_matrix_loss
    one, other, zero = student(lambda: (loss(z, f, 0.25), loss(f, z, 0.25), loss(z, z, 0.25)))
    close(one, 0.175, "cosines 0 and 0.6 of the one pair, in both orders, among four pairs")
    close(other, 0.175, "the difference counts by its size, not its sign")
    close(zero, 0.0, "equal similarities give 0, never less")


def eq3_all(z, f):
    return [vf_loss.marginal_distance_matrix_loss(z, f, *m) for m in ((), (0.0,), (0.6,))]


def slow_eq3(z, f, margins=((), (0.0,), (0.6,))):
    out = []
    for m in margins:
        total, n = 0.0, z.shape[2] * z.shape[3]
        for b in range(len(z)):
            pairs = z[b].flatten(1).T, f[b].flatten(1).T
            for i in range(n):
                for j in range(n):
                    if i != j:    # a vector is as similar to itself in z as in f
                        a, c = ((v[i] * v[j]).sum() / (v[i].norm() * v[j].norm()) for v in pairs)
                        total = total + ((a - c).abs() - (m[0] if m else 0.25)).clamp(min=0)
        out.append(total / (len(z) * n * n))
    return out


@check("eq3", "any latents")
def eq3_values():
    values(eq3_all, slow_eq3, (randn(3, 4, 2, 3), randn(3, 5, 2, 3, seed=1) + 0.4),
           "all pairs of positions of an image, averaged over N^2 and the batch (margin not given, 0, 0.6)")


@check("eq3", "gradient")
def eq3_gradient():
    f = randn(2, 4, 2, 2, seed=1)
    gradient(lambda z: vf_loss.marginal_distance_matrix_loss(z, f, 0.3),
             lambda z: slow_eq3(z, f.double(), ((0.3,),)), (randn(2, 3, 2, 2),), "z", 1e-3)


# --- eq4 ------------------------------------------------------------------------------------------------
@check("eq4", "worked example", public=True)
def eq4_example():
    def work():
        w = torch.ones(2, requires_grad=True)
        rec, other = (w * torch.tensor([3.0, 4.0])).sum(), (w * torch.tensor([0.0, 2.0])).sum()
        return [vf_loss.adaptive_weight(rec, other, w), vf_loss.adaptive_weight(rec, 0 * other, w),
                vf_loss.adaptive_weight(rec, 0 * other, w, 10.0)]
    weights = student(work)
    for got, want, why in zip(weights, (2.499875, 50000.0, 10.0),
                              ("gradients (3, 4) and (0, 2)", "a gradient of 0 is met by the constant",
                               "clamped to max_weight")):
        close(got, want, why, 1e-3 if want == 50000 else 1e-5, "number")


@check("eq4", "any gradients")
def eq4_values():
    a, b = 3 * randn(4, 3, 2, 2, seed=1), randn(4, 3, 2, 2, seed=2)

    def work():
        w = randn(4, 3, 2, 2).requires_grad_()
        return [vf_loss.adaptive_weight((w * a).sum(), (w * b).sum(), w),
                vf_loss.adaptive_weight((w ** 2 * a).sum(), (w * b).tanh().sum(), w)]
    linear, curved = student(work)
    w = randn(4, 3, 2, 2)
    close(linear, a.norm() / b.norm(), "norms over the whole of `weight`, whatever its shape", 3e-4, "number")
    close(
        curved,
        (2 * w * a).norm() / (b * (1 - (w * b).tanh() ** 2)).norm(),
        "the gradients, not the losses",
        3e-4,
        "number",
    )


@check("eq4", "constants")
def eq4_constants():
    a, b = 3 * randn(5, seed=1), randn(5, seed=2)

    def work():
        w = randn(5).requires_grad_()
        small = (w * b).sum() * 1e-4 / b.norm()
        return [vf_loss.adaptive_weight((w * a).sum(), small, w),
                vf_loss.adaptive_weight((w * a).sum() * 1e8, (w * b).sum() * 0, w),
                vf_loss.adaptive_weight((w * 0).sum(), (w * 0).sum(), w)]
    added, most, zero = student(work)
    close(added, a.norm() / 2e-4, "1e-4 is added to the norm in the denominator", 1e-3, "number")
    close(most, 1e8, "max_weight is 1e8 if it is not given", kind="number")
    close(zero, 0.0, "both gradients 0: the weight is 0", kind="number")


@check("eq4", "the graph stays")
def eq4_graph():
    def work():
        w, x = randn(3).requires_grad_(), randn(3, seed=1).requires_grad_()
        h = torch.tanh(w * x)
        rec, other = h.square().sum(), (h - 1).square().sum()
        got = vf_loss.adaptive_weight(rec, other, w)
        filled = w.grad is not None or x.grad is not None
        try:
            (rec + got * other).backward()
        except RuntimeError:
            raise Wrong("after the call both losses are differentiated again: keep the graph") from None
        return filled, isinstance(got, torch.Tensor) and got.requires_grad
    filled, has_graph = student(work)
    ok(not filled, "nothing may be added to .grad: use torch.autograd.grad")
    ok(not has_graph, "the weight is a number for the optimizer: it has no gradient of its own")


# --- teacher --------------------------------------------------------------------------------------------
def small_teacher(patch, mean, std, seen=None):
    """A foundation model whose tokens are the means of patches; patch 0: of 2x2 pixels. seen: its inputs."""
    def tokens(net, x):
        if seen is not None:
            seen.append(x)
        return F.avg_pool2d(x, patch or 2)
    return vf_loss.FoundationModel(nn.Identity(), tokens, 3, patch, mean, std)


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
    mean, std, x = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), randn(2, 3, 8, 12)
    values(
        lambda x: small_teacher(0, mean, std)(x, (4, 6)),
        lambda x: F.avg_pool2d(torch.stack([((x[:, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)], 1), 2),
        (x,),
        "patch 0: normalised by the model's own mean and std, not resized",
    )


@check("teacher", "the patch grid")
def teacher_grid():
    mean, std, x = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), randn(2, 3, 16, 24)
    seen = []

    def work():
        out = [small_teacher(5, mean, std, seen)(x, (4, 6)), small_teacher(2, mean, std, seen)(x, (3, 5))]
        return out, seen
    out, inputs = student(work)
    n = torch.stack([((x[:, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)], 1).double()
    for patch, grid, got, image in ((5, (4, 6), out[0], inputs[0]), (2, (3, 5), out[1], inputs[1])):
        want = F.interpolate(n, (grid[0] * patch, grid[1] * patch), mode="bilinear")
        close(
            image,
            want,
            f"patch {patch}, grid {grid}: resized so that each patch is a position of the latent,"
            " bilinear, without antialias",
            1e-3,
            "any",
        )
        close(got, F.avg_pool2d(want, patch), "the features of the resized image", 1e-3)


@check("teacher", "a frozen target")
def teacher_frozen():
    def work():
        casts = []

        def tokens(net, x):
            casts.append(torch.is_autocast_enabled("cpu"))
            return net(x).to(torch.bfloat16)
        teacher = vf_loss.FoundationModel(nn.Conv2d(3, 3, 1), tokens, 3, 0, (0.5,) * 3, (0.5,) * 3)
        f = teacher(randn(1, 3, 4, 4).requires_grad_(), (4, 4))
        return str(f.dtype), f.requires_grad, casts
    dtype, has_gradient, casts = student(work)
    ok(not has_gradient, "features are a target: no gradient through the foundation model")
    ok(dtype == "torch.float32", f"features are float32 whatever the network gives: got {dtype}")
    ok(list(casts) == [False], "the network is called once, and on a CPU in float32")


# --- step -----------------------------------------------------------------------------------------------
def through(net):
    """Stands for DistributedDataParallel: lists its calls, whether they were under autocast."""
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = net, []

        def forward(self, *args):
            self.calls.append(torch.is_autocast_enabled("cpu"))
            return self.net(*args)
    return Through()


def make_run(net, width, adversary, rate, **changes):
    """What train_step needs, tiny, with plain gradient descent: a step is minus rate times gradient."""
    settings = {"kl_weight": 0.5, "lpips_weight": 0.7, "disc_weight": 0.5, "disc_start": 3, "vf_weight": 0.3,
                "cos_margin": 0.1, "mdms_margin": 0.05, "mcos": True, "mdms": True, "precision": "fp32"}
    run = types.SimpleNamespace(settings=train_vae.Settings(**{**settings, **changes}), disc=None, lpips=None)
    run.tokenizer = train_vae.Tokenizer(net, width)
    if width:
        fill(run.tokenizer.linear_proj, seed=7)
    run.ddp, run.opt = through(run.tokenizer), torch.optim.SGD(run.tokenizer.parameters(), rate)
    if adversary:
        run.disc = fill(vae.PatchDiscriminator(ch=4), scale=0.3)
        run.ddp_disc, run.opt_disc = through(run.disc), torch.optim.SGD(run.disc.parameters(), 1.0)
    return run


def small_run(width, adversary, **changes):
    """A run on 24x24 images, with stand-ins for LPIPS and the foundation model."""
    run, w = make_run(small_vae(), width, adversary, 1e-3, **changes), randn(6, 3, seed=5)
    run.lpips = lambda x, x_hat: (x - x_hat).square().mean((1, 2, 3), keepdim=True)
    run.foundation = lambda x, grid: torch.einsum("oc,bchw->bohw", w, F.adaptive_avg_pool2d(x, tuple(grid)))
    return run


def batch_of(n):
    return randn(n, 3, 24, 24), randn(n, 4, 12, 12, seed=1)


def slow_loss(run, x, noise, batch):
    """The plain sum: (L, {name: term}, x_hat)."""
    s, net = run.settings, run.tokenizer
    x_hat, z, q = net.vae(x, noise)
    b = len(x)
    rec = ((x - x_hat).abs().sum() + s.lpips_weight * run.lpips(x, x_hat).sum() * x[0].numel()) / b
    kl = 0.5 * (q.mean ** 2 + q.logvar.exp() - 1 - q.logvar).sum() / b
    loss, terms = rec + s.kl_weight * kl, {"rec": rec, "kl": kl, "l1": (x - x_hat).abs().mean()}

    def factor(other, layer, most):
        norms = [torch.autograd.grad(v, layer.weight, retain_graph=True)[0].norm() for v in (rec, other)]
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=most).detach()
    if run.disc is not None and batch >= s.disc_start:
        terms["g"] = -run.disc(x_hat).mean()
        terms["w_disc"] = s.disc_weight * factor(terms["g"], net.vae.decoder.conv_out, 1e4)
        loss = loss + terms["w_disc"] * terms["g"]
    if net.linear_proj is not None:
        u, f = F.normalize(net.linear_proj(z).flatten(2), dim=1), run.foundation(x, z.shape[-2:]).flatten(2)
        f = F.normalize(f, dim=1)
        terms["mcos"] = s.mcos * (1 - s.cos_margin - (u * f).sum(1)).clamp(min=0).mean()
        terms["mdms"] = s.mdms * ((u.mT @ u - f.mT @ f).abs() - s.mdms_margin).clamp(min=0).mean()
        both = terms["mcos"] + terms["mdms"]
        terms["w_vf"] = s.vf_weight * factor(both, net.vae.encoder.conv_out, 1e8)
        loss = loss + terms["w_vf"] * both
    return loss, terms, x_hat


def groups_of(run):
    net = run.tokenizer.vae
    groups = {"encoder": net.encoder, "decoder": net.decoder,
              "quant_conv": net.quant_conv, "post_quant_conv": net.post_quant_conv,
              "linear_proj": run.tokenizer.linear_proj,
              "discriminator": run.disc}
    return {name: list(m.parameters()) for name, m in groups.items() if m is not None}


def one_step(run, x, noise, batch):
    """train_step of this run -> the terms, and {part: its change, as one vector}."""
    before = {name: [p.detach().clone() for p in part] for name, part in groups_of(run).items()}
    terms = train_vae.train_step(run, x, noise, batch)
    change = {name: torch.cat([(a - p.detach()).flatten() for a, p in zip(before[name], part)])
              for name, part in groups_of(run).items()}
    graphs = {name: isinstance(v, torch.Tensor) and v.requires_grad for name, v in terms.items()}
    return {name: torch.as_tensor(v).detach() for name, v in terms.items()}, change, graphs


def slow_step(run, x, noise, batch):
    """Change of each part by one step of gradient descent, and the terms; the run is left as it should be."""
    loss, terms, x_hat = slow_loss(run, x, noise, batch)
    groups, change = groups_of(run), {}
    parts = {name: part for name, part in groups.items() if name != "discriminator"}
    grads = {name: torch.autograd.grad(loss, part, retain_graph=True) for name, part in parts.items()}
    if run.disc is not None:
        grads["discriminator"] = [torch.zeros_like(p) for p in groups["discriminator"]]
        if batch >= run.settings.disc_start:
            real, fake = run.disc(x), run.disc(x_hat.detach())
            terms["d"] = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
            grads["discriminator"] = torch.autograd.grad(terms["d"], groups["discriminator"])
    with torch.no_grad():
        for name, part in groups.items():
            rate = 1.0 if name == "discriminator" else 1e-3
            change[name] = torch.cat([rate * g.flatten() for g in grads[name]])
            for p, g in zip(part, grads[name]):
                p -= rate * g
    return terms, change


def same_step(got, want, what):
    (terms, change, graphs), (right, moved) = got, want
    for name in right:
        ok(name in terms, f"{what}: the terms lack {name!r}")
        ok(not graphs[name], f"{what}: terms[{name!r}] still has a gradient: detach it")
        close(terms[name], right[name], f"{what}: terms[{name!r}]", 1e-3)
    for name, wanted in moved.items():
        ok((change[name] - wanted).norm() <= 5e-3 * wanted.norm() + 1e-7,
           f"{what}: the step of the {name} is not that of the loss: the norm of its change is "
           f"{change[name].norm():.4g}, expected {wanted.norm():.4g}")


def linear_pixel():
    """The tokenizer of the worked example: linear, of one pixel, d = 1."""
    class Linear(nn.Module):
        embed_dim = 1

        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Module(), nn.Module()
            self.encoder.conv_out = nn.Conv2d(3, 2, 1, bias=False)
            self.decoder.conv_out = nn.Conv2d(1, 3, 1, bias=False)
            with torch.no_grad():
                self.encoder.conv_out.weight[0] = 1 / 3
                self.encoder.conv_out.weight[1] = 0.0
                self.decoder.conv_out.weight.fill_(0.5)

        def forward(self, x, noise):
            q = vae.Posterior(self.encoder.conv_out(x))
            z = q.sample(noise)
            return self.decoder.conv_out(z), z, q
    return Linear()


@check("step", "worked example", public=True)
def step_example():
    def work():
        run = make_run(linear_pixel(), 0, False, 0.1)
        terms = train_vae.train_step(run, torch.ones(2, 3, 1, 1), torch.zeros(2, 1, 1, 1), 0)
        net = run.tokenizer.vae
        return terms, net.decoder.conv_out.weight.detach(), net.encoder.conv_out.weight[0].detach()
    terms, decoder, encoder = student(work)
    for name, value in (("rec", 1.5), ("kl", 0.5), ("l1", 0.5)):
        close(terms[name], value, f"terms[{name!r}]")
    close(decoder.flatten(), [0.6] * 3, "the decoder's weights after the step")
    close(encoder.flatten(), [0.433333] * 3, "the mean's weights after the step")


@check("step", "all terms", public=True)
def step_terms():
    x, noise = batch_of(2)
    terms, change, _ = student(lambda: one_step(small_run(6, True), x, noise, 3))
    right = {"rec": 2762.2, "kl": 32.173, "l1": 0.83403, "g": 0.087918, "w_disc": 116.35, "mcos": 0.90339,
             "mdms": 0.70335, "w_vf": 160.54, "d": 0.78593}
    moved = {"encoder": 0.1037, "decoder": 1.5498, "quant_conv": 0.057005, "linear_proj": 0.0097772,
             "discriminator": 3.5244}
    for name, value in right.items():
        ok(name in terms, f"the terms lack {name!r}")
        close(terms[name], value, f"terms[{name!r}], with VF loss and discriminator", 2e-3)
    for name, value in moved.items():
        ok(abs(change[name].norm().item() - value) <= 5e-3 * value,
           f"the step of the {name} has the norm {change[name].norm().item():.5g}, expected {value:.5g}")


@check("step", "reconstruction and KL")
def step_reconstruction():
    x, noise = batch_of(3)

    def work():
        run = small_run(0, False)
        return [one_step(run, x, noise, 9) for _ in range(2)]
    got, run = student(work), small_run(0, False)
    for round_ in range(2):  # in the second round gradients of the first would be left
        same_step(
            got[round_], slow_step(run, x, noise, 9), f"no VF loss, no discriminator, step {round_ + 1}"
        )


VF_CASES = ({}, {"mcos": False}, {"vf_weight": 2.0, "cos_margin": 0.5, "mdms_margin": 0.25})


@check("step", "with VF loss")
def step_vf():
    x, noise = batch_of(2)
    got = student(lambda: [one_step(small_run(6, False, **c), x, noise, 0) for c in VF_CASES])
    for case, answer in zip(VF_CASES, got):
        same_step(answer, slow_step(small_run(6, False, **case), x, noise, 0), f"with VF loss {case or ''}")


def weak_run():
    """A discriminator with hardly a gradient: the weight of g is clamped."""
    run = small_run(0, True)
    with torch.no_grad():
        run.disc.main[-1].weight.mul_(1e-6)
    return run


@check("step", "with the discriminator")
def step_adversarial():
    x, noise = batch_of(2)

    def work():
        run = small_run(0, True)
        return [one_step(run, x, noise, batch) for batch in (2, 3, 4)] + [one_step(weak_run(), x, noise, 3)]
    got, run = student(work), small_run(0, True)
    for batch, answer in zip((2, 3, 4), got):
        same_step(answer, slow_step(run, x, noise, batch), f"disc_start 3, batch {batch}")
    same_step(got[3], slow_step(weak_run(), x, noise, 3), "a discriminator with hardly a gradient")


@check("step", "DDP and bfloat16")
def step_plumbing():
    x, noise = batch_of(2)

    def work():
        run, dtypes = small_run(6, True, precision="bf16"), []

        def lpips(x, x_hat):
            dtypes.append((str(x_hat.dtype), torch.is_autocast_enabled("cpu")))
            return (x - x_hat).square().mean((1, 2, 3), keepdim=True)
        run.lpips = lpips
        train_vae.train_step(run, x, noise, 3)
        return run.ddp.calls, run.ddp_disc.calls, dtypes
    calls, disc_calls, dtypes = student(work)
    ok(len(calls) == 1, "the tokenizer is called once, as run.ddp")
    ok(len(disc_calls) == 2, "the discriminator's own step calls run.ddp_disc, on x and on x_hat")
    ok(calls[0], "precision bf16: run.ddp is called inside autocast(x, True)")
    ok(list(dtypes[0]) == ["torch.float32", False], "the losses are computed in float32, outside of autocast")


