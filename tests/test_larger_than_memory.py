"""A checkpoint of more than 6 GB runs inside a memory limit of 2 GiB that the kernel enforces."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from memory_limits import memory_limit

from penstock.io.limits import available_memory
from penstock.offload.tiers import parse_size

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


def generate(big, *memory, **options):
    command = [sys.executable, "-m", "penstock", "generate", big / "model", "--prompts", big / "prompts.jsonl"]
    command += ["--device", "cpu", "--max-tokens", "2", "--ignore-eos", "--json", *memory]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    *records, summary = map(json.loads, done.stdout.splitlines())
    return [record["token_ids"] for record in records], summary


@pytest.fixture(scope="module")
def tokens(big):
    """The tokens of a run in 600 MiB of device memory and nothing else, inside the limit."""
    with memory_limit(LIMIT) as (_, enter, peak):
        tokens, summary = generate(big, "--device-memory", "600MiB", "--host-memory", "0", preexec_fn=enter)
        assert peak is None or int(peak.read_text()) <= LIMIT
    assert summary["memory"]["peak_process_bytes"] <= 600 * 2**20 + CONSTANT
    assert summary["layers"] == {"device": 0, "host": 0, "nvme": 34}
    assert summary["links"]["nvme_to_host"]["bytes"] >= 2 * 6 * 10**9
    assert summary["plan"]["device_nbytes"] <= 600 * 2**20
    return tokens


@pytest.mark.parametrize(
    ("device", "host", "layers"),
    [
        ("2GiB", "2GiB", None),
        ("600MiB", "6500MiB", {"device": 0, "host": 34, "nvme": 0}),
        ("9GiB", "0", {"device": 34, "host": 0, "nvme": 0}),
    ],
)
def test_every_mix_of_tiers_gives_the_same_tokens(big, tokens, device, host, layers):
    if (needed := parse_size(device) + parse_size(host) + CONSTANT) > available_memory():
        pytest.skip(f"needs {needed} bytes of free memory")
    found, summary = generate(big, "--device-memory", device, "--host-memory", host)
    assert found == tokens
    assert summary["layers"] == layers if layers else all(summary["layers"].values())
