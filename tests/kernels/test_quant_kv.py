"""int8 rows: how far they are off, alone and in attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged_cases import Case, make, wanted

from penstock.kernels.quant_kv import dequantise_rows, quantise_rows


@given(
    rows=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=8),
    shift=st.sampled_from([1.0, 1e-20, 1e30]),
)
def test_every_element_within_half_a_step(rows, shift):
    rows = torch.tensor(rows) * shift
    small, factors = quantise_rows(rows)
    assert small.dtype == torch.int8
    assert small.shape == rows.shape
    normal = factors > 1e-37  # the quotient of smaller factors is not exact
    error = (dequantise_rows(small, factors) - rows).abs()
    assert (error <= 0.5001 * factors[:, None])[normal].all()
    assert (error <= 1e-35)[~normal].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_zeros_and_no_numbers(dtype):
    rows = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [-3.0, 1.0]], dtype=dtype)
    small, factors = quantise_rows(rows)
    made = dequantise_rows(small, factors)
    assert made[0].eq(0).all()
    assert made[1:3].isnan().all()
    assert made[3, 0] == pytest.approx(-3.0)


def test_attention_with_int8_rows(attend_compiled):
    """Each output is a mean of values: it is off by less than half a step of values, plus what scores are off."""
    call = make(Case((700, 40), (8, 2), (128, 128), dtype=torch.float32))
    query, keys, values, *tables = call.tensors
    rows = [quantise_rows(each) for each in (keys, values)]
    scales = {"key_scales": rows[0][1], "value_scales": rows[1][1]}
    tensors = (query, rows[0][0], rows[1][0], *tables)
    small = replace(call, tensors=tensors, keywords=call.keywords | scales)
    got, exact = small.run(attend_compiled), wanted(call)
    torch.testing.assert_close(got, wanted(small), atol=3e-6, rtol=1e-5)
    assert (got - exact).norm() / exact.norm() < 0.02
