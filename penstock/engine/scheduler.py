"""Which tokens go through the model in the next pass.

Every pass carries the newest token of each running sequence, and as many prompt tokens as the pass has room for.
Requests start in order, as soon as keys and values have room for all of their tokens. So none waits for ever: what runs
ends and gives its room back, and nothing overtakes the head of the queue, even where something smaller would fit.

Micro-batches are of one home of keys and values each. Those of sequences at home in host RAM come first, so that
attention there has the longest time; single tokens and prompts of them apart, because prompts need not wait for it.

Only the head is looked at. What waits behind it may still be in an iterator, unread; it costs a pass nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from penstock.engine.batch import Span
from penstock.engine.sequence import Sequence
from penstock.errors import BudgetError, RequestError
from penstock.offload.tiers import Tier

__all__ = ["Room", "Schedule", "Scheduler"]


class Room(Protocol):
    """Where sequences reserve memory."""

    def prepare(self, lengths: Items[int]) -> None:
        """Arrange the memory for sequences of so many tokens; called while none is running."""

    def fits(self, num_tokens: int) -> bool:
        """Say whether a sequence of so many tokens can start now."""

    def check(self, num_tokens: int, what: str) -> None:
        """Raise BudgetError, naming `what`, when a sequence of so many tokens can never start."""

    def acquire(self, sequence: Hashable, *, num_tokens: int) -> None:
        """Reserve memory for a sequence."""

    def home_of(self, sequence: Hashable) -> Tier:
        """Say where the memory of a sequence is: on the device or in host RAM."""

    def release(self, sequence: Hashable) -> None:
        """Give it back."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One pass: micro-batches of spans, in the order in which they run in every layer."""

    micro_batches: tuple[tuple[Span, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in the pass."""
        return sum(span.length for spans in self.micro_batches for span in spans)


class Scheduler:
    """Keeps waiting and running sequences. `splits_prompts` False keeps each prompt in one span."""

    def __init__(self, room: Room, *, micro_batch_tokens: int, pass_tokens: int, splits_prompts: bool) -> None:
        self._room = room
        self._micro_batch_tokens = micro_batch_tokens
        self._pass_tokens = pass_tokens
        self._splits_prompts = splits_prompts
        self._waiting: deque[Sequence] = deque()
        self._source: Iterator[Sequence] = iter(())
        self._running: dict[Hashable, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises BudgetError when it could never run."""
        self.check(sequence)
        self._waiting.append(sequence)

    def feed(self, source: Iterator[Sequence]) -> None:
        """Take sequences from `source` when the queue is empty, one at a time and no sooner than they are needed.

        What `source` raises, and BudgetError for what could never run, comes out of `schedule`.
        """
        self._source = source

    def check(self, sequence: Sequence) -> None:
        """Raise BudgetError when a sequence could never run."""
        if not self._splits_prompts and len(sequence.prompt_ids) > self._micro_batch_tokens:
            raise BudgetError(
                f"prompt {sequence.number} does not fit one micro-batch, and this model cannot take prompts in parts",
                wanted=f"at most {self._micro_batch_tokens} tokens",
                got=f"{len(sequence.prompt_ids)} tokens",
                fix="Give the device more memory or raise the micro-batch tokens.",
            )
        self._room.check(sequence.capacity, f"prompt {sequence.number} and its new tokens")

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that have started and not finished."""
        return tuple(self._running.values())

    def __getitem__(self, number: Hashable) -> Sequence:
        return self._running[number]

    def schedule(self) -> Schedule:
        """Choose the next pass; an empty one when nothing is left."""
        packer = _Packers(self._room, self._micro_batch_tokens, splits=self._splits_prompts)
        for sequence in self._running.values():
            if sequence.num_tokens - sequence.num_computed == 1:
                packer.add(Span(sequence.number, sequence.num_computed, 1))
        for sequence in self._running.values():
            if sequence.num_tokens - sequence.num_computed > 1:
                self._prefill(sequence, packer)
        if not self._running and self._head() is not None:
            self._room.prepare([sequence.capacity for sequence in self._waiting])
        while (head := self._head()) is not None and self._room_for(head, packer):
            self._waiting.popleft()
            if head.number in self._running:
                raise RequestError("two requests have one number", got=head.number, fix="Number them apart.")
            self._room.acquire(head.number, num_tokens=head.capacity)
            self._running[head.number] = head
            self._prefill(head, packer)
        return Schedule(packer.finish())

    def _head(self) -> Sequence | None:
        if not self._waiting and (sequence := next(self._source, None)) is not None:
            self.add(sequence)
        return self._waiting[0] if self._waiting else None

    def _room_for(self, sequence: Sequence, packer: _Packers) -> bool:
        needed = 1 if self._splits_prompts else len(sequence.prompt_ids)
        has_tokens = packer.num_tokens + needed <= self._pass_tokens or packer.num_tokens == 0
        return has_tokens and self._room.fits(sequence.capacity)

    def _prefill(self, sequence: Sequence, packer: _Packers) -> None:
        length = sequence.num_tokens - sequence.num_computed
        if self._splits_prompts:
            length = min(length, max(self._pass_tokens - packer.num_tokens, 0))
        if length:
            packer.add(Span(sequence.number, sequence.num_computed, length))

    def computed(self, schedule: Schedule) -> list[Sequence]:
        """Note that a pass has run. Return the sequences that now need a next token, in the order of their spans."""
        ready = []
        for spans in schedule.micro_batches:
            for span in spans:
                sequence = self._running[span.sequence]
                sequence.num_computed = span.end
                if span.end == sequence.num_tokens:
                    ready.append(sequence)
        return ready

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out and give back what it holds."""
        del self._running[sequence.number]
        self._room.release(sequence.number)

    def abort(self) -> None:
        """Take all sequences out."""
        for sequence in self.running:
            self.finish(sequence)
        self._waiting.clear()
        self._source = iter(())


class _Packers:
    """Sorts spans into micro-batches of their kind."""

    def __init__(self, room: Room, micro_batch_tokens: int, *, splits: bool) -> None:
        self._room = room
        self._packers = {kind: _Packer(micro_batch_tokens, splits=splits) for kind in ("hosted", "hosted prompts", "")}

    @property
    def num_tokens(self) -> int:
        return sum(packer.num_tokens for packer in self._packers.values())

    def add(self, span: Span) -> None:
        kind = ""
        if self._room.home_of(span.sequence) is Tier.HOST:
            kind = "hosted" if span.length == 1 else "hosted prompts"
        self._packers[kind].add(span)

    def finish(self) -> tuple[tuple[Span, ...], ...]:
        return tuple(spans for packer in self._packers.values() for spans in packer.finish())


class _Packer:
    """Fills micro-batches in order, without padding."""

    def __init__(self, micro_batch_tokens: int, *, splits: bool) -> None:
        self._limit = micro_batch_tokens
        self._splits = splits
        self._full: list[tuple[Span, ...]] = []
        self._open: list[Span] = []
        self._open_tokens = 0
        self.num_tokens = 0

    def add(self, span: Span) -> None:
        self.num_tokens += span.length
        while span.length:
            free = self._limit - self._open_tokens
            if free <= 0 or (span.length > free and not self._splits and self._open):
                self._close()
                continue
            length = min(span.length, free) if self._splits else span.length
            self._open.append(Span(span.sequence, span.start, length))
            self._open_tokens += length
            span = Span(span.sequence, span.start + length, span.length - length)

    def _close(self) -> None:
        self._full.append(tuple(self._open))
        self._open = []
        self._open_tokens = 0

    def finish(self) -> tuple[tuple[Span, ...], ...]:
        if self._open:
            self._close()
        return tuple(self._full)
