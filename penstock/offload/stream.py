"""The weight stream: hands out layers in order while later ones are already on their way.

Layers that live on the device have buffers of their own. All others share a few slots, and so do those that live there
packed: streamed layer number s always uses slot s mod num_slots, so parameters are bound to their slot once and never
again. A slot goes round its own cycle of layers; as soon as a layer's work has been issued its slot is refilled with
the next of the cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from penstock.errors import ClosedError
from penstock.io.checkpoint import Checkpoint
from penstock.io.choose import ReaderChoice, open_reader
from penstock.io.memory import HostMemory
from penstock.io.reader import ALIGNMENT, Reader, ReaderStatistics
from penstock.io.settings import NUM_REGIONS, ReadSettings
from penstock.offload.checks import UnitChecks, verify_by_itself
from penstock.offload.chunks import Chunk, plan_chunks
from penstock.offload.clock import Stopwatch
from penstock.offload.copies import EXPAND, TRANSFER, Copies, copies_for
from penstock.offload.lane import DiskLane, Fetch, Ring
from penstock.offload.layout import Layout
from penstock.offload.manifest import Check
from penstock.offload.packing import Packer, piece_for
from penstock.offload.plan import Plan
from penstock.offload.rest import rest_places, source_nbytes
from penstock.offload.tiers import Tier
from penstock.offload.trace import FROM_STAGING, INTO_HOST, STALLS, TO_DEVICE, Trace

__all__ = ["StreamStatistics", "WeightStream"]

_LAYERS = "layers"


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """What has moved so far, in bytes and seconds.

    `device_bytes` counts bytes copied into slots and device layers, `decoded_bytes` those of the parameters that were
    made of them, `disk` what the reader delivered. Computing waited `disk_stall_seconds` for layers that live on NVMe
    and `host_stall_seconds` for layers in host RAM, out of `layers_seconds` between entering the first layer and
    leaving the last. Bringing layers from host RAM took `transfer_seconds`, expanding and converting what had arrived
    `expand_seconds`. All as the device sees it.
    """

    device_bytes: int
    disk: ReaderStatistics
    disk_stall_seconds: float
    host_stall_seconds: float
    layers_seconds: float
    decoded_bytes: int
    transfer_seconds: float
    expand_seconds: float


class _Slot:
    """One reusable buffer; `layer` is the layer that is in it or on its way, `entered` says whether it is in use.

    `released` is the point after which the buffer's bytes are needed no more.
    """

    def __init__(self, buffer: Tensor, cycle: Sequence[int]) -> None:
        self.buffer = buffer
        self.cycle = cycle
        self.layer: int | None = None
        self.arrived: Future[Any] = Future()
        self.arrived.set_result(None)
        self.entered = False
        self.released: Any = None

    def following(self, layer: int, others: Collection[int]) -> int:
        """Return the layer that uses this slot after `layer`, which is none of `others`.

        The last of a pass is followed by the first.
        """
        at = self.cycle.index(layer) + 1
        return next(one for one in (*self.cycle[at:], *self.cycle[:at]) if one == layer or one not in others)


def _cycles(streamed: Sequence[int], packed: Sequence[int], num_slots: int) -> list[Sequence[int]]:
    """Return which layers take turns in each slot.

    Layers that come from elsewhere have slots of their own, where there are enough: two serve those that rest packed
    on the device, so that a copy has all the time until its layer's turn, and not that of a layer or two.
    """
    moved = [index for index in streamed if index not in packed]
    others = min(num_slots - 2, len(moved))
    here = num_slots - others
    if others < 1 or here > len(packed):
        return [streamed[number::num_slots] for number in range(num_slots)]
    return [packed[number::here] for number in range(here)] + [moved[number::others] for number in range(others)]


class WeightStream:
    """Streams a planned model's layers; a `WeightSource`, and a context manager.

    `load` must be called once before the first pass: it fills the tiers that keep their bytes. `resident` is the
    resident unit's buffer and `buffer_of` a layer's: flat uint8 tensors on `device`, at addresses that never change.
    A `reader` that is given is used and closed instead of the one that `settings` choose. Copies, reads and stalls go
    into a `trace` that is given. `checks` are the checksums of a packed checkpoint: what a unit's first arrival brings
    is compared with them, else ChecksumError.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        checkpoint: Checkpoint,
        resident: Layout,
        layers: Sequence[Layout],
        device: torch.device,
        settings: ReadSettings | None = None,
        reader: Reader | None = None,
        trace: Trace | None = None,
        checks: Sequence[Check] = (),
    ) -> None:
        self._layouts = tuple(layers)
        self._resident_layout = resident
        self._device = device
        self._trace = trace
        self._copies = copies_for(device, trace)
        self._watch = Stopwatch(self._copies.clock, trace)
        self._entered: Any = None
        self._moved = self._decoded = 0
        self._room = plan.workspace_nbytes + plan.kv_nbytes
        self.host_nbytes = 0
        """Bytes of host RAM besides the device's buffers: layers that rest there, and what reads land in."""
        self._reads_packed = False
        self._closed = False
        self._exit = ExitStack()
        with ExitStack() as cleanup:
            self.resident = self._allocate(resident.nbytes, cleanup)
            self._place(plan, cleanup)
            self._open_disk(checkpoint, settings or ReadSettings(), reader, cleanup)
            self._resident_checks = UnitChecks(self._resident_layout.extents, self._resident_chunks, checks)
            self._checks = [
                UnitChecks(layout.extents, chunks, checks)
                for layout, chunks in zip(self._layouts, self._chunks, strict=True)
            ]
            self._exit = cleanup.pop_all()

    def _allocate(self, nbytes: int, cleanup: ExitStack) -> Tensor:
        """Return a buffer on the device, aligned to at least 256 bytes; on the CPU in huge pages."""
        if self._device.type != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return torch.frombuffer(cleanup.enter_context(HostMemory(nbytes)).view, dtype=torch.uint8)

    def _place(self, plan: Plan, cleanup: ExitStack) -> None:
        on_device = plan.layers_in(Tier.DEVICE)
        self._packed = on_device if plan.device_packed else ()
        whole = () if plan.device_packed else on_device
        self._own = {index: self._allocate(self._layouts[index].parameter_nbytes, cleanup) for index in whole}
        streamed = [index for index in range(len(self._layouts)) if index not in self._own]
        self._slots = [
            _Slot(self._allocate(plan.slot_nbytes, cleanup), cycle)
            for cycle in _cycles(streamed, self._packed, plan.num_slots)
        ]
        self._slot_of = {index: slot for slot in self._slots for index in slot.cycle}
        pin = self._device.type == "cuda"
        self._rest, self._filled = rest_places(self._layouts, plan.layers_in(Tier.HOST), cleanup, pin=pin)
        self.host_nbytes += sum(self._layouts[index].wire_nbytes for index in self._filled)
        self._rest |= {index: self._allocate(self._layouts[index].wire_nbytes, cleanup) for index in self._packed}

    def _open_disk(
        self, checkpoint: Checkpoint, settings: ReadSettings, given: Reader | None, cleanup: ExitStack
    ) -> None:
        units = (self._resident_layout, *self._layouts)
        largest = max(source_nbytes(unit) for unit in units)
        region = min(settings.region_nbytes, -(-largest // ALIGNMENT) * ALIGNMENT + ALIGNMENT)
        staging = cleanup.enter_context(HostMemory(NUM_REGIONS * region, pin=self._device.type == "cuda"))
        self.host_nbytes += NUM_REGIONS * region
        if given is None:
            given, self.reader_choice = open_reader(
                settings.backend, checkpoint.files[0], staging.view[:region], block_nbytes=settings.block_nbytes
            )
        else:
            self.reader_choice = ReaderChoice(given.name, direct=False, reason="it was given", rejected=())
        self._reader = cleanup.enter_context(given)
        self._chunks: list[Sequence[Chunk]] = [
            plan_chunks(layout.extents, chunk_nbytes=region) for layout in self._layouts
        ]
        self._resident_chunks = plan_chunks(self._resident_layout.extents, chunk_nbytes=region)
        self._region_nbytes = region
        self._lane = DiskLane(given, Ring(staging, num_regions=NUM_REGIONS), self._trace)
        cleanup.callback(self._lane.close)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="penstock-copy")
        cleanup.callback(self._copier.shutdown)

    @property
    def traced(self) -> Callable[..., AbstractContextManager[None]]:
        """What puts computing into the trace, if there is one: enter it with a lane, a name, and more to show."""
        return self._copies.traced

    def buffer_of(self, index: int) -> Tensor:
        """Return the buffer in which layer `index` is found while it is handed out."""
        return self._own[index] if index in self._own else self._slot_of[index].buffer

    def packed_of(self, index: int) -> Tensor | None:
        """Return the wire bytes of layer `index` where they rest on the device, besides the buffer."""
        return self._rest[index] if index in self._packed else None

    def read_packed(self, wanted: bool) -> None:
        """Say whether the next passes' computing reads layers that rest packed on the device where they are.

        For between passes. Such layers need no slot then, and are not expanded.
        """
        self._reads_packed = wanted

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read what stays in the device and host tiers, then start on the first layers of a pass.

        `progress` is called with (bytes done, bytes in all) after each unit. Raises ReadError, FileChangedError or
        ChecksumError.
        """
        self._copies.wait_for_computing(self._copies.computed())  # buffers may be memory that it was still using
        for check in frozenset().union(*(unit.partial for unit in (self._resident_checks, *self._checks))):
            verify_by_itself(check)
        twins = self._twins()
        kept = [index for index in (None, *self._own, *self._packed, *self._filled) if index not in twins]
        made = [index for index in kept if self._is_made(index)]
        fetches = {index: self._fetch_to_keep(index) for index in kept if index not in made}
        for fetch in fetches.values():
            self._lane.start(fetch)
        total = sum(source_nbytes(self._layout_of(index)) for index in kept)
        done = 0
        for index in chain(self._arrivals(fetches), self._making(made)):
            done += source_nbytes(self._layout_of(index))
            if progress:
                progress(done, total)
        kept_at = self._own | {index: self._rest[index] for index in self._packed}
        with self._copies.issue():
            for index, first in twins.items():
                self._copies.copy(kept_at[index], kept_at[first])
        self._copies.block_until(self._copies.mark())
        for slot in self._slots:
            self._refill(slot, slot.cycle[0])

    def _twins(self) -> dict[int, int]:
        """Return layers that stay on the device, made of the same bytes as another one there, and that one: dummies."""
        first: dict[Any, int] = {}
        twins: dict[int, int] = {}
        for index in (*self._own, *self._packed):
            layout = self._layouts[index]
            if not layout.conversions:
                made_of = index in self._own, layout.extents, layout.encodings
                donor = first.setdefault(made_of, index)
                if donor != index:
                    twins[index] = donor
        return twins

    def _layout_of(self, index: int | None) -> Layout:
        return self._resident_layout if index is None else self._layouts[index]

    def _is_made(self, index: int | None) -> bool:
        """Tell whether more is needed to load a unit than to bring it: it is packed, or keeps its parameters only."""
        layout = self._layout_of(index)
        keeps_less = index is not None and index in self._own and self._own[index].numel() < layout.nbytes
        return keeps_less or bool(layout.encodings)

    def _arrivals(self, fetches: Mapping[int | None, Fetch]) -> Iterator[int | None]:
        """Wait for each unit."""
        for index, fetch in fetches.items():
            fetch.copies.block_until(fetch.arrived.result())
            yield index

    def _making(self, units: Sequence[int | None]) -> Iterator[int | None]:
        """Load units that are made in one go each, layers in a slot, or in memory for a while."""
        if not units:
            return
        needed = max(self._layout_of(index).nbytes for index in units)
        encodings = [one for index in units for one in self._layout_of(index).encodings]
        options = {"chunk_nbytes": self._region_nbytes, "at_once": piece_for(self._room)}
        with ExitStack() as cleanup:
            whole = self._slots[0].buffer if self._slots else self._allocate(needed, cleanup)
            packer = cleanup.enter_context(Packer(encodings, self._lane, self._copies, self._device, **options))
            for index in units:
                self._make(index, self.resident if index is None else whole, packer)
                yield index
            del whole

    def _make(self, index: int | None, whole: Tensor, packer: Packer) -> None:
        """Load a unit in `whole`; keep its parameters, or of one that rests packed its wire bytes."""
        layout = self._layout_of(index)
        fetch = self._fetch_from_disk(index, whole)
        fetch.layout = None  # it is not whole yet
        self._lane.start(fetch)
        self._copies.block_until(fetch.arrived.result())
        packer.fill(layout.encodings, whole)
        packed = self._copies.computed()
        with self._copies.issue():
            self._copies.wait_for_computing(packed)
            if index in self._rest:
                kept, made = self._rest[index], whole[layout.wire_offset : layout.nbytes]
            else:
                self._copies.wait_for_computing(self._copies.expand(layout, whole))
                kept = whole if index is None else self._own[index]
                made = whole[: kept.numel()]
            self._copies.copy(kept, made)
        self._copies.block_until(self._copies.mark())
        fetch.buffer = kept  # the lane may hold on to it longer than `whole` is there

    def _fetch_to_keep(self, index: int | None) -> Fetch:
        """Return the fetch of a unit to where it stays."""
        if index is None or index in self._own:
            return self._fetch_from_disk(index, self.resident if index is None else self._own[index])
        return self._fetch_to_rest(index)

    def _fetch_from_disk(self, index: int | None, buffer: Tensor, after: Any = None) -> Fetch:
        """Return the fetch of a layer, or of the resident unit (None), to its buffer on the device."""
        layout = self._layout_of(index)
        chunks = self._resident_chunks if index is None else self._chunks[index]
        checks = self._resident_checks if index is None else self._checks[index]
        self._moved += sum(chunk.nbytes for chunk in chunks)
        self._decoded += layout.parameter_nbytes
        name = "resident unit" if index is None else f"layer {index}"
        return Fetch(chunks, buffer, 0, self._copies, layout, after, checks.begin(), name=name)

    def _fetch_to_rest(self, index: int) -> Fetch:
        """Return the fetch of a layer to where it rests, in host RAM or packed on the device."""
        is_there = index in self._packed
        return Fetch(
            self._chunks[index],
            self._rest[index],
            self._layouts[index].wire_offset,
            self._copies if is_there else Copies(self._trace),
            verification=self._checks[index].begin(),
            name=f"layer {index}",
            lane=FROM_STAGING if is_there else INTO_HOST,
        )

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Hand out one layer: computing issued inside finds its weights in place."""
        if self._closed:
            raise ClosedError("the weight stream is closed")
        if index == 0:
            self._entered = self._watch.begin()
        slot = self._slot_of.get(index)
        if slot is None or (self._reads_packed and index in self._packed):
            yield
        else:
            with self._arrived(slot, index):
                yield
        if index == len(self._layouts) - 1:
            self._watch.end(_LAYERS, self._entered)

    @contextmanager
    def _arrived(self, slot: _Slot, index: int) -> Iterator[None]:
        """Let computing wait for a layer; on exit refill its slot."""
        if slot.layer != index:
            self._refill(slot, index)
        waiting = None if index in self._packed else self._watch.begin()
        try:
            arrived = slot.arrived.result()
        except BaseException:
            if slot.arrived.done():  # else it was the wait that was interrupted: the layer is still on its way
                slot.layer = None
            raise
        self._copies.wait_for_copies(arrived)
        if waiting is not None:  # else computing waits for computing
            self._watch.end(Tier.HOST if index in self._rest else Tier.NVME, waiting, lane=STALLS, layer=index)
        slot.entered = True
        try:
            yield
        finally:
            slot.released = self._copies.computed()
            self._refill(slot, slot.following(index, self._packed if self._reads_packed else ()))

    def _refill(self, slot: _Slot, index: int) -> None:
        """Bring layer `index` into a slot whose layer has been computed, unless it is there."""
        if slot.layer == index:
            return
        slot.arrived.exception()  # whatever was on its way, also for a pass that was broken off, has ended
        if not slot.entered:  # it may be being expanded still
            slot.released = self._copies.expanded()
        slot.layer, slot.entered = None, False
        if index in self._rest:
            self._moved += 0 if index in self._packed else self._layouts[index].wire_nbytes
            self._decoded += self._layouts[index].parameter_nbytes
            slot.arrived = Future()
            if self._copies.asynchronous:
                self._fetch_from_rest(slot, index, slot.arrived)
            else:
                self._copier.submit(self._fetch_from_rest, slot, index, slot.arrived)
        else:
            fetch = self._fetch_from_disk(index, slot.buffer, slot.released)
            slot.arrived = fetch.arrived
            self._lane.start(fetch)
        slot.layer = index

    def _fetch_from_rest(self, slot: _Slot, index: int, arrived: Future[Any]) -> None:
        layout, buffer = self._layouts[index], slot.buffer
        try:
            if index in self._packed:
                arrived.set_result(self._copies.restore(layout, buffer, self._rest[index], slot.released))
                return
            with self._copies.issue():
                self._copies.wait_for_computing(slot.released)
                self._bring(index, buffer[layout.wire_offset : layout.nbytes])
            arrived.set_result(self._copies.expand(layout, buffer, often=True))
        except BaseException as error:
            arrived.set_exception(error)  # also of Ctrl-C, which comes here where copies are asynchronous
            if not isinstance(error, Exception):
                raise

    def _bring(self, index: int, place: Tensor) -> None:
        """Copy a layer from host RAM."""
        begun = self._copies.watch.begin()
        with self._copies.traced(TO_DEVICE, f"layer {index}", bytes=place.numel()):
            self._copies.copy(place, self._rest[index])
        self._copies.watch.end(TRANSFER, begun)

    def statistics(self) -> StreamStatistics:
        """Return a snapshot."""
        return StreamStatistics(
            device_bytes=self._moved,
            disk=self._reader.statistics(),
            disk_stall_seconds=self._watch.seconds(Tier.NVME),
            host_stall_seconds=self._watch.seconds(Tier.HOST),
            layers_seconds=self._watch.seconds(_LAYERS),
            decoded_bytes=self._decoded,
            transfer_seconds=self._copies.watch.seconds(TRANSFER),
            expand_seconds=self._copies.watch.seconds(EXPAND),
        )

    def close(self) -> None:
        """Let what is under way end, then give all memory back. Tensors bound to it must not be used any more."""
        if not self._closed:
            self._closed = True
            self._lane.close()  # what was only queued is dropped
            self.settle()
            self._own.clear()
            self._rest.clear()
            self._slots.clear()
            self._slot_of.clear()
            del self.resident
            self._exit.close()

    def settle(self) -> None:
        """Block until nothing is on its way into a slot."""
        for slot in self._slots:
            slot.arrived.exception()  # what failed has ended too, but for copies that it had issued before
        self._copies.block_until(self._copies.expanded())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
