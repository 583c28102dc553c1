"""A teacher that is not there: its likeliest tokens at each target, recorded once in a file.

One JSON line an example, a :class:`RecordedTargets`. The objectives that read only the likeliest tokens of a
teacher learn from it as from the model, and a large teacher is asked once for students of many settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from agentkd.distill.batches import Pack, single_packs
from agentkd.distill.choose import check_teacher
from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example, build_examples
from agentkd.distill.learner import compute_dtype
from agentkd.distill.teacher import LocalTeacher
from agentkd.engine.weights import load_tokenizer, model_hash, resolve_model
from agentkd.errors import ConfigError, DataError
from agentkd.record import AppendLog, file_hash, iter_jsonl, read_trajectories

__all__ = ["RecordedTargets", "RecordedTeacher", "record_teacher", "recorded_hash"]

FLOOR = -1e4
"""Stands for the log-probability of a token that is not recorded: ``exp`` of it is 0, and nothing is NaN."""
_AGAIN = "Record it again with the settings of this training: agentkd distill ... --record-teacher FILE."


class RecordedTargets(BaseModel):
    """What a teacher said at the targets of one example. Frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """The example's: its trajectory's, with ``/NUMBER`` behind it where every step is one."""
    ids_sha256: str
    """Of the example's token ids, see :func:`ids_hash`."""
    teacher: str
    """Which it was: the SHA-256 of its weights, or any other name."""
    vocabulary: int = Field(ge=1)
    """Width of the teacher's logits."""
    places: list[int]
    """Of each target, its index in the token ids."""
    tokens: list[list[int]]
    """The teacher's k likeliest tokens at each target."""
    logprobs: list[list[Annotated[float, Field(gt=FLOOR, allow_inf_nan=False)]]]
    """Nats, of the same tokens."""

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if not len(self.places) == len(self.tokens) == len(self.logprobs):
            raise ValueError("places, tokens and logprobs are not of one length")
        sizes = {len(row) for row in self.tokens} | {len(row) for row in self.logprobs}
        if len(sizes) > 1:
            raise ValueError("targets have different numbers of tokens")
        if any(len(set(row)) < len(row) for row in self.tokens):
            raise ValueError("a token stands twice at one target")
        return self


def ids_hash(ids: Sequence[int]) -> str:
    """SHA-256 (hex) of token ids, written in decimal with commas between them."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


class RecordedTeacher:
    """Gives of each target the likeliest tokens of a file; all others have :data:`FLOOR`.

    Args:
        path: lines of :class:`RecordedTargets`.
        examples: what will be learnt; lines of others are passed over.
        size: of the student's tokenizer.
        top: how many of the likeliest tokens the objective reads.
        device: where the student is trained.

    Raises:
        DataError: an example is missing, is another one by its token ids, has a target or tokens that are
            not recorded, or the lines are of two teachers.
    """

    def __init__(
        self, path: Path, examples: Sequence[Example], size: int, top: int, device: torch.device
    ) -> None:
        wanted = {example.id: example for example in examples}
        self._top: dict[str, tuple[Tensor, Tensor]] = {}
        self.device = device
        teachers: set[tuple[str, int]] = set()
        for line in iter_jsonl(path, RecordedTargets, skip_torn=True):
            if line.id in wanted:
                tokens, logprobs = _likeliest(path, line, wanted[line.id], size, top)
                self._top[line.id] = tokens.to(device), logprobs.to(device)
                teachers.add((line.teacher, line.vocabulary))
        missing = [name for name in wanted if name not in self._top]
        if missing:
            raise DataError(
                f"{path} has nothing of {len(missing)} of {len(wanted)} examples, as {missing[0]}.", _AGAIN
            )
        if len(teachers) > 1:
            raise DataError(f"{path} was recorded of {len(teachers)} teachers.", _AGAIN)
        self.width = max(width for _, width in teachers)

    def logits(self, pack: Pack) -> Tensor:
        """Log-probabilities (rows, vocabulary), float32, in the order of ``pack.rows``."""
        tokens = torch.cat([self._top[name][0] for name in pack.examples]).long()
        logprobs = torch.cat([self._top[name][1] for name in pack.examples])
        return torch.full((len(tokens), self.width), FLOOR, device=self.device).scatter_(1, tokens, logprobs)


def _likeliest(
    path: Path, line: RecordedTargets, example: Example, size: int, top: int
) -> tuple[Tensor, Tensor]:
    """Of each target of an example, in order, the ``top`` likeliest tokens: ids and log-probabilities."""
    what = f"{path}: example {line.id}"
    if line.ids_sha256 != ids_hash(example.ids):
        raise DataError(f"{what} was recorded of other tokens than it has now.", _AGAIN)
    at = {place: number for number, place in enumerate(line.places)}
    targets = [place for place, learnt in enumerate(example.mask) if learnt]
    lacking = sum(place not in at for place in targets)
    if lacking:
        raise DataError(f"{what} has nothing of {lacking} of {len(targets)} targets.", _AGAIN)
    recorded = len(line.tokens[0])
    if recorded < top:
        raise DataError(
            f"{what} has {recorded} tokens of each target, the objective reads {top}.",
            f"Record it again with --teacher-top {top} or more.",
        )
    chosen = [at[place] for place in targets]
    tokens, logprobs = torch.tensor(line.tokens)[chosen], torch.tensor(line.logprobs)[chosen]
    if tokens.min() < 0 or tokens.max() >= min(size, line.vocabulary):
        raise DataError(f"{what} names tokens that the student's tokenizer of {size} does not have.", _AGAIN)
    best = logprobs.topk(top, -1)
    return tokens.gather(-1, best.indices).int(), best.values


def recorded_hash(config: DistillConfig) -> str:
    """Of the file of recorded log-probabilities; empty where none was named.

    Raises:
        ConfigError: the objective and the teacher do not go together.
        DataError: the file is not there.
    """
    check_teacher(config)
    if config.teacher_logprobs is None:
        return ""
    path = Path(config.teacher_logprobs)
    if not path.is_file():
        raise DataError(
            f"There is no file {path}.", "Write it with agentkd distill ... --record-teacher FILE."
        )
    return file_hash(path)


def record_teacher(
    trajectories: Path,
    out: Path,
    config: DistillConfig,
    top: int = 20,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write what ``config.teacher`` says at the targets of all examples; a stopped call goes on.

    Args:
        trajectories: ``kept.jsonl``.
        out: the file; examples that stand in it are not computed again.
        config: the settings of the training: they decide the examples and their targets.
        top: likeliest tokens of each target.
        on_progress: called after each example with (done, in all).

    Returns:
        How many examples the file has of these trajectories.

    Raises:
        ConfigError: no teacher, one of another vocabulary, or the file holds something else.
        DataError: nothing to learn from.
    """
    if config.teacher is None:
        raise ConfigError("No teacher was named.", "Add --teacher-model FOLDER_OR_ID.")
    if not trajectories.is_file():
        raise DataError(f"There is no file {trajectories}.", "Check the path, or run: agentkd filter.")
    tokenizer, folder = load_tokenizer(resolve_model(config.base)), resolve_model(config.teacher)
    items = {item.id: item for item in read_trajectories(trajectories)}
    examples = build_examples(list(items.values()), tokenizer, config).examples
    name, top = model_hash(folder), min(top, len(tokenizer))
    known = _known(out, {example.id: ids_hash(example.ids) for example in examples}, name, top)
    rest = [example for example in examples if example.id not in known]
    if not rest:
        return len(examples)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = LocalTeacher(folder, tokenizer, device, compute_dtype(config.precision))
    with AppendLog(out) as log:
        for done, example in enumerate(rest, len(examples) - len(rest) + 1):
            log.append(_recorded(example, teacher, name, top))
            on_progress(done, len(examples))
    return len(examples)


def _known(out: Path, hashes: dict[str, str], teacher: str, top: int) -> set[str]:
    """The examples that stand in the file; refuses a file of another teacher, number or training."""
    found: set[str] = set()
    for line in iter_jsonl(out, RecordedTargets, skip_torn=True) if out.is_file() else ():
        same = line.teacher == teacher and all(len(row) == top for row in line.tokens[:1])
        if not same or hashes.get(line.id, line.ids_sha256) != line.ids_sha256:
            raise ConfigError(
                f"{out} was recorded with another teacher, --teacher-top or other settings.",
                "Choose another file, or remove it.",
            )
        found.add(line.id)
    return found


def _recorded(example: Example, teacher: LocalTeacher, name: str, top: int) -> RecordedTargets:
    (pack,) = single_packs([example])
    logits = teacher.logits(pack)
    # Beyond the tokenizer's vocabulary are only rows that round the model's size up.
    best = logits.log_softmax(-1)[:, : teacher.vocabulary].topk(top, -1)
    return RecordedTargets(
        id=example.id,
        ids_sha256=ids_hash(example.ids),
        teacher=name,
        vocabulary=logits.shape[-1],
        places=[place for place, learnt in enumerate(example.mask) if learnt],
        tokens=best.indices.tolist(),
        # Nine digits give a float32 back exactly.
        logprobs=[[float(f"{value:.9g}") for value in row] for row in best.values.tolist()],
    )
