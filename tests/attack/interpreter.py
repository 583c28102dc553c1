"""Attacks on the interpreter that runs the code, and on the messages to the host."""

from __future__ import annotations

from .record import Attack

_SOCKETS = """
import json, os, socket, stat, struct, time
def sockets():
    found = []
    for fd in range(3, 256):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                found.append(fd)
        except OSError:
            pass
    return found
def frame(message):
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack("!I", len(data)) + data
def write(data):
    for fd in sockets():
        os.set_blocking(fd, True)
        while data:
            data = data[os.write(fd, data):]
"""

MESSAGES = (
    Attack(
        "forged outcome",
        _SOCKETS + "write(frame({'value': 'forged', 'printed': '', 'final': True, 'size': 0,"
        " 'tool_uses': [{'name': 'search', 'arguments': {}, 'result': 'x'}], 'tries': 3}))\ntime.sleep(0.2)",
        "says what it likes in the runner's name; only its own outcome can be forged",
        "own",
    ),
    Attack(
        "frames that come later",
        _SOCKETS
        + """
import threading
def later():
    time.sleep(0.3)
    while True:
        try:
            write(frame({"value": 1, "pids": [1], "printed": "stale", "final": True, "kept": True}))
        except OSError:
            return
        time.sleep(0.01)
threading.Thread(target=later, daemon=True).start()
True
""",
        "answers the host's next question before the runner does",
        "own",
    ),
    Attack(
        "two outcomes",
        _SOCKETS + "write(frame({'value': True, 'printed': ''}) * 50)",
        "leaves stale answers behind its own",
        "own",
    ),
    Attack(
        "huge frame",
        _SOCKETS + "write(struct.pack('!I', 0xFFFFFFFF) + b'x' * 1000)",
        "has the host take four gigabytes",
        "ends",
    ),
    Attack(
        "many parts",
        _SOCKETS + "write(frame(b'[' + b'[],' * 5_000_000 + b'[]]'))",
        "has the host build a hundred times what was sent",
        "ends",
        seconds=4,
    ),
    Attack(
        "deep frame",
        _SOCKETS + "write(frame(b'{\"value\": ' + b'[' * 100_000 + b']' * 100_000 + b'}'))\ntime.sleep(0.1)",
        "overflows the host's parser",
        "ends",
    ),
    Attack(
        "rather deep value",
        _SOCKETS
        + "write(frame(b'{\"value\": ' + b'[' * 300 + b'1' + b']' * 300 + b'}'))\ntime.sleep(0.1)\nTrue",
        "passes the parser and breaks what writes records down",
        "own",
    ),
    Attack(
        "no JSON",
        _SOCKETS + "write(frame(b'\\xff\\xfe' * 40))\ntime.sleep(0.1)",
        "breaks the host's parser",
        "ends",
    ),
    Attack(
        "odd JSON",
        _SOCKETS + 'write(frame(b\'{"value": {"a": NaN, "b": Infinity, "\\\\ud800": "\\\\udfff\\\\u2028"},'
        ' "printed": "\\\\ud800"}\'))\ntime.sleep(0.1)',
        "breaks what writes records down with values that are no valid text",
        "own",
    ),
    Attack(
        "wrong types",
        _SOCKETS
        + "write(frame({'value': 1, 'printed': ['x'], 'error': {}, 'final': 'yes'}))\ntime.sleep(0.1)\nTrue",
        "crashes the host on a missing check",
        "own",
    ),
    Attack(
        "calls of wrong types",
        _SOCKETS + "write(frame({'call': ['x'], 'args': 3, 'kwargs': None, 'value': True}))\ntime.sleep(0.1)",
        "crashes the host's tools",
        "own",
    ),
    Attack(
        "flood of calls",
        _SOCKETS
        + """
for number in range(200_000):
    write(frame({"call": "nothing", "args": [number, "x" * 10_000], "kwargs": {}, "value": True}))
""",
        "fills the host's records with calls whose answers it never reads",
        "own",
        seconds=1.5,
    ),
    Attack(
        "slow frame",
        _SOCKETS + "write(struct.pack('!I', 1000))\nwhile True:\n    write(b' ')\n    time.sleep(0.05)",
        "keeps the host waiting for ever with a byte at a time",
        "ends",
        seconds=0.7,
    ),
    Attack("closed descriptors", "import os\nos.closerange(0, 256)", "cannot be spoken to any more", "ends"),
    Attack(
        "replaced descriptors",
        "import os\nfd = os.open('/dev/null', os.O_RDWR)\nfor at in range(256):\n    os.dup2(fd, at)",
        "takes the place of the protocol's descriptors",
        "ends",
        seconds=1,
    ),
    Attack(
        "shut socket",
        _SOCKETS + "for fd in sockets():\n    socket.socket(fileno=os.dup(fd)).shutdown(2)",
        "ends the conversation one-sidedly",
        "ends",
    ),
)

PYTHON = (
    Attack("os._exit", "import os\nos._exit(0)", "ends the runner", "ends"),
    Attack("sys.exit", "import sys\nsys.exit(0)", "ends the runner", "ends"),
    Attack("abort", "import os\nos.abort()", "crashes the runner", "ends"),
    Attack("null pointer", "import ctypes\nctypes.string_at(0)", "crashes the runner", "ends"),
    Attack(
        "own code object",
        "import types\nf = lambda: 0\ntype(f)(f.__code__.replace(co_code=bytes(64), co_stacksize=0), {})()",
        "crashes the runner with bytecode of its own",
        "ends",
    ),
    Attack(
        "patched builtins",
        """
import builtins
def lie(*args, **kwargs):
    raise SystemExit("patched")
for name in ("len", "isinstance", "str", "repr", "open", "print", "type", "sorted", "getattr", "compile", "exec", "eval"):
    setattr(builtins, name, lie)
builtins.len is lie
""",
        "replaces what the runner calls",
        "ends",
    ),
    Attack(
        "patched modules",
        """
import ast, io, json, os, random, select, signal, socket, struct, sys, threading, time, traceback
def lie(*args, **kwargs):
    return b"forged"
json.dumps = json.loads = json.JSONEncoder.encode = json.JSONDecoder.decode = lie
struct.pack = struct.unpack = socket.send_fds = socket.recv_fds = os.fork = os._exit = os.waitpid = lie
ast.parse = traceback.extract_tb = random.getstate = random.setstate = time.monotonic = select.poll = lie
json.dumps({}) == b"forged"
""",
        "replaces what the runner calls",
        "own",
    ),
    Attack(
        "emptied modules",
        "import sys\nfor name in list(sys.modules):\n    if name not in ('sys', 'builtins'):\n"
        "        vars(sys.modules[name]).clear()\nTrue",
        "takes the runner's modules away under it",
        "ends",
    ),
    Attack(
        "hostile text of a value",
        "class A:\n    def __repr__(self):\n        while True:\n            pass\n    __str__ = __repr__\nA()",
        "hangs whoever shows a value",
        "ends",
        seconds=0.7,
    ),
    Attack(
        "text that is none",
        "class A:\n    def __str__(self):\n        return 7\n    def __repr__(self):\n        raise KeyboardInterrupt\nA()",
        "breaks whoever shows a value",
        "ends",
    ),
    Attack(
        "exit while shown",
        "class A:\n    def __str__(self):\n        import os\n        os._exit(3)\nA()",
        "ends the runner while a value is shown",
        "ends",
    ),
    Attack(
        "endless containers",
        """
class L(list):
    def __len__(self):
        return 1
    def __iter__(self):
        while True:
            yield self
L([1])
""",
        "hangs whoever turns a value into JSON",
        "ends",
        seconds=0.7,
    ),
    Attack(
        "lying types",
        """
class S(str):
    def __getitem__(self, at):
        return S("x" * 10 ** 6)
    def __class__(self):
        return int
class I(int):
    def __str__(self):
        return "[" * 10 ** 6
    __repr__ = __str__
class K(str):
    def __hash__(self):
        return 7
    def __eq__(self, other):
        raise RuntimeError
[S("a"), I(3), {K("a"): 1, "b": float("nan")}]
""",
        "passes checks of type and length as something else",
        "own",
    ),
    Attack(
        "hostile exception",
        """
class E(BaseException):
    def __str__(self):
        raise SystemExit
    @property
    def __traceback__(self):
        while True:
            pass
    __cause__ = __context__ = property(lambda self: self)
raise E
""",
        "breaks whoever reports an error",
        "ends",
        seconds=1,
    ),
    Attack(
        "exit handlers",
        """
import atexit, signal, threading
def loop(*_):
    while True:
        pass
atexit.register(loop)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGCONT, signal.SIGXCPU, signal.SIGCHLD):
    signal.signal(number, loop)
class D:
    def __del__(self):
        loop()
keep = D()
True
""",
        "runs on when it should end",
        "own",
    ),
    Attack(
        "timer",
        "import signal\nsignal.signal(signal.SIGALRM, lambda *_: 1 / 0)\nsignal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)\nTrue",
        "throws exceptions into the runner",
        "own",
    ),
    Attack(
        "trace function",
        "import sys, threading\ndef trace(*_):\n    raise SystemExit\nthreading.settrace(trace)\nsys.setprofile(trace)\nTrue",
        "runs inside each call of the runner",
        "ends",
    ),
    Attack(
        "import hook",
        "import sys\nclass F:\n    def find_spec(self, *_):\n        raise SystemExit\nsys.meta_path.insert(0, F())\n"
        "sys.path_hooks.clear()\nsys.path.clear()\nTrue",
        "runs inside each import of the runner",
        "own",
    ),
    Attack(
        "reached runner",
        """
import gc, sys
found = []
for thing in gc.get_objects():
    if type(thing).__name__ in ("Runner", "Session"):
        thing.__dict__.clear()
        found.append(thing)
at = sys._getframe()
while at.f_back:
    at = at.f_back
    for value in list(at.f_locals.values()):
        if type(value).__name__ in ("Runner", "Session"):
            value.__dict__.clear()
            found.append(value)
True
""",
        "changes the runner's own objects",
        "own",
    ),
)

ATTACKS = (*MESSAGES, *PYTHON)
