"""Checks of set 1, the tokenizer. No student's process sees the slow_ functions."""

from checks import (
    F,
    check,
    close,
    derivative,
    fill,
    gradient,
    math,
    near,
    nn,
    ok,
    randn,
    student,
    torch,
    train_vae,
    vae,
    values,
)


# --- hinge ----------------------------------------------------------------------------------------------
@check("hinge", "generator", public=True)
def hinge_generator():
    logits = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)
    close(student(lambda: train_vae.hinge_generator(logits)), -0.5, "minus the mean of the logits")


@check("hinge", "discriminator", public=True)
def hinge_discriminator():
    real, fake = torch.tensor([3.0, 0.0]).view(2, 1, 1, 1), torch.tensor([-2.0, 1.0]).view(2, 1, 1, 1)
    close(student(lambda: train_vae.hinge_discriminator(real, fake)), 0.75, "the two hinges, halved")


def both_hinges(real, fake):
    return train_vae.hinge_generator(fake), train_vae.hinge_discriminator(real, fake)


def slow_hinge(real, fake):
    margins = [(1 - v).clamp(min=0) for v in real.flatten()], [(1 + v).clamp(min=0) for v in fake.flatten()]
    return [-fake.sum() / fake.numel(), sum(sum(m) / len(m) for m in margins) / 2]


@check("hinge", "any logits")
def hinge_values():
    values(both_hinges, slow_hinge, (2 * randn(2, 1, 3, 3), 2 * randn(3, 1, 3, 4, seed=1)),
           "real and fake logits each have a mean of their own")


@check("hinge", "gradient")
def hinge_gradient():
    gradient(both_hinges, slow_hinge, (2 * randn(2, 1, 3, 3), 2 * randn(3, 1, 3, 4, seed=1)),
             "the real logits, the fake logits")


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


@check("posterior", "any posterior")
def posterior_values():
    values(sample_of, slow_sample, (randn(2, 6, 3, 4), randn(2, 3, 3, 4, seed=1)),
           "the noise scales with the standard deviation, value by value")


@check("posterior", "noise that is drawn")
def posterior_draws():
    moments = torch.cat([torch.full((2, 2, 60, 60), 5.0), torch.full((2, 2, 60, 60), -1.3862944)], 1)

    def work():
        q = vae.Posterior(moments)
        return q.sample(), q.sample()
    one, two = student(work)
    z = (one - 5) / 0.5
    ok(z.shape == (2, 2, 60, 60), "without noise given, z has the shape of the mean")
    near(z.mean(), 0.0, 0.1, "drawn noise has mean 0")
    near(z.std((2, 3)), torch.ones(2, 2), 0.1, "drawn noise has standard deviation 1 in each channel")
    near((z.abs() > 2).float().mean(), 0.0455, 0.012, "drawn noise is normal: 4.6 % is beyond two deviations")
    near(torch.corrcoef(z.flatten(2).flatten(0, 1)), torch.eye(4), 0.1, "each value has noise of its own")
    ok(not torch.equal(one, two), "two calls must draw different noise")


@check("posterior", "gradient")
def posterior_gradient():
    gradient(
        sample_of, slow_sample, (randn(2, 6, 3, 4), randn(2, 3, 3, 4, seed=1)), "mean and logvar, the noise"
    )


def kl_of(moments):
    return vae.Posterior(moments).kl()


def slow_kl(moments):
    mean, logvar = moments.chunk(2, dim=1)
    q, p = torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    return torch.stack([image.sum() for image in torch.distributions.kl_divergence(q, p)])


@check("kl", "worked example", public=True)
def kl_example():
    moments = torch.tensor([2.0, 0.0, 0.0, 1.3862944]).view(1, 4, 1, 1)
    one, zero = student(lambda: (kl_of(moments), kl_of(torch.zeros(2, 4, 3, 3))))
    close(one, [2.8068528], "KL of N(2, 1) and N(0, 4) to N(0, 1), together, in nats")
    close(zero, [0.0, 0.0], "N(0, I) has KL 0 to itself")


@check("kl", "any posterior")
def kl_values():
    values(kl_of, slow_kl, (2 * randn(3, 6, 2, 4),), "KL is summed over channels and positions of each image")


@check("kl", "gradient")
def kl_gradient():
    gradient(kl_of, slow_kl, (randn(2, 4, 2, 2),), "mean and logvar")


# --- rec ------------------------------------------------------------------------------------------------
@check("rec", "worked example", public=True)
def rec_example():
    x, x_hat = torch.zeros(2, 3, 1, 2), torch.ones(2, 3, 1, 2)
    x_hat[1] = 0.5

    def lpips(x, x_hat):
        return torch.full((len(x), 1, 1, 1), 0.2)
    plain, full = student(lambda: (train_vae.reconstruction_loss(x, x_hat, None, 2.0),
                                   train_vae.reconstruction_loss(x, x_hat, lpips, 2.0)))
    close(plain, 4.5, "without LPIPS: absolute differences, summed over an image, averaged over the batch")
    close(full, 6.9, "LPIPS counts at each of an image's values")


def some_lpips(x, x_hat):
    return (x_hat - 2 * x).square().mean((1, 2, 3), keepdim=True)


def slow_rec(x, x_hat):
    plain = sum((a - b).abs().sum() for a, b in zip(x, x_hat)) / len(x)
    return [
        plain,
        plain + sum(0.7 * a.numel() * (b - 2 * a).square().mean() for a, b in zip(x, x_hat)) / len(x),
    ]


def both_rec(x, x_hat):
    return (train_vae.reconstruction_loss(x, x_hat, None, 0.7),
            train_vae.reconstruction_loss(x, x_hat, some_lpips, 0.7))


@check("rec", "any images")
def rec_values():
    values(both_rec, slow_rec, (randn(3, 3, 4, 5), randn(3, 3, 4, 5, seed=1)),
           "without LPIPS, and with it, x first")


@check("rec", "gradient")
def rec_gradient():
    gradient(both_rec, slow_rec, (randn(3, 3, 4, 5), randn(3, 3, 4, 5, seed=1)), "x, x_hat")


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


def slow_norm(norm, x):
    return F.group_norm(x, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)


def slow_resnet(block):
    def forward(x):
        h = x
        for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
            h = slow_norm(norm, h)
            h = F.conv2d(h * torch.sigmoid(h), conv.weight.double(), conv.bias.double(), padding=1)
        skip = block.nin_shortcut
        return h + (x if isinstance(skip, nn.Identity) else
                    F.conv2d(x, skip.weight.double(), skip.bias.double()))
    return forward


@check("resnet", "norm and SiLU")
def resnet_norm():
    layer = fill(vae.norm_silu(8))

    def slow(x):
        h = slow_norm(layer, x)
        return h * torch.sigmoid(h)
    values(layer, slow, (2 * randn(2, 8, 4, 6, seed=9),), "the norm comes first")


@check("resnet", "equal widths")
def resnet_values():
    block = fill(vae.ResnetBlock(8, 8))
    values(
        block, slow_resnet(block), (2 * randn(2, 8, 4, 6, seed=9),), "norm, SiLU, convolution, twice, plus x"
    )


@check("resnet", "wider")
def resnet_wider():
    block = fill(vae.ResnetBlock(8, 16))
    values(
        block, slow_resnet(block), (2 * randn(2, 8, 4, 6, seed=9),), "where the width changes, the shortcut"
    )


@check("resnet", "gradient")
def resnet_gradient():
    block = fill(vae.ResnetBlock(8, 16))
    gradient(block, slow_resnet(block), (2 * randn(2, 8, 4, 6, seed=9),), "x", 1e-3)


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


def slow_attn(block):
    def conv(layer, v):
        return (
            torch.einsum("oc,bcn->bon", layer.weight[:, :, 0, 0].double(), v) + layer.bias.double()[:, None]
        )

    def forward(x):
        n = slow_norm(block.norm, x).flatten(2)
        q, k, v = conv(block.q, n), conv(block.k, n), conv(block.v, n)
        out = []
        for b in range(len(x)):
            columns = []
            for i in range(q.shape[2]):
                scores = (q[b, :, i, None] * k[b]).sum(0) / math.sqrt(q.shape[1])
                columns.append((scores.softmax(0) * v[b]).sum(1))
            out.append(torch.stack(columns, 1))
        return x + conv(block.proj_out, torch.stack(out)).view(x.shape)
    return forward


@check("attn", "any weights")
def attn_values():
    block = fill(vae.AttnBlock(8))
    values(block, slow_attn(block), (2 * randn(2, 8, 3, 5, seed=9),),
           "each position takes the mean of v over its own image, weighted by softmax")


@check("attn", "gradient")
def attn_gradient():
    block = fill(vae.AttnBlock(8))
    gradient(block, slow_attn(block), (randn(1, 8, 2, 3, seed=9),), "x", 1e-3)


# --- batches --------------------------------------------------------------------------------------------
@check("batches", "an epoch holds each image once", public=True)
def batches_epoch():
    def work():
        return [train_vae.batch_indices(10, 4, step, 0) for step in range(5)]
    parts = student(work)
    for part in parts:
        close(part, part, "batch_size indices", kind="int64")
        ok(tuple(part.shape) == (4,), f"batch_size indices: got {tuple(part.shape)}, expected (4,)")
    seen = torch.cat(list(parts))
    ok(sorted(seen[:10].tolist()) == list(range(10)), "the first 10 indices are 0 to 9, each once")
    ok(
        sorted(seen[10:].tolist()) == list(range(10)),
        "and so are the next 10, across the border of two epochs",
    )


@check("batches", "any step any size")
def batches_values():
    cases = [
        (n, size, step, seed)
        for n, size, seed in ((10, 4, 0), (7, 7, 1), (5, 13, 2), (100, 1, 3), (3, 8, 4))
        for step in (0, 1, 2, 5, 14, 3, 0)
    ]
    got = student(lambda: [train_vae.batch_indices(n, size, step, seed) for n, size, step, seed in cases])
    for part, (n, size, step, seed) in zip(got, cases):
        orders = torch.cat(
            [train_vae.epoch_order(n, seed, epoch) for epoch in range(step * size // n + size + 2)]
        )
        close(part, orders[step * size:(step + 1) * size],
              f"n = {n}, batch_size = {size}, step {step}: a piece of the epochs' orders", kind="int64")


# --- lpips ----------------------------------------------------------------------------------------------
def small_lpips():
    """LPIPS on a narrow VGG16: as many layers, 4 to 8 channels."""
    net = vae.LPIPS.__new__(vae.LPIPS)
    nn.Module.__init__(net)
    layers, width = [], 3
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


def slow_maps(net, x):
    h, maps = (x - net.mean.double()) / net.std.double(), []
    for layer in net.features:
        if isinstance(layer, nn.Conv2d):
            h = F.conv2d(h, layer.weight.double(), layer.bias.double(), padding=1)
        elif isinstance(layer, nn.ReLU):
            h = h.clamp(min=0)
        else:
            maps.append(h / torch.sqrt(h.square().sum(1, keepdim=True) + 1e-10))
            h = F.max_pool2d(h, 2)
    return maps


def slow_lpips(net):
    def distance(x, x_hat):
        total = 0.0
        for lin, a, b in zip(net.lin, slow_maps(net, x), slow_maps(net, x_hat)):
            weight = lin.weight[0, :, 0, 0].double()
            total = total + ((a - b).square() * weight[:, None, None]).sum(1).flatten(1).mean(1)
        return total.view(-1, 1, 1, 1)
    return distance


@check("lpips", "shapes and zero", public=True)
def lpips_shapes():
    net, x = small_lpips(), randn(2, 3, 32, 48)
    maps, zero = student(lambda: (net.unit_features(x), net(x, x)))
    sizes = [(2, 4, 32, 48), (2, 4, 16, 24), (2, 6, 8, 12), (2, 8, 4, 6), (2, 8, 2, 3)]
    ok([tuple(m.shape) for m in maps] == sizes, f"five maps, each before its pooling: expected {sizes}")
    close(zero, torch.zeros(2, 1, 1, 1), "the distance of an image to itself is 0, (B, 1, 1, 1)")


@check("lpips", "five maps")
def lpips_maps():
    net = small_lpips()
    values(net.unit_features, lambda x: slow_maps(net, x), (randn(2, 3, 32, 48),),
           "normalised input, maps after ReLU and before pooling, each position's vector of length 1", 1e-3)


@check("lpips", "distance")
def lpips_values():
    net = small_lpips()
    values(net.forward, slow_lpips(net), (randn(2, 3, 32, 32), randn(2, 3, 32, 32, seed=1)),
           "squared differences, weighted by lin, averaged over positions, summed over maps", 1e-3)


@check("lpips", "gradient")
def lpips_gradient():
    x = randn(1, 3, 32, 32)

    def work():
        net = small_lpips()    # a network whose map is 0 everywhere: vectors of length 0
        net.features = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.MaxPool2d(2, 2))
        nn.init.zeros_(net.features[0].weight)
        alive = small_lpips()
        x_hat = randn(1, 3, 32, 32, seed=1)
        dead = derivative(lambda v: net(x, v), [x_hat.clone()], "x_hat")
        return dead, derivative(alive.forward, [x.clone(), x_hat.clone()], "x_hat")
    dead, (at_x, at_x_hat) = student(work)
    want = derivative(slow_lpips(small_lpips()), [x.double(), randn(1, 3, 32, 32, seed=1).double()], "x_hat")
    ok(bool(dead[0].isfinite().all()), "vectors of length 0 must give a finite gradient: where is the eps?")
    close(at_x_hat, want[1], "the gradient of x_hat is off", 1e-3)
    close(at_x, torch.zeros_like(at_x), "x is the target: no gradient reaches it")
