"""From a checkpoint's tensors to each unit's layout: which bytes go where, and what is converted on arrival."""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.engine.model.conversion import WeightGroup, group_weights, parameter_dtypes
from penstock.engine.model.symbolic import Box, NotPureMovement, SymbolicTensor
from penstock.errors import CheckpointError, MissingWeightError, UnsupportedFormatError
from penstock.io.files import TensorEntry
from penstock.offload.buffers import DTYPES, dtype_name
from penstock.offload.layout import PARAMETER_ALIGNMENT, Conversion, Extent, Layout, View

__all__ = ["WeightMap", "map_weights"]

MIN_RUN_NBYTES = 4096
"""A tensor in more than `_FEW_RUNS` runs, each shorter than this, is moved whole and put in order on arrival."""
_FEW_RUNS = 16
_MAX_RUNS = 4096

logger = logging.getLogger("penstock.engine")


@dataclass(frozen=True, slots=True)
class WeightMap:
    """The layouts of all units. `aliases` names, for a parameter of a layout, the others that share its memory."""

    resident: Layout
    layers: tuple[Layout, ...]
    aliases: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _Target:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Placed:
    """A parameter made of checkpoint bytes that only move."""

    target: _Target
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class _Converted:
    """Parameters that transformers' own operations make from real tensors."""

    group: WeightGroup
    targets: tuple[_Target, ...]
    reason: str

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Cast first, as transformers does when it loads, then convert."""
        if not self.group.renames_only:
            tensors = tuple(tensor.to(self.targets[0].dtype) for tensor in tensors)
        made = self.group.convert(tensors)
        return tuple(made[target.name] for target in self.targets)


_Piece = _Placed | _Converted


def map_weights(
    model: Any,
    tensors: Mapping[str, TensorEntry],
    *,
    directory: Path,
    layers: str,
    num_layers: int,
    dtype: torch.dtype,
    needed: Callable[[str], bool],
) -> WeightMap:
    """Lay out every parameter and persistent buffer for which `needed(name)` holds.

    `layers` is the name of the module list whose members are the streamed units; the rest is the resident unit. Tensors
    that no parameter needs are ignored. Raises MissingWeightError, UnsupportedFormatError, and CheckpointError where a
    tensor does not fit its parameter.
    """
    dtypes = parameter_dtypes(model, dtype)
    targets = {
        name: _Target(name, dtypes[name], tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if needed(name)
    }
    groups, unexpected = group_weights(model, tensors)
    pieces = [piece for group in groups if needed(group.target) for piece in _follow(group, tensors, targets)]
    for level, names in (
        (logging.WARNING, [name for name in unexpected if name.startswith(f"{layers}.")]),
        (logging.INFO, [name for name in unexpected if not name.startswith(f"{layers}.")]),
    ):
        if names:
            logger.log(
                level, "%s: %d tensors that the model does not need, such as %s", directory, len(names), names[0]
            )
    provided = {target.name for piece in pieces for target in _targets(piece)}
    aliases = _share(model, provided, needed)
    _check_missing(model, directory, set(targets) - provided - {alias for names in aliases.values() for alias in names})
    duplicates = provided & {alias for names in aliases.values() for alias in names}
    units = _assign(pieces, aliases, duplicates, layers)
    return WeightMap(
        resident=_lay_out(units[-1], tensors),
        layers=tuple(_lay_out(units[index], tensors) for index in range(num_layers)),
        aliases=aliases,
    )


def _targets(piece: _Piece) -> tuple[_Target, ...]:
    return (piece.target,) if isinstance(piece, _Placed) else piece.targets


def _follow(group: WeightGroup, tensors: Mapping[str, TensorEntry], targets: Mapping[str, _Target]) -> list[_Piece]:
    """Find out how a group makes its parameters: by moving bytes, or by a conversion."""
    entries = [tensors[name] for name in group.sources]
    symbols = [SymbolicTensor.of(entry.name, entry.shape, _dtype(entry)) for entry in entries]
    made: Mapping[str, Tensor]
    try:
        made = _convert(group, entries, symbols)
        reason = next(filter(None, (_obstacle(tensor, targets.get(name)) for name, tensor in made.items())), None)
    except NotPureMovement as obstacle:
        reason = f"{obstacle} is not pure movement"
        made = _convert(
            group, entries, [torch.empty(symbol.shape, dtype=symbol.dtype, device="meta") for symbol in symbols]
        )
    for name, tensor in made.items():
        if name in targets and tuple(tensor.shape) != targets[name].shape:
            raise _misfit(group, entries, targets[name], tuple(tensor.shape))
    wanted = [targets[name] for name in made if name in targets]
    if reason is not None:
        return [_Converted(group, tuple(wanted), reason)]
    return [_Placed(target, made[target.name].boxes) for target in wanted]  # type: ignore[attr-defined]


def _convert(group: WeightGroup, entries: Sequence[TensorEntry], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    try:
        return group.convert(tensors)
    except (ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"the tensors for {group.target} do not fit together: {error}",
            file=entries[0].file.path,
            got=", ".join(f"{entry.name} {entry.shape}" for entry in entries[:4]),
            fix="Check that config.json belongs to these weights.",
        ) from error


def _dtype(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise UnsupportedFormatError(
            f"tensor {entry.name!r} has a dtype that torch does not have", file=entry.file.path, got=entry.dtype
        )
    return DTYPES[entry.dtype]


def _misfit(
    group: WeightGroup, entries: Sequence[TensorEntry], target: _Target, got: tuple[int, ...]
) -> CheckpointError:
    return CheckpointError(
        f"tensor {entries[0].name!r} does not fit parameter {target.name!r}",
        file=entries[0].file.path,
        wanted=f"shape {target.shape}",
        got=f"shape {got}" + ("" if group.renames_only else f" from {len(entries)} tensors"),
        fix="Check that config.json belongs to these weights.",
    )


def _obstacle(tensor: Tensor, target: _Target | None) -> str | None:
    """Say why a tensor that is pure movement is better converted, if it is."""
    assert isinstance(tensor, SymbolicTensor)
    if target is None:
        return None
    if tensor.dtype != target.dtype:
        return f"cast from {tensor.dtype} to {target.dtype}"
    for box in tensor.boxes:
        run, outer = _runs(box, tensor.shape)
        num_runs = math.prod(count for count, _, _ in outer)
        if num_runs > _MAX_RUNS or (num_runs > _FEW_RUNS and run * tensor.element_size() < MIN_RUN_NBYTES):
            return f"{num_runs} runs of {run * tensor.element_size()} bytes"
    return None


def _runs(box: Box, shape: Sequence[int]) -> tuple[int, list[tuple[int, int, int]]]:
    """Take a box apart: elements of a contiguous run, and (count, source stride, destination stride) of outer dims."""
    steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    dims = [dim for dim in zip(box.view.shape, box.view.stride(), steps, strict=True) if dim[0] != 1]
    run = 1
    while dims and dims[-1][1] == run and dims[-1][2] == run:
        run *= dims.pop()[0]
    return run, dims


def _share(model: Any, provided: set[str], needed: Callable[[str], bool]) -> dict[str, tuple[str, ...]]:
    """Find names that share memory: one module under several names, and tied parameters of which one is stored.

    Tied parameters that are both stored stay two: equal, or, as transformers has it, not tied after all.
    """
    places: dict[tuple[int, str], list[str]] = defaultdict(list)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf in (*module._parameters, *(set(module._buffers) - module._non_persistent_buffers_set)):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if needed(name):
                places[id(module), leaf].append(name)
    first = {name: names[0] for names in places.values() for name in names}
    ties: dict[str, list[str]] = defaultdict(list)
    for target, source in model.all_tied_weights_keys.items():
        if target in first and source in first and first[target] != first[source]:
            ties[first[source]].append(first[target])
    stored = {first[name] for name in provided}
    owner = {name: name for name in first.values()}
    for source, names in ties.items():
        family = [source, *names]
        kept = next((name for name in family if name in stored), source)
        owner.update({name: kept for name in family if name not in stored})
    members: dict[str, list[str]] = defaultdict(list)
    for name, at in first.items():
        members[owner[at]].append(name)
    aliases = {}
    for names in members.values():
        kept = next((name for name in names if name in provided), names[0])
        if len(names) > 1:
            aliases[kept] = tuple(name for name in names if name != kept)
    return aliases


def _check_missing(model: Any, directory: Path, missing: set[str]) -> None:
    """Refuse missing parameters; a missing buffer keeps the value that the model computed."""
    buffers = {name for name, buffer in model.named_buffers() if not buffer.is_meta} & missing
    if buffers:
        logger.warning("%s: not stored, computed instead: %s", directory, ", ".join(sorted(buffers)[:5]))
    names = sorted(missing - buffers)
    if names:
        raise MissingWeightError(
            f"{len(names)} parameters of the model are not in the checkpoint",
            file=directory,
            wanted=", ".join(names[:5]) + (", ..." if len(names) > 5 else ""),
            fix="Download the checkpoint again, or check that config.json belongs to these weights.",
        )


def _assign(
    pieces: Iterable[_Piece], aliases: Mapping[str, tuple[str, ...]], duplicates: set[str], layers: str
) -> dict[int, list[_Piece]]:
    """Sort pieces by unit: the layer's index, or -1 for the resident unit, where what layers share goes too."""
    units: dict[int, list[_Piece]] = defaultdict(list)

    def unit(name: str) -> int:
        found = {
            int(one.removeprefix(f"{layers}.").split(".")[0]) if one.startswith(f"{layers}.") else -1
            for one in (name, *aliases.get(name, ()))
        }
        return found.pop() if len(found) == 1 else -1

    for piece in pieces:
        by_unit: dict[int, list[_Target]] = defaultdict(list)
        for target in _targets(piece):
            if target.name not in duplicates:
                by_unit[unit(target.name)].append(target)
        for index, targets in by_unit.items():
            part = piece if isinstance(piece, _Placed) else _Converted(piece.group, tuple(targets), piece.reason)
            units[index].append(part)
    return units


def _lay_out(pieces: Sequence[_Piece], tensors: Mapping[str, TensorEntry]) -> Layout:
    """Lay out one unit: converted parameters, placed ones in the order of their bytes on disk, sources."""
    cursor = 0

    def view(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> View:
        nonlocal cursor
        made = View(name, dtype, shape, cursor, nbytes)
        cursor = _aligned(cursor + nbytes)
        return made

    converted = [piece for piece in pieces if isinstance(piece, _Converted)]
    placed = sorted((piece for piece in pieces if isinstance(piece, _Placed)), key=lambda piece: _place(piece, tensors))
    parameters = [
        view(target.name, dtype_name(target.dtype), target.shape, target.nbytes)
        for one in converted
        for target in one.targets
    ]
    extents: list[Extent] = []
    conversions = []
    wire_offset = cursor
    for piece in placed:
        target = piece.target
        parameters.append(view(target.name, dtype_name(target.dtype), target.shape, target.nbytes))
        extents.extend(_extents(piece, parameters[-1].offset, tensors))
    parameter_nbytes = cursor
    for one in converted:
        sources = []
        for entry in (tensors[name] for name in one.group.sources):
            sources.append(view(entry.name, entry.dtype, entry.shape, entry.nbytes))
            extents.append(Extent(entry.file, entry.offset, entry.nbytes, sources[-1].offset))
        conversions.append(Conversion(tuple(target.name for target in one.targets), tuple(sources), one, one.reason))
    return Layout(tuple(parameters), _merged(extents), tuple(conversions), wire_offset, parameter_nbytes, cursor)


def _aligned(offset: int) -> int:
    return -(-offset // PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT


def _place(piece: _Placed, tensors: Mapping[str, TensorEntry]) -> tuple[str, int]:
    """Where on disk a parameter begins."""
    places = ((tensors[box.source], box.view) for box in piece.boxes)
    return min(
        (
            (str(entry.file.path), entry.offset + int(view.storage_offset()) * view.element_size())
            for entry, view in places
        ),
        default=("", 0),
    )


def _extents(piece: _Placed, destination: int, tensors: Mapping[str, TensorEntry]) -> Iterator[Extent]:
    shape, itemsize = piece.target.shape, piece.target.dtype.itemsize
    steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    for box in piece.boxes:
        entry = tensors[box.source]
        run, outer = _runs(box, shape)
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
