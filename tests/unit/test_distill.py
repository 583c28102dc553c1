"""Examples, batches and settings of training; nothing here needs torch."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentkd.commands.distill import _more
from agentkd.distill.batches import batch_indices, pack_batch, single_packs, total_steps
from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example, build_examples
from agentkd.engine.render import render_prompt
from agentkd.engine.student import load_student
from agentkd.errors import ConfigError, DataError
from agentkd.prompt import COT_STUDENT, STUDENT, action_text, chat_messages, trajectory_messages
from agentkd.task import Task
from agentkd.trajectory import Failure, FirstThought, Step, StopReason, Trajectory
from tests.unit.test_render import small_tokenizer

SEARCH = json.dumps(
    {"name": "search", "description": "d", "inputs": {"query": {"type": "string"}}, "output_type": "string"}
)
CONFIG = DistillConfig(base="toy")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


def step(number: int, code: str, observation: str | None = None, failed: bool = False) -> Step:
    output = action_text(f"step {number}", code)
    failure = Failure(kind="execution", message="NameError") if failed else None
    return Step(number=number, actor="m", raw=output, output=output, observation=observation, failure=failure)


def trajectory(name: str, *steps: Step, **fields: Any) -> Trajectory:
    defaults: dict[str, Any] = {
        "tools": (SEARCH,),
        "model": "m",
        "system_prompt": "the teacher's long prompt",
        "stop_reason": StopReason.FINAL_ANSWER,
    }
    task = Task(id=name, question=f"question of {name}", answer="1")
    return Trajectory(id=f"{name}#0", task=task, steps=steps, **{**defaults, **fields})


def learnt(example: Example, tokenizer: Any) -> str:
    text: str = tokenizer.decode([it for it, target in zip(example.ids, example.mask, strict=True) if target])
    return text


def test_a_trajectory_is_one_example_with_the_students_prompt_and_all_its_turns(tokenizer: Any) -> None:
    item = trajectory("a", step(1, "print(1)", "Observation:\n1"), step(2, "final_answer(1)"))
    made = build_examples([item], tokenizer, CONFIG)
    assert made.system_prompt == STUDENT.replace("{tools}", "search(query)")
    (example,) = made.examples
    assert learnt(example, tokenizer) == "".join(it.output + "<|im_end|>" for it in item.steps)
    messages = trajectory_messages(item, made.system_prompt)
    for place in (2, 4):
        prompt = render_prompt(tokenizer, messages[:place])
        assert example.ids[: len(prompt)] == prompt
        assert example.mask[len(prompt)]
        assert not example.mask[len(prompt) - 1]


def test_a_first_thought_is_learnt_as_the_students_own_and_can_be_told_apart(tokenizer: Any) -> None:
    given = FirstThought(prefix="Thought: I need the sum", via="prefill")
    own = ", so I add.\n```python\nfinal_answer(1)\n```"
    begun = Step(number=1, actor="m", raw=own, output=given.prefix + own, first_thought=given)
    made = build_examples([trajectory("a", begun)], tokenizer, CONFIG)
    (example,) = made.examples
    assert learnt(example, tokenizer) == f"{given.prefix}{own}<|im_end|>"
    # The boundary between what was given and the model's own is one between tokens.
    asked = [
        *chat_messages(made.system_prompt, "question of a"),
        {"role": "assistant", "content": given.prefix},
    ]
    prompt = render_prompt(tokenizer, asked, continue_final_message=True)
    assert example.ids[: len(prompt)] == prompt
    assert tokenizer.decode(example.ids[len(prompt) :]).startswith(begun.continuation)


def test_a_failed_step_is_context_and_not_learnt(tokenizer: Any) -> None:
    item = trajectory("a", step(1, "oops", "Observation:\nError", failed=True), step(2, "final_answer(1)"))
    (example,) = build_examples([item], tokenizer, CONFIG).examples
    assert "oops" in tokenizer.decode(example.ids)
    assert learnt(example, tokenizer) == item.steps[1].output + "<|im_end|>"


def test_what_follows_the_last_learnt_turn_is_left_out(tokenizer: Any) -> None:
    item = trajectory(
        "a", step(1, "x", "Observation:\nseen"), step(2, "oops", "Observation:\nno", failed=True)
    )
    (example,) = build_examples([item], tokenizer, CONFIG).examples
    assert "seen" not in tokenizer.decode(example.ids)
    assert example.mask[-2:] == [True, False]  # the end token, then the template's newline


def test_what_cannot_be_learnt_is_dropped_and_counted(tokenizer: Any) -> None:
    kept = trajectory("kept", step(1, "final_answer(1)"))
    long = trajectory("long", step(1, "x" * 3000))
    failed = trajectory("failed", step(1, "oops", failed=True))
    cot = trajectory("cot", step(1, "Answer: 1"), kind="cot")
    made = build_examples([kept, long, failed, cot], tokenizer, CONFIG)
    assert [it.id for it in made.examples] == ["kept#0"]
    assert made.dropped == {"other kind": 1, "too long": 1, "no step to learn": 1}


def test_nothing_to_learn_from_is_a_data_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no trajectories"):
        build_examples([], tokenizer, CONFIG)
    with pytest.raises(DataError, match="of kind 'agent'"):
        build_examples([trajectory("a", kind="cot")], tokenizer, CONFIG)
    with pytest.raises(DataError, match="1 too long"):
        build_examples([trajectory("a", step(1, "x" * 3000))], tokenizer, CONFIG)
    with pytest.raises(DataError, match="1 no step to learn"):
        build_examples([trajectory("a")], tokenizer, CONFIG)
    with pytest.raises(DataError, match="not a schema"):
        build_examples([trajectory("a", step(1, "x"), tools=("search",))], tokenizer, CONFIG)


def test_chains_of_thought_use_their_own_prompt(tokenizer: Any) -> None:
    output = "2 and 2 is 4.\nAnswer: 4"
    item = trajectory("a", Step(number=1, actor="m", raw=output, output=output), kind="cot", tools=())
    made = build_examples([item], tokenizer, DistillConfig(kind="cot"))
    assert made.system_prompt == COT_STUDENT
    assert learnt(made.examples[0], tokenizer) == output + "<|im_end|>"


def test_limits_come_from_the_trajectories_unless_they_are_given(tokenizer: Any) -> None:
    item = trajectory("a", step(1, "x"), config={"max_steps": 7, "imports": ["math"]})
    made = build_examples([item], tokenizer, CONFIG)
    assert (made.max_steps, made.imports) == (7, ("math",))
    made = build_examples([item], tokenizer, DistillConfig(max_steps=2, imports=()))
    assert (made.max_steps, made.imports) == (2, ())


def test_tools_of_all_trajectories_stand_in_the_one_prompt(tokenizer: Any) -> None:
    other = SEARCH.replace("search", "look_up")
    items = [trajectory("a", step(1, "x")), trajectory("b", step(1, "x"), tools=(other, SEARCH))]
    made = build_examples(items, tokenizer, CONFIG)
    assert made.system_prompt.endswith("Tools: search(query), look_up(query)")
    assert made.tools == (SEARCH, other)


def example(name: str, prefix: list[int], length: int) -> Example:
    ids = prefix + [100 * len(name) + place for place in range(length)]
    mask = [place >= len(prefix) + 2 and place % 3 > 0 for place in range(len(ids))]
    return Example(name, ids, mask)


def test_batches_are_a_pure_function_of_seed_and_step_and_cover_every_epoch() -> None:
    stream = [index for step_ in range(10) for index in batch_indices(20, 8, 1, step_)]
    for epoch in range(4):
        assert sorted(stream[20 * epoch : 20 * epoch + 20]) == list(range(20))
    assert stream[:20] != stream[20:40]
    assert batch_indices(20, 8, 1, 5) == stream[40:48]
    assert batch_indices(20, 8, 2, 0) != stream[:8]
    assert len(batch_indices(3, 8, 0, 0)) == 8


def test_steps_follow_from_epochs_unless_given() -> None:
    assert total_steps(300, 8, None, 2.0) == 75
    assert total_steps(300, 8, 60, 2.0) == 60
    assert total_steps(2, 8, None, 1.0) == 1


def test_packs_hold_every_example_once_and_the_shared_prefix_once() -> None:
    prefix = [1, 2, 3, 4, 5]
    batch = [example("a" * n, prefix, 10 * n) for n in (3, 1, 2, 5)]
    packs = pack_batch(batch, 10_000, groups=2)
    assert len(packs) == 2
    assert sorted(name for pack in packs for name in pack.examples) == ["a", "aa", "aaa", "aaaaa"]
    by_id = {it.id: it for it in batch}
    for pack in packs:
        assert pack.prefix >= 5
        assert len(pack.ids) == len(pack.positions) == pack.prefix + sum(pack.lengths)
        begin = pack.prefix
        for owner, (name, length) in enumerate(zip(pack.examples, pack.lengths, strict=True)):
            whole = by_id[name]
            assert pack.ids[: pack.prefix] + pack.ids[begin : begin + length] == whole.ids
            assert pack.positions[begin : begin + length] == list(range(pack.prefix, len(whole.ids)))
            mine = [i for i, who in enumerate(pack.owners) if who == owner]
            places = [place for place, target in enumerate(whole.mask) if target]
            assert [pack.targets[i] for i in mine] == [whole.ids[place] for place in places]
            assert [pack.rows[i] for i in mine] == [begin - pack.prefix + place - 1 for place in places]
            begin += length


def test_packs_are_balanced_and_keep_to_the_budget() -> None:
    batch = [example("a" * n, [1], 100) for n in range(1, 9)]
    sizes = [sum(pack.lengths) for pack in pack_batch(batch, 400, groups=2)]
    assert len(sizes) == 6
    assert max(sizes) <= 2 * 101
    assert len(pack_batch(batch, 10_000, groups=1)) == 1
    alone = single_packs(batch[:2])
    assert [pack.ids for pack in alone] == [it.ids for it in batch[:2]]
    assert [pack.positions for pack in alone] == [list(range(101))] * 2


def test_the_same_example_twice_in_a_batch_is_learnt_twice() -> None:
    one = example("a", [1, 2], 10)
    (pack,) = pack_batch([one, one], 1000)
    assert len(pack.targets) == 2 * one.targets
    assert pack.lengths[0] == pack.lengths[1] > 0


def test_the_fingerprint_holds_what_decides_the_result_and_nothing_else() -> None:
    same = DistillConfig(threads=1, save_every=9)
    assert same.fingerprint("x") == DistillConfig().fingerprint("x")
    assert DistillConfig(seed=1).fingerprint("x") != same.fingerprint("x")
    assert same.fingerprint("y") != same.fingerprint("x")


def test_settings_without_an_option_are_read_by_their_type() -> None:
    pairs = [
        "micro_tokens=1024",
        "lora_dropout=0.05",
        'imports=["math", "re"]',
        "system_prompt=12",
        "threads=null",
    ]
    assert _more(pairs, set()) == {
        "micro_tokens": 1024,
        "lora_dropout": 0.05,
        "imports": ("math", "re"),
        "system_prompt": "12",
        "threads": None,
    }
    for wrong, said in (
        ("micro_tokens=many", "micro_tokens=many cannot be read"),
        ("imports=math", "as JSON"),
        ("micro_tokens", "name=value"),
        ("nothing=1", r"no setting 'nothing'.*micro_tokens"),
        ("lora_r=4", "Use --rank"),
        ("max_length=4", "Use --max-length"),
    ):
        with pytest.raises(ConfigError, match=said):
            _more([wrong], {"lora_r", "max_length"})


def test_a_folder_that_is_no_student_says_what_it_lacks(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="no student folder"):
        load_student(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"has no student\.json"):
        load_student(tmp_path)
