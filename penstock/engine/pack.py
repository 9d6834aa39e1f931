"""Pack a checkpoint: read it once, code what pays, write safetensors shards and a manifest. Memory does not grow."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.engine.code_on_load import check_plain
from penstock.engine.model.build import load_model
from penstock.engine.model.selection import linear_weights
from penstock.engine.pack_journal import Finished, Job, Workplace, check_space
from penstock.engine.pack_plan import SHARD_NBYTES, PlannedShard, PlannedTensor, plan_pack
from penstock.engine.pack_writer import PieceReader, ShardWriter, StoredPart
from penstock.errors import ConfigError, OutputError, ReadError
from penstock.io.atomic import naming, sync_directory
from penstock.io.checkpoint import INDEX_FILE, Checkpoint
from penstock.io.choose import open_reader
from penstock.io.files import SourceFile, TensorEntry
from penstock.io.memory import HostMemory
from penstock.io.settings import ReadSettings
from penstock.io.shard import shard_header
from penstock.kernels import ans
from penstock.offload.buffers import DTYPES
from penstock.offload.codec import ANY_LENGTH, LOSSLESS, Coding, PackOptions
from penstock.offload.encode import DoesNotPay, Encoder, encoder_for, encoding_threads, piece_nbytes
from penstock.offload.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    SourceRecord,
    TensorRecord,
    manifest_text,
    read_manifest,
)

__all__ = ["PackReport", "pack"]

_REGIONS = 4
_SMALL_NBYTES = 256 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx")

logger = logging.getLogger("penstock.engine")


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a pack did. `resumed_nbytes` of the source had been done by an earlier run."""

    codec: str
    source_nbytes: int
    packed_nbytes: int
    resumed_nbytes: int
    num_coded: int
    num_plain: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self) | {"ratio": self.packed_nbytes / max(self.source_nbytes, 1)}


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PackOptions,
    *,
    settings: ReadSettings | None = None,
    shard_nbytes: int = SHARD_NBYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Pack the checkpoint directory `model` into the new directory `out`, or go on with what was begun there.

    `on_progress` is called with (source bytes done, source bytes in all). Raises CheckpointError and ModelError for a
    model that cannot be read, ConfigError for options that do not suit it, NoSpaceError before the disk is full,
    JournalError where another pack was begun, and OutputError.
    """
    start = time.perf_counter()
    source, out, options = Path(model), Path(os.path.abspath(out)), options.resolved()
    check_plain(source)
    checkpoint = Checkpoint.open(source)
    if not checkpoint.tensors:
        raise ConfigError("a checkpoint without tensors", got=str(source))
    if options.codec == "exact-ans":
        ans.find_device()  # it says what is missing
    linear = frozenset[str]() if options.codec in LOSSLESS else _linear(source, checkpoint)
    shards = plan_pack(checkpoint.tensors.values(), options, linear, shard_nbytes=shard_nbytes)
    files = tuple(SourceRecord(file.path.name, file.nbytes, file.mtime_ns) for file in checkpoint.files)
    job = Job(options, files, shard_nbytes)
    if not out.parent.is_dir():
        raise OutputError("no such directory", file=out.parent)
    with Workplace(out, job) as place:
        resumed = sum(checkpoint.tensors[name].nbytes for name in place.finished)
        if not place.is_whole:
            left = [one for shard in shards for one in shard.tensors if one.entry.name not in place.finished]
            check_space(out.parent, sum(one.expected_nbytes for one in left))
            _Packer(place, options, on_progress, checkpoint.nbytes).run(shards, left, settings or ReadSettings())
            _finish(place, source, job, shards)
        place.publish()
    manifest = read_manifest(out)
    assert manifest is not None
    coded = sum(record.coding is not None for record in manifest.tensors.values())
    return PackReport(
        codec=options.codec,
        source_nbytes=checkpoint.nbytes,
        packed_nbytes=Checkpoint.open(out).nbytes,
        resumed_nbytes=resumed,
        num_coded=coded,
        num_plain=len(manifest.tensors) - coded,
        seconds=time.perf_counter() - start,
    )


def _linear(source: Path, checkpoint: Checkpoint) -> frozenset[str]:
    model = load_model(source)
    return linear_weights(model.module, model.layers, checkpoint.tensors)


class _Packer:
    """Goes through the tensors that are left, in the order of their bytes."""

    def __init__(
        self,
        place: Workplace,
        options: PackOptions,
        on_progress: Callable[[int, int], None] | None,
        total: int,
    ) -> None:
        self._place = place
        self._search = bool(options.search)
        self._on_progress = on_progress
        self._total = total
        self._read = 0

    def run(self, shards: Sequence[PlannedShard], left: Sequence[PlannedTensor], settings: ReadSettings) -> None:
        """Write what is left of all shards; then all tensors are in the journal."""
        self._read = self._total - sum(one.entry.nbytes for one in left)
        largest = max((min(piece_nbytes(one.coding), one.entry.nbytes) for one in left), default=1)
        with HostMemory(PieceReader.memory_for(largest, num_regions=_REGIONS)) as memory:
            reader, _ = open_reader(
                settings.backend, shards[0].tensors[0].entry.file, memory.view, block_nbytes=settings.block_nbytes
            )
            with reader, encoding_threads() as workers:
                read = PieceReader(reader, memory.view, num_regions=_REGIONS)
                with closing(read(_ranges(left))) as pieces:
                    for shard in shards:
                        self._write_shard(shard, self._counted(pieces), workers)

    def _write_shard(self, shard: PlannedShard, pieces: Iterator[memoryview], workers: Executor) -> None:
        place, end = self._place, shard.data_start
        with naming(place.directory), ShardWriter(place.directory / shard.name, place.note) as writer:
            for tensor in shard.tensors:
                known = place.finished.get(tensor.entry.name)
                if known is None:
                    end = _TensorPacker(tensor, writer, end, self._encoder(tensor, workers)).run(pieces)
                else:
                    end = max(one.offset + one.nbytes for one in known.stored)
            names = [tensor.entry.name for tensor in shard.tensors]
            writer.seal(
                lambda: shard_header((one for name in names for one in place.finished[name].stored), shard.data_start),
                end,
            )

    def _encoder(self, tensor: PlannedTensor, workers: Executor) -> Encoder | None:
        if tensor.coding is None or not tensor.entry.nbytes:
            return None
        return encoder_for(tensor.coding, workers, search=self._search)

    def _counted(self, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        for piece in pieces:
            self._read += piece.nbytes
            if self._on_progress:
                self._on_progress(self._read, self._total)
            yield piece  # nobody comes back after the last one of a shard


def _ranges(tensors: Sequence[PlannedTensor]) -> Iterator[tuple[SourceFile, int, int]]:
    for tensor in tensors:
        size = piece_nbytes(tensor.coding)
        for begin in range(0, tensor.entry.nbytes, size):
            yield tensor.entry.file, tensor.entry.offset + begin, min(size, tensor.entry.nbytes - begin)


class _TensorPacker:
    """Writes one tensor from `start` of a shard on, coded if that pays."""

    def __init__(self, tensor: PlannedTensor, writer: ShardWriter, start: int, encoder: Encoder | None) -> None:
        self._entry, self._writer, self._start = tensor.entry, writer, start
        self._coding = tensor.coding if encoder else None
        self._encoder = encoder
        self._parts = _parts(self._entry, self._coding, start)
        self._note: str | None = None
        self._taken = 0

    def run(self, pieces: Iterator[memoryview]) -> int:
        """Take the tensor's pieces, write them, and return where they end. What is left is the next tensors'."""
        while self._taken < self._entry.nbytes:
            piece = next(pieces)
            self._take(piece)
            self._taken += piece.nbytes
        self._writer.finish(self._finished)
        return max(part.offset + part.nbytes for part in self._parts)

    def _take(self, piece: memoryview) -> None:
        values = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
        made: tuple[Tensor, ...] = (values,)
        if self._encoder is not None and self._coding is not None:
            try:
                made = self._encoder.encode(values.view(DTYPES[self._coding.dtype]))
            except DoesNotPay as reason:
                self._go_plain(str(reason))
        for part, values_of_part in zip(self._parts, made, strict=True):
            self._append(part, values_of_part)

    def _append(self, part: StoredPart, values: Tensor) -> None:
        if values.numel():
            self._writer.write(part, values)

    def _go_plain(self, reason: str) -> None:
        """Store the tensor as it is after all: begin again, and read once more what has been taken."""
        logger.info("%s stays as it is: %s", self._entry.name, reason)
        self._coding, self._encoder, self._note = None, None, reason
        self._parts = _parts(self._entry, None, self._start)
        with open(self._entry.file.path, "rb", buffering=0) as file:
            file.seek(self._entry.offset)
            left = self._taken
            while left:
                content = bytearray(file.read(min(left, 8 << 20)))
                if not content:
                    raise ReadError("the file has become shorter", file=self._entry.file.path)
                self._append(self._parts[0], torch.frombuffer(content, dtype=torch.uint8))
                left -= len(content)

    def _finished(self) -> Finished:
        stored = tuple(
            part.frozen((part.nbytes,) if part.shape == (ANY_LENGTH,) else part.shape) for part in self._parts
        )
        return Finished(self._entry.name, self._coding, stored, tuple(part.crc32 for part in self._parts), self._note)


def _parts(entry: TensorEntry, coding: Coding | None, start: int) -> list[StoredPart]:
    """Place a tensor's parts one after the other; the one of any length is the last."""
    if coding is None:
        return [StoredPart(entry.name, entry.dtype, entry.shape, start)]
    made = []
    for part in coding.parts:
        made.append(StoredPart(f"{entry.name}.{part.suffix}", part.dtype, part.shape, start))
        start += part.nbytes
    return made


def _finish(place: Workplace, source: Path, job: Job, shards: Sequence[PlannedShard]) -> None:
    """Add everything that is not weights: small files, the index, and the manifest, which is the last."""
    with naming(place.directory):
        copied = _copy_small_files(source, place.directory)
        if len(shards) > 1:
            _write_index(place, shards)
            copied.append(INDEX_FILE)
        sync_directory(place.directory)
    records = {name: _record(place.directory / name) for name in copied}
    records |= {shard.name: _record(place.directory / shard.name, shard.data_start) for shard in shards}
    manifest = Manifest(
        format="penstock packed checkpoint",
        version=1,
        options=job.options,
        source=job.source,
        files=dict(sorted(records.items())),
        tensors={
            one.entry.name: TensorRecord(done.coding, done.crc32)
            for shard in shards
            for one in shard.tensors
            if (done := place.finished[one.entry.name])
        },
    )
    _write(place.directory / MANIFEST, manifest_text(manifest))


def _copy_small_files(source: Path, directory: Path) -> list[str]:
    """Copy what belongs to the model and is no weights; Python code stays behind, since Penstock never runs it."""
    names = []
    for path in sorted(source.iterdir()):
        skipped = path.name.startswith(".") or path.suffix in {*_WEIGHTS, ".py"} or path.name == INDEX_FILE
        if skipped or not path.is_file() or path.stat().st_size > _SMALL_NBYTES:
            continue
        shutil.copyfile(path, directory / path.name)
        with open(directory / path.name, "rb") as copy:
            os.fsync(copy.fileno())
        names.append(path.name)
    return names


def _write_index(place: Workplace, shards: Sequence[PlannedShard]) -> None:
    stored = {
        one.name: (shard.name, one.nbytes)
        for shard in shards
        for tensor in shard.tensors
        for one in place.finished[tensor.entry.name].stored
    }
    index = {
        "metadata": {"total_size": sum(nbytes for _, nbytes in stored.values())},
        "weight_map": {name: shard for name, (shard, _) in stored.items()},
    }
    _write(place.directory / INDEX_FILE, json.dumps(index, indent=1))


def _write(path: Path, text: str) -> None:
    """Write a small file to the disk. While the journal is there a broken one does no harm: it is written again."""
    with naming(path), path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _record(path: Path, checked_nbytes: int | None = None) -> FileRecord:
    with path.open("rb") as stream:
        content = stream.read() if checked_nbytes is None else stream.read(checked_nbytes)
    return FileRecord(path.stat().st_size, len(content), zlib.crc32(content))
