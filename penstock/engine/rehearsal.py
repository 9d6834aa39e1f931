"""Learn what a model costs by running it once without its weights.

A few tokens go through the model with every layer bound to one buffer of zeros. Their keys, values and states tell
what a sequence keeps, and the tensors that live meanwhile tell what a token needs: for every family, with no formula
that knows families.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penstock.engine.anatomy import Anatomy, Unit, quantised_by
from penstock.engine.batch import MicroBatch, Span
from penstock.engine.blueprints import Part
from penstock.engine.executor import Executor
from penstock.engine.flops import count_flops
from penstock.engine.model.build import StreamedModel, load_model
from penstock.engine.model.compile import LayerCompiler
from penstock.engine.model.packed import all_suit, hide_weights
from penstock.errors import BudgetError, ModelError
from penstock.io.limits import available_memory
from penstock.kernels.gpu import triton_kernels
from penstock.offload.buffers import convert
from penstock.offload.cost import LayerTimes
from penstock.offload.kv import KVStore
from penstock.offload.layout import Layout
from penstock.offload.plan import ModelShape, WindowLayer, window_workspace
from penstock.offload.tiers import format_size

__all__ = [
    "EnoughError", "bind_to_zeros", "call_seconds", "computes_packed", "dissect", "layer_times", "rehearse",
    "rehearse_compiled", "run_alone",
]  # fmt: skip

logger = logging.getLogger("penstock.engine")

NUM_TOKENS = 32
MAX_SCORES = 1 << 20
"""Few, because scores are planned for by themselves; enough for all of `NUM_TOKENS` at once."""

PACKED_TOKENS = 256
"""Passes of more tokens expand what is packed: that is done once, whatever their number."""

_SINGLES = (1, 8, 32)
"""Numbers of sequences with one new token each that are measured."""

_KNOWN_TOKENS = 64
"""What each of them has besides."""

_TIMED_LAYERS = 2
_TIMED_PASSES, _TIMED_SECONDS = 4, 0.1
"""The least of so many passes counts, or of those that fit the time: whatever disturbs one makes it slower."""

_CACHES_NBYTES = 64 << 20
"""Who has written so much finds nothing else in the caches."""

_PASSES = 4
_LARGE_NBYTES = 16 << 20

COMPILED_TOKENS = {"cpu": 64, "cuda": 2048}
"""Micro-batches on which layers are compiled have at most so many tokens: enough to fill the device, and soon done."""


def rehearse(model: StreamedModel, executor: Executor, *, sampler_nbytes: int, kv_dtype: str = "auto") -> ModelShape:
    """Run `NUM_TOKENS` tokens through zeros and return what the model costs, keys and values resting as `kv_dtype`.

    Binds every unit of `model` to scratch memory that is gone afterwards: bind again before use.
    """
    layers = model.layer_layouts
    resident, scratch = bind_to_zeros(model)
    kv = _store(model, kv_dtype, NUM_TOKENS)
    watch = _Watch()
    executor.weights = _Nothing(watch)
    batch = _Listening((Span(0, 0, NUM_TOKENS),), kv, MAX_SCORES)
    with watch:
        logits = run_alone(model, executor, batch)
    converting = 2 * _conversion_peak((*layers, model.resident), scratch, resident)  # two threads may convert at once
    row = logits.shape[-1] * logits.element_size()
    cost = kv.measure()
    kept = cost.of(NUM_TOKENS)
    windows = _windows(kv, batch.windows, model.context_length)
    copied, older = window_workspace(windows)
    return ModelShape(
        resident_nbytes=model.resident.nbytes,
        fixed_nbytes=sampler_nbytes + converting + older + model.scratch_nbytes,
        layer_nbytes=tuple(layout.nbytes for layout in layers),
        wire_nbytes=tuple(layout.wire_nbytes for layout in layers),
        workspace_nbytes=-(-max(watch.peak - kept, 0) // NUM_TOKENS) + copied,
        held_nbytes=-(-watch.held // NUM_TOKENS),
        kv_token_nbytes=cost.token_nbytes,
        kv_sequence_nbytes=cost.sequence_nbytes + 2 * row,
        kv_windows=windows,
        kv_dtype=kv_dtype,
        kept_nbytes=tuple(layout.parameter_nbytes for layout in layers),
        packed_on_load=any(layout.encodings for layout in layers),
        kv_layers=tuple(kv.layer_nbytes().values()),
        packed_tokens=packed_tokens(model, executor),
    )


def packed_tokens(model: StreamedModel, executor: Executor) -> int:
    """Return up to how many tokens of a pass should read packed weights: 0 where this device or the model cannot.

    Binds all layers to zeros.
    """
    runs = model.device.type == "cuda" and model.dtype.itemsize == 2
    if not (model.reads_packed and runs and triton_kernels("packed_linear_triton", model.device)):
        return 0
    suits = all(all(all_suit(layout)) for layout in model.layer_layouts)
    return PACKED_TOKENS if suits and computes_packed(model, executor) else 0


def computes_packed(model: StreamedModel, executor: Executor) -> bool:
    """Say whether the model's code asks for nothing of coded weights but the products of its linear layers.

    That is tried. Binds all layers to zeros.
    """
    _, scratch = buffers = bind_to_zeros(model)
    for index, layout in enumerate(model.layer_layouts):
        model.bind_layer(index, scratch, scratch[: layout.wire_nbytes])
    hide_weights(model.module)
    executor.weights = _Nothing(_Watch())
    batch = MicroBatch((Span(0, 0, 1),), _store(model, "auto", 1), MAX_SCORES, reads_packed=True)
    try:
        run_alone(model, executor, batch)
    except Exception as error:  # noqa: BLE001 - if it is not a hidden weight's, it comes again
        logger.info("weights are expanded in every pass: %s: %s", type(error).__name__, error)
        return False
    finally:
        model.unbind()
    del buffers
    return True


def _windows(kv: KVStore, seen: Mapping[int, int | None], context: int | None) -> tuple[WindowLayer, ...]:
    """Return the layers whose attention sees fewer tokens than a sequence can have."""
    kept = kv.layer_nbytes()
    return tuple(
        WindowLayer(layer, window, kept[layer])
        for layer, window in sorted(seen.items())
        if window is not None and layer in kept and (context is None or window < context)
    )


def rehearse_compiled(
    model: StreamedModel, executor: Executor, compiler: LayerCompiler, shape: ModelShape, *, num_tokens: int
) -> ModelShape:
    """Compile the layers on a micro-batch of about `num_tokens` tokens; return `shape` with what compiled code needs.

    Compilers tune kernels for the sizes that they see, so it should be like real micro-batches. What they make
    allocates unseen by `_Watch`, so a GPU's allocator is asked; a CPU's keeps no account, and fusing only saves memory.
    The workspace is never less than that of eager layers: a kind of layer may have to go back to them.
    """
    num_tokens = min(num_tokens, COMPILED_TOKENS[model.device.type], model.context_length or num_tokens)
    num_tokens = max(3, (num_tokens - 1) | 1)  # odd: a size that no other dimension has stays a size of its own
    spans = (Span(0, 0, num_tokens),)
    buffers = bind_to_zeros(model)
    executor.weights = _Nothing(_Watch())
    with compiler.compiling():
        kv = _store(model, shape.kv_dtype, num_tokens)
        run_alone(model, executor, MicroBatch(spans, kv, MAX_SCORES))
    if model.device.type == "cuda" and compiler.report().num_compiled:
        before = torch.cuda.memory_allocated(model.device)
        kv = _store(model, shape.kv_dtype, num_tokens)
        torch.cuda.reset_peak_memory_stats(model.device)
        run_alone(model, executor, MicroBatch(spans, kv, MAX_SCORES))
        peak = torch.cuda.max_memory_allocated(model.device) - before - kv.measure().of(num_tokens)
        shape = replace(shape, workspace_nbytes=max(shape.workspace_nbytes, -(-peak // num_tokens)))
    del buffers
    return shape


def call_seconds(model: StreamedModel, executor: Executor, *, reads: float | None) -> float:
    """Return what issuing one layer for one micro-batch takes the processor, in seconds, beside reading its weights.

    That is the least of a few passes of few tokens over zeros; what waiting for a GPU takes is left out. On the CPU,
    where issuing and computing are one, `reads` is the rate of reading; of large layers little else would be seen, and
    0 is returned.
    """
    largest = max(layout.nbytes for layout in model.layer_layouts)
    on_cpu = model.device.type == "cpu"
    if on_cpu and largest > _LARGE_NBYTES:
        return 0.0
    buffers = bind_to_zeros(model)
    executor.weights = drained = _Drained(model.device)
    least = float("inf")
    for _ in range(_PASSES):
        batch = MicroBatch((Span(0, 0, 3),), _store(model, "auto", 3), MAX_SCORES)
        drained.wait()
        drained.waited_seconds = 0.0
        began = time.perf_counter()
        run_alone(model, executor, batch)
        least = min(least, time.perf_counter() - began - drained.waited_seconds)
    del buffers
    reading = largest / reads if on_cpu and reads else 0.0
    return max(least / len(model.layers) - reading, 0.0)


def layer_times(model: StreamedModel, executor: Executor, *, num_tokens: int, free_nbytes: int) -> LayerTimes:
    """Measure what a layer takes the CPU, for single tokens and for prompts of up to `num_tokens` tokens.

    That is the faster of the first two layers, of which nothing is in the caches: `free_nbytes` may be taken to make
    sure of that. Takes some seconds for layers of gigabytes.
    """
    _, weights = bind_to_zeros(model)
    weights.zero_()  # pages that were never written are all the same one
    executor.weights = timed = _Timed(min(_CACHES_NBYTES, free_nbytes))

    def run(*spans: Span) -> KVStore:
        kv = KVStore(device=model.device)
        for span in spans:
            kv.acquire(span.sequence, num_tokens=span.end)
            kv.assume(span.sequence, num_tokens=span.start)
        with suppress(EnoughError):
            run_alone(model, executor, MicroBatch(spans, kv, MAX_SCORES))
        return kv

    def measure(*spans: Span) -> tuple[int, float]:
        timed.seconds.clear()
        for _ in range(_TIMED_PASSES):
            run(*spans)
            if sum(timed.seconds) > _TIMED_SECONDS:
                break
        return sum(span.length for span in spans), min(timed.seconds)

    most = min(num_tokens, model.context_length or num_tokens)
    keeps_states = run(Span(0, 0, 1)).measure().sequence_nbytes > 0  # the first call of all takes longer, too
    known = 0 if keeps_states else min(_KNOWN_TOKENS, most - 1)  # a state is of tokens that were there
    return LayerTimes(
        singles=tuple(measure(*(Span(number, known, 1) for number in range(count))) for count in _SINGLES),
        prompts=tuple(measure(Span(0, 0, count)) for count in sorted({max(most // 8, 2), max(most, 2)})),
    )


def dissect(directory: Path, *, dtype: str = "auto", kv_dtype: str = "auto") -> Anatomy:
    """Build the model of a directory on the CPU, without weights, and return what it is made of and costs.

    Raises BudgetError where not even one layer fits this machine's memory, and what loading a model raises.
    """
    model = load_model(directory, dtype=dtype, device="cpu")
    needed = model.resident.nbytes + max(layout.nbytes for layout in model.layer_layouts)
    if needed > (free := available_memory()):
        wanted = f"more than {format_size(needed)}"
        raise BudgetError("a layer of this family must be run once", wanted=wanted, got=f"{format_size(free)} free")
    shape = rehearse(model, Executor(model.layers), sampler_nbytes=0, kv_dtype=kv_dtype)
    copied, _ = window_workspace(shape.kv_windows)
    size = model.dtype.itemsize
    flops = count_flops(model)
    if flops is None:
        raise ModelError("which experts a token meets cannot be told from this config", file=directory / "config.json")

    def unit(layout: Layout) -> Unit:
        parts = tuple(
            Part(view.name, view.shape, view.nbytes // max(prod(view.shape), 1)) for view in layout.parameters
        )
        return Unit(parts, layout.nbytes, layout.wire_nbytes)

    return Anatomy(
        name=directory.name,
        family=str(model.config.model_type),
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        flops=flops,
        resident=unit(model.resident),
        layers=tuple(map(unit, model.layer_layouts)),
        kv_token_nbytes=shape.kv_token_nbytes,
        working_elements=-(-(shape.workspace_nbytes - copied) // size),
        held_elements=-(-shape.held_nbytes // size),
        state_nbytes=shape.kv_sequence_nbytes - 2 * model.vocab_size * size,
        kv_windows=shape.kv_windows,
        kv_layers=shape.kv_layers,
        kv_dtype=kv_dtype,
        quantised=quantised_by(directory),
    )


def bind_to_zeros(model: StreamedModel) -> tuple[Tensor, Tensor]:
    """Bind the resident unit, and all layers to one buffer; return both."""
    resident = torch.zeros(model.resident.nbytes, dtype=torch.uint8, device=model.device)
    largest = max(layout.nbytes for layout in model.layer_layouts)
    scratch = torch.zeros(largest, dtype=torch.uint8, device=model.device)
    model.bind_resident(resident)
    for index in range(len(model.layers)):
        model.bind_layer(index, scratch)
    return resident, scratch


def _store(model: StreamedModel, kv_dtype: str, num_tokens: int) -> KVStore:
    """Return a store with sequence 0 of so many tokens, which takes what memory it needs."""
    kv = KVStore(device=model.device, kv_dtype=kv_dtype)
    kv.acquire(0, num_tokens=num_tokens)
    return kv


@dataclass(frozen=True)
class _Listening(MicroBatch):
    """Knows what attention sees of each layer: so many tokens, or all of them (None)."""

    windows: dict[int, int | None] = field(default_factory=dict)

    def note_window(self, layer: int, window: int | None) -> None:
        """The most counts."""
        known = self.windows.get(layer, 0)
        self.windows[layer] = None if known is None or window is None else max(known, window)


def run_alone(model: StreamedModel, executor: Executor, batch: MicroBatch) -> Tensor:
    """Run one micro-batch of zeros; return its last token's logits [1, vocab]."""
    num_tokens = batch.num_tokens
    tokens = torch.zeros(num_tokens, dtype=torch.int64, device=model.device)
    keep = torch.tensor([num_tokens - 1], device=model.device)
    (logits,) = executor.run_pass([(batch, lambda: model.forward(batch, tokens, keep))])
    return logits


def _conversion_peak(units: Sequence[Layout], *buffers: Tensor) -> int:
    """Return the most bytes that converting a unit on arrival takes beside its buffer, over units of each size."""
    peak = 0
    for unit in {unit.nbytes: unit for unit in units if unit.conversions or unit.expansions}.values():
        buffer = next(buffer for buffer in buffers if buffer.numel() >= unit.nbytes)
        with torch.inference_mode(), _Watch() as watch:
            convert(unit, buffer, rehearsed=True)
        peak = max(peak, watch.peak)
    return peak


class _Nothing:
    """A weight source without weights, which looks at how much lives while a forward waits at a layer's entry."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        if index == 0:
            self._watch.held = self._watch.live
        yield


class EnoughError(Exception):
    """A weight source raises it to break a pass off."""


class _Timed:
    """A weight source without weights, which times the first layers with empty caches, and lets no others run."""

    def __init__(self, caches_nbytes: int) -> None:
        self._filler = torch.zeros(caches_nbytes, dtype=torch.uint8)
        self.seconds: list[float] = []

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        if index == _TIMED_LAYERS:
            raise EnoughError
        self._filler.add_(1)
        began = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - began)


class _Drained:
    """A weight source without weights, which lets a GPU catch up before each layer.

    Else its queue fills up, and the processor waits inside the layers, as long as the GPU reads their weights.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.waited_seconds = 0.0

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:  # noqa: ARG002 - the seam's
        self.wait()
        yield

    def wait(self) -> None:
        if self._device.type == "cuda":
            began = time.perf_counter()
            torch.cuda.synchronize(self._device)
            self.waited_seconds += time.perf_counter() - began


class _Watch(TorchDispatchMode):
    """Adds up the storages that are made inside, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.held = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := _key(leaf)) not in known and key not in self._seen:
                storage = leaf.untyped_storage()
                self._seen.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _gone(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
