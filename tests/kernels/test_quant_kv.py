"""Rows in fewer bits: how far they are off, alone and in attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged_cases import Case, make, wanted
from torch import Tensor

from penstock.kernels.attention import Rule
from penstock.kernels.paged import attend_paged
from penstock.kernels.quant_kv import QUANTISE, dequantise

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
