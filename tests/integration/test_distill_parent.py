"""The second training: it begins with a student's adapter, and rows are learnt under the prompt they name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentkd.cli import app
from agentkd.distill import DistillConfig, distill
from agentkd.distill.examples import build_examples
from agentkd.engine.student import load_student
from agentkd.errors import ConfigError
from agentkd.prompt import DIRECT
from agentkd.record import file_hash, read_json, write_jsonl
from tests.integration.test_distill import base, finished, kept, losses, settings  # noqa: F401
from tests.unit.test_distill import CONFIG, step, trajectory
from tests.unit.test_render import small_tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows as ``agentkd adapt`` writes them: under the prompt without tools, and under the student's own."""
    path = tmp_path_factory.mktemp("direct") / "knowledge.jsonl"
    answers = [trajectory(f"task {number}", step(1, f"final_answer({number})")) for number in range(6)]
    rows = [
        item.model_copy(update={"system_prompt": DIRECT, "labels": {"prompt": "direct"}}) for item in answers
    ]
    rows += [item.model_copy(update={"id": f"{item.id}~allowed"}) for item in answers]
    write_jsonl(path, rows)
    return path


def test_a_row_is_learnt_under_the_prompt_it_names() -> None:
    tokenizer = small_tokenizer()
    plain = trajectory("a", step(1, "final_answer(1)"))
    labelled = plain.model_copy(update={"id": "b#0", "system_prompt": DIRECT, "labels": {"prompt": "direct"}})
    made = build_examples([plain, labelled], tokenizer, CONFIG)
    own, other = (tokenizer.decode(example.ids) for example in made.examples)
    assert made.system_prompt in own
    assert DIRECT not in own
    assert DIRECT in other
    assert made.system_prompt not in other


def test_the_second_training_begins_where_the_first_ended(
    base: Path,  # noqa: F811
    kept: Path,  # noqa: F811
    finished: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """With no learning rate the adapter stays the parent's, to the bit."""
    still = settings(base, steps=1, learning_rate=0.0, parent=str(finished))
    distill(kept, tmp_path / "still", still)
    from safetensors.torch import load_file

    mine, parents = (
        load_file(str(folder / "adapter" / "adapter_model.safetensors"))
        for folder in (tmp_path / "still", finished)
    )
    assert mine.keys() == parents.keys()
    assert all(torch.equal(mine[name], parents[name]) for name in mine)
    assert losses(tmp_path / "still")[0] < 0.6 * losses(finished)[0]


def test_the_parent_stands_in_the_record_and_prompts_are_served_as_they_were_learnt(
    base: Path,  # noqa: F811
    finished: Path,  # noqa: F811
    direct: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "adapted"
    config = settings(base, parent=str(finished), replays=12)
    student = distill(direct, out, config)
    parent = student.training["parent"]
    assert parent["student"] == str(finished)
    assert parent["adapter"] == file_hash(finished / "adapter" / "adapter_model.safetensors")
    assert parent["parent"] is None
    parity = read_json(out / "parity.json")
    assert parity["after"]["prompts"] == parity["after"]["prompts_equal"] == 12
    asked = {replay["messages"][0]["content"] for replay in parity["replays"]}
    assert DIRECT in asked
    assert len([it for it in parity["replays"] if it["messages"][0]["role"] == "user"]) == 6
    assert load_student(out).system_prompt == load_student(finished).system_prompt
    # The same parent elsewhere is the same training; another adapter in its place is not.
    moved = shutil.copytree(finished, tmp_path / "moved")
    distill(direct, out, config.model_copy(update={"parent": str(moved)}))
    shutil.copy(out / "adapter" / "adapter_model.safetensors", moved / "adapter")
    with pytest.raises(ConfigError, match="other settings"):
        distill(direct, out, config.model_copy(update={"parent": str(moved)}))


def test_a_parent_that_does_not_fit_is_refused(
    base: Path,  # noqa: F811
    kept: Path,  # noqa: F811
    finished: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    parent = str(finished)
    with pytest.raises(ConfigError, match="no student folder"):
        distill(kept, tmp_path / "a", settings(base, parent=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match="lora_r 16, not 8"):
        distill(kept, tmp_path / "b", settings(base, parent=parent, lora_r=8))
    with pytest.raises(ConfigError, match="kind 'agent', not 'cot'"):
        distill(kept, tmp_path / "c", settings(base, parent=parent, kind="cot"))
    other = shutil.copytree(base, tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\x3f")
    with pytest.raises(ConfigError, match="other weights"):
        distill(kept, tmp_path / "d", settings(base, parent=parent).model_copy(update={"base": str(other)}))


def test_a_dora_student_goes_on_as_dora(
    base: Path,  # noqa: F811
    kept: Path,  # noqa: F811
    finished: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file

    from agentkd.distill.inherit import adapter_settings

    parent = distill(kept, tmp_path / "dora", settings(base, adapter="dora", steps=2, replays=0)).path
    taken = adapter_settings(parent)
    assert taken["adapter"] == "dora"
    still = settings(base, steps=1, learning_rate=0.0, replays=0, adapter="dora", parent=str(parent))
    distill(kept, tmp_path / "still", still)
    mine, parents = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path / "still", parent)
    )
    assert any("magnitude" in name for name in mine)
    assert all(torch.equal(mine[name], parents[name]) for name in parents)
    with pytest.raises(ConfigError, match="adapter 'dora', not 'lora'"):
        distill(kept, tmp_path / "a", settings(base, parent=str(parent)))
    with pytest.raises(ConfigError, match="adapter 'lora', not 'dora'"):
        distill(kept, tmp_path / "b", settings(base, adapter="dora", parent=str(finished)))
    with pytest.raises(ConfigError, match="cannot begin with a student's adapter"):
        distill(kept, tmp_path / "c", settings(base, adapter="full", parent=str(parent)))


def test_a_whole_model_is_no_parent_and_its_merged_weights_are_a_base(
    base: Path,  # noqa: F811
    kept: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    from agentkd.commands.adapt import _respondent
    from agentkd.distill.release import merge_student
    from agentkd.engine.likelihood import Likelihood

    full = settings(base, adapter="full", steps=4, replays=0, learning_rate=3e-3)
    parent = distill(kept, tmp_path / "full", full).path
    with pytest.raises(ConfigError, match="no adapter to go on with") as caught:
        distill(kept, tmp_path / "a", settings(base, parent=str(parent)))
    assert "--merged" in str(caught.value.hint)
    line = ["distill", str(kept), "--from", str(parent), "--out", str(tmp_path / "b")]
    assert str(CliRunner().invoke(app, line).exception) == str(caught.value)
    merged = merge_student(parent, tmp_path / "merged")
    distill(kept, tmp_path / "next", settings(merged, steps=1, replays=0))
    assert losses(tmp_path / "next")[0] < losses(parent)[0]
    assert Likelihood.load(str(parent)).system_prompt == load_student(parent).system_prompt
    assert len(_respondent(str(parent), "fork").identity["adapter"]) == 64


def test_settings_for_a_parent_are_the_parents(finished: Path) -> None:  # noqa: F811
    from agentkd.distill.inherit import adapter_settings

    taken = adapter_settings(finished)
    assert (taken["kind"], taken["lora_r"], taken["lora_alpha"]) == ("agent", 16, 32)
    assert DistillConfig(**taken, parent=str(finished)).base == taken["base"]
