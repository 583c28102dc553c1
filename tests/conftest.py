"""Shared by all tests: what a step looks like, and a guard against real model calls."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

_contract_with_vllm: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what was really asked of a vLLM."""
    if report.when == "call" and "vllm" in report.keywords and "tests/contract/" in report.nodeid:
        _contract_with_vllm.append(report.outcome)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """``-m vllm`` that has asked no vLLM anything has not passed."""
    wanted = session.config.option.markexpr == "vllm" and not session.config.option.collectonly
    if wanted and "passed" not in _contract_with_vllm and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\nNo vLLM was asked anything: name its interpreter in AGENTKD_VLLM_PYTHON (make test-vllm).")


@pytest.fixture(autouse=True)
def no_real_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test can reach a paid endpoint or a hub by accident."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def action(thought: str, code: str) -> str:
    """A well-formed step."""
    return f"Thought: {thought}\n```python\n{code}\n```"


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny student that has learnt the tasks of :mod:`tests.taught`."""
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    from tests.taught import teach
    from tests.unit.test_render import small_tokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        return teach(tmp_path_factory.mktemp("taught"), small_tokenizer())
