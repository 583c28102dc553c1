"""A system under evaluation: a student or base model loaded into this process, ready for agents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from agentkd import prompt as prompts
from agentkd.agent_config import AgentConfig
from agentkd.engine.model import EngineModel
from agentkd.errors import ConfigError
from agentkd.sandbox import DEFAULT_BACKEND, open_sandbox
from agentkd.test_time import TestTime, load_test_time

__all__ = ["System", "open_system"]


class System(NamedTuple):
    """A model and the settings of the agents that use it."""

    config: AgentConfig
    model: EngineModel


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

    is_student = (Path(what) / "student.json").is_file()
    if is_student:
        student = load_student(Path(what))
        if kind is not None and kind != student.kind:
            raise ConfigError(f"{what} was distilled as {student.kind!r}.", "Leave --kind out.")
        kind, prompt, max_steps = student.kind, student.system_prompt, student.max_steps
        imports = tuple(student.imports)
    else:
        if kind is None:
            raise ConfigError(
                f"{what} is no student folder, so it has no kind.", "Pass --kind agent or --kind cot."
            )
        prompt = prompts.STUDENT if kind == "agent" else prompts.COT_STUDENT
        max_steps, imports = 5, ()
    if kind == "agent":
        open_sandbox(sandbox)  # raises what is missing before the model is loaded
    if is_student:
        engine = TorchEngine.load(student.base, adapter=Path(what) / "adapter", max_batch=max_batch)
        tokenizer = load_tokenizer(Path(what))
    else:
        engine = TorchEngine.load(what, max_batch=max_batch)
        tokenizer = load_tokenizer(resolve_model(what))
    settings = test_time or (load_test_time(what) if is_student else TestTime())
    config = AgentConfig(
        model=Path(what).name if is_student else what,
        kind=kind,
        prompt=prompt,
        temperature=temperature,
        max_tokens=max_tokens,
        max_steps=max_steps,
        imports=imports,
        sandbox=sandbox,
        sampler=settings.sampler,
        router=settings.router,
    )
    model = EngineModel(engine, tokenizer, config.model, max_tokens=max_tokens, temperature=temperature)
    try:
        yield System(config, model)
    finally:
        engine.close()
