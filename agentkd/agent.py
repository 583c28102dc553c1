"""The agent: smolagents' ``CodeAgent`` with its step hook replaced.

:class:`StepAgent` overrides ``_step_stream`` and ``provide_final_answer``, and hands out its system
prompt as it is. One place therefore decides how a conversation is rendered, how an action is
parsed, what the model is shown, and whose fault a failure was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal

from smolagents import CodeAgent, LogLevel, Model, Tool
from smolagents.agents import ActionOutput
from smolagents.memory import ActionStep, ToolCall
from smolagents.models import ChatMessage, MessageRole
from smolagents.monitoring import TokenUsage
from smolagents.utils import AgentExecutionError, AgentParsingError

from agentkd import prompt as prompts
from agentkd.action import Parsed, parse_action
from agentkd.draw import Draft, StepDraw
from agentkd.errors import ConfigError
from agentkd.model import provider_error
from agentkd.router import Decision, Router, RouterConfig
from agentkd.sampler import Sampled, Sampler, run_action
from agentkd.sandbox import Outcome, Sandbox, open_sandbox
from agentkd.telemetry import choice_span
from agentkd.tool_use import without_tools
from agentkd.trajectory import Context, Failure, FirstThought, Mode, Step

__all__ = ["RolloutCancelled", "RolloutTimeout", "StepAgent", "build_agent"]

NO_CODE = 'No code block was found. Write "Thought:" and then one ```python block.'
NOT_DIRECT = "Answer directly, without tools: final_answer(value), with the value written out."
NO_ANSWER = 'No line "Answer: <answer>" was found.'
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}
"""What vLLM, and servers that follow it, take for: go on with the final message."""

_TEMPLATES: dict[str, Any] = {
    "system_prompt": "{{ custom_instructions }}",
    "planning": {"initial_plan": "", "update_plan_pre_messages": "", "update_plan_post_messages": ""},
    "managed_agent": {"task": "", "report": ""},
    "final_answer": {"pre_messages": "", "post_messages": ""},
}


class RolloutTimeout(Exception):
    """The rollout's time is up."""


class RolloutCancelled(Exception):
    """Nobody wants the rollout any more."""


class StepAgent(CodeAgent):
    """A ``CodeAgent`` that keeps a :class:`agentkd.trajectory.Step` of every step.

    Use :func:`build_agent` to make one.

    Attributes:
        records: the steps of the current run.
        kind: "agent" acts in code; "cot" answers at once, by chain of thought.
        deadline: ``time.monotonic()`` at which the run ends, or None.
        first_thought: what the first step of an agent begins with, or None.
        sampler: how an action is chosen among several; None takes the one that the model gives.
        router: decides at the first step whether tools are used; None leaves it to the prompt.
        mode: which of ``mode_prompts`` the current run is held under; "allowed" but for a router.
        answers_as_text: an answer leaves ``run`` as text, "" where there is none; to see whether another
            value is sound, smolagents would import torch where it is installed: seconds, and much memory.
        watch: told of every step twice: when its action is chosen, and when it is over.
        cancelled: True once :meth:`cancel` was called.
        search: finds the passages before the question of a chain of thought (``context``), or None.
    """

    def __init__(
        self,
        *,
        kind: Literal["agent", "cot"],
        force_answer: bool,
        sampler: Sampler | None,
        router: Router | None,
        mode_prompts: dict[Mode, str],
        search: Tool | None = None,
        tools: list[Tool],
        model: Model,
        **options: Any,
    ) -> None:
        self.kind = kind
        self.force_answer = force_answer
        self.records: list[Step] = []
        self.deadline: float | None = None
        self.first_thought: FirstThought | None = None
        self.sampler = sampler
        self.router = router
        self.mode_prompts = mode_prompts
        self.mode: Mode = "allowed"
        self.answers_as_text = False
        self.watch: Callable[[Step], None] | None = None
        self.cancelled = False
        self.search = search
        self.context: Context | None = None
        super().__init__(tools=tools, model=model, **options)

    def initialize_system_prompt(self) -> str:
        """The prompt as it was given; smolagents would compile a template each time it is asked."""
        return self.mode_prompts[self.mode]

    @property
    def sandbox(self) -> Sandbox:
        """The session that runs the code."""
        return self.python_executor  # type: ignore[no-any-return]

    def cancel(self) -> None:
        """End the run, from another thread: before its next step, or in the middle of an action.

        Where the sandbox cannot be interrupted, an action that is running ends by its own limit.
        """
        self.cancelled = True
        interrupt = getattr(self.sandbox, "interrupt", None)
        if interrupt is not None:
            interrupt()

    def _messages(self) -> list[ChatMessage]:
        turns = [(step.output, step.observation) for step in self.records]
        passages = self.context.text if self.context else None
        question = prompts.question_text(self.task, passages)
        chat = prompts.chat_messages(self.system_prompt, question, turns)
        return [_message(message["role"], message["content"]) for message in chat]

    @property
    def _given(self) -> FirstThought | None:
        """What the step that comes next begins with, where that is given."""
        return self.first_thought if self.kind == "agent" and not self.records else None

    def _request(self) -> tuple[list[ChatMessage], dict[str, Any]]:
        """What the model is asked at this step, and the options of that call."""
        given, messages = self._given, self._messages()
        if given is None:
            return messages, {}
        if given.via == "prefill":
            return [*messages, _message("assistant", given.prefix)], {"extra_body": CONTINUE}
        request = prompts.first_thought_request(self.task, given.prefix)
        return [*messages[:-1], _message("user", request)], {}

    def _step_stream(self, memory_step: ActionStep) -> Generator[ToolCall | ActionOutput]:
        if self.cancelled:
            raise RolloutCancelled
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise RolloutTimeout
        if self.search is not None and not self.records:
            found = str(self.search(self.task))
            self.context = Context(text=found, k=self.search.k, max_tokens=self.search.max_tokens)
        draw, decision = self._draw(), None
        if not self.records and self.router is not None:
            with choice_span("routing") as chosen:
                draw, decision = self._decide(self.router)
                chosen({"mode": decision.mode, "direct": decision.direct, "p_tool": decision.p_tool})
        memory_step.model_input_messages = draw.messages
        if self.kind == "cot":
            yield self._answer(memory_step, draw)
        else:
            yield from self._act(memory_step, draw, decision)

    def _draw(self) -> StepDraw:
        return StepDraw(self.model, *self._request(), step=len(self.records) + 1)

    def _decide(self, router: Router) -> tuple[StepDraw, Decision]:
        """Ask the router, and prepare the first step as it says."""
        draws: dict[Mode, StepDraw] = {}

        def ask(mode: Mode, count: int, config: RouterConfig) -> tuple[list[Draft], list[Parsed]]:
            self.mode = mode
            draw = draws[mode] = self._draw()
            drafts = [draw.scored()] if count == 1 else draw(count, 0, config)[0]
            return drafts, [self._parse(draft.raw) for draft in drafts]

        self.mode = "allowed"
        decision = router.decide(ask, self._direct)
        self.mode = decision.mode
        draw = draws.pop(decision.mode, None) or self._draw()
        for other in draws.values():
            draw.take_over(other.usage, other.seconds)
        return draw, decision

    def _new_step(self, memory_step: ActionStep, draw: StepDraw, draft: Draft, parsed: Parsed) -> Step:
        memory_step.model_output = parsed.output
        memory_step.model_output_message = draw.answers[-1]
        memory_step.token_usage = TokenUsage(draw.usage.input_tokens, draw.usage.output_tokens)
        return Step(
            number=draw.step,
            actor=str(getattr(self.model, "model_id", None) or type(self.model).__name__),
            raw=draft.raw,
            output=parsed.output,
            repairs=parsed.repairs,
            first_thought=self._given,
            thought=parsed.thought,
            code=parsed.code,
            usage=draw.usage,
            finish_reason=draft.finish_reason,
            prompt_token_ids=draw.prompt_token_ids,
            output_token_ids=draft.token_ids,
            logprobs=draft.logprobs,
            model_seconds=draw.seconds,
        )

    def _answer(self, memory_step: ActionStep, draw: StepDraw) -> ActionOutput:
        """Take a chain of thought for what it is."""
        draft = draw.one()
        text = draft.raw.strip()
        found = prompts.answer_from_cot(draft.raw)
        failure = None if found is not None else Failure(kind="parse", message=NO_ANSWER)
        step = self._new_step(memory_step, draw, draft, Parsed(text, None, text, ()))
        self._keep(step.model_copy(update={"is_final": found is not None, "failure": failure}))
        if failure is not None:
            raise AgentParsingError(NO_ANSWER, self.logger)
        memory_step.action_output = found
        return ActionOutput(output=found, is_final_answer=True)

    def _act(
        self, memory_step: ActionStep, draw: StepDraw, decision: Decision | None
    ) -> Generator[ToolCall | ActionOutput]:
        """Take an action, and record what came of it."""
        began = time.monotonic() - draw.seconds
        sampled: Sampled | None = None
        opening = None if decision is None else decision.opening
        if decision is not None and opening is not None and (decision.direct or self.sampler is None):
            draft, parsed = decision.drafts[opening], decision.parsed[opening]
        elif self.sampler is not None:
            with choice_span("action sampling") as chosen:
                sampled = self.sampler.act(draw, self._parse, self.sandbox)
                chosen({"candidates": sampled.votes()})
            draft, parsed = sampled.draft, sampled.parsed
        else:
            draft = draw.scored() if decision is not None else draw.one()
            parsed = self._parse(draft.raw)
        route = None
        if decision is not None and self.router is not None:
            route = decision.record(self.router.kind, draft, parsed, self._direct)
        candidates = sampled.candidates if sampled is not None else ()
        step = self._new_step(memory_step, draw, draft, parsed).model_copy(
            update={"route": route, "candidates": candidates}
        )
        if self.mode == "direct":
            self.step_number = self.max_steps  # an answer without tools is one step, and this is it
        if parsed.code is None:
            problem = NOT_DIRECT if self.mode == "direct" else NO_CODE
            self._fail(memory_step, step, "parse", problem, "")
            raise AgentParsingError(problem, self.logger)
        if self.watch is not None:
            self.watch(step)
        memory_step.code_action = parsed.code
        call = ToolCall(name="python_interpreter", arguments=parsed.code, id=f"call_{step.number}")
        memory_step.tool_calls = [call]
        yield call
        outcome = run_action(self.sandbox, parsed.code) if sampled is None else sampled.outcome
        assert outcome is not None
        seconds = time.monotonic() - began - draw.seconds
        # A process that has ended left the session none.
        uses = self.sandbox.take_tool_uses() or outcome.tool_uses
        step = step.model_copy(update={"code_seconds": seconds, "tool_uses": uses})
        yield self._outcome(memory_step, step, outcome)

    def _parse(self, raw: str) -> Parsed:
        given = self._given
        if given is not None:
            raw = given.prefix + raw if given.via == "prefill" else prompts.joined(given.prefix, raw)
        parsed = parse_action(raw)
        if self.mode == "direct" and not self._direct(parsed.code):
            return parsed._replace(code=None)  # no tools means that what uses one is not run
        return parsed

    def _direct(self, code: str | None) -> bool:
        """Whether code uses nothing of what counts as a tool."""
        return without_tools(code, self.router.tools if self.router else "both", self.tools)

    def _outcome(self, memory_step: ActionStep, step: Step, outcome: Outcome) -> ActionOutput:
        if outcome.error is not None:
            kind: Literal["timeout", "execution"] = "timeout" if outcome.timed_out else "execution"
            self._fail(memory_step, step, kind, outcome.error, outcome.printed)
            raise AgentExecutionError(outcome.error, self.logger)
        final = outcome.is_final
        shown = None if final else prompts.observation_text(outcome.printed, outcome.value)
        memory_step.observations = shown
        memory_step.action_output = outcome.value
        self._keep(step.model_copy(update={"observation": shown, "is_final": final}))
        as_text = final and self.answers_as_text and outcome.value is not None
        return ActionOutput(output=str(outcome.value) if as_text else outcome.value, is_final_answer=final)

    def _fail(
        self,
        memory_step: ActionStep,
        step: Step,
        kind: Literal["parse", "execution", "timeout"],
        message: str,
        printed: str,
    ) -> None:
        shown = prompts.observation_text(printed, error=message)
        memory_step.observations = shown
        failure = Failure(kind=kind, message=message)
        self._keep(step.model_copy(update={"observation": shown, "failure": failure}))

    def _keep(self, step: Step) -> None:
        self.records.append(step)
        if self.watch is not None:
            self.watch(step)

    def provide_final_answer(self, task: str) -> ChatMessage:
        """A run that reached its step limit ends as such; a last call is made only when asked for."""
        if not self.force_answer:
            return ChatMessage(role=MessageRole.ASSISTANT, content="" if self.answers_as_text else None)
        ask = "No steps are left. Reply with the bare answer only."
        messages = [
            *self._messages(),
            _message("user", ask),
        ]
        try:
            return self.model.generate(messages)
        except Exception as exc:
            raise provider_error(exc) from exc


def _message(role: str, text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole(role), content=[{"type": "text", "text": text}])


def build_agent(
    model: Model,
    tools: Sequence[Tool] = (),
    *,
    kind: Literal["agent", "cot"] = "agent",
    prompt: str | None = None,
    sandbox: str | Sandbox | None = None,
    imports: Sequence[str] = (),
    max_steps: int = 5,
    action_timeout: float = 10.0,
    force_answer: bool = False,
    sampler: Sampler | None = None,
    router: Router | None = None,
    passages: bool = False,
    verbose: bool = False,
) -> StepAgent:
    """Make an agent.

    Args:
        model: any smolagents model, for instance :func:`agentkd.model.openai_model`.
        tools: smolagents tools; ``final_answer`` is always there.
        kind: "agent" acts in code; "cot" answers once, without tools.
        prompt: a system prompt, complete or with ``{tools}`` and ``{imports}`` in it; the
            teacher's by default.
        sandbox: where code runs: the name of a backend ("fork" by default, "e2b", "docker",
            "local"), or a session.
        imports: modules that the code may import beside the standard ones.
        max_steps: actions before the run ends with ``StopReason.MAX_STEPS``.
        action_timeout: seconds for the code of one step.
        force_answer: at the step limit, make one more call that asks for the bare answer.
        sampler: chooses each action among several, for instance
            :class:`agentkd.sampler.SelfConsistentSampler`.
        router: decides whether a question needs tools, for instance
            :func:`agentkd.router.make_router`; ``prompt`` is then P_i.
        passages: a chain of thought is shown what the ``search`` tool among ``tools`` finds for its question.
        verbose: print the run as smolagents does.

    Raises:
        ConfigError: an unknown sandbox, or ``passages`` and nothing to search.
        SandboxError: the sandbox is not available here; `agentkd doctor` says why.
    """
    from smolagents.local_python_executor import BASE_BUILTIN_MODULES

    search = next((tool for tool in tools if tool.name == "search"), None)
    if passages and (kind != "cot" or search is None):
        said = "Passages stand before the question of a chain of thought, and need something to search."
        raise ConfigError(said, 'Use kind "cot", and name a --corpus.')
    chosen = tuple(tools) if kind == "agent" else ()
    template = prompt or (prompts.TEACHER if kind == "agent" else prompts.COT_TEACHER)
    modules = sorted({*BASE_BUILTIN_MODULES, *imports})
    if kind == "cot":
        sandbox = "local"  # never used, and then it costs nothing
    if sandbox is None or isinstance(sandbox, str):
        sandbox = open_sandbox(sandbox, imports=imports, timeout=action_timeout)
    templates: dict[Mode, str] = {"allowed": template}
    if kind == "agent" and router is not None:
        templates |= {"direct": prompts.DIRECT, "required": prompts.TOOLS_REQUIRED}
    texts = {mode: prompts.system_prompt(text, chosen, modules) for mode, text in templates.items()}
    return StepAgent(
        kind=kind,
        force_answer=force_answer,
        sampler=sampler if kind == "agent" else None,
        router=router if kind == "agent" else None,
        mode_prompts=texts,
        search=search if passages else None,
        tools=list(chosen),
        model=model,
        prompt_templates=_TEMPLATES,
        instructions=texts["allowed"],
        executor=sandbox,
        additional_authorized_imports=list(imports),
        max_steps=max_steps if kind == "agent" else 1,
        code_block_tags=(prompts.FENCE_OPEN, prompts.FENCE_CLOSE),
        verbosity_level=LogLevel.INFO if verbose else LogLevel.OFF,
    )
