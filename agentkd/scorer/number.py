"""Numbers with units: reading them strictly, and comparing them with a tolerance."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from agentkd.task import Task
from agentkd.trajectory import Score

__all__ = ["Quantity", "numeric", "to_number", "to_quantity"]

RELATIVE_TOLERANCE = 1e-6
LONGEST = 300
"""Characters of a text that may still be a number."""

_PLAIN = r"[+-]?\s?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_POWER = r" ?(?:x|×|\*|\\times|\\cdot) ?10\^\{?(?P<ten>-?[0-9]{1,3})\}?"
_QUANTITY = re.compile(
    r"(?P<mixed>[+-]?[0-9]+ [0-9]+/[0-9]+)(?P<u1>.*)|(?P<ratio>[+-]?[0-9]+ ?/ ?[0-9]+)(?P<u2>.*)"
    rf"|(?P<number>{_PLAIN}(?:[eE][+-]?[0-9]{{1,3}}(?![0-9]))?)(?:{_POWER})?(?P<u3>.*)"
)
_THOUSANDS = re.compile(r"([+-]?)([0-9]{1,3}(?:([, _])[0-9]{3})(?:\3[0-9]{3})*)(?![0-9,_])(.*)", re.DOTALL)
_MULTIPLES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNIT = re.compile(r"[^\W\d_]+(?:[ /][^\W\d_]+)?(?:\^?[23])?|°[CF]?", re.UNICODE)
_NO_UNIT = re.compile(r"\b(or|and|of|to|not|e|x|nor|but|minus|plus|inf|nan)\b", re.IGNORECASE)
_CURRENCY = re.compile(r"^(?:\\?\$|€|£|usd|eur|gbp)\s?|\s?(?:dollars?|usd|euros?|eur|pounds sterling)$", re.I)

_UNITS: dict[str, tuple[str, Fraction]] = {}
"""Of each name: what it measures, and its size in the base unit of that."""
for _measure, _names in {
    "length": "mm millimeter 1/1000; cm centimeter 1/100; m meter 1; km kilometer 1000; inch in 127/5000; "
    "ft foot feet 381/1250; yd yard 1143/1250; mi mile 201168/125",
    "mass": "mg milligram 1/1000; g gram 1; kg kilogram 1000; t ton tonne 1000000; lb pound 45359237/100000; "
    "oz ounce 45359237/1600000",
    "time": "ms millisecond 1/1000; s sec second 1; min minute 60; h hr hour 3600; day 86400; week 604800",
    "volume": "ml milliliter 1/1000; l liter 1; gallon 473176473/125000000",
    "angle": "degree deg ° 1",
}.items():
    for _entry in _names.split("; "):
        *_same, _size = _entry.split()
        for _name in _same:
            _UNITS[_name] = (_measure, Fraction(_size))


class Quantity(NamedTuple):
    """A number and its unit."""

    value: Fraction
    unit: str = ""
    """As it was written, in small letters and the singular; "%" for percent; empty for none."""


def to_number(text: str) -> Fraction | None:
    """The number a text is, or None: signs, thousands separators, decimals, exponents, fractions.

    A text that only contains a number ("about 12 apples") is not one, but a currency sign
    before it or a full stop after it is allowed.
    """
    if re.search(r"[^\W\d_]", text) and not re.fullmatch(r"[^a-zA-Z]*[0-9][eE][+-]?[0-9]{1,3}\.?\s*", text):
        return None
    found = to_quantity(text)
    return found.value if found is not None and not found.unit else None


def to_quantity(text: str) -> Quantity | None:
    """The number a text is, with the one unit behind it; None for anything else, "12 or 13" included."""
    if len(text) > LONGEST:
        return None
    cleaned = _cleaned(text)
    if (found := _QUANTITY.fullmatch(cleaned)) is None:
        return None
    rest = (found["u1"] or found["u2"] or found["u3"] or "").strip()
    try:
        value = _value(found)
    except (ValueError, ZeroDivisionError):
        return None
    word, _, after = rest.partition(" ")
    if word.casefold() in _MULTIPLES:
        value, rest = value * _MULTIPLES[word.casefold()], after.strip()
    if rest in ("%", "percent", "per cent", "pct"):
        return Quantity(value, "%")
    if rest and (not _UNIT.fullmatch(rest) or _NO_UNIT.search(rest)):
        return None
    # "105" with an O for a zero is no 1 of the unit O.
    if rest and re.fullmatch(r"[A-Z0-9]+", rest):
        return None
    return Quantity(value, _singular(rest))


def _value(found: re.Match[str]) -> Fraction:
    if found["mixed"]:
        whole, part = found["mixed"].split()
        size = abs(Fraction(whole)) + Fraction(part)
        return -size if whole.startswith("-") else size
    if found["ratio"]:
        return Fraction(found["ratio"].replace(" ", ""))
    value = Fraction(re.sub(r"\s", "", found["number"]))
    return value * Fraction(10) ** int(found["ten"]) if found["ten"] else value


def _cleaned(text: str) -> str:
    text = re.sub(r"(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])", " ", text.strip())
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").strip()
    text = re.sub(r"^[\u2212\u2013\u2010]", "-", text)
    text = re.sub(r"\\[dt]?frac\{?(-?[0-9]+?)\}?\{?([0-9]+)\}?", r"\1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r" \1", text)
    text = text.replace("\\%", "%").replace("\\,", " ").replace("\\!", "").replace("{,}", ",")
    text = " ".join(text.rstrip(".").split())
    text = _CURRENCY.sub("", text).strip()
    if found := _THOUSANDS.fullmatch(text):
        sign, digits, separator, rest = found.groups()
        text = sign + digits.replace(separator, "") + rest
    return text


def _singular(unit: str) -> str:
    unit = unit.casefold().replace("metre", "meter").replace("litre", "liter")
    if unit in _UNITS:
        return unit
    return unit[:-1] if unit.endswith("s") and len(unit) > 2 else unit


def numeric(task: Task, answer: str) -> Score:
    """1 when the answer is the gold number, within a tolerance where either is no integer.

    ``meta["tolerance"]`` sets the relative tolerance and makes it hold for integers, too;
    ``meta["unit"]`` is the unit that the question asks for. A percentage is a hundredth of its number,
    except where the question asks for percent. A unit that the answer leaves out is forgiven, another
    one of the same measure is converted, and one of another measure is wrong.
    """
    from agentkd.scorer.text import golds, stated_answer

    wanted = [found for gold in golds(task) if (found := to_quantity(gold)) is not None]
    if not wanted:
        return Score(
            value=None, scorer="numeric", reason=f"the gold answer {str(task.answer)[:80]!r} is not a number"
        )
    got = to_quantity(stated_answer(answer))
    if got is None:
        return Score(value=0.0, scorer="numeric", reason="the answer is not a number")
    unit, tolerance = task.meta.get("unit"), task.meta.get("tolerance")
    if isinstance(unit, str):
        wanted = [item if item.unit else item._replace(unit=_singular(unit)) for item in wanted]
    limit = float(tolerance) if isinstance(tolerance, (int, float)) else None
    good = any(_agree(got, item, limit) for item in wanted)
    return Score(
        value=float(good),
        scorer="numeric",
        reason=f"relative tolerance {RELATIVE_TOLERANCE if limit is None else limit:g}",
    )


def _agree(got: Quantity, wanted: Quantity, tolerance: float | None) -> bool:
    if got.unit == wanted.unit or not got.unit:
        if _close(got.value, wanted.value, tolerance):
            return True
        # 0.25 is 25%, but 0.6 is not the 60 of a question for percent that says "60".
        return wanted.unit == "%" and not got.unit and _close(got.value, wanted.value / 100, tolerance)
    if got.unit == "%" and not wanted.unit:
        # A share may be said in percent; 1200% for 12 is a slip by a factor of 100.
        return abs(wanted.value) <= 1 and _close(got.value / 100, wanted.value, tolerance)
    if not wanted.unit:
        return _close(got.value, wanted.value, tolerance)
    one, other = _UNITS.get(got.unit), _UNITS.get(wanted.unit)
    if one is None or other is None or one[0] != other[0]:
        return False
    return _close(got.value * one[1], wanted.value * other[1], tolerance)


def _close(got: Fraction, wanted: Fraction, tolerance: float | None) -> bool:
    if tolerance is None and got.denominator == 1 and wanted.denominator == 1:
        return got == wanted
    limit = Fraction(RELATIVE_TOLERANCE if tolerance is None else tolerance)
    return abs(got - wanted) <= limit * max(abs(wanted), abs(got))
