"""The study of the paper's claims: its rows, its report, and the flags of the scripts that it lives on."""
import json
import shutil
from dataclasses import asdict

import claims
import numpy as np
import pytest
import torch
from PIL import Image

import fid
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


@pytest.fixture(scope="module")
def study(photos, tmp_path_factory):
    """Rows of the study with a few steps each, as `python tests/claims.py --row ROW --data DIR` runs them; and all that it printed."""
    out, patch = tmp_path_factory.mktemp("study"), pytest.MonkeyPatch()
    patch.setattr(claims, "TOKENIZER", claims.TOKENIZER.replace("--steps 800", "--steps 4"))
    patch.setattr(claims, "FROZEN", dict(teacher=2, score_net=2))
    patch.setattr(claims, "SAMPLES", 20)
    patch.setattr(claims, "design", lambda data: dict(steps=4, ladder_steps=4, every=2, weight=0.5, half=0.25))
    for row, seed in (("d64-none", 0), ("d64-vf", 0), ("d64-none", 1), ("d64-vf", 1), ("d4-none", 0), ("d64-vf+mini-XS", 0), ("ladder-0", 0), ("ladder-9", 0)):
        claims.run_row(out, row, str(photos), seed)
    yield out
    patch.undo()


def test_rows_are_fair():
    """All tokenizers of one width have the same flags but VF loss's; all rows of C1 to C3 and C5 the same LightningDiT; the ladder the same images."""
    for d in claims.WIDTHS:
        assert claims.TOKENIZERS[f"d{d}-vf"].replace(claims.VF, "--vf none") == claims.TOKENIZERS[f"d{d}-none"]
    assert {flags for name, (tokenizer, flags) in claims.ROWS.items() if name == tokenizer} == {claims.DIT}
    plan = claims.design("shapes")
    steps = {i: int(claims.ROWS[f"ladder-{i}"][1].format(**plan).split("--steps ")[1]) for i in range(10) if i != 8}
    images = {train_dit.PRESETS[f"mini-table1-{i}"]["batch_size"] * n for i, n in steps.items()}
    assert images == {train_dit.PRESETS["mini"]["batch_size"] * plan["steps"]}                     # row 8 is d4-none, which trains so
    assert set(claims.ORDER) == set(claims.ROWS)

    def settings(module, flags):
        return asdict(train_vae.parse_settings(module.Settings, module.PRESETS, "", flags.format(**plan).split()))
    row_8, own = settings(train_dit, f"--preset mini-table1-8 {claims.LADDER_CONDUCT} --steps {plan['steps']}"), settings(train_dit, claims.DIT)
    assert {k for k in own if row_8[k] != own[k]} == {"preset", "out", "save_every"}
    vf = settings(train_vae, claims.TOKENIZERS["d64-vf"])
    for name, changed in (("margins", dict(cos_margin=0.5, mdms_margin=0.25)), ("only-mcos", dict(mdms=False, vf_weight=plan["weight"] / 2)),
                          ("only-mdms", dict(mcos=False, vf_weight=plan["weight"] / 2))):        # half the weight: as in Table 5
        assert settings(train_vae, claims.TOKENIZERS[f"d64-{name}"]) == vf | changed


def test_a_row_leaves_its_scores_and_is_not_done_twice(study, photos, capsys):
    home = study / "photos" / "d64-vf" / "seed0"
    scores = json.loads((home / "scores.json").read_text())
    assert {"tokenizer", "samples"} <= set(scores) and scores["samples"]["images"] == 20
    assert scores["tokenizer"]["settings"]["vf_weight"] == 0.5 and scores["samples"]["meta"]["guidance"] == 1
    assert json.loads((home / "control" / "scores.json").read_text())["network"].startswith("ScoreNet, 0 steps")
    assert json.loads((home / "step2" / "scores.json").read_text())["samples"]["meta"]["dit_step"] == 2
    assert (home / "uniformity.json").exists() and not (home / "dit-2.pt").exists()
    before = (home / "scores.json").stat().st_mtime_ns
    claims.run_row(study, "d64-vf", str(photos), 0)
    assert "is finished" in capsys.readouterr().out and (home / "scores.json").stat().st_mtime_ns == before


def test_a_finished_row_of_another_design_is_an_error(study, photos, monkeypatch):
    monkeypatch.setattr(claims, "design", lambda data: dict(steps=4, ladder_steps=4, every=2, weight=0.3, half=0.15))
    with pytest.raises(SystemExit, match="vf-weight 0.3 .checkpoint: 0.5"):
        claims.run_row(study, "d64-vf", str(photos), 0)


def test_all_rows_share_one_teacher_and_one_score_network(study):
    networks = {json.loads(p.read_text())["network"] for p in (study / "photos").glob("*/seed*/scores.json")}
    assert len(networks) == 1
    assert [p.parent.name for p in (study / "photos").rglob("teacher*.pt")] == ["shared"] * 2
    assert sorted(p.parent.name for p in study.rglob("score_net.pt")) == ["control", "shared"]


def test_the_score_network_is_a_function_of_the_seed(study, photos, tmp_path):
    """Made again by another process, elsewhere, after other random numbers: the same bits, or scores of two folders could not be compared."""
    torch.manual_seed(123)
    _, s, world = claims.call("fid", f"{claims.score_flags(study, str(photos))} --cache {tmp_path} --out {tmp_path}")
    fid.feature_network(s, {}, world.device)
    one, other = (torch.load(p / "score_net.pt", weights_only=True)["state_dict"] for p in (study / "photos" / "shared", tmp_path))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_the_control_s_teacher_is_the_other_data_set_s(study, tmp_path):
    own = study / "photos" / "shared" / "teacher-f2.pt"
    assert f"--teacher {own} " in claims.tokenizer_flags(study, "photos", "d64-vf")
    assert claims.foreign_teacher(study, "photos") is None and claims.foreign_teacher(study, "elsewhere/shapes") == own
    assert f"--teacher {own} " in claims.tokenizer_flags(study, "elsewhere/shapes", "d64-other")
    train_vae.save_checkpoint({"stage": "teacher"}, study / "a" / "shared" / "teacher-f2.pt")
    assert claims.foreign_teacher(study, "photos") == study / "a" / "shared" / "teacher-f2.pt"
    shutil.rmtree(study / "a")
    with pytest.raises(ValueError, match="another --data"):
        claims.run_row(study, "d64-other", str(study / "photos"), 0)


def test_report(study, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "plots", lambda *_: None)
    claims.report(study, tmp_path)
    text = capsys.readouterr().out
    gfid = [json.loads((study / "photos" / row / f"seed{s}" / "scores.json").read_text())["samples"]["values"]["mini-FID"]
            for row in ("d64-none", "d64-vf") for s in (0, 1)]
    line = next(x for x in text.splitlines() if x.startswith("| photos | 64 | vf"))
    first, second = gfid[2] / gfid[0], gfid[3] / gfid[1]
    mean = (first * second) ** 0.5
    assert f"{np.mean(gfid[2:]):.3g} ± {np.std(gfid[2:], ddof=1):.2g}" in line
    assert f"{100 * (mean - 1):+.0f} % ± {100 * mean * abs(np.log(first / second)) / 2:.0f}" in line     # the standard error of two is half their distance
    curve = [json.loads((study / "photos" / "d64-none" / "seed0" / at / "scores.json").read_text())["samples"]["values"]["mini-FID"] for at in ("step2", ".")]
    assert claims.Results(study / "photos").curve("d64-none", 0) == list(zip((2, 4), curve))
    xs = json.loads((study / "photos" / "d64-vf+mini-XS" / "seed0" / "scores.json").read_text())["samples"]["values"]["mini-FID"]
    assert f"| photos | mini-XS | - | {xs:.3g} | - | 1 |" in text                           # no plain row was run
    assert "| ladder-1 | + Rectified Flow | - (0) |" in text and "| d4-none | + Rotary Pos Embed |" in text
    assert "| photos | 16 |" not in text                                                    # not run


def test_plots(study, tmp_path):
    pytest.importorskip("matplotlib")
    claims.plots([claims.Results(study / "photos")], tmp_path)
    assert (tmp_path / "claims.png").stat().st_size > 5000 and (tmp_path / "claims-samples.png").exists()


def test_rows_are_compared_on_shared_seeds():
    assert claims.shared({"a": {0: 1.0, 1: 2.0}, "b": {1: 3.0}, "c": {}}) == {"a": {1: 2.0}, "b": {1: 3.0}, "c": {}}
    assert claims.shared({"a": {}}) == {"a": {}}


def test_change_is_the_geometric_mean():
    assert claims.change({0: 1.0, 1: 1.0}, {0: 2.0, 1: 0.5}).startswith("+0 %")
    assert claims.change({0: 4.0, 1: 3.0}, {0: 3.0}) == "-25 %" and claims.change({0: 1.0}, {1: 1.0}) == "-"


def test_the_study_runs_what_was_asked_for(monkeypatch, tmp_path, capsys):
    """Tokenizers first, those that a row uses too; a failed row fails the study and stops no other; the control only where there is another data set."""
    ran = []

    class Process:
        def __init__(self, command, **_):
            self.row = command[command.index("--row") + 1]
            ran.append(self.row)

        def wait(self):
            return int(self.row == "d64-vf")
    monkeypatch.setattr(claims.subprocess, "Popen", Process)
    monkeypatch.setattr(claims, "prepare", lambda *_: None)
    monkeypatch.setattr(claims.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="1 rows failed"):
        claims.study(tmp_path, ["d64-vf+mini", "d4-none"], ["shapes"], [0], 1)
    assert ran == ["d4-none", "d64-vf", "d64-vf+mini"]
    assert "FAILED" in capsys.readouterr().out
    ran.clear()
    with pytest.raises(SystemExit):
        claims.study(tmp_path, claims.ORDER, ["shapes"], [0], 1)
    assert sorted(ran) == sorted(set(claims.ROWS) - {"d64-other"})


def test_sigterm_stops_the_rows_too(monkeypatch, tmp_path):
    """The running row gets the signal, which saves; no other one is begun; the study fails."""
    handlers, ended = {}, []

    class Process:
        def __init__(self, command, **_):
            self.row = command[command.index("--row") + 1]

        def wait(self):
            handlers[claims.signal.SIGTERM]()
            return 1

        def terminate(self):
            ended.append(self.row)
    monkeypatch.setattr(claims.subprocess, "Popen", Process)
    monkeypatch.setattr(claims, "prepare", lambda *_: None)
    monkeypatch.setattr(claims.signal, "signal", handlers.__setitem__)
    with pytest.raises(SystemExit, match="2 rows failed or were stopped"):
        claims.study(tmp_path, ["d4-none", "d64-none"], ["shapes"], [0], 1)
    assert ended == ["d4-none"]


@pytest.mark.parametrize("target, step", [(20.0, 100), (15.0, 150), (6.0, 280), (4.0, None)])
def test_reached(target, step):
    assert claims.reached([(100, 20.0), (200, 10.0), (300, 5.0)], target) == step


def test_a_teacher_file_is_taken_as_it_is(study, photos, tmp_path):
    """--teacher: another seed and another number of steps change nothing; a stride that does not fit ends in one line."""
    shared = study / "photos" / "shared"
    s = train_vae.parse_settings(train_vae.Settings, train_vae.PRESETS, "", ["--data", str(photos), "--image-size", "16", "--teacher", str(shared / "teacher-f2.pt"),
                                                                             "--teacher-steps", "9", "--seed", "5", "--out", str(tmp_path)])
    world = train_vae.World(0, 1, torch.device("cpu"))
    net = train_vae.mini_teacher(s, train_vae.Images(s.data, "train", 16), 2, world)
    saved = torch.load(shared / "teacher-f2.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, saved[k]) for k, v in net.state_dict().items())
    with pytest.raises(SystemExit, match="stride 2"):
        train_vae.mini_teacher(s, train_vae.Images(s.data, "train", 16), 4, world)
