"""Families that are planned for: counted, timed on the CPU and forecast, whatever their layers are."""

import pytest
from families import FAMILIES
from tiny_models import make_config, save_checkpoint

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine.forecast import Length
from penstock.offload.cost import Machine

MACHINE = Machine(host_to_device=1e9, nvme_to_host=1e9, flops=1e11, device_memory=1e10, host_read=1e10, on_cpu=True)
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("name", ["bamba", "deepseek_v3", "gemma4_text", "gpt_oss", "mamba", "mixtral", "opt"])
def test_a_run_is_forecast(name, tmp_path):
    """Recurrent ones have no tokens before those that are timed, and experts are not timed."""
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    options = {"device": "cpu", "compile": False, "hardware": MACHINE, "expects": [Length(8, 4)] * 3}
    with LLM(tmp_path, tiers=MemoryTiers(device="40MiB", host="1MiB"), **options) as llm:
        llm.generate([[1, 2, 3, 4, 5, 6, 7, 8]] * 3, GREEDY)
        timed = llm.machine.layer_times is not None
    assert llm.last_run.forecast.generated_tokens == llm.last_run.generated_tokens == 12
    assert timed == (name not in ("deepseek_v3", "gpt_oss", "mixtral"))
