"""The agent: smolagents' ``CodeAgent`` with its step hook replaced.

:class:`StepAgent` overrides ``_step_stream`` and ``provide_final_answer`` and nothing else. One
place therefore decides how a conversation is rendered, how an action is parsed, what the model
is shown, and whose fault a failure was.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Sequence
from typing import Any, Literal, NamedTuple

from smolagents import CodeAgent, LogLevel, Model, Tool
from smolagents.agents import ActionOutput
from smolagents.memory import ActionStep, ToolCall
from smolagents.models import ChatMessage, MessageRole
from smolagents.utils import AgentExecutionError, AgentParsingError

from agentkd import prompt as prompts
from agentkd.errors import ProviderError
from agentkd.model import provider_error
from agentkd.sandbox import CodeFailure, Sandbox, open_sandbox
from agentkd.trajectory import Failure, FirstThought, Step, Usage, valid_text

__all__ = ["Parsed", "RolloutTimeout", "StepAgent", "build_agent", "parse_action"]

STOP_SEQUENCES = ("Observation:",)
NO_CODE = 'No code block was found. Write "Thought:" and then one ```python block.'
NO_ANSWER = 'No line "Answer: <answer>" was found.'
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}
"""What vLLM, and servers that follow it, take for: go on with the final message."""

_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:\n?[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE)

_TEMPLATES: dict[str, Any] = {
    "system_prompt": "{{ custom_instructions }}",
    "planning": {"initial_plan": "", "update_plan_pre_messages": "", "update_plan_post_messages": ""},
    "managed_agent": {"task": "", "report": ""},
    "final_answer": {"pre_messages": "", "post_messages": ""},
}


class RolloutTimeout(Exception):
    """The rollout's time is up."""


class Parsed(NamedTuple):
    """An action, as parsed."""

    thought: str
    code: str | None
    output: str
    """The text that stands in the conversation."""
    repairs: tuple[str, ...]


def parse_action(text: str) -> Parsed:
    """Find the thought and the one code block of a step.

    What is mended is named: "closed_fence" (the block had no end), "dropped_tail" (text after the
    first block). Without a block ``code`` is None.
    """
    text = text.strip()
    block = _BLOCK.search(text)
    if block is None:
        return Parsed(_thought(text), None, text, ())
    code = block.group(1).strip("\n")
    repairs = []
    output = text[: block.end()]
    if not output.rstrip().endswith(prompts.FENCE_CLOSE) or block.end(1) == len(text):
        output = f"{output.rstrip()}\n{prompts.FENCE_CLOSE}"
        repairs.append("closed_fence")
    if text[block.end() :].strip():
        repairs.append("dropped_tail")
    return Parsed(_thought(text[: block.start()]), code, output, tuple(repairs))


def _thought(text: str) -> str:
    return re.sub(r"^\s*Thought:\s*", "", text).strip()


class StepAgent(CodeAgent):
    """A ``CodeAgent`` that keeps a :class:`agentkd.trajectory.Step` of every step.

    Use :func:`build_agent` to make one.

    Attributes:
        records: the steps of the current run.
        kind: "agent" acts in code; "cot" answers at once, by chain of thought.
        deadline: ``time.monotonic()`` at which the run ends, or None.
        first_thought: what the first step of an agent begins with, or None.
    """

    def __init__(
        self,
        *,
        kind: Literal["agent", "cot"],
        force_answer: bool,
        tools: list[Tool],
        model: Model,
        **options: Any,
    ) -> None:
        self.kind = kind
        self.force_answer = force_answer
        self.records: list[Step] = []
        self.deadline: float | None = None
        self.first_thought: FirstThought | None = None
        super().__init__(tools=tools, model=model, **options)

    @property
    def sandbox(self) -> Sandbox:
        """The session that runs the code."""
        return self.python_executor  # type: ignore[no-any-return]

    def _messages(self) -> list[ChatMessage]:
        turns = [(step.output, step.observation) for step in self.records]
        chat = prompts.chat_messages(self.system_prompt, self.task, turns)
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
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise RolloutTimeout
        messages, options = self._request()
        memory_step.model_input_messages = messages
        began = time.monotonic()
        try:
            answer = self.model.generate(messages, stop_sequences=list(STOP_SEQUENCES), **options)
        except Exception as exc:
            raise provider_error(exc) from exc
        if not isinstance(answer.content, str):
            raise ProviderError("The endpoint answered without text.")
        memory_step.model_output_message = answer
        memory_step.token_usage = answer.token_usage
        step = self._new_step(answer, time.monotonic() - began)
        if self.kind == "cot":
            yield self._answer(memory_step, step)
        else:
            yield from self._act(memory_step, step)

    def _new_step(self, answer: ChatMessage, seconds: float) -> Step:
        raw = valid_text(str(answer.content))
        choice, response = _raw_choice(answer)
        used = answer.token_usage
        return Step(
            number=len(self.records) + 1,
            actor=str(getattr(self.model, "model_id", None) or type(self.model).__name__),
            raw=raw,
            output=raw.strip(),
            first_thought=self._given,
            usage=Usage(input_tokens=used.input_tokens, output_tokens=used.output_tokens)
            if used
            else Usage(),
            finish_reason=getattr(choice, "finish_reason", None),
            prompt_token_ids=_ids(response, "prompt_token_ids"),
            output_token_ids=_ids(choice, "token_ids"),
            logprobs=_logprobs(choice),
            model_seconds=seconds,
        )

    def _answer(self, memory_step: ActionStep, step: Step) -> ActionOutput:
        """Take a chain of thought for what it is."""
        found = prompts.answer_from_cot(step.raw)
        memory_step.model_output = step.output
        failure = None if found is not None else Failure(kind="parse", message=NO_ANSWER)
        self.records.append(
            step.model_copy(
                update={"thought": step.output, "is_final": found is not None, "failure": failure}
            )
        )
        if failure is not None:
            raise AgentParsingError(NO_ANSWER, self.logger)
        memory_step.action_output = found
        return ActionOutput(output=found, is_final_answer=True)

    def _act(self, memory_step: ActionStep, step: Step) -> Generator[ToolCall | ActionOutput]:
        """Parse the action, run it, and record what came of it."""
        parsed = parse_action(_whole(step))
        memory_step.model_output = parsed.output
        step = step.model_copy(
            update={
                "thought": parsed.thought,
                "code": parsed.code,
                "output": parsed.output,
                "repairs": parsed.repairs,
            }
        )
        if parsed.code is None:
            self._fail(memory_step, step, "parse", NO_CODE, "")
            raise AgentParsingError(NO_CODE, self.logger)
        memory_step.code_action = parsed.code
        call = ToolCall(name="python_interpreter", arguments=parsed.code, id=f"call_{step.number}")
        memory_step.tool_calls = [call]
        yield call
        began = time.monotonic()
        try:
            result = self.sandbox(parsed.code)
        except CodeFailure as exc:
            step = self._ran(step, began)
            self._fail(
                memory_step, step, "timeout" if exc.timed_out else "execution", exc.message, exc.printed
            )
            raise AgentExecutionError(exc.message, self.logger) from exc
        step = self._ran(step, began)
        final = result.is_final_answer
        shown = None if final else prompts.observation_text(result.logs, result.output)
        memory_step.observations = shown
        memory_step.action_output = result.output
        self.records.append(step.model_copy(update={"observation": shown, "is_final": final}))
        yield ActionOutput(output=result.output, is_final_answer=final)

    def _ran(self, step: Step, began: float) -> Step:
        return step.model_copy(
            update={"code_seconds": time.monotonic() - began, "tool_uses": self.sandbox.take_tool_uses()}
        )

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
        self.records.append(step.model_copy(update={"observation": shown, "failure": failure}))

    def provide_final_answer(self, task: str) -> ChatMessage:
        """A run that reached its step limit ends as such; a last call is made only when asked for."""
        if not self.force_answer:
            return ChatMessage(role=MessageRole.ASSISTANT, content=None)
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


def _whole(step: Step) -> str:
    """The text of a step, what it was given included."""
    given = step.first_thought
    if given is None:
        return step.raw
    return given.prefix + step.raw if given.via == "prefill" else prompts.joined(given.prefix, step.raw)


def _raw_choice(answer: ChatMessage) -> tuple[Any, Any]:
    choices = getattr(answer.raw, "choices", None)
    return (choices[0] if choices else None), answer.raw


def _ids(record: Any, name: str) -> tuple[int, ...] | None:
    ids = getattr(record, name, None)
    return tuple(ids) if ids else None


def _logprobs(choice: Any) -> tuple[float, ...] | None:
    content = getattr(getattr(choice, "logprobs", None), "content", None)
    return tuple(float(token.logprob) for token in content) if content else None


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
        verbose: print the run as smolagents does.

    Raises:
        ConfigError: an unknown sandbox.
        SandboxError: the sandbox is not available here; `agentkd doctor` says why.
    """
    from smolagents.local_python_executor import BASE_BUILTIN_MODULES

    chosen = tuple(tools) if kind == "agent" else ()
    template = prompt or (prompts.TEACHER if kind == "agent" else prompts.COT_TEACHER)
    modules = sorted({*BASE_BUILTIN_MODULES, *imports})
    if kind == "cot":
        sandbox = "local"  # never used, and then it costs nothing
    if sandbox is None or isinstance(sandbox, str):
        sandbox = open_sandbox(sandbox, imports=imports, timeout=action_timeout)
    return StepAgent(
        kind=kind,
        force_answer=force_answer,
        tools=list(chosen),
        model=model,
        prompt_templates=_TEMPLATES,
        instructions=prompts.system_prompt(template, chosen, modules),
        executor=sandbox,
        additional_authorized_imports=list(imports),
        max_steps=max_steps if kind == "agent" else 1,
        code_block_tags=(prompts.FENCE_OPEN, prompts.FENCE_CLOSE),
        verbosity_level=LogLevel.INFO if verbose else LogLevel.OFF,
    )
