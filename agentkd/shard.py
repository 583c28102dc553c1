"""Shards: one of ``n`` parts of a taskset, by a hash of the task's id.

The part a task belongs to depends on its id alone, so that it is the same on every machine, and
stays the same when tasks are added.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple, Self

from agentkd.errors import ConfigError
from agentkd.task import Task

__all__ = ["Shard"]


class Shard(NamedTuple):
    """Part ``number`` (from 1) of ``of`` parts."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "2/8".

        Raises:
            ConfigError: it is not of that form.
        """
        found = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
        if not found or not 1 <= int(found.group(1)) <= int(found.group(2)):
            raise ConfigError(
                f"{text!r} is not a shard.", "Write --shard i/n with i from 1 to n, for instance 2/8."
            )
        return cls(int(found.group(1)), int(found.group(2)))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def holds(self, task_id: str) -> bool:
        """Whether a task belongs to this part."""
        digest = hashlib.sha256(task_id.encode("utf-8")).digest()
        return int.from_bytes(digest[:8], "big") % self.of == self.number - 1

    def take(self, tasks: Iterable[Task]) -> list[Task]:
        """The tasks of this part, in their order."""
        return [task for task in tasks if self.holds(task.id)]
