"""What comes back: vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CompletionOutput", "Logprob", "RequestOutput", "ScoreOutput"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural log-probability under the model, before temperature and truncation, and its rank from 1."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion. `finish_reason` is "stop" (end of text, or the `stop_reason` string) or "length".

    `logprobs` holds one mapping for each of `token_ids`: the chosen token and the likeliest ones.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt with its completions; `request_id` is the prompt's number as text."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool = True


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """The log-likelihood of `token_ids` after `prompt_token_ids`; `logprobs` holds one entry for each of them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]

    @property
    def logprob(self) -> float:
        """The natural log-probability of all scored tokens together."""
        return sum(entry.logprob for entry in self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether every scored token is the likeliest at its place."""
        return all(entry.rank == 1 for entry in self.logprobs)
