"""What a config tells of a model is what transformers' module and a rehearsal tell of it."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from quantised_checkpoints import awq, fp8, gptq, make, mxfp4
from test_model_dummy import PARAMETERS
from tiny_models import make_config, save_checkpoint

from penstock.engine.anatomy import SHAPES, anatomy_of, parameters_in, quantised_by, shape_directory, with_stored
from penstock.engine.blueprints import BLUEPRINTS, Part
from penstock.engine.executor import Executor
from penstock.engine.flops import count, count_flops
from penstock.engine.model.build import load_config, load_model, outline
from penstock.engine.model.conversion import parameter_dtypes
from penstock.engine.model.dummy import dummy_checkpoint
from penstock.engine.rehearsal import dissect, rehearse
from penstock.engine.sampler import Sampler
from penstock.errors import ConfigError, MissingFileError, ModelError, UnsupportedFormatError
from penstock.offload.codec import PackOptions
from penstock.offload.kv_dtype import KV_DTYPES, row_nbytes
from penstock.offload.kv_rows import encode

ROOT = Path(__file__).parents[3]
NAMES = sorted(os.listdir(SHAPES))


def built(directory):
    """Return the parameters of the units of transformers' own module, by number, the resident unit under -1."""
    config = load_config(directory)
    made = outline(config, directory, dtype="auto")
    dtypes = parameter_dtypes(made.module, made.dtype)
    units = defaultdict(list)
    for name, tensor in made.module.state_dict().items():
        if made.needed(name) and name not in made.module.all_tied_weights_keys:
            match = re.match(rf"{re.escape(made.layers_name)}\.(\d+)\.", name)
            units[int(match[1]) if match else -1].append(Part(name, tuple(tensor.shape), dtypes[name].itemsize))
    return config, units


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_has_the_bytes_and_the_arithmetic_of_the_real_module(tmp_path, name):
    """Of its first layers; in number the others are the same, since the sum is the published one."""
    whole = anatomy_of(shape_directory(name))
    parts = [part for unit in whole.layers for part in unit.parts if part.name.endswith("correction_bias")]
    assert whole.flops.parameters - sum(part.shape[0] for part in parts) == PARAMETERS[name]  # they are buffers
    raw = json.loads((SHAPES / name / "config.json").read_text())
    raw |= {"num_hidden_layers": 4, "layer_types": raw["layer_types"][:4] if "layer_types" in raw else None}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    config, units = built(tmp_path)
    anatomy = anatomy_of(SHAPES / name, layers=4)
    found = (anatomy.resident, *anatomy.layers)
    assert found == (whole.resident, *whole.layers[:4])
    for number, unit in enumerate(found, start=-1):
        wanted = units[number]
        assert sorted(part.nbytes for part in unit.parts) == sorted(part.nbytes for part in wanted)
        assert unit.nbytes == unit.wire_nbytes == sum(-(-part.nbytes // 256) * 256 for part in wanted)
    layers = [units[number] for number in range(4)]
    assert anatomy.flops == count(config, units[-1], layers, vocab_size=config.vocab_size)
    assert anatomy.flops.parameters == parameters_in(found)


KEPT = {"deepseek-v3": 576, "kimi-k2": 576, "llama-3-70b": 2 * 8 * 128, "qwen3-235b-a22b": 2 * 4 * 128,
        "opt-175b": 2 * 12288, "gpt-oss-120b": 2 * 8 * 64, "tiny": 2 * 4 * 128}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_a_layer_of_a_shape_keeps_of_a_token(name):
    anatomy = anatomy_of(shape_directory(name))
    assert anatomy.shape(on_cpu=False).kv_token_nbytes == 2 * len(anatomy.layers) * KEPT[name]


@pytest.fixture(scope="module", params=sorted(BLUEPRINTS))
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    save_checkpoint(make_config(FAMILIES[request.param], request.param), path, dtype=torch.bfloat16)
    return path


def test_a_family_costs_what_a_rehearsal_measures(checkpoint):
    """Weights, keys and values exactly; activations never less, but for a few bytes of tables and logits."""
    model = load_model(checkpoint)
    sampler = Sampler(vocab_size=model.vocab_size, num_rows=1)
    wanted = rehearse(model, Executor(model.layers), sampler_nbytes=sampler.nbytes)
    anatomy = anatomy_of(checkpoint)
    found = with_stored(anatomy, checkpoint).shape(on_cpu=True)
    for name in ("resident_nbytes", "fixed_nbytes", "layer_nbytes", "wire_nbytes", "kept_nbytes"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.kv_cost == wanted.kv_cost
    assert found.kv_windows == wanted.kv_windows
    assert anatomy.flops == count_flops(model)
    assert 0.98 * wanted.workspace_nbytes <= found.workspace_nbytes <= 2.5 * wanted.workspace_nbytes
    assert 0.98 * wanted.held_nbytes <= found.held_nbytes <= 2.5 * wanted.held_nbytes


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen2"])
def test_keys_and_values_rest_in_what_a_rehearsal_measures(tmp_path, name, kv_dtype):
    settings = {"head_dim": 44} if name == "gpt_oss" else {"num_attention_heads": 2}  # groups that are not whole
    save_checkpoint(make_config(FAMILIES[name] | settings, name), tmp_path)
    model = load_model(tmp_path)
    wanted = rehearse(model, Executor(model.layers), sampler_nbytes=0, kv_dtype=kv_dtype)
    found = anatomy_of(tmp_path, kv_dtype=kv_dtype).shape(on_cpu=True)
    assert found.kv_cost == wanted.kv_cost
    assert (found.kv_windows, found.kv_dtype) == (wanted.kv_windows, kv_dtype)
    assert found.workspace_nbytes >= 0.98 * wanted.workspace_nbytes


@given(st.integers(1, 300), st.sampled_from(KV_DTYPES))
def test_a_row_rests_in_what_the_code_makes_of_it(size, kv_dtype):
    rows = encode(torch.empty(1, 1, size, dtype=torch.float16), kv_dtype)
    assert row_nbytes(size, kv_dtype, itemsize=2) == rows.nbytes


WIDE = {
    "llama-3-70b": {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8},
    "qwen3-32b": {"hidden_size": 1280, "num_attention_heads": 16, "intermediate_size": 6400},
    "mixtral-8x7b": {"hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 3584},
    "qwen3-235b-a22b": {"hidden_size": 1024, "num_attention_heads": 16, "num_experts": 16,
                        "moe_intermediate_size": 384},
    "gpt-oss-120b": {"hidden_size": 720, "intermediate_size": 720, "num_local_experts": 8, "num_attention_heads": 16},
    "deepseek-v3": {"hidden_size": 896, "intermediate_size": 2304, "moe_intermediate_size": 256, "n_routed_experts": 16,
                    "num_attention_heads": 16, "num_key_value_heads": 16, "n_group": 1, "topk_group": 1,
                    "first_k_dense_replace": 1, "q_lora_rank": 192},
    "opt-30b": {"hidden_size": 896, "word_embed_proj_dim": 896, "ffn_dim": 3584, "num_attention_heads": 7},
}  # fmt: skip
"""Shapes made narrow, in their proportions, so that a rehearsal is quick."""


@pytest.mark.parametrize("name", WIDE)
def test_activations_of_shapes_are_an_upper_estimate(tmp_path, name):
    config = json.loads((SHAPES / name / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config |= {"layer_types": config["layer_types"][:2]} if "layer_types" in config else {}
    (tmp_path / "config.json").write_text(json.dumps(config | WIDE[name]))
    with dummy_checkpoint(tmp_path, scratch=tmp_path, distinct=1) as made:
        model = load_model(tmp_path, checkpoint=made)
        wanted = rehearse(model, Executor(model.layers), sampler_nbytes=0)
    found = anatomy_of(tmp_path).shape(on_cpu=True)
    assert found.layer_nbytes == wanted.layer_nbytes
    assert found.kv_cost == wanted.kv_cost
    assert found.kv_windows == wanted.kv_windows
    assert wanted.workspace_nbytes <= found.workspace_nbytes <= 1.5 * wanted.workspace_nbytes
    assert wanted.held_nbytes <= found.held_nbytes <= 1.5 * wanted.held_nbytes


def test_weights_of_another_dtype_travel_as_they_are_stored(tmp_path):
    save_checkpoint(make_config(FAMILIES["llama"], "llama"), tmp_path)
    model = load_model(tmp_path, dtype="bfloat16")
    found = with_stored(anatomy_of(tmp_path, dtype="bfloat16"), tmp_path)
    assert [unit.wire_nbytes for unit in found.layers] == [layout.wire_nbytes for layout in model.layer_layouts]
    assert [unit.nbytes for unit in found.layers] == [layout.nbytes for layout in model.layer_layouts]


@pytest.mark.parametrize("codec", ["exact", "int8", "int4"])
def test_packed_weights(tmp_path, codec):
    """What `coded` foresees, what the headers of the pack say, and what a run's layouts are, are the same but for
    the exact codec, whose bytes depend on the values."""
    from penstock.engine.pack import pack

    settings = FAMILIES["qwen3_moe"] | {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128}
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    save_checkpoint(make_config(settings, "qwen3_moe"), plain, dtype=torch.bfloat16)
    pack(plain, packed, PackOptions(codec))
    layouts = load_model(packed).layer_layouts
    seen = with_stored(anatomy_of(packed), packed)
    foreseen = anatomy_of(plain).coded(codec)
    for layout, stored, told in zip(layouts, seen.layers, foreseen.layers, strict=True):
        assert stored.wire_nbytes == pytest.approx(layout.wire_nbytes, rel=0.02)
        assert stored.nbytes == pytest.approx(layout.nbytes, rel=0.02)
        assert told.wire_nbytes == pytest.approx(layout.wire_nbytes, rel=0.06 if codec == "exact" else 0.02)
        assert told.nbytes == pytest.approx(layout.nbytes, rel=0.04)


QUANTISED = {
    "deepseek-v3-fp8": WIDE["deepseek-v3"],
    "kimi-k2-fp8": WIDE["deepseek-v3"],
    "gpt-oss-120b-mxfp4": WIDE["gpt-oss-120b"] | {"hidden_size": 704},
}


def test_every_quantised_shape_is_checked():
    assert set(QUANTISED) == {name for name in NAMES if quantised_by(SHAPES / name)}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_shape_travels_and_rests_as_the_made_up_checkpoint_does(tmp_path, name):
    config = json.loads((SHAPES / name / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config |= {"layer_types": config["layer_types"][:2]} if "layer_types" in config else {}
    (tmp_path / "config.json").write_text(json.dumps(config | QUANTISED[name]))
    with dummy_checkpoint(tmp_path, scratch=tmp_path, distinct=1) as made:
        model = load_model(tmp_path, checkpoint=made)
        wanted = rehearse(model, Executor(model.layers), sampler_nbytes=0)
    anatomy = with_stored(anatomy_of(tmp_path), tmp_path)
    found = anatomy.shape(on_cpu=True)
    for field in ("resident_nbytes", "layer_nbytes", "wire_nbytes", "kept_nbytes", "kv_windows", "kv_cost"):
        assert getattr(found, field) == getattr(wanted, field), field
    assert found.wire_nbytes[-1] < 0.6 * found.kept_nbytes[-1]
    assert anatomy.flops == count_flops(model)
    assert "cannot be packed" in anatomy.why_not_coded("int4")


@pytest.mark.parametrize(
    ("name", "quantised", "packer", "only"),
    [
        ("deepseek_v3", {"quant_method": "fp8", "weight_block_size": [16, 16]}, partial(fp8, block=(16, 16)), None),
        ("gpt_oss", {"quant_method": "mxfp4"}, mxfp4, lambda name, _: name.endswith("_proj") and "experts" in name),
        ("llama", {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
         partial(gptq, group_size=32), None),
        ("qwen3_moe", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
         partial(awq, group_size=32), None),
    ],
)  # fmt: skip
def test_headers_of_a_quantised_checkpoint(tmp_path, name, quantised, packer, only):
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path / "plain", dtype=torch.bfloat16)
    made = make(tmp_path / "plain", tmp_path, quantised, packer, only=only)
    model = load_model(made.path)
    anatomy = with_stored(anatomy_of(made.path), made.path)
    assert anatomy.quantised == quantised["quant_method"]
    for layout, unit in zip(model.layer_layouts, anatomy.layers, strict=True):
        assert (unit.wire_nbytes, unit.nbytes) == (layout.wire_nbytes, layout.nbytes)
    assert anatomy.shape(on_cpu=True).kept_nbytes == tuple(one.parameter_nbytes for one in model.layer_layouts)


def test_what_only_headers_tell_is_refused_by_name(tmp_path):
    raw = make_config(FAMILIES["llama"], "llama").to_dict()
    for method, match in (("gptq", "gptq take is not known from the config"), ("quip", "quip, which is not supported")):
        raw["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128, "desc_act": False}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(UnsupportedFormatError, match=match):
            with_stored(anatomy_of(tmp_path), tmp_path)


def test_a_family_without_a_blueprint_is_built_and_run_once(tmp_path):
    save_checkpoint(make_config(FAMILIES["gpt2"], "gpt2"), tmp_path)
    assert anatomy_of(tmp_path) is None
    found, model = dissect(tmp_path), load_model(tmp_path)
    assert found.flops == count_flops(model)
    shape = found.shape(on_cpu=True)
    assert shape.layer_nbytes == tuple(layout.nbytes for layout in model.layer_layouts)
    assert shape.kv_token_nbytes == 4 * 4 * 2 * 64


@pytest.mark.parametrize(("name", "kv_dtype"), [("gpt_neo", "auto"), ("gpt_neo", "int8"), ("qwen3_next", "int4")])
def test_what_is_built_and_run_once_keeps_what_a_rehearsal_measures(tmp_path, name, kv_dtype):
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    model = load_model(tmp_path)
    wanted = rehearse(model, Executor(model.layers), sampler_nbytes=0, kv_dtype=kv_dtype)
    found = dissect(tmp_path, kv_dtype=kv_dtype).shape(on_cpu=True)
    for field in ("kv_cost", "kv_windows", "kv_dtype", "kept_nbytes", "layer_nbytes"):
        assert getattr(found, field) == getattr(wanted, field), field
    assert wanted.workspace_nbytes <= found.workspace_nbytes <= wanted.workspace_nbytes + 4


def test_weights_of_another_model_are_not_believed(tmp_path):
    save_checkpoint(make_config(FAMILIES["llama"], "llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 200}))
    assert with_stored(anatomy_of(tmp_path), tmp_path) is None


def test_configs_that_are_wrong_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no such shape.*llama-3-70b.*got llama-9"):
        shape_directory("llama-9")
    with pytest.raises(MissingFileError, match=r"config\.json"):
        anatomy_of(tmp_path)
    file = tmp_path / "config.json"
    for text, match in (("{", "not JSON"), ("[]", "not a model"), ('{"model_type": "llama"}', "num_hidden_layers")):
        file.write_text(text)
        with pytest.raises(ModelError, match=match):
            anatomy_of(tmp_path)
    file.write_text(json.dumps({"model_type": "llama", "hidden_size": "wide", "num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"hidden_size.*'wide'"):
        anatomy_of(tmp_path)
    with pytest.raises(ConfigError, match="not a dtype"):
        anatomy_of(SHAPES / "tiny", dtype="int3")


def test_neither_torch_nor_transformers_nor_numpy_is_imported():
    program = (
        "import sys; from penstock.cli.main import main; "
        "main(['plan', '--shape', 'kimi-k2', '--hardware', 'h200', '--requests', '4']); "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kimi-k2" in done.stdout
