"""What sequences remember between passes: keys and values per layer, and the states of recurrent mixers.

Keys and values lie in blocks of a few tokens. All layers share one allocation, in which each has a part of its own; a
sequence has the same blocks in every layer. So where a micro-batch's tokens are is found once (`Places`), and a layer
stores them all with one indexed copy.

A sequence reserves blocks for so many tokens when it starts, may ask for more while it runs, and gives all back when it
ends or gives way to another one. Within what it has reserved it never waits for memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.errors import ClosedError
from penstock.offload.blocks import BLOCK_TOKENS, BlockAllocator, KVCost, is_nearly
from penstock.offload.kv_dtype import check_kv_dtype
from penstock.offload.kv_rows import CodedRows, KeptRows, encode

__all__ = ["KVCost", "KVStatistics", "KVStore", "Places", "Rows", "Singles", "Tokens", "Visit"]

RUN_TOKENS = 32
"""From so many new tokens of a sequence on, they are copied into host RAM by themselves: two threads do 24 GB/s so, but
12 GB/s with one indexed copy of all."""

TYPICAL_TOKENS = 1024
"""The length of sequences that memory is divided for until a run says how long its own are."""


class Tokens(Protocol):
    """Consecutive new tokens `start` .. `end` - 1 of one sequence."""

    @property
    def sequence(self) -> Hashable:
        """The sequence."""

    @property
    def start(self) -> int:
        """Its tokens that were stored before."""

    @property
    def end(self) -> int:
        """Its tokens that will be stored."""


@dataclass(frozen=True, slots=True)
class KVStatistics:
    """A snapshot: bytes in use, the most that ever were, running sequences, blocks in all and those nobody has."""

    nbytes: int
    peak_nbytes: int
    num_sequences: int
    num_blocks: int
    num_free_blocks: int


@dataclass(frozen=True, slots=True)
class Singles:
    """The first `count` sequences of a micro-batch, which have one new token each: their part of its `Places`."""

    count: int
    table: Tensor
    lengths: Tensor
    max_length: int


@dataclass(frozen=True, slots=True)
class Places:
    """Where the T tokens of a micro-batch go, and where all tokens of its N sequences are; the same in every layer.

    `slots` [T] int64 numbers tokens of the pool, `positions` [T] int64 those of the sequences; `table` [N, width] int32
    names each sequence's blocks in order, `lengths` [N] int32 its tokens, new ones included. They are on the store's
    device. `offsets` are the N + 1 borders of the sequences in the micro-batch, `ends` the lengths again, as plain
    numbers, and `firsts` the slot of a sequence's first token where its blocks are one run, else None.
    """

    slots: Tensor
    positions: Tensor
    table: Tensor
    lengths: Tensor
    offsets: tuple[int, ...]
    ends: tuple[int, ...]
    firsts: tuple[int | None, ...]
    singles: Singles

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Which tokens go into slots that lie one behind the other: first and last + 1, and the first slot.

        None of them, where sequences are scattered or have few new tokens each.
        """
        if self.offsets[-1] < RUN_TOKENS * len(self.ends) or None in self.firsts:
            return ()
        borders = zip(self.firsts, self.ends, pairwise(self.offsets), strict=True)
        return tuple((begin, end, (first or 0) + filled - (end - begin)) for first, filled, (begin, end) in borders)


@dataclass(frozen=True, slots=True)
class Rows:
    """What one layer keeps of a micro-batch's sequences, and the places.

    With `shared_size`, all that is kept are keys, whose first `shared_size` elements are the values. `new` are the rows
    [T, H, ...] of the micro-batch's own tokens, as they rest; none where another layer has stored them.
    """

    kept: tuple[KeptRows, ...]
    places: Places
    shared_size: int | None = None
    new: tuple[CodedRows, ...] = ()

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """What rows rest as, [num_blocks, block_tokens, H, ...] each."""
        codes = tuple(kept.codes for kept in self.kept)
        return codes if self.shared_size is None else (codes[0], self.kept[0].first(self.shared_size))

    @property
    def scales(self) -> tuple[Tensor | None, ...]:
        """What quantised rows are multiplied with, for each of `blocks`; None where they are not quantised."""
        scales = tuple(kept.scales for kept in self.kept)
        return scales if self.shared_size is None else scales * 2

    @property
    def value_size(self) -> int:
        """Elements of a value."""
        return self.kept[-1].size if self.shared_size is None else self.shared_size

    def of(self, index: int, heads: slice = slice(None)) -> tuple[Tensor, ...]:
        """Return all tokens of one sequence in the model's dtype, [L, H, ...] each.

        They are views where its blocks are one run and rows rest as they came, else copies.
        """
        length, first = self.places.ends[index], self.places.firsts[index]
        if first is not None:
            made = tuple(kept.read_run(first, length, heads) for kept in self.kept)
        else:
            used = self.places.table[index, : -(-length // self.blocks[0].shape[1])]
            made = tuple(kept.read_blocks(used, length, heads) for kept in self.kept)
        return self._both(made)

    def of_new(self, tokens: slice) -> tuple[Tensor, ...]:
        """Return some of the micro-batch's own tokens in the model's dtype, [T, H, ...] each, just as `of` does."""
        return self._both(tuple(rows.map(lambda part: part[tokens]).whole() for rows in self.new))

    def _both(self, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return made if self.shared_size is None else (made[0], made[0][..., : self.shared_size])

    def sharing_values(self, size: int) -> Rows:
        """Return keys and values, where all that is kept are keys whose first `size` elements are the values."""
        assert len(self.kept) == 1, "there are keys only"
        return replace(self, shared_size=size)

    def copy_nbytes(self, index: int) -> int:
        """Bytes that `of` takes for all heads of one sequence; 0 where it returns views."""
        scattered = self.places.firsts[index] is None
        token = sum(kept.copy_nbytes(scattered=scattered) for kept in self.kept)
        return token * (self.places.ends[index] + self.blocks[0].shape[1])

    def new_nbytes(self, num_tokens: int) -> int:
        """Bytes that `of_new` takes; 0 where it returns views."""
        return num_tokens * sum(kept.copy_nbytes(scattered=False) for kept in self.kept)

    def head_groups(self, index: int, limit_nbytes: int) -> Iterator[slice]:
        """Yield all heads, in parts of which `of` copies at most `limit_nbytes` or one head's, where it copies."""
        num_heads = self.blocks[0].shape[2]
        needed = self.copy_nbytes(index)
        size = num_heads if needed <= limit_nbytes else max(limit_nbytes * num_heads // needed, 1)
        for first in range(0, num_heads, size):
            yield slice(first, min(first + size, num_heads))


@dataclass(frozen=True, slots=True)
class Visit:
    """Neighbours of a micro-batch whose rows are in memory now: `sequences`, and the same `inside` the rows' places."""

    sequences: slice
    rows: Rows
    inside: slice


@dataclass(slots=True)
class _Sequence:
    capacity: int
    reserved: int
    blocks: NDArray[np.int32]
    run: int  # leading blocks that lie one behind the other
    filled: int = 0
    states: dict[int, tuple[Any, int]] = field(default_factory=dict)


class KVStore:
    """Keeps keys, values and recurrent states of running sequences within `limit_nbytes`.

    `cost` is what admission charges. The blocks are one allocation on `device`, made here and again only between runs,
    when sequences of other lengths come and so what they keep besides blocks takes another share of the limit.
    `limit_nbytes=None` means that the caller does the counting (a rehearsal): then blocks grow as sequences come.
    `allocate` gives flat uint8 memory on the device in other ways than torch's. Keys and values rest as `kv_dtype`
    (`KV_DTYPES`), states as they are.
    """

    parks = False
    """Whether forwards may wait for what is not the device's work (`host_kv`)."""

    def __init__(
        self,
        *,
        limit_nbytes: int | None = None,
        cost: KVCost | None = None,
        device: torch.device | str = "cpu",
        kv_dtype: str = "auto",
        allocate: Callable[[int], Tensor] | None = None,
    ) -> None:
        self._kv_dtype = check_kv_dtype(kv_dtype)
        self._limit = limit_nbytes
        self._cost = cost or KVCost(0, block_tokens=BLOCK_TOKENS)
        self._device = torch.device(device)
        self._given = allocate
        self._sequences: dict[Hashable, _Sequence] = {}
        self._allocator = BlockAllocator()
        self._layers: dict[int, tuple[KeptRows, ...]] = {}
        self._opening = Lock()
        self._pool: Tensor | None = None
        self._carved = 0
        self._reserved = 0
        self._peak = 0
        self._closed = False
        self.prepare((TYPICAL_TOKENS,))

    def _allocate(self, nbytes: int) -> Tensor:
        return self._given(nbytes) if self._given else torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def prepare(self, lengths: Sequence[int], *, least: Sequence[int] = (), num_elsewhere: int = 0) -> None:
        """Divide the limit for sequences of these lengths, none of which is running yet, unless it nearly is.

        They may be known to have `least` tokens only, as in `KVCost.divide`. `num_elsewhere` have
        their blocks elsewhere.
        """
        if self._limit is None or not lengths or self._sequences or self._closed:
            return
        wanted = self._cost.divide(self._limit, lengths, least=least, num_elsewhere=num_elsewhere)
        there = self._allocator.num_blocks
        left, wanted_left = (self._limit - blocks * self._cost.block_nbytes for blocks in (there, wanted))
        needed = max(map(self._blocks_of, self._cost.fitting(self._limit, lengths)), default=0)
        if there >= needed and is_nearly(there, wanted) and is_nearly(left, wanted_left):
            return
        self.limit(self._limit)  # the old pool goes before the next one is made
        self._pool = self._allocate(wanted * self._cost.block_nbytes)
        self._allocator = BlockAllocator(wanted)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self._allocator.num_blocks * self._cost.block_nbytes

    @property
    def pool(self) -> tuple[int, int]:
        """Where the blocks lie in memory, and how many there are: each layer's rows stay there while these do."""
        return (0 if self._pool is None else self._pool.data_ptr()), self._allocator.num_blocks

    def limit(self, nbytes: int) -> None:
        """Give the blocks back and set another limit; `prepare` then divides it. No sequence may be running."""
        assert not self._sequences, "blocks that are in use stay"
        self._limit = nbytes
        self._layers.clear()
        self._pool, self._carved = None, 0
        self._allocator = BlockAllocator()

    def fits(self, num_tokens: int) -> bool:
        """Say whether a sequence of `num_tokens` tokens can be acquired now."""
        if self._limit is None:
            return True
        if not self._sequences:
            return self._cost.of(num_tokens) <= self._limit
        besides = (len(self._sequences) + 1) * self._cost.sequence_nbytes
        left = self._limit - self._allocator.num_blocks * self._cost.block_nbytes
        return besides <= left and self._blocks_of(num_tokens) <= self._allocator.num_free

    def could_hold(self, num_tokens: int) -> bool:
        """Say whether a sequence of `num_tokens` tokens could be acquired while none is running."""
        return self._limit is None or self._cost.of(num_tokens) <= self._limit

    def check(self, num_tokens: int, what: str = "a sequence") -> None:
        """Raise BudgetError, naming `what`, when a sequence of `num_tokens` tokens can never be acquired."""
        if self._limit is not None:
            self._cost.check(self._limit, num_tokens, what)

    def acquire(self, sequence: Hashable, *, num_tokens: int) -> None:
        """Reserve room for a sequence of `num_tokens` tokens, for which `fits` has said yes."""
        if self._closed:
            raise ClosedError("the store of keys and values is closed")
        assert sequence not in self._sequences, f"{sequence!r} is already running"
        assert self.fits(num_tokens), "sequences start only when they fit"
        count = self._blocks_of(num_tokens)
        if self._limit is None:
            self._allocator.grow(self._allocator.num_blocks + count - self._allocator.num_free)
        elif count > self._allocator.num_free:
            self.prepare((num_tokens,))
        reserved = self._cost.of(num_tokens)
        blocks = np.array(self._allocator.allocate(count), np.int32)
        self._sequences[sequence] = _Sequence(num_tokens, reserved, blocks, _leading_run(blocks))
        self._reserved += reserved
        self._peak = max(self._peak, self._reserved)

    def assume(self, sequence: Hashable, *, num_tokens: int) -> None:
        """Let a sequence have tokens that were never stored: whatever lies there serves a rehearsal."""
        self._sequences[sequence].filled = num_tokens

    def extend(self, sequence: Hashable, *, num_tokens: int) -> bool:
        """Reserve more for a sequence: `num_tokens` tokens in all. False, and no more, if too few blocks are free."""
        if not self.can_extend(sequence, num_tokens=num_tokens):
            return False
        entry = self._sequences[sequence]
        self._add_blocks(entry, self._blocks_of(num_tokens) - len(entry.blocks))
        if num_tokens > entry.capacity:
            reserved = self._cost.of(num_tokens)
            self._reserved += reserved - entry.reserved
            self._peak = max(self._peak, self._reserved)
            entry.capacity, entry.reserved = num_tokens, reserved
        return True

    def can_extend(self, sequence: Hashable, *, num_tokens: int) -> bool:
        """Say whether `extend` would find enough."""
        count = self._blocks_of(num_tokens) - len(self._sequences[sequence].blocks)
        return self._limit is None or count <= self._allocator.num_free

    def _add_blocks(self, entry: _Sequence, count: int) -> None:
        if count <= 0:
            return
        if self._limit is None:
            self._allocator.grow(self._allocator.num_blocks + count - self._allocator.num_free)
        last = int(entry.blocks[-1]) if len(entry.blocks) else None
        more = np.array(self._allocator.allocate(count, after=last), np.int32)
        entry.blocks = np.concatenate((entry.blocks, more))
        entry.run = _leading_run(entry.blocks)

    def _blocks_of(self, num_tokens: int) -> int:
        keeps_nothing = self._limit is not None and self._cost.token_nbytes == 0
        return 0 if keeps_nothing else self._cost.blocks_of(num_tokens)

    def locate(self, spans: Sequence[Tokens]) -> Places:
        """Say where the new tokens of a micro-batch go; once for each micro-batch, in the order in which they run."""
        entries = [self._sequences[span.sequence] for span in spans]
        starts, ends = [span.start for span in spans], [span.end for span in spans]
        for entry, start, end in zip(entries, starts, ends, strict=True):
            assert entry.filled == start, "tokens of a sequence come in order"
            assert end <= entry.capacity, "a sequence never outgrows what it reserved"
            entry.filled = end
        size = self._cost.block_tokens
        used = [-(-end // size) for end in ends]
        table = np.zeros((len(spans), max(used)), np.int32)
        for row, entry, count in zip(table, entries, used, strict=True):
            row[:count] = np.resize(entry.blocks, count)  # in layers with a window, blocks come again
        lengths = np.subtract(ends, starts)
        offsets = [0, *np.cumsum(lengths).tolist()]
        positions = np.arange(offsets[-1]) - np.repeat(np.subtract(offsets[:-1], starts), lengths)
        owners = np.repeat(np.arange(len(spans)), lengths)
        slots = table[owners, positions // size].astype(np.int64) * size + positions % size
        there = _upload(np.stack((slots, positions)), table, np.array(ends, np.int32), self._device)
        count = next((place for place, length in enumerate(lengths) if length > 1), len(spans))
        return Places(
            *there,
            offsets=tuple(offsets),
            ends=tuple(ends),
            firsts=tuple(
                int(entry.blocks[0]) * size if count <= entry.run else None
                for entry, count in zip(entries, used, strict=True)
            ),
            singles=Singles(count, there[2][:count], there[3][:count], max(ends[:count], default=0)),
        )

    def append(self, layer: int, places: Places, *rows: Tensor) -> Rows:
        """Store one layer's new rows of a micro-batch, [T, H, ...] each, and return all that it keeps of its sequences.

        The rows are copied to where `places` says; what is returned is valid until a sequence is released. Attention
        must read them there, new ones too: how a prompt is cut into spans then changes no row that it sees.
        """
        if self._device.type == "cpu":  # where copies of runs are faster, and blocks may be on a disk
            return self.put(layer, places, tuple(encode(row, self._kv_dtype) for row in rows))
        kept = self._kept(layer, lambda: [encode(row[:0], self._kv_dtype) for row in rows])
        new = (each.encode(places.slots, row, self._kv_dtype) for each, row in zip(kept, rows, strict=True))
        return Rows(kept, places, new=tuple(new))

    def put(self, layer: int, places: Places, rows: Sequence[CodedRows]) -> Rows:
        """Store rows as `append` does, which have been encoded before.

        Where `places` has runs, rows may come from a GPU into pinned memory: they are under way when this returns.
        Several threads may call it, for different tokens.
        """
        kept = self._kept(layer, lambda: rows)
        runs = places.runs if self._device.type == "cpu" else ()  # a GPU has room for all of one call
        for each, new in zip(kept, rows, strict=True):
            if runs:
                each.write_runs(runs, new)
            else:
                each.write(places.slots, new)
        return Rows(kept, places, new=tuple(rows))

    def read(self, layer: int, places: Places) -> Rows:
        """Return what `append` last returned for this layer: layers that share another layer's keys use it."""
        return Rows(self._layers[layer], places)

    def visit(self, layer: int, places: Places, sequences: range, *, window: int | None = None) -> Iterator[Visit]:  # noqa: ARG002
        """Yield some neighbours of a micro-batch, in groups, with what `append` stored for this layer.

        Rows are valid until the next group. Of each sequence, attention sees the last `window` tokens, or all.
        """
        every = slice(sequences.start, sequences.stop)
        yield Visit(every, self.read(layer, places), every)

    def _kept(self, layer: int, rows: Callable[[], Sequence[CodedRows]]) -> tuple[KeptRows, ...]:
        """Return what keeps a layer's rows, all of which are like these."""
        with self._opening:
            kept = self._layers.get(layer)
            if kept is None or kept[0].codes.shape[0] < self._allocator.num_blocks:
                kept = self._layers[layer] = self._open(kept, rows())
        return kept

    def _open(self, known: tuple[KeptRows, ...] | None, rows: Sequence[CodedRows]) -> tuple[KeptRows, ...]:
        """Give a layer its part of the pool, when it first stores something; without a limit, a larger one."""
        made = tuple(KeptRows.made_of(row, self._carve) for row in rows)
        for new, old in zip(made, known or (), strict=False):
            new.take(old)
        return made

    def _carve(self, row: Tensor) -> Tensor:
        shape = (self._allocator.num_blocks, self._cost.block_tokens, *row.shape[1:])
        if self._limit is None:
            return row.new_empty(shape)
        assert self._pool is not None, "sequences have been acquired"
        begin = self._carved
        self._carved += prod(shape) * row.element_size()
        assert self._carved <= self._pool.numel(), "layers keep no more than the rehearsal has seen"
        return self._pool[begin : self._carved].view(row.dtype).view(shape)

    def state(self, layer: int, sequence: Hashable) -> Any | None:
        """Return the object that `keep_state` kept, or None for a sequence that starts."""
        kept = self._sequences[sequence].states.get(layer)
        return None if kept is None else kept[0]

    def keep_state(self, layer: int, sequence: Hashable, state: Any, *, nbytes: int) -> None:
        """Keep a recurrent mixer's state, which holds `nbytes` bytes, until the next pass."""
        self._sequences[sequence].states[layer] = (state, nbytes)

    def release(self, sequence: Hashable) -> None:
        """Give back all that a sequence holds."""
        entry = self._sequences.pop(sequence)
        self._allocator.release(entry.blocks.tolist())
        self._reserved -= entry.reserved

    def layer_nbytes(self) -> dict[int, int]:
        """Return what each layer keeps of a token."""
        return {layer: sum(rows.token_nbytes for rows in kept) for layer, kept in self._layers.items()}

    def measure(self) -> KVCost:
        """Return what a sequence really costs, from what the layers and the running sequences have stored so far."""
        tokens = sum(self.layer_nbytes().values())
        states = (sum(nbytes for _, nbytes in entry.states.values()) for entry in self._sequences.values())
        return KVCost(tokens, max(states, default=0), self._cost.block_tokens)

    def check_integrity(self) -> None:
        """Assert that every block is free or one sequence's, and that nobody holds more than was reserved."""
        held = [entry.blocks for entry in self._sequences.values()]
        held += [np.arange(start, end, dtype=np.int32) for start, end in self._allocator.free_runs()]
        every = np.concatenate(held) if held else np.empty(0, np.int32)
        num_blocks = self._allocator.num_blocks
        used = sum(len(entry.blocks) for entry in self._sequences.values())
        assert used + self._allocator.num_free == num_blocks == len(every), (
            f"{used} used and {self._allocator.num_free} free blocks are not {num_blocks}"
        )
        assert (np.bincount(every, minlength=num_blocks) == 1).all(), "a block is free or has one owner"
        assert self._reserved == sum(entry.reserved for entry in self._sequences.values())
        for entry in self._sequences.values():
            assert entry.filled <= entry.capacity
            assert len(entry.blocks) == self._blocks_of(entry.capacity)
        if self._limit is None:
            return
        assert num_blocks * self._cost.block_nbytes + len(self._sequences) * self._cost.sequence_nbytes <= self._limit
        for entry in self._sequences.values():
            states = sum(nbytes for _, nbytes in entry.states.values())
            assert states <= self._cost.sequence_nbytes, f"a sequence keeps states of {states} bytes"

    def statistics(self) -> KVStatistics:
        """Return a snapshot."""
        allocator = self._allocator
        return KVStatistics(self._reserved, self._peak, len(self._sequences), allocator.num_blocks, allocator.num_free)

    def close(self) -> None:
        """Give the memory back. Sequences may still be released; nothing else works any more."""
        self._closed = True
        self._layers.clear()
        self._pool = None


def _leading_run(blocks: NDArray[np.int32]) -> int:
    """Return how many leading blocks lie one behind the other."""
    breaks = np.flatnonzero(np.diff(blocks) != 1)
    return int(breaks[0]) + 1 if len(breaks) else len(blocks)


def _upload(
    tokens: NDArray[np.int64], table: NDArray[np.int32], lengths: NDArray[np.int32], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put both rows of `tokens`, and the others, on the device with one copy, which nobody waits for."""
    words = 2 * tokens.size
    staging = torch.empty(words + table.size + lengths.size, dtype=torch.int32, pin_memory=device.type == "cuda")
    host = staging.numpy()
    host[:words].view(np.int64)[:] = tokens.ravel()
    host[words : words + table.size] = table.ravel()
    host[words + table.size :] = lengths
    there = staging.to(device, non_blocking=True)
    slots, positions = there[:words].view(torch.int64).view(2, -1)
    return slots, positions, there[words : words + table.size].view(table.shape), there[words + table.size :]
