"""What answers chat requests: a student on the embedded engine, or the offline expert."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from agentkd.engine import Cancellation
from agentkd.engine.rendered import CachedTokenizer
from agentkd.errors import (
    ConfigError,
    ContextOverflowError,
    DataError,
    ProviderError,
    RetrievalError,
    SandboxError,
)
from agentkd.serve.pieces import Pieces
from agentkd.serve.request import ChatRequest, EngineRefusal, RequestError

if TYPE_CHECKING:
    from agentkd.engine import Completion, Engine

__all__ = [
    "AGENT_SUFFIX",
    "ChatBackend",
    "ChatChoice",
    "ChatRequest",
    "ChatResult",
    "ExpertBackend",
    "Listener",
    "RequestError",
    "RoomCheck",
    "StudentBackend",
    "refuse_options",
    "refuse_twins",
    "status_of",
    "student_backend",
]

AGENT_SUFFIX = "-agent"
"""What the name of an agent model ends with."""
DEFAULT_LIMIT = 1024
"""Sampled tokens of a choice when the client sets no limit."""


@dataclass(frozen=True)
class ChatChoice:
    """One answer."""

    text: str
    finish_reason: Literal["stop", "length"]
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    """Nats, one for each of ``tokens``."""
    tokens: tuple[str, ...] | None = None
    """The text of each token."""
    reasoning: str | None = None
    """What stands before the answer: the steps of an agent, as text."""


@dataclass(frozen=True)
class ChatResult:
    """The answers to a request, and what they cost."""

    choices: tuple[ChatChoice, ...]
    prompt_tokens: int
    completion_tokens: int
    prompt_token_ids: tuple[int, ...] | None = None
    rollout: dict[str, Any] | None = None
    """How an agent came to it: the ``agentkd`` object of the response."""


class Listener(Protocol):
    """The other end of a request, as a backend sees it. Called from any thread."""

    def text(self, index: int, piece: str) -> None:
        """The text of choice ``index`` goes on with ``piece``."""

    def step(self, reasoning: str, event: dict[str, Any]) -> None:
        """An agent has got on: in words for any client, and in full."""

    def cancelled(self) -> bool:
        """True when nobody waits for the answer any more."""

    def when_cancelled(self, act: Callable[[], None]) -> None:
        """Call ``act``, which must be quick, as soon as that is so; at once if it is so already."""


def refuse_options(request: ChatRequest) -> None:
    """Refuse what only an agent model understands.

    Raises:
        RequestError: the request has an ``agentkd`` object.
    """
    if request.agentkd is not None:
        raise RequestError(
            "'agentkd' is for agent models (NAME-agent) only.", param="agentkd", code="unsupported_parameter"
        )


def refuse_twins(names: Sequence[str]) -> None:
    """Refuse models of one name: a request could mean either.

    Raises:
        ConfigError: names one.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"Two models are called {twice}.",
            f"Rename a student's folder; a student NAME that acts is also served as NAME{AGENT_SUFFIX}.",
        )


class ChatBackend(Protocol):
    """A model of the endpoint. ``complete`` is called from many threads at a time."""

    model_id: str
    label: str
    """What it is, in words, for the list of models."""

    def complete(self, request: ChatRequest, listener: Listener | None = None) -> ChatResult:
        """Answer a request.

        Args:
            request: what to answer.
            listener: may be told of text while it comes, and asked whether to go on.

        Raises:
            RequestError: this model cannot serve such a request.
            ContextOverflowError: the conversation is too long.
        """


class RoomCheck:
    """Refuses what cannot fit before it is tokenised, which takes a second for each megabyte.

    Args:
        engine: whose context counts, where it tells.
        tokenizer: no token of it stands for more characters than its longest one has.
    """

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        context: int | None = getattr(engine, "context", None)
        self.most = None if context is None else context * max(map(len, tokenizer.get_vocab()))

    def check(self, texts: Iterable[str]) -> None:
        """Look at the texts of a conversation.

        Raises:
            ContextOverflowError: they are too long, whatever they say.
        """
        if self.most is not None and sum(map(len, texts)) > self.most:
            raise ContextOverflowError(
                "The conversation is longer than the model's context.", "Shorten the conversation."
            )


class StudentBackend:
    """A model on an engine, asked with exactly the tokens it was trained on.

    Without a temperature in the request a single answer is greedy, and several are sampled at 1.

    Args:
        engine: generates; closed by :meth:`close`.
        tokenizer: with a chat template.
        model_id: the name in requests.
        label: what it is, in words.
    """

    def __init__(self, engine: Engine, tokenizer: Any, model_id: str, label: str = "agentkd") -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.words = CachedTokenizer(tokenizer)
        self.model_id, self.label = model_id, label
        self.room = RoomCheck(engine, tokenizer)

    def complete(self, request: ChatRequest, listener: Listener | None = None) -> ChatResult:
        """See :class:`ChatBackend`."""
        refuse_options(request)
        self.room.check(message.content for message in request.messages)
        prompt = self._prompt(request)
        follower = _Follower(self.tokenizer, request, listener) if listener is not None else None
        cancellation = Cancellation()
        if listener is not None:
            listener.when_cancelled(cancellation.cancel)
        temperature = request.temperature
        if temperature is None:
            temperature = 0.0 if request.n == 1 else 1.0
        completions = self.engine.generate(
            prompt,
            n=request.n,
            max_new_tokens=request.limit or DEFAULT_LIMIT,
            temperature=temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop=tuple(request.stop),
            on_token=follower.add if follower is not None else None,
            cancellation=cancellation,
        )
        return ChatResult(
            choices=tuple(self._choice(done, request) for done in completions),
            prompt_tokens=len(prompt),
            completion_tokens=sum(len(done.token_ids) for done in completions),
            prompt_token_ids=tuple(prompt),
        )

    def _prompt(self, request: ChatRequest) -> list[int]:
        from agentkd.engine.render import render_prompt

        try:
            return render_prompt(
                self.words,
                request.plain_messages(),
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
            )
        except DataError as exc:
            raise RequestError(str(exc), param="messages") from exc
        except ConfigError as exc:
            if not getattr(self.tokenizer, "chat_template", None):
                raise  # not the client's fault
            said = f"The model's chat template refuses these messages: {exc}"
            raise RequestError(said, param="messages", code="invalid_value") from exc

    def _choice(self, done: Completion, request: ChatRequest) -> ChatChoice:
        tokens = None
        if request.logprobs:
            tokens = tuple(self.tokenizer.decode([token]) for token in done.token_ids)
        return ChatChoice(done.text, done.finish_reason, done.token_ids, done.logprobs, tokens)

    def close(self) -> None:
        """End the engine."""
        self.engine.close()


class _Follower:
    """Turns the tokens of a request into pieces of text as they come."""

    def __init__(self, tokenizer: Any, request: ChatRequest, listener: Listener) -> None:
        self.listener, self.streams = listener, request.stream
        self.pieces = [Pieces(tokenizer, request.stop) for _ in range(request.n)]

    def add(self, index: int, token: int) -> None:
        """Take one token; called by the engine."""
        if self.listener.cancelled():
            raise ProviderError("The client is gone.")
        if self.streams and (piece := self.pieces[index].add(token)):
            self.listener.text(index, piece)


class ExpertBackend:
    """The offline expert behind the same contract.

    It is a program and has no tokens: counts are estimates, and where a client asks for token ids
    or log-probabilities the answer says ``null``. It goes on from a final message by its words.

    Args:
        expert: an :class:`agentkd.expert.Expert`.
    """

    def __init__(self, expert: Any) -> None:
        from agentkd.expert import EXPERT_LABEL, EXPERT_MODEL_ID

        self.expert = expert
        self.model_id, self.label = EXPERT_MODEL_ID, EXPERT_LABEL

    def complete(self, request: ChatRequest, listener: Listener | None = None) -> ChatResult:
        """See :class:`ChatBackend`."""
        refuse_options(request)
        messages = request.plain_messages()
        texts = self.expert.complete(
            messages,
            n=request.n,
            temperature=request.temperature if request.temperature is not None else float(request.n > 1),
            seed=request.seed,
            continue_final_message=request.continue_final_message,
        )
        cut = [_cut(text, request) for text in texts]
        return ChatResult(
            choices=tuple(choice for choice, _ in cut),
            prompt_tokens=sum(len(_pieces(message["content"])) + 4 for message in messages)
            - request.continue_final_message,  # a turn that is continued has no end
            completion_tokens=sum(count for _, count in cut),
        )

    def close(self) -> None:
        """Nothing to free."""


def _cut(text: str, request: ChatRequest) -> tuple[ChatChoice, int]:
    """Apply stop strings and the token limit to a finished text; also counts its tokens."""
    found = [at for stop in request.stop if stop and (at := text.find(stop)) >= 0]
    text = text[: min(found)] if found else text
    pieces = _pieces(text)
    limit = request.limit
    if limit is not None and len(pieces) > limit:
        return ChatChoice("".join(pieces[:limit]), "length"), limit
    return ChatChoice(text, "stop"), len(pieces) + 1


def _pieces(text: str) -> list[str]:
    """A text in pieces of about a token: short words, single digits and signs."""
    return re.findall(r"\s*(?:[^\W\d]{1,7}|\d|[^\w\s])|\s+$", text)


def student_backend(path: Path | str, *, max_batch: int = 32, threads: int | None = None) -> StudentBackend:
    """A backend for a student folder; close it when done.

    Args:
        path: what ``agentkd distill`` wrote.
        max_batch: samples decoded at the same time.
        threads: CPU threads.

    Raises:
        ConfigError: not a finished student folder, or its base model is another one.
    """
    from agentkd.engine.student import check_base, load_student
    from agentkd.engine.torch_engine import TorchEngine
    from agentkd.engine.weights import load_tokenizer, model_hash, resolve_model

    folder = Path(path)
    student = load_student(folder)
    base = resolve_model(student.base)
    check_base(student, model_hash(base))
    engine = TorchEngine.load(base, adapter=student.adapter, max_batch=max_batch, threads=threads)
    label = f"agentkd {student.kind} student of {student.base}"
    return StudentBackend(engine, load_tokenizer(folder), folder.resolve().name, label)


def status_of(exc: Exception) -> RequestError:
    """The HTTP error for whatever a backend raised."""
    if isinstance(exc, RequestError):
        return exc
    if isinstance(exc, ContextOverflowError):
        return RequestError(str(exc), param="messages", code="context_length_exceeded")
    if isinstance(exc, DataError):
        return RequestError(str(exc), param="messages")
    if isinstance(exc, EngineRefusal):
        return RequestError(str(exc), code="invalid_value")
    if isinstance(exc, ProviderError):
        return RequestError(str(exc), status=503, code="unavailable")
    if isinstance(exc, SandboxError):
        return RequestError(str(exc), status=503, code="sandbox_error")
    if isinstance(exc, RetrievalError):
        return RequestError(str(exc), status=503, code="retrieval_error")
    return RequestError(f"{type(exc).__name__}: {exc}", status=500, code="internal_error")
