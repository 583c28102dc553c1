"""Where weights come from, and what is said when there are none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from agentkd.errors import ConfigError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from agentkd.engine.decoder import cpu_dtype  # noqa: E402
from agentkd.engine.weights import cache_dir, load_model, load_tokenizer, model_hash, resolve_model  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=2,
    )
    target = tmp_path / "model"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    return target


def write_tokenizer(folder: Path, template: str | None) -> None:
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def test_a_model_folder_is_itself(folder: Path) -> None:
    assert resolve_model(str(folder)) == folder
    assert load_model(folder).dtype == torch.bfloat16
    assert load_model(folder, "float32").dtype == torch.float32
    assert not load_model(folder).training


def test_what_is_no_model_folder(folder: Path, tmp_path: Path) -> None:
    def refused(name: Any, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            resolve_model(str(name))

    refused(tmp_path / "none", "no model folder")
    refused(folder / "config.json", "is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")
    (folder / "student.json").write_text("{}")
    refused(folder, "student folder")
    refused("nobody/no-such-model", "no-such-model")


def test_broken_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="loading the model"):
        load_model(folder)


def test_the_hash_is_of_the_weights_and_remembered(folder: Path, tmp_path: Path) -> None:
    first = model_hash(folder)
    assert len(first) == 64
    assert list((cache_dir() / "hashes").iterdir()), "kept in the cache, not in the user's folder"
    assert model_hash(folder) == first
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "notes.json").write_text("{}")
    assert model_hash(copy) == first
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert model_hash(copy) != first
    for memo in (cache_dir() / "hashes").iterdir():
        memo.write_text("torn")
    assert model_hash(folder) == first


def test_a_tokenizer_needs_a_chat_template(folder: Path) -> None:
    write_tokenizer(folder, None)
    with pytest.raises(ConfigError, match="chat template"):
        load_tokenizer(folder)
    write_tokenizer(folder, "{{ messages }}")
    assert load_tokenizer(folder).eos_token_id == 2
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(folder.parent / "none")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own use of transformers
def test_an_engine_with_an_adapter_generates_like_the_adapted_model(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from agentkd.engine.torch_engine import TorchEngine

    write_tokenizer(folder, "{{ messages }}")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        load_model(folder, torch.float32),
        peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    ids = [5, 9, 33]
    with torch.inference_mode():
        logits = adapted.eval()(input_ids=torch.tensor([ids])).logits[0, -1]
        plain = load_model(folder, torch.float32)(input_ids=torch.tensor([ids])).logits[0, -1]
    wanted = torch.log_softmax(logits, -1)
    assert not torch.allclose(logits, plain, atol=1e-3), "the adapter changes something"
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "threads": 1}
    with TorchEngine.load(folder, adapter=tmp_path / "adapter", **options) as engine:
        done = engine.generate(ids, max_new_tokens=1)[0]
    assert done.token_ids[0] == int(wanted.argmax())
    assert done.logprobs[0] == pytest.approx(float(wanted.max()), abs=1e-4)
    with pytest.raises(ConfigError, match="adapter"):
        TorchEngine.load(folder, adapter=tmp_path / "none", **options)


@pytest.mark.parametrize(
    ("capability", "flags", "wanted"),
    [
        ("AVX512", "fpu avx512f avx512_bf16", torch.bfloat16),
        ("AVX512", "fpu avx512f", torch.float32),
        ("AVX2", "fpu avx2 avx512_bf16", torch.float32),  # torch was told to use less than there is
    ],
)
def test_the_precision_on_a_cpu_is_what_the_processor_multiplies_in(
    capability: str, flags: str, wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what a clock says, so that engines on a busy machine agree, and with the training."""
    from agentkd.distill.learner import compute_dtype
    from agentkd.engine import decoder

    info = tmp_path / "cpuinfo"
    info.write_text(f"flags : {flags}\n")
    monkeypatch.setattr(decoder, "_CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu_dtype.cache_clear()
    try:
        assert cpu_dtype() == compute_dtype("auto") == wanted
    finally:
        cpu_dtype.cache_clear()
