"""The renderer and the parity check on the chat templates that installed packages ship, verbatim."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from agentkd.distill.config import DistillConfig
from agentkd.distill.examples import build_examples
from agentkd.distill.parity import Fault, find_faults
from agentkd.engine.render import end_of_turn_id, render_training
from agentkd.engine.template import accept_system_role
from agentkd.errors import TrainingError
from tests.unit.test_distill import learnt
from tests.unit.test_parity import ITEM
from tests.unit.test_render import small_tokenizer

FOLDERS = {"trl": "chat_templates", "axolotl": "utils/chat_templates/templates"}
SPECIAL = re.compile(r"<\|\w+\|>|</?think>|<(?:start|end)_of_turn>|\[/?(?:INST|SYSTEM_PROMPT)\]")

WHOLE = [
    "trl/qwen2_5", "trl/qwen2_5_training", "trl/qwen3_training", "trl/qwen3_instruct_2507",
    "trl/llama3_1", "trl/llama3_2", "trl/llama3_training", "trl/gemma", "trl/gemma_training",
    "trl/gemma3", "trl/gemma3_training", "trl/phi3", "trl/phi3_training", "trl/phi3_5",
    "trl/phi3_5_training", "trl/lfm2", "axolotl/chatml", "axolotl/phi_4", "axolotl/mistral_v1",
    "axolotl/mistral_v7_tekken",
]  # fmt: skip
REWRITING = [
    "trl/qwen3",
    "trl/qwen3_5_think",
    "trl/gptoss",
    "axolotl/mistral_v2v3",
    "axolotl/mistral_v3_tekken",
]


def tokenizer_for(name: str) -> Any:
    """A small tokenizer with the template, and the special tokens that stand in it."""
    package, _, template = name.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package} is not installed: pip install --no-deps {package}")
    text = (Path(spec.origin).parent / FOLDERS[package] / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer = small_tokenizer(text)
    specials: dict[str, Any] = {"additional_special_tokens": sorted(set(SPECIAL.findall(text)))}
    if "eos_token" in text:
        specials["eos_token"] = "</s>"
    if "phi3" not in template:  # its copy in TRL writes the token behind everything
        specials["bos_token"] = "<s>"
    tokenizer.add_special_tokens(specials)
    accept_system_role(tokenizer)
    return tokenizer


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("rendering", ["whole", "step"])
def test_a_real_template_is_learnt_as_it_is_served(name: str, rendering: Any) -> None:
    tokenizer = tokenizer_for(name)
    made = build_examples([ITEM], tokenizer, DistillConfig(base="toy", rendering=rendering))
    stops = frozenset({end_of_turn_id(tokenizer)})
    assert find_faults(made.examples, {ITEM.id: ITEM}, made.system_prompt, tokenizer, stops) == []
    text = "".join(learnt(it, tokenizer) for it in made.examples)
    for step in ITEM.steps:
        assert (step.output in text) == (step.failure is None)
    assert "Observation" not in text
    assert sum(it.ids[it.mask.index(True) :].count(next(iter(stops))) for it in made.examples) >= 2


@pytest.mark.parametrize("name", REWRITING)
def test_a_real_template_that_rewrites_is_refused_and_learnt_step_by_step(name: str) -> None:
    tokenizer = tokenizer_for(name)
    with pytest.raises(TrainingError, match="not prefix-preserving"):
        build_examples([ITEM], tokenizer, DistillConfig(base="toy"))
    made = build_examples([ITEM], tokenizer, DistillConfig(base="toy", rendering="step"))
    assert len(made.examples) == 2
    stops = frozenset({it.ids[-1] for it in made.examples})
    assert len(stops) == 1
    assert find_faults(made.examples, {ITEM.id: ITEM}, made.system_prompt, tokenizer, stops) == []


def test_the_template_of_gemma_takes_a_system_prompt_in_front_of_the_question() -> None:
    tokenizer = tokenizer_for("trl/gemma")
    rendered = render_training(
        tokenizer,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ],
    )
    assert "<start_of_turn>user\nBe brief.\n\nq<end_of_turn>" in tokenizer.decode(rendered.ids)
    assert not accept_system_role(tokenizer)  # once is enough


def test_a_template_that_never_ends_a_turn_is_refused() -> None:
    tokenizer = tokenizer_for("trl/glm4moe")
    with pytest.raises(TrainingError, match="without a special token"):
        build_examples([ITEM], tokenizer, DistillConfig(base="toy"))


def test_a_template_that_leaves_out_the_text_is_caught() -> None:
    """It wants content in parts, and silently writes nothing for plain text."""
    tokenizer = tokenizer_for("trl/smolvlm")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_utterance>"]})
    made = build_examples([ITEM], tokenizer, DistillConfig(base="toy"))
    stops = frozenset({end_of_turn_id(tokenizer)})
    found = find_faults(made.examples, {ITEM.id: ITEM}, made.system_prompt, tokenizer, stops)
    assert [it.fault for it in found] == [Fault.OTHER_TEXT]
