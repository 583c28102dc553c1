"""Telemetry: OpenTelemetry spans by the OpenInference conventions, where an exporter is configured.

Nothing is imported and nothing is sent unless ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or the one for traces)
is set or the program has set a tracer provider of its own, and the extra ``telemetry`` is installed.
Runs and tool calls are traced by the official instrumentor of smolagents. It does not see model
classes of others, and knows no choice among actions, so the spans of these two are ours.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from agentkd.trajectory import Usage

__all__ = ["choice_span", "model_span", "start_telemetry"]

_SDK = "opentelemetry.sdk.trace"


def start_telemetry() -> bool:
    """Trace this process, if it is to be traced; says whether it is. May be called again."""
    named = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    configured = any(os.environ.get(name) for name in named)
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not (configured or _SDK in sys.modules):
        return False
    try:
        from openinference.instrumentation.smolagents import SmolagentsInstrumentor
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
    except ImportError:
        return False
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        if not configured:
            return False
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)
    instrumentor = SmolagentsInstrumentor()
    if not instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.instrument()
    return True


@contextmanager
def model_span(model: str, messages: list[Any]) -> Iterator[Callable[[str, Usage], None]]:
    """The span of one model call; yields a function that notes the answer and what it used.

    Args:
        model: its id.
        messages: ``[role, content]`` of the conversation.
    """
    if _SDK not in sys.modules:
        yield lambda text, usage: None
        return
    from opentelemetry import trace

    with trace.get_tracer("agentkd").start_as_current_span("model call") as span:
        span.set_attributes(
            {
                "openinference.span.kind": "LLM",
                "llm.model_name": model,
                "input.value": json.dumps(messages, ensure_ascii=False, default=str),
                "input.mime_type": "application/json",
            }
        )

        def answered(text: str, usage: Usage) -> None:
            span.set_attributes(
                {
                    "output.value": text,
                    "llm.token_count.prompt": usage.input_tokens,
                    "llm.token_count.completion": usage.output_tokens,
                    "llm.token_count.prompt_details.cache_read": usage.cached_tokens,
                }
            )

        yield answered


@contextmanager
def choice_span(name: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """The span of a choice that takes several model calls; yields a function that notes what was chosen.

    Args:
        name: of the span: "action sampling" or "routing".
    """
    if _SDK not in sys.modules:
        yield lambda facts: None
        return
    from opentelemetry import trace

    with trace.get_tracer("agentkd").start_as_current_span(name) as span:
        span.set_attribute("openinference.span.kind", "CHAIN")

        def chosen(facts: dict[str, Any]) -> None:
            span.set_attributes(
                {
                    "output.value": json.dumps(facts, ensure_ascii=False, default=str),
                    "output.mime_type": "application/json",
                }
            )

        yield chosen
