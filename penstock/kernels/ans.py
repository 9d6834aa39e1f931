"""Lossless bfloat16 with nvCOMP's ANS: sign and mantissa of each value as one byte, exponents compressed in chunks.

A chunk is the exponents of 65,536 values: nvCOMP's advice for fast decompression. Compressed chunks lie one after the
other, each on a multiple of 32 bytes. Both ways run on an NVIDIA GPU only, since the compressed form is nvCOMP's own.

Decoding waits for nothing. A chunk that nvCOMP could not decompress becomes NaNs, which end the run where tokens are
chosen: the stored bytes have checksums, and `encode` has decoded what it made, so that would be nvCOMP's fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.errors import DeviceError, LibraryError
from penstock.kernels.gpu import triton_kernels
from penstock.kernels.nvcomp import ALIGNMENT, NvcompANS, open_nvcomp
from penstock.kernels.sizes import ANS_CHUNK

__all__ = ["CHUNK", "Encoded", "check_usable", "decode", "encode", "find_device", "join_reference"]

CHUNK = ANS_CHUNK

_AT_ONCE = 1024
"""Chunks that are decompressed by one call: eight warps for each fill the largest GPUs, and what lies between the
two steps is 64 MiB."""

NAN = 0x7FFF


@dataclass(frozen=True, slots=True)
class Encoded:
    """n values: `low` [n] uint8, `size` [ceil(n / CHUNK)] int32 of compressed chunks, `data` uint8."""

    low: Tensor
    size: Tensor
    data: Tensor


def check_usable(device: torch.device) -> None:
    """Raise DeviceError where `device` is no GPU, and LibraryError where nvCOMP is missing."""
    if device.type != "cuda":
        raise DeviceError(
            "nvCOMP's ANS, with which these weights are packed, runs on NVIDIA GPUs only",
            wanted="cuda",
            got=device,
            fix="Use --device cuda, or pack the model with --codec exact.",
        )
    _library()


def find_device() -> torch.device:
    """Return the GPU for what is not run but packed or compared. Raises DeviceError and LibraryError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_usable(device)
    return device


def _library() -> NvcompANS:
    return open_nvcomp((torch.version.cuda or "").partition(".")[0])


def encode(values: Tensor) -> Encoded:
    """Encode bfloat16 values [n] on a GPU, on which the result is too, and decode them again to be sure.

    In parts, all but the last must be multiples of CHUNK values. Waits for the GPU. Raises LibraryError.
    """
    bits = values.view(torch.int16).int()
    low = ((bits >> 8) & 0x80 | bits & 0x7F).to(torch.uint8)
    size, data = _compress(((bits >> 7) & 0xFF).to(torch.uint8))
    made = torch.empty_like(values)
    decode(low[None], size[None], data[None], out=made[None])
    if not torch.equal(made.view(torch.int16), values.view(torch.int16)):
        raise LibraryError("nvCOMP has not given back what it was given", fix="Pack the model with --codec exact.")
    return Encoded(low, size, data)


def _compress(content: Tensor) -> tuple[Tensor, Tensor]:
    """Compress bytes [n] in chunks; return the chunks' sizes [chunks] int32, and them."""
    library, device = _library(), content.device
    sizes = _sizes(content.numel(), device)
    count = sizes.numel()
    room = _aligned(library.max_compressed(CHUNK))
    chunks = torch.zeros(count, room, dtype=torch.uint8, device=device)
    made, statuses = torch.zeros_like(sizes), torch.zeros(count, dtype=torch.int32, device=device)
    temp = torch.empty(library.compress_temp(count, CHUNK), dtype=torch.uint8, device=device)
    sources, targets = _places(content, count, CHUNK), _places(chunks, count, room)
    with _stream_of(content) as stream:
        library.compress(
            sources.data_ptr(),
            sizes.data_ptr(),
            targets.data_ptr(),
            target_sizes=made.data_ptr(),
            statuses=statuses.data_ptr(),
            num_chunks=count,
            chunk_nbytes=CHUNK,
            temp=temp.data_ptr(),
            temp_nbytes=temp.numel(),
            stream=stream,
        )
    if failed := [status for status in statuses.tolist() if status]:
        raise LibraryError("nvCOMP could not compress", got=f"status {failed[0]}")
    return made.to(torch.int32), torch.cat([chunks[i, : _aligned(one)] for i, one in enumerate(made.tolist())])


def decode(low: Tensor, size: Tensor, data: Tensor, *, out: Tensor, launch: bool = True) -> None:
    """Decode a batch of tensors on a GPU: every argument has a leading dim [B, ...], `out` is [B, n] bfloat16.

    The last dims are contiguous, and each row of `data` starts on a multiple of 32 bytes; it may be longer than what a
    tensor needs. Without `launch`, memory is taken as for decoding, and nothing else is done.
    """
    if not out.numel():
        return
    device = out.device
    rooms = _sizes(out.shape[1], device).repeat(out.shape[0])
    lengths = size.long().contiguous()
    padded = (lengths + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
    sources = (_places(data, out.shape[0], data.stride(0))[:, None] + padded.cumsum(1) - padded).flatten().contiguous()
    lengths = lengths.view(-1)
    count = min(rooms.numel(), _AT_ONCE)
    exponents = torch.empty(count, CHUNK, dtype=torch.uint8, device=device)
    targets, made = _places(exponents, count, CHUNK), torch.empty_like(rooms[:count])
    statuses = torch.empty(count, dtype=torch.int32, device=device)
    if not launch and not out.is_cuda:  # a plan is made, on a machine that may not have the library
        return
    library = _library()
    temp = torch.empty(library.decompress_temp(count, CHUNK), dtype=torch.uint8, device=device)
    if not launch:
        return
    for first in range(0, rooms.numel(), count):
        now = slice(first, min(first + count, rooms.numel()))
        with _stream_of(out) as stream:
            library.decompress(
                sources[now].data_ptr(),
                lengths[now].data_ptr(),
                targets.data_ptr(),
                rooms[now].data_ptr(),
                target_sizes=made.data_ptr(),
                statuses=statuses.data_ptr(),
                num_chunks=now.stop - first,
                temp=temp.data_ptr(),
                temp_nbytes=temp.numel(),
                stream=stream,
            )
        left = now.stop - first
        failed = (statuses[:left] != 0) | (made[:left] != rooms[now])
        _join(low, exponents[:left], failed, first, out)


@contextmanager
def _stream_of(tensor: Tensor) -> Iterator[int]:
    """Enter a tensor's GPU, with the stream that is current there."""
    with torch.cuda.device_of(tensor):
        yield torch.cuda.current_stream(tensor.device).cuda_stream


def _join(low: Tensor, exponents: Tensor, failed: Tensor, first: int, out: Tensor) -> None:
    """Make values of the exponents [chunks, CHUNK] of chunk `first` and those after it, counted through the batch."""
    kernels = triton_kernels("expand_triton", out.device) if out.is_cuda else None
    if kernels is not None:
        kernels.join_exponents(low, exponents, failed, first, out=out)
    else:
        join_reference(low, exponents, failed, first, out=out)


def join_reference(low: Tensor, exponents: Tensor, failed: Tensor, first: int, *, out: Tensor) -> None:
    """Do what `join_exponents` does, in plain torch on any device."""
    per_row = -(-out.shape[1] // CHUNK)
    for index in range(exponents.shape[0]):
        row, begin = (first + index) // per_row, (first + index) % per_row * CHUNK
        rest = low[row, begin : begin + CHUNK].int()
        bits = (rest & 0x80) << 8 | exponents[index, : rest.numel()].int() << 7 | rest & 0x7F
        bits = torch.where(failed[index], NAN, bits)
        out[row, begin : begin + CHUNK].view(torch.int16).copy_(bits.to(torch.int16))


def _sizes(nbytes: int, device: torch.device) -> Tensor:
    """Return the sizes of the chunks of so many bytes, int64."""
    sizes = torch.full((-(-nbytes // CHUNK),), CHUNK, dtype=torch.int64, device=device)
    sizes[-1:].fill_(nbytes - (sizes.numel() - 1) * CHUNK)
    return sizes


def _places(memory: Tensor, count: int, step: int) -> Tensor:
    """Return `count` addresses in `memory`, `step` bytes from each other, int64."""
    return torch.arange(count, dtype=torch.int64, device=memory.device) * step + memory.data_ptr()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
