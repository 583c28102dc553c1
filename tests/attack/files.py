"""Attacks on files and secrets of the host."""

from __future__ import annotations

from .record import RAW, Attack

ATTACKS = (
    Attack("environment", "import os\ndict(os.environ)", "reads API keys from the environment", "secret"),
    Attack(
        "format walk to the environment",
        'import random\n"{0._os.environ}".format(random)',
        "reads API keys through str.format, past filters of source code",
        "secret",
    ),
    Attack(
        "subclasses walk",
        """
found = {}
for cls in object.__subclasses__():
    scope = getattr(getattr(cls, "__init__", None), "__globals__", {})
    if "environ" in scope:
        found.update(scope["environ"])
{str(k): str(v) for k, v in found.items()}
""",
        "finds os from any object and reads the environment",
        "secret",
    ),
    Attack(
        "generator frame walk",
        """
def walk():
    yield frame.gi_frame
frame = walk()
at, found = next(frame).f_back or next(iter([__import__("sys")._getframe()])), []
while at is not None:
    for scope in (at.f_globals, at.f_locals):
        for value in list(scope.values()):
            found.append(str(dict(getattr(value, "environ", {}))))
    at = at.f_back
"".join(found)
""",
        "walks frames up to the caller's modules and reads the environment",
        "secret",
    ),
    Attack(
        "/proc/*/environ",
        """
import glob
found = b""
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        with open(path, "rb") as file:
            found += file.read()
    except OSError:
        pass
import re
str(re.findall(rb"AGENTKD_ATTACK_SECRET=([^\\0]*)", found))
""",
        "reads the environment of every process of the user",
        "secret",
    ),
    Attack(
        "/proc/PID/mem",
        """
with open(f"/proc/{T['pid']}/mem", "rb") as file:
    file.seek(T["address"])
    found = file.read(T["length"])
found.decode()
""",
        "reads another process's memory",
        "secret",
    ),
    Attack(
        "process_vm_readv",
        RAW
        + """
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
room = ctypes.create_string_buffer(T["length"])
mine = Part(ctypes.addressof(room), T["length"])
theirs = Part(T["address"], T["length"])
call((310, 270), T["pid"], ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)
room.raw.decode("latin-1")
""",
        "reads another process's memory by a system call",
        "secret",
    ),
    Attack("host file by open", "open(T['file']).read()", "reads the user's files", "secret"),
    Attack(
        "host file by numpy",
        "import numpy\nbytes(numpy.fromfile(T['file'], dtype='u1')).decode()",
        "reads the user's files where only numpy is allowed",
        "secret",
    ),
    Attack(
        "host file by numpy.memmap",
        "import numpy\nbytes(numpy.memmap(T['file'], mode='r')).decode()",
        "maps the user's files into memory",
        "secret",
    ),
    Attack(
        "host file by ctypes",
        RAW
        + """
room = ctypes.create_string_buffer(200)
fd = libc.open(T["file"].encode(), 0)
libc.read(fd, room, 200)
room.value.decode()
""",
        "reads the user's files without Python's open",
        "secret",
    ),
    Attack(
        "host file by openat2 and O_PATH",
        RAW
        + """
import struct
how = ctypes.create_string_buffer(struct.pack("=QQQ", os.O_RDONLY, 0, 0), 24)
fd = call(437, -100, T["file"].encode(), how, 24)
if fd < 0:
    fd = os.open(T["file"], os.O_PATH)
    fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
os.read(fd, 200).decode()
""",
        "reads the user's files through rarer calls",
        "secret",
    ),
    Attack(
        "roots of other processes",
        """
import os
found = ""
for pid in ["self", 1, os.getppid(), T["pid"], *T["near"]]:
    try:
        with open(f"/proc/{pid}/root{T['file']}") as file:
            found += file.read()
    except OSError:
        pass
found
""",
        "reaches the host's files through /proc/PID/root",
        "secret",
    ),
    Attack(
        "file handle",
        RAW
        + """
import struct
room = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0), 136)
number = ctypes.c_int()
call((303, 264), -100, T["file"].encode(), room, ctypes.byref(number), 0) == 0
""",
        "makes a handle with which open_by_handle_at leaves any folder",
    ),
    Attack(
        "import of a host module",
        """
import importlib.machinery
importlib.machinery.SourceFileLoader("canary_module", T["module"]).load_module().SECRET
""",
        "imports, and so reads, any file of the host",
        "secret",
    ),
    Attack(
        "import path",
        "import sys\nsys.path.insert(0, T['folder'])\nimport canary_module\ncanary_module.SECRET",
        "imports modules that lie beside the project",
        "secret",
    ),
    Attack(
        "sympify",
        "import sympy\nsympy.sympify(f'open({T[\"file\"]!r}).read()')",
        "runs Python inside an expression that only looks like algebra",
        "secret",
        seconds=6,
    ),
    Attack(
        "symbolic link in scratch",
        "import os\nos.symlink(T['file'], 'link')\nopen('link').read()",
        "reaches host files through a link in the working directory",
        "secret",
    ),
    Attack(
        "hard link in scratch",
        "import os\nos.link(T['file'], 'link')\nopen('link').read()",
        "reaches host files through a hard link",
        "secret",
    ),
    Attack(
        "inherited descriptors",
        """
import os, stat
found = []
for fd in range(256):
    try:
        seen = os.fstat(fd)
    except OSError:
        continue
    if stat.S_ISREG(seen.st_mode) or stat.S_ISDIR(seen.st_mode):
        found.append(fd)
found
""",
        "uses files that the host has left open",
        control="open_file = open(T['file'])\n[open_file.fileno()]",
    ),
    Attack("write outside scratch", "open(T['folder'] + '/new', 'w').write('x')", "writes anywhere", "world"),
    Attack(
        "change a host file", "open(T['module'], 'a').write('x = 1')", "plants code in the project", "world"
    ),
    Attack(
        "plant code in the library",
        "import os\nfor path in T.get('library', [T['module']]):\n    open(path, 'r+b').close()\n"
        "open(T['module'], 'a').write('x = 1')",
        "plants code in the interpreter's own library",
        "world",
    ),
    Attack("truncate a host file", "import os\nos.truncate(T['file'], 0)", "destroys files by path", "world"),
    Attack("remove a host file", "import os\nos.unlink(T['file'])", "removes files", "world"),
    Attack(
        "rename a host file",
        "import os\nos.rename(T['file'], T['file'] + 'x')",
        "moves files away",
        "world",
    ),
    Attack(
        "modes of host files",
        "import os\nos.chmod(T['file'], 0o777)",
        "opens private files to everyone, which Landlock alone does not stop",
        "world",
    ),
    Attack(
        "times of host files",
        "import os\nos.utime(T['file'], (1, 1))",
        "makes builds and backups skip files, which Landlock alone does not stop",
        "world",
    ),
    Attack(
        "owner of host files",
        "import os\nos.chown(T['file'], 12, 12)",
        "gives files away",
        "world",
        rights=True,
    ),
    Attack(
        "numpy.tofile",
        "import numpy\nnumpy.zeros(4).tofile(T['file'])",
        "overwrites files where only numpy is allowed",
        "world",
    ),
    Attack(
        "/sys",
        "import os\nopen('/sys/kernel/uevent_seqnum').read() or os.listdir('/sys')",
        "reads the machine's devices and settings",
    ),
    Attack(
        "list of processes",
        """
import os
try:
    import ctypes
    ctypes.CDLL(None).umount2(b"/proc", 2) if T["near"] else None
finally:
    found = [name for name in os.listdir("/proc") if name.isdigit()]
found
""",
        "sees all processes and their command lines",
    ),
    Attack(
        "shared memory folder",
        "import os\nname = f'/dev/shm/agentkd-attack-{os.getpid()}'\nopen(name, 'w').close()\n"
        "os.unlink(name)\nTrue",
        "leaves data for other processes in /dev/shm or fills it",
    ),
    Attack(
        "devices",
        """
import os
found = []
for name in ("/dev/ptmx", "/dev/kmsg", "/dev/mem", "/dev/vda", "/dev/sda", "/dev/fuse", "/dev/kvm", "/dev/tty"):
    try:
        os.close(os.open(name, os.O_RDWR))
        found.append(name)
    except OSError:
        pass
found
""",
        "opens disks, terminals and the kernel's log",
    ),
    Attack(
        "terminal input (TIOCSTI)",
        "import fcntl, pty\na, b = pty.openpty()\nTrue",
        "types commands into a terminal",
    ),
)
