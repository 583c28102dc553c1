"""Answers as text: what of a reply is the answer, and when two answers are the same."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from datetime import date

from agentkd.scorer.number import to_number
from agentkd.task import Task
from agentkd.trajectory import Score

__all__ = ["exact", "f1", "golds", "normalise", "stated_answer"]

_MARKED = re.compile(
    r"(?:^|[\s.,;:])(?:the )?(?:final |correct )?(?:answer|option|choice)(?: is:?|:)\s+", re.IGNORECASE
)
_IT_IS = re.compile(r"(?:it|that) is:? ", re.IGNORECASE)
_WRAPPED = (
    re.compile(r"\*\*(.+)\*\*", re.DOTALL),
    re.compile(r"\$\$?([^$]+)\$\$?", re.DOTALL),
    re.compile(r"\\\((.+)\\\)", re.DOTALL),
    re.compile(r"final_answer\((.+)\)", re.DOTALL),
    re.compile(r"#### *(.+)"),
)
_NAME_END = re.compile(r"(?<=[^\W\d_])[+#]{1,2}(?![+#\w])")
_EITHER = re.compile(r"\\boxed\{[^{}]*\}[\s$]*(?:or|and)[\s$]*\\boxed\{[^{}]*\}[\s$.]*$", re.IGNORECASE)
_MONTHS = ["january", "february", "march", "april", "may", "june", "july", "august", "september", "october"]
_MONTHS += ["november", "december"]
_DATES = (
    re.compile(r"(?P<day>\d{1,2})(?:st|nd|rd|th)? (?P<month>[a-z]+)\.?,? (?P<year>\d{3,4})"),
    re.compile(r"(?P<month>[a-z]+)\.? (?P<day>\d{1,2})(?:st|nd|rd|th)?,? (?P<year>\d{3,4})"),
    re.compile(r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})"),
)


def golds(task: Task) -> list[str]:
    """The answers that count as right: the gold answer, then the texts of ``meta["aliases"]``."""
    aliases = task.meta.get("aliases")
    others = [item for item in aliases if isinstance(item, str)] if isinstance(aliases, list) else []
    return ([] if task.answer is None else [task.answer]) + others


def stated_answer(text: str) -> str:
    """What a reply states as its answer, without the words around it.

    The last ``\\boxed{...}`` where there is one; else what stands behind the last "the answer is" or
    "####"; else the whole. Emphasis and dollar signs around it are dropped.
    """
    text = text.strip()
    if (boxed := _last_boxed(text)) is not None:
        if found := _EITHER.search(text):  # two answers are none
            return found[0].replace("\\boxed", "").replace("$", "").strip()
        return boxed.strip()
    if "####" in text:
        text = text[text.rindex("####") :]
    marks = list(_MARKED.finditer(text))
    if marks:
        text = text[marks[-1].end() :].strip()
    elif found := _IT_IS.match(text):
        text = text[found.end() :]
    if marks or not text.startswith("."):
        text = re.sub(r"(?<=[^.])\.$", "", text.strip())
    for pattern in _WRAPPED:
        if found := pattern.fullmatch(text):
            text = found.group(1).strip()
    return text if _last_boxed(text) is None else stated_answer(text)


def _last_boxed(text: str) -> str | None:
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    depth, start = 0, begin + len("\\boxed")
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place]
    return None


def normalise(text: str) -> str:
    """SQuAD normalisation: case, punctuation, English articles and white space.

    Source: Rajpurkar et al. 2016, the official evaluation script's rules; here for the punctuation
    of all scripts, and without invisible characters. A dash between digits stays a boundary, and a
    text of nothing but articles or punctuation stays what it is.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(char for char in text if unicodedata.category(char) != "Cf")
    text = re.sub(r"(?<=\d)\s*[-\u2010-\u2015]\s*(?=\d)", " ", text)
    bare = "".join(char for char in text if not _is_punctuation(char)).split()
    words = [word for word in bare if word not in ("a", "an", "the")]
    return " ".join(words or bare or text.split())


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def exact(task: Task, answer: str) -> Score:
    """1 when the answer is one of the gold answers: the same number, date, or normalised text."""
    return Score(value=float(any(_same(answer, gold) for gold in golds(task))), scorer="exact")


def _same(answer: str, gold: str) -> bool:
    wanted = to_number(gold)
    if wanted is not None:  # the normalisation would drop a sign or a decimal point
        return to_number(stated_answer(answer)) == wanted
    if (day := _date(gold)) is not None and day == _date(stated_answer(answer)):
        return True
    return any(_spelt(text) == _spelt(gold) for text in (answer, stated_answer(answer)))


def _spelt(text: str) -> str:
    """Normalised, and with initials as one word: "J. R. R. Tolkien" is "J.R.R. Tolkien".

    A "+" or "#" that ends a name is part of it: "C++" is no "C".
    """
    text = _NAME_END.sub(lambda found: "plus" * found[0].count("+") + "sharp" * found[0].count("#"), text)
    return re.sub(r"\b([^\W\d])\s(?=[^\W\d]\b)", r"\1", normalise(text))


def _date(text: str) -> date | None:
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    for pattern in _DATES:
        if found := pattern.fullmatch(text):
            month = found["month"]
            if not month.isdigit() and month not in _MONTHS:
                return None
            number = int(month) if month.isdigit() else _MONTHS.index(month) + 1
            try:
                return date(int(found["year"]), number, int(found["day"]))
            except ValueError:
                return None
    return None


def f1(task: Task, answer: str) -> Score:
    """Token F1 after normalisation, the best over the gold answers (SQuAD)."""
    return Score(value=max(_token_f1(answer, gold) for gold in golds(task)), scorer="f1")


def _token_f1(answer: str, gold: str) -> float:
    got: Sequence[str] = normalise(answer).split()
    wanted = normalise(gold).split()
    # As in the evaluation of HotpotQA: "yes it is" is not part of a "yes".
    if got != wanted and any(words in (["yes"], ["no"], ["noanswer"]) for words in (got, wanted)):
        return 0.0
    shared = sum((Counter(got) & Counter(wanted)).values())
    if shared == 0:
        return float(got == wanted)
    precision, recall = shared / len(got), shared / len(wanted)
    value = 2 * precision * recall / (precision + recall)
    return 1.0 if math.isclose(value, 1.0) else value
