"""Kills the four scripts at random moments, runs each again, and compares every output with that of an
undisturbed run, byte for byte. Not part of the suite.

    python tests/kill.py --runs 30 --seed 0
"""
import argparse
import csv
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from test_cli import Job, photos

COMMANDS = {
    "train_vae": "--out run --data photos --image-size 32 --spec mini-f4d4 --vf mini --teacher-steps 10 "
                 "--disc-weight 0.5 --disc-start 6 --batch-size 4 --steps 16 --log-every 3 --save-every 2 "
                 "--workers 1",
    "train_dit": "--out run --size mini-XS --batch-size 4 --steps 30 --log-every 4 --save-every 3 "
                 "--sample-every 6 --keep-every 10 --extract-batch 1 --workers 1",
    "sample": "--out run --num 60 --sampling-steps 8 --batch-size 5 --png --sweep 1,2 --trajectory 0,0.5,1",
    "fid": "--out run --score-net-steps 30 --num 30 --batch-size 4"}
# (script, phase, what marks its begin: a file of this pattern is there; "" the process has begun)
PHASES = [
    ("train_vae", "start and teacher", ""), ("train_vae", "loop", "run/metrics_vae.csv"),
    ("train_vae", "save", "run/.vae.pt.tmp"), ("train_vae", "pictures", "run/.reconstructions.png.tmp"),
    ("train_vae", "loop", "run/vae.pt"), ("train_dit", "begin of the extraction", "run/latents/latents.json"),
    ("train_dit", "extraction", "run/latents/latents-00000.npy"),
    ("train_dit", "end of the extraction", "run/latents/labels.npy"),
    ("train_dit", "loop", "run/metrics_dit.csv"), ("train_dit", "save", "run/.dit.pt.tmp"),
    ("sample", "begin of sampling", "run/samples_parts/images.json"),
    ("sample", "sampling", "run/samples_parts/images-00000.npy"),
    ("sample", "merging", "run/.samples.npz.tmp"), ("sample", "after merging", "run/samples.npz"),
    ("sample", "PNGs", "run/samples"), ("fid", "score network", ""), ("fid", "scoring", "run/score_net-*.pt"),
    ("fid", "writing", "run/.scores.json.tmp")]


def begin(script, folder):
    return Job(f"{script}.py {COMMANDS[script]}", folder)


def kill(script, folder, number, pattern, delay):
    """Start it, send the signal so long after the phase's begin -> exit status, and whether it still ran."""
    job, began = begin(script, folder), None
    while job.running():
        if began is None and (not pattern or any(folder.glob(pattern))):
            began = time.perf_counter()
        if began is not None and time.perf_counter() - began >= delay:
            return job.send(number).wait().status, True
    return job.wait().status, False


def flat(value):
    """What a checkpoint holds, as something that can be compared."""
    if torch.is_tensor(value):
        data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), data
    if isinstance(value, dict):
        return {name: flat(part) for name, part in value.items()}
    return repr(value)


def outputs(folder):
    """{path: its contents}; of a CSV without the columns that are clocks."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        value = path.read_bytes()
        if path.suffix == ".pt":
            value = flat(torch.load(path, weights_only=True))
        elif path.suffix == ".csv":
            with open(path, newline="") as file:
                value = [{k: v for k, v in row.items() if k not in ("images_per_s", "memory_gib")}
                         for row in csv.DictReader(file)]
        if "tensorboard" not in path.parts:
            found[str(path.relative_to(folder))] = value
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, failed, hit = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as root:
        root, before, whole, seconds = Path(root), {}, {}, {}
        photos(root / "here" / "photos", n=50, size=(32, 36))
        for script in COMMANDS:   # undisturbed; what was there before it is where the killed runs begin
            before[script] = shutil.copytree(root / "here", root / f"before-{script}")
            then = time.perf_counter()
            end = begin(script, root / "here").wait()
            assert end.status == 0, end.err
            seconds[script], whole[script] = time.perf_counter() - then, outputs(root / "here")
        for i in range(args.runs):
            script, phase, pattern = PHASES[i % len(PHASES)]
            number = signal.SIGTERM if rng.random() < 0.4 else signal.SIGKILL
            folder = shutil.copytree(before[script], root / f"run-{i}")
            # a short phase by some ms, a long one anywhere
            short = pattern.endswith((".tmp", ".json", ".npz", "labels.npy"))
            delay = rng.uniform(0, 0.02 if short else 0.8 * seconds[script])
            status, running = kill(script, folder, number, pattern, delay)
            hit += running and status != 0
            again = 0
            if rng.random() < 0.3:   # and once more, anywhere
                kill(script, folder, signal.SIGKILL, "", rng.uniform(0, seconds[script]))
            end = None
            while (end is None or end.status) and again < 5:
                again += 1
                end = begin(script, folder).wait()
            found = outputs(folder)
            wrong = [path for path in found.keys() | whole[script].keys()
                     if found.get(path) != whole[script].get(path)]
            good = not wrong and again == 1 and status in (0, 128 + number)
            failed += not good
            print(f"{i + 1:3} {script:9} {phase:24} {number.name} after {delay:5.3f} s: status {status:4}, "
                  f"then {end.status}: {'the same bytes' if good else f'DIFFERENT: {wrong[:5]}'}", flush=True)
            if not good:
                print(end.err[-2000:])
                shutil.copytree(folder, f"/tmp/killed-{i}", dirs_exist_ok=True)
            shutil.rmtree(folder)
    print(f"{args.runs - failed} of {args.runs} as undisturbed; {hit} were hit while running")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
