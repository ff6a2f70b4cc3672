"""The course as data: what the Markdown files and the checks beside them say.

Each set is two files, setN.md and setN.py. The Markdown holds title, text, points, hints, questions and the
task at the end; an instructor may edit all of it. An exercise begins with three lines of this form:

    ### 2.2 `eq2` The marginal cosine loss
    core | vf_loss.py: marginal_cosine_loss | [Eq. 2] | 10 minutes | helped by eq1
    points: worked example 2, any latents 3, gradient 2

The names of the points are the titles of the checks in setN.py. `helped by` may be left out; with
`docstring to ->` after it the student's file keeps only what the docstrings say before their first arrow.
"""
import importlib
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# In the order in which they import each other.
SCRIPTS = ("vae.py", "vf_loss.py", "dit.py", "train_vae.py", "train_dit.py", "sample.py", "fid.py")
SETS = (1, 2, 3, 4, 5, 6)
TIERS = ("warm-up", "core", "design")
RUN_POINTS = 3    # for each set's "Now run it", marked by hand

@dataclass
class Check:
    title: str
    points: int
    public: bool
    function: object

@dataclass
class Exercise:
    number: str      # set.place
    key: str
    title: str
    tier: str
    file: str
    names: tuple     # functions, or Class.method
    paper: str       # where to read
    minutes: int
    after: tuple     # keys of exercises that the public tests need, too
    points: dict     # title of a check -> its points
    text: str        # Markdown, with hints
    arguments: bool  # whether docstrings lose what is returned

    @property
    def set(self):
        return int(self.number.split(".")[0])

    @property
    def total(self):
        return sum(self.points.values())

    @property
    def checks(self):
        """In the order of the points. It imports torch's users, which the command line does not need."""
        importlib.import_module(f"set{self.set}")
        found = {title: rest for title, *rest in importlib.import_module("checks").CHECKS[self.key]}
        return [Check(title, points, *found[title]) for title, points in self.points.items()]

HEAD = re.compile(r"### (\d\.\d+) `(\w+)` (.+)\n(.+)\npoints: (.+)\n")

def read_exercises(text):
    found = []
    for m in HEAD.finditer(text):
        number, key, title, facts, points = m.groups()
        tier, place, paper, minutes, *more = [part.strip() for part in facts.split("|")]
        file, names = place.split(":")
        helped = " ".join(part.removeprefix("helped by") for part in more if part.startswith("helped by"))
        points = [part.strip().rpartition(" ") for part in points.split(",")]
        body = re.split(r"^##+ ", text[m.end():], maxsplit=1, flags=re.MULTILINE)[0].strip()
        found.append(Exercise(
            number, key, title, tier, file, tuple(n.strip() for n in names.split(",")), paper.strip("[]"),
            int(minutes.split()[0]), tuple(helped.replace(",", " ").split()),
            {name: int(n) for name, _, n in points}, body, "docstring to ->" in more))
    return found

TEXTS = {s: (HERE / f"set{s}.md").read_text() for s in SETS if (HERE / f"set{s}.md").exists()}
NAMES = {s: text.split("\n", 1)[0].removeprefix("# ").split(": ")[1] for s, text in TEXTS.items()}
EXERCISES = {e.key: e for text in TEXTS.values() for e in read_exercises(text)}

def questions(text):
    """[(number, points)] of the questions of a set, or of their answers: lines `**Q2.1 (4 points).** ...`."""
    return [(m[1], int(m[2])) for m in re.finditer(r"^\*\*Q(\d\.\d) \((\d+) points?\)", text, re.MULTILINE)]

def of_set(number):
    return [e for e in EXERCISES.values() if e.set == number]
