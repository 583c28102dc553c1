"""agentkd: distil a tool-using LLM agent into a small model, and serve it.

The names below are the public surface. They are imported when first used, so that
``import agentkd`` is quick and needs none of the extras. What has the name of its module is imported
from there: ``from agentkd.rollout import rollout``, ``from agentkd.distill import distill``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentkd.agent import StepAgent, build_agent
    from agentkd.engine.student import Student, load_student
    from agentkd.model import openai_model
    from agentkd.record import load_tasks, read_trajectories
    from agentkd.retrieval import Passage, Retriever
    from agentkd.retrieval.bm25 import BM25Retriever
    from agentkd.retrieval.client import HTTPRetriever
    from agentkd.retrieval.index import Index
    from agentkd.rollouts import run_rollouts
    from agentkd.scorer import score
    from agentkd.task import Task
    from agentkd.taskset import Taskset, load_taskset
    from agentkd.tool import load_tool, mcp_tools
    from agentkd.trajectory import Step, StopReason, Trajectory

__version__ = "0.1.0"

_WHERE = {
    "BM25Retriever": "agentkd.retrieval.bm25",
    "HTTPRetriever": "agentkd.retrieval.client",
    "Index": "agentkd.retrieval.index",
    "Passage": "agentkd.retrieval",
    "Retriever": "agentkd.retrieval",
    "Step": "agentkd.trajectory",
    "StepAgent": "agentkd.agent",
    "StopReason": "agentkd.trajectory",
    "Student": "agentkd.engine.student",
    "Task": "agentkd.task",
    "Taskset": "agentkd.taskset",
    "Trajectory": "agentkd.trajectory",
    "build_agent": "agentkd.agent",
    "load_student": "agentkd.engine.student",
    "load_taskset": "agentkd.taskset",
    "load_tasks": "agentkd.record",
    "load_tool": "agentkd.tool",
    "mcp_tools": "agentkd.tool",
    "openai_model": "agentkd.model",
    "read_trajectories": "agentkd.record",
    "run_rollouts": "agentkd.rollouts",
    "score": "agentkd.scorer",
}

__all__ = [
    "BM25Retriever",
    "HTTPRetriever",
    "Index",
    "Passage",
    "Retriever",
    "Step",
    "StepAgent",
    "StopReason",
    "Student",
    "Task",
    "Taskset",
    "Trajectory",
    "__version__",
    "build_agent",
    "load_student",
    "load_tasks",
    "load_taskset",
    "load_tool",
    "mcp_tools",
    "openai_model",
    "read_trajectories",
    "run_rollouts",
    "score",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'agentkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
