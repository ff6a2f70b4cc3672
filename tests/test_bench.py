"""tests/bench.py: FLOPs against the paper's, and every command on settings that take seconds."""
import re

import bench
import pytest

from dit import SIZES
from vae import SPECS


def test_flops_are_the_paper_s(capsys):
    bench.main(["flops"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[1:4]]
    assert [int(row[-1]) for row in rows] == [390, 1170, 1325]   # Table A4
    assert [float(row[-2]) for row in rows] == pytest.approx([390, 1170, 1325], rel=0.01)
    xl = next(line.split() for line in lines if line.startswith("XL"))
    assert (float(xl[1]), float(xl[2])) == pytest.approx((237, 712), rel=0.005)


@pytest.fixture
def tiny(monkeypatch):
    """Networks of a few thousand weights under the names of the big ones."""
    monkeypatch.setitem(SIZES, "XL", {"depth": 1, "hidden_size": 32, "num_heads": 2})
    narrow = {"embed_dim": 32, "ch": 32, "ch_mult": (1, 1, 1, 1, 1), "num_res_blocks": 1}
    monkeypatch.setitem(SPECS, "f16d32", {**narrow, "attn_resolutions": (), "resolution": 256})
    monkeypatch.setattr(bench.torchvision.models, "VisionTransformer", lambda *size, **_: transformer(
        *size, num_layers=1, num_heads=1, hidden_dim=1024, mlp_dim=32))


transformer = bench.torchvision.models.VisionTransformer


def test_tokenizer_says_what_vf_loss_adds(tiny, capsys):
    bench.main(["tokenizer", "--batch-size", "1", "--image-size", "32", "--lpips-weight", "0",
                "--repeat", "2", "--device", "cpu", "--no-compile"])
    text = capsys.readouterr().out
    ms = [float(x) for x in re.findall(r"([\d.]+) ms a step", text)]
    added = float(re.search(r"VF loss adds (-?[\d.]+) %", text)[1])
    assert len(ms) == 2 and added == pytest.approx(100 * (ms[1] / ms[0] - 1), abs=3)
    assert text.count("images/s") == text.count("peak memory") == 2 and "f16d32, 32x32, batch 1" in text


def test_dit_prints_rate_flops_memory_and_hours(tiny, capsys):
    bench.main(["dit", "--batch-size", "8", "--repeat", "3", "--device", "cpu", "--no-compile"])
    text = capsys.readouterr().out
    ms, rate = (float(x) for x in re.search(r"3 steps: ([\d.]+) ms, ([\d.]+) images/s", text).groups())
    assert rate == pytest.approx(8000 / ms, rel=0.05)
    assert "XL/1, batch 8, fp32" in text and "peak memory" in text
    for epochs in (64, 800):
        hours = float(re.search(rf"{epochs} epochs of ImageNet: (\d+) h on 1,", text)[1])
        assert hours == pytest.approx(epochs * 1_281_167 / rate / 3600, rel=0.05, abs=1)


def test_sample_prints_rates(tiny, capsys):
    bench.main(["sample", "--batch-size", "1", "--steps", "9", "--shift", "1", "--cfg-interval-start", "0.5",
                "--device", "cpu", "--no-compile"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 and all("images/s" in line for line in lines)
    assert "16 forward passes" in lines[0] and "12 forward passes" in lines[1]


def test_reading_at_random_is_faster_than_opening_a_file_for_every_item(capsys):
    """Measured 17 to 59 times, on busy and idle machines; few latents, to be quick."""
    pytest.importorskip("safetensors", reason="the authors' format needs safetensors")
    assert bench.read(["--num", "2000"]) > 5
    assert "items/s" in capsys.readouterr().out
