"""The access log: one JSON object a request, without what was said in it."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from agentkd.errors import ConfigError
from agentkd.secret import Redactor

__all__ = ["AccessLog"]

CONTENT_LIMIT = 20_000
"""Characters of a request that are kept where contents are logged."""


class AccessLog:
    """Appends lines to a file, or to stderr.

    Logging must not fail a request: when the disk is full, lines are lost, and counted.

    Args:
        where: a file, or "-" for stderr.
        contents: whether ``content`` is written; secrets in it are redacted.

    Attributes:
        lost: lines that could not be written.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, where: Path | str, *, contents: bool = False) -> None:
        self._redactor = Redactor() if contents else None
        self._lock = threading.Lock()
        self.lost = 0
        self._file: TextIO = sys.stderr
        if str(where) != "-":
            try:
                self._file = Path(where).open("a", encoding="utf-8")  # noqa: SIM115 (open until close)
            except OSError as exc:
                raise ConfigError(f"Cannot write the access log {where}: {exc.strerror}.") from exc

    def write(self, content: bytes | None = None, **facts: Any) -> None:
        """Add a line.

        Args:
            content: the body of the request; dropped unless contents are logged.
            facts: without those that are None.
        """
        line = {name: value for name, value in facts.items() if value is not None}
        if self._redactor is not None and content is not None:
            text = content[: CONTENT_LIMIT * 4].decode("utf-8", "replace")[:CONTENT_LIMIT]
            line["content"] = self._redactor.text(text)
        text = json.dumps(line)  # ASCII, so that no control character gets into a terminal
        try:
            with self._lock:
                self._file.write(text + "\n")
                self._file.flush()
        except (OSError, ValueError):
            self.lost += 1

    def close(self) -> None:
        """Close the file."""
        if self._file is not sys.stderr:
            self._file.close()
