"""Attention as one opaque call inside compiled code.

Attention needs what no compiler can trace: the running micro-batch, the KV store, the layer's own module. So in code
that torch.compile makes it is an operator of tensors and constants only. The constants are the same for every layer of
a kind, because the module is named by its place in the layer; which layer runs is looked up when the operator runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LAYER", "name_modules", "opaque"]

LAYER: ContextVar[nn.Module] = ContextVar("penstock_layer")
"""The decoder layer whose compiled code runs. As with the micro-batch, each forward has a context of its own."""

_LIBRARY = torch.library.Library("penstock", "DEF")
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, *, str module, int value_size, float? scaling, int? sliding_window,"
    " float? softcap, Tensor? s_aux) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)


def name_modules(layer: nn.Module) -> None:
    """Tell each module its place in the layer; compiled code refers to it by that."""
    for name, module in layer.named_modules():
        module.penstock_name = name


def opaque(attention: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """Make an attention function of transformers' interface an operator wherever it is compiled, and itself elsewhere.

    It must return [1, T, Hq, Dv] for query [1, Hq, T, D]; Dv is the value's last size, or else the module's
    `penstock_value_size`. Of the interface's keyword arguments only those of the operator reach it.
    """

    @wraps(attention)
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
    ) -> tuple[Tensor, None]:
        if not torch.compiler.is_compiling():
            return attention(module, query, key, value, attention_mask, **arguments)
        assert attention_mask is None
        scaling = arguments.get("scaling")
        made = torch.ops.penstock.attend(
            query,
            key,
            value,
            module=module.penstock_name,
            value_size=getattr(module, "penstock_value_size", value.shape[-1]),
            scaling=None if scaling is None else float(scaling),
            sliding_window=arguments.get("sliding_window"),
            softcap=arguments.get("softcap"),
            s_aux=arguments.get("s_aux"),
        )
        return made, None

    def run(query: Tensor, key: Tensor, value: Tensor, *, module: str, value_size: int, **arguments: Any) -> Tensor:
        made, _ = attention(LAYER.get().get_submodule(module), query, key, value, None, **arguments)
        assert made.shape[-1] == value_size
        return made.contiguous()

    _LIBRARY.impl("attend", run, "CompositeExplicitAutograd")
    torch.library.register_fake("penstock::attend", _shape_of_result, lib=_LIBRARY)
    return attend


def _shape_of_result(query: Tensor, *_: Tensor, value_size: int, **__: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value_size)
