"""A tensor without values that knows where each of its elements comes from.

Hugging Face's own conversion operations (stack the experts, concatenate gate and up, chunk a fused projection) run
unmodified on it. What comes out says which bytes of which checkpoint tensors make a parameter. An operation that does
more than move elements raises `NotPureMovement`.

A symbolic tensor is a set of boxes that tile it. Each box holds a strided *meta* tensor, a view of the whole checkpoint
tensor, so that torch itself does the arithmetic of strides and offsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Box", "NotPureMovement", "SymbolicTensor"]

_MAX_BOXES = 65536
"""A reshape that cuts a tensor into more boxes than this is left to a conversion on arrival."""


class NotPureMovement(Exception):  # noqa: N818 (a signal to the caller, not a fault)
    """The operation is not a movement of elements, or is one that is not worth following."""


@dataclass(frozen=True, slots=True)
class Box:
    """Elements of `source`, seen through `view`, which lie at `start` of the symbolic tensor."""

    source: str
    start: tuple[int, ...]
    view: Tensor


class SymbolicTensor(torch.Tensor):
    """A tensor of known shape and dtype whose elements are those of its boxes."""

    boxes: tuple[Box, ...]

    @staticmethod
    def __new__(cls: Any, shape: Sequence[int], dtype: torch.dtype, boxes: Sequence[Box]) -> SymbolicTensor:
        """Make a tensor of `shape` that `boxes` tile."""
        if len(boxes) > _MAX_BOXES:
            raise NotPureMovement(f"{len(boxes)} pieces")
        made: SymbolicTensor = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device("meta")
        )
        made.boxes = tuple(boxes)
        return made

    @classmethod
    def of(cls, source: str, shape: Sequence[int], dtype: torch.dtype) -> SymbolicTensor:
        """Return the whole of the checkpoint tensor `source`."""
        view = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return cls(shape, dtype, (Box(source, (0,) * len(shape), view),))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Follow movements, answer questions about the shape, refuse everything else."""
        name = getattr(func, "__name__", "")
        if name in cls.movements:
            return cls.movements[name](*args, **(kwargs or {}))
        if name in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NotPureMovement(name or str(func))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse what `__torch_function__` did not see."""
        raise NotPureMovement(str(func))

    movements: ClassVar[dict[str, Callable[..., Any]]] = {}


_QUESTIONS = {
    "__get__",
    "size",
    "dim",
    "numel",
    "stride",
    "element_size",
    "is_floating_point",
    "is_contiguous",
    "__len__",
}


def _map(tensor: SymbolicTensor, shape: Sequence[int], change: Callable[[Box], Box]) -> SymbolicTensor:
    return SymbolicTensor(shape, tensor.dtype, [change(box) for box in tensor.boxes])


def _permute(tensor: SymbolicTensor, *dims: Any) -> SymbolicTensor:
    order = [dim % tensor.ndim for dim in _flat(dims)]
    return _map(
        tensor,
        [tensor.shape[dim] for dim in order],
        lambda box: Box(box.source, tuple(box.start[dim] for dim in order), box.view.permute(order)),
    )


def _transpose(tensor: SymbolicTensor, dim0: int, dim1: int) -> SymbolicTensor:
    order = list(range(tensor.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(tensor, *order)


def _unsqueeze(tensor: SymbolicTensor, dim: int) -> SymbolicTensor:
    dim %= tensor.ndim + 1
    shape = (*tensor.shape[:dim], 1, *tensor.shape[dim:])
    return _map(
        tensor, shape, lambda box: Box(box.source, (*box.start[:dim], 0, *box.start[dim:]), box.view.unsqueeze(dim))
    )


def _squeeze(tensor: SymbolicTensor, dim: Any = None) -> SymbolicTensor:
    dims = range(tensor.ndim) if dim is None else [one % tensor.ndim for one in _flat((dim,))]
    gone = {one for one in dims if tensor.shape[one] == 1}
    kept = [one for one in range(tensor.ndim) if one not in gone]
    return _map(
        tensor,
        [tensor.shape[one] for one in kept],
        lambda box: Box(box.source, tuple(box.start[one] for one in kept), box.view.squeeze(tuple(gone))),
    )


def _cat(tensors: Sequence[SymbolicTensor], dim: int = 0, **_: Any) -> SymbolicTensor:
    first = tensors[0]
    dim %= first.ndim
    boxes: list[Box] = []
    length = 0
    for tensor in tensors:
        rest, wanted = list(tensor.shape), list(first.shape)
        rest[dim] = wanted[dim] = 0
        if rest != wanted:
            raise ValueError(f"tensors of shapes {tuple(first.shape)} and {tuple(tensor.shape)} do not join")
        if tensor.dtype != first.dtype:
            raise NotPureMovement("promotion of dtypes")
        for box in tensor.boxes:
            start = (*box.start[:dim], box.start[dim] + length, *box.start[dim + 1 :])
            boxes.append(Box(box.source, start, box.view))
        length += tensor.shape[dim]
    return SymbolicTensor((*first.shape[:dim], length, *first.shape[dim + 1 :]), first.dtype, boxes)


def _stack(tensors: Sequence[SymbolicTensor], dim: int = 0, **_: Any) -> SymbolicTensor:
    return _cat([_unsqueeze(tensor, dim) for tensor in tensors], dim)


def _narrow(tensor: SymbolicTensor, dim: int, start: int, length: int) -> SymbolicTensor:
    dim %= tensor.ndim
    boxes = []
    for box in tensor.boxes:
        low = max(box.start[dim], start)
        high = min(box.start[dim] + box.view.shape[dim], start + length)
        if low < high:
            moved = (*box.start[:dim], low - start, *box.start[dim + 1 :])
            boxes.append(Box(box.source, moved, box.view.narrow(dim, low - box.start[dim], high - low)))
    return SymbolicTensor((*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]), tensor.dtype, boxes)


def _pieces(cut: Callable[..., Any]) -> Callable[..., tuple[SymbolicTensor, ...]]:
    """Follow `torch.split` or `torch.chunk`: torch says how long the pieces are."""

    def follow(tensor: SymbolicTensor, how: Any, dim: int = 0) -> tuple[SymbolicTensor, ...]:
        pieces: list[SymbolicTensor] = []
        start = 0
        for piece in cut(torch.empty(tensor.shape[dim], device="meta"), how):
            pieces.append(_narrow(tensor, dim, start, piece.shape[0]))
            start += piece.shape[0]
        return tuple(pieces)

    return follow


def _unbind(tensor: SymbolicTensor, dim: int = 0) -> tuple[SymbolicTensor, ...]:
    return tuple(_squeeze(_narrow(tensor, dim, index, 1), dim) for index in range(tensor.shape[dim]))


def _getitem(tensor: SymbolicTensor, index: Any) -> SymbolicTensor:
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        where = items.index(Ellipsis)
        missing = tensor.ndim - sum(item is not None for item in items) + 1
        items[where : where + 1] = [slice(None)] * missing
    dim = 0
    for item in items:
        if item is None:
            tensor = _unsqueeze(tensor, dim)
            dim += 1
        elif isinstance(item, slice) and item.step in (None, 1):
            start, stop, _ = item.indices(tensor.shape[dim])
            tensor = _narrow(tensor, dim, start, max(stop - start, 0))
            dim += 1
        elif isinstance(item, int):
            tensor = _squeeze(_narrow(tensor, dim, item % tensor.shape[dim], 1), dim)
        else:
            raise NotPureMovement(f"index {item!r}")
    return tensor


def _reshape(tensor: SymbolicTensor, *sizes: Any) -> SymbolicTensor:
    """Follow any reshape: in each group of dims that belong together, flatten every box, then cut it anew."""
    old, new = list(tensor.shape), [int(size) for size in _flat(sizes)]
    if -1 in new:
        unknown = new.index(-1)
        new[unknown] = tensor.numel() // max(-math.prod(new), 1)
    if math.prod(old) != math.prod(new):
        raise ValueError(f"a tensor of shape {tuple(old)} has no shape {tuple(new)}")
    if old == new:
        return tensor
    if 0 in old:
        return SymbolicTensor(new, tensor.dtype, ())
    boxes = list(tensor.boxes)
    for at, num_old, group in _groups(tuple(old), new):
        boxes = [
            cut
            for box in boxes
            for flat in _flatten_box(box, old, at, num_old)
            for cut in _cut_box(flat, at, group)
        ]  # fmt: skip
        old[at : at + num_old] = group
        if len(boxes) > _MAX_BOXES:
            raise NotPureMovement(f"reshape into {len(boxes)} pieces")
    return SymbolicTensor(new, tensor.dtype, boxes)


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
    """Yield (first dim, number of old dims, new dims) of the smallest groups of equal size, by the new shape's dims."""
    i = j = 0
    while i < len(old) or j < len(new):
        first_old, first_new = i, j
        a, b = math.prod(old[i : i + 1]), math.prod(new[j : j + 1])
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        if list(old[first_old:i]) != list(new[first_new:j]):
            yield first_new, i - first_old, list(new[first_new:j])


def _flatten_box(box: Box, shape: Sequence[int], at: int, count: int) -> Iterator[Box]:
    """Merge `count` dims from `at` on into one; where the box does not allow it, take it apart along the first."""
    if count == 0:
        yield Box(box.source, (*box.start[:at], 0, *box.start[at:]), box.view.unsqueeze(at))
        return
    if count == 1:
        yield box
        return
    inner = math.prod(shape[at + 1 : at + count])
    if box.view.shape[at] > 1:
        flat = _flatten_whole(box, shape, at, count)
        if flat is not None:
            yield flat
            return
    for index in range(box.view.shape[at]):
        offset = (box.start[at] + index) * inner
        rest = Box(box.source, (*box.start[:at], *box.start[at + 1 :]), box.view.select(at, index))
        for flat in _flatten_box(rest, [*shape[:at], *shape[at + 1 :]], at, count - 1):
            start = (*flat.start[:at], flat.start[at] + offset, *flat.start[at + 1 :])
            yield Box(flat.source, start, flat.view)


def _flatten_whole(box: Box, shape: Sequence[int], at: int, count: int) -> Box | None:
    inner = shape[at + 1 : at + count]
    sizes = box.view.shape
    if list(sizes[at + 1 : at + count]) != list(inner):
        return None
    try:
        view = box.view.view(*sizes[:at], -1, *sizes[at + count :])
    except RuntimeError:  # the strides do not nest
        return None
    return Box(box.source, (*box.start[:at], box.start[at] * math.prod(inner), *box.start[at + count :]), view)


def _cut_box(box: Box, at: int, sizes: Sequence[int]) -> Iterator[Box]:
    """Split dim `at` of a box into dims of `sizes`, in up to three parts per dim: part of a row, whole rows, a part."""
    if len(sizes) <= 1:
        yield box if sizes else Box(box.source, (*box.start[:at], *box.start[at + 1 :]), box.view.squeeze(at))
        return
    inner = math.prod(sizes[1:])
    start, end = box.start[at], box.start[at] + box.view.shape[at]
    while start < end:
        row, within = divmod(start, inner)
        whole = (end - start) // inner if within == 0 else 0
        stop = start + whole * inner if whole else min((row + 1) * inner, end)
        part = box.view.narrow(at, start - box.start[at], stop - start)
        if whole:
            view = part.unflatten(at, (whole, *sizes[1:]))
            yield Box(box.source, (*box.start[:at], row, *[0] * (len(sizes) - 1), *box.start[at + 1 :]), view)
        else:
            partial = Box(box.source, (*box.start[:at], within, *box.start[at + 1 :]), part)
            for cut in _cut_box(partial, at, sizes[1:]):
                yield Box(cut.source, (*cut.start[:at], row, *cut.start[at:]), cut.view.unsqueeze(at))
        start = stop


def _flatten(tensor: SymbolicTensor, start_dim: int = 0, end_dim: int = -1) -> SymbolicTensor:
    start, end = start_dim % max(tensor.ndim, 1), end_dim % max(tensor.ndim, 1)
    merged = math.prod(tensor.shape[start : end + 1])
    return _reshape(tensor, *tensor.shape[:start], merged, *tensor.shape[end + 1 :])


def _unflatten(tensor: SymbolicTensor, dim: int, sizes: Sequence[int]) -> SymbolicTensor:
    dim %= tensor.ndim
    known = -math.prod(sizes)
    sizes = [tensor.shape[dim] // known if size == -1 else size for size in sizes]
    return _reshape(tensor, *tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])


def _same(tensor: SymbolicTensor, *_: Any, **__: Any) -> SymbolicTensor:
    return tensor


def _to(tensor: SymbolicTensor, *args: Any, **kwargs: Any) -> SymbolicTensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) or (isinstance(value, torch.dtype) and value != tensor.dtype):
            raise NotPureMovement("cast")
    return tensor


def _flat(values: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(values[0]) if len(values) == 1 and not isinstance(values[0], int) else values


SymbolicTensor.movements = {
    "cat": _cat, "concat": _cat, "stack": _stack, "chunk": _pieces(torch.chunk), "split": _pieces(torch.split),
    "unbind": _unbind, "narrow": _narrow, "transpose": _transpose, "swapaxes": _transpose, "permute": _permute,
    "reshape": _reshape, "view": _reshape, "flatten": _flatten, "unflatten": _unflatten, "unsqueeze": _unsqueeze,
    "squeeze": _squeeze, "contiguous": _same, "clone": _same, "detach": _same, "to": _to, "__getitem__": _getitem,
}  # fmt: skip
