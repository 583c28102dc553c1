"""What does the server add to the engine behind it?

Latency of the bare model through the server beside the engine asked directly, and of a step of the agent,
its sandboxed action included; a long streamed answer whose tokens come one by one: its first token, and each
further one; answers a second at 1 to 64 clients, through the server and directly; memory and the time to
start. The model is scripted and takes no time (``scripted_server.py``), so that all that is measured is the
server's. Rounds are interleaved; figures are medians.

With ``--peers``, the embedded engine beside ``transformers serve`` and, where AGENTKD_VLLM_PYTHON names an
interpreter that has it, vLLM: the same model (``--model``), prompts and token limits; and what the
student's short prompt saves beside the teacher's. Their memory is that of all their processes.
``--quick``: fewer rounds, half a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from processes import memory, memory_of_family

from agentkd.record import provenance

STEPS = 3
"""Of the scripted agent."""
CLIENTS = (1, 8, 32, 64)
RECITED = 256
"""Tokens of a long answer of the scripted model."""
BARS = {"added_ms_p50": 5.0, "added_ms_per_step": 25.0}
PEER_TOKENS = 64
"""Sampled tokens of an answer in the comparison of engines."""


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block."""
    process = subprocess.Popen(command, text=True, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


@contextlib.contextmanager
def server(pace: float = 0.0, piece: int = 8) -> Iterator[tuple[str, str, int, float]]:
    """The scripted server: its address, the engine's, its process id, and the seconds until it was ready."""
    program = Path(__file__).with_name("scripted_server.py")
    began = time.monotonic()
    command = [sys.executable, str(program), "serve", "--pace", str(pace), "--piece", str(piece)]
    with started(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        wait_for(told["server"] + "/ready")
        yield told["server"], told["engine"], process.pid, time.monotonic() - began


def wait_for(url: str, seconds: float = 300.0) -> None:
    """Until it answers 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"{url} was not ready within {seconds:g} s")


def chat(model: str, number: int, verb: str = "Triple", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": f"{verb} {number}."}], **more}


def directly(number: int, verb: str = "Triple") -> dict[str, Any]:
    """The request that the server makes of the engine for :func:`chat`; ids are those of its tokenizer."""
    from tokenizers import pre_tokenizers

    place = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    text = f"user\n{verb} {number}.assistant\n"
    ids = [place[letter] for word, _ in split(text) for letter in word]
    return {"model": "triple", "prompt": ids, "n": 1, "max_tokens": 512, "temperature": 0, "stream": True}


def milliseconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def latency(address: str, engine: str, rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds, after a warm-up."""
    took: dict[str, list[float]] = {"engine": [], "bare": [], "agent": []}
    with httpx.Client(timeout=60) as client:

        def post(url: str, body: dict[str, Any]) -> None:
            client.post(url, json=body).raise_for_status()

        for number in range(rounds + 5):
            for name, url, body in (
                ("engine", f"{engine}/v1/completions", directly(number)),
                ("bare", f"{address}/v1/chat/completions", chat("triple", number)),
                ("agent", f"{address}/v1/chat/completions", chat("triple-agent", number)),
            ):
                took[name].append(milliseconds(lambda url=url, body=body: post(url, body)))  # type: ignore[misc]
    middle = {name: statistics.median(values[5:]) for name, values in took.items()}
    return {
        "engine_ms_p50": middle["engine"],
        "added_ms_p50": middle["bare"] - middle["engine"],
        "added_ms_per_step": (middle["agent"] - STEPS * middle["engine"]) / STEPS,
    }


def streamed(client: httpx.Client, url: str, body: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds to the first piece of text and to the end; the answer must be whole."""
    began, first, pieces = time.perf_counter(), None, 0
    with client.stream("POST", url, json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith('data: {"') and '"role"' not in line:
                first = first or time.perf_counter()
                pieces += 1
    if first is None or pieces < RECITED:
        raise SystemExit(f"{url} sent {pieces} pieces")
    return (first - began) * 1000, (time.perf_counter() - began) * 1000


def stream(address: str, engine: str, rounds: int) -> dict[str, float]:
    """What a stream whose tokens come one by one costs more through the server; medians."""
    took: dict[str, list[tuple[float, float]]] = {"engine": [], "bare": []}
    with httpx.Client(timeout=60) as client:
        for number in range(rounds + 3):
            direct = directly(number, "Recite")
            through = chat("triple", number, "Recite", stream=True, max_tokens=512)
            took["engine"].append(streamed(client, f"{engine}/v1/completions", direct))
            took["bare"].append(streamed(client, f"{address}/v1/chat/completions", through))
    first, whole = (
        {name: statistics.median(value[at] for value in values[3:]) for name, values in took.items()}
        for at in (0, 1)
    )
    return {
        "stream_engine_first_token_ms_p50": first["engine"],
        "stream_added_first_token_ms_p50": first["bare"] - first["engine"],
        "stream_engine_ms_per_token": whole["engine"] / RECITED,
        "stream_added_ms_per_token": (whole["bare"] - whole["engine"]) / RECITED,
    }


async def throughput(url: str, make: Callable[[int], dict[str, Any]], clients: int, seconds: float) -> float:
    """Answers a second."""
    done, deadline = 0, time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:

        async def one(number: int) -> None:
            nonlocal done
            while time.monotonic() < deadline:
                (await client.post(url, json=make(number))).raise_for_status()
                done += 1
                number += clients

        began = time.monotonic()
        await asyncio.gather(*(one(place) for place in range(clients)))
        return done / (time.monotonic() - began)


def load(address: str, engine: str, seconds: float) -> dict[str, float]:
    """Answers a second at each number of clients."""
    ways: list[tuple[str, str, Callable[[int], dict[str, Any]]]] = [
        ("engine", f"{engine}/v1/completions", directly),
        ("bare", f"{address}/v1/chat/completions", lambda number: chat("triple", number)),
        ("agent", f"{address}/v1/chat/completions", lambda number: chat("triple-agent", number)),
    ]
    return {
        f"{name}_per_s_{clients}": asyncio.run(throughput(url, make, clients, seconds))
        for clients in CLIENTS
        for name, url, make in ways
    }


def overhead(rounds: int, seconds: float) -> dict[str, float]:
    """All that is measured with the scripted model."""
    with server() as (address, engine, pid, ready):
        found = {"start_s": ready, **latency(address, engine, rounds)}
    with server(piece=1) as (address, engine, pid, _):
        found |= stream(address, engine, max(10, rounds // 3))
    with server(pace=0.02) as (address, engine, pid, _):
        latency(address, engine, 1)  # the first agent starts the sandbox's zygote
        found |= load(address, engine, seconds)
        found["memory_mib"] = memory(pid)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def peers(model: str) -> Iterator[tuple[str, list[str], str, str]]:
    """Name, command with ``PORT``, path that answers when it is ready, and the model's name there."""
    own = (
        "import sys; from agentkd.engine.torch_engine import TorchEngine\n"
        "from agentkd.engine.weights import load_tokenizer, resolve_model\n"
        "from agentkd.serve import StudentBackend, serve_forever\n"
        "path = resolve_model(sys.argv[1])\n"
        "backend = StudentBackend(TorchEngine.load(path), load_tokenizer(path), 'model')\n"
        "serve_forever([backend], port=int(sys.argv[2]))"
    )
    yield "embedded", [sys.executable, "-c", own, model, "PORT"], "/ready", "model"
    from agentkd.engine.weights import resolve_model

    path = str(resolve_model(model))
    transformers = str(Path(sys.executable).with_name("transformers"))
    yield (
        "transformers",
        [transformers, "serve", "--host", "127.0.0.1", "--port", "PORT", path],
        "/health",
        path,
    )
    python = os.environ.get("AGENTKD_VLLM_PYTHON")
    if python:
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", path]
        command += ["--port", "PORT", "--served-model-name", "model", "--enable-prefix-caching"]
        yield "vllm", command, "/health", "model"


def compare(model: str, clients: tuple[int, ...]) -> dict[str, float]:
    """Start-up, memory and tokens a second of each engine with the same model."""
    found: dict[str, float] = {}
    for name, command, health, served in peers(model):
        port = free_port()
        began = time.monotonic()
        filled = [part.replace("PORT", str(port)) for part in command]
        try:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            with started(filled, env={"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}, **quiet) as process:
                address = f"http://127.0.0.1:{port}"
                wait_for(address + health, 900)  # vLLM's first start compiles
                answered(address, served, 1)
                found[f"{name}_start_s"] = time.monotonic() - began
                for count in clients:
                    found[f"{name}_tokens_per_s_{count}"] = answered(address, served, count)
                found[f"{name}_memory_mib"] = memory_of_family(process.pid)
        except (OSError, httpx.HTTPError, SystemExit, KeyError) as exc:
            print(f"{name}: not measured ({type(exc).__name__}: {exc})", file=sys.stderr)
    return found


def answered(address: str, model: str, clients: int) -> float:
    """Sampled tokens a second of one request from each client at once."""

    async def all_of_them() -> int:
        async with httpx.AsyncClient(timeout=600) as client:

            async def one(number: int) -> int:
                body = {"model": model, "max_tokens": PEER_TOKENS, "temperature": 0.0}
                text = f"Write about the number {number} and what it is good for."
                answer = await client.post(
                    f"{address}/v1/chat/completions",
                    json={**body, "messages": [{"role": "user", "content": text}]},
                )
                return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

            return sum(await asyncio.gather(*(one(number) for number in range(clients))))

    began = time.monotonic()
    return asyncio.run(all_of_them()) / (time.monotonic() - began)


def short_prompt(model: str, rounds: int) -> dict[str, float]:
    """The first token behind each system prompt, with and without a prefix cache."""
    from agentkd.engine.render import render_prompt
    from agentkd.engine.torch_engine import TorchEngine
    from agentkd.engine.weights import load_tokenizer, resolve_model
    from agentkd.prompt import STUDENT, TEACHER, system_prompt

    path = resolve_model(model)
    words, found = load_tokenizer(path), {}
    with TorchEngine.load(path) as engine:
        for prefix in ("known", "new"):
            for name, prompt in (("teacher", system_prompt(TEACHER)), ("student", system_prompt(STUDENT))):
                took = []
                for number in range(rounds + 1):
                    question = {"role": "user", "content": f"What is {number} times {number}?"}
                    ids = render_prompt(words, [{"role": "system", "content": prompt}, question])
                    if prefix == "new":
                        engine.prefix_cache.clear()
                    took.append(milliseconds(lambda ids=ids: engine.generate(ids, max_new_tokens=1)))  # type: ignore[misc]
                found[f"{name}_prompt_tokens"] = float(len(ids))
                found[f"{name}_prompt_ms_prefix_{prefix}"] = statistics.median(took[1:])
    return found


def verdict(name: str, value: float) -> str:
    """Whether a figure is within its bar, where it has one."""
    if name not in BARS:
        return ""
    return f"  {'PASS' if value <= BARS[name] else 'FAIL'} (bar: {BARS[name]:g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--peers", action="store_true", help="compare engines, too")
    parser.add_argument("--model", default="smollm2-135m", help="of the comparison")
    options = parser.parse_args()
    rounds, seconds = (20, 1.0) if options.quick else (300, 15.0)
    metrics = overhead(rounds, seconds)
    if options.peers:
        metrics |= compare(options.model, (1, 8) if options.quick else (1, 8, 32))
        metrics |= short_prompt(options.model, 3 if options.quick else 15)
    for name, value in metrics.items():
        print(f"{value:10.2f}  {name}{verdict(name, value)}")
    rounded = {name: round(value, 3) for name, value in metrics.items()}
    line = {"name": "serve", "metrics": rounded, "n": rounds, "runs": 1, "commit": provenance()["commit"]}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
