"""Coursework from the seven scripts: exercises, handouts for students, and a grader.

    python tests/coursework.py list                       the exercises: points, minutes, what helps
    python tests/coursework.py handout DIR --set 2        a student's folder; or --exercises eq2 eq3 rope
    python tests/coursework.py grade DIR ... --csv marks.csv [--json results.json] [--timeout 60]
    python tests/coursework.py answers                    the experiments with the instructor's answers

Read it top to bottom: what a check may say; sets 1 to 6, each exercise with its text and, right below, its
checks; set 7; then the machinery (handouts, grading, command line). A check named public is also in the
student's own tests, so it holds literal numbers and never a solution. Points of an exercise are the sum of
its checks'. To add an exercise: call exercise(), write two or more @check functions, and three wrong answers
and a right one in tests/test_coursework.py.

Each exercise is marked among the reference's other functions, so a mistake costs once; any right solution
passes; marks are partial and say why. Name the set when marks count: else `grade` believes the folder's
exercises.txt.

Grading runs students' code: in a process of its own, with limits on time, memory and file size, in a
temporary copy of the scripts. That keeps accidents apart. It is no sandbox; this is one:

    docker run --rm --network none -v "$PWD":/repo:ro -v "$PWD/in":/in:ro IMAGE \\
        sh -c 'python /repo/tests/coursework.py grade /in/* --set 2'

Gradescope takes a zip of this repository as `repo/` and of two files, setup.sh and run_autograder:

    pip install -r /autograder/source/repo/requirements.txt

    #!/bin/sh
    python3 /autograder/source/repo/tests/coursework.py grade /autograder/submission --set 2 \\
        --json /autograder/results/results.json
"""
import argparse
import ast
import csv
import gc
import importlib
import importlib.util
import inspect
import json
import math
import os
import queue
import resource
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In the order in which they import each other.
SCRIPTS = ("vae.py", "vf_loss.py", "dit.py", "train_vae.py", "train_dit.py", "sample.py", "fid.py")


class Lazy:
    """A module that is imported when a check first uses it: the command line needs no torch."""

    def __init__(self, name):
        self.module = name

    def __getattr__(self, name):
        return getattr(importlib.import_module(self.module), name)


torch, nn, F, np = Lazy("torch"), Lazy("torch.nn"), Lazy("torch.nn.functional"), Lazy("numpy")
vae, vf_loss, dit, train_vae = Lazy("vae"), Lazy("vf_loss"), Lazy("dit"), Lazy("train_vae")
train_dit, sample, fid = Lazy("train_dit"), Lazy("sample"), Lazy("fid")


# === What a check may say ==============================================================================
class Wrong(AssertionError):
    """One sentence that a student can act on."""


def ok(condition, sentence):
    if not condition:
        raise Wrong(sentence)


def short(values):
    return ", ".join(f"{v:.5g}" for v in values.flatten().tolist())


def close(got, want, sentence, tol=1e-4):
    """Wrong unless `got` has the shape of `want` and its values, up to tol times the largest of them."""
    try:
        got = torch.as_tensor(got).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{sentence}: the answer is of type {type(got).__name__}, expected numbers") from None
    want = torch.as_tensor(want).detach().double()
    ok(got.shape == want.shape,
       f"{sentence}: the answer has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    finite = want[want.isfinite()]
    scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    equal = (got == want) | ((got - want).abs() <= tol * scale)
    if got.numel() <= 6:
        ok(bool(equal.all()), f"{sentence} (got {short(got)}; expected {short(want)})")
    for place in (~equal).nonzero().tolist():
        at = tuple(place)
        raise Wrong(f"{sentence} (at {place} got {short(got[at])}, expected {short(want[at])})")


def has_shape(got, shape, sentence):
    ok(isinstance(got, torch.Tensor), f"{sentence}: the answer is of type {type(got).__name__}, not a tensor")
    ok(tuple(got.shape) == tuple(shape), f"{sentence}: got {tuple(got.shape)}, expected {tuple(shape)}")


def randn(*shape, seed=0):
    """Normal numbers, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(module, seed=0, scale=0.5):
    """All parameters of a network become normal numbers, so that nothing hides behind zeros and ones."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(scale * randn(*p.shape, seed=seed + i))
    return module


# === The exercises =====================================================================================
@dataclass
class Exercise:
    number: str            # set.place
    key: str
    file: str
    name: str              # a function, or Class.method
    tag: str               # where it stands in the paper
    minutes: int           # to solve, for a student who has read the section
    text: str
    example: str = ""
    hints: tuple = ()
    after: tuple = ()      # keys of the exercises that help
    seconds: int = 1       # to grade, on one core
    checks: list = field(default_factory=list)

    @property
    def points(self):
        return sum(c.points for c in self.checks)

    @property
    def set(self):
        return int(self.number.split(".")[0])

    @property
    def title(self):
        return f"exercise {self.number}: {self.name} [{self.tag}]"


@dataclass
class Check:
    name: str
    points: int
    public: bool
    function: object


SETS = {1: "The tokenizer", 2: "VF loss", 3: "LightningDiT", 4: "Training", 5: "Sampling", 6: "Measures",
        7: "Experiments"}
EXERCISES = {}


def exercise(number, key, file, name, tag, minutes, text, example="", hints=(), after=(), seconds=1):
    texts = (inspect.cleandoc(text), inspect.cleandoc(example), tuple(map(inspect.cleandoc, hints)))
    EXERCISES[key] = Exercise(number, key, file, name, tag, minutes, *texts, after, seconds)


def check(key, points, public=False):
    """The decorated function is a check of this exercise; its docstring is the check's name."""
    def add(function):
        EXERCISES[key].checks.append(Check(function.__doc__, points, public, function))
        return function
    return add


# --- Set 1: the tokenizer ------------------------------------------------------------------------------
exercise("1.1", "sample", "vae.py", "Posterior.sample", "Sec. 3", 10, """
    Reparameterisation. `self.mean` and `self.logvar` (B, d, h, w) describe q(z | x), the logarithm of the
    VARIANCE in `logvar`. Return a sample `z` of the same shape:

        std = exp(logvar / 2)
        z = mean + std * noise

    `noise` is standard normal and of that shape, drawn by you if it is None, one number for each value of
    z. Gradients must reach mean and logvar. Do not change `noise`, `self.mean` or `self.logvar`.
    """, "mean 1 and -1, logvar 0 and 2 ln 3 (std 1 and 3), noise 2: z is 3 and 5.")


@check("sample", 1, public=True)
def sample_shape():
    """shape"""
    q = vae.Posterior(randn(2, 6, 4, 5))
    has_shape(q.sample(torch.zeros(2, 3, 4, 5)), (2, 3, 4, 5), "z has the shape of self.mean")
    has_shape(q.sample(), (2, 3, 4, 5), "z has the shape of self.mean, also if no noise is given")


@check("sample", 2, public=True)
def sample_worked_example():
    """worked example"""
    q = vae.Posterior(torch.tensor([1.0, -1.0, 0.0, 2.1972246]).view(1, 4, 1, 1))
    close(q.sample(torch.full((1, 2, 1, 1), 2.0)).flatten(), [3.0, 5.0], "mean + exp(logvar / 2) * noise")


@check("sample", 2)
def sample_general():
    """any posterior"""
    moments, noise = randn(2, 6, 3, 4), randn(2, 3, 3, 4, seed=1)
    q = vae.Posterior(moments.clone())
    given = noise.clone()
    z = q.sample(given)
    want = moments[:, :3].double() + moments[:, 3:].double().exp().sqrt() * noise.double()
    close(z, want, "z is mean + std * noise, value by value")
    close(given, noise, "noise must not be changed")
    close(torch.stack([q.mean, q.logvar]), torch.stack([moments[:, :3], moments[:, 3:]]),
          "self.mean and self.logvar must not be changed")


@check("sample", 2)
def sample_draws():
    """noise that is drawn"""
    q = vae.Posterior(torch.cat([torch.full((2, 2, 60, 60), 5.0), torch.full((2, 2, 60, 60), -1.3862944)], 1))
    z = (q.sample() - 5) / 0.5
    close(z.mean(), 0.0, "drawn noise has mean 0", 0.1)
    close(z.std((2, 3)), torch.ones(2, 2), "drawn noise has standard deviation 1 in each channel", 0.1)
    close((z.abs() > 2).float().mean(), 0.0455,
          "drawn noise is normal: 4.6 % lies beyond two deviations", 0.012)
    close(torch.corrcoef(z.flatten(2).flatten(0, 1)), torch.eye(4), "each value has noise of its own", 0.1)
    ok(not torch.equal(q.sample(), q.sample()), "two calls must draw different noise")


@check("sample", 1)
def sample_gradient():
    """gradient"""
    moments = randn(1, 4, 2, 2).requires_grad_()
    noise = randn(1, 2, 2, 2, seed=1)
    z = vae.Posterior(moments).sample(noise)
    ok(z.requires_grad, "gradients must flow through z to mean and logvar")
    z.sum().backward()
    half = 0.5 * torch.exp(0.5 * moments[:, 2:].detach()) * noise
    close(moments.grad, torch.cat([torch.ones(1, 2, 2, 2), half], 1), "the gradient of mean or logvar is off")


exercise("1.2", "kl", "vae.py", "Posterior.kl", "Sec. 3", 10, """
    KL(q || N(0, I)) in nats, one number an image, (B,): the SUM over all d * h * w values of

        (mean^2 + exp(logvar) - 1 - logvar) / 2
    """, """mean 2 and 0, logvar 0 and ln 4 (one image, two channels, one position): 2 + 0.8069 = 2.8069.""")


@check("kl", 1, public=True)
def kl_shape():
    """shape"""
    has_shape(vae.Posterior(randn(3, 4, 2, 5)).kl(), (3,), "one number an image, (B,)")


@check("kl", 2, public=True)
def kl_worked_example():
    """worked example"""
    q = vae.Posterior(torch.tensor([2.0, 0.0, 0.0, 1.3862944]).view(1, 4, 1, 1))
    close(q.kl(), [2.8068528], "sum of (mean^2 + exp(logvar) - 1 - logvar) / 2")
    close(vae.Posterior(torch.zeros(2, 4, 3, 3)).kl(), [0.0, 0.0], "N(0, I) has KL 0 to itself")


@check("kl", 2)
def kl_general():
    """any posterior"""
    moments = 2 * randn(3, 6, 2, 4)
    q = torch.distributions.Normal(moments[:, :3], (moments[:, 3:] / 2).exp())
    want = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1))
    want = torch.stack([image.sum() for image in want])
    close(vae.Posterior(moments.clone()).kl(), want, "KL is summed over channels and positions of each image")


@check("kl", 1)
def kl_gradient():
    """gradient"""
    moments = randn(2, 4, 2, 2).requires_grad_()
    vae.Posterior(moments).kl().sum().backward()
    mean, logvar = moments.detach().chunk(2, 1)
    close(moments.grad, torch.cat([mean, (logvar.exp() - 1) / 2], 1), "the gradient of mean or logvar is off")


exercise("1.3", "resnet", "vae.py", "ResnetBlock.forward", "Sec. 3", 15, """
    x (B, c_in, H, W) -> (B, c_out, H, W). Two convolutions, each after its norm and SiLU, and a shortcut:

        h = conv1(silu(norm1(x)))
        h = conv2(silu(norm2(h)))
        result = nin_shortcut(x) + h

    The layers are self.norm1, conv1, norm2, conv2, nin_shortcut (a 1x1 convolution, or nothing).
    """, "With conv2's weights 0 and biases 3 the block of c_in = c_out adds 3 to x.")


@check("resnet", 1, public=True)
def resnet_shape():
    """shape"""
    has_shape(vae.ResnetBlock(8, 16)(randn(2, 8, 4, 6)), (2, 16, 4, 6), "(B, c_out, H, W)")


@check("resnet", 2, public=True)
def resnet_worked_example():
    """worked example"""
    block, x = vae.ResnetBlock(8, 8), randn(2, 8, 4, 6)
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.conv2.bias.fill_(3.0)
        close(block(x), x + 3, "with conv2 = 3 the result is x + 3")


def silu_after(norm, x):
    h = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return h * torch.sigmoid(h)


@check("resnet", 3)
def resnet_general():
    """any weights"""
    for c_in, c_out in ((8, 8), (8, 16)):
        block, x = fill(vae.ResnetBlock(c_in, c_out)), 2 * randn(2, c_in, 4, 6, seed=9)
        given = x.clone()
        h = F.conv2d(silu_after(block.norm1, x), block.conv1.weight, block.conv1.bias, padding=1)
        h = F.conv2d(silu_after(block.norm2, h), block.conv2.weight, block.conv2.bias, padding=1)
        skip = x if c_in == c_out else F.conv2d(x, block.nin_shortcut.weight, block.nin_shortcut.bias)
        close(block(given), skip + h,
              f"norm, SiLU, convolution, twice, plus the shortcut ({c_in} to {c_out})")
        close(given, x, "x itself must not be changed")


exercise("1.4", "attn", "vae.py", "AttnBlock.forward", "Sec. 3", 15, """
    x (B, C, H, W) -> the same shape. Each of the H * W positions looks at all others of its image; one head:

        q, k, v = q(n), k(n), v(n) of n = norm(x)           1x1 convolutions, each (B, C, H, W)
        a[i, j] = softmax over j of (q_i . k_j / sqrt(C))    i, j positions
        h_i = sum_j a[i, j] v_j
        result = x + proj_out(h)
    """, """Norm, q, k, v, proj_out all the identity, C = 4, positions (2, 0, 0, 0) and (0, 2, 0, 0): scores 4
    / sqrt(4) = 2 and 0, weights 0.8808 and 0.1192, result (3.7616, 0.2384, 0, 0) and (0.2384, 3.7616, 0,
    0).""",
    ("A view (B, C, H * W) has the positions last; swap the last two axes for one row a position.",
     "`F.scaled_dot_product_attention(q, k, v)` takes (B, heads, positions, C); swap back before proj_out."))


@check("attn", 1, public=True)
def attn_shape():
    """shape"""
    has_shape(vae.AttnBlock(8)(randn(2, 8, 3, 5)), (2, 8, 3, 5), "the shape of x")


@check("attn", 2, public=True)
def attn_worked_example():
    """worked example"""
    block = vae.AttnBlock(4)
    block.norm = nn.Identity()
    with torch.no_grad():
        for layer in (block.q, block.k, block.v, block.proj_out):
            layer.weight.copy_(torch.eye(4).view(4, 4, 1, 1))
            layer.bias.zero_()
        x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]).view(1, 4, 1, 2)
        want = [[3.76159, 0.23841], [0.23841, 3.76159], [0.0, 0.0], [0.0, 0.0]]
        close(block(x)[0, :, 0], want, "x plus the mean of v, weighted by softmax of q . k / sqrt(C)")


@check("attn", 4)
def attn_general():
    """any weights"""
    block, x = fill(vae.AttnBlock(8)), 2 * randn(2, 8, 3, 5, seed=9)
    n = F.group_norm(x, block.norm.num_groups, block.norm.weight, block.norm.bias, block.norm.eps)

    def conv(layer, v):
        return torch.einsum("oc,bcn->bon", layer.weight[:, :, 0, 0], v.flatten(2)) + layer.bias[:, None]
    q, k, v = conv(block.q, n), conv(block.k, n), conv(block.v, n)
    h = torch.zeros_like(v)
    for b in range(2):
        for i in range(15):
            scores = torch.stack([q[b, :, i] @ k[b, :, j] for j in range(15)]) / math.sqrt(8)
            h[b, :, i] = (scores.softmax(0) * v[b]).sum(1)
    want = x + conv(block.proj_out, h).view(x.shape)
    given = x.clone()
    close(block(given), want, "each position takes the softmax-weighted mean of v over all of its image's")
    close(given, x, "x itself must not be changed")


@check("attn", 1)
def attn_gradient():
    """gradient"""
    block, x = fill(vae.AttnBlock(8)), randn(1, 8, 2, 3, seed=9).requires_grad_()
    block(x).square().sum().backward()
    for name in ("q", "k", "v", "proj_out", "norm"):
        grad = getattr(block, name).weight.grad
        ok(grad is not None and grad.abs().sum() > 0, f"no gradient reaches {name}: is something detached?")


exercise("1.5", "rec", "train_vae.py", "reconstruction_loss", "Sec. 3", 10, """
    L_rec of LDM, a scalar, for x and x_hat (b, 3, H, W): at each pixel and colour |x - x_hat|, plus
    `lpips_weight` times the image's LPIPS; SUMMED over b, 3, H, W and divided by b.

        L_rec = sum(|x - x_hat| + lpips_weight * LPIPS(x, x_hat)) / b

    `lpips(x, x_hat)` gives (b, 1, 1, 1), which counts at every pixel of its image; lpips None: no such term.
    """, """Two images 3x1x2, x = 0, x_hat = 1 and 0.5: L1 sums 6 and 3, so 9 / 2 = 4.5. If LPIPS is 0.2 for
    each and lpips_weight is 2: 4.5 + 2 * 0.2 * 6 = 6.9.""")


@check("rec", 1, public=True)
def rec_shape():
    """shape"""
    has_shape(train_vae.reconstruction_loss(randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), None, 1.0), (),
              "one number for the batch")


@check("rec", 3, public=True)
def rec_worked_example():
    """worked example"""
    x, x_hat = torch.zeros(2, 3, 1, 2), torch.ones(2, 3, 1, 2)
    x_hat[1] = 0.5
    close(train_vae.reconstruction_loss(x, x_hat, None, 2.0), 4.5,
          "without LPIPS: the sum over pixels, over b")

    def lpips(x, x_hat):
        return torch.full((len(x), 1, 1, 1), 0.2)
    close(train_vae.reconstruction_loss(x, x_hat, lpips, 2.0), 6.9,
          "LPIPS counts at each of an image's values")


@check("rec", 3)
def rec_general():
    """any images, and the gradient"""
    x, x_hat, scales = randn(3, 3, 4, 5), randn(3, 3, 4, 5, seed=1).requires_grad_(), []

    def lpips(x, x_hat):
        scales.append(x.detach().abs().max().item())
        return (x_hat - 2 * x).square().mean((1, 2, 3), keepdim=True)
    loss = train_vae.reconstruction_loss(x, x_hat, lpips, 0.7)
    want = 0.0
    for a, b in zip(x, x_hat):
        want = want + ((a - b).abs().sum() + 0.7 * 60 * (b - 2 * a).square().mean()) / 3
    close(loss, want, "sum of |x - x_hat| + lpips_weight * lpips(x, x_hat), x first, divided by b")
    ok(loss.requires_grad, "gradients must reach x_hat")
    close(torch.autograd.grad(loss, x_hat)[0], torch.autograd.grad(want, x_hat)[0],
          "the gradient of x_hat is off")


exercise("1.6", "hinge_g", "train_vae.py", "hinge_generator", "Sec. 3", 5, """
    The generator's hinge loss, a scalar, from the discriminator's logits of reconstructions (any shape, large
    = looks real): minus their mean. No margin: the generator is always pulled towards larger logits.
    """, "logits 2 and -1: -0.5.")


@check("hinge_g", 1, public=True)
def hinge_g_shape():
    """shape"""
    has_shape(train_vae.hinge_generator(randn(2, 1, 3, 3)), (), "one number for all logits")


@check("hinge_g", 2, public=True)
def hinge_g_worked_example():
    """worked example"""
    close(train_vae.hinge_generator(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)), -0.5, "minus the mean")


@check("hinge_g", 1)
def hinge_g_gradient():
    """any logits, and the gradient"""
    fake = (5 * randn(2, 1, 3, 4)).requires_grad_()
    loss = train_vae.hinge_generator(fake)
    close(loss, -sum(fake.flatten().tolist()) / 24, "minus the mean over all logits of the batch")
    loss.backward()
    close(fake.grad, torch.full_like(fake, -1 / 24), "each logit has the gradient -1 / (number of logits)")


exercise("1.7", "hinge_d", "train_vae.py", "hinge_discriminator", "Sec. 3", 5, """
    The discriminator's hinge loss, a scalar, from its logits of real images and of reconstructions:

        (mean of relu(1 - real) + mean of relu(1 + fake)) / 2

    So real logits are pushed above 1 and fake ones below -1, and no further.
    """, "real 3 and 0, fake -2 and 1: (0 + 1) / 2 = 0.5 and (0 + 2) / 2 = 1, together 0.75.",
    after=("hinge_g",))


@check("hinge_d", 1, public=True)
def hinge_d_shape():
    """shape"""
    has_shape(train_vae.hinge_discriminator(randn(2, 1, 3, 3), randn(2, 1, 3, 3, seed=1)), (), "one number")


@check("hinge_d", 2, public=True)
def hinge_d_worked_example():
    """worked example"""
    real, fake = torch.tensor([3.0, 0.0]).view(2, 1, 1, 1), torch.tensor([-2.0, 1.0]).view(2, 1, 1, 1)
    close(train_vae.hinge_discriminator(real, fake), 0.75,
          "half of mean relu(1 - real) + mean relu(1 + fake)")


@check("hinge_d", 2)
def hinge_d_general():
    """any logits, and the gradient"""
    real, fake = (2 * randn(2, 1, 3, 3)).requires_grad_(), (2 * randn(3, 1, 3, 3, seed=1)).requires_grad_()
    loss = train_vae.hinge_discriminator(real, fake)
    want = sum(max(0, 1 - v) for v in real.flatten().tolist()) / 36
    want += sum(max(0, 1 + v) for v in fake.flatten().tolist()) / 54
    close(loss, want, "real and fake each have a mean of their own")
    loss.backward()
    close(real.grad, torch.where(real < 1, -1 / 36, 0.0), "only real logits below 1 have a gradient")
    close(fake.grad, torch.where(fake > -1, 1 / 54, 0.0), "only fake logits above -1 have a gradient")


# --- Set 2: VF loss ------------------------------------------------------------------------------------
exercise("2.1", "eq2", "vf_loss.py", "marginal_cosine_loss", "Eq. 2", 10, """
    z and f (B, C, h, w): the projected latent z' and the foundation model's features. At each position
    (i, j) of each image the cosine of the two C-vectors; then

        L_mcos = mean over images and positions of relu(1 - m1 - cos_ij),    m1 = margin, 0.5 if not given

    a scalar. Pairs whose cosine is above 1 - m1 give no loss and no gradient.
    """, """C = 2, one image, three
    positions, z = (3, 0), (0, 2), (1, 0) and f = (1, 0), (1, 0), (-5, 0): cosines 1, 0, -1; with m1 = 0.5: 0,
    0.5, 1.5; mean 0.6667.""")


@check("eq2", 1, public=True)
def eq2_shape():
    """shape"""
    has_shape(vf_loss.marginal_cosine_loss(randn(2, 4, 3, 5), randn(2, 4, 3, 5, seed=1)), (), "one number")


@check("eq2", 2, public=True)
def eq2_worked_example():
    """worked example"""
    z = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 0.0]]).view(1, 2, 1, 3)
    f = torch.tensor([[1.0, 1.0, -5.0], [0.0, 0.0, 0.0]]).view(1, 2, 1, 3)
    close(vf_loss.marginal_cosine_loss(z, f, 0.5), 2 / 3, "mean of relu(1 - m1 - cos)")
    close(vf_loss.marginal_cosine_loss(f, f, 0.5), 0.0, "equal vectors give 0, never less")


@check("eq2", 3)
def eq2_general():
    """any latents"""
    z, f = randn(3, 5, 2, 4), randn(3, 5, 2, 4, seed=1) + 0.3
    for margin in (None, 0.0, 0.2, 1.2):
        want = []
        for b in range(3):
            for i in range(2):
                for j in range(4):
                    u, v = z[b, :, i, j].double(), f[b, :, i, j].double()
                    cosine = (u @ v / (u @ u).sqrt() / (v @ v).sqrt()).item()
                    want.append(max(0.0, 1 - (0.5 if margin is None else margin) - cosine))
        args = () if margin is None else (margin,)
        given = z.clone(), f.clone()
        close(vf_loss.marginal_cosine_loss(*given, *args), sum(want) / 24,
              f"mean over images and positions, cosine over channels (margin {margin}; None: not given)")
        close(torch.stack(given), torch.stack([z, f]), "z and f themselves must not be changed")


@check("eq2", 2)
def eq2_gradient():
    """gradient"""
    z, f = randn(2, 3, 2, 2).requires_grad_(), randn(2, 3, 2, 2, seed=1)
    with torch.no_grad():
        f[0] = z[0] * 2 + 0.05   # within the margin
    loss = vf_loss.marginal_cosine_loss(z, f, 0.3)
    ok(loss.requires_grad, "gradients must reach z")
    loss.backward()
    close(z.grad[0], torch.zeros(3, 2, 2), "pairs within the margin have no gradient")
    cosine = torch.einsum("bchw,bchw->bhw", z, f) / (z.norm(dim=1) * f.norm(dim=1))
    want = torch.autograd.grad((0.7 - cosine).clamp(min=0).sum() / 8, z)[0]
    close(z.grad, want, "the gradient of z is off", 1e-5)


exercise("2.2", "eq3", "vf_loss.py", "marginal_distance_matrix_loss", "Eq. 3", 10, """
    z (B, C_z, h, w) and f (B, C_f, h, w); the numbers of channels may differ. In each image, for each pair
    (i, j) of its N = h * w positions, the cosine of z_i and z_j and that of f_i and f_j:

        L_mdms = sum over i, j of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m2) / N^2,    m2 = margin

    averaged over the batch, a scalar; margin is 0.25 if not given. The N pairs i = j count in N^2 (they add
    0). No pairs across images.
    """, """One image, two positions, z = (1, 0), (0, 2) and f = (1, 0), (3, 4):
    cosines of the pair 0 and 0.6; relu(0.6 - 0.25) = 0.35, twice, over N^2 = 4: 0.175.""",
    ("Flatten h and w to N and make each vector of length 1; then cosines are scalar products.",
     "All pairs at once: the matrix product of (B, N, C) and (B, C, N) is (B, N, N)."), after=("eq2",))


@check("eq3", 1, public=True)
def eq3_shape():
    """shape"""
    has_shape(vf_loss.marginal_distance_matrix_loss(randn(2, 4, 3, 5), randn(2, 7, 3, 5, seed=1)), (),
              "one number, also if z and f have different numbers of channels")


@check("eq3", 3, public=True)
def eq3_worked_example():
    """worked example"""
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(1, 2, 1, 2)
    f = torch.tensor([[1.0, 3.0], [0.0, 4.0]]).view(1, 2, 1, 2)
    close(vf_loss.marginal_distance_matrix_loss(z, f, 0.25), 0.175, "sum over all pairs over N^2")
    close(vf_loss.marginal_distance_matrix_loss(f, z, 0.25), 0.175,
          "the difference counts by its size, not its sign")
    close(vf_loss.marginal_distance_matrix_loss(z, z, 0.25), 0.0, "equal similarities give 0, never less")


@check("eq3", 4)
def eq3_general():
    """any latents"""
    z, f = randn(3, 4, 2, 3), randn(3, 5, 2, 3, seed=1) + 0.4
    for margin in (None, 0.0, 0.6):
        total = 0.0
        for b in range(3):
            zs, fs = z[b].double().flatten(1).T, f[b].double().flatten(1).T
            for i in range(6):
                for j in range(6):
                    cosines = [v[i] @ v[j] / v[i].norm() / v[j].norm() for v in (zs, fs)]
                    difference = abs(cosines[0] - cosines[1]).item()
                    total += max(0.0, difference - (0.25 if margin is None else margin))
        args = () if margin is None else (margin,)
        close(vf_loss.marginal_distance_matrix_loss(z.clone(), f.clone(), *args), total / 108,
              f"mean over images and pairs of positions (margin {margin}; None: not given)")


@check("eq3", 2)
def eq3_gradient():
    """gradient"""
    z, f = randn(2, 3, 2, 2).requires_grad_(), randn(2, 4, 2, 2, seed=1)
    loss = vf_loss.marginal_distance_matrix_loss(z, f, 0.3)
    ok(loss.requires_grad, "gradients must reach z")
    total = 0.0
    for b in range(2):
        for i in range(4):
            for j in range(4):
                if i != j:
                    pairs = [v[b].flatten(1)[:, [i, j]].T for v in (z, f)]
                    a, c = (F.cosine_similarity(u[0], u[1], dim=0) for u in pairs)
                    total = total + ((a - c).abs() - 0.3).clamp(min=0)
    close(torch.autograd.grad(loss, z)[0], torch.autograd.grad(total / 32, z)[0],
          "the gradient of z is off", 1e-5)


exercise("2.3", "eq4", "vf_loss.py", "adaptive_weight", "Eq. 4", 10, """
    Two scalar losses that depend on the parameter `weight` -> a scalar:

        w_adaptive = |grad L_rec| / (|grad L_other| + 1e-4), clamped to [0, max_weight]

    The gradients are those by `weight`, of any shape; | | is the square root of the sum of all their squares.
    max_weight is 1e8 if not given. The result is a number for the optimiser: without gradient. Both losses
    are still to be differentiated after the call, and nothing may be left in any `.grad`.
    """, """weight of
    two numbers, grad L_rec = (3, 4), grad L_other = (0, 2): 5 / 2.0001 = 2.49988. With grad L_other = 0: 5 /
    0.0001 = 50,000; with max_weight = 10: 10.""",
    ("`torch.autograd.grad(loss, weight)` gives a tuple and touches no `.grad`.",
     "By default it frees the graph: `retain_graph=True` keeps it."))


@check("eq4", 1, public=True)
def eq4_shape():
    """shape"""
    w = torch.ones(2, requires_grad=True)
    got = vf_loss.adaptive_weight((w * 3).sum(), w.sum(), w)
    has_shape(got, (), "one number")
    ok(not got.requires_grad, "the weight itself has no gradient: detach it")


@check("eq4", 3, public=True)
def eq4_worked_example():
    """worked example"""
    w = torch.ones(2, requires_grad=True)
    rec, other = (w * torch.tensor([3.0, 4.0])).sum(), (w * torch.tensor([0.0, 2.0])).sum()
    close(vf_loss.adaptive_weight(rec, other, w), 2.499875, "|grad rec| / (|grad other| + 1e-4)", 1e-5)
    close(vf_loss.adaptive_weight(rec, 0 * other, w), 50000.0, "a gradient of 0 is met by the 1e-4", 1e-3)
    close(vf_loss.adaptive_weight(rec, 0 * other, w, 10.0), 10.0, "clamped to max_weight")


@check("eq4", 3)
def eq4_general():
    """any gradients, and the clamp"""
    w = randn(4, 3, 2, 2).requires_grad_()
    a, b = 3 * randn(4, 3, 2, 2, seed=1), randn(4, 3, 2, 2, seed=2)
    want = math.sqrt(sum(v * v for v in a.flatten().tolist()) / sum(v * v for v in b.flatten().tolist()))
    close(vf_loss.adaptive_weight((w * a).sum(), (w * b).sum(), w), want,
          "L2 norms over the whole of `weight`", 3e-4)
    small = (w * b).sum() * 1e-4 / b.norm()
    close(vf_loss.adaptive_weight((w * a).sum(), small, w), a.norm() / 2e-4,
          "the 1e-4 is ADDED to |grad other|", 1e-3)
    close(vf_loss.adaptive_weight((w * a).sum() * 1e8, (w * b).sum() * 0, w), 1e8,
          "max_weight is 1e8 if not given")
    close(vf_loss.adaptive_weight((w * 0).sum(), (w * 0).sum(), w), 0.0, "both gradients 0: the weight is 0")


@check("eq4", 2)
def eq4_graph():
    """the graph stays"""
    w, x = randn(3).requires_grad_(), randn(3, seed=1).requires_grad_()
    h = torch.tanh(w * x)
    rec, other = h.square().sum(), (h - 1).square().sum()
    got = vf_loss.adaptive_weight(rec, other, w)
    ok(w.grad is None and x.grad is None, "nothing may be added to .grad: use torch.autograd.grad")
    try:
        (rec + got * other).backward()
    except RuntimeError:
        raise Wrong("after the call both losses are differentiated again: keep the graph") from None
    ok(not got.requires_grad, "the weight has no gradient of its own")


exercise("2.4", "eq1", "train_vae.py", "Tokenizer.forward", "Eq. 1", 5, """
    x (b, 3, H, W), noise like the latent -> the four values x_hat, z, posterior, z_proj.

        x_hat, z, posterior = self.vae(x, noise)
        z_proj = W z at each position, (b, d_f, h, w),    W = self.linear_proj, a 1x1 convolution

    z is the SAMPLE that the decoder sees, not the posterior's mean. Without VF loss self.linear_proj is None,
    and so is z_proj.
    """, "d = 1, W = (2, -1), z = 3 at some position: z_proj is (6, -3) there.")


def small_vae():
    """A tokenizer of f = 2, d = 4 that takes a millisecond."""
    return fill(vae.AutoencoderKL(embed_dim=4, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(),
                                  resolution=8), scale=0.2)


@check("eq1", 1, public=True)
def eq1_shape():
    """shape"""
    tokenizer = train_vae.Tokenizer(small_vae(), 6)
    x_hat, z, _, z_proj = tokenizer(randn(2, 3, 8, 8), randn(2, 4, 4, 4, seed=1))
    has_shape(x_hat, (2, 3, 8, 8), "x_hat comes first")
    has_shape(z, (2, 4, 4, 4), "then z")
    has_shape(z_proj, (2, 6, 4, 4), "z_proj is the fourth value")


@check("eq1", 3)
def eq1_general():
    """W times the sample"""
    tokenizer, x, noise = train_vae.Tokenizer(small_vae(), 6), randn(2, 3, 8, 8), randn(2, 4, 4, 4, seed=1)
    x_hat, z, posterior, z_proj = tokenizer(x, noise)
    want_hat, want_z, want = tokenizer.vae(x, noise)
    close(z, want_z, "z is the posterior's sample with the given noise")
    close(x_hat, want_hat, "x_hat is the reconstruction from z")
    close(posterior.mean, want.mean, "posterior is what self.vae returns")
    w = tokenizer.linear_proj.weight[:, :, 0, 0]
    close(z_proj, torch.einsum("oc,bchw->bohw", w, want_z),
          "z_proj is W times z, the sample, at each position")
    z_proj.square().sum().backward()
    ok(tokenizer.vae.encoder.conv_out.weight.grad is not None,
       "the gradient of z_proj must reach the encoder")


@check("eq1", 1)
def eq1_without():
    """without VF loss"""
    values = train_vae.Tokenizer(small_vae(), 0)(randn(1, 3, 8, 8), randn(1, 4, 4, 4))
    ok(len(values) == 4 and values[3] is None, "if self.linear_proj is None, z_proj is None")


exercise("2.5", "teacher", "vf_loss.py", "FoundationModel.forward", "Sec. 3.1", 10, """
    x (B, 3, H, W) in [-1, 1], grid (h, w), the latent's -> features (B, d_f, h, w), float32, without
    gradient:

        1. to [0, 1], then minus self.mean, over self.std (both (1, 3, 1, 1))
        2. if self.patch is not 0: resize to (h * patch, w * patch), bilinear, align_corners=False
        3. f = self.tokens(self.net, x); ValueError if its last two sizes are not `grid`

    Step 3 stands inside `autocast(x, self.bf16 and x.is_cuda)`, which vae.py has: bfloat16 on CUDA only. The
    `torch.no_grad` above the function belongs to it and stays.
    """, "mean 0.5 and std 0.25 in each colour: x = 1 becomes (1 - 0.5) / 0.25 = 2, x = -1 becomes -2.")


def small_teacher(patch, mean, std):
    """A foundation model whose tokens are the means of patches; patch 0: of 2x2 pixels."""
    net = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.eye(3).view(3, 3, 1, 1))

    def tokens(net, x):
        return F.avg_pool2d(net(x), patch or 2)
    return vf_loss.FoundationModel(net, tokens, 3, patch, mean, std)


@check("teacher", 1, public=True)
def teacher_shape():
    """shape"""
    f = small_teacher(3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))(randn(2, 3, 8, 12), (2, 3))
    has_shape(f, (2, 3, 2, 3), "(B, d_f, h, w) with (h, w) = grid")


@check("teacher", 2, public=True)
def teacher_worked_example():
    """worked example"""
    teacher = small_teacher(0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    close(teacher(torch.ones(1, 3, 2, 2), (1, 1)).flatten(), [2.0] * 3,
          "x = 1 is 1 in [0, 1]: (1 - 0.5) / 0.25")
    close(teacher(-torch.ones(1, 3, 2, 2), (1, 1)).flatten(), [-2.0] * 3, "x = -1 is 0 in [0, 1]")


@check("teacher", 3)
def teacher_general():
    """any image, with and without patches"""
    mean, std, x = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), randn(2, 3, 8, 12)
    given = x.clone()
    scaled = torch.stack([((x[:, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)], 1)
    close(small_teacher(0, mean, std)(given, (4, 6)), F.avg_pool2d(scaled, 2),
          "patch 0: normalised, not resized")
    close(given, x, "x itself must not be changed")
    resized = F.interpolate(scaled, (10, 15), mode="bilinear")
    close(small_teacher(5, mean, std)(x, (2, 3)), F.avg_pool2d(resized, 5),
          "patch 5, grid (2, 3): normalised, bilinear to 10x15", 1e-3)


@check("teacher", 2)
def teacher_frozen():
    """no gradient, and the wrong grid"""
    teacher = small_teacher(0, (0.5,) * 3, (0.5,) * 3)
    x = randn(1, 3, 4, 4).requires_grad_()
    f = teacher(x, (2, 2))
    ok(not f.requires_grad, "features are a target: no gradient through the teacher")
    ok(f.dtype == torch.float32, "features are float32")
    try:
        teacher(x, (4, 4))
    except ValueError:
        return
    raise Wrong("a patch grid that is not `grid` must raise ValueError")


exercise("2.6", "step", "train_vae.py", "train_step", "Sec. 3.3, Eq. 5", 15, """
    One batch: x (b, 3, H, W), noise like the latent, batch = its number from 0. With s = run.settings:

        x_hat, z, posterior, z_proj = run.ddp(x, noise)    float32 from here on: x_hat.float()
        rec = reconstruction_loss(x, x_hat, run.lpips, s.lpips_weight)
        kl = sum of posterior.kl() over the batch / b
        L = rec + s.kl_weight * kl

    If run.disc is not None and batch >= s.disc_start, with W = decoder.conv_out.weight:

        g = hinge_generator(run.disc(x_hat))
        L += s.disc_weight * adaptive_weight(rec, g, W, max_weight=1e4) * g

    If z_proj is not None, with W = encoder.conv_out.weight and (h, w) the latent's grid:

        mcos, mdms = vf_loss(z_proj, run.foundation(x, (h, w)), s.cos_margin, s.mdms_margin, s.mcos, s.mdms)
        L += s.vf_weight * adaptive_weight(rec, mcos + mdms, W) * (mcos + mdms)

    Then one step of run.opt on L. Then, under the same condition as g, one step of run.opt_disc on
    hinge_discriminator(run.ddp_disc(x), run.ddp_disc(x_hat)), which must not reach the tokenizer, as L must
    not train the discriminator: while g is computed, its parameters may be frozen. Both layers are in
    run.tokenizer.vae. If s.precision is "bf16", the first line stands inside `autocast(x, True)`.

    Return {name: scalar without gradient} of rec, l1 (mean |x - x_hat|), kl and, where they exist, g, w_disc,
    mcos, mdms, w_vf, d; w_disc and w_vf are the whole factors of g and of mcos + mdms, d the discriminator's
    loss.
    """, """One pixel x = (1, 1, 1), a linear encoder with weights 1/3 for the mean and 0 for logvar, noise 0:
    z = 1, kl = 0.5. A linear decoder with weights 0.5: rec = 1.5. With kl_weight 0.5, L = 1.75. Each decoder
    weight has the gradient -z = -1, each of the mean's (-1.5 + 0.5 * 1) * 1 = -1; a step of gradient descent
    with rate 0.1 makes them 0.6 and 0.4333.""",
    ("Write L as the sum above and call backward once. Gradients left from the last batch must go first.",
     "x_hat.detach() keeps the discriminator's loss out of the decoder."), after=("eq4", "eq1"), seconds=2)


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


def linear_vae():
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


def make_run(net, width, adversary, rate, **changes):
    """What train_step needs, tiny, with plain gradient descent: a step is minus rate times gradient."""
    settings = {"kl_weight": 0.5, "lpips_weight": 0.7, "disc_weight": 0.5, "disc_start": 3, "vf_weight": 0.3,
                "cos_margin": 0.1, "mdms_margin": 0.05, "mcos": True, "mdms": True, "precision": "fp32"}
    run = types.SimpleNamespace(settings=train_vae.Settings(**{**settings, **changes}), disc=None, lpips=None)
    torch.manual_seed(0)
    run.tokenizer = train_vae.Tokenizer(net, width)
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


def generator_loss(run, x, noise, batch):
    """The plain sum: (L, {name: term}, x_hat); for the grader only."""
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


def compare_step(run, x, noise, batch):
    """One train_step of a copy of the run, each part's change beside minus the rate times the gradient."""
    loss, terms, x_hat = generator_loss(run, x, noise, batch)
    groups = {"encoder": run.tokenizer.vae.encoder, "decoder": run.tokenizer.vae.decoder,
              "quant_conv": run.tokenizer.vae.quant_conv, "linear_proj": run.tokenizer.linear_proj}
    groups = {name: list(m.parameters()) for name, m in groups.items() if m is not None}
    rate = {name: 1e-3 for name in groups}
    want = {name: torch.autograd.grad(loss, p, retain_graph=True) for name, p in groups.items()}
    if run.disc is not None:
        groups["disc"], rate["disc"] = list(run.disc.parameters()), 1.0
        want["disc"] = [torch.zeros_like(p) for p in groups["disc"]]
        if batch >= run.settings.disc_start:
            real, fake = run.disc(x), run.disc(x_hat.detach())
            terms["d"] = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
            want["disc"] = torch.autograd.grad(terms["d"], groups["disc"])
    before = {name: [p.detach().clone() for p in part] for name, part in groups.items()}
    answer = train_vae.train_step(run, x, noise, batch)
    for name, part in groups.items():
        change = torch.cat([((a - p.detach()) / rate[name]).flatten() for a, p in zip(before[name], part)])
        gradient = torch.cat([g.flatten() for g in want[name]])
        ok((change - gradient).norm() <= 5e-3 * gradient.norm() + 1e-4,
           f"the step of {name} is not that of the loss: the norm of its change over the learning rate is "
           f"{change.norm():.4g}, expected {gradient.norm():.4g}, that of the gradient")
    return answer, terms


@check("step", 1, public=True)
def step_shape():
    """what is returned"""
    run = make_run(linear_vae(), 0, False, 0.1)
    terms = train_vae.train_step(run, torch.ones(2, 3, 1, 1), torch.zeros(2, 1, 1, 1), 0)
    ok(isinstance(terms, dict) and {"rec", "kl", "l1"} <= set(terms), "a dictionary with rec, kl and l1")


@check("step", 2, public=True)
def step_worked_example():
    """worked example"""
    run = make_run(linear_vae(), 0, False, 0.1)
    terms = train_vae.train_step(run, torch.ones(2, 3, 1, 1), torch.zeros(2, 1, 1, 1), 0)
    for name, value in (("rec", 1.5), ("kl", 0.5), ("l1", 0.5)):
        close(terms[name], value, f"terms[{name!r}]")
    net = run.tokenizer.vae
    close(net.decoder.conv_out.weight.flatten(), [0.6] * 3, "the decoder's weights after the step")
    close(net.encoder.conv_out.weight[0].flatten(), [0.433333] * 3, "the mean's weights after the step")


@check("step", 2)
def step_reconstruction():
    """L_rec and KL alone"""
    run, x, noise = small_run(0, False), randn(3, 3, 24, 24), randn(3, 4, 12, 12, seed=1)
    for _ in range(2):   # in the second round gradients of the first would be left
        compare_step(run, x, noise, 9)


@check("step", 3)
def step_vf():
    """with VF loss"""
    for changes in ({}, {"mcos": False}, {"vf_weight": 2.0, "cos_margin": 0.5, "mdms_margin": 0.25}):
        run, x, noise = small_run(6, False, **changes), randn(2, 3, 24, 24), randn(2, 4, 12, 12, seed=1)
        compare_step(run, x, noise, 0)


@check("step", 3)
def step_adversarial():
    """with the discriminator, from its first batch on"""
    x, noise = randn(2, 3, 24, 24), randn(2, 4, 12, 12, seed=1)
    run = small_run(0, True)
    for batch in (2, 3, 4):
        compare_step(run, x, noise, batch)
    run = small_run(0, True)
    with torch.no_grad():   # hardly a gradient: the weight of g is clamped
        run.disc.main[-1].weight.mul_(1e-6)
    compare_step(run, x, noise, 3)


@check("step", 2)
def step_terms():
    """the terms, without gradient"""
    x, noise = randn(2, 3, 24, 24), randn(2, 4, 12, 12, seed=1)
    terms, want = compare_step(small_run(6, True), x, noise, 3)
    for name in want:
        ok(name in terms, f"terms lacks {name!r}")
        value = torch.as_tensor(terms[name])
        ok(not value.requires_grad, f"terms[{name!r}] still has a gradient: detach it")
        close(value, want[name], f"terms[{name!r}]", 1e-3)


@check("step", 1)
def step_plumbing():
    """run.ddp and run.ddp_disc, and bfloat16"""
    run, dtypes = small_run(6, True, precision="bf16"), []

    def lpips(x, x_hat):
        dtypes.append((x_hat.dtype, torch.is_autocast_enabled("cpu")))
        return (x - x_hat).square().mean((1, 2, 3), keepdim=True)
    run.lpips = lpips
    train_vae.train_step(run, randn(2, 3, 24, 24), randn(2, 4, 12, 12, seed=1), 3)
    ok(len(run.ddp.calls) == 1, "the tokenizer is called once, as run.ddp")
    ok(len(run.ddp_disc.calls) == 2, "the discriminator's own step calls run.ddp_disc, on x and on x_hat")
    ok(run.ddp.calls[0], "precision bf16: run.ddp stands inside autocast(x, True)")
    ok(dtypes[0] == (torch.float32, False), "the losses are computed in float32, outside of autocast")


# --- Set 3: LightningDiT -------------------------------------------------------------------------------
exercise("3.1", "rmsnorm", "dit.py", "RMSNorm.forward", "Table 1, row 7", 10, """
    x (..., width) -> the same shape, over the last axis:

        x / sqrt(mean(x^2) + eps) * weight,    self.eps (1e-6) and self.weight (width,)

    No mean is taken away. The squares are computed in float32 whatever the type of x: in float16 those of
    numbers above 256 overflow.
    """, "x = (3, 4), weight (1, 2): mean square 12.5, root 3.5355: (0.8485, 2.2627). x = 0 gives 0.")


@check("rmsnorm", 1, public=True)
def rmsnorm_shape():
    """shape"""
    has_shape(dit.RMSNorm(8)(randn(2, 3, 8)), (2, 3, 8), "the shape of x")


@check("rmsnorm", 2, public=True)
def rmsnorm_worked_example():
    """worked example"""
    norm = dit.RMSNorm(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    close(norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), [[0.848528, 2.262742], [0.0, 0.0]],
          "x / sqrt(mean(x^2) + eps) * weight")


@check("rmsnorm", 3)
def rmsnorm_general():
    """any x, any weight"""
    norm, x = fill(dit.RMSNorm(6)), randn(2, 3, 4, 6, seed=3) + 0.5
    given, want = x.clone(), torch.empty_like(x)
    for i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        row = x[tuple(i)].double()
        want[tuple(i)] = row / math.sqrt((row @ row).item() / 6 + 1e-6) * norm.weight
    close(norm(given), want, "each row over the root of its own mean square, times weight")
    close(given, x, "x itself must not be changed")
    close(norm(1e-3 * torch.ones(1, 6)), norm.weight[None] * 0.7071068,
          "eps is added to the mean square, in the root")


@check("rmsnorm", 2)
def rmsnorm_corner():
    """float16, and the gradient"""
    norm = dit.RMSNorm(4)
    close(norm(torch.full((1, 4), 300.0, dtype=torch.float16)), torch.ones(1, 4),
          "300^2 overflows in float16: compute in float32", 2e-3)
    x = randn(2, 4).requires_grad_()
    norm(x)[:, 0].sum().backward()
    want = torch.autograd.grad((x[:, 0] / (x.square().sum(1) / 4 + 1e-6).sqrt()).sum(), x)[0]
    close(x.grad, want, "the gradient of x is off")


exercise("3.2", "swiglu", "dit.py", "SwiGLU.forward", "Table 1, row 6", 10, """
    x (B, N, D) -> (B, N, D):

        w3(silu(w1 x) * w2 x),    silu(u) = u * sigmoid(u)

    self.w12 is one linear layer for both: the first half of what it gives is w1 x, the second w2 x.
    """, "w1 x = 2, w2 x = 3, w3 the identity: 2 * 0.8808 * 3 = 5.2848.")


@check("swiglu", 1, public=True)
def swiglu_shape():
    """shape"""
    has_shape(dit.SwiGLU(8, 5)(randn(2, 3, 8)), (2, 3, 8), "the shape of x")


@check("swiglu", 2, public=True)
def swiglu_worked_example():
    """worked example"""
    layer = dit.SwiGLU(1, 1)
    with torch.no_grad():
        layer.w12.weight.copy_(torch.tensor([[2.0], [3.0]]))
        layer.w12.bias.zero_()
        layer.w3.weight.fill_(1.0)
        layer.w3.bias.zero_()
    close(layer(torch.ones(1, 1, 1)), [[[5.284782]]], "w3(silu(w1 x) * w2 x)")


@check("swiglu", 3)
def swiglu_general():
    """any weights"""
    layer, x = fill(dit.SwiGLU(6, 5)), randn(2, 3, 6, seed=7)
    w, b = layer.w12.weight, layer.w12.bias
    u, v = x @ w[:5].T + b[:5], x @ w[5:].T + b[5:]
    want = (u / (1 + (-u).exp()) * v) @ layer.w3.weight.T + layer.w3.bias
    close(layer(x), want, "SiLU on the first half of w12 x, times the second, then w3")


exercise("3.3", "angles", "dit.py", "RotaryEmbedding.__init__", "Table 1, row 8", 20, """
    The angles of 2-D RoPE for a grid of side * side tokens, row by row: token n stands at row n // side,
    column n % side. The head_dim channels are adjacent pairs (0, 1), (2, 3), ...: the first half of the PAIRS
    turns with the row, the second half with the column. With head_dim / 4 pairs an axis, pair i of an axis
    has

        angle = position * 10000^(-i / (head_dim / 4)),    i = 0, 1, ...

    and both channels of a pair have the pair's angle. After `super().__init__()` register the cosines and the
    sines of the angles, (N, head_dim) float32, as buffers "freqs_cos" and "freqs_sin".
    """, """head_dim 4,
    side 2: one pair an axis, 10000^0 = 1. Token 2 is row 1, column 0: angles (1, 1, 0, 0), cosines (0.5403,
    0.5403, 1, 1). Token 1 is row 0, column 1: angles (0, 0, 1, 1).""",
    ("Make a table (side, head_dim / 4) of position times frequency first; it serves both axes.",
     "`repeat_interleave(2, dim=1)` gives both channels of a pair the same angle."))


@check("angles", 1, public=True)
def angles_shape():
    """shape"""
    rope = dit.RotaryEmbedding(8, 3)
    names = {name for name, _ in rope.named_buffers()}
    ok({"freqs_cos", "freqs_sin"} <= names, "freqs_cos and freqs_sin are registered as buffers")
    has_shape(rope.freqs_cos, (9, 8), "(N, head_dim)")
    has_shape(rope.freqs_sin, (9, 8), "(N, head_dim)")


@check("angles", 2, public=True)
def angles_worked_example():
    """worked example"""
    rope = dit.RotaryEmbedding(4, 2)
    close(rope.freqs_cos[2], [0.540302, 0.540302, 1.0, 1.0], "token 2: row 1, column 0, cosines")
    close(rope.freqs_sin[1], [0.0, 0.0, 0.841471, 0.841471], "token 1: row 0, column 1, sines")


@check("angles", 3)
def angles_general():
    """any size"""
    for head_dim, side in ((8, 3), (16, 4)):
        rope, quarter = dit.RotaryEmbedding(head_dim, side), head_dim // 4
        for n in range(side * side):
            for c in range(head_dim):
                position = n // side if c < head_dim // 2 else n % side
                angle = position * 10000.0 ** (-((c // 2) % quarter) / quarter)
                close(rope.freqs_cos[n, c], math.cos(angle), f"cosine of token {n}, channel {c}, side {side}")
                close(rope.freqs_sin[n, c], math.sin(angle), f"sine of token {n}, channel {c}, side {side}")


exercise("3.4", "rope", "dit.py", "RotaryEmbedding.forward", "Table 1, row 8", 20, """
    x (B, heads, N, head_dim), q or k -> the same shape. Each pair of ADJACENT channels (x1, x2), that is
    (0, 1), (2, 3), ..., turns by its angle a, whose cosine and sine stand in self.freqs_cos and
    self.freqs_sin (N, head_dim), once for each of the two channels:

        (x1, x2) -> (x1 cos a - x2 sin a, x2 cos a + x1 sin a)
    """, """head_dim 4, side 2, token 2 (angle 1 for the first pair, 0 for the second): (1, 0, 1, 0) becomes
    (0.5403, 0.8415, 1, 0), and (0, 1, 0, 1) becomes (-0.8415, 0.5403, 0, 1).""",
    ("The result is x * cos + (x with each pair (x1, x2) replaced by (-x2, x1)) * sin.",
     "`x.unflatten(-1, (-1, 2))` puts the pairs on an axis of their own."), after=("angles",))


@check("rope", 1, public=True)
def rope_shape():
    """shape"""
    has_shape(dit.RotaryEmbedding(8, 3)(randn(2, 5, 9, 8)), (2, 5, 9, 8), "the shape of x")


@check("rope", 2, public=True)
def rope_worked_example():
    """worked example"""
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 2], x[0, 1, 2] = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    want = [[0.540302, 0.841471, 1.0, 0.0], [-0.841471, 0.540302, 0.0, 1.0]]
    close(dit.RotaryEmbedding(4, 2)(x)[0, :, 2], want, "token 2 turns its first pair by 1")


@check("rope", 3)
def rope_general():
    """any x"""
    rope, x = dit.RotaryEmbedding(8, 3), randn(2, 2, 9, 8)
    given = x.clone()
    angle = torch.atan2(rope.freqs_sin, rope.freqs_cos)[:, ::2]
    turned = torch.complex(x[..., ::2], x[..., 1::2]) * torch.polar(torch.ones_like(angle), angle)
    close(rope(given), torch.stack([turned.real, turned.imag], -1).flatten(-2),
          "adjacent pairs turn by their angle")
    close(given, x, "x itself must not be changed")
    q, k = randn(1, 1, 1, 8).expand(1, 1, 9, 8), randn(1, 1, 1, 8, seed=1).expand(1, 1, 9, 8)
    scores = (rope(q) @ rope(k).mT)[0, 0]
    close(scores[0, 4], scores[4, 8], "q . k depends on the distance of two tokens alone")


exercise("3.5", "modulate", "dit.py", "modulate", "Sec. 4, adaLN", 5, """
    adaLN: x (B, N, D), shift and scale (B, D) -> (B, N, D):

        x * (1 + scale) + shift

    the same scale and shift for all tokens of an image; shift may be None, for none.
    """, "x = 3, scale = 0.5, shift = 2: 6.5; without a shift 4.5.")


@check("modulate", 1, public=True)
def modulate_shape():
    """shape"""
    has_shape(dit.modulate(randn(2, 3, 4), randn(2, 4), randn(2, 4)), (2, 3, 4), "the shape of x")


@check("modulate", 2, public=True)
def modulate_worked_example():
    """worked example"""
    x, scale = torch.full((1, 1, 1), 3.0), torch.full((1, 1), 0.5)
    close(dit.modulate(x, torch.full((1, 1), 2.0), scale), [[[6.5]]], "x * (1 + scale) + shift")
    close(dit.modulate(x, None, scale), [[[4.5]]], "shift None: none")


@check("modulate", 2)
def modulate_general():
    """any x, as many images as tokens"""
    x, shift, scale = randn(3, 3, 4), randn(3, 4, seed=1), randn(3, 4, seed=2)
    given = x.clone()
    want = torch.empty_like(x)
    for b in range(3):
        for n in range(3):
            want[b, n] = x[b, n] * (1 + scale[b]) + shift[b]
    close(dit.modulate(given, shift, scale), want, "an image's scale and shift act on all of its tokens")
    close(dit.modulate(given, None, scale), want - shift[:, None], "without a shift")
    close(given, x, "x itself must not be changed")


exercise("3.6", "block", "dit.py", "Block.forward", "Sec. 4, adaLN-Zero", 15, """
    Tokens x (B, N, D), condition c (B, D) -> (B, N, D). self.adaLN_modulation(c) is (B, parts * D), cut into

        6 parts: shift1, scale1, gate1, shift2, scale2, gate2          in this order, each (B, D)
        4 parts (self.parts == 4): scale1, gate1, scale2, gate2        no shifts

        x = x + gate1 * attn(modulate(norm1(x), shift1, scale1), rope)
        x = x + gate2 * mlp(modulate(norm2(x), shift2, scale2))

    A gate is the same for all tokens of an image. Fresh weights make all of them 0: the block is the
    identity.
    """, "D = 1, x = 1, attn and mlp giving 2 and 10, gates 0.5 and 0.1: 1 + 1 + 1 = 3.",
    after=("modulate",),
    hints=("`chunk(self.parts, dim=1)` cuts; the gates need an axis for the tokens, `unsqueeze(1)`.",
           "The second line uses the x of the first."))


def give(value):
    """A network part that always gives this number."""
    class Give(nn.Module):
        def forward(self, x, rope=None):
            return torch.full_like(x, value)
    return Give()


@check("block", 1, public=True)
def block_shape():
    """shape"""
    block = dit.Block(8, 2, 2.0, False, True, True, False)
    has_shape(block(randn(2, 4, 8), randn(2, 8), None), (2, 4, 8), "the shape of x")


@check("block", 2, public=True)
def block_worked_example():
    """worked example"""
    block = dit.Block(8, 2, 2.0, False, True, True, False)
    block.attn, block.mlp = give(2.0), give(10.0)
    with torch.no_grad():
        block.adaLN_modulation[1].weight.zero_()
        gates = torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0, 0.1])
        block.adaLN_modulation[1].bias.copy_(gates.repeat_interleave(8))
    close(block(torch.ones(1, 4, 8), torch.zeros(1, 8), None), torch.full((1, 4, 8), 3.0),
          "x + gate1 * attn + gate2 * mlp")


@check("block", 4)
def block_general():
    """any weights, with and without shifts"""
    for wo_shift in (False, True):
        block, rope = fill(dit.Block(8, 2, 2.0, False, True, True, wo_shift)), dit.RotaryEmbedding(4, 2)
        x, c = randn(4, 4, 8, seed=3), randn(4, 8, seed=4)
        parts = list(block.adaLN_modulation(c).split(8, 1))
        if wo_shift:
            parts = [0 * parts[0], *parts[:2], 0 * parts[0], *parts[2:]]
        shift1, scale1, gate1, shift2, scale2, gate2 = (p[:, None].expand(4, 4, 8) for p in parts)
        want = x + gate1 * block.attn(block.norm1(x) * (1 + scale1) + shift1, rope)
        want = want + gate2 * block.mlp(block.norm2(want) * (1 + scale2) + shift2)
        given = x.clone()
        close(block(given, c, rope), want,
              f"{4 if wo_shift else 6} parts: norm, scale and shift, branch, gate, sum",
              1e-3)


exercise("3.7", "time", "dit.py", "TimestepEmbedder.forward", "Sec. 4, DiT", 15, """
    t (B,) -> (B, D): sinusoids of t, then self.mlp. With self.half = 128 frequencies:

        omega_i = 10000^(-i / 128),    i = 0, ..., 127
        waves = (cos(t omega_0), ..., cos(t omega_127), sin(t omega_0), ..., sin(t omega_127))    (B, 256)

    t is used as it comes, in float32, without a factor 1000. Before the MLP, waves get the dtype of
    self.mlp[0].weight: the model may be bfloat16.
    """, "t = 0: 128 ones, then 128 zeros. t = 1: the first cosine is 0.5403, the first sine 0.8415.")


def waves_of(embedder, t):
    """What the embedder feeds to its MLP."""
    seen = []
    embedder.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    embedder(t)
    ok(len(seen) == 1, "self.mlp is called once")
    return seen[0]


@check("time", 1, public=True)
def time_shape():
    """shape"""
    has_shape(dit.TimestepEmbedder(8)(torch.tensor([0.0, 0.3, 1.0])), (3, 8), "(B, D)")


@check("time", 2, public=True)
def time_worked_example():
    """worked example"""
    waves = waves_of(dit.TimestepEmbedder(8), torch.tensor([0.0, 1.0]))
    has_shape(waves, (2, 256), "256 waves for each time")
    close(waves[0], [1.0] * 128 + [0.0] * 128, "t = 0: cosines first, then sines")
    close(waves[1, [0, 1, 128, 129]], [0.540302, 0.597382, 0.841471, 0.801957],
          "t = 1: cosine and sine of omega_0 = 1 and omega_1 = 0.9306")


@check("time", 3)
def time_general():
    """any time, and the MLP"""
    embedder, t = fill(dit.TimestepEmbedder(8)), torch.tensor([0.013, 0.5, 0.97, 37.0, 999.0])
    omega = torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angle = t.double()[:, None] * omega
    want = torch.cat([angle.cos(), angle.sin()], 1).float()
    close(waves_of(embedder, t), want, "cos and sin of t * 10000^(-i / 128)", 1e-3)
    first, last = embedder.mlp[0], embedder.mlp[2]
    h = want @ first.weight.T + first.bias
    close(embedder(t), (h * torch.sigmoid(h)) @ last.weight.T + last.bias,
          "the waves go through self.mlp", 5e-3)


@check("time", 1)
def time_dtype():
    """a bfloat16 model"""
    try:
        embedder = dit.TimestepEmbedder(8).to(torch.bfloat16)
        want = [math.cos(999), math.cos(999 * 10000 ** (-1 / 128))]
        close(waves_of(embedder, torch.tensor([999.0]))[0, :2], want,
              "angles are computed in float32, and only the waves become bfloat16", 0.02)
    except RuntimeError as error:
        raise Wrong(f"waves must get the dtype of self.mlp[0].weight ({error})") from None


exercise("3.8", "labels", "dit.py", "LabelEmbedder.forward", "Sec. 5.4, guidance", 15, """
    y (B,) int64 -> (B, D): rows of self.embedding_table, those of dropped labels replaced by the null class,
    row self.num_classes. drop (B,) bool tells which. If drop is None: in training (self.training) each label
    is dropped by itself with probability self.dropout_prob, otherwise none is. y itself must not change.
    """,
    "10 classes, y = (3, 7), drop = (no, yes): rows 3 and 10.")


@check("labels", 1, public=True)
def labels_shape():
    """shape"""
    has_shape(dit.LabelEmbedder(10, 8, 0.1)(torch.tensor([3, 7]), None), (2, 8), "(B, D)")


@check("labels", 2, public=True)
def labels_worked_example():
    """worked example"""
    embedder = dit.LabelEmbedder(10, 1, 0.1)
    with torch.no_grad():
        embedder.embedding_table.weight.copy_(torch.arange(11.0)[:, None])
    for net in (embedder.train(), embedder.eval()):
        rows = net(torch.tensor([3, 7]), torch.tensor([False, True]))
        close(rows.flatten(), [3.0, 10.0], "what drop marks becomes the null class, in training or not")


@check("labels", 2)
def labels_draw():
    """drop not given"""
    embedder, y = dit.LabelEmbedder(10, 1, 0.3), torch.arange(10).repeat(2000)
    with torch.no_grad():
        embedder.embedding_table.weight.copy_(torch.arange(11.0)[:, None])
    dropped = (embedder.train()(y, None).flatten() == 10).float()
    close(dropped.mean(), 0.3, "in training a share dropout_prob becomes the null class", 0.02)
    close(dropped.view(2000, 10).mean(0), [0.3] * 10, "each label by itself", 0.06)
    kept = embedder(y, None).flatten()
    ok(bool(((kept == 10) | (kept == y)).all()), "labels that are kept stay what they are")
    close(embedder.eval()(y, None).flatten(), y.double(), "not in training nothing is dropped")
    close(dit.LabelEmbedder(10, 1, 0.0).train()(y, None).shape, [20000, 1],
          "dropout_prob 0: nothing is dropped")


@check("labels", 1)
def labels_unchanged():
    """any drop; y stays"""
    embedder, y, drop = dit.LabelEmbedder(10, 4, 0.1), torch.arange(6), torch.arange(6) % 3 == 0
    given = y.clone()
    rows = embedder(given, drop)
    table = embedder.embedding_table.weight
    close(rows, torch.stack([table[10 if d else c] for c, d in zip(y.tolist(), drop.tolist())]), "row by row")
    close(given, y, "y itself must not be changed")
    rows.sum().backward()
    ok(table.grad is not None, "gradients must reach the table")


exercise("3.9", "unpatchify", "dit.py", "LightningDiT.unpatchify", "Sec. 5.1, patch size", 15, """
    x (B, N, p*p*C), one row a token -> (B, C, S, S), S = side * p, side = sqrt(N), p = self.patch_size, C =
    self.in_channels. Tokens come row by row: token n is the patch in row n // side, column n % side. Within a
    token the values are ordered by (row in the patch, column in the patch, channel), the channel fastest.
    """, "p = 2, C = 1, one token (1, 2, 3, 4): the image ((1, 2), (3, 4)).",
    ("Give each of the six axes a name: B, row, column, row in the patch, column in the patch, channel.",
     "view as (B, side, side, p, p, C), permute to (B, C, side, p, side, p), then reshape."))


def small_dit(patch, channels, side):
    return dit.LightningDiT(input_size=side * patch, patch_size=patch, in_channels=channels, hidden_size=8,
                            depth=1, num_heads=2, num_classes=3)


@check("unpatchify", 1, public=True)
def unpatchify_shape():
    """shape"""
    has_shape(small_dit(2, 3, 4).unpatchify(randn(2, 16, 12)), (2, 3, 8, 8), "(B, C, S, S)")


@check("unpatchify", 2, public=True)
def unpatchify_worked_example():
    """worked example"""
    got = small_dit(2, 1, 1).unpatchify(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))
    close(got, [[[[1.0, 2.0], [3.0, 4.0]]]], "the values of a token, row by row")
    got = small_dit(1, 1, 2).unpatchify(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]))
    close(got, [[[[1.0, 2.0], [3.0, 4.0]]]], "the tokens, row by row")


@check("unpatchify", 3)
def unpatchify_general():
    """any sizes"""
    for p, channels, side in ((2, 3, 3), (1, 5, 4), (3, 2, 2)):
        x = randn(2, side * side, p * p * channels)
        want = torch.zeros(2, channels, side * p, side * p)
        for n in range(side * side):
            for i in range(p):
                for j in range(p):
                    place = (i * p + j) * channels
                    want[:, :, n // side * p + i, n % side * p + j] = x[:, n, place:place + channels]
        close(small_dit(p, channels, side).unpatchify(x), want,
              f"p = {p}, C = {channels}: the channel is fastest")


exercise("3.10", "sincos", "dit.py", "sincos_pos_embed", "Sec. 4, DiT", 15, """
    DiT's fixed positions of side * side tokens, row by row -> (1, N, dim) float32. With q = dim / 4 and
    omega_i = 10000^(-i / q), i = 0, ..., q - 1, the four quarters of token (row, column) are

        sin(column * omega), cos(column * omega), sin(row * omega), cos(row * omega)

    The COLUMN comes first. (RoPE, two exercises up, has the row first: so do the authors.)
    """, "dim 4, side 2, token 1 (row 0, column 1): (0.8415, 0.5403, 0, 1).", after=("angles",))


@check("sincos", 1, public=True)
def sincos_shape():
    """shape"""
    has_shape(dit.sincos_pos_embed(8, 3), (1, 9, 8), "(1, N, dim)")


@check("sincos", 2, public=True)
def sincos_worked_example():
    """worked example"""
    got = dit.sincos_pos_embed(4, 2)[0]
    close(got[1], [0.841471, 0.540302, 0.0, 1.0], "token 1: row 0, column 1")
    close(got[2], [0.0, 1.0, 0.841471, 0.540302], "token 2: row 1, column 0")


@check("sincos", 3)
def sincos_general():
    """any size"""
    for dim, side in ((8, 3), (16, 4)):
        q, want = dim // 4, []
        for n in range(side * side):
            row, column = divmod(n, side)
            for wave, place in ((math.sin, column), (math.cos, column), (math.sin, row), (math.cos, row)):
                want += [wave(place * 10000.0 ** (-i / q)) for i in range(q)]
        got = dit.sincos_pos_embed(dim, side)
        close(got, torch.tensor(want).view(1, side * side, dim),
              f"dim {dim}, side {side}: sin, cos of the column, then of the row")
        ok(got.dtype == torch.float32, "float32")


# --- Set 4: training -----------------------------------------------------------------------------------
exercise("4.1", "lognorm", "train_dit.py", "sample_time", "Table 1, row 4", 10, """
    n times in (0, 1), (n,) float32 on `device`, drawn with `generator` (torch.Generator) alone.

        lognorm: t = sigmoid(u), u standard normal;    otherwise t uniform
    """, "u = 0 gives 0.5; half of all times lie between sigmoid(-0.6745) = 0.3375 and 0.6625.")


@check("lognorm", 1, public=True)
def lognorm_shape():
    """shape"""
    for lognorm in (True, False):
        t = train_dit.sample_time(50, lognorm, torch.Generator().manual_seed(0), torch.device("cpu"))
        has_shape(t, (50,), "n times")
        ok(0 < t.min() and t.max() < 1, "times lie between 0 and 1")


@check("lognorm", 2)
def lognorm_normal():
    """logit-normal"""
    t = train_dit.sample_time(40000, True, torch.Generator().manual_seed(0), torch.device("cpu"))
    share = [(t < v).float().mean() for v in (0.125, 0.3375, 0.5, 0.6625, 0.875)]
    close(torch.stack(share), [0.0258, 0.25, 0.5, 0.75, 0.9742],
          "the share of times below 0.125, 0.34, 0.5, 0.66, 0.88", 0.012)


@check("lognorm", 1)
def lognorm_uniform():
    """uniform"""
    t = train_dit.sample_time(40000, False, torch.Generator().manual_seed(0), torch.device("cpu"))
    share = [(t < v).float().mean() for v in (0.1, 0.25, 0.5, 0.75, 0.9)]
    close(torch.stack(share), [0.1, 0.25, 0.5, 0.75, 0.9],
          "the share of times below 0.1, 0.25, 0.5, 0.75, 0.9", 0.012)


@check("lognorm", 2)
def lognorm_generator():
    """the generator decides"""
    for lognorm in (True, False):
        draws = []
        for seed, noise in ((0, 1), (0, 2), (1, 1)):
            torch.manual_seed(noise)
            generator = torch.Generator().manual_seed(seed)
            draws.append(train_dit.sample_time(9, lognorm, generator, torch.device("cpu")))
        ok(torch.equal(draws[0], draws[1]),
           "the same generator must give the same times, whatever torch's own seed")
        ok(not torch.equal(draws[0], draws[2]), "another generator must give other times")


exercise("4.2", "flow", "train_dit.py", "flow_matching_loss", "Table 1, rows 1 and 5", 20, """
    x1 (B, C, H, W) data, x0 like it noise, t (B,): t = 0 is noise, t = 1 is data.

        x_t = t x1 + (1 - t) x0,    v = x1 - x0,    pred = model(x_t, t, y, drop)
        mse[b] = mean over C, H, W of (pred - v)^2
        direction[b] = mean over H, W of 1 - cos(pred, v), the cosine over the C channels at each position

    Return (loss, {"mse": (B,), "direction": (B,)}): loss is the mean of mse over the batch, plus that of
    direction if `direction` is true. The dictionary holds both terms either way.
    """, """C = 2, one position,
    x1 = (3, 0), x0 = (1, 2): v = (2, -2). At t = 0.25 x_t = (1.5, 1.5). If pred = (2, 2): mse = (0 + 16) / 2
    = 8, cosine 0, direction 1, loss 9.""",
    ("t must stand on the axis of the batch: t.view(-1, 1, 1, 1).",
     "`F.cosine_similarity(pred, v, dim=1)` is (B, H, W)."))


@check("flow", 1, public=True)
def flow_shape():
    """shape"""
    def model(x, t, y, drop=None):
        return 0.5 * x
    t, y = torch.tensor([0.2, 0.9]), torch.tensor([0, 1])
    loss, terms = train_dit.flow_matching_loss(model, randn(2, 3, 4, 5), y, t, randn(2, 3, 4, 5, seed=1))
    has_shape(loss, (), "loss is one number")
    for name in ("mse", "direction"):
        has_shape(terms[name], (2,), f"terms[{name!r}] has one number for each latent")


@check("flow", 3, public=True)
def flow_worked_example():
    """worked example"""
    seen = []

    def model(x, t, y, drop=None):
        seen.append(x.flatten())
        return torch.full_like(x, 2.0)
    x1, x0 = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1), torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    loss, terms = train_dit.flow_matching_loss(model, x1, torch.tensor([0]), torch.tensor([0.25]), x0)
    close(seen[0], [1.5, 1.5], "the model sees x_t = t x1 + (1 - t) x0: t = 1 is data")
    close(terms["mse"], [8.0], "mean of (pred - v)^2, v = x1 - x0")
    close(terms["direction"], [1.0], "1 - cosine over channels")
    close(loss, 9.0, "mse + direction")


@check("flow", 4)
def flow_general():
    """any batch"""
    x1, x0 = randn(3, 4, 2, 5), randn(3, 4, 2, 5, seed=1)
    t, y = torch.tensor([0.1, 0.5, 0.8]), torch.tensor([2, 0, 1])
    drop, w, seen = torch.tensor([True, False, True]), torch.tensor(0.7, requires_grad=True), []

    def model(x, t, y, drop=None):
        seen.append((x, t, y, drop))
        return w * x.roll(1, 1) + 0.1 * y.view(-1, 1, 1, 1)
    loss, terms = train_dit.flow_matching_loss(model, x1.clone(), y, t, x0.clone(), drop)
    mse, direction = [], []
    for b in range(3):
        pred, v = model(t[b] * x1[b:b + 1] + (1 - t[b]) * x0[b:b + 1], None, y[b:b + 1])[0], x1[b] - x0[b]
        mse.append((pred - v).square().sum() / 40)
        cosine = (pred * v).sum(0) / pred.square().sum(0).sqrt() / v.square().sum(0).sqrt()
        direction.append(1 - cosine.sum() / 10)
    close(terms["mse"], torch.stack(mse), "mse of each latent")
    close(terms["direction"], torch.stack(direction), "direction of each latent: the cosine is over channels")
    want = (sum(mse) + sum(direction)) / 3
    close(loss, want, "loss = mean of mse + mean of direction")
    ok(loss.requires_grad, "gradients must reach the model")
    close(torch.autograd.grad(loss, w)[0], torch.autograd.grad(want, w)[0],
          "the gradient of the model's weight is off")
    close(seen[0][1], t, "the model gets t as it is, (B,)")
    close(seen[0][2], y, "the model gets y as it is")
    ok(seen[0][3] is drop or (seen[0][3] is not None and torch.equal(seen[0][3], drop)),
       "the model gets drop")


@check("flow", 1)
def flow_without():
    """without the direction loss"""
    def model(x, t, y, drop=None):
        return 0.5 * x
    t, y = torch.tensor([0.2, 0.9]), torch.tensor([0, 1])
    args = (model, randn(2, 3, 4, 5), y, t, randn(2, 3, 4, 5, seed=1))
    loss, terms = train_dit.flow_matching_loss(*args, direction=False)
    close(loss, terms["mse"].mean(), "direction=False: the loss is that of mse alone")
    both, with_it = train_dit.flow_matching_loss(*args)
    close(terms["direction"], with_it["direction"], "the direction term is returned either way")
    close(both - loss, terms["direction"].mean(), "direction=True adds the direction term with weight 1")


exercise("4.3", "alphas", "train_dit.py", "ddpm_alphas", "Table 1, row 0", 10, """
    alpha_bar of DDPM's linear schedule, (1000,) float64 on `device`: beta_k goes in equal steps from 1e-4 (k
    = 0) to 0.02 (k = 999), both included, and alpha_bar_k is the product of 1 - beta_i over all i <= k.
    """,
    "alpha_bar_0 = 0.9999, alpha_bar_1 = 0.9999 * (1 - 0.00011992) = 0.99978009, alpha_bar_999 = 4e-5.")


@check("alphas", 1, public=True)
def alphas_shape():
    """shape"""
    a = train_dit.ddpm_alphas(torch.device("cpu"))
    has_shape(a, (1000,), "one number a step")
    ok(a.dtype == torch.float64, "float64: 1000 factors near 1 would collect float32's rounding")


@check("alphas", 2, public=True)
def alphas_worked_example():
    """worked example"""
    a = train_dit.ddpm_alphas(torch.device("cpu"))
    close(a[:2], [0.9999, 0.99978009], "the first two", 1e-7)
    close(1e4 * a[999], 0.40358, "the last, times 10,000", 1e-3)


@check("alphas", 2)
def alphas_general():
    """all of them"""
    want, product = [], 1.0
    for k in range(1000):
        product *= 1 - (1e-4 + k * (0.02 - 1e-4) / 999)
        want.append(product)
    close(train_dit.ddpm_alphas(torch.device("cpu")), torch.tensor(want, dtype=torch.float64),
          "alpha_bar", 1e-7)


exercise("4.4", "ddpm", "train_dit.py", "ddpm_loss", "Table 1, row 0", 20, """
    Noise prediction. The arguments and the result are those of flow_matching_loss; t = 1 is data here, too.

        k = floor(1000 (1 - t)), at most 999                 DDPM's step, 0 = least noise, (B,)
        x_k = sqrt(a) x1 + sqrt(1 - a) x0,    a = alpha_bar_k = ddpm_alphas(device)[k]
        pred = model(x_k, k as float32, y, drop)
        mse[b] = mean over C, H, W of (pred - x0)^2

    Return (mean of mse, {"mse": mse (B,), "direction": zeros (B,)}).
    """, "t = 0.5: k = 500, a = 0.0778: x_k = 0.279 x1 + 0.9603 x0. t = 0: 1000 becomes k = 999.",
    after=("alphas", "flow"))


@check("ddpm", 1, public=True)
def ddpm_shape():
    """shape"""
    def model(x, t, y, drop=None):
        return 0.5 * x
    t, y = torch.tensor([0.2, 0.9]), torch.tensor([0, 1])
    loss, terms = train_dit.ddpm_loss(model, randn(2, 3, 4, 5), y, t, randn(2, 3, 4, 5, seed=1))
    has_shape(loss, (), "loss is one number")
    has_shape(terms["mse"], (2,), "terms['mse'] has one number for each latent")
    close(terms["direction"], [0.0, 0.0], "terms['direction'] is 0 for each latent")


@check("ddpm", 2, public=True)
def ddpm_worked_example():
    """worked example"""
    seen = []

    def model(x, t, y, drop=None):
        seen.append((x.flatten(), t))
        return torch.zeros_like(x)
    x1, x0 = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1, 1), torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)
    loss, _ = train_dit.ddpm_loss(model, x1, torch.tensor([0, 0, 0]), torch.tensor([0.5, 0.5, 0.0]), x0)
    close(seen[0][1], [500.0, 500.0, 999.0], "the model gets k = floor(1000 (1 - t)), at most 999")
    close(seen[0][0], [0.278951, 0.960305, 1.99996], "the model sees sqrt(a) x1 + sqrt(1 - a) x0", 1e-3)
    close(loss, 5 / 3, "mean of (pred - x0)^2: the noise is what is predicted")


@check("ddpm", 3)
def ddpm_general():
    """any batch"""
    x1, x0 = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1)
    t, y = torch.tensor([0.0, 0.1234, 0.7777, 1.0]), torch.arange(4)
    drop, w, seen = torch.tensor([True, False, True, False]), torch.tensor(0.7, requires_grad=True), []

    def model(x, t, y, drop=None):
        seen.append((x.detach(), t, y, drop))
        return w * x.roll(1, 1) + 0.001 * t.view(-1, 1, 1, 1)
    loss, terms = train_dit.ddpm_loss(model, x1, y, t, x0, drop)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    steps, noisy = [999, 876, 222, 0], []
    for b, k in enumerate(steps):
        a = math.prod((1 - beta[:k + 1]).tolist())
        noisy.append(math.sqrt(a) * x1[b] + math.sqrt(1 - a) * x0[b])
    close(seen[0][1].double(), [float(k) for k in steps], "k of t = 0, 0.1234, 0.7777, 1")
    close(seen[0][0], torch.stack(noisy), "sqrt(alpha_bar_k) x1 + sqrt(1 - alpha_bar_k) x0", 1e-3)
    mse = (model(torch.stack(noisy), torch.tensor(steps), y) - x0).square().sum((1, 2, 3)) / 12
    close(terms["mse"], mse, "mse of each latent", 1e-3)
    close(loss, mse.mean(), "the mean over the batch", 1e-3)
    ok(loss.requires_grad, "gradients must reach the model")
    close(torch.autograd.grad(loss, w)[0], torch.autograd.grad(mse.mean(), w)[0],
          "the gradient of the model's weight is off", 1e-3)
    ok(seen[0][2] is y or torch.equal(seen[0][2], y), "the model gets y")
    ok(seen[0][3] is not None and torch.equal(seen[0][3], drop), "the model gets drop")


exercise("4.5", "ddpm_v", "train_dit.py", "ddpm_velocity", "Table 1, row 0", 30, """
    A noise predictor model(x, k, y) -> a function velocity(x, t, y) for rectified flow's x_t = t x1 + (1 - t)
    x0. DDPM's x_k = sqrt(a) x1 + sqrt(1 - a) x0, a = alpha_bar_k, is x_t at another scale:

        t_k = sqrt(a) / (sqrt(a) + sqrt(1 - a)),    x_k = x_t / sqrt(t^2 + (1 - t)^2) at t = t_k

    For t (B,): clamp it to [t_999, t_0]; let k (B,), a float, be the step whose t_k is t, linearly
    interpolated between the two neighbouring steps; then, all with the clamped t and float32 results,

        eps = model(x / sqrt(t^2 + (1 - t)^2), k, y)
        v = (x - eps) / t
    """, """t = 0.2251 is t_500: k = 500; x is divided by sqrt(0.2251^2 + 0.7749^2) = 0.8069. x = 1, eps = 0.5
    there: v = 0.5 / 0.2251 = 2.221.""",
    ("t_k falls with k: flip the table of the 1000 t_k before `torch.searchsorted`, and count k back.",
     """With g the flipped table and g[i - 1] <= t <= g[i]: the position in it is
     i - 1 + (t - g[i - 1]) / (g[i] - g[i - 1]), and k = 999 minus that."""), after=("alphas", "ddpm"))


def ddpm_times():
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return a, a.sqrt() / (a.sqrt() + (1 - a).sqrt())


@check("ddpm_v", 1, public=True)
def ddpm_v_shape():
    """shape"""
    velocity = train_dit.ddpm_velocity(lambda x, t, y: 0.5 * x)
    has_shape(velocity(randn(2, 3, 4, 5), torch.tensor([0.2, 0.7]), torch.tensor([0, 1])), (2, 3, 4, 5),
              "shaped like x")


@check("ddpm_v", 3, public=True)
def ddpm_v_worked_example():
    """worked example"""
    seen = []

    def model(x, t, y):
        seen.append((x.flatten(), t))
        return torch.full_like(x, 0.5)
    v = train_dit.ddpm_velocity(model)(torch.ones(1, 1, 1, 1), torch.tensor([0.225083]), torch.tensor([0]))
    close(seen[0][1].double(), [500.0], "k of t = 0.2251", 1e-3)
    close(seen[0][0], [1.239254], "x over sqrt(t^2 + (1 - t)^2)", 1e-3)
    close(v.flatten(), [2.221402], "v = (x - eps) / t", 1e-3)


@check("ddpm_v", 4)
def ddpm_v_general():
    """a perfect noise predictor gives x1 - x0"""
    a, times = ddpm_times()
    x1, x0, y, seen = randn(5, 2, 3, 3), randn(5, 2, 3, 3, seed=1), torch.arange(5), []

    def model(x, t, y):
        seen.append((x, t, y))
        return x0
    steps = torch.tensor([20, 300, 500, 700, 900])
    for between in (0.0, 0.5):
        t = torch.lerp(times[steps], times[steps + 1], between).float()
        x_t = torch.stack([c * p + (1 - c) * n for c, p, n in zip(t, x1, x0)])
        v = train_dit.ddpm_velocity(model)(x_t, t, y)
        close(v, x1 - x0, "with the right noise, v is x1 - x0", 5e-3)
        got = seen.pop()
        close(got[1].double(), steps + between, "k is interpolated between the neighbouring steps", 1e-4)
        if not between:
            want = torch.stack([a[k].sqrt() * p + (1 - a[k]).sqrt() * n for k, p, n in zip(steps, x1, x0)])
            close(got[0], want, "the model sees DDPM's x_k", 1e-3)
        close(got[2], y, "the model gets y")


@check("ddpm_v", 2)
def ddpm_v_corner():
    """the ends of the schedule"""
    _, times = ddpm_times()
    ends, seen = torch.stack([times[999], times[0]]).view(2, 1, 1, 1), []

    def model(x, t, y):
        seen.append((x, t))
        return 0.25 * torch.ones_like(x)
    x = randn(2, 2, 2, 2)
    v = train_dit.ddpm_velocity(model)(x, torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    close(seen[0][1].double(), [999.0, 0.0], "t = 0 is step 999, t = 1 is step 0", 1e-4)
    close(v, (x.double() - 0.25) / ends, "t is clamped to the schedule's ends before all else", 1e-3)
    close(seen[0][0], x / (ends ** 2 + (1 - ends) ** 2).sqrt(), "the scale is that of the clamped t", 1e-3)


exercise("4.6", "ema", "train_dit.py", "update_ema", "Sec. 4, EMA", 10, """
    averages and weights, two lists of tensors alike: change each average IN PLACE to

        decay * average + (1 - decay) * weight

    The weights stay as they are, and no gradient flows (inside torch.no_grad). Nothing is returned.
    """, "average 1, weight 3, decay 0.9: 1.2; once more 1.38.")


@check("ema", 2, public=True)
def ema_worked_example():
    """worked example"""
    average, weight = torch.tensor([1.0]), torch.tensor([3.0])
    train_dit.update_ema([average], [weight], 0.9)
    close(average, [1.2], "decay * average + (1 - decay) * weight, in place")
    train_dit.update_ema([average], [weight], 0.9)
    close(average, [1.38], "a second step goes on from the first")
    close(weight, [3.0], "the weights stay")


@check("ema", 2)
def ema_general():
    """networks, of several tensors"""
    nets = [fill(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), seed=s) for s in (0, 9)]
    averages, weights = (list(net.parameters()) for net in nets)
    for p in averages:
        p.requires_grad_(False)
    want = [0.75 * a.detach() + 0.25 * w.detach() for a, w in zip(averages, weights)]
    places = [a.data_ptr() for a in averages]
    before = [w.detach().clone() for w in weights]
    try:
        train_dit.update_ema(averages, weights, 0.75)
    except RuntimeError as error:
        raise Wrong(f"no gradient may flow: use torch.no_grad ({error})") from None
    for a, b, w, c in zip(averages, want, weights, before):
        close(a, b, "every tensor of the list is averaged")
        close(w, c, "the weights stay")
    ok(places == [a.data_ptr() for a in averages], "the averages are changed in place")
    ok(not any(a.requires_grad for a in averages), "the averages carry no gradient")


exercise("4.7", "batches", "train_vae.py", "batch_indices", "ours", 15, """
    Indices (batch_size,) of training step `step` (from 0) over n images, a function of the arguments alone:
    write the orders of epochs 0, 1, 2, ... one behind the other, epoch_order(n, seed, epoch) each (a
    permutation of 0, ..., n - 1, int64, given in the same file), and cut this sequence into pieces of
    batch_size. A batch may reach over the border of two epochs, or hold several whole epochs.
    """, "n = 3, batch_size = 2, orders (2, 0, 1) and (1, 2, 0): steps 0, 1, 2 are (2, 0), (1, 1), (2, 0).",
    ("Step s starts at number s * batch_size of the sequence: divmod by n gives epoch and place.",))


@check("batches", 1, public=True)
def batches_shape():
    """shape"""
    for n, size in ((10, 4), (3, 8)):
        got = train_vae.batch_indices(n, size, 5, 0)
        has_shape(got, (size,), f"batch_size indices, n = {n}")
        ok(0 <= got.min() and got.max() < n, "indices from 0 to n - 1")


@check("batches", 2, public=True)
def batches_epoch():
    """an epoch holds each image once"""
    seen = torch.cat([train_vae.batch_indices(10, 4, step, 0) for step in range(5)])
    close(seen[:10].sort().values, list(range(10)), "the first 10 indices are 0 to 9, each once")
    close(seen[10:].sort().values, list(range(10)), "and so are the next 10, over the border of two epochs")


@check("batches", 4)
def batches_general():
    """any step, any size"""
    for n, size, seed in ((10, 4, 0), (7, 7, 1), (5, 13, 2), (100, 1, 3)):
        orders = torch.cat([train_vae.epoch_order(n, seed, epoch).clone() for epoch in range(40)])
        for step in (0, 1, 2, 5, 14, 3, 0):
            close(train_vae.batch_indices(n, size, step, seed), orders[step * size:(step + 1) * size],
                  f"n = {n}, batch_size = {size}, step {step}: a piece of the epochs' orders")
        close(train_vae.epoch_order(n, seed, 0), orders[:n], "the orders themselves must not be changed")


# --- Set 5: sampling -----------------------------------------------------------------------------------
exercise("5.1", "shift", "sample.py", "shift_timesteps", "Sec. 5.4", 5, """
    Times t in [0, 1], a tensor of any shape or a number -> the same:

        t' = s t / (1 + (s - 1) t),    s = shift

    0 and 1 stay; s < 1 moves times towards 0, which is noise here.
    """, "s = 0.3, t = 0.5: 0.15 / 0.65 = 0.2308. s = 1 changes nothing.")


@check("shift", 2, public=True)
def shift_worked_example():
    """worked example"""
    t = torch.tensor([0.0, 0.5, 1.0])
    close(sample.shift_timesteps(t, 0.3), [0.0, 0.230769, 1.0], "s t / (1 + (s - 1) t)")
    close(sample.shift_timesteps(t, 1.0), [0.0, 0.5, 1.0], "s = 1 changes nothing")
    close(sample.shift_timesteps(0.5, 0.3), 0.230769, "a number, too")


@check("shift", 2)
def shift_general():
    """any time and shift"""
    t = torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4)
    for s in (0.3, 0.5, 3.3):
        want = [[s * v / (1 + (s - 1) * v) for v in row] for row in t.tolist()]
        close(sample.shift_timesteps(t.clone(), s), torch.tensor(want, dtype=torch.float64),
              f"shift {s}", 1e-6)


exercise("5.2", "grid", "sample.py", "time_grid", "Sec. 5.4", 5, """
    The times of the integrator, (s.steps,) float64: s.steps equally spaced POINTS from 0 to 1, both included,
    moved by shift_timesteps with s.shift. (250 points are 249 steps.)
    """, "steps 3, shift 0.3: 0, 0.2308, 1.", after=("shift",))


@check("grid", 2, public=True)
def grid_worked_example():
    """worked example"""
    got = sample.time_grid(types.SimpleNamespace(steps=3, shift=0.3))
    close(got, [0.0, 0.230769, 1.0], "three points, shifted")
    ok(got.dtype == torch.float64, "float64")


@check("grid", 2)
def grid_general():
    """any number of points"""
    for steps, shift in ((2, 1.0), (5, 1.0), (250, 0.3)):
        want = [i / (steps - 1) for i in range(steps)]
        want = [shift * v / (1 + (shift - 1) * v) for v in want]
        got = sample.time_grid(types.SimpleNamespace(steps=steps, shift=shift))
        close(got, torch.tensor(want, dtype=torch.float64), f"{steps} points, shift {shift}", 1e-6)


exercise("5.3", "euler", "sample.py", "euler", "Sec. 5.4", 5, """
    Solve dx/dt = velocity(x, t) from x (B, ...) at time ts[0] over the N times ts (a tensor, not equally
    spaced) and return x at ts[-1]. One evaluation a step, at its LEFT end, so N - 1 in all:

        x_{i+1} = x_i + (t_{i+1} - t_i) velocity(x_i, t_i)

    The x that is given must not change.
    """, "velocity = x, ts = (0, 0.5, 1), x = 1: 1.5, then 2.25. velocity = t: 0 + 0.25 = 0.25 more.")


@check("euler", 2, public=True)
def euler_worked_example():
    """worked example"""
    ts = torch.tensor([0.0, 0.5, 1.0])
    close(sample.euler(lambda x, t: x, torch.ones(1), ts), [2.25], "velocity = x")
    close(sample.euler(lambda x, t: t * torch.ones(1), torch.zeros(1), ts), [0.25],
          "velocity = t, at the left end")


def integrate(step, velocity, x, ts):
    x, ts = x.double(), ts.tolist()
    for i in range(len(ts) - 1):
        x = step(velocity, x, ts[i], ts[i + 1] - ts[i])
    return x


@check("euler", 3)
def euler_general():
    """any velocity, any grid"""
    ts, x, times = torch.tensor([0.0, 0.1, 0.15, 0.6, 1.0], dtype=torch.float64), randn(2, 3, 2, 2), []
    given = x.clone()

    def velocity(x, t):
        times.append(float(t))
        return x * x - 3 * float(t) + 0.5
    got = sample.euler(velocity, given, ts)
    close(times, ts[:-1], "evaluated once a step, at the times ts[0], ..., ts[-2]")
    want = integrate(lambda v, x, t, h: x + h * v(x, t), velocity, x, ts)
    close(got, want, "x + (t_next - t) * velocity(x, t), step by step")
    close(given, x, "x itself must not be changed")


exercise("5.4", "heun", "sample.py", "heun", "ours", 10, """
    As euler, but by the trapezoid rule, two evaluations a step, 2 (N - 1) in all:

        v = velocity(x_i, t_i)
        x_euler = x_i + (t_{i+1} - t_i) v
        x_{i+1} = x_i + (t_{i+1} - t_i) (v + velocity(x_euler, t_{i+1})) / 2
    """, "velocity = x, ts = (0, 1), x = 1: v = 1, x_euler = 2, so 1 + (1 + 2) / 2 = 2.5.",
    after=("euler",))


@check("heun", 2, public=True)
def heun_worked_example():
    """worked example"""
    ts = torch.tensor([0.0, 1.0])
    close(sample.heun(lambda x, t: x, torch.ones(1), ts), [2.5], "velocity = x")
    close(sample.heun(lambda x, t: t ** 2 * torch.ones(1), torch.zeros(1), ts), [0.5],
          "velocity = t^2: both ends count")


@check("heun", 4)
def heun_general():
    """any velocity, any grid"""
    ts, x, times = torch.tensor([0.0, 0.1, 0.15, 0.6, 1.0], dtype=torch.float64), 0.5 * randn(2, 3, 2, 2), []
    given = x.clone()

    def velocity(x, t):
        times.append(float(t))
        return x * x - 3 * float(t) + 0.5

    def step(v, x, t, h):
        first = v(x, t)
        return x + h / 2 * (first + v(x + h * first, t + h))
    got = sample.heun(velocity, given, ts)
    close(sorted(times), sorted([*ts[:-1].tolist(), *ts[1:].tolist()]), "each step looks at both of its ends")
    close(got, integrate(step, velocity, x, ts),
          "x + (t_next - t) * mean of the two velocities, step by step")
    close(given, x, "x itself must not be changed")


exercise("5.5", "guidance", "sample.py", "guided_velocity", "Sec. 5.4, cfg interval", 20, """
    Classifier-free guidance: x (B, C, H, W), one time t for the batch (a number or a 0-d tensor), classes y
    (B,) -> velocity shaped like x. model(x, times, y) gives one for times (B,), all equal to t, of x's dtype
    and device. The null class is `null_class`, or model.num_classes if that is None.

        v_class = model(x, times, y),    v_null = model(x, times, null class for all)
        v = v_null + scale * (v_class - v_null)     on the first `channels` channels (None: on all)
        v = v_class                                 on the others

    If scale is 1 or t < interval_start: v = v_class, and v_null is not computed. At t = interval_start there
    is guidance. One call of the model on (2B, ...) or two on (B, ...): as you like.
    """, """v_class = 2, v_null = 1, scale 3: 1 + 3 * 1 = 4. With channels = 1 of 2: (4, 2). With
    interval_start = 0.5 and t = 0.4: 2.""",
    ("`torch.full_like(y, null)` are the null classes, `torch.full((len(x),), float(t))` the times.",
     "Guide all channels, then put v_class back from channel `channels` on."))


def class_model(seen):
    """Velocity = class + 1 everywhere, the null class (9) gives 1; it notes its arguments."""
    class Model:
        num_classes = 9

        def __call__(self, x, t, y):
            seen.append((x, t, y))
            v = torch.where(y == 9, 0, y).to(x.dtype) + 1
            return v.view(-1, 1, 1, 1).expand(x.shape).clone()
    return Model()


@check("guidance", 1, public=True)
def guidance_shape():
    """shape"""
    v = sample.guided_velocity(class_model([]), randn(2, 3, 4, 5), 0.5, torch.tensor([1, 2]), 3.0)
    has_shape(v, (2, 3, 4, 5), "shaped like x")


@check("guidance", 3, public=True)
def guidance_worked_example():
    """worked example"""
    x, y = torch.zeros(1, 2, 1, 1), torch.tensor([1])
    v = sample.guided_velocity(class_model([]), x, 0.4, y, 3.0)
    close(v.flatten(), [4.0, 4.0], "v_null + scale * (v_class - v_null)")
    v = sample.guided_velocity(class_model([]), x, 0.4, y, 3.0, channels=1)
    close(v.flatten(), [4.0, 2.0], "the first channel is guided, the second is v_class")
    v = sample.guided_velocity(class_model([]), x, 0.4, y, 3.0, interval_start=0.5)
    close(v.flatten(), [2.0, 2.0], "before interval_start: v_class")


@check("guidance", 4)
def guidance_general():
    """any model, null class, number of channels"""
    x, y, w = randn(3, 4, 2, 2), torch.tensor([0, 2, 5]), randn(4, 4, seed=1)
    given, ys, ts = x.clone(), [], []

    class Model:
        num_classes = 9

        def __call__(self, x, t, y):
            ys.extend(y.tolist())
            ts.extend(t.tolist())
            return torch.einsum("oc,bchw->bohw", w, x) * (1 + y + t).view(-1, 1, 1, 1)
    number = torch.tensor(0.3)
    for null, t, channels in ((None, number, None), (7, 0.3, 3), (7, number, 1), (None, 0.3, 4)):
        ys.clear(), ts.clear()
        model = Model()
        want = torch.empty_like(x)
        for b in range(3):
            for c in range(4):
                u = (w[c] @ x[b].flatten(1)).view(2, 2)
                v, v_null = u * (1 + y[b] + 0.3), u * (1 + (9 if null is None else null) + 0.3)
                guided = v_null + 2.5 * (v - v_null)
                want[b, c] = guided if channels is None or c < channels else v
        got = sample.guided_velocity(model, given, t, y, 2.5, null, 0.3 if channels == 3 else 0.0, channels)
        close(got, want, f"null class {null}, channels {channels}: guided first, v_class on the rest", 1e-3)
        close(ts, [0.3] * len(ts), "the model gets t for each of its rows")
        ok(sorted(ys) == sorted([0, 2, 5] + 3 * [9 if null is None else null]),
           "the model sees each class and the null class")
    close(given, x, "x itself must not be changed")
    ok(y.tolist() == [0, 2, 5], "y itself must not be changed")


@check("guidance", 3)
def guidance_interval():
    """the interval, and scale 1"""
    x, y = randn(2, 3, 2, 2), torch.tensor([1, 4])
    plain = torch.tensor([2.0, 5.0]).view(2, 1, 1, 1).expand(x.shape)
    for scale, t, start, guided in ((3.0, 0.25, 0.25, True), (3.0, 0.2, 0.25, False),
                                    (3.0, torch.tensor(0.2), 0.25, False),
                                    (1.0, 0.9, 0.25, False), (0.0, 0.9, 0.25, True)):
        seen = []
        v = sample.guided_velocity(class_model(seen), x, t, y, scale, interval_start=start)
        close(v, 1 + scale * (plain - 1) if guided else plain,
              f"scale {scale}, t = {float(t):.2f}, interval from {start}")
        rows = sum(len(call[2]) for call in seen)
        ok(rows == (4 if guided else 2),
           f"scale {scale}, t = {float(t):.2f}: the model must see {4 if guided else 2} rows")


# --- Set 6: measures -----------------------------------------------------------------------------------
exercise("6.1", "frechet", "fid.py", "frechet_distance", "Table 3, FID", 15, """
    Two Gaussians, mu (d,) and sigma (d, d), NumPy arrays -> a float:

        |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2)

    in float64. The covariances are symmetric without negative eigenvalues, but may be singular. The last
    trace is also the sum of the square roots of the eigenvalues of sigma1 sigma2 or of sigma1^(1/2) sigma2
    sigma1^(1/2). The distance to itself must come out as 0, up to 1e-3 of the trace.
    """, """mu1 - mu2 = (3,
    4), sigma1 = diag(4, 9), sigma2 = diag(1, 1): 25 + 13 + 2 - 2 (2 + 3) = 30.""",
    ("The symmetric form needs only `np.linalg.eigh`, which never gives complex numbers.",
     "Eigenvalues that should be 0 come out as tiny negative numbers: clip them before the root."))


@check("frechet", 1, public=True)
def frechet_shape():
    """one number"""
    got = fid.frechet_distance(np.zeros(3), np.eye(3), np.ones(3), 2 * np.eye(3))
    ok(np.ndim(got) == 0 and np.isrealobj(got), "the distance is one real number")


@check("frechet", 2, public=True)
def frechet_worked_example():
    """worked example"""
    got = fid.frechet_distance(np.array([3.0, 4.0]), np.diag([4.0, 9.0]), np.zeros(2), np.eye(2))
    close(got, 30.0, "25 + 13 + 2 - 2 (2 + 3)")


def covariance(d, n, seed):
    x = randn(n, d, seed=seed).double().numpy()
    return np.cov(x, rowvar=False)


@check("frechet", 3)
def frechet_general():
    """any Gaussians"""
    for seed in (0, 4):
        s1, s2 = covariance(5, 40, seed), 3 * covariance(5, 40, seed + 1)
        m1, m2 = randn(5, seed=seed + 2).double().numpy(), randn(5, seed=seed + 3).double().numpy()
        values = np.linalg.eigvals(s1 @ s2).real.clip(0)
        want = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.sqrt(values).sum()
        close(fid.frechet_distance(m1, s1, m2, s2), want, "the formula above", 1e-5)
        close(fid.frechet_distance(m2, s2, m1, s1), want, "the distance is the same both ways", 1e-5)


@check("frechet", 2)
def frechet_corner():
    """itself, and singular covariances"""
    full, flat = covariance(6, 50, 0), covariance(6, 4, 1)
    for s in (full, flat):
        got = fid.frechet_distance(np.ones(6), s, np.ones(6), s)
        ok(np.isfinite(got) and abs(got) <= 2e-3 * np.trace(s),
           f"the distance to itself is 0 (got {got:.4g})")
    values = np.linalg.eigvals(full @ flat).real.clip(0)
    want = np.trace(full) + np.trace(flat) - 2 * np.sqrt(values).sum()
    close(fid.frechet_distance(np.zeros(6), full, np.zeros(6), flat), want, "a singular covariance", 2e-3)


exercise("6.2", "is", "fid.py", "inception_score", "Table 3, IS", 15, """
    Class probabilities probs (N, C), a tensor or an array -> a float. For each of the contiguous splits of
    `split` rows (the last may be shorter; N below `split` is one split):

        exp(mean over rows of KL(p || q)),    KL(p || q) = sum_c p_c (log p_c - log q_c)

    where q is the mean of the split's rows,
    log is natural and 0 log 0 = 0; the score is the mean over splits.
    """, "rows (1, 0) and (0, 1): q = (0.5, 0.5), KL = ln 2 each, score 2. Equal rows: 1.",
    hints=("`torch.xlogy(p, q)` is p log q with 0 log 0 = 0.",
           "`probs.split(split)` cuts, and leaves a shorter last one."))


@check("is", 1, public=True)
def is_shape():
    """one number"""
    got = fid.inception_score(torch.full((4, 3), 1 / 3))
    ok(np.ndim(got) == 0, "the score is one number")


@check("is", 2, public=True)
def is_worked_example():
    """worked example"""
    close(fid.inception_score(torch.eye(2)), 2.0, "two certain rows of different classes")
    close(fid.inception_score(torch.full((4, 3), 1 / 3)), 1.0, "equal rows")
    close(fid.inception_score(torch.eye(2).repeat_interleave(3, 0), split=3), 1.0,
          "two splits of one class each")


@check("is", 3)
def is_general():
    """any probabilities, arrays, splits"""
    probs = (2 * randn(11, 4)).double().softmax(1)
    probs[3] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    for split in (5000, 11, 4):
        scores = []
        for start in range(0, 11, split):
            part = probs[start:start + split].tolist()
            q = [sum(row[c] for row in part) / len(part) for c in range(4)]
            kl = [sum(p * math.log(p / r) for p, r in zip(row, q) if p > 0) for row in part]
            scores.append(math.exp(sum(kl) / len(kl)))
        want = sum(scores) / len(scores)
        close(fid.inception_score(probs.clone(), split=split), want, f"11 rows, split {split}", 1e-5)
        close(fid.inception_score(probs.numpy(), split=split), want,
              f"11 rows as an array, split {split}", 1e-5)


exercise("6.3", "pr", "fid.py", "precision_recall", "Table 3, Pre. and Rec.", 20, """
    Features reference (M, d) and samples (N, d) -> (precision, recall), two floats in [0, 1]. The ball of a
    feature reaches to its k-th nearest neighbour in its OWN set, itself not counted; inside means distance <=
    radius.

        precision = share of samples that lie inside the ball of any reference
        recall = share of references that lie inside the ball of any sample

    Compute in float64. `block` bounds how many rows are compared at once; the result does not depend on it,
    and you may ignore it.
    """, """On a line, k = 1: references 0, 1, 2 (radius 1 each), samples 2, 4, 8 (radii 2, 2, 4). Sample 2 is
    inside the balls of 1 and 2, samples 4 and 8 are inside none: precision 1/3. The ball of sample 2 reaches
    from 0 to 4 and holds all references: recall 1.""",
    ("All distances of two sets at once: `torch.cdist(a, b)`.",
     "Within a set the nearest is the feature itself, at distance 0: take the (k + 1)-th smallest."))


@check("pr", 1, public=True)
def pr_shape():
    """two numbers"""
    got = fid.precision_recall(randn(8, 3), randn(9, 3, seed=1))
    ok(len(got) == 2 and all(0 <= v <= 1 for v in got), "precision and recall, from 0 to 1")


@check("pr", 3, public=True)
def pr_worked_example():
    """worked example"""
    reference, samples = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[2.0], [4.0], [8.0]])
    precision, recall = fid.precision_recall(reference, samples, k=1)
    close(precision, 1 / 3, "precision: samples inside references' balls")
    close(recall, 1.0, "recall: references inside samples' balls")


@check("pr", 4)
def pr_general():
    """any features, k and block"""
    reference, samples = randn(30, 3).double(), 0.8 * randn(20, 3, seed=1).double() + 0.4

    def share(points, centres, k):
        radii = [sorted((c - other).norm().item() for other in centres)[k] for c in centres]
        inside = [any((p - c).norm().item() <= r for c, r in zip(centres, radii)) for p in points]
        return sum(inside) / len(points)
    for k in (3, 1):
        precision, recall = fid.precision_recall(reference, samples, *(() if k == 3 else (k,)))
        close(precision, share(samples, reference, k), f"precision, k = {k}", 1e-6)
        close(recall, share(reference, samples, k), f"recall, k = {k}", 1e-6)
    whole = fid.precision_recall(reference, samples, k=2)
    close(fid.precision_recall(reference, samples, k=2, block=7), whole,
          "the result must not depend on block")


exercise("6.4", "psnr", "fid.py", "psnr", "Table 2, PSNR", 5, """
    Images x and y (B, C, H, W) whose values span data_range (1 if not given) -> (B,), in dB:

        10 log10(data_range^2 / mean((x - y)^2)),    the mean over each image's C, H, W

    Identical images give inf.
    """, "y = x + 0.1, data_range 1: 10 log10(100) = 20. With data_range 2: 26.0206.")


@check("psnr", 1, public=True)
def psnr_shape():
    """shape"""
    has_shape(fid.psnr(randn(3, 3, 4, 4), randn(3, 3, 4, 4, seed=1)), (3,), "one number an image")


@check("psnr", 2, public=True)
def psnr_worked_example():
    """worked example"""
    x = torch.full((1, 3, 2, 2), 0.5)
    close(fid.psnr(x, x + 0.1), [20.0], "10 log10(1 / 0.01)")
    close(fid.psnr(x, x + 0.1, 2.0), [26.0206], "data_range 2: 10 log10(4 / 0.01)")


@check("psnr", 2)
def psnr_general():
    """any images"""
    x, y = torch.sigmoid(randn(3, 2, 4, 5)), torch.sigmoid(randn(3, 2, 4, 5, seed=1))
    y[2] = x[2]
    want = [10 * math.log10(255 ** 2 / ((a - b) ** 2).sum().item() * 40) for a, b in zip(x[:2], y[:2])]
    close(fid.psnr(x, y, 255.0), [*want, math.inf],
          "each image has a mean of its own; identical images give inf")


exercise("6.5", "ssim", "fid.py", "ssim", "Table 2, SSIM", 25, """
    Images x, y (B, C, H, W) -> (B,): the mean of the SSIM map over all C, H, W of an image. blur() is the
    mean under a Gaussian window of 11x11 pixels, sigma 1.5, weights of sum 1, each channel by itself, the
    image reflected at its edges (5 pixels, F.pad's mode "reflect", so that H and W stay). With c1 = (0.01
    R)^2, c2 = (0.03 R)^2, R = data_range:

        mx = blur(x), my = blur(y), vx = blur(x^2) - mx^2, vy = blur(y^2) - my^2, cov = blur(x y) - mx my
        map = (2 mx my + c1) (2 cov + c2) / ((mx^2 + my^2 + c1) (vx + vy + c2))
    """, "x = 0.25 and y = 0.75 everywhere: variances 0, map (0.375 + 0.0001) / (0.625 + 0.0001) = 0.60006.",
    ("The window is the outer product of exp(-i^2 / 4.5), i = -5, ..., 5, with itself, over its sum.",
     "View the images as (B * C, 1, H, W), pad, and use F.conv2d with one filter."))


@check("ssim", 1, public=True)
def ssim_shape():
    """shape"""
    has_shape(fid.ssim(randn(3, 2, 12, 14), randn(3, 2, 12, 14, seed=1)), (3,), "one number an image")


@check("ssim", 2, public=True)
def ssim_worked_example():
    """worked example"""
    x = torch.full((1, 3, 12, 12), 0.25)
    close(fid.ssim(x, 3 * x), [0.600064], "flat images: only the means count", 2e-3)
    noise = torch.sigmoid(randn(1, 3, 12, 12))
    close(fid.ssim(noise, noise), [1.0], "an image is 1 like itself")


@check("ssim", 4)
def ssim_general():
    """any images"""
    x = torch.sigmoid(randn(2, 2, 12, 15)).double()
    y = (x + 0.2 * randn(2, 2, 12, 15, seed=1)).clamp(0, 1)
    line = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    window = np.outer(line, line) / line.sum() ** 2

    def blur(v):
        v = np.pad(v, 5, mode="reflect")
        return (np.lib.stride_tricks.sliding_window_view(v, (11, 11)) * window).sum((2, 3))
    for span in (1.0, 2.0):
        want, c1, c2 = [], (0.01 * span) ** 2, (0.03 * span) ** 2
        for b in range(2):
            maps = []
            for c in range(2):
                p, q = span * x[b, c].numpy(), span * y[b, c].numpy() ** 2
                mp, mq = blur(p), blur(q)
                vp, vq, cov = blur(p * p) - mp ** 2, blur(q * q) - mq ** 2, blur(p * q) - mp * mq
                maps.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp ** 2 + mq ** 2 + c1) * (vp + vq + c2)))
            want.append(np.mean(maps))
        close(fid.ssim(span * x.float(), span * y.float() ** 2, span), want, f"data_range {span}", 3e-4)


exercise("6.6", "uniformity", "fid.py", "density_measures", "Table 6", 20, """
    Densities d (N,) of the latents at N points, a NumPy array -> {"density cv", "gini", "normalized
    entropy"}, three floats. With p = d / sum(d):

        density cv = standard deviation / mean of d     dividing by N, not N - 1
        gini = sum over i, j of |d_i - d_j| / (2 N^2 mean(d))
        normalized entropy = -sum p log p / log N
    """, """densities 1 and 3: mean 2, deviation 1: cv 0.5; gini (2 + 2) / (2 * 4 * 2) = 0.25; p = 0.25, 0.75:
    0.5623 / 0.6931 = 0.8113. Equal densities: 0, 0, 1.""")


@check("uniformity", 1, public=True)
def uniformity_shape():
    """three numbers"""
    got = fid.density_measures(np.arange(1.0, 21.0))
    ok(set(got) == {"density cv", "gini", "normalized entropy"},
       "the keys are density cv, gini, normalized entropy")
    ok(all(np.ndim(v) == 0 for v in got.values()), "each value is one number")


@check("uniformity", 2, public=True)
def uniformity_worked_example():
    """worked example"""
    for density, want in (([1.0, 3.0], (0.5, 0.25, 0.8112781)), ([2.0] * 4, (0.0, 0.0, 1.0))):
        got = fid.density_measures(np.array(density))
        for name, value in zip(("density cv", "gini", "normalized entropy"), want):
            close(got[name], value, f"{name} of densities {density}")


@check("uniformity", 3)
def uniformity_general():
    """any densities"""
    d = (randn(15, seed=2).abs() + 0.1).tolist()
    given, mean = np.array(d), sum(d) / 15
    got = fid.density_measures(given)
    close(got["density cv"], math.sqrt(sum((v - mean) ** 2 for v in d) / 15) / mean, "density cv")
    close(got["gini"], sum(abs(u - v) for u in d for v in d) / (2 * 225 * mean),
          "gini: all pairs, in any order")
    entropy = -sum(v / sum(d) * math.log(v / sum(d)) for v in d) / math.log(15)
    close(got["normalized entropy"], entropy, "normalized entropy")
    close(given, d, "d itself must not be changed")


# --- Set 7: experiments --------------------------------------------------------------------------------
@dataclass
class Experiment:
    number: str
    title: str
    commands: str
    minutes: int           # on two CPU cores
    plot: str
    questions: str
    answers: str           # the instructor's; never in a handout


# Numbers in the answers: the study in tests/CLAIMS.md, measured with commit bda5d05 and its pictures. Today's
# pictures are others: mark the reasoning and the spread that a student states, not the third digit.
EXPERIMENTS = [Experiment(*map(inspect.cleandoc, texts[:3]), texts[3], *map(inspect.cleandoc, texts[4:]))
               for texts in (
    ("7.1", "The dilemma: wider latents reconstruct better and generate worse [Sec. 1, Table 2]", """
    python tests/claims.py --row d4-none --row d16-none --row d64-none --data shapes --seed 0 --seed 1
    """, 40, "mini-rFID (reconstruction) and mini-gFID (generation) over d = 4, 16, 64, one line a seed.", """
    1. Which of the two falls with d, which rises? Over which step of d is the rise largest?
    2. How large is the difference between seeds beside that between widths? What may you claim?
    3. LightningDiT and its training are the same for all d. Give two reasons why d = 64 is harder for it.
    4. f16d32 of the paper compresses an image 24 times. What is the ratio here, and what does it change?
    """, """
    1. mini-rFID falls, mini-gFID rises. Photos, three seeds: 4.5, 1.3, 1.1 and 8.0, 13.3, 13.2, so from 4
       to 16 and flat after; shapes: 0.49 to 0.22 and 8.8 to 13.6, where d = 16 (one seed) is still like d =
       4.
    2. Between seeds +-2.4 of mini-gFID on photos, +-0.6 on shapes: from 4 to 64 the rise is beyond it, from
       16 to 64 on photos it is not. Two seeds allow the sign, not a percentage.
    3. More channels with less structure in them (Sec. 2.1, Table 6); a token of 2x2x64 = 256 numbers goes
       through a width of 128; as many steps for a harder target.
    4. 256 * 256 * 3 / (16 * 16 * 32) = 24. Here 16 * 16 * 3 / (8 * 8 * 64) = 0.19: the latent is larger
       than the image, so part of the effect may be a redundancy that the paper's tokenizers do not have.
    """),
    ("7.2", "VF loss on and off [Sec. 3, Table 2]", """
    python tests/claims.py --row d64-none --row d64-vf --data shapes --seed 0 --seed 1 --seed 2
    """, 45, "mini-gFID and PSNR of both rows; for each seed a line from the plain point to the other.", """
    1. By how much does VF loss change mini-gFID for each seed, and what does it cost in PSNR?
    2. Why compare seed by seed and not the two means? Give the mean ratio with its standard error.
    3. The score network and the teacher have learned from the same images. Which control would tell whether
       VF loss only makes latents that the score network likes? (`--row d64-other` is one: what does it
       control?)
    4. Set the paper's margins, `--row d64-margins`. What do margins give up, and what do they keep?
    """, """
    1. Shapes: +7, -19, -19 % (mean -11 % +- 8), PSNR -0.4 dB. Photos: -14, -44, -56 % (-40 % +- 12), -0.5
       dB. The paper: -35 % at d = 64. An honest answer on shapes is: not shown.
    2. A pair shares its seed, and with it weights, order and noise, so the seed's own effect cancels.
       Geometric mean of ratios; with three seeds a 95 % interval is 4.3 standard errors, and it reaches
       zero.
    3. Features of a network that was never trained (photos +29, -62, -42 %, shapes +228, -45, -9 %), and a
       teacher from other images (photos -41 %, shapes -3 %): on photos it is not the score network's doing
       alone.
    4. Pairs within the margin are left alone, so reconstruction is freer. Photos, seed 0: mini-rFID 0.38
       with and 0.87 without margins; mini-gFID 9.3 and 9.8, no difference beyond noise.
    """),
    ("7.3", "A sweep of the guidance scale [Sec. 5.4]", """
    python train_vae.py && python train_dit.py                   # once
    for w in 1 1.5 2 3 5; do python sample.py --fresh --cfg-scale $w && python fid.py; done
    python sample.py --fresh --sweep 1,1.5,2,3,5                 # the picture sweep.png
    """, 25, "mini-gFID, mini-precision, mini-recall and class accuracy over w; beside it sweep.png.", """
    1. Which of the four rise with w, which fall, and why can mini-gFID have a minimum?
    2. w = 1 needs half the work. Where in guided_velocity does that show?
    3. Guide only the first 2 of 4 channels (`--cfg-channels 2`). Which w does as much as before?
    4. Repeat one w with `--cfg-interval-start 0.3`. What happens to recall, and why near noise?
    """, """
    Not part of the study, so no numbers: expected by the argument, mark it against the student's own curve.
    1. Precision and class accuracy rise, recall falls: guidance moves samples towards what tells the class.
       In mini-gFID the gain in quality counts more at first, then the variety that is lost.
    2. v = v_class: the model sees B rows, not 2B.
    3. A larger one: only some channels are pushed (the paper's 6.7 and 10 are for 3 of 32 channels; the
       authors name about 4 for all).
    4. Recall goes up again: near noise guidance decides the layout, and costs most variety there.
    """),
    ("7.4", "The timestep shift [Sec. 5.4]", """
    for s in 0.3 1 3; do for n in 6 11 51; do
      python sample.py --fresh --shift $s --steps $n --cfg-scale 1 && python fid.py; done; done
    """, 25, "mini-gFID over 5, 10, 50 steps, one line a shift; the grids as dots on [0, 1].", """
    1. How many of 250 points lie below t = 0.5 for s = 0.3, 1, 3? Derive it from the formula.
    2. At few steps, which shift is best? What does that say about where the flow is curved?
    3. At 50 steps, do the three differ beyond the noise of another `--seed`?
    4. FLUX counts time from data (0) to noise (1). Which s there is our 0.3?
    """, """
    Not part of the study, so 2 and 3 are marked against the student's own curve.
    1. t' < 0.5 means t < 1 / (1 + s): 192 of 250 for 0.3, 125 for 1, 63 for 3.
    2. If s < 1 wins, the early steps, which decide the layout, are where Euler errs most; if s > 1 wins,
       the late ones. An answer needs the argument and the curve, not a given order.
    3. Euler's error falls with the step, so all grids come close; the spread of seeds must be shown.
    4. 1 / 0.3 = 3.3: put 1 - t for t in the formula.
    """),
    ("7.5", "Rows of the ladder [Table 1]", """
    python tests/claims.py --row ladder-0 --row ladder-1 --row ladder-4 --row ladder-5 --data shapes
    """, 45, "mini-gFID of the rows in order, beside the FID of Table 1, both as a share of row 1's.", """
    1. What do rows 0 and 1 differ in? Name two things besides the target of the loss.
    2. Which rows keep the paper's order here? How many seeds would you need to claim it?
    3. Row 2 changes batch and rate at once: what is held fixed between rows 1 and 2, and why that?
    4. Give one reason why noise prediction can do better in miniature than in the paper.
    """, """
    1. The path (variance preserving or straight), and time as the network sees it (a step of 0 to 999, so
       also the scale of its embedding). In both, time is uniform.
    2. Photos, seed 0, rows 0 to 7: 4.65, 7.83, 7.14, 7.26, 7.00, 6.52, 5.40, 5.90. From row 1 on it falls
       as in the paper, but differences below 20 % are one seed's noise; three seeds left +-8 to 12 %.
    3. The images seen: four times the batch for a quarter of the steps, so the cost is the same.
    4. Short training (row 0 was the best of all there); 19 steps of Euler where the paper has dopri5; the
       EMA spans a quarter as many images in rows 0 and 1. It is an open question: mark the argument.
    """),
)]


# === Handouts ==========================================================================================
SELF = Path(__file__).read_text()
FUNCTIONS = {n.name: n for n in ast.parse(SELF).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
for definition in FUNCTIONS.values():
    definition.decorator_list.clear()
IMPORTS = {"math": "import math", "types": "import types", "np": "import numpy as np",
           "torch": "import torch", "F": "import torch.nn.functional as F", "nn": "from torch import nn"}
IMPORTS |= {name[:-3]: f"import {name[:-3]}" for name in SCRIPTS}


def bound(node):
    """The names that a statement gives a value to."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    names = set()
    for n in ast.walk(node):
        if isinstance(n, ast.alias):
            names.add(n.asname or n.name.split(".")[0])
        elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            names.add(n.id)
        elif isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            names.add(n.name)
    return names


def find(tree, name):
    """Where the last definition of a function or Class.method stands, (statements, index), or None."""
    body = tree.body
    *owners, last = name.split(".")
    for owner in owners:
        classes = [n for n in body if isinstance(n, ast.ClassDef) and n.name == owner]
        if not classes:
            return None
        body = classes[-1].body
    simple = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Assign, ast.AnnAssign)
    places = [i for i, n in enumerate(body) if isinstance(n, simple) and last in bound(n)]
    return (body, places[-1]) if places else None


def has_docstring(node):
    return ast.get_docstring(node, clean=False) is not None


def replace_body(source, name, body):
    """Source in which the lines of this function after its docstring are these; KeyError if it has none."""
    found = find(ast.parse(source), name)
    if found is None:
        raise KeyError(name)
    node, lines = found[0][found[1]], source.splitlines()
    first, indent = node.body[0], " " * (node.col_offset + 4)
    start, end = (first.end_lineno if has_docstring(node) else first.lineno - 1), node.end_lineno
    while lines[start - 1].lstrip().startswith("#"):     # comments above the first statement
        start -= 1
    while end < len(lines) and lines[end].startswith(indent + "#"):
        end += 1
    new = [indent + line if line else "" for line in body]
    return "\n".join([*lines[:start], *new, *lines[end:]]) + "\n"


def stubbed(file, keys, folder=ROOT):
    """The text of a script without the bodies of these exercises."""
    source = (folder / file).read_text()
    for e in (EXERCISES[key] for key in keys):
        if e.file == file:
            gone = ["# YOUR CODE HERE", f'raise NotImplementedError("{e.title}, see ASSIGNMENT.md")']
            source = replace_body(source, e.name, gone)
    return source


def words(node):
    """Every name and attribute in a piece of code, in a function's decorators, too."""
    return {n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node)
            if isinstance(n, (ast.Name, ast.Attribute))}


def public_tests(keys):
    """A pytest file of the public checks of these exercises, with the helpers that they use."""
    checks = [c.function.__name__ for key in keys for c in EXERCISES[key].checks if c.public]
    needed, pending = set(), list(checks)
    while pending:
        for word in words(FUNCTIONS[pending.pop()]):
            if word in FUNCTIONS and word not in needed:
                needed.add(word)
                pending.append(word)
    lines, used = SELF.splitlines(), set()
    parts = []
    for name, node in FUNCTIONS.items():
        if name in needed or name in checks:
            used |= words(node)
            text = "\n".join(lines[node.lineno - 1:node.end_lineno])
            parts.append(text.replace(f"def {name}(", f"def test_{name}(", 1) if name in checks else text)
    head = ['"""Your own check: python -m pytest -k KEY, keys as in ASSIGNMENT.md. The grader has more."""']
    head += [line for name, line in IMPORTS.items() if name in used]
    return "\n\n\n".join(["\n".join(head), *parts]) + "\n"


RULES = """\
{what}, on the paper *Reconstruction vs. Generation* (arXiv 2501.01423). Have it beside you; tags such as
[Eq. 2] say where to look.

**What to do.** In the scripts, each function of the table has lost its body: look for `# YOUR CODE HERE`.
Write it anew; name and arguments stay. The rest of the scripts is whole and may be read. You may add
imports, functions and constants to the same file, and methods to the same class. Changes to other functions
do not count. A class's `__init__` shows which layers there are.

**How to check.** `pip install -r requirements.txt`, then `python -m pytest` here, or, for one exercise by its
key, `python -m pytest -k eq2`. These tests hold the shape and the worked example; the grader looks further:
any sizes, gradients, corner cases. Any right solution passes, whatever its form. One exercise is marked with
all others right, so a mistake costs once. Code that does not end costs its exercise; a syntax error costs all
exercises of its file.

**What to hand in.** {files}.
"""
EXPERIMENT_RULES = """\
Run these with complete scripts: yours, once all exercises are solved, or your instructor's. Answer in
sentences, with the numbers and the plot behind them."""


def assignment(keys, experiments):
    """ASSIGNMENT.md of these exercises."""
    chosen = [EXERCISES[key] for key in keys]
    sets = sorted({e.set for e in chosen} | ({7} if experiments else set()))
    points, hours = sum(e.points for e in chosen), sum(e.minutes for e in chosen) / 60
    out = [f"# Assignment: {', '.join(SETS[s] for s in sets)}", ""]
    if chosen:
        files = ", ".join(f"`{file}`" for file in SCRIPTS if any(e.file == file for e in chosen))
        what = f"{len(chosen)} exercises, {points} points, about {hours:.1f} hours"
        out += [RULES.format(what=what, files=files),
                "| | key | file | function | paper | points | minutes |", "|---|---|---|---|---|---|---|"]
        for e in chosen:
            cells = (e.number, e.key, e.file, f"`{e.name}`", e.tag, e.points, e.minutes)
            out.append(f"| {' | '.join(map(str, cells))} |")
    for s in sets:
        out += ["", f"## Set {s}: {SETS[s]}"]
        for e in (e for e in chosen if e.set == s):
            out += ["", f"### {e.number} `{e.name}` [{e.tag}], {e.file}, {e.points} points", "", e.text, "",
                    textwrap.fill(f"*Worked example.* {e.example}", 108)]
            helps = [f"{EXERCISES[k].number} `{EXERCISES[k].name}`" for k in e.after]
            out += ["", f"*Helps:* {', '.join(helps)}."] if helps else []
            for i, hint in enumerate(e.hints, 1):
                out += ["", f"<details><summary>Hint {i}</summary>\n\n{hint}\n\n</details>"]
    if experiments:
        out += ["", EXPERIMENT_RULES]
        for x in EXPERIMENTS:
            out += ["", f"### {x.number} {x.title}", "", textwrap.indent(x.commands, "    "), "",
                    f"About {x.minutes} minutes on two CPU cores. *Plot:* {x.plot}", ""]
            out.append(x.questions)
    return "\n".join(out) + "\n"


def handout(folder, keys, experiments):
    """A student's folder."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"coursework.py: error: {folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file in SCRIPTS:
        (folder / file).write_text(stubbed(file, keys))
    (folder / "ASSIGNMENT.md").write_text(assignment(keys, experiments))
    (folder / "requirements.txt").write_text((ROOT / "requirements.txt").read_text() + "pytest\n")
    # which exercises `grade` looks at, if it is not told
    (folder / "exercises.txt").write_text("".join(f"{key}\n" for key in keys))
    for s in sorted({EXERCISES[key].set for key in keys}):
        (folder / f"test_set{s}.py").write_text(public_tests([k for k in keys if EXERCISES[k].set == s]))
    if experiments:
        (folder / "tests").mkdir()
        shutil.copy(ROOT / "tests" / "claims.py", folder / "tests")


# === Grading: the student's function among the reference's =============================================
SCRIPT_LINES = 100_000   # empty lines before the reference's: a smaller line number is the student's


class NotGraded(Exception):
    """Why there is nothing to run."""


def parse(source, file):
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        what = getattr(error, "msg", error)
        raise NotGraded(f"{file}{line}: {what}; Python cannot read the file") from None


def is_stub(node):
    body = node.body[has_docstring(node):] if isinstance(node, ast.FunctionDef) else [None]
    return len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in words(body[0])


def new_part(node, known):
    """What a statement of the student's adds to the names that the reference has; None if nothing."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        aliases = [a for a in node.names if (a.asname or a.name.split(".")[0]) not in known]
        fields = {name: getattr(node, name) for name in node._fields} | {"names": aliases}
        return ast.copy_location(type(node)(**fields), node) if aliases else None
    main = isinstance(node, ast.If) and "__name__" in words(node.test)
    return node if bound(node) - known and not main else None


def assemble(reference, student, name, file):
    """Reference source with the student's version of one function -> syntax tree; NotGraded.

    With it come the imports, functions, constants and methods that the student added, as far as it uses them,
    and the statements that fill them.
    """
    theirs = parse(student, file)
    found = find(theirs, name)
    if found is None:
        raise NotGraded(f"{file} has no {name}: its name must stay")
    statements, j = found
    function = statements[j]
    if is_stub(function):
        raise NotGraded("not attempted: # YOUR CODE HERE still stands there")
    tree = ast.parse("\n" * SCRIPT_LINES + reference)
    body, i = find(tree, name)
    body[i] = function
    known = set().union(*map(bound, tree.body))
    added = [(n, new_part(n, known)) for n in theirs.body]
    added = [(n, part) for n, part in added if part is not None]
    methods = []
    if body is not tree.body:
        own = set().union(*map(bound, body))
        methods = [n for n in statements if bound(n) - own]
    # what the function uses, and what that uses
    chosen, pending = set(), [function]
    while pending:
        used = words(pending.pop())
        for n in [n for n, _ in added] + methods:
            if id(n) not in chosen and (bound(n) & used or "*" in bound(n)):
                chosen.add(id(n))
                pending.append(n)
    names = set().union(*(bound(n) for n, _ in added if id(n) in chosen)) - known
    fills = (ast.Expr, ast.Assign, ast.AugAssign, ast.For, ast.With, ast.Delete)
    top = name.split(".")[0]
    border = max(k for k, n in enumerate(theirs.body) if top in bound(n))
    before, after = [], []
    parts = {id(n): part for n, part in added if id(n) in chosen}
    for k, n in enumerate(theirs.body):
        if id(n) not in parts and isinstance(n, fills) and not bound(n) and words(n) & names:
            parts[id(n)] = n
        if id(n) in parts:
            (before if k < border else after).append(parts[id(n)])
    body.extend(n for n in methods if id(n) in chosen)
    place = max(k for k, n in enumerate(tree.body) if top in bound(n))
    tree.body[place:place] = before
    tree.body.extend(after)
    return tree


class Scripts:
    """The seven scripts as modules from memory, {name: code}; they stand in the folder, too."""

    def __init__(self, code, folder):
        self.code, self.folder = code, folder

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.code else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__file__ = str(Path(self.folder, module.__name__ + ".py"))
        exec(self.code[module.__name__], module.__dict__)   # noqa: S102


def where(error, file):
    """The student's line in which an exception came up, as text."""
    lines, step = [], error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == file and step.tb_lineno < SCRIPT_LINES:
            lines.append(step.tb_lineno)
        step = step.tb_next
    return f" ({file}, line {lines[-1]})" if lines else ""


def run_check(function, file):
    """None if the check passes, else why not, in one sentence."""
    torch.manual_seed(0)
    try:
        function()
    except Wrong as error:
        message = str(error)
    except ModuleNotFoundError as error:
        message = f"your code imports {error.name}, which is not installed here{where(error, file)}"
    except BaseException as error:   # noqa: BLE001  sys.exit and KeyboardInterrupt, too
        message = f"{type(error).__name__}: {error}{where(error, file)}"
    else:
        try:   # whoever changes torch for everybody has no marks for it
            close(torch.zeros(2), [0.0, 1.0], "")
            message = "something that the grader compares with has been changed"
        except Wrong:
            message = None
    return message


def examine(job, code, texts, send):
    """In the child process: one exercise of one student; send() is called for each check that has ended."""
    e = EXERCISES[job["key"]]
    for file, text in texts.items():
        Path(file).write_text(text)
    try:
        tree = assemble(texts[e.file], job["source"], e.name, e.file)
        code = code | {e.file[:-3]: compile(tree, e.file, "exec")}
    except NotGraded as error:
        return send({"note": str(error)})
    except (SyntaxError, ValueError, RecursionError) as error:   # such as a return outside a function
        return send({"note": f"{e.file}, line {getattr(error, 'lineno', '?')}: {error}"})
    sys.meta_path.insert(0, Scripts(code, os.getcwd()))
    for i, c in enumerate(e.checks):
        send({"started": i})
        send({"check": i, "message": run_check(c.function, e.file)})
    send({"done": True})


# --- The server: torch is loaded once, then each exercise is a fork of it --------------------------------
def limits(timeout):
    for what, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 1 << 28),
                       (resource.RLIMIT_DATA, 8 << 30), (resource.RLIMIT_CPU, int(timeout) + 10)):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard < 0 else min(most, hard),) * 2)


def child(job, code, texts, token, pipe, folder):
    """Never returns."""
    try:
        os.setsid()
        os.chdir(folder)
        for name in ("HOME", "TMPDIR", "TORCH_HOME"):
            os.environ[name] = folder
        nowhere, out = os.open(os.devnull, os.O_RDONLY), os.open("output.txt", os.O_WRONLY | os.O_CREAT)
        for fd, place in ((nowhere, 0), (out, 1), (out, 2)):
            os.dup2(fd, place)
        os.closerange(3, pipe)
        os.closerange(pipe + 1, 1024)
        limits(job["timeout"])
        write, dumps = os.write, json.dumps

        def send(message):
            if message.get("message"):
                message["message"] = " ".join(str(message["message"]).split())[:500]
            write(pipe, f"{token} {dumps(message)}\n".encode())
        examine(job, code, texts, send)
    finally:
        os._exit(0)


def supervise(job, code, texts):
    """Run one job in a fork of this process -> its messages, and how it ended: "", "time" or a sentence."""
    token, folder = secrets.token_hex(16), tempfile.mkdtemp(prefix="coursework-")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(job, code, texts, token, write, folder)
    os.close(write)
    data, end, status, deadline = b"", "", None, time.monotonic() + job["timeout"]
    while status is None:
        if time.monotonic() > deadline:
            end = "time"
            break
        ready = select.select([read], [], [], 0.02)[0]
        piece = os.read(read, 1 << 16) if ready else b""
        data += piece
        if not piece:   # the pipe's end, or nothing to read: has it ended? its own children may hold the pipe
            ended, value = os.waitpid(pid, os.WNOHANG)
            status = value if ended else None
            if ready and status is None:
                time.sleep(0.01)
        if len(data) > 1 << 24:
            end = "it wrote into the grader's channel"
            break
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    elif not end and os.WIFSIGNALED(status):
        end = f"the process was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    os.set_blocking(read, False)
    try:
        data += os.read(read, 1 << 20)
    except BlockingIOError:
        pass
    os.close(read)
    shutil.rmtree(folder, ignore_errors=True)
    lines = data.decode(errors="replace").split("\n")
    return [json.loads(line.removeprefix(token)) for line in lines if line.startswith(token)], end


def judge(job, messages, end):
    """Messages -> {"note": why nothing ran or None, "checks": [sentence, or None if it passed]}."""
    e, note, checks, started, done = EXERCISES[job["key"]], None, {}, -1, False
    for m in messages:
        note, started, done = m.get("note", note), m.get("started", started), done or "done" in m
        if "check" in m:
            checks[m["check"]] = m["message"]
    late = {"time": f"no answer after {job['timeout']:g} seconds: is there a loop that does not end?",
            "": "the process ended before the check did: does the code call exit?"}.get(end, end)
    if note is None and not done and started < 0:
        note = late
    for i in range(len(e.checks)):
        after = late if i == started else "not run: an earlier check ended the process"
        checks.setdefault(i, note or after)
    return {"note": note, "checks": [checks[i] for i in range(len(e.checks))]}


def serve():
    """Read jobs, a JSON line each, write verdicts. The first line says whether all packages are there."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "tests"]
    texts = {file: (ROOT / file).read_text() for file in SCRIPTS}
    code = {file[:-3]: compile(text, file, "exec") for file, text in texts.items()}
    finder = Scripts(code, ROOT)
    sys.meta_path.insert(0, finder)
    try:
        for name in code:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": error.name}), file=reply, flush=True)
        return
    torch.set_num_threads(1)   # no threads: they would not live through a fork
    gc.freeze()   # what is there now need not be looked at, and so not copied, in each fork
    for name in code:
        del sys.modules[name]
    sys.meta_path.remove(finder)
    print(json.dumps({"missing": None}), file=reply, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(judge(job, *supervise(job, code, texts))), file=reply, flush=True)


class Server:
    """A process of serve(); use it as a context."""

    def __init__(self):
        self.process, self.folder = None, tempfile.TemporaryDirectory(prefix="coursework-")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.stdin.close()
            self.process.wait()
        self.folder.cleanup()

    def start(self):
        env = os.environ | {"TMPDIR": self.folder.name, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                            "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__, "serve"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=env)
        ready = json.loads(self.process.stdout.readline() or '{"missing": "torch"}')
        if ready["missing"]:
            way = f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
            raise SystemExit(f"coursework.py: error: grading needs the package {ready['missing']}, and "
                             f"nothing was graded: {way}")

    def ask(self, job):
        """The verdict; a server that was killed, perhaps by the job before, is started again once."""
        for _ in range(2):
            if self.process is None:
                self.start()
            try:
                self.process.stdin.write(json.dumps(job) + "\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if line:
                return json.loads(line)
            self.process.wait()
            self.process = None
        return judge(job, [], "the grader's process was killed in this exercise")


# --- Marks ----------------------------------------------------------------------------------------------
@dataclass
class Mark:
    exercise: Exercise
    note: str | None       # why nothing was run
    checks: list           # for each check None, or the sentence

    @property
    def score(self):
        return sum(c.points for c, message in zip(self.exercise.checks, self.checks) if message is None)

    @property
    def reason(self):
        """The first failing check, in a sentence; empty at full marks."""
        failed = [f"{c.name}: {m}" for c, m in zip(self.exercise.checks, self.checks) if m is not None]
        return self.note or (failed[0] if failed else "")


def read_submission(folder, file):
    """Text of a student's script; NotGraded."""
    path = Path(folder, file)
    if not path.is_file():
        raise NotGraded(f"{file} is not in the folder")
    if path.stat().st_size > 1 << 20:
        raise NotGraded(f"{file} is larger than 1 MiB")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise NotGraded(f"{file} is not readable as UTF-8 text: {error}") from None


def grade_one(server, folder, key, timeout=60.0):
    e = EXERCISES[key]
    try:
        job = {"key": key, "source": read_submission(folder, e.file), "timeout": timeout}
    except NotGraded as error:
        return Mark(e, str(error), [str(error)] * len(e.checks))
    verdict = server.ask(job)
    return Mark(e, verdict["note"], verdict["checks"])


def keys_of(folder, keys=None):
    """Which exercises to grade: those asked for, else those in the folder's exercises.txt, else all."""
    listed = Path(folder, "exercises.txt")
    if keys is None and listed.is_file():
        keys = [key for key in listed.read_text(errors="replace").split() if key in EXERCISES]
    return keys or list(EXERCISES)


def grade(folders, keys=None, timeout=60.0, jobs=2, report=None):
    """{folder: [Mark, ...]}, by `jobs` processes; report(folder, marks) is called as each folder is done."""
    todo, marks = queue.Queue(), {folder: {} for folder in folders}
    for folder in folders:
        for key in keys_of(folder, keys):
            marks[folder][key] = None
            todo.put((folder, key))
    trouble, lock = [], threading.Lock()

    def work():
        with Server() as server:
            while not trouble:
                try:
                    folder, key = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    marks[folder][key] = grade_one(server, folder, key, timeout)
                except BaseException as error:   # noqa: BLE001  a missing package: stop all
                    trouble.append(error)
                    return
                with lock:
                    if report and all(marks[folder].values()):
                        report(folder, list(marks[folder].values()))
    threads = [threading.Thread(target=work) for _ in range(max(1, min(jobs, todo.qsize())))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if trouble:
        raise trouble[0]
    return {folder: list(found.values()) for folder, found in marks.items()}


def totals(marks):
    return sum(m.score for m in marks), sum(m.exercise.points for m in marks)


def print_marks(folder, marks):
    print(f"\n{folder}")
    for m in marks:
        print(f"  {m.exercise.number:5} {m.exercise.name:32} {m.score:3} / {m.exercise.points:<3} {m.reason}")
    print("  total {} / {}".format(*totals(marks)), flush=True)


def gradescope(marks):
    """Gradescope's results.json of one submission: an exercise is a test, its checks are lines."""
    tests = []
    for m in marks:
        lines = [f"{c.points if bad is None else 0}/{c.points} {c.name}" + (f": {bad}" if bad else "")
                 for c, bad in zip(m.exercise.checks, m.checks)]
        name = f"{m.exercise.number} {m.exercise.name} [{m.exercise.tag}]"
        tests.append({"name": name, "score": m.score, "max_score": m.exercise.points,
                      "output": m.note or "\n".join(lines), "visibility": "visible"})
    score, most = totals(marks)
    return {"score": score, "output": f"{score} of {most} points", "visibility": "visible", "tests": tests}


def write_csv(path, results):
    """A line for each folder: total, possible, then each exercise's points (empty if it was not graded)."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["submission", "total", "possible", *EXERCISES])
        for folder, marks in results.items():
            found = {m.exercise.key: m.score for m in marks}
            table.writerow([folder, *totals(marks), *(found.get(key, "") for key in EXERCISES)])


# === The command line ==================================================================================
def list_exercises():
    line = "{:5} {:10} {:12} {:36} {:28} {:>6} {:>7} {:>7}  {}"
    print(line.format("", "key", "file", "function", "paper", "points", "minutes", "seconds", "helped by"))
    for e in EXERCISES.values():
        print(line.format(e.number, e.key, e.file, e.name, e.tag[:28], e.points, e.minutes, e.seconds,
                          " ".join(e.after)).rstrip())
    for s in range(1, 7):
        found = [e for e in EXERCISES.values() if e.set == s]
        print(f"set {s}, {SETS[s]}: {len(found)} exercises, {sum(e.points for e in found)} points, "
              f"{sum(e.minutes for e in found) / 60:.1f} hours")
    print(f"set 7, {SETS[7]}: {len(EXPERIMENTS)}, marked by hand (see answers)")


def print_answers():
    print("Numbers: tests/CLAIMS.md, commit bda5d05. Mark the reasoning and the spread, not the third digit.")
    for x in EXPERIMENTS:
        print(f"\n## {x.number} {x.title}\n\n{textwrap.indent(x.commands, '    ')}\n\n{x.questions}\n")
        print(f"Answers:\n{x.answers}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the exercises")
    commands.add_parser("answers", help="the experiments with the instructor's answers")
    commands.add_parser("serve", help="(used by grade)")
    for command in ("handout", "grade"):
        sub = commands.add_parser(command)
        sub.add_argument("dirs", metavar="DIR", nargs=1 if command == "handout" else "+")
        sub.add_argument("--set", type=int, action="append", choices=SETS, help="may repeat; default: all")
        sub.add_argument("--exercises", nargs="+", metavar="KEY", choices=EXERCISES, help="see list")
    sub.add_argument("--json", help="Gradescope's results.json; of several folders: {folder: results}")
    sub.add_argument("--csv", help="marks of all folders, a line each")
    sub.add_argument("--timeout", type=float, default=60.0, help="seconds for one exercise (default 60)")
    sub.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    a = parser.parse_args()
    if a.command in ("list", "answers", "serve"):
        return {"list": list_exercises, "answers": print_answers, "serve": serve}[a.command]()
    keys = None
    if a.set or a.exercises:
        keys = [k for k, e in EXERCISES.items() if e.set in (a.set or ()) or k in (a.exercises or ())]
    if a.command == "handout":
        keys = list(EXERCISES) if keys is None else keys
        handout(a.dirs[0], keys, 7 in (a.set or ()) or not (a.set or a.exercises))
        return print(f"{a.dirs[0]}: {len(keys)} exercises, {sum(EXERCISES[k].points for k in keys)} points")
    if keys == []:
        parser.error("set 7 is marked by hand: see answers")
    for folder in a.dirs:
        if not Path(folder).is_dir():
            parser.error(f"{folder} is not a folder")
    results = grade(a.dirs, keys, a.timeout, a.jobs, print_marks)
    if a.json:
        found = {folder: gradescope(marks) for folder, marks in results.items()}
        Path(a.json).write_text(json.dumps(found[a.dirs[0]] if len(a.dirs) == 1 else found, indent=1))
    if a.csv:
        write_csv(a.csv, results)


if __name__ == "__main__":
    main()
