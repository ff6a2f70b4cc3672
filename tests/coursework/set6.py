"""Checks of set 6, sampling. No student's process sees the slow_ functions."""
from itertools import pairwise

from checks import check, close, near, ok, randn, sample, student, torch, types, values


# --- euler ----------------------------------------------------------------------------------------------
@check("euler", "Euler's example", public=True)
def euler_example():
    ts = torch.tensor([0.0, 0.5, 1.0])
    one, two = student(lambda: (sample.euler(lambda x, t: x, torch.ones(1), ts),
                                sample.euler(lambda x, t: t * torch.ones(1), torch.zeros(1), ts)))
    close(one, [2.25], "velocity = x, from 1 at the times 0, 0.5, 1")
    close(two, [0.25], "velocity = t: each step looks at its left end")

def curved(x, t):
    return x * x - 3 * float(t) + 0.5

def start():
    return 0.5 * randn(2, 3, 2, 2)

def uneven():
    return torch.tensor([0.1, 0.15, 0.2, 0.6, 0.9], dtype=torch.float64)

def integrated(method):
    """The student's integrator on an uneven grid: x at the end, when it was evaluated, x as given."""
    times, x = [], start()

    def velocity(x, t):
        times.append((float(t), list(getattr(t, "shape", "a number"))))
        return curved(x, t)
    return method(velocity, x, uneven()), times, x

def compare_integral(got, step, times):
    (x, seen, given), want, ts = got, start().double(), uneven().tolist()
    for t, after in pairwise(ts):
        want = step(want, t, after - t)
    ok(x.is_floating_point() and x.element_size() >= 4, f"x is a float tensor: got {x.dtype}")
    close(x, want, "x after all steps", kind="any")
    near(sorted(t for t, _ in seen), sorted(times), 1e-6, "when the velocity is evaluated")
    ok(not any(shape for _, shape in seen), "the velocity gets a time of ts as it is, a 0-d tensor")
    ok(torch.equal(given, start()), "x itself must not be changed")

def slow_euler(x, t, h):
    return x + h * curved(x, t)

@check("euler", "Euler for any velocity")
def euler_values():
    compare_integral(student(lambda: integrated(sample.euler)), slow_euler, [0.1, 0.15, 0.2, 0.6])

@check("euler", "Heun's example", public=True)
def heun_example():
    ts = torch.tensor([0.0, 1.0])
    one, two = student(lambda: (sample.heun(lambda x, t: x, torch.ones(1), ts),
                                sample.heun(lambda x, t: t ** 2 * torch.ones(1), torch.zeros(1), ts)))
    close(one, [2.5], "velocity = x, one step from 1")
    close(two, [0.5], "velocity = t^2: both ends count")

def slow_heun(x, t, h):
    return x + h / 2 * (curved(x, t) + curved(slow_euler(x, t, h), t + h))

@check("euler", "Heun for any velocity")
def heun_values():
    compare_integral(student(lambda: integrated(sample.heun)), slow_heun,
                     [0.1, 0.15, 0.15, 0.2, 0.2, 0.6, 0.6, 0.9])

# --- shift -------------------------------------------------------------------------------------------
def grid_settings(points, shift):
    return types.SimpleNamespace(sampling_steps=points, timestep_shift=shift)

@check("shift", "worked example", public=True)
def shift_example():
    t = torch.tensor([0.0, 0.5, 1.0])
    got = student(lambda: (sample.shift_timesteps(t, 0.3), sample.shift_timesteps(t, 1.0),
                           sample.shift_timesteps(0.5, 0.3), sample.time_grid(grid_settings(3, 0.3))))
    close(got[0], [0.0, 0.230769, 1.0], "shift 0.3")
    close(got[1], [0.0, 0.5, 1.0], "shift 1 changes nothing")
    close(got[2], 0.230769, "a number, too", kind="number")
    ok(isinstance(got[2], float), "a number for a number, not a tensor")
    close(got[3], [0.0, 0.230769, 1.0], "a grid of three points", kind="float64")
    ok(got[3][0] == 0 and got[3][2] == 1, f"0 and 1 stay exactly what they are: got {got[3].tolist()}")

def slow_shift(t, s):
    return s * t / (1 + (s - 1) * t)

@check("shift", "any time and shift")
def shift_values():
    values(lambda t: [sample.shift_timesteps(t, s) for s in (0.3, 0.5, 3.3)],
           lambda t: [slow_shift(t, s) for s in (0.3, 0.5, 3.3)],
           (torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4),),
           "shifts 0.3, 0.5, 3.3", 1e-9, "float64")

def slow_grid(points, s):
    return slow_shift(torch.arange(points, dtype=torch.float64) / (points - 1), s)

@check("shift", "the grid")
def shift_grid():
    cases = (2, 1.0), (5, 1.0), (250, 0.3)
    values(lambda: [sample.time_grid(grid_settings(*c)) for c in cases],
           lambda: [slow_grid(*c) for c in cases], (),
           "2, 5 and 250 points from 0 to 1, with the shifts 1, 1 and 0.3", 1e-9, "float64")

# --- guidance -------------------------------------------------------------------------------------------
class ClassModel:
    """Velocity = class + 1 everywhere, the null class (9) gives 1; it notes its arguments."""
    num_classes = 9

    def __init__(self):
        self.seen = []

    def velocity(self, x, t, y):
        return (torch.where(y == 9, 0, y).to(x.dtype) + 1).view(-1, 1, 1, 1).expand(x.shape).clone()

    def __call__(self, x, t, y):
        ok(y.dtype == torch.int64, f"the model gets classes of {y.dtype}, expected torch.int64")
        self.seen.append((str(t.dtype), t.double().tolist(), y.tolist()))
        return self.velocity(x, t, y)

class MixModel(ClassModel):
    """Velocity = a mixture of channels times 1 + class + t."""

    def velocity(self, x, t, y):
        w = randn(4, 4, seed=1).to(x)
        return torch.einsum("oc,bchw->bohw", w, x) * (1 + y + t.to(x)).view(-1, 1, 1, 1)

@check("guidance", "worked example", public=True)
def guidance_example():
    x, y = torch.zeros(1, 2, 1, 1), torch.tensor([1])
    got = student(lambda: [sample.guided_velocity(ClassModel(), x, 0.4, y, 3.0, **more).flatten() for more in
                           ({}, {"channels": 1}, {"interval_start": 0.5})])
    close(got[0], [4.0, 4.0], "v_class = 2, v_null = 1, scale 3")
    close(got[1], [4.0, 2.0], "the first channel is guided, the second is v_class")
    close(got[2], [2.0, 2.0], "before interval_start: v_class")

# null class, time, channels
GUIDED = ((None, 0.3, None), (0, 0.3, 3), (7, "0-d", 1), (None, 0.3, 4), (None, 0.3, 0), (7, "float64", 2))

def guide_all(x, y):
    """The student's velocity and what the model saw, for each case of GUIDED."""
    out = []
    for null, t, channels in GUIDED:
        t = {"0-d": torch.tensor(0.3), "float64": torch.tensor(0.3, dtype=torch.float64)}.get(t, t)
        model = MixModel()
        out.append((sample.guided_velocity(model, x, t, y, 2.5, null, 0.1, channels), model.seen))
    return out

def latents():
    return randn(3, 4, 2, 2), torch.tensor([0, 2, 5])

def slow_guided(x, y):
    out, t, model = [], torch.full((3,), 0.3), MixModel()
    for null, _, channels in GUIDED:
        v = model(x, t, y)
        v_null = model(x, t, torch.full_like(y, 9 if null is None else null))
        guided = torch.arange(4).view(4, 1, 1) < (4 if channels is None else channels)
        out.append(torch.where(guided, v_null + 2.5 * (v - v_null), v))
    return out

@check("guidance", "channels and null class")
def guidance_values():
    values(lambda x, y: [v for v, _ in guide_all(x, y)], slow_guided, latents(),
           "guided first, v_class on the rest; any null class, channels None, 0, 1, 2, 3, 4", 1e-3)

@check("guidance", "what the model gets")
def guidance_model():
    got = student(lambda: [seen for _, seen in guide_all(*latents())])
    for (null, _, channels), seen in zip(GUIDED, got):
        times, classes = [t for _, ts, _ in seen for t in ts], [c for _, _, ys in seen for c in ys]
        near(times, [0.3] * len(classes), 1e-6, "the model gets t for each of its rows")
        ok(all(dtype == "torch.float32" for dtype, _, _ in seen), "times have the dtype of x")
        extra = [] if channels == 0 and len(classes) == 3 else 3 * [9 if null is None else null]
        ok(sorted(classes) == sorted([0, 2, 5] + extra), "the model sees each class and the null class, once")

# scale, time, start of the interval, whether there is guidance
INTERVAL = ((3.0, 0.25, 0.25, True), (3.0, 0.2499, 0.25, False), (3.0, "0-d", 0.25, False),
            (1.0, 0.9, 0.25, False), (0.0, 0.9, 0.25, True), (3.0, 0.0, 0.0, True), (3.0, 1.0, 0.0, True))

@check("guidance", "the interval")
def guidance_interval():
    def work():
        out, (x, _) = [], latents()
        for scale, t, begin, _ in INTERVAL:
            model, t, y = ClassModel(), torch.tensor(0.2) if t == "0-d" else t, torch.tensor([1, 4])
            v = sample.guided_velocity(model, x[:2].double(), t, y, scale, interval_start=begin)
            out.append((v, sum(len(y) for _, _, y in model.seen), [dtype for dtype, _, _ in model.seen]))
        return out
    plain = torch.tensor([2.0, 5.0]).view(2, 1, 1, 1).expand(2, 4, 2, 2)
    for (scale, t, begin, guided), (v, rows, dtypes) in zip(INTERVAL, student(work)):
        where = f"scale {scale}, t = {t}, interval from {begin}"
        close(v, 1 + scale * (plain - 1) if guided else plain, where, kind="float64")
        ok(set(dtypes) == {"torch.float64"}, f"for a float64 x, times are float64: got {', '.join(dtypes)}")
        need = 4 if guided else 2
        ok(rows == need, f"{where}: the model must see {need} rows, not {rows}")

# --- draw -----------------------------------------------------------------------------------------------
def drawn(indices, labels="random", seed=3, listed=(0, 1, 2, 3, 4), function=None):
    system = types.SimpleNamespace(shape=(2, 3, 3), device=torch.device("cpu"), classes=list("abcde"),
                                   listed=listed, model=None)
    return (function or sample.draw)(system, types.SimpleNamespace(seed=seed, labels=labels), indices)

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
    kinds = "random", "balanced"
    balanced, listed, random, seeded, single = student(lambda: (
        drawn(range(7), "balanced")[1], drawn([4, 0, 7], "3,1", listed=[3, 1])[1], drawn(range(4000))[1],
        drawn(range(4000), seed=5)[1],
        [[drawn(i, labels, function=sample.class_of) for i in range(7)] for labels in kinds]))
    ok(balanced.tolist() == [0, 1, 2, 3, 4, 0, 1], "balanced: sample i has class i mod 5")
    ok(listed.tolist() == [3, 3, 1], "a list: sample i has its entry i mod the length")
    near(torch.bincount(random, minlength=5).double() / 4000, [0.2] * 5, 0.025, "random: all classes alike")
    near((random[1:] == random[:-1]).double().mean(), 0.2, 0.03, "random: independent of other samples'")
    near((random == seeded).double().mean(), 0.2, 0.03, "random: another seed gives other classes")
    ok(list(map(list, single)) == [random[:7].tolist(), balanced.tolist()]
       and all(type(c) is int for c in single[0] + single[1]), "class_of gives draw's classes, as int")

@check("draw", "noise")
def draw_noise():
    noise, y = student(lambda: drawn(range(3000)))
    near(noise.mean(0), torch.zeros(2, 3, 3), 0.1, "standard normal")
    near(noise.std(0), torch.ones(2, 3, 3), 0.1, "standard normal")
    near(torch.corrcoef(torch.cat([noise.flatten(1).double(), y.double()[:, None]], 1).T), torch.eye(19), 0.1,
         "independent of each other and of the class")
