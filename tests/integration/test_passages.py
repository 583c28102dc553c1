"""CoT + retrieval: the same passages in the record, in training, in the student folder and at evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentkd.agent_config import AgentConfig, agent_factory, search_tools
from agentkd.errors import ConfigError, DataError, ProviderError, RetrievalError
from agentkd.prompt import trajectory_messages
from agentkd.record import read_trajectories, write_jsonl
from agentkd.retrieval import Passage
from agentkd.retrieval.bm25 import BM25Retriever
from agentkd.rollout import rollout
from agentkd.rollouts import run_rollouts
from agentkd.task import Task
from agentkd.testing import ScriptedModel
from agentkd.trajectory import StopReason, Trajectory
from agentkd.transform import Means, make_transform, transform_run
from tests.integration.test_distill import base, settings

__all__ = ["base"]

PASSAGES = [
    Passage(id="1", title="Silver Harbor", text="Silver Harbor was founded in 1802."),
    Passage(id="2", title="Gold Harbor", text="Gold Harbor was founded in 1700."),
]
SHOWN = "[Silver Harbor] Silver Harbor was founded in 1802."
TASKS = [Task(id=str(n), question="When was Silver Harbor founded?", answer="1802") for n in range(3)]
CONFIG = AgentConfig(kind="cot", passages=True, search_k=1, search_tokens=64)


def answered(model: Any, config: AgentConfig = CONFIG, retriever: Any = None) -> Trajectory:
    tools = search_tools(retriever or BM25Retriever(PASSAGES), config)
    agent = agent_factory(config, tools, model)(TASKS[0], 0)
    return rollout(agent, TASKS[0])


def test_what_the_model_sees_is_what_the_record_renders() -> None:
    model = ScriptedModel(["It says so.\nAnswer: 1802"])
    record = answered(model)
    assert record.correct
    assert record.context is not None
    assert (record.context.text, record.context.k, record.context.max_tokens) == (SHOWN, 1, 64)
    seen = [it.content[0]["text"] for it in model.seen[0]]
    assert seen == [it["content"] for it in trajectory_messages(record)[:-1]]
    assert seen[1] == f"Passages:\n{SHOWN}\n\nQuestion: When was Silver Harbor founded?"


def test_without_passages_nothing_changes() -> None:
    model = ScriptedModel(["Answer: 1802"])
    record = answered(model, CONFIG.model_copy(update={"passages": False}))
    assert record.context is None
    assert model.seen[0][1].content[0]["text"] == TASKS[0].question


def test_a_retriever_that_fails_is_no_wrong_answer() -> None:
    class Broken:
        def search(self, queries: Any, k: int = 3) -> Any:
            raise RetrievalError("down")

    assert answered(ScriptedModel([]), retriever=Broken()).stop_reason == StopReason.RETRIEVAL_ERROR


def test_passages_need_a_search_and_a_chain_of_thought() -> None:
    for config, tools in ((CONFIG, []), (AgentConfig(passages=True), [])):
        with pytest.raises(ConfigError, match="something to search"):
            agent_factory(config, tools, ScriptedModel([]))(TASKS[0], 0)


def test_a_search_is_logged_and_not_made_twice(tmp_path: Path) -> None:
    class Once(BM25Retriever):
        calls = 0

        def search(self, queries: Any, k: int = 3) -> Any:
            self.calls += 1
            return super().search(queries, k)

    retriever = Once(PASSAGES)
    tools = search_tools(retriever, CONFIG)
    log = tmp_path / "trajectories.jsonl"

    class Dying(ScriptedModel):
        def generate(self, messages: Any, **options: Any) -> Any:
            if not self.outputs:
                raise ConnectionError("gone")
            return super().generate(messages, **options)

    with pytest.raises(ProviderError):
        run_rollouts(TASKS[:1], agent_factory(CONFIG, tools, Dying([])), log, workers=1)
    (record,) = run_rollouts(TASKS[:1], agent_factory(CONFIG, tools, Dying(["Answer: 1802"])), log, workers=1)
    assert record.correct
    assert record.context is not None
    assert retriever.calls == 1


def test_a_student_is_evaluated_with_as_many_passages_as_it_was_trained_with(
    base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    from agentkd.distill import distill
    from agentkd.engine.student import load_student
    from agentkd.evaluate import run_evaluation
    from agentkd.system import open_system

    plain = [answered(ScriptedModel(["So.\nAnswer: 1802"]), CONFIG.model_copy(update={"passages": False}))]
    write_jsonl(tmp_path / "kept.jsonl", plain)
    retriever = BM25Retriever(PASSAGES)
    transform_run(
        tmp_path / "kept.jsonl",
        tmp_path / "with",
        make_transform("passages", {"k": 1, "max_tokens": 64}),
        lambda answers: Means(answers, retriever=retriever),
    )
    distill(
        tmp_path / "with" / "kept.jsonl",
        tmp_path / "student",
        settings(base, kind="cot", steps=1, batch_size=1),
    )
    student = load_student(tmp_path / "student")
    assert (student.passages, student.passage_tokens) == (1, 64)
    with open_system(str(tmp_path / "student"), max_tokens=4) as system:
        _, (record,) = run_evaluation(
            "it", TASKS[:1], lambda: _opened(system), tmp_path / "eval", retriever=retriever
        )
    (trained,) = read_trajectories(tmp_path / "with" / "kept.jsonl")
    assert record.context == trained.context
    mixed = [*plain, trained.model_copy(update={"id": "other#0"})]
    write_jsonl(tmp_path / "mixed.jsonl", mixed)
    with pytest.raises(DataError, match="asked in one way"):
        distill(tmp_path / "mixed.jsonl", tmp_path / "no", settings(base, kind="cot", steps=1))


def _opened(system: Any) -> Any:
    from contextlib import nullcontext

    return nullcontext(system)
