"""Models: smolagents' own, set up so that there is one place for retries and errors keep their kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentkd.errors import AgentkdError, ConfigError, ContextOverflowError, ProviderError

if TYPE_CHECKING:
    from smolagents import OpenAIModel

__all__ = ["check_endpoint", "openai_model", "provider_error"]


def openai_model(
    model_id: str,
    api_base: str,
    api_key: str | None = None,
    *,
    timeout: float = 600.0,
    retries: int = 2,
    **sampling: Any,
) -> OpenAIModel:
    """A model behind any OpenAI-compatible endpoint.

    Args:
        model_id: as the server lists it.
        api_base: the URL that ends in ``/v1``.
        api_key: sent as a bearer token; local servers need none.
        timeout: seconds for one call.
        retries: how often the client repeats a call on 408, 409, 429, 5xx and lost connections,
            with exponential backoff. smolagents' own retries are off, so they do not multiply.
        sampling: ``temperature``, ``max_tokens``, ``top_p``, ``extra_body``, ...
    """
    if not api_base.startswith(("http://", "https://")):
        raise ConfigError(f"{api_base!r} is not a URL.", "Give something like http://127.0.0.1:8000/v1.")
    from agentkd.endpoint import EndpointModel

    return EndpointModel(
        model_id=model_id,
        api_base=api_base,
        api_key=api_key or "none",
        client_kwargs={"timeout": timeout, "max_retries": retries},
        flatten_messages_as_text=True,
        retry=False,
        **sampling,
    )


def provider_error(exc: Exception) -> AgentkdError:
    """Name the error of a failed model call, with what the user can do about it."""
    import openai

    text = str(exc)
    if isinstance(exc, AgentkdError):
        return exc
    if isinstance(exc, openai.BadRequestError) and (
        getattr(exc, "code", None) == "context_length_exceeded" or "context length" in text
    ):
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


def check_endpoint(api_base: str, model_id: str, api_key: str | None = None) -> None:
    """Ask the endpoint for one token, so that a dead one is noticed before anything starts.

    Raises:
        ProviderError: with what is wrong.
    """
    model = openai_model(model_id, api_base, api_key, timeout=60.0, retries=0, max_tokens=1)
    try:
        answer = model.generate([{"role": "user", "content": [{"type": "text", "text": "Say ok."}]}])
        if answer.content is None:
            raise ProviderError("The endpoint answered without content.")
    except Exception as exc:
        named = provider_error(exc)
        if isinstance(named, ContextOverflowError):
            return
        raise type(named)(f"{api_base}: {named.message}", named.hint) from exc
