"""Keys and values in other dtypes, in whole runs: how far from Hugging Face, and the same however tokens are cut."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine.batch import CURRENT, MicroBatch, Span
from penstock.engine.model.attention import attend_spans
from penstock.errors import ConfigError
from penstock.kernels.attention import Rule
from penstock.offload.kv import KVStore
from penstock.offload.kv_dtype import KV_DTYPES

TEXTS = [[(7 * place + number) % 250 + 3 for place in range(length)] for number, length in enumerate((40, 11, 23, 2))]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=2)
SHARES = {"auto": 1.0, "bf16": 0.5, "fp8": 20 / 64, "int8": 20 / 64, "int4": 12 / 64}
"""Of the bytes of float32 heads of size 16: scales are 4 bytes for each token and head."""
ERRORS = {"auto": (0.0, 2e-4), "bf16": (0.0, 0.1), "int8": (1e-3, 0.5), "fp8": (1e-2, 2.0), "int4": (1e-2, 6.0)}
"""Between what mean errors of log-likelihoods lie; tokens have log-likelihoods of some -10 here."""


def open_llm(path, device, kv_dtype, memory="40MiB", **options):
    tiers = MemoryTiers(device=memory, host=0)
    return LLM(path, tiers=tiers, device=device, kv_dtype=kv_dtype, compile=False, **options)


@pytest.fixture(scope="module")
def exact(tiny_llama, device):
    """Log-likelihoods of the texts' tokens, by Hugging Face alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).to(device).eval()
    with torch.inference_mode():
        logits = [model(torch.tensor([text], device=device), use_cache=False).logits[0].cpu() for text in TEXTS]
    return [
        row.log_softmax(-1)[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        for row, text in zip(logits, TEXTS, strict=True)
    ]


def mean_error(llm, exact):
    scores = llm.score(TEXTS)
    found = [torch.tensor([entry.logprob for entry in score.logprobs]) for score in scores]
    return float((torch.cat(found) - torch.cat(exact)).abs().mean())


def test_errors_against_hugging_face(tiny_llama, exact, device):
    """Fewer bits, larger errors, each within bounds; a token costs what its codes and scales take."""
    found = {}
    for kv_dtype in KV_DTYPES:
        with open_llm(tiny_llama, device, kv_dtype, micro_batch_tokens=7) as llm:
            found[kv_dtype] = mean_error(llm, exact)
            assert llm.kv_token_nbytes == SHARES[kv_dtype] * 6 * 2 * 2 * 16 * 4
            assert llm.plan.kv_dtype == kv_dtype == llm.last_run.as_dict()["kv_dtype"]
            assert ("as int4" in llm.plan.explain()) == (kv_dtype == "int4")
    for kv_dtype, (least, most) in ERRORS.items():
        assert least <= found[kv_dtype] <= most, found
    assert found["auto"] < found["bf16"] < found["int8"] < found["fp8"] < found["int4"]


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_tokens_are_the_same_however_prompts_are_cut(tiny_llama, device, kv_dtype):
    found = []
    for micro, total in ((64, 256), (7, 7), (1, 3)):
        with open_llm(tiny_llama, device, kv_dtype, micro_batch_tokens=micro, pass_tokens=total) as llm:
            found.append([output.outputs[0] for output in llm.generate(TEXTS, GREEDY)])
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert_same(one, another)


def assert_same(one, another):
    """The tokens are equal up to a place where two were as good: products of other shapes round otherwise, and a number
    between two codes then gets the other one."""
    for place, tokens in enumerate(zip(one.token_ids, another.token_ids, strict=True)):
        if len(set(tokens)) > 1:
            first, second = (one.logprobs[place][token].logprob for token in tokens)
            assert abs(first - second) < 0.02
            return


def test_more_sequences_fit(tiny_llama, device):
    """What is saved goes to sequences: the same memory runs more of them at once."""
    peaks = {}
    memory = "900KiB" if device == "cpu" else "1200KiB"
    for kv_dtype in ("auto", "int4"):
        with open_llm(tiny_llama, device, kv_dtype, memory) as llm:
            llm.generate([[5] * 30] * 24, GREEDY)
            peaks[kv_dtype] = llm.last_run.peak_sequences
    assert peaks["int4"] > 2 * peaks["auto"]


def test_unknown_names_are_refused(tiny_llama):
    with pytest.raises(ConfigError, match="wanted one of auto, bf16, fp8, int8, int4, got 'fp16'"):
        LLM(tiny_llama, kv_dtype="fp16")


RULES = {"plain": {}, "window": {"window": 6}, "chunk": {"chunk": 8}, "softcap": {"softcap": 2.0}, "sinks": {}}
SHAPES = {"grouped": (6, 2, 40), "one head": (3, 1, 33)}


def attend(kv_dtype, rule, query, key, value, cuts):
    """Attend over two sequences of equal tokens that come in spans; `cuts` are the ends of the spans of each."""
    store = KVStore(kv_dtype=kv_dtype)
    total = key.shape[1]
    made = [[], []]
    for number in range(2):
        store.acquire(number, num_tokens=total)
    starts = [0, 0]
    for ends in cuts:
        spans = tuple(Span(n, starts[n], end - starts[n]) for n, end in enumerate(ends) if end > starts[n])
        if not spans:
            continue
        spans = tuple(sorted(spans, key=lambda span: span.length > 1))  # as the scheduler orders them
        parts = [slice(span.start, span.end) for span in spans]
        token = CURRENT.set(MicroBatch(spans, store))
        rows = (torch.cat([each[:, part] for part in parts], 1)[None] for each in (query, key, value))
        out = attend_spans(SimpleNamespace(layer_idx=0), *rows, rule)[0]
        CURRENT.reset(token)
        for span, part in zip(spans, out.split([span.length for span in spans]), strict=True):
            made[span.sequence].append(part)
        starts = [max(start, end) for start, end in zip(starts, ends, strict=True)]
    return [torch.cat(parts) for parts in made]


@settings(max_examples=40)
@given(
    st.data(), st.sampled_from(["bf16", "fp8", "int8", "int4"]), st.sampled_from([*RULES]), st.sampled_from([*SHAPES])
)
def test_attention_reads_the_stored_rows_of_every_token(data, kv_dtype, name, shape):
    """However two prompts are cut into spans and micro-batches: rows are quantised once, each by itself."""
    (num_heads, num_keys, size), total = SHAPES[shape], 21
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query, key, value = (torch.randn(n, total, size, generator=generator) for n in (num_heads, num_keys, num_keys))
    options = dict(RULES[name])
    if name == "sinks":
        options["sinks"] = torch.randn(num_heads, generator=generator)
    rule = Rule(size**-0.5, **options)
    (whole, same) = attend(kv_dtype, rule, query, key, value, [(total, total)])
    assert torch.equal(whole, same)
    ends = [[*sorted(data.draw(st.lists(st.integers(0, total), min_size=5, max_size=5))), total] for _ in range(2)]
    for made in attend(kv_dtype, rule, query, key, value, list(zip(*ends, strict=True))):
        torch.testing.assert_close(made, whole, atol=2e-6, rtol=1e-5)
    (exact, _) = attend("auto", rule, query, key, value, [(total, total)])
    assert not torch.equal(whole, exact)
    torch.testing.assert_close(whole, exact, atol={"bf16": 0.05, "int8": 0.1}.get(kv_dtype, 1.0), rtol=0)
