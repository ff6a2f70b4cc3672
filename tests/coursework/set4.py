"""Checks of set 4, training. No student's process sees the slow_ functions."""
from checks import check, close, gradient, near, nn, ok, randn, student, torch, train_dit, types, values

# --- tools ----------------------------------------------------------------------------------------------
@check("tools", "average", public=True)
def tools_average():
    def work():
        average, weight, seen = torch.tensor([1.0]), torch.tensor([3.0]), []
        for _ in range(2):
            train_dit.update_ema([average], [weight], 0.9)
            seen.append(average.clone())
        return *seen, weight
    close(student(work), [[1.2], [1.38], [3.0]], "average 1, weight 3, decay 0.9: two steps, and the weight")

@check("tools", "schedule", public=True)
def tools_schedule():
    a = student(lambda: train_dit.ddpm_alphas(torch.device("cpu")))
    close(a[[0, 1, 999]], [0.9999, 0.99978009, 0.00004036], "the first two and the last", 1e-7, "float64")

def times(n, lognorm, seed=0, noise=0):
    torch.manual_seed(noise)
    return train_dit.sample_time(n, lognorm, torch.Generator().manual_seed(seed), torch.device("cpu"))

@check("tools", "times", public=True)
def tools_times():
    for t in student(lambda: [times(50, True), times(50, False)]):
        close(t, t, "times")
        ok(tuple(t.shape) == (50,), f"n times: got the shape {tuple(t.shape)}")
        ok(0 < t.min() and t.max() < 1, "times are between 0 and 1")

def two_networks():
    averages, weights = ([randn(4, 3, seed=s), randn(5, seed=s)] for s in (0, 1))
    return averages, [nn.Parameter(w) for w in weights]

@check("tools", "networks")
def tools_networks():
    def work():
        averages, weights = two_networks()
        places = [a.data_ptr() for a in averages]
        kept = train_dit.update_ema(averages, weights, 0.75) is None
        kept &= places == [a.data_ptr() for a in averages] and not any(a.requires_grad for a in averages)
        return averages, weights, kept
    averages, weights, kept = student(work)
    old, same = two_networks()
    close(averages, [0.75 * a + 0.25 * w for a, w in zip(old, same)], "every tensor of the list is averaged")
    close(weights, same, "the weights stay")
    ok(kept, "the averages are changed in place, carry no gradient, and are not returned")

@check("tools", "all steps")
def tools_steps():
    a = student(lambda: train_dit.ddpm_alphas(torch.device("cpu")))
    want = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    close(a / want.to(a.dtype), torch.ones(1000), "the products, over the right ones", 1e-9, "float64")

def shares(t, places, want):
    near(torch.stack([(t < v).double().mean() for v in places]), want, 0.012,
         f"the share of times below each of {places}")
    ok(len(t.unique()) > 35000 and t.max() < 1, "times are not rounded, and below 1")
    close(t, t, "times")

@check("tools", "logit-normal")
def tools_lognormal():
    t = student(lambda: times(40000, True))
    shares(t, (0.125, 0.3375, 0.5, 0.6625, 0.875), [0.0258, 0.25, 0.5, 0.75, 0.9742])
    ok(t.min() < 0.03 and t.max() > 0.97, "logit-normal times come close to 0 and 1")

@check("tools", "uniform")
def tools_uniform():
    t = student(lambda: times(40000, False))
    shares(t, (0.1, 0.25, 0.5, 0.75, 0.9), [0.1, 0.25, 0.5, 0.75, 0.9])
    ok(t.min() < 1e-3 and t.max() > 1 - 1e-3, "uniform times come close to 0 and 1")

@check("tools", "the generator decides")
def tools_generator():
    def work(lognorm):
        generator = torch.Generator().manual_seed(0)
        twice = [train_dit.sample_time(9, lognorm, generator, torch.device("cpu")) for _ in range(2)]
        return times(9, lognorm), times(9, lognorm, 0, 1), times(9, lognorm, 1), *twice
    for a, b, c, one, two in student(lambda: [work(True), work(False)]):
        ok(not torch.equal(one, two), "a generator's second times must be other ones than its first")
        ok(torch.equal(a, b), "the same generator must give the same times, whatever torch's own seed")
        ok(not torch.equal(a, c), "another generator must give other times")

# --- flow -----------------------------------------------------------------------------------------------
def answering(answer, seen):
    """A model that gives this answer whatever it gets, and notes what it got."""
    def model(*given, **named):
        seen.append((*given, *named.values()))
        return answer
    return model

@check("flow", "worked example", public=True)
def flow_example():
    x1, x0 = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1), torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)

    def work():
        seen = []
        model = answering(torch.full((1, 2, 1, 1), 2.0), seen)
        loss, terms = train_dit.flow_matching_loss(model, x1, torch.tensor([0]), torch.tensor([0.25]), x0)
        return seen[0][0].flatten(), loss, terms
    seen, loss, terms = student(work)
    close(seen, [1.5, 1.5], "what the model sees at t = 0.25, between noise (1, 2) and data (3, 0)")
    close(terms, {"mse": [8.0], "direction": [1.0]}, "the terms, if the model answers (2, 2)")
    close(loss, 9.0, "the sum of both terms")

def flow_batch():
    return (randn(3, 4, 2, 5), torch.tensor([2, 0, 1]), torch.tensor([0.1, 0.5, 0.8]),
            randn(3, 4, 2, 5, seed=1), torch.tensor([True, False, True]))

def some_model(w, seen=None):
    def model(x, t, y, drop=None):
        if seen is not None:
            seen.append((x.detach(), t, y, drop))
        return w * x.roll(1, 1) + 0.1 * y.view(-1, 1, 1, 1) + 0.01 * t.view(-1, 1, 1, 1)
    return model

def flow_of(w, *batch):
    loss, terms = train_dit.flow_matching_loss(some_model(w), *batch)
    return {"loss": loss, **terms}

def slow_flow(w, x1, y, t, x0, drop):
    t_, v = t.view(-1, 1, 1, 1), x1 - x0
    pred = some_model(w)(t_ * x1 + (1 - t_) * x0, t, y)
    mse = (pred - v).square().mean((1, 2, 3))
    lengths = [u.square().sum(1).clamp(min=0.01).sqrt() for u in (pred, v)]
    direction = (1 - (pred * v).sum(1) / (lengths[0] * lengths[1])).mean((1, 2))
    return {"loss": (mse + direction).mean(), "mse": mse, "direction": direction}

@check("flow", "any batch")
def flow_values():
    x1, y, t, x0, drop = flow_batch()
    x1[0, :, 0, 0] = x0[0, :, 0, 0] + 0.02    # here the velocity is shorter than 0.1
    values(flow_of, slow_flow, (torch.tensor(0.7), x1, y, t, x0, drop),
           "velocity and direction, one number per latent, each length at least 0.1")

@check("flow", "gradient")
def flow_gradient():
    gradient(flow_of, slow_flow, (torch.tensor(0.7), *flow_batch()), "the model's weight, x1, t, x0", 1e-3)

@check("flow", "a prediction of 0")
def flow_zero():
    x1, y, t, x0, drop = flow_batch()

    def work():
        pred = torch.zeros(3, 4, 2, 5, requires_grad=True)
        _, terms = train_dit.flow_matching_loss(answering(1.0 * pred, []), x1, y, t, x0, drop)
        return terms["direction"], torch.autograd.grad(terms["direction"].sum(), pred)[0]
    direction, grad = student(work)
    close(direction, torch.ones(3), "the direction loss of a fresh network, which answers 0")
    v = x1 - x0
    close(grad, -v / v.norm(dim=1, keepdim=True) / 0.1 / 10, "its gradient: lengths count as 0.1 at least")

def seen_by(loss, batch):
    """What a model gets from a loss function."""
    seen = []
    loss(some_model(0.7, seen), *batch)
    return seen

@check("flow", "what the model gets")
def flow_model():
    seen = student(lambda: seen_by(train_dit.flow_matching_loss, flow_batch()))
    x1, y, t, x0, drop = flow_batch()
    ok(len(seen) == 1, "the model is called once")
    t_ = t.view(-1, 1, 1, 1)
    close(seen[0][:2], [t_ * x1 + (1 - t_) * x0, t], "the noised latents, and t as it is, (B,)")
    close(seen[0][2], y, "y as it is", kind="int64")
    close(seen[0][3], drop, "drop as it is", kind="bool")

@check("flow", "without the direction loss")
def flow_without():
    args = flow_batch()
    loss, terms = student(lambda: train_dit.flow_matching_loss(some_model(0.7), *args, direction=False))
    right = slow_flow(0.7, *args)
    close(loss, right["mse"].mean(), "direction=False: the loss is that of the velocity alone")
    close(terms["direction"], right["direction"], "the direction term is returned either way")

# --- ddpm -----------------------------------------------------------------------------------------------
@check("ddpm", "worked example", public=True)
def ddpm_example():
    x1, x0 = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1, 1), torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)

    def work():
        seen, t = [], torch.tensor([0.5, 0.5, 0.0])
        model = answering(torch.zeros(3, 1, 1, 1), seen)
        return *train_dit.ddpm_loss(model, x1, torch.tensor([0, 0, 0]), t, x0), *seen[0][:2]
    loss, terms, x, k = student(work)
    close(k, [500.0, 500.0, 999.0], "t = 0.5 is step 500, t = 0 is step 999")
    close(x.flatten(), [0.278951, 0.960305, 1.99996], "data and noise of step k", 1e-3)
    close(loss, 5 / 3, "the noise is what is predicted")
    close(terms["direction"], [0.0, 0.0, 0.0], "there is no direction term")

def ddpm_batch():
    return (randn(4, 3, 2, 2), torch.arange(4), torch.tensor([0.0, 0.1234, 0.7774, 1.0]),
            randn(4, 3, 2, 2, seed=1), torch.tensor([True, False, True, False]))

def ddpm_of(w, *batch):
    loss, terms = train_dit.ddpm_loss(some_model(w), *batch)
    return {"loss": loss, **terms}

def slow_ddpm(w, x1, y, t, x0, drop):
    k = torch.tensor([999.0, 876.0, 222.0, 0.0], dtype=torch.float64)
    a = train_dit.ddpm_alphas(torch.device("cpu"))[k.long()].view(-1, 1, 1, 1)
    pred = some_model(w)(a.sqrt() * x1 + (1 - a).sqrt() * x0, k, y)
    mse = (pred - x0).square().mean((1, 2, 3))
    return {"loss": mse.mean(), "mse": mse, "direction": 0 * mse.detach()}

@check("ddpm", "any batch")
def ddpm_values():
    values(ddpm_of, slow_ddpm, (torch.tensor(0.7), *ddpm_batch()), "noise prediction, one number per latent")

@check("ddpm", "gradient")
def ddpm_gradient():
    gradient(ddpm_of, slow_ddpm, (torch.tensor(0.7), *ddpm_batch()), "the model's weight, x1, t, x0", 1e-3)

@check("ddpm", "what the model gets")
def ddpm_model():
    seen = student(lambda: seen_by(train_dit.ddpm_loss, ddpm_batch()))
    _, y, _, _, drop = ddpm_batch()
    ok(len(seen) == 1, "the model is called once")
    close(seen[0][1], [999.0, 876.0, 222.0, 0.0], "the step k of t = 0, 0.1234, 0.7774, 1, as float32")
    close(seen[0][0], seen[0][0], "the noised latents are float32")
    close(seen[0][2], y, "y as it is", kind="int64")
    close(seen[0][3], drop, "drop as it is", kind="bool")

# --- adapter --------------------------------------------------------------------------------------------
def ddpm_times():
    """The time of each of DDPM's steps."""
    a = train_dit.ddpm_alphas(torch.device("cpu"))
    return a.sqrt() / (a.sqrt() + (1 - a).sqrt())

def velocity_of(eps, x, t, y):
    """The student's velocity for a noise predictor that always answers eps, and what the predictor saw."""
    seen, given = [], x.clone()
    v = train_dit.ddpm_velocity(answering(eps, seen))(given, t, y)
    ok(torch.equal(given, x), "x itself must not be changed")
    return v, *seen[0]

@check("adapter", "worked example", public=True)
def adapter_example():
    half = torch.full((1, 1, 1, 1), 0.5)
    v, x, k, _ = student(lambda: velocity_of(half, 2 * half, torch.tensor([0.225083]), torch.tensor([0])))
    close(k, [500.0], "t = 0.2251 is DDPM's step 500", 1e-4)
    close(x.flatten(), [1.239254], "x on DDPM's scale", 1e-3)
    close(v.flatten(), [2.221402], "the velocity of rectified flow", 1e-3)

STEPS = [20, 300, 500, 700, 900]

def flow_points(between):
    """Times t of STEPS, or `between` these and the next; data and noise; the points x_t between them."""
    t = torch.lerp(ddpm_times()[STEPS], ddpm_times()[1:][STEPS], between).float()
    x1, x0 = randn(5, 2, 3, 3), randn(5, 2, 3, 3, seed=1)
    return t, x1, x0, torch.stack([c * p + (1 - c) * n for c, p, n in zip(t, x1, x0)])

def perfect():
    """What velocity_of gives with the right noise, at the times of STEPS and half way to the next."""
    points = flow_points(0.0), flow_points(0.5)
    return [velocity_of(x0, x_t, t, torch.arange(5)) for t, _, x0, x_t in points]

@check("adapter", "a perfect predictor")
def adapter_values():
    for between, (v, x, _, y) in zip((0.0, 0.5), student(perfect)):
        t, x1, x0, x_t = flow_points(between)
        close(v, x1 - x0, "with the right noise, v is x1 - x0", 5e-3)
        close(y, torch.arange(5), "the predictor gets y", kind="int64")
        c = t.double().view(-1, 1, 1, 1)
        close(x, x_t / (c ** 2 + (1 - c) ** 2).sqrt(), "the predictor sees x on DDPM's scale", 1e-3)

@check("adapter", "between two steps")
def adapter_between():
    for between, (_, _, k, _) in zip((0.0, 0.5), student(perfect)):
        close(k, torch.tensor(STEPS) + between, "interpolated between its neighbours, linearly in t", 1e-6)

@check("adapter", "the ends of the schedule")
def adapter_corner():
    x, eps = randn(2, 2, 2, 2), 0.25 * torch.ones(2, 2, 2, 2)
    v, seen, k, _ = student(lambda: velocity_of(eps, x, torch.tensor([0.0, 1.0]), torch.tensor([0, 1])))
    ends = ddpm_times()[[999, 0]].view(2, 1, 1, 1)
    close(k, [999.0, 0.0], "t = 0 is step 999, t = 1 is step 0", 1e-4)
    close(v, (x.double() - 0.25) / ends, "t is clamped to the schedule's ends before all else", 1e-3)
    close(seen, x / (ends ** 2 + (1 - ends) ** 2).sqrt(), "the scale is that of the clamped t", 1e-3)

# --- draws ----------------------------------------------------------------------------------------------
def draw_of(step=0, epoch=0.0, noise=0, **changes):
    torch.manual_seed(noise)
    settings = {"seed": 3, "batch_size": 6, "lognorm": True, "uniform_from_epoch": 0.0, "class_dropout": 0.1}
    s = types.SimpleNamespace(**(settings | changes))
    return train_dit.draw(s, step, epoch, (2, 3, 3), torch.device("cpu"))

@check("draws", "shapes", public=True)
def draws_shapes():
    answer = student(draw_of)
    shapes, kinds = ((6,), (6, 2, 3, 3), (6,)), ("float32", "float32", "bool")
    for value, name, shape, kind in zip(answer, ("t", "x0", "drop"), shapes, kinds, strict=True):
        ok(tuple(value.shape) == shape and str(value.dtype) == f"torch.{kind}",
           f"{name} is {kind} {shape}: got {value.dtype} {tuple(value.shape)}")

@check("draws", "a function of seed and step")
def draws_repeat():
    first, again, step, seed = student(
        lambda: [draw_of(5), draw_of(5, 1.0, noise=1), draw_of(4), draw_of(5, seed=5)])
    for i, name in enumerate(("t", "x0", "drop")):
        ok(torch.equal(first[i], again[i]),
           f"{name}: the same seed and step must give the same, whatever the epoch and what was drawn before")
        ok(name == "drop" or not (torch.equal(first[i], step[i]) or torch.equal(first[i], seed[i])),
           f"{name}: another step or another seed must give another")

@check("draws", "distributions")
def draws_distributions():
    t, x0, drop = student(lambda: draw_of(batch_size=20000, class_dropout=0.3))
    near((t < 0.3375).double().mean(), 0.25, 0.015, "t is drawn by sample_time")
    near(x0.mean(0), torch.zeros(2, 3, 3), 0.05, "x0 is standard normal")
    near(x0.std(0), torch.ones(2, 3, 3), 0.05, "x0 is standard normal")
    near(drop.double().mean(), 0.3, 0.015, "a share class_dropout of the labels is dropped")
    logit = (t / (1 - t)).log().double()
    table = torch.stack([logit, drop.double(), x0.flatten()[:20000].double(), *x0.flatten(1).double().T])
    near(torch.corrcoef(table), torch.eye(21), 0.04, "t, drop and all values of x0 are independent")

@check("draws", "uniform time at the end")
def draws_uniform():
    cases = ((479.9, 480.0, True), (480.0, 480.0, True), (700.0, 480.0, True), (700.0, 0.0, True),
             (0.0, 0.0, False), (700.0, 480.0, False))
    got = student(lambda: [draw_of(0, epoch, batch_size=20000, uniform_from_epoch=start, lognorm=lognorm)[0]
                           for epoch, start, lognorm in cases])
    for t, (epoch, start, lognorm), normal in zip(got, cases, (True, False, False, True, False, False)):
        near((t < 0.3375).double().mean(), 0.25 if normal else 0.3375, 0.015,
             f"lognorm {lognorm}, epoch {epoch:g}, uniform from {start:g}: "
             f"time is {'logit-normal' if normal else 'uniform'}")
