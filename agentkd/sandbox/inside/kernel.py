"""Linux system calls that the standard library of Python 3.11 does not have."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct

__all__ = [
    "MS_BIND",
    "MS_NODEV",
    "MS_NOEXEC",
    "MS_NOSUID",
    "MS_PRIVATE",
    "MS_RDONLY",
    "MS_REC",
    "MS_REMOUNT",
    "NAMESPACES",
    "NEW_NS",
    "NEW_USER",
    "adopt_orphans",
    "clone",
    "collapse",
    "die_with_parent",
    "drop_bounding_set",
    "drop_capabilities",
    "hide_memory",
    "mount",
    "no_new_privileges",
    "read_only",
    "syscall",
    "unshare",
]

NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = NEW_NS | NEW_CGROUP | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18

_CLONE = {"x86_64": 56, "aarch64": 220}
_CAPSET = {"x86_64": 126, "aarch64": 91}

_libc = ctypes.CDLL(None, use_errno=True)
_held = ctypes.PyDLL(None, use_errno=True)  # calls made with the interpreter lock held


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *args: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A raw system call.

    Raises:
        OSError: as the kernel says.
    """
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return _checked(int(_libc.syscall(ctypes.c_long(number), *given)), f"system call {number}")


def clone(flags: int) -> int:
    """``fork`` into new namespaces: 0 in the child, its process id in the parent.

    ``os.fork`` has no flags, and a process cannot put itself into a new pid namespace, so this
    saves one fork. Only for a process without other threads.
    """
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    arguments = [_CLONE[platform.machine()], flags | signal.SIGCHLD, 0, 0, 0, 0]
    pid = int(_held.syscall(*map(ctypes.c_long, arguments)))
    number = ctypes.get_errno()
    if pid == 0:
        api.PyOS_AfterFork_Child()
    else:
        api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"new namespaces: {os.strerror(number)}")
    return pid


def collapse() -> None:
    """Move this process's memory into huge pages, where the kernel can (Linux 6.1).

    A fork then copies a five-hundredth of the page table; it saves a third of a fork's time.
    """
    huge = 1 << 21
    with open("/proc/self/maps") as file:
        lines = file.read().splitlines()
    for line in lines:
        where, rights, *_, name = [*line.split(maxsplit=5), ""][:6]
        if rights == "rw-p" and name in ("", "[heap]"):
            low, high = (int(text, 16) for text in where.split("-"))
            low, high = -(-low // huge) * huge, high // huge * huge
            if high > low:  # advice: what cannot be followed is no error
                _libc.madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), ctypes.c_int(25))


def unshare(flags: int) -> None:
    """Leave namespaces for new ones."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """``mount(2)``."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _checked(result, f"mount on {target}")


def read_only(path: str) -> None:
    """Make a mount and all beneath it read-only in this namespace: ``mount_setattr(2)``, Linux 5.12."""
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", 0x1 | 0x2, 0, 0, 0), 32)  # RDONLY, NOSUID
    syscall(442, -100, path.encode() + b"\0", 0x8000, attributes, 32)  # AT_FDCWD, AT_RECURSIVE


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero), f"prctl {option}")


def no_new_privileges() -> None:
    """No program run from here on gains rights; needed for seccomp and Landlock."""
    _prctl(38, 1)


def die_with_parent() -> None:
    """Be killed when the parent ends. A change of uid clears this."""
    _prctl(1, signal.SIGKILL)


def drop_bounding_set() -> None:
    """Give up what a program run from here, as root, would get."""
    for number in range(64):
        try:
            _prctl(24, number)  # PR_CAPBSET_DROP
        except OSError:
            break  # past the last one, or without the right, and then there is nothing to lose


def drop_capabilities() -> None:
    """Give up all capabilities. With no new privileges and no programs to run, none come back."""
    header = ctypes.create_string_buffer((0x20080522).to_bytes(4, "little") + bytes(4), 8)
    syscall(_CAPSET[platform.machine()], header, ctypes.create_string_buffer(24))


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none is lost sight of."""
    _prctl(36, 1)


def hide_memory(hidden: bool = True) -> None:
    """Keep processes of the same user from reading or tracing this one."""
    _prctl(4, 0 if hidden else 1)
