"""A student as a smolagents model, in this process: the engine without HTTP in between."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from smolagents.models import ChatMessage, MessageRole, Model
from smolagents.monitoring import TokenUsage

from agentkd.engine.render import render_prompt

if TYPE_CHECKING:
    from agentkd.engine import Cancellation, Engine

__all__ = ["EngineModel"]


class EngineModel(Model):
    """Any :class:`agentkd.engine.Engine` as a model that agents can use.

    Prompts are rendered by the very function that training uses.

    Args:
        engine: generates.
        tokenizer: renders the conversation.
        model_id: the name that trajectories record.
        max_tokens: sampled tokens of one call, unless the call says otherwise.
        temperature: 0 is greedy.
        seed: of the samples of a call that names none; random by default.

    Attributes:
        on_token, cancellation: see :meth:`agentkd.engine.Engine.generate`.
    """

    on_token: Callable[[int, int], None] | None = None
    cancellation: Cancellation | None = None

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        model_id: str,
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(model_id=model_id)
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.seed = seed

    def seeded(self, seed: int) -> EngineModel:
        """The same model, whose samples are drawn by a seed."""
        model = EngineModel(
            self.engine,
            self.tokenizer,
            self.model_id,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=seed,
        )
        model.on_token, model.cancellation = self.on_token, self.cancellation
        return model

    def generate(
        self, messages: list[Any], stop_sequences: list[str] | None = None, **options: Any
    ) -> ChatMessage:
        """See ``smolagents.Model.generate``.

        Takes ``max_tokens``, ``temperature``, ``top_p``, ``n`` and ``seed``.
        """
        prompt = render_prompt(self.tokenizer, [_plain(message) for message in messages])
        completions = self.engine.generate(
            prompt,
            n=options.get("n", 1),
            max_new_tokens=options.get("max_tokens", self.max_tokens),
            temperature=options.get("temperature", self.temperature),
            top_p=options.get("top_p", 1.0),
            seed=options.get("seed", self.seed),
            stop=tuple(stop_sequences or ()),
            on_token=self.on_token,
            cancellation=self.cancellation,
        )
        choices = [
            SimpleNamespace(
                finish_reason=done.finish_reason,
                token_ids=list(done.token_ids),
                message=SimpleNamespace(content=done.text),
                logprobs=SimpleNamespace(content=[SimpleNamespace(logprob=value) for value in done.logprobs]),
            )
            for done in completions
        ]
        sampled = sum(len(done.token_ids) for done in completions)
        return ChatMessage(
            role=MessageRole.ASSISTANT,
            content=completions[0].text,
            raw=SimpleNamespace(choices=choices, prompt_token_ids=prompt),
            token_usage=TokenUsage(input_tokens=len(prompt), output_tokens=sampled),
        )


def _plain(message: Any) -> dict[str, str]:
    role = message["role"] if isinstance(message, dict) else message.role
    content = message["content"] if isinstance(message, dict) else message.content
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content or [])
    return {"role": getattr(role, "value", str(role)), "content": text}
