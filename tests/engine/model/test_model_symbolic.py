"""Symbolic tensors follow movements: the bytes they name are the bytes that the same operations move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.engine.model.symbolic import NotPureMovement, SymbolicTensor

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def gather(symbol: SymbolicTensor, sources: dict[str, Tensor]) -> Tensor:
    """Fill a tensor from the boxes, each element exactly once."""
    made = torch.full(tuple(symbol.shape), -1, dtype=torch.int64)
    for box in symbol.boxes:
        where = tuple(slice(s, s + n) for s, n in zip(box.start, box.view.shape, strict=True))
        assert (made[where] == -1).all(), "boxes overlap"
        source = sources[box.source].reshape(-1)
        made[where] = torch.as_strided(source, box.view.shape, box.view.stride(), box.view.storage_offset())
    assert (made != -1).all(), "boxes leave holes"
    return made


@st.composite
def factors(draw: Any, total: int) -> list[int]:
    sizes = []
    while total > 1 and draw(st.booleans()):
        size = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
        sizes.append(size)
        total //= size
    sizes.insert(draw(st.integers(0, len(sizes))), total)
    return sizes


def operation(data: Any, tensor: Tensor) -> Callable[[Any], Any]:  # noqa: PLR0911
    """Draw one movement that fits a tensor of this shape."""
    dim = data.draw(st.integers(0, tensor.ndim - 1))
    size = tensor.shape[dim]
    kind = data.draw(st.sampled_from(
        ["reshape", "permute", "transpose", "narrow", "chunk", "split", "unsqueeze", "index", "select", "flatten",
         "cat", "stack", "unbind", "squeeze", "unflatten"]
    ))  # fmt: skip
    if kind == "reshape":
        shape = data.draw(factors(tensor.numel()))
        return lambda x: x.reshape(shape)
    if kind == "permute":
        order = data.draw(st.permutations(range(tensor.ndim)))
        return lambda x: x.permute(*order).contiguous()
    if kind == "transpose":
        other = data.draw(st.integers(-tensor.ndim, tensor.ndim - 1))
        return lambda x: torch.transpose(x, dim, other).clone()
    if kind in {"narrow", "index"}:
        start = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(1, size - start))
        if kind == "narrow":
            return lambda x: x.narrow(dim, start, length)
        return lambda x: x[(slice(None),) * dim + (slice(start, start + length),)]
    if kind == "select":
        index = (*(slice(None),) * dim, data.draw(st.integers(-size, size - 1)), None)
        return lambda x: x[..., None][index]
    if kind in {"chunk", "split"}:
        count = data.draw(st.integers(1, size))
        cut = torch.chunk if kind == "chunk" else torch.split
        last = data.draw(st.integers(0, len(cut(tensor, count, dim)) - 1))
        return lambda x: cut(x, count, dim=dim)[last]
    if kind == "flatten":
        end = data.draw(st.integers(dim, tensor.ndim - 1))
        return lambda x: x.flatten(dim, end)
    if kind == "unflatten":
        sizes = data.draw(factors(size))
        return lambda x: x.unflatten(dim, tuple(sizes))
    if kind == "unbind":
        return lambda x: torch.stack(list(reversed(x.unbind(dim))), dim=dim)
    if kind == "squeeze":
        return lambda x: x.unsqueeze(-1).squeeze(dim).contiguous()
    if kind == "unsqueeze":
        return lambda x: x.unsqueeze(dim)
    join = torch.cat if kind == "cat" else torch.stack
    return lambda x: join([x, x.narrow(dim, 0, size), x], dim=dim)


@given(st.data())
def test_chains_of_movements_move_the_same_elements(data: Any) -> None:
    names = ["a", "b"]
    shape = data.draw(SHAPES)
    sources = {name: torch.arange(torch.Size(shape).numel()).reshape(shape) + 10000 * i for i, name in enumerate(names)}
    real: Tensor = torch.cat(list(sources.values()))
    symbol: Any = torch.cat([SymbolicTensor.of(name, shape, torch.int64) for name in names])
    for _ in range(data.draw(st.integers(1, 6))):
        if real.ndim == 0 or real.numel() > 2000:
            break
        step = operation(data, real)
        real, symbol = step(real), step(symbol)
        assert tuple(symbol.shape) == tuple(real.shape)
    assert torch.equal(gather(symbol, sources), real)


@pytest.mark.parametrize(
    "compute",
    [lambda x: x + 1, lambda x: x.float(), lambda x: x.to(torch.float16), lambda x: x[[0, 1]], lambda x: x[::2],
     lambda x: torch.cat([x, x.new_zeros(1)]), torch.exp, lambda x: x.sum()],
)  # fmt: skip
def test_anything_else_is_not_pure_movement(compute: Callable[[Any], Any]) -> None:
    with pytest.raises(NotPureMovement):
        compute(SymbolicTensor.of("a", (4, 2), torch.bfloat16))


def test_tensors_that_do_not_join_are_an_error() -> None:
    with pytest.raises(ValueError, match="do not join"):
        torch.cat([SymbolicTensor.of("a", (4, 2), torch.int64), SymbolicTensor.of("b", (4, 3), torch.int64)])
