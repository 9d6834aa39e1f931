"""MXFP4 (gpt-oss): 4-bit floats, 32 of which share a power of two; the experts of a layer are one tensor."""

from __future__ import annotations

from penstock.engine.quantised.scheme import Found, Roles, Scheme, Settings
from penstock.io.files import TensorEntry
from penstock.kernels.forms import Form
from penstock.offload.scaled import ScaledCoding

__all__ = ["mxfp4_scheme"]

_ROLES = Roles("", {"codes": ("_blocks",), "scale": ("_scales",)}, ())
_GROUP = 32


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

    return Scheme(settings.method, _ROLES, code, left.__contains__)
