"""Micro-batches of all kinds go through the first layer before a model has weights."""

from __future__ import annotations

import pytest
import torch

from penstock.engine import warm_up as warming
from penstock.engine.executor import Executor
from penstock.engine.model.build import load_model
from penstock.engine.warm_up import warm_up

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
def test_every_kind_of_micro_batch_goes_through_the_first_layer(tiny_llama, monkeypatch, kv_dtype) -> None:
    model = load_model(tiny_llama, device=DEVICE)
    executor, seen, entered = Executor(model.layers), [], []
    run, first = warming.run_alone, warming._FirstLayer.layer

    def counted(model, executor, batch):
        seen.append(batch.spans)
        return run(model, executor, batch)

    def watched(self, index):
        entered.append(index)
        return first(self, index)

    monkeypatch.setattr(warming, "run_alone", counted)
    monkeypatch.setattr(warming._FirstLayer, "layer", watched)
    monkeypatch.setattr(warming, "LONG_TOKENS", 200)
    warm_up(model, executor, kv_dtype=kv_dtype)
    assert len(seen) == 4, "the context is 256 tokens"
    assert entered == [0, 1] * 4
