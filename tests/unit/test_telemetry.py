"""Spans where they are asked for, nothing otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

SILENT = """
import sys
from agentkd.telemetry import model_span, start_telemetry
from agentkd.trajectory import Usage
assert start_telemetry() is False
with model_span("m", []) as answered:
    answered("text", Usage())
print([name for name in sys.modules if name.startswith(("opentelemetry", "openinference"))])
"""

TRACED = """
import json

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

from agentkd import Task, build_agent
from agentkd.router import RouterConfig, make_router
from agentkd.sampler import SamplerConfig, SelfConsistentSampler
from agentkd.recorder import Recorder
from agentkd.rollout import rollout
from agentkd.telemetry import start_telemetry
from agentkd.testing import ScriptedModel

assert start_telemetry() and start_telemetry()
code = "Thought: done.\\n```python\\nfinal_answer(1)\\n```"
sampler = SelfConsistentSampler(SamplerConfig(n=2))
router = make_router(RouterConfig(kind="forced"))
agent = build_agent(ScriptedModel([code, code]), sandbox="local", sampler=sampler, router=router)
recorder = Recorder("1#0", lambda call, wait: None)
record = rollout(agent, Task(id="1", question="q", answer="1"), recorder=recorder)
agent.cleanup()
assert record.correct
spans = exporter.get_finished_spans()
kinds = [span.attributes.get("openinference.span.kind") for span in spans]
assert "AGENT" in kinds, kinds
call, other = [span for span in spans if span.name == "model call"]
(choice,) = [span for span in spans if span.name == "action sampling"]
assert call.parent.span_id == other.parent.span_id == choice.context.span_id
votes = json.loads(choice.attributes["output.value"])["candidates"]
assert [vote["votes"] for vote in votes] == [2, 2], votes
(choice,) = [span for span in spans if span.name == "routing"]
assert json.loads(choice.attributes["output.value"])["mode"] == "required"
assert call.attributes["llm.token_count.prompt"] == 10
assert call.parent is not None and call.context.trace_id == spans[-1].context.trace_id
print("traced")
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_an_exporter_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert run(SILENT) == "[]"


def test_runs_and_model_calls_are_traced() -> None:
    pytest.importorskip("openinference.instrumentation.smolagents", reason="needs the extra `telemetry`")
    assert run(TRACED) == "traced"
