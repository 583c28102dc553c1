"""Recipes: the settings of a whole run, from a TOML file or from the quick start."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agentkd.errors import ConfigError, boundary, first_problem
from agentkd.filter import FilterConfig
from agentkd.sandbox import DEFAULT_BACKEND

__all__ = ["Recipe", "StudentRecipe", "TaskMix", "TeacherRecipe", "load_recipe", "quickstart_recipe"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskMix(_Part):
    """One part of a mixture of tasks."""

    tasks: str
    """Taskset, for instance "gym:lcm" or "tasks.jsonl"."""
    n: int = Field(ge=1)
    """Tasks."""


class TeacherRecipe(_Part):
    """Who the trajectories come from."""

    expert: bool = False
    """The offline expert, behind an endpoint of our own; then no endpoint is needed."""
    error_rate: float = Field(default=0.1, ge=0, le=1)
    """How often the offline expert errs, per step."""
    api_base: str | None = None
    """URL of an OpenAI-compatible endpoint, ending in /v1."""
    model: str | None = None
    """Model id at that endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=1024, ge=1)
    """Sampled tokens of one step."""
    workers: int = Field(default=16, ge=1)
    first_thought: bool = False
    """Begin the agent's first step with the first thought of a chain of thought."""

    @property
    def api_key(self) -> str | None:
        return os.environ.get(self.api_key_env)


class StudentRecipe(_Part):
    """One student and how it is trained; what is not named keeps the default of ``DistillConfig``."""

    kind: Literal["agent", "cot"]
    base: str = "smollm2-135m"
    passages: bool = False
    """Kind "cot": what is found for a question (``search_k`` passages) stands before it, in training and
    evaluation alike."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of ``agentkd.distill.DistillConfig``."""
    evaluate_n: int | None = Field(default=None, ge=1)
    """Test tasks for this student (the first so many of every part, in proportion); all by default."""


class Recipe(_Part):
    """A whole run. See ``examples/recipe.toml``."""

    title: str = "agentkd run"
    seed: int = 0
    teacher: TeacherRecipe
    train: tuple[TaskMix, ...] = Field(min_length=1)
    test: tuple[TaskMix, ...] = Field(min_length=1)
    filter: FilterConfig = FilterConfig()
    students: dict[str, StudentRecipe] = Field(min_length=1)
    base_n: int = Field(default=48, ge=0)
    """Test tasks for the untrained base model (0 leaves it out)."""
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Families that the report also shows pooled."""
    sandbox: str = DEFAULT_BACKEND
    """Where model-written code runs: "fork", "e2b", "docker" or "local"."""
    search_k: int = Field(default=3, ge=1)
    """Passages that one search returns, for teacher and students alike."""
    retrieval: Literal["bm25", "dense", "hybrid"] = "bm25"
    """How passages are searched, for teacher and students alike; "bm25" needs no encoder."""
    retrieval_encoder: str | None = None
    """Encoder of a dense or hybrid index; "minilm" where none is named."""
    max_tokens: int = Field(default=256, ge=1)
    """Sampled tokens of one step at evaluation."""
    notes: tuple[str, ...] = ()
    """Plain words for the report."""
    ask: str | None = None
    """A question for the served student at the end."""

    @field_validator("students")
    @classmethod
    def _names(cls, students: dict[str, StudentRecipe]) -> dict[str, StudentRecipe]:
        """Each name is a folder's name, too."""
        folders = [name.replace(" ", "-") for name in students]
        for name, folder in zip(students, folders, strict=True):
            if not re.fullmatch(r"\w[\w.+-]*", folder) or folder == "base" or folders.count(folder) > 1:
                raise ValueError(
                    f"{name!r} cannot be a student's name here: take letters, digits and -, once"
                )
        return students


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: no such file, not TOML, or a wrong or unknown setting (named).
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {path}.", "See examples/recipe.toml for one.")
    with boundary(ConfigError, f"reading {path}"):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        return Recipe.model_validate(content)
    except ValidationError as exc:
        raise ConfigError(f"{path}: {first_problem(exc)}.", "See examples/recipe.toml.") from exc


ARITHMETIC = ("products", "chain_sum", "lcm", "calendar_arithmetic")
HEADROOM = ("letter_counting", "simple_equations")

_NOTES = (
    "The teacher is a program, not a model (offline expert): it knows how to solve these task families "
    "with Python and search, and errs at a set rate so that filter and recovery have work.",
    "Tasks that a tool solves favour an agent by construction, and the chain-of-thought student has to do "
    "in its head what the agent does in Python. The almanac's test world is new to every student, so that "
    "it cannot be answered without retrieval. The table shows that the loop works; it is not a general law.",
    "Both students are trained with the same number of steps and examples per step from the same teacher "
    "on the same questions. gsm_symbolic is shown as the honest negative: reasoning over word problems is "
    "beyond a model of this size.",
    "The untrained base model mostly answers without the line that the prompt asks for; that counts as no "
    "answer.",
    "One seed. The intervals are 95% Wilson intervals of the sampled test tasks and say nothing about "
    "other seeds or settings.",
)


def quickstart_recipe(size: Literal["tiny", "demo", "full"]) -> Recipe:
    """The quick start's recipe.

    Args:
        size: "demo" fits ten minutes on two cores; "full" tests on more than 400 tasks and trains
            the chain-of-thought baseline three times as long; "tiny" only shows the loop.
    """
    return Recipe(
        title="agentkd quick start",
        teacher=TeacherRecipe(expert=True, error_rate=0.1),
        train=_train_mix(size),
        test=_test_mix(size),
        students=_students(size),
        base_n={"tiny": 4, "demo": 40, "full": 96}[size],
        groups={"arithmetic (pooled)": ARITHMETIC},
        search_k=2,
        max_tokens=32 if size == "tiny" else 320,
        notes=_NOTES,
        ask="What is 48271 times 9163?",
    )


def _train_mix(size: str) -> tuple[TaskMix, ...]:
    if size == "tiny":
        return (TaskMix(tasks="gym:products,lcm", n=8), TaskMix(tasks="almanac:hops=2", n=4))
    return (
        # Weekdays are asked for in more ways than the others, so they need more examples.
        *(TaskMix(tasks=f"gym:{family}", n=76 if "calendar" in family else 36) for family in ARITHMETIC),
        *(TaskMix(tasks=f"gym:{family}", n=16) for family in HEADROOM),
        TaskMix(tasks="almanac:hops=2", n=120),
    )


def _test_mix(size: str) -> tuple[TaskMix, ...]:
    if size == "tiny":
        return (TaskMix(tasks="gym:products,lcm", n=4), TaskMix(tasks="almanac:hops=2", n=2))
    each, hops, rest, negative = (26, 40, 10, 6) if size == "demo" else (80, 100, 40, 40)
    return (
        *(TaskMix(tasks=f"gym:{family}", n=each) for family in ARITHMETIC),
        TaskMix(tasks="almanac:hops=2", n=hops),
        *(TaskMix(tasks=f"gym:{family}", n=rest) for family in HEADROOM),
        TaskMix(tasks="gym:gsm_symbolic", n=negative),
    )


def _students(size: str) -> dict[str, StudentRecipe]:
    steps = {"tiny": 3, "demo": 46, "full": 64}[size]
    few = {"tiny": 4, "demo": 48, "full": None}[size]
    students = {
        "CoT-distilled": StudentRecipe(kind="cot", settings={"steps": steps}, evaluate_n=few),
        "agent-distilled": StudentRecipe(kind="agent", settings={"steps": steps}),
    }
    if size == "full":
        students["CoT-distilled x3"] = StudentRecipe(kind="cot", settings={"steps": 3 * steps})
    return students
