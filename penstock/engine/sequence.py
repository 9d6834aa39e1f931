"""A request on its way through the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.engine.outputs import Logprob
from penstock.engine.sampling_params import SamplingParams

__all__ = ["Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """`prompt_ids` and what was generated after them; `number` is the request's place among all requests.

    `num_computed` tokens have gone through the model. `capacity` is the most tokens that it can reach.
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
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt_ids) + len(self.output_ids)

    def tokens(self, start: int, end: int) -> list[int]:
        """Return tokens start .. end of prompt and completion together."""
        prompt = len(self.prompt_ids)
        return [*self.prompt_ids[start:end], *self.output_ids[max(start - prompt, 0) : max(end - prompt, 0)]]
