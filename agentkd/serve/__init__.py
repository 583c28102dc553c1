"""Serving: students, and the offline expert, behind an OpenAI-compatible chat endpoint."""

from __future__ import annotations

from agentkd.serve.app import create_app
from agentkd.serve.backend import (
    ChatBackend,
    ChatChoice,
    ChatRequest,
    ChatResult,
    ExpertBackend,
    Listener,
    RequestError,
    StudentBackend,
    student_backend,
)
from agentkd.serve.server import Server, serve_forever, serve_student

__all__ = [
    "ChatBackend",
    "ChatChoice",
    "ChatRequest",
    "ChatResult",
    "ExpertBackend",
    "Listener",
    "RequestError",
    "Server",
    "StudentBackend",
    "create_app",
    "serve_forever",
    "serve_student",
    "student_backend",
]
