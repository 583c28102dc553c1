"""The server's own OpenAPI schema, and requests made up from it: no answer is a 5xx."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("torch")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (group dev)")
hypothesis = pytest.importorskip("hypothesis")

from agentkd.serve import Server, create_app  # noqa: E402
from tests.conftest import action  # noqa: E402
from tests.integration.test_serve import tiny_model, tiny_tokenizer  # noqa: E402
from tests.serving import Talker, scripted_agent  # noqa: E402

EXAMPLES = 40
"""Requests made up for each operation."""


MODELS = ("talker", "tiny", "script-agent")
"""What repeats its words, a real student, and an agent with its sandbox."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    from agentkd.engine.torch_engine import TorchEngine
    from agentkd.serve import StudentBackend

    words = tiny_tokenizer()
    engine = TorchEngine(tiny_model(len(words)), words, threads=1)
    script = [[action("I print", "print(1)")], [action("I answer", "final_answer('done')")]]
    agent = scripted_agent(script, words, sandbox="local")
    backends: list[Any] = [Talker(), StudentBackend(engine, words, "tiny"), agent]
    with Server(create_app(backends)) as server:
        yield server
    agent.close()
    engine.close()


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.address}/openapi.json")


def test_the_schema_says_what_a_request_is(server: Server) -> None:
    described = httpx.get(f"{server.address}/openapi.json").json()
    chat = described["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/ChatRequest"
    }
    request = described["components"]["schemas"]["ChatRequest"]
    assert {"model", "messages", "n", "stop", "seed", "stream", "agentkd"} <= set(request["properties"])
    assert {"400", "401", "413", "429", "503"} <= set(chat["responses"])
    assert set(described["paths"]) == {
        "/health",
        "/ready",
        "/metrics",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/chat/completions",
    }


OPERATIONS = [
    ("GET", "/health", "positive"),
    ("GET", "/ready", "positive"),
    ("GET", "/metrics", "positive"),
    ("GET", "/v1/models", "positive"),
    ("GET", "/v1/models/{model_id}", "positive"),
    ("POST", "/v1/chat/completions", "positive"),
    ("POST", "/v1/chat/completions", "negative"),
]
"""What is asked, and whether requests follow the schema or break it."""


@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS)
def test_no_made_up_request_is_answered_by_a_five_hundred(
    schema: Any, method: str, path: str, mode: str
) -> None:
    operation = schema[path][method]
    statuses: list[int] = []
    answered: set[str] = set()

    def call(case: Any) -> None:
        if isinstance(case.body, dict) and (turn := len(statuses) % 4):
            case.body["model"] = MODELS[turn - 1]  # a name that is made up is never that of a model
            case.body["max_tokens"] = 8
            if turn == 3 and len(statuses) % 8 == 3 and mode == "positive":  # what an agent always takes
                for name in ("n", "logprobs", "return_token_ids", "continue_final_message", "agentkd"):
                    case.body.pop(name, None)
                case.body["messages"] = [{"role": "user", "content": "go"}]
        response = case.call()
        statuses.append(response.status_code)
        if response.status_code == 200 and isinstance(case.body, dict):
            answered.add(case.body["model"])
        case.validate_response(response, checks=[schemathesis.checks.not_a_server_error, *_conformance()])

    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings(hypothesis.given(strategy)(call))()
    assert statuses
    if method == "POST":
        assert set(statuses) & {400, 404}
        assert answered == set(MODELS) or mode == "negative"


def _conformance() -> list[Any]:
    from schemathesis.specs.openapi import checks

    return [
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
