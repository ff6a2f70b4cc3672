"""A student's folder: the scripts without the functions of this set and all later ones, tests, texts."""
import ast
import re
import shutil
import textwrap
from pathlib import Path

from course import EXERCISES, HERE, NAMES, ROOT, RUN_POINTS, SCRIPTS, SETS, TEXTS, of_set, questions
from worker import bound, find

# A handout must not say what an exercise wants looked up in the paper. These docstrings end before these
# words:
DOCSTRING_ENDS = {"Posterior.kl": ": a SUM", "reconstruction_loss": ": LDM's sum",
                  "marginal_cosine_loss": " margin:", "marginal_distance_matrix_loss": " margin:"}
# In the handouts of sets 1 to `last`, these words are replaced: (last, file, words, replacement). `scatter`
# of fid.py would show exercise 5.5's solution; there it paints all points in one colour.
LEFT_OUT = [
    (1, "train_vae.py", "L_rec and the KL loss are sums over the 196,608 values of an image and ", ""),
    (1, "train_vae.py", "the 8,192 values\n    # of its latent (f16d32) [Sec. 3.3], ", ""),
    (1, "train_vae.py", "like the likelihood and the KL divergence of a VAE. In the bound", ""),
    (1, "train_vae.py", " of a\n    # plain VAE the KL divergence has the weight 1;", ""),
    (1, "train_vae.py", " LDM's 1e-6 leaves only a slight pull towards N(0, I).", ""),
    (2, "vf_loss.py", "   the latent at each position points in the direction of the feature", ""),
    (2, "vf_loss.py", "   the latents of two positions are as similar as their features", ""),
    (2, "vf_loss.py", "   the ratio of two gradient norms at the encoder's last layer", ""),
    (4, "train_dit.py", ", x_t = t x1 + (1 - t) x0, v = x1 - x0", ""),
    (5, "fid.py", "from scipy.stats import gaussian_kde\n", ""),
    (5, "fid.py", "gaussian_kde(points.T)(points.T)", "np.ones(len(points))")]
# Rows of DEVIATIONS.md with these words tell how an exercise is solved.
TELLING = ("+ 1e-4 in the denominator", "linspace(0, 1, 250)", "eps inside", "singular values")


class Refused(Exception):
    """An error that the command line prints before it stops."""

def replace_body(source, name, body):
    """The source with `body` as the lines of the function `name` after its docstring."""
    (statements, i), lines = find(ast.parse(source), name), source.splitlines()
    node = statements[i]
    first, indent = node.body[0], " " * (node.col_offset + 4)
    start = first.lineno - 1 if ast.get_docstring(node) is None else first.end_lineno
    while lines[start - 1].lstrip().startswith("#"):     # comments above the first statement
        start -= 1
    new = [indent + line if line else "" for line in body]
    return "\n".join([*lines[:start], *new, *lines[node.end_lineno:]]) + "\n"

def shorten_docstring(source, name, arguments):
    """Source with only the first sentence of this function's docstring, or, with `arguments`, only what comes
    before its first arrow: the rest may be a hint."""
    body, i = find(ast.parse(source), name)
    text, lines = ast.get_docstring(body[i]), source.splitlines()
    if not text:
        return source
    text = " ".join(text.split()).split(DOCSTRING_ENDS.get(name, "\n"))[0]
    node, first = body[i].body[0], re.match(r".+?\.(?= [A-Z]|$)|.+", text)[0]
    first, indent = first.split(" -> ")[0] if arguments else first, " " * node.col_offset
    new = textwrap.wrap(f'"""{first}"""', 106, initial_indent=indent, subsequent_indent=indent,
                        break_on_hyphens=False)
    return "\n".join([*lines[:node.lineno - 1], *new, *lines[node.end_lineno:]]) + "\n"

def stubbed(file, exercises, source=None):
    """The text of a script without the bodies of these exercises' functions."""
    source = source or (ROOT / file).read_text()
    for e in exercises:
        for name in e.names if e.file == file else ():
            line = f'raise NotImplementedError("exercise {e.number}, {name}: see ASSIGNMENT.md")'
            source = replace_body(source, name, ["# YOUR CODE HERE", line])
            source = shorten_docstring(source, name, e.arguments)
    return source

# --- The student's own tests ----------------------------------------------------------------------------
IMPORTS = [  # in the order in which ruff wants them
    {"math": "import math", "types": "import types"},
    {"np": "import numpy as np", "torch": "import torch", "F": "import torch.nn.functional as F",
     "nn": "from torch import nn"},
    {name[:-3]: f"import {name[:-3]}" for name in sorted(SCRIPTS)}]
HEAD = '"""Your own check: python -m pytest -k KEY, keys as in ASSIGNMENT.md. The grader looks further."""\n'
ASK = '''def student(work):
    """Your answer."""
    return work()'''

def definitions(path):
    """{name: (tree without decorators, its text)} of the functions, classes and constants of a file."""
    source, found = path.read_text(), {}
    lines = source.splitlines()
    for n in ast.parse(source).body:
        one_name = isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) or one_name:
            n.decorator_list = []
            found[min(bound(n))] = n, "\n".join(lines[n.lineno - 1:n.end_lineno])
    return found

def test_name(exercise, function):
    """-k KEY runs this exercise's tests alone: the key stands in the name, and no other key does."""
    return f"test_{exercise.key}__{function.__name__.removeprefix(exercise.key).strip('_')}"

def public_tests(exercises):
    """A pytest file of the public checks of these exercises, with the helpers that they use."""
    known = definitions(HERE / "checks.py")
    for number in sorted({e.set for e in exercises}):
        known |= definitions(HERE / f"set{number}.py")
    tests = {c.function.__name__: test_name(e, c.function) for e in exercises for c in e.checks if c.public}
    needed, pending = set(tests), list(tests)
    while pending:
        used = {n.id for n in ast.walk(known[pending.pop()][0]) if isinstance(n, ast.Name)}
        new = used & known.keys() - needed - {"student"}
        needed |= new
        pending += new
    parts, used = [ASK], set()
    for name, (node, text) in known.items():
        if name in needed:
            used |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            parts.append(text.replace(f"def {name}(", f"def {tests.get(name, name)}(", 1))
    groups = ["\n".join(line for name, line in group.items() if name in used) for group in IMPORTS]
    return "\n\n\n".join([HEAD + "\n\n".join(filter(None, groups)), *parts]) + "\n"

# --- The texts ------------------------------------------------------------------------------------------
RULES = """\
{exercises} exercises, {questions} questions and a run, {points} points, on the paper *Reconstruction vs.
Generation* (arXiv 2501.01423): about {hours:.0f} hours for exercises and questions, besides reading
and the run. Have it beside you: [Eq. 2] and the like say where to
look, and formulas that the paper prints are not repeated here.

**What to do.** In the scripts the functions of the table below have lost their bodies: look for `# YOUR
CODE HERE` with this set's number. Write them; name and arguments stay. You may add imports, functions and
constants to the same file, and methods to the same class. Changes to other functions do not count.
{given}

**How to check.** `pip install -r requirements.txt`, then `python -m pytest` here, or `python -m pytest -k
{key}` for one exercise. These tests hold worked examples; the grader looks further: other sizes,
dtypes, gradients, inputs that must stay as they are. Any right solution passes, whatever its form. Each
exercise is marked with all others right, so a mistake costs once.

**What to hand in.** {files}, your answers to the questions, and what "Now run it" asks for: {run}
points, two for numbers or a picture in the range that is named there, one for what you write about them.
"""
HINT = re.compile(r"^\*\*Hint (\d)\.\*\* (.+(?:\n(?!\n).+)*)", re.MULTILINE)

def assignment(number):
    """ASSIGNMENT.md of a set."""
    chosen, text = of_set(number), TEXTS[number]
    asked = questions(text)
    points = sum(e.total for e in chosen) + sum(n for _, n in asked) + RUN_POINTS
    hours = (sum(e.minutes for e in chosen) + 5 * sum(n for _, n in asked)) / 60
    earlier = ", ".join(f"{s} ({NAMES[s]})" for s in SETS if s < number)
    given = f"Solved and given are the functions of the earlier sets: {earlier}. " * bool(earlier)
    given += "The functions of later sets are empty, too, and nothing here needs them." * (number != SETS[-1])
    files = ", ".join(f"`{file}`" for file in SCRIPTS if any(e.file == file for e in chosen))
    table = ["| | key | tier | function | read | points | minutes |", "|---|---|---|---|---|---|---|"]
    for e in chosen:
        names = ", ".join(f"`{n}`" for n in e.names) + f" in {e.file}"
        table.append(f"| {e.number} | {e.key} | {e.tier} | {names} | {e.paper} | {e.total} | {e.minutes} |")
        text = re.sub(rf"(### {re.escape(e.number)} .+\n)(.+?)(?: \| docstring to ->)?\npoints: (.+\n)",
                      rf"\1\n\2\n\n**{e.total} points**: \3", text)
    text = HINT.sub(r"<details><summary>Hint \1</summary>\n\n\2\n\n</details>", text)
    title, _, rest = text.partition("\n")
    rules = RULES.format(exercises=len(chosen), questions=len(asked), points=points, hours=hours, given=given,
                         files=files, run=RUN_POINTS, key=chosen[1].key)
    return "\n".join([title, "", rules, *table]) + "\n" + rest

def handout(folder, number):
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    empty = [e for e in EXERCISES.values() if e.set >= number]
    for file in SCRIPTS:
        text = stubbed(file, empty)
        for last, where, said, instead in LEFT_OUT:
            if where == file and number <= last:
                assert said in text, (file, said)
                text = text.replace(said, instead)
        (folder / file).write_text(text)
    (folder / "ASSIGNMENT.md").write_text(assignment(number))
    (folder / "requirements.txt").write_text((ROOT / "requirements.txt").read_text() + "pytest\nmatplotlib\n")
    (folder / f"test_set{number}.py").write_text(public_tests(of_set(number)))
    extra = [HERE / "experiments.md"] if number == SETS[-1] else []
    for path in [*HERE.glob(f"run_set{number}*.py"), *extra]:
        shutil.copy(path, folder)
    rows = (ROOT / "tests" / "DEVIATIONS.md").read_text().splitlines(keepends=True)
    kept = [row for row in rows if not any(words in row for words in TELLING)]
    (folder / "DEVIATIONS.md").write_text("".join(kept))
