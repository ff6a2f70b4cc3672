"""What the README, PAPER_MAP.md and DEVIATIONS.md promise and a machine can check: the names, tests, flags,
presets and pictures in them exist, the counts are true, and nothing waits to be filled in."""
import ast
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAPER_MAP = (ROOT / "tests" / "PAPER_MAP.md").read_text(encoding="utf-8")
DEVIATIONS = (ROOT / "tests" / "DEVIATIONS.md").read_text(encoding="utf-8")
SCRIPTS = ("vae.py", "vf_loss.py", "train_vae.py", "dit.py", "train_dit.py", "sample.py", "fid.py")
BANNER = "# === Plumbing: files, flags, processes ==="
ROWS = [line for line in PAPER_MAP.splitlines() if "`test_" in line]
# file: names, in the full map and in the README's short one
FILES = re.findall(r"`((?:tests/[\w/]*)?\w+\.py)`: ((?:`\w+`(?:, )?)+)", PAPER_MAP + README)
# every command line, from code blocks and from inside the text
CODE = re.findall(r"^    (.+)$", README, re.MULTILINE) + re.findall(r"`([^`]+)`", README)


def definitions(path):
    """Functions, classes and constants at the top level of a file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


@pytest.mark.parametrize("file", sorted({file for file, _ in FILES}))
def test_every_name_in_the_maps_exists(file):
    wanted = {name for found, names in FILES if found == file for name in re.findall(r"\w+", names)}
    assert wanted <= definitions(ROOT / file), wanted - definitions(ROOT / file)


def test_every_test_in_the_map_exists():
    tests = set.union(*(definitions(path) for path in (ROOT / "tests").rglob("test_*.py")))
    files = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    named = set(re.findall(r"`(test_\w+)`", PAPER_MAP)) - files
    assert named and named <= tests, named - tests


def test_the_map_and_the_reading_order_reach_every_script_and_equation():
    paper = " ".join(row.split("|")[1] for row in ROWS)
    assert set(SCRIPTS) <= {file for file, _ in FILES}
    assert all(f"Eq. {i}" in paper or f", {i}:" in paper for i in range(1, 6))
    assert all(part in paper for part in ("Table 1", "Table 3", "Table 4", "Table 6", "Table A4", "A1 to A3"))
    assert re.findall(r"^\| \d\. `(\w+\.py)`", README, re.MULTILINE) == list(SCRIPTS)


def test_every_trick_of_table_1_has_a_row():
    for trick, _ in importlib.import_module("train_dit").LADDER[1:]:
        word = trick.removeprefix("+ ").replace("AdamW beta2 = 0.95", "beta2").replace(" = 1 & VA-VAE", " 1")
        assert word.replace("batchsize", "batch") in "\n".join(ROWS), trick


def test_the_numbers_of_lines_in_the_reading_order_are_true():
    for name in SCRIPTS:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        counts = f"| {len(lines)}, {lines.index(BANNER)} |"
        row = next(line for line in README.splitlines() if f". `{name}` |" in line)
        assert counts in row, (counts, row)


def test_equation_tags_and_the_banner_are_in_the_code():
    source = {name: (ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS}
    assert all(f"[Eq. {i}]" in source["vf_loss.py"] + source["train_vae.py"] for i in range(1, 6))
    assert BANNER in README and all(text.count(f"\n{BANNER}\n") == 1 for text in source.values())


def commands():
    """(module, [words]) of every `python SCRIPT.py ...` and `torchrun ... SCRIPT.py ...` in the README."""
    found = []
    for line in CODE:
        try:
            words = shlex.split(line.replace("...", ""), comments=True)
        except ValueError:  # an apostrophe in Python code
            continue
        script = next((word for word in words if word.endswith(".py") and "/" not in word), None)
        if script in SCRIPTS and words.index(script) + 1 < len(words):
            found.append((script, words[words.index(script) + 1:]))
    return found


@pytest.mark.parametrize("script, words", commands())
def test_flags_and_presets_of_its_commands_exist(script, words):
    module = importlib.import_module(script.removesuffix(".py"))
    flags = {"--" + field.name.replace("_", "-") for field in fields(module.Settings)}
    assert {word for word in words if word.startswith("--")} <= flags
    for flag, value in pairwise(words):
        if flag == "--preset":
            assert value in module.PRESETS, value
        if flag == "--spec":
            assert value in importlib.import_module("vae").SPECS, value


def test_presets_and_flags_that_the_texts_name_exist():
    modules = [importlib.import_module(name) for name in ("train_vae", "train_dit", "sample", "fid")]
    presets = {preset for module in modules for preset in module.PRESETS}
    for text in (README, DEVIATIONS):
        named = set(re.findall(r"`((?:table\w*-|lightningdit-|vavae-long-|official-)[\w.-]+)`", text))
        assert named <= presets, named - presets
    flags = {"--" + field.name.replace("_", "-") for module in modules for field in fields(module.Settings)}
    code = CODE + re.findall(r"`([^`]+)`", DEVIATIONS)
    text = {word for line in code for word in re.findall(r"(?<![\w-])--[\w-]+", line)}
    torchrun = {"--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint", "--ntasks-per-node"}
    # of tests/coursework, tests/claims, tests/bench.py, Slurm, docker and the scripts' parser
    others = torchrun | {"--signal", "--help", "--set", "--csv", "--show", "--table", "--seconds", "--ipc",
                         "--shm-size", "--network", "--rm", "--jobs", "--report", "--study", "--no-compile"}
    assert text <= flags | others, text - flags - others


def test_pictures_and_files_that_the_texts_name_exist():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert {"assets/samples.png", "assets/reconstructions.png"} <= set(targets)
    assert all((ROOT / target).exists() for target in targets), targets
    unused = {path.name for path in (ROOT / "assets").iterdir()} - {Path(target).name for target in targets}
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.md"))
    assert not [name for name in unused if name not in pages]


def test_its_python_runs(tmp_path):
    """The lines under "From Python", on checkpoints of two steps."""
    def script(*words):
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    from train_vae import draw_shape
    for i in range(100):  # ten classes of ten pictures
        path = tmp_path / "data" / f"class{i % 10}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_shape(0, i).save(path)
    small = ("--steps", "2", "--batch-size", "4", "--out", str(tmp_path / "runs" / "mini"))
    script("train_vae.py", *small, "--vf", "none", "--data", str(tmp_path / "data"))
    script("train_dit.py", *small, "--size", "mini-XS")
    code = README.split("### From Python")[1].split("\n\n")[1]
    lines = "\n".join(line.removeprefix("    ") for line in code.splitlines())
    lines = lines.replace('"runs/mini', f'"{tmp_path}/runs/mini')
    done = subprocess.run([sys.executable, "-c", lines + "\nprint(images.shape, latents.shape)"], cwd=ROOT,
                          check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([10, 3, 32, 32]) torch.Size([10, 8, 8, 8])"


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[\w.]+@", README + PAPER_MAP + DEVIATIONS)
