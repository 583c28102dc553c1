"""How likely a model finds a text: the log-probability of given tokens, without sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from agentkd.engine.render import render_prompt, render_training
from agentkd.engine.weights import load_model, load_tokenizer, resolve_model

__all__ = ["Likelihood", "TokenScore"]


class TokenScore(NamedTuple):
    """One token, given all before it."""

    logprob: float
    """Nats."""
    top: bool
    """Whether it is the likeliest token, so that greedy decoding would write it."""


class Likelihood:
    """A frozen model, for reading only. Not thread-safe.

    Args:
        model: a causal language model.
        tokenizer: renders the conversations.
        system_prompt: a student's own, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, system_prompt: str | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        self.context: int = model.config.get_text_config().max_position_embeddings

    @classmethod
    def load(cls, path_or_name: str) -> Self:
        """A student folder (an adapter is merged), or a base model.

        Raises:
            ConfigError: no such model, or the adapter does not fit it.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if not (Path(path_or_name) / "student.json").is_file():
            folder = resolve_model(path_or_name)
            return cls(load_model(folder, torch.float32).to(device), load_tokenizer(folder))
        from agentkd.engine.student import load_student
        from agentkd.engine.torch_engine import load_student_model

        student = load_student(path_or_name)
        model = load_student_model(student).to(device)
        return cls(model, load_tokenizer(student.path), student.system_prompt)

    def nll(self, messages: Sequence[Mapping[str, str]]) -> float | None:
        """Mean negative log-likelihood (nats a token) of all assistant turns and the tokens that end them.

        Returns:
            None where the conversation does not fit the model's context.
        """
        rendered = render_training(self.tokenizer, messages)
        places = [place for place, learnt in enumerate(rendered.mask) if learnt]
        return self._mean(rendered.ids, places)

    def continuation_nll(self, messages: Sequence[Mapping[str, str]], begun: str, rest: str) -> float | None:
        """Mean negative log-likelihood (nats a token) of ``rest`` in a turn that begins with ``begun``."""
        prompt = render_prompt(self.tokenizer, messages)
        before = list(self.tokenizer(begun, add_special_tokens=False)["input_ids"])
        after = list(self.tokenizer(rest, add_special_tokens=False)["input_ids"])
        begin = len(prompt) + len(before)
        return self._mean([*prompt, *before, *after], list(range(begin, begin + len(after))))

    def scores(self, ids: Sequence[int]) -> list[TokenScore]:
        """A score for each token but the first; what is beyond the model's context is left out."""
        tokens = torch.tensor([list(ids)[: self.context]], device=self.model.device)
        with torch.inference_mode():
            logits = self.model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        wanted = tokens[0, 1:]
        logprobs = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        top = logits.argmax(-1) == wanted
        return [TokenScore(*pair) for pair in zip(logprobs.tolist(), top.tolist(), strict=True)]

    def _mean(self, ids: Sequence[int], places: Sequence[int]) -> float | None:
        if not places or len(ids) > self.context:
            return None
        device = self.model.device
        rows = torch.tensor([place - 1 for place in places], device=device)
        with torch.no_grad():
            out = self.model(
                input_ids=torch.tensor([list(ids)], device=device), use_cache=False, logits_to_keep=rows
            )
        targets = torch.tensor([ids[place] for place in places], device=device)
        return float(torch.nn.functional.cross_entropy(out.logits[0].float(), targets))
