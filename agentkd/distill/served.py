"""Parity after training: the served student is asked again what it was trained on.

A few trajectories are kept in the student folder as *replays*: the conversation before each learnt step,
the ids it was trained on as its prompt, and the ids it was trained to emit. The server gets the conversation
as messages, and returns the ids it made of them and the ids it emitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from agentkd.distill.examples import Example
from agentkd.distill.parity import Fault, Finding, compare_prompts
from agentkd.engine.probe import SURE, Known, compare_answers, known_answers, parting
from agentkd.engine.render import render_prompt
from agentkd.errors import ConfigError, ProviderError, TrainingError
from agentkd.prompt import learnt_prompt, trajectory_messages
from agentkd.record import read_json, write_json
from agentkd.trajectory import Trajectory

__all__ = [
    "Answer",
    "Ask",
    "Greedy",
    "Replay",
    "ServedParity",
    "check_served",
    "endpoint",
    "engine",
    "make_replays",
    "read_known",
    "read_replays",
    "record_served",
    "require_parity",
    "write_parity",
]

_ROOM = 8
"""Tokens that the student may emit beyond what it was taught."""


@dataclass(frozen=True)
class Answer:
    """What a server returned for a conversation."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    """The end token included."""
    finish_reason: str
    logprobs: tuple[float, ...] = ()
    """Nats, one for each id; empty where the server does not say."""


Ask = Callable[[Sequence[Mapping[str, str]], int, float], Answer]
"""Asks with (messages, most tokens to emit, temperature)."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Replay(_Record):
    """One learnt step, as messages and as ids."""

    where: str
    """Trajectory and step."""
    messages: tuple[dict[str, str], ...]
    """Those behind the system prompt, which ``student.json`` supplies; a step that is learnt under another
    prompt begins with that one."""
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    """With the token that ends the turn."""


class Greedy(_Record):
    """What the finished student answered; a server can be held to it, see :mod:`agentkd.engine.probe`."""

    where: str
    """Trajectory and step."""
    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Nats, one for each id; empty where the server did not say."""


class ServedParity(_Record):
    """What was found. ``passed`` is True when nothing was wrong."""

    passed: bool
    served_by: str
    prompts: int
    """Prompts compared, id by id."""
    prompts_equal: int
    stopped: int
    """Greedy answers that ended by the end token."""
    reproduced: int
    """Greedy answers that are exactly the ids of the training."""
    canonical: int
    """Finished greedy answers whose text the tokenizer writes with the very ids that were emitted."""
    sampled: int
    """Finished answers at temperature 1."""
    sampled_other: tuple[tuple[int, ...], ...]
    """Ids of those that the tokenizer would write otherwise; as context of a later step they are the ids that
    the tokenizer makes of their text, in training and serving alike."""
    faults: tuple[str, ...]
    greedy: tuple[Greedy, ...] = ()
    """The greedy answer to each prompt that was equal."""
    compared: int = 0
    """Greedy answers held against those that the finished student gave."""
    unchanged: int = 0
    """Those of them that do not differ, see :func:`agentkd.engine.probe.compare_answers`."""


def make_replays(
    examples: Sequence[Example],
    trajectories: Mapping[str, Trajectory],
    system_prompt: str,
    tokenizer: Any,
    count: int,
) -> list[Replay]:
    """Replays of the shortest ``count`` trajectories, cut from the ids that were trained.

    Those under the prompt that the student is served with come before those under another one.
    """

    def source(example: Example) -> str:
        return example.id if example.id in trajectories else example.id.rpartition("/")[0]

    def place(example: Example) -> tuple[bool, int, str]:
        own = learnt_prompt(trajectories[source(example)], system_prompt) == system_prompt
        return not own, len(example.ids), example.id

    replays: list[Replay] = []
    for example in sorted(examples, key=place)[:count]:
        name = source(example)
        prompt = learnt_prompt(trajectories[name], system_prompt)
        messages = trajectory_messages(trajectories[name], prompt)
        for number in range(len(trajectories[name].steps)):
            before = messages[: 2 + 2 * number]
            begin = len(render_prompt(tokenizer, before))
            if begin >= len(example.ids) or not example.mask[begin]:
                continue
            if name != example.id and not example.id.endswith(f"/{number + 1}"):
                continue
            mask = [*example.mask, False]
            end = mask.index(False, begin)
            replays.append(
                Replay(
                    where=f"{name}, step {number + 1}",
                    messages=tuple(before[prompt == system_prompt :]),
                    prompt_ids=tuple(example.ids[:begin]),
                    target_ids=tuple(example.ids[begin:end]),
                )
            )
    return replays


def check_served(
    replays: Sequence[Replay],
    system_prompt: str,
    tokenizer: Any,
    ask: Ask,
    served_by: str,
    known: Mapping[str, Known] | None = None,
) -> ServedParity:
    """Ask every replay, greedily and once sampled, and compare ids.

    Args:
        replays: from :func:`make_replays`.
        system_prompt: of ``student.json``.
        tokenizer: of the student folder.
        ask: the server.
        served_by: what it is, for the record.
        known: what the finished student answered, by the place of the replay; another answer is that of
            other weights.
    """
    tally = _Tally(tokenizer, known or {})
    for replay in replays:
        messages = list(replay.messages)
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system_prompt})
        limit = len(replay.target_ids) + _ROOM
        if tally.greedy(replay, messages, ask(messages, limit, 0.0)):
            tally.drawn(ask(messages, limit, 1.0))
    return ServedParity(
        passed=not tally.faults,
        served_by=served_by,
        prompts=len(replays),
        prompts_equal=len(tally.answers),
        stopped=tally.counts["stopped"],
        reproduced=tally.counts["reproduced"],
        canonical=tally.counts["canonical"],
        sampled=tally.counts["sampled"],
        sampled_other=tuple(tally.other),
        faults=tuple(str(fault) for fault in tally.faults),
        greedy=tuple(tally.answers),
        compared=tally.counts["compared"],
        unchanged=tally.counts["unchanged"],
    )


class _Tally:
    """What was found so far."""

    def __init__(self, tokenizer: Any, known: Mapping[str, Known]) -> None:
        self.tokenizer, self.known = tokenizer, known
        self.counts: Counter[str] = Counter()
        self.faults: list[Finding] = []
        self.answers: list[Greedy] = []
        self.other: list[tuple[int, ...]] = []

    def greedy(self, replay: Replay, messages: Sequence[Mapping[str, str]], answer: Answer) -> bool:
        """Take a greedy answer; False where its prompt is another one, so that it says nothing."""
        why = compare_prompts(replay.prompt_ids, answer.prompt_ids, messages, self.tokenizer)
        if why is not None:
            self.faults.append(Finding(why[0], replay.where, why[1]))
            return False
        self.answers.append(
            Greedy(where=replay.where, output_ids=answer.output_ids, logprobs=answer.logprobs)
        )
        taught = answer.output_ids == replay.target_ids
        self.counts["reproduced"] += taught
        if answer.finish_reason == "stop":
            self.counts["stopped"] += 1
            odd = None if taught else _odd_place(answer.output_ids, self.tokenizer)
            self.counts["canonical"] += odd is None
            # A student that has learnt hardly anything picks tokens that nobody taught it, unsure of them.
            if odd is not None and (not answer.logprobs or answer.logprobs[odd] > SURE):
                text = self.tokenizer.decode(list(answer.output_ids))
                self.faults.append(Finding(Fault.RETOKENISED, replay.where, f"greedy answer {text[:60]!r}"))
        self._compare(replay.where, answer)
        return True

    def _compare(self, where: str, answer: Answer) -> None:
        """Hold it against what the finished student said."""
        wanted = self.known.get(where)
        if wanted is None or not wanted.ids:
            return
        self.counts["compared"] += 1
        why, _ = compare_answers(Known(answer.output_ids, answer.logprobs), wanted)
        if why is None:
            self.counts["unchanged"] += 1
        else:
            detail = f"{why}; the weights of the base model or of the adapter are not those of the student"
            self.faults.append(Finding(Fault.WRONG_BASE, where, detail))

    def drawn(self, answer: Answer) -> None:
        """Take an answer at temperature 1."""
        if answer.finish_reason != "stop":
            return
        self.counts["sampled"] += 1
        if _odd_place(answer.output_ids, self.tokenizer) is not None:
            self.other.append(answer.output_ids)


def _odd_place(ids: Sequence[int], tokenizer: Any) -> int | None:
    """The first place where the tokenizer would write the text of finished ids otherwise; None if nowhere."""
    body = list(ids[:-1])
    text = tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return None if again == body else min(parting(again, body), len(ids) - 1)


def engine(torch_engine: Any, tokenizer: Any) -> Ask:
    """The embedded engine, without HTTP in between."""

    def ask(messages: Sequence[Mapping[str, str]], limit: int, temperature: float) -> Answer:
        prompt = render_prompt(tokenizer, messages)
        (done,) = torch_engine.generate(prompt, max_new_tokens=limit, temperature=temperature, seed=0)
        return Answer(tuple(prompt), done.token_ids, done.finish_reason, done.logprobs)

    return ask


def endpoint(api_base: str, model: str, api_key: str | None = None) -> Ask:
    """A chat endpoint that returns token ids (``return_token_ids``: this project's, vLLM's).

    Log-probabilities are asked for, too, and are left out where it sends none.
    """
    from openai import OpenAI

    from agentkd.model import provider_error

    client = OpenAI(base_url=api_base, api_key=api_key or "none", max_retries=1, timeout=600.0)

    def ask(messages: Sequence[Mapping[str, str]], limit: int, temperature: float) -> Answer:
        try:
            answer = client.chat.completions.create(
                model=model,
                messages=[dict(it) for it in messages],  # type: ignore[misc]
                max_tokens=limit,
                temperature=temperature,
                seed=0,
                logprobs=True,
                extra_body={"return_token_ids": True},
            )
        except Exception as exc:
            raise provider_error(exc) from exc
        body = answer.model_dump()
        choice = body["choices"][0]
        if body.get("prompt_token_ids") is None or choice.get("token_ids") is None:
            raise ProviderError(
                f"{api_base} does not return token ids, so parity cannot be checked there.",
                "Use agentkd serve, or vLLM 0.10.2 or later.",
            )
        ids = tuple(choice["token_ids"])
        said = (choice.get("logprobs") or {}).get("content") or ()
        logprobs = tuple(it["logprob"] for it in said) if len(said) == len(ids) else ()
        return Answer(tuple(body["prompt_token_ids"]), ids, choice["finish_reason"], logprobs)

    return ask


def write_parity(
    folder: Path, replays: Sequence[Replay], before: dict[str, Any], after: ServedParity | None
) -> None:
    """Write ``parity.json`` of a student folder."""
    content = {
        "before": before,
        "after": after.model_dump(mode="json") if after else None,
        "replays": [replay.model_dump(mode="json") for replay in replays],
    }
    write_json(folder / "parity.json", content)


def read_replays(folder: Path) -> list[Replay]:
    """The replays of a student folder.

    Raises:
        ConfigError: it has none.
    """
    path = folder / "parity.json"
    found = read_json(path)["replays"] if path.is_file() else []
    if not found:
        raise ConfigError(
            f"{folder} holds nothing to replay (no parity.json, or replays = 0).",
            "Distil again with replays of at least 1.",
        )
    return [Replay.model_validate(row) for row in found]


def read_known(folder: Path) -> dict[str, Known]:
    """What the student of a folder answered when it was finished, by the place of each replay."""
    return known_answers(read_json(folder / "parity.json"))


def record_served(folder: Path, result: ServedParity) -> None:
    """Write a later check, beside the one that the training closed with, as ``parity-check.json``."""
    write_json(folder / "parity-check.json", result.model_dump(mode="json"))


def require_parity(result: ServedParity, hint: str = "") -> None:
    """Raise what was found.

    Args:
        result: of :func:`check_served`.
        hint: what to do about it; by default it is the server that is to be mended.

    Raises:
        TrainingError: training and serving differ; names the first fault, and counts the others.
    """
    if result.passed:
        return
    more = f" ({len(result.faults) - 1} more)" if len(result.faults) > 1 else ""
    raise TrainingError(
        f"What is served is not what was trained ({result.served_by}): {result.faults[0]}{more}",
        hint or "Serve the student folder as it is: its base model, adapter, tokenizer, template and prompt.",
    )
