"""The study of the paper's claims: its design, a few rows in seconds, its report, the paper's numbers."""
import json
from dataclasses import asdict

import claims
import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train_dit
import train_vae


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An image folder of 10 classes, 6 train and 2 test pictures each."""
    root, rng = tmp_path_factory.mktemp("claims") / "photos", np.random.default_rng(0)
    for split, n in (("train", 6), ("test", 2)):
        for c in range(10):
            (root / split / f"class{c}").mkdir(parents=True)
            for i in range(n):
                pixels = np.clip(rng.normal(20 * c + 40, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{c}" / f"{i}.png")
    return root


DESIGN = claims.design   # the fixture `study` puts TINY in its place
TINY = {"steps": 4, "ladder_steps": 4, "every": 2, "weight": 0.5, "half": 0.25}
RUNS = (("d64-none", 0), ("d64-vf", 0), ("d64-none", 1), ("d64-vf", 1),
        ("d64-vf+mini-XS", 0), ("ladder-9", 0))


@pytest.fixture(scope="module")
def study(photos, tmp_path_factory):
    """Rows of the study with a few steps each, as `python tests/claims.py --row ROW --data DIR` runs them."""
    out, patch = tmp_path_factory.mktemp("study"), pytest.MonkeyPatch()
    short = claims.TOKENIZER.replace("--steps 800", "--steps 4").replace("steps 300", "steps 2")
    patch.setattr(claims, "TOKENIZER", short)
    patch.setattr(claims.score_flags, "__defaults__", (2, "shared"))
    patch.setattr(claims, "SAMPLES", 20)
    patch.setattr(claims, "design", lambda data: TINY)
    for row, seed in RUNS:
        claims.run_row(out, row, str(photos), seed)
    yield out
    patch.undo()


def score(study, row, seed=0, file="scores.json", part="samples", name="mini-FID"):
    path = study / "photos" / row / f"seed{seed}" / file
    return json.loads(path.read_text())[part]["values"][name]


# --- the design -----------------------------------------------------------------------------------------
def settings(module, flags, plan):
    parsed = train_vae.parse_settings(module.Settings, module.PRESETS, "", flags.format(**plan).split())
    return {k: v for k, v in asdict(parsed).items() if k not in ("preset", "out")}


@pytest.mark.parametrize("data", ["shapes", "path/to/cifar10"])
def test_rows_are_fair(data):
    """What a claim compares differs in what the claim is about, and in nothing else."""
    plan = DESIGN(data)

    def tokenizer(row):
        return settings(train_vae, f"{claims.TOKENIZER} {claims.TOKENIZERS[row]}", plan)

    def differ(a, b):
        return {k for k in a if a[k] != b[k]}
    for d in (4, 16, 64):
        assert "vf" in differ(tokenizer(f"d{d}-vf"), tokenizer(f"d{d}-none"))
        assert differ(tokenizer(f"d{d}-vf"), tokenizer(f"d{d}-none")) <= {
            "vf", "vf_weight", "cos_margin", "mdms_margin"}
        assert differ(tokenizer(f"d{d}-vf"), tokenizer("d64-vf")) <= {"spec"}
    half = {"vf_weight": plan["weight"] / 2}
    for row, change in (("margins", {"cos_margin": 0.5, "mdms_margin": 0.25}), ("other", {}),
                        ("only-mcos", {"mdms": False, **half}), ("only-mdms", {"mcos": False, **half})):
        assert tokenizer(f"d64-{row}") == tokenizer("d64-vf") | change
    dits = {row: settings(train_dit, flags, plan) for row, (_, flags) in claims.ROWS.items()}
    for row, dit in dits.items():
        if not row.startswith("ladder"):
            assert differ(dit, dits["d64-vf"]) == ({"size"} if "+" in row else set()), row
    images = {row: dits[row]["batch_size"] * dits[row]["steps"] for row in claims.LADDER_ROWS}
    assert set(images.values()) == {images["d4-none"]}
    flags = f"--preset mini-table1-8 {claims.TRAINING} --steps {{steps}} {claims.CONDUCT}"
    row_8 = settings(train_dit, flags, plan)
    assert differ(row_8, dits["d4-none"]) <= {"save_every"}


def test_claims_name_rows():
    named = {row for groups in claims.CLAIMS.values() for group in groups for row in group}
    assert named == set(claims.ROWS) and set(claims.CURVES) <= named
    assert {tokenizer for tokenizer, _ in claims.ROWS.values()} == set(claims.TOKENIZERS)
    twins = {row: claims.plain_twin(row) for row in claims.ROWS}
    assert twins["d64-vf+mini"] == "d64-none+mini"
    assert (twins["d64-margins"], twins["d4-vf"]) == ("d64-none", "d4-none")
    assert twins["d4-none"] is twins["d64-none+mini"] is twins["ladder-3"] is None


# --- running --------------------------------------------------------------------------------------------
def test_a_row_leaves_its_scores_and_is_not_done_twice(study, photos, capsys):
    home = study / "photos" / "d64-vf" / "seed0"
    scores = json.loads((home / "scores.json").read_text())
    assert {"tokenizer", "samples"} <= set(scores) and scores["samples"]["images"] == 20
    assert scores["tokenizer"]["settings"]["vf_weight"] == 0.5 and scores["samples"]["meta"]["guidance"] == 1
    assert json.loads((home / "control" / "scores.json").read_text())["network"] != scores["network"]
    step2 = json.loads((home / "step2" / "scores.json").read_text())
    assert step2["samples"]["meta"]["dit_step"] == 2
    assert (home / "uniformity.json").exists() and not list(home.glob("dit-*.pt"))
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*.json")}
    claims.run_row(study, "d64-vf", str(photos), 0)
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*.json")} == before
    assert "is finished" in capsys.readouterr().out


def test_a_finished_row_of_another_design_is_an_error(study, photos, monkeypatch, capsys):
    monkeypatch.setattr(claims, "design", lambda data: {**TINY, "weight": 0.3})
    with pytest.raises(SystemExit) as end:
        claims.run_row(study, "d64-vf", str(photos), 0)
    captured = capsys.readouterr()
    assert "vf-weight 0.3" in str(end.value) + captured.out + captured.err


def test_all_rows_share_one_teacher_and_one_score_network(study):
    found = [json.loads(p.read_text())["network"] for p in (study / "photos").glob("*/seed*/scores.json")]
    assert len(found) == len(RUNS) and len(set(found)) == 1
    assert sorted(p.parent.name for p in study.rglob("score_net.pt")) == ["control", "shared"]
    one, other = (torch.load(study / "photos" / "d64-vf" / seed / "vae.pt", weights_only=True)
                  for seed in ("seed0", "seed1"))
    assert all(torch.equal(one["teacher"][k], other["teacher"][k]) for k in one["teacher"])
    assert not torch.equal(one["linear_proj"]["weight"], other["linear_proj"]["weight"])


def test_the_control_s_teacher_learns_from_other_images(study, photos):
    assert claims.tokenizer_flags("photos", "d64-other", "shapes")[-2:] == ["--teacher-data", "shapes"]
    assert "--teacher-data" not in claims.tokenizer_flags("photos", "d64-vf", "shapes")
    with pytest.raises(SystemExit, match="--other"):
        claims.run_row(study, "d64-other", str(photos), 0)


started = []


class Process:
    """Stands for a row's process: notes which one it is, and fails as d64-vf."""

    def __init__(self, command, **_):
        self.row = command[command.index("--row") + 1]
        started.append(self.row)

    def wait(self):
        return int(self.row == "d64-vf")


def test_the_study_runs_what_was_asked_for(monkeypatch, tmp_path, capsys):
    """Tokenizers first, those that a row uses too; a failed row fails the study and stops no other."""
    started.clear()
    monkeypatch.setattr(claims.subprocess, "Popen", Process)
    monkeypatch.setattr(claims.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="1 rows failed"):
        claims.study(tmp_path, ["d64-vf+mini", "d4-none"], ["shapes"], [0], 1)
    assert started == ["d64-vf", "d4-none", "d64-vf+mini"]
    assert "FAILED" in capsys.readouterr().out
    started.clear()
    with pytest.raises(SystemExit):
        claims.study(tmp_path, [*claims.ROWS], ["shapes"], [0], 1)
    assert sorted(started) == sorted(set(claims.ROWS) - {"d64-other"})


def test_sigterm_stops_the_rows_too(monkeypatch, tmp_path):
    """The running row gets the signal, which saves; no other one is begun; the study fails."""
    handlers, ended = {}, []

    class Stopped(Process):
        def wait(self):
            handlers[claims.signal.SIGTERM]()
            return 1

        def terminate(self):
            ended.append(self.row)
    monkeypatch.setattr(claims.subprocess, "Popen", Stopped)
    monkeypatch.setattr(claims.signal, "signal", handlers.__setitem__)
    with pytest.raises(SystemExit, match="2 rows failed or were stopped"):
        claims.study(tmp_path, ["d4-none", "d64-none"], ["shapes"], [0], 1)
    assert ended == ["d64-none"]


# --- report ---------------------------------------------------------------------------------------------
def test_report(study, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "plots", lambda *_: None)
    claims.report(study, tmp_path)
    text = capsys.readouterr().out
    none, vf = ([score(study, row, seed) for seed in (0, 1)] for row in ("d64-none", "d64-vf"))
    line = next(x for x in text.splitlines() if x.startswith("| photos | d64-vf |"))
    ratios = np.array(vf) / none
    mean, error = ratios.prod() ** 0.5, abs(np.log(ratios[0] / ratios[1])) / 2   # of two: half their distance
    assert f"| {np.mean(vf):.3g} ± {np.std(vf, ddof=1):.2g} |" in line
    assert f"| {100 * (mean - 1):+.0f} % ± {100 * mean * error:.0f} (" in line
    curve = [score(study, "d64-none", file=file) for file in ("step2/scores.json", "scores.json")]
    assert claims.Results(study / "photos").curve("d64-none", 0) == list(zip((2, 4), curve))
    xs = score(study, "d64-vf+mini-XS")
    line = next(x for x in text.splitlines() if x.startswith("| photos | d64-vf+mini-XS |"))
    assert f"| {xs:.3g} |  |  |" in line   # its plain twin was not run
    assert "ladder-9: + patch size = 1 & VA-VAE (the paper: 4.29)" in text and "d16-none" not in text


def test_plots(study, tmp_path):
    pytest.importorskip("matplotlib")
    claims.plots([claims.Results(study / "photos")], tmp_path)
    assert (tmp_path / "claims.png").stat().st_size > 5000 and (tmp_path / "claims-samples.png").exists()


def test_rows_are_compared_on_shared_seeds():
    assert claims.common({"a": {0: 1.0, 1: 2.0}, "b": {1: 3.0}, "c": {}}) == {1}
    assert claims.common({"a": {}}) == set()


def test_change_is_the_geometric_mean():
    assert claims.change({0: 1.0, 1: 1.0}, {0: 2.0, 1: 0.5}).startswith("+0 %")
    assert claims.change({0: 4.0, 1: 3.0}, {0: 3.0}) == "-25 %" and claims.change({0: 1.0}, {1: 1.0}) == ""


@pytest.mark.parametrize("target, step", [(20.0, 100), (15.0, 150), (6.0, 280), (4.0, None)])
def test_reached(target, step):
    assert claims.reached([(100, 20.0), (200, 10.0), (300, 5.0)], target) == step


# --- the paper's numbers --------------------------------------------------------------------------------
def test_the_numbers_are_of_the_rows_that_train_vae_has():
    long = {name for name in train_vae.ROWS if name.startswith("vavae-long")}
    assert set(claims.PAPER_SCORES) == set(train_vae.ROWS) - long - {"table1-sdvae"} | {"vavae-long-3"}
    assert all(len(scores) == (7 if name.startswith("table2") else 5)
               for name, scores in claims.PAPER_SCORES.items() if name != "vavae-long-3")
    assert len(claims.PAPER_LADDER) == len(train_dit.LADDER) == len(claims.LADDER_ROWS) == 10
    # what the paper prints twice
    for one, other in (("table4-naive", "table2-f16d32-none"), ("table5-full", "table2-f16d32-dinov2"),
                       ("table4-dinov2", "table2-f16d32-dinov2"), ("table4-mae", "table2-f16d32-mae")):
        assert claims.PAPER_SCORES[one][:5] == claims.PAPER_SCORES[other][:5]


NONE = {}   # nothing overridden


def test_table_puts_the_paper_beside_the_same_setting_only(tmp_path):
    def run(name, row, preset, features="inception", images=10_000, guidance=1.0, model="B/1", change=NONE,
            other=NONE):
        (tmp_path / name).mkdir()
        setting = asdict(train_vae.Settings()) | train_vae.PRESETS[row] | {"preset": row, "seed": 5} | change
        meta = {**asdict(sample.Settings()), **sample.PRESETS[preset], "preset": preset,
                "guidance": guidance, "model": model}
        protocol = {"crop": "resize", "posterior": "sample", "rfid_input": "pytorch-fid"} | other
        tokenizer = {"rFID": 0.3, "PSNR": 28.0, "LPIPS": None, "SSIM": 0.8}
        values = {"FID": 16.1, "sFID": 5, "IS": 100, "precision": 0.7, "recall": 0.6}
        (tmp_path / name / "scores.json").write_text(json.dumps({
            "run": name, "features": features, "network": "",
            "tokenizer": {"values": tokenizer, "images": 50_000, "settings": setting, **protocol},
            "samples": {"values": values, "images": images, "meta": meta}}))
        return str(tmp_path / name)

    names = [run("same", "imagenet256", "table2"),
             run("large", "table2-f16d64-mae", "table2", model="XL/1"),
             run("guided", "table2-f16d32-none", "table3-64ep-cfg", guidance=10.0),
             run("changed", "table2-f16d32-none", "table2", change={"vf": "sam"}),
             run("overridden", "imagenet256", "table2", change={"vf": "sam"}),
             run("protocol", "imagenet256", "table2", other={"posterior": "mode"}),
             run("small", "imagenet256", "table2", features="mini"),
             run("system", "vavae-long-3", "table3-800ep-cfg", images=50_000, guidance=6.7, model="XL/1")]
    text = claims.paper_table([*names, str(tmp_path / "no scores here")])
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "| f16d32 | dinov2 | 0.3 (0.28) | 28 (27.96) | - (0.096) | 0.8 (0.79) |" in rows["same"]
    assert "| B/1 | 1.0 | 16.1 (15.82) |" in rows["same"]
    assert "0.3 (0.15)" in rows["large"] and "16.1 (11.69)" in rows["large"]
    assert "0.3 (0.26)" in rows["guided"] and "16.1 |" in rows["guided"]
    for name in ("changed", "overridden", "protocol", "small (mini-)"):
        assert "(0." not in rows[name] and "16.1 |" in rows[name], name
    assert "| XL/1 | 6.7 | 16.1 (1.35) | 5 (4.15) | 100 (295.3) | 0.7 (0.79) | 0.6 (0.65) |" in rows["system"]
    with pytest.raises(SystemExit, match="no scores.json"):
        claims.paper_table([str(tmp_path / "nothing")])
