"""Find the quantised weights of a checkpoint: what its config says, checked against the headers of its tensors.

Which weights are quantised is read from the tensors; how, from the config. Where the two disagree, the checkpoint is
refused, before anything is read.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.engine.quantised.compressed import compressed_scheme
from penstock.engine.quantised.fp8 import fbgemm_scheme, fp8_scheme
from penstock.engine.quantised.integers import awq_scheme, gptq_scheme
from penstock.engine.quantised.mxfp4 import mxfp4_scheme
from penstock.engine.quantised.scheme import Found, Roles, Scheme, Settings
from penstock.errors import CheckpointError, UnsupportedFormatError
from penstock.io.files import TensorEntry
from penstock.offload.manifest import CodedTensor, Stored

__all__ = ["code_tensors", "read_scheme"]

_METHODS = {
    "fp8": fp8_scheme,
    "fbgemm_fp8": fbgemm_scheme,
    "mxfp4": mxfp4_scheme,
    "gptq": gptq_scheme,
    "awq": awq_scheme,
    "compressed-tensors": compressed_scheme,
}
_OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|[qkv])_(scale|zero_point|global_scale)(_ub)?$")
"""Tensors that quantise activations or keys and values, which are computed with as they are."""

logger = logging.getLogger("penstock.engine")


def read_scheme(config: Mapping[str, Any], file: Path) -> Scheme | None:
    """Read what a model's config, from `file`, says of quantised weights; None where it says nothing.

    Raises UnsupportedFormatError, by name, for every way of quantising that is not supported.
    """
    inner = config.get("text_config")
    places = (config, inner if isinstance(inner, Mapping) else {})
    named = [place[key] for place in places for key in ("quantization_config", "compression_config") if place.get(key)]
    if not named:
        return None
    raw = named[0]
    method = raw.get("quant_method") if isinstance(raw, Mapping) else raw
    if not isinstance(raw, Mapping) or not isinstance(method, str) or method not in _METHODS:
        raise UnsupportedFormatError(
            f"the weights are quantised with {method or 'an unnamed method'}, which is not supported",
            file=file,
            wanted=", ".join(_METHODS),
            fix="Use the model's unquantised checkpoint, or one that is quantised so.",
        )
    return _METHODS[method](Settings(method, raw, file))


def code_tensors(stored: Stored, scheme: Scheme, dtype: str, *, directory: Path) -> Stored:
    """Let coded tensors, to be decoded to `dtype`, stand for the quantised weights of a checkpoint.

    Raises CheckpointError where the tensors are not what the config says: one that is missing or one too many, and one
    of another dtype or shape.
    """
    tensors: dict[str, TensorEntry | CodedTensor] = {}
    parts: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    dropped = 0
    for name, entry in stored.tensors.items():
        assert isinstance(entry, TensorEntry), "packed and quantised"
        place = _place(scheme.roles, entry, stored.tensors)
        if place is not None:
            weight, role = place
            if role in parts[weight]:
                _refuse_both(parts[weight][role], {role: entry})
            parts[weight][role] = entry
        elif _OF_ACTIVATIONS.search(name):
            dropped += 1
        else:
            tensors[name] = entry
    for weight, found in parts.items():
        if weight in tensors:
            _refuse_both(tensors[weight], found)
        if scheme.ignored(weight.removesuffix(".weight")):
            _refuse_ignored(weight, found)
        tensors[weight] = CodedTensor(weight, *scheme.code(Found(weight, found), dtype))
    if not parts:
        raise CheckpointError(
            f"the config says that the weights are quantised with {scheme.method}, and none is",
            file=directory,
            fix="Download the checkpoint again, or take quantization_config out of a config that is wrong.",
        )
    logger.info("%s: %d weights quantised with %s are decoded on arrival", directory, len(parts), scheme.method)
    if dropped:
        logger.info("%s: %d tensors that quantise activations are not used", directory, dropped)
    return Stored(tensors, stored.checks)


def _place(roles: Roles, entry: TensorEntry, tensors: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the weight that a tensor is a part of, and its role."""
    for role, endings in roles.endings.items():
        for ending in endings:
            stem = entry.name.removesuffix(ending)
            if stem == entry.name or not (stem.endswith(".") or not roles.weight):
                continue
            weight = stem + roles.weight
            if roles.weight or not roles.dtypes or _belongs(roles, weight, tensors):
                return weight, role
    if entry.dtype in roles.dtypes and not _OF_ACTIVATIONS.search(entry.name):
        return entry.name, "codes"
    return None


def _belongs(roles: Roles, weight: str, tensors: Mapping[str, Any]) -> bool:
    """Tell whether a scale is a weight's: other parameters may have such names."""
    return weight.endswith(".weight") or (weight in tensors and tensors[weight].dtype in roles.dtypes)


def _refuse_both(other: TensorEntry | CodedTensor, found: Mapping[str, TensorEntry]) -> None:
    part = next(iter(found.values()))
    raise CheckpointError(
        f"tensor {part.name!r} is one too many beside {other.name!r}",
        got=f"{other.dtype} {other.shape}",
        file=part.file.path,
        fix="Download the checkpoint again, or use the model's unquantised one.",
    )


def _refuse_ignored(weight: str, found: Mapping[str, TensorEntry]) -> None:
    part = next(iter(found.values()))
    raise CheckpointError(
        f"tensor {weight!r} is quantised, and the config says that it is not",
        file=part.file.path,
        got=part.name,
        fix="Check that config.json belongs to these weights.",
    )
