"""A checkpoint of more than 6 GB runs inside a memory limit of 2 GiB that the kernel enforces."""

import json
import os
import resource
import shutil
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.io.limits import available_memory

LIMIT = 2 * 2**30
CONSTANT = 768 * 2**20
"""What a process takes besides its budgets: the interpreter, torch, transformers, and 128 MiB of staging."""

SCRIPT = Path(__file__).parents[1] / "scripts" / "make-checkpoint"
PROMPTS = [[1, 5, 9, 33, 77, 120, 500, 71], [2, 5, 9], [3, 5, 9, 33, 77, 120, 500, 73, 11, 12, 13, 14, 15]]

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    if shutil.disk_usage(tmp_path_factory.getbasetemp()).free < 10 * 10**9:
        pytest.skip("needs 10 GB of free disk")
    path = tmp_path_factory.mktemp("big")
    made = subprocess.run([sys.executable, SCRIPT, path / "model"], check=True, capture_output=True, text=True)
    assert json.loads(made.stdout)["bytes"] >= 6 * 10**9
    (path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt_token_ids": ids}) for ids in PROMPTS))
    yield path
    shutil.rmtree(path)


@contextmanager
def memory_limit():
    """Yield what to run before exec in a child to limit its memory, and a function that says what it took at most.

    A memory control group of version 2 or 1 where one can be made; else the limit on private writable memory.
    """
    name = f"penstock-test-{uuid.uuid4().hex}"
    for root, limit, peak in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    ):
        group = root / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                (group / limit).write_text(str(LIMIT))
                yield lambda group=group: (group / "cgroup.procs").write_text(str(os.getpid())), group / peak
                return
        finally:
            group.rmdir()
    yield lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)), None


def generate(big, *memory, **options):
    command = [sys.executable, "-m", "penstock", "generate", big / "model", "--prompts", big / "prompts.jsonl"]
    command += ["--device", "cpu", "--max-tokens", "3", "--ignore-eos", "--json", *memory]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    *records, summary = map(json.loads, done.stdout.splitlines())
    return [record["token_ids"] for record in records], summary


def test_every_mix_of_tiers_gives_the_same_tokens_and_the_smallest_stays_within_2_gib(big):
    with memory_limit() as (enter, peak):
        tokens, summary = generate(big, "--device-memory", "600MiB", "--host-memory", "0", preexec_fn=enter)
        assert peak is None or int(peak.read_text()) <= LIMIT
    assert summary["memory"]["peak_process_bytes"] <= 600 * 2**20 + CONSTANT
    assert summary["layers"] == {"device": 0, "host": 0, "nvme": 34}
    assert summary["links"]["nvme_to_host"]["bytes"] >= 3 * 6 * 10**9
    assert summary["plan"]["device_nbytes"] <= 600 * 2**20
    mixed, summary = generate(big, "--device-memory", "2GiB", "--host-memory", "2GiB")
    assert all(summary["layers"].values())
    assert mixed == tokens
    if available_memory() > 10 * 2**30:
        in_host, summary = generate(big, "--device-memory", "600MiB", "--host-memory", "6500MiB")
        assert summary["layers"] == {"device": 0, "host": 34, "nvme": 0}
        assert in_host == tokens
        on_device, summary = generate(big, "--device-memory", "9GiB", "--host-memory", "0")
        assert summary["layers"] == {"device": 34, "host": 0, "nvme": 0}
        assert on_device == tokens
