"""Imports go down only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import agentkd

ROOT = Path(agentkd.__file__).parent

FLOORS = {
    **dict.fromkeys(["errors", "task", "trajectory", "record", "calls", "secret", "plugin"], 0),
    **dict.fromkeys(["model", "endpoint", "engine", "tool", "sandbox", "retrieval", "taskset", "shard"], 1),
    **dict.fromkeys(["gate", "spend", "telemetry"], 1),
    **dict.fromkeys(
        ["prompt", "action", "draw", "agent", "agent_config", "sampler", "vote", "scorer", "rollout"], 2
    ),
    **dict.fromkeys(["tool_use", "router", "test_time"], 2),
    **dict.fromkeys(["recorder", "recorded", "rollouts", "running", "crew", "processes"], 2),
    **dict.fromkeys(["first_thought", "expert", "system"], 2),
    **dict.fromkeys(
        ["collect", "filter", "adapt", "distill", "serve", "evaluate", "report", "exchange", "merge"], 3
    ),
    **dict.fromkeys(["view", "study", "transform"], 3),
    **dict.fromkeys(["learnt", "run_report"], 4),
    **dict.fromkeys(["recipe", "pipeline", "display", "doctor", "first_thought_report", "cluster"], 4),
    **dict.fromkeys(["assess", "recipe_report"], 4),
    **dict.fromkeys(["cli", "commands"], 5),
}
BESIDE = {"testing", "__init__", "__main__"}
STAGE_PAIRS = {("report", "evaluate"), ("study", "evaluate")}
"""The report shows what evaluation counted, studies use its intervals; no other stage knows another."""
HEAVY = {"torch", "transformers", "peft", "accelerate", "trl", "vllm", "safetensors", "gguf"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in BESIDE and not parts[0].startswith("_tools"):
            found.append((parts[0], path))
    return found


def imported(path: Path) -> set[str]:
    """Every module name an import statement in the file mentions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "agentkd":
                names.update(f"agentkd.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize(("part", "path"), modules(), ids=lambda value: str(value).split("agentkd/")[-1])
def test_imports_go_down(part: str, path: Path) -> None:
    assert part in FLOORS, f"give {part} a floor"
    for name in imported(path):
        if not name.startswith("agentkd."):
            continue
        other = name.split(".")[1]
        assert other != "testing", f"{path} imports agentkd.testing"
        if other == part or other not in FLOORS:
            continue
        assert FLOORS[other] <= FLOORS[part], f"{path} (floor {FLOORS[part]}) imports {other}"
        if FLOORS[part] == 3 and FLOORS[other] == 3:
            assert (part, other) in STAGE_PAIRS, f"the stage {part} imports the stage {other}"


@pytest.mark.parametrize(("part", "path"), modules(), ids=lambda value: str(value).split("agentkd/")[-1])
def test_heavy_libraries_stay_in_their_place(part: str, path: Path) -> None:
    if part in {"engine", "distill", "serve"}:
        return
    assert not {name.split(".")[0] for name in imported(path)} & HEAVY
