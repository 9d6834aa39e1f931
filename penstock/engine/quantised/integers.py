"""GPTQ and AWQ: integers with a scale and a zero point for each group, in 32-bit words, transposed."""

from __future__ import annotations

from penstock.engine.quantised.scheme import FLOATS, Found, Roles, Scheme, Settings
from penstock.io.files import TensorEntry
from penstock.kernels.forms import Form
from penstock.offload.scaled import ScaledCoding

__all__ = ["awq_scheme", "gptq_scheme"]

_GPTQ = {"codes": ("qweight",), "scale": ("scales",), "zero": ("qzeros",), "index": ("g_idx",)}
_WORDS = ("I32",)


def gptq_scheme(settings: Settings) -> Scheme:
    """Read a config of method `gptq`, in formats `gptq`, whose stored zero points are one too small, and `gptq_v2`."""
    bits = settings.one_of("bits", (4, 8))
    group_size = settings.size("group_size", whole=-1)
    named = "checkpoint_format" if settings.raw.get("checkpoint_format") is not None else "format"
    version = settings.one_of(named, ("gptq", "gptq_v2"), "gptq")
    reordered = settings.one_of("desc_act", (True, False), default=False)
    settings.one_of("pack_dtype", ("int32",), "int32")
    settings.one_of("is_marlin_format", (False, None))
    if any(not str(pattern).startswith("-") for pattern in settings.raw.get("dynamic") or ()):
        settings.refuse("dynamic, a quantisation of its own for some modules", "one for all", "several")

    def code(found: Found, dtype: str) -> tuple[ScaledCoding, tuple[TensorEntry, ...]]:
        words = found.check_dims("codes", _WORDS, 2)
        has_index = reordered or "index" in found.parts
        columns = found.check_dims("index", _WORDS, 1).shape[0] if has_index else words.shape[0] * 32 // bits
        form = Form("int", bits, (1, group_size or columns), packing="words", zero=1 if version == "gptq" else 0)
        rows, groups = form.grid(words.shape[1], columns)
        found.check("codes", _WORDS, (-(-columns // form.per_word), rows))
        scale = found.check("scale", FLOATS, (groups, rows))
        zero = found.check("zero", _WORDS, (groups, -(-rows // form.per_word)))
        index = (found["index"],) if has_index else ()
        coding = ScaledCoding(form, dtype, (rows, columns), has_zero=True, has_index=has_index)
        return coding, (words, scale, zero, *index)

    return Scheme(settings.method, Roles("weight", _GPTQ, ()), code, lambda _: False)


def awq_scheme(settings: Settings) -> Scheme:
    """Read a config of method `awq`, 4 bits in the layout of its `gemm` kernel."""
    settings.one_of("bits" if "bits" in settings.raw else "w_bit", (4,), 4)
    settings.one_of("version" if "version" in settings.raw else "format", ("gemm",), "gemm")
    settings.one_of("zero_point", (True,), default=True)
    group_size = settings.size("group_size" if "group_size" in settings.raw else "q_group_size", whole=-1)
    left = settings.names("modules_to_not_convert")

    def code(found: Found, dtype: str) -> tuple[ScaledCoding, tuple[TensorEntry, ...]]:
        found.only("codes", "scale", "zero")
        words = found.check_dims("codes", _WORDS, 2)
        columns, rows = words.shape[0], words.shape[1] * 8
        form = Form("int", 4, (1, group_size or columns), packing="awq")
        groups = form.grid(rows, columns)[1]
        scale = found.check("scale", FLOATS, (groups, rows))
        zero = found.check("zero", _WORDS, (groups, words.shape[1]))
        return ScaledCoding(form, dtype, (rows, columns), has_zero=True), (words, scale, zero)

    return Scheme(settings.method, Roles("weight", _GPTQ, ()), code, left.__contains__)
