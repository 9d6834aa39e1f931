"""What coding has cost: the error of every layer's weights, and the perplexity of a text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from penstock.engine.model.build import load_config
from penstock.engine.model.reference import load_reference
from penstock.engine.model.tokenizer import load_tokenizer
from penstock.engine.model.weights import open_weights
from penstock.errors import CheckpointError, ConfigError, PromptFileError
from penstock.io.checkpoint import Checkpoint
from penstock.io.files import TensorEntry
from penstock.offload.decode import read_tensor
from penstock.offload.manifest import CodedTensor, Stored

__all__ = ["WINDOW", "LayerError", "Perplexity", "layer_errors", "perplexity", "tokens_of"]

WINDOW = 1024
"""Tokens that are predicted from an empty context together; models of shorter contexts go beyond them."""


@dataclass(frozen=True, slots=True)
class LayerError:
    """The coded weights of one layer, None for those outside the layers.

    `error` is the root of the mean squared error over that of the weights' mean square; `worst` is the tensor with the
    largest such error, `worst_error`.
    """

    layer: int | None
    num_tensors: int
    error: float
    worst: str
    worst_error: float

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of a text of `num_tokens` tokens, of which those that begin a window are not predicted."""

    num_tokens: int
    model: float
    packed: float

    @property
    def change(self) -> float:
        """How much worse the packed model is, as a share."""
        return self.packed / self.model - 1


def layer_errors(model: str | PathLike[str], packed: str | PathLike[str]) -> list[LayerError]:
    """Compare every coded tensor of a packed or quantised checkpoint with the one it was made from, one at a time.

    Raises ConfigError when `packed` is neither, CheckpointError when it was made from another model.
    """
    source, made = _open(Path(model)), _open(Path(packed))
    if not any(isinstance(entry, CodedTensor) for entry in made.tensors.values()):
        raise ConfigError("not a packed checkpoint", wanted="a packed or quantised one", got=str(packed))
    sums: dict[int | None, list[tuple[float, float, str]]] = defaultdict(list)
    for name, entry in made.tensors.items():
        if isinstance(entry, TensorEntry):
            continue
        if name not in source.tensors or source.tensors[name].shape != entry.shape:
            raise CheckpointError(
                f"tensor {name!r} is not the model's", file=packed, fix="Name the model it came from."
            )
        wanted, found = read_tensor(source, name), read_tensor(made, name)
        sums[_layer(name)].append((_squares(wanted, found), _squares(wanted), name))
    order = sorted(sums, key=lambda layer: -1 if layer is None else layer)
    return [_layer_error(layer, sums[layer]) for layer in order]


def _open(path: Path) -> Stored:
    return open_weights(Checkpoint.open(path), load_config(path), path, dtype="auto")[0]


def _squares(one: Tensor, other: Tensor | None = None) -> float:
    """Return the sum of the squares of `one`, or of what it differs by from `other`, in double precision."""
    total = 0.0
    for begin in range(0, one.numel(), 1 << 22):
        part = one.reshape(-1)[begin : begin + (1 << 22)].double()
        if other is not None:
            part -= other.reshape(-1)[begin : begin + (1 << 22)].double()
        total += float(part.square().sum())
    return total


def _layer(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _layer_error(layer: int | None, sums: Sequence[tuple[float, float, str]]) -> LayerError:
    worst = max(sums, key=lambda one: _relative(one[0], one[1]))
    total = _relative(sum(one[0] for one in sums), sum(one[1] for one in sums))
    return LayerError(layer, len(sums), total, worst[2], _relative(worst[0], worst[1]))


def _relative(error: float, size: float) -> float:
    return math.sqrt(error / size) if size else 0.0


def perplexity(
    model: str | PathLike[str],
    packed: str | PathLike[str],
    text: str | PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> Perplexity:
    """Compare the perplexity of a text file. Each model is whole in memory in its turn, else BudgetError."""
    tokens = tokens_of(text, load_tokenizer(Path(packed)))
    found = [_perplexity(Path(path), tokens, dtype, device) for path in (model, packed)]
    return Perplexity(len(tokens), *found)


def tokens_of(text: str | PathLike[str], tokenizer: Any) -> list[int]:
    """Return the tokens of a text file, of which there are at least 2. Raises PromptFileError."""
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PromptFileError(f"cannot be read: {error}", file=text) from error
    tokens: list[int] = tokenizer.encode(content, add_special_tokens=False)
    if len(tokens) < 2:
        raise PromptFileError("too short to predict anything", file=text, wanted="at least 2 tokens", got=len(tokens))
    return tokens


def _perplexity(path: Path, tokens: Sequence[int], dtype: str, device: str) -> float:
    total = count = 0.0
    with load_reference(path, dtype=dtype, device=device) as reference:
        for begin in range(0, len(tokens) - 1, WINDOW):
            window = list(tokens[begin : begin + WINDOW])
            if len(window) > 1:
                wanted = torch.tensor(window[1:])
                total += float(cross_entropy(reference(window)[:-1].float().cpu(), wanted, reduction="sum"))
                count += len(wanted)
    return math.exp(total / count)
