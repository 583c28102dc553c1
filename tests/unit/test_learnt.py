"""The coloured tokens are those that training has in its loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import build_examples
from agentkd.engine.weights import load_tokenizer, resolve_model
from agentkd.errors import AgentkdError
from agentkd.learnt import learnt_tokens
from agentkd.record import iter_jsonl
from agentkd.trajectory import Trajectory
from tests.unit.test_report import make_run

RUN = Path(__file__).parents[2] / "trajectories" / "almanac" / "trajectories.jsonl"


@pytest.fixture(scope="module")
def base() -> str:
    try:
        resolve_model("smollm2-135m")
    except AgentkdError as exc:
        pytest.skip(str(exc))
    return "smollm2-135m"


def test_texts_and_tokens_are_those_of_training(base: str) -> None:
    mask = learnt_tokens(base)
    tokenizer = load_tokenizer(resolve_model(base))
    for trajectory, _ in zip(iter_jsonl(RUN, Trajectory), range(20), strict=False):
        config = DistillConfig(base=base, kind=trajectory.kind)
        [example] = build_examples([trajectory], tokenizer, config).examples
        shown = mask(json.loads(trajectory.model_dump_json()))
        assert shown["tokens"] == len(example.ids)
        assert "".join(text for text, _ in shown["runs"]) == tokenizer.decode(example.ids)
        assert sum(weight > 0 for _, weight in shown["runs"]) == example.targets
        learnt = "".join(text for text, weight in shown["runs"] if weight)
        assert all(step.output in learnt for step in trajectory.steps if step.failure is None)
        assert trajectory.task.question not in learnt


def test_a_character_of_several_tokens_stays_whole(base: str) -> None:
    run = make_run(0, True, text="\N{GRINNING FACE} \N{CJK UNIFIED IDEOGRAPH-6F22}")
    shown = learnt_tokens(base)(json.loads(run.model_dump_json()))
    texts = [text for text, _ in shown["runs"]]
    assert any("\N{GRINNING FACE}" in text for text in texts)
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_what_is_not_learnt_says_why(base: str) -> None:
    mask = learnt_tokens(base)
    record = json.loads(make_run(0, False).model_dump_json())
    assert "does not learn it" in mask(record)["problem"]  # its one step failed
    assert "another version" in mask({**record, "schema_version": 9})["problem"]


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(AgentkdError):
        learnt_tokens(str(tmp_path / "nothing"))
