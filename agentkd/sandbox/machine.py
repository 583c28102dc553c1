"""What this machine gives the fork sandbox to isolate with, and the command that mends what is missing.

``look`` gathers facts; ``remedy`` judges them and touches nothing, so that it can be asked about
machines other than this one; ``probe`` tries it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

from agentkd.errors import SandboxError
from agentkd.sandbox import ForkingSandbox, cgroup
from agentkd.sandbox.inside import landlock, seccomp

__all__ = ["Machine", "install_command", "look", "probe", "remedy"]

_SYSTEM_ADMINISTRATION = 21
_INSTALLERS = {
    "apt-get": "apt-get install -y bubblewrap",
    "dnf": "dnf install -y bubblewrap",
    "yum": "yum install -y bubblewrap",
    "zypper": "zypper install -y bubblewrap",
    "pacman": "pacman -S --noconfirm bubblewrap",
    "apk": "apk add bubblewrap",
}
_PROBE = """
import errno, os, sys
sys.path.insert(0, sys.argv[1])
from inside import kernel
user, group = os.geteuid(), os.getegid()
step = "new namespaces"
try:
    kernel.unshare(kernel.NAMESPACES | (kernel.NEW_USER if user else 0))
    if user:
        step = "a user in them"
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    step = "mounts in them"
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/proc", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
except OSError as exc:
    full = "the limit of this user or of this container is reached"
    print(f"{step}: {full if exc.errno == errno.ENOSPC else os.strerror(exc.errno)}")
"""
_FORBIDDEN = """
import os, socket
found = {{"read": False, "written": False, "network": False, "user": os.getuid()}}
for name, mode in (("read", "r"), ("written", "a")):
    try:
        with open({path!r}, mode):
            found[name] = True
    except OSError:
        pass
try:
    with socket.create_connection(("127.0.0.1", {port}), 1):
        found["network"] = True
except OSError:
    pass
found
"""


class Machine(NamedTuple):
    """Facts."""

    platform: str
    """As ``sys.platform`` has it."""
    architecture: str
    user: int
    bwrap: str | None
    """Path of the ``bwrap`` program."""
    landlock: int
    """Version of the kernel's Landlock; 0 for none."""
    filtered: bool
    """Whether there is a seccomp filter for this architecture."""
    namespaces: str
    """Why a process cannot have namespaces of its own; "" when it can."""
    user_ids: int
    """User ids that this process's own user namespace has."""
    container: Literal["", "docker", "podman", "kubernetes", "container"]
    system_admin: bool
    """Whether this process has CAP_SYS_ADMIN."""
    cgroups: str
    """Version of the control groups that can be made here: "v2", "v1" or ""."""
    clone_switch: int | None
    """kernel.unprivileged_userns_clone, of Debian's kernels."""
    most_namespaces: int | None
    """user.max_user_namespaces."""
    apparmor_switch: int | None
    """kernel.apparmor_restrict_unprivileged_userns, of Ubuntu's kernels."""


def look() -> Machine:
    """Facts about this machine, as this process sees it."""
    linux = sys.platform == "linux"
    try:
        seccomp.program(platform.machine())
        filtered = True
    except OSError:
        filtered = False
    return Machine(
        platform=sys.platform,
        architecture=platform.machine(),
        user=os.geteuid(),
        bwrap=shutil.which("bwrap"),
        landlock=landlock.version() if linux else 0,
        filtered=filtered,
        namespaces=_namespaces() if linux else f"{sys.platform} has none",
        user_ids=_user_ids(),
        container=_container(),
        system_admin=bool(_capabilities() >> _SYSTEM_ADMINISTRATION & 1),
        cgroups=cgroup.available() if linux else "",
        clone_switch=_number("/proc/sys/kernel/unprivileged_userns_clone"),
        most_namespaces=_number("/proc/sys/user/max_user_namespaces"),
        apparmor_switch=_number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
    )


def remedy(machine: Machine, kind: str = "bubblewrap") -> str:
    """The one command that most likely mends why the fork sandbox does not start.

    Args:
        machine: the facts.
        kind: the isolation that failed, "bubblewrap" or "landlock".
    """
    if machine.platform != "linux":
        if machine.platform == "darwin":
            return "brew install --cask docker && open -a Docker   # then --sandbox docker, or --sandbox e2b"
        return "pip install 'agentkd[e2b]'   # then --sandbox e2b, with E2B_API_KEY set"
    if not machine.filtered:
        return "pip install 'agentkd[e2b]'   # then --sandbox e2b, or --sandbox docker"
    if machine.namespaces:
        return _namespace_remedy(machine)
    if machine.user == 0 and machine.user_ids <= 65_000:
        return "setpriv --reuid 1000 --regid 1000 --clear-groups agentkd doctor   # run as an ordinary user"
    if kind == "bubblewrap" and machine.bwrap is None:
        return install_command()
    if kind == "landlock" and not machine.landlock:
        return install_command() if machine.bwrap is None else "unset AGENTKD_SANDBOX_ISOLATION"
    if machine.container:
        return _container_command(machine)
    return "bwrap --ro-bind / / --unshare-all true   # says what it lacks"


def probe(session: ForkingSandbox) -> str:
    """Run an action that tries what is forbidden, and end the session.

    What is tried is first done by this process itself, so that it cannot fail for another reason.

    Args:
        session: one that allows the modules os and socket.

    Returns:
        What was seen, for a person.

    Raises:
        SandboxError: it does not start, or does not hold.
        CodeFailure: the action failed.
    """
    with (
        tempfile.NamedTemporaryFile("w", prefix="agentkd-doctor-") as file,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        Path(file.name).chmod(0o666)  # only the boundary is in the way
        port = server.getsockname()[1]
        with Path(file.name).open("a"), socket.create_connection(("127.0.0.1", port), 1):
            pass
        began = time.monotonic()
        try:
            found = session(_FORBIDDEN.format(path=file.name, port=port)).output
            user = getattr(session, "user", None) or found["user"]
        finally:
            session.close()
        took = time.monotonic() - began
    open_ways = [name for name in ("read", "written", "network") if found[name]]
    if open_ways or user == 0:
        what = ", ".join(open_ways) or "it runs as root"
        raise SandboxError(
            f"The boundary does not hold: {what}.", "Report this with the output of agentkd doctor."
        )
    return f"an action ran as user {user}; a file and a port of the host were refused ({took:.1f} s)"


def install_command() -> str:
    """How bubblewrap is installed here."""
    command = next((text for name, text in _INSTALLERS.items() if shutil.which(name)), _INSTALLERS["apt-get"])
    return command if os.geteuid() == 0 else f"sudo {command}"


def _namespace_remedy(machine: Machine) -> str:
    if machine.container and not machine.system_admin:
        return _container_command(machine)
    if machine.user != 0:
        if machine.clone_switch == 0:
            return "sudo sysctl -w kernel.unprivileged_userns_clone=1"
        if machine.most_namespaces == 0 or "limit" in machine.namespaces:
            return "sudo sysctl -w user.max_user_namespaces=16384"
        if machine.apparmor_switch == 1:
            return "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
    elif not machine.system_admin:
        return "setpriv --reuid 1000 --regid 1000 --clear-groups agentkd doctor   # run as an ordinary user"
    if machine.most_namespaces == 0:
        return "sysctl -w user.max_user_namespaces=16384"
    if machine.container:
        return _container_command(machine)
    return "unshare --user --mount --pid --fork true   # says what the kernel refuses"


def _container_command(machine: Machine) -> str:
    if machine.container == "kubernetes":
        context = {
            "seccompProfile": {"type": "Unconfined"},
            "appArmorProfile": {"type": "Unconfined"},
            "procMount": "Unmasked",
            "capabilities": {"add": ["SYS_ADMIN"]},
        }
        place = "/spec/template/spec/containers/0/securityContext"
        patch = json.dumps([{"op": "add", "path": place, "value": context}])
        return f"kubectl patch deployment NAME --type json -p '{patch}'"
    program = "podman" if machine.container == "podman" else "docker"
    opened = " ".join(f"--security-opt {what}=unconfined" for what in ("seccomp", "apparmor", "systempaths"))
    if program == "podman":
        opened = "--security-opt seccomp=unconfined --security-opt unmask=ALL"
    admin = "--cap-add SYS_ADMIN " if machine.user == 0 else ""
    return f"{program} run {admin}{opened} IMAGE agentkd doctor   # start the container like this"


def _namespaces() -> str:
    command = [sys.executable, "-S", "-c", _PROBE, str(Path(__file__).parent)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"the probe did not run ({exc})"
    if done.returncode:
        return f"the probe ended with {done.stderr.strip().splitlines()[-1:] or done.returncode}"
    return done.stdout.strip()


def _container() -> Literal["", "docker", "podman", "kubernetes", "container"]:
    if os.environ.get("KUBERNETES_SERVICE_HOST") or Path("/var/run/secrets/kubernetes.io").exists():
        return "kubernetes"
    if Path("/run/.containerenv").exists():
        return "podman"
    if Path("/.dockerenv").exists():
        return "docker"
    return "container" if os.environ.get("container") else ""  # noqa: SIM112  systemd's own spelling


def _capabilities() -> int:
    return int(_status("CapEff", "0"), 16)


def _status(name: str, default: str) -> str:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return default
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:")), default)


def _user_ids() -> int:
    try:
        lines = Path("/proc/self/uid_map").read_text().splitlines()
    except OSError:
        return 0
    return max((sum(map(int, line.split()[::2])) for line in lines), default=0)


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
