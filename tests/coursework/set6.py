"""Checks of set 6, sampling. No student's process sees the slow_ functions."""
from checks import check, close, near, ok, randn, sample, student, torch, types


# --- euler, shift, heun ---------------------------------------------------------------------------------
@check("euler", "worked example", public=True)
def euler_example():
    ts = torch.tensor([0.0, 0.5, 1.0])
    one, two = student(lambda: (sample.euler(lambda x, t: x, torch.ones(1), ts),
                                sample.euler(lambda x, t: t * torch.ones(1), torch.zeros(1), ts)))
    close(one, [2.25], "velocity = x, from 1 at the times 0, 0.5, 1")
    close(two, [0.25], "velocity = t: each step looks at its left end")


def slow_integral(step, x, ts):
    x, ts = x.double(), ts.tolist()
    for i in range(len(ts) - 1):
        x = step(x, ts[i], ts[i + 1] - ts[i])
    return x


def curved(x, t):
    return x * x - 3 * float(t) + 0.5


def integrated(method):
    """The student's integrator on an uneven grid: x at the end, when it was evaluated, x as given, grid."""
    ts, times, x = torch.tensor([0.1, 0.15, 0.2, 0.6, 0.9], dtype=torch.float64), [], 0.5 * randn(2, 3, 2, 2)

    def velocity(x, t):
        times.append(float(t))
        return curved(x, t)
    return method(velocity, x, ts), times, x, ts


def compare_integral(got, step, times):
    x, seen, given, ts = got
    ok(
        str(x.dtype) == "torch.float64" or str(x.dtype) == "torch.float32",
        f"x is a float tensor: got {x.dtype}",
    )
    close(x, slow_integral(step, 0.5 * randn(2, 3, 2, 2), ts), "x after all steps", 1e-4, str(x.dtype)[6:])
    near(sorted(seen), sorted(times), 1e-6, "when the velocity is evaluated")
    ok(torch.equal(given, 0.5 * randn(2, 3, 2, 2)), "x itself must not be changed")


@check("euler", "any velocity")
def euler_values():
    got = student(lambda: integrated(sample.euler))
    compare_integral(got, lambda x, t, h: x + h * curved(x, t), [0.1, 0.15, 0.2, 0.6])


@check("shift", "worked example", public=True)
def shift_example():
    t = torch.tensor([0.0, 0.5, 1.0])
    got = student(
        lambda: (
            sample.shift_timesteps(t, 0.3),
            sample.shift_timesteps(t, 1.0),
            sample.shift_timesteps(0.5, 0.3),
            sample.time_grid(grid_settings(3, 0.3)),
        )
    )
    close(got[0], [0.0, 0.230769, 1.0], "shift 0.3")
    close(got[1], [0.0, 0.5, 1.0], "shift 1 changes nothing")
    close(got[2], 0.230769, "a number, too", kind="number")
    close(got[3], [0.0, 0.230769, 1.0], "a grid of three points", kind="float64")


def grid_settings(points, shift):
    return types.SimpleNamespace(sampling_steps=points, timestep_shift=shift)


@check("shift", "any time and shift")
def shift_values():
    t = torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4)
    shifts = (0.3, 0.5, 3.3)

    def work():
        given = t.clone()
        return [sample.shift_timesteps(given, s) for s in shifts], given
    got, after = student(work)
    for s, value in zip(shifts, got):
        want = [[s * v / (1 + (s - 1) * v) for v in row] for row in t.tolist()]
        close(value, torch.tensor(want, dtype=torch.float64), f"shift {s}", 1e-9, "float64")
    close(after, t, "t itself must not be changed", 0, "float64")


@check("shift", "the grid")
def shift_grid():
    cases = ((2, 1.0), (5, 1.0), (250, 0.3))
    for (points, s), got in zip(cases, student(lambda: [sample.time_grid(grid_settings(*c)) for c in cases])):
        plain = torch.arange(points, dtype=torch.float64) / (points - 1)
        close(
            got, s * plain / (1 + (s - 1) * plain), f"{points} points from 0 to 1, shift {s}", 1e-9, "float64"
        )


@check("heun", "worked example", public=True)
def heun_example():
    ts = torch.tensor([0.0, 1.0])
    one, two = student(lambda: (sample.heun(lambda x, t: x, torch.ones(1), ts),
                                sample.heun(lambda x, t: t ** 2 * torch.ones(1), torch.zeros(1), ts)))
    close(one, [2.5], "velocity = x, one step from 1")
    close(two, [0.5], "velocity = t^2: both ends count")


def slow_heun(x, t, h):
    first = curved(x, t)
    return x + h / 2 * (first + curved(x + h * first, t + h))


@check("heun", "any velocity")
def heun_values():
    got = student(lambda: integrated(sample.heun))
    compare_integral(got, slow_heun, [0.1, 0.15, 0.15, 0.2, 0.2, 0.6, 0.6, 0.9])


# --- guidance -------------------------------------------------------------------------------------------
class ClassModel:
    """Velocity = class + 1 everywhere, the null class (9) gives 1; it notes its arguments."""
    num_classes = 9

    def __init__(self):
        self.seen = []

    def __call__(self, x, t, y):
        self.seen.append((x, t, y))
        v = torch.where(y == 9, 0, y).to(x.dtype) + 1
        return v.view(-1, 1, 1, 1).expand(x.shape).clone()


@check("guidance", "worked example", public=True)
def guidance_example():
    x, y = torch.zeros(1, 2, 1, 1), torch.tensor([1])
    got = student(lambda: [sample.guided_velocity(ClassModel(), x, 0.4, y, 3.0, **more) for more in
                           ({}, {"channels": 1}, {"interval_start": 0.5})])
    close(got[0], torch.tensor([4.0, 4.0]).view(1, 2, 1, 1), "v_class = 2, v_null = 1, scale 3")
    close(
        got[1],
        torch.tensor([4.0, 2.0]).view(1, 2, 1, 1),
        "the first channel is guided, the second is v_class",
    )
    close(got[2], torch.tensor([2.0, 2.0]).view(1, 2, 1, 1), "before interval_start: v_class")


GUIDED = ((None, 0.3, None), (0, 0.3, 3), (7, "0-d", 1), (None, 0.3, 4), (None, 0.3, 0), (7, "float64", 2))


class MixModel:
    num_classes = 9

    def __init__(self):
        self.seen = []

    def __call__(self, x, t, y):
        self.seen.append((str(t.dtype), t.double().tolist(), y.tolist()))
        w = randn(4, 4, seed=1).to(x)
        return torch.einsum("oc,bchw->bohw", w, x) * (1 + y + t.to(x)).view(-1, 1, 1, 1)


def slow_guided(x, y, null, channels):
    want, w = torch.empty_like(x), randn(4, 4, seed=1).double()
    null = 9 if null is None else null
    for b in range(len(x)):
        for c in range(4):
            u = (w[c] @ x[b].flatten(1)).view(2, 2)
            v, v_null = u * (1 + y[b] + 0.3), u * (1 + null + 0.3)
            want[b, c] = v_null + 2.5 * (v - v_null) if channels is None or c < channels else v
    return want


def guide_all():
    x, y = randn(3, 4, 2, 2), torch.tensor([0, 2, 5])
    out = []
    for null, t, channels in GUIDED:
        t = {"0-d": torch.tensor(0.3), "float64": torch.tensor(0.3, dtype=torch.float64)}.get(t, t)
        model = MixModel()
        v = sample.guided_velocity(model, x, t, y, 2.5, null, 0.1, channels)
        out.append((v, model.seen))
    return out, x, y


@check("guidance", "channels and null class")
def guidance_values():
    got, x, y = student(guide_all)
    for (null, _, channels), (v, _) in zip(GUIDED, got):
        close(v, slow_guided(randn(3, 4, 2, 2).double(), torch.tensor([0, 2, 5]), null, channels),
              f"null class {null}, channels {channels}: guided first, v_class on the rest", 1e-3)
    ok(
        torch.equal(x, randn(3, 4, 2, 2)) and y.tolist() == [0, 2, 5],
        "x and y themselves must not be changed",
    )


@check("guidance", "what the model gets")
def guidance_model():
    for (null, _, channels), (_, seen) in zip(GUIDED, student(guide_all)[0]):
        times, classes = [t for _, ts, _ in seen for t in ts], [c for _, _, ys in seen for c in ys]
        near(times, [0.3] * len(times), 1e-6, "the model gets t for each of its rows")
        ok(all(dtype == "torch.float32" for dtype, _, _ in seen), "times have the dtype of x")
        extra = [] if channels == 0 and len(classes) == 3 else 3 * [9 if null is None else null]
        ok(sorted(classes) == sorted([0, 2, 5] + extra), "the model sees each class and the null class, once")


INTERVAL = (
    (3.0, 0.25, 0.25, True),
    (3.0, 0.2, 0.25, False),
    (3.0, "0-d", 0.25, False),
    (1.0, 0.9, 0.25, False),
    (0.0, 0.9, 0.25, True),
    (3.0, 0.0, 0.0, True),
)


@check("guidance", "the interval")
def guidance_interval():
    def work():
        out = []
        for scale, t, start, _ in INTERVAL:
            model, t = ClassModel(), torch.tensor(0.2) if t == "0-d" else t
            v = sample.guided_velocity(
                model, randn(2, 3, 2, 2), t, torch.tensor([1, 4]), scale, interval_start=start
            )
            out.append((v, sum(len(y) for _, _, y in model.seen)))
        return out
    plain = torch.tensor([2.0, 5.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    for (scale, t, start, guided), (v, rows) in zip(INTERVAL, student(work)):
        close(
            v, 1 + scale * (plain - 1) if guided else plain, f"scale {scale}, t = {t}, interval from {start}"
        )
        ok(
            rows == (4 if guided else 2),
            f"scale {scale}, t = {t}, interval from {start}: the model must see "
            f"{4 if guided else 2} rows, not {rows}",
        )


# --- draw -----------------------------------------------------------------------------------------------
def drawn(indices, labels="random", seed=3, listed=(0, 1, 2, 3, 4)):
    system = types.SimpleNamespace(
        shape=(2, 3, 3),
        device=torch.device("cpu"),
        classes=["a", "b", "c", "d", "e"],
        listed=listed,
        model=None,
    )
    return sample.draw(system, types.SimpleNamespace(seed=seed, labels=labels), indices)


@check("draw", "shapes", public=True)
def draw_shapes():
    noise, y = student(lambda: drawn([4, 0, 7]))
    ok(tuple(noise.shape) == (3, 2, 3, 3) and str(noise.dtype) == "torch.float32",
       f"noise is float32 (3, 2, 3, 3): got {noise.dtype} {tuple(noise.shape)}")
    ok(tuple(y.shape) == (3,) and str(y.dtype) == "torch.int64" and 0 <= y.min() and y.max() < 5,
       "classes are int64 (3,), from 0 to 4")


@check("draw", "a function of seed and index")
def draw_repeat():
    def work():
        torch.manual_seed(1)
        first = drawn([4, 0, 7])
        torch.manual_seed(2)
        return (first, drawn([7, 4]), drawn([4], seed=5), drawn([4, 0, 7], "balanced"),
                drawn([4, 0, 7], "3,1", listed=[3, 1]))
    first, other, seeded, balanced, listed = student(work)
    for i, j in ((0, 2), (1, 0)):
        ok(torch.equal(other[0][i], first[0][j]) and other[1][i] == first[1][j],
           "a sample is the same in any batch, at any place, whatever was drawn before")
    ok(not torch.equal(first[0][0], first[0][1]), "each sample has noise of its own")
    ok(not torch.equal(seeded[0][0], first[0][0]), "another seed gives another sample")
    for name, (noise, _) in (("balanced", balanced), ("listed", listed)):
        ok(torch.equal(noise, first[0]), f"the noise is the same whether classes are random or {name}")


@check("draw", "classes")
def draw_classes():
    balanced, listed, random = student(
        lambda: [
            drawn(range(7), "balanced")[1],
            drawn([4, 0, 7], "3,1", listed=[3, 1])[1],
            drawn(range(4000))[1],
        ]
    )
    ok(balanced.tolist() == [0, 1, 2, 3, 4, 0, 1], "balanced: sample i has class i mod 5")
    ok(listed.tolist() == [3, 3, 1], "a list: sample i has its entry i mod the length")
    near(torch.bincount(random, minlength=5).double() / 4000, [0.2] * 5, 0.025, "random: all classes alike")


@check("draw", "noise")
def draw_noise():
    noise, y = student(lambda: drawn(range(3000)))
    near(noise.mean(0), torch.zeros(2, 3, 3), 0.1, "standard normal")
    near(noise.std(0), torch.ones(2, 3, 3), 0.1, "standard normal")
    near(torch.corrcoef(torch.cat([noise.flatten(1).double(), y.double()[:, None]], 1).T), torch.eye(19), 0.1,
         "independent of each other and of the class")
