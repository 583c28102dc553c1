"""Whether two mathematical texts mean the same; runs in the worker process only."""

from __future__ import annotations

import re
import unicodedata

from math_verify import LatexExtractionConfig, parse, verify

__all__ = ["equivalent", "to_latex"]

_CONFIGS = [LatexExtractionConfig()]
_BASE = re.compile(r"[0-9A-Za-z]+_\{?([0-9]+)\}?")
_CALL = re.compile(r"\b(sqrt|Rational|Fraction)\(([^()]*)\)")
_INEQUALITY = re.compile(r"\s*([^<>]+?)\s*(<=?|\\leq?\b|≤)\s*[a-zA-Z]\s*(<=?|\\leq?\b|≤)\s*([^<>]+?)\s*")


def equivalent(gold: str, answer: str) -> bool:
    """Compare by math-verify.

    Args:
        gold, answer: LaTeX, or expressions as Python and sympy write them.
    """
    one, other = _BASE.fullmatch(gold.strip()), _BASE.fullmatch(answer.strip())
    if one and other and one[1] != other[1]:
        return False  # math-verify leaves the base away
    gold, answer = to_latex(gold), to_latex(answer)
    if any(char in gold for char in "[(") and (found := _INEQUALITY.fullmatch(answer)):
        low, left, right, high = found.groups()
        answer = f"{'(' if left == '<' else '['}{low},{high}{')' if right == '<' else ']'}"
    wanted, got = (parse(f"${text}$", _CONFIGS, parsing_timeout=None) for text in (gold, answer))
    return bool(wanted and got and verify(wanted, got, timeout_seconds=None))


def to_latex(text: str) -> str:
    """The text as LaTeX, where it is written as Python and sympy print expressions.

    It is rewritten and never evaluated: an answer is text of a model.
    """
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("°", "^\\circ")
    if "\\" in text:
        return text
    while (changed := _CALL.sub(_call, text)) != text:
        text = changed
    text = re.sub(r"\*\*\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\*\*\s*(-?\w+)", r"^{\1}", text)
    text = re.sub(r"(?<![A-Za-z\\])(pi|π)(?![A-Za-z])", r"\\pi ", text)
    text = re.sub(r"(?<![A-Za-z\\])oo(?![A-Za-z])", r"\\infty ", text)
    text = re.sub(r"(?<=[0-9])\s*\*\s*(?=[A-Za-z\\])", "", text)  # "4*i" is not a product with a symbol i
    return text.replace("*", " \\cdot ")


def _call(found: re.Match[str]) -> str:
    name, inside = found.groups()
    if name == "sqrt":
        return f"\\sqrt{{{inside}}}"
    top, _, bottom = inside.partition(",")
    return f"\\frac{{{top.strip()}}}{{{bottom.strip() or 1}}}"
