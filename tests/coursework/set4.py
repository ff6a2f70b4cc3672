"""Checks of set 4, training. No student's process sees the slow_ functions."""
from checks import (
    Wrong,
    check,
    close,
    fill,
    gradient,
    math,
    near,
    nn,
    ok,
    randn,
    student,
    torch,
    train_dit,
    types,
    values,
)


# --- ema ------------------------------------------------------------------------------------------------
@check("ema", "worked example", public=True)
def ema_example():
    def work():
        average, weight, seen = torch.tensor([1.0]), torch.tensor([3.0]), []
        for _ in range(2):
            train_dit.update_ema([average], [weight], 0.9)
            seen.append(average.clone())
        return seen, weight
    (one, two), weight = student(work)
    close(one, [1.2], "average 1, weight 3, decay 0.9, in place")
    close(two, [1.38], "a second step continues from the first")
    close(weight, [3.0], "the weights stay")


def ema_nets():
    nets = [fill(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), seed=s) for s in (0, 9)]
    averages, weights = (list(net.parameters()) for net in nets)
    for p in averages:
        p.requires_grad_(False)
    return averages, weights


@check("ema", "networks")
def ema_values():
    def work():
        averages, weights = ema_nets()
        places = [a.data_ptr() for a in averages]
        try:
            train_dit.update_ema(averages, weights, 0.75)
        except RuntimeError as error:
            raise Wrong(f"no gradient may flow: use torch.no_grad ({error})") from None
        moved = places != [a.data_ptr() for a in averages]
        return averages, weights, moved, any(a.requires_grad for a in averages)
    averages, weights, moved, has_gradient = student(work)
    for a, w, old, same in zip(averages, weights, *ema_nets()):
        close(a, 0.75 * old.double() + 0.25 * same.detach().double(), "every tensor of the list is averaged")
        close(w, same, "the weights stay")
    ok(not moved and not has_gradient, "the averages are changed in place, and carry no gradient")


# --- lognorm --------------------------------------------------------------------------------------------
def times(n, lognorm, seed):
    return train_dit.sample_time(n, lognorm, torch.Generator().manual_seed(seed), torch.device("cpu"))


@check("lognorm", "shape and range", public=True)
def lognorm_shape():
    for t in student(lambda: [times(50, True, 0), times(50, False, 0)]):
        close(t, t, "times")
        ok(tuple(t.shape) == (50,), f"n times: got the shape {tuple(t.shape)}")
        ok(0 < t.min() and t.max() < 1, "times are between 0 and 1")


@check("lognorm", "logit-normal")
def lognorm_normal():
    t = student(lambda: times(40000, True, 0))
    share = torch.stack([(t < v).double().mean() for v in (0.125, 0.3375, 0.5, 0.6625, 0.875)])
    near(
        share,
        [0.0258, 0.25, 0.5, 0.75, 0.9742],
        0.012,
        "the share of times below 0.125, 0.34, 0.5, 0.66, 0.88",
    )
    ok(len(t.unique()) > 35000 and t.min() > 0 and t.max() < 1, "times are not rounded, and never 0 or 1")
    ok(str(t.dtype) == "torch.float32", "float32")


@check("lognorm", "uniform")
def lognorm_uniform():
    t = student(lambda: times(40000, False, 0))
    share = torch.stack([(t < v).double().mean() for v in (0.1, 0.25, 0.5, 0.75, 0.9)])
    near(share, [0.1, 0.25, 0.5, 0.75, 0.9], 0.012, "the share of times below 0.1, 0.25, 0.5, 0.75, 0.9")
    ok(len(t.unique()) > 35000 and t.max() < 1, "times are not rounded, and below 1")
    ok(str(t.dtype) == "torch.float32", "float32")


@check("lognorm", "the generator decides")
def lognorm_generator():
    def work():
        draws = []
        for lognorm in (True, False):
            for seed, noise in ((0, 1), (0, 2), (1, 1)):
                torch.manual_seed(noise)
                draws.append(times(9, lognorm, seed))
        return draws
    draws = student(work)
    for a, b, c in (draws[:3], draws[3:]):
        ok(torch.equal(a, b), "the same generator must give the same times, whatever torch's own seed")
        ok(not torch.equal(a, c), "another generator must give other times")


# --- flow -----------------------------------------------------------------------------------------------
@check("flow", "worked example", public=True)
def flow_example():
    x1, x0 = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1), torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)

    def work():
        seen = []

        def model(x, t, y, drop=None):
            seen.append(x.flatten())
            return torch.full_like(x, 2.0)
        loss, terms = train_dit.flow_matching_loss(model, x1, torch.tensor([0]), torch.tensor([0.25]), x0)
        return seen[0], loss, terms
    seen, loss, terms = student(work)
    close(seen, [1.5, 1.5], "the model sees the point at t = 0.25 between noise (1, 2) and data (3, 0)")
    close(terms["mse"], [8.0], "the answer (2, 2) against the velocity (2, -2)")
    close(terms["direction"], [1.0], "they are orthogonal")
    close(loss, 9.0, "the sum of both terms")


def flow_batch():
    return (
        randn(3, 4, 2, 5),
        torch.tensor([2, 0, 1]),
        torch.tensor([0.1, 0.5, 0.8]),
        randn(3, 4, 2, 5, seed=1),
        torch.tensor([True, False, True]),
    )


def some_model(w, seen=None):
    def model(x, t, y, drop=None):
        if seen is not None:
            seen.append((x.detach(), t, y, drop))
        return w * x.roll(1, 1) + 0.1 * y.view(-1, 1, 1, 1) + 0.01 * t.view(-1, 1, 1, 1)
    return model


def flow_of(w, x1, y, t, x0, drop):
    loss, terms = train_dit.flow_matching_loss(some_model(w), x1, y, t, x0, drop)
    return {"loss": loss, "mse": terms["mse"], "direction": terms["direction"]}


def slow_flow(w, x1, y, t, x0, drop):
    mse, direction = [], []
    for b in range(len(x1)):
        noised = t[b] * x1[b:b + 1] + (1 - t[b]) * x0[b:b + 1]
        pred, v = some_model(w)(noised, t[b:b + 1], y[b:b + 1])[0], x1[b] - x0[b]
        mse.append((pred - v).square().sum() / v.numel())
        lengths = [u.square().sum(0).clamp(min=0.01).sqrt() for u in (pred, v)]
        cosine = (pred * v).sum(0) / (lengths[0] * lengths[1])
        direction.append((1 - cosine).sum() / cosine.numel())
    mse, direction = torch.stack(mse), torch.stack(direction)
    return {"loss": (mse + direction).sum() / len(x1), "mse": mse, "direction": direction}


@check("flow", "any batch")
def flow_values():
    values(
        flow_of,
        slow_flow,
        (torch.tensor(0.7), *flow_batch()),
        "velocity and direction, one number per latent",
    )


@check("flow", "gradient")
def flow_gradient():
    gradient(flow_of, slow_flow, (torch.tensor(0.7), *flow_batch()), "the model's weight, x1, t, x0", 1e-3)


@check("flow", "a prediction of 0")
def flow_zero():
    x1, y, t, x0, drop = flow_batch()

    def work():
        pred = torch.zeros(3, 4, 2, 5, requires_grad=True)
        _, terms = train_dit.flow_matching_loss(lambda *args: 1.0 * pred, x1, y, t, x0, drop)
        return terms["direction"], torch.autograd.grad(terms["direction"].sum(), pred)[0]
    direction, grad = student(work)
    close(direction, torch.ones(3), "a fresh network answers 0: its cosine with anything is 0")
    v = x1 - x0
    close(grad, -v / v.norm(dim=1, keepdim=True) / 0.1 / 10, "its gradient: lengths count as 0.1 at least")


@check("flow", "what the model gets")
def flow_model():
    def work():
        seen = []
        train_dit.flow_matching_loss(some_model(0.7, seen), *flow_batch())
        return seen
    x1, y, t, x0, drop = flow_batch()
    seen = student(work)
    ok(len(seen) == 1, "the model is called once")
    close(seen[0][0], t.view(-1, 1, 1, 1) * x1 + (1 - t.view(-1, 1, 1, 1)) * x0, "the noised latents")
    close(seen[0][1], t, "t as it is, (B,)")
    close(seen[0][2], y, "y as it is", kind="int64")
    ok(seen[0][3] is not None and torch.equal(seen[0][3], drop), "drop")


@check("flow", "without the direction loss")
def flow_without():
    args = flow_batch()
    loss, terms = student(lambda: train_dit.flow_matching_loss(some_model(0.7), *args, direction=False))
    right = slow_flow(0.7, *args)
    close(loss, right["mse"].mean(), "direction=False: the loss is that of the velocity alone")
    close(terms["direction"], right["direction"], "the direction term is returned either way")


# --- alphas, ddpm ---------------------------------------------------------------------------------------
@check("alphas", "worked example", public=True)
def alphas_example():
    a = student(lambda: train_dit.ddpm_alphas(torch.device("cpu")))
    ok(tuple(a.shape) == (1000,), f"one number per step: got the shape {tuple(a.shape)}")
    close(a[:2], [0.9999, 0.99978009], "the first two", 1e-7, "float64")
    close(1e4 * a[999], 0.40358, "the last, times 10,000", 1e-3, "float64")


@check("alphas", "all of them")
def alphas_values():
    a, want, product = student(lambda: train_dit.ddpm_alphas(torch.device("cpu"))), [], 1.0
    for k in range(1000):
        product *= 1 - (1e-4 + k * (0.02 - 1e-4) / 999)
        want.append(product)
    close((a.double() / torch.tensor(want, dtype=torch.float64)).to(a.dtype), torch.ones(1000),
          "the products, as a share of the right ones", 1e-9, "float64")


@check("ddpm", "worked example", public=True)
def ddpm_example():
    x1, x0 = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1, 1), torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)

    def work():
        seen = []

        def model(x, t, y, drop=None):
            seen.append((x.flatten(), t))
            return torch.zeros_like(x)

        loss, terms = train_dit.ddpm_loss(
            model, x1, torch.tensor([0, 0, 0]), torch.tensor([0.5, 0.5, 0.0]), x0
        )
        return seen[0], loss, terms
    (x, k), loss, terms = student(work)
    close(k, [500.0, 500.0, 999.0], "t = 0.5 is step 500, t = 0 is step 999")
    close(x, [0.278951, 0.960305, 1.99996], "data and noise of step k", 1e-3)
    close(loss, 5 / 3, "the noise is what is predicted")
    close(terms["direction"], [0.0, 0.0, 0.0], "there is no direction term")


def ddpm_batch():
    return (
        randn(4, 3, 2, 2),
        torch.arange(4),
        torch.tensor([0.0, 0.1234, 0.7777, 1.0]),
        randn(4, 3, 2, 2, seed=1),
        torch.tensor([True, False, True, False]),
    )


def ddpm_of(w, x1, y, t, x0, drop):
    loss, terms = train_dit.ddpm_loss(some_model(w), x1, y, t, x0, drop)
    return {"loss": loss, "mse": terms["mse"], "direction": terms["direction"]}


def slow_ddpm(w, x1, y, t, x0, drop):
    mse, beta = [], torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()
    for b, k in enumerate((999, 876, 222, 0)):
        a = math.prod(1 - v for v in beta[:k + 1])
        noised = math.sqrt(a) * x1[b:b + 1] + math.sqrt(1 - a) * x0[b:b + 1]
        pred = some_model(w)(noised, torch.tensor([float(k)], dtype=torch.float64), y[b:b + 1])[0]
        mse.append((pred - x0[b]).square().sum() / x0[b].numel())
    mse = torch.stack(mse)
    return {"loss": mse.sum() / len(x1), "mse": mse, "direction": torch.zeros(len(x1))}


@check("ddpm", "any batch")
def ddpm_values():
    values(
        ddpm_of,
        slow_ddpm,
        (torch.tensor(0.7), *ddpm_batch()),
        "noise prediction, one number per latent",
        1e-3,
    )


@check("ddpm", "gradient")
def ddpm_gradient():
    _, y, t, _, drop = ddpm_batch()
    gradient(
        lambda w, x1, x0: ddpm_of(w, x1, y, t, x0, drop),
        lambda w, x1, x0: slow_ddpm(w, x1, y, t, x0, drop),
        (torch.tensor(0.7), randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1)),
        "the model's weight, x1, x0",
        1e-3,
    )


@check("ddpm", "what the model gets")
def ddpm_model():
    def work():
        seen = []
        train_dit.ddpm_loss(some_model(0.7, seen), *ddpm_batch())
        return seen
    _, y, _, _, drop = ddpm_batch()
    seen = student(work)
    close(seen[0][1], [999.0, 876.0, 222.0, 0.0], "the step k of t = 0, 0.1234, 0.7777, 1, as float32")
    close(seen[0][0], seen[0][0], "the noised latents are float32")
    close(seen[0][2], y, "y as it is", kind="int64")
    ok(seen[0][3] is not None and torch.equal(seen[0][3], drop), "drop")


# --- adapter ---------------------------------------------------------------------------------------------
def ddpm_times():
    """For the grader's side: alpha_bar and the time of each step."""
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return a, a.sqrt() / (a.sqrt() + (1 - a).sqrt())


def velocity_of(eps, x, t, y):
    """The student's velocity for a noise predictor that always answers eps, and what the predictor saw."""
    seen = []

    def model(x, t, y):
        seen.append((x, t, y))
        return eps
    return train_dit.ddpm_velocity(model)(x, t, y), seen


@check("adapter", "worked example", public=True)
def adapter_example():
    half = torch.full((1, 1, 1, 1), 0.5)
    v, seen = student(lambda: velocity_of(half, 2 * half, torch.tensor([0.225083]), torch.tensor([0])))
    close(seen[0][1], [500.0], "t = 0.2251 is DDPM's step 500", 1e-4)
    close(seen[0][0].flatten(), [1.239254], "x on DDPM's scale", 1e-3)
    close(v.flatten(), [2.221402], "the velocity of rectified flow", 1e-3)


STEPS = (20, 300, 500, 700, 900)


def flow_points(between):
    """x_t at the times of STEPS, `between` them and the next, as a student's code gets them."""
    _, grid = ddpm_times()
    steps = torch.tensor(STEPS)
    t = torch.lerp(grid[steps], grid[steps + 1], between).float()
    x1, x0 = randn(5, 2, 3, 3), randn(5, 2, 3, 3, seed=1)
    return t, x1, x0, torch.stack([c * p + (1 - c) * n for c, p, n in zip(t, x1, x0)])


@check("adapter", "a perfect predictor")
def adapter_values():
    got = student(lambda: [velocity_of(x0, x_t, t, torch.arange(5)) for t, _, x0, x_t in
                           (flow_points(0.0), flow_points(0.5))])
    for between, (v, seen) in zip((0.0, 0.5), got):
        t, x1, x0, x_t = flow_points(between)
        close(v, x1 - x0, "with the right noise, v is x1 - x0", 5e-3)
        close(seen[0][2], torch.arange(5), "the predictor gets y", kind="int64")
        c = t.double().view(-1, 1, 1, 1)
        close(seen[0][0], x_t / (c ** 2 + (1 - c) ** 2).sqrt(), "the predictor sees x on DDPM's scale", 1e-3)


@check("adapter", "between two steps")
def adapter_between():
    got = student(lambda: [velocity_of(x0, x_t, t, torch.arange(5)) for t, _, x0, x_t in
                           (flow_points(0.0), flow_points(0.5))])
    for between, (_, seen) in zip((0.0, 0.5), got):
        close(
            seen[0][1], torch.tensor(STEPS) + between, "the step is interpolated between its neighbours", 1e-4
        )


@check("adapter", "the ends of the schedule")
def adapter_corner():
    x, eps = randn(2, 2, 2, 2), 0.25 * torch.ones(2, 2, 2, 2)
    v, seen = student(lambda: velocity_of(eps, x, torch.tensor([0.0, 1.0]), torch.tensor([0, 1])))
    _, grid = ddpm_times()
    ends = torch.stack([grid[999], grid[0]]).view(2, 1, 1, 1)
    close(seen[0][1], [999.0, 0.0], "t = 0 is step 999, t = 1 is step 0", 1e-4)
    close(v, (x.double() - 0.25) / ends, "t is clamped to the schedule's ends before all else", 1e-3)
    close(seen[0][0], x / (ends ** 2 + (1 - ends) ** 2).sqrt(), "the scale is that of the clamped t", 1e-3)


# --- draws ----------------------------------------------------------------------------------------------
def draw_settings(**changes):
    return types.SimpleNamespace(**({"seed": 3, "batch_size": 6, "lognorm": True, "uniform_from_epoch": 0.0,
                                     "class_dropout": 0.1} | changes))


def draw_of(step=0, epoch=0.0, noise=0, **changes):
    torch.manual_seed(noise)
    return train_dit.draw(draw_settings(**changes), step, epoch, (2, 3, 3), torch.device("cpu"))


@check("draws", "shapes", public=True)
def draws_shapes():
    t, x0, drop = student(draw_of)
    for name, value, shape, kind in (("t", t, (6,), "float32"), ("x0", x0, (6, 2, 3, 3), "float32"),
                                     ("drop", drop, (6,), "bool")):
        ok(tuple(value.shape) == shape and str(value.dtype) == f"torch.{kind}",
           f"{name} is {kind} {shape}: got {value.dtype} {tuple(value.shape)}")


@check("draws", "a function of seed and step")
def draws_repeat():
    got = student(lambda: [draw_of(5), draw_of(5, noise=1), draw_of(6), draw_of(5, seed=4)])
    for i, name in enumerate(("t", "x0")):
        ok(
            torch.equal(got[0][i], got[1][i]),
            f"{name}: the same seed and step must give the same, whatever was drawn before",
        )
        ok(not torch.equal(got[0][i], got[2][i]), f"{name}: another step must give another")
        ok(not torch.equal(got[0][i], got[3][i]), f"{name}: another seed must give another")
    ok(torch.equal(got[0][2], got[1][2]), "drop: the same seed and step must give the same")


@check("draws", "distributions")
def draws_distributions():
    t, x0, drop = student(lambda: draw_of(batch_size=20000, class_dropout=0.3))
    near((t < 0.3375).double().mean(), 0.25, 0.015, "t is drawn by sample_time")
    near(x0.mean(0), torch.zeros(2, 3, 3), 0.05, "x0 is standard normal")
    near(x0.std(0), torch.ones(2, 3, 3), 0.05, "x0 is standard normal")
    near(drop.double().mean(), 0.3, 0.015, "a share class_dropout of the labels is dropped")
    logit = (t / (1 - t)).log().double()
    table = torch.corrcoef(
        torch.stack([logit, x0[:, 0, 0, 0].double(), x0[:, 1, 2, 2].double(), drop.double()])
    )
    near(table, torch.eye(4), 0.04, "t, x0 and drop are independent of each other")


@check("draws", "uniform time at the end")
def draws_uniform():
    cases = ((479.9, 480.0, True), (480.0, 480.0, False), (700.0, 480.0, False), (700.0, 0.0, True))
    got = student(lambda: [draw_of(epoch=e, batch_size=20000, uniform_from_epoch=u)[0] for e, u, _ in cases]
                  + [draw_of(batch_size=20000, lognorm=False)[0]])
    for t, (epoch, start, normal) in zip(got, cases):
        near((t < 0.3375).double().mean(), 0.25 if normal else 0.3375, 0.015,
             f"epoch {epoch:g}, uniform from {start:g}: time is {'logit-normal' if normal else 'uniform'}")
    near((got[4] < 0.3375).double().mean(), 0.3375, 0.015, "without lognorm time is uniform")


