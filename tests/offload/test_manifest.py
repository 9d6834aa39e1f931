"""Manifests that are damaged, hostile, or belong to other files."""

from __future__ import annotations

import dataclasses
import json
import zlib

import pytest
import torch
from safetensors.torch import save_file

from penstock.errors import CheckpointError, ChecksumError, ManifestError, MissingWeightError
from penstock.io.checkpoint import Checkpoint
from penstock.offload.codec import Coding, PackOptions
from penstock.offload.manifest import (
    MANIFEST,
    CodedTensor,
    FileRecord,
    Manifest,
    TensorRecord,
    manifest_text,
    open_stored,
    read_manifest,
)

CODING = Coding("int8", "BF16", (4, 64), 32, symmetric=True)


@pytest.fixture
def packed(tmp_path):
    """A directory with one coded tensor and one plain one, and its manifest."""
    tensors = {
        "a.int8": torch.ones(4, 64, dtype=torch.int8),
        "a.int8_scale": torch.ones(4, 2).bfloat16(),
        "b": torch.ones(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    manifest = Manifest(
        format="penstock packed checkpoint",
        version=1,
        options=PackOptions("int8", 32, symmetric=True, search=False),
        source=(),
        files={"config.json": FileRecord(2, 2, zlib.crc32(b"{}"))},
        tensors={"a": TensorRecord(CODING, (1, 2)), "b": TensorRecord(None, (3,))},
    )
    (tmp_path / MANIFEST).write_text(manifest_text(manifest))
    return tmp_path, manifest


def test_what_is_written_is_read(packed):
    path, manifest = packed
    assert read_manifest(path) == manifest
    stored = open_stored(Checkpoint.open(path))
    assert set(stored.tensors) == {"a", "b"}
    assert isinstance(stored.tensors["a"], CodedTensor)
    assert stored.tensors["a"].shape == (4, 64)
    assert {name: check.crc32 for name, check in stored.checks.items()} == {"a.int8": 1, "a.int8_scale": 2, "b": 3}


def test_a_directory_without_one_is_not_packed(packed):
    path, _ = packed
    (path / MANIFEST).unlink()
    assert set(open_stored(Checkpoint.open(path)).tensors) == {"a.int8", "a.int8_scale", "b"}


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"crc32": 1}', "{" * 100_000, "\x00", '{"version": 2}'])
def test_nonsense(packed, content):
    path, _ = packed
    (path / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(path)


def rewritten(path, **changes):
    """Change fields of the stored manifest and give it a checksum that fits."""
    plain = json.loads((path / MANIFEST).read_text()) | changes
    plain.pop("crc32")
    plain["crc32"] = zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())
    (path / MANIFEST).write_text(json.dumps(plain))
    return Checkpoint.open(path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"version": 2}, "another version"), ({"more": 1}, "not a manifest"), ({"tensors": 5}, "not a manifest")],
)
def test_another_manifest(packed, changes, what):
    with pytest.raises(ManifestError, match=what):
        open_stored(rewritten(packed[0], **changes))


@pytest.mark.parametrize(
    ("record", "error", "what"),
    [
        (TensorRecord(CODING, (1,)), ManifestError, "1 checksums"),
        (TensorRecord(dataclasses.replace(CODING, codec="int4"), (1, 2)), MissingWeightError, "a.int4"),
        (TensorRecord(dataclasses.replace(CODING, shape=(4, 65)), (1, 2)), ManifestError, "does not fit"),
        (TensorRecord(dataclasses.replace(CODING, shape=(-4, 64)), (1, 2)), ManifestError, "cannot be coded"),
        (TensorRecord(dataclasses.replace(CODING, group_size=0), (1, 2)), ManifestError, "cannot be coded"),
        (TensorRecord(dataclasses.replace(CODING, dtype="I64"), (1, 2)), ManifestError, "cannot be coded"),
        (TensorRecord(Coding("exact", "F32", (4, 64)), (1, 2)), ManifestError, "cannot be coded"),
        (TensorRecord(dataclasses.replace(CODING, symmetric=False), (1, 2, 3)), MissingWeightError, "int8_zero"),
    ],
)
def test_records_that_do_not_fit_the_files(packed, record, error, what):
    path, manifest = packed
    changed = dataclasses.replace(manifest, tensors={**manifest.tensors, "a": record})
    (path / MANIFEST).write_text(manifest_text(changed))
    with pytest.raises(error, match=what):
        open_stored(Checkpoint.open(path))


@pytest.mark.parametrize("name", ["../file", "/etc/passwd", "a/b", ".."])
def test_files_elsewhere(packed, name):
    path, manifest = packed
    (path / MANIFEST).write_text(manifest_text(dataclasses.replace(manifest, files={name: FileRecord(0, 0, 0)})))
    with pytest.raises((ManifestError, ChecksumError)):
        open_stored(Checkpoint.open(path))


def test_files_that_are_not_those_that_were_packed(packed):
    path, manifest = packed
    (path / "config.json").write_text("[]")
    with pytest.raises(ChecksumError, match=r"config\.json"):
        open_stored(Checkpoint.open(path))
    (path / "config.json").unlink()
    with pytest.raises(ManifestError, match=r"config\.json"):
        open_stored(Checkpoint.open(path))
    (path / MANIFEST).write_text(manifest_text(dataclasses.replace(manifest, files={}, tensors={})))
    with pytest.raises(ManifestError, match="in no record"):
        open_stored(Checkpoint.open(path))
