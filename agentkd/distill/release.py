"""A student as others take it: merged weights, a GGUF file, a repository on the Hub."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from agentkd.distill.card import write_card
from agentkd.engine.student import Student, check_base, load_student
from agentkd.engine.weights import load_model, load_tokenizer, model_hash, resolve_model
from agentkd.errors import ConfigError, ProviderError, StorageError, boundary
from agentkd.record import read_json, write_text

__all__ = ["merge_student", "push_student", "write_gguf"]

CONVERTER = "convert_hf_to_gguf.py"
_ROTARY_BASE = 10_000.0
"""What llama.cpp takes where a file names none."""
_SERVED = (
    "README.md",
    "student.json",
    "manifest.json",
    "loss.jsonl",
    "test_time.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
)
"""What of a student folder is pushed, beside its weights."""


def merge_student(path: Path, out: Path, dtype: str | None = None) -> Path:
    """Write a student as one model in transformers' format, with its tokenizer and chat template.

    Args:
        path: student folder.
        out: folder to write; it must not exist, or be empty.
        dtype: of the weights: "bfloat16", "float16" or "float32"; by default that of the base model.

    Raises:
        ConfigError: no student, another base model, or ``out`` holds something.
        StorageError: no room.
    """
    student = load_student(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already.", "Choose another folder.")
    tokenizer = load_tokenizer(path)
    model = _merged(student, dtype)
    partial = out.with_name(f".{out.name}.partial")
    with boundary(StorageError, f"writing {out}", "Choose another folder."):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        _with_older_names(partial / "config.json")
        if out.is_dir():
            out.rmdir()
        partial.replace(out)
    return out


def _merged(student: Student, dtype: str | None) -> Any:
    import torch

    base = resolve_model(student.base)
    check_base(student, model_hash(base))
    stored = load_model(base)
    wanted = getattr(torch, dtype) if dtype else stored.dtype
    if student.weights == "model":
        return load_model(student.adapter, wanted)
    from agentkd.engine.torch_engine import merge_adapter

    # Merging adds small numbers to large ones, so it is done in fp32 and rounded once.
    return merge_adapter(stored.float(), student.adapter).to(wanted)


def _with_older_names(config: Path) -> None:
    """Say the rotary base under its name before transformers 5, too, which llama.cpp and vLLM may look for.

    A reader that finds no base takes 10,000 in silence, and the model says something else.
    """
    settings = read_json(config)
    rotary = settings.get("rope_parameters")
    if not isinstance(rotary, dict) or "rope_theta" not in rotary:
        return  # none, or another one for every kind of layer
    settings["rope_theta"] = rotary["rope_theta"]
    if rotary.get("rope_type", "default") != "default":
        settings["rope_scaling"] = {key: value for key, value in rotary.items() if key != "rope_theta"}
    write_text(config, json.dumps(settings, indent=2) + "\n")


def write_gguf(path: Path, out: Path, dtype: str = "auto") -> Path:
    """Write a student as a GGUF file, by llama.cpp's own converter.

    Args:
        path: student folder.
        out: the file.
        dtype: as the converter names it: "f32", "f16", "bf16", "q8_0" or "auto".

    Raises:
        ConfigError: the converter is not there, does not know this model, or has lost its rotary base.
    """
    converter = find_converter()
    if converter is None:
        raise ConfigError(
            f"llama.cpp's {CONVERTER} was not found.",
            "Put llama.cpp's folder into $LLAMA_CPP, or the converter on the PATH.",
        )
    partial = out.with_name(out.name + ".partial")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            merged = merge_student(path, Path(scratch) / "merged")
            out.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, str(converter), str(merged)]
            command += ["--outfile", str(partial), "--outtype", dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            base = float(read_json(merged / "config.json").get("rope_theta", _ROTARY_BASE))
        if done.returncode or not partial.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(f"{CONVERTER} failed: {last}", _converter_hint(done.stderr))
        _check_rotary_base(partial, base)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _check_rotary_base(path: Path, base: float) -> None:
    from gguf import GGUFReader

    with boundary(
        ConfigError, f"reading what {CONVERTER} has written", "Update llama.cpp, or take --merged."
    ):
        fields = GGUFReader(path).fields
    kept = next(
        (it.contents() for name, it in fields.items() if name.endswith(".rope.freq_base")), _ROTARY_BASE
    )
    if abs(kept - base) > 1e-4 * base:
        raise ConfigError(
            f"{CONVERTER} has lost the model's rotary base: {base:,.0f} became {kept:,.0f}.",
            "Update llama.cpp, or take --merged.",
        )


def _converter_hint(said: str) -> str:
    missing = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", said)
    if missing is None:
        return "Update llama.cpp, or take --merged."
    return (
        f"It needs the Python module {missing[1]}: install llama.cpp's requirements "
        f"({sys.executable} -m pip install -r requirements.txt), or take --merged."
    )


def find_converter() -> Path | None:
    """llama.cpp's converter: in ``$LLAMA_CPP``, or on the PATH."""
    home = os.environ.get("LLAMA_CPP")
    if home and (Path(home) / CONVERTER).is_file():
        return Path(home) / CONVERTER
    found = shutil.which(CONVERTER)
    return Path(found) if found else None


def push_student(path: Path, repo: str, *, private: bool = True) -> str:
    """Upload what serving a student needs, and its card; nothing else of agentkd ever uploads.

    ``parity.json`` stays here: it holds conversations of the training, word for word. So do its own later
    checks, checkpoints, and whatever else was put into the folder.

    Args:
        path: student folder.
        repo: "owner/name".
        private: whether a new repository is.

    Returns:
        The address.

    Raises:
        ConfigError: no student, or huggingface_hub is missing.
        ProviderError: the Hub refuses, or cannot be reached.
    """
    student = load_student(path)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError("huggingface_hub is not installed.", 'Install it: pip install "agentkd[train]"')
    from huggingface_hub import HfApi

    if not (path / "README.md").is_file():
        write_card(student)
    hint = "Sign in with: hf auth login; the repository is named owner/name."
    with boundary(ProviderError, f"pushing {path} to {repo}", hint):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        wanted = [*_SERVED, f"{student.weights}/*"]
        done = api.upload_folder(repo_id=repo, folder_path=path, allow_patterns=wanted)
    return str(done)
