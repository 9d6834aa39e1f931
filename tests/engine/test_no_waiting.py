"""On CUDA, nothing inside a pass waits for the device."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine.executor import Executor
from penstock.engine.recorder import PassRecorder
from penstock.offload.blocks import BLOCK_TOKENS
from penstock.offload.plan import make_plan

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


def few_on_the_device(shape, *limits):
    """Leave the device room for four blocks of keys and values."""
    nbytes = 8 * shape.kv_sequence_nbytes + 4 * BLOCK_TOKENS * shape.kv_token_nbytes
    return replace(make_plan(shape, *limits), kv_nbytes=nbytes)


@contextmanager
def not_waiting():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    ("micro_batch_tokens", "kv_dtype"),
    [(64, "auto"), (7, "auto"), (64, "fp8"), (7, "int8"), (64, "int8"), (64, "int4"), (7, "int4")],
)
@pytest.mark.parametrize("hosted", [False, True])
def test_passes_of_prefill_and_decode_never_wait(
    tiny_llama, monkeypatch, micro_batch_tokens, kv_dtype, hosted, kernel_directory
):
    """The first run compiles kernels and fills caches; the second is watched. Tokens are chosen outside of passes.

    What waits for attention in host RAM waits for another thread.
    """
    prompts = [[5 + number] * length for number, length in enumerate((1, 40, 9, 3, 90))]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (20, 3, 9, 14, 6)]
    passes = []
    run_pass, run_recorded = Executor.run_pass, PassRecorder.run

    def watched(self, batches):
        with not_waiting():
            result = run_pass(self, batches)
        passes.append(max(span.length for batch, _ in batches for span in batch.spans))
        return result

    def watched_recorded(self, batch, token_ids):
        with not_waiting():
            result = run_recorded(self, batch, token_ids)
        passes.append(1)
        return result

    tiers = MemoryTiers(device="40MiB", host="4MiB" if hosted else 0, kv_host="4MiB" if hosted else 0)
    if hosted:
        monkeypatch.setattr("penstock.engine.planning.make_plan", few_on_the_device)
    options = {"micro_batch_tokens": micro_batch_tokens, "kv_dtype": kv_dtype, "kernel_directory": kernel_directory}
    with LLM(tiny_llama, tiers=tiers, device="cuda", dtype="bfloat16", **options) as llm:
        first = llm.generate(prompts, params)
        monkeypatch.setattr(Executor, "run_pass", watched)
        monkeypatch.setattr(PassRecorder, "run", watched_recorded)
        second = llm.generate(prompts, params)
    assert [one.outputs for one in first] == [one.outputs for one in second]
    assert (llm.last_run.peak_hosted > 0) == hosted
    assert min(passes) == 1
    assert max(passes) > 1
