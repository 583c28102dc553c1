"""Training on from a student: its adapter is where the next one begins, and is named as its parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentkd.distill.config import DistillConfig
from agentkd.engine.student import Student, check_base, load_student
from agentkd.errors import ConfigError, TrainingError, boundary
from agentkd.record import file_hash, read_json

__all__ = ["adapter_settings", "check_parent", "data_hash", "take_over"]

WEIGHTS = "adapter_model.safetensors"


def adapter_settings(student: Path) -> dict[str, Any]:
    """What of a student's settings the next training has to share with it: base, kind, adapter, rank, scale.

    Raises:
        ConfigError: not a finished student folder, or one without an adapter.
    """
    parent = load_student(student)
    adapter = _adapter_config(parent)
    return {
        "base": parent.base,
        "kind": parent.kind,
        "adapter": "dora" if adapter.get("use_dora") else "lora",
        "lora_r": adapter["r"],
        "lora_alpha": adapter["lora_alpha"],
    }


def check_parent(config: DistillConfig, base_hash: str) -> dict[str, Any] | None:
    """Refuse a parent that cannot be trained on.

    Args:
        config: the settings.
        base_hash: of the base model at hand.

    Returns:
        What the student's record says of its parent; None when there is none.

    Raises:
        ConfigError: no student, of another base model or kind, or an adapter of another shape.
    """
    if config.parent is None:
        return None
    parent = load_student(config.parent)
    check_base(parent, base_hash)
    wanted = adapter_settings(parent.path)
    chosen = config.model_dump(include=set(wanted))
    if config.adapter in ("qlora", "full"):  # the first is lora; the second is refused by check_adapter
        chosen["adapter"] = "lora" if config.adapter == "qlora" else wanted["adapter"]
    for field in ("kind", "adapter", "lora_r", "lora_alpha"):
        if chosen[field] != wanted[field]:
            raise ConfigError(
                f"{parent.path} has {field} {wanted[field]!r}, not {chosen[field]!r}.",
                f"Training goes on with that adapter: set {field} to {wanted[field]!r}, or leave --kind, "
                "--adapter and --rank out.",
            )
    return _record(parent)


def data_hash(trajectories: Path, parent: str | None) -> str:
    """Hash of what a training is made of: the trajectories, and the parent's adapter, wherever it lies."""
    data = file_hash(trajectories)
    return data if parent is None else f"{data}\n{file_hash(_adapter(load_student(parent)) / WEIGHTS)}"


def _record(parent: Student) -> dict[str, Any]:
    """Which student it was: its folder, the hash of its adapter, and its own parent."""
    return {
        "student": str(parent.path),
        "adapter": file_hash(parent.adapter / WEIGHTS),
        "fingerprint": parent.training.get("fingerprint"),
        "parent": parent.training.get("parent"),
    }


def take_over(peft: Any, adapter: Path) -> None:
    """Give a peft model the weights of an adapter that lies on disk.

    Raises:
        ConfigError: the adapter does not fit the model.
        TrainingError: it cannot be read.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    path = adapter / WEIGHTS
    with boundary(TrainingError, f"reading {path}", "Distil the parent again."):
        weights = load_file(str(path))
    with boundary(ConfigError, f"taking over {path}", "Distil with the settings of the parent."):
        result = set_peft_model_state_dict(peft, weights)
    ours = [name for name in result.missing_keys if "lora_" in name]
    if ours or result.unexpected_keys:
        raise ConfigError(
            f"{path} does not fit: {len(ours)} weights missing, {len(result.unexpected_keys)} unknown.",
            "Distil with the settings of the parent.",
        )


def _adapter(parent: Student) -> Path:
    """Folder of the parent's adapter."""
    if parent.weights == "model":
        raise ConfigError(
            f"{parent.path} is a whole model, and has no adapter to go on with.",
            f"Write it with agentkd export-student {parent.path} --merged FOLDER, and train that as --base.",
        )
    return parent.adapter


def _adapter_config(parent: Student) -> dict[str, Any]:
    folder = _adapter(parent)
    content = read_json(folder / "adapter_config.json")
    if not isinstance(content, dict) or not {"r", "lora_alpha"} <= content.keys():
        raise ConfigError(f"{folder / 'adapter_config.json'} is not one of LoRA.", "Distil again.")
    return content
