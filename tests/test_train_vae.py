"""train_vae.py in process: the paper's rows and numbers typed by hand, ADM's crop rewritten, float64 loops, and the files and flags that go wrong."""
import functools
import os
import signal
from dataclasses import asdict, dataclass, fields

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import train_vae
from train_vae import (PAPER_SCORES, PRESETS, ROWS, DataError, Finite, ImageBatches, Images, Metrics, Run, Settings, Stage, Stop, World, atomic_write,
                       batch_indices, build, center_crop, draw_shape, fingerprint, load_checkpoint, load_tokenizer, loader, opt, parse_settings,
                       posterior_health, read_released_tokenizer, reconstruction_loss, resume, save_checkpoint, save_grid, save_reconstructions, schedule,
                       share, to_float, to_uint8, torch_load, train_step)
from vae import SPECS, AutoencoderKL

CPU, ONE = torch.device("cpu"), World(0, 1, torch.device("cpu"))
IMAGENET = 1_281_167                                                                    # training images of ImageNet-1k
TINY = dict(embed_dim=4, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=32)


def parse(*flags, cls=Settings, presets=PRESETS):
    return parse_settings(cls, presets, "doc", [str(flag) for flag in flags])


def error(work, *args, **kwargs):
    """The one line that a user's mistake ends in."""
    with pytest.raises(SystemExit) as caught:
        work(*args, **kwargs)
    line = str(caught.value)
    assert "error:" in line and "\n" not in line.strip(), line
    return line


class Teacher(nn.Module):
    """A foundation model of few channels whose features differ from place to place."""
    width = 3

    def forward(self, x, grid):
        return (40 * F.adaptive_avg_pool2d(x, grid)).sin()


# --- the rows of the paper's tables ---------------------------------------------------------------------------------------------------------------

FULL = dict(vf="dinov2", mcos=True, mdms=True, vf_weight=0.1, cos_margin=0.5, mdms_margin=0.25)
NONE = dict(vf="none")
ONLY_MCOS, ONLY_MDMS = dict(FULL, mdms=False, vf_weight=0.05), dict(FULL, mcos=False, vf_weight=0.05)      # "we halve the hyper weight" [Sec. 6.3]
WANTED = {                                                                              # row: tokenizer, VF loss; the paper's rFID, PSNR, LPIPS, SSIM, gFID
    "table1-sdvae": ("f8d4", NONE, None),
    "table2-f16d16-none": ("f16d16", NONE, (0.49, 26.10, 0.132, 0.72, 16.24)),
    "table2-f16d16-mae": ("f16d16", dict(FULL, vf="mae"), (0.51, 26.01, 0.137, 0.71, 16.86)),
    "table2-f16d16-dinov2": ("f16d16", FULL, (0.55, 25.29, 0.147, 0.69, 15.79)),
    "table2-f16d32-none": ("f16d32", NONE, (0.26, 28.59, 0.089, 0.80, 22.62)),
    "table2-f16d32-mae": ("f16d32", dict(FULL, vf="mae"), (0.28, 28.33, 0.091, 0.80, 19.89)),
    "table2-f16d32-dinov2": ("f16d32", FULL, (0.28, 27.96, 0.096, 0.79, 15.82)),
    "table2-f16d64-none": ("f16d64", NONE, (0.17, 31.03, 0.055, 0.88, 36.83)),
    "table2-f16d64-mae": ("f16d64", dict(FULL, vf="mae"), (0.15, 31.03, 0.054, 0.87, 23.58)),
    "table2-f16d64-dinov2": ("f16d64", FULL, (0.14, 30.71, 0.055, 0.87, 24.00)),
    "table4-naive": ("f16d32", NONE, (0.26, 28.59, 0.089, 0.80, 22.62)),
    "table4-dinov2": ("f16d32", FULL, (0.28, 27.96, 0.096, 0.79, 15.82)),
    "table4-mae": ("f16d32", dict(FULL, vf="mae"), (0.28, 28.33, 0.091, 0.80, 19.89)),
    "table4-sam": ("f16d32", dict(FULL, vf="sam"), (0.26, 28.31, 0.091, 0.80, 19.80)),
    "table4-clip": ("f16d32", dict(FULL, vf="clip"), (0.33, 28.39, 0.091, 0.80, 18.93)),
    "table5-none": ("f16d32", NONE, (0.26, 28.59, 0.089, 0.80, 22.62)),
    "table5-full": ("f16d32", FULL, (0.28, 27.96, 0.096, 0.79, 15.82)),
    "table5-no-mcos": ("f16d32", ONLY_MDMS, (0.27, 28.52, 0.090, 0.80, 21.87)),
    "table5-no-mdms": ("f16d32", ONLY_MCOS, (0.27, 28.24, 0.090, 0.80, 17.74)),
    "table5-no-margin": ("f16d32", dict(FULL, cos_margin=0, mdms_margin=0), (0.27, 28.07, 0.093, 0.79, 17.77)),
    "tableA1-none": ("f16d32", NONE, (0.40, 26.34, 0.10, 0.74, 29.35)),
    "tableA1-m0.5-0.25": ("f16d32", FULL, (0.42, 25.88, 0.10, 0.72, 22.11)),
    "tableA1-m0.4-0.25": ("f16d32", dict(FULL, cos_margin=0.4), (0.41, 25.91, 0.10, 0.73, 22.70)),
    "tableA1-m0-0": ("f16d32", dict(FULL, cos_margin=0, mdms_margin=0), (0.44, 25.91, 0.10, 0.73, 23.43)),
    "tableA1-mcos": ("f16d32", ONLY_MCOS, (0.37, 25.38, 0.12, 0.71, 25.70)),
    "tableA1-mdms": ("f16d32", ONLY_MDMS, (0.39, 25.55, 0.12, 0.71, 26.99)),
    "tableA2-f16d32-vf": ("f16d32", FULL, (0.33, 25.81, 0.110, 0.72, 19.93)),
    "tableA2-f16d16": ("f16d16", NONE, (0.49, 24.45, 0.142, 0.66, 21.20)),
    "tableA2-f16d24": ("f16d24", NONE, (0.34, 25.40, 0.118, 0.71, 24.59)),
    "tableA2-f16d28": ("f16d28", NONE, (0.33, 26.13, 0.108, 0.73, 26.87)),
    "tableA3-f16d128": ("f16d128", NONE, (0.13, 30.00, 0.047, 0.86, 63.92)),
    "tableA3-f16d128-vf": ("f16d128", FULL, (0.14, 29.55, 0.050, 0.85, 46.13)),
    "tableA3-f32d128": ("f32d128", NONE, (0.38, 25.21, 0.119, 0.69, 54.52)),
    "tableA3-f32d128-vf": ("f32d128", FULL, (0.37, 24.98, 0.125, 0.68, 38.20)),
    "vavae-long": ("f16d32", dict(FULL), (0.28, None, None, None, None)),
}


def test_the_rows_are_the_paper_s_and_every_preset_is_valid():
    assert set(ROWS) == set(WANTED) and set(PRESETS) == {"mini", "imagenet256", *WANTED}
    assert PAPER_SCORES == {name: scores for name, (_, _, scores) in WANTED.items() if scores}
    for name in PRESETS:
        s = parse("--preset", name)
        assert s.preset == name and s.out == f"runs/{name}"
        for f in fields(Settings):                                                      # argparse checks flags against choices, not a preset's values
            value, choices = getattr(s, f.name), f.metadata["choices"]
            assert (choices is None or value in choices) and type(value) is type(f.default), (name, f.name, value)
    for name in set(PRESETS) - {"mini", "table1-sdvae"}:                                # what all ablations share [Sec. 5.1, 6.2]
        s = parse("--preset", name)
        assert (s.batch_size, s.lr, s.epochs, s.image_size, s.kl_weight, s.lpips_weight, s.disc_weight) == (256, 1e-4, 50, 256, 1e-6, 1.0, 0.5), name
        assert s.data == "imagenet" and s.steps == 0 and s.disc_start == 2501


@pytest.mark.parametrize("name", WANTED)
def test_every_row_builds_and_takes_a_step(monkeypatch, name):
    """The row's own spec, made narrow, through build() and train_step(), at the step where the discriminator begins."""
    spec, vf, _ = WANTED[name]
    asked = []
    monkeypatch.setattr(train_vae, "load_foundation_model", lambda *args: asked.append(args) or Teacher())
    s = parse("--preset", name, "--image-size", 64, "--lpips-weight", 0, "--no-compile", "--device", "cpu")
    assert s.spec == spec and {k: getattr(s, k) for k in vf} == vf
    assert (SPECS[spec]["ch"], SPECS[spec]["embed_dim"]) == (128, int(spec.rpartition("d")[2]))
    monkeypatch.setitem(SPECS, spec, {**SPECS[spec], "ch": 32})
    run, stage = build(s, None, ONE), schedule(s, IMAGENET)[0]
    f = int(spec[1:].partition("d")[0])
    assert run.tokenizer.vae.f == f and asked == ([] if vf == NONE else [(vf["vf"], (64 // f, 64 // f), "model", None)])
    before = run.tokenizer.vae.encoder.conv_in.weight.clone()
    x, noise = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, SPECS[spec]["embed_dim"], 64 // f, 64 // f)
    terms, _ = train_step(run, x, noise, stage, stage.disc_start)
    assert all(torch.isfinite(v) for v in terms.values()) and not torch.equal(before, run.tokenizer.vae.encoder.conv_in.weight)
    assert {"rec", "kl", "g", "d", "w_disc"} <= terms.keys()
    if vf == NONE:
        assert run.foundation is None and run.tokenizer.linear_proj is None and not {"mcos", "mdms", "w_vf"} & terms.keys()
        return
    assert tuple(run.tokenizer.linear_proj.weight.shape) == (3, SPECS[spec]["embed_dim"], 1, 1) and run.tokenizer.linear_proj.bias is None
    assert (terms["mcos"] > 0, terms["mdms"] > 0) == (vf["mcos"], vf["mdms"]) and terms["w_vf"] > 0
    if name != "vavae-long":
        assert stage[1:] == (vf["vf_weight"], vf["cos_margin"], vf["mdms_margin"], 2501) and stage.steps == 250_228     # 50 epochs of ImageNet


def test_the_long_recipe_is_three_stages():
    stages = schedule(parse("--preset", "vavae-long"), IMAGENET)
    # 100, 15 and 15 epochs x 1,281,167 / 256, rounded: w_hyper, m1, m2, the discriminator's first batch
    assert [tuple(stage) for stage in stages] == [(500_456, 0.5, 0.0, 0.0, 2501), (75_068, 0.1, 0.0, 0.0, 0), (75_068, 0.1, 0.5, 0.25, 0)]
    assert [type(stage.disc_start) for stage in stages] == [int] * 3
    s = parse("--preset", "vavae-long", "--steps", 650_592)                             # their sum may be said, nothing else
    assert schedule(s, IMAGENET) == stages
    assert "650592" in error(schedule, parse("--preset", "vavae-long", "--steps", 7), IMAGENET)
    for wrong in ("1:2:3", "a:0:0:0:0", "1:0:0:0:0,", "1:0:0:0:0:0", "inf:0:0:0:0", "1:0:0:0:inf"):
        assert "EPOCHS:W_HYPER:M1:M2:DISC_START" in error(schedule, parse("--preset", "vavae-long", "--stages", wrong), IMAGENET)
    assert schedule(parse("--steps", 9), 5)[0].steps == 9 and schedule(parse("--steps", 0, "--epochs", 0.001), 5)[0].steps == 1


def test_train_walks_through_the_stages(monkeypatch, tmp_path):
    """Which stage and which batch of it train_step is told, over the borders, and what a resumed run is told."""
    monkeypatch.setattr(train_vae, "SHAPES_TRAIN", 20)
    monkeypatch.setattr(train_vae, "SHAPES_TEST", 4)
    monkeypatch.setattr(train_vae.signal, "signal", lambda *args: None)
    seen = []

    def record(run, x, noise, stage, batch):
        seen.append((stage.vf_weight, stage.disc_start, batch, noise[0, 0, 0, 0].item(), x.mean().item()))
        return {"rec": torch.tensor(1.0)}, (noise, noise, noise)
    monkeypatch.setattr(train_vae, "train_step", record)
    s = parse("--spec", "mini-f4d4", "--image-size", 24, "--vf", "none", "--batch-size", 4, "--steps", 0, "--out", tmp_path,
              "--stages", "0.6:0.5:0:0:2,0.4:0.1:0:0:0,0.2:0.3:0.5:0.25:1")             # 3, 2 and 1 steps of 4 of 20 images
    train_vae.train(s, ONE)
    assert [row[:3] for row in seen] == [(0.5, 2, 0), (0.5, 2, 1), (0.5, 2, 2), (0.1, 0, 0), (0.1, 0, 1), (0.3, 1, 0)]
    whole, state = list(seen), torch_load(tmp_path / "vae.pt")
    assert state["step"] == state["total_steps"] == 6 and state["classes"][0] == "disc" and (tmp_path / "reconstructions.png").exists()
    save_checkpoint({**state, "step": 4}, tmp_path / "vae.pt")
    seen.clear()
    train_vae.train(s, ONE)
    assert seen == whole[4:]


# --- cost [Table A4] ---------------------------------------------------------------------------------------------------------------------------------

def test_flops_are_the_paper_s(capsys):
    train_vae.flops(Settings())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [int(row[-1]) for row in rows] == [390, 1170, 1325]
    assert [float(row[-2]) for row in rows] == pytest.approx([390, 1170, 1325], rel=0.01)


def test_bench_prints_what_vf_loss_adds(monkeypatch, capsys):
    monkeypatch.setitem(SPECS, "mini-f4d4", TINY)
    train_vae.bench(parse("--bench", "--spec", "mini-f4d4", "--image-size", 24, "--batch-size", 2, "--vf", "mini"), ONE, steps=2)
    text = capsys.readouterr().out
    assert "images/s" in text and "peak memory" in text and "VF loss adds" in text and "mini-f4d4, 24x24, batch 2" in text


# --- losses ------------------------------------------------------------------------------------------------------------------------------------------

def test_reconstruction_loss_equals_loops():
    torch.manual_seed(0)
    x, x_hat = torch.rand(2, 3, 5, 4) * 2 - 1, torch.rand(2, 3, 5, 4) * 2 - 1
    lpips = lambda a, b: (a * b).mean((1, 2, 3), keepdim=True)                          # noqa: E731
    a, b = x.double().numpy(), x_hat.double().numpy()
    for model, weight in ((None, 1.0), (lpips, 1.0), (lpips, 0.3)):
        want = 0.0
        for n in range(2):
            distance = (a[n] * b[n]).mean() if model else 0.0
            for c in range(3):
                for i in range(5):
                    for j in range(4):
                        want += abs(a[n, c, i, j] - b[n, c, i, j]) + weight * distance
        assert reconstruction_loss(x, x_hat, model, weight).item() == pytest.approx(want / 2, rel=1e-6)


def test_posterior_health_equals_numpy():
    torch.manual_seed(0)
    z, mean, logvar = torch.randn(3, 4, 5, 6) * torch.tensor([1.0, 2, 3, 0.5]).view(1, 4, 1, 1), torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    got = {k: v.item() for k, v in posterior_health(z, mean, logvar).items()}
    std = np.sqrt(np.exp(logvar.double().numpy()))
    channels = [z[:, c].double().numpy().std(ddof=1) for c in range(4)]
    p, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mean, (logvar / 2).exp())
    want = dict(post_std=std.mean(), post_std_spread=std.std(ddof=1), kl_per_dim=torch.distributions.kl_divergence(q, p).mean().item(),
                latent_std_min=min(channels), latent_std_max=max(channels))
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("precision, backend", [("fp32", "aot_eager"), ("bf16", "eager")])
def test_compiled_steps_have_the_same_terms(monkeypatch, precision, backend):
    """Eq. 4's extra passes walk through compiled graphs again: aot_eager cuts the same graphs as inductor does, without its code generation
    (and without the buffers that only inductor gives away).

    In bf16 one step only: after it a fresh GAN has turned rounding errors into another course.
    """
    monkeypatch.setitem(SPECS, "tiny", dict(TINY, ch_mult=(1, 2)))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.manual_seed(1)
    x, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 16, 16)
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        s = Settings(spec="tiny", image_size=32, compile=compiled, precision=precision, batch_size=2, lpips_weight=0.0)
        run = Run(s, ONE, Teacher(), pretrained=False)
        found.append([train_step(run, x, noise, Stage(9, 0.1, 0.5, 0.25, 0), step)[0] for step in range(3 if precision == "fp32" else 1)])
        assert set(run.state()["state_dict"]) == set(AutoencoderKL(**SPECS["tiny"]).state_dict())   # torch.compile adds no prefix to what is saved
        assert set(run.state()) == {"state_dict", "linear_proj", "optimizer", "discriminator", "optimizer_disc"}
    for plain, fast in zip(*found):
        for name, value in plain.items():
            tolerance = 1e-4 if precision == "fp32" else 0.25 if name.startswith("w_") else 0.02
            assert fast[name].item() == pytest.approx(value.item(), rel=tolerance, abs=1e-5), name


# --- images ----------------------------------------------------------------------------------------------------------------------------------------

def adm(image, size):
    """ADM's center_crop_arr, written from its description: floor-halve with a box filter while the short side is at least 2 size, then bicubic."""
    image = image.convert("RGB")
    width, height = image.size
    while min(width, height) // size >= 2:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    ratio = size / min(width, height)
    image = np.asarray(image.resize((round(width * ratio), round(height * ratio)), resample=Image.Resampling.BICUBIC))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top:top + size, left:left + size]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1"])
def test_center_crop_is_adm_s(mode):
    rng = np.random.default_rng(0)
    for width, height, size in ((37, 53, 16), (16, 16, 16), (131, 64, 16), (15, 40, 32), (33, 32, 16), (31, 200, 16), (50, 49, 24)):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
        image = coarse.convert(mode)
        got = center_crop(image, size)
        assert got.shape == (size, size, 3) and got.dtype == np.uint8 and np.array_equal(got, adm(image, size)), (width, height, size)


def test_center_crop_keeps_the_middle():
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, :64], wide[:, 64:128], wide[:, 128:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for array in (wide, wide.transpose(1, 0, 2)):
        got = center_crop(Image.fromarray(array), 16)[2:-2, 2:-2]
        assert (got == (0, 255, 0)).all()


def write_photos(root, counts, seed=0):
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (20 + i % 3, 22, 3), np.uint8)).convert("L" if i == 1 else "RGB").save(root / name / f"{i:03}.png")
    return root


def test_a_folder_without_a_split(tmp_path):
    root = write_photos(tmp_path / "photos", {"b": 20, "a": 25, "c": 9})
    train, test = (Images(str(root), split, 16) for split in ("train", "test"))
    every = [(c, i) for c, n in (("a", 25), ("b", 20), ("c", 9)) for i in range(n)]
    held_out, kept = every[9::10], [item for k, item in enumerate(every) if k % 10 != 9]    # every tenth, over all classes
    for images, want in ((train, kept), (test, held_out)):
        assert images.classes == ["a", "b", "c"] and len(images) == len(want) and images.labels.dtype == torch.int64
        assert images.labels.tolist() == ["abc".index(c) for c, _ in want] and images.memory is not None
        for position, (c, i) in enumerate(want):
            file = Image.open(root / c / f"{i:03}.png")
            assert np.array_equal(images[position].permute(1, 2, 0).numpy(), adm(file, 16))
        remembered = [images[i].clone() for i in range(len(images))]
        images.memory = None                                                            # as if there were too many for memory
        assert all(torch.equal(images[i], remembered[i]) for i in range(len(images))) and images[0].shape == (3, 16, 16) and images[0].dtype == torch.uint8


@pytest.mark.parametrize("name", ["val", "test", "validation"])
def test_a_folder_with_a_split(tmp_path, name):
    write_photos(tmp_path / "train", {"x": 11, "y": 3})
    with pytest.raises(DataError, match="none of val, test, validation"):
        Images(str(tmp_path), "test", 16)
    write_photos(tmp_path / name, {"x": 2, "y": 12}, seed=1)
    train, test = (Images(str(tmp_path), split, 16) for split in ("train", "test"))
    assert train.labels.tolist() == [0] * 11 + [1] * 3 and test.labels.tolist() == [0] * 2 + [1] * 12
    assert np.array_equal(test[1].permute(1, 2, 0).numpy(), adm(Image.open(tmp_path / name / "x" / "001.png"), 16))


def test_a_folder_too_small_to_split(tmp_path):
    with pytest.raises(DataError, match="too few to split"):
        Images(str(write_photos(tmp_path / "few", {"a": 6, "b": 3})), "test", 16)


def test_shapes_are_a_pure_function_of_seed_and_index(monkeypatch):
    first = {i: draw_shape(3, i) for i in range(20)}
    np.random.seed(1)
    torch.manual_seed(1)
    for i in reversed(range(20)):
        pixels, label = draw_shape(3, i)
        assert np.array_equal(pixels, first[i][0]) and label == first[i][1] == i % 10
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 and not np.array_equal(pixels, draw_shape(4, i)[0])
    assert len({pixels.tobytes() for pixels, _ in first.values()}) == 20
    monkeypatch.setattr(train_vae, "SHAPES_TRAIN", 30)
    monkeypatch.setattr(train_vae, "SHAPES_TEST", 20)
    train, test = (Images("shapes", split, 32) for split in ("train", "test"))
    assert len(train) == 30 and len(test) == 20 and train.classes == test.classes and len(set(train.classes)) == 10
    assert train.labels.bincount().tolist() == [3] * 10 and test.labels.bincount().tolist() == [2] * 10
    everything = {image.numpy().tobytes() for images in (train, test) for image in images.memory}
    assert len(everything) == 50 and np.array_equal(train[7].permute(1, 2, 0).numpy(), draw_shape(0, 7)[0])
    assert np.array_equal(test[0].permute(1, 2, 0).numpy(), draw_shape(0, 30)[0])       # test indices follow the training ones
    train.memory = None
    assert np.array_equal(train[7].permute(1, 2, 0).numpy(), draw_shape(0, 7)[0])


def test_there_are_enough_shapes_and_their_classes_are_balanced():
    assert train_vae.SHAPES_TRAIN >= 10_000 and train_vae.SHAPES_TRAIN % 10 == train_vae.SHAPES_TEST % 10 == 0


def test_to_float_and_to_uint8_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    x = to_float(levels)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1 and x[51].item() == pytest.approx(51 / 255 * 2 - 1, abs=1e-6)
    assert torch.equal(to_uint8(x), levels)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1])).tolist() == [0, 255, 0, 1]     # clipped, rounded
    assert torch.equal(to_uint8(x.bfloat16())[:3], to_uint8(x.bfloat16().float())[:3])


def test_save_grid(tmp_path):
    images = torch.stack([torch.full((3, 32, 32), v) for v in (-1.0, -0.5, 0.0, 0.5, 2.0)])
    save_grid(images, tmp_path / "new" / "grid.png", 3)
    picture = Image.open(tmp_path / "new" / "grid.png")
    assert picture.format == "PNG" and picture.mode == "RGB" and picture.size == (3 * (3 * 34 + 2), 3 * (2 * 34 + 2))     # 2 pixels between, shown x 3
    pixels = np.asarray(picture)[1::3, 1::3]                                            # back to one pixel each
    for k, want in enumerate((0, 64, 128, 191, 255)):
        top, left = 2 + k // 3 * 34, 2 + k % 3 * 34
        assert (pixels[top:top + 32, left:left + 32] == want).all()
    save_grid(torch.zeros(2, 3, 128, 100), tmp_path / "large.png", 2)
    assert Image.open(tmp_path / "large.png").size == (2 * 102 + 2, 132) and os.listdir(tmp_path / "new") == ["grid.png"]


def test_save_reconstructions_is_a_grid_and_its_psnr(tmp_path):
    class Half(nn.Module):                                                              # a "tokenizer" that loses half the contrast
        def encode(self, x):
            return type("Posterior", (), dict(mode=lambda self: x))()

        def decode(self, z):
            return z / 2
    images = [torch.full((3, 32, 32), v, dtype=torch.uint8) for v in range(0, 200, 10)]
    psnr = save_reconstructions(Half(), images, tmp_path / "r.png", CPU)
    picks = np.linspace(0, 19, 16).astype(int)
    values = np.array([10 * v / 127.5 - 1 for v in picks])
    assert psnr == pytest.approx(np.mean(10 * np.log10(4 / (values / 2) ** 2)), rel=1e-4)
    assert Image.open(tmp_path / "r.png").size == (3 * (8 * 34 + 2), 3 * (4 * 34 + 2))


# --- the order of the images -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, batch", [(23, 5), (20, 5), (7, 50), (9, 9), (1, 3)])
def test_within_an_epoch_none_twice_and_none_lost(n, batch):
    steps = -(-4 * n // batch)
    batches = [batch_indices(n, batch, step, seed=1) for step in range(steps)]
    assert all(len(b) == batch for b in batches)
    epochs = torch.cat(batches)[:4 * n].view(4, n)                                      # the borders of epochs lie within batches
    assert all(sorted(epoch.tolist()) == list(range(n)) for epoch in epochs)
    if n > 6:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4                    # another order every time
    train_vae.epoch_order.cache_clear()
    torch.manual_seed(99)
    for step in reversed(range(steps)):                                                 # a function of (seed, step): not of what came before
        assert torch.equal(batch_indices(n, batch, step, seed=1), batches[step])
    if n > 6:
        assert not all(torch.equal(batch_indices(n, batch, step, seed=2), batches[step]) for step in range(steps))


def test_share_divides_the_batch_among_processes():
    assert [list(range(12))[share(World(rank, 3, CPU), 12)] for rank in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert "--batch-size 10 is not divisible by the 3 processes" in error(share, World(0, 3, CPU), 10)


@pytest.fixture
def numbered(monkeypatch):
    """40 images whose left upper pixel tells the index, and the right one 255 - index."""
    class Numbered(list):
        pass
    images = Numbered(torch.zeros(3, 4, 4, dtype=torch.uint8) for _ in range(40))
    for i, image in enumerate(images):
        image[:, :, 0], image[:, :, -1] = i, 255 - i
    return images


def test_batches_of_images_are_shared_and_flipped(numbered):
    whole = ImageBatches(numbered, 8, 5, slice(0, 8))
    flips = []
    for step in range(60):
        x, index = whole[step], batch_indices(40, 8, step, 5)
        assert x.shape == (8, 3, 4, 4) and x.dtype == torch.uint8
        for image, i in zip(x, index.tolist()):
            flips.append(image[0, 0, 0].item() != i)
            assert torch.equal(image.flip(2) if flips[-1] else image, numbered[i])
        parts = [ImageBatches(numbered, 8, 5, share(World(rank, 4, CPU), 8))[step] for rank in range(4)]
        assert torch.equal(torch.cat(parts), x) and torch.equal(x, whole[step])
    assert np.mean(flips) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(len(flips)))


def test_the_loader_gives_the_same_with_and_without_worker_processes(numbered):
    batches = ImageBatches(numbered, 8, 5, slice(0, 8))
    plain, read_ahead = (list(loader(batches, 3, 9, workers, CPU)) for workers in (0, 1))
    assert len(plain) == len(read_ahead) == 6
    for step, a, b in zip(range(3, 9), plain, read_ahead):
        assert torch.equal(a, b) and torch.equal(a, batches[step])


# --- flags -------------------------------------------------------------------------------------------------------------------------------------------

@dataclass
class Flags:
    preset: str = opt("imagenet256", "preset", same=False)
    out: str = opt("", "out", same=False)
    image_size: int = opt(256, "100 % of the side")
    lr: float = opt(1e-4, "rate")
    swiglu: bool = opt(True, "on")
    fresh: bool = opt(False, "off", same=False)
    vf: str = opt("none", "model", choices=("none", "mini"))
    guidance: float = opt(0.0, "may be 0")
    name: "str | None" = opt(None, "nothing by default")


FLAG_PRESETS = {"mini": dict(image_size=32, swiglu=False), "large": {}}


def test_flags_override_the_preset_and_the_preset_the_defaults():
    p = functools.partial(parse, cls=Flags, presets=FLAG_PRESETS)
    assert asdict(p()) == dict(preset="mini", out="runs/mini", image_size=32, lr=1e-4, swiglu=False, fresh=False, vf="none", guidance=0.0, name=None)
    s = p("--preset", "large", "--lr", "3e-2", "--no-swiglu", "--fresh", "--vf", "mini", "--out", "there", "--name", "x")
    assert asdict(s) == dict(preset="large", out="there", image_size=256, lr=0.03, swiglu=False, fresh=True, vf="mini", guidance=0.0, name="x")
    assert p("--swiglu").swiglu is True and p("--image-size=48").image_size == 48 and p("--image-size", 48, "--preset", "large").image_size == 48


@pytest.mark.parametrize("flags, words", [
    (["--imagesize", "3"], ["--imagesize"]), (["--image", "3"], ["--image"]), (["--image-size", "3.5"], ["--image-size", "3.5"]),
    (["--lr", "fast"], ["--lr", "fast"]), (["--lr"], ["--lr"]), (["--preset", "tiny"], ["--preset", "tiny", "mini", "large"]),
    (["--vf", "dino"], ["--vf", "dino", "none"]), (["stray"], ["stray"]), (["--image-size", "-32"], ["--image-size -32", "negative"]),
    (["--lr", "-0.5"], ["--lr -0.5", "negative"]), (["--lr", "nan"], ["--lr nan", "not finite"]), (["--lr", "inf"], ["--lr inf"]),
    (["--lr", "0"], ["--lr", "greater than 0"]), (["--image-size", "0"], ["--image-size", "greater than 0"]),
    (["--guidance", "-1e-3"], ["--guidance"]), (["--no-vf"], ["--no-vf"]), (["--swiglu", "yes"], ["yes"])])
def test_wrong_flags_end_in_one_line(flags, words):
    line = error(parse, *flags, cls=Flags, presets=FLAG_PRESETS)
    assert all(word in line for word in words), line


def test_a_preset_with_an_unknown_setting_is_an_error():
    with pytest.raises(AssertionError, match="imagesize"):
        parse(cls=Flags, presets={"mini": dict(imagesize=3)})


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse("--help", cls=Flags, presets=FLAG_PRESETS)
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--image-size INT 100 % of the side (default: 32)", "--swiglu, --no-swiglu on (default: False)", "model: none, mini (default: 'none')"):
        assert words in text


# --- files -----------------------------------------------------------------------------------------------------------------------------------------

def test_resume_lists_what_differs(tmp_path):
    s, path = parse("--out", tmp_path), tmp_path / "vae.pt"
    assert resume(path, "vae", s, ONE) is None
    save_checkpoint({"stage": "vae", "step": 4, "settings": asdict(s), "x": torch.ones(2)}, path)
    state = resume(path, "vae", s, ONE)
    assert state["step"] == 4 and torch.equal(state["x"], torch.ones(2))
    same = parse("--out", tmp_path, "--workers", 3, "--log-every", 7, "--save-every", 9, "--device", "cpu", "--compile")
    assert resume(path, "vae", same, ONE)["step"] == 4                                  # conduct may differ
    other = parse("--out", tmp_path, "--lr", 0.5, "--no-mdms", "--seed", 3, "--data", "cifar10", "--workers", 3)
    line = error(resume, path, "vae", other, ONE)
    for words in (f"--lr 0.5 (checkpoint: {s.lr!r})", "--mdms False (checkpoint: True)", "--seed 3 (checkpoint: 0)", "--data 'cifar10'", "--fresh", str(path)):
        assert words in line
    assert line.count("checkpoint:") == 4
    assert resume(path, "vae", parse("--out", tmp_path, "--lr", 0.5, "--fresh"), ONE) is None
    older = torch.load(path, weights_only=True)
    del older["settings"]["warmup"]                                                    # written before there was such a setting
    save_checkpoint(older, path)
    assert resume(path, "vae", parse("--out", tmp_path, "--warmup", 0), ONE)["step"] == 4   # so it had none, its default
    assert "--warmup 7 (checkpoint: 0)" in error(resume, path, "vae", parse("--out", tmp_path, "--warmup", 7), ONE)
    assert "another kind (vae, not dit)" in error(resume, path, "dit", s, ONE)
    learned = {"seed", "spec", "batch_size", "lr", "vf", "vf_weight", "cos_margin", "mdms_margin", "mcos", "mdms", "stages", "epochs", "warmup", "steps", "data",
               "image_size", "kl_weight", "lpips_weight", "disc_weight", "disc_start", "vf_input", "init", "teacher_steps", "precision"}
    assert {f.name for f in fields(Settings) if f.metadata["same"]} == learned


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file.bin"
    atomic_write(path, lambda f: f.write(b"old"))
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file.bin"]

    def broken(f):
        f.write(b"half of the new")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, broken)
    assert path.read_bytes() == b"old"
    atomic_write(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new"


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_checkpoints_that_cannot_be_used_end_in_one_line(tmp_path, monkeypatch):
    good = tmp_path / "good.pt"
    save_checkpoint({"stage": "vae", "x": torch.arange(100_000)}, good)
    assert load_checkpoint(good, "vae", "hint")["stage"] == "vae"
    assert "run python train_vae.py" in error(load_checkpoint, tmp_path / "none.pt", "vae", "run python train_vae.py")
    assert "(vae, not dit): do this" in error(load_checkpoint, good, "dit", "do this")
    for size in (0, 1, 100, 5000, good.stat().st_size - 100):
        (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:size])
        assert "cut.pt cannot be read" in error(load_checkpoint, tmp_path / "cut.pt", "vae", "hint"), size
    torch.save([1, 2], tmp_path / "list.pt")
    assert "not a checkpoint" in error(load_checkpoint, tmp_path / "list.pt", "vae", "hint")
    torch.save({"x": 1}, tmp_path / "other.pt")
    assert "no stage of this project" in error(load_checkpoint, tmp_path / "other.pt", "vae", "hint")
    assert "cannot be read" in error(torch_load, tmp_path)                              # a folder
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "owned"))
    torch.save({"stage": "vae", "x": Evil()}, tmp_path / "evil.pt")
    assert "not a file of tensors only" in error(load_checkpoint, tmp_path / "evil.pt", "vae", "hint") and not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"step,rec\n1,0.5\n", b"hello", b"<!DOCTYPE html>", b"\x89PNG\r\n\x1a\n", b"tensors", b"J1"])
def test_a_file_of_another_kind_is_not_a_checkpoint(tmp_path, content):
    (tmp_path / "file.pt").write_bytes(content)
    assert "file.pt cannot be read" in error(torch_load, tmp_path / "file.pt")


def test_fingerprint_is_of_names_and_values():
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    mark = fingerprint(weights)
    assert mark == fingerprint(dict(reversed(weights.items()))) and len(mark) == 16 and int(mark, 16) >= 0
    assert mark == fingerprint({**weights, "a": weights["a"].t().contiguous().t()})         # the same values, laid out otherwise in memory
    others = [{**weights, "a": weights["a"] + 1e-6 * torch.eye(2, 3)}, {"a": weights["a"], "c": weights["b"]}, {**weights, "b": torch.ones(3)}]
    assert len({mark, *map(fingerprint, others)}) == 4


# --- released tokenizers -----------------------------------------------------------------------------------------------------------------------------

def full_size(name):
    """All names and full shapes of a tokenizer, each weight one stored number."""
    with torch.device("meta"):
        state = AutoencoderKL(**SPECS[name]).state_dict()
    return {k: torch.zeros(1).expand(v.shape) for k, v in state.items()}


AUTHORS_EXTRA = {"loss.logvar": torch.zeros(1), "loss.perceptual_loss.net.slice1.0.weight": torch.zeros(4),
                 "loss.discriminator.main.0.weight": torch.zeros(2), "foundation_model.model.cls_token": torch.zeros(3),
                 "linear_proj.weight": torch.zeros(1024, 32, 1, 1)}


def test_the_authors_file_is_recognised(tmp_path, capsys):
    weights = full_size("f16d32")
    assert len(weights) == 342 and weights["encoder.conv_out.weight"].shape == (64, 512, 3, 3)
    torch.save({"epoch": 49, "global_step": 5, "state_dict": {**weights, **AUTHORS_EXTRA}}, tmp_path / "vavae.pt")
    spec, got = read_released_tokenizer(tmp_path / "vavae.pt")
    assert spec == SPECS["f16d32"] and got.keys() == weights.keys()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in ("vavae.pt", "loss.*", "foundation_model.*", "linear_proj.*"))


@pytest.mark.parametrize("name", ["f8d4", "f16d16", "f16d128", "f32d128"])
def test_other_released_shapes_are_recognised(tmp_path, capsys, name):
    """f8d4: CompVis kl-f8, under state_dict with loss.* beside it. The others: plain dictionaries of weights."""
    weights = full_size(name)
    torch.save({"state_dict": {**weights, "loss.logvar": torch.zeros(1)}} if name == "f8d4" else weights, tmp_path / "file.ckpt")
    spec, got = read_released_tokenizer(tmp_path / "file.ckpt")
    assert spec == SPECS[name] and got.keys() == weights.keys() and ("loss.*" in capsys.readouterr().out) == (name == "f8d4")


@pytest.mark.parametrize("change, words", [
    (dict(remove="encoder.mid.attn_1.q.bias"), ["encoder.mid.attn_1.q.bias: missing in the file", "1 differences"]),
    (dict(add={"encoder.extra.weight": torch.zeros(2)}), ["encoder.extra.weight: (2,) in the file, no such weight"]),
    (dict(add={"quant_conv.weight": torch.zeros(8, 8, 1, 1)}), ["quant_conv.weight: (8, 8, 1, 1) in the file, (64, 64, 1, 1) in f16d32"]),
    (dict(add={"lossy.weight": torch.zeros(2)}), ["lossy.weight"])])
def test_a_weight_too_many_or_too_few_is_named(tmp_path, change, words):
    weights = {**full_size("f16d32"), **change.get("add", {})}
    weights.pop(change.get("remove"), None)
    torch.save({"state_dict": {**weights, **AUTHORS_EXTRA}}, tmp_path / "wrong.pt")
    line = error(read_released_tokenizer, tmp_path / "wrong.pt")
    assert "wrong.pt" in line and all(word in line for word in words), line


def test_what_we_save_loads_under_the_authors_names(tmp_path, monkeypatch, capsys):
    for name, embed_dim in (("f16d32", 32), ("f8d4", 4)):
        monkeypatch.setitem(SPECS, name, {**SPECS[name], "ch": 32})
    s = parse("--preset", "imagenet256", "--vf", "none", "--lpips-weight", 0, "--no-compile", "--device", "cpu")
    run = Run(s, ONE, None)
    save_checkpoint({"stage": "vae", "step": 1, "settings": asdict(s), "spec": SPECS["f16d32"], **run.state()}, tmp_path / "vae.pt")
    ours = torch.load(tmp_path / "vae.pt", weights_only=True)
    strict = AutoencoderKL(**SPECS["f16d32"])
    strict.load_state_dict(ours["state_dict"], strict=True)                             # as the authors' code loads
    assert not any(k.startswith(("loss.", "foundation_model.", "linear_proj.")) for k in ours["state_dict"])
    spec, weights = read_released_tokenizer(tmp_path / "vae.pt")
    assert spec == SPECS["f16d32"] and all(torch.equal(weights[k], v) for k, v in run.tokenizer.vae.state_dict().items())
    torch.save({"state_dict": {**weights, **AUTHORS_EXTRA}}, tmp_path / "released.pt")
    for path, step in (("vae.pt", 1), ("released.pt", 0)):
        vae, state = load_tokenizer(tmp_path / path, CPU)
        assert state["step"] == step and not vae.training and not any(p.requires_grad for p in vae.parameters())
        assert torch.equal(vae.decoder.conv_out.weight, run.tokenizer.vae.decoder.conv_out.weight)
        assert fingerprint(state["state_dict"]) == fingerprint(weights)
    # --init: the run starts from those weights, or says that they are of another spec
    s.init, s.seed = str(tmp_path / "released.pt"), 5
    started = build(s, None, ONE)
    assert torch.equal(started.tokenizer.vae.encoder.conv_in.weight, run.tokenizer.vae.encoder.conv_in.weight)
    s.spec = "f8d4"
    assert "--spec f8d4" in error(build, s, None, ONE)
    save_checkpoint({"stage": "dit"}, tmp_path / "dit.pt")
    assert "(dit, not vae)" in error(load_tokenizer, tmp_path / "dit.pt", CPU)
    assert "python train_vae.py" in error(load_tokenizer, tmp_path / "none.pt", CPU)


# --- watching and stopping -----------------------------------------------------------------------------------------------------------------------------

def test_finite_names_the_first_bad_step_and_term():
    watch, good, nan, inf = Finite(CPU), torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("-inf"), requires_grad=True)
    for step, (rec, kl) in enumerate([(good, good), (good, good), (good, inf), (nan, nan), (good, good)], start=1):
        watch.watch(step, rec=rec, kl=kl)
        if step < 3:
            watch.check("vae.pt", "advice")
    line = error(watch.check, "runs/x/vae.pt", "try this")
    assert "kl is not finite at step 3" in line and "try this" in line and "runs/x/vae.pt" in line


def test_metrics_after_the_checkpoint_are_written_again(tmp_path):
    path = tmp_path / "run" / "metrics.csv"
    first = Metrics(path, ONE, 0)
    for step in (2, 4, 6, 10):
        first.write(step, rec=step / 3, kl=1e-9 * step)
    first.file.close()
    again = Metrics(path, ONE, 4)
    again.write(6, rec=7.0, kl=8.0)
    again.write(8, kl=9.0)
    again.file.close()
    assert path.read_text().splitlines() == ["step,rec,kl", "2,0.666667,2e-09", "4,1.33333,4e-09", "6,7,8", "8,,9"]
    Metrics(path, World(1, 2, CPU), 4).write(9, rec=1.0)                                # another process writes nothing
    assert len(path.read_text().splitlines()) == 5
    fresh = Metrics(path, ONE, 0)
    fresh.file.close()
    assert path.read_text() == ""


def test_a_stop_signal_is_remembered_until_the_step_is_done():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        stop = Stop(ONE)
        assert not stop.agreed(False) and not stop.agreed(True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and stop.agreed(False) and stop.agreed(True)
        with pytest.raises(KeyboardInterrupt):                                          # asked already: Ctrl-C now kills
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
