"""Keys and values of models in which some layers have sliding windows: a store for the layers of each window.

A sequence is in all of them, with blocks of its own in each.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.errors import ClosedError
from penstock.offload.blocks import KVCost, is_nearly
from penstock.offload.kv import TYPICAL_TOKENS, KVStatistics, KVStore, Places, Rows, Tokens
from penstock.offload.window_kv import WindowKV

__all__ = ["GroupPlaces", "KVGroups", "open_kv"]


@dataclass(frozen=True, slots=True)
class GroupPlaces:
    """Where a micro-batch's tokens are in the store of each window."""

    of: Mapping[int | None, Places]

    @property
    def positions(self) -> Tensor:
        """The tokens' numbers in their sequences [T]."""
        return next(iter(self.of.values())).positions


class KVGroups:
    """Several stores as one, with the methods of `KVStore`. `windows`: which layers have which."""

    parks = False

    def __init__(
        self,
        *,
        limit_nbytes: int,
        cost: KVCost,
        windows: Mapping[int, int],
        device: torch.device | str = "cpu",
        kv_dtype: str = "auto",
    ) -> None:
        self._limit = limit_nbytes
        self._cost = cost
        self._windows = dict(windows)
        self._parts = cost.parts()
        self._besides = limit_nbytes
        self._states: dict[Hashable, dict[int, tuple[Any, int]]] = {}
        self._peak = 0
        self._closed = False
        self._stores: dict[int | None, KVStore] = {
            window: (KVStore if window is None else WindowKV)(
                limit_nbytes=0, cost=part, device=device, kv_dtype=kv_dtype
            )
            for window, part in self._parts.items()
        }
        self.prepare((TYPICAL_TOKENS,))

    def prepare(self, lengths: Sequence[int], *, least: Sequence[int] = (), num_elsewhere: int = 0) -> None:
        """Divide the limit for sequences of these lengths, none of which is running yet, unless it nearly is."""
        if not lengths or self._states or self._closed:
            return
        besides = self._cost.besides(self._limit, lengths, least=least, num_elsewhere=num_elsewhere)
        lengths = self._cost.fitting(self._limit, lengths)
        needed = {window: part.of(max(lengths, default=0)) for window, part in self._parts.items()}
        usual = {window: sum(map(part.of, lengths)) for window, part in self._parts.items()}
        more = max(self._limit - besides - sum(needed.values()), 0)
        total = max(sum(usual.values()), 1)
        wanted = {window: needed[window] + more * usual[window] // total for window in self._parts}
        there = {window: store.nbytes for window, store in self._stores.items()}
        enough = all(there[window] >= needed[window] and is_nearly(there[window], wanted[window]) for window in there)
        if enough and is_nearly(self._limit - sum(there.values()), besides):
            return
        for store in self._stores.values():  # all old pools go before a new one is made
            store.limit(0)
        for window, store in self._stores.items():
            store.limit(wanted[window])
            store.prepare(lengths)
        self._besides = self._limit - sum(store.nbytes for store in self._stores.values())

    def fits(self, num_tokens: int) -> bool:
        """Say whether a sequence of `num_tokens` tokens can be acquired now."""
        if not self._states:
            return self._cost.of(num_tokens) <= self._limit
        return self._has_room(num_tokens)

    def _has_room(self, num_tokens: int) -> bool:
        besides = (len(self._states) + 1) * self._cost.sequence_nbytes
        return besides <= self._besides and all(store.fits(num_tokens) for store in self._stores.values())

    def could_hold(self, num_tokens: int) -> bool:
        """Say whether a sequence of `num_tokens` tokens could be acquired while none is running."""
        return self._cost.of(num_tokens) <= self._limit

    def check(self, num_tokens: int, what: str = "a sequence") -> None:
        """Raise BudgetError, naming `what`, when a sequence of `num_tokens` tokens can never be acquired."""
        self._cost.check(self._limit, num_tokens, what)

    def acquire(self, sequence: Hashable, *, num_tokens: int) -> None:
        """Reserve room for a sequence of `num_tokens` tokens, for which `fits` has said yes."""
        if self._closed:
            raise ClosedError("the store of keys and values is closed")
        assert self.fits(num_tokens), "sequences start only when they fit"
        if not self._has_room(num_tokens):
            self.prepare((num_tokens,))
        for store in self._stores.values():
            store.acquire(sequence, num_tokens=num_tokens)
        self._states[sequence] = {}
        self._peak = max(self._peak, self.statistics().nbytes)

    def extend(self, sequence: Hashable, *, num_tokens: int) -> bool:
        """Reserve more for a sequence: `num_tokens` tokens in all. False, and no more, if too few blocks are free."""
        if not all(store.can_extend(sequence, num_tokens=num_tokens) for store in self._stores.values()):
            return False
        for store in self._stores.values():
            store.extend(sequence, num_tokens=num_tokens)
        self._peak = max(self._peak, self.statistics().nbytes)
        return True

    def locate(self, spans: Sequence[Tokens]) -> GroupPlaces:
        """Say where the new tokens of a micro-batch go; once for each micro-batch, in the order in which they run."""
        return GroupPlaces({window: store.locate(spans) for window, store in self._stores.items()})

    def append(self, layer: int, places: GroupPlaces, *rows: Tensor) -> Rows:
        """Store one layer's new rows of a micro-batch, [T, H, ...] each, and return what it keeps of its sequences.

        Of sequences in layers with a window, that is at least what their new tokens see.
        """
        window = self._windows.get(layer)
        return self._stores[window].append(layer, places.of[window], *rows)

    def read(self, layer: int, places: GroupPlaces) -> Rows:
        """Return what `append` last returned for this layer, which has no window."""
        assert layer not in self._windows, "what a window hides from one layer may be seen by another"
        return self._stores[None].read(layer, places.of[None])

    def state(self, layer: int, sequence: Hashable) -> Any | None:
        """Return the object that `keep_state` kept, or None for a sequence that starts."""
        return self._states[sequence].get(layer, (None, 0))[0]

    def keep_state(self, layer: int, sequence: Hashable, state: Any, *, nbytes: int) -> None:
        """Keep a recurrent mixer's state, which holds `nbytes` bytes, until the next pass."""
        self._states[sequence][layer] = (state, nbytes)

    def release(self, sequence: Hashable) -> None:
        """Give back all that a sequence holds."""
        del self._states[sequence]
        for store in self._stores.values():
            store.release(sequence)

    def check_integrity(self) -> None:
        """Assert what `KVStore` asserts, for every store, and that all of them together keep the limit."""
        for store in self._stores.values():
            store.check_integrity()
            assert store.statistics().num_sequences == len(self._states), "a sequence is in every store"
        for states in self._states.values():
            nbytes = sum(nbytes for _, nbytes in states.values())
            assert nbytes <= self._cost.sequence_nbytes, f"a sequence keeps states of {nbytes} bytes"
        assert len(self._states) * self._cost.sequence_nbytes <= self._besides
        assert self._besides + sum(store.nbytes for store in self._stores.values()) <= self._limit

    def statistics(self) -> KVStatistics:
        """Return a snapshot; blocks are those of all stores together."""
        every = [store.statistics() for store in self._stores.values()]
        return KVStatistics(
            nbytes=sum(one.nbytes for one in every) + len(self._states) * self._cost.sequence_nbytes,
            peak_nbytes=self._peak,
            num_sequences=len(self._states),
            num_blocks=sum(one.num_blocks for one in every),
            num_free_blocks=sum(one.num_free_blocks for one in every),
        )

    def close(self) -> None:
        """Give the memory back. Sequences may still be released; nothing else works any more."""
        self._closed = True
        for store in self._stores.values():
            store.close()


def open_kv(
    *,
    limit_nbytes: int,
    cost: KVCost,
    windows: Mapping[int, int],
    device: torch.device | str = "cpu",
    kv_dtype: str = "auto",
) -> KVStore | KVGroups:
    """Return the store for layers of which some have windows, or none."""
    if not windows:
        return KVStore(limit_nbytes=limit_nbytes, cost=cost, device=device, kv_dtype=kv_dtype)
    return KVGroups(limit_nbytes=limit_nbytes, cost=cost, windows=windows, device=device, kv_dtype=kv_dtype)
