import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.errors import BudgetError, ClosedError
from penstock.io import memory as memory_module
from penstock.io.libc import address_of
from penstock.io.memory import HUGE_PAGE, HostMemory


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4097, HUGE_PAGE - 1, HUGE_PAGE, 5 * HUGE_PAGE + 3])
def test_exact_size_aligned_and_zeroed(nbytes):
    with HostMemory(nbytes) as memory:
        assert (memory.nbytes, memory.view.nbytes, memory.view.format) == (nbytes, nbytes, "B")
        assert memory.address % HUGE_PAGE == 0
        assert not memory.view.readonly
        assert bytes(memory.view) == bytes(nbytes)
        if nbytes:
            assert address_of(memory.view) == memory.address
            memory.view[-1] = 7
            assert memory.view[-1] == 7


def smaps_of(address):
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(match[1], 16) <= address < int(match[2], 16)
        elif found:
            name, _, value = line.partition(":")
            yield name, value.strip()


def test_resident_on_huge_pages_and_kept_from_children():
    with HostMemory(8 * HUGE_PAGE) as memory:
        facts = dict(smaps_of(memory.address))
        assert int(facts["Rss"].split()[0]) >= 8 * HUGE_PAGE // 1024
        assert "dc" in facts["VmFlags"].split()
        if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
            assert "hg" in facts["VmFlags"].split()


def test_old_kernels_touch_the_pages(monkeypatch):
    def unknown_advice(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory_module, "madvise", unknown_advice)
    with HostMemory(3 * HUGE_PAGE) as memory:
        assert int(dict(smaps_of(memory.address))["Rss"].split()[0]) >= 3 * HUGE_PAGE // 1024


def test_close_is_idempotent_and_use_after_it_raises():
    memory = HostMemory(10)
    memory.close()
    memory.close()
    for use in (lambda: memory.view, lambda: memory.address):
        with pytest.raises(ClosedError):
            use()


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 3 * HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_statistics(nbytes):
    with HostMemory(nbytes) as memory:
        statistics = memory.statistics()
        unit = HUGE_PAGE if nbytes >= HUGE_PAGE else 4096
        assert statistics.nbytes == nbytes
        assert statistics.resident_nbytes == -(-nbytes // unit) * unit
        assert statistics.huge_nbytes is None or 0 <= statistics.huge_nbytes <= statistics.resident_nbytes
        assert not statistics.pinned
        assert statistics.populate_seconds >= 0
    with pytest.raises(ClosedError):
        memory.statistics()


def test_the_limits_are_named(monkeypatch):
    monkeypatch.setattr(memory_module, "available_memory", lambda: 0)
    monkeypatch.setattr(memory_module, "memory_limit", lambda: 12345)
    with pytest.raises(BudgetError, match=r"control group's limit 12345 bytes, `ulimit -l` (unlimited|\d+ bytes)"):
        HostMemory(1)


def test_close_gives_the_pages_back():
    memory = HostMemory(4 * HUGE_PAGE)
    address = memory.address
    memory.close()
    assert dict(smaps_of(address)) == {}


@pytest.mark.parametrize(
    "make_view",
    [
        lambda view: np.frombuffer(view, np.uint8),
        lambda view: torch.frombuffer(view, dtype=torch.uint8),
        lambda view: torch.frombuffer(view[4096:], dtype=torch.uint8),
        lambda view: view[16:],
    ],
    ids=["numpy", "torch", "torch of a slice", "memoryview"],
)
def test_views_outlive_close(make_view, caplog):
    memory = HostMemory(HUGE_PAGE)
    memory.view[-1] = 42
    view = make_view(memory.view)
    with caplog.at_level(logging.WARNING, "penstock.io"):
        memory.close()
    assert "views of it exist" in caplog.text
    view[0] = 1
    assert int(view[-1]) == 42
    with pytest.raises(ClosedError):
        _ = memory.view


def test_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(memory_module, "available_memory", lambda: HUGE_PAGE)
    with HostMemory(HUGE_PAGE):
        pass
    monkeypatch.setattr(memory_module, "_map", lambda _: pytest.fail("mapped"))
    with pytest.raises(BudgetError) as caught:
        HostMemory(HUGE_PAGE + 1)
    assert str(HUGE_PAGE + 1) in str(caught.value)
    assert str(HUGE_PAGE) in str(caught.value)


def test_more_than_there_is():
    with pytest.raises(BudgetError):
        HostMemory(1 << 60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="pins here")
def test_without_cuda_pinning_falls_back_with_one_warning(caplog):
    with caplog.at_level(logging.WARNING, "penstock.io"), HostMemory(HUGE_PAGE, pin=True) as memory:
        assert not memory.pinned
    assert len(caplog.records) == 1


class FakeCuda:
    """Stands for torch.cuda.cudart(): remembers registrations, or refuses them."""

    def __init__(self, status):
        self.status = status
        self.registered = {}

    def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
        if self.status == 0:
            self.registered[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.registered[address]


@pytest.mark.skipif(torch.cuda.is_available(), reason="pins for real here")
@pytest.mark.parametrize("collected", [False, True], ids=["closed", "collected"])
def test_registered_until_it_goes(monkeypatch, collected):
    cuda = FakeCuda(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    memory = HostMemory(HUGE_PAGE + 1, pin=True)
    assert memory.pinned
    assert cuda.registered == {memory.address: 2 * HUGE_PAGE}
    if collected:
        del memory
    else:
        memory.close()
        assert not memory.pinned
    assert cuda.registered == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="pins for real here")
def test_a_refused_registration_names_the_limits(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeCuda(2))
    monkeypatch.setattr(memory_module, "_forget_cuda_error", lambda _: None)
    with caplog.at_level(logging.WARNING, "penstock.io"), HostMemory(HUGE_PAGE, pin=True) as memory:
        assert not memory.pinned
    assert len(caplog.records) == 1
    assert "ulimit -l" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_memory_is_pinned_to_torch():
    with HostMemory(HUGE_PAGE + 1, pin=True) as memory:
        assert memory.pinned
        tensor = torch.frombuffer(memory.view, dtype=torch.uint8)
        assert tensor.is_pinned()
        tensor.fill_(3)
        assert tensor.to("cuda", non_blocking=True).sum().item() == 3 * (HUGE_PAGE + 1)
        del tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_refused_registration_leaves_no_error_behind(caplog):
    with HostMemory(HUGE_PAGE, pin=True) as memory:
        assert memory_module._pin(memory, memory.address, HUGE_PAGE) is None  # registered already
        assert "cudaHostRegister" in caplog.text
        assert torch.ones(3, device="cuda").sum().item() == 3


def test_views_in_cycles_that_nobody_has_are_let_go(caplog):
    memory = HostMemory(HUGE_PAGE)
    cycle = [memory.view[:100]]
    cycle.append(cycle)
    del cycle
    memory.close()
    assert not caplog.records
