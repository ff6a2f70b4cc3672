"""train_vae.py in this process. The oracles are the paper's rows and numbers, typed by hand, ADM's crop
written again, and loops in float64; then files, folders, flags and loading processes that go wrong."""
import errno
import os
import signal
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import user_error
from PIL import EpsImagePlugin, Image
from test_vae import full_size
from torch import nn

import train_vae
from train_vae import PRESETS, ChunkFiles, Images, Log, Run, Settings, World
from train_vae import list_folder, loader, make_run, open_image, opt, train_step
from vae import SPECS, AutoencoderKL, PatchDiscriminator, UserError, torch_load

CPU, ONE = torch.device("cpu"), World("cpu")
TINY = {"embed_dim": 4, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,),
        "resolution": 32}


def process(rank, size):
    """The World of one of several processes, which do not wait for each other."""
    world = World("cpu")
    world.rank, world.size, world.barrier = rank, size, int
    return world


def child(work):
    """Call work() in a process of its own, which ends by SIGKILL when work returns."""
    if os.fork() == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL


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
ONLY_MCOS = FULL | {"mdms": False, "vf_weight": 0.05}  # "we halve the hyper weight" [Sec. 6.3]
ONLY_MDMS = FULL | {"mcos": False, "vf_weight": 0.05}
WANTED = {  # row: (tokenizer, VF loss)
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
SHARED = {  # settings of all ablations [Sec. 5.1, 6.2]
    "data": "imagenet", "image_size": 256, "batch_size": 256, "lr": 1e-4, "warmup": 0, "decay": 0,
    "epochs": 50, "steps": 0, "kl_weight": 1e-6, "lpips_weight": 1.0, "disc_weight": 0.5, "disc_start": 2501,
    "vf_input": "model", "crop": "random", "flip": False, "init": ""}


def test_the_rows_are_those_of_the_paper_and_every_preset_is_valid():
    assert set(train_vae.ROWS) == set(WANTED) and set(PRESETS) >= {"mini", "imagenet256", *WANTED}
    for name in PRESETS:
        s = parse("--preset", name)
        assert s.preset == name and s.out == f"runs/{name}"
        for f in fields(Settings):  # argparse compares flags with their choices, but not a preset's values
            value, choices = getattr(s, f.name), f.metadata.get("choices")
            assert (choices is None or value in choices) and type(value) is type(f.default), (name, f.name)
    for name, (spec, vf) in (WANTED | {"imagenet256": ("f16d32", FULL)}).items():
        s = asdict(parse("--preset", name))
        want = SHARED | {"spec": spec} | vf
        assert {k: s[k] for k in want} == want, name


@pytest.mark.parametrize("name", WANTED)
def test_every_row_builds_and_takes_a_step(monkeypatch, name):
    """The row's own spec, made narrow, through make_run and the first train_step with a discriminator."""
    spec, vf = WANTED[name]
    asked = []
    monkeypatch.setattr(train_vae, "load_foundation_model", lambda *args: asked.append(args) or Teacher())
    monkeypatch.setattr(train_vae, "start_from", lambda *args: None)
    s = parse("--preset", name, "--image-size", 64, "--lpips-weight", 0, "--no-compile", "--device", "cpu",
              "--init", "the stage before" if "long" in name else "")
    f, d = (int(v) for v in spec[1:].split("d"))
    assert (SPECS[spec]["ch"], SPECS[spec]["embed_dim"]) == (128, d)
    monkeypatch.setitem(SPECS, spec, SPECS[spec] | {"ch": 32})
    run = make_run(s, None, ONE, None)
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
    """A function from flags to settings of a small run on the built-in images; no signal handlers are set."""
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
    s = tiny("--steps", 0, "--epochs", 0.0024, "--out", tmp_path, "--lr", 0.1, "--warmup", 4, "--decay", 2)
    train_vae.train(s, ONE)
    assert [row[0] for row in seen] == list(range(6)) and {row[4] for row in seen} == {(4, 3, 24, 24)}
    assert [row[1] for row in seen] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.05])
    assert len({row[2] for row in seen}) == len({row[3] for row in seen}) == 6
    whole, state = list(seen), torch_load(tmp_path / "vae.pt")
    assert state["step"] == state["total_steps"] == 6 and len(state["classes"]) == 10
    assert (tmp_path / "reconstructions.png").exists()
    train_vae.train(s, ONE)
    assert "is finished" in capsys.readouterr().out and len(seen) == 6
    state |= {"step": 4}
    train_vae.write_checkpoint(state | {"identity": "other"}, tmp_path / "vae.pt")
    line = user_error(train_vae.train, s, ONE)
    assert "--data" in line and str(tmp_path / "vae.pt") in line
    train_vae.write_checkpoint(state, tmp_path / "vae.pt")
    train_vae.train(s, ONE)
    assert seen[6:] == whole[4:]
    s.steps = 8  # a longer training continues the finished one
    train_vae.train(s, ONE)
    assert [row[0] for row in seen[8:]] == [6, 7]


def test_adam_remembers_longer_without_a_discriminator(tiny):
    for weight, betas in ((0.5, (0.5, 0.9)), (0, (0.9, 0.99))):
        run = train_vae.Run(tiny("--lpips-weight", 0, "--disc-weight", weight), ONE, None)
        assert {optimizer.param_groups[0]["betas"] for optimizer in run.optimizers} == {betas}


def test_the_long_recipe_is_a_chain_by_init(tiny, monkeypatch, tmp_path):
    """A stage starts from all weights of the one before, including W and the discriminator, with a new
    Adam."""
    monkeypatch.setattr(train_vae, "load_foundation_model", lambda *args: Teacher())
    tiny = partial(tiny, "--vf", "dinov2", "--lpips-weight", 0, "--disc-weight", 0.5, "--steps", 2)
    paths = [tmp_path / name / "vae.pt" for name in ("1", "2")]
    train_vae.train(tiny("--out", tmp_path / "1"), ONE)
    second, state = tiny("--out", tmp_path / "2", "--seed", 5, "--init", paths[0]), torch_load(paths[0])
    run = make_run(second, None, ONE, None)
    for name, part in run.states().items():
        if name.startswith("optimizer"):
            assert not part.state and state[name]["state"], name
        else:
            assert all(torch.equal(value, state[name][k]) for k, value in part.state_dict().items()), name
    assert {"model", "linear_proj", "discriminator"} <= run.states().keys()
    train_vae.train(second, ONE)
    state = torch_load(paths[1])
    # a resumed run takes its own weights, not those of --init
    resumed = make_run(second, None, ONE, state).tokenizer.linear_proj.weight
    assert torch.equal(resumed, state["linear_proj"]["weight"])
    assert not torch.equal(resumed, run.tokenizer.linear_proj.weight)


def test_init_takes_released_files_and_says_when_they_are_of_another_spec(monkeypatch, tmp_path):
    for name in ("f16d32", "f8d4"):
        monkeypatch.setitem(SPECS, name, SPECS[name] | {"ch": 32})
    flags = ("--vf", "none", "--lpips-weight", 0, "--no-compile", "--device", "cpu", "--disc-weight", 0)
    s = parse("--preset", "imagenet256", *flags, "--init", tmp_path / "released.pt")
    weights = AutoencoderKL(**SPECS["f16d32"]).state_dict()
    torch.save({"state_dict": weights | {"loss.logvar": torch.zeros(1)}}, s.init)
    run = make_run(s, None, ONE, None)
    ours = run.tokenizer.vae.state_dict()
    assert ours.keys() == weights.keys() and all(torch.equal(ours[k], weights[k]) for k in weights)
    torch.save(full_size("f8d4"), s.init)
    assert "--spec f16d32" in user_error(make_run, s, None, ONE, None)


def test_init_takes_what_else_the_authors_file_holds_if_it_fits(monkeypatch, tmp_path, capsys):
    """It holds W of Eq. 1 and the discriminator, under other names than our checkpoints."""
    monkeypatch.setitem(SPECS, "f16d32", SPECS["f16d32"] | {"ch": 32})
    s = parse("--preset", "imagenet256", "--lpips-weight", 0, "--device", "cpu", "--init", tmp_path / "a.pt")
    theirs, disc = AutoencoderKL(**SPECS["f16d32"]).state_dict(), PatchDiscriminator()
    theirs |= {f"loss.discriminator.{name}": value for name, value in disc.state_dict().items()}
    foundation = SimpleNamespace(width=1024, to=lambda device: foundation)
    monkeypatch.setattr(train_vae, "load_foundation_model", lambda *_: foundation)
    for width, word in ((1024, "comes from this file, too"), (768, "starts anew")):
        W = torch.randn(width, 32, 1, 1)
        torch.save({"state_dict": theirs | {"linear_proj.weight": W}}, s.init)
        run = make_run(s, None, ONE, None)
        assert torch.equal(run.tokenizer.linear_proj.weight, W) == (width == 1024)
        ours = run.disc.state_dict()
        assert all(torch.equal(ours[name], value) for name, value in disc.state_dict().items())
        assert f"linear_proj {word}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--image-size", 30], ["--image-size 30", "divisible", "f16d32"]),
    (["--image-size", 16], ["24 pixels or more, not 16", "--disc-weight 0"]),
    (["--no-mcos", "--no-mdms"], ["--no-mcos", "--vf none"]),
    (["--preset", "vavae-long-2"], ["continues the stage before", "--init runs/vavae-long-1/vae.pt"])])
def test_settings_that_do_not_fit_each_other(flags, words):
    line = user_error(make_run, parse("--preset", "imagenet256", *flags), None, ONE, None)
    assert all(word in line for word in words), line


def test_the_teacher_is_the_same_for_all_seeds_and_may_learn_from_other_images(tmp_path):
    for name, classes in (("a", {"x": 6, "y": 6}), ("b", {"p": 4, "q": 4, "r": 4}), ("c", {"z": 9})):
        write_photos(tmp_path / name, classes)
    images = Images(str(tmp_path / "a"), "train", 16)
    make = partial(train_vae.make_teacher, images=images, f=4, world=ONE)
    small = ("--data", tmp_path / "a", "--image-size", 16, "--teacher-steps", 2)
    first, second = (make(parse(*small, "--seed", seed), state=None) for seed in (0, 5))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    other = parse(*small, "--teacher-data", tmp_path / "b")
    third = make(other, state=None)
    assert third.head.out_features == 3 and first.head.out_features == 2
    other.teacher_steps = 10 ** 9  # a resumed run takes the teacher from its checkpoint and trains none
    resumed = make(other, state={"teacher": third.state_dict()})
    assert torch.equal(resumed.head.weight, third.head.weight)
    line = user_error(make, parse(*small, "--teacher-data", tmp_path / "c"), state=None)
    assert "there is only one" in line


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
    """The backward passes of Eq. 4 go through compiled graphs more than once. aot_eager cuts the same graphs
    as inductor does, but generates no code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        run, x, noise = tiny_run(monkeypatch, compile=compiled, precision=precision)
        # one step in bf16, since a fresh GAN soon turns a rounding error into another course
        steps = range(3 if precision == "fp32" else 1)
        found.append([train_step(run, x[:2], noise[:2], step) for step in steps])
        saved = run.states()["model"].state_dict()  # torch.compile adds no prefix to what is saved
        assert saved.keys() == AutoencoderKL(**TINY).state_dict().keys()
        assert run.states().keys() == {"model", "linear_proj", "optimizer", "discriminator", "optimizer_disc"}
    for plain, fast in zip(*found, strict=True):
        for name, value in plain.items():
            assert fast[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("settings", [{"chunks": 2}, {"chunks": 4}, {"checkpointing": True},
                                      {"chunks": 2, "checkpointing": True}])
def test_saving_memory_changes_no_step(monkeypatch, settings):
    """The discriminator is in eval mode, because its BatchNorm would see a chunk of the batch only."""
    found = []
    for kwargs in ({}, settings):
        run, x, noise = tiny_run(monkeypatch, **kwargs)
        run.disc.eval()
        terms = [train_step(run, x, noise, batch) for batch in range(2)]
        found.append((terms, [p.grad for net in (run.tokenizer, run.disc) for p in net.parameters()]))
    (want, want_grads), (got, got_grads) = found
    for a, b in zip(want, got, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name].item() == pytest.approx(value.item(), rel=1e-3), name
    whole = torch.cat([g.flatten() for g in want_grads]).norm()
    for a, b in zip(want_grads, got_grads, strict=True):
        assert (a - b).norm() < 1e-3 * a.norm() + 1e-5 * whole


@pytest.mark.parametrize("chunks, encoder, decoder, lpips, disc", [(1, 1, 1, 2, 3), (2, 2, 3, 8, 7)])
def test_forward_passes_of_a_step(monkeypatch, chunks, encoder, decoder, lpips, disc):
    """The numbers in the help of --chunks. LPIPS runs its network on two images, and the discriminator is
    called three times, for the autoencoder (in chunks 3 passes), real images and reconstructions (2 each)."""
    run, x, noise = tiny_run(monkeypatch, chunks=chunks, lpips_weight=1.0)
    vae, seen = run.tokenizer.vae, {}
    first_layers = (vae.encoder.conv_in, vae.decoder.conv_in, run.lpips.features[0], run.disc.main[0])
    for layer in first_layers:
        layer.register_forward_hook(
            lambda layer, args, output: seen.update({layer: seen.get(layer, 0) + len(output)}))
    train_step(run, x, noise, 0)
    assert [seen[layer] / len(x) for layer in first_layers] == [encoder, decoder, lpips, disc]


def test_chunks_keep_what_goes_in_and_out(monkeypatch):
    """Autograd keeps the inputs of the decoder's chunks instead of the activations of every layer."""
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
    assert kept(chunks=2) < kept() / 10


# --- images ----------------------------------------------------------------------------------------------
def adm(image, size):
    """ADM's center_crop_arr, written from its description: halve with a box filter, rounding down, while the
    short side is at least 2 size, then resize (bicubic)."""
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


def test_center_crop_is_that_of_adm():
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
                where = ((top + 0.5) / rows, (left + 0.5) / columns)  # the middle of a position's interval
                got = pixels(train_vae.random_crop(image, size, where))
                assert np.array_equal(got, whole[top:top + size, left:left + size])
        last = pixels(train_vae.random_crop(image, size, (1 - 1e-7, 1 - 1e-7)))
        assert np.array_equal(last, whole[-size:, -size:])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = blurred(np.random.default_rng(0), 20, 30).convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind, options", [
    ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG2000", {}),
    ("ICO", {"sizes": [(24, 24)]}), ("TGA", {})])
def test_formats_are_told_by_content_and_not_by_name(tmp_path, kind, options):
    image = blurred(np.random.default_rng(0), 24, 24).quantize(64).convert("RGB")  # what a GIF can hold
    image.save(tmp_path / "image.jpg", kind, **options)
    assert np.array_equal(np.asarray(open_image(tmp_path / "image.jpg")), np.asarray(image))


def test_postscript_is_refused_and_does_not_run(tmp_path, monkeypatch):
    def ghostscript(*args, **kwargs):
        ran.append(args)
        return Image.new("RGB", (8, 8)).im
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png", "EPS")
    Image.open(tmp_path / "image.png").load()
    assert len(ran) == 1  # Pillow alone runs it
    assert "cannot read the image" in user_error(open_image, tmp_path / "image.png")
    assert len(ran) == 1


def test_grey_images_of_16_and_32_bits(tmp_path):
    levels = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(levels).save(tmp_path / name)
    (tmp_path / "grey.pgm").write_bytes(b"P5 30 20 65535\n" + levels.astype(">u2").tobytes())
    for name in ("grey.png", "grey.tif", "grey.pgm"):
        got = np.asarray(open_image(tmp_path / name)).astype(int)
        assert got.shape == (20, 30, 3) and (abs(got - (levels // 257)[..., None]) <= 1).all(), name
    for dtype in (np.int32, np.float32):
        Image.fromarray(levels.astype(dtype)).save(tmp_path / "deep.tif")
        line = user_error(open_image, tmp_path / "deep.tif")
        assert str(tmp_path / "deep.tif") in line and "32 bits per pixel" in line


def test_an_image_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    path = tmp_path / "image.png"
    blurred(np.random.default_rng(0), 200, 200).save(path)
    good = path.read_bytes()
    for content, reason in ((good[:len(good) // 2], "truncated"), (b"hello", "cannot identify"), (b"", ""),
                            (b"P6 20000 20000 255\n", "400000000 pixels")):  # Pillow opens 179 megapixels
        path.write_bytes(content)
        line = user_error(open_image, path)
        assert str(path) in line and reason in line, line
    path.unlink()
    assert f"{path}" in user_error(open_image, path)


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
    held_out = every[9::10]  # every tenth, over all classes
    kept = [item for k, item in enumerate(every) if k % 10 != 9]
    for images, want in zip(splits(root), (kept, held_out), strict=True):
        assert images.classes == ["a", "b", "c"] and len(images) == len(want)
        assert images.labels.dtype == torch.int64
        assert images.labels.tolist() == ["abc".index(c) for c, _ in want]
        for position, (c, i) in enumerate(want):
            file = Image.open(root / c / f"{i:03}.png")
            assert np.array_equal(pixels(images[position]), adm(file, 16))


def layout(root, *files):
    """Make empty files, since lists are made without opening any; "12 x/y" makes twelve JPEGs in x/y."""
    for file in files:
        count, _, folder = file.rpartition(" ")
        for i in range(int(count or 1)):
            path = root / folder / f"{i:03}.jpg" if count else root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def listed(root, split):
    """{class: number of files} of a split, and whether all files are where their label says."""
    pairs, classes = list_folder(root, split)
    assert all(classes[label] in path.parts for path, label in pairs)
    return {name: sum(label == k for _, label in pairs) for k, name in enumerate(classes)}


@pytest.mark.parametrize("train, test", [
    ("train", "val"), ("Train", "VAL"), ("TRAIN", "Test"), ("training", "validation"), ("train", "valid"),
    ("training_set", "test_set"), ("Train_Set", "Val_Set"), ("training", "testing"), ("train2017", "val2017"),
    ("seg_train", "seg_test"), ("train", "test1")])
def test_a_folder_with_a_split(tmp_path, train, test):
    """The classes are those of the training images, so one that the test images lack shifts no label."""
    root = layout(tmp_path, f"11 {train}/x", f"2 {train}/xx", f"3 {train}/y", f"2 {test}/x", f"12 {test}/y")
    layout(root, ".cache/x.jpg", "readme.txt")
    assert listed(root, "train") == {"x": 11, "xx": 2, "y": 3}
    assert listed(root, "test") == {"x": 2, "xx": 0, "y": 12}
    (root / test / "z").mkdir()
    line = user_error(list_folder, root, "test")
    assert f"{root / test} has classes" in line and "(z)" in line and f"With --data {root / train}," in line


def test_what_is_a_split_and_what_is_a_class(tmp_path):
    alone = layout(tmp_path / "alone", "10 train/a", "10 train/b")
    assert listed(alone, "train") == {"a": 9, "b": 9} and listed(alone, "test") == {"a": 1, "b": 1}
    both = layout(tmp_path / "both", "5 train/a", "4 val/a", "3 test/a", "2 extra/a")
    assert listed(both, "train") == {"a": 5} and listed(both, "test") == {"a": 4}
    vehicles = layout(tmp_path / "vehicles", "10 bus", "10 car", "10 train")
    assert listed(vehicles, "train") == {"bus": 9, "car": 9, "train": 9}
    names = layout(tmp_path / "names", "10 bullet_train", "10 test_tube", "10 valley", "10 train2")
    assert len(listed(names, "train")) == 4
    deep = layout(tmp_path / "deep", "10 a/2019", "10 a/2020/may", "10 b")
    assert listed(deep, "train") == {"a": 18, "b": 9}


@pytest.mark.parametrize("files, named", [
    (["5 images/001.Crow", "5 images/002.Jay"], "images"),  # CUB, without and with its other folders
    (["5 images/001.Crow", "5 images/002.Jay", "attributes/list.txt", "parts/parts.txt"], "images"),
    (["5 Data/CLS-LOC/train/n01", "5 Data/CLS-LOC/train/n02", "5 Data/CLS-LOC/val"], "Data/CLS-LOC"),
    (["5 Data/CLS-LOC/train/n01", "5 Data/CLS-LOC/train/n02", "Annotations/CLS-LOC/n01/1.xml"],
     "Data/CLS-LOC/train")])
def test_a_folder_around_the_classes_is_refused_by_name(tmp_path, files, named):
    root = layout(tmp_path, *files)
    line = user_error(list_folder, root, "train")
    assert f"are in folders inside {root / named}: name that with --data" in line, line


@pytest.mark.parametrize("files", [
    ["10 images", "10 annotations/trimaps"],  # Oxford-IIIT Pet: the masks would be a class
    ["5 images/001.Crow", "5 images/002.Jay", "5 segmentations/001.Crow"],
    ["10 train/Images", "10 train/masks"]])
def test_a_folder_of_images_beside_their_masks_is_refused_by_name(tmp_path, files):
    line = user_error(list_folder, layout(tmp_path, *files), "train")
    assert "the folder called images in" in line and line.endswith("name it with --data"), line


@pytest.mark.parametrize("suffix", ["gif", "avif", "jfif", "jp2", "JPG", "webp", "tif"])
def test_a_picture_is_listed_whatever_its_suffix(tmp_path, suffix):
    for name in "ab":
        (layout(tmp_path, f"10 {name}") / name / "010.jpg").with_suffix(f".{suffix}").touch()
    assert listed(tmp_path, "train") == {"a": 10, "b": 10}


def test_one_class_may_have_folders_of_its_own(tmp_path):
    assert listed(layout(tmp_path / "a", "20 cats/new"), "train") == {"cats": 18}
    assert listed(layout(tmp_path / "b", "10 cats", "10 cats/new", "10 cats/old"), "train") == {"cats": 27}


@pytest.mark.parametrize("files, words", [
    (["20 ."], "has no class folders: images are expected in DIR/<class>/*.jpg"),
    (["20 train", "5 val"], "train has no class folders: images are expected in DIR/<class>/*.jpg"),
    (["20 a", "b/notes.txt"], "b has no images: images are expected in DIR/<class>/*.jpg"),
    (["20 train/a", "5 val"], "val has no images in class folders"),  # ImageNet as it is
    (["20 train/a", "5 test"], "train, every tenth image of that folder"),  # of a competition, without labels
    (["20 train/a/images", "5 val/images"], "train, every tenth image of that folder"),  # Tiny-ImageNet
    (["6 a", "3 b"], "too few images (10 or more)")])
def test_messages_name_the_layout(tmp_path, files, words):
    line = user_error(list_folder, layout(tmp_path, *files), "test")
    assert str(tmp_path) in line and words in line, line


def test_hidden_files_and_what_archives_and_servers_leave_behind_are_no_images(tmp_path):
    root = layout(tmp_path / "photos", "20 a", "10 b", "a/Upper.JPEG")
    want = listed(root, "train"), listed(root, "test")
    layout(root, "5 .hidden", "5 __MACOSX/a", "5 @eaDir/b", "5 .ipynb_checkpoints", "a/._000.jpg",
           "5 a/.ipynb_checkpoints", "5 a/@eaDir", "5 b/__MACOSX", "a/notes.txt", "b/Thumbs.db", "c.jpg")
    layout(root, "#recycle/a.ini", "$RECYCLE.BIN/desktop.ini", "__MACOSX/b.jpg")
    (root / "lost+found").mkdir()
    (root / "b" / "000b.jpg").mkdir()  # a folder with the name of a picture
    (root / "a" / "again").symlink_to(root / "a")  # would give a's images twice, to train and to test
    assert (listed(root, "train"), listed(root, "test")) == want == ({"a": 19, "b": 9}, {"a": 2, "b": 1})
    elsewhere = layout(tmp_path / "elsewhere", "10 c", "10 d")
    (root / "c").symlink_to(elsewhere / "c")  # a class that is a link
    (root / "d").mkdir()
    (root / "d" / "2024").symlink_to(elsewhere / "d")  # and one that holds one
    assert listed(root, "train")["c"] == listed(root, "train")["d"] == 9
    assert len(train_vae.picture_files(root)) == 52  # as for fid.py, which takes c.jpg, too
    assert "is neither a folder nor shapes" in user_error(list_folder, Path("nowhere"), "train")


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


@pytest.mark.filterwarnings("error")  # such as torch's, of a tensor copied by torch.tensor
@pytest.mark.parametrize("kind", ["list", "tensor", "_samples"])
def test_sets_of_torchvision(monkeypatch, tmp_path, kind):
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
    assert [download for _, download, _ in asked] == [False, True]  # downloads only what is missing
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
    large = train_vae.draw_shape(3, 4, 64).reduce(2)  # the same picture at twice the size
    assert abs(np.asarray(large).astype(int) - first[4]).mean() < 3


def test_the_built_in_sets():
    train, test = (Images("shapes", split, 32) for split in ("train", "test"))
    assert (len(train), len(test)) == (10_000, 2_000)
    assert train.classes == test.classes and len(set(train.classes)) == 10
    for images in (train, test):
        assert (images.labels.bincount() == len(images) // 10).all()
    assert np.array_equal(pixels(train[7]), drawn(0, 7)) and train.labels[7] == 7
    assert np.array_equal(pixels(test[3]), drawn(0, 10_003))  # the test images follow
    assert np.array_equal(pixels(Images("shapes", "train", 24)[0]), drawn(0, 0, 24))


def test_the_shape_tells_the_class():
    """Of 600 pictures, the nearest by the place of the ink has the same class."""
    masks = []
    for i in range(700):
        picture = drawn(0, i).astype(int)
        distance = abs(picture - picture[0, 0]).sum(2)  # a corner is ground
        assert distance.max() > 60, i  # ink differs from ground
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
    odd = torch.tensor([-9.0, 9.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1])  # to be clipped and rounded
    assert train_vae.to_uint8(odd).tolist() == [0, 255, 0, 1]
    assert train_vae.to_uint8(x.bfloat16())[0] == 0 and train_vae.to_uint8(x.bfloat16())[255] == 255


def test_save_grid(tmp_path):
    images = torch.stack([torch.full((3, 32, 32), v) for v in (-1.0, -0.5, 0.0, 0.5, 2.0)])
    train_vae.save_grid(images, tmp_path / "new" / "grid.png", 3)
    picture = Image.open(tmp_path / "new" / "grid.png")
    assert picture.format == "PNG" and picture.mode == "RGB"
    assert picture.size == (3 * (3 * 34 + 2), 3 * (2 * 34 + 2))  # 2 pixels between images, enlarged by 3
    small = np.asarray(picture)[1::3, 1::3]  # at the original size
    for k, want in enumerate((0, 64, 128, 191, 255)):
        top, left = 2 + k // 3 * 34, 2 + k % 3 * 34
        assert (small[top:top + 32, left:left + 32] == want).all()
    train_vae.save_grid(torch.zeros(2, 3, 128, 100), tmp_path / "large.png", 2)
    assert Image.open(tmp_path / "large.png").size == (2 * 102 + 2, 132)
    assert os.listdir(tmp_path / "new") == ["grid.png"]


def test_save_reconstructions_is_a_grid_and_its_psnr(tmp_path):
    class Half(nn.Module):  # a "tokenizer" that loses half of the contrast
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
    assert np.allclose(shown[[0, 2]].ravel(), values, atol=0.01)  # images above
    assert np.allclose(shown[[1, 3]].ravel(), values / 2, atol=0.01)  # reconstructions below


# --- the order of the images -----------------------------------------------------------------------------
@pytest.mark.parametrize("n, batch", [(23, 5), (20, 5), (7, 50), (9, 9), (1, 3)])
def test_within_an_epoch_none_twice_and_none_lost(n, batch):
    steps, indices = range(-(-4 * n // batch)), train_vae.batch_indices
    batches = [indices(n, batch, step, seed=1) for step in steps]
    assert all(len(b) == batch for b in batches)
    epochs = torch.cat(batches)[:4 * n].view(4, n)  # epochs end within batches
    assert all(sorted(epoch.tolist()) == list(range(n)) for epoch in epochs)
    train_vae.epoch_order.cache_clear()
    torch.manual_seed(99)
    for step in reversed(steps):  # a function of (seed, step), and not of what came before
        assert torch.equal(indices(n, batch, step, seed=1), batches[step])
    if n > 6:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4  # another order in every epoch
        assert not all(torch.equal(indices(n, batch, step, seed=2), batches[step]) for step in steps)


def test_share_divides_the_batch_among_processes():
    shares = [list(range(12))[process(rank, 3).share(12)] for rank in range(3)]
    assert shares == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert "--batch-size 10" in user_error(process(0, 3).share, 10)
    assert process(2, 3).share(12, 2) == slice(8, 12)
    assert "3 process(es) times 4" in user_error(process(0, 3).share, 30, 4)


class Numbered(list):
    """40 images whose upper left pixel tells the index i, and the upper right one 255 - i."""

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
    images, flips = Numbered(), []
    batch = partial(train_vae.image_batch, images, Settings(batch_size=8, seed=5, flip=flip))
    for step in range(60):
        x, index = batch(step, slice(0, 8)), train_vae.batch_indices(40, 8, step, 5)
        asked = images.asked[-8:]
        assert x.shape == (8, 3, 4, 4) and x.dtype == torch.uint8
        for image, i in zip(x, index.tolist(), strict=True):
            flips.append(image[0, 0, 0].item() != i)
            assert torch.equal(image.flip(2) if flips[-1] else image, images[i])
        parts = [batch(step, process(rank, 4).share(8)) for rank in range(4)]
        assert torch.equal(torch.cat(parts), x) and images.asked[-8:] == asked  # the same crops, too
    assert np.mean(flips) == pytest.approx(flip / 2, abs=4 * 0.5 / np.sqrt(len(flips)) * flip)
    where = np.array(images.asked)  # two uniform numbers per image
    assert where.min() >= 0 and where.max() < 1 and np.allclose(where.mean(0), 0.5, atol=0.07)
    assert abs(np.corrcoef(where.T)[0, 1]) < 0.2 and len({tuple(w) for w in asked}) == 8


# --- loading processes -----------------------------------------------------------------------------------
def test_the_loader_gives_the_same_with_and_without_processes():
    def batch(step):
        return train_vae.image_batch(images, s, step, slice(0, 8))

    def pair(i):  # the later items of each few are done first
        time.sleep(0.02 * (-i % 4))
        return torch.full((2, 2), i), torch.tensor(i)
    images, s = Numbered(), Settings(batch_size=8, seed=5, flip=True)
    plain, read_ahead = (list(loader(batch, range(3, 9), workers)) for workers in (0, 2))
    assert len(plain) == len(read_ahead) == 6
    for step, a, b in zip(range(3, 9), plain, read_ahead, strict=True):
        assert torch.equal(a, b) and torch.equal(a, batch(step))
    for i, (a, b) in enumerate(loader(pair, range(20), 2)):
        assert torch.equal(a, torch.full((2, 2), i)) and b == i
    assert i == 19 and list(loader(batch, [], 2)) == []


def gone(seconds=60):
    """Whether all child processes end within so many seconds."""
    end = time.monotonic() + seconds
    while active_children() and time.monotonic() < end:
        time.sleep(0.05)
    return not active_children()


def test_errors_in_a_loading_process_keep_their_type_and_message():
    def fail(error):
        if error:
            raise error
        return torch.zeros(1)
    for workers in (0, 2):
        items = [None, None, UserError("cannot read the image x"), None]
        assert user_error(list, loader(fail, items, workers)) == "cannot read the image x"
        with pytest.raises(ZeroDivisionError, match="a mistake"):
            list(loader(fail, [ZeroDivisionError("a mistake")], workers))
    assert gone()


def test_a_loading_process_that_is_killed_ends_the_run_in_one_line():
    def killed(i):
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(i)
    assert "a loading process died" in user_error(list, loader(killed, range(9), 2))
    assert gone()


def test_loading_processes_end_with_the_generator():
    def number(i):
        return torch.tensor(os.getpid())
    batches = loader(number, range(10 ** 9), 2)
    assert next(batches) != os.getpid() and len(active_children()) == 2
    batches.close()
    assert gone()


def terminated(monkeypatch, fresh=False):
    """A Stop that has received SIGTERM, without signal handlers."""
    monkeypatch.setattr(train_vae.signal, "signal", lambda *args: None)
    stop = train_vae.Stop(ONE, fresh)
    stop.ask(signal.SIGTERM, None)
    return stop


def test_a_stop_signal_ends_the_wait_for_a_loading_process_that_is_stuck(monkeypatch):
    monkeypatch.setattr(train_vae, "wait", lambda futures, timeout: SimpleNamespace(done=set()))
    line = user_error(list, loader(torch.tensor, range(9), 2, terminated(monkeypatch)))
    assert "waiting for a loading process" in line and gone()


# --- flags and the ends of a script ----------------------------------------------------------------------
@dataclass
class Flags:
    preset: str = opt("imagenet256", same=False)  # named settings
    out: str = opt("", same=False)  # folder
    # --- a group
    image_size: int = 256  # 100 % of the side
    lr: float = 1e-4  # rate
    swiglu: bool = True  # on
    fresh: bool = opt(False, same=False)
        # a text below,
        # of two lines
    vf: str = opt("none", choices=("none", "mini"))  # model
    ema: float = 0.0  # may be 0


@dataclass
class Mute:
    preset: str = ""  # named settings
    mute: int = 3


FLAGS = partial(parse, cls=Flags, presets={"mini": {"image_size": 32, "swiglu": False}, "large": {}})


def test_flags_override_the_preset_and_the_preset_the_defaults():
    mini = {"preset": "mini", "out": "runs/mini", "image_size": 32, "lr": 1e-4, "swiglu": False,
            "fresh": False, "vf": "none", "ema": 0.0}
    assert asdict(FLAGS()) == mini
    s = FLAGS("--preset", "large", "--lr", "3e-2", "--no-swiglu", "--fresh", "--vf", "mini", "--out", "there")
    assert asdict(s) == mini | {"preset": "large", "out": "there", "image_size": 256, "lr": 0.03,
                                "fresh": True, "vf": "mini"}
    assert FLAGS("--swiglu").swiglu is True and FLAGS("--image-size=48").image_size == 48
    assert FLAGS("--image-size", 48, "--preset", "large").image_size == 48
    with pytest.raises(TypeError, match="imagesize"):
        parse(cls=Flags, presets={"mini": {"imagesize": 3}})


def test_epochs_count_although_the_preset_gives_steps():
    def steps(*flags):
        return train_vae.parse_settings(Settings, train_vae.PRESETS, "", flags).steps
    assert steps() == train_vae.MINI["steps"] > 0
    assert steps("--epochs", "3") == steps("--epochs=3") == 0
    assert steps("--epochs", "3", "--steps", "5") == steps("--steps=5", "--epochs=3") == 5


@pytest.mark.parametrize("flags", [
    "--imagesize 3", "--image 3", "--image-size 3.5", "--lr fast", "--lr", "--preset tiny", "--vf dino",
    "stray", "--image-size -32", "--lr -0.5", "--lr nan", "--lr inf", "--lr 0", "--ema 1.5", "--no-vf",
    "--swiglu yes"])
def test_wrong_flags_end_in_one_line(flags):
    line, words = user_error(FLAGS, *flags.split()), flags.split()
    assert words[0] in line or words[-1] in line, line


def test_help_is_the_comment_beside_or_below_a_setting(capsys):
    with pytest.raises(SystemExit) as end:
        FLAGS("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "a group" not in text
    for words in ("--image-size INT 100 % of the side (default: 32)", "on (default: False)",
                  "a text below, of two lines (default: False)", "model: none, mini (default: 'none')"):
        assert words in text
    with pytest.raises(KeyError, match="mute"):  # every setting needs a comment
        parse(cls=Mute, presets={"mini": {}})


def test_mistakes_end_in_one_line_and_everything_else_in_a_traceback(monkeypatch, capsys):
    def run(error):
        def work(settings, world):
            if error:
                raise error
        train_vae.run_script(Flags, {"mini": {}}, "doc", work)
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py", "--vf", "mini"])
    monkeypatch.setattr(Flags, "device", "cpu", raising=False)
    stop = terminated(monkeypatch, fresh=True)
    with pytest.raises(UserError) as stopped:
        stop.leave("stopped after step 3")
    run(None)
    way_out = "the same command without --fresh resumes"
    for error, status, line in ((UserError("no file x"), 1, "script.py: error: no file x\n"),
                                (KeyboardInterrupt(), 130, "script.py: interrupted\n"),
                                (stopped.value, 143, f"script.py: stopped after step 3; {way_out}\n")):
        with pytest.raises(SystemExit) as end:
            run(error)
        assert end.value.code == status and capsys.readouterr().err == line
    for error in (ZeroDivisionError(), ValueError("3x5"), FileNotFoundError(2, "No such file", "/x/y")):
        with pytest.raises(type(error)):
            run(error)
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py", "--vf", "dino"])
    with pytest.raises(SystemExit):
        run(None)
    err = capsys.readouterr().err
    assert "dino" in err and len(err.splitlines()) == 1


def test_a_stop_signal_is_remembered_until_the_step_is_done():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        stop = train_vae.Stop(ONE)
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == signal.SIGTERM and stop.agreed()
        with pytest.raises(KeyboardInterrupt):  # the second signal ends the run at once
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
    conduct = ("--workers", 3, "--log-every", 7, "--save-every", 9, "--device", "cpu", "--compile",
               "--steps", 900, "--chunks", 2, "--checkpointing", "--data", "moved")
    assert resume(parse("--out", tmp_path, *conduct))["step"] == 4
    line = user_error(resume, parse("--out", tmp_path, "--lr", 0.5, "--no-mdms", "--seed", 3, "--workers", 3))
    for words in (f"--lr 0.5 (checkpoint: {s.lr!r})", "--mdms False (checkpoint: True)",
                  "--seed 3 (checkpoint: 0)", "--fresh", str(path)):
        assert words in line
    assert line.count("checkpoint:") == 3
    assert resume(parse("--out", tmp_path, "--lr", 0.5, "--fresh")) is None
    older = asdict(s)
    del older["kl_weight"]  # a setting that is younger than the file, where it had its default
    torch.save(state | {"settings": older}, path)
    assert resume(parse("--out", tmp_path))["step"] == 4
    assert "--kl-weight 7.0" in user_error(resume, parse("--out", tmp_path, "--kl-weight", 7))
    assert "no dit checkpoint" in user_error(train_vae.resume, path, "dit", s)
    learned = {f.name for f in fields(Settings) if f.metadata.get("same", True)}
    assert learned == {
        "seed", "spec", "batch_size", "lr", "vf", "vf_weight", "cos_margin", "mdms_margin", "mcos",
        "mdms", "warmup", "decay", "image_size", "crop", "flip", "kl_weight", "lpips_weight",
        "disc_weight", "disc_start", "init", "vf_input", "teacher_steps", "teacher_data", "precision"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    def broken(file):
        file.write(b"half of the new")
        raise KeyboardInterrupt
    path, write = tmp_path / "deep" / "file.bin", train_vae.atomic_write
    write(path, lambda file: file.write(b"old"))
    with pytest.raises(KeyboardInterrupt):
        write(path, broken)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file.bin"]
    write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("behind", [None, RuntimeError("unexpected pos")])  # as torch.save does, or not
def test_a_full_disk_is_named_and_any_other_error_is_not_taken_for_one(tmp_path, behind):
    def write(file):
        file.write(b"x")
        try:
            raise OSError(errno.ENOSPC, "No space left")
        except OSError:
            if behind:
                raise behind
            raise
    assert "No space left" in user_error(train_vae.atomic_write, tmp_path / "a", write)
    assert not list(tmp_path.iterdir())

    def mistaken(file):
        raise RuntimeError("mine")
    with pytest.raises(RuntimeError, match="mine"):
        train_vae.atomic_write(tmp_path / "a", mistaken)


def test_what_is_not_finite_stops_the_run(tmp_path):
    log = Log(tmp_path / "metrics.csv", ONE, 0, 8, "try this")
    log.write(1, {"rec": 1.0, "bin": torch.tensor(float("nan"))}, may_be_empty=("bin",))
    for value in ("nan", "inf", "-inf"):
        line = user_error(log.write, 2, {"rec": 1.0, "kl": torch.tensor(float(value))})
        assert line == "kl is not finite at step 2; try this"
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2
    log.check_weights([torch.ones(2)])
    line = user_error(log.check_weights, [torch.ones(2), torch.tensor([1.0, float("nan")])])
    assert line == "a weight is not finite; try this"


def test_metrics_after_the_checkpoint_are_written_again(tmp_path):
    path = tmp_path / "run" / "metrics.csv"

    def lines():
        return [line.rsplit(",", 2)[0] for line in path.read_text().splitlines()]  # without speed and memory
    first = Log(path, ONE, 0, 8, "")
    for step in (2, 4, 6, 10):
        first.write(step, {"rec": torch.tensor(step / 3), "kl": 1e-9 * step})
    again = Log(path, ONE, 4, 8, "")
    again.write(6, {"rec": 7.0, "kl": 8.0})
    values = again.write(8, {"rec": float("nan"), "kl": 9.0}, may_be_empty=("rec",))
    assert values["kl"] == 9 and values.keys() == {"rec", "kl", "images_per_s", "memory_gib"}
    assert path.read_text().splitlines()[0] == "step,rec,kl,images_per_s,memory_gib"
    assert not path.stat().st_mode & 0o111  # a CSV is no program
    whole = ["step,rec,kl", "2,0.666667,2e-09", "4,1.33333,4e-09", "6,7,8", "8,,9"]
    assert lines() == whole
    assert f"{path} has other columns" in user_error(again.write, 10, {"rec": 1.0, "psnr": 2.0})
    second = process(1, 2)
    second.mean = lambda tensor: tensor
    Log(path, second, 4, 8, "").write(9, {"rec": 1.0})  # only the first process writes
    assert lines() == whole
    Log(path, ONE, 0, 8, "")  # a new run starts a new file
    assert path.read_text() == ""


def test_a_folder_has_one_writing_process(tmp_path):
    def second_writer():
        (tmp_path / "line").write_text(user_error(Log, tmp_path / "run" / "metrics.csv", ONE, 0, 8, ""))
    train_vae.lock(tmp_path / "run")
    child(second_writer)
    line = (tmp_path / "line").read_text()
    assert f"another process is writing into {tmp_path / 'run'}" in line


# --- chunk files -----------------------------------------------------------------------------------------
ROWS = np.arange(66).reshape(11, 2, 3).astype(np.float16)


def chunks(folder, world=ONE, size=4, **about):
    return ChunkFiles(folder, "latents", 11, size, {"seed": 1, "shape": (2, 3)} | about, world)


def complete(folder, world=ONE):
    """Make the chunks that are missing -> {name of a file: its bytes}."""
    made = chunks(folder, world)
    for k, rows in made.missing():
        made.write(k, ROWS[rows.start:rows.stop])
    assert made.missing() == []
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_chunks_are_whole_or_missing_and_made_again_the_same(tmp_path):
    def killed():
        def save(file, rows):
            file.write(b"half of a chunk")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        made = chunks(tmp_path)
        made.write(0, ROWS[0:4])
        np.save = save
        made.write(1, ROWS[4:8])
    child(killed)
    assert chunks(tmp_path).missing() == [(1, range(4, 8)), (2, range(8, 11))]
    files = complete(tmp_path)
    assert files.keys() == {".lock", "latents.json", *(f"latents-0000{k}.npy" for k in range(3))}
    (tmp_path / "latents-00001.npy").unlink()
    assert chunks(tmp_path).missing() == [(1, range(4, 8))]
    assert complete(tmp_path) == files
    arrays = chunks(tmp_path).arrays()
    assert np.array_equal(np.concatenate(arrays), ROWS) and arrays[0].dtype == np.float16
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 0


def test_two_processes_make_the_files_of_one(tmp_path):
    first, second = (chunks(tmp_path / "two", process(rank, 2)) for rank in range(2))
    assert first.missing() == [(0, range(4)), (2, range(8, 11))]
    assert second.missing() == [(1, range(4, 8))]
    complete(tmp_path / "two", process(1, 2))
    assert second.missing() == [] and len(first.missing()) == 2
    assert complete(tmp_path / "two", process(0, 2)) == complete(tmp_path / "one")


def test_chunks_of_other_settings_are_refused(tmp_path):
    complete(tmp_path)
    line = user_error(chunks, tmp_path, seed=2)
    assert "seed 1 (now 2)" in line and "shape" not in line and str(tmp_path) in line
    assert "chunk_size 4 (now 5)" in user_error(chunks, tmp_path, size=5)
    assert chunks(tmp_path).about() == {"seed": 1, "shape": [2, 3], "n": 11, "chunk_size": 4}


def test_npz_files(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=ROWS, bytes=np.arange(7))
    assert np.array_equal(train_vae.open_npz(path)["arr_0"], ROWS)
    good = path.read_bytes()
    for content in (good[:0], good[:1], good[:len(good) // 2], b"hello"):
        path.write_bytes(content)
        assert f"{path} cannot be read as an .npz" in user_error(train_vae.open_npz, path)
    assert "none.npz" in user_error(train_vae.open_npz, tmp_path / "none.npz")
