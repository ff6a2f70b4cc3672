"""The course: whether marks can be trusted, handouts are whole and leak nothing, and the texts are true.

coursework/test_answers.txt holds a right answer for every exercise, in another form than the scripts', and
wrong ones as changes of it: `what is wrong: old => new`, several changes with `;;` between them, continued on
lines that begin with two spaces. Right answers must get full marks; wrong ones must lose some.
"""
import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "coursework"
sys.path.insert(0, str(HERE))
import course
import grade
import handout
import worker
from course import EXERCISES, ROOT, SCRIPTS, SETS, TEXTS, of_set, questions


def read_answers():
    """{key: (right answer, {what is wrong: answer})}, an answer {function: its lines}."""
    found = {}
    text = re.sub(r"\n  (?=\S)", " ", (HERE / "test_answers.txt").read_text().strip("\n"))
    for block in re.split(r"\n(?=\w+\n    )", text):
        key, _, rest = block.partition("\n")
        lines = rest.split("\n")
        body = "\n".join(line[4:] for line in lines if line.startswith("    ")) + "\n"
        right, wrong = by_function(key, body), {}
        for line in lines:
            if line and not line.startswith(" "):
                name, _, changes = line.partition(": ")
                text = body
                for change in changes.split(" ;; "):    # an empty new part ends in "=> "
                    text = changed(text, *change.split(" => "), (key, name))
                wrong[name] = by_function(key, text)
        found[key] = right, wrong
    return found


def changed(text, old, new, where):
    """One change; lines that are put in get the indentation of the place, a removed line goes whole."""
    old, new = old.replace("\\n", "\n"), new.replace("\\n", "\n")
    assert old in text, (where, old)
    if old.endswith("\n"):
        return text.replace(old, new) if new else re.sub("^ *" + re.escape(old), "", text, flags=re.MULTILINE)
    lines = []
    for line in text.split("\n"):
        indent = line[:len(line) - len(line.lstrip())]
        lines.append(line.replace(old, new.replace("\n", "\n" + indent)))
    return "\n".join(lines)


def by_function(key, text):
    if not text.startswith("@"):
        return {EXERCISES[key].names[0]: text}
    return {name: body for name, _, body in (part.partition("\n") for part in text[1:].split("\n@"))}


RIGHT_AND_WRONG = read_answers()


def answered(key, bodies, source=None):
    """The exercise's script with these functions' bodies in their place."""
    source = source or (ROOT / EXERCISES[key].file).read_text()
    for name, body in bodies.items():
        source = handout.replace_body(source, name, textwrap.dedent(body.strip("\n")).split("\n"))
    return source


class Grader:
    """One worker for all tests; submissions are written into one folder after another."""

    def __init__(self, runner, home):
        self.worker, self.home, self.count = runner, home, 0

    def folder(self, files):
        self.count += 1
        folder = self.home / str(self.count)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return folder

    def mark(self, key, source, timeout=60.0):
        return grade.grade_one(self.worker, self.folder({EXERCISES[key].file: source}), key, timeout)


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    with grade.Worker() as runner:
        yield Grader(runner, tmp_path_factory.mktemp("submissions"))


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """The handout of set 1, in which the functions of all sets are empty."""
    folder = tmp_path_factory.mktemp("handout") / "set1"
    handout.handout(folder, 1)
    return folder


def run(*arguments, cwd=ROOT):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


# --- Marks ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", EXERCISES)
def test_right_answers_pass_and_wrong_ones_lose_points(grader, key):
    """Five wrong answers of each exercise, to save minutes; with COURSEWORK_ALL=1 all of them."""
    right, wrong = RIGHT_AND_WRONG[key]
    mark = grader.mark(key, answered(key, right))
    assert mark.score == mark.exercise.total, mark.reason
    few = list(wrong) if "COURSEWORK_ALL" in os.environ else list(wrong)[-5:]
    marks = {name: grader.mark(key, answered(key, wrong[name])) for name in few}
    assert len(marks) >= 4
    assert not [name for name, mark in marks.items() if mark.score == mark.exercise.total]
    assert not [(name, mark.note) for name, mark in marks.items() if mark.note or not mark.reason]


def test_the_scripts_get_full_marks_and_the_handout_none(grader, blank):
    for key, e in EXERCISES.items():
        mark = grade.grade_one(grader.worker, ROOT, key)
        assert mark.score == e.total, (key, mark.reason)
        mark = grade.grade_one(grader.worker, blank, key)
        assert mark.score == 0 and "not attempted" in mark.reason, key


def test_each_solved_exercise_gets_exactly_its_points(grader, blank):
    """Of the empty handout with one exercise solved: no exercise needs another, or gives points for one."""
    for file in SCRIPTS:
        keys = [key for key, e in EXERCISES.items() if e.file == file]
        for key in keys:
            folder = grader.folder({file: answered(key, RIGHT_AND_WRONG[key][0], (blank / file).read_text())})
            pair = {key, keys[keys.index(key) - 1]}
            scores = {k: grade.grade_one(grader.worker, folder, k).score for k in pair}
            assert scores == {k: EXERCISES[k].total if k == key else 0 for k in scores}


def test_marks_follow_understanding(grader):
    """A missing permutation leaves no point of unpatchify, a forgotten RoPE takes one of the block's many."""
    for key, name, least, most in (("unpatchify", "no permutation", 0, 0), ("block", "no rope", 7, 11),
                                   ("parts", "draws though told", 6, 8),
                                   ("attn", "weights without a gradient", 6, 6),
                                   ("eq2", "the features learn only", 5, 5)):
        mark = grader.mark(key, answered(key, RIGHT_AND_WRONG[key][1][name]))
        assert least <= mark.score <= most, (key, name, mark.score, mark.checks)


GOOD = "return F.relu(1 - margin - F.cosine_similarity(z, f, dim=1)).mean()"
CHEATS = {
    "reads the script": """
        space = {"__name__": "x"}
        exec(open("vf_loss.py").read(), space)
        return space["marginal_cosine_loss"](z, f, margin)""",
    "reads the repository": f"""
        space = {{"__name__": "x"}}
        exec(open("{ROOT}/vf_loss.py").read(), space)
        return space["marginal_cosine_loss"](z, f, margin)""",
    "imports the repository": f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("other", "{ROOT}/vf_loss.py")
        other = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(other)
        return other.marginal_cosine_loss(z, f, margin)""",
    "looks for the grader's file": """
        import __main__, pathlib
        found = list(pathlib.Path(__main__.__file__).resolve().parent.parent.rglob("vf_loss.py"))
        exec(found[0].read_text())
        return marginal_cosine_loss(z, f, margin)""",
    "patches the comparison": """
        import __main__, checks
        for module in (__main__, checks):
            module.close = module.ok = module.near = module.values = lambda *a, **k: None
        return z.sum()""",
    "reports its own marks": """
        import sys
        frame = sys._getframe()
        while frame:
            for value in list(frame.f_locals.values()):
                if getattr(value, "__name__", "") == "send":
                    for i in range(9):
                        value({"check": i, "message": None})
                    value({"done": True})
            frame = frame.f_back
        return z.sum()""",
    "looks for expected values": """
        import sys
        module = sys.modules["set2"]
        slow = [f for name, f in vars(module).items() if name.startswith("slow")]
        return slow[0](z, f, ((margin,),))[0]""",
    "searches memory": """
        import gc
        for thing in gc.get_objects():
            if getattr(thing, "__name__", "") == "slow_eq2":
                return thing(z, f, ((margin,),))[0]
        return z.sum()""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_get_nothing_and_are_flagged(grader, name):
    mark = grader.mark("eq2", answered("eq2", {"marginal_cosine_loss": CHEATS[name]}))
    assert mark.score == 0 and mark.look, (mark.score, mark.look, mark.reason)


def test_what_the_worker_gets_holds_no_answer():
    """Of the target's functions only stubs, no slow reference, nothing after a check's question."""
    import base64
    import marshal
    for key, e in EXERCISES.items():
        job = grade.job_of(key, "", 1.0)
        for name in e.names:
            body, i = worker.find(ast.parse(job["given"]), name)
            assert worker.is_stub(body[i]), key
        assert set(job["code"]) == {f[:-3] for f in SCRIPTS if f != e.file} | {"checks", f"set{e.set}"}
        names, pending = set(), [marshal.loads(base64.b64decode(job["code"][f"set{e.set}"]))]
        while pending:
            code = pending.pop()
            names |= {code.co_name, *code.co_names}
            pending += [c for c in code.co_consts if hasattr(c, "co_name")]
        assert not [n for n in names if n.startswith("slow")] and "close" in names


def test_a_forbidden_function_is_flagged():
    assert worker.suspicious([ast.parse("scipy.linalg.sqrtm(a @ b)")]) == ["sqrtm"]


HOSTILE = {
    "a loop without end": "while True:\n    pass",
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "prints without end": "print('{\"done\": true}' * 10 ** 6)\nprint('0' * (1 << 30))\nreturn 1",
    "forges messages": """
        import os
        for fd in range(3, 64):
            try:
                os.write(fd, b'{"check": 0, "answer": 0}\\n{"done": true}\\n')
            except OSError:
                pass
        os._exit(0)""",
    "changes torch": "torch.Tensor.all = lambda *a, **k: torch.ones(1)\nreturn z.new_zeros(())",
    "a child that lives on": """
        import os, time
        if os.fork() == 0:
            time.sleep(30)
        os._exit(0)""",
    "takes all memory": "x = [bytearray(1 << 30) for _ in range(64)]\nreturn z.sum()",
    "calls itself": "return marginal_cosine_loss(z, f, margin)",
    "kills itself": "import os, signal\nsignal.raise_signal(9)",
    "kills the grader": "import os\nos.kill(os.getppid(), 9)\nreturn z.sum()",
    "waits for input": "return float(input())",
    "an answer of its own type": "return type('T', (), {})()",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_costs_its_own_exercise(grader, name):
    """Its points are lost, the others of the file are graded as ever, and the grader continues."""
    source = answered("eq2", {"marginal_cosine_loss": HOSTILE[name]})
    mark = grader.mark("eq2", source, timeout=2.0)
    assert mark.score == 0 and mark.reason, mark
    assert grader.mark("eq3", source).score == EXERCISES["eq3"].total
    assert all((ROOT / file).exists() for file in SCRIPTS)


def test_a_check_that_breaks_is_the_graders_fault(grader, monkeypatch):
    """It is reported beside the mark."""
    import checks
    import judge
    assert EXERCISES["psnr"].checks    # loads the set
    monkeypatch.setitem(checks.CHECKS, "psnr", [("worked example", True, lambda: nothing)] * 2)  # noqa: F821
    verdict = judge.compare("psnr", 5, 0, 1.0)
    assert verdict.startswith("the grader failed in this check (NameError")
    monkeypatch.undo()
    monkeypatch.setattr(grade.Worker, "compare", lambda *_: verdict)
    mark = grader.mark("psnr", answered("psnr", {}))
    assert not mark.score and "the grader failed: repair the check and grade again" in mark.look


def test_a_worker_that_was_killed_is_started_again(grader):
    grader.mark("psnr", answered("psnr", {}))
    grader.worker.process.kill()
    assert grader.mark("psnr", answered("psnr", {})).score == EXERCISES["psnr"].total


def test_broken_files(grader):
    """Each costs its file's exercises and says where."""
    source = answered("eq2", {"marginal_cosine_loss": GOOD})
    line = source[:source.index(GOOD)].count("\n") + 1
    for text, words in ((source.replace(GOOD, GOOD + ")"), f"vf_loss.py, line {line}"),
                        ("", "has no marginal_cosine_loss"), ("\0", "vf_loss.py"),
                        (source.replace("def marginal_cosine", "def cosine"), "its name must stay"),
                        (source.replace(GOOD, "return (" + "(" * 5000), "vf_loss.py"),
                        ("import sys\n", "its name must stay")):
        mark = grader.mark("eq2", text)
        assert mark.score == 0 and words in mark.note, mark.note
    folder = grader.folder({})
    assert "not in the folder" in grade.grade_one(grader.worker, folder, "eq2").reason
    (folder / "vf_loss.py").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in grade.grade_one(grader.worker, folder, "eq2").reason
    source = answered("eq2", {"marginal_cosine_loss": "z = z.nonsense()\nreturn z"})
    line = source.split("\n").index("    z = z.nonsense()") + 1
    assert f"(vf_loss.py, line {line})" in grader.mark("eq2", source).reason
    source = answered("eq2", {"marginal_cosine_loss": "import einops_of_mine\nreturn z"})
    assert "not installed here" in grader.mark("eq2", source).reason


HELPED = '''
import statistics
from functools import partial

SCALE = []
SCALE.append(1.0)
print("I may print")


def rule(function):
    return function


class Cosine:
    def __call__(self, z, f):
        return unit(z, f).sum(1)


def unit(z, f):
    return F.normalize(z, dim=1) * F.normalize(f, dim=1)


@rule
def marginal_cosine_loss(z, f, margin=0.5):
    """Mine."""
    threshold = statistics.fmean([1.0]) * SCALE[0] - margin
    return partial(clip)(threshold - Cosine()(z, f)).mean()


def clip(v):
    return v.clamp(min=0)
'''


def test_helpers_of_the_student_keep_working(grader):
    source = (ROOT / "vf_loss.py").read_text().replace("def marginal_cosine_loss", "def replaced")
    for text in (source + HELPED, source + "\nmarginal_cosine_loss = lambda z, f, margin=0.5: F.relu(\n"
                 "    1 - margin - F.cosine_similarity(z, f, dim=1)).mean()\n"):
        mark = grader.mark("eq2", text)
        assert mark.score == mark.exercise.total and not mark.look, mark.reason
    # a method and a constant of the class; a helper that another exercise uses does not reach it
    source = answered("kl", {"Posterior.kl": "return self.WEIGHT * self.values().sum((1, 2, 3))"}).replace(
        "    def mode(self):", "    WEIGHT = 0.5\n\n    def values(self):\n"
        "        return self.mean ** 2 + self.logvar.exp() - 1 - self.logvar\n\n    def mode(self):")
    assert grader.mark("kl", source).score == EXERCISES["kl"].total
    assert grader.mark("posterior", source + "\nraise SystemExit\n").score == EXERCISES["posterior"].total
    body = """
        a, b = (torch.autograd.grad(v, weight, retain_graph=True)[0].norm() for v in (rec_loss, other_loss))
        return min(max_weight, float(a / (b + 1e-4)))"""
    assert grader.mark("eq4", answered("eq4", {"adaptive_weight": body})).score == EXERCISES["eq4"].total
    # changes to functions that are no exercise do not count
    source = answered("eq2", {"marginal_cosine_loss": GOOD}).replace("def vf_losses(", "def other(")
    assert grader.mark("eq2", source).score == EXERCISES["eq2"].total


# --- The command ----------------------------------------------------------------------------------------
def test_a_class_in_one_command(tmp_path):
    """Text, Gradescope's results.json, a CSV; a broken submission and a cheat among good ones; names without
    paths; the folder does not decide what is marked."""
    texts = {"ada": answered("eq2", {"marginal_cosine_loss": GOOD}), "bob": "def (:",
             "cy": answered("eq2", {"marginal_cosine_loss": "return z.mean()"}),
             "di": answered("eq2", {"marginal_cosine_loss": CHEATS["reads the script"]})}
    for name, text in texts.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "vf_loss.py").write_text(text)
        (tmp_path / "in" / name / "exercises.txt").write_text("eq2\n")
    stray = tmp_path / "in" / "readme.txt"
    stray.write_text("not a submission")
    done = run("tests/coursework", "grade", *sorted((tmp_path / "in").iterdir()), "--exercises", "eq2", "eq3",
               "--jobs", 1, "--json", tmp_path / "results.json", "--csv", tmp_path / "marks.csv")
    points = EXERCISES["eq2"].total + EXERCISES["eq3"].total
    assert f"total {points} / {points}" in done.stdout and "vf_loss.py, line 1" in done.stdout, done.stderr
    assert "LOOK: exec, open" in done.stdout
    rows = list(csv.DictReader((tmp_path / "marks.csv").open()))
    assert list(rows[0]) == ["submission", "total", "possible", "eq2", "eq3", "look"]
    assert [row["submission"] for row in rows] == ["ada", "bob", "cy", "di"]
    assert [row["eq2"] for row in rows] == [str(EXERCISES["eq2"].total), "0", "0", "0"]
    assert rows[0]["total"] == rows[0]["possible"] == str(points) and "eq2: exec, open" in rows[3]["look"]
    assert not rows[0]["look"] and "eq3: vf_loss.py, line 1" in rows[1]["look"]
    assert f"{stray} is not a folder and is left out" in done.stderr
    results = {Path(k).name: v for k, v in json.loads((tmp_path / "results.json").read_text()).items()}
    assert results["ada"]["score"] == points and results["bob"]["score"] == 0
    for test in results["cy"]["tests"]:
        assert {"number", "name", "score", "max_score", "status", "output", "visibility"} <= set(test)
        hidden = test["name"] not in ("eq2: worked example", "eq3: worked example")
        assert test["visibility"] == ("after_published" if hidden else "visible")
    assert [t["visibility"] for t in results["di"]["tests"] if t["name"] == "to look at"] == ["hidden"]
    assert results["ada"]["execution_time"] >= 0
    refused = run("tests/coursework", "grade", tmp_path / "in" / "ada")
    assert refused.returncode == 2 and "--set" in refused.stderr


def test_a_missing_package_is_never_a_pass(tmp_path, monkeypatch):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "scipy.py").write_text("raise ModuleNotFoundError('no scipy', name='scipy')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocked"))
    with pytest.raises(handout.Refused, match="scipy, and nothing was graded"):
        grade.grade([ROOT], ["psnr"])


def test_lists_answers_and_solutions_need_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    for arguments, words in ((["list"], "marginal_cosine_loss"), (["answers", "--set", "3"], "Q3.1"),
                             (["solutions", "--set", "2"], "def adaptive_weight")):
        code = (f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); "
                f"sys.argv = ['x', *{arguments!r}]; runpy.run_path({str(HERE)!r}, run_name='__main__')")
        done = run("-c", code)
        assert words in done.stdout, done.stderr


# --- Handouts and texts ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def handouts(tmp_path_factory):
    home = tmp_path_factory.mktemp("handouts")
    for s in SETS:
        handout.handout(home / str(s), s)
    return home


def test_handouts_hold_no_solution_of_their_set_or_a_later_one(handouts):
    ours = {file: ast.parse((ROOT / file).read_text()) for file in SCRIPTS}
    assert all(words in (ROOT / "tests" / "DEVIATIONS.md").read_text() for words in handout.TELLING)
    for s in SETS:
        given = {file: ast.parse((handouts / str(s) / file).read_text()) for file in SCRIPTS}
        for e in EXERCISES.values():
            for name in e.names:
                places = worker.find(given[e.file], name), worker.find(ours[e.file], name)
                node, reference = (body[i] for body, i in places)
                assert worker.is_stub(node) == (e.set >= s), (s, name)
                short, whole = (" ".join((ast.get_docstring(n) or "").split()) for n in (node, reference))
                assert whole == short if e.set < s else whole.startswith(short)
        deviations = (handouts / str(s) / "DEVIATIONS.md").read_text()
        assert not [words for words in handout.TELLING if words in deviations]
        text = (handouts / str(s) / "ASSIGNMENT.md").read_text()
        for line in (HERE / "answers.md").read_text().splitlines():
            assert len(line) < 60 or line.startswith("**Q") or line not in text
        assert text.count("<details>") == TEXTS[s].count("**Hint") and "points:" not in text
        plain = re.sub(r"\$+[^$]*\$+|`[^`]*`", "", text)
        assert not re.search(r"\{[a-z0-9_]+\}", plain), "a number is missing"
    with pytest.raises(handout.Refused, match="not empty"):
        handout.handout(handouts / "1", 1)


def test_public_tests_need_only_their_exercise(handouts, tmp_path):
    """Where all functions are empty all fail; with test_answers.txt all pass. -k finds its own."""
    for s in SETS:
        folder = tmp_path / str(s)
        shutil.copytree(handouts / str(s), folder)
        names = re.findall(r"def (test_\w+)\(", (folder / f"test_set{s}.py").read_text())
        for e in of_set(s):
            own = [n for n in names if n.startswith(f"test_{e.key}__")]
            assert own and [n for n in names if e.key in n] == own, e.key
    tests = [folder / f"test_set{s}.py" for s, folder in ((s, tmp_path / str(s)) for s in SETS)]
    empty = tmp_path / "1"    # here the functions of all sets are empty
    for path in tests[1:]:
        shutil.copy(path, empty)
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", cwd=empty)
    assert " passed" not in done.stdout and "NotImplementedError" in done.stdout, done.stdout[-2000:]
    for s in SETS:    # solved by other answers than the scripts'
        for e in of_set(s):
            path = empty / e.file
            path.write_text(answered(e.key, RIGHT_AND_WRONG[e.key][0], path.read_text()))
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=empty)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_failing_public_test_is_short(handouts):
    shutil.copy(ROOT / "train_vae.py", handouts / "1")
    wrong = answered("rec", RIGHT_AND_WRONG["rec"][1]["squares"])
    (handouts / "1" / "train_vae.py").write_text(wrong)
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "rec", cwd=handouts / "1")
    assert "1 failed" in done.stdout and "E       " in done.stdout, done.stdout
    assert sum(line.startswith(("    ", ">", "E")) for line in done.stdout.split("\n")) <= 20, done.stdout


def test_ruff_finds_nothing_in_handouts(handouts):
    """Unused imports of a script whose functions are empty are the student's to use."""
    for s in SETS:
        done = run("-m", "ruff", "check", "--isolated", "--line-length", 110, "--extend-select", "E501",
                   *(handouts / str(s)).glob("test_*.py"), *(handouts / str(s)).glob("run_*.py"))
        assert done.returncode == 0, done.stdout
        done = run("-m", "ruff", "check", "--isolated", "--select", "F", "--ignore", "F401",
                   handouts / str(s))
        assert done.returncode == 0, done.stdout


def test_texts_and_checks_agree():
    import checks
    for e in EXERCISES.values():
        titles = [c.title for c in e.checks]
        assert titles == list(e.points) and set(titles) == {t for t, _, _ in checks.CHECKS[e.key]}, e.key
        assert e.checks[0].public and not all(c.public for c in e.checks), e.key
        assert e.tier in course.TIERS and set(e.after) <= set(EXERCISES), e.key
        assert "**Example.**" in e.text or e.key in ("lpips", "draws", "draw"), e.key
        assert all(worker.find(ast.parse((ROOT / e.file).read_text()), name) for name in e.names)
    assert set(RIGHT_AND_WRONG) == set(EXERCISES)
    for s in SETS:
        tiers = [e.tier for e in of_set(s)]
        assert tiers.count("warm-up") == 1 and tiers.count("design") == 2 and tiers == sorted(
            tiers, key=course.TIERS.index)
        assert [e.number for e in of_set(s)] == [f"{s}.{i}" for i in range(1, len(tiers) + 1)]
        assert "## Now run it" in TEXTS[s] and "**Hand in**" in " ".join(TEXTS[s].split())
        answers = (HERE / "answers.md").read_text()
        assert questions(TEXTS[s]) == [q for q in questions(answers) if q[0].startswith(f"{s}.")]


def test_the_instructor_s_table_is_the_course():
    text = (HERE / "instructor.md").read_text()
    rows = re.findall(r"^\| (\d) .+ \| (\d+), (\d+) \| (\d+), (\d+) \| ([\d.]+) \|$", text, re.MULTILINE)
    for s, row in zip(SETS, rows, strict=True):
        asked, found = [n for _, n in questions(TEXTS[s])], of_set(s)
        hours = (sum(e.minutes for e in found) + 5 * sum(asked)) / 60
        numbers = s, len(found), sum(e.total for e in found), len(asked), sum(asked), f"{hours:.1f}"
        assert row == tuple(map(str, numbers))


def test_the_readme_s_numbers_are_the_course_s():
    text = (ROOT / "README.md").read_text()
    asked = [n for s in SETS for _, n in questions(TEXTS[s])]
    points = sum(e.total for e in EXERCISES.values()) + sum(asked) + course.RUN_POINTS * len(SETS)
    minutes = sum(e.minutes for e in EXERCISES.values()) + 5 * sum(asked)
    section = " ".join(text[text.index("## In a course"):].split("\n## ")[0].split())
    for words in (f"{len(EXERCISES)} exercises", f"{len(asked)} questions", f"{points} points",
                  f"{round(minutes / 60)} hours"):
        assert words in section, words
