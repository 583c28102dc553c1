"""How to make the agents of a run: settings that fit into a file, and the factory they describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentkd.retrieval import Retriever
from agentkd.router import RouterConfig, make_router
from agentkd.sampler import SamplerConfig, SelfConsistentSampler
from agentkd.sandbox import DEFAULT_BACKEND, Sandbox
from agentkd.task import Task

if TYPE_CHECKING:
    from smolagents import Model, Tool

    from agentkd.agent import StepAgent
    from agentkd.gate import Gate

__all__ = ["AgentConfig", "agent_factory", "search_tools"]


class AgentConfig(BaseModel):
    """One kind of agent: its model, prompt, tools and limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "offline-expert"
    """Model id, as the endpoint lists it."""
    api_base: str | None = None
    """URL of an OpenAI-compatible endpoint, ending in /v1."""
    api_key: str | None = Field(default=None, exclude=True, repr=False)
    """Bearer token; never written anywhere."""
    kind: Literal["agent", "cot"] = "agent"
    """"agent" acts in code with tools; "cot" answers once by chain of thought."""
    prompt: str | None = None
    """System prompt; the teacher's by default."""
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, ge=1)
    """Sampled tokens of one step."""
    max_steps: int = Field(default=5, ge=1)
    sandbox: str = DEFAULT_BACKEND
    """Where code runs: "fork", "e2b", "docker" or "local"."""
    imports: tuple[str, ...] = ()
    """Modules that code may import beside the standard ones."""
    sampler: SamplerConfig | None = None
    """How each action is chosen among several; None takes the one the model gives."""
    router: RouterConfig | None = None
    """Whether tools are used; None leaves it to the prompt."""
    passages: bool = False
    """Kind "cot": passages that are found for the question stand before it."""
    search_k: int = Field(default=3, ge=1)
    """Passages that one search returns."""
    search_tokens: int | None = Field(default=1024, ge=16)
    """Tokens that one search returns at most, as estimated by the search tool; None for no limit."""
    max_seconds: float | None = None
    """Wall-clock limit of one rollout."""
    action_seconds: float = Field(default=10.0, gt=0)
    """Limit of the code of one step."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds for one call of the endpoint."""


def search_tools(retriever: Retriever | None, config: AgentConfig) -> list[Tool]:
    """The ``search`` tool over a retriever; no tool where there is nothing to search."""
    if retriever is None:
        return []
    from agentkd.tool import load_tool

    return [load_tool("search", retriever=retriever, k=config.search_k, max_tokens=config.search_tokens)]


def agent_factory(
    config: AgentConfig,
    tools: Sequence[Tool] = (),
    model: Model | None = None,
    *,
    gate: Gate | None = None,
    temperatures: Sequence[float] = (),
    seed: int | None = None,
    sandbox: Sandbox | None = None,
) -> Callable[[Task, int], StepAgent]:
    """A function that makes a fresh agent for ``(task, sample)``; the model is shared by all.

    Args:
        config: the settings.
        tools: what the agents are given.
        model: a model already at hand, instead of the endpoint.
        gate: what stands before the endpoint; one of its own by default.
        temperatures: of the samples of a task, in turn; the one of ``config`` by default.
        seed: of what the model samples, where it takes one.
        sandbox: a session for the one agent that is made, instead of one of its own.
    """
    from agentkd.agent import build_agent

    if model is not None:
        models = [model.seeded(seed) if seed is not None and hasattr(model, "seeded") else model]
    else:
        models = [
            _model(config, gate, temperature, seed) for temperature in temperatures or (config.temperature,)
        ]

    def make(task: Task, sample: int) -> StepAgent:
        return build_agent(
            models[sample % len(models)],
            tools,
            kind=config.kind,
            prompt=config.prompt,
            sandbox=config.sandbox if sandbox is None else sandbox,
            imports=config.imports,
            max_steps=config.max_steps,
            action_timeout=config.action_seconds,
            sampler=SelfConsistentSampler(config.sampler) if config.sampler else None,
            router=make_router(config.router) if config.router else None,
            passages=config.passages,
        )

    return make


def _model(config: AgentConfig, gate: Gate | None, temperature: float, seed: int | None = None) -> Model:
    from agentkd.model import openai_model

    assert config.api_base is not None, "an endpoint or a model is needed"
    return openai_model(
        config.model,
        config.api_base,
        config.api_key,
        timeout=config.timeout,
        gate=gate,
        temperature=temperature,
        max_tokens=config.max_tokens,
        **({} if seed is None else {"seed": seed}),
    )
