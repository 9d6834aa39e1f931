"""Units' buffers as tensors: views of them, and the expansions and conversions that run on arrival."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from penstock.kernels import ans, exact, groupwise, scaled
from penstock.offload.codec import Coding
from penstock.offload.layout import Layout, View
from penstock.offload.scaled import ScaledCoding

__all__ = ["DTYPES", "can_record", "check_decoders", "convert", "dtype_name", "expand", "restore", "view_of"]

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
"""torch's dtype for each dtype of the safetensors format that torch has."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype, such as "BF16"."""
    return _NAMES[dtype]


def view_of(buffer: Tensor, view: View) -> Tensor:
    """Return `view` of a flat uint8 buffer as a tensor that shares its memory."""
    flat = buffer[view.offset : view.offset + view.nbytes]
    return flat.view(DTYPES[view.dtype]).view(view.shape)


def check_decoders(layouts: Iterable[Layout], device: torch.device) -> None:
    """Raise DeviceError or LibraryError where units cannot be expanded on `device`."""
    if any(one.coding.codec == "exact-ans" for layout in layouts for one in layout.expansions
           if isinstance(one.coding, Coding)):  # fmt: skip
        ans.check_usable(device)


def can_record(layout: Layout) -> bool:
    """Whether `convert` launches decoders of our own on CUDA, which take no memory, and nothing else."""
    codings = [one.coding for one in layout.expansions]
    ours = all(isinstance(one, Coding) and one.codec in {"exact", "int8", "int4"} for one in codings)
    return bool(codings) and ours and not layout.conversions


def restore(layout: Layout, buffer: Tensor, rest: Tensor) -> None:
    """Make a unit in `buffer` of its wire bytes `rest`, which stay where they are on the same device."""
    end = layout.nbytes if layout.conversions else layout.parameter_nbytes  # conversions read coded parts in the buffer
    count = max(end - layout.wire_offset, 0)
    buffer[layout.wire_offset : layout.wire_offset + count].copy_(rest[:count])
    convert(layout, buffer, coded=rest)


def convert(layout: Layout, buffer: Tensor, *, coded: Tensor | None = None, rehearsed: bool = False) -> None:
    """Compute the expanded and converted parameters of a unit whose wire bytes have just arrived in `buffer`.

    `coded` are the wire bytes where coded parts are read elsewhere. `rehearsed` says that there are zeros in their
    place, to see how much memory this takes.
    """
    source, origin = (buffer, 0) if coded is None else (coded, layout.wire_offset)
    for expansion in layout.expansions:
        count, step = expansion.count, expansion.step
        parts = [_batch(source, part, count, step, origin=origin) for part in expansion.parts]
        target = _batch(buffer, expansion.target, count, expansion.target_step)
        expand(expansion.coding, parts, target, rehearsed=rehearsed)
    if not layout.conversions:
        return
    targets = {view.name: view for view in layout.parameters}
    for conversion in layout.conversions:
        results = conversion.convert(tuple(view_of(buffer, source) for source in conversion.sources))
        for name, result in zip(conversion.targets, results, strict=True):
            view_of(buffer, targets[name]).copy_(result)


def expand(coding: Coding | ScaledCoding, parts: Sequence[Tensor], out: Tensor, *, rehearsed: bool = False) -> None:
    """Decode a batch of tensors: the parts of `coding` and `out` with a leading dim [B, ...] of any stride.

    What `rehearsed` parts hold is nothing that was coded: a decoder that would not bear that only takes its memory.
    """
    if isinstance(coding, ScaledCoding):
        _expand_scaled(coding, parts, out)
        return
    if coding.codec == "exact":
        low, code, table, start, extra = parts
        exact.decode(low, code, table, start, extra, out=out.view(out.shape[0], coding.size))
        return
    if coding.codec == "exact-ans":
        low, size, data = parts
        ans.decode(low, size, data, out=out.view(out.shape[0], coding.size), launch=not rehearsed)
        return
    assert coding.group_size is not None
    codes, scale, *zero = parts
    groupwise.dequantise(
        codes,
        scale,
        zero[0] if zero else None,
        out.view(out.shape[0], *coding.matrix),
        bits=coding.bits,
        group_size=coding.group_size,
    )


def _expand_scaled(coding: ScaledCoding, parts: Sequence[Tensor], out: Tensor) -> None:
    """Matrices are a batch already; those of fused experts are one for each tensor."""
    codes, scale, *rest = parts
    zero = rest.pop(0) if coding.has_zero else None
    index = rest.pop(0) if coding.has_index else None
    made = out.transpose(-1, -2) if coding.transposed else out
    if len(coding.shape) == 2:
        scaled.decode(coding.form, codes, scale, zero, index, out=made)
        return
    assert zero is None, "fused experts have no zero points"
    for item in range(out.shape[0]):
        scaled.decode(coding.form, codes[item], scale[item], None, None, out=made[item])


def _batch(buffer: Tensor, first: View, count: int, step: int, *, origin: int = 0) -> Tensor:
    """Return [count, *shape]: `first` of a flat uint8 buffer, and what lies `step` bytes further on each time.

    The buffer's first byte is byte `origin` of the unit's.
    """
    start = int(buffer.storage_offset()) + first.offset - origin
    flat = buffer.as_strided((count, first.nbytes), (step, 1), start)
    return flat.view(DTYPES[first.dtype]).view(count, *first.shape)
