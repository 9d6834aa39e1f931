"""The order in which micro-batches go through a layer when some of them park there."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from penstock.engine.batch import CURRENT, MicroBatch, Span
from penstock.engine.executor import Executor
from penstock.engine.parking import park


class Weights:
    def __init__(self, log):
        self.log = log

    @contextmanager
    def layer(self, index):
        self.log.append(f"+{index}")
        yield
        self.log.append(f"-{index}")


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


def run(parks, sizes, parked_tokens, num_layers=2, fails=None, ahead=False):
    log = []
    layers = [Layer(index, log, parks) for index in range(num_layers)]
    executor = Executor(layers, Weights(log if ahead else []))
    executor.parked_tokens = parked_tokens
    executor.runs_ahead = ahead

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


def test_while_some_are_parked_in_a_layer_others_enter_the_next_one():
    log, made = run({0: 1, 1: 1}, [1, 1, 5], parked_tokens=6, num_layers=3, ahead=True)
    first = ["+0", (0, 0, 0), (0, 1, 0), (0, 2, 0)]
    second = [(0, 0, 1), "+1", (1, 0, 0), (0, 1, 1), "-0", (1, 1, 0), (1, 2, 0)]
    third = [(1, 0, 1), "+2", (2, 0, 0), (1, 1, 1), "-1", (2, 1, 0), (2, 2, 0)]
    assert log == [*first, *second, *third, (2, 0, 1), (2, 1, 1), "-2"]
    assert made == [0, 1, 2]


def test_one_that_is_parked_alone_leaves_a_layer_before_the_next_one_is_entered():
    log, _ = run({0: 2}, [1, 5], parked_tokens=6, ahead=True)
    first = ["+0", (0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2), "-0"]
    assert log == [*first, "+1", (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 0, 2), "-1"]
    log, _ = run({}, [1, 5], parked_tokens=6, ahead=True)
    assert log == ["+0", (0, 0, 0), (0, 1, 0), "-0", "+1", (1, 0, 0), (1, 1, 0), "-1"]


def test_no_more_tokens_are_parked_in_two_layers_than_may_be():
    log, made = run({0: 1, 1: 1, 2: 1}, [3, 3, 3], parked_tokens=6, ahead=True)
    first = ["+0", (0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (0, 1, 1)]
    second = ["+1", (1, 0, 0), (1, 1, 0), (0, 2, 1), "-0", (1, 2, 0), (1, 0, 1), (1, 1, 1)]
    assert log == [*first, *second, (1, 2, 1), "-1"]
    assert made == [0, 1, 2]


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_both_layers_are_left_when_one_fails(fails):
    log, made = run({0: 1, 1: 1}, [1, 1, 5], parked_tokens=6, num_layers=3, fails=fails, ahead=True)
    assert made is None
    assert "+0" in log


class Slots:
    """Notes which layers are held at a time."""

    def __init__(self):
        self.inside, self.most = set(), 0

    @contextmanager
    def layer(self, index):
        self.inside.add(index)
        self.most = max(self.most, len(self.inside))
        try:
            yield
        finally:
            self.inside.remove(index)


class Held(Layer):
    """Computes with weights that are there."""

    def __init__(self, index, log, parks, weights):
        super().__init__(index, log, parks)
        self.weights = weights

    def forward(self, number):
        assert self.index in self.weights.inside
        super().forward(number)
        assert self.index in self.weights.inside


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.integers(0, 12),
    st.booleans(),
    st.sampled_from([None, 0, 1, 2, 3]),
)
def test_every_micro_batch_goes_through_every_layer_in_order(parks, parked_tokens, ahead, fails):
    log: list[tuple[int, int, int]] = []
    weights = Slots()
    layers = [Held(index, log, dict(enumerate(parks)), weights) for index in range(4)]
    executor = Executor(layers, weights)
    executor.parked_tokens, executor.runs_ahead = parked_tokens, ahead

    def forward(number):
        def body():
            for layer in layers:
                layer(number)
                if number == len(parks) - 1 and layer.index == fails:
                    raise OSError("scripted")
            return torch.tensor([number])

        return body

    batches = [(MicroBatch((Span(number, 0, 3),), None), forward(number)) for number in range(len(parks))]
    with pytest.raises(OSError, match="scripted") if fails is not None else nullcontext():
        assert [int(made) for made in executor.run_pass(batches)] == list(range(len(parks)))
    assert not weights.inside
    assert weights.most <= (2 if ahead else 1)
    for number, times in enumerate(parks):
        mine = [(index, step) for index, one, step in log if one == number]
        every = [(index, step) for index in range(4) for step in range(times + 1)]
        assert mine == (every if fails is None else every[: len(mine)])
