"""Blocks of tokens: what sequences cost in them, and which are free. No memory, only numbers.

A block is room for a fixed number of tokens in every layer; the same number names it in all layers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from penstock.errors import BudgetError
from penstock.io.reader import ALIGNMENT

__all__ = ["BLOCK_TOKENS", "BlockAllocator", "KVCost", "is_nearly"]

BLOCK_TOKENS = 16
"""Tokens in a block: few enough that the last one of a sequence wastes little, and a multiple of 16 keeps every
layer's part of the pool at an address that vector loads like."""

SPARE = 16
"""To leave too much for sequences that end early costs this part of the blocks; too little, most of the gain."""


def is_nearly(there: int, wanted: int) -> bool:
    """Say whether there is so little less than wanted that memory need not be divided anew."""
    return 32 * there >= 31 * wanted


@dataclass(frozen=True, slots=True)
class KVCost:
    """What one sequence costs: bytes for each token it may reach, in whole blocks, and bytes whatever its length.

    Of `token_nbytes`, each (window, bytes) of `windows` is what layers keep that see only so many tokens: their blocks
    are filled again from the first on. All layers of one window share blocks, and so do those without. `layers` are the
    parts of `token_nbytes` by layer, where they are known.
    """

    token_nbytes: int
    sequence_nbytes: int = 0
    block_tokens: int = 1
    windows: tuple[tuple[int, int], ...] = ()
    layers: tuple[int, ...] = ()

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block in all layers together."""
        return self.token_nbytes * self.block_tokens

    @property
    def window(self) -> int | None:
        """The window of all layers that keep anything, where they have the same one."""
        return next((window for window, nbytes in self.windows if nbytes == self.token_nbytes), None)

    @property
    def in_host(self) -> KVCost:
        """What a sequence costs beside the device, where every layer keeps all tokens."""
        return KVCost(self.token_nbytes, 0, self.block_tokens)

    @property
    def on_disk(self) -> KVCost:
        """The same on a disk, where a layer's part of a block is whole pages; tokens share what that leaves over."""
        padded = sum(map(self.stride_of, self.layers or (self.token_nbytes,)))
        return KVCost(padded // self.block_tokens, 0, self.block_tokens)

    @property
    def stride_nbytes(self) -> int:
        """Bytes of a block on a disk in the layer that keeps most."""
        return max(map(self.stride_of, self.layers or (self.token_nbytes,)))

    def stride_of(self, token_nbytes: int) -> int:
        """Bytes of a block on a disk in a layer that keeps `token_nbytes` of a token."""
        return -(-token_nbytes * self.block_tokens // ALIGNMENT) * ALIGNMENT

    def parts(self) -> dict[int | None, KVCost]:
        """Return what the layers of each window keep, those without one first, as costs without anything besides."""
        full = self.token_nbytes - sum(nbytes for _, nbytes in self.windows)
        parts: dict[int | None, KVCost] = {None: KVCost(full, 0, self.block_tokens)} if full or not self.windows else {}
        return parts | {
            window: KVCost(nbytes, 0, self.block_tokens, ((window, nbytes),)) for window, nbytes in self.windows
        }

    def blocks_of(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take, where all layers share them."""
        blocks = -(-num_tokens // self.block_tokens)
        if not self.windows:
            return blocks
        assert self.window is not None, "layers of different windows have blocks of their own"
        return min(blocks, -(-(self.window - 1) // self.block_tokens) + 1)

    def of(self, num_tokens: int) -> int:
        """Bytes that a sequence of `num_tokens` tokens needs."""
        if not self.windows:
            return self.sequence_nbytes + self.block_nbytes * self.blocks_of(num_tokens)
        blocks = (part.block_nbytes * part.blocks_of(num_tokens) for part in self.parts().values())
        return self.sequence_nbytes + sum(blocks)

    def seen_nbytes(self, num_tokens: int) -> int:
        """Bytes that attention of one new token reads, which sees `num_tokens` tokens with itself."""
        beyond = sum(nbytes * max(num_tokens - window, 0) for window, nbytes in self.windows)
        return self.token_nbytes * num_tokens - beyond

    def check(self, nbytes: int, num_tokens: int, what: str) -> None:
        """Raise BudgetError, naming `what`, when a sequence of `num_tokens` tokens needs more than `nbytes` bytes."""
        if self.of(num_tokens) > nbytes:
            raise BudgetError(
                f"no room for the keys and values of {what} ({num_tokens} tokens)",
                wanted=f"{self.of(num_tokens)} bytes",
                got=f"{nbytes} bytes in all",
                fix="Give the device more memory, or ask for fewer tokens.",
            )

    def fitting(self, nbytes: int, lengths: Sequence[int]) -> list[int]:
        """Return those of the lengths that have room in `nbytes` bytes; sequences of others are elsewhere."""
        return [length for length in lengths if self.of(length) <= nbytes]

    def besides(self, nbytes: int, lengths: Sequence[int], *, least: Sequence[int] = (), num_elsewhere: int = 0) -> int:
        """Return how much of `nbytes` bytes is left for what sequences of these lengths need besides their blocks.

        The longest of them that fits at all does; if none does, all that is here is for what they need besides. Where
        they may end sooner, with the `least` lengths, there will be more of them at once, and one part in `SPARE` may
        be left for that. `num_elsewhere` more that have their blocks elsewhere get at most half.
        """
        lengths = self.fitting(nbytes, lengths)
        if not lengths:
            return nbytes if self.sequence_nbytes else 0
        elsewhere = min(num_elsewhere * self.sequence_nbytes, nbytes // 2, nbytes - max(map(self.of, lengths)))
        elsewhere = max(elsewhere, 0)
        return elsewhere + self._besides_here(nbytes - elsewhere, lengths, least)

    def _besides_here(self, nbytes: int, lengths: Sequence[int], least: Sequence[int]) -> int:
        num_sequences = max(self._at_once(nbytes, lengths), 1)
        if least and self.sequence_nbytes:
            more = min(self._at_once(nbytes, least), nbytes // (SPARE * self.sequence_nbytes))
            num_sequences = max(num_sequences, more)
        longest = max(map(self.of, lengths)) - self.sequence_nbytes
        return max(min(num_sequences * self.sequence_nbytes, nbytes - longest), self.sequence_nbytes)

    def divide(self, nbytes: int, lengths: Sequence[int], *, least: Sequence[int] = (), num_elsewhere: int = 0) -> int:
        """Return how many blocks to make of `nbytes` bytes, for sequences of these lengths, as in `besides`."""
        if not self.block_nbytes:
            return 0
        besides = self.besides(nbytes, lengths, least=least, num_elsewhere=num_elsewhere)
        return max((nbytes - besides) // self.block_nbytes, 0)

    def _at_once(self, nbytes: int, lengths: Sequence[int]) -> int:
        """Return how many sequences fit that are as long as these on average."""
        return int(nbytes / (sum(map(self.of, lengths)) / len(lengths)))


class BlockAllocator:
    """Hands out the blocks 0 .. `num_blocks` - 1: as one run where there is one, so that most sequences are one run."""

    def __init__(self, num_blocks: int = 0) -> None:
        self.num_blocks = 0
        self.num_free = 0
        self._starts: list[int] = []  # free runs in order; no two of them touch
        self._ends: list[int] = []
        self.grow(num_blocks)

    def grow(self, num_blocks: int) -> None:
        """Add blocks until there are `num_blocks`."""
        if num_blocks > self.num_blocks:
            self._insert(self.num_blocks, num_blocks)
            self.num_blocks = num_blocks

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Take `count` free blocks, of which there are enough, in the order in which to fill them.

        They come from the smallest run that holds them all, or else from the largest ones. A sequence that grows names
        its last block as `after`, and gets the ones behind it if they are free.
        """
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        taken: list[int] = []
        if after is not None:
            index = bisect_left(self._starts, after + 1)
            if index < len(self._starts) and self._starts[index] == after + 1:
                taken += self._take(index, count)
        while len(taken) < count:
            taken += self._take(self._choose(count - len(taken)), count - len(taken))
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks back, in any order."""
        ordered = sorted(blocks)
        begin = 0
        for place in range(1, len(ordered) + 1):
            if place == len(ordered) or ordered[place] != ordered[place - 1] + 1:
                self._insert(ordered[begin], ordered[place - 1] + 1)
                begin = place

    def free_runs(self) -> tuple[tuple[int, int], ...]:
        """Return the first block of every free run, and the one behind its last."""
        return tuple(zip(self._starts, self._ends, strict=True))

    def _choose(self, count: int) -> int:
        sizes = [end - start for start, end in self.free_runs()]
        fitting = [size for size in sizes if size >= count]
        return sizes.index(min(fitting) if fitting else max(sizes))

    def _take(self, index: int, count: int) -> range:
        start, end = self._starts[index], self._ends[index]
        stop = min(start + count, end)
        if stop == end:
            del self._starts[index], self._ends[index]
        else:
            self._starts[index] = stop
        self.num_free -= stop - start
        return range(start, stop)

    def _insert(self, start: int, end: int) -> None:
        if start == end:
            return
        index = bisect_left(self._starts, start)
        assert index == 0 or self._ends[index - 1] <= start, f"block {start} is free already"
        assert index == len(self._starts) or end <= self._starts[index], f"block {end - 1} is free already"
        self.num_free += end - start
        if index < len(self._starts) and self._starts[index] == end:
            end = self._ends[index]
            del self._starts[index], self._ends[index]
        if index and self._ends[index - 1] == start:
            self._ends[index - 1] = end
        else:
            self._starts.insert(index, start)
            self._ends.insert(index, end)
