"""Does the server stay right and honest under load, clients that hang up and an engine that dies?

Clients ask questions that have one right answer each, of the bare model and of the agent, streamed or not.
One in twenty hangs up in the middle. The engine's process is killed twice. Every answer is checked: it is
right, or a failure that says so (an error status, an error event), or it counts against the server. Memory
and the processes that are left at the end are looked at, too. The model is scripted
(``scripted_server.py``); all else is real. Ten minutes; ``--quick`` is 60 seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from processes import family, left_of, memory

from agentkd.record import provenance

HUNG_UP = 0.05
"""Share of the requests whose client goes away in the middle."""
AGENT = 0.3
"""Share of the requests that ask the agent."""
PATIENCE = 60.0
"""Seconds after which an answer counts as never given."""


async def ask(client: httpx.AsyncClient, number: int, draw: random.Random) -> str:
    """One request; returns what came of it: "right", "wrong", "honest ...", "dishonest ..." or "hung up"."""
    agent, stream, leave = draw.random() < AGENT, draw.random() < 0.6, draw.random() < HUNG_UP
    body = {
        "model": "triple-agent" if agent else "triple",
        "messages": [{"role": "user", "content": f"Triple {number}."}],
        "stream": stream or leave,
    }
    right = f"{3 * number}" if agent else f"It is {3 * number}, and that is all."
    try:
        async with asyncio.timeout(PATIENCE):
            if stream or leave:
                return await follow(client, body, right, leave)
            answer = await client.post("/v1/chat/completions", json=body)
            if answer.status_code != 200:
                return refusal(answer.status_code, answer.content)
            choice = answer.json()["choices"][0]
            return verdict(choice["message"]["content"], choice["finish_reason"], right)
    except TimeoutError:
        return "dishonest: no answer"
    except (httpx.HTTPError, ValueError, KeyError) as exc:
        return f"dishonest: {type(exc).__name__}"


async def follow(client: httpx.AsyncClient, body: dict[str, Any], right: str, leave: bool) -> str:
    """The same for an answer that comes in pieces."""
    said, reason = "", None
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            return refusal(answer.status_code, await answer.aread())
        pieces = 0
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return verdict(said, reason, right)
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return f"honest: {event['error']['code']}"
            pieces += 1
            if leave and pieces > 2:
                return "hung up"
            for choice in event["choices"]:
                said += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
    return "dishonest: an end without an end"


def refusal(status: int, content: bytes) -> str:
    """An error status must come with words."""
    error = json.loads(content)["error"]
    return f"honest: {status} {error['code']}" if error["message"] else "dishonest: an empty error"


def verdict(said: str, reason: str | None, right: str) -> str:
    return "right" if (said, reason) == (right, "stop") else "wrong"


async def attack(address: str, clients: int, deadline: float) -> Counter[str]:
    """Ask from many clients until the deadline."""
    counts: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=clients * 2, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=limits) as client:

        async def one(place: int) -> None:
            draw, number = random.Random(place), place
            while time.monotonic() < deadline:
                number += clients
                outcome = await ask(client, number, draw)
                counts[outcome] += 1
                if outcome.startswith("honest"):
                    await asyncio.sleep(0.2)

        await asyncio.gather(*(one(place) for place in range(clients)))
    return counts


Watched = tuple[list[float], dict[int, str], int]


async def watch(pid: int, pid_file: Path, seconds: float, kills: int) -> Watched:
    """Samples memory, kills the engine in between; returns the samples, all processes seen, and the kills."""
    samples, seen, killed = [], {}, 0
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        samples.append(memory(pid))
        seen |= family(pid)
        if killed < kills and passed > seconds * (killed + 1) / (kills + 1):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
            killed += 1
        await asyncio.sleep(min(1.0, seconds / 50))
    return samples, seen, killed


def soak(seconds: float, clients: int, kills: int) -> dict[str, Any]:
    """The whole run."""
    program = Path(__file__).with_name("scripted_server.py")
    with tempfile.TemporaryDirectory() as folder:
        pid_file = Path(folder) / "engine.pid"
        command = [sys.executable, str(program), "serve", "--pace", "0.01", "--pid-file", str(pid_file)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = json.loads(server.stdout.readline())["server"]

            async def both() -> tuple[Counter[str], Watched]:
                watching = asyncio.create_task(watch(server.pid, pid_file, seconds, kills))
                counts = await attack(address, clients, time.monotonic() + seconds)
                return counts, await watching

            counts, (samples, seen, killed) = asyncio.run(both())
            seen |= family(server.pid)
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
            time.sleep(0.5)
            left = left_of(seen)
        finally:
            server.kill()
            server.wait()
    quarter = max(1, len(samples) // 4)
    early, late = statistics.median(samples[quarter : 2 * quarter]), statistics.median(samples[-quarter:])
    honest = sum(count for outcome, count in counts.items() if outcome.startswith("honest"))
    return {
        "outcomes": dict(counts.most_common()),
        "wrong_answers": counts["wrong"],
        "failed_dishonestly": sum(n for outcome, n in counts.items() if outcome.startswith("dishonest")),
        "right_answers": counts["right"],
        "failed_honestly": honest,
        "hung_up": counts["hung up"],
        "engine_kills": killed,
        "memory_mib": round(late, 1),
        "memory_growth_mib": round(late - early, 1),
        "processes_left": left,
        "exit_code": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="60 seconds")
    parser.add_argument("--seconds", type=float, help="600 by default")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--kills", type=int, default=2, help="of the engine")
    options = parser.parse_args()
    seconds = options.seconds or (60.0 if options.quick else 600.0)
    metrics = soak(seconds, options.clients, options.kills)
    for outcome, count in metrics.pop("outcomes").items():
        print(f"{count:8,}  {outcome}")
    for name, value in metrics.items():
        print(f"{value:8}  {name}")
    n = metrics["right_answers"] + metrics["wrong_answers"]
    line = {"name": "soak", "metrics": metrics, "n": n, "runs": 1, "commit": provenance()["commit"]}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
