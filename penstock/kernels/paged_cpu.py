"""Attention of one query for each sequence over paged keys and values, in C, beside the data and without the GIL.

The source is compiled on the machine that runs it (`compiled`), for its vector units. Where that cannot be, the torch
reference serves, with a line in the log.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cffi
import torch
from torch import Tensor

from penstock.kernels import paged_reference
from penstock.kernels.compiled import Source, load

__all__ = ["AttendPaged", "CompiledAttention", "load_attend_paged"]

_HERE = Path(__file__).parent
SOURCE = Source(
    _HERE / "paged_cpu.c",
    tuple(_HERE / name for name in ("paged_cpu.h", "products.h", "tiles.h", "vectors.h", "workers.h")),
)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
_QUANTISED = {torch.int8, torch.float8_e4m3fn}
_ERRORS = {1: "a length or a block number is out of range", 2: "no memory for partial results"}

AttendPaged = Callable[..., None]
"""The kernel or its reference; `paged_reference.attend_paged` has the contract."""

ffi: Any = cffi.FFI()
ffi.cdef((_HERE / "paged_cpu.h").read_text(encoding="utf-8"))


@cache
def load_attend_paged(directory: Path | None) -> AttendPaged:
    """Return the compiled kernel, or the torch reference where it cannot be compiled; that is logged with its reason.

    `directory` keeps what was compiled for the next process; None, or one that cannot be written, keeps nothing.
    """
    library = load(SOURCE, directory, ffi)
    return paged_reference.attend_paged if library is None else CompiledAttention(library)


class CompiledAttention:
    """Calls the compiled kernel; calls from several threads at the same time share its pool of workers."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
        num_threads: int = 1,
        out: Tensor,
    ) -> None:
        """Attend as `paged_reference.attend_paged` does, on this thread and `num_threads` - 1 others.

        The result has the same bits for every `num_threads` and whatever the other sequences are. The GIL is released.
        Tensors are on the CPU, rows contiguous; `keys` and `values` may be strided views, tables and scales not.
        """
        call = ffi.new("struct penstock_attention *")
        _check(query, keys, values, out)
        _check_table(block_table, lengths, len(query))
        _fill_rows(call.keys, keys, key_scales)
        _fill_rows(call.values, values, value_scales)
        call.query, call.out = _pointer(query), _pointer(out)
        call.query_dtype, call.out_dtype = _DTYPES[query.dtype], _DTYPES[out.dtype]
        call.query_stride, call.query_head_stride = _strides(query)[:2]
        call.out_stride, call.out_head_stride = _strides(out)[:2]
        call.block_table, call.lengths = _pointer(block_table, "int32_t *"), _pointer(lengths, "int32_t *")
        if sinks is not None:
            assert sinks.shape == query.shape[1:2], "one sink for each query head"
            call.sinks = _factors(sinks)
        call.num_sequences, call.num_query_heads = query.shape[:2]
        call.num_blocks, call.block_tokens, call.num_heads = keys.shape[:3]
        call.max_blocks = block_table.shape[1]
        call.window, call.scale, call.softcap = window or 0, scale, softcap or 0.0
        call.num_threads = max(num_threads, 1)
        code = self._library.penstock_attend_paged(call)
        if code == 2:
            raise MemoryError(_ERRORS[code])
        assert code == 0, _ERRORS[code]


def _check(query: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """Assert that the shapes fit together: what C reads and writes follows from them."""
    num_sequences, num_query_heads, size = query.shape
    assert keys.shape[:3] == values.shape[:3], "values lie beside their keys"
    assert keys.shape[3] == size, "keys have the queries' size"
    assert num_query_heads % keys.shape[2] == 0, "every key head serves equally many query heads"
    assert out.shape == (num_sequences, num_query_heads, values.shape[3]), "out has a row for each query head"
    assert not _QUANTISED & {query.dtype, out.dtype}, "queries and results are not quantised"
    for tensor in (query, keys, values, out):
        assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1, "the elements of a row are neighbours"
        assert tensor.device.type == "cpu", "the CPU's kernel takes the CPU's tensors"


def _check_table(block_table: Tensor, lengths: Tensor, num_sequences: int) -> None:
    assert block_table.shape[:1] == lengths.shape == (num_sequences,), "a row of blocks and a length for each sequence"
    assert block_table.dtype == lengths.dtype == torch.int32
    assert block_table.is_contiguous()
    assert lengths.is_contiguous()


def _fill_rows(rows: Any, tensor: Tensor, scales: Tensor | None) -> None:
    assert (scales is not None) == (tensor.dtype in _QUANTISED), "quantised rows have scales, others none"
    rows.data, rows.dtype, rows.size = _pointer(tensor), _DTYPES[tensor.dtype], tensor.shape[3]
    rows.block_stride, rows.token_stride, rows.head_stride, _ = _strides(tensor)
    if scales is not None:
        assert scales.shape == tensor.shape[:3], "one scale for each token and head"
        rows.scales = _factors(scales)


def _factors(tensor: Tensor) -> Any:
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    return _pointer(tensor, "float *")


def _strides(tensor: Tensor) -> list[int]:
    return [stride * tensor.element_size() for stride in tensor.stride()]


def _pointer(tensor: Tensor, kind: str = "void *") -> Any:
    return ffi.cast(kind, tensor.data_ptr())
