"""The agent as a model: a chat completion that is a whole rollout.

``NAME-agent`` takes the last user turn as the task and runs the very :func:`agentkd.rollout.rollout`
that evaluation runs, with the student's own prompt, limits, tools and sampler. Steps are told while
they happen, as text (``reasoning_content``, never ``tool_calls``, which a client would execute) and
as events; the final answer is the content.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from agentkd.agent_config import AgentConfig, agent_factory
from agentkd.engine import Cancellation
from agentkd.engine.model import EngineModel
from agentkd.engine.rendered import CachedTokenizer
from agentkd.errors import ConfigError, ContextOverflowError
from agentkd.prompt import FENCE_CLOSE, FENCE_OPEN
from agentkd.rollout import rollout
from agentkd.router import parse_router
from agentkd.sampler import SamplerConfig
from agentkd.sandbox import Sandbox, open_sandbox
from agentkd.scorer import SCORERS
from agentkd.serve.backend import AGENT_SUFFIX, ChatChoice, ChatResult, Listener, RoomCheck
from agentkd.serve.request import AgentOptions, ChatRequest, EngineRefusal, RequestError
from agentkd.serve.runs import RunLog
from agentkd.serve.sessions import Sessions
from agentkd.spend import LimitReached
from agentkd.task import Task
from agentkd.trajectory import Step, StopReason, Trajectory

if TYPE_CHECKING:
    from smolagents import Tool

    from agentkd.agent import StepAgent
    from agentkd.engine import Engine

__all__ = ["AgentBackend", "question_of", "step_event"]

MAX_SECONDS = 120.0
"""Wall-clock limit of one answer, unless the settings have one."""

_SHOWN: dict[str, Any] = {
    **dict.fromkeys(("number", "thought", "code", "observation", "failure", "is_final", "tool_uses"), True),
    **dict.fromkeys(("usage", "model_seconds", "code_seconds"), True),
    "candidates": {"__all__": {"code", "outcome", "failure", "votes", "chosen", "mean_logprob"}},
    "route": {"router", "mode", "direct", "p_tool", "agreement"},
}
"""What of a step is told: no token ids and log-probabilities, which are most of it."""
_NOT_FOR_AGENTS = {
    "n": "An agent gives one answer; ask several times, with other seeds.",
    "logprobs": "An agent's answer comes out of code and has no log-probabilities; ask the bare student.",
    "return_token_ids": "An agent samples at every step; ask for the trajectory (agentkd.return_trajectory).",
    "continue_final_message": "An agent begins with a task; ask the bare student to continue a text.",
}


class AgentBackend:
    """A student with its tools and sandbox, as one model. See :class:`agentkd.serve.ChatBackend`.

    Args:
        engine: shared with the bare student, who owns it.
        tokenizer: of the student.
        config: how its agents are made; ``model`` is the student's name, and this model's name is
            that with "-agent". ``max_seconds`` is the limit of every answer.
        tools: what its code may call.
        runs: where rollouts are kept, or None.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        config: AgentConfig,
        tools: Sequence[Tool] = (),
        *,
        runs: RunLog | None = None,
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.config = config.model_copy(update={"max_seconds": config.max_seconds or MAX_SECONDS})
        self.tools, self.runs = tuple(tools), runs
        self.words = CachedTokenizer(tokenizer)
        self.room = RoomCheck(engine, tokenizer)
        self.sessions = Sessions(self._session)
        self.model_id = config.model + AGENT_SUFFIX
        self.label = f"agentkd agent of {config.model}"

    def complete(self, request: ChatRequest, listener: Listener | None = None) -> ChatResult:
        """See :class:`agentkd.serve.ChatBackend`."""
        options = request.agentkd or AgentOptions()
        _refuse(request, options)
        self.room.check(message.content for message in request.messages)
        question = question_of(request.plain_messages())
        config = _settings(self.config, request, options)
        model = _Model(self.engine, self.words, config, request)
        task = Task(
            id=f"served-{uuid.uuid4().hex}", question=question, answer=options.answer, scorer=options.scorer
        )
        trajectory, reasoning = self._run(task, config, model, listener)
        saved = self.runs.add(trajectory) if self.runs is not None else None
        return _result(trajectory, reasoning, request, options, saved)

    def _run(
        self, task: Task, config: AgentConfig, model: _Model, listener: Listener | None
    ) -> tuple[Trajectory, str]:
        session = self.sessions.take()
        try:
            agent = agent_factory(config, self.tools, model, sandbox=session)(task, 0)
            follower = _Follower(listener)
            agent.watch = follower.step
            trajectory = self._rollout(agent, task, config, model, listener)
        finally:
            self.sessions.end(session)
        if trajectory.stop_reason == StopReason.PROVIDER_ERROR and model.refused is not None:
            raise model.refused
        reason = _reason(trajectory, model, gone=listener is not None and listener.cancelled())
        if reason != trajectory.stop_reason:
            trajectory = trajectory.model_copy(update={"stop_reason": reason, "failure": None})
        return trajectory, "".join(follower.told)

    def _rollout(
        self, agent: StepAgent, task: Task, config: AgentConfig, model: _Model, listener: Listener | None
    ) -> Trajectory:
        """Run it until it ends, its time is up, or nobody waits any more."""
        model.cancellation = cancellation = Cancellation()

        def give_up() -> None:
            agent.cancel()
            cancellation.cancel()

        assert config.max_seconds is not None
        timer = threading.Timer(config.max_seconds, give_up)
        timer.daemon = True
        timer.start()
        if listener is not None:
            listener.when_cancelled(give_up)
        try:
            return rollout(
                agent,
                task,
                max_seconds=config.max_seconds,
                config=config.model_dump(mode="json"),
                labels={"served_as": self.model_id},
            )
        finally:
            timer.cancel()

    def _session(self) -> Sandbox:
        config = self.config
        session = open_sandbox(config.sandbox, imports=config.imports, timeout=config.action_seconds)
        if hasattr(session, "ends_with_answer"):
            session.ends_with_answer = True
        return session

    def close(self) -> None:
        """End the sessions; the engine is the bare student's."""
        self.sessions.close()


class _Model(EngineModel):
    """The student, as one request may use it: sampled as it says, within its token limit."""

    def __init__(self, engine: Engine, tokenizer: Any, config: AgentConfig, request: ChatRequest) -> None:
        super().__init__(
            engine,
            tokenizer,
            config.model,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
        )
        options = request.agentkd or AgentOptions()
        self.left, self.top_p = request.limit, request.top_p
        self.seed = request.seed if options.seed is None else options.seed
        self.calls = 0
        self.spent = False
        """Whether a call was refused because no tokens were left."""
        self.refused: EngineRefusal | None = None
        """The engine did not take what the request asks for."""

    def generate(self, messages: list[Any], stop_sequences: list[str] | None = None, **options: Any) -> Any:
        """See :class:`agentkd.engine.model.EngineModel`."""
        options.setdefault("top_p", self.top_p)
        if self.seed is not None:  # every call draws something else
            options.setdefault("seed", (self.seed * 1_000_003 + self.calls) % 2**31)
        self.calls += 1
        if self.left is not None:
            each = min(self.max_tokens, self.left // int(options.get("n", 1)))
            if each < 1:
                self.spent = True
                raise LimitReached("The request's token limit is reached.")
            options["max_tokens"] = each
        try:
            answer = super().generate(messages, stop_sequences, **options)
        except EngineRefusal as exc:
            self.refused = exc
            raise
        if self.left is not None and answer.token_usage is not None:
            self.left -= answer.token_usage.output_tokens
        return answer


class _Follower:
    """Tells a listener of the steps of one rollout."""

    def __init__(self, listener: Listener | None) -> None:
        self.listener = listener
        self.told: list[str] = []
        self._begun = 0

    def step(self, step: Step) -> None:
        """See :attr:`agentkd.agent.StepAgent.watch`."""
        done = step.observation is not None or step.failure is not None or step.is_final
        text = "" if self._begun == step.number else _action_text(step)
        self._begun = step.number
        text += _outcome_text(step) if done else ""
        self.told.append(text)
        if self.listener is not None:
            self.listener.step(text, step_event(step, "done" if done else "acting"))


def _action_text(step: Step) -> str:
    if step.code is None:
        return f"{step.output.strip()}\n"
    return f"{step.thought}\n{FENCE_OPEN}\n{step.code}\n{FENCE_CLOSE}\n"


def _outcome_text(step: Step) -> str:
    return f"{step.observation.rstrip()}\n\n" if step.observation else ""


def step_event(step: Step, state: Literal["acting", "done"]) -> dict[str, Any]:
    """A step for machines: the ``agentkd_step`` of a chunk; the format is in ``docs/serving.md``.

    Args:
        step: as far as it has got.
        state: "acting": the action is chosen; "done": it has been run.
    """
    return {"state": state, **step.model_dump(mode="json", include=_SHOWN)}


def question_of(messages: Sequence[dict[str, str]]) -> str:
    """The task of a conversation: the last user turn, behind a preamble of what was said before.

    A single user turn is the task verbatim, as in training.

    Raises:
        RequestError: the conversation does not end with a user turn that says something.
    """
    last = messages[-1]
    if last["role"] != "user" or not last["content"].strip():
        raise RequestError(
            "The last message must be the user's, and say what the task is.",
            param="messages",
            code="invalid_value",
        )
    if len(messages) == 1:
        return last["content"]
    before = "\n".join(f"{message['role']}: {message['content']}" for message in messages[:-1])
    return f"What was said before:\n{before}\n\nThe task:\n{last['content']}"


def _refuse(request: ChatRequest, options: AgentOptions) -> None:
    for name, why in _NOT_FOR_AGENTS.items():
        if getattr(request, name) != ChatRequest.model_fields[name].default:
            raise RequestError(
                f"{name!r} is not supported by an agent model. {why}",
                param=name,
                code="unsupported_parameter",
            )
    if options.scorer not in SCORERS:
        raise RequestError(
            f"There is no scorer {options.scorer!r}; there is: {', '.join(SCORERS)}.",
            param="agentkd.scorer",
            code="invalid_value",
        )


def _settings(config: AgentConfig, request: ChatRequest, options: AgentOptions) -> AgentConfig:
    """The settings of the model, with what the request wants otherwise."""
    assert config.max_seconds is not None
    changes: dict[str, Any] = {"max_seconds": min(config.max_seconds, options.timeout or config.max_seconds)}
    if options.max_steps is not None:
        changes["max_steps"] = options.max_steps
    if request.temperature is not None:
        changes["temperature"] = request.temperature
    sampler = config.sampler
    if options.actions is not None:
        sampler = (sampler or SamplerConfig()).model_copy(update={"n": options.actions})
        sampler = None if options.actions == 1 else sampler
    seed = request.seed if options.seed is None else options.seed
    try:
        router = config.router
        if options.router is not None:
            router = parse_router(options.router, saved=config.router)
    except ConfigError as exc:
        raise RequestError(str(exc), param="agentkd.router", code="invalid_value") from exc
    if seed is not None:
        sampler = sampler and sampler.model_copy(update={"seed": seed})
        router = router and router.model_copy(update={"seed": seed})
    return config.model_copy(update={**changes, "sampler": sampler, "router": router})


def _reason(trajectory: Trajectory, model: _Model, *, gone: bool) -> StopReason:
    """Why it ended; what stopped it from outside is known here only."""
    if trajectory.stop_reason != StopReason.CANCELLED or gone:
        return trajectory.stop_reason
    return StopReason.OUTPUT_LIMIT if model.spent else StopReason.TIMEOUT


def _result(
    trajectory: Trajectory,
    reasoning: str,
    request: ChatRequest,
    options: AgentOptions,
    saved: bool | None,
) -> ChatResult:
    reason = trajectory.stop_reason
    if reason == StopReason.CONTEXT_OVERFLOW and not trajectory.steps:
        raise ContextOverflowError("The task does not fit the model's context.", "Shorten the conversation.")
    if reason.is_error:
        why = trajectory.failure.message if trajectory.failure else "it was cancelled"
        status = 500 if reason == StopReason.INTERNAL_ERROR else 503
        raise RequestError(f"The rollout failed: {why}", status=status, code=reason.value)
    text = trajectory.answer or ""
    found = [at for stop in request.stop if stop and (at := text.find(stop)) >= 0]
    rollout_: dict[str, Any] = {
        "stop_reason": reason.value,
        "steps": len(trajectory.steps),
        "seconds": round(trajectory.seconds, 4),
    }
    if saved is not None:
        rollout_["saved"] = saved
    if options.return_trajectory:
        rollout_["trajectory"] = trajectory.model_dump(mode="json")
    return ChatResult(
        choices=(
            ChatChoice(
                text[: min(found)] if found else text,
                "stop" if reason == StopReason.FINAL_ANSWER else "length",
                reasoning=reasoning,
            ),
        ),
        prompt_tokens=trajectory.usage.input_tokens,
        completion_tokens=trajectory.usage.output_tokens,
        rollout=rollout_,
    )
