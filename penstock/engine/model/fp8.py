"""Linear layers that multiply in FP8 (`kernels/fp8_linear.py`) with weights that stay coded in their layer's buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.model.opaque import LAYER
from penstock.errors import ConfigError, UnsupportedModelError
from penstock.kernels.fp8_linear import Scratch, fp8_linear, suits_fp8
from penstock.kernels.packed_linear import PackedWeight
from penstock.offload.buffers import DTYPES, view_of
from penstock.offload.codec import Coding
from penstock.offload.layout import Layout, Packed

__all__ = ["Fp8Linear", "bind_fp8", "can_stay_packed", "multiply_in_fp8"]

_LIBRARY = torch.library.Library("penstock", "FRAGMENT")
_LIBRARY.define("fp8_linear(Tensor x, *, str module, int out_features) -> Tensor")

_PARTS = ("codes", "scale", "zero")
"""The parameters that stand for a weight: what its coding's parts are."""


class Fp8Linear(nn.Linear):
    """A linear layer whose weight is `codes`, `scale` and, or None, `zero`."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    coding: Coding
    scratch: Scratch | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own word for it
        """Multiply; in compiled code that is one opaque operator, which finds the module by its place in the layer."""
        if torch.compiler.is_compiling():
            made: Tensor = torch.ops.penstock.fp8_linear(
                input, module=self.penstock_name, out_features=self.out_features
            )
            return made if self.bias is None else made + self.bias
        made = self.multiply(input)
        return made if self.bias is None else made.add_(self.bias)

    def multiply(self, x: Tensor) -> Tensor:
        """Return the product, without the bias."""
        coding = self.coding
        assert coding.group_size is not None
        weight = PackedWeight(self.codes, self.scale, self.zero, coding.matrix[1], coding.bits, coding.group_size)
        return fp8_linear(x, weight, self.scratch)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """There is none. Raises UnsupportedModelError."""
        raise UnsupportedModelError(
            f"the model's own code reads the weight of {getattr(self, 'penstock_name', 'a linear layer')} itself",
            fix="Leave the activations' dtype at auto.",
        )


def can_stay_packed(module: Any, name: str, coding: Coding) -> bool:
    """Say whether a weight can be multiplied with as it is coded."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if type(owner) is not nn.Linear or leaf != "weight" or coding.codec not in {"int8", "int4"}:
        return False
    rows, columns = coding.shape
    return suits_fp8(rows, columns, coding.group_size or 0)


def multiply_in_fp8(module: Any, layouts: Sequence[Layout], device: torch.device) -> Scratch | None:
    """Make the linear layers of packed weights `Fp8Linear`; return the scratch that they share, None on a CPU.

    Raises ConfigError where there are none.
    """
    packed = [one for layout in layouts for one in layout.packed]
    if not packed:
        raise ConfigError(
            "no weights to multiply with in FP8",
            wanted="linear layers packed as int8 or int4",
            fix="Add --codec int4 or int8, or run a checkpoint that `penstock pack` made so.",
        )
    scratch = None
    if device.type != "cpu":
        most_rows = max(one.coding.matrix[0] for one in packed)
        scratch = Scratch.of(most_rows, max(one.coding.size for one in packed), device)
    for one in packed:
        owner = _owner_of(module, one)
        del owner._parameters["weight"]
        owner.__class__ = Fp8Linear
        owner.coding, owner.scratch = one.coding, scratch
        for leaf, part in zip(_PARTS, (*one.parts, None), strict=False):
            empty = None if part is None else torch.empty(part.shape, dtype=DTYPES[part.dtype], device="meta")
            owner.register_parameter(leaf, None if empty is None else nn.Parameter(empty, requires_grad=False))
    return scratch


def bind_fp8(module: Any, layout: Layout, buffer: Tensor) -> None:
    """Make the parts of a layer's packed weights views of its flat uint8 buffer."""
    for one in layout.packed:
        owner = _owner_of(module, one)
        for leaf, part in zip(_PARTS, one.parts, strict=False):
            owner._parameters[leaf] = nn.Parameter(view_of(buffer, part), requires_grad=False)


def _owner_of(module: Any, one: Packed) -> Any:
    return module.get_submodule(one.name.rpartition(".")[0])


def _run(x: Tensor, *, module: str, out_features: int) -> Tensor:
    made: Tensor = LAYER.get().get_submodule(module).multiply(x)  # type: ignore[operator]
    assert made.shape[-1] == out_features
    return made


def _shape_of_result(x: Tensor, *, module: str, out_features: int) -> Tensor:  # noqa: ARG001 - the operator's
    return x.new_empty(*x.shape[:-1], out_features)


_LIBRARY.impl("fp8_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("penstock::fp8_linear", _shape_of_result, lib=_LIBRARY)
