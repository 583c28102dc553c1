"""Objectives against hand-computed values, their gradients, and their use in training."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from agentkd.distill.batches import pack_batch
from agentkd.distill.config import OBJECTIVES, DistillConfig
from agentkd.errors import ConfigError
from tests.unit.test_distill import example

torch = pytest.importorskip("torch")

from agentkd.distill import objectives  # noqa: E402
from agentkd.distill.choose import check_teacher, make_objective, make_preference  # noqa: E402
from agentkd.distill.objectives import DIVERGENCES, MaskedThought, TeacherObjective  # noqa: E402

# Student (1/2, 1/4, 1/4), teacher (1/4, 1/2, 1/4).
STUDENT, TEACHER = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)


def logits(*chances: float) -> Any:
    return torch.tensor([chances], dtype=torch.float64).log() + 3.0  # a constant changes nothing


def kl(p: Any, q: Any) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a))


def middle() -> list[float]:
    return [(a + b) / 2 for a, b in zip(STUDENT, TEACHER, strict=True)]


def taid_by_hand(t: float) -> float:
    raw = [a ** (1 - t) * b**t for a, b in zip(STUDENT, TEACHER, strict=True)]
    return kl([it / sum(raw) for it in raw], STUDENT)


def smoothed() -> list[float]:
    return [0.9 * it + 0.1 / 3 for it in TEACHER]


BY_HAND = {
    "forward-kl": math.log(2) / 4,  # 1/4 log(1/2) + 1/2 log 2
    "reverse-kl": math.log(2) / 4,  # 1/2 log 2 + 1/4 log(1/2)
    "jsd": 0.5 * kl(TEACHER, middle()) + 0.5 * kl(STUDENT, middle()),
    "taid": taid_by_hand(0.4),
    "first": kl(smoothed(), STUDENT),
    # Second, then first (of those left), then nothing is left to choose: 1/4, then (1/2) / (3/4).
    "plackett-luce": -math.log(0.25) - math.log(2 / 3),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_what_its_formula_says(name: str) -> None:
    teacher = logits(0.3, 0.5, 0.2) if name == "plackett-luce" else logits(*TEACHER)
    value = DIVERGENCES[name](logits(*STUDENT), teacher, 0.0)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(BY_HAND[name], abs=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_its_gradient_is_that_of_its_value(name: str) -> None:
    torch.manual_seed(0)
    student = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 9, dtype=torch.float64)
    progress = 1.0  # where the target of TAID no longer holds the student
    assert torch.autograd.gradcheck(lambda it: DIVERGENCES[name](it, teacher, progress), (student,))


def test_taid_ends_at_forward_kl_and_lets_no_gradient_through_its_target() -> None:
    student, teacher = logits(*STUDENT).requires_grad_(), logits(*TEACHER)
    end = objectives.taid(student, teacher, 1.0)
    assert end.item() == pytest.approx(objectives.forward_kl(student, teacher).item())
    (got,) = torch.autograd.grad(objectives.taid(student, teacher, 0.0), student)
    target = (0.6 * student.detach() + 0.4 * teacher).softmax(-1)
    torch.testing.assert_close(got, student.detach().softmax(-1) - target)


def test_plackett_luce_prefers_the_order_of_the_teacher_to_its_reverse() -> None:
    teacher = logits(0.4, 0.3, 0.2, 0.06, 0.04)
    right = objectives.plackett_luce(teacher, teacher)
    assert right < objectives.plackett_luce(teacher.flip(-1), teacher)


def test_a_share_of_cross_entropy_is_mixed_in() -> None:
    objective = TeacherObjective(objectives.forward_kl, 0.25)
    value = objective.losses(logits(*STUDENT), torch.tensor([0]), logits(*TEACHER), 0.0)
    assert value.item() == pytest.approx(0.25 * math.log(2) / 4 + 0.75 * math.log(2))


def test_masked_inputs_are_own_tokens_only_and_labels_stay() -> None:
    (pack,) = pack_batch([example("a" * n, [1, 2, 3], 60) for n in (1, 2, 3)], 1000)
    own = {row + 1 for row in pack.rows}
    objective = MaskedThought(0.4, mask_id=-1)
    assert objective.inputs(pack, 0.0, "s") == pack.ids
    half = [place for place, token in enumerate(objective.inputs(pack, 1 / 3, "s")) if token == -1]
    full = [place for place, token in enumerate(objective.inputs(pack, 1.0, "s")) if token == -1]
    assert set(full) <= own
    assert 0 < len(half) < len(full) < 0.6 * len(own)
    assert full == [p for p, token in enumerate(objective.inputs(pack, 1.0, "s")) if token == -1]
    assert full != [p for p, token in enumerate(objective.inputs(pack, 1.0, "t")) if token == -1]
    ends = {row + 1 for row in pack.rows if row + 1 not in set(pack.rows)}
    assert not ends & set(full)
    value = objective.losses(logits(*STUDENT), torch.tensor([1]), None, 1.0)
    assert value.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_name_makes_one_objective(name: str) -> None:
    config = DistillConfig(objective=name)
    made = [it for it in (make_objective(config), make_preference(config)) if it is not None]
    assert len(made) == (0 if name == "sft" else 1)


class Half:
    """An objective of one's own."""

    needs_teacher = False

    def __init__(self, config: DistillConfig) -> None:
        self.seed = config.seed

    def inputs(self, pack: Any, progress: float, seed: str) -> list[int]:
        return list(pack.ids)

    def losses(self, student: Any, targets: Any, teacher: Any, progress: float) -> Any:
        return 0.5 * torch.nn.functional.cross_entropy(student, targets, reduction="none")


class Ranked(Half):
    """One that learns from recorded tokens as well."""

    needs_teacher = True
    top = 3


class Margin:
    """A preference of one's own."""

    needs_reference = False
    sft_weight = 1.0

    def __init__(self, config: DistillConfig) -> None:
        self.beta = config.dpo_beta

    def loss(self, right: Any, wrong: Any) -> Any:
        return torch.stack([one.total - right.total for one in wrong]).mean()


class Neither:
    """No objective, although it is made from the settings."""

    def __init__(self, config: DistillConfig) -> None:
        self.needs_teacher = False


def own(name: str, **fields: Any) -> DistillConfig:
    return DistillConfig(objective=f"tests.unit.test_objectives:{name}", **fields)


def test_objectives_and_preferences_plug_in() -> None:
    made = make_objective(own("Half", seed=7))
    assert type(made).__name__ == "Half"
    assert getattr(made, "seed", None) == 7
    assert make_preference(own("Half")) is None
    assert type(make_preference(own("Margin"))).__name__ == "Margin"
    assert make_objective(own("Margin")) is None
    check_teacher(own("Half"))
    check_teacher(own("Ranked", teacher_logprobs="file"))
    with pytest.raises(ConfigError, match="needs a teacher"):
        check_teacher(own("Ranked"))
    with pytest.raises(ConfigError, match="no use for a teacher"):
        check_teacher(own("Half", teacher="model"))


@pytest.mark.parametrize("name", ["sftt", "", ":Name", "module:", "a b:Name", "module:Name:more"])
def test_a_wrong_name_is_told_with_the_right_ones(name: str) -> None:
    with pytest.raises(
        ValidationError, match=r"choose one of sft, masked, .*plackett-luce, or yours as module:Name"
    ):
        DistillConfig(objective=name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing:At", "cannot be loaded: No module named 'nothing'"),
        ("tests.unit.test_objectives:Nothing", "cannot be loaded: .*no attribute 'Nothing'"),
        ("tests.unit.test_objectives:STUDENT", "cannot be loaded: .*not callable"),
        ("tests.unit.test_objectives:Neither", "neither an Objective nor a Preference"),
    ],
)
def test_what_is_no_objective_is_told(name: str, said: str) -> None:
    config = DistillConfig(objective=name)
    for make in (make_objective, make_preference):
        with pytest.raises(ConfigError, match=said):
            make(config)
