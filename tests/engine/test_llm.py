"""Whole runs against in-memory Hugging Face."""

import pytest
import torch

from penstock import LLM, MemoryTiers, Request, SamplingParams
from penstock.errors import (
    BudgetError,
    ClosedError,
    ConfigError,
    DeviceError,
    ModelOutputError,
    PromptTooLongError,
    RequestError,
)
from penstock.offload.tiers import Tier

PROMPTS = [
    [5, 17, 33, 99, 101, 7, 12, 200, 45, 3, 77, 150],
    [9, 8, 250, 31],
    list(range(60, 130)),
    [11],
    [199, 12, 13, 14, 15, 16, 17, 18, 19],
]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)

TIERS = {
    "disk only, one slot": ("500KiB", 0),
    "disk only": ("900KiB", 0),
    "disk and host": ("900KiB", "300KiB"),
    "host only": ("900KiB", "10MiB"),
    "all three": ("1200KiB", "200KiB"),
    "device only": ("40MiB", 0),
}


@pytest.fixture(scope="module")
def expected(tiny_llama, device):
    """Greedy tokens of each prompt, by Hugging Face alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).to(device).eval()
    result = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(GREEDY.max_tokens):
                ids.append(int(model(torch.tensor([ids], device=device), use_cache=False).logits[0, -1].argmax()))
            result.append(tuple(ids[len(prompt) :]))
    return result


def open_llm(path, device, tiers="disk only", **options):
    memory, host = TIERS[tiers]
    if device == "cuda" and memory != "40MiB":
        memory = f"{int(memory.removesuffix('KiB')) + 320}KiB"  # a CUDA run samples several rows at once
    return LLM(path, tiers=MemoryTiers(device=memory, host=host), device=device, compile=False, **options)


@pytest.mark.parametrize("tiers", TIERS)
def test_greedy_tokens_are_those_of_in_memory_hf(tiny_llama, expected, device, tiers):
    with open_llm(tiny_llama, device, tiers) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert [output.request_id for output in outputs] == ["0", "1", "2", "3", "4"]
        assert tiers != "device only" or llm.plan.num_slots == 0
        report = llm.last_run
    assert report.generated_tokens == 5 * 12
    assert report.prompt_tokens == sum(map(len, PROMPTS))
    if tiers.startswith("disk only"):
        num_streamed, num_slots = len(report.plan.layers_in(Tier.NVME)), report.plan.num_slots
        again = (num_streamed - num_slots + 1) / num_streamed  # the rest is still in its slots
        assert report.traffic.disk_bytes >= (report.num_passes - 4) * report.plan.nvme_nbytes * again


@pytest.mark.parametrize("micro_batch_tokens", [1, 7, 64])
def test_micro_batches_do_not_change_the_tokens(tiny_llama, expected, device, micro_batch_tokens):
    with open_llm(tiny_llama, device, micro_batch_tokens=micro_batch_tokens) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_sampled_tokens_depend_on_seed_and_request_only(tiny_llama, device):
    params = SamplingParams(max_tokens=8, temperature=0.9, top_p=0.9, seed=3, ignore_eos=True)
    with open_llm(tiny_llama, device, "disk and host") as llm:
        together = llm.generate(PROMPTS, params)
    with open_llm(tiny_llama, device, "device only", micro_batch_tokens=3) as llm:
        again = llm.generate(PROMPTS, params)
        other = llm.generate(PROMPTS, SamplingParams(max_tokens=8, temperature=0.9, seed=4, ignore_eos=True))
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in again]
    assert [o.outputs[0].token_ids for o in together] != [o.outputs[0].token_ids for o in other]


def test_as_many_run_at_once_as_it_says(tiny_llama, device):
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    with LLM(tiny_llama, tiers=MemoryTiers(device="1200KiB", host=0), device=device, compile=False) as llm:
        for length in (30, 31, 60):
            count = llm.sequences_at_once(length + 10)
            llm.generate([[5] * length] * (count + 3), params)
            assert llm.last_run.peak_sequences == count > 1


def test_more_requests_than_memory_holds_at_once_all_finish(tiny_llama, expected, device):
    with open_llm(tiny_llama, device, "disk only, one slot") as llm:
        outputs = llm.generate(PROMPTS * 6, GREEDY)
        assert llm.last_run.peak_sequences < 30
    assert [output.outputs[0].token_ids for output in outputs] == expected * 6


def test_results_come_as_they_finish(tiny_llama, device):
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (9, 2, 5)]
    with open_llm(tiny_llama, device) as llm:
        order = [output.request_id for output in llm.stream(PROMPTS[:3], params)]
        states = []
        llm.generate(PROMPTS[:3], params, on_pass=states.append)
    assert order == ["1", "2", "0"]
    assert [state.num_finished for state in states][-1] == 3
    assert states[-1].generated_tokens == 16
    assert states[0].num_requests == 3


def test_any_iterable_is_read_when_there_is_room(tiny_llama, expected, device):
    read, errors = [], []

    def endless():
        number = 0
        while True:
            read.append(number)
            prompt = [] if number == 3 else [5] * 300 if number == 6 else PROMPTS[number % len(PROMPTS)]
            yield Request(100 + number, prompt, GREEDY)
            number += 1

    with open_llm(tiny_llama, device, "disk only, one slot") as llm:
        stream = llm.stream(endless(), on_error=lambda request, error: errors.append((request.number, type(error))))
        outputs = [next(stream) for _ in range(40)]
        peak = llm.last_run.peak_sequences
        stream.close()
        assert errors == [(103, RequestError), (106, PromptTooLongError)]
        assert len(read) <= 40 + 2 * peak + 3, "no further ahead than what runs"
        for output in outputs:
            assert output.outputs[0].token_ids == expected[(int(output.request_id) - 100) % len(PROMPTS)]
        assert llm.generate(iter(PROMPTS[:2]), iter([GREEDY] * 2))[1].outputs[0].token_ids == expected[1]
        with pytest.raises(ConfigError, match="differ in number"):
            llm.generate(iter(PROMPTS[:3]), iter([GREEDY] * 2))
        with pytest.raises(RequestError, match="prompt 1 "):
            llm.generate(iter([[5], []]), GREEDY)
        assert llm.generate([PROMPTS[0]], GREEDY)[0].outputs[0].token_ids == expected[0]


def test_draws_belong_to_the_number_of_a_request(tiny_llama, device):
    params = SamplingParams(max_tokens=8, temperature=0.9, ignore_eos=True)
    with open_llm(tiny_llama, device, "device only") as llm:
        whole = llm.generate(PROMPTS, params)
        rest = llm.generate([Request(number, PROMPTS[number], params) for number in (4, 1)])
    assert [(one.request_id, one.outputs) for one in rest] == [(whole[n].request_id, whole[n].outputs) for n in (1, 4)]


def test_leaving_a_stream_early_gives_everything_back(tiny_llama, expected, device):
    with open_llm(tiny_llama, device) as llm:
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)
        stream.close()
        outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_end_of_text_ends_a_completion(tiny_llama, device):
    with open_llm(tiny_llama, device) as llm:
        long = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))[0].outputs[0]
        llm._end_ids = frozenset({long.token_ids[4]})
        first = long.token_ids.index(long.token_ids[4])
        output = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=12, temperature=0))[0].outputs[0]
    assert output.token_ids == long.token_ids[: first + 1]
    assert (output.finish_reason, long.finish_reason) == ("stop", "length")


def test_a_completion_ends_at_the_context(tiny_llama, device):
    with open_llm(tiny_llama, device, "device only") as llm:
        output = llm.generate([list(range(3, 253))], SamplingParams(max_tokens=50, temperature=0, ignore_eos=True))[0]
    assert llm.context_length == 256
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].finish_reason == "length"


def test_logprobs_are_hfs(tiny_llama, device):
    from transformers import AutoModelForCausalLM

    params = SamplingParams(max_tokens=3, temperature=0, logprobs=2, ignore_eos=True)
    with open_llm(tiny_llama, device) as llm:
        completion = llm.generate([PROMPTS[0]], params)[0].outputs[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).to(device)
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPTS[0], *completion.token_ids]], device=device)).logits[0]
    wanted = logits.log_softmax(-1)[len(PROMPTS[0]) - 1 : -1].cpu()
    for place, token in enumerate(completion.token_ids):
        assert completion.logprobs[place][token].logprob == pytest.approx(float(wanted[place, token]), abs=1e-4)
        assert list(completion.logprobs[place]) == wanted[place].topk(2).indices.tolist()
    assert completion.cumulative_logprob == pytest.approx(float(wanted.max(-1).values.sum()), abs=1e-3)


def test_a_budget_that_is_too_small_says_what_would_be_enough(tiny_llama, device):
    with pytest.raises(BudgetError, match="too small for one layer plus the resident unit") as caught:
        LLM(tiny_llama, tiers=MemoryTiers(device=200_000, host=0), device=device)
    minimum = int(str(caught.value.wanted).split()[2])
    with LLM(tiny_llama, tiers=MemoryTiers(device=minimum, host=0), device=device) as llm:
        assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4))[0].finished


def test_more_memory_than_there_is_is_refused(tiny_llama, device):
    with pytest.raises(BudgetError, match="the device memory budget is more than what is free"):
        LLM(tiny_llama, tiers=MemoryTiers(device="100TiB"), device=device)
    with pytest.raises(BudgetError, match="the host memory budget is more than what is free"):
        LLM(tiny_llama, tiers=MemoryTiers(device="10MiB", host="100TiB"), device=device)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "mps", "meta"])
def test_devices_that_are_not_there_are_refused(tiny_llama, name):
    with pytest.raises(DeviceError, match=name):
        LLM(tiny_llama, device=name)


def test_bad_requests_are_refused_before_anything_runs(tiny_llama, device):
    with open_llm(tiny_llama, device) as llm:
        for prompts, error, text in (
            ([[5], list(range(300))], PromptTooLongError, "prompt 1 is longer than the model's context"),
            ([[5], []], RequestError, "prompt 1"),
            ([[5], [700]], RequestError, "wanted ids below 257, got \\[700\\]"),
            ([{"text": "x"}], RequestError, "prompt 0 is not a prompt"),
            (["text"], RequestError, "the model has no tokenizer"),
        ):
            with pytest.raises(error, match=text):
                llm.generate(prompts, GREEDY)
        with pytest.raises(ConfigError, match="differ in number"):
            llm.generate([[5], [6]], [GREEDY])
        with pytest.raises(BudgetError, match="no room for the keys and values"):
            llm._kv._limit = 1000
            llm.generate([[5] * 100], GREEDY)


def test_one_run_at_a_time(tiny_llama, device):
    with open_llm(tiny_llama, device) as llm:
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)
        with pytest.raises(RequestError, match="another run"):
            llm.generate([[5]])
        llm.close()
        with pytest.raises(ClosedError):
            list(stream)


def test_extreme_sampling_takes_the_likeliest(tiny_llama, device):
    with open_llm(tiny_llama, device) as llm:
        greedy = llm.generate([PROMPTS[0]], GREEDY)[0].outputs[0].token_ids
        for extreme in ({"temperature": 1e-39}, {"top_p": 1e-60}, {"top_k": 1}):
            params = SamplingParams(max_tokens=12, ignore_eos=True, **extreme)
            assert llm.generate([PROMPTS[0]], params)[0].outputs[0].token_ids == greedy
        params = SamplingParams(max_tokens=12, top_k=10**20)
        assert llm.generate([PROMPTS[0]], params)[0].finished


def test_numbers_that_overflow_are_named(tiny_llama, device):
    with open_llm(tiny_llama, device, "device only") as llm:
        llm._weights.resident.view(torch.float32).fill_(float("inf"))
        with pytest.raises(ModelOutputError, match="not finite"):
            llm.generate([PROMPTS[0]], GREEDY)


def test_a_closed_model_refuses_work(tiny_llama, device):
    llm = open_llm(tiny_llama, device)
    llm.close()
    llm.close()
    with pytest.raises(ClosedError):
        llm.generate([[5]])


def test_text_in_and_text_out_with_the_bundled_model(device):
    with LLM(device=device, tiers=MemoryTiers(device="64MiB", host=0)) as llm:
        prompt = "class Stack:\n    def __init__(self):\n"
        whole = llm.generate(prompt, SamplingParams(max_tokens=40, temperature=0))[0].outputs[0]
        assert "self" in whole.text
        assert whole.text == llm.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
        stop = whole.text[10:14]
        cut = llm.generate([prompt], SamplingParams(max_tokens=40, temperature=0, stop=[stop, "never there"]))[
            0
        ].outputs[0]
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        with pytest.raises(RequestError, match="no chat template"):
            llm.chat([{"role": "user", "content": "hello"}])
        llm.tokenizer.chat_template = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
        (answer,) = llm.chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=3))
        assert llm.tokenizer.decode(answer.prompt_token_ids) == "# user: hello\n"
