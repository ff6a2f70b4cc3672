"""The paper's claims in miniature: the study behind README's section of that name.

Not a pytest file: the scripts' own command lines, run for every row, data set and seed, and the tables and plots made of their scores.json.

    python tests/claims.py --row d64-vf --data shapes --seed 0     # one row: its tokenizer, LightningDiT, samples, scores; what it needs first, too
    python tests/claims.py --data shapes --data cifar10 --jobs 2   # the whole study; rows that are finished are skipped, so the same command resumes
    python tests/claims.py --report                                # tables of what is there, and plots (which need matplotlib)

A row is called by its tokenizer and, where it differs, its LightningDiT:
    d4-none d16-none d64-none    C1: latents of three widths, plain                       [Fig. 1, Table 2]
    d4-vf d16-vf d64-vf          C2: the same with VF loss; C3: their curves at d = 64     [Table 2; Fig. 4a, b]
    d64-none+mini-XS ...         C4: a smaller and a larger LightningDiT                  [Fig. 4c]
    d64-other                    a control of C2: the teacher has learned from the other data set's images and labels
    d64-margins                  C5: with the paper's margins                             [Table 5]
    d64-only-mcos, -only-mdms    C5: one of the two losses alone, at half the weight      [Table 5: "- mdms loss", "- mcos loss"]
    (all tokenizers)             C6: uniformity of the latents                            [Table 6]
    ladder-0 ... ladder-9        C7: the tricks of Table 1, one after another; row 8 is d4-none
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WIDTHS = (4, 16, 64)
WIDEST = f"d{WIDTHS[-1]}"
SAMPLES, POINTS = 1500, 5                                                      # samples behind every score; scores on a curve
FROZEN = dict(teacher=300, score_net=400)                                      # training steps of the two stand-ins


def design(data):
    """What the two kinds of images need differently, the same for all rows of one: steps of LightningDiT, weight of VF loss (README: what was tried).

    At d = 64 mini-gFID of the photos has done most of its way after 300 steps; that of the shapes stays above 22 for 750 and then falls to half. At
    weight 0.5 the wide tokenizer of the shapes loses 2 dB, that of the photos half a dB.
    """
    steps, weight = (1250, 0.25) if Path(data).name == "shapes" else (750, 0.5)
    return dict(steps=steps, ladder_steps=4 * steps, every=steps // POINTS, weight=weight, half=weight / 2)


# One design for all rows, its {names} filled in by design(): 16x16 images, f = 2, latents of 8x8 positions in tokens of 2x2, normalised per channel;
# the same number of steps for all tokenizers, the same LightningDiT and number of steps for all latents, no guidance. Plain L1 + KL tokenizers: 16
# pixels are too few for the discriminator, LPIPS would be a download. Of two equal flags the last one counts. Compiling takes longer than these runs.
TOKENIZER = "--image-size 16 --disc-weight 0 --batch-size 16 --lr 1e-3 --warmup 100 --steps 800 --save-every 400 --no-compile"
VF = "--vf mini --vf-weight {weight} --cos-margin 0 --mdms-margin 0"
TOKENIZERS = {
    **{f"d{d}-none": f"--spec mini-f2d{d} --vf none" for d in WIDTHS},
    **{f"d{d}-vf": f"--spec mini-f2d{d} {VF}" for d in WIDTHS},
    f"{WIDEST}-other": f"--spec mini-f2{WIDEST} {VF}",
    f"{WIDEST}-margins": f"--spec mini-f2{WIDEST} {VF} --cos-margin 0.5 --mdms-margin 0.25",
    f"{WIDEST}-only-mcos": f"--spec mini-f2{WIDEST} {VF} --no-mdms --vf-weight {{half}}",
    f"{WIDEST}-only-mdms": f"--spec mini-f2{WIDEST} {VF} --no-mcos --vf-weight {{half}}",
    "f4d16-vf": f"--spec mini-f4d16 {VF}",
}
DIT = "--patch-size 2 --lr 1e-3 --steps {steps} --sample-every 0 --save-every {every} --no-compile"
SIZES = ("mini-XS", "mini")
# name: (tokenizer, flags of train_dit.py). In Table 1 the last row goes from f8d4 in tokens of 2x2 to f16d32 in tokens of 1x1: as many tokens, twice
# the f. So here: from f2d4 to f4d16. Rows 0 and 1 have a quarter of the batch and so four times the steps: the same number of images.
# Row 8 is the base row d4-none itself.
LADDER_ROW = [f"ladder-{i}" if i != 8 else "d4-none" for i in range(10)]
LADDER_CONDUCT = "--sample-every 0 --save-every 1000 --no-compile"
ROWS = {
    **{name: (name, DIT) for name in TOKENIZERS if name != "f4d16-vf"},
    **{f"{WIDEST}-{vf}+{size}": (f"{WIDEST}-{vf}", f"{DIT} --size {size}") for size in SIZES for vf in ("none", "vf")},
    **{f"ladder-{i}": ("d4-none" if i < 9 else "f4d16-vf",
                       f"--preset mini-table1-{i} {LADDER_CONDUCT} --steps " + ("{ladder_steps}" if i < 2 else "{steps}")) for i in range(10) if i != 8},
}
# The order of the whole study: what matters most first, so that it can be stopped at any time; and tokenizers before the rows that use them.
ORDER = sorted(ROWS, key=lambda row: (ROWS[row][0] != row, row not in (f"{d}-{vf}" for d in (WIDEST, f"d{WIDTHS[0]}") for vf in ("none", "vf"))))


# --- Running ------------------------------------------------------------------------------------------------------------------------------------
def call(script, flags):
    """The module, the settings and the World of the command line `python SCRIPT.py FLAGS`."""
    import train_vae
    module = __import__(script)
    print(f"+ python {script}.py {flags}", flush=True)
    settings = train_vae.parse_settings(module.Settings, module.PRESETS, module.__doc__, shlex.split(flags))
    return module, settings, train_vae.setup(settings.device)


def run(script, flags):
    """That command line, in this process: starting Python and torch anew for each of some ten commands a row would cost a minute."""
    module, settings, world = call(script, flags)
    try:
        module.main(settings, world)
    finally:                                                                   # training has taken these two; the rest of a row may be stopped at once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if script.startswith("train"):                                             # Ctrl-C and SIGTERM save and return
        state = module.torch_load(f"{settings.out}/{script[6:]}.pt")
        if state["step"] < state["total_steps"]:
            sys.exit(f"stopped in {script}.py; the same command goes on from there")


def folder(out, data, row="", seed=0):
    return Path(out) / Path(data).name / row / (f"seed{seed}" if row else "shared")


def foreign_teacher(out, data):
    """The teacher of another data set, for d64-other; None if no other has been studied yet."""
    own = folder(out, data) / "teacher-f2.pt"
    return next((path for path in sorted(Path(out).glob(f"*/shared/{own.name}")) if path != own), None)


def tokenizer_flags(out, data, name):
    """Flags of a tokenizer. One teacher for all rows and seeds of a data set, as there is one DINOv2; another where the latent's grid is another."""
    teacher = foreign_teacher(out, data) if name.endswith("-other") else folder(out, data) / f"teacher-f{4 if 'f4' in TOKENIZERS[name] else 2}.pt"
    return (f"--data {shlex.quote(data)} {TOKENIZER} --teacher {shlex.quote(str(teacher))} --teacher-steps {FROZEN['teacher']} "
            f"{TOKENIZERS[name].format(**design(data))}")


def score_flags(out, data, steps=None, cache="shared"):
    """Flags of fid.py: one score network for all rows and seeds of a data set, in `cache`."""
    steps = FROZEN["score_net"] if steps is None else steps
    return (f"--data {shlex.quote(data)} --image-size 16 --steps {steps} "
            f"--cache {shlex.quote(str(folder(out, data).with_name(cache)))}")


def prepare(out, data):
    """The frozen networks of a data set: the teachers (of stride 2 and 4) and the score network."""
    import train_vae
    for f, name in ((2, f"{WIDEST}-vf"), (4, "f4d16-vf")):
        if not (folder(out, data) / f"teacher-f{f}.pt").exists():
            _, s, world = call("train_vae", f"{tokenizer_flags(out, data, name)} --out {shlex.quote(str(folder(out, data)))}")
            train_vae.mini_teacher(s, train_vae.Images(s.data, "train", s.image_size), f, world)
    if not (folder(out, data) / "score_net.pt").exists():
        fid, s, world = call("fid", f"{score_flags(out, data)} --out {shlex.quote(str(folder(out, data)))}")
        fid.feature_network(s, {}, world.device)


def run_row(out, row, data, seed):
    """Tokenizer, LightningDiT, samples and scores of one row; what is finished is left as it is."""
    prepare(out, data)
    if row.endswith("-other") and not foreign_teacher(out, data):
        raise ValueError(f"row {row} needs the teacher of another data set in {out}: run any row of another --data first")
    tokenizer, dit_flags = ROWS[row]
    plan = design(data)
    home, vae_home = folder(out, data, row, seed), folder(out, data, tokenizer, seed)
    quoted = {name: shlex.quote(str(path)) for name, path in (("home", home), ("vae", vae_home / "vae.pt"), ("vae_home", vae_home))}
    curve = f"--keep-every {plan['every']}" if row in (f"{WIDEST}-none", f"{WIDEST}-vf") else ""
    commands = {"train_vae": f"{tokenizer_flags(out, data, tokenizer)} --seed {seed} --out {quoted['vae_home']}",
                "train_dit": f"{dit_flags.format(**plan)} {curve} --vae {quoted['vae']} --seed {seed} --out {quoted['home']}"}
    if (home / "scores.json").exists():
        import train_vae
        for script, flags in commands.items():                                 # finished; an error if by another design
            _, settings, world = call(script, flags)
            train_vae.resume(Path(settings.out) / f"{script[6:]}.pt", script[6:], settings, world)
        measure(out, row, data, seed)
        return print(f"{home} is finished")
    for script, flags in commands.items():
        run(script, flags)
    for step in range(plan["every"], plan["steps"], plan["every"]) if curve else ():  # [Fig. 4a, b]
        at = shlex.quote(str(home / f"step{step}"))
        if not (home / f"step{step}" / "scores.json").exists():
            draw(quoted["home"] + f"/dit-{step}.pt", quoted["vae"], at, seed)
            run("fid", f"{score_flags(out, data)} --samples {at}/samples.npz --out {at}")
        for file in (home / f"step{step}" / "samples.npz", home / f"dit-{step}.pt"):
            file.unlink(missing_ok=True)
    (home / f"dit-{plan['steps']}.pt").unlink(missing_ok=True)                 # the same as dit.pt
    draw(quoted["home"] + "/dit.pt", quoted["vae"], quoted["home"], seed)
    run("fid", f"{score_flags(out, data)} --samples {quoted['home']}/samples.npz --vae {quoted['vae']} --out {quoted['home']}")
    measure(out, row, data, seed)


def measure(out, row, data, seed):
    """Beside the score of a tokenizer's row: the control, the same distance in the features of a ScoreNet that was never trained and so knows neither
    labels nor teacher (--steps 0); and the uniformity of the latents [Table 6]."""
    home, own = folder(out, data, row, seed), ROWS[row][0] == row
    if own and not (home / "control" / "scores.json").exists():
        run("fid", f"{score_flags(out, data, 0, 'control')} --samples {shlex.quote(str(home / 'samples.npz'))} "
                   f"--vae {shlex.quote(str(home / 'vae.pt'))} --out {shlex.quote(str(home / 'control'))}")
    if own and not (home / "uniformity.json").exists():
        run("fid", f"--uniformity {shlex.quote(str(home / 'latents'))} --embedding pca --out {shlex.quote(str(home))}")


def draw(dit, vae, home, seed):
    run("sample", f"--dit {dit} --vae {vae} --out {home} --num {SAMPLES} --steps 20 --cfg-scale 1 --seed {seed} --no-compile")


def study(out, rows, datas, seeds, jobs):
    """Many rows, `jobs` at once, each in a process of its own with its share of the cores."""
    env = dict(os.environ, OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // jobs)), OMP_WAIT_POLICY="PASSIVE")
    for data in datas:
        prepare(out, data)

    running, stopped = [], []

    def stop(*_):                                                              # a row saves on SIGTERM; without this it would go on by itself
        stopped.append(True)
        for process in running:
            process.terminate()
    signal.signal(signal.SIGTERM, stop)

    def one(job):
        row, data, seed = job
        if stopped:
            return 1
        home = folder(out, data, row, seed)
        home.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--row", row, "--data", data, "--seed", str(seed), "--out", str(out)]
        with open(home / "log.txt", "ab") as log:
            running.append(process := subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
            rc = process.wait()
        print(f"{home}: {'done' if rc == 0 else f'FAILED, see {home}/log.txt'}", flush=True)
        return rc

    rows = set(rows) | {ROWS[row][0] for row in rows} & set(ROWS)              # the tokenizers that they use
    if rows == set(ORDER) and not foreign_teacher(out, datas[0]):
        print(f"{WIDEST}-other is left out: it needs the teacher of another --data", flush=True)
        rows -= {f"{WIDEST}-other"}
    phases = [[(row, data, seed) for seed in seeds for data in datas for row in ORDER if row in rows and (ROWS[row][0] == row) == own] for own in (True, False)]
    with ThreadPoolExecutor(jobs) as pool:
        if failed := sum(rc != 0 for phase in phases for rc in list(pool.map(one, phase))):
            sys.exit(f"{failed} rows failed or were stopped; the same command goes on with them")


# --- Report -------------------------------------------------------------------------------------------------------------------------------------------
def spread(values, digits=3):
    """Mean and standard deviation over seeds, as text."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return f"{np.mean(values):.{digits}g}" + (f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else "")


def change(before, after):
    """Change in per cent over paired seeds, from the geometric mean of their ratios (so that halving and doubling cancel), and its standard error."""
    logs = np.log([after[k] / before[k] for k in sorted(before.keys() & after.keys())])
    if not len(logs):
        return "-"
    mean = np.exp(logs.mean())
    return f"{100 * (mean - 1):+.0f} %" + (f" ± {100 * mean * logs.std(ddof=1) / len(logs) ** 0.5:.0f}" if len(logs) > 1 else "")


def load(path, *keys):
    """A value of a JSON file, or None."""
    if not path.exists():
        return None
    value = json.loads(path.read_text())
    for key in keys:
        value = value.get(key, {})
    return value if value != {} else None


class Results:
    """What a data set's folder holds: gfid(row), rfid(row), ... as {seed: value}."""

    def __init__(self, home):
        self.home, self.name, self.plan = home, home.name, design(home)

    def all(self, row, file, *keys):
        found = {int(p.name[4:]): load(p / file, *keys) for p in (self.home / row).glob("seed*")}
        return {seed: value for seed, value in sorted(found.items()) if value is not None}

    def gfid(self, row):
        return self.all(row, "scores.json", "samples", "values", "mini-FID")

    def rfid(self, row):
        return self.all(row, "scores.json", "tokenizer", "values", "mini-rFID")

    def psnr(self, row):
        return self.all(row, "scores.json", "tokenizer", "values", "PSNR")

    def control(self, row):
        return self.all(row, "control/scores.json", "samples", "values", "mini-FID")

    def curve(self, row, seed):
        """[(step, mini-FID)] of one run."""
        home = self.home / row / f"seed{seed}"
        steps, every = self.plan["steps"], self.plan["every"]
        points = [(step, load(home / f"step{step}" / "scores.json", "samples", "values", "mini-FID")) for step in range(every, steps, every)]
        return [p for p in points + [(steps, self.gfid(row).get(seed))] if p[1] is not None]


def reached(curve, target):
    """The step at which a curve first comes down to `target`, on straight lines between its points; None if it never does."""
    if curve and curve[0][1] <= target:
        return curve[0][0]                                                     # or sooner
    for (s0, v0), (s1, v1) in zip(curve, curve[1:]):
        if v1 <= target:
            return s0 + (s1 - s0) * (v0 - target) / (v0 - v1)
    return None


def shared(values):
    """{row: {seed: value}}, of the seeds that all rows with any results have: rows of unequal numbers of seeds must not be compared by their means."""
    seeds = set.intersection(*(set(v) for v in values.values() if v)) if any(values.values()) else set()
    return {row: {k: x for k, x in v.items() if k in seeds} for row, v in values.items()}


def table(head, rows):
    """Markdown; rows that end in 0 seeds are left out."""
    rows = [row for row in rows if row[-1] != 0]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def report(out, pictures):
    """Markdown of all claims, from whatever rows are there; then the plots, to the folder `pictures`. ± behind a mean is the standard deviation over
    seeds (spread), behind a change in per cent the standard error of the paired changes (change)."""
    found = [Results(p) for p in sorted(out.glob("*")) if (p / "shared").exists()]
    if not found:
        sys.exit(f"{out} holds no runs: python tests/claims.py makes them")
    print("### C1 and C2: width and VF loss [Table 2]\n")
    rows = []
    for r in found:
        for d in WIDTHS:
            none, vf = f"d{d}-none", f"d{d}-vf"
            for row in (none, vf):
                control = "" if row == none else change(r.control(none), r.control(vf))
                rows.append((r.name, d, row.split("-")[1], spread(r.rfid(row).values()), spread(r.psnr(row).values()), spread(r.gfid(row).values()),
                             "" if row == none else change(r.gfid(none), r.gfid(vf)), control, len(r.gfid(row))))
    print(table(("images", "d", "VF loss", "mini-rFID", "PSNR, dB", "mini-gFID", "VF loss changes it by", "in untrained features by", "seeds"), rows))
    print(f"The controls at {WIDEST}: what VF loss changes mini-gFID by\n")
    none, vf, other = (f"{WIDEST}-{name}" for name in ("none", "vf", "other"))
    rows = []
    for r in found:
        trained, untrained = (shared({row: values(row) for row in (none, vf, other)}) for values in (r.gfid, r.control))
        decibels = shared({row: r.psnr(row) for row in (none, vf, other)})
        rows.append((r.name, *(change(v[none], v[row]) for v in (trained, untrained) for row in (vf, other)),
                     " / ".join(spread(v.values()) for v in decibels.values()), len(trained[vf])))
    print(table(("images", "own teacher", "the other's teacher", "own teacher, untrained features", "the other's teacher, untrained features",
                 "PSNR plain / own / other's, dB", "seeds"), rows))
    for r in found:
        real, untrained = ([*r.all(f"{WIDEST}-none", file, "real", "values", "mini-FID").values()] for file in ("scores.json", "control/scores.json"))
        print(f"{r.name}: mini-FID of real test images {spread(real[:1])}; in untrained features {spread(untrained[:1])}, where samples of the plain "
              f"{WIDEST} have {spread(r.control(f'{WIDEST}-none').values())}")
        by_seed = [", ".join(f"{100 * (v[vf][k] / v[none][k] - 1):+.0f}" for k in sorted(v[none].keys() & v[vf].keys()))
                   for v in ({row: values(row) for row in (none, vf)} for values in (r.gfid, r.control))]
        print(f"{r.name}: by seed, VF loss changes mini-gFID of {WIDEST} by {by_seed[0]} %, in untrained features by {by_seed[1]} %")
    print()
    print("### C3: convergence at the widest latent [Fig. 4a, b]: the step at which a curve first comes down to the plain latents' final mini-gFID, by seed\n")
    rows = []
    for r in found:
        none, vf = r.gfid(f"{WIDEST}-none"), r.gfid(f"{WIDEST}-vf")
        seeds = sorted(none.keys() & vf.keys())
        at = {v: [reached(r.curve(f"{WIDEST}-{v}", seed), none[seed]) for seed in seeds] for v in ("none", "vf")}
        text = {v: ", ".join("never" if x is None else f"{x:.0f}" for x in at[v]) for v in at}
        complete = None not in at["none"] + at["vf"]                           # a mean without the seeds that never came there would flatter
        ratios = [[before / after for before, after in zip(top, at["vf"])] if complete else [] for top in ([r.plan["steps"]] * len(seeds), at["none"])]
        rows.append((r.name, r.plan["steps"], text["none"], text["vf"], *map(spread, ratios)))
    print(table(("images", "steps trained", "plain", "VF loss", "trained / VF loss", "plain / VF loss"), rows))
    print("### C4: size of LightningDiT, mini-gFID [Fig. 4c]\n")
    rows = []
    for r in found:
        gfid = shared({(size, v): r.gfid(f"{WIDEST}-{v}" + ("" if size == "mini-S" else f"+{size}")) for size in ("mini-XS", "mini-S", "mini")
                       for v in ("none", "vf")})
        for size in ("mini-XS", "mini-S", "mini"):
            none, vf = gfid[size, "none"], gfid[size, "vf"]
            rows.append((r.name, size, spread(none.values()), spread(vf.values()), change(none, vf), max(len(none), len(vf))))
    print(table(("images", "size", "plain", "VF loss", "change", "seeds"), rows))
    print("### C5: ingredients [Table 5]\n")
    settings = (("none", "no VF loss"), ("only-mdms", "Eq. 3 alone (Table 5: - mcos)"), ("only-mcos", "Eq. 2 alone (Table 5: - mdms)"),
                ("vf", "both, without margins"), ("margins", "both, the paper's margins"))
    rows = []
    for r in found:
        rfid, gfid = (shared({name: values(f"{WIDEST}-{name}") for name, _ in settings}) for values in (r.rfid, r.gfid))
        rows += [(r.name, text, spread(rfid[name].values()), spread(gfid[name].values()), len(gfid[name])) for name, text in settings]
    print(table(("images", "setting", "mini-rFID", "mini-gFID", "seeds"), rows))
    print("### C6: uniformity of the latents [Table 6], two principal components instead of t-SNE\n")
    rows, points = [], {}
    for r in found:
        for row in (*(f"{WIDEST}-{name}" for name, _ in settings), *(f"d{d}-{v}" for d in WIDTHS[:-1] for v in ("none", "vf"))):
            cv, gini, entropy = ({k: v[0] for k, v in r.all(row, "uniformity.json", key).items()} for key in ("density cv", "gini", "normalized entropy"))
            rows.append((r.name, row, spread(cv.values()), spread(gini.values()), spread(entropy.values(), 4), spread(r.gfid(row).values()), len(cv)))
            if row.startswith(WIDEST):
                points.setdefault(r.name, []).extend((value, r.gfid(row)[seed]) for seed, value in cv.items())
    print(table(("images", "tokenizer", "density cv", "Gini", "normalized entropy", "mini-gFID", "seeds"), rows))
    for name, pairs in points.items():
        if len(pairs) > 2:
            print(f"{name}: correlation of density cv and mini-gFID over the {len(pairs)} tokenizers of {WIDEST} in the table: "
                  f"r = {np.corrcoef(np.array(pairs).T)[0, 1]:.2f}")
    print("\n### C7: the ladder of Table 1\n")
    from train_dit import LADDER
    climbed = [r for r in found if r.gfid("ladder-0")]
    gfid = [shared({row: r.gfid(row) for row in LADDER_ROW}) for r in climbed]
    rows = [(row, LADDER[i][0], *(f"{spread(g[row].values())} ({len(g[row])})" for g in gfid), f"{LADDER[i][2]:.2f}") for i, row in enumerate(LADDER_ROW)]
    print(table(("row", "trick", *(f"mini-gFID, {r.name} (seeds)" for r in climbed), "paper's FID"), rows))
    plots(found, pictures)


def plots(found, pictures):
    try:
        import matplotlib
    except ImportError:
        sys.exit("no plots: they need the package matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colours = {"none": "tab:gray", "vf": "tab:orange"}
    figure, axes = plt.subplots(len(found), 3, figsize=(12, 3.6 * len(found)), squeeze=False, constrained_layout=True)
    for r, (left, middle, right) in zip(found, axes):
        for vf, label in (("none", "plain"), ("vf", "VF loss")):
            for axis, values, title in ((left, r.rfid, "reconstruction: mini-rFID"), (middle, r.gfid, "generation: mini-gFID")):
                points = [(d, list(values(f"d{d}-{vf}").values())) for d in WIDTHS if values(f"d{d}-{vf}")]
                if points:
                    axis.errorbar([d for d, _ in points], [np.mean(v) for _, v in points], [np.std(v, ddof=1) if len(v) > 1 else 0 for _, v in points],
                                  color=colours[vf], marker="o", capsize=4, label=label)
                axis.set(xscale="log", xlabel="latent width d", title=f"{r.name}: {title}", xticks=WIDTHS, xticklabels=WIDTHS)
                axis.minorticks_off()
            for k, seed in enumerate(r.gfid(f"{WIDEST}-{vf}")):
                right.plot(*zip(*r.curve(f"{WIDEST}-{vf}", seed)), color=colours[vf], marker=".", label=label if k == 0 else None)
        right.set(xlabel="steps of LightningDiT", title=f"{r.name}: mini-gFID at d = {WIDTHS[-1]}", yscale="log")
        for axis in (left, middle):
            axis.set_ylim(0)                                                   # after both lines, or the second is cut off
        left.legend()
        right.legend()
    pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(pictures / "claims.png", dpi=80)
    # Samples of the same seed: narrow, wide, wide with VF loss
    names = [f"d{WIDTHS[0]}-none", f"{WIDEST}-none", f"{WIDEST}-vf"]
    figure, axes = plt.subplots(len(found), 3, figsize=(12, 4 * len(found)), squeeze=False, constrained_layout=True)
    for r, line in zip(found, axes):
        for name, axis in zip(names, line):
            axis.axis("off")
            axis.set_title(f"{r.name}: {name}")
            if (path := r.home / name / "seed0" / "samples.npz").exists():
                with np.load(path) as file:
                    images = file["arr_0"][:80]                                # (N, H, W, 3): sample i is of class i mod 10
                n = len(images) // 10
                grid = images.reshape(n, 10, 16, 16, 3).transpose(0, 2, 1, 3, 4)
                axis.imshow(grid.reshape(n * 16, 10 * 16, 3), interpolation="nearest")
    figure.savefig(pictures / "claims-samples.png", dpi=70)
    print(f"plots: {pictures}/claims.png, {pictures}/claims-samples.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", choices=ORDER, metavar="ROW", help=f"may be repeated (default: the whole study): {', '.join(ROWS)}")
    parser.add_argument("--data", action="append", help="data set as in train_vae.py, may be repeated (default: shapes)")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated (default: 0 for a row, 0 1 2 for the study)")
    parser.add_argument("--out", default="runs/claims", help="folder of all runs (default: runs/claims)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at once, about 1 GiB each (default: as many as cores)")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there and draw the plots")
    parser.add_argument("--pictures", help="folder of --report's plots (default: that of --out; README's are in assets)")
    a = parser.parse_args()
    if a.jobs < 1:
        parser.error(f"--jobs {a.jobs} is not 1 or more")
    datas = list(dict.fromkeys(a.data or ["shapes"]))
    if a.report:
        report(Path(a.out), Path(a.pictures or a.out))
        return
    import train_vae
    rows, seeds = list(dict.fromkeys(a.row or ORDER)), sorted(set(a.seed or ([0] if a.row else [0, 1, 2])))
    try:
        if (len(rows), len(datas), len(seeds)) == (1, 1, 1):
            run_row(a.out, rows[0], datas[0], seeds[0])
        else:
            study(a.out, rows, datas, seeds, a.jobs)
    except (train_vae.DataError, ValueError) as error:
        train_vae.fail(str(error))


if __name__ == "__main__":
    main()
