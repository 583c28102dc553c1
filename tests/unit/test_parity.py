"""Each way in which training and serving can differ is planted, caught, and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example, ExampleSet, build_examples
from agentkd.distill.parity import Fault, find_faults, refuse_faults
from agentkd.distill.served import Answer, check_served, make_replays, require_parity
from agentkd.distill.spans import SpanWeights
from agentkd.engine.probe import Known, compare_answers, known_answers
from agentkd.engine.render import render_prompt
from agentkd.errors import TrainingError
from agentkd.trajectory import FirstThought, Step, Trajectory
from tests.unit.test_distill import learnt, step, trajectory
from tests.unit.test_render import CHATML, REWRITING, small_tokenizer

CONFIG = DistillConfig(base="toy")
OTHER = CHATML.replace("}}\n{{", "}}:\n{{").replace("assistant\n", "assistant:\n")
"""Writes a colon behind the role."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


def told(number: int, code: str, observation: str | None = None, failed: bool = False) -> Step:
    """A step whose record holds thought and code apart, as those of rollouts do."""
    made = step(number, code, observation, failed)
    return made.model_copy(update={"thought": f"step {number}", "code": code})


ITEM = trajectory(
    "a",
    told(1, "oops", "Observation:\nNameError", failed=True),
    told(2, "print(7)", "Observation:\n7"),
    told(3, "final_answer(7)"),
)


def faults(
    made: ExampleSet, tokenizer: Any, item: Trajectory = ITEM, prompt: str | None = None
) -> list[Fault]:
    found = find_faults(
        made.examples,
        {item.id: item},
        prompt or made.system_prompt,
        tokenizer,
        frozenset({tokenizer.eos_token_id}),
    )
    return [it.fault for it in found]


def changed(made: ExampleSet, change: Callable[[Example], Example]) -> ExampleSet:
    return dataclasses.replace(made, examples=tuple(change(it) for it in made.examples))


@pytest.mark.parametrize("rendering", ["whole", "step"])
@pytest.mark.parametrize("weights", [SpanWeights(), SpanWeights(thought=0.0, action=0.5)])
def test_what_is_right_has_no_fault(tokenizer: Any, rendering: Any, weights: SpanWeights) -> None:
    config = CONFIG.model_copy(update={"rendering": rendering, "weights": weights})
    assert faults(build_examples([ITEM], tokenizer, config), tokenizer) == []


def masked(change: Callable[[Example, Any], list[bool]]) -> Callable[[ExampleSet, Any], ExampleSet]:
    return lambda made, tokenizer: changed(
        made, lambda it: dataclasses.replace(it, mask=change(it, tokenizer))
    )


def without_stop(example: Example, tokenizer: Any) -> list[bool]:
    pairs = zip(example.ids, example.mask, strict=True)
    return [target and token != tokenizer.eos_token_id for token, target in pairs]


def with_observation(example: Example, tokenizer: Any) -> list[bool]:
    """Everything behind the first learnt token, as a mask by "all after the question" would have it."""
    first = example.mask.index(True)
    return [place >= first for place in range(len(example.ids))]


def cut(example: Example) -> Example:
    end = len(example.ids) - 8
    return Example(example.id, example.ids[:end], example.mask[:end])


def retold(change: Callable[[Step], Step]) -> Callable[[ExampleSet, Any], ExampleSet]:
    """The examples of a trajectory whose learnt steps were changed on the way."""

    def plant(made: ExampleSet, tokenizer: Any) -> ExampleSet:
        steps = tuple(it if it.failure else change(it) for it in ITEM.steps)
        return build_examples([ITEM.model_copy(update={"steps": steps})], tokenizer, CONFIG)

    return plant


def output(change: Callable[[str], str]) -> Callable[[ExampleSet, Any], ExampleSet]:
    return retold(lambda it: it.model_copy(update={"output": change(it.output)}))


PLANTED = {
    Fault.WRONG_TEMPLATE: lambda made, tokenizer: build_examples([ITEM], small_tokenizer(OTHER), CONFIG),
    Fault.MISSING_STOP: masked(without_stop),
    Fault.OFF_BY_ONE: masked(lambda it, _: [False, *it.mask[:-1]]),
    Fault.EXTRA_SPACE: output(lambda text: " " + text),
    Fault.SYSTEM_PROMPT: lambda made, tokenizer: build_examples(
        [ITEM], tokenizer, CONFIG.model_copy(update={"system_prompt": "Be somebody else."})
    ),
    Fault.TOOL_CALL_ECHO: output(lambda text: text + "\nCalling tools:\n[{'id': 'call_1'}]"),
    Fault.TRUNCATED_TARGET: lambda made, tokenizer: changed(made, cut),
    Fault.OBSERVATION: masked(with_observation),
    Fault.DROPPED_THOUGHT: output(lambda text: text[text.index("```") :]),
    Fault.EMPTY_MASK: masked(lambda it, _: [False] * len(it.ids)),
    Fault.PROMPT: masked(lambda it, _: [True, *it.mask[1:]]),
    Fault.UNLEARNT: masked(
        lambda it, _: [target and place != it.mask.index(True) + 3 for place, target in enumerate(it.mask)]
    ),
    Fault.OTHER_TEXT: output(lambda text: text.replace("7", "8")),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_caught_and_named(tokenizer: Any, fault: Fault) -> None:
    made = build_examples([ITEM], tokenizer, CONFIG)
    planted = PLANTED[fault](made, tokenizer)
    found = find_faults(
        planted.examples, {ITEM.id: ITEM}, made.system_prompt, tokenizer, frozenset({tokenizer.eos_token_id})
    )
    assert [it.fault for it in found] == [fault], found
    with pytest.raises(TrainingError, match=str(fault)):
        refuse_faults(found)


@pytest.mark.parametrize("shift", [-1, 2])
def test_masks_beside_the_turn_are_told_from_other_masks(tokenizer: Any, shift: int) -> None:
    made = build_examples([ITEM], tokenizer, CONFIG)
    moved = changed(
        made,
        lambda it: dataclasses.replace(
            it, mask=[it.mask[(place - shift) % len(it.mask)] for place in range(len(it.mask))]
        ),
    )
    (fault,) = faults(moved, tokenizer)
    assert (fault is Fault.OFF_BY_ONE) == (shift == -1)


def test_a_failed_step_in_the_loss_is_caught_unless_it_was_asked_for(tokenizer: Any) -> None:
    config = CONFIG.model_copy(update={"failed_steps": "target"})
    made = build_examples([ITEM], tokenizer, config)
    assert faults(made, tokenizer) == [Fault.CONTEXT_STEP]
    stops = frozenset({tokenizer.eos_token_id})
    assert not find_faults(
        made.examples, {ITEM.id: ITEM}, made.system_prompt, tokenizer, stops, failed_steps="target"
    )


def test_a_stop_token_at_which_the_server_would_not_stop_is_missing(tokenizer: Any) -> None:
    made = build_examples([ITEM], tokenizer, CONFIG)
    (found,) = find_faults(made.examples, {ITEM.id: ITEM}, made.system_prompt, tokenizer, frozenset({0}))
    assert found.fault is Fault.MISSING_STOP


def test_a_cut_behind_a_whole_step_is_counted_and_right(tokenizer: Any) -> None:
    whole = build_examples([ITEM], tokenizer, CONFIG).examples[0]
    config = CONFIG.model_copy(update={"overlong": "cut", "max_length": len(whole.ids) - 8})
    made = build_examples([ITEM], tokenizer, config)
    assert made.dropped == {"cut to fit": 1}
    assert learnt(made.examples[0], tokenizer) == ITEM.steps[1].output + "<|im_end|>"
    assert faults(made, tokenizer) == []


def test_a_rewriting_template_is_learnt_step_by_step() -> None:
    tokenizer = small_tokenizer(REWRITING)
    with pytest.raises(TrainingError, match="--rendering step"):
        build_examples([ITEM], tokenizer, CONFIG)
    made = build_examples([ITEM], tokenizer, CONFIG.model_copy(update={"rendering": "step"}))
    assert [it.id for it in made.examples] == ["a#0/2", "a#0/3"]
    assert "(cut)" in tokenizer.decode(made.examples[1].ids)
    assert learnt(made.examples[1], tokenizer) == ITEM.steps[2].output + "<|im_end|>"
    assert faults(made, tokenizer) == []


def test_parts_of_a_step_count_differently(tokenizer: Any) -> None:
    item = trajectory("w", told(1, 'x = "größer"\nfinal_answer(x)'))
    weights = SpanWeights(thought=0.25, action=2.0, final_answer=3.0)
    made = build_examples([item], tokenizer, CONFIG.model_copy(update={"weights": weights}))
    (example,) = made.examples
    assert example.weights is not None
    text = {
        weight: tokenizer.decode(
            [token for token, value in zip(example.ids, example.weights, strict=True) if value == weight]
        )
        for weight in (0.25, 2.0, 3.0, 1.0)
    }
    assert text[0.25] == "Thought: step 1\n"
    assert text[3.0] == "final_answer(x)"
    assert text[2.0] == '```python\nx = "größer"\n\n```'
    assert text[1.0] == "<|im_end|>"
    assert example.weight == pytest.approx(sum(example.weights))
    assert faults(made, tokenizer, item) == []


def test_a_first_thought_can_be_left_out_of_the_loss(tokenizer: Any) -> None:
    given = FirstThought(prefix="Thought: I need the sum", via="prefill")
    own = ", so I add.\n```python\nfinal_answer(1)\n```"
    begun = Step(number=1, actor="m", raw=own, output=given.prefix + own, first_thought=given)
    item = trajectory("f", begun)
    made = build_examples([item], tokenizer, CONFIG.model_copy(update={"first_thought": "context"}))
    assert learnt(made.examples[0], tokenizer) == own + "<|im_end|>"
    assert faults(made, tokenizer, item) == []


def served(tokenizer: Any, made: ExampleSet, **changes: Any) -> Any:
    """The check against a server that answers with what was taught."""
    replays = make_replays(made.examples, {ITEM.id: ITEM}, made.system_prompt, tokenizer, 1)
    targets = {it.prompt_ids: it.target_ids for it in replays}
    other = changes.get("server", tokenizer)

    def ask(messages: Any, limit: int, temperature: float) -> Answer:
        prompt = tuple(render_prompt(other, messages))
        ids = targets.get(prompt, (5, tokenizer.eos_token_id))
        answer = changes.get("answer", ids)
        return Answer(prompt, answer, "stop", (changes["sure"],) * len(answer) if "sure" in changes else ())

    prompt = changes.get("system", made.system_prompt)
    return check_served(replays, prompt, tokenizer, ask, "a stand-in", changes.get("known"))


def test_a_server_that_answers_as_taught_passes(tokenizer: Any) -> None:
    result = served(tokenizer, build_examples([ITEM], tokenizer, CONFIG))
    assert result.passed
    assert (result.prompts, result.prompts_equal, result.reproduced, result.canonical) == (2, 2, 2, 2)
    require_parity(result)


def test_a_server_with_another_template_prompt_or_tokens_does_not_pass(tokenizer: Any) -> None:
    made = build_examples([ITEM], tokenizer, CONFIG)
    other = small_tokenizer(OTHER)
    cases = {
        Fault.WRONG_TEMPLATE: {"server": other},
        Fault.SYSTEM_PROMPT: {"system": "Another prompt."},
        Fault.RETOKENISED: {
            "answer": (*(tokenizer.convert_tokens_to_ids(it) for it in "Thought"), tokenizer.eos_token_id)
        },
    }
    for fault, changes in cases.items():
        result = served(tokenizer, made, **changes)
        assert not result.passed
        with pytest.raises(TrainingError, match=str(fault)):
            require_parity(result)


def test_sampled_answers_in_other_tokens_are_counted_and_kept(tokenizer: Any) -> None:
    made = build_examples([ITEM], tokenizer, CONFIG)
    replays = make_replays(made.examples, {ITEM.id: ITEM}, made.system_prompt, tokenizer, 1)
    odd = (*(tokenizer.convert_tokens_to_ids(it) for it in "Thought"), tokenizer.eos_token_id)

    def ask(messages: Any, limit: int, temperature: float) -> Answer:
        prompt = tuple(render_prompt(tokenizer, messages))
        usual = next(it.target_ids for it in replays if it.prompt_ids == prompt)
        return Answer(prompt, odd if temperature else usual, "stop")

    result = check_served(replays, made.system_prompt, tokenizer, ask, "a stand-in")
    assert result.passed
    assert result.sampled_other == (odd, odd)


def test_other_answers_than_the_finished_student_gave_are_those_of_other_weights(tokenizer: Any) -> None:
    made = build_examples([ITEM], tokenizer, CONFIG)
    after = served(tokenizer, made)
    known = known_answers({"after": after.model_dump(), "replays": []})
    same = served(tokenizer, made, known=known)
    assert same.passed and (same.compared, same.unchanged) == (2, 2)
    other = tokenizer("final", add_special_tokens=False)["input_ids"]
    result = served(tokenizer, made, known=known, answer=(*other, tokenizer.eos_token_id))
    assert (result.prompts_equal, result.compared, result.unchanged) == (2, 2, 0)
    with pytest.raises(TrainingError, match=r"wrong base: a#0, step 2: .*adapter.*\(1 more\)"):
        require_parity(result)


def test_close_decisions_may_fall_otherwise_and_sure_ones_may_not() -> None:
    wanted = Known((1, 2, 3), (-0.1, -0.7, -0.1))
    assert compare_answers(wanted, wanted) == (None, [0, 0, 0])
    close = Known((1, 5, 9), (-0.15, -0.7, -0.1))
    assert compare_answers(close, wanted) == (None, [pytest.approx(0.05)])
    assert compare_answers(Known((1, 2, 9)), wanted)[0] is not None
    assert compare_answers(Known((5, 2, 3), (-0.7, -0.1, -0.1)), wanted)[0] is not None  # nothing to compare
    assert compare_answers(Known((1, 5, 9)), Known((1, 2, 3)))[0] is not None  # nobody knows how sure it was
    far = Known((1, 2, 3), (-0.9, -0.7, -0.9))
    why, _ = compare_answers(far, wanted)
    assert why is not None and "0.53 nats" in why


@pytest.mark.parametrize("sure", [-0.1, -2.0])
def test_odd_tokens_are_a_fault_where_the_student_was_sure_of_them(tokenizer: Any, sure: float) -> None:
    odd = (*(tokenizer.convert_tokens_to_ids(it) for it in "Thought"), tokenizer.eos_token_id)
    result = served(tokenizer, build_examples([ITEM], tokenizer, CONFIG), answer=odd, sure=sure)
    assert (result.stopped, result.canonical) == (2, 0)
    assert result.passed == (sure < -1)
