"""Decoders that are issued again and again are recorded, and issued as before where that fails."""

import pytest
import torch
from pretend_cuda import pretend_cuda

from penstock.offload import copies as module
from penstock.offload.copies import CudaCopies


@pytest.fixture
def copies(monkeypatch):
    """The copies of a GPU with Triton, on which every layer's decoders can be recorded."""
    monkeypatch.setattr(module, "can_record", lambda _: True)
    monkeypatch.setattr(module, "triton_kernels", lambda *_: True)
    with pretend_cuda(monkeypatch):
        yield CudaCopies(torch.device("cuda"))


@pytest.mark.parametrize("fails", [False, True])
def test_the_second_time_decoders_are_recorded(copies, caplog, fails):
    done = []

    def record(issue):
        assert done == ["first"]
        if fails:
            raise RuntimeError("it waits for the device")
        return lambda: done.append("played")

    copies._graphs = record
    layout, buffer = object(), torch.zeros(8)
    for name in ("first", "second", "third"):
        copies._repeated(layout, buffer, lambda name=name: done.append(name))()
    assert done == (["first", "second", "second"] if fails else ["first", "played", "played"])
    assert ("decoders are not recorded: it waits for the device" in caplog.text) == fails
