"""Products in FP8 with weights that stay packed: a linear layer for GPUs that multiply e4m3 twice as fast as bfloat16.

Each row of activations is divided by what makes its largest magnitude e4m3's largest; so is each row of weights, by a
bound that its scales and zero points give, so that nothing has to be looked at first. Codes are expanded to e4m3 right
before they are used, into scratch memory that all layers share: half of what expanding to bfloat16 writes and reads.
The product is summed up in float32, multiplied by both scales, and rounded once, to bfloat16 on a GPU.

    y = (e4m3(x / sx) · e4m3(w / sw)) × sx × sw

Shapes: rows [T, K]; weights [N, K]; scales float32, of rows [T, 1], of weights [N].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.errors import DeviceError
from penstock.kernels.gpu import triton_kernels
from penstock.kernels.groupwise import whole_codes
from penstock.kernels.packed_linear import PackedWeight
from penstock.kernels.sizes import LARGEST_FP8

__all__ = [
    "Scratch", "check_fp8", "expand_rows", "fp8_linear", "product", "quantise_rows", "suits_fp8", "why_no_fp8",
]  # fmt: skip

FP8 = torch.float8_e4m3fn

_PIECE = 1 << 18
"""Weights that a CPU expands at once."""

_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory on the device that one weight at a time is expanded into: `codes` e4m3, `scale` float32, both flat."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, rows: int, size: int, device: torch.device) -> Scratch:
        """Return enough for weights of so many rows and elements at most."""
        return cls(torch.empty(size, dtype=FP8, device=device), torch.empty(rows, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.codes.numel() + 4 * self.scale.numel()


def why_no_fp8(device: torch.device) -> str | None:
    """Say why a GPU, or torch on it, cannot multiply e4m3: that is tried. None where it can, and on a CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        return f"the GPU's compute capability is {found[0]}.{found[1]}, not 8.9 or newer"
    return _try_product(device)


def _try_product(device: torch.device) -> str | None:
    codes, ones = torch.zeros(16, 16, dtype=FP8, device=device), torch.ones(16, device=device)
    try:
        product(codes, ones[:, None], codes, ones)
    except RuntimeError as error:
        return f"torch {torch.__version__}: " + str(error).partition("\n")[0]
    return None


def check_fp8(device: torch.device) -> None:
    """Raise DeviceError where a GPU cannot multiply e4m3; a CPU does it in float32."""
    if reason := why_no_fp8(device):
        raise DeviceError(
            f"there are no products in FP8: {reason}",
            wanted="a GPU such as RTX 4090, L40S or H100",
            fix="Leave the activations' dtype at auto.",
        )


def suits_fp8(rows: int, columns: int, group_size: int) -> bool:
    """Say whether a weight [rows, columns] can be multiplied so: whole groups, and sizes that e4m3 products take."""
    return columns % group_size == 0 and rows % 16 == columns % 16 == group_size % 16 == 0


def fp8_linear(x: Tensor, weight: PackedWeight, scratch: Scratch | None) -> Tensor:
    """Return `x` [..., K] times the weight's transpose: [..., N] in x's dtype. Without a scratch, on a CPU."""
    rows = x.reshape(-1, weight.columns)
    made = _in_float32(rows, weight) if scratch is None else _on_tensor_cores(rows, weight, scratch).to(x.dtype)
    return made.view(*x.shape[:-1], made.shape[-1])


def _on_tensor_cores(rows: Tensor, weight: PackedWeight, scratch: Scratch) -> Tensor:
    codes, scale = quantise_rows(rows)
    num_rows, columns = weight.codes.shape[0], weight.columns
    expanded = scratch.codes[: num_rows * columns].view(num_rows, columns)
    factors = scratch.scale[:num_rows]
    expand_rows(weight, expanded, factors)
    return product(codes, scale, expanded, factors)


def product(codes: Tensor, scale: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
    """Return bfloat16 [T, N] of rows [T, K] and a weight [N, K], both e4m3, on a GPU that can."""
    scales = {"scale_a": scale, "scale_b": factors[None]}
    return torch._scaled_mm(codes, weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def _in_float32(rows: Tensor, weight: PackedWeight) -> Tensor:
    """Do the same with float32 numbers that e4m3 has, in pieces."""
    codes, scale = quantise_rows(rows)
    wide = codes.float()
    made = rows.new_empty(rows.shape[0], weight.codes.shape[0])
    for part, columns in _parts(weight):
        expanded = torch.empty(part.codes.shape[0], part.columns, dtype=FP8, device=rows.device)
        factors = torch.empty(part.codes.shape[0], device=rows.device)
        expand_rows(part, expanded, factors)
        made[:, columns] = (wide @ expanded.float().t()) * scale * factors
    return made


def _parts(weight: PackedWeight) -> Iterator[tuple[PackedWeight, slice]]:
    step = max(_PIECE // max(weight.columns, 1), 1)
    for begin in range(0, weight.codes.shape[0], step):
        down = slice(begin, begin + step)
        zero = None if weight.zero is None else weight.zero[down]
        yield replace(weight, codes=weight.codes[down], scale=weight.scale[down], zero=zero), down


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 codes [T, K] and scales [T, 1] of rows; of one that has a NaN or an infinity, the codes have NaNs."""
    if rows.is_cuda and (kernels := triton_kernels("fp8_linear_triton", rows.device)) is not None:
        codes, scale = kernels.quantise_rows(rows)
        return codes, scale
    wide = rows.float()
    top = wide.abs().amax(-1, keepdim=True)
    return _encode(wide * _inverse(top)), top * (1 / LARGEST_FP8)


def expand_rows(weight: PackedWeight, out: Tensor, factors: Tensor) -> None:
    """Make e4m3 codes `out` [N, K] of a weight, and what to multiply each row of them with, `factors` [N]."""
    if out.is_cuda and (kernels := triton_kernels("fp8_linear_triton", out.device)) is not None:
        kernels.expand_rows(weight, out, factors)
        return
    top = 15.0 if weight.bits == 4 else 255.0
    if weight.zero is not None:
        zero, largest = weight.zero.float(), torch.maximum(weight.zero.float(), top - weight.zero.float())
    else:
        zero = torch.full_like(weight.scale, 8.0 if weight.bits == 4 else 0.0, dtype=torch.float32)
        largest = torch.full_like(zero, 8.0 if weight.bits == 4 else 128.0)
    bound = (weight.scale.float().abs() * largest).amax(-1, keepdim=True)
    times = weight.scale.float() * _inverse(bound)
    cells = whole_codes(weight.codes, bits=weight.bits).float().unflatten(1, (-1, weight.group_size))
    out.copy_(_encode(((cells - zero[..., None]) * times[..., None]).flatten(1)))
    factors.copy_(bound[:, 0] * (1 / LARGEST_FP8))


def _inverse(top: Tensor) -> Tensor:
    """Return what makes `top` the largest number of e4m3; 0 for 0."""
    return torch.where(top > 0, LARGEST_FP8 / top, torch.where(top == 0, 0.0, top))


def _encode(wide: Tensor) -> Tensor:
    return wide.clamp_(-LARGEST_FP8, LARGEST_FP8).to(FP8)
