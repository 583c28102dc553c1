"""Prometheus metrics of one server, by the official client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from agentkd.serve.access import AccessLog
    from agentkd.serve.backend import ChatBackend
    from agentkd.serve.limits import Line
    from agentkd.serve.runs import RunLog
    from agentkd.serve.served import Served

__all__ = ["METRICS_TYPE", "NO_MODEL", "Metrics"]

METRICS_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
NO_MODEL = "none"
"""The model of requests that did not get as far as one: a client must not be able to make up labels."""


class Metrics:
    """Counts and times, each with as few labels as it can have.

    Args:
        backends: whose engines may know of a prefix cache.
        line: shown as gauges.
        log: whose lost lines are counted, or None.
    """

    def __init__(self, backends: Sequence[ChatBackend], line: Line, log: AccessLog | None = None) -> None:
        own = self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=own)
        own.register(_State(backends, line, log))
        self._tools = {tool.name for it in backends for tool in getattr(it, "tools", ())} | {"final_answer"}

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"agentkd_{name}", words, labels, registry=own)

        def seconds(name: str, words: str, *labels: str) -> Histogram:
            return Histogram(f"agentkd_{name}_seconds", words, labels, registry=own, buckets=_SECONDS)

        self.requests = counter("requests", "Chat requests that have ended.", "model", "status")
        self.refused = counter("refused", "Requests that no model saw, by the reason.", "reason")
        self.broken = counter("broken_answers", "Answers that ended before they were whole.", "model", "why")
        self.seconds = seconds("request", "From the first byte to the last, the queue included.", "model")
        self.first = seconds("first_piece", "From the turn to the first piece of the answer.", "model")
        self.queue = seconds("queue", "Spent in the queue.")
        self.prompt = counter("prompt_tokens", "Tokens of prompts.", "model")
        self.completion = counter("completion_tokens", "Tokens sampled.", "model")
        self.steps = counter("agent_steps", "Steps of agents.", "model")
        self.step_failures = counter("agent_step_failures", "Steps that failed, by kind.", "model", "kind")
        self.rollouts = counter("agent_rollouts", "Rollouts by what ended them.", "model", "stop_reason")
        self.tools = counter("tool_calls", "Tool calls of agents.", "tool", "outcome")
        self.sandbox = counter("sandbox_failures", "Rollouts that the sandbox itself failed.", "model")

    def record(self, served: Served, status: int, seconds: float) -> None:
        """Count a chat request that has ended."""
        model = served.model or NO_MODEL
        self.requests.labels(model, str(status)).inc()
        self.seconds.labels(model).observe(seconds)
        self.prompt.labels(model).inc(served.prompt_tokens or 0)
        self.completion.labels(model).inc(served.completion_tokens or 0)
        if served.steps:
            self.steps.labels(model).inc(served.steps)
        for kind in served.step_failures:
            self.step_failures.labels(model, kind).inc()
        for name, worked in served.tool_calls:
            known = name if name in self._tools else "other"
            self.tools.labels(known, "ok" if worked else "error").inc()
        if served.stop_reason is not None:
            self.rollouts.labels(model, served.stop_reason).inc()
        if served.sandbox_failed:
            self.sandbox.labels(model).inc()

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return bytes(generate_latest(self.registry))


class _State:
    """What is read off when somebody looks, rather than counted."""

    def __init__(self, backends: Sequence[ChatBackend], line: Line, log: AccessLog | None) -> None:
        self.line, self.log = line, log
        self.engines: dict[str, Any] = {}
        self.runs: set[RunLog] = {runs for it in backends if (runs := getattr(it, "runs", None)) is not None}
        known: set[int] = set()
        for backend in backends:
            engine = getattr(backend, "engine", None)
            source = getattr(engine, "child", engine)  # one server may serve several students
            if source is not None and id(source) not in known:
                known.add(id(source))
                self.engines[backend.model_id] = engine

    def collect(self) -> Iterator[Any]:
        """See prometheus_client's ``Collector``."""
        yield GaugeMetricFamily("agentkd_running", "Requests being worked on.", value=self.line.running)
        yield GaugeMetricFamily(
            "agentkd_lingering", "Those whose client is gone, not ended yet.", value=self.line.lingering
        )
        yield GaugeMetricFamily("agentkd_waiting", "Requests in the queue.", value=self.line.waiting)
        yield from self._prefix_cache()
        restarts = _by_model("agentkd_engine_restarts", "Starts of an engine that had crashed.")
        for model, engine in self.engines.items():
            if hasattr(engine, "child"):
                restarts.add_metric([model], engine.child.restarts)
        yield restarts
        yield from self._kept()

    def describe(self) -> Iterable[Any]:
        """Nothing: the names are those that ``collect`` gives."""
        return ()

    def _prefix_cache(self) -> Iterator[Any]:
        asked = _by_model("agentkd_prefix_cache_queried_tokens", "Prompt tokens looked up in the cache.")
        found = _by_model("agentkd_prefix_cache_hit_tokens", "Prompt tokens found there.")
        for model, engine in self.engines.items():
            cache = getattr(engine, "prefix_cache", None)
            if cache is not None:
                asked.add_metric([model], cache.queried_tokens)
                found.add_metric([model], cache.hit_tokens)
        yield asked
        yield found

    def _kept(self) -> Iterator[Any]:
        """What was written down, and what could not be."""
        if self.log is not None:
            yield CounterMetricFamily(
                "agentkd_access_log_lost_lines", "Lines that the disk did not take.", value=self.log.lost
            )
        if self.runs:
            saved, lost = (sum(getattr(it, name) for it in self.runs) for name in ("saved", "lost"))
            yield CounterMetricFamily("agentkd_runs_saved", "Rollouts kept in the run folder.", value=saved)
            yield CounterMetricFamily("agentkd_runs_lost", "Rollouts that the disk did not take.", value=lost)


def _by_model(name: str, words: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, words, labels=["model"])
