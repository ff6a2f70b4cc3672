"""Checks of set 1, the tokenizer. No student's process sees the slow_ functions."""
from checks import (F, check, close, derivative, fill, math, near, nn, ok, randn, student, torch, train_vae,
                    vae, values, values_and_gradient)

# --- hinge ----------------------------------------------------------------------------------------------
@check("hinge", "generator", public=True)
def hinge_generator():
    logits = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)
    close(student(lambda: train_vae.hinge_generator(logits)), -0.5, "minus the mean of the logits")

@check("hinge", "discriminator", public=True)
def hinge_discriminator():
    real, fake = torch.tensor([3.0, 0.0]).view(2, 1, 1, 1), torch.tensor([-2.0, 1.0]).view(2, 1, 1, 1)
    close(student(lambda: train_vae.hinge_discriminator(real, fake)), 0.75, "the two hinges, halved")

def both_hinges(*logits):
    return [loss for real, fake in (logits, logits[::-1])
            for loss in (train_vae.hinge_generator(fake), train_vae.hinge_discriminator(real, fake))]

def slow_hinges(*logits):
    return [loss for real, fake in (logits, logits[::-1])
            for loss in (-fake.mean(), ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2)]

values_and_gradient("hinge", "any logits", both_hinges, slow_hinges,
                    lambda: (2 * randn(9), 2 * randn(2, 1, 3, 4, seed=1)),
                    "real and fake logits each have a mean of their own", "the real logits, the fake logits")

# --- posterior, kl --------------------------------------------------------------------------------------
def sample_of(moments, noise):
    return vae.Posterior(moments).sample(noise)

def slow_sample(moments, noise):
    mean, logvar = moments.chunk(2, dim=1)
    return mean + logvar.exp().sqrt() * noise

@check("posterior", "worked example", public=True)
def posterior_example():
    moments = torch.tensor([1.0, -1.0, 0.0, 2.1972246]).view(1, 4, 1, 1)
    got = student(lambda: sample_of(moments, torch.full((1, 2, 1, 1), 2.0)))
    close(got, torch.tensor([3.0, 5.0]).view(1, 2, 1, 1), "mean 1 and -1, variance 1 and 9, noise 2")

values_and_gradient("posterior", "any posterior", sample_of, slow_sample,
                    lambda: (randn(2, 6, 3, 4), randn(2, 3, 3, 4, seed=1)),
                    "the noise scales with the standard deviation, value by value",
                    "mean and logvar, the noise")

@check("posterior", "noise that is drawn")
def posterior_draws():
    moments = torch.cat([torch.full((2, 2, 60, 60), 5.0), torch.full((2, 2, 60, 60), -1.3862944)], 1)

    def work():
        given, half = moments.clone().requires_grad_(), moments[:, :, :2].half()
        q = vae.Posterior(given)
        one = q.sample(None)
        grad, = torch.autograd.grad(one.sum(), given)
        return (one, q.sample(), grad, torch.cat([q.mean, q.logvar], 1),
                str(vae.Posterior(half).sample().dtype))
    one, two, grad, after, dtype = student(work)
    z = (one - 5) / 0.5
    ok(z.shape == (2, 2, 60, 60), "without noise given, z has the shape of the mean")
    near(z.mean(), 0.0, 0.1, "drawn noise has mean 0")
    near(z.std((2, 3)), torch.ones(2, 2), 0.1, "drawn noise has standard deviation 1 in each channel")
    near((z.abs() > 2).float().mean(), 0.0455, 0.012, "drawn noise is normal: 4.6 % is beyond two deviations")
    near(torch.corrcoef(z.flatten(2).flatten(0, 1)), torch.eye(4), 0.1, "each value has noise of its own")
    ok(not torch.equal(one, two), "two calls must draw different noise")
    close(grad, torch.cat([torch.ones_like(z), z / 4], 1), "where noise is drawn, gradients reach both, too")
    ok(torch.equal(after, moments), "mean and logvar themselves must not be changed")
    ok(dtype == "torch.float16", f"z has the dtype of the mean, float16: got {dtype}")

def kl_of(moments):
    q = vae.Posterior(moments)
    q.kl()
    return q.kl()    # of a posterior that the first call has not changed

def slow_kl(moments):
    mean, logvar = moments.chunk(2, dim=1)
    q, p = torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    return torch.distributions.kl_divergence(q, p).sum((1, 2, 3))

@check("kl", "worked example", public=True)
def kl_example():
    moments = torch.tensor([[2.0, 0.0], [0.0, 1.3862944]]).view(2, 2, 1, 1)
    close(student(lambda: kl_of(moments)), [2.0, 0.8068528], "means 2 and 0, variances 1 and 4, in nats")

values_and_gradient("kl", "any posterior", kl_of, slow_kl, lambda: ((2 * randn(3, 6, 2, 4)).round(),),
                    "the values of an image are not reduced as in Sec. 3.3, or the closed form is off",
                    "mean and logvar")

# --- rec ------------------------------------------------------------------------------------------------
@check("rec", "worked example", public=True)
def rec_example():
    x, x_hat = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    plain, full = student(lambda: (
        train_vae.reconstruction_loss(x, x_hat, None, 2.0),
        train_vae.reconstruction_loss(x, x_hat, lambda x, x_hat: torch.full((2, 1, 1, 1), 0.2), 2.0)))
    close(plain, 0.75, "without LPIPS")
    close(full, 1.15, "with an LPIPS of 0.2 for each image and lpips_weight = 2")

def some_lpips(x, x_hat):
    return (x_hat - 2 * x).square().mean((1, 2, 3), keepdim=True)

def both_rec(x, x_hat):
    return [train_vae.reconstruction_loss(x, x_hat, lpips, 0.7) for lpips in (None, some_lpips)]

def slow_rec(x, x_hat):
    plain = (x - x_hat).abs().sum() / len(x)
    return [plain, plain + 0.7 * x[0].numel() * some_lpips(x, x_hat).sum() / len(x)]

values_and_gradient("rec", "any images", both_rec, slow_rec,
                    lambda: (randn(3, 3, 4, 5), randn(3, 3, 4, 5, seed=1)),
                    "the loss without LPIPS, and with lpips(x, x_hat) at every value", "x, x_hat")

# --- resnet, attn ---------------------------------------------------------------------------------------
@check("resnet", "worked example", public=True)
def resnet_example():
    x = randn(2, 8, 4, 6)

    def work():
        block = vae.ResnetBlock(8, 8)
        with torch.no_grad():
            block.conv2.weight.zero_()
            block.conv2.bias.fill_(3.0)
            return block(x)
    close(student(work), x + 3, "with conv2 = 3 the result is x + 3")

def features(b, *size):
    return 2 * randn(b, 8, *size, seed=9)

def slow_norm(norm, x):
    return F.group_norm(x, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)

def slow_silu(x, norm=None):
    return F.silu(slow_norm(norm or fill(vae.norm_silu(8)), x))

def slow_resnet(x, width=8):
    block, h = fill(vae.ResnetBlock(8, width)).double(), x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        h = conv(slow_silu(h, norm))
    return h + block.nin_shortcut(x)

@check("resnet", "norm and SiLU")
def resnet_norm():
    values(lambda x: fill(vae.norm_silu(8))(x), slow_silu, (1e-3 * features(2, 4, 6),),
           "the norm comes first, with its own eps, which counts for small values")

@check("resnet", "equal widths")
def resnet_values():
    values(lambda x: fill(vae.ResnetBlock(8, 8))(x), slow_resnet, (features(2, 4, 6),),
           "norm, SiLU, convolution, twice, plus x")

values_and_gradient("resnet", "wider", lambda x: fill(vae.ResnetBlock(8, 16))(x),
                    lambda x: slow_resnet(x, 16), lambda: (features(2, 4, 6),),
                    "where the width changes, the shortcut", "x")

@check("attn", "worked example", public=True)
def attn_example():
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]).view(1, 4, 1, 2)

    def work():
        block = vae.AttnBlock(4)
        block.norm = nn.Identity()
        with torch.no_grad():
            for layer in (block.q, block.k, block.v, block.proj_out):
                layer.weight.copy_(torch.eye(4).view(4, 4, 1, 1))
                layer.bias.zero_()
            return block(x)[0, :, 0]
    close(student(work), [[3.76159, 0.23841], [0.23841, 3.76159], [0.0, 0.0], [0.0, 0.0]],
          "two positions, all layers the identity")

def slow_attention(x):
    block = fill(vae.AttnBlock(8)).double()
    n = slow_norm(block.norm, x)
    q, k, v = (layer(n).flatten(2) for layer in (block.q, block.k, block.v))
    out = []
    for i in range(q.shape[2]):
        scores = (q[:, :, i, None] * k).sum(1, keepdim=True) / math.sqrt(q.shape[1])
        out.append((scores.softmax(2) * v).sum(2))
    return x + block.proj_out(torch.stack(out, 2).view(x.shape))

values_and_gradient("attn", "any weights", lambda x: fill(vae.AttnBlock(8))(x), slow_attention,
                    lambda: (features(2, 3, 5),),
                    "each position takes the mean of v over its own image, weighted by softmax", "x")

# --- batches --------------------------------------------------------------------------------------------
@check("batches", "an epoch holds each image once", public=True)
def batches_epoch():
    parts = student(lambda: [train_vae.batch_indices(10, 4, step, 0) for step in range(5)])
    for part in parts:
        close(part, part, "batch_size indices", kind="int64")
        ok(tuple(part.shape) == (4,), f"batch_size indices: got {tuple(part.shape)}, expected (4,)")
    seen = torch.cat(list(parts)).tolist()
    ok(sorted(seen[:10]) == list(range(10)), "the first 10 indices are 0 to 9, each once")
    ok(sorted(seen[10:]) == list(range(10)), "and so are the next 10, across the border of two epochs")

@check("batches", "any step any size")
def batches_values():
    sizes = ((10, 4, 0), (7, 7, 1), (5, 13, 2), (100, 1, 3), (3, 8, 4))
    cases = [(n, size, step, seed) for n, size, seed in sizes for step in (0, 1, 2, 5, 14, 3, 0)]
    got = student(lambda: [train_vae.batch_indices(*case) for case in cases])
    for part, (n, size, step, seed) in zip(got, cases):
        epochs = range(step * size // n + size + 2)
        orders = torch.cat([train_vae.epoch_order(n, seed, epoch) for epoch in epochs])
        close(part, orders[step * size:(step + 1) * size],
              f"n = {n}, batch_size = {size}, step {step}: a piece of the epochs' orders", kind="int64")

# --- lpips ----------------------------------------------------------------------------------------------
def small_lpips():
    """LPIPS on a narrow VGG16: as many layers, 4 to 8 channels."""
    net, layers, width = vae.LPIPS.__new__(vae.LPIPS), [], 3
    nn.Module.__init__(net)
    for c, convs in ((4, 2), (4, 2), (6, 3), (8, 3), (8, 3)):
        for _ in range(convs):
            layers += [nn.Conv2d(width, c, 3, padding=1), nn.ReLU(inplace=True)]
            width = c
        layers.append(nn.MaxPool2d(2, 2))
    net.features = fill(nn.Sequential(*layers), scale=0.3)
    net.lin = fill(nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in (4, 4, 6, 8, 8)), seed=50)
    net.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
    net.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
    return net.requires_grad_(False).eval()

def faint_lpips(bias):
    """LPIPS whose first four maps are 0 everywhere and whose last is `bias`; its ReLUs would stop a NaN."""
    net = small_lpips()
    for layer in net.features:
        for p in layer.parameters():
            p.zero_()
        if isinstance(layer, nn.ReLU):
            layer.forward = lambda x: x
    net.features[-3].bias.fill_(bias)
    return net

def distance(x, x_hat):
    return small_lpips()(x, x_hat)

def slow_maps(x, net=None):
    net, maps = (net or small_lpips()).double(), []
    h = (x - net.mean) / net.std
    for layer in net.features:
        if isinstance(layer, nn.MaxPool2d):
            maps.append(h / torch.sqrt(h.square().sum(1, keepdim=True) + 1e-10))
        h = h.clamp(min=0) if isinstance(layer, nn.ReLU) else layer(h)
    return maps

def slow_six_maps(x):
    return [*slow_maps(x), slow_maps(x, faint_lpips(1e-4))[4]]

def slow_distance(x, x_hat):
    pairs = zip(small_lpips().double().lin, slow_maps(x), slow_maps(x_hat))
    return sum(lin((a - b).square()).mean((2, 3), keepdim=True) for lin, a, b in pairs)

@check("lpips", "shapes and zero", public=True)
def lpips_shapes():
    net, x = small_lpips(), randn(2, 3, 32, 48)
    maps, zero = student(lambda: (net.unit_features(x), net(x, x)))
    sizes = [(2, 4, 32, 48), (2, 4, 16, 24), (2, 6, 8, 12), (2, 8, 4, 6), (2, 8, 2, 3)]
    ok([tuple(m.shape) for m in maps] == sizes, f"five maps, each before its pooling: expected {sizes}")
    close(zero, torch.zeros(2, 1, 1, 1), "the distance of an image to itself is 0, (B, 1, 1, 1)")

@check("lpips", "five maps")
def lpips_maps():
    values(lambda x: [*small_lpips().unit_features(x), faint_lpips(1e-4).unit_features(x)[4]],
           slow_six_maps, (randn(2, 3, 32, 48),),
           "normalised input, maps after ReLU and before pooling, each position's vector of length 1", 1e-3)

@check("lpips", "distance")
def lpips_values():
    values(distance, slow_distance, (randn(2, 3, 32, 32), randn(2, 3, 32, 32, seed=1)),
           "squared differences, weighted by lin, averaged over positions, summed over maps", 1e-3)

@check("lpips", "gradient")
def lpips_gradient():
    x, x_hat = randn(1, 3, 32, 32), randn(1, 3, 32, 32, seed=1)

    def work():
        dead = derivative(lambda v: faint_lpips(0.0)(x, v), [x_hat.clone()], "x_hat")    # vectors of length 0
        return dead, derivative(distance, [x.clone(), x_hat.clone()], "x_hat")
    dead, (at_x, at_x_hat) = student(work)
    want = derivative(slow_distance, [x.double(), x_hat.double()], "x_hat")
    ok(bool(dead[0].isfinite().all()), "vectors of length 0 must give a finite gradient: where is the eps?")
    close(at_x_hat, want[1], "the gradient of x_hat is off", 1e-3)
    close(at_x, torch.zeros_like(at_x), "x is the target: no gradient reaches it")
