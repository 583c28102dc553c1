"""A wall clock that jumps: nothing waits for it, and nothing ends by it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from agentkd.calls import iter_calls
from agentkd.collect import collect
from agentkd.gate import GateConfig
from agentkd.spend import Budget
from agentkd.testing import FakeEndpoint
from tests.unit.test_collect_faults import config, teacher


@pytest.mark.timeout(60)
@pytest.mark.parametrize("jump", [3e8, -3e8])
def test_a_clock_that_jumps_loses_nothing_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """By ten years, while the endpoint wants to be left alone. It says for how long as a date, and the run
    has a limit of hours."""
    wall, refused, looked = time.time, list[float](), list[float]()

    def jumping() -> float:
        if refused and time.monotonic() > refused[0] + 0.2:
            looked.append(jump)
            return wall() + jump
        return wall()

    def reply(messages: list[dict[str, Any]]) -> Any:
        if len(messages) == 1:
            return "ok"
        now = time.monotonic()
        if not refused or now < refused[0] + 0.95:
            refused.append(now)
            headers = {
                "date": "Wed, 21 Oct 2015 07:28:00 GMT",
                "retry-after": "Wed, 21 Oct 2015 07:28:01 GMT",
            }
            return 429, b"{}", headers
        return teacher(messages)

    monkeypatch.setattr(time, "time", jumping)
    with FakeEndpoint(reply) as endpoint:
        settings = {"budget": Budget(max_hours=0.1), "gate": GateConfig(requests_per_minute=60_000)}
        done = collect(config(tmp_path, endpoint.url, 12, **settings), tmp_path / "run")
    assert looked
    assert (done.missing, done.stopped) == (0, None)
    assert len(refused) <= 4, "nobody asks before it is time"
    assert time.monotonic() - refused[0] < 20
    assert all(0 <= item.seconds < 20 for item in done.trajectories)
    calls = [call for call in iter_calls(tmp_path / "run") if call.kind == "model"]
    assert len(calls) == 24
    assert all(0 <= call.seconds < 20 for call in calls)


def test_a_clock_that_is_set_back_does_not_lengthen_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall, asked = time.time, [0]

    def slowing() -> float:
        asked[0] += 1
        return wall() - 1000.0 * asked[0]

    monkeypatch.setattr(time, "time", slowing)
    with FakeEndpoint(teacher) as endpoint:
        limited = config(tmp_path, endpoint.url, 2000, budget=Budget(max_hours=0.5 / 3600))
        done = collect(limited, tmp_path / "run")
    assert done.stopped is not None
    assert done.missing > 0
