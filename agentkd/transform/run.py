"""One transform on one file, as a stage: ``kept.jsonl``, the answers of models, and a manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from agentkd.errors import ConfigError, DataError, first_problem
from agentkd.plugin import make_plugin
from agentkd.record import file_hash, read_json, read_trajectories, write_jsonl, write_manifest
from agentkd.trajectory import Trajectory
from agentkd.transform.means import Answers, Means, Transform
from agentkd.transform.mix import GapSettings, SuccessGap, Temperature, TemperatureSettings
from agentkd.transform.passages import Passages, PassagesSettings
from agentkd.transform.retro import RetroSearch, RetroSettings
from agentkd.transform.student import FriendlySettings, SkipChunks, SkipSettings, StudentFriendly
from agentkd.transform.text import PlanFirst, PlanSettings, Shorten, ShortenSettings

__all__ = ["TRANSFORMS", "Transformed", "make_transform", "transform_run"]

TRANSFORMS: dict[str, tuple[Callable[[Any], Transform], type[BaseModel]]] = {
    "shorten": (Shorten, ShortenSettings),
    "plan-first": (PlanFirst, PlanSettings),
    "retro-search": (RetroSearch, RetroSettings),
    "skip-chunks": (SkipChunks, SkipSettings),
    "student-friendly": (StudentFriendly, FriendlySettings),
    "success-gap": (SuccessGap, GapSettings),
    "temperature": (Temperature, TemperatureSettings),
    "passages": (Passages, PassagesSettings),
}
"""By name: what makes a transform, and its settings."""


class Transformed(NamedTuple):
    """What a transform left."""

    trajectories: list[Trajectory]
    before: int
    """Trajectories that it was given."""
    changed: int
    """Trajectories that it changed, chose or repeated."""


def make_transform(name: str, settings: Mapping[str, Any] | None = None) -> Transform:
    """A transform by its name, or one of yours as ``module:function``.

    Args:
        name: a key of :data:`TRANSFORMS`, or ``package.module:name`` of something that makes a
            :class:`Transform` from a dictionary of settings.
        settings: what is not named keeps its default.

    Raises:
        ConfigError: no such transform, or a wrong setting (named).
    """
    if ":" in name:
        made: Transform = make_plugin(name, dict(settings or {}), "transform")
        return made
    if name not in TRANSFORMS:
        raise ConfigError(f"There is no transform {name!r}.", f"Choose one of {', '.join(TRANSFORMS)}.")
    make, kind = TRANSFORMS[name]
    try:
        return make(kind.model_validate(dict(settings or {})))
    except ValidationError as exc:
        raise ConfigError(
            f"{name}: {first_problem(exc)}.", f"Its settings are {', '.join(kind.model_fields)}."
        ) from exc


def transform_run(
    source: Path | str, out: Path | str, transform: Transform, means: Callable[[Answers], Means]
) -> Transformed:
    """Write ``out/kept.jsonl``; a stopped run goes on, a finished one is read.

    Args:
        source: ``kept.jsonl`` or another file of trajectories.
        out: a folder.
        transform: from :func:`make_transform`.
        means: what it may use, given the answers that are kept in ``out/answers.jsonl``.

    Raises:
        DataError: no trajectories.
        ConfigError: ``out`` holds another run, or something that the transform needs is missing.
        ProviderError: the endpoint failed; what it answered is kept, so the same call goes on.
    """
    source, out = Path(source), Path(out)
    if not source.is_file():
        raise DataError(f"There is no file {source}.", "Check the path, or run: agentkd filter.")
    trajectories = read_trajectories(source)
    if not trajectories:
        raise DataError(f"{source} has no trajectories.", "Run agentkd filter first.")
    config = {"transform": transform.name, "settings": transform.settings.model_dump(mode="json")}
    target = out / "kept.jsonl"
    if (out / "manifest.json").is_file():
        _same_run(out, config, source)
        made = read_trajectories(target)
    else:
        answers = Answers(out / "answers.jsonl")
        try:
            made = transform(trajectories, means(answers))
        finally:
            answers.close()
        write_jsonl(target, made)
    given = {item.id: len(item.changes) for item in trajectories}
    count = sum(len(item.changes) > given.get(item.id, 0) for item in made)
    counts = {"before": len(trajectories), "after": len(made), "changed": count}
    if not (out / "manifest.json").is_file():
        write_manifest(
            out, stage="transform", config=config, counts=counts, inputs=[source], outputs=[target]
        )
    return Transformed(made, len(trajectories), count)


def _same_run(out: Path, config: dict[str, Any], source: Path) -> None:
    manifest = read_json(out / "manifest.json")
    same = manifest.get("stage") == "transform" and manifest.get("config") == config
    if not same or file_hash(source) not in manifest["inputs"].values():
        raise ConfigError(f"{out} holds another run.", "Choose another --out, or remove the folder.")
