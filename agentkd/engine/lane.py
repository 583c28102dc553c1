"""Lanes: threads that each decode a batch of their own, fed from one queue."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from agentkd.engine.decoder import Decoder
from agentkd.engine.ending import Ending
from agentkd.engine.kv import Prefix, PrefixCache
from agentkd.engine.request import Request, Row
from agentkd.engine.sampling import choose
from agentkd.errors import AgentkdError, ProviderError

__all__ = ["Lane", "Queue", "start"]

_NOTHING = Prefix(np.zeros(0, dtype=np.int64), [])
_BIG = 2048
"""A slab with more positions than this is freed when its lane has nothing to do."""


class Queue:
    """Requests that have samples to begin, first come first served, shared out evenly.

    Attributes:
        lanes: those that it feeds; set before they start.
        closed: True once :meth:`close` was called.
    """

    def __init__(self) -> None:
        self.lanes: Sequence[Lane] = ()
        self.closed = False
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()

    def put(self, request: Request, *, first: bool = False) -> None:
        """Add a request, behind all others unless ``first``.

        Raises:
            ProviderError: the queue is closed.
        """
        with self._changed:
            if self.closed:
                raise ProviderError("The engine is closed.")
            (self._waiting.appendleft if first else self._waiting.append)(request)
            self._changed.notify_all()

    def take(self, lane: Lane) -> tuple[Request, int] | None:
        """The next request that a lane should begin samples of, and how many; waits when it is idle.

        None: it should go on decoding, or end.
        """
        with self._changed:
            while not self.closed:
                while self._waiting and self._waiting[0].over:
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
        """Rows that each lane may hold, so that all get about the same."""
        running = sum(len(lane.batch) for lane in self.lanes)
        waiting = sum(it.n - it.started for it in self._waiting)
        return min(self.lanes[0].decoder.rows, -(-(running + waiting) // len(self.lanes)))

    def close(self) -> None:
        """Give out nothing more; fail what waits."""
        with self._changed:
            self.closed = True
            while self._waiting:
                self._waiting.popleft().fail(ProviderError("The engine was closed."))
            self._changed.notify_all()


class Lane(threading.Thread):
    """A thread that decodes one batch.

    Args:
        queue: where its requests come from.
        decoder: its own.
        ending: tells when a sample is over.
        cache: of past sequences; shared.
        torch_threads: threads inside one torch operation.
    """

    def __init__(
        self, queue: Queue, decoder: Decoder, ending: Ending, cache: PrefixCache, torch_threads: int
    ) -> None:
        super().__init__(name="agentkd-engine", daemon=True)
        self.queue, self.decoder, self.ending, self.cache = queue, decoder, ending, cache
        self.torch_threads = torch_threads
        self.batch: list[Row] = []
        self.ready = threading.Event()

    def run(self) -> None:
        """Decode until the queue is closed."""
        if self.decoder.device.type == "cpu":
            torch.set_num_threads(self.torch_threads)
        self.ready.set()
        with torch.inference_mode():
            while not self.queue.closed:
                taken = self.queue.take(self)
                try:
                    if taken is not None:
                        self._begin(*taken)
                    elif self.batch:
                        self._step()
                except Exception as exc:
                    # A lane must outlive whatever goes wrong, or its callers would wait forever.
                    self._abandon(exc, taken[0] if taken is not None else None)
        self._abandon(ProviderError("The engine was closed."), None)

    def _begin(self, request: Request, count: int) -> None:
        """Compute a request's prompt, or take what another lane computed, and begin samples of it."""
        slab, place = self.decoder.slab, len(self.batch)
        computed = request.prompt is None
        prefix, logits = request.prompt or self._prompt(request)
        for row in range(place + computed, place + count):
            slab.load(row, prefix, len(request.ids))
        rows = [Row(request, request.started + it) for it in range(count)]
        request.started += count
        if request.started < request.n:
            request.prompt = (prefix, logits)
            self.queue.put(request, first=True)
        else:
            request.prompt = None
        self.batch.extend(rows)
        self._append(rows, logits.expand(count, -1))

    def _prompt(self, request: Request) -> tuple[Prefix, torch.Tensor]:
        """Prefill into the first free row; a copy is only made when other samples need it."""
        place = len(self.batch)
        known, shared = self.cache.find(request.ids[:-1])
        logits = self.decoder.prefill(place, request.ids, known, shared)
        return self.decoder.slab.save(place, request.ids) if request.n > 1 else _NOTHING, logits

    def _step(self) -> None:
        """One token for every row."""
        tokens, lengths = [row.ids[-1] for row in self.batch], [row.length for row in self.batch]
        self._append(list(self.batch), self.decoder.step(tokens, lengths))

    def _append(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """Choose a token for each row, and let rows that are over leave."""
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
            if self.cache.max_bytes:
                ids = (row.request.ids + row.ids)[: row.length]
                self.cache.add(self.decoder.slab.save(self.batch.index(row), ids))
            self._remove(row)

    def _settle(self, row: Row) -> bool:
        """Report a row's new token, and its end if that was its last; True if it has to leave."""
        request = row.request
        if request.over:
            return True
        try:
            if request.settings.on_token is not None:
                request.settings.on_token(row.index, row.ids[-1])
            completion = self.ending.completion(row)
        except Exception as exc:
            # What the text or the listener of one row raises is no reason to fail the others.
            request.fail(_named(exc))
            return True
        if completion is not None:
            request.finish(row.index, completion)
        return completion is not None

    def _remove(self, row: Row) -> None:
        """Take a row out of the batch; the last row moves into its place."""
        place, last = self.batch.index(row), self.batch.pop()
        if last is not row:
            self.decoder.slab.move(len(self.batch), place, last.length)
            self.batch[place] = last
        if not self.batch and self.decoder.slab.capacity > _BIG:
            self.decoder.reset()

    def _abandon(self, exc: Exception, request: Request | None) -> None:
        """Fail one request that could not begin, or else every row."""
        error = _named(exc)
        if request is not None:
            request.fail(error)
            for row in [row for row in self.batch if row.request is request]:
                self._remove(row)
            return
        for row in self.batch:
            row.request.fail(error)
        self.batch.clear()
        self.decoder.reset()


def start(lanes: Sequence[Lane]) -> None:
    """Start lanes; the number of torch threads of the calling thread stays what it is."""
    before = torch.get_num_threads()
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.ready.wait()
    # The setting is per thread, but new threads inherit the one that was made last.
    torch.set_num_threads(before)


def _named(exc: Exception) -> AgentkdError:
    if isinstance(exc, AgentkdError):
        return exc
    return ProviderError(f"The embedded engine failed: {type(exc).__name__}: {exc}")
