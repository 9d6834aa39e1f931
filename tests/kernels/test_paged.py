"""Attention over blocks that lie anywhere: the reference against whole keys, the kernel against the reference."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from test_attention import naive
from torch import Tensor

from penstock.engine.batch import Span
from penstock.kernels.attention import Rule
from penstock.kernels.paged import attend_paged, find_paged
from penstock.kernels.quant_kv import QUANTISE, dequantise

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0])
RULES = {
    "plain": {},
    "window": {"window": 20},
    "chunk": {"chunk": 32},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": SINKS},
    "all": {"window": 600, "softcap": 3.0, "sinks": SINKS},
}


class Case:
    """Some sequences of one kind in shuffled blocks, with what attention over them must give."""

    def __init__(
        self,
        lengths: list[int],
        heads: tuple[int, int],
        sizes: tuple[int, int],
        *,
        block_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        latent: bool = False,
        code: str | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        counts = [-(-length // block_tokens) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=generator).int()
        self.table = torch.full(
            (len(lengths), max(counts) + 1), 2**30, dtype=torch.int32
        )  # unused places are never read
        for row, part in zip(self.table, order.split([*counts, 3]), strict=False):
            row[: len(part)] = part
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        shape = (len(order), block_tokens, heads[1])
        self.query = torch.randn(heads[0], len(lengths), sizes[0], generator=generator).to(dtype).transpose(0, 1)
        self.keys = torch.randn(*shape, sizes[0], generator=generator).to(dtype)
        self.values = torch.randn(*shape, sizes[1], generator=generator).to(dtype)
        self.sizes, self.scales = sizes, dict[str, Tensor]()
        there = torch.zeros(shape[:2], dtype=torch.bool)
        for row, length in zip(self.table, lengths, strict=True):
            tokens = torch.arange(length)
            there[row[tokens // block_tokens], tokens % block_tokens] = True
        self.keys[~there] = self.values[~there] = float("nan")  # memory that nobody has written
        if latent:
            self.values = self.keys[..., : sizes[1]]
        if code is not None:
            self.quantise(code, latent=latent)

    def quantise(self, code: str, *, latent: bool) -> None:
        """Let keys and values rest in fewer bits; the scales of tokens that are not there are no numbers."""
        self.keys, key_scales = QUANTISE[code](self.keys)
        self.values, value_scales = QUANTISE[code](self.values)
        if latent:
            whole = self.keys if code == "int4" else self.keys[..., : self.sizes[1]]
            self.values, value_scales = whole, key_scales
        for row, length in zip(self.table, self.lengths.tolist(), strict=True):
            last, used = divmod(length, self.keys.shape[1])
            if used:
                key_scales[row[last], used:] = value_scales[row[last], used:] = float("nan")
        self.scales = {"key_scales": key_scales, "value_scales": value_scales}

    def wanted(self, rule: Rule) -> Tensor:
        made = []
        for row, length in enumerate(self.lengths.tolist()):
            used = self.table[row, : -(-length // self.keys.shape[1])].long()
            keys, values = (self._rows(place)[used].flatten(0, 1)[:length] for place in range(2))
            made.append(naive(self.query[row, :, None].float(), keys, values, Span(0, length - 1, 1), rule)[0])
        return torch.stack(made)

    def _rows(self, place: int) -> Tensor:
        blocks = (self.keys, self.values)[place]
        return dequantise(blocks, [*self.scales.values()][place], self.sizes[place]) if self.scales else blocks.float()

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.keys.to(device)
        shared = self.values.data_ptr() == self.keys.data_ptr()
        values = keys[..., : self.values.shape[-1]] if shared else self.values.to(device)
        return self.query.to(device), keys, values

    def run(self, function, rule: Rule, *, device: str = "cpu", workspace_nbytes: int = 1 << 28) -> Tensor:
        rule = rule if rule.sinks is None else replace(rule, sinks=rule.sinks.to(device, self.query.dtype))
        out = torch.empty(*self.query.shape[:2], self.sizes[1], device=device, dtype=self.query.dtype)
        table, lengths = self.table.to(device), self.lengths.to(device)
        options = {"rule": rule, "max_length": max(self.lengths.tolist()), "workspace_nbytes": workspace_nbytes}
        scales = {name: scales.to(device) for name, scales in self.scales.items()}
        function(*self.tensors(device), table, lengths, **options, **scales, out=out)
        return out.float().cpu()


@pytest.mark.parametrize("code", [None, "fp8", "int8", "int4"])
@pytest.mark.parametrize("workspace_nbytes", [1, 1 << 28])
@pytest.mark.parametrize("name", RULES)
def test_the_reference_sees_through_blocks(name: str, workspace_nbytes: int, code: str | None) -> None:
    rule = Rule(0.3, **RULES[name])
    case = Case([1, 16, 17, 90, 3], (6, 2), (8, 6), code=code)
    made = case.run(attend_paged, rule, workspace_nbytes=workspace_nbytes)
    torch.testing.assert_close(made, case.wanted(rule), atol=2e-6, rtol=1e-5)


def test_only_what_the_kernel_can_do_is_given_to_it() -> None:
    case = Case([5], (4, 2), (8, 8))
    assert find_paged(case.query, case.keys, case.values, Rule(1.0)) is None


def kernel_for(case: Case, rule: Rule, device: str):
    """Return the Triton kernel: on CUDA as attention finds it, in the interpreter as it is."""
    if device == "cuda":
        return find_paged(*case.tensors(device), rule, case.sizes[1])
    if case.query.dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter takes bfloat16 for integers in products of matrices")
    return importlib.import_module("penstock.kernels.paged_triton").attend_paged


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "heads", "sizes", "block_tokens"),
    [
        ([1, 5, 16, 17, 64, 65, 511, 512, 513, 1300], (6, 2), (64, 64), 16),
        ([33, 1, 700], (6, 6), (80, 80), 16),
        ([100, 40, 2000], (6, 1), (96, 64), 16),
        ([100, 1025], (6, 3), (112, 112), 32),
        ([70, 9, 600], (6, 2), (128, 128), 16),
        ([70, 9, 600], (6, 2), (256, 256), 16),
        ([40_000, 3], (6, 2), (64, 64), 16),
        ([1, 70, 1100], (6, 1), (576, 512), 16),
        ([33, 600], (6, 1), (320, 256), 16),
    ],
)
@pytest.mark.parametrize("name", RULES)
def test_the_kernel_is_the_reference(triton_device, name, lengths, heads, sizes, block_tokens, dtype) -> None:
    """Odd heads, sizes and lengths, without waiting for the device, and with a workspace that holds one sequence."""
    case = Case(lengths, heads, sizes, block_tokens=block_tokens, dtype=dtype, latent=sizes[0] > 256)
    rule = Rule(0.3, **RULES[name])
    kernel = kernel_for(case, rule, triton_device)
    assert kernel is not None
    made = case.run(kernel, rule, device=triton_device)
    torch.testing.assert_close(made, case.wanted(rule), atol=2e-2, rtol=2e-2)
    assert torch.equal(case.run(kernel, rule, device=triton_device, workspace_nbytes=1), made)
    if triton_device == "cpu":
        return
    tensors = case.tensors("cuda")
    out = torch.empty(len(lengths), heads[0], sizes[1], device="cuda", dtype=dtype)
    some = rule if rule.sinks is None else replace(rule, sinks=rule.sinks.cuda())
    options = {"rule": some, "max_length": max(lengths), "workspace_nbytes": 1 << 28}
    table, sizes_there = case.table.cuda(), case.lengths.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(*tensors, table, sizes_there, **options, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("code", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "heads", "sizes"),
    [
        ([1, 5, 16, 17, 64, 65, 511, 512, 513, 1300], (6, 2), (64, 64)),
        ([33, 1, 700], (6, 6), (80, 80)),
        ([100, 40, 2000], (6, 1), (96, 64)),
        ([70, 9, 600], (6, 2), (128, 128)),
        ([1, 70, 1100], (6, 1), (576, 512)),
    ],
)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_the_kernel_reads_small_rows(triton_device, name, lengths, heads, sizes, dtype, code) -> None:
    if code == "fp8" and triton_device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    case = Case(lengths, heads, sizes, dtype=dtype, latent=sizes[0] > 256, code=code)
    rule = Rule(0.3 if sizes[0] <= 128 else 0.1, **RULES[name])  # decoded keys are rounded, and scores add that up
    kernel = kernel_for(case, rule, triton_device)
    assert kernel is not None
    made = case.run(kernel, rule, device=triton_device)
    torch.testing.assert_close(made, case.wanted(rule), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("code", ["fp8", "int8"])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_scales_of_all_sizes(triton_device: str, group: int, code: str) -> None:
    """Keys and values may be tiny, huge, or zeros, in one tile; what matters is what is largest in the result."""
    if code == "fp8" and triton_device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    case = Case([600, 130, 70], (2 * group, 2), (64, 64), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    shape = (*case.values.shape[:3], 1)
    case.values *= 10 ** torch.randn(shape, generator=generator).clamp(-2, 2).mul(2)
    case.keys *= 10 ** torch.randn(shape, generator=generator).clamp(-2, 0.5)
    case.values[:, ::5] = 0.0
    case.keys[:, 1::5] = 0.0
    case.query *= torch.tensor([1e-4, 3.0, 1.0])[:, None, None]
    case.quantise(code, latent=False)
    case.query = case.query.half()
    rule = Rule(0.2)
    made, wanted = case.run(kernel_for(case, rule, triton_device), rule, device=triton_device), case.wanted(rule)
    bound = 2e-3 * wanted.abs().amax(-1, keepdim=True) + 2**-24  # the least number of float16, as which results rest
    assert ((made - wanted).abs() <= bound).all()


@pytest.mark.parametrize("group", [1, 4])
def test_what_is_no_number_stays_none(triton_device: str, group: int) -> None:
    """A row of keys or values without a scale reaches the results of its sequence and head, and no others."""
    case = Case([70, 40, 20], (2 * group, 2), (64, 64), dtype=torch.float16)
    case.keys[int(case.table[0, 1]), 3, 0] = float("inf")
    case.values[int(case.table[1, 1]), 3, 1] = float("nan")
    case.quantise("int8", latent=False)
    made = case.run(kernel_for(case, Rule(0.2), triton_device), Rule(0.2), device=triton_device)
    bad = made.isnan().all(-1)
    assert torch.equal(bad, made.isnan().any(-1))
    assert bad[0].tolist() == [True] * group + [False] * group
    assert bad[1].tolist() == [False] * group + [True] * group
    assert not bad[2].any()


def test_more_sequences_than_a_grid_takes(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, rule = Case([70, 9, 600, 1, 33], (6, 2), (64, 64), dtype=torch.float16), Rule(0.3)
    kernel = kernel_for(case, rule, triton_device)
    together = case.run(kernel, rule, device=triton_device)
    monkeypatch.setattr("penstock.kernels.paged_triton.MAX_SEQUENCES", 2)
    assert torch.equal(case.run(kernel, rule, device=triton_device), together)


@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_more_heads_than_a_program_takes(triton_device: str, name: str) -> None:
    """Latent attention with the heads of DeepSeek-V3, and one key head for 71."""
    for heads, sizes in (((128, 1), (576, 512)), ((71, 1), (64, 64))):
        case = Case([5, 700], heads, sizes, dtype=torch.float16, latent=sizes[0] > 256)
        rule = Rule(0.1, **RULES[name])
        made = case.run(kernel_for(case, rule, triton_device), rule, device=triton_device)
        torch.testing.assert_close(made, case.wanted(rule), atol=2e-2, rtol=2e-2)


def test_a_sequence_gets_the_same_whatever_its_neighbours_are(triton_device: str) -> None:
    """How it is cut into parts depends on its own length alone."""
    case = Case([700, 20_000, 5, 512], (6, 2), (64, 64), dtype=torch.float16)
    kernel = kernel_for(case, Rule(0.3), triton_device)
    together = case.run(kernel, Rule(0.3), device=triton_device)
    query, table, lengths = case.query, case.table, case.lengths
    for row in range(4):
        case.query, case.table, case.lengths = (one[row : row + 1] for one in (query, table, lengths))
        assert torch.equal(case.run(kernel, Rule(0.3), device=triton_device)[0], together[row])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_scores_of_another_kind_are_left_to_other_code(triton_device: str) -> None:
    case = Case([5], (4, 2), (64, 64), dtype=torch.bfloat16)
    query, keys, values = case.tensors("cuda")
    assert find_paged(query, keys, values, Rule(1.0, bias=lambda positions: positions)) is None
    assert find_paged(query, keys, values[..., :32], Rule(1.0)) is None, "values with gaps"
    assert find_paged(query, keys, keys[..., :32], Rule(1.0)) is not None, "values that are a part of the keys"
    assert find_paged(query.float(), keys.float(), values.float(), Rule(1.0)) is None
    packed, asked = QUANTISE["int4"](query.new_zeros(1, 16, 1, 576))[0], query.new_zeros(1, 4, 576)
    assert find_paged(asked, packed, packed, Rule(1.0), 512) is not None
    assert find_paged(asked, packed, packed, Rule(1.0), 576) is None, "values that are too large"
