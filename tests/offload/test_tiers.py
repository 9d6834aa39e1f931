import pytest

from penstock import MemoryTiers
from penstock.errors import SizeError
from penstock.offload.tiers import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("20GiB", 20 * 2**30),
        (" 20 gib ", 20 * 2**30),
        ("20G", 20 * 2**30),
        ("20GB", 20 * 10**9),
        ("1.5KiB", 1536),
        ("0.5T", 2**39),
        ("7B", 7),
    ],
)
def test_sizes_parse(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "20 XB", "1,5GiB", "٣GiB", -1, True, None, 1.5, "1.GiB"])
def test_what_is_no_size_is_refused_with_what_was_given(text):
    with pytest.raises(SizeError, match="not a memory size: wanted bytes, or a number with a unit") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


def test_sizes_for_people():
    assert [format_size(n) for n in (0, 1023, 1024, 1536, 3 * 2**30, 2**42)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 KiB",
        "3.00 GiB",
        "4.00 TiB",
    ]


def test_tiers_hold_bytes_and_cannot_be_changed():
    tiers = MemoryTiers(device="1GiB", host=5)
    assert (tiers.device, tiers.host, tiers.nvme, tiers.kv_host) == (2**30, 5, None, None)
    assert MemoryTiers(kv_host="1KiB").kv_host == 1024
    with pytest.raises(AttributeError):
        tiers.host = 6
