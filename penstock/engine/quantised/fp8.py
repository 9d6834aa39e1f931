"""8-bit floats with a scale for each block, row or tensor: `fp8` (DeepSeek-V3 and others) and `fbgemm_fp8`."""

from __future__ import annotations

import math

from penstock.engine.quantised.scheme import FLOATS, Found, Roles, Scheme, Settings
from penstock.io.dummy_tensor import DummyTensor
from penstock.io.files import TensorEntry
from penstock.kernels.forms import Form
from penstock.offload.scaled import ScaledCoding

__all__ = ["fbgemm_scheme", "fp8_scheme"]

CODES = ("F8_E4M3",)
_ROLES = Roles("", {"scale": ("_scale_inv", "_scale")}, CODES)
_RANDOM = 0.6
"""The size of made-up codes: the root of their mean square."""


def fp8_scheme(settings: Settings) -> Scheme:
    """Read a config of method `fp8`: blocks of `weight_block_size`, or one scale for each tensor where it is null."""
    settings.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
    settings.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    settings.one_of("expert_dtype", ("fp8",), "fp8")
    powers = settings.one_of("scale_fmt", ("float", "ue8m0", None)) == "ue8m0"
    block = settings.block("weight_block_size") if settings.raw.get("weight_block_size") is not None else None
    scales = (*FLOATS, "F8_E8M0", *(("U8",) if powers else ()))
    left = {*settings.names("modules_to_not_convert"), *settings.names("ignored_layers")}

    def code(found: Found, dtype: str) -> tuple[ScaledCoding, tuple[TensorEntry, ...]]:
        codes = found.check_dims("codes", CODES, 2, 3 if block else 2)
        *outer, rows, columns = codes.shape
        form = Form("e4m3", 8, block or (rows, columns))
        grid = (*outer, *form.grid(rows, columns))
        if outer and block and (rows % (2 * block[0]) or columns % block[1]):
            settings.refuse("blocks that do not divide fused experts", f"multiples of {block}", codes.shape)
        scale = found.check("scale", scales, *([grid] if block else [(), (1,), grid]))
        return ScaledCoding(form, dtype, codes.shape), (codes, scale)

    def make_up(name: str, shape: tuple[int, ...]) -> tuple[DummyTensor, ...]:
        if len(shape) != 2:
            return ()
        grid = Form("e4m3", 8, block).grid(*shape) if block else ()
        scale = 1 / (_RANDOM * math.sqrt(shape[1]))
        return (
            DummyTensor(name, CODES[0], shape, fill="bits"),
            DummyTensor(f"{name}_scale_inv", "F32", grid, fill=scale),
        )

    return Scheme(settings.method, _ROLES, code, left.__contains__, make_up)


def fbgemm_scheme(settings: Settings) -> Scheme:
    """Read a config of method `fbgemm_fp8`: one scale for each row."""
    left = settings.names("modules_to_not_convert")

    def code(found: Found, dtype: str) -> tuple[ScaledCoding, tuple[TensorEntry, ...]]:
        codes = found.check_dims("codes", CODES, 2)
        rows, columns = codes.shape
        scale = found.check("scale", FLOATS, (rows, 1), (rows,))
        return ScaledCoding(Form("e4m3", 8, (1, columns)), dtype, codes.shape), (codes, scale)

    return Scheme(settings.method, _ROLES, code, left.__contains__)
