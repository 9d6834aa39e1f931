"""Keys and values in host RAM or on NVMe, and attention beside them on the CPU.

What touches this store runs on one thread, in the order in which forwards have asked for it: new rows are there before
anything reads them, and a sequence's tokens come in order. Queries and single tokens' rows come from the device through
staging memory, by copies that nobody waits for but that thread; results go back the same way. Rows of prompts are
copied straight to where they rest, if that is pinned memory in which they lie together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from penstock.kernels.attention import Rule
from penstock.kernels.paged_cpu import AttendPaged
from penstock.kernels.pinned import read_pinned
from penstock.offload.clock import Clock, Stopwatch
from penstock.offload.copies import CudaClock
from penstock.offload.groups import KVGroups
from penstock.offload.kv import KVStore, Places, Tokens, Visit
from penstock.offload.kv_rows import encode
from penstock.offload.trace import ATTENTION, STALLS, Trace

__all__ = ["STAGED_NBYTES", "HostKV", "HostRows"]

STAGED_NBYTES = 64 << 20
"""New rows on their way to the store: a forward waits when there are more, unless they are one micro-batch's."""

_WAITING = "attention beside keys"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HostRows:
    """What one layer keeps beside the device of a micro-batch's sequences.

    `kinds` are shape and dtype of a token's rows. `new` [T, H, ...] are the rows that were just stored, as they are
    stored, still on the device; none where another layer has stored them.
    """

    home: HostKV
    layer: int
    places: Places
    kinds: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    new: tuple[Tensor, ...]
    shared: int | None = None

    def sharing_values(self, size: int) -> HostRows:
        """Return keys and values, where all that is kept are keys whose first `size` elements are the values."""
        return replace(self, shared=size)

    def both(self, stored: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return keys and values of rows as they are stored."""
        keys, values = (stored[0], stored[0][..., : self.shared]) if self.shared else stored
        return keys, values

    @property
    def num_heads(self) -> int:
        """Heads of the keys."""
        return self.kinds[0][0][0]

    @property
    def value_size(self) -> int:
        """Elements of a value of one head."""
        return self.shared or self.kinds[-1][0][-1]

    @property
    def head_nbytes(self) -> int:
        """Bytes of one token's rows in one head."""
        return sum(prod(shape[1:]) * dtype.itemsize for shape, dtype in self.kinds)

    def known(self, index: int) -> int:
        """Tokens of one sequence of which the rows are not in `new`, but in the store."""
        begin, end = self.places.offsets[index : index + 2]
        return self.places.ends[index] - (end - begin if self.new else 0)


class HostKV:
    """What a micro-batch whose sequences' home is host RAM, or NVMe, has as its store. Close drains it; idempotent.

    `store` holds their blocks there. `states` is the device's store, which keeps what these sequences have besides:
    recurrent states are computed with on the device. `attend` runs on `num_threads` threads, and in a trace in `lane`.
    Whatever goes wrong on the thread comes out of `wait`, or else of `settle`.
    """

    parks = True

    def __init__(
        self,
        store: KVStore,
        *,
        states: KVStore | KVGroups,
        device: torch.device,
        attend: AttendPaged,
        num_threads: int,
        kv_dtype: str = "auto",
        trace: Trace | None = None,
        lane: str = ATTENTION,
    ) -> None:
        self.store = store
        self._lane = lane
        self._kv_dtype = kv_dtype
        self.has_kernel = kv_dtype != "int4"  # else `attend` cannot read the rows
        self.state, self.keep_state = states.state, states.keep_state
        self._attend = attend
        self._num_threads = num_threads
        self._device = device
        self._trace = trace
        self._watch = Stopwatch(CudaClock(device) if device.type == "cuda" else Clock(), trace)
        self._kinds: dict[int, tuple[tuple[tuple[int, ...], torch.dtype], ...]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="penstock-attention")
        self._last: Future[Any] | None = None
        self._storing: deque[tuple[Future[None], int]] = deque()
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self.attention_seconds = 0.0
        self._closed = False

    @property
    def waited_seconds(self) -> float:
        """For how long computing had nothing to do but to wait for this thread, as the device sees it."""
        return self._watch.seconds(_WAITING)

    def locate(self, spans: Sequence[Tokens]) -> Places:
        """Say where the new tokens of a micro-batch go, as `KVStore.locate` does."""
        return self.store.locate(spans)

    def append(self, layer: int, places: Places, *rows: Tensor) -> HostRows:
        """Send one layer's new rows of a micro-batch on their way, [T, H, ...] each on the device."""
        kinds = self._kinds[layer] = tuple((tuple(row.shape[1:]), row.dtype) for row in rows)
        coded = tuple(encode(row, self._kv_dtype) for row in rows)
        straight = self._device.type == "cuda" and bool(places.runs)
        nbytes = 0 if straight else sum(row.nbytes for row in coded)
        self._make_room(nbytes)
        if straight:  # prompts, in pieces that are worth a copy each: nobody need touch them on the way
            self.store.put(layer, places, coded)
            store = self._arrival()
        else:
            parts, arrived = self._stage([part for row in coded for part in row.parts])
            left = iter(parts)
            staged = tuple(row.map(lambda _: next(left)) for row in coded)

            def store() -> None:
                arrived()
                self.store.put(layer, places, staged)

        self._storing.append((self._submit(store), nbytes))
        return HostRows(self, layer, places, kinds, tuple(row.whole() for row in coded))

    def read(self, layer: int, places: Places) -> HostRows:
        """Return what `append` stored for this layer: layers that share another layer's keys use it."""
        return HostRows(self, layer, places, self._kinds[layer], ())

    def attend(self, kept: HostRows, query: Tensor, rule: Rule) -> Future[Tensor]:
        """Attend beside the keys for the n leading sequences with one new token: query [n, Hq, D] -> [n, Hq, Dv].

        The result lies in staging memory. The rule has neither a bias nor chunks.
        """
        places, count = kept.places, len(query)
        asked = (query,) if rule.sinks is None else (query, rule.sinks)
        staged, arrived = self._stage(asked)
        out = self._staging((count, query.shape[1], kept.value_size), query.dtype)

        def work() -> Tensor:
            arrived()
            sinks = None if rule.sinks is None else staged[1].float()
            for visit in self.store.visit(kept.layer, places, range(count), window=rule.window):
                self._attend_visit(staged[0][visit.sequences], kept, visit, rule, sinks, out=out[visit.sequences])
            return out

        return self._submit(work)

    def _attend_visit(
        self, query: Tensor, kept: HostRows, visit: Visit, rule: Rule, sinks: Tensor | None, *, out: Tensor
    ) -> None:
        rows = visit.rows if kept.shared is None else visit.rows.sharing_values(kept.shared)
        begun = time.perf_counter()
        self._attend(
            query,
            *rows.blocks,
            rows.places.table[visit.inside],
            rows.places.lengths[visit.inside],
            scale=rule.scale,
            window=rule.window,
            softcap=rule.softcap,
            sinks=sinks,
            key_scales=rows.scales[0],
            value_scales=rows.scales[1],
            num_threads=self._num_threads,
            out=out,
        )
        ended = time.perf_counter()
        self.attention_seconds += ended - begun
        if self._trace is not None:
            self._trace.add(self._lane, f"layer {kept.layer}", begun, ended, sequences=len(query))

    def fetch(self, kept: HostRows, index: int, heads: slice) -> Future[tuple[Tensor, ...]]:
        """Return the `known` tokens of one sequence, [L, heads, ...] each, contiguous and where the device can read.

        That is where they are stored, if they are one piece there, or else staging memory.
        """
        length, count = kept.known(index), heads.stop - heads.start
        is_whole = kept.places.firsts[index] is not None and count == kept.num_heads and self._kv_dtype == "auto"
        shapes = () if is_whole else ((length, count, *shape[1:]) for shape, _ in kept.kinds)
        staged = tuple(self._staging(shape, dtype) for shape, (_, dtype) in zip(shapes, kept.kinds, strict=False))

        def work() -> tuple[Tensor, ...]:
            (visit,) = self.store.visit(kept.layer, kept.places, range(index, index + 1))
            stored = visit.rows.of(visit.inside.start, heads)
            rows = tuple(row[:length] for row in stored)
            for copy, row in zip(staged, rows, strict=False):
                copy.copy_(row)
            return staged or rows

        return self._submit(work)

    def wait(self, future: Future[T]) -> T:
        """Return what the thread has made; block until it is there. Raises what went wrong."""
        if future.done():
            return future.result()
        waiting = self._watch.begin()
        try:
            return future.result()
        finally:
            self._watch.end(_WAITING, waiting, lane=STALLS)

    def send(self, rows: Tensor, *, out: Tensor) -> None:
        """Copy rows that the thread has made onto `out` on the device, past the weights that are on their way."""
        read_pinned(rows, out=out)
        if self._device.type == "cuda":
            self._forget()
            self._leaving.append((self._arrived(), rows))  # nothing else may have the memory until then

    def _forget(self) -> None:
        while self._leaving and self._leaving[0][0].query():
            self._leaving.popleft()

    def settle(self) -> None:
        """Block until all rows are stored. Raises what went wrong with any of them."""
        while self._storing:
            self.wait(self._storing.popleft()[0])
        self._forget()
        if self._last is not None and self._last.done():
            self._last = None  # its result may be a view of the store

    def release(self, sequence: Hashable) -> None:
        """Give back a sequence's blocks, when nothing that was asked for before can touch them any more."""
        if self._last is not None:
            wait([self._last])
            self._last = None
            self._storing.clear()
        self.store.release(sequence)

    def close(self) -> None:
        """Let what is under way end, and the thread with it. Sequences may still be released."""
        if not self._closed:
            self._closed = True
            try:
                self._arrival()()  # rows on their way straight to the store, which goes now
            finally:
                self._thread.shutdown(cancel_futures=True)
                self._last = None
                self._storing.clear()
                self._leaving.clear()
                self.store.close()

    def _make_room(self, nbytes: int) -> None:
        """Wait until new rows may be under way besides those that are."""
        while self._storing and (
            self._storing[0][0].done() or nbytes + sum(size for _, size in self._storing) > STAGED_NBYTES
        ):
            self.wait(self._storing.popleft()[0])

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        def run() -> T:
            with torch.inference_mode():
                return work()

        future = self._thread.submit(run)
        self._last = future
        return future

    def _staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")

    def _stage(self, rows: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """Start copies to staging memory; return them, and what blocks until they are there."""
        staged = tuple(self._staging(tuple(row.shape), row.dtype).copy_(row, non_blocking=True) for row in rows)
        return staged, self._arrival()

    def _arrival(self) -> Callable[[], None]:
        """Return what blocks until all copies are there that have been started."""
        return self._arrived().synchronize if self._device.type == "cuda" else _nothing

    def _arrived(self) -> torch.cuda.Event:
        """Record an event after all that has been issued."""
        event = torch.cuda.Event(blocking=True)  # its waiter sleeps: the cores are for attention
        event.record(torch.cuda.current_stream(self._device))
        return event


def _nothing() -> None:
    """Copies on the CPU are done when they have been issued."""
