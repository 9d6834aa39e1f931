"""The one place that touches transformers' checkpoint conversion: which tensors make which parameters, and how.

transformers loads a checkpoint by renaming each tensor's name and, where a pattern says so, by collecting several
tensors into one conversion. The same is done here with names alone; the conversion itself runs later, on symbolic
tensors to learn where bytes go, or on real ones on arrival.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

__all__ = ["WeightGroup", "group_weights", "parameter_dtypes", "stored_tensors"]


@dataclass(slots=True)
class WeightGroup:
    """Checkpoint tensors that together make one or more parameters; `target` is the first of these."""

    target: str
    _transform: Any | None
    _model: Any
    sources: list[str] = field(default_factory=list)
    _patterns: list[str] = field(default_factory=list)

    @property
    def renames_only(self) -> bool:
        """Whether the parameter is the tensor itself."""
        return self._transform is None

    def add(self, source: str, pattern: str) -> None:
        """Collect a checkpoint tensor, in transformers' order."""
        self.sources.append(source)
        self._patterns.append(pattern)

    def convert(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run transformers' own operations on the tensors of `sources`; return the parameters by name."""
        if self._transform is None:
            return {self.target: tensors[0]}
        collected = self._transform.collected_tensors
        collected.clear()
        for pattern, tensor in zip(self._patterns, tensors, strict=True):
            collected[pattern].append(tensor)
        made = self._transform.convert(self.target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def group_weights(model: Any, names: Iterable[str]) -> tuple[list[WeightGroup], list[str]]:
    """Group a checkpoint's tensor names by the parameters they make; also return the names nothing needs."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, WeightGroup] = {}
    unexpected: list[str] = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if target not in wanted:
            unexpected.append(name)
            continue
        if target not in groups:
            groups[target] = WeightGroup(target, None if pattern is None else deepcopy(by_pattern[pattern]), model)
        groups[target].add(name, pattern or name)
    return list(groups.values()), unexpected


def parameter_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype of every parameter and persistent buffer, as transformers would load it."""
    plan = {re.compile(pattern.replace("*", ".*")): kept for pattern, kept in model._get_dtype_plan(dtype).items()}
    return {
        name: next((kept for pattern, kept in plan.items() if pattern.search(name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def stored_tensors(model: Any, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the family's checkpoints store for these parameters, by name in natural order. They may be meta."""
    stored = revert_weight_conversion(model, parameters)
    return {name: stored[name] for name in sorted(stored, key=dot_natural_key)}
