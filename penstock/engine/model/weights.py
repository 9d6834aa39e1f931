"""The tensors of a checkpoint directory by the names that transformers knows, whatever they are stored as."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from penstock.engine.quantised.recognise import code_tensors, read_scheme
from penstock.errors import ConfigError, MissingFileError, ModelError, UnsupportedFormatError
from penstock.io.checkpoint import Checkpoint
from penstock.io.files import TensorEntry
from penstock.offload.buffers import DTYPES, dtype_name
from penstock.offload.manifest import CodedTensor, Stored, open_stored
from penstock.offload.scaled import ScaledCoding

__all__ = ["check_orientation", "open_weights", "read_json", "resolve_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_weights(
    checkpoint: Checkpoint, config: Any, directory: Path, *, dtype: str | torch.dtype
) -> tuple[Stored, torch.dtype]:
    """Open a checkpoint, with coded tensors for weights that are packed or quantised; also resolve the dtype.

    Raises CheckpointError where the tensors are not what the config in `directory` or the manifest says.
    """
    stored = open_stored(checkpoint)
    compute_dtype = resolve_dtype(dtype, config, stored.tensors)
    file = directory / "config.json"
    scheme = read_scheme(read_json(file), file)
    if scheme is not None:
        if stored.checks:
            raise UnsupportedFormatError(
                "packed, and quantised before that", file=file, fix="Use the packed model's own config."
            )
        if compute_dtype not in _DTYPES.values():
            raise ConfigError("not a dtype to decode to", wanted=", ".join(_DTYPES), got=compute_dtype, fix="Name one.")
        stored = code_tensors(stored, scheme, dtype_name(compute_dtype), directory=directory)
    return stored, compute_dtype


def resolve_dtype(
    dtype: str | torch.dtype, config: Any, tensors: Mapping[str, TensorEntry | CodedTensor]
) -> torch.dtype:
    """Resolve "auto" as transformers does: the config's dtype, or else that of most of the checkpoint's bytes."""
    if dtype != "auto":
        chosen = _DTYPES.get(str(dtype).removeprefix("torch."))
        if chosen is None:
            raise ConfigError("not a dtype to compute in", wanted=", ".join(("auto", *_DTYPES)), got=dtype)
        return chosen
    named = config.dtype or config.get_text_config().dtype
    if named is not None:
        found: torch.dtype = getattr(torch, named) if isinstance(named, str) else named
        return found
    sizes: Counter[torch.dtype] = Counter()
    for entry in tensors.values():
        if DTYPES.get(entry.dtype) in _DTYPES.values():
            sizes[DTYPES[entry.dtype]] += math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def check_orientation(module: Any, stored: Stored, directory: Path) -> None:
    """Refuse quantised weights of GPT-2's transposed layers: formats differ in which way round they store them."""
    turned = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, Conv1D)}
    for name, one in stored.tensors.items():
        scaled = isinstance(one, CodedTensor) and isinstance(one.coding, ScaledCoding)
        if scaled and any(target == name or target.endswith(f".{name}") for target in turned):
            raise UnsupportedFormatError(
                f"{name!r} is quantised, and a transposed layer (Conv1D)",
                file=directory,
                fix="Use the model's unquantised checkpoint.",
            )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises MissingFileError and ModelError."""
    try:
        raw = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise MissingFileError(
            f"cannot be read: {error.strerror}", file=file, fix="Name the directory that holds config.json."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"not JSON: {error}", file=file, fix="Download the file again.") from error
    if not isinstance(raw, dict):
        raise ModelError("not a model's config", file=file, wanted="an object", got=type(raw).__name__)
    return raw
