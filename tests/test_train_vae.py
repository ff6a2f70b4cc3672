"""train_vae.py in process: the paper's rows and numbers typed by hand, ADM's crop rewritten, float64 loops,
and the files, folders and flags that go wrong."""
import contextlib
import io
import os
import signal
import zipfile
from dataclasses import asdict, dataclass, fields
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import user_error
from PIL import Image
from test_vae import full_size
from torch import nn

import train_vae
from train_vae import PRESETS, DiskArrays, ImageBatches, Images, Log, Run, Settings, World, opt, train_step
from vae import SPECS, AutoencoderKL, PatchDiscriminator, UserError

CPU, ONE = torch.device("cpu"), World("cpu")
TINY = {"embed_dim": 4, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,),
        "resolution": 32}


def process(rank, size):
    """One of several processes, which need not wait for each other."""
    world = World("cpu")
    world.rank, world.size, world.barrier = rank, size, int
    return world


def release(folder):
    """Close this process's files in a folder, and so release its locks, as the end of a process does."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith(str(folder)):
                os.close(int(number))


def parse(*flags, cls=Settings, presets=PRESETS):
    return train_vae.parse_settings(cls, presets, "doc", [str(flag) for flag in flags])


class Teacher(nn.Module):
    """A foundation model of few channels whose features differ from place to place."""
    width = 3

    def forward(self, x, grid):
        return (40 * F.adaptive_avg_pool2d(x, grid)).sin()


# --- the rows of the paper's tables ----------------------------------------------------------------------
NONE = {"vf": "none"}
FULL = {"vf": "dinov2", "mcos": True, "mdms": True, "vf_weight": 0.1, "cos_margin": 0.5, "mdms_margin": 0.25}
MAE = FULL | {"vf": "mae"}
NO_MARGIN = {"cos_margin": 0, "mdms_margin": 0}
ONLY_MCOS = FULL | {"mdms": False, "vf_weight": 0.05}   # "we halve the hyper weight" [Sec. 6.3]
ONLY_MDMS = FULL | {"mcos": False, "vf_weight": 0.05}
WANTED = {   # row: tokenizer, VF loss
    "table1-sdvae": ("f8d4", NONE),
    "table2-f16d16-none": ("f16d16", NONE), "table2-f16d16-mae": ("f16d16", MAE),
    "table2-f16d16-dinov2": ("f16d16", FULL), "table2-f16d32-none": ("f16d32", NONE),
    "table2-f16d32-mae": ("f16d32", MAE), "table2-f16d32-dinov2": ("f16d32", FULL),
    "table2-f16d64-none": ("f16d64", NONE), "table2-f16d64-mae": ("f16d64", MAE),
    "table2-f16d64-dinov2": ("f16d64", FULL),
    "table4-naive": ("f16d32", NONE), "table4-dinov2": ("f16d32", FULL), "table4-mae": ("f16d32", MAE),
    "table4-sam": ("f16d32", FULL | {"vf": "sam"}), "table4-clip": ("f16d32", FULL | {"vf": "clip"}),
    "table5-none": ("f16d32", NONE), "table5-full": ("f16d32", FULL), "table5-no-mcos": ("f16d32", ONLY_MDMS),
    "table5-no-mdms": ("f16d32", ONLY_MCOS), "table5-no-margin": ("f16d32", FULL | NO_MARGIN),
    "tableA1-none": ("f16d32", NONE), "tableA1-m0.5-0.25": ("f16d32", FULL),
    "tableA1-m0.4-0.25": ("f16d32", FULL | {"cos_margin": 0.4}), "tableA1-m0-0": ("f16d32", FULL | NO_MARGIN),
    "tableA1-mcos": ("f16d32", ONLY_MCOS), "tableA1-mdms": ("f16d32", ONLY_MDMS),
    "tableA2-f16d32-vf": ("f16d32", FULL), "tableA2-f16d16": ("f16d16", NONE),
    "tableA2-f16d24": ("f16d24", NONE), "tableA2-f16d28": ("f16d28", NONE),
    "tableA3-f16d128": ("f16d128", NONE), "tableA3-f16d128-vf": ("f16d128", FULL),
    "tableA3-f32d128": ("f32d128", NONE), "tableA3-f32d128-vf": ("f32d128", FULL),
    # the authors' code: 100, 15 and 15 epochs; w_hyper, m1, m2; the discriminator's first batch
    "vavae-long-1": ("f16d32", FULL | NO_MARGIN | {"vf_weight": 0.5, "epochs": 100}),
    "vavae-long-2": ("f16d32", FULL | NO_MARGIN | {"epochs": 15, "disc_start": 0}),
    "vavae-long-3": ("f16d32", FULL | {"epochs": 15, "disc_start": 0}),
}
SHARED = {   # by all ablations [Sec. 5.1, 6.2]
    "data": "imagenet", "image_size": 256, "batch_size": 256, "lr": 1e-4, "warmup": 0, "epochs": 50,
    "steps": 0, "kl_weight": 1e-6, "lpips_weight": 1.0, "disc_weight": 0.5, "disc_start": 2501,
    "vf_input": "model", "crop": "random", "flip": False, "init": ""}


def test_the_rows_are_the_paper_s_and_every_preset_is_valid():
    assert set(train_vae.ROWS) == set(WANTED) and set(PRESETS) >= {"mini", "imagenet256", *WANTED}
    for name in PRESETS:
        s = parse("--preset", name)
        assert s.preset == name and s.out == f"runs/{name}"
        for f in fields(Settings):   # argparse checks flags against choices, not a preset's values
            value, choices = getattr(s, f.name), f.metadata.get("choices")
            assert (choices is None or value in choices) and type(value) is type(f.default), (name, f.name)
    for name, (spec, vf) in (WANTED | {"imagenet256": ("f16d32", FULL)}).items():
        s = asdict(parse("--preset", name))
        want = SHARED | {"spec": spec} | vf
        assert {k: s[k] for k in want} == want, name


@pytest.mark.parametrize("name", WANTED)
def test_every_row_builds_and_takes_a_step(monkeypatch, name):
    """The row's own spec, made narrow, through build() and train_step(), where the discriminator begins."""
    spec, vf = WANTED[name]
    asked = []
    monkeypatch.setattr(train_vae, "load_foundation_model", lambda *args: asked.append(args) or Teacher())
    s = parse("--preset", name, "--image-size", 64, "--lpips-weight", 0, "--no-compile", "--device", "cpu")
    f, d = (int(v) for v in spec[1:].split("d"))
    assert (SPECS[spec]["ch"], SPECS[spec]["embed_dim"]) == (128, d)
    monkeypatch.setitem(SPECS, spec, SPECS[spec] | {"ch": 32})
    run = train_vae.build(s, None, ONE, False)
    assert run.tokenizer.vae.f == f
    assert asked == ([] if vf == NONE else [(vf["vf"], (64 // f, 64 // f), "model", None)])
    before = run.tokenizer.vae.encoder.conv_in.weight.clone()
    x, noise = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, d, 64 // f, 64 // f)
    terms = train_step(run, x, noise, s.disc_start)
    assert all(torch.isfinite(v) for v in terms.values())
    assert not torch.equal(before, run.tokenizer.vae.encoder.conv_in.weight)
    assert {"rec", "kl", "g", "d", "w_disc"} <= terms.keys()
    if vf == NONE:
        assert run.foundation is None and run.tokenizer.linear_proj is None
        assert not {"mcos", "mdms", "w_vf"} & terms.keys()
    else:
        proj = run.tokenizer.linear_proj
        assert proj.weight.shape == (3, d, 1, 1) and proj.bias is None
        assert (terms["mcos"] > 0, terms["mdms"] > 0) == (vf["mcos"], vf["mdms"]) and terms["w_vf"] > 0


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Settings of a small run on the built-in images, by flags; no signal handlers."""
    monkeypatch.setitem(SPECS, "mini-f4d4", TINY)
    monkeypatch.setattr(train_vae.signal, "signal", lambda *args: None)
    return partial(parse, "--spec", "mini-f4d4", "--image-size", 24, "--vf", "none", "--batch-size", 4,
                   "--no-compile", "--device", "cpu", "--disc-start", 0, "--workers", 0, "--save-every", 2)


def test_train_tells_train_step_the_batch_and_resumes_where_it_was(tiny, monkeypatch, tmp_path, capsys):
    seen = []

    def record(run, x, noise, batch):
        lr = run.opt.param_groups[0]["lr"]
        seen.append((batch, lr, noise.sum().item(), x.mean().item(), tuple(x.shape)))
        return {"rec": torch.tensor(1.0)}
    monkeypatch.setattr(train_vae, "train_step", record)
    # 10,000 images: 0.0024 epochs of batch 4 are 6 steps
    s = tiny("--steps", 0, "--epochs", 0.0024, "--out", tmp_path, "--lr", 0.1, "--warmup", 4)
    train_vae.train(s, ONE)
    assert [row[0] for row in seen] == list(range(6)) and {row[4] for row in seen} == {(4, 3, 24, 24)}
    assert [row[1] for row in seen] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert len({row[2] for row in seen}) == len({row[3] for row in seen}) == 6
    release(tmp_path)
    whole, state = list(seen), train_vae.torch_load(tmp_path / "vae.pt")
    assert state["step"] == state["total_steps"] == 6 and len(state["classes"]) == state["num_classes"] == 10
    assert (tmp_path / "reconstructions.png").exists()
    train_vae.train(s, ONE)
    assert "is finished" in capsys.readouterr().out and len(seen) == 6
    state = state | {"step": 4}
    train_vae.save_checkpoint(state | {"identity": "other"}, tmp_path / "vae.pt")
    line = user_error(train_vae.train, s, ONE)
    assert "--data" in line and str(tmp_path / "vae.pt") in line
    train_vae.save_checkpoint(state, tmp_path / "vae.pt")
    train_vae.train(s, ONE)
    assert seen[6:] == whole[4:]


def test_the_long_recipe_is_a_chain_by_init(tiny, monkeypatch, tmp_path):
    """A part starts from all weights of the one before, W and the discriminator, too; Adam starts anew."""
    monkeypatch.setattr(train_vae, "load_foundation_model", lambda *args: Teacher())
    tiny = partial(tiny, "--vf", "dinov2", "--lpips-weight", 0, "--disc-weight", 0.5)
    first, second = tiny("--out", tmp_path / "1", "--steps", 2), tiny("--out", tmp_path / "2", "--steps", 2)
    second.seed, second.init = 5, str(tmp_path / "1" / "vae.pt")
    train_vae.train(first, ONE)
    state = train_vae.torch_load(tmp_path / "1" / "vae.pt")
    run = train_vae.build(second, None, ONE, False)
    for name, part in run.parts().items():
        if name.startswith("optimizer"):
            assert not part.state and state[name]["state"], name
        else:
            assert all(torch.equal(value, state[name][k]) for k, value in part.state_dict().items()), name
    assert {"state_dict", "linear_proj", "discriminator"} <= run.parts().keys()
    resumed = train_vae.build(second, None, ONE, True)   # its checkpoint holds what it had learned
    assert not torch.equal(resumed.tokenizer.linear_proj.weight, run.tokenizer.linear_proj.weight)
    train_vae.train(second, ONE)
    assert train_vae.torch_load(tmp_path / "2" / "vae.pt")["step"] == 2


def test_init_takes_released_files_and_says_when_they_are_of_another_spec(monkeypatch, tmp_path):
    for name in ("f16d32", "f8d4"):
        monkeypatch.setitem(SPECS, name, SPECS[name] | {"ch": 32})
    flags = ("--vf", "none", "--lpips-weight", 0, "--no-compile", "--device", "cpu", "--disc-weight", 0)
    s = parse("--preset", "imagenet256", *flags, "--init", tmp_path / "released.pt")
    weights = AutoencoderKL(**SPECS["f16d32"]).state_dict()
    torch.save({"state_dict": weights | {"loss.logvar": torch.zeros(1)}}, s.init)
    run = train_vae.build(s, None, ONE, False)
    ours = run.tokenizer.vae.state_dict()
    assert ours.keys() == weights.keys() and all(torch.equal(ours[k], weights[k]) for k in weights)
    torch.save(full_size("f8d4"), s.init)
    assert "--spec f16d32" in user_error(train_vae.build, s, None, ONE, False)


def test_init_takes_what_else_the_authors_file_holds_if_it_fits(monkeypatch, tmp_path, capsys):
    """Theirs holds W of Eq. 1 and the discriminator beside the autoencoder, under other names than ours."""
    monkeypatch.setitem(SPECS, "f16d32", SPECS["f16d32"] | {"ch": 32})
    s = parse("--preset", "imagenet256", "--lpips-weight", 0, "--device", "cpu", "--init", tmp_path / "a.pt")
    theirs, disc = AutoencoderKL(**SPECS["f16d32"]).state_dict(), PatchDiscriminator()
    theirs |= {f"loss.discriminator.{name}": value for name, value in disc.state_dict().items()}
    foundation = SimpleNamespace(width=1024, to=lambda device: foundation)
    monkeypatch.setattr(train_vae, "load_foundation_model", lambda *_: foundation)
    for width, word in ((1024, "comes from it, too"), (768, "starts anew")):
        W = torch.randn(width, 32, 1, 1)
        torch.save({"state_dict": theirs | {"linear_proj.weight": W}}, s.init)
        run = train_vae.build(s, None, ONE, False)
        assert torch.equal(run.tokenizer.linear_proj.weight, W) == (width == 1024)
        ours = run.disc.state_dict()
        assert all(torch.equal(ours[name], value) for name, value in disc.state_dict().items())
        assert f"linear_proj {word}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--image-size", 30], ["--image-size 30", "divisible", "f16d32"]),
    (["--image-size", 16], ["--image-size 16", "--disc-weight 0"]),
    (["--no-mcos", "--no-mdms"], ["--no-mcos", "--vf none"])])
def test_settings_that_do_not_fit_each_other(flags, words):
    line = user_error(train_vae.build, parse("--preset", "imagenet256", *flags), None, ONE, False)
    assert all(word in line for word in words), line


def test_the_stand_in_is_the_same_for_all_seeds_and_may_learn_from_other_images(tmp_path):
    for name, classes in (("a", {"x": 6, "y": 6}), ("b", {"p": 4, "q": 4, "r": 4})):
        write_photos(tmp_path / name, classes)
    images = Images(str(tmp_path / "a"), "train", 16)
    make = partial(train_vae.stand_in, images=images, f=4, device=CPU)
    small = ("--data", tmp_path / "a", "--image-size", 16, "--teacher-steps", 2)
    first, second = (make(parse(*small, "--seed", seed), resumed=False) for seed in (0, 5))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    other = parse(*small, "--teacher-data", tmp_path / "b")
    assert make(other, resumed=False).head.out_features == 3 and first.head.out_features == 2
    empty = make(other, resumed=True)   # the checkpoint's weights come next
    assert empty.head.out_features == 3
    frozen = train_vae.load_foundation_model("mini", (4, 4), "model", empty)
    assert not empty.training and not any(p.requires_grad for p in frozen.parameters())


# --- losses and steps ------------------------------------------------------------------------------------
def test_reconstruction_loss_equals_loops():
    def lpips(a, b):
        return (a * b).mean((1, 2, 3), keepdim=True)
    torch.manual_seed(0)
    x, x_hat = torch.rand(2, 3, 5, 4) * 2 - 1, torch.rand(2, 3, 5, 4) * 2 - 1
    a, b = x.double().numpy(), x_hat.double().numpy()
    for model, weight in ((None, 1.0), (lpips, 1.0), (lpips, 0.3)):
        want = 0.0
        for n, c, i, j in np.ndindex(a.shape):
            want += abs(a[n, c, i, j] - b[n, c, i, j])
            want += weight * (a[n] * b[n]).mean() if model else 0
        got = train_vae.reconstruction_loss(x, x_hat, model, weight)
        assert got.item() == pytest.approx(want / 2, rel=1e-6)


def test_hinge_losses_equal_loops():
    real, fake = torch.tensor([[-2.0, 0.5, 3.0]]), torch.tensor([[-3.0, 0.0, 1.5]])
    assert train_vae.hinge_generator(fake).item() == pytest.approx((3 - 0 - 1.5) / 3)
    want = ((3 + 0.5 + 0) / 3 + (0 + 1 + 2.5) / 3) / 2
    assert train_vae.hinge_discriminator(real, fake).item() == pytest.approx(want)


def tiny_run(monkeypatch, **settings):
    """A Run, and images and noise for it."""
    monkeypatch.setitem(SPECS, "tiny", TINY)
    small = {"spec": "tiny", "image_size": 32, "compile": False, "batch_size": 4, "lpips_weight": 0.0,
             "disc_start": 0}
    torch.manual_seed(1)
    x, noise = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randn(4, 4, 16, 16)
    return Run(Settings(**(small | settings)), ONE, Teacher(), pretrained=False), x, noise


@pytest.mark.parametrize("precision, backend", [("fp32", "aot_eager"), ("bf16", "eager")])
def test_compiled_steps_have_the_same_terms(monkeypatch, precision, backend):
    """Eq. 4's extra passes walk through compiled graphs again: aot_eager cuts the same graphs as inductor
    does, without its code generation (and without the buffers that only inductor gives away)."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        run, x, noise = tiny_run(monkeypatch, compile=compiled, precision=precision)
        # in bf16 one step: after it a fresh GAN has turned a rounding error into another course
        steps = range(3 if precision == "fp32" else 1)
        found.append([train_step(run, x[:2], noise[:2], step) for step in steps])
        saved = run.parts()["state_dict"].state_dict()   # torch.compile adds no prefix to what is saved
        assert saved.keys() == AutoencoderKL(**TINY).state_dict().keys()
        assert run.parts().keys() == {"state_dict", "linear_proj", "optimizer", "discriminator",
                                      "optimizer_disc"}
    for plain, fast in zip(*found, strict=True):
        for name, value in plain.items():
            assert fast[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"accumulate": 4}, {"checkpointing": True},
                                      {"accumulate": 2, "checkpointing": True}])
def test_saving_memory_changes_no_step(monkeypatch, settings):
    """The discriminator in eval mode: its BatchNorm would see a part of the batch."""
    found = []
    for kwargs in ({}, settings):
        run, x, noise = tiny_run(monkeypatch, **kwargs)
        run.disc.eval()
        terms = [train_step(run, x, noise, batch) for batch in range(2)]
        found.append((terms, [p.grad for net in (run.tokenizer, run.disc) for p in net.parameters()]))
    (want, want_grads), (got, got_grads) = found
    for a, b in zip(want, got, strict=True):
        assert a.keys() <= b.keys()
        for name, value in a.items():
            assert b[name].item() == pytest.approx(value.item(), rel=1e-3), name
    whole = torch.cat([g.flatten() for g in want_grads]).norm()
    for a, b in zip(want_grads, got_grads, strict=True):
        assert (a - b).norm() < 1e-3 * a.norm() + 1e-5 * whole


def test_accumulate_keeps_what_goes_in_and_out(monkeypatch):
    """Autograd's memory of the decoder: its parts' inputs instead of every layer's activations."""
    def kept(**settings):
        run, _, noise = tiny_run(monkeypatch, **settings)
        bytes_of = {}

        def pack(tensor):
            if not isinstance(tensor, nn.Parameter):
                bytes_of[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run.tokenizer.vae.decode(noise).sum()
        return sum(storage.nbytes() for storage in bytes_of.values())
    assert kept(accumulate=2) < kept() / 10


# --- images ----------------------------------------------------------------------------------------------
def adm(image, size):
    """ADM's center_crop_arr, written from its description: floor-halve with a box filter while the short side
    is at least 2 size, then bicubic."""
    image = image.convert("RGB")
    width, height = image.size
    while min(width, height) // size >= 2:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    ratio = size / min(width, height)
    shape = round(width * ratio), round(height * ratio)
    image = np.asarray(image.resize(shape, resample=Image.Resampling.BICUBIC))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top:top + size, left:left + size]


def pixels(image):
    """uint8 (3, H, W) -> numpy (H, W, 3)."""
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def blurred(rng, width, height):
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BILINEAR)


SIZES = ((37, 53, 16), (16, 16, 16), (131, 64, 16), (15, 40, 32), (33, 32, 16), (31, 200, 16), (50, 49, 24))


def test_center_crop_is_adm_s():
    rng = np.random.default_rng(0)
    for width, height, size in SIZES:
        image = blurred(rng, width, height)
        got = pixels(train_vae.center_crop(image, size))
        assert np.array_equal(got, adm(image, size)), (width, height, size)


def test_center_crop_keeps_the_middle():
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, :64, 0] = wide[:, 64:128, 1] = wide[:, 128:, 2] = 255
    for array in (wide, wide.transpose(1, 0, 2)):
        got = pixels(train_vae.center_crop(Image.fromarray(array), 16))
        assert (got[2:-2, 2:-2] == (0, 255, 0)).all()


def test_random_crop_is_any_square_of_the_image_at_its_short_side():
    rng = np.random.default_rng(0)
    for width, height, size in SIZES:
        image = blurred(rng, width, height)
        scale = size / min(width, height)
        shape = (max(size, round(width * scale)), max(size, round(height * scale)))
        whole = np.asarray(image.resize(shape, Image.Resampling.BILINEAR))
        rows, columns = whole.shape[0] - size + 1, whole.shape[1] - size + 1
        for top in range(0, rows, 7):
            for left in range(0, columns, 7):
                where = ((top + 0.5) / rows, (left + 0.5) / columns)   # the middle of a position's interval
                got = pixels(train_vae.random_crop(image, size, where))
                assert np.array_equal(got, whole[top:top + size, left:left + size])
        last = pixels(train_vae.random_crop(image, size, (1 - 1e-7, 1 - 1e-7)))
        assert np.array_equal(last, whole[-size:, -size:])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1"])
def test_every_kind_of_file_becomes_rgb(tmp_path, mode):
    image = blurred(np.random.default_rng(0), 20, 30).convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    assert np.array_equal(np.asarray(train_vae.open_image(path)), np.asarray(image.convert("RGB")))


def test_a_16_bit_grey_image_keeps_its_greys(tmp_path):
    levels = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    got = np.asarray(train_vae.open_image(tmp_path / "grey.png")).astype(int)
    assert got.shape == (20, 30, 3) and (abs(got - (levels // 257)[..., None]) <= 1).all()


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    blurred(np.random.default_rng(0), 200, 200).save(tmp_path / "good.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    good = (tmp_path / "good.png").read_bytes()
    for name, content in (("half", good[:len(good) // 2]), ("text", b"hello"), ("empty", b"")):
        (tmp_path / f"{name}.png").write_bytes(content)
    for name in ("half", "text", "empty", "none", "bomb"):
        assert str(tmp_path / f"{name}.png") in user_error(train_vae.open_image, tmp_path / f"{name}.png")


def write_photos(root, counts, seed=0):
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(rng.integers(0, 256, (20 + i % 3, 22, 3), np.uint8))
            image.convert("L" if i == 1 else "RGB").save(root / name / f"{i:03}.png")
    return root


def splits(root, size=16):
    return [Images(str(root), split, size) for split in ("train", "test")]


def test_a_folder_without_a_split(tmp_path):
    root = write_photos(tmp_path / "photos", {"b": 20, "a": 25, "c": 9})
    every = [("a", i) for i in range(25)] + [("b", i) for i in range(20)] + [("c", i) for i in range(9)]
    held_out = every[9::10]   # every tenth, over all classes
    kept = [item for k, item in enumerate(every) if k % 10 != 9]
    for images, want in zip(splits(root), (kept, held_out), strict=True):
        assert images.classes == ["a", "b", "c"] and len(images) == len(want)
        assert images.labels.dtype == torch.int64
        assert images.labels.tolist() == ["abc".index(c) for c, _ in want]
        for position, (c, i) in enumerate(want):
            file = Image.open(root / c / f"{i:03}.png")
            assert np.array_equal(pixels(images[position]), adm(file, 16))
    with pytest.raises(UserError, match="too few"):
        Images(str(write_photos(tmp_path / "few", {"a": 6, "b": 3})), "test", 16)


@pytest.mark.parametrize("name", ["val", "test", "validation"])
def test_a_folder_with_a_split(tmp_path, name):
    """The training images' list of classes counts: a class that val lacks shifts no label."""
    write_photos(tmp_path / "train", {"x": 11, "xx": 2, "y": 3})
    assert "none of val, test, validation" in user_error(Images, str(tmp_path), "test", 16)
    write_photos(tmp_path / name, {"x": 2, "y": 12}, seed=1)
    train, test = splits(tmp_path)
    assert train.labels.tolist() == [0] * 11 + [1] * 2 + [2] * 3
    assert test.labels.tolist() == [0] * 2 + [2] * 12 and test.classes == train.classes == ["x", "xx", "y"]
    assert np.array_equal(pixels(test[1]), adm(Image.open(tmp_path / name / "x" / "001.png"), 16))
    (tmp_path / name / "z").mkdir()
    line = user_error(Images, str(tmp_path), "test", 16)
    assert str(tmp_path / name) in line and line.endswith("z")


def test_folders_in_folders_links_and_what_is_not_an_image(tmp_path):
    root = write_photos(tmp_path / "photos", {"a": 12, "b": 3})
    before = [(images.identity, len(images)) for images in splits(root)]
    (root / "a" / "again").symlink_to(root / "a")   # would multiply its images, over train and test
    (root / "a" / "notes.txt").write_text("hello")
    assert [(images.identity, len(images)) for images in splits(root)] == before
    write_photos(root / "b", {"deep": 5})
    assert sum(map(len, splits(root))) == 20
    elsewhere = write_photos(tmp_path / "elsewhere", {"c": 4})
    (root / "c").symlink_to(elsewhere / "c")   # a class that is a link
    assert sum(map(len, splits(root))) == 24
    (root / "empty").mkdir()
    assert str(root / "empty") in user_error(Images, str(root), "train", 16)
    assert "nowhere" in user_error(Images, "nowhere", "train", 16)


def test_identity_is_of_the_list_of_files_and_classes(tmp_path):
    def identity(split=0):
        return splits(root)[split].identity
    root = write_photos(tmp_path / "a", {"x": 12, "y": 12})
    first = identity()
    assert first != identity(1) and first != Images("shapes", "train", 16).identity
    root = root.rename(tmp_path / "moved")
    assert identity() == first
    (root / "y" / "003.png").rename(root / "y" / "003b.png")
    renamed = identity()
    (root / "y" / "003b.png").unlink()
    assert len({first, renamed, identity()}) == 3


@pytest.mark.filterwarnings("error")   # torch warns of a tensor copied by torch.tensor
@pytest.mark.parametrize("kind", ["list", "tensor", "_samples"])
def test_torchvision_s_sets(monkeypatch, tmp_path, kind):
    class Fake:
        classes = [("zero", "0"), "one"] if kind == "_samples" else ["zero", "one"]

        def __init__(self, root, download=False, **which):
            asked.append((root, download, which))
            if not download:
                raise RuntimeError("not found")
            labels = [0, 1, 1]
            targets = torch.tensor(labels) if kind == "tensor" else labels
            vars(self).update({"_samples": list(zip(files, labels))} if kind == "_samples"
                              else {"targets": targets})

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return Image.new("L", (20, 24), 80 * i), int(i > 0)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.new("L", (20, 24), 80 * i).save(file)
    asked, name = [], "imagenette" if kind == "_samples" else "cifar10"
    monkeypatch.setitem(train_vae.TORCHVISION, name, Fake)
    images = Images(name, "test", 16)
    assert images.classes == ["zero", "one"] and images.labels.tolist() == [0, 1, 1]
    assert images.labels.dtype == torch.int64 and (pixels(images[2]) == 160).all()
    assert [download for _, download, _ in asked] == [False, True]   # only what is missing
    assert asked[0][0] == "data" and asked[0][2].get("train", asked[0][2].get("split")) in (False, "val")


# --- the built-in images ---------------------------------------------------------------------------------
def drawn(seed, index, size=32):
    return np.asarray(train_vae.draw_shape(seed, index, size))


def test_shapes_are_a_pure_function_of_seed_and_index():
    first = [drawn(3, i) for i in range(20)]
    np.random.seed(1)
    for i in reversed(range(20)):
        picture = drawn(3, i)
        assert np.array_equal(picture, first[i])
        assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
        assert not np.array_equal(picture, drawn(4, i))
    assert len({picture.tobytes() for picture in first}) == 20
    large = train_vae.draw_shape(3, 4, 64).reduce(2)   # the same picture, only finer
    assert abs(np.asarray(large).astype(int) - first[4]).mean() < 3


def test_the_built_in_sets():
    train, test = (Images("shapes", split, 32) for split in ("train", "test"))
    assert (len(train), len(test)) == (10_000, 2_000)
    assert train.classes == test.classes and len(set(train.classes)) == 10
    for images in (train, test):
        assert (images.labels.bincount() == len(images) // 10).all()
    assert np.array_equal(pixels(train[7]), drawn(0, 7)) and train.labels[7] == 7
    assert np.array_equal(pixels(test[3]), drawn(0, 10_003))   # test images follow
    assert np.array_equal(pixels(Images("shapes", "train", 24)[0]), drawn(0, 0, 24))


def test_the_shape_tells_the_class():
    """The nearest of 600 pictures, compared by where the ink is, has the same class."""
    masks = []
    for i in range(700):
        picture = drawn(0, i).astype(int)
        distance = abs(picture - picture[0, 0]).sum(2)   # a corner is ground
        assert distance.max() > 60, i                    # and ink differs from ground
        mask = distance > distance.max() / 2
        assert 0.05 < mask.mean() < 0.8
        masks.append(mask.ravel())
    masks = np.array(masks, np.float32)
    gaps = ((masks[600:, None] - masks[None, :600]) ** 2).sum(2)
    assert (gaps.argmin(1) % 10 == np.arange(600, 700) % 10).mean() > 0.8


# --- pictures --------------------------------------------------------------------------------------------
def test_to_float_and_to_uint8_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    x = train_vae.to_float(levels)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert x[51].item() == pytest.approx(51 / 255 * 2 - 1, abs=1e-6)
    assert torch.equal(train_vae.to_uint8(x), levels)
    odd = torch.tensor([-9.0, 9.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1])   # clipped, rounded
    assert train_vae.to_uint8(odd).tolist() == [0, 255, 0, 1]
    assert train_vae.to_uint8(x.bfloat16())[0] == 0 and train_vae.to_uint8(x.bfloat16())[255] == 255


def test_save_grid(tmp_path):
    images = torch.stack([torch.full((3, 32, 32), v) for v in (-1.0, -0.5, 0.0, 0.5, 2.0)])
    train_vae.save_grid(images, tmp_path / "new" / "grid.png", 3)
    picture = Image.open(tmp_path / "new" / "grid.png")
    assert picture.format == "PNG" and picture.mode == "RGB"
    assert picture.size == (3 * (3 * 34 + 2), 3 * (2 * 34 + 2))   # 2 pixels between, shown x 3
    small = np.asarray(picture)[1::3, 1::3]                       # back to one pixel each
    for k, want in enumerate((0, 64, 128, 191, 255)):
        top, left = 2 + k // 3 * 34, 2 + k % 3 * 34
        assert (small[top:top + 32, left:left + 32] == want).all()
    train_vae.save_grid(torch.zeros(2, 3, 128, 100), tmp_path / "large.png", 2)
    assert Image.open(tmp_path / "large.png").size == (2 * 102 + 2, 132)
    assert os.listdir(tmp_path / "new") == ["grid.png"]


def test_save_reconstructions_is_a_grid_and_its_psnr(tmp_path):
    class Half(nn.Module):   # a "tokenizer" that loses half the contrast
        def encode(self, x):
            return SimpleNamespace(mode=lambda: x)

        def decode(self, z):
            return z / 2
    images = [torch.full((3, 32, 32), v, dtype=torch.uint8) for v in range(0, 200, 10)]
    psnr = train_vae.save_reconstructions(Half(), images, tmp_path / "r.png", CPU)
    values = 10 * np.linspace(0, 19, 16).astype(int) / 127.5 - 1
    assert psnr == pytest.approx(np.mean(10 * np.log10(4 / (values / 2) ** 2)), rel=1e-4)
    picture = Image.open(tmp_path / "r.png")
    assert picture.size == (3 * (8 * 34 + 2), 3 * (4 * 34 + 2))
    shown = np.asarray(picture)[1::3, 1::3, 0][2::34, 2::34][:4, :8].astype(float) / 127.5 - 1
    assert np.allclose(shown[[0, 2]].ravel(), values, atol=0.01)       # images above,
    assert np.allclose(shown[[1, 3]].ravel(), values / 2, atol=0.01)   # reconstructions below


# --- the order of the images -----------------------------------------------------------------------------
@pytest.mark.parametrize("n, batch", [(23, 5), (20, 5), (7, 50), (9, 9), (1, 3)])
def test_within_an_epoch_none_twice_and_none_lost(n, batch):
    steps, indices = range(-(-4 * n // batch)), train_vae.batch_indices
    batches = [indices(n, batch, step, seed=1) for step in steps]
    assert all(len(b) == batch for b in batches)
    epochs = torch.cat(batches)[:4 * n].view(4, n)   # the borders of epochs lie within batches
    assert all(sorted(epoch.tolist()) == list(range(n)) for epoch in epochs)
    train_vae.epoch_order.cache_clear()
    torch.manual_seed(99)
    for step in reversed(steps):   # a function of (seed, step): not of what came before
        assert torch.equal(indices(n, batch, step, seed=1), batches[step])
    if n > 6:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4   # another order every time
        assert not all(torch.equal(indices(n, batch, step, seed=2), batches[step]) for step in steps)


def test_share_divides_the_batch_among_processes():
    shares = [list(range(12))[process(rank, 3).share(12)] for rank in range(3)]
    assert shares == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert "--batch-size 10" in user_error(process(0, 3).share, 10)


class Numbered(list):
    """40 images whose left upper pixel tells the index, and the right one 255 - index."""

    def __init__(self):
        super().__init__(torch.zeros(3, 4, 4, dtype=torch.uint8) for _ in range(40))
        self.asked = []
        for i, image in enumerate(self):
            image[:, :, 0], image[:, :, -1] = i, 255 - i

    def load(self, i, where):
        self.asked.append(tuple(where))
        return self[i]


@pytest.mark.parametrize("flip", [True, False])
def test_batches_of_images_are_shared_cropped_and_mirrored(flip):
    images = Numbered()
    s = Settings(batch_size=8, seed=5, flip=flip)
    whole, flips = ImageBatches(images, s, slice(0, 8)), []
    for step in range(60):
        x, index = whole[step], train_vae.batch_indices(40, 8, step, 5)
        asked = images.asked[-8:]
        assert x.shape == (8, 3, 4, 4) and x.dtype == torch.uint8
        for image, i in zip(x, index.tolist(), strict=True):
            flips.append(image[0, 0, 0].item() != i)
            assert torch.equal(image.flip(2) if flips[-1] else image, images[i])
        parts = [ImageBatches(images, s, process(rank, 4).share(8))[step] for rank in range(4)]
        assert torch.equal(torch.cat(parts), x) and images.asked[-8:] == asked   # the same crops, too
    assert np.mean(flips) == pytest.approx(flip / 2, abs=4 * 0.5 / np.sqrt(len(flips)) * flip)
    where = np.array(images.asked)   # two uniform numbers an image
    assert where.min() >= 0 and where.max() < 1 and np.allclose(where.mean(0), 0.5, atol=0.07)
    assert abs(np.corrcoef(where.T)[0, 1]) < 0.2 and len({tuple(w) for w in asked}) == 8


def test_the_loader_gives_the_same_with_and_without_worker_processes():
    batches = ImageBatches(Numbered(), Settings(batch_size=8, seed=5, flip=True), slice(0, 8))
    order = {"batch_size": None, "sampler": range(3, 9)}
    plain, read_ahead = (list(train_vae.loader(batches, workers, CPU, **order)) for workers in (0, 1))
    assert len(plain) == len(read_ahead) == 6
    for step, a, b in zip(range(3, 9), plain, read_ahead, strict=True):
        assert torch.equal(a, b) and torch.equal(a, batches[step])


# --- flags and the ends of a script ----------------------------------------------------------------------
@dataclass
class Flags:
    preset: str = opt("imagenet256", same=False)   # named settings
    out: str = opt("", same=False)   # folder
    # --- a group
    image_size: int = opt(256, "[1, 8192]")   # 100 % of the side
    lr: float = opt(1e-4, "(0, inf)")   # rate
    swiglu: bool = True   # on
    fresh: bool = opt(False, same=False)
        # a text below,
        # of two lines
    vf: str = opt("none", choices=("none", "mini"))   # model
    guidance: float = 0.0   # may be 0


@dataclass
class Mute:
    preset: str = ""   # named settings
    mute: int = 3


FLAGS = partial(parse, cls=Flags, presets={"mini": {"image_size": 32, "swiglu": False}, "large": {}})


def test_flags_override_the_preset_and_the_preset_the_defaults():
    mini = {"preset": "mini", "out": "runs/mini", "image_size": 32, "lr": 1e-4, "swiglu": False,
            "fresh": False, "vf": "none", "guidance": 0.0}
    assert asdict(FLAGS()) == mini
    s = FLAGS("--preset", "large", "--lr", "3e-2", "--no-swiglu", "--fresh", "--vf", "mini", "--out", "there")
    assert asdict(s) == mini | {"preset": "large", "out": "there", "image_size": 256, "lr": 0.03,
                                "fresh": True, "vf": "mini"}
    assert FLAGS("--swiglu").swiglu is True and FLAGS("--image-size=48").image_size == 48
    assert FLAGS("--image-size", 48, "--preset", "large").image_size == 48
    with pytest.raises(TypeError, match="imagesize"):
        parse(cls=Flags, presets={"mini": {"imagesize": 3}})


@pytest.mark.parametrize("flags", [
    "--imagesize 3", "--image 3", "--image-size 3.5", "--lr fast", "--lr", "--preset tiny", "--vf dino",
    "stray", "--image-size -32", "--lr -0.5", "--lr nan", "--lr inf", "--lr 0", "--image-size 0",
    "--image-size 9000", "--guidance -1e-3", "--guidance inf", "--no-vf", "--swiglu yes",
    f"--image-size 1{'0' * 400}"])
def test_wrong_flags_end_in_one_line(flags):
    line, words = user_error(FLAGS, *flags.split()), flags.split()
    assert words[0] in line or words[-1] in line, line


def test_intervals():
    for value, interval, want in ((0, "[0, inf)", True), (0, "(0, inf)", False), (1, "[0, 1)", False),
                                  (1, "[0, 1]", True), (-1, "[0, 1]", False), (0.5, "(0, 1)", True),
                                  (float("inf"), "[0, inf)", False), (float("nan"), "[0, inf)", False)):
        assert train_vae.inside(value, interval) is want, (value, interval)


def test_help_is_the_comment_beside_or_below_a_setting(capsys):
    with pytest.raises(SystemExit) as end:
        FLAGS("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "a group" not in text
    for words in ("--image-size INT 100 % of the side (default: 32)", "on (default: False)",
                  "a text below, of two lines (default: False)", "model: none, mini (default: 'none')"):
        assert words in text
    with pytest.raises(KeyError, match="mute"):   # every setting has one
        parse(cls=Mute, presets={"mini": {}})


def test_every_error_ends_in_one_line_and_a_status(monkeypatch, capsys):
    def end(error):
        def work(settings, world):
            if error:
                raise error
        with pytest.raises(SystemExit) as caught:
            train_vae.run_script(Flags, {"mini": {}}, "doc", work)
        return caught.value.code, capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py", "--vf", "mini"])
    monkeypatch.setattr(Flags, "device", "cpu", raising=False)
    stop = train_vae.Stop.__new__(train_vae.Stop)
    stop.asked = signal.SIGTERM
    with pytest.raises(UserError) as stopped:
        stop.leave("stopped after step 3")
    in_worker = UserError("Caught UserError in DataLoader worker\nTraceback\nvae.UserError: no file x")
    for error, status, words in (
            (None, 0, ""), (UserError("no file x"), 1, "error: no file x"), (in_worker, 1, ": no file x"),
            (PermissionError(13, "Permission denied", "/x/y"), 1, "/x/y"), (ValueError("3x5"), 1, "3x5"),
            (OSError(28, "No space left on device"), 1, "No space left"), (KeyboardInterrupt(), 130, ""),
            (stopped.value, 143, "stopped after step 3")):
        code, err = end(error)
        assert code == status and words in err and len(err.splitlines()) == (error is not None), err
        assert not err or err.startswith("script.py: ")
        assert ("error:" in err) == (status == 1)
    with pytest.raises(ZeroDivisionError):   # a bug of ours keeps its traceback
        end(ZeroDivisionError())
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py", "--vf", "dino"])
    code, err = end(None)
    assert code == 1 and "dino" in err and len(err.splitlines()) == 1


def test_a_stop_signal_is_remembered_until_the_step_is_done():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        stop = train_vae.Stop(ONE)
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == signal.SIGTERM and stop.agreed()
        with pytest.raises(KeyboardInterrupt):   # asked already: Ctrl-C now kills
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


# --- checkpoints and metrics -----------------------------------------------------------------------------
def test_resume_lists_what_differs(tmp_path):
    s, path = parse("--out", tmp_path), tmp_path / "vae.pt"
    resume = partial(train_vae.resume, path, "vae")
    assert resume(s) is None
    state = {"stage": "vae", "step": 4, "total_steps": 9, "identity": "", "x": torch.ones(2)}
    torch.save(state | {"settings": asdict(s)}, path)
    assert resume(s)["step"] == 4 and torch.equal(resume(s)["x"], torch.ones(2))
    conduct = ("--workers", 3, "--log-every", 7, "--save-every", 9, "--device", "cpu", "--compile")
    assert resume(parse("--out", tmp_path, *conduct))["step"] == 4
    line = user_error(resume, parse("--out", tmp_path, "--lr", 0.5, "--no-mdms", "--seed", 3, "--workers", 3))
    for words in (f"--lr 0.5 (checkpoint: {s.lr!r})", "--mdms False (checkpoint: True)",
                  "--seed 3 (checkpoint: 0)", "--fresh", str(path)):
        assert words in line
    assert line.count("checkpoint:") == 3
    assert resume(parse("--out", tmp_path, "--lr", 0.5, "--fresh")) is None
    older = asdict(s)
    del older["kl_weight"]   # written before there was such a setting: so it had its default
    torch.save(state | {"settings": older}, path)
    assert resume(parse("--out", tmp_path))["step"] == 4
    assert "--kl-weight 7.0" in user_error(resume, parse("--out", tmp_path, "--kl-weight", 7))
    assert "no dit checkpoint" in user_error(train_vae.resume, path, "dit", s)
    torch.save({"stage": "vae", "step": 4}, path)
    assert f"{path} is damaged" in user_error(resume, s)
    learned = {f.name for f in fields(Settings) if f.metadata.get("same", True)}
    assert learned == {
        "seed", "spec", "batch_size", "lr", "vf", "vf_weight", "cos_margin", "mdms_margin", "mcos", "mdms",
        "epochs", "warmup", "steps", "image_size", "crop", "flip", "kl_weight", "lpips_weight", "disc_weight",
        "disc_start", "init", "vf_input", "teacher_steps", "teacher_data", "precision"}


def test_checkpoints_of_another_kind(tmp_path):
    path, load = tmp_path / "x.pt", train_vae.load_checkpoint
    assert "run this" in user_error(load, path, "vae", "run this")
    for state in ([1, 2], {"x": 1}, {"stage": "dit"}):
        torch.save(state, path)
        line = user_error(load, path, "vae", "do this")
        assert str(path) in line and "do this" in line
    torch.save({"stage": "vae", "x": 2}, path)
    assert load(path, "vae", "")["x"] == 2


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    def broken(file):
        file.write(b"half of the new")
        raise KeyboardInterrupt
    path, write = tmp_path / "deep" / "file.bin", train_vae.atomic_write
    write(path, lambda file: file.write(b"old"))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write(path, broken)
        assert path.read_bytes() == b"old"
    assert len(os.listdir(path.parent)) <= 2   # a kill leaves one file behind, however often
    write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["file.bin"]


def test_json_files(tmp_path):
    train_vae.write_json(tmp_path / "x" / "a.json", {"n": [1, 2.5, "three"]})
    assert train_vae.read_json(tmp_path / "x" / "a.json") == {"n": [1, 2.5, "three"]}
    for content in (b"", b'{"n": [1', b"\xff\xfe\x00"):
        (tmp_path / "b.json").write_bytes(content)
        assert str(tmp_path / "b.json") in user_error(train_vae.read_json, tmp_path / "b.json")


def test_an_optimizer_of_another_network_is_refused():
    def adam(*sizes):
        weights = [nn.Parameter(torch.ones(size)) for size in sizes]
        optimizer = torch.optim.Adam(weights, 0.1, fused=False)
        sum(w.sum() for w in weights).backward()
        optimizer.step()
        return optimizer
    one, same, other = adam(2, 3), adam(2, 3), adam(2)
    same.step()
    train_vae.load_optimizer(one, same.state_dict(), "x.pt")
    for a, b in zip(one.state.values(), same.state.values(), strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"]) and a["step"] == b["step"] == 2
    assert "x.pt" in user_error(train_vae.load_optimizer, one, other.state_dict(), "x.pt")


def test_the_log_names_the_first_bad_step_and_term(tmp_path):
    log, saved = Log(tmp_path / "metrics.csv", ONE, 0, 8), "runs/x/vae.pt"
    good, nan, inf = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("-inf"))
    for step, (rec, kl) in enumerate([(good, good), (good, good), (good, inf), (nan, nan), (good, good)], 1):
        log.watch(step, {"rec": rec, "kl": kl})
        if step < 3:
            log.check(saved, "advice", [torch.ones(2)])
    line = user_error(log.check, saved, "try this")
    assert "kl is not finite at step 3" in line and "try this" in line and saved in line
    release(tmp_path)
    fresh = Log(tmp_path / "metrics.csv", ONE, 0, 8)
    line = user_error(fresh.check, saved, "try this", [torch.ones(2), torch.tensor([1.0, float("nan")])])
    assert "a weight is not finite" in line and saved in line


def test_metrics_after_the_checkpoint_are_written_again(tmp_path):
    path = tmp_path / "run" / "metrics.csv"

    def lines():
        return [line.rsplit(",", 2)[0] for line in path.read_text().splitlines()]   # without speed and memory
    first = Log(path, ONE, 0, 8)
    for step in (2, 4, 6, 10):
        first.write(step, {"rec": torch.tensor(step / 3), "kl": 1e-9 * step})
    release(tmp_path)
    again = Log(path, ONE, 4, 8)
    again.write(6, {"rec": 7.0, "kl": 8.0})
    assert again.write(8, {"rec": float("nan"), "kl": 9.0})["kl"] == 9   # not measured: empty
    assert path.read_text().splitlines()[0] == "step,rec,kl,images_per_s,memory_gib"
    assert not path.stat().st_mode & 0o111
    assert lines() == ["step,rec,kl", "2,0.666667,2e-09", "4,1.33333,4e-09", "6,7,8", "8,,9"]
    second = process(1, 2)
    second.mean = lambda tensor: tensor
    Log(path, second, 4, 8).write(9, {"rec": 1.0})   # another process writes nothing
    assert len(lines()) == 5
    release(tmp_path)
    Log(path, ONE, 0, 8)
    assert path.read_text() == ""


def test_a_csv_with_rubbish_in_it_does_not_stop_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,rec\n1,2\n2\xff\xfe\x00,3\n3x\n\n\n9,9\n")
    try:
        Log(path, ONE, 4, 8)
        assert path.read_text(errors="replace").splitlines()[:2] == ["step,rec", "1,2"]
        assert "9,9" not in path.read_text(errors="replace")
    except UserError as error:
        assert str(path) in str(error)


# --- arrays on disk --------------------------------------------------------------------------------------
ARRAYS = {"latents": ((2, 3), np.float16), "labels": ((), np.int64)}
ROWS_OF = {"latents": np.arange(66).reshape(11, 2, 3).astype(np.float16), "labels": np.arange(11) * 7}


def disk(folder, key=None, world=ONE):
    return DiskArrays(folder, 11, 4, ARRAYS, key or {"seed": 1, "shape": (2, 3)}, world)


def fill(arrays, chunks):
    for start, stop in chunks:
        arrays.write(start, **{name: rows[start:stop] for name, rows in ROWS_OF.items()})


def child(work):
    """work() in a process of its own, which ends by SIGKILL when work returns."""
    if os.fork() == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL


def complete(folder, world=ONE):
    """Go on until nothing is missing; the arrays must be whole and alone in the folder."""
    arrays = disk(folder, world=world)
    fill(arrays, arrays.missing())
    assert arrays.missing() == [] and arrays.count() == 11
    arrays.finish()
    release(folder)
    for name, rows in ROWS_OF.items():
        array = arrays.array(name)
        assert array.dtype == rows.dtype and np.array_equal(array, rows)
        assert np.array_equal(np.load(folder / f"{name}.npy"), rows)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert sorted(os.listdir(folder)) == ["labels.npy", "latents.npy"]


def test_arrays_on_disk_go_on_after_a_kill(tmp_path):
    def begin():
        arrays = disk(tmp_path)
        assert arrays.chunks == arrays.missing() == [(0, 4), (4, 8), (8, 11)]
        fill(arrays, [(4, 8)])
        arrays.put("latents.npy", arrays.array("latents").offset, b"rubbish")   # half of a chunk, no mark
    child(begin)
    arrays = disk(tmp_path)
    assert arrays.missing() == [(0, 4), (8, 11)] and arrays.count() == 4
    release(tmp_path)
    complete(tmp_path)


def test_a_chunk_is_on_the_disk_before_its_mark(tmp_path, monkeypatch):
    def fsync(number):
        flushed.append(number)
        if arrays.count() > 0:
            assert all(np.array_equal(arrays.array(name)[4:8], rows[4:8]) for name, rows in ROWS_OF.items())
            assert len(flushed) > len(ROWS_OF)   # and what they hold was flushed before
    arrays, flushed = disk(tmp_path), []
    monkeypatch.setattr(os, "fsync", fsync)
    fill(arrays, [(4, 8)])
    assert arrays.count() == 4 and len(flushed) > len(ROWS_OF)
    release(tmp_path)


STEPS = [(train_vae, "write_json"), (train_vae, "atomic_write"), (np.lib.format, "open_memmap"),
         (os, "posix_fallocate"), (os, "replace"), (os, "fsync"), (os, "open")]


@pytest.mark.parametrize("owner, attribute", STEPS)
@pytest.mark.parametrize("call", [1, 2])
def test_arrays_on_disk_killed_while_they_are_made(tmp_path, monkeypatch, owner, attribute, call):
    """Killed at the first or second call of each function that makes the files, before or after it."""
    real = getattr(owner, attribute)
    for moment in ("before", "after"):
        folder, calls = tmp_path / moment, []

        def killed(*args, moment=moment, calls=calls, **kwargs):
            calls.append(1)
            if len(calls) == call and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        def begin(folder=folder, killed=killed):
            monkeypatch.setattr(owner, attribute, killed)
            disk(folder)
        child(begin)
        complete(folder)


def test_arrays_on_disk_are_shared_by_processes(tmp_path):
    first, second = (disk(tmp_path, world=process(rank, 2)) for rank in range(2))
    assert first.missing() == [(0, 4), (8, 11)] and second.missing() == [(4, 8)]
    fill(second, second.missing())
    assert first.count() == second.count() == 4 and second.missing() == [] and len(first.missing()) == 2
    release(tmp_path)
    complete(tmp_path)


def test_arrays_on_disk_refuse_what_is_not_theirs(tmp_path):
    def second_writer():
        line = user_error(disk, tmp_path / "a")
        (tmp_path / "line").write_text(line)
    disk(tmp_path / "a")
    child(second_writer)
    assert str(tmp_path / "a") in (tmp_path / "line").read_text()
    release(tmp_path)
    line = user_error(disk, tmp_path / "a", {"seed": 2, "shape": (2, 3)})
    assert "seed 1 (now 2)" in line and "shape" not in line and str(tmp_path / "a") in line
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "labels.npy").write_bytes(b"mine")
    assert str(tmp_path / "b" / "labels.npy") in user_error(disk, tmp_path / "b")
    assert (tmp_path / "b" / "labels.npy").read_bytes() == b"mine"
    assert not (tmp_path / "b" / "latents.npy").exists()
    (tmp_path / "c").write_bytes(b"a file")
    with pytest.raises((UserError, OSError), match="c"):
        disk(tmp_path / "c")


def test_a_full_disk_is_found_out_at_once_and_forgiven(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    def begin():
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises((UserError, OSError), match="space"):
            disk(tmp_path / "arrays")
        (tmp_path / "found").touch()
    child(begin)
    assert (tmp_path / "found").exists()
    complete(tmp_path / "arrays")


# --- .npz ------------------------------------------------------------------------------------------------
NPZ = {"arr_0": np.arange(60, dtype=np.float32).reshape(3, 4, 5),
       "turned": np.asfortranarray(np.arange(60).reshape(3, 4, 5)), "bytes": np.arange(7, dtype=np.uint8),
       "text": np.array("{}"), "none": np.zeros((0, 4), np.uint8)}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_arrays(tmp_path, save):
    save(tmp_path / "a.npz", **NPZ)
    for name, want in NPZ.items():
        got = train_vae.npz_array(tmp_path / "a.npz", name)
        assert got.dtype == want.dtype and got.shape == want.shape and np.array_equal(got, want), name


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_files_are_named(tmp_path, save):
    """Whatever happens to a file's bytes: the array itself, or one line."""
    path = tmp_path / "a.npz"
    save(path, arr_0=NPZ["arr_0"])
    good, rng = path.read_bytes(), np.random.default_rng(0)
    damaged = [good[:n] for n in (0, 1, 30, 100, 200, len(good) // 2, len(good) - 1)]
    for position in {*range(0, len(good), 3), *range(150)}:
        damaged.append(good[:position] + rng.bytes(2) + good[position + 2:])
    for content in damaged:
        path.write_bytes(content)
        try:
            assert np.array_equal(train_vae.npz_array(path), NPZ["arr_0"])
        except (UserError, OSError) as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_npz_files_of_other_things_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.ones(2), objects=np.array([{}, None], object))
    for name in ("arr_0", "objects"):
        assert str(path) in user_error(train_vae.npz_array, path, name)
    file = io.BytesIO()
    np.save(file, np.ones(1000))
    with zipfile.ZipFile(path, "w") as archive:   # its header promises more than it holds
        archive.writestr("arr_0.npy", file.getvalue()[:-8])
    assert str(path) in user_error(train_vae.npz_array, path)
    assert "none.npz" in user_error(train_vae.npz_array, tmp_path / "none.npz")
