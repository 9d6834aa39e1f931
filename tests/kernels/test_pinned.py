"""Bytes that a kernel reads from host memory are the bytes that are there."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from penstock.io.memory import HostMemory
from penstock.kernels.pinned import read_pinned

SHAPES = [(0,), (1,), (7,), (3, 5, 8), (57, 56, 128), (2049,)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.float8_e4m3fn]


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return all kinds of bit patterns, NaNs with payloads among them."""
    made = torch.empty(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    bytes_ = torch.randint(256, (made.nbytes,), generator=generator, dtype=torch.uint8)
    return bytes_.view(dtype).view(shape) if made.numel() else made


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_copies_bits(triton_device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    kernels = importlib.import_module("penstock.kernels.pinned_triton")
    source = random_bytes(shape, dtype)
    there = source.pin_memory() if triton_device == "cuda" else source
    out = torch.zeros(shape, dtype=dtype, device=triton_device)
    kernels.read_pinned(there, out=out)
    assert same_bits(out.cpu(), source)


def test_words_are_as_long_as_borders_allow(triton_device: str) -> None:
    kernels = importlib.import_module("penstock.kernels.pinned_triton")
    source = random_bytes((64,), torch.uint8)
    whole = source.pin_memory() if triton_device == "cuda" else source
    for begin, end in ((0, 64), (8, 40), (4, 20), (2, 20), (1, 64), (3, 4)):
        out = torch.zeros(80, dtype=torch.uint8, device=triton_device)
        kernels.read_pinned(whole[begin:end], out=out[begin:end])
        assert same_bits(out[begin:end].cpu(), source[begin:end])
        assert not out[:begin].any()
        assert not out[end:].any()


def test_where_there_is_no_kernel_it_is_a_copy() -> None:
    source = random_bytes((5, 16), torch.float16)
    out = torch.zeros_like(source)
    read_pinned(source, out=out)
    assert same_bits(out, source)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("pinned", [True, False])
def test_memory_of_ours_that_is_pinned_and_such_that_is_not(pinned: bool) -> None:
    source = random_bytes((57, 56, 128), torch.bfloat16)
    with HostMemory(source.nbytes, pin=pinned) as memory:
        rows = torch.frombuffer(memory.view, dtype=torch.bfloat16)[: source.numel()].view(source.shape)
        rows.copy_(source)
        out = torch.zeros_like(source, device="cuda")
        read_pinned(rows, out=out)
        assert same_bits(out.cpu(), source)
        del rows
