"""What the kernel tells of the processes below this one."""

from __future__ import annotations

import contextlib
import os
import time

__all__ = ["descendants", "parent", "signal_to", "status"]


def descendants() -> set[int]:
    """Processes below this one that have not ended. Orphans among them come back to it."""
    children: dict[int, list[int]] = {}
    ended = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _fields(int(name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(name))
                if fields[0] in "ZX":
                    ended.add(int(name))
    found, todo = set(), [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo += below
    return found - ended


def parent(pid: int) -> int | None:
    """Of a process that has not ended."""
    fields = _fields(pid)
    return int(fields[1]) if fields and fields[0] not in "ZX" else None


def status(pid: int) -> int | None:
    """How a process ended that its parent has not asked about yet: negative for a signal."""
    for _ in range(20):
        fields = _fields(pid)
        if not fields:
            return None
        if fields[0] in "ZX":
            return os.waitstatus_to_exitcode(int(fields[49]))
        time.sleep(0.005)  # its socket closes a moment before it is gone
    return None


def signal_to(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _fields(pid: int) -> list[str]:
    """State, parent and what follows of ``/proc/PID/stat``; nothing when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []
