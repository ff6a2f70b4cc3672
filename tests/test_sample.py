"""sample.py against torchdiffeq, scipy and plain formulas, and the script run on a tiny chain: processes, kills, pictures, released weights."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import solve_ivp

import sample
from dit import SIZES, LightningDiT
from sample import PRESETS, Settings, dopri5, draw, euler, guided_velocity, heun, integrate, parse_labels, shift_timesteps, time_grid
from train_vae import fingerprint, save_checkpoint, step_generator
from vae import SPECS, AutoencoderKL

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT.parent / "shared" / "facts" / "state_dicts.json"
ARCH = dict(input_size=8, patch_size=1, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=6)


# --- integrators -----------------------------------------------------------------------------------------------------------------------------
def field(x, t):
    """A smooth vector field that depends on x, t and the place; samples of different size make an adaptive solver take different steps."""
    return torch.cos(2 * x) * (1 + 2 * t) - x * t + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)


def start(n=5):
    return torch.randn(n, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.4 * torch.arange(1, n + 1).view(-1, 1, 1, 1)


def test_shift():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(shift_timesteps(t, 1.0), t)
    shifted = shift_timesteps(t, 0.3)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all() and (shifted[1:-1] < t[1:-1]).all()
    assert shift_timesteps(0.5, 0.3) == pytest.approx(0.3 * 0.5 / (1 - 0.7 * 0.5))
    assert torch.allclose(shift_timesteps(shifted, 1 / 0.3), t)                # the inverse of shift s is shift 1 / s


def test_euler_known_answer():
    calls = []
    x = euler(lambda x, t: calls.append(float(t)) or -x, torch.ones(3, 2, dtype=torch.float64), torch.linspace(0, 1, 250, dtype=torch.float64))
    assert len(calls) == 249 and calls[0] == 0 and calls[-1] < 1
    assert torch.allclose(x, torch.full_like(x, (1 - 1 / 249) ** 249), rtol=1e-12)


def test_heun_is_of_second_order():
    def error(n):
        return abs(heun(lambda x, t: -x, torch.ones(1, dtype=torch.float64), torch.linspace(0, 1, n + 1, dtype=torch.float64)).item() - np.exp(-1))
    assert error(20) / error(40) == pytest.approx(4, rel=0.05)
    t = torch.linspace(0, 1, 2, dtype=torch.float64)
    assert heun(lambda x, t: 2 * t, torch.zeros(1, dtype=torch.float64), t).item() == pytest.approx(1)      # exact for t^2


@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_integrators_equal_torchdiffeq(shift):
    odeint = pytest.importorskip("torchdiffeq").odeint
    ts = shift_timesteps(torch.linspace(0, 1, 50, dtype=torch.float64), shift)
    def oracle(**options):
        return odeint(lambda t, x: field(x, t), start(), ts, **options)[-1]
    assert (euler(field, start(), ts) - oracle(method="euler")).abs().max() < 1e-10
    exact = oracle(method="dopri5", rtol=1e-10, atol=1e-12)
    assert (dopri5(field, start(), ts, rtol=1e-8, atol=1e-8) - exact).abs().max() < 1e-5
    assert (dopri5(field, start(), ts) - exact).abs().max() < 1e-2                                          # at the paper's rtol 1e-3
    assert torch.equal(dopri5(field, start(), ts), dopri5(field, start(), ts[[0, -1]]))                     # a shift changes nothing


def test_dopri5_is_scipys_rk45_for_each_sample():
    calls, x = [], start()
    ours = dopri5(lambda x, t: calls.append(t.clone()) or field(x, t), x, torch.tensor([0.0, 1.0]))
    evaluations = []
    for own, x0 in zip(ours, x):
        flat = lambda t, y, x0=x0: field(torch.from_numpy(y).view(x0.shape), t).numpy().ravel()            # noqa: E731
        theirs = solve_ivp(flat, (0, 1), x0.numpy().ravel(), rtol=1e-3, atol=1e-6)
        evaluations.append(theirs.nfev)
        assert np.abs(own.numpy().ravel() - theirs.y[:, -1]).max() < 1e-10                                  # the same steps, not only the same limit
    assert len(set(evaluations)) > 1 and len(calls) == max(evaluations)                                     # the slowest sets the number of calls
    assert (dopri5(field, x[2:3], torch.tensor([0.0, 1.0])) - ours[2:3]).abs().max() < 1e-12                # a sample does not see its neighbours


def test_dopri5_stops_on_nan():
    with pytest.raises(SystemExit, match="not finite"):
        dopri5(lambda x, t: torch.where(t > 0.5, torch.nan, x), torch.ones(2, 3), torch.linspace(0, 1, 5))


# --- guidance --------------------------------------------------------------------------------------------------------------------------------
class Toy:
    """A network that remembers what it was asked."""
    num_classes = 6

    def __init__(self):
        self.asked = []

    def __call__(self, x, t, y):
        assert t.shape == y.shape == (len(x),)
        self.asked.append((len(x), (y == self.num_classes).sum().item()))
        return torch.sin(x) * (1 + y.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("t", [0.05, 0.125, 0.8, torch.tensor([0.05, 0.125, 0.8, 0.1])])
def test_guidance_is_the_plain_formula(t, channels):
    x, y, toy = torch.randn(4, 5, 2, 2), torch.tensor([0, 3, 5, 1]), Toy()
    v = guided_velocity(toy, x, t, y, 6.7, interval_start=0.125, channels=channels)
    times = torch.as_tensor(t).expand(4).float()
    expected = Toy()(x, times, y)
    null = Toy()(x, times, torch.full_like(y, 6))
    for b in range(4):
        for c in range(5 if channels is None else channels):
            if times[b] >= 0.125:
                expected[b, c] = null[b, c] + 6.7 * (expected[b, c] - null[b, c])
    assert torch.allclose(v, expected, atol=1e-5)
    guided = int((times >= 0.125).sum())
    assert toy.asked == [(4 + guided, guided)]                                 # one call; no unconditional row outside the interval


def test_guidance_scale_one_costs_nothing_and_the_null_class_can_be_named():
    x, y, toy = torch.randn(2, 4, 2, 2), torch.tensor([1, 2]), Toy()
    assert torch.equal(guided_velocity(toy, x, 0.5, y, 1.0), Toy()(x, torch.full((2,), 0.5), y)) and toy.asked == [(2, 0)]
    plain = lambda x, t, y: x * y.view(-1, 1, 1, 1)                            # noqa: E731      no num_classes
    assert torch.allclose(guided_velocity(plain, x, 0.5, y, 2.0, null_class=9), x * (9 + 2 * (y - 9)).view(-1, 1, 1, 1), atol=1e-5)


def toy_system(toy, **settings):
    s = Settings(**{**PRESETS["official-800ep"], **settings})
    system = SimpleNamespace(model=toy, num_classes=6, bf16=False, device=torch.device("cpu"), shape=[4, 2, 2])
    return system, s


def test_evaluations_of_the_published_setting():
    """249 evaluations, of which the 81 with t < 0.125 have no unconditional half: a sixth is saved [Sec. 5.4]."""
    toy = Toy()
    system, s = toy_system(toy)
    x, evaluations = integrate(system, s, torch.zeros(2, 4, 2, 2), torch.tensor([0, 1]), time_grid(s))
    t = np.linspace(0, 1, 250)
    below = int((0.3 * t / (1 - 0.7 * t) < 0.125).sum())
    assert below == 81 and evaluations == [2 * 249, 2 * (249 - below)] and len(toy.asked) == 249
    assert 1 - sum(evaluations) / (2 * evaluations[0]) == pytest.approx(1 / 6, abs=0.005)
    for integrator, calls in (("heun", 2 * 249), ("euler", 249)):
        assert integrate(*toy_system(Toy(), integrator=integrator), x, torch.tensor([0, 1]), time_grid(s))[1][0] == 2 * calls


# --- sample i is a function of (seed, i) -------------------------------------------------------------------------------------------------------
def test_draw():
    system, s = toy_system(None, labels="random", seed=3)
    noise, y = draw(system, s, range(40))
    for indices in (range(7, 12), [33]):
        part, y_part = draw(system, s, indices)
        assert torch.equal(part, noise[list(indices)]) and torch.equal(y_part, y[list(indices)])
    assert len(noise.flatten(1).unique(dim=0)) == 40 and set(y.tolist()) == set(range(6))
    for labels, expected in (("balanced", [0, 1, 2, 3, 4, 5, 0, 1]), ("4,0,5", [4, 0, 5, 4, 0, 5, 4, 0])):
        again, y = draw(system, Settings(labels=labels, seed=3), range(8))
        assert y.tolist() == expected and torch.equal(again, noise[:8])        # the labels do not change the noise
    assert not torch.equal(draw(system, Settings(seed=4), range(8))[0], noise[:8])
    many = draw(system, s, range(3000))[1].bincount(minlength=6)
    assert (many - 500).abs().max() < 5 * (3000 * 5 / 36) ** 0.5               # 5 standard deviations
    for wrong in ("6", "1,-1", "cat", "1,,2"):
        with pytest.raises(SystemExit, match="from 0 to 5"):
            parse_labels(wrong, 6)


# --- the script, on a tiny chain ---------------------------------------------------------------------------------------------------------------
def make_chain(folder, objective="flow"):
    """vae.pt and dit.pt of random networks, in the format of the training scripts."""
    torch.manual_seed(0)
    spec, classes = SPECS["mini-f4d4"], ["disc", "square", "triangle", "star", "ring", "cross"]
    vae, dit = AutoencoderKL(**spec), LightningDiT(**ARCH)
    for name, p in dit.named_parameters():
        torch.nn.init.normal_(p, std=0.1) if p.requires_grad else None         # adaLN-Zero starts with velocity 0, which would hide everything
    save_checkpoint(dict(stage="vae", step=1, settings={}, spec=spec, state_dict=vae.state_dict(), classes=classes, num_classes=6), folder / "vae.pt")
    save_checkpoint(dict(stage="dit", step=1, settings={}, arch=ARCH, model=dit.state_dict(), ema=dit.state_dict(), classes=classes, num_classes=6,
                         data="shapes", image_size=32, objective=objective,
                         latents=dict(mean=torch.full((1, 4, 1, 1), 0.1), std=torch.full((1, 4, 1, 1), 2.0), norm="channel", shape=[4, 8, 8]),
                         tokenizer=dict(fingerprint=fingerprint(vae.state_dict()), spec=spec, path="runs/x/vae.pt")), folder / "dit.pt")
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return make_chain(tmp_path_factory.mktemp("chain"))


def command(chain, out, *flags, processes=1):
    program = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--"]
    return [*program, str(ROOT / "sample.py"), "--dit", str(chain / "dit.pt"), "--vae", str(chain / "vae.pt"), "--out", str(out), "--device", "cpu",
            *flags]


JOB = ("--num", "200", "--batch-size", "16", "--steps", "20", "--shift", "0.5",
       "--cfg-scale", "3", "--cfg-interval-start", "0.3", "--cfg-channels", "3")


def run(monkeypatch, *flags):
    """The script inside this process, which spares the seconds of importing torch."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        sample.run_script(Settings, PRESETS, sample.__doc__, sample.main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_chain(monkeypatch, chain, out, *flags):
    run(monkeypatch, *command(chain, out, *flags)[2:])
    return np.load(Path(out) / "samples.npz")


@pytest.fixture(scope="module")
def batch(chain):
    """One process, start to end."""
    with pytest.MonkeyPatch.context() as patch:
        run_chain(patch, chain, chain / "one", *JOB)
    return chain / "one" / "samples.npz"


def test_npz_is_an_adm_batch(batch):
    with np.load(batch) as file:
        assert file["arr_0"].shape == (200, 32, 32, 3) and file["arr_0"].dtype == np.uint8 and file["arr_0"].std() > 5
        assert file["arr_1"].dtype == np.int64 and file["arr_1"].tolist() == [i % 6 for i in range(200)]
        meta = json.loads(str(file["meta"]))
    below = int((0.5 * np.linspace(0, 1, 20)[:-1] / (1 - 0.5 * np.linspace(0, 1, 20)[:-1]) < 0.3).sum())
    assert meta["conditional_evaluations"] == 19 and meta["unconditional_evaluations"] == 19 - below
    assert meta["guidance"] == 3 and meta["cfg_channels"] == 3 and meta["integrator"] == "euler" and meta["data"] == "shapes"
    assert not (batch.parent / "samples_parts").exists() and Image.open(batch.parent / "samples.png").size[1] == 6 * 66


def test_npz_equals_a_plain_loop(chain, batch):
    """Samples 5 and 130 from the checkpoints by the formulas alone: noise, shifted grid, two network calls, 3 channels, statistics, decoder."""
    run, tokenizer = (torch.load(chain / name, weights_only=True) for name in ("dit.pt", "vae.pt"))
    dit, vae = LightningDiT(**run["arch"]).eval(), AutoencoderKL(**tokenizer["spec"]).eval()
    dit.load_state_dict(run["ema"])
    vae.load_state_dict(tokenizer["state_dict"])
    with np.load(batch) as file, torch.no_grad():
        for i in (5, 130):
            x = torch.randn(1, 4, 8, 8, generator=step_generator("cpu", 0, i))
            ts = [0.5 * k / 19 / (1 - 0.5 * k / 19) for k in range(20)]
            for t, t_next in zip(ts, ts[1:]):
                v, null = (dit(x, torch.tensor([t]), torch.tensor([c])) for c in (i % 6, 6))
                if t >= 0.3:
                    v = torch.cat([null[:, :3] + 3 * (v[:, :3] - null[:, :3]), v[:, 3:]], dim=1)
                x = x + (t_next - t) * v
            image = vae.decode(x * 2.0 + 0.1)[0].clamp(-1, 1).add(1).mul(127.5).permute(1, 2, 0).numpy()
            assert np.abs(image - file["arr_0"][i]).max() < 1


def test_two_processes_write_the_same_bytes(chain, batch):
    threads = {**os.environ, "OMP_NUM_THREADS": "2"}                            # torchrun's default is 1; neither may matter
    done = subprocess.run(command(chain, chain / "two", *JOB, processes=2), capture_output=True, text=True, env=threads)
    assert done.returncode == 0, done.stderr
    assert (chain / "two" / "samples.npz").read_bytes() == batch.read_bytes()


def test_killed_twice_writes_the_same_bytes(chain, batch, monkeypatch):
    out, counts = chain / "killed", []
    for goal in (2, 6):
        process = subprocess.Popen(command(chain, out, *JOB), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("samples_parts/*.npz"))) < goal:
            time.sleep(0.005)
        process.kill()
        process.wait()
        counts.append(len(list(out.glob("samples_parts/*.npz"))))
    assert 2 <= counts[0] < counts[1] < 13 and not (out / "samples.npz").exists()      # killed in the middle, and the second run went on
    oldest = min(p.stat().st_mtime_ns for p in out.glob("samples_parts/*.npz"))
    run_chain(monkeypatch, chain, out, *JOB)
    assert (out / "samples.npz").read_bytes() == batch.read_bytes() and (out / "samples.npz").stat().st_mtime_ns > oldest


def test_ctrl_c_stops_between_units(chain):
    out = chain / "stopped"
    process = subprocess.Popen(command(chain, out, *JOB, "--steps", "200"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(out.glob("samples_parts/*.npz")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 1 and "the same command goes on" in error and "Traceback" not in error


def test_batch_size_changes_no_pixel_by_more_than_one(chain, batch, monkeypatch, tmp_path):
    images = {7: None, 64: None}
    for size in images:
        images[size] = run_chain(monkeypatch, chain, tmp_path / str(size), *JOB, "--batch-size", size)["arr_0"].astype(int)
    assert np.abs(images[7] - images[64]).max() <= 1
    assert np.abs(images[7] - np.load(batch)["arr_0"]).max() <= 1


def test_dopri5_batch_size(chain, monkeypatch, tmp_path):
    flags = ("--num", 24, "--integrator", "dopri5", "--cfg-interval-start", 0.2)
    a, b = (run_chain(monkeypatch, chain, tmp_path / str(n), *flags, "--batch-size", n)["arr_0"].astype(int) for n in (7, 24))
    assert np.abs(a - b).max() <= 1


def test_integrators_agree_also_on_a_ddpm_model(tmp_path, monkeypatch):
    for objective in ("flow", "ddpm"):
        chain = make_chain(tmp_path / objective, objective)
        images = [run_chain(monkeypatch, chain, chain / name, "--num", 6, "--steps", 200, "--integrator", name)["arr_0"].astype(int)
                  for name in ("euler", "heun", "dopri5")]
        assert np.abs(images[1] - images[2]).mean() < 0.5 and np.abs(images[0] - images[2]).mean() < 3


def test_pictures_pngs_and_a_finished_run(chain, monkeypatch, tmp_path, capsys):
    job = ("--num", 13, "--steps", 5)
    images = run_chain(monkeypatch, chain, tmp_path, *job)["arr_0"]
    before = (tmp_path / "samples.npz").read_bytes()
    capsys.readouterr()
    run_chain(monkeypatch, chain, tmp_path, *job, "--png", "--sweep", "1,2.5,4", "--trajectory", "0,0.5,1", "--interpolate", 5)
    assert "is finished" in capsys.readouterr().out and (tmp_path / "samples.npz").read_bytes() == before
    for i in (0, 12):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / f"{i:06d}.png")), images[i])
    for name, rows, columns in (("samples", 6, 3), ("sweep", 3, 8), ("trajectory", 8, 3), ("interpolation", 4, 5)):
        width, height = Image.open(tmp_path / f"{name}.png").size
        assert height == rows * 66 and columns * 66 < width < columns * 66 + 100, name
    margin = Image.open(tmp_path / "samples.png").size[0] - 3 * 66
    tile = np.asarray(Image.open(tmp_path / "samples.png"))[66:66 + 64:2, margin + 66:margin + 66 + 64:2]   # row 1, column 1: class 1
    assert np.array_equal(tile, images[7])


@pytest.mark.parametrize("flags, message", [
    (("--cfg-scale", "2"), "cfg_scale 3.0 (now 2.0)"), (("--labels", "1,6"), "from 0 to 5"), (("--data", "cifar10"), "the checkpoint is for shapes"),
    (("--image-size", "64"), "the checkpoint is for 32"), (("--cfg-channels", "5"), "4 channels"), (("--steps", "1"), "at least 2"),
    (("--sweep", "1,x"), "--sweep 1,x"), (("--interpolate", "1"), "at least 2"), (("--shift", "0"), "--shift"),
    (("--cfg-interval-start", "2"), "[0, 1]"),
    (("--dit", "nowhere/dit.pt"), "run python train_dit.py first, or name one with --dit"),
    (("--vae", "nowhere/vae.pt"), "run python train_vae.py first"),
    (("--integrator", "rk4"), "--integrator"), (("--num", "0"), "--num")])
def test_mistakes_end_in_one_line(chain, batch, monkeypatch, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_chain(monkeypatch, chain, batch.parent, *JOB, *flags)
    said = str(stop.value) + capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_another_tokenizer_is_refused_and_fresh_starts_over(chain, monkeypatch, tmp_path):
    (tmp_path / "other").mkdir()
    torch.manual_seed(1)
    state = torch.load(chain / "vae.pt", weights_only=True)
    save_checkpoint({**state, "state_dict": AutoencoderKL(**state["spec"]).state_dict()}, tmp_path / "other" / "vae.pt")
    with pytest.raises(SystemExit, match="another tokenizer"):
        run_chain(monkeypatch, chain, tmp_path, "--vae", tmp_path / "other" / "vae.pt")
    run_chain(monkeypatch, chain, tmp_path, "--num", 4, "--steps", 3)
    with pytest.raises(SystemExit, match="other settings: num 4"):
        run_chain(monkeypatch, chain, tmp_path, "--num", 3, "--steps", 3)
    assert len(run_chain(monkeypatch, chain, tmp_path, "--num", 3, "--steps", 3, "--fresh")["arr_0"]) == 3
    (tmp_path / "samples.npz").write_bytes(b"PK not a zip")
    with pytest.raises(SystemExit, match="not a batch of this script"):
        run_chain(monkeypatch, chain, tmp_path, "--num", 3, "--steps", 3)


# --- the released systems -----------------------------------------------------------------------------------------------------------------------
FILES = {"vavae": "vavae-imagenet256-f16d32-dinov2.pt", "stats": "latents_stats.pt", "dit": "lightningdit-xl-imagenet256-800ep.pt"}


@pytest.fixture
def released(torch_home, monkeypatch):
    """The three files of the 800-epoch release under their names, with their keys, and random values.

    XL and VA-VAE would be 3 GB and hours of CPU, so both are narrowed where their sizes are looked up; all else is the real path. What
    load_official asks of LightningDiT is recorded, for a comparison with the released names and shapes in full size.
    """
    torch.manual_seed(0)
    asked, narrow = {}, dict(hidden_size=32, depth=1, num_heads=2)
    monkeypatch.setitem(SPECS, "f16d32", {**SPECS["f16d32"], "ch": 32, "num_res_blocks": 1})
    monkeypatch.setattr(sample, "LightningDiT", lambda **kwargs: asked.update(kwargs) or LightningDiT(**{**kwargs, **narrow}))
    dit, vae = LightningDiT(**narrow), AutoencoderKL(**SPECS["f16d32"])
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.requires_grad else None
    training = {"loss.logvar": torch.zeros(()), "foundation_model.model.cls_token": torch.zeros(1, 1, 4),
                "linear_proj.weight": torch.zeros(4, 32, 1, 1)}
    files = torch_home.checkpoints
    torch.save({"state_dict": {**vae.state_dict(), **training}}, files / FILES["vavae"])
    torch.save({"mean": torch.zeros(1, 32, 1, 1), "std": torch.ones(1, 32, 1, 1)}, files / FILES["stats"])
    torch.save({"ema": {f"module.{k}": v for k, v in dit.state_dict().items()}}, files / FILES["dit"])
    return SimpleNamespace(folder=files, asked=asked, attempts=torch_home.attempts)


def official(monkeypatch, out, *flags):
    run(monkeypatch, "--preset", "official-800ep", "--out", out, "--steps", 4, "--device", "cpu", *flags)


def test_released_system_makes_the_eight_images(released, monkeypatch, tmp_path, capsys):
    digest = hashlib.sha256((released.folder / FILES["dit"]).read_bytes()).hexdigest()
    official(monkeypatch, tmp_path, "--sha256", f"{FILES['dit']}={digest}")
    said = capsys.readouterr().out
    assert digest in said and said.count("not pinned") == 2
    with np.load(tmp_path / "samples.npz") as file:
        meta = json.loads(str(file["meta"]))
        assert file["arr_0"].shape == (8, 256, 256, 3) and file["arr_1"].tolist() == [975, 3, 207, 387, 388, 88, 979, 279]
    assert Image.open(tmp_path / "samples.png").size[1] == 2 * 258             # two rows of four
    settings = [meta[k] for k in ("preset", "guidance", "cfg_interval_start", "cfg_channels", "shift")]
    assert settings == ["official-800ep", 6.7, 0.125, 3, 0.3]
    assert not released.attempts                                               # files in the cache are not downloaded again
    with torch.device("meta"):
        full = LightningDiT(**released.asked)
    assert round(sum(p.numel() for p in full.parameters()) / 1e6, 2) == 675.26
    if LISTS.exists():
        assert {k: list(v.shape) for k, v in full.state_dict().items()} == json.loads(LISTS.read_text())["LightningDiT-XL/1"]


def test_released_files_that_are_wrong_or_missing(released, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="expected 0123456789"):
        official(monkeypatch, tmp_path, "--sha256", f"{FILES['dit']}=0123456789")
    with pytest.raises(SystemExit, match="give 'file=hash,...'"):
        official(monkeypatch, tmp_path, "--sha256", "dit.pt=0123456789")
    weights = torch.load(released.folder / FILES["dit"], weights_only=True)
    weights["ema"].popitem()
    torch.save(weights, released.folder / FILES["dit"])
    with pytest.raises(SystemExit, match="does not fit"):
        official(monkeypatch, tmp_path)
    for name in FILES.values():
        (released.folder / name).unlink()
        with pytest.raises(SystemExit, match="cannot download"):
            official(monkeypatch, tmp_path)
        (released.folder / name).write_bytes(b"zero")                         # so that the next file is asked for
    hub = "https://huggingface.co/hustvl"
    assert released.attempts == [f"{hub}/vavae-imagenet256-f16d32-dinov2/resolve/main/{FILES['vavae']}",
                                 f"{hub}/vavae-imagenet256-f16d32-dinov2/resolve/main/latents_stats.pt",
                                 f"{hub}/lightningdit-xl-imagenet256-800ep/resolve/main/{FILES['dit']}"]
    with pytest.raises(SystemExit, match="cannot be read"):
        official(monkeypatch, tmp_path)


def test_bench_prints_rates(monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "mini", dict(hidden_size=32, depth=1, num_heads=2))
    monkeypatch.setattr(sample, "AutoencoderKL", lambda: AutoencoderKL(**{**SPECS["f16d32"], "ch": 32, "num_res_blocks": 1}))
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: model)
    run(monkeypatch, "--bench", "mini/1", "--steps", 9, "--batch-size", 1, "--cfg-interval-start", 0.5, "--cfg-scale", 2, "--device", "cpu")
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4 and "16 evaluations" in lines[0] and "12 evaluations" in lines[1] and all("images/s" in line for line in lines)
