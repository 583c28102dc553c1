"""What an attack is: a record with its code, the harm it does without a boundary, and how that shows."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

Shows = Literal["secret", "world", "value", "big", "ends", "own"]
"""How the harm shows, in the control and in the sandbox alike:

secret  what comes back holds the host's secret
world   a canary file, process or socket of the host is touched
value   the last expression's value is true
big     what comes back is longer than a megabyte
ends    the process hangs, dies or cannot answer any more; the sandbox must stay in its time
own     the value is true; what the code does to its own process is its own affair, and only the
        common promises are checked: host, neighbours and the time limit
"""


@dataclass(frozen=True)
class Attack:
    """One attack.

    The code finds its targets in the dict ``T``; see :class:`tests.attack.world.World`. What it
    finds under ``near`` are process numbers of its surroundings, empty in the control.
    """

    name: str
    code: str
    harm: str
    """What it does without a boundary; a line of the table in docs/security.md."""
    shows: Shows = "value"
    before: tuple[str, ...] = ()
    """Actions that prepare it and are committed."""
    control: str | None = None
    """Harmless variant for the control, where the real one would hurt the machine."""
    seconds: float = 3.0
    """Time limit of the action."""
    shared: bool = False
    """Uses up what the candidates of a session share, so the one beside it may fail too."""
    rights: bool = False
    """The control may lack the right or the kernel the feature; it is then skipped, and says so."""
    grouped: bool = False
    """Only a control group holds it back; elsewhere the limits are those of each process."""


RAW = """
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
arm = platform.machine() == "aarch64"
def call(numbers, *given):
    number = numbers[arm] if isinstance(numbers, tuple) else numbers
    given = [ctypes.c_long(g) if isinstance(g, int) else g for g in given]
    result = libc.syscall(ctypes.c_long(number), *given)
    return -ctypes.get_errno() if result == -1 else result
"""
"""Raw system calls by number: (x86_64, aarch64), or one for both."""

IS_X86 = platform.machine() == "x86_64"
