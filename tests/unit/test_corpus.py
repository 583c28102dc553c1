"""From what a user has to passages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentkd.errors import ConfigError, DataError, RetrievalError
from agentkd.retrieval import Passage
from agentkd.retrieval.corpus import MAX_LINE, Source, SourceConfig
from agentkd.retrieval.index import Index
from agentkd.retrieval.source import open_corpus, open_retriever
from agentkd.retrieval.split import sections, split_text


def rows(source: Source) -> list[tuple[str, str, str]]:
    return [(p.id, p.title, p.text) for p in source]


def test_a_folder_of_documents(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("\ufeffOne paragraph.\n\nAnother.", encoding="utf-8")
    (tmp_path / "guide.md").write_text(
        "# The guide\nBegin.\n\n## Install\nRun it.\n```\n# no heading\n```\n### On a GPU\nFast.\n## Empty\n"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.jsonl").write_text('{"id": "a", "title": "T", "text": "x"}\n')
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "secret.txt").write_text("no")
    source = Source(str(tmp_path))
    assert rows(source) == [
        ("guide.md#0", "The guide", "Begin."),
        ("guide.md#1", "The guide: Install", "Run it.\n```\n# no heading\n```"),
        ("guide.md#2", "The guide: Install > On a GPU", "Fast."),
        ("notes.txt#0", "notes", "One paragraph.\n\nAnother."),
        ("a", "T", "x"),
    ]
    assert source.ignored == 1


def test_html(tmp_path: Path) -> None:
    pytest.importorskip("bs4", reason="the documents extra is not installed")
    (tmp_path / "page.html").write_text(
        "<html><head><title>A &amp; B</title><style>p{}</style></head><body><nav>Home</nav>"
        "<p>First <b>bold</b> part.</p><h2>Below</h2><ul><li>one<li>two</ul># not a heading"
        "<!-- no --><script>alert(1)</script></body></html>"
    )
    assert rows(Source(str(tmp_path / "page.html"))) == [
        ("page.html#0", "A & B", "First bold part."),
        ("page.html#1", "A & B: Below", "one\n\ntwo\n\n\\# not a heading"),
    ]


def _pdf(text: str) -> bytes:
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R"
        b"/Resources<</Font<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>>>",
        b"<</Length %d>>stream\n%b\nendstream" % (len(stream), stream),
    ]
    body, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj%b endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    tail = b"xref\n0 5\n0000000000 65535 f \n%btrailer<</Size 5/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n"
    return body + tail % (table, len(body))


def test_pdf_and_documents_that_cannot_be_read(tmp_path: Path) -> None:
    pytest.importorskip("pypdf", reason="the documents extra is not installed")
    (tmp_path / "paper.pdf").write_bytes(_pdf("Copper melts at 1085 degrees."))
    assert rows(Source(str(tmp_path))) == [("paper.pdf#0", "paper", "Copper melts at 1085 degrees.")]
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing more")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(DataError, match=r"broken\.pdf"):
        list(Source(str(tmp_path)))
    source = Source(str(tmp_path), SourceConfig(skip_unreadable=True))
    assert [id for id, _, _ in rows(source)] == ["paper.pdf#0"]
    assert [("broken.pdf" in text, "latin.txt" in text) for text in source.skipped] == [
        (True, False),
        (False, True),
    ]


def test_lines_of_both_shapes(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [
        {"id": 7, "title": "T", "text": "x", "url": "u"},
        {"id": "8", "contents": '"A title"\nAnd text.\nMore.'},
        {"contents": "No title"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    found = rows(Source(str(path)))
    assert found[:2] == [("7", "T", "x"), ("8", "A title", "And text.\nMore.")]
    assert found[2][1:] == ("", "No title")
    assert rows(Source(str(path))) == found  # also the id that was made


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"id": "1", "text": "\xff"}', "not UTF-8"),
        (b"{", "not JSON"),
        (b"[1]", "object"),
        (b'{"id": "1"}', "neither"),
        (b'{"id": "1", "text": 3}', "neither"),
        (b'{"id": [1], "text": "x"}', "id"),
        (b'{"id": "1", "title": 4, "text": "x"}', "title"),
        (b'{"id": "1", "text": "\\ud800"}', "half a character"),
        (b'{"id": "1", "text": ' + b"[" * 100_000, "line 2"),
        (b'{"id": "1", "text": "' + b"x" * 50_000_000 + b'"}', "longer than"),
    ],
)
def test_a_line_that_is_no_passage_is_named(line: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"id": "0", "text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match="line 2") as caught:
        list(Source(str(path)))
    assert said in str(caught.value)
    with pytest.raises(DataError, match="line 2"):
        Index.build(tmp_path / "idx", Source(str(path)))


def test_just_below_the_longest_line(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    head, tail = b'{"id": "1", "text": "', b'"}\n'
    path.write_bytes(head + b"word " * ((MAX_LINE - len(head) - len(tail)) // 5) + tail)
    assert len(list(Source(str(path)))) == 1
    pieces = list(Source(str(path), SourceConfig(split=True, words=1000)))
    assert len(pieces) > 3_000
    assert pieces[0].id == "1#0"


def test_a_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the tasks extra is not installed")
    path = tmp_path / "set"
    path.mkdir()
    data = {"docid": ["a", "b"], "title": ["A", None], "body": ["Text one.", "Long. " * 400], "n": [1, 2]}
    datasets.Dataset.from_dict(data).to_parquet(str(path / "train.parquet"))
    found = rows(Source(f"hf:{path}"))
    assert found[0] == ("a", "A", "Text one.")
    assert [id for id, _, _ in found[1:4]] == ["b#0", "b#1", "b#2"]
    for spec, said in (
        ("?text=nope", "nope"),
        ("?txt=body", "txt"),
        ("::valid", "valid"),
        ("?text=n", "neither"),
    ):
        with pytest.raises((ConfigError, DataError), match=said):
            list(Source(f"hf:{path}{spec}"))


@pytest.mark.parametrize("name", ["nothing", "picture.png"])
def test_what_is_no_source(name: str, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        Source(str(tmp_path / name))
    assert caught.value.hint


def test_passages_keep_their_size() -> None:
    sentences = " ".join(f"Sentence number {n} says a little." for n in range(200))
    text = f"Short one.\n\n{sentences}\n\n{'x' * 5_000}\n\n{'字' * 900}。{'字' * 40}"
    pieces = split_text(text, 50)
    assert all(len(piece.split()) <= 50 and len(piece) <= 50 * 8 + 8 for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert split_text("", 50) == split_text(" \n\n ", 50) == []
    assert split_text(text, 50) == pieces


def test_sections_of_a_document_without_headings() -> None:
    assert list(sections("just text", "name")) == [("name", "just text")]
    assert list(sections("", "name")) == []
    assert list(sections("## A\nx\n# Title\ny\n# Second\nz", "name")) == [
        ("name: A", "x"),
        ("Title", "y"),
        ("Title: Second", "z"),
    ]


def test_what_a_corpus_may_be(tmp_path: Path) -> None:
    one = Passage(id="1", title="Silver Harbor", text="A town.")
    (tmp_path / "one.jsonl").write_text(one.model_dump_json() + "\n")
    Index.build(tmp_path / "idx", [one])
    for source in (str(tmp_path / "one.jsonl"), tmp_path / "idx"):
        assert open_retriever(source).search(["silver"])[0][0].passage == one
    in_memory = open_corpus(None, [one])
    assert in_memory.identity == open_corpus(str(tmp_path / "one.jsonl")).identity
    assert open_corpus(None).retriever is None
    with pytest.raises(RetrievalError, match="Cannot reach"):
        open_corpus("http://127.0.0.1:9")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no passages"):
        open_corpus(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ConfigError, match="no corpus"):
        open_corpus(str(tmp_path / "nothing"))
