"""Search-R1's retrieval contract: its requests against our server, our client against a stub of its server.

The stub and the client's side are written from what Search-R1 documents: ``POST /retrieve`` with
``queries``, ``topk`` and ``return_scores``; ``{"result": [[...]]}`` back; a document's ``contents`` has the
title, in quotes, as its first line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from agentkd.retrieval import Passage
from agentkd.retrieval.bm25 import BM25Retriever
from agentkd.retrieval.client import HTTPRetriever

fastapi = pytest.importorskip("fastapi", reason="the serve extra is not installed")
from agentkd.retrieval.server import retriever_app  # noqa: E402
from agentkd.serve import Server  # noqa: E402

PASSAGES = [
    Passage(id="0", title="Silver Harbor", text="Silver Harbor is a town.\nIt was founded in 1802."),
    Passage(id="1", title="Amber Falcon", text="Amber Falcon is a painter born in Silver Harbor."),
    Passage(id="2", title="Two\nlines", text="A title with a line end about copper."),
]


@pytest.fixture(scope="module")
def ours() -> Iterator[str]:
    with Server(retriever_app(BM25Retriever(PASSAGES), topk=2)) as running:
        yield f"{running.address}/retrieve"


def as_search_r1_shows(results: list[dict[str, Any]]) -> str:
    """How its rollout turns results into text: first line the title, the rest the text."""
    shown = ""
    for place, item in enumerate(results):
        title, *text = item["document"]["contents"].split("\n")
        shown += f"Doc {place + 1}(Title: {title}) " + "\n".join(text) + "\n"
    return shown


def test_a_rollout_request_with_scores(ours: str) -> None:
    request = {"queries": ["Who is Amber Falcon?", "Silver Harbor founded"], "topk": 3, "return_scores": True}
    answer = httpx.post(ours, json=request)
    assert answer.status_code == 200
    result = answer.json()["result"]
    assert [len(each) for each in result] == [2, 2]
    for item in (item for each in result for item in each):
        assert set(item) == {"document", "score"}
        assert isinstance(item["score"], float)
        assert isinstance(item["document"]["id"], str)
    assert as_search_r1_shows(result[0]).startswith(
        'Doc 1(Title: "Amber Falcon") Amber Falcon is a painter born in Silver Harbor.\n'
        'Doc 2(Title: "Silver Harbor") Silver Harbor is a town.\nIt was founded in 1802.\n'
    )


def test_without_scores_the_documents_stand_alone(ours: str) -> None:
    answer = httpx.post(ours, json={"queries": ["painter"], "topk": 1, "return_scores": False})
    (document,) = answer.json()["result"][0]
    assert document["contents"] == '"Amber Falcon"\nAmber Falcon is a painter born in Silver Harbor.'


@pytest.mark.parametrize("topk", [{}, {"topk": None}, {"topk": 0}])
def test_a_missing_topk_is_the_servers(topk: dict[str, Any], ours: str) -> None:
    answer = httpx.post(ours, json={"queries": ["silver harbor painter town copper"], **topk})
    assert len(answer.json()["result"][0]) == 2


def test_a_query_that_finds_nothing_has_an_empty_list(ours: str) -> None:
    request = {"queries": ["zzz", "", "painter"], "topk": 3, "return_scores": True}
    assert [len(each) for each in httpx.post(ours, json=request).json()["result"]] == [0, 0, 1]


def test_a_line_end_in_a_title_moves_no_text(ours: str) -> None:
    answer = httpx.post(ours, json={"queries": ["copper"], "topk": 1, "return_scores": True})
    title, text = answer.json()["result"][0][0]["document"]["contents"].split("\n")
    assert (title, text) == ('"Two\\nlines"', "A title with a line end about copper.")


def stub_of_search_r1(requests: list[dict[str, Any]]) -> Any:
    """Its server's behaviour, with documents as in its wiki-18 corpus: nothing but id and contents."""
    app = fastapi.FastAPI()

    @app.post("/retrieve")
    async def retrieve(body: dict[str, Any]) -> dict[str, Any]:
        requests.append(body)
        documents = [{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in PASSAGES[:2]]
        documents = documents[: body.get("topk") or 3]
        if body.get("return_scores"):
            scored = [{"document": d, "score": 0.9 - i / 10} for i, d in enumerate(documents)]
            return {"result": [scored for _ in body["queries"]]}
        return {"result": [documents for _ in body["queries"]]}

    return app


def test_our_client_at_their_server() -> None:
    requests: list[dict[str, Any]] = []
    with Server(stub_of_search_r1(requests)) as running:
        client = HTTPRetriever(f"{running.address}/retrieve")
        found = client.search(["one", "two"], k=2)
        client.close()
    assert requests == [{"queries": ["one", "two"], "topk": 2, "return_scores": True}]
    assert [[hit.passage for hit in hits] for hits in found] == [PASSAGES[:2]] * 2
    assert [hit.score for hit in found[0]] == pytest.approx([0.9, 0.8])
