"""Finished sequences as results. `tokenizer` is transformers', or None where only token ids are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from penstock.engine.outputs import CompletionOutput, Logprob, RequestOutput, ScoreOutput
from penstock.engine.sequence import Sequence

__all__ = ["completion_of", "score_of"]


def completion_of(sequence: Sequence, tokenizer: Any) -> RequestOutput:
    """Return the completion that a sequence has become."""
    asked = sequence.params.logprobs is not None
    completion = CompletionOutput(
        index=0,
        text=sequence.text,
        token_ids=tuple(sequence.output_ids),
        cumulative_logprob=sequence.cumulative_logprob if asked else None,
        logprobs=tuple(_with_text(entries, tokenizer) for entries in sequence.logprobs) if asked else None,
        finish_reason=sequence.finish_reason or "length",
        stop_reason=sequence.stop_reason,
    )
    return RequestOutput(str(sequence.number), sequence.prompt, sequence.prompt_ids, (completion,))


def score_of(sequence: Sequence, tokenizer: Any) -> ScoreOutput:
    """Return what a sequence with targets has scored."""
    entries = [
        _with_text({token: Logprob(logprob, rank)}, tokenizer)[token]
        for token, (logprob, rank) in zip(sequence.targets, sequence.scores, strict=True)
    ]
    known = sequence.prompt_ids[: sequence.first_scored + 1]
    return ScoreOutput(str(sequence.number), sequence.prompt, known, sequence.targets, tuple(entries))


def _with_text(logprobs: dict[int, Logprob], tokenizer: Any) -> dict[int, Logprob]:
    if tokenizer is None:
        return logprobs
    return {token: replace(one, decoded_token=tokenizer.decode([token])) for token, one in logprobs.items()}
