"""A teacher's likeliest tokens, recorded once: students learn from them as from the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentkd.cli import app
from agentkd.distill import distill
from agentkd.distill.examples import Example, build_examples
from agentkd.errors import ConfigError, DataError
from agentkd.record import file_hash, read_json, read_trajectories
from tests.integration.test_distill import base, kept, losses, settings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

from agentkd.distill.batches import pack_batch  # noqa: E402
from agentkd.distill.choose import make_objective  # noqa: E402
from agentkd.distill.recorded import FLOOR, RecordedTeacher, ids_hash, record_teacher  # noqa: E402
from agentkd.distill.teacher import LocalTeacher  # noqa: E402
from agentkd.engine.weights import load_tokenizer  # noqa: E402

__all__ = ["base", "kept"]

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random model with the same tokenizer, its vocabulary rounded up."""
    folder = tmp_path_factory.mktemp("teacher")
    config = transformers.LlamaConfig.from_pretrained(base)
    config.vocab_size += 5
    torch.manual_seed(5)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recorded(base: Path, kept: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the command."""
    path = tmp_path_factory.mktemp("recorded") / "teacher.jsonl"
    arguments = ["distill", str(kept), "--base", str(base), "--teacher-model", str(teacher)]
    arguments += ["--precision", "fp32", "--record-teacher", str(path), "--teacher-top", "8", "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"out": str(path), "examples": 6}
    return path


@pytest.fixture(scope="module")
def examples(base: Path, kept: Path) -> tuple[Example, ...]:
    return build_examples(read_trajectories(kept), load_tokenizer(base), settings(base)).examples


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["first", "plackett-luce"])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_loss_is_that_of_the_model(
    base: Path, teacher: Path, recorded: Path, examples: tuple[Example, ...], name: str, share: float
) -> None:
    tokenizer = load_tokenizer(base)
    there = LocalTeacher(teacher, tokenizer, CPU, torch.float32)
    objective = make_objective(settings(base, objective=name, teacher_share=share))
    assert objective is not None
    here = RecordedTeacher(recorded, examples, len(tokenizer), 5, CPU)
    # Several in one row, behind what they share, one of them twice and not in the order of the file.
    (pack,) = pack_batch([examples[4], examples[1], examples[4], examples[2]], 100_000)
    assert pack.prefix > 20
    known, given = there.logits(pack), here.logits(pack)
    assert given.shape == known.shape == (len(pack.rows), len(tokenizer) + 5)
    assert torch.isfinite(given).all()
    assert (given > FLOOR).sum(-1).eq(5).all()
    student = torch.randn(given.shape, generator=torch.Generator().manual_seed(1))[:, : len(tokenizer)]
    targets = torch.tensor(pack.targets)
    right, got = (objective.losses(student, targets, it[:, : len(tokenizer)], 0.5) for it in (known, given))
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["first", "plackett-luce"])
def test_a_training_is_that_with_the_model(
    base: Path, kept: Path, teacher: Path, recorded: Path, tmp_path: Path, name: str
) -> None:
    common = {"objective": name, "steps": 3, "replays": 0}
    distill(kept, tmp_path / "there", settings(base, teacher=str(teacher), **common))
    config = settings(base, teacher_logprobs=str(recorded), **common)
    distill(kept, tmp_path / "here", config)
    assert losses(tmp_path / "here") == pytest.approx(losses(tmp_path / "there"), abs=1e-5)
    assert read_json(tmp_path / "here" / "manifest.json")["inputs"][str(recorded)] == file_hash(recorded)
    # The content of the file decides, its path does not.
    moved = write(tmp_path / "moved.jsonl", read(recorded))
    moved.write_bytes(recorded.read_bytes())
    again = config.model_copy(update={"teacher_logprobs": str(moved)})
    assert distill(kept, tmp_path / "here", again).path == tmp_path / "here"
    rows = read(recorded)
    rows[0]["logprobs"][0][0] -= 0.01
    write(moved, rows)
    with pytest.raises(ConfigError, match="other settings"):
        distill(kept, tmp_path / "here", again)


def test_a_stopped_recording_goes_on(
    base: Path, kept: Path, teacher: Path, recorded: Path, tmp_path: Path
) -> None:
    config = settings(base, teacher=str(teacher))
    lines = recorded.read_bytes().splitlines(keepends=True)
    path = tmp_path / "teacher.jsonl"
    path.write_bytes(b"".join(lines[:2]) + lines[2][:100])
    seen: list[tuple[int, int]] = []
    assert record_teacher(kept, path, config, 8, lambda *at: seen.append(at)) == 6
    assert seen == [(3, 6), (4, 6), (5, 6), (6, 6)]
    assert path.read_bytes() == recorded.read_bytes()
    seen.clear()
    assert record_teacher(kept, path, config, 8, lambda *at: seen.append(at)) == 6
    assert not seen
    for other in ({"top": 9}, {"config": settings(base, teacher=str(base))}):
        with pytest.raises(ConfigError, match="another teacher"):
            record_teacher(kept, path, **{"config": config, "top": 8, **other})
    with pytest.raises(ConfigError, match="No teacher"):
        record_teacher(kept, path, settings(base))
    with pytest.raises(DataError, match="no file"):
        record_teacher(tmp_path / "none", path, config)


def spoilt(rows: list[dict[str, Any]], how: str) -> None:
    """Damage the second line in one way."""
    row = rows[1]
    if how == "few":
        for field in ("tokens", "logprobs"):
            row[field] = [values[:4] for values in row[field]]
    elif how == "stale":
        row["ids_sha256"] = ids_hash([1, 2, 3])
    elif how == "gone":
        del rows[1]
    elif how == "target":
        for field in ("places", "tokens", "logprobs"):
            del row[field][3]
    elif how == "teachers":
        row["teacher"] = "another"
    elif how == "vocabulary":
        row["tokens"][0][0] = 100_000
        row["vocabulary"] = 200_000
    elif how == "shape":
        del row["tokens"][0]
    elif how == "ragged":
        del row["tokens"][0][0]
    elif how == "twice":
        row["tokens"][0][0] = row["tokens"][0][1]
    elif how == "minus":
        row["logprobs"][0][0] = -1e9


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("few", "has 4 tokens of each target, the objective reads 5. .*--teacher-top 5"),
        ("stale", "was recorded of other tokens than it has now"),
        ("gone", "has nothing of 1 of 6 examples, as task 1#0"),
        ("target", r"task 1#0 has nothing of 1 of \d+ targets"),
        ("teachers", "recorded of 2 teachers"),
        ("vocabulary", "the student's tokenizer of"),
        ("shape", "line 2: .*not of one length"),
        ("ragged", "line 2: .*different numbers of tokens"),
        ("twice", "line 2: .*stands twice"),
        ("minus", "line 2: logprobs.0.0: .*greater than"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    base: Path, kept: Path, recorded: Path, tmp_path: Path, how: str, said: str
) -> None:
    rows = read(recorded)
    spoilt(rows, how)
    path = write(tmp_path / "teacher.jsonl", rows)
    with pytest.raises(DataError, match=said):
        distill(kept, tmp_path / "s", settings(base, objective="first", teacher_logprobs=str(path)))
    assert not (tmp_path / "s" / "loss.jsonl").exists()


def test_a_record_of_more_targets_serves_a_training_on_fewer(
    base: Path, kept: Path, teacher: Path, recorded: Path, tmp_path: Path
) -> None:
    """The first step of each failed: recorded, and learnt or not."""
    path = tmp_path / "teacher.jsonl"
    every = settings(base, teacher=str(teacher), failed_steps="target")
    record_teacher(kept, path, every, 8)
    common = {"objective": "first", "steps": 2, "replays": 0}
    distill(kept, tmp_path / "more", settings(base, teacher_logprobs=str(path), **common))
    distill(kept, tmp_path / "same", settings(base, teacher_logprobs=str(recorded), **common))
    assert losses(tmp_path / "more") == losses(tmp_path / "same")
    wider = settings(base, teacher_logprobs=str(recorded), failed_steps="target", **common)
    with pytest.raises(DataError, match="has nothing of"):
        distill(kept, tmp_path / "fewer", wider)


@pytest.mark.parametrize("name", ["forward-kl", "reverse-kl", "jsd", "taid"])
def test_dense_divergences_refuse_a_record(base: Path, kept: Path, tmp_path: Path, name: str) -> None:
    config = settings(base, objective=name, teacher_logprobs=str(tmp_path / "any"))
    with pytest.raises(ConfigError, match=r"whole distribution.*first or plackett-luce"):
        distill(kept, tmp_path / "s", config)


def test_a_teacher_is_named_once_and_where_it_is_used(base: Path, kept: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="Two teachers"):
        distill(kept, tmp_path / "s", settings(base, objective="first", teacher="x", teacher_logprobs=path))
    with pytest.raises(ConfigError, match=r"sft has no use for a teacher.*--teacher-logprobs"):
        distill(kept, tmp_path / "s", settings(base, teacher_logprobs=path))
    with pytest.raises(ConfigError, match=r"needs a teacher model.*or --teacher-logprobs"):
        distill(kept, tmp_path / "s", settings(base, objective="first"))
    with pytest.raises(DataError, match=r"no file.*--record-teacher"):
        distill(kept, tmp_path / "s", settings(base, objective="first", teacher_logprobs=path))
