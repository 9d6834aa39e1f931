"""Read safetensors headers strictly: every byte of the file is accounted for before one of them is used.

The format is https://huggingface.co/docs/safetensors: a little-endian u64 length, that many bytes of JSON, the data.
The rules are those of the safetensors library (`tensor.rs: validate` and its JSON parser) and never laxer; duplicate
keys, which the format forbids and the library lets pass, are refused. Unknown fields of a tensor are ignored, as there.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.errors import HeaderError, MissingFileError, ReadError, TruncatedFileError
from penstock.io.files import DTYPE_BITS, SourceFile, TensorEntry

__all__ = ["MAX_HEADER_BYTES", "Header", "read_header"]

MAX_HEADER_BYTES = 16 << 20
"""Default limit: a header of 16 MiB describes about 160,000 tensors; parsing 88 MB took ten seconds and half a GiB."""

_LENGTH_BYTES = 8
_MAX_U64 = (1 << 64) - 1
_MAX_NESTING = 128
_LFS_PREFIX = b"version https://git-lfs"
_DOWNLOAD_AGAIN = "Download the file again."


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: `tensors` by name in the order of their bytes, which begin at `data_start` of `file`."""

    file: SourceFile
    data_start: int
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


class _FormatFault(Exception):  # noqa: N818 - never leaves this module
    """A fault inside the header's text, before the name of the file is added."""

    def __init__(self, what: str, *, wanted: object = None, got: object = None) -> None:
        super().__init__(what)
        self.what, self.wanted, self.got = what, wanted, got


@dataclass(frozen=True, slots=True)
class _Span:
    """One tensor's description: `begin` and `end` count from the start of the data."""

    begin: int
    end: int
    name: str
    dtype: str
    shape: tuple[int, ...]


def read_header(path: str | os.PathLike[str], *, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read and check the header of the safetensors file at `path`; symbolic links are followed.

    Nothing is allocated before the header's length was compared with `max_header_bytes` and the file's size. Raises
    MissingFileError, ReadError, TruncatedFileError when the file's length is not the one described, and HeaderError for
    every other breach of the format.
    """
    path = Path(path)
    file, raw = _read_raw(path, max_header_bytes)
    try:
        spans, metadata = _parse(raw)
    except _FormatFault as fault:
        raise HeaderError(
            fault.what, file=path, wanted=fault.wanted, got=fault.got, fix=_DOWNLOAD_AGAIN
        ) from fault.__cause__
    data_start = _LENGTH_BYTES + len(raw)
    described = data_start + (spans[-1].end if spans else 0)
    if described != file.nbytes:
        kind = "truncated" if file.nbytes < described else "followed by bytes that no tensor describes"
        raise TruncatedFileError(
            f"the file is {kind}",
            file=path,
            wanted=f"{described} bytes as its header says",
            got=f"{file.nbytes} bytes",
            fix=_DOWNLOAD_AGAIN,
        )
    tensors = {
        span.name: TensorEntry(span.name, file, data_start + span.begin, span.end - span.begin, span.dtype, span.shape)
        for span in spans
    }
    return Header(file, data_start, tensors, metadata)


def _read_raw(path: Path, max_header_bytes: int) -> tuple[SourceFile, bytes]:
    """Return the file's identity and the bytes of its JSON."""
    try:
        # O_NONBLOCK: opening a FIFO must not hang.
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise HeaderError("not a regular file", file=path, fix="Name a safetensors file.")
            file = SourceFile(path, status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns)
            length = _checked_length(os.pread(stream.fileno(), len(_LFS_PREFIX), 0), file, max_header_bytes)
            raw = os.pread(stream.fileno(), length, _LENGTH_BYTES)
    except FileNotFoundError as error:
        raise MissingFileError("no such file", file=path, fix="Download the checkpoint again.") from error
    except IsADirectoryError as error:
        raise HeaderError("not a regular file", file=path, fix="Name a safetensors file.") from error
    except OSError as error:
        raise ReadError(f"cannot be read: {error.strerror}", file=path, fix="Check its permissions.") from error
    if len(raw) != length:
        raise TruncatedFileError("the header is cut short", file=path, wanted=length, got=len(raw), fix=_DOWNLOAD_AGAIN)
    return file, raw


def _checked_length(start: bytes, file: SourceFile, max_header_bytes: int) -> int:
    """Return the header's length, checked against the limit and the file's size."""
    if start == _LFS_PREFIX:
        raise HeaderError(
            "a git-lfs pointer, not the file it points to",
            file=file.path,
            fix="Run `git lfs pull` in its directory, or download the checkpoint with `hf download`.",
        )
    if file.nbytes < _LENGTH_BYTES:
        raise TruncatedFileError(
            "too short for a safetensors file",
            file=file.path,
            wanted=f"at least {_LENGTH_BYTES} bytes",
            got=f"{file.nbytes} bytes",
            fix=_DOWNLOAD_AGAIN,
        )
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if length > max_header_bytes:
        raise HeaderError(
            "the header is too large",
            file=file.path,
            wanted=f"at most {max_header_bytes} bytes",
            got=f"{length} bytes",
            fix="Is it a safetensors file? If it is, and you trust it, raise max_header_bytes.",
        )
    if _LENGTH_BYTES + length > file.nbytes:
        raise TruncatedFileError(
            "the file ends inside its header",
            file=file.path,
            wanted=f"{_LENGTH_BYTES + length} bytes",
            got=f"{file.nbytes} bytes",
            fix=_DOWNLOAD_AGAIN,
        )
    return length


def _parse(raw: bytes) -> tuple[list[_Span], dict[str, str]]:
    """Return the tensors in the order of their bytes, without holes or overlaps, and the metadata."""
    top = _load_json(raw)
    if type(top) is not dict:
        raise _FormatFault("the header is not a JSON object")
    metadata = _check_metadata(top.pop("__metadata__", None))
    spans = sorted((_check_tensor(name, info) for name, info in top.items()), key=lambda span: (span.begin, span.end))
    position = 0
    for span in spans:
        if span.begin != position:
            kind = "overlaps the tensor before it" if span.begin < position else "leaves a hole before it"
            raise _FormatFault(f"tensor {span.name!r} {kind}", wanted=f"offset {position}", got=span.begin)
        position = span.end
    return spans, metadata


def _load_json(raw: bytes) -> Any:
    try:
        # Decoded here, because json.loads(bytes) would also accept UTF-16 and UTF-32.
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _FormatFault("the header is not UTF-8") from error
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer, parse_float=_float
        )
    except RecursionError as error:
        raise _FormatFault("the header is nested too deeply", wanted=f"at most {_MAX_NESTING} levels") from error
    except ValueError as error:
        raise _FormatFault(f"the header is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise _FormatFault(f"the header has the key {key!r} twice")
        members[key] = value
    return members


def _constant(text: str) -> None:
    raise _FormatFault(f"the header is not JSON: {text} is not a JSON value")


def _integer(text: str) -> int | float:
    """Return an int only for what an unsigned field may hold; "-0" and longer ones become floats, refused there."""
    if text.startswith("-") or len(text) > len(str(_MAX_U64)):
        return _float(text)
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _FormatFault("the header holds a number out of range", got=f"{text[:20]}...")
    return value


def _check_metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if type(value) is not dict or any(type(item) is not str for item in value.values()):
        raise _FormatFault("__metadata__ does not map strings to strings")
    for text in (*value.keys(), *value.values()):
        _check_text(text)
    return value


def _check_text(text: str) -> None:
    """Refuse lone surrogates, which JSON escapes can smuggle past the UTF-8 decoder."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _FormatFault(f"the header holds {text!r}, which is not Unicode text") from error


def _check_tensor(name: str, info: Any) -> _Span:
    _check_text(name)
    if type(info) is not dict:
        raise _FormatFault(f"tensor {name!r} is not described by an object")
    for key, value in info.items():
        if key not in {"dtype", "shape", "data_offsets"}:
            _check_ignored(key, value)
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        raise _FormatFault(f"tensor {name!r} has an unknown dtype", wanted=f"one of {' '.join(DTYPE_BITS)}", got=dtype)
    if type(shape) is not list:
        raise _FormatFault(f"tensor {name!r} has no shape", wanted="a list of sizes", got=shape)
    if type(offsets) is not list or len(offsets) != 2:
        raise _FormatFault(f"tensor {name!r} has no data_offsets", wanted="[begin, end]", got=offsets)
    begin, end = (_check_unsigned(offset, f"an offset of tensor {name!r}") for offset in offsets)
    nbytes = _count_bytes(name, dtype, shape)
    if end - begin != nbytes:
        raise _FormatFault(
            f"tensor {name!r} of dtype {dtype} and shape {shape} does not fit its data_offsets",
            wanted=f"{nbytes} bytes",
            got=f"{end - begin} bytes",
        )
    return _Span(begin, end, name, dtype, tuple(shape))


def _count_bytes(name: str, dtype: str, shape: list[Any]) -> int:
    elements = 1
    for size in shape:
        # In order, so that a later zero does not excuse an overflow before it.
        elements *= _check_unsigned(size, f"a size of tensor {name!r}")
        if elements > _MAX_U64:
            raise _FormatFault(f"the shape of tensor {name!r} overflows 64 bits", got=shape)
    bits = elements * DTYPE_BITS[dtype]
    if bits > _MAX_U64:
        raise _FormatFault(f"the size of tensor {name!r} overflows 64 bits", got=shape)
    if bits % 8:
        raise _FormatFault(f"tensor {name!r} is not a whole number of bytes", got=f"{bits} bits")
    return bits // 8


def _check_unsigned(value: Any, what: str) -> int:
    # `type` instead of isinstance: JSON's true is an int to Python.
    if type(value) is not int or value > _MAX_U64:
        raise _FormatFault(f"{what} is not an unsigned 64-bit integer", got=repr(value))
    return value


def _check_ignored(key: str, value: Any) -> None:
    """Hold an unknown field to what the library's JSON parser accepts: Unicode text, and its limit on nesting."""
    _check_text(key)
    level = [value]
    for _ in range(_MAX_NESTING - 2):
        if not level:
            return
        level = [child for item in level for child in _children(item)]
    raise _FormatFault(f"the field {key!r} is nested too deeply", wanted=f"at most {_MAX_NESTING} levels")


def _children(item: Any) -> list[Any]:
    if type(item) is str:
        _check_text(item)
    if type(item) is dict:
        return [*item.keys(), *item.values()]
    return item if type(item) is list else []
