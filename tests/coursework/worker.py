"""The process in which students' code runs. It is started from a copy in an empty folder and is told, for
each exercise, the scripts without this exercise's functions, the student's file, and the asking half of the
checks. It knows no expected value, no slow reference, and not where the repository is. Each exercise is a
fork of it."""

import ast
import base64
import gc
import importlib
import importlib.util
import json
import marshal
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

SCRIPT_LINES = 100_000   # empty lines before the reference's: a smaller line number is the student's
HERE = os.path.realpath(os.getcwd())


class NotGraded(Exception):
    """Why there is nothing to run."""


# === The student's functions among the given ones =======================================================
def bound(node):
    """The names that a statement gives a value to."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    names = set()
    for n in ast.walk(node):
        if isinstance(n, ast.alias):
            names.add(n.asname or n.name.split(".")[0])
        elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            names.add(n.id)
        elif isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            names.add(n.name)
    return names


def words(node):
    return {n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node)
            if isinstance(n, (ast.Name, ast.Attribute))}


def find(tree, name):
    """Where the last definition of a function or Class.method is, (statements, index), or None."""
    body = tree.body
    *owners, last = name.split(".")
    for owner in owners:
        classes = [n for n in body if isinstance(n, ast.ClassDef) and n.name == owner]
        if not classes:
            return None
        body = classes[-1].body
    simple = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Assign, ast.AnnAssign)
    places = [i for i, n in enumerate(body) if isinstance(n, simple) and last in bound(n)]
    return (body, places[-1]) if places else None


def parse(source, file):
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        what = getattr(error, "msg", error)
        raise NotGraded(f"{file}{line}: {what}; Python cannot read the file") from None


def is_stub(node):
    if not isinstance(node, ast.FunctionDef):
        return False
    body = node.body[ast.get_docstring(node, clean=False) is not None:]
    return len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in words(body[0])


def new_part(node, known):
    """What a statement of the student's adds to the names that the given file has; None if nothing."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        aliases = [a for a in node.names if (a.asname or a.name.split(".")[0]) not in known]
        fields = {name: getattr(node, name) for name in node._fields} | {"names": aliases}
        return ast.copy_location(type(node)(**fields), node) if aliases else None
    main = isinstance(node, ast.If) and "__name__" in words(node.test)
    return node if bound(node) - known and not main else None


def assemble(reference, student, names, file):
    """The given tree with the student's version of these functions -> (tree, student's part); NotGraded.

    With it come the imports, functions, constants and methods that the student added, as far as it uses them,
    and the statements that fill them.
    """
    theirs, tree = parse(student, file), reference
    known = set().union(*map(bound, tree.body))
    functions, methods, bodies, stubs = [], [], [], 0
    for name in names:
        found = find(theirs, name)
        if found is None:
            raise NotGraded(f"{file} has no {name}: its name must stay")
        statements, j = found
        body, i = find(tree, name)
        body[i] = statements[j]
        stubs += is_stub(statements[j])
        functions.append(statements[j])
        if body is not tree.body and not any(body is b for b in bodies):
            bodies.append(body)
            own = set().union(*map(bound, body))
            methods += [(body, n) for n in statements if bound(n) - own]
    if stubs == len(names):
        raise NotGraded("not attempted: # YOUR CODE HERE is still there")
    added = [(n, new_part(n, known)) for n in theirs.body]
    added = [(n, part) for n, part in added if part is not None]
    # what the functions use, and what that uses
    chosen, pending = set(), list(functions)
    while pending:
        used = words(pending.pop())
        for n in [n for n, _ in added] + [n for _, n in methods]:
            if id(n) not in chosen and (bound(n) & used or "*" in bound(n)):
                chosen.add(id(n))
                pending.append(n)
    added_names = set().union(*(bound(n) for n, _ in added if id(n) in chosen)) - known
    fills = (ast.Expr, ast.Assign, ast.AugAssign, ast.For, ast.With, ast.Delete)
    tops = {name.split(".")[0] for name in names}
    border = min(max(k for k, n in enumerate(theirs.body) if top in bound(n)) for top in tops)
    before, after = [], []
    parts = {id(n): part for n, part in added if id(n) in chosen}
    for k, n in enumerate(theirs.body):
        if id(n) not in parts and isinstance(n, fills) and not bound(n) and words(n) & added_names:
            parts[id(n)] = n
        if id(n) in parts:
            (before if k < border else after).append(parts[id(n)])
    for body, n in methods:
        if id(n) in chosen:
            body.append(n)
    place = min(max(k for k, n in enumerate(tree.body) if top in bound(n)) for top in tops)
    tree.body[place:place] = before
    tree.body.extend(after)
    return tree, functions + [n for _, n in methods if id(n) in chosen] + before + after


# Not wrong in themselves, but an exercise has no use for them: a teacher should look at the code.
SUSPICIOUS = {"open", "exec", "eval", "compile", "__import__", "importlib", "__main__", "_getframe", "f_back",
              "inspect", "gc", "ctypes", "subprocess", "os", "sys", "globals", "__globals__", "__builtins__",
              "__subclasses__", "__file__", "pathlib", "Path", "glob", "socket", "marshal", "pickle"}


def suspicious(nodes):
    used = set()
    for node in nodes:
        used |= words(node)
        for n in ast.walk(node):
            if isinstance(n, ast.alias):
                used |= set(n.name.split("."))
            elif isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value in SUSPICIOUS:
                used.add(n.value)
    return sorted(used & SUSPICIOUS)


# === In a fork: one exercise of one student =============================================================
class Scripts:
    """The scripts and checks as modules from memory, {name: code}."""

    def __init__(self, code):
        self.code = code

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.code else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__file__ = module.__name__ + ".py"
        exec(self.code[module.__name__], module.__dict__)   # noqa: S102


FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "ctypes.dlopen",
    "socket.connect",
    "socket.bind",
    "gc.get_objects",
    "gc.get_referrers",
    "gc.get_referents",
    "shutil.rmtree",
)


def guard(folder):
    """Refuse files outside the folder and Python's own, other processes and the network, as far as Python's
    audit events reach. A mistake or a simple cheat ends here; code that means harm gets around it."""
    own = [os.path.realpath(p) for p in (*sys.path, sys.prefix, sys.base_prefix, folder) if p]
    own = tuple(p + os.sep for p in own if p != HERE)

    def hook(event, args):
        if event in FORBIDDEN:
            raise PermissionError(f"{event} is not allowed here")
        if event in ("open", "os.listdir", "os.scandir", "os.chdir", "os.remove", "os.rename"):
            path = args[0] if args else None
            if isinstance(path, bytes):
                path = os.fsdecode(path)
            named = isinstance(path, (str, os.PathLike)) and str(path) != os.devnull
            if named and not (os.path.realpath(path) + os.sep).startswith(own):
                raise PermissionError(f"{path} is outside the exercise's folder")
    sys.addaudithook(hook)


def where(error, file):
    """The student's line in which an exception came up, as text."""
    lines, step = [], error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == file and step.tb_lineno < SCRIPT_LINES:
            lines.append(step.tb_lineno)
        step = step.tb_next
    return f" ({file}, line {lines[-1]})" if lines else ""


def answer(function, file, encode):
    """What the student's code gives in one check, as a message."""
    try:
        function()
    except ModuleNotFoundError as error:
        return {"message": f"your code imports {error.name}, which is not installed here{where(error, file)}"}
    except BaseException as error:   # noqa: BLE001  sys.exit and KeyboardInterrupt, too
        if type(error).__name__ == "Recorded":
            return {"answer": encode(error.answer)}
        if type(error).__name__ == "Wrong":
            return {"message": str(error)}
        return {"message": f"{type(error).__name__}: {error}{where(error, file)}"}
    return {"message": "the check asked nothing"}


def examine(job, send, folder):
    file = job["file"]
    try:
        tree, part = assemble(job["tree"], job["source"], job["names"], file)
        code = {name: marshal.loads(base64.b64decode(text)) for name, text in job["code"].items()}
        code[file[:-3]] = compile(tree, file, "exec")
    except NotGraded as error:
        return send({"note": str(error)})
    except (SyntaxError, ValueError, RecursionError) as error:   # such as a return outside a function
        return send({"note": f"{file}, line {getattr(error, 'lineno', '?')}: {error}"})
    send({"look": suspicious(part)})
    key, name = job["key"], job["set"]
    job.clear()
    sys.meta_path.insert(0, Scripts(code))
    import checks
    importlib.import_module(name)
    import torch
    guard(folder)
    encode, seed = checks.encode, torch.manual_seed
    for i, (_, _, function) in enumerate(checks.CHECKS[key]):
        send({"started": i})
        seed(0)
        send({"check": i} | answer(function, file, encode))
    send({"done": True})


def limits(timeout):
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 1 << 28),
        (resource.RLIMIT_NPROC, 4096),
        (resource.RLIMIT_DATA, 2 << 30),
        (resource.RLIMIT_CPU, int(timeout) + 10),
    ):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard < 0 else min(most, hard),) * 2)


def child(job, pipe, folder):
    """Never returns."""
    try:
        os.setsid()
        os.chdir(folder)
        for name in ("HOME", "TMPDIR", "TORCH_HOME"):
            os.environ[name] = folder
        nowhere, out = os.open(os.devnull, os.O_RDONLY), os.open("output.txt", os.O_WRONLY | os.O_CREAT)
        for fd, place in ((nowhere, 0), (out, 1), (out, 2)):
            os.dup2(fd, place)
        os.closerange(3, pipe)
        os.closerange(pipe + 1, 1024)
        limits(job["timeout"])
        write, dumps = os.write, json.dumps

        def send(message):
            if message.get("message"):
                message["message"] = " ".join(str(message["message"]).split())[:500]
            data = (dumps(message) + "\n").encode()
            while data:
                data = data[write(pipe, data):]
        examine(job, send, folder)
    finally:
        os._exit(0)


def supervise(job):
    """Run one job in a fork of this process -> its messages, and how it ended: "", "time" or a sentence."""
    folder = tempfile.mkdtemp(prefix="exercise-")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(job, write, folder)
    os.close(write)
    data, end, status, deadline = b"", "", None, time.monotonic() + job["timeout"]
    while status is None:
        if time.monotonic() > deadline:
            end = "time"
            break
        ready = select.select([read], [], [], 0.02)[0]
        piece = os.read(read, 1 << 16) if ready else b""
        data += piece
        if not piece:   # the pipe's end, or nothing to read: has it ended? its own children may hold the pipe
            ended, value = os.waitpid(pid, os.WNOHANG)
            status = value if ended else None
            if ready and status is None:
                time.sleep(0.01)
        if len(data) > 1 << 26:
            end = "it wrote into the grader's channel"
            break
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    elif not end and os.WIFSIGNALED(status):
        end = f"the process was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    os.set_blocking(read, False)
    try:
        while piece := os.read(read, 1 << 20):
            data += piece
    except BlockingIOError:
        pass
    os.close(read)
    shutil.rmtree(folder, ignore_errors=True)
    messages = []
    for line in data.decode(errors="replace").split("\n"):
        try:
            messages.append(json.loads(line))
        except ValueError:
            continue
    return [m for m in messages if isinstance(m, dict)], end


def main():
    """Read jobs, a JSON line each, write [messages, end]. The first line names the packages to load, and the
    pipes and folders of the judge, which is forked off here."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:] = [p for p in sys.path if p and not Path(p, "vf_loss.py").exists()]
    first = json.loads(sys.stdin.readline())
    for name in first["packages"]:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            print(json.dumps({"missing": error.name}), file=reply, flush=True)
            return
    import torch
    torch.set_num_threads(1)   # no threads: they would not live through a fork
    gc.freeze()   # what is there now need not be looked at, and so not copied, in each fork
    if os.fork() == 0:
        path = Path(first["folders"][0], "judge.py")
        spec = importlib.util.spec_from_file_location("judge", path)
        judge = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(judge)
        judge.serve(*first["pipes"], first["folders"])
    for pipe in first["pipes"]:
        os.close(pipe)
    first.clear()
    print(json.dumps({"missing": None}), file=reply, flush=True)
    key, tree = None, None
    for line in sys.stdin:
        job = json.loads(line)
        if job["key"] != key:    # one tree only: it holds the solutions of other exercises
            key, tree = job["key"], ast.parse("\n" * SCRIPT_LINES + job["given"])
        print(json.dumps(supervise(job | {"tree": tree})), file=reply, flush=True)


if __name__ == "__main__":
    main()
