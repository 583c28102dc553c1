"""No example may be longer than what the models can read: positions behind their context mean nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example
from agentkd.engine.weights import context_of, resolve_model
from agentkd.errors import ConfigError

__all__ = ["check_context"]


def check_context(base: Path, config: DistillConfig, examples: Iterable[Example]) -> None:
    """Refuse examples that do not fit the base model, or the teacher that reads them as well.

    Args:
        base: folder of the base model.
        config: the settings.
        examples: all that are computed, wrong ones included.

    Raises:
        ConfigError: one is longer; says which ``--max-length`` to use.
    """
    folders = {"base model": base}
    if config.teacher is not None:
        folders["teacher"] = resolve_model(config.teacher)
    known = {name: context for name, folder in folders.items() if (context := context_of(folder)) is not None}
    if not known:
        return
    name = min(known, key=lambda it: known[it])
    longest = max(examples, key=lambda it: len(it.ids))
    if len(longest.ids) > known[name]:
        raise ConfigError(
            f"Trajectory {longest.id} has {len(longest.ids)} tokens, and the context of the {name} in "
            f"{folders[name]} holds {known[name]}.",
            f"Use --max-length {known[name]}: longer ones are left out, or cut with --overlong cut.",
        )
