"""Learn what attention in host RAM takes on this machine, for this model: run a layer with it before there are weights.

Rates of plain reads do not tell: how many query heads ask of a key, how rows rest, and what the link does meanwhile all
matter to the kernel, and what goes by until it starts matters to the layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.batch import MicroBatch, Span
from penstock.engine.executor import Executor
from penstock.engine.model.build import StreamedModel
from penstock.engine.rehearsal import EnoughError, bind_to_zeros, run_alone
from penstock.io.memory import HostMemory
from penstock.kernels.paged_cpu import load_attend_paged
from penstock.offload.blocks import BLOCK_TOKENS, KVCost
from penstock.offload.cost import HostAttention
from penstock.offload.homes import attention_threads
from penstock.offload.host_kv import HostKV
from penstock.offload.kv import KVStore
from penstock.offload.plan import ModelShape

__all__ = ["HOSTED_NBYTES", "hosted_times"]

HOSTED_NBYTES = 512 << 20
"""Keys and values of one layer that are read: no cache holds them."""

_TOKENS = 512
_MOST_SEQUENCES = 256
_LAYERS = 2
"""The first layer makes the pages of the store warm; the second one is measured."""

_PASSES = 3
_COPIED_NBYTES = 256 << 20
_COPIES = 8


def hosted_times(
    model: StreamedModel, executor: Executor, shape: ModelShape, *, kernel_directory: Path | None, free_nbytes: int
) -> HostAttention | None:
    """Measure a layer's attention in host RAM, alone and beside copies to a GPU where there is one; the best of some.

    Takes a second, and `HOSTED_NBYTES` for each of two layers of `free_nbytes`; None where that is not enough, where
    layers differ in what they keep or keep little, and where the kernel cannot read it. Binds all layers to zeros.
    """
    layers = shape.kv_layers[:_LAYERS]
    alike = len(shape.kv_layers) == len(model.layers) >= _LAYERS and len(set(layers)) == 1 and not shape.kv_windows
    if not alike or shape.kv_dtype == "int4":
        return None
    count = min(HOSTED_NBYTES // (_TOKENS * layers[0]), _MOST_SEQUENCES)
    cost = KVCost(sum(layers), block_tokens=BLOCK_TOKENS)
    nbytes = count * cost.of(_TOKENS)
    enough = nbytes >= HOSTED_NBYTES // 4 and (model.context_length or _TOKENS) >= _TOKENS
    if not enough or nbytes + _COPIED_NBYTES > free_nbytes:
        return None
    _, scratch = bind_to_zeros(model)
    on_cuda = model.device.type == "cuda"
    with ExitStack() as stack:
        memory = stack.enter_context(HostMemory(nbytes, pin=on_cuda))
        store = KVStore(
            limit_nbytes=nbytes, cost=cost, allocate=lambda _: torch.frombuffer(memory.view, dtype=torch.uint8)
        )
        home = HostKV(
            store,
            states=KVStore(device=model.device),
            device=model.device,
            attend=load_attend_paged(kernel_directory),
            num_threads=attention_threads(),
            kv_dtype=shape.kv_dtype,
        )
        stack.callback(home.close)
        source = stack.enter_context(HostMemory(min(_COPIED_NBYTES, scratch.numel()), pin=on_cuda))
        return _alone_and_beside(model, executor, home, count, source=source if on_cuda else None, scratch=scratch)


def _alone_and_beside(
    model: StreamedModel, executor: Executor, home: HostKV, count: int, *, source: HostMemory | None, scratch: Tensor
) -> HostAttention:
    """Measure `count` sequences, twice: without copies, and beside copies of `source` to the device, where given."""
    executor.weights = timed = _Timed(model.device, home)
    copy = _nothing if source is None else _copies(source, scratch)
    found: list[tuple[float, float]] = []
    for issue in (_nothing, copy):
        timed.begin(issue)
        for _ in range(_PASSES):
            _decode(model, executor, home, count)
        found.append((timed.attention_seconds, timed.turn_seconds))
    timed.begin(_nothing)  # the memory that is copied from goes now
    nbytes = home.store.nbytes / _LAYERS
    (alone, turn), (beside, _) = found
    return HostAttention(nbytes / alone, nbytes / max(alone, beside), turn)


def _decode(model: StreamedModel, executor: Executor, home: HostKV, count: int) -> None:
    """Give each of some sequences one more token, as far as that is measured."""
    for number in range(count):
        home.store.acquire(number, num_tokens=_TOKENS)
        home.store.assume(number, num_tokens=_TOKENS - 1)
    try:
        with suppress(EnoughError):
            run_alone(model, executor, MicroBatch(tuple(Span(number, _TOKENS - 1, 1) for number in range(count)), home))
    finally:
        home.settle()
        for number in range(count):
            home.release(number)
        _drain(model.device)


def _copies(memory: HostMemory, scratch: Tensor) -> Callable[[], None]:
    """Return what starts copies to the device that take longer than a layer's attention."""
    source, stream = torch.frombuffer(memory.view, dtype=torch.uint8), torch.cuda.Stream(scratch.device)

    def issue() -> None:
        with torch.cuda.stream(stream):
            for _ in range(_COPIES):
                scratch[: source.numel()].copy_(source, non_blocking=True)

    return issue


def _nothing() -> None:
    """Leave the link alone."""


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Timed:
    """A weight source without weights that times the last layer that runs, and what of it is attention."""

    def __init__(self, device: torch.device, home: HostKV) -> None:
        self._device = device
        self._home = home
        self.begin(_nothing)

    def begin(self, before: Callable[[], None]) -> None:
        """Begin anew; what is measured has what `before` starts beside it."""
        self._before = before
        self.attention_seconds = self.turn_seconds = float("inf")

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        if index == _LAYERS:
            raise EnoughError
        _drain(self._device)
        if index == _LAYERS - 1:
            self._before()
        attended = self._home.attention_seconds
        began = time.perf_counter()
        yield
        if self._device.type == "cuda":  # its copies go on
            torch.cuda.current_stream(self._device).synchronize()
        seconds = time.perf_counter() - began
        attended = self._home.attention_seconds - attended
        if index == _LAYERS - 1:
            self.attention_seconds = min(self.attention_seconds, attended)
            self.turn_seconds = min(self.turn_seconds, seconds - attended)
