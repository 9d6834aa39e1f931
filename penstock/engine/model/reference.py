"""The oracle: the same checkpoint, whole and in memory, run by Hugging Face alone."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers.utils import logging

from penstock.engine.model.build import factory_for, load_config
from penstock.engine.model.weights import open_weights
from penstock.errors import BudgetError
from penstock.io.checkpoint import Checkpoint
from penstock.io.limits import available_memory
from penstock.offload.buffers import DTYPES
from penstock.offload.decode import read_all
from penstock.offload.manifest import CodedTensor
from penstock.offload.tiers import format_size

__all__ = ["Reference", "load_reference"]


class Reference:
    """A plain Hugging Face model. Calling it with token ids returns logits [len(ids), vocab] of one plain forward."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.dtype: torch.dtype = module.dtype

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        """Run one forward without cache, masks or padding."""
        ids = torch.tensor([list(token_ids)], device=self._module.device)
        with torch.inference_mode():
            logits: Tensor = self._module(input_ids=ids, use_cache=False).logits[0]
        return logits

    def close(self) -> None:
        """Let go of the weights."""
        del self._module
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_reference(path: Path, *, dtype: str = "auto", device: str = "auto") -> Reference:
    """Load a whole checkpoint. Raises BudgetError when memory cannot hold it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config = load_config(path)
    stored, _ = open_weights(Checkpoint.open(path), config, path, dtype=dtype)
    size = None if dtype == "auto" else getattr(torch, dtype).itemsize
    sizes = (math.prod(entry.shape) * (size or DTYPES[entry.dtype].itemsize) for entry in stored.tensors.values())
    needed = sum(sizes)
    free = {"host": available_memory()}  # transformers loads there first
    if device != "cpu":
        free["device"] = torch.cuda.mem_get_info(device)[0]
    for place, nbytes in free.items():
        if needed > nbytes:
            raise BudgetError(
                f"the whole model does not fit in {place} memory, so there is nothing to compare with",
                file=path,
                wanted=format_size(needed),
                got=f"{format_size(nbytes)} free",
                fix="Verify a smaller model of the same family.",
            )
    logging.disable_progress_bar()
    if any(isinstance(entry, CodedTensor) for entry in stored.tensors.values()):  # it gets what the parts stand for
        with torch.device("meta"):
            kind = type(factory_for(config).from_config(config, trust_remote_code=False))
        module = kind.from_pretrained(None, config=config, state_dict=dict(read_all(stored)), dtype=dtype)
    else:
        module = factory_for(config).from_pretrained(path, dtype=dtype, local_files_only=True, trust_remote_code=False)
    return Reference(module.to(device).eval())
