"""What is docker's own: the container asked for, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentkd.errors import SandboxError
from agentkd.sandbox import docker, open_sandbox
from agentkd.sandbox.fork import Limits
from agentkd.sandbox.machine import probe
from tests.integration.remote_sandboxes import start


def test_the_container_has_nothing_to_spare() -> None:
    command = docker.container_command(
        "docker", "n", "image", Limits(memory_mb=512, processes=10, scratch_mb=8)
    )
    text = " ".join(command)
    for part in (
        "--network none",
        "--read-only",
        "--cap-drop ALL",
        "--security-opt no-new-privileges",
        "--user 65534:65534",
        "--memory 512m --memory-swap 512m",
        "--pids-limit 12",
        "--pull never",
        "--rm",
        "size=8m",
        "target=/agentkd/inside,readonly",
    ):
        assert part in text
    assert "--privileged" not in text and "/var/run/docker.sock" not in text
    assert command.index("image") > command.index("--entrypoint")


def fake_client(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "docker"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("script", "said", "hint"),
    [
        (None, "not installed", "Install"),
        ("echo 'Cannot connect to the Docker daemon' >&2; exit 1", "Cannot connect", "start"),
        ("echo 'permission denied while trying to connect' >&2; exit 1", "may not speak", "usermod"),
        (
            'case "$1" in image) exit 1;; esac; echo 28',
            "python:3.12-slim is not here",
            "docker pull python:3.12-slim",
        ),
    ],
)
def test_what_docker_lacks_is_named(
    script: str | None, said: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(docker.IMAGE_VARIABLE, raising=False)
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fake_client(tmp_path, script, monkeypatch)
    with pytest.raises(SandboxError, match=said) as caught:
        open_sandbox("docker")
    assert hint in caught.value.hint


def test_another_image(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(docker.IMAGE_VARIABLE, "absent/image:1")
    with pytest.raises(SandboxError, match="absent/image:1"):
        open_sandbox("docker")


def test_a_container_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_client(
        tmp_path, 'case "$1" in run) echo "no such runtime" >&2; exit 125;; esac; echo 28', monkeypatch
    )
    with pytest.raises(SandboxError, match="no such runtime"):
        docker.DockerSandbox()("1")


def test_the_doctors_probe_holds_here_too(request: pytest.FixtureRequest) -> None:
    session = start("docker stand-in", request)
    assert "65534" in probe(session)
    assert session.about["uid"] == 65534
