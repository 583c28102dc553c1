"""Attacks that use up time, memory, processes, files and the host's patience."""

from __future__ import annotations

from .record import Attack

_FORKS = """
import os, time
pids = []
try:
    for _ in range(60):
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        pids.append(pid)
except OSError:
    pass
len(pids) >= 60
"""

ATTACKS = (
    Attack("endless loop", "while True:\n    pass", "never returns", "ends", seconds=0.7),
    Attack("endless loop in C", "7 ** (10 ** 9)", "cannot be interrupted by Python", "ends", seconds=0.7),
    Attack(
        "catastrophic regular expression",
        "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
        "cannot be interrupted by Python",
        "ends",
        seconds=0.7,
    ),
    Attack(
        "deaf loop",
        """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
        "ignores the signals that would end it",
        "ends",
        seconds=0.7,
    ),
    Attack(
        "clock games",
        "import time\ntime.monotonic = time.time = time.perf_counter = lambda: 0.0\nwhile True:\n    pass",
        "stops the clock that its time limit reads",
        "ends",
        seconds=0.7,
    ),
    Attack(
        "swallowed exceptions",
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        "survives a time limit made of exceptions",
        "ends",
        seconds=0.7,
    ),
    Attack(
        "memory",
        "room = bytearray(900 << 20)\nlen(room) > 0",
        "takes the machine's memory",
        control="room = bytearray(900 << 20)\nlen(room) > 0",
    ),
    Attack(
        "memory in many processes",
        """
import os, select, time
filled, mine = os.pipe()
pids = []
for _ in range(10):
    pids.append(os.fork())
    if pids[-1] == 0:
        try:
            room = bytearray(120 << 20)
            for at in range(0, len(room), 4096):
                room[at] = 1
            os.write(mine, b"x")
            time.sleep(20)
        finally:
            os._exit(1)
until, have = time.monotonic() + 4, 0
while have < 10 and select.select([filled], [], [], max(0, until - time.monotonic()))[0]:
    have += len(os.read(filled, 10))
time.sleep(1)  # what looks after the session may take a moment
alive = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
len(alive) >= 10
""",
        "takes the machine's memory past the limit of each process",
        seconds=6,
        shared=True,
        grouped=True,
    ),
    Attack("processes", _FORKS, "fills the process table", shared=True),
    Attack(
        "fork bomb",
        """
import os, time
for _ in range(10 ** 6 if T["near"] else 3):
    try:
        os.fork()
    except OSError:
        pass
import sys
os._exit(1)
""",
        "doubles until the machine stands still",
        "ends",
        seconds=1,
        shared=True,
    ),
    Attack(
        "thread bomb",
        """
import threading, time
started = 0
try:
    for _ in range(100):
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        started += 1
except RuntimeError:
    pass
started >= 100
""",
        "fills the process table with threads",
        shared=True,
    ),
    Attack(
        "process numbers",
        """
import _thread
done, gate = 0, _thread.allocate_lock()
gate.acquire()
def run():
    gate.release()
most = 40_000 if T["near"] else 4000
while done < most:
    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:
        continue
    gate.acquire()
    done += 1
done >= most
""",
        "goes once around all process numbers, so that its supervisor loses count",
        seconds=6,
        shared=True,
    ),
    Attack(
        "zombies",
        "import os\nfor _ in range(20):\n    if os.fork() == 0:\n        os._exit(0)\nTrue",
        "leaves processes that nobody reaps",
        "own",
    ),
    Attack(
        "disk",
        "with open('big', 'wb') as file:\n    for _ in range(96):\n        file.write(bytes(1 << 20))\nTrue",
        "fills the disk",
        shared=True,
    ),
    Attack(
        "disk in many files",
        "for number in range(96):\n    with open(f'big{number}', 'wb') as file:\n        file.write(bytes(1 << 20))\nTrue",
        "fills the disk past the limit of each file",
        shared=True,
    ),
    Attack(
        "inodes",
        "for number in range(17_000):\n    open(f'f{number}', 'w').close()\nTrue",
        "fills the disk with empty files",
        seconds=6,
        shared=True,
    ),
    Attack(
        "sparse file",
        "file = open('big', 'wb')\nfile.truncate(1 << 40)\nfile.tell() == 0",
        "makes a file that kills whoever copies it",
        shared=True,
    ),
    Attack(
        "descriptors",
        "import os\nfds = []\ntry:\n    for _ in range(600):\n        fds.append(os.open('/dev/null', 0))\n"
        "except OSError:\n    pass\nlen(fds) >= 600",
        "takes all open files",
    ),
    Attack(
        "raised limits",
        "import resource as r\nhard = r.getrlimit(r.RLIMIT_NOFILE)[1]\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (4000, max(4000, hard)))\nr.getrlimit(r.RLIMIT_NOFILE)[0] >= 4000",
        "lifts its own limits",
    ),
    Attack(
        "raised priority",
        "import os\nos.nice(-5)\nTrue",
        "starves other processes",
        rights=True,
    ),
    Attack(
        "huge output",
        "for _ in range(400):\n    print('x' * 100_000)",
        "fills the host's memory and log",
        "big",
    ),
    Attack("huge value", "'x' * 200_000_000", "fills the host's memory and log", "big"),
    Attack(
        "output past Python",
        "import os\ntotal = 0\nfor _ in range(300):\n    total += os.write(1, bytes(1 << 20)) + os.write(2, bytes(1 << 20))\nTrue",
        "fills the host's log or blocks on a full pipe",
        "own",
    ),
    Attack("huge integer", "10 ** 100_000", "costs the reader quadratic time", "ends"),
    Attack(
        "deep recursion",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n):\n    return f(n + 1)\n"
        "class A:\n    def __repr__(self):\n        return repr(self)\nrepr(A())",
        "overflows the C stack",
        "ends",
    ),
    Attack(
        "deep recursion in C",
        "import sys\nsys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(3 * 10 ** 5):\n    x = [x]\nrepr(x)",
        "overflows the C stack",
        "ends",
    ),
    Attack(
        "deep source",
        "import sys\nsys.setrecursionlimit(10 ** 9)\nbody = compile('-' * 10 ** 6 + '1', 'x', 'eval')\neval(body)",
        "overflows the compiler's stack",
        "ends",
    ),
    Attack(
        "socket buffers",
        """
import socket
pairs = []
try:
    for _ in range(100):
        a, b = socket.socketpair()
        a.setblocking(False)
        a.send(bytes(1 << 17))
        pairs.append((a, b))
except OSError:
    pass
len(pairs) > 50
""",
        "holds memory of the kernel; 256 descriptors a process are the bound",
        "own",
    ),
    Attack(
        "descriptors in flight",
        """
import socket
a, b = socket.socketpair()
a.setblocking(False)
sent = 0
try:
    for _ in range(1000):
        c, d = socket.socketpair()
        socket.send_fds(c, [b"x"], [c.fileno(), d.fileno()])
        socket.send_fds(a, [b"x"], [c.fileno(), d.fileno()])
        c.close(), d.close()
        sent += 1
except OSError:
    pass
sent > 10
""",
        "sends sockets through themselves until the kernel's garbage collector is busy",
        "own",
    ),
)
