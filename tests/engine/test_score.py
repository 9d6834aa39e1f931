"""Log-likelihoods against transformers' own logits."""

import pytest
import torch

from penstock import LLM, MemoryTiers, SamplingParams, ScoreRequest
from penstock.errors import BudgetError, ConfigError, ModelOutputError, PromptTooLongError, RequestError

TEXTS = [list(range(60, 130)), [5, 17, 33, 99], [11, 12], [199, 12, 13, 14, 15, 16, 17, 18, 19]]


@pytest.fixture(scope="module")
def hf(tiny_llama, device):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).to(device).eval()

    def logprobs(ids, known=1):
        with torch.inference_mode():
            rows = model(torch.tensor([list(ids)], device=device), use_cache=False).logits[0, known - 1 : -1]
        rows = rows.float().log_softmax(-1).cpu()
        return [
            (float(row[token]), int((row > row[token]).sum()) + 1) for row, token in zip(rows, ids[known:], strict=True)
        ]

    return logprobs


def assert_scores(output, wanted):
    assert [entry.logprob for entry in output.logprobs] == pytest.approx([one for one, _ in wanted], abs=1e-4)
    assert [entry.rank for entry in output.logprobs] == [rank for _, rank in wanted]
    assert output.logprob == pytest.approx(sum(one for one, _ in wanted), abs=1e-3)
    assert output.is_greedy == all(rank == 1 for _, rank in wanted)


def open_llm(path, device, memory="1200KiB", **options):
    return LLM(path, tiers=MemoryTiers(device=memory, host=0), device=device, **options)


@pytest.mark.parametrize("micro_batch_tokens", [3, 16, 512])
def test_whole_texts_score_as_in_transformers(tiny_llama, hf, device, micro_batch_tokens):
    with open_llm(tiny_llama, device, micro_batch_tokens=micro_batch_tokens) as llm:
        outputs = llm.score(TEXTS)
        report = llm.last_run
    for ids, output in zip(TEXTS, outputs, strict=True):
        assert (output.prompt_token_ids, output.token_ids) == (tuple(ids[:1]), tuple(ids[1:]))
        assert_scores(output, hf(ids))
    assert report.generated_tokens == 0
    assert report.prompt_tokens == sum(len(ids) - 1 for ids in TEXTS), "the last token of a text is never run"


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_continuations_score_in_blocks_of_rows(tiny_llama, hf, device, rows, monkeypatch):
    monkeypatch.setattr(LLM, "_score_rows", lambda self: rows)
    with open_llm(tiny_llama, device) as llm:
        outputs = llm.score([ids[:-1] for ids in TEXTS], [ids[-1:] for ids in TEXTS])
        long = llm.score([TEXTS[0][:9]], [TEXTS[0][9:]])[0]
    for ids, output in zip(TEXTS, outputs, strict=True):
        assert output.token_ids == (ids[-1],)
        assert_scores(output, hf(ids, len(ids) - 1))
    assert_scores(long, hf(TEXTS[0], 9))


def test_what_greedy_decoding_chooses_is_greedy(tiny_llama, device):
    with open_llm(tiny_llama, device) as llm:
        greedy = llm.generate(TEXTS, SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
        made = [output.outputs[0].token_ids for output in greedy]
        assert all(output.is_greedy for output in llm.score(TEXTS, made))
        other = [(*ids[:-1], (ids[-1] + 1) % 257) for ids in made]
        assert not any(output.is_greedy for output in llm.score(TEXTS, other))


def test_memory_for_logits_does_not_grow_with_the_text(tiny_llama, device):
    """The head sees few rows at a time, and no row that nobody asked for."""
    seen = []
    with open_llm(tiny_llama, device, "40MiB") as llm:
        head = llm._model.module.get_output_embeddings()
        head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
        llm._score_rows = lambda: 7
        llm.score([list(range(200))], [list(range(30))])
    assert max(seen) == 7
    assert sum(seen) == 30


def test_text_is_tokenised_with_its_context(device):
    with LLM(device=device, tiers=MemoryTiers(device="64MiB", host=0)) as llm:
        (joined,) = llm.score("def f(se", "lf):")
        ids = tuple(llm.tokenizer("def f(self):").input_ids)
        assert joined.prompt_token_ids + joined.token_ids == ids
        assert llm.tokenizer.decode(joined.token_ids).endswith("self):"), "the token across the seam is scored"
        assert joined.logprobs[0].decoded_token == llm.tokenizer.decode(joined.token_ids[:1])
        with pytest.raises(RequestError, match="text 0 is too short"):
            llm.score("", "x")


def test_bad_texts_are_refused(tiny_llama, device):
    with open_llm(tiny_llama, device, "40MiB") as llm:
        for texts, after, error, text in (
            ([[5]], None, RequestError, "text 0 is too short"),
            ([[5, 6], list(range(100)) * 3], None, PromptTooLongError, "prompt 1"),
            ([[5, 6]], ["x"], RequestError, "continuation 0 does not fit"),
            ([[5, 6]], [[700]], RequestError, r"got \[700\]"),
            ([[5, 6]], [[1], [2]], ConfigError, "continuations and prompts differ in number"),
        ):
            with pytest.raises(error, match=text):
                llm.score(texts, after)
        assert len(llm.score([list(range(256))])[0].token_ids) == 255, "the whole context can be scored"
        errors = []
        requests = iter([ScoreRequest(4, [5]), ScoreRequest(9, [5, 6])])
        outputs = list(llm.stream_scores(requests, on_error=lambda request, error: errors.append(request.number)))
        assert ([output.request_id for output in outputs], errors) == (["9"], [4])
        llm._kv._limit = 1000
        with pytest.raises(BudgetError):
            llm.score([[5] * 100])


def test_scores_that_are_no_numbers_are_named(tiny_llama, device):
    with LLM(tiny_llama, tiers=MemoryTiers(device="40MiB", host=0), device=device) as llm:
        llm._weights.resident.view(torch.float32).fill_(float("inf"))
        with pytest.raises(ModelOutputError, match="not finite"):
            llm.score([[5, 6, 7]])
