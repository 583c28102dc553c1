"""A vLLM server as the endpoint, by its own chat API (``make test-vllm``).

It is started here, with a small model, by the interpreter that AGENTKD_VLLM_PYTHON names; or it is the one
at AGENTKD_VLLM_URL (.../v1), which serves AGENTKD_VLLM_MODEL. AGENTKD_VLLM_TOKENIZER names the folder of
the tokenizer where the model's id is not one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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

PYTHON = os.environ.get("AGENTKD_VLLM_PYTHON", "")
URL, MODEL = os.environ.get("AGENTKD_VLLM_URL", ""), os.environ.get("AGENTKD_VLLM_MODEL", "")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not (PYTHON or (URL and MODEL)), reason="set AGENTKD_VLLM_PYTHON"),
]


class Endpoint(NamedTuple):
    url: str
    model: str
    tokenizer: str


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    if URL:
        yield Endpoint(URL, MODEL, os.environ.get("AGENTKD_VLLM_TOKENIZER", MODEL))
        return
    pytest.importorskip("torch")
    from agentkd.engine.weights import resolve_model
    from agentkd.serve.child import Child

    path = resolve_model("smollm2-135m")

    def command(port: int) -> list[str]:
        line = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
        line += ["--served-model-name", "small", "--host", "127.0.0.1", "--port", str(port)]
        return [*line, "--enforce-eager", "--max-model-len", "4096"]

    log = Path(tmp_path_factory.mktemp("vllm") / "log")
    child = Child(command, log, environment={"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}, name="vLLM")
    child.start()
    try:
        yield Endpoint(f"{child.url}/v1", "small", str(path))
    finally:
        child.stop()


def test_an_agent_runs_against_vllm_and_gets_token_ids(vllm: Endpoint) -> None:
    check_endpoint(vllm.url, vllm.model)
    model = openai_model(vllm.model, vllm.url, max_tokens=64, extra_body={"return_token_ids": True})
    agent = build_agent(model, max_steps=1)
    record = rollout(agent, Task(id="1", question="What is 2 times 3?", answer="6", scorer="numeric"))
    agent.cleanup()
    assert not record.stop_reason.is_error, record.failure
    assert record.steps[0].output_token_ids
    assert record.steps[0].prompt_token_ids


def test_a_first_thought_is_continued_token_for_token(vllm: Endpoint) -> None:
    """The prompt's ids as vLLM reports them are those our renderer gives prompt and prefix."""
    transformers = pytest.importorskip("transformers")
    found = probe_continuation(AgentConfig(model=vllm.model, api_base=vllm.url))
    assert found.via == "prefill", found
    tokenizer = transformers.AutoTokenizer.from_pretrained(vllm.tokenizer)
    model = openai_model(
        vllm.model, vllm.url, max_tokens=24, temperature=0.0, extra_body={"return_token_ids": True, "seed": 0}
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
    with openai.OpenAI(base_url=vllm.url, api_key="none") as client:
        again = client.completions.create(
            model=vllm.model, prompt=rendered, max_tokens=24, temperature=0.0, seed=0, stop=["Observation:"]
        )
    assert again.choices[0].text == step.raw
