"""Hugging Face datasets: a folder of ``datasets`` or a Parquet file, one trajectory a row.

The columns are those of :mod:`agentkd.exchange.chat`, which trainers read, and flat ones to select
by. What has no column stands in ``agentkd``, a JSON string.
"""

from __future__ import annotations

from dataclasses import replace

from agentkd.exchange.chat import decode_chat, encode_chat
from agentkd.exchange.draft import Draft, Format, Row
from agentkd.trajectory import Trajectory

__all__ = ["DATASETS"]

_COLUMNS = ("task_id", "family", "question", "correct", "stop_reason", "kind", "steps")
"""To select by; the reader takes only the first two from them."""


def _encode(trajectory: Trajectory) -> Row:
    return {
        **encode_chat(trajectory),
        "task_id": trajectory.task.id,
        "family": trajectory.task.family,
        "question": trajectory.task.question,
        "correct": trajectory.correct,
        "stop_reason": trajectory.stop_reason.value,
        "kind": trajectory.kind,
        "steps": len(trajectory.steps),
    }


def _decode(row: Row) -> Draft:
    return replace(decode_chat(row), task_id=row.get("task_id"), family=row.get("family") or "custom")


DATASETS = Format(
    name="datasets",
    about="Hugging Face datasets (save_to_disk folder, Parquet)",
    encode=_encode,
    decode=_decode,
    keys=frozenset(
        ["id", "messages", "conversations", "system", "tools", "answer", "prediction", "model", *_COLUMNS]
    ),
    containers=("dataset", ".parquet"),
)
