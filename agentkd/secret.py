"""Secrets: keys that must not stand in a log, a trajectory or a message.

What comes from outside is cleaned when it arrives, before it is used, so that the log, the
trajectory and the conversation all show the same text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["REDACTED", "Redactor"]

REDACTED = "[redacted]"

_FORMS = re.compile(
    r"\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bhf_[A-Za-z0-9]{30,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{40,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bAIza[0-9A-Za-z_-]{35}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\b[Bb]earer\s+[A-Za-z0-9._~+/-]{20,}=*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----"
)
_NAMES = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
_SHORTEST = 8
"""Characters; a shorter value would be found in ordinary text."""


class Redactor:
    """Replaces secrets in text and in JSON values.

    Args:
        secrets: exact values, such as the keys in use.
        environment: variables whose names say that they are secret count, too.
    """

    def __init__(
        self, secrets: Iterable[str | None] = (), environment: Mapping[str, str] = os.environ
    ) -> None:
        named = (value for name, value in environment.items() if _NAMES.search(name))
        exact = {value for value in (*secrets, *named) if value and len(value) >= _SHORTEST}
        ordered = sorted(exact, key=len, reverse=True)
        self._exact = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def text(self, text: str) -> str:
        """The text without secrets."""
        if self._exact is not None:
            text = self._exact.sub(REDACTED, text)
        return _FORMS.sub(REDACTED, text)

    def value(self, value: Any) -> Any:
        """A JSON value without secrets in its strings; the keys of objects are left alone."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value
