"""A Hugging Face checkpoint directory, read in place: name → (file, offset, bytes, dtype, shape)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from penstock.errors import IndexFileError, MissingFileError, ReadError, UnsupportedFormatError
from penstock.io.files import SourceFile, TensorEntry
from penstock.io.header import MAX_HEADER_BYTES, Header, read_header

__all__ = ["INDEX_FILE", "MAX_INDEX_BYTES", "SINGLE_FILE", "Checkpoint"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
"""The largest published index, of a model with 90,000 tensors, has 9 MB."""

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack")
_DOWNLOAD = "Download the checkpoint again, for example with `hf download`."

logger = logging.getLogger("penstock.io")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Every tensor of a checkpoint. `files` are its shards by name; `nbytes` is the tensors' bytes, without headers.

    `shares_bytes` says that tensors may lie on the same bytes: a dummy checkpoint takes less than `nbytes`.
    """

    directory: Path
    tensors: dict[str, TensorEntry]
    files: tuple[SourceFile, ...]
    nbytes: int
    shares_bytes: bool = False

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, max_header_bytes: int = MAX_HEADER_BYTES) -> Self:
        """Read the headers of `model.safetensors`, or else of the shards that `model.safetensors.index.json` names.

        That is transformers' order; like transformers, every tensor of a shard counts, mapped or not, and no other file
        name is tried. A tensor that two shards hold is refused. Raises MissingFileError, UnsupportedFormatError,
        IndexFileError, and what `read_header` raises.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise MissingFileError(
                "no such checkpoint directory", file=directory, fix="Name the directory that holds config.json."
            )
        single, index = directory / SINGLE_FILE, directory / INDEX_FILE
        if single.exists():
            if index.exists():
                logger.info("%s: reading %s; %s is ignored, as transformers does", directory, SINGLE_FILE, INDEX_FILE)
            headers = [read_header(single, max_header_bytes=max_header_bytes)]
        elif index.exists():
            headers = _read_shards(index, max_header_bytes)
        else:
            raise _nothing_to_read(directory)
        return cls(directory, *_merge(headers, index))


def _read_shards(index: Path, max_header_bytes: int) -> list[Header]:
    weight_map = _read_index(index)
    headers: dict[str, Header] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if not path.exists():
            raise MissingFileError(f"a shard named by {index} is missing", file=path, fix=_DOWNLOAD)
        headers[shard] = read_header(path, max_header_bytes=max_header_bytes)
    for name, shard in weight_map.items():
        if name not in headers[shard].tensors:
            raise IndexFileError(
                f"tensor {name!r} is mapped to {shard}, which does not hold it", file=index, fix=_DOWNLOAD
            )
    return list(headers.values())


def _merge(headers: Iterable[Header], index: Path) -> tuple[dict[str, TensorEntry], tuple[SourceFile, ...], int]:
    tensors: dict[str, TensorEntry] = {}
    for header in headers:
        for name, entry in header.tensors.items():
            if name in tensors:
                places = f"{tensors[name].file.path.name} and {entry.file.path.name}"
                raise IndexFileError(f"tensor {name!r} is in both {places}", file=index, fix=_DOWNLOAD)
            tensors[name] = entry
    files = tuple(header.file for header in headers)
    return tensors, files, sum(entry.nbytes for entry in tensors.values())


def _read_index(index: Path) -> dict[str, str]:
    """Return the checked `weight_map`: tensor name → plain file name in the index's own directory."""
    try:
        nbytes = index.stat().st_size
        if nbytes > MAX_INDEX_BYTES:
            raise IndexFileError("the index is too large", file=index, wanted=f"at most {MAX_INDEX_BYTES}", got=nbytes)
        top = json.loads(index.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ReadError(f"cannot be read: {error.strerror}", file=index, fix="Check its permissions.") from error
    except IndexFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise IndexFileError(f"the index is not JSON: {error}", file=index, fix=_DOWNLOAD) from error
    weight_map = top.get("weight_map") if type(top) is dict else None
    if type(weight_map) is not dict or not weight_map:
        raise IndexFileError("the index names no tensors", file=index, wanted="an object weight_map", fix=_DOWNLOAD)
    for name, shard in weight_map.items():
        _check_shard_name(index, name, shard)
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"the key {key!r} appears twice")
        members[key] = value
    return members


def _check_shard_name(index: Path, name: str, shard: Any) -> None:
    plain = type(shard) is str and shard not in {"", ".", ".."} and not {"/", "\\", "\0"} & set(shard)
    if not plain or not shard.isprintable():
        raise IndexFileError(
            f"tensor {name!r} is mapped to something else than a file of the directory",
            file=index,
            wanted="a plain file name",
            got=repr(shard),
            fix="Do not use this checkpoint unless you know why its index points elsewhere.",
        )


def _nothing_to_read(directory: Path) -> MissingFileError | UnsupportedFormatError:
    names = sorted(path.name for path in directory.iterdir())
    safetensors = [name for name in names if name.endswith(".safetensors")]
    others = [name for name in names if name.endswith(_OTHER_FORMATS)]
    wanted = f"{SINGLE_FILE} or {INDEX_FILE}"
    if others and not safetensors:
        return UnsupportedFormatError(
            "no weights in the safetensors format",
            file=directory,
            wanted=wanted,
            got=", ".join(others[:3]),
            fix="Load it once with transformers and write it with `model.save_pretrained(directory)`.",
        )
    if safetensors:
        return MissingFileError(
            "no index names the safetensors files",
            file=directory,
            wanted=wanted,
            got=", ".join(safetensors[:3]),
            fix=f"Download the index too; a single file with Hugging Face's tensor names may be renamed {SINGLE_FILE}.",
        )
    return MissingFileError("no weights", file=directory, wanted=wanted, got="neither", fix=_DOWNLOAD)
