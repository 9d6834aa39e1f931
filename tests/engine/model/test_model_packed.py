"""Packed checkpoints of families that fuse, cut and cast: parameters are those that transformers makes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from tiny_models import make_config, save_checkpoint
from torch import Tensor

from penstock.engine import pack_plan
from penstock.engine.model.build import load_model
from penstock.engine.model.reference import load_reference
from penstock.engine.pack import pack
from penstock.io.checkpoint import Checkpoint
from penstock.offload.buffers import view_of
from penstock.offload.codec import PackOptions
from penstock.offload.layout import PARAMETER_ALIGNMENT, Layout
from penstock.offload.manifest import CodedTensor, open_stored
from penstock.offload.source import read_unit


@pytest.fixture(autouse=True)
def _everything_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_plan, "MIN_NBYTES", 0)


def packed(path: Path, name: str, options: PackOptions, saved: torch.dtype = torch.bfloat16) -> Path:
    save_checkpoint(make_config(FAMILIES[name], name), path / "source", dtype=saved)
    pack(path / "source", path / "out", options, shard_nbytes=100_000)
    return path / "out"


def parameters_of(path: Path, dtype: str) -> dict[str, Tensor]:
    model = load_model(path, dtype=dtype)
    found = {}
    for layout in (model.resident, *model.layer_layouts):
        check_layout(layout)
        buffer = torch.full((layout.nbytes,), 0xA5, dtype=torch.uint8)
        read_unit(layout, buffer)
        found.update({view.name: view_of(buffer, view) for view in layout.parameters})
    return found


def check_layout(layout: Layout) -> None:
    """Parts lie in the wire bytes, without overlaps; what they expand to lies before."""
    spans = [(extent.destination, extent.destination + extent.nbytes) for extent in layout.extents]
    for one in layout.expansions:
        assert all(part.offset % PARAMETER_ALIGNMENT == 0 for part in one.parts)
        assert one.step % PARAMETER_ALIGNMENT == 0
        assert one.target.offset + (one.count - 1) * one.target_step + one.target.nbytes <= layout.wire_offset
        end = one.parts[-1].offset + one.parts[-1].nbytes + (one.count - 1) * one.step
        assert layout.wire_offset <= one.parts[0].offset <= end <= layout.nbytes
    assert all(layout.wire_offset <= begin and end <= layout.nbytes for begin, end in spans)
    assert all(a <= b for (_, a), (b, _) in pairwise(sorted(spans))), "extents overlap"


def check(path: Path, dtype: str = "auto") -> None:
    found = parameters_of(path, dtype)
    with load_reference(path, dtype=dtype, device="cpu") as reference:
        wanted: dict[str, Any] = reference._module.state_dict()
    assert set(wanted) - set(found) <= {"lm_head.weight"}
    for key, tensor in found.items():
        assert tensor.dtype == wanted[key].dtype, key
        assert torch.equal(tensor, wanted[key]), key


NAMES = ["llama", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "phi3", "qwen3_next", "gpt2"]


@pytest.mark.parametrize("name", NAMES)
def test_exact_parameters_are_those_of_the_source(name: str, tmp_path: Path) -> None:
    out = packed(tmp_path, name, PackOptions("exact"))
    found, wanted = parameters_of(out, "auto"), parameters_of(tmp_path / "source", "auto")
    assert set(found) == set(wanted)
    for key, tensor in found.items():
        assert torch.equal(tensor.view(torch.uint8), wanted[key].view(torch.uint8)), key


@pytest.mark.parametrize(
    ("name", "codec"),
    [("llama", "int8"), ("qwen3_moe", "int4"), ("deepseek_v3", "int8"), ("gpt_oss", "int4"), ("phi3", "int8")],
)
def test_integer_parameters_are_those_that_transformers_makes(name: str, codec: Any, tmp_path: Path) -> None:
    check(packed(tmp_path, name, PackOptions(codec, group_size=32)))


def test_other_dtypes_go_through_a_conversion(tmp_path: Path) -> None:
    out = packed(tmp_path, "mixtral", PackOptions("int8"))
    check(out, "float32")
    out = packed(tmp_path / "wide", "llama", PackOptions("int4"), torch.float32)
    check(out, "bfloat16")
    check(out, "float32")


def test_all_experts_of_a_layer_are_one_expansion(tmp_path: Path) -> None:
    model = load_model(packed(tmp_path, "qwen3_moe", PackOptions("exact", exclude=("*self_attn*", "*norm*"))))
    experts = model.config.num_experts
    counts = sorted(one.count for one in model.layer_layouts[-1].expansions)
    assert counts[-2:] == [experts, 2 * experts]
    assert not model.layer_layouts[-1].conversions


def test_routers_norms_and_heads_keep_their_numbers(tmp_path: Path) -> None:
    out = packed(tmp_path, "qwen3_moe", PackOptions("int4", group_size=32))
    coded = {name for name, one in open_stored(Checkpoint.open(out)).tensors.items() if isinstance(one, CodedTensor)}
    assert any("experts.0.gate_proj" in name for name in coded)
    assert any("self_attn.q_proj" in name for name in coded)
    assert not any(part in name for name in coded for part in ("mlp.gate.", "norm", "embed", "lm_head"))
