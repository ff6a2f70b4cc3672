"""Every user's mistake ends in one line that names the culprit, and nothing is lost: one table, one test.

A case: (name, script, flags, what is prepared, words that the line must hold; then, if not 1, the status, and
the files that may change). Each runs in a folder of its own, which holds a finished tiny run in `run`, one
that is to go on in `half`, its images in `photos`: the script's own entry in a fork of this process, which
has loaded torch once.
"""
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import fid
import sample
import train_dit
import train_vae
import vf_loss

MAIN = {"train_vae": (train_vae, train_vae.train), "train_dit": (train_dit, train_dit.main),
        "sample": (sample, sample.main), "fid": (fid, fid.main)}
# what every run of a script is given before its case's own flags
COMMON = {
    "train_vae": "--out new --data photos --image-size 16 --spec mini-f4d4 --vf none --disc-weight 0 "
                 "--batch-size 4 "
                 "--steps 3 --log-every 1 --save-every 1 --teacher-steps 1",
    "train_dit": "--out new --vae run/vae.pt --latents run/latents --size mini-XS --batch-size 4 --steps 3 "
                 "--log-every 1 --save-every 1 --extract-batch 8",
    "sample": "--out run --num 8 --steps 3 --batch-size 4",
    "fid": "--out run --steps 2 --num 20 --batch-size 8"}


# --- a run -----------------------------------------------------------------------------------------------
def start(script, arguments, folder, out, err, inside=None):
    """A script in a fork of this process, which has imported it -> its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = [f"{script}.py", *arguments]
        tqdm.set_lock(threading.RLock())   # its own is shared with a sister, which may die holding it
        if callable(inside):
            inside()
        module, main = MAIN[script]
        train_vae.run_script(module.Settings, module.PRESETS, module.__doc__, main)
    except SystemExit as end:
        status = end.code or 0
    finally:
        if sys.exc_info()[0]:   # nothing that a user should ever see
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(script, flags, folder, inside=None, seconds=60):
    """-> exit status as a shell shows it, what it printed, and the lines on stderr that are no progress bars.
    inside:
    called in the new process first."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = start(script, [*COMMON[script].split(), *flags], folder, out, err, inside)
        end, done = time.time() + seconds, (0, 0)
        while done == (0, 0):
            time.sleep(0.005)
            done = os.waitpid(pid, os.WNOHANG)
            if done == (0, 0) and time.time() > end:
                os.killpg(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(done[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    lines = [line for line in re.split(r"[\r\n]+", texts[1]) if line and not re.search(r"\d+%\||\[\d\d:\d\d",
                                                            line)]
    return (status if status >= 0 else 128 - status), texts[0], lines


def tree(folder):
    """{path: hash of the file, or what it is} of everything below a folder, on this file system."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path.relative_to(folder))] = "link" if path.is_symlink() else "folder"
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("finished"), np.random.default_rng(0)
    for c, name in enumerate(("ant", "bee", "cat")):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(12):
            noise = np.clip(rng.normal(80 * c + 40, 30, (16, 18, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noise).save(root / "photos" / name / f"{i:02}.png")
    for script, flags in (("train_vae", "--out run --vf mini"), ("train_dit", "--out run"), ("sample", ""),
                          ("fid", "")):
        assert run(script, flags.split(), root)[::2] == (0, [])
    (root / "half").mkdir()
    for name in ("vae.pt", "dit.pt"):   # the same with three more steps to go
        shutil.copy(root / "run" / name, root / "half")
        state(f"half/{name}", total_steps=6, settings__steps=6)(root)
    return root


# --- what a user does to files: each returns a function of the case's folder -------------------------------
def text(path, content="hello\n"):
    def prepare(root):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return prepare


def cut(path, keep):
    """Keep so many bytes, or this share of them."""
    def prepare(root):
        data = (root / path).read_bytes()
        (root / path).write_bytes(data[:keep if keep > 1 else int(keep * len(data))])
    return prepare


def gone(*paths):
    def prepare(root):
        for path in paths:
            if (root / path).is_dir():
                shutil.rmtree(root / path)
            else:
                (root / path).unlink()
    return prepare


def folder(path):
    def prepare(root):
        if (root / path).exists():
            gone(path)(root)
        (root / path).mkdir(parents=True)
    return prepare


def state(path, drop=(), **changes):
    """A checkpoint with other entries: settings__lr=1 for settings["lr"]; a function changes the old one."""
    def prepare(root):
        whole = torch.load(root / path, weights_only=True)
        for name, value in changes.items():
            *outer, last = name.split("__")
            place = whole
            for key in outer:
                place = place[key]
            place[last] = value(place[last]) if callable(value) else value
        for name in drop:
            del whole[name]
        torch.save(whole, root / path)
    return prepare


def weights(change):
    """For `state`: the change applied to every weight."""
    return lambda old: {name: change(value) for name, value in old.items()}


def values(path, **changes):
    """The same of a JSON file; None removes the entry."""
    def prepare(root):
        whole = json.loads((root / path).read_text()) | changes
        (root / path).write_text(json.dumps({name: value for name,
                                             value in whole.items() if value is not None}))
    return prepare


def array(path, value):
    """An .npy or .npz; of a function: of the one that is there."""
    def prepare(root):
        if path.endswith(".npz"):
            old = dict(np.load(root / path)) if (root / path).exists() else {}
            np.savez(root / path, **{name: v for name, v in (old | value).items() if v is not None})
        else:
            np.save(root / path, value(np.load(root / path)) if callable(value) else value)
    return prepare


def pipe(path):
    def prepare(root):
        (root / path).unlink(missing_ok=True)
        os.mkfifo(root / path)
    return prepare


def ghostscript(root):
    """A program in a picture, which Pillow would give to Ghostscript."""
    (root / "bin").mkdir()
    (root / "bin" / "gs").write_text("#!/bin/sh\ntouch pwned\necho 10.0\n")
    (root / "bin" / "gs").chmod(0o755)
    program = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(x) run\n"
    text("photos/ant/00.png", program)(root)
    return lambda: os.environ.update(PATH=f"{root / 'bin'}:{os.environ['PATH']}")


def both(*steps):
    def prepare(root):
        return [step(root) for step in steps][-1]
    return prepare


def picture(path, size=(16, 16), mode="RGB", **options):
    def prepare(root):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(root / path, **options)
    return prepare


def link(path, target):
    def prepare(root):
        (root / path).symlink_to(target)
    return prepare


def hold(path):
    """Another process writes there."""
    def prepare(root):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        ready, done = os.pipe()
        pid = os.fork()
        if pid == 0:
            train_vae.locked(root / path)
            os.write(done, b".")
            time.sleep(100)
            os._exit(0)
        HELD.append(pid)
        os.read(ready, 1)
    return prepare


def variables(**new):
    return lambda root: lambda: os.environ.update(new)


def sent(number, when):
    """The signal as soon as a file of this pattern is there, or after this time."""
    def prepare(root):
        def watch():
            while not any(root.glob(when)) if isinstance(when, str) else False:
                time.sleep(0.002)
            time.sleep(0 if isinstance(when, str) else when)
            os.kill(os.getpid(), number)
        return lambda: threading.Thread(target=watch, daemon=True).start()
    return prepare


def mount(path, *options):
    def prepare(root):
        (root / path).mkdir(parents=True, exist_ok=True)
        if os.system(f"mount {' '.join(options).format(root / path)} {root / path} 2>/dev/null"):
            pytest.skip("no right to mount a file system, which this case needs")
        HELD.append(root / path)
    return prepare


def small_disk(path, size):
    return mount(path, "-t tmpfs -o size=" + size, "tmpfs")


def read_only(path):
    return both(mount(path, "--bind {}"), mount(path, "-o remount,ro,bind"))


def begun(changes=()):
    """An extraction that was killed half-way."""
    def prepare(root):
        run(D, NEW_LATENTS.split(), root, sent(signal.SIGKILL, "new/latents/marks")(root))
        values("new/latents/filling.json", **dict(changes))(root)
        for path in (root / "new").glob("latents/lock"):
            path.unlink()
    return prepare


def bad_header(path):
    """An .npz whose array promises more than there is."""
    def prepare(root):
        with zipfile.ZipFile(root / path, "w") as archive:
            archive.writestr("arr_0.npy", HUGE_NPY)
    return prepare


def flipped(path):
    def prepare(root):
        array(path, {"arr_0": np.zeros((9, 16, 16, 3), np.uint8)})(root)
        data = bytearray((root / path).read_bytes())
        data[2000] ^= 1
        (root / path).write_bytes(data)
    return prepare


def promise():
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10 ** 9,
                                                            10 ** 6, 4, 3)})
    return file.getvalue() + bytes(100)


class Evil:
    def __reduce__(self):
        return os.system, ("touch new-file",)


HUGE_NPY, EVIL, COMMIT = promise(), pickle.dumps({"state_dict": Evil()}), vf_loss.DINOV2_COMMIT
HELD = []   # locks and mounts of a case
NAN, INF = float("nan"), float("inf")
V, D, S, F = "train_vae", "train_dit", "sample", "fid"
NEW_LATENTS = "--latents new/latents"
RUN_MINI = "--out half --vf mini --steps 6"
HALF_DIT = "--out half --steps 6"
NEW = "new"   # a case may make files in here, and else nowhere
PARTS = "run/samples.npz"


def flag_cases():
    """Values: a case for each, its flag and value are the words."""
    shared = "--steps=-1 --steps=1.5 --steps=x --seed=-1 --seed=18446744073709551616 --device=tpu" \
        " --device=cuda --preset=no --batch-size=0 --batch-size=-3 --batch-size=many --workers=-1" \
        " --no-such-flag --image-size=-1 --seed=nan"
    own = {
        V: "--image-size=0 --image-size=100000 --image-size=18 --spec=f9d9 --vf=dino --lr=0 --lr=nan "
           "--lr=inf --lr=-1 "
           "--kl-weight=nan --lpips-weight=-1 --disc-weight=inf --cos-margin=3 --mdms-margin=-0.1 --epochs=0 "
           "--epochs=nan --teacher-steps=0 --log-every=0 --save-every=0 --accumulate=0 --accumulate=3 "
           "--crop=left "
           "--precision=fp8 --warmup=-5 --vf-input=x --batch-size=1000000000000 "
           "--steps=1000000000000000000000 "
           "--workers=100000 --epochs=1000000000.0",
        D: "--ema=2 --ema=1 --ema=nan --class-dropout=2 --class-dropout=nan --beta2=1.5 --beta2=1 "
           "--patch-size=0 "
           "--patch-size=3 --patch-size=64 --size=huge --lr=nan --grad-clip=-1 --grad-clip=inf --epochs=inf "
           "--uniform-from-epoch=nan --objective=gan --latent-norm=none --tokenizer-spec=f9 "
           "--extract-batch=0 "
           "--keep-every=-1 --sample-every=-1 --accumulate=3 --batch-size=1000000000000",
        S: "--shift=0 --shift=nan --shift=-1 --cfg-scale=-1 --cfg-scale=nan --cfg-channels=-1 "
           "--cfg-channels=99 "
           "--cfg-interval-start=2 --num=0 --num=-8 --integrator=rk4 --labels=9 --labels=a --labels=0,-1 "
           "--labels=, "
           "--labels=1.5 --sweep=nan --sweep=1,x --sweep=-1 --sweep=inf --sweep=, --trajectory=2 "
           "--trajectory=nan "
           "--trajectory=a --weights=best --data=cifar10 --image-size=64 --steps=1 --num=1000000000000000000 "
           "--steps=1000000000000",
        F: "--num=1 --num=x --features=vgg --inception-input=jax --crop=left --posterior=mean "
           "--uniformity-seeds=0 "
           "--uniformity-seeds=-1 --embedding=umap --rfid-input=x --image-size=5.5"}
    for script, listed in own.items():
        for given in dict.fromkeys((shared + " " + listed).split()):
            flag, _, _value = given.partition("=")
            fresh = "--out new " if script == S and not flag.startswith("--no-such") else ""
            extra = "--dit run/dit.pt --vae run/vae.pt " if fresh else ""
            yield f"{script} {given}", script, fresh + extra + given, None, given.replace("=", " ")


def file_cases():
    """Damaged in the same ways: every kind of file, read by every script that reads it."""
    readers = {
        "run/vae.pt": (D, S, F), "run/dit.pt": (S,), "run/score_net.pt": (F,), "half/vae.pt": (V,),
        "half/dit.pt": (D,),
        "run/latents/latents.npy": (D,), "run/latents/labels.npy": (D,), "run/latents/latents.json": (D,),
        "run/samples.npz": (S, F)}
    damage = {"empty": text, "text": text, "foreign": text, "half": cut, "short": cut, "a folder": folder}
    for path, scripts in readers.items():
        for kind, make in damage.items():
            content = {"empty": "", "text": "hello\n", "foreign": b"\x89PNG\r\n\x1a\n" + bytes(range(256))}
            how = {"half": 0.5, "short": 100}
            made = make(path) if kind == "a folder" else make(path, how.get(kind, content.get(kind)))
            for script in scripts:
                flags = {V: RUN_MINI, D: HALF_DIT if "half" in path else ""}.get(script, "")
                if kind == "a folder" and path == "run/samples.npz" and script == F:
                    continue
                yield f"{script}: {path} is {kind}", script, flags, made, Path(path).name
    for script, name, keys in (
            (V, "half/vae.pt", ("stage step total_steps settings identity state_dict optimizer linear_proj "
                               "teacher")),
            (D, "half/dit.pt", "stage step total_steps settings model ema optimizer tokenizer"),
            (D, "run/vae.pt", "step total_steps settings spec state_dict"),
            (S, "run/dit.pt", ("stage step total_steps arch latents classes objective data image_size ema "
                              "tokenizer"))):
        for key in keys.split():
            flags = {V: RUN_MINI, D: HALF_DIT if "half" in name else ""}.get(script, "")
            for kind, prepare in (("lacks", state(name, drop=[key])), ("has a wrong", state(name, **{key: [1,
                                                            "x"]}))):
                yield f"{script}: {name} {kind} {key}", script, flags, prepare, Path(name).name


def broken(path, weights_in, *scripts):
    """Weights that are not finite, absurd, misshapen, too few or too many."""
    kinds = {"NaN": lambda w: w * NAN, "infinite": lambda w: w + INF, "1e30": lambda w: w * 0 + 1e30,
             "misshapen": lambda w: w[None], "int64": lambda w: w.long()}
    flags = {V: RUN_MINI, D: HALF_DIT if "half" in path else "", F: "--unfinished"}
    for script in scripts:
        for kind, change in kinds.items():
            yield (f"{script}: {path} {weights_in} {kind}", script, flags.get(script, ""),
                   state(path, **{weights_in: weights(change)}), Path(path).name)
        yield (f"{script}: {path} {weights_in} with one more", script, flags.get(script, ""),
               state(path, **{f"{weights_in}__more": torch.zeros(2)}), Path(path).name + " more")


CASES = [
    *flag_cases(), *file_cases(), *broken("run/vae.pt", "state_dict", D, S, F), *broken("run/dit.pt", "ema",
                                                            S),
    *broken("half/vae.pt", "state_dict", V), *broken("half/vae.pt", "teacher", V), *broken("half/dit.pt",
                                                            "model", D),
    *broken("half/dit.pt", "ema", D), *broken("run/score_net.pt", "state_dict", F),
    # --- the command line
    ("no value", V, "--lr", None, "--lr"),
    ("a word too many", S, "samples", None, "samples"),
    ("VF loss without a loss", V, "--vf mini --no-mcos --no-mdms", None, "--no-mcos"),
    ("too small for the discriminator", V, "--disc-weight 1", None, "--disc-weight"),
    ("more than the memory", V, "--image-size 8192 --batch-size 100000", None, "--batch-size 100000"),
    ("no network for DINOv2", V, "--vf dinov2", variables(TORCH_HOME="hub"), "DINOv2 --vf", 1, "hub"),
    ("no network for LPIPS", V, "--lpips-weight 1", variables(TORCH_HOME="hub"), "vgg16", 1, "hub"),
    ("no network for Inception", F, "--features inception", variables(TORCH_HOME="hub"), "inception", 1,
     "hub"),
    ("no network for the released weights", S, "--preset official-demo", variables(TORCH_HOME="hub"), "vavae",
     1, "hub"),
    ("damaged VGG16", V, "--lpips-weight 1", both(text("hub/hub/checkpoints/vgg16-397923af.pth"),
     variables(TORCH_HOME="hub")), "vgg16-397923af.pth"),
    ("damaged Inception", F, "--features inception",
     both(text("hub/hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"), variables(TORCH_HOME="hub")),
     "pt_inception-2015-12-05-6726825d.pth"),
    ("damaged DINOv2", V, "--vf dinov2-s", both(folder(f"hub/hub/facebookresearch_dinov2_{COMMIT}"),
     variables(TORCH_HOME="hub")), "DINOv2", 1, "hub"),
    ("another tokenizer than the preset's", D, "--tokenizer-spec f8d4", None, "run/vae.pt f8d4"),
    ("another image size", D, "--image-size 20", None, "20"),
    ("an image size that 4 does not divide", D, NEW_LATENTS + " --image-size 18", None, "--image-size 18"),
    ("an image size that 4 does not divide, fid", F, "--image-size 18", None, "--image-size 18"),
    ("too small to score", F, "--image-size 4", None, "--image-size 4"),
    # --- images
    ("no such data", V, "--data nowhere", None, "nowhere"),
    ("data is a file", V, "--data photos/ant/00.png", None, "photos/ant/00.png"),
    ("no data for latents", D, NEW_LATENTS + " --data nowhere", None, "nowhere"),
    ("no data for scores", F, "--data nowhere", None, "nowhere"),
    ("no data for the teacher", V, "--vf mini --teacher-data nowhere", None, "nowhere"),
    ("an empty folder", V, "--data empty", folder("empty"), "empty"),
    ("an empty class", V, "", folder("photos/dog"), "photos/dog"),
    ("a class of text", V, "", text("photos/dog/a.txt"), "photos/dog"),
    ("too few to split", V, "--data few", picture("few/ant/0.png"), "few"),
    ("train without val", V, "--data split", picture("split/train/ant/0.png"), "split val"),
    ("train is empty", V, "--data split", folder("split/train"), "split"),
    ("val has a class more", V, "--data split", both(picture("split/train/ant/0.png"),
                                                     picture("split/val/bee/0.png")),
     "split/val bee"),
    ("val lacks images", V, "--data split", both(picture("split/train/ant/0.png"), folder("split/val/ant")),
     "split"),
    ("val lacks a class, whose labels stay", D, NEW_LATENTS + " --data split", both(
        picture("split/train/ant/0.png"), picture("split/train/bee/0.png"), picture("split/val/bee/0.png")),
        "saved", 0),
    ("a cut image", V, "--steps 9", cut("photos/ant/00.png", 0.5), "photos/ant/00.png"),
    ("an empty image", V, "--steps 9", text("photos/ant/00.png", ""), "photos/ant/00.png"),
    ("a text as image", D, NEW_LATENTS, text("photos/ant/00.png"), "photos/ant/00.png"),
    ("a cut image in a loading process", D, NEW_LATENTS + " --workers 1", cut("photos/ant/00.png", 0.5),
     "photos/ant/00.png"),
    ("a missing image in a loading process", V, "--steps 9 --workers 2", both(gone("photos/ant/00.png"), link(
        "photos/ant/00.png", "nowhere")), "photos/ant/00.png"),
    ("a cut test image", F, "", cut("photos/bee/09.png", 0.5), "photos/bee/"),
    ("a folder as image", V, "--steps 9", folder("photos/ant/00.png"), "photos/ant/00.png"),
    ("a broken link", V, "--steps 9", link("photos/ant/zz.png", "nowhere"), "photos/ant/zz.png"),
    ("a pipe as image", V, "--steps 9", lambda root: os.mkfifo(root / "photos/ant/zz.png"),
     "photos/ant/zz.png"),
    ("20000 x 20000", V, "--steps 9", picture("photos/ant/00.png", (20000, 20000), "1"), "photos/ant/00.png"),
    ("a long strip", V, "--steps 9", picture("photos/ant/00.png", (2, 60000), "1"), "photos/ant/00.png"),
    ("floats", V, "--steps 9", picture("photos/ant/00.tiff", mode="F"), "photos/ant/00.tiff"),
    ("a link to its own folder", V, "", link("photos/ant/self", "."), "saved", 0),
    ("a class that is a link to all classes", V, "", link("photos/dog", "."), "photos/dog"),
    # --- resumed with something else
    *[(f"train_vae resumed with {flag}", V, f"{RUN_MINI} {flag}", None,
       flag.replace("--no-", "--")) for flag in (
        "--lr 0.5", "--batch-size 8", "--seed 1", "--steps 7", "--no-flip", "--kl-weight 2.0",
        "--teacher-steps 9",
        "--teacher-data shapes", "--init run/vae.pt", "--precision bf16", "--vf none")],
    *[(f"train_dit resumed with {flag}", D, f"{HALF_DIT} {flag}", None,
       flag.replace("--no-", "--").split()[0]) for flag in (
        "--lr 0.5", "--batch-size 8", "--seed 1", "--steps 7", "--size mini-S", "--ema 0.5", "--no-rope",
        "--init run/dit.pt", "--latent-norm sd-vae", "--class-dropout 0.5")],
    ("resumed with other data", V, RUN_MINI + " --data shapes", None, "--data shapes"),
    ("resumed with fewer images", V, RUN_MINI, gone("photos/ant/03.png"), "--data photos"),
    ("resumed with more images", V, RUN_MINI, picture("photos/ant/zz.png"), "--data photos"),
    ("resumed with another class", V, RUN_MINI, picture("photos/dog/0.png"), "--data photos"),
    ("resumed with renamed images", V, RUN_MINI,
     lambda root: (root / "photos/ant").rename(root / "photos/emu"),
     "--data photos"),
    ("finished, but with other settings", V, "--out run --vf mini --lr 0.5", None, "--lr 0.5"),
    ("another tokenizer", D, HALF_DIT, state("run/vae.pt", state_dict=weights(lambda w: w * 1.01)),
     "run/latents"),
    ("another tokenizer's latents", D, HALF_DIT, both(state("run/vae.pt",
                                                            state_dict=weights(lambda w: w * 1.01)),
     gone("run/latents")), "half/dit.pt", 1, "run/latents"),
    ("other images' latents", D, HALF_DIT, values("run/latents/latents.json", identity="0" * 16),
     "run/latents"),
    ("resumed with other images, new latents", D, HALF_DIT + " --latents new/latents --data photos",
     gone("photos/ant/03.png"), "half/dit.pt"),
    ("latents and --data are not the same images", D, "--data shapes", None, "run/latents"),
    ("an optimizer of nothing", V, RUN_MINI, state("half/vae.pt", optimizer={}), "half/vae.pt"),
    ("moments of other shapes", V, RUN_MINI, state("half/vae.pt", optimizer__state=lambda old: {
        k: v | {"exp_avg": torch.zeros(1)} for k, v in old.items()}), "half/vae.pt"),
    ("moments of NaN", D, HALF_DIT, state("half/dit.pt", optimizer__state=lambda old: {
        k: v | {"exp_avg_sq": v["exp_avg_sq"] * NAN} for k, v in old.items()}), "half/dit.pt"),
    ("moments of another network", D, HALF_DIT, state("half/dit.pt", optimizer={"state": {}, "param_groups": [
        {"params": [0]}]}), "half/dit.pt"),
    ("losses by time of another kind", D, HALF_DIT, state("half/dit.pt", bins=torch.zeros(3, 3)),
     "half/dit.pt"),
    ("more steps done than there are", V, RUN_MINI, state("half/vae.pt", step=99), "half/vae.pt"),
    # --- found by a second hostile reader
    ("another total", V, RUN_MINI, state("half/vae.pt", step=50, total_steps=99), "half/vae.pt"),
    ("another total, dit", D, HALF_DIT, state("half/dit.pt", step=50, total_steps=99), "half/dit.pt"),
    ("steps of true", S, "--fresh", state("run/dit.pt", step=True, total_steps=True), "run/dit.pt"),
    ("a setting that is a tensor", V, RUN_MINI, state("half/vae.pt", settings__lr=torch.zeros(3)),
     "half/vae.pt"),
    ("Adam's step is a vector", D, HALF_DIT, state("half/dit.pt", optimizer__state=lambda old: {
        k: v | {"step": torch.ones(2)} for k, v in old.items()}), "half/dit.pt"),
    ("moments of one weight missing", D, HALF_DIT, state("half/dit.pt", optimizer__state=lambda old: {
        k: v for k, v in old.items() if k}), "half/dit.pt"),
    ("negative variances", F, "", state("run/score_net.pt", state_dict=lambda old: {
        k: v * 0 - 1 if k.endswith("running_var") else v for k, v in old.items()}), "run/score_net.pt"),
    *((f"--init with W of {kind}", V, "--vf mini --init run/vae.pt", state("run/vae.pt", linear_proj=value),
       "run/vae.pt", 1, "new") for kind, value in (("a list", [1]), ("a number", {"weight": 3}))),
    ("PostScript called PNG", V, "--steps 9", ghostscript, "photos/ant/00.png"),
    ("a log of other columns", D, HALF_DIT, text("half/metrics_dit.csv", "step,foo\n1,2\n2,3\n"),
     "half/metrics_dit.csv"),
    ("a log that is a pipe", D, HALF_DIT, pipe("half/metrics_dit.csv"), "half/metrics_dit.csv"),
    ("a tokenizer that is a pipe", D, "", pipe("run/vae.pt"), "run/vae.pt"),
    ("latents begun in float64", D, NEW_LATENTS, both(begun(), array("new/latents/latents.npy",
     lambda old: old.astype(float))), "new/latents", 1, "new/latents/lock"),
    ("latents begun in Fortran's order", D, NEW_LATENTS, both(begun(), array("new/latents/latents.npy",
     np.asfortranarray)), "new/latents", 1, "new/latents/lock"),
    ("marks of text", D, NEW_LATENTS, both(begun(), text("new/latents/marks", "hello")), "new/latents", 1,
     "new/latents/lock"),
    ("a mean of 1e9", D, "", values("run/latents/latents.json", mean=[1e9] * 4), "run/latents"),
    *((f"classes of {kind}", F, "--samples a.npz", array("a.npz", {
        "arr_0": np.zeros((9, 16, 16, 3), np.uint8), "arr_1": np.full(9, 0.5).astype(kind)}), "a.npz")
      for kind in ("float64", "complex128")),
    ("PNGs of a batch of floats", S, "--png", array("run/samples.npz", {"arr_0": np.zeros((8, 16, 16, 3))}),
     "run/samples.npz"),
    ("fewer than none", D, HALF_DIT, state("half/dit.pt", step=-1), "half/dit.pt"),
    ("a log of junk", V, RUN_MINI, text("half/metrics_vae.csv", bytes(range(256))), "half/metrics_vae.csv"),
    ("a log of other words", D, HALF_DIT, text("half/metrics_dit.csv", "a,b\n1,2\n"), "half/metrics_dit.csv"),
    ("a log of odd digits", D, HALF_DIT, text("half/metrics_dit.csv", "step,loss\n1x,2\n"),
     "half/metrics_dit.csv"),
    ("somebody's log", V, "", text("new/metrics_vae.csv", "my notes"), "new/metrics_vae.csv", 1, "none"),
    ("a log that is a folder", D, HALF_DIT, folder("half/metrics_dit.csv"), "half/metrics_dit.csv"),
    # --- checkpoints
    ("no tokenizer", D, "--vae nowhere.pt", None, "nowhere.pt train_vae.py"),
    ("no LightningDiT", S, "--out new", None, "new/dit.pt train_dit.py"),
    ("no tokenizer to sample", S, "--out new --dit run/dit.pt", None, "new/vae.pt"),
    ("no tokenizer to score", F, "--vae nowhere.pt", None, "nowhere.pt"),
    ("nothing to score", F, "--out new", None, "new train_vae.py"),
    ("the wrong checkpoint", D, "--vae run/dit.pt", None, "run/dit.pt"),
    ("the wrong checkpoint, sample", S, "--dit run/vae.pt", None, "run/vae.pt"),
    ("the wrong checkpoint, fid", F, "--vae run/dit.pt", None, "run/dit.pt"),
    ("the wrong checkpoint to resume", V, RUN_MINI, lambda root: shutil.copy(root / "run/dit.pt",
                                                            root / "half/vae.pt"),
     "half/vae.pt"),
    ("an unfinished tokenizer", D, "--vae half/vae.pt", None, "half/vae.pt unfinished 3 6"),
    ("an unfinished tokenizer, sample", S, "--vae half/vae.pt", None, "half/vae.pt unfinished"),
    ("an unfinished tokenizer, fid", F, "--vae half/vae.pt", None, "half/vae.pt unfinished"),
    ("an unfinished LightningDiT", S, "--dit half/dit.pt --out new --vae run/vae.pt", None,
     "half/dit.pt unfinished 3 6"),
    ("an unfinished LightningDiT, asked for", S, "--dit half/dit.pt --out new --vae run/vae.pt --unfinished",
     None,
     "8 images", 0),
    ("a LightningDiT of another tokenizer", S, "--out new --dit run/dit.pt --vae other.pt", both(
        lambda root: shutil.copy(root / "run/vae.pt", root / "other.pt"),
        state("other.pt", state_dict=weights(lambda w: w * 1.01))), "other.pt run/dit.pt"),
    ("code in a checkpoint", D, "--vae evil.pt", text("evil.pt", EVIL), "evil.pt"),
    ("code in a checkpoint, sample", S, "--dit evil.pt", text("evil.pt", EVIL), "evil.pt"),
    ("code in a checkpoint, fid", F, "--vae evil.pt", text("evil.pt", EVIL), "evil.pt"),
    ("code in a checkpoint, init", V, "--init evil.pt", text("evil.pt", EVIL), "evil.pt"),
    ("code in a checkpoint, resumed", V, RUN_MINI, text("half/vae.pt", EVIL), "half/vae.pt"),
    ("a list as checkpoint", D, "--vae list.pt", lambda root: torch.save([1, 2], root / "list.pt"),
     "list.pt"),
    ("a tensor as checkpoint", F, "--vae one.pt", lambda root: torch.save(torch.ones(3), root / "one.pt"),
     "one.pt"),
    ("numbers as names", D, "--vae odd.pt", lambda root: torch.save({1: torch.ones(3)}, root / "odd.pt"),
     "odd.pt"),
    ("a zip as checkpoint", D, "--vae run/samples.npz", None, "run/samples.npz"),
    ("damaged safetensors", D, "--vae a.safetensors", text("a.safetensors"), "a.safetensors"),
    ("empty safetensors", D, "--vae a.safetensors", text("a.safetensors", ""), "a.safetensors"),
    ("safetensors that promise too much", D, "--vae a.safetensors", text("a.safetensors", b"\xff" * 16),
     "a.safetensors"),
    ("no safetensors", D, "--vae nowhere.safetensors", None, "nowhere.safetensors"),
    ("no init", V, "--init nowhere.pt", None, "nowhere.pt"),
    ("init of another spec", V, "--init run/vae.pt --spec mini-f4d8", None, "run/vae.pt mini-f4d8"),
    ("init of a LightningDiT", V, "--init run/dit.pt", None, "run/dit.pt"),
    ("init of a tokenizer", D, "--init run/vae.pt", None, "run/vae.pt"),
    ("no init of a LightningDiT", D, "--init nowhere.pt", None, "nowhere.pt"),
    *[(f"a tokenizer that says {key} {value}", D, "", state("run/vae.pt", **{key: value}),
       "run/vae.pt") for key, value in (
        ("spec__ch", -3), ("spec__ch", "x"), ("spec__ch_mult", ()), ("spec__embed_dim", 10 ** 12),
        ("spec__odd", 1),
        ("settings__image_size", "x"), ("settings__data", 3), ("step", 1.5))],
    *[(f"a LightningDiT that says {key} {value}", S, "", state("run/dit.pt", **{key: value}),
       "run/dit.pt") for key, value in (
        ("arch__depth", -1), ("arch__depth", "x"), ("arch__hidden_size", 10 ** 12), ("arch__num_heads", 0),
        ("arch__odd", 1),
        ("arch__input_size", 8), ("objective", "gan"), ("classes", ["a"]), ("latents__mean", torch.zeros(3)),
        ("latents__std", torch.zeros(1, 4, 1, 1)), ("latents__mean", torch.full((1, 4, 1, 1), NAN)),
        ("latents__std", torch.full((1, 4, 1, 1), INF)), ("latents__shape", [4, 5, 5]), ("latents__shape",
                                                            "x"),
        ("image_size", 64), ("tokenizer__fingerprint", "0"), ("tokenizer", {}))],
    # --- latents
    ("somebody's latents", D, NEW_LATENTS, text("new/latents/latents.npy", "mine"), "new/latents/latents.npy",
     1, "none"),
    ("somebody's labels", D, NEW_LATENTS, text("new/latents/labels.npy", "mine"), "new/latents/labels.npy", 1,
     "none"),
    ("latents is a file", D, "--latents notes", text("notes"), "notes"),
    ("latents in a file", D, "--latents notes/latents", text("notes"), "notes"),
    ("a file that is called latents", D, "--latents run/vae.pt", None, "run/vae.pt"),
    ("another process extracts", D, NEW_LATENTS, hold("new/latents/lock"), "new/latents", 1, "none"),
    *[(f"no {name}", D, "", gone(f"run/latents/{name}"), name) for name in ("labels.npy", "latents.npy")],
    ("no latents.json", D, "", gone("run/latents/latents.json"), "run/latents"),
    *[(f"latents.json {key} {value}", D, "", values("run/latents/latents.json", **{key: value}),
       "run/latents")
      for key in ("classes", "shape", "mean", "std", "fingerprint", "identity", "image_size")
      for value in (None, [], "x", 7, [1, "x"])],
    ("a mean of NaN", D, "", values("run/latents/latents.json", mean=[NAN] * 4), "run/latents"),
    ("a std of 0", D, "", values("run/latents/latents.json", std=[0.0] * 4), "run/latents"),
    ("latents.json is a list", D, "", text("run/latents/latents.json", "[]"), "latents.json"),
    ("latents.json is null", D, "", text("run/latents/latents.json", "null"), "latents.json"),
    ("latents.json is deep", D, "", text("run/latents/latents.json", "[" * 100000), "latents.json"),
    ("labels too short", D, "", array("run/latents/labels.npy", lambda a: a[:-1]), "labels.npy"),
    ("labels too long", D, "", array("run/latents/labels.npy", lambda a: np.r_[a, a]), "labels.npy"),
    ("labels of floats", D, "", array("run/latents/labels.npy", lambda a: a + 0.5), "run/latents"),
    ("labels too large", D, "", array("run/latents/labels.npy", lambda a: a + 1), "run/latents"),
    ("labels below 0", D, "", array("run/latents/labels.npy", lambda a: a - 1), "run/latents"),
    ("labels of two dimensions", D, "", array("run/latents/labels.npy", lambda a: a[:, None]), "run/latents"),
    ("labels of objects", D, "", array("run/latents/labels.npy", lambda a: a.astype(object)), "labels.npy"),
    ("no labels at all", D, "", array("run/latents/labels.npy", lambda a: a[:0]), "run/latents"),
    ("latents of objects", D, "", array("run/latents/latents.npy", lambda a: a.astype(object)),
     "latents.npy"),
    ("latents of float64", D, "", array("run/latents/latents.npy", lambda a: a.astype(float)), "run/latents"),
    ("latents of another shape", D, "", array("run/latents/latents.npy", lambda a: a[..., :2]),
     "run/latents"),
    ("latents without flipped ones", D, "", array("run/latents/latents.npy", lambda a: a[:, :1]),
     "run/latents"),
    ("too few latents", D, "", array("run/latents/latents.npy", lambda a: a[:-1]), "run/latents"),
    ("latents of NaN", D, "", array("run/latents/latents.npy", lambda a: a * np.float16(NAN)), "run/latents"),
    ("latents of infinity", D, "", array("run/latents/latents.npy", lambda a: a + np.float16(INF)),
     "run/latents"),
    ("a header that promises more", D, "", text("run/latents/latents.npy", HUGE_NPY), "latents.npy"),
    ("begun: other settings", D, NEW_LATENTS, begun({"n": 1}), "new/latents", 1, "new/latents/lock"),
    ("begun: note damaged", D, NEW_LATENTS, both(begun(), text("new/latents/filling.json")), "filling.json",
     1, "new/latents/lock"),
    ("begun: note empty", D, NEW_LATENTS, both(begun(), text("new/latents/filling.json", "")), "filling.json",
     1, "new/latents/lock"),
    ("begun: marks cut", D, NEW_LATENTS, both(begun(), cut("new/latents/marks", 2)), "new/latents", 1,
     "new/latents/lock"),
    ("begun: latents cut", D, NEW_LATENTS, both(begun(), cut("new/latents/latents.npy", 0.5)), "new/latents",
     1, "new/latents/lock"),
    ("begun: latents gone", D, NEW_LATENTS, both(begun(), gone("new/latents/latents.npy")), "latents.npy", 1,
     "new/latents/lock"),
    ("begun: labels of another shape", D, NEW_LATENTS, both(begun(), array("new/latents/labels.npy",
                                                            lambda a: a[:3])),
     "new/latents", 1, "new/latents/lock"),
    ("begun with other images", D, NEW_LATENTS, both(begun(), gone("photos/ant/00.png")), "new/latents", 1,
     "new/latents/lock"),
    ("begun with another tokenizer", D, NEW_LATENTS, both(begun(), state("run/vae.pt",
                                                            state_dict=weights(lambda w: w * 1.01))),
     "new/latents", 1, "new/latents/lock"),
    ("begun with another batch", D, NEW_LATENTS + " --extract-batch 4", begun(), "new/latents", 1,
     "new/latents/lock"),
    ("begun and gone on with", D, NEW_LATENTS, begun(), "saved", 0),
    ("authors' latents damaged", D, "--latents theirs", text("theirs/a.safetensors"), "theirs/a.safetensors"),
    ("authors' latents empty", D, "--latents theirs", text("theirs/a.safetensors", ""),
     "theirs/a.safetensors"),
    # --- samples
    ("samples with other settings", S, "--seed 1", None, "run/samples.npz seed"),
    ("more samples", S, "--num 9", None, "run/samples.npz num"),
    ("samples of another LightningDiT", S, "", state("run/dit.pt", ema=weights(lambda w: w * 1.01)),
     "run/samples.npz"),
    ("somebody's samples", S, "", array("run/samples.npz", {"meta": None}), "run/samples.npz"),
    ("samples whose origin is a list", S, "", array("run/samples.npz", {"meta": np.array("[]")}),
     "run/samples.npz"),
    ("samples whose origin is no JSON", S, "", array("run/samples.npz", {"meta": np.array("x")}),
     "run/samples.npz"),
    ("samples of objects", S, "", array("run/samples.npz", {"meta": np.array({}, object)}),
     "run/samples.npz"),
    ("samples.npz of somebody, none yet", S, "--out new --dit run/dit.pt --vae run/vae.pt",
     text("new/samples.npz"),
     "new/samples.npz", 1, "none"),
    ("somebody's parts", S, "--seed 1 --fresh", text("run/samples_parts/arr_0.npy", "mine"), "samples_parts",
     1, "none"),
    ("somebody's folder of parts", S, "", text("run/samples_parts/notes.txt", "mine"), "finished", 0, "none"),
    ("another process samples", S, "--fresh", hold("run/samples_parts/lock"), "run/samples_parts", 1, "none"),
    ("PNGs among which new ones would be", S, "--out new --dit run/dit.pt --vae run/vae.pt --png",
     picture("new/samples/000099.png"), "new/samples", 1, "none"),
    ("samples is a file", S, "--png", text("run/samples"), "run/samples"),
    ("out is a file", S, "--out run/vae.pt/x --dit run/dit.pt --vae run/vae.pt", None, "run/vae.pt"),
    ("guidance without a null class", S, "--out new --vae run/vae.pt --dit no.pt", both(
        lambda root: shutil.copy(root / "run/dit.pt", root / "no.pt"), state(
            "no.pt", arch__class_dropout_prob=0.0,
            ema=lambda old: old | {"y_embedder.embedding_table.weight": old[
                "y_embedder.embedding_table.weight"][:-1]})), "--cfg-scale"),
    # --- scores
    *[(f"score {name}", F, f"--samples {path}", prepare, path) for name, path, prepare in (
        ("nothing", "nowhere.npz", None), ("an empty folder", "empty", folder("empty")), ("a text", "a.npz",
                                                            text("a.npz")),
        ("an empty .npz", "a.npz", text("a.npz", "")), ("a cut .npz", "run/samples.npz",
                                                        cut("run/samples.npz", 0.7)),
        ("other numbers", "a.npz", array("a.npz", {"arr_0": np.zeros((9, 16, 16, 3))})),
        ("grey pictures", "a.npz", array("a.npz", {"arr_0": np.zeros((9, 16, 16), np.uint8)})),
        ("no pictures", "a.npz", array("a.npz", {"arr_0": np.zeros((0, 16, 16, 3), np.uint8)})),
        ("objects", "a.npz", array("a.npz", {"arr_0": np.array([{}] * 9)})),
        ("other names", "a.npz", array("a.npz", {"x": np.zeros((9, 16, 16, 3), np.uint8)})),
        ("too few labels", "a.npz", array("a.npz", {"arr_0": np.zeros((9, 16, 16, 3), np.uint8),
                                                    "arr_1": np.zeros(3, int)})),
        ("labels of text", "a.npz", array("a.npz", {"arr_0": np.zeros((9, 16, 16, 3), np.uint8),
                                                    "arr_1": np.array(["a"] * 9)})),
        ("another size", "a.npz", array("a.npz", {"arr_0": np.zeros((9, 32, 32, 3), np.uint8)})),
        ("a bad header", "a.npz", bad_header("a.npz")), ("a flipped bit", "a.npz", flipped("a.npz")),
        ("an .npy", "run/latents/latents.npy", None), ("a checkpoint", "run/vae.pt", None),
        ("a folder with a cut picture", "run/shots", both(picture("run/shots/0.png"),
                                                          picture("run/shots/1.png"),
         picture("run/shots/2.png"), cut("run/shots/1.png", 50))),
        ("a folder of two sizes", "run/shots", both(picture("run/shots/0.png"), picture("run/shots/1.png"),
         picture("run/shots/2.png", (20, 20)))),
        ("one picture", "run/shots", picture("run/shots/0.png")))],
    *[(f"reference: {name}", F, f"--reference {path}", prepare, path) for name, path, prepare in (
        ("nothing", "nowhere.npz", None), ("a text", "a.npz", text("a.npz")), ("an empty folder", "empty",
                                                            folder("empty")),
        ("another size", "a.npz", array("a.npz", {"arr_0": np.zeros((9, 32, 32, 3), np.uint8)})),
        ("statistics of NaN", "a.npz", array("a.npz", {"mu": np.full(2048, NAN), "sigma": np.zeros((2048,
                                                            2048))})),
        ("statistics of another network", "a.npz", array("a.npz", {"mu": np.zeros(7), "sigma": np.zeros((7,
                                                            7))})),
        ("statistics for Inception", "a.npz", array("a.npz", {"mu": np.zeros(2048), "sigma": np.zeros((2048,
                                                            2048))})),
        ("neither", "a.npz", array("a.npz", {"x": np.zeros(3)})))],
    ("scores.json is a folder", F, "", folder("run/scores.json"), "run/scores.json"),
    ("another score network", F, "--steps 3", None, "run/scores.json", 0, "run/score"),
    ("damaged scores are kept", F, "", text("run/scores.json"), "run/scores-1.json", 0, "run/score"),
    *[(f"uniformity of {name}", F, f"--embedding pca --uniformity {path}", prepare, path) for name, path,
      prepare in (
        ("nothing", "nowhere.npy", None), ("a text", "a.npy", text("a.npy")), ("an empty file", "a.npy",
                                                            text("a.npy", "")),
        ("an empty folder", "empty", folder("empty")), ("NaN", "a.npy", array("a.npy", np.full((50, 4),
                                                            NAN))),
        ("infinity", "a.npy", array("a.npy", np.full((50, 4), INF))), ("one point", "a.npy", array("a.npy",
                                                            np.ones((50, 4)))),
        ("a line", "a.npy", array("a.npy", np.outer(np.arange(50), np.ones(4)))),
        ("one dimension", "a.npy", array("a.npy", np.arange(50.0))),
        ("one column", "a.npy", array("a.npy", np.arange(50.0)[:, None])), ("two", "a.npy", array("a.npy",
                                                            np.eye(2))),
        ("none", "a.npy", array("a.npy", np.zeros((0, 4)))), ("words", "a.npy", array("a.npy", np.array([["a",
                                                            "b"]] * 50))),
        ("objects", "a.npy", array("a.npy", np.array([[{}, 1]] * 50))), ("complex numbers", "a.npy",
                                                            array("a.npy", np.eye(9) * 1j)),
        ("absurd numbers", "a.npy", array("a.npy", np.eye(9) * 1e200)), ("a number", "a.npy", array("a.npy",
                                                            np.array(3.0))),
        ("three dimensions", "a.npy", array("a.npy", np.zeros((50, 4, 4)))), ("a promise", "a.npy",
                                                            text("a.npy", HUGE_NPY)),
        ("a checkpoint", "run/vae.pt", None), ("a picture", "photos/ant/00.png", None), ("an .npz",
                                                            "run/samples.npz", None),
        ("latents without labels", "run/latents", gone("run/latents/labels.npy")),
        ("equal latents", "run/latents", array("run/latents/latents.npy", lambda a: a * 0)))],
    # --- places
    *[(f"{script}: out is a file", script, f"--out notes {flags}", text("notes"), "notes") for script,
      flags in (
        (V, ""), (D, ""), (S, "--dit run/dit.pt --vae run/vae.pt"), (F, "--vae run/vae.pt"))],
    *[(f"{script}: out is read-only", script, f"--out new {flags}", read_only("new"), "new") for script,
      flags in (
        (V, ""), (D, ""), (D, NEW_LATENTS), (S, "--dit run/dit.pt --vae run/vae.pt"), (F, "--vae run/vae.pt"),
        (F, "--embedding pca --uniformity run/latents"))],
    *[(f"{script}: the disk is full, {size} {flags}", script, f"--out new {flags}", small_disk("new", size),
       "new")
      for script, flags, size in (
        (V, "", "200k"), (V, "", "4k"), (D, "", "1m"), (D, NEW_LATENTS, "8k"), (D, NEW_LATENTS, "16k"),
        (S, "--dit run/dit.pt --vae run/vae.pt", "8k"), (S, "--dit run/dit.pt --vae run/vae.pt", "32k"), (F,
                                                            "--vae run/vae.pt", "100k"))],
    ("the out of another's run", V, "", hold("new/metrics_vae.csv"), "new/metrics_vae.csv", 1, "none"),
    ("reconstructions.png is a folder", V, "", folder("new/reconstructions.png"), "new/reconstructions.png"),
    ("dit.pt is a folder", D, "--out new", folder("new/dit.pt"), "new/dit.pt"),
    # --- processes and signals
    *[(f"{script}: {name}={value}", script, "", variables(**{name: value}), name) for script in MAIN
      for name, value in (("WORLD_SIZE", "0"), ("WORLD_SIZE", "abc"), ("RANK", "3"), ("RANK", "-1"),
                          ("LOCAL_RANK", "x"))],
    ("RANK beyond WORLD_SIZE", D, "", variables(WORLD_SIZE="2", RANK="2"), "RANK WORLD_SIZE"),
    ("no port", D, "", variables(WORLD_SIZE="2"), "MASTER_PORT"),
    ("a port of letters", D, "", variables(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="x"),
     "MASTER_PORT"),
    ("no address", D, "", variables(WORLD_SIZE="2", RANK="0", MASTER_PORT="29777"), "MASTER_ADDR"),
    ("srun without torchrun", S, "", variables(SLURM_STEP_NUM_TASKS="2"), "srun"),
    *[(f"{script}: signal {number}{name}", script, flags, sent(number, when), "", 128 + number,
       "new|run/score|run/samples_parts")
      for number in (signal.SIGINT, signal.SIGTERM) for script, name, flags, when in (
        (V, " in training", "--steps 100000", "new/vae.pt"), (D, " in training", "--steps 100000",
                                                            "new/dit.pt"),
        (S, " while it samples", "--out new --dit run/dit.pt --vae run/vae.pt --num 100000",
         "new/samples_parts/marks"))],
    *[(f"{script}: Ctrl-C{name}", script, flags, sent(signal.SIGINT, when), "interrupted", 130,
       "new|run/score")
      for script, name, flags, when in (
        (V, " with the teacher", "--vf mini --teacher-steps 100000", 0.5),
        (D, " in extraction", NEW_LATENTS + " --data shapes --image-size 16", "new/latents/marks"),
        (F, "", "--steps 100000", 0.5), (F, " in uniformity", ("--uniformity run/latents --uniformity-seeds "
                                                              "100000"), 0.5))],
]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_mistake(case, finished, tmp_path):
    _name, script, flags, prepare, words, *rest = case
    want, may = {0: (1, NEW), 1: (*rest, NEW), 2: rest}[len(rest)]
    root = tmp_path / "here"
    shutil.copytree(finished, root, symlinks=True)
    try:
        inside = prepare(root) if prepare else None
        before = tree(root)
        status, out, lines = run(script, flags.split(), root, inside)
        after = tree(root)
    finally:
        while HELD:
            held = HELD.pop()
            if isinstance(held, int):
                os.kill(held, signal.SIGKILL)
                os.waitpid(held, 0)
            else:
                os.system(f"umount {held}")
    assert status == want, (status, out[-500:], lines[-12:])
    lines = [line for line in lines if not line.startswith("Downloading: ")]   # torch.hub's, in torch 2.6
    if want:
        assert len(lines) == 1 and lines[0].startswith(f"{script}.py: "), lines[-12:]
        assert len(lines[0]) < 1500 and all(word in lines[0] for word in words.split()), lines
        assert ("error: " in lines[0]) == (want == 1)
    else:
        assert not lines and words in out, (lines, out)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert not [path for path in after if path.endswith(".tmp")]
    assert not [path for path in changed if not re.match(may, path)], changed
