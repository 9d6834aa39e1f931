import math
import os
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import NoSpaceError, TargetError
from penstock.io import scratch
from penstock.io.dummy import dummy_file
from penstock.io.dummy_tensor import DummyTensor

TENSORS = [
    DummyTensor("layer.weight", "BF16", (300, 64)),
    DummyTensor("layer.bias", "BF16", (7,)),
    DummyTensor("norm.weight", "F16", (11,)),
    DummyTensor("wide.weight", "F16", (3, 5, 4096)),
    DummyTensor("gate.weight", "F32", (33, 100)),
    DummyTensor("counts", "I64", (3,)),
    DummyTensor("huge.weight", "BF16", (9000, 1001)),
]


def numbers(header, name):
    entry = header.tensors[name]
    with open(entry.file.path, "rb") as file:
        raw = os.pread(file.fileno(), entry.nbytes, entry.offset)
    if entry.dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F16": np.float16, "F32": np.float32, "I64": np.int64}[entry.dtype])


def test_it_is_a_safetensors_file_with_sane_numbers(tmp_path):
    done = []
    with dummy_file(tmp_path, TENSORS, on_write=lambda *state: done.append(state)) as header:
        assert [(t.name, t.dtype, t.shape) for t in header.tensors.values()] == [
            (t.name, t.dtype, t.shape) for t in TENSORS
        ]
        for name, fan in (("layer.weight", 64), ("wide.weight", 4096), ("gate.weight", 100), ("huge.weight", 1001)):
            values = numbers(header, name).astype(np.float64)
            assert np.isfinite(values).all()
            assert values.std() == pytest.approx(1 / math.sqrt(fan), rel=0.1)
        assert not numbers(header, "layer.bias").any()
        assert not numbers(header, "counts").any()
        assert (numbers(header, "norm.weight") == 1).all()
        assert done[-1] == (header.file.nbytes, header.file.nbytes)
        assert os.listdir(tmp_path) == []
    assert os.listdir(tmp_path) == []


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    found = []
    for seed in (1, 1, 2):
        with dummy_file(tmp_path, TENSORS[:1], seed=seed) as header:
            found.append(numbers(header, "layer.weight").tobytes())
    assert found[0] == found[1] != found[2]


def test_a_disk_without_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.os, "pwrite", None)
    huge = DummyTensor("huge.weight", "BF16", (1 << 30, 1 << 20))
    with pytest.raises(NoSpaceError, match="no space"), dummy_file(tmp_path, [huge]):
        pass


def test_memory_and_what_is_no_directory_are_refused(tmp_path):
    with pytest.raises(TargetError, match="lies in memory"), dummy_file(Path("/dev/shm"), TENSORS):
        pass
    with pytest.raises(TargetError, match="not a directory"), dummy_file(tmp_path / "none", TENSORS):
        pass
