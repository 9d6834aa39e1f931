"""`penstock.json`: what a packed checkpoint holds, and the checksums that find a flipped bit.

A packed checkpoint is an ordinary safetensors directory. The manifest says which stored tensors are parts of which
coded ones. Every byte is covered: small files and the headers of shards are compared when the directory is opened, the
manifest by a checksum of itself, and each stored tensor when its bytes first arrive.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from penstock.errors import ChecksumError, ManifestError, MissingWeightError
from penstock.io.checkpoint import Checkpoint
from penstock.io.files import SourceFile, TensorEntry
from penstock.offload.codec import ANY_LENGTH, Coding, PackOptions
from penstock.offload.records import RecordError, from_plain, to_plain
from penstock.offload.scaled import ScaledCoding

__all__ = [
    "MANIFEST",
    "Check",
    "CodedTensor",
    "FileRecord",
    "Manifest",
    "Origin",
    "SourceRecord",
    "Stored",
    "TensorRecord",
    "manifest_text",
    "open_stored",
    "read_manifest",
]

MANIFEST = "penstock.json"
VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20

_AGAIN = "Pack the model again, or copy the file again."


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's length, and the CRC-32 of its first `checked_nbytes` bytes: all of it, or a shard's header."""

    nbytes: int
    checked_nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A file of the checkpoint that was packed."""

    name: str
    nbytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """How a tensor is stored: as it was (`coding` None) or in parts. `crc32` has an entry for each stored tensor."""

    coding: Coding | None
    crc32: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A packed checkpoint: what it was made from and how, its files by name, and the source's tensors by name."""

    format: Literal["penstock packed checkpoint"]
    version: Literal[1]
    options: PackOptions
    source: tuple[SourceRecord, ...]
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]


@dataclass(frozen=True, slots=True)
class Origin:
    """What the parts of a tensor are made of when it is packed on load: its values, as they are stored.

    `table` is what the exact codec gives codes to, for it was chosen before.
    """

    entry: TensorEntry
    table: bytes = b""


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A tensor of which only coded `parts` are stored; otherwise like a TensorEntry.

    With an `origin` not even these are: the parts say how long they will be, and are made when the tensor is loaded.
    """

    name: str
    coding: Coding | ScaledCoding
    parts: tuple[TensorEntry, ...]
    origin: Origin | None = None

    @property
    def dtype(self) -> str:
        """The safetensors dtype of its values."""
        return self.coding.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its values."""
        return self.coding.shape

    @property
    def file(self) -> SourceFile:
        """Where its first part is."""
        return self.parts[0].file

    @property
    def offset(self) -> int:
        """Where in that file."""
        return self.parts[0].offset


@dataclass(frozen=True, slots=True)
class Check:
    """What the bytes of one stored tensor must be."""

    entry: TensorEntry
    crc32: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint's tensors by the names that the model knows, coded or not; checks by the names that are stored."""

    tensors: Mapping[str, TensorEntry | CodedTensor]
    checks: Mapping[str, Check]


def manifest_text(manifest: Manifest) -> str:
    """Return the file's text, which ends with a checksum of itself."""
    plain = to_plain(manifest)
    return json.dumps(plain | {"crc32": _self_checksum(plain)}, indent=1)


def read_manifest(directory: Path) -> Manifest | None:
    """Read a packed checkpoint's manifest, strictly; None where there is none. Raises ManifestError, ChecksumError."""
    file = directory / MANIFEST
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestError("the manifest is too large", file=file, wanted=f"at most {MAX_MANIFEST_BYTES} bytes")
        plain = json.loads(file.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ManifestError(f"cannot be read: {error.strerror}", file=file, fix="Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"the manifest is not JSON: {error}", file=file, fix=_AGAIN) from error
    stored = plain.pop("crc32", None) if type(plain) is dict else None
    if stored != _self_checksum(plain):
        raise ChecksumError("the manifest is damaged", file=file, got=f"checksum {stored}", fix=_AGAIN)
    if plain.get("version") != VERSION:
        raise ManifestError(
            "packed by another version",
            file=file,
            wanted=VERSION,
            got=plain.get("version"),
            fix="Pack the model again.",
        )
    try:
        return from_plain(Manifest, plain)
    except RecordError as error:
        raise ManifestError(f"not a manifest: {error}", file=file, fix=_AGAIN) from error


def _self_checksum(plain: Any) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def open_stored(checkpoint: Checkpoint) -> Stored:
    """Find a checkpoint's tensors, whether it is packed or not, and compare a packed one's small files and headers.

    Raises ChecksumError for a damaged file, ManifestError where the manifest and the files disagree.
    """
    manifest = read_manifest(checkpoint.directory)
    if manifest is None:
        return Stored(checkpoint.tensors, {})
    for name, record in manifest.files.items():
        if Path(name).name != name:
            raise ManifestError("it names a file elsewhere", file=checkpoint.directory / MANIFEST, got=repr(name))
        check_file(checkpoint.directory / name, record)
    tensors: dict[str, TensorEntry | CodedTensor] = {}
    checks: dict[str, Check] = {}
    for name, made in manifest.tensors.items():
        entries = _entries(checkpoint, name, made)
        tensors[name] = entries[0] if made.coding is None else CodedTensor(name, made.coding, entries)
        checks |= {entry.name: Check(entry, crc32) for entry, crc32 in zip(entries, made.crc32, strict=True)}
    if extra := checkpoint.tensors.keys() - checks.keys():
        raise ManifestError(f"tensor {min(extra)!r} is in no record", file=checkpoint.directory / MANIFEST, fix=_AGAIN)
    return Stored(tensors, checks)


def check_file(path: Path, record: FileRecord) -> None:
    """Compare a file with its record. Raises ChecksumError."""
    try:
        with path.open("rb") as stream:
            found = FileRecord(
                path.stat().st_size, record.checked_nbytes, zlib.crc32(stream.read(record.checked_nbytes))
            )
    except OSError as error:
        raise ManifestError(f"cannot be read: {error.strerror}", file=path, fix=_AGAIN) from error
    if found != record:
        what = "header" if record.checked_nbytes < record.nbytes else "file"
        raise ChecksumError(
            f"the {what} is not the one that was packed",
            file=path,
            wanted=f"checksum {record.crc32:08x}, {record.nbytes} bytes",
            got=f"{found.crc32:08x}, {found.nbytes} bytes",
            fix=_AGAIN,
        )


def _entries(checkpoint: Checkpoint, name: str, record: TensorRecord) -> tuple[TensorEntry, ...]:
    """Return the stored tensors of one record, checked against its coding."""
    file = checkpoint.directory / MANIFEST
    if record.coding is not None and (fault := record.coding.fault()):
        raise ManifestError(f"tensor {name!r} cannot be coded so", file=file, got=fault, fix=_AGAIN)
    names = [name] if record.coding is None else [f"{name}.{part.suffix}" for part in record.coding.parts]
    if missing := [one for one in names if one not in checkpoint.tensors]:
        raise MissingWeightError(f"tensor {missing[0]!r} is not in the packed files", file=file, fix=_AGAIN)
    if len(names) != len(record.crc32):
        raise ManifestError(
            f"tensor {name!r} has {len(record.crc32)} checksums", file=file, wanted=len(names), fix=_AGAIN
        )
    entries = tuple(checkpoint.tensors[one] for one in names)
    for entry, part in zip(entries, record.coding.parts if record.coding else (), strict=False):
        fits = len(entry.shape) == len(part.shape) and all(
            wanted in {size, ANY_LENGTH} for size, wanted in zip(entry.shape, part.shape, strict=True)
        )
        if entry.dtype != part.dtype or not fits:
            raise ManifestError(
                f"tensor {entry.name!r} does not fit its codec",
                file=file,
                wanted=f"{part.dtype} {part.shape}",
                got=f"{entry.dtype} {entry.shape}",
                fix=_AGAIN,
            )
    return entries
