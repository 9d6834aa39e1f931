"""What a forward does after the layers, head and all, for some rows at a time.

Logits of every token of a prompt are larger than anything else: 2,048 tokens of a vocabulary of 128,000 take a gigabyte
in float32. What comes after the layers (a norm, the head, scaling, soft caps) differs by family, so it is not written
again here: transformers' own forward runs again for each block of rows, and its body, the part that runs the layers,
returns those rows of what it made the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Tail", "gate_bodies", "score_rows", "watch_tail"]

LOGIT_NBYTES = 32
"""Temporaries of one logit while it is scored: itself, what scaling and soft caps make of it, float32, exponentials."""


@dataclass(slots=True)
class Tail:
    """What the tail of a running forward sees: the rows `keep` of what its body makes, or else `states` themselves."""

    keep: Tensor
    made: Any = None
    states: Tensor | None = None
    depth: int = 0

    @property
    def whole(self) -> Tensor:
        """What the body made: [1, T, hidden]."""
        made: Tensor = self.made[0]
        return made


_TAIL: ContextVar[Tail | None] = ContextVar("penstock_tail", default=None)


@contextmanager
def watch_tail(keep: Tensor) -> Iterator[Tail]:
    """Let forwards inside see the rows `keep` [K] alone, then whatever is set as `states`.

    May span a switch of greenlets, for each has a context of its own.
    """
    tail = Tail(keep)
    token = _TAIL.set(tail)
    try:
        yield tail
    finally:
        _TAIL.reset(token)


def gate_bodies(module: nn.Module, layers: str) -> None:
    """Let `watch_tail` reach every module that contains the list named `layers`, but for the model itself.

    Which of them the model calls differs by family; the outermost one that is called is the body.
    """
    path = layers.split(".")[:-1]
    for depth in range(1, len(path) + 1):
        _gate(module.get_submodule(".".join(path[:depth])))


def _gate(body: Any) -> None:
    forward = body.forward

    def gated(*args: Any, **kwargs: Any) -> Any:
        tail = _TAIL.get()
        if tail is None:
            return forward(*args, **kwargs)
        if tail.states is not None:
            return _with_states(tail.made, tail.states)
        tail.depth += 1
        made = forward(*args, **kwargs)
        tail.depth -= 1
        if tail.depth:
            return made
        tail.made = made
        return _with_states(made, tail.whole[:, tail.keep])

    body.forward = gated


def _with_states(made: Any, states: Tensor) -> Any:
    return (states, *made[1:]) if isinstance(made, tuple) else type(made)(last_hidden_state=states)


def score_rows(
    tail: Tail, logits_of: Callable[[], Tensor], rows: Tensor, targets: Tensor, *, rows_at_once: int
) -> Tensor:
    """Return each target's log-probability and rank from 1: rows [R] and targets [R] int64 -> float32 [R, 2].

    A row's target is the token that comes after it. `logits_of` runs the forward under `watch_tail` after its body has
    run. `rows_at_once` bounds the memory.
    """
    parts = []
    for some, wanted in zip(rows.split(rows_at_once), targets.split(rows_at_once), strict=True):
        tail.states = tail.whole[:, some]
        logits = logits_of().float()
        chosen = logits.gather(-1, wanted[:, None])
        rank = (logits > chosen).sum(-1, keepdim=True) + 1
        parts.append(torch.cat([chosen - logits.logsumexp(-1, keepdim=True), rank], -1))
    return torch.cat(parts)
