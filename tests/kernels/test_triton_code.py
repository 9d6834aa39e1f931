"""What machine code the Triton kernels become: its compiler needs no GPU, so this runs wherever Triton is installed.

`JITFunction`'s launch is exchanged for its own `warmup`, under a driver that names another GPU; so the kernels get the
arguments and options that launching code gives them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from penstock.kernels.attention import Rule
from penstock.kernels.exact import choose_table, encode
from penstock.kernels.forms import Form
from penstock.kernels.groupwise import quantise
from penstock.kernels.packed_linear import PackedWeight
from penstock.kernels.quant_kv import QUANTISE
from penstock.kernels.scaled import Matrix

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter compiles nothing")

SHARED_NBYTES = {86: 99 << 10, 90: 227 << 10}
"""What a block may have, by compute capability: RTX 3090, as later ones and less than A100; H100 and H200."""


@dataclass(frozen=True)
class Elsewhere:
    """Stands for the driver of a GPU that is not there."""

    capability: int

    def get_current_device(self) -> str:
        return f"sm_{self.capability}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        compiler = importlib.import_module("triton.backends.compiler")
        return compiler.GPUTarget("cuda", self.capability, 32)


@pytest.fixture(params=SHARED_NBYTES, ids=lambda capability: f"sm_{capability}")
def compiled(request, monkeypatch, tmp_path):
    """Return a function that calls launching code and returns the kernels that it would have launched, by name."""
    jit = importlib.import_module("triton.runtime.jit")
    made: dict[str, Any] = {}

    def instead(function: Any, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            made[function.__name__] = function.run(*arguments, grid=grid, warmup=True, **options)

        return launch

    def collect(launching: Callable[[], None]) -> dict[str, Any]:
        made.clear()
        launching()
        for kernel in made.values():
            assert kernel.metadata.shared <= SHARED_NBYTES[request.param]
        return dict(made)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Elsewhere(request.param))
    monkeypatch.setattr(jit.JITFunction, "__getitem__", instead)
    return collect


def attend(
    heads: tuple[int, int],
    sizes: tuple[int, int],
    *,
    max_length: int = 2000,
    offset: int = 0,
    rule: Rule | None = None,
    code: str | None = None,
    count: int = 3,
) -> Callable[[], None]:
    """Return a call of paged attention for `count` sequences of a micro-batch with `offset` more tokens.

    `offset` is how far tables lie off 16-byte borders, too.
    """
    kernels = importlib.import_module("penstock.kernels.paged_triton")
    query = torch.empty(heads[0], count + offset, sizes[0], dtype=torch.bfloat16).transpose(0, 1)[:count]
    latent = sizes[0] > 256
    keys = torch.empty(4, 16, heads[1], sizes[0], dtype=torch.bfloat16)
    values = keys[..., : sizes[1]] if latent else keys.new_empty(4, 16, heads[1], sizes[1])
    scales = {}
    if code is not None:
        keys, key_scales = QUANTISE[code](keys)
        values, value_scales = QUANTISE[code](values)
        if latent:
            values, value_scales = keys if code == "int4" else keys[..., : sizes[1]], key_scales
        scales = {"key_scales": key_scales, "value_scales": value_scales}
    table = torch.zeros(offset + count * 40, dtype=torch.int32)[offset:].view(count, 40)
    lengths = torch.ones(offset + count, dtype=torch.int32)[offset:]
    options: dict[str, Any] = {"rule": rule or Rule(0.3), "max_length": max_length, "workspace_nbytes": 1 << 20}
    out = torch.empty(count + offset, heads[0], sizes[1], dtype=torch.bfloat16)[:count]
    return lambda: kernels.attend_paged(query, keys, values, table, lengths, **options, **scales, out=out)


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [
        ((64, 8), (128, 128)),
        ((128, 1), (576, 512)),
        ((128, 1), (256, 256)),
        ((71, 1), (64, 64)),
        ((12, 4), (192, 128)),
        ((4, 2), (8, 6)),
    ],
)
@pytest.mark.parametrize("code", [None, "fp8", "int8", "int4"])
def test_attention_fits_shared_memory(compiled, request, heads, sizes, code) -> None:
    if code == "fp8" and "sm_86" in request.node.callspec.id:
        pytest.skip("`find_paged` leaves float8 to other code on GPUs that cannot convert it")
    of_bytes = code in {"fp8", "int8"} and (heads, sizes) in {((64, 8), (128, 128)), ((12, 4), (192, 128))}
    assert set(compiled(attend(heads, sizes, code=code))) == {
        "_attend_codes" if of_bytes else "_attend_part",
        "_join_parts",
    }


@pytest.mark.parametrize("heads", [(56, 56), (64, 8)])
def test_codes_are_read_in_long_words_and_converted_at_once(compiled, request, heads: tuple[int, int]) -> None:
    if "sm_86" in request.node.callspec.id:
        pytest.skip("it cannot convert float8")
    ptx = compiled(attend(heads, (128, 128), code="fp8"))["_attend_codes"].asm["ptx"]
    assert ptx.count("ld.global.v4.b32") >= 8, "4 rows of 16 bytes for each thread, of keys and of values"
    assert ptx.count("cvt.rn.f16x2.e4m3x2") == 64, "the 128 codes of a thread"
    assert "cvt.f32.f16" not in ptx


@pytest.mark.parametrize(("code", "size"), [(None, 72), ("int8", 72), ("int8", 64), ("int4", 72)])
def test_a_pass_compiles_nothing_that_another_has_not(compiled, code: str | None, size: int) -> None:
    """Where tables lie, how many sequences there are and how long, what a window is: the code is the same."""
    options: dict[str, Any] = {"heads": (6, 2), "sizes": (size, size), "code": code}
    (first,) = compiled(attend(**options, max_length=300, rule=Rule(0.3, window=16))).values()
    for count, offset in ((3, 1), (1, 0), (1, 1), (17, 0)):
        call = attend(**options, max_length=17, offset=offset, count=count, rule=Rule(0.3, window=1))
        (again,) = compiled(call).values()
        assert again is first, (count, offset)
    several = compiled(attend(**options, max_length=600))
    assert compiled(attend(**options, max_length=20_000, offset=3, count=1)) == several


@pytest.mark.parametrize("size", [128, 72])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_rows_of_any_number_are_quantised_by_the_same_code(compiled, size: int, dtype: torch.dtype) -> None:
    """Wherever slots and scales lie, whatever the strides are; rows are read in words of 16 bytes."""
    kernels = importlib.import_module("penstock.kernels.quant_kv_triton")
    found = []
    for tokens, offset in ((16, 0), (1, 1), (17, 1), (33, 0)):
        rows = torch.zeros(2, tokens, size, dtype=torch.bfloat16).transpose(0, 1)
        if offset:
            rows = torch.zeros(tokens, 3, 2, size, dtype=torch.bfloat16)[:, 1]
        slots = torch.zeros(tokens + offset, dtype=torch.int64)[offset:]
        scales = torch.zeros(offset + 64 * 2)[offset:].view(4, 16, 2)
        into = (torch.zeros(4, 16, 2, size, dtype=dtype), scales)
        found += compiled(
            lambda rows=rows, slots=slots, into=into: kernels.quantise(rows, dtype, slots=slots, into=into)
        ).values()
    assert len(set(map(id, found))) == 1
    assert size == 72 or "ld.global.v4.b32" in found[0].asm["ptx"]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers(compiled, bits: int, symmetric: bool) -> None:
    kernels = importlib.import_module("penstock.kernels.expand_triton")
    made = quantise(torch.ones(8, 192), bits=bits, group_size=64, symmetric=symmetric)
    zero = None if made.zero is None else made.zero[None]
    out = torch.empty(1, 8, 192, dtype=torch.bfloat16)
    call = lambda: kernels.dequantise(made.codes[None], made.scale[None], zero, out, bits=bits, group_size=64)  # noqa: E731
    assert set(compiled(call)) == {"_dequantise"}


def test_exact_weights_compile_once_however_many_exponents_escape(compiled) -> None:
    kernels = importlib.import_module("penstock.kernels.expand_triton")
    values = torch.ones(4096, dtype=torch.bfloat16)
    table = choose_table(values)
    made = encode(values, table)
    found = []
    for escapes in (0, 1, 16, 17):
        extra = torch.zeros(1, escapes, dtype=torch.uint8)
        parts = (made.low[None], made.code[None], table[None], made.start[None], extra)
        found += compiled(lambda parts=parts: kernels.decode_exact(*parts, out=values[None])).values()
    assert len(set(map(id, found))) == 1


def test_exponents_of_any_chunks_are_joined_by_the_same_code(compiled) -> None:
    kernels = importlib.import_module("penstock.kernels.expand_triton")
    found = []
    for first, chunks in ((0, 1), (1, 3), (16, 16), (17, 1)):
        low = torch.zeros(2, 4096 * 16, dtype=torch.uint8)
        exponents, failed = torch.zeros(chunks, 4096, dtype=torch.uint8), torch.zeros(chunks, dtype=torch.bool)
        out = torch.empty(low.shape, dtype=torch.bfloat16)
        parts = (low, exponents, failed, first)
        found += compiled(lambda parts=parts, out=out: kernels.join_exponents(*parts, out=out)).values()
    assert len(set(map(id, found))) == 1


FORMS = {
    "fp8 blocks": Form("e4m3", 8, (128, 128)),
    "fp8 rows": Form("e4m3", 8, (1, 1 << 20)),
    "int8 whole": Form("int", 8, (1 << 20, 1 << 20)),
    "packed 4": Form("int", 4, (1, 32), zero=8),
    "gptq 4": Form("int", 4, (1, 32), packing="words", zero=1),
    "gptq 8": Form("int", 8, (1, 32), packing="words"),
    "awq": Form("int", 4, (1, 32), packing="awq"),
    "mxfp4": Form("e2m1", 4, (1, 32)),
}


def scaled(name: str, *, rows: int = 64, columns: int = 96, index: bool = False, turned: bool = False, start: int = 0):
    """Return a call that decodes two matrices of a form, whose codes lie `start` bytes off a border of 16."""
    kernels = importlib.import_module("penstock.kernels.scaled_triton")
    form = FORMS[name]
    grid, per = form.grid(rows, columns), form.per_word

    def codes_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        nbytes = 2 * torch.Size(shape).numel() * dtype.itemsize
        return torch.zeros(start + nbytes, dtype=torch.uint8)[start:].view(dtype).view(2, *shape)

    scale, zero = torch.ones(2, *grid, dtype=torch.bfloat16), None
    if form.packing == "rows":
        codes = codes_of(torch.float8_e4m3fn if form.number == "e4m3" else torch.uint8, rows, columns * form.bits // 8)
        scale = scale.to(torch.uint8) if name == "mxfp4" else scale
    else:
        across = (rows, columns // per) if form.packing == "words" else (rows // per, columns)
        codes, scale = codes_of(torch.int32, *across[::-1]), scale.transpose(1, 2).contiguous()
        zero = torch.zeros(2, grid[1], rows // per, dtype=torch.int32)
    order = torch.zeros(2, columns, dtype=torch.int32) if index else None
    out = (
        torch.empty(2, columns, rows, dtype=torch.bfloat16).transpose(1, 2)
        if turned
        else torch.empty(2, rows, columns, dtype=torch.bfloat16)
    )
    return lambda: kernels.decode(form, Matrix.of(form, codes, scale, zero, order), out)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_quantised_checkpoints(compiled, name: str, turned: bool) -> None:
    assert set(compiled(scaled(name, turned=turned))) == {"_decode"}


@pytest.mark.parametrize("name", ["gptq 4", "packed 4"])
def test_quantised_checkpoints_with_an_order_of_columns(compiled, name: str) -> None:
    assert set(compiled(scaled(name, index=True))) == {"_decode"}


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, True)])
@pytest.mark.parametrize("rows", [1, 40, 200])
def test_products_with_packed_weights(compiled, bits: int, symmetric: bool, rows: int) -> None:
    kernels = importlib.import_module("penstock.kernels.packed_linear_triton")
    for group_size in (32, 64, 128):
        made = quantise(torch.ones(256, 1024), bits=bits, group_size=group_size, symmetric=symmetric)
        weight = PackedWeight(made.codes, made.scale, made.zero, 1024, bits, group_size)
        call = partial(kernels.packed_linear, torch.zeros(rows, 1024, dtype=torch.bfloat16), weight, None)
        assert set(compiled(call)) == {"_multiply", "_add"}


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False), (8, True)])
def test_packed_weights_for_products_in_fp8(compiled, request, bits: int, symmetric: bool) -> None:
    """Of which only newer GPUs know the numbers. Code is the same whatever the rows, and one load is of whole words."""
    if request.node.callspec.params["compiled"] < 89:
        pytest.skip("e4m3 is for compute capability 8.9 and newer")
    kernels = importlib.import_module("penstock.kernels.fp8_linear_triton")
    made = quantise(torch.ones(32, 1024), bits=bits, group_size=64, symmetric=symmetric)
    weight = PackedWeight(made.codes, made.scale, made.zero, 1024, bits, 64)
    out, factors = torch.empty(32, 1024, dtype=torch.float8_e4m3fn), torch.empty(32)
    (code,) = compiled(partial(kernels.expand_rows, weight, out, factors)).values()
    assert "cvt.rn.satfinite.e4m3x2.f32" in code.asm["ptx"]
    assert "cvt.rn.f32.s32" not in code.asm["ptx"]


@pytest.mark.parametrize("columns", [64, 7168, 28672])
def test_rows_for_products_in_fp8(compiled, request, columns: int) -> None:
    if request.node.callspec.params["compiled"] < 89:
        pytest.skip("e4m3 is for compute capability 8.9 and newer")
    kernels = importlib.import_module("penstock.kernels.fp8_linear_triton")
    for rows in (torch.zeros(5, columns, dtype=torch.bfloat16), torch.zeros(5, 3 * columns)[:, :columns]):
        (code,) = compiled(partial(kernels.quantise_rows, rows)).values()
        assert ("ld.global.v4.b32" in code.asm["ptx"]) == (columns > 64)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_rows_that_are_made_whole(compiled, name: str) -> None:
    """Codes are loaded, and rows stored, sixteen bytes at a time."""
    kernels = importlib.import_module("penstock.kernels.quant_kv_triton")
    codes, scales = QUANTISE[name](torch.ones(6, 56, 128, dtype=torch.bfloat16))
    for part in (slice(0, 6), slice(1, 3)):
        (code,) = compiled(partial(kernels.dequantise, codes[part], scales[part], torch.bfloat16)).values()
        assert "ld.global.v4.b32" in code.asm["ptx"]
        assert "st.global.v4.b32" in code.asm["ptx"]
