"""Served rollouts as a run folder: the ``trajectories.jsonl`` that every other stage reads."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from agentkd.errors import ConfigError, StorageError, boundary
from agentkd.record import AppendLog, write_manifest
from agentkd.trajectory import Trajectory

__all__ = ["RunLog"]


class RunLog:
    """Appends what is served; an earlier log in the folder goes on.

    Rollouts that ended by an error or were cancelled go to ``errors.jsonl``, as in every run.

    Args:
        folder: made when there is none.

    Raises:
        ConfigError: another server is writing there.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logs = {name: AppendLog(folder / name) for name in ("trajectories.jsonl", "errors.jsonl")}
        self._lock = threading.Lock()
        self.saved = self.lost = 0

    def add(self, trajectory: Trajectory) -> bool:
        """Append one rollout; False, and a line on stderr, where the disk does not take it.

        The answer is there all the same, so a full disk does not keep it from the client. The next rollout
        is saved again once there is room.
        """
        name = "errors.jsonl" if trajectory.stop_reason.is_error else "trajectories.jsonl"
        try:
            self._log(name).append(trajectory)
        except (StorageError, ConfigError) as exc:
            with self._lock:
                self.lost += 1
            print(f"{trajectory.id} was not saved: {exc}", file=sys.stderr)
            return False
        with self._lock:
            self.saved += 1
        return True

    def _log(self, name: str) -> AppendLog:
        """A log that can be written; one that a write has failed in is opened again, which mends it."""
        with self._lock:
            if self._logs[name].failed:
                self._logs[name].close()
                self._logs[name] = AppendLog(self.folder / name)
            return self._logs[name]

    def close(self) -> None:
        """Close the files, and the folder with its manifest; says on stderr where that fails.

        A folder that has lost rollouts gets no manifest: it is not the whole of what was served.
        """
        outputs = [log.path for log in self._logs.values()]
        counts = {"saved": self.saved, "lost": self.lost}
        try:
            with boundary(StorageError, f"closing {self.folder}"):
                for log in self._logs.values():
                    log.close()
                if self.lost:
                    raise StorageError(f"{self.lost} rollouts were not saved.")
                write_manifest(self.folder, stage="serve", config={}, counts=counts, outputs=outputs)
        except StorageError as exc:  # the server is ending, and an answer is never at stake any more
            print(f"{self.folder} was not closed: {exc}", file=sys.stderr)
