from __future__ import annotations

import pytest

from agentkd.errors import ConfigError
from agentkd.scorer import score
from agentkd.task import Task


def value(scorer: str, gold: str | None, answer: str | None) -> float | None:
    return score(Task(id="1", question="q", answer=gold, scorer=scorer), answer).value


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("12", "12.0"),
        ("1234567", "1,234,567"),
        ("-3", "\u22123"),
        ("0.5", "1/2"),
        ("1000000000000000000000000000001", "1000000000000000000000000000001"),
        ("0.3333333333", "1/3"),
        ("5", " $5. "),
    ],
)
def test_equal_numbers(gold: str, answer: str) -> None:
    assert value("numeric", gold, answer) == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("12", "13"),
        ("12", "about 12 apples"),
        ("12", "12%"),
        ("1000000000000000000000000000001", "1000000000000000000000000000002"),
        ("12", "nan"),
        ("12", "inf"),
        ("12", ""),
        ("12", None),
        ("12", "12 13"),
        ("12", "1/0"),
        ("5", "1e999999999"),
    ],
)
def test_different_numbers(gold: str, answer: str | None) -> None:
    assert value("numeric", gold, answer) == 0.0


def test_gold_that_is_no_number_cannot_be_scored() -> None:
    assert value("numeric", "twelve", "12") is None


@pytest.mark.parametrize(
    ("gold", "answer", "wanted"),
    [
        ("Silver Harbor", "the silver harbor.", 1.0),
        ("Monday", "monday", 1.0),
        ("Monday", "It is Monday", 1.0),
        ("Monday", "It is not Monday", 0.0),
        ("1802", "1802.0", 1.0),
        ("1", "-1", 0.0),
        ("1.5", "15", 0.0),
        ("Silver Harbor", "Silver Falcon", 0.0),
    ],
)
def test_exact(gold: str, answer: str, wanted: float) -> None:
    assert value("exact", gold, answer) == wanted


def test_f1_counts_shared_words() -> None:
    assert value("f1", "amber silver falcon", "silver falcon") == pytest.approx(0.8)
    assert value("f1", "amber", "silver") == 0.0
    assert value("f1", "the amber", "amber") == 1.0


def test_no_gold_means_no_score() -> None:
    assert value("exact", None, "x") is None


def test_an_unknown_scorer_is_named() -> None:
    with pytest.raises(ConfigError, match="magic"):
        value("magic", "a", "a")
