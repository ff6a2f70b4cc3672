"""Marks: students' code runs in forks of worker.py's process, judge.py's compares what it answers."""
import ast
import base64
import contextlib
import csv
import json
import marshal
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from course import EXERCISES, HERE, ROOT, SCRIPTS
from handout import Refused, stubbed
from worker import find

# === The asking half of the checks ======================================================================
class Asking(ast.NodeTransformer):
    """Removes what compares: names that begin with slow, and in a check all that follows its question."""

    def visit_FunctionDef(self, node):
        if node.name.startswith("slow"):
            return None
        for i, statement in enumerate(node.body):
            asks = {n.func.id for n in ast.walk(statement)
                    if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            if asks & {"student", "values", "gradient"} and node.decorator_list:
                node.body = node.body[:i + 1]
                break
        return self.generic_visit(node)

    def visit_Call(self, node):
        node = self.generic_visit(node)
        return ast.copy_location(ast.Constant(None), node) if isinstance(node.func, ast.Constant) else node

    def visit_Name(self, node):
        gone = node.id.startswith("slow") and isinstance(node.ctx, ast.Load)
        return ast.copy_location(ast.Constant(None), node) if gone else node

@lru_cache
def asking(number):
    tree = Asking().visit(ast.parse((HERE / f"set{number}.py").read_text()))
    return marshalled(ast.fix_missing_locations(tree), f"set{number}.py")

def marshalled(source, name):
    return base64.b64encode(marshal.dumps(compile(source, name, "exec"))).decode()

@lru_cache
def given(path):
    return marshalled(path.read_text(), path.name)

@lru_cache
def published(file):
    return ast.parse((ROOT / file).read_text())

@lru_cache
def emptied(key):
    return stubbed(EXERCISES[key].file, [EXERCISES[key]])

def packages():
    """What the scripts import besides each other, so that the worker loads it once."""
    names = {"numpy", "torch.nn.functional"}
    for n in (n for file in SCRIPTS for n in published(file).body):
        if isinstance(n, ast.Import):
            names |= {a.name for a in n.names}
        elif isinstance(n, ast.ImportFrom):
            names.add(n.module)
    return sorted(n for n in names if n.split(".")[0] + ".py" not in SCRIPTS)

def job_of(key, source, timeout):
    e = EXERCISES[key]
    code = {file[:-3]: given(ROOT / file) for file in SCRIPTS if file != e.file}
    code |= {"checks": given(HERE / "checks.py"), f"set{e.set}": asking(e.set)}
    return {"key": key, "set": f"set{e.set}", "file": e.file, "names": e.names, "given": emptied(key),
            "source": source, "code": code, "timeout": timeout}

def tell(pipe, value):
    pipe.write(json.dumps(value) + "\n")
    pipe.flush()

class Worker:
    """A process of worker.py, started in an empty folder; use it as a context."""

    def __init__(self):
        self.process, self.folder = None, tempfile.TemporaryDirectory(prefix="coursework-")
        self.questions = self.verdicts = None    # of the judge

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        self.folder.cleanup()

    def stop(self):
        if self.process:
            for file in (self.questions, self.verdicts, self.process.stdin, self.process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    file.close()
            self.process.wait()
        self.process = None

    def start(self):
        env = {k: v for k, v in os.environ.items() if k not in ("PWD", "OLDPWD")}
        env |= {"TMPDIR": self.folder.name, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1"}
        shutil.copy(HERE / "worker.py", self.folder.name)
        (asked, ask), (hear, said) = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "worker.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
            cwd=self.folder.name, pass_fds=(asked, said))
        for pipe in (asked, said):
            os.close(pipe)
        self.questions, self.verdicts = os.fdopen(ask, "w"), os.fdopen(hear)
        tell(self.process.stdin, {"packages": packages(), "pipes": [asked, said],
                                  "folders": [str(HERE), str(ROOT)]})
        ready = json.loads(self.process.stdout.readline() or '{"missing": "torch"}')
        if ready["missing"]:
            raise Refused(f"grading needs the package {ready['missing']}, and nothing was graded: "
                          f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}")

    def compare(self, exercise, index, answer):
        """The judge's verdict about an answer: None, or what is wrong."""
        tell(self.questions, [exercise.key, exercise.set, index, answer])
        return json.loads(self.verdicts.readline())

    def ask(self, job):
        """[messages, end]; a worker that was killed, perhaps by the job before, is started again once."""
        for _ in range(2):
            if self.process is None:
                self.start()
            with contextlib.suppress(BrokenPipeError):
                tell(self.process.stdin, job)
                if line := self.process.stdout.readline():
                    return json.loads(line)
            self.stop()
        return [], "the grader's worker was killed in this exercise"

# === Marks ==============================================================================================
@dataclass
class Mark:
    exercise: object
    note: str | None       # why nothing was run
    checks: list           # for each check None, or the sentence
    look: list             # names in the student's code that an exercise has no use for
    seconds: float = 0.0

    @property
    def score(self):
        pairs = zip(self.exercise.points.values(), self.checks)
        return sum(points for points, message in pairs if message is None)

    @property
    def reason(self):
        """The first failing check, in a sentence; empty at full marks."""
        failed = [f"{title}: {m}" for title, m in zip(self.exercise.points, self.checks) if m is not None]
        return self.note or next(iter(failed), "")

def judge(worker, exercise, messages, end, timeout):
    """A job's messages and its end -> why nothing was run or None, the checks' results, what to look at."""
    last = {name: value for m in messages for name, value in m.items()}
    note, started = last.get("note"), last.get("started", -1)
    found = {m["check"]: m for m in reversed(messages) if "check" in m}    # the first of each
    late = {"time": f"no answer after {timeout:g} seconds: is there a loop that does not end?",
            "": "the process ended before the check did: does the code call exit?"}.get(end, end)
    if note is None and "done" not in last and started < 0:
        note = late
    import checks
    results = []
    # the worker asks in the order of setN.py, the points stand in that of setN.md
    order = [title for title, _, _ in checks.CHECKS[exercise.key]]
    for i in (order.index(c.title) for c in exercise.checks):
        m = found.get(i)
        if m is None:
            results.append(note or (late if i == started else "not run: an earlier check ended the process"))
        elif "answer" in m:
            results.append(worker.compare(exercise, i, m["answer"]))
        else:
            results.append(m.get("message") or "no answer")
    return note, results, next((m["look"] for m in messages if "look" in m), [])

def read_submission(folder, file):
    """(text of a student's script, None), or (None, why there is none)."""
    path = Path(folder, file)
    if not path.is_file():
        return None, f"{file} is not in the folder"
    if path.stat().st_size > 1 << 20:
        return None, f"{file} is larger than 1 MiB"
    try:
        return path.read_bytes().decode("utf-8-sig"), None
    except (UnicodeDecodeError, OSError) as error:
        return None, f"{file} is not readable as UTF-8 text: {error}"

def copied(source, exercise):
    """Whether a student's functions, which run, are the published ones, word for word (comments aside), and
    not short."""
    def text(tree):
        found = [find(tree, name) for name in exercise.names]
        return ["".join(map(ast.dump, getattr(body[i], "body", []))) for body, i in found]

    ours = text(published(exercise.file))
    return text(ast.parse(source)) == ours and sum(map(len, ours)) > 2000

def grade_one(worker, folder, key, timeout=60.0):
    e, start = EXERCISES[key], time.monotonic()
    len(e.checks)    # loads the checks
    source, missing = read_submission(folder, e.file)
    if missing:
        return Mark(e, missing, [missing] * len(e.points), [])
    note, results, look = judge(worker, e, *worker.ask(job_of(key, source, timeout)), timeout)
    mark = Mark(e, note, results, look, time.monotonic() - start)
    if mark.score == e.total and copied(source, e):
        look.append("the published solution, word for word")
    if any("the grader failed" in (result or "") for result in results):  # a mistake in a check, not theirs
        look.append("the grader failed: repair the check and grade again")
    return mark

def grade(folders, keys, timeout=60.0, jobs=2, report=None):
    """{folder: [Mark, ...]}, by `jobs` processes; report(folder, marks) is called as each folder is done."""
    todo = [(folder, key) for folder in folders for key in keys][::-1]
    marks, lock = {folder: dict.fromkeys(keys) for folder in folders}, threading.Lock()

    def work():
        with Worker() as worker:
            while True:
                with lock:
                    if not todo:
                        return
                    folder, key = todo.pop()
                try:
                    mark = grade_one(worker, folder, key, timeout)
                except BaseException:    # a missing package: the others stop, too
                    todo.clear()
                    raise
                with lock:
                    marks[folder][key] = mark
                    if report and all(marks[folder].values()):
                        report(folder, list(marks[folder].values()))

    count = max(1, min(jobs, len(todo)))
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work) for _ in range(count)]:
            future.result()
    return {folder: list(found.values()) for folder, found in marks.items()}

# === Reports ============================================================================================
def totals(marks):
    return sum(m.score for m in marks), sum(m.exercise.total for m in marks)

def print_marks(folder, marks):
    print(f"\n{folder}")
    for m in marks:
        e, look = m.exercise, f"  LOOK: {', '.join(m.look)}" if m.look else ""
        print(f"  {e.number:5} {e.key:11} {m.score:3} / {e.total:<3} {m.reason}{look}")
    print("  total {} / {}".format(*totals(marks)), flush=True)

def gradescope(marks):
    """Gradescope's results.json: a test for each check. What a hidden check expected is shown after the due
    date only; what to look at, never."""
    tests, look = [], []
    for m in marks:
        look += [f"{m.exercise.number} {m.exercise.key}: {', '.join(m.look)}"] if m.look else []
        for i, (c, message) in enumerate(zip(m.exercise.checks, m.checks), 1):
            tests.append({"number": f"{m.exercise.number}.{i}", "name": f"{m.exercise.key}: {c.title}",
                          "score": 0 if message else c.points, "max_score": c.points,
                          "status": "failed" if message else "passed", "output": message or "",
                          "visibility": "visible" if c.public or m.note else "after_published"})
    if look:
        tests.append({"number": "0", "name": "to look at", "score": 0, "max_score": 0, "status": "failed",
                      "output": "\n".join(look), "visibility": "hidden"})
    score, most = totals(marks)
    return {"score": score, "execution_time": round(sum(m.seconds for m in marks)), "tests": tests,
            "output": f"{score} of {most} points; hidden checks are explained after the due date"}

def write_csv(path, results):
    """A line per folder: its name, total, possible, each exercise's points, and what to look at, among it why
    an attempted exercise got no points."""
    marks = next(iter(results.values()))
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["submission", "total", "possible", *(m.exercise.key for m in marks), "look"])
        for folder, marks in results.items():
            look = []
            for m in marks:
                failed = not m.score and "not attempted" not in m.reason
                words = m.look + [m.reason] * failed
                look += [f"{m.exercise.key}: {', '.join(words)}"] if words else []
            table.writerow([Path(folder).resolve().name, *totals(marks), *(m.score for m in marks),
                            "; ".join(look)])
