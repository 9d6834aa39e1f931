"""A micro-batch: the tokens of some sequences, flattened without padding, that go through a layer in one call."""

from __future__ import annotations

from collections.abc import Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.offload.groups import KVGroups
    from penstock.offload.host_kv import HostKV
    from penstock.offload.kv import KVStore

__all__ = ["CURRENT", "MicroBatch", "Span"]


@dataclass(frozen=True, slots=True)
class Span:
    """`length` new tokens of one sequence, whose first `start` tokens went through the model before."""

    sequence: Hashable
    start: int
    length: int

    @property
    def end(self) -> int:
        """Tokens of the sequence that will have gone through the model."""
        return self.start + self.length


@dataclass(frozen=True)
class MicroBatch:
    """What attention must know of the tokens in front of it: `spans` in the order of the flattened tokens, and `kv`.

    `kv` is the store of the home that all of its sequences have. `max_scores` bounds the attention scores that are in
    memory at once. With `reads_packed`, weights that rest packed on the device are read there: they are not expanded.
    """

    spans: tuple[Span, ...]
    kv: KVStore | KVGroups | HostKV
    max_scores: int = 1 << 24
    reads_packed: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens in the micro-batch."""
        return sum(span.length for span in self.spans)

    @property
    def parks(self) -> bool:
        """Whether its forward may switch to the executor inside a layer, as compiled code must not."""
        return self.kv.parks

    @cached_property
    def places(self) -> Any:
        """Where its tokens are in the store: found once, when the first layer asks; for that store's own methods."""
        return self.kv.locate(self.spans)

    def note_window(self, layer: int, window: int | None) -> None:
        """Attention says how many tokens of what a layer keeps it sees, None for all; a rehearsal listens."""


CURRENT: ContextVar[MicroBatch] = ContextVar("penstock_micro_batch")
"""The running micro-batch. Each micro-batch's forward runs in a greenlet of its own, and greenlets have contexts of
their own, so this is set once per forward and is right after every switch."""
