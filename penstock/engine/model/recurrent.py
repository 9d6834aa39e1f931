"""Recurrent mixers of every kind (state spaces, delta rules, short convolutions) through one wrapper.

A recurrent mixer reads a flattened micro-batch as one sequence. The wrapper calls it once for each span instead, with
the cache that transformers itself would give it for that sequence alone; between passes the KV store keeps that cache.
So prefill and decode mix freely, and sequences join and leave; but a prompt must come in one span, because most mixers
start afresh whenever they see more than one token.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from penstock.engine.batch import CURRENT, Span
from penstock.errors import UnsupportedModelError

__all__ = ["cache_argument", "wrap_recurrent"]


def cache_argument(forward: Any) -> str | None:
    """Return the name under which a mixer's forward takes its cache, if it takes one."""
    names = inspect.signature(forward).parameters
    return next((name for name in ("cache_params", "past_key_values") if name in names), None)


def wrap_recurrent(mixer: Any, model: Any, number: int) -> bool:
    """Make `mixer` run span by span; `number` is its own among the model's mixers. Say whether it is recurrent."""
    template = _cache_of(mixer, model)
    argument = cache_argument(type(mixer).forward)
    if template is None or argument is None:
        return False
    forward = mixer.forward
    names = tuple(inspect.signature(forward).parameters)
    masks = dict.fromkeys(name for name in names if name.endswith("mask"))

    def by_span(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = CURRENT.get()
        arguments = {**dict(zip(names[1:], args, strict=False)), **kwargs, **masks}
        made, begin = [], 0
        for span in batch.spans:
            cache = _state(batch.kv.state(number, span.sequence), template, span)
            part = hidden_states[:, begin : begin + span.length]
            made.append(forward(part, **{**arguments, argument: cache}))
            batch.kv.keep_state(number, span.sequence, cache, nbytes=_nbytes(cache))
            begin += span.length
        return _joined(made)

    mixer.forward = by_span
    return True


def _state(kept: Any | None, template: Any, span: Span) -> Any:
    if kept is None:
        assert span.start == 0, "a recurrent mixer sees a sequence from its first token on"
        return deepcopy(template)
    assert span.length == 1, "a recurrent mixer sees a prompt in one span"
    return kept


def _cache_of(mixer: Any, model: Any) -> Any | None:
    """Return an empty cache for one sequence and this mixer alone, or None where it keeps keys, not states."""
    own = _own_cache_class(mixer)
    if own is not None:
        return own()
    whole = DynamicCache(config=model.config)
    index = mixer.layer_idx
    if index >= len(whole.layers) or not isinstance(whole.layers[index], LinearAttentionCacheLayerMixin):
        return None
    cache = DynamicCache()
    cache.layers = [whole.layers[index]] * (index + 1)
    return cache


def _own_cache_class(mixer: Any) -> Any | None:
    """Some families define a cache class of their own beside their mixers."""
    home = sys.modules[type(mixer).__module__]
    for value in vars(home).values():
        if isinstance(value, type) and issubclass(value, DynamicCache) and value.__module__ == home.__name__:
            return value
    return None


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for member in value.values():
            yield from _tensors(member, seen)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _tensors(member, seen)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value), seen)


def _nbytes(cache: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(vars(cache), set()))


def _joined(made: list[Any]) -> Any:
    """Join the spans' outputs [1, n, ...] along the tokens; of a tuple, each tensor."""
    if isinstance(made[0], Tensor):
        return torch.cat(made, 1)
    if not isinstance(made[0], tuple):
        raise UnsupportedModelError(f"a recurrent mixer returned a {type(made[0]).__name__}")
    return tuple(torch.cat(parts, 1) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*made, strict=True))
