"""Keys, values and attention on a CUDA device that is not there: nothing mixes devices, waits, or comes too late."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from greenlet import greenlet
from pretend_cuda import There, on_memory, pretend_cuda
from torch import Tensor

from penstock.engine.batch import CURRENT, MicroBatch, Span
from penstock.engine.model import attention
from penstock.engine.parking import PARKED
from penstock.io.settings import ReadSettings
from penstock.kernels import paged
from penstock.kernels.attention import Rule
from penstock.kernels.paged_reference import attend_paged
from penstock.offload import homes, kv
from penstock.offload.blocks import KVCost
from penstock.offload.disk_kv import DiskRoom
from penstock.offload.groups import open_kv
from penstock.offload.homes import KVHomes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real device is better")

KV_DTYPES = ["auto", "bf16", "fp8", "int8", "int4"]
WAYS = [("plain", dtype) for dtype in KV_DTYPES]
HEADS, KEY_HEADS, SIZE = 4, 2, 8
PASSES = [
    [("a", 0, 5), ("b", 0, 7)],
    [("a", 5, 6), ("b", 7, 9), ("c", 0, 3)],
    [("a", 6, 7), ("b", 9, 10), ("c", 3, 4)],
    [("a", 7, 8), ("c", 4, 13), ("b", 10, 30)],
    [("a", 8, 9), ("b", 30, 31)],
]
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 6},
    "softcap and sinks": {"softcap": 2.0, "sinks": [0.5, -1.0, 2.0, 0.0]},
    "chunk": {"chunk": 8},
    "bias": {"bias": lambda positions: positions.float().expand(HEADS, 1, -1) / 10},
}
WAYS += [(name, "auto") for name in RULES if name != "plain"] + [("softcap and sinks", "int8"), ("bias", "int4")]


def rows(number: int, layer: int, heads: int, count: int, device: str) -> Tensor:
    """Return [heads, count, SIZE] on the device, by a copy that nobody waits for."""
    made = torch.randn(heads, count, SIZE, generator=torch.Generator().manual_seed(1000 * number + 10 * layer + heads))
    return made.to(device, non_blocking=True)


def run_pass(number: int, store: Any, rule: Rule, device: str, shared: int | None) -> list[Tensor]:
    """Run two layers of a micro-batch, which may park; return what attention makes."""
    batch = MicroBatch(tuple(Span(name, start, end - start) for name, start, end in PASSES[number]), store, 40)
    made = []

    def body() -> None:
        CURRENT.set(batch)
        for layer in range(2):
            count = batch.num_tokens
            query, key = (rows(number, layer, heads, count, device) for heads in (HEADS, KEY_HEADS))
            new = (key.transpose(0, 1),) if shared else (key.transpose(0, 1), (key * 2 - 1).transpose(0, 1))
            kept = store.append(layer, batch.places, *new)
            made.append(attention.attend_rows(query, kept.sharing_values(shared) if shared else kept, rule))

    forward = greenlet(body)
    while not forward.dead:
        assert forward.switch() is PARKED or forward.dead
    return [one.memory if isinstance(one, There) else one for one in made]


def run(
    device: str, kv_dtype: str, name: str, *, hosted: bool, shared: int | None, windows: bool, disk: Path | None = None
) -> list[Tensor]:
    """Run all passes; with `disk`, what is hosted is on NVMe."""
    token = 2 * (1 if shared else 2) * KEY_HEADS * SIZE * 4
    cost = KVCost(token, 0, 4, ((6, token // 2),) if windows else (), (token // 2,) * 2)
    made = []
    with ExitStack() as stack, torch.inference_mode():
        options: dict[str, Any] = {"device": torch.device(device), "kv_dtype": kv_dtype}
        limit = 0 if hosted else cost.of(40) * 4
        store = open_kv(limit_nbytes=limit, cost=cost, windows={1: 6} if windows else {}, **options)
        if disk:
            sizes = 4 * cost.on_disk.of(40), cost.on_disk.of(40)
            options["nvme"] = DiskRoom(*sizes, directory=disk, settings=ReadSettings(backend="threads"))
        in_host = cost.of(40) * 4 if hosted and not disk else 0
        home = stack.enter_context(KVHomes(store, cost=cost, host_nbytes=in_host, **options))
        for sequence in "abc":
            home.acquire(sequence, num_tokens=10 if sequence == "a" else 32)
        values = dict(RULES[name])
        if "sinks" in values:
            values["sinks"] = torch.tensor(values["sinks"]).to(device, non_blocking=True)
        for number in range(len(PASSES)):
            made += run_pass(number, home.store_of("a"), Rule(0.3, **values), device, shared)
            home.check_integrity()
        for sequence in "abc":
            home.release(sequence)
    return made


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes, "load_attend_paged", lambda _: attend_paged)


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs passes on both devices, compares them, and returns how many copies came late."""

    def both(*args: Any, **options: Any) -> int:
        wanted = run("cpu", *args, **options)
        with pretend_cuda(monkeypatch) as stream:
            found = run("cuda", *args, **options)
        assert len(found) == len(wanted) == 2 * len(PASSES)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        return stream.num_late

    return both


@pytest.mark.parametrize(("name", "kv_dtype"), WAYS)
def test_rows_on_the_device(compare, name: str, kv_dtype: str) -> None:
    assert compare(kv_dtype, name, hosted=False, shared=None, windows=False) == 0


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_kernel_for_single_tokens(compare, monkeypatch, kv_dtype: str) -> None:
    kernel = on_memory(paged.attend_paged)
    monkeypatch.setattr(attention, "find_paged", lambda *_: kernel)
    for shared in (None, 4):
        compare(kv_dtype, "softcap and sinks", hosted=False, shared=shared, windows=False)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_windows_on_the_device(compare, kv_dtype: str) -> None:
    compare(kv_dtype, "window", hosted=False, shared=None, windows=True)


@pytest.mark.parametrize(("name", "kv_dtype"), WAYS)
def test_rows_in_host_ram(compare, name: str, kv_dtype: str) -> None:
    """Rows and queries are read no sooner than they have arrived."""
    assert compare(kv_dtype, name, hosted=True, shared=None, windows=False) > 0


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_prompts_go_straight_to_host_ram(compare, monkeypatch, kv_dtype: str) -> None:
    """Rows that lie together are not staged, and read no sooner than others."""
    staged = compare(kv_dtype, "plain", hosted=True, shared=None, windows=False)
    monkeypatch.setattr(kv, "RUN_TOKENS", 2)
    pieces = compare(kv_dtype, "plain", hosted=True, shared=None, windows=False)
    assert pieces > staged, "a copy for each prompt"


@pytest.mark.parametrize(("name", "kv_dtype"), WAYS)
def test_rows_on_nvme(compare, tmp_path: Path, name: str, kv_dtype: str) -> None:
    assert compare(kv_dtype, name, hosted=True, shared=None, windows=False, disk=tmp_path) > 0


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
def test_latents_in_host_ram(compare, kv_dtype: str) -> None:
    assert compare(kv_dtype, "plain", hosted=True, shared=4, windows=False) > 0
