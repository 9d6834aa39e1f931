"""Passes of few tokens that read packed weights where they rest: the same tokens as with expanded ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine import budget, rehearsal
from penstock.engine.executor import Executor
from penstock.engine.llm import DEFAULT_MODEL
from penstock.engine.model import attention, packed
from penstock.engine.model.build import load_model
from penstock.engine.model.packed import PackedLinear
from penstock.engine.pack import pack
from penstock.engine.recorder import PassRecorder
from penstock.engine.warm_up import warm_up_packed
from penstock.kernels.paged import attend_paged
from penstock.offload.buffers import restore
from penstock.offload.codec import PackOptions
from penstock.offload.copies import Copies
from penstock.offload.tiers import Tier

NUM_TOKENS = 40
RAGGED = [([5 + number] * length, new) for number, (length, new) in enumerate([(40, 30), (1, 4), (7, 30), (90, 17)])]


@pytest.fixture(scope="module", params=["int8", "int4"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / request.param
    pack(DEFAULT_MODEL, path, PackOptions(request.param))
    return path


@pytest.fixture
def calls(monkeypatch):
    """Let the CPU read packed weights as a GPU does, in its own way; count products and expansions."""
    counts = {"products": 0, "expansions": 0}

    def tokens_of(model, executor):
        return NUM_TOKENS if model.reads_packed and rehearsal.computes_packed(model, executor) else 0

    def multiply(*arguments):
        counts["products"] += 1
        return product(*arguments)

    def count(copies, layout, buffer, rest, after):
        counts["expansions"] += 1
        return expand(copies, layout, buffer, rest, after)

    product, expand = packed.packed_linear, Copies.restore
    monkeypatch.setattr(rehearsal, "packed_tokens", tokens_of)
    monkeypatch.setattr(packed, "packed_linear", multiply)
    monkeypatch.setattr(Copies, "restore", count)
    return counts


def complete(llm, work=RAGGED):
    params = [SamplingParams(max_tokens=new, temperature=0, ignore_eos=True) for _, new in work]
    return [one.outputs[0].token_ids for one in llm.generate([prompt for prompt, _ in work], params)]


def reference(path):
    with LLM(path, tiers=MemoryTiers(device="200MiB", host="0"), device="cpu") as llm:
        assert not llm.plan.num_slots
        return complete(llm)


@pytest.mark.parametrize("device_layers", [12, 5])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_passes_of_few_tokens_expand_nothing(checkpoint, calls, monkeypatch, device_layers, num_slots):
    """Whichever layers take turns in which slots; passes of many tokens expand all layers, before and after."""
    expected = reference(checkpoint)
    monkeypatch.setitem(budget.LIMITS, "cpu", replace(budget.LIMITS["cpu"], num_slots=num_slots))
    tiers = MemoryTiers(device="15MiB", host="20MiB")
    options = {"device": "cpu", "device_layers": device_layers, "pass_tokens": 64, "micro_batch_tokens": 32}
    with LLM(checkpoint, tiers=tiers, **options) as llm:
        assert len(llm.plan.layers_in(Tier.DEVICE)) == device_layers
        assert llm.plan.device_packed
        assert llm.plan.num_slots == num_slots
        assert llm.plan.packed_tokens == 16
        assert complete(llm) == expected
        assert calls["products"] >= 7 * device_layers * 25, "most passes only decode"
        assert 0 < calls["expansions"] < 12 * 12
        before = dict(calls)
        many = complete(llm, [([9] * 30, 2)] * 4)
        assert many == [many[0]] * 4
        assert calls["expansions"] > before["expansions"]
        assert complete(llm) == expected


def test_a_pass_that_moves_nothing_is_recorded(checkpoint, calls, monkeypatch):
    monkeypatch.setattr(attention, "find_paged", lambda *_: attend_paged)
    made = []
    for memory in ("200MiB", "16MiB"):
        with LLM(checkpoint, tiers=MemoryTiers(device=memory, host="0"), device="cpu", device_layers=12) as llm:
            assert llm.plan.device_share == 1
            assert llm.plan.device_packed == (memory == "16MiB")
            llm._recorder = PassRecorder(llm.model, llm._executor, llm.plan, record=lambda issue: issue)
            made.append(complete(llm))
            assert llm._recorder.num_replayed > 10
    assert made[0] == made[1]
    assert calls["products"]


def test_what_rests_is_what_parameters_are(checkpoint, calls):
    """Parameters that are not coded are those of the wire bytes: no slot must hold them."""
    with LLM(checkpoint, tiers=MemoryTiers(device="18MiB", host="0"), device="cpu", device_layers=12) as llm:
        for index, (layer, layout) in enumerate(zip(llm.model.layers, llm.model.layer_layouts, strict=True)):
            slot = torch.empty(layout.nbytes, dtype=torch.uint8)
            rest = llm._weights.packed_of(index)
            restore(layout, slot, rest)
            linear = [part for part in layer.modules() if isinstance(part, PackedLinear)]
            assert len(linear) == 7
            whole = layer.self_attn.o_proj.packed.expanded(torch.bfloat16)
            view = next(view for view in layout.parameters if view.name.endswith("o_proj.weight"))
            assert torch.equal(whole.view(torch.uint8).flatten(), slot[view.offset : view.offset + view.nbytes])
            norm = layer.input_layernorm.weight
            assert norm.untyped_storage().data_ptr() == rest.untyped_storage().data_ptr()
        warm_up_packed(llm.model, 40)
    assert all(part.packed is None for part in llm.model.module.modules() if isinstance(part, PackedLinear))


def test_code_that_asks_for_a_weight_itself_reads_none_packed(checkpoint, caplog, monkeypatch):
    model = load_model(checkpoint)
    assert model.reads_packed
    executor = Executor(model.layers)
    assert rehearsal.computes_packed(model, executor)
    attend = model.layers[3].self_attn
    forward = attend.forward
    dtypes = []

    def peeking(*arguments, **options):
        dtypes.append((attend.o_proj.weight.dtype, attend.o_proj.weight.shape, attend.o_proj.weight.device))
        return forward(*arguments, **options)

    attend.forward = peeking
    assert rehearsal.computes_packed(model, executor)
    assert dtypes == [(torch.bfloat16, (256, 256), torch.device("cpu"))]
    attend.forward = lambda *_, **options: forward(options["hidden_states"] @ attend.o_proj.weight, **options)
    with caplog.at_level("INFO", "penstock.engine"):
        assert not rehearsal.computes_packed(model, executor)
    assert "weights are expanded in every pass: TypeError" in caplog.text


def test_models_without_such_weights(tmp_path):
    pack(DEFAULT_MODEL, tmp_path / "exact", PackOptions("exact"))
    pack(DEFAULT_MODEL, tmp_path / "int4", PackOptions("int4"))
    for path, reads in ((tmp_path / "exact", False), (DEFAULT_MODEL, False), (tmp_path / "int4", True)):
        model = load_model(path)
        assert model.reads_packed == reads
        kinds = {type(part) for layer in model.layers for part in layer.modules() if isinstance(part, nn.Linear)}
        assert kinds == {PackedLinear if reads else nn.Linear}
