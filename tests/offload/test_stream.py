"""The weight stream hands out the same bytes as a plain read, whatever the tiers, slots and reader."""

from dataclasses import replace

import pytest
import torch
from stream_plans import stream_plan

from penstock.engine.model.build import load_model
from penstock.errors import ClosedError, FileChangedError, PenstockError
from penstock.io.checkpoint import Checkpoint
from penstock.io.settings import ReadSettings
from penstock.offload.source import read_unit
from penstock.offload.stream import WeightStream, _cycles
from penstock.offload.tiers import Tier


def _parameters(layout, buffer):
    return [buffer[view.offset : view.offset + view.nbytes].cpu().clone() for view in layout.parameters]


def open_stream(tiny_llama, model, tiers, num_slots, device, io_backend="auto"):
    return WeightStream(
        stream_plan(model, tiers, num_slots),
        checkpoint=Checkpoint.open(tiny_llama),
        resident=model.resident,
        layers=model.layer_layouts,
        device=torch.device(device),
        settings=ReadSettings(backend=io_backend),
    )


D, H, N = Tier.DEVICE, Tier.HOST, Tier.NVME
PLACEMENTS = [
    ([N] * 6, 1),
    ([N] * 6, 2),
    ([N] * 6, 4),
    ([H] * 6, 1),
    ([H] * 6, 3),
    ([D] * 6, 0),
    ([D, H, N, D, H, N], 2),
    ([H, N, H, N, N, D], 3),
    ([N, D, D, D, D, D], 1),
]


@pytest.mark.parametrize("io_backend", ["libaio", "threads", "aiofiles"])
@pytest.mark.parametrize(("tiers", "num_slots"), PLACEMENTS)
def test_layers_are_those_of_the_checkpoint(tiny_llama, model, expected, device, tiers, num_slots, io_backend):
    with open_stream(tiny_llama, model, tiers, num_slots, device, io_backend) as stream:
        loaded = []
        stream.load(lambda done, total: loaded.append((done, total)))
        assert loaded[-1][0] == loaded[-1][1]
        for _ in range(3):
            for index, layout in enumerate(model.layer_layouts):
                with stream.layer(index):
                    found = _parameters(layout, stream.buffer_of(index))
                assert all(map(torch.equal, found, expected[index])), f"layer {index}"
        resident = torch.zeros(model.resident.nbytes, dtype=torch.uint8)
        read_unit(model.resident, resident)
        assert all(
            map(torch.equal, _parameters(model.resident, stream.resident), _parameters(model.resident, resident))
        )


def test_a_pass_that_was_broken_off_does_no_harm(tiny_llama, model, expected, device):
    with open_stream(tiny_llama, model, [N, H] * 3, 2, device) as stream:
        stream.load()
        for stop in (1, 4, 0, 5):
            for index in range(stop + 1):
                try:
                    with stream.layer(index):
                        if index == stop:
                            raise KeyError
                except KeyError:
                    break
            for index, layout in enumerate(model.layer_layouts):
                with stream.layer(index):
                    assert all(map(torch.equal, _parameters(layout, stream.buffer_of(index)), expected[index]))


def test_streamed_bytes_are_counted(tiny_llama, model, device):
    with open_stream(tiny_llama, model, [D, H, N, N, N, N], 1, device) as stream:
        stream.load()
        before = stream.statistics()
        for _ in range(2):
            for index in range(6):
                with stream.layer(index):
                    pass
        after = stream.statistics()
    layer = model.layer_layouts[0].wire_nbytes
    moved = after.device_bytes - before.device_bytes
    assert moved == 10 * layer, "every streamed layer twice; the first of the next pass is on its way"
    assert after.disk.bytes_read - before.disk.bytes_read >= 8 * layer


def test_a_layer_that_fits_its_slot_for_good_is_read_once(tiny_llama, model, device):
    with open_stream(tiny_llama, model, [N, D, D, D, D, D], 1, device) as stream:
        stream.load()
        with stream.layer(0):
            pass
        before = stream.statistics().disk.bytes_read
        for _ in range(3):
            with stream.layer(0):
                pass
        assert stream.statistics().disk.bytes_read == before


def test_a_shard_that_is_cut_short_while_running_is_named(tiny_llama, model, device, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    broken = load_model(copy, dtype="auto", device="cpu")
    with open_stream(copy, broken, [N] * 6, 1, device) as stream:
        stream.load()
        with stream.layer(0):
            pass
        victim = broken.layer_layouts[5].extents[0].file.path
        with victim.open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(PenstockError) as caught:
            for index in range(1, 6):
                with stream.layer(index):
                    pass
        assert isinstance(caught.value, FileChangedError)
        assert str(victim) in str(caught.value)
        with stream.layer(0):
            pass


def test_use_after_close_is_refused_and_closing_twice_is_fine(tiny_llama, model, device):
    stream = open_stream(tiny_llama, model, [N] * 6, 2, device)
    stream.load()
    stream.close()
    stream.close()
    with pytest.raises(ClosedError), stream.layer(0):
        pass


def test_closing_leaves_no_thread_and_no_descriptor(tiny_llama, model, device):
    import os
    import threading

    def state():
        return {t.name for t in threading.enumerate() if t.name.startswith("penstock")}, len(
            os.listdir("/proc/self/fd")
        )

    open_stream(tiny_llama, model, [N] * 6, 2, device).close()
    before = state()
    with open_stream(tiny_llama, model, [N, H] * 3, 2, device) as stream:
        stream.load()
        assert state() != before
    assert state() == before


DONORS = [0, 1, 0, 1, 0, 5]
"""Whose bytes the layers of an aliased model have."""


def open_aliased(tiny_llama, model, tier, num_slots, device):
    layouts = model.layer_layouts
    return WeightStream(
        stream_plan(model, [tier] * 6, num_slots),
        checkpoint=Checkpoint.open(tiny_llama),
        resident=model.resident,
        layers=[replace(layout, extents=layouts[donor].extents) for layout, donor in zip(layouts, DONORS, strict=True)],
        device=torch.device(device),
    )


def test_layers_of_the_same_bytes_share_host_memory(tiny_llama, model, expected, device):
    layouts = model.layer_layouts
    with open_aliased(tiny_llama, model, H, 2, device) as stream:
        stream.load()
        places = [stream._rest[index].data_ptr() for index in range(6)]
        assert [places.index(place) for place in places] == DONORS
        read = stream.statistics()
        for _ in range(2):
            for index, donor in enumerate(DONORS):
                with stream.layer(index):
                    for got, wanted in zip(
                        _parameters(layouts[donor], stream.buffer_of(index)), expected[donor], strict=True
                    ):
                        assert torch.equal(got, wanted)
        after = stream.statistics()
    assert after.disk.bytes_read == read.disk.bytes_read
    assert after.device_bytes - read.device_bytes == sum(2 * layout.wire_nbytes for layout in layouts)


def test_layers_of_the_same_bytes_are_read_once_for_the_device(tiny_llama, model, expected, device):
    layouts = model.layer_layouts
    with open_aliased(tiny_llama, model, D, 0, device) as stream:
        stream.load()
        for index, donor in enumerate(DONORS):
            with stream.layer(index):
                found = _parameters(layouts[donor], stream.buffer_of(index))
            assert all(map(torch.equal, found, expected[donor]))
        once = model.resident.nbytes + sum(layouts[index].wire_nbytes for index in set(DONORS))
        assert stream.statistics().device_bytes <= once


@pytest.mark.parametrize(
    ("streamed", "packed", "num_slots", "cycles"),
    [
        ([0, 1, 2, 3, 4], [], 2, [[0, 2, 4], [1, 3]]),
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], 3, [[0, 3], [1, 4], [2]]),
        ([0, 1, 2, 3, 4], [0, 1, 3, 4], 2, [[0, 2, 4], [1, 3]]),
        ([0, 1, 2, 3, 4], [0, 1, 3, 4], 3, [[0, 3], [1, 4], [2]]),
        ([0, 1, 2, 3, 4, 5], [1, 3], 4, [[1], [3], [0, 4], [2, 5]]),
        ([0, 1, 2], [0], 3, [[0], [1], [2]]),
    ],
)
def test_layers_that_come_from_elsewhere_have_slots_of_their_own(streamed, packed, num_slots, cycles):
    assert _cycles(streamed, packed, num_slots) == cycles
