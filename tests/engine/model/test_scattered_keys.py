"""Sequences whose blocks lie apart give the logits of sequences whose blocks are one run."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES
from tiny_models import PROMPTS, Stream, make_config, reference, save_checkpoint, worst_error

from penstock.engine.batch import MicroBatch
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
def test_scattered_blocks_do_not_change_the_logits(
    name: str, max_scores: int, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 16 scores at once, keys are copied together head by head too."""
    monkeypatch.setattr(MicroBatch.__init__, "__defaults__", (max_scores,))
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    stream = Stream.open(tmp_path, device=device)
    stream.kv.acquire(0, num_tokens=12)
    stream.run([[(0, 0, len(PROMPTS[0]))]])
    stream.kv = scattered_store(stream.kv.measure().token_nbytes, device)
    assert worst_error(stream, reference(tmp_path, device=device)) <= 1e-4
    assert stream.kv.statistics().num_free_blocks == 40
