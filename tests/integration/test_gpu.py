"""The CUDA paths of training and generating; run by ``make gpu-check`` on a machine with a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KEPT = Path(__file__).resolve().parents[2] / "trajectories" / "arithmetic" / "trajectories.jsonl"


def test_a_student_is_trained_and_answers_on_the_gpu(tmp_path: Path) -> None:
    from agentkd.distill import DistillConfig, distill
    from agentkd.filter import filter_run
    from agentkd.system import open_system

    filter_run(KEPT, tmp_path / "kept")
    student = distill(tmp_path / "kept" / "kept.jsonl", tmp_path / "student", DistillConfig(steps=5))
    assert student.training["n_examples"] > 50
    with open_system(str(tmp_path / "student"), max_tokens=32) as system:
        answer = system.model.generate([{"role": "user", "content": "What is 2 times 3?"}])
    assert answer.token_usage.output_tokens > 0
