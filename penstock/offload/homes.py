"""Where sequences keep their keys and values: on the device, in host RAM when the device's room is full, then on NVMe.

Each home is a store of blocks. A sequence has one home from its start to its end, and all of its tokens are there. What
it keeps besides (recurrent states, rows of logits) is on the device in any case, so a sequence whose home is elsewhere
is in the device's store too, with room for no tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from penstock.errors import BudgetError
from penstock.io.choose import open_reader
from penstock.io.limits import available_cores
from penstock.io.memory import HostMemory
from penstock.io.reserve import reserved_file
from penstock.kernels.paged_cpu import load_attend_paged
from penstock.offload.blocks import KVCost
from penstock.offload.disk_kv import DiskKV, DiskRoom, DiskTraffic
from penstock.offload.groups import KVGroups
from penstock.offload.host_kv import HostKV
from penstock.offload.kv import KVStatistics, KVStore
from penstock.offload.tiers import Tier
from penstock.offload.trace import KV_ATTENTION, Trace

__all__ = ["HomesStatistics", "KVHomes", "attention_threads"]

OTHER_THREADS = 3
"""Cores that attention leaves alone: for the forwards, the disk and the copies."""


def attention_threads() -> int:
    """Return how many threads attention beside the device has."""
    return max(available_cores() - OTHER_THREADS, 1)


_THERE = {Tier.HOST: "in host RAM", Tier.NVME: "on NVMe"}


@dataclass(frozen=True, slots=True)
class HomesStatistics:
    """A snapshot of every home, None for one that is not there; seconds of attention beside the device, and of waiting.

    `disk` is what went from and to the one on NVMe.
    """

    device: KVStatistics
    host: KVStatistics | None
    attention_seconds: float
    waited_seconds: float
    nvme: KVStatistics | None = None
    disk: DiskTraffic = field(default_factory=DiskTraffic)


class KVHomes:
    """All homes of keys and values; the scheduler's room, and a context manager. Closes the device's store too.

    `host_nbytes` of host RAM, in whole blocks, are taken at once, pinned for CUDA, and so is the disk's room, where
    given. `cost` is the device store's. The kernel for attention there is kept in `kernel_directory`, if given, for the
    next process. A home without room for a block is none. Keys and values rest as the store's `kv_dtype`.
    """

    def __init__(
        self,
        store: KVStore | KVGroups,
        *,
        cost: KVCost,
        host_nbytes: int = 0,
        nvme: DiskRoom | None = None,
        kv_dtype: str = "auto",
        device: torch.device | str = "cpu",
        kernel_directory: Path | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._device = store
        self._cost = cost
        self._homes: dict[Hashable, Tier] = {}
        self.beside: dict[Tier, HostKV] = {}
        """The homes beside the device, in the order in which they are filled."""
        self._exit = ExitStack()
        num_blocks = host_nbytes // cost.block_nbytes if cost.block_nbytes else 0
        options: dict[str, Any] = {"device": torch.device(device), "kv_dtype": kv_dtype, "trace": trace}
        with ExitStack() as cleanup:
            cleanup.callback(store.close)
            if num_blocks:
                in_host = self._open_host(num_blocks, cleanup, pin=options["device"].type == "cuda")
                self.beside[Tier.HOST] = self._open(in_host, kernel_directory, cleanup, **options)
            if nvme is not None and cost.block_nbytes and nvme.nbytes >= cost.on_disk.block_nbytes:
                on_disk = self._open_disk(nvme, cleanup, trace)
                self.beside[Tier.NVME] = self._open(on_disk, kernel_directory, cleanup, lane=KV_ATTENTION, **options)
            self._exit = cleanup.pop_all()

    def _open_host(self, num_blocks: int, cleanup: ExitStack, *, pin: bool) -> KVStore:
        def allocate(nbytes: int) -> Tensor:
            memory = cleanup.enter_context(HostMemory(nbytes, pin=pin))
            return torch.frombuffer(memory.view, dtype=torch.uint8)

        cost = self._cost.in_host
        return KVStore(limit_nbytes=num_blocks * cost.block_nbytes, cost=cost, allocate=allocate)

    def _open_disk(self, room: DiskRoom, cleanup: ExitStack, trace: Trace | None) -> DiskKV:
        file = cleanup.enter_context(reserved_file(room.directory, room.nbytes))
        memory = cleanup.enter_context(HostMemory(room.landing_nbytes)).view
        settings, reader = room.settings, room.reader
        if reader is None:
            reader, _ = open_reader(settings.backend, file, memory, block_nbytes=settings.block_nbytes)
        cleanup.enter_context(reader)
        landing = torch.frombuffer(memory, dtype=torch.uint8)
        return DiskKV(file, reader, landing, cost=self._cost, directory=room.directory, trace=trace)

    def _open(self, store: KVStore, directory: Path | None, cleanup: ExitStack, **options: Any) -> HostKV:
        home = HostKV(
            store,
            states=self._device,
            attend=load_attend_paged(directory),
            num_threads=attention_threads(),
            **options,
        )
        cleanup.callback(home.close)
        return home

    def prepare(self, lengths: Sequence[int], *, least: Sequence[int] = ()) -> None:
        """Divide the device's memory for sequences of these lengths, none of which is running yet."""
        self._device.prepare(lengths, least=least, num_elsewhere=self._elsewhere(lengths))

    def _elsewhere(self, lengths: Sequence[int]) -> int:
        """Return how many such sequences can be elsewhere at once, and have what they keep besides on the device."""
        if not self.beside or not lengths:
            return 0
        mean = sum(map(self._cost.in_host.blocks_of, lengths)) / len(lengths)
        return int(sum(home.store.statistics().num_blocks for home in self.beside.values()) / max(mean, 1))

    def fits(self, num_tokens: int, *, most: int = 0) -> bool:
        """Say whether a sequence of `num_tokens` tokens can be acquired now, in a home that could hold `most`."""
        return self._find(num_tokens, most) is not None

    def _find(self, num_tokens: int, most: int) -> Tier | None:
        if self._device.fits(num_tokens) and self._device.could_hold(most):
            return Tier.DEVICE
        if not self.beside or not self._device.fits(0):
            return None
        stores = ((tier, home.store) for tier, home in self.beside.items())
        return next((tier for tier, store in stores if store.fits(num_tokens) and store.could_hold(most)), None)

    def check(self, num_tokens: int, what: str = "a sequence") -> None:
        """Raise BudgetError, naming `what`, when a sequence of `num_tokens` tokens can never be acquired."""
        try:
            self._device.check(num_tokens, what)
        except BudgetError as error:
            if not self.beside:
                raise
            if not any(home.store.could_hold(num_tokens) for home in self.beside.values()):
                there = (f"{home.store.nbytes} {_THERE[tier]}" for tier, home in self.beside.items())
                raise BudgetError(
                    f"{error.what} in one home",
                    wanted=error.wanted,
                    got=", ".join((f"{error.got} on the device", *there)),
                    fix="Give one of them more memory, or ask for fewer tokens.",
                ) from None

    def at_once(self, num_tokens: int) -> int:
        """Return how many sequences of so many tokens have room at the same time; called while none is running."""
        self.prepare([num_tokens])
        tried: list[Hashable] = []
        try:
            while self.fits(num_tokens, most=num_tokens):
                tried.append(("at once", len(tried)))
                self.acquire(tried[-1], num_tokens=num_tokens, most=num_tokens)
        finally:
            for sequence in tried:
                self.release(sequence)
        return len(tried)

    def acquire(self, sequence: Hashable, *, num_tokens: int, most: int = 0) -> None:
        """Reserve room for a sequence of `num_tokens` tokens, and later up to `most`; `fits` has said yes to both."""
        home = self._find(num_tokens, most)
        assert home is not None, "sequences start only when they fit"
        self._device.acquire(sequence, num_tokens=num_tokens if home is Tier.DEVICE else 0)
        if home is not Tier.DEVICE:
            self.beside[home].store.acquire(sequence, num_tokens=num_tokens)
        self._homes[sequence] = home

    def extend(self, sequence: Hashable, *, num_tokens: int) -> bool:
        """Reserve more for a sequence, in its home: `num_tokens` tokens in all. False if too few blocks are free."""
        home = self.beside.get(self._homes[sequence])
        store = self._device if home is None else home.store
        return store.extend(sequence, num_tokens=num_tokens)

    def home_of(self, sequence: Hashable) -> Tier:
        """Return where a sequence's keys and values are."""
        return self._homes[sequence]

    def store_of(self, sequence: Hashable) -> KVStore | KVGroups | HostKV:
        """Return the store that a micro-batch with this sequence works with."""
        return self.beside.get(self._homes[sequence], self._device)

    def release(self, sequence: Hashable) -> None:
        """Give back all that a sequence holds."""
        home = self.beside.get(self._homes.pop(sequence))
        if home is not None:
            home.release(sequence)
        self._device.release(sequence)

    def check_integrity(self) -> None:
        """Wait for the rows that are on their way, and assert that no home has lost or shared a block.

        Raises what went wrong on their way.
        """
        self._device.check_integrity()
        for tier, there in self.beside.items():
            there.settle()
            there.store.check_integrity()
            count = sum(home is tier for home in self._homes.values())
            assert count == there.store.statistics().num_sequences, "a sequence's home has its blocks"
        assert len(self._homes) == self._device.statistics().num_sequences, "every sequence has a home"

    def statistics(self) -> HomesStatistics:
        """Return a snapshot."""
        stores = {tier: home.store for tier, home in self.beside.items()}
        on_disk = stores.get(Tier.NVME)
        return HomesStatistics(
            device=self._device.statistics(),
            host=stores[Tier.HOST].statistics() if Tier.HOST in stores else None,
            attention_seconds=sum(home.attention_seconds for home in self.beside.values()),
            waited_seconds=sum(home.waited_seconds for home in self.beside.values()),
            nvme=on_disk.statistics() if on_disk else None,
            disk=on_disk.traffic if isinstance(on_disk, DiskKV) else DiskTraffic(),
        )

    def close(self) -> None:
        """Let what is under way end and give all memory back. Sequences may still be released."""
        self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
