import os

import numpy as np
import pytest
import safetensors.numpy
from hostile_headers import CASES, DATA, Case, one, pack
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from penstock.errors import CheckpointError, HeaderError, MissingFileError, ReadError
from penstock.io.header import read_header

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def library_accepts(path):
    try:
        with safe_open(path, framework="np") as file:
            list(file.keys())
    except SafetensorError:
        return False
    return True


@each_case
def test_verdict_on_every_case(case: Case, tmp_path):
    path = tmp_path / "case.safetensors"
    path.write_bytes(case.content)
    if case.error is None:
        header = read_header(path)
        assert header.file.nbytes == len(case.content)
        return
    with pytest.raises(case.error) as caught:
        read_header(path)
    assert type(caught.value) is case.error
    assert str(path) in str(caught.value)
    assert caught.value.fix


@each_case
def test_never_laxer_than_the_library(case: Case, tmp_path):
    path = tmp_path / "case.safetensors"
    path.write_bytes(case.content)
    assert library_accepts(path) == (case.error is None or case.stricter)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutations_are_never_laxer_than_the_library(data, tmp_path_factory):
    content = bytearray(data.draw(st.sampled_from([case.content for case in CASES if case.error is None])))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        byte = data.draw(st.sampled_from(b'0123456789-+.eE"{}[],: \\\x00\xff'))
        if data.draw(st.booleans()):
            content[place] = byte
        else:
            content.insert(place, byte)
            content[0] = (content[0] + 1) % 256
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        read_header(path)
    except CheckpointError:
        return
    assert library_accepts(path)


arrays = st.builds(
    lambda dtype, shape: np.arange(int(np.prod(shape)), dtype=np.int64).astype(dtype).reshape(shape),
    st.sampled_from(
        ["bool", "uint8", "int8", "int16", "float16", "int32", "float32", "float64", "uint64", "complex64"]
    ),
    st.lists(st.integers(0, 4), max_size=4),
)


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), arrays, max_size=6),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3),
)
def test_round_trip(tensors, metadata, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round-trip.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    content = path.read_bytes()
    header = read_header(path)
    assert header.metadata == metadata
    assert header.tensors.keys() == tensors.keys()
    offsets = [entry.offset for entry in header.tensors.values()]
    assert offsets == sorted(offsets)
    for name, entry in header.tensors.items():
        assert entry.name == name
        assert entry.shape == tensors[name].shape
        assert content[entry.offset : entry.offset + entry.nbytes] == tensors[name].tobytes()
    assert header.data_start + sum(entry.nbytes for entry in header.tensors.values()) == len(content)


def test_the_file_is_identified(tmp_path):
    blob, link = tmp_path / "blob", tmp_path / "model.safetensors"
    blob.write_bytes(pack(one(), DATA))
    link.symlink_to(blob)
    file = read_header(link).file
    status = blob.stat()
    assert file.path == link
    assert (file.nbytes, file.device, file.inode, file.mtime_ns) == (
        status.st_size,
        status.st_dev,
        status.st_ino,
        status.st_mtime_ns,
    )


def test_the_limit_is_checked_before_the_size_and_can_be_raised(tmp_path):
    path = tmp_path / "wide.safetensors"
    path.write_bytes(pack("{}".ljust(2000)))
    with pytest.raises(HeaderError, match="too large"):
        read_header(path, max_header_bytes=1999)
    assert read_header(path, max_header_bytes=2000).tensors == {}


def test_lfs_pointers_say_what_to_do(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(HeaderError, match="git lfs pull"):
        read_header(path)


def test_missing(tmp_path):
    with pytest.raises(MissingFileError):
        read_header(tmp_path / "nothing")


def test_neither_directories_nor_pipes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(HeaderError, match="not a regular file"):
            read_header(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path):
    path = tmp_path / "locked"
    path.write_bytes(b"")
    path.chmod(0)
    with pytest.raises(ReadError, match="permission"):
        read_header(path)
