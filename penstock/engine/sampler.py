"""Choosing the next token.

A draw depends on (seed, request number, position) and the logits alone, never on what else is in the batch: each comes
from its own counter of the Philox generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.engine.outputs import Logprob
from penstock.engine.sequence import Sequence
from penstock.errors import ModelOutputError

__all__ = ["Sampler", "Token", "check_finite"]

BYTES_PER_LOGIT = 40
"""Temporaries of one row while it is sampled: sorted logits, their order, probabilities, sums."""


@dataclass(frozen=True, slots=True)
class Token:
    """A chosen token, its log-probability where asked for, and the alternatives."""

    id: int
    logprob: float | None = None
    logprobs: dict[int, Logprob] | None = None


class Sampler:
    """Chooses tokens for a batch, at most `num_rows` rows at a time, so that its memory is bounded."""

    def __init__(self, *, vocab_size: int, num_rows: int) -> None:
        self._num_rows = num_rows
        self.nbytes = num_rows * vocab_size * BYTES_PER_LOGIT

    def sample(self, logits: Tensor, sequences: Rows[Sequence]) -> list[Token]:
        """Choose one token per row of `logits` [len(sequences), vocab], any float dtype, on any device."""
        check_finite(logits)
        greedy = logits.argmax(dim=-1).tolist()
        chosen = {row: token for row, token in enumerate(greedy) if sequences[row].params.is_greedy}
        drawn = [row for row in range(len(sequences)) if row not in chosen]
        for start in range(0, len(drawn), self._num_rows):
            rows = drawn[start : start + self._num_rows]
            chosen |= zip(rows, _draw(logits[rows].float(), [sequences[row] for row in rows]), strict=True)
        return [
            Token(chosen[row])
            if sequence.params.logprobs is None
            else _with_logprobs(logits[row], chosen[row], sequence.params.logprobs)
            for row, sequence in enumerate(sequences)
        ]


def check_finite(logits: Tensor) -> None:
    """Raise ModelOutputError for logits, or scores made of them, that are infinite or not a number."""
    if not bool(logits.isfinite().all()):
        raise ModelOutputError(
            "the model's logits are not finite",
            wanted="numbers",
            got=f"infinity or NaN in {logits.dtype}",
            fix="float16 overflows in some models: use --dtype bfloat16 or float32.",
        )


def _draw(logits: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Draw one token per row of float32 logits, by inverting the distribution function of what top-k and top-p keep.

    The likeliest token is always kept.
    """
    device, size = logits.device, logits.shape[-1]
    temperature = torch.tensor([[max(float(s.params.temperature), 1e-5)] for s in sequences], device=device)
    top_p = torch.tensor([[s.params.top_p] for s in sequences], device=device)
    top_k = torch.tensor([[min(s.params.top_k or size, size)] for s in sequences], device=device)
    uniform = torch.tensor([[_uniform(s)] for s in sequences], device=device, dtype=torch.float64)
    ordered, tokens = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    rank = torch.arange(size, device=device)
    probabilities = probabilities.masked_fill(((before >= top_p) | (rank >= top_k)) & (rank > 0), 0.0)
    sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
    place = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)
    last = ((probabilities > 0).sum(dim=-1, keepdim=True) - 1).clamp_min(0)
    return [int(token) for token in tokens.gather(-1, torch.minimum(place, last)).squeeze(-1).tolist()]


def _uniform(sequence: Sequence) -> float:
    """Return the uniform number in [0, 1) of a sequence's next position."""
    key = np.array([sequence.params.seed or 0, sequence.number], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=sequence.num_tokens)).random())


def _with_logprobs(logits: Tensor, token: int, count: int) -> Token:
    """Report a token with the `count` likeliest ones. `logits` is one row [vocab]."""
    logprobs = logits.float().log_softmax(dim=-1)
    values, tokens = logprobs.topk(min(count, logprobs.shape[-1]))
    chosen = float(logprobs[token])
    rank = int((logprobs > chosen).sum()) + 1
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    report = {token: Logprob(chosen, rank)} | {
        other: Logprob(value, place) for place, (other, value) in enumerate(pairs, start=1) if other != token
    }
    return Token(token, chosen, report)
