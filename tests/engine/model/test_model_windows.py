"""Layers with sliding windows keep what their windows reach, and the tokens stay Hugging Face's."""

import pytest
import torch
from families import FAMILIES, SW
from tiny_models import make_config, save_checkpoint

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.offload.kv import KVStore

WINDOWS = {
    "mistral": {0: SW, 1: SW, 2: SW, 3: SW},
    "gemma3_text": {0: SW, 2: SW},
    "gpt_oss": {0: SW, 2: SW},
    "gemma3n_text": {},  # its last two layers read the keys of the first two
    "llama4_text": {},  # chunks
}
PROMPTS = [
    [(7 * seed + 11 * place * place) % 250 + 3 for place in range(length)] for seed, length in enumerate([90, 1, 7])
]
NUM_NEW = 24


@torch.inference_mode()
def greedy(model, prompt):
    ids = list(prompt)
    for _ in range(NUM_NEW):
        ids.append(int(model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("name", WINDOWS)
def test_greedy_tokens_with_prompts_cut_anywhere(name, tmp_path, device):
    model = save_checkpoint(make_config(FAMILIES[name], name), tmp_path).to(device).eval()
    wanted = [greedy(model, prompt) for prompt in PROMPTS]
    params = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True)
    for micro_batch_tokens, pass_tokens in ((512, 512), (23, 37)):
        tiers = MemoryTiers(device="40MiB", host=0)
        limits = {"micro_batch_tokens": micro_batch_tokens, "pass_tokens": pass_tokens}
        with LLM(tmp_path, device=device, compile=False, tiers=tiers, **limits) as llm:
            assert {layer.layer: layer.window for layer in llm._shape.kv_windows} == WINDOWS[name]
            assert isinstance(llm._kv, KVStore) == (not WINDOWS[name])
            outputs = llm.generate(PROMPTS, params)
            full = llm._kv_cost.token_nbytes * 130
            assert (llm._kv_cost.of(130) < full) == bool(WINDOWS[name]), "less than all tokens in all layers"
        assert [output.outputs[0].token_ids for output in outputs] == wanted
