"""How many floating-point operations a model asks for, from its layouts and a few numbers of its config.

Counted are matrix products, a multiplication and an addition each: 2 for every weight of a matrix that a token meets,
2 × (query dim + value dim) per head for every pair of a token and one that it sees. Experts count with the share that a
token is sent to. Not counted: embedding look-ups, norms, activations, the softmax. So it is what the architecture
needs; code that does more, such as masked scores, is not credited for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

from penstock.engine.batch import Span

if TYPE_CHECKING:
    from penstock.engine.model.build import StreamedModel

__all__ = ["ModelFlops", "Parameter", "attention_windows", "count", "count_flops", "pairs"]

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")


class Parameter(Protocol):
    """A parameter of a model: a view of a buffer, or what a config says of one."""

    @property
    def name(self) -> str:
        """Its name in transformers' module."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory that computing with it moves."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """FLOPs of one token through all layers, of one row of the head, and of one pair of tokens that attend.

    `per_pair` holds, for each attention window (None: all tokens before), the sum over the layers that have it. Of the
    layers' weights, `expert_nbytes` are experts', of which each token chooses `expert_share`; every micro-batch reads
    the other `shared_nbytes`.
    """

    parameters: int
    per_token: int
    per_row: int
    per_pair: Mapping[int | None, int]
    shared_nbytes: int
    expert_nbytes: int
    expert_share: float

    def weights_read(self, num_tokens: int) -> float:
        """Return the bytes of weights that a micro-batch of so many tokens reads, if experts are chosen by chance."""
        return self.shared_nbytes + self.expert_nbytes * (1 - (1 - self.expert_share) ** num_tokens)

    def of(self, spans: Iterable[Span], *, rows: int) -> int:
        """Return the FLOPs of a pass over `spans`, of which `rows` tokens go through the head."""
        singles, longer = [], []
        for span in spans:
            if span.length == 1:
                singles.append(span.start + 1)
            else:
                longer.append(span)
        total = self.per_row * rows + self.per_token * (len(singles) + sum(span.length for span in longer))
        for window, flops in self.per_pair.items():
            seen = sum(singles) if window is None else sum(min(length, window) for length in singles)
            total += flops * (seen + sum(pairs(span, window) for span in longer))
        return total


def pairs(span: Span, window: int | None = None) -> int:
    """Return how many (token, token that it sees) pairs a span has; every token sees itself and at most `window`."""
    whole = min(span.end, window or span.end)
    growing = range(span.start + 1, whole + 1)  # tokens that see all before them
    seen = (growing[0] + growing[-1]) * len(growing) // 2 if growing else 0
    return seen + (span.length - len(growing)) * (window or 0)


def count_flops(model: StreamedModel) -> ModelFlops | None:
    """Return what a model asks for; None where its experts cannot be told from its config."""
    return count(
        model.config.get_text_config(),
        model.resident.parameters,
        [(*layout.parameters, *layout.packed) for layout in model.layer_layouts],
        vocab_size=model.vocab_size,
    )


def count(
    config: Any, resident: Sequence[Parameter], layers: Sequence[Sequence[Parameter]], *, vocab_size: int
) -> ModelFlops | None:
    """Return what a model of these parameters asks for; `config` has transformers' names as attributes.

    None where the experts cannot be told from it.
    """
    experts, chosen = _first(config, _EXPERTS), _first(config, _CHOSEN)
    per_token = Fraction(0)
    expert_nbytes = 0
    for layer in layers:
        for one in _matrices(layer):
            share = Fraction(1)
            if "experts." in one.name and "shared_expert" not in one.name:
                if not experts or not chosen or one.shape[0] != experts:
                    return None
                share = Fraction(chosen, experts)
                expert_nbytes += one.nbytes
            per_token += 2 * math.prod(one.shape) * share
    return ModelFlops(
        parameters=sum(math.prod(one.shape) for unit in (resident, *layers) for one in unit),
        per_token=int(per_token),
        per_row=2 * vocab_size * config.hidden_size,
        per_pair=_per_pair(config, len(layers)),
        shared_nbytes=sum(one.nbytes for layer in layers for one in layer) - expert_nbytes,
        expert_nbytes=expert_nbytes,
        expert_share=chosen / experts if expert_nbytes and experts and chosen else 0.0,
    )


def _matrices(layer: Iterable[Parameter]) -> Iterator[Parameter]:
    for one in layer:
        if len(one.shape) > 1 and not one.name.endswith("bias"):
            yield one


def _per_pair(config: Any, num_layers: int) -> dict[int | None, int]:
    flops: dict[int | None, int] = {}
    for layer, window in attention_windows(config, num_layers).items():
        own = _config_of(config, layer)
        heads = getattr(own, "num_attention_heads", None)
        if not heads:
            continue
        query = getattr(own, "head_dim", None) or own.hidden_size // heads
        if getattr(own, "qk_nope_head_dim", None):
            query = own.qk_nope_head_dim + own.qk_rope_head_dim
        value = getattr(own, "v_head_dim", None) or query
        flops[window] = flops.get(window, 0) + 2 * heads * (query + value)
    return flops


def _config_of(config: Any, layer: int) -> Any:
    """Return the config of one layer, where what differs between layers is no attribute of the whole one."""
    every = getattr(config, "per_layer_config", None)
    return every[layer] if every else config


def attention_windows(config: Any, num_layers: int) -> dict[int, int | None]:
    """Return how many tokens each layer that attends sees at most; None for all of them."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    windows: dict[int, int | None] = {}
    for layer, kind in enumerate(getattr(config, "layer_types", None) or [""] * num_layers):
        if kind in ("", "full_attention", "attention"):
            windows[layer] = window if kind == "" else None
        elif kind == "sliding_attention":
            windows[layer] = window
    return windows


def _first(config: Any, names: Iterable[str]) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None))), None)
