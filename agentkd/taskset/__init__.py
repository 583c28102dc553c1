"""Tasksets: named, seeded sets of tasks, in splits that never overlap.

:func:`load_taskset` takes a spec::

    gym:products,chain_sum@hard      families of reasoning-gym, both levels in turn or the one named
    almanac                          all kinds of question about a generated world (see .almanac)
    almanac:hops=2                   only two-hop questions; hops=1+2; hops=compare+arithmetic
    path/to/tasks.jsonl              a file, one JSON object a line
    hf:openai/gsm8k:main             a dataset on the Hugging Face hub: name[:config][:split]
    set:gsm_hard=path/to/file        a public test set, in the form it is published in (see .public)

Behind a file or dataset ``?question=COLUMN&answer=COLUMN&scorer=NAME&split=all`` may stand. Several
specs joined by ``+`` share the number of tasks evenly.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from agentkd.errors import ConfigError
from agentkd.retrieval import Passage
from agentkd.task import Task
from agentkd.taskset.almanac import KINDS, almanac_tasks, build_world
from agentkd.taskset.gym import FAMILIES, gym_streams
from agentkd.taskset.hub import hub_tasks
from agentkd.taskset.jsonl import jsonl_tasks
from agentkd.taskset.public import public_tasks
from agentkd.taskset.split import check_split, stable_hash

__all__ = ["FAMILIES", "KINDS", "Taskset", "build_world", "load_taskset"]

TASKS_PER_STREAM = 50
"""How many tasks of each family or kind a generated set has when no number is asked for."""

_SCHEME = re.compile(r"\s*(gym:|almanac|hf:|set:)")
_FILE = re.compile(r"\.jsonl?(\?|\s*$)")


@dataclass(frozen=True)
class Taskset:
    """A named, ordered set of tasks, with the passages that its questions are about."""

    name: str
    """The spec it was made from."""
    split: str
    seed: int
    tasks: tuple[Task, ...]
    passages: tuple[Passage, ...] = ()
    """The corpus that comes with the set; empty for most sets."""

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass(frozen=True)
class _Part:
    """One term of a spec: its streams of tasks in turn, endless when generated."""

    streams: tuple[Iterator[Task], ...]
    passages: tuple[Passage, ...] = ()
    size: int | None = None
    """How many tasks there are; None when there is no end."""


def load_taskset(spec: str, split: str = "train", n: int | None = None, seed: int = 0) -> Taskset:
    """Make or load a taskset.

    The same arguments give the same tasks, and fewer tasks are the first of more. Generated sets
    never share a question, or what gives its answer away, between "train" of any seed and "test"
    of any seed. Files and datasets keep their order with seed 0 and are shuffled by other seeds.

    Args:
        spec: see the module.
        split: "train" or "test"; for files and datasets also "all".
        n: number of tasks, shared evenly by the terms of the spec and by the families of a term;
            by default 50 a family, and all of a file or dataset. A file may have fewer.
        seed: of the draws.

    Raises:
        ConfigError: the spec is wrong, or a package for it is missing.
        DataError: a file or dataset is malformed.
    """
    if n is not None and n < 1:
        raise ConfigError(f"A taskset of {n} tasks makes no sense.", "Ask for at least one.")
    parts = [_part(term, split, seed) for term in _terms(spec)]
    if n is None:
        tasks = [task for part in parts for task in _take(part, _default_size(part))]
    else:
        shares = [n // len(parts) + (index < n % len(parts)) for index in range(len(parts))]
        tasks = list(_interleave([iter(_take(p, share)) for p, share in zip(parts, shares, strict=True)]))
    unique = {task.id: task for task in tasks}
    passages = {passage.id: passage for part in parts for passage in part.passages}
    return Taskset(spec, split, seed, tuple(unique.values()), tuple(passages.values()))


def _default_size(part: _Part) -> int:
    return part.size if part.size is not None else TASKS_PER_STREAM * len(part.streams)


def _take(part: _Part, count: int) -> list[Task]:
    return list(itertools.islice(_interleave(list(part.streams)), count))


def _interleave(streams: list[Iterator[Task]]) -> Iterator[Task]:
    """One task of each stream in turn, until all are at an end."""
    while streams:
        alive = []
        for stream in streams:
            for task in itertools.islice(stream, 1):
                alive.append(stream)
                yield task
        streams = alive


def _terms(spec: str) -> list[str]:
    """The terms between "+" signs, where the "+" is not inside a term ("hops=1+2", a file name)."""
    if Path(spec).is_file():
        return [spec]
    terms: list[str] = []
    for piece in spec.split("+"):
        if terms and not _starts_term(piece, terms[-1]):
            terms[-1] += f"+{piece}"
        else:
            terms.append(piece)
    return [term.strip() for term in terms]


def _starts_term(piece: str, before: str) -> bool:
    if _SCHEME.match(piece):
        return True
    # Part of a file's name: its end is still to come, or it is the end.
    unfinished = not _SCHEME.match(before) and not _FILE.search(before)
    return _FILE.search(piece) is not None and not unfinished


def _part(term: str, split: str, seed: int) -> _Part:
    scheme, _, rest = term.partition(":")
    if scheme == "gym":
        check_split(split)
        return _Part(tuple(gym_streams(rest, split, seed)))
    if scheme == "almanac":
        check_split(split)
        kinds = _kinds(rest)
        world = build_world(seed, split)
        return _Part(tuple(almanac_tasks(kind, split, seed) for kind in kinds), world.passages)
    if scheme == "set":
        check_split(split, ("test", "all"))
        return _listed(public_tasks(rest), seed)
    name, _, query = term.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    wanted = options.pop("split", split)
    check_split(wanted, ("train", "test", "all"))
    if scheme == "hf":
        return _listed(hub_tasks(name.partition(":")[2], wanted, options), seed)
    if name.endswith((".jsonl", ".json")) or Path(name).exists():
        return _listed(jsonl_tasks(Path(name), wanted, options), seed)
    raise ConfigError(
        f"{term!r} is no taskset.",
        f"Write gym:FAMILY ({', '.join(FAMILIES)}), almanac, a file.jsonl, hf:NAME, set:NAME=FILE.",
    )


def _listed(tasks: list[Task], seed: int) -> _Part:
    if seed != 0:
        random.Random(stable_hash("shuffle", seed)).shuffle(tasks)
    return _Part((iter(tasks),), size=len(tasks))


def _kinds(options: str) -> tuple[str, ...]:
    if not options:
        return tuple(KINDS)
    name, _, value = options.partition("=")
    if name != "hops" or not value:
        raise ConfigError(f"The almanac has no option {options!r}.", "Write for instance almanac:hops=2.")
    kinds = tuple(f"{part}hop" if part.isdigit() else part for part in value.split("+"))
    for kind in kinds:
        if kind not in KINDS:
            names = ", ".join(kind.removesuffix("hop") for kind in KINDS)
            raise ConfigError(f"The almanac has no hops={value}.", f"Join some of these by '+': {names}.")
    return kinds
