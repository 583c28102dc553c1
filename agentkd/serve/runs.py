"""Served rollouts as a run folder: the ``trajectories.jsonl`` that every other stage reads."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from agentkd.errors import StorageError, boundary
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
        self._finished = AppendLog(folder / "trajectories.jsonl")
        self._failed = AppendLog(folder / "errors.jsonl")
        self._lock = threading.Lock()
        self.saved = self.lost = 0

    def add(self, trajectory: Trajectory) -> bool:
        """Append one rollout; False, and a line on stderr, where the disk does not take it.

        The answer is there all the same, so a full disk does not keep it from the client.
        """
        log = self._failed if trajectory.stop_reason.is_error else self._finished
        try:
            log.append(trajectory)
        except StorageError as exc:
            with self._lock:
                self.lost += 1
            print(f"{trajectory.id} was not saved: {exc}", file=sys.stderr)
            return False
        with self._lock:
            self.saved += 1
        return True

    def close(self) -> None:
        """Close the files, and the folder with its manifest; says on stderr where that fails.

        A folder that has lost rollouts gets no manifest: it is not the whole of what was served.
        """
        outputs = [self._finished.path, self._failed.path]
        counts = {"saved": self.saved, "lost": self.lost}
        try:
            with boundary(StorageError, f"closing {self.folder}"):
                self._finished.close()
                self._failed.close()
                if self.lost:
                    raise StorageError(f"{self.lost} rollouts were not saved.")
                write_manifest(self.folder, stage="serve", config={}, counts=counts, outputs=outputs)
        except StorageError as exc:  # the server is ending, and an answer is never at stake any more
            print(f"{self.folder} was not closed: {exc}", file=sys.stderr)
