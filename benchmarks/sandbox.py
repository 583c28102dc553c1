"""What does the fork sandbox cost, beside smolagents' local executor in the same run?

Interleaved repetitions, medians, CPU time of everything involved (host, zygote, sessions): read from
a control group where this user can make one, otherwise from the machine's idle time, which counts what
else runs. Columns: one trivial action; a session with three actions, its start and end included; eight
candidates from a state of 20,000 objects and from one with a 256 MB array (the local executor deep-copies its
state, as it has no fork); a loop of 100,000 iterations; 64 sessions at once; and a soak that looks for leaks.
Some two minutes on two cores; ``--quick`` takes half a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from smolagents.local_python_executor import LocalPythonExecutor

from agentkd.record import provenance
from agentkd.sandbox.fork import ForkSandbox
from agentkd.sandbox.zygotes import running

OBJECTS = "data = [{'i': i, 's': str(i)} for i in range(10_000)]"  # a dict and a string each: 20,000
ARRAY = "import numpy as np\na = np.ones(32 * 1024 * 1024)"
LOOP = "t = 0\nfor i in range(100_000):\n    t += i\nt"
WORK = [f"t = sum(d['i'] for d in data) + {i}\nt" for i in range(8)]
ARRAY_WORK = [f"a[{i}] = 3.0\nfloat(a[:100].sum()) + {i}" for i in range(8)]


class Meter:
    """CPU seconds of this process and all that it starts."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.file = Path("/proc/stat")
        for root, file in (("cpuacct", "cpuacct.usage"), ("", "cpu.stat")):
            folder = Path("/sys/fs/cgroup", root, f"agentkd-benchmark-{os.getpid()}")
            try:
                folder.mkdir()
                (folder / "cgroup.procs").write_text(str(os.getpid()))
            except OSError:
                continue
            self.folder, self.file = folder, folder / file
            break

    @property
    def how(self) -> str:
        return "control group" if self.folder else "idle time of the machine"

    def seconds(self) -> float:
        time.sleep(0.005)  # what runs right now is not counted yet
        text = self.file.read_text()
        if self.file.name == "cpuacct.usage":
            return int(text) / 1e9
        if self.file.name == "cpu.stat":
            return int(text.split()[1]) / 1e6
        fields = [int(field) for field in text.split("\n", 1)[0].split()[1:]]
        return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        if self.folder:
            for pid in (self.folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):  # it has just ended
                    (self.folder.parent / "cgroup.procs").write_text(pid)
            time.sleep(0.2)
            self.folder.rmdir()


class Bench:
    """Named things to do, measured in turns."""

    def __init__(self, meter: Meter, rounds: int) -> None:
        self.meter = meter
        self.rounds = rounds
        self.cpu: dict[str, float] = {}

    def run(self, things: dict[str, tuple[Callable[[], Any], int]]) -> None:
        seen: dict[str, list[float]] = {name: [] for name in things}
        for do, _ in things.values():
            do()
        for _ in range(self.rounds):
            for name, (do, times) in things.items():
                before = self.meter.seconds()
                for _ in range(times):
                    do()
                seen[name].append((self.meter.seconds() - before) / times * 1000)
        self.cpu.update({name: statistics.median(values) for name, values in seen.items()})


def local() -> LocalPythonExecutor:
    executor = LocalPythonExecutor(["numpy"], timeout_seconds=None)
    executor.send_tools({})
    return executor


def local_candidates(executor: LocalPythonExecutor, codes: list[str]) -> None:
    kept = executor.state
    for code in codes:
        executor.state = {
            key: value if isinstance(value, ModuleType) else copy.deepcopy(value)
            for key, value in kept.items()
        }
        executor(code)
    executor.state = kept


def session(actions: int, isolation: str | None) -> None:
    sandbox = ForkSandbox(imports=["numpy"], isolation=isolation)
    for number in range(actions):
        sandbox(f"x = {number}\nx + 1")
    sandbox.close()


def costs(bench: Bench, isolation: str | None) -> None:
    ours, theirs = ForkSandbox(imports=["numpy"], isolation=isolation), local()
    for executor in (ours, theirs):
        executor(OBJECTS)
    arrays = ForkSandbox(imports=["numpy"], isolation=isolation), local()
    for executor in arrays:
        executor(ARRAY)

    def candidates(sandbox: ForkSandbox, codes: list[str]) -> None:
        sandbox.try_each(codes)
        sandbox.commit(0)

    plain = ForkSandbox(isolation=isolation)
    bench.run(
        {
            "action": (lambda: plain("x = 1\nx + 1"), 50),
            "action_local": (lambda: theirs("x = 1\nx + 1"), 200),
            "session_of_3": (lambda: session(3, isolation), 10),
            "n8_20k": (lambda: candidates(ours, WORK), 5),
            "n8_20k_local": (lambda: local_candidates(theirs, WORK), 1),
            "n8_256mb": (lambda: candidates(arrays[0], ARRAY_WORK), 5),
            "n8_256mb_local": (lambda: local_candidates(arrays[1], ARRAY_WORK), 1),
            "loop": (lambda: plain(LOOP), 5),
            "loop_local": (lambda: theirs(LOOP), 1),
        }
    )
    for sandbox in (ours, arrays[0], plain):
        sandbox.close()


def children(pid: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = [int(text) for text in file.read_text().split()]
        except OSError:
            continue
        for child in below:
            found += [child, *children(child)]
    return found


def memory(pids: list[int]) -> int:
    """Proportional set size of processes, bytes."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def zygotes() -> list[int]:
    return [zygote.process.pid for zygote in running()]


def tree() -> list[int]:
    return [pid for root in zygotes() for pid in (root, *children(root))]


def at_once(count: int, actions: int, isolation: str | None) -> dict[str, float]:
    """Many sessions in threads of one process."""
    before = memory(tree())
    sandboxes = [ForkSandbox(isolation=isolation) for _ in range(count)]

    def work(sandbox: ForkSandbox) -> None:
        for number in range(actions):
            sandbox(f"x = {number}\nx + 1")

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(sandbox,)) for sandbox in sandboxes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    each = (memory(tree()) - before) / count
    for sandbox in sandboxes:
        sandbox.close()
    return {"sessions_steps_per_s": count * actions / seconds, "session_mb": each / 2**20}


def soak(sessions: int, actions: int, isolation: str | None) -> dict[str, float]:
    """Look for what is left over."""
    session(2, isolation)
    gc.collect()

    def seen() -> dict[str, float]:
        time.sleep(0.5)  # the last session's processes are being taken down
        scratch = sum(1 for place in ("/tmp", "/mnt", "/srv") for _ in Path(place).glob("*"))
        groups = sum(1 for _ in Path("/sys/fs/cgroup").glob(f"*/agentkd-{os.getpid()}-*"))
        descriptors = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (os.getpid(), *zygotes()))
        return {
            "processes": len(tree()),
            "descriptors": descriptors,
            "folders": scratch + groups,
            "mb": memory([os.getpid(), *zygotes()]) / 2**20,
        }

    before = seen()
    for _ in range(sessions):
        sandbox = ForkSandbox(isolation=isolation)
        for number in range(actions):
            sandbox(f"x = list(range({number} * 100))\nopen('f', 'w').write(str(x))")
        sandbox.close()
    after = seen()
    return {f"leaked_{name}": round(after[name] - before[name], 2) for name in before}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, a shorter soak")
    parser.add_argument(
        "--isolation", choices=["bubblewrap", "landlock"], help="default: what the machine has"
    )
    options = parser.parse_args()
    meter = Meter()
    bench = Bench(meter, 3 if options.quick else 9)
    costs(bench, options.isolation)
    meter.close()
    metrics = {f"cpu_ms_{name}": round(value, 3) for name, value in bench.cpu.items()}
    metrics["cpu_ms_per_action"] = metrics.pop("cpu_ms_action")
    metrics["loop_speedup"] = round(
        bench.cpu["loop_local"] / max(bench.cpu["loop"] - bench.cpu["action"], 0.1), 1
    )
    metrics["n8_256mb_over_20k"] = round(bench.cpu["n8_256mb"] / bench.cpu["n8_20k"], 2)
    metrics |= at_once(64, 5 if options.quick else 20, options.isolation)
    sessions, actions = (20, 10) if options.quick else (200, 50)
    metrics |= soak(sessions, actions, options.isolation)
    kind = running()[0].isolation.kind
    print(f"isolation: {kind}; CPU time by {meter.how}; medians of {bench.rounds} interleaved rounds")
    print(f"soak: {sessions} sessions of {actions} actions")
    for name, value in metrics.items():
        print(f"{name:28} {value:10.2f}")
    line = {
        "name": "sandbox",
        "metrics": {name: round(value, 3) for name, value in metrics.items()},
        "n": sessions * actions,
        "runs": bench.rounds,
        "commit": provenance()["commit"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
