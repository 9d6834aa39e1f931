"""Frozen dataclasses to JSON and back, strictly: each field of the type that it is declared with, and no other field.

A field with a default may be missing, so that what was written before there was one can still be read.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["RecordError", "from_plain", "to_plain"]

T = TypeVar("T")


class RecordError(ValueError):
    """A value is not what its field is declared as; the message begins with the path to it."""


def to_plain(record: Any) -> dict[str, Any]:
    """Return a dataclass as dicts, lists and plain values."""
    assert dataclasses.is_dataclass(record)
    assert not isinstance(record, type)
    return {field.name: _plain(getattr(record, field.name)) for field in dataclasses.fields(record)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def from_plain(kind: type[T], value: Any, *, path: str = "") -> T:
    """Return `value`, as JSON has it, as an instance of the dataclass `kind`; raises RecordError."""
    if type(value) is not dict:
        raise RecordError(f"{path or 'the top level'}: wanted an object, got {_name(value)}")
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}  # type: ignore[arg-type]
    for fault, keys in (("missing", needed - set(value)), ("unknown", set(value) - set(names))):
        if keys:
            raise RecordError(f"{path or 'the top level'}: {fault} field {sorted(map(str, keys))[0]!r}")
    there = [name for name in names if name in value]
    return kind(**{name: _typed(hints[name], value[name], f"{path}.{name}".lstrip(".")) for name in there})


def _typed(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in {Union, types.UnionType}:
        wanted = next(each for each in arguments if each is not type(None))
        return None if value is None else _typed(wanted, value, path)
    if origin is tuple and type(value) is list:
        return _typed_tuple(arguments, value, path)
    if origin is dict and type(value) is dict:
        return {key: _typed(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_plain(kind, value, path=path)
    if not _fits(kind, value):
        raise RecordError(f"{path}: wanted {_wanted(kind)}, got {_name(value)}")
    return float(value) if kind is float else value


def _fits(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in {int, float} and math.isfinite(value)
    return type(value) is kind


def _typed_tuple(arguments: tuple[Any, ...], value: list[Any], path: str) -> tuple[Any, ...]:
    if arguments[-1] is ...:
        return tuple(_typed(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if len(value) != len(arguments):
        raise RecordError(f"{path}: wanted {len(arguments)} items, got {len(value)}")
    return tuple(
        _typed(kind, item, f"{path}[{index}]") for index, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    return getattr(kind, "__name__", str(kind))


def _name(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, (str, int, float)) or value is None else type(value).__name__
