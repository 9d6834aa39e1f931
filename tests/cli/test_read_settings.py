"""What `penstock profile` has found is what commands read by, unless the user says otherwise."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from made_profile import CELL, make_disk, make_profile

from penstock.cli import profile as profile_command
from penstock.cli.main import main
from penstock.offload.hardware import HardwareProfile, profile_path

MIB = 1 << 20


@pytest.fixture
def profiled(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    number = os.stat(tiny_llama).st_dev
    disk = make_disk(device=f"{os.major(number)}:{os.minor(number)}")
    cell = replace(CELL, block_nbytes=2 * MIB, depth=96)
    disk = replace(disk, sweep=replace(disk.sweep, choice=replace(disk.sweep.choice, cell=cell)))
    path = profile_path(str(tmp_path))
    make_profile(disk).store(path)
    return path


def reader(capsys, model, *arguments):
    status = main(["generate", "--device", "cpu", str(model), "--prompts", "-", "--json", *arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out.splitlines()[-1])["reader"], captured.err


@pytest.fixture
def a_prompt(monkeypatch, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_token_ids": [5, 6, 7], "max_tokens": 2}\n')
    with open(path) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        yield


def test_the_profile_is_used(capsys, tiny_llama, profiled, a_prompt):
    found, _ = reader(capsys, tiny_llama)
    assert (found["block_bytes"], found["in_flight_bytes"]) == (2 * MIB, 192 * MIB)


def test_options_come_first(capsys, tiny_llama, profiled, a_prompt):
    options = ["--io-block", "512KiB", "--io-in-flight", "8MiB", "--io-backend", "threads"]
    found, _ = reader(capsys, tiny_llama, *options)
    assert (found["name"], found["block_bytes"], found["in_flight_bytes"]) == ("threads", MIB // 2, 8 * MIB)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "the profile is damaged"), ('{"schema": "penstock-profile/1"}', "another version")]
)
def test_a_profile_of_no_use_is_said_and_the_machine_measured_again(
    capsys, tiny_llama, profiled, a_prompt, monkeypatch, tmp_path, text, message
):
    """Once: the next command finds what was measured."""
    monkeypatch.setattr(profile_command, "QUICK", 5.0)
    monkeypatch.chdir(tmp_path)
    profiled.write_text(text)
    found, err = reader(capsys, tiny_llama)
    assert found["block_bytes"] >= MIB // 4
    assert f"{profiled}: {message}" in err
    assert "in at most 5 s" in err
    assert [disk.target.path for disk in HardwareProfile.load(profiled).disks] == ["."]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl"] == ["penstock"]


def test_what_was_measured_serves_where_it_cannot_be_kept(tiny_llama, monkeypatch, caplog):
    monkeypatch.setattr(profile_command, "QUICK", 5.0)
    measured = profile_command.measure_again(tiny_llama, Path("/proc/nowhere/profile.json"))
    assert measured.links.host_read
    assert "what was measured is not kept" in caplog.text


def test_where_a_machine_cannot_be_measured_it_is_said(capsys, caplog, tiny_llama, profiled, a_prompt, monkeypatch):
    profiled.write_text("{")
    monkeypatch.chdir("/proc")
    found, _ = reader(capsys, tiny_llama)
    assert (found["block_bytes"], found["in_flight_bytes"]) == (None, 96 * MIB)
    assert "this machine could not be measured" in caplog.text


def test_values_out_of_range(capsys, tiny_llama, profiled, a_prompt):
    assert main(["generate", "--device", "cpu", str(tiny_llama), "--prompts", "-", "--io-block", "1000"]) == 1
    assert "ConfigError: the read block size is out of range" in capsys.readouterr().err
