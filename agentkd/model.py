"""Models: smolagents' own, set up so that there is one place for retries and errors keep their kind."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from agentkd.errors import AgentkdError, ConfigError, ContextOverflowError, ProviderError
from agentkd.gate import Fault, Gate, GateConfig
from agentkd.trajectory import Usage

if TYPE_CHECKING:
    import openai
    from smolagents import OpenAIModel
    from smolagents.models import ChatMessage

__all__ = ["check_endpoint", "fault_of", "openai_model", "provider_error", "token_usage"]

_CONTEXT = re.compile(
    r"(?:\b|_)context[ _-]?(?:length|window|size|limit)(?:\b|_)|\bmaximum (?:context|model length)",
    re.IGNORECASE,
)
_PASSED = re.compile(
    r"exceed|too (?:long|large|big|many)|longer than|maximum|at most|less than|does(?: not|n't) fit|overflow"
    r"|reduce|shorten",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(
    r"\b(?:prompt|input|request|conversation)s?\b[^.\n]{0,40} too long\b"
    r"|\btoo many (?:input |prompt )?tokens\b"
    r"|\binput(?:s`?)?[ _](?:tokens?|length)\b[^.\n]{0,80}(?:exceed|must be (?:<|less|at most))"
    r"|\binputs`? must have less than",
    re.IGNORECASE,
)
_RATE = re.compile(
    r"\bper[ -](?:second|minute|hour|day|month)\b|/min\b|rate[ _-]?limit|\b[RT]P[MD]\b|quota"
    r"|(?:wait|retry|try again) (?:before|later|in|after)\b|try again later|too many requests",
    re.IGNORECASE,
)
"""Servers agree on no code for a conversation that is too long, so their words are read; limits of rate
use some of the same."""


def openai_model(
    model_id: str,
    api_base: str,
    api_key: str | None = None,
    *,
    timeout: float = 600.0,
    retries: int = 2,
    gate: Gate | None = None,
    **sampling: Any,
) -> OpenAIModel:
    """A model behind any OpenAI-compatible endpoint.

    Args:
        model_id: as the server lists it.
        api_base: the URL that ends in ``/v1``.
        api_key: sent as a bearer token; local servers need none.
        timeout: seconds for one call.
        retries: how often a call is repeated, see :class:`agentkd.gate.GateConfig`. Neither
            smolagents nor the client repeats anything, so retries do not multiply.
        gate: a gate that is shared with other models of the endpoint; then ``retries`` is its own.
        sampling: ``temperature``, ``max_tokens``, ``top_p``, ``extra_body``, ...
    """
    if not api_base.startswith(("http://", "https://")):
        raise ConfigError(f"{api_base!r} is not a URL.", "Give something like http://127.0.0.1:8000/v1.")
    from agentkd.endpoint import EndpointModel

    return EndpointModel(
        gate or Gate(GateConfig(retries=retries), fault_of, name=api_base),
        model_id=model_id,
        api_base=api_base,
        api_key=api_key or "none",
        timeout=timeout,
        **sampling,
    )


def provider_error(exc: Exception) -> AgentkdError:
    """Name the error of a failed model call, with what the user can do about it."""
    import openai

    text = str(exc)
    if isinstance(exc, AgentkdError):
        return exc
    if isinstance(exc, openai.APIStatusError) and exc.status_code in (400, 413, 422) and _too_long(exc):
        return ContextOverflowError("The conversation no longer fits the model's context.")
    if isinstance(exc, UnicodeEncodeError) and exc.encoding == "ascii":
        return ConfigError("The key has characters that cannot be sent.", "Check --api-key, OPENAI_API_KEY.")
    if isinstance(exc, openai.APITimeoutError):
        return ProviderError("The endpoint did not answer in time.", "Raise --timeout or lower --workers.")
    if isinstance(exc, openai.APIConnectionError):
        return ProviderError("Cannot reach the endpoint.", "Is it running? Check --api-base.")
    if isinstance(exc, (openai.AuthenticationError, openai.PermissionDeniedError)):
        return ProviderError("The endpoint refused the key.", "Set --api-key or OPENAI_API_KEY.")
    if isinstance(exc, openai.NotFoundError):
        return ProviderError(
            f"The endpoint does not know this model or path: {text[:300]}", "Check --model, --api-base."
        )
    if isinstance(exc, openai.APIStatusError):
        return ProviderError(f"The endpoint answered with status {exc.status_code}: {text[:300]}")
    return ProviderError(
        f"The endpoint's answer is not a chat completion ({type(exc).__name__}: {text[:300]}).",
        "Check --api-base: it must be an OpenAI-compatible endpoint, ending in /v1.",
    )


def _too_long(exc: openai.APIStatusError) -> bool:
    """Whether an error says that the conversation does not fit the model's context."""
    body = exc.body if isinstance(exc.body, dict) else {"message": exc.body}
    # Not the whole body: some servers repeat the conversation in it.
    said = [str(exc), exc.code, exc.type, *(body.get(name) for name in ("message", "detail", "error"))]
    text = " ".join(part for part in said if isinstance(part, str))
    if _RATE.search(text):
        return False
    return bool(_TOO_LONG.search(text) or (_CONTEXT.search(text) and _PASSED.search(text)))


def fault_of(exc: Exception) -> Fault:
    """Whether a failed call may succeed later, and when."""
    import openai

    if isinstance(exc, openai.APITimeoutError):
        return Fault("transient", "timeout")
    if isinstance(exc, openai.APIConnectionError):
        return Fault("transient", "connection")
    if isinstance(exc, openai.APIStatusError):
        status, name = exc.status_code, str(exc.status_code)
        if status in (429, 503, 529):
            if getattr(exc, "code", None) == "insufficient_quota":
                return Fault("final", "quota")
            return Fault("overload", name, _retry_after(exc.response.headers))
        passes = status >= 500 or status in (408, 409)
        return Fault("transient" if passes else "final", name)
    if isinstance(exc, UnicodeEncodeError) or not isinstance(
        exc, (ProviderError, openai.APIError, ValueError)
    ):
        return Fault("final", type(exc).__name__)
    # Truncated, empty, or no JSON at all: seen from overloaded proxies.
    return Fault("transient", "garbage", usage=getattr(exc, "usage", None))


def _retry_after(headers: Any) -> float | None:
    """Seconds. A date is compared with the server's own clock, not with ours."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (_date(value) - _date(headers["date"])).total_seconds()
        except (KeyError, TypeError, ValueError):
            return None
    return seconds if 0 < seconds < float("inf") else None


def _date(text: str) -> datetime:
    """A date of a header; one that names no zone is UTC."""
    date = parsedate_to_datetime(text)
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)


def token_usage(answer: ChatMessage) -> Usage:
    """What a call used, as the server counted."""
    used = answer.token_usage
    if used is None:
        return Usage(uncounted_calls=1)
    details = getattr(getattr(answer.raw, "usage", None), "prompt_tokens_details", None)
    cached = getattr(details, "cached_tokens", None)
    return Usage(
        input_tokens=used.input_tokens,
        output_tokens=used.output_tokens,
        cached_tokens=min(cached, used.input_tokens) if isinstance(cached, int) and cached > 0 else 0,
    )


def check_endpoint(api_base: str, model_id: str, api_key: str | None = None) -> None:
    """Ask the endpoint for one token, so that a dead one is noticed before anything starts.

    Raises:
        ProviderError: with what is wrong.
    """
    model = openai_model(model_id, api_base, api_key, timeout=60.0, retries=0, max_tokens=1)
    try:
        model.generate([{"role": "user", "content": [{"type": "text", "text": "Say ok."}]}])
    except Exception as exc:
        named = provider_error(exc)
        if isinstance(named, ContextOverflowError):
            return
        raise type(named)(f"{api_base}: {named.message}", named.hint) from exc
