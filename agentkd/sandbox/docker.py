"""The docker sandbox: the session's processes in a container without a network.

The container holds an interpreter of its own, whose version need not be the host's, and this
package's ``inside`` folder, read-only. It ends with the session, and when its standard input does.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentkd.errors import SandboxError
from agentkd.sandbox.inside.link import START, Link
from agentkd.sandbox.limits import Limits
from agentkd.sandbox.remote import Channel, RemoteSandbox

__all__ = ["DEFAULT_IMAGE", "IMAGE_VARIABLE", "DockerSandbox", "check", "container_command"]

IMAGE_VARIABLE = "AGENTKD_SANDBOX_IMAGE"
"""Environment variable that names the image; any with a Python of 3.9 or newer."""
DEFAULT_IMAGE = "python:3.12-slim"
USER = 65534
"""User and group id in the container."""
_INSIDE = Path(__file__).parent / "inside"
_FOLDER = "/agentkd"
_CLIENT_SECONDS = 30.0


def container_command(docker: str, name: str, image: str, limits: Limits) -> list[str]:
    """The command line that starts a container with a supervisor on standard input and output.

    Args:
        docker: path of the client.
        name: of the container.
        image: what it is made from.
        limits: of the session; those that hold for the container as a whole are set here.
    """
    memory = f"{limits.memory_mb}m"
    scratch = f"/scratch:rw,nosuid,nodev,noexec,mode=0700,uid={USER},gid={USER},size={limits.scratch_mb}m"
    return [
        docker,
        *("run", "--interactive", "--rm", "--name", name, "--pull", "never", "--log-driver", "none"),
        *("--network", "none", "--ipc", "private", "--hostname", "sandbox"),
        *("--read-only", "--tmpfs", scratch, "--workdir", "/"),
        *("--mount", f"type=bind,source={_INSIDE},target={_FOLDER}/inside,readonly"),
        *("--user", f"{USER}:{USER}", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--memory", memory, "--memory-swap", memory),
        *("--pids-limit", str(limits.processes + 2)),  # the supervisor and the process that holds the state
        *("--env", "PYTHONHASHSEED=0", "--env", "PYTHONDONTWRITEBYTECODE=1"),
        *("--entrypoint", "python3", image, "-s", "-c", START, _FOLDER),
    ]


def check(image: str | None = None) -> str:
    """That a container can be started here; the path of the client.

    Raises:
        SandboxError: no client, no daemon, or no image.
    """
    docker = shutil.which("docker")
    mac = sys.platform == "darwin"
    if docker is None:
        command = "brew install --cask docker" if mac else "curl -fsSL https://get.docker.com | sh"
        raise SandboxError("docker is not installed.", f"Install it: `{command}`.")
    image = image or os.environ.get(IMAGE_VARIABLE) or DEFAULT_IMAGE
    failed, said = _client(docker, "version", "--format", "{{.Server.Version}}")
    if failed and "permission denied" in said:
        raise SandboxError(
            "This user may not speak to the docker daemon.",
            "Join its group: `sudo usermod -aG docker $USER`, and log in again.",
        )
    if failed:
        command = "open -a Docker" if mac else "sudo systemctl start docker"
        raise SandboxError(f"The docker daemon does not answer: {said}.", f"Start it: `{command}`.")
    failed, said = _client(docker, "image", "inspect", "--format", "{{.Id}}", image)
    if failed:
        raise SandboxError(f"The image {image} is not here.", f"Fetch it: `docker pull {image}`.")
    return docker


class DockerSandbox(RemoteSandbox):
    """One session in one container. See :class:`agentkd.sandbox.ForkingSandbox`.

    Args:
        imports: modules the code may import beside the harmless ones; "*" for all.
        timeout: seconds one action may take, time in tools apart.
        limits: memory, processes and the like.
        image: with a Python of 3.9 or newer; :data:`IMAGE_VARIABLE` or :data:`DEFAULT_IMAGE` by default.
    """

    def __init__(
        self,
        imports: Sequence[str] = (),
        timeout: float = 10.0,
        limits: Limits | None = None,
        image: str | None = None,
    ) -> None:
        super().__init__(imports, timeout, limits)
        self.image = image or os.environ.get(IMAGE_VARIABLE) or DEFAULT_IMAGE

    def _connect(self) -> Channel:
        docker = check(self.image)
        name = f"agentkd-{os.getpid()}-{secrets.token_hex(4)}"
        return _Container(docker, name, container_command(docker, name, self.image, self.limits))

    def _hint(self) -> str:
        return f"Try `docker run --rm {self.image} python3 --version`, and `agentkd doctor`."


class _Container(Link):
    """The link to a supervisor in a container, and the container's end."""

    def __init__(self, docker: str, name: str, command: Sequence[str]) -> None:
        super().__init__(command)
        self._docker, self._name = docker, name

    def close(self) -> None:
        gone = self.process.poll() is not None
        super().close()
        if not gone and self.process.returncode != 0:  # it did not end by itself
            with contextlib.suppress(SandboxError):
                _client(self._docker, "rm", "--force", self._name)


def _client(docker: str, *arguments: str) -> tuple[bool, str]:
    """Whether a command of the client failed, and the last line it said."""
    try:
        done: Any = subprocess.run(
            [docker, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_CLIENT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return True, str(exc)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode != 0, lines[-1].rstrip(".?") if lines else f"exit code {done.returncode}"
