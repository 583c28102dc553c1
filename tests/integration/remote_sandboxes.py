"""Sessions of the docker and E2B sandboxes, against stand-ins and, where there are any, the real ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import SandboxError
from agentkd.sandbox import docker, e2b
from agentkd.sandbox.remote import RemoteSandbox

TESTS = Path(__file__).parents[1]
IMPORTS = ("os", "socket", "subprocess", "threading", "sys", "json")
MANAGED = {"api_key": "e2b_" + "0" * 40}


def bubblewrap_works() -> bool:
    command = ["bwrap", "--ro-bind", "/", "/", "--unshare-user", "--unshare-pid", "--unshare-net", "true"]
    return bool(shutil.which("bwrap")) and not subprocess.run(command, capture_output=True).returncode


def start(kind: str, request: pytest.FixtureRequest, **options: Any) -> RemoteSandbox:
    """A session of one kind; skips what this machine does not have."""
    if kind == "docker stand-in":
        if not bubblewrap_works():
            pytest.skip("needs bubblewrap")
        request.getfixturevalue("client")
        return docker.DockerSandbox(IMPORTS, **options)
    if kind == "docker":
        try:
            docker.check()
        except SandboxError as exc:
            pytest.skip(f"no docker: {exc}")
        return docker.DockerSandbox(IMPORTS, **options)
    if kind == "e2b cloud":
        if not os.environ.get("E2B_API_KEY"):
            pytest.skip("no key in E2B_API_KEY")
        return e2b.E2BSandbox(IMPORTS, **options)
    url = request.getfixturevalue("clouds").url
    if kind == "e2b debug":
        return e2b.E2BSandbox(IMPORTS, debug=True, sandbox_url=url, **options)
    return e2b.E2BSandbox(IMPORTS, api_url=url, sandbox_url=url, **MANAGED, **options)


KINDS = ["docker stand-in", "e2b", "e2b debug", "docker", "e2b cloud"]


class Double:
    inputs = {"x": {"type": "integer"}}

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x: int) -> int:
        self.calls.append(x)
        return 2 * x


def supervisors() -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"inside.supervisor" in line and b"bwrap" not in line.split(b"\0")[0]:
                found.add(int(entry.name))
    return found
