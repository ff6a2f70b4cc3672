"""sample.py against torchdiffeq, scipy and plain formulas, and the script run on a tiny chain."""
import functools
import hashlib
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import solve_ivp

import sample
from dit import SIZES, LightningDiT
from sample import (
    PRESETS,
    Settings,
    dopri5,
    euler,
    guided_velocity,
    heun,
    shift_timesteps,
)
from train_vae import World, parse_settings, step_generator, write_checkpoint
from vae import SPECS, AutoencoderKL, UserError, fingerprint

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT.parent / "shared" / "facts" / "state_dicts.json"
ARCH = {"input_size": 8, "patch_size": 1, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 2,
        "num_classes": 6}
CLASSES = ["disc", "square", "triangle", "star", "ring", "cross"]


# --- integrators ------------------------------------------------------------------------------------
def field(x, t):
    """A smooth vector field that depends on x, t and the place."""
    return torch.cos(2 * x) * (1 + 2 * t) - x * t + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)


def start(n=5):
    noise = torch.randn(n, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return noise * 0.4 * torch.arange(1, n + 1).view(-1, 1, 1, 1)


def test_the_shift_moves_times_towards_noise_and_keeps_the_ends():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(shift_timesteps(t, 1.0), t)
    shifted = shift_timesteps(t, 0.3)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all()
    assert (shifted[1:-1] < t[1:-1]).all()
    assert shift_timesteps(0.5, 0.3) == pytest.approx(0.3 * 0.5 / (1 - 0.7 * 0.5))
    assert torch.allclose(shift_timesteps(shifted, 1 / 0.3), t)   # the inverse of shift s is shift 1 / s
    # what the settings say of 0.3: FLUX's formula with 3.3 in FLUX's time 1 - t, and where the points lie
    assert torch.allclose(1 - shift_timesteps(1 - t, 1 / 0.3), shifted)
    for shift, below in ((0.3, 192), (1.0, 125)):
        assert (sample.time_grid(Settings(timestep_shift=shift)) < 0.5).sum() == below


def test_euler_gives_the_known_answer_of_decay():
    def decay(x, t):
        calls.append(float(t))
        return -x
    calls = []
    x = euler(decay, torch.ones(3, 2, dtype=torch.float64), torch.linspace(0, 1, 250, dtype=torch.float64))
    assert len(calls) == 249 and calls[0] == 0 and calls[-1] < 1
    assert torch.allclose(x, torch.full_like(x, (1 - 1 / 249) ** 249), rtol=1e-12)


def test_heun_is_of_second_order():
    def error(n):
        ts = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        return abs(heun(lambda x, t: -x, torch.ones(1, dtype=torch.float64), ts).item() - np.exp(-1))
    assert error(20) / error(40) == pytest.approx(4, rel=0.05)
    ts = torch.linspace(0, 1, 2, dtype=torch.float64)
    x = heun(lambda x, t: 2 * t, torch.zeros(1, dtype=torch.float64), ts)
    assert x.item() == pytest.approx(1)   # exact for t^2


@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_integrators_equal_torchdiffeq(shift):
    odeint = pytest.importorskip("torchdiffeq").odeint
    ts = shift_timesteps(torch.linspace(0, 1, 50, dtype=torch.float64), shift)

    def oracle(**options):
        return odeint(lambda t, x: field(x, t), start(), ts, **options)[-1]
    assert (euler(field, start(), ts) - oracle(method="euler")).abs().max() < 1e-10
    exact = oracle(method="dopri5", rtol=1e-10, atol=1e-12)
    assert (dopri5(field, start(), ts, rtol=1e-8, atol=1e-8) - exact).abs().max() < 1e-5
    assert (dopri5(field, start(), ts) - exact).abs().max() < 1e-2   # at the paper's rtol 1e-3
    assert torch.equal(dopri5(field, start(), ts), dopri5(field, start(), ts[[0, -1]]))


def test_dopri5_is_scipys_rk45_on_the_batch():
    def counted(x, t):
        assert x.shape == start().shape and x.dtype == torch.float64
        calls.append(t)
        return field(x, t)

    def flat(t, x):
        return field(torch.from_numpy(x).view(start().shape), t).numpy().ravel()
    calls = []
    ours = dopri5(counted, start(), torch.tensor([0.0, 1.0]))
    theirs = solve_ivp(flat, (0, 1), start().numpy().ravel(), rtol=1e-3, atol=1e-6)
    assert np.abs(ours.numpy().ravel() - theirs.y[:, -1]).max() < 1e-10 and len(calls) == theirs.nfev
    assert dopri5(field, start().float(), torch.tensor([0.0, 1.0])).dtype == torch.float32


def test_dopri5_stops_on_nan_and_on_vanishing_steps():
    with pytest.raises(UserError, match="not finite"):
        dopri5(lambda x, t: x * np.nan if t > 0.5 else x, torch.ones(2, 3), torch.linspace(0, 1, 5))
    with pytest.raises(UserError, match="small enough"):
        dopri5(lambda x, t: x ** 2, 2 * torch.ones(1, dtype=torch.float64), torch.linspace(0, 1, 5))


# --- guidance ---------------------------------------------------------------------------------------
class Toy:
    """A network that remembers what it was asked: how many rows, how many of them for the null class."""
    num_classes = 6

    def __init__(self):
        self.asked = []

    def __call__(self, x, t, y):
        assert t.shape == y.shape == (len(x),)
        self.asked.append((len(x), (y == self.num_classes).sum().item()))
        return torch.sin(x) * (1 + y.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("t", [0.05, 0.125, torch.tensor(0.8, dtype=torch.float64)])
def test_guidance_is_the_plain_formula(t, channels):
    x, y, toy = torch.randn(4, 5, 2, 2), torch.tensor([0, 3, 5, 1]), Toy()
    v = guided_velocity(toy, x, t, y, 6.7, interval_start=0.125, channels=channels)
    times = torch.full((4,), float(t))
    expected, null = Toy()(x, times, y), Toy()(x, times, torch.full_like(y, 6))
    for c in range(5 if channels is None else channels):
        if t >= 0.125:
            expected[:, c] = null[:, c] + 6.7 * (expected[:, c] - null[:, c])
    assert torch.allclose(v, expected, atol=1e-5)
    assert toy.asked == [(8, 4) if t >= 0.125 else (4, 0)]   # one call; no null row outside the interval


def test_guidance_scale_one_costs_nothing_and_the_null_class_can_be_named():
    x, y, toy = torch.randn(2, 4, 2, 2), torch.tensor([1, 2]), Toy()
    assert torch.equal(guided_velocity(toy, x, 0.5, y, 1.0), Toy()(x, torch.full((2,), 0.5), y))
    assert toy.asked == [(2, 0)]

    def plain(x, t, y):   # no num_classes
        return x * y.view(-1, 1, 1, 1)
    v = guided_velocity(plain, x, 0.5, y, 2.0, null_class=9)
    assert torch.allclose(v, x * (9 + 2 * (y - 9)).view(-1, 1, 1, 1), atol=1e-5)


def toy_system(toy=None, listed=range(6)):
    return SimpleNamespace(model=toy, classes=CLASSES, listed=listed, device="cpu", shape=(4, 2, 2))


@pytest.mark.parametrize("preset, below", [("imagenet256", 68), ("official-800ep", 81)])
def test_evaluations_of_the_published_settings(preset, below):
    """249 evaluations; those near noise have no unconditional half: a sixth is saved at 800 epochs."""
    s, toy = Settings(**PRESETS[preset]), Toy()
    sample.integrate(toy_system(toy), s, torch.zeros(2, 4, 2, 2), torch.tensor([0, 1]), sample.time_grid(s))
    assert toy.asked == [(2, 0)] * below + [(4, 2)] * (249 - below)
    s, toy = Settings(**{**PRESETS[preset], "integrator": "heun", "cfg_scale": 1.0}), Toy()
    sample.integrate(toy_system(toy), s, torch.zeros(2, 4, 2, 2), torch.tensor([0, 1]), sample.time_grid(s))
    assert toy.asked == [(2, 0)] * 2 * 249


def test_presets_are_the_published_settings():
    """The defaults are the published system after 64 epochs."""
    for name, values in PRESETS.items():
        s = parse_settings(Settings, PRESETS, "", ["--preset", name])
        assert all(getattr(s, k) == v for k, v in values.items()) and s.precision == "fp32", name

    def drawn(name):
        s = Settings(**PRESETS[name])
        return (s.num, s.labels, s.integrator, s.sampling_steps, s.timestep_shift, s.cfg_scale,
                s.cfg_interval_start, s.cfg_channels)
    published = (50000, "random", "euler", 250, 0.3)
    for name in ("imagenet256", "table3-64ep-cfg", "official-64ep"):
        assert drawn(name) == (*published, 10.0, 0.10, 3)
    for name in ("table3-800ep-cfg", "official-800ep"):
        assert drawn(name) == (*published, 6.7, 0.125, 3)
    assert drawn("table3-64ep")[:6] == drawn("table3-800ep")[:6] == (*published, 1.0)
    assert drawn("table1")[:6] == (50000, "random", "dopri5", 250, 1.0, 1.0)
    assert drawn("table2")[0] == 10000 and drawn("table2")[5] == 1.0
    assert drawn("official-demo") == (8, "975,3,207,387,388,88,979,279", "euler", 250, 1.0, 9.0, 0.0, 3)


# --- sample i is a function of (seed, i) ------------------------------------------------------------
def test_a_sample_is_a_function_of_seed_and_index():
    s = Settings(labels="random", seed=3)
    noise, y = sample.draw(toy_system(), s, range(40))
    for indices in (range(7, 12), [33]):
        part, y_part = sample.draw(toy_system(), s, indices)
        assert torch.equal(part, noise[list(indices)]) and torch.equal(y_part, y[list(indices)])
    assert len(noise.flatten(1).unique(dim=0)) == 40 and set(y.tolist()) == set(range(6))
    for labels, listed, expected in (("balanced", range(6), [0, 1, 2, 3, 4, 5, 0, 1]),
                                     ("4,0,5", (4, 0, 5), [4, 0, 5, 4, 0, 5, 4, 0])):
        again, y = sample.draw(toy_system(listed=listed), Settings(labels=labels, seed=3), range(8))
        assert y.tolist() == expected and torch.equal(again, noise[:8])  # the labels do not change the noise
        system, s_ = toy_system(listed=listed), Settings(labels=labels)
        assert [sample.class_of(system, s_, i) for i in range(8)] == expected
    assert [sample.class_of(toy_system(), s, i) for i in range(40)] == sample.draw(
        toy_system(), s, range(40))[1].tolist()
    assert not torch.equal(sample.draw(toy_system(), Settings(seed=4), range(8))[0], noise[:8])
    many = sample.draw(toy_system(), s, range(3000))[1].bincount(minlength=6)
    assert (many - 500).abs().max() < 5 * (3000 * 5 / 36) ** 0.5   # 5 standard deviations


def test_lists_of_numbers_are_read_or_refused():
    assert sample.numbers("--sweep", "1,2.5", 1000) == [1.0, 2.5] and sample.numbers("--sweep", "", 9) == []
    assert sample.numbers("--labels", "3, 0", 5, int) == [3, 0]
    with pytest.raises(UserError, match="--sweep nan"):
        sample.numbers("--sweep", "nan", 5)
    for wrong in ("6", "1,-1", "cat", "1,,2", "1.5"):
        with pytest.raises(UserError, match="--labels .* from 0 to 5"):
            sample.numbers("--labels", wrong, 5, int)


# --- the script, on a tiny chain --------------------------------------------------------------------
def make_chain(folder, objective="flow", change=lambda vae, dit: None, **arch):
    """vae.pt and dit.pt of random networks, in the format of the training scripts."""
    torch.manual_seed(0)
    arch = {**ARCH, **arch}
    spec = SPECS["mini-f4d4"]
    vae, dit = AutoencoderKL(**spec), LightningDiT(**arch)
    for p in dit.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)   # adaLN-Zero would hide everything
    change(vae, dit)
    ended = {"step": 1, "total_steps": 1, "settings": {"ema": 0.001}, "classes": CLASSES}
    weights = vae.state_dict()
    write_checkpoint({"stage": "vae", **ended, "spec": spec, "model": weights}, folder / "vae.pt")
    write_checkpoint({
        "stage": "dit", **ended, "arch": arch, "data": "shapes", "image_size": 32, "objective": objective,
        "ema": dit.state_dict(), "model": LightningDiT(**arch).state_dict(),
        "latents": {"mean": torch.full((1, 4, 1, 1), 0.1), "std": torch.full((1, 4, 1, 1), 2.0),
                    "shape": [4, 8, 8]},
        "tokenizer": {"fingerprint": fingerprint(weights), "path": "runs/x/vae.pt"},
    }, folder / "dit.pt")
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return make_chain(tmp_path_factory.mktemp("chain"))


def flags_of(chain, out, *flags):
    paths = ("--dit", chain / "dit.pt", "--vae", chain / "vae.pt", "--out", out, "--device", "cpu")
    return [str(flag) for flag in (*paths, *flags)]


def command(chain, out, *flags):
    return [sys.executable, str(ROOT / "sample.py"), *flags_of(chain, out, *flags)]


JOB = ("--num", "200", "--batch-size", "16", "--sampling-steps", "20", "--timestep-shift", "0.5",
       "--cfg-scale", "3", "--cfg-interval-start", "0.3", "--cfg-channels", "3")


def run(*flags, world=None):
    """The script's work inside this process, which spares the seconds of importing torch."""
    settings = parse_settings(Settings, PRESETS, sample.__doc__, [str(flag) for flag in flags])
    settings.compile = settings.compile and "--compile" in flags
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        sample.main(settings, world or World("cpu"))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_chain(chain, out, *flags):
    run(*flags_of(chain, out, *flags))
    return np.load(Path(out) / "samples.npz")


def done(out):
    """The finished chunk files."""
    return sorted((out / "samples_parts").glob("images-*.npy"))


@pytest.fixture(scope="module")
def batch(chain):
    """One process, start to end."""
    run_chain(chain, chain / "one", *JOB)
    return chain / "one" / "samples.npz"


def test_npz_is_an_adm_batch(batch):
    with np.load(batch) as file:
        assert file["arr_0"].shape == (200, 32, 32, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_0"].std() > 5
        assert file["arr_1"].dtype == np.int64 and file["arr_1"].tolist() == [i % 6 for i in range(200)]
        meta = json.loads(str(file["meta"]))
    assert meta["cfg_scale"] == 3 and meta["cfg_channels"] == 3 and meta["integrator"] == "euler"
    assert meta["data"] == "shapes" and meta["model"] == "other/1"
    assert not (batch.parent / "samples_parts").exists()


def test_npz_equals_a_plain_loop(chain, batch):
    """Samples 5 and 130 from the checkpoints by the formulas alone: noise, shifted grid, two network
    calls, 3 channels, statistics, decoder."""
    state, tokenizer = (torch.load(chain / name, weights_only=True) for name in ("dit.pt", "vae.pt"))
    dit, vae = LightningDiT(**state["arch"]).eval(), AutoencoderKL(**tokenizer["spec"]).eval()
    dit.load_state_dict(state["ema"])
    vae.load_state_dict(tokenizer["model"])
    with np.load(batch) as file, torch.no_grad():
        for i in (5, 130):
            x = torch.randn(1, 4, 8, 8, generator=step_generator("cpu", 0, i))
            ts = [0.5 * k / 19 / (1 - 0.5 * k / 19) for k in range(20)]
            for t, t_next in pairwise(ts):
                v, null = (dit(x, torch.tensor([t]), torch.tensor([c])) for c in (i % 6, 6))
                if t >= 0.3:
                    v = torch.cat([null[:, :3] + 3 * (v[:, :3] - null[:, :3]), v[:, 3:]], dim=1)
                x = x + (t_next - t) * v
            image = vae.decode(x * 2.0 + 0.1)[0].clamp(-1, 1).add(1).mul(127.5).permute(1, 2, 0).numpy()
            assert np.abs(image - file["arr_0"][i]).max() < 1


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_same_bytes(chain, batch, monkeypatch, processes):
    """Each process in turn, the first one last, since it collects the chunks."""
    out, shares = chain / f"of-{processes}", []
    monkeypatch.setattr(sample.Stop, "agreed", lambda stop: False)
    monkeypatch.setattr(World, "barrier", lambda world: None)
    torch.set_num_threads(2)  # the number of threads may not matter, either
    for rank in reversed(range(processes)):
        shares.append(len(done(out)))
        world = World("cpu")
        world.rank, world.size = rank, processes
        run(*flags_of(chain, out, *JOB), world=world)
    torch.set_num_threads(1)
    assert shares == {2: [0, 6], 3: [0, 4, 8]}[processes]  # of 13 chunks
    assert (out / "samples.npz").read_bytes() == batch.read_bytes()


def test_a_killed_run_leaves_whole_chunks_and_resumes_to_the_same_bytes(chain, batch):
    out, whole = chain / "killed", np.load(batch)["arr_0"]
    for goal in (2, 6):
        process = multiprocessing.get_context("fork").Process(target=run_chain, args=(chain, out, *JOB))
        process.start()
        while process.is_alive() and len(done(out)) < goal:
            time.sleep(0.005)
        process.kill()
        process.join()
        # killed in the middle; what has its name is whole
        assert goal <= len(done(out)) < 13 and not (out / "samples.npz").exists()
        for path in done(out):
            k = int(path.stem.removeprefix("images-"))
            assert np.array_equal(np.load(path), whole[16 * k:16 * k + 16])
    kept = done(out)[0]
    written = kept.stat().st_mtime_ns
    with pytest.raises(UserError, match="begun with other settings: .*seed 0 .now 1.*remove the folder"):
        run_chain(chain, out, *JOB, "--seed", 1)
    assert kept.stat().st_mtime_ns == written
    run_chain(chain, out, *JOB)
    assert (out / "samples.npz").read_bytes() == batch.read_bytes()
    assert not (out / "samples_parts").exists()


def test_fresh_discards_samples_and_chunks_of_other_settings(chain, tmp_path):
    run_chain(chain, tmp_path, "--num", 4, "--sampling-steps", 3)
    with pytest.raises(UserError, match="other settings: num 4 .now 3.*--fresh"):
        run_chain(chain, tmp_path, "--num", 3, "--sampling-steps", 3)
    parts = tmp_path / "samples_parts"  # those of a run that was killed
    parts.mkdir()
    np.save(parts / "images-00000.npy", np.zeros((3, 32, 32, 3), np.uint8))
    (parts / "images.json").write_text('{"n": 3, "seed": 9}')
    images = run_chain(chain, tmp_path, "--num", 3, "--sampling-steps", 3, "--fresh")["arr_0"]
    assert len(images) == 3 and images.std() > 5 and not parts.exists()


def test_ctrl_c_stops_between_chunks(chain):
    out = chain / "stopped"
    job = command(chain, out, *JOB, "--sampling-steps", "200")
    process = subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not done(out):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130 and "the same command resumes" in error and "Traceback" not in error


def test_the_last_batch_is_padded_and_two_graphs_are_compiled(chain, batch, monkeypatch):
    """Every batch has the same size, so one graph with guidance and one without serve all of them and both
    blocks. Nobody sees what fills up the last batch."""
    sizes, graphs, sample_batch = [], [], sample.sample_batch

    def counted(system, s, indices, ts):
        sizes.append(len(indices))
        return sample_batch(system, s, indices, ts)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch.compiler.reset()
    monkeypatch.setattr(sample, "sample_batch", counted)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    images = run_chain(chain, chain / "padded", *JOB, "--num", 37, "--compile")["arr_0"]
    assert sizes == [16] * 3 and len(graphs) == 2
    assert np.array_equal(images, np.load(batch)["arr_0"][:37])
    assert len(run_chain(chain, chain / "eight", *JOB, "--num", 8)["arr_0"]) == 8 and sizes[3:] == [8]


def test_batch_size_changes_no_pixel_by_more_than_one(chain, batch, tmp_path):
    images = {size: run_chain(chain, tmp_path / str(size), *JOB, "--batch-size", size)["arr_0"].astype(int)
              for size in (7, 64)}
    assert np.abs(images[7] - images[64]).max() <= 1
    assert np.abs(images[7] - np.load(batch)["arr_0"]).max() <= 1


def test_integrators_agree_also_on_a_ddpm_model(tmp_path):
    images = {}
    for objective in ("flow", "ddpm"):
        (tmp_path / objective).mkdir()
        chain = make_chain(tmp_path / objective, objective)
        for name in ("euler", "heun", "dopri5"):
            job = ("--num", 6, "--sampling-steps", 200, "--integrator", name)
            images[name] = run_chain(chain, chain / name, *job)["arr_0"].astype(int)
        assert np.abs(images["heun"] - images["dopri5"]).mean() < 0.5
        assert np.abs(images["euler"] - images["dopri5"]).mean() < 3
        images[objective] = images["heun"]
    assert np.abs(images["flow"] - images["ddpm"]).mean() > 10   # the same weights, another velocity


def test_pictures_pngs_and_a_finished_run(chain, tmp_path, capsys):
    job = ("--num", 13, "--sampling-steps", 5)
    images = run_chain(chain, tmp_path, *job)["arr_0"]
    before = (tmp_path / "samples.npz").read_bytes()
    assert "disc square triangle star ring cross" in capsys.readouterr().out
    run_chain(chain, tmp_path, *job, "--png", "--sweep", "1,2.5,4", "--trajectory", "0,0.5,1")
    said = capsys.readouterr().out
    assert "is finished" in said and (tmp_path / "samples.npz").read_bytes() == before
    assert "t = 0.000 0.500 1.000" in said
    pictures = {}
    for name, rows, columns in (("samples", 6, 2), ("sweep", 3, 8), ("trajectory", 8, 3)):
        picture = pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert picture.shape == ((rows * 34 + 2) * 3, (columns * 34 + 2) * 3, 3), name

    def tile(name, row, column):   # pictures are enlarged three times
        return pictures[name][::3, ::3][2 + 34 * row:34 + 34 * row, 2 + 34 * column:34 + 34 * column]
    assert np.array_equal(tile("samples", 1, 1), images[7])   # row 1 is class 1: samples 1, 7
    assert np.abs(tile("trajectory", 4, 2).astype(int) - images[4]).max() <= 1
    assert np.abs(tile("trajectory", 4, 1).astype(int) - images[4]).mean() > 1
    assert np.abs(tile("sweep", 0, 5).astype(int) - images[5]).max() > 1   # guided by 1, not by 2
    folder = tmp_path / "samples"
    for i in (0, 12):
        assert np.array_equal(np.asarray(Image.open(folder / f"{i:06d}.png")), images[i])
    run_chain(chain, tmp_path, "--num", 5, "--sampling-steps", 3, "--png", "--fresh")
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(5)]


@pytest.mark.parametrize("flags, message", [
    (("--cfg-scale", 2), "cfg_scale 3.0 (now 2.0)"), (("--labels", "1,6"), "from 0 to 5"),
    (("--cfg-channels", 5), "4 channels"), (("--sampling-steps", 1), "--sampling-steps"),
    (("--sweep", "1,x"), "--sweep 1,x"), (("--trajectory", "nan"), "--trajectory nan"),
    (("--cfg-interval-start", 2.0), "--cfg-interval-start 2.0 makes no sense"),
    (("--num", 0), "--num 0 makes no sense"), (("--integrator", "rk4"), "--integrator"),
    (("--dit", "nowhere/dit.pt"), "run python train_dit.py first, or name one with --dit"),
    (("--vae", "nowhere/vae.pt"), "run python train_vae.py first")])
def test_mistakes_name_the_way_out(chain, batch, flags, message):
    before = batch.read_bytes()
    with pytest.raises(UserError) as error:
        run_chain(chain, batch.parent, *JOB, *flags)
    assert message in str(error.value) and "\n" not in str(error.value) and batch.read_bytes() == before


def spoil(part, value):
    def change(vae, dit):
        network = {"vae": vae.post_quant_conv, "dit": dit.x_embedder.proj}[part]
        torch.nn.init.constant_(network.weight, value)
    return change


@pytest.mark.parametrize("part", ["vae", "dit"])
@pytest.mark.parametrize("value", [float("nan"), 1e38])
@pytest.mark.parametrize("integrator", ["euler", "dopri5"])
def test_broken_weights_do_not_become_black_images(tmp_path, part, value, integrator):
    make_chain(tmp_path, change=spoil(part, value))
    with pytest.raises(UserError, match=f"{part}.pt|dopri5: the velocity"):
        run_chain(tmp_path, tmp_path, "--num", 3, "--sampling-steps", 3, "--integrator", integrator)
    assert not (tmp_path / "samples.npz").exists()


def test_without_a_null_class_there_is_no_guidance(tmp_path):
    make_chain(tmp_path, class_dropout_prob=0.0)
    job = ("--num", 3, "--sampling-steps", 3)
    for flags in (("--cfg-scale", 2), ("--cfg-scale", 1, "--sweep", "1,2")):
        with pytest.raises(UserError, match="no null class"):
            run_chain(tmp_path, tmp_path, *job, *flags)
    assert len(run_chain(tmp_path, tmp_path, *job, "--cfg-scale", 1)["arr_0"]) == 3


@pytest.mark.parametrize("name", ["vae.pt", "dit.pt"])
def test_unfinished_checkpoints_need_a_flag(tmp_path, name):
    make_chain(tmp_path)
    state, job = torch.load(tmp_path / name, weights_only=True), ("--num", 2, "--sampling-steps", 3)
    torch.save({**state, "total_steps": 5}, tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is unfinished .step 1 of 5.*--unfinished"):
        run_chain(tmp_path, tmp_path, *job)
    assert len(run_chain(tmp_path, tmp_path, *job, "--unfinished")["arr_0"]) == 2


def test_the_ema_of_a_short_run_is_warned_of_where_it_is_used(chain, tmp_path, capsys):
    job, warning = ("--num", 2, "--sampling-steps", 3, "--fresh"), "The EMA still holds 90% of the untrained"
    state = torch.load(chain / "dit.pt", weights_only=True)
    for step, decay, weights, warned in ((1, 0.9, "ema", True), (1, 0.9, "model", False),
                                         (3000, 0.998, "ema", False)):  # the last is preset mini
        torch.save(state | {"step": step, "settings": {"ema": decay}}, tmp_path / "dit.pt")
        run_chain(chain, tmp_path, *job, "--dit", tmp_path / "dit.pt", "--weights", weights)
        assert (warning in capsys.readouterr().out) == warned


def test_a_second_run_into_the_same_folder_is_refused(chain, tmp_path):
    (tmp_path / "samples_parts").mkdir()
    hold = ("import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print(1, flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "samples_parts" / ".lock"], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process"):
            run_chain(chain, tmp_path, *JOB)
        other.kill()
    # the lock dies with its process
    assert len(run_chain(chain, tmp_path, "--num", 2, "--sampling-steps", 3)["arr_0"]) == 2


def test_another_tokenizer_is_refused(chain, tmp_path):
    torch.manual_seed(1)
    state = torch.load(chain / "vae.pt", weights_only=True)
    write_checkpoint({**state, "model": AutoencoderKL(**state["spec"]).state_dict()}, tmp_path / "vae.pt")
    with pytest.raises(UserError, match="another tokenizer than .*vae.pt: name that one with --vae"):
        run_chain(chain, tmp_path, "--vae", tmp_path / "vae.pt")
    assert not (tmp_path / "samples.npz").exists()


# --- the released systems ---------------------------------------------------------------------------
FILES = {"vavae": "vavae-imagenet256-f16d32-dinov2.pt", "stats": "latents_stats.pt",
         "dit": "lightningdit-xl-imagenet256-800ep.pt"}


@pytest.fixture
def released(torch_home, monkeypatch):
    """The three files of the 800-epoch release under their names, with their keys, and random values.

    XL and VA-VAE would be 3 GB and hours of CPU, so both are narrowed where their sizes are looked up; all
    else is the real path. What sample.py asks of LightningDiT is recorded, for a comparison in full size.
    """
    def narrowed(**kwargs):
        asked.update(kwargs)
        return LightningDiT(**{**kwargs, **narrow})
    torch.manual_seed(0)
    asked, narrow = {}, {"hidden_size": 32, "depth": 1, "num_heads": 2}
    monkeypatch.setitem(SPECS, "f16d32", {**SPECS["f16d32"], "ch": 32, "num_res_blocks": 1})
    monkeypatch.setattr(sample, "LightningDiT", narrowed)
    dit, vae = LightningDiT(**narrow), AutoencoderKL(**SPECS["f16d32"])
    for p in dit.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    training = {"loss.logvar": torch.zeros(()), "foundation_model.model.cls_token": torch.zeros(1, 1, 4),
                "linear_proj.weight": torch.zeros(4, 32, 1, 1)}
    files = torch_home.checkpoints
    torch.save({"state_dict": {**vae.state_dict(), **training}}, files / FILES["vavae"])
    torch.save({"mean": torch.zeros(1, 32, 1, 1), "std": torch.ones(1, 32, 1, 1)}, files / FILES["stats"])
    torch.save({"ema": {f"module.{k}": v for k, v in dit.state_dict().items()}}, files / FILES["dit"])
    return SimpleNamespace(folder=files, asked=asked, attempts=torch_home.attempts)


def official(preset, out, *flags):
    run("--preset", preset, "--out", out, "--sampling-steps", 4, "--device", "cpu", *flags)
    with np.load(out / "samples.npz") as file:
        return file["arr_0"], file["arr_1"].tolist(), json.loads(str(file["meta"]))


def test_released_system_makes_the_eight_images(released, tmp_path, capsys):
    images, labels, meta = official("official-demo", tmp_path)
    digest = hashlib.sha256((released.folder / FILES["dit"]).read_bytes()).hexdigest()
    assert digest in capsys.readouterr().out
    assert images.shape == (8, 256, 256, 3) and labels == [975, 3, 207, 387, 388, 88, 979, 279]
    assert Image.open(tmp_path / "samples.png").size == (4 * 258 + 2, 2 * 258 + 2)   # two rows of four
    keys = ("preset", "cfg_scale", "cfg_interval_start", "cfg_channels", "timestep_shift", "model")
    assert [meta[k] for k in keys] == ["official-demo", 9.0, 0.0, 3, 1.0, "XL/1"]
    _, _, meta = official("official-800ep", tmp_path / "fid", "--num", 1)
    assert [meta[k] for k in ("cfg_scale", "cfg_interval_start", "timestep_shift")] == [6.7, 0.125, 0.3]
    assert not released.attempts   # files in the cache are not downloaded again
    with torch.device("meta"):
        full = LightningDiT(**released.asked)
    assert round(sum(p.numel() for p in full.parameters()) / 1e6, 2) == 675.26
    assert SIZES["XL"].items() <= released.asked.items()
    if LISTS.exists():
        shapes = {k: list(v.shape) for k, v in full.state_dict().items()}
        assert shapes == json.loads(LISTS.read_text())["LightningDiT-XL/1"]


def test_released_files_that_are_wrong_or_missing(released, tmp_path):
    weights = torch.load(released.folder / FILES["dit"], weights_only=True)
    weights["ema"].popitem()
    torch.save(weights, released.folder / FILES["dit"])
    with pytest.raises(UserError, match="does not fit"):
        official("official-800ep", tmp_path)
    for name in FILES.values():
        (released.folder / name).unlink()
        with pytest.raises(UserError, match="cannot download"):
            official("official-800ep", tmp_path)
        (released.folder / name).write_bytes(b"zero")   # so that the next file is asked for
    hub = "https://huggingface.co/hustvl"
    assert released.attempts == [f"{hub}/vavae-imagenet256-f16d32-dinov2/resolve/main/{FILES['vavae']}",
                                 f"{hub}/vavae-imagenet256-f16d32-dinov2/resolve/main/latents_stats.pt",
                                 f"{hub}/lightningdit-xl-imagenet256-800ep/resolve/main/{FILES['dit']}"]
    with pytest.raises(UserError, match="is no checkpoint, or is damaged"):
        official("official-800ep", tmp_path)
