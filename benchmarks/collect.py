"""How fast, and at what cost, are trajectories collected?

Three systems against the same mock endpoint of a fixed latency, by turns: smolagents and a thread pool
as people write it, smolagents as an expert would run it (one shared client, a short prompt template; no
boundary around the code, no log), and agentkd with sandbox and call log. Every rollout is three code
actions. The first two run with 64 workers only; agentkd with 4, 16, 64 and 256. Prints a table, the bars
and whether they are reached, memory, where the time goes, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import collect_systems
from collect_costs import PeakMemory, import_cost, profile
from collect_systems import ANSWER, STEPS
from sandbox import Meter, children

from agentkd.collect import default_processes


class Endpoint:
    """The mock endpoint in a process of its own."""

    def __init__(self, latency: float) -> None:
        command = [sys.executable, collect_systems.__file__, "--serve", str(latency)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate()


def adopt() -> None:
    """Become the parent of what a run leaves behind, to wait for it."""
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def reap(other: int) -> None:
    """Wait until everything that a run has started has ended; ``other`` is a process that goes on."""
    for pid in children(os.getpid()):
        if pid != other:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def command_of(system: str, n: int, workers: int, url: str, options: argparse.Namespace) -> list[str]:
    processes = options.processes or default_processes(workers)
    command = [sys.executable, collect_systems.__file__, "--run", system, "--url", url]
    return [
        *command,
        "--n",
        str(n),
        "--workers",
        str(workers),
        "--sandbox",
        options.sandbox,
        "--processes",
        str(processes),
    ]


def measure(
    system: str, n: int, workers: int, latency: float, options: argparse.Namespace
) -> dict[str, float]:
    """One run: trajectories a minute, CPU-ms a step (start, imports and sandbox included).

    Read by a :class:`Meter`: the zygote does not wait for its sessions, so what they use never shows among
    the children's times.
    """
    endpoint = Endpoint(latency)  # before the meter, so that its own time does not count
    command = command_of(system, n, workers, endpoint.url, options)
    meter = Meter()
    try:
        before = meter.seconds()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
        reap(endpoint.process.pid)
        cpu = meter.seconds() - before
    finally:
        meter.close()
        endpoint.close()
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["right"] == n, f"{system}: {n - result['right']} of {n} answers are wrong"
    return {"a_minute": 60 * n / result["seconds"], "cpu_ms": 1000 * cpu / n / STEPS, "n": n}


def memory_of(n: int, workers: int, options: argparse.Namespace) -> PeakMemory:
    """The peak of a run of agentkd with all its processes. Looking costs time, so this run is not timed."""
    endpoint = Endpoint(0.2)
    command = command_of("agentkd", n, workers, endpoint.url, options)
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            peak = PeakMemory(process.pid)
            while process.poll() is None:
                peak.sample()
                time.sleep(0.1)
        reap(endpoint.process.pid)
    finally:
        endpoint.close()
    assert process.returncode == 0
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of fewer rollouts (three minutes)")
    parser.add_argument("--sandbox", default=None, help="the default backend where there is one, else local")
    parser.add_argument("--processes", type=int, default=0, help="of agentkd; by the workers by default")
    options = parser.parse_args()
    from agentkd.sandbox import BACKENDS

    options.sandbox = options.sandbox or BACKENDS[0]
    report(options)


def report(options: argparse.Namespace) -> None:
    """All cells, by turns."""
    from agentkd.record import provenance

    adopt()
    cells = run_cells(options)
    median = print_table(cells)
    n = 600 if options.quick else 2000
    bare = measure("agentkd, no sandbox", n, 64, 0.2, options)
    print(f"without the sandbox: {bare['cpu_ms']:.2f} CPU-ms a step, the start of the process included")
    metrics = {**figures(median), "cpu_ms_per_step": bare["cpu_ms"]}
    print_bars(metrics)
    metrics |= print_memory(options)
    metrics |= print_profile(options)
    metrics |= import_cost()
    print(
        "imports: {import_ms:.0f} CPU-ms, of smolagents and openai alone {import_ms_smolagents:.0f}".format(
            **metrics
        )
    )
    line = {
        "name": "collect",
        "metrics": {name: round(value, 3) for name, value in metrics.items()},
        "n": {f"{key[0]} {key[1]} {key[2]}": int(results[0]["n"]) for key, results in cells.items()},
        "runs": 1 if options.quick else 3,
        "commit": provenance()["commit"],
    }
    print(json.dumps(line))


Cell = tuple[str, int, float]
"""System, workers, latency in seconds."""


def run_cells(options: argparse.Namespace) -> dict[Cell, list[dict[str, float]]]:
    """What each run came to, by cell."""
    cells: dict[Cell, list[dict[str, float]]] = {}
    plan = [("plain", 64, 0.2), ("expert", 64, 0.2), ("agentkd", 64, 0.2), ("agentkd", 64, 2.0)]
    if not options.quick:
        plan += [("agentkd", workers, 0.2) for workers in (4, 16, 256)]
    for _ in range(1 if options.quick else 3):
        for system, workers, latency in plan:
            # Whole waves: a last one that is not full would be the benchmark's loss, not the collector's.
            many = workers > 64 or latency > 1 or system == "plain"
            n = (10 if options.quick or many else 32) * workers
            result = measure(system, n, workers, latency, options)
            cells.setdefault((system, workers, latency), []).append(result)
            print(
                f"{system:8} {workers:4} workers {latency:3} s: {result['a_minute']:6.0f} a minute",
                file=sys.stderr,
            )
    return cells


def print_table(cells: dict[Cell, list[dict[str, float]]]) -> dict[Cell, dict[str, float]]:
    """The medians of all cells, which are printed, too."""
    print("system     workers  latency  a minute  of ideal  CPU-ms/step")
    median = {}
    for (system, workers, latency), results in cells.items():
        middle = {name: statistics.median(result[name] for result in results) for name in results[0]}
        median[system, workers, latency] = middle
        share = middle["a_minute"] / (60 * workers / STEPS / latency)
        row = f"{system:10}{workers:8}{latency:8} s{middle['a_minute']:10.0f}{share:10.0%}"
        print(f"{row}{middle['cpu_ms']:13.2f}")
    return median


def figures(median: dict[Cell, dict[str, float]]) -> dict[str, float]:
    """The figures that the bars are about."""
    ours, ideal_2s = median["agentkd", 64, 0.2], 60 * 64 / STEPS / 2.0
    found = {
        "ratio_vs_smolagents": ours["a_minute"] / median["plain", 64, 0.2]["a_minute"],
        "fraction_of_expert_smolagents": ours["a_minute"] / median["expert", 64, 0.2]["a_minute"],
        "fraction_of_ideal_2s": median["agentkd", 64, 2.0]["a_minute"] / ideal_2s,
        "cpu_ms_per_step_sandbox": ours["cpu_ms"],
    }
    for (system, workers, latency), middle in median.items():
        if system == "agentkd" and latency == 0.2:
            found[f"a_minute_{workers}"] = middle["a_minute"]
    if "a_minute_256" in found:
        found["ratio_256_to_64"] = found["a_minute_256"] / found["a_minute_64"]
    return found


BARS: dict[str, tuple[str, float, bool]] = {
    "fraction_of_expert_smolagents": ("of the expert's rate, 64 workers, 0.2 s", 0.5, True),
    "ratio_vs_smolagents": ("times the plain rate, 64 workers, 0.2 s", 1.0, True),
    "fraction_of_ideal_2s": ("of the ideal rate, 64 workers, 2 s", 0.9, True),
    "cpu_ms_per_step_sandbox": ("CPU-ms a step in all, session start included", 12.0, False),
    "ratio_256_to_64": ("times as fast with 256 workers as with 64", 1.0, True),
}
"""By figure: in words, the bar, and whether it is a least (or a most)."""


def print_bars(metrics: dict[str, float]) -> None:
    """Each bar with what was reached."""
    print("bars")
    for name, (words, bar, least) in BARS.items():
        if name not in metrics:
            print(f"  --    {words}: not run")
            continue
        value = metrics[name]
        reached = value >= bar if least else value <= bar
        sign = ">=" if least else "<="
        print(f"  {'PASS' if reached else 'FAIL'}  {value:6.2f} {sign} {bar:5.2f}  {words}")


def print_memory(options: argparse.Namespace) -> dict[str, float]:
    """Memory of all processes together, with few and with many rollouts in flight."""
    few, many = (8, 64) if options.quick else (4, 64)
    found: dict[str, float] = {}
    for workers in (few, many) if options.quick else (few, many, 256):
        peak = memory_of(6 * workers, workers, options)
        found[f"peak_mb_{workers}"] = peak.peak_mb
        print(
            f"memory of all processes, {workers} workers: {peak.peak_mb:.0f} MB at most, in {peak.processes}"
        )
    each = (found[f"peak_mb_{many}"] - found[f"peak_mb_{few}"]) / (many - few)
    print(f"memory of one more rollout in flight: {each:.2f} MB, its sandbox included")
    return {**found, "mb_per_rollout_in_flight": each}


def print_profile(options: argparse.Namespace) -> dict[str, float]:
    """Where the CPU time of a step goes."""
    n = 100 if options.quick else 300
    endpoint = Endpoint(0.0)
    try:
        found = profile(n, STEPS, endpoint.url, options.sandbox, ANSWER)
    finally:
        endpoint.close()
    rest = found.step.host - found.action.host
    print(
        f"where CPU-ms go ({n} rollouts, one at a time; by {found.how})    this process  zygote and sessions"
    )
    print(f"  a step: agent, client, log{rest:41.2f}{0.0:21.2f}")
    print(f"  a step: its action in the sandbox{found.action.host:34.2f}{found.step.sandbox:21.2f}")
    print(f"  a session: start and end{found.session.host:43.2f}{found.session.sandbox:21.2f}")
    whole = found.step.all + found.session.all / STEPS
    print(f"  a step in all, a session for {STEPS} of them: {whole:.2f}")
    total = sum(found.parts.values())
    print("this process's part by who wrote the code, session included (profiled: sums are too high)")
    for name, spent in found.parts.items():
        print(f"  {name:20}{spent:8.2f} ms{spent / total:8.0%}")
    return {
        "cpu_ms_step_host": found.step.host,
        "cpu_ms_step_sandbox": found.step.sandbox,
        "cpu_ms_session_host": found.session.host,
        "cpu_ms_session_sandbox": found.session.sandbox,
    }


if __name__ == "__main__":
    main()
