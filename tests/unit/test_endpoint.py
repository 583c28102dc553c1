"""A model behind an endpoint: what counts as an answer, as a fault, and as tokens."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from agentkd.errors import ContextOverflowError
from agentkd.gate import Gate, GateConfig
from agentkd.model import _retry_after, fault_of, openai_model, provider_error, token_usage
from agentkd.testing import FakeEndpoint

ASK = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the gate wanted to sleep; it does not."""
    slept: list[float] = []
    monkeypatch.setattr(Gate, "_sleep", lambda self, seconds: slept.append(seconds))
    return slept


def answer(**changes: Any) -> bytes:
    message = {"role": "assistant", "content": "hello"}
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
        **changes,
    }
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    "bad",
    [
        (200, b'{"id": "1", "choices": [{"message": {"content": "tru'),
        (200, b"<html>bad gateway</html>"),
        (200, b""),
        (200, b"null"),
        (200, answer(choices=[])),
        (200, answer(choices=[{"index": 0, "message": {"role": "assistant", "content": None}}])),
        (500, b'{"error": {"message": "oh"}}'),
        (502, b"<html>"),
        (408, b"{}"),
        (429, b'{"error": {"message": "slow down"}}', {"retry-after": "0.01"}),
        (503, b"", {"retry-after": "0.01"}),
    ],
)
def test_an_answer_that_is_none_is_asked_for_again(bad: Any, naps: list[float]) -> None:
    replies = [bad, "hello"]
    with FakeEndpoint(lambda messages: replies.pop(0)) as endpoint:
        model = openai_model("fake", endpoint.url, retries=1)
        assert model.generate(ASK).content == "hello"
        assert len(endpoint.requests) == 2
        assert sum(model.gate.faults.values()) == 1


def test_a_cut_connection_is_tried_again(naps: list[float]) -> None:
    cut = [True]

    def reply(messages: list[dict[str, Any]]) -> str:
        if cut.pop() if cut else False:
            raise ConnectionResetError
        return "hello"

    with FakeEndpoint(reply) as endpoint:
        assert openai_model("fake", endpoint.url, retries=1).generate(ASK).content == "hello"


def test_an_endpoint_that_hangs_is_left_after_the_timeout(naps: list[float]) -> None:
    hold = threading.Event()

    def reply(messages: list[dict[str, Any]]) -> str:
        hold.wait(5)
        return "late"

    with FakeEndpoint(reply) as endpoint:
        model = openai_model("fake", endpoint.url, timeout=0.1, retries=1)
        with pytest.raises(Exception, match=r"[Tt]imed out"):
            model.generate(ASK)
        assert model.gate.faults == {"timeout": 2}
        hold.set()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_request_that_is_wrong_is_sent_once(status: int, naps: list[float]) -> None:
    with FakeEndpoint(lambda messages: (status, b'{"error": {"message": "no"}}')) as endpoint:
        with pytest.raises(Exception, match="no"):
            openai_model("fake", endpoint.url, retries=5).generate(ASK)
        assert len(endpoint.requests) == 1


def test_a_used_up_quota_is_not_waited_for(naps: list[float]) -> None:
    body = b'{"error": {"message": "no money", "code": "insufficient_quota"}}'
    with FakeEndpoint(lambda messages: (429, body)) as endpoint:
        with pytest.raises(Exception, match="no money"):
            openai_model("fake", endpoint.url).generate(ASK)
        assert len(endpoint.requests) == 1


def failed(status: int, body: dict[str, Any]) -> Exception:
    """What the model raises when an endpoint answers so; it is asked once."""
    gate = Gate(GateConfig(retries=0, patience=0.0), fault_of)
    with FakeEndpoint(lambda messages: (status, json.dumps(body).encode())) as endpoint:
        with pytest.raises(Exception, match=r"\d") as caught:
            openai_model("fake", endpoint.url, gate=gate).generate(ASK)
        assert len(endpoint.requests) == 1
    return caught.value


def said(message: str, status: int = 400, **more: Any) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, **more}}


OVERFLOWS = [
    said("too long", code="context_length_exceeded"),
    said(
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens. "
        "Please reduce the length of the messages."
    ),
    said("Your input exceeds the context window of this model. Please adjust your input and try again."),
    said("the request exceeds the available context size, try increasing it"),
    said("no", code=400, type="exceed_context_size_error"),
    said("prompt is too long: 210000 tokens > 200000 maximum"),
    said("Prompt is too long", 413),
    said(
        "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000, decrease input length "
        "or `max_tokens` and try again"
    ),
    said("The input (5000 tokens) is longer than the model's context length (4096 tokens)."),
    said("The input token count (1200000) exceeds the maximum number of tokens allowed (1048575)."),
    (400, {"message": "The decoder prompt (length 5000) is longer than the maximum model length of 2048."}),
    (400, {"message": "too many tokens: total number of tokens in the prompt cannot exceed 4081"}),
    (400, {"message": "Input is too long for requested model."}),
    (400, {"detail": "Requested token count exceeds the model's maximum context length of 4096 tokens."}),
    (
        422,
        {
            "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: "
            "2500 `inputs` tokens and 100 `max_new_tokens`"
        },
    ),
    (422, {"error": "Input validation error: `inputs` must have less than 1024 tokens. Given: 2000"}),
]
OTHERS = [
    said("Too many tokens, please wait before trying again.", 429),
    said("Too many tokens, please wait before trying again."),
    said("too many tokens per minute, the prompt is too long for your plan"),
    said("Request too large: too many tokens, the limit of tokens per minute (TPM) is 6000", 413),
    said("The context window of requests is at most 10", 429),
    said("prompt is too long for this worker", 500),
    said("max_tokens is too large: 5000. This model supports at most 4096 completion tokens."),
    said("Unrecognized request argument supplied: context_length"),
    said("Invalid value for 'temperature'"),
    said("maximum context exceeded", 401),
    # The conversation, which a server repeats, is not the server's word.
    (422, {"detail": [{"msg": "field required", "input": "the prompt is too long, said the user"}]}),
]


@pytest.mark.parametrize(("status", "body"), OVERFLOWS)
def test_a_context_overflow_is_known_by_the_words_of_all_servers(status: int, body: dict[str, Any]) -> None:
    assert isinstance(provider_error(failed(status, body)), ContextOverflowError)


@pytest.mark.parametrize(("status", "body"), OTHERS)
def test_what_is_no_context_overflow(status: int, body: dict[str, Any]) -> None:
    assert not isinstance(provider_error(failed(status, body)), ContextOverflowError)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": None, "completion_tokens": 2},
        {"prompt_tokens": -5, "completion_tokens": 1},
        {"prompt_tokens": 5, "completion_tokens": -1},
        {"prompt_tokens": "12", "completion_tokens": 1},
        {"prompt_tokens": True, "completion_tokens": 1},
        {"prompt_tokens": 1.5, "completion_tokens": 1},
        {"prompt_tokens": 10**12, "completion_tokens": 1},
        {"prompt_tokens": 5, "completion_tokens": 10**12},
        {"prompt_tokens": 5000, "completion_tokens": 1},  # of "hello"
    ],
)
def test_wrong_token_counts_are_unknown(usage: Any) -> None:
    with FakeEndpoint(lambda messages: (200, answer(usage=usage))) as endpoint:
        counted = token_usage(openai_model("fake", endpoint.url).generate(ASK))
    assert (counted.input_tokens, counted.output_tokens, counted.uncounted_calls) == (0, 0, 1)


def test_many_tokens_that_can_be_are_believed() -> None:
    """A token a byte, a long template, and reasoning that is not shown."""
    long = [{"role": "user", "content": [{"type": "text", "text": "\N{SNOWMAN}" * 4000}]}]
    usage = {"prompt_tokens": 12_000, "completion_tokens": 60_000}
    with FakeEndpoint(lambda messages: (200, answer(usage=usage))) as endpoint:
        model = openai_model("fake", endpoint.url, max_tokens=100)
        counted = token_usage(model.generate(long))
    assert (counted.input_tokens, counted.output_tokens, counted.uncounted_calls) == (12_000, 60_000, 0)
    assert not model.gate.faults


def test_a_call_may_have_headers_of_its_own() -> None:
    with FakeEndpoint(lambda messages: "hello") as endpoint:
        model = openai_model("fake", endpoint.url, extra_body={"top_k": 5})
        model.generate(ASK)
        assert model.generate(ASK, extra_headers={"x-who": "me"}).content == "hello"
    assert [headers.get("x-who") for headers in endpoint.headers] == [None, "me"]
    assert [body["top_k"] for body in endpoint.requests] == [5, 5]
    assert "extra_body" not in endpoint.requests[0]


@pytest.mark.parametrize("stop", [None, ["Observation:"]])
def test_a_request_is_what_smolagents_would_send(stop: list[str] | None) -> None:
    """Our short cut through its preparation of messages changes nothing."""
    from smolagents import OpenAIModel
    from smolagents.models import ChatMessage, MessageRole

    def turn(role: MessageRole, text: str) -> ChatMessage:
        return ChatMessage(role=role, content=[{"type": "text", "text": text}])

    talk: list[Any] = [
        turn(MessageRole.SYSTEM, "be brief"),
        turn(MessageRole.USER, "hello"),
        turn(MessageRole.USER, "are you there?"),
        turn(MessageRole.TOOL_CALL, "look"),
        turn(MessageRole.ASSISTANT, "yes"),
        turn(MessageRole.TOOL_RESPONSE, "seen"),
        {"role": "user", "content": [{"type": "text", "text": "good"}]},
    ]
    before = [vars(message).copy() for message in talk[:-1]]
    with FakeEndpoint(lambda messages: "hello") as endpoint:
        options: dict[str, Any] = {
            "model_id": "fake",
            "api_base": endpoint.url,
            "api_key": "x",
            "max_tokens": 9,
        }
        OpenAIModel(**options, flatten_messages_as_text=True).generate(talk, stop_sequences=stop)
        model = openai_model(**options)
        for _ in range(2):
            model.generate(talk, stop_sequences=stop)
    theirs, *ours = endpoint.requests
    assert ours == [theirs, theirs]
    theirs, *ours = endpoint.headers
    unlike = {"x-stainless-retry-count", "x-stainless-read-timeout"}
    assert [{**theirs, **sent} for sent in ours] == [theirs, theirs]
    assert theirs.keys() - ours[1].keys() <= unlike
    assert ours[1]["authorization"] == "Bearer x"
    assert [vars(message) for message in talk[:-1]] == before


def test_cached_tokens_are_counted_apart() -> None:
    usage = {"prompt_tokens": 50, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 32}}
    with FakeEndpoint(lambda messages: (200, answer(usage=usage))) as endpoint:
        counted = token_usage(openai_model("fake", endpoint.url).generate(ASK))
    assert (counted.input_tokens, counted.cached_tokens, counted.uncounted_calls) == (50, 32, 0)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-3"}, None),
        ({}, None),
        # A date counts from the server's clock: ours may be years off.
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 -0000", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "today"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert _retry_after(headers) == seconds
