"""Packing on load: the bits of `penstock pack` and a run of that, with nothing written and every budget true."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from pretend_cuda import There, pretend_cuda
from safetensors.torch import load_file, save_file
from stream_plans import stream_plan
from tiny_models import make_config, save_checkpoint

from penstock.engine.code_on_load import CodeOnLoad
from penstock.engine.executor import Executor
from penstock.engine.llm import DEFAULT_MODEL, LLM
from penstock.engine.model.build import StreamedModel, load_model
from penstock.engine.model.dummy import dummy_checkpoint
from penstock.engine.pack import pack
from penstock.engine.sampling_params import SamplingParams
from penstock.errors import BudgetError, ConfigError, FileChangedError
from penstock.io.checkpoint import Checkpoint
from penstock.io.settings import ReadSettings
from penstock.kernels import exact, groupwise
from penstock.offload import packing
from penstock.offload.codec import PackOptions
from penstock.offload.layout import Layout
from penstock.offload.plan import Plan
from penstock.offload.stream import WeightStream
from penstock.offload.tiers import MemoryTiers, Tier

CODECS = ("exact", "int8", "int4")
TIERS = {"host": (Tier.HOST,) * 4, "device": (Tier.DEVICE,) * 4, "both": (Tier.HOST, Tier.DEVICE) * 2}
MODELS = {
    "dense": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "experts one by one": ("mixtral", {}),
    "fused experts": ("gpt_oss", {}),
    "transposed": ("gpt2", {}),
    "another dtype": ("llama", {}),
}
PROMPTS = ["class Point:\n    def __init__(self, x, y):\n", "import os\n\n\ndef read_file(path):\n"]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, logprobs=2)


def plan_of(model: StreamedModel, tiers: Sequence[Tier], *, packed: bool) -> Plan:
    """A plan with two slots, or none."""
    return stream_plan(model, tiers, 0 if set(tiers) == {Tier.DEVICE} and not packed else 2, packed=packed)


def parameters(layout: Layout, buffer: torch.Tensor) -> dict[str, bytes]:
    memory = buffer.memory if isinstance(buffer, There) else buffer.cpu()
    return {view.name: memory[view.offset : view.offset + view.nbytes].numpy().tobytes() for view in layout.parameters}


def streamed(
    model: StreamedModel, checkpoint: Checkpoint, tiers: Sequence[Tier], device: str, *, packed: bool = False
) -> list[dict[str, bytes]]:
    """Return what every unit's parameters are, in two passes, which are equal."""
    passes = []
    with WeightStream(
        plan_of(model, tiers, packed=packed),
        checkpoint=checkpoint,
        resident=model.resident,
        layers=model.layer_layouts,
        device=torch.device(device),
        checks=model.checks,
    ) as stream:
        done: list[tuple[int, int]] = []
        stream.load(lambda *state: done.append(state))
        assert done[-1][0] == done[-1][1] > 0
        loaded = stream.statistics().device_bytes
        for _ in range(2):
            made = [parameters(model.resident, stream.resident)]
            for index, layout in enumerate(model.layer_layouts):
                with stream.layer(index):
                    if device != "cpu":
                        torch.cuda.synchronize()
                    made.append(parameters(layout, stream.buffer_of(index)))
            passes.append(made)
        if set(tiers) == {Tier.DEVICE}:
            assert stream.statistics().device_bytes == loaded, "what stays on the device needs no link"
    assert passes[0] == passes[1]
    return passes[0]


def coder(options: PackOptions, device: str = "cpu") -> CodeOnLoad:
    return CodeOnLoad(options.resolved(), torch.device(device), ReadSettings())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny bfloat16 models, and what each codec makes of them; made when they are asked for."""
    root = tmp_path_factory.mktemp("models")

    def path_of(name: str, codec: str | None = None) -> Path:
        family, more = MODELS[name]
        source = root / family / ("tied" if more else "plain")
        if not source.exists():
            save_checkpoint(make_config({**FAMILIES[family], **more}, family), source, dtype=torch.bfloat16)
        if codec is None:
            return source
        packed = source.with_name(f"{source.name}-{codec}")
        if not packed.exists():
            pack(source, packed, PackOptions(codec, exclude=("*layers.2.*",) if family == "llama" else ()))
        return packed

    return path_of


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *((name, codec) for name in ("dense", "experts one by one", "fused experts") for codec in CODECS),
        ("tied", "exact"),
        ("tied", "int4"),
        ("transposed", "int8"),
        ("another dtype", "exact"),
    ],
)
def test_the_bits_are_those_of_a_packed_checkpoint(checkpoints, name, codec, device):
    source, packed = checkpoints(name), checkpoints(name, codec)
    dtype = "float32" if name == "another dtype" else "bfloat16"
    options = PackOptions(codec, exclude=("*layers.2.*",) if MODELS[name][0] == "llama" else ())
    wanted_model = load_model(packed, dtype=dtype, device=device)
    model = load_model(source, dtype=dtype, device=device, code=coder(options, device))
    assert model.layer_layouts[0].encodings
    assert [one.wire_nbytes for one in model.layer_layouts] == [one.wire_nbytes for one in wanted_model.layer_layouts]
    wanted = streamed(wanted_model, Checkpoint.open(packed), TIERS["host"], device)
    for tiers in (TIERS["device"], TIERS["both"]):
        for is_packed in (False, True):
            assert streamed(model, Checkpoint.open(source), tiers, device, packed=is_packed) == wanted
        assert streamed(wanted_model, Checkpoint.open(packed), tiers, device, packed=True) == wanted
    if codec == "exact":
        plain = load_model(source, dtype=dtype, device=device)
        assert streamed(plain, Checkpoint.open(source), TIERS["host"], device) == wanted


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real device is better")
@pytest.mark.parametrize(("name", "codec"), [*(("dense", codec) for codec in CODECS), ("fused experts", "int4")])
def test_a_device_that_is_not_there_packs_the_same_bits(checkpoints, monkeypatch, name, codec):
    """Copies to host RAM come late there, and nothing may be used or written too soon."""
    source = checkpoints(name)
    model = load_model(source, code=coder(PackOptions(codec)))
    wanted = streamed(model, Checkpoint.open(source), TIERS["both"], "cpu")
    with pretend_cuda(monkeypatch) as stream:
        stream.may_wait = True
        counted = CodeOnLoad(PackOptions(codec).resolved(), torch.device("cuda"), ReadSettings())
        there = load_model(source, device="cpu", code=counted)
        assert there.layer_layouts == model.layer_layouts
        on_cuda = replace(there, device=torch.device("cuda"))
        found = [
            streamed(on_cuda, Checkpoint.open(source), TIERS["both"], "cuda", packed=packed) for packed in (False, True)
        ]
        assert stream.num_late > 0
    assert found == [wanted, wanted]


@pytest.mark.parametrize("count", [1, 1023, 4096, 100_001])
def test_a_device_encodes_exactly_what_the_processor_does(count, device):
    values = (torch.randn(count, generator=torch.Generator().manual_seed(count)) * 0.02).bfloat16()
    values[::97] = torch.tensor(float("nan"))
    table = exact.choose_table(values)
    wanted, found = exact.encode(values, table), exact.encode_reference(values.to(device), table.to(device))
    for name in ("low", "code", "start", "extra"):
        one, other = getattr(wanted, name), getattr(found, name).cpu()
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, True), (4, False)])
def test_a_device_quantises_to_the_same_bits(bits, symmetric, device):
    values = (torch.randn(37, 1000, generator=torch.Generator().manual_seed(bits)) * 0.02).bfloat16()
    values[3, :200], values[5] = 0, values[5].abs()
    options = {"bits": bits, "group_size": 64, "symmetric": symmetric}
    wanted, found = groupwise.quantise(values, **options), groupwise.quantise(values.to(device), **options)
    assert torch.equal(found.codes.cpu(), wanted.codes)
    assert torch.equal(found.scale.cpu(), wanted.scale)
    assert symmetric or torch.equal(found.zero.cpu(), wanted.zero)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("codec", CODECS)
def test_passes_over_packed_layers_never_wait(monkeypatch, codec):
    """The first run compiles kernels; the second is watched."""
    run_pass = Executor.run_pass

    def watched(self, batches):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run_pass(self, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    options = {"tiers": MemoryTiers(device="60MiB", host="40MiB"), "device": "cuda", "device_layers": 0}
    with LLM(DEFAULT_MODEL, codec=codec, **options) as llm:
        first = llm.generate(PROMPTS, GREEDY)
        monkeypatch.setattr(Executor, "run_pass", watched)
        assert [one.outputs for one in llm.generate(PROMPTS, GREEDY)] == [one.outputs for one in first]
        assert llm.last_run.traffic.expand_seconds > 0


# ------------------------------------------------------------------------------------------------- whole runs


def generate(
    path: Path, codec: str | PackOptions | None, host: str, device: str, memory: str = "13MiB", layers: int | None = 0
):
    tiers = MemoryTiers(device=memory, host=host)
    with LLM(path, codec=codec, device=device, tiers=tiers, device_layers=layers) as llm:
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, GREEDY)]
        return [(one.token_ids, one.logprobs) for one in outputs], llm.plan, llm.last_run


@pytest.mark.parametrize("codec", CODECS)
def test_a_run_is_that_of_a_packed_model(tmp_path, codec, device):
    pack(DEFAULT_MODEL, tmp_path / "packed", PackOptions(codec))
    wanted, plan, _ = generate(tmp_path / "packed", None, "40MiB", device)
    found, mine, report = generate(DEFAULT_MODEL, codec, "40MiB", device)
    assert found == wanted
    assert mine.tiers == plan.tiers
    assert mine.host_nbytes == plan.host_nbytes > 0
    assert report.as_dict()["codec"] == codec
    moved = report.traffic
    ratio = moved.decoded_bytes / moved.device_bytes
    assert ratio == pytest.approx({"exact": 1.32, "int8": 1.96, "int4": 3.6}[codec], rel=0.02)
    if device == "cpu":
        assert moved.expand_seconds > 0
        assert moved.transfer_seconds > 0
    if codec == "exact":
        assert found == generate(DEFAULT_MODEL, None, "40MiB", device)[0]
    resident, mine, report = generate(DEFAULT_MODEL, codec, "4MiB", device, memory="18MiB", layers=12)
    assert resident == wanted
    assert mine.device_packed
    if codec != "exact":  # of which a GPU's slots leave room for fewer
        assert mine.layers_in(Tier.DEVICE) == tuple(range(12))
        assert report.traffic.device_bytes == report.traffic.transfer_seconds == 0
        assert report.traffic.host_stall_seconds == report.traffic.disk_stall_seconds == 0
    assert report.as_dict()["plan"]["device_packed"]


def test_host_memory_is_used_well_and_never_exceeded(device):
    """What the plan says is what is taken; a byte less is refused, since no layer may be left on NVMe."""
    wire = sum(
        layout.wire_nbytes for layout in load_model(DEFAULT_MODEL, code=coder(PackOptions("int8"))).layer_layouts
    )
    options = {"codec": "int8", "device": device, "device_layers": 0}
    with LLM(DEFAULT_MODEL, tiers=MemoryTiers(device="13MiB", host=wire), **options) as llm:
        assert llm.plan.host_nbytes == wire == sum(place.numel() for place in llm._weights._rest.values())
        assert not llm.plan.layers_in(Tier.NVME)
    with pytest.raises(BudgetError, match="packed on load cannot be left on NVMe"):
        LLM(DEFAULT_MODEL, tiers=MemoryTiers(device="13MiB", host=wire - 1), **options)


def test_layers_of_the_same_bytes_are_packed_once(tmp_path, device, monkeypatch):
    """Dummies share bytes in host RAM too, and the budget counts them all."""
    encoded = []
    encode = packing.Packer._encode
    monkeypatch.setattr(packing.Packer, "_encode", lambda *args: (encoded.append(args[1].source), encode(*args))[1])
    with dummy_checkpoint(DEFAULT_MODEL, scratch=tmp_path, distinct=2, num_layers=9) as checkpoint:
        options = {"tiers": MemoryTiers(device="40MiB", host="1GiB"), "device": device, "device_layers": 0}
        with LLM(checkpoint.directory, checkpoint=checkpoint, codec="exact", **options) as llm:
            layouts = llm.model.layer_layouts
            assert len(encoded) == len(set(encoded)) == 2 * len(layouts[0].encodings)
            assert llm.plan.host_nbytes == sum(layout.wire_nbytes for layout in layouts)
            assert sum(one.wire_nbytes for one in layouts) / sum(one.parameter_nbytes for one in layouts) <= 0.76
            llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=2, temperature=0.0))


# ---------------------------------------------------------------------------------------------------- bad input


def test_refusals(tmp_path, checkpoints, device):
    pack(DEFAULT_MODEL, tmp_path / "packed", PackOptions("exact"))
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    config = json.loads((DEFAULT_MODEL / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (quantised / "config.json").write_text(json.dumps(config))
    (quantised / "model.safetensors").symlink_to(DEFAULT_MODEL / "model.safetensors")
    for path, codec, message in (
        (tmp_path / "packed", "int8", "packed already"),
        (quantised, "int8", "quantised already"),
        (DEFAULT_MODEL, "exact-ans", "cannot be packed on load"),
        (DEFAULT_MODEL, PackOptions("exact", group_size=64), "no groups"),
        (DEFAULT_MODEL, PackOptions("int8", exclude=("nothing*",)), "nothing to exclude"),
        (DEFAULT_MODEL, PackOptions("int8", exclude=("*",)), "nothing to code"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(path, codec=codec, device=device, tiers=MemoryTiers(device="40MiB", host="40MiB"))


def test_other_dtypes_have_nothing_for_the_exact_codec(tiny_llama, device):
    with pytest.raises(ConfigError, match="nothing to code as exact") as caught:
        LLM(tiny_llama, codec="exact", device=device, tiers=MemoryTiers(device="40MiB", host="40MiB"))
    assert "BF16" in str(caught.value)
    assert "F32" in str(caught.value)


def test_a_tensor_that_a_codec_does_not_take_is_named_and_can_be_excluded(tmp_path, checkpoints, device):
    source = checkpoints("dense")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: one for file in source.glob("*.safetensors") for name, one in load_file(file).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][5, 5] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    tiers = MemoryTiers(device="40MiB", host="40MiB")
    with pytest.raises(ConfigError, match="cannot be packed") as caught:
        LLM(tmp_path, codec="int4", device=device, tiers=tiers, device_layers=0)
    assert f"--exclude '{name}'" in str(caught.value)
    with LLM(tmp_path, codec=PackOptions("int4", exclude=(name,)), device=device, tiers=tiers, device_layers=0) as llm:
        layout = llm.model.layer_layouts[1]
    assert name not in {one.name for one in layout.encodings}
    with LLM(tmp_path, codec="exact", device=device, tiers=tiers):
        pass


def test_weights_that_change_after_they_were_counted_are_refused(tmp_path, checkpoints, monkeypatch, device):
    """Their parts would be longer than the room that was planned for them."""
    source = checkpoints("dense")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: one for file in source.glob("*.safetensors") for name, one in load_file(file).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path, device=device, code=coder(PackOptions("exact"), device))
    layouts = [
        replace(layout, encodings=tuple(replace(one, table=bytes(range(16))) for one in layout.encodings))
        for layout in model.layer_layouts
    ]
    model = replace(model, layer_layouts=tuple(layouts))
    with pytest.raises(FileChangedError, match="a moment ago"):
        streamed(model, Checkpoint.open(tmp_path), TIERS["host"], device)
