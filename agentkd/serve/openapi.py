"""The schema at ``/openapi.json``: what FastAPI cannot know because requests are read by hand.

They are, so that a wrong one is answered by an error of OpenAI's form.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict

from agentkd.serve.request import ChatRequest

__all__ = ["ANSWERS", "CHAT_BODY", "MODEL", "MODELS", "describe"]

_REFERENCE = "#/components/schemas/{model}"


class Fault(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or more."""

    error: Fault


class Usage(BaseModel):
    """Tokens of all calls that the answer took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Message(BaseModel):
    """What the model says."""

    role: str
    content: str
    reasoning_content: str | None = None


class Choice(BaseModel):
    """One answer."""

    model_config = ConfigDict(extra="allow")

    index: int
    message: Message
    finish_reason: str


class Completion(BaseModel):
    """The answer to a request that is not streamed."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: str
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All of them."""

    object: str
    data: list[ModelCard]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


MODELS = {200: {"model": ModelList}, **_errors(401, 403)}
MODEL = {200: {"model": ModelCard}, **_errors(401, 403, 404)}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Completion,
        "description": "The answer, or with `stream` its pieces as server-sent events",
        "content": {"text/event-stream": {}},
    },
    **_errors(400, 401, 403, 404, 408, 413, 429, 500, 503),
}
CHAT_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="ChatRequest")}}},
    }
}


def describe(app: FastAPI) -> None:
    """Complete the schema that FastAPI makes."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            parts = made["components"]["schemas"]
            request = ChatRequest.model_json_schema(ref_template=_REFERENCE)
            parts.update(request.pop("$defs", {}))
            parts["ChatRequest"] = request
            made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{"token": []}, {}]
            for path in made["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # a wrong request is a 400 here
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]
