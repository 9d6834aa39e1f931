"""Machines that are described, and ones that were measured."""

import json

import pytest
from made_profile import make_disk, make_profile

from penstock.errors import ConfigError, ProfileError
from penstock.offload.hardware import HardwareProfile
from penstock.offload.machines import HARDWARE, Hardware, find_hardware

NAMES = sorted(file.stem for file in HARDWARE.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_a_description_says_where_its_numbers_are_from(name):
    plain = json.loads((HARDWARE / f"{name}.json").read_text())
    assert plain["reference"] is True
    assert plain["source"]
    for rate in (*filter(None, plain["rates"].values()), *plain["matmul"].values()):
        assert 0 < rate["share"] <= 1
        assert rate["of"]
    machine = find_hardware(name)
    assert not machine.measured
    for dtype in ("bfloat16", "float32"):
        rates = machine.machine(dtype)
        assert None not in (rates.host_to_device, rates.nvme_to_host, rates.flops, rates.device_memory, rates.host_read)


def test_a_rate_is_a_share_of_the_data_sheet():
    plain = json.loads((HARDWARE / "a6000.json").read_text())["rates"]["host_to_device"]
    assert find_hardware("a6000").host_to_device == plain["data_sheet"] * plain["share"]


def test_a_machine_without_a_gpu_computes_in_its_memory():
    machine = find_hardware("cpu")
    assert machine.on_cpu
    assert machine.device_nbytes is None
    assert machine.device_memory == machine.host_read


def test_a_profile_is_a_machine(tmp_path):
    file = tmp_path / "profile.json"
    profile = make_profile(make_disk(rate=3e9), device="GPU", device_memory_nbytes=24 << 30, host_to_device=2e10)
    profile.store(file)
    machine = find_hardware(str(file))
    assert machine == Hardware.of(profile)
    assert (machine.measured, machine.on_cpu, machine.device_nbytes) == (True, False, 24 << 30)
    assert (machine.nvme_to_host, machine.host_to_device, machine.host_nbytes) == (3e9, 2e10, 1 << 37)


def test_a_profile_from_before_the_size_of_the_device_can_be_read(tmp_path):
    file = tmp_path / "profile.json"
    plain = make_profile(device_memory_nbytes=1 << 30).as_dict()
    del plain["links"]["device_memory_nbytes"]
    file.write_text(json.dumps(plain))
    assert HardwareProfile.load(file).links.device_memory_nbytes is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": "penstock-hardware/2"}', '{"schema": "penstock-hardware/1", "title": 1}']
)
def test_what_is_no_machine(tmp_path, text):
    file = tmp_path / "machine.json"
    file.write_text(text)
    with pytest.raises(ProfileError, match=r"machine\.json"):
        find_hardware(str(file))


def test_an_unknown_name_names_the_known_ones():
    with pytest.raises(ConfigError, match="a6000, cpu, h200, rtx4090"):
        find_hardware("b300")
