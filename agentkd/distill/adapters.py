"""What is trained of a base model.

=======  ===================================================================================
lora     two small matrices beside each linear layer (2106.09685)
dora     the same, and the length of each of the layer's rows (2402.09353)
qlora    lora beside weights frozen in 4 bits (2305.14314); needs a CUDA device
full     every weight; the student folder then holds a whole model
=======  ===================================================================================
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkd.distill.config import DistillConfig
from agentkd.engine.weights import load_model
from agentkd.errors import ConfigError, TrainingError, boundary

if TYPE_CHECKING:
    import torch

__all__ = ["check_adapter", "check_shard", "load_trainable"]


def check_adapter(config: DistillConfig) -> None:
    """Refuse what this machine cannot train, before anything is loaded.

    Raises:
        ConfigError: qlora without a CUDA device or without bitsandbytes, or full behind an adapter.
    """
    if config.adapter == "full" and config.parent is not None:
        raise ConfigError(
            "Training every weight cannot begin with a student's adapter.",
            "Merge it (agentkd export-student PARENT --merged FOLDER) and give the folder as --base.",
        )
    if config.adapter != "qlora":
        return
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "The adapter qlora needs a CUDA device.", "Use --adapter lora, or a machine with a GPU."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("The adapter qlora needs bitsandbytes.", 'Install it: pip install "agentkd[quant]"')


def check_shard(config: DistillConfig, processes: int) -> None:
    """Refuse to share out what cannot be.

    Args:
        config: the settings.
        processes: how many train together.

    Raises:
        ConfigError: there is one process, or the weights are in 4 bits.
    """
    if not config.shard:
        return
    if processes < 2:
        raise ConfigError(
            "--shard shares the model out among several processes, and there is one.",
            "Add --gpus N, the number of GPUs, or leave --shard out.",
        )
    if config.adapter == "qlora":
        raise ConfigError(
            "Weights in 4 bits are not sharded.", "Use --adapter lora with --shard, or leave --shard out."
        )


def load_trainable(
    base: Path, config: DistillConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any]:
    """The base model, and the same with what is trained: one object when that is every weight.

    Args:
        base: folder of the base model.
        config: the settings.
        device: where it computes.
        dtype: of frozen weights; trained ones are float32.

    Raises:
        ConfigError: see :func:`check_adapter`.
        TrainingError: adapters cannot be added to this model.
    """
    import torch

    check_adapter(config)
    if config.adapter == "full":
        model = load_model(base, torch.float32).to(device)
        return model, model
    model = _in_four_bits(base, dtype) if config.adapter == "qlora" else load_model(base, dtype).to(device)
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_dora=config.adapter == "dora",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    with boundary(TrainingError, f"adding adapters to {config.base}"), warnings.catch_warnings():
        # peft still asks transformers by names that are on their way out.
        warnings.simplefilter("ignore", FutureWarning)
        trained = get_peft_model(model, lora)
    trained.peft_config["default"].base_model_name_or_path = config.base
    return model, trained


def _in_four_bits(base: Path, dtype: torch.dtype) -> Any:
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with boundary(ConfigError, f"loading {base} in 4 bits", "Use --adapter lora."):
        model = AutoModelForCausalLM.from_pretrained(
            base,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            ),
            dtype=dtype,
            device_map={"": 0},
            local_files_only=True,
        )
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
