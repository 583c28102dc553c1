"""How the expert solves the reasoning-gym families, from the text of the question alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

__all__ = ["Solution", "solve_arithmetic"]


@dataclass(frozen=True)
class Solution:
    """A way to solve one question, by code and in words."""

    goal: str
    """What is looked for: "the product of the two numbers"."""
    how: str
    """What the code does: "multiply them in Python"."""
    codes: tuple[str, ...]
    """Equivalent code, the usual one first; each ends with ``final_answer(...)`` once."""
    slip: str
    """Code with a mistake that models make, and a wrong result."""
    reasoning: tuple[str, ...]
    """The chain of thought, line by line."""
    answer: str


_MOST_NUMBERS = 1_000_000
"""The longest range that is sieved: a question must not stop the endpoint."""


def solve_arithmetic(question: str) -> Solution | None:
    """A solution, or None for a question of no known kind."""
    for parser in _PARSERS:
        try:
            solution = parser(question)
        except (ArithmeticError, LookupError, StopIteration, ValueError):
            continue  # the words of a known kind with numbers it never has
        if solution is not None:
            return solution
    return None


def _product(question: str) -> Solution | None:
    found = re.search(r"multiplication: (\d+) \* (\d+)", question)
    if found is None:
        return None
    a, b = int(found[1]), int(found[2])
    lines, total = [f"I multiply {a} by the digits of {b}, one after the other."], 0
    for place, digit in enumerate(reversed(str(b))):
        part = int(digit) * 10**place
        lines.append(f"{a} * {part} = {a * part}. {total} + {a * part} = {total + a * part}.")
        total += a * part
    return Solution(
        goal="the product of the two numbers",
        how="multiply them in Python",
        codes=(f"final_answer({a} * {b})", f"product = {a} * {b}\nfinal_answer(product)"),
        slip=f"final_answer({a} * {_misread(b)})",
        reasoning=tuple(lines),
        answer=str(a * b),
    )


def _misread(number: int) -> int:
    """The number with its last two digits swapped, or another last digit."""
    text = str(number)
    swapped = int(text[:-2] + text[-1] + text[-2]) if len(text) > 1 else number
    return swapped if swapped != number else number + 1


def _chain_sum(question: str) -> Solution | None:
    found = re.search(r"arithmetic problem: (\d+(?: [+-] \d+)+) =", question)
    if found is None:
        return None
    expression = found[1]
    parts = expression.split(" ")
    total, lines = int(parts[0]), []
    for sign, number in zip(parts[1::2], parts[2::2], strict=True):
        after = total + int(number) if sign == "+" else total - int(number)
        lines.append(f"{total} {sign} {number} = {after}.")
        total = after
    wrong = " ".join([*parts[:-1], str(_misread(int(parts[-1])))])
    return Solution(
        goal="the result of the sum",
        how="compute it in Python",
        codes=(f"final_answer({expression})", f"result = {expression}\nfinal_answer(result)"),
        slip=f"final_answer({wrong})",
        reasoning=tuple(lines),
        answer=str(total),
    )


def _lcm(question: str) -> Solution | None:
    found = re.search(r"\(LCM\) of these numbers: ([\d, ]+)", question)
    if found is None:
        return None
    numbers = [int(number) for number in re.findall(r"\d+", found[1])]
    lines, total = [], numbers[0]
    for number in numbers[1:]:
        big, small = max(total, number), min(total, number)
        while small:
            lines.append(f"{big} mod {small} = {big % small}.")
            big, small = small, big % small
        lines.append(f"The greatest common divisor of {total} and {number} is {big}.")
        lines.append(f"The least common multiple is {total} / {big} * {number} = {total // big * number}.")
        total = total // big * number
    listed = ", ".join(map(str, numbers))
    wrong = next(w for w in range(numbers[-1] + 1, 10**6) if math.lcm(*numbers[:-1], w) != total)
    return Solution(
        goal="the least common multiple of the numbers",
        how="use math.lcm",
        codes=(
            f"import math\nfinal_answer(math.lcm({listed}))",
            f"import math\nresult = math.lcm({listed})\nfinal_answer(result)",
        ),
        slip=f"import math\nfinal_answer(math.lcm({', '.join(map(str, [*numbers[:-1], wrong]))}))",
        reasoning=tuple(lines),
        answer=str(total),
    )


_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"


def _weekday(question: str) -> Solution | None:
    written = re.search(rf"({_MONTHS}) (\d+), (\d{{4}})", question)
    slashed = re.search(r"(\d\d)/(\d\d)/(\d{4})", question)
    if "week" not in question or not (written or slashed):
        return None
    text = written[0] if written else slashed[0] if slashed else ""
    day = datetime.strptime(text, "%B %d, %Y" if written else "%m/%d/%Y").date()
    shift = re.search(r"(\d+)[ -]day", question)
    if shift is None:
        return _weekday_of(day, text)
    back = re.search(r"\bago\b|\bbefore\b|\bbackward\b", question) is not None
    return _weekday_after(day, text, int(shift[1]), back)


def _date_code(day: date) -> str:
    return f"date({day.year}, {day.month}, {day.day})"


def _weekday_of(day: date, text: str) -> Solution:
    anchor = date(2000, 1, 1)
    distance = (day - anchor).days
    side = "after" if distance >= 0 else "before"
    name = day.strftime("%A")
    wrong = day + timedelta(days=1)
    imports = "from datetime import date\n"
    return Solution(
        goal=f"the weekday of {text}",
        how="ask Python's datetime",
        codes=(
            f'{imports}final_answer({_date_code(day)}.strftime("%A"))',
            f'{imports}day = {_date_code(day)}\nfinal_answer(day.strftime("%A"))',
        ),
        slip=f'{imports}final_answer({_date_code(wrong)}.strftime("%A"))',
        reasoning=(
            "January 1, 2000 was a Saturday.",
            f"{text} is {abs(distance)} days {side} it.",
            f"{abs(distance)} days are {abs(distance) // 7} weeks and {abs(distance) % 7} days.",
            f"{abs(distance) % 7} days {side} Saturday is {name}.",
        ),
        answer=name,
    )


def _weekday_after(day: date, text: str, count: int, back: bool) -> Solution:
    side, sign = ("before", "-") if back else ("after", "+")
    target = day - timedelta(days=count) if back else day + timedelta(days=count)
    name = target.strftime("%A")
    imports = "from datetime import date, timedelta\n"

    def moved(days: int) -> str:
        return f"{_date_code(day)} {sign} timedelta(days={days})"

    return Solution(
        goal=f"the weekday {count} days {side} {text}",
        how="move the date with timedelta",
        codes=(
            f'{imports}day = {moved(count)}\nfinal_answer(day.strftime("%A"))',
            f'{imports}final_answer(({moved(count)}).strftime("%A"))',
        ),
        slip=f'{imports}day = {moved(count + 1)}\nfinal_answer(day.strftime("%A"))',
        reasoning=(
            f"{text} is a {day.strftime('%A')}.",
            f"{count} days are {count // 7} weeks and {count % 7} days.",
            f"{count % 7} days {side} {day.strftime('%A')} is {name}.",
        ),
        answer=name,
    )


def _letters(question: str) -> Solution | None:
    found = re.search(r'letter "(\w)" appear in the text: "([^"]*)"', question)
    if found is None:
        return None
    letter, text = found[1], found[2]
    words = text.split()
    counts = [word.lower().count(letter) for word in words]
    holding = [index for index, count in enumerate(counts) if count] or [0]
    shorter = " ".join(words[: holding[-1]] + words[holding[-1] + 1 :])
    return Solution(
        goal=f'how often the letter "{letter}" appears',
        how="count it in the lower-case text",
        codes=(
            f'text = "{text}"\nfinal_answer(text.lower().count("{letter}"))',
            f'final_answer("{text}".lower().count("{letter}"))',
        ),
        slip=f'text = "{shorter}"\nfinal_answer(text.lower().count("{letter}"))',
        reasoning=(
            ", ".join(f"{word}: {count}" for word, count in zip(words, counts, strict=True)) + ".",
            f"Together: {sum(counts)}.",
        ),
        answer=str(sum(counts)),
    )


def _equation(question: str) -> Solution | None:
    found = re.search(r"(?:for|of) ([a-z])\b.*?: (.+?) = (-?\d+)\s*$", question)
    if found is None or not re.fullmatch(rf"[\d {found[1]}*+-]+", found[2]):
        return None
    name, side, right = found[1], found[2], int(found[3])
    slope = constant = 0
    for sign, factor, variable in re.findall(rf"([+-]?) *(\d*)\*?({name}?)", side):
        if factor or variable:
            value = int(factor or 1) * (-1 if sign == "-" else 1)
            slope, constant = (slope + value, constant) if variable else (slope, constant + value)
    if slope == 0 or (right - constant) % slope:
        return None
    answer = (right - constant) // slope

    def search(value: int) -> str:
        return (
            f"for {name} in range(-1000, 1001):\n"
            f"    if {side} == {value}:\n        final_answer({name})\n        break"
        )

    return Solution(
        goal=f"the value of {name} that satisfies the equation",
        how="try the whole numbers",
        codes=(search(right),),
        slip=search(right + slope),
        reasoning=(
            f"{slope}*{name} = {right} - {constant} = {right - constant}."
            if constant >= 0
            else f"{slope}*{name} = {right} + {-constant} = {right - constant}.",
            f"{name} = {right - constant} / {slope} = {answer}.",
        ),
        answer=str(answer),
    )


def _primes(question: str) -> Solution | None:
    found = re.search(r"prime numbers there are between (\d+) and (\d+)", question)
    if found is None:
        return None
    low, high = int(found[1]), int(found[2])
    if high > _MOST_NUMBERS:
        return None
    sieve = _sieve(high)
    primes = [number for number in range(low, high + 1) if sieve[number]]
    code = (
        f"sieve = [False, False] + [True] * ({high} - 1)\n"
        "for p in range(2, {root} + 1):\n"
        f"    for m in range(p * p, {high} + 1, p):\n"
        "        sieve[m] = False\n"
        f"final_answer(sum(sieve[{low}:{high} + 1]))"
    )
    root = math.isqrt(high)
    # A sieve that stops early leaves numbers standing that are no primes.
    short = next((r for r in range(root, 0, -1) if _standing(low, high, r) != len(primes)), None)
    slip = f"final_answer({high} - {low})" if short is None else code.format(root=short)
    return Solution(
        goal=f"how many primes lie between {low} and {high}",
        how="sieve and count",
        codes=(code.format(root=f"int({high} ** 0.5)"),),
        slip=slip,
        reasoning=_count_in_words(low, high, primes),
        answer=str(len(primes)),
    )


def _sieve(high: int) -> list[bool]:
    sieve = [False, False] + [True] * max(high - 1, 0)
    for p in range(2, math.isqrt(high) + 1):
        if sieve[p]:
            sieve[p * p :: p] = [False] * len(sieve[p * p :: p])
    return sieve


def _standing(low: int, high: int, root: int) -> int:
    """How many numbers a sieve leaves that only strikes out multiples of 2 to ``root``."""
    sieve = [False, False] + [True] * max(high - 1, 0)
    for p in range(2, root + 1):
        sieve[p * p :: p] = [False] * len(sieve[p * p :: p])
    return sum(sieve[low : high + 1])


def _count_in_words(low: int, high: int, primes: Sequence[int]) -> tuple[str, ...]:
    if len(primes) <= 40:
        return (f"The primes are {', '.join(map(str, primes)) or 'none'}.", f"These are {len(primes)}.")
    lines, total = [], 0
    for start in range(low, high + 1, 1000):
        end = min(start + 999, high)
        count = sum(start <= prime <= end for prime in primes)
        lines.append(f"From {start} to {end} there are {count}. {total} + {count} = {total + count}.")
        total += count
    return tuple(lines)


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _conversion(question: str) -> Solution | None:
    found = re.search(r"[Cc]onvert the (\S+) number (\w+) to ([\w-]+)", question)
    if found is None:
        return None
    source, target = _base(found[1]), _base(found[3])
    if source is None or target is None:
        return None
    try:
        value = int(found[2], source)
    except ValueError:
        return None
    lines = [f"In decimal {found[2]} is {value}."] if source != 10 else []
    digits, rest = "", value
    while rest:
        lines.append(f"{rest} / {target} = {rest // target}, remainder {_DIGITS[rest % target]}.")
        digits, rest = _DIGITS[rest % target] + digits, rest // target
    code = (
        f'number = int("{found[2]}", {source})\n'
        'digits = ""\n'
        "while number > 0:\n"
        f'    digits = "{_DIGITS}"[number % {target}] + digits\n'
        f"    number = number // {target}\n"
        "final_answer(digits)"
    )
    backwards = code.replace(
        f'digits = "{_DIGITS}"[number % {target}] + digits', f'digits += "{_DIGITS}"[number % {target}]'
    )
    palindrome = digits == digits[::-1]
    return Solution(
        goal=f"the number in base {target}",
        how=f"divide by {target} again and again",
        codes=(code,),
        slip=code.replace(f", {source})", f", {source}) + 1") if palindrome else backwards,
        reasoning=(*lines, "Read from the last remainder to the first."),
        answer=digits or "0",
    )


def _base(name: str) -> int | None:
    if name in ("binary", "hexadecimal"):
        return 2 if name == "binary" else 16
    found = re.fullmatch(r"base-(\d+)", name)
    return int(found[1]) if found and 2 <= int(found[1]) <= 36 else None


_PARSERS: tuple[Callable[[str], Solution | None], ...] = (
    _product,
    _chain_sum,
    _lcm,
    _letters,
    _primes,
    _conversion,
    _weekday,
    _equation,
)
