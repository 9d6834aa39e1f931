"""Attention of one query for each sequence over paged keys and values, in plain torch: what kernels are measured by.

Shapes: N sequences; Hq query heads, H key heads; D and Dv head sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.quant_kv import dequantise

__all__ = ["attend_paged"]


def attend_paged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    num_threads: int = 1,  # noqa: ARG001 - torch has its own setting
    out: Tensor,
) -> None:
    """Attend with one query for each sequence: query [N, Hq, D] over its tokens into out [N, Hq, Dv].

    Token t of sequence n lies in keys [num_blocks, block_tokens, H, D] and values [num_blocks, block_tokens, H, Dv] at
    [block_table[n, t // block_tokens], t % block_tokens]; blocks may be shared. Of its `lengths[n]` tokens the query
    sees the last `window`, or all; a sequence without tokens gets zeros. Query, keys, values and out are bfloat16,
    float16 or float32, each its own; keys and values may be codes with `key_scales` and `value_scales`, which are what
    `quant_kv` makes (the compiled kernel reads its int8 and fp8). Scores are made as `attention.Rule` says, `sinks`
    [Hq] are float32, `block_table` [N, max_blocks] and `lengths` [N] int32. All arithmetic is float32.
    """
    num_heads, block_tokens = keys.shape[2], keys.shape[1]
    for row, (table, length) in enumerate(zip(block_table, lengths.tolist(), strict=True)):
        first = max(length - window, 0) if window is not None else 0
        positions = torch.arange(first, length, device=query.device)
        if not len(positions):
            out[row].zero_()
            continue
        places = table[positions // block_tokens].long() * block_tokens + positions % block_tokens
        key, value = (
            _gather(rows, scales, places, size)
            for rows, scales, size in (
                (keys, key_scales, query.shape[-1]),
                (values, value_scales, out.shape[-1]),
            )
        )
        folded = query[row].float().view(num_heads, -1, query.shape[-1])
        scores = (folded @ key.transpose(1, 2)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(num_heads, -1, 1)], -1)
        weights = scores.softmax(-1)[..., : len(positions)]
        out[row] = (weights @ value).view(out.shape[1:])


def _gather(rows: Tensor, scales: Tensor | None, places: Tensor, size: int) -> Tensor:
    """Return float32 [H, tokens, size] of the rows at these places in all blocks."""
    blocks, slots = places // rows.shape[1], places % rows.shape[1]
    made = rows[blocks, slots]
    whole = made.float() if scales is None else dequantise(made, scales[blocks, slots], size)
    return whole.transpose(0, 1)
