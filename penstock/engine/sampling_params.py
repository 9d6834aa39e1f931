"""How tokens are chosen: vLLM's field names, and nothing that is silently ignored."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from penstock.errors import ConfigError, UnsupportedFieldError

__all__ = ["SamplingParams"]


@dataclass(frozen=True, slots=True, init=False)
class SamplingParams:
    """Sampling parameters of one request.

    `temperature` 0 is greedy. `top_k` 0 or -1 means all tokens. `seed` None means 0: results are always reproducible,
    for they depend on the seed, the request's number and the position alone. `stop` strings end a completion and are
    left out of it. `logprobs` is the number of alternatives to report for each token (0: the chosen token alone; None:
    nothing). Raises UnsupportedFieldError for any other field and ConfigError for a value out of range.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    logprobs: int | None

    def __init__(
        self,
        /,
        *,
        max_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        **unsupported: object,
    ) -> None:
        if unsupported:
            raise UnsupportedFieldError(
                "sampling fields that Penstock does not have",
                wanted=f"some of {', '.join(self.__dataclass_fields__)}",
                got=", ".join(sorted(unsupported)),
                fix="Leave them out.",
            )
        strings = () if stop is None else (stop,) if isinstance(stop, str) or not isinstance(stop, Sequence) else stop
        fields = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 0 if top_k == -1 else top_k,
            "seed": seed,
            "stop": tuple(strings),
            "ignore_eos": ignore_eos,
            "logprobs": logprobs,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        for name, holds, wanted in (
            ("max_tokens", _is_int(self.max_tokens) and self.max_tokens >= 1, "an integer of at least 1"),
            ("temperature", _is_number(self.temperature) and self.temperature >= 0, "a finite number of at least 0"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("top_k", _is_int(self.top_k) and self.top_k >= 0, "-1, 0 or a positive integer"),
            ("seed", self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63), "an integer in [0, 2^63)"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "strings that are not empty"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"),
            (
                "logprobs",
                self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= 100),
                "an integer in [0, 100]",
            ),
        ):
            if not holds:
                raise ConfigError(f"{name} is out of range", wanted=wanted, got=repr(getattr(self, name))[:80])

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any], *, defaults: SamplingParams | None = None) -> Self:
        """Make parameters from JSON fields over `defaults`."""
        base = {} if defaults is None else {name: getattr(defaults, name) for name in cls.__dataclass_fields__}
        return cls(**(base | dict(fields)))

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Whether it is a finite number that a float can hold; JSON has integers of any size, and NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
