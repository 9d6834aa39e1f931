"""What a model costs, told from config.json and safetensors headers alone: no torch, no transformers, no weights.

A run measures the same by a rehearsal; this is for plans of models and machines that are not there. Bytes of weights,
keys and values are exact, activations an upper estimate. What decoding quantised weights takes besides is not counted.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.engine.blueprints import BLUEPRINTS, DTYPE_NBYTES, ROUTERS, Blueprint, Config, Part
from penstock.engine.flops import ModelFlops, attention_windows, count
from penstock.engine.quantised.recognise import code_tensors, read_scheme
from penstock.engine.quantised.scheme import Scheme
from penstock.errors import ConfigError, MissingFileError, ModelError, UnsupportedFormatError
from penstock.io.checkpoint import Checkpoint
from penstock.io.files import TensorEntry
from penstock.offload.codec import LOSSLESS, CodecName, Coding, PackOptions
from penstock.offload.kv_dtype import row_nbytes
from penstock.offload.layout import PARAMETER_ALIGNMENT
from penstock.offload.manifest import CodedTensor, open_stored
from penstock.offload.plan import ModelShape, WindowLayer, window_workspace

__all__ = [
    "SHAPES", "Anatomy", "Unit", "anatomy_of", "parameters_in", "quantised_by", "shape_directory", "with_stored",
]  # fmt: skip

SHAPES = Path(__file__).parents[1] / "data" / "shapes"
"""A directory with a config.json for each shape."""

SAMPLER_NBYTES = {"cpu": 40, "cuda": 8 * 40}
"""What choosing tokens takes, by device: bytes per entry of the vocabulary, of the rows that are sampled at once."""

_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FLOATS = frozenset(_SAFETENSORS.values())
_LEAST_CODED = 4096
_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that come and go together. `wire_nbytes` rest and travel; a buffer holds `nbytes`."""

    parts: tuple[Part, ...]
    nbytes: int
    wire_nbytes: int

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Unit:
        """Return a unit whose parameters travel as they are."""
        known = tuple(parts)
        nbytes = sum(_aligned(part.nbytes) for part in known)
        return cls(known, nbytes, nbytes)

    def coded(self, codec: CodecName, dtype: str, *, all_parts: bool) -> Unit:
        """Return the unit packed: coded tensors travel, and are expanded beside what travelled."""
        wire = decoded = 0
        for part in self.parts:
            nbytes = _coded_nbytes(part, codec, dtype, all_parts=all_parts)
            wire += _aligned(nbytes or part.nbytes)
            decoded += _aligned(part.nbytes) if nbytes else 0
        return Unit(self.parts, wire + decoded, wire)

    def scaled(self, scheme: Scheme, prefix: str) -> Unit:
        """Return the unit as it is published quantised; `prefix` is what its parts' names begin with in a config."""
        wire = decoded = 0
        for part in self.parts:
            nbytes = _scaled_nbytes(part, scheme, prefix)
            wire += nbytes or _aligned(part.nbytes)
            decoded += _aligned(part.nbytes) if nbytes else 0
        return Unit(self.parts, wire + decoded, wire)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A model taken apart. `dtype` is a torch dtype's name; counts of elements are per token.

    `kv_token_nbytes` is what all layers keep of a token, as `kv_dtype`; those of `kv_windows` only of the last ones.
    `kv_layers` are the parts of those that keep any.
    `state_nbytes` is what a sequence keeps whatever its length, besides two rows of logits. `quantised` names the
    method by which the weights are quantised, if they are.
    """

    name: str
    family: str
    dtype: str
    vocab_size: int
    context_length: int | None
    flops: ModelFlops
    resident: Unit
    layers: tuple[Unit, ...]
    kv_token_nbytes: int
    working_elements: int
    held_elements: int
    state_nbytes: int = 0
    kv_windows: tuple[WindowLayer, ...] = ()
    kv_dtype: str = "auto"
    quantised: str | None = None
    kv_layers: tuple[int, ...] = ()

    def shape(self, *, on_cpu: bool) -> ModelShape:
        """Return what planning asks for."""
        size = DTYPE_NBYTES[self.dtype]
        copied, older = window_workspace(self.kv_windows)
        return ModelShape(
            resident_nbytes=self.resident.nbytes,
            fixed_nbytes=SAMPLER_NBYTES["cpu" if on_cpu else "cuda"] * self.vocab_size + older,
            layer_nbytes=tuple(unit.nbytes for unit in self.layers),
            wire_nbytes=tuple(unit.wire_nbytes for unit in self.layers),
            workspace_nbytes=self.working_elements * size + copied,
            held_nbytes=self.held_elements * size,
            kv_token_nbytes=self.kv_token_nbytes,
            kv_sequence_nbytes=self.state_nbytes + 2 * self.vocab_size * size,
            kv_windows=self.kv_windows,
            kv_dtype=self.kv_dtype,
            kept_nbytes=tuple(sum(_aligned(part.nbytes) for part in unit.parts) for unit in self.layers),
            kv_layers=self.kv_layers,
        )

    def why_not_coded(self, codec: CodecName) -> str | None:
        """Say why `penstock pack` cannot store the model so; None where it can."""
        if self.quantised:
            return f"weights that are quantised with {self.quantised} cannot be packed"
        if codec in LOSSLESS and self.dtype != "bfloat16":
            return f"{self.dtype} weights cannot be packed so"
        return None

    def coded(self, codec: CodecName) -> Anatomy:
        """Return the model as `penstock pack` would store it."""
        assert self.why_not_coded(codec) is None
        layers = tuple(unit.coded(codec, self.dtype, all_parts=codec in LOSSLESS) for unit in self.layers)
        return replace(self, layers=layers)


def with_stored(anatomy: Anatomy, directory: Path) -> Anatomy | None:
    """Look at the headers of a directory's weights: packed, quantised or cast tensors travel as they are stored.

    Where no weights are there, quantised ones are as the config says, and all else stays as it is. Returns None where
    they are not the tensors that the anatomy tells of. Raises CheckpointError for files that are damaged, and
    UnsupportedFormatError for weights that are quantised in a way that is not supported, or not known without headers.
    """
    file = directory / "config.json"
    scheme = read_scheme(_read(file), file)
    if not any(directory.glob("*.safetensors*")):
        return anatomy if scheme is None else _published(anatomy, scheme, file)
    size = DTYPE_NBYTES[anatomy.dtype]
    stored = open_stored(Checkpoint.open(directory))
    if scheme is not None:
        stored = code_tensors(stored, scheme, _SAFETENSORS[anatomy.dtype], directory=directory)
        anatomy = replace(anatomy, quantised=scheme.method)
    found: dict[int, _Stored] = defaultdict(_Stored)
    for name, entry in stored.tensors.items():
        match = _IN_LAYER.search(name)
        found[int(match[1]) if match else -1].add(entry, size)
    units = (anatomy.resident, *anatomy.layers)
    layers = []
    for number, unit in enumerate(units, start=-1):
        known, numbers = found[number], parameters_in([unit])
        if abs(known.numbers - numbers) > numbers // 1000 and number >= 0:
            return None
        layers.append(Unit(unit.parts, known.nbytes, known.wire_nbytes) if known.decoded_nbytes else unit)
    return replace(anatomy, resident=layers[0], layers=tuple(layers[1:]))


def quantised_by(directory: Path) -> str | None:
    """Return the method by which a directory's weights are quantised. Raises like `with_stored`."""
    file = directory / "config.json"
    scheme = read_scheme(_read(file), file)
    return None if scheme is None else scheme.method


def _published(anatomy: Anatomy, scheme: Scheme, file: Path) -> Anatomy:
    """Return a model whose layers are quantised as its config says."""
    if scheme.make_up is None:
        raise UnsupportedFormatError(
            f"what weights that are quantised with {scheme.method} take is not known from the config alone",
            file=file,
            fix="Name a directory with weights, whose headers are read too.",
        )
    layers = tuple(unit.scaled(scheme, f"model.layers.{index}.") for index, unit in enumerate(anatomy.layers))
    return replace(anatomy, layers=layers, quantised=scheme.method)


class _Stored:
    """The tensors of a unit, added up."""

    def __init__(self) -> None:
        self.numbers = self.wire_nbytes = self.decoded_nbytes = 0

    @property
    def nbytes(self) -> int:
        return self.wire_nbytes + self.decoded_nbytes

    @staticmethod
    def _itemsize(name: str, itemsize: int) -> int:
        """Return what a number takes on the device: the correction terms of routers are float32 there."""
        return 4 if name.endswith("correction_bias") else itemsize

    def add(self, entry: TensorEntry | CodedTensor, itemsize: int) -> None:
        numbers = math.prod(entry.shape)
        parts = entry.parts if isinstance(entry, CodedTensor) else (entry,)
        self.numbers += numbers
        self.wire_nbytes += sum(_aligned(part.nbytes) for part in parts)
        if isinstance(entry, CodedTensor):
            self.decoded_nbytes += _aligned(entry.coding.nbytes)
        elif entry.dtype in _FLOATS and entry.nbytes != (wanted := numbers * self._itemsize(entry.name, itemsize)):
            self.decoded_nbytes += _aligned(wanted)


def shape_directory(name: str) -> Path:
    """Return the directory of a shape. Raises ConfigError, with the names of all, where there is none."""
    known = sorted(path.name for path in SHAPES.iterdir())
    if name not in known:
        raise ConfigError("no such shape", wanted=f"one of {', '.join(known)}", got=name)
    return SHAPES / name


def anatomy_of(
    directory: Path, *, dtype: str = "auto", layers: int | None = None, kv_dtype: str = "auto"
) -> Anatomy | None:
    """Take the model of a directory apart, by its config.json; None for a family without a blueprint.

    A config that says that its weights are quantised is taken for what they were before: `with_stored` sees the rest.

    `dtype` is "auto" or one to compute in, `layers` another depth, `kv_dtype` what keys and values rest as. Raises
    ModelError and MissingFileError for a config that cannot be read, ConfigError for a dtype that is none.
    """
    file = directory / "config.json"
    raw = _read(file)
    family = str(raw.get("model_type"))
    blueprint = BLUEPRINTS.get(family)
    if blueprint is None or raw.get("do_layer_norm_before") is False:
        return None
    if layers is not None:
        raw |= {"num_hidden_layers": layers, "layer_types": (raw.get("layer_types") or [])[:layers] or None}
    config = Config(raw, file=file)
    if types := blueprint.layer_types(config):
        config = Config(raw | {"layer_types": types}, file=file)
    return _taken_apart(directory.name, family, blueprint, config, _dtype(dtype, raw), kv_dtype=kv_dtype)


def _taken_apart(name: str, family: str, blueprint: Blueprint, config: Config, dtype: str, *, kv_dtype: str) -> Anatomy:
    size = DTYPE_NBYTES[dtype]
    number = config.number("num_hidden_layers")
    kinds: dict[tuple[Part, ...], Unit] = {}
    layers = []
    for index in range(number):
        parts = blueprint.layer(config, index, size)
        layers.append(kinds.setdefault(parts, Unit.of(parts)))
    resident = Unit.of(blueprint.resident(config, size))
    vocab_size = config.number("vocab_size")
    flops = count(config, resident.parts, [unit.parts for unit in layers], vocab_size=vocab_size)
    assert flops is not None, "a blueprint names its experts"
    length = getattr(config, "max_position_embeddings", None)
    length = length if type(length) is int else None
    num_rows, row_size = blueprint.kept(config)
    layer_nbytes = num_rows * row_nbytes(row_size, kv_dtype, itemsize=size)
    return Anatomy(
        name=name,
        family=family,
        dtype=dtype,
        vocab_size=vocab_size,
        context_length=length,
        flops=flops,
        resident=resident,
        layers=tuple(layers),
        kv_token_nbytes=number * layer_nbytes,
        kv_layers=(layer_nbytes,) * number,
        working_elements=blueprint.at_work(config),
        held_elements=blueprint.held(config),
        kv_windows=tuple(
            WindowLayer(layer, window, layer_nbytes)
            for layer, window in attention_windows(config, number).items()
            if window is not None and (length is None or window < length)
        ),
        kv_dtype=kv_dtype,
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_bytes().decode())
    except OSError as error:
        fix = "Name the directory that holds config.json."
        raise MissingFileError(f"cannot be read: {error.strerror}", file=file, fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"not JSON: {error}", file=file, fix="Download the file again.") from error
    if not isinstance(raw, dict):
        raise ModelError("not a model's config", file=file, wanted="an object", got=type(raw).__name__)
    return raw


def _dtype(asked: str, raw: dict[str, Any]) -> str:
    """Resolve "auto" as a run does; a config that names none is taken for bfloat16, as nearly all are stored."""
    named = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16") if asked == "auto" else asked
    if named not in DTYPE_NBYTES:
        raise ConfigError("not a dtype to compute in", wanted=", ".join(("auto", *DTYPE_NBYTES)), got=named)
    return named


def _aligned(nbytes: int) -> int:
    return -(-nbytes // PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT


def _coded_nbytes(part: Part, codec: CodecName, dtype: str, *, all_parts: bool) -> int | None:
    """Return what a parameter takes when it is packed; None where it stays as it is."""
    linear = len(part.shape) >= 2 and not any(word in part.name for word in ("bias", "norm", "router", ".gate."))
    if part.nbytes < _LEAST_CODED or not (linear or all_parts) or part.itemsize != DTYPE_NBYTES[dtype]:
        return None
    options = PackOptions(codec).resolved()
    coding = Coding(codec, _SAFETENSORS[dtype], part.shape, options.group_size, options.symmetric)
    return coding.packed_nbytes if coding.packed_nbytes < part.nbytes else None


def _scaled_nbytes(part: Part, scheme: Scheme, prefix: str) -> int:
    """Return what a parameter takes that is published quantised; 0 where it stays as it is."""
    assert scheme.make_up is not None
    path = part.name.split(".")
    if len(part.shape) < 2 or ROUTERS & set(path) or "bias" in part.name:
        return 0
    if scheme.ignored(prefix + part.name.removesuffix(".weight")):
        return 0
    count, shape = 1, part.shape
    if len(shape) == 3:  # experts: stored with columns first, or one matrix each, of gate and up
        experts, rows, columns = shape
        if whole := scheme.make_up(part.name, (experts, columns, rows)):
            return sum(_aligned(one.nbytes) for one in whole)
        halves = 2 if "gate_up" in path[-1] else 1
        count, shape = experts * halves, (rows // halves, columns)
    return count * sum(_aligned(one.nbytes) for one in scheme.make_up(part.name, shape))


def parameters_in(units: Sequence[Unit]) -> int:
    """Return how many numbers the parameters of units are."""
    return sum(math.prod(part.shape) for unit in units for part in unit.parts)
