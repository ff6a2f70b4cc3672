"""Files that others released, and settings that the authors published: what no other test file holds."""
import os
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as transform

import sample
import train_vae
from vae import SPECS, AutoencoderKL, UserError, read_released_tokenizer, torch_load


# --- released files ----------------------------------------------------------------------------------------
def test_a_checkpoint_of_lightning_is_read_and_its_classes_are_inert(tmp_path, monkeypatch):
    """CompVis' model.ckpt pickles a ModelCheckpoint, as a key and as a value; its code never runs."""
    name = ""
    for part in ("pytorch_lightning", "callbacks", "model_checkpoint"):
        name = f"{name}.{part}".strip(".")
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    class ModelCheckpoint:
        def __init__(self):
            self.best = 3

        def __setstate__(self, state):
            (tmp_path / "ran").touch()
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = name, "ModelCheckpoint"
    sys.modules[name].ModelCheckpoint = ModelCheckpoint
    with torch.device("meta"):
        weights = AutoencoderKL(**SPECS["mini-f4d4"]).state_dict()
    weights = {k: torch.full(v.shape, 0.5) for k, v in weights.items()}
    torch.save({"state_dict": weights | {"loss.logvar": torch.zeros(())}, "last": ModelCheckpoint(),
                "callbacks": {ModelCheckpoint: {"best": torch.ones(())}}}, tmp_path / "model.ckpt")
    with pytest.raises(Exception, match="Unsupported|unsupported"):  # what torch alone says
        torch.load(tmp_path / "model.ckpt", weights_only=True)
    spec, found = read_released_tokenizer(tmp_path / "model.ckpt")
    assert spec == SPECS["mini-f4d4"] and found.keys() == weights.keys()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("function, argument", [(os.system, "touch {}"), (eval, "open({!r}, 'w')")])
def test_code_in_a_file_never_runs(tmp_path, function, argument):
    class Evil:
        def __reduce__(self):
            return function, (argument.format(str(tmp_path / "ran")),)
    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "evil.pt")
    try:
        torch_load(tmp_path / "evil.pt")  # inert, or refused
    except UserError as error:
        assert "evil.pt" in str(error)
    assert not (tmp_path / "ran").exists()


def diffusers_name(name, old):
    """LDM's name of a weight of f8d4 -> diffusers', written from their side: by hand, block by block."""
    half, *path = name.split(".")
    if half in ("quant_conv", "post_quant_conv") or path[0] in ("conv_in", "conv_out"):
        return name
    if path[0] == "norm_out":
        return f"{half}.conv_norm_out.{path[1]}"
    last = {"nin_shortcut": "conv_shortcut"}.get(path[-2], path[-2])
    if path[0] == "mid":
        if path[1] == "attn_1":
            new = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
            older = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
            return f"{half}.mid_block.attentions.0.{(older if old else new)[path[2]]}.{path[-1]}"
        return f"{half}.mid_block.resnets.{int(path[1][-1]) - 1}.{last}.{path[-1]}"
    level = int(path[1]) if half == "encoder" else 3 - int(path[1])  # theirs: the lowest resolution first
    stack = "down_blocks" if half == "encoder" else "up_blocks"
    if path[2] in ("downsample", "upsample"):
        return f"{half}.{stack}.{level}.{path[2]}rs.0.conv.{path[-1]}"
    return f"{half}.{stack}.{level}.resnets.{path[3]}.{last}.{path[-1]}"


@pytest.mark.parametrize("old", [False, True])
def test_diffusers_names_are_read(tmp_path, old):
    torch.manual_seed(0)
    with torch.device("meta"):
        ours = AutoencoderKL(**SPECS["f8d4"]).state_dict()
    ours = {k: torch.randn(()).expand(v.shape) for k, v in ours.items()}  # a small file
    theirs = {}
    for name, value in ours.items():
        flat = "attn_1" in name and value.dim() == 4  # their attention has linear layers
        theirs[diffusers_name(name, old)] = value[:, :, 0, 0] if flat else value
    assert "decoder.up_blocks.0.resnets.0.conv1.weight" in theirs and len(theirs) == len(ours)
    torch.save(theirs, tmp_path / "diffusion_pytorch_model.bin")
    spec, found = read_released_tokenizer(tmp_path / "diffusion_pytorch_model.bin")
    assert spec == SPECS["f8d4"]
    assert all(torch.equal(found[name], value) for name, value in ours.items())


# --- the authors' choices ----------------------------------------------------------------------------------
def test_random_crop_is_a_resized_square():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 61, 3), dtype=np.uint8))
    small = transform.resize(image, 32, transform.InterpolationMode.BILINEAR)  # 47 x 32
    for where, top in (((0.0, 0.5), 0), ((0.999, 0.5), small.height - 32), ((0.5, 0.0), 8)):
        want = transform.pil_to_tensor(transform.crop(small, top, 0, 32, 32))
        assert torch.equal(train_vae.random_crop(image, 32, where), want)


@pytest.mark.parametrize("preset, scale, start, number, integrator, shift", [
    ("table1", 1.0, None, 50_000, "dopri5", None), ("table2", 1.0, None, 10_000, "dopri5", None),
    ("table3-64ep", 1.0, None, 50_000, "euler", 0.3), ("table3-64ep-cfg", 10.0, 0.10, 50_000, "euler", 0.3),
    ("table3-800ep", 1.0, None, 50_000, "euler", 0.3), ("table3-800ep-cfg", 6.7, 0.125, 50_000, "euler", 0.3),
    ("official-demo", 9.0, 0.0, 8, "euler", 1.0)])
def test_sampling_presets_are_the_published_settings(preset, scale, start, number, integrator, shift):
    s = train_vae.parse_settings(sample.Settings, sample.PRESETS, "", ["--preset", preset])
    assert (s.cfg_scale, s.num, s.integrator, s.precision) == (scale, number, integrator, "fp32")
    assert start is None or (s.cfg_interval_start, s.cfg_channels, s.sampling_steps) == (start, 3, 250)
    assert shift is None or s.timestep_shift == shift
