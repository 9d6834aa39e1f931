"""From the pieces that a unit is made of to its layout."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from penstock.engine.model.conversion import WeightGroup
from penstock.engine.model.symbolic import Box
from penstock.io.files import TensorEntry
from penstock.offload.buffers import dtype_name
from penstock.offload.codec import Coding
from penstock.offload.layout import PARAMETER_ALIGNMENT, Conversion, Encoding, Expansion, Extent, Layout, Packed, View
from penstock.offload.manifest import CodedTensor
from penstock.offload.scaled import ScaledCoding

__all__ = ["Converted", "Expanded", "Piece", "Placed", "Sources", "Target", "lay_out", "runs_of"]

Sources = Mapping[str, TensorEntry | CodedTensor]
"""The checkpoint's tensors by the names that transformers knows."""

_P = TypeVar("_P", bound="Placed | Expanded")


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter or persistent buffer of the model."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in a buffer."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Placed:
    """A parameter made of checkpoint bytes that only move."""

    target: Target
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Expanded:
    """A parameter made of coded tensors, each of which fills one run of it: (name, first element).

    One that `stays` is a single tensor, and not decoded.
    """

    target: Target
    runs: tuple[tuple[str, int], ...]
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Converted:
    """Parameters that transformers' own operations make from real tensors."""

    group: WeightGroup
    targets: tuple[Target, ...]
    reason: str

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Cast first, as transformers does when it loads, then convert."""
        if not self.group.renames_only:
            tensors = tuple(tensor.to(self.targets[0].dtype) for tensor in tensors)
        made = self.group.convert(tensors)
        return tuple(made[target.name] for target in self.targets)


Piece = Placed | Expanded | Converted


@dataclass(slots=True)
class _Buffer:
    """A unit's buffer while it is laid out."""

    sources: Sources
    end: int = 0
    extents: list[Extent] = field(default_factory=list)
    expansions: list[Expansion] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)

    def view(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> View:
        """Make room for a tensor."""
        made = View(name, dtype, shape, self.end, nbytes)
        self.end = _aligned(self.end + nbytes)
        return made

    def parameter(self, target: Target) -> View:
        """Make room for a parameter."""
        return self.view(target.name, dtype_name(target.dtype), target.shape, target.nbytes)

    def stored(self, entry: TensorEntry) -> View:
        """Make room for a stored tensor and have it read."""
        made = self.view(entry.name, entry.dtype, entry.shape, entry.nbytes)
        self.extents.append(Extent(entry.file, entry.offset, entry.nbytes, made.offset))
        return made

    def expansion(self, coded: Sequence[CodedTensor], target: View, target_step: int) -> None:
        """Make room for the parts of coded tensors of one coding, at equal steps, and have them expanded."""
        rooms = [max((one.parts[i] for one in coded), key=lambda part: part.nbytes) for i in range(len(coded[0].parts))]
        start = self.end
        first = tuple(
            self.view(coded[0].parts[i].name, room.dtype, room.shape, room.nbytes) for i, room in enumerate(rooms)
        )
        step = max(self.end - start, PARAMETER_ALIGNMENT)
        self.end = start + step * len(coded)
        for index, one in enumerate(coded):
            self._bring(one, tuple(view.offset + index * step for view in first))
        self.expansions.append(Expansion(coded[0].coding, first, target, len(coded), step, target_step))

    def packed(self, name: str, one: CodedTensor) -> Packed:
        """Make room for the parts of a parameter that stays coded."""
        assert isinstance(one.coding, Coding)
        parts = tuple(self.view(part.name, part.dtype, part.shape, part.nbytes) for part in one.parts)
        self._bring(one, tuple(part.offset for part in parts))
        return Packed(name, one.coding, parts)

    def _bring(self, one: CodedTensor, destinations: tuple[int, ...]) -> None:
        """Have the parts of a coded tensor read, or made."""
        if one.origin is None:
            for part, destination in zip(one.parts, destinations, strict=True):
                self.extents.append(Extent(part.file, part.offset, part.nbytes, destination))
            return
        assert isinstance(one.coding, Coding)
        entry, sizes = one.origin.entry, tuple(part.nbytes for part in one.parts)
        self.encodings.append(
            Encoding(
                one.name, entry.file, entry.offset, entry.nbytes, one.coding, one.origin.table, destinations, sizes
            )
        )


def lay_out(pieces: Sequence[Piece], sources: Sources) -> Layout:
    """Lay out one unit: what is computed first, then what arrives, each in the order of its bytes on disk."""
    buffer = _Buffer(sources)
    converted = [piece for piece in pieces if isinstance(piece, Converted)]
    coded_ones = _sorted([piece for piece in pieces if isinstance(piece, Expanded)], sources)
    expanded = [piece for piece in coded_ones if not piece.stays]
    placed = _sorted([piece for piece in pieces if isinstance(piece, Placed)], sources)
    parameters = [buffer.parameter(target) for one in converted for target in one.targets]
    decoded = [buffer.parameter(piece.target) for piece in expanded]
    known = _decoded_sources(buffer, converted)
    wire_offset = buffer.end
    for piece in placed:
        view = buffer.parameter(piece.target)
        parameters.append(view)
        buffer.extents.extend(_extents(piece, view.offset, sources))
    packed = tuple(
        buffer.packed(piece.target.name, _coded(sources[piece.runs[0][0]])) for piece in coded_ones if piece.stays
    )
    parameter_nbytes = buffer.end
    for coded, view in zip(expanded, decoded, strict=True):
        _expand(buffer, coded, view)
    conversions = []
    for one in converted:
        views = tuple(
            known[name] if name in known else buffer.stored(_plain(sources[name])) for name in one.group.sources
        )
        conversions.append(Conversion(tuple(target.name for target in one.targets), views, one, one.reason))
    for name, view in known.items():
        buffer.expansion([_coded(sources[name])], view, PARAMETER_ALIGNMENT)
    return Layout(
        parameters=(*parameters, *decoded),
        extents=_merged(buffer.extents),
        conversions=tuple(conversions),
        wire_offset=wire_offset,
        parameter_nbytes=parameter_nbytes,
        nbytes=buffer.end,
        expansions=tuple(buffer.expansions),
        encodings=tuple(sorted(buffer.encodings, key=lambda one: (str(one.file.path), one.source))),
        packed=packed,
    )


def _decoded_sources(buffer: _Buffer, converted: Iterable[Converted]) -> dict[str, View]:
    """Make room for what coded sources of conversions are decoded to."""
    names = dict.fromkeys(name for one in converted for name in one.group.sources)
    coded = {name: source for name in names if isinstance(source := buffer.sources[name], CodedTensor)}
    return {name: buffer.view(name, one.dtype, one.shape, one.coding.nbytes) for name, one in coded.items()}


def _plain(source: TensorEntry | CodedTensor) -> TensorEntry:
    assert isinstance(source, TensorEntry)
    return source


def _coded(source: TensorEntry | CodedTensor) -> CodedTensor:
    assert isinstance(source, CodedTensor)
    return source


def _aligned(offset: int) -> int:
    return -(-offset // PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT


def _expand(buffer: _Buffer, piece: Expanded, whole: View) -> None:
    """Expand a parameter's coded tensors, as many at once as share a coding and lie at equal steps."""
    by_coding: dict[Coding | ScaledCoding, list[tuple[int, CodedTensor]]] = defaultdict(list)
    for name, start in piece.runs:
        one = _coded(buffer.sources[name])
        by_coding[one.coding].append((start * piece.target.dtype.itemsize, one))
    for coding, items in by_coding.items():
        for begin, step, coded in _even_runs(sorted(items, key=lambda item: item[0])):
            target = View(whole.name, coding.dtype, coding.shape, whole.offset + begin, coding.nbytes)
            buffer.expansion(coded, target, step or PARAMETER_ALIGNMENT)


def _even_runs(items: Sequence[tuple[int, CodedTensor]]) -> Iterator[tuple[int, int, list[CodedTensor]]]:
    """Cut sorted (offset, tensor) pairs into runs of equal steps; yield (first offset, step, tensors)."""
    at = 0
    while at < len(items):
        step = items[at + 1][0] - items[at][0] if at + 1 < len(items) else 0
        stop = at + 1
        while stop < len(items) and items[stop][0] - items[stop - 1][0] == step:
            stop += 1
        yield items[at][0], step, [one for _, one in items[at:stop]]
        at = stop


def _sorted(pieces: list[_P], sources: Sources) -> list[_P]:
    return sorted(pieces, key=lambda piece: _place(piece, sources))


def _place(piece: Placed | Expanded, sources: Sources) -> tuple[str, int]:
    """Where on disk a parameter begins."""
    if isinstance(piece, Expanded):
        starts = [(sources[name], 0) for name, _ in piece.runs]
    else:
        starts = [
            (sources[box.source], int(box.view.storage_offset()) * box.view.element_size()) for box in piece.boxes
        ]
    return min(((str(entry.file.path), entry.offset + start) for entry, start in starts), default=("", 0))


def runs_of(box: Box, shape: Sequence[int]) -> tuple[int, list[tuple[int, int, int]]]:
    """Take a box apart: elements of a contiguous run, and (count, source stride, destination stride) of outer dims."""
    steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    dims = [dim for dim in zip(box.view.shape, box.view.stride(), steps, strict=True) if dim[0] != 1]
    run = 1
    while dims and dims[-1][1] == run and dims[-1][2] == run:
        run *= dims.pop()[0]
    return run, dims


def _extents(piece: Placed, destination: int, sources: Sources) -> Iterator[Extent]:
    shape, itemsize = piece.target.shape, piece.target.dtype.itemsize
    steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    for box in piece.boxes:
        entry = sources[box.source]
        run, outer = runs_of(box, shape)
        start = sum(index * step for index, step in zip(box.start, steps, strict=True))
        for indices in itertools.product(*(range(count) for count, _, _ in outer)):
            moves = list(zip(indices, outer, strict=True))
            source = int(box.view.storage_offset()) + sum(index * stride for index, (_, stride, _) in moves)
            target = start + sum(index * step for index, (_, _, step) in moves)
            yield Extent(entry.file, entry.offset + source * itemsize, run * itemsize, destination + target * itemsize)


def _merged(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """Join extents that are neighbours both on disk and in the buffer; drop empty ones."""
    merged: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: (str(extent.file.path), extent.source, extent.destination)):
        last = merged[-1] if merged else None
        if extent.nbytes == 0:
            continue
        if (
            last is not None
            and last.file == extent.file
            and last.source + last.nbytes == extent.source
            and last.destination + last.nbytes == extent.destination
        ):
            merged[-1] = Extent(last.file, last.source, last.nbytes + extent.nbytes, last.destination)
        else:
            merged.append(extent)
    return tuple(merged)
