"""Which tokens of a trajectory a student learns, as ``agentkd view --mask`` colours them.

The tokens and weights are those of training itself (:func:`agentkd.distill.examples.build_examples`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agentkd.errors import AgentkdError
from agentkd.trajectory import Trajectory

__all__ = ["learnt_tokens"]


def learnt_tokens(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What says which tokens of a trajectory are learnt.

    Args:
        name: a student's folder (its own settings and prompt are used), or a base model: "smollm2-135m",
            a Hub id, a local folder (the settings of ``agentkd distill`` by default).

    Returns:
        A function of a trajectory as JSON. It gives ``{"runs": [[text, weight], ...], "tokens": n}``, where
        every learnt token is a run of its own and context is one up to the next, or ``{"problem": ...}``.

    Raises:
        ConfigError: no such model, or a student that cannot be read.
    """
    from agentkd.distill.config import DistillConfig
    from agentkd.engine.student import load_student
    from agentkd.engine.weights import load_tokenizer, resolve_model

    config = DistillConfig(base=name)
    if (Path(name) / "student.json").is_file():
        student = load_student(Path(name))
        known = set(DistillConfig.model_fields)
        own = {key: value for key, value in student.training["config"].items() if key in known}
        # Neither of these says anything about a mask, and both may not be here any more.
        own |= {"teacher": None, "objective": "sft", "system_prompt": student.system_prompt}
        config, tokenizer = DistillConfig(**own), load_tokenizer(Path(name))
    else:
        tokenizer = load_tokenizer(resolve_model(name))

    def mask(record: dict[str, Any]) -> dict[str, Any]:
        return _mask(record, tokenizer, config)

    return mask


def _mask(record: dict[str, Any], tokenizer: Any, config: Any) -> dict[str, Any]:
    from agentkd.distill.examples import build_examples

    try:
        trajectory = Trajectory.model_validate(record)
    except ValidationError as exc:
        return {"problem": f"No tokens of a record of another version: {exc.errors()[0]['msg']}."}
    if config.system_prompt is None:
        config = config.model_copy(update={"kind": trajectory.kind})
    try:
        made = build_examples([trajectory], tokenizer, config)
    except AgentkdError as exc:
        return {"problem": f"This student does not learn it: {exc.message}"}
    runs: list[list[Any]] = []
    for example in made.examples:
        weights = example.weights or [float(learnt) for learnt in example.mask]
        runs += _runs(example.ids, weights, tokenizer)
    return {"runs": runs, "tokens": sum(len(example.ids) for example in made.examples)}


def _runs(ids: list[int], weights: list[float], tokenizer: Any) -> list[list[Any]]:
    """Pieces of text with their weight; a character of several tokens stays whole."""
    runs: list[list[Any]] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        last = end == len(ids)
        if not last and weights[end] == weights[begin] == 0:
            continue
        text = tokenizer.decode(ids[begin:end])
        if not last and weights[end] == weights[begin] and text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        runs.append([text, weights[begin]])
        begin = end
    return runs
