"""The endpoint as clients see it: the official openai client against a real server."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("fastapi")

from agentkd.engine.render import render_prompt  # noqa: E402
from agentkd.engine.torch_engine import TorchEngine  # noqa: E402
from agentkd.errors import ConfigError  # noqa: E402
from agentkd.serve import (  # noqa: E402
    ChatChoice,
    ChatRequest,
    ChatResult,
    ExpertBackend,
    Listener,
    Server,
    StudentBackend,
    create_app,
)

torch.set_num_threads(1)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK: list[Any] = [{"role": "user", "content": "What is two plus two?"}]


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(["What is two plus two? The answer of the task is four."] * 4, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model(vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # the end token is unlikely, so that answers are long enough
    return model


class Echo:
    """Says the last message's content; slow or broken on demand."""

    model_id = "echo"
    label = "echo"

    def __init__(self) -> None:
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.noticed = threading.Event()

    def complete(self, request: ChatRequest, listener: Listener | None = None) -> ChatResult:
        text = request.messages[-1].content
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            if text == "break":
                raise ZeroDivisionError("a bug")
            if text == "meet":
                deadline = time.monotonic() + 20
                while self.most < 64 and time.monotonic() < deadline:
                    time.sleep(0.005)
            if text == "forever":
                assert listener is not None
                while not listener.cancelled():
                    time.sleep(0.005)
                self.noticed.set()
            return ChatResult((ChatChoice(text, "stop"),), 1, 1)
        finally:
            with self.lock:
                self.running -= 1


@pytest.fixture(scope="module")
def student() -> Iterator[StudentBackend]:
    tokenizer = tiny_tokenizer()
    engine = TorchEngine(tiny_model(len(tokenizer)), tokenizer, threads=1)
    backend = StudentBackend(engine, tokenizer, "tiny")
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def echo() -> Echo:
    return Echo()


@pytest.fixture(scope="module")
def server(student: StudentBackend, echo: Echo) -> Iterator[Server]:
    with Server(create_app([student, echo])) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 12, **options})


def test_an_answer_is_the_engines_with_usage_and_ids(client: openai.OpenAI, student: StudentBackend) -> None:
    prompt = render_prompt(student.tokenizer, ASK)
    wanted = student.engine.generate(prompt, max_new_tokens=12)[0]
    answer = ask(client, extra_body={"return_token_ids": True}, logprobs=True, user="me", metadata={"a": "b"})
    choice = answer.choices[0]
    assert choice.message.content == wanted.text
    assert choice.finish_reason == wanted.finish_reason == "length"
    assert (answer.prompt_token_ids, tuple(choice.token_ids)) == (prompt, wanted.token_ids)
    assert [it.logprob for it in choice.logprobs.content] == pytest.approx(wanted.logprobs, abs=1e-4)
    assert [it.token for it in choice.logprobs.content] == [
        student.tokenizer.decode([token]) for token in wanted.token_ids
    ]
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        len(prompt),
        12,
        len(prompt) + 12,
    )


def test_logprobs_and_ids_come_only_when_asked_for(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].logprobs is None
    assert not hasattr(answer, "prompt_token_ids")


def test_n_choices_and_seed(client: openai.OpenAI) -> None:
    first = ask(client, n=5, temperature=1.0, seed=3)
    again = ask(client, n=5, temperature=1.0, seed=3, max_completion_tokens=12, max_tokens=500)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3, 4]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    assert first.usage.completion_tokens == sum(12 for _ in texts)


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=30).choices[0].message.content
    stop = whole[10:14]
    cut = ask(client, max_tokens=30, stop=stop).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.find(stop)], "stop")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stop", [None, "x", ["e", "zz"]])
def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI, n: int, stop: Any) -> None:
    options: dict[str, Any] = {
        "n": n,
        "temperature": 1.0,
        "seed": 4,
        "max_tokens": 60,
        "stop": stop,
        "extra_body": {"return_token_ids": True},
    }
    whole = ask(client, **options)
    texts, reasons, ids, usage, pieces = [""] * n, [""] * n, [None] * n, None, 0
    with ask(client, stream=True, stream_options={"include_usage": True}, **options) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                pieces += bool(choice.delta.content)
                if choice.finish_reason:
                    reasons[choice.index], ids[choice.index] = choice.finish_reason, choice.token_ids
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert ids == [choice.token_ids for choice in whole.choices]
    assert usage == whole.usage
    if stop is None:
        assert pieces > 10 * n, "text comes while it is generated"


def test_the_final_message_is_continued(client: openai.OpenAI, student: StudentBackend) -> None:
    messages = [*ASK, {"role": "assistant", "content": "The answer is"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    answer = ask(client, messages=messages, extra_body=extra)
    assert answer.prompt_token_ids == render_prompt(student.tokenizer, messages, continue_final_message=True)


def test_a_message_that_ends_inside_a_token_is_not_continued(client: openai.OpenAI) -> None:
    messages = [*ASK, {"role": "assistant", "content": "The answer "}]
    with pytest.raises(openai.BadRequestError, match="inside a token"):
        ask(client, messages=messages, extra_body={"continue_final_message": True})


def test_text_parts_and_developer_messages(client: openai.OpenAI) -> None:
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "two?"}]},
    ]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is two?"}]
    assert ask(client, messages=parts).choices[0].message == ask(client, messages=plain).choices[0].message


UNSUPPORTED: list[dict[str, Any]] = [
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"functions": [{"name": "f"}]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
    {"response_format": {"type": "json_object"}},
    {"logit_bias": {"5": 10}},
    {"n": 129},
    {"n": 0},
    {"top_logprobs": 3},
    {"frequency_penalty": 0.5},
    {"temperature": -1},
    {"temperature": "warm"},
    {"top_p": 1.5},
    {"max_tokens": 0},
    {"messages": []},
    {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"extra_body": {"top_k": 5}},
    {"extra_body": {"continue_final_message": True}},
    {"extra_body": {"chat_template": "{{ messages }}"}},
    {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    {"extra_body": {"bad_words": ["four"]}},
    {"extra_body": {"length_penalty": 2.0}},
    {"extra_body": {"allowed_token_ids": [1]}},
    {"extra_body": {"max_token": 3}},
    {"extra_body": {"skip_special_tokens": False}},
    {"extra_body": {"stream_options": {"continuous_usage_stats": True}}},
    {"reasoning_effort": "high"},
    {"messages": [*ASK, {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}, *ASK]},
    {"messages": [{"role": "user", "content": "x", "cache": True}]},
    {
        "messages": [*ASK, {"role": "assistant", "content": "It is"}],
        "extra_body": {"continue_final_message": True, "add_generation_prompt": True},
    },
]


@pytest.mark.parametrize("options", UNSUPPORTED, ids=json.dumps)
def test_what_is_not_supported_is_refused_not_ignored(client: openai.OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert caught.value.type == "invalid_request_error"
    assert str(caught.value.message)


def test_values_that_ask_for_nothing_are_accepted(client: openai.OpenAI) -> None:
    neutral = {"tools": [], "logit_bias": {}, "presence_penalty": 0, "response_format": {"type": "text"}}
    assert ask(client, **neutral, extra_body={"top_k": -1, "seed": None}).choices


def test_an_unknown_field_is_named_and_what_may_be_meant(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Is 'max_tokens' meant") as caught:
        ask(client, extra_body={"max_token": 3})
    assert (caught.value.param, caught.value.code) == ("max_token", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError, match="'tool_calls'") as caught:
        calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
        ask(client, messages=[*ASK, {"role": "assistant", "content": None, "tool_calls": calls}, *ASK])
    assert (caught.value.param, caught.value.code) == ("messages.1.tool_calls", "unsupported_parameter")


def test_what_clients_send_along_changes_nothing(client: openai.OpenAI) -> None:
    plain = ask(client)
    more: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "prompt_cache_key": "x",
        "safety_identifier": "y",
        "verbosity": "medium",
        "extra_body": {"skip_special_tokens": True, "length_penalty": 1.0, "bad_words": []},
    }
    assert ask(client, **more).choices[0].message == plain.choices[0].message
    echoed = [*ASK, plain.choices[0].message.model_dump(), *ASK]  # as many clients keep a conversation
    bare = [*ASK, {"role": "assistant", "content": plain.choices[0].message.content}, *ASK]
    first, second = (ask(client, messages=messages).choices[0].message for messages in (echoed, bare))
    assert first == second
    with ask(client, stream=True, stream_options={"include_obfuscation": False}) as stream:
        assert "".join(it.choices[0].delta.content or "" for it in stream) == plain.choices[0].message.content


def test_a_temperature_next_to_nothing_is_greedy(client: openai.OpenAI) -> None:
    assert ask(client, temperature=1e-300).choices[0].message == ask(client, temperature=0).choices[0].message


STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
)


def test_messages_that_the_template_refuses_are_a_four_hundred(student: StudentBackend) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = STRICT
    backend = StudentBackend(student.engine, tokenizer, "strict")
    with (
        Server(create_app([backend])) as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=30) as client,
    ):
        assert ask(client, model="strict").choices
        with pytest.raises(openai.BadRequestError, match="roles must alternate") as caught:
            ask(client, model="strict", messages=[*ASK, *ASK])
        assert caught.value.param == "messages"
        tokenizer.chat_template = None
        with pytest.raises(openai.InternalServerError, match="no chat template"):
            ask(client, model="strict", messages=[{"role": "user", "content": "other"}])


def test_a_conversation_that_is_too_long(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, messages=[{"role": "user", "content": "two " * 2000}], stream=stream)
        assert caught.value.code == "context_length_exceeded"


def test_an_unknown_model_and_route(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="gpt-9")
    assert caught.value.code == "model_not_found"
    answer = httpx.get(f"{server.url}/nothing")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000])
def test_a_body_that_is_no_request(server: Server, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_models_and_health(client: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "echo"]
    assert client.models.retrieve("tiny").owned_by == "agentkd"
    assert httpx.get(server.url.removesuffix("/v1") + "/health").json() == {"status": "ok"}


def test_a_bug_in_a_backend_is_a_500_and_the_server_goes_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="a bug"):
        ask(client, model="echo", messages=[{"role": "user", "content": "break"}])
    assert ask(client, model="echo").choices[0].message.content == ASK[0]["content"]


def test_sixty_four_requests_run_at_once_and_none_is_mixed_up(client: openai.OpenAI, echo: Echo) -> None:
    def call(number: int) -> tuple[str, Any]:
        text = "meet" if number % 2 else f"number {number}"
        return text, ask(client, model="echo", messages=[{"role": "user", "content": text}])

    with ThreadPoolExecutor(128) as pool:
        for text, answer in pool.map(call, range(128)):
            assert answer.choices[0].message.content == text
    assert echo.most >= 64


def test_concurrent_students_answers_are_their_own(client: openai.OpenAI) -> None:
    prompts = [f"What is {'two ' * (i % 9)}plus {i}?" for i in range(64)]

    def call(text: str) -> str:
        return str(ask(client, messages=[{"role": "user", "content": text}]).choices[0].message.content)

    with ThreadPoolExecutor(64) as pool:
        crowded = list(pool.map(call, prompts))
    assert crowded == [call(text) for text in prompts]
    assert len(set(crowded)) > 10


def test_a_client_that_hangs_up_ends_its_work(server: Server, echo: Echo) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "forever"}]}
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{server.url}/chat/completions", json=body, timeout=0.3)
    assert echo.noticed.wait(10)


def test_a_client_that_hangs_up_frees_the_engine(server: Server, student: StudentBackend) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 900, "n": 128, "temperature": 1.0}
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{server.url}/chat/completions", json=body, timeout=0.3)
    deadline = time.monotonic() + 10
    while any(lane.batch for lane in student.engine._lanes) and time.monotonic() < deadline:  # type: ignore[attr-defined]
        time.sleep(0.01)
    assert not any(lane.batch for lane in student.engine._lanes)  # type: ignore[attr-defined]


def test_stopping_with_a_request_under_way_does_not_hang(capfd: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    with ThreadPoolExecutor(1) as pool:
        with Server(create_app([echo])) as server:
            body = {"model": "echo", "messages": [{"role": "user", "content": "forever"}]}
            running = pool.submit(httpx.post, f"{server.url}/chat/completions", json=body, timeout=30)
            while not echo.running:
                time.sleep(0.005)
            started = time.monotonic()
        assert time.monotonic() - started < 6
        assert (
            isinstance(running.exception(timeout=10), httpx.HTTPError) or running.result().status_code >= 500
        )
    assert echo.noticed.wait(5)
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)
    assert capfd.readouterr().out == "", "standard output belongs to the caller"


def test_a_port_in_use(server: Server) -> None:
    with pytest.raises(ConfigError, match="listen"):
        Server(create_app([]), port=server.port)


class Script:
    """An expert with fixed words."""

    def complete(
        self,
        messages: list[dict[str, str]],
        *,
        n: int = 1,
        temperature: float = 0.0,
        seed: int | None = None,
        continue_final_message: bool = False,
    ) -> list[str]:
        if continue_final_message:
            return [" and so on"] * n
        return [
            f"Thought: {messages[-1]['content']} at {temperature}, choice {i} of {seed}." for i in range(n)
        ]


def test_the_expert_behind_the_same_contract() -> None:
    with (
        Server(create_app([ExpertBackend(Script())])) as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        label = client.models.list().data[0].owned_by
        assert label == "offline expert (programmatic)"
        messages: list[Any] = [{"role": "user", "content": "Go"}]

        def call(**options: Any) -> Any:
            return client.chat.completions.create(model="offline-expert", messages=messages, **options)

        answer = call(n=2, temperature=0.7, seed=5)
        assert [it.message.content for it in answer.choices] == [
            "Thought: Go at 0.7, choice 0 of 5.",
            "Thought: Go at 0.7, choice 1 of 5.",
        ]
        assert answer.usage.completion_tokens > 20
        assert call(stop=[" at"]).choices[0].message.content == "Thought: Go"
        short = call(max_tokens=3)
        assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
        assert "".join(it.choices[0].delta.content or "" for it in call(stream=True)).startswith(
            "Thought: Go"
        )
        plain = call(logprobs=True, extra_body={"return_token_ids": True})
        assert (plain.choices[0].logprobs, plain.choices[0].token_ids, plain.prompt_token_ids) == (None,) * 3
        messages.append({"role": "assistant", "content": "Thought: Go"})
        closed = call(extra_body={"add_generation_prompt": False})
        open_turn = {"add_generation_prompt": False, "continue_final_message": True}
        continued = call(extra_body=open_turn)
        assert continued.choices[0].message.content == " and so on"
        assert continued.usage.prompt_tokens == closed.usage.prompt_tokens - 1


def test_a_student_folder_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    from agentkd.serve import serve_student

    with pytest.raises(ConfigError):
        serve_student(tmp_path / "none")
