"""Codecs: how a tensor's bytes rest and travel, and which stored tensors ("parts") it then consists of.

A coded tensor `w` is stored as parts named `w.exact_low`, `w.int8_scale` and so on, which are ordinary tensors of the
checkpoint. They are expanded to `w` on the device, right after they arrive; `buffers.expand` does that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from penstock.errors import ConfigError
from penstock.io.files import DTYPE_BITS
from penstock.kernels.sizes import ANS_CHUNK, EXACT_BLOCK

__all__ = [
    "ACTIVATION_DTYPES",
    "ANS_CHUNK",
    "ANY_LENGTH",
    "GROUP_SIZES",
    "LOSSLESS",
    "CodecName",
    "Coding",
    "PackOptions",
    "Part",
]

CodecName = Literal["exact", "exact-ans", "int8", "int4"]

LOSSLESS = frozenset[CodecName](("exact", "exact-ans"))
"""Codecs of every bfloat16 tensor that give back each bit."""

ANY_LENGTH = -1
"""A part's size that depends on the values."""

GROUP_SIZES = (32, 64, 128)

ACTIVATION_DTYPES = ("auto", "fp8")
"""What integer codes may be multiplied with: activations as they come, or rounded to e4m3."""

_PERCENT = {"exact": 1, "exact-ans": 35}
"""About how many bytes the part of any length takes for 100 values."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a coded one: the name's ending, a safetensors dtype, and the shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the part; 0 where they depend on the values."""
        return 0 if ANY_LENGTH in self.shape else math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Coding:
    """How one tensor of `dtype` and `shape` is coded.

    `exact` and `exact-ans` are lossless, for BF16. `int8` and `int4` keep a scale for each `group_size` values along
    the last dim, and unless `symmetric` a zero point. Equal codings have parts of equal shapes, but for those of any
    length.
    """

    codec: CodecName
    dtype: str
    shape: tuple[int, ...]
    group_size: int | None = None
    symmetric: bool | None = None

    def fault(self) -> str | None:
        """Say what is wrong with a coding that was read from a file."""
        if any(size < 0 for size in self.shape):
            return f"shape {self.shape}"
        if self.codec in LOSSLESS:
            return None if self.dtype == "BF16" else f"dtype {self.dtype}"
        if self.dtype not in {"BF16", "F16", "F32"}:
            return f"dtype {self.dtype}"
        return None if (self.group_size or 0) > 0 and self.symmetric is not None else f"group size {self.group_size}"

    @property
    def bits(self) -> int:
        """Bits of a code of an integer codec."""
        return 8 if self.codec == "int8" else 4

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.size * DTYPE_BITS[self.dtype] // 8

    @property
    def packed_nbytes(self) -> int:
        """About how many bytes are stored for trained weights; for integer codecs to the byte."""
        rest = self.size * _PERCENT[self.codec] // 100 if self.codec in LOSSLESS else 0
        return sum(part.nbytes for part in self.parts) + rest

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as rows of the last dim, which groups divide."""
        columns = self.shape[-1] if self.shape else 1
        return self.size // max(columns, 1), columns

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is stored, in the order in which `buffers.expand` takes it."""
        if self.codec == "exact":
            return (
                Part("exact_low", "U8", (self.size,)),
                Part("exact_code", "U8", (-(-self.size // 2),)),
                Part("exact_table", "U8", (16,)),
                Part("exact_start", "I32", (-(-self.size // EXACT_BLOCK),)),
                Part("exact_extra", "U8", (ANY_LENGTH,)),
            )
        if self.codec == "exact-ans":
            return (
                Part("exact_low", "U8", (self.size,)),
                Part("ans_size", "I32", (-(-self.size // ANS_CHUNK),)),
                Part("ans_data", "U8", (ANY_LENGTH,)),
            )
        assert self.group_size is not None
        rows, columns = self.matrix
        groups = (rows, -(-columns // self.group_size))
        if self.codec == "int4":
            codes = Part("int4", "U8", (rows, -(-columns // 2)))
        else:
            codes = Part("int8", "I8" if self.symmetric else "U8", (rows, columns))
        scale, zero = Part(f"{self.codec}_scale", "BF16", groups), Part(f"{self.codec}_zero", "U8", groups)
        return (codes, scale) if self.symmetric else (codes, scale, zero)


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How to pack. `group_size` and `symmetric` are for the integer codecs, None takes the codec's own.

    `exclude` are patterns with * and ? of tensors that stay as they are. `search` tries several scales for each group
    and keeps the one with the least squared error.
    """

    codec: CodecName
    group_size: int | None = None
    symmetric: bool | None = None
    search: bool | None = None
    exclude: tuple[str, ...] = ()

    def resolved(self) -> PackOptions:
        """Return them with nothing left open. Raises ConfigError."""
        if self.codec in LOSSLESS:
            if self.group_size is not None or self.symmetric is not None or self.search is not None:
                raise ConfigError("the exact codec has no groups", fix="Leave group size, symmetry and search out.")
            return PackOptions(self.codec, exclude=self.exclude)
        if self.group_size not in {None, *GROUP_SIZES}:
            raise ConfigError("not a group size", wanted=f"one of {GROUP_SIZES}", got=self.group_size)
        small = self.codec == "int4"
        return PackOptions(
            self.codec,
            group_size=self.group_size or (64 if small else 128),
            symmetric=not small if self.symmetric is None else self.symmetric,
            search=bool(self.search),
            exclude=self.exclude,
        )
