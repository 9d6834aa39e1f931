"""A checkpoint directory as a model whose layers' weights come and go.

transformers' own module is built with parameters on the meta device, where they have shapes and no memory; binding a
buffer makes them views of it. Everything else of the module, its forward and its computed buffers, is used as it is.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from penstock.engine.batch import MicroBatch
from penstock.engine.model.adapters import Adaptation, adapt, refuse
from penstock.engine.model.attention import ATTENTION
from penstock.engine.model.fp8 import bind_fp8, can_stay_packed, multiply_in_fp8
from penstock.engine.model.mapping import WeightMap, map_weights
from penstock.engine.model.packed import bind_packed, let_read_packed, unbind_packed
from penstock.engine.model.tail import gate_bodies, score_rows, watch_tail
from penstock.engine.model.weights import check_orientation, open_weights, read_json, resolve_dtype
from penstock.engine.quantised.recognise import read_scheme
from penstock.errors import (
    ModelError,
    RemoteCodeError,
    UnknownArchitectureError,
    UnsupportedModelError,
)
from penstock.io.checkpoint import Checkpoint
from penstock.offload.buffers import view_of
from penstock.offload.layout import Layout
from penstock.offload.manifest import Check, Stored

__all__ = [
    "Outline",
    "StreamedModel",
    "factory_for",
    "load_config",
    "load_model",
    "outline",
]

_LARGE_ELEMENTS = 1 << 20

logger = logging.getLogger("penstock.engine")


@dataclass(frozen=True, slots=True)
class StreamedModel:
    """A causal language model whose parameters have no memory of their own.

    `layers` are the decoder layers in order; `layer_layouts` says what each one's buffer holds, `resident` what that of
    all the rest holds. `splits_prompts` is false where a prompt must go through in one span. `adapters` names the code
    of this package that runs in place of transformers' own. `checks` are the checksums of a packed checkpoint. With
    `reads_packed`, layers bound to their wire bytes, too, can read those in micro-batches that say so. With `in_fp8`,
    packed weights are multiplied with in FP8, in `scratch_nbytes` of the device that are the model's own.
    """

    module: Any
    config: Any
    layers: tuple[nn.Module, ...]
    resident: Layout
    layer_layouts: tuple[Layout, ...]
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    context_length: int | None
    splits_prompts: bool
    adapters: tuple[str, ...]
    checks: tuple[Check, ...]
    reads_packed: bool
    in_fp8: bool
    scratch_nbytes: int
    _aliases: Mapping[str, tuple[str, ...]]
    _inputs: Mapping[str, Any]
    _accepts: frozenset[str]

    @property
    def product_dtype(self) -> str:
        """The dtype that most matrix products are computed in: torch's name."""
        in_fp8 = self.in_fp8 and self.device.type == "cuda"
        return "float8_e4m3fn" if in_fp8 else str(self.dtype).removeprefix("torch.")

    def bind_resident(self, buffer: Tensor) -> None:
        """Make everything but the layers, tied parameters included, views of a flat uint8 buffer on `device`."""
        self._bind(self.resident, buffer)

    def bind_layer(self, index: int, buffer: Tensor, packed: Tensor | None = None) -> None:
        """Make the parameters and persistent buffers of one layer views of a flat uint8 buffer on `device`.

        Of a layer whose wire bytes rest there, too, as `packed`, those that are neither decoded nor converted are views
        of these, if it can read packed weights.
        """
        layout = self.layer_layouts[index]
        rest = packed if self.reads_packed else None
        self._bind(layout, buffer, rest)
        if rest is not None:
            bind_packed(self.module, layout, rest)

    def unbind(self) -> None:
        """Let go of every buffer: parameters go back to the meta device."""
        unbind_packed(self.module)
        for layout in (self.resident, *self.layer_layouts):
            self._bind(layout, torch.empty(layout.nbytes, dtype=torch.uint8, device="meta"))

    def check_bound(self) -> None:
        """Assert that every parameter that the forward needs has memory."""
        names = [view.name for layout in (self.resident, *self.layer_layouts) for view in layout.parameters]
        names += [alias for aliases in self._aliases.values() for alias in aliases]
        packed = (one.name for layout in self.layer_layouts for one in layout.packed)
        names += [f"{name.rpartition('.')[0]}.codes" for name in packed]
        unbound = [name for name in names if _look_up(self.module, name).is_meta]
        assert not unbound, f"not bound: {unbound[:5]}"

    def forward(self, batch: MicroBatch, token_ids: Tensor, keep: Tensor) -> Tensor:
        """Run the model on flattened tokens: token_ids [T] int64 -> logits [K, vocab] of the tokens at `keep` [K].

        Runs inside an executor's pass. Tensors are on `device`.
        """
        inputs = self._inputs_of(batch, token_ids)
        if "logits_to_keep" in self._accepts:
            logits: Tensor = self.module(**inputs, logits_to_keep=keep).logits[0]
            return logits
        logits = self.module(**inputs).logits[0]
        return logits[keep]

    def score(
        self, batch: MicroBatch, token_ids: Tensor, keep: Tensor, rows: Tensor, targets: Tensor, *, rows_at_once: int
    ) -> tuple[Tensor, Tensor]:
        """Run the model like `forward`; return also float32 [R, 2] for the tokens `targets` [R] after those at `rows`.

        That is each one's log-probability and its rank from 1. At most `rows_at_once` rows have logits at a time.
        """
        inputs = self._inputs_of(batch, token_ids)
        with watch_tail(keep) as tail:
            logits: Tensor = self.module(**inputs).logits[0]
            scores = score_rows(tail, lambda: self.module(**inputs).logits[0], rows, targets, rows_at_once=rows_at_once)
        return logits, scores

    def _inputs_of(self, batch: MicroBatch, token_ids: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": token_ids[None], "use_cache": False, **self._inputs}
        if "position_ids" in self._accepts:
            inputs["position_ids"] = batch.places.positions.to(self.device, non_blocking=True)[None]
        return inputs

    def _bind(self, layout: Layout, buffer: Tensor, rest: Tensor | None = None) -> None:
        for view in layout.parameters:
            place, whole = view, buffer
            if rest is not None and view.offset >= layout.wire_offset:
                place, whole = replace(view, offset=view.offset - layout.wire_offset), rest
            value: Tensor = nn.Parameter(view_of(whole, place), requires_grad=False)
            for name in (view.name, *self._aliases.get(view.name, ())):
                path, _, leaf = name.rpartition(".")
                owner = self.module.get_submodule(path)
                if leaf in owner._parameters:
                    owner._parameters[leaf] = value
                else:
                    owner._buffers[leaf] = value.data
        bind_fp8(self.module, layout, buffer)


@dataclass(frozen=True, slots=True)
class Outline:
    """transformers' module of a config, parameters on the meta device, and its decoder layers.

    `layers_name` is the layers' name in the module; `needed` tells which parameters text needs.
    """

    module: Any
    layers_name: str
    layers: nn.ModuleList
    dtype: torch.dtype
    needed: Callable[[str], bool]


def outline(config: Any, directory: Path, *, dtype: str | torch.dtype) -> Outline:
    """Build the module that a config describes, in `dtype`, or with "auto" in the config's.

    Raises ModelError where transformers cannot build it, or it has no layers.
    """
    compute_dtype = dtype if isinstance(dtype, torch.dtype) else resolve_dtype(dtype, config, {})
    module = _build(config, compute_dtype, directory)
    decoder = _decoder_name(module)
    name, layers = _find_layers(module, decoder)
    return Outline(module, name, layers, compute_dtype, _needed(module, decoder))


def load_model(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    code: Callable[[Stored, Any, str, nn.ModuleList], Stored] | None = None,
    in_fp8: bool = False,
) -> StreamedModel:
    """Build the model of a checkpoint directory and map its weights; read headers only, no weights, no network.

    `dtype` is "auto" (the checkpoint's), or the one to compute in. A `checkpoint` that is given stands for the
    directory's own weights. `code`, called with its tensors, the module, and the name and list of its layers, may let
    coded tensors stand for plain ones. With `in_fp8`, packed weights of linear layers are multiplied with in FP8.
    Raises ModelError where the model cannot be run so, ConfigError where there is nothing to multiply, and
    CheckpointError where the checkpoint does not make the model.
    """
    directory, device = Path(path), torch.device(device)
    config = load_config(directory)
    stored, compute_dtype = open_weights(checkpoint or Checkpoint.open(directory), config, directory, dtype=dtype)
    made = outline(config, directory, dtype=compute_dtype)
    module, layers = made.module, made.layers
    check_orientation(module, stored, directory)
    if code is not None:
        stored = code(stored, module, made.layers_name, layers)
    adaptation = adapt(module, layers)
    gate_bodies(module, made.layers_name)
    _place_buffers(module, device)
    weights = map_weights(
        module,
        stored.tensors,
        directory=directory,
        layers=made.layers_name,
        num_layers=len(layers),
        dtype=made.dtype,
        needed=made.needed,
        stays=partial(can_stay_packed, module) if in_fp8 else None,
    )
    scratch = multiply_in_fp8(module, weights.layers, device) if in_fp8 else None
    _report(directory, adaptation, weights)
    text = module.config.get_text_config()
    return StreamedModel(
        module=module,
        config=module.config,
        layers=tuple(layers),
        resident=weights.resident,
        layer_layouts=weights.layers,
        dtype=made.dtype,
        device=device,
        vocab_size=module.get_output_embeddings().weight.shape[0],
        context_length=getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None),
        splits_prompts=adaptation.splits_prompts,
        adapters=adaptation.names,
        checks=tuple(stored.checks.values()),
        reads_packed=not in_fp8 and let_read_packed(module, weights.layers, weights.aliases),
        in_fp8=in_fp8,
        scratch_nbytes=scratch.nbytes if scratch else 0,
        _aliases=weights.aliases,
        _inputs={name: value.to(device) for name, value in adaptation.inputs.items()},
        _accepts=frozenset(inspect.signature(type(module).forward).parameters),
    )


def load_config(directory: Path) -> Any:
    """Read config.json with transformers' own classes, after the checks that make this safe and local."""
    file = directory / "config.json"
    raw = read_json(file)
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise UnknownArchitectureError("not a model's config", file=file, wanted="a model_type", got=repr(kind))
    if kind not in CONFIG_MAPPING_NAMES:
        if "auto_map" in raw:
            raise RemoteCodeError(
                f"the model type {kind!r} is defined by Python code in the checkpoint, which Penstock never runs",
                file=file,
                fix="Use a checkpoint whose architecture is part of transformers.",
            )
        raise UnknownArchitectureError(
            f"the installed transformers does not know the model type {kind!r}", file=file, fix="Upgrade transformers."
        )
    read_scheme(raw, file)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"transformers refuses this config: {error}", file=file) from error
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UnknownArchitectureError(f"{kind!r} is not a causal language model in transformers", file=file)
    refuse(config)
    return _unquantised(config)


def _unquantised(config: Any) -> Any:
    """Take out what would make transformers build quantised modules: the model is the one that was quantised."""
    for one in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in ("quantization_config", "compression_config"):
            if hasattr(one, name):
                delattr(one, name)
    return config


def _build(config: Any, dtype: torch.dtype, directory: Path) -> Any:
    """Build the module, then select the attention function: some families choose classes by its name while building."""
    try:
        with _parameters_on_meta():
            module = factory_for(config).from_config(
                config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
            )
    except (ValueError, TypeError, ImportError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot build this {config.model_type} model: {error}", file=directory / "config.json"
        ) from error
    module.eval().requires_grad_(False)
    for part in module.modules():
        own = getattr(part, "config", None)
        if own is not None and hasattr(own, "get_text_config"):
            own.get_text_config()._attn_implementation = ATTENTION
    return module


def factory_for(config: Any) -> Any:
    """Return transformers' class that makes and loads models of this config."""
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


class _EmptyOnMeta(TorchFunctionMode):
    """Give large uninitialised tensors no memory: a fused expert parameter can exceed the host's RAM."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            made = func(*args, **{**kwargs, "device": "meta"})
            if made.numel() >= _LARGE_ELEMENTS:
                return made
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as it is registered; buffers stay, because many hold computed values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _decoder_name(module: Any) -> str:
    """Return the name of the text decoder inside a multimodal model; empty where the whole model is one."""
    if module.config.get_text_config() is module.config:
        return ""
    decoder = module.get_decoder()
    name: str = next(name for name, part in module.named_modules() if part is decoder)
    return name


def _needed(module: Any, decoder: str) -> Callable[[str], bool]:
    """Return which parameters text needs: all, or the text decoder's and the head's."""
    if not decoder:
        return lambda _: True
    head = next(name for name, part in module.named_modules() if part is module.get_output_embeddings())
    return lambda name: name.startswith((f"{decoder}.", f"{head}."))


def _find_layers(module: Any, decoder: str) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers: the module list of the class that transformers never splits across devices."""
    whole = set(module._no_split_modules or ())
    count = getattr(module.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (any(type(layer).__name__ in whole for layer in part), len(part) == count, len(part), name, part)
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) and name.startswith(decoder)
    ]
    best = max(found, key=lambda candidate: candidate[:3], default=None)
    if best is None or not (best[0] or best[1]):
        raise UnsupportedModelError(f"no list of decoder layers in {type(module).__name__}")
    return best[3], best[4]


def _place_buffers(module: nn.Module, device: torch.device) -> None:
    """Move computed buffers, and tensors that modules keep as plain attributes, to the device."""
    if device.type == "cpu":
        return
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to(device)
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not value.is_meta:
                vars(part)[name] = value.to(device)


def _look_up(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), leaf)
    return found


def _report(directory: Path, adaptation: Adaptation, weights: WeightMap) -> None:
    """Log each choice that was made without being asked."""
    if adaptation.names:
        logger.info("%s: own code for %s", directory, ", ".join(adaptation.names))
    reasons = Counter(one.reason for layout in (weights.resident, *weights.layers) for one in layout.conversions)
    for reason, count in reasons.most_common(5):
        logger.info("%s: %d parameters are converted on arrival: %s", directory, count, reason)
