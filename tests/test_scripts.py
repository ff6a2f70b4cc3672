"""The scripts as a user runs them, for seconds each: the chain, kill and resume, two processes, and every mistake that ends in one line."""
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_vf_loss import HUBCONF

from vf_loss import DINOV2_COMMIT

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
SMALL_VAE = "--spec mini-f4d4 --image-size 24 --batch-size 8 --teacher-steps 3 --log-every 1 --save-every 2 --disc-start 4 --seed 3".split()
SMALL_DIT = "--size mini-S --batch-size 8 --log-every 1 --save-every 2 --sample-every 0 --seed 3".split()


def start(script, *args, launcher=(), cwd=ROOT, env=ENV):
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / script), *map(str, args)], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(script, *args, ok=True, **kwargs):
    """Run to the end; returns stdout if it must succeed, else the error line, which must be the only line of its kind and no traceback."""
    process = start(script, *args, **kwargs)
    out, err = process.communicate(timeout=300)
    if ok:
        assert process.returncode == 0, err[-3000:]
        return out
    assert process.returncode != 0 and "Traceback" not in err, err[-3000:]
    lines = [line for line in err.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(lines) == 1, err[-3000:]
    return lines[0]


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An image folder of three classes, 30 pictures each, some not square, one grey, one with a palette."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for c, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir()
        for i in range(30):
            pixels = np.clip(rng.normal(80 * c + 40, 30, (20 + i % 3, 24, 3)), 0, 255).astype(np.uint8)
            image = Image.fromarray(pixels)
            image = image.convert("L") if i == 1 else image.convert("P") if i == 2 else image
            image.save(root / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def tokenizer_run(photos, tmp_path_factory):
    """A finished, uninterrupted run of train_vae.py, and what it printed."""
    out = tmp_path_factory.mktemp("run")
    return out, run("train_vae.py", "--data", photos, "--out", out, "--steps", 9, *SMALL_VAE)


@pytest.fixture(scope="module")
def dit_run(tokenizer_run):
    out, _ = tokenizer_run
    return out, run("train_dit.py", "--out", out, "--steps", 8, *SMALL_DIT)


def weights(path, *keys):
    state = torch.load(path, weights_only=True)
    return {f"{key}.{name}": tensor for key in keys for name, tensor in state[key].items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def read_csv(path):
    with open(path, newline="") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def kill_until_finished(command, path, kills, seed):
    """Start the command, kill it with SIGKILL at random moments `kills` times, each time start it again; then let it finish."""
    rng, killed = random.Random(seed), 0
    while killed < kills:
        process = start(*command)
        time.sleep(rng.uniform(3.0, 7.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:                                            # it was faster: that kill did not happen
            break
        killed += 1
    run(*command)
    assert torch.load(path, weights_only=True)["step"] == torch.load(path, weights_only=True)["total_steps"]
    return killed


# --- The chain ------------------------------------------------------------------------------------------------------------------------------------
def test_chain_on_image_folder(tokenizer_run, dit_run):
    out, _ = dit_run
    run("sample.py", "--out", out, "--num", 12, "--steps", 4, "--batch-size", 4)
    run("fid.py", "--out", out, "--steps", 5, "--batch-size", 8)
    for name in ("vae.pt", "dit.pt", "reconstructions.png", "samples.png", "samples.npz", "scores.json", "metrics_vae.csv", "metrics_dit.csv"):
        assert (out / name).exists(), name
    with np.load(out / "samples.npz") as batch:
        assert batch["arr_0"].shape == (12, 24, 24, 3) and batch["arr_0"].dtype == np.uint8
    scores = json.loads((out / "scores.json").read_text())
    assert "mini-FID" in json.dumps(scores)
    state = torch.load(out / "dit.pt", weights_only=True)
    assert state["classes"] == ["ant", "bee", "cat"] and state["image_size"] == 24
    rows = read_csv(out / "metrics_vae.csv")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert rows[3]["d"] == 0 and rows[4]["d"] > 0                              # --disc-start 4: batches 0 to 3 without it


def test_tokenizer_without_vf_loss_and_with_dinov2_from_a_filled_cache(photos, tmp_path):
    """The real torch.hub call of a user without a network: the repository at the pinned commit and random weights lie in TORCH_HOME."""
    hub = tmp_path / "torch" / "hub"
    repository = hub / f"facebookresearch_dinov2_{DINOV2_COMMIT}"
    repository.mkdir(parents=True)
    (repository / "hubconf.py").write_text(HUBCONF)
    (hub / "checkpoints").mkdir()
    torch.save({"patch_embed.weight": torch.randn(24, 3, 14, 14), "patch_embed.bias": torch.randn(24), "cls_token": torch.randn(1, 1, 24)},
               hub / "checkpoints" / "dinov2_vits14_pretrain.pth")
    env = {**ENV, "TORCH_HOME": str(tmp_path / "torch")}
    for vf, active in (("dinov2-s", True), ("none", False)):
        run("train_vae.py", "--data", photos, "--out", tmp_path / vf, "--steps", 2, *SMALL_VAE, "--vf", vf, env=env)
        assert all((row["mcos"] > 0 and row["w_vf"] > 0) == active for row in read_csv(tmp_path / vf / "metrics_vae.csv"))
        state = torch.load(tmp_path / vf / "vae.pt", weights_only=True)
        assert ("linear_proj" in state) == active and not any("foundation" in key for key in state)


# --- Resume: bit for bit ----------------------------------------------------------------------------------------------------------------------------
def test_train_vae_killed_and_resumed_across_a_stage_border(photos, tmp_path):
    # 81 training images (every tenth of 90 is a test image), batch 8: 0.6 epochs are 6 steps, then 5 with other margins, the discriminator from the start
    common = ("--data", photos, *SMALL_VAE, "--steps", 0, "--stages", "0.6:0.5:0:0:3,0.5:0.1:0.5:0.25:0")
    run("train_vae.py", "--out", tmp_path / "a", *common)
    kill_until_finished(("train_vae.py", "--out", tmp_path / "b", *common), tmp_path / "b" / "vae.pt", 2, seed=1)
    keys = ("state_dict", "linear_proj", "discriminator")
    assert_same_bits(weights(tmp_path / "a" / "vae.pt", *keys), weights(tmp_path / "b" / "vae.pt", *keys))
    a, b = (read_csv(tmp_path / d / "metrics_vae.csv") for d in "ab")
    assert [row["step"] for row in b] == list(range(1, 12)) and [row["stage"] for row in b] == [1] * 6 + [2] * 5
    assert [row["rec"] for row in a] == [row["rec"] for row in b]


def test_train_dit_killed_and_resumed_during_extraction_and_training(tokenizer_run, tmp_path):
    vae = tokenizer_run[0] / "vae.pt"
    common = ("--vae", vae, *SMALL_DIT, "--steps", 12, "--extract-batch", 1)
    run("train_dit.py", "--out", tmp_path / "a", "--latents", tmp_path / "la", *common)
    kill_until_finished(("train_dit.py", "--out", tmp_path / "b", "--latents", tmp_path / "lb", *common), tmp_path / "b" / "dit.pt", 2, seed=2)
    assert (tmp_path / "la" / "latents.npy").read_bytes() == (tmp_path / "lb" / "latents.npy").read_bytes()
    assert_same_bits(weights(tmp_path / "a" / "dit.pt", "model", "ema"), weights(tmp_path / "b" / "dit.pt", "model", "ema"))


def test_extraction_goes_on_where_it_was_killed(tokenizer_run, tmp_path):
    """Flags of finished chunks are believed, others are encoded again: spoil both and see."""
    common = ("--vae", tokenizer_run[0] / "vae.pt", *SMALL_DIT, "--steps", 1, "--extract-batch", 9)
    run("train_dit.py", "--out", tmp_path / "a", "--latents", tmp_path / "la", *common)
    whole = np.load(tmp_path / "la" / "latents.npy")
    meta = json.loads((tmp_path / "la" / "latents.json").read_text())
    (tmp_path / "lb").mkdir()
    half = whole.copy()
    half[9:] = 7                                                               # chunk 0 done, the rest rubbish
    half[0] = 5                                                                # a mark that must survive
    np.save(tmp_path / "lb" / "latents.npy", half)
    np.save(tmp_path / "lb" / "done.npy", np.array([1] + [0] * 8, np.uint8))
    np.save(tmp_path / "lb" / "labels.npy", np.load(tmp_path / "la" / "labels.npy"))
    key = {k: meta[k] for k in ("fingerprint", "data", "image_size", "seed", "n", "shape", "chunk")}
    (tmp_path / "lb" / "extracting.json").write_text(json.dumps(key))
    run("train_dit.py", "--out", tmp_path / "b", "--latents", tmp_path / "lb", *common)
    resumed = np.load(tmp_path / "lb" / "latents.npy")
    assert (resumed[0] == 5).all() and np.array_equal(resumed[1:], whole[1:])


def test_sigterm_saves_and_says_how_to_go_on(photos, tmp_path):
    command = ("train_vae.py", "--data", photos, "--out", tmp_path, "--steps", 400, *SMALL_VAE[:-6], "--log-every", 1, "--save-every", 1000, "--vf", "none")
    process = start(*command)
    while not (tmp_path / "metrics_vae.csv").exists() or len(read_csv(tmp_path / "metrics_vae.csv")) < 2:
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command goes on" in out, err
    assert 2 <= torch.load(tmp_path / "vae.pt", weights_only=True)["step"] < 400


def test_finished_run_says_so_and_fresh_starts_over(tokenizer_run, dit_run, photos):
    out, _ = tokenizer_run
    before = (out / "vae.pt").read_bytes()
    assert "is finished" in run("train_vae.py", "--data", photos, "--out", out, "--steps", 9, *SMALL_VAE)
    assert "is finished" in run("train_dit.py", "--out", out, "--steps", 8, *SMALL_DIT)
    assert before == (out / "vae.pt").read_bytes()
    assert "from step 0" in run("train_dit.py", "--out", out, "--steps", 8, *SMALL_DIT, "--fresh")


# --- Two processes equal one ------------------------------------------------------------------------------------------------------------------------
def test_two_processes_train_the_tokenizer_as_one(photos, tmp_path):
    """20 steps of preset mini, the discriminator in the last two. Not earlier: the kinks of its ReLUs turn a last bit into another course some steps later
    (measured: equal to 1e-6 for two steps, w_disc off by 6e-4 in the third). test_vae.py compares the discriminator's parts exactly."""
    common = ("--data", photos, *SMALL_VAE, "--steps", 20, "--disc-start", 18, "--batch-size", 16)
    run("train_vae.py", "--out", tmp_path / "1", *common)
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "teacher.pt").write_bytes((tmp_path / "1" / "teacher.pt").read_bytes())
    run("train_vae.py", "--out", tmp_path / "2", *common, launcher=TORCHRUN)
    one, two = (read_csv(tmp_path / n / "metrics_vae.csv") for n in "12")
    assert len(one) == len(two) == 20 and one[17]["d"] == 0 and one[18]["d"] > 0
    for a, b in zip(one, two):
        for term in ("rec", "kl", "mcos", "mdms", *(("d", "g") if a["step"] <= 19 else ())):
            assert a[term] == pytest.approx(b[term], rel=1e-4, abs=1e-5), (a["step"], term)
        for weight in ("w_vf", "w_disc")[:2 if a["step"] <= 19 else 1]:           # ratios of gradient norms, not losses
            assert a[weight] == pytest.approx(b[weight], rel=1e-2), (a["step"], weight)


def test_two_processes_train_lightningdit_as_one(tokenizer_run, tmp_path):
    common = ("--vae", tokenizer_run[0] / "vae.pt", *SMALL_DIT, "--steps", 20)
    run("train_dit.py", "--out", tmp_path / "1", "--latents", tmp_path / "l1", *common)
    run("train_dit.py", "--out", tmp_path / "2", "--latents", tmp_path / "l2", *common, launcher=TORCHRUN)
    assert (tmp_path / "l1" / "latents.npy").read_bytes() == (tmp_path / "l2" / "latents.npy").read_bytes()
    one, two = (read_csv(tmp_path / n / "metrics_dit.csv") for n in "12")
    assert len(one) == len(two) == 20
    for a, b in zip(one, two):
        assert all(a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6) for k in ("loss", "mse", "direction", "grad_norm")), a["step"]
    run("train_dit.py", "--out", tmp_path / "3", "--latents", tmp_path / "l1", *common, "--accumulate", 4, "--checkpointing")   # neither changes the result
    for a, b in zip(one, read_csv(tmp_path / "3" / "metrics_dit.csv")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), a["step"]


# --- Mistakes end in one line that names the way out --------------------------------------------------------------------------------------------------
def test_flag_mistakes(photos, tmp_path):
    assert "--btch-size" in run("train_vae.py", "--btch-size", 3, ok=False)
    assert "--lr" in run("train_vae.py", "--lr", "fast", ok=False)
    assert "--preset" in run("train_dit.py", "--preset", "tiny", ok=False)
    assert "greater than 0" in run("train_vae.py", "--batch-size", 0, ok=False)
    small = ("--data", photos, "--out", tmp_path)
    assert "not divisible by the downsampling rate" in run("train_vae.py", "--image-size", 30, "--vf", "none", *small, ok=False)
    assert "--disc-weight 0" in run("train_vae.py", "--image-size", 16, "--vf", "none", *small, ok=False)
    assert "exclude each other" in run("train_vae.py", "--stages", "1:0.1:0:0:0", *small, ok=False)
    assert "EPOCHS:W_HYPER" in run("train_vae.py", "--stages", "1:0.1", "--steps", 0, *small, ok=False)


def test_data_mistakes(photos, tmp_path):
    small = ("--out", tmp_path / "run", "--steps", 2, *SMALL_VAE)
    assert "nowhere" in run("train_vae.py", "--data", "nowhere", *small, ok=False)
    (tmp_path / "a" / "empty").mkdir(parents=True)
    (tmp_path / "a" / "full").mkdir()
    (photos / "ant" / "00.png").read_bytes()
    (tmp_path / "a" / "full" / "x.png").write_bytes((photos / "ant" / "00.png").read_bytes())
    assert "empty" in run("train_vae.py", "--data", tmp_path / "a", *small, ok=False)
    broken = tmp_path / "b" / "train" / "c"
    broken.mkdir(parents=True)
    (tmp_path / "b" / "val" / "c").mkdir(parents=True)
    for path in (broken / "good.png", tmp_path / "b" / "val" / "c" / "good.png"):
        path.write_bytes((photos / "ant" / "00.png").read_bytes())
    (broken / "half.png").write_bytes((photos / "ant" / "00.png").read_bytes()[:200])
    assert "half.png" in run("train_vae.py", "--data", tmp_path / "b", *small, ok=False)


def test_checkpoint_mistakes(tokenizer_run, dit_run, photos, tmp_path):
    out, _ = dit_run
    assert "python train_vae.py" in run("train_dit.py", "--out", tmp_path / "none", ok=False)
    assert "--vae" in run("train_dit.py", "--out", tmp_path / "none", ok=False)
    assert "python train_dit.py" in run("sample.py", "--out", tmp_path / "none", ok=False)
    assert "another kind" in run("train_dit.py", "--out", tmp_path / "x", "--vae", out / "dit.pt", ok=False)
    (tmp_path / "half.pt").write_bytes((out / "vae.pt").read_bytes()[:10_000])
    assert "half.pt" in run("train_dit.py", "--out", tmp_path / "x", "--vae", tmp_path / "half.pt", ok=False)
    line = run("train_vae.py", "--data", photos, "--out", out, "--steps", 9, *SMALL_VAE, "--lr", 0.5, "--kl-weight", 0.1, ok=False)
    assert "--lr 0.5" in line and "--kl-weight 0.1" in line and "--fresh" in line and "--batch-size" not in line
    # latents of another tokenizer are refused
    other = torch.load(out / "vae.pt", weights_only=True)
    other["state_dict"]["quant_conv.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    line = run("train_dit.py", "--out", tmp_path / "y", "--vae", tmp_path / "other.pt", "--latents", out / "latents", *SMALL_DIT, "--steps", 2, ok=False)
    assert "fingerprint" in line and "--latents" in line


def test_non_finite_loss_keeps_the_last_good_checkpoint(tokenizer_run, photos, tmp_path):
    line = run("train_vae.py", "--data", photos, "--out", tmp_path, "--steps", 40, *SMALL_VAE, "--lr", 1e30, "--save-every", 1, "--vf", "none", ok=False)
    assert "is not finite at step" in line
    line = run("train_dit.py", "--vae", tokenizer_run[0] / "vae.pt", "--out", tmp_path, "--latents", tmp_path / "l", *SMALL_DIT, "--steps", 60,
               "--lr", 1e25, ok=False)
    assert "is not finite at step" in line and "--qknorm" in line and "--grad-clip" in line
    if (tmp_path / "dit.pt").exists():
        assert all(torch.isfinite(v).all() for v in torch.load(tmp_path / "dit.pt", weights_only=True)["model"].values())


def test_help_states_meaning_and_default_of_every_flag():
    for script in ("train_vae.py", "train_dit.py", "sample.py", "fid.py"):
        text = " ".join(run(script, "--help").split())
        for flag in ("--preset", "--data", "--image-size", "--out", "--seed", "--steps", "--batch-size", "--device"):
            assert flag in text, (script, flag)
        assert text.count("(default:") >= text.count(" --") // 3
