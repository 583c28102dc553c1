"""What ``agentkd evaluate`` does: a student, a base model or an endpoint on a taskset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from agentkd.agent_config import AgentConfig
from agentkd.errors import ConfigError
from agentkd.evaluate import SystemResult, comparison_table, run_evaluation
from agentkd.retrieval.source import open_corpus
from agentkd.rollouts import Progress
from agentkd.sampler import SamplerConfig
from agentkd.taskset import load_taskset

__all__ = ["assess"]


def assess(
    *,
    student: str | None,
    tasks: str,
    out: Path,
    n: int | None,
    split: str,
    seed: int,
    endpoint: tuple[str | None, str | None, str | None],
    kind: str | None,
    sandbox: str,
    corpus: str | None,
    temperature: float,
    max_tokens: int,
    workers: int,
    actions: int,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[SystemResult, Any]:
    """What ``agentkd evaluate`` does; returns the figures and a table of them."""
    api_base, model, api_key = endpoint
    if (student is None) == (api_base is None):
        raise ConfigError("Evaluate what?", "Give either a student folder or --api-base and --model.")
    if api_base is not None and model is None:
        raise ConfigError("No model was named.", "Pass --model as the endpoint lists it.")
    taskset = load_taskset(tasks, split, n, seed)
    retriever = open_corpus(corpus, taskset.passages).retriever
    chosen: Any = kind
    sampling = {"sampler": SamplerConfig(n=actions, seed=seed) if actions > 1 else None}

    @contextmanager
    def source() -> Iterator[tuple[AgentConfig, Any]]:
        if student is None:
            config = _endpoint_config(api_base, model, api_key, chosen, sandbox, temperature, max_tokens)
            yield config.model_copy(update=sampling), None
            return
        from agentkd.system import open_system

        with open_system(
            student, kind=chosen, sandbox=sandbox, temperature=temperature, max_tokens=max_tokens
        ) as system:
            yield system.config.model_copy(update=sampling), system.model

    label = Path(student).name if student else str(model)
    result, _ = run_evaluation(
        label, taskset.tasks, source, out, retriever=retriever, workers=workers, on_progress=on_progress
    )
    return result, comparison_table([result])


def _endpoint_config(
    api_base: str | None,
    model: str | None,
    api_key: str | None,
    kind: Literal["agent", "cot"] | None,
    sandbox: str,
    temperature: float,
    max_tokens: int,
) -> AgentConfig:
    from agentkd.model import check_endpoint

    assert api_base is not None
    assert model is not None
    check_endpoint(api_base, model, api_key)
    return AgentConfig(
        model=model,
        api_base=api_base,
        api_key=api_key,
        kind=kind or "agent",
        sandbox=sandbox,
        temperature=temperature,
        max_tokens=max_tokens,
    )
