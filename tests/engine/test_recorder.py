"""Decode passes that are recorded: the same tokens as without."""

from __future__ import annotations

import random

import pytest
import torch

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine.model import attention
from penstock.engine.recorder import PassRecorder
from penstock.kernels.paged import attend_paged
from penstock.offload import plan

RAGGED = [([5 + number] * length, new) for number, (length, new) in enumerate([(40, 30), (1, 4), (7, 30), (90, 17)])]
TIERS = MemoryTiers(device="40MiB", host=0)


def again(issue):
    """Play a recording by running it again."""
    return issue


def complete(llm, work=RAGGED):
    params = [SamplingParams(max_tokens=new, temperature=0, ignore_eos=True) for _, new in work]
    return [one.outputs[0].token_ids for one in llm.generate([prompt for prompt, _ in work], params)]


@pytest.fixture
def recorded(monkeypatch, device):
    """Open models that record as a GPU does; without one, a recording is run again, and the kernel is the reference."""
    if device == "cpu":
        monkeypatch.setattr(attention, "find_paged", lambda *_: attend_paged)

    def open_llm(path, **options):
        llm = LLM(path, tiers=TIERS, device=device, **options)
        if device == "cpu":
            llm._recorder = PassRecorder(llm.model, llm._executor, llm.plan, record=again)
        return llm

    return open_llm


def test_recorded_passes_give_the_same_tokens(tiny_llama, recorded, device):
    dtype = "float32" if device == "cpu" else "bfloat16"  # the GPU's kernel for blocks takes 16 bits
    with LLM(tiny_llama, tiers=TIERS, device=device, dtype=dtype, compile=False) as llm:
        assert llm._recorder is None
        expected = complete(llm)
    with recorded(tiny_llama, dtype=dtype) as llm:
        assert llm.plan.recording(len(RAGGED), 130) == (16, 512)
        assert complete(llm) == expected
        first = llm._recorder.num_replayed
        assert first > 10, "most passes only decode"
        report = llm.last_run.as_dict()
        assert first < report["recorded_passes"] < report["passes"]
        assert f"; {report['recorded_passes']} of {report['passes']} passes went as recorded" in llm.last_run.explain()
        assert complete(llm) == expected
        assert llm._recorder.num_replayed > first


def test_lengths_and_numbers_of_sequences_that_come_in_any_order(tiny_llama, recorded, device, monkeypatch):
    """Recordings are made, played, and dropped when there are too many; blocks move when sequences become longer."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    monkeypatch.setattr(plan, "RECORDED_TOKENS", 64)
    numbers = random.Random(3)
    works = [
        [([numbers.randrange(3, 200)] * numbers.choice((1, 5, 60, 200)), numbers.randint(2, 12)) for _ in range(count)]
        for count in (1, 9, 2, 17, 1, 3)
    ]
    with LLM(tiny_llama, tiers=TIERS, device=device, dtype=dtype, compile=False) as llm:
        expected = [complete(llm, work) for work in works]
    with recorded(tiny_llama, dtype=dtype) as llm:
        assert [complete(llm, work) for work in works] == expected
        assert llm._recorder.num_replayed > (10 if device == "cpu" else 3)
        assert not llm._recorder._is_refused


def test_what_asks_for_lengths_is_not_recorded(tiny_llama, device, caplog):
    """Without a kernel for blocks, as in float32, attention goes sequence by sequence, whose lengths it must know."""
    with LLM(tiny_llama, tiers=TIERS, device=device, compile=False) as llm:
        expected = complete(llm)
        llm._recorder = PassRecorder(llm.model, llm._executor, llm.plan, record=again)
        with caplog.at_level("INFO", "penstock.engine"):
            assert complete(llm) == expected
        assert llm._recorder.num_replayed == 0
    assert [one for one in caplog.messages if one.startswith("decode passes are not recorded: ")]


def test_what_fails_while_it_is_recorded_runs_as_before(tiny_llama, recorded, device):
    def broken(issue):
        issue()
        raise RuntimeError("no")

    dtype = "float32" if device == "cpu" else "bfloat16"
    with recorded(tiny_llama, dtype=dtype) as llm:
        expected = complete(llm)
        llm._recorder = PassRecorder(llm.model, llm._executor, llm.plan, record=broken)
        assert complete(llm) == expected
        assert llm._recorder.num_replayed == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_that_is_streamed_is_not_recorded(tiny_llama):
    with LLM(tiny_llama, tiers=TIERS, device="cuda", dtype="bfloat16", device_layers=0) as llm:
        complete(llm)
        assert llm.plan.num_slots
        assert llm._recorder.num_replayed == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_recording_takes_no_more_than_the_budget(tiny_llama, monkeypatch):
    with LLM(tiny_llama, tiers=TIERS, device="cuda", dtype="bfloat16") as llm:
        for _ in range(2):  # recordings are made, then the libraries take their workspaces again
            complete(llm)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        complete(llm)
        assert llm._recorder.num_replayed
        assert torch.cuda.max_memory_allocated() - before <= llm.plan.workspace_nbytes
