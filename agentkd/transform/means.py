"""What a transform is, and what it is given to work with."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from agentkd.errors import AgentkdError, ConfigError
from agentkd.record import AppendLog, iter_jsonl
from agentkd.trajectory import Change, Step, Trajectory

if TYPE_CHECKING:
    from smolagents import Model

    from agentkd.engine.likelihood import Likelihood
    from agentkd.retrieval import Retriever

__all__ = ["Answers", "Means", "Transform", "changed", "rewritten"]

T = TypeVar("T")


class Transform(Protocol):
    """From trajectories to trajectories; made with its settings, a frozen pydantic model."""

    @property
    def name(self) -> str:
        """As it stands in the records."""

    @property
    def settings(self) -> BaseModel:
        """What it was made with."""

    def __call__(self, trajectories: Sequence[Trajectory], means: Means) -> list[Trajectory]:
        """The trajectories to go on with; none of those given is changed in place."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    text: str | None = None
    value: float | None = None


class Answers:
    """What models answered, kept in a file: the same question is asked once.

    Args:
        path: ``answers.jsonl`` of the run.
    """

    def __init__(self, path: Path) -> None:
        known = iter_jsonl(path, _Answer, skip_torn=True) if path.is_file() else ()
        self._known = {answer.key: answer for answer in known}
        self._log = AppendLog(path)
        self._lock = threading.Lock()

    def text(self, question: Any, ask: Callable[[], str]) -> str:
        """The text that was answered to a question (JSON), now or before."""
        found = self._get(question, lambda key: _Answer(key=key, text=ask()))
        return found.text or ""

    def value(self, question: Any, ask: Callable[[], float | None]) -> float | None:
        """The number that was answered to a question (JSON), now or before."""
        return self._get(question, lambda key: _Answer(key=key, value=ask())).value

    def _get(self, question: Any, make: Callable[[str], _Answer]) -> _Answer:
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        with self._lock:
            found = self._known.get(key)
        if found is None:
            found = make(key)
            self._log.append(found)
            with self._lock:
                self._known[key] = found
        return found

    def close(self) -> None:
        """Close the file."""
        self._log.close()


@dataclass(frozen=True)
class Means:
    """What a transform may use; what it needs and is not there is a :class:`ConfigError`."""

    answers: Answers
    model: Model | None = None
    """Behind an endpoint."""
    student: Likelihood | None = None
    student_name: str = ""
    retriever: Retriever | None = None
    teacher_runs: Sequence[Trajectory] = ()
    student_runs: Sequence[Trajectory] = ()
    workers: int = 8
    """Trajectories in work at the same time, where an endpoint is asked."""
    on_progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    """Called with (trajectories done, in all)."""

    def ask(self, messages: Sequence[dict[str, str]], draw: int = 0, **options: Any) -> str:
        """What the model answers to messages.

        Args:
            messages: ``{"role", "content"}``.
            draw: tells several answers to the same messages apart.
            options: of the call, such as ``temperature``.

        Raises:
            ConfigError: no endpoint was named.
            ProviderError: it failed.
        """
        from smolagents.models import ChatMessage, MessageRole

        from agentkd.model import provider_error

        model = self.model
        if model is None:
            raise ConfigError(
                "This transform asks a model.", "Name an endpoint: --api-base URL --model NAME."
            )
        chat = [
            ChatMessage(role=MessageRole(it["role"]), content=[{"type": "text", "text": it["content"]}])
            for it in messages
        ]

        def call() -> str:
            try:
                return str(model.generate(chat, **options).content)
            except AgentkdError:
                raise
            except Exception as exc:
                raise provider_error(exc) from exc

        return self.answers.text([str(model.model_id), list(messages), draw, options], call)

    def nll(self, question: Any, score: Callable[[Likelihood], float | None]) -> float | None:
        """A number of the student, computed once for each question (JSON).

        Raises:
            ConfigError: no student was named.
        """
        student = self.student
        if student is None:
            raise ConfigError("This transform needs a student.", "Name a student or base model: --student.")
        return self.answers.value([self.student_name, question], lambda: score(student))

    def each(self, items: Sequence[Trajectory], work: Callable[[Trajectory], T]) -> Iterator[T]:
        """The results for all trajectories, in their order; several are worked on at a time."""
        with ThreadPoolExecutor(max(1, self.workers), "agentkd-transform") as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for done, future in enumerate(futures, 1):
                    result = future.result()
                    self.on_progress(done, len(items))
                    yield result
            finally:
                for future in futures:
                    future.cancel()


def changed(transform: Transform, trajectory: Trajectory, note: str, **fields: Any) -> Trajectory:
    """A trajectory with other fields, which says who changed it and how."""
    settings = transform.settings.model_dump(mode="json")
    change = Change(by=transform.name, source=trajectory.id, note=note, settings=settings)
    return trajectory.model_copy(update={**fields, "changes": (*trajectory.changes, change)})


def rewritten(step: Step, output: str, thought: str, name: str) -> Step:
    """A step with another text; ``raw`` and what belongs to it stay, as they were emitted."""
    return step.model_copy(
        update={"output": output, "thought": thought, "repairs": (*step.repairs, name), "first_thought": None}
    )
