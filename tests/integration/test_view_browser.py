"""The viewer in a real browser: what a person does with it, and how long 10,000 trajectories take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from agentkd.record import write_jsonl
from agentkd.trajectory import Candidate, Failure, Route, Trajectory
from agentkd.view import Viewer, export_page, open_runs
from tests.browser import chromium
from tests.unit.test_report import HOSTILE, make_run
from tests.unit.test_view import write_run


def sampled(run: Trajectory) -> Trajectory:
    first = run.steps[0].model_copy(
        update={
            "route": Route(router="threshold", mode="allowed", direct=False, p_tool=0.83),
            "code": 'x = 3  # three\nfinal_answer("a" * x)',
            "candidates": (
                Candidate(raw="a", code="final_answer(6)", outcome="6", votes=5, chosen=True),
                Candidate(
                    raw="b",
                    code="1/0",
                    repairs=("closed_fence",),
                    failure=Failure(kind="execution", message="division by zero"),
                ),
            ),
        }
    )
    return run.model_copy(update={"steps": (first, first.model_copy(update={"number": 2}))})


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    a = [sampled(make_run(i, i % 2 == 0, text=f"Question {i} of a")) for i in range(30)]
    b = [make_run(i, i < 10, text=f"Question {i} of b") for i in range(20)]
    return [write_run(tmp_path / "a", a), write_run(tmp_path / "b", b, closed=False)]


def opened(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector(".trajectory")


def marked(record: dict[str, Any]) -> dict[str, Any]:
    return {"runs": [["seen", 0], [record["id"], 1]], "tokens": 2}


def shows(page: Any, name: str) -> None:
    """Wait until a trajectory is what is open."""
    page.wait_for_selector(f'.trajectory .where code:text-is("{name}")')


def test_keys_filters_search_and_links(two: list[Path], tmp_path: Path) -> None:
    with chromium() as page, Viewer(open_runs(two), mask=marked) as viewer:
        opened(page, viewer.url)
        shows(page, "products-0#0")
        assert page.inner_text(".py-final") == "final_answer"
        assert page.inner_text(".candidates >> nth=0").startswith("2 candidates")
        assert "mended: closed_fence" in str(page.text_content(".candidates >> nth=0"))
        route = page.inner_text(".route >> nth=0")
        assert route.startswith("used tools") and "p(tool) 0.83" in route
        page.keyboard.press("j")
        page.keyboard.press("ArrowDown")
        shows(page, "products-2#0")
        page.keyboard.press("k")
        shows(page, "products-1#0")
        page.keyboard.press("G")
        shows(page, "products-29#0")
        page.keyboard.press("/")
        page.keyboard.type("Question 17 of")
        page.wait_for_selector("#count >> text=1 of 30")
        page.keyboard.press("Enter")
        page.keyboard.press("j")
        shows(page, "products-17#0")
        page.keyboard.press("m")
        page.wait_for_selector(".mask .learnt >> text=products-17#0")
        link = page.url
        page.keyboard.press("Escape")
        page.wait_for_selector("#count >> text=30 of 30")
        page.select_option("#filters select[aria-label=Result]", "wrong")
        assert page.inner_text("#count") == "15 of 30, 0 correct"
        page.keyboard.press("?")
        assert page.is_visible("#help")
        page.keyboard.press("Escape")
        page.goto("about:blank")
        opened(page, link)
        shows(page, "products-17#0")
        assert page.input_value("#search") == "Question 17 of"
        with (two[0] / "trajectories.jsonl").open("a") as file:
            file.write(make_run(99, True).model_dump_json() + "\n")
        page.wait_for_selector(".fresh")
        page.keyboard.press("r")
        page.wait_for_selector("#count >> text=of 31")
        assert page.complaints == []


def test_two_runs_side_by_side(two: list[Path]) -> None:
    with chromium() as page, Viewer(open_runs(two)) as viewer:
        opened(page, viewer.url + "?two")
        page.wait_for_selector("#detail.two")
        assert page.locator(".trajectory").count() == 2
        page.select_option("#filters select[aria-label='Against beside']", "only beside correct")
        assert page.inner_text("#count") == "5 of 30, 0 correct"
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        page.keyboard.press("G")  # b did not run this task
        page.wait_for_selector("text=b has no trajectory of this task")
        page.select_option("#beside", "-1")
        page.keyboard.press("Escape")
        page.keyboard.press("b")
        page.keyboard.press("k")
        page.wait_for_selector("#detail.two")
        assert page.complaints == []


def test_the_exported_page_needs_nothing_and_runs_nothing_foreign(tmp_path: Path) -> None:
    runs = [make_run(0, True, text=HOSTILE), make_run(1, True, text="b" * 1_000_000), make_run(2, False)]
    out = tmp_path / "page.html"
    export_page(open_runs([write_run(tmp_path / "a", runs)]), out)
    with chromium() as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: page.complaints.append(dialog.message))
        opened(page, out.as_uri())
        text = page.inner_text(".step .thought")
        assert "<script>alert(1)</script>" in text
        assert "\\u202e" in text  # a character that turns the text around is shown by its number
        page.keyboard.press("j")
        page.wait_for_selector("text=Show all 1,000,000 characters")
        page.keyboard.press("/")
        page.keyboard.type("i multiply")
        page.wait_for_selector("#count >> text=1 of 3")
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert page.complaints == []


@pytest.mark.slow
def test_ten_thousand_trajectories_load_in_two_seconds(tmp_path: Path) -> None:
    made = (sampled(make_run(i, i % 3 == 0, text=f"Question {i} " + "words " * 60)) for i in range(10_000))
    write_jsonl(tmp_path / "trajectories.jsonl", made)
    with chromium() as page, Viewer(open_runs([tmp_path])) as viewer:
        times = []
        for _ in range(3):
            page.goto("about:blank")
            began = time.monotonic()
            opened(page, viewer.url)
            times.append(time.monotonic() - began)
        assert page.inner_text("#count") == "10,000 of 10,000, 3,334 correct"
        assert page.locator("#rows .row").count() < 60
        assert min(times) < 2, times
