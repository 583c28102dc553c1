"""A vLLM server as the endpoint; run by ``make test-vllm`` with AGENTKD_VLLM_URL and _MODEL set."""

from __future__ import annotations

import os

import pytest

from agentkd.agent import build_agent
from agentkd.model import check_endpoint, openai_model
from agentkd.rollout import rollout
from agentkd.task import Task

URL = os.environ.get("AGENTKD_VLLM_URL", "")
MODEL = os.environ.get("AGENTKD_VLLM_MODEL", "")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not (URL and MODEL), reason="set AGENTKD_VLLM_URL (.../v1) and AGENTKD_VLLM_MODEL"),
]


def test_an_agent_runs_against_vllm_and_gets_token_ids() -> None:
    check_endpoint(URL, MODEL)
    model = openai_model(MODEL, URL, max_tokens=64, extra_body={"return_token_ids": True})
    agent = build_agent(model, max_steps=1)
    record = rollout(agent, Task(id="1", question="What is 2 times 3?", answer="6", scorer="numeric"))
    agent.cleanup()
    assert not record.stop_reason.is_error, record.failure
    assert record.steps[0].output_token_ids
    assert record.steps[0].prompt_token_ids
