"""What a person sees of a run: on a terminal a live view, in a log a line now and then."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from agentkd.display import RolloutDisplay
from agentkd.rollouts import Progress
from agentkd.spend import Spent
from agentkd.trajectory import Usage


def progress(done: int, **changes: object) -> Progress:
    fields = {
        "done": done,
        "total": 100,
        "correct": 7,
        "errors": 2,
        "latest": None,
        "in_flight": 8,
        "new": 10,
        "seconds": 60.0,
    }
    return Progress(**{**fields, **changes})  # type: ignore[arg-type]


def shown(display: RolloutDisplay, *steps: Progress, terminal: bool) -> str:
    text = io.StringIO()
    display.console = Console(file=text, force_terminal=terminal, width=140)
    display._live.console = display.console
    with display:
        for step in steps:
            display.show(step)
            display._live.refresh() if terminal else None
    return text.getvalue()


def test_a_log_gets_a_line_now_and_then_and_the_last_one() -> None:
    text = shown(RolloutDisplay("collect"), *(progress(done) for done in range(10, 101)), terminal=False)
    lines = text.splitlines()
    assert len(lines) == 2, "the first and the last of 91"
    assert lines[0].startswith("collect 10/100, 7 correct, 8 in flight, 10 a minute")
    assert "2 errors" in lines[0]
    assert lines[0].endswith("9 min 0 s left")
    assert lines[1].startswith("collect 100/100")
    assert "left" not in lines[1]
    assert "\x1b" not in text


def test_a_terminal_shows_the_last_error_without_its_markup() -> None:
    text = shown(RolloutDisplay("collect"), progress(10, problem="[red]refused[/red]"), terminal=True)
    assert "last error: [red]refused[/red]" in text


@pytest.mark.parametrize(("cost", "said"), [(1.5, "$1.50"), (0.0, "12 model-s")])
def test_money_where_there_is_a_price_else_seconds(cost: float, said: str) -> None:
    spent = Spent(usage=Usage(input_tokens=30, output_tokens=12), cost=cost, seconds=12.0)
    text = shown(RolloutDisplay("collect"), progress(10, spent=spent), terminal=False)
    assert f"42 tokens, {said}" in text
