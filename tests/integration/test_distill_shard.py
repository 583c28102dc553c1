"""A model that is shared out among processes trains as one that is not: by gloo, without a GPU."""

# The fixtures of another module are taken by their names.
# ruff: noqa: F811
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentkd.distill import DistillConfig, distill
from agentkd.distill.adapters import check_shard
from agentkd.distill.memory import estimate_memory
from agentkd.engine.student import load_student
from agentkd.errors import ConfigError
from tests.integration.test_distill import KILLED, base, kept, losses, settings  # noqa: F401
from tests.integration.test_distill_learner import examples, save_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft calls transformers by names that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

from safetensors.torch import load_file  # noqa: E402

from agentkd.distill.shard import part_of, shard  # noqa: E402
from tests.integration.sharded_step import one_step  # noqa: E402

PLAIN = {"lora_r": 4, "lora_alpha": 8, "precision": "fp32", "micro_tokens": 60}
BF16 = {**PLAIN, "precision": "bf16"}
UNEVEN = [30, 50, 20]
"""Three packs of tokens for two processes."""
STEPS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[int]]] = {
    "lora": ("Llama", {}, PLAIN, UNEVEN),
    "masked": ("Llama", {}, {**PLAIN, "objective": "masked"}, UNEVEN),
    "one example": ("Llama", {}, PLAIN, [40]),
    "rank 1": ("Llama", {}, {**PLAIN, "lora_r": 1, "gradient_checkpointing": True}, UNEVEN),
    "dora": ("Qwen3", {"head_dim": 16}, {**PLAIN, "adapter": "dora"}, UNEVEN),
    "not packed": ("Gemma2", {"head_dim": 16}, PLAIN, UNEVEN),
    "full": ("Llama", {}, {**PLAIN, "adapter": "full"}, UNEVEN),
    "full, tied": (
        "Qwen2",
        {"tie_word_embeddings": True},
        {**PLAIN, "adapter": "full", "gradient_checkpointing": True},
        UNEVEN,
    ),
    "dora, bf16": ("Llama", {}, {**BF16, "adapter": "dora"}, UNEVEN),
    "full, bf16": ("Llama", {}, {**BF16, "adapter": "full"}, UNEVEN),
}


def together(count: int, *arguments: str, timeout: float = 280) -> list[subprocess.CompletedProcess[str]]:
    """So many processes of one group, each with these arguments of Python, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **common, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        said = [it.communicate(timeout=timeout) for it in running]
    finally:
        for it in running:
            it.kill()
    return [
        subprocess.CompletedProcess(it.args, it.returncode, *text)
        for it, text in zip(running, said, strict=True)
    ]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Each step, by one process that holds all, and by two that share it out."""
    cases, alone = [], []
    for name, (kind, options, config, lengths) in STEPS.items():
        folder = save_model(tmp_path_factory.mktemp(name.replace(" ", "-")), kind, **options)
        case = {"base": str(folder), "settings": config, "lengths": lengths}
        alone.append(one_step(**case))
        cases.append({**case, "settings": {**config, "shard": True}})
    result = tmp_path_factory.mktemp("shared") / "result.pt"
    arguments = ("-m", "tests.integration.sharded_step", json.dumps(cases), str(result))
    for done in together(2, *arguments):
        assert done.returncode == 0, done.stderr
    shared = torch.load(result, weights_only=True)
    return dict(zip(STEPS, zip(alone, shared, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_the_loss_and_the_gradients_of_one_process(steps: Any, name: str) -> None:
    alone, shared = steps[name]
    rough = "bf16" in name
    assert shared["loss"] == pytest.approx(alone["loss"], rel=2e-2 if rough else 1e-5)
    assert shared["norm"] == pytest.approx(alone["norm"], rel=5e-2 if rough else 1e-4)
    for key in ("grads", "clipped"):
        for ours, right in zip(shared[key], alone[key], strict=True):
            assert type(ours) is torch.Tensor and ours.shape == right.shape
            tolerance = (5e-2 if rough else 1e-4) * right.abs().max().item()
            torch.testing.assert_close(ours, right, rtol=0, atol=max(tolerance, 1e-7))


@pytest.mark.slow
def test_all_processes_compute_as_many_packs_and_none_counts_twice(steps: Any) -> None:
    assert steps["lora"][1]["units"] == 2 and steps["lora"][1]["counting"] == 3
    assert steps["one example"][1]["units"] == 1 and steps["one example"][1]["counting"] == 1
    for alone, shared in steps.values():
        assert shared["held"] < 0.6 * alone["held"]  # frozen weights, too


def students(*folders: Path) -> list[dict[str, Any]]:
    """Adapters or models, as they lie in student folders."""
    found = []
    for folder in folders:
        weights = load_student(folder).weights
        (file,) = (folder / weights).glob("*.safetensors")
        found.append(load_file(file))
    assert all(it.keys() == found[0].keys() for it in found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "start"),
    [
        ("lora", ["-m", "agentkd", "distill", "--gpus", "2"]),
        ("full", ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "agentkd", "distill"]),
    ],
    ids=["lora", "full-torchrun"],
)
def test_two_processes_that_share_a_model_out_train_what_one_trains(
    base: Path, kept: Path, tmp_path: Path, adapter: str, start: list[str]
) -> None:
    rate = 1e-3 if adapter == "full" else 1e-2
    config = settings(
        base, steps=8, replays=1, adapter=adapter, learning_rate=rate, eval_fraction=0.2, eval_every=2
    )
    one = distill(kept, tmp_path / "one", config)
    options = f"--base {base} --steps 8 --batch-size 4 --lr {rate} --precision fp32 --adapter {adapter}"
    options += " --eval-fraction 0.2 --eval-every 2 --shard --json"
    command = [sys.executable, *start, str(kept), *options.split(), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    training = json.loads(done.stdout)["training"]
    assert training["held_out_loss"] == pytest.approx(one.training["held_out_loss"], abs=1e-5)
    assert training["trained_parameters"] == one.training["trained_parameters"]
    assert training["fingerprint"] == one.training["fingerprint"]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    ours, right = students(tmp_path / "two", tmp_path / "one")
    for name, value in right.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3)
    assert not list((tmp_path / "two").glob("*.pt"))


DISTIL = """
import sys
from pathlib import Path
from agentkd.distill import DistillConfig, distill
kept, out, config = sys.argv[1:]
begun = []
distill(Path(kept), Path(out), DistillConfig.model_validate_json(config), lambda step, *_: begun.append(step))
print(begun[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_killed_training_goes_on_exactly_and_among_any_number_of_processes(
    base: Path, kept: Path, tmp_path: Path, adapter: str
) -> None:
    rate = 1e-3 if adapter == "full" else 1e-2
    changes = {"adapter": adapter, "learning_rate": rate, "eval_fraction": 0.2, "eval_every": 2}
    config = settings(base, shard=True, replays=0, **changes)
    for done in together(2, "-c", DISTIL, str(kept), str(tmp_path / "whole"), config.model_dump_json()):
        assert done.returncode == 0, done.stderr
    killed = tmp_path / "killed"
    first, second = together(2, "-c", KILLED, str(kept), str(killed), config.model_dump_json(), "7")
    assert first.returncode == -signal.SIGKILL and second.returncode != 0
    assert (killed / "checkpoint.pt").is_file() and (killed / "checkpoint.previous.pt").is_file()
    shutil.copytree(killed, tmp_path / "other")
    again = together(2, "-c", DISTIL, str(kept), str(killed), config.model_dump_json())
    assert [it.returncode for it in again] == [0, 0], again
    assert again[0].stdout.split() == ["7"]  # what the checkpoint holds is not done again
    assert losses(killed) == losses(tmp_path / "whole")
    ours, right = students(killed, tmp_path / "whole")
    assert all(torch.equal(ours[name], value) for name, value in right.items())
    if adapter == "lora":
        three = together(3, "-c", DISTIL, str(kept), str(tmp_path / "other"), config.model_dump_json())
        assert [it.returncode for it in three] == [0, 0, 0], three
    else:
        distill(kept, tmp_path / "other", settings(base, replays=0, **changes))
    assert losses(tmp_path / "other") == pytest.approx(losses(killed), abs=1e-5)


def test_what_cannot_be_shared_out_is_refused(base: Path, kept: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is one\. Add --gpus N"):
        distill(kept, tmp_path / "s", settings(base, shard=True))
    with pytest.raises(ConfigError, match="4 bits are not sharded"):
        check_shard(DistillConfig(shard=True, adapter="qlora"), 2)
    check_shard(DistillConfig(shard=True), 2)
    check_shard(DistillConfig(), 1)
    assert not (tmp_path / "s").exists()
    command = [sys.executable, "-m", "agentkd", "distill", str(kept), "--base", str(base), "--shard"]
    for more, said in ([], "Add --gpus N"), (["--gpus", "2", "--adapter", "qlora"], "4 bits are not sharded"):
        done = subprocess.run(
            [*command, *more, "--out", str(tmp_path / "s")], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_model_without_named_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not say what its layers are"):
        shard(torch.nn.Linear(2, 2), torch.device("cpu"))


def test_what_is_not_shared_out_stays_as_it_is() -> None:
    whole = torch.ones(3)
    assert part_of(whole, torch.zeros(3)) is whole


def test_sharding_changes_no_fingerprint() -> None:
    assert DistillConfig(shard=True).fingerprint("data") == DistillConfig().fingerprint("data")


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_memory_estimate_is_shared_out(base: Path, monkeypatch: pytest.MonkeyPatch, adapter: str) -> None:
    batch = examples(100)
    alone = estimate_memory(base, settings(base, adapter=adapter), batch)
    found = []
    for count in ("4", "8"):
        for name, value in {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        found.append(estimate_memory(base, settings(base, adapter=adapter, shard=True), batch))
    four, eight = found
    assert four.trained == 2 * eight.trained == alone.trained / 4
    if adapter == "lora":
        whole = sum(it.numel() for it in transformers.AutoModelForCausalLM.from_pretrained(base).parameters())
        assert four.weights - eight.weights == 4 * whole / 8
    else:
        assert four.weights == eight.weights > 0
    assert four.activations == alone.activations
