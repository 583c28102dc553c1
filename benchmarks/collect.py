"""How fast, and at what cost, are trajectories collected?

Three systems against the same mock endpoint of a fixed latency, by turns: smolagents and a thread pool
as people write it, smolagents as an expert would run it (one shared client, a short prompt template; no
boundary around the code, no log), and agentkd with sandbox and call log. Every rollout is three code
actions. Prints a table, then where the time goes, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STEPS = 3
ANSWER = "385"
SHORT_PROMPT = (
    "Solve the task step by step. At each step write a thought and one ```python block. "
    "Call final_answer(value) when you know the answer."
)


def say(messages: list[dict[str, Any]]) -> str:
    """The mock teacher: two computations, then the answer."""
    turn = sum(message["role"] == "assistant" for message in messages)
    if turn < STEPS - 1:
        code = f"total_{turn} = sum(i * i for i in range({10 + turn}))\nprint('total', total_{turn})"
        return f"Thought: I compute part {turn}.\n```python\n{code}\n```"
    return f"Thought: I know the answer.\n```python\nfinal_answer({ANSWER})\n```"


async def serve(latency: float) -> None:
    """A chat endpoint on a free port, which is printed; keep-alive, every answer after ``latency``."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                messages = json.loads(await reader.readexactly(length))["messages"]
                await asyncio.sleep(latency)
                message = {"role": "assistant", "content": say(messages)}
                body = json.dumps(
                    {
                        "id": "x",
                        "object": "chat.completion",
                        "created": 0,
                        "model": "mock",
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": 500, "completion_tokens": 40, "total_tokens": 540},
                    }
                ).encode()
                top = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                writer.write(top % len(body) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


def run_plain(n: int, workers: int, url: str, out: Path) -> int:
    """smolagents as people write it: a model and an agent for each question."""
    from smolagents import CodeAgent, OpenAIModel

    def one(number: int) -> Any:
        model = OpenAIModel(model_id="mock", api_base=url, api_key="x")
        agent = CodeAgent(tools=[], model=model, max_steps=5, verbosity_level=0, code_block_tags="markdown")
        return agent.run(f"question {number}")

    with ThreadPoolExecutor(workers) as pool:
        return sum(str(answer) == ANSWER for answer in pool.map(one, range(n)))


def run_expert(n: int, workers: int, url: str, out: Path) -> int:
    """smolagents at its best: one client for all, and a prompt template that is short and parsed once."""
    from smolagents import CodeAgent, OpenAIModel

    model = OpenAIModel(model_id="mock", api_base=url, api_key="x")
    blank = {"initial_plan": "", "update_plan_pre_messages": "", "update_plan_post_messages": ""}
    templates: Any = {
        "system_prompt": SHORT_PROMPT,
        "planning": blank,
        "managed_agent": {"task": "", "report": ""},
        "final_answer": {"pre_messages": "", "post_messages": ""},
    }

    def one(number: int) -> Any:
        agent = CodeAgent(
            tools=[],
            model=model,
            max_steps=5,
            verbosity_level=0,
            code_block_tags="markdown",
            prompt_templates=templates,
        )
        return agent.run(f"question {number}")

    with ThreadPoolExecutor(workers) as pool:
        return sum(str(answer) == ANSWER for answer in pool.map(one, range(n)))


def run_agentkd(n: int, workers: int, url: str, out: Path, processes: int, sandbox: str) -> int:
    """agentkd with everything on."""
    from agentkd.agent_config import AgentConfig
    from agentkd.collect import CollectConfig, collect
    from agentkd.record import write_jsonl
    from agentkd.task import Task

    rows = [Task(id=str(i), question=f"question {i}", answer=ANSWER, split="train") for i in range(n)]
    write_jsonl(out / "tasks.jsonl", rows)
    agent = AgentConfig(model="mock", api_base=url, sandbox=sandbox)
    config = CollectConfig(tasks=str(out / "tasks.jsonl"), agent=agent, workers=workers, processes=processes)
    return sum(item.correct for item in collect(config, out / "run").trajectories)


def work(options: argparse.Namespace) -> None:
    """One system in a process of its own: the time after its imports, and how many answers were right."""
    import openai  # noqa: F401
    import smolagents  # noqa: F401

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        size = (options.n, options.workers, options.url, Path(folder))
        if options.run == "agentkd":
            right = run_agentkd(*size, options.processes, options.sandbox)
        elif options.run == "agentkd, no sandbox":
            right = run_nowhere(*size)
        else:
            right = {"plain": run_plain, "expert": run_expert}[options.run](*size)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "right": right, "peak_mb": peak}))


def run_nowhere(n: int, workers: int, url: str, out: Path) -> int:
    """agentkd with actions that run nowhere: what a step costs without its sandbox."""
    from smolagents.local_python_executor import CodeOutput, PythonExecutor

    from agentkd.agent import StepAgent
    from agentkd.agent_config import AgentConfig, agent_factory
    from agentkd.gate import Gate, GateConfig
    from agentkd.model import fault_of
    from agentkd.rollouts import run_rollouts
    from agentkd.task import Task

    class Nowhere(PythonExecutor):
        """Knows what the mock teacher's code would do."""

        def send_tools(self, tools: dict[str, Any]) -> None:
            pass

        def send_variables(self, variables: dict[str, Any]) -> None:
            pass

        def __call__(self, code_action: str) -> CodeOutput:
            final = "final_answer" in code_action
            return CodeOutput(output=385 if final else None, logs="total 285", is_final_answer=final)

        def take_tool_uses(self) -> tuple[Any, ...]:
            return ()

        def cleanup(self) -> None:
            pass

    gate = Gate(GateConfig(), fault_of)
    factory = agent_factory(AgentConfig(model="mock", api_base=url, sandbox="local"), gate=gate)

    def make(task: Task, sample: int) -> StepAgent:
        agent = factory(task, sample)
        agent.python_executor = Nowhere()
        return agent

    rows = [Task(id=str(i), question=f"question {i}", answer=ANSWER) for i in range(n)]
    done = run_rollouts(rows, make, out / "trajectories.jsonl", workers=workers)
    return sum(item.correct for item in done)


PARTS = {
    "agentkd/sandbox": "sandbox, this side",
    "agentkd/record": "log",
    "agentkd/calls": "log",
    "agentkd": "agent and rollout",
    "smolagents": "smolagents",
    "openai": "client",
    "httpx": "client",
    "httpcore": "client",
    "h11": "client",
    "anyio": "client",
    "pydantic": "pydantic",
}
"""Who a source file belongs to; the first that fits."""


def where(n: int, url: str, sandbox: str) -> None:
    """Where this process's CPU time goes, by who wrote the code; rollouts one after the other."""
    import cProfile
    import pstats

    from agentkd.agent_config import AgentConfig, agent_factory
    from agentkd.gate import Gate, GateConfig
    from agentkd.model import fault_of
    from agentkd.record import AppendLog
    from agentkd.recorder import Recorder
    from agentkd.rollout import rollout
    from agentkd.task import Task

    def part(file: str) -> str:
        return next((name for path, name in PARTS.items() if f"/{path}" in file), "standard library")

    config = AgentConfig(model="mock", api_base=url, sandbox=sandbox)
    factory = agent_factory(config, gate=Gate(GateConfig(), fault_of))
    profiler = cProfile.Profile(time.process_time)
    with tempfile.TemporaryDirectory() as folder, AppendLog(Path(folder) / "calls-0.jsonl") as log:
        for number in range(n + 3):
            task = Task(id=str(number), question=f"question {number}", answer=ANSWER)
            if number == 3:  # by now everything is imported and started
                profiler.enable()
            agent = factory(task, 0)
            try:
                rollout(
                    agent,
                    task,
                    recorder=Recorder(f"{task.id}#0", lambda call, wait: log.append(call, wait=wait)),
                )
            finally:
                agent.cleanup()
        profiler.disable()
    spent: dict[str, float] = {}
    for (file, _, _), (_, _, own, _, callers) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        # What is written in C belongs to the one that called it.
        shares = (
            [(caller[0], numbers[2]) for caller, numbers in callers.items()] if file == "~" else [(file, own)]
        )
        for owner, seconds in shares:
            spent[part(owner)] = spent.get(part(owner), 0.0) + seconds
    total = sum(spent.values())
    print(f"where the CPU time of a step goes, in this process ({n} rollouts, profiled: sums are too high)")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {name:20}{1000 * seconds / n / STEPS:8.2f} ms{seconds / total:8.0%}")


def import_cost() -> dict[str, float]:
    """CPU-ms of starting Python and importing what a collector needs; of smolagents and openai alone."""
    both = {
        "import_ms": "import agentkd.collect, agentkd.agent",
        "import_ms_smolagents": "import smolagents, openai",
    }
    costs: dict[str, float] = {}
    for name, statement in both.items():
        times = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", statement], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        costs[name] = 1000 * statistics.median(times)
    return costs


class Endpoint:
    """The mock endpoint in a process of its own."""

    def __init__(self, latency: float) -> None:
        command = [sys.executable, __file__, "--serve", str(latency)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate()


def adopt() -> None:
    """Become the parent of what a run leaves behind, so that the CPU time of a sandbox counts, too."""
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def reap() -> None:
    """Wait until everything that a run has started has ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def measure(
    system: str, n: int, workers: int, latency: float, options: argparse.Namespace
) -> dict[str, float]:
    """One run: trajectories a minute, CPU-ms a step, right answers, peak memory of the main process."""
    endpoint = Endpoint(latency)
    processes = options.processes or max(1, min(os.cpu_count() or 1, workers // 96))
    command = [sys.executable, __file__, "--run", system, "--n", str(n), "--workers", str(workers)]
    command += ["--url", endpoint.url, "--sandbox", options.sandbox, "--processes", str(processes)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
    finally:
        endpoint.close()
    reap()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["right"] == n, f"{system}: {n - result['right']} of {n} answers are wrong"
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "a_minute": 60 * n / result["seconds"],
        "cpu_ms": 1000 * cpu / n / STEPS,
        "peak_mb": result["peak_mb"],
        "n": n,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of fewer rollouts (two minutes)")
    parser.add_argument("--sandbox", default=None, help="the default backend where there is one, else local")
    parser.add_argument("--processes", type=int, default=0, help="of agentkd; by the workers by default")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve))
        return
    from agentkd.sandbox import BACKENDS

    options.sandbox = options.sandbox or BACKENDS[0]
    if options.run:
        work(options)
        return
    report(options)


def report(options: argparse.Namespace) -> None:
    """All cells, by turns."""
    from agentkd.record import provenance

    adopt()
    rounds = 1 if options.quick else 3
    cells: dict[tuple[str, int, float], list[dict[str, float]]] = {}
    plan = [("plain", 64, 0.2), ("expert", 64, 0.2), ("agentkd", 64, 0.2), ("agentkd", 64, 2.0)]
    if not options.quick:
        plan += [("agentkd", workers, 0.2) for workers in (4, 16, 256)]
    for _ in range(rounds):
        for system, workers, latency in plan:
            # Whole waves: a last one that is not full would be the benchmark's loss, not the collector's.
            many = workers > 64 or latency > 1 or system == "plain"
            waves = 10 if options.quick or many else 32
            n = waves * workers
            result = measure(system, n, workers, latency, options)
            cells.setdefault((system, workers, latency), []).append(result)
            print(
                f"{system:8} {workers:4} workers {latency:3} s: {result['a_minute']:6.0f} a minute",
                file=sys.stderr,
            )
    print("system     workers  latency  a minute  of ideal  CPU-ms/step  peak MB")
    median: dict[tuple[str, int, float], dict[str, float]] = {}
    for (system, workers, latency), results in cells.items():
        middle = {name: statistics.median(result[name] for result in results) for name in results[0]}
        median[system, workers, latency] = middle
        share = middle["a_minute"] / (60 * workers / STEPS / latency)
        print(
            f"{system:10}{workers:8}{latency:8} s{middle['a_minute']:10.0f}{share:10.0%}"
            f"{middle['cpu_ms']:13.2f}{middle['peak_mb']:9.0f}"
        )
    bare = measure("agentkd, no sandbox", 2000 if not options.quick else 600, 64, 0.2, options)
    print(f"without the sandbox: {bare['cpu_ms']:.2f} CPU-ms a step, the start of the process included")
    endpoint = Endpoint(0.0)
    try:
        where(100 if options.quick else 300, endpoint.url, options.sandbox)
    finally:
        endpoint.close()
    imports = import_cost()
    print(
        "imports: {import_ms:.0f} CPU-ms, of smolagents and openai alone {import_ms_smolagents:.0f}".format(
            **imports
        )
    )
    ours, ideal_2s = median["agentkd", 64, 0.2], 60 * 64 / STEPS / 2.0
    metrics = {
        "ratio_vs_smolagents": ours["a_minute"] / median["plain", 64, 0.2]["a_minute"],
        "fraction_of_expert_smolagents": ours["a_minute"] / median["expert", 64, 0.2]["a_minute"],
        "fraction_of_ideal_2s": median["agentkd", 64, 2.0]["a_minute"] / ideal_2s,
        "cpu_ms_per_step": bare["cpu_ms"],
        "cpu_ms_per_step_sandbox": ours["cpu_ms"],
        **imports,
    }
    if not options.quick:
        few = median["agentkd", 4, 0.2]
        metrics["mb_per_rollout_in_flight"] = (ours["peak_mb"] - few["peak_mb"]) / (64 - 4)
    for (system, workers, latency), middle in median.items():
        if system == "agentkd" and latency == 0.2:
            metrics[f"a_minute_{workers}"] = middle["a_minute"]
            metrics[f"peak_mb_{workers}"] = middle["peak_mb"]
    line = {
        "name": "collect",
        "metrics": {name: round(value, 3) for name, value in metrics.items()},
        "n": {f"{key[0]} {key[1]} {key[2]}": int(results[0]["n"]) for key, results in cells.items()},
        "runs": rounds,
        "commit": provenance()["commit"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
