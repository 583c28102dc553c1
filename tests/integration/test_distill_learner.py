"""What makes training quick changes nothing: kernels and packed losses against plain operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentkd.distill.batches import pack_batch, single_packs
from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import Example

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft calls transformers by names that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

from torch.nn import functional  # noqa: E402

from agentkd.distill import kernels  # noqa: E402
from agentkd.distill.learner import Learner  # noqa: E402

CONFIG = DistillConfig(lora_r=4, lora_alpha=8, precision="fp32")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def save_model(folder: Path, kind: str = "Llama", **options: Any) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, initializer_range=0.2, **options)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    return folder


def examples(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate(lengths):
        rest = torch.randint(10, 300, (length,), generator=generator).tolist()
        ids = [1, 2, 3, 4, 5, *rest]
        made.append(Example(f"e{number}", ids, [place > 7 and place % 4 > 1 for place in range(len(ids))]))
    return made


def learner(base: Path, config: DistillConfig = CONFIG) -> Learner:
    """With adapters that do something: fresh ones are zero."""
    made = Learner(base, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for value in made.parameters():
            value.normal_(0, 0.1)
    made.refresh()
    return made


def plain_losses(made: Learner, example: Example) -> Any:
    """The loss of one example by peft's and transformers' own forward pass, without any of ours."""
    from peft import PeftModel

    folder = Path(made.model.name_or_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made.save(folder / "adapter")
    with_adapter = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    logits = with_adapter(input_ids=torch.tensor([example.ids])).logits[0, :-1]
    wanted = torch.tensor(example.mask[1:])
    losses = functional.cross_entropy(logits[wanted], torch.tensor(example.ids[1:])[wanted], reduction="none")
    grads = torch.autograd.grad(losses.sum(), [it for it in with_adapter.parameters() if it.requires_grad])
    return losses.detach(), grads


@pytest.mark.parametrize(
    ("kind", "options", "packed"),
    [
        ("Llama", {}, True),
        ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, True),
        ("Qwen2", {}, True),
        ("Qwen3", {"head_dim": 16}, True),
        ("Mistral", {"sliding_window": 16}, False),
        ("Gemma2", {"head_dim": 16}, False),
    ],
)
def test_packed_losses_and_gradients_are_those_of_each_example_by_itself(
    tmp_path: Path, kind: str, options: dict[str, Any], packed: bool
) -> None:
    made = learner(save_model(tmp_path, kind, **options))
    assert made.packed is packed
    batch = examples(300, 40, 130, 129)
    packs = pack_batch(batch, 10_000, groups=2) if packed else single_packs(batch)
    by_id: dict[str, Any] = {}
    total = [torch.zeros_like(value) for value in made.parameters()]
    for pack in packs:
        losses = made.losses(pack)
        for row, owner in zip(losses.detach(), pack.owners, strict=True):
            by_id.setdefault(pack.examples[owner], []).append(row)
        for value, grad in zip(total, torch.autograd.grad(losses.sum(), made.parameters()), strict=True):
            value += grad
    expected = [torch.zeros_like(value) for value in total]
    for example in batch:
        losses, grads = plain_losses(made, example)
        torch.testing.assert_close(torch.stack(by_id[example.id]), losses, rtol=1e-4, atol=1e-4)
        for value, grad in zip(expected, grads, strict=True):
            value += grad
    for value, right in zip(total, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=2e-3, atol=2e-3 * right.abs().max().item())


def test_dropout_takes_the_plain_path_and_still_packs(tmp_path: Path) -> None:
    made = learner(save_model(tmp_path), DistillConfig(lora_r=4, lora_dropout=0.5, precision="fp32"))
    (pack,) = pack_batch(examples(30, 40), 1000)
    torch.manual_seed(1)
    first = made.losses(pack)
    second = made.losses(pack)
    torch.manual_seed(1)
    assert torch.equal(made.losses(pack), first)
    assert not torch.equal(second, first)


def test_bf16_losses_are_close_to_fp32(tmp_path: Path) -> None:
    base = save_model(tmp_path)
    (pack,) = pack_batch(examples(60, 40), 1000)
    wide = learner(base).losses(pack)
    low = learner(base, DistillConfig(lora_r=4, lora_alpha=8, precision="bf16")).losses(pack)
    assert low.dtype == torch.float32
    assert abs(wide.mean() - low.mean()) < 0.02 * wide.mean()


def test_adapters_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    base = save_model(tmp_path)
    values = [torch.cat([it.flatten() for it in Learner(base, CONFIG).parameters()]) for _ in range(2)]
    assert torch.equal(*values)
    other = Learner(base, CONFIG.model_copy(update={"seed": 1})).parameters()
    assert not torch.equal(values[0], torch.cat([it.flatten() for it in other]))


def assert_same_gradients(ours: Any, plain: Any, *inputs: Any) -> None:
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad((ours * weight).sum(), inputs)
    right = torch.autograd.grad((plain * weight).sum(), inputs)
    for value, expected in zip(got, right, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)


def random(*shape: int, grad: bool = True) -> Any:
    return torch.randn(*shape).requires_grad_(grad)


def test_merged_linear() -> None:
    torch.manual_seed(0)
    x, a, b = random(2, 7, 12), random(3, 12), random(5, 3)
    weight, bias = random(5, 12, grad=False), random(5, grad=False)
    ours = kernels.merged_linear(x, (weight + 2 * b @ a).detach(), bias, a, b, 2.0)
    assert_same_gradients(ours, functional.linear(x, weight + 2 * b @ a, bias), x, a, b)


def test_target_loss_over_several_blocks() -> None:
    torch.manual_seed(0)
    hidden, weight = random(300, 16), random(50, 16, grad=False)
    targets = torch.randint(0, 50, (300,))
    plain = functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    assert_same_gradients(kernels.target_loss(hidden, weight, targets), plain, hidden)


def test_target_loss_of_an_impossible_target_is_large_and_not_infinite() -> None:
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    losses = kernels.target_loss(hidden, torch.tensor([[1.0], [0.0]]), torch.tensor([1]))
    assert 80 < losses.item() < 100
    broken = kernels.target_loss(hidden * float("nan"), torch.tensor([[1.0], [0.0]]), torch.tensor([1]))
    assert not torch.isfinite(broken).any()


def test_norm_and_swiglu() -> None:
    torch.manual_seed(0)
    x, weight = random(2, 5, 16), random(16, grad=False)
    assert_same_gradients(kernels.rms_norm(x, weight, 1e-5), functional.rms_norm(x, (16,), weight, 1e-5), x)
    gate, up = random(5, 8), random(5, 8)
    assert_same_gradients(kernels.swiglu(gate, up), functional.silu(gate) * up, gate, up)


@pytest.mark.parametrize("prefix", [0, 1, 5, 140])
def test_packed_attention_is_causal_attention_of_each_example(prefix: int) -> None:
    torch.manual_seed(0)
    lengths = (150, 1, 128, 300)
    tokens = prefix + sum(lengths)
    q, k, v = random(1, 6, tokens, 8), random(1, 2, tokens, 8), random(1, 2, tokens, 8)
    parts, begin = [], prefix
    for length in lengths:
        places = [*range(prefix), *range(begin, begin + length)]
        one = [x[:, :, places] for x in (q, k, v)]
        out = functional.scaled_dot_product_attention(*one, is_causal=True, scale=0.3, enable_gqa=True)
        parts.append(out if begin == prefix else out[:, :, prefix:])
        begin += length
    ours = kernels.packed_attention(q, k, v, prefix, lengths, 0.3)
    assert_same_gradients(ours, torch.cat(parts, 2), q, k, v)
