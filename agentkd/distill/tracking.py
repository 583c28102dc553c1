"""Figures of each step, sent to a tracker that was asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentkd.distill.config import DistillConfig
from agentkd.distill.ranks import rank
from agentkd.errors import ConfigError, boundary

__all__ = ["tracker"]

Send = Callable[[dict[str, float], int], None]
"""Takes figures by name, and the step."""


@contextmanager
def tracker(config: DistillConfig, out: Path) -> Iterator[Send]:
    """Where figures go: nowhere, unless ``config.track`` names a tracker of accelerate.

    TensorBoard writes into ``out/tensorboard``; trackio keeps them on this machine and wandb sends them
    to its service, as they are configured there.

    Raises:
        ConfigError: the tracker is not installed, or refuses.
    """
    if config.track is None or rank():
        yield lambda figures, step: None
        return
    if importlib.util.find_spec(config.track) is None:
        raise ConfigError(
            f"{config.track} is not installed.",
            f"Install it (pip install {config.track}), or leave --track out.",
        )
    with boundary(ConfigError, f"starting {config.track}", "Leave --track out to train without it."):
        chosen = _start(config.track, out)
        chosen.store_init_configuration(_flat(config))
    try:
        yield lambda figures, step: chosen.log(figures, step=step)
    finally:
        chosen.finish()


def _start(name: str, out: Path) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it which process they are in
    kind = LOGGER_TYPE_TO_CLASS[name]
    made = kind("tensorboard", logging_dir=str(out)) if name == "tensorboard" else kind(out.resolve().name)
    if hasattr(made, "start"):
        made.start()
    return made


def _flat(config: DistillConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    return {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in values.items()
    }
