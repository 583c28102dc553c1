"""How root runs a command as an ordinary user, in a view where that user can read the interpreter.

``python -m tests.attack.ordinary_user COMMAND...`` from the checkout's root.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["USER", "command", "missing"]

USER = 12345
_ROOT = Path(__file__).resolve().parents[2]
_SYSTEM = ("/usr", "/etc", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/sys")
_EMPTY = ("/mnt", "/srv")


def missing() -> str:
    """What this needs and does not find; "" when all is there."""
    if os.geteuid() != 0:
        return "only root can become an ordinary user; run tests/attack as one instead"
    wanted = [name for name in ("bwrap", "setpriv") if shutil.which(name) is None]
    return f"{' and '.join(wanted)} not installed" if wanted else ""


def command(words: Iterable[str]) -> list[str]:
    """The command line: these words, as that user, in a file system that shows no more than is needed."""
    view = ["bwrap"]
    made = {"/"}
    places = [*_SYSTEM, *sorted({sys.base_prefix, sys.prefix, str(_ROOT)})]
    for place in places:
        if not Path(place).exists() or any(
            place.startswith(f"{other}/") or place == other for other in made - {"/"}
        ):
            continue
        for above in reversed(Path(place).parents):
            if str(above) not in made and not any(Path(other) in above.parents for other in _SYSTEM):
                view += ["--perms", "0755", "--dir", str(above)]
        made.add(place)
        view += ["--ro-bind", place, place]
    for place in _EMPTY:
        view += ["--perms", "0755", "--dir", place]
    view += [
        "--dev",
        "/dev",
        "--perms",
        "1777",
        "--tmpfs",
        "/dev/shm",
        "--bind",
        "/proc",
        "/proc",
        "--perms",
        "1777",
        "--dir",
        "/tmp",
        "--chmod",
        "1777",
        "/tmp",
    ]
    view += [
        "--tmpfs",
        "/run",
        "--chdir",
        str(_ROOT),
        "--setenv",
        "HOME",
        "/tmp",
        "--setenv",
        "PYTHONPATH",
        str(_ROOT),
    ]
    view += ["--setenv", "PYTHONDONTWRITEBYTECODE", "1", "--"]
    user = [
        "setpriv",
        "--reuid",
        str(USER),
        "--regid",
        str(USER),
        "--clear-groups",
        "--bounding-set=-all",
        "--inh-caps=-all",
    ]
    return [*view, *user, *words]


if __name__ == "__main__":
    if why := missing():
        sys.exit(why)
    line = command(sys.argv[1:])
    os.execvp(line[0], line)
