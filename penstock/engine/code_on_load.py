"""Choose what of a plain checkpoint's layers is coded when it is loaded, and how long that will be; nothing is written.

The weights that `penstock pack` would code get the same coding. Each becomes a coded tensor whose parts are in no file:
the weight stream makes them where the layer is loaded, and from there on it is as if the checkpoint were packed. What
is not in a layer is loaded once and never travels, so it stays as it is.

How long the exact codec's parts are depends on the values, and a plan is made before anything is loaded. So their
exponents are counted first: the weights are read twice, and every budget is true.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.engine.model.selection import layer_weights, linear_weights
from penstock.engine.model.weights import read_json
from penstock.engine.pack_plan import plan_tensors
from penstock.engine.pack_writer import PieceReader
from penstock.engine.quantised.recognise import read_scheme
from penstock.errors import ConfigError
from penstock.io.choose import open_reader
from penstock.io.files import SourceFile, TensorEntry
from penstock.io.memory import HostMemory
from penstock.io.settings import ReadSettings
from penstock.kernels import exact
from penstock.offload.codec import ANY_LENGTH, Coding, PackOptions
from penstock.offload.encode import PIECE_NBYTES, AtOnce, encoding_threads
from penstock.offload.manifest import MANIFEST, CodedTensor, Origin, Stored

__all__ = ["CodeOnLoad", "check_plain"]

_REGIONS = 4
_SHARE = 1 << 19

_Place = tuple[SourceFile, int, int]
_Found = tuple[bytes, int]
"""The exponents that get codes, and how many values have others."""

logger = logging.getLogger("penstock.engine")


def check_plain(directory: Path) -> None:
    """Refuse a checkpoint that is packed, or comes quantised: its weights bear no second loss. Raises ConfigError."""
    if (directory / MANIFEST).exists():
        fix = "Pack the model that it was made from, or run it without --codec."
        raise ConfigError("it is packed already", got=str(directory), fix=fix)
    file = directory / "config.json"
    scheme = read_scheme(read_json(file), file) if file.exists() else None
    if scheme is not None:
        raise ConfigError(
            f"it is quantised already, with {scheme.method}",
            got=str(directory),
            fix="Run it as it is, or pack the model that it was made from.",
        )


@dataclass(frozen=True, slots=True)
class CodeOnLoad:
    """Lets coded tensors stand for a checkpoint's plain ones. `settings` say how the disk is read."""

    options: PackOptions
    device: torch.device
    settings: ReadSettings

    def __call__(self, stored: Stored, module: object, layers_name: str, layers: Iterable[torch.nn.Module]) -> Stored:
        """Return the checkpoint with weights of `layers`, which is `layers_name` of `module`, coded.

        Raises ConfigError where nothing is to be coded, or excluded, and ReadError.
        """
        if self.options.codec == "exact-ans":
            fix = "Take exact, or pack the model with `penstock pack`."
            raise ConfigError("exact-ans cannot be packed on load", fix=fix)
        plain = {name: entry for name, entry in stored.tensors.items() if isinstance(entry, TensorEntry)}
        inside = layer_weights(module, layers_name, plain)
        linear = frozenset[str]() if self.options.codec == "exact" else linear_weights(module, layers, plain)
        planned = plan_tensors(plain.values(), self.options, linear)
        chosen = [(one.entry, one.coding) for one in planned if one.coding is not None and one.entry.name in inside]
        coded: dict[str, TensorEntry | CodedTensor] = dict(_coded(chosen, self._count))
        if not coded:
            dtypes = ", ".join(sorted({plain[name].dtype for name in inside}))
            wanted = "BF16 tensors" if self.options.codec == "exact" else "linear layers of a float dtype"
            fix = "Leave --codec out, or take another one."
            raise ConfigError(f"nothing to code as {self.options.codec}", wanted=wanted, got=dtypes, fix=fix)
        return Stored({**stored.tensors, **coded}, stored.checks)

    def _count(self, entries: Iterable[TensorEntry]) -> dict[_Place, _Found]:
        """Count the exponents of BF16 tensors; return what was found, by where they are. Each is read once."""
        places = dict.fromkeys(map(_place, entries))
        logger.info("counting the exponents of %d tensors", len(places))
        largest = min(max(nbytes for _, _, nbytes in places), PIECE_NBYTES)
        on_cuda = self.device.type == "cuda"
        with ExitStack() as stack:
            memory = stack.enter_context(HostMemory(PieceReader.memory_for(largest, num_regions=_REGIONS), pin=on_cuda))
            reader, _ = open_reader(
                self.settings.backend, next(iter(places))[0], memory.view, block_nbytes=self.settings.block_nbytes
            )
            stack.enter_context(reader)
            workers = AtOnce() if on_cuda else stack.enter_context(encoding_threads())
            read = PieceReader(reader, memory.view, num_regions=_REGIONS)
            pieces = stack.enter_context(closing(read(one for place in places for one in _ranges(place))))
            return {place: self._find(place, pieces, workers) for place in places}

    def _find(self, place: _Place, pieces: Iterator[memoryview], workers: Executor) -> _Found:
        """Take a tensor's pieces."""
        counts = torch.zeros(256, dtype=torch.int64, device=self.device)
        for _ in _ranges(place):
            values = torch.frombuffer(next(pieces), dtype=torch.bfloat16).to(self.device, copy=True)
            for found in workers.map(exact.count_exponents, values.split(_SHARE)):
                counts += found
        counts = counts.cpu()
        table = exact.table_of(counts)
        return bytes(table.tolist()), int(counts.sum() - counts[table[:15].long()].sum())


def _ranges(place: _Place) -> Iterator[_Place]:
    """Yield the pieces of a tensor."""
    file, start, nbytes = place
    for begin in range(0, nbytes, PIECE_NBYTES):
        yield file, start + begin, min(PIECE_NBYTES, nbytes - begin)


def _place(entry: TensorEntry) -> _Place:
    return entry.file, entry.offset, entry.nbytes


def _coded(
    chosen: list[tuple[TensorEntry, Coding]], count: Callable[[Iterable[TensorEntry]], Mapping[_Place, _Found]]
) -> Iterator[tuple[str, CodedTensor]]:
    """Yield the coded tensors that pay, by name."""
    to_count = [entry for entry, coding in chosen if coding.codec == "exact"]
    found = count(to_count) if to_count else {}
    for entry, coding in chosen:
        table, escapes = found.get(_place(entry), (b"", 0))
        parts = tuple(
            TensorEntry(
                f"{entry.name}.{part.suffix}",
                entry.file,
                entry.offset,
                escapes if ANY_LENGTH in part.shape else part.nbytes,
                part.dtype,
                tuple(escapes if size == ANY_LENGTH else size for size in part.shape),
            )
            for part in coding.parts
        )
        if sum(part.nbytes for part in parts) < entry.nbytes:
            yield entry.name, CodedTensor(entry.name, coding, parts, Origin(entry, table))
