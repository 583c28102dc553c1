"""Training speed and memory beside TRL's SFTTrainer with peft: same base, data, masks and LoRA settings.

Three ways take turns, each in a process of its own: ours, TRL at its defaults, and TRL packed, without
gradient checkpointing; what each was set to is printed. All are in bf16 where the hardware multiplies in it,
else in fp32, where TRL left to itself takes bf16 all the same and more than twice as long, and where a packed
batch at once does not fit 24 GB, so that TRL has a quarter of it at a time. Before that the masks are
compared token by token, and the first token of each kind of difference is shown with the text around it. TRL
makes its mask of the chat template and learns failed steps, so for the comparison ours learns them, too.
``--quick`` makes one run of few steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example, ExampleSet, build_examples
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


OURS = ("batch_size", "learning_rate", "warmup", "max_grad_norm", "max_length", "micro_tokens", "adapter")
OURS += ("lora_r", "lora_alpha", "lora_dropout", "gradient_checkpointing", "threads")
THEIRS = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type")
THEIRS += (
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "max_length",
    "packing",
    "packing_strategy",
)
THEIRS += ("padding_free", "bf16", "gradient_checkpointing", "assistant_only_loss", "loss_type")
"""Settings that are printed."""


def ours(examples: ExampleSet, config: DistillConfig, out: Path) -> dict[str, Any]:
    from agentkd.distill.loop import run_training

    done = run_training(resolve_model(config.base), examples.examples, config, out, {})
    settings = {name: getattr(config, name) for name in OURS}
    settings |= {name: done[name] for name in ("precision", "packed", "device", "trained_parameters")}
    settings |= {"lr_scheduler_type": "cosine", "optim": "adamw, fused", "weight_decay": 0.0}
    return {"tokens": done["tokens"], "seconds": done["seconds"], "settings": settings}


def trainer(
    items: list[Trajectory], examples: ExampleSet, config: DistillConfig, out: Path, packed: bool
) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from agentkd.distill.learner import compute_dtype

    torch.set_num_threads(config.threads or torch.get_num_threads())
    base = resolve_model(config.base)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = MARKED
    rows = [{"messages": trajectory_messages(it, examples.system_prompt)} for it in items]
    bf16 = compute_dtype(config.precision) == torch.bfloat16
    together = config.batch_size if bf16 or not packed else config.batch_size // 4
    better = {"packing": True, "gradient_checkpointing": False} if packed else {}
    return SFTTrainer(
        load_model(base, torch.float32),
        args=SFTConfig(
            output_dir=str(out),
            use_cpu=True,
            bf16=bf16,
            max_steps=config.steps or 1,
            per_device_train_batch_size=together,
            gradient_accumulation_steps=config.batch_size // together,
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
) -> dict[str, Any]:
    made = trainer(items, examples, config, out, packed)
    done = made.train()
    tokens = max(row["num_tokens"] for row in made.state.log_history if "num_tokens" in row)
    return {"tokens": tokens, "seconds": done.metrics["train_runtime"], "settings": settings_of(made)}


def settings_of(made: Any) -> dict[str, Any]:
    """What TRL made of the arguments: defaults differ between its versions."""
    import torch

    lora = made.model.peft_config["default"]
    settings = {name: getattr(made.args, name, "unknown") for name in THEIRS}
    settings |= {"lora_r": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout}
    weights = {str(it.dtype) for it in made.model.parameters() if not it.requires_grad}
    trained = [it for it in made.model.parameters() if it.requires_grad]
    return {
        **{name: str(value) for name, value in settings.items()},
        "weights": sorted(weights),
        "trained": sorted({str(it.dtype) for it in trained}),
        "trained_parameters": sum(it.numel() for it in trained),
        "attention": made.model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        **{name: metadata.version(name) for name in ("trl", "transformers", "peft", "torch")},
    }


def first_difference(mine: Example, ids: Sequence[int], mask: Sequence[bool]) -> tuple[int, str] | None:
    """Where an example first differs from TRL's ids and mask, and how; None where it does not.

    Ours ends behind the last learnt turn: what one has beyond the other counts only if it is learnt.
    """
    both = min(len(mine.ids), len(ids))
    for place in range(max(len(mine.ids), len(ids))):
        if place < both and mine.ids[place] != ids[place]:
            return place, "other token ids"
        we, they = place < len(mine.ids) and mine.mask[place], place < len(ids) and mask[place]
        if we != they:
            return place, "only our mask has it" if we else "only TRL's mask has it"
    return None


def compare_masks(
    items: list[Trajectory], examples: ExampleSet, config: DistillConfig, out: Path
) -> dict[str, Any]:
    """How many of our examples have TRL's ids and mask, of how many, and why the others have not.

    A cause is how they differ and at which token; it is shown by the first example that has it.
    """
    tokenizer = load_tokenizer(resolve_model(config.base))
    causes: dict[tuple[str, str], dict[str, Any]] = {}
    rows = trainer(items, examples, config, out, packed=False).train_dataset
    for mine, row in zip(examples.examples, rows, strict=True):
        ids = row["input_ids"]
        found = first_difference(mine, ids, [label != -100 for label in row["labels"]])
        if found is None:
            continue
        place, how = found
        text = mine.ids if place < len(mine.ids) else ids
        token = tokenizer.decode([text[place]])
        if how == "other token ids":
            token += f" | {tokenizer.decode([ids[place]])}"
        shown = {
            "how": how,
            "token": token,
            "before": tokenizer.decode(text[max(0, place - 12) : place]),
            "after": tokenizer.decode(text[place + 1 : place + 13]),
            "example": mine.id,
            "place": place,
            "examples": 0,
        }
        causes.setdefault((how, token), shown)["examples"] += 1
    unequal = sum(cause["examples"] for cause in causes.values())
    of = len(examples.examples)
    return {"equal": of - unequal, "of": of, "causes": list(causes.values())}


def print_masks(masks: dict[str, Any]) -> None:
    print(f"masks equal to TRL's: {masks['equal']} of {masks['of']} examples")
    for cause in masks["causes"]:
        where = f"first in {cause['example']}, token {cause['place']}"
        print(f"  {cause['examples']} differ: {cause['how']}, {where}:")
        print(f"    {cause['before']!r} >>{cause['token']!r}<< {cause['after']!r}")


def one(options: argparse.Namespace) -> None:
    items, examples, config = load(options)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if options.way == "masks":
            print(json.dumps(compare_masks(items, examples, config, out)))
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
    for way in WAYS:
        settings = next(r["settings"] for name, r in rows if name == way)
        print(f"{way}: " + ", ".join(f"{name}={value}" for name, value in sorted(settings.items())))
    print_masks(masks)
    print(f"{'way':<12}{'tokens/s':>10}{'peak MiB':>10}")
    for way in WAYS:
        print(f"{way:<12}{speed[way]:>10.1f}{memory[way]:>10.0f}")
    metrics = {
        "tokens_ratio_vs_trl": round(speed["agentkd"] / speed["trl"], 3),
        "tokens_ratio_vs_trl_packed": round(speed["agentkd"] / speed["trl-packed"], 3),
        "memory_ratio_vs_trl": round(memory["agentkd"] / memory["trl"], 3),
        "memory_ratio_vs_trl_packed": round(memory["agentkd"] / memory["trl-packed"], 3),
        "masks_equal": masks["equal"] / masks["of"],
    }
    line = {"name": "train", "metrics": metrics, "n": masks["of"], "runs": options.runs}
    print(json.dumps({**line, "commit": provenance()["commit"]}))


if __name__ == "__main__":
    main()
