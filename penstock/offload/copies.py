"""Copies into the device's buffers, beside the computing: a copy stream on CUDA, plain memory copies on the CPU.

What has been copied is expanded on a third stream, so that the bus goes on meanwhile; what rests packed on the device
is expanded on a fourth, which waits for no bus. A *mark* is a point in the order of the copies, the expansions or the
computing, that the others can wait for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from penstock.kernels.gpu import triton_kernels
from penstock.offload.buffers import can_record, convert, restore
from penstock.offload.clock import Clock, Stopwatch
from penstock.offload.graphs import CudaGraphs
from penstock.offload.layout import Layout
from penstock.offload.trace import Trace

__all__ = ["EXPAND", "TRANSFER", "Copies", "CudaClock", "CudaCopies", "copies_for"]

logger = logging.getLogger("penstock.offload")

TRANSFER = "transfer"
EXPAND = "expand"
"""What `watch` adds up: bringing layers from host RAM, and expanding and converting units that have arrived."""


class Copies:
    """Copies in order. This is the CPU's: each call ends when the bytes have moved, so a mark has always passed."""

    asynchronous = False

    def __init__(self, trace: Trace | None = None, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.watch = Stopwatch(self.clock)
        self._trace = trace

    @contextmanager
    def issue(self) -> Iterator[None]:
        """Enter to issue copies; inference mode is on inside."""
        with torch.inference_mode():
            yield

    @contextmanager
    def expanding(self) -> Iterator[None]:
        """Enter to issue expansions and conversions of what has been copied so far; inference mode is on inside."""
        with torch.inference_mode():
            yield

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Copy one flat uint8 tensor onto another of its size."""
        destination.copy_(source, non_blocking=True)

    def expand(self, layout: Layout | None, buffer: Tensor, *, often: bool = False) -> Any:
        """Expand and convert a unit whose copies have been issued, if need be; return the point after it.

        Units that come `often` come into the same buffer again and again.
        """
        with self.expanding():
            if layout is not None and (layout.expansions or layout.conversions):
                issue = partial(convert, layout, buffer)
                self._expand(self._repeated(layout, buffer, issue) if often else issue)
            return self.expanded()

    def restore(self, layout: Layout, buffer: Tensor, rest: Tensor, after: Any) -> Any:  # noqa: ARG002
        """Make a unit in `buffer` of wire bytes that `rest` on the device; return the point after it.

        Nothing but a point of the computing, `after`, is waited for: units come so while others are on their way.
        """
        with torch.inference_mode():
            self._expand(partial(restore, layout, buffer, rest))
        return self.mark()

    def _expand(self, issue: Callable[[], None]) -> None:
        begun = self.watch.begin()
        issue()
        self.watch.end(EXPAND, begun)

    def _repeated(self, layout: Layout, buffer: Tensor, issue: Callable[[], None]) -> Callable[[], None]:  # noqa: ARG002
        """Return what does the same as `issue`, which makes a unit in this buffer again and again."""
        return issue

    def mark(self) -> Any:
        """Return the point after all copies issued so far."""
        return None

    def expanded(self) -> Any:
        """Return the point after all copies and expansions issued so far."""
        return self.mark()

    def computed(self) -> Any:
        """Return the point after all computing that the calling thread has issued so far."""
        return None

    def wait_for_computing(self, mark: Any) -> None:
        """Let copies issued from now on wait for a point of the computing, or of the expansions."""

    def wait_for_copies(self, mark: Any) -> None:
        """Let computing that the calling thread issues from now on wait for a point of the copies or expansions."""

    def block_until(self, mark: Any) -> None:
        """Block the calling thread until a point of the copies or expansions has passed."""

    def traced(self, lane: str, name: str, **args: Any) -> AbstractContextManager[None]:
        """Enter to put what is issued inside into the trace, if there is one, with the device's times."""
        return nullcontext() if self._trace is None else self._trace.span(lane, name, clock=self.clock, **args)


class CudaClock(Clock):
    """Moments on the current stream, kept as timed events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = torch.cuda.Event(enable_timing=True)
        self._start.record(torch.cuda.current_stream(device))
        self._start.synchronize()
        self._started = time.perf_counter()

    def now(self) -> Any:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def has_passed(self, moment: Any) -> bool:
        """Ask the event."""
        passed: bool = moment.query()
        return passed

    def seconds(self, moment: Any) -> float:
        """Wait for the event and place it after this clock's start."""
        moment.synchronize()
        return self._started + self.between(self._start, moment)

    def between(self, begin: Any, end: Any) -> float:
        """Ask CUDA, which counts in float32 milliseconds: exact for what is near."""
        return float(begin.elapsed_time(end)) / 1000


class CudaCopies(Copies):
    """Copies on a stream of their own, ordered against the computing by events."""

    asynchronous = True

    def __init__(self, device: torch.device, trace: Trace | None = None) -> None:
        super().__init__(trace, CudaClock(device))
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._expansions = torch.cuda.Stream(device)
        self._restoring = torch.cuda.Stream(device)
        self._graphs = CudaGraphs(device)
        self._issued: set[tuple[int, int]] = set()
        self._recorded: dict[tuple[int, int], Callable[[], None]] = {}

    @contextmanager
    def issue(self) -> Iterator[None]:
        """Enter the copy stream."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def expanding(self) -> Iterator[None]:
        """Enter the stream of expansions, which waits for the copies."""
        self._expansions.wait_event(self.mark())
        with torch.inference_mode(), torch.cuda.stream(self._expansions):
            yield

    def restore(self, layout: Layout, buffer: Tensor, rest: Tensor, after: Any) -> Any:
        """Restore on a stream of its own."""
        if after is not None:
            self._restoring.wait_event(after)
        with torch.inference_mode(), torch.cuda.stream(self._restoring):
            self._expand(self._repeated(layout, buffer, partial(restore, layout, buffer, rest)))
        event = torch.cuda.Event()
        event.record(self._restoring)
        return event

    def _repeated(self, layout: Layout, buffer: Tensor, issue: Callable[[], None]) -> Callable[[], None]:
        """Record decoders when they are issued for the second time: a layer's take Python half a millisecond."""
        unit = id(layout), buffer.data_ptr()
        if unit in self._recorded:
            return self._recorded[unit]
        if unit in self._issued:
            self._recorded[unit] = self._record(issue)
            return self._recorded[unit]
        if can_record(layout) and triton_kernels("expand_triton", self._device):
            self._issued.add(unit)
        return issue

    def _record(self, issue: Callable[[], None]) -> Callable[[], None]:
        try:
            return self._graphs(issue)
        except RuntimeError as error:
            logger.warning("decoders are not recorded: %s", error)
            return issue

    def mark(self) -> Any:
        """Record an event on the copy stream."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def expanded(self) -> Any:
        """Record an event on the stream of expansions."""
        self._expansions.wait_event(self.mark())
        self._expansions.wait_stream(self._restoring)
        event = torch.cuda.Event()
        event.record(self._expansions)
        return event

    def computed(self) -> Any:
        """Record an event on the calling thread's stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait_for_computing(self, mark: Any) -> None:
        """Make the copy stream wait."""
        if mark is not None:
            self._stream.wait_event(mark)

    def wait_for_copies(self, mark: Any) -> None:
        """Make the calling thread's stream wait."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def block_until(self, mark: Any) -> None:
        """Wait for an event, with the GIL released."""
        if mark is not None:
            mark.synchronize()


def copies_for(device: torch.device, trace: Trace | None = None) -> Copies:
    """Return the copies that suit a device."""
    return CudaCopies(device, trace) if device.type == "cuda" else Copies(trace)
