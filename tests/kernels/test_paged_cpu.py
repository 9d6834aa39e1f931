"""The compiled kernel against its reference: a table of odd shapes, random tables, and what it promises of its bits."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import Case, make, wanted
from torch import Tensor

from penstock.kernels import compiled
from penstock.kernels.paged_cpu import CompiledAttention, load_attend_paged

FLOAT32, BFLOAT16, FLOAT16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
FLOAT8 = torch.float8_e4m3fn
TOLERANCE = {
    FLOAT32: {"atol": 3e-6, "rtol": 1e-5},
    BFLOAT16: {"atol": 1e-6, "rtol": 2**-7},
    FLOAT16: {"atol": 1e-6, "rtol": 2**-10},
}
MIXED = (1, 0, 37, 1300, 0, 512, 513)
HEADS = [(1, 1), (6, 3), (9, 3), (8, 2), (5, 1), (12, 2), (7, 1), (16, 2), (32, 2), (72, 1), (64, 64)]
AVX2 = {"avx2", "fma", "f16c", "bmi2"}
SAME_SIZES = (1, 64, 80, 96, 112, 128, 192, 256)
SIZES = [(each, each) for each in SAME_SIZES] + [(192, 128), (8, 3), (33, 65), (100, 7), (31, 49), (576, 512)]


def compare(call, attend, **more) -> Tensor:
    got = call.run(attend, **more)
    torch.testing.assert_close(got, wanted(call), **TOLERANCE[got.dtype], equal_nan=True)
    return got


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_every_group_of_query_heads(attend_compiled, dtype, heads):
    compare(make(Case(MIXED, heads, (32, 32), dtype=dtype)), attend_compiled, num_threads=2)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size(attend_compiled, dtype, sizes):
    compare(make(Case((45, 530), (7, 1), sizes, dtype=dtype)), attend_compiled)


@pytest.mark.parametrize("query_dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("out_dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8], ids=str)
def test_every_mix_of_dtypes(attend_compiled, dtype, query_dtype, out_dtype):
    case = Case((3, 90), (4, 1), (40, 24), dtype=dtype, query_dtype=query_dtype, out_dtype=out_dtype)
    compare(make(case), attend_compiled)


RULES = {
    "window": {"window": 100},
    "window of one": {"window": 1},
    "window on a border": {"window": 512},
    "wide window": {"window": 100_000},
    "softcap": {"softcap": 3.0},
    "wide softcap": {"softcap": 50.0},
    "sinks": {"sinks": True},
    "all": {"window": 600, "softcap": 2.0, "sinks": True},
}


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, INT8, FLOAT8], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_every_rule(attend_compiled, dtype, name):
    compare(make(Case((*MIXED, 2500), dtype=dtype, **RULES[name])), attend_compiled, num_threads=2)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, INT8, FLOAT8], ids=str)
def test_scores_far_apart(attend_compiled, dtype, sinks):
    """Scores of some hundreds, as float32 keeps them: within 3e-5; so weights are within 1e-4."""
    call = make(Case(MIXED, dtype=dtype, scale=9.0, sinks=sinks))
    torch.testing.assert_close(call.run(attend_compiled), wanted(call), atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("block_tokens", [1, 2, 3, 7, 16, 17, 64, 1000])
def test_every_size_of_blocks(attend_compiled, block_tokens):
    compare(make(Case((*MIXED, 63, 64, 65), block_tokens=block_tokens)), attend_compiled)


@pytest.mark.parametrize("target", ["", "-march=haswell"])
def test_other_processors(target, monkeypatch):
    """Plain C and narrower vectors than this machine may have, on every group of query heads and odd sizes."""
    if target and not AVX2.issubset(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("this processor cannot run it")
    monkeypatch.setattr(compiled, "_TARGETS", ((*target.split(), "-O1"),))
    attend = load_attend_paged.__wrapped__(None)
    assert isinstance(attend, CompiledAttention)
    for dtype in (FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8):
        compare(make(Case(MIXED, (15, 1), (64, 64), dtype=dtype, softcap=5.0, sinks=True)), attend, num_threads=2)
        compare(
            make(Case(MIXED, (3, 3), (31, 49), dtype=dtype, out_dtype=dtype if dtype.itemsize > 1 else FLOAT16)), attend
        )


def test_nothing_to_do(attend_compiled):
    assert compare(make(Case((0, 0))), attend_compiled, num_threads=3).count_nonzero() == 0
    call = make(Case((1,)))
    query, keys, values, table, lengths = call.tensors
    attend_compiled(query[:0], keys, values, table[:0], lengths[:0], scale=1.0, out=call.out[:0])


cases = st.builds(
    Case,
    lengths=st.lists(st.one_of(st.integers(0, 80), st.integers(500, 1100)), min_size=1, max_size=5).map(tuple),
    heads=st.tuples(st.integers(1, 9), st.integers(1, 4)).map(lambda pair: (pair[0] * pair[1], pair[1])),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    block_tokens=st.integers(1, 64),
    dtype=st.sampled_from([FLOAT32, BFLOAT16, FLOAT16, INT8]),
    out_dtype=st.sampled_from([FLOAT32, BFLOAT16, FLOAT16]),
    window=st.none() | st.integers(1, 700),
    softcap=st.none() | st.floats(0.5, 60),
    sinks=st.booleans(),
    seed=st.integers(0, 1 << 30),
)


@settings(max_examples=60, deadline=None)
@given(case=cases, num_threads=st.integers(1, 4), data=st.data())
def test_random_tables(attend_compiled, case, num_threads, data):
    """Blocks that several sequences share, in any order, and one sequence's several times."""
    call = make(case)
    query, keys, values, table, lengths = call.tensors
    whole = [length // case.block_tokens for length in case.lengths]
    full = [int(block) for row, count in zip(table, whole, strict=True) for block in row[:count]]
    table = table.clone()
    for row, count in enumerate(whole):
        for index in range(count):
            if data.draw(st.integers(0, 3)) == 0:
                table[row, index] = data.draw(st.sampled_from(full))
    compare(replace(call, tensors=(query, keys, values, table, lengths)), attend_compiled, num_threads=num_threads)


def test_rows_may_be_views(attend_compiled):
    """Keys and values side by side, heads before tokens, queries and results out of larger tensors."""
    call = make(Case((300, 5), (6, 2), (24, 24), dtype=FLOAT32))
    query, keys, values, *tables = call.tensors
    both = torch.stack([keys.transpose(1, 2), values.transpose(1, 2)], 1)
    wide = torch.full((2, 9, 40), 7.0)
    wide[:, 2:8, 8:32] = query
    out = torch.full((2, 9, 40), 7.0)
    strided = (wide[:, 2:8, 8:32], both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2), *tables)
    attend_compiled(*strided, **call.keywords, out=out[:, 3:, 4:28])
    torch.testing.assert_close(out[:, 3:, 4:28], wanted(call), **TOLERANCE[FLOAT32])
    out[:, 3:, 4:28] = 7
    assert (out == 7).all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, INT8, FLOAT8], ids=str)
def test_bits_depend_on_the_sequence_alone(attend_compiled, dtype):
    """Neither threads nor neighbours change them: long sequences are split, short ones are not."""
    call = make(Case((3000, 1, 513, 0, 90, 1500), (16, 4), (72, 40), dtype=dtype, window=2600, sinks=True))
    together = call.run(attend_compiled, num_threads=1)
    for num_threads in (2, 5, 40):
        assert torch.equal(call.run(attend_compiled, num_threads=num_threads), together)
    for row in range(len(together)):
        for num_threads in (1, 5):
            assert torch.equal(call.only(row).run(attend_compiled, num_threads=num_threads)[0], together[row])


INFINITY = float("inf")


@pytest.mark.parametrize("value", [float("nan"), INFINITY, -INFINITY, 1e30])
@pytest.mark.parametrize("place", ["query", "keys", "values"])
@pytest.mark.parametrize("sinks", [False, True])
def test_numbers_that_are_none(attend_compiled, value, place, sinks):
    """They spread as in the reference, and no further; in one part of a sequence or in all of them."""
    for tokens in ([4], [600], range(700)):
        call = make(Case((700, 20), (4, 2), (16, 16), dtype=FLOAT32, sinks=sinks, block_tokens=1))
        query, keys, values, table, _ = call.tensors
        if place == "query":
            query[0, 1, 3] = value
        else:
            for token in tokens:
                {"keys": keys, "values": values}[place][table[0, token], 0, 0, 3] = value
        compare(call, attend_compiled)


def test_all_scores_are_minus_infinity(attend_compiled):
    for sinks in (False, True):
        call = make(Case((700,), (2, 1), (8, 8), dtype=FLOAT32, sinks=sinks))
        call.tensors[0].fill_(1.0)
        call.tensors[1].fill_(-INFINITY)
        compare(call, attend_compiled)


def test_what_does_not_fit_is_not_touched(attend_compiled):
    call = make(Case((20, 40), block_tokens=16))
    query, keys, values, table, lengths = call.tensors
    for row, index, block in ((0, 1, -1), (1, 2, len(keys)), (1, 0, 1 << 30)):
        broken = table.clone()
        broken[row, index] = block
        with pytest.raises(AssertionError, match="out of range"):
            attend_compiled(query, keys, values, broken, lengths, **call.keywords, out=call.out)
    for length in (-1, 16 * table.shape[1] + 1):
        with pytest.raises(AssertionError, match="out of range"):
            attend_compiled(query, keys, values, table, torch.full_like(lengths, length), **call.keywords, out=call.out)
    for wrong in ({"out": call.out[:, :-1]}, {"out": call.out, "key_scales": torch.ones(keys.shape[:3])}):
        with pytest.raises(AssertionError):
            attend_compiled(*call.tensors, **call.keywords, **wrong)


def test_calls_at_the_same_time(attend_compiled):
    """Each has its own results; their threads come from one pool."""
    calls = [make(Case((900, 30, 1200), (8, 2), seed=seed)) for seed in range(4)]
    alone = [call.run(attend_compiled) for call in calls]
    equal = []

    def run(call, result):
        equal.extend(torch.equal(call.run(attend_compiled, num_threads=3), result) for _ in range(10))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(calls, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 40


def test_the_gil_is_released(attend_compiled):
    """No thread is ever asked to hand the GIL over here, so this one goes on only where a call has released it."""
    call = make(Case((3000, 3000), (32, 8)))
    stop, calls = [], []

    def work():
        while not stop:
            attend_compiled(*call.tensors, **call.keywords, out=call.out)
            calls.append(None)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e6)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        stop.append(None)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert calls


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_fork_has_a_pool_of_its_own(attend_compiled):
    call = make(Case((900, 30, 1200)))
    result = call.run(attend_compiled, num_threads=3)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(call.run(attend_compiled, num_threads=3), result) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(call.run(attend_compiled, num_threads=3), result)
