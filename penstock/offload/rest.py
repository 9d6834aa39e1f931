"""Where layers rest in host RAM: their wire bytes, one after the other in one slab."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from penstock.io.memory import HostMemory
from penstock.offload.layout import Encoding, Extent, Layout

__all__ = ["rest_places", "source_nbytes"]


def rest_places(
    layouts: Sequence[Layout], in_host: Sequence[int], cleanup: ExitStack, *, pin: bool
) -> tuple[dict[int, Tensor], tuple[int, ...]]:
    """Return the place of each layer `in_host`, and the layers to fill: those made of the same bytes share one place.

    The memory goes back when `cleanup` is closed.
    """
    first: dict[tuple[tuple[Extent, ...], tuple[Encoding, ...]], int] = {}
    for index in in_host:
        first.setdefault((layouts[index].extents, layouts[index].encodings), index)
    nbytes = sum(layouts[index].wire_nbytes for index in first.values())
    if not nbytes:
        return {}, ()
    whole = torch.frombuffer(cleanup.enter_context(HostMemory(nbytes, pin=pin)).view, dtype=torch.uint8)
    ends = 0
    places = {}
    for index in first.values():
        start, ends = ends, ends + layouts[index].wire_nbytes
        places[index] = whole[start:ends]
    rest = {index: places[first[layouts[index].extents, layouts[index].encodings]] for index in in_host}
    return rest, tuple(first.values())


def source_nbytes(layout: Layout) -> int:
    """Return how many bytes of the checkpoint a unit is made of."""
    return sum(extent.nbytes for extent in layout.extents) + sum(one.nbytes for one in layout.encodings)
