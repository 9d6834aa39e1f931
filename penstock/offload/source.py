"""Where an executor gets a layer's weights: the contract, and its plainest form, the oracle of every test."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from penstock.offload.buffers import convert
from penstock.offload.layout import Layout

__all__ = ["AllThere", "SynchronousWeights", "WeightSource", "read_unit"]


class WeightSource(Protocol):
    """Hands out layers in order, pass after pass."""

    def layer(self, index: int) -> AbstractContextManager[None]:
        """Enter with the layer's parameters in place; leave when the layer's work of this pass has been issued."""


class AllThere:
    """Weights that never move: whoever uses it has bound them."""

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:  # noqa: ARG002
        """Enter at any time."""
        yield


def read_unit(layout: Layout, buffer: Tensor) -> None:
    """Fill a CPU buffer with one unit's bytes, extent by extent, through the page cache, and convert."""
    memory = memoryview(buffer.numpy().data)
    for extent in layout.extents:
        with open(extent.file.path, "rb", buffering=0) as file:
            target = memory[extent.destination : extent.destination + extent.nbytes]
            filled = 0
            while filled < extent.nbytes:
                count = os.preadv(file.fileno(), [target[filled:]], extent.source + filled)
                assert count > 0, f"{extent.file.path} is shorter than its header says"
                filled += count
    convert(layout, buffer)


class SynchronousWeights:
    """Reads each layer into one slot at the moment it is needed. `slot` is a CPU buffer of the largest layer's bytes.

    The slot is filled with 0xA5 first, so that any byte the layout misses shows in the result.
    """

    def __init__(self, layouts: Sequence[Layout], slot: Tensor) -> None:
        self._layouts = layouts
        self._slot = slot

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Read layer `index` and hand it out."""
        self._slot.fill_(0xA5)
        with torch.inference_mode():
            read_unit(self._layouts[index], self._slot)
        yield
