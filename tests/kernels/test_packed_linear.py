"""Products with packed weights against those with expanded ones."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch import Tensor

from penstock.kernels.groupwise import quantise
from penstock.kernels.packed_linear import PackedWeight, packed_linear

KINDS = [
    pytest.param(bits, symmetric, id=f"int{bits}-{'sym' if symmetric else 'asym'}")
    for bits, symmetric in itertools.product((8, 4), (True, False))
]


def packed(shape: tuple[int, int], *, bits: int, symmetric: bool, group_size: int, device: str = "cpu") -> PackedWeight:
    generator = torch.Generator().manual_seed(sum(shape))
    made = quantise(torch.randn(shape, generator=generator), bits=bits, group_size=group_size, symmetric=symmetric)
    codes, scale, zero = (None if part is None else part.to(device) for part in (made.codes, made.scale, made.zero))
    assert codes is not None
    assert scale is not None
    return PackedWeight(codes, scale, zero, shape[1], bits, group_size)


def rows(count: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(device, dtype)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_the_reference_is_a_product_with_the_expanded_weight(bits: int, symmetric: bool) -> None:
    weight = packed((48, 70), bits=bits, symmetric=symmetric, group_size=32)
    x, bias = rows(6, 70, torch.bfloat16).view(2, 3, 70), rows(1, 48, torch.bfloat16)[0]
    made = packed_linear(x, weight, bias)
    assert made.shape == (2, 3, 48)
    assert torch.equal(made, torch.nn.functional.linear(x, weight.expanded(torch.bfloat16), bias))


@pytest.mark.parametrize("count", [1, 5, 17, 130])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_the_kernel_is_as_near_as_rounding(triton_device, bits, symmetric, group_size, count) -> None:
    kernels = importlib.import_module("penstock.kernels.packed_linear_triton")
    dtypes = (torch.float16,) if triton_device == "cpu" else (torch.float16, torch.bfloat16)
    shapes = [(100, 256), (65, 384)] if triton_device == "cpu" else [(100, 256), (65, 384), (3000, 4096), (20000, 512)]
    for shape, dtype in itertools.product(shapes, dtypes):
        weight = packed(shape, bits=bits, symmetric=symmetric, group_size=group_size, device=triton_device)
        assert weight.suits_kernel
        x, bias = rows(count, shape[1], dtype, triton_device), rows(1, shape[0], dtype, triton_device)[0]
        wanted = x.double() @ weight.expanded(dtype).double().T
        for given in (None, bias):
            found = kernels.packed_linear(x, weight, given)
            assert found.dtype == dtype
            exact = wanted if given is None else wanted + given.double()
            error = (found.double() - exact).abs().max() / exact.abs().max()
            assert error < torch.finfo(dtype).eps, (shape, dtype)
            assert torch.equal(found, kernels.packed_linear(x, weight, given))


@pytest.mark.parametrize(("columns", "group_size"), [(70, 32), (192, 128), (96, 64), (256, 16)])
def test_what_the_kernel_does_not_take(columns: int, group_size: int) -> None:
    assert not packed((8, columns), bits=4, symmetric=True, group_size=group_size).suits_kernel


def test_rows_that_do_not_lie_together(triton_device) -> None:
    kernels = importlib.import_module("penstock.kernels.packed_linear_triton")
    weight = packed((64, 128), bits=4, symmetric=False, group_size=64, device=triton_device)
    x = rows(6, 256, torch.float16, triton_device)[:, ::2]
    assert torch.equal(kernels.packed_linear(x, weight, None), kernels.packed_linear(x.contiguous(), weight, None))
