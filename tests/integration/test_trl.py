"""Our divergences beside those of TRL, which is no dependency: without it nothing is tested here."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed"),
    pytest.mark.filterwarnings("ignore"),  # TRL's own, and those of what it imports
]

from agentkd.distill.objectives import DIVERGENCES  # noqa: E402


@pytest.fixture(scope="module")
def theirs() -> Any:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    try:
        from trl.experimental.gkd import GKDTrainer
    except (ImportError, RuntimeError) as exc:
        pytest.skip(f"TRL's GKD trainer cannot be imported: {exc}")
    return GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize(("name", "beta"), [("forward-kl", 0.0), ("reverse-kl", 1.0), ("jsd", 0.5)])
def test_a_divergence_is_that_of_trl_token_by_token(theirs: Any, name: str, beta: float) -> None:
    """Over a mask of several turns, which their function takes as labels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(2, 12, 50, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 2:5] = mask[0, 8:11] = mask[1, 6:9] = True
    labels = torch.where(mask, 7, -100)
    by_token = theirs(student, teacher, labels=labels, beta=beta, reduction="none").sum(-1)
    ours = DIVERGENCES[name](student[mask], teacher[mask], 0.0)
    assert ours.shape == by_token.shape == (9,)
    torch.testing.assert_close(ours, by_token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.mean(), theirs(student, teacher, labels=labels, beta=beta))
