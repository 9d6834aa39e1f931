"""Everything that is special to a family, in one place. Most families need nothing of it.

Code decides where it can: whether a module's forward asks transformers' attention interface is seen in the names it
uses, and whether a mixer is recurrent in the cache that transformers gives it. Class names and model types decide the
rest.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.batch import CURRENT
from penstock.engine.model.attention import attend_rows, attend_spans, rule_of
from penstock.engine.model.recurrent import cache_argument, wrap_recurrent
from penstock.errors import UnsupportedModelError
from penstock.kernels.attention import Rule

__all__ = ["UNTRACEABLE", "Adaptation", "adapt", "refuse"]

_REFUSED = {
    "blt": "it reads bytes through a second model",
    "deepseek_v4": "its compressed attention keeps more than keys and values",
    "doge": "its attention computes masks of its own",
    "hrm_text": "it runs its layers several times for each token",
    "inkling2_text": "its convolutions keep states that no cache of one sequence describes",
    "inkling_text": "its convolutions keep states that no cache of one sequence describes",
    "minimax_m3_vl_text": "its sparse attention selects keys with an index of its own",
    "recurrent_gemma": "its recurrent blocks keep their state inside the module",
    "rwkv": "its state is not kept by transformers' cache",
    "xlstm": "its state is not kept by transformers' cache",
}


_TRACEABLE = {"", "latent", "positions"}
"""Kinds of adapters that compilers never see, because they act inside the attention function."""
UNTRACEABLE = "penstock_untraceable"
"""The attribute of all other adapted modules that names their adapter."""


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What was adapted: names for the log, whether prompts may be split, and inputs that the model wants besides."""

    names: tuple[str, ...] = ()
    splits_prompts: bool = True
    inputs: dict[str, Any] = field(default_factory=dict)


def refuse(config: Any) -> None:
    """Raise UnsupportedModelError for a config of which it is known that it cannot be run layer by layer."""
    text = config.get_text_config()
    reason = _REFUSED.get(text.model_type) or _REFUSED.get(config.model_type)
    if getattr(text, "index_topk", None):
        reason = "its sparse attention selects keys with an index of its own"
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder model"
    if reason:
        raise UnsupportedModelError(f"{config.model_type} models are not supported: {reason}")


def adapt(model: Any, layers: Iterable[nn.Module]) -> Adaptation:
    """Put this package's code where transformers' own cannot run flattened micro-batches.

    Raises UnsupportedModelError, naming the class, where a layer has no attention or mixer that can be run so.
    """
    layers = list(layers)
    names: dict[nn.Module, str | None] = {}
    for layer in layers:
        for module in reversed(list(layer.modules())):  # what a module contains comes before it
            if module not in names and (kind := _adapt_module(module, layer, model, names)) is not None:
                names[module] = f"{kind}:{type(module).__name__}" if kind else None
                if kind not in _TRACEABLE:
                    setattr(module, UNTRACEABLE, names[module])
        if _has_attention(layer) and not any(module in names for module in layer.modules()):
            raise UnsupportedModelError(
                f"{type(layer).__name__} does not use transformers' attention interface, and there is no adapter for it"
            )
    _share_keys(layers)
    rotary = _adapt_rotary(model)
    used = {name for name in names.values() if name} | set(rotary)
    whole = bool(rotary) or any(name.startswith("recurrent:") for name in used)
    return Adaptation(tuple(sorted(used)), not whole, _INPUTS.get(model.config.model_type, {}))


_INPUTS = {"mpt": {"attention_mask": torch.zeros(1, 1, 1, 1)}}
"""It calls a method of its mask; one with four dims passes through untouched, and its adapter ignores it."""


def _adapt_module(module: Any, layer: nn.Module, model: Any, done: dict[nn.Module, str | None]) -> str | None:
    """Adapt one module: return the kind of adapter, "" where none is needed, None where it is no mixer."""
    if getattr(module, "indexer", None) is not None:
        raise UnsupportedModelError(f"{type(module).__name__} selects keys with an index of its own")
    if not hasattr(module, "layer_idx") and hasattr(module, "layer_id"):
        module.layer_idx = module.layer_id
    inline = _INLINE.get(type(module).__name__)
    if inline is not None:
        inline(module)
        return "inline"
    if _uses_interface(module):
        return _adapt_attention(module, model)
    mixes = module is not layer and getattr(module, "layer_idx", None) is not None and cache_argument(module.forward)
    if mixes and not any(part in done for part in module.modules()):
        return "recurrent" if wrap_recurrent(module, model, len(done)) else None
    return None


def _uses_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _has_attention(layer: nn.Module) -> bool:
    """Whether some part of a layer looks at other tokens, as far as its arguments tell."""
    wanted = {"attention_mask", "past_key_values", "cache_params", "layer_past", "state"}
    parts = (part for part in layer.modules() if part is not layer)
    return any(wanted & set(inspect.signature(part.forward).parameters) for part in parts)


def _adapt_attention(module: Any, model: Any) -> str:
    """Adapt a module that asks the attention interface, where what it asks needs more than the interface gives."""
    if getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{type(module).__name__} looks at later tokens")
    if "layer_idx" in inspect.signature(type(module).forward).parameters:
        _name_shared_layer(module)
        return "shared"
    if hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj"):
        module.expand_kv = _unexpanded
        module.penstock_attention = MethodType(_latent_attention, module)
        module.penstock_value_size = module.v_head_dim
        return "latent"
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        module.attn_temperature_tuning = False
        module.penstock_attention = MethodType(_tempered_attention, module)
        return "positions"
    if type(module).__name__ == "DiffLlamaAttention":
        module.second_layer_idx = module.layer_idx + model.config.num_hidden_layers
        module.penstock_attention = MethodType(_twofold_attention, module)
        return "twofold"
    return ""


def _name_shared_layer(module: Any) -> None:
    """One attention module serves several layers and is told which: its keys go under that layer's number."""
    forward = module.forward

    def named(hidden_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        module.layer_idx = layer_idx
        return forward(hidden_states, layer_idx, *args, **kwargs)

    module.forward = named


def _share_keys(layers: list[nn.Module]) -> None:
    """Tell attention that reuses an earlier layer's keys which layer that is: the last one of its kind with its own."""
    owners: dict[Any, int] = {}
    modules: list[Any] = [part for layer in layers for part in layer.modules() if hasattr(part, "is_kv_shared_layer")]
    for module in modules:
        kind = getattr(module, "layer_type", None) or module.config.layer_types[module.layer_idx]
        if not module.is_kv_shared_layer:
            owners[kind] = module.layer_idx
        elif getattr(module, "kv_shared_layer_index", None) is None:
            module.kv_shared_layer_index = owners[kind]


# Attention through the interface that asks for more than it says.


def _unexpanded(latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    return latent, rope


def _latent_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """Multi-head latent attention on what is stored: latents and one rotary key, not keys and values of every head.

    query [1, H, T, nope + rope], key (latents) [1, 1, T, rank], value (rotary keys) [1, 1, T, rope] -> [1, T, H, Dv].
    The expansion of latents into keys is absorbed into the query, that into values into the result.
    """
    batch, rule = CURRENT.get(), rule_of(module, query, **arguments)
    nope, rank = module.qk_nope_head_dim, key.shape[-1]
    expand = module.kv_b_proj.weight.view(query.shape[1], -1, rank)
    to_keys, to_values = expand[:, :nope], expand[:, nope:]
    absorbed = torch.cat([query[0, ..., :nope] @ to_keys, query[0, ..., nope:]], -1)
    rows = torch.cat([key[0, 0], value[0, 0]], -1).unsqueeze(1)
    kept = batch.kv.append(module.layer_idx, batch.places, rows)
    made = attend_rows(absorbed, kept.sharing_values(rank), rule)
    values: Tensor = torch.einsum("thr,hvr->thv", made, to_values)
    return values[None]


def _tempered_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """Scale queries by their positions; transformers takes the tokens' place in the batch for their position."""
    positions = CURRENT.get().places.positions.to(query.device, non_blocking=True)
    scales = torch.log1p(torch.floor((positions.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
    query = (query * scales.view(1, 1, -1, 1)).to(query.dtype)
    return attend_spans(module, query, key, value, rule_of(module, query, **arguments))


_SEEN_KEY: ContextVar[Tensor | None] = ContextVar("penstock_seen_key", default=None)
"""The keys of a layer's first attention, until its second: each forward's own, since others may run in between."""


def _twofold_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """Two attentions per layer, with the same keys and other values: the second has a number of its own."""
    second = _SEEN_KEY.get() is key
    _SEEN_KEY.set(None if second else key)
    layer = module.second_layer_idx if second else None
    return attend_spans(module, query, key, value, rule_of(module, query, **arguments), layer=layer)


# Attention that does not ask the interface.


def _replace_attn(options: Callable[[Any], dict[str, Any]]) -> Callable[[Any], None]:
    """Replace a `_attn(query, key, value, mask)` on [1, H, T, D]."""

    def attn(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        made = attend_spans(module, query, key, value, Rule(**options(module)))
        return made.transpose(1, 2), None

    def install(module: Any) -> None:
        module._attn = MethodType(attn, module)

    return install


def _replace_forward(
    forward: Callable[..., Any], slopes: Callable[[Any], Tensor] | None = None
) -> Callable[[Any], None]:
    """Replace a whole forward; ALiBi's `slopes` are made once, and move to the device with the module's buffers."""

    def install(module: Any) -> None:
        module.forward = MethodType(forward, module)
        if slopes is not None:
            module.penstock_slopes = slopes(module)

    return install


def _slopes(num_heads: int) -> Tensor:
    """ALiBi's slopes [H, 1, 1] (https://huggingface.co/papers/2108.12409), as transformers computes them for Bloom."""
    power = 2 ** math.floor(math.log2(num_heads))
    base = 2 ** (-(2 ** -(math.log2(power) - 3)))
    slopes = [base**index for index in range(1, power + 1)]
    if power != num_heads:
        base = 2 ** (-(2 ** -(math.log2(2 * power) - 3)))
        slopes += [base**index for index in range(1, 1 + 2 * min(power, num_heads - power), 2)]
    return torch.tensor(slopes).view(-1, 1, 1)


def _mpt_slopes(num_heads: int) -> Tensor:
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = 1.0 / 2 ** (torch.arange(1, power + 1).float() * (8 / power))
    if power != num_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    shaped: Tensor = slopes.view(-1, 1, 1)
    return shaped


def _bloom_forward(module: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    slopes: Tensor = module.penstock_slopes

    def bias(positions: Tensor) -> Tensor:
        return (slopes * positions).to(query.dtype)

    made = attend_spans(module, query, key, value, Rule(scale=module.inv_norm_factor, bias=bias))
    return module.dense(made.flatten(2)) + residual, None


def _falcon_forward(
    module: Any, hidden_states: Tensor, alibi: Tensor | None = None, *_: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    fused = module.query_key_value(hidden_states)
    if module.new_decoder_architecture:  # transformers repeats the keys here for every query head
        groups = module.num_heads // module.num_kv_heads
        split = fused.view(*fused.shape[:2], -1, groups + 2, module.head_dim)
        query, key, value = split[..., :-2, :].flatten(2, 3), split[..., -2, :], split[..., -1, :]
    else:
        query, key, value = module._split_heads(fused)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    bias = None
    if alibi is None:
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        query, key = rotate(query, key, *kwargs["position_embeddings"])
    else:
        slopes: Tensor = module.penstock_slopes

        def bias(positions: Tensor) -> Tensor:
            """Rounded to bfloat16, as in the original, whatever the model's dtype."""
            made: Tensor = (slopes * positions).float() * module.inv_norm_factor
            return made.to(query.dtype)

    made = attend_spans(module, query, key, value, Rule(scale=module.inv_norm_factor, bias=bias))
    return module.dense(made.flatten(2)), None


def _mpt_forward(
    module: Any, hidden_states: Tensor, position_bias: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (
        part.unflatten(-1, (module.n_heads, module.head_dim)).transpose(1, 2) for part in mixed.chunk(3, dim=2)
    )
    bias = None
    if position_bias is not None:
        slopes: Tensor = module.penstock_slopes

        def bias(positions: Tensor) -> Tensor:
            return slopes * positions

    made = attend_spans(module, query, key, value, Rule(scale=module.softmax_scale, bias=bias))
    return module.out_proj(made.flatten(2)), None


def _xglm_forward(module: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    query, key, value = (
        project(hidden_states).unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    made = attend_spans(module, query, key, value, Rule(scale=module.scaling))
    return module.out_proj(made.flatten(2)), None


_INLINE: dict[str, Callable[[Any], None]] = {
    "BloomAttention": _replace_forward(_bloom_forward, lambda module: _slopes(module.num_heads)),
    "CodeGenAttention": _replace_attn(lambda module: {"scale": 1.0 / float(module.scale_attn)}),
    "FalconAttention": _replace_forward(_falcon_forward, lambda module: _slopes(module.num_heads).bfloat16()),
    "GPTJAttention": _replace_attn(lambda module: {"scale": 1.0 / float(module.scale_attn)}),
    "GPTNeoSelfAttention": _replace_attn(
        lambda module: {"scale": 1.0, "window": module.config.window_size if module.attention_type == "local" else None}
    ),
    "MptAttention": _replace_forward(_mpt_forward, lambda module: _mpt_slopes(module.n_heads)),
    "XGLMAttention": _replace_forward(_xglm_forward),
}


# Rotary tables that depend on the longest sequence of a batch.


def _adapt_rotary(model: nn.Module) -> list[str]:
    """Compute such tables span by span, so that no sequence depends on its neighbours.

    A sequence gets what transformers gives it alone: the factors that belong to the last position of the span. So
    prompts must come whole; a sequence that grows past the original context keeps its earlier keys, as it does in
    transformers' forward with a cache.
    """
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
            _rotate_by_span(module)
            found.append(f"rotary:{type(module).__name__}")
    return found


def _rotate_by_span(module: Any) -> None:
    forward = module.forward
    stored = {name: value.clone() for name, value in module._buffers.items() if name.endswith("inv_freq")}
    settings = ("max_seq_len_cached", "attention_scaling")
    kept = {name: value for name, value in vars(module).items() if name.endswith(settings)}

    def reset() -> None:
        module._buffers.update({name: value.clone() for name, value in stored.items()})
        for name in [name for name in vars(module) if name.endswith(settings)]:
            delattr(module, name)
        vars(module).update(kept)

    def by_span(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        parts, begin = [], 0
        for span in CURRENT.get().spans:
            reset()
            parts.append(forward(x, position_ids[:, begin : begin + span.length], *args, **kwargs))
            begin += span.length
        return tuple(torch.cat(tables, 1) for tables in zip(*parts, strict=True))

    module.forward = by_span
