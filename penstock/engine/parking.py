"""Forwards that wait for something beside the device let the others go on meanwhile.

Only plain Python frames may lie between a forward and its switch: no stream, no guard, and no code that a compiler has
made, which would be left on one stack and entered on another.
"""

from __future__ import annotations

from typing import Any, Final

from greenlet import getcurrent

__all__ = ["PARKED", "park"]

PARKED: Final[Any] = object()
"""What a forward hands to the executor that is not at a layer's entry."""


def park() -> None:
    """Let the executor advance the other micro-batches before this one goes on in its layer."""
    getcurrent().parent.switch(PARKED)
