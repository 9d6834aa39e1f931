"""Every bfloat16 bit pattern survives, in every order and length, alone and in strided batches."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.kernels.exact import choose_table, decode, decode_reference, encode

PATTERNS = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
WAYS = ["cpu", "triton"]


@pytest.fixture
def way(request):
    """A decoder, and the device of its tensors."""
    device = "cpu" if request.param == "cpu" else request.getfixturevalue("triton_device")
    if device in {request.param, "cuda"}:
        return decode, device
    return importlib.import_module("penstock.kernels.expand_triton").decode_exact, device


def rows(tensors: list[Tensor], step: int, device: str) -> Tensor:
    """Put tensors of one dtype into a buffer at equal steps, as a layer's layout does."""
    longest = max(one.nbytes for one in tensors)
    buffer = torch.full((len(tensors) * step,), 0xA5, dtype=torch.uint8)
    for index, one in enumerate(tensors):
        buffer[index * step : index * step + one.nbytes] = one.contiguous().view(-1).view(torch.uint8)
    return buffer.to(device).as_strided((len(tensors), longest), (step, 1)).view(tensors[0].dtype)


def check(tensors: list[Tensor], way: tuple[Callable[..., None], str]) -> None:
    """Encode tensors of one size, each with a table of its own, and decode them as a batch."""
    decoder, device = way
    tables = [choose_table(one) for one in tensors]
    made = [encode(one, table) for one, table in zip(tensors, tables, strict=True)]
    step = 4 * (tensors[0].numel() // 256 + 1) * 256
    parts = [rows([getattr(one, name) for one in made], step, device) for name in ("low", "code", "start", "extra")]
    low, code, start, extra = parts
    out = torch.zeros(len(tensors), tensors[0].numel() + 128, dtype=torch.bfloat16, device=device)
    decoder(low, code, rows(tables, step, device), start, extra, out=out[:, : tensors[0].numel()])
    for index, one in enumerate(tensors):
        wanted = one.reshape(-1).view(torch.int16)
        assert torch.equal(out[index, : one.numel()].cpu().view(torch.int16), wanted)
        alone = torch.empty(one.numel(), dtype=torch.bfloat16)
        decode_reference(made[index].low, made[index].code, tables[index], made[index].extra, alone)
        assert torch.equal(alone.view(torch.int16), wanted)
    assert not out[:, tensors[0].numel() :].any(), "it wrote behind a row"


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("size", [1, 2, 3, 1023, 1024, 1025, 40001, 65536])
def test_all_patterns(size: int, way) -> None:
    shuffled = PATTERNS[torch.randperm(65536, generator=torch.Generator().manual_seed(size))]
    check([PATTERNS[:size], shuffled[:size], PATTERNS[-size:], torch.zeros(size, dtype=torch.bfloat16)], way)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_more_than_the_cpu_takes_at_once(way) -> None:
    check([(torch.randn(300_001, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()], way)


def test_codes_go_to_the_most_frequent_exponents() -> None:
    values = torch.cat([torch.full((index + 1,), 2.0**index) for index in range(20)]).bfloat16()
    table = choose_table(values)
    assert sorted(table[:15].tolist()) == [127 + index for index in range(5, 20)]
    made = encode(values, table)
    assert made.extra.tolist() == [127] + [128] * 2 + [129] * 3 + [130] * 4 + [131] * 5
    assert made.start.tolist() == [0]


def test_weights_take_three_quarters() -> None:
    values = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    made = encode(values, choose_table(values))
    packed = sum(part.nbytes for part in (made.low, made.code, made.start, made.extra))
    assert packed <= 0.7525 * values.nbytes


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=2, max_size=6000), st.binary(min_size=2, max_size=64))
def test_any_values_with_any_table(content: bytes, other: bytes) -> None:
    values, sample = (
        torch.frombuffer(bytearray(one[: len(one) // 2 * 2]), dtype=torch.bfloat16) for one in (content, other)
    )
    table = choose_table(sample)
    made = encode(values, table)
    out = torch.empty(1, values.numel(), dtype=torch.bfloat16)
    decode(made.low[None], made.code[None], table[None], made.start[None], made.extra[None], out=out)
    assert torch.equal(out[0].view(torch.int16), values.view(torch.int16))
