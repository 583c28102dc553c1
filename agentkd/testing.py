"""For tests: a scripted model, and a fake endpoint that is a real HTTP server.

Public, so that users can test their tools, filters and scorers without a model. Used by tests
and examples only.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from smolagents.models import ChatMessage, MessageRole, Model
from smolagents.monitoring import TokenUsage

__all__ = ["FakeEndpoint", "ScriptedModel"]

Reply = str | tuple[int, bytes] | tuple[int, bytes, dict[str, str]]


class ScriptedModel(Model):
    """A smolagents model that says the given texts one after another.

    Args:
        outputs: texts; running out of them is an error.

    Attributes:
        seen: the conversations it was asked to continue.
    """

    def __init__(self, outputs: Sequence[str], model_id: str = "scripted") -> None:
        super().__init__(model_id=model_id)
        self.outputs = list(outputs)
        self.seen: list[list[Any]] = []

    def generate(self, messages: list[Any], **options: Any) -> ChatMessage:
        self.seen.append(messages)
        return ChatMessage(
            role=MessageRole.ASSISTANT,
            content=self.outputs.pop(0),
            token_usage=TokenUsage(input_tokens=10, output_tokens=5),
        )


class _QuietServer(ThreadingHTTPServer):
    """A client that hangs up is no news."""

    request_queue_size = 512

    def __init__(self, *arguments: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Cut the connections, too: an endpoint that has ended answers nobody."""
        super().server_close()
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class FakeEndpoint:
    """An OpenAI-compatible chat endpoint on a free loopback port, for as long as the block lasts.

    Args:
        continues: honour ``continue_final_message``, as vLLM does: a final message that is continued
            counts one token less than one that is closed. Else that field is ignored, as other
            servers do.
        reply: from the messages of a request to a text, or to ``(status, body)`` or ``(status, body,
            headers)`` for a fault. When it raises ``ConnectionError``, the connection is cut.
        port: to listen on; 0 takes a free one.
        usage: whether answers carry token counts.

    Attributes:
        url: ends in ``/v1``.
        requests: the bodies it received.
        headers: those of each request, their names in small letters.
    """

    def __init__(
        self,
        reply: Callable[[list[dict[str, Any]]], Reply],
        model_id: str = "fake",
        *,
        continues: bool = False,
        port: int = 0,
        usage: bool = True,
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                data = self.rfile.read(length)
                if len(data) < length:
                    raise ConnectionResetError("the client has gone")
                body = json.loads(data)
                endpoint.headers.append({name.lower(): text for name, text in self.headers.items()})
                endpoint.requests.append(body)
                answer = reply(body["messages"])
                if isinstance(answer, str):
                    open_turn = continues and body.get("continue_final_message") is True
                    content = _completion(answer, body, model_id, int(open_turn))
                    if not usage:
                        del content["usage"]
                    self._send(200, json.dumps(content).encode())
                else:
                    self._send(*answer)

            def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
                dated = headers is not None and "date" in map(str.lower, headers)
                (self.send_response_only if dated else self.send_response)(status)
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = _QuietServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _completion(text: str, body: dict[str, Any], model_id: str, open_turns: int) -> dict[str, Any]:
    n = body.get("n") or 1
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    words = sum(len(str(message["content"]).split()) + 1 for message in body["messages"]) - open_turns
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model", model_id),
        "choices": [{"index": index, **choice} for index in range(n)],
        "usage": {
            "prompt_tokens": words,
            "completion_tokens": n * len(text.split()),
            "total_tokens": words + n * len(text.split()),
        },
    }
