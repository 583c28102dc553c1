"""A model behind an OpenAI-compatible endpoint: smolagents' own, with the gate before it.

Every thread has its own connection and keeps it, so that hundreds of calls in flight do not share
one pool and its lock. Answers are checked before they count: a body that is no chat completion
is a fault of the endpoint, and a ``usage`` that is missing or cannot be only means that the tokens
are unknown.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from smolagents import OpenAIModel
from smolagents.models import (
    ChatMessage,
    MessageRole,
    remove_content_after_stop_sequences,
    tool_role_conversions,
)
from smolagents.monitoring import TokenUsage

from agentkd.errors import ProviderError
from agentkd.gate import Fault, Gate
from agentkd.model import token_usage
from agentkd.trajectory import Usage

if TYPE_CHECKING:
    import openai
    from openai import OpenAI

__all__ = ["CHARACTERS_PER_TOKEN", "EndpointModel", "UselessAnswerError", "as_object"]

CHARACTERS_PER_TOKEN = 4
"""For the tokens of servers that do not count."""
TEMPLATE_TOKENS, TEMPLATE_TOKENS_A_MESSAGE = 4096, 64
"""What a chat template, and instructions that a provider adds, may make of a prompt beyond its text."""
HIDDEN_TOKENS = 65536
"""Sampled tokens of one answer that it may not show (reasoning), beside what it shows."""

PATH = "/chat/completions"


class UselessAnswerError(ProviderError):
    """An answer that is none; ``usage`` is what the endpoint will ask to be paid for it."""

    usage: Usage | None = None


class _Line:
    """The connection of one thread: requests go out over the client's own HTTP client, with its address and
    headers, which are the same each time and so are made once.

    Args:
        client: the official client.
        http: what it sends with.
    """

    def __init__(self, client: OpenAI, http: Any) -> None:
        self.client, self._http = client, http
        self._first: Any = None

    def _request(self, data: bytes) -> Any:
        first = self._first
        if first is None:
            client, url = self.client, str(self.client.base_url).rstrip("/") + PATH
            given = {name: text for name, text in client.default_headers.items() if isinstance(text, str)}
            given |= client.auth_headers
            first = self._first = self._http.build_request("POST", url, headers=given, content=b"")
            del first.headers["content-length"]
        return type(first)(
            "POST", first.url, headers=first.headers, content=data, extensions=first.extensions
        )

    def send(self, body: dict[str, Any]) -> bytes:
        """The answer of the endpoint.

        Raises:
            openai.APIError: as the client raises it.
        """
        import openai

        data = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        request = self._request(data)
        try:
            response = self._http.send(request)
        except Exception as exc:
            kinds = {base.__name__ for base in type(exc).__mro__}  # of httpx, or of what has replaced it
            if "TimeoutException" in kinds:
                raise openai.APITimeoutError(request=request) from exc
            if "RequestError" in kinds:
                raise openai.APIConnectionError(request=request) from exc
            raise
        if not response.is_success:
            raise _status_error(response)
        return bytes(response.content)


def _status_error(response: Any) -> openai.APIStatusError:
    """The client's exception for a status that is no success."""
    import openai

    kinds: dict[int, type[openai.APIStatusError]] = {
        400: openai.BadRequestError,
        401: openai.AuthenticationError,
        403: openai.PermissionDeniedError,
        404: openai.NotFoundError,
        409: openai.ConflictError,
        422: openai.UnprocessableEntityError,
        429: openai.RateLimitError,
    }
    status = response.status_code
    kind = kinds.get(status, openai.InternalServerError if status >= 500 else openai.APIStatusError)
    try:
        body = response.json()
    except ValueError:
        body = response.text.strip()
    error = body.get("error", body) if isinstance(body, dict) else body
    # Not the whole body: some servers repeat the conversation in it.
    places = [error.get("message"), error.get("detail")] if isinstance(error, dict) else [error]
    said = next((f" - {text}" for text in places if isinstance(text, str) and text), "")
    return kind(f"Error code: {status}{said}", response=response, body=error)


class EndpointModel(OpenAIModel):
    """See :func:`agentkd.model.openai_model`.

    Args:
        gate: waits, limits and retries; may be shared by several models of one endpoint.
        timeout: seconds for one call.
        options: as smolagents' ``OpenAIModel`` takes them.
    """

    def __init__(self, gate: Gate, *, timeout: float, **options: Any) -> None:
        self.gate = gate
        self._threads = threading.local()
        self._ssl = ssl.create_default_context()  # once: it reads all certificates
        super().__init__(
            client_kwargs={"timeout": timeout, "max_retries": 0},
            flatten_messages_as_text=True,
            retry=False,
            **options,
        )

    def create_client(self) -> OpenAI:
        """A client with a connection of its own."""
        return self._new_line().client

    def _new_line(self) -> _Line:
        import openai

        http = openai.DefaultHttpxClient(verify=self._ssl, timeout=self.client_kwargs["timeout"])
        return _Line(openai.OpenAI(**self.client_kwargs, http_client=http), http)

    def _line(self) -> _Line:
        line: _Line | None = getattr(self._threads, "line", None)
        if line is None:
            line = self._threads.line = self._new_line()
        return line

    def generate(
        self, messages: list[Any], stop_sequences: list[str] | None = None, **options: Any
    ) -> ChatMessage:
        """See ``smolagents.Model.generate``."""
        request = self._prepare_completion_kwargs(
            messages=messages,
            stop_sequences=stop_sequences,
            model=self.model_id,
            custom_role_conversions=self.custom_role_conversions,
            **options,
        )

        def send() -> ChatMessage:
            answer = _checked(self._possible(self._post(dict(request)), request))
            if stop_sequences is not None and not self.supports_stop_parameter:
                answer.content = remove_content_after_stop_sequences(answer.content, stop_sequences)
            return answer

        return self.gate.call(send, _tokens, lambda: _guess(request))

    def _possible(self, response: Any, request: dict[str, Any]) -> Any:
        """The response, without its token counts where they cannot be, which is noted."""
        if why := _impossible(response, request):
            self.gate.note(Fault("usage", "wrong usage"), why)
            response.usage = None
        return response

    def _prepare_completion_kwargs(self, messages: list[Any], **options: Any) -> dict[str, Any]:
        """What smolagents makes of a call, but for two things.

        It copies every message deeply, which costs more than the rest of it, and it lets an
        ``extra_body`` of the model replace that of a call; here the fields of both are sent, and
        those of the call win.
        """
        flat = None
        if options.get("flatten_messages_as_text", self.flatten_messages_as_text):
            flat = _flat(messages, options.get("custom_role_conversions") or tool_role_conversions)
        known = {} if flat is None else {"messages": flat}
        rest = messages if flat is None else []
        request: dict[str, Any] = {**super()._prepare_completion_kwargs(messages=rest, **options), **known}
        body = {**(self.kwargs.get("extra_body") or {}), **(options.get("extra_body") or {})}
        return {**request, "extra_body": body} if body else request

    def _post(self, request: dict[str, Any]) -> Any:
        """``chat.completions.create``, without its walks over every field of request and answer, which
        cost more than all the rest of a call; the body is what it would send.

        Raises:
            ValueError: the answer is not JSON.
            openai.APIError: as the client raises it.
        """
        options: Any = {
            name: request.pop(argument)
            for argument, name in (("extra_headers", "headers"), ("extra_query", "params"))
            if argument in request
        }
        more = request.pop("extra_body", None) or {}
        body, line = {**request, **more}, self._line()
        if options:  # other headers or another address than usual
            answer = line.client.post(PATH, cast_to=bytes, body=body, options=options)
        else:
            answer = line.send(body)
        return as_object(json.loads(answer))


def as_object(value: Any) -> Any:
    """JSON with attributes, as clients hand it out."""
    if isinstance(value, dict):
        return SimpleNamespace(**{key: as_object(item) for key, item in value.items()})
    return [as_object(item) for item in value] if isinstance(value, list) else value


def _flat(messages: Sequence[Any], roles: Mapping[Any, Any]) -> list[dict[str, str]] | None:
    """Roles and texts, neighbours of one role joined; None where a message is not a single text."""
    flat: list[dict[str, str]] = []
    for message in messages:
        fields = message if isinstance(message, dict) else vars(message)
        role, content = fields["role"], fields["content"]
        if not (isinstance(content, list) and len(content) == 1 and "text" in content[0]):
            return None
        role, text = roles.get(role, role), content[0]["text"]
        role = getattr(role, "value", role)
        if role not in ("system", "user", "assistant"):
            return None
        if flat and flat[-1]["role"] == role:
            flat[-1]["content"] += f"\n{text}"
        else:
            flat.append({"role": role, "content": text})
    return flat


def _checked(response: Any) -> ChatMessage:
    """The answer, if it is one.

    Raises:
        UselessAnswerError: it is no chat completion, has no choice, or a choice without text.
    """
    choices = getattr(response, "choices", None)
    if not isinstance(choices, list):
        raise _useless(
            response,
            "The endpoint's answer is not a chat completion: it has no choices.",
            "Check --api-base: it must be an OpenAI-compatible endpoint, ending in /v1.",
        )
    if not choices:
        raise _useless(response, "The endpoint's answer has an empty list of choices.")
    text = getattr(getattr(choices[0], "message", None), "content", None)
    if not isinstance(text, str):
        raise _useless(response, "The endpoint answered without text.")
    return ChatMessage(role=MessageRole.ASSISTANT, content=text, raw=response, token_usage=_usage(response))


def _useless(response: Any, message: str, hint: str = "") -> UselessAnswerError:
    error, used = UselessAnswerError(message, hint), _usage(response)
    if used is not None:
        answer = ChatMessage(role=MessageRole.ASSISTANT, content=None, raw=response, token_usage=used)
        error.usage = token_usage(answer)
    return error


def _usage(response: Any) -> TokenUsage | None:
    """The server's counts; None where there are none, or none that can be."""
    used = getattr(response, "usage", None)
    counts = [getattr(used, name, None) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts):
        return None
    return TokenUsage(input_tokens=counts[0], output_tokens=counts[1])


def _tokens(answer: ChatMessage) -> int | None:
    used = answer.token_usage
    return used.input_tokens + used.output_tokens if used is not None else None


def _impossible(response: Any, request: dict[str, Any]) -> str:
    """Why the counts of an answer cannot be, in words; "" where they can, or are none.

    A token is at least one byte of text, but for what template and provider add to a prompt, and for
    what a model samples and does not show.
    """
    used = _usage(response)
    if used is None:
        return ""
    count = max(1, request.get("n") or 1)
    texts = [str(message["content"]) for message in request["messages"]]
    most = TEMPLATE_TOKENS + TEMPLATE_TOKENS_A_MESSAGE * len(texts)
    if used.input_tokens > most + sum(map(len, texts)) and used.input_tokens > count * (most + _bytes(texts)):
        return f"{used.input_tokens} prompt tokens of {_bytes(texts)} bytes"
    limit = request.get("max_completion_tokens") or request.get("max_tokens") or 0
    most = count * max(limit, HIDDEN_TOKENS)
    if used.output_tokens > most:
        said = [str(getattr(choice, "message", "")) for choice in getattr(response, "choices", None) or ()]
        if used.output_tokens > most + _bytes(said):
            return f"{used.output_tokens} sampled tokens of {_bytes(said)} bytes"
    return ""


def _bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def _guess(request: dict[str, Any]) -> int:
    """About how many tokens a call will take, before any was counted."""
    prompt = sum(len(str(message["content"])) for message in request["messages"])
    limit = request.get("max_completion_tokens") or request.get("max_tokens") or 0
    return prompt // CHARACTERS_PER_TOKEN + int(limit)
