import json
import os

import pytest
import torch

from penstock.io.files import SourceFile
from penstock.offload.peaks import DiskPeak, measure_peaks


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "random"
    path.write_bytes(os.urandom(8 << 20))
    os.sync()
    return SourceFile.identify(path)


def test_what_a_run_is_compared_with(file, device):
    steps = []
    peaks = measure_peaks(file, device=torch.device(device), on_step=steps.append)
    assert steps[-1] == "disk"
    assert peaks.host_to_device > 0
    assert peaks.matmul["bfloat16"] > 0
    assert (peaks.device == "cpu") == (device == "cpu")
    assert json.loads(json.dumps(peaks.as_dict()))["nvme_to_host"] == peaks.disk.bytes_per_second > 0


def test_a_disk_is_read_in_the_same_way_again(file):
    disk = DiskPeak(file)
    for count in (1, 2, 3):
        disk.measure(0.01)
        assert len(disk.rates) == count
    assert min(disk.rates) <= disk.bytes_per_second <= max(disk.rates)


def test_a_file_that_is_too_small_or_gone_is_unknown(tmp_path, caplog):
    small = tmp_path / "small"
    small.write_bytes(bytes(4096))
    disk = DiskPeak(SourceFile.identify(small))
    disk.measure(0.01)
    assert disk.bytes_per_second is None
    large = tmp_path / "large"
    large.write_bytes(bytes(2 << 20))
    disk = DiskPeak(SourceFile.identify(large))
    large.unlink()
    disk.measure(0.01)
    assert disk.bytes_per_second is None
    assert "could not be measured" in caplog.text
