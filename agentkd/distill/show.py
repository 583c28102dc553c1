"""What is learnt, in the terminal: context is dim, targets are green, and what counts more is brighter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example, build_examples
from agentkd.engine.weights import load_tokenizer, resolve_model
from agentkd.errors import DataError
from agentkd.record import read_trajectories

__all__ = ["coloured", "show_examples"]


def show_examples(trajectories: Path, config: DistillConfig, count: int) -> None:
    """Print the first examples as they would be trained.

    Raises:
        DataError, ConfigError, TrainingError: as training would.
    """
    if not trajectories.is_file():
        raise DataError(f"There is no file {trajectories}.", "Check the path, or run: agentkd filter.")
    tokenizer = load_tokenizer(resolve_model(config.base))
    made = build_examples(read_trajectories(trajectories), tokenizer, config)
    console = Console()
    for example in made.examples[:count]:
        title = f"{example.id}: {example.targets} of {len(example.ids)} tokens are learnt"
        console.rule(title)
        console.print(coloured(example, tokenizer), soft_wrap=True)


def coloured(example: Example, tokenizer: Any) -> Text:
    """An example as text, styled token by token: dim is context, green is learnt.

    Weights other than 1 show as yellow (less) and bold green (more).
    """
    text = Text()
    begin = 0
    for place in range(1, len(example.ids) + 1):
        # Runs of one style are decoded together: a character may consist of several tokens.
        if place == len(example.ids) or _style(example, place) != _style(example, begin):
            text.append(tokenizer.decode(example.ids[begin:place]), style=_style(example, begin))
            begin = place
    return text


def _style(example: Example, place: int) -> str:
    if not example.mask[place]:
        return "dim"
    weight = 1.0 if example.weights is None else example.weights[place]
    return "green" if weight == 1 else "yellow" if weight < 1 else "bold green"
