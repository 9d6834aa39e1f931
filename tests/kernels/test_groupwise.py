"""Group-wise integers: the error that the format promises, and one result from every decoder."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch import Tensor

from penstock.kernels.groupwise import Quantised, dequantise, dequantise_reference, quantise

SHAPES = [(1, 1), (3, 7), (2, 64), (5, 200), (1, 1100), (700, 1024)]
KINDS = [
    pytest.param(bits, symmetric, id=f"int{bits}-{'sym' if symmetric else 'asym'}")
    for bits, symmetric in itertools.product((8, 4), (True, False))
]


def weights(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 10_000 + shape[1])
    values = torch.randn(shape, generator=generator) * torch.logspace(-4, 1, shape[0])[:, None]
    values[0, : shape[1] // 2] = 0
    return values.to(dtype)


def decoded(made: Quantised, like: Tensor, bits: int, group_size: int) -> Tensor:
    out = torch.empty_like(like)[None]
    zero = None if made.zero is None else made.zero[None]
    dequantise(made.codes[None], made.scale[None], zero, out, bits=bits, group_size=group_size)
    return out[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_the_error_is_half_a_step_but_for_the_ends(
    bits: int, symmetric: bool, group_size: int, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        values = weights(shape, dtype)
        made = quantise(values, bits=bits, group_size=group_size, symmetric=symmetric)
        found = decoded(made, values, bits, group_size)
        alone = torch.empty_like(values)
        dequantise_reference(made.codes, made.scale, made.zero, alone, bits=bits, group_size=group_size)
        assert torch.equal(found, alone)
        step = made.scale.float().abs()[:, torch.arange(shape[1]) // group_size]
        error = (found.float() - values.float()).abs()
        rounding = values.float().abs() * torch.finfo(dtype).eps
        # Rounded scales and zeros, and the step that symmetric codes lack on one side, cut the ends of a group's range.
        assert bool((error <= 1.6 * step + rounding).all()), shape
        assert (error > 0.51 * step + rounding).float().mean() <= 0.03 or values.numel() < 1000


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_zeros_stay_zero_and_whole_steps_are_exact(bits: int, symmetric: bool) -> None:
    top = (1 << (bits - 1)) - 1
    ramp = torch.arange(-top, top + 1).float()[None].repeat(2, 1)
    ramp[1] = 0
    made = quantise(ramp, bits=bits, group_size=1024, symmetric=symmetric)
    found = decoded(made, ramp, bits, 1024)
    assert not found[1].any()
    if bits == 8:
        assert (found[0] - ramp[0]).abs().max() <= 0.51


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_a_search_never_makes_the_error_larger(bits: int, symmetric: bool) -> None:
    values = weights((40, 256), torch.float32)
    errors = []
    for search in (False, True):
        made = quantise(values, bits=bits, group_size=64, symmetric=symmetric, search=search)
        cells = (decoded(made, values, bits, 64) - values).square().unflatten(1, (-1, 64)).sum(-1)
        errors.append(cells)
    assert bool((errors[1] <= errors[0] * 1.0001).all())
    if bits == 4:
        assert errors[1].sum() < 0.97 * errors[0].sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_triton_decodes_the_same_bits(triton_device: str, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    """A strided batch in one launch. Triton's interpreter cuts float32 to bfloat16 instead of rounding it."""
    interpreted = triton_device == "cpu"
    kernel = importlib.import_module("penstock.kernels.expand_triton").dequantise if interpreted else dequantise
    for shape in SHAPES[: -1 if interpreted else None]:
        many = [weights(shape, dtype) * factor for factor in (1.0, 0.5, -2.0)]
        made = [quantise(one, bits=bits, group_size=64, symmetric=symmetric) for one in many]

        def batch(name: str, made: list[Quantised] = made) -> Tensor:
            parts = torch.stack([getattr(one, name) for one in made]).to(triton_device)
            padded = torch.zeros(3, parts[0].numel() + 256, dtype=parts.dtype, device=triton_device)
            padded[:, : parts[0].numel()] = parts.flatten(1)
            return padded[:, : parts[0].numel()].unflatten(1, parts.shape[1:])

        out = torch.zeros(3, many[0].numel() + 64, dtype=dtype, device=triton_device)
        target = out[:, : many[0].numel()].unflatten(1, shape)
        kernel(batch("codes"), batch("scale"), None if symmetric else batch("zero"), target, bits=bits, group_size=64)
        for index, one in enumerate(many):
            rounding = 2**-7 if interpreted and dtype == torch.bfloat16 else 0
            wanted = decoded(made[index], one, bits, 64)
            torch.testing.assert_close(target[index].cpu(), wanted, atol=0, rtol=rounding)
        assert not out[:, many[0].numel() :].any()
