"""What model-written code may use."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Limits"]


class Limits(BaseModel):
    """What the code of one session may use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_mb: int = Field(default=2048, ge=256)
    """Address space of one process, and the memory of all of a session's together where there
    are control groups; MiB."""
    processes: int = Field(default=64, ge=2)
    """Processes and threads of a session."""
    cpu_seconds: float | None = Field(default=None, gt=0)
    """Processor time of one action; twice its wall-clock limit by default."""
    scratch_mb: int = Field(default=256, ge=1)
    """Size of the working directory, with the copies that candidates get; MiB."""
    session_seconds: float = Field(default=3600.0, gt=0)
    """Wall-clock time of all actions of a session, time in tools apart."""
    seed: int = 0
    """Random numbers of a session start from here."""

    def order(self, timeout: float) -> dict[str, Any]:
        """What a session's root process is told of them.

        Args:
            timeout: wall-clock seconds of one action.
        """
        return {
            "seed": self.seed,
            "scratch_mb": self.scratch_mb,
            "limits": {
                "AS": self.memory_mb << 20,
                "NPROC": self.processes,
                "NOFILE": 256,
                "FSIZE": self.scratch_mb << 20,
                "CPU": max(1, math.ceil(self.cpu_seconds or 2 * timeout)),
                "CORE": 0,
                "MEMLOCK": 0,
            },
        }
