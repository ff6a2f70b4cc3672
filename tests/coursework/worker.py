"""The process in which students' code runs. It is started from a copy in an empty folder and is told, for
each exercise, the scripts without this exercise's functions, the student's file, and the asking half of the
checks. It knows no expected value, no slow reference, and not where the repository is. Each exercise is a
fork of it."""
import ast
import base64
import contextlib
import gc
import importlib.util
import json
import marshal
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback

SCRIPT_LINES = 100_000   # empty lines before the reference's: a smaller line number is the student's
MOST = 1 << 26           # bytes that an exercise may send
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

FILLS = (ast.Expr, ast.Assign, ast.AugAssign, ast.For, ast.With, ast.Delete)

def assemble(tree, student, names, file):
    """The given tree, changed to hold the student's version of these functions -> it and the student's part.

    With them come the imports, functions, constants and methods that the student added, as far as the
    functions use them, and the statements that fill them. NotGraded if there is nothing to run.
    """
    theirs, known = parse(student, file), set().union(*map(bound, tree.body))
    functions, methods, classes = [], {}, []     # methods: added method -> the class body that it joins
    for name in names:
        found = find(theirs, name)
        if found is None:
            raise NotGraded(f"{file} has no {name}: its name must stay")
        (statements, j), (body, i) = found, find(tree, name)
        body[i] = statements[j]
        functions.append(statements[j])
        if body is not tree.body and id(body) not in classes:
            classes.append(id(body))
            own = set().union(*map(bound, body))
            methods |= {n: body for n in statements if bound(n) - own}
    if all(map(is_stub, functions)):
        raise NotGraded("not attempted: # YOUR CODE HERE is still there")
    parts = {n: part for n in theirs.body if (part := new_part(n, known)) is not None}
    chosen, pending = set(), list(functions)     # what the functions use, and what that uses
    while pending:
        used = words(pending.pop())
        for n in [*parts, *methods]:
            if n not in chosen and (bound(n) & used or "*" in bound(n)):
                chosen.add(n)
                pending.append(n)
    filled = set().union(*(bound(n) for n in chosen if n in parts)) - known
    fills = [n for n in theirs.body if isinstance(n, FILLS) and not bound(n) and words(n) & filled]
    parts |= {n: n for n in fills}
    chosen |= set(fills)
    added = [n for n in methods if n in chosen]
    for n in added:
        methods[n].append(n)

    def first(body):
        owners = {name.split(".")[0] for name in names}
        return min(max(k for k, n in enumerate(body) if owner in bound(n)) for owner in owners)

    border, place = first(theirs.body), first(tree.body)
    before = [parts[n] for n in theirs.body[:border] if n in chosen]
    after = [parts[n] for n in theirs.body[border:] if n in chosen]
    tree.body[place:place] = before
    tree.body.extend(after)
    return tree, functions + added + before + after

# Not wrong in themselves, but an exercise has no use for them: a teacher should look at the code.
SUSPICIOUS = {"open", "exec", "eval", "compile", "__import__", "importlib", "__main__", "_getframe", "f_back",
              "inspect", "gc", "ctypes", "subprocess", "os", "sys", "globals", "__globals__", "__builtins__",
              "__subclasses__", "__file__", "pathlib", "Path", "glob", "socket", "marshal", "pickle", "sqrtm"}

def suspicious(nodes):
    used = set().union(*map(words, nodes))
    for n in (n for node in nodes for n in ast.walk(node)):
        if isinstance(n, ast.alias):
            used |= set(n.name.split("."))
        elif isinstance(n, ast.Constant) and isinstance(n.value, str):
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

FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.kill",
             "os.killpg", "ctypes.dlopen", "socket.connect", "socket.bind", "gc.get_objects",
             "gc.get_referrers", "gc.get_referents", "shutil.rmtree")
FILE_EVENTS = ("open", "os.listdir", "os.scandir", "os.chdir", "os.remove", "os.rename")

def guard(folder):
    """Refuse files outside the folder and Python's own, other processes and the network, as far as Python's
    audit events reach. A mistake or a simple cheat ends here; code that means harm gets around it."""
    own = [os.path.realpath(p) for p in (*sys.path, sys.prefix, sys.base_prefix, folder) if p]
    own = tuple(p + os.sep for p in own if p != HERE)

    def hook(event, args):
        if event in FORBIDDEN:
            raise PermissionError(f"{event} is not allowed here")
        if event in FILE_EVENTS and args and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(args[0])
            if path != os.devnull and not (os.path.realpath(path) + os.sep).startswith(own):
                raise PermissionError(f"{path} is outside the exercise's folder")
    sys.addaudithook(hook)

def where(error, file):
    """The student's line in which an exception came up, as text."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
             if frame.f_code.co_filename == file and line < SCRIPT_LINES]
    return f" ({file}, line {lines[-1]})" if lines else ""

def answer(function, file, encode):
    """What the student's code gives in one check, as a message."""
    try:
        function()
    except ModuleNotFoundError as error:
        return {"message": f"your code imports {error.name}, which is not installed here{where(error, file)}"}
    except BaseException as error:   # noqa: BLE001  sys.exit and KeyboardInterrupt, too
        name = type(error).__name__
        if name == "Recorded":
            return {"answer": encode(error.args[0])}
        return {"message": str(error) if name == "Wrong" else f"{name}: {error}{where(error, file)}"}
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
    most = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 1 << 28, resource.RLIMIT_NPROC: 4096,
            resource.RLIMIT_DATA: 2 << 30, resource.RLIMIT_CPU: int(timeout) + 10}
    for what, value in most.items():
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (value if hard < 0 else min(value, hard),) * 2)

def child(job, pipe, folder):
    """Never returns."""
    try:
        os.setsid()
        os.chdir(folder)
        for name in ("HOME", "TMPDIR", "TORCH_HOME"):
            os.environ[name] = folder
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for place in (1, 2):
            os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT), place)
        os.closerange(3, pipe)
        os.closerange(pipe + 1, 1024)
        limits(job["timeout"])
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")    # if memory runs out, this process ends first, where the system allows it
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
    os.set_blocking(read, False)
    data, end, ended, deadline = b"", "", 0, time.monotonic() + job["timeout"]
    while not ended and not end:
        time.sleep(0.005)
        ended, status = os.waitpid(pid, os.WNOHANG)
        data += drained(read)
        if len(data) >= MOST:
            end = "it wrote into the grader's channel"
        elif not ended and time.monotonic() > deadline:
            end = "time"
    with contextlib.suppress(ProcessLookupError, PermissionError):    # its own children, too
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    elif not end and os.WIFSIGNALED(status):
        end = f"the process was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    os.close(read)
    shutil.rmtree(folder, ignore_errors=True)
    return messages(data), end

def drained(pipe):
    """What there is to read, without waiting for more."""
    data = b""
    with contextlib.suppress(BlockingIOError):
        while len(data) < MOST and (piece := os.read(pipe, 1 << 20)):
            data += piece
    return data

def messages(data):
    """The dictionaries in bytes, a JSON line each; what else is there, a student's code has written."""
    found = []
    for line in data.decode(errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [m for m in found if isinstance(m, dict)]

def main():
    """Read jobs, a JSON line each, write [messages, end]. The first line names the packages to load, and the
    pipes and folders of the judge, which is forked off here."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:] = [p for p in sys.path if p and not os.path.exists(os.path.join(p, "vf_loss.py"))]
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
        # the worker's pipes are the worker's alone: the grader must see when it ends
        reply.close()
        os.close(0)
        sys.path[:0] = first["folders"]
        import judge
        judge.serve(*first["pipes"])
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
