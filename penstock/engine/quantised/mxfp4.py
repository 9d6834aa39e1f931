"""MXFP4 (gpt-oss): 4-bit floats, 32 of which share a power of two; the experts of a layer are one tensor."""

from __future__ import annotations

import math

from penstock.engine.quantised.scheme import Found, Roles, Scheme, Settings
from penstock.io.dummy_tensor import DummyTensor
from penstock.io.files import TensorEntry
from penstock.kernels.forms import Form
from penstock.offload.scaled import ScaledCoding

__all__ = ["mxfp4_scheme"]

_ROLES = Roles("", {"codes": ("_blocks",), "scale": ("_scales",)}, ())
_GROUP = 32
_RANDOM = 2.5
"""The size of made-up codes: about the root of their mean square."""


def mxfp4_scheme(settings: Settings) -> Scheme:
    """Read a config of method `mxfp4`. What is stored are [E, rows, C / 32, 16] bytes; the model has [E, C, rows]."""
    left = settings.names("modules_to_not_convert")

    def code(found: Found, dtype: str) -> tuple[ScaledCoding, tuple[TensorEntry, ...]]:
        blocks = found.check_dims("codes", ("U8",), 4)
        experts, rows, groups, _ = blocks.shape
        found.check("codes", ("U8",), (experts, rows, groups, _GROUP // 2))
        scale = found.check("scale", ("U8", "F8_E8M0"), (experts, rows, groups))
        shape = (experts, groups * _GROUP, rows)
        return ScaledCoding(Form("e2m1", 4, (1, _GROUP)), dtype, shape, transposed=True), (blocks, scale)

    def make_up(name: str, shape: tuple[int, ...]) -> tuple[DummyTensor, ...]:
        if len(shape) != 3 or shape[1] % _GROUP:
            return ()
        experts, columns, rows = shape
        grid = (experts, rows, columns // _GROUP)
        exponent = 127 - round(math.log2(_RANDOM * math.sqrt(columns)))
        return (
            DummyTensor(f"{name}_blocks", "U8", (*grid, _GROUP // 2), fill="bits"),
            DummyTensor(f"{name}_scales", "U8", grid, fill=exponent),
        )

    return Scheme(settings.method, _ROLES, code, left.__contains__, make_up)
