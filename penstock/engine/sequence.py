"""A request on its way through the model."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Self

from penstock.engine.outputs import Logprob
from penstock.engine.sampling_params import SamplingParams

__all__ = ["Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """`prompt_ids` and what was generated after them; `number` is the request's place among all requests.

    `num_computed` tokens have gone through the model. `capacity` is the most tokens that it can reach, and for
    `num_reserved` of them memory is reserved. A sequence with `targets` is scored, not continued: they are the tokens
    after the last of `prompt_ids`, each moved on by one place, and `scores` holds log-probability and rank of those
    whose turn has come. The first `num_repeated` tokens had gone through the model before `restart` was called.
    """

    number: int
    prompt: str | None
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    capacity: int
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    num_computed: int = 0
    num_reserved: int = 0
    num_repeated: int = 0
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    targets: tuple[int, ...] = ()
    scores: list[tuple[float, int]] = field(default_factory=list)

    @classmethod
    def to_score(cls, number: int, prompt: str | None, token_ids: Items[int], *, num_known: int) -> Self:
        """Return the sequence that scores all of `token_ids` but the first `num_known`, which is at least 1."""
        *known, _ = token_ids
        return cls(number, prompt, tuple(known), SamplingParams(), len(known), targets=tuple(token_ids[num_known:]))

    @property
    def first_scored(self) -> int:
        """The place of the token after which the first target comes."""
        return len(self.prompt_ids) - len(self.targets)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def most_new(self) -> int:
        """The most tokens that may be generated."""
        return self.capacity - len(self.prompt_ids)

    @property
    def has_known_length(self) -> bool:
        """Whether nothing can end it before it reaches its capacity."""
        return bool(self.targets) or (self.params.ignore_eos and not self.params.stop)

    def restart(self) -> None:
        """Forget what the model has computed, but no token: prompt and completion go through it again as one prompt."""
        self.num_repeated = max(self.num_repeated, self.num_computed)
        self.num_computed = self.num_reserved = 0
        self.scores.clear()

    def tokens(self, start: int, end: int) -> list[int]:
        """Return tokens start .. end of prompt and completion together."""
        prompt = len(self.prompt_ids)
        return [*self.prompt_ids[start:end], *self.output_ids[max(start - prompt, 0) : max(end - prompt, 0)]]
