"""Compare greedy tokens with those of the same checkpoint, whole and in memory, run by Hugging Face alone.

The reference sees each prompt with its completion in one plain forward, and must choose every generated token itself.
That is the same as comparing with its own greedy generation, token by token, and says for a difference how far apart
the two candidates were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from penstock.engine.llm import DEFAULT_MODEL
from penstock.engine.model.reference import Reference, load_reference
from penstock.engine.outputs import RequestOutput

__all__ = ["Difference", "Verification", "verify"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A position at which the reference's likeliest token is another, by `margin` in its logits.

    `rounding` is the spacing of the dtype's numbers at that logit. Two candidates within twice that are a tie; with a
    margin of 0 the reference itself ranks both first.
    """

    request_id: str
    position: int
    token: int
    wanted: int
    margin: float
    rounding: float

    @property
    def is_tie(self) -> bool:
        """Whether the two tokens cannot be told apart in this dtype."""
        return self.margin <= 2 * self.rounding


@dataclass(frozen=True, slots=True)
class Verification:
    """How many generated tokens were compared, and where they differ."""

    num_tokens: int
    num_requests: int
    differences: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        """Whether every token is the reference's, or tied with it within the dtype's rounding."""
        return all(difference.is_tie for difference in self.differences)

    @property
    def num_equal(self) -> int:
        """Tokens that the reference ranks first, alone or with another."""
        return self.num_tokens - sum(difference.margin > 0 for difference in self.differences)

    def explain(self) -> str:
        """Say it in one line."""
        text = f"verify: {self.num_equal} of {self.num_tokens} tokens of {self.num_requests} completions "
        text += "equal in-memory Hugging Face's"
        if even := sum(difference.margin == 0 for difference in self.differences):
            text += f" ({even} where it ranks two first)"
        if self.num_equal < self.num_tokens:
            worst = max(self.differences, key=lambda difference: difference.margin)
            kind = "tied within the dtype's rounding" if self.passed else "DIFFERENT"
            text += f"; {self.num_tokens - self.num_equal} {kind}, the widest by {worst.margin:.3g} in request "
            text += f"{worst.request_id} at {worst.position} (rounding {worst.rounding:.3g})"
        return text

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "tokens": self.num_tokens,
            "equal": self.num_equal,
            "even": sum(difference.margin == 0 for difference in self.differences),
            "widest_margin": max((difference.margin for difference in self.differences), default=0.0),
            "passed": self.passed,
        }


def verify(
    model: str | PathLike[str] | None,
    outputs: Sequence[RequestOutput],
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> Verification:
    """Check greedy `outputs` of a model. Loads the whole checkpoint; BudgetError when memory cannot hold it."""
    path = DEFAULT_MODEL if model is None else Path(model)
    with load_reference(path, dtype=dtype, device=device) as reference:
        differences = [difference for output in outputs for difference in _differences(reference, output)]
    return Verification(sum(len(output.outputs[0].token_ids) for output in outputs), len(outputs), tuple(differences))


def _differences(reference: Reference, output: RequestOutput) -> Iterator[Difference]:
    prompt, generated = output.prompt_token_ids, torch.tensor(output.outputs[0].token_ids)
    logits = reference([*prompt, *output.outputs[0].token_ids])[len(prompt) - 1 : -1].float().cpu()
    best, wanted = logits.max(dim=-1)
    chosen = logits.gather(-1, generated[:, None])[:, 0]
    for place in (wanted != generated).nonzero().flatten().tolist():
        top = float(best[place])
        yield Difference(
            request_id=output.request_id,
            position=place,
            token=int(generated[place]),
            wanted=int(wanted[place]),
            margin=top - float(chosen[place]),
            rounding=abs(top) * torch.finfo(reference.dtype).eps,
        )
