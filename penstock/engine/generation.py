"""Run sequences to their end: schedule a pass, run it, choose tokens, let go of what has finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable

import torch
from torch import Tensor

from penstock.engine.batch import MicroBatch, Span
from penstock.engine.detokenizer import Detokenizer, Tokenizer, find_stop
from penstock.engine.executor import Executor
from penstock.engine.model.build import StreamedModel
from penstock.engine.report import Progress, Traffic
from penstock.engine.sampler import Sampler, Token
from penstock.engine.scheduler import Schedule, Scheduler
from penstock.engine.sequence import Sequence
from penstock.offload.kv import KVStore

__all__ = ["Generation"]


class Generation:
    """One run over some sequences."""

    def __init__(
        self,
        sequences: Iterable[Sequence],
        *,
        model: StreamedModel,
        executor: Executor,
        kv: KVStore,
        scheduler: Scheduler,
        sampler: Sampler,
        tokenizer: Tokenizer | None,
        end_ids: Collection[int],
        max_scores: int,
        traffic: Callable[[], Traffic],
        on_pass: Callable[[Progress], None] | None = None,
    ) -> None:
        self._model = model
        self._executor = executor
        self._kv = kv
        self._scheduler = scheduler
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._max_scores = max_scores
        self._on_pass = on_pass
        self._traffic = traffic
        self._texts: dict[int, Detokenizer] = {}
        self.num_requests = 0
        self.num_passes = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.peak_sequences = 0
        self.first_token_seconds = 0.0
        self._expected_tokens = 0
        for sequence in sequences:
            scheduler.add(sequence)
            self.num_requests += 1
            self._expected_tokens += sequence.capacity - len(sequence.prompt_ids)

    def run(self) -> Generator[Sequence, None, None]:
        """Yield each sequence when it has finished, whatever the order. Closing it gives back what the others hold."""
        start = time.perf_counter()
        finished = 0
        try:
            while (schedule := self._scheduler.schedule()).micro_batches:
                self.peak_sequences = max(self.peak_sequences, len(self._scheduler.running))
                done = [sequence for sequence in self._run(schedule) if sequence.finish_reason]
                finished += len(done)
                if self.generated_tokens and not self.first_token_seconds:
                    self.first_token_seconds = time.perf_counter() - start
                for sequence in done:
                    self._scheduler.finish(sequence)
                if self._on_pass:
                    self._on_pass(self._progress(schedule, finished, time.perf_counter() - start))
                yield from done
        finally:
            self._scheduler.abort()

    def _run(self, schedule: Schedule) -> list[Sequence]:
        """Run one pass; return the sequences that got a token."""
        logits = self._executor.run_pass([self._forward(spans) for spans in schedule.micro_batches])
        self.num_passes += 1
        self._kv.check_integrity()
        ready = self._scheduler.computed(schedule)
        rows = torch.cat([row for row in logits if row.shape[0]]) if ready else None
        self.prompt_tokens += schedule.num_tokens - sum(len(s.output_ids) > 0 for s in ready)
        if rows is not None:
            with torch.inference_mode():
                tokens = self._sampler.sample(rows, ready)
            for sequence, token in zip(ready, tokens, strict=True):
                self._append(sequence, token)
            self.generated_tokens += len(ready)
        return ready

    def _forward(self, spans: tuple[Span, ...]) -> tuple[MicroBatch, Callable[[], Tensor]]:
        batch = MicroBatch(spans, self._kv, self._max_scores)
        tokens: list[int] = []
        keep: list[int] = []
        for span in spans:
            sequence = self._scheduler[span.sequence]
            tokens += sequence.tokens(span.start, span.end)
            if span.end == sequence.num_tokens:
                keep.append(len(tokens) - 1)
        device = self._model.device
        token_ids, keep_ids = torch.tensor(tokens, device=device), torch.tensor(keep, dtype=torch.int64, device=device)
        return batch, lambda: self._model.forward(batch, token_ids, keep_ids)

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
            seconds=seconds,
            schedule=schedule,
            traffic=self._traffic(),
        )
