"""Checkpoints that come quantised: streamed as they are, they compute what the weights that they stand for compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from quantised_checkpoints import Made, awq, blocks_of, compressed_int8, compressed_packed, fp8, gptq, make, mxfp4
from safetensors.torch import load_file, save_file
from tiny_models import ANSWERS, PROMPTS, Stream, make_config, reference, save_checkpoint, worst_error
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from penstock.engine.llm import LLM
from penstock.engine.model.build import load_model
from penstock.engine.pack import pack
from penstock.engine.quality import layer_errors
from penstock.engine.sampling_params import SamplingParams
from penstock.engine.verify import verify
from penstock.errors import CheckpointError, ConfigError, MissingWeightError, UnsupportedFormatError
from penstock.offload.codec import PackOptions
from penstock.offload.tiers import MemoryTiers

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [40, 24]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 24, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 24, "version": "GEMM", "zero_point": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 24, "dynamic": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
Packer = Callable[..., Any]


def compressed(layout: str, weights: dict[str, Any], **changes: Any) -> dict[str, Any]:
    activations = {"num_bits": 8, "dynamic": True, "strategy": "token", "type": "int"}
    group = {"targets": ["Linear"], "weights": {**weights, **changes}, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "quantization_status": "compressed",
        "sparsity_config": {},
    }


def experts(name: str, _: torch.Tensor) -> bool:
    return ".experts." in name and name.endswith("_proj")


def rows_of_fp8(name: str, weight: torch.Tensor) -> Any:
    return fp8(name, weight, (1, weight.shape[1]), suffix="_scale")


def whole_fp8(name: str, weight: torch.Tensor) -> Any:
    parts, values = fp8(name, weight, tuple(weight.shape))
    return parts | {f"{name}_scale_inv": parts[f"{name}_scale_inv"].view(())}, values


def powers_fp8(name: str, weight: torch.Tensor, dtype: torch.dtype) -> Any:
    """Scales are powers of two, of which the exponents are stored."""
    parts, _ = fp8(name, weight, (40, 24))
    exponent = parts[f"{name}_scale_inv"].log2().ceil()
    spread = blocks_of(exponent.exp2(), (40, 24), *weight.shape)
    codes = (weight / spread).to(torch.float8_e4m3fn)
    scale = (exponent + 127).to(torch.uint8).view(dtype)
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * spread


def fused_fp8(name: str, weight: torch.Tensor) -> Any:
    """All experts of a layer in one tensor, and all their scales."""
    each = [fp8(name, one, (16, 32)) for one in weight]
    parts = {part: torch.stack([stored[part] for stored, _ in each]) for part in each[0][0]}
    return parts, torch.stack([values for _, values in each])


CASES: dict[str, tuple[str, dict[str, Any], Packer]] = {
    "fp8-blocks": ("deepseek_v3", FP8, partial(fp8, block=(40, 24))),
    "fp8-large-blocks": ("llama", {**FP8, "weight_block_size": [128, 128]}, fp8),
    "fp8-tensors": ("qwen3_moe", {**FP8, "weight_block_size": None}, whole_fp8),
    "fp8-powers": ("llama", FP8, partial(powers_fp8, dtype=torch.float8_e8m0fnu)),
    "fp8-bytes": ("llama", {**FP8, "scale_fmt": "ue8m0"}, partial(powers_fp8, dtype=torch.uint8)),
    "fp8-fused": ("gpt_oss", {**FP8, "weight_block_size": [16, 32]}, fused_fp8),
    "fbgemm": ("llama", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, rows_of_fp8),
    "mxfp4": ("gpt_oss", MXFP4, mxfp4),
    "packed": ("qwen2", compressed("pack-quantized", INT4), partial(compressed_packed, group_size=24)),
    "packed-zeros": (
        "qwen3_moe",
        compressed("pack-quantized", INT4, symmetric=False),
        partial(compressed_packed, group_size=24, symmetric=False),
    ),
    "packed-reordered": (
        "qwen2",
        compressed("pack-quantized", INT4, actorder="group"),
        partial(compressed_packed, group_size=24, permuted=True),
    ),
    "packed-bytes": (
        "qwen2",
        compressed("pack-quantized", INT8, symmetric=False),
        partial(compressed_packed, bits=8, group_size=None, symmetric=False),
    ),
    "int8": ("qwen2", compressed("int-quantized", INT8), compressed_int8),
    "int8-tensors": (
        "qwen2",
        compressed("int-quantized", INT8, strategy="tensor", symmetric=False),
        partial(compressed_int8, strategy="tensor", symmetric=False),
    ),
    "float8": ("qwen2_moe", compressed("float-quantized", FLOAT8), rows_of_fp8),
    "float8-blocks": (
        "llama",
        compressed("float-quantized", FLOAT8, strategy="block", block_structure=[40, 24]),
        partial(fp8, block=(40, 24), suffix="_scale"),
    ),
    "gptq": ("qwen2", GPTQ, partial(gptq, group_size=24)),
    "gptq-v2": (
        "qwen2",
        {**GPTQ, "checkpoint_format": "gptq_v2", "sym": False},
        partial(gptq, group_size=24, version="gptq_v2", symmetric=False, index="none"),
    ),
    "gptq-reordered": (
        "qwen3_moe",
        {**GPTQ, "desc_act": True},
        partial(gptq, group_size=24, symmetric=False, index="permuted"),
    ),
    "gptq-bytes": ("qwen2", {**GPTQ, "bits": 8, "group_size": -1}, partial(gptq, bits=8, group_size=-1)),
    "awq": ("qwen3_moe", AWQ, partial(awq, group_size=24)),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Plain checkpoints of two layers, each made once."""
    root = tmp_path_factory.mktemp("plain")

    def get(family: str, **changes: Any) -> Path:
        path = root / family / "-".join(map(str, changes.values() or ["own"]))
        if not path.exists():
            settings = {**FAMILIES[family], "num_hidden_layers": 2, **changes}
            if "layer_types" in settings:
                settings["layer_types"] = settings["layer_types"][:2]
            save_checkpoint(make_config(settings, family), path)
        return path

    return get


@pytest.fixture
def made(plain: Callable[..., Path], tmp_path: Path) -> Callable[[str], Made]:
    def build(case: str) -> Made:
        family, config, packer = CASES[case]
        return make(plain(family), tmp_path / case, config, packer, only=chosen(packer))

    return build


def chosen(packer: Packer) -> Callable[[str, torch.Tensor], bool] | None:
    return experts if packer in (mxfp4, fused_fp8) else None


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_weights_that_they_stand_for(case: str, made: Callable[[str], Made]) -> None:
    one = made(case)
    assert worst_error(Stream.open(one.path, dtype="float32"), reference(one.decoded)) <= 5e-5


@pytest.mark.parametrize(
    ("family", "changes", "case"),
    [
        ("llama", {}, "fp8"),
        ("deepseek_v3", {"qk_nope_head_dim": 24, "kv_lora_rank": 32}, "fp8"),
        ("gpt_oss", {}, "mxfp4"),
    ],
)
def test_logits_are_those_of_transformers_own_dequantisation(
    family: str,
    changes: dict[str, int],
    case: str,
    plain: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its FP8 wants whole blocks, and a package that is not needed for this."""
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    config = MXFP4 if case == "mxfp4" else {**FP8, "weight_block_size": [8, 8]}
    packer = mxfp4 if case == "mxfp4" else partial(fp8, block=(8, 8))
    one = make(plain(family, **changes), tmp_path, config, packer, only=experts if case == "mxfp4" else None)
    ask = Mxfp4Config(dequantize=True) if case == "mxfp4" else FineGrainedFP8Config("dynamic", (8, 8), dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(one.path, quantization_config=ask, dtype=torch.float32).float().eval()
    with torch.no_grad():
        wanted = [
            model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
            for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
        ]
    assert worst_error(Stream.open(one.path, dtype="float32"), wanted) <= 5e-5


@pytest.mark.parametrize("case", ["fp8-blocks", "mxfp4", "gptq-reordered", "awq", "packed"])
def test_greedy_tokens_through_the_budget(case: str, made: Callable[[str], Made], device: str) -> None:
    """No layer stays anywhere: each is read from disk, coded, in every pass; and the reference agrees."""
    one = made(case)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with LLM(one.decoded, device=device, dtype="float32", tiers=MemoryTiers(device="100MiB", host="0")) as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
    with LLM(
        one.path, device=device, dtype="float32", device_layers=0, tiers=MemoryTiers(device="100MiB", host="0")
    ) as llm:
        assert len(llm.plan.layers_in("nvme")) == len(llm.model.layers)
        outputs = llm.generate(prompts, greedy)
    assert [output.outputs[0].token_ids for output in outputs] == wanted
    assert verify(one.path, outputs, dtype="float32", device=device).passed


def test_experts_are_decoded_in_one_go_and_the_coded_bytes_travel(made: Callable[[str], Made]) -> None:
    layout = load_model(made("fp8-blocks").path, dtype="float32").layer_layouts[-1]
    assert sorted(one.count for one in layout.expansions)[-2:] == [8, 16]
    assert not layout.conversions
    assert layout.wire_nbytes < 0.35 * layout.parameter_nbytes


def test_the_dtype_is_the_configs(made: Callable[[str], Made]) -> None:
    path = made("gptq").path
    edit(path, dtype="bfloat16")
    assert load_model(path).dtype == torch.bfloat16
    assert load_model(path, dtype="float16").dtype == torch.float16


def test_packing_again_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantised already, with gptq"):
        pack(made("gptq").path, tmp_path / "out", PackOptions("int8"))


def test_what_a_published_quantisation_costs_each_layer(
    plain: Callable[..., Path], made: Callable[[str], Made]
) -> None:
    one = made("packed")
    errors = layer_errors(plain("qwen2"), one.path)
    assert [each.layer for each in errors] == [0, 1]
    assert all(0.02 < each.error < 0.2 and each.num_tensors == 7 for each in errors)
    assert all(each.error < 1e-6 for each in layer_errors(one.decoded, one.path))
    with pytest.raises(ConfigError, match="not a packed checkpoint"):
        layer_errors(one.path, one.decoded)


# ----------------------------------------------------------------------------------------------------- refusals


def edit(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def group(**changes: Any) -> dict[str, Any]:
    return compressed("pack-quantized", INT4, **changes)


REFUSED: list[tuple[dict[str, Any] | str, str]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, which is not supported"),
    ({"quant_method": "modelopt"}, "wanted fp8, fbgemm_fp8, mxfp4, gptq, awq, compressed-tensors"),
    ({"bits": 4}, "an unnamed method"),
    ("awq", "awq"),
    ({**FP8, "fmt": "e5m2"}, "fmt: wanted e4m3"),
    ({**FP8, "expert_dtype": "fp4"}, "expert_dtype"),
    ({**FP8, "weight_block_size": [128]}, "weight_block_size"),
    ({**FP8, "weight_block_size": [0, 128]}, "weight_block_size"),
    ({**FP8, "scale_fmt": "float16"}, "scale_fmt"),
    ({**GPTQ, "bits": 3}, "bits: wanted 4 or 8, got 3"),
    ({**GPTQ, "group_size": 0}, "group_size"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format: wanted gptq or gptq_v2"),
    ({**GPTQ, "is_marlin_format": True}, "is_marlin_format"),
    ({**GPTQ, "desc_act": "yes"}, "desc_act"),
    ({**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
    ({**AWQ, "bits": 3}, "bits"),
    ({**AWQ, "version": "gemv"}, "version: wanted gemm, got 'gemv'"),
    ({**AWQ, "zero_point": False}, "zero_point"),
    (compressed("nvfp4-pack-quantized", INT4), "format"),
    (compressed("marlin-24", INT4), "format"),
    (group(num_bits=3), "num_bits"),
    (group(strategy="tensor_group"), "strategy"),
    (group(type="float"), "type"),
    (group(actorder="other"), "actorder"),
    ({**group(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ({**group(), "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    ({**group(), "ignore": ["re:("]}, "ignore: "),
    ({**group(), "transform_config": "spin"}, "transform_config: wanted an object"),
    ({**group(), "config_groups": {}}, "config_groups"),
    ({**group(), "config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}}, "group_0 without weights"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(
    config: Any, message: str, plain: Callable[..., Path], tmp_path: Path
) -> None:
    raw = json.loads((plain("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    with pytest.raises(UnsupportedFormatError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)


def test_plain_weights_under_a_config_that_says_otherwise(made: Callable[[str], Made]) -> None:
    path = made("gptq").decoded
    edit(path, quantization_config=GPTQ)
    with pytest.raises(CheckpointError, match="quantised with gptq, and none is"):
        load_model(path)


# ------------------------------------------------------------------------------------------------------- faults

Q = "model.layers.0.self_attn.q_proj."


@pytest.fixture(scope="module")
def whole(plain: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Checkpoints that faults are put into, each made once."""
    root = tmp_path_factory.mktemp("whole")

    def get(case: str) -> Path:
        family, config, packer = CASES[case]
        if not (root / case).exists():
            make(plain(family), root / case, config, packer, only=chosen(packer))
        return root / case / "quantised"

    return get


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(name)  # type: ignore[return-value]


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def run(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = how(tensors[name]).contiguous()

    return run


def add(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


FUSED = "model.layers.0.mlp.experts.gate_up_proj"
FAULTS: list[tuple[str, Callable[[dict[str, torch.Tensor]], None], type[Exception], str]] = [
    ("fp8-large-blocks", drop(f"{Q}weight_scale_inv"), MissingWeightError, "no scale beside"),
    ("fp8-large-blocks", drop(f"{Q}weight"), MissingWeightError, "no codes beside"),
    ("fp8-blocks", change("model.layers.0.mlp.up_proj.weight_scale_inv", lambda one: one[:-1]), CheckpointError,
     "wanted F32 or BF16 or F16 or F8_E8M0 (3, 3), got F32 (2, 3)"),
    ("fp8-large-blocks", change(f"{Q}weight_scale_inv", torch.Tensor.int), CheckpointError, "got I32 (1, 1)"),
    ("fp8-large-blocks", change(f"{Q}weight", torch.Tensor.bfloat16), CheckpointError, "one too many"),
    ("fp8-large-blocks", change(f"{Q}weight", lambda one: one[:8]), CheckpointError, "does not fit parameter"),
    ("fp8-large-blocks", add(f"{Q}weight_scale", (1, 1), torch.float32), CheckpointError, "one too many beside"),
    ("fp8-fused", change(f"{FUSED}_scale_inv", lambda one: one[:, 1:]), CheckpointError, "got F32 (8, 3, 6)"),
    ("fp8-large-blocks", change(f"{Q}weight", torch.Tensor.flatten), CheckpointError, "wanted 2 or 3 dims"),
    ("mxfp4", drop(f"{FUSED}_scales"), MissingWeightError, "no scale beside"),
    ("mxfp4", change(f"{FUSED}_blocks", lambda one: one[..., :8]), CheckpointError, "wanted U8 (8, 192, 2, 16)"),
    ("mxfp4", change(f"{FUSED}_scales", lambda one: one[:, 1:]), CheckpointError, "(8, 192, 2), got U8 (8, 191, 2)"),
    ("mxfp4", change(f"{FUSED}_scales", torch.Tensor.float), CheckpointError, "got F32"),
    ("mxfp4", add(FUSED, (8, 64, 192), torch.bfloat16), CheckpointError, "one too many beside"),
    ("gptq", drop(f"{Q}qzeros"), MissingWeightError, "no zero beside"),
    ("gptq", drop(f"{Q}scales"), MissingWeightError, "no scale beside"),
    ("gptq", drop(f"{Q}qweight"), MissingWeightError, "no codes beside"),
    ("gptq-reordered", drop(f"{Q}g_idx"), MissingWeightError, "no index beside"),
    ("gptq", change(f"{Q}scales", lambda one: one[1:]), CheckpointError, "wanted F32 or BF16 or F16 (3, 64)"),
    ("gptq", change(f"{Q}qzeros", lambda one: one[:, 1:]), CheckpointError, "wanted I32 (3, 8), got I32 (3, 7)"),
    ("gptq", change(f"{Q}qweight", torch.Tensor.float), CheckpointError, "wanted I32, got F32"),
    ("gptq", change(f"{Q}qweight", lambda one: one[1:]), CheckpointError, "wanted I32 (8, 64), got I32 (7, 64)"),
    ("gptq", change(f"{Q}g_idx", torch.Tensor.long), CheckpointError, "got I64"),
    ("awq", change(f"{Q}scales", lambda one: one[:, 1:]), CheckpointError, "(3, 64)"),
    ("awq", add(f"{Q}g_idx", (64,), torch.int32), CheckpointError, "one too many for what the config says"),
    ("packed", drop(f"{Q}weight_scale"), MissingWeightError, "no scale beside"),
    ("packed", drop(f"{Q}weight_shape"), MissingWeightError, "no shape beside"),
    ("packed", change(f"{Q}weight_scale", lambda one: one[:, 1:]), CheckpointError, "(64, 3), got BF16 (64, 2)"),
    ("packed", add(f"{Q}weight_zero_point", (8, 3), torch.int32), CheckpointError, "one too many for"),
    ("packed-zeros", drop(f"{Q}weight_zero_point"), MissingWeightError, "no zero beside"),
    ("packed-zeros", change(f"{Q}weight_zero_point", lambda one: one.T), CheckpointError, "wanted I32 (8, 3)"),
    ("packed-reordered", drop(f"{Q}weight_g_idx"), MissingWeightError, "no index beside"),
    ("int8", drop(f"{Q}weight_scale"), MissingWeightError, "no scale beside"),
    ("int8", change(f"{Q}weight_scale", lambda one: one.T), CheckpointError, "(64, 1), got BF16 (1, 64)"),
    ("int8-tensors", change(f"{Q}weight_zero_point", torch.Tensor.int), CheckpointError, "wanted I8"),
    ("int8", add("lm_head.weight_scale", (257, 1), torch.bfloat16), CheckpointError, "one too many beside"),
    ("float8", change(f"{Q}weight", lambda one: one.view(torch.int8)), CheckpointError, "wanted F8_E4M3, got I8"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "fault", "error", "message"), FAULTS)
def test_a_fault_is_found_before_anything_is_read(
    case: str,
    fault: Callable[[dict[str, torch.Tensor]], None],
    error: type[Exception],
    message: str,
    whole: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = whole(case)
    tensors = load_file(source / "model.safetensors")
    fault(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(error) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_a_weight_that_the_config_leaves_as_it_is(whole: Callable[[str], Path], tmp_path: Path) -> None:
    source = whole("int8")
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    quantised = {**deepcopy(CASES["int8"][1]), "ignore": ["re:.*q_proj"]}
    edit(tmp_path, quantization_config=quantised)
    with pytest.raises(CheckpointError, match="and the config says that it is not"):
        load_model(tmp_path)
    quantised["ignore"] = []
    quantised["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    edit(tmp_path, quantization_config=quantised)
    with pytest.raises(UnsupportedFormatError, match="is quantised, and in no group"):
        load_model(tmp_path)


def test_scales_of_activations_are_left_out(whole: Callable[[str], Path], tmp_path: Path) -> None:
    source = whole("fp8-large-blocks")
    tensors = load_file(source / "model.safetensors")
    tensors |= {f"{Q}{name}": torch.ones(1) for name in ("input_scale", "activation_scale")}
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    found = load_model(tmp_path)
    assert found.layer_layouts == Stream.open(tmp_path).model.layer_layouts


def test_transposed_layers_are_refused(plain: Callable[..., Path], tmp_path: Path) -> None:
    one = make(
        plain("gpt2"), tmp_path, GPTQ, partial(gptq, group_size=24), only=lambda name, _: "c_proj.weight" in name
    )
    with pytest.raises(UnsupportedFormatError, match="Conv1D"):
        load_model(one.path)
