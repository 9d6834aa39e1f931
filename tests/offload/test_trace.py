"""A trace tells what the statistics tell, in lanes whose spans do not overlap."""

import json
from collections import defaultdict
from itertools import pairwise

import pytest

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.errors import OutputError
from penstock.io.checkpoint import Checkpoint
from penstock.offload import trace as lanes
from penstock.offload.clock import Clock, Stopwatch
from penstock.offload.trace import Trace

TIERS = {
    "disk": MemoryTiers(device="4MiB", host=0),
    "disk and host": MemoryTiers(device="4MiB", host="300KiB"),
    "host": MemoryTiers(device="4MiB", host="10MiB"),
    "device": MemoryTiers(device="40MiB", host=0),
}


def spans_by_lane(events):
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            spans[names[event["tid"]]].append(event)
    return names, spans


@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
def test_spans_are_the_statistics(tiny_llama, tiers, device, tmp_path):
    trace, file, passes = Trace(), tmp_path / "trace.json", []
    with LLM(tiny_llama, tiers=tiers, device=device, trace=trace, micro_batch_tokens=16, device_layers=1) as llm:
        params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        llm.generate([[1] * 20, [7, 8]], params, on_pass=lambda state: passes.append(state.schedule.micro_batches))
        report = llm.last_run
        region = llm._weights._lane._ring.region_nbytes
        llm.settle()
        statistics = llm._weights.statistics()
        trace.write(file)
    names, spans = spans_by_lane(json.loads(file.read_text())["traceEvents"])
    assert {lanes.TO_DEVICE, lanes.TO_HOST, lanes.COMPUTE, lanes.STALLS} <= set(names.values())

    def total(*wanted):
        return sum(span["args"]["bytes"] for lane in spans for span in spans[lane] if lane.startswith(wanted))

    probe = min(Checkpoint.open(tiny_llama).files[0].nbytes, region)  # read once, to choose a reader
    assert total(lanes.DISK + " ") == statistics.disk.bytes_read - probe
    moved = total(lanes.TO_DEVICE)
    assert moved == statistics.device_bytes
    assert 0 <= report.traffic.device_bytes <= moved
    num_batches = sum(map(len, passes))
    assert num_batches > len(passes)
    assert len(spans[lanes.COMPUTE]) == num_batches * (len(llm.model.layers) + 1)
    assert {span["args"]["micro_batch"] for span in spans[lanes.COMPUTE]} == {0, 1}
    stalled = sum(span["dur"] for span in spans[lanes.STALLS]) / 1e6
    assert stalled == pytest.approx(statistics.disk_stall_seconds + statistics.host_stall_seconds, rel=0.05, abs=1e-3)
    if device == "cpu":
        for lane, members in spans.items():
            ordered = sorted(members, key=lambda span: span["ts"])
            for before, after in pairwise(ordered):
                assert before["ts"] + before["dur"] <= after["ts"] + 0.01, lane


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError):
        Trace().write(tmp_path / "none" / "trace.json")


class Scripted(Clock):
    """A clock whose moments are numbers, of which those up to `passed` have passed."""

    def __init__(self):
        self.moment = self.passed = 0.0

    def now(self):
        self.moment += 1.0
        return self.moment

    def has_passed(self, moment):
        return moment <= self.passed


def test_a_stopwatch_counts_what_has_passed():
    clock = Scripted()
    watch = Stopwatch(clock)
    for _ in range(3):
        watch.end("one", watch.begin())
    assert watch.seconds("one") == 0
    clock.passed = 4.0
    assert watch.seconds("one") == 2
    clock.passed = 100.0
    assert watch.seconds("one") == 3
    assert watch.seconds("other") == 0
    for _ in range(1000):
        watch.end("other", watch.begin())
    clock.passed = 1e9
    assert (watch.seconds("one"), watch.seconds("other")) == (3, 1000)


def test_moments_of_a_device_are_resolved_when_the_trace_is_read():
    class Late(Clock):
        ready = False

        def seconds(self, moment):
            assert self.ready
            return moment

    clock, trace = Late(), Trace()
    with trace.span("compute", "layer 0", clock=clock, tokens=3):
        pass
    clock.ready = True
    (span,) = spans_by_lane(trace.events())[1]["compute"]
    assert span["args"] == {"tokens": 3}
    assert span["dur"] >= 0


def test_nothing_is_recorded_that_nobody_asked_for(tiny_llama, device):
    with LLM(tiny_llama, tiers=TIERS["disk"], device=device) as llm:
        assert llm._executor.traced is None
        with llm._weights.traced("compute", "nothing") as nothing:
            assert nothing is None
