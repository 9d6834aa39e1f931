"""Copies into the device's buffers, beside the computing: a copy stream on CUDA, plain memory copies on the CPU.

A *mark* is a point in the order of the copies, or of the computing, that the other side can wait for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Copies", "CudaCopies", "copies_for"]


class Copies:
    """Copies in order. This is the CPU's: each call ends when the bytes have moved, so a mark has always passed."""

    asynchronous = False

    def __init__(self) -> None:
        self._stall_seconds = 0.0

    @contextmanager
    def issue(self) -> Iterator[None]:
        """Enter to issue copies and the conversions that follow them; inference mode is on inside."""
        with torch.inference_mode():
            yield

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Copy one flat uint8 tensor onto another of its size."""
        destination.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """Return the point after all copies issued so far."""
        return None

    def computed(self) -> Any:
        """Return the point after all computing that the calling thread has issued so far."""
        return None

    def wait_for_computing(self, mark: Any) -> None:
        """Let copies issued from now on wait for a point of the computing."""

    def start_waiting(self) -> Any:
        """Note that the calling thread's computing has nothing more to do until a layer arrives."""
        return time.perf_counter()

    def wait_for_copies(self, mark: Any, waiting: Any) -> None:  # noqa: ARG002 - they have ended
        """Let computing that the calling thread issues from now on wait for a point of the copies.

        `waiting` is what `start_waiting` returned; what computing has lost since then is a stall.
        """
        self._stall_seconds += time.perf_counter() - waiting

    def block_until(self, mark: Any) -> None:
        """Block the calling thread until a point of the copies has passed."""

    def stall_seconds(self) -> float:
        """Return for how long computing has waited for copies, as far as the device can tell."""
        return self._stall_seconds


class CudaCopies(Copies):
    """Copies on a stream of their own, ordered against the computing by events."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def issue(self) -> Iterator[None]:
        """Enter the copy stream."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Any:
        """Record an event on the copy stream."""
        event = torch.cuda.Event()
        event.record(self._stream)
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

    def start_waiting(self) -> Any:
        """Record a timed event, which passes when the device has done all that it has been given."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait_for_copies(self, mark: Any, waiting: Any) -> None:
        """Make the calling thread's stream wait; what lies between `waiting` and the end of that is a stall."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(mark)
        after = torch.cuda.Event(enable_timing=True)
        after.record(stream)
        self._waits.append((waiting, after))
        if len(self._waits) >= 256:
            self.stall_seconds()

    def block_until(self, mark: Any) -> None:
        """Wait for an event, with the GIL released."""
        if mark is not None:
            mark.synchronize()

    def stall_seconds(self) -> float:
        """Add up the stalls that have ended."""
        waiting = []
        for before, after in self._waits:
            if after.query():
                self._stall_seconds += before.elapsed_time(after) / 1000
            else:
                waiting.append((before, after))
        self._waits = waiting
        return self._stall_seconds


def copies_for(device: torch.device) -> Copies:
    """Return the copies that suit a device."""
    return CudaCopies(device) if device.type == "cuda" else Copies()
