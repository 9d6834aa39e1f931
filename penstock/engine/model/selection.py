"""Which tensors bear coarser numbers: the weights of linear layers and experts inside decoder layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from penstock.engine.blueprints import ROUTERS
from penstock.engine.model.conversion import group_weights
from penstock.engine.model.placement import Sources

__all__ = ["layer_weights", "linear_weights"]


def layer_weights(module: Any, layers_name: str, tensors: Sources) -> frozenset[str]:
    """Return the names of checkpoint tensors that decoder layers are made of."""
    groups, _ = group_weights(module, tensors)
    return frozenset(name for group in groups if group.target.startswith(f"{layers_name}.") for name in group.sources)


def linear_weights(module: Any, layers: Iterable[nn.Module], tensors: Sources) -> frozenset[str]:
    """Return the names of checkpoint tensors that make such weights; no routers, norms, embeddings or heads."""
    inside = {id(part) for layer in layers for part in layer.modules()}
    groups, _ = group_weights(module, tensors)
    return frozenset(
        name
        for group in groups
        if _is_linear(module, group.target, inside)
        for name in group.sources
        if len(tensors[name].shape) >= 2
    )


def _is_linear(module: Any, target: str, inside: set[int]) -> bool:
    path, _, leaf = target.rpartition(".")
    owner = module.get_submodule(path)
    if id(owner) not in inside or ROUTERS & set(path.split(".")):
        return False
    if isinstance(owner, (nn.Linear, Conv1D)):
        return leaf == "weight"
    fused_experts: bool = getattr(owner, leaf).dim() == 3 and not isinstance(owner, nn.modules.conv._ConvNd)
    return fused_experts
