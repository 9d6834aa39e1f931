"""Attention against one line of arithmetic, for every rule, start and block size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.engine.batch import Span
from penstock.kernels import attention
from penstock.kernels.attention import Rule, attend
from penstock.kernels.flash import attend_prompts, attend_together


def naive(query: Tensor, keys: Tensor, values: Tensor, span: Span, rule: Rule) -> Tensor:
    groups = query.shape[0] // keys.shape[1]
    scores = torch.einsum("hqd,khd->hqk", query, keys.repeat_interleave(groups, 1)) * rule.scale
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    key, position = torch.arange(span.end), torch.arange(span.start, span.end)[:, None]
    if rule.bias is not None:
        scores = scores + rule.bias(key)
    visible = key <= position
    if rule.window is not None:
        visible &= key > position - rule.window
    if rule.chunk is not None:
        visible &= key // rule.chunk == position // rule.chunk
    scores = scores.masked_fill(~visible, float("-inf"))
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.view(-1, 1, 1).expand(-1, span.length, 1)], -1)
    weights = scores.softmax(-1)[..., : span.end]
    return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(groups, 1))


RULES = {
    "plain": {},
    "window": {"window": 4},
    "chunk": {"chunk": 5},
    "wide_window": {"window": 100},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "bias": {"bias": lambda key: key * torch.tensor([0.5, 0.25, 0.1, 0.0]).view(-1, 1, 1)},
    "all": {"window": 6, "softcap": 3.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("elements", [8, 200, 1 << 24])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 13), (7, 1), (9, 6), (1, 12)])
@pytest.mark.parametrize(("num_kv", "value_size"), [(4, 8), (2, 8), (1, 8), (2, 6)])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_at_every_start(
    name: str, num_kv: int, value_size: int, start: int, length: int, elements: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    span = Span(0, start, length)
    query = torch.randn(4, length, 8, generator=generator)
    keys = torch.randn(span.end, num_kv, 8, generator=generator)
    values = torch.randn(span.end, num_kv, value_size, generator=generator)
    rule = Rule(scale=0.3, **RULES[name])
    out = torch.empty(length, 4, value_size)
    attend(query, keys, values, rule, max_scores=elements, out=out)
    torch.testing.assert_close(out, naive(query, keys, values, span, rule), atol=2e-6, rtol=1e-5)


def test_the_workspace_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    scored = attention._scored

    def watch(query: Tensor, key: Tensor, value: Tensor, rule: Rule, *, start: int, first: int) -> Tensor:
        sizes.append(query.shape[0] * query.shape[1] * key.shape[1])
        return scored(query, key, value, rule, start=start, first=first)

    monkeypatch.setattr(attention, "_scored", watch)
    out = torch.empty(50, 4, 8)
    attend(
        torch.randn(4, 50, 8),
        torch.randn(60, 2, 8),
        torch.randn(60, 2, 8),
        Rule(1.0, softcap=9.0),
        max_scores=4000,
        out=out,
    )
    assert len(sizes) > 1
    assert max(sizes) <= 4000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("limit", [1, 1 << 26])
@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("num_kv", [4, 2, 1])
def test_sequences_together_are_sequences_alone(num_kv: int, window: int | None, limit: int) -> None:
    """Prefill, a chunk and decode in one call of the flash kernel, without waiting for the device."""
    spans = [Span(0, 0, 33), Span(1, 40, 1), Span(2, 17, 20), Span(3, 0, 1), Span(4, 3, 1)]
    options = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(sum(span.length for span in spans), 4, 16, **options)
    rows = [
        (torch.randn(span.end, num_kv, 16, **options), torch.randn(span.end, num_kv, 16, **options)) for span in spans
    ]
    out = torch.empty_like(query)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend_together(
            query, rows, [span.length for span in spans], scale=0.3, window=window, copy_nbytes=limit, out=out
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    begin = 0
    for span, (keys, values) in zip(spans, rows, strict=True):
        end = begin + span.length
        alone = query[begin:end].transpose(0, 1).cpu().float()
        wanted = naive(alone, keys.cpu().float(), values.cpu().float(), span, Rule(0.3, window=window))
        torch.testing.assert_close(out[begin:end].cpu().float(), wanted, atol=2e-2, rtol=2e-2)
        begin = end


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("num_kv", [4, 1])
def test_prompts_back_to_back_are_prompts_alone(num_kv: int, window: int | None) -> None:
    lengths = [33, 1, 20]
    options = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(sum(lengths), 4, 16, **options)
    keys, values = (torch.randn(sum(lengths), num_kv, 16, **options) for _ in range(2))
    out, alone = torch.empty_like(query), torch.empty_like(query)
    attend_prompts(query, keys, values, lengths, scale=0.3, window=window, out=out)
    rows = zip(keys.split(lengths), values.split(lengths), strict=True)
    attend_together(query, rows, lengths, scale=0.3, window=window, copy_nbytes=1, out=alone)
    torch.testing.assert_close(out, alone)
