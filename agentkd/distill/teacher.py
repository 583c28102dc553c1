"""Teachers, whose logits a student learns from; here a local model with the student's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from agentkd.distill.batches import Pack
from agentkd.engine.weights import load_model, load_tokenizer
from agentkd.errors import ConfigError

__all__ = ["LocalTeacher", "Teacher"]


class Teacher(Protocol):
    """What knows how likely each token was."""

    def logits(self, pack: Pack) -> Tensor:
        """(rows, vocabulary), float32, in the order of ``pack.rows``, each row up to a constant."""


class LocalTeacher:
    """Frozen; gives the logits at the places that predict a target.

    Args:
        folder: of the model.
        tokenizer: the student's.
        device, dtype: where and in what it computes.

    Raises:
        ConfigError: its vocabulary is not the student's, so that logits cannot be compared.
    """

    def __init__(self, folder: Path, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> None:
        ours, theirs = tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
        if ours != theirs:
            differ = len(ours.items() ^ theirs.items())
            raise ConfigError(
                f"The vocabulary of the teacher in {folder} is not the student's ({differ} "
                f"entries of {len(ours)} and {len(theirs)} differ).",
                "Use a teacher of the same model family, or learn from its text alone (objective sft).",
            )
        self.model = load_model(folder, dtype).to(device).requires_grad_(False)
        self.device, self.vocabulary = device, len(ours)

    def logits(self, pack: Pack) -> Tensor:
        """Logits (rows, vocabulary), float32, in the order of ``pack.rows``; what it reads is not masked."""
        parts: list[Tensor] = []
        begin = pack.prefix
        for owner, length in enumerate(pack.lengths):
            ids = pack.ids[: pack.prefix] + pack.ids[begin : begin + length]
            mine = [
                row - begin + pack.prefix
                for row, who in zip(pack.rows, pack.owners, strict=True)
                if who == owner
            ]
            with torch.no_grad():
                rows = torch.tensor(mine, device=self.device)
                out = self.model(
                    input_ids=torch.tensor([ids], device=self.device), use_cache=False, logits_to_keep=rows
                )
            parts.append(out.logits[0].float())
            begin += length
        return torch.cat(parts)
