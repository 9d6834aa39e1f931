"""Quantised keys and values, windows, homes and preemption at once: what one of them does changes no other's tokens."""

from dataclasses import replace

import pytest
from families import FAMILIES
from test_model_windows import PROMPTS
from tiny_models import make_config, save_checkpoint

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.offload.plan import make_plan

MANY = [prompt[:length] for length in (90, 40, 21, 66, 30) for prompt in PROMPTS if length <= len(prompt)] * 2 + PROMPTS
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=20)
EVERY_EXPERT = {
    "gpt_oss": {"num_experts_per_tok": 8},
    "deepseek_v3": {"num_experts_per_tok": 8, "n_group": 1},
}
"""Tokens go to all experts: where rounding chose the experts that a token goes to, it would decide much."""

NEAR = 0.02
"""Log-likelihoods within which two tokens are as good: products of other shapes round otherwise."""


def run(path, device, kv_dtype, tiers, **options):
    with LLM(path, tiers=tiers, device=device, kv_dtype=kv_dtype, compile=False, **options) as llm:
        outputs = [output.outputs[0] for output in llm.generate(MANY, GREEDY)]
        return outputs, llm.last_run


def few_on_the_device(shape, *limits):
    """Leave the device room for the keys of one long sequence, and for what all have besides."""
    nbytes = shape.kv_cost.of(128) + 20 * shape.kv_sequence_nbytes
    return replace(make_plan(shape, *limits), kv_nbytes=nbytes)


@pytest.mark.parametrize("kv_dtype", ["auto", "bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("name", ["gpt_oss", "mistral", "deepseek_v3"])
def test_hosted_sequences_have_the_tokens_of_others(name, kv_dtype, tmp_path, device, kernel_directory, monkeypatch):
    save_checkpoint(make_config({**FAMILIES[name], **EVERY_EXPERT.get(name, {})}, name), tmp_path)
    wanted, _ = run(tmp_path, device, kv_dtype, MemoryTiers(device="40MiB", host=0))
    monkeypatch.setattr("penstock.engine.planning.make_plan", few_on_the_device)
    tiers = MemoryTiers(device="40MiB", host="4MiB", kv_host="256KiB")
    limits = {"micro_batch_tokens": 23, "pass_tokens": 37}
    found, report = run(tmp_path, device, kv_dtype, tiers, kernel_directory=kernel_directory, **limits)
    assert 0 < report.peak_hosted < report.peak_sequences
    for one, another in zip(wanted, found, strict=True):
        for place, tokens in enumerate(zip(one.token_ids, another.token_ids, strict=True)):
            if len(set(tokens)) > 1:
                first, second = (one.logprobs[place][token].logprob for token in tokens)
                assert abs(first - second) < NEAR
                break
