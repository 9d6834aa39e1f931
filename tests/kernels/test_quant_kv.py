"""Rows in fewer bits: how far they are off, alone and in attention."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged_cases import Case, make, wanted
from torch import Tensor

from penstock.kernels.attention import Rule
from penstock.kernels.paged import attend_paged
from penstock.kernels.quant_kv import QUANTISE, _dequantised, dequantise, quantise

SHAPES = [(1, 1, 1), (3, 2, 2), (5, 1, 7), (4, 2, 31), (4, 2, 33), (2, 3, 64), (3, 1, 80), (2, 2, 100), (2, 1, 576)]
BITS = {"fp8": 8, "int8": 8, "int4": 4}


def round_trip(name: str, rows: Tensor) -> Tensor:
    return dequantise(*QUANTISE[name](rows), rows.shape[-1])


def bound(name: str, rows: Tensor) -> Tensor:
    """Return how far each element may be off: half a step, and what rounding scales and offsets adds."""
    rows = rows.float()
    largest = rows.abs().amax(-1, keepdim=True)
    if name == "fp8":
        return rows.abs() / 16 * 1.001 + largest / 448 / 512
    if name == "int8":
        return (largest / 127 * 0.5001).expand_as(rows)
    spread = rows.amax(-1, keepdim=True).clamp(min=0) - rows.amin(-1, keepdim=True).clamp(max=0)
    return (spread / 15 * 0.51 + largest / 128).expand_as(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", QUANTISE)
def test_every_element_within_half_a_step(name, shape, dtype):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) * 3 + 1
    codes, scales = QUANTISE[name](rows)
    made = round_trip(name, rows)
    assert made.shape == rows.shape
    assert ((made - rows.float()).abs() <= bound(name, rows)).all()
    assert codes.nbytes <= (rows.numel() * BITS[name] / 8 + shape[0] * shape[1] * (shape[2] + 31) // 32)
    assert codes.shape[:2] == scales.shape[:2] == rows.shape[:2]


@given(
    rows=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5), min_size=1, max_size=8),
    shift=st.sampled_from([1.0, 1e-20, 1e25]),
    name=st.sampled_from(sorted(QUANTISE)),
)
def test_any_numbers(rows, shift, name):
    rows = torch.tensor(rows) * shift
    assert ((round_trip(name, rows) - rows).abs() <= bound(name, rows) * 1.01 + 1e-35).all()


@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(QUANTISE)))
def test_a_row_depends_on_itself_alone(seed, name):
    rows = torch.randn(9, 2, 40, generator=torch.Generator().manual_seed(seed))
    whole = QUANTISE[name](rows)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    for part, alone in zip(whole, QUANTISE[name](rows[order].transpose(0, 1).contiguous()), strict=True):
        assert torch.equal(part[order].float(), alone.transpose(0, 1).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", QUANTISE)
def test_zeros_and_no_numbers(name, dtype):
    rows = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [-3.0, 1.0]], dtype=dtype)
    made = round_trip(name, rows)
    assert made[0].eq(0).all()
    assert made[1:3].isnan().all(), "what is no number never becomes one"
    assert made[3, 0] == pytest.approx(-3.0)
    assert round_trip(name, rows[:0]).shape == (0, 2)


def odd_rows(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Return rows of all magnitudes, whose heads lie apart; some are zeros, no numbers, or nearly too small."""
    generator = torch.Generator().manual_seed(shape[2])
    num_tokens, num_heads, size = shape
    rows = torch.randn(num_heads, num_tokens, size, generator=generator)
    rows *= 10 ** torch.randn(num_heads, num_tokens, 1, generator=generator).mul(3)
    rows = rows.to(dtype).transpose(0, 1)
    for token, value in enumerate((0.0, float("nan"), float("inf"), -float("inf"))):
        rows[token : token + 1, :, -1:] = value
    rows[4:5] = -0.0
    if dtype != torch.bfloat16:  # Triton's interpreter reads others where bfloat16 has no leading one
        rows[5:6] = rows[5:6].float().mul(1e-43 if dtype == torch.float32 else 1e-7).to(dtype)
    rows[6:7] = torch.linspace(-127, 127, size).round().sub(0.5)  # halves
    rows[6:7, :, :1] = 127
    return rows


def bits(part: Tensor) -> Tensor:
    return part.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 2, 16), (1, 1, 1), (3, 1, 7), (8, 2, 33), (9, 5, 64), (21, 3, 80), (40, 4, 128), (9, 1, 576)], ids=str
)
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_the_kernel_makes_the_same_bits(triton_device, name, shape, dtype) -> None:
    """Of rows that lie anyhow; and what it stores at slots is what it returns, with nothing beside."""
    rows = odd_rows(shape, dtype)
    wanted = QUANTISE[name](rows)
    kernels = importlib.import_module("penstock.kernels.quant_kv_triton")
    there = rows.transpose(0, 1).contiguous().to(triton_device).transpose(0, 1)
    for part, made in zip(wanted, kernels.quantise(there, wanted[0].dtype), strict=True):
        assert part.shape == made.shape
        assert torch.equal(bits(part), bits(made))
    slots = torch.randperm(16 * 4, generator=torch.Generator().manual_seed(0))[: shape[0]]
    into = tuple(torch.zeros(4, 16, *part.shape[1:]).to(part.dtype) for part in wanted)
    found = tuple(part.to(triton_device) for part in into)
    for part, made in zip(
        wanted, kernels.quantise(there, wanted[0].dtype, slots=slots.to(triton_device), into=found), strict=True
    ):
        assert torch.equal(bits(part), bits(made))
    quantise(rows, name, slots=slots, into=into)
    for part, made in zip(into, found, strict=True):
        assert torch.equal(bits(part), bits(made))


def test_every_number_that_a_byte_can_be(triton_device) -> None:
    """All numbers of e4m3, those halfway between neighbours, and those just beside, come out as torch rounds them."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(halves, torch.full_like(halves, limit)) for limit in (0.0, 1e3)]
    every = torch.cat([numbers, halves, *beside])
    rows = torch.cat([every, -every])[:, None, None] * torch.tensor([1.0, 0.0])
    rows[..., 1] = 448.0  # the scale is one
    kernels = importlib.import_module("penstock.kernels.quant_kv_triton")
    codes, _ = kernels.quantise(rows.to(triton_device), torch.float8_e4m3fn)
    assert torch.equal(bits(codes), bits(rows.to(torch.float8_e4m3fn)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_the_reference_makes_the_same_bits_on_a_gpu(name) -> None:
    rows = odd_rows((40, 4, 128), torch.bfloat16)
    for part, made in zip(QUANTISE[name](rows), QUANTISE[name](rows.cuda()), strict=True):
        assert torch.equal(bits(part), bits(made))


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_attention_reads_small_rows_where_they_are(attend_compiled, name):
    """The kernel is its reference on them, and each output is a mean of values that are off by little."""
    call = make(Case((700, 40), (8, 2), (128, 128), dtype=torch.float32))
    query, keys, values, *tables = call.tensors
    rows = [QUANTISE[name](each) for each in (keys, values)]
    scales = {"key_scales": rows[0][1], "value_scales": rows[1][1]}
    small = replace(call, tensors=(query, rows[0][0], rows[1][0], *tables), keywords=call.keywords | scales)
    got, exact = small.run(attend_compiled), wanted(call)
    torch.testing.assert_close(got, wanted(small), atol=3e-6, rtol=1e-5)
    assert (got - exact).norm() / exact.norm() < {"fp8": 0.08, "int8": 0.02}[name]
    torch.testing.assert_close(paged(small), got, atol=3e-6, rtol=1e-5)


def paged(call) -> Tensor:
    """Run the same through the other kernel's reference."""
    options = {name: call.keywords[name] for name in ("key_scales", "value_scales")}
    options |= {"rule": Rule(call.keywords["scale"]), "max_length": 700, "workspace_nbytes": 1 << 20}
    out = torch.empty_like(call.out)
    attend_paged(*call.tensors, **options, out=out)
    return out


def test_every_float8(attend_compiled):
    """Attention over one token returns its values, whatever they are."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).view(torch.float8_e4m3fn)
    keys, ones, out = torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1), torch.empty(1, 1, 256)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    attend_compiled(torch.zeros(1, 1, 8), keys, values, table, lengths, scale=1.0, value_scales=ones, out=out)
    torch.testing.assert_close(out[0, 0], values[0, 0, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_makes_rows_whole_with_the_same_bits(triton_device, name, shape):
    kernels = importlib.import_module("penstock.kernels.quant_kv_triton")
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(triton_device) * 3
    rows[0, 0, 0] = 0
    codes, scales = QUANTISE[name](rows)
    dtypes = (
        (torch.float32, torch.float16) if triton_device == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
    )
    for dtype in dtypes:
        assert torch.equal(kernels.dequantise(codes, scales, dtype), _dequantised(codes, scales, shape[-1]).to(dtype))
    if name == "fp8":
        every = torch.arange(256, dtype=torch.uint8, device=triton_device).view(torch.float8_e4m3fn)
        every = every[every.float().isfinite()].view(1, 1, -1)
        made = kernels.dequantise(every, torch.ones(1, 1, device=triton_device), torch.float32)
        assert torch.equal(made, every.float())
