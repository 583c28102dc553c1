"""A model behind an OpenAI-compatible endpoint: smolagents' own, with the gate before it.

Every thread has its own connection and keeps it, so that hundreds of calls in flight do not share
one pool and its lock. Answers are checked before they count: a body that is no chat completion
is a fault of the endpoint, and a missing ``usage`` only means that the tokens are unknown.
"""

from __future__ import annotations

import ssl
import threading
from typing import TYPE_CHECKING, Any

from smolagents import OpenAIModel
from smolagents.models import ChatMessage, MessageRole, remove_content_after_stop_sequences
from smolagents.monitoring import TokenUsage

from agentkd.errors import ProviderError
from agentkd.gate import Gate
from agentkd.model import token_usage
from agentkd.trajectory import Usage

if TYPE_CHECKING:
    from openai import OpenAI

__all__ = ["EndpointModel", "UselessAnswerError"]


class UselessAnswerError(ProviderError):
    """An answer that is none; ``usage`` is what the endpoint will ask to be paid for it."""

    usage: Usage | None = None


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
        """The client of the calling thread."""
        import openai

        http = openai.DefaultHttpxClient(verify=self._ssl, timeout=self.client_kwargs["timeout"])
        return openai.OpenAI(**self.client_kwargs, http_client=http)

    def _client(self) -> OpenAI:
        client = getattr(self._threads, "client", None)
        if client is None:
            client = self._threads.client = self.create_client()
        return client

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
            answer = _checked(self._post(dict(request)))
            if stop_sequences is not None and not self.supports_stop_parameter:
                answer.content = remove_content_after_stop_sequences(answer.content, stop_sequences)
            return answer

        return self.gate.call(send, _tokens)

    def _prepare_completion_kwargs(self, *args: Any, **options: Any) -> dict[str, Any]:
        """smolagents lets an ``extra_body`` of the model replace that of a call; here the fields of
        both are sent, and those of the call win."""
        request: dict[str, Any] = super()._prepare_completion_kwargs(*args, **options)
        body = {**(self.kwargs.get("extra_body") or {}), **(options.get("extra_body") or {})}
        return {**request, "extra_body": body} if body else request

    def _post(self, request: dict[str, Any]) -> Any:
        """``chat.completions.create``, without its walk over every field of every message, which costs
        more than all the rest of a call; the body is what it would send."""
        from openai.types.chat import ChatCompletion

        options: Any = {
            name: request.pop(argument)
            for argument, name in (("extra_headers", "headers"), ("extra_query", "params"))
            if argument in request
        }
        more = request.pop("extra_body", None) or {}
        return self._client().post(
            "/chat/completions", cast_to=ChatCompletion, body={**request, **more}, options=options
        )


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


def _tokens(answer: ChatMessage) -> int:
    used = answer.token_usage
    return used.input_tokens + used.output_tokens if used is not None else 0
