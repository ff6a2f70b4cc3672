"""The README's promises that a machine can check: the names, tests, flags, presets and pictures in it exist,
it is short, and no number waits to be filled in."""
import ast
import importlib
import re
import shlex
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("vae.py", "vf_loss.py", "train_vae.py", "dit.py", "train_dit.py", "sample.py", "fid.py")
BANNER = "# === Plumbing: nothing of the paper below this line ==="
# file: names, where a row of the map has several files
MAP = README.split("## Which line does what")[1].split("\n## ")[0]
ROWS = [line for line in MAP.splitlines() if "`" in line]
FILES = re.findall(r"`((?:tests/)?\w+\.py)`: ((?:`\w+`(?:, )?)+)", "\n".join(ROWS))
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
def test_every_name_in_the_map_exists(file):
    wanted = {name for found, names in FILES if found == file for name in re.findall(r"\w+", names)}
    assert wanted <= definitions(ROOT / file), wanted - definitions(ROOT / file)


def test_every_test_in_the_map_exists():
    tests = [definitions(path) for path in (ROOT / "tests").glob("test_*.py")]
    for row in ROWS:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert all(any(name in found for found in tests) for name in named), named


def test_the_map_and_the_reading_order_reach_every_script_and_equation():
    paper = " ".join(row.split("|")[1] for row in ROWS)
    assert set(SCRIPTS) <= {file for file, _ in FILES}
    assert all(f"Eq. {i}" in paper or f", {i}:" in paper for i in range(1, 6))
    # in the supplement's tables as in the paper's: "Tables 1 to 5, A1 to A3", "Table A4"
    assert all(part in paper for part in ("Table 1", "Table 3", "Table 4", "Table 6", "Table A4", "A1 to A3"))
    order = re.findall(r"^\d\. `(\w+\.py)`", README, re.MULTILINE)
    assert order == list(SCRIPTS)


def test_every_trick_of_table_1_has_a_row():
    tricks = importlib.import_module("train_dit").LADDER[1:]
    for trick, _ in tricks:
        word = trick.removeprefix("+ ").replace("AdamW beta2 = 0.95", "beta2").replace(" = 1 & VA-VAE", " 1")
        word = word.replace("batchsize", "batch")
        assert word in "\n".join(ROWS), trick


def test_equation_tags_and_the_banner_stand_in_the_code():
    source = {name: (ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS}
    assert all(f"[Eq. {i}]" in source["vf_loss.py"] + source["train_vae.py"] for i in range(1, 6))
    assert BANNER in README and all(text.count(f"\n{BANNER}\n") == 1 for text in source.values())


def commands():
    """(module, [words]) of every `python SCRIPT.py ...` and `torchrun ... SCRIPT.py ...` in the README."""
    found = []
    for line in CODE:
        for part in line.split("&&"):
            words = shlex.split(part.replace("...", ""), comments=True)
            script = next((word for word in words if word.endswith(".py") and "/" not in word), None)
            if script and (ROOT / script).exists() and words.index(script) + 1 < len(words):
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


def test_presets_and_flags_that_the_text_names_exist():
    modules = [importlib.import_module(name) for name in ("train_vae", "train_dit", "sample", "fid")]
    presets = {preset for module in modules for preset in module.PRESETS}
    named = re.findall(r"`((?:table\w*|lightningdit|vavae-long|official)-[\w.-]+)`", README)
    named += re.findall(r"`(vavae-long-\d)", README)
    assert set(named) - {"-l", "-xl"} <= presets, set(named) - presets
    flags = {"--" + field.name.replace("_", "-") for module in modules for field in fields(module.Settings)}
    others = {"--row", "--table", "--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint", "--"}
    text = {word for code in CODE for word in re.findall(r"(?<![\w-])--[\w-]*", code)}
    # of tests/coursework.py, docker, torchrun and Slurm
    others |= {"--set", "--exercises", "--csv", "--json", "--rm", "--network", "--ntasks-per-node"}
    others |= {"--signal", "--shutdown-timeout", "--help"}
    assert text <= flags | others, text - flags - others


def test_pictures_and_files_that_it_names_exist():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    claims = (ROOT / "tests" / "CLAIMS.md").read_text(encoding="utf-8")
    assert {"assets/samples.png", "assets/reconstructions.png", "assets/claims.png"} <= set(targets)
    assert all((ROOT / target).exists() for target in targets)
    assert all((ROOT / "tests" / target).exists() for target in re.findall(r"\]\((\.\.[^)]+)\)", claims))


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@\w+@", README)


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 220
    # tables and commands cannot be wrapped
    assert all(len(line) <= 110 for line in lines if not line.startswith(("|", "    ", "![")))
