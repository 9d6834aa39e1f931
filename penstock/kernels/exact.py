"""Lossless bfloat16: the sign and mantissa of each value as one byte, its exponent as a 4-bit code.

The exponents of trained weights carry few bits: the fifteen most frequent ones of a tensor get the codes 0 to 14. Code
15 stands for any other exponent, which is stored in full, in order; `start` says for each block of 1024 values how many
of those came before it, so that blocks are decoded independently of each other. Every bit pattern survives.

Shapes: n values, ceil(n / 2) bytes of codes (the first value of a pair in the low half), 16 bytes of table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from penstock.kernels.gpu import triton_kernels
from penstock.kernels.sizes import EXACT_BLOCK

__all__ = [
    "BLOCK", "Encoded", "choose_table", "count_exponents", "decode", "decode_reference", "encode", "encode_reference",
    "table_of",
]  # fmt: skip

BLOCK = EXACT_BLOCK
ESCAPE = 15

_PIECE = 128 * BLOCK
"""Values that the CPU takes at once, so that what lies between two steps stays in its cache."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """n values: `low` [n], `code` [ceil(n/2)], `extra` [escapes] uint8, and `start` [ceil(n/1024)] int32."""

    low: Tensor
    code: Tensor
    start: Tensor
    extra: Tensor


def choose_table(values: Tensor) -> Tensor:
    """Return the table [16] uint8 for bfloat16 values like these: their fifteen most frequent exponents, then 0."""
    return table_of(count_exponents(values))


def count_exponents(values: Tensor) -> Tensor:
    """Return how often each exponent occurs in bfloat16 values: [256] int64, on their device."""
    return torch.bincount(values.contiguous().view(torch.int16).flatten() >> 7 & 255, minlength=256)


def table_of(counts: Tensor) -> Tensor:
    """Return the table [16] uint8, on the CPU, for how often each exponent occurs."""
    table = np.zeros(16, np.uint8)
    table[:ESCAPE] = np.argsort(-counts.cpu().numpy(), kind="stable")[:ESCAPE]
    return torch.from_numpy(table)


def encode(values: Tensor, table: Tensor) -> Encoded:
    """Encode bfloat16 values of any shape on their device, where `table` is too.

    In parts, all but the last must be multiples of 1024 values.
    """
    if values.is_cuda:
        return encode_reference(values, table)
    codes = np.full(256, ESCAPE, np.uint8)
    codes[table[:ESCAPE].numpy()] = np.arange(ESCAPE)
    bits = _bits(values)
    low, code = np.empty(bits.size, np.uint8), np.empty(-(-bits.size // 2), np.uint8)
    extras: list[NDArray[np.uint8]] = []
    counts = np.zeros(-(-bits.size // BLOCK) + 1, np.int64)
    for begin in range(0, bits.size, _PIECE):
        part = bits[begin : begin + _PIECE]
        np.bitwise_or((part >> 8) & 0x80, part & 0x7F, out=low[begin : begin + _PIECE], casting="unsafe")
        exponents = _exponents(part)
        one = np.take(codes, exponents, mode="clip")
        escapes = np.flatnonzero(one == ESCAPE)
        extras.append(exponents[escapes])
        at = begin // BLOCK + 1
        in_block = np.bincount(escapes // BLOCK, minlength=-(-part.size // BLOCK))
        counts[at : at + in_block.size] = in_block
        pairs = one if one.size % 2 == 0 else np.append(one, np.uint8(0))
        code[begin // 2 : begin // 2 + pairs.size // 2] = pairs[0::2] | pairs[1::2] << 4
    extra = np.concatenate(extras) if extras else np.empty(0, np.uint8)
    start = np.cumsum(counts)[:-1].astype(np.int32)
    return Encoded(*(torch.from_numpy(array) for array in (low, code, start, extra)))


def encode_reference(values: Tensor, table: Tensor) -> Encoded:
    """Encode in plain torch on any device."""
    codes = torch.full((256,), ESCAPE, dtype=torch.uint8, device=values.device)
    codes[table[:ESCAPE].long()] = torch.arange(ESCAPE, dtype=torch.uint8, device=values.device)
    bits = values.contiguous().view(torch.int16).flatten().int()
    exponents = bits >> 7 & 255
    low = (bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8)
    code = codes[exponents]
    escaped = code == ESCAPE
    counts = pad(escaped, (0, -bits.numel() % BLOCK)).view(-1, BLOCK).sum(-1)
    pairs = pad(code, (0, bits.numel() % 2)).view(-1, 2)
    start = (counts.cumsum(0) - counts).to(torch.int32)
    return Encoded(low, pairs[:, 0] | pairs[:, 1] << 4, start, exponents[escaped].to(torch.uint8))


def decode(low: Tensor, code: Tensor, table: Tensor, start: Tensor, extra: Tensor, *, out: Tensor) -> None:
    """Decode a batch of tensors of one size: every argument has a leading dim [B, ...], `out` is [B, n] bfloat16.

    The last dims are contiguous. Rows of `extra` may be longer than what a tensor needs.
    """
    if out.is_cuda:
        if (kernels := triton_kernels("expand_triton", out.device)) is not None:
            kernels.decode_exact(low, code, table, start, extra, out=out)
        else:
            for one in zip(low, code, table, extra, out, strict=True):
                decode_reference(*one)
    else:
        for *parts, made in zip(low, code, table, extra, out, strict=True):
            arrays = [part.numpy() for part in parts]
            _decode_cpu(*arrays, out=made.view(torch.int16).numpy().view(np.uint16))


def decode_reference(low: Tensor, code: Tensor, table: Tensor, extra: Tensor, out: Tensor) -> None:
    """Decode one tensor into `out` [n], in plain torch on any device."""
    codes = torch.stack([code & 15, code >> 4], -1).flatten()[: low.numel()]
    exponents = table[codes.long()].int()
    escaped = codes == ESCAPE
    exponents[escaped] = extra[: int(escaped.sum())].int()
    bits = (low & 0x80).int() << 8 | exponents << 7 | (low & 0x7F).int()
    out.view(torch.int16).copy_(bits.to(torch.int16))


def _bits(values: Tensor) -> NDArray[np.uint16]:
    assert values.dtype == torch.bfloat16
    return values.contiguous().view(torch.int16).numpy().reshape(-1).view(np.uint16)


def _exponents(bits: NDArray[np.uint16]) -> NDArray[np.uint8]:
    return (bits >> 7).astype(np.uint8)


def _decode_cpu(
    low: NDArray[np.uint8],
    code: NDArray[np.uint8],
    table: NDArray[np.uint8],
    extra: NDArray[np.uint8],
    *,
    out: NDArray[np.uint16],
) -> None:
    """Look two codes up at once: a byte of codes gives the exponents of a pair, in place."""
    both = np.arange(256)
    exponents = table.astype(np.uint32) << 7
    pairs = exponents[both & 15] | exponents[both >> 4] << 16
    done = 0
    for begin in range(0, out.size, _PIECE):
        target = out[begin : begin + _PIECE]
        packed = code[begin // 2 : (begin + target.size + 1) // 2]
        high = np.take(pairs, packed, mode="clip").view(np.uint16)[: target.size]
        rest = low[begin : begin + target.size].astype(np.uint16)
        rest *= 0x101
        rest &= 0x807F
        np.bitwise_or(high, rest, out=target)
        done += _put_escapes(packed, extra[done:], rest, target)


def _put_escapes(
    packed: NDArray[np.uint8], extra: NDArray[np.uint8], rest: NDArray[np.uint16], target: NDArray[np.uint16]
) -> int:
    """Store the values whose exponents are not in the table; return how many there are."""
    first, second = packed & 15 == ESCAPE, packed >= ESCAPE << 4
    at = np.flatnonzero(first | second)
    if not at.size:
        return 0
    places = np.stack([at * 2, at * 2 + 1], -1)[np.stack([first[at], second[at]], -1)]
    places = places[places < target.size]
    target[places] = rest[places] | extra[: places.size].astype(np.uint16) << 7
    return int(places.size)
