"""Whole runs with keys and values on NVMe: what is planned and reported, what goes wrong, and that nothing is left."""

import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_llm_homes import GREEDY, PROMPTS, tokens

from penstock import LLM, MemoryTiers
from penstock.errors import BudgetError, NoSpaceError, ReadError, TargetError, WriteError
from penstock.io import reserve
from penstock.io.disk import DiskReader
from penstock.io.open_file import disk_error
from penstock.offload import trace as lanes
from penstock.offload.tiers import Tier
from penstock.offload.trace import Trace

TIERS = {"device": "1200KiB", "host": "2MiB", "kv_host": "128KiB", "kv_nvme": "8MiB"}


@contextmanager
def open_llm(path, device, kernel_directory, **options):
    tiers = MemoryTiers(**(TIERS | options.pop("tiers", {})))
    with LLM(path, device=device, compile=False, kernel_directory=kernel_directory, tiers=tiers, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(tiny_llama, device):
    with LLM(tiny_llama, tiers=MemoryTiers(device="40MiB", host=0), device=device, compile=False) as llm:
        return tokens(llm.generate(PROMPTS, GREEDY))


@pytest.fixture
def llm(tiny_llama, device, kernel_directory, tmp_path):
    with open_llm(tiny_llama, device, kernel_directory, kv_scratch=tmp_path) as llm:
        yield llm


def open_scratch(directory):
    """Return the descriptors of files without a name there."""
    links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if link.is_symlink()]
    return [name for name in names if name.startswith(str(directory)) and name.endswith("(deleted)")]


def test_a_run_says_how_many_were_on_nvme_and_what_that_took(tiny_llama, device, kernel_directory, expected, tmp_path):
    trace = Trace()
    with open_llm(tiny_llama, device, kernel_directory, trace=trace, kv_scratch=tmp_path, micro_batch_tokens=64) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        text, record = llm.last_run.explain(), llm.last_run.as_dict()
        assert llm.plan.host_nbytes + llm.plan.kv_host_nbytes + llm.plan.kv_landing_nbytes <= 2 << 20
        assert os.listdir(tmp_path) == []
        assert f"; for those on NVMe {llm.plan.kv_landing_nbytes // 1024}.00 KiB" in llm.plan.explain()
        events = trace.events()
    on_nvme, plan = record["kv_on_nvme"], record["plan"]
    assert 0 < on_nvme["peak_sequences"] < record["peak_sequences"]
    assert 0 < record["attention_in_host"]["peak_sequences"] < record["peak_sequences"]
    assert on_nvme["read_bytes"] > on_nvme["written_bytes"] > 0
    assert f"keys and values of up to {on_nvme['peak_sequences']} sequences; " in text
    assert 0 < plan["kv_landing_nbytes"] <= (2 << 20) // 8
    assert 7 << 20 < plan["kv_nvme_nbytes"] <= 8 << 20
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X" and threads[event["tid"]] == lanes.KV_DISK]
    assert sum(span["dur"] for span in spans) / 1e6 == pytest.approx(on_nvme["busy_seconds"])
    assert [event for event in events if event["ph"] == "X" and threads[event["tid"]] == lanes.KV_ATTENTION]


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_quantised_rows_make_the_tokens_that_they_make_on_the_device(
    tiny_llama, device, kernel_directory, tmp_path, kv_dtype
):
    with LLM(
        tiny_llama, tiers=MemoryTiers(device="40MiB", host=0), device=device, compile=False, kv_dtype=kv_dtype
    ) as alone:
        wanted = tokens(alone.generate(PROMPTS[:6], GREEDY))
    tiers = {"device": "600KiB", "kv_host": 0}
    with open_llm(tiny_llama, device, kernel_directory, kv_scratch=tmp_path, kv_dtype=kv_dtype, tiers=tiers) as llm:
        made = tokens(llm.generate(PROMPTS[:6], GREEDY))
        assert llm.last_run.peak_on_nvme > 0
    assert made == wanted


def test_a_sequence_longer_than_what_device_and_host_hold(tiny_llama, device, kernel_directory, tmp_path):
    prompt = [[(3 * n) % 257 for n in range(240)]]
    with LLM(tiny_llama, tiers=MemoryTiers(device="40MiB", host=0), device=device, compile=False) as alone:
        wanted = tokens(alone.generate(prompt, GREEDY))
    tiers = {"device": "760KiB", "host": "4MiB", "kv_host": 0}
    with open_llm(tiny_llama, device, kernel_directory, kv_scratch=tmp_path, tiers=tiers) as llm:
        assert not llm._homes._device.could_hold(246)
        assert tokens(llm.generate(prompt, GREEDY)) == wanted


def failing(monkeypatch, method, number, error):
    """Let the disk fail at one of the transfers of keys and values."""
    real, calls = getattr(DiskReader, method), []

    def submit(self, requests):
        if requests and str(requests[0].file.path).startswith("/proc/"):
            calls.append(1)
            if len(calls) == number:
                raise disk_error("cannot be done", requests[0].file, error, write=method == "submit_writes")
        return real(self, requests)

    monkeypatch.setattr(DiskReader, method, submit)


@pytest.mark.parametrize(
    ("method", "number", "kind", "what"),
    [
        ("submit", 1, ReadError, "could not be read: cannot be done: Input/output error"),
        ("submit", 40, ReadError, "could not be read: cannot be done: Input/output error"),
        ("submit_writes", 1, WriteError, "could not be written: cannot be done: Input/output error"),
        ("submit_writes", 29, WriteError, "could not be written: cannot be done: Input/output error"),
    ],
)
def test_a_disk_that_fails_ends_the_run_and_the_model_stays_usable(
    llm, expected, monkeypatch, tmp_path, method, number, kind, what
):
    with monkeypatch.context() as patch:
        failing(patch, method, number, 5)
        with pytest.raises(kind, match=f"{tmp_path}: keys and values on NVMe {what}"):
            llm.generate(PROMPTS, GREEDY)
    llm._homes.check_integrity()
    assert llm._homes.statistics().nvme.num_sequences == 0
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_a_file_that_somebody_cuts_is_an_error(llm, monkeypatch, expected):
    store = llm._homes.beside[Tier.NVME].store
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
    os.truncate(store._file.path, 8192)
    with pytest.raises(ReadError, match="the scratch file was cut short"):
        llm.generate(PROMPTS, GREEDY)


def test_ctrl_c_leaves_the_model_usable(llm, expected, monkeypatch):
    home, interrupt = llm._homes.beside[Tier.NVME], iter([1])
    kernel = home._attend

    def pressed(*args, **more):
        if next(interrupt, None):
            signal.raise_signal(signal.SIGINT)
        kernel(*args, **more)

    monkeypatch.setattr(home, "_attend", pressed)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_close_leaves_no_file_thread_or_memory(tiny_llama, device, kernel_directory, tmp_path, caplog):
    with open_llm(tiny_llama, device, kernel_directory, kv_scratch=tmp_path) as llm:
        assert open_scratch(tmp_path)
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)
    stream.close()
    assert not open_scratch(tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("penstock-")]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


KILLED = """
import os, signal, sys
from pathlib import Path
from penstock.io.reserve import reserved_file
with reserved_file(Path(sys.argv[1]), 8 << 20):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_have_it_is_refused_before_anything_runs(
    tiny_llama, device, kernel_directory, tmp_path
):
    options = {"kv_scratch": tmp_path}
    with pytest.raises(
        NoSpaceError, match=f"{tmp_path}: there is no space for the file: wanted 1125899906842624 bytes"
    ):
        open_llm(tiny_llama, device, kernel_directory, tiers={"kv_nvme": 1 << 50}, **options).__enter__()
    with pytest.raises(TargetError, match="is not a directory"):
        open_llm(tiny_llama, device, kernel_directory, kv_scratch=tmp_path / "none").__enter__()
    with pytest.raises(TargetError, match="lies in memory"):
        open_llm(tiny_llama, device, kernel_directory, kv_scratch="/dev/shm").__enter__()


def test_a_limit_on_files_is_refused_before_anything_runs(tiny_llama, device, kernel_directory, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))
    try:
        with pytest.raises(NoSpaceError, match="may not write a file of that size: wanted 8388608 bytes, got 4194304"):
            open_llm(tiny_llama, device, kernel_directory, kv_scratch=tmp_path).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("tiers", [{"kv_nvme": "16KiB"}, {"host": "20KiB", "kv_host": 0}])
def test_room_for_less_than_a_block_is_refused(tiny_llama, device, kernel_directory, tmp_path, tiers):
    with pytest.raises(BudgetError, match="keys and values on NVMe need room for a block of tokens there") as caught:
        open_llm(tiny_llama, device, kernel_directory, kv_scratch=tmp_path, tiers=tiers).__enter__()
    assert "wanted at least 24.00 KiB on NVMe, 32.00 KiB of host memory" in str(caught.value)


def test_more_than_the_host_budget_with_room_to_read_is_refused(tiny_llama, device, kernel_directory, tmp_path):
    with pytest.raises(BudgetError, match="and room to read those on NVMe, take more than the host memory budget"):
        open_llm(tiny_llama, device, kernel_directory, kv_scratch=tmp_path, tiers={"kv_host": "2MiB"}).__enter__()


def test_a_directory_is_chosen_beside_the_model_if_it_can_be_written(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "penstock.io")
    assert reserve.choose_directory(tmp_path, 1 << 20) == tmp_path
    monkeypatch.setattr(reserve.os, "access", lambda *_: False)  # root may write to anything
    assert reserve.choose_directory(tmp_path, 1 << 20) == Path("/var/tmp")
    assert f"because of {tmp_path}: the directory cannot be written" in caplog.text
    with pytest.raises(TargetError, match="cannot be written"):
        reserve.check_reserve(tmp_path, 1 << 20)
