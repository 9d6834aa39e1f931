"""The plan: what lives where, and how much goes through the model at once. A frozen value, made before allocation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from penstock.errors import BudgetError
from penstock.offload.blocks import BLOCK_TOKENS, KVCost
from penstock.offload.tiers import MemoryTiers, Tier, format_size

__all__ = ["SCORE_NBYTES", "ModelShape", "PassLimits", "Plan", "WindowLayer", "make_plan", "window_workspace"]

SCORE_NBYTES = 16
"""What an attention score takes while it is computed: the score, its mask, and copies in float32."""

RECORDED_ROWS, RECORDED_TOKENS = 16, 512
"""Steps in which the sequences of recorded passes, and their lengths, are rounded up: those that lack are computed for
nothing, which costs little beside the weights. A part of a sequence in the kernel for blocks has so many tokens."""

SCORES = (1 << 10, 1 << 24)
"""Least and most scores that are in memory at once."""

ENOUGH_TOKENS = 512
"""A micro-batch of so many tokens computes about as well as a larger one."""

SPLIT_NBYTES = 256 << 20
"""Keys and values of one layer beside a GPU that take a processor about as long as it takes the GPU, and whoever issues
its work, to go from one attention to the next: 3 ms on an H200's machine."""

LANDING_PART = 8
"""At most this part of the host budget is room to read keys and values from NVMe: more would cost layers theirs."""

MINIMUM_TOKENS = 16
"""A budget must hold at least this many tokens: of context for one sequence, and in a micro-batch."""


@dataclass(frozen=True, slots=True)
class WindowLayer:
    """A layer that sees the last `window` tokens and keeps `token_nbytes` bytes of each."""

    layer: int
    window: int
    token_nbytes: int


MAX_CONTINUED = 2
"""Sequences of which several tokens follow older ones in one micro-batch: one that a pass has cut, one that a
micro-batch has."""


def window_workspace(windows: Iterable[WindowLayer]) -> tuple[int, int]:
    """Return bytes of workspace for layers with windows: for each token of a micro-batch, and whatever its size.

    Several new tokens of a sequence see a copy of the older ones, and themselves behind it, one layer at a time.
    """
    known = tuple(windows)
    copied = max((layer.token_nbytes for layer in known), default=0)
    older = max((layer.token_nbytes * layer.window for layer in known), default=0)
    return copied, MAX_CONTINUED * older


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model costs, in bytes; measured, not derived from its config.

    `fixed_nbytes` is needed whatever goes through the model: what choosing tokens takes, and what it has of its own.
    `layer_nbytes` is each layer's buffer on the device, `wire_nbytes` what of it rests or travels, and `kept_nbytes`
    what a layer whose parameters stay on the device needs once it has been loaded; all of it where that is empty.
    `workspace_nbytes` is what a token of the running micro-batch needs, `held_nbytes` a token of a waiting one.
    `kv_token_nbytes` and `kv_sequence_nbytes` are what a sequence keeps between passes, with keys and values as
    `kv_dtype`; of the former, the layers of `kv_windows` keep only so many tokens, and `kv_layers` are the parts of all
    layers that keep any. Layers that are `packed_on_load` are in no file, and cannot be left on NVMe. Passes of at most
    `packed_tokens` tokens read layers that rest packed on the device where they are.
    """

    resident_nbytes: int
    fixed_nbytes: int
    layer_nbytes: tuple[int, ...]
    wire_nbytes: tuple[int, ...]
    workspace_nbytes: int
    held_nbytes: int
    kv_token_nbytes: int
    kv_sequence_nbytes: int
    kv_windows: tuple[WindowLayer, ...] = ()
    kv_dtype: str = "auto"
    kept_nbytes: tuple[int, ...] = ()
    packed_on_load: bool = False
    kv_layers: tuple[int, ...] = ()
    packed_tokens: int = 0

    @property
    def kv_cost(self) -> KVCost:
        """What a sequence keeps between passes."""
        windows: dict[int, int] = {}
        for layer in self.kv_windows:
            windows[layer.window] = windows.get(layer.window, 0) + layer.token_nbytes
        sizes = tuple(sorted(windows.items()))
        return KVCost(self.kv_token_nbytes, self.kv_sequence_nbytes, BLOCK_TOKENS, sizes, self.kv_layers)

    @property
    def staying_nbytes(self) -> tuple[int, ...]:
        """Bytes of each layer, were it to stay on the device."""
        return self.kept_nbytes or self.layer_nbytes

    @property
    def packs(self) -> bool:
        """Whether layers take less memory as they travel than as they are computed with."""
        return sum(self.wire_nbytes) < sum(self.staying_nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights on the device, were they all there."""
        return self.resident_nbytes + sum(self.staying_nbytes)

    def loading_nbytes(self, layers: Iterable[int]) -> int:
        """Bytes for loading layers that stay, one after the other: whole buffers, where they are made elsewhere."""
        pairs = ((self.layer_nbytes[index], self.staying_nbytes[index]) for index in layers)
        return max((whole for whole, kept in pairs if kept < whole or self.packed_on_load), default=0)

    def workspace_of(self, micro_batch_tokens: int, pass_tokens: int) -> int:
        """Bytes of activations that passes of this size need."""
        return self.fixed_nbytes + self.workspace_nbytes * micro_batch_tokens + self.held_nbytes * pass_tokens


@dataclass(frozen=True, slots=True)
class PassLimits:
    """Upper bounds that the plan may lower to fit: slots, tokens per micro-batch and per pass, layers on the device.

    With `device_layers`, layers are kept on the device up to that number, whatever it leaves for keys and values; None
    weighs the two. Host RAM holds up to `host_layers` layers, as many as fit where that is None; keys and values get
    `kv_host_share` of what these leave, unless the tiers say how much.
    """

    num_slots: int
    micro_batch_tokens: int
    pass_tokens: int
    device_layers: int | None = None
    kv_host_share: float = 0.0
    host_layers: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every layer lives and how the device's bytes are shared out.

    `tiers` names each layer's tier. `device_nbytes` = resident unit + slots + device layers + workspace + `kv_nbytes`.
    Layers that stay on the device are there as they travel where they are `device_packed`: then they go through slots
    like all others, but for passes of at most `packed_tokens` tokens. Other passes make `expanded_nbytes` of parameters
    of what is packed.
    Host RAM holds `host_nbytes` of layers and `kv_host_nbytes` of keys and values. A disk holds `kv_nvme_nbytes` of
    them, and `kv_landing_nbytes` of host RAM is what those of a layer are read into.
    """

    tiers: tuple[Tier, ...]
    num_slots: int
    slot_nbytes: int
    micro_batch_tokens: int
    pass_tokens: int
    max_scores: int
    resident_nbytes: int
    workspace_nbytes: int
    kv_nbytes: int
    device_layer_nbytes: int
    host_nbytes: int
    nvme_nbytes: int
    kv_host_nbytes: int = 0
    kv_dtype: str = "auto"
    kv_nvme_nbytes: int = 0
    kv_landing_nbytes: int = 0
    device_packed: bool = False
    expanded_nbytes: int = 0
    packed_tokens: int = 0

    @property
    def device_nbytes(self) -> int:
        """Bytes that the device will hold at most."""
        slots = self.num_slots * self.slot_nbytes
        return self.resident_nbytes + slots + self.device_layer_nbytes + self.workspace_nbytes + self.kv_nbytes

    @property
    def runs_ahead(self) -> bool:
        """Whether two layers may be held at a time while the link has a slot to fill."""
        return self.num_slots not in {1, 2}

    def split_tokens(self, token_nbytes: int) -> int | None:
        """Return from how many tokens beside a GPU on, of so many bytes each, attention of single tokens takes turns.

        Half of them then run ahead of the others, so that the attention of one half goes on while the GPU makes the
        next queries of the other one. It costs a micro-batch more in every layer. None: never.
        """
        return -(-SPLIT_NBYTES * len(self.tiers) // max(token_nbytes, 1)) if self.runs_ahead else None

    def recording(self, num_sequences: int, longest: int) -> tuple[int, int] | None:
        """Return what a decode pass on a GPU is recorded for: so many sequences of so many tokens, both rounded up.

        None where layers move, and for more sequences: they keep a GPU busy anyway, and what is recorded takes memory
        besides the workspace, at most an eighth of it.
        """
        moves = self.num_slots and not (self.device_share == 1 and num_sequences <= self.packed_tokens)
        if moves or num_sequences > self.micro_batch_tokens // 8:
            return None
        rows = num_sequences if num_sequences <= 2 else -(-num_sequences // RECORDED_ROWS) * RECORDED_ROWS
        return rows, -(-longest // RECORDED_TOKENS) * RECORDED_TOKENS

    @property
    def device_share(self) -> float:
        """The share of layers that stay on the device."""
        return len(self.layers_in(Tier.DEVICE)) / max(len(self.tiers), 1)

    def layers_in(self, tier: Tier) -> tuple[int, ...]:
        """Return the indices of the layers that live in `tier`."""
        return tuple(index for index, where in enumerate(self.tiers) if where == tier)

    def summary(self) -> str:
        """Say in one line where the weights are."""
        counts = {tier: len(self.layers_in(tier)) for tier in Tier}
        return (
            f"plan: of {len(self.tiers)} layers {counts[Tier.DEVICE]} on the device, {counts[Tier.HOST]} in host RAM, "
            f"{counts[Tier.NVME]} on NVMe; {format_size(self.kv_nbytes)} for keys and values"
            + (f" and {format_size(self.kv_host_nbytes)} in host RAM" if self.kv_host_nbytes else "")
            + (f" and {format_size(self.kv_nvme_nbytes)} on NVMe" if self.kv_nvme_nbytes else "")
            + f", up to {self.pass_tokens} tokens in a pass"
        )

    def explain(self) -> str:
        """Say in a few lines where everything is."""
        counts = {tier: len(self.layers_in(tier)) for tier in Tier}
        kept = "keys and values" if self.kv_dtype == "auto" else f"keys and values as {self.kv_dtype}"
        return "\n".join(
            (
                f"device  {format_size(self.device_nbytes)}: resident unit {format_size(self.resident_nbytes)}, "
                f"{counts[Tier.DEVICE]} layers {format_size(self.device_layer_nbytes)}, "
                f"{self.num_slots} slots of {format_size(self.slot_nbytes)}, "
                f"{kept} {format_size(self.kv_nbytes)}, workspace {format_size(self.workspace_nbytes)}",
                f"host    {counts[Tier.HOST]} layers, {format_size(self.host_nbytes)}"
                + (f"; {kept} {format_size(self.kv_host_nbytes)}" if self.kv_host_nbytes else "")
                + (f"; for those on NVMe {format_size(self.kv_landing_nbytes)}" if self.kv_landing_nbytes else ""),
                f"nvme    {counts[Tier.NVME]} layers, {format_size(self.nvme_nbytes)} read in every pass"
                + (f"; {kept} {format_size(self.kv_nvme_nbytes)}" if self.kv_nvme_nbytes else ""),
                f"pass    up to {self.pass_tokens} tokens in micro-batches of {self.micro_batch_tokens}",
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return asdict(self) | {"tiers": [str(tier) for tier in self.tiers], "device_nbytes": self.device_nbytes}


def make_plan(shape: ModelShape, tiers: MemoryTiers, limits: PassLimits) -> Plan:
    """Place a model. `tiers.device` and `tiers.host` must be known. Raises BudgetError, with what is short by how much.

    A model whose layers take at most 4/5 of what the resident unit and the workspace leave stays on the device. Else
    layers get half of what the slots leave, where they rest packed if they are, and keys and values all the rest. In
    host RAM `tiers.kv_host` comes first, and what keys and values of `tiers.kv_nvme` are read into; without `kv_host`
    layers do.
    """
    assert tiers.device is not None
    assert tiers.host is not None
    kv_host = tiers.kv_host or 0
    if kv_host > tiers.host:
        raise BudgetError(
            "keys and values in host RAM take more than the host memory budget",
            wanted=f"at most {format_size(tiers.host)}",
            got=format_size(kv_host),
            fix="Raise the host memory, or lower its part for keys and values.",
        )
    kv_nvme, landing = _on_disk(shape, tiers)
    if kv_host + landing > tiers.host:
        raise BudgetError(
            "keys and values, and room to read those on NVMe, take more than the host memory budget",
            wanted=f"at most {format_size(tiers.host)}",
            got=f"{format_size(kv_host)} and {format_size(landing)}",
            fix="Raise the host memory, or lower its part for keys and values.",
        )
    beside = kv_host or kv_nvme or (tiers.kv_host is None and limits.kv_host_share)
    if beside:  # while micro-batches wait for attention beside the device, another one runs
        shape = replace(shape, workspace_nbytes=2 * shape.workspace_nbytes)
    micro, total, scores = _tokens_that_fit(shape, tiers.device, limits)
    workspace = shape.workspace_of(micro, total) + SCORE_NBYTES * scores
    room = tiers.device - shape.resident_nbytes - workspace
    everything = range(len(shape.layer_nbytes))
    most = len(everything) if limits.device_layers is None else limits.device_layers
    num_slots = 0
    loading = max(shape.loading_nbytes(everything) - workspace, 0)  # without slots, layers are loaded in the workspace
    left = room - loading
    on_device = _spread(shape.staying_nbytes, min(left * 4 // 5, left - _minimum_kv(shape)), everything, most)
    packed = shape.packs and len(on_device) < len(everything)
    kept = shape.wire_nbytes if packed else shape.staying_nbytes
    if len(on_device) < len(everything):
        largest = max(shape.layer_nbytes)
        num_slots = max(1, min(limits.num_slots, (room - _minimum_kv(shape)) * 3 // (4 * largest)))
        left = room - num_slots * largest
        share = left // 2 if limits.device_layers is None else left
        left = min(share, left - _minimum_kv(shape))
        on_device = _spread(kept, left, everything, most)
    elsewhere = [index for index in everything if index not in on_device]
    most = len(elsewhere) if limits.host_layers is None else limits.host_layers
    in_host = _spread(shape.wire_nbytes, tiers.host - kv_host - landing, elsewhere, most)
    on_disk = [index for index in elsewhere if index not in in_host]
    host_nbytes = sum(shape.wire_nbytes[index] for index in in_host)
    if tiers.kv_host is None:
        kv_host = int((tiers.host - landing - host_nbytes) * limits.kv_host_share)
    nvme_nbytes = sum(shape.wire_nbytes[index] for index in on_disk)
    if shape.packed_on_load and nvme_nbytes:
        raise BudgetError(
            "layers that are packed on load cannot be left on NVMe",
            wanted=f"{format_size(nvme_nbytes)} more of host memory",
            got=f"{format_size(tiers.host)}, {format_size(host_nbytes)} of it for layers",
            fix="Give the host more, take a codec of fewer bits, or pack the model with `penstock pack` and run that.",
        )
    if tiers.nvme is not None and nvme_nbytes > tiers.nvme:
        raise BudgetError(
            "the layers that fit neither the device nor host RAM are more than may be left on NVMe",
            wanted=f"at most {format_size(tiers.nvme)}",
            got=format_size(nvme_nbytes),
            fix=f"Give the host {format_size(nvme_nbytes - tiers.nvme)} more, or raise the NVMe limit.",
        )
    streamed = everything if packed else elsewhere
    num_slots = min(num_slots, len(streamed))
    loading = 0 if packed else shape.loading_nbytes(on_device)
    slot_nbytes = max(loading, *(shape.layer_nbytes[index] for index in streamed)) if num_slots else 0
    workspace = workspace if num_slots else max(workspace, loading)
    device_layers = sum(kept[index] for index in on_device)
    return Plan(
        tiers=tuple(
            Tier.DEVICE if index in on_device else Tier.HOST if index in in_host else Tier.NVME for index in everything
        ),
        num_slots=num_slots,
        slot_nbytes=slot_nbytes,
        micro_batch_tokens=micro,
        pass_tokens=total,
        max_scores=scores,
        resident_nbytes=shape.resident_nbytes,
        workspace_nbytes=workspace,
        kv_nbytes=tiers.device - shape.resident_nbytes - workspace - device_layers - num_slots * slot_nbytes,
        device_layer_nbytes=device_layers,
        host_nbytes=host_nbytes,
        nvme_nbytes=nvme_nbytes,
        kv_host_nbytes=kv_host,
        kv_dtype=shape.kv_dtype,
        kv_nvme_nbytes=kv_nvme,
        kv_landing_nbytes=landing,
        device_packed=packed and bool(on_device),
        expanded_nbytes=sum(shape.staying_nbytes[index] for index in streamed) if packed else 0,
        packed_tokens=min(shape.packed_tokens, micro // 2) if packed and on_device else 0,
    )


def _on_disk(shape: ModelShape, tiers: MemoryTiers) -> tuple[int, int]:
    """Return what keys and values on NVMe take there, in whole blocks, and in host RAM to be read.

    That is room for one layer of all of them, so that the longest sequence has it, or else a part of the host budget.
    """
    cost = shape.kv_cost
    if not tiers.kv_nvme or not cost.block_nbytes:
        return 0, 0
    assert tiers.host is not None
    num_blocks = tiers.kv_nvme // cost.on_disk.block_nbytes
    at_once = min(num_blocks, tiers.host // LANDING_PART // cost.stride_nbytes)
    if not at_once:
        raise BudgetError(
            "keys and values on NVMe need room for a block of tokens there, and to read it in host RAM",
            wanted=f"at least {format_size(cost.on_disk.block_nbytes)} on NVMe, "
            f"{format_size(LANDING_PART * cost.stride_nbytes)} of host memory",
            got=f"{format_size(tiers.kv_nvme)}, {format_size(tiers.host)}",
            fix="Raise the one that is too small.",
        )
    return num_blocks * cost.on_disk.block_nbytes, at_once * cost.stride_nbytes


def _tokens_that_fit(shape: ModelShape, device_nbytes: int, limits: PassLimits) -> tuple[int, int, int]:
    """Return tokens per micro-batch and per pass, and attention scores at once, that fit the budget.

    Tokens are halved until their workspace takes at most a quarter of what the weights leave; scores get a sixteenth.
    A pass keeps its tokens as long as those of a micro-batch are enough: what a prompt waits for are passes.
    """
    fixed = shape.resident_nbytes + max(shape.layer_nbytes) + _minimum_kv(shape) + SCORE_NBYTES * SCORES[0]
    room = device_nbytes - fixed
    micro, total = limits.micro_batch_tokens, max(limits.pass_tokens, limits.micro_batch_tokens)

    while shape.workspace_of(micro, total) * 4 > room and (micro > MINIMUM_TOKENS or total > MINIMUM_TOKENS):
        if micro > ENOUGH_TOKENS and shape.workspace_nbytes * micro >= shape.held_nbytes * total:
            micro = max(ENOUGH_TOKENS, micro // 2)
        elif total > micro:
            total = max(micro, total // 2)
        else:
            micro = total = max(MINIMUM_TOKENS, micro // 2)
    workspace = shape.workspace_of(micro, total)
    if workspace > room:
        minimum = fixed + workspace
        raise BudgetError(
            "the device budget is too small for one layer plus the resident unit",
            wanted=f"at least {minimum} bytes ({format_size(minimum)}): resident unit "
            f"{format_size(shape.resident_nbytes)}, largest layer {format_size(max(shape.layer_nbytes))}, "
            f"keys, values and workspace of {micro} tokens "
            f"{format_size(minimum - shape.resident_nbytes - max(shape.layer_nbytes))}",
            got=f"{device_nbytes} bytes ({format_size(device_nbytes)})",
            fix="Raise the device memory.",
        )
    scores = SCORES[0] + min(room // 16, room - workspace) // SCORE_NBYTES
    return micro, total, min(SCORES[1], scores)


def _minimum_kv(shape: ModelShape) -> int:
    return shape.kv_sequence_nbytes + shape.kv_token_nbytes * MINIMUM_TOKENS


def _spread(sizes: Sequence[int], budget: int, candidates: Sequence[int], most: int) -> frozenset[int]:
    """Choose as many of `candidates`, up to `most`, as fit `budget`, evenly spread: streamed layers need their time."""
    for count in range(min(most, len(candidates)), 0, -1):
        chosen = [candidates[(2 * k + 1) * len(candidates) // (2 * count)] for k in range(count)]
        if sum(sizes[index] for index in chosen) <= budget:
            return frozenset(chosen)
    return frozenset()
