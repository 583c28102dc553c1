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

__all__ = ["TOLERANCE", "Probed", "check_files", "probe_student"]

TOLERANCE = 0.2
"""Mean difference of log-probabilities (nats) that other hardware, or another width of the weights,
may make; a wrong adapter makes one of several."""
SURE = -0.35
"""Log-probability (nats) from which on another token is no tie that rounding may break."""
_HINT = "Serve the folder as agentkd distill wrote it, or distil again; --no-probe serves it all the same."


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
            raise ConfigError(f"{found} is not what was trained (its SHA-256 differs).", _HINT)


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
    known = _recorded(record)
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
                f"trained, from token {_parting(prompt, replay['prompt_ids'])} on.",
                "Its chat template, tokenizer or system prompt has changed. " + _HINT,
            )
        wanted, logprobs = known.get(replay["where"], (None, None))
        if wanted:
            differences += _ask(student, engine, replay["where"], prompt, wanted, logprobs)
            tokens += len(wanted)
        steps += 1
    return Probed(steps, tokens, sum(differences) / len(differences) if differences else None)


def _recorded(record: dict[str, Any]) -> dict[str, tuple[list[int], list[float] | None]]:
    """What the finished student emitted, step by step: tokens, and log-probabilities where known."""
    after = record.get("after") or {}
    known = {it["where"]: (it["output_ids"], it["logprobs"] or None) for it in after.get("greedy", [])}
    if not known and after.get("reproduced") == after.get("prompts"):
        known = {it["where"]: (it["target_ids"], None) for it in record["replays"]}
    return known


def _ask(
    student: Student,
    engine: Engine,
    where: str,
    prompt: list[int],
    wanted: list[int],
    logprobs: list[float] | None,
) -> list[float]:
    (done,) = engine.generate(prompt, max_new_tokens=len(wanted), temperature=0.0)
    at = _parting(done.token_ids, wanted)
    sure = logprobs is None or (at < len(logprobs) and logprobs[at] > SURE)
    if at < len(wanted) and (sure or at == 0):
        raise ConfigError(
            f"{student.path} has drifted: {where} is answered with other tokens than after training, "
            f"from token {at} on.",
            _HINT,
        )
    if logprobs is None:
        return []
    found = [abs(one - other) for one, other in zip(done.logprobs[:at], logprobs[:at], strict=False)]
    if found and sum(found) / len(found) > TOLERANCE:
        raise ConfigError(
            f"{student.path} has drifted: the log-probabilities of {where} differ by "
            f"{sum(found) / len(found):.2f} nats a token from those after training.",
            _HINT,
        )
    return found


def _parting(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place where two sequences differ; the length of the shorter one where none does."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
