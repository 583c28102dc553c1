"""What a process and those below it hold: read from /proc, for the benchmarks of the server."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["family", "left_of", "memory", "memory_of_family"]


def memory(pid: int) -> float:
    """MiB that a process holds, pages that it shares with others included."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory_of_family(pid: int) -> float:
    """MiB that a process and all below it hold; what they share is counted once."""
    total = 0.0
    for member in family(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
        except OSError:  # it has ended
            continue
    return total


def family(pid: int) -> dict[int, str]:
    """A process and all below it: process id -> when it started."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry.parent.name)] = (int(fields[1]), fields[19])
    found = {pid}
    while fresh := {it for it, (parent, _) in parents.items() if parent in found} - found:
        found |= fresh
    return {it: parents[it][1] for it in found if it in parents}


def left_of(processes: dict[int, str]) -> int:
    """How many of these still run."""

    def runs(pid: int, started: str) -> bool:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return fields[19] == started and fields[0] not in "ZX"

    return sum(runs(pid, started) for pid, started in processes.items())
