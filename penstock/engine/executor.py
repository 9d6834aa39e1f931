"""The loop: one sweep through all layers, in which every micro-batch advances.

Each micro-batch's whole Hugging Face forward runs in a greenlet, and every decoder layer switches back here before it
runs. So the layers of all micro-batches can be run layer by layer while the weights of each are there, and the model's
own code does everything else: embedding, rotary tables, per-layer arguments, head.

No stream, autocast or grad context may be entered inside a forward and left in another: those are per thread, not per
greenlet. They are entered here, around the whole pass.

A forward whose attention is computed beside the device switches back inside a layer, too: it is *parked*. The other
micro-batches go on to the next layer before it does. Where the weights of two layers may be held at a time, the first
one that was parked goes into the next layer and is parked there while others are still parked in the layer before: then
attention beside the device never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from penstock.engine.batch import CURRENT, MicroBatch
from penstock.engine.parking import PARKED
from penstock.offload.source import WeightSource
from penstock.offload.trace import COMPUTE

__all__ = ["Executor", "Forward"]

Forward = Callable[[], Tensor]
"""A micro-batch's whole forward: returns its logits."""

Traced = Callable[..., AbstractContextManager[None]]
"""Enter it with a lane, a name, and more to show, to put what is issued inside into a trace."""


class Executor:
    """Runs passes. `layers` are the decoder layers in the order in which every forward calls them.

    `weights` is where they get their parameters; it may be set or exchanged between passes. So may `traced`, which puts
    every layer of every micro-batch into a trace. At most `parked_tokens` tokens, or one micro-batch's, are parked at a
    time, which bounds the activations that they hold. `runs_ahead` lets some enter a layer while others are parked in
    the one before: then `weights` must hand out both.
    """

    def __init__(self, layers: Sequence[nn.Module], weights: WeightSource | None = None) -> None:
        self._num_layers = len(layers)
        self.weights = weights
        self.traced: Traced | None = None
        self.parked_tokens = 0
        self.runs_ahead = False
        for index, layer in enumerate(layers):
            _gate(layer, index)

    def run_pass(self, batches: Sequence[tuple[MicroBatch, Forward]]) -> list[Tensor]:
        """Advance every micro-batch through all layers and return their logits, in order.

        When one forward raises, the others are unwound and the error goes on; the weights stay usable.
        """
        assert self.weights is not None
        runs = [self._start(number, *batch) for number, batch in enumerate(batches)]
        try:
            with torch.inference_mode(), ExitStack() as behind:
                for run in runs:
                    run.advance(to=0)
                for index in range(self._num_layers):
                    with ExitStack() as ahead:
                        self._run_layer(runs, index, behind, ahead)
                        behind.push(ahead.pop_all())
                    if not self.runs_ahead or index == self._num_layers - 1:
                        _resume([run for run in runs if run.is_parked], to=index + 1)
                    if not any(run.is_parked for run in runs):
                        behind.close()
        finally:
            for run in runs:
                run.unwind()
        return [run.result() for run in runs]

    def _run_layer(self, runs: Sequence[_Run], index: int, behind: ExitStack, ahead: ExitStack) -> None:
        """Advance every micro-batch through a layer, which is `ahead`; those that are parked `behind` it leave that."""
        assert self.weights is not None
        for number, run in enumerate(runs):
            if run.is_parked:
                _resume([run], to=index)
                if not any(later.is_parked for later in runs[number + 1 :]):
                    behind.close()
            if not number:
                ahead.enter_context(self.weights.layer(index))
            run.advance(to=index + 1)
            if run.is_parked and self._parks_too_much(runs):
                _resume([one for one in runs[number + 1 :] if one.is_parked], to=index)
                behind.close()
                if self._parks_too_much(runs):
                    _resume([one for one in runs[:number] if one.is_parked], to=index + 1)

    def _parks_too_much(self, runs: Sequence[_Run]) -> bool:
        return sum(run.num_tokens for run in runs if run.is_parked) > self.parked_tokens

    def _start(self, number: int, batch: MicroBatch, forward: Forward) -> _Run:
        return _Run(batch, forward) if self.traced is None else _TracedRun(number, batch, forward, self.traced)


def _resume(parked: Sequence[_Run], *, to: int) -> None:
    """Let parked runs go on in turns: what one stores for a sequence comes before what a later one reads of it."""
    while parked:
        for run in parked:
            run.advance(to=to)
        parked = [run for run in parked if run.is_parked]


def _gate(layer: nn.Module, index: int) -> None:
    """Make `layer` switch to the executor, with its index, before it runs."""
    forward = layer.forward

    def gated(*args: Any, **kwargs: Any) -> Any:
        getcurrent().parent.switch(index)
        return forward(*args, **kwargs)

    layer.forward = gated


class _Run:
    """One micro-batch's forward, suspended at the entry of a layer."""

    def __init__(self, batch: MicroBatch, forward: Forward) -> None:
        def body() -> Tensor:
            CURRENT.set(batch)
            return forward()

        self.num_tokens = batch.num_tokens
        self._greenlet = greenlet(body)
        self._reached: Any = None

    @property
    def is_parked(self) -> bool:
        """Whether it waits inside a layer."""
        return self._reached is PARKED

    def advance(self, *, to: int) -> None:
        """Run up to the entry of layer `to`, or to the end where there is no such layer, unless it parks before."""
        self._reached = self._greenlet.switch()
        assert self._greenlet.dead or self._reached in {to, PARKED}, (
            f"layer {to} expected, the model entered {self._reached}"
        )

    def unwind(self) -> None:
        """Leave a forward that did not end."""
        if self._greenlet:
            self._greenlet.throw(GreenletExit)

    def result(self) -> Tensor:
        """Return the logits."""
        assert self._greenlet.dead
        logits: Tensor = self._reached
        return logits


class _TracedRun(_Run):
    """A run whose every step is in the trace."""

    def __init__(self, number: int, batch: MicroBatch, forward: Forward, traced: Traced) -> None:
        super().__init__(batch, forward)
        self._traced = traced
        self._args = {"micro_batch": number, "tokens": batch.num_tokens}

    def advance(self, *, to: int) -> None:
        """Run one step."""
        with self._traced(COMPUTE, f"layer {to - 1}" if to else "embedding", **self._args):
            super().advance(to=to)
