"""Configs that are refused, what a model says of itself, and rotary tables that depend on length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BASE, FAMILIES
from tiny_models import ANSWERS, PROMPTS, Stream, make_config, reference, save_checkpoint, worst_error
from transformers import AutoModelForCausalLM

from penstock.engine.model.build import load_model
from penstock.engine.model.tokenizer import end_token_ids, load_tokenizer
from penstock.errors import (
    ConfigError,
    MissingFileError,
    ModelError,
    RemoteCodeError,
    UnknownArchitectureError,
    UnsupportedFormatError,
)


def tiny(path: Path, **settings: Any) -> Path:
    save_checkpoint(make_config({**BASE, **settings}, "llama"), path)
    return path


def edit_config(path: Path, **changes: Any) -> Path:
    file = path / "config.json"
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**raw, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "nonesuch"}, UnknownArchitectureError, "nonesuch"),
        ({"model_type": None}, UnknownArchitectureError, "None"),
        ({"model_type": "nonesuch", "auto_map": {"AutoModel": "x.Y"}}, RemoteCodeError, "config.json"),
        ({"model_type": "clip"}, UnknownArchitectureError, "'clip' is not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedFormatError, "gptq"),
        ({"hidden_size": "many"}, ModelError, "refuses this config"),
    ],
)
def test_configs_that_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        load_model(edit_config(tiny(tmp_path), **changes))


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path)


def test_remote_code_beside_a_known_architecture_is_not_used(tmp_path: Path) -> None:
    path = edit_config(tiny(tmp_path), auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (path / "evil.py").write_text("raise SystemExit('it ran')")
    assert type(load_model(path).module).__name__ == "LlamaForCausalLM"


def test_a_dtype_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wanted auto, float32"):
        load_model(tiny(tmp_path), dtype="int8")


def test_what_a_model_says_of_itself(tmp_path: Path) -> None:
    model = load_model(tiny(tmp_path))
    assert (model.vocab_size, model.context_length, len(model.layers)) == (257, 256, 4)
    assert (model.dtype, model.splits_prompts, model.adapters) == (torch.float32, True, ())
    with pytest.raises(AssertionError, match="not bound"):
        model.check_bound()


def test_unbinding_lets_go_of_the_buffers(tmp_path: Path) -> None:
    stream = Stream.open(tiny(tmp_path))
    stream.model.unbind()
    assert all(parameter.is_meta for parameter in stream.model.module.parameters())


def test_only_the_kept_tokens_reach_the_head(tmp_path: Path) -> None:
    stream = Stream.open(tiny(tmp_path))
    stream.kv.acquire(0, num_tokens=16)
    (all_logits,) = stream.run([[(0, 0, 12)]])
    stream.kv.release(0)
    stream.kv.acquire(0, num_tokens=16)
    (logits,) = stream.run([[(0, 0, 12)]], keep=torch.tensor([3, 11]))
    assert torch.allclose(logits, all_logits[[3, 11]], atol=1e-6)


ROPE = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 8,
        "long_factor": [4.0] * 8, "short_factor": [1.0] * 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE)
def test_tables_that_depend_on_length_do_not_depend_on_the_neighbours(kind: str, tmp_path: Path) -> None:
    """Prompts of 12 and 9 tokens pass the original context of 8; they share micro-batches with shorter ones."""
    limit = {"max_position_embeddings": 8 if kind == "dynamic" else 64}
    path = tiny(tmp_path, rope_parameters=ROPE[kind], **limit)
    stream = Stream.open(path)
    assert not stream.model.splits_prompts
    wanted = []
    for prompt in PROMPTS:  # what transformers gives each prompt alone, in a model that has seen nothing else
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            wanted.append(model(torch.tensor([prompt]), use_cache=False).logits[0])
    for sequence, prompt in enumerate(PROMPTS):
        stream.kv.acquire(sequence, num_tokens=len(prompt) + len(ANSWERS[sequence]))
    spans = [[(s, 0, len(PROMPTS[s])) for s in batch] for batch in ([0, 1, 3], [2, 4])]
    for (sequence, _, _), logits in zip([span for batch in spans for span in batch], stream.run(spans), strict=True):
        assert (logits - wanted[sequence]).abs().max() <= 1e-4


def test_yarn_is_left_alone(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    path = tiny(tmp_path, rope_parameters=rope)
    stream = Stream.open(path)
    assert stream.model.splits_prompts
    assert worst_error(stream, reference(path)) <= 1e-4


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_end_tokens(tmp_path: Path) -> None:
    config = make_config(FAMILIES["llama"], "llama")
    assert end_token_ids(tmp_path, config) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert end_token_ids(tmp_path, config) == {5, 7}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match="generation config"):
        end_token_ids(tmp_path, config)
