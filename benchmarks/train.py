"""Training speed and memory beside TRL's SFTTrainer with peft: same base, data, masks and LoRA settings.

Three ways take turns, each in a process of its own: ours, TRL at its defaults, and TRL packed (bf16, without
gradient checkpointing). Before that the masks are compared token by token; TRL cannot leave a failed step out
of the loss, so for the comparison ours learns them, too. ``--quick`` makes one run of few steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import ExampleSet, build_examples
from agentkd.engine.weights import load_model, load_tokenizer, resolve_model
from agentkd.prompt import trajectory_messages
from agentkd.record import provenance, read_trajectories
from agentkd.trajectory import Trajectory

WAYS = ("agentkd", "trl", "trl-packed")
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with the generation marks that TRL needs to tell assistant tokens."""


def load(options: argparse.Namespace) -> tuple[list[Trajectory], ExampleSet, DistillConfig]:
    config = DistillConfig(
        steps=options.steps, learning_rate=2e-4, failed_steps="target", threads=options.threads
    )
    found = [it for it in read_trajectories(options.data) if it.kind == "agent"][: options.n]
    return found, build_examples(found, load_tokenizer(resolve_model(config.base)), config), config


def ours(examples: ExampleSet, config: DistillConfig, out: Path) -> dict[str, float]:
    from agentkd.distill.loop import run_training

    done = run_training(resolve_model(config.base), examples.examples, config, out, {})
    return {"tokens": done["tokens"], "seconds": done["seconds"]}


def trainer(
    items: list[Trajectory], examples: ExampleSet, config: DistillConfig, out: Path, packed: bool
) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(config.threads or torch.get_num_threads())
    base = resolve_model(config.base)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = MARKED
    rows = [{"messages": trajectory_messages(it, examples.system_prompt)} for it in items]
    better = {"packing": True, "bf16": True, "gradient_checkpointing": False} if packed else {}
    return SFTTrainer(
        load_model(base, torch.float32),
        args=SFTConfig(
            output_dir=str(out),
            use_cpu=True,
            max_steps=config.steps or 1,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            max_length=config.max_length,
            assistant_only_loss=True,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **better,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear"),
    )


def theirs(
    items: list[Trajectory], examples: ExampleSet, config: DistillConfig, out: Path, packed: bool
) -> dict[str, float]:
    made = trainer(items, examples, config, out, packed)
    done = made.train()
    tokens = max(row["num_tokens"] for row in made.state.log_history if "num_tokens" in row)
    return {"tokens": tokens, "seconds": done.metrics["train_runtime"]}


def compare_masks(
    items: list[Trajectory], examples: ExampleSet, config: DistillConfig, out: Path
) -> tuple[int, int]:
    """How many of our examples have TRL's ids and mask, of how many."""
    rows = trainer(items, examples, config, out, packed=False).train_dataset
    equal = 0
    for mine, row in zip(examples.examples, rows, strict=True):
        size = min(len(mine.ids), len(row["input_ids"]))
        same_ids = mine.ids[:size] == row["input_ids"][:size]
        # Ours ends behind the last learnt turn; what TRL has beyond must not be learnt.
        mask = [label != -100 for label in row["labels"]]
        equal += same_ids and mine.mask[:size] == mask[:size] and not any(mask[size:])
    return equal, len(examples.examples)


def one(options: argparse.Namespace) -> None:
    items, examples, config = load(options)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if options.way == "masks":
            equal, of = compare_masks(items, examples, config, out)
            print(json.dumps({"equal": equal, "of": of}))
            return
        if options.way == "agentkd":
            found = ours(examples, config, out)
        else:
            found = theirs(items, examples, config, out, options.way == "trl-packed")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**found, "peak_mib": round(peak)}))


def run(way: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--data", str(options.data)]
    command += ["--steps", str(options.steps), "--n", str(options.n), "--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of three steps")
    parser.add_argument("--data", type=Path, default=Path("trajectories/almanac/trajectories.jsonl"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=[*WAYS, "masks"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        one(options)
        return
    if options.quick:
        options.steps, options.runs, options.n = 3, 1, 24
    masks = run("masks", options)
    rows = [(way, run(way, options)) for _ in range(options.runs) for way in WAYS]
    speed = {
        way: statistics.median(r["tokens"] / r["seconds"] for name, r in rows if name == way) for way in WAYS
    }
    memory = {way: statistics.median(r["peak_mib"] for name, r in rows if name == way) for way in WAYS}
    print(f"masks equal to TRL's: {masks['equal']} of {masks['of']} examples")
    print(f"{'way':<12}{'tokens/s':>10}{'peak MiB':>10}")
    for way in WAYS:
        print(f"{way:<12}{speed[way]:>10.1f}{memory[way]:>10.0f}")
    metrics = {
        "tokens_ratio_vs_trl": round(speed["agentkd"] / speed["trl"], 3),
        "tokens_ratio_vs_trl_packed": round(speed["agentkd"] / speed["trl-packed"], 3),
        "memory_ratio_vs_trl": round(memory["agentkd"] / memory["trl"], 3),
        "masks_equal": masks["equal"] / masks["of"],
    }
    line = {"name": "train", "metrics": metrics, "n": masks["of"], "runs": options.runs}
    print(json.dumps({**line, "commit": provenance()["commit"]}))


if __name__ == "__main__":
    main()
