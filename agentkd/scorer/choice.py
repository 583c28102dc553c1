"""Multiple choice: the letter of an option, or the option itself."""

from __future__ import annotations

import re
import string
import unicodedata

from agentkd.scorer.text import stated_answer
from agentkd.task import Task
from agentkd.trajectory import Score

__all__ = ["choice"]

_LETTER = re.compile(r"(?:(?:option|choice|answer) )?[(\[]?([A-Za-z])[)\].:]?", re.IGNORECASE)
_BOTH = re.compile(r"[(\[]?([A-Za-z])[)\].:]+ +(.+)", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}")


def choice(task: Task, answer: str) -> Score:
    """1 for the letter of the gold option or its text. ``meta["choices"]`` lists the options in order.

    An answer that names a letter and the text of another option, or several letters, is wrong.
    """
    options = task.meta.get("choices")
    options = [str(option) for option in options] if isinstance(options, list) else []
    wanted = _chosen(str(task.answer), options)
    if wanted is None:
        return Score(value=None, scorer="choice", reason=f"the gold answer {task.answer!r} is no option")
    got = _chosen(stated_answer(answer), options)
    return Score(
        value=float(got == wanted), scorer="choice", reason="" if got else "the answer names no option"
    )


def _chosen(text: str, options: list[str]) -> str | None:
    text = " ".join(_TEXT.sub(r"\1", unicodedata.normalize("NFKC", text)).split())
    texts = {_plain(option): string.ascii_uppercase[place] for place, option in enumerate(options[:26])}
    letters = string.ascii_uppercase[: len(options)] if options else string.ascii_uppercase
    if _plain(text) in texts:
        return texts[_plain(text)]
    if (found := _LETTER.fullmatch(text)) and found.group(1).upper() in letters:
        return found.group(1).upper()
    if found := _BOTH.fullmatch(text):
        letter = found.group(1).upper()
        if letter in letters and (not options or texts.get(_plain(found.group(2))) == letter):
            return letter
    return None


def _plain(text: str) -> str:
    """Words alone. Articles stay: "A Berlin" is no option "Berlin"."""
    kept = "".join(char if char.isalnum() or char in "+-.,/" else " " for char in text.casefold())
    return " ".join(kept.rstrip(" .,").split())
