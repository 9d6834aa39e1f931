"""Write safetensors files whose tensors' sizes are known only when they have been written.

The format puts the header first. Room for it is kept, for the largest it can become; it is written last and padded with
spaces, as the format allows. So data begins at a multiple of 4 KiB, and nothing is written twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["StoredTensor", "header_room", "shard_header"]

_LENGTH_BYTES = 8
_ALIGNMENT = 4096
_MOST_PER_TENSOR = 120
"""Bytes of JSON that describe a tensor at most, beside its name and shape."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a shard; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def header_room(tensors: Iterable[tuple[str, int]]) -> int:
    """Return where data begins in a shard that will hold at most these tensors, given as (name, number of dims)."""
    needed = sum(len(json.dumps(name)) + 22 * dims + _MOST_PER_TENSOR for name, dims in tensors)
    return -(-(_LENGTH_BYTES + needed + 64) // _ALIGNMENT) * _ALIGNMENT


def shard_header(tensors: Iterable[StoredTensor], data_start: int) -> bytes:
    """Return the first `data_start` bytes of a shard."""
    described = {
        one.name: {
            "dtype": one.dtype,
            "shape": list(one.shape),
            "data_offsets": [one.offset - data_start, one.offset - data_start + one.nbytes],
        }
        for one in tensors
    }
    room = data_start - _LENGTH_BYTES
    text = json.dumps({"__metadata__": {"format": "pt"}, **described}, separators=(",", ":")).encode()
    assert len(text) <= room, "the room that was kept is too small"
    return room.to_bytes(_LENGTH_BYTES, "little") + text.ljust(room)
