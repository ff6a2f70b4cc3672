"""The paper's claims in miniature, on two CPU cores. The design first, then running, then the report.

    python tests/claims.py --row d64-none --row d64-vf    VF loss at the widest latent [Table 2], seed 0
    python tests/claims.py --data shapes --data DIR       the whole study, seeds 0, 1, 2
    python tests/claims.py --report                       tables and pictures of what is there
    python tests/claims.py --table RUN ...                any runs, the paper's numbers beside theirs

A row is a tokenizer, a LightningDiT on its latents, samples and scores. The scripts make all of it by their
own command lines, which are printed. A study that was stopped goes on with the same command. What came out,
and what it cannot show: tests/CLAIMS.md. This is no pytest file; tests/test_claims.py tests it.
"""
import argparse
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# --- The design ---------------------------------------------------------------------------------------
# What each claim compares: groups of rows, each on the seeds that all its rows have.
LADDER_ROWS = ("ladder-0", "ladder-1", "ladder-2", "ladder-3", "ladder-4", "ladder-5", "ladder-6", "ladder-7",
               "d4-none", "ladder-9")
CLAIMS = {
    "C1: wider latents reconstruct better and generate worse. C2: VF loss mends that [Table 2]":
        (("d4-none", "d4-vf"), ("d16-none", "d16-vf"), ("d64-none", "d64-vf")),
    "C2, control: a teacher that has learned from other images":
        (("d64-none", "d64-vf", "d64-other"),),
    # C3 compares the curves of these two [Fig. 4a, b].
    "C4: it saves parameters of LightningDiT, and scales better [Fig. 4c]":
        (("d64-none+mini-XS", "d64-vf+mini-XS", "d64-none", "d64-vf", "d64-none+mini", "d64-vf+mini"),),
    "C5: both losses and the margins help [Table 5]":
        (("d64-none", "d64-only-mdms", "d64-only-mcos", "d64-vf", "d64-margins"),),
    # C6 [Table 6]: the columns density cv, Gini and entropy of the tables above.
    "C7: each trick of Table 1 helps": (LADDER_ROWS,),
}
CURVES = ("d64-none", "d64-vf")

# Shared by all rows of a data set: 16x16 images, one stand-in teacher (as there is one DINOv2) and one score
# network of another architecture and seed. --seed changes weights, order, noise and samples, not these.
SAMPLES = 1500
SCORE_NET_STEPS = 400
# f = 2: latents of 8x8 positions. L1 + KL: 16 pixels are too few for a discriminator, LPIPS is a download.
TOKENIZER = ("--image-size 16 --disc-weight 0 --batch-size 16 --lr 1e-3 --warmup 100 --steps 800 "
             "--teacher-steps 300 --save-every 400 --no-compile")
VF = "--vf mini --vf-weight {weight} --cos-margin 0 --mdms-margin 0"
# Of two equal flags the last one counts. One loss alone has half the weight, as in Table 5.
TOKENIZERS = {
    "d64-none": "--spec mini-f2d64 --vf none",
    "d64-vf": f"--spec mini-f2d64 {VF}",
    "d4-none": "--spec mini-f2d4 --vf none",
    "d4-vf": f"--spec mini-f2d4 {VF}",
    "d16-none": "--spec mini-f2d16 --vf none",
    "d16-vf": f"--spec mini-f2d16 {VF}",
    "d64-other": f"--spec mini-f2d64 {VF}",
    "d64-margins": f"--spec mini-f2d64 {VF} --cos-margin 0.5 --mdms-margin 0.25",
    "d64-only-mcos": f"--spec mini-f2d64 {VF} --no-mdms --vf-weight {{half}}",
    "d64-only-mdms": f"--spec mini-f2d64 {VF} --no-mcos --vf-weight {{half}}",
    "f4d16-vf": f"--spec mini-f4d16 {VF}",
}
# One LightningDiT for all latents: tokens of 2x2 positions, as many steps; sampled without guidance.
CONDUCT = "--sample-every 0 --no-compile"
TRAINING = "--batch-size 64 --lr 1e-3 --ema 0.995 --epochs 8"
DIT = f"--patch-size 2 {TRAINING} --steps {{steps}} --save-every {{every}} {CONDUCT}"
# A row: its tokenizer, flags of train_dit.py. A tokenizer's own row has its name. The study goes through
# them in this order, tokenizers' own rows first, so what matters most is there if it is stopped.
ROWS = {name: (name, DIT) for name in TOKENIZERS if name != "f4d16-vf"}
for size in ("mini-XS", "mini"):
    for vf in ("none", "vf"):
        ROWS[f"d64-{vf}+{size}"] = (f"d64-{vf}", f"{DIT} --size {size}")
# Rows 0 and 1 of Table 1 have a quarter of the batch, so four times the steps: as many images. Row 8 is
# d4-none. Row 9 goes from f8d4 in tokens of 2x2 to f16d32 in tokens of 1x1; here from f2d4 to f4d16.
for i in (0, 1, 2, 3, 4, 5, 6, 7, 9):
    few = "--batch-size 16 --lr 5e-4 --steps {ladder_steps}" if i < 2 else "--steps {steps}"
    flags = f"--preset mini-table1-{i} {TRAINING} {few} --save-every 1000 {CONDUCT}"
    ROWS[f"ladder-{i}"] = ("f4d16-vf" if i == 9 else "d4-none", flags)


def design(data):
    """Data set, by path or name -> {name in the flags above: value}, the same for all its rows.

    Photos need fewer steps: their mini-gFID has come most of its way after 300, that of the shapes halves
    after 750. At weight 0.5 the shapes' wide tokenizer loses 2 dB (tests/CLAIMS.md, What was tried first).
    """
    steps, weight = 750, 0.5
    if Path(data).name == "shapes":
        steps, weight = 1250, 0.25
    return {"steps": steps, "ladder_steps": 4 * steps, "every": steps // 5,
            "weight": weight, "half": weight / 2}


# --- Running ------------------------------------------------------------------------------------------
def run(script, *flags):
    """`python SCRIPT FLAGS`, in this process: to load torch for each of them would cost a minute a row."""
    flags = [str(flag) for flag in flags]
    print("+ python", shlex.join([script, *flags]), flush=True)
    before, sys.argv = sys.argv, [script, *flags]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = before
        # A training has taken these two; what follows it in a row may be stopped at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def folder(out, data, row, seed):
    """OUT/DATA/ROW/seedN."""
    return Path(out) / Path(data).name / row / f"seed{seed}"


def tokenizer_flags(data, tokenizer, other):
    """Flags of train_vae.py but for seed and folder. other: what d64-other's teacher learns from."""
    flags = ["--data", data, *TOKENIZER.split(), *TOKENIZERS[tokenizer].format(**design(data)).split()]
    return [*flags, "--teacher-data", other] if tokenizer == "d64-other" else flags


def other_images(data, datas):
    """The other data set of a study of two, else shapes; None: there is none."""
    return next((other for other in (*datas, "shapes") if other != data), None)


def score_flags(out, data, steps=SCORE_NET_STEPS, cache="shared"):
    """Flags of fid.py but for what it scores: the score network and the folder that it is kept in."""
    cache = Path(out) / Path(data).name / cache
    return ["--data", data, "--image-size", 16, "--steps", steps, "--cache", cache]


def run_row(out, row, data, seed, other=None):
    """Tokenizer, LightningDiT, samples and scores of one row. What is finished is left as it is; the scripts
    refuse to go on with what another design has made."""
    if row == "d64-other" and not other:
        sys.exit(f"row {row} needs images that its teacher learns from: name them with --other")
    tokenizer, flags = ROWS[row]
    plan = design(data)
    home = folder(out, data, row, seed)
    vae = folder(out, data, tokenizer, seed) / "vae.pt"
    every = plan["every"] if row in CURVES else 0
    run("train_vae.py", *tokenizer_flags(data, tokenizer, other), "--seed", seed, "--out", vae.parent)
    run("train_dit.py", *flags.format(**plan).split(), "--keep-every", every, "--vae", vae, "--seed", seed,
        "--out", home)
    if every:   # the curve [Fig. 4a, b]; its last point is the row's own score
        for step in range(every, plan["steps"], every):
            score(out, data, home / f"dit-{step}.pt", vae, seed, home / f"step{step}")
            (home / f"dit-{step}.pt").unlink(missing_ok=True)
            (home / f"step{step}" / "samples.npz").unlink(missing_ok=True)
        (home / f"dit-{plan['steps']}.pt").unlink(missing_ok=True)
    score(out, data, home / "dit.pt", vae, seed, home, "--vae", vae)
    if row == tokenizer:
        # The control: a network that was never trained knows neither labels nor teacher.
        if not (home / "control" / "scores.json").exists():
            run("fid.py", *score_flags(out, data, 0, "control"), "--samples", home / "samples.npz",
                "--vae", vae, "--out", home / "control")
        if not (home / "uniformity.json").exists():
            run("fid.py", "--uniformity", home / "latents", "--embedding", "pca", "--out", home)


def score(out, data, dit, vae, seed, home, *flags):
    """Samples of a LightningDiT and their scores, into the folder `home`, unless it has them."""
    if not (home / "scores.json").exists():
        run("sample.py", "--dit", dit, "--vae", vae, "--out", home, "--num", SAMPLES, "--steps", 20,
            "--cfg-scale", 1, "--seed", seed, "--no-compile", "--unfinished")
        run("fid.py", *score_flags(out, data), "--samples", home / "samples.npz", *flags, "--out", home)


def study(out, rows, datas, seeds, jobs, other=None):
    """Many rows, `jobs` at once, each in a process of its own with its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "1000"}
    running, stopped = [], []

    def stop(*_):
        stopped.append(True)
        for process in running:   # a row saves and ends; without this it would go on by itself
            process.terminate()
    signal.signal(signal.SIGTERM, stop)

    def one(job):
        row, data, seed = job
        if stopped:
            return 1
        home = folder(out, data, row, seed)
        home.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--row", row, "--data", data, "--seed", str(seed), "--out", out]
        command += ["--other", others[data]] if row == "d64-other" else []
        with open(home / "log.txt", "ab") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            running.append(process)
            failed = process.wait()
        print(f"{home}: {f'FAILED, see {home}/log.txt' if failed else 'done'}", flush=True)
        return failed

    rows = set(rows) | {ROWS[row][0] for row in rows} & set(ROWS)   # with the tokenizers that they use
    others = {data: other or other_images(data, datas) for data in datas}
    if "d64-other" in rows and None in others.values():
        print("d64-other is left out: it needs another --data, or --other", flush=True)
        rows.remove("d64-other")
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        for own in (True, False):   # first the tokenizers' own rows
            chosen = [row for row in ROWS if row in rows and (ROWS[row][0] == row) == own]
            queue = [(row, data, seed) for seed in seeds for data in datas for row in chosen]
            failed += sum(code != 0 for code in pool.map(one, queue))
    if failed:
        sys.exit(f"{failed} rows failed or were stopped; the same command goes on with them")


# --- Report -------------------------------------------------------------------------------------------
# Column of the tables: where a row's folder holds it.
MEASURES = {
    "mini-rFID": ("scores.json", "tokenizer", "values", "mini-rFID"),
    "PSNR, dB": ("scores.json", "tokenizer", "values", "PSNR"),
    "mini-gFID": ("scores.json", "samples", "values", "mini-FID"),
    "untrained": ("control/scores.json", "samples", "values", "mini-FID"),
    "density cv": ("uniformity.json", "density cv", 0),
    "Gini": ("uniformity.json", "gini", 0),
    "entropy": ("uniformity.json", "normalized entropy", 0),
    "real": ("scores.json", "real", "values", "mini-FID"),
}


def load(path, keys):
    """A value of a JSON file, or None."""
    if not path.exists():
        return None
    value = json.loads(path.read_text())
    for key in keys:
        if key in value or isinstance(value, list):
            value = value[key]
        else:
            return None
    return value


class Results:
    """What the folder of a data set holds."""

    def __init__(self, home):
        self.home, self.name, self.plan = home, home.name, design(home)

    def get(self, measure, row):
        """{seed: value} of a row."""
        file, *keys = MEASURES[measure]
        found = {int(p.name[4:]): load(p / file, keys) for p in sorted((self.home / row).glob("seed*"))}
        return {seed: value for seed, value in found.items() if value is not None}

    def curve(self, row, seed):
        """[(step of LightningDiT, mini-gFID)] of one run."""
        every, steps = self.plan["every"], self.plan["steps"]
        home = self.home / row / f"seed{seed}"
        folders = {step: home / f"step{step}" for step in range(every, steps, every)}
        folders[steps] = home
        _, *keys = MEASURES["mini-gFID"]
        points = [(step, load(path / "scores.json", keys)) for step, path in folders.items()]
        return [point for point in points if point[1] is not None]


def plain_twin(row):
    """The row without VF loss beside a row with it, or None."""
    latent, _, rest = row.partition("-")
    vf, plus, size = rest.partition("+")
    return None if vf == "none" or latent == "ladder" else f"{latent}-none{plus}{size}"


def common(values):
    """{row: {seed: value}} -> the seeds that all rows with results have: means over other seeds mislead."""
    seeds = [set(found) for found in values.values() if found]
    return set.intersection(*seeds) if seeds else set()


def spread(values, digits=3):
    """Numbers -> "mean ± standard deviation" over seeds."""
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}g}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2g}"


def change(before, after):
    """{seed: value} twice -> change in per cent ± its standard error over paired seeds, (each seed's).

    From the geometric mean of the ratios, so that halving and doubling cancel.
    """
    seeds = sorted(before.keys() & after.keys())
    if not seeds:
        return ""
    logs = np.log([after[seed] / before[seed] for seed in seeds])
    mean = np.exp(logs.mean())
    text = f"{100 * (mean - 1):+.0f} %"
    if len(seeds) > 1:
        by_seed = ", ".join(f"{100 * (np.exp(log) - 1):+.0f}" for log in logs)
        text += f" ± {100 * mean * logs.std(ddof=1) / len(logs) ** 0.5:.0f} ({by_seed})"
    return text


def markdown(head, rows):
    """A Markdown table: the head as one string, each row a list of cells."""
    lines = [head, " | ".join(["---"] * len(head.split(" | "))), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def claim_table(found, groups):
    """The rows of a claim. What VF loss changes mini-gFID by is over the seeds shared with the plain twin;
    the same in the features of a network that was never trained is a control."""
    columns = ("mini-rFID", "PSNR, dB", "mini-gFID", "density cv", "Gini", "entropy")
    rows = []
    for r in found:
        for group in groups:
            seeds = common({row: r.get("mini-gFID", row) for row in group})
            for row in group:
                values = {}
                for name in MEASURES:
                    values[name] = {seed: x for seed, x in r.get(name, row).items() if seed in seeds}
                if not values["mini-gFID"]:
                    continue
                cells = [spread(list(values[name].values())) for name in columns[:3]]
                for name in ("mini-gFID", "untrained"):
                    twin = r.get(name, plain_twin(row)) if plain_twin(row) else {}
                    cells.append(change(twin, values[name]))
                cells += [spread(list(values[name].values()), 4) for name in columns[3:]]
                title = ladder_title(row) if group is LADDER_ROWS else row
                rows.append([r.name, title, *cells, len(values["mini-gFID"])])
    return markdown("images | row | mini-rFID | PSNR, dB | mini-gFID | VF loss changes it by | "
                    "in untrained features | density cv | Gini | entropy | seeds", rows)


def ladder_title(row):
    """Row of C7 -> with its trick and the paper's FID."""
    from train_dit import LADDER
    i = LADDER_ROWS.index(row)
    return f"{row}: {LADDER[i][0]} (the paper: {PAPER_LADDER[i]:.2f})"


def reached(curve, target):
    """The step at which a curve first comes down to `target`, on lines between its points; None: never."""
    if curve and curve[0][1] <= target:
        return curve[0][0]   # or sooner
    for (s0, v0), (s1, v1) in pairwise(curve):
        if v1 <= target:
            return s0 + (s1 - s0) * (v0 - target) / (v0 - v1)
    return None


def convergence_table(found):
    """When a curve of d64 first comes down to the last mini-gFID of the plain one, each seed."""
    rows = []
    for r in found:
        none, vf = (r.get("mini-gFID", row) for row in CURVES)
        seeds = sorted(none.keys() & vf.keys())
        plain, aligned = ([reached(r.curve(row, seed), none[seed]) for seed in seeds] for row in CURVES)
        cells = [", ".join("never" if x is None else f"{x:.0f}" for x in at) for at in (plain, aligned)]
        if None in aligned:   # a mean without the seeds that never came there would flatter
            cells += ["", ""]
        else:
            cells.append(spread([r.plan["steps"] / b for b in aligned]))
            cells.append(spread([a / b for a, b in zip(plain, aligned)]))
        rows.append([r.name, r.plan["steps"], *cells])
    return markdown("images | steps trained | plain | VF loss | trained / VF loss | plain / VF loss", rows)


def report(out, pictures):
    """Print the tables of whatever rows are there, then draw the pictures."""
    found = [Results(home) for home in sorted({path.parents[1] for path in out.glob("*/*/seed*")})]
    if not found:
        sys.exit(f"{out} holds no runs: python tests/claims.py makes them")
    for title, groups in CLAIMS.items():
        print(f"### {title}\n\n{claim_table(found, groups)}")
    print(f"### C3: VF loss converges sooner [Fig. 4a, b]\n\n{convergence_table(found)}")
    print("± behind a mean: standard deviation over seeds; behind a change: standard error, (every seed's).")
    for r in found:
        points = []
        for row in ROWS:
            cv, gfid = r.get("density cv", row), r.get("mini-gFID", row)
            points += [(cv[seed], gfid[seed]) for seed in cv if row.startswith("d64") and seed in gfid]
        real = list(r.get("real", "d64-none").values())[:1]
        print(f"{r.name}: real test images have a mini-FID of {spread(real)}", end="")
        if len(points) > 2:
            print(f"; density cv and mini-gFID of the {len(points)} tokenizers of d64 correlate with "
                  f"r = {np.corrcoef(np.array(points).T)[0, 1]:.2f}", end="")
        print()
    plots(found, pictures)


def plots(found, pictures):
    """claims.png: C1 to C3; claims-samples.png: samples of d4-none, d64-none and d64-vf, seed 0."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("no pictures: they need the package matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    pictures.mkdir(parents=True, exist_ok=True)
    style = {"squeeze": False, "constrained_layout": True}
    figure, axes = plt.subplots(len(found), 3, figsize=(12, 3.6 * len(found)), **style)
    for r, (left, middle, right) in zip(found, axes):
        for vf, label, colour in (("none", "plain", "tab:gray"), ("vf", "VF loss", "tab:orange")):
            for axis, measure in ((left, "mini-rFID"), (middle, "mini-gFID")):
                points = {d: list(r.get(measure, f"d{d}-{vf}").values()) for d in (4, 16, 64)}
                points = {d: values for d, values in points.items() if values}
                bars = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in points.values()]
                means = [np.mean(values) for values in points.values()]
                axis.errorbar(list(points), means, bars, color=colour, marker="o", capsize=4, label=label)
                axis.set(xscale="log", xticks=(4, 16, 64), xticklabels=(4, 16, 64), xlabel="latent width d",
                         title=f"{r.name}: {measure}")
                axis.minorticks_off()
            for seed in r.get("mini-gFID", f"d64-{vf}"):
                right.plot(*zip(*r.curve(f"d64-{vf}", seed)), color=colour, marker=".")
        for axis in (left, middle):
            axis.set_ylim(0)   # after both lines, or the second is cut off
        left.legend()
        right.set(xlabel="steps of LightningDiT", yscale="log", title=f"{r.name}: mini-gFID at d = 64")
    figure.savefig(pictures / "claims.png", dpi=80)
    figure, axes = plt.subplots(len(found), 3, figsize=(12, 4 * len(found)), **style)
    for r, line in zip(found, axes):
        for row, axis in zip(("d4-none", "d64-none", "d64-vf"), line):
            axis.axis("off")
            axis.set_title(f"{r.name}: {row}")
            path = r.home / row / "seed0" / "samples.npz"
            if path.exists():
                with np.load(path) as file:
                    images = file["arr_0"][:80]   # (N, 16, 16, 3): sample i is of class i mod 10
                n = len(images) // 10
                grid = images[:10 * n].reshape(n, 10, 16, 16, 3).transpose(0, 2, 1, 3, 4)
                axis.imshow(grid.reshape(n * 16, 10 * 16, 3), interpolation="nearest")
    figure.savefig(pictures / "claims-samples.png", dpi=70)
    print(f"pictures: {pictures}/claims.png, {pictures}/claims-samples.png")


# --- The paper's numbers, and any runs beside them ------------------------------------------------------
# A tokenizer's preset: rFID, PSNR, LPIPS, SSIM; gFID-10K of LightningDiT-B (160 epochs; Table A1: 80; A2 and
# A3 do not say), in Table 2 also of -L and -XL (80 epochs). What the paper prints twice stands twice. Tables
# A1 and A2 print other scores for settings of Table 2 (f16d32 plain: rFID 0.40, not 0.26), unexplained.
PAPER_TOKENIZERS = """
    table2-f16d16-none      0.49  26.10  0.132  0.72  16.24   9.49   8.28
    table2-f16d16-mae       0.51  26.01  0.137  0.71  16.86  10.93   9.19
    table2-f16d16-dinov2    0.55  25.29  0.147  0.69  15.79  10.02   8.71
    table2-f16d32-none      0.26  28.59  0.089  0.80  22.62  12.86  10.92
    table2-f16d32-mae       0.28  28.33  0.091  0.80  19.89  11.51   9.92
    table2-f16d32-dinov2    0.28  27.96  0.096  0.79  15.82   9.82   8.22
    table2-f16d64-none      0.17  31.03  0.055  0.88  36.83  20.73  17.24
    table2-f16d64-mae       0.15  31.03  0.054  0.87  23.58  14.40  11.69
    table2-f16d64-dinov2    0.14  30.71  0.055  0.87  24.00  14.95  11.98
    table4-naive            0.26  28.59  0.089  0.80  22.62
    table4-dinov2           0.28  27.96  0.096  0.79  15.82
    table4-mae              0.28  28.33  0.091  0.80  19.89
    table4-sam              0.26  28.31  0.091  0.80  19.80
    table4-clip             0.33  28.39  0.091  0.80  18.93
    table5-none             0.26  28.59  0.089  0.80  22.62
    table5-full             0.28  27.96  0.096  0.79  15.82
    table5-no-mcos          0.27  28.52  0.090  0.80  21.87
    table5-no-mdms          0.27  28.24  0.090  0.80  17.74
    table5-no-margin        0.27  28.07  0.093  0.79  17.77
    tableA1-none            0.40  26.34  0.10   0.74  29.35
    tableA1-m0.5-0.25       0.42  25.88  0.10   0.72  22.11
    tableA1-m0.4-0.25       0.41  25.91  0.10   0.73  22.70
    tableA1-m0-0            0.44  25.91  0.10   0.73  23.43
    tableA1-mcos            0.37  25.38  0.12   0.71  25.70
    tableA1-mdms            0.39  25.55  0.12   0.71  26.99
    tableA2-f16d32-vf       0.33  25.81  0.110  0.72  19.93
    tableA2-f16d16          0.49  24.45  0.142  0.66  21.20
    tableA2-f16d24          0.34  25.40  0.118  0.71  24.59
    tableA2-f16d28          0.33  26.13  0.108  0.73  26.87
    tableA3-f16d128         0.13  30.00  0.047  0.86  63.92
    tableA3-f16d128-vf      0.14  29.55  0.050  0.85  46.13
    tableA3-f32d128         0.38  25.21  0.119  0.69  54.52
    tableA3-f32d128-vf      0.37  24.98  0.125  0.68  38.20
    vavae-long-3            0.28
"""
PAPER_SCORES = {}
for name, *scores in map(str.split, PAPER_TOKENIZERS.strip().splitlines()):
    PAPER_SCORES[name] = [float(x) for x in scores]
# [Table 1] FID-50K after each trick, rows 0 to 9, without guidance
PAPER_LADDER = (19.50, 17.20, 16.59, 16.61, 13.99, 12.52, 10.10, 9.25, 7.13, 4.29)
# [Table 3] LightningDiT-XL/1 on VA-VAE: gFID, sFID, IS, precision, recall. Keys: sample.py's presets
PAPER_SYSTEMS = {
    "64ep": (5.14, 4.22, 130.2, 0.76, 0.62), "64ep-cfg": (2.11, 4.16, 252.3, 0.81, 0.58),
    "800ep": (2.17, 4.36, 205.6, 0.77, 0.65), "800ep-cfg": (1.35, 4.15, 295.3, 0.79, 0.65)}


PROTOCOL = {"crop": "resize", "posterior": "sample", "rfid_input": "pytorch-fid"}


def as_preset(module, settings):
    """Whether a run's settings are those of its preset: none overridden that changes what comes out."""
    preset = module.PRESETS.get(settings.get("preset"))
    if preset is None:
        return False
    wanted = asdict(module.Settings()) | preset
    names = [f.name for f in fields(module.Settings) if f.metadata.get("same", True)]
    return all(settings.get(name) == wanted[name] for name in names if name not in ("preset", "seed"))


def paper_reconstruction(scores):
    """scores.json -> the paper's [rFID, PSNR, LPIPS, SSIM, gFID of B, L, XL] of this very setting, or []."""
    import train_vae
    tokenizer = scores.get("tokenizer", {"settings": {}})
    settings = tokenizer["settings"]
    row = "table2-f16d32-dinov2" if settings.get("preset") == "imagenet256" else settings.get("preset")
    same = as_preset(train_vae, settings) and PROTOCOL.items() <= tokenizer.items()
    return PAPER_SCORES.get(row, []) if same and scores["features"] == "inception" else []


def paper_generation(scores):
    """scores.json -> the paper's (gFID, sFID, IS, precision, recall) of this very setting, or Nones."""
    import sample
    samples = scores.get("samples", {"images": 0, "meta": {}})
    meta = samples["meta"]
    preset = meta.get("preset", "")
    if scores["features"] == "inception" and as_preset(sample, meta):
        if samples["images"] == 50_000 and preset.startswith(("table3-", "official-")):
            name = preset.removeprefix("table3-")
            name = name.replace("official-", "") + "-cfg" * name.startswith("official-")
            return PAPER_SYSTEMS.get(name, (None,) * 5)
        size = meta.get("model", "").split("/")[0]
        if samples["images"] == 10_000 and preset == "table2":
            gfid = dict(zip(("B", "L", "XL"), paper_reconstruction(scores)[4:])).get(size)
            return gfid, None, None, None, None
    return (None,) * 5


def paper_table(runs):
    """Run folders -> their scores as one Markdown table, in the shape of [Table 2] and [Table 3]."""
    paths = [Path(run) / "scores.json" for run in runs]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not found:
        sys.exit(f"no scores.json in {', '.join(map(str, runs))}: run python fid.py --out DIR for each first")
    rows = []
    for scores in found:
        tokenizer = scores.get("tokenizer", {"values": {}, "settings": {}, "images": "-"})
        samples = scores.get("samples", {"values": {}, "meta": {}, "images": "-"})
        ours = [*tokenizer["values"].values(), None, None, None, None][:4]
        ours += [*samples["values"].values(), None, None, None, None, None][:5]
        paper = [*paper_reconstruction(scores)[:4], None, None, None, None][:4] + [*paper_generation(scores)]
        cells = ["-" if value is None else f"{value:.4g}" for value in ours]
        for k, theirs in enumerate(paper):
            if theirs is not None:
                cells[k] += f" ({theirs:g})"
        name = scores["run"] + " (mini-)" * (scores["features"] == "mini")
        about = [tokenizer["settings"].get(key, "-") for key in ("spec", "vf")]
        made = [samples["meta"].get(key, "-") for key in ("model", "guidance")]
        images = f"{tokenizer['images']} / {samples['images']}"
        rows.append([name, *about, *cells[:4], *made, *cells[4:], images])
    head = ("run | spec | VF loss | rFID | PSNR | LPIPS | SSIM | model | guidance | "
            "gFID | sFID | IS | Pre. | Rec. | images")
    return (markdown(head, rows) + "\nIn brackets: the paper's number, where the setting is the same.\n"
            "(mini-): features of the small score network; no FID.")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--row", action="append", choices=[*ROWS], metavar="ROW",
                        help=f"may repeat (default: all): {', '.join(ROWS)}")
    parser.add_argument("--data", action="append", help="as in train_vae.py, may repeat (default: shapes)")
    parser.add_argument("--other", help="images of d64-other's teacher (default: another --data, or shapes)")
    parser.add_argument("--seed", type=int, action="append", help="may repeat (default: 0; all rows: 0 1 2)")
    parser.add_argument("--out", default="runs/claims", help="folder of all runs (default: runs/claims)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at once (default: cores)")
    parser.add_argument("--report", action="store_true", help="tables and pictures of what is there")
    parser.add_argument("--pictures", help="folder of the report's pictures (default: that of --out)")
    parser.add_argument("--table", nargs="+", metavar="RUN", help="run folders beside the paper's numbers")
    a = parser.parse_args()
    if a.jobs < 1:
        parser.error(f"--jobs {a.jobs} is not 1 or more")
    if a.table:
        print(paper_table(a.table))
        return
    if a.report:
        report(Path(a.out), Path(a.pictures or a.out))
        return
    rows = list(dict.fromkeys(a.row or ROWS))
    datas = list(dict.fromkeys(a.data or ["shapes"]))
    seeds = sorted(set(a.seed or ([0] if a.row else [0, 1, 2])))
    if len(rows) == len(datas) == len(seeds) == 1:
        run_row(a.out, rows[0], datas[0], seeds[0], a.other or other_images(datas[0], datas))
    else:
        study(a.out, rows, datas, seeds, a.jobs, a.other)


if __name__ == "__main__":
    main()
