"""Whole runs with compiled layers."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine import rehearsal

pytestmark = pytest.mark.timeout(300)  # a C++ compiler runs

PROMPTS = [list(range(3, 3 + n)) for n in (40, 1, 7, 23, 90)]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def compiled(tiny_llama, device):
    tiers = MemoryTiers(device="900KiB" if device == "cpu" else "1300KiB", host="200KiB")
    with LLM(tiny_llama, tiers=tiers, device=device, compile=True) as llm:
        assert llm.plan.num_slots >= 2 or device == "cuda"
        yield llm


@pytest.fixture(scope="module")
def expected(tiny_llama, device):
    with LLM(tiny_llama, tiers=MemoryTiers(device="40MiB", host=0), device=device, compile=False) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
    assert llm.last_run.as_dict()["layer_code"]["eager"] == {"LlamaDecoderLayer": "it was not wanted"}
    return [output.outputs[0].token_ids for output in outputs]


def test_one_graph_serves_all_layers_slots_and_token_counts(compiled, expected):
    counters.clear()
    for count in range(1, len(PROMPTS) + 1):
        outputs = compiled.generate(PROMPTS[:count], GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected[:count]
    assert not counters["frames"], "a pass has compiled something"
    report = compiled.last_run.as_dict()["layer_code"]
    assert (report["kinds"], report["compiled"], report["eager"]) == (1, 1, {})
    assert [kind.num_graphs for kind in compiled._compiler._kinds] == [1]
    assert "1 of 1 kinds of layers compiled" in compiled.last_run.explain()


def test_compiled_layers_stay_within_the_workspace_of_the_plan(compiled, device):
    prompt = [[5 + n % 200 for n in range(130)]]
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        compiled.generate(prompt, SamplingParams(max_tokens=1, temperature=0))
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = _peak_on_the_cpu(lambda: compiled.generate(prompt, SamplingParams(max_tokens=1, temperature=0)))
    assert peak <= compiled.plan.workspace_nbytes + compiled._kv._cost.of(131)


def _peak_on_the_cpu(run):
    """Return the most bytes that tensors took, also those that compiled code made."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


def test_where_compiling_fails_layers_run_eagerly_and_the_log_says_why(
    tiny_llama, expected, device, monkeypatch, caplog, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with LLM(tiny_llama, tiers=MemoryTiers(device="1200KiB", host=0), device=device, compile=True) as llm:
        outputs = llm.generate(PROMPTS[:2], GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == expected[:2]
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith("LlamaDecoderLayer (6 layers) is not compiled: NotADirectoryError: ")


def test_code_that_needs_more_than_the_budget_is_not_used(tiny_llama, device, monkeypatch):
    def greedy(model, executor, compiler, shape, *, num_tokens):
        return replace(shape, workspace_nbytes=1 << 30)

    monkeypatch.setattr("penstock.engine.llm.rehearse_compiled", greedy)
    with LLM(tiny_llama, tiers=MemoryTiers(device="1200KiB", host=0), device=device, compile=True) as llm:
        llm.generate([PROMPTS[1]], GREEDY)
    reason = "compiled code needs more workspace than the budget leaves"
    assert llm.last_run.as_dict()["layer_code"]["eager"] == {"LlamaDecoderLayer": reason}


def test_the_summary_says_where_the_start_went(compiled, expected):
    compiled.generate([PROMPTS[1]], GREEDY)
    report = compiled.last_run.as_dict()
    steps = report["load"]["steps"]
    kernels = ["kernels"] if torch.cuda.is_available() else []
    assert list(steps) == ["python", "model", "rehearsal", "compilers", *kernels, "memory", "weights"]
    assert report["load"]["seconds"] == pytest.approx(sum(steps.values()) - steps["python"])
    assert 0 < report["first_token_seconds"] <= report["seconds"]


def test_a_cpu_compiles_only_when_told_to(tiny_llama):
    with LLM(tiny_llama, tiers=MemoryTiers(device="40MiB", host=0), device="cpu") as llm:
        llm.generate([PROMPTS[1]], GREEDY)
    reasons = llm.last_run.as_dict()["layer_code"]["eager"]
    assert reasons == {"LlamaDecoderLayer": "not worth the time to compile on the CPU"}


@pytest.mark.parametrize("compiles", [True, False])
def test_what_rehearsals_have_taken_is_gone_before_memory_is_taken(tiny_llama, expected, device, monkeypatch, compiles):
    stores, alive = [], []
    make, take = rehearsal._store, LLM._open

    def noted(*args):
        store = make(*args)
        stores.append(weakref.ref(store))
        return store

    def look(*args):
        alive.extend(store() is not None for store in stores)
        take(*args)

    monkeypatch.setattr(rehearsal, "_store", noted)
    monkeypatch.setattr(LLM, "_open", look)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    with LLM(tiny_llama, tiers=MemoryTiers(device="2MiB", host=0), device=device, compile=compiles) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
    assert alive
    assert not any(alive)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert llm.last_run.peak_device_nbytes - before <= llm.plan.device_nbytes
