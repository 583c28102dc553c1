"""The embedded engine on torch: continuous batching, one prefill for n samples, prefix reuse.

On a CPU, work is shared out between *lanes*: threads that each decode a batch of their own with
one torch thread (or a few, on machines with many cores). Two lanes are faster than one batch on
two torch threads, and stay so when other processes want the cores, because no lane waits for
another in the middle of a matrix product.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch

from agentkd.engine import Cancellation, Completion
from agentkd.engine.decoder import Decoder, cpu_dtype, prepare_model
from agentkd.engine.ending import Ending, end_tokens
from agentkd.engine.kv import PrefixCache
from agentkd.engine.lane import Lane, Queue, start
from agentkd.engine.packed import pack_linears
from agentkd.engine.request import Request, Settings
from agentkd.engine.student import Student
from agentkd.engine.weights import load_model, load_tokenizer, resolve_model
from agentkd.errors import ConfigError, ContextOverflowError, boundary

__all__ = ["TorchEngine", "load_student_model", "merge_adapter"]

_MAX_LANES = 4
_CACHE_BYTES = 1 << 30


class TorchEngine:
    """Generates with a transformers model in this process. See :class:`agentkd.engine.Engine`.

    A context manager; close it to end its threads.

    Args:
        model: a causal language model; the engine owns it from here on and may change its
            attention implementation and the layout of its weights.
        tokenizer: decodes, and names the end token.
        max_batch: samples decoded at the same time.
        threads: CPU threads in all; by default as many as torch would use.
        cache_bytes: memory for keys and values of past sequences, which make a prompt that
            continues one of them cheap; 0 turns that off.

    Attributes:
        context: most tokens of a prompt and its continuation together.
        prefix_cache: past sequences; counts how much of the prompts was found in it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_batch: int = 32,
        threads: int | None = None,
        *,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        if max_batch < 1 or (threads is not None and threads < 1):
            raise ConfigError("max_batch and threads must be at least 1.")
        prepare_model(model)
        self.tokenizer = tokenizer
        self.context: int = model.config.get_text_config().max_position_embeddings
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]
        pack_linears(model)
        self.prefix_cache = PrefixCache(cache_bytes)
        self._queue = Queue()
        threads = threads or torch.get_num_threads()
        count = 1 if model.device.type != "cpu" else min(threads, _MAX_LANES, max_batch)
        ending = Ending(tokenizer, end_tokens(model, tokenizer))
        self._lanes = [
            Lane(
                self._queue,
                Decoder(model, -(-max_batch // count)),
                ending,
                self.prefix_cache,
                threads // count,
            )
            for _ in range(count)
        ]
        self._queue.lanes = self._lanes
        start(self._lanes)

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
            adapter: folder with a peft adapter; a folder with a whole model stands in for the base.
            max_batch: samples decoded at the same time.
            threads: CPU threads in all.
            dtype: of the weights; by default bf16, or fp32 on processors that do not multiply in it.
            device: "cpu" or "cuda"; by default cuda where there is one.

        Raises:
            ConfigError: no such model, or the adapter does not fit it.
        """
        base = path = resolve_model(str(path_or_name))
        if adapter is not None and (Path(adapter) / "config.json").is_file():
            path, adapter = Path(adapter), None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (cpu_dtype() if device == "cpu" else torch.bfloat16)
        # Merging adds small numbers to large ones, so it is done in fp32 and rounded once.
        model = load_model(path, torch.float32 if adapter is not None else dtype)
        if adapter is not None:
            model = merge_adapter(model, Path(adapter))
        model = model.to(device=device, dtype=dtype)
        return cls(model, load_tokenizer(base), max_batch, threads)

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
        cancellation: Cancellation | None = None,
    ) -> list[Completion]:
        """See :meth:`agentkd.engine.Engine.generate`."""
        ids = [int(token) for token in prompt_ids]
        self._check(ids, n, max_new_tokens, temperature, top_p)
        settings = Settings(
            limit=min(max_new_tokens, self.context - len(ids)),
            temperature=temperature,
            top_p=top_p,
            seed=random.SystemRandom().getrandbits(63) if seed is None else seed,
            stop=tuple(text for text in stop if text),
            on_token=on_token,
        )
        request = Request(ids, n, settings)
        given_up = nullcontext() if cancellation is None else cancellation.calling(request.give_up)
        try:
            with given_up:
                self._queue.put(request)
                return request.future.result()
        except BaseException:
            request.future.cancel()  # Ctrl-C: the lanes drop the rows of a request that is over
            raise

    def _check(self, ids: list[int], n: int, limit: int, temperature: float, top_p: float) -> None:
        if n < 1 or limit < 1 or not temperature >= 0 or not 0 <= top_p <= 1:
            raise ConfigError(
                f"Cannot generate: n={n}, max_new_tokens={limit}, temperature={temperature}, top_p={top_p}."
            )
        if not ids or min(ids) < 0 or max(ids) >= self._vocabulary:
            raise ConfigError(f"A prompt is at least one token id from 0 to {self._vocabulary - 1}.")
        if len(ids) >= self.context:
            raise ContextOverflowError(
                f"The prompt has {len(ids)} tokens; the model's context holds {self.context}.",
                "Shorten the conversation.",
            )

    def close(self) -> None:
        """End the threads and free the cache; running and waiting calls raise ProviderError."""
        self._queue.close()
        for lane in self._lanes:
            lane.join()
        self.prefix_cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def merge_adapter(model: Any, adapter: Path) -> Any:
    """The model with a LoRA adapter in its weights.

    Raises:
        ConfigError: the adapter does not fit it.
    """
    doing, hint = f"merging the adapter in {adapter}", "Was it trained on this base model?"
    with boundary(ConfigError, doing, hint), warnings.catch_warnings():
        from peft import PeftModel

        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers, not the user's
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def load_student_model(student: Student) -> Any:
    """A student as one model in fp32: its base with the adapter merged, or the whole model that it is.

    Raises:
        ConfigError: no such base model, or the adapter does not fit it.
    """
    if student.weights == "model":
        return load_model(student.adapter, torch.float32)
    return merge_adapter(load_model(resolve_model(student.base), torch.float32), student.adapter)
