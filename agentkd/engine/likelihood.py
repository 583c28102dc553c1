"""How likely a model finds a text that is there already: one forward pass, nothing is generated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agentkd.engine.student import load_student
from agentkd.engine.torch_engine import merge_adapter
from agentkd.engine.weights import load_model, load_tokenizer, resolve_model

__all__ = ["Likelihood", "TokenScore"]


class TokenScore(NamedTuple):
    """One token, given all before it."""

    logprob: float
    """Nats."""
    top: bool
    """Whether it is the likeliest token, so that greedy decoding would write it."""


class Likelihood:
    """A student or a base model, for reading only.

    Args:
        what: a student folder, "smollm2-135m", a Hub id or a model folder.

    Raises:
        ConfigError: no such model.
    """

    def __init__(self, what: str) -> None:
        folder = Path(what)
        if (folder / "student.json").is_file():
            student = load_student(folder)
            self.model: Any = merge_adapter(
                load_model(resolve_model(student.base), torch.float32), student.adapter
            )
            self.tokenizer = load_tokenizer(folder)
            self.system_prompt: str | None = student.system_prompt
        else:
            path = resolve_model(what)
            self.model, self.tokenizer = load_model(path, torch.float32), load_tokenizer(path)
            self.system_prompt = None
        self.context: int = self.model.config.get_text_config().max_position_embeddings

    def scores(self, ids: Sequence[int]) -> list[TokenScore]:
        """A score for each token but the first; what is beyond the model's context is left out."""
        tokens = torch.tensor([list(ids)[: self.context]], device=self.model.device)
        with torch.inference_mode():
            logits = self.model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        wanted = tokens[0, 1:]
        logprobs = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        top = logits.argmax(-1) == wanted
        return [TokenScore(*pair) for pair in zip(logprobs.tolist(), top.tolist(), strict=True)]
