"""The offline expert: a programmatic teacher for the generated tasksets.

It is no language model. It recognises the questions of the gym families and of the almanac by their
text, plans by rules, and writes as a model would: as a code agent, step by step, or as a plain
chain of thought, whichever the system prompt asks for. It never sees a gold answer, and it errs at
a settable rate in the ways models err, so that filters and recovery have real work. Whatever it
teaches is labelled :data:`EXPERT_LABEL`.
"""

from __future__ import annotations

import random
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from agentkd.errors import ConfigError
from agentkd.expert.action import MISTAKES, Action, Voice, spoil
from agentkd.expert.arithmetic import Solution, solve_arithmetic
from agentkd.expert.conversation import Conversation, read_messages
from agentkd.expert.search import goal_of, guess, recall, search_action
from agentkd.taskset.almanac import Question, World, parse_question
from agentkd.taskset.split import stable_hash

__all__ = ["EXPERT_LABEL", "EXPERT_MODEL_ID", "MISTAKES", "Expert"]

EXPERT_LABEL = "offline expert (programmatic)"
"""What the expert is called wherever its work appears."""
EXPERT_MODEL_ID = "offline-expert"

_FRAMES = (
    "I need {goal}, so I {how}.",
    "The task asks for {goal}, so I {how}.",
    "I am looking for {goal}, so I {how}.",
    "To get {goal}, I {how}.",
)
_OPENINGS = ("", "I go step by step.", "Let me work it out.", "I take one step after the other.")
_TWO_STEPS = 0.1
"""Probability (at temperature 1) of printing a result first and answering in the next step."""
_MAX_FAILURES = 4


class Expert:
    """A programmatic policy behind the interface of a chat model. Keeps no state between calls.

    Args:
        seed: of its mistakes.
        error_rate: probability of a mistake in each step, 0 to 1. A step that follows a failed one
            is always right, so every error can be recovered from.
        worlds: almanac worlds whose facts it knows by heart, for chain of thought without tools.

    Raises:
        ConfigError: the error rate is not between 0 and 1.
    """

    def __init__(self, *, seed: int = 0, error_rate: float = 0.1, worlds: Sequence[World] = ()) -> None:
        if not 0 <= error_rate <= 1:
            raise ConfigError(f"An error rate of {error_rate} makes no sense.", "Give a number from 0 to 1.")
        self.seed = seed
        self.error_rate = error_rate
        self.worlds = tuple(worlds)

    def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        temperature: float = 0.0,
        seed: int | None = None,
        continue_final_message: bool = False,
    ) -> list[str]:
        """Answer a conversation.

        Args:
            messages: chat messages; contents may be texts or lists of parts.
            n: number of answers.
            temperature: 0 gives n times the same words; above, wording and plan vary.
            seed: makes the answers at a temperature above 0 repeatable; without one they are drawn
                afresh at each call, as from any model.
            continue_final_message: go on from the last message, an assistant's, by its words.

        Returns:
            The texts of n assistant messages, without what they go on from.

        Raises:
            DataError: the conversation has no user message.
        """
        talk = read_messages(messages, continue_final_message)
        draw = secrets.randbits(62) if temperature > 0 and seed is None else seed
        answers = []
        for sample in range(n):
            source = (draw, sample) if temperature > 0 else ()
            rng = random.Random(
                stable_hash(self.seed, talk.question, len(talk.turns), talk.is_agent, *source)
            )
            text = (
                self._act(talk, temperature, rng) if talk.is_agent else self._reason(talk, temperature, rng)
            )
            answers.append(_continue(talk.prefix, text))
        return answers

    def _mistake(self, rng: random.Random) -> str | None:
        errs, mistake = rng.random() < self.error_rate, rng.choice(MISTAKES)
        return mistake if errs else None

    def _act(self, talk: Conversation, temperature: float, rng: random.Random) -> str:
        """One step as a code agent."""
        mistake = self._mistake(rng)
        voice = Voice(rng, temperature)
        action = self._action(talk, voice, rng)
        if mistake is None or (talk.last is not None and talk.last.failed):
            return action.text()
        return spoil(action, mistake, rng)

    def _action(self, talk: Conversation, voice: Voice, rng: random.Random) -> Action:
        solution = solve_arithmetic(talk.question)
        if solution is not None:
            return _compute(solution, talk, voice, rng)
        question = parse_question(talk.question)
        if question is not None:
            return search_action(question, talk, voice, rng)
        thought = "I have no method for a question of this kind, so I give up."
        return Action(thought, 'final_answer("unknown")', "final_answer(0)")

    def _reason(self, talk: Conversation, temperature: float, rng: random.Random) -> str:
        """A whole answer as a chain of thought."""
        mistake = self._mistake(rng)
        lines, answer, wrong = self._thoughts(talk.question, rng)
        opening = Voice(rng, temperature).pick(_OPENINGS)
        lines = [opening, *lines] if opening else lines
        # Of the agent's mistakes a chain of thought knows two: a wrong answer and no answer line.
        if mistake != "no code block":
            lines = [*lines, f"Answer: {answer if mistake is None else wrong}"]
        if not talk.in_paragraphs:
            return "\n".join(lines)
        return f"{_first_paragraph(talk.question)}\n\n" + "\n".join(lines)

    def _thoughts(self, text: str, rng: random.Random) -> tuple[list[str], str, str]:
        """The lines of a chain of thought, its answer, and a wrong one."""
        solution = solve_arithmetic(text)
        if solution is not None:
            return list(solution.reasoning), solution.answer, _wrong_answer(solution.answer, rng)
        question = parse_question(text)
        if question is None:
            return ["I have no method for a question of this kind."], "unknown", "0"
        known = recall(question, self.worlds)
        if known is None:
            return ["I do not know this and cannot look it up."], "unknown", guess(question, rng)
        return *known, _other_guess(question, known[1], rng)


def _compute(solution: Solution, talk: Conversation, voice: Voice, rng: random.Random) -> Action:
    """The step of an agent that lets Python calculate."""
    last = talk.last
    result = next((turn.printed for turn in reversed(talk.turns) if not turn.failed and turn.printed), "")
    if result and last is not None and not last.failed and "\n" not in result:
        thought = f"I need {solution.goal}. The observation shows {result}, so that is the answer."
        misread = _literal(_wrong_answer(solution.answer, rng))
        return Action(thought, f"final_answer({_literal(result)})", f"final_answer({misread})")
    if sum(turn.failed for turn in talk.turns) >= _MAX_FAILURES:
        thought = f"I need {solution.goal}, but the code failed too often, so I give up."
        return Action(thought, 'final_answer("unknown")', solution.slip)
    thought = voice.pick(_FRAMES).format(goal=solution.goal, how=solution.how)
    code = solution.codes[0] if not voice.chance(0.2) else voice.pick(solution.codes)
    if last is not None and last.failed:
        return Action(f"The last step failed. {thought}", code, solution.slip)
    if voice.chance(_TWO_STEPS):
        return Action(thought, code.replace("final_answer(", "print("), solution.slip)
    return Action(thought, code, solution.slip)


def _literal(value: str) -> str:
    """The value as Python: an integer stays one, all else is a text."""
    return value if re.fullmatch(r"0|-?[1-9]\d*", value) else f'"{value}"'


def _wrong_answer(answer: str, rng: random.Random) -> str:
    """Near the answer, as a slip in the calculation makes it."""
    if answer.lstrip("-").isdigit():
        return str(int(answer) + rng.choice((-10, -1, 1, 2, 10)))
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    if answer in days:
        return days[(days.index(answer) + rng.choice((1, 2, 6))) % 7]
    return answer[:-1] + ("1" if answer.endswith("0") else "0")


def _other_guess(question: Question, answer: str, rng: random.Random) -> str:
    return next(value for value in iter(lambda: guess(question, rng), "") if value != answer)


def _first_paragraph(text: str) -> str:
    """What a solver says first: what is asked for."""
    solution, question = solve_arithmetic(text), parse_question(text)
    goal = solution.goal if solution else goal_of(question) if question else "a method that I do not have"
    return f"To answer this I need {goal}."


def _continue(prefix: str, text: str) -> str:
    """What follows a given beginning of the answer."""
    if not prefix or text.startswith(prefix):
        return text[len(prefix) :]
    rest = text.removeprefix("Thought: ") if prefix.strip().startswith("Thought:") else text
    return rest if prefix[-1].isspace() else f" {rest}"
