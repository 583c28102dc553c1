"""Tasks of a Hugging Face dataset, by its name on the hub or by a local folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from agentkd.errors import ConfigError, DataError, boundary
from agentkd.task import Task
from agentkd.taskset.row import check_options, row_task

__all__ = ["hub_tasks", "open_dataset"]


def hub_tasks(name: str, split: str, options: Mapping[str, str]) -> list[Task]:
    """The tasks of a dataset, in its order.

    Args:
        name: ``name``, ``name:config`` or ``name:config:split`` (the config may be empty).
        split: "train", "test" or "all". Where ``name`` says no split, the dataset's split of that
            name is taken; where it has none, its rows are divided by a stable hash of the
            question. A split said in ``name`` is taken whole.
        options: from the spec, as in ``hf:openai/gsm8k:main?answer=answer``.

    Raises:
        ConfigError: ``datasets`` is missing, or no such dataset, config or split.
        DataError: a row without a question, or no row in the split.
    """
    check_options(options, f"hf:{name}")
    path, config, chosen = [*(part or None for part in name.split(":")), None, None][:3]
    if path is None:
        raise ConfigError(
            "The dataset's name is missing after 'hf:'.", "Write for instance hf:openai/gsm8k:main."
        )
    loaded = open_dataset(path, config)
    available = list(loaded)
    if chosen and chosen not in available:
        raise ConfigError(f"{path} has no split {chosen!r}.", f"It has: {', '.join(available)}.")
    if chosen:
        parts = {chosen: None if split == "all" else split}
    elif split == "all":
        parts = dict.fromkeys(available)
    elif split in available and len(available) > 1:
        parts = {split: split}
    else:
        parts = dict.fromkeys(available)
    tasks: dict[str, Task] = {}
    for part, fixed in parts.items():
        for number, row in enumerate(loaded[part]):
            task = _task(path, part, number, row, options, fixed)
            if split in ("all", task.split):
                tasks.setdefault(task.id, task)
    if not tasks:
        raise DataError(f"{path} has no row in the split {split!r}.", "Name a split: hf:name:config:split.")
    return list(tasks.values())


def open_dataset(path: str, config: str | None) -> Any:
    """A dataset of the hub, or of a local folder: its splits by name.

    Raises:
        ConfigError: ``datasets`` is missing, or there is no such dataset.
    """
    try:
        from datasets import load_dataset
    except ImportError as exc:
        raise ConfigError(
            "datasets is not installed.", "Install it by: pip install 'agentkd[tasks]'."
        ) from exc
    with boundary(ConfigError, f"loading the dataset {path}", "Check its name and config, and the network."):
        return load_dataset(path, config)


def _task(path: str, part: str, number: int, row: Any, options: Mapping[str, str], split: str | None) -> Task:
    where = f"{path}, split {part}, row {number}"
    try:
        # A column "id" or "split" of a hub dataset means whatever its authors meant.
        plain = {name: value for name, value in row.items() if name not in ("id", "split")}
        return row_task(plain, options, family=path.rstrip("/").rsplit("/", 1)[-1], split=split)
    except ValidationError as exc:
        raise DataError(
            f"{where}: {exc.errors()[0]['msg']}.", "Name the columns by ?question=..&answer=.."
        ) from exc
    except ValueError as exc:
        raise DataError(f"{where}: {exc}.", "Name the columns by ?question=..&answer=..") from exc
