"""Products in FP8 with packed weights against the numbers that they stand for."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from test_packed_linear import KINDS, packed, rows

from penstock.kernels.fp8_linear import (
    Scratch,
    _try_product,
    check_fp8,
    expand_rows,
    fp8_linear,
    quantise_rows,
    suits_fp8,
    why_no_fp8,
)
from penstock.kernels.sizes import LARGEST_FP8

FP8 = torch.float8_e4m3fn
STEP, SMALLEST = 2.0**-4, 2.0**-10
"""Half of the distance between neighbours: as a share of a number, and where these lie evenly around zero."""


def expanded(weight):
    out = torch.empty(weight.codes.shape[0], weight.columns, dtype=FP8, device=weight.codes.device)
    factors = torch.empty(out.shape[0], device=out.device)
    expand_rows(weight, out, factors)
    return out, factors


def assert_rounded(found, wanted, factors):
    """Each number is the nearest that e4m3 has, or one beside it where two are as near, times its row's factor."""
    error = (found.double() * factors.double() - wanted.double()).abs()
    assert (error <= 1.001 * torch.maximum(STEP * wanted.double().abs(), SMALLEST * factors.double())).all()


def assert_rounded_by_triton(found, wanted, factors):
    """The same on a GPU. Triton's interpreter cuts, and makes half of what it should round up to a power of two."""
    if found.is_cuda:
        assert_rounded(found, wanted, factors)
        return
    numbers = wanted.double() / factors.double().clamp(min=1e-30)
    above = numbers.abs().log2() % 1
    known = (above > 1e-6) & (above < 0.9)
    limit = 2 * torch.maximum(STEP * numbers.abs(), torch.tensor(SMALLEST))
    assert known.any()
    assert ((found.double() - numbers).abs() <= limit)[known].all()


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_weights_are_rounded_once(bits, symmetric):
    for shape, group_size in (((48, 64), 32), ((16, 384), 128), ((7, 96), 48)):
        weight = packed(shape, bits=bits, symmetric=symmetric, group_size=group_size)
        codes, factors = expanded(weight)
        assert_rounded(codes, weight.expanded(torch.float32), factors[:, None])
        assert (codes.float().abs() <= LARGEST_FP8).all()


def test_weights_of_zeros():
    weight = packed((16, 64), bits=4, symmetric=False, group_size=64)
    weight.scale[3] = 0
    codes, factors = expanded(weight)
    assert not codes[3].float().any()
    assert factors[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_once(dtype):
    x = rows(9, 100, dtype)
    x[2] = 0
    codes, scale = quantise_rows(x)
    assert codes.shape == x.shape
    assert scale.shape == (9, 1)
    assert_rounded(codes, x, scale)
    assert codes.float().abs().amax(1).tolist() == [LARGEST_FP8] * 2 + [0] + [LARGEST_FP8] * 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_shows(bad):
    """The other rows know nothing of it."""
    weight = packed((16, 64), bits=4, symmetric=True, group_size=64)
    x = rows(4, 64, torch.float32)
    clean = fp8_linear(x, weight, None)
    x[1, 7] = bad
    found = fp8_linear(x, weight, None)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_the_product_is_that_of_the_rounded_numbers(bits, symmetric):
    weight = packed((48, 128), bits=bits, symmetric=symmetric, group_size=64)
    x = rows(6, 128, torch.float32).view(2, 3, 128)
    (codes, scale), (numbers, factors) = quantise_rows(x.view(6, 128)), expanded(weight)
    wanted = (codes.double() @ numbers.double().T) * scale * factors
    found = fp8_linear(x, weight, None)
    assert found.shape == (2, 3, 48)
    torch.testing.assert_close(found.view(6, 48).double(), wanted, rtol=1e-5, atol=1e-5)
    exact = x.view(6, 128).double() @ weight.expanded(torch.float32).double().T
    assert (wanted - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "suits"),
    [(48, 128, 64, True), (40, 128, 64, False), (48, 120, 64, False), (48, 96, 48, True), (48, 96, 24, False)],
)
def test_which_weights_suit(rows, columns, group_size, suits):
    assert suits_fp8(rows, columns, group_size) == suits


def test_a_torch_without_such_products_is_named(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no such product\nand more of it")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert why_no_fp8(torch.device("cpu")) is None, "a CPU does without"
    assert _try_product(torch.device("cpu")) == f"torch {torch.__version__}: no such product"
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: None)
    assert _try_product(torch.device("cpu")) is None


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_the_kernel_expands_to_the_nearest_numbers(triton_device, bits, symmetric, group_size):
    kernels = importlib.import_module("penstock.kernels.fp8_linear_triton")
    for shape in ((16, 128), (3, 384), (5, 4480)):
        sizes = {"bits": bits, "symmetric": symmetric, "group_size": group_size}
        weight = packed(shape, **sizes, device=triton_device)
        codes = torch.empty(shape, dtype=FP8, device=triton_device)
        factors = torch.full((shape[0],), torch.nan, device=triton_device)
        kernels.expand_rows(weight, codes, factors)
        torch.testing.assert_close(factors.cpu(), expanded(packed(shape, **sizes))[1])
        assert_rounded_by_triton(codes, weight.expanded(torch.float32), factors[:, None])


@pytest.mark.parametrize("columns", [16, 100, 1000, 5000])
def test_the_kernel_quantises_rows(triton_device, columns):
    kernels = importlib.import_module("penstock.kernels.fp8_linear_triton")
    for dtype in (torch.float32, torch.float16):
        x = rows(5, columns, dtype, triton_device)
        x[2] = 0
        for given in (x, torch.cat([x, x], 1)[:, :columns], x.repeat_interleave(2, 1)[:, ::2]):
            codes, scale = kernels.quantise_rows(given)
            torch.testing.assert_close(scale.cpu(), quantise_rows(x.cpu())[1])
            assert_rounded_by_triton(codes, x, scale)
            assert codes[2].float().eq(0).all()


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_computes_what_a_cpu_does(bits, symmetric):
    """A GPU adds up e4m3 products in fewer than float32's digits, and rounds to bfloat16."""
    check_fp8(torch.device("cuda"))
    for (count, columns), num in itertools.product([(1024, 4096), (48, 128)], [1, 17, 300]):
        weight = packed((count, columns), bits=bits, symmetric=symmetric, group_size=64)
        there = packed((count, columns), bits=bits, symmetric=symmetric, group_size=64, device="cuda")
        scratch = Scratch.of(2 * count, 2 * count * columns, torch.device("cuda"))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = rows(num, columns, dtype)
            wanted, found = fp8_linear(x, weight, None).double(), fp8_linear(x.cuda(), there, scratch)
            assert found.dtype == dtype
            assert (found.double().cpu() - wanted).norm() / wanted.norm() < 0.02
            assert torch.equal(found, fp8_linear(x.cuda(), there, scratch))
