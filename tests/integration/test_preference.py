"""AFT and DPO: their formulas by hand, their gradients, and a training from rejected trajectories."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from agentkd.distill import distill
from agentkd.errors import ConfigError, DataError
from agentkd.filter import Dropped
from agentkd.record import write_jsonl
from agentkd.trajectory import Score, StopReason, Trajectory
from tests.integration.test_distill import base, losses, settings
from tests.unit.test_distill import step, trajectory

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

from agentkd.distill.config import DistillConfig  # noqa: E402
from agentkd.distill.learner import Learner  # noqa: E402
from agentkd.distill.preference import Aft, Dpo, Scored, chosen_negatives  # noqa: E402

__all__ = ["base"]


def scored(total: float, tokens: int, reference: float = 0.0) -> Scored:
    return Scored(torch.tensor(total, dtype=torch.float64, requires_grad=True), tokens, reference)


def test_aft_by_hand() -> None:
    # s+ = -1, s- = -3 and -2, T = -1 - 2 * 0.5 = -2.
    value = Aft(0.5).loss(scored(-4.0, 4), [scored(-6.0, 2), scored(-6.0, 3)])
    by_hand = math.log(1 + math.exp(-2) + math.exp(1) + math.exp(-1) + math.exp(0))
    assert value.item() == pytest.approx(by_hand)


def test_aft_pushes_a_wrong_trajectory_down_to_its_bound_and_no_further() -> None:
    pulls = []
    for bad in (-1.2, -1.5, -1.8):  # above, at and below s+ - bound = -1.5
        wrong = scored(bad, 1)
        Aft(0.5).loss(scored(-1.0, 1), [wrong]).backward()
        pulls.append(wrong.total.grad.item())
    assert pulls[0] > 0  # minimising lowers it
    assert pulls[1] == pytest.approx(0.0, abs=1e-12)
    assert pulls[2] < 0


def test_dpo_by_hand() -> None:
    # r+ = -4 + 5 = 1; r- = -6 + 4 = -2 and -3 + 3 = 0.
    value = Dpo(0.1).loss(scored(-4.0, 4, -5.0), [scored(-6.0, 2, -4.0), scored(-3.0, 3, -3.0)])
    by_hand = sum(math.log(1 + math.exp(-0.1 * margin)) for margin in (3, 1)) / 2
    assert value.item() == pytest.approx(by_hand)


@pytest.mark.parametrize("preference", [Aft(0.3), Dpo(0.2)])
def test_the_gradient_is_that_of_the_value(preference: Any) -> None:
    def loss(good: Any, one: Any, other: Any) -> Any:
        # T holds the right one's value of now: it is fixed here, as its gradient is cut there.
        return preference.loss(Scored(good, 3, -2.0), [Scored(one, 2, -1.0), Scored(other, 5, -4.0)])

    values = [torch.tensor(it, dtype=torch.float64, requires_grad=True) for it in (-3.0, -4.0, -2.0)]
    if isinstance(preference, Dpo):
        assert torch.autograd.gradcheck(loss, tuple(values))
        return
    loss(*values).backward()
    good, one, other = (it.item() for it in values)
    floor = good / 3 - 2 * preference.bound

    def frozen(a: float, b: float, c: float) -> float:
        return math.log(1 + sum(math.exp(s - a / 3) + math.exp(floor - s) for s in (b / 2, c / 5)))

    for place, value in enumerate(values):
        moved = [
            [it + (d if n == place else 0) for n, it in enumerate((good, one, other))] for d in (1e-6, -1e-6)
        ]
        numeric = (frozen(*moved[0]) - frozen(*moved[1])) / 2e-6
        assert value.grad.item() == pytest.approx(numeric, abs=1e-7)


def test_negatives_are_drawn_by_the_seed_alone() -> None:
    known = {"a": list(range(9))}
    first = chosen_negatives("a", known, 2, "0:1")  # type: ignore[arg-type]
    assert len(first) == 2
    assert first == chosen_negatives("a", known, 2, "0:1")  # type: ignore[arg-type]
    assert any(chosen_negatives("a", known, 2, f"0:{n}") != first for n in range(9))  # type: ignore[arg-type]
    assert chosen_negatives("b", known, 2, "0:1") == []  # type: ignore[arg-type]


def wrong(question: str, answer: int, number: int, **changes: Any) -> Trajectory:
    made = trajectory(
        question, step(1, f"print({answer})", f"Observation:\n{answer}"), step(2, f"final_answer({answer})")
    )
    fields = {"id": f"{made.task.id}#{number}", "score": Score(value=0.0, scorer="exact"), **changes}
    return made.model_copy(update=fields)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    right = [
        trajectory(f"task {n}", step(1, f"print({n})", f"Observation:\n{n}"), step(2, f"final_answer({n})"))
        for n in range(6)
    ]
    write_jsonl(folder / "kept.jsonl", right)
    rejected = [wrong(f"task {n}", n + 1 + k, k + 1) for n in range(5) for k in range(2)]
    rejected.append(wrong("task 0", 0, 8, score=Score(value=1.0, scorer="exact")))  # merely longer
    rejected.append(wrong("task 0", 7, 9, stop_reason=StopReason.PROVIDER_ERROR, score=None))
    rejected.append(wrong("another task", 7, 1))
    write_jsonl(folder / "dropped.jsonl", [Dropped(reason="wrong answer", trajectory=it) for it in rejected])
    return folder


@pytest.mark.parametrize("objective", ["aft", "dpo"])
def test_training_prefers_the_right_ones_and_resumes_exactly(
    base: Path, data: Path, tmp_path: Path, objective: str
) -> None:
    config = settings(
        base,
        objective=objective,
        negatives=str(data / "dropped.jsonl"),
        steps=8,
        replays=0,
        learning_rate=3e-3,
    )
    student = distill(data / "kept.jsonl", tmp_path / "whole", config)
    assert student.training["n_examples"] == (6 if objective == "aft" else 5)
    curve = losses(tmp_path / "whole")
    assert curve[-1] < 0.9 * curve[0]
    if objective == "dpo":
        assert curve[0] == pytest.approx(math.log(2), abs=1e-4)  # the student is its own reference yet

    class Killed(BaseException):
        pass

    def stop(done: int, steps: int, loss: float) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        distill(data / "kept.jsonl", tmp_path / "cut", config, stop)
    distill(data / "kept.jsonl", tmp_path / "cut", config)
    assert losses(tmp_path / "cut") == curve


def test_the_reference_is_the_parent_and_held_out_is_the_same_loss(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """The student is its parent before the first step, so that DPO begins at log 2, on both sides."""
    parent = distill(data / "kept.jsonl", tmp_path / "parent", settings(base, replays=0)).path
    config = settings(
        base,
        objective="dpo",
        negatives=str(data / "dropped.jsonl"),
        parent=str(parent),
        steps=8,
        replays=0,
        learning_rate=3e-3,
        eval_fraction=0.2,
        eval_every=1,
    )
    said: list[str] = []
    student = distill(data / "kept.jsonl", tmp_path / "next", config, say=said.append)
    curve = losses(tmp_path / "next")
    assert curve[0] == pytest.approx(math.log(2), abs=1e-4)
    assert curve[-1] < 0.9 * curve[0]
    # By the cross-entropy the parent would be the best.
    assert student.training["best_step"] > 1
    assert student.training["held_out_loss"] < math.log(2)
    assert any("MiB are free" in line for line in said)
    assert any("5 of 6 trajectories have a wrong one" in line for line in said)
    plain = distill(data / "kept.jsonl", tmp_path / "plain", config.model_copy(update={"parent": None}))
    mine, theirs = (json.loads((it.path / "reference.json").read_text())["scores"] for it in (student, plain))
    assert mine.keys() == theirs.keys()
    right = [name for name in mine if not name.endswith(" (wrong)")]
    assert len(right) == 5
    assert all(mine[name] > theirs[name] for name in right)


def test_a_model_that_cannot_pack_has_the_same_losses(
    base: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    config = settings(base, objective="aft", negatives=str(data / "dropped.jsonl"), steps=3, replays=0)
    distill(data / "kept.jsonl", tmp_path / "packed", config)
    built = Learner.__init__

    def apart(self: Any, *arguments: Any) -> None:
        built(self, *arguments)
        self.packed = False
        self.model.set_attn_implementation("eager")

    monkeypatch.setattr(Learner, "__init__", apart)
    distill(data / "kept.jsonl", tmp_path / "apart", config)
    assert losses(tmp_path / "apart") == pytest.approx(losses(tmp_path / "packed"), abs=1e-4)


def test_what_is_wrong_is_said(base: Path, data: Path, tmp_path: Path) -> None:
    kept = data / "kept.jsonl"
    with pytest.raises(ConfigError, match="aft needs wrong"):
        distill(kept, tmp_path / "a", settings(base, objective="aft"))
    with pytest.raises(ConfigError, match="sft takes no wrong"):
        distill(kept, tmp_path / "a", settings(base, negatives=str(kept)))
    with pytest.raises(DataError, match="no file"):
        distill(kept, tmp_path / "a", settings(base, objective="dpo", negatives=str(tmp_path / "none")))
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="line 1"):
        distill(kept, tmp_path / "a", settings(base, objective="dpo", negatives=str(tmp_path / "bad.jsonl")))
    write_jsonl(tmp_path / "other.jsonl", [wrong("another task", 7, 1)])
    with pytest.raises(DataError, match="1 of a question that has no right one"):
        distill(
            kept, tmp_path / "a", settings(base, objective="dpo", negatives=str(tmp_path / "other.jsonl"))
        )


def test_the_settings_keep_old_folders_apart() -> None:
    assert DistillConfig(objective="aft").fingerprint("x") != DistillConfig(objective="dpo").fingerprint("x")


def test_the_rejected_of_a_filter_are_read(data: Path) -> None:
    from agentkd.distill.negatives import read_rejected

    lines = (data / "dropped.jsonl").read_text().splitlines()
    assert [it.id for it in read_rejected(data / "dropped.jsonl")] == [
        json.loads(line)["trajectory"]["id"] for line in lines
    ]
