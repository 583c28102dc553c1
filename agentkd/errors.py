"""Errors, named by the boundary that was crossed.

::

    AgentkdError              exit code 1
    ├── ConfigError                     2   an option, recipe or environment is wrong
    ├── DataError                       3   a file or record is not what it should be
    ├── ProviderError                   4   a model endpoint failed or answered nonsense
    │   └── ContextOverflowError        4   the conversation no longer fits the model
    ├── SandboxError                    5   the place where model code runs failed
    ├── RetrievalError                  6   an index or retriever failed
    ├── StorageError                    7   the disk is full or not writable
    └── TrainingError                   8   training cannot start or go on

Every message says what happened; ``hint`` says what to do about it. The command line prints
both on one line each, without a traceback, and exits with the code. Ctrl-C exits with 130.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "AgentkdError",
    "ConfigError",
    "ContextOverflowError",
    "DataError",
    "ProviderError",
    "RetrievalError",
    "SandboxError",
    "StorageError",
    "TrainingError",
    "boundary",
    "first_problem",
]


class AgentkdError(Exception):
    """Base of all errors that agentkd raises on purpose.

    Args:
        message: what happened, one sentence.
        hint: what the user can do about it, one sentence; may be empty.
    """

    exit_code: int = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class ConfigError(AgentkdError):
    """An option, a recipe or the environment is wrong."""

    exit_code = 2


class DataError(AgentkdError):
    """A file or record is not what it should be."""

    exit_code = 3


class ProviderError(AgentkdError):
    """A model endpoint failed, or answered something that is not an answer."""

    exit_code = 4


class ContextOverflowError(ProviderError):
    """The conversation no longer fits into the model's context."""


class SandboxError(AgentkdError):
    """The place where model-written code runs failed (not the code itself)."""

    exit_code = 5


class RetrievalError(AgentkdError):
    """An index or a retriever failed."""

    exit_code = 6


class StorageError(AgentkdError):
    """The disk is full, or a folder cannot be written."""

    exit_code = 7


class TrainingError(AgentkdError):
    """Training cannot start or cannot go on."""

    exit_code = 8


@contextmanager
def boundary(error: type[AgentkdError], doing: str, hint: str = "") -> Iterator[None]:
    """Turn whatever a foreign library raises inside the block into ``error``.

    Errors that already have a name pass through; a full disk becomes :class:`StorageError`
    wherever it shows up.

    Args:
        error: the class for anything unnamed.
        doing: what was being done, as in "reading tasks.jsonl".
        hint: what the user can do.
    """
    try:
        yield
    except AgentkdError:
        raise
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise StorageError(
                f"Cannot write while {doing}: {exc.strerror}.",
                "Free some space or choose another folder, then run the same command again.",
            ) from exc
        raise error(f"Failed while {doing}: {exc}.", hint) from exc
    except Exception as exc:
        raise error(f"Failed while {doing}: {type(exc).__name__}: {exc}", hint) from exc


def first_problem(exc: Any) -> str:
    """The first thing that pydantic found wrong, as "field.of.field: what", or "what" of the whole.

    Args:
        exc: a ``pydantic.ValidationError``.
    """
    problem = exc.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else str(problem["msg"])
