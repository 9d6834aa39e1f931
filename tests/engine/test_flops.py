import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cli.bench import SHAPES
from penstock.engine.batch import Span
from penstock.engine.flops import count_flops, pairs
from penstock.engine.model.build import load_model
from penstock.engine.model.dummy import dummy_checkpoint


@given(st.integers(0, 40), st.integers(1, 40), st.none() | st.integers(1, 50))
def test_pairs_are_what_a_causal_mask_lets_through(start, length, window):
    seen = sum(min(position + 1, window or position + 1) for position in range(start, start + length))
    assert pairs(Span(0, start, length), window) == seen


def shape(name, tmp_path, **settings):
    with dummy_checkpoint(SHAPES / name, scratch=tmp_path, distinct=1, **settings) as made:
        return count_flops(load_model(made.directory, checkpoint=made))


def test_a_dense_model_by_hand(tmp_path):
    flops = shape("tiny", tmp_path)
    hidden, intermediate, layers, heads, kv_heads, head, vocab = 1024, 2816, 16, 8, 4, 128, 2048
    attention = hidden * heads * head * 2 + hidden * kv_heads * head * 2
    per_token = 2 * layers * (attention + 3 * hidden * intermediate)
    assert flops.per_token == per_token
    assert flops.per_row == 2 * hidden * vocab
    assert flops.parameters == 192_971_776
    per_pair = layers * heads * (2 * head + 2 * head)
    spans = [Span(0, 0, 512), Span(1, 100, 1)]
    wanted = 513 * per_token + 2 * flops.per_row + per_pair * (512 * 513 // 2 + 101)
    assert flops.of(spans, rows=2) == wanted


@pytest.fixture(scope="module")
def tiny_config():
    return {
        "model_type": "qwen3_moe", "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 100, "dtype": "float32",
    }  # fmt: skip


def test_experts_count_with_the_share_that_a_token_meets(tmp_path, tiny_config):
    import json

    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    with dummy_checkpoint(tmp_path, scratch=tmp_path) as made:
        flops = count_flops(load_model(tmp_path, checkpoint=made))
    attention = 32 * 32 * 2 + 32 * 16 * 2
    assert flops.per_token == 3 * 2 * (attention + 32 * 8 + 2 * 3 * 32 * 24)
