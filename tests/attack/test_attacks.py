"""Every attack, without a boundary and behind it."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import SandboxError
from agentkd.sandbox import CodeFailure, cgroup, fork
from agentkd.sandbox.fork import ForkSandbox, Limits
from agentkd.sandbox.isolation import choose

from . import files, interpreter, network, resources, rights, state
from .record import Attack
from .world import SECRET_VARIABLE, World, harm, unbounded

GROUPS: dict[str, tuple[Attack, ...]] = {
    "Secrets and files": files.ATTACKS,
    "Network and messages between processes": network.ATTACKS,
    "Programs": rights.PROGRAMS,
    "Signals and other processes": rights.SIGNALS,
    "Interfaces of the kernel": rights.KERNEL + rights.X86,
    "Time, memory, processes, disk": resources.ATTACKS,
    "Messages to the host": interpreter.MESSAGES,
    "The interpreter": interpreter.PYTHON,
    "What outlives an action": state.ATTACKS,
}
ATTACKS = [attack for attacks in GROUPS.values() for attack in attacks]
LIMITS = Limits(memory_mb=768, processes=32, scratch_mb=48)
INNOCENT = "open('mine', 'w').write('mine')\n[marker + 1, open('mine').read()]"
SLACK = 8.0
"""Seconds that starting, copying and clearing up may take on a busy machine, beyond the limit."""


@functools.cache
def shown(attack: Attack) -> tuple[str, str]:
    """The harm that an attack does without a boundary, or why it could not."""
    world = World()
    try:
        codes = [*attack.before, attack.code] if attack.control is None else [attack.control]
        answer = unbounded(codes, world, attack.seconds if attack.shows == "ends" else 20.0)
        found, until = harm(attack.shows, answer, world), time.monotonic() + 5
        while not found and attack.shows == "world" and time.monotonic() < until:
            time.sleep(0.05)  # on a busy machine who was killed takes its time to die
            found = harm(attack.shows, answer, world)
        return found, repr(answer)[:300]
    finally:
        world.close()


@pytest.fixture(scope="module", params=["bubblewrap", "landlock"])
def isolation(request: pytest.FixtureRequest) -> str:
    try:
        choose(request.param)
        session = ForkSandbox(isolation=request.param)
        try:
            session("1")
        finally:
            session.close()
    except SandboxError as exc:
        pytest.skip(f"{request.param} cannot be had here: {exc}")
    return str(request.param)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    os.environ[SECRET_VARIABLE] = made.secret
    yield made
    del os.environ[SECRET_VARIABLE]
    made.close()


@pytest.fixture(scope="module")
def sibling(isolation: str, world: World) -> Iterator[ForkSandbox]:
    """Another session of the same zygote, with a state of its own."""
    session = ForkSandbox(isolation=isolation, limits=LIMITS)
    session("kept = 41\nopen('note', 'w').write('kept')")
    yield session
    session.close()


def processes() -> dict[int, tuple[int, int]]:
    """Parent and real user id of every process; not of those that have ended and wait to be reaped."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            lines = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
            if not lines["State"].startswith("Z"):
                found[int(path.parent.name)] = int(lines["PPid"]), int(lines["Uid"].split()[0])
    return found


def root_of(session: ForkSandbox) -> int:
    """Process number of a session's root."""
    info = Path(f"/proc/self/fdinfo/{session._pidfd}").read_text()
    return int(dict(line.split(":", 1) for line in info.splitlines())["Pid"])


def beneath(pid: int) -> dict[int, int]:
    """A process and all its descendants, with their users."""
    seen = processes()
    found = {pid: seen[pid][1]} if pid in seen else {}
    while more := {p: user for p, (parent, user) in seen.items() if parent in found and p not in found}:
        found.update(more)
    return found


def memory() -> int:
    """The most memory that this process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "STATE_SECONDS", 3.0)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack(attack: Attack, isolation: str, world: World, sibling: ForkSandbox) -> None:
    harmed, answer = shown(attack)
    if not harmed and attack.rights:
        pytest.skip(f"does no harm here without a boundary either: {answer}")
    assert harmed, f"the control does no harm: {answer}"
    session = ForkSandbox(imports=("*",), timeout=attack.seconds, limits=LIMITS, isolation=isolation)
    held = memory()
    try:
        root = prepare(session, attack, world)
        began = time.monotonic()
        judge(attack, session, world)
        again = usable(session)
        assert time.monotonic() - began < 2 * attack.seconds + SLACK
        if session._pidfd is not None and root_of(session) == root and again:
            left = beneath(root)
            assert 0 not in left.values()
            assert len(left) <= 2, "more than the root and the state is running"
    finally:
        users, pids = {session.user} - {None, os.getuid()}, beneath(root) if "root" in locals() else {}
        session.close()
    after = processes()
    assert not {pid for pid in pids if pid in after and pid != os.getpid()}
    assert not {pid for pid, (_, user) in after.items() if user in users}
    assert world.touched() == []
    assert memory() - held < 300 << 20
    assert sibling("[kept + 1, open('note').read()]").output == [42, "kept"]


def prepare(session: ForkSandbox, attack: Attack, world: World) -> int:
    """Start the session, look at who it is, run what comes before; the number of its root process."""
    first = "import os, sys\nmarker = 7\n[os.getuid(), list(sys.version_info[:3]), sys.prefix]"
    user, version, _ = session(first).output
    assert user == session.user != 0
    assert version == list(sys.version_info[:3])
    root = root_of(session)
    assert set(beneath(root).values()) == {session.user}
    near = [-1, 0, *range(1, 16), root]
    session.send_variables({"T": {**world.targets, "near": near, "library": [os.__file__]}})
    for code in attack.before:
        session(code)
    return root


def judge(attack: Attack, session: ForkSandbox, world: World) -> None:
    """Run it beside an innocent candidate; neither the host nor that one is harmed."""
    try:
        outcome, beside = session.try_each([attack.code, INNOCENT])
    except CodeFailure:
        assert attack.before or attack.shared, "the session was lost at once"
        return
    if not attack.shared:
        assert beside.error is None
        assert beside.value == [8, "mine"]
    assert outcome.tool_uses == () or attack.name == "flood of calls"
    assert len(outcome.printed) < 60_000
    answer: dict[str, Any] = {"value": outcome.value, "printed": outcome.printed, "error": outcome.error}
    answer["size"] = len(repr(outcome.value)) + len(outcome.printed)
    if attack.shows not in ("ends", "own") and not (attack.grouped and not cgroup.available()):
        assert not harm(attack.shows, answer, world), outcome
    with contextlib.suppress(CodeFailure):  # the session is reported dead
        if outcome.ended:
            session.discard()
        else:
            session.commit(0)


def usable(session: ForkSandbox) -> bool:
    """Whether the session's state is still there; if not, it says so, and a new one can be had."""
    try:
        outcomes = session.try_each(["marker", "marker"])
        if any(outcome.ended or outcome.error for outcome in outcomes):
            session.discard()
        else:
            session.commit(1)
    except CodeFailure as exc:
        assert str(exc)
    try:
        return session("marker").output == 7
    except CodeFailure as exc:
        assert str(exc)
    session.close()
    assert session("1 + 1").output == 2
    return False
