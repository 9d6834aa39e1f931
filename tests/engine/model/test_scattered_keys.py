"""Sequences whose blocks lie apart give the logits of sequences whose blocks are one run."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES
from tiny_models import PROMPTS, Stream, errors, make_config, reference, save_checkpoint, worst_error

from penstock.engine.model import attention
from penstock.kernels.attention import Rule, attend
from penstock.kernels.paged import attend_paged
from penstock.offload.blocks import KVCost
from penstock.offload.kv import KVStore

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # some of transformers' code


def scattered_store(token_nbytes: int, device: str, *, size: int = 4, num_blocks: int = 80) -> KVStore:
    """Return a store whose free blocks are every second one; the others are held by sequences that never run."""
    cost = KVCost(token_nbytes, 0, size)
    kv = KVStore(limit_nbytes=num_blocks * cost.block_nbytes, cost=cost, device=device)
    for number in range(num_blocks):
        kv.acquire(("filler", number), num_tokens=size)
    for number in range(0, num_blocks, 2):
        kv.release(("filler", number))
    return kv


@pytest.mark.parametrize("max_scores", [1 << 24, 16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bloom", "llama4_text", "deepseek_v3", "gemma3n_text"])
def test_scattered_blocks_do_not_change_the_logits(name: str, max_scores: int, tmp_path: Path, device: str) -> None:
    """With 16 scores at once, keys are copied together head by head too."""
    check(name, tmp_path, device, max_scores=max_scores)


def check(name: str, path: Path, device: str, *, max_scores: int = 1 << 24) -> None:
    """Compare a family's logits, over mixed passes on scattered blocks, with those of transformers."""
    save_checkpoint(make_config(FAMILIES[name], name), path)
    stream = Stream.open(path, device=device)
    stream.max_scores = max_scores
    stream.kv.acquire(0, num_tokens=12)
    stream.run([[(0, 0, len(PROMPTS[0]))]])
    stream.kv = scattered_store(stream.kv.measure().token_nbytes, device)
    assert worst_error(stream, reference(path, device=device)) <= 1e-4
    assert stream.kv.statistics().num_free_blocks == 40


def together(query, rows, lengths, *, scale, window, copy_nbytes, out):
    """What torch's kernel for ragged batches does, sequence by sequence."""
    begin = 0
    for length, (keys, values) in zip(lengths, rows, strict=True):
        end = begin + length
        part = query[begin:end].transpose(0, 1)
        attend(part, keys, values, Rule(scale, window=window), max_scores=copy_nbytes, out=out[begin:end])
        begin = end
    assert begin == len(query) == len(out)


def prompts(query, keys, values, lengths, *, scale, window, out):
    """What it does where keys lie back to back, too."""
    rows = zip(keys.split(lengths), values.split(lengths), strict=True)
    together(query, rows, lengths, scale=scale, window=window, copy_nbytes=1 << 20, out=out)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the CPU's references do what the kernels of a GPU do; return how many prompts came in a call."""
    counts = []

    def counted(query, keys, values, lengths, **options):
        counts.append(len(lengths))
        prompts(query, keys, values, lengths, **options)

    monkeypatch.setattr(attention, "attend_together", together)
    monkeypatch.setattr(attention, "attend_prompts", counted)
    monkeypatch.setattr(attention, "can_attend_together", lambda *_: True)
    return counts


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_single_tokens_and_prompts_of_one_micro_batch_take_different_kernels(
    name: str, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of a GPU are stood in for by their references: what each gets, and where its result goes."""
    singles = []

    def paged(query, *tensors, **options):
        singles.append(len(query))
        attend_paged(query, *tensors, **options)

    monkeypatch.setattr(attention, "find_paged", lambda *_: paged)
    stand_in(monkeypatch)
    check(name, tmp_path, device)
    assert {1, 2, 3} <= set(singles)


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "minicpm3"])
def test_kernels_get_quantised_rows_with_their_scales(
    name: str, kv_dtype: str, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes through them has the logits of what goes sequence by sequence, but where rounding has moved a code."""
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    stream, wanted = Stream.open(tmp_path, device=device), reference(tmp_path, device=device)
    stream.kv = KVStore(device=device, kv_dtype=kv_dtype)
    monkeypatch.setattr(attention, "find_paged", lambda *_: None)
    alone = errors(stream, wanted)
    monkeypatch.setattr(attention, "find_paged", lambda *_: attend_paged)
    counts = stand_in(monkeypatch)
    stream.kv = KVStore(device=device, kv_dtype=kv_dtype)
    assert (errors(stream, wanted) - alone).abs().median() < 1e-3 < alone.max()
    assert bool(counts) == (name != "gpt_oss"), "plain prompts attend to the rows that they came with"
