"""`--codec`: packing on load, from the command line."""

import json

import pytest

from penstock.cli.main import main
from penstock.engine.llm import DEFAULT_MODEL
from penstock.offload.peaks import DiskPeak, Peaks

PROMPT = ["--prompt", "class Stack:\n    def __init__(self):\n", "--max-tokens", "6", "--device", "cpu", "--json"]
MEMORY = ["--device-memory", "13MiB", "--host-memory", "40MiB"]


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_generate_packs_on_load_and_loses_nothing(capsys):
    _, wanted, _ = run(capsys, "generate", *PROMPT, *MEMORY)
    status, found, _ = run(capsys, "generate", "--codec", "exact", "--verify", *PROMPT, *MEMORY)
    assert status == 0
    tokens = [json.loads(text.splitlines()[0])["token_ids"] for text in (wanted, found)]
    assert tokens[0] == tokens[1]
    summaries = [json.loads(text.splitlines()[-1]) for text in (wanted, found)]
    assert [one["codec"] for one in summaries] == [None, "exact"]
    assert summaries[1]["plan"]["host_nbytes"] < 0.76 * summaries[0]["plan"]["host_nbytes"]


def test_jobs_take_a_codec(tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "import os"}\n{"text": "import sys"}\n')
    job = ["score", source, target, "--device", "cpu", *MEMORY]
    assert run(capsys, *job, "--codec", "int8", "--group-size", "32", "--exclude", "*.k_proj.*")[0] == 0
    first = target.read_text()
    assert run(capsys, *job, "--overwrite")[0] == 0
    assert target.read_text() != first


@pytest.mark.parametrize(("codec", "ratio"), [("exact", 1.32), ("int4", 3.6)])
def test_bench_says_what_decoded_weights_arrive_at(capsys, monkeypatch, codec, ratio):
    from penstock.engine import bench

    monkeypatch.setattr(bench, "measure_peaks", lambda file, **_: Peaks("a device", 1e9, None, DiskPeak(file), {}))
    work = ["--device", "cpu", "--prompt-len", "4", "--gen-len", "4", "--batch-size", "2", "--device-layers", "0"]
    status, out, _ = run(capsys, "bench", DEFAULT_MODEL, "--codec", codec, *work, *MEMORY)
    assert status == 0
    assert "weights as computed with" in out
    record = json.loads(out.splitlines()[-1])
    assert record["codec"] == codec
    phase = record["decode_steady"]
    weights = phase["weights"]
    assert weights["decoded_bytes"] / phase["links"]["host_to_device"]["bytes"] == pytest.approx(ratio, rel=0.02)
    assert weights["share_of_link_peak"] == pytest.approx(weights["gbps"])
    share = weights["expand_seconds"] / weights["transfer_seconds"]
    assert weights["expand_share_of_transfer"] == pytest.approx(share)
    assert share > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--codec", "exact", "--group-size", "64"], "no groups"),
        (["--group-size", "64"], "--group-size is for packing on load"),
        (["--no-symmetric"], "--symmetric is for packing on load"),
        (["--exclude", "*"], "--exclude is for packing on load"),
        (["--codec", "int8", "--exclude", "nothing*"], "nothing to exclude"),
        (["--codec", "int8", "--verify"], "compares with the weights as they are stored"),
        (["--codec", "exact", "--host-memory", "1MiB"], "packed on load cannot be left on NVMe"),
    ],
)
def test_options_that_do_not_go_together(capsys, arguments, message):
    status, out, error = run(capsys, "generate", *PROMPT, *MEMORY, *arguments)
    assert status == 1
    assert message in error
    assert not out
