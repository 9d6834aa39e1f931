"""Dummy checkpoints are what the family's checkpoints are, and shapes are what they are named after."""

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
from penstock.offload.source import read_unit

PARAMETERS = {
    "deepseek-v3": 671_026_404_352,
    "gpt-oss-120b": 116_829_156_672,
    "kimi-k2": 1_026_408_209_408,
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
