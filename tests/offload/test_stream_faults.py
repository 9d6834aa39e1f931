"""What the weight stream does when reads fail, when a pass is interrupted, and when it is closed in the middle."""

import gc
import threading
from contextlib import suppress

import pytest
import torch
from stream_plans import stream_plan
from test_stream import N, _parameters

from penstock.errors import ClosedError, ReadError
from penstock.io.checkpoint import Checkpoint
from penstock.io.fake import FakeReader, Fault
from penstock.offload.copies import Copies
from penstock.offload.stream import WeightStream
from penstock.offload.tiers import Tier


class GatedReader(FakeReader):
    """Reads wait until the gate is open; `refuse` makes the next submissions fail before anything starts."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.refuse = 0

    def submit(self, reads):
        if self.refuse:
            self.refuse -= 1
            raise ReadError("cannot be opened", file=reads[0].file.path, got="Too many open files")
        return super().submit(reads)

    def wait(self, ticket):
        self.waiting.set()
        self.gate.wait(30)
        super().wait(ticket)


def open_stream(tiny_llama, model, reader, tiers=(N,) * 6, num_slots=2):
    return WeightStream(
        stream_plan(model, tiers, num_slots),
        checkpoint=Checkpoint.open(tiny_llama),
        resident=model.resident,
        layers=model.layer_layouts,
        device=torch.device("cpu"),
        reader=reader,
    )


def check_pass(stream, model, expected):
    for index, layout in enumerate(model.layer_layouts):
        with stream.layer(index):
            assert all(map(torch.equal, _parameters(layout, stream.buffer_of(index)), expected[index])), index


@pytest.mark.parametrize("completion", ["at once", "when waited for", "newest first"])
def test_reads_may_complete_in_any_order(tiny_llama, model, expected, completion):
    with open_stream(tiny_llama, model, FakeReader(completion=completion)) as stream:
        stream.load()
        for _ in range(2):
            check_pass(stream, model, expected)


@pytest.mark.parametrize("fault", [Fault(), Fault("changed")])
@pytest.mark.parametrize("request_number", [3, 7, 12, 20])
def test_a_fault_is_raised_where_the_layer_is_needed_and_the_next_pass_is_right(
    tiny_llama, model, expected, fault, request_number
):
    with open_stream(tiny_llama, model, FakeReader(faults={request_number: fault})) as stream:
        stream.load()
        failures = 0
        for _ in range(8):
            try:
                check_pass(stream, model, expected)
            except (OSError, ValueError):
                failures += 1
        assert failures == 1
        check_pass(stream, model, expected)


@pytest.mark.parametrize("refused", [1, 2, 3, 5])
def test_submissions_that_fail_leave_no_bytes_of_others_behind(tiny_llama, model, expected, refused):
    reader = GatedReader()
    with open_stream(tiny_llama, model, reader) as stream:
        stream.load()
        check_pass(stream, model, expected)
        reader.refuse = refused
        failures = 0
        for _ in range(12):
            try:
                check_pass(stream, model, expected)
            except ReadError:
                failures += 1
        assert 1 <= failures <= refused
        check_pass(stream, model, expected)


def test_an_interrupt_while_waiting_does_not_corrupt_the_next_pass(tiny_llama, model, expected):
    reader = GatedReader()
    tiers = [Tier.HOST, N] * 3
    with open_stream(tiny_llama, model, reader, tiers, num_slots=1) as stream:
        stream.load()
        with stream.layer(0):
            reader.gate.clear()
        slot = stream._slot_of[1]
        interrupted = slot.arrived

        class Interrupted:
            """Stands for the moment in which Ctrl-C reaches the main thread, in the middle of the wait."""

            def result(self):
                raise KeyboardInterrupt

            def __getattr__(self, name):
                return getattr(interrupted, name)

        slot.arrived = Interrupted()
        with pytest.raises(KeyboardInterrupt), stream.layer(1):
            pass
        threading.Timer(0.05, reader.gate.set).start()
        check_pass(stream, model, expected)
        check_pass(stream, model, expected)


class AsynchronousCopies(Copies):
    """Issued by the computing's thread, as on CUDA, where Ctrl-C and conversions without memory come in the middle."""

    asynchronous = True
    error: BaseException | None = None
    marks = 0

    def copy(self, destination, source):
        super().copy(destination, source)
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def mark(self):
        self.marks += 1
        return self.marks

    def block_until(self, mark):
        self.blocked_until = mark


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no memory for a conversion")])
def test_an_error_while_copies_are_issued_leaves_nothing_that_is_waited_for_in_vain(
    tiny_llama, model, expected, monkeypatch, error
):
    copies = AsynchronousCopies()
    monkeypatch.setattr("penstock.offload.stream.copies_for", lambda *_, **__: copies)
    with open_stream(tiny_llama, model, FakeReader(), (Tier.HOST,) * 6) as stream:
        stream.load()
        with stream.layer(0):
            pass
        copies.error = error
        with pytest.raises(type(error)):
            with stream.layer(1):
                pass
            with stream.layer(2), stream.layer(3):
                pass
        assert all(slot.arrived.done() for slot in stream._slots)
        check_pass(stream, model, expected)
        copies.error = error
        with suppress(BaseException), stream.layer(0):
            pass
        last = copies.marks
    assert copies.blocked_until > last, "what had been issued before the error has ended before memory is given back"


def test_a_layer_that_nobody_entered_is_expanded_before_its_slot_is_filled_again(tiny_llama, model, monkeypatch):
    """Else a decoder would read bytes that are being replaced."""

    class Marked(AsynchronousCopies):
        waited = ()

        def expanded(self):
            return f"expanded {self.mark()}"

        def computed(self):
            return "computed"

        def wait_for_computing(self, mark):
            self.waited = (*self.waited, mark)

    copies = Marked()
    monkeypatch.setattr("penstock.offload.stream.copies_for", lambda *_, **__: copies)
    with open_stream(tiny_llama, model, FakeReader(), (Tier.HOST,) * 6) as stream:
        stream.load()
        copies.waited = ()
        for index in range(6):
            with stream.layer(index):
                pass
        assert copies.waited == ("computed",) * 6
        copies.waited = ()
        for index in (0, 0, 1):  # a pass is broken off, and begins anew
            with stream.layer(index):
                pass
        first, again, *others = copies.waited
        assert again.startswith("expanded")
        assert {first, *others} == {"computed"}


def test_closing_drops_what_is_only_queued(tiny_llama, model):
    reader = GatedReader()
    stream = open_stream(tiny_llama, model, reader, (Tier.DEVICE,) * 6, num_slots=0)
    reader.gate.clear()
    errors = []

    def load():
        try:
            stream.load()
        except ClosedError as error:
            errors.append(error)

    loading = threading.Thread(target=load)
    loading.start()
    reader.waiting.wait(30)
    threading.Timer(0.05, reader.gate.set).start()
    stream._lane.close()
    loading.join(30)
    assert not loading.is_alive()
    assert len(errors) == 1
    assert len(reader.submitted) <= 4, "no more than the staging ring held"
    stream.close()


def test_layers_that_are_on_their_way_when_the_stream_is_closed_hold_no_memory(tiny_llama, model, caplog):
    reader = GatedReader()
    gc.disable()  # what it would find in its time is too late
    try:
        stream = open_stream(tiny_llama, model, reader, num_slots=4)
        stream.load()
        stream.settle()
        reader.gate.clear()
        for index in range(4):
            with stream.layer(index):
                pass
        closing = threading.Timer(0.05, reader.gate.set)
        closing.start()
        stream.close()
    finally:
        gc.enable()
    assert [record.getMessage() for record in caplog.records] == []
