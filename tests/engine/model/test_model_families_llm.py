"""Every family through the whole engine: rehearsed, planned, streamed through two slots, generated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, REFERENCE_ATTENTION
from test_model_families import skip_unknown
from tiny_models import PROMPTS, make_config, model_type, save_checkpoint
from transformers import AutoModelForCausalLM

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.errors import BudgetError
from penstock.offload.plan import ModelShape, PassLimits, Plan, make_plan
from penstock.offload.tiers import Tier

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # some of transformers' code

NUM_NEW = 4


def smallest_budget(path: Path, device: str) -> int:
    with pytest.raises(BudgetError) as caught:
        LLM(path, tiers=MemoryTiers(device=0, host=0), device=device, compile=False)
    return int(str(caught.value.wanted).split()[2])


@torch.no_grad()
def margins(path: Path, attention: str, completions: list[tuple[int, ...]], device: str) -> list[float]:
    """Return by how much transformers, alone in memory, prefers another token at each position; 0 where it agrees."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    model = model.eval().to(device)
    result = []
    for prompt, tokens in zip(PROMPTS, completions, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]], device=device), use_cache=False).logits[0].cpu()
        for row, token in zip(logits[len(prompt) - 1 : -1], tokens, strict=True):
            result.append(float(row.max() - row[token]))
    return result


def in_two_slots(shape: ModelShape, tiers: MemoryTiers, limits: PassLimits) -> Plan:
    """Leave every layer on disk and stream it through two slots, whatever the budget allows besides."""
    plan = make_plan(shape, tiers, limits)
    return replace(
        plan,
        tiers=(Tier.NVME,) * len(shape.layer_nbytes),
        num_slots=2,
        slot_nbytes=max(shape.layer_nbytes),
        device_layer_nbytes=0,
        nvme_nbytes=sum(shape.wire_nbytes),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_generated_tokens_are_those_of_transformers(
    name: str, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unknown(model_type(name))
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    minimum = smallest_budget(tmp_path, device)
    with LLM(tmp_path, tiers=MemoryTiers(device="1GiB", host=0), device=device, compile=False) as llm:
        whole = llm._kv._cost.of(max(map(len, PROMPTS)) + NUM_NEW)
    monkeypatch.setattr("penstock.engine.planning.make_plan", in_two_slots)
    tiers = MemoryTiers(device=minimum + 4 * whole, host=0)
    with LLM(tmp_path, tiers=tiers, device=device, micro_batch_tokens=16, compile=False) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True))
        if len(llm.plan.tiers) > 2:
            assert llm.last_run.traffic.disk_bytes >= (llm.last_run.num_passes - 2) * sum(llm._shape.wire_nbytes)
    completions = [output.outputs[0].token_ids for output in outputs]
    assert all(len(tokens) == NUM_NEW for tokens in completions)
    assert max(margins(tmp_path, REFERENCE_ATTENTION.get(name, "eager"), completions, device)) <= 1e-3
