"""What training refuses, and how it says so: too long, not a number, too little memory, damaged files."""

# The fixtures of another module are taken by their names.
# ruff: noqa: F811
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from agentkd.commands.distill import _more
from agentkd.distill import DistillConfig, distill
from agentkd.distill.batches import hold_out
from agentkd.distill.examples import Example, build_examples
from agentkd.distill.memory import MIB, MemoryNeed, estimate_memory, refuse_too_little, what_to_lower
from agentkd.errors import ConfigError, TrainingError
from agentkd.record import read_trajectories, write_jsonl
from tests.integration.test_distill import base, kept, settings  # noqa: F401
from tests.integration.test_distill_learner import examples
from tests.unit.test_distill import step, trajectory

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
# peft calls transformers by names that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

from agentkd.distill.held_out import Best  # noqa: E402
from agentkd.distill.learner import Learner  # noqa: E402
from agentkd.engine.weights import load_model, load_tokenizer  # noqa: E402


def with_context(model: Path, folder: Path, context: int) -> Path:
    """The same model, which reads less."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    return folder


def test_what_is_longer_than_the_context_is_refused_before_training(
    base: Path, kept: Path, tmp_path: Path
) -> None:
    small = with_context(base, tmp_path / "small", 64)
    with pytest.raises(ConfigError, match=r"context of the base model .* holds 64.*--max-length 64"):
        distill(kept, tmp_path / "s", settings(small))
    assert not (tmp_path / "s" / "loss.jsonl").exists()
    with pytest.raises(ConfigError, match=r"context of the teacher .* holds 64.*--max-length 64"):
        distill(kept, tmp_path / "t", settings(base, objective="forward-kl", teacher=str(small)))


def test_with_the_length_that_is_named_it_trains(base: Path, kept: Path, tmp_path: Path) -> None:
    long = trajectory("long", *(step(n, f"print({n})", "Observation:\n" + "7 " * 40) for n in (1, 2, 3)))
    items = [*read_trajectories(kept), long]
    write_jsonl(tmp_path / "kept.jsonl", items)
    made = build_examples(items, load_tokenizer(base), DistillConfig())
    lengths = sorted(len(it.ids) for it in made.examples)
    small = with_context(base, tmp_path / "small", lengths[-2])
    with pytest.raises(ConfigError, match=rf"long#0 has {lengths[-1]} .*--max-length {lengths[-2]}"):
        distill(tmp_path / "kept.jsonl", tmp_path / "s", settings(small, steps=1))
    student = distill(
        tmp_path / "kept.jsonl", tmp_path / "s", settings(small, steps=1, max_length=lengths[-2], replays=0)
    )
    assert student.training["dropped"] == {"too long": 1}


def test_a_gradient_that_is_no_number_names_its_trajectory(
    base: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Learner.losses

    def poisoned(self: Learner, pack: Any) -> Any:
        losses = plain(self, pack)
        # The value is 0, the gradient is infinity times 0.
        return losses + (losses.sum() * 0).sqrt() if "task 3#0" in pack.examples else losses

    monkeypatch.setattr(Learner, "losses", poisoned)
    with pytest.raises(TrainingError, match=r"gradient of step 1 is not a number: that of task 3#0\."):
        distill(kept, tmp_path / "s", settings(base, batch_size=6))


def test_a_held_out_loss_that_is_no_number_names_its_trajectory(
    base: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [Example(f"task {number}#0", [1, 2], [False, True]) for number in range(6)]
    _, held = hold_out(some, {it.id: it.id.removesuffix("#0") for it in some}, 0.5, 0)
    assert len(held) == 3
    plain, bad = Learner.losses, held[1].id

    def poisoned(self: Learner, pack: Any) -> Any:
        losses = plain(self, pack)
        if self.peft.training:
            return losses
        wrong = torch.tensor([pack.examples[owner] == bad for owner in pack.owners])
        return losses.masked_fill(wrong, float("nan"))

    monkeypatch.setattr(Learner, "losses", poisoned)
    with pytest.raises(TrainingError, match=rf"held-out loss is not a number: that of {bad}\."):
        distill(kept, tmp_path / "s", settings(base, steps=2, eval_fraction=0.5, eval_every=1))


def test_the_estimate_counts_a_local_teacher(base: Path) -> None:
    batch = examples(100)
    alone = estimate_memory(base, settings(base), batch)
    assert alone.teacher == 0 and "teacher" not in str(alone)
    both = estimate_memory(base, settings(base, objective="forward-kl", teacher=str(base)), batch)
    assert both.teacher == 4 * sum(value.numel() for value in load_model(base).parameters())
    assert both.fixed == alone.fixed + both.teacher and "teacher" in str(both)
    need = MemoryNeed(weights=100 * MIB, trained=0, activations=0, logits=0, teacher=100 * MIB)
    with pytest.raises(TrainingError, match="or teacher"):
        refuse_too_little(need, 150 * MIB, DistillConfig())


def test_what_the_advice_says_can_be_typed() -> None:
    advice = what_to_lower(DistillConfig(micro_tokens=2048))
    assert "--set micro_tokens=1024" in advice and "--max-length" in advice
    assert _more(["micro_tokens=1024"], set()) == {"micro_tokens": 1024}


def interrupted(base: Path, kept: Path, out: Path) -> Path:
    """A training with a checkpoint behind its third step."""

    def stop(step_: int, steps: int, loss: float) -> None:
        if step_ == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(kept, out, settings(base), stop)
    return out / "checkpoint.pt"


def test_a_checkpoint_that_is_none_is_told(base: Path, kept: Path, tmp_path: Path) -> None:
    path = interrupted(base, kept, tmp_path)
    state = torch.load(path, weights_only=True)
    parameters = state["parameters"]
    narrower = [parameters[0][:1], *parameters[1:]]  # it would be broadcast
    for wrong, said in (
        ({}, "it has no identity"),
        ([1, 2], "something else"),
        ({**state, "parameters": parameters[1:]}, "taking over .*parameters that are trained here"),
        ({**state, "parameters": narrower}, "taking over .*parameters that are trained here"),
        ({**state, "optimizer": {}}, "taking over"),
        ({**state, "step": "three"}, "taking over"),
    ):
        torch.save(wrong, path)
        with pytest.raises(TrainingError, match=rf"checkpoint\.pt.*{said}|{said}") as caught:
            distill(kept, tmp_path, settings(base))
        assert "remove the folder to start again" in caught.value.hint


def test_a_checkpoint_without_its_parts_falls_back_to_the_one_before(
    base: Path, kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = interrupted(base, kept, tmp_path)
    path.rename(tmp_path / "checkpoint.previous.pt")
    torch.save({"step": 6}, path)
    begun: list[int] = []
    distill(kept, tmp_path, settings(base), lambda step_, steps, loss: begun.append(step_))
    assert begun[0] == 4
    assert "Going on from the one before" in caplog.text


@pytest.mark.parametrize("content", [b"damaged", [torch.zeros(1)], [], {"a": torch.zeros(2)}, None])
def test_damaged_best_parameters_are_told(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "best.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(TrainingError, match=r"reading .*best\.pt") as caught:
        Best(path, [1.0]).values([torch.nn.Parameter(torch.ones(2))])
    assert "start again" in caught.value.hint
