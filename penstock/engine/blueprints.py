"""Which parameters a family's model has, and what its tokens leave behind, from config.json alone.

A blueprint says it in the terms in which families differ: attention, MLP, experts, norms, biases. Parameters are named
and shaped as transformers has them in memory (experts fused, gate and up in one), in no particular order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from penstock.errors import ModelError

__all__ = ["BLUEPRINTS", "DTYPE_NBYTES", "ROUTERS", "Blueprint", "Config", "Experts", "Part"]

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""transformers reads and writes the same number by several names."""

ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg"})
"""Names of modules that choose experts: small, and a wrong choice costs more than a coarse weight."""

DTYPE_NBYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Config:
    """What config.json says, as attributes, so that `getattr` with a default works as on transformers' own."""

    def __init__(self, raw: dict[str, Any], *, file: Any = None) -> None:
        self.__dict__.update(raw)
        self._file = file

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def number(self, name: str) -> int:
        """Return a positive whole number. Raises ModelError where there is none."""
        names = (name, *_EXPERTS) if name in _EXPERTS else (name,)
        value = next((found for one in names if (found := getattr(self, one, None)) is not None), None)
        if type(value) is not int or value < 1:
            raise ModelError(f"the config's {name}", file=self._file, wanted="a positive number", got=repr(value)[:40])
        return value

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        own = getattr(self, "head_dim", None)
        return own if own else self.number("hidden_size") // self.number("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Heads that have keys and values."""
        own = getattr(self, "num_key_value_heads", None)
        return own if own else self.number("num_attention_heads")


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter or persistent buffer."""

    name: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: names of the config's numbers, and what comes with them.

    `every` names what says which layers are dense: "" none, "first_k_dense_replace", or "decoder_sparse_step".
    `shared` names the width of shared experts, which is multiplied with `times` where that is named. `loose` is how
    many copies of a chosen token's input, and of its intermediate row, are in memory at once.
    """

    count: str
    width: str = "moe_intermediate_size"
    router: str = "gate"
    every: str = ""
    shared: str = ""
    times: str = ""
    shared_gate: bool = False
    corrected: bool = False
    biased: bool = False
    loose: tuple[int, int] = (4, 5)

    def in_layer(self, config: Config, index: int) -> bool:
        """Say whether a layer has experts."""
        if self.every == "first_k_dense_replace":
            kinds = getattr(config, "mlp_layer_types", None)
            return kinds[index] == "sparse" if kinds else index >= getattr(config, self.every, 0)
        if self.every == "decoder_sparse_step":
            dense = getattr(config, "mlp_only_layers", None) or ()
            return index not in dense and (index + 1) % getattr(config, self.every, 1) == 0
        return True


Bias = tuple[str, str, bool]
"""Letters of what is biased (q, k, v, o; m for the MLP), the config's name for it or "", and its default."""

ALL = ("qkvo", "attention_bias", False)
MLP = ("m", "mlp_bias", False)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """How a family's decoder layers are made.

    `norms` counts norms as wide as the model. `query_norm` is "head" for norms of queries and keys as wide as a head,
    "all" for wider ones. `mlp` is "gated", "fused" (gate and up in one), or "plain". `window` says which layers attend
    to a window where a config has no `layer_types`: "qwen" by max_window_layers, a number n all but each nth. `names`
    holds what a family calls numbers otherwise, and under "positions" how many rows its table of positions has more.
    """

    biases: tuple[Bias, ...] = ()
    norms: int = 2
    norm_bias: bool = False
    query_norm: str = ""
    mlp: str = "gated"
    fused_qkv: bool = False
    latent: bool = False
    sinks: bool = False
    tied: bool = False
    experts: Experts | None = None
    window: str = ""
    names: dict[str, str] = field(default_factory=dict)

    def layer(self, config: Config, index: int, itemsize: int) -> tuple[Part, ...]:
        """Return a layer's parameters."""
        made = [Part(f"norm{number}.weight", (config.number("hidden_size"),), itemsize) for number in range(self.norms)]
        if self.norm_bias:
            made += [Part(f"{part.name[:-7]}.bias", part.shape, itemsize) for part in made]
        made += self._latent(config, itemsize) if self.latent else self._attention(config, itemsize)
        if self.experts and self.experts.in_layer(config, index):
            made += self._experts(self.experts, config, itemsize)
        else:
            made += self._mlp(config, "mlp", config.number(self._name("intermediate_size")), itemsize)
        return tuple(made)

    def resident(self, config: Config, itemsize: int) -> tuple[Part, ...]:
        """Return what is not in a layer."""
        hidden, vocab = config.number("hidden_size"), config.number("vocab_size")
        inner = getattr(config, "word_embed_proj_dim", None) or hidden
        made = [Part("embed_tokens.weight", (vocab, inner), itemsize), Part("norm.weight", (hidden,), itemsize)]
        if self.norm_bias:
            made.append(Part("norm.bias", (hidden,), itemsize))
        if "positions" in self.names:
            rows = config.number("max_position_embeddings") + int(self.names["positions"])
            made.append(Part("embed_positions.weight", (rows, hidden), itemsize))
        if inner != hidden:
            made += [Part("project_in", (hidden, inner), itemsize), Part("project_out", (inner, hidden), itemsize)]
        tied = getattr(config, "tie_word_embeddings", None)
        if not (self.tied if tied is None else tied):
            made.append(Part("lm_head.weight", (vocab, inner), itemsize))
        return tuple(made)

    def kept(self, config: Config) -> tuple[int, int]:
        """Return how many rows of keys and values a layer keeps of a token, and how many elements each has."""
        if self.latent:
            return 1, config.number("kv_lora_rank") + config.number("qk_rope_head_dim")
        return 2 * config.kv_heads, config.head_size

    def at_work(self, config: Config) -> int:
        """Return how many elements a token of the running micro-batch has in memory at once: an upper estimate.

        They are its residual, its rows in whichever of attention, MLP and experts holds most of them, and copies.
        """
        hidden = config.number("hidden_size")
        wide = config.number(self._name("intermediate_size")) * (2 if self.mlp == "plain" else 3)
        heads = config.number("num_attention_heads")
        if self.latent:
            each = config.number("qk_nope_head_dim") + config.number("qk_rope_head_dim")
            attention = 3 * heads * (each + config.number("kv_lora_rank")) + 4 * self.kept(config)[1]
        else:
            attention = 5 * (heads + config.kv_heads) * config.head_size
        most = max(wide, attention)
        if self.experts:
            chosen = config.number("num_experts_per_tok")
            rows, inner = self.experts.loose
            width = config.number(self.experts.width)
            most = max(most, chosen * max(rows * hidden, 2 * hidden + inner * width))
            most += config.number(self.experts.count) * 8
        if getattr(config, "attn_logit_softcapping", None):
            most += 96 * heads
        return (5 if self.norms == 1 else 4) * hidden + most + hidden // 8 + 4 * config.head_size

    def held(self, config: Config) -> int:
        """Return how many elements a token of a waiting micro-batch has: its residual and its rotary tables."""
        hidden = config.number("hidden_size")
        if "positions" in self.names:
            return 3 * hidden + 16
        rotary = config.number("qk_rope_head_dim") if self.latent else config.head_size
        return hidden + 4 * rotary + 16

    def layer_types(self, config: Config) -> list[str] | None:
        """Return which layers attend to a window, where the config leaves that to its family."""
        number = config.number("num_hidden_layers")
        if getattr(config, "layer_types", None) or not self.window:
            return getattr(config, "layer_types", None)
        if self.window == "qwen":
            first = getattr(config, "max_window_layers", 28) if getattr(config, "use_sliding_window", False) else number
            return ["sliding_attention" if index >= first else "full_attention" for index in range(number)]
        pattern = getattr(config, "sliding_window_pattern", None) or int(self.window)
        return ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(number)]

    def _name(self, name: str) -> str:
        return self.names.get(name, name)

    def _biased(self, config: Config) -> str:
        return "".join(letters for letters, name, usual in self.biases if getattr(config, name or "-", usual))

    def _attention(self, config: Config, itemsize: int) -> list[Part]:
        hidden, size = config.number("hidden_size"), config.head_size
        query, kept = config.number("num_attention_heads") * size, config.kv_heads * size
        rows = {"qkv": query + 2 * kept} if self.fused_qkv else {"q": query, "k": kept, "v": kept}
        shapes = {letter: (wide, hidden) for letter, wide in rows.items()} | {"o": (hidden, query)}
        made = [Part(f"self_attn.{letter}_proj.weight", shape, itemsize) for letter, shape in shapes.items()]
        biased = self._biased(config)
        made += [
            Part(f"self_attn.{letter}_proj.bias", (shape[0],), itemsize)
            for letter, shape in shapes.items()
            if letter in biased
        ]
        if self.query_norm and getattr(config, "use_qk_norm", True):
            sizes = (query, kept) if self.query_norm == "all" else (size, size)
            made += [Part(f"self_attn.norm{one}", (wide,), itemsize) for one, wide in enumerate(sizes)]
        if self.sinks:
            made.append(Part("self_attn.sinks", (config.number("num_attention_heads"),), itemsize))
        return made

    def _latent(self, config: Config, itemsize: int) -> list[Part]:
        hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
        rope, rank = config.number("qk_rope_head_dim"), config.number("kv_lora_rank")
        each, value = config.number("qk_nope_head_dim") + rope, config.number("v_head_dim")
        shapes: dict[str, tuple[int, ...]] = {
            "kv_a_proj.weight": (rank + rope, hidden),
            "kv_a_layernorm.weight": (rank,),
            "kv_b_proj.weight": (heads * (each - rope + value), rank),
            "o_proj.weight": (hidden, heads * value),
        }
        if lora := getattr(config, "q_lora_rank", None):
            shapes |= {"q_a_proj.weight": (lora, hidden), "q_a_layernorm.weight": (lora,)}
            shapes["q_b_proj.weight"] = (heads * each, lora)
        else:
            shapes["q_proj.weight"] = (heads * each, hidden)
        if self._biased(config):
            biased = ("kv_a_proj.weight", "o_proj.weight", "q_a_proj.weight")
            shapes |= {f"{name[:-7]}.bias": shapes[name][:1] for name in biased if name in shapes}
        return [Part(f"self_attn.{name}", shape, itemsize) for name, shape in shapes.items()]

    def _mlp(self, config: Config, name: str, width: int, itemsize: int) -> list[Part]:
        hidden = config.number("hidden_size")
        kinds = {"gated": ("gate", "up"), "fused": ("gate_up",), "plain": ("up",)}[self.mlp]
        rows = 2 * width if self.mlp == "fused" else width
        shapes = dict.fromkeys(kinds, (rows, hidden)) | {"down": (hidden, width)}
        made = [Part(f"{name}.{kind}_proj.weight", shape, itemsize) for kind, shape in shapes.items()]
        if "m" in self._biased(config):
            made += [Part(f"{name}.{kind}_proj.bias", shape[:1], itemsize) for kind, shape in shapes.items()]
        return made

    def _experts(self, experts: Experts, config: Config, itemsize: int) -> list[Part]:
        hidden, count, width = (config.number(name) for name in ("hidden_size", experts.count, experts.width))
        made = [
            Part(f"mlp.{experts.router}.weight", (count, hidden), itemsize),
            Part("mlp.experts.gate_up_proj", (count, 2 * width, hidden), itemsize),
            Part("mlp.experts.down_proj", (count, hidden, width), itemsize),
        ]
        if experts.biased:
            made += [
                Part(f"mlp.{experts.router}.bias", (count,), itemsize),
                Part("mlp.experts.gate_up_proj_bias", (count, 2 * width), itemsize),
                Part("mlp.experts.down_proj_bias", (count, hidden), itemsize),
            ]
        if experts.corrected:
            made.append(Part(f"mlp.{experts.router}.e_score_correction_bias", (count,), 4))
        if experts.shared:
            times = getattr(config, experts.times, None) or 0 if experts.times else 1
            if wide := times * config.number(experts.shared):
                made += self._mlp(config, "mlp.shared_expert", wide, itemsize)
        if experts.shared_gate:
            made.append(Part("mlp.shared_expert_gate.weight", (1, hidden), itemsize))
        return made


_ROUTED = Experts(
    "n_routed_experts", every="first_k_dense_replace", shared="moe_intermediate_size", times="n_shared_experts",
    corrected=True, loose=(6, 5),
)  # fmt: skip
_PLAIN_ROUTED = Experts(
    "n_routed_experts", every="first_k_dense_replace", shared="moe_intermediate_size", times="n_shared_experts",
    loose=(6, 5),
)  # fmt: skip
_STEPPED = Experts("num_experts", every="decoder_sparse_step")

BLUEPRINTS: dict[str, Blueprint] = {
    "llama": Blueprint((ALL, MLP)),
    "mistral": Blueprint(),
    "qwen2": Blueprint((("qkv", "", True),), window="qwen"),
    "qwen3": Blueprint((ALL,), query_norm="head", window="qwen"),
    "qwen2_moe": Blueprint(
        (("qkv", "qkv_bias", True),), window="qwen",
        experts=Experts(
            "num_experts", every="decoder_sparse_step", shared="shared_expert_intermediate_size", shared_gate=True
        ),
    ),
    "qwen3_moe": Blueprint((ALL,), query_norm="head", experts=_STEPPED),
    "mixtral": Blueprint(experts=Experts("num_local_experts", width="intermediate_size")),
    "olmoe": Blueprint((ALL,), query_norm="all", experts=Experts("num_experts", width="intermediate_size")),
    "gemma": Blueprint((ALL,), tied=True),
    "gemma2": Blueprint((ALL,), norms=4, tied=True, window="2"),
    "gemma3_text": Blueprint((ALL,), norms=4, query_norm="head", tied=True, window="6"),
    "phi3": Blueprint(fused_qkv=True, mlp="fused"),
    "opt": Blueprint(
        (("qkvom", "enable_bias", True),), norm_bias=True, mlp="plain", tied=True,
        names={"intermediate_size": "ffn_dim", "positions": "2"},
    ),
    "deepseek_v2": Blueprint((ALL,), latent=True, experts=_PLAIN_ROUTED),
    "deepseek_v3": Blueprint((ALL,), latent=True, experts=_ROUTED),
    "gpt_oss": Blueprint(
        (("qkvo", "attention_bias", True),), sinks=True, window="2",
        experts=Experts("num_local_experts", "intermediate_size", router="router", biased=True, loose=(4, 8)),
    ),
    "olmo2": Blueprint((ALL,), query_norm="all"),
    "granite": Blueprint((ALL, MLP)),
    "starcoder2": Blueprint((("qkvom", "use_bias", True),), norm_bias=True, mlp="plain", tied=True),
    "glm4_moe": Blueprint((("qkv", "attention_bias", False),), query_norm="head", experts=_ROUTED),
    "cohere2": Blueprint((ALL,), norms=1, tied=True, window="4"),
    "smollm3": Blueprint((ALL, MLP), tied=True),
    "seed_oss": Blueprint((("qkv", "attention_bias", True), ("o", "attention_out_bias", False))),
}  # fmt: skip
"""By transformers' `model_type`. A family that is not here is built by transformers instead."""
