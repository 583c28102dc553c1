"""A real headless browser for tests; skips with a message where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

__all__ = ["chromium"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium(*, width: int = 1280, height: int = 800) -> Iterator[Any]:
    """A page of a fresh browser, by playwright; what the page complains of is in ``page.complaints``."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with api.sync_playwright() as play:
        # Chromium's own sandbox does not start for root; the pages are the tests' own.
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.complaints = []
            page.on("pageerror", lambda error: page.complaints.append(str(error)))
            page.on("console", lambda said: said.type == "error" and page.complaints.append(said.text))
            yield page
        finally:
            browser.close()
