"""Runs whose sequences end early and give way to each other, against in-memory Hugging Face and against roomy runs."""

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_config, save_checkpoint

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine.expectation import Expectation
from penstock.offload.groups import open_kv
from penstock.offload.homes import KVHomes

MODELS = ["llama", "gemma3_text", "lfm2"]
"""Full attention; windows of 5 tokens; short convolutions, whose states make prompts stay whole."""

PROMPTS = [[(7 * seed + 11 * place * place) % 250 + 3 for place in range(1 + 5 * seed)] for seed in range(6)]
NUM_NEW = 24


@pytest.fixture(scope="module", params=MODELS)
def tight(request, tmp_path_factory, device):
    """A model, and the tokens with which Hugging Face continues each prompt."""
    path = tmp_path_factory.mktemp("models") / request.param
    model = save_checkpoint(make_config(FAMILIES[request.param], request.param), path).to(device).eval()
    with torch.inference_mode():
        wanted = [_greedy(model, prompt) for prompt in PROMPTS]
    with LLM(path, device=device, compile=False, tiers=MemoryTiers(device="40MiB", host=0)) as llm:
        yield llm, wanted


class Hasty(Expectation):
    """Thinks from the start that sequences end at once, so that all outgrow what they begin with."""

    def __init__(self):
        super().__init__()
        for _ in range(100):
            self.finished(1, most=NUM_NEW)


@pytest.fixture(autouse=True, scope="module")
def hasty():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock.engine.scheduler.Expectation", Hasty)
        yield


def _greedy(model, prompt):
    ids = list(prompt)
    for _ in range(NUM_NEW):
        ids.append(int(model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def squeeze(llm, num_blocks):
    """Leave room for so many blocks, and for what sequences keep besides them."""
    cost = llm._kv_cost
    kv = open_kv(
        limit_nbytes=sum(num_blocks * part.block_nbytes for part in cost.parts().values()) + 6 * cost.sequence_nbytes,
        cost=cost,
        windows={layer.layer: layer.window for layer in llm._shape.kv_windows},
        device=llm._device,
    )
    llm._homes.close()
    llm._kv, llm._homes = kv, KVHomes(kv, cost=cost, device=llm._device)


def cut(tokens, ends):
    """Return what a completion has when these tokens end it."""
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tuple(tokens[: place + 1])


@settings(max_examples=5)
@given(st.data())
def test_greedy_tokens_are_hugging_faces(tight, data):
    llm, wanted = tight
    picks = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=6, max_size=20), "prompts")
    mosts = data.draw(st.lists(st.integers(1, NUM_NEW), min_size=len(picks), max_size=len(picks)), "max_tokens")
    ends = data.draw(st.sets(st.sampled_from(sorted({token for one in wanted for token in one})), max_size=4), "ends")
    squeeze(llm, data.draw(st.integers(4, 10), "blocks"))
    llm._end_ids = frozenset(ends)
    params = [SamplingParams(max_tokens=most, temperature=0) for most in mosts]
    outputs = llm.generate([PROMPTS[pick] for pick in picks], params)
    for pick, most, output in zip(picks, mosts, outputs, strict=True):
        assert output.outputs[0].token_ids == cut(wanted[pick][:most], ends)
    assert llm.last_run.prompt_tokens == sum(len(PROMPTS[pick]) for pick in picks)
    llm._kv.check_integrity()
    assert llm._kv.statistics().num_sequences == 0


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_run_that_is_short_of_memory_gives_what_a_roomy_one_gives(tight, temperature):
    llm, _ = tight
    prompts = PROMPTS * 3
    params = SamplingParams(max_tokens=NUM_NEW, temperature=temperature, seed=5, logprobs=2)
    llm._end_ids = frozenset()
    squeeze(llm, 1000)
    roomy = llm.generate(prompts, params)
    assert llm.last_run.num_preemptions == llm.last_run.recomputed_tokens == 0
    squeeze(llm, 8)
    states = []
    pressed = llm.generate(prompts, params, on_pass=states.append)
    report = llm.last_run
    assert report.num_preemptions > 0
    assert states[-1].num_preemptions == report.num_preemptions
    assert states[-1].recomputed_tokens == report.recomputed_tokens > 0
    assert report.prompt_tokens == sum(map(len, prompts))
    assert report.generated_tokens == NUM_NEW * len(prompts)
    assert report.as_dict()["preemptions"] == report.num_preemptions
    assert f"{report.recomputed_tokens} tokens went through the model again" in report.explain()
    for one, other in zip(roomy, pressed, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert len(other.outputs[0].logprobs) == NUM_NEW
        assert one.outputs[0].cumulative_logprob == pytest.approx(other.outputs[0].cumulative_logprob, abs=1e-3)
    assert llm._model.splits_prompts == ("lfm2" not in llm.path.name)
