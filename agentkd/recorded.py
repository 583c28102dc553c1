"""An agent's model, sandbox and tools with a recorder between them and whoever uses them.

Each asks the recorder first, and what it has asked of the world is written before it is handed
out, in the form in which it would be read back: so a continued rollout sees what a first one saw.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from agentkd.calls import Call
from agentkd.endpoint import CHARACTERS_PER_TOKEN, as_object
from agentkd.errors import AgentkdError, ContextOverflowError
from agentkd.model import provider_error, token_usage
from agentkd.recorder import Diverged, NotRecorded, Recorder
from agentkd.sandbox import CodeFailure, Outcome, Sandbox
from agentkd.sandbox.inside.wire import plain
from agentkd.secret import Redactor
from agentkd.telemetry import model_span
from agentkd.trajectory import ToolUse, Usage, valid_text

if TYPE_CHECKING:
    from smolagents import Model
    from smolagents.models import ChatMessage

__all__ = ["RecordedModel", "RecordedSandbox", "RecordedTool"]


def _fingerprint(*asked: Any) -> str:
    text = json.dumps(asked, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


class RecordedModel:
    """A smolagents model whose answers are logged; everything else of it is the model's own."""

    def __init__(
        self, model: Model, recorder: Recorder, step: Callable[[], int], ordinal: int | None = None
    ) -> None:
        self._model, self._recorder, self._step, self._ordinal = model, recorder, step, ordinal
        self._name = str(getattr(model, "model_id", None) or type(model).__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def side_by_side(self, count: int) -> list[RecordedModel]:
        """Models for one call each, made at the same time: their places in the log are fixed before."""
        first = self._recorder.reserve("model", self._step(), count)
        return [RecordedModel(self._model, self._recorder, self._step, first + k) for k in range(count)]

    def generate(self, messages: list[Any], **options: Any) -> ChatMessage:
        step = self._step()
        sampling = getattr(self._model, "kwargs", {})
        request = _fingerprint(self._name, sampling, [_plain_message(item) for item in messages], options)
        ordinal, call = self._recorder.find("model", step, request, self._ordinal)
        if call is None:
            if self._recorder.replay:
                raise NotRecorded(f"step {step}: the model was not asked")
            call = self._ask(messages, options, step, ordinal, request)
        if call.error is not None:
            raise ContextOverflowError(call.error[1])
        return _message(call)

    def _ask(
        self, messages: list[Any], options: dict[str, Any], step: int, ordinal: int, request: str
    ) -> Call:
        recorder, error, answer, usage = self._recorder, None, None, Usage()
        if recorder.meter is not None:
            recorder.meter.check()
        began = time.monotonic()
        try:
            with model_span(self._name, [_plain_message(item) for item in messages]) as answered:
                message = self._model.generate(messages, **options)
                answer, usage = _answer(message, recorder.redactor), token_usage(message)
                answered(str(answer["content"]), usage)
        except Exception as exc:
            named = provider_error(exc)
            if not isinstance(named, ContextOverflowError):
                raise named from exc
            error = (type(named).__name__, named.message)  # asked again, it would be the same answer
        else:
            if usage.uncounted_calls:
                usage = usage.model_copy(update={"estimated_tokens": _guess(messages, message)})
        seconds = time.monotonic() - began
        call = recorder.add(
            Call(
                rollout=recorder.rollout,
                kind="model",
                step=step,
                ordinal=ordinal,
                request=request,
                answer=answer,
                error=error,
                model=self._name,
                usage=usage,
                seconds=seconds,
            )
        )
        if recorder.meter is not None:
            recorder.meter.add(self._name, usage, seconds)
        return call


def _guess(messages: list[Any], answer: ChatMessage) -> int:
    texts = [str(_plain_message(item)[1]) for item in messages]
    return sum(map(len, (*texts, str(answer.content)))) // CHARACTERS_PER_TOKEN


def _plain_message(message: Any) -> list[Any]:
    fields = message if isinstance(message, dict) else vars(message)
    role = fields["role"]
    return [getattr(role, "value", role), fields["content"]]


def _answer(message: ChatMessage, redactor: Redactor) -> dict[str, Any]:
    """What is kept of an answer: its text, and what the server said with it."""
    content = message.content
    if isinstance(content, str):
        content = redactor.text(valid_text(content))
    raw = redactor.value(_as_json(message.raw))
    if content != message.content and isinstance(raw, dict):
        raw = _without_tokens(raw)
    return {"content": content, "raw": raw}


def _without_tokens(raw: dict[str, Any]) -> dict[str, Any]:
    """Token ids spell the text that was replaced, so they go with it."""
    choices = [
        {key: value for key, value in choice.items() if key not in ("token_ids", "logprobs")}
        for choice in raw.get("choices") or []
    ]
    return {**raw, "choices": choices}


def _as_json(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return _as_json(value.model_dump(mode="json", exclude_unset=True))
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, str):
        return valid_text(value)
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _message(call: Call) -> ChatMessage:
    from smolagents.models import ChatMessage, MessageRole
    from smolagents.monitoring import TokenUsage

    usage = call.usage
    return ChatMessage(
        role=MessageRole.ASSISTANT,
        content=call.answer["content"],
        raw=as_object(call.answer["raw"]),
        token_usage=None
        if usage.uncounted_calls
        else TokenUsage(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens),
    )


class RecordedTool:
    """A tool whose results are logged."""

    def __init__(
        self,
        name: str,
        tool: Any,
        recorder: Recorder,
        step: Callable[[], int],
        beside: Callable[[], bool] = lambda: False,
    ) -> None:
        self._name, self._tool, self._recorder, self._step = name, tool, recorder, step
        self._beside = beside

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tool, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self._step()
        request = _fingerprint(self._name, args, kwargs)
        # Which of several candidates calls first is chance, so what they ask is known by what it is.
        find = self._recorder.find_alike if self._beside() else self._recorder.find
        ordinal, call = find("tool", step, request)
        if call is None:
            call = self._use(args, kwargs, step, ordinal, request)
        if call.error is not None:
            name, message = call.error
            raise type(name, (Exception,), {})(message)  # the sandbox tells the code class and message
        return call.answer

    def _use(self, args: Any, kwargs: Any, step: int, ordinal: int, request: str) -> Call:
        clean = self._recorder.redactor
        began, answer, error = time.monotonic(), None, None
        try:
            answer = clean.value(_as_json(plain(self._tool(*args, **kwargs))))
        except AgentkdError:
            raise  # the world failed, so the call is not finished
        except Exception as exc:
            error = (type(exc).__name__, clean.text(valid_text(str(exc))))
        return self._recorder.add(
            Call(
                rollout=self._recorder.rollout,
                kind="tool",
                step=step,
                ordinal=ordinal,
                request=request,
                answer=answer,
                error=error,
                seconds=time.monotonic() - began,
            )
        )


class RecordedSandbox:
    """A session whose outcomes are logged, and whose tools are."""

    def __init__(self, sandbox: Sandbox, recorder: Recorder, step: Callable[[], int]) -> None:
        self._sandbox, self._recorder, self._step = sandbox, recorder, step
        self._uses: tuple[ToolUse, ...] = ()
        self._trying = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sandbox, name)

    def send_tools(self, tools: dict[str, Any]) -> None:
        self._sandbox.send_tools(
            {
                name: tool
                if name == "final_answer"
                else RecordedTool(name, tool, self._recorder, self._step, lambda: self._trying)
                for name, tool in tools.items()
            }
        )

    @property
    def can_fork(self) -> bool:
        """Whether actions can be tried; in a replay, whether they were."""
        if self._recorder.replay:
            return self._recorder.tried
        return bool(getattr(self._sandbox, "can_fork", False))

    def try_each(
        self, codes: Sequence[str], timeout: float | None = None, *, more: bool = False
    ) -> list[Outcome]:
        step, recorder = self._step(), self._recorder
        requests = [_fingerprint(code) for code in codes]
        known = [recorder.find("try", step, request) for request in requests]
        if recorder.replay:
            answers = [call.answer for _, call in known if call is not None]
        else:
            answers = self._try(codes, timeout, more)
            for request, (ordinal, call), answer in zip(requests, known, answers, strict=False):
                if call is None:
                    recorder.note("try", step, ordinal, request, answer, 0.0)
                elif _fingerprint(_deed(call.answer)) != _fingerprint(_deed(answer)):
                    raise Diverged(f"step {step}: a candidate came to another outcome than before")
        if answers and "lost" in answers[0]:
            raise CodeFailure(**answers[0]["lost"])
        if len(answers) < len(codes):
            raise NotRecorded(f"step {step}: the candidates were not run to their end")
        return [
            Outcome(
                **_deed(answer),
                tool_uses=tuple(ToolUse.model_validate(use) for use in answer.get("tool_uses", ())),
            )
            for answer in answers
        ]

    def _try(self, codes: Sequence[str], timeout: float | None, more: bool) -> list[dict[str, Any]]:
        """What becomes of each, as it is logged; one answer alone where the session was lost."""
        self._trying = True
        try:
            outcomes = self._sandbox.try_each(codes, timeout, more=more)  # type: ignore[attr-defined]
        except CodeFailure as exc:
            lost = {"message": exc.message, "printed": exc.printed, "timed_out": exc.timed_out}
            return [self._recorder.redactor.value(_as_json({"lost": lost}))]
        finally:
            self._trying = False
        return [self._recorder.redactor.value(_as_json(_tried(outcome))) for outcome in outcomes]

    def commit(self, index: int) -> None:
        step, recorder = self._step(), self._recorder
        request = _fingerprint(index)
        ordinal, call = recorder.find("commit", step, request)
        if recorder.replay:
            if call is None:
                raise NotRecorded(f"step {step}: no candidate was chosen")
            self._uses = tuple(ToolUse.model_validate(use) for use in call.answer)
            return
        self._sandbox.commit(index)  # type: ignore[attr-defined]
        uses = self._take_clean()
        if call is None:
            recorder.note("commit", step, ordinal, request, uses, 0.0)

    def discard(self) -> None:
        if not self._recorder.replay:
            self._sandbox.discard()  # type: ignore[attr-defined]

    def close(self) -> None:
        self._sandbox.close()  # type: ignore[attr-defined]

    def _take_clean(self) -> Any:
        """What tools were used in the session just now, kept for the step, and as JSON."""
        uses = self._recorder.redactor.value(
            [use.model_dump(mode="json") for use in self._sandbox.take_tool_uses()]
        )
        self._uses = tuple(ToolUse.model_validate(use) for use in uses)
        return uses

    def __call__(self, code_action: str) -> Any:
        step, recorder = self._step(), self._recorder
        ordinal, call = recorder.find("code", step, _fingerprint(code_action))
        if recorder.replay:
            if call is None:
                raise NotRecorded(f"step {step}: the code was not run to its end")
            outcome = call.answer["outcome"]
            self._uses = tuple(ToolUse.model_validate(use) for use in call.answer["tool_uses"])
            return _code_output(outcome)
        began = time.monotonic()
        outcome = recorder.redactor.value(_as_json(self._run(code_action)))
        uses = self._take_clean()
        if call is not None and _fingerprint(call.answer["outcome"]) != _fingerprint(outcome):
            raise Diverged(f"step {step}: the code came to another outcome than before")
        if call is None:
            answer = {"outcome": outcome, "tool_uses": uses}
            recorder.note("code", step, ordinal, _fingerprint(code_action), answer, time.monotonic() - began)
        return _code_output(outcome)

    def _run(self, code: str) -> dict[str, Any]:
        try:
            done = self._sandbox(code)
        except CodeFailure as exc:
            return {"message": exc.message, "printed": exc.printed, "timed_out": exc.timed_out}
        return {"output": plain(done.output), "logs": done.logs, "final": done.is_final_answer}

    def take_tool_uses(self) -> tuple[ToolUse, ...]:
        uses, self._uses = self._uses, ()
        return uses


def _tried(outcome: Outcome) -> dict[str, Any]:
    """A candidate's outcome as it is logged; times differ each time."""
    answer = outcome._asdict()
    del answer["seconds"], answer["tool_uses"]
    if outcome.ended:  # it cannot become the session, which would have its tool uses
        answer["tool_uses"] = [use.model_dump(mode="json") for use in outcome.tool_uses]
    return answer


def _deed(answer: dict[str, Any]) -> dict[str, Any]:
    """Of a logged outcome what is the same whenever the code runs."""
    return {name: value for name, value in answer.items() if name != "tool_uses"}


def _code_output(outcome: dict[str, Any]) -> Any:
    from smolagents.local_python_executor import CodeOutput

    if "message" in outcome:
        raise CodeFailure(outcome["message"], outcome["printed"], outcome["timed_out"])
    return CodeOutput(output=outcome["output"], logs=outcome["logs"], is_final_answer=outcome["final"])
