"""Whole runs with keys and values on the device and in host RAM: what is planned and reported, and what goes wrong."""

import logging
import signal
import threading
from contextlib import contextmanager

import pytest

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine.planner import LIMITS
from penstock.errors import BudgetError
from penstock.offload import trace as lanes
from penstock.offload.plan import PassLimits
from penstock.offload.tiers import Tier
from penstock.offload.trace import Trace

PROMPTS = [[(5 + 7 * n + 31 * k) % 257 for n in range(40 + 9 * k)] for k in range(12)]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
TIERS = MemoryTiers(device="1200KiB", host="2MiB", kv_host="1MiB")


def open_llm(path, device, kernel_directory, **options):
    return LLM(path, device=device, compile=False, kernel_directory=kernel_directory, **{"tiers": TIERS, **options})


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(tiny_llama, device):
    with LLM(tiny_llama, tiers=MemoryTiers(device="40MiB", host=0), device=device, compile=False) as llm:
        return tokens(llm.generate(PROMPTS, GREEDY))


@pytest.fixture
def llm(tiny_llama, device, kernel_directory):
    with open_llm(tiny_llama, device, kernel_directory) as llm:
        yield llm


@pytest.fixture
def attend(llm, monkeypatch):
    """What is put into this list is called before attention in host RAM."""
    before = []
    home = llm._homes.beside[Tier.HOST]
    kernel = home._attend

    def called(*args, **more):
        for each in before:
            each()
        kernel(*args, **more)

    monkeypatch.setattr(home, "_attend", called)
    return before


def test_a_run_says_how_many_were_in_host_ram_and_what_that_took(tiny_llama, device, kernel_directory, expected):
    trace = Trace()
    with open_llm(tiny_llama, device, kernel_directory, trace=trace, micro_batch_tokens=64) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        text, record = llm.last_run.explain(), llm.last_run.as_dict()
        events = trace.events()
    hosted = record["attention_in_host"]
    assert record["plan"]["kv_host_nbytes"] == 1 << 20
    assert "; keys and values 1.00 MiB" in llm.plan.explain()
    assert f"keys and values of up to {hosted['peak_sequences']} sequences; attention there took" in text
    assert 0 < hosted["peak_sequences"] < record["peak_sequences"]
    assert hosted["busy_seconds"] > 0
    assert 0 <= record["stalls"]["attention_in_host_seconds"] < record["seconds"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X" and threads[event["tid"]] == lanes.ATTENTION]
    assert sum(span["dur"] for span in spans) / 1e6 == pytest.approx(hosted["busy_seconds"])
    assert {span["name"] for span in spans} == {f"layer {index}" for index in range(6)}


def test_host_ram_holds_layers_and_keys_within_one_budget(llm):
    assert llm.plan.host_nbytes + llm.plan.kv_host_nbytes <= TIERS.host
    assert llm.plan.host_nbytes > 0


def test_more_than_the_host_budget_is_refused(tiny_llama, device, kernel_directory):
    tiers = MemoryTiers(device="1200KiB", host="1MiB", kv_host="2MiB")
    with pytest.raises(BudgetError, match="keys and values in host RAM take more than the host memory budget"):
        open_llm(tiny_llama, device, kernel_directory, tiers=tiers)


def test_an_error_of_attention_comes_out_as_itself_and_the_model_stays_usable(llm, attend, expected):
    calls = []

    def third():
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("scripted")

    attend.append(third)
    with pytest.raises(MemoryError, match="scripted"):
        llm.generate(PROMPTS, GREEDY)
    llm._homes.check_integrity()
    assert llm._homes.statistics().host.num_sequences == 0
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_an_error_of_storing_comes_out_as_itself_and_the_model_stays_usable(llm, expected, monkeypatch):
    store = llm._homes.beside[Tier.HOST].store
    put, calls = store.put, []

    def fails(layer, *args):
        calls.append(layer)
        if len(calls) == 8:
            raise ValueError("scripted")
        return put(layer, *args)

    monkeypatch.setattr(store, "put", fails)
    with pytest.raises(ValueError, match="scripted"):
        llm.generate(PROMPTS, GREEDY)
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_an_error_of_another_micro_batch_unwinds_those_that_are_parked(llm, attend, expected, monkeypatch):
    from penstock.engine.model import attention

    alone, beside = attention._attend_alone, []

    def fails(*args, **more):
        if beside:
            raise OSError("scripted")
        alone(*args, **more)

    attend.append(lambda: beside.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_attend_alone", fails)
        with pytest.raises(OSError, match="scripted"):
            llm.generate(PROMPTS, GREEDY)
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_ctrl_c_while_attention_is_waited_for_leaves_the_model_usable(llm, attend, expected):
    interrupt = iter([1])

    def pressed():
        if next(interrupt, None):
            signal.raise_signal(signal.SIGINT)

    attend.append(pressed)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_leaving_early_gives_everything_back(llm, expected):
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)
    stream.close()
    after = llm._homes.statistics()
    assert after.device.num_sequences == after.host.num_sequences == 0
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_close_leaves_no_thread_and_no_memory(tiny_llama, device, kernel_directory, caplog):
    with open_llm(tiny_llama, device, kernel_directory) as llm:
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("penstock-")]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_scores_do_not_depend_on_homes(llm, tiny_llama, device):
    with LLM(tiny_llama, tiers=MemoryTiers(device="40MiB", host=0), device=device, compile=False) as alone:
        wanted = alone.score(PROMPTS)
    for one, other in zip(llm.score(PROMPTS), wanted, strict=True):
        pairs = zip(one.logprobs, other.logprobs, strict=True)
        assert all(here.logprob == pytest.approx(there.logprob, abs=1e-3) for here, there in pairs)
    assert llm.last_run.peak_hosted > 0


@pytest.fixture
def in_turns(tiny_llama, device, kernel_directory, monkeypatch):
    """Layers stream through three slots, so that hosted single tokens make two micro-batches that take turns."""
    monkeypatch.setitem(LIMITS, device, PassLimits(3, 128, 1024))
    tiers = MemoryTiers(device="2MiB", host="3MiB", kv_host="2MiB")
    sizes = {"device_layers": 0, "micro_batch_tokens": 64, "pass_tokens": 512}
    with open_llm(tiny_llama, device, kernel_directory, tiers=tiers, **sizes) as llm:
        monkeypatch.setattr(llm, "_split_tokens", 1)
        yield llm


def entered(llm):
    """Return the layers in the order in which they are entered and left, as they will be."""
    log, layer = [], llm._weights.layer

    @contextmanager
    def noted(index):
        with layer(index):
            log.append(index)
            yield
            log.append(-index)

    llm._weights.layer = noted
    return log


def test_halves_take_turns_in_two_layers(in_turns, expected):
    log = entered(in_turns)
    assert tokens(in_turns.generate(3 * PROMPTS, GREEDY)) == 3 * expected
    assert in_turns.plan.num_slots == 3
    assert in_turns.last_run.as_dict()["attention_in_host"]["peak_sequences"] > 1
    assert (2, -1, 3) in zip(log, log[1:], log[2:], strict=False), "layer 2 is entered before layer 1 is left"
    assert (1, -1, 2) in zip(log, log[1:], log[2:], strict=False), "but not for prompts alone"


def test_an_error_between_two_layers_leaves_the_model_usable(in_turns, expected, monkeypatch):
    home = in_turns._homes.beside[Tier.HOST]
    kernel, calls = home._attend, []

    def called(*args, **more):
        calls.append(1)
        if len(calls) == 9:
            raise MemoryError("scripted")
        kernel(*args, **more)

    monkeypatch.setattr(home, "_attend", called)
    with pytest.raises(MemoryError, match="scripted"):
        in_turns.generate(3 * PROMPTS, GREEDY)
    in_turns._homes.check_integrity()
    assert tokens(in_turns.generate(3 * PROMPTS, GREEDY)) == 3 * expected
