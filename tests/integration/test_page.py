"""The page in a real browser, while the real agent answers."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("transformers")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (group dev)")

from agentkd.sampler import SamplerConfig  # noqa: E402
from agentkd.serve import Server, Tokens, create_app  # noqa: E402
from tests.conftest import action  # noqa: E402
from tests.serving import Talker, scripted_agent  # noqa: E402
from tests.unit.test_render import small_tokenizer  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
expect = playwright.expect
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH (apt install chromium)")

GO_ON = threading.Event()
"""The second step waits for it."""
TOKEN = "a-token-of-the-test"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
PRIMES = "print(sum(n > 1 and all(n % d for d in range(2, n)) for n in range(200)))"
SCRIPT = [
    [
        action(f"I count the primes. {HOSTILE}", f"# by trial division\n{PRIMES}"),
        action("So do I.", PRIMES.replace("n > 1 and ", "1 < n and ")),
        action("I remember.", "print(45)"),
        action("I am wrong.", "print(undefined)"),
    ],
    [action("There are 46.", f"final_answer('46 {HOSTILE}')")],
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    sampler = SamplerConfig(n=4, confidence=None)
    agent = scripted_agent(
        SCRIPT, small_tokenizer(), before=lambda step: step and GO_ON.wait(30), sampler=sampler
    )
    with Server(create_app([agent, Talker()])) as server:
        yield server


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, server: Server) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1000, "height": 1000}, color_scheme=request.param)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.address)
    page.set_default_timeout(20_000)
    yield page
    page.close()
    assert problems == []
    assert all(url.startswith((server.address, "data:")) for url in asked), "nothing is asked elsewhere"


def colours(png: bytes) -> set[tuple[int, ...]]:
    """Those of a screenshot, coarsely."""
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB").resize((100, 100))
    return {tuple(value // 32 for value in pixel) for pixel in image.getdata()}


def test_an_agent_answers_and_every_step_shows(page: Any, tmp_path: Path) -> None:
    expect(page.locator("#model")).to_have_value("script-agent")
    GO_ON.clear()
    page.keyboard.type("How many primes are there below 200?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".observation")
    assert page.locator(".answer").count() == 0, "steps show while the agent works"
    assert page.locator("#send").inner_text() == "Stop"
    assert page.locator("article").get_attribute("aria-busy") == "true"
    during = page.screenshot(path=tmp_path / "during.png")
    GO_ON.set()
    page.wait_for_selector(".answer")
    page.wait_for_selector("article:not([aria-busy])")
    after = page.screenshot(path=tmp_path / "after.png")

    first = page.locator(".step").first
    assert HOSTILE in first.locator(".thought").inner_text()
    assert "# by trial division" in first.locator("pre.code").first.inner_text()
    assert first.locator(".votes").inner_text().split("\n") == ["46", "2, chosen", "45", "1", "failed", "1"]
    assert first.locator("pre.observation").inner_text() == "46"
    assert first.locator("details pre").count() == 4
    assert page.locator(".answer").inner_text() == f"46 {HOSTILE}"
    assert page.locator(".who .cost").inner_text().startswith("2 steps, ")
    assert page.locator("main img, main script").count() == 0 and page.title() == "agentkd"

    assert during != after
    assert len(colours(after)) > 8, "something is drawn"
    dark = page.evaluate("document.documentElement.dataset.theme") == "dark"
    box = page.locator("main").bounding_box()
    assert box["width"] == 1000 and page.evaluate("document.body.scrollWidth") == 1000, "nothing sticks out"
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(18, 20, 25)") == dark


def test_the_keyboard_stops_an_answer_and_a_stop_is_said(page: Any) -> None:
    page.select_option("#model", "talker")
    page.fill("#question", "for ever")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_contain_text("again")
    page.keyboard.press("Escape")
    page.wait_for_selector(".fault")
    assert page.locator(".fault").inner_text() == "Stopped."
    page.fill("#question", "one\ntwo")
    page.keyboard.press("Enter")
    expect(page.locator(".answer").nth(1)).to_have_text("one\ntwo")
    page.click("#clear")
    assert page.locator("article").count() == 0 and page.locator("#welcome").is_visible()


def test_an_error_is_shown_as_one(page: Any) -> None:
    page.select_option("#model", "talker")
    page.fill("#question", "broken")
    page.keyboard.press("Enter")
    page.wait_for_selector(".fault")
    assert page.locator(".fault").inner_text() == "It broke."


def test_a_token_is_asked_for(browser: Any) -> None:
    with Server(create_app([Talker()], tokens=Tokens({"a": TOKEN}))) as server:
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.goto(server.address)
        page.wait_for_selector("#token-dialog[open]")
        page.keyboard.type("a-wrong-one-of-some-length")
        page.keyboard.press("Enter")
        expect(page.locator("#token-problem")).to_contain_text("not known")
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_value("talker")
        page.fill("#question", "let me in")
        page.keyboard.press("Enter")
        expect(page.locator(".answer")).to_have_text("let me in")
        page.close()


def test_the_policy_lets_no_other_script_in(browser: Any, server: Server) -> None:
    page = browser.new_page()
    answer = page.goto(server.address)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for attack in ("document.body.innerHTML = '<b>x</b>'", "setTimeout('1')"):
        done = page.evaluate(
            f"(() => {{ try {{ {attack}; return 'done' }} catch {{ return 'refused' }} }})()"
        )
        assert done == "refused", attack
    page.close()
