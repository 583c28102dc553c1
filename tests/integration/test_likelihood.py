"""A student as judge of texts: its likelihoods, and the transforms that use them, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentkd.cli import app
from agentkd.errors import ConfigError
from agentkd.record import read_trajectories, write_jsonl
from tests.integration.test_distill import base
from tests.unit.test_distill import step, trajectory

torch = pytest.importorskip("torch")

from agentkd.engine.likelihood import Likelihood  # noqa: E402
from agentkd.engine.render import render_prompt, render_training  # noqa: E402

__all__ = ["base"]

CHAT = [{"role": "system", "content": "Be."}, {"role": "user", "content": "What?"}]


@pytest.fixture(scope="module")
def scorer(base: Path) -> Likelihood:
    return Likelihood.load(str(base))


def plain_nll(scorer: Likelihood, ids: list[int], places: list[int]) -> float:
    """By the model's own loss, with labels."""
    labels = [token if place in places else -100 for place, token in enumerate(ids)]
    with torch.no_grad():
        return float(scorer.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)


def test_it_is_the_models_own_loss_on_what_the_assistant_says(scorer: Likelihood) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "One."}, {"role": "user", "content": "And?"}]
    chat.append({"role": "assistant", "content": "Two, three."})
    rendered = render_training(scorer.tokenizer, chat)
    places = [place for place, learnt in enumerate(rendered.mask) if learnt]
    assert scorer.nll(chat) == pytest.approx(plain_nll(scorer, rendered.ids, places), abs=1e-5)


def test_a_continuation_is_scored_behind_its_beginning(scorer: Likelihood) -> None:
    prompt = render_prompt(scorer.tokenizer, CHAT)
    begun, rest = (scorer.tokenizer(it, add_special_tokens=False)["input_ids"] for it in ("One.\n", "Two."))
    places = list(range(len(prompt) + len(begun), len(prompt) + len(begun) + len(rest)))
    expected = plain_nll(scorer, [*prompt, *begun, *rest], places)
    assert scorer.continuation_nll(CHAT, "One.\n", "Two.") == pytest.approx(expected, abs=1e-5)


def test_what_does_not_fit_has_no_likelihood(scorer: Likelihood) -> None:
    assert scorer.nll([*CHAT, {"role": "assistant", "content": "word " * 3000}]) is None


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["transform", *arguments], catch_exceptions=False)


def test_the_likeliest_of_several_is_kept_from_the_command_line(
    base: Path, tmp_path: Path, scorer: Likelihood
) -> None:
    items = [
        trajectory("a", step(1, f"final_answer({text})")).model_copy(update={"id": f"a#{n}"})
        for n, text in enumerate(("1", "'quite another'", "x ** 7 - 1"))
    ]
    write_jsonl(tmp_path / "kept.jsonl", items)
    run = [
        "student-friendly",
        str(tmp_path / "kept.jsonl"),
        "--student",
        str(base),
        "--out",
        str(tmp_path / "out"),
    ]
    done = invoke(*run, "--json")
    assert json.loads(done.stdout)["after"] == 1
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    values = [it["value"] for it in answers]
    (kept,) = read_trajectories(tmp_path / "out" / "kept.jsonl")
    assert kept.id == f"a#{values.index(min(values))}"
    assert f"{min(values):.3f} nats" in kept.changes[0].note
    assert "changed or chosen" in invoke(*run).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "no transform"),
        (["temperature", "--set", "seed"], "name=value"),
        (["shorten", "--api-base", "http://127.0.0.1:1/v1"], "No model"),
        (["shorten", "--set", "easy=0"], "easy"),
        (["student-friendly", "--student", "/nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_told(tmp_path: Path, arguments: list[str], said: str) -> None:
    write_jsonl(tmp_path / "kept.jsonl", [trajectory("a", step(1, "final_answer(1)"))])
    name, *rest = arguments
    with pytest.raises(ConfigError, match=said):
        invoke(name, str(tmp_path / "kept.jsonl"), "--out", str(tmp_path / "out"), *rest)
