"""Run sequences to their end: schedule a pass, run it, choose or score tokens, let go of what has finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from penstock.engine.batch import MicroBatch, Span
from penstock.engine.detokenizer import Detokenizer, Tokenizer, find_stop
from penstock.engine.executor import Executor
from penstock.engine.model.build import StreamedModel
from penstock.engine.recorder import PassRecorder
from penstock.engine.report import Progress, Traffic
from penstock.engine.sampler import Sampler, Token, check_finite
from penstock.engine.scheduler import Schedule, Scheduler
from penstock.engine.sequence import Sequence
from penstock.offload.homes import KVHomes
from penstock.offload.tiers import Tier

__all__ = ["Generation"]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What goes into a micro-batch's forward: token ids [T], the tokens `keep` [K] whose logits choose the next ones.

    Of the tokens at `rows` [R], the ones after them, `targets` [R], are scored, each for its owner.
    """

    batch: MicroBatch
    token_ids: Tensor
    keep: Tensor
    rows: Tensor
    targets: Tensor
    owners: list[Sequence]

    @property
    def only_decodes(self) -> bool:
        """Whether these are the next tokens of some sequences and nothing else."""
        return not self.owners and len(self.keep) == len(self.batch.spans) == self.batch.num_tokens


class Generation:
    """One run over some sequences.

    Those of a list are all queued, or refused, at once; any other iterable is read when there is room for the next.
    `score_rows` is how many rows of logits are in memory at once while tokens are scored. Passes of at most
    `packed_tokens` tokens read packed weights; `read_packed` is told so before each pass. Passes that only decode go to
    the `recorder`, if there is one, first. `on_pass` is called after each pass, when its finished sequences have been
    taken; what it raises ends the run.
    """

    def __init__(
        self,
        sequences: Iterable[Sequence],
        *,
        model: StreamedModel,
        executor: Executor,
        homes: KVHomes,
        scheduler: Scheduler,
        sampler: Sampler,
        tokenizer: Tokenizer | None,
        end_ids: Collection[int],
        max_scores: int,
        score_rows: int,
        packed_tokens: int = 0,
        read_packed: Callable[[bool], None] | None = None,
        recorder: PassRecorder | None = None,
        on_pass: Callable[[Progress], None] | None = None,
        traffic: Callable[[], Traffic],
    ) -> None:
        self._model = model
        self._executor = executor
        self._homes = homes
        self._scheduler = scheduler
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._max_scores = max_scores
        self._score_rows = score_rows
        self._packed_tokens = packed_tokens
        self._read_packed = read_packed
        self._recorder = recorder
        self._on_pass = on_pass
        self._traffic = traffic
        self._texts: dict[int, Detokenizer] = {}
        self.num_requests = 0
        self.num_passes = 0
        self.num_recorded = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.recomputed_tokens = 0
        self.peak_sequences = 0
        self.peak_hosted = 0
        self.peak_on_nvme = 0
        self.first_token_seconds = 0.0
        self._expected_tokens = 0
        if isinstance(sequences, list):
            for sequence in sequences:
                scheduler.add(self._counted(sequence))
        else:
            scheduler.feed(map(self._counted, sequences))

    def _counted(self, sequence: Sequence) -> Sequence:
        self.num_requests += 1
        self._expected_tokens += sequence.capacity - len(sequence.prompt_ids)
        return sequence

    def run(self) -> Generator[Sequence, None, None]:
        """Yield each sequence when it has finished, whatever the order. Closing it gives back what the others hold."""
        start = time.perf_counter()
        finished = 0
        try:
            while (schedule := self._scheduler.schedule()).micro_batches:
                self._count(self._scheduler.running)
                done = [sequence for sequence in self._run(schedule) if sequence.finish_reason]
                finished += len(done)
                if self.generated_tokens and not self.first_token_seconds:
                    self.first_token_seconds = time.perf_counter() - start
                for sequence in done:
                    self._scheduler.finish(sequence)
                yield from done
                if self._on_pass:
                    self._on_pass(self._progress(schedule, finished, time.perf_counter() - start))
        finally:
            self._scheduler.abort()

    def _count(self, running: Collection[Sequence]) -> None:
        homes = [self._homes.home_of(sequence.number) for sequence in running]
        self.peak_sequences = max(self.peak_sequences, len(running))
        self.peak_hosted = max(self.peak_hosted, homes.count(Tier.HOST))
        self.peak_on_nvme = max(self.peak_on_nvme, homes.count(Tier.NVME))

    def _run(self, schedule: Schedule) -> list[Sequence]:
        """Run one pass; return the sequences that got a token, or the last of their scores."""
        scores: list[tuple[list[Sequence], Tensor]] = []
        packed = schedule.num_tokens <= self._packed_tokens
        if self._read_packed is not None:
            self._read_packed(packed)
        inputs = [self._inputs(spans, reads_packed=packed) for spans in schedule.micro_batches]
        logits = self._run_pass(inputs, scores)
        self.num_passes += 1
        self._homes.check_integrity()
        self._count_tokens(schedule)
        whole = self._scheduler.computed(schedule)
        ready = [sequence for sequence in whole if not sequence.targets]
        self._take_scores(scores)
        for sequence in whole:
            if sequence.targets:
                sequence.finish_reason = "scored"
        if ready:
            made = [rows for rows in logits if rows.shape[0]]
            rows = made[0] if len(made) == 1 else torch.cat(made)
            with torch.inference_mode():
                tokens = self._sampler.sample(rows, ready)
            for sequence, token in zip(ready, tokens, strict=True):
                self._append(sequence, token)
            self.generated_tokens += len(ready)
        return whole

    def _count_tokens(self, schedule: Schedule) -> None:
        """Add up prompt tokens, and tokens that have gone through the model before."""
        for span in chain.from_iterable(schedule.micro_batches):
            sequence = self._scheduler[span.sequence]
            first = min(max(sequence.num_repeated, span.start), span.end)
            self.recomputed_tokens += first - span.start
            self.prompt_tokens += max(min(span.end, len(sequence.prompt_ids)) - first, 0)

    @property
    def num_preemptions(self) -> int:
        """How often a sequence gave its memory to an older one."""
        return self._scheduler.num_preemptions

    def _run_pass(self, inputs: list[_Inputs], scores: list[tuple[list[Sequence], Tensor]]) -> list[Tensor]:
        """Return the logits of each micro-batch; add to `scores` whose tokens have been scored, and how."""
        if self._recorder is not None and len(inputs) == 1 and inputs[0].only_decodes:
            logits = self._recorder.run(inputs[0].batch, inputs[0].token_ids)
            if logits is not None:
                self.num_recorded += 1
                return [logits]
        return self._executor.run_pass([(one.batch, partial(self._forward, one, scores)) for one in inputs])

    def _inputs(self, spans: tuple[Span, ...], *, reads_packed: bool) -> _Inputs:
        """Return the micro-batch of some spans, and its tokens on the device."""
        batch = MicroBatch(spans, self._homes.store_of(spans[0].sequence), self._max_scores, reads_packed)
        tokens: list[int] = []
        keep: list[int] = []
        rows: list[int] = []
        targets: list[int] = []
        owners: list[Sequence] = []
        for span in spans:
            sequence = self._scheduler[span.sequence]
            begin = len(tokens) - span.start
            tokens += sequence.tokens(span.start, span.end)
            if sequence.targets:
                first = max(span.start, sequence.first_scored)
                rows += range(begin + first, begin + span.end)
                targets += sequence.targets[first - sequence.first_scored : max(span.end - sequence.first_scored, 0)]
                owners += [sequence] * (span.end - first)
            elif span.end == sequence.num_tokens:
                keep.append(len(tokens) - 1)
        token_ids, keep_ids, row_ids, target_ids = map(self._to_device, (tokens, keep, rows, targets))
        return _Inputs(batch, token_ids, keep_ids, row_ids, target_ids, owners)

    def _forward(self, one: _Inputs, scores: list[tuple[list[Sequence], Tensor]]) -> Tensor:
        """Run a micro-batch's forward, inside a pass; return its logits."""
        if not one.owners:
            return self._model.forward(one.batch, one.token_ids, one.keep)
        logits, scored = self._model.score(
            one.batch, one.token_ids, one.keep, one.rows, one.targets, rows_at_once=self._score_rows
        )
        scores.append((one.owners, scored))
        return logits

    def _to_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._model.device)

    def _take_scores(self, scores: list[tuple[list[Sequence], Tensor]]) -> None:
        for owners, scored in scores:
            check_finite(scored)
            for sequence, (logprob, rank) in zip(owners, scored.tolist(), strict=True):
                sequence.scores.append((logprob, int(rank)))

    def _append(self, sequence: Sequence, token: Token) -> None:
        sequence.output_ids.append(token.id)
        if token.logprobs is not None and token.logprob is not None:
            sequence.logprobs.append(token.logprobs)
            sequence.cumulative_logprob += token.logprob
        if token.id in self._end_ids and not sequence.params.ignore_eos:
            sequence.finish_reason, sequence.stop_reason = "stop", None
        elif sequence.num_tokens >= sequence.capacity:
            sequence.finish_reason = "length"
        if self._tokenizer is not None:
            self._grow_text(sequence, token, self._tokenizer)

    def _grow_text(self, sequence: Sequence, token: Token, tokenizer: Tokenizer) -> None:
        text = self._texts.get(sequence.number)
        if text is None:
            text = self._texts[sequence.number] = Detokenizer(tokenizer, sequence.prompt_ids)
        known = len(text.text)
        text.append(token.id)
        sequence.text = text.finish() if sequence.finish_reason else text.text
        if stop := find_stop(text.text, len(text.text) - known, sequence.params.stop):
            place, sequence.stop_reason = stop
            sequence.text = text.text[:place]
            sequence.finish_reason = "stop"
        if sequence.finish_reason:
            del self._texts[sequence.number]

    def _progress(self, schedule: Schedule, finished: int, seconds: float) -> Progress:
        return Progress(
            num_requests=self.num_requests,
            num_finished=finished,
            num_running=len(self._scheduler.running),
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            expected_tokens=self._expected_tokens,
            num_preemptions=self.num_preemptions,
            recomputed_tokens=self.recomputed_tokens,
            seconds=seconds,
            schedule=schedule,
            traffic=self._traffic(),
        )
