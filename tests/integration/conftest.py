"""What the docker and E2B sandboxes are tried against."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentkd.sandbox.remote import RemoteSandbox
from tests.e2b_server import Cloud, cloud
from tests.integration.remote_sandboxes import KINDS, TESTS, Double, start


@pytest.fixture
def clouds() -> Iterator[Cloud]:
    pytest.importorskip("e2b_code_interpreter", reason="the extra e2b is not installed")
    with cloud() as server:
        yield server


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in for docker's client, first on the PATH."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{TESTS / "docker_client.py"}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


@pytest.fixture(params=KINDS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[RemoteSandbox]:
    session = start(request.param, request, timeout=3.0)
    session.send_tools({"double": Double(), "final_answer": object()})
    yield session
    session.cleanup()
