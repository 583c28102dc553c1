"""Attacks on what outlives an action: the working directory, processes left behind, the other candidates."""

from __future__ import annotations

from .record import RAW, Attack

_COUNTER = """
import os, time
def count(path):
    while True:
        with open(path, "a") as file:
            file.write("x")
        time.sleep(0.01)
"""

ATTACKS = (
    Attack(
        "left thread",
        _COUNTER + "import threading\nthreading.Thread(target=count, args=('n',)).start()\nTrue",
        "runs on after its action",
        "own",
    ),
    Attack(
        "left daemon",
        _COUNTER
        + """
if os.fork() == 0:
    if os.fork() == 0:
        try:
            os.setsid()
        except OSError:
            pass
        count("n")
    os._exit(0)
os.wait()
True
""",
        "runs on after its action, with no parent that could end it",
        "own",
    ),
    Attack(
        "fork while it is stopped",
        """
import os, threading, time
room = bytearray(200 << 20)
for at in range(0, len(room), 4096):
    room[at] = 1
def forks():
    while True:
        try:
            if os.fork() == 0:
                os._exit(0)
        except OSError:
            time.sleep(0.001)
threading.Thread(target=forks, daemon=True).start()
time.sleep(0.1)
True
""",
        "has a fork under way whenever its supervisor looks around",
        "own",
    ),
    Attack(
        "vfork",
        RAW
        + """
import threading, time
def forks():
    pid = libc.vfork()
    if pid == 0:
        time.sleep(60)
thread = threading.Thread(target=forks, daemon=True).start()
time.sleep(0.1)
True
""",
        "waits in the kernel where a stop does not reach it",
        "own",
    ),
    Attack(
        "working directory replaced by a link",
        "import os\nhere = os.getcwd()\n'\\n'.join(open(name).read() for name in os.listdir(here) if name == 'canary')",
        "has its supervisor copy a host folder into the next candidates' directories",
        "secret",
        before=("import os\nhere = os.getcwd()\nos.rename(here, here + 'x')\nos.symlink(T['folder'], here)",),
        control="import os, shutil\nos.symlink(T['folder'], 'home')\n"
        "shutil.copytree('home', 'copy', ignore=shutil.ignore_patterns('socket'))\n"
        "open('copy/canary').read()",
    ),
    Attack(
        "folder replaced by a link",
        "import os\n[open('d/canary').read()]",
        "the same one floor deeper, where copying follows links",
        "secret",
        before=("import os\nos.symlink(T['folder'], 'd')\nos.symlink('/', 'root')",),
    ),
    Attack(
        "folder swapped while it is copied",
        """
import os
found = []
for top, _, names in os.walk("."):
    found += [open(os.path.join(top, name), errors="replace").read() for name in names if name == "canary"]
found
""",
        "wins a race between its supervisor's look and its copy",
        "secret",
        before=(
            """
import os, threading
os.mkdir("d")
os.symlink(T["folder"], "l")
def swap():
    while True:
        try:
            os.rename("d", "x"); os.rename("l", "d"); os.rename("d", "l"); os.rename("x", "d")
        except OSError:
            pass
threading.Thread(target=swap, daemon=True).start()
if os.fork() == 0:
    swap()
""",
        ),
        control="import os, shutil\nos.symlink(T['folder'], 'd')\n"
        "shutil.copytree('d', 'copy', ignore=shutil.ignore_patterns('socket'))\nopen('copy/canary').read()",
    ),
    Attack(
        "FIFO in scratch",
        "import os\nos.mkfifo('fifo')\nTrue",
        "blocks whoever copies the directory",
        "ends",
        control="import os\nos.mkfifo('fifo')\nopen('fifo').read()",
        seconds=1,
    ),
    Attack(
        "deep folders",
        "import os\nfor _ in range(1200):\n    os.mkdir('ddd')\n    os.chdir('ddd')\nTrue",
        "overflows whoever walks the tree, and cannot be removed by its path",
        "own",
    ),
    Attack(
        "locked folders",
        "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nos.chmod('a/b', 0)\nos.chmod('a', 0)\nTrue",
        "cannot be copied or removed by an ordinary user",
        "own",
    ),
    Attack(
        "taken names",
        """
import os
top = os.path.dirname(os.getcwd())
for number in range(8):
    try:
        os.symlink("/etc", f"{top}/home-{number}")
        os.symlink("/etc", f"{top}/home-removed-{number}")
    except OSError:
        pass
open("home-old", "w").close()
True
""",
        "takes the names that its supervisor will use",
        "own",
    ),
    Attack(
        "removed working directory",
        "import os, shutil\nhere = os.getcwd()\nos.chdir('/')\nshutil.rmtree(here)\nnot os.path.exists(here)",
        "takes the ground away from what follows",
        "own",
    ),
    Attack(
        "shared position of a file",
        "import os\nos.lseek(fd, 0, 2)\nos.write(fd, b'y')\nTrue",
        "moves the other candidates' place in a file that the session has opened",
        "own",
        before=("import os\nfd = os.open('notes', os.O_CREAT | os.O_RDWR)\nos.write(fd, b'x')",),
    ),
    Attack(
        "session that answers for its candidates",
        """
import gc, json, os, socket, stat, struct, threading, time
def lie():
    data = json.dumps({"value": "forged", "printed": "", "pids": [1, -1, 0]}).encode()
    for _ in range(3000):
        for fd in range(3, 64):
            try:
                if stat.S_ISSOCK(os.fstat(fd).st_mode):
                    os.set_blocking(fd, False)
                    os.write(fd, struct.pack("!I", len(data)) + data)
            except OSError:
                pass
        time.sleep(0.001)
threading.Timer(0.5, lie).start()
True
""",
        "takes the candidates' sockets when they are made and speaks in their names",
        "own",
    ),
    Attack(
        "false process numbers",
        """
import sys
def lying(frame, event, arg):
    return None
for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").endswith("session") and hasattr(module, "_fork"):
        real = module._fork
        module._fork = lambda: real() and 1
True
""",
        "has its supervisor keep, stop or kill the wrong process",
        "own",
    ),
    Attack(
        "session that does not answer",
        "import threading\nthreading.Timer(0.2, lambda: 7 ** (10 ** 9)).start()\nTrue",
        "keeps the host waiting at the next step",
        "own",
    ),
)
