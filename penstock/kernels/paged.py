"""Attention of one new token per sequence, over keys and values in blocks that lie anywhere.

`attend_paged` is the reference: plain torch, one sequence after the other. On CUDA a Triton kernel of the same
signature does all sequences at once; `find_paged` says which one to use, if any.
Shapes: N sequences; Hq query heads, H key heads; D and Dv head sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from subprocess import SubprocessError

import torch
from torch import Tensor

from penstock.kernels.attention import Rule, attend
from penstock.kernels.flash import MAX_HEAD_SIZE
from penstock.kernels.quant_kv import dequantise

__all__ = ["attend_paged", "find_paged"]

MAX_LATENT_SIZE = 512
"""Values that are the first elements of the keys may be larger: they are read once."""

_TAKEN = {torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn}
"""What the kernel reads."""

logger = logging.getLogger("penstock.kernels")

PagedAttention = Callable[..., None]
"""A function with the signature of `attend_paged`."""


def attend_paged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    rule: Rule,
    max_length: int,
    workspace_nbytes: int,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    out: Tensor,
) -> None:
    """Attend: query [N, Hq, D] over keys [num_blocks, block_tokens, H, D], values [num_blocks, block_tokens, H, Dv].

    block_table [N, width] int32 names each sequence's blocks in order, lengths [N] int32 its tokens, at most
    `max_length`; the query is the last token's. Values may be a view of the keys' first elements. Keys and values may
    be codes with their scales in `key_scales` and `value_scales` (`penstock.kernels.quant_kv`). `out` is [N, Hq, Dv].
    What is computed meanwhile takes at most `workspace_nbytes`, or what one sequence needs.
    """
    del max_length  # known here; a kernel cannot look before it starts
    size = keys.shape[1]
    for row, length in enumerate(lengths.tolist()):
        used = block_table[row, : -(-length // size)]
        parts = ((keys, key_scales, query.shape[-1]), (values, value_scales, out.shape[-1]))
        key, value = (_gather(*each, used).to(query.dtype).flatten(0, 1)[:length] for each in parts)
        attend(query[row, :, None], key, value, rule, max_scores=workspace_nbytes // 16, out=out[row, None])


def _gather(blocks: Tensor, scales: Tensor | None, size: int, used: Tensor) -> Tensor:
    """Return these blocks, as the numbers that they stand for."""
    made = blocks.index_select(0, used)
    return made if scales is None else dequantise(made, scales.index_select(0, used), size)


def find_paged(
    query: Tensor, keys: Tensor, values: Tensor, rule: Rule, value_size: int | None = None
) -> PagedAttention | None:
    """Return the kernel for these tensors, laid out as `attend_paged` takes them, and this rule; None if there is none.

    `value_size` is that of values whose elements share bytes; else it is seen. Where it returns None, other code
    attends sequence by sequence.
    """
    if not query.is_cuda or query.dtype not in {torch.float16, torch.bfloat16} or query.stride(-1) != 1:
        return None
    if rule.bias is not None or keys.dtype not in _TAKEN:
        return None
    if keys.dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability(query.device) < (8, 9):
        return None  # older GPUs have no instruction that converts it
    latent = keys.data_ptr() == values.data_ptr()
    largest = MAX_LATENT_SIZE if latent else MAX_HEAD_SIZE
    if not keys.is_contiguous() or not (latent or values.is_contiguous()) or (value_size or values.shape[-1]) > largest:
        return None
    return _triton(query.device) if latent or query.shape[-1] <= largest else None


@cache
def _triton(device: torch.device) -> PagedAttention | None:
    """Return the Triton kernel, or None, logged with the reason, where this machine cannot build or run it."""
    try:
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError("the GPU is older than compute capability 8.0")
        from triton.runtime import driver  # noqa: PLC0415 (only where there is a GPU)

        from penstock.kernels.paged_triton import attend_paged as kernel  # noqa: PLC0415

        driver.active.get_current_target()  # builds what every kernel needs, with the machine's C compiler
    except (ImportError, OSError, RuntimeError, SubprocessError) as error:
        logger.warning("decode copies keys together for torch's kernel, for want of Triton: %s", error)
        return None
    return kernel
