"""compressed-tensors: groups of modules, each with integers or 8-bit floats of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from penstock.engine.quantised.scheme import FLOATS, Found, Roles, Scheme, Settings
from penstock.io.files import TensorEntry
from penstock.kernels.forms import Form
from penstock.offload.scaled import ScaledCoding

__all__ = ["compressed_scheme"]

_NUMBERS = {
    "pack-quantized": ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
}
"""The formats that are read, and the types of numbers in them."""

_ROLES = Roles(
    "weight",
    {
        "codes": ("weight_packed",),
        "scale": ("weight_scale",),
        "zero": ("weight_zero_point",),
        "index": ("weight_g_idx",),
        "shape": ("weight_shape",),
    },
    ("I8", "F8_E4M3"),
)


@dataclass(frozen=True, slots=True)
class _Group:
    """Modules and how their weights are quantised."""

    targets: tuple[str, ...]
    layout: str
    bits: Literal[4, 8]
    is_float: bool
    symmetric: bool
    block: tuple[int | None, int | None]
    has_index: bool

    def form(self, rows: int, columns: int) -> Form:
        """Return the form of a matrix."""
        centred = self.layout == "pack-quantized" and self.symmetric
        block = self.block[0] or rows, self.block[1] or columns
        return Form("e4m3" if self.is_float else "int", self.bits, block, zero=1 << (self.bits - 1) if centred else 0)


def compressed_scheme(settings: Settings) -> Scheme:
    """Read a config of method `compressed-tensors`. How activations and keys are quantised plays no part."""
    settings.inner("sparsity_config").one_of("format", ("dense",), "dense")
    if transforms := settings.inner("transform_config").raw.get("config_groups"):
        settings.refuse("transform_config", "none", repr(transforms)[:80])
    raw = settings.inner("config_groups").raw
    if not raw:
        settings.refuse("config_groups", "at least one group", "none")
    groups = [_read_group(settings, name, group) for name, group in raw.items()]
    left = _patterns(settings, "ignore")

    def code(found: Found, dtype: str) -> tuple[ScaledCoding, tuple[TensorEntry, ...]]:
        return _code(_group_of(groups, found.weight, settings), found, dtype)

    return Scheme(settings.method, _ROLES, code, lambda module: _matches(left, module))


def _read_group(settings: Settings, name: str, raw: Any) -> _Group:
    if not isinstance(raw, dict) or not raw.get("weights"):
        settings.refuse(f"{name} without weights", "weights", repr(raw)[:80])
    whole = Settings(settings.method, raw, settings.file, f"{name}.")
    layout = (whole if raw.get("format") else settings).one_of("format", tuple(_NUMBERS))
    own = whole.inner("weights")
    is_float = own.one_of("type", _NUMBERS[layout], "int") == "float"
    block = _read_block(own)
    return _Group(
        targets=_patterns(whole, "targets"),
        layout=layout,
        bits=own.one_of("num_bits", (4, 8) if layout == "pack-quantized" else (8,)),
        is_float=is_float,
        symmetric=own.one_of("symmetric", (True,) if is_float else (True, False), default=True),
        block=block,
        has_index=own.one_of("actorder", ("group", "weight", "static", "dynamic", False, None)) in {"group", "dynamic"},
    )


def _read_block(weights: Settings) -> tuple[int | None, int | None]:
    """Return how many rows and columns share a scale; None is all of them."""
    match weights.one_of("strategy", ("tensor", "channel", "group", "block")):
        case "tensor":
            return None, None
        case "channel":
            return 1, None
        case "group":
            return 1, weights.size("group_size")
        case _:
            return weights.block("block_structure")


def _patterns(settings: Settings, key: str) -> tuple[str, ...]:
    """Return names of modules and classes, and what begins with "re:", which must be a regular expression."""
    names = settings.names(key)
    for name in names:
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            settings.refuse(f"{key}: {error}", "a regular expression", repr(name))
    return names


def _group_of(groups: Sequence[_Group], weight: str, settings: Settings) -> _Group:
    """Find a module's group: one that names it, or else the one of all linear layers."""
    module = weight.removesuffix(".weight")
    named = [group for group in groups if _matches(group.targets, module)]
    chosen = named or [group for group in groups if "Linear" in group.targets]
    if not chosen:
        settings.refuse(f"{module!r} is quantised, and in no group", "a group for it", "none")
    return chosen[0]


def _matches(targets: Sequence[str], module: str) -> bool:
    return any(
        re.match(target[3:], module) is not None if target.startswith("re:") else target == module for target in targets
    )


def _code(group: _Group, found: Found, dtype: str) -> tuple[ScaledCoding, tuple[TensorEntry, ...]]:
    packed = group.layout == "pack-quantized"
    zeros, may_reorder = not group.symmetric, group.block[0] == 1 and group.block[1] is not None
    optional = {"shape": packed, "zero": zeros, "index": may_reorder}
    found.only("codes", "scale", *(role for role, allowed in optional.items() if allowed))
    codes = found.check_dims("codes", ("I32" if packed else "F8_E4M3" if group.is_float else "I8",), 2)
    rows, columns = codes.shape[0], codes.shape[1] * (32 // group.bits if packed else 1)
    if packed:
        found.check("shape", ("I64", "I32"), (2,))
    form = group.form(rows, columns)
    grid = form.grid(rows, columns)
    shapes = [grid, (1,), ()] if group.block == (None, None) else [grid]
    parts = [codes, found.check("scale", FLOATS, *shapes)]
    if zeros:
        words = (-(-rows // form.per_word), grid[1])
        parts.append(found.check("zero", ("I32",), words) if packed else found.check("zero", ("I8",), *shapes))
    has_index = group.has_index or "index" in found.parts
    if has_index:
        parts.append(found.check("index", ("I32",), (columns,)))
    return ScaledCoding(form, dtype, (rows, columns), has_zero=zeros, has_index=has_index), tuple(parts)
