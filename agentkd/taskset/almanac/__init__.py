"""The almanac: a generated fictional world, its passages, and questions that need them.

Nothing in it can be known without retrieval: names are fictional and every value is drawn
independently. Questions take one to three hops, compare two entities, or calculate with retrieved
facts. The test split has a world of its own, and pairs of relations and phrasings that the train
split never shows (``task.meta["heldout"]``), so that memorised templates are found out.
"""

from __future__ import annotations

from agentkd.taskset.almanac.question import (
    Arithmetic,
    Chain,
    Compare,
    Question,
    heldout_pair,
    parse_question,
    solve,
)
from agentkd.taskset.almanac.relation import HELDOUT_PAIRS, RELATIONS, Relation
from agentkd.taskset.almanac.task import KINDS, almanac_tasks
from agentkd.taskset.almanac.world import World, build_world

__all__ = [
    "HELDOUT_PAIRS",
    "KINDS",
    "RELATIONS",
    "Arithmetic",
    "Chain",
    "Compare",
    "Question",
    "Relation",
    "World",
    "almanac_tasks",
    "build_world",
    "heldout_pair",
    "parse_question",
    "solve",
]
