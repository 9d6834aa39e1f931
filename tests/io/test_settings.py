import pytest

from penstock.errors import ConfigError
from penstock.io.settings import NUM_REGIONS, ReadSettings

MIB = 1 << 20


@pytest.mark.parametrize("in_flight", [4096, MIB, 96 * MIB, 97 * MIB, 1024 * MIB])
def test_all_but_one_region_hold_what_is_in_flight(in_flight):
    region = ReadSettings(in_flight_nbytes=in_flight).region_nbytes
    assert (NUM_REGIONS - 1) * region >= in_flight
    assert region % (2 * MIB) == 0
    assert region - 2 * MIB < in_flight / (NUM_REGIONS - 1)


@pytest.mark.parametrize(
    "values",
    [
        {"block_nbytes": 1000},
        {"block_nbytes": 0},
        {"block_nbytes": 65 * MIB},
        {"block_nbytes": 2 * MIB, "in_flight_nbytes": MIB},
        {"in_flight_nbytes": 0},
        {"in_flight_nbytes": 2048 * MIB},
    ],
)
def test_values_out_of_range(values):
    with pytest.raises(ConfigError, match="out of range"):
        ReadSettings(**values)
