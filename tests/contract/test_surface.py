"""What users rely on: the public names, a light import, and the command line's help."""

from __future__ import annotations

import functools
import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import agentkd
from agentkd.errors import AgentkdError

COMMANDS = [
    "index",
    "retriever",
    "collect",
    "merge",
    "export",
    "import",
    "export-student",
    "filter",
    "adapt",
    "transform",
    "distill",
    "evaluate",
    "compare",
    "score",
    "study",
    "serve",
    "view",
    "report",
    "quickstart",
    "run",
    "doctor",
]

HEAVY = "torch transformers peft smolagents openai numpy pandas datasets fastapi uvicorn bm25s reasoning_gym"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def test_the_public_names() -> None:
    assert sorted(agentkd.__all__) == [
        "BM25Retriever",
        "HTTPRetriever",
        "Index",
        "Passage",
        "Retriever",
        "Step",
        "StepAgent",
        "StopReason",
        "Student",
        "Task",
        "Taskset",
        "Trajectory",
        "__version__",
        "build_agent",
        "load_student",
        "load_tasks",
        "load_taskset",
        "load_tool",
        "mcp_tools",
        "openai_model",
        "read_trajectories",
        "run_rollouts",
        "score",
    ]
    for name in agentkd.__all__:
        assert getattr(agentkd, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        _ = agentkd.nothing


def test_import_pulls_in_nothing_heavy() -> None:
    code = f"import sys, agentkd; print([m for m in {HEAVY.split()!r} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def cpu(*arguments: str) -> float:
    """CPU seconds of a run: the clock on the wall measures what others do, too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert python(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def libraries() -> float:
    """CPU seconds that this machine takes now to import what a command line and its help are made of.

    They rise with what others compute, so they are measured right before what is held against them.
    """
    return cpu("-c", "import typer.rich_utils, rich.markdown, pydantic")


def quicker_than(times: float, *arguments: str, bare: tuple[str, ...] = ()) -> bool:
    """Whether one of five tries takes less than so many times what the libraries take."""
    for _ in range(5):
        own = cpu(*bare) if bare else 0.0
        limit = times * libraries()
        if cpu(*arguments) - own < limit:
            return True
    return False


def test_import_is_quick() -> None:
    assert quicker_than(0.5, "-c", "import agentkd", bare=("-c", "pass"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_quickly(command: str) -> None:
    run = [sys.executable, "-X", "importtime", "-m", "agentkd", command, "--help"]
    done = subprocess.run(
        run, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "120"}
    )
    assert done.returncode == 0
    assert "Example" in done.stdout
    assert f"agentkd {command}" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "agentkd.cli" in imported
    assert not imported & set(HEAVY.split())
    assert quicker_than(3, "-m", "agentkd", command, "--help")


def test_every_command_has_a_test_here() -> None:
    listed = python("-m", "agentkd", "--help").stdout
    for command in COMMANDS:
        assert command in listed


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["collect", "--tasks", "x.jsonl", "--out", "{tmp}"], 2, "No teacher"),
        (["collect", "--tasks", "gym:prodcuts", "--teacher", "expert", "--out", "{tmp}"], 2,
         "products"),
        (["collect", "--tasks", "nothing.jsonl", "--api-base", "http://127.0.0.1:9/v1", "--model", "m",
          "--out", "{tmp}"], 3, "nothing.jsonl"),
        (["collect", "--tasks", "gym:lcm", "--n", "2", "--api-base", "http://127.0.0.1:9/v1", "--model", "m",
          "--out", "{tmp}"], 4, "Cannot reach"),
        (["collect", "--tasks", "gym:lcm", "--n", "2", "--api-base", "http://127.0.0.1:9/v1", "--model", "m",
          "--sandbox", "moon", "--out", "{tmp}"], 2, "fork"),
        (["collect", "--tasks", "gym:lcm", "--n", "2", "--teacher", "expert", "--compare", "--out", "{tmp}"], 2,
         "--first-thought"),
        (["collect", "--tasks", "gym:lcm", "--n", "2", "--teacher", "expert", "--kind", "cot", "--first-thought",
          "--out", "{tmp}"], 2, "--kind agent"),
        (["filter", "{tmp}/nothing", "--out", "{tmp}"], 3, "no file"),
        (["filter", "{tmp}", "--out", "{tmp}", "--min-score", "7"], 2, "min-score"),
        (["distill", "{tmp}/kept.jsonl", "--out", "{tmp}/s"], 3, "kept.jsonl"),
        (["distill", "{tmp}/kept.jsonl", "--out", "{tmp}/s", "--set", "micro_token=1"], 2, "micro_tokens"),
        (["distill", "{tmp}/kept.jsonl", "--out", "{tmp}/s", "--set", "micro_tokens=0"], 2, "micro_tokens"),
        (["distill", "{tmp}/kept.jsonl", "--out", "{tmp}/s", "--set", "learning_rate=1"], 2, "--lr"),
        (["serve", "{tmp}"], 2, "student"),
        (["adapt", "{tmp}/nothing.jsonl", "--out", "{tmp}/a"], 3, "no file"),
        (["adapt", "{tmp}/nothing.jsonl", "--out", "{tmp}/a", "--tools", "hammer"], 2, "tools"),
        (["adapt", "{tmp}/nothing.jsonl", "--out", "{tmp}/a", "--samples", "5"], 2, "temperature"),
        (["adapt", "{tmp}/nothing.jsonl", "--out", "{tmp}/a", "--student", "{tmp}"], 2, "student"),
        (["adapt", "{tmp}/nothing.jsonl", "--out", "{tmp}/a", "--model", "m"], 2, "--api-base"),
        (["distill", "{tmp}/kept.jsonl", "--from", "{tmp}", "--out", "{tmp}/s"], 2, "student"),
        (["run", "{tmp}/r.toml", "--out", "{tmp}"], 2, "recipe"),
        (["view", "{tmp}/nothing"], 2, "There is no"),
        (["view", "{tmp}"], 3, "agentkd import"),
        (["view", "{tmp}", "--mask", "{tmp}/nothing"], 3, "no run"),
        (["report", "{tmp}", "--out", "{tmp}/r"], 3, "no evaluation"),
        (["report", "{tmp}/nothing", "--out", "{tmp}/r"], 2, "no folder"),
        (["report", "{tmp}", "--group", "x", "--out", "{tmp}/r"], 2, "--group"),
        (["nonsense"], 2, "nonsense"),
        (["index", "{tmp}/nothing", "--out", "{tmp}/i"], 2, "There is no"),
        (["index", "{tmp}", "--out", "{tmp}/i"], 3, "no passages"),
        (["index", "{tmp}"], 2, "--out"),
        (["index", "{tmp}", "--query", "x"], 2, "no index"),
        (["index", "{tmp}", "--out", "{tmp}/i", "--kind", "colour"], 2, "kind"),
        (["index", "{tmp}", "--out", "{tmp}/i", "--kind", "bm25", "--encoder", "minilm"], 2, "encoder"),
        (["retriever", "{tmp}"], 6, "agentkd index"),
        (["retriever", "{tmp}/nothing"], 2, "no corpus"),
        (["compare", "{tmp}", "{tmp}"], 3, "no file"),
        (["score", "{tmp}"], 3, "no file"),
        (["score", "{tmp}", "--against", "moon"], 2, "moon"),
        (["study", "mismatch", "{tmp}"], 3, "no file"),
        (["evaluate", "{tmp}", "--tasks", "set:nothing", "--out", "{tmp}/s"], 2, "nothing"),
        (["evaluate", "{tmp}", "--tasks", "gym:lcm", "--n", "2", "--out", "{tmp}/e"], 2, "kind"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_a_way_out(
    arguments: list[str], code: int, said: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = str(tmp_path_factory.mktemp("bad"))
    done = python("-m", "agentkd", *(part.replace("{tmp}", folder) for part in arguments))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "name", "paths"),
    [
        ("record", "load_tasks", 1),
        ("record", "read_trajectories", 1),
        ("recipe", "load_recipe", 1),
        ("retrieval.bm25", "BM25Retriever.from_jsonl", 1),
        ("filter", "filter_run", 2),
        ("distill", "distill", 2),
        ("exchange", "export_run", 2),
        ("evaluate", "compare_runs", 2),
        ("collect", "replay", 2),
    ],
)
def test_a_path_may_be_a_string(module: str, name: str, paths: int, tmp_path: Path) -> None:
    found = functools.reduce(getattr, name.split("."), import_module(f"agentkd.{module}"))
    more = {"export_run": ["atif"]}.get(name, [])
    with pytest.raises(AgentkdError, match="no"):
        found(*[str(tmp_path / f"missing-{number}") for number in range(paths)], *more)
