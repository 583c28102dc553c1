"""The embedded engine on torch: continuous batching, one prefill for n samples, prefix reuse.

On a CPU, work is shared out between *lanes*: threads that each decode a batch of their own with
one torch thread (or a few, on machines with many cores). Two lanes are faster than one batch on
two torch threads, and stay so when other processes want the cores, because no lane waits for
another in the middle of a matrix product.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from agentkd.engine import Completion
from agentkd.engine.decoder import Decoder, cpu_dtype, prepare_model
from agentkd.engine.kv import Prefix, PrefixCache
from agentkd.engine.packed import pack_linears
from agentkd.engine.sampling import choose
from agentkd.engine.weights import load_model, load_tokenizer, resolve_model
from agentkd.errors import AgentkdError, ConfigError, ContextOverflowError, ProviderError, boundary

__all__ = ["TorchEngine"]

_MAX_LANES = 4
_NOTHING = Prefix(np.zeros(0, dtype=np.int64), [])


@dataclass(frozen=True)
class _Settings:
    """How the samples of one call are drawn."""

    limit: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    on_token: Callable[[int, int], None] | None


class _Request:
    """One call of ``generate``: its settings, its samples so far, and its future."""

    def __init__(self, ids: list[int], n: int, settings: _Settings) -> None:
        self.ids, self.n, self.settings = ids, n, settings
        self.future: Future[list[Completion]] = Future()
        self.done: list[Completion | None] = [None] * n
        self.started = 0
        self.prompt: tuple[Prefix, torch.Tensor] | None = None
        """Keys, values and last logits of the prompt, for the samples that still have to start."""

    def finish(self, index: int, completion: Completion) -> None:
        self.done[index] = completion
        if all(self.done) and not self.future.done():
            self.future.set_result([it for it in self.done if it is not None])

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Row:
    """One sample while it is being decoded."""

    def __init__(self, request: _Request, index: int) -> None:
        self.request, self.index = request, index
        self.random = random.Random(f"{request.settings.seed}/{index}")
        self.ids: list[int] = []
        self.logprobs: list[float] = []

    @property
    def length(self) -> int:
        """Tokens before the last one: those whose keys are in the slab when it is fed."""
        return len(self.request.ids) + len(self.ids) - 1


class TorchEngine:
    """Generates with a transformers model in this process. See :class:`agentkd.engine.Engine`.

    Args:
        model: a causal language model; the engine owns it from here on and may change its
            attention implementation and the layout of its weights.
        tokenizer: decodes, and names the end token.
        max_batch: samples decoded at the same time.
        threads: CPU threads in all; by default as many as torch would use.
        cache_bytes: memory for keys and values of past sequences, which make a prompt that
            continues one of them cheap; 0 turns that off.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_batch: int = 32,
        threads: int | None = None,
        *,
        cache_bytes: int = 1 << 30,
    ) -> None:
        if max_batch < 1 or (threads is not None and threads < 1):
            raise ConfigError("max_batch and threads must be at least 1.")
        prepare_model(model)
        self.tokenizer = tokenizer
        self.context: int = model.config.get_text_config().max_position_embeddings
        """Tokens of prompt and continuation together."""
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self._ends = _end_tokens(model, tokenizer)
        pack_linears(model)
        self._pieces: dict[int, str] = {}
        self._cache = PrefixCache(cache_bytes)
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        threads = threads or torch.get_num_threads()
        count = 1 if model.device.type != "cpu" else min(threads, _MAX_LANES, max_batch)
        rows = -(-max_batch // count)
        self._lanes = [_Lane(self, Decoder(model, rows)) for _ in range(count)]
        _start(self._lanes, max(1, threads // count))

    @classmethod
    def load(
        cls,
        path_or_name: str | Path,
        adapter: str | Path | None = None,
        *,
        max_batch: int = 32,
        threads: int | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ) -> Self:
        """An engine for a base model, with a LoRA adapter merged into it.

        Args:
            path_or_name: see :func:`agentkd.engine.weights.resolve_model`.
            adapter: folder with a peft adapter.
            max_batch: samples decoded at the same time.
            threads: CPU threads in all.
            dtype: of the weights; by default bf16, or fp32 on processors that are slow at bf16.
            device: "cpu" or "cuda"; by default cuda where there is one.
        """
        path = resolve_model(str(path_or_name))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (cpu_dtype() if device == "cpu" else torch.bfloat16)
        # Merging adds small numbers to large ones, so it is done in fp32 and rounded once.
        model = load_model(path, torch.float32 if adapter is not None else dtype)
        if adapter is not None:
            with boundary(
                ConfigError, f"merging the adapter in {adapter}", "Was it trained on this base model?"
            ):
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        return cls(model.to(device=device, dtype=dtype), load_tokenizer(path), max_batch, threads)

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int = 1,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """See :meth:`agentkd.engine.Engine.generate`."""
        ids = [int(token) for token in prompt_ids]
        if not ids or n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 <= top_p <= 1:
            raise ConfigError(
                "generate() needs a prompt, n >= 1, max_new_tokens >= 1, temperature >= 0, top_p in 0..1."
            )
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ConfigError(f"The prompt has token ids outside the vocabulary of {self.vocabulary}.")
        if len(ids) >= self.context:
            raise ContextOverflowError(
                f"The prompt has {len(ids)} tokens; the model's context holds {self.context}.",
                "Shorten the conversation.",
            )
        settings = _Settings(
            limit=min(max_new_tokens, self.context - len(ids)),
            temperature=temperature,
            top_p=top_p,
            seed=random.SystemRandom().getrandbits(63) if seed is None else seed,
            stop=tuple(text for text in stop if text),
            on_token=on_token,
        )
        request = _Request(ids, n, settings)
        with self._changed:
            if self._closed:
                raise ProviderError("The engine is closed.")
            self._waiting.append(request)
            self._changed.notify_all()
        try:
            return request.future.result()
        except BaseException:
            request.future.cancel()  # Ctrl-C: the lanes drop rows of a request that is over
            raise

    def close(self) -> None:
        """End the threads; running and waiting calls raise ProviderError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for lane in self._lanes:
            if lane is not threading.current_thread():
                lane.join()
        while self._waiting:
            self._waiting.popleft().fail(ProviderError("The engine was closed."))
        self._cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _take(self, lane: _Lane) -> tuple[_Request, int] | None:
        """The next request that a lane should start samples of, and how many; waits when idle.

        None: it should go on decoding, or end.
        """
        with self._changed:
            while not self._closed:
                while self._waiting and self._waiting[0].future.done():
                    self._waiting.popleft()
                room = self._share() - len(lane.batch)
                if self._waiting and room > 0:
                    request = self._waiting.popleft()
                    return request, min(room, request.n - request.started)
                if lane.batch:
                    break
                self._changed.wait()
        return None

    def _share(self) -> int:
        """Rows that each lane may hold, so that all lanes get about the same."""
        total = sum(len(lane.batch) for lane in self._lanes) + sum(it.n - it.started for it in self._waiting)
        return min(self._lanes[0].decoder.rows, -(-total // len(self._lanes)))

    def _give_back(self, request: _Request) -> None:
        """Let the other lanes start the samples that are left."""
        with self._changed:
            self._waiting.appendleft(request)
            self._changed.notify_all()

    def _finish(self, row: _Row, reason: Literal["stop", "length"], cut: int | None) -> None:
        ids = row.ids[:-1] if row.ids[-1] in self._ends else row.ids
        text = self._decode(ids)
        if cut is not None:
            text = text[:cut]
        row.request.finish(row.index, Completion(tuple(row.ids), text, tuple(row.logprobs), reason))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _stop_at(self, row: _Row) -> int | None:
        """Where in the row's text a stop string begins that its last token completed."""
        stops = row.request.settings.stop
        token = row.ids[-1]
        if token not in self._pieces:
            self._pieces[token] = self._decode([token])
        piece = self._pieces[token]
        # A stop string can only be complete now if the new token brought its last character.
        # (A piece that is half a character, or that a decoder strips, shows too little to tell.)
        if "\ufffd" not in piece and not any(it[-1] in piece or it[-1].isspace() for it in stops):
            return None
        text = self._decode(row.ids)
        found = [at for it in stops if (at := text.find(it)) >= 0]
        return min(found) if found else None


class _Lane(threading.Thread):
    """A thread that decodes one batch."""

    def __init__(self, engine: TorchEngine, decoder: Decoder) -> None:
        super().__init__(name="agentkd-engine", daemon=True)
        self.engine, self.decoder = engine, decoder
        self.batch: list[_Row] = []
        self.torch_threads = 1
        self.ready = threading.Event()

    def run(self) -> None:
        if self.decoder.device.type == "cpu":
            torch.set_num_threads(self.torch_threads)
        self.ready.set()
        with torch.inference_mode():
            while not self.engine._closed:
                taken = self.engine._take(self)
                if taken is not None:
                    self._start(*taken)
                elif self.batch:
                    self._guarded_step()
        for row in self.batch:
            row.request.fail(ProviderError("The engine was closed."))
        self.batch.clear()
        self.decoder.reset()

    def _start(self, request: _Request, count: int) -> None:
        """Compute a request's prompt, or take what another lane computed, and start samples of it."""
        try:
            prefix, logits = request.prompt or self._prompt(request, count)
            first = len(self.batch)
            rows = [_Row(request, request.started + it) for it in range(count)]
            for at in range(first, first + count):
                if at > first or request.prompt is not None:
                    self.decoder.slab.load(at, prefix, len(request.ids))
            request.started += count
            if request.started < request.n:
                request.prompt = (prefix, logits)
                self.engine._give_back(request)
            else:
                request.prompt = None
            self.batch.extend(rows)
            self._append(rows, logits.expand(count, -1))
        except Exception as exc:
            # A request that fails must not end the lane: the error goes to its caller.
            request.fail(_named(exc))
            self._drop_done()

    def _prompt(self, request: _Request, count: int) -> tuple[Prefix, torch.Tensor]:
        """Prefill into the first free row; the copy is only made when other rows need it."""
        ids, slab = request.ids, self.decoder.slab
        known, shared = self.engine._cache.find(ids[:-1])
        logits = self.decoder.prefill(len(self.batch), ids, known, shared)
        prefix = slab.save(len(self.batch), ids) if request.n > 1 else _NOTHING
        return prefix, logits

    def _guarded_step(self) -> None:
        try:
            tokens = [row.ids[-1] for row in self.batch]
            logits = self.decoder.step(tokens, [row.length for row in self.batch])
            self._append(list(self.batch), logits)
        except Exception as exc:
            for row in self.batch:
                row.request.fail(_named(exc))
            self.batch.clear()
            self.decoder.reset()

    def _append(self, rows: Sequence[_Row], logits: torch.Tensor) -> None:
        """Choose a token for each row, and let rows that are done leave."""
        choice = choose(
            logits,
            [row.request.settings.temperature for row in rows],
            [row.request.settings.top_p for row in rows],
            [row.random.random() for row in rows],
        )
        for row, token, logprob in zip(rows, choice.ids, choice.logprobs, strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
        for row in [row for row in rows if self._settle(row)]:
            self._leave(row)

    def _settle(self, row: _Row) -> bool:
        """Finish a row whose last token ended it; True if it has to leave."""
        try:
            return self._is_over(row)
        except Exception as exc:
            # What decoding the text of one row raises is no reason to fail the others.
            row.request.fail(_named(exc))
            return True

    def _is_over(self, row: _Row) -> bool:
        if (on_token := row.request.settings.on_token) is not None and not row.request.future.done():
            on_token(row.index, row.ids[-1])
        cut = None
        reason: Literal["stop", "length"] | None = None
        if row.ids[-1] in self.engine._ends:
            reason = "stop"
        elif row.request.settings.stop and (cut := self.engine._stop_at(row)) is not None:
            reason = "stop"
        elif len(row.ids) >= row.request.settings.limit:
            reason = "length"
        if reason is not None and not row.request.future.done():
            self.engine._finish(row, reason, cut)
        return reason is not None or row.request.future.done()

    def _leave(self, row: _Row) -> None:
        """Take a row out of the batch; the last row moves into its place."""
        at = self.batch.index(row)
        slab = self.decoder.slab
        if self.engine._cache.max_bytes:
            self.engine._cache.add(slab.save(at, (row.request.ids + row.ids)[: row.length]))
        last = self.batch.pop()
        if last is not row:
            slab.move(len(self.batch), at, last.length)
            self.batch[at] = last
        if not self.batch and slab.capacity > 2048:
            self.decoder.reset()

    def _drop_done(self) -> None:
        for row in [row for row in self.batch if row.request.future.done()]:
            self._leave(row)


def _start(lanes: Sequence[_Lane], torch_threads: int) -> None:
    """Start the lanes; the number of torch threads of the calling thread stays what it is."""
    before = torch.get_num_threads()
    for lane in lanes:
        lane.torch_threads = torch_threads
        lane.start()
    for lane in lanes:
        lane.ready.wait()
    torch.set_num_threads(before)  # the setting is per thread, but new threads inherit the last one


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a turn: the tokenizer's, and those of the model's generation settings."""
    named = getattr(model.generation_config, "eos_token_id", None)
    several = named if isinstance(named, (list, tuple)) else [named]
    return frozenset(int(token) for token in (*several, tokenizer.eos_token_id) if token is not None)


def _named(exc: Exception) -> AgentkdError:
    if isinstance(exc, AgentkdError):
        return exc
    return ProviderError(f"The embedded engine failed: {type(exc).__name__}: {exc}")
