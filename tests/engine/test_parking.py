"""The order in which micro-batches go through a layer when some of them park there."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from penstock.engine.batch import CURRENT, MicroBatch, Span
from penstock.engine.executor import Executor
from penstock.engine.parking import park


class Weights:
    @contextmanager
    def layer(self, index):
        yield


class Layer(nn.Module):
    """Notes every step of every micro-batch, by the number of its sequence; parks as often as `parks` says."""

    def __init__(self, index, log, parks):
        super().__init__()
        self.index, self.log, self.parks = index, log, parks

    def forward(self, number):
        self.log.append((self.index, number, 0))
        for step in range(1, self.parks.get(number, 0) + 1):
            park()
            self.log.append((self.index, number, step))


def run(parks, sizes, parked_tokens, num_layers=2, fails=None):
    log = []
    layers = [Layer(index, log, parks) for index in range(num_layers)]
    executor = Executor(layers, Weights())
    executor.parked_tokens = parked_tokens

    def forward(number):
        def body():
            for layer in layers:
                layer(number)
                if number == fails:
                    raise OSError("scripted")
                assert CURRENT.get().spans[0].sequence == number
            return torch.tensor([number])

        return body

    batches = [(MicroBatch((Span(number, 0, size),), None), forward(number)) for number, size in enumerate(sizes)]
    try:
        return log, [int(made) for made in executor.run_pass(batches)]
    except OSError:
        return log, None


def test_all_others_go_through_a_layer_before_those_that_are_parked():
    log, made = run({0: 1, 1: 2}, [3, 3, 3, 3], parked_tokens=6)
    layer = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (1, 2)]
    assert log == [(index, *step) for index in range(2) for step in layer]
    assert made == [0, 1, 2, 3]


def test_no_more_tokens_are_parked_than_may_be():
    log, _ = run({0: 1, 1: 1, 2: 1}, [3, 3, 3, 3], parked_tokens=6, num_layers=1)
    assert [step for _, *step in log] == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [3, 0], [2, 1]]
    log, _ = run({0: 1, 2: 2}, [3, 3, 3, 3], parked_tokens=0, num_layers=1)
    assert [step for _, *step in log] == [[0, 0], [1, 0], [2, 0], [0, 1], [3, 0], [2, 1], [2, 2]]


@pytest.mark.parametrize("fails", [0, 1, 3])
def test_forwards_that_are_parked_are_unwound_when_one_fails(fails):
    log, made = run({0: 1, 1: 2}, [3, 3, 3, 3], parked_tokens=6, fails=fails)
    assert made is None
    assert all(index == 0 for index, _, _ in log)
