"""``import agentkd`` in a clean environment with only the base dependencies, no extras."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import sys, time
began = time.perf_counter()
import agentkd
seconds = time.perf_counter() - began
assert seconds < 0.3, seconds
assert "torch" not in sys.modules
from agentkd import BM25Retriever, Passage, build_agent, load_tool, Task
from agentkd.rollout import rollout
from agentkd.testing import ScriptedModel
search = load_tool("search", retriever=BM25Retriever([Passage(id="1", title="Silver Harbor", text="A town.")]))
model = ScriptedModel(["Thought: look\\n```python\\nfinal_answer(search('Silver Harbor'))\\n```"])
agent = build_agent(model, [search])
print(rollout(agent, Task(id="1", question="What is Silver Harbor?")).answer)
agent.cleanup()
try:
    import torch
except ImportError:
    print("no torch")
"""


@pytest.mark.slow
def test_base_install_from_a_wheel(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    root = str(request.config.rootpath)
    wheel = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), root]
    subprocess.run([str(python), *wheel], check=True)
    (built,) = tmp_path.glob("agentkd-*.whl")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(built)], check=True)
    # -I and another folder: the checkout must not be what is imported.
    done = subprocess.run(
        [str(python), "-I", "-c", CHECK], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[Silver Harbor] A town.", "no torch"]
