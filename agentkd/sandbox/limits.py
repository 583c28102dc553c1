"""What model-written code may use."""

from __future__ import annotations

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
