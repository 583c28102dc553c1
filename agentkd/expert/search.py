"""How the expert answers almanac questions: search, read, search on; or from memory."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agentkd.expert.action import Action, Voice
from agentkd.expert.conversation import Conversation, Turn
from agentkd.taskset.almanac import RELATIONS, Arithmetic, Chain, Compare, Question, World, solve
from agentkd.taskset.almanac.question import Lookup
from agentkd.taskset.almanac.words import NAME_PARTS

__all__ = ["goal_of", "guess", "recall", "search_action"]

_PASSAGE = re.compile(r"^\[([^\]\n]+)\] (.*)$", re.MULTILINE)
_MAX_TRIES = 2
"""Searches for one entity before the expert gives up."""
_MAX_FAILURES = 4
"""Failed steps before the expert gives up."""

_NEED = ("I need {goal}.", "I am looking for {goal}.", "The task asks for {goal}.")
_GO = ("so I search for {entity}.", "so I look up {entity}.", "so I search the passages for {entity}.")
_SO = ("so that is the answer.", "so I answer that.", "which is the answer.")


class _Fact(NamedTuple):
    entity: str
    relation: str
    value: str

    def sentence(self) -> str:
        """The fact in words, without a full stop: "The mayor of Silver Harbor is Rose Fox"."""
        return f"{_upper(RELATIONS[self.relation].noun.format(x=self.entity))} is {self.value}"


@dataclass(frozen=True)
class _Progress:
    """How far the known facts lead."""

    found: tuple[tuple[_Fact, ...], ...]
    """The known facts of each chain that the question needs."""
    missing: Chain | None
    """The fact to find next: one entity, one relation; None when all is known."""

    @property
    def facts(self) -> list[_Fact]:
        """All known facts, in the order of need."""
        return [fact for chain in self.found for fact in chain]


def search_action(question: Question, talk: Conversation, voice: Voice, rng: random.Random) -> Action:
    """The next step of an agent that can call ``search``.

    Everything is decided from the question and from the passages in the observations.

    Args:
        question: as parsed from the text.
        talk: the conversation so far.
        voice: of the thought.
        rng: for the guesses of a mistaken expert.
    """
    progress = _progress(question, _passages(talk.turns))
    need = voice.pick(_NEED).format(goal=goal_of(question))
    wrong = f"final_answer({_literal(guess(question, rng))})"
    if progress.missing is None:
        thought, code = _conclusion(question, progress, need, voice)
        return Action(thought, code, wrong)
    entity = progress.missing.entity
    tries = sum(f'search("{entity}' in turn.output and not turn.failed for turn in talk.turns)
    if tries >= _MAX_TRIES or sum(turn.failed for turn in talk.turns) >= _MAX_FAILURES:
        thought = f"{need} I cannot find {progress.missing.goal()}, so I give up."
        return Action(thought, 'final_answer("unknown")', wrong)
    # The second try adds the words of the relation; some first tries do, for variety.
    words = progress.missing.goal().removeprefix("the ").partition(" of ")[0]
    query = f"{entity} {words}" if tries or voice.chance(0.1) else entity
    thought = _next_thought(question, progress, need, voice, tries, talk.last)
    hasty = f"{need} I think that I know it already."
    return Action(thought, f'print(search("{query}"))', wrong, slip_thought=hasty)


def _passages(turns: Sequence[Turn]) -> dict[str, str]:
    """The text of every passage seen so far, by title."""
    return {title: text for turn in turns for title, text in _PASSAGE.findall(turn.observation)}


def _chains(question: Question) -> tuple[Chain, ...]:
    """What has to be looked up, in order."""
    if isinstance(question, Chain):
        return (question,)
    if isinstance(question, Arithmetic):
        return (question.left, question.right)
    return tuple(
        Chain(entity, (relation,))
        for entity in (question.first, question.second)
        for relation in (question.by, question.want)
    )


def _progress(question: Question, known: dict[str, str]) -> _Progress:
    def lookup(entity: str, relation: str) -> str | None:
        return RELATIONS[relation].read(known[entity]) if entity in known else None

    found: list[tuple[_Fact, ...]] = []
    for chain in _chains(question):
        facts = _follow(chain, lookup)
        found.append(facts)
        if len(facts) < len(chain.relations):
            entity = facts[-1].value if facts else chain.entity
            return _Progress(tuple(found), Chain(entity, (chain.relations[len(facts)],)))
    return _Progress(tuple(found), None)


def _follow(chain: Chain, lookup: Lookup) -> tuple[_Fact, ...]:
    values = chain.follow(lookup)
    entities = [chain.entity, *values]
    return tuple(_Fact(*fact) for fact in zip(entities, chain.relations, values, strict=False))


def goal_of(question: Question) -> str:
    """What is looked for, in words."""
    if isinstance(question, Chain):
        return question.goal()
    if isinstance(question, Compare):
        which = question.description().removeprefix("the one ")
        return RELATIONS[question.want].noun.format(
            x=f"the one of {question.first} and {question.second} {which}"
        )
    left, right = (RELATIONS[chain.relations[-1]].comparison for chain in (question.left, question.right))
    x, y = (Chain(chain.entity, chain.relations[:-1]).goal() for chain in (question.left, question.right))
    assert left is not None and right is not None
    if question.operation == "sum":
        return f"the {left.unit} of {x} and {y} together"
    return f"the years between the {left.event} of {x} and the {right.event} of {y}"


def _next_thought(
    question: Question, progress: _Progress, need: str, voice: Voice, tries: int, last: Turn | None
) -> str:
    assert progress.missing is not None
    subgoal = progress.missing.goal()
    go = voice.pick(_GO).format(entity=progress.missing.entity)
    facts = progress.facts
    # Of the first of two entities to compare, the value that decides is the one to keep in mind.
    shown = facts[:1] if isinstance(question, Compare) else facts[-1:]
    reason = shown[0].sentence() if shown else f"First I need {subgoal}"
    if last is not None and last.failed:
        return f"The last step failed. {need} {reason}, {go}"
    if tries:
        return f"{need} The last search did not show {subgoal}, so I try other words."
    if not facts and subgoal == goal_of(question):
        return f"{need.removesuffix('.')}, {go}"
    return f"{need} {reason}, {go}"


def _conclusion(question: Question, progress: _Progress, need: str, voice: Voice) -> tuple[str, str]:
    """The last thought and its code."""
    if isinstance(question, Chain):
        fact = progress.facts[-1]
        return f"{need} {fact.sentence()}, {voice.pick(_SO)}", f"final_answer({_literal(fact.value)})"
    if isinstance(question, Arithmetic):
        left, right = (chain[-1] for chain in progress.found)
        work = "add them" if question.operation == "sum" else "subtract them"
        thought = f"{need} {left.sentence()} and {_lower(right.sentence())}, so I {work}."
        a, b = left.value, right.value
        return thought, f"final_answer({a} + {b})" if work == "add them" else f"final_answer(abs({a} - {b}))"
    first, one, second, two = progress.facts
    sign = ">" if question.more else "<"
    thought = f"{need} {first.sentence()} and {_lower(second.sentence())}, so I compare them."
    choice = f"{_literal(one.value)} if {first.value} {sign} {second.value} else {_literal(two.value)}"
    return thought, f"final_answer({choice})"


def recall(question: Question, worlds: Sequence[World]) -> tuple[list[str], str] | None:
    """A chain of thought from memory, and its answer; None for what the worlds do not hold."""

    def lookup(entity: str, relation: str) -> str | None:
        return next((value for world in worlds if (value := world.lookup(entity, relation))), None)

    answer = solve(question, lookup)
    if answer is None:
        return None
    lines = [f"{fact.sentence()}." for chain in _chains(question) for fact in _follow(chain, lookup)]
    if isinstance(question, Arithmetic):
        a, b = (int(str(solve(chain, lookup))) for chain in (question.left, question.right))
        lines.append(
            f"{a} + {b} = {answer}."
            if question.operation == "sum"
            else f"{max(a, b)} - {min(a, b)} = {answer}."
        )
    if isinstance(question, Compare):
        lines.append(f"I need {goal_of(question)}, and that is {answer}.")
    return lines, answer


def guess(question: Question, rng: random.Random) -> str:
    """A value of the right kind that is most likely wrong."""
    if isinstance(question, Arithmetic):
        return str(rng.randint(2, 900))
    relation = RELATIONS[question.want if isinstance(question, Compare) else question.relations[-1]]
    if relation.numeric:
        return str(rng.randint(*relation.span))
    if relation.words:
        return rng.choice(relation.words)
    pattern, first, second = NAME_PARTS[relation.target]
    return pattern.format(rng.choice(first), rng.choice(second))


def _literal(value: str) -> str:
    return value if value.isdigit() else f'"{value}"'


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
