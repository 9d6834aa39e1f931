"""Which tokens go through the model in the next pass.

Every pass carries the newest token of each running sequence, and as many prompt tokens as the pass has room for.
Requests start in order, as soon as keys and values have room for as many tokens as each is expected to reach; one that
outgrows this gets more. Where there is no more, the sequence that started last is preempted: it gives everything back,
waits at the head of the queue, and then goes through the model again, prompt and new tokens together.

So none waits for ever: the oldest takes what it needs from the younger ones and ends, and nothing overtakes the head of
the queue, even where something smaller would fit.

Micro-batches are of one home of keys and values each. Those of sequences at home on NVMe come first and then those in
host RAM, so that attention there has the longest time; single tokens and prompts of them apart, because prompts need
not wait for it. Single tokens that together see many others are cut into two, which take turns there.

Only the head is looked at. What waits behind it may still be in an iterator, unread; it costs a pass nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate, islice, product
from typing import Protocol

from penstock.engine.batch import Span
from penstock.engine.expectation import Expectation, Outlook
from penstock.engine.sequence import Sequence
from penstock.errors import BudgetError, RequestError
from penstock.offload.tiers import Tier

__all__ = ["Room", "Schedule", "Scheduler"]

MANY = 1024
"""Memory is arranged for so many of those that wait: enough for a mean, and no more work for a longer queue."""


_HOMES = (Tier.NVME, Tier.HOST, Tier.DEVICE)
"""In the order in which their micro-batches run."""


class Room(Protocol):
    """Where sequences reserve memory."""

    def prepare(self, lengths: Items[int], *, least: Items[int]) -> None:
        """Arrange the memory for sequences of so many tokens at most, and at least; called while none is running."""

    def fits(self, num_tokens: int, *, most: int) -> bool:
        """Say whether a sequence of so many tokens can start now, where it may later reach `most`."""

    def check(self, num_tokens: int, what: str) -> None:
        """Raise BudgetError, naming `what`, when a sequence of so many tokens can never start."""

    def acquire(self, sequence: Hashable, *, num_tokens: int, most: int) -> None:
        """Reserve memory for a sequence of so many tokens, which may later reach `most`."""

    def extend(self, sequence: Hashable, *, num_tokens: int) -> bool:
        """Reserve more for a running sequence: so many tokens in all. False, and no more, if there is too little."""

    def home_of(self, sequence: Hashable) -> Tier:
        """Say where the memory of a sequence is: on the device, in host RAM or on NVMe."""

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
    """Keeps waiting and running sequences. `splits_prompts` False keeps each prompt in one span.

    Of one home beside the device, single tokens that see `split_tokens` tokens in all make two micro-batches, not one.
    `num_preemptions` counts how often one had to go back to the queue.
    """

    def __init__(
        self,
        room: Room,
        *,
        micro_batch_tokens: int,
        pass_tokens: int,
        splits_prompts: bool,
        split_tokens: int | None = None,
    ) -> None:
        self._room = room
        self._micro_batch_tokens = micro_batch_tokens
        self._pass_tokens = pass_tokens
        self._splits_prompts = splits_prompts
        self._split_tokens = split_tokens
        self._waiting: deque[Sequence] = deque()
        self._source: Iterator[Sequence] = iter(())
        self._running: dict[Hashable, Sequence] = {}  # in the order in which they came
        self._expectation = Expectation()
        self.num_preemptions = 0

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
        self._grow()
        packer = _Packers(self._room, self._micro_batch_tokens, splits=self._splits_prompts)
        longer = []
        for sequence in self._running.values():
            if sequence.num_tokens - sequence.num_computed == 1:
                packer.add(Span(sequence.number, sequence.num_computed, 1))
            else:
                longer.append(sequence)
        for sequence in longer:
            self._prefill(sequence, packer)
        self._start(packer)
        return Schedule(packer.finish(self._split_tokens))

    def _grow(self) -> None:
        """See to it that every running sequence has room for its newest token; the oldest comes first."""
        short = [sequence for sequence in self._running.values() if sequence.num_tokens > sequence.num_reserved]
        if not short:
            return
        outlook = self._outlook()
        for sequence in short:
            while sequence.number in self._running and not self._extend(sequence, outlook):
                self._preempt(self._youngest(self._room.home_of(sequence.number)))

    def _youngest(self, home: Tier) -> Sequence:
        """Return the last one to start of those that can give way, in the home where there is too little."""
        running = reversed(self._running.values())
        return next(one for one in running if self._can_restart(one) and self._room.home_of(one.number) is home)

    def _extend(self, sequence: Sequence, outlook: Outlook) -> bool:
        """Give a sequence what it is expected to need from here, or else room for its newest token."""
        for num_tokens in (self._expected(sequence, outlook), sequence.num_tokens):
            if self._room.extend(sequence.number, num_tokens=num_tokens):
                sequence.num_reserved = num_tokens
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self._let_go(sequence)
        sequence.restart()
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _can_restart(self, sequence: Sequence) -> bool:
        """Whether a sequence could come back whatever it has reached: as a prompt, it may have to stay whole."""
        return self._splits_prompts or sequence.capacity <= self._micro_batch_tokens

    def _outlook(self) -> Outlook:
        running = (one for one in self._running.values() if not one.has_known_length)
        return self._expectation.given((len(one.output_ids), one.most_new) for one in running)

    def _expected(self, sequence: Sequence, outlook: Outlook) -> int:
        """Return the tokens that a sequence is expected to reach, or will."""
        if sequence.has_known_length or not self._can_restart(sequence):
            return sequence.capacity
        return len(sequence.prompt_ids) + outlook.tokens(len(sequence.output_ids), most=sequence.most_new)

    def _start(self, packer: _Packers) -> None:
        """Start as many sequences as there is room for, in order."""
        if self._head() is None:
            return
        if not self._running:
            next_ones = list(islice(self._waiting, MANY))
            least = [one.capacity if one.has_known_length else len(one.prompt_ids) + 1 for one in next_ones]
            self._room.prepare([one.capacity for one in next_ones], least=least)
        outlook = self._outlook()
        while (head := self._head()) is not None and self._has_tokens(head, packer):
            num_tokens = self._expected(head, outlook)
            if not self._room.fits(num_tokens, most=head.capacity):
                return
            self._waiting.popleft()
            if head.number in self._running:
                raise RequestError("two requests have one number", got=head.number, fix="Number them apart.")
            self._room.acquire(head.number, num_tokens=num_tokens, most=head.capacity)
            head.num_reserved = num_tokens
            self._running[head.number] = head
            self._prefill(head, packer)

    def _head(self) -> Sequence | None:
        if not self._waiting and (sequence := next(self._source, None)) is not None:
            self.add(sequence)
        return self._waiting[0] if self._waiting else None

    def _has_tokens(self, sequence: Sequence, packer: _Packers) -> bool:
        needed = 1 if self._splits_prompts else sequence.num_tokens
        return packer.num_tokens + needed <= self._pass_tokens or packer.num_tokens == 0

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
                sequence.num_computed = end = span.end
                if end == sequence.num_tokens:
                    ready.append(sequence)
        return ready

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, give back what it holds, and learn from its length."""
        self._let_go(sequence)
        if not sequence.has_known_length:
            self._expectation.finished(len(sequence.output_ids), most=sequence.most_new)

    def _let_go(self, sequence: Sequence) -> None:
        del self._running[sequence.number]
        self._room.release(sequence.number)

    def abort(self) -> None:
        """Take all sequences out."""
        for sequence in self.running:
            self._let_go(sequence)
        self._waiting.clear()
        self._source = iter(())


class _Packers:
    """Sorts spans into micro-batches of their kind."""

    def __init__(self, room: Room, micro_batch_tokens: int, *, splits: bool) -> None:
        self._room = room
        self._packers = {kind: _Packer(micro_batch_tokens, splits=splits) for kind in product(_HOMES, (True, False))}
        self.num_tokens = 0

    def add(self, span: Span) -> None:
        self.num_tokens += span.length
        home = self._room.home_of(span.sequence)
        self._packers[home, span.length == 1 or home is Tier.DEVICE].add(span)

    def finish(self, split_tokens: int | None) -> tuple[tuple[Span, ...], ...]:
        made: list[tuple[Span, ...]] = []
        for (home, single), packer in self._packers.items():
            batches = packer.finish()
            if len(batches) == 1 and single and home is not Tier.DEVICE and split_tokens is not None:
                batches = _halves(*batches, split_tokens)
            made += batches
        return tuple(made)


def _halves(spans: tuple[Span, ...], least: int) -> tuple[tuple[Span, ...], ...]:
    """Cut spans in two that see about as many tokens, where they see at least so many in all."""
    seen = list(accumulate(span.end for span in spans))
    middle = bisect_left(seen, seen[-1] / 2) + 1
    return (spans,) if seen[-1] < least or middle >= len(spans) else (spans[:middle], spans[middle:])


class _Packer:
    """Fills micro-batches in order, without padding."""

    def __init__(self, micro_batch_tokens: int, *, splits: bool) -> None:
        self._limit = micro_batch_tokens
        self._splits = splits
        self._full: list[tuple[Span, ...]] = []
        self._open: list[Span] = []
        self._open_tokens = 0

    def add(self, span: Span) -> None:
        while span.length:
            free = self._limit - self._open_tokens
            if free <= 0 or (span.length > free and not self._splits and self._open):
                self._close()
                continue
            if span.length <= free or not self._splits:
                self._open.append(span)
                self._open_tokens += span.length
                return
            length = free
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
