"""Serving: students, whole agents, and the offline expert, behind an OpenAI-compatible chat endpoint."""

from __future__ import annotations

from agentkd.serve.agent import AgentBackend
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
from agentkd.serve.guard import GuardConfig
from agentkd.serve.server import Server, serve_forever, serve_student, serve_students
from agentkd.serve.students import ServeConfig, open_students
from agentkd.serve.tokens import Tokens, read_tokens

__all__ = [
    "AgentBackend",
    "ChatBackend",
    "ChatChoice",
    "ChatRequest",
    "ChatResult",
    "ExpertBackend",
    "GuardConfig",
    "Listener",
    "RequestError",
    "ServeConfig",
    "Server",
    "StudentBackend",
    "Tokens",
    "create_app",
    "open_students",
    "read_tokens",
    "serve_forever",
    "serve_student",
    "serve_students",
    "student_backend",
]
