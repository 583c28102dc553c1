"""Cutting documents into passages: at headings, then paragraphs, then sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

__all__ = ["sections", "split_text"]

_BLANK = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"\s*(```|~~~)")
_CHARS_PER_WORD = 8
"""A word counts at least this many characters, so that text without spaces has a size, too."""


def sections(markdown: str, title: str) -> Iterator[tuple[str, str]]:
    """The parts of a Markdown text between its headings, as (title, text).

    Args:
        markdown: the text; ``#`` lines inside code fences are no headings.
        title: of the document; its first heading of level 1 is taken instead, if it has one.

    Yields:
        "Document" or "Document: Heading > Subheading", and the text below; empty parts are left out.
    """
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    fenced, named = False, False

    def part() -> Iterator[tuple[str, str]]:
        if text := "\n".join(lines).strip():
            below = " > ".join(heading for _, heading in path)
            yield (f"{title}: {below}" if below else title), text

    for line in markdown.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        heading = None if fenced else _HEADING.fullmatch(line)
        if heading is None:
            lines.append(line)
            continue
        yield from part()
        lines.clear()
        level, name = len(heading[1]), heading[2].strip()
        if level == 1 and not named:
            title, named, path = name or title, True, []
            continue
        path = [(above, text) for above, text in path if above < level]
        if name:
            path.append((level, name))
    yield from part()


def split_text(text: str, words: int) -> list[str]:
    """Pieces of at most about ``words`` words, each as long as whole paragraphs or sentences allow."""
    pieces: list[str] = []
    for paragraph in _BLANK.split(text):
        if _size(paragraph := paragraph.strip()) <= words:
            pieces.append(paragraph)
            continue
        sentences = [part for sentence in _SENTENCE.split(paragraph) for part in _cut(sentence, words)]
        pieces += _pack(sentences, words, " ")
    return _pack(pieces, words, "\n\n")


def _cut(sentence: str, words: int) -> list[str]:
    """A sentence, in pieces where it alone is too long."""
    if _size(sentence) <= words:
        return [sentence]
    wide = words * _CHARS_PER_WORD
    parts = [
        part[start : start + wide] for part in sentence.split() for start in range(0, max(1, len(part)), wide)
    ]
    return _pack(parts, words, " ")


def _pack(pieces: Iterable[str], words: int, joint: str) -> list[str]:
    """Join neighbours as long as they stay within the size; empty ones go."""
    packed: list[list[str]] = []
    room = 0
    for piece in pieces:
        size = _size(piece)
        if not piece:
            continue
        if packed and size <= room:
            packed[-1].append(piece)
            room -= size
        else:
            packed.append([piece])
            room = words - size
    return [joint.join(group) for group in packed]


def _size(text: str) -> int:
    return max(len(text.split()), len(text) // _CHARS_PER_WORD)
