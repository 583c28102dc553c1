"""The CUDA paths of training and generating; run by ``make gpu-check`` on a machine with a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # peft calls transformers by names that are on their way out.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

KEPT = Path(__file__).resolve().parents[2] / "trajectories" / "arithmetic" / "trajectories.jsonl"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"adapter": "dora"},
    "qlora": {"adapter": "qlora"},
    "full": {"adapter": "full", "learning_rate": 2e-5},
    "lora-checkpointing": {"gradient_checkpointing": True},
    "full-checkpointing": {"adapter": "full", "learning_rate": 2e-5, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_trained_and_answers_on_the_gpu(tmp_path: Path, kind: str) -> None:
    from agentkd.distill import DistillConfig, distill
    from agentkd.filter import filter_run
    from agentkd.record import read_json
    from agentkd.system import open_system

    if kind == "qlora" and find_spec("bitsandbytes") is None:
        pytest.skip('needs bitsandbytes: pip install "agentkd[quant]"')
    filter_run(KEPT, tmp_path / "kept")
    config = DistillConfig(steps=5, **KINDS[kind])
    student = distill(tmp_path / "kept" / "kept.jsonl", tmp_path / "student", config)
    assert student.training["n_examples"] > 50
    assert student.training["device"] == "cuda"
    assert student.weights == ("model" if config.adapter == "full" else "adapter")
    assert student.training["last_loss"] < 1.2 * student.training["first_loss"]
    assert read_json(tmp_path / "student" / "parity.json")["after"]["passed"]
    with open_system(str(tmp_path / "student"), max_tokens=32) as system:
        answer = system.model.generate([{"role": "user", "content": "What is 2 times 3?"}])
    assert answer.token_usage.output_tokens > 0
