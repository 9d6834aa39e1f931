"""Matrices of quantised checkpoints: every decoder gives the same bits, and these are what the definitions say."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.kernels.forms import Form
from penstock.kernels.scaled import Matrix, decode, decode_reference

SHAPES = [(1, 1), (3, 7), (5, 200), (70, 9), (70, 130), (300, 512)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMS = {
    "fp8 blocks": Form("e4m3", 8, (128, 128)),
    "fp8 odd blocks": Form("e4m3", 8, (2, 3)),
    "fp8 rows": Form("e4m3", 8, (1, 1 << 20)),
    "int8 rows": Form("int", 8, (1, 1 << 20)),
    "int8 whole": Form("int", 8, (1 << 20, 1 << 20)),
    "packed 4": Form("int", 4, (1, 24), zero=8),
    "packed 8": Form("int", 8, (1, 24), zero=128),
    "gptq 4": Form("int", 4, (1, 24), packing="words", zero=1),
    "gptq 8": Form("int", 8, (1, 64), packing="words"),
    "awq": Form("int", 4, (1, 24), packing="awq"),
    "mxfp4": Form("e2m1", 4, (1, 32)),
}
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def parts_of(form: Form, name: str, rows: int, columns: int, *, zeros: bool, index: bool) -> Parts:
    """Return random stored parts of a batch of two."""
    chance = torch.Generator().manual_seed(rows * 1000 + columns)

    def bits(*shape: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, (2, *shape), generator=chance).to(torch.int32)

    def bytes_of(*shape: int) -> Tensor:
        return torch.randint(0, 256, (2, *shape), generator=chance).to(torch.uint8)

    per, grid = form.per_word, form.grid(rows, columns)
    scale = torch.rand(2, *grid, generator=chance) + 0.01
    zero = None
    if form.packing == "awq":
        codes, zero = bits(columns, -(-rows // 8)), bits(grid[1], -(-rows // 8))
    elif form.packing == "words":
        codes, zero = bits(-(-columns // per), rows), bits(grid[1], -(-rows // per))
    elif name == "mxfp4":
        return bytes_of(rows, -(-columns // 32), 16), bytes_of(*grid) % 255, None, None
    elif name.startswith("packed"):
        codes, zero = bits(rows, -(-columns // per)), bits(-(-rows // per), grid[1]) if zeros else None
    elif form.number == "int":
        codes, zero = bytes_of(rows, columns).view(torch.int8), bytes_of(*grid).view(torch.int8) if zeros else None
    else:
        codes = bytes_of(rows, columns).view(torch.float8_e4m3fn)
    groups = torch.randint(-1, grid[1] + 1, (2, columns), generator=chance).to(torch.int32) if index else None
    return codes, scale if form.packing == "rows" else scale.transpose(1, 2).contiguous().half(), zero, groups


def cases() -> Iterator[tuple[Form, Parts, tuple[int, int]]]:
    for name, form in FORMS.items():
        for rows, columns in SHAPES:
            for zeros, index in ((False, False), (True, False), (True, True)):
                if form.number == "int" or not zeros:
                    yield form, parts_of(form, name, rows, columns, zeros=zeros, index=index), (rows, columns)


def referred(form: Form, parts: Parts, out: Tensor) -> Tensor:
    for item in range(2):
        one = [None if part is None else part[item : item + 1] for part in parts]
        decode_reference(form, Matrix.of(form, *one).item(0), out[item])  # type: ignore[arg-type]
    return out


def same(one: Tensor, other: Tensor) -> bool:
    """Tell whether all bits are equal, but for those of NaNs."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_decodes_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    for form, parts, (rows, columns) in cases():
        out = torch.empty(2, rows, columns, dtype=dtype)
        decode(form, *parts, out=out)
        assert same(out, referred(form, parts, torch.empty_like(out))), (form, rows, columns)


def test_transposed_values_are_the_same() -> None:
    form, parts = FORMS["mxfp4"], parts_of(FORMS["mxfp4"], "mxfp4", 70, 96, zeros=False, index=False)
    plain, turned = torch.empty(2, 70, 96), torch.empty(2, 96, 70)
    decode(form, *parts, out=plain)
    decode(form, *parts, out=turned.transpose(1, 2))
    assert torch.equal(turned.transpose(1, 2), plain)


def test_every_8_bit_float_is_torchs() -> None:
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)[None, None]
    out = torch.empty(1, 1, 256)
    decode(FORMS["fp8 blocks"], codes, torch.ones(1, 1, 2), None, None, out=out)
    assert same(out[0, 0], codes.float()[0, 0])


def test_every_4_bit_float_and_every_power_of_two() -> None:
    """From the definition (OCP Microscaling Formats): 2 bits of exponent with bias 1, one of mantissa; 255 is NaN."""
    wanted = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    wanted += [-one for one in wanted]
    codes = (torch.arange(0, 16, 2) | torch.arange(1, 16, 2) << 4).to(torch.uint8).repeat(256, 2)[None, :, None]
    scale = torch.arange(256).to(torch.uint8)[None, :, None]
    out = torch.empty(1, 256, 32, dtype=torch.float64)
    decode(FORMS["mxfp4"], codes, scale, None, None, out=out)
    values = (
        torch.tensor(wanted * 2, dtype=torch.float64) * (torch.arange(256, dtype=torch.float64) - 127).exp2()[:, None]
    )
    fits = values.abs() < 2.0**128
    assert torch.equal(out[0, :255][fits[:255]], values[:255][fits[:255]])
    assert out[0, 255].isnan().all()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_decodes_the_same_bits(triton_device: str, dtype: torch.dtype) -> None:
    """Parts of a strided batch, in one launch; values as they are and transposed; nothing beside them is written."""
    on_cuda = triton_device == "cuda"
    if dtype == torch.bfloat16 and not on_cuda:
        pytest.skip("Triton's interpreter cuts where a GPU rounds")

    def strided(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        room = torch.zeros(2, part[0].numel() * part.element_size() + 256, dtype=torch.uint8, device=triton_device)
        flat = room[:, : part[0].numel() * part.element_size()].view(part.dtype)
        flat.copy_(part.flatten(1))
        return flat.unflatten(1, part.shape[1:])

    for form, parts, (rows, columns) in cases():
        if not on_cuda and rows * columns > 1000:
            continue  # the interpreter would take minutes
        wanted = referred(form, parts, torch.empty(2, rows, columns, dtype=dtype))
        moved: Any = [strided(part) for part in parts]
        for turned in (False, True):
            room = torch.zeros(2, rows * columns + 64, dtype=dtype, device=triton_device)
            out = room[:, : rows * columns]
            out = out.unflatten(1, (columns, rows)).transpose(1, 2) if turned else out.unflatten(1, (rows, columns))
            if on_cuda:
                decode(form, *moved, out=out)
            else:
                importlib.import_module("penstock.kernels.scaled_triton").decode(form, Matrix.of(form, *moved), out)
            assert same(out.cpu(), wanted), (form, rows, columns, turned)
            assert not room[:, rows * columns :].any()
