"""How a student acts at test time: its sampler and its router, kept in its folder.

``test_time.json`` stands beside ``student.json``, so that evaluation and serving act alike. Without the
file a student is greedy and decides by its first action, as it was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from agentkd.errors import ConfigError, first_problem
from agentkd.record import read_json, write_json
from agentkd.router import RouterConfig
from agentkd.sampler import SamplerConfig

__all__ = ["TestTime", "load_test_time", "save_test_time"]

FILE = "test_time.json"


class TestTime(BaseModel):
    """Settings that cost or save tokens when a student is used; training knows none of them."""

    __test__: ClassVar[bool] = False  # no test of pytest's, whatever its name

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampler: SamplerConfig | None = None
    """How each action is chosen among several; None takes the one the model gives."""
    router: RouterConfig | None = None
    """Whether tools are used; None leaves it to the student's prompt."""


def load_test_time(folder: Path | str) -> TestTime:
    """Read what a student's folder says; a folder without the file has the defaults.

    Raises:
        ConfigError: a setting does not exist, or has no such value.
        DataError: the file is no JSON.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return TestTime()
    try:
        return TestTime.model_validate(read_json(path))
    except ValidationError as exc:
        raise ConfigError(f"{path}: {first_problem(exc)}.", "Mend the file, or remove it.") from exc


def save_test_time(folder: Path | str, settings: TestTime) -> None:
    """Write it into a student's folder; the defaults leave no file.

    Raises:
        ConfigError: there is no such student.
    """
    path = Path(folder) / FILE
    if not (path.parent / "student.json").is_file():
        raise ConfigError(
            f"{folder} is no student folder.", "Test-time settings are kept in a student's folder."
        )
    if settings == TestTime():
        path.unlink(missing_ok=True)
    else:
        write_json(path, settings.model_dump(mode="json"))
