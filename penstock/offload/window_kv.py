"""What layers with a sliding window remember: a few blocks per sequence, filled again from the first on.

A sequence has so many blocks that one new token always finds its window in them. Several new tokens at once may be more
than fits, so they are not read from the blocks: their own rows follow the older ones, which are copied out first, and
only the last of them are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.offload.kv import KVStore, Places, Rows, Tokens
from penstock.offload.kv_rows import CodedRows, encode

__all__ = ["WindowKV"]


@dataclass(frozen=True, slots=True)
class _WindowPlaces(Places):
    """Of several new tokens, only the last are stored: `slots` has no others, and `stored` [len(slots)] names them.

    `seen` is where the tokens in the blocks are that the new ones see: of one new token, with itself; else without the
    new ones. `stored` is None where all are stored.
    """

    seen: Places
    stored: Tensor | None

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """None: blocks come again, and not all tokens are stored."""
        return ()


@dataclass(frozen=True, slots=True)
class _WindowRows(Rows):
    """`together` has what several new tokens of a sequence see, themselves included, by the sequence's index.

    These are as they are stored: made whole again, where they have been quantised.
    """

    together: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def of(self, index: int, heads: slice = slice(None)) -> tuple[Tensor, ...]:
        """Return the last tokens of one sequence, [L, H, ...] each: all that the new ones see, or a few more."""
        if index in self.together:
            made = tuple(rows[:, heads] for rows in self.together[index])
            return made if self.shared_size is None else (made[0], made[0][..., : self.shared_size])
        return self._in_blocks().of(index, heads)

    def copy_nbytes(self, index: int) -> int:
        """Bytes that `of` copies."""
        return 0 if index in self.together else self._in_blocks().copy_nbytes(index)

    def _in_blocks(self) -> Rows:
        assert isinstance(self.places, _WindowPlaces)
        return Rows(**(_fields(self, Rows) | {"places": self.places.seen}))


class WindowKV(KVStore):
    """A store for layers that all have the window of its cost. Layers that read another one's keys cannot be in it."""

    def locate(self, spans: Sequence[Tokens]) -> Places:
        """Say where the new tokens of a micro-batch go, as the whole store does."""
        places = super().locate(spans)
        size, window = self._cost.block_tokens, self._cost.window
        assert window is not None
        firsts, seen, stored = [], [], []
        for span, offset in zip(spans, places.offsets, strict=False):
            several = span.end - span.start > 1
            first = max(span.start - window + 1, 0) // size
            firsts.append(first)
            seen.append((span.start if several else span.end) - first * size)
            num_blocks = len(self._sequences[span.sequence].blocks)
            kept = max(((span.end - 1) // size - num_blocks + 1) * size, span.start)
            stored.append(np.arange(offset + kept - span.start, offset + span.end - span.start))
        table = np.zeros((len(spans), max(-(-max(seen) // size), 1)), np.int32)
        for row, span, first in zip(table, spans, firsts, strict=True):
            blocks = self._sequences[span.sequence].blocks
            row[:] = blocks[np.arange(first, first + len(row)) % len(blocks)]
        numbers = np.concatenate(stored)
        names = None if len(numbers) == places.offsets[-1] else self._put(numbers)
        inside = replace(places, table=self._put(table), ends=tuple(seen), firsts=(None,) * len(spans))
        known = _fields(places, Places)
        if names is not None:
            known["slots"] = places.slots.index_select(0, names)
        return _WindowPlaces(**known, seen=inside, stored=names)

    def _put(self, numbers: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
        """Put numbers on the device; nobody waits for it."""
        made = torch.from_numpy(numbers)
        staging = torch.empty(made.shape, dtype=made.dtype, pin_memory=self._device.type == "cuda")
        return staging.copy_(made).to(self._device, non_blocking=True)

    def append(self, layer: int, places: Places, *rows: Tensor) -> Rows:
        """Store one layer's new rows of a micro-batch, as far as later ones see them, and return what these see."""
        return self.put(layer, places, tuple(encode(row, self._kv_dtype) for row in rows))

    def put(self, layer: int, places: Places, rows: Sequence[CodedRows]) -> Rows:
        """Store one layer's new rows of a micro-batch as far as later ones see them."""
        assert isinstance(places, _WindowPlaces)
        together = {}
        whole = [row.whole() for row in rows] if len(places.ends) > places.singles.count else []
        for index, (begin, end) in enumerate(zip(places.offsets, places.offsets[1:], strict=False)):
            if end - begin > 1:
                new = tuple(row[begin:end] for row in whole)
                together[index] = self._after_old(layer, places.seen, index, new) if places.seen.ends[index] else new
        kept_rows = rows if places.stored is None else [row.select(places.stored) for row in rows]
        kept = super().put(layer, places, kept_rows)
        return _WindowRows(**_fields(kept, Rows) | {"new": tuple(rows)}, together=together)

    def _after_old(self, layer: int, seen: Places, index: int, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        old = self.read(layer, seen).of(index)
        return tuple(torch.cat(pair) for pair in zip(old, new, strict=True))


def _fields(value: Any, kind: type[Any]) -> dict[str, Any]:
    """Return the fields that a value has as one of this kind."""
    return {one.name: getattr(value, one.name) for one in fields(kind)}
