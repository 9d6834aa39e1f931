"""Compiled layers: one code for each kind, transformers' logits, and eager layers wherever that cannot be."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from tiny_models import Stream, make_config, reference, save_checkpoint, worst_error
from torch import nn
from torch._dynamo.utils import counters

from penstock.engine.model.attention import rule_of
from penstock.engine.model.compile import LayerCompiler, why_not_compile

KINDS = {
    "llama": ["LlamaDecoderLayer"],
    "qwen3": ["Qwen3DecoderLayer"],
    "gemma2": ["Gemma2DecoderLayer"],
    "gemma3_text": ["Gemma3DecoderLayer"],
    "opt": ["OPTDecoderLayer"],
    "mixtral": ["MixtralDecoderLayer"],
    "deepseek_v3": ["DeepseekV3DecoderLayer", "DeepseekV3DecoderLayer 2"],
    "gpt_oss": ["GptOssDecoderLayer"],
}
EAGER = {
    "bloom": {"BloomBlock": "inline:BloomAttention is not traceable"},
    "qwen3_next": {"Qwen3NextDecoderLayer": "recurrent:Qwen3NextGatedDeltaNet is not traceable"},
}


def backend(device: str, name: str = "") -> str:
    """On the CPU graphs are traced and run as they are, latents' also lowered: compiling all of them takes minutes."""
    return "inductor" if device == "cuda" else "aot_eager" if name == "deepseek_v3" else "eager"


@pytest.mark.parametrize("name", KINDS)
def test_compiled_layers_give_the_logits_of_transformers(name: str, tmp_path: Path, device: str) -> None:
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    stream = Stream.open(tmp_path, device=device, backend=backend(device, name))
    counters.clear()
    assert worst_error(stream, reference(tmp_path, device=device)) <= 1e-4
    assert stream.compiler.report().kinds == tuple((kind, None) for kind in KINDS[name])
    assert not counters["frames"], "a pass has compiled something"


@pytest.mark.parametrize("name", EAGER)
def test_layers_with_code_of_ours_run_eagerly(name: str, tmp_path: Path, device: str) -> None:
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    stream = Stream.open(tmp_path, device=device, backend=backend(device))
    assert worst_error(stream, reference(tmp_path, device=device)) <= 1e-4
    report = stream.compiler.report().as_dict()
    assert report["eager"] == EAGER[name]
    assert report["compiled"] == report["kinds"] - 1


def one_warning(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return record.getMessage()


def test_what_cannot_be_traced_runs_eagerly_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(make_config(FAMILIES["dbrx"], "dbrx"), tmp_path)
    stream = Stream.open(tmp_path, backend="eager")
    assert worst_error(stream, reference(tmp_path)) <= 1e-4
    assert one_warning(caplog).startswith("DbrxBlock (4 layers) is not compiled: ")


def test_a_pass_compiles_nothing_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(make_config(FAMILIES["llama"], "llama"), tmp_path)
    stream = Stream.open(tmp_path, backend="eager")
    wanted = reference(tmp_path)
    stream.model.layers[2].input_layernorm.variance_epsilon = 1.0001e-6
    assert worst_error(stream, wanted) <= 1e-4
    assert one_warning(caplog).endswith("(4 layers) is not compiled: a pass differs from what start-up has compiled")


def test_layers_that_all_differ_are_not_compiled_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {**FAMILIES["qwen2"], "num_hidden_layers": 6, "sliding_window": 64}
    save_checkpoint(make_config(settings, "qwen2"), tmp_path)
    wanted = reference(tmp_path)
    stream = Stream.open(tmp_path)
    for index, layer in enumerate(stream.model.layers):
        layer.self_attn.sliding_window = 64 + index
    stream.compiler._kinds[0].backend = "eager"
    with stream.compiler.compiling():
        assert worst_error(stream, wanted) <= 1e-4
    assert "its layers need more than 4 graphs" in one_warning(caplog)


def test_the_operator_has_the_arguments_that_attention_looks_at() -> None:
    known = {name for name, one in inspect.signature(rule_of).parameters.items() if one.kind is one.KEYWORD_ONLY}
    schema = torch.ops.penstock.attend.default._schema
    assert {one.name for one in schema.arguments if one.kwarg_only} == known | {"module", "value_size"}


def test_on_the_cpu_nothing_is_compiled_unless_asked_for() -> None:
    assert why_not_compile(torch.device("cpu")) == "not worth the time to compile on the CPU"
    compiler = LayerCompiler([nn.Linear(2, 2)])
    compiler.leave_eager("it was not wanted")
    assert compiler.report().explain() == "0 of 1 kinds of layers compiled (Linear: it was not wanted)"
