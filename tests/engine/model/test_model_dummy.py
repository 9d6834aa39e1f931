"""Dummy checkpoints are what the family's checkpoints are, and shapes are what they are named after."""

import json
import os

import pytest
import torch
from families import FAMILIES
from tiny_models import make_config, save_checkpoint

from penstock.cli.bench import SHAPES
from penstock.engine.model.build import load_config, load_model, outline
from penstock.engine.model.dummy import dummy_checkpoint
from penstock.errors import ConfigError, ModelError, TargetError
from penstock.io.checkpoint import Checkpoint
from penstock.offload.buffers import view_of
from penstock.offload.source import read_unit

PARAMETERS = {
    "deepseek-v3": 671_026_404_352,
    "deepseek-v3-fp8": 671_026_404_352,
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-120b-mxfp4": 116_829_156_672,
    "kimi-k2": 1_026_408_209_408,
    "kimi-k2-fp8": 1_026_408_209_408,
    "llama-3-405b": 405_853_388_800,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,
    "opt-175b": 174_604_468_224,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-32b": 32_762_123_264,
    "tiny": 192_971_776,
}
"""As published: on the model cards and in the metadata of the checkpoints, where there are any."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_the_published_number_of_parameters(name):
    config = load_config(SHAPES / name)
    made = outline(config, SHAPES / name, dtype="auto")
    assert sum(parameter.numel() for parameter in made.module.parameters()) == PARAMETERS[name]
    assert made.dtype == (torch.float16 if name.startswith("opt") else torch.bfloat16)
    assert len(made.layers) == config.num_hidden_layers


def test_every_shape_is_checked():
    assert sorted(PARAMETERS) == sorted(os.listdir(SHAPES))


@pytest.mark.parametrize(
    "name", ["llama", "opt", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"]
)
def test_names_dtypes_and_shapes_are_those_that_transformers_saves(tmp_path, name):
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    saved = Checkpoint.open(tmp_path).tensors
    with dummy_checkpoint(tmp_path, scratch=tmp_path, distinct=1) as made:
        assert {key: (e.dtype, e.shape) for key, e in made.tensors.items()} == {
            key: (e.dtype, e.shape) for key, e in saved.items()
        }
        model = load_model(tmp_path, checkpoint=made)
        buffers = [torch.zeros(layout.nbytes, dtype=torch.uint8) for layout in model.layer_layouts]
        for layout, buffer in zip(model.layer_layouts, buffers, strict=True):
            read_unit(layout, buffer)
            assert buffer.any()


@pytest.mark.parametrize(
    ("name", "quantised", "share"),
    [
        ("deepseek_v3", {"quant_method": "fp8", "weight_block_size": [16, 16]}, 0.6),
        ("llama", {"quant_method": "fp8"}, 0.6),
        ("gpt_oss", {"quant_method": "mxfp4"}, 0.5),
    ],
)
def test_a_quantised_shape_moves_quantised_bytes(tmp_path, name, quantised, share):
    """They have random weights of the size that a layer expects."""
    raw = make_config(FAMILIES[name], name).to_dict() | {"dtype": "bfloat16", "quantization_config": quantised}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with dummy_checkpoint(tmp_path, scratch=tmp_path, distinct=1) as made:
        layout = load_model(tmp_path, checkpoint=made).layer_layouts[-1]
        assert layout.expansions
        assert layout.wire_nbytes < share * layout.parameter_nbytes
        buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
        read_unit(layout, buffer)
    for expansion in layout.expansions:
        values = view_of(buffer, expansion.target).float()
        fan_in = values.shape[1 if values.dim() == 2 else -2]
        assert 0.5 < float(values.square().mean().sqrt()) * fan_in**0.5 < 2


def test_other_formats_cannot_be_made_up(tmp_path):
    raw = make_config(FAMILIES["llama"], "llama").to_dict()
    raw["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="format awq cannot be made up"), dummy_checkpoint(tmp_path, scratch=tmp_path):
        pass


def test_layers_of_a_kind_take_turns(tmp_path):
    save_checkpoint(make_config(FAMILIES["deepseek_v3"] | {"num_hidden_layers": 7}, "deepseek_v3"), tmp_path)
    with dummy_checkpoint(tmp_path, scratch=tmp_path, distinct=2) as made:
        dense = load_config(tmp_path).first_k_dense_replace
        extents = [layout.extents for layout in load_model(tmp_path, checkpoint=made).layer_layouts]
        assert made.shares_bytes
    sparse = extents[dense:]
    assert sparse[0] != sparse[1]
    assert all(each == sparse[number % 2] for number, each in enumerate(sparse))
    assert len(set(extents)) == min(dense, 2) + 2


def test_depth_may_be_another(tmp_path):
    with dummy_checkpoint(SHAPES / "tiny", scratch=tmp_path, distinct=1, num_layers=40) as made:
        assert load_config(made.directory).num_hidden_layers == 40
        assert len(load_model(made.directory, checkpoint=made).layers) == 40
        assert made.nbytes > 10 * made.files[0].nbytes
    assert not made.directory.exists()
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_made_is_refused(tmp_path):
    for settings, error in (
        ({"scratch": tmp_path, "distinct": 0}, ConfigError),
        ({"scratch": tmp_path, "num_layers": 0}, ConfigError),
        ({"scratch": tmp_path / "none"}, TargetError),
    ):
        with pytest.raises(error), dummy_checkpoint(SHAPES / "tiny", **settings):
            pass
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with (
        pytest.raises(ModelError, match="number of layers"),
        dummy_checkpoint(tmp_path, scratch=tmp_path, num_layers=3),
    ):
        pass
