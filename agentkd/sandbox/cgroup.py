"""A memory and process limit over all processes of a session, where the system gives one.

Resource limits hold for a single process; a control group holds for all of them. Version 2 and
version 1 of the kernel's interface; needs a folder there that this user may write.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

__all__ = ["ControlGroup", "available", "sweep"]

_ROOT = Path("/sys/fs/cgroup")
_PREFIX = "agentkd-"


def available() -> str:
    """ "v2", "v1" or ""."""
    return _parents()[0]


def _parents() -> tuple[str, list[Path]]:
    """The folders in which a group can be made."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "", []
    for line in lines:
        number, _, path = line.split(":", 2)
        if number == "0":
            for place in (_ROOT / path.lstrip("/")).parents if path != "/" else (_ROOT,):
                control = place / "cgroup.subtree_control"
                with contextlib.suppress(OSError):
                    if "memory" in control.read_text().split() and os.access(place, os.W_OK):
                        return "v2", [place]
    found = [_ROOT / name for name in ("memory", "pids") if os.access(_ROOT / name, os.W_OK)]
    return ("v1", found) if any(place.name == "memory" for place in found) else ("", [])


class ControlGroup:
    """The group of one session; without effect where the system gives none.

    Args:
        name: unique in this process.
        memory: bytes, swap included where that can be said.
        processes: processes and threads together.
    """

    def __init__(self, name: str, memory: int, processes: int) -> None:
        self.version, parents = _parents()
        self.folders: list[Path] = []
        limits = {
            "memory.max": memory,
            "memory.swap.max": 0,
            "pids.max": processes + 8,  # the trusted one must not be the one that is refused
            "memory.limit_in_bytes": memory,
            "memory.memsw.limit_in_bytes": memory,
        }
        for parent in parents:
            folder = parent / f"{_PREFIX}{os.getpid()}-{name}"
            try:
                folder.mkdir()
            except OSError:
                continue
            self.folders.append(folder)
            for file, value in limits.items():
                if (folder / file).exists():
                    with contextlib.suppress(OSError):
                        (folder / file).write_text(str(value))

    def add(self, pid: int) -> None:
        """Put a process, and all that it will start, into the group."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                (folder / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Remove the group; its processes must have ended."""
        for folder in self.folders:
            for _ in range(50):
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.002)  # the kernel still takes the last process out
                else:
                    break
        self.folders = []


def sweep() -> None:
    """Remove what killed hosts left behind."""
    for parent in _parents()[1]:
        for folder in parent.glob(f"{_PREFIX}*"):
            pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
            if pid.isdigit() and not Path("/proc", pid).exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()
