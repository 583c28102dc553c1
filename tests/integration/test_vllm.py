"""A vLLM server as the endpoint; run by ``make test-vllm`` with AGENTKD_VLLM_URL and _MODEL set.

AGENTKD_VLLM_TOKENIZER names the folder of the tokenizer where the model's id is not one.
"""

from __future__ import annotations

import os

import openai
import pytest

from agentkd.agent import build_agent
from agentkd.agent_config import AgentConfig
from agentkd.engine.render import render_prompt
from agentkd.first_thought import probe_continuation
from agentkd.model import check_endpoint, openai_model
from agentkd.prompt import chat_messages
from agentkd.rollout import rollout
from agentkd.task import Task
from agentkd.trajectory import FirstThought

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


def test_a_first_thought_is_continued_token_for_token() -> None:
    """The prompt's ids as vLLM reports them are those our renderer gives prompt and prefix."""
    transformers = pytest.importorskip("transformers")
    found = probe_continuation(AgentConfig(model=MODEL, api_base=URL))
    assert found.via == "prefill", found
    tokenizer = transformers.AutoTokenizer.from_pretrained(os.environ.get("AGENTKD_VLLM_TOKENIZER", MODEL))
    model = openai_model(
        MODEL, URL, max_tokens=24, temperature=0.0, extra_body={"return_token_ids": True, "seed": 0}
    )
    prefix = "Thought: I need the product of the two numbers, so I multiply"
    agent = build_agent(model, sandbox="local", prompt="Solve the task in Python.", max_steps=1)
    agent.first_thought = FirstThought(prefix=prefix, via="prefill")
    task = Task(id="1", question="What is 2 times 3?", answer="6", scorer="numeric")
    record = rollout(agent, task)
    agent.cleanup()
    (step,) = record.steps
    messages = chat_messages("Solve the task in Python.", task.question, [(prefix, None)])
    rendered = render_prompt(tokenizer, messages, continue_final_message=True)
    assert list(step.prompt_token_ids or ()) == rendered
    assert tokenizer.decode(step.output_token_ids, skip_special_tokens=True).startswith(step.raw)
    assert step.output.startswith(prefix + step.raw[:10])
    # And the same tokens, sent as tokens, go on in the same way.
    with openai.OpenAI(base_url=URL, api_key="none") as client:
        again = client.completions.create(
            model=MODEL, prompt=rendered, max_tokens=24, temperature=0.0, seed=0, stop=["Observation:"]
        )
    assert again.choices[0].text == step.raw
