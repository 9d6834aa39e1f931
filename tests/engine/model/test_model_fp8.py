"""Products in FP8 in families of several kinds: experts, latents, mixers, one projection for several."""

from __future__ import annotations

import pytest
from families import FAMILIES
from tiny_models import PROMPTS, make_config, save_checkpoint

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine.model.fp8 import Fp8Linear
from penstock.engine.pack import pack
from penstock.offload.codec import PackOptions

NAMES = ["llama", "qwen3_moe", "mixtral", "gemma2", "gpt_oss", "deepseek_v3", "opt", "qwen3_next", "phi3"]


@pytest.mark.parametrize("name", NAMES)
def test_every_mix_of_tiers_gives_the_same_tokens(name, tmp_path, device):
    """What is not multiplied so, such as fused experts, is expanded in slots that hold both."""
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path / "plain")
    pack(tmp_path / "plain", tmp_path / "packed", PackOptions("int4", group_size=32))
    made = []
    for budget, layers in (("40MiB", None), ("12MiB", 1)):
        tiers = MemoryTiers(device=budget, host="40MiB")
        with LLM(tmp_path / "packed", tiers=tiers, device=device, device_layers=layers, activation_dtype="fp8") as llm:
            parts = [part for layer in llm.model.layers for part in layer.modules() if isinstance(part, Fp8Linear)]
            assert parts
            assert bool(llm.plan.num_slots) == (layers == 1)
            params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
            made.append(
                [output.outputs[0].token_ids for output in llm.generate([list(one) for one in PROMPTS], params)]
            )
    assert made[0] == made[1]
