"""The model card of a student: ``README.md`` in its folder, from its own records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentkd.engine.student import Student
from agentkd.errors import ConfigError, boundary
from agentkd.record import read_json, write_text

__all__ = ["read_results", "write_card"]

_SHOWN = ("objective", "adapter", "lora_r", "lora_alpha", "learning_rate", "batch_size", "max_length", "seed")
_FIGURES = {
    "steps": "steps",
    "n_examples": "examples",
    "targets": "learnt tokens, all passes",
    "first_loss": "loss of the first step",
    "last_loss": "mean loss of the last tenth",
    "held_out_loss": "least held-out loss",
    "best_step": "at step",
    "precision": "precision",
    "device": "device",
}


def write_card(student: Student, results: Mapping[str, str] | None = None) -> Path:
    """Write the card; call it again with results of an evaluation.

    Args:
        student: a student with its folder.
        results: what is said of each set of test tasks, by its name.

    Returns:
        The file.
    """
    path = student.path / "README.md"
    write_text(path, _card(student, _data(student.path), results or {}))
    return path


def read_results(folder: Path) -> dict[str, str]:
    """Accuracy with its 95% interval, in all and of each family, from a folder of ``agentkd evaluate``.

    Raises:
        ConfigError: it holds no finished evaluation.
    """
    path = folder / "result.json"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no finished evaluation.", "Give the --out of agentkd evaluate.")
    with boundary(ConfigError, f"reading {path}", "Evaluate again."):
        result = read_json(path)
        cells = {"all": result["overall"], **result["families"]}
        return {name: _cell(cell) for name, cell in cells.items() if cell["n"]}


def _cell(cell: Mapping[str, Any]) -> str:
    return f"{cell['accuracy']:.3f} ({cell['low']:.3f} to {cell['high']:.3f}), n = {cell['n']}"


def _data(folder: Path) -> list[str]:
    manifest = folder / "manifest.json"
    inputs = read_json(manifest).get("inputs", {}) if manifest.is_file() else {}
    return [f"`{Path(name).name}`, SHA-256 `{digest}`" for name, digest in inputs.items()]


def _card(student: Student, data: list[str], results: Mapping[str, str]) -> str:
    training: dict[str, Any] = student.training
    config = training.get("config", {})
    base = "" if student.base.startswith(("/", ".")) else f"base_model: {student.base}\n"
    library = "peft" if student.weights == "adapter" else "transformers"
    recipe = [f"| {name} | {config[name]} |" for name in _SHOWN if name in config]
    figures = [
        f"| {text} | {_number(training[name])} |" for name, text in _FIGURES.items() if name in training
    ]
    tested = [f"| {name} | {text} |" for name, text in results.items()]
    dropped = ", ".join(f"{count} {reason}" for reason, count in training.get("dropped", {}).items())
    lines = [
        f"---\n{base}library_name: {library}\ntags: [agentkd, distillation]\n---",
        f"# {student.path.resolve().name}",
        f"A student of kind `{student.kind}`, distilled from {student.base} with agentkd. "
        f"Its base weights have the SHA-256 `{student.base_hash}`.",
        "## Data",
        *(data or ["Not recorded."]),
        *([f"Left out: {dropped}."] if dropped else []),
        "## Recipe",
        "\n".join(["| setting | value |", "|---|---|", *recipe]),
        "\n".join(["| training | |", "|---|---|", *figures]),
        "## Results",
        "\n".join(["| tasks | result |", "|---|---|", *tested]) if tested else "Not evaluated yet.",
        "## Use",
        f"`agentkd serve {student.path.resolve().name}` serves it with the prompt it was trained on:",
        f"```\n{student.system_prompt}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
