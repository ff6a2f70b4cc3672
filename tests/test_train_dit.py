"""train_dit.py in process: Table 1 and its tricks typed by hand, float64 loops, closed forms for Gaussian
data, and latents on disk."""
import copy
import csv
import functools
import json
import math
import statistics
import time
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from PIL import Image
from torch import nn

import train_dit
import train_vae
from dit import SIZES, LightningDiT, RMSNorm, SwiGLU
from train_dit import (
    LADDER,
    PRESETS,
    AuthorsLatents,
    LatentBatches,
    Latents,
    Run,
    Settings,
    architecture,
    ddpm_alphas,
    ddpm_loss,
    ddpm_velocity,
    flow_matching_loss,
    open_latents,
    preview,
    sample_time,
)
from train_vae import (
    Images,
    World,
    batch_indices,
    parse_settings,
    save_checkpoint,
    step_generator,
    to_float,
)
from vae import SPECS, AutoencoderKL, UserError, fingerprint, load_weights


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
             "swiglu": False, "rmsnorm": False, "rope": False, "qknorm": False, "shift": True,
             "objective": "ddpm",
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
    ("--ema", 1), ("--class-dropout", 2), ("--beta2", 1), ("--patch-size", 0), ("--lr", 0),
    ("--epochs", "nan"), ("--accumulate", 0), ("--seed", -1)])
def test_values_out_of_range_are_errors(flag, value):
    assert f"{flag} " in error(parse, flag, value)


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
    classes, shape, name = [str(i) for i in range(1000)], (4, 8, 8), "toy"
    mean, std = torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)

    def __init__(self, n):
        self.labels = torch.zeros(n, dtype=torch.long)
        self.meta = {"fingerprint": "", "identity": "", "image_size": 32, "data": ""}

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
def test_systems_state_epochs_steps_and_images(no_latents, monkeypatch, capsys, tmp_path, preset, size, steps,
                                               epochs, uniform):
    """80,000 and 1,000,000 steps (rounded), uniform time from 480 epochs [Sec. 5.4], Table 2's epochs."""
    no_latents(IMAGENET)
    monkeypatch.setattr(train_dit, "loader", lambda *args, **order: [])  # train() to the end without a step
    s = parse("--preset", preset, "--out", tmp_path, "--device", "cpu", "--no-compile")
    assert (s.size, s.uniform_from_epoch, s.qknorm, s.grad_clip) == (size, uniform, False, 0)
    assert (s.class_dropout, s.ema) == (0.1, 0.9999)
    train_dit.train(s, ONE)
    text = capsys.readouterr().out
    assert f"{steps} steps of {s.batch_size} = {epochs}.0 epochs = {steps * s.batch_size:,} images" in text
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


def test_a_stopped_run_goes_on_to_the_same_bits_and_the_same_log(no_latents, monkeypatch, tmp_path):
    """Stopped between two lines of the log, after steps 4 and 6 of 10: the losses by time go on, too."""
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
        assert "parts/dit.pt" in line and "the same command goes on from there" in line
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


def test_empty_bins_of_the_loss_are_not_0():
    means = train_dit.by_time(torch.tensor([[6.0, 0, 0, 1, 2], [3, 0, 0, 1, 4]]))
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


def test_the_loss_s_minimum_and_the_direction_term_alone():
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


def test_ddpm_s_schedule_is_the_linear_one():
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


def test_the_noise_predictor_s_velocity_is_rectified_flow_s():
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


def test_the_noise_predictor_s_flow_ends_at_the_data():
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


def test_the_compiled_model_has_no_graph_break_and_compiles_once():
    torch.compiler.reset()
    model, graphs = randomise(LightningDiT(8, 1, 4, **TINY, num_classes=10)).train(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    compiled = torch.compile(model, backend=backend, fullgraph=True)  # fullgraph: a break is an error
    for seed in range(3):
        x1, y, t, x0, drop = make_batch(seed=seed)
        torch.testing.assert_close(compiled(x1, t, y, drop), model(x1, t, y, drop))
        flow_matching_loss(compiled, x1, y, t, x0, drop)[0].backward()
    assert len(graphs) == 1
    model.eval()
    torch.testing.assert_close(compiled(x1, t, y), model(x1, t, y))


def test_a_compiled_run_takes_the_same_steps(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    plain, compiled = make_run(), make_run(compile=True, accumulate=2)
    for seed in range(2):
        batch = make_batch(seed=seed)
        torch.testing.assert_close(plain.step(*batch, True), compiled.step(*batch, True), rtol=1e-4,
                                   atol=1e-5)
    # nothing of torch.compile in the names that are saved
    assert set(compiled.model.state_dict()) == set(plain.model.state_dict())


def test_preview_is_fixed(tmp_path, tiny):
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
    save_checkpoint({"stage": "vae", "step": 1, "total_steps": 1, "settings": settings,
                     "spec": SPECS["mini-f4d4"], "state_dict": vae.state_dict()}, path)
    return path


@pytest.fixture
def few_shapes(monkeypatch):
    """The first 23 of the built-in images."""
    class Few(Images):
        def __init__(self, *args):
            super().__init__(*args)
            self.source, self.labels = self.source[:23], self.labels[:23]
    monkeypatch.setattr(train_dit, "Images", Few)


def latent_settings(tokenizer, folder, *flags):
    common = ("--extract-batch", 5, "--seed", 4, "--device", "cpu")
    return parse("--vae", tokenizer, "--latents", folder, *common, *flags)


def test_extracted_latents_are_the_stated_samples(few_shapes, tokenizer, tmp_path):
    s = latent_settings(tokenizer, tmp_path / "l")
    latents, vae = open_latents(s, ONE)
    file = np.load(tmp_path / "l" / "latents.npy")
    assert file.shape == (23, 2, 4, 8, 8) and file.dtype == np.float16
    assert sorted(p.name for p in (tmp_path / "l").iterdir()) == ["labels.npy", "latents.json", "latents.npy"]
    images = Images("shapes", "train", 32)
    assert np.load(tmp_path / "l" / "labels.npy").tolist() == [i % 10 for i in range(23)]
    for i in range(23):  # image by image; noise: of (seed, chunk), plain before flipped
        chunk, place = divmod(i, 5)
        noise = torch.randn(2, min(5, 23 - 5 * chunk), 4, 8, 8,
                            generator=step_generator("cpu", 4, "posterior", chunk))[:, place]
        for side, x in enumerate((images[i], images[i].flip(2))):
            posterior = vae.encode(to_float(x)[None])
            want = posterior.mean[0] + (0.5 * posterior.logvar[0]).exp() * noise[side]
            np.testing.assert_allclose(file[i, side].astype(np.float32), want.numpy(), atol=2e-3, rtol=2e-3)
    exact = file.astype(np.float64).transpose(2, 0, 1, 3, 4).reshape(4, -1)
    np.testing.assert_allclose(latents.mean.flatten(), exact.mean(1), rtol=1e-6)
    np.testing.assert_allclose(latents.std.flatten(), exact.std(1, ddof=1), rtol=1e-6)
    assert latents.mean.shape == latents.std.shape == (1, 4, 1, 1) and latents.shape == (4, 8, 8)
    assert latents.classes == images.classes and latents.labels.tolist() == images.labels[:23].tolist()
    assert latents.meta["fingerprint"] == fingerprint(vae.state_dict())
    assert latents.meta["identity"] == images.identity
    index, flip = torch.tensor([7, 0, 22, 7]), torch.tensor([1, 0, 1, 0])
    want = np.stack([file[7, 1], file[0, 0], file[22, 1], file[7, 0]])
    assert torch.equal(latents.read(index, flip), torch.from_numpy(want))


def test_two_processes_extract_the_same_bytes(few_shapes, tokenizer, tmp_path, monkeypatch):
    """Process 1 does its chunks where process 0 waits for it before the statistics."""
    one, two = tmp_path / "one", tmp_path / "two"
    open_latents(latent_settings(tokenizer, one), ONE)
    first, second, waits = world(0, 2), world(1, 2), []
    monkeypatch.setattr(second, "barrier", lambda: None)

    def barrier():
        waits.append(0)
        if len(waits) == 3:  # after the images, after the plan, then here
            assert list((two / "marks").read_bytes()) == [1, 0, 1, 0, 1]  # every second chunk
            monkeypatch.setattr(train_dit, "read_latents", lambda folder: SimpleNamespace(meta={}))
            open_latents(latent_settings(tokenizer, two, "--workers", 2), second)
    monkeypatch.setattr(first, "barrier", barrier)
    monkeypatch.setattr(second, "rank", 1)
    open_latents(latent_settings(tokenizer, two), first)
    for name in ("latents.npy", "labels.npy", "latents.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_somebody_s_own_arrays_are_never_overwritten(few_shapes, tokenizer, tmp_path):
    for name in ("latents.npy", "labels.npy"):
        folder = tmp_path / name[:-4]
        folder.mkdir()
        np.save(folder / name, np.arange(5))
        before = (folder / name).read_bytes()
        line = error(open_latents, latent_settings(tokenizer, folder), ONE)
        assert name in line and (folder / name).read_bytes() == before


def test_damaged_latents_are_refused(few_shapes, tokenizer, tmp_path):
    folder = tmp_path / "l"
    s = latent_settings(tokenizer, folder)
    open_latents(s, ONE)
    good = {path: path.read_bytes() for path in folder.iterdir()}
    meta = json.loads((folder / "latents.json").read_text())
    labels = np.load(folder / "labels.npy")

    def spoil(name, value):
        if name.endswith("json"):
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        else:
            np.save(folder / name, value)
    for name, value in (
            ("labels.npy", labels[:-1]), ("labels.npy", labels.astype(float)), ("labels.npy", labels + 1),
            ("labels.npy", labels[:, None]), ("labels.npy", labels - 1), ("latents.json", "{"),
            ("labels.npy", np.array([{}] * 23)), ("latents.json", meta | {"shape": [4, 8]}),
            ("latents.json", {k: v for k, v in meta.items() if k != "classes"}), ("latents.json", [1]),
            ("latents.json", meta | {"std": [1.0] * 3}), ("latents.json", meta | {"std": [1.0, 0, 1, 1]}),
            ("latents.json", meta | {"mean": [1.0, math.nan, 1, 1]}),
            ("latents.npy", np.zeros((23, 2, 4, 8, 8), np.float32)), ("latents.npy", labels)):
        spoil(name, value)
        assert str(folder) in error(open_latents, s, ONE), (name, value)
        for path, data in good.items():
            path.write_bytes(data)
    (folder / "latents.npy").write_bytes(good[folder / "latents.npy"][:1000])
    assert str(folder) in error(open_latents, s, ONE)


def test_an_unfinished_tokenizer_needs_a_flag(few_shapes, tokenizer, tmp_path):
    state = torch.load(tokenizer, weights_only=True)
    save_checkpoint(state | {"total_steps": 2}, tmp_path / "half.pt")
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
    before = (folder / "latents.npy").stat().st_mtime_ns
    (tmp_path / "a").rename(tmp_path / "b")
    open_latents(latent_settings(tokenizer, folder, "--data", tmp_path / "b"), ONE)
    assert (folder / "latents.npy").stat().st_mtime_ns == before
    (tmp_path / "b" / "0" / "0.png").unlink()
    line = error(open_latents, latent_settings(tokenizer, folder, "--data", tmp_path / "b"), ONE)
    assert "identity" in line and "--latents" in line


def test_latents_that_are_not_finite_are_refused(few_shapes, tokenizer, tmp_path):
    state = torch.load(tokenizer, weights_only=True)
    state["state_dict"]["quant_conv.bias"][0] = 1e5  # beyond float16
    save_checkpoint(state, tmp_path / "broken.pt")
    line = error(open_latents, latent_settings(tmp_path / "broken.pt", tmp_path / "l"), ONE)
    assert "broken.pt" in line and "not finite in float16" in line
    assert not (tmp_path / "l" / "latents.json").exists()


def test_latents_of_others_are_refused(few_shapes, tokenizer, tmp_path):
    folder = tmp_path / "l"
    open_latents(latent_settings(tokenizer, folder), ONE)
    state = torch.load(tokenizer, weights_only=True)
    state["state_dict"]["decoder.conv_in.bias"] += 1e-3
    save_checkpoint(state, tmp_path / "other.pt")
    line = error(open_latents, latent_settings(tmp_path / "other.pt", folder), ONE)
    assert "other.pt" in line and "fingerprint" in line and "--latents" in line
    line = error(open_latents, latent_settings(tokenizer, folder, "--image-size", 64), ONE)
    assert "image_size 32 instead of 64" in line
    line = error(open_latents, latent_settings(tokenizer, folder, "--preset", "table1-9"), ONE)
    assert "f16d32" in line and "table1-9" in line
    open_latents(latent_settings(tokenizer, folder, "--tokenizer-spec", "mini-f4d4"), ONE)
    save_checkpoint(torch.load(tokenizer, weights_only=True) | {"identity": "xyz"}, tmp_path / "photos.pt")
    line = error(open_latents, latent_settings(tmp_path / "photos.pt", folder), ONE)
    assert "identity" in line and "instead of xyz" in line
    state["settings"] = {}
    save_checkpoint(state, tmp_path / "unknown.pt")
    assert "--data" in error(open_latents, latent_settings(tmp_path / "unknown.pt", tmp_path / "new"), ONE)


@pytest.fixture
def authors_folder(tmp_path):
    """Two shards as the authors write them; returns the folder and all latents (12, 2, 4, 8, 8)."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(0)
    z, labels = torch.randn(12, 2, 4, 8, 8), torch.arange(12) % 7
    folder = tmp_path / "authors"
    folder.mkdir()
    for k, part in enumerate((slice(0, 7), slice(7, 12))):
        save_file({"latents": z[part, 0].contiguous(), "latents_flip": z[part, 1].contiguous(),
                   "labels": labels[part].contiguous()},
                  folder / f"latents_rank00_shard{k:03}.safetensors")
    stats = {"mean": z.mean((0, 1, 3, 4)).view(1, 4, 1, 1), "std": z.std((0, 1, 3, 4)).view(1, 4, 1, 1)}
    torch.save(stats, folder / "latents_stats.pt")
    return folder, z


def test_the_authors_latents_read_the_same(authors_folder, tokenizer):
    folder, z = authors_folder
    latents, _ = open_latents(latent_settings(tokenizer, folder), ONE)
    assert isinstance(latents, AuthorsLatents) and latents.shape == (4, 8, 8) and len(latents.classes) == 7
    assert latents.labels.tolist() == [i % 7 for i in range(12)] and latents.labels.dtype == torch.int64
    torch.testing.assert_close(latents.mean, z.mean((0, 1, 3, 4)).view(1, 4, 1, 1))
    torch.testing.assert_close(latents.std, z.std((0, 1, 3, 4)).view(1, 4, 1, 1))
    # over the border of the shards
    index, flip = torch.tensor([0, 6, 7, 11, 3, 7]), torch.tensor([0, 1, 0, 1, 1, 1])
    assert torch.equal(latents.read(index, flip), z[index, flip])
    batch, y = LatentBatches(latents, 6, 0, slice(0, 6))[0]
    assert batch.shape == (6, 4, 8, 8) and torch.equal(y, latents.labels[batch_indices(12, 6, 0, 0)])


def test_the_authors_latents_that_do_not_fit(authors_folder, tokenizer, tmp_path):
    folder, z = authors_folder
    wide = AutoencoderKL(**SPECS["mini-f4d8"])
    save_checkpoint({"stage": "vae", "step": 1, "total_steps": 1, "settings": {}, "spec": SPECS["mini-f4d8"],
                     "state_dict": wide.state_dict()}, tmp_path / "wide.pt")
    line = error(open_latents, latent_settings(tmp_path / "wide.pt", folder, "--image-size", 32), ONE)
    assert "shape [4, 8, 8] instead of [8, 8, 8]" in line and "wide.pt" in line
    from safetensors.torch import save_file
    s, path = latent_settings(tokenizer, folder), folder / "latents_rank00_shard001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:100])
    assert path.name in error(open_latents, s, ONE)
    plain, labels = z[:5, 0].contiguous(), torch.arange(5)
    for tensors in ({"latents": plain, "labels": labels},
                    {"latents": plain, "latents_flip": plain[:4] + 1, "labels": labels},
                    {"latents": plain, "latents_flip": plain + 1, "labels": labels[:4].contiguous()}):
        save_file(tensors, path)
        assert path.name in error(open_latents, s, ONE)
    path.write_bytes(good)
    (folder / "latents_stats.pt").unlink()
    assert "latents_stats.pt" in error(open_latents, s, ONE)


def test_batches_of_latents(tmp_path):
    class Told(Everything):  # a latent says its index, and whether it is flipped
        def read(self, index, flip):
            return (index + 1000 * flip).view(-1, 1, 1, 1).expand(-1, *self.shape).half()
    latents = Told(41)
    latents.labels = torch.arange(41) * 3
    batches, flips, seen = LatentBatches(latents, 8, 6, slice(0, 8)), [], []
    for step in range(41):
        z, y = batches[step]
        value = z[:, 0, 0, 0].long()
        assert torch.equal(value % 1000, batch_indices(41, 8, step, 6)) and torch.equal(y, value % 1000 * 3)
        assert torch.equal(z, batches[step][0])
        parts = [LatentBatches(latents, 8, 6, world(rank, 2).share(8))[step] for rank in range(2)]
        assert torch.equal(torch.cat([part[0] for part in parts]), z)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)
        flips, seen = flips + (value >= 1000).tolist(), seen + (value % 1000).tolist()
    assert all(sorted(seen[e * 41:(e + 1) * 41]) == list(range(41)) for e in range(8))
    assert np.mean(flips) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(flips)))
    assert not torch.equal(LatentBatches(latents, 8, 7, slice(0, 8))[0][0], batches[0][0])


def test_reading_at_random_is_20_times_faster_than_opening_a_file_for_every_item(tmp_path, capsys):
    """20,000 latents of 32x16x16 in float16, each read once in random order, against the authors' way: open
    the shard, read one slice and its label."""
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import save_file
    n, shape, rng = 20_000, (32, 16, 16), np.random.default_rng(0)
    block = rng.standard_normal((500, 2, *shape), dtype=np.float32).astype(np.float16)
    file = np.lib.format.open_memmap(tmp_path / "latents.npy", "w+", np.float16, (n, 2, *shape))
    for i in range(0, n, 500):
        file[i:i + 500] = block
    del file
    np.save(tmp_path / "labels.npy", np.arange(n))
    meta = {"fingerprint": "", "identity": "", "image_size": 256, "shape": shape, "classes": ["a"],
            "mean": [0.0] * 32, "std": [1.0] * 32}
    (tmp_path / "latents.json").write_text(json.dumps(meta))
    shard = torch.from_numpy(block).repeat(20, 1, 1, 1, 1)
    for k in range(2):  # shards of 10,000
        tensors = {"latents": shard[:, 0].contiguous(), "latents_flip": shard[:, 1].contiguous()}
        save_file(tensors | {"labels": torch.arange(10_000) + 10_000 * k}, tmp_path / f"{k}.safetensors")
    latents, theirs, ours = Latents(tmp_path), [], []
    order, flip = torch.from_numpy(rng.permutation(n)), torch.from_numpy(rng.integers(0, 2, n))
    for start in range(0, n, 500):
        index, side = order[start:start + 500], flip[start:start + 500]
        begin = time.perf_counter()
        z, y = latents.read(index, side), latents.labels[index]
        ours.append(500 / (time.perf_counter() - begin))
        if start % 2500 == 0:
            begin, parts = time.perf_counter(), []
            for i, flipped in zip(index[:100].tolist(), side[:100].tolist()):
                with safetensors.safe_open(str(tmp_path / f"{i // 10_000}.safetensors"), "pt") as f:
                    row = slice(i % 10_000, i % 10_000 + 1)
                    parts.append((f.get_slice("latents_flip" if flipped else "latents")[row],
                                  f.get_slice("labels")[row]))
            theirs.append(100 / (time.perf_counter() - begin))
            assert torch.equal(torch.cat([p[0] for p in parts]), z[:100])
            assert torch.equal(torch.cat([p[1] for p in parts]), y[:100])
    for path in tmp_path.iterdir():  # 1.3 GB
        path.unlink()
    a, b = statistics.median(ours), statistics.median(theirs)
    with capsys.disabled():
        print(f"\nlatents at random, items/s: {a:,.0f} against {b:,.0f} of opening a safetensors file for "
              f"every item: {a / b:.1f} times as many")
    assert a / b >= 20


# --- released weights ---

def test_weights_that_do_not_fit_are_named(tmp_path, tiny):
    model = make_run().model
    weights = model.state_dict()
    before = weights["blocks.1.attn.qkv.weight"].clone()
    missing = {k: v for k, v in weights.items() if k != "blocks.1.attn.qkv.weight"}
    cases = [(missing, "Missing", "blocks.1.attn.qkv.weight"),
             ({**weights, "blocks.0.attn.q_norm.weight": torch.ones(8)}, "Unexpected",
              "blocks.0.attn.q_norm.weight"),
             ({**weights, "y_embedder.embedding_table.weight": torch.ones(1001, 32)},
              "y_embedder.embedding_table.weight", "[1001, 32]", "[11, 32]")]
    for wrong, *words in cases:
        line = error(load_weights, model, wrong, "file.pt")
        assert all(word in line for word in ("file.pt does not fit", *words)) and "\n" not in line
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], before)
    load_weights(model, {k: v + 1 for k, v in weights.items()}, "file.pt")
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], before + 1)
    line = error(architecture, Settings(patch_size=3), (4, 8, 8), 10)
    assert "--patch-size 3 does not divide latents of 8x8" in line
    torch.save({"ema": weights}, tmp_path / "file.pt")  # --init: model and EMA start there
    run = make_run(random=False, init=str(tmp_path / "file.pt"), seed=5)
    for m in (run.model, run.ema):
        assert all(torch.equal(m.state_dict()[k], v) for k, v in weights.items())


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


def test_a_training_step_of_b_1_costs_no_more_than_a_plain_transformer_s(capsys):
    """Forward, loss, backward, AdamW, EMA; batch 2, fp32, one core. Medians, the two in turn. Depth 3 of 12:
    the blocks are alike, the test is short."""
    from torch.utils.flop_counter import FlopCounterMode
    depth, batch, times, flops = 3, make_batch(2, (32, 16, 16), 1000), ([], []), []
    s = Settings(size="B", precision="fp32", compile=False)
    ours = Run(s, {**architecture(s, (32, 16, 16), 1000), "depth": depth}, ONE)
    theirs = Run(s, {**architecture(s, (32, 16, 16), 1000), "depth": 1}, ONE)
    plain = Plain(depth)
    theirs.model = theirs.ddp = theirs.net = plain
    theirs.params = list(plain.parameters())
    theirs.averages = list(copy.deepcopy(plain).requires_grad_(False).parameters())
    theirs.opt = torch.optim.AdamW(theirs.params, 2e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for run in (ours, theirs):
        with FlopCounterMode(display=False) as counter:
            run.step(*batch, False)  # the first step makes the optimizer's state
        flops.append(counter.get_total_flops())
    for _ in range(3):
        for run, found in zip((ours, theirs), times):
            begin = time.perf_counter()
            run.step(*batch, False)
            found.append(time.perf_counter() - begin)
    a, b = (statistics.median(found) for found in times)
    with capsys.disabled():
        print(f"\na training step of LightningDiT-B/1's width: {a:.2f} s, plain transformer {b:.2f} s, "
              f"ratio {a / b:.2f}, FLOPs {flops[0] / flops[1]:.3f}")
    assert flops[0] / flops[1] == pytest.approx(1, abs=0.05) and a / b < 2.0
