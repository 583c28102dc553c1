"""Studies, and evaluation with several seeded runs, on a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from agentkd.agent_config import AgentConfig
from agentkd.engine import Completion
from agentkd.engine.likelihood import Likelihood
from agentkd.engine.model import EngineModel
from agentkd.engine.torch_engine import TorchEngine
from agentkd.errors import ConfigError, DataError
from agentkd.evaluate import run_evaluation
from agentkd.model import openai_model
from agentkd.prompt import COT_STUDENT, action_text
from agentkd.record import write_jsonl
from agentkd.study.faithfulness import study_faithfulness
from agentkd.study.memorisation import study_memorisation
from agentkd.study.mismatch import study_mismatch
from agentkd.task import Task
from agentkd.testing import FakeEndpoint
from agentkd.trajectory import Score, Step, StopReason, Trajectory
from tests.integration.test_serve import tiny_model, tiny_tokenizer


def run(
    name: str, thought: str, code: str | None, answer: str, right: bool = True, **fields: Any
) -> Trajectory:
    output = thought if code is None else action_text(thought, code)
    step = Step(number=1, actor="m", raw=output, output=output, thought=thought, code=code, is_final=True)
    return Trajectory(
        **{
            "id": f"{name}#0",
            "task": Task(id=name, question="What is two plus two?", answer="4"),
            "kind": "cot" if code is None else "agent",
            "model": "m",
            "system_prompt": "Solve.",
            "steps": (step,),
            "answer": answer,
            "stop_reason": StopReason.FINAL_ANSWER,
            "score": Score(value=float(right), scorer="exact"),
            **fields,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(path)
    tiny_model(len(tokenizer)).save_pretrained(path)
    return path


class Reader:
    """An engine that acts on what it has just been shown: the number of words of the thought."""

    def __init__(self, tokenizer: Any, deaf: bool) -> None:
        self.tokenizer, self.deaf = tokenizer, deaf

    def generate(self, prompt_ids: Sequence[int], **options: Any) -> list[Completion]:
        turn = self.tokenizer.decode(list(prompt_ids)).rsplit("assistant", 1)[-1]
        words = 7 if self.deaf else len(turn.split())
        return [Completion((2,), f"\nfinal_answer({words})\n```", (0.0,), "stop")]

    def close(self) -> None: ...


def test_a_model_that_ignores_its_thoughts_is_told_from_one_that_does_not() -> None:
    runs = [
        run(f"t{i}", f"I need to add {i} and two, so I add them now", "final_answer(1)", "1")
        for i in range(6)
    ]
    tokenizer = tiny_tokenizer()
    deaf = study_faithfulness(Reader(tokenizer, True), tokenizer, runs)
    assert (deaf.n, deaf.skipped) == (6, 0)
    assert {share.share for share in deaf.unchanged.values()} == {1.0}
    with FakeEndpoint(lambda messages: "Two is added.") as endpoint:
        paraphraser = openai_model("fake", endpoint.url)
        hears = study_faithfulness(Reader(tokenizer, False), tokenizer, runs, paraphraser=paraphraser)
        assert len(endpoint.requests) == 6
    assert list(hears.unchanged) == [
        "first 0%",
        "first 25%",
        "first 50%",
        "first 75%",
        "filler",
        "paraphrase",
    ]
    assert hears.unchanged["first 50%"].share == 0.0
    assert hears.unchanged["filler"].share == 1.0  # as many words
    assert hears.unchanged["paraphrase"].share == 0.0
    with pytest.raises(DataError, match="No thought"):
        study_faithfulness(Reader(tokenizer, True), tokenizer, [run("t", "", "final_answer(1)", "1")])


def test_faithfulness_on_a_real_engine(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    with TorchEngine(tiny_model(len(tokenizer)), tokenizer, threads=1) as engine:
        with pytest.raises(DataError):  # a random model writes no action: that is said and not counted
            study_faithfulness(engine, tokenizer, [run("t", "I add.", "x = 1", "1")], max_tokens=4)
        cot = [run("t", "Two and two is four.\nAnswer: 4", None, "4")]
        found = study_faithfulness(engine, tokenizer, cot, max_tokens=8)
        assert found.kind == "cot"
        assert found.n + found.skipped == 1


def test_what_a_model_was_overfitted_on_is_recognised(folder: Path, tmp_path: Path) -> None:
    import torch

    model = Likelihood.load(str(folder))
    known = [
        run(f"k{i}", f"I add {i} to the number of apples", f"final_answer({i} + 2)", "1") for i in range(4)
    ]
    others = [
        run(f"o{i}", f"Where is the town {i * 7}?", f"print(search('town {i}'))", "1") for i in range(4)
    ]
    before = study_memorisation(model, known, others)
    assert before.extractable.count == 0
    ids = [model.tokenizer.apply_chat_template(_messages(item), return_dict=False) for item in known]
    model.model.requires_grad_(True).train()  # it is made for reading
    optimiser = torch.optim.AdamW(model.model.parameters(), lr=3e-3)
    for _ in range(60):
        for row in ids:
            batch = torch.tensor([row])
            model.model(input_ids=batch, labels=batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    model.model.eval()
    after = study_memorisation(model, known, others)
    assert after.perplexity < 1.5 < before.perplexity
    assert after.extractable.count >= 3
    assert after.by_perplexity is not None
    assert after.by_perplexity.auc == 1.0
    assert after.held_out_extractable is not None
    assert after.held_out_extractable.count == 0
    assert math.isfinite(after.zlib_ratio)


def _messages(item: Trajectory) -> list[dict[str, str]]:
    from agentkd.prompt import trajectory_messages

    return trajectory_messages(item)


def test_mismatch_and_support() -> None:
    runs = [
        run("a", "Two plus two is 4.", "final_answer(4)", "4"),
        run("b", "The total is 5.", "final_answer(4)", "4"),
        run("c", "I compute it.", "x = 2 + 2\nfinal_answer(x)", "4"),
        run("d", "I remember it.", "final_answer('Silver Harbor')", "Silver Harbor", right=False),
        run(
            "e",
            "So the town is Amber Falls, so that is the answer.",
            "final_answer('Amber Falls')",
            "amber falls",
        ),
        run("f", "x is 1.", "final_answer(2)", "2", stop_reason=StopReason.SANDBOX_ERROR),
    ]
    found = study_mismatch(runs)
    assert (found.mismatch.count, found.mismatch.n) == (1, 3)
    assert (found.unsupported.count, found.unsupported.n) == (2, 5)
    assert found.unsupported_when_wrong.count == 1
    assert found.examples == ("b#0", "d#0")


def test_the_command(tmp_path: Path, folder: Path) -> None:
    write_jsonl(tmp_path / "trajectories.jsonl", [run("a", "I add two and two now", "final_answer(4)", "4")])
    command = [
        sys.executable,
        "-m",
        "agentkd",
        "study",
        "memorisation",
        str(tmp_path),
        "--model",
        str(folder),
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 1


def test_several_runs_differ_by_their_seeds_and_can_be_repeated(tmp_path: Path) -> None:
    tasks = [Task(id=f"t{i}", question=f"What is two plus {i}?", answer="4") for i in range(2)]
    tokenizer = tiny_tokenizer()
    with TorchEngine(tiny_model(len(tokenizer)), tokenizer, threads=1) as engine:
        model = EngineModel(engine, tokenizer, "tiny", max_tokens=8, temperature=1.0)
        config = AgentConfig(model="tiny", kind="cot", prompt=COT_STUDENT, temperature=1.0, max_tokens=8)

        @contextmanager
        def system(config: AgentConfig = config) -> Iterator[tuple[AgentConfig, Any]]:
            yield config, model

        def texts(name: str, seed: int) -> list[str]:
            result, runs = run_evaluation(
                "tiny", tasks, system, tmp_path / name, samples=3, seed=seed, workers=2
            )
            assert result.measures is not None
            assert (result.measures.runs, result.overall.tasks) == (3, 2)
            return [item.steps[0].raw for item in runs]

        first = texts("a", 0)
        assert len(first) == 6
        assert first == texts("b", 0)
        assert first != texts("c", 10)
        assert len(set(first[:3])) > 1
        greedy = config.model_copy(update={"temperature": 0.0})
        with pytest.raises(ConfigError, match="temperature 0"):
            run_evaluation("tiny", tasks, lambda: system(greedy), tmp_path / "d", samples=2)
