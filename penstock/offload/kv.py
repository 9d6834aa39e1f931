"""What sequences remember between passes: keys and values per layer, and the states of recurrent mixers.

A sequence reserves room for all of its tokens before it starts and gives it back when it ends, so a running sequence
can never run out of memory. Rows are kept per (layer, sequence), token-major.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from penstock.errors import BudgetError

__all__ = ["KVCost", "KVStatistics", "KVStore"]


@dataclass(frozen=True, slots=True)
class KVCost:
    """What one sequence costs: bytes for each token it may reach, and bytes whatever its length."""

    token_nbytes: int
    sequence_nbytes: int = 0

    def of(self, num_tokens: int) -> int:
        """Bytes that a sequence of `num_tokens` tokens needs."""
        return self.sequence_nbytes + self.token_nbytes * num_tokens


@dataclass(frozen=True, slots=True)
class KVStatistics:
    """A snapshot: bytes in use, the most that ever were, and running sequences."""

    nbytes: int
    peak_nbytes: int
    num_sequences: int


@dataclass(slots=True)
class _Sequence:
    capacity: int
    reserved: int
    rows: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    filled: dict[int, int] = field(default_factory=dict)
    states: dict[int, tuple[Any, int]] = field(default_factory=dict)


class KVStore:
    """Keeps keys, values and recurrent states of running sequences within `limit_nbytes`.

    `cost` is what admission charges; `limit_nbytes=None` means that the caller does the counting (a rehearsal).
    """

    def __init__(self, *, limit_nbytes: int | None = None, cost: KVCost | None = None) -> None:
        self._limit = limit_nbytes
        self._cost = cost or KVCost(0)
        self._sequences: dict[Hashable, _Sequence] = {}
        self._reserved = 0
        self._peak = 0

    def fits(self, num_tokens: int) -> bool:
        """Say whether a sequence of `num_tokens` tokens can be acquired now."""
        return self._limit is None or self._reserved + self._cost.of(num_tokens) <= self._limit

    def check(self, num_tokens: int, what: str = "a sequence") -> None:
        """Raise BudgetError, naming `what`, when a sequence of `num_tokens` tokens can never be acquired."""
        if self._limit is not None and self._cost.of(num_tokens) > self._limit:
            raise BudgetError(
                f"no room for the keys and values of {what} ({num_tokens} tokens)",
                wanted=f"{self._cost.of(num_tokens)} bytes",
                got=f"{self._limit} bytes in all",
                fix="Give the device more memory, or ask for fewer tokens.",
            )

    def acquire(self, sequence: Hashable, *, num_tokens: int) -> None:
        """Reserve room for a sequence of at most `num_tokens` tokens, for which `fits` has said yes."""
        assert sequence not in self._sequences, f"{sequence!r} is already running"
        assert self.fits(num_tokens), "sequences start only when they fit"
        reserved = self._cost.of(num_tokens)
        self._sequences[sequence] = _Sequence(num_tokens, reserved)
        self._reserved += reserved
        self._peak = max(self._peak, self._reserved)

    def append(self, layer: int, sequence: Hashable, start: int, *rows: Tensor) -> tuple[Tensor, ...]:
        """Store `rows` at token `start` of one layer and return everything so far, new rows included.

        Each tensor of `rows` is [n, ...]; the result is as many views [start + n, ...], valid until the release.
        """
        entry = self._sequences[sequence]
        end = start + rows[0].shape[0]
        assert entry.filled.get(layer, 0) == start, "tokens of a sequence reach a layer in order"
        assert end <= entry.capacity, "a sequence never outgrows what it reserved"
        if layer not in entry.rows:
            entry.rows[layer] = tuple(row.new_empty((entry.capacity, *row.shape[1:])) for row in rows)
        for kept, row in zip(entry.rows[layer], rows, strict=True):
            kept[start:end].copy_(row)
        entry.filled[layer] = end
        return tuple(kept[:end] for kept in entry.rows[layer])

    def read(self, layer: int, sequence: Hashable) -> tuple[Tensor, ...]:
        """Return what `append` last returned for this layer: layers that share another layer's keys use it."""
        entry = self._sequences[sequence]
        return tuple(kept[: entry.filled[layer]] for kept in entry.rows[layer])

    def state(self, layer: int, sequence: Hashable) -> Any | None:
        """Return the object that `keep_state` kept, or None for a sequence that starts."""
        kept = self._sequences[sequence].states.get(layer)
        return None if kept is None else kept[0]

    def keep_state(self, layer: int, sequence: Hashable, state: Any, *, nbytes: int) -> None:
        """Keep a recurrent mixer's state, which holds `nbytes` bytes, until the next pass."""
        self._sequences[sequence].states[layer] = (state, nbytes)

    def release(self, sequence: Hashable) -> None:
        """Give back all that a sequence holds."""
        self._reserved -= self._sequences.pop(sequence).reserved

    def measure(self) -> KVCost:
        """Return what the running sequences really cost, each the same, from what they have stored so far."""
        tokens = states = 0
        for entry in self._sequences.values():
            tokens = max(tokens, sum(kept.numel() * kept.element_size() // kept.shape[0]
                                     for rows in entry.rows.values() for kept in rows))  # fmt: skip
            states = max(states, sum(nbytes for _, nbytes in entry.states.values()))
        return KVCost(tokens, states)

    def check_integrity(self) -> None:
        """Assert that what is reserved is what the running sequences reserved, and that none holds more than that."""
        assert self._reserved == sum(entry.reserved for entry in self._sequences.values())
        assert self._limit is None or self._reserved <= self._limit
        if self._limit is None:
            return
        for entry in self._sequences.values():
            held = sum(kept.numel() * kept.element_size() for rows in entry.rows.values() for kept in rows)
            held += sum(nbytes for _, nbytes in entry.states.values())
            assert held <= entry.reserved, f"a sequence holds {held} bytes and reserved {entry.reserved}"

    def statistics(self) -> KVStatistics:
        """Return a snapshot."""
        return KVStatistics(self._reserved, self._peak, len(self._sequences))
