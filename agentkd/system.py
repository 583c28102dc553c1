"""A system under evaluation: a student or base model loaded into this process, ready for agents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from agentkd import prompt as prompts
from agentkd.agent_config import AgentConfig
from agentkd.engine.model import EngineModel
from agentkd.errors import ConfigError
from agentkd.sandbox import DEFAULT_BACKEND, open_sandbox
from agentkd.test_time import TestTime, load_test_time

if TYPE_CHECKING:
    from agentkd.engine.student import Student

__all__ = ["System", "open_system", "student_config"]


class System(NamedTuple):
    """A model and the settings of the agents that use it."""

    config: AgentConfig
    model: EngineModel


def student_config(
    student: Student,
    *,
    sandbox: str = DEFAULT_BACKEND,
    temperature: float = 0.0,
    max_tokens: int = 512,
    test_time: TestTime | None = None,
) -> AgentConfig:
    """The settings of a student's agents, for evaluation and serving alike.

    Args:
        student: from :func:`agentkd.engine.student.load_student`.
        sandbox: where its code runs.
        temperature, max_tokens: sampling of one step.
        test_time: sampler and router; what stands in the student's folder by default.

    Raises:
        ConfigError: those settings cannot be read.
    """
    test_time = test_time or load_test_time(student.path)
    search: dict[str, Any] = {}
    if student.passages is not None:
        search = {"passages": True, "search_k": student.passages, "search_tokens": student.passage_tokens}
    return AgentConfig(
        model=student.path.resolve().name,
        kind=student.kind,
        prompt=student.system_prompt,
        temperature=temperature,
        max_tokens=max_tokens,
        max_steps=student.max_steps,
        imports=tuple(student.imports),
        sandbox=sandbox,
        sampler=test_time.sampler,
        router=test_time.router,
        **search,
    )


@contextmanager
def open_system(
    what: str,
    *,
    kind: Literal["agent", "cot"] | None = None,
    sandbox: str = DEFAULT_BACKEND,
    temperature: float = 0.0,
    max_tokens: int = 512,
    max_batch: int = 32,
    test_time: TestTime | None = None,
) -> Iterator[System]:
    """Load a student folder or a base model; the engine ends with the block.

    Args:
        what: a student folder, "smollm2-135m", a Hub id or a model folder.
        kind: how it is asked; a student's own by default, needed for a base model.
        sandbox: where its code runs.
        temperature, max_tokens: sampling of one step.
        max_batch: sequences decoded together.
        test_time: sampler and router; what stands in the student's folder by default.

    Raises:
        ConfigError: no such model, no kind, or an unknown sandbox.
        SandboxError: the sandbox is not available here.
    """
    from agentkd.engine.student import load_student
    from agentkd.engine.torch_engine import TorchEngine
    from agentkd.engine.weights import load_tokenizer, resolve_model

    sampling: dict[str, Any] = {"sandbox": sandbox, "temperature": temperature, "max_tokens": max_tokens}
    student = load_student(Path(what)) if (Path(what) / "student.json").is_file() else None
    if student is not None:
        if kind is not None and kind != student.kind:
            raise ConfigError(f"{what} was distilled as {student.kind!r}.", "Leave --kind out.")
        config = student_config(student, test_time=test_time, **sampling)
    elif kind is not None:
        prompt = prompts.STUDENT if kind == "agent" else prompts.COT_STUDENT
        acting = (test_time or TestTime()).model_dump()
        config = AgentConfig(model=what, kind=kind, prompt=prompt, **sampling, **acting)
    else:
        raise ConfigError(
            f"{what} is no student folder, so it has no kind.", "Pass --kind agent or --kind cot."
        )
    if config.kind == "agent":
        open_sandbox(sandbox)  # raises what is missing before the model is loaded
    if student is not None:
        engine = TorchEngine.load(student.base, adapter=student.adapter, max_batch=max_batch)
        tokenizer = load_tokenizer(student.path)
    else:
        engine = TorchEngine.load(what, max_batch=max_batch)
        tokenizer = load_tokenizer(resolve_model(what))
    model = EngineModel(engine, tokenizer, config.model, max_tokens=max_tokens, temperature=temperature)
    try:
        yield System(config, model)
    finally:
        engine.close()
