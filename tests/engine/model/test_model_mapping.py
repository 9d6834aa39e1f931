"""What checkpoints come to hold: other names, dtypes, ties, holes and wrong shapes."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BASE, FAMILIES, HEAD
from safetensors.torch import load_file, save_file
from tiny_models import PROMPTS, Stream, make_config, reference, save_checkpoint, worst_error
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import Transpose, WeightConverter

from penstock.engine.model import conversion
from penstock.engine.model.build import load_model
from penstock.errors import CheckpointError, MissingWeightError
from penstock.offload.buffers import view_of
from penstock.offload.layout import PARAMETER_ALIGNMENT, Layout
from penstock.offload.source import read_unit


def rewrite(path: Path, change: Any) -> None:
    """Replace a checkpoint by one file whose tensors `change` has edited."""
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors.update(load_file(file))
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path / "model.safetensors")


def tiny(path: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    save_checkpoint(make_config({**FAMILIES[name], **settings}, name), path, dtype=dtype)
    return path


def parameters_of(path: Path, dtype: str) -> dict[str, Tensor]:
    """Return every bound tensor after its unit was read."""
    model = load_model(path, dtype=dtype)
    found = {}
    for layout in (model.resident, *model.layer_layouts):
        check_layout(layout)
        buffer = torch.full((layout.nbytes,), 0xA5, dtype=torch.uint8)
        read_unit(layout, buffer)
        found.update({view.name: view_of(buffer, view) for view in layout.parameters})
    return found


def check_layout(layout: Layout) -> None:
    """Every view is aligned and inside; extents fill the wire bytes of views exactly, and nothing else."""
    sources = [source for one in layout.conversions for source in one.sources]
    converted = {name for one in layout.conversions for name in one.targets}
    views = sorted([*layout.parameters, *sources], key=lambda view: view.offset)
    end = 0
    for view in views:
        assert view.offset % PARAMETER_ALIGNMENT == 0
        assert view.offset >= end, "views overlap"
        end = view.offset + view.nbytes
    assert end <= layout.nbytes
    wire = [view for view in views if view.name not in converted or view in sources]
    assert all(view.offset >= layout.wire_offset for view in wire)
    assert all(view.offset + view.nbytes <= layout.parameter_nbytes for view in layout.parameters)
    filled = sorted((extent.destination, extent.nbytes) for extent in layout.extents)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(filled)), "extents overlap"
    assert sum(n for _, n in filled) == sum(view.nbytes for view in wire)


@pytest.mark.parametrize(
    ("name", "saved", "loaded"),
    [
        ("llama", torch.bfloat16, "float32"),
        ("llama", torch.float32, "bfloat16"),
        ("qwen3_moe", torch.float32, "bfloat16"),
        ("deepseek_v3", torch.bfloat16, "bfloat16"),
        ("deepseek_v3", torch.float32, "bfloat16"),
        ("qwen3_next", torch.bfloat16, "float16"),
        ("gpt_oss", torch.bfloat16, "auto"),
        ("phi3", torch.float32, "float16"),
        ("ernie4_5_moe", torch.bfloat16, "auto"),
    ],
)
def test_parameters_are_bit_for_bit_those_of_transformers(
    name: str, saved: torch.dtype, loaded: str, tmp_path: Path
) -> None:
    tiny(tmp_path, name, saved)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=loaded).state_dict()
    found = parameters_of(tmp_path, loaded)
    assert set(wanted) - set(found) <= {"lm_head.weight"}
    for key, tensor in found.items():
        assert tensor.dtype == wanted[key].dtype, key
        assert torch.equal(tensor, wanted[key]), key


def test_a_bfloat16_checkpoint_computes_in_float32(tmp_path: Path) -> None:
    tiny(tmp_path, "mixtral", torch.bfloat16)
    stream = Stream.open(tmp_path, dtype="float32")
    assert all(layout.conversions for layout in stream.model.layer_layouts)
    assert worst_error(stream, reference(tmp_path)) <= 1e-4


def test_expert_tensors_go_straight_into_the_fused_parameter(tmp_path: Path) -> None:
    model = load_model(tiny(tmp_path, "qwen3_moe"))
    names = {view.name for view in model.layer_layouts[1].parameters}
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert not model.layer_layouts[1].conversions
    assert len(model.layer_layouts[1].extents) >= 8 * 2


def test_a_layer_saved_in_one_run_is_read_in_one_run(tmp_path: Path) -> None:
    settings = {"hidden_size": 128, "intermediate_size": 256}
    save_checkpoint(make_config({**BASE, **settings}, "llama"), tmp_path, shard="1GB")
    model = load_model(tmp_path)
    assert [len(layout.extents) for layout in model.layer_layouts] == [1] * len(model.layers)


def test_short_strided_runs_are_put_in_order_on_arrival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that transposes: movement, but in runs of one element."""
    path = tiny(tmp_path)
    wanted = parameters_of(path, "float32")

    def transpose(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name.replace("down_proj", "turned_proj"): tensor.T if "down_proj" in name else tensor
            for name, tensor in tensors.items()
        }

    rewrite(path, transpose)
    turn = WeightConverter(
        source_patterns="mlp.turned_proj.weight",
        target_patterns="mlp.down_proj.weight",
        operations=[Transpose(dim0=0, dim1=1)],
    )
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda _: [turn])
    layout = load_model(path).layer_layouts[0]
    assert [one.targets for one in layout.conversions] == [("model.layers.0.mlp.down_proj.weight",)]
    assert "runs" in layout.conversions[0].reason
    found = parameters_of(path, "float32")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("edit", ["bare", "reversed", "extra"])
def test_names_as_hubs_have_them(edit: str, tmp_path: Path) -> None:
    path = tiny(tmp_path, tie_word_embeddings=True)
    wanted = reference(path)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if edit == "bare":
            return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        if edit == "reversed":
            return dict(reversed(tensors.items()))
        return tensors | {"model.layers.99.mlp.up_proj.weight": torch.zeros(3), "rotary.inv_freq": torch.ones(2)}

    rewrite(path, change)
    assert worst_error(Stream.open(path), wanted) <= 1e-4


def test_tied_embeddings_share_memory_and_are_read_once(tmp_path: Path) -> None:
    stream = Stream.open(tiny(tmp_path, tie_word_embeddings=True))
    module = stream.model.module
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    assert len([view for view in stream.model.resident.parameters if math.prod(view.shape) == 257 * 64]) == 1
    assert worst_error(stream, reference(tmp_path)) <= 1e-4


@pytest.mark.parametrize("different", [False, True])
def test_tied_parameters_that_are_both_stored_are_both_used(different: bool, tmp_path: Path) -> None:
    path = tiny(tmp_path, tie_word_embeddings=True)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (2 if different else 1)
        return tensors

    rewrite(path, change)
    assert worst_error(Stream.open(path), reference(path)) <= 1e-4


def test_only_the_head_of_a_tied_pair_is_stored(tmp_path: Path) -> None:
    path = tiny(tmp_path, tie_word_embeddings=True)
    wanted = reference(path)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    rewrite(path, change)
    assert worst_error(Stream.open(path), wanted) <= 1e-4


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    rewrite(path, lambda tensors: {name: t for name, t in tensors.items() if "layers.2" not in name})
    with pytest.raises(MissingWeightError, match=r"9 parameters .* model.layers.2.input_layernorm.weight.*\.\.\."):
        load_model(path)


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    path = tiny(tmp_path, "qwen3_moe")
    rewrite(path, lambda tensors: {name: t for name, t in tensors.items() if "layers.1.mlp.experts.5.up" not in name})
    with pytest.raises(CheckpointError, match="do not fit together"):
        load_model(path)


def test_a_wrong_shape_names_both_shapes(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    rewrite(path, lambda tensors: {name: t[:3] if "layers.1.mlp.up" in name else t for name, t in tensors.items()})
    with pytest.raises(CheckpointError, match=r"wanted shape \(96, 64\), got shape \(3, 64\)"):
        load_model(path)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_the_text_path_of_a_multimodal_model(kind: str, tmp_path: Path) -> None:
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    text = {**HEAD, "model_type": "mistral"} if kind == "mistral3" else {**FAMILIES["gemma3_text"]}
    settings = {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}
    if kind == "mistral3":
        settings["vision_config"] = {**vision, "model_type": "pixtral"}
    config = make_config(settings | {"model_type": kind}, kind)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    stream = Stream.open(tmp_path)
    assert not [view.name for view in stream.model.resident.parameters if "vision" in view.name]
    stream.kv.acquire(0, num_tokens=16)
    (logits,) = stream.run([[(0, 0, len(PROMPTS[0]))]])
    with torch.no_grad():
        wanted = model.eval()(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits[0]
    assert (logits - wanted).abs().max() <= 1e-5
