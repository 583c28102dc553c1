"""The rollout: one agent, one task, one trajectory. Everything uses this one loop.

Many of them, and a run that goes on where it stopped, are in :mod:`agentkd.rollouts`.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from agentkd.errors import ContextOverflowError, ProviderError, RetrievalError, SandboxError, StorageError
from agentkd.record import provenance
from agentkd.recorder import CannotContinue, NotRecorded, Recorder
from agentkd.scorer import score
from agentkd.spend import LimitReached
from agentkd.task import Task
from agentkd.tool import tool_schema
from agentkd.trajectory import Failure, StopReason, Trajectory, Usage, valid_text

if TYPE_CHECKING:
    from agentkd.agent import StepAgent

__all__ = ["rollout"]


def rollout(
    agent: StepAgent,
    task: Task,
    *,
    sample: int = 0,
    max_seconds: float | None = None,
    config: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
    recorder: Recorder | None = None,
) -> Trajectory:
    """Run one agent on one task. A failed run does not raise: that is a stop reason.

    Args:
        agent: used for this run; its memory is reset, its sandbox session stays open.
        task: the question.
        sample: which of several runs of the same task this is.
        max_seconds: wall-clock limit, checked before every step.
        config: resolved settings to keep in the record.
        labels: free labels to keep in the record.
        recorder: logs every call, and answers those that the log has.

    Raises:
        CannotContinue: the rollout does not fit its log; only with a ``recorder``.
        StorageError: the log cannot be written.
    """
    began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="milliseconds")
    agent.records, agent.context, agent.answers_as_text = [], None, True
    agent.deadline = began + max_seconds if max_seconds is not None else None
    if recorder:
        recorder.begin(config or {}, labels or {})
    with recorder.watching(agent) if recorder else nullcontext():
        answer, reason, failure = _run(agent, task, recorder)
    if agent.cancelled and reason.is_error:  # whatever broke, broke because it was stopped
        reason, failure = StopReason.CANCELLED, None
    if failure is not None:
        failure = failure.model_copy(update={"message": _clean(failure.message, recorder)})
    trajectory = Trajectory(
        id=f"{task.id}#{sample}",
        task=task,
        kind=agent.kind,
        sample=sample,
        model=str(getattr(agent.model, "model_id", None) or type(agent.model).__name__),
        system_prompt=agent.system_prompt,
        tools=tuple(tool_schema(tool) for name, tool in agent.tools.items() if name != "final_answer"),
        context=agent.context,
        steps=tuple(agent.records),
        answer=answer,
        stop_reason=reason,
        failure=failure,
        usage=sum((step.usage for step in agent.records), Usage()),
        seconds=time.monotonic() - began,
        started_at=started_at,
        config=config or {},
        labels=labels or {},
        **provenance(),
    )
    if reason.is_error:
        return trajectory
    return trajectory.model_copy(update={"score": score(task, answer)})


def _clean(message: str, recorder: Recorder | None) -> str:
    text = valid_text(message)
    return recorder.redactor.text(text) if recorder else text


def _run(
    agent: StepAgent, task: Task, recorder: Recorder | None
) -> tuple[str | None, StopReason, Failure | None]:
    from smolagents.utils import AgentError

    from agentkd.agent import RolloutCancelled, RolloutTimeout

    try:
        answer = agent.run(task.question)
    except NotRecorded:
        assert recorder is not None
        if recorder.timed_out:
            return None, StopReason.TIMEOUT, None
        raise
    except (CannotContinue, StorageError):
        raise
    except RolloutCancelled:
        return None, StopReason.CANCELLED, None
    except LimitReached as exc:
        return None, StopReason.CANCELLED, Failure(kind="internal", message=str(exc))
    except ContextOverflowError as exc:
        return None, StopReason.CONTEXT_OVERFLOW, Failure(kind="provider", message=str(exc))
    except ProviderError as exc:
        return None, StopReason.PROVIDER_ERROR, Failure(kind="provider", message=str(exc))
    except SandboxError as exc:
        return None, StopReason.SANDBOX_ERROR, Failure(kind="sandbox", message=str(exc))
    except RetrievalError as exc:
        return None, StopReason.RETRIEVAL_ERROR, Failure(kind="retrieval", message=str(exc))
    except RolloutTimeout:
        if recorder:
            recorder.end()
        return None, StopReason.TIMEOUT, None
    except Exception as exc:
        if isinstance(exc, AgentError) and agent.interrupt_switch:
            return None, StopReason.CANCELLED, None
        return (
            None,
            StopReason.INTERNAL_ERROR,
            Failure(kind="internal", message=f"{type(exc).__name__}: {exc}"),
        )
    text = None if answer is None else valid_text(str(answer))
    last = agent.records[-1] if agent.records else None
    if last is not None and last.is_final:
        return text, StopReason.FINAL_ANSWER, None
    if agent.kind == "cot":
        return None, StopReason.OUTPUT_LIMIT if _cut_off(last) else StopReason.NO_ANSWER, None
    return text if agent.force_answer else None, StopReason.MAX_STEPS, None


def _cut_off(last: Any) -> bool:
    return last is not None and last.finish_reason == "length"
