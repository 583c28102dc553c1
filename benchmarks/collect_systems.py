"""The systems that ``collect.py`` compares, each in a process of its own, and their mock endpoint."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["ANSWER", "STEPS", "run_agentkd"]

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
    print(json.dumps({"seconds": seconds, "right": right}))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=float, help="serve the mock endpoint with this latency (s)")
    parser.add_argument("--run", help="the system to run")
    parser.add_argument("--n", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--url")
    parser.add_argument("--sandbox")
    parser.add_argument("--processes", type=int)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve))
    else:
        work(options)


if __name__ == "__main__":
    main()
