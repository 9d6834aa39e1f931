"""Sequences with their keys and values in host RAM, beside others on the device, get the tokens of transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, REFERENCE_ATTENTION
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Stream, make_config, reference, save_checkpoint, worst_error
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from penstock import LLM, MemoryTiers, SamplingParams
from penstock.engine.model import hosted
from penstock.io.settings import ReadSettings
from penstock.offload.disk_kv import DiskRoom
from penstock.offload.groups import open_kv
from penstock.offload.homes import KVHomes
from penstock.offload.kv import KVStore
from penstock.offload.tiers import Tier

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # some of transformers' code

NAMES = ["llama", "mistral", "gemma2", "gpt_oss", "bloom", "deepseek_v3", "llama4_text", "gemma3n_text", "diffllama",
         "qwen3_next"]  # fmt: skip
"""Grouped queries, windows, soft caps, sinks, ALiBi, latents, chunks, shared keys, two attentions in one layer, and
recurrent states."""

PROMPTS = [[5 + (7 * n + 31 * k) % 250 for n in range(length)] for k, length in enumerate((1, 2, 7, 16, 23, 40))]
NUM_NEW = 6
SIZE = 4


@dataclass(frozen=True)
class Known:
    """A model, and what transformers completes each prompt with."""

    llm: LLM
    tokens: list[tuple[int, ...]]
    kernels: Path


@torch.no_grad()
def greedy(path: Path, attention: str, device: str) -> list[tuple[int, ...]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    model = model.eval().to(device)
    result = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NUM_NEW):
            top = model(torch.tensor([ids], device=device), use_cache=False).logits[0, -1].topk(2)
            assert top.values[0] - top.values[1] > 1e-4, "these weights must tell the first from the second"
            ids.append(int(top.indices[0]))
        result.append(tuple(ids[len(prompt) :]))
    return result


@pytest.fixture(scope="module", params=NAMES)
def known(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kernel_directory: Path, device: str
) -> Iterator[Known]:
    name = request.param
    path = tmp_path_factory.mktemp(name)
    save_checkpoint(make_config(FAMILIES[name], name), path)
    tokens = greedy(path, REFERENCE_ATTENTION.get(name, "eager"), device)
    with LLM(path, tiers=MemoryTiers(device="64MiB", host=0), device=device, compile=False) as llm:
        yield Known(llm, tokens, kernel_directory)


@contextmanager
def homes_of(
    known: Known, *, on_device: int, in_host: int, on_disk: int = 0, landing: int = 0, **limits: int
) -> Iterator[KVHomes]:
    """Give a model homes of so many blocks, room to read so many of them, and other limits."""
    llm = known.llm
    cost = replace(llm._kv_cost, block_tokens=SIZE)
    nbytes = on_device * cost.block_nbytes + 12 * cost.sequence_nbytes
    windows = {layer.layer: layer.window for layer in llm._shape.kv_windows}
    store = open_kv(limit_nbytes=nbytes, cost=cost, windows=windows, device=llm._device)
    sizes = on_disk * cost.on_disk.block_nbytes, landing * cost.stride_nbytes
    room = DiskRoom(*sizes, directory=llm.path, settings=ReadSettings(backend="threads")) if on_disk else None
    with (
        pytest.MonkeyPatch.context() as patch,
        KVHomes(
            store,
            cost=cost,
            host_nbytes=in_host * cost.block_nbytes,
            nvme=room,
            device=llm._device,
            kernel_directory=known.kernels,
        ) as homes,
    ):
        patch.setattr(llm, "_homes", homes)
        patch.setattr(llm._executor, "parked_tokens", limits.pop("parked_tokens", 1 << 20))
        patch.setattr(llm._executor, "runs_ahead", bool(limits.pop("runs_ahead", 1)))
        patch.setattr(llm, "_split_tokens", limits.pop("split_tokens", None))
        patch.setattr(llm, "plan", replace(llm.plan, **limits))
        yield homes


LONGEST = -(-(len(PROMPTS[-1]) + NUM_NEW) // SIZE)
requests = st.lists(st.tuples(st.integers(0, len(PROMPTS) - 1), st.integers(1, NUM_NEW)), min_size=1, max_size=8)


@settings(max_examples=6)
@given(
    requests,
    st.integers(LONGEST, 3 * LONGEST),
    st.integers(1, 4 * LONGEST),
    st.tuples(st.integers(0, 6 * LONGEST), st.integers(LONGEST, 3 * LONGEST)),
    st.integers(1, 40),
    st.integers(1, 80),
    st.sampled_from([0, 5, 1 << 20]),
    st.sampled_from([16, 1 << 20]),
    st.sampled_from([{}, {"runs_ahead": 0}, {"split_tokens": 1}, {"split_tokens": 60}]),
)
def test_random_schedules_over_three_homes_give_the_tokens_of_transformers(
    known: Known,
    requests: list[tuple[int, int]],
    on_device: int,
    in_host: int,
    nvme: tuple[int, int],
    micro: int,
    total: int,
    parked: int,
    scores: int,
    turns: dict[str, int],
) -> None:
    llm = known.llm
    micro = micro if llm.model.splits_prompts else max(micro, len(PROMPTS[-1]))
    limits = {"micro_batch_tokens": micro, "pass_tokens": max(micro, total), "max_scores": scores}
    on_disk, landing = nvme
    limits |= {"on_disk": on_disk, "landing": landing, "parked_tokens": parked} | turns
    with homes_of(known, on_device=on_device, in_host=in_host, **limits) as homes:
        params = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True) for _, count in requests]
        outputs = llm.generate([PROMPTS[prompt] for prompt, _ in requests], params)
        homes.check_integrity()
        after = homes.statistics()
        assert after.device.num_sequences == after.device.nbytes == 0
        assert after.host is not None
        assert after.host.num_free_blocks == after.host.num_blocks == in_host
        assert (after.nvme.num_free_blocks if after.nvme else 0) == on_disk
    made = [output.outputs[0].token_ids for output in outputs]
    assert made == [known.tokens[prompt][:count] for prompt, count in requests]


def test_a_full_device_sends_sequences_to_host_ram(known: Known) -> None:
    """No sequence waits, and each home has some; single tokens, prompts in parts and whole ones ride together."""
    llm, params = known.llm, SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True)
    micro = 16 if llm.model.splits_prompts else len(PROMPTS[-1])
    with homes_of(known, on_device=LONGEST, in_host=8 * LONGEST, micro_batch_tokens=micro, pass_tokens=2 * micro):
        outputs = llm.generate(PROMPTS, params)
        report = llm.last_run
    assert [output.outputs[0].token_ids for output in outputs] == known.tokens
    assert 1 <= report.peak_hosted < report.peak_sequences <= len(PROMPTS)
    assert report.num_passes <= NUM_NEW + 3


def test_a_full_device_sends_sequences_to_nvme(known: Known) -> None:
    """Rows are read back in turns, where the room to read them is less than they take."""
    llm, params = known.llm, SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True)
    micro = 16 if llm.model.splits_prompts else len(PROMPTS[-1])
    limits = {"micro_batch_tokens": micro, "pass_tokens": 2 * micro, "landing": LONGEST}
    with homes_of(known, on_device=LONGEST, in_host=0, on_disk=8 * LONGEST, **limits) as homes:
        outputs = llm.generate(PROMPTS[::-1], params)
        report, moved = llm.last_run, homes.statistics().disk
    assert [output.outputs[0].token_ids for output in outputs] == known.tokens[::-1]
    assert 1 < report.peak_on_nvme < report.peak_sequences
    assert moved.read_bytes > moved.written_bytes > 0


class Hosted:
    """Stands where a `Stream` has its store: every sequence's keys and values are in host RAM."""

    def __init__(self, stream: Stream, kernels: Path) -> None:
        stream.kv.acquire(0, num_tokens=12)
        stream.run([[(0, 0, 12)]])
        cost = replace(stream.kv.measure(), block_tokens=SIZE)
        stream.kv.release(0)
        device, no_tokens = stream.model.device, replace(cost, token_nbytes=1 << 40)
        states = KVStore(limit_nbytes=5 * cost.sequence_nbytes, cost=no_tokens, device=device)
        host = 20 * cost.block_nbytes
        self.homes = KVHomes(states, cost=cost, host_nbytes=host, device=device, kernel_directory=kernels)

    def __getattr__(self, name: str) -> Any:
        store: Any = self.homes if name in {"acquire", "release", "check_integrity"} else self.homes.beside[Tier.HOST]
        return getattr(store, name)


@pytest.mark.parametrize("name", NAMES)
def test_host_ram_alone_gives_the_logits_of_transformers(
    name: str, tmp_path: Path, device: str, kernel_directory: Path
) -> None:
    """With 16 scores at once, keys are copied from there head by head."""
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    stream = Stream.open(tmp_path, device=device)
    stream.max_scores = 16
    stream.kv = Hosted(stream, kernel_directory)
    with stream.kv.homes:
        assert worst_error(stream, reference(tmp_path, device=device)) <= 1e-4


@pytest.mark.parametrize(
    ("name", "reason"), [("bloom", "scores have a bias"), ("llama4_text", "keys are seen in chunks")]
)
def test_what_the_kernel_cannot_do_is_said_once(
    name: str, reason: str, tmp_path: Path, device: str, kernel_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "penstock.engine")
    hosted._say_once.cache_clear()
    save_checkpoint(make_config(FAMILIES[name], name), tmp_path)
    stream = Stream.open(tmp_path, device=device)
    stream.kv = Hosted(stream, kernel_directory)
    with stream.kv.homes:
        worst_error(stream, reference(tmp_path, device=device))
    said = [record.getMessage() for record in caplog.records if "copied to the device" in record.getMessage()]
    assert said == [f"keys and values in host RAM are copied to the device for attention: {reason}"]


def test_their_layers_run_eagerly_and_nothing_is_compiled_anew(
    tmp_path: Path, device: str, kernel_directory: Path
) -> None:
    save_checkpoint(make_config(FAMILIES["llama"], "llama"), tmp_path)
    stream = Stream.open(tmp_path, device=device, backend="inductor" if device == "cuda" else "eager")
    wanted, on_device = reference(tmp_path, device=device), stream.kv
    stream.kv = Hosted(stream, kernel_directory)
    counters.clear()
    with stream.kv.homes:
        assert worst_error(stream, wanted) <= 1e-4
    stream.kv = on_device
    assert worst_error(stream, wanted) <= 1e-4
    assert not counters["frames"], "a pass has compiled something"
    assert stream.compiler.report().num_compiled == 1
