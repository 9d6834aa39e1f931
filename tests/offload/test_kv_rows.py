"""Rows that rest in other dtypes: what the store gives back, what it takes, and where it lies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv import Part

from penstock.errors import ConfigError
from penstock.kernels.quant_kv import QUANTISE, dequantise
from penstock.offload.blocks import BLOCK_TOKENS, KVCost
from penstock.offload.kv import KVStore
from penstock.offload.kv_dtype import KV_DTYPES, check_kv_dtype
from penstock.offload.kv_rows import KeptRows, encode

SHAPES = {0: ((2, 64), (2, 64)), 3: ((1, 40),), 4: ((3, 33), (3, 7))}
"""Heads and sizes of what three layers store: keys and values, latents, heads of different odd sizes."""

TOKEN = {"bf16": (256 + 256) + 80 + (198 + 42), "fp8": (272 + 44 + 111 + 33), "int8": (272 + 44 + 111 + 33)}
TOKEN["int4"] = 2 * 2 * (32 + 2 * 4) + (20 + 2 * 4) + 3 * (18 + 2 * 4) + 3 * (4 + 4)


def rows_of(num_tokens, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: tuple(
            torch.randn(h, num_tokens, size, generator=generator).to(dtype).transpose(0, 1) for h, size in each
        )
        for layer, each in SHAPES.items()
    }


def as_stored(rows, kv_dtype):
    """Return what comes back of rows."""
    if kv_dtype == "auto":
        return rows
    if kv_dtype == "bf16":
        return rows.bfloat16().to(rows.dtype)
    return dequantise(*QUANTISE[kv_dtype](rows), rows.shape[-1]).to(rows.dtype)


def measured(kv_dtype):
    """Return what a token costs, as a rehearsal finds it."""
    store = KVStore(kv_dtype=kv_dtype)
    store.acquire(0, num_tokens=5)
    places = store.locate([Part(0, 0, 5)])
    for layer, rows in rows_of(5).items():
        store.append(layer, places, *rows)
    return store.measure()


@pytest.mark.parametrize("kv_dtype", TOKEN)
def test_a_token_costs_what_its_codes_and_scales_take(kv_dtype):
    assert measured(kv_dtype) == KVCost(TOKEN[kv_dtype], 0, BLOCK_TOKENS)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_rows_are_stored_while_they_are_made(kv_dtype):
    """As a store on a GPU does it: the same as making them first."""
    row, slots = rows_of(5)[0][0], torch.tensor([7, 40, 3, 16, 0])
    made = encode(row, kv_dtype)
    first, second = (
        KeptRows.made_of(encode(row[:0], kv_dtype), lambda part: part.new_zeros(3, BLOCK_TOKENS, *part.shape[1:]))
        for _ in range(2)
    )
    first.write(slots, made)
    returned = second.encode(slots, row, kv_dtype)
    assert torch.equal(returned.whole(), made.whole())
    for part, same in zip(first.parts, second.parts, strict=True):
        assert torch.equal(part.float(), same.float())


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_layers_fill_the_pool_exactly_at_even_addresses(kv_dtype):
    cost = measured(kv_dtype)
    store = KVStore(limit_nbytes=3 * cost.block_nbytes, cost=cost, kv_dtype=kv_dtype)
    store.acquire(0, num_tokens=3 * BLOCK_TOKENS)
    places = store.locate([Part(0, 0, 20)])
    for layer, rows in rows_of(20).items():
        for kept in store.append(layer, places, *rows).kept:
            assert all((part.data_ptr() - store._pool.data_ptr()) % 16 == 0 for part in kept.parts)
    assert store._carved == store._pool.numel()


@settings(max_examples=40)
@given(st.data(), st.sampled_from(KV_DTYPES), st.sampled_from([torch.bfloat16, torch.float32]), st.booleans())
def test_the_store_gives_back_rows_as_they_rest_however_they_came(data, kv_dtype, dtype, grows):
    """A sequence that comes in spans of any sizes, on blocks that lie apart, has the rows of one that came at once."""
    total = data.draw(st.integers(1, 40))
    cuts = sorted(data.draw(st.sets(st.integers(1, total), max_size=5)) | {total})
    cost = KVCost(16_384, 0, 4)
    store = KVStore(limit_nbytes=None if grows else 40 * cost.block_nbytes, cost=cost, kv_dtype=kv_dtype)
    for number in range(10):
        store.acquire(number, num_tokens=4)
    for number in range(0, 10, 2):
        store.release(number)
    store.acquire("it", num_tokens=total)
    rows, start = rows_of(total, dtype), 0
    for end in cuts:
        places = store.locate([Part("it", start, end)])
        for layer, each in rows.items():
            kept = store.append(layer, places, *(row[start:end] for row in each))
            for got, row in zip(kept.of(0), each, strict=True):
                assert got.dtype == dtype
                assert torch.equal(got, as_stored(row[:end], kv_dtype))
            if layer == 3:
                keys, values = kept.sharing_values(13).of(0)
                assert torch.equal(values, keys[..., :13])
                assert kept.sharing_values(13).value_size == 13
        start = end
        if grows:
            store.acquire(("more", end), num_tokens=9)
    check_parts_of_heads(store, rows, places, kv_dtype)


def check_parts_of_heads(store, rows, places, kv_dtype):
    for layer, each in rows.items():
        kept = store.read(layer, places)
        groups = list(kept.head_groups(0, 1))
        for place, row in enumerate(each):
            whole = torch.cat([kept.of(0, group)[place] for group in groups], 1)
            assert torch.equal(whole, as_stored(row, kv_dtype))
        if kv_dtype not in {"auto", "bf16"}:
            assert kept.copy_nbytes(0) >= 9 * sum(row[0].numel() for row in each), "a float32 and what comes out"


def test_names():
    assert [check_kv_dtype(name) for name in KV_DTYPES] == list(KV_DTYPES)
    for name in ("fp4", "bfloat16", "INT8", ""):
        with pytest.raises(ConfigError, match="not a dtype of keys and values"):
            KVStore(kv_dtype=name)
