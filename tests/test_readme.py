"""The README's promises that a machine can check: names in its map exist, its tables are the sources' presets, pictures are there."""
import ast
import re
from pathlib import Path

import pytest

from train_dit import LADDER
from train_dit import PRESETS as DIT_PRESETS
from train_vae import ROWS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = README.split("## Which line does what")[1].split("\n## ")[0]
FILES = re.findall(r"`([a-z_]+\.py)`(?:: ((?:`\w+`(?:, )?)+))?", MAP)


def names(path):
    """Functions, classes and constants at the top level of a file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


@pytest.mark.parametrize("file", sorted({file for file, _ in FILES}))
def test_every_name_in_the_map_exists(file):
    path = ROOT / "tests" / file if file.startswith("test_") else ROOT / file
    wanted = {name for f, listed in FILES if f == file for name in re.findall(r"`(\w+)`", listed)}
    assert wanted <= names(path), wanted - names(path)


def test_the_map_reaches_every_script_and_equation():
    assert {"vae.py", "vf_loss.py", "dit.py", "train_vae.py", "train_dit.py", "sample.py", "fid.py"} <= {file for file, _ in FILES}
    assert all(f"Eq. {i}" in MAP for i in range(1, 6))


def test_equation_tags_stand_in_the_code():
    source = "".join((ROOT / f).read_text(encoding="utf-8") for f in ("vf_loss.py", "train_vae.py"))
    assert all(f"[Eq. {i}]" in source for i in range(1, 6))


def test_preset_tables_are_the_sources():
    for name, (_, scores) in ROWS.items():
        row = next((line for line in README.splitlines() if line.startswith(f"| `{name}` |")), None)
        assert row, name
        cells = [cell.strip() for cell in row.split("|")[3:-1]]
        for cell, score in zip(cells, scores or ()):
            assert cell == "" if score is None else float(cell) == score, (name, cell)
    for i, (trick, _, fid) in enumerate(LADDER):
        row = next(line for line in README.splitlines() if line.startswith(f"| `table1-{i}` |"))
        assert trick in row and f"{fid:.2f}" in row
    assert all(f"`{name}`" in README for name in DIT_PRESETS if name.startswith("lightningdit-xl"))


def test_pictures_and_files_that_it_names_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    assert not re.search(r"@[A-Z]+@", README), "a number was not filled in"
