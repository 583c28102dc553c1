"""What clients of the endpoint rely on, over each engine: the official client, smolagents, curl.

"standin" is a vLLM server's command line and wire format over the embedded engine; "vllm" is vLLM
itself, of the interpreter that AGENTKD_VLLM_PYTHON names (``make test-vllm``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")

from agentkd.serve import ServeConfig, Server, create_app, open_students
from agentkd.trajectory import Trajectory
from tests.vllm_standin import install

VLLM = os.environ.get("AGENTKD_VLLM_PYTHON", "")
PRODUCT: list[Any] = [{"role": "user", "content": "What is 6 times 7?"}]
GO_ON: list[Any] = [{"role": "user", "content": "Go on."}]
MODELS = ["taught", "taught-agent"]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(
    scope="module",
    params=[
        "embedded",
        "standin",
        pytest.param(
            "vllm", marks=[pytest.mark.vllm, pytest.mark.skipif(not VLLM, reason="set AGENTKD_VLLM_PYTHON")]
        ),
    ],
)
def url(request: Any, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = ServeConfig(engine="embedded", threads=1, timeout=30)
    if request.param != "embedded":
        python = VLLM if request.param == "vllm" else str(install(tmp_path_factory.mktemp("python")))
        quick = ("--enforce-eager",) if request.param == "vllm" else ()  # nothing is compiled
        config = config.model_copy(update={"engine": "vllm", "vllm_python": python, "vllm_args": quick})
    with open_students([taught], config) as backends, Server(create_app(backends)) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client: openai.OpenAI, model: str, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": model, "messages": PRODUCT, **options})


def trained_messages(taught: Path) -> list[Any]:
    """As the student was trained: with its system prompt."""
    record = json.loads((taught / "student.json").read_text())
    return [{"role": "system", "content": record["system_prompt"]}, *PRODUCT]


def test_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == MODELS


def test_the_bare_student_says_what_it_learnt(client: openai.OpenAI, taught: Path) -> None:
    extra = {"return_token_ids": True}
    answer = ask(client, "taught", messages=trained_messages(taught), logprobs=True, extra_body=extra)
    choice = answer.choices[0]
    assert choice.message.content == "Thought: step 1\n```python\nprint(6 * 7)\n```"
    assert choice.finish_reason == "stop"
    replay = json.loads((taught / "parity.json").read_text())["replays"]
    (known,) = [it for it in replay if it["where"] == "What is 6 times 7?#0, step 1"]
    assert answer.prompt_token_ids == known["prompt_ids"]
    assert choice.token_ids == known["target_ids"]
    assert len(choice.logprobs.content) == len(choice.token_ids) == answer.usage.completion_tokens
    assert all(it.logprob <= 0 for it in choice.logprobs.content)


def test_n_and_seed(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.5, "max_tokens": 12}
    ask(client, "taught", **options)  # a prompt from the cache is rounded otherwise than a fresh one
    first, again = (ask(client, "taught", seed=5, **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    greedy = ask(client, "taught", n=2, temperature=0, max_tokens=6)
    assert greedy.choices[0].message.content == greedy.choices[1].message.content


def test_stop(client: openai.OpenAI, taught: Path) -> None:
    answer = ask(client, "taught", messages=trained_messages(taught), stop="```python")
    assert answer.choices[0].message.content == "Thought: step 1\n"
    assert answer.choices[0].finish_reason == "stop"
    assert ask(client, "taught-agent", stop=["2"]).choices[0].message.content == "4"


def test_a_begun_message_is_continued(client: openai.OpenAI, taught: Path) -> None:
    messages = [*trained_messages(taught), {"role": "assistant", "content": "Thought: step 1\n```python"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    answer = ask(client, "taught", messages=messages, extra_body=extra)
    assert answer.choices[0].message.content == "\nprint(6 * 7)\n```"


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, model: str) -> None:
    whole = ask(client, model, max_tokens=100)
    content, reasoning, reason, usage = "", "", None, None
    with ask(client, model, max_tokens=100, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                assert choice.delta.tool_calls is None
                content += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                reason = choice.finish_reason or reason
    message = whole.choices[0].message
    assert content == message.content
    assert reasoning == (getattr(message, "reasoning_content", None) or "")
    assert (reason, usage) == (whole.choices[0].finish_reason, whole.usage)


def test_the_agent_answers_and_says_how(client: openai.OpenAI) -> None:
    answer = ask(client, "taught-agent", extra_body={"agentkd": {"return_trajectory": True}})
    message = answer.choices[0].message
    assert (message.content, message.tool_calls, answer.choices[0].finish_reason) == ("42", None, "stop")
    assert "print(6 * 7)\n```\nObservation:\n42" in message.reasoning_content
    record = Trajectory.model_validate(answer.agentkd["trajectory"])
    assert [step.code for step in record.steps] == ["print(6 * 7)", "final_answer(42)"]
    assert record.steps[0].prompt_token_ids
    assert answer.usage.prompt_tokens == sum(len(step.prompt_token_ids or ()) for step in record.steps)
    assert answer.usage.completion_tokens == sum(len(step.output_token_ids or ()) for step in record.steps)


def test_a_stream_carries_ids_and_logprobs(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"logprobs": True, "max_tokens": 12, "extra_body": {"return_token_ids": True}}
    ask(client, "taught", **options)  # a prompt from the cache is rounded otherwise than a fresh one
    whole = ask(client, "taught", **options)
    with ask(client, "taught", stream=True, **options) as stream:
        chunks = [chunk for chunk in stream if chunk.choices and chunk.choices[0].finish_reason]
    (last,) = chunks
    assert last.choices[0].token_ids == whole.choices[0].token_ids
    assert last.prompt_token_ids == whole.prompt_token_ids
    streamed, known = (it.logprobs.content for it in (last.choices[0], whole.choices[0]))
    assert [it.token for it in streamed] == [it.token for it in known]
    assert [it.logprob for it in streamed] == pytest.approx([it.logprob for it in known], abs=0.02)


def test_a_stream_carries_the_trajectory(client: openai.OpenAI) -> None:
    extra = {"agentkd": {"return_trajectory": True}}
    with ask(client, "taught-agent", stream=True, extra_body=extra) as stream:
        found = [chunk.agentkd for chunk in stream if getattr(chunk, "agentkd", None)]
    (facts,) = found
    record = Trajectory.model_validate(facts["trajectory"])
    assert (record.answer, record.stop_reason.value) == ("42", "final_answer")
    assert [step.code for step in record.steps] == ["print(6 * 7)", "final_answer(42)"]
    assert all(step.output_token_ids and step.logprobs for step in record.steps)


def test_the_agents_steps_come_as_events(client: openai.OpenAI) -> None:
    with ask(client, "taught-agent", stream=True) as stream:
        events = [chunk.agentkd_step for chunk in stream if hasattr(chunk, "agentkd_step")]
    assert [(it["number"], it["state"]) for it in events] == [
        (1, "acting"),
        (1, "done"),
        (2, "acting"),
        (2, "done"),
    ]
    assert events[0]["code"] == events[1]["code"] == "print(6 * 7)"
    assert (events[0]["observation"], events[1]["observation"]) == (None, "Observation:\n42")
    assert events[3]["is_final"]


def test_candidates_and_votes(client: openai.OpenAI) -> None:
    extra = {"agentkd": {"actions": 4, "seed": 1}}
    with ask(client, "taught-agent", stream=True, extra_body=extra) as stream:
        events = [chunk.agentkd_step for chunk in stream if hasattr(chunk, "agentkd_step")]
    assert events[0]["candidates"]  # one, where the model is sure of it
    chosen = [it for it in events[0]["candidates"] if it["chosen"]]
    assert [(it["code"], it["outcome"]) for it in chosen] == [("print(6 * 7)", "42")]


def test_a_router_by_request(client: openai.OpenAI) -> None:
    extra = {"agentkd": {"router": "implicit", "return_trajectory": True}}
    answer = ask(client, "taught-agent", extra_body=extra)
    assert answer.choices[0].message.content == "42"
    assert answer.agentkd["trajectory"]["steps"][0]["route"]["router"] == "implicit"


def test_the_agents_limits(client: openai.OpenAI) -> None:
    def call(**options: Any) -> tuple[str, str, str]:
        answer = ask(client, "taught-agent", messages=GO_ON, **options)
        return (
            answer.choices[0].message.content,
            answer.choices[0].finish_reason,
            answer.agentkd["stop_reason"],
        )

    assert call(extra_body={"agentkd": {"max_steps": 2}}) == ("", "length", "max_steps")
    assert call(max_tokens=40, extra_body={"agentkd": {"max_steps": 9}}) == ("", "length", "output_limit")


def test_earlier_turns_are_context(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        *PRODUCT,
    ]
    extra = {"agentkd": {"return_trajectory": True, "max_steps": 1}}
    record = ask(client, "taught-agent", messages=messages, extra_body=extra).agentkd["trajectory"]
    assert record["task"]["question"] == (
        "What was said before:\nsystem: Be brief.\nuser: Hi\nassistant: Hello.\n\n"
        "The task:\nWhat is 6 times 7?"
    )


REFUSED: list[tuple[str, dict[str, Any]]] = [
    *[
        (model, options)
        for model in MODELS
        for options in (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
            {"response_format": {"type": "json_object"}},
            {"messages": []},
            {"temperature": "warm"},
            {"max_tokens": 0},
            {"extra_body": {"agentkd": {"max_step": 3}}},
            {"extra_body": {"agentkd": {"max_steps": 0}}},
            {"extra_body": {"agentkd": 5}},
        )
    ],
    ("taught-agent", {"extra_body": {"agentkd": {"router": "weather"}}}),
    ("taught", {"extra_body": {"agentkd": {"max_steps": 3}}}),
    ("taught-agent", {"n": 2}),
    ("taught-agent", {"logprobs": True}),
    ("taught-agent", {"extra_body": {"return_token_ids": True}}),
    ("taught-agent", {"messages": [*PRODUCT, {"role": "assistant", "content": "It is"}]}),
    ("taught-agent", {"messages": [{"role": "user", "content": " "}]}),
    ("taught-agent", {"extra_body": {"agentkd": {"scorer": "none", "answer": "1"}}}),
]


@pytest.mark.parametrize(("model", "options"), REFUSED, ids=json.dumps)
def test_what_is_refused(client: openai.OpenAI, model: str, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, model, **options)
    assert caught.value.type == "invalid_request_error"
    assert str(caught.value.message)


@pytest.mark.parametrize("model", MODELS)
def test_a_conversation_that_is_too_long(client: openai.OpenAI, model: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, model, messages=[{"role": "user", "content": "two " * 4000}], stream=stream)
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("model", MODELS)
def test_megabytes_are_refused_at_once(client: openai.OpenAI, model: str) -> None:
    began = time.process_time()
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, model, messages=[{"role": "user", "content": "two " * 750_000}])
    assert caught.value.status_code in (400, 413)
    assert time.process_time() - began < 1.5, "nothing was tokenised"


def test_what_the_prefix_cache_found_is_counted(client: openai.OpenAI, url: str) -> None:
    def hits() -> float:
        page = httpx.get(url.removesuffix("/v1") + "/metrics", timeout=30).text.splitlines()
        counts = [line for line in page if line.startswith("agentkd_prefix_cache_hit_tokens_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in counts)

    messages = [{"role": "user", "content": "two " * 500}]
    ask(client, "taught", messages=messages, max_tokens=1)
    before, deadline = hits(), time.monotonic() + 20
    ask(client, "taught", messages=messages, max_tokens=1)
    while hits() < before + 100 and time.monotonic() < deadline:
        time.sleep(0.1)  # vLLM counts a moment later
    assert hits() >= before + 100


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, "other-agent")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("model", MODELS)
def test_smolagents_can_use_it(url: str, model: str, taught: Path) -> None:
    from smolagents import OpenAIModel

    messages = trained_messages(taught) if model == "taught" else PRODUCT
    answer = OpenAIModel(model_id=model, api_base=url, api_key="none").generate(messages)
    assert answer.content == (
        "42" if model == "taught-agent" else "Thought: step 1\n```python\nprint(6 * 7)\n```"
    )
    assert not answer.tool_calls


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(url: str) -> None:
    body = json.dumps({"model": "taught-agent", "messages": PRODUCT})
    done = subprocess.run(
        ["curl", "-s", "-m", "60", f"{url}/chat/completions", "-d", body],
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "42"
