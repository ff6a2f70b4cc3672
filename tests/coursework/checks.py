"""What the checks of all sets share: one way to ask the student's code, and two ways to compare its answer.

A check is a function below @check. It builds inputs, asks the student's code ONCE, and then compares:

    @check("eq2", "any latents")
    def eq2_values():
        values(vf_loss.marginal_cosine_loss, slow_eq2, (z, f), "mean over images and positions")

The grader runs every check twice. In the student's process, which holds neither expected values nor slow_
functions, the check ends where the answer is there. In the judge's process the same check gets this answer
back from student(), without running the student's code, and compares. So nothing that a student's code
does to its own process can change a mark; it can only give another answer.

A public check (`public=True`) also stands in the student's own tests: literal numbers, never a solution.
"""
import base64
import importlib
import math
import types

__all__ = ["math", "types"]    # for the sets

class Lazy:
    """A module that is imported when a check first uses it: the command line needs no torch."""

    def __init__(self, name):
        self.module = name

    def __getattr__(self, name):
        return getattr(importlib.import_module(self.module), name)

torch, nn, F, np = Lazy("torch"), Lazy("torch.nn"), Lazy("torch.nn.functional"), Lazy("numpy")
vae, vf_loss, dit, train_vae = Lazy("vae"), Lazy("vf_loss"), Lazy("dit"), Lazy("train_vae")
train_dit, sample, fid = Lazy("train_dit"), Lazy("sample"), Lazy("fid")
CHECKS = {}        # key -> [(title, public, function)], in the order of the file
RECORD = []        # in the judge's process: the answer that student() is to return

class Wrong(AssertionError):
    """One sentence that a student can act on."""

class Recorded(BaseException):
    """Ends a check in the student's process as soon as the answer, its argument, is there."""

def check(key, title, public=False):
    def add(function):
        CHECKS.setdefault(key, []).append((title, public, function))
        return function
    return add

def student(work):
    """The value of work(), the one place of a check where the student's code runs."""
    if RECORD:
        return RECORD[0]
    raise Recorded(work())

def ok(condition, sentence):
    __tracebackhide__ = True
    if not condition:
        raise Wrong(sentence)

def short(numbers):
    return ", ".join(f"{v:.5g}" for v in numbers.flatten().tolist())

def close(got, want, sentence, tol=1e-4, kind="float32"):
    """Wrong unless `got` has the type, shape and values of `want`, up to tol times its largest value.
    kind: the tensor's dtype; "number" for a Python number or anything that holds one; "any" for any dtype."""
    __tracebackhide__ = True
    if isinstance(got, (list, tuple, dict)) or isinstance(want, dict):
        named = isinstance(want, dict)
        ok(isinstance(got, dict if named else (list, tuple)) and len(got) == len(want),
           f"{sentence}: the answer is of type {type(got).__name__}, expected {len(want)} values")
        for name, w in want.items() if named else enumerate(want):
            ok(not named or name in got, f"{sentence}: there is no {name!r}")
            close(got[name], w, f"{sentence}, {name}" if named else sentence, tol, kind)
        return
    if kind in ("number", "any"):
        try:
            got = exact(got)
        except (TypeError, ValueError, RuntimeError):
            raise Wrong(f"{sentence}: the answer is of type {type(got).__name__}, expected numbers") from None
    else:
        ok(isinstance(got, torch.Tensor),
           f"{sentence}: the answer is of type {type(got).__name__}, expected a tensor")
        ok(str(got.dtype) == f"torch.{kind}",
           f"{sentence}: the answer is of {got.dtype}, expected torch.{kind}")
    got, want = got.detach().double(), exact(want).detach().double()
    ok(got.shape == want.shape,
       f"{sentence}: the answer has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    finite = want[want.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    equal = (got == want) | ((got - want).abs() <= tol * max(scale, 1e-3))
    if got.numel() <= 6:
        ok(bool(equal.all()), f"{sentence} (got {short(got)}; expected {short(want)})")
    for at in (~equal).nonzero().tolist():
        got, want = got[tuple(at)], want[tuple(at)]
        raise Wrong(f"{sentence} (at {at} got {short(got)}, expected {short(want)})")

def exact(value):
    """A tensor; Python's numbers become float64, not torch's usual float32."""
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value, dtype=torch.float64)

def near(got, want, by, sentence):
    """Wrong unless got, numbers, is as far as `by` from want at most: for shares of random draws."""
    __tracebackhide__ = True
    got, want = exact(got).double(), exact(want).double()
    ok(got.shape == want.shape and bool(((got - want).abs() <= by).all()),
       f"{sentence} (got {short(got)}; expected {short(want)}, up to {by})")

def double(value):
    return value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

def copied(value):
    if isinstance(value, np.ndarray):
        return value.copy()
    return value.clone() if isinstance(value, torch.Tensor) else value

def values(fast, slow, inputs, sentence, tol=1e-4, kind="float32"):
    """fast(*inputs) against slow(*inputs in float64): shape, dtype, values, and the inputs left alone."""

    def work():
        given = [copied(v) for v in inputs]
        return fast(*given), given
    got, after = student(work)
    close(got, slow(*map(double, inputs)), sentence, tol, kind)
    for i, (a, b) in enumerate(zip(inputs, after), 1):
        if isinstance(a, (torch.Tensor, np.ndarray)):
            ok(bool((a == b).all()), f"argument {i} itself must not be changed")

def tensors(value):
    """All tensors of nested tuples, lists and dictionaries, in order."""
    if isinstance(value, (dict, list, tuple)):
        return [t for v in (value.values() if isinstance(value, dict) else value) for t in tensors(v)]
    return [value] if isinstance(value, torch.Tensor) and value.is_floating_point() else []

def derivative(function, inputs, names):
    """The gradient of a random weighting of all outputs, by all inputs that are floating point."""
    leaves = [v.requires_grad_() for v in inputs if isinstance(v, torch.Tensor) and v.is_floating_point()]
    outs = [o for o in tensors(function(*inputs)) if o.requires_grad]
    ok(outs, f"no gradient reaches {names}: is something detached?")
    weighted = sum((o * randn(*o.shape, seed=77).to(o)).sum() for o in outs)
    grads = torch.autograd.grad(weighted, leaves, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, grads)]

def gradient(fast, slow, inputs, names, tol=1e-4):
    """The gradient of fast at the inputs against slow's in float64. names: the inputs, for the sentence."""
    got = student(lambda: derivative(fast, [copied(v) for v in inputs], names))
    want = derivative(slow, [copied(double(v)) for v in inputs], names)
    for name, g, w in zip(names.split(", "), got, want):
        close(g, w, f"the gradient of {name} is off", tol)

def and_gradient(function):
    """The same function, followed by the gradient of a random weighting of its values by its inputs."""
    return lambda *xs: [function(*xs), derivative(function, [copied(x).detach() for x in xs], "the inputs")]

def values_and_gradient(key, title, fast, slow, inputs, sentence, names, tol=1e-4):
    """Two checks of an exercise for which `fast` and `slow` say all: `title`, of the values, and "gradient".
    inputs: a function that returns them, since nothing may need torch before a check runs."""
    check(key, title)(lambda: values(fast, slow, inputs(), sentence, tol))
    check(key, "gradient")(lambda: gradient(fast, slow, inputs(), names, 1e-3))

def randn(*shape, seed=0):
    """Normal numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def fill(module, seed=0, scale=0.5):
    """All parameters of a network become normal numbers, so that nothing hides behind zeros and ones; each by
    its name, whatever the order in which a student's __init__ makes them."""
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(module.named_parameters())):
            p.copy_(scale * randn(*p.shape, seed=seed + i))
    return module

# === Answers as text: what comes from a student's process is data and never code ========================
def encode(value):
    if isinstance(value, np.ndarray):
        return {"array": encode(torch.from_numpy(np.ascontiguousarray(value)))["tensor"]}
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in (list, tuple):
        return {"list": [encode(v) for v in value]}
    if type(value) is dict:
        return {"dict": [[str(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().clone()
        raw = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        return {"tensor": [str(data.dtype)[6:], list(data.shape), base64.b64encode(raw).decode()]}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": repr(float(value))}
    return {"other": type(value).__name__}

class Other:
    """Stands for an answer of a type that no exercise asks for."""

def decode(value):
    if not isinstance(value, dict):
        return value
    (kind, data), = value.items()
    if kind == "list":
        return [decode(v) for v in data]
    if kind == "dict":
        return {k: decode(v) for k, v in data}
    if kind in ("tensor", "array"):
        dtype, shape, raw = data
        raw = bytearray(base64.b64decode(raw))
        flat = torch.frombuffer(raw, dtype=getattr(torch, dtype)) if raw else torch.empty(0)
        return flat.reshape(shape).numpy() if kind == "array" else flat.reshape(shape)
    if kind == "float":
        return float(data)
    return type(str(data), (Other,), {})()

