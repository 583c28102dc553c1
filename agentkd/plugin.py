"""Parts of your own, named as ``package.module:Name``."""

from __future__ import annotations

import importlib
import re
from typing import Any

from agentkd.errors import ConfigError

__all__ = ["is_plugin", "make_plugin"]

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_plugin(name: str) -> bool:
    """True when it reads ``module:Name``; nothing is loaded."""
    return _NAME.fullmatch(name) is not None


def make_plugin(name: str, settings: Any, what: str) -> Any:
    """Import the module, and call what has that name there.

    Args:
        name: ``package.module:Name``.
        settings: the one argument it is called with.
        what: it is to be, for the message ("transform").

    Raises:
        ConfigError: it cannot be imported, or not be called so.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)(settings)
    except (ImportError, AttributeError, TypeError, ValueError) as exc:
        raise ConfigError(
            f"The {what} {name} cannot be loaded: {exc}.",
            "Write it as module:Name, of a module that Python finds (PYTHONPATH).",
        ) from exc
