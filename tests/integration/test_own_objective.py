"""The objectives of docs/objectives.md that are no part of this project: they run, and they learn."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from agentkd.distill import distill
from agentkd.errors import ConfigError
from tests.integration.test_distill import base, losses, settings
from tests.integration.test_preference import data

pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

__all__ = ["base", "data"]

DOCS = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that the page shows, where Python finds it."""
    (code,) = re.findall(r"```python\n(# mine.py\n.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.parametrize("name", ["mine:Focal", "mine:Margin"])
def test_what_the_page_shows_trains(mine: None, base: Path, data: Path, tmp_path: Path, name: str) -> None:
    negatives = str(data / "dropped.jsonl") if name == "mine:Margin" else None
    config = settings(base, objective=name, negatives=negatives, steps=6, learning_rate=3e-3, replays=0)
    student = distill(data / "kept.jsonl", tmp_path / "s", config)
    curve = losses(tmp_path / "s")
    assert curve[-1] < 0.95 * curve[0]
    assert student.training["config"]["objective"] == name
    plain = settings(base, steps=1, replays=0)
    distill(data / "kept.jsonl", tmp_path / "sft", plain)
    assert curve[0] != pytest.approx(losses(tmp_path / "sft")[0], rel=1e-3)


def test_a_preference_of_ones_own_needs_wrong_ones(
    mine: None, base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="mine:Margin needs wrong"):
        distill(data / "kept.jsonl", tmp_path / "s", settings(base, objective="mine:Margin"))
    config = settings(base, objective="mine:Focal", negatives=str(data / "dropped.jsonl"))
    with pytest.raises(ConfigError, match="mine:Focal takes no wrong"):
        distill(data / "kept.jsonl", tmp_path / "s", config)
