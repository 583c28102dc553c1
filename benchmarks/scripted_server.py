"""The server under test of ``serve.py`` and ``soak.py``: all of it real but the model.

``serve`` starts the server (guard, bare model, agent with its sandbox) over an engine that is a supervised
child process asked by vLLM's protocol. ``engine`` is that child: its answers are computed from the prompt, so
that each can be checked, and take as long as they are told to. A question is "Triple N."; the bare model says
the number, the agent prints it in the sandbox at its first steps and answers at the last. "Recite N." is
answered at length.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

STEPS = 3
"""Of the agent, for each question."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIECE = 8
"""Tokens that come together, where nothing else is said."""
RECITED = 256
"""Tokens of a long answer, without its end."""


def letters() -> Tokenizer:
    """One token a byte, and the marks of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    return made


def tokenizer() -> Any:
    """The same as the server wants it."""
    import transformers

    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters(), eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = CHATML
    return made


def answer_to(prompt: str) -> str:
    """What the model says next."""
    if recited := re.findall(r"Recite (\d+)\.", prompt):
        return f"{recited[-1]} and on, ".ljust(16).replace("  ", " .") * (RECITED // 16)
    number = int(re.findall(r"Triple (\d+)\.", prompt)[-1])
    if "Act." not in prompt:
        return f"It is {3 * number}, and that is all."
    step = prompt.count("```python")
    code = f"final_answer({3 * number})" if step == STEPS - 1 else f"print({3 * number})"
    return f"Thought: step {step + 1}\n```python\n{code}\n```"


def engine(port: int, pace: float, piece: int, pid_file: Path | None) -> None:
    """Serve ``/v1/completions`` until stopped; ``piece`` tokens come together, every ``pace`` seconds."""
    import uvicorn

    if pid_file is not None:
        pid_file.write_text(str(os.getpid()))
    words, app = letters(), FastAPI()  # transformers would make every start seconds longer
    end = words.token_to_id("<|im_end|>")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.get("/v1/models")
    def listed() -> dict[str, Any]:
        return {"data": [{"id": "triple", "max_model_len": 100_000}]}

    @app.post("/v1/completions")
    async def completions(http: Request) -> Any:
        body = json.loads(await http.body())
        text = answer_to(words.decode(body["prompt"]))
        ids = [*words.encode(text).ids, end][: body["max_tokens"]]
        return StreamingResponse(pieces(text, ids), media_type="text/event-stream")

    async def pieces(text: str, ids: list[int]) -> AsyncIterator[str]:
        for start in range(0, len(ids), piece):
            await asyncio.sleep(pace)
            last = start + piece >= len(ids)
            choice = {
                "index": 0,
                "text": text if last else "",
                "token_ids": ids[start : start + piece],
                "logprobs": {"token_logprobs": [-0.1] * len(ids[start : start + piece])},
                "finish_reason": ("stop" if ids[-1] == end else "length") if last else None,
            }
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None)


def serve(pace: float, piece: int, pid_file: Path | None) -> None:
    """Serve until SIGTERM; the first line of stdout is a JSON object with both addresses."""
    from agentkd.agent_config import AgentConfig
    from agentkd.serve import AgentBackend, GuardConfig, StudentBackend, create_app
    from agentkd.serve.child import Child
    from agentkd.serve.server import serve_app
    from agentkd.serve.vllm import VLLMEngine

    def command(port: int) -> list[str]:
        own = [sys.executable, __file__, "engine", "--port", str(port)]
        own += ["--pace", str(pace), "--piece", str(piece)]
        return own if pid_file is None else [*own, "--pid-file", str(pid_file)]

    with tempfile.TemporaryDirectory() as folder:
        child = Child(command, Path(folder) / "engine.log", name="the engine", environment=os.environ)
        child.start()
        try:
            words, made = tokenizer(), VLLMEngine(child, "triple")
            config = AgentConfig(model="triple", prompt="Act.", max_steps=STEPS)
            agent = AgentBackend(made, words, config)
            agent.sessions.prepare()
            backends = [StudentBackend(made, words, "triple"), agent]
            serve_app(
                create_app(backends, GuardConfig(max_running=48, max_waiting=64)),
                host="127.0.0.1",
                port=0,
                drain_seconds=20,
                say=lambda address: print(json.dumps({"server": address, "engine": child.url}), flush=True),
            )
            agent.close()
        finally:
            made.close()
            child.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["serve", "engine"])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds for a piece")
    parser.add_argument("--piece", type=int, default=PIECE, help="tokens that come together")
    parser.add_argument("--pid-file", type=Path, help="takes the engine's process id")
    options = parser.parse_args()
    if options.role == "serve":
        serve(options.pace, options.piece, options.pid_file)
    else:
        engine(options.port, options.pace, options.piece, options.pid_file)


if __name__ == "__main__":
    main()
