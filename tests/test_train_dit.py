"""train_dit.py in process: Table 1 and its tricks typed by hand, float64 loops, closed forms for Gaussian
data, and latents on disk."""
import copy
import csv
import functools
import json
import math
import multiprocessing
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import train_dit
import train_vae
from dit import SIZES, RMSNorm, SwiGLU
from train_dit import (
    LADDER,
    PRESETS,
    Latents,
    Run,
    Settings,
    architecture,
    ddpm_alphas,
    ddpm_loss,
    ddpm_velocity,
    flow_matching_loss,
    latent_batch,
    open_latents,
    preview,
    sample_time,
    warn_of_ema,
)
from train_vae import (
    Images,
    World,
    batch_indices,
    parse_settings,
    step_generator,
    to_float,
    write_checkpoint,
)
from vae import SPECS, AutoencoderKL, UserError, fingerprint


def world(rank=0, size=1):
    """Process `rank` of `size`, alone."""
    w = World("cpu")
    w.rank, w.size, w.local = rank, size, rank
    return w


CPU, ONE = torch.device("cpu"), world()
IMAGENET = 1_281_167  # training images of ImageNet-1k
TINY = {"depth": 2, "hidden_size": 32, "num_heads": 4}
TINY_VAE = {"embed_dim": 4, "ch": 32, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "attn_resolutions": (8,),
            "resolution": 32}


def parse(*flags):
    return parse_settings(Settings, PRESETS, "doc", [str(flag) for flag in flags])


def error(work, *args, **kwargs):
    """The one line that a user's mistake ends in."""
    with pytest.raises(UserError) as caught:
        work(*args, **kwargs)
    assert "\n" not in str(caught.value).strip()
    return str(caught.value)


@pytest.fixture
def tiny(monkeypatch):
    """Every size is 2 blocks of width 32."""
    for name in SIZES:
        monkeypatch.setitem(SIZES, name, TINY)


def randomise(model, seed=0):
    """A fresh network says 0 (adaLN-Zero): give every weight a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def make_run(shape=(4, 8, 8), classes=10, random=True, **settings):
    small = {"size": "mini", "precision": "fp32", "device": "cpu", "compile": False, "lr": 1e-3, "ema": 0.9}
    s = Settings(**(small | settings))
    run = Run(s, architecture(s, shape, classes), ONE)
    if random:
        for model in (run.model, run.ema):
            randomise(model)
    return run


def make_batch(b=4, shape=(4, 8, 8), classes=10, seed=0):
    """x1, y, t, x0, drop"""
    g = torch.Generator().manual_seed(seed)
    x1, y = torch.randn(b, *shape, generator=g), torch.randint(classes, (b,), generator=g)
    t = torch.rand(b, generator=g)
    return x1, y, t, torch.randn(b, *shape, generator=g), torch.rand(b, generator=g) < 0.3


# --- Table 1 and the systems ---

# row, what the trick sets (each from the value of the row before)
TABLE1 = [
    ("DiT-XL/2", None),
    ("Rectified Flow", {"objective": ("ddpm", "flow")}),
    ("batchsize", {"batch_size": (256, 1024), "lr": (1e-4, 2e-4)}),
    ("beta2", {"beta2": (0.999, 0.95)}),
    ("Logit Normal", {"lognorm": (False, True)}),
    ("Velocity Direction", {"direction_loss": (False, True)}),
    ("SwiGLU", {"swiglu": (False, True)}),
    ("RMS Norm", {"rmsnorm": (False, True)}),
    ("Rotary", {"rope": (False, True)}),
    ("VA-VAE", {"patch_size": (2, 1), "tokenizer_spec": ("f8d4", "f16d32"),
                "latent_norm": ("sd-vae", "channel")}),
]


def settings_of(preset):
    return {k: v for k, v in asdict(parse("--preset", preset)).items() if k not in ("preset", "out")}


def changed(before, after):
    return {k: (before[k], after[k]) for k in after if after[k] != before[k]}


def test_table_1_is_a_ladder_of_single_tricks():
    names = [name for name in PRESETS if name.startswith("table1-")]
    assert len(LADDER) == 10 and names == [f"table1-{i}" for i in range(10)]
    rows = [settings_of(name) for name in names]
    first = {"size": "XL", "tokenizer_spec": "f8d4", "latent_norm": "sd-vae", "patch_size": 2,
             "swiglu": False, "rmsnorm": False, "rope": False, "qknorm": False, "objective": "ddpm",
             "lognorm": False, "direction_loss": False, "batch_size": 256, "lr": 1e-4, "beta2": 0.999,
             "grad_clip": 0.0, "ema": 0.9999, "epochs": 80, "steps": 0, "class_dropout": 0.1,
             "uniform_from_epoch": 0}
    assert {k: rows[0][k] for k in first} == first
    for i, (name, trick) in enumerate(TABLE1):
        assert name in LADDER[i][0]
        assert not i or changed(rows[i - 1], rows[i]) == trick, name
    # the last row is the system of Table 3 with other epochs
    assert changed(settings_of("imagenet256"), rows[9]).keys() == {"epochs", "tokenizer_spec"}
    # "400k x 256", "100k x 1024"
    assert round(80 * IMAGENET / 256, -3) == 400_000 and round(80 * IMAGENET / 1024, -3) == 100_000


def test_the_miniature_ladder_has_the_same_tricks():
    rows, mini = [settings_of(f"mini-table1-{i}") for i in range(10)], settings_of("mini")
    batch, lr = rows[0]["batch_size"], rows[0]["lr"]
    assert (batch * 4, rows[0]["epochs"], rows[0]["steps"]) == (mini["batch_size"], 8, 0)
    mini_tricks = {2: {"batch_size": (batch, 4 * batch), "lr": (lr, 2 * lr)}, 9: {"patch_size": (2, 1)}}
    for i, (name, trick) in enumerate(TABLE1):
        assert not i or changed(rows[i - 1], rows[i]) == mini_tricks.get(i, trick), name
    assert changed(mini, rows[9]).keys() <= {"steps", "lr", "epochs", "patch_size"}
    assert all((row["tokenizer_spec"], row["latent_norm"]) == ("", "channel") for row in rows)


def test_every_preset_is_valid():
    for name in PRESETS:
        s = parse("--preset", name)
        for f in fields(Settings):  # argparse checks flags against choices, not a preset's values
            value, choices = getattr(s, f.name), f.metadata.get("choices")
            assert (not choices or value in choices) and type(value) is type(f.default), (name, f.name, value)


@pytest.mark.parametrize("flag, value", [
    ("--ema", 1.5), ("--class-dropout", 2.0), ("--beta2", 2.0), ("--patch-size", 0), ("--accumulate", 0)])
def test_values_out_of_range_are_errors(flag, value):
    assert f"{flag} {value} makes no sense" in error(parse, flag, value)


@pytest.mark.parametrize("preset", [f"{mini}table1-{i}" for i in range(10) for mini in ("", "mini-")])
def test_every_row_builds_and_takes_a_step(tiny, preset):
    i, shape = int(preset[-1]), (4, 8, 8) if preset[-1] != "9" else (8, 8, 8)
    s = parse("--preset", preset, "--no-compile", "--device", "cpu")
    run = Run(s, architecture(s, shape, 10), ONE)
    block = run.model.blocks[0]
    got = (isinstance(block.mlp, SwiGLU), isinstance(block.norm1, RMSNorm), run.model.feat_rope is not None,
           run.model.patch_size)
    assert got == (i >= 6, i >= 7, i >= 8, 1 if i == 9 else 2)
    group = run.opt.param_groups[0]
    assert (group["lr"], group["betas"]) == (s.lr, (0.9, 0.95 if i >= 3 else 0.999))
    assert s.objective == ("flow" if i else "ddpm")
    seen, batch = [], make_batch(shape=shape)
    run.model.register_forward_pre_hook(lambda module, args: seen.append(args[1].clone()))
    before = run.model.final_layer.linear.weight.clone()
    terms, norm = run.step(*batch, True)
    assert terms["mse"].shape == terms["direction"].shape == (4,) and norm > 0
    assert not torch.equal(before, run.model.final_layer.linear.weight)
    # what the network is told: DDPM's step, or t
    want = torch.floor(1000 * (1 - batch[2])) if i == 0 else batch[2]
    assert torch.equal(seen[0], want) and (terms["direction"] == 0).all() == (i == 0)
    # a fresh network says 0, so the first loss is known: mean eps^2 for noise prediction, mean v^2 for flow
    target = batch[3] if i == 0 else batch[0] - batch[3]
    torch.testing.assert_close(terms["mse"], (target ** 2).mean((1, 2, 3)))


class Everything:
    """Latents of as many images as one likes, all 0."""
    classes, shape = [str(i) for i in range(1000)], (4, 8, 8)
    mean, std = torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)

    def __init__(self, n):
        self.labels = torch.zeros(n, dtype=torch.long)
        self.about = {"fingerprint": "", "identity": "", "image_size": 32, "data": ""}

    def read(self, index, flip):
        return torch.zeros(len(index), *self.shape, dtype=torch.float16)


@pytest.fixture
def no_latents(monkeypatch, tiny, tmp_path):
    """train() on n empty latents, and signals left alone."""
    def stub(n):
        torch.manual_seed(0)
        vae = AutoencoderKL(**TINY_VAE)
        monkeypatch.setattr(train_dit, "open_latents", lambda s, world: (Everything(n), vae))
        monkeypatch.setattr(train_vae.signal, "signal", lambda *args: None)
    return stub


@pytest.mark.parametrize("preset, size, steps, epochs, uniform", [
    ("lightningdit-xl-64ep", "XL", 80_073, 64, 0), ("imagenet256", "XL", 80_073, 64, 0),
    ("lightningdit-xl-800ep", "XL", 1_000_912, 800, 480), ("lightningdit-b", "B", 200_182, 160, 0),
    ("lightningdit-l", "L", 100_091, 80, 0), ("lightningdit-xl", "XL", 100_091, 80, 0),
    ("lightningdit-1.0b", "1.0B", 100_091, 80, 0), ("lightningdit-1.6b", "1.6B", 100_091, 80, 0),
    ("table1-0", "XL", 400_365, 80, 0), ("table1-9", "XL", 100_091, 80, 0)])
def test_systems_state_their_epochs_and_steps(no_latents, monkeypatch, capsys, tmp_path, preset, size, steps,
                                              epochs, uniform):
    """80,000 and 1,000,000 steps (rounded), uniform time from 480 epochs [Sec. 5.4], Table 2's epochs."""
    no_latents(IMAGENET)
    monkeypatch.setattr(train_dit, "loader", lambda *args: [])  # train() reaches its end without a step
    s = parse("--preset", preset, "--out", tmp_path, "--device", "cpu", "--no-compile")
    assert (s.size, s.uniform_from_epoch, s.qknorm, s.grad_clip) == (size, uniform, False, 0)
    assert (s.class_dropout, s.ema) == (0.1, 0.9999)
    train_dit.train(s, ONE)
    text = capsys.readouterr().out
    assert f"{steps} steps of {s.batch_size}, or {epochs}.0 epochs" in text
    assert f"LightningDiT {size}/{s.patch_size}" in text
    assert f"{IMAGENET} latents" in text and "1000 classes" in text


def test_time_sampling_turns_uniform_at_its_epoch(no_latents, monkeypatch, tmp_path):
    no_latents(8)
    asked = []

    def listen(n, lognorm, *args):
        asked.append(lognorm)
        return sample_time(n, lognorm, *args)
    monkeypatch.setattr(train_dit, "sample_time", listen)
    common = ("--preset", "mini", "--batch-size", 4, "--steps", 0, "--epochs", 3, "--sample-every", 0,
              "--device", "cpu", "--no-compile")
    for k, (flags, want) in enumerate([(("--uniform-from-epoch", 2), [True] * 4 + [False] * 2),
                                       ((), [True] * 6), (("--no-lognorm",), [False] * 6)]):
        asked.clear()
        train_dit.train(parse(*common, "--out", tmp_path / str(k), *flags), ONE)
        assert asked == want
    state = torch.load(tmp_path / "0" / "dit.pt", weights_only=True)
    assert state["step"] == state["total_steps"] == 6 and state["objective"] == "flow"
    assert state["latents"]["shape"] == [4, 8, 8] and metrics(tmp_path / "0")[-1]["step"] == "6"


def metrics(out):
    with open(out / "metrics_dit.csv") as file:
        return list(csv.DictReader(file))


def test_a_stopped_run_resumes_to_the_same_bits_and_the_same_log(no_latents, monkeypatch, tmp_path):
    """Stopped between two lines of the log, after steps 4 and 6 of 10: the losses by time resume, too."""
    no_latents(40)
    common = ("--steps", 10, "--batch-size", 4, "--log-every", 5, "--sample-every", 0, "--device", "cpu",
              "--no-compile", "--seed", 3)
    train_dit.train(parse(*common, "--out", tmp_path / "whole"), ONE)

    class StopAfter(train_vae.Stop):
        def agreed(self):
            self.steps = getattr(self, "steps", 0) + 1
            self.asked = 15 * (self.steps == after)
            return self.asked > 0
    torch.manual_seed(5)
    for after in (4, 2):
        with monkeypatch.context() as patch:
            patch.setattr(train_dit, "Stop", StopAfter)
            line = error(train_dit.train, parse(*common, "--out", tmp_path / "parts"), ONE)
        assert "parts/dit.pt" in line and "the same command resumes" in line
    train_dit.train(parse(*common, "--out", tmp_path / "parts"), ONE)
    one, two = (torch.load(tmp_path / d / "dit.pt", weights_only=True) for d in ("whole", "parts"))
    assert one["step"] == two["step"] == 10
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][k], v) for k, v in two[part].items())
    logs = [metrics(tmp_path / d) for d in ("whole", "parts")]
    for row in logs[0] + logs[1]:
        del row["images_per_s"], row["memory_gib"]
        cells = [row[f"loss_t0.{i}"] for i in (0, 2, 4, 6, 8)]
        assert all(cell in ("", "nan") or float(cell) > 0 for cell in cells)
    assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == ["5", "10"]


def test_a_finished_run_that_is_trained_longer_equals_one_long_run(no_latents, tmp_path):
    no_latents(40)
    common = ("--batch-size", 4, "--sample-every", 0, "--device", "cpu", "--no-compile", "--out")
    train_dit.train(parse(*common, tmp_path / "once", "--steps", 6), ONE)
    for steps in (3, 6):
        train_dit.train(parse(*common, tmp_path / "twice", "--steps", steps), ONE)
    once, twice = (torch.load(tmp_path / out / "dit.pt", weights_only=True) for out in ("once", "twice"))
    assert once["step"] == twice["step"] == twice["total_steps"] == 6
    for part in ("model", "ema"):
        assert all(torch.equal(once[part][name], value) for name, value in twice[part].items())


def test_a_short_run_is_warned_of_its_ema_and_no_preset_is(no_latents, capsys, tmp_path):
    for name in PRESETS:
        s = parse("--preset", name)
        images = 10_000 if "mini" in name else IMAGENET
        assert warn_of_ema(s.ema, s.steps or round(s.epochs * images / s.batch_size)) == "", name
    for decay, steps in ((0.998, 1000), (0.998, 100), (0.9999, 10_000), (0.9999, 40_000)):
        text = warn_of_ema(decay, steps)
        assert f"still holds {decay ** steps:.0%} of the untrained weights" in text
        advice = float(re.search(r"such as ([0-9.]+)", text)[1])
        assert advice < 1 and warn_of_ema(advice, steps) == ""  # whoever follows the advice is not warned
    no_latents(8)
    train_dit.train(parse("--steps", 2, "--batch-size", 4, "--sample-every", 0, "--device", "cpu",
                          "--out", tmp_path, "--no-compile"), ONE)
    assert "The EMA still holds 100% of the untrained" in capsys.readouterr().out.splitlines()[-1]


def test_a_time_without_a_loss_is_empty_and_not_0():
    means = train_dit.loss_by_time(torch.tensor([[6.0, 0, 0, 1, 2], [3, 0, 0, 1, 4]]))
    assert list(means) == [f"loss_t0.{i}" for i in (0, 2, 4, 6, 8)]
    assert [float(v) for v in means.values()] == pytest.approx([2, math.nan, math.nan, 1, 0.5], nan_ok=True)


# --- losses ---

def test_lognorm_time_is_the_logistic_of_a_normal():
    t = sample_time(200_000, True, torch.Generator().manual_seed(0), CPU).double().numpy()
    q = np.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose(np.quantile(t, q), scipy.special.expit(scipy.stats.norm.ppf(q)), atol=0.005)
    assert scipy.stats.kstest(scipy.special.logit(t), "norm").pvalue > 0.01 and 0 < t.min() and t.max() < 1
    u = sample_time(200_000, False, torch.Generator().manual_seed(0), CPU).double().numpy()
    assert scipy.stats.kstest(u, "uniform").pvalue > 0.01
    again = sample_time(200_000, True, torch.Generator().manual_seed(0), CPU)
    assert np.array_equal(again.double().numpy(), t)


def test_flow_matching_loss_equals_loops():
    x1, y, t, x0, drop = make_batch(3, (5, 4, 3))
    seen = {}

    def model(x, t, y, drop):
        seen.update(x=x.double().numpy(), t=t, y=y, drop=drop)
        return 0.7 * x + 0.1 * x.flip(1) - y.view(-1, 1, 1, 1) * 0.05
    loss, terms = flow_matching_loss(model, x1, y, t, x0, drop)
    only, _ = flow_matching_loss(model, x1, y, t, x0, drop, direction=False)
    a, b, labels, times = x1.double().numpy(), x0.double().numpy(), y.numpy(), t.double().numpy()
    mse, direction = np.zeros(3), np.zeros(3)
    for n in range(3):
        for i in range(4):
            for j in range(3):
                x_t = [times[n] * a[n, c, i, j] + (1 - times[n]) * b[n, c, i, j] for c in range(5)]
                v = [a[n, c, i, j] - b[n, c, i, j] for c in range(5)]
                pred = [0.7 * x_t[c] + 0.1 * x_t[4 - c] - 0.05 * labels[n] for c in range(5)]
                np.testing.assert_allclose(seen["x"][n, :, i, j], x_t, atol=1e-6)
                mse[n] += sum((p - w) ** 2 for p, w in zip(pred, v)) / 60
                product, lengths = np.dot(pred, v), math.sqrt(np.dot(pred, pred) * np.dot(v, v))
                direction[n] += (1 - product / lengths) / 12
    np.testing.assert_allclose(terms["mse"], mse, rtol=1e-5)
    np.testing.assert_allclose(terms["direction"], direction, rtol=1e-5, atol=1e-6)
    assert loss.item() == pytest.approx(mse.mean() + direction.mean(), rel=1e-5)
    assert only.item() == pytest.approx(mse.mean(), rel=1e-5)
    assert seen["t"] is t and seen["y"] is y and seen["drop"] is drop


def test_the_minimum_of_the_loss_and_the_direction_term_alone():
    x1, y, t, x0, _ = make_batch(4)
    v = x1 - x0
    turned = torch.stack([-v[:, 1], v[:, 0], -v[:, 3], v[:, 2]], dim=1)  # at a right angle to v, everywhere
    power = (v ** 2).mean().item()
    for answer, mse, direction in ((v, 0, 0), (3 * v, 4 * power, 0), (-v, 4 * power, 2),
                                   (turned, 2 * power, 1), (torch.zeros_like(v), power, 1)):
        loss, terms = flow_matching_loss(lambda *args, answer=answer: answer, x1, y, t, x0)
        assert terms["mse"].mean().item() == pytest.approx(mse, abs=1e-6, rel=1e-5)
        assert terms["direction"].mean().item() == pytest.approx(direction, abs=1e-5)
        assert loss.item() == pytest.approx(mse + direction, abs=1e-5, rel=1e-5)


def test_the_cosine_has_a_gentle_gradient_at_zero_and_is_otherwise_exact():
    """adaLN-Zero's first prediction is 0, where the gradient of cos(pred, v) has the length 1 / eps."""
    x1, y, t, x0, _ = make_batch()
    pred = torch.zeros_like(x1, requires_grad=True)
    flow_matching_loss(lambda *args: pred, x1, y, t, x0)[1]["direction"].sum().backward()
    lengths = pred.grad.norm(dim=1) * 8 * 8  # the mean is over 8x8 positions
    torch.testing.assert_close(lengths, torch.full_like(lengths, 10.0))
    # for predictions longer than 0.1 the loss is that of PyTorch's eps, to the bit
    pred = F.normalize(x0.flip(0), dim=1) * (0.101 + torch.rand(4, 1, 8, 8))
    direction = flow_matching_loss(lambda *args: pred, x1, y, t, x0)[1]["direction"]
    assert torch.equal(direction, (1 - F.cosine_similarity(pred, x1 - x0, dim=1, eps=1e-8)).mean((1, 2)))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_the_minimiser_for_gaussian_data_has_the_known_minimum(t):
    """x1 ~ N(m, s^2), x0 ~ N(0, 1): E[v | x_t] is linear, and of v's variance s^2 / (t^2 s^2 + (1 - t)^2)
    is left."""
    m, s, n = 1.5, 0.6, 400_000
    g = torch.Generator().manual_seed(1)
    x1, x0 = m + s * torch.randn(n, 1, 1, 1, generator=g), torch.randn(n, 1, 1, 1, generator=g)
    variance = t ** 2 * s ** 2 + (1 - t) ** 2
    slope = (t * s ** 2 - (1 - t)) / variance

    def loss(k, c):
        def answer(x, *_):
            return m + c + k * (x - t * m)
        return flow_matching_loss(answer, x1, None, torch.full((n,), t), x0, direction=False)[0].item()
    least = loss(slope, 0)
    assert least == pytest.approx(s ** 2 / variance, rel=0.01)
    assert all(loss(slope + k, c) > least for k, c in ((0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05)))


def test_the_schedule_of_ddpm_is_the_linear_one():
    a, product = ddpm_alphas(CPU), 1.0
    assert a.shape == (1000,) and a.dtype == torch.float64
    for k in range(1000):
        product *= 1 - (1e-4 + k * (0.02 - 1e-4) / 999)
        assert a[k].item() == pytest.approx(product, rel=1e-6), k
    # the number that DDPM's users know
    assert a[0].item() == pytest.approx(0.9999) and a[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)


def test_ddpm_loss_equals_loops():
    x1, y, _, x0, drop = make_batch(6, (3, 4, 4))
    t = torch.tensor([0.0, 0.2501, 0.9995, 0.99999, 0.5004, 0.001])
    steps = [999, 749, 0, 0, 499, 999]  # floor(1000 (1 - t)), never 1000
    betas = np.linspace(1e-4, 0.02, 1000)
    seen = []
    loss, terms = ddpm_loss(lambda x, k, y, drop: seen.append((k, y, drop)) or 0.5 * x, x1, y, t, x0, drop)
    want = []
    for n in range(6):
        a = np.prod(1 - betas[:steps[n] + 1])
        noisy = math.sqrt(a) * x1[n].double().numpy() + math.sqrt(1 - a) * x0[n].double().numpy()
        want.append(((0.5 * noisy - x0[n].double().numpy()) ** 2).mean())
    np.testing.assert_allclose(terms["mse"], want, rtol=1e-5)
    assert loss.item() == pytest.approx(np.mean(want), rel=1e-5) and (terms["direction"] == 0).all()
    assert seen[0][0].tolist() == steps and seen[0][1] is y and seen[0][2] is drop


M, S = 0.8, 0.5  # data N(M, S^2)
ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
GRID = np.sqrt(ALPHAS) / (np.sqrt(ALPHAS) + np.sqrt(1 - ALPHAS))  # t of DDPM's steps, falling


def exact_eps(x, step, y):
    """E[eps | x_k] for data N(M, S^2), x_k = sqrt(a) x1 + sqrt(1 - a) eps; between two steps t is linear."""
    t = np.interp(step.double().numpy(), np.arange(1000), GRID)
    # t / (1 - t) = sqrt(a / (1 - a))
    a = torch.from_numpy(t ** 2 / (t ** 2 + (1 - t) ** 2)).view(-1, 1, 1, 1)
    return ((1 - a).sqrt() * (x.double() - a.sqrt() * M) / (a * S ** 2 + 1 - a)).float()


def exact_velocity(x, t):
    """E[x1 - x0 | x_t] for the same data on the straight path."""
    t = t.double().view(-1, 1, 1, 1)
    return M + (t * S ** 2 - (1 - t)) / (t ** 2 * S ** 2 + (1 - t) ** 2) * (x.double() - t * M)


def test_the_velocity_of_a_noise_predictor_is_that_of_rectified_flow():
    field = ddpm_velocity(exact_eps)
    rng = np.random.default_rng(0)
    exact = np.concatenate([GRID[[0, 1, 500, 998, 999]], rng.uniform(GRID[-1], GRID[0], 200)])
    exact = torch.from_numpy(exact)
    times = exact.float()
    x = torch.from_numpy(rng.normal(size=(len(times), 2, 3, 3)) * 0.7 + 0.5).float()
    torch.testing.assert_close(field(x, times, None).double(), exact_velocity(x, times), atol=1e-3, rtol=1e-3)
    ends = field(x[:2], torch.tensor([0.0, 1.0]), None)  # beyond DDPM's schedule: its ends
    torch.testing.assert_close(ends, field(x[:2], torch.tensor([GRID[-1], GRID[0]]).float(), None))
    steps = []
    ddpm_velocity(lambda x, k, y: steps.append(k) or x)(x[:5], exact[:5], None)
    np.testing.assert_allclose(steps[0], [0, 1, 500, 998, 999], atol=1e-3)


def test_the_flow_of_a_noise_predictor_ends_at_the_data():
    field = ddpm_velocity(exact_eps)
    x = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    for k in range(250):
        x = x + field(x, torch.full((len(x),), k / 250), None) / 250
    assert x.mean().item() == pytest.approx(M, abs=0.02) and x.std().item() == pytest.approx(S, rel=0.03)
    x = (x - x.mean()) / x.std()
    assert scipy.stats.kstest(x.flatten().double().numpy(), "norm").pvalue > 0.01


# --- the step ---

def test_optimizer_and_ema_are_the_plain_formulas():
    run = make_run(lr=1e-3, ema=0.9, beta2=0.95)
    assert type(run.opt) is torch.optim.AdamW
    (group,) = run.opt.param_groups
    assert [group[k] for k in ("lr", "betas", "weight_decay", "eps")] == [1e-3, (0.9, 0.95), 0.0, 1e-8]
    trainable = {k: p for k, p in run.model.named_parameters() if k != "pos_embed"}
    assert {id(p) for p in group["params"]} == {id(p) for p in trainable.values()}
    weights, ema = ({k: p.detach().double().clone() for k, p in m.named_parameters()}
                    for m in (run.model, run.ema))
    m = {k: torch.zeros_like(weights[k]) for k in trainable}
    v = copy.deepcopy(m)
    for step in range(1, 4):
        run.step(*make_batch(seed=step), False)
        for k, p in trainable.items():
            g = p.grad.double()
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.95 * v[k] + 0.05 * g ** 2
            weights[k] -= 1e-3 * (m[k] / (1 - 0.9 ** step)) / ((v[k] / (1 - 0.95 ** step)).sqrt() + 1e-8)
            ema[k] = 0.9 * ema[k] + 0.1 * weights[k]
    # the average records no graph
    assert all(e.grad_fn is None and not e.requires_grad for e in run.ema.parameters())
    for k in weights:
        torch.testing.assert_close(run.model.get_parameter(k).double(), weights[k], atol=2e-5, rtol=0)
        torch.testing.assert_close(run.ema.get_parameter(k).double(), ema[k], atol=2e-5, rtol=0)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
@pytest.mark.parametrize("change", [{"accumulate": 4}, {"accumulate": 2, "checkpointing": True}])
def test_accumulation_and_checkpointing_change_nothing(objective, change):
    plain, other = make_run(objective=objective), make_run(objective=objective, **change)
    batch, calls = make_batch(8), []
    other.model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    (terms, norm), (terms_, norm_) = plain.step(*batch, True), other.step(*batch, True)
    assert calls == [8 // change["accumulate"]] * change["accumulate"]
    torch.testing.assert_close(terms, terms_)
    torch.testing.assert_close(norm, norm_)
    for p, q in zip(plain.params, other.params):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


def test_gradient_clipping_and_its_norm():
    batch = make_batch()
    free, clipped, silent = make_run(), make_run(grad_clip=0.05), make_run()
    norm, wanted = free.step(*batch, True)[1], clipped.step(*batch, False)[1]

    def length(run):
        return math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in run.params))
    assert silent.step(*batch, False)[1] is None and length(silent) == pytest.approx(length(free))
    assert norm.item() == pytest.approx(wanted.item()) == pytest.approx(length(free), rel=1e-5)
    assert length(free) > 0.1
    assert length(clipped) == pytest.approx(0.05, rel=1e-4)


def test_dropped_labels_train_the_null_class():
    x1, _, t, x0, _ = make_batch()
    y = torch.tensor([1, 1, 3, 5])
    for drop, rows in (([False] * 4, [1, 3, 5]), ([True] * 4, [10]),
                       ([True, False, True, False], [1, 5, 10])):
        run = make_run()
        run.step(x1, y, t, x0, torch.tensor(drop), False)
        grad = run.model.y_embedder.embedding_table.weight.grad
        assert grad.shape[0] == 11 and grad.abs().sum(1).nonzero().flatten().tolist() == rows


def test_the_direction_switch_reaches_the_gradient():
    batch = make_batch()
    runs = [make_run(direction_loss=on) for on in (True, False)]
    for run in runs:
        run.step(*batch, False)
    want = make_run()
    loss, _ = flow_matching_loss(want.model, *batch, direction=False)
    loss.backward()
    for on, off, hand in zip(*(run.params for run in runs), want.params):
        torch.testing.assert_close(off.grad, hand.grad)
    assert not torch.allclose(runs[0].params[0].grad, runs[1].params[0].grad)


def test_bf16_is_decided_in_one_place_and_near_fp32():
    batch = make_batch()
    exact, near, auto = make_run(), make_run(precision="bf16"), make_run(precision="auto")
    assert (exact.bf16, near.bf16, auto.bf16) == (False, True, False)  # auto: bf16 on CUDA
    types = []
    near.model.blocks[0].attn.register_forward_hook(lambda *args: types.append(args[2].dtype))
    (a, _), (b, _) = exact.step(*batch, False), near.step(*batch, False)
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.01)
    assert types == [torch.bfloat16] and b["mse"].dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in near.params)


def test_a_compiled_run_takes_the_same_steps_with_one_graph_for_all_blocks(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch.compiler.reset()
    # fullgraph: a break in the graph is an error
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    plain, compiled = make_run(), make_run(compile=True, accumulate=2)
    for seed in range(2):
        batch = make_batch(seed=seed)
        torch.testing.assert_close(plain.step(*batch, True), compiled.step(*batch, True), rtol=1e-4,
                                   atol=1e-5)
    assert len(graphs) == 1 and len(compiled.model.blocks) > 1
    # nothing of torch.compile is in the names that are saved
    assert set(compiled.model.state_dict()) == set(plain.model.state_dict())


def test_the_preview_is_a_function_of_the_run(tmp_path, tiny):
    vae = AutoencoderKL(**TINY_VAE).eval()
    pictures = {}
    for name, settings in (("flow", {}), ("again", {}), ("ddpm", {"objective": "ddpm"}),
                           ("no-null", {"class_dropout": 0.0})):
        path = tmp_path / f"{name}.png"
        preview(make_run(**settings), vae, Everything(1), path, columns=2, steps=2)
        assert Image.open(path).size == (3 * (2 * 34 + 2), 3 * (8 * 34 + 2))
        pictures[name] = path.read_bytes()
    assert pictures["flow"] == pictures["again"] != pictures["ddpm"]


# --- latents ---

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer's checkpoint whose posterior has a spread that one sees."""
    torch.manual_seed(3)
    vae = AutoencoderKL(**SPECS["mini-f4d4"]).eval()
    with torch.no_grad():
        vae.quant_conv.bias[4:] = torch.tensor([-1.0, -2, -3, 0])
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    settings = {"data": "shapes", "image_size": 32}
    write_checkpoint({"stage": "vae", "step": 1, "total_steps": 1, "settings": settings,
                     "spec": SPECS["mini-f4d4"], "model": vae.state_dict()}, path)
    return path


@pytest.fixture
def few_shapes(monkeypatch):
    """The first n of the built-in images, 23 unless a test sets another n."""
    class Few(Images):
        n = 23

        def __init__(self, *args):
            super().__init__(*args)
            self.source, self.labels = self.source[:self.n], self.labels[:self.n]
    monkeypatch.setattr(train_dit, "Images", Few)
    return Few


def latent_settings(tokenizer, folder, *flags):
    common = ("--extract-batch", 5, "--seed", 4, "--device", "cpu")
    return parse("--vae", tokenizer, "--latents", folder, *common, *flags)


def test_extracted_latents_are_the_stated_samples(few_shapes, tokenizer, tmp_path):
    s = latent_settings(tokenizer, tmp_path / "l")
    latents, vae = open_latents(s, ONE)
    file = np.load(tmp_path / "l" / "latents-00000.npy")
    assert file.shape == (23, 2, 4, 8, 8) and file.dtype == np.float16
    assert {p.name for p in (tmp_path / "l").iterdir()} == {".lock", "labels.npy", "latents.json",
                                                            "latents-00000.npy"}
    images = Images("shapes", "train", 32)
    assert np.load(tmp_path / "l" / "labels.npy").tolist() == [i % 10 for i in range(23)]
    for i in range(23):  # image by image; noise: of (seed, batch), plain before flipped
        k, place = divmod(i, 5)
        noise = torch.randn(2, min(5, 23 - 5 * k), 4, 8, 8,
                            generator=step_generator("cpu", 4, "posterior", k))[:, place]
        for side, x in enumerate((images[i], images[i].flip(2))):
            posterior = vae.encode(to_float(x)[None])
            want = posterior.mean[0] + (0.5 * posterior.logvar[0]).exp() * noise[side]
            np.testing.assert_allclose(file[i, side].astype(np.float32), want.numpy(), atol=2e-3, rtol=2e-3)
    exact = file.astype(np.float64).transpose(2, 0, 1, 3, 4).reshape(4, -1)
    np.testing.assert_allclose(latents.mean.flatten(), exact.mean(1), rtol=1e-6)
    np.testing.assert_allclose(latents.std.flatten(), exact.std(1, ddof=1), rtol=1e-6)
    assert latents.mean.shape == latents.std.shape == (1, 4, 1, 1) and latents.shape == [4, 8, 8]
    assert latents.classes == images.classes and latents.labels.tolist() == images.labels[:23].tolist()
    assert latents.about["fingerprint"] == fingerprint(vae.state_dict())
    assert latents.about["identity"] == images.identity


def test_a_killed_extraction_and_two_processes_leave_the_bytes_of_one(few_shapes, tokenizer, tmp_path,
                                                                      monkeypatch):
    """130 images in chunks of 64, 64 and 2. SIGKILL comes just before the second chunk gets its name."""
    few_shapes.n = 130

    def work(folder, world, *flags):
        s = latent_settings(tokenizer, tmp_path / folder, "--extract-batch", 1, *flags)
        return open_latents(s, world)

    def kill(source, target, replace=os.replace):
        if target.name == "latents-00001.npy":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    work("one", ONE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        process = multiprocessing.get_context("fork").Process(target=work, args=("killed", ONE))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    first = tmp_path / "killed" / "latents-00000.npy"
    whole, written = first.read_bytes(), first.stat().st_mtime_ns
    assert whole == (tmp_path / "one" / "latents-00000.npy").read_bytes()
    assert [path.name for path in first.parent.glob("latents-*.npy")] == [first.name]
    work("killed", ONE)
    assert first.stat().st_mtime_ns == written  # the second run kept it

    meeting, worlds = threading.Barrier(2, timeout=60), [world(rank, 2) for rank in range(2)]
    for w in worlds:
        monkeypatch.setattr(w, "barrier", meeting.wait)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda w: work("two", w, "--workers", 2 * w.rank), worlds))
    for path in (tmp_path / "one").iterdir():
        for folder in ("killed", "two"):
            assert path.read_bytes() == (tmp_path / folder / path.name).read_bytes(), (folder, path.name)


def test_an_unfinished_tokenizer_needs_a_flag(few_shapes, tokenizer, tmp_path):
    state = torch.load(tokenizer, weights_only=True)
    write_checkpoint(state | {"total_steps": 2}, tmp_path / "half.pt")
    line = error(open_latents, latent_settings(tmp_path / "half.pt", tmp_path / "l"), ONE)
    assert "half.pt" in line and "--unfinished" in line and not (tmp_path / "l").exists()
    open_latents(latent_settings(tmp_path / "half.pt", tmp_path / "l", "--unfinished"), ONE)


def test_images_are_known_by_their_list_not_by_their_place(tokenizer, tmp_path):
    """A folder that was moved keeps its latents; other images do not get them."""
    for k in range(10):
        (tmp_path / "a" / f"{k % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (k, 0, 0)).save(tmp_path / "a" / f"{k % 2}" / f"{k}.png")
    folder = tmp_path / "l"
    open_latents(latent_settings(tokenizer, folder, "--data", tmp_path / "a"), ONE)
    before = (folder / "latents-00000.npy").stat().st_mtime_ns
    (tmp_path / "a").rename(tmp_path / "b")
    open_latents(latent_settings(tokenizer, folder, "--data", tmp_path / "b"), ONE)
    assert (folder / "latents-00000.npy").stat().st_mtime_ns == before
    (tmp_path / "b" / "0" / "0.png").unlink()
    line = error(open_latents, latent_settings(tokenizer, folder, "--data", tmp_path / "b"), ONE)
    assert "identity" in line and "--latents" in line


def test_latents_that_are_not_finite_are_refused(few_shapes, tokenizer, tmp_path):
    state = torch.load(tokenizer, weights_only=True)
    state["model"]["quant_conv.bias"][0] = 1e5  # beyond float16
    write_checkpoint(state, tmp_path / "broken.pt")
    line = error(open_latents, latent_settings(tmp_path / "broken.pt", tmp_path / "l"), ONE)
    assert "broken.pt" in line and "not finite" in line
    assert not (tmp_path / "l" / "labels.npy").exists()


def test_latents_of_others_are_refused(few_shapes, tokenizer, tmp_path):
    folder = tmp_path / "l"
    open_latents(latent_settings(tokenizer, folder), ONE)
    state = torch.load(tokenizer, weights_only=True)
    state["model"]["decoder.conv_in.bias"] += 1e-3
    write_checkpoint(state, tmp_path / "other.pt")
    line = error(open_latents, latent_settings(tmp_path / "other.pt", folder), ONE)
    assert "other.pt" in line and "fingerprint" in line and "remove that folder" in line
    line = error(open_latents, latent_settings(tokenizer, folder, "--image-size", 64), ONE)
    assert "image_size 32 instead of 64" in line
    line = error(open_latents, latent_settings(tokenizer, folder, "--preset", "table1-9"), ONE)
    assert "f16d32" in line and "table1-9" in line
    open_latents(latent_settings(tokenizer, folder, "--tokenizer-spec", "mini-f4d4"), ONE)
    write_checkpoint(torch.load(tokenizer, weights_only=True) | {"identity": "xyz"}, tmp_path / "photos.pt")
    line = error(open_latents, latent_settings(tmp_path / "photos.pt", folder), ONE)
    assert "identity" in line and "instead of xyz" in line
    state["settings"] = {}
    write_checkpoint(state, tmp_path / "unknown.pt")
    assert "--data" in error(open_latents, latent_settings(tmp_path / "unknown.pt", tmp_path / "new"), ONE)


def test_a_finished_run_with_another_tokenizer_is_refused_before_it_is_called_finished(
        few_shapes, tiny, tokenizer, tmp_path, capsys):
    def train(path, latents):
        train_dit.train(latent_settings(path, tmp_path / latents, "--out", tmp_path / "run", "--steps", 2,
                                        "--batch-size", 4, "--sample-every", 0, "--no-compile"), ONE)
    train(tokenizer, "l")
    state = torch.load(tokenizer, weights_only=True)
    state["model"]["decoder.conv_in.bias"] += 1e-3
    write_checkpoint(state, tmp_path / "other.pt")
    capsys.readouterr()
    line = error(train, tmp_path / "other.pt", "m")
    assert "dit.pt was trained on latents of another tokenizer" in line and "--fresh" in line
    assert "is finished" not in capsys.readouterr().out
    train(tokenizer, "l")
    assert "dit.pt is finished (2 steps)" in capsys.readouterr().out


@pytest.fixture
def chunked(tmp_path):
    """The same latents (23, 2, 4, 8, 8) and labels in two folders: chunk files of ours, and shards as the
    authors write them."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(0)
    z, labels = torch.randn(23, 2, 4, 8, 8).half(), torch.arange(23) % 7
    mean, std = z.double().mean((0, 1, 3, 4)), z.double().std((0, 1, 3, 4))
    ours, theirs = tmp_path / "ours", tmp_path / "authors"
    for folder in (ours, theirs):
        folder.mkdir()
    for k, rows in enumerate((slice(0, 7), slice(7, 14), slice(14, 21), slice(21, 23))):
        np.save(ours / f"latents-{k:05d}.npy", z[rows].numpy())
        save_file({"latents": z[rows, 0].contiguous(), "latents_flip": z[rows, 1].contiguous(),
                   "labels": labels[rows].contiguous()}, theirs / f"latents_rank00_shard{k:03}.safetensors")
    np.save(ours / "labels.npy", labels.numpy())
    (ours / "latents.json").write_text(json.dumps({
        "classes": list("abcdefg"), "mean": mean.tolist(), "std": std.tolist()}))
    torch.save({"mean": mean.view(1, 4, 1, 1), "std": std.view(1, 4, 1, 1)}, theirs / "latents_stats.pt")
    return SimpleNamespace(ours=ours, theirs=theirs, z=z, labels=labels)


@pytest.mark.parametrize("format", ["ours", "theirs"])
def test_latents_of_several_files_are_read_as_one_array(chunked, format):
    latents, rng = Latents(getattr(chunked, format)), torch.Generator().manual_seed(1)
    assert torch.equal(latents.labels, chunked.labels) and latents.labels.dtype == torch.int64
    assert latents.shape == [4, 8, 8] and len(latents.classes) == 7
    torch.testing.assert_close(latents.mean.flatten(), chunked.z.float().mean((0, 1, 3, 4)))
    torch.testing.assert_close(latents.std.flatten(), chunked.z.float().std((0, 1, 3, 4)))
    assert latents.mean.shape == latents.std.shape == (1, 4, 1, 1)
    for n in (1, 40):
        index, flip = torch.randint(23, (n,), generator=rng), torch.randint(2, (n,), generator=rng)
        assert torch.equal(latents.read(index, flip), chunked.z[index, flip])
    index = torch.tensor([22, 0, 6, 7, 20, 21])  # beside the borders of the files
    assert torch.equal(latents.read(index, index % 2), chunked.z[index, index % 2])
    batch, y = latent_batch(latents, Settings(batch_size=6), 0, slice(0, 6))
    assert batch.shape == (6, 4, 8, 8) and torch.equal(y, chunked.labels[batch_indices(23, 6, 0, 0)])


def test_latents_of_the_authors_must_fit_the_tokenizer(chunked, tokenizer, tmp_path):
    open_latents(latent_settings(tokenizer, chunked.theirs), ONE)
    wide = AutoencoderKL(**SPECS["mini-f4d8"])
    write_checkpoint({"stage": "vae", "step": 1, "total_steps": 1, "settings": {}, "spec": SPECS["mini-f4d8"],
                      "model": wide.state_dict()}, tmp_path / "wide.pt")
    line = error(open_latents, latent_settings(tmp_path / "wide.pt", chunked.theirs, "--image-size", 32), ONE)
    assert "shape [4, 8, 8] instead of [8, 8, 8]" in line and "wide.pt" in line
    (chunked.theirs / "latents_stats.pt").unlink()
    assert "latents_stats.pt" in error(open_latents, latent_settings(tokenizer, chunked.theirs), ONE)


def test_batches_take_every_latent_once_per_epoch_and_flip_every_second():
    class Told(Everything):  # a latent says its index, and whether it is flipped
        def read(self, index, flip):
            return (index + 1000 * flip).view(-1, 1, 1, 1).expand(-1, *self.shape).half()
    latents, s, whole = Told(41), Settings(batch_size=8, seed=6), slice(0, 8)
    latents.labels = torch.arange(41) * 3
    flips, seen = [], []
    for step in range(41):
        z, y = latent_batch(latents, s, step, whole)
        value = z[:, 0, 0, 0].long()
        assert torch.equal(value % 1000, batch_indices(41, 8, step, 6)) and torch.equal(y, value % 1000 * 3)
        assert torch.equal(z, latent_batch(latents, s, step, whole)[0])
        parts = [latent_batch(latents, s, step, world(rank, 2).share(8)) for rank in range(2)]
        assert torch.equal(torch.cat([part[0] for part in parts]), z)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)
        flips, seen = flips + (value >= 1000).tolist(), seen + (value % 1000).tolist()
    assert all(sorted(seen[e * 41:(e + 1) * 41]) == list(range(41)) for e in range(8))
    assert np.mean(flips) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(flips)))
    other = latent_batch(latents, Settings(batch_size=8, seed=7), 0, whole)[0]
    assert not torch.equal(other, latent_batch(latents, s, 0, whole)[0])


# --- released weights ---

def test_weights_that_do_not_fit_are_named_and_others_start_a_run(tmp_path, tiny):
    weights = randomise(make_run(random=False).model).state_dict()
    torch.save({"ema": weights}, tmp_path / "file.pt")
    run = make_run(random=False, init=str(tmp_path / "file.pt"), seed=5)
    for model in (run.model, run.ema):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    torch.save({"ema": weights | {"y_embedder.embedding_table.weight": torch.ones(1001, 32)}},
               tmp_path / "file.pt")
    line = error(make_run, init=str(tmp_path / "file.pt"))
    assert "file.pt does not fit" in line and "y_embedder.embedding_table.weight" in line
    assert "(1001, 32)" in line and "(11, 32)" in line
    line = error(architecture, Settings(patch_size=3), (4, 8, 8), 10)
    assert "--patch-size 3 does not divide latents of 8x8" in line


# --- cost ---

class Plain(nn.Module):
    """A plain PyTorch transformer of B's width, depth, heads and MLP over the same tokens."""

    def __init__(self, depth):
        super().__init__()
        self.embed, self.head = nn.Linear(32, 768), nn.Linear(768, 32)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, activation="gelu", batch_first=True,
                                           norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x, t, y, drop):
        h = self.head(self.blocks(self.embed(x.flatten(2).transpose(1, 2))))  # (B, N, 32)
        return h.transpose(1, 2).reshape(x.shape)


def test_a_training_step_of_b_1_counts_as_many_operations_as_a_plain_transformer():
    """Forward, loss and backward. Depth 2 of 12: the blocks are alike, and the test is short."""
    from torch.utils.flop_counter import FlopCounterMode
    depth, batch, flops = 2, make_batch(1, (32, 16, 16), 1000), []
    s = Settings(size="B", precision="fp32", compile=False)
    for net in (None, Plain(depth)):
        run = Run(s, {**architecture(s, (32, 16, 16), 1000), "depth": depth}, ONE)
        with FlopCounterMode(display=False) as counter:
            flow_matching_loss(net or run.model, *batch)[0].backward()
        flops.append(counter.get_total_flops())
    assert flops[0] / flops[1] == pytest.approx(1, abs=0.05)
