"""What machines ask a server: is it alive, is it ready, how is it doing."""

from __future__ import annotations

from typing import Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from agentkd.serve.guard import Guard
from agentkd.serve.metrics import METRICS_TYPE

__all__ = ["add_probes"]


class Health(BaseModel):
    """The process runs."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether it wants requests now."""

    status: Literal["ready", "not ready"] = "ready"
    reason: str | None = None


def add_probes(app: FastAPI, guard: Guard) -> None:
    """``/health``, ``/ready`` (503 while it drains or an engine restarts) and ``/metrics``."""

    @app.get("/health")
    async def health() -> Health:
        return Health()

    @app.get("/ready", responses={503: {"model": Readiness, "description": "Not now"}})
    async def ready() -> Readiness:
        if guard.problem is not None:
            body = Readiness(status="not ready", reason=guard.problem)
            return JSONResponse(body.model_dump(), status_code=503)  # type: ignore[return-value]
        return Readiness()

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:  # on a thread of its own: a vLLM is asked for its counts
        return Response(guard.metrics.text(), media_type=METRICS_TYPE)
