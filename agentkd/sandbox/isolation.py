"""What this machine can isolate with, and how the zygote of the fork sandbox is started.

Two ways. "bubblewrap": the zygote lives in a file system that holds the interpreter and nothing
else. "landlock": it lives in the machine's own, and the sessions are confined by Landlock. In both
each session has its own pid, network, IPC and mount namespaces, a seccomp filter, resource limits
and a user that is not root: its own user namespace, or, when the host is root, a user id of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from agentkd.errors import ConfigError, SandboxError
from agentkd.sandbox.inside import landlock

__all__ = ["ISOLATION_VARIABLE", "Isolation", "choose", "module_paths", "setup", "zygote_command"]

ISOLATION_VARIABLE = "AGENTKD_SANDBOX_ISOLATION"
"""Environment variable that picks "bubblewrap" or "landlock"."""

PRELOAD = (
    "numpy",
    "numpy.random",
    "numpy.linalg",
    "sympy",
    "fractions",
    "statistics",
    "datetime",
    "decimal",
    "re",
)
"""Imported once, by the zygote, where installed."""

_SYSTEM = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache",
           "/usr/share/zoneinfo")  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_MOUNT_POINTS = ("/mnt", "/srv", "/media", "/opt", "/tmp", "/var/tmp")
_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_DAC_OVERRIDE", "CAP_KILL")
# The last one so that a session, whose user is another, gets the signal when the zygote dies.
_INSIDE = Path(__file__).parent / "inside"
_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from inside.zygote import main; main()"


class Isolation(NamedTuple):
    """The chosen way."""

    kind: Literal["bubblewrap", "landlock"]
    bwrap: str | None
    """Path of the ``bwrap`` program."""
    landlock: int
    """Version of the kernel's Landlock; 0 for none."""
    root: bool
    """Whether the host is root, and sessions therefore get a user id of their own."""


def choose(kind: str | None = None) -> Isolation:
    """The way asked for, by argument or :data:`ISOLATION_VARIABLE`; bubblewrap where it is present.

    Raises:
        ConfigError: an unknown name.
        SandboxError: not available here. Nothing weaker is taken instead.
    """
    kind = kind or os.environ.get(ISOLATION_VARIABLE) or None
    if kind not in (None, "bubblewrap", "landlock"):
        raise ConfigError(f"Unknown isolation {kind!r}.", "Known: bubblewrap, landlock.")
    if sys.platform != "linux":
        raise SandboxError(
            f"The fork sandbox needs Linux; this is {sys.platform}.",
            "Use --sandbox docker or --sandbox e2b; `agentkd doctor` says what is missing.",
        )
    bwrap, version = shutil.which("bwrap"), landlock.version()
    if kind is None:
        kind = "bubblewrap" if bwrap else "landlock"
    if kind == "bubblewrap" and bwrap is None:
        raise SandboxError("bubblewrap is not installed.", "Install it: `apt install bubblewrap`.")
    if kind == "landlock" and not version:
        raise SandboxError(
            "Neither bubblewrap nor Landlock is there to isolate with.",
            "Install bubblewrap (`apt install bubblewrap`); `agentkd doctor` says more.",
        )
    return Isolation(kind, bwrap, version, os.geteuid() == 0)  # type: ignore[arg-type]


@functools.cache
def module_paths(imports: tuple[str, ...]) -> tuple[str, ...]:
    """Folders or files of allowed modules that lie outside of the library and site-packages."""
    library = _library()
    found = set()
    for name in imports:
        try:
            spec = importlib.util.find_spec(name.partition(".")[0]) if name != "*" else None
        except (ImportError, ValueError):
            spec = None
        places = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
        for place in places[:1]:
            if place and os.path.isabs(place) and not _beneath(place, library):
                found.add(place)
    return tuple(sorted(found))


def setup(isolation: Isolation, extra: Sequence[str]) -> dict[str, Any]:
    """The zygote's settings: what is readable, importable, preloaded, and where scratch goes."""
    readable = _outermost([*_library(), *_SYSTEM, *extra])
    paths = [*_library(), *(os.path.dirname(path) for path in extra)]
    scratch = "/scratch" if isolation.kind == "bubblewrap" else _mount_point(readable)
    return {
        "readable": readable,
        "devices": _DEVICES,
        "scratch": scratch,
        "landlock": isolation.kind == "landlock",
        "expose": readable if isolation.kind == "landlock" and isolation.root else [],
        "path": [path for path in sys.path if path in paths],
        "preload": PRELOAD,
        "environment": {"LANG": "C.UTF-8", "TZ": "UTC", "PATH": "/nonexistent", **_ONE_THREAD},
        "user": os.geteuid(),
        "group": os.getegid(),
    }


_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}


def zygote_command(
    isolation: Isolation, settings: dict[str, Any], fd: int
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment that start the zygote on the socket ``fd``."""
    python = os.path.realpath(sys.executable)
    # No site module and no user folders: the paths of this process are sent over instead.
    command = [python, "-s", "-S", "-P", "-B", "-c", _START, str(_INSIDE.parent), str(fd)]
    environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", **_ONE_THREAD}
    if isolation.kind == "landlock":
        return command, environment
    assert isolation.bwrap is not None
    view = [isolation.bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    view += ["--unshare-cgroup-try"]
    if isolation.root:
        view += ["--cap-drop", "ALL", *(part for name in _CAPABILITIES for part in ("--cap-add", name))]
    else:
        view += ["--unshare-user"]
    view += _binds([*settings["readable"], str(_INSIDE), python])
    view += ["--perms", "0755", "--dir", "/dev"]
    for device in _DEVICES:
        view += ["--dev-bind", device, device]
    view += [
        "--proc",
        "/proc",
        "--perms",
        "0755",
        "--dir",
        settings["scratch"],
        "--remount-ro",
        "/",
        "--chdir",
        "/",
    ]
    return [*view, "--", *command], environment


def _library() -> list[str]:
    """Where the interpreter keeps its library, and the packages of this environment."""
    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    base = os.path.join(sys.base_exec_prefix, "lib")
    if sys.base_exec_prefix not in ("/usr", "/usr/local", "/"):
        paths.add(base)  # libpython
    paths.update(path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages"))
    if site.ENABLE_USER_SITE is False:
        paths.discard(site.getusersitepackages())
    paths.update(path for path in sys.path if path and _beneath(path, list(paths)))
    return sorted(path for path in paths if path and os.path.exists(path))


def _beneath(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _outermost(paths: Iterable[str]) -> list[str]:
    """The paths that exist, with their targets where they are links, without those beneath others."""
    kept: list[str] = []
    found = {path for path in paths if os.path.exists(path)}
    for path in sorted(found | {os.path.realpath(path) for path in found}):
        if not _beneath(path, kept) or os.path.islink(path):
            kept.append(path)
    return kept


def _binds(paths: Iterable[str]) -> list[str]:
    arguments: list[str] = []
    made = {"/"}
    for path in _outermost(paths):
        for above in reversed(Path(path).parents):
            if str(above) not in made:
                arguments += ["--perms", "0755", "--dir", str(above)]
                made.add(str(above))
        if os.path.islink(path) and os.path.dirname(path) == "/":
            arguments += ["--symlink", os.readlink(path), path]
        else:
            arguments += ["--ro-bind", path, path]
        made.add(path)
    return arguments


def _mount_point(readable: Sequence[str]) -> str:
    """A folder of the machine for sessions to mount their scratch over, unseen by anyone else."""
    for place in _MOUNT_POINTS:
        real = os.path.realpath(place)
        if os.path.isdir(place) and real == place and not any(_beneath(path, [place]) for path in readable):
            return place
    raise SandboxError(
        "No folder to mount a scratch directory over.",
        f"Make one of {', '.join(_MOUNT_POINTS)} an empty folder.",
    )
