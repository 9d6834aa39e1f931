"""Tiny checkpoints in the formats that models are published in, packed here from the formats' definitions.

Nothing of Penstock's is used. Each packer takes float32 weights and returns the tensors that are stored, and, by its
own arithmetic, the float32 values that they stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Packed = tuple[dict[str, Tensor], Tensor]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass
class Made:
    """A quantised checkpoint, and the plain one of the values that it stands for."""

    path: Path
    decoded: Path
    names: list[str] = field(default_factory=list)


def make(
    source: Path,
    out: Path,
    config: dict[str, Any],
    packer: Callable[[str, Tensor], Packed],
    *,
    only: Callable[[str, Tensor], bool] | None = None,
) -> Made:
    """Quantise what `only` chooses of the plain checkpoint `source`: else all matrices of linear layers."""
    made = Made(out / "quantised", out / "decoded")
    stored: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if (only or is_linear)(name, tensor):
                parts, values = packer(name, tensor.float())
                stored |= {part: one.contiguous() for part, one in parts.items()}
                decoded[name] = values.contiguous()
                made.names.append(name)
            else:
                stored[name] = decoded[name] = tensor.contiguous()
    assert made.names
    for path, tensors, extra in ((made.path, stored, config), (made.decoded, decoded, None)):
        path.mkdir(parents=True)
        raw = json.loads((source / "config.json").read_text())
        if extra is not None:
            raw["quantization_config"] = extra
        (path / "config.json").write_text(json.dumps(raw))
        save_file(tensors, path / "model.safetensors")
        for other in source.glob("token*"):
            shutil.copy(other, path)
    return made


def is_linear(name: str, tensor: Tensor) -> bool:
    """Tell whether a tensor is a linear layer's weight inside the layers, and no router's."""
    return tensor.dim() == 2 and ".layers." in name and not name.endswith(("mlp.gate.weight", "router.weight"))


def blocks_of(scale: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Spread one number for each block over a matrix."""
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def amax(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the largest magnitude of each block."""
    rows, columns = weight.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(down * block[0], across * block[1])
    padded[:rows, :columns] = weight.abs()
    return padded.view(down, block[0], across, block[1]).amax((1, 3)).clamp(min=1e-6)


# ------------------------------------------------------------------------------------------------- 8-bit floats


def fp8(name: str, weight: Tensor, block: tuple[int, int] = (128, 128), *, suffix: str = "_scale_inv") -> Packed:
    scale = amax(weight, block) / 448
    spread = blocks_of(scale, block, *weight.shape)
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return {name: codes, name + suffix: scale}, codes.float() * spread


# ---------------------------------------------------------------------------------------------------- MXFP4


def mxfp4(name: str, weight: Tensor) -> Packed:
    """`weight` is [E, C, rows], as the model has it; what is stored has rows of C."""
    turned = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponent = (turned.abs().amax(-1, keepdim=True).clamp(min=1e-9).log2().ceil() - 2).clamp(-127, 127)
    codes = (turned / exponent.exp2()).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    values = (E2M1[codes] * exponent.exp2()).flatten(2).transpose(1, 2)
    return {f"{name}_blocks": blocks, f"{name}_scales": (exponent[..., 0] + 127).to(torch.uint8)}, values


# ------------------------------------------------------------------------------------------------- integers


@dataclass
class Integers:
    """Unsigned codes [R, C], zero points and scales [R, groups], and the group of each column."""

    codes: Tensor
    zero: Tensor
    scale: Tensor
    group: Tensor
    values: Tensor


def integers(
    weight: Tensor, bits: int, group_size: int, *, symmetric: bool = False, group: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Integers:  # fmt: skip
    rows, columns = weight.shape
    if group is None:
        group = torch.arange(columns) // group_size
    top = (1 << bits) - 1
    count = int(group.max()) + 1
    low, high = torch.zeros(rows, count), torch.zeros(rows, count)
    for one in range(count):
        part = weight[:, group == one]
        low[:, one], high[:, one] = part.amin(1).clamp(max=-1e-6), part.amax(1).clamp(min=1e-6)
    if symmetric:
        scale = (torch.maximum(-low, high) * 2 / top).to(dtype)
        zero = torch.full_like(low, (top + 1) // 2)
    else:
        scale = ((high - low) / top).to(dtype)
        zero = (-low / scale.float()).round().clamp(1, top)  # the oldest format cannot store 0
    codes = (weight / scale.float()[:, group] + zero[:, group]).round().clamp(0, top)
    values = (codes - zero[:, group]) * scale.float()[:, group]
    return Integers(codes.long(), zero.long(), scale, group.int(), values)


def words(codes: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack 32 / bits neighbours along `dim` into int32 words, the first lowest, or as `order` says; zeros fill up."""
    per = 32 // bits
    codes = codes.movedim(dim, -1)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    packed = torch.zeros(codes.shape[:-1], dtype=torch.int64)
    for place in range(per):
        packed |= codes[..., order[place] if order else place] << (place * bits)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return packed.to(torch.int32).movedim(-1, dim)


def gptq(name: str, weight: Tensor, bits: int = 4, group_size: int = 128, *, version: str = "gptq",
         symmetric: bool = True, index: str = "trivial") -> Packed:  # fmt: skip
    columns = weight.shape[1]
    size = columns if group_size == -1 else group_size
    group = None
    if index == "permuted":
        group = (torch.arange(columns) // size)[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    made = integers(weight, bits, size, symmetric=symmetric, group=group)
    stem = name.removesuffix("weight")
    parts = {
        f"{stem}qweight": words(made.codes.T, bits, 0),
        f"{stem}qzeros": words((made.zero - int(version == "gptq")).T, bits, 1),
        f"{stem}scales": made.scale.T,
    }
    if index != "none":
        parts[f"{stem}g_idx"] = made.group
    return parts, made.values


def awq(name: str, weight: Tensor, group_size: int = 128) -> Packed:
    made = integers(weight, 4, group_size)
    stem, order = name.removesuffix("weight"), (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        f"{stem}qweight": words(made.codes.T, 4, 1, order),
        f"{stem}qzeros": words(made.zero.T, 4, 1, order),
        f"{stem}scales": made.scale.T,
    }
    return parts, made.values


def compressed_packed(name: str, weight: Tensor, bits: int = 4, group_size: int | None = 128, *,
                      symmetric: bool = True, permuted: bool = False) -> Packed:  # fmt: skip
    columns = weight.shape[1]
    size = group_size or columns
    group = None
    if permuted:
        group = (torch.arange(columns) // size)[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    made = integers(weight, bits, size, symmetric=symmetric, group=group, dtype=torch.bfloat16)
    parts = {
        f"{name}_packed": words(made.codes, bits, 1),
        f"{name}_scale": made.scale,
        f"{name}_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts[f"{name}_zero_point"] = words(made.zero, bits, 0)
    if permuted:
        parts[f"{name}_g_idx"] = made.group
    return parts, made.values


def compressed_int8(name: str, weight: Tensor, strategy: str = "channel", *, symmetric: bool = True) -> Packed:
    whole = weight if strategy == "channel" else weight.flatten()[None]
    made = integers(whole, 8, whole.shape[1], symmetric=symmetric, dtype=torch.bfloat16)
    shape = (-1, 1) if strategy == "channel" else (1,)
    parts = {
        name: (made.codes - 128).to(torch.int8).view(weight.shape),
        f"{name}_scale": made.scale.view(shape),
    }
    if not symmetric:
        parts[f"{name}_zero_point"] = (made.zero - 128).to(torch.int8).view(shape)
    return parts, made.values.view(weight.shape)
