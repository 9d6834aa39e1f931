"""Keys and values on a disk: blocks in a scratch file without a name, of which one layer at a time is in host RAM.

The file has a part for each layer, in which the blocks of a sequence lie one behind the other as far as the allocator
found a run, so that a layer is read with few large reads. A block is whole pages, and holds the parts of its rows one
behind the other. Blocks are read into the *landing*, where the kernel finds them by a table of their own, and the pages
of new tokens are changed there. So no row stays in RAM, however many sequences there are.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.errors import ReadError, WriteError
from penstock.io.files import SourceFile
from penstock.io.reader import ALIGNMENT, Read, Reader, Write
from penstock.io.settings import ReadSettings
from penstock.offload.blocks import KVCost
from penstock.offload.kv import KVStore, Places, Rows, Tokens, Visit
from penstock.offload.kv_rows import CodedRows, KeptRows
from penstock.offload.trace import KV_DISK, Trace

__all__ = ["DiskKV", "DiskRoom", "DiskTraffic"]


@dataclass(frozen=True, slots=True)
class DiskRoom:
    """Room for keys and values on a disk: bytes of a file in `directory`, and of host RAM that they are read into.

    A `reader` that is given is used and closed instead of the one that `settings` choose.
    """

    nbytes: int
    landing_nbytes: int
    directory: Path
    settings: ReadSettings
    reader: Reader | None = None


@dataclass(frozen=True, slots=True)
class DiskTraffic:
    """Bytes of keys and values that went from and to a disk, and the seconds that this took."""

    read_bytes: int = 0
    written_bytes: int = 0
    seconds: float = 0.0


_Piece = tuple[int, int, int]
"""Bytes that are read or written: where they are in the file and in the landing, and how many."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's part of the file, from `begin` on, in blocks of `stride` bytes; `kept` are those in the landing.

    `parts` are pairs of numbers: where a part of the rows begins in a block, and the bytes that a token has of it.
    """

    begin: int
    stride: int
    kept: tuple[KeptRows, ...]
    parts: tuple[tuple[int, int], ...]


class DiskKV(KVStore):
    """A store whose blocks are in `file`, for one thread that alone drives `reader`. The caller closes both.

    `landing` is flat uint8 memory, aligned for the reader, for at least one block of each layer. What goes wrong on the
    disk is ReadError or WriteError, which name `directory`.
    """

    def __init__(
        self,
        file: SourceFile,
        reader: Reader,
        landing: Tensor,
        *,
        cost: KVCost,
        directory: Path,
        trace: Trace | None = None,
    ) -> None:
        self._file = file
        self._reader = reader
        self._landing = landing
        self._bytes = landing.numpy().data
        self._directory = directory
        self._trace = trace
        self._parts: dict[int, _Layer] = {}
        self._most_blocks = len(landing) // cost.stride_nbytes
        self.traffic = DiskTraffic()
        super().__init__(limit_nbytes=file.nbytes, cost=cost.on_disk, allocate=_no_memory)

    def could_hold(self, num_tokens: int) -> bool:
        """Say whether a sequence of `num_tokens` tokens could be acquired, and one layer of it read at once."""
        return super().could_hold(num_tokens) and self._blocks_of(num_tokens) <= self._most_blocks

    def locate(self, spans: Sequence[Tokens]) -> Places:
        """Say where the new tokens of a micro-batch go; nothing is one run in memory."""
        return replace(super().locate(spans), firsts=(None,) * len(spans))

    def put(self, layer: int, places: Places, rows: Sequence[CodedRows]) -> Rows:
        """Store one layer's new rows of a micro-batch. What is returned is valid for no sequence: `visit` reads."""
        there = self._parts.get(layer) or self._open_part(layer, rows)
        size = self._cost.block_tokens
        slots = places.slots.numpy()
        starts = np.flatnonzero(np.diff(slots // size, prepend=-1))  # of each block's tokens, which are neighbours
        at_once = len(self._landing) // there.stride
        for first in range(0, len(starts), at_once):
            some = starts[first : first + at_once]
            end = starts[first + at_once] if first + at_once < len(starts) else len(slots)
            tokens = slice(int(some[0]), int(end))
            self._change(there, slots[tokens], some - some[0], [_select(row, tokens) for row in rows])
        return Rows(there.kept, places)

    def _change(
        self, there: _Layer, slots: NDArray[np.int64], starts: NDArray[np.int64], rows: Sequence[CodedRows]
    ) -> None:
        """Read the pages of blocks that have older tokens too, put new tokens there, and write what has changed."""
        size = self._cost.block_tokens
        counts = np.diff(starts, append=len(slots))
        reads: list[_Piece] = []
        writes: list[_Piece] = []
        for number, (first, count) in enumerate(zip(slots[starts].tolist(), counts.tolist(), strict=True)):
            block, token = divmod(first, size)
            for begin, end in _pages(there.parts, token, token + count, there.stride, size):
                piece = (there.begin + block * there.stride + begin, number * there.stride + begin, end - begin)
                writes.append(piece)
                if token:
                    reads.append(piece)
        self._read(reads)
        landed = torch.from_numpy(np.repeat(np.arange(len(starts)), counts))
        for kept, new in zip(there.kept, rows, strict=True):
            kept.put(landed, torch.from_numpy(slots % size), new)
        self._write(writes)

    def visit(self, layer: int, places: Places, sequences: range, *, window: int | None = None) -> Iterator[Visit]:
        """Yield some neighbours of a micro-batch, as many at a time as the landing has room for, with their rows.

        Of each sequence, the last `window` tokens are read, or all.
        """
        there, size = self._parts[layer], self._cost.block_tokens
        table = places.table.numpy()
        at_once = len(self._landing) // there.stride
        group: list[tuple[int, NDArray[np.int32]]] = []
        count, first = 0, sequences.start
        for index in sequences:
            end = places.ends[index]
            begin = 0 if window is None else max(end - window, 0) // size
            blocks = table[index, begin : -(-end // size)]
            if group and count + len(blocks) > at_once:
                yield self._land(there, places, first, group)
                count, first = 0, index
                group = []
            group.append((begin, blocks))
            count += len(blocks)
        if group:
            yield self._land(there, places, first, group)

    def _land(self, there: _Layer, places: Places, first: int, group: Sequence[tuple[int, NDArray[np.int32]]]) -> Visit:
        """Read blocks of sequences from `first` on; of each, the number of its first one and where they are."""
        reads = []
        table = np.zeros((len(group), max(begin + len(blocks) for begin, blocks in group)), np.int32)
        landed = 0
        for row, (begin, blocks) in zip(table, group, strict=True):
            row[begin : begin + len(blocks)] = np.arange(landed, landed + len(blocks))
            for run in np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1):
                offset = there.begin + int(run[0]) * there.stride
                reads.append((offset, landed * there.stride, len(run) * there.stride))
                landed += len(run)
        self._read(reads)
        which = slice(first, first + len(group))
        inside = replace(
            places,
            table=torch.from_numpy(table),
            lengths=places.lengths[which],
            ends=places.ends[which],
            firsts=places.firsts[which],
        )
        return Visit(which, Rows(tuple(kept.leading(landed) for kept in there.kept), inside), slice(0, len(group)))

    def _read(self, pieces: Iterable[_Piece]) -> None:
        reads = [Read(self._file, offset, self._bytes[begin:end]) for offset, begin, end in _joined(pieces)]
        if not reads:
            return
        with self._moving("read"):
            self._reader.wait(self._reader.submit(reads))
            self._check_size()
        nbytes = sum(len(read.memory) for read in reads)
        self.traffic = replace(self.traffic, read_bytes=self.traffic.read_bytes + nbytes)

    def _write(self, pieces: Iterable[_Piece]) -> None:
        writes = [Write(self._file, offset, self._bytes[begin:end]) for offset, begin, end in _joined(pieces)]
        with self._moving("written"):
            self._reader.wait(self._reader.submit_writes(writes))
        nbytes = sum(len(write.memory) for write in writes)
        self.traffic = replace(self.traffic, written_bytes=self.traffic.written_bytes + nbytes)

    def _check_size(self) -> None:
        """Raise ReadError when the file has become shorter: what lies behind its end is not read, and no error."""
        there = self._file.path.stat().st_size
        if there < self._file.nbytes:
            raise ReadError("the scratch file was cut short", wanted=f"{self._file.nbytes} bytes", got=there)

    @contextmanager
    def _moving(self, how: str) -> Iterator[None]:
        """Add up time, and say of errors whose file it is: its own name is a number."""
        begun = time.perf_counter()
        try:
            yield
        except (ReadError, WriteError) as error:
            what = f"keys and values on NVMe could not be {how}: {error.what}"
            named = type(error)(what, file=self._directory, wanted=error.wanted, got=error.got, fix=error.fix)
            named.errno = error.errno
            raise named from error
        finally:
            ended = time.perf_counter()
            self.traffic = replace(self.traffic, seconds=self.traffic.seconds + ended - begun)
            if self._trace is not None:
                self._trace.add(KV_DISK, how, begun, ended)

    def _open_part(self, layer: int, rows: Sequence[CodedRows]) -> _Layer:
        """Give a layer its part of the file, when it first stores something."""
        size = self._cost.block_tokens
        parts = [part for row in rows for part in row.parts]
        sizes = [prod(part.shape[1:]) * part.element_size() for part in parts]
        begins = [size * sum(sizes[:number]) for number in range(len(sizes))]
        stride = self._cost.stride_of(sum(sizes))
        whole = self._landing[: len(self._landing) // stride * stride].view(-1, stride)
        views = iter(
            whole[:, begin : begin + size * nbytes].view(part.dtype).unflatten(1, (size, *part.shape[1:]))
            for part, begin, nbytes in zip(parts, begins, sizes, strict=True)
        )
        kept = tuple(KeptRows.made_of(row, lambda _: next(views)) for row in rows)
        made = _Layer(self._carved, stride, kept, tuple(zip(begins, sizes, strict=True)))
        self._carved += self._allocator.num_blocks * stride
        assert self._carved <= self._file.nbytes, "layers keep no more than the rehearsal has seen"
        self._parts[layer] = made
        return made

    def close(self) -> None:
        """Let go of the landing and of the file."""
        super().close()
        self._parts.clear()
        del self._landing, self._bytes


def _joined(pieces: Iterable[_Piece]) -> Iterator[tuple[int, int, int]]:
    """Yield where pieces are in the file, and where they begin and end in the landing; neighbours in both as one."""
    offset = begin = end = 0
    for there, here, nbytes in pieces:
        if end > begin and here == end and there - offset == end - begin:
            end += nbytes
            continue
        if end > begin:
            yield offset, begin, end
        offset, begin, end = there, here, here + nbytes
    if end > begin:
        yield offset, begin, end


def _select(row: CodedRows, tokens: slice) -> CodedRows:
    return row.map(lambda part: part[tokens])


def _no_memory(_: int) -> Tensor:
    """Blocks are in the file."""
    return torch.empty(0, dtype=torch.uint8)


@cache
def _pages(parts: tuple[tuple[int, int], ...], first: int, end: int, stride: int, size: int) -> list[tuple[int, int]]:
    """Return the pages of a block, as byte ranges, that hold any of its tokens `first` .. `end` - 1."""
    if (first, end) == (0, size):
        return [(0, stride)]
    made: list[tuple[int, int]] = []
    for begin, nbytes in sorted(parts):
        low = (begin + first * nbytes) // ALIGNMENT * ALIGNMENT
        high = -(-(begin + end * nbytes) // ALIGNMENT) * ALIGNMENT
        if made and low <= made[-1][1]:
            low, high = made[-1][0], max(made.pop()[1], high)
        made.append((low, high))
    return made
