"""What `pack` will do, decided before anything is read: the codec of each tensor and the shard that it goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from penstock.errors import ConfigError
from penstock.io.files import TensorEntry
from penstock.io.shard import header_room
from penstock.offload.codec import ANS_CHUNK, LOSSLESS, Coding, PackOptions

__all__ = ["PlannedShard", "PlannedTensor", "plan_pack", "plan_tensors"]

SHARD_NBYTES = 4 << 30
MIN_NBYTES = 4096
"""Smaller tensors stay as they are: what they could save, headers and kernels would cost."""

_DTYPES = {"exact": {"BF16"}, "exact-ans": {"BF16"}, "int8": {"BF16", "F16", "F32"}, "int4": {"BF16", "F16", "F32"}}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor and the codec that it will have if that pays; None leaves it as it is."""

    entry: TensorEntry
    coding: Coding | None

    @property
    def names(self) -> tuple[tuple[str, int], ...]:
        """Every tensor that may be stored for it: (name, number of dims)."""
        parts = self.coding.parts if self.coding else ()
        stored = ((f"{self.entry.name}.{part.suffix}", len(part.shape)) for part in parts)
        return ((self.entry.name, len(self.entry.shape)), *stored)

    @property
    def expected_nbytes(self) -> int:
        """About what will be stored; for integer codecs to the byte."""
        return self.entry.nbytes if self.coding is None else self.coding.packed_nbytes


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """Tensors that are stored in one file, one after the other from `data_start` on."""

    name: str
    data_start: int
    tensors: tuple[PlannedTensor, ...]


def plan_tensors(entries: Iterable[TensorEntry], options: PackOptions, linear: frozenset[str]) -> list[PlannedTensor]:
    """Choose the codec of each tensor, in the order of their bytes; arguments and errors as for `plan_pack`."""
    ordered = sorted(entries, key=lambda entry: (str(entry.file.path), entry.offset, entry.name))
    _check_patterns(options.exclude, [entry.name for entry in ordered])
    return [PlannedTensor(entry, _coding(entry, options, linear)) for entry in ordered]


def plan_pack(
    entries: Iterable[TensorEntry],
    options: PackOptions,
    linear: frozenset[str],
    *,
    shard_nbytes: int = SHARD_NBYTES,
) -> tuple[PlannedShard, ...]:
    """Plan the pack of a checkpoint; `linear` names the tensors that integer codecs may code. Raises ConfigError."""
    planned = plan_tensors(entries, options, linear)
    _check_names(planned)
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in planned:
        if shards[-1] and filled + tensor.entry.nbytes > shard_nbytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.entry.nbytes if options.codec in LOSSLESS else tensor.expected_nbytes
    name = _namer(len(shards))
    return tuple(
        PlannedShard(name(number), header_room(one for tensor in shard for one in tensor.names), tuple(shard))
        for number, shard in enumerate(shards, 1)
    )


def _namer(count: int) -> Callable[[int], str]:
    if count == 1:
        return lambda _: "model.safetensors"
    return lambda number: f"model-{number:05d}-of-{count:05d}.safetensors"


def _coding(entry: TensorEntry, options: PackOptions, linear: frozenset[str]) -> Coding | None:
    if entry.nbytes < MIN_NBYTES or entry.dtype not in _DTYPES[options.codec]:
        return None
    if any(fnmatchcase(entry.name, pattern) for pattern in options.exclude):
        return None
    if options.codec in LOSSLESS:
        coding = Coding(options.codec, entry.dtype, entry.shape)
        return Coding("exact", entry.dtype, entry.shape) if coding.size < ANS_CHUNK else coding
    if entry.name not in linear:
        return None
    coding = Coding(options.codec, entry.dtype, entry.shape, options.group_size, options.symmetric)
    return coding if sum(part.nbytes for part in coding.parts) < entry.nbytes else None


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError("nothing to exclude", wanted="a pattern of tensors in the checkpoint", got=repr(pattern))


def _check_names(planned: Sequence[PlannedTensor]) -> None:
    taken = {tensor.entry.name for tensor in planned}
    for tensor in planned:
        for name, _ in tensor.names[1:]:
            if name in taken:
                raise ConfigError("the checkpoint has a tensor of the name that a part would get", got=repr(name))
