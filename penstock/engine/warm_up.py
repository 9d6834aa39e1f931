"""Let a GPU's kernels of attention be compiled, chosen and loaded at the start: the first pass that needs one waits.

Single tokens, alone and of long sequences, prompts together and alone, and later parts of prompts take different
kernels. Each goes through the first layer, over zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from penstock.engine.batch import MicroBatch, Span
from penstock.engine.executor import Executor
from penstock.engine.model.build import StreamedModel
from penstock.engine.model.packed import PackedLinear
from penstock.engine.rehearsal import EnoughError, bind_to_zeros, run_alone
from penstock.kernels.packed_linear import FEW_ROWS, packed_linear
from penstock.offload.kv import KVStore

__all__ = ["warm_up", "warm_up_packed"]

LONG_TOKENS = 600
"""Attention of one token is cut into parts from 512 tokens on."""

_PROMPTS = ((Span(0, 0, 33), Span(1, 0, 47)), (Span(0, 0, 33),))
_LATER = (
    (Span(0, 3, 1), Span(1, 9, 1)),
    (Span(0, 3, 1), Span(1, LONG_TOKENS - 1, 1)),
    (Span(0, 40, 5), Span(1, 30, 20)),
)


def warm_up(model: StreamedModel, executor: Executor, *, kv_dtype: str) -> None:
    """Run the micro-batches that may come, as far as the model can. Binds all layers to zeros."""
    buffers = bind_to_zeros(model)
    executor.weights = _FirstLayer()
    for spans in (*_PROMPTS, *(_LATER if model.splits_prompts else ())):  # states are of tokens that were there
        if max(span.end for span in spans) <= (model.context_length or LONG_TOKENS):
            kv = KVStore(device=model.device, kv_dtype=kv_dtype)
            for span in spans:
                kv.acquire(span.sequence, num_tokens=span.end)
                kv.assume(span.sequence, num_tokens=span.start)
            with suppress(EnoughError):
                run_alone(model, executor, MicroBatch(spans, kv))
    del buffers


def warm_up_packed(model: StreamedModel, most_tokens: int) -> None:
    """Do the same for products with packed weights, of which one layer must be bound to some: all are alike."""
    known: set[Any] = set()
    for part in model.module.modules():
        weight = part.packed if isinstance(part, PackedLinear) else None
        kind = None if weight is None else (weight.codes.shape, weight.bits, weight.group_size, part.bias is None)
        if weight is None or kind in known:
            continue
        known.add(kind)
        for num_tokens in (1, FEW_ROWS + 1, 2 * FEW_ROWS + 1):
            x = torch.zeros(min(num_tokens, most_tokens), weight.columns, dtype=model.dtype, device=model.device)
            with torch.inference_mode():
                packed_linear(x, weight, part.bias)


class _FirstLayer:
    """A weight source without weights, which lets no other layer run."""

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        if index:
            raise EnoughError
        yield
