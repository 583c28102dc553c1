"""A tiny student that has really learnt a few tasks by heart: trained by the project's own ``distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentkd.prompt import action_text
from agentkd.record import write_jsonl
from agentkd.task import Task
from agentkd.trajectory import Step, StopReason, Trajectory

TAUGHT: dict[str, tuple[tuple[str, str | None], ...]] = {
    "What is 6 times 7?": (("print(6 * 7)", "Observation:\n42"), ("final_answer(42)", None)),
    "Say hello.": (("final_answer('hello')", None),),
    "Wait.": (("while True: pass", None),),
    "Look up x.": (("print(search('x'))", "Observation:\n[x] y"), ("final_answer('y')", None)),
    "Go on.": (("print('on')", "Observation:\non"), ("print('on')", "Observation:\non")),
}
"""Question -> the code of each step and what it prints."""
SEARCH = (
    '{"name": "search", "description": "d", "inputs": {"query": {"type": "string", "description": "q"}}, '
    '"output_type": "string"}'
)


def base_model(folder: Path, tokenizer: Any) -> None:
    """A random Llama of 0.3M parameters."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,  # 32 wide, the least that vLLM knows on a CPU
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,  # embeddings and head stay frozen: they must be able to say something
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trajectories() -> list[Trajectory]:
    """What the student is taught."""
    return [_trajectory(question, steps) for question, steps in TAUGHT.items()]


def _trajectory(question: str, steps: tuple[tuple[str, str | None], ...]) -> Trajectory:
    made = []
    for number, (code, observation) in enumerate(steps, 1):
        output = action_text(f"step {number}", code)
        made.append(Step(number=number, actor="m", raw=output, output=output, observation=observation))
    return Trajectory(
        id=f"{question}#0",
        task=Task(id=question, question=question),
        steps=tuple(made),
        tools=(SEARCH,),
        model="m",
        system_prompt="p",
        stop_reason=StopReason.FINAL_ANSWER,
    )


def teach(folder: Path, tokenizer: Any) -> Path:
    """Make the base model and the student; returns the student's folder."""
    from agentkd.distill import DistillConfig, distill

    base, kept, student = folder / "base", folder / "kept.jsonl", folder / "taught"
    base_model(base, tokenizer)
    write_jsonl(kept, trajectories())
    config = DistillConfig(
        base=str(base),
        steps=200,
        batch_size=4,
        learning_rate=8e-3,
        save_every=1000,
        threads=1,
        precision="fp32",
        replays=4,
    )
    distill(kept, student, config)
    return student
