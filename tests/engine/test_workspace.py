"""What a long prompt really takes stays within what was planned for it."""

import json
from dataclasses import replace

import pytest
import torch

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine.rehearsal import _Watch
from penstock.offload.plan import make_plan

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 257, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 8192,
}  # fmt: skip


def save(path, family):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SHAPE, **({} if family == "llama" else {"sliding_window": 1500}))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["model_type"] == family


@pytest.mark.parametrize(
    ("family", "kv_dtype"),
    [("gemma2", "auto"), ("llama", "auto"), ("mistral", "auto"), ("gemma2", "int4"), ("llama", "int8")],
)
def test_attention_over_a_long_prompt_stays_within_its_workspace(tmp_path, family, kv_dtype):
    save(tmp_path, family)
    with LLM(tmp_path, tiers=MemoryTiers(device="32MiB", host=0), device="cpu", kv_dtype=kv_dtype) as llm:
        logits = llm._kv._cost.sequence_nbytes
        llm._kv.prepare([5001], least=[5001])  # keys and values have their memory already
        with _Watch() as watch:
            llm.generate([[5 + n % 200 for n in range(5000)]], SamplingParams(max_tokens=1, temperature=0))
        assert watch.peak <= llm.plan.workspace_nbytes + logits


def test_so_does_attention_over_keys_in_host_ram(tmp_path, monkeypatch, kernel_directory):
    """A chunk of a prompt needs the keys of those before it."""

    def nothing_on_the_device(shape, *limits):
        return replace(make_plan(shape, *limits), kv_nbytes=2 * shape.kv_sequence_nbytes)

    monkeypatch.setattr("penstock.engine.planning.make_plan", nothing_on_the_device)
    save(tmp_path, "gemma2")
    tiers = MemoryTiers(device="32MiB", host="16MiB", kv_host="8MiB")
    with LLM(tmp_path, tiers=tiers, device="cpu", kernel_directory=kernel_directory) as llm:
        logits = 2 * llm._kv._cost.sequence_nbytes
        prompts = [[5 + n % 200 for n in range(2000)], [6] * 30]
        with _Watch() as watch:
            llm.generate(prompts, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        assert llm.last_run.peak_hosted == 2
        assert watch.peak <= llm.plan.workspace_nbytes + logits


def test_what_waits_takes_no_memory_of_the_device():
    """To the byte, with 100 and with 10,000 requests queued; weights, keys and all else together keep the budget."""

    class EnoughError(Exception):
        pass

    def enough(state):
        if state.generated_tokens >= 60:
            raise EnoughError

    params, peaks = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), []
    for count in (100, 10_000):
        tiers = MemoryTiers(device="6MiB", host=0)
        with LLM(tiers=tiers, device="cpu", compile=False) as llm:
            storages = [one.untyped_storage() for one in (*llm.model.module.parameters(), *llm.model.module.buffers())]
            weights = sum({one.data_ptr(): one.nbytes() for one in storages}.values())
            with _Watch() as watch, pytest.raises(EnoughError):
                llm.generate([[1 + number % 50] * 16 for number in range(count)], params, on_pass=enough)
            assert llm._kv.statistics().num_blocks
            peaks.append(weights + watch.peak)
    assert peaks[0] == peaks[1] <= tiers.device
