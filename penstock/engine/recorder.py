"""Decode passes of a model that is wholly on a GPU, recorded and played again: the GPU sets their pace, not Python.

A pass of few tokens takes the GPU less time than it takes Python to issue it: layer by layer, 0.9 ms where the weights
are read in 0.3. Where no layer moves, nothing differs between two such passes but numbers that are on the device, so
its calls are recorded in a CUDA graph whose inputs are tensors that stay, and later passes only fill these.

A recording serves passes of about as many sequences of about that length: both are rounded up, and the last sequence
stands in for those that lack, with the same token in the same place. What is recorded knows no length as a Python
number. A model whose forward asks for one (attention without a kernel for blocks, recurrent states), or waits for the
device, is not recorded; the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from penstock.engine.batch import MicroBatch, Span
from penstock.engine.executor import Executor
from penstock.engine.model.build import StreamedModel
from penstock.offload.blocks import BLOCK_TOKENS
from penstock.offload.kv import KVStore, Places, Singles
from penstock.offload.plan import Plan
from penstock.offload.source import AllThere

__all__ = ["PassRecorder"]

MAX_RECORDINGS = 8

Issue = Callable[[], Tensor]

logger = logging.getLogger("penstock.engine")


class PassRecorder:
    """Runs passes over one new token of each of some sequences, those for which `plan` has recordings.

    `record` makes them. The first pass of a kind is run as it will be recorded, which makes the code that it needs; the
    second one is recorded.
    """

    def __init__(
        self, model: StreamedModel, executor: Executor, plan: Plan, *, record: Callable[[Issue], Issue]
    ) -> None:
        self._model = model
        self._executor = executor
        self._plan = plan
        self._record = record
        self._recordings: dict[tuple[int, int, object], _Recording] = {}
        self._logits: Tensor | None = None  # of all recordings: one for each would be memory that nobody has planned
        self._is_refused = False
        self.num_replayed = 0

    def run(self, batch: MicroBatch, token_ids: Tensor) -> Tensor | None:
        """Run a pass over the next tokens [N] of N sequences; return logits [N, vocab], valid until the next pass.

        None where it must be run like any other: what it has stored by then, that stores again.
        """
        if self._is_refused or type(batch.kv) is not KVStore:
            return None
        places = batch.places
        size = self._plan.recording(batch.num_tokens, places.singles.max_length)
        if size is None:
            return None
        key = (*size, batch.kv.pool)
        recording = self._recordings.get(key)
        try:
            if recording is None:
                recording = self._recordings[key] = _Recording(self._model, batch, *size)
                while len(self._recordings) > MAX_RECORDINGS:
                    del self._recordings[next(iter(self._recordings))]
            recording.fill(places, token_ids)
            logits = self._run(recording)
        except Exception as error:  # noqa: BLE001 - run like any other, the pass raises again what is not recording's
            self._is_refused = True
            self._recordings.clear()
            logger.info("decode passes are not recorded: %s: %s", type(error).__name__, error)
            return None
        return logits[: batch.num_tokens]

    def _run(self, recording: _Recording) -> Tensor:
        weights = self._executor.weights
        assert weights is not None
        if not recording.has_run:
            recording.has_run = True
            return self._first(recording)
        if recording.replay is None:
            self._executor.weights = AllThere()
            try:
                recording.replay = self._record(partial(self._issue, recording))
            finally:
                self._executor.weights = weights
        self.num_replayed += 1
        last = len(self._model.layers) - 1
        with weights.layer(0):  # which times all layers together
            logits = recording.replay()
        if last:
            with weights.layer(last):
                pass
        return logits

    def _first(self, recording: _Recording) -> Tensor:
        """Run a pass as any other; see to it that there is room for its logits."""
        logits = recording.issue(self._executor)
        if self._logits is None or len(self._logits) < len(logits):
            if self._logits is not None:  # what was recorded writes to memory that goes now
                self._recordings = {key: one for key, one in self._recordings.items() if one is recording}
            self._logits = torch.empty_like(logits)
        return logits

    def _issue(self, recording: _Recording) -> Tensor:
        assert self._logits is not None
        logits = recording.issue(self._executor)
        kept = self._logits[: len(logits)]
        with torch.inference_mode():
            return kept.copy_(logits)


@dataclass(frozen=True)
class _RecordedBatch(MicroBatch):
    """A micro-batch of sequences that have no lengths in Python."""

    recorded: Places | None = None

    @cached_property
    def places(self) -> Places | None:
        """Tensors that every pass fills."""
        return self.recorded


class _AnySingle(Span):
    """One new token: of which sequence, and where, is not known."""

    __slots__ = ()

    def __init__(self) -> None:
        object.__setattr__(self, "length", 1)


class _Recording:
    """The inputs of a pass, and once it is recorded what plays it."""

    def __init__(self, model: StreamedModel, like: MicroBatch, rows: int, max_length: int) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        table, lengths = zeros(rows, -(-max_length // BLOCK_TOKENS), dtype=torch.int32), zeros(rows, dtype=torch.int32)
        slots, positions = zeros(2, rows, dtype=torch.int64)
        self._places = Places(
            slots,
            positions,
            table,
            lengths,
            offsets=tuple(range(rows + 1)),
            ends=(),  # as numbers, they are not known
            firsts=(None,) * rows,
            singles=Singles(rows, table, lengths, max_length=max_length),
        )
        self._token_ids = zeros(rows, dtype=torch.int64)
        batch = _RecordedBatch((_AnySingle(),) * rows, like.kv, like.max_scores, like.reads_packed, self._places)
        keep = torch.arange(rows, device=model.device)
        self._batch = batch
        self._forward = partial(model.forward, batch, self._token_ids, keep)
        self.has_run = False
        self.replay: Issue | None = None

    def fill(self, places: Places, token_ids: Tensor) -> None:
        """Put a pass's numbers where the recording reads them."""
        own = self._places
        _fill(self._token_ids, token_ids)
        _fill(own.slots, places.slots)
        _fill(own.positions, places.positions)
        _fill(own.lengths, places.lengths)
        _fill(own.table[:, : places.table.shape[1]], places.table)

    def issue(self, executor: Executor) -> Tensor:
        """Run the pass as any other."""
        (logits,) = executor.run_pass([(self._batch, self._forward)])
        return logits


def _fill(whole: Tensor, given: Tensor) -> None:
    """Copy rows; the last one stands in for those that lack."""
    count = given.shape[0]
    whole[:count] = given
    if count < whole.shape[0]:
        whole[count:] = given[-1]
