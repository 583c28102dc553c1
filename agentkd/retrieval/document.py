"""Reading the documents of a folder: plain text, Markdown, HTML and PDF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentkd.errors import ConfigError, DataError, boundary
from agentkd.retrieval.split import sections

__all__ = ["SUFFIXES", "read_document"]

_INSTALL = "Install what reads it by: pip install 'agentkd[documents]'."
_NOISE = ("script", "style", "template", "noscript", "nav", "svg")
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_BLOCKS = (*_HEADINGS, "p", "li", "pre", "td", "th", "dt", "dd", "blockquote", "figcaption", "div", "section")


def read_document(path: Path) -> list[tuple[str, str]]:
    """The titled parts of a document, as (title, text); none for an empty one.

    Raises:
        DataError: not UTF-8, or a damaged or encrypted PDF; names the file.
        ConfigError: the library that reads such a file is not installed.
    """
    with boundary(DataError, f"reading {path}", "Mend it, or leave it out by --skip-unreadable."):
        return list(SUFFIXES[path.suffix.lower()](path))


def _text(path: Path) -> Iterator[tuple[str, str]]:
    if text := _decoded(path).strip():
        yield path.stem, text


def _markdown(path: Path) -> Iterator[tuple[str, str]]:
    yield from sections(_decoded(path), path.stem)


def _html(path: Path) -> Iterator[tuple[str, str]]:
    try:
        from bs4 import BeautifulSoup
    except ImportError as exc:
        raise ConfigError(f"beautifulsoup4, which reads {path}, is not installed.", _INSTALL) from exc
    page = BeautifulSoup(path.read_bytes(), "html.parser")  # finds the encoding that the page declares
    if page.original_encoding is None and path.stat().st_size:
        raise DataError(f"The encoding of {path} cannot be told.", "Save it as UTF-8.")
    for noise in page.find_all(_NOISE):
        noise.decompose()
    title = page.title.get_text(" ", strip=True) if page.title else ""
    yield from sections("\n\n".join(_blocks(page.body or page)), title or path.stem)


def _blocks(node: Any) -> Iterator[str]:
    """Blocks of text in their order; headings as in Markdown."""
    from bs4.element import NavigableString

    inline: list[str] = []
    for child in node.children:
        if isinstance(child, NavigableString):
            if type(child) is NavigableString:  # not a comment
                inline.append(str(child))
        elif child.name in _BLOCKS or child.find(_BLOCKS):
            yield from _joined(inline)
            if child.name in _HEADINGS:
                if heading := " ".join(child.get_text(" ").split()):
                    yield f"{'#' * int(child.name[1])} {heading}"
            else:
                yield from _blocks(child)
        else:
            inline.append(child.get_text(" "))
    yield from _joined(inline)


def _joined(inline: list[str]) -> Iterator[str]:
    text = " ".join("".join(inline).split())
    inline.clear()
    if text:
        # What merely looks like a heading is text here.
        yield f"\\{text}" if text.startswith("#") else text


def _pdf(path: Path) -> Iterator[tuple[str, str]]:
    try:
        from pypdf import PdfReader
    except ImportError as exc:
        raise ConfigError(f"pypdf, which reads {path}, is not installed.", _INSTALL) from exc
    reader = PdfReader(path)
    title = (reader.metadata.title if reader.metadata else None) or path.stem
    text = "\n\n".join(page.extract_text() for page in reader.pages).strip()
    if text:
        yield " ".join(title.split()) or path.stem, text.encode("utf-8", "replace").decode("utf-8")


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DataError(
            f"{path} is not UTF-8 ({exc.reason} at byte {exc.start:,}).",
            "Save it as UTF-8, or leave it out by --skip-unreadable.",
        ) from exc


SUFFIXES: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    ".txt": _text,
    ".text": _text,
    ".rst": _text,
    ".md": _markdown,
    ".markdown": _markdown,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
}
"""What reads a file, by the end of its name."""
