"""How much of what they may generate sequences are expected to, learned from those of the run so far.

Each sequence's new tokens are cut into equal steps, up to the most that it may generate. What a run knows of a step is
how many sequences came so far and how many of them ended there. Running ones have come so far and not ended: were they
left out, the first to finish, which are the shortest, would stand for all. So the share that goes on is estimated step
by step, and what the steps give together is the product-limit estimate of how long sequences live (Kaplan and Meier,
"Nonparametric estimation from incomplete observations", JASA 1958).

Where nobody has ended early, sequences are expected to need all, and so they are where nobody has been yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from math import ceil

__all__ = ["Expectation"]

STEPS = 64


class Expectation:
    """Learns from sequences that finished. All numbers are of new tokens; `most` is what a sequence may generate."""

    def __init__(self) -> None:
        self._ended = [0] * STEPS  # sequences that ended early, by the step in which they did
        self._through = 0  # those that went to their end

    def finished(self, generated: int, *, most: int) -> None:
        """Note that a sequence has finished with so many tokens; with fewer than `most` it ended early."""
        if generated < most:
            self._ended[-(-generated * STEPS // most) - 1] += 1
        else:
            self._through += 1

    def given(self, running: Iterable[tuple[int, int]]) -> Outlook:
        """Return what to expect while sequences run that have generated so many tokens of so many at most."""
        if not any(self._ended):
            return _TO_THE_END
        left = [*self._ended, self._through]  # sequences by the last step that they came to
        for generated, most in running:
            left[generated * STEPS // most] += 1
        reached = list(accumulate(reversed(left)))[:0:-1]
        # One that goes to its end is added to each step, so that a few endings do not say that nobody ever goes on.
        return Outlook([1 - ended / (came + 1) for ended, came in zip(self._ended, reached, strict=True)])


class Outlook:
    """What to expect of sequences of which these shares go on from step to step."""

    def __init__(self, goes_on: list[float]) -> None:
        steps = 0.0
        ahead = []
        for share in reversed(goes_on):
            steps = 1 + share * steps
            ahead.append(steps)
        self._ahead = ahead[::-1]  # steps still to come, this one included, for those that have come to a step

    def tokens(self, generated: int, *, most: int) -> int:
        """Return how many tokens a sequence with so many will have in the end: more than it has, `most` at most."""
        step = generated * STEPS // most
        return min(most, max(ceil(most * (step + self._ahead[step]) / STEPS), generated + 1))


_TO_THE_END = Outlook([1.0] * STEPS)
