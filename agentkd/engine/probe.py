"""Is this still the student that was trained? One known trajectory, before anything is served.

The steps of a trajectory that training kept in ``parity.json`` are asked again, greedily: the ids of
each prompt must be those that were trained, and the tokens and their log-probabilities those that the
student gave when it was finished. Another template, adapter, base model or tokenizer shows here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from agentkd.engine import Engine
from agentkd.engine.render import render_prompt
from agentkd.engine.student import Student
from agentkd.errors import ConfigError
from agentkd.record import file_hash, read_json

__all__ = [
    "SURE",
    "TOLERANCE",
    "Known",
    "Probed",
    "check_files",
    "compare_answers",
    "known_answers",
    "parting",
    "probe_student",
]

TOLERANCE = 0.2
"""Mean difference of log-probabilities (nats) that other hardware, or another width of the weights,
may make; a wrong adapter makes one of several."""
SURE = -0.35
"""Log-probability (nats) from which on another token is no tie that rounding may break."""
_HINT = "Serve the folder as agentkd distill wrote it, or distil again; --no-probe serves it all the same."


class Known(NamedTuple):
    """What the finished student answered greedily to one prompt."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    """Nats, one for each id; empty where they are not known."""


class Probed(NamedTuple):
    """What was asked. ``steps`` is 0 where the folder holds nothing to ask."""

    steps: int
    tokens: int
    difference: float | None
    """Mean absolute difference of the log-probabilities, nats; None where none are recorded."""


def check_files(student: Student) -> None:
    """Refuse weights that are not those the training closed with.

    Raises:
        ConfigError: it has changed.
    """
    outputs = read_json(student.path / "manifest.json").get("outputs", {})
    for name, wanted in outputs.items():
        found = student.adapter / name
        if name.endswith(".safetensors") and (not found.is_file() or file_hash(found) != wanted):
            raise ConfigError(f"Wrong weights: {found} is not what was trained (its SHA-256 differs).", _HINT)


def probe_student(student: Student, tokenizer: Any, engine: Engine) -> Probed:
    """Ask one known trajectory again.

    Args:
        student: from :func:`agentkd.engine.student.load_student`.
        tokenizer: that it will be served with.
        engine: that it will be served by.

    Raises:
        ConfigError: it has drifted; says where.
    """
    path = student.path / "parity.json"
    record = read_json(path) if path.is_file() else {"replays": []}
    replays: list[dict[str, Any]] = record["replays"]
    known = known_answers(record)
    first = replays[0]["where"].rpartition(",")[0] if replays else ""
    steps = tokens = 0
    differences: list[float] = []
    for replay in replays:
        if replay["where"].rpartition(",")[0] != first:
            break
        messages = [{"role": "system", "content": student.system_prompt}, *replay["messages"]]
        prompt = render_prompt(tokenizer, messages)
        if prompt != replay["prompt_ids"]:
            raise ConfigError(
                f"{student.path} has drifted: the prompt of {replay['where']} is not rendered as it was "
                f"trained, from token {parting(prompt, replay['prompt_ids'])} on.",
                "Its chat template, tokenizer or system prompt has changed. " + _HINT,
            )
        wanted = known.get(replay["where"])
        if wanted and wanted.ids:
            differences += _ask(student, engine, replay["where"], prompt, wanted)
            tokens += len(wanted.ids)
        steps += 1
    return Probed(steps, tokens, sum(differences) / len(differences) if differences else None)


def known_answers(record: dict[str, Any]) -> dict[str, Known]:
    """What the finished student answered, by the place of each replay.

    Args:
        record: content of ``parity.json``.
    """
    after = record.get("after") or {}
    greedy = after.get("greedy", [])
    known = {it["where"]: Known(tuple(it["output_ids"]), tuple(it["logprobs"])) for it in greedy}
    if not known and after.get("reproduced") == after.get("prompts"):
        known = {it["where"]: Known(tuple(it["target_ids"])) for it in record["replays"]}
    return known


def compare_answers(found: Known, wanted: Known) -> tuple[str | None, list[float]]:
    """Hold a greedy answer against that of the finished student.

    Another token is a difference where the student was sure of its own (see :data:`SURE`), or where it is
    the first, so that nothing else can be compared; the log-probabilities before it may differ by
    :data:`TOLERANCE` on average.

    Args:
        found: what was answered now, to the same prompt.
        wanted: from :func:`known_answers`.

    Returns:
        What differs, None when nothing does; and how far the log-probabilities are apart, token by token,
        as far as both are known.
    """
    at = parting(found.ids, wanted.ids)
    sure = not wanted.logprobs or (at < len(wanted.logprobs) and wanted.logprobs[at] > SURE)
    if at < len(wanted.ids) and (sure or at == 0):
        return f"answered with other tokens than after training, from token {at} on", []
    pairs = zip(found.logprobs[:at], wanted.logprobs[:at], strict=False)
    apart = [abs(one - other) for one, other in pairs]
    mean = sum(apart) / len(apart) if apart else 0.0
    if mean > TOLERANCE:
        return f"answered with log-probabilities {mean:.2f} nats a token from those after training", apart
    return None, apart


def _ask(student: Student, engine: Engine, where: str, prompt: list[int], wanted: Known) -> list[float]:
    (done,) = engine.generate(prompt, max_new_tokens=len(wanted.ids), temperature=0.0)
    why, apart = compare_answers(Known(done.token_ids, done.logprobs), wanted)
    if why is not None:
        raise ConfigError(f"{student.path} has drifted: {where} is {why}.", _HINT)
    return apart


def parting(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place where two sequences differ; the length of the shorter one where none does."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
