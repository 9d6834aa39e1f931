"""What a config says of quantised weights, and the stored tensors that stand for one weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from penstock.errors import CheckpointError, MissingWeightError, UnsupportedFormatError
from penstock.io.dummy_tensor import DummyTensor
from penstock.io.files import TensorEntry
from penstock.offload.scaled import ScaledCoding

__all__ = ["FLOATS", "Found", "Roles", "Scheme", "Settings"]

FLOATS = ("F32", "BF16", "F16")
_AGAIN = "Download the checkpoint again, or use the model's unquantised one."


@dataclass(frozen=True, slots=True)
class Settings:
    """The `quantization_config` of a config file, or an object in it, whose name `place` begins those of its keys."""

    method: str
    raw: Mapping[str, Any]
    file: Path
    place: str = ""

    def refuse(self, what: str, wanted: object, got: object) -> NoReturn:
        """Raise UnsupportedFormatError."""
        raise UnsupportedFormatError(
            f"the weights are quantised with {self.method} in a way that is not supported: {self.place}{what}",
            file=self.file,
            wanted=wanted,
            got=got,
            fix="Use the model's unquantised checkpoint, or one that is quantised so.",
        )

    def one_of(self, key: str, supported: Sequence[Any], default: Any = None) -> Any:
        """Return a value that must be one of those; strings in any case."""
        value = self.raw.get(key, default)
        plain = value.lower() if isinstance(value, str) else value
        if not any(type(plain) is type(one) and plain == one for one in supported):
            self.refuse(key, " or ".join(str(one) for one in supported), repr(value))
        return plain

    def size(self, key: str, *, whole: int | None = None) -> int | None:
        """Return a positive number; None where it is the number `whole`, which means all."""
        value = self.raw.get(key)
        if type(value) is not int or (value <= 0 and value != whole):
            self.refuse(key, "a positive number", repr(value))
        return None if value == whole else value

    def block(self, key: str) -> tuple[int, int]:
        """Return a pair of positive numbers: rows and columns of a block."""
        value = self.raw.get(key)
        pair = value if isinstance(value, list) and len(value) == 2 else [0, 0]
        if not all(type(one) is int and one > 0 for one in pair):
            self.refuse(key, "two positive numbers", repr(value))
        return pair[0], pair[1]

    def inner(self, key: str) -> Settings:
        """Return an object inside; missing or null is an empty one."""
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            self.refuse(key, "an object", repr(value)[:80])
        return Settings(self.method, value, self.file, f"{self.place}{key}.")

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of strings; missing or null is none."""
        value = self.raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self.refuse(key, "a list of names", repr(value)[:80])
        return tuple(value)


@dataclass(frozen=True, slots=True)
class Roles:
    """The endings of the names of a weight's parts, by role; `weight` is that of the weight that they stand for.

    A part of role "codes" may end like the weight; then its dtype, one of `dtypes`, tells that it is one.
    """

    weight: str
    endings: Mapping[str, tuple[str, ...]]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """The parts that stand for `weight`, by role."""

    weight: str
    parts: Mapping[str, TensorEntry]

    def __getitem__(self, role: str) -> TensorEntry:
        """Return a part. Raises MissingWeightError."""
        if role not in self.parts:
            one = next(iter(self.parts.values()))
            raise MissingWeightError(f"tensor {one.name!r} has no {role} beside it", file=one.file.path, fix=_AGAIN)
        return self.parts[role]

    def only(self, *roles: str) -> None:
        """Refuse parts of other roles. Raises CheckpointError."""
        for role, entry in self.parts.items():
            if role not in roles:
                raise CheckpointError(
                    f"tensor {entry.name!r} is one too many for what the config says",
                    file=entry.file.path,
                    wanted=f"{', '.join(roles)} of {self.weight!r}",
                    fix=_AGAIN,
                )

    def check(self, role: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> TensorEntry:
        """Return a part whose dtype and shape are among those. Raises MissingWeightError and CheckpointError."""
        entry = self[role]
        if entry.dtype not in dtypes or (shapes and entry.shape not in shapes):
            raise CheckpointError(
                f"tensor {entry.name!r} is not what the config says",
                file=entry.file.path,
                wanted=f"{' or '.join(dtypes)} {' or '.join(str(shape) for shape in shapes)}".strip(),
                got=f"{entry.dtype} {entry.shape}",
                fix=_AGAIN,
            )
        return entry

    def check_dims(self, role: str, dtypes: Sequence[str], *dims: int) -> TensorEntry:
        """Return a part of such a dtype and number of dims, none of them empty. Raises like `check`."""
        entry = self.check(role, dtypes)
        if len(entry.shape) not in dims or 0 in entry.shape:
            raise CheckpointError(
                f"tensor {entry.name!r} is no matrix of codes",
                file=entry.file.path,
                wanted=f"{' or '.join(str(one) for one in dims)} dims",
                got=f"shape {entry.shape}",
                fix=_AGAIN,
            )
        return entry


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way of quantising that a config names.

    `code` checks the parts of a weight against the config, headers only, and returns the coding to a dtype, and the
    parts in its order. `ignored` tells whether the config says that a module stays as it is. `make_up` returns the
    parts of a weight of this name and shape that is made up, or none for one that stays as it is.
    """

    method: str
    roles: Roles
    code: Callable[[Found, str], tuple[ScaledCoding, tuple[TensorEntry, ...]]]
    ignored: Callable[[str], bool]
    make_up: Callable[[str, tuple[int, ...]], tuple[DummyTensor, ...]] | None = None
