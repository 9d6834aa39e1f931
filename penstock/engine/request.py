"""What is asked of the model: prompts to complete and texts to score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from penstock.engine.sampling_params import SamplingParams
from penstock.errors import ConfigError

__all__ = [
    "Prompt",
    "Request",
    "ScoreRequest",
    "is_tokens",
    "is_whole",
    "requests_of",
    "score_requests_of",
]

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or a mapping with "prompt" or "prompt_token_ids"."""

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete. `number` is its own among all requests of a run: its result's id, and part of its draws.

    So a request gets the same random numbers in every run that gives it the same number, whatever runs beside it.
    """

    number: int
    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A text to score: `continuation` after `prompt`, or with None all of `prompt` but its first token."""

    number: int
    prompt: Prompt
    continuation: str | Sequence[int] | None = None


def is_tokens(prompt: Any) -> bool:
    """Say whether this is a prompt of token ids."""
    return (
        isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], int)
    )


def _is_single(prompts: Any) -> bool:
    """Say whether this is one prompt and not several."""
    return isinstance(prompts, (str, Mapping)) or is_tokens(prompts)


def is_whole(prompts: Any) -> bool:
    """Say whether prompts are all there, so that they can be checked before anything runs."""
    return isinstance(prompts, (str, Mapping, Sequence))


def requests_of(prompts: Any, params: SamplingParams | Iterable[SamplingParams] | None) -> Iterator[Request]:
    """Number prompts from 0 and pair them with parameters; requests among them stay what they are."""
    many = [prompts] if _is_single(prompts) else prompts
    each = repeat(params or SamplingParams()) if isinstance(params, SamplingParams | None) else params
    for number, (prompt, one) in enumerate(_pairs(many, each, "sampling parameters")):
        yield prompt if isinstance(prompt, Request) else Request(number, prompt, one)


def score_requests_of(prompts: Any, continuations: Iterable[str | Sequence[int]] | None) -> Iterator[ScoreRequest]:
    """Number texts from 0 and pair them with continuations; requests among them stay what they are."""
    many = [prompts] if _is_single(prompts) else prompts
    after = repeat(None) if continuations is None else [continuations] if _is_single(continuations) else continuations
    for number, (prompt, continuation) in enumerate(_pairs(many, after, "continuations")):
        yield prompt if isinstance(prompt, ScoreRequest) else ScoreRequest(number, prompt, continuation)


def _pairs(many: Iterable[Any], each: Iterable[Any], what: str) -> Iterator[tuple[Any, Any]]:
    """Pair prompts with what belongs to each; raises ConfigError, before the first pair where both have a length."""
    if isinstance(many, Sized) and isinstance(each, Sized) and len(many) != len(each):
        raise ConfigError(f"{what} and prompts differ in number", wanted=len(many), got=len(each))
    others = iter(each)
    for count, prompt in enumerate(many):
        other = next(others, _MISSING)
        if other is _MISSING:
            raise ConfigError(f"{what} and prompts differ in number", wanted=f"more than {count}", got=count)
        yield prompt, other
