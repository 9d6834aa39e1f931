"""Where the time before the first token goes."""

from __future__ import annotations

import time

import psutil

__all__ = ["StartUp"]


class StartUp:
    """Seconds of each step of a start, by name, in order.

    The first, "python", is what the process did before: the interpreter and its imports, when a command was given.
    """

    def __init__(self) -> None:
        self.seconds = {"python": max(time.time() - psutil.Process().create_time(), 0.0)}
        self._since = time.perf_counter()

    def end(self, step: str) -> None:
        """Say that everything since the last step belonged to this one, which may come again."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._since
        self._since = now

    def explain(self) -> str:
        """Say in one line what took how long."""
        steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {steps}"
