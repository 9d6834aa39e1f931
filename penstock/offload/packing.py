"""Make coded parts of plain tensors while their units are loaded: on the device, of pieces that the disk lane brings.

So a GPU does the coding, and loading goes on at the pace of the disk; the CPU takes all its cores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from penstock.errors import ConfigError, FileChangedError
from penstock.offload.buffers import DTYPES
from penstock.offload.chunks import plan_chunks
from penstock.offload.copies import Copies
from penstock.offload.encode import PIECE_NBYTES, AtOnce, DoesNotPay, encoder_for, encoding_threads, piece_nbytes
from penstock.offload.lane import DiskLane, Fetch
from penstock.offload.layout import Encoding, Extent

__all__ = ["Packer", "piece_for"]

_BUFFERS = 3
"""Pieces on the device: one is encoded while the next ones arrive."""

_SPACE = 16
"""Encoding takes less than so many times a piece's bytes of memory."""


def piece_for(free_nbytes: int) -> int:
    """Return how large pieces may be, to be encoded in so many bytes of the device's memory."""
    return max(min(free_nbytes // (_SPACE + _BUFFERS), PIECE_NBYTES) // 2048, 8) * 2048


class Packer:
    """Runs all `encodings`, in this order, in several calls of `fill`. A context manager.

    `chunk_nbytes` is the lane's region. Pieces are about `at_once` bytes.
    """

    def __init__(
        self,
        encodings: Sequence[Encoding],
        lane: DiskLane,
        copies: Copies,
        device: torch.device,
        *,
        chunk_nbytes: int,
        at_once: int,
    ) -> None:
        self._lane = lane
        self._copies = copies
        self._device = device
        self._chunk_nbytes = chunk_nbytes
        self._at_once = at_once
        self._exit = ExitStack()
        needs_threads = bool(encodings) and device.type != "cuda"
        self._workers = self._exit.enter_context(encoding_threads()) if needs_threads else AtOnce()
        size = max((min(self._piece_nbytes(one), one.nbytes) for one in encodings), default=0)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)]
        self._pieces = self._read(encodings)

    def fill(self, encodings: Iterable[Encoding], buffer: Tensor) -> None:
        """Make what `encodings` make of a unit's `buffer`, on the calling thread's stream.

        Raises ReadError and FileChangedError, and ConfigError for values that the codec does not take.
        """
        for encoding in encodings:
            try:
                self._encode(encoding, buffer)
            except DoesNotPay as reason:
                if encoding.table:  # then its exponents were counted, and it did
                    raise _changed(encoding) from None
                raise ConfigError(
                    f"tensor {encoding.name!r} cannot be packed: {reason}", fix=f"Add --exclude '{encoding.name}'."
                ) from None

    def _encode(self, encoding: Encoding, buffer: Tensor) -> None:
        table = torch.frombuffer(bytearray(encoding.table), dtype=torch.uint8) if encoding.table else None
        if table is not None:
            table = table.to(self._device)
        encoder = encoder_for(encoding.coding, self._workers, search=False, table=table)
        ends = list(encoding.destinations)
        limits = [start + size for start, size in zip(encoding.destinations, encoding.sizes, strict=True)]
        left = encoding.nbytes
        while left:
            piece = next(self._pieces)
            left -= piece.numel()
            for number, part in enumerate(encoder.encode(piece.view(DTYPES[encoding.coding.dtype]))):
                content = part.flatten().view(torch.uint8)
                start, ends[number] = ends[number], ends[number] + content.numel()
                if ends[number] > limits[number]:
                    raise _changed(encoding)
                buffer[start : ends[number]].copy_(content)

    def _piece_nbytes(self, encoding: Encoding) -> int:
        return piece_nbytes(encoding.coding, at_most=self._at_once)

    def _ranges(self, encodings: Sequence[Encoding]) -> Iterator[Extent]:
        for one in encodings:
            size = self._piece_nbytes(one)
            for begin in range(0, one.nbytes, size):
                yield Extent(one.file, one.source + begin, min(size, one.nbytes - begin), 0)

    def _read(self, encodings: Sequence[Encoding]) -> Generator[Tensor, None, None]:
        """Yield pieces on the device, the next ones on their way; each is good until the next is asked for."""
        under_way: deque[Fetch] = deque()
        free = deque(self._buffers)
        try:
            for extent in self._ranges(encodings):
                under_way.append(self._start(extent, free[0]))
                free.rotate(-1)
                if len(under_way) == _BUFFERS:
                    yield from self._next(under_way)
            while under_way:
                yield from self._next(under_way)
        finally:
            for fetch in under_way:
                fetch.arrived.exception()  # nobody takes it any more, but it is still on its way
            self._copies.block_until(self._copies.expanded())

    def _start(self, extent: Extent, buffer: Tensor) -> Fetch:
        """Bring a piece to a buffer, which is free once what has been issued is done."""
        chunks = plan_chunks([extent], chunk_nbytes=self._chunk_nbytes)
        after = self._copies.computed()
        fetch = Fetch(chunks, buffer[: extent.nbytes], 0, self._copies, after=after, name="a piece to encode")
        self._lane.start(fetch)
        return fetch

    def _next(self, under_way: deque[Fetch]) -> Iterator[Tensor]:
        fetch = under_way.popleft()
        self._copies.wait_for_copies(fetch.arrived.result())
        yield fetch.buffer

    def close(self) -> None:
        """Let go of threads and memory."""
        self._pieces.close()
        self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _changed(encoding: Encoding) -> FileChangedError:
    return FileChangedError("other weights than a moment ago", file=encoding.file.path, fix="Begin again.")
