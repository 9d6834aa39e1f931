"""Take what lies in pinned host memory to the device without waiting in line.

Copies to the device go through one engine in the order in which they were issued, whatever their stream: behind the
weights of a layer, results of a few hundred KiB wait as long as these take. A kernel that reads host memory does not.
"""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.gpu import triton_kernels

__all__ = ["read_pinned"]


def read_pinned(source: Tensor, *, out: Tensor) -> None:
    """Copy `source` in host memory onto `out` of its shape and dtype on the device, both contiguous; nobody waits.

    The caller keeps `source`, unchanged, until the device got there. Without Triton, and for memory that is not pinned,
    this is a plain copy.
    """
    kernels = triton_kernels("pinned_triton", out.device) if out.is_cuda and source.is_pinned() else None
    if kernels is None:
        out.copy_(source, non_blocking=True)
    else:
        kernels.read_pinned(source, out=out)
