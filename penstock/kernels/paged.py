"""Attention of one new token per sequence, over keys and values in blocks that lie anywhere.

`attend_paged` is the reference: that of the CPU's kernel, told by a `Rule` what each sequence sees. On CUDA a Triton
kernel of the same signature does all sequences at once; `find_paged` says which one to use, if any.
Shapes: N sequences; Hq query heads, H key heads; D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from penstock.kernels import paged_reference
from penstock.kernels.attention import Rule
from penstock.kernels.flash import MAX_HEAD_SIZE
from penstock.kernels.gpu import triton_kernels

__all__ = ["attend_paged", "find_paged"]

MAX_LATENT_SIZE = 512
"""Values that are the first elements of the keys may be larger: they are read once."""

_TAKEN = {torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn}
"""What the kernel reads."""

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
    What a kernel computes meanwhile takes at most `workspace_nbytes`, or what one sequence needs.
    """
    del max_length, workspace_nbytes  # a kernel cannot look at lengths before it starts, nor take memory as it likes
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        paged_reference.attend_paged(
            query[one],
            keys,
            values,
            block_table[one],
            lengths[one],
            scale=rule.scale,
            window=length - rule.first_key(length - 1),
            softcap=rule.softcap,
            sinks=rule.sinks,
            key_scales=key_scales,
            value_scales=value_scales,
            out=out[one],
        )


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
    if not latent and query.shape[-1] > largest:
        return None
    kernels = triton_kernels("paged_triton", query.device)
    kernel: PagedAttention | None = None if kernels is None else kernels.attend_paged
    return kernel
