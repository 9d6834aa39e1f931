"""compressed-tensors: groups of modules, each with integers or 8-bit floats of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    settings: Settings
    layout: str
    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    reordered: bool

    def form(self, rows: int, columns: int) -> Form:
        """Return the form of a matrix."""
        packed = self.layout == "pack-quantized"
        centre = 1 << (self.bits - 1) if packed and self.symmetric else 0
        number, bits = "e4m3" if self.is_float else "int", 4 if self.bits == 4 else 8
        return Form(number, bits, self._block(rows, columns), zero=centre)  # type: ignore[arg-type]

    def _block(self, rows: int, columns: int) -> tuple[int, int]:
        if self.strategy == "block":
            return self.settings.block("block_structure")
        if self.strategy == "group":
            return 1, self.settings.size("group_size") or columns
        return (rows if self.strategy == "tensor" else 1), columns


def compressed_scheme(settings: Settings) -> Scheme:
    """Read a config of method `compressed-tensors`. How activations and keys are quantised plays no part."""
    for key in ("sparsity_config", "transform_config"):
        extra = settings.raw.get(key) or {}
        if extra and not (isinstance(extra, dict) and extra.get("format") in (None, "dense") and key[0] == "s"):
            settings.refuse(key, "none", repr(extra)[:80])
    raw = settings.raw.get("config_groups")
    if not isinstance(raw, dict) or not raw:
        settings.refuse("config_groups", "at least one group", repr(raw)[:80])
    groups = [_read_group(settings, name, group) for name, group in raw.items()]
    left = settings.names("ignore")

    def code(found: Found, dtype: str) -> tuple[ScaledCoding, tuple[TensorEntry, ...]]:
        return _code(_group_of(groups, found.weight, settings), found, dtype)

    return Scheme(settings.method, _ROLES, code, lambda module: _matches(left, module))


def _read_group(settings: Settings, name: str, raw: Any) -> _Group:
    weights = raw.get("weights") if isinstance(raw, dict) else None
    if not isinstance(weights, Mapping):
        settings.refuse(f"{name} without weights", "weights", repr(raw)[:80])
    whole = Settings(settings.method, {"format": settings.raw.get("format"), **_without_none(raw)}, settings.file)
    layout = whole.one_of("format", tuple(_NUMBERS))
    own = Settings(settings.method, weights, settings.file)
    is_float = own.one_of("type", _NUMBERS[layout], "int") == "float"
    return _Group(
        targets=whole.names("targets"),
        settings=own,
        layout=layout,
        bits=own.one_of("num_bits", (4, 8) if layout == "pack-quantized" else (8,)),
        is_float=is_float,
        symmetric=own.one_of("symmetric", (True,) if is_float else (True, False), default=True),
        strategy=own.one_of("strategy", ("tensor", "channel", "group", "block")),
        reordered=own.one_of("actorder", ("group", "weight", "static", "dynamic", False, None)) in {"group", "dynamic"},
    )


def _without_none(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if value is not None}


def _group_of(groups: Sequence[_Group], weight: str, settings: Settings) -> _Group:
    """Find a module's group: one that names it, or else one that names classes, all of which are linear layers'."""
    module = weight.removesuffix(".weight")
    named = [group for group in groups if _matches(group.targets, module)]
    of_class = [group for group in groups if any(_is_class(target) for target in group.targets)]
    chosen = named or of_class
    if not chosen:
        settings.refuse(f"{module!r} is quantised, and in no group", "a group for it", "none")
    return chosen[0]


def _matches(targets: Sequence[str], module: str) -> bool:
    return any(
        re.match(target[3:], module) is not None if target.startswith("re:") else target == module for target in targets
    )


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target and target[:1].isupper()


def _code(group: _Group, found: Found, dtype: str) -> tuple[ScaledCoding, tuple[TensorEntry, ...]]:
    packed = group.layout == "pack-quantized"
    roles = ["codes", "scale", *(["shape"] if packed else []), *([] if group.symmetric else ["zero"])]
    roles += ["index"] if group.strategy == "group" else []
    found.only(*roles)
    stored = "I32" if packed else "F8_E4M3" if group.is_float else "I8"
    codes = found.check_dims("codes", (stored,), 2)
    rows, columns = codes.shape[0], codes.shape[1] * (32 // group.bits if packed else 1)
    if packed:
        found.check("shape", ("I64", "I32"), (2,))
    form = group.form(rows, columns)
    grid = form.grid(rows, columns)
    shapes = [grid, (1,), ()] if group.strategy == "tensor" else [grid]
    parts = [codes, found.check("scale", FLOATS, *shapes)]
    if not group.symmetric:
        words = (-(-rows // form.per_word), grid[1])
        parts.append(found.check("zero", ("I32",), words) if packed else found.check("zero", ("I8",), *shapes))
    has_index = group.reordered or "index" in found.parts
    if has_index:
        parts.append(found.check("index", ("I32",), (columns,)))
    coding = ScaledCoding(form, dtype, (rows, columns), has_zero=not group.symmetric, has_index=has_index)
    return coding, tuple(parts)
