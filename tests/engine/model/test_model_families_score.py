"""Scores where the tail of the forward, or what the layers share, is special."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, REFERENCE_ATTENTION
from test_model_families import skip_unknown
from tiny_models import PROMPTS, make_config, model_type, save_checkpoint
from transformers import AutoModelForCausalLM

from penstock import LLM, MemoryTiers

SPECIAL = {
    "gemma2": "soft caps on the logits",
    "cohere": "scaled logits",
    "granite": "divided logits",
    "gemma3n_text": "layers that share keys",
    "opt": "the model calls the decoder inside its body",
    "ctrl": "an old family",
    "mpt": "an old family",
    "modernbert-decoder": "a module between body and head",
    "mamba": "states",
    "qwen2_moe": "routers beside the hidden states",
}


@pytest.mark.parametrize("name", SPECIAL)
def test_scores_are_those_of_transformers(name: str, tmp_path: Path, device: str) -> None:
    skip_unknown(model_type(name))
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    with LLM(tmp_path, tiers=MemoryTiers(device="1GiB", host=0), device=device, micro_batch_tokens=16) as llm:
        llm._score_rows = lambda: 3  # type: ignore[method-assign]
        outputs = llm.score(PROMPTS)
    attention = REFERENCE_ATTENTION.get(name, "eager")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=attention)
    model = model.eval().to(device)
    for ids, output in zip(PROMPTS, outputs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, :-1].cpu()
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        found = torch.tensor([entry.logprob for entry in output.logprobs])
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
