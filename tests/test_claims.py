"""The study of the paper's claims: its rows, its report, and the flags of the scripts that it lives on."""
import json
import shutil

import claims
import numpy as np
import pytest
import torch
from PIL import Image

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
    patch.setattr(claims, "STEPS", 4)
    patch.setattr(claims, "EVERY", 2)
    patch.setattr(claims, "ROWS", {k: (v[0], v[1].replace(" 3000", " 4").replace(" 750", " 4")) for k, v in claims.ROWS.items()})
    for row, seed in (("d64-none", 0), ("d64-vf", 0), ("d64-none", 1), ("d64-vf", 1), ("d4-none", 0), ("d64-vf+mini-XS", 0), ("ladder-0", 0), ("ladder-9", 0)):
        claims.run_row(out, row, str(photos), seed)
    yield out
    patch.undo()


def test_rows_are_fair():
    """All tokenizers of one width have the same flags but VF loss's; all rows of C1 to C3 and C5 the same LightningDiT; the ladder the same images."""
    for d in claims.WIDTHS:
        assert claims.TOKENIZERS[f"d{d}-vf"].replace(claims.VF, "--vf none") == claims.TOKENIZERS[f"d{d}-none"]
    assert {flags for name, (tokenizer, flags) in claims.ROWS.items() if name == tokenizer} == {claims.DIT}
    from train_dit import PRESETS
    images = {PRESETS[f"mini-table1-{i}"]["batch_size"] * int(claims.ROWS[f"ladder-{i}"][1].split("--steps ")[1]) for i in range(10) if i != 8}
    assert images == {PRESETS["mini"]["batch_size"] * claims.STEPS}                     # row 8 is d4-none, which trains so
    assert set(claims.ORDER) == set(claims.ROWS)


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
    assert "finished" in capsys.readouterr().out and (home / "scores.json").stat().st_mtime_ns == before


def test_all_rows_share_one_teacher_and_one_score_network(study):
    networks = {json.loads(p.read_text())["network"] for p in (study / "photos").glob("*/seed*/scores.json")}
    assert len(networks) == 1
    assert [p.parent.name for p in (study / "photos").rglob("teacher*.pt")] == ["shared"] * 2


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
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    claims.report(study)
    text = capsys.readouterr().out
    gfid = [json.loads((study / "photos" / row / f"seed{s}" / "scores.json").read_text())["samples"]["values"]["mini-FID"]
            for row in ("d64-none", "d64-vf") for s in (0, 1)]
    line = next(x for x in text.splitlines() if x.startswith("| photos | 64 | vf"))
    ratios = 100 * (np.array(gfid[2:]) / gfid[:2] - 1)
    assert f"{np.mean(gfid[2:]):.3g} ± {np.std(gfid[2:], ddof=1):.2g}" in line
    assert f"{ratios.mean():+.0f} % ± {abs(ratios[0] - ratios[1]) / 2:.0f}" in line          # the standard error of two is half their distance
    assert (tmp_path / "assets" / "claims.png").stat().st_size > 5000 and (tmp_path / "assets" / "claims-samples.png").exists()


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
