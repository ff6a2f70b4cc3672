"""The course: handouts for students, marks, answers. instructor.md tells the rest.

    python tests/coursework list                                   exercises, points, minutes
    python tests/coursework handout DIR --set 2                    a student's folder
    python tests/coursework grade in/* --set 2 --csv marks.csv     a class: a folder for each student
    python tests/coursework solutions --set 2                      the functions, as in the scripts
    python tests/coursework answers [--set 2]                      questions and experiments, answered

It needs Linux. Grading runs students' code with limits on time, memory and files; instructor.md says what
that is worth, and has the lines for Gradescope and Docker.
"""
import argparse
import ast
import json
import os
import sys
from pathlib import Path

from course import EXERCISES, HERE, NAMES, ROOT, RUN_POINTS, SETS, TEXTS, of_set, questions
from grade import grade, gradescope, print_marks, write_csv
from handout import Refused, handout
from worker import find

def list_exercises():
    line = "{:5} {:11} {:8} {:13} {:50} {:>6} {:>7}"
    print(line.format("", "key", "tier", "file", "functions", "points", "minutes"))
    for e in EXERCISES.values():
        print(line.format(e.number, e.key, e.tier, e.file, ", ".join(e.names), e.total, e.minutes))
    for s in SETS:
        found, asked = of_set(s), questions(TEXTS[s])
        extra = sum(n for _, n in asked)
        minutes = sum(e.minutes for e in found) + 5 * extra
        print(f"set {s}, {NAMES[s]}: {len(found)} exercises of {sum(e.total for e in found)} points and "
              f"{len(asked)} questions of {extra}, {RUN_POINTS} for the run; about {minutes / 60:.1f} hours")

def print_solutions(number):
    for e in of_set(number):
        source = (ROOT / e.file).read_text()
        for name in e.names:
            body, i = find(ast.parse(source), name)
            text = ast.get_source_segment(source, body[i], padded=True)
            print(f"# {e.number} {e.key}, {e.file}\n{text}\n")

def print_answers(number):
    text = (HERE / "answers.md").read_text()
    if number:
        heading = f"## Set {number}"
        text = heading + text.split(heading)[1].split("\n## ")[0]
    print(text)

def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python tests/coursework", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name) for name in ("list", "handout", "grade", "solutions", "answers")}
    for name in ("handout", "grade", "solutions", "answers"):
        add[name].add_argument("--set", type=int, choices=SETS, required=name in ("handout", "solutions"))
    add["handout"].add_argument("dir", metavar="DIR", help="a new folder")
    flag = add["grade"].add_argument
    flag("dirs", metavar="DIR", nargs="+", help="a folder for each student")
    flag("--exercises", nargs="+", metavar="KEY", choices=EXERCISES, help="instead of a set")
    flag("--json", help="Gradescope's results.json; of several folders {folder: results}")
    flag("--csv", help="marks of all folders, a line each")
    flag("--timeout", type=float, default=60.0, help="seconds for one exercise (default 60)")
    flag("--jobs", type=int, default=min(2, os.cpu_count() or 1),
         help="processes, about 0.5 GB each (default: 2)")
    a = parser.parse_args()
    try:
        if a.command == "list":
            list_exercises()
        elif a.command == "solutions":
            print_solutions(a.set)
        elif a.command == "answers":
            print_answers(a.set)
        elif a.command == "handout":
            handout(a.dir, a.set)
            print(f"{a.dir}: set {a.set}, {len(of_set(a.set))} exercises; begin with ASSIGNMENT.md")
        else:
            if not (a.set or a.exercises):
                parser.error("grade needs --set N or --exercises KEY ..., since no folder decides this")
            dirs = [path for path in a.dirs if Path(path).is_dir()]
            for path in (path for path in a.dirs if path not in dirs):
                print(f"{path} is not a folder and is left out", file=sys.stderr)
            if not dirs:
                parser.error("there is no folder to grade")
            keys = a.exercises or [e.key for e in of_set(a.set)]
            results = grade(dirs, keys, a.timeout, a.jobs, print_marks)
            if a.json:
                found = {folder: gradescope(marks) for folder, marks in results.items()}
                Path(a.json).write_text(json.dumps(found[dirs[0]] if len(dirs) == 1 else found, indent=1))
            if a.csv:
                write_csv(a.csv, results)
    except Refused as error:
        sys.exit(f"coursework: error: {error}")

if __name__ == "__main__":
    main()
