"""From student folders to the models of an endpoint: engine, checks, tools, and the agents on top."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentkd.agent_config import AgentConfig, search_tools
from agentkd.engine.probe import check_files, probe_student
from agentkd.engine.student import Student, check_base, load_student
from agentkd.errors import ConfigError
from agentkd.retrieval.source import open_corpus
from agentkd.router import parse_router
from agentkd.sampler import SamplerConfig
from agentkd.sandbox import DEFAULT_BACKEND, open_sandbox
from agentkd.serve.agent import AgentBackend
from agentkd.serve.backend import AGENT_SUFFIX, ChatBackend, StudentBackend, refuse_twins
from agentkd.serve.choice import EngineChoice, choose_engine
from agentkd.serve.runs import RunLog
from agentkd.system import student_config

if TYPE_CHECKING:
    from agentkd.engine import Engine

__all__ = ["ServeConfig", "open_students"]


class ServeConfig(BaseModel):
    """How students are served. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["auto", "embedded", "vllm"] = "auto"
    """What generates; see :mod:`agentkd.serve.choice`."""
    vllm_python: str = sys.executable
    """The interpreter that has vllm: it pins its own torch and lives in its own environment."""
    vllm_args: tuple[str, ...] = ()
    """Further arguments of vLLM's server, as they are."""
    vllm_seconds: float = Field(default=600.0, gt=0)
    """Seconds that vLLM may take to be ready; its first start compiles."""
    probe: bool = True
    """Ask one known trajectory before serving, and refuse a student that has drifted."""
    max_batch: int = Field(default=32, ge=1)
    """embedded: sequences decoded at the same time."""
    threads: int | None = Field(default=None, ge=1)
    """embedded: CPU threads of each student."""
    sandbox: str = DEFAULT_BACKEND
    """Where the agents' code runs: "fork", "e2b", "docker" or "local"."""
    corpus: str | None = None
    """What the agents' search tool searches: passages (.jsonl), an index, or a retriever's URL."""
    max_tokens: int = Field(default=512, ge=1)
    """Sampled tokens of one step of an agent."""
    actions: int | None = Field(default=None, ge=1, le=64)
    """Actions sampled at each step, at most; None: as the student's settings say; 1: no sampling."""
    router: str | None = None
    """Whether agents use tools, see :func:`agentkd.router.parse_router`; None: the student's setting."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds for one answer of an agent."""
    save_runs: Path | None = None
    """Run folder that every served rollout is appended to; None keeps nothing."""


@contextmanager
def open_students(
    folders: Sequence[Path | str], config: ServeConfig, say: Callable[[str], None] = lambda line: None
) -> Iterator[list[ChatBackend]]:
    """The models of some student folders; engines and child processes end with the block.

    Args:
        folders: what ``agentkd distill`` wrote; each is named as its folder.
        config: how they are served.
        say: told which engine was chosen and why, and what was checked.

    Raises:
        ConfigError: no student folder, two of one name, one that has drifted, or an engine that
            cannot serve it.
        SandboxError: the sandbox of the agents is not available here.
        ProviderError: vLLM did not start.
    """
    students = [load_student(folder) for folder in folders]
    agents = [student for student in students if student.kind == "agent"]
    names = [student.path.resolve().name for student in students]
    refuse_twins([*names, *(student.path.resolve().name + AGENT_SUFFIX for student in agents)])
    if agents:
        open_sandbox(config.sandbox)  # raises what is missing before the models are loaded
    for student in students:
        check_files(student)
        if config.probe:
            _require_record(student)
    choice = choose_engine(config.engine, config.vllm_python)
    say(choice.reason)
    with _terminated_in_order(), ExitStack() as stack:
        runs = RunLog(config.save_runs) if config.save_runs and agents else None
        if runs is not None:
            stack.callback(runs.close)
        retriever = open_corpus(config.corpus).retriever if agents else None
        backends: list[ChatBackend] = []
        for student, engine in zip(students, _engines(students, choice, config, stack), strict=True):
            tokenizer = _checked(student, engine, config, say)
            settings = _agent_config(student, config)
            label = f"agentkd {student.kind} student of {student.base}"
            backends.append(StudentBackend(engine, tokenizer, settings.model, label))
            if student.kind == "agent":
                tools = search_tools(retriever, settings)
                if student.tools and not tools:
                    say(f"{settings.model} learnt to search, and there is nothing to search: pass --corpus.")
                agent = AgentBackend(engine, tokenizer, settings, tools, runs=runs)
                stack.callback(agent.close)
                agent.sessions.prepare()
                backends.append(agent)
        yield backends


def _require_record(student: Student) -> None:
    """Refuse a folder that does not say what the student answered when it was finished."""
    if not (student.path / "parity.json").is_file():
        raise ConfigError(
            f"{student.path} has no parity.json, so nobody can tell whether it has drifted.",
            "Bring the file back, or distil again; --no-probe serves it all the same.",
        )


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """SIGTERM ends the block as an exception does, so that what was started is stopped."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _engines(
    students: Sequence[Student], choice: EngineChoice, config: ServeConfig, stack: ExitStack
) -> list[Engine]:
    """One for each student, of the base model it was trained on; closed by the stack."""
    from agentkd.engine.weights import model_hash, resolve_model

    for base in {student.base for student in students}:
        found = model_hash(resolve_model(base))
        for student in students:
            if student.base == base:
                check_base(student, found)
    if choice.name == "vllm":
        from agentkd.serve.vllm import start_vllm

        return start_vllm(
            students,
            python=config.vllm_python,
            gpu=choice.gpu,
            arguments=config.vllm_args,
            seconds=config.vllm_seconds,
            stack=stack,
        )
    from agentkd.engine.torch_engine import TorchEngine

    engines: list[Engine] = []
    for student in students:
        engine = TorchEngine.load(
            student.base, adapter=student.adapter, max_batch=config.max_batch, threads=config.threads
        )
        stack.callback(engine.close)
        engines.append(engine)
    return engines


def _checked(student: Student, engine: Engine, config: ServeConfig, say: Callable[[str], None]) -> Any:
    """The student's tokenizer, after the probe."""
    from agentkd.engine.weights import load_tokenizer

    tokenizer = load_tokenizer(student.path)
    name = student.path.resolve().name
    if not config.probe:
        say(f"{name}: not probed.")
        return tokenizer
    probed = probe_student(student, tokenizer, engine)
    if not probed.steps:
        say(f"{name}: NOT PROBED, whatever has drifted is not noticed: its parity.json holds no replays.")
    else:
        apart = "" if probed.difference is None else f", {probed.difference:.3f} nats apart"
        say(f"{name}: probed, {probed.steps} steps and {probed.tokens} tokens as after training{apart}.")
    return tokenizer


def _agent_config(student: Student, config: ServeConfig) -> AgentConfig:
    settings = student_config(student, sandbox=config.sandbox, max_tokens=config.max_tokens)
    changes: dict[str, Any] = {"max_seconds": config.timeout}
    if config.actions is not None:
        sampler = (settings.sampler or SamplerConfig()).model_copy(update={"n": config.actions})
        changes["sampler"] = sampler if config.actions > 1 else None
    if config.router is not None:
        changes["router"] = parse_router(config.router, saved=settings.router)
    return settings.model_copy(update=changes)
