"""Where sequences keep their keys and values: on the device, or in host RAM when the device's room is full.

Each home is a store of blocks. A sequence has one home from its start to its end, and all of its tokens are there. What
it keeps besides (recurrent states, rows of logits) is on the device in any case, so a sequence whose home is host RAM
is in the device's store too, with room for no tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from penstock.errors import BudgetError
from penstock.io.limits import available_cores
from penstock.io.memory import HostMemory
from penstock.kernels.paged_cpu import load_attend_paged
from penstock.offload.blocks import KVCost
from penstock.offload.groups import KVGroups
from penstock.offload.host_kv import HostKV
from penstock.offload.kv import KVStatistics, KVStore
from penstock.offload.tiers import Tier
from penstock.offload.trace import Trace

__all__ = ["HomesStatistics", "KVHomes"]

OTHER_THREADS = 3
"""Cores that attention leaves alone: for the forwards, the disk and the copies."""


@dataclass(frozen=True, slots=True)
class HomesStatistics:
    """A snapshot of every home, and the seconds of attention in host RAM and of waiting for it; `host` may be None."""

    device: KVStatistics
    host: KVStatistics | None
    attention_seconds: float
    waited_seconds: float


class KVHomes:
    """All homes of keys and values; the scheduler's room, and a context manager. Closes the device's store too.

    `host_nbytes` of host RAM, in whole blocks, are taken at once, pinned for CUDA. `cost` is the device store's. The
    kernel for attention there is kept in `kernel_directory`, if given, for the next process. Without room for a block
    in host RAM the device is the only home. Keys and values rest as the store's `kv_dtype`.
    """

    def __init__(
        self,
        store: KVStore | KVGroups,
        *,
        cost: KVCost,
        host_nbytes: int = 0,
        kv_dtype: str = "auto",
        device: torch.device | str = "cpu",
        kernel_directory: Path | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._device = store
        self._cost = cost
        self._homes: dict[Hashable, Tier] = {}
        self._host: HostKV | None = None
        self._exit = ExitStack()
        self._host_cost = KVCost(cost.token_nbytes, 0, cost.block_tokens)  # layers with windows keep all there
        num_blocks = host_nbytes // cost.block_nbytes if cost.block_nbytes else 0
        with ExitStack() as cleanup:
            cleanup.callback(store.close)
            if num_blocks:
                options: dict[str, Any] = {"device": torch.device(device), "kv_dtype": kv_dtype, "trace": trace}
                self._host = self._open_host(num_blocks, kernel_directory, cleanup, **options)
            self._exit = cleanup.pop_all()

    def _open_host(
        self, num_blocks: int, directory: Path | None, cleanup: ExitStack, *, device: torch.device, **options: Any
    ) -> HostKV:
        def allocate(nbytes: int) -> Tensor:
            memory = cleanup.enter_context(HostMemory(nbytes, pin=device.type == "cuda"))
            return torch.frombuffer(memory.view, dtype=torch.uint8)

        limit = num_blocks * self._host_cost.block_nbytes
        host = HostKV(
            KVStore(limit_nbytes=limit, cost=self._host_cost, allocate=allocate),
            states=self._device,
            device=device,
            attend=load_attend_paged(directory),
            num_threads=max(available_cores() - OTHER_THREADS, 1),
            **options,
        )
        cleanup.callback(host.close)
        return host

    def prepare(self, lengths: Sequence[int], *, least: Sequence[int] = ()) -> None:
        """Divide the device's memory for sequences of these lengths, none of which is running yet."""
        self._device.prepare(lengths, least=least, num_elsewhere=self._elsewhere(lengths))

    def _elsewhere(self, lengths: Sequence[int]) -> int:
        """Return how many such sequences can be in host RAM at once, and have what they keep besides on the device."""
        if self._host is None or not lengths:
            return 0
        mean = sum(map(self._host_cost.blocks_of, lengths)) / len(lengths)
        return int(self._host.store.statistics().num_blocks / max(mean, 1))

    def fits(self, num_tokens: int, *, most: int = 0) -> bool:
        """Say whether a sequence of `num_tokens` tokens can be acquired now, in a home that could hold `most`."""
        return self._find(num_tokens, most) is not None

    def _find(self, num_tokens: int, most: int) -> Tier | None:
        if self._device.fits(num_tokens) and self._device.could_hold(most):
            return Tier.DEVICE
        if self._host is None or not self._host.store.could_hold(most):
            return None
        return Tier.HOST if self._host.store.fits(num_tokens) and self._device.fits(0) else None

    def check(self, num_tokens: int, what: str = "a sequence") -> None:
        """Raise BudgetError, naming `what`, when a sequence of `num_tokens` tokens can never be acquired."""
        try:
            self._device.check(num_tokens, what)
        except BudgetError as error:
            if self._host is None:
                raise
            if not self._host.store.could_hold(num_tokens):
                raise BudgetError(
                    f"{error.what} in one home",
                    wanted=error.wanted,
                    got=f"{error.got} on the device, {self._host.store.nbytes} in host RAM",
                    fix="Give one of them more memory, or ask for fewer tokens.",
                ) from None

    def at_once(self, num_tokens: int) -> int:
        """Return how many sequences of so many tokens have room at the same time."""
        count = self._device.at_once(num_tokens, num_elsewhere=self._elsewhere([num_tokens]))
        return count if self._host is None else count + self._host.store.at_once(num_tokens)

    def acquire(self, sequence: Hashable, *, num_tokens: int, most: int = 0) -> None:
        """Reserve room for a sequence of `num_tokens` tokens, and later up to `most`; `fits` has said yes to both."""
        home = self._find(num_tokens, most)
        assert home is not None, "sequences start only when they fit"
        if home is Tier.HOST and self._host is not None:
            self._device.acquire(sequence, num_tokens=0)
            self._host.store.acquire(sequence, num_tokens=num_tokens)
        else:
            self._device.acquire(sequence, num_tokens=num_tokens)
        self._homes[sequence] = home

    def extend(self, sequence: Hashable, *, num_tokens: int) -> bool:
        """Reserve more for a sequence, in its home: `num_tokens` tokens in all. False if too few blocks are free."""
        if self._host is not None and self._homes[sequence] is Tier.HOST:
            return self._host.store.extend(sequence, num_tokens=num_tokens)
        return self._device.extend(sequence, num_tokens=num_tokens)

    def home_of(self, sequence: Hashable) -> Tier:
        """Return where a sequence's keys and values are."""
        return self._homes[sequence]

    def store_of(self, sequence: Hashable) -> KVStore | KVGroups | HostKV:
        """Return the store that a micro-batch with this sequence works with."""
        if self._host is not None and self._homes[sequence] is Tier.HOST:
            return self._host
        return self._device

    def release(self, sequence: Hashable) -> None:
        """Give back all that a sequence holds."""
        if self._homes.pop(sequence) is Tier.HOST and self._host is not None:
            self._host.release(sequence)
        self._device.release(sequence)

    def check_integrity(self) -> None:
        """Wait for the rows that are on their way to host RAM, and assert that no home has lost or shared a block.

        Raises what went wrong on their way.
        """
        self._device.check_integrity()
        if self._host is not None:
            self._host.settle()
            self._host.store.check_integrity()
            hosted = sum(home is Tier.HOST for home in self._homes.values())
            assert hosted == self._host.store.statistics().num_sequences, "a sequence's home has its blocks"
        assert len(self._homes) == self._device.statistics().num_sequences, "every sequence has a home"

    def statistics(self) -> HomesStatistics:
        """Return a snapshot."""
        host = self._host
        return HomesStatistics(
            device=self._device.statistics(),
            host=host.store.statistics() if host else None,
            attention_seconds=host.attention_seconds if host else 0.0,
            waited_seconds=host.waited_seconds if host else 0.0,
        )

    def close(self) -> None:
        """Let what is under way end and give all memory back. Sequences may still be released."""
        self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
