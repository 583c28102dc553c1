"""What training offers beside plain LoRA: other adapters, held-out questions, memory, trackers, damage."""

# The fixtures of another module are taken by their names.
# ruff: noqa: F811
from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import pytest

from agentkd.distill import DistillConfig, distill
from agentkd.distill.batches import hold_out, pack_batch
from agentkd.distill.card import read_results, write_card
from agentkd.distill.memory import (
    MIB,
    MemoryNeed,
    estimate_memory,
    refuse_too_little,
    told_what_to_lower,
)
from agentkd.distill.ranks import rank, world
from agentkd.distill.release import merge_student, push_student, write_gguf
from agentkd.engine.student import load_student
from agentkd.errors import ConfigError, TrainingError
from agentkd.record import read_json
from tests.integration.test_distill import base, kept, losses, run_until_killed, settings  # noqa: F401
from tests.integration.test_distill_learner import examples, learner, plain_losses, save_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft calls transformers by names that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

from agentkd.distill.learner import Learner  # noqa: E402
from agentkd.engine.torch_engine import TorchEngine  # noqa: E402
from agentkd.engine.weights import load_model  # noqa: E402

PLAIN = {"lora_r": 4, "lora_alpha": 8, "precision": "fp32"}


def test_dora_is_what_peft_computes(tmp_path: Path) -> None:
    """Merging the linear layers would leave out the lengths of the rows."""
    made = learner(save_model(tmp_path), DistillConfig(adapter="dora", **PLAIN))
    batch = examples(30, 50)
    (pack,) = pack_batch(batch, 1000)
    ours = made.losses(pack)
    grads = torch.autograd.grad(ours.sum(), made.parameters())
    found = [plain_losses(made, example) for example in batch]
    torch.testing.assert_close(
        ours.detach().sort().values, torch.cat([it for it, _ in found]).sort().values, rtol=1e-4, atol=1e-4
    )
    for grad, *right in zip(grads, *(it for _, it in found), strict=True):
        torch.testing.assert_close(grad, sum(right), rtol=2e-3, atol=2e-3 * grad.abs().max().item())


def test_full_training_gives_every_weight_its_gradient(tmp_path: Path) -> None:
    folder = save_model(tmp_path, tie_word_embeddings=True)
    made = Learner(folder, DistillConfig(adapter="full", **PLAIN))
    batch = examples(30, 50)
    (pack,) = pack_batch(batch, 1000)
    grads = torch.autograd.grad(made.losses(pack).sum(), made.parameters())
    model = load_model(folder, torch.float32)
    for example in batch:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0, :-1]
        wanted = torch.tensor(example.mask[1:])
        torch.nn.functional.cross_entropy(
            logits[wanted], torch.tensor(example.ids[1:])[wanted], reduction="sum"
        ).backward()
    for grad, value in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, value.grad, rtol=2e-3, atol=2e-3 * value.grad.abs().max().item())


@pytest.mark.parametrize("adapter", ["dora", "full"])
def test_what_is_computed_in_bf16_has_the_gradients_of_fp32(tmp_path: Path, adapter: str) -> None:
    """Layers that are not merged compute under autocast, their backward pass does not."""
    folder = save_model(tmp_path)
    (pack,) = pack_batch(examples(30, 50), 1000)
    found = []
    for precision in ("bf16", "fp32"):
        made = learner(folder, DistillConfig(**{**PLAIN, "adapter": adapter, "precision": precision}))
        found.append(torch.autograd.grad(made.losses(pack).sum(), made.parameters()))
    for rough, fine in zip(*found, strict=True):
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, fine, rtol=0, atol=0.1 * fine.abs().max().item())


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    (pack,) = pack_batch(examples(30, 50), 1000)
    found = []
    for again in (False, True):
        made = learner(folder, DistillConfig(gradient_checkpointing=again, **PLAIN))
        found.append(torch.autograd.grad(made.losses(pack).sum(), made.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 9, 30, 7]])).logits


@pytest.mark.parametrize("adapter", ["dora", "full"])
def test_every_kind_of_student_is_served_as_it_was_trained(
    base: Path,
    kept: Path,
    tmp_path: Path,
    adapter: str,
) -> None:
    from peft import PeftModel

    rate = 3e-3 if adapter == "full" else 1e-2
    student = distill(kept, tmp_path / "s", settings(base, adapter=adapter, learning_rate=rate))
    curve = losses(tmp_path / "s")
    assert curve[-1] < 0.8 * curve[0]
    assert load_student(tmp_path / "s") == student
    parity = read_json(tmp_path / "s" / "parity.json")["after"]
    assert parity["passed"] and parity["prompts_equal"] == 6
    if adapter == "full":
        plain = load_model(student.path / "model", torch.float32)
        assert not (student.path / "adapter").exists()
    else:
        plain = PeftModel.from_pretrained(load_model(base, torch.float32), str(student.adapter))
    expected = logits_of(plain)
    assert not torch.allclose(expected, logits_of(load_model(base, torch.float32)), atol=1e-2)
    prompt = [1, 5, 9, 30, 7]
    with TorchEngine.load(base, student.adapter, dtype=torch.float32, threads=1) as served:
        (done,) = served.generate(prompt, max_new_tokens=1)
    assert done.token_ids[0] == expected[0, -1].argmax()
    assert done.logprobs[0] == pytest.approx(expected[0, -1].log_softmax(-1).max().item(), abs=1e-3)


def test_qlora_without_a_gpu_says_so_before_anything_is_loaded(
    base: Path, kept: Path, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="qlora needs a CUDA device"):
        distill(kept, tmp_path / "s", settings(base, adapter="qlora"))


def test_no_question_is_on_both_sides() -> None:
    batch = examples(*range(10, 30))
    tasks = {it.id: f"t{number // 2}" for number, it in enumerate(batch)}
    learnt, held = hold_out(batch, tasks, 0.2, 0)
    assert len(held) == 4 and len(learnt) == 16
    assert not {tasks[it.id] for it in learnt} & {tasks[it.id] for it in held}
    assert hold_out(batch, tasks, 0.2, 1)[1] != held
    assert hold_out(batch, tasks, 0, 0) == (tuple(batch), ())


@pytest.fixture(scope="module")
def stopped(base: Path, kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "s"
    distill(kept, out, stopping(base))
    return out


def stopping(folder: Path) -> DistillConfig:
    """So fast that the held-out loss soon rises."""
    changes = {"steps": 24, "eval_fraction": 0.2, "eval_every": 2, "patience": 2, "learning_rate": 0.1}
    return settings(folder, **changes)


def test_training_ends_when_the_held_out_loss_no_longer_falls(stopped: Path) -> None:
    rows = [json.loads(line) for line in (stopped / "loss.jsonl").read_text().splitlines()]
    seen = [(row["held_out"], row["step"]) for row in rows if row["held_out"] is not None]
    assert len(rows) < 24
    best = min(seen)
    assert seen.index(best) == len(seen) - 3
    training = load_student(stopped).training
    assert (training["held_out_loss"], training["best_step"]) == best
    assert not (stopped / "best.pt").exists()


def test_a_killed_run_stops_at_the_same_step_with_the_same_student(
    base: Path,
    kept: Path,
    stopped: Path,
    tmp_path: Path,
) -> None:
    last = load_student(stopped).training["steps"]
    run_until_killed(kept, tmp_path / "s", stopping(base), last - 1)
    distill(kept, tmp_path / "s", stopping(base))
    assert losses(tmp_path / "s") == pytest.approx(losses(stopped), abs=1e-6)
    weights = [
        (it / "adapter" / "adapter_model.safetensors").read_bytes() for it in (tmp_path / "s", stopped)
    ]
    assert weights[0] == weights[1]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    base: Path,
    kept: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stop(step: int, steps: int, loss: float) -> None:
        if step == 8:
            raise KeyboardInterrupt

    out = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        distill(kept, out, settings(base), stop)
    whole = tmp_path / "whole"
    distill(kept, whole, settings(base))
    (out / "checkpoint.pt").write_bytes(b"damaged")
    begun: list[int] = []
    distill(kept, out, settings(base), lambda step, steps, loss: begun.append(step))
    assert begun[0] == 4  # checkpoints were those of steps 6 and 3
    assert "Going on from the one before" in caplog.text
    assert losses(out) == pytest.approx(losses(whole), abs=1e-6)
    assert not (out / "checkpoint.previous.pt").exists()


def test_the_memory_estimate_counts_what_is_there(base: Path) -> None:
    batch = examples(100)
    config = settings(base, micro_tokens=200)
    need = estimate_memory(base, config, batch)
    made = Learner(base, config)
    assert need.trained == 16 * sum(value.numel() for value in made.parameters())
    frozen = sum(value.numel() for value in made.peft.parameters() if not value.requires_grad)
    merged = sum(it.weight.numel() for it in made._merged)
    assert need.weights == 4 * (frozen + merged)
    assert estimate_memory(base, settings(base, micro_tokens=400), batch).activations == 2 * need.activations
    less = estimate_memory(base, settings(base, micro_tokens=200, gradient_checkpointing=True), batch)
    assert less.activations < need.activations
    full = estimate_memory(base, settings(base, adapter="full"), batch)
    assert full.trained == 16 * frozen
    dora = estimate_memory(base, settings(base, adapter="dora"), batch)
    assert dora.trained == 16 * sum(
        it.numel() for it in Learner(base, settings(base, adapter="dora")).parameters()
    )


def test_too_little_memory_is_told_with_what_to_lower(base: Path, kept: Path, tmp_path: Path) -> None:
    need = MemoryNeed(weights=100 * MIB, trained=50 * MIB, activations=200 * MIB, logits=0)
    assert refuse_too_little(need, 400 * MIB, DistillConfig()) is None
    warning = refuse_too_little(need, 300 * MIB, DistillConfig())
    assert warning is not None and "Lower micro_tokens (now 2048): --set micro_tokens=1024" in warning
    with pytest.raises(TrainingError, match=r"needs 350 MiB.*120 MiB are free"):
        refuse_too_little(need, 120 * MIB, DistillConfig())

    def run_out(*_: object) -> None:
        torch.empty(1 << 60)

    with pytest.raises(TrainingError, match=r"Memory ran out.*Lower micro_tokens"):
        distill(kept, tmp_path / "s", settings(base), run_out)
    with pytest.raises(RuntimeError, match="something else"), told_what_to_lower(DistillConfig()):
        raise RuntimeError("something else")


def test_tensorboard_gets_the_figures_of_each_step_and_only_when_asked(
    base: Path,
    kept: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distill(kept, tmp_path / "plain", settings(base, steps=2, replays=0))
    assert not (tmp_path / "plain" / "tensorboard").exists()
    distill(kept, tmp_path / "s", settings(base, steps=3, replays=0, track="tensorboard"))
    read = EventAccumulator(str(tmp_path / "s" / "tensorboard")).Reload()
    assert [it.step for it in read.Scalars("loss")] == [1, 2, 3]
    assert [it.value for it in read.Scalars("loss")] == pytest.approx(losses(tmp_path / "s"), rel=1e-5)


def tracked(base: Path, kept: Path, out: Path, name: str, **environment: str) -> list[float]:
    """Losses of three steps that a tracker was told, too; in a process of its own, as trackers keep state."""
    pytest.importorskip(name)
    config = settings(base, steps=3, replays=0, track=name).model_dump_json()
    program = (
        "import sys; from agentkd.distill import DistillConfig, distill; "
        "distill(sys.argv[1], sys.argv[2], DistillConfig.model_validate_json(sys.argv[3]))"
    )
    command = [sys.executable, "-c", program, str(kept), str(out), config]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return losses(out)


def test_trackio_gets_the_figures_of_each_step(base: Path, kept: Path, tmp_path: Path) -> None:
    told = tracked(base, kept, tmp_path / "s", "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    with closing(sqlite3.connect(tmp_path / "trackio" / "s.db")) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows] == [1, 2, 3]
    assert [json.loads(metrics)["loss"] for _, metrics in rows] == pytest.approx(told)


def test_wandb_gets_the_figures_of_each_step(base: Path, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "wandb-files").mkdir()
    told = tracked(
        base, kept, tmp_path / "s", "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path / "wandb-files")
    )
    (record,) = (tmp_path / "wandb-files").rglob("*.wandb")
    written = record.read_bytes()
    assert all(json.dumps(loss).encode() in written for loss in told)


def test_a_tracker_that_is_not_installed_is_told(base: Path, kept: Path, tmp_path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(ConfigError, match="wandb is not installed"):
        distill(kept, tmp_path / "s", settings(base, track="wandb"))


@pytest.fixture(scope="module")
def student(base: Path, kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("released") / "student"
    distill(kept, out, settings(base, steps=4, replays=0))
    return out


def export(*arguments: str, **environment: str) -> Any:
    command = [sys.executable, "-m", "agentkd", "export-student", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )


def test_merged_weights_say_what_base_and_adapter_say(student: Path, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    done = export(str(student), "--merged", str(tmp_path / "merged"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"merged": str(tmp_path / "merged")}
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = PeftModel.from_pretrained(load_model(base, torch.float32), str(student / "adapter"))
    torch.testing.assert_close(logits_of(merged), logits_of(plain), rtol=1e-3, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template
    with pytest.raises(ConfigError, match="exists already"):
        merge_student(student, tmp_path / "merged")


def test_a_student_on_another_base_is_not_merged(student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "s")
    record = read_json(tmp_path / "s" / "student.json")
    (tmp_path / "s" / "student.json").write_text(json.dumps({**record, "base_hash": "0" * 64}))
    with pytest.raises(ConfigError, match="other weights"):
        merge_student(tmp_path / "s", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_gguf_is_made_by_the_converter_that_is_there(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="was not found"):
        write_gguf(student, tmp_path / "s.gguf")
    # A stand-in with the real one's options: what matters is what it is given, and what it keeps.
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import argparse, gguf, json, pathlib\n"
        "p = argparse.ArgumentParser(); p.add_argument('model'); p.add_argument('--outfile')\n"
        "p.add_argument('--outtype'); o = p.parse_args()\n"
        "config = json.loads((pathlib.Path(o.model) / 'config.json').read_text())\n"
        "w = gguf.GGUFWriter(o.outfile, 'llama')\n"
        "w.add_string('given', ' '.join([o.outtype, *(it.name for it in pathlib.Path(o.model).iterdir())]))\n"
        "w.add_rope_freq_base(config['rope_theta'])\n"
        "w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()\n"
    )
    write_gguf(student, tmp_path / "s.gguf", "f32")
    given = gguf.GGUFReader(tmp_path / "s.gguf").fields["given"].contents().split()
    assert {"f32", "config.json", "model.safetensors", "tokenizer.json"} <= set(given)
    converter = (tmp_path / "convert_hf_to_gguf.py").read_text()
    (tmp_path / "convert_hf_to_gguf.py").write_text(converter.replace("config['rope_theta']", "7.0"))
    with pytest.raises(ConfigError, match=r"rotary base: 10,000 became 7\."):
        write_gguf(student, tmp_path / "t.gguf")
    half = "import pathlib, sys\npathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text('half')\n"
    for last, said in (
        ("raise SystemExit('unknown model')", "unknown model.*Update llama.cpp"),
        ("import gguf_that_is_not_there", "module gguf_that_is_not_there.*pip install -r requirements.txt"),
    ):
        (tmp_path / "convert_hf_to_gguf.py").write_text(half + last)
        with pytest.raises(ConfigError, match=said):
            write_gguf(student, tmp_path / "t.gguf")
        assert not list(tmp_path.glob("t.gguf*"))


def test_a_push_uploads_what_serving_needs_and_no_conversation(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    folder = Path(shutil.copytree(student, tmp_path / "s"))
    for name in (
        "parity-check.json",
        "reference.json",
        "checkpoint.pt",
        "best.pt",
        "mine/kept.jsonl",
        "notes.txt",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    calls: dict[str, Any] = {}

    class Hub:
        def create_repo(self, repo: str, **options: Any) -> None:
            calls["private"] = options["private"]

        def upload_folder(self, *, repo_id: str, folder_path: Path, **patterns: Any) -> str:
            there = (
                it.relative_to(folder_path).as_posix() for it in Path(folder_path).rglob("*") if it.is_file()
            )
            calls["files"] = set(filter_repo_objects(there, **patterns))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push_student(folder, "me/student") == "https://hub/me/student"
    assert calls["private"]
    assert calls["files"] == {
        "README.md",
        "student.json",
        "manifest.json",
        "loss.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    for name in calls["files"]:  # and it is a student there
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, tmp_path / "there" / name)
    assert load_student(tmp_path / "there").training == load_student(student).training


def test_a_push_that_fails_is_told_in_one_line(student: Path) -> None:
    done = export(str(student), "--push", "nobody/none", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="none")
    assert done.returncode == 4
    assert "pushing" in done.stderr and "Traceback" not in done.stderr
    nothing = export(str(student))
    assert nothing.returncode == 2 and "Export to what?" in nothing.stderr


def test_the_card_tells_data_recipe_and_results(student: Path) -> None:
    text = (student / "README.md").read_text()
    assert "`kept.jsonl`, SHA-256 `" in text
    assert "| lora_r | 16 |" in text and "| steps | 4 |" in text
    assert "Not evaluated yet." in text and "search(query)" in text
    with pytest.raises(ConfigError, match="no finished evaluation"):
        read_results(student)
    cell = {"n": 100, "accuracy": 0.61, "low": 0.512, "high": 0.7}
    (student / "result.json").write_text(json.dumps({"overall": cell, "families": {"lcm": cell}}))
    write_card(load_student(student), read_results(student))
    assert "| lcm | 0.610 (0.512 to 0.700), n = 100 |" in (student / "README.md").read_text()


def test_a_stray_variable_makes_no_second_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts call other things RANK: a process that took it for its own would train for nobody."""
    monkeypatch.setenv("RANK", "4")
    assert (rank(), world()) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (rank(), world()) == (0, 1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert (rank(), world()) == (4, 8)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(base: Path, kept: Path, tmp_path: Path) -> None:
    config = settings(base, steps=8, replays=0, eval_fraction=0.2, eval_every=2)
    one = distill(kept, tmp_path / "one", config)
    options = [
        "--base",
        str(base),
        "--steps",
        "8",
        "--batch-size",
        "4",
        "--lr",
        "0.01",
        "--precision",
        "fp32",
        "--eval-fraction",
        "0.2",
        "--eval-every",
        "2",
    ]
    command = [sys.executable, "-m", "agentkd", "distill", str(kept), *options, "--gpus", "2", "--json"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    training = json.loads(done.stdout)["training"]
    assert training["steps"] == 8
    assert training["held_out_loss"] == pytest.approx(one.training["held_out_loss"], abs=1e-4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
