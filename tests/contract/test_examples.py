"""Every example runs, and what the README shows is true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from agentkd.cli import app

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- runnable -->\n)?^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[tuple[bool, str]]:
    found = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return [(bool(mark), text) for mark, name, text in found if name == language]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("name", ["agent.py", "own_tool.py"])
def test_example_scripts_run(name: str, tmp_path: Path) -> None:
    assert run(str(ROOT / "examples" / name), cwd=tmp_path).stdout


def test_every_example_is_tested_and_listed() -> None:
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "examples").glob("*.*")} - {"README.md"}
    assert names == {"agent.py", "own_tool.py", "mcp_server.py", "recipe.toml"}
    assert all(name in listed for name in names)


def test_runnable_python_of_the_readme_runs(tmp_path: Path) -> None:
    runnable = [text for mark, text in blocks("python") if mark]
    assert runnable
    for text in runnable:
        (tmp_path / "block.py").write_text(text, encoding="utf-8")
        assert "1802 True final_answer" in run("block.py", cwd=tmp_path).stdout


def test_other_python_of_the_readme_uses_names_that_exist() -> None:
    for _, text in blocks("python"):
        code = compile(text, "README.md", "exec")
        imports = "\n".join(line for line in text.splitlines() if line.startswith(("import ", "from ")))
        exec(compile(imports, "README.md", "exec"), {})
        assert code


def command_lines() -> list[str]:
    text = "\n".join(text for _, text in blocks("bash")).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("agentkd ")]


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_of_the_readme_parse(line: str) -> None:
    command = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    context = command.make_context("agentkd", list(words))
    child = command.get_command(context, words[0])  # type: ignore[attr-defined]
    assert child is not None
    child.make_context(words[0], words[1:])  # raises for an option that does not exist


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= targets
