"""The table of attacks in docs/security.md is the suite's. Written anew by ``python -m tests.attack.test_table``."""

from __future__ import annotations

import re
from pathlib import Path

from .test_attacks import GROUPS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"
BLOCK = re.compile(r"(?<=<!-- attacks -->\n).*(?=<!-- end of attacks -->)", re.DOTALL)


def table() -> str:
    """The attacks as Markdown."""
    lines = []
    for group, attacks in GROUPS.items():
        lines += [f"\n### {group}\n", "| attack | without a boundary it |", "|---|---|"]
        lines += [f"| {attack.name} | {attack.harm.replace('|', chr(92) + '|')} |" for attack in attacks]
    return "\n".join([*lines, "\n"])


def test_the_page_lists_every_attack() -> None:
    found = BLOCK.search(PAGE.read_text())
    assert found is not None
    assert found.group() == table(), "stale: run `python -m tests.attack.test_table`"


def test_names_are_unique_and_many() -> None:
    names = [attack.name for attacks in GROUPS.values() for attack in attacks]
    assert len(names) == len(set(names)) >= 45


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda _: table(), PAGE.read_text()))
