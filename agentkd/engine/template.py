"""Chat templates that refuse a system message, made to take one.

Some model families (the first Gemma) have no system role, and their templates raise when they get one.
The usual way out is to put the system prompt in front of the first question. Here that is written into
the template itself, so that whoever renders with the student's tokenizer, this package or any server
that is given the student folder, gets the same tokens.
"""

from __future__ import annotations

from typing import Any

__all__ = ["accept_system_role"]

_FOLD = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set folded = messages[0]['content'] + '\\n\\n' + messages[1]['content'] -%}"
    "{%- set messages = [{'role': 'user', 'content': folded}] + messages[2:] -%}"
    "{%- endif -%}"
)


def accept_system_role(tokenizer: Any) -> bool:
    """Make the tokenizer's chat template take a system message; True if it had to be changed.

    Args:
        tokenizer: a transformers tokenizer; its ``chat_template`` is replaced when it refuses one.
    """
    user = {"role": "user", "content": "a"}
    if not isinstance(tokenizer.chat_template, str) or _renders(
        tokenizer, [{"role": "system", "content": "s"}, user]
    ):
        return False
    before = tokenizer.chat_template
    tokenizer.chat_template = _FOLD + before
    if _renders(tokenizer, [{"role": "system", "content": "s"}, user]):
        return True
    tokenizer.chat_template = before  # it refuses for another reason, which rendering will name
    return False


def _renders(tokenizer: Any, messages: list[dict[str, str]]) -> bool:
    from jinja2 import TemplateError

    try:
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return False
    return True
