"""Where each parameter of one unit lies in its buffer, and which bytes of the checkpoint fill that buffer.

A *unit* is one decoder layer, or the resident unit (embedding, final norm, head). Its buffer is one flat run of bytes:

    0                              wire_offset                                             nbytes
    | converted, expanded parameters | placed, packed parameters | coded parts, sources of conversions |
                                     '--------------------------- wire --------------------------------'

*Placed* parameters are made of the checkpoint's own bytes, moved and nothing else: nearly all of them, unless the
checkpoint is packed. *Expanded* ones are decoded from coded parts, *converted* ones (a cast, a transposition) computed
from their sources, on the device, right after these arrived. *Packed* ones stay coded: whoever computes with them takes
the parts. So what travels and rests, the wire bytes, is one contiguous run at the end of the buffer, whatever the
parameters need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from penstock.io.files import SourceFile
from penstock.offload.codec import Coding
from penstock.offload.scaled import ScaledCoding

__all__ = ["PARAMETER_ALIGNMENT", "Conversion", "Encoding", "Expansion", "Extent", "Layout", "Packed", "View"]

PARAMETER_ALIGNMENT = 256
"""Every view starts on a multiple of this many bytes, whichever tier it comes from, so that kernels see the same
alignment, and results are the same, for every mix of tiers."""


@dataclass(frozen=True, slots=True)
class View:
    """A row-major tensor inside a unit's buffer: `dtype` is a safetensors dtype name such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Copy `nbytes` bytes at `source` of `file` to `destination` of the unit's buffer."""

    file: SourceFile
    source: int
    nbytes: int
    destination: int


@dataclass(frozen=True, slots=True)
class Encoding:
    """Make a coded tensor's parts of its `nbytes` bytes at `source` of `file`, when its unit is loaded.

    Part number i is `sizes[i]` bytes and goes to `destinations[i]` of the unit's buffer. The exact codec gives codes to
    the exponents in `table`. `name` is for messages: encodings of the same bytes to the same places are equal.
    """

    name: str = field(compare=False)
    file: SourceFile
    source: int
    nbytes: int
    coding: Coding
    table: bytes
    destinations: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conversion:
    """Compute `targets` (names of parameters) from `sources` (views of raw checkpoint tensors in the same buffer).

    `convert` takes the source tensors in order and returns one tensor per target, of the target's shape; it runs on the
    buffer's device, once per arrival. The result is cast to the target's dtype when it is stored.
    """

    targets: tuple[str, ...]
    sources: tuple[View, ...]
    convert: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    reason: str


@dataclass(frozen=True, slots=True)
class Expansion:
    """Decode `count` tensors of one coding, such as the experts of a layer, in one go.

    `parts` are the coded parts of the first, those of the next lie `step` bytes further on each; the first's values go
    to `target`, the next's `target_step` bytes further on. A part of any length has room for the longest.
    """

    coding: Coding | ScaledCoding
    parts: tuple[View, ...]
    target: View
    count: int = 1
    step: int = PARAMETER_ALIGNMENT
    target_step: int = PARAMETER_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix that is computed with as it is coded: `parts` stand for it."""

    name: str
    coding: Coding
    parts: tuple[View, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's."""
        return self.coding.shape

    @property
    def nbytes(self) -> int:
        """Bytes that go to and fro when it is multiplied with: the parts, and a byte for each element, both ways."""
        return sum(part.nbytes for part in self.parts) + 2 * self.coding.size


@dataclass(frozen=True, slots=True)
class Layout:
    """One unit's buffer. `parameters` holds persistent buffers too, and no `packed` ones; tied ones appear once.

    On arrival the expansions run first, then the conversions, whose sources may be expanded ones. Bytes that are in no
    extent are made by the `encodings`, once, when the unit is loaded: then it cannot rest on the disk.
    """

    parameters: tuple[View, ...]
    extents: tuple[Extent, ...]
    conversions: tuple[Conversion, ...]
    wire_offset: int
    parameter_nbytes: int
    nbytes: int
    expansions: tuple[Expansion, ...] = ()
    encodings: tuple[Encoding, ...] = ()
    packed: tuple[Packed, ...] = ()

    @property
    def wire_nbytes(self) -> int:
        """Bytes that travel and rest; equal to `nbytes` when nothing is converted."""
        return self.nbytes - self.wire_offset
