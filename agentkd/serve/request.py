"""A chat-completions request: what is accepted, and what is refused instead of ignored."""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator

from agentkd.errors import ProviderError
from agentkd.trajectory import valid_text

__all__ = ["AgentOptions", "ChatRequest", "EngineRefusal", "RequestError", "parse_request"]

MAX_CHOICES = 128
_HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""OpenAI's fields that change nothing of what is generated: they are dropped."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "best_of": (1,),
    "echo": (False,),
    "use_beam_search": (False,),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "include_reasoning": (True,),
    "add_special_tokens": (False,),
}
"""Fields that change what is generated and are not supported, with the values that ask for nothing."""
_OF_MESSAGES = {"name", "reasoning", "reasoning_content"}
"""Fields of a message that chat templates do not show: clients send back what they got."""
_EMPTY_IN_MESSAGES = {"annotations", "audio", "function_call", "refusal", "tool_calls"}
"""Those that must hold nothing: dropping what they hold would change the conversation."""


class RequestError(Exception):
    """The request cannot be served; becomes an OpenAI-shaped error with this status.

    Args:
        message: what is wrong.
        status: HTTP status.
        param: the field at fault.
        code: OpenAI's short name of the error.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class EngineRefusal(ProviderError):
    """The engine does not take what a client asks for; the client's business, not the server's."""


class _Part(BaseModel):
    type: Literal["text"]
    text: str


_CONTENT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": _Part.model_json_schema()}]
}


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, WithJsonSchema(_CONTENT_SCHEMA, mode="validation")]

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if isinstance(value, list):
            value = "".join(_Part.model_validate(part).text for part in value)
        if isinstance(value, str):
            return valid_text(value)
        return "" if value is None else value

    def plain(self) -> dict[str, str]:
        """As chat templates want it: "developer" is OpenAI's newer name of "system"."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


_STOP_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 64}]}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False
    """OpenAI's padding against listeners; there is none here."""


class AgentOptions(BaseModel):
    """The ``agentkd`` object of a request: how an agent model works on it. Frozen; None: its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_steps: int | None = Field(default=None, ge=1, le=100)
    """Actions, at most."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds for the whole answer; the server's own limit holds beside it."""
    actions: int | None = Field(default=None, ge=1, le=64)
    """Actions sampled at each step, at most; 1 takes the one the model gives."""
    router: str | None = None
    """Whether tools are used, as :func:`agentkd.router.parse_router` reads it; "none" for no router."""
    seed: int | None = None
    """As ``seed`` of the request, which it overrides."""
    return_trajectory: bool = False
    """Adds the record of the rollout to the response."""
    answer: str | None = None
    """The right answer, where it is known: it is never shown to the agent, and the record is scored."""
    scorer: str = "exact"
    """How, see :mod:`agentkd.scorer`."""


class ChatRequest(BaseModel):
    """A valid request. Frozen; made from a body by :func:`parse_request`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    messages: list[_Message] = Field(min_length=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=100)
    """None: the backend decides."""
    top_p: float = Field(default=1.0, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of ``max_tokens``; counts when both are given."""
    stop: Annotated[list[str], WithJsonSchema(_STOP_SCHEMA, mode="validation")] = Field(
        default=[], max_length=64
    )
    seed: int | None = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    logprobs: bool = False
    return_token_ids: bool = False
    """Adds ``prompt_token_ids`` to the response and ``token_ids`` to each choice."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """Go on with the last message, an assistant's, instead of answering it."""
    agentkd: AgentOptions | None = None
    """For agent models only."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        several = [value] if isinstance(value, str) else value
        return [it for it in several if it != ""] if isinstance(several, list) else several

    @property
    def limit(self) -> int | None:
        """Sampled tokens of each choice, where the client set a limit."""
        return self.max_completion_tokens or self.max_tokens

    def plain_messages(self) -> list[dict[str, str]]:
        """The conversation as ``{"role", "content"}`` with text only."""
        return [message.plain() for message in self.messages]


def parse_request(body: bytes) -> ChatRequest:
    """Read the body of a request.

    Raises:
        RequestError: no JSON, a wrong type or value, or a field that is not supported.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"The body is not valid JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise RequestError("The body must be a JSON object.")
    given = _supported(data)
    if isinstance(given.get("messages"), list):
        given["messages"] = [_plain_turn(place, turn) for place, turn in enumerate(given["messages"])]
    try:
        request = ChatRequest.model_validate(given)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(it) for it in first["loc"])
        raise RequestError(f"{where}: {first['msg']}", param=where or None, code="invalid_value") from exc
    if request.continue_final_message:
        _check_continuation(request)
    return request


def _supported(data: dict[str, Any]) -> dict[str, Any]:
    """The fields that count.

    Raises:
        RequestError: one that would change what is generated, and does not here; or one nobody knows.
    """
    kept: dict[str, Any] = {}
    for name, value in data.items():
        if value is None or name in _HARMLESS:
            continue
        if name in ChatRequest.model_fields:
            kept[name] = value
        elif not any(_same(value, it) for it in _NEUTRAL.get(name, ())):
            raise _unsupported(name)
    return kept


def _plain_turn(place: int, turn: Any) -> Any:
    """A message without the fields that say nothing.

    Raises:
        RequestError: it has one that says something which no template here can show.
    """
    if not isinstance(turn, dict):
        return turn
    kept: dict[str, Any] = {}
    for name, value in turn.items():
        if name in _Message.model_fields:
            kept[name] = value
        elif not (value is None or name in _OF_MESSAGES or (name in _EMPTY_IN_MESSAGES and not value)):
            said = f"A message with {name[:64]!r} is not supported by this server."
            raise RequestError(said, param=f"messages.{place}.{name[:64]}", code="unsupported_parameter")
    return kept


def _unsupported(name: str) -> RequestError:
    said, known = f"{name[:64]!r} is not supported by this server.", (*ChatRequest.model_fields, *_HARMLESS)
    if name not in _NEUTRAL and (near := difflib.get_close_matches(name[:64], known, n=1)):
        said += f" Is {near[0]!r} meant?"
    return RequestError(said, param=name[:64], code="unsupported_parameter")


def _check_continuation(request: ChatRequest) -> None:
    if request.messages[-1].role != "assistant":
        raise RequestError(
            "continue_final_message needs an assistant message at the end.", param="continue_final_message"
        )
    if "add_generation_prompt" in request.model_fields_set and request.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true.",
            param="add_generation_prompt",
        )


def _same(value: Any, neutral: Any) -> bool:
    # True == 1 in Python, but "echo: 1" or "top_k: false" is not what the field means.
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)
