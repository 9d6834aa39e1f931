"""A model that knows its machine and what to expect is placed by forecast."""

import json
import os
import re
from dataclasses import replace

import pytest
from made_profile import make_disk, make_profile

from penstock.cli.main import main
from penstock.engine.forecast import Length
from penstock.engine.llm import LLM
from penstock.engine.sampling_params import SamplingParams
from penstock.offload.hardware import profile_path
from penstock.offload.tiers import MemoryTiers, Tier

TIERS = MemoryTiers(device="900KiB", host="1MiB")


@pytest.fixture
def hardware(tiny_llama):
    number = os.stat(tiny_llama).st_dev
    disk = make_disk(device=f"{os.major(number)}:{os.minor(number)}")
    return make_profile(disk, host_copy=1e9, host_read=1e10, matmul={"float32": 1e11})


def on_device(llm):
    return len(llm.plan.layers_in(Tier.DEVICE))


def test_few_requests_get_layers_and_many_get_room(tiny_llama, hardware):
    counts = []
    for expects in ([Length(8, 8)], [Length(8, 8)] * 500):
        with LLM(tiny_llama, device="cpu", tiers=TIERS, hardware=hardware, expects=expects) as llm:
            counts.append(on_device(llm))
            llm.generate([[5, 6, 7]])
            assert llm.last_run.forecast.generated_tokens == 8 * len(expects)
            ended = llm.last_run.explain().splitlines()[-1]
            assert re.match(r"reached +all [\d.]+ s of [\d.]+ s forecast; computing [\d.]+ s of", ended)
    assert counts[0] > counts[1]


@pytest.mark.parametrize(("kv_host", "is_used"), [(None, True), (0, False)])
def test_host_ram_takes_the_keys_of_those_that_the_device_has_no_room_for(
    tiny_llama, hardware, tmp_path, kv_host, is_used
):
    """By forecast, unless the caller has said how much; tokens are the same."""
    prompts, params = [[5, 6, 7 + number] * 20 for number in range(20)], SamplingParams(max_tokens=12, ignore_eos=True)
    expects = [Length(60, 12)] * 20
    tiers = MemoryTiers(device="580KiB", host="8MiB", kv_host=kv_host)
    with LLM(tiny_llama, device="cpu", tiers=MemoryTiers(device="2MiB", host="8MiB")) as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    options = {"hardware": hardware, "expects": expects, "kernel_directory": tmp_path}
    with LLM(tiny_llama, device="cpu", tiers=tiers, **options) as llm:
        assert (llm.plan.kv_host_nbytes > 0) == is_used
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == wanted
        report = llm.last_run
        assert (llm._homes.statistics().attention_seconds > 0) == is_used
        assert ("in host RAM" in llm.outlook().split(" for keys and values")[1]) == is_used
        assert report.peak_sequences == report.forecast.peak_sequences


@pytest.mark.parametrize("beside", [0.0, 3.0], ids=["the device attends", "the processor attends beside it"])
def test_every_resource_is_set_against_its_forecast(tiny_llama, hardware, beside):
    """What was forecast of passes that did not come, or of fewer, is scaled; what was not timed is said to be so."""
    tiers = MemoryTiers(device="580KiB", host="8MiB", kv_host=0)
    with LLM(tiny_llama, device="cpu", tiers=tiers, hardware=hardware, expects=[Length(3, 4)]) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))
        report = llm.last_run
    busy = {"computing": 8.0, "host_to_device": 4.0, "issuing": 1.0} | ({"host_attention": 6.0} if beside else {})
    forecast = replace(report.forecast, seconds=10.0, passes=2 * report.num_passes, busy_seconds=busy)
    traffic = replace(
        report.traffic, layers_seconds=9.0, disk_stall_seconds=0.0, host_stall_seconds=2.0, transfer_seconds=1.5,
        attention_seconds=beside and 4.0, attention_stall_seconds=beside,
    )  # fmt: skip
    found = {one.name: (one.forecast_seconds, one.seconds)
             for one in replace(report, forecast=forecast, traffic=traffic, seconds=6.0).reckoning()}  # fmt: skip
    wanted = {"all": (5.0, 6.0), "computing": (4.0, 7.0 - beside), "host_to_device": (2.0, 1.5), "issuing": (0.5, None)}
    assert found == wanted | ({"host_attention": (3.0, 4.0)} if beside else {})


@pytest.mark.parametrize("expects", [[], [Length(100_000, 1)]], ids=["nothing", "what never fits"])
def test_without_a_forecast_the_plan_is_the_usual_one(tiny_llama, hardware, expects):
    with LLM(tiny_llama, device="cpu", tiers=TIERS) as llm:
        usual = llm.plan
    with LLM(tiny_llama, device="cpu", tiers=TIERS, hardware=hardware, expects=expects) as llm:
        assert llm.plan == usual
        llm.generate([[5, 6, 7]])
        assert llm.last_run.as_dict()["forecast"] is None


def test_the_command_uses_the_stored_profile(capsys, tmp_path, monkeypatch, tiny_llama, hardware):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hardware.store(profile_path(str(tmp_path)))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt_token_ids": [5, 6, 7], "max_tokens": 3}) + "\n")
    arguments = ["--prompts", str(prompts), "--device-memory", "1300KiB", "--ignore-eos", "--json"]
    assert main(["generate", str(tiny_llama), "--device", "cpu", *arguments]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["forecast"]["generated_tokens"] == summary["generated_tokens"] == 3
