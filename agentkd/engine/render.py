"""The one renderer: chat messages to token ids, for training and for serving alike.

A conversation is cut where an assistant turn begins (right behind the generation prompt) and
where it ends, and every piece is tokenised on its own. So the ids of a prompt are, by
construction, a prefix of the ids of any longer conversation that goes on from it, and of the
training ids of the whole: a tokeniser that would merge the last newline of the generation
prompt with the first character of the answer cannot make training and serving differ.

This needs a template that only appends: the text of the first turns must not change when more
turns follow. :func:`render_training` refuses any other; :func:`render_prompt` then tokenises
the text in one piece, so that such a model can still be asked, and :func:`render_steps` makes one
training sequence of every turn, each behind exactly the prompt it will be asked with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentkd.errors import ConfigError, DataError, TrainingError, boundary

__all__ = ["Rendered", "Turn", "end_of_turn_id", "render_prompt", "render_steps", "render_training"]

Message = Mapping[str, str]

_WORDS = ("a", "the", "I", "is", "so")
"""Words that may follow a begun turn. Most vocabularies join them to a space before them."""


@dataclass(frozen=True)
class Turn:
    """One assistant turn within rendered ids."""

    number: int
    """0 for the first assistant turn of the conversation."""
    begin: int
    """Place of its first token."""
    end: int
    """Place behind its last emitted token, the one that ends the turn."""
    text: str
    """What its tokens, from ``begin`` on, were made of: the content as the template writes it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids.

    ``ids`` and ``mask`` have the same length; ``mask`` is True for the tokens that the student
    must emit: the text of each target turn and the token that ends it. ``turns`` are the targets.
    """

    ids: list[int]
    mask: list[bool]
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class _Piece:
    text: str
    turn: int | None
    """Index of the assistant turn that this piece is, None for everything around."""


class _RewritesError(Exception):
    """The template changes earlier text when turns are added; carries the number of the turn."""


def render_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """Token ids of a conversation, ready to be continued by the model.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: ``{"role", "content"}``, content as plain text.
        add_generation_prompt: end with the opening of an assistant turn.
        continue_final_message: the last message is the beginning of an assistant turn that the
            model goes on writing; ``add_generation_prompt`` is then ignored. The ids end with that
            text's own, and are a prefix of the training ids of a turn that goes on with a new word.

    Raises:
        ConfigError: no chat template, or the template refuses the messages.
        DataError: no messages, or a final message that cannot be continued token by token: not an
            assistant's, empty, rewritten by the template, or ending inside a token.
    """
    if not messages:
        raise DataError("There are no messages to render.", "Send at least one message.")
    if continue_final_message:
        return _render_begun(tokenizer, messages)
    try:
        pieces = _pieces(tokenizer, messages, add_generation_prompt)
    except _RewritesError:
        return _encode(tokenizer, _text(tokenizer, messages, add_generation_prompt))
    return [token for piece in pieces for token in _encode(tokenizer, piece.text)]


def _render_begun(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The conversation up to the last character of the final message, which is to be continued."""
    before, last = messages[:-1], messages[-1]
    if last["role"] != "assistant":
        raise DataError("The final message is not an assistant message.", "It cannot be continued.")
    if not before or not last["content"]:
        raise DataError("There is nothing to continue.", "Send a question and the beginning of its answer.")
    opening, closed = _text(tokenizer, before, True), _text(tokenizer, messages, False)
    turn = closed[len(opening) :] if closed.startswith(opening) else ""
    # Some templates write something before the text of a turn (an empty block of thoughts, say).
    at = 0 if turn.startswith(last["content"]) else turn.find(last["content"])
    if at < 0 or (at > 0 and turn.count(last["content"]) > 1):
        raise DataError(
            "The chat template changes the text of the final message, so it would not be continued as sent.",
            "Leave out white space at its ends, or use a template that keeps the text.",
        )
    begun = turn[: at + len(last["content"])]
    ids = _encode(tokenizer, begun)
    apart = "" if begun[-1].isspace() else " "
    if any(_encode(tokenizer, begun + apart + word)[: len(ids)] != ids for word in _WORDS):
        raise DataError(
            f"The final message ends inside a token: {begun[-12:]!r} is other tokens when a word follows.",
            "End it behind a word or a full stop, without white space.",
        )
    return render_prompt(tokenizer, before) + ids


def render_training(
    tokenizer: Any, messages: Sequence[Message], targets: Sequence[bool] | None = None
) -> Rendered:
    """Token ids of a whole conversation, and which of them are trained on.

    For the k-th message being an assistant's, ``render_prompt(tokenizer, messages[:k])`` is a
    prefix of ``ids``, and the mask of its turn begins exactly there.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: the conversation.
        targets: for each assistant turn whether it is learnt (else it is only context);
            None means all.

    Raises:
        ConfigError: no chat template, or the template refuses the messages.
        DataError: no token would be trained on, or ``targets`` does not fit.
        TrainingError: the template rewrites earlier turns, or closes a turn without a token
            that generation could stop at.
    """
    chosen = _chosen(messages, targets)
    try:
        pieces = _pieces(tokenizer, messages, add_generation_prompt=False)
    except _RewritesError as exc:
        raise TrainingError(
            f"The chat template is not prefix-preserving (assistant turn {exc}): "
            "it changes earlier text when turns are added.",
            'Train every step behind a prompt of its own (rendering = "step", --rendering step), or use a '
            "chat template that only appends, such as ChatML.",
        ) from None
    special = _special_ids(tokenizer)
    ids: list[int] = []
    mask: list[bool] = []
    turns: list[Turn] = []
    for piece in pieces:
        tokens = _encode(tokenizer, piece.text)
        length = 0
        if piece.turn is not None and chosen[piece.turn]:
            length = _target_length(tokenizer, tokens, special)
            turns.append(Turn(piece.turn, len(ids), len(ids) + length, piece.text))
        ids += tokens
        mask += [place < length for place in range(len(tokens))]
    if not turns:
        raise DataError(
            "No token of the conversation would be trained on.", "It needs at least one target turn."
        )
    return Rendered(ids, mask, tuple(turns))


def render_steps(
    tokenizer: Any, messages: Sequence[Message], targets: Sequence[bool] | None = None
) -> list[Rendered]:
    """One sequence for each target turn: the prompt it is asked with, and the turn.

    For any template, also for those that take the thoughts out of earlier turns once new ones follow.
    Costs more computing than :func:`render_training`, because every prompt is computed anew.

    Args:
        tokenizer, messages, targets: see :func:`render_training`.

    Raises:
        ConfigError, DataError: see :func:`render_training`.
        TrainingError: the template leaves out the turn's text, or closes it without a special token.
    """
    chosen = _chosen(messages, targets)
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    special = _special_ids(tokenizer)
    rendered: list[Rendered] = []
    for turn, place in enumerate(places):
        if not chosen[turn]:
            continue
        prompt = render_prompt(tokenizer, messages[:place]) if place else []
        text = _turn_text(tokenizer, messages[: place + 1])
        tokens = _encode(tokenizer, text)
        end = len(prompt) + _target_length(tokenizer, tokens, special)
        ids = [*prompt, *tokens][:end]
        rendered.append(
            Rendered(ids, [at >= len(prompt) for at in range(end)], (Turn(turn, len(prompt), end, text),))
        )
    if not rendered:
        raise DataError(
            "No token of the conversation would be trained on.", "It needs at least one target turn."
        )
    return rendered


def _chosen(messages: Sequence[Message], targets: Sequence[bool] | None) -> list[bool]:
    turns = sum(message["role"] == "assistant" for message in messages)
    chosen = [True] * turns if targets is None else list(targets)
    if len(chosen) != turns:
        raise DataError(f"There are {turns} assistant turns but {len(chosen)} targets.")
    return chosen


def _turn_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """What the last message, an assistant's, adds behind the generation prompt."""
    opening = _text(tokenizer, messages[:-1], True) if len(messages) > 1 else ""
    closing = _closed(tokenizer, messages)
    if closing.startswith(opening):
        return closing[len(opening) :]
    # The generation prompt opens a block (of thoughts, say) that the finished turn does not have.
    at = closing.rfind(messages[-1]["content"])
    if at < 0 or not messages[-1]["content"]:
        raise TrainingError(
            "The chat template leaves out the text of the final assistant turn.", "Use another template."
        )
    return closing[at:]


def end_of_turn_id(tokenizer: Any) -> int:
    """The id of the token that ends an assistant turn, at which generation must stop.

    Raises:
        ConfigError: no chat template.
        TrainingError: the template closes a turn with plain text only.
    """
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = render_training(tokenizer, messages)
    return rendered.ids[max(place for place, target in enumerate(rendered.mask) if target)]


def _target_length(tokenizer: Any, tokens: Sequence[int], special: frozenset[int]) -> int:
    """How many tokens of a turn are emitted: all up to its last special token, the end of turn."""
    for place in range(len(tokens) - 1, -1, -1):
        if tokens[place] in special:
            if tokenizer.decode(tokens[place + 1 :]).strip():
                break  # it stands before text of the turn, so it does not end it
            return place + 1
    raise TrainingError(
        "The chat template closes an assistant turn without a special token: nothing to learn to stop at.",
        "Use a chat template with an end-of-turn token, such as ChatML.",
    )


def _pieces(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> list[_Piece]:
    """Cut the rendered text at the begin and end of each assistant turn."""
    whole = _text(tokenizer, messages, add_generation_prompt)
    pieces: list[_Piece] = []
    done = ""
    turn = 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening = _text(tokenizer, messages[:place], True) if place else ""
        closing = _closed(tokenizer, messages[: place + 1])
        if not (opening.startswith(done) and closing.startswith(opening) and whole.startswith(closing)):
            raise _RewritesError(turn + 1)
        pieces.append(_Piece(opening[len(done) :], None))
        pieces.append(_Piece(closing[len(opening) :], turn))
        done = closing
        turn += 1
    pieces.append(_Piece(whole[len(done) :], None))
    return pieces


def _closed(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text up to the end of the final assistant turn.

    Some templates (Phi) write one more token behind the whole conversation when it does not go on:
    the student never emits it, and it is not there once another turn follows.
    """
    text = _text(tokenizer, messages, False)
    last = getattr(tokenizer, "eos_token", None)
    if not last or not text.endswith(last):
        return text
    try:
        longer = _text(tokenizer, [*messages, {"role": "user", "content": "x"}], False)
    except ConfigError:
        return text
    shorter = text.removesuffix(last)
    return shorter if not longer.startswith(text) and longer.startswith(shorter) else text


def _text(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "The tokenizer has no chat template.",
            "Use an instruct model, or put a chat_template.jinja into its folder.",
        )
    with boundary(ConfigError, "applying the chat template"):
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    return text


def _encode(tokenizer: Any, text: str) -> list[int]:
    # The template writes all special tokens itself, the opening one too.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = (token for token, what in tokenizer.added_tokens_decoder.items() if what.special)
    return frozenset(tokenizer.all_special_ids) | frozenset(added)
