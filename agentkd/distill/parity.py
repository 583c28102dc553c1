"""Parity before training: what is about to be learnt is what the student will be asked and must emit.

The check does not ask how the examples were made. For every learnt step it renders the prompt as the server
will, finds the token at which the server will stop, and holds the example against both. Each way to go wrong
that has a name is a :class:`Fault`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from agentkd.distill.examples import Example
from agentkd.engine.render import render_prompt
from agentkd.errors import TrainingError
from agentkd.prompt import learnt_prompt, trajectory_messages
from agentkd.trajectory import Step, Trajectory

__all__ = ["Fault", "Finding", "compare_prompts", "find_faults", "refuse_faults"]


class Fault(StrEnum):
    """What can be wrong; the value is how it is told."""

    WRONG_TEMPLATE = "wrong template"
    """The conversation is the same, what the chat template writes around it is not."""
    SYSTEM_PROMPT = "different system prompt"
    EXTRA_SPACE = "extra space"
    """Texts differ by white space only."""
    CONVERSATION = "different conversation"
    TOOL_CALL_ECHO = "tool-call echo"
    """An assistant turn holds the "Calling tools:" that smolagents writes into its memory."""
    DROPPED_THOUGHT = "dropped thought"
    TRUNCATED_TARGET = "truncated target"
    """The example ends within a step."""
    OTHER_TEXT = "different text"
    MISSING_STOP = "missing stop token"
    """The token that ends a turn is not there, or not learnt: the student would not stop."""
    OFF_BY_ONE = "off-by-one mask"
    OBSERVATION = "observation in the loss"
    PROMPT = "prompt in the loss"
    """System prompt, question, or what the template writes."""
    CONTEXT_STEP = "context step in the loss"
    """A step that is only to be read is learnt."""
    UNLEARNT = "unlearnt tokens"
    """Tokens that the student must emit are not learnt."""
    EMPTY_MASK = "empty mask"
    WRONG_BASE = "wrong base"
    """The answers are not those of the student's weights: another base model, another adapter, or none. Found
    when it is served, see :mod:`agentkd.distill.served`."""
    RETOKENISED = "other tokens for the same text"
    """What the model emitted is not how the tokenizer writes that text."""


@dataclass(frozen=True)
class Finding:
    """One fault, and where."""

    fault: Fault
    where: str
    """Example and step."""
    detail: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.where}: {self.detail}"


def refuse_faults(findings: Sequence[Finding]) -> None:
    """Stop when there is any.

    Raises:
        TrainingError: names the first, and counts the others.
    """
    if findings:
        more = f" ({len(findings) - 1} more)" if len(findings) > 1 else ""
        raise TrainingError(
            f"Training would not be what is served: {findings[0]}{more}",
            "Mend the trajectories, the template or the settings; nothing was trained.",
        )


def find_faults(
    examples: Sequence[Example],
    trajectories: Mapping[str, Trajectory],
    system_prompt: str,
    tokenizer: Any,
    stops: frozenset[int],
    *,
    failed_steps: str = "context",
) -> list[Finding]:
    """All faults of all examples, at most one an example.

    Args:
        examples: as they will be trained.
        trajectories: what they were made of, by id.
        system_prompt: what the student will be asked with.
        tokenizer: that the student will be served with.
        stops: ids at which the server stops, see :func:`agentkd.engine.ending.end_tokens`.
        failed_steps: "context" or "target".
    """
    findings: list[Finding] = []
    for example in examples:
        name, _, number = (
            example.id.partition("/") if example.id not in trajectories else (example.id, "", "")
        )
        trajectory = trajectories[name]
        only = int(number) - 1 if number else None
        targets = [failed_steps == "target" or step.failure is None for step in trajectory.steps]
        checker = _Checker(example, trajectory, system_prompt, tokenizer, stops)
        findings += next(([it] for it in checker.faults(targets, only)), [])
    return findings


def compare_prompts(
    got: Sequence[int], wanted: Sequence[int], messages: Sequence[Mapping[str, str]], tokenizer: Any
) -> tuple[Fault, str] | None:
    """Why two renderings of a conversation differ; None when they do not.

    Args:
        got: ids as trained.
        wanted: ids as the server makes them of ``messages``.
        messages: the conversation.
        tokenizer: decodes both.
    """
    if list(got) == list(wanted):
        return None
    pairs = zip(got, wanted, strict=False)
    at = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(got), len(wanted)))
    ours, theirs = tokenizer.decode(list(got)), tokenizer.decode(list(wanted))
    detail = (
        f"from token {at} trained {tokenizer.decode(list(got[at : at + 8]))!r}, "
        f"served {tokenizer.decode(list(wanted[at : at + 8]))!r}"
    )
    system = [item["content"] for item in messages if item["role"] == "system"]
    rest = [item["content"] for item in messages if item["role"] != "system"]
    if ours == theirs:
        return Fault.RETOKENISED, detail
    if any(text.strip() not in ours for text in system) and all(text.strip() in ours for text in rest):
        return Fault.SYSTEM_PROMPT, detail
    if _bare(ours) == _bare(theirs):
        return Fault.EXTRA_SPACE, detail
    if all(text.strip() in ours for text in (*system, *rest)):
        return Fault.WRONG_TEMPLATE, detail
    return Fault.CONVERSATION, detail


def _bare(text: str) -> str:
    return "".join(text.split())


_ECHO = re.compile(r"^Calling tools:\s*$|^Calling tools:\s*\[", re.MULTILINE)


class _Checker:
    """One example against its trajectory."""

    def __init__(
        self,
        example: Example,
        trajectory: Trajectory,
        system_prompt: str,
        tokenizer: Any,
        stops: frozenset[int],
    ) -> None:
        self.example, self.trajectory, self.tokenizer, self.stops = example, trajectory, tokenizer, stops
        self.messages = trajectory_messages(trajectory, learnt_prompt(trajectory, system_prompt))
        self.emitted = [False] * len(example.ids)
        self.stop_places: set[int] = set()
        self.skipped: set[int] = set()
        """Places of emitted tokens that count nothing by their weight."""
        self.prompt: list[int] = []

    def faults(self, targets: Sequence[bool], only: int | None) -> Iterator[Finding]:
        """Every fault, the most telling first. ``only`` is the index of the one learnt step."""
        if not any(self.example.mask):
            yield self._found(Fault.EMPTY_MASK, None, "no token is learnt")
        for number, step in enumerate(self.trajectory.steps):
            if only is not None and number != only:
                continue
            self.prompt = render_prompt(self.tokenizer, self.messages[: 2 + 2 * number])
            begin = len(self.prompt)
            if begin >= len(self.example.ids) and self.stop_places:
                break  # cut behind a whole step, or what follows the last learnt one was left out
            problem = self._prompt(number, begin) or self._text(number, step, begin, targets[number])
            if problem is not None:
                yield problem
                return
        yield from self._mask()

    def _prompt(self, number: int, begin: int) -> Finding | None:
        conversation = self.messages[: 2 + 2 * number]
        why = compare_prompts(self.example.ids[:begin], self.prompt, conversation, self.tokenizer)
        return self._found(why[0], number, why[1]) if why else None

    def _text(self, number: int, step: Step, begin: int, target: bool) -> Finding | None:
        """What the student is to emit at a step, and where it stops."""
        ids = self.example.ids
        end = next((place for place in range(begin, len(ids)) if ids[place] in self.stops), None)
        text: str = self.tokenizer.decode(ids[begin : len(ids) if end is None else end])
        named = (self._record_fault(step, text) if target else None) or self._text_fault(
            step, text, end is None
        )
        if named is not None:
            return self._found(named[0], number, named[1])
        assert end is not None
        self.stop_places.add(end)
        if target:
            for place in range(begin, end + 1):
                self.emitted[place] = True
                if self.example.weights is not None and self.example.weights[place] == 0:
                    self.skipped.add(place)
        return None

    def _record_fault(self, step: Step, text: str) -> tuple[Fault, str] | None:
        """What no model wrote, or what it wrote and is no longer there."""
        if _ECHO.search(step.output) or _ECHO.search(text):
            return Fault.TOOL_CALL_ECHO, 'the turn holds "Calling tools:", which the model never wrote'
        thought, code = _bare(step.thought), _bare(step.code or "")
        gone = thought and thought not in _bare(text)
        if gone and (thought not in _bare(step.output) or (code and code in _bare(text))):
            return Fault.DROPPED_THOUGHT, f"the thought {step.thought[:60]!r} is not in what is learnt"
        return None

    def _text_fault(self, step: Step, text: str, endless: bool) -> tuple[Fault, str] | None:
        """Whether the tokens of a turn are the text that the step has in the conversation."""
        recorded = step.output.strip()
        if endless and text.strip() and recorded.startswith(text.strip()) and recorded != text.strip():
            return Fault.TRUNCATED_TARGET, f"the example ends after {text[-30:]!r}"
        if recorded not in text:
            fault = Fault.EXTRA_SPACE if _bare(recorded) == _bare(text) else Fault.OTHER_TEXT
            return fault, f"learnt {text[:60]!r}, recorded {recorded[:60]!r}"
        if endless:
            return Fault.MISSING_STOP, "no token follows at which the server would stop"
        # A template may trim, and write white space of its own: what it makes of this very turn is right.
        if step.output not in text or _bare(text) == _bare(recorded):
            expected = self._by_template(step.output)
            if text != step.output and text != expected:
                return Fault.EXTRA_SPACE, f"learnt {text[:30]!r} ... {text[-12:]!r}"
        return None

    def _by_template(self, content: str) -> str:
        """What the chat template makes of an assistant turn, up to the token that ends it."""
        asked = [{"role": "user", "content": "q"}]
        opening = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = self.tokenizer.apply_chat_template(
            [*asked, {"role": "assistant", "content": content}], tokenize=False
        )
        turn = str(whole).removeprefix(opening)
        ends = [self.tokenizer.decode([stop]) for stop in self.stops]
        return turn[: min((at for end in ends if (at := turn.find(end)) >= 0), default=len(turn))]

    def _mask(self) -> Iterator[Finding]:
        mask, wanted = self.example.mask, self.emitted
        wanted = [must and place not in self.skipped for place, must in enumerate(wanted)]
        if mask == wanted:
            return
        if mask == [False, *wanted[:-1]] or mask == [*wanted[1:], False]:
            yield self._found(Fault.OFF_BY_ONE, None, "the mask stands one token beside what is emitted")
            return
        missing = {place for place, must in enumerate(wanted) if must and not mask[place]}
        extra = {place for place, have in enumerate(mask) if have and not wanted[place]}
        if extra:
            yield self._extra(min(extra))
        if missing:
            if missing <= self.stop_places:
                yield self._found(Fault.MISSING_STOP, None, "the token that ends a turn is not learnt")
            else:
                token = self.tokenizer.decode([self.example.ids[min(missing)]])
                yield self._found(Fault.UNLEARNT, None, f"{len(missing)} tokens, the first is {token!r}")

    def _extra(self, place: int) -> Finding:
        """Whose token is learnt although nobody emits it."""
        token = self.tokenizer.decode([self.example.ids[place]])
        for number, step in enumerate(self.trajectory.steps):
            begin = len(render_prompt(self.tokenizer, self.messages[: 2 + 2 * number]))
            if place < begin:
                fault = Fault.PROMPT if number == 0 else Fault.OBSERVATION
                return self._found(fault, number, f"token {place}, {token!r}, is learnt")
            end = min((stop for stop in self.stop_places if stop >= begin), default=-1)
            if step.failure is not None and place <= end:
                return self._found(Fault.CONTEXT_STEP, number, f"token {place}, {token!r}, is learnt")
        return self._found(Fault.PROMPT, None, f"token {place}, {token!r}, is learnt")

    def _found(self, fault: Fault, number: int | None, detail: str) -> Finding:
        step = "" if number is None else f", step {number + 1}"
        return Finding(fault, f"{self.example.id}{step}", detail)
