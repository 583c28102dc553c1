"""The whole suite again, as an ordinary user, when this one is root."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from .ordinary_user import command, missing


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(missing()), reason=missing() or "all there")
def test_attacks_as_an_ordinary_user() -> None:
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "tests/attack/test_attacks.py",
    ]
    done = subprocess.run(command(words), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout[-2000:])
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 250
    assert "cannot be had here" not in done.stdout, "an isolation was skipped"
