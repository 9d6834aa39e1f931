"""Phases, shares and stalls of a bench, on a run whose numbers are known."""

import json

import pytest

from penstock import LLM, MemoryTiers
from penstock.engine.bench import Workload, run_bench
from penstock.engine.model.dummy import dummy_checkpoint
from penstock.errors import BudgetError, ConfigError
from penstock.offload.peaks import DiskPeak, Peaks

BUDGETS = {
    "disk": MemoryTiers(device="4MiB", host=0),
    "mixed": MemoryTiers(device="4MiB", host="300KiB"),
    "host": MemoryTiers(device="4MiB", host="10MiB"),
}


@pytest.fixture
def checkpoint(tiny_llama, tmp_path):
    with dummy_checkpoint(tiny_llama, scratch=tmp_path, distinct=2) as made:
        yield made


def bench(path, checkpoint, device, tiers, workload, **settings):
    peaks = Peaks("a device", 1e9, 1e10, DiskPeak(checkpoint.files[0]), {"float32": 1e9})
    with LLM(path, tiers=tiers, device=device, checkpoint=checkpoint, device_layers=0, **settings) as llm:
        return run_bench(llm, workload, peaks, settings={})


@pytest.mark.parametrize("tiers", BUDGETS.values(), ids=BUDGETS)
def test_every_pass_moves_the_whole_model(tiny_llama, checkpoint, device, tiers):
    report = bench(tiny_llama, checkpoint, device, tiers, Workload(10, 5, 3))
    assert report.run.plan.layers_in("device") == ()
    wire = report.run.plan.host_nbytes + report.run.plan.nvme_nbytes
    assert (report.prefill.passes, report.decode.passes, report.steady.passes) == (1, 4, 3)
    for phase in (report.prefill, report.decode, report.steady):
        assert phase.traffic.device_bytes == phase.passes * wire
        assert sum(phase.time.values()) == pytest.approx(1)
        assert min(phase.time.values()) >= 0
    assert (report.prefill.tokens, report.prefill.generated) == (30, 3)
    assert (report.decode.tokens, report.decode.generated) == (12, 12)
    flops = report.flops
    if report.run.plan.nvme_nbytes == 0:
        assert (report.forecast.passes, report.forecast.generated_tokens) == (5, 15)
    pairs = sum(flops.per_pair.values())
    assert report.prefill.flops == 30 * flops.per_token + 3 * flops.per_row + pairs * 3 * 55
    assert report.steady.flops == 9 * flops.per_token + 9 * flops.per_row + pairs * 3 * (12 + 13 + 14)


def test_rates_and_shares_are_ratios_of_what_is_reported(tiny_llama, checkpoint, device):
    report = bench(tiny_llama, checkpoint, device, BUDGETS["mixed"], Workload(10, 5, 3))
    record = json.loads(json.dumps(report.as_dict()))
    assert record["forecast"] is None, "the disk was not measured"
    assert record["tokens_per_second"] == pytest.approx(
        15 / (record["prefill"]["seconds"] + record["decode"]["seconds"])
    )
    for name in ("prefill", "decode", "decode_steady"):
        phase = record[name]
        link = phase["links"]["host_to_device"]
        assert link["gbps"] == pytest.approx(link["bytes"] / phase["seconds"] / 1e9)
        assert link["share_of_peak"] == pytest.approx(link["gbps"])  # the peak is 1 GB/s
        assert phase["tflops"] == pytest.approx(phase["flops"] / phase["seconds"] / 1e12)
        assert phase["share_of_matmul"] == pytest.approx(phase["tflops"] * 1e3)
    assert record["layers"]["host"] > 0
    assert record["layers"]["nvme"] > 0
    assert "peak unknown" in report.explain()  # the file is too small to measure a disk with
    assert record["decode"]["links"]["nvme_to_host"]["share_of_peak"] is None


def test_attention_in_host_ram_has_its_share_of_the_time(tiny_llama, checkpoint, device, kernel_directory):
    tiers = MemoryTiers(device="900KiB", host="10MiB", kv_host="1MiB")
    report = bench(tiny_llama, checkpoint, device, tiers, Workload(50, 16, 8), kernel_directory=kernel_directory)
    record = json.loads(json.dumps(report.as_dict()))
    assert sum(record["decode"]["time"].values()) == pytest.approx(1)
    assert record["decode"]["time"]["attention_in_host"] >= 0
    assert record["attention_in_host"]["peak_sequences"] > 0
    assert record["attention_in_host"]["busy_seconds"] > 0
    assert "attention in host" in report.explain()


def test_prompts_in_several_passes_and_no_decode(tiny_llama, checkpoint, device):
    tiers = BUDGETS["host"]
    report = bench(tiny_llama, checkpoint, device, tiers, Workload(20, 1, 3), micro_batch_tokens=8, pass_tokens=16)
    assert report.prefill.passes == 4
    assert report.prefill.tokens == 60
    assert report.prefill.flops == 60 * report.flops.per_token + 3 * report.flops.per_row + sum(
        report.flops.per_pair.values()
    ) * (3 * 210)
    assert (report.decode, report.steady) == (None, None)
    assert report.as_dict()["decode"] is None
    assert "decode" not in report.explain()


def test_bad_workloads_are_refused(tiny_llama, checkpoint, device):
    with pytest.raises(ConfigError, match="gen_len"):
        Workload(1, 0, 1)
    with pytest.raises(ConfigError, match="context"):
        bench(tiny_llama, checkpoint, device, BUDGETS["host"], Workload(250, 7, 1))


def test_host_memory_may_be_pretended_for_aliases_alone(tiny_llama, checkpoint, device):
    much = MemoryTiers(device="4MiB", host="100TiB")
    report = bench(tiny_llama, checkpoint, device, much, Workload(4, 2, 1))
    assert len(report.run.plan.layers_in("host")) == 6
    with pytest.raises(BudgetError, match="more than what is free"), LLM(tiny_llama, tiers=much, device=device):
        pass
