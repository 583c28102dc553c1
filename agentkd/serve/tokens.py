"""Bearer tokens: who may ask, and from where without one."""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from agentkd.errors import ConfigError
from agentkd.serve.request import RequestError

__all__ = ["ANYONE", "TOKENS_VARIABLE", "Tokens", "is_loopback", "read_tokens"]

ANYONE = "anyone"
"""The caller's name where no token is needed."""
TOKENS_VARIABLE = "AGENTKD_TOKENS"
"""Environment variable with tokens, one a line or separated by commas, as in a token file."""
_SHORTEST = 16
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOKEN = re.compile(r"[!-~]+")


class Tokens:
    """The tokens that are accepted. None at all: only this machine may ask.

    Args:
        named: the caller's name for the log and the limits, and the token.
    """

    def __init__(self, named: Mapping[str, str] | None = None) -> None:
        self._digests = {name: _digest(token) for name, token in (named or {}).items()}

    def __len__(self) -> int:
        return len(self._digests)

    def check_address(self, host: str) -> None:
        """Refuse to listen where others could ask without a token.

        Raises:
            ConfigError: ``host`` is not a loopback address, and there are no tokens.
        """
        if not self._digests and not is_loopback(host):
            raise ConfigError(
                f"Anyone who reaches {host} could use the models and have code run here.",
                f"Give a token by --token-file or {TOKENS_VARIABLE}, or listen on 127.0.0.1.",
            )

    def caller(self, headers: Mapping[str, str]) -> str:
        """Who asks.

        Without tokens, a request that a web page of another origin, or of a name that was pointed
        at this machine, has a browser send is refused: the page could use the server otherwise.

        Args:
            headers: with names in lower case.

        Raises:
            RequestError: no token or a wrong one (401), or a foreign page (403).
        """
        if not self._digests:
            _refuse_foreign(headers)
            return ANYONE
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = _digest(token.strip()) if scheme.lower() == "bearer" else b""
        found = None
        for name, digest in self._digests.items():  # all of them: the time tells nothing
            if hmac.compare_digest(digest, given):
                found = name
        if found is None:
            raise RequestError(
                "A bearer token is needed, and this is not one that is known here.",
                status=401,
                code="invalid_api_key",
            )
        return found


def read_tokens(file: Path | None = None, environment: Mapping[str, str] = os.environ) -> Tokens:
    """Tokens from a file and from the environment.

    A line is ``TOKEN`` or ``NAME TOKEN``; empty lines and lines that begin with ``#`` are skipped.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line is no token.
    """
    named: dict[str, str] = {}
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"Cannot read the tokens in {file}: {exc}.") from exc
        _add(named, text.splitlines(), str(file))
        if not named:
            raise ConfigError(
                f"{file} holds no token.", f"Put one on each line: {_SHORTEST} characters or more."
            )
    _add(named, re.split(r"[,\n]", environment.get(TOKENS_VARIABLE, "")), TOKENS_VARIABLE)
    return Tokens(named)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _add(named: dict[str, str], lines: list[str], where: str) -> None:
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, token = words if len(words) == 2 else (f"token-{len(named) + 1}", words[0])
        good = len(words) <= 2 and _NAME.fullmatch(name) and _TOKEN.fullmatch(token)
        if not good or len(token) < _SHORTEST or name in named:
            raise ConfigError(  # never the line itself: it may be a secret
                f"{where}, line {number}: not a token.",
                f"A line is TOKEN or NAME TOKEN; a token has {_SHORTEST} characters or more, and each name"
                " stands once.",
            )
        named[name] = token


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()


def _refuse_foreign(headers: Mapping[str, str]) -> None:
    hosts = [headers.get("host", "")]
    if "origin" in headers:
        hosts.append(urlsplit(headers["origin"]).netloc)
    if not all(is_loopback(_without_port(host)) for host in hosts) or len(set(hosts)) > 1:
        raise RequestError(
            "Without tokens this server answers programs and its own page on this machine only.",
            status=403,
            code="foreign_origin",
        )


def _without_port(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
