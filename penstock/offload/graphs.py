"""Work for a GPU that is issued again and again with the same addresses: recorded once, then one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch

__all__ = ["CudaGraphs"]

T = TypeVar("T")


class CudaGraphs:
    """Records what is issued to CUDA. Recordings share the memory they take, so no two that take any may overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @cached_property
    def _pool(self) -> Any:
        """The recordings' memory, which stays theirs when all of them are gone.

        Torch takes nothing more into a pool that its last recording has left: so one that takes no memory stays.
        """
        pool = torch.cuda.graph_pool_handle()
        nothing = torch.zeros(1, device=self._device)
        self._keeper = self._capture(nothing.zero_, pool)
        return pool

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def __call__(self, issue: Callable[[], T]) -> Callable[[], T]:
        """Record what `issue` issues, which runs nothing; return what runs it on the stream that is current then.

        It returns what `issue` has returned. What is recorded must have run once: some code is made, or loaded, when
        it first runs. Raises RuntimeError for what waits for the device.
        """
        _forget_workspaces()  # those of the libraries, which would be taken from the recording and never given back
        replay = self._capture(issue, self._pool)
        _forget_workspaces()
        return replay

    def _capture(self, issue: Callable[[], T], pool: Any) -> Callable[[], T]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                made = issue()
            finally:
                graph.capture_end()

        def replay() -> T:
            graph.replay()
            return made

        return replay


def _forget_workspaces() -> None:
    torch._C._cuda_clearCublasWorkspaces()
