"""The embedded engine against transformers' own forward pass, on a tiny random model at fp32."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from agentkd.engine import Cancellation, Completion
from agentkd.errors import AgentkdError, ConfigError, ContextOverflowError, ProviderError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from agentkd.engine.torch_engine import TorchEngine  # noqa: E402

VOCABULARY = 512
END = 0
torch.set_num_threads(1)


class Letters:
    """A tokenizer of one character a token, so that text and tokens are easy to compare."""

    eos_token_id = END

    def decode(self, ids: Any, **options: Any) -> str:
        return "".join(chr(0x100 + int(token)) for token in ids if int(token) != END)


def tiny_model(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=END,
        bos_token_id=1,
        pad_token_id=2,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(it) for it in torch.randint(3, VOCABULARY, (length,), generator=generator)]


def reference(model: Any, ids: list[int], new: int) -> list[int]:
    """Greedy continuation, each token from a whole forward pass without any cache."""
    out = list(ids)
    with torch.inference_mode():
        for _ in range(new):
            out.append(int(model(input_ids=torch.tensor([out])).logits[0, -1].argmax()))
            if out[-1] == END:
                break
    return out[len(ids) :]


def together(engine: TorchEngine, prompts: list[list[int]], **options: Any) -> list[Completion]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return [it[0] for it in pool.map(lambda ids: engine.generate(ids, **options), prompts)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def engine() -> Iterator[TorchEngine]:
    with TorchEngine(tiny_model(), Letters(), max_batch=8, threads=2) as engine:
        yield engine


@pytest.mark.parametrize(("threads", "cache_bytes"), [(1, 0), (2, 1 << 30)])
def test_requests_of_different_length_sent_at_once_get_what_they_get_alone(
    model: Any, threads: int, cache_bytes: int
) -> None:
    prompts = [prompt(length, length) for length in (1, 3, 40, 7, 150, 64, 65, 5, 90, 31, 2, 12)]
    expected = [reference(model, ids, 40) for ids in prompts]
    options = {"max_batch": 6, "threads": threads, "cache_bytes": cache_bytes}
    with TorchEngine(tiny_model(), Letters(), **options) as engine:
        for _ in range(2):  # the second time every prompt begins like a remembered sequence
            found = together(engine, prompts, max_new_tokens=40)
            assert [list(it.token_ids) for it in found] == expected


def test_a_conversation_that_goes_on_is_answered_as_if_it_were_new(model: Any, engine: TorchEngine) -> None:
    ids = prompt(30, 1)
    for turn in range(4):
        answer = engine.generate(ids, max_new_tokens=20)[0]
        assert list(answer.token_ids) == reference(model, ids, 20)
        ids = ids + list(answer.token_ids) + prompt(9, 100 + turn)
    assert len(engine.prefix_cache) == 1, "each turn replaces the entry that it extends"


def test_a_prompt_that_was_a_prefix_of_a_remembered_one(model: Any, engine: TorchEngine) -> None:
    ids = prompt(50, 2)
    engine.generate(ids, max_new_tokens=5)
    assert list(engine.generate(ids[:20], max_new_tokens=8)[0].token_ids) == reference(model, ids[:20], 8)


def test_logprobs_are_those_of_a_full_forward_pass(model: Any, engine: TorchEngine) -> None:
    ids = prompt(20, 3)
    for done in engine.generate(ids, n=3, max_new_tokens=15, temperature=0.8, seed=5):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids + list(done.token_ids)])).logits[0, len(ids) - 1 : -1]
        wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        assert done.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


def test_a_seed_gives_the_same_samples_whoever_else_is_in_the_batch(engine: TorchEngine) -> None:
    ids = prompt(20, 4)
    options = {"n": 4, "max_new_tokens": 12, "temperature": 1.0, "seed": 11}
    alone = engine.generate(ids, **options)
    assert len({it.token_ids for it in alone}) > 1, "the samples of one request differ"
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(engine.generate, prompt(9 + i, i), n=2, temperature=1.0) for i in range(5)]
        crowded = pool.submit(engine.generate, ids, **options).result()
        for other in others:
            other.result()
    assert [it.token_ids for it in crowded] == [it.token_ids for it in alone]
    assert [it.token_ids for it in engine.generate(ids, **{**options, "seed": 12})] != [
        it.token_ids for it in alone
    ]


def test_more_samples_than_rows(engine: TorchEngine) -> None:
    done = engine.generate(prompt(10, 5), n=21, max_new_tokens=3, temperature=1.0)
    assert len(done) == 21


def test_sampling_follows_the_distribution(model: Any, engine: TorchEngine) -> None:
    ids = prompt(10, 6)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    likely = torch.softmax(logits, -1)
    best = int(likely.argmax())
    drawn = engine.generate(ids, n=600, max_new_tokens=1, temperature=1.0, seed=1)
    share = sum(it.token_ids[0] == best for it in drawn) / 600
    spread = (float(likely[best]) * (1 - float(likely[best])) / 600) ** 0.5
    assert abs(share - float(likely[best])) < 4 * spread
    narrow = engine.generate(ids, n=50, max_new_tokens=1, temperature=1.0, top_p=0.0, seed=1)
    assert {it.token_ids[0] for it in narrow} == {best}


def test_top_p_keeps_the_smallest_set(model: Any, engine: TorchEngine) -> None:
    ids = prompt(10, 7)
    with torch.inference_mode():
        likely = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], -1)
    values, order = likely.sort(descending=True)
    size = int((values.cumsum(0) < 0.5).sum()) + 1
    allowed = set(order[:size].tolist())
    drawn = {
        it.token_ids[0]
        for it in engine.generate(ids, n=300, max_new_tokens=1, temperature=1.0, top_p=0.5, seed=2)
    }
    assert drawn <= allowed
    assert len(drawn) > 1


def test_a_stop_string_ends_the_text_before_it(engine: TorchEngine) -> None:
    ids = prompt(12, 8)
    whole = engine.generate(ids, max_new_tokens=20)[0]
    assert whole.finish_reason == "length"
    stop = whole.text[6:8]  # two tokens
    at = whole.text.find(stop)
    cut = engine.generate(ids, max_new_tokens=20, stop=["never", stop])[0]
    assert (cut.text, cut.finish_reason) == (whole.text[:at], "stop")
    assert cut.token_ids == whole.token_ids[: at + 2]


def test_the_end_token_ends_the_text_and_is_reported() -> None:
    model = tiny_model()
    ids = prompt(10, 9)
    third = reference(model, ids, 3)[2]
    model.generation_config.eos_token_id = [END, third]
    with TorchEngine(model, Letters(), threads=1) as engine:
        done = engine.generate(ids, max_new_tokens=10)[0]
    assert done.finish_reason == "stop"
    assert done.token_ids[-1] == third
    assert len(done.text) == len(done.token_ids) - 1 == len(done.logprobs) - 1


def test_the_context_limits_prompt_and_answer(engine: TorchEngine) -> None:
    done = engine.generate(prompt(500, 10), max_new_tokens=100)[0]
    assert (len(done.token_ids), done.finish_reason) == (12, "length")
    with pytest.raises(ContextOverflowError, match="512"):
        engine.generate(prompt(512, 10))


@pytest.mark.parametrize(
    "bad",
    [{"prompt_ids": []}, {"prompt_ids": [VOCABULARY]}, {"prompt_ids": [3], "n": 0}, {"prompt_ids": [-1]}],
)
def test_bad_arguments_are_refused(engine: TorchEngine, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        engine.generate(**bad)


class Broken(Letters):
    """Fails on one text, as a bug in a tokenizer would."""

    def decode(self, ids: Any, **options: Any) -> str:
        if len(ids) == 7:
            raise ValueError("seven")
        return super().decode(ids, **options)


def test_an_error_in_one_request_leaves_the_others_alone(model: Any) -> None:
    ids = prompt(10, 11)
    with TorchEngine(tiny_model(), Broken(), threads=1) as engine, ThreadPoolExecutor(4) as pool:
        good = [pool.submit(engine.generate, prompt(10, seed), max_new_tokens=30) for seed in (12, 13)]
        bad = pool.submit(engine.generate, ids, max_new_tokens=7)
        with pytest.raises(AgentkdError, match="seven"):
            bad.result()
        for seed, future in zip((12, 13), good, strict=True):
            assert list(future.result()[0].token_ids) == reference(model, prompt(10, seed), 30)
        assert list(engine.generate(ids, max_new_tokens=5)[0].token_ids) == reference(model, ids, 5)


def test_close_ends_threads_and_running_calls() -> None:
    before = set(threading.enumerate())
    engine = TorchEngine(tiny_model(), Letters(), threads=2)
    lanes = set(threading.enumerate()) - before
    assert len(lanes) == 2
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.generate, prompt(10, 14), n=32, max_new_tokens=500, temperature=1.0)
        while not any(lane.batch for lane in engine._lanes):
            threading.Event().wait(0.005)
        engine.close()
        with pytest.raises(ProviderError, match="closed"):
            running.result(timeout=30)
    assert not any(lane.is_alive() for lane in lanes)
    with pytest.raises(ProviderError, match="closed"):
        engine.generate([3])


def test_a_call_is_given_up_whether_it_has_begun_or_waits(model: Any) -> None:
    with TorchEngine(tiny_model(), Letters(), max_batch=1, threads=1) as engine:
        running, waiting = Cancellation(), Cancellation()
        (wanted,) = engine.generate(prompt(9, 3), max_new_tokens=5)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(
                engine.generate, prompt(9, 1), max_new_tokens=500, stop=("never",), cancellation=running
            )
            while not any(lane.batch for lane in engine._lanes):
                time.sleep(0.001)
            second = pool.submit(engine.generate, prompt(9, 2), max_new_tokens=5, cancellation=waiting)
            time.sleep(0.01)
            waiting.cancel()
            with pytest.raises(ProviderError, match="cancelled"):
                second.result(5)
            running.cancel()
            if first.exception(5) is not None:  # it may have been quicker
                assert isinstance(first.exception(), ProviderError)
        (again,) = engine.generate(prompt(9, 3), max_new_tokens=5, cancellation=Cancellation())
        assert again.token_ids == wanted.token_ids
        with pytest.raises(ProviderError, match="cancelled"):
            engine.generate(prompt(9, 3), cancellation=running)


def test_the_callers_number_of_torch_threads_stays() -> None:
    before = torch.get_num_threads()
    with TorchEngine(tiny_model(), Letters(), threads=1):
        assert torch.get_num_threads() == before
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [before]


def test_sliding_window_layers() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
        initializer_range=0.3,
        eos_token_id=END,
    )
    model = transformers.MistralForCausalLM(config).eval()
    prompts = [prompt(length, length) for length in (5, 60, 20)]
    expected = [reference(model, ids, 20) for ids in prompts]
    with TorchEngine(model, Letters(), threads=1) as engine:
        assert [list(it.token_ids) for it in together(engine, prompts, max_new_tokens=20)] == expected


def test_bf16_with_packed_weights_agrees_with_the_plain_model() -> None:
    model = tiny_model().to(torch.bfloat16)
    ids = prompt(40, 15)
    with torch.inference_mode():
        logits = tiny_model().to(torch.bfloat16)(input_ids=torch.tensor([ids])).logits[0, -1].float()
    with TorchEngine(model, Letters(), threads=1) as engine:
        done = engine.generate(ids, max_new_tokens=1)[0]
    assert float(logits[done.token_ids[0]]) >= float(logits.max()) - 0.1
    assert done.logprobs[0] == pytest.approx(float(torch.log_softmax(logits, -1)[done.token_ids[0]]), abs=0.1)
