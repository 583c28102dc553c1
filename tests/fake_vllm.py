"""A server that speaks vLLM's ``/v1/completions`` and does what a test wants; it counts its connections."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

__all__ = ["FakeVLLM", "event"]


def event(text: str = "", ids: tuple[int, ...] = (), reason: str | None = None) -> dict[str, Any]:
    """A chunk with one choice."""
    logprobs = {"token_logprobs": [-0.1] * len(ids)}
    choice = {"index": 0, "text": text, "token_ids": list(ids), "logprobs": logprobs, "finish_reason": reason}
    return {"choices": [choice]}


class FakeVLLM:
    """What the handler of a request sees, and what came of all of them.

    Args:
        answer: takes the body of a request, and gives events; what is no event is a delay in seconds. A
            tuple is a status and a body instead.

    Attributes:
        connections: how many were accepted.
        broken: how many answers could not be written to their end, because the client had gone.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.answer = answer
        self.connections = self.broken = 0
        self.metrics = ""
        self.bodies: list[dict[str, Any]] = []
        self.url = ""

    @property
    def child(self) -> Any:
        """What :class:`agentkd.serve.vllm.VLLMEngine` asks for the address."""
        return SimpleNamespace(require=lambda: self.url, name="vLLM", state="ready", restarts=0)

    @contextmanager
    def serve(self) -> Iterator[FakeVLLM]:
        """Listen while the block lasts."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                fake.connections += 1

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                listed = {"data": [{"id": "m", "max_model_len": 100_000}]}
                self.whole(200, fake.metrics if self.path == "/metrics" else json.dumps(listed))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.bodies.append(body)
                found = fake.answer(body)
                if isinstance(found, tuple):
                    self.whole(*found)
                    return
                try:
                    self.stream(found)
                except OSError:
                    fake.broken += 1
                    self.close_connection = True

            def stream(self, events: Any) -> None:
                begun = False
                for it in [*events, "[DONE]"]:
                    if isinstance(it, float):
                        time.sleep(it)
                        continue
                    if not begun:
                        self.send_response(200)
                        self.send_header("Transfer-Encoding", "chunked")
                        self.end_headers()
                        begun = True
                    data = f"data: {it if isinstance(it, str) else json.dumps(it)}\n\n".encode()
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.write(b"0\r\n\r\n")

            def whole(self, status: int, content: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
