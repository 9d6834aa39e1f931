"""From a checkpoint's tensors to each unit's layout: which bytes go where, and what is converted on arrival."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.engine.model.conversion import WeightGroup, group_weights, parameter_dtypes
from penstock.engine.model.placement import Converted, Expanded, Piece, Placed, Sources, Target, lay_out, runs_of
from penstock.engine.model.symbolic import Box, NotPureMovement, SymbolicTensor
from penstock.errors import CheckpointError, MissingWeightError, UnsupportedFormatError
from penstock.io.files import TensorEntry
from penstock.offload.buffers import DTYPES
from penstock.offload.codec import Coding
from penstock.offload.layout import Layout
from penstock.offload.manifest import CodedTensor

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


def map_weights(
    model: Any,
    tensors: Sources,
    *,
    directory: Path,
    layers: str,
    num_layers: int,
    dtype: torch.dtype,
    needed: Callable[[str], bool],
    stays: Callable[[str, Coding], bool] | None = None,
) -> WeightMap:
    """Lay out every parameter and persistent buffer for which `needed(name)` holds.

    `layers` is the name of the module list whose members are the streamed units; the rest is the resident unit. Tensors
    that no parameter needs are ignored. Parameters of layers for which `stays(name, coding)` holds are not decoded.
    Raises MissingWeightError, UnsupportedFormatError, and CheckpointError where a tensor does not fit its parameter.
    """
    dtypes = parameter_dtypes(model, dtype)
    targets = {
        name: Target(name, dtypes[name], tuple(tensor.shape))
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
    if stays is not None:
        for index in range(num_layers):
            units[index] = [_undecoded(piece, tensors, aliases, stays) for piece in units[index]]
    return WeightMap(
        resident=lay_out(units[-1], tensors),
        layers=tuple(lay_out(units[index], tensors) for index in range(num_layers)),
        aliases=aliases,
    )


def _targets(piece: Piece) -> tuple[Target, ...]:
    return piece.targets if isinstance(piece, Converted) else (piece.target,)


def _follow(group: WeightGroup, tensors: Sources, targets: Mapping[str, Target]) -> list[Piece]:
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
    if reason is None:
        moved = [_move(target, made[target.name], tensors) for target in wanted]
        pieces = [piece for piece in moved if piece is not None]
        if len(pieces) == len(wanted):
            return pieces
        reason = "coded tensors that do not move as a whole"
    return [Converted(group, tuple(wanted), reason)]


def _move(target: Target, tensor: Tensor, tensors: Sources) -> Piece | None:
    """Return a parameter whose bytes only move: as they are, or expanded on arrival; None where that cannot be."""
    assert isinstance(tensor, SymbolicTensor)
    coded = [box for box in tensor.boxes if isinstance(tensors[box.source], CodedTensor)]
    if not coded:
        return Placed(target, tensor.boxes)
    starts = [_whole(box, tensor.shape, tensors) for box in tensor.boxes]
    names = [box.source for box in tensor.boxes]
    if len(coded) < len(names):
        return None
    runs = tuple((name, start) for name, start in zip(names, starts, strict=True) if start is not None)
    return Expanded(target, runs) if len(runs) == len(names) else None


def _undecoded(
    piece: Piece, tensors: Sources, aliases: Mapping[str, tuple[str, ...]], stays: Callable[[str, Coding], bool]
) -> Piece:
    """Return a piece; if it is a parameter of its own that stays coded, marked so. Such are not cast either."""
    if isinstance(piece, Converted) and piece.group.renames_only:
        (target,), names = piece.targets, piece.group.sources
    elif isinstance(piece, Expanded):
        target, names = piece.target, [name for name, _ in piece.runs]
    else:
        return piece
    source = tensors[names[0]]
    coding = source.coding if isinstance(source, CodedTensor) else None
    if len(names) > 1 or target.name in aliases or not isinstance(coding, Coding) or coding.shape != target.shape:
        return piece
    return Expanded(target, ((names[0], 0),), stays=True) if stays(target.name, coding) else piece


def _whole(box: Box, shape: Sequence[int], tensors: Sources) -> int | None:
    """Return where in the parameter a source begins, if the box is all of it, in order, and fills one run there."""
    run, outer = runs_of(box, shape)
    if outer or box.view.storage_offset() or run != math.prod(tensors[box.source].shape):
        return None
    steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return sum(index * step for index, step in zip(box.start, steps, strict=True))


def _convert(
    group: WeightGroup, entries: Sequence[TensorEntry | CodedTensor], tensors: Sequence[Tensor]
) -> dict[str, Tensor]:
    try:
        return group.convert(tensors)
    except (ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"the tensors for {group.target} do not fit together: {error}",
            file=entries[0].file.path,
            got=", ".join(f"{entry.name} {entry.shape}" for entry in entries[:4]),
            fix="Check that config.json belongs to these weights.",
        ) from error


def _dtype(entry: TensorEntry | CodedTensor) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise UnsupportedFormatError(
            f"tensor {entry.name!r} has a dtype that torch does not have", file=entry.file.path, got=entry.dtype
        )
    return DTYPES[entry.dtype]


def _misfit(
    group: WeightGroup, entries: Sequence[TensorEntry | CodedTensor], target: Target, got: tuple[int, ...]
) -> CheckpointError:
    return CheckpointError(
        f"tensor {entries[0].name!r} does not fit parameter {target.name!r}",
        file=entries[0].file.path,
        wanted=f"shape {target.shape}",
        got=f"shape {got}" + ("" if group.renames_only else f" from {len(entries)} tensors"),
        fix="Check that config.json belongs to these weights.",
    )


def _obstacle(tensor: Tensor, target: Target | None) -> str | None:
    """Say why a tensor that is pure movement is better converted, if it is."""
    assert isinstance(tensor, SymbolicTensor)
    if target is None:
        return None
    if tensor.dtype != target.dtype:
        return f"cast from {tensor.dtype} to {target.dtype}"
    for box in tensor.boxes:
        run, outer = runs_of(box, tensor.shape)
        num_runs = math.prod(count for count, _, _ in outer)
        if num_runs > _MAX_RUNS or (num_runs > _FEW_RUNS and run * tensor.element_size() < MIN_RUN_NBYTES):
            return f"{num_runs} runs of {run * tensor.element_size()} bytes"
    return None


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
    pieces: Iterable[Piece], aliases: Mapping[str, tuple[str, ...]], duplicates: set[str], layers: str
) -> dict[int, list[Piece]]:
    """Sort pieces by unit: the layer's index, or -1 for the resident unit, where what layers share goes too."""
    units: dict[int, list[Piece]] = defaultdict(list)

    def unit(name: str) -> int:
        found = {
            int(one.removeprefix(f"{layers}.").split(".")[0]) if one.startswith(f"{layers}.") else -1
            for one in (name, *aliases.get(name, ()))
        }
        return found.pop() if len(found) == 1 else -1

    for piece in pieces:
        by_unit: dict[int, list[Target]] = defaultdict(list)
        for target in _targets(piece):
            if target.name not in duplicates:
                by_unit[unit(target.name)].append(target)
        for index, targets in by_unit.items():
            part = Converted(piece.group, tuple(targets), piece.reason) if isinstance(piece, Converted) else piece
            units[index].append(part)
    return units
