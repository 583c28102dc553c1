"""The renderer: a prompt is a prefix of the training ids, and exactly what is emitted is masked."""

from __future__ import annotations

import random
from typing import Any

import pytest

from agentkd.engine.render import end_of_turn_id, render_prompt, render_training
from agentkd.errors import ConfigError, DataError, TrainingError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Trims what it is given.
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
# Writes an empty block of thoughts before the text of an assistant's turn.
THINKING = CHATML.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think></think>\n{% endif %}{{ m['content'] }}"
)
# Drops the thoughts of earlier turns, as templates of reasoning models do.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}(cut){% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
TEXT = (
    "Thought: I need the sum, so I add.\n\n```python\nprint(1 + 2)\nfinal_answer(x)\n```\n\n  Observation:\n"
)


def small_tokenizer(template: str | None = CHATML) -> Any:
    """A byte-level BPE with 400 tokens; it merges runs of newlines, as real ones do."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(
        [TEXT, "\n\n\n\n   \n\n", "Observation:\nassistant\nuser\nsystem\n"] * 3, trainer
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONTENTS = (
    "Thought: x",
    "\n\nleads with newlines",
    "  spaces  ",
    "ends\n\n",
    "",
    "größer 漢字 🙂",
    "```python\n1\n```",
)


def conversation(seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    messages = [message("system", rng.choice(CONTENTS))] if rng.random() < 0.8 else []
    messages.append(message("user", rng.choice(CONTENTS)))
    for _ in range(rng.randint(1, 4)):
        messages += [message("assistant", rng.choice(CONTENTS)), message("user", rng.choice(CONTENTS))]
    return messages if rng.random() < 0.5 else messages[:-1]


@pytest.mark.parametrize("seed", range(30))
def test_every_prompt_is_a_prefix_and_its_turn_is_masked_from_there_to_the_end_token(
    tokenizer: Any, seed: int
) -> None:
    messages = conversation(seed)
    rendered = render_training(tokenizer, messages)
    assert len(rendered.ids) == len(rendered.mask)
    expected = [False] * len(rendered.ids)
    for place, item in enumerate(messages):
        if item["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:place])
        assert rendered.ids[: len(prompt)] == prompt
        end = rendered.ids.index(tokenizer.eos_token_id, len(prompt)) + 1
        assert tokenizer.decode(rendered.ids[len(prompt) : end]) == item["content"] + "<|im_end|>"
        expected[len(prompt) : end] = [True] * (end - len(prompt))
    assert rendered.mask == expected
    assert tokenizer.decode(rendered.ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_turn_that_starts_with_a_newline_would_be_merged_with_the_prompt_otherwise(tokenizer: Any) -> None:
    """The case the cutting is for: tokenised in one piece, the ids of the prompt are no prefix."""
    messages = [message("user", "q"), message("assistant", "\n\nx")]
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
    prompt = render_prompt(tokenizer, messages[:1])
    assert whole["input_ids"][: len(prompt)] != prompt
    assert render_training(tokenizer, messages).ids[: len(prompt)] == prompt


def test_turns_that_are_no_targets_are_context_only(tokenizer: Any) -> None:
    messages = [
        message("user", "q"),
        message("assistant", "bad"),
        message("user", "e"),
        message("assistant", "good"),
    ]
    both = render_training(tokenizer, messages)
    second = render_training(tokenizer, messages, [False, True])
    assert second.ids == both.ids
    learnt = [token for token, target in zip(second.ids, second.mask, strict=True) if target]
    assert tokenizer.decode(learnt) == "good<|im_end|>"


def test_continuing_the_final_message_leaves_it_open(tokenizer: Any) -> None:
    messages = [message("user", "q"), message("assistant", "Thought: I")]
    ids = render_prompt(tokenizer, messages, continue_final_message=True)
    assert ids[: len(render_prompt(tokenizer, messages[:1]))] == render_prompt(tokenizer, messages[:1])
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nThought: I")
    with pytest.raises(DataError):
        render_prompt(tokenizer, messages[:1], continue_final_message=True)


@pytest.mark.parametrize("template", [CHATML, TRIMMING, THINKING])
@pytest.mark.parametrize(
    "begun", ["Thought: I need the sum", "Thought: I need it.", "größer 漢字", "- a\n- b"]
)
def test_a_begun_turn_is_a_prefix_of_what_is_trained(template: str, begun: str) -> None:
    tokenizer = small_tokenizer(template)
    question = [message("system", "s"), message("user", "q")]
    prompt = render_prompt(tokenizer, [*question, message("assistant", begun)], continue_final_message=True)
    trained = render_training(tokenizer, [*question, message("assistant", f"{begun} so I add.")])
    assert trained.ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith(begun)


@pytest.mark.parametrize(
    ("template", "begun", "said"),
    [
        (CHATML, "Thought: ", "ends inside a token"),
        (CHATML, "Thought: I need \n\n", "ends inside a token"),
        (TRIMMING, "Thought: I ", "changes the text"),
        (CHATML, "", "nothing to continue"),
    ],
)
def test_what_cannot_be_continued_token_by_token_is_refused(template: str, begun: str, said: str) -> None:
    messages = [message("user", "q"), message("assistant", begun)]
    with pytest.raises(DataError, match=said):
        render_prompt(small_tokenizer(template), messages, continue_final_message=True)


def test_an_answer_without_a_question_is_not_continued(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="nothing to continue"):
        render_prompt(tokenizer, [message("assistant", "a")], continue_final_message=True)


def test_without_generation_prompt_the_text_ends_with_the_last_message(tokenizer: Any) -> None:
    ids = render_prompt(tokenizer, [message("user", "q")], add_generation_prompt=False)
    assert tokenizer.decode(ids) == "<|im_start|>user\nq<|im_end|>\n"


def test_a_template_that_rewrites_can_be_asked_but_not_trained() -> None:
    tokenizer = small_tokenizer(REWRITING)
    messages = [message("user", "q"), message("assistant", "a"), message("user", "r")]
    assert "(cut)" in tokenizer.decode(render_prompt(tokenizer, messages))
    with pytest.raises(TrainingError, match="not prefix-preserving"):
        render_training(tokenizer, [*messages, message("assistant", "b")])


def test_a_template_without_end_token_is_refused() -> None:
    with pytest.raises(TrainingError, match="without a special token"):
        render_training(small_tokenizer(ENDLESS), [message("user", "q"), message("assistant", "a")])


def test_nothing_to_learn_is_an_error(tokenizer: Any) -> None:
    messages = [message("user", "q"), message("assistant", "a")]
    with pytest.raises(DataError, match="No token"):
        render_training(tokenizer, messages, [False])
    with pytest.raises(DataError, match="No token"):
        render_training(tokenizer, messages[:1])
    with pytest.raises(DataError, match="1 assistant turns but 2 targets"):
        render_training(tokenizer, messages, [True, True])
    with pytest.raises(DataError):
        render_prompt(tokenizer, [])


def test_a_missing_or_refusing_template_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        render_prompt(small_tokenizer(None), [message("user", "q")])
    with pytest.raises(ConfigError, match="no system role"):
        render_prompt(small_tokenizer(REFUSING), [message("system", "s")])


def test_the_end_token_is_found(tokenizer: Any) -> None:
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id
