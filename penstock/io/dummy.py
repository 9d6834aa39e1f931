"""Safetensors files of random numbers: models of any shape to measure with, written as fast as the disk takes them."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.io.dummy_tensor import DummyTensor
from penstock.io.files import DTYPE_BITS
from penstock.io.header import MAX_HEADER_BYTES, Header, read_header
from penstock.io.scratch import Sink, check_directory, nameless_file
from penstock.io.shard import StoredTensor, header_room, shard_header

__all__ = ["dummy_file"]

_BLOCK = 1 << 22
_PIECE = 16 << 20

_RUN = 64
_SPREAD = 0.25
"""The scale of normal numbers differs from run to run, log-normally, as it does between a trained matrix's rows: their
exponents then have 2.6 bits of entropy, like trained ones. Without, they have 2.54."""


@contextlib.contextmanager
def dummy_file(
    directory: Path,
    tensors: Sequence[DummyTensor],
    *,
    seed: int = 0,
    on_write: Callable[[int, int], None] | None = None,
) -> Iterator[Header]:
    """Write a safetensors file without a name, yield its header as any checkpoint's is read, and remove it in any case.

    Matrices get normal numbers of variance 1 / fan-in, so that activations stay in range; biases are zero and other
    vectors, which are norms, one. `on_write` is called with (bytes done, bytes in all). Raises TargetError for a
    directory that cannot be written or lies in memory, and NoSpaceError for a disk without the space.
    """
    text = _header(tensors)
    total = len(text) + sum(tensor.nbytes for tensor in tensors)
    check_directory(directory, total)
    numbers = _Numbers(seed)

    def fill(sink: Sink) -> None:
        pieces = _Pieces(sink, lambda done: on_write(done, total) if on_write else None)
        pieces.write(text)
        for tensor in tensors:
            for part in numbers.bytes_of(tensor):
                pieces.write(part)
        pieces.flush()

    with nameless_file(directory, total, fill) as file:
        yield read_header(file.path, max_header_bytes=max(len(text), MAX_HEADER_BYTES))


def _header(tensors: Sequence[DummyTensor]) -> bytes:
    start = header_room((tensor.name, len(tensor.shape)) for tensor in tensors)
    starts = itertools.accumulate((tensor.nbytes for tensor in tensors), initial=start)
    stored = (
        StoredTensor(tensor.name, tensor.dtype, tensor.shape, offset, tensor.nbytes)
        for tensor, offset in zip(tensors, starts, strict=False)
    )
    return shard_header(stored, start)


class _Numbers:
    """Normal numbers from one random block, read from another place and with another scale for each tensor."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._block = self._random.standard_normal(_BLOCK, dtype=np.float32)
        spread = _SPREAD * self._random.standard_normal(_BLOCK // _RUN, dtype=np.float32)
        self._block *= np.exp(spread - _SPREAD**2).repeat(_RUN)  # of variance 1 as before
        self._scaled: dict[tuple[str, float], memoryview] = {}

    @cached_property
    def _bits(self) -> NDArray[np.uint8]:
        """Random bytes without the highest bit of an E4M3 float's exponent."""
        return np.random.default_rng(0).integers(0, 256, _BLOCK, np.uint8) & np.uint8(0xBF)

    def bytes_of(self, tensor: DummyTensor) -> Iterator[memoryview]:
        """Yield a tensor's bytes, piece by piece."""
        size = DTYPE_BITS[tensor.dtype] // 8
        block = self._block_for(tensor)
        left = tensor.nbytes
        while left:
            start = int(self._random.integers(0, _BLOCK // 2)) * size
            part = block[start : start + min(left, len(block) // 2)]
            yield part
            left -= len(part)

    def _block_for(self, tensor: DummyTensor) -> memoryview:
        if tensor.fill == "bits":
            return self._bits.data
        if tensor.fill is not None:
            key, scale = (f"{tensor.fill} of {tensor.dtype}", tensor.fill)
        elif tensor.dtype not in ("BF16", "F16", "F32") or tensor.name.endswith("bias"):
            key, scale = (f"zeros of {tensor.dtype}", 0.0)
        elif len(tensor.shape) < 2:
            key, scale = (f"ones of {tensor.dtype}", 1.0)
        else:
            key, scale = (tensor.dtype, 1.0 / math.sqrt(max(1, tensor.shape[-1])))
        if (key, scale) not in self._scaled:
            values = self._block * np.float32(scale) if key == tensor.dtype else np.full(_BLOCK, scale, np.float32)
            self._scaled[key, scale] = _encoded(values, tensor.dtype)
        return self._scaled[key, scale]


def _encoded(values: NDArray[np.float32], dtype: str) -> memoryview:
    """Return float32 values as the bytes of a dtype; of one that is no float, zeros."""
    coded: NDArray[Any]
    if dtype == "BF16":
        coded = ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    elif dtype in ("F16", "F32"):
        coded = values.astype(np.float16 if dtype == "F16" else np.float32)
    elif dtype == "U8":
        coded = values.astype(np.uint8)
    else:
        coded = np.zeros(len(values) * DTYPE_BITS[dtype] // 8, np.uint8)
    return coded.view(np.uint8).data


class _Pieces:
    """Collects bytes into pieces that begin on a page, as writing around the page cache wants them."""

    def __init__(self, sink: Sink, on_write: Callable[[int], None]) -> None:
        self._sink = sink
        self._on_write = on_write
        self._memory = mmap.mmap(-1, _PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._used = 0
        self._done = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        while view:
            count = min(len(view), _PIECE - self._used)
            self._memory[self._used : self._used + count] = view[:count]
            self._used += count
            view = view[count:]
            if self._used == _PIECE:
                self.flush()

    def flush(self) -> None:
        """Hand over what is left."""
        with memoryview(self._memory) as view:
            self._sink.write(view[: self._used])
        self._done += self._used
        self._used = 0
        self._on_write(self._done)
