"""Time as the device sees it: moments of the computing, and stretches between them that are added up by name."""

from __future__ import annotations

import time
from collections import defaultdict
from threading import Lock
from typing import Any

from penstock.offload.trace import Trace

__all__ = ["Clock", "Stopwatch"]

_MANY = 256


class Clock:
    """Moments of the computing. This is the CPU's: what was issued is done, so a moment is wall-clock time."""

    def now(self) -> Any:
        """Return the moment at which all computing that the calling thread has issued so far is done."""
        return time.perf_counter()

    def has_passed(self, moment: Any) -> bool:  # noqa: ARG002
        """Say whether a moment lies in the past."""
        return True

    def seconds(self, moment: Any) -> float:
        """Return a moment on the scale of `time.perf_counter`; block until it has passed."""
        seconds: float = moment
        return seconds

    def between(self, begin: Any, end: Any) -> float:
        """Return the seconds from one moment to another; both have passed."""
        return self.seconds(end) - self.seconds(begin)


class Stopwatch:
    """Adds up stretches of a clock's time by name, from any thread; with a trace, those with a lane go there too."""

    def __init__(self, clock: Clock, trace: Trace | None = None) -> None:
        self._clock = clock
        self._trace = trace
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: list[tuple[str, Any, Any]] = []
        self._lock = Lock()

    def begin(self) -> Any:
        """Return the moment at which a stretch begins."""
        return self._clock.now()

    def end(self, name: str, begun: Any, *, lane: str | None = None, **args: Any) -> None:
        """End a stretch that began at `begun`."""
        now = self._clock.now()
        with self._lock:
            self._running.append((name, begun, now))
            if len(self._running) >= _MANY:
                self._settle()
        if self._trace is not None and lane is not None:
            self._trace.add(lane, name, begun, now, clock=self._clock, **args)

    def seconds(self, name: str) -> float:
        """Return the sum of the stretches of that name that have passed."""
        with self._lock:
            self._settle()
            return self._seconds[name]

    def _settle(self) -> None:
        running = []
        for name, begun, end in self._running:
            if self._clock.has_passed(end):
                self._seconds[name] += self._clock.between(begun, end)
            else:
                running.append((name, begun, end))
        self._running = running
