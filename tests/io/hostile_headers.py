"""One table of safetensors files, good and hostile: name → (bytes, what `read_header` must do)."""

import json
import struct
from dataclasses import dataclass
from typing import Any

from penstock.errors import HeaderError, TruncatedFileError

DATA = bytes(16)


@dataclass(frozen=True)
class Case:
    name: str
    content: bytes
    error: type[Exception] | None
    stricter: bool = False
    """The safetensors library accepts it; Penstock does not."""


def pack(text: str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(**fields: Any) -> str:
    return json.dumps({"t": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **fields}})


def two(first: str, second: str) -> str:
    return f'{{"a":{{{first}}},"b":{{{second}}}}}'


T = '"dtype":"F32","shape":[2,2],"data_offsets":[0,16]'


def t(more: str = "", fields: str = T) -> str:
    return '{"t":{' + fields + more + "}}"


FIRST = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'
SECOND = '"dtype":"F32","shape":[2],"data_offsets":[8,16]'


def good(name: str, content: bytes) -> Case:
    return Case(name, content, None)


def bad(name: str, content: bytes, *, stricter: bool = False) -> Case:
    return Case(name, content, HeaderError, stricter)


def cut(name: str, content: bytes) -> Case:
    return Case(name, content, TruncatedFileError)


CASES = [
    good("one tensor", pack(one(), DATA)),
    good("no tensors", pack("{}")),
    good("leading white space", pack("  \n{}")),
    good("trailing white space", pack("{}      ")),
    good("metadata null", pack('{"__metadata__":null}')),
    good("metadata", pack('{"__metadata__":{"format":"pt"}}')),
    good("unknown field", pack(one(extra={"a": [1, -1, 2.5, "x", None, True]}), DATA)),
    good("unknown field, 124 levels", pack(t(',"x":' + "[" * 124 + "]" * 124), DATA)),
    good("scalar", pack(one(shape=[], data_offsets=[0, 4]), DATA[:4])),
    good("empty name", pack('{"":{' + T + "}}", DATA)),
    good("any order in the header", pack(two(SECOND, FIRST), DATA)),
    good("zero before an absurd size", pack(one(shape=[0, 2**63, 4], data_offsets=[0, 0]))),
    good("F4 in whole bytes", pack(one(dtype="F4", shape=[4], data_offsets=[0, 2]), DATA[:2])),
    good("odd data start", pack(one().ljust(len(one()) + 1), DATA)),
    good(
        "empty tensor between two",
        pack('{"z":{"dtype":"F32","shape":[0],"data_offsets":[8,8]},' + two(FIRST, SECOND)[1:], DATA),
    ),
    cut("empty file", b""),
    cut("seven bytes", bytes(7)),
    cut("header past the end", pack(one(), DATA, length=5000)),
    cut("a byte too many", pack(one(), DATA + b"x")),
    cut("a byte too few", pack(one(), DATA[:-1])),
    cut("no data at all", pack(one())),
    bad("huge length", pack("{}", length=2**63)),
    bad("length over the limit", pack("{}", length=100_000_001)),
    bad("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    bad("short git-lfs pointer", b"version https://git-lfs"),
    bad("text", b"<!DOCTYPE html><html></html>"),
    bad("zero length", pack("")),
    bad("only white space", pack("    ")),
    bad("trailing NUL", pack(b"{}\0\0")),
    bad("BOM", pack(b"\xef\xbb\xbf{}")),
    bad("UTF-16", pack("{}".encode("utf-16-le"))),
    bad("not UTF-8", pack(b'{"\xff":1}')),
    bad("array on top", pack("[]")),
    bad("null on top", pack("null")),
    bad("two objects", pack("{}{}")),
    bad("trailing comma", pack('{"t":1,}')),
    bad("single quotes", pack("{'t':1}")),
    bad("comment", pack("/*x*/{}")),
    bad("no-break space", pack("\u00a0{}")),
    bad("NaN", pack('{"t":NaN}')),
    bad("Infinity", pack(one(shape=[float("inf")]), DATA)),
    bad("NaN in an unknown field", pack(t(',"x":NaN'), DATA)),
    bad("1e999 in an unknown field", pack(t(',"x":1e999'), DATA)),
    bad("lone surrogate in a name", pack('{"\\ud800":{' + T + "}}", DATA)),
    bad("lone surrogate in metadata", pack('{"__metadata__":{"a":"\\udfff"}}')),
    bad("lone surrogate in an unknown field", pack(t(',"x":["\\ud800"]'), DATA)),
    bad("control character in a name", pack(b'{"a\x01":{' + T.encode() + b"}}", DATA)),
    bad("tensor is a list of lists", pack('{"t":' + "[" * 200 + "]" * 200 + "}")),
    bad("nested 100,000 deep", pack('{"t":' + "[" * 100_000 + "]" * 100_000 + "}")),
    bad("unknown field, 126 levels", pack(t(',"x":' + "[" * 126 + "]" * 126), DATA)),
    bad("unknown field, 600 levels", pack(t(',"x":' + '{"a":' * 600 + "1" + "}" * 600), DATA)),
    bad("duplicate tensor", pack('{"t":{' + T + '},"t":{' + T + "}}", DATA), stricter=True),
    bad(
        "duplicate tensor of another dtype",
        pack('{"t":{' + T.replace("F32", "I32") + '},"t":{' + T + "}}", DATA),
        stricter=True,
    ),
    bad("duplicate field", pack(t(',"dtype":"F32"'), DATA)),
    bad("duplicate unknown field", pack(t(',"x":1,"x":1'), DATA), stricter=True),
    bad("duplicate __metadata__", pack('{"__metadata__":{},"__metadata__":{}}')),
    bad("duplicate metadata key", pack('{"__metadata__":{"a":"1","a":"2"}}'), stricter=True),
    bad("metadata of integers", pack('{"__metadata__":{"a":1}}')),
    bad("metadata a list", pack('{"__metadata__":[]}')),
    bad("tensor as an array", pack('{"t":["F32",[2,2],[0,16]]}', DATA), stricter=True),
    bad("tensor null", pack('{"t":null}')),
    bad("no dtype", pack('{"t":{"shape":[2,2],"data_offsets":[0,16]}}', DATA)),
    bad("no shape", pack('{"t":{"dtype":"F32","data_offsets":[0,16]}}', DATA)),
    bad("no offsets", pack('{"t":{"dtype":"F32","shape":[2,2]}}', DATA)),
    bad("lower-case dtype", pack(one(dtype="f32"), DATA)),
    bad("unknown dtype", pack(one(dtype="F128"), DATA)),
    bad("dtype null", pack(one(dtype=None), DATA)),
    bad("dtype a list", pack(one(dtype=["F32"]), DATA)),
    bad("size 2.0", pack(one(shape=[2.0, 2]), DATA)),
    bad("size 4e0", pack('{"t":{"dtype":"F32","shape":[4e0],"data_offsets":[0,16]}}', DATA)),
    bad("size negative", pack(one(shape=[-2, -2]), DATA)),
    bad("size -0", pack('{"t":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}')),
    bad("size 04", pack('{"t":{"dtype":"F32","shape":[04],"data_offsets":[0,16]}}', DATA)),
    bad("size true", pack(one(shape=[True, 4]), DATA)),
    bad("size a string", pack(one(shape=["2", 2]), DATA)),
    bad("size 2^64", pack(one(shape=[2**64]), DATA)),
    bad("size of 5,000 digits", pack(t(fields=T.replace("2,2", "9" * 5000)), DATA)),
    bad("shape null", pack(one(shape=None), DATA)),
    bad("shape overflows", pack(one(shape=[2**63, 2, 2]), DATA)),
    bad("shape overflows before a zero", pack(one(shape=[2**63, 2, 2, 0], data_offsets=[0, 0]))),
    bad("bits overflow", pack(one(shape=[2**60]), DATA)),
    bad("three offsets", pack(one(data_offsets=[0, 16, 16]), DATA)),
    bad("one offset", pack(one(data_offsets=[0]), DATA)),
    bad("offsets reversed", pack(one(data_offsets=[16, 0]), DATA)),
    bad("offset negative", pack(one(data_offsets=[-16, 0]), DATA)),
    bad("offset a float", pack(one(data_offsets=[0, 16.0]), DATA)),
    bad("offset a boolean", pack(one(data_offsets=[False, 16]), DATA)),
    bad("offsets an object", pack(one(data_offsets={"0": 0, "1": 16}), DATA)),
    bad("hole at the start", pack(one(data_offsets=[8, 24]), bytes(24))),
    bad("hole in the middle", pack(two(FIRST, '"dtype":"F32","shape":[2],"data_offsets":[16,24]'), bytes(24))),
    bad("overlap", pack(two(FIRST, FIRST), bytes(8))),
    bad("empty tensor inside another", pack(two(FIRST, '"dtype":"F32","shape":[0],"data_offsets":[4,4]'), bytes(8))),
    bad("half a byte", pack(one(dtype="F4", shape=[3], data_offsets=[0, 2]), DATA[:2])),
    bad("shape does not fit offsets", pack(one(shape=[2, 3]), DATA)),
]
