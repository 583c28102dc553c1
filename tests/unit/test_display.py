"""What a person sees of a run: on a terminal a live view, in a log a line now and then."""

from __future__ import annotations

import io
import time

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
    assert lines[0].startswith("collect 10/100, 7 correct so far, 8 in flight, 10 a minute")
    assert "2 errors" in lines[0]
    assert lines[0].endswith("9 min 0 s left")
    assert lines[1].startswith("collect 100/100")
    assert "left" not in lines[1]
    assert "\x1b" not in text


def test_a_terminal_shows_the_last_error_without_its_markup() -> None:
    text = shown(RolloutDisplay("collect"), progress(10, problem="[red]refused[/red]"), terminal=True)
    assert "last error: [red]refused[/red]" in text


WAIT = (("http://host/v1 asks to wait 3,600 s", 3590.0),)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_wait_is_shown_with_what_is_left_of_it(terminal: bool) -> None:
    steps = [progress(10, waits=WAIT, problem="http://host/v1 429: slow down")]
    text = shown(RolloutDisplay("collect"), *steps, terminal=terminal)
    assert "http://host/v1 asks to wait 3,600 s (59 min 50 s left)" in text
    assert "last error: http://host/v1 429: slow down" in text


def test_a_log_gets_a_line_of_a_wait_no_more_often_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display, text = RolloutDisplay("collect"), io.StringIO()
    display.console = Console(file=text, force_terminal=False, width=200)
    for _ in range(1000):  # a minute and forty seconds in which nothing comes
        now[0] += 0.1
        display.show(progress(10, waits=WAIT, problem="429:\nslow down"))
    lines = text.getvalue().splitlines()
    assert len(lines) == 4
    assert all("asks to wait 3,600 s" in line for line in lines)
    assert ["slow down" in line for line in lines] == [True, False, False, False], "an error is said once"


@pytest.mark.parametrize(("cost", "said"), [(1.5, "$1.50"), (0.0, "12 model-s")])
def test_money_where_there_is_a_price_else_seconds(cost: float, said: str) -> None:
    spent = Spent(usage=Usage(input_tokens=30, output_tokens=12), cost=cost, seconds=12.0)
    text = shown(RolloutDisplay("collect"), progress(10, spent=spent), terminal=False)
    assert f"42 tokens, {said}" in text
