"""What a long prompt really takes stays within what was planned for it."""

import json

import pytest
import torch

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine.rehearsal import _Watch

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 257, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kv_dtype"),
    [("gemma2", "auto"), ("llama", "auto"), ("mistral", "auto"), ("gemma2", "int4"), ("llama", "int8")],
)
def test_attention_over_a_long_prompt_stays_within_its_workspace(tmp_path, family, kv_dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SHAPE, **({} if family == "llama" else {"sliding_window": 1500}))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    with LLM(tmp_path, tiers=MemoryTiers(device="32MiB", host=0), device="cpu", kv_dtype=kv_dtype) as llm:
        logits = llm._kv._cost.sequence_nbytes  # keys and values have their memory already
        with _Watch() as watch:
            llm.generate([[5 + n % 200 for n in range(5000)]], SamplingParams(max_tokens=1, temperature=0))
        assert watch.peak <= llm.plan.workspace_nbytes + logits
