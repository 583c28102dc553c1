"""A model behind an OpenAI-compatible endpoint: smolagents' own, with one habit mended."""

from __future__ import annotations

from typing import Any

from smolagents import OpenAIModel

__all__ = ["EndpointModel"]


class EndpointModel(OpenAIModel):
    """See :func:`agentkd.model.openai_model`.

    smolagents lets an ``extra_body`` of the model replace that of a call; here the fields of both
    are sent, and those of the call win.
    """

    def _prepare_completion_kwargs(self, *args: Any, **options: Any) -> dict[str, Any]:
        request: dict[str, Any] = super()._prepare_completion_kwargs(*args, **options)
        body = {**(self.kwargs.get("extra_body") or {}), **(options.get("extra_body") or {})}
        return {**request, "extra_body": body} if body else request
