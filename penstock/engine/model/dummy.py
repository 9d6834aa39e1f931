"""A checkpoint of made-up weights for any config: real bytes on a real disk, a few layers' worth of them.

The tensors have the names and shapes that the family's checkpoints have, and go through the same mapping, reads and
conversions. Only a few layers of each kind are distinct; the other layers' tensors are entries that point to the same
bytes. So every pass moves all the bytes of the model, while disk and host RAM hold a fraction of them.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from penstock.engine.blueprints import ROUTERS
from penstock.engine.model.build import load_config, outline
from penstock.engine.model.conversion import parameter_dtypes, stored_tensors
from penstock.engine.model.weights import read_json
from penstock.engine.quantised.recognise import read_scheme
from penstock.engine.quantised.scheme import Scheme
from penstock.errors import ConfigError, ModelError
from penstock.io.checkpoint import Checkpoint
from penstock.io.dummy import dummy_file
from penstock.io.dummy_tensor import DummyTensor
from penstock.io.files import TensorEntry
from penstock.io.interrupts import held_back
from penstock.offload.buffers import dtype_name

__all__ = ["dummy_checkpoint"]

_Unit = tuple[DummyTensor, ...]


@contextmanager
def dummy_checkpoint(
    model: str | os.PathLike[str],
    *,
    scratch: str | os.PathLike[str],
    distinct: int = 2,
    num_layers: int | None = None,
    dtype: str = "auto",
    on_write: Callable[[int, int], None] | None = None,
) -> Iterator[Checkpoint]:
    """Make up weights for the config in the directory `model`; yield them as a checkpoint, and remove them in any case.

    `distinct` layers of each kind have bytes of their own. They lie in a file without a name in the directory
    `scratch`. With `num_layers` the model has so many layers instead of the config's; the checkpoint's `directory`
    holds the config that is to be used. Raises ConfigError, ModelError for a config that cannot be used, TargetError
    and NoSpaceError for a directory that cannot take the file.
    """
    for what, value in (("distinct layers", distinct), ("layers", num_layers)):
        if value is not None and value < 1:
            raise ConfigError(f"the number of {what} is out of range", wanted="at least 1", got=value)
    if num_layers is not None:
        with held_back():
            temporary = TemporaryDirectory(prefix="penstock-")
        with temporary as folder:
            _change_depth(Path(model), Path(folder), num_layers)
            with dummy_checkpoint(folder, scratch=scratch, distinct=distinct, dtype=dtype, on_write=on_write) as made:
                yield made
        return
    resident, layers = _units(Path(model), dtype)
    donors = _donors(layers, distinct)
    written = [tensor for unit in (resident, *(layers[index] for index in sorted(set(donors)))) for tensor in unit]
    with dummy_file(Path(scratch), written, on_write=on_write) as header:
        tensors = {tensor.name: header.tensors[tensor.name] for tensor in resident}
        for layer, donor in zip(layers, donors, strict=True):
            for own, other in zip(layer, layers[donor], strict=True):
                tensors[own.name] = _alias(own.name, header.tensors[other.name])
        nbytes = sum(entry.nbytes for entry in tensors.values())
        yield Checkpoint(Path(model), tensors, (header.file,), nbytes, shares_bytes=len(set(donors)) < len(layers))


def _change_depth(model: Path, folder: Path, num_layers: int) -> None:
    """Write the config of `model` with another number of layers into `folder`; lists that go by layer start anew."""
    config = read_json(model / "config.json")
    depth = config.get("num_hidden_layers")
    if not isinstance(depth, int):
        raise ModelError(
            "the number of layers cannot be changed", file=model / "config.json", wanted="num_hidden_layers"
        )
    config |= {
        name: list(islice(cycle(value), num_layers))
        for name, value in config.items()
        if isinstance(value, list) and len(value) == depth
    }
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))


def _units(model: Path, dtype: str) -> tuple[_Unit, list[_Unit]]:
    """Return the tensors of the resident unit and of each layer, as the family's checkpoints store them."""
    made = outline(load_config(model), model, dtype=dtype)
    scheme = read_scheme(read_json(model / "config.json"), model / "config.json")
    if scheme is not None and scheme.make_up is None:
        raise ConfigError(
            f"weights in the format {scheme.method} cannot be made up",
            got=str(model),
            fix="Measure with the real checkpoint, or take quantization_config out of a copy of its config.",
        )
    dtypes = parameter_dtypes(made.module, made.dtype)
    units: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in made.module.state_dict().items():
        if made.needed(name) and name not in made.module.all_tied_weights_keys:
            inner = name.removeprefix(f"{made.layers_name}.")
            index = int(inner.split(".")[0]) if inner != name else -1
            units[index][name] = tensor.to("meta", dtypes[name])
    stored = {index: _unit(made.module, unit, scheme if index >= 0 else None) for index, unit in units.items()}
    return stored.get(-1, ()), [stored[index] for index in range(len(made.layers))]


def _unit(module: Any, parameters: dict[str, Tensor], scheme: Scheme | None) -> _Unit:
    tensors: list[DummyTensor] = []
    for name, tensor in stored_tensors(module, parameters).items():
        shape = tuple(tensor.shape)
        coded = scheme.make_up(name, shape) if scheme and scheme.make_up and _is_coarse(name, scheme) else ()
        tensors.extend(coded or (DummyTensor(name, dtype_name(tensor.dtype), shape),))
    return tuple(tensors)


def _is_coarse(name: str, scheme: Scheme) -> bool:
    """Tell whether a matrix of a layer is of those that are published quantised: all but routers and what is listed."""
    return not ROUTERS & set(name.split(".")) and not scheme.ignored(name.removesuffix(".weight"))


def _donors(layers: list[_Unit], distinct: int) -> list[int]:
    """Return, for each layer, the layer whose bytes it has: layers of a kind take turns with the first of it."""
    kinds: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = defaultdict(list)
    donors = []
    for index, layer in enumerate(layers):
        alike = kinds[tuple((tensor.dtype, tensor.shape) for tensor in layer)]
        alike.append(index)
        donors.append(alike[(len(alike) - 1) % distinct])
    return donors


def _alias(name: str, entry: TensorEntry) -> TensorEntry:
    return TensorEntry(name, entry.file, entry.offset, entry.nbytes, entry.dtype, entry.shape)
