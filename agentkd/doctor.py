"""What this machine can do, what is missing, and the one command that mends each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from agentkd.errors import AgentkdError, ConfigError, ProviderError, SandboxError
from agentkd.sandbox import CodeFailure
from agentkd.sandbox.machine import Machine, look, probe, remedy

__all__ = ["PARTS", "Check", "Diagnosis", "examine"]

PARTS = ("sandbox", "python", "extra", "machine", "endpoint")
LEAST_PYTHON = (3, 11)
LEAST_MEMORY_GB = 4.0
LEAST_DISK_GB = 5.0
_TORCH = """
import torch
print(*(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())), sep=", ")
"""


class Check(NamedTuple):
    """One line of the diagnosis."""

    part: str
    """One of :data:`PARTS`."""
    name: str
    state: Literal["ok", "missing", "broken"]
    """"missing": a choice that is not there; "broken": something needed does not work."""
    says: str
    mend: str = ""
    """The command that mends it."""


class Diagnosis(NamedTuple):
    """All lines, the broken ones first."""

    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """0 when nothing needed is broken; SandboxError's, ProviderError's or 1 otherwise."""
        broken = {check.part for check in self.checks if check.state == "broken"}
        if "sandbox" in broken:
            return SandboxError.exit_code
        if "endpoint" in broken:
            return ProviderError.exit_code
        return AgentkdError.exit_code if broken else 0


def examine(
    api_base: str | None = None,
    only: Collection[str] = (),
    machine: Machine | None = None,
    try_fork: Callable[[str], str] | None = None,
    on_check: Callable[[str], None] = lambda name: None,
) -> Diagnosis:
    """Look at everything.

    Args:
        api_base: an endpoint to ask for its models.
        only: names of :data:`PARTS` to look at; all by default.
        machine: facts for the sandbox; those of this machine by default.
        try_fork: starts a session in an isolation and tries what is forbidden, see
            :func:`agentkd.sandbox.machine.probe`.
        on_check: told what is looked at next.

    Raises:
        ConfigError: an unknown part.
    """
    parts: dict[str, Callable[[], Iterator[Check]]] = {
        "sandbox": lambda: chain(_sandbox(machine or look(), try_fork or _try_fork), _other_sandboxes()),
        "python": _python,
        "extra": _extras,
        "machine": _machine,
        "endpoint": lambda: _endpoint(api_base) if api_base is not None else iter(()),
    }
    if unknown := set(only) - set(parts):
        raise ConfigError(f"Unknown part {min(unknown)!r}.", f"Known: {', '.join(PARTS)}.")
    checks: list[Check] = []
    for name in PARTS:
        if not only or name in only or (name == "endpoint" and api_base is not None):
            on_check(name)
            checks += parts[name]()
    return Diagnosis(tuple(sorted(checks, key=lambda check: check.state != "broken")))


# The sandbox.


def _sandbox(machine: Machine, try_fork: Callable[[str], str]) -> Iterator[Check]:
    from agentkd.sandbox import DEFAULT_BACKEND
    from agentkd.sandbox.isolation import ISOLATION_VARIABLE

    asked = os.environ.get(ISOLATION_VARIABLE) or None
    default = asked or ("bubblewrap" if machine.bwrap else "landlock")
    for kind in ("bubblewrap", "landlock"):
        there = machine.platform == "linux" and (machine.bwrap if kind == "bubblewrap" else machine.landlock)
        name = f"{DEFAULT_BACKEND}, {kind}" + (" (default)" if kind == default else "")
        worst: Literal["broken", "missing"] = "broken" if kind == default else "missing"
        if not there:
            yield Check("sandbox", name, worst, _absence(machine, kind), remedy(machine, kind))
            continue
        try:
            yield Check("sandbox", name, "ok", try_fork(kind))
        except AgentkdError as exc:
            because = f" Namespaces: {machine.namespaces}." if machine.namespaces else ""
            yield Check("sandbox", name, worst, exc.message + because, remedy(machine, kind))
        except CodeFailure as exc:
            yield Check("sandbox", name, worst, exc.message, remedy(machine, kind))
    if asked not in (None, "bubblewrap", "landlock"):
        yield Check(
            "sandbox", ISOLATION_VARIABLE, "broken", f"{asked!r} is unknown", f"unset {ISOLATION_VARIABLE}"
        )
    if machine.platform == "linux":
        yield from _isolation_facts(machine)


def _absence(machine: Machine, kind: str) -> str:
    if machine.platform != "linux":
        return f"the fork sandbox needs Linux; this is {machine.platform}: use docker or e2b"
    if kind == "bubblewrap":
        return "bwrap is not on the PATH"
    return "the kernel has no Landlock (5.13 and newer have, where it is switched on)"


def _isolation_facts(machine: Machine) -> Iterator[Check]:
    who = "root; sessions get user ids of their own" if machine.user == 0 else f"user {machine.user}"
    where = f", in {machine.container}" if machine.container else ""
    if machine.namespaces:
        says = f"{who}{where}; refused: {machine.namespaces}"
        yield Check("sandbox", "namespaces", "missing", says, remedy(machine))
    else:
        yield Check("sandbox", "namespaces", "ok", who + where)
    version = f"Landlock {machine.landlock}" if machine.landlock else "no Landlock"
    if machine.filtered:
        yield Check("sandbox", "kernel", "ok", f"{version}; seccomp filter for {machine.architecture}")
    else:
        yield Check(
            "sandbox", "kernel", "broken", f"no seccomp filter for {machine.architecture}", remedy(machine)
        )
    if machine.cgroups:
        yield Check(
            "sandbox",
            "control groups",
            "ok",
            f"{machine.cgroups}: memory is limited for a session as a whole",
        )
    else:
        says = "none that can be written: memory is limited for each process alone"
        delegate = "systemd-run --user --scope -p Delegate=yes agentkd doctor"
        command = (
            delegate
            if shutil.which("systemd-run")
            else "docker run --cgroupns private -v /sys/fs/cgroup:/sys/fs/cgroup:rw IMAGE"
        )
        yield Check("sandbox", "control groups", "missing", says, command)


def _try_fork(kind: str) -> str:
    from agentkd.sandbox.fork import ForkSandbox

    return probe(ForkSandbox(imports=("os", "socket"), isolation=kind))


def _try_docker() -> str:
    from agentkd.sandbox import docker

    docker.check()
    session = docker.DockerSandbox(imports=("os", "socket"))
    return f"{probe(session)}; Python {session.about['version']} in {session.image}"


def _try_e2b() -> str:
    from agentkd.sandbox import e2b

    e2b.check()
    return "the SDK is installed and a key is set (not tried: it costs)"


def _other_sandboxes() -> Iterator[Check]:
    for name, attempt in (("docker", _try_docker), ("e2b", _try_e2b)):
        try:
            yield Check("sandbox", name, "ok", attempt())
        except AgentkdError as exc:
            command = re.search("`(.*)`", exc.hint)
            yield Check("sandbox", name, "missing", exc.message, command[1] if command else exc.hint)
        except CodeFailure as exc:
            yield Check("sandbox", name, "missing", exc.message, "agentkd doctor --only sandbox --json")


# Python and what is installed.


def _python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < LEAST_PYTHON:
        yield Check("python", "version", "broken", version, "uv python install 3.12")
    else:
        yield Check("python", "version", "ok", f"{version} on {sys.platform}, {sys.executable}")


def _extras() -> Iterator[Check]:
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("agentkd") or ()]
        names = importlib.metadata.metadata("agentkd").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "python", "agentkd", "missing", "runs from a checkout that is not installed", "pip install -e ."
        )
        return
    for extra in sorted(set(names) - {"all"}):
        lacking = []
        for requirement in wanted:
            if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
                continue
            if requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                lacking.append(requirement.name)
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                lacking.append(f"{requirement.name} {requirement.specifier} (has {version})")
        if lacking:
            yield Check(
                "extra",
                extra,
                "missing",
                f"not installed: {', '.join(lacking)}",
                f"pip install 'agentkd[{extra}]'",
            )
        else:
            yield Check("extra", extra, "ok", "installed")


# The machine.


def _machine() -> Iterator[Check]:
    yield _torch()
    memory = _memory_gb()
    cores = os.cpu_count() or 1
    if memory is None:
        yield Check("machine", "memory", "ok", f"{cores} cores; memory not known")
    elif memory < LEAST_MEMORY_GB:
        yield Check(
            "machine",
            "memory",
            "missing",
            f"{cores} cores, {memory:.1f} GB free: too little to train",
            "ps aux --sort=-rss | head",
        )
    else:
        yield Check("machine", "memory", "ok", f"{cores} cores, {memory:.1f} GB free")
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    if disk < LEAST_DISK_GB:
        yield Check("machine", "disk", "missing", f"{disk:.1f} GB free here", "du -xsh ~/.cache/* | sort -h")
    else:
        yield Check("machine", "disk", "ok", f"{disk:.0f} GB free here")


def _torch() -> Check:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        says = "not installed: needed to train and serve"
        return Check("machine", "torch", "missing", says, "pip install 'agentkd[train]'")
    done, said = _run([sys.executable, "-c", _TORCH], 120)
    if not done:
        says = f"{version} cannot be imported: {said}"
        return Check("machine", "torch", "missing", says, "pip install --force-reinstall torch")
    return Check("machine", "torch", "ok", f"{version}, {said or 'no GPU: small models on the CPU'}")


def _memory_gb() -> float | None:
    """Memory that is free, or would be if asked for."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 / 1e9
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (OSError, ValueError):
        return None


def _endpoint(api_base: str) -> Iterator[Check]:
    import httpx

    url = api_base.rstrip("/") + "/models"
    key = os.environ.get("OPENAI_API_KEY")
    began = time.monotonic()
    mend = f"curl -sS {url}"
    try:
        reply = httpx.get(url, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=15)
        if reply.status_code in (401, 403):
            mend = "export OPENAI_API_KEY=..."
        reply.raise_for_status()
        models = [str(model["id"]) for model in reply.json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        yield Check("endpoint", api_base, "broken", f"{type(exc).__name__}: {exc}".splitlines()[0], mend)
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeEncodeError):
        yield Check(
            "endpoint", api_base, "broken", "its answer is no list of models; the URL must end in /v1", mend
        )
    else:
        shown = ", ".join(models[:5]) + (", ..." if len(models) > 5 else "")
        yield Check(
            "endpoint", api_base, "ok", f"{shown or 'no models'} ({1000 * (time.monotonic() - began):.0f} ms)"
        )


def _run(command: list[str], seconds: float) -> tuple[bool, str]:
    """Whether a command succeeded, and what it said."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return False, str(exc)
    if done.returncode == 0:
        return True, done.stdout.strip()
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return False, lines[-1] if lines else f"exit code {done.returncode}"
