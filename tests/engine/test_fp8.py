"""Runs that multiply packed weights in FP8: the same tokens wherever weights rest, near those of plain products."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine.executor import Executor
from penstock.engine.flops import count_flops
from penstock.engine.kv_quality import kv_perplexities
from penstock.engine.llm import DEFAULT_MODEL
from penstock.engine.model.build import load_model
from penstock.engine.model.fp8 import Fp8Linear
from penstock.engine.pack import pack
from penstock.engine.rehearsal import rehearse
from penstock.errors import ConfigError, DeviceError, UnsupportedModelError
from penstock.kernels import fp8_linear
from penstock.kernels.packed_linear import PackedWeight
from penstock.offload.codec import PackOptions
from penstock.offload.tiers import Tier

PROMPTS = [[5 + number * 3 + n % (7 + number) for n in range(length)] for number, length in enumerate((40, 1, 7, 60))]
GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
WHOLE = MemoryTiers(device="40MiB", host="0")
OPTIONS = {"activation_dtype": "fp8", "dtype": "float32", "micro_batch_tokens": 48, "pass_tokens": 96}
"""Passes are the same: sums of other rows beside them may round otherwise, and e4m3 makes much of that."""


@pytest.fixture(scope="module", params=["int8", "int4"])
def checkpoint(request, tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / request.param
    pack(tiny_llama, path, PackOptions(request.param, group_size=32))
    return path


def complete(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def expected(checkpoint, device):
    with LLM(checkpoint, tiers=WHOLE, device=device, **OPTIONS) as llm:
        assert not llm.plan.num_slots
        return complete(llm)


@pytest.mark.parametrize("host", ["0", "60KiB", "20MiB"])
def test_tokens_are_the_same_in_every_mix_of_tiers(checkpoint, expected, device, host):
    """Layers rest and travel packed, and a slot holds nothing else."""
    tiers = MemoryTiers(device="6MiB", host=host)
    with LLM(checkpoint, tiers=tiers, device=device, device_layers=2, **OPTIONS) as llm:
        assert llm.plan.num_slots
        assert len(llm.plan.layers_in(Tier.DEVICE)) == 2
        assert (llm.plan.nvme_nbytes > 0) == (host != "20MiB")
        for layout in llm.model.layer_layouts:
            assert len(layout.packed) == 7
            assert not layout.expansions
        assert complete(llm) == expected
        assert llm.last_run.as_dict()["activation_dtype"] == "fp8"


def test_packing_on_load_gives_the_same(checkpoint, tiny_llama, expected, device):
    codec = PackOptions(checkpoint.name, group_size=32)
    for layers in (None, 1):
        options = {"tiers": MemoryTiers(device="6MiB", host="20MiB"), "device_layers": layers, "codec": codec}
        with LLM(tiny_llama, device=device, **options, **OPTIONS) as llm:
            assert complete(llm) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(checkpoint, device, dtype):
    """Weights that stay packed are not cast, whatever the run's dtype."""
    with LLM(checkpoint, tiers=WHOLE, device=device, activation_dtype="fp8", dtype=dtype) as llm:
        assert all(len(layout.packed) == 7 for layout in llm.model.layer_layouts)
        assert all(len(tokens) == GREEDY.max_tokens for tokens in complete(llm))


def test_perplexity_is_near_that_of_plain_products(device, tmp_path):
    pack(DEFAULT_MODEL, tmp_path / "int4", PackOptions("int4"))
    text = tmp_path / "text"
    text.write_text((DEFAULT_MODEL.parents[1] / "engine" / "scheduler.py").read_text()[:1500])
    options = {"activation_dtypes": ["fp8"], "dtype": "float32", "device": device}
    plain, rounded = kv_perplexities(tmp_path / "int4", text, [], **options)
    assert (plain.activation_dtype, rounded.activation_dtype) == ("auto", "fp8")
    assert 0 < abs(rounded.change) < 0.02


@pytest.mark.timeout(300)  # a C++ compiler runs
def test_compiled_layers_multiply_in_one_opaque_operator(checkpoint, device):
    """Compiled sums round otherwise, so scores are near, not equal."""
    scores = []
    for compiles in (False, True):
        with LLM(checkpoint, tiers=WHOLE, device=device, compile=compiles, **OPTIONS) as llm:
            counters.clear()
            scores.append([output.logprob / len(output.token_ids) for output in llm.score(PROMPTS[2:])])
            complete(llm)
            assert not counters["frames"], "a pass has compiled something"
            assert llm.last_run.as_dict()["layer_code"]["compiled"] == compiles
    assert scores[1] == pytest.approx(scores[0], rel=0.02)


def test_what_a_model_is_said_to_need(checkpoint):
    """FLOPs are those of the weights, and layers take no more than what travels."""
    plain, packed = (load_model(checkpoint, in_fp8=in_fp8) for in_fp8 in (False, True))
    flops = [count_flops(model) for model in (plain, packed)]
    assert flops[0].per_token == flops[1].per_token
    assert flops[1].shared_nbytes < 1.6 * flops[0].shared_nbytes
    shapes = [rehearse(model, Executor(model.layers), sampler_nbytes=0) for model in (plain, packed)]
    assert sum(shapes[1].layer_nbytes) < sum(shapes[0].layer_nbytes) / 1.5
    assert not shapes[1].packs
    assert packed.scratch_nbytes == 0, "a CPU has none"
    linear = [part for layer in packed.layers for part in layer.modules() if isinstance(part, Fp8Linear)]
    assert len(linear) == 7 * 6
    packed.unbind()
    assert all(part.codes.is_meta for part in linear)


def test_a_scratch_is_shared_and_large_enough(checkpoint, monkeypatch):
    """As a GPU has it, computed by the CPU."""

    def multiply(codes, right, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert use_fast_accum
        return ((codes.float() @ right.float()) * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    model = load_model(checkpoint, in_fp8=True)
    linear = [part for layer in model.layers for part in layer.modules() if isinstance(part, Fp8Linear)]
    most = max(part.in_features * part.out_features for part in linear)
    scratch = fp8_linear.Scratch.of(max(part.out_features for part in linear), most, torch.device("cpu"))
    assert scratch.nbytes == most + 4 * max(part.out_features for part in linear)
    for layout in model.layer_layouts[:1]:
        buffer = torch.randint(0, 100, (layout.nbytes,), dtype=torch.uint8)
        model.bind_layer(0, buffer)
    for part in linear[:7]:
        bits = 8 if part.coding.codec == "int8" else 4
        scale = torch.rand(part.scale.shape).bfloat16()
        weight = PackedWeight(part.codes, scale, part.zero, part.in_features, bits, part.coding.group_size)
        x = torch.randn(5, part.in_features)
        with_scratch, without = fp8_linear.fp8_linear(x, weight, scratch), fp8_linear.fp8_linear(x, weight, None)
        torch.testing.assert_close(with_scratch, without, rtol=0.01, atol=0.01 * float(without.abs().max()))


def test_a_model_that_reads_a_weight_itself_is_refused_by_name(checkpoint):
    model = load_model(checkpoint, in_fp8=True)
    attend = model.layers[3].self_attn
    forward = attend.forward
    attend.forward = lambda *_, **options: forward(options["hidden_states"] @ attend.o_proj.weight, **options)
    with pytest.raises(UnsupportedModelError, match="reads the weight of"):
        rehearse(model, Executor(model.layers), sampler_nbytes=0)


@pytest.mark.parametrize("codec", [None, "exact"])
def test_without_packed_weights_there_is_nothing_to_multiply(codec):
    with pytest.raises(ConfigError, match="no weights to multiply with in FP8"):
        LLM(DEFAULT_MODEL, tiers=MemoryTiers(device="200MiB", host="20MiB"), device="cpu", codec=codec,
            activation_dtype="fp8")  # fmt: skip


def test_names_and_devices_that_cannot(monkeypatch):
    with pytest.raises(ConfigError, match="not a dtype of activations"):
        LLM(DEFAULT_MODEL, device="cpu", activation_dtype="int3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(DeviceError, match=r"no products in FP8: .* 8\.6, not 8\.9"):
        fp8_linear.check_fp8(torch.device("cuda"))


def test_weights_that_do_not_suit_are_computed_with_as_always(tiny_llama, tmp_path):
    """One that was not packed, and those whose last group is shorter, which are expanded in a slot."""
    pack(tiny_llama, tmp_path / "odd", PackOptions("int4", group_size=64, exclude=("*o_proj*",)))
    model = load_model(tmp_path / "odd", in_fp8=True)
    for layout in model.layer_layouts:
        assert [one.target.name.rpartition(".mlp.")[2] for one in layout.expansions] == ["down_proj.weight"]
        assert len(layout.packed) == 5
    assert model.layers[0].self_attn.o_proj.weight.shape == (64, 64)
