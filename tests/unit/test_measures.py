"""Figures of several runs, overlap of questions, comparison of runs, rescoring."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agentkd.errors import ConfigError, DataError
from agentkd.evaluate import (
    compare_runs,
    comparison_table,
    measure,
    overlaps,
    pass_at_k,
    step_agreement,
    summarise,
)
from agentkd.evaluate.rescore import rescore
from agentkd.model import openai_model
from agentkd.record import write_jsonl, write_manifest
from agentkd.scorer.judge import Judge
from agentkd.spend import Price
from agentkd.task import Task
from agentkd.testing import FakeEndpoint, ScriptedModel
from agentkd.trajectory import Candidate, Route, Score, Step, StopReason, ToolUse, Trajectory, Usage


def run(task: str, right: bool = True, sample: int = 0, **fields: Any) -> Trajectory:
    answer = "1" if right else "2"
    return Trajectory(
        **{
            "id": f"{task}#{sample}",
            "task": Task(id=task, question=f"What is {task}?", answer="1", scorer="numeric"),
            "sample": sample,
            "model": "m",
            "system_prompt": "s",
            "answer": answer,
            "stop_reason": StopReason.FINAL_ANSWER,
            "score": Score(value=float(right), scorer="numeric"),
            "usage": Usage(input_tokens=900, output_tokens=100),
            **fields,
        }
    )


def step(code: str = "final_answer(1)", **fields: Any) -> Step:
    return Step(**{"number": 1, "actor": "m", "raw": "r", "output": "o", "code": code, **fields})


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, correct: int, k: int) -> None:
    subsets = list(combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_more_than_there_are_runs_is_refused() -> None:
    with pytest.raises(ConfigError):
        pass_at_k(2, 1, 3)


def test_runs_are_told_apart_and_errored_ones_left_out() -> None:
    runs = [run("a", True, 0), run("a", False, 1), run("b", False, 0), run("b", False, 1)]
    runs.append(run("c", False, 0, stop_reason=StopReason.PROVIDER_ERROR, answer=None))
    found = measure(runs, Price(input=1.0, output=10.0))
    assert found.runs == 2
    assert found.run_accuracies == (0.5, 0.0)
    assert found.pass_at == {1: 0.25, 2: 0.5}
    assert found.cost_per_task == pytest.approx(0.0019)
    assert measure([]).pass_at == {}
    assert summarise("s", runs).measures is not None


def test_repairs_are_counted_in_all_that_was_drawn_and_once() -> None:
    closed, tagged = Candidate(raw="x", repairs=("closed_fence",)), Candidate(raw="y", repairs=("code_tag",))
    won = Candidate(raw="z", repairs=("closed_fence", "dropped_tail"), chosen=True)
    route = Route(router="agreement", mode="required", direct=False, drafts=(tagged, tagged, tagged))
    steps = (
        step(repairs=won.repairs, candidates=(closed, won, Candidate(raw="w")), route=route),
        step(repairs=("bare_code",)),
    )
    alone = Route(router="threshold", mode="allowed", direct=True, drafts=(won,))
    runs = [run("a", steps=steps), run("b", steps=(step(repairs=won.repairs, route=alone),))]
    runs.append(run("c", steps=steps, stop_reason=StopReason.PROVIDER_ERROR))
    found = measure(runs).repairs
    assert list(found.items()) == [
        ("closed_fence", 3),
        ("code_tag", 3),
        ("dropped_tail", 2),
        ("bare_code", 1),
    ]
    console = Console(width=120, file=io.StringIO())
    console.print(comparison_table([summarise("a", runs), summarise("b", [run("a")])]))
    (line,) = [line for line in console.file.getvalue().splitlines() if "mended" in line]
    shown = "texts mended 3 closed fence, 3 code tag, 2 dropped tail, 1 bare code -"
    assert " ".join(line.split()) == shown


def test_calibration_is_zero_when_confidence_is_the_hit_rate() -> None:
    def voted(task: str, votes: int, right: bool) -> Trajectory:
        options = [Candidate(raw="x", votes=votes, chosen=not i) for i in range(4)]
        return run(task, right, steps=(step(candidates=tuple(options)),))

    honest = [voted(f"t{i}", 3, i != 0) for i in range(4)]
    found = measure(honest).calibration
    assert found is not None
    assert (found.source, found.n, found.ece) == ("votes", 4, 0.0)
    sure = measure([voted(f"t{i}", 4, i == 0) for i in range(4)]).calibration
    assert sure is not None
    assert sure.ece == pytest.approx(0.75)
    likely = measure([run("a", steps=(step(logprobs=(-0.5, -1.5, float("nan"))),))]).calibration
    assert likely is not None
    assert likely.confidence == pytest.approx(0.36788, abs=1e-4)
    assert measure([run("a")]).calibration is None


def questions(*texts: str) -> list[Task]:
    return [Task(id=f"q{i}", question=text) for i, text in enumerate(texts)]


def test_overlap_finds_the_same_the_renumbered_and_the_reworded() -> None:
    long = "Marin and his neighbor Nancy each eat 4 apples a day. How many apples do they eat in 30 days?"
    train = questions(long, "3 + 4", "Who founded the old town of Silver Harbor in the north of the island?")
    test = questions(
        long.upper(),
        long.replace("4", "218983"),
        "Who founded the old town of Silver Harbor in the north of that island, and when?",
        "3 + 5",
        "Which of the two films was released first?",
    )
    found = {item.test: (item.train, item.kind) for item in overlaps(train, test)}
    assert found == {"q0": ("q0", "exact"), "q1": ("q0", "numbers"), "q2": ("q2", "near")}


def folder(path: Path, runs: list[Trajectory], **config: Any) -> Path:
    write_jsonl(path / "trajectories.jsonl", runs)
    write_manifest(path, stage="evaluate", config=config, counts={})
    return path


def test_compare_says_what_changed_and_whether_it_matters(tmp_path: Path) -> None:
    rng = random.Random(0)
    a = folder(tmp_path / "a", [run(f"t{i}", rng.random() < 0.3) for i in range(80)], temperature=0.0)
    b = folder(tmp_path / "b", [run(f"t{i}", rng.random() < 0.8) for i in range(90)], temperature=0.4)
    found = compare_runs(a, b)
    assert found.accuracy.real
    assert found.accuracy.n == 80
    assert found.only_second == 10
    assert found.wins - found.losses == round(80 * found.accuracy.mean)
    assert found.changed == {"temperature": (0.0, 0.4)}
    assert "80 pairs" in found.verdict
    same = compare_runs(a, a)
    assert not same.accuracy.real
    assert same.changed == {}


def test_runs_on_other_questions_are_not_compared(tmp_path: Path) -> None:
    other = run("t0").model_copy(update={"task": Task(id="t0", question="Another?", answer="1")})
    with pytest.raises(DataError, match="another question"):
        compare_runs(folder(tmp_path / "a", [run("t0")]), folder(tmp_path / "b", [other]))


def test_a_run_that_is_still_being_written_is_compared_as_far_as_it_is(tmp_path: Path) -> None:
    whole = folder(tmp_path / "a", [run("t0"), run("t1")])
    torn = tmp_path / "b"
    torn.mkdir()
    line = run("t0").model_dump_json()
    (torn / "trajectories.jsonl").write_text(f"{line}\n{line[:100]}", encoding="utf-8")
    assert compare_runs(whole, torn).accuracy.n == 1


def test_step_agreement_compares_programs_not_spelling() -> None:
    teacher = run(
        "a", steps=(step("x = 1\nfinal_answer( x )  # so", tool_uses=(ToolUse(name="s", arguments={}),)),)
    )
    student = run("a", steps=(step("x=1\nfinal_answer(x)"),))
    found = step_agreement([teacher], [student])
    assert (found.n, found.answers, found.first_actions, found.steps, found.tools) == (1, 1, 1, 1, 0)
    assert step_agreement([teacher], []).n == 0


def test_scorers_are_compared_and_the_run_is_written_anew(tmp_path: Path) -> None:
    said = run("b").model_copy(update={"answer": "The answer is 1.0"})
    wrong = run("c", False).model_copy(update={"score": Score(value=1.0, scorer="numeric")})
    nothing = run("d").model_copy(update={"task": Task(id="d", question="q")})
    source = folder(tmp_path / "a", [run("a"), said, wrong, nothing])
    found, new = rescore(source, "numeric", out=tmp_path / "new")
    assert (found.n, found.both, found.only_second, found.unscored_first) == (3, 2, 1, 1)
    assert [item.id for item in found.disagreements] == ["c#0"]
    assert [item.correct for item in new] == [True, True, False, False]
    with pytest.raises(ConfigError, match="holds a run"):
        rescore(source, "numeric", out=tmp_path / "new")
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"id": "a#0", "correct": true}\n{"id": "c#0", "correct": false}\n', encoding="utf-8")
    agreed, _ = rescore(source, "numeric", str(labels))
    assert (agreed.n, agreed.agreement, agreed.kappa) == (2, 1.0, 1.0)


def test_a_judge_is_paid_once_and_its_nonsense_is_an_error(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", [run("a"), run("b", False), run("c")])
    cache = tmp_path / "judge.jsonl"
    with Judge(ScriptedModel(["CORRECT", "Incorrect.", "Well, correct or incorrect?"]), cache) as judge:
        found, new = rescore(source, "judge", judge=judge, workers=1)
        assert [item.score.value for item in new if item.score] == [1.0, 0.0, None]
        assert "no verdict" in (new[2].score.reason if new[2].score else "")
        assert (found.agreement, found.n, judge.asked) == (1.0, 2, 2)
    with Judge(ScriptedModel(["CORRECT"]), cache) as again:
        _, new = rescore(source, "judge", judge=again, workers=1)
        assert (again.asked, new[0].correct, new[1].correct) == (1, True, False)
    with pytest.raises(ConfigError, match="needs a model"):
        rescore(source, "judge")


def test_a_judge_over_http_is_asked_once_and_keeps_its_verdicts(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", [run("a"), run("b", False), run("c")])
    cache = tmp_path / "judge.jsonl"

    def reply(messages: list[dict[str, Any]]) -> Any:
        asked = str(messages[-1]["content"])
        if "What is c?" in asked:
            return 400, b'{"error": {"message": "no such thing"}}'
        return "CORRECT" if 'Answer: \\"1' in asked or 'Answer: "1' in asked else "INCORRECT"

    with FakeEndpoint(reply) as endpoint:
        for _ in range(2):
            model = openai_model("fake", endpoint.url, retries=0, max_tokens=16, temperature=0.0)
            with Judge(model, cache) as judge:
                _, new = rescore(source, "judge", judge=judge)
            assert [item.score.value for item in new if item.score] == [1.0, 0.0, None]
        asked = Counter(str(body["messages"]) for body in endpoint.requests)
    assert sorted(asked.values()) == [1, 1, 2]  # a failure is no verdict and is asked again
    assert len(cache.read_text(encoding="utf-8").splitlines()) == 2


def test_an_older_or_unknown_schema_is_named(tmp_path: Path) -> None:
    row = json.loads(run("a").model_dump_json())
    path = tmp_path / "trajectories.jsonl"
    path.write_text(
        json.dumps(row) + "\n" + json.dumps({**row, "schema_version": 99}) + "\n", encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"line 2.*schema_version"):
        rescore(tmp_path)
