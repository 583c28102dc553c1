"""Attacks with system calls: programs, signals, tracing, namespaces, kernel interfaces."""

from __future__ import annotations

from .record import IS_X86, RAW, Attack

_PROGRAM = """
import os
def run(path, *words):
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(path, [path, *words])
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
touch = f"echo > {T['folder']}/ran"
"""
_TARGETS = "[T['pid'], *T['near']]"
_APART = """
import ctypes, os
def apart(does):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if does() else 1
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0
def user():
    os.unshare(0x10000000) if hasattr(os, "unshare") else libc.unshare(0x10000000)
libc = ctypes.CDLL(None, use_errno=True)
"""

PROGRAMS = (
    Attack("shell", "import os\nos.system(f\"echo > {T['folder']}/ran\")", "runs any program", "world"),
    Attack(
        "subprocess",
        "import subprocess\nsubprocess.run(['/bin/sh', '-c', f\"echo > {T['folder']}/ran\"])",
        "runs any program",
        "world",
    ),
    Attack(
        "pickle",
        """
import pickle
class Bomb:
    def __reduce__(self):
        import os
        return os.system, (f"echo > {T['folder']}/ran",)
pickle.loads(pickle.dumps(Bomb()))
""",
        "runs a program while an object is read",
        "world",
    ),
    Attack(
        "program in memory",
        _PROGRAM
        + """
fd = os.memfd_create("x", 0)
os.write(fd, b"#!/bin/sh\\n" + touch.encode())
run(f"/proc/self/fd/{fd}")
""",
        "runs a program that is in no file",
        "world",
    ),
    Attack(
        "loader",
        _PROGRAM
        + """
import glob
for loader in [*glob.glob("/lib64/ld-linux-*"), *glob.glob("/lib/ld-linux-*")]:
    run(loader, os.path.realpath("/bin/sh"), "-c", touch)
""",
        "runs a program past a check for executable files",
        "world",
    ),
    Attack(
        "setuid program",
        _PROGRAM
        + """
import shutil
shutil.copy(os.path.realpath("/bin/sh"), "sh")
os.chmod("sh", 0o4755)
run("./sh", "-c", touch)
""",
        "leaves a program behind that runs with the user's rights",
        "world",
    ),
    Attack(
        "LD_PRELOAD",
        "import os\nos.environ['LD_PRELOAD'] = './x.so'\nos.posix_spawn('/bin/sh', ['sh', '-c',"
        " f\"echo > {T['folder']}/ran\"], os.environ)\nimport time; time.sleep(0.3)",
        "puts its code into programs that are started",
        "world",
    ),
    Attack(
        "library in scratch",
        """
import ctypes, shutil
for line in __import__("glob").glob("/lib*/*/libm.so.6") + __import__("glob").glob("/lib*/libm.so.6"):
    shutil.copy(line, "libm.so")
ctypes.CDLL("./libm.so").cos is not None
""",
        "loads native code that it has written",
    ),
)

SIGNALS = (
    Attack(
        "kill",
        f"import os\nfor pid in {_TARGETS}:\n    try:\n        os.kill(pid, 9)\n    except OSError:\n        pass",
        "kills the user's processes, the sandbox's own among them",
        "world",
    ),
    Attack(
        "stop",
        f"import os\nfor pid in {_TARGETS}:\n    try:\n        os.kill(pid, 19)\n    except OSError:\n        pass\n"
        "import time; time.sleep(0.1)",
        "stops what supervises it",
        "world",
    ),
    Attack(
        "kill all",
        "import os\nos.kill(-1, 9)",
        "kills everything of the user",
        "ends",
        control="import os\nos.killpg(0, 9)",
    ),
    Attack(
        "rarer ways to signal",
        RAW
        + f"""
import struct
info = ctypes.create_string_buffer(struct.pack("=iiii", 9, 0, -1, 0), 128)
for pid in {_TARGETS}:
    call((200, 130), pid, 9)                # tkill
    call((234, 131), pid, pid, 9)           # tgkill
    call((129, 138), pid, 9, info)          # rt_sigqueueinfo
    call((297, 240), pid, pid, 9, info)     # rt_tgsigqueueinfo
    fd = call(434, pid, 0)                  # pidfd_open
    call(424, fd, 9, None, 0)               # pidfd_send_signal
""",
        "kills by calls other than kill",
        "world",
    ),
    Attack(
        "signals through a pipe",
        f"""
import fcntl, os, time
for pid in {_TARGETS}:
    for how in (8, 15):  # F_SETOWN, F_SETOWN_EX
        r, w = os.pipe()
        try:
            fcntl.fcntl(r, how, pid if how == 8 else __import__("struct").pack("=ii", 1, pid))
            fcntl.fcntl(r, 10, 9)  # F_SETSIG: SIGKILL
            fcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | os.O_ASYNC)
            os.write(w, b"x")
        except OSError:
            pass
time.sleep(0.1)
""",
        "has the kernel kill others when a pipe gets data",
        "world",
    ),
    Attack(
        "signal at a child's end",
        RAW + "pid = call((56, 220), 18, 0, 0, 0, 0)\nif pid == 0:\n    os._exit(0)\npid > 0",
        "wakes a process that its supervisor has stopped, with SIGCONT when a child dies",
    ),
    Attack(
        "process groups",
        "import os\npid = os.fork()\nif pid == 0:\n    try:\n        os.setsid()\n        os._exit(7)\n"
        "    finally:\n        os._exit(0)\nos.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7",
        "wakes a stopped process through an orphaned process group; escapes kills of a group",
    ),
    Attack(
        "limits of others",
        f"""
import resource
changed = []
for pid in {_TARGETS}:
    if pid == 0:
        continue  # itself
    try:
        was = resource.prlimit(pid, resource.RLIMIT_CORE)
        resource.prlimit(pid, resource.RLIMIT_CORE, was)
        changed.append(pid)
    except OSError:
        pass
changed
""",
        "ends others by lowering their limits",
    ),
    Attack(
        "priority of others",
        f"import os\nfor pid in {_TARGETS}:\n    os.setpriority(os.PRIO_PROCESS, pid, 19)\nTrue",
        "starves other processes",
    ),
    Attack(
        "death signal of the parent",
        RAW
        + "libc.prctl(1, ctypes.c_ulong(0), 0, 0, 0) == 0 and libc.prctl(36, ctypes.c_ulong(1), 0, 0, 0) == 0",
        "survives its supervisor, adopts orphans",
    ),
)

KERNEL = (
    Attack("ptrace", RAW + "r = call((101, 117), 16, T['pid'], 0, 0)\ncall((101, 117), 17, T['pid'], 0, 0)\nr == 0",
           "takes over another process"),
    Attack("pidfd_getfd", RAW + "call(438, call(434, T['pid'], 0), 0, 0) >= 0", "takes another process's open files"),
    Attack("keyring", RAW + "call((248, 217), b'user', b'agentkd', b'x', 1, -2) > 0", "reads and plants keys"),
    Attack("bpf", RAW + "import struct\na = ctypes.create_string_buffer(struct.pack('=IIIII', 2, 4, 4, 1, 0), 72)\n"
           "call((321, 280), 0, a, 72) >= 0", "loads programs into the kernel", rights=True),
    Attack("perf_event_open", RAW + "import struct\na = ctypes.create_string_buffer(struct.pack('=IIQQQQQ', 1, 112, 0, 0, 0, 0, 0x61),"
           " 112)\ncall((298, 241), a, 0, -1, -1, 0) >= 0", "measures other code, a large attack surface", rights=True),
    Attack("inotify", RAW + "call((294, 26), 0) >= 0", "watches what happens to files"),
    Attack("userfaultfd", RAW + "call((323, 282), 1) >= 0", "makes kernel races easy to win", rights=True),
    Attack("io_uring", RAW + "call(425, 4, ctypes.create_string_buffer(120)) >= 0",
           "makes calls that seccomp does not see", rights=True),
    Attack("memfd_create", "import os\nos.memfd_create('x') >= 0", "holds memory and programs in no file"),
    Attack("clock", "import time\ntime.clock_settime(time.CLOCK_REALTIME, time.time())\nTrue", "sets the clock", rights=True),
    Attack("host name", "import socket\nsocket.sethostname(socket.gethostname())\nTrue", "renames the machine", rights=True),
    Attack("kernel log", RAW + "call((103, 116), 3, ctypes.create_string_buffer(4096), 4096) > 0", "reads the kernel's log",
           rights=True),
    Attack("locked memory", RAW + "room = ctypes.create_string_buffer(4096)\ncall((149, 228), ctypes.addressof(room), 4096) == 0",
           "takes memory that cannot be swapped out", rights=True),
    Attack("user namespace", _APART + "apart(lambda: libc.unshare(0x10000000) == 0)", "becomes root of a namespace of its own"),
    Attack("namespaces by clone", RAW + "pid = call((56, 220), 0x10000000 | 17, 0, 0, 0, 0)\nif pid == 0:\n    os._exit(0)\npid > 0",
           "the same by clone"),
    Attack("clone3", RAW + "import struct\na = ctypes.create_string_buffer(struct.pack('=QQQQQQQQ', 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)\n"
           "pid = call(435, a, 64)\nif pid == 0:\n    os._exit(0)\npid > 0", "the same where a filter cannot read the flags"),
    Attack("mount", _APART + "apart(lambda: (libc.unshare(0x10020000), libc.mount(b'none', b'/', None, 1 << 18 | 16384, None),"
           " libc.mount(b'tmpfs', os.getcwd().encode(), b'tmpfs', 0, None))[2] == 0)", "mounts file systems"),
    Attack("remount", _APART + "apart(lambda: (libc.unshare(0x10020000), libc.mount(b'none', b'/', None, 32 | 4096, None))[1] == 0)"
           " or apart(lambda: (libc.unshare(0x10020000), libc.mount(b'none', b'/', None, 1 << 18, None))[1] == 0)",
           "makes read-only mounts writable"),
    Attack("chroot", _APART + "apart(lambda: (libc.unshare(0x10000000), libc.chroot(b'.'))[1] == 0)", "leaves a chroot by a second one"),
    Attack("setns", RAW + "pid = os.fork()\nif pid == 0:\n    fd = call(434, T['pid'], 0)\n"
           "    os._exit(0 if call((308, 268), fd, 0x40000000) == 0 else 1)\nos.waitpid(pid, 0)[1] == 0",
           "enters the host's namespaces", rights=True),
    Attack("become root", "import os\nos.setuid(0)\nos.geteuid() == 0", "is root", rights=True),
    Attack("device node", "import os, stat\nos.mknod('null', 0o600 | stat.S_IFCHR, os.makedev(1, 3))\nTrue",
           "makes its own entry to a disk", rights=True),
)  # fmt: skip

_INT80 = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20; int 0x80; ret: the 32-bit getpid
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0
"""
_X32 = RAW + "call(0x40000000 + 39) > 0"

X86 = (
    (
        Attack("32-bit system calls", _INT80, "passes a filter that knows 64-bit numbers only", rights=True),
        Attack("x32 system calls", _X32, "passes a filter with the third set of numbers", rights=True),
    )
    if IS_X86
    else ()
)

ATTACKS = (*PROGRAMS, *SIGNALS, *KERNEL, *X86)
