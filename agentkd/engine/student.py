"""A student: a folder that holds all that serving and evaluating a distilled model needs.

::

    student/
      adapter/         LoRA weights in peft's format, or
      model/           the whole model, when every weight was trained
      student.json     this record
      tokenizer.json, tokenizer_config.json, chat_template.jinja
      loss.jsonl       one line a training step
      manifest.json    written last: a folder without it is not finished
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentkd.errors import ConfigError, first_problem
from agentkd.record import read_json

__all__ = ["Student", "check_base", "is_student", "load_student"]


class Student(BaseModel):
    """What a student is and how it wants to be asked. Frozen; ``student.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    kind: Literal["agent", "cot"]
    """"agent" acts in code; "cot" answers once by chain of thought."""
    base: str
    """Name, folder or hub id of the base model."""
    base_hash: str
    """SHA-256 over the base model's weights: an adapter is worthless on other ones."""
    system_prompt: str
    """The prompt it was trained with, verbatim."""
    tools: tuple[str, ...] = ()
    """Each tool's schema as a JSON string."""
    fences: tuple[str, str]
    """What opens and closes a code block."""
    max_steps: int
    """Step limit of the agent it was trained to be."""
    imports: tuple[str, ...] = ()
    """Modules that its code may import."""
    passages: int | None = None
    """Kind "cot": so many passages stand before each question, found for it; None for none."""
    passage_tokens: int | None = None
    """Budget of these passages in (estimated) tokens; None for no limit."""
    weights: Literal["adapter", "model"] = "adapter"
    """Which of the two folders of weights it has."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Settings, summary of the loss, number of examples, seconds."""
    path: Path = Field(default=Path(), exclude=True)
    """The folder it was loaded from; not in the file."""

    @property
    def adapter(self) -> Path:
        """The folder of what was trained: LoRA weights, or a whole model."""
        return self.path / self.weights


def is_student(path: Path) -> bool:
    """True for a finished student folder."""
    return (path / "student.json").is_file() and (path / "manifest.json").is_file()


def load_student(path: Path | str) -> Student:
    """Read a student folder.

    Raises:
        ConfigError: not a finished student folder; says what is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"There is no student folder {folder}.", "Make one with: agentkd distill.")
    weights = (
        ("model/config.json",)
        if (folder / "model").is_dir()
        else ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
    )
    needed = ("student.json", *weights, "tokenizer.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} is not a student folder: it has no {missing[0]}.",
            "Give the folder that agentkd distill wrote.",
        )
    if not (folder / "manifest.json").is_file():
        raise ConfigError(
            f"The training of {folder} is not finished.",
            "Run the same agentkd distill command again; it goes on.",
        )
    try:
        return Student.model_validate({**read_json(folder / "student.json"), "path": folder})
    except ValidationError as exc:
        raise ConfigError(
            f"{folder / 'student.json'}: {first_problem(exc)}.",
            "It was written by another version of agentkd.",
        ) from exc


def check_base(student: Student, found: str) -> None:
    """Refuse a base model that is not the one the student was trained on.

    Args:
        student: the student.
        found: hash of the base model at hand, see :func:`agentkd.engine.weights.model_hash`.

    Raises:
        ConfigError: they differ.
    """
    if found != student.base_hash:
        raise ConfigError(
            f"Wrong base: the student in {student.path} was trained on other weights than those of "
            f"{student.base} here.",
            "Bring back that base model, or distil again.",
        )
