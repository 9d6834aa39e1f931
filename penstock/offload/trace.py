"""What happened when, for https://ui.perfetto.dev and chrome://tracing: spans in lanes, one lane per thing that works.

Moments on the device are events that CUDA times; they are resolved when the trace is written, so that recording waits
for nothing. Format: Trace Event Format, complete events ("X") and metadata ("M"), times in microseconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from penstock.io.atomic import write_whole

__all__ = [
    "ATTENTION",
    "COMPUTE",
    "DISK",
    "FROM_STAGING",
    "INTO_HOST",
    "KV_ATTENTION",
    "KV_DISK",
    "STALLS",
    "TO_DEVICE",
    "TO_HOST",
    "Trace",
]

DISK = "disk"
INTO_HOST = "staged from disk → host RAM"
FROM_STAGING = "host → device, staged from disk"
TO_DEVICE = "host → device"
TO_HOST = "device → host"
COMPUTE = "compute"
ATTENTION = "attention in host RAM"
KV_ATTENTION = "attention over keys and values from NVMe"
KV_DISK = "keys and values ↔ disk"
STALLS = "stalls"
_ORDER = (DISK, INTO_HOST, FROM_STAGING, TO_DEVICE, TO_HOST, ATTENTION, KV_DISK, KV_ATTENTION, COMPUTE, STALLS)
"""Lanes from top to bottom. Several disk lanes, "disk 1" and so on, show reads that are under way at once."""


class _Moments(Protocol):
    """What turns a moment into seconds on the scale of `time.perf_counter`."""

    def seconds(self, moment: Any) -> float:
        """Block until the moment has passed, and return it."""


class _Wall:
    def seconds(self, moment: Any) -> float:
        """Return the moment, which is seconds already."""
        seconds: float = moment
        return seconds

    def now(self) -> float:
        """Return the time."""
        return time.perf_counter()


@dataclass(frozen=True, slots=True)
class _Span:
    lane: str
    name: str
    begin: Any
    end: Any
    clock: _Moments
    args: dict[str, Any]


class Trace:
    """Collects spans from any thread, a few hundred bytes of memory each. Spans of a lane do not overlap."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._spans: list[_Span] = []

    def add(self, lane: str, name: str, begin: Any, end: Any, *, clock: _Moments | None = None, **args: Any) -> None:
        """Add a span between two moments of `clock`, or of `time.perf_counter`; `args` are shown with it."""
        self._spans.append(_Span(lane, name, begin, end, clock or _Wall(), args))

    @contextmanager
    def span(self, lane: str, name: str, *, clock: Any = None, **args: Any) -> Iterator[None]:
        """Add a span around what is issued inside, from the moment at which what was issued before is done."""
        clock = clock or _Wall()
        begin = clock.now()
        try:
            yield
        finally:
            self.add(lane, name, begin, clock.now(), clock=clock, **args)

    def events(self) -> list[dict[str, Any]]:
        """Return the trace events, lanes first; block until all moments have passed."""
        spans = list(self._spans)
        lanes = sorted({*_ORDER[1:], *(span.lane for span in spans)}, key=_place)
        threads = {lane: number for number, lane in enumerate(lanes, start=1)}
        events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "penstock"}}]
        for lane, thread in threads.items():
            place = {"ph": "M", "pid": 1, "tid": thread}
            events.append({"name": "thread_name", **place, "args": {"name": lane}})
            events.append({"name": "thread_sort_index", **place, "args": {"sort_index": thread}})
        return events + [self._event(span, threads[span.lane]) for span in spans]

    def _event(self, span: _Span, thread: int) -> dict[str, Any]:
        begin, end = span.clock.seconds(span.begin), span.clock.seconds(span.end)
        return {
            "name": span.name,
            "ph": "X",
            "ts": (begin - self._started) * 1e6,
            "dur": max(end - begin, 0.0) * 1e6,
            "pid": 1,
            "tid": thread,
            "args": span.args,
        }

    def write(self, path: str | PathLike[str]) -> None:
        """Write everything so far as JSON, whole or not at all. Raises OutputError."""
        write_whole(Path(path), json.dumps({"traceEvents": self.events(), "displayTimeUnit": "ms"}))


def _place(lane: str) -> tuple[int, str]:
    return next((number for number, known in enumerate(_ORDER) if lane == known), 0), lane
