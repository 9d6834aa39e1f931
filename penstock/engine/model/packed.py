"""Linear layers that read weights which rest packed on the device, in micro-batches that say so.

Expanding a layer takes the same time for one token as for thousands. Where all coded parameters of a model's layers are
the weights of such modules, passes of few tokens leave them packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.batch import CURRENT
from penstock.kernels.packed_linear import PackedWeight, packed_linear
from penstock.offload.buffers import view_of
from penstock.offload.codec import Coding
from penstock.offload.layout import Expansion, Layout, View

__all__ = ["PackedLinear", "all_suit", "bind_packed", "hide_weights", "let_read_packed", "unbind_packed"]


class PackedLinear(nn.Linear):
    """A linear layer that may know its weight's packed form, too."""

    packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own word for it
        """Multiply with the weight, or with its packed form."""
        if torch.compiler.is_compiling() or self.packed is None or not CURRENT.get().reads_packed:
            return super().forward(input)
        return packed_linear(input, self.packed, self.bias)


def let_read_packed(module: Any, layouts: Sequence[Layout], aliases: Mapping[str, Sequence[str]]) -> bool:
    """Make the linear layers of coded weights `PackedLinear`, and return whether that covers all that is coded."""
    found: list[nn.Linear] = []
    for layout in layouts:
        sizes = {(view.name, view.offset): view.nbytes for view in layout.parameters}
        for one in layout.expansions:
            path, _, leaf = one.target.name.rpartition(".")
            whole = one.count == 1 and sizes.get((one.target.name, one.target.offset)) == one.target.nbytes
            owner = module.get_submodule(path) if whole else None
            alone = leaf == "weight" and one.target.name not in aliases
            if type(owner) is not nn.Linear or not alone or not _is_grouped(one):
                return False
            found.append(owner)
        if layout.conversions:
            return False
    for linear in found:
        linear.__class__ = PackedLinear
    return bool(found)


def _is_grouped(one: Expansion) -> bool:
    return isinstance(one.coding, Coding) and one.coding.codec in {"int8", "int4"} and len(one.coding.shape) == 2


def bind_packed(module: Any, layout: Layout, rest: Tensor) -> None:
    """Let a layer's `PackedLinear` modules know their weights' parts among the layer's wire bytes."""
    for one in layout.expansions:
        _owner_of(module, one.target).packed = _weight(one, layout, rest)


def unbind_packed(module: Any) -> None:
    """Let go of every layer's wire bytes."""
    for part in module.modules():
        if isinstance(part, PackedLinear):
            part.packed = None


def all_suit(layout: Layout) -> Iterator[bool]:
    """Say of each coded weight whether a GPU's kernel takes it."""
    empty = torch.empty(layout.wire_nbytes, dtype=torch.uint8, device="meta")
    return (_weight(one, layout, empty).suits_kernel for one in layout.expansions)


class _Hidden(Tensor):
    """A weight of which nothing can be asked but what kind of tensor it is."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise TypeError for all else."""
        if getattr(func, "__name__", "") != "__get__" and func not in {Tensor.size, Tensor.dim, Tensor.numel}:
            raise TypeError(f"{getattr(func, '__name__', func)} of a weight that rests packed")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def hide_weights(module: Any) -> None:
    """Let every weight that is known in its packed form, too, raise TypeError when it is used: until it is bound."""
    for part in module.modules():
        if isinstance(part, PackedLinear) and part.packed is not None:
            like = part.weight
            one = torch.zeros((), dtype=like.dtype, device=like.device)
            part._parameters["weight"] = one.expand(like.shape).as_subclass(_Hidden)  # type: ignore[assignment]


def _owner_of(module: Any, view: View) -> PackedLinear:
    owner = module.get_submodule(view.name.rpartition(".")[0])
    assert isinstance(owner, PackedLinear)
    return owner


def _weight(one: Expansion, layout: Layout, rest: Tensor) -> PackedWeight:
    assert isinstance(one.coding, Coding)
    assert one.coding.group_size is not None
    parts = [view_of(rest, replace(part, offset=part.offset - layout.wire_offset)) for part in one.parts]
    return PackedWeight(
        parts[0],
        parts[1],
        parts[2] if len(parts) > 2 else None,
        columns=one.coding.matrix[1],
        bits=one.coding.bits,
        group_size=one.coding.group_size,
    )
