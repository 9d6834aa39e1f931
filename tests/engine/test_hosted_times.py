"""What attention in host RAM takes is measured before there are weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from penstock.engine import hosted_times as measuring
from penstock.engine.executor import Executor
from penstock.engine.hosted_times import hosted_times
from penstock.engine.model.build import load_model
from penstock.engine.rehearsal import rehearse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FREE = 1 << 30


@pytest.fixture
def small(monkeypatch):
    """What a tiny model keeps is enough."""
    monkeypatch.setattr(measuring, "HOSTED_NBYTES", 1 << 20)
    monkeypatch.setattr(measuring, "_TOKENS", 128)


def rehearsed(directory, kv_dtype="auto"):
    model = load_model(directory, device=DEVICE)
    executor = Executor(model.layers)
    return model, executor, rehearse(model, executor, sampler_nbytes=0, kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_a_layer_is_timed(tiny_llama, kernel_directory, small, kv_dtype, caplog) -> None:
    model, executor, shape = rehearsed(tiny_llama, kv_dtype)
    found = hosted_times(model, executor, shape, kernel_directory=kernel_directory, free_nbytes=FREE)
    assert found is not None
    assert found.alone >= found.beside_link > 0
    assert found.turn_seconds > 0
    assert "views of it" not in caplog.text, "nothing holds the memory any more"


def test_there_are_models_for_which_nothing_is_known(tiny_llama, kernel_directory, small) -> None:
    model, executor, shape = rehearsed(tiny_llama)
    options = {"kernel_directory": kernel_directory, "free_nbytes": FREE}
    others = (
        replace(shape, kv_dtype="int4"),
        replace(shape, kv_layers=shape.kv_layers[:-1]),
        replace(shape, kv_layers=(1, *shape.kv_layers[1:])),
    )
    for other in others:
        assert hosted_times(model, executor, other, **options) is None
    assert hosted_times(model, executor, shape, **(options | {"free_nbytes": 1 << 20})) is None


def test_what_caches_hold_says_nothing(tiny_llama, kernel_directory) -> None:
    model, executor, shape = rehearsed(tiny_llama)
    assert hosted_times(model, executor, shape, kernel_directory=kernel_directory, free_nbytes=FREE) is None
