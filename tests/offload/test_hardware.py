import json
import os
from dataclasses import replace

import pytest
from made_profile import CELL, make_disk, make_profile

from penstock.errors import OutputError, ProfileError
from penstock.io.settings import ReadSettings
from penstock.offload.hardware import HardwareProfile, compare, profile_path, settings_of


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "cache" / "profile.json"
    make_profile(host_to_device=55e9).store(path)
    return path


def test_what_is_stored_is_what_is_loaded(stored):
    assert HardwareProfile.load(stored) == make_profile(host_to_device=55e9)
    assert [path.name for path in stored.parent.iterdir()] == ["profile.json"]
    make_profile().store(stored)
    assert HardwareProfile.load(stored) == make_profile()


def test_it_is_plain_json_with_its_schema_first(stored):
    plain = json.loads(stored.read_text())
    assert next(iter(plain.items())) == ("schema", "penstock-profile/2")
    assert plain["disks"][0]["sweep"]["choice"]["bytes_per_second"] == 6e9
    assert plain["links"]["device_to_host"] is None


def change(path, edit):
    plain = json.loads(path.read_text())
    edit(plain)
    path.write_text(json.dumps(plain))


DAMAGES = {
    "missing field": lambda plain: plain["host"].pop("cpus"),
    "unknown field": lambda plain: plain["links"].update(speed=1),
    "text for a number": lambda plain: plain["links"].update(host_to_device="fast"),
    "a boolean for a number": lambda plain: plain.update(elapsed_seconds=True),
    "a number for a boolean": lambda plain: plain.update(complete=1),
    "a float for a count": lambda plain: plain["host"].update(cpus=2.5),
    "null where something must be": lambda plain: plain.update(penstock=None),
    "an object for a list": lambda plain: plain.update(disks={}),
    "no such engine": lambda plain: plain["disks"][0].update(engine="io_uring"),
    "a pair of three": lambda plain: plain["disks"][0]["sweep"].update(repeats=[[1, 2, 3]]),
    "a list for an object": lambda plain: plain.update(host=[]),
    "a bad item deep inside": lambda plain: plain["disks"][0]["sweep"]["cells"][0]["cell"].update(depth="1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_its_place(stored, damage):
    change(stored, DAMAGES[damage])
    with pytest.raises(ProfileError, match="damaged") as caught:
        HardwareProfile.load(stored)
    assert str(stored) in str(caught.value)
    assert "penstock profile" in str(caught.value)


def test_the_place_is_a_path(stored):
    change(stored, DAMAGES["a bad item deep inside"])
    with pytest.raises(ProfileError, match=r"disks\[0\]\.sweep\.cells\[0\]\.cell\.depth: wanted int, got '1'"):
        HardwareProfile.load(stored)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"schema": "penstock-profile/2"', "\xff", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100000],
)
def test_what_is_no_profile(stored, text):
    stored.write_text(text, encoding="latin-1")
    with pytest.raises(ProfileError):
        HardwareProfile.load(stored)


@pytest.mark.parametrize("schema", ["penstock-profile/1", "nvme-profile/1", None, 1, []])
def test_another_version_is_refused_as_such(stored, schema):
    change(stored, lambda plain: plain.update(schema=schema))
    with pytest.raises(ProfileError, match=r"another version.*wanted penstock-profile/2"):
        HardwareProfile.load(stored)


def test_a_truncated_file_is_refused_at_every_length(stored):
    content = stored.read_bytes()
    for length in range(0, len(content) - 2, 97):
        stored.write_bytes(content[:length])
        with pytest.raises(ProfileError):
            HardwareProfile.load(stored)


def test_no_profile(tmp_path):
    with pytest.raises(ProfileError, match="No such file"):
        HardwareProfile.load(tmp_path / "none.json")
    with pytest.raises(ProfileError, match="Is a directory"):
        HardwareProfile.load(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"profile\.json"):
        make_profile().store(tmp_path / "file" / "profile.json")


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        profile_path(None) == profile_path("") == profile_path("relative") == tmp_path / ".cache/penstock/profile.json"
    )
    assert profile_path("/x") == tmp_path.__class__("/x/penstock/profile.json")


def test_a_disk_is_found_by_what_lies_on_it(tmp_path):
    device = os.stat(tmp_path).st_dev
    here = make_disk(device=f"{os.major(device)}:{os.minor(device)}")
    profile = make_profile(make_disk(), here)
    assert profile.disk_for(tmp_path) is here
    assert make_profile().disk_for(tmp_path) is None


def test_comparing_says_what_changed_beyond_the_noise():
    old = make_profile(make_disk(6e9), host_to_device=55e9, host_read=1e11)
    new = make_profile(make_disk(5e9), host_to_device=55.5e9)
    changes = {each.name.split(": ")[-1]: each for each in compare(old, new)}
    assert changes["disk read, recommended"].ratio == pytest.approx(5 / 6)
    assert changes["disk read, recommended"].significant
    assert not changes["host → device"].significant
    assert not changes["recommended bytes in flight"].significant
    assert "host memory, read" not in changes
    assert not changes["matrix product, bfloat16"].significant


def test_a_noisy_disk_needs_a_larger_change():
    old, new = make_profile(make_disk(6e9, noise=0.3)), make_profile(make_disk(5e9))
    assert not any(each.significant for each in compare(old, new))


def test_disks_that_do_not_belong_together_are_not_compared():
    old = make_profile(make_disk(device="1:1"), make_disk(device="1:2"))
    assert not any("disk" in each.name for each in compare(old, make_profile(make_disk(device="1:3"))))
    assert any("disk" in each.name for each in compare(make_profile(make_disk(device="1:1")), make_profile()))


def test_how_a_disk_is_read(tmp_path):
    """Blocks are the recommended ones; what is in flight only ever grows."""
    here = os.stat(tmp_path).st_dev
    device = f"{os.major(here)}:{os.minor(here)}"
    profile = make_profile(make_disk(device="259:77"), make_disk(device=device))
    assert profile.settings_for(tmp_path) == ReadSettings(block_nbytes=1 << 20, in_flight_nbytes=96 << 20)
    choice = profile.disks[1].sweep.choice
    wide = replace(choice, cell=replace(CELL, depth=256))
    assert settings_of(wide) == ReadSettings(block_nbytes=1 << 20, in_flight_nbytes=256 << 20)
    assert make_profile(make_disk(device="259:77")).settings_for(tmp_path) is None
