"""Encode one tensor piece by piece, in memory that does not grow with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from penstock.kernels import ans, exact, groupwise
from penstock.offload.buffers import DTYPES
from penstock.offload.codec import LOSSLESS, Coding

__all__ = [
    "PIECE_NBYTES", "AnsEncoder", "AtOnce", "DoesNotPay", "Encoder", "ExactEncoder", "GroupwiseEncoder", "encoder_for",
    "encoding_threads", "piece_nbytes",
]  # fmt: skip

PIECE_NBYTES = 8 << 20
"""How much of a tensor is encoded at once: what is in flight then fits a few MiB, and reads are long."""

_SAMPLE = 1 << 20
"""The exact codec's table comes from about this many values of the first piece."""


_SHARE = 1 << 19
"""Values that a thread encodes at once; a multiple of 1024."""


class DoesNotPay(Exception):  # noqa: N818 (a signal to the caller, not a fault)
    """The tensor is better stored as it is; the message says why."""


class ExactEncoder:
    """Lossless bfloat16; pieces are multiples of 1024 values."""

    def __init__(self, coding: Coding, workers: Executor, table: Tensor | None = None) -> None:
        self._coding = coding
        self._workers = workers
        self._table = table
        self._is_first = True
        self._escapes = 0

    def encode(self, piece: Tensor) -> tuple[Tensor, ...]:
        """Return what each part goes on with. Raises DoesNotPay when too few exponents have codes."""
        if self._table is None:
            # An odd stride, so that every column is seen.
            self._table = exact.choose_table(piece[:: max(piece.numel() // _SAMPLE, 1) | 1])
        known = self._table
        table = known if self._is_first else known[:0]
        self._is_first = False
        made = list(self._workers.map(lambda share: exact.encode(share, known), piece.split(_SHARE)))
        starts = []
        for one in made:
            starts.append(one.start + self._escapes)
            self._escapes += one.extra.numel()
        size = self._coding.size
        if 2 * size <= size + -(-size // 2) + 16 + 4 * -(-size // exact.BLOCK) + self._escapes:
            raise DoesNotPay(f"{self._escapes} of {size} exponents have no code")
        joined = [torch.cat([getattr(one, name) for one in made]) for name in ("low", "code", "extra")]
        return (joined[0], joined[1], table, torch.cat(starts).to(torch.int32), joined[2])


class AnsEncoder:
    """Lossless bfloat16 on a GPU; pieces are multiples of 65,536 values."""

    def __init__(self, coding: Coding, device: torch.device) -> None:
        self._coding = coding
        self._device = device
        self._nbytes = sum(part.nbytes for part in coding.parts)

    def encode(self, piece: Tensor) -> tuple[Tensor, ...]:
        """Return what each part goes on with. Raises DoesNotPay for exponents like noise, LibraryError."""
        made = ans.encode(piece.to(self._device))
        self._nbytes += made.data.numel()
        if self._nbytes >= self._coding.nbytes:
            raise DoesNotPay(f"it would take {self._nbytes} bytes and more")
        return made.low.cpu(), made.size.cpu(), made.data.cpu()


class GroupwiseEncoder:
    """Integers with scales; pieces are whole rows."""

    def __init__(self, coding: Coding, workers: Executor, *, search: bool) -> None:
        assert coding.group_size is not None
        assert coding.symmetric is not None
        self._columns = coding.matrix[1]
        self._workers = workers
        self._quantise = partial(
            groupwise.quantise,
            bits=coding.bits,
            group_size=coding.group_size,
            symmetric=coding.symmetric,
            search=search,
        )

    def encode(self, piece: Tensor) -> tuple[Tensor, ...]:
        """Return what each part goes on with. Raises DoesNotPay for values that are no finite numbers."""
        rows = piece.view(-1, self._columns)
        made = list(self._workers.map(self._quantise, rows.split(max(_SHARE // self._columns, 1))))
        codes, scale = torch.cat([one.codes for one in made]), torch.cat([one.scale for one in made])
        if not bool(scale.isfinite().all()):
            raise DoesNotPay("it holds values that are infinite or no numbers")
        zeros = [one.zero for one in made if one.zero is not None]
        return (codes, scale, torch.cat(zeros)) if zeros else (codes, scale)


Encoder = ExactEncoder | AnsEncoder | GroupwiseEncoder


def encoder_for(coding: Coding, workers: Executor, *, search: bool, table: Tensor | None = None) -> Encoder:
    """Return a fresh encoder for one tensor, which has its work done by threads, or the GPU.

    The exact codec takes the `table` where one was chosen before, on the device of the pieces.
    """
    if coding.codec == "exact-ans":
        return AnsEncoder(coding, ans.find_device())
    if coding.codec == "exact":
        return ExactEncoder(coding, workers, table)
    return GroupwiseEncoder(coding, workers, search=search)


def piece_nbytes(coding: Coding | None, *, at_most: int = PIECE_NBYTES) -> int:
    """Return how many bytes a piece of a tensor has, all but the last: whole rows where there are groups.

    A row may be more than `at_most`, a multiple of 2048.
    """
    if coding is None or coding.codec in LOSSLESS:
        return at_most
    row = max(coding.matrix[1] * DTYPES[coding.dtype].itemsize, 1)
    return max(at_most // row, 1) * row


@contextmanager
def encoding_threads() -> Iterator[Executor]:
    """Threads that encode, one on each core; torch itself uses one thread for each of them meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="penstock-encode") as workers:
            yield workers
    finally:
        torch.set_num_threads(before)


class AtOnce(Executor):
    """Does work when it is given: a GPU has threads enough."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `fn`."""
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done
