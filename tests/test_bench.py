"""tests/bench.py: FLOPs against the paper's, and every command on settings that take seconds."""
import re

import bench
import pytest
import torch

from dit import SIZES
from vae import SPECS, AutoencoderKL


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()

def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]

def test_flops_are_the_paper_s(capsys):
    bench.main(["flops"])
    lines = lines_of(capsys)
    rows = [line.split() for line in lines[1:5]]
    assert [row[-1] for row in rows] == ["390", "1170", "1325", "-"]  # Table A4
    assert [float(row[-2]) for row in rows] == pytest.approx([390, 1170, 1325, 252], rel=0.01)
    xl = next(line.split() for line in lines if line.startswith("XL"))
    assert (float(xl[1]), float(xl[2])) == pytest.approx((237, 712), rel=0.005)

def test_compiled_features_would_double_equation_4():
    """Why train_vae.py compiles the norms only: a compiled backward pass computes the gradients of the
    convolutions' weights, too, whoever asks for them. Counted on meta tensors."""
    torch.compiler.reset()
    spec = SPECS["f16d32"] | {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": ()}
    with torch.device("meta"):
        x, vae = torch.zeros(1, 3, 32, 32), AutoencoderKL(**spec)
    eager = bench.eq4_flops(vae, x)
    vae.decoder.features = torch.compile(vae.decoder.features, backend="aot_eager")
    assert 1.8 < bench.eq4_flops(vae, x) / eager < 2

def test_all_is_one_table_even_on_a_cpu(capsys):
    assert bench.main(["all", "--seconds", "10"]) == 0
    lines = lines_of(capsys)
    assert "torch" in lines[0] and "`python tests/bench.py all --seconds 10`" in lines[0]
    assert cells(lines[2])[0] == "measured"
    rows = [cells(line) for line in lines[4:] if line.startswith("|")]
    assert {len(row) for row in rows[:14]} == {7} and rows[0][0].startswith("mini-XS/4, batch 2")
    for row in rows:
        if "batch" in row[0]:
            batch = int(re.search(r"batch (\d+)", row[0])[1])
            assert float(row[2]) * float(row[3]) == pytest.approx(1e3 * batch, rel=0.05)
    assert "0 measurements failed" in lines[-1]

def test_all_goes_on_after_a_failure_and_skips_for_lack_of_time(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("broken here")
    for name in ("dit_step", "tokenizer_step", "sample_times", "inception_step"):
        monkeypatch.setattr(bench, name, broken)
    assert bench.main(["all", "--seconds", "60"]) == 15  # all of them
    out, err = capsys.readouterr()
    assert "15 measurements failed" in out and err.count("broken here") >= 15
    assert bench.main(["all", "--seconds", "0"]) == 0
    assert capsys.readouterr().out.count("skipped") == 15

@pytest.fixture
def tiny(monkeypatch):
    """Networks of a few thousand weights under the names of the big ones."""
    monkeypatch.setitem(SIZES, "XL", {"depth": 1, "hidden_size": 32, "num_heads": 2})
    narrow = {"embed_dim": 32, "ch": 32, "ch_mult": (1, 1, 1, 1, 1), "num_res_blocks": 1}
    monkeypatch.setitem(SPECS, "f16d32", {**narrow, "attn_resolutions": (), "resolution": 256})
    full = bench.dinov2_shaped
    monkeypatch.setattr(bench, "dinov2_shaped", lambda grid: full(grid, layers=1, width=64))

def test_tokenizer_says_what_vf_loss_adds(tiny, capsys):
    bench.main(["tokenizer", "--batch-size", "1", "--image-size", "32", "--lpips-weight", "0",
                "--repeat", "2", "--device", "cpu", "--no-compile"])
    lines = lines_of(capsys)
    none, full = (cells(line) for line in lines[4:6])
    assert "no VF loss" in none[0] and "f16d32, batch 1" in full[0]
    added = float(re.search(r"VF loss adds (-?[\d.]+) %", lines[-1])[1])
    assert added == pytest.approx(100 * (float(full[2]) / float(none[2]) - 1), abs=3)

def test_dit_prints_rate_flops_memory_and_hours(tiny, capsys):
    bench.main(["dit", "--batch-size", "8", "--repeat", "3", "--device", "cpu", "--no-compile"])
    lines = lines_of(capsys)
    _, _, ms, rate, tera, _, memory = cells(lines[4])
    assert float(rate) == pytest.approx(8000 / float(ms), rel=0.05) and float(memory) > 0 <= float(tera)
    for epochs, line in zip((64, 800), lines[5:7], strict=True):
        hours = float(re.search(rf"{epochs} epochs of ImageNet: (\d+) h on 1,", line)[1])
        assert hours == pytest.approx(epochs * 1_281_167 / float(rate) / 3600, rel=0.05, abs=1)

def test_sampling_rate_counts_both_halves(tiny, capsys):
    """Of the times 0, 1/8, ..., 7/8 four lie at 0.5 or above: 8 steps, 4 of them guided, and a decoder."""
    s, _ = bench.parse(bench.sample, ["--sampling-steps", "9", "--timestep-shift", "1"], {})
    assert bench.sampling_rate(s, {1: 1.0, 2: 2.0}, 5.0, 0.5) == pytest.approx(s.batch_size / (4 + 8 + 5))
    assert bench.sampling_rate(s, {1: 1.0, 2: 2.0}, 5.0, 0.0) == pytest.approx(s.batch_size / (16 + 5))
    bench.main(["sample", "--batch-size", "1", "--cfg-interval-start", "0.5", "--device", "cpu",
                "--no-compile"])
    assert [cells(line)[0][-7:] for line in lines_of(capsys)[4:]] == ["t = 0.0", "t = 0.5"]

def test_memory_is_less_with_checkpointing(tiny, capsys):
    bench.main(["memory", "--at-once", "4", "--image-size", "32", "--lpips-weight", "0", "--chunks", "8"])
    _, _, row, chunks, _ = lines_of(capsys)
    _, plain, checkpointing = map(float, row.split())
    assert checkpointing < plain and chunks.startswith("32 images in 8 chunks: ")

def test_reading_at_random_is_faster_than_opening_a_file_for_every_item(capsys):
    """Few latents, to be quick."""
    pytest.importorskip("safetensors", reason="the authors' format needs safetensors")
    assert bench.read(["--num", "2000"]) > 5
    assert "per second" in capsys.readouterr().out
