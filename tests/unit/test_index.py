"""An index folder: built, opened, added to, deleted from; what it finds."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import ConfigError, DataError, RetrievalError
from agentkd.retrieval import Hit, Passage
from agentkd.retrieval.bm25 import BM25Retriever
from agentkd.retrieval.build import IndexBuilder
from agentkd.retrieval.fusion import RRF_K, fuse
from agentkd.retrieval.index import Index
from agentkd.retrieval.staging import PIECE
from tests.hash_encoder import HashEncoder

KINDS = ["bm25", "dense", "hybrid"]
WORDS = ["harbor", "falcon", "meadow", "lantern", "willow", "copper", "silver", "amber"]


@pytest.fixture(autouse=True)
def faiss() -> Any:
    return pytest.importorskip("faiss", reason="the dense extra is not installed")


def passages(count: int, first: int = 0) -> list[Passage]:
    return [
        Passage(
            id=f"p{n}",
            title=f"{WORDS[n % 8].title()} number {n}",
            text=f"It is place {n}, near {WORDS[(n * 3 + 1) % 8]} and {WORDS[(n // 8) % 8]}.",
        )
        for n in range(first, first + count)
    ]


def encoder_for(kind: str) -> HashEncoder | None:
    return None if kind == "bm25" else HashEncoder()


def found(hits: list[list[Hit]]) -> list[list[tuple[str, float]]]:
    return [[(hit.passage.id, round(hit.score, 5)) for hit in each] for each in hits]


QUERIES = ["silver number 6", "near willow and copper", "place 17", "nothing of this kind"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_finds_the_passage_that_is_asked_for(kind: Any, tmp_path: Path) -> None:
    index = Index.build(tmp_path / "idx", passages(60), kind=kind, encoder=encoder_for(kind))
    again = Index.open(tmp_path / "idx", encoder=encoder_for(kind), verify=True)
    assert len(index) == len(again) == 60
    for query, number in (("Silver number 6", 6), ("Harbor number 40", 40)):
        assert index.search([query], k=3)[0][0].passage == passages(60)[number]
    assert found(index.search(QUERIES, 5)) == found(again.search(QUERIES, 5))
    for hits in index.search(QUERIES, 5):
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_bm25_on_disk_is_bm25_in_memory(tmp_path: Path) -> None:
    index = Index.build(tmp_path / "idx", passages(60))
    assert found(index.search(QUERIES, 7)) == found(BM25Retriever(passages(60)).search(QUERIES, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_odd_queries_and_k(kind: Any, tmp_path: Path) -> None:
    index = Index.build(tmp_path / "idx", passages(20), kind=kind, encoder=encoder_for(kind))
    assert index.search([], 3) == []
    assert index.search(["", "  \n"], 3) == [[], []]
    assert index.search(["silver"], 0) == [[]]
    assert len(index.search(["number"], 1_000)[0]) == 20
    assert len(index.search(["silver number 6 " * 7_000], 3)[0]) == 3
    assert index.search(["\x00\ud800 silver"], 3)[0] or kind == "dense"


@pytest.mark.parametrize("kind", KINDS)
def test_adding_and_deleting_leaves_what_a_fresh_build_makes(kind: Any, tmp_path: Path) -> None:
    encoder = encoder_for(kind)
    index = Index.build(tmp_path / "a", passages(50), kind=kind, encoder=encoder)
    assert index.add(passages(10, first=50)) == 10
    assert index.delete(["p3", "p55"]) == 2
    wanted = [p for p in passages(60) if p.id not in ("p3", "p55")]
    fresh = Index.build(tmp_path / "b", wanted, kind=kind, encoder=encoder)
    assert found(index.search(QUERIES, 58)) == found(fresh.search(QUERIES, 58))
    reopened = Index.open(tmp_path / "a", encoder=encoder, verify=True)
    assert len(reopened) == 58
    assert found(reopened.search(QUERIES, 5)) == found(fresh.search(QUERIES, 5))


def test_only_what_is_new_is_encoded(tmp_path: Path) -> None:
    Index.build(tmp_path / "idx", passages(300), kind="dense", encoder=HashEncoder())
    builder = IndexBuilder(tmp_path / "idx", HashEncoder())
    assert builder.add(passages(7, first=300)).encoded == 7
    assert builder.delete(["p0"]).encoded == 0
    changed = [p.model_copy(update={"text": "Rewritten."}) if p.id == "p9" else p for p in passages(305)]
    built = builder.sync(changed)
    # p0 is back and p9 changed; p305 and p306 are gone, and so is the old p9.
    assert (built.added, built.encoded, built.deleted) == (2, 2, 3)
    assert builder.sync(changed)[1:] == (0, 0, 0)
    index = Index.open(tmp_path / "idx", encoder=HashEncoder())
    assert len(index) == 305
    assert index.search(["Rewritten."], 1)[0][0].passage.id == "p9"


def test_many_deletions_are_compacted(tmp_path: Path) -> None:
    encoder = HashEncoder()
    index = Index.build(tmp_path / "idx", passages(100), kind="hybrid", encoder=encoder)
    index.add(passages(20, first=100))
    index.delete([f"p{n}" for n in range(0, 60)])
    assert index.manifest.deleted == 0
    assert len(index.manifest.segments) == 1
    fresh = Index.build(tmp_path / "fresh", passages(60, first=60), kind="hybrid", encoder=encoder)
    assert found(index.search(QUERIES, 60)) == found(fresh.search(QUERIES, 60))
    names = {path.name for path in (tmp_path / "idx").iterdir()}
    assert names == {".lock", "manifest.json", index.manifest.segments[0].name, "search-000003"}


@pytest.mark.parametrize("ann", ["flat", "hnsw", "ivf", "ivf-sq8"])
def test_every_kind_of_vector_index(ann: str, tmp_path: Path) -> None:
    encoder = HashEncoder()
    index = Index.build(tmp_path / "idx", passages(400), kind="dense", encoder=encoder, ann=ann)
    assert index.manifest.ann == ann
    index.add(passages(50, first=400))
    index.delete(["p6"])
    hits = index.search(["Silver number 14", "Silver number 438", "Silver number 6"], 5)
    assert [each[0].passage.id for each in hits[:2]] == ["p14", "p438"]
    assert "p6" not in [hit.passage.id for hit in hits[2]]


def test_a_hybrid_index_can_be_searched_by_words_without_its_encoder(tmp_path: Path) -> None:
    Index.build(tmp_path / "idx", passages(30), kind="hybrid", encoder=HashEncoder(name="gone"))
    index = Index.open(tmp_path / "idx", kind="bm25")
    assert index.search(["silver number 6"], 1)[0][0].passage.id == "p6"


def test_threads_may_search_one_index(tmp_path: Path) -> None:
    index = Index.build(tmp_path / "idx", passages(200), kind="hybrid", encoder=HashEncoder())
    wanted, wrong = found(index.search(QUERIES, 5)), []

    def work() -> None:
        for _ in range(10):
            if found(index.search(QUERIES, 5)) != wanted:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_open_index_outlives_a_change_of_its_folder(tmp_path: Path) -> None:
    index = Index.build(tmp_path / "idx", passages(40))
    before = found(index.search(QUERIES, 5))
    Index.build(tmp_path / "idx", passages(5, first=100), replace=True)
    assert found(index.search(QUERIES, 5)) == before
    assert len(Index.open(tmp_path / "idx")) == 5


def test_the_identity_tells_indexes_apart(tmp_path: Path) -> None:
    index = Index.build(tmp_path / "idx", passages(40))
    same = Index.build(tmp_path / "same", passages(40))
    assert index.manifest.identity == same.manifest.identity
    before = index.manifest.identity
    index.delete(["p1"])
    assert index.manifest.identity != before


# Builds that stop


class Dying(HashEncoder):
    """Fails after so many texts, as if the machine had gone away."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def encode(self, texts: Any, role: str) -> Any:
        if self.texts + len(texts) > self.after:
            raise KeyboardInterrupt
        return super().encode(texts, role)


def test_a_stopped_build_goes_on_with_the_vectors_it_has(tmp_path: Path) -> None:
    many = passages(3 * PIECE + 10)
    with pytest.raises(KeyboardInterrupt):
        Index.build(tmp_path / "idx", many, kind="dense", encoder=Dying(after=2 * PIECE))
    with pytest.raises(RetrievalError, match="not finished"):
        Index.open(tmp_path / "idx")
    vectors = tmp_path / "idx" / "unfinished" / "vectors.f32"
    with vectors.open("ab") as file:
        file.write(b"torn")
    encoder = HashEncoder()
    index = Index.build(tmp_path / "idx", many, kind="dense", encoder=encoder)
    probes = 6  # made for the manifest, checked when opened
    assert encoder.texts <= PIECE + 10 + probes
    fresh = Index.build(tmp_path / "fresh", many, kind="dense", encoder=HashEncoder())
    assert found(index.search(QUERIES, 9)) == found(fresh.search(QUERIES, 9))


@pytest.mark.parametrize("change", ["passages", "encoder"])
def test_vectors_of_another_build_are_not_taken(change: str, tmp_path: Path) -> None:
    many = passages(2 * PIECE)
    with pytest.raises(KeyboardInterrupt):
        Index.build(tmp_path / "idx", many, kind="dense", encoder=Dying(after=PIECE))
    name = "other" if change == "encoder" else "hash"
    many = many[1:] if change == "passages" else many
    built = IndexBuilder(tmp_path / "idx", HashEncoder(name=name)).build(
        many, Index.build(tmp_path / "c", many[:2], kind="dense", encoder=HashEncoder()).manifest.config
    )
    assert built.encoded == len(many)


def test_a_failed_addition_leaves_the_index_as_it_was(tmp_path: Path) -> None:
    index = Index.build(tmp_path / "idx", passages(40), kind="dense", encoder=HashEncoder())
    before = found(index.search(QUERIES, 5))
    for wrong in ([*passages(3, first=40), passages(1)[0]], [passages(1, 50)[0]] * 2, []):
        with pytest.raises(DataError):
            index.add(wrong)
    with pytest.raises(DataError, match="nope"):
        index.delete(["p1", "nope"])
    with pytest.raises(DataError, match="would be left"):
        index.delete([f"p{n}" for n in range(40)])
    again = Index.open(tmp_path / "idx", encoder=HashEncoder(), verify=True)
    assert found(again.search(QUERIES, 5)) == found(index.search(QUERIES, 5)) == before


def _build_slowly(folder: str, ready: Any) -> None:
    def slow() -> Iterator[Passage]:
        yield passages(1)[0]
        ready.set()
        threading.Event().wait(60)

    Index.build(folder, slow())


def test_a_second_builder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_build_slowly, args=(str(tmp_path / "idx"), ready))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ConfigError, match="Another process"):
            Index.build(tmp_path / "idx", passages(3))
    finally:
        process.kill()
        process.join()
    assert len(Index.build(tmp_path / "idx", passages(3))) == 3


# What is not an index, or not this one


def test_an_index_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    Index.build(tmp_path / "idx", passages(4))
    with pytest.raises(ConfigError, match="holds an index"):
        Index.build(tmp_path / "idx", passages(5))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for replace in (False, True):
        with pytest.raises(ConfigError, match="not empty"):
            Index.build(tmp_path / "mine", passages(5), replace=replace)
    with pytest.raises(RetrievalError, match="no index"):
        Index.open(tmp_path / "nothing")


def test_an_empty_corpus_and_the_same_id_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no passages"):
        Index.build(tmp_path / "idx", [])
    with pytest.raises(DataError, match=r"p0.*twice"):
        Index.build(tmp_path / "idx", [*passages(3), passages(1)[0]])
    assert len(Index.build(tmp_path / "idx", passages(3))) == 3


def test_passages_without_a_word_find_nothing(tmp_path: Path) -> None:
    index = Index.build(tmp_path / "idx", [Passage(id="1", text="..."), Passage(id="2", text="")])
    assert index.search(["anything", "..."], 3) == [[], []]


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["passages.jsonl", "vectors.f32", "dense.faiss", "bm25/data.csc.index.npy"])
@pytest.mark.parametrize(
    ("harm", "verify", "said"),
    [(_cut, False, "instead of"), (_flip, True, "checksum"), (Path.unlink, False, "missing")],
    ids=["cut", "changed", "missing"],
)
def test_damage_is_noticed(
    name: str, harm: Callable[[Path], None], verify: bool, said: str, tmp_path: Path
) -> None:
    index = Index.build(tmp_path / "idx", passages(30), kind="hybrid", encoder=HashEncoder())
    (path,) = (tmp_path / "idx" / file for file in index.manifest.files if file.endswith(name))
    harm(path)
    with pytest.raises(RetrievalError, match=said) as caught:
        Index.open(tmp_path / "idx", verify=verify)
    assert path.name in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"version": 1', '"version": 2', "Upgrade"),
        ('"format": "agentkd-index"', '"format": "other"', "format"),
        ('"generation": 1', '"generation": 1, "colour": "red"', "colour"),
        ("{", "", "manifest.json"),
        ('"segment-000001/passages.jsonl"', '"../passages.jsonl"', "outside"),
    ],
)
def test_a_manifest_that_cannot_be_read(old: str, new: str, said: str, tmp_path: Path) -> None:
    Index.build(tmp_path / "idx", passages(3))
    path = tmp_path / "idx" / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(RetrievalError, match=said):
        Index.open(tmp_path / "idx")


# Encoders


@pytest.mark.parametrize(
    ("other", "said"),
    [(HashEncoder(seed=1), "different vectors"), (HashEncoder(dimension=32), "32")],
    ids=["weights", "dimension"],
)
def test_another_encoder_is_refused(other: HashEncoder, said: str, tmp_path: Path) -> None:
    Index.build(tmp_path / "idx", passages(30), kind="dense", encoder=HashEncoder())
    with pytest.raises(ConfigError, match=said):
        Index.open(tmp_path / "idx", encoder=other)
    with pytest.raises(ConfigError, match=said):
        IndexBuilder(tmp_path / "idx", other).add(passages(1, first=30))
    assert len(Index.open(tmp_path / "idx")) == 30


def test_an_index_without_vectors_refuses_an_encoder(tmp_path: Path) -> None:
    Index.build(tmp_path / "idx", passages(3))
    with pytest.raises(ConfigError, match="no vectors"):
        Index.open(tmp_path / "idx", kind="hybrid")
    with pytest.raises(ConfigError, match="no vectors"):
        Index.open(tmp_path / "idx", encoder=HashEncoder())


class Broken(HashEncoder):
    """Returns what ``spoil`` makes of the vectors of passages or queries."""

    def __init__(self, spoil: Callable[[Any], Any], role: str) -> None:
        super().__init__()
        self.spoil, self.role = spoil, role

    def encode(self, texts: Any, role: str) -> Any:
        vectors = super().encode(texts, role)
        return self.spoil(vectors) if role == self.role and "place" in texts[0] else vectors


def _nan(vectors: Any) -> Any:
    vectors[-1, 0] = float("nan")
    return vectors


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(_nan, "NaN"), (lambda v: v[:, :5], "shape"), (lambda v: v[1:], "shape")],
    ids=["nan", "dimension", "count"],
)
def test_vectors_that_cannot_be_searched_are_refused(spoil: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match=said):
        Index.build(
            tmp_path / "a",
            [Passage(id="1", text="place")],
            kind="dense",
            encoder=Broken(spoil, "passage"),
        )
    index = Index.build(tmp_path / "b", passages(3), kind="dense", encoder=Broken(spoil, "query"))
    with pytest.raises(RetrievalError, match=said):
        index.search(["place 1"], 1)


def test_fusion_adds_reciprocal_ranks() -> None:
    fused = fuse([[1, 2, 3], [3, 4]], 3)
    assert [row for row, _ in fused] == [3, 1, 2]
    assert fused[0][1] == pytest.approx(1 / (RRF_K + 3) + 1 / (RRF_K + 1))
    assert fuse([[], []], 3) == []
