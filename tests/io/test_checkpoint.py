import json

import numpy as np
import pytest
from hostile_headers import DATA, one, pack
from safetensors.numpy import save_file

from penstock.errors import HeaderError, IndexFileError, MissingFileError, UnsupportedFormatError
from penstock.io.checkpoint import Checkpoint


def write_shards(directory, shards):
    """Write shards {file: {tensor: array}} and return their index."""
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.fixture
def sharded(tmp_path):
    write_shards(
        tmp_path,
        {
            "model-1.safetensors": {"a": np.arange(6, dtype=np.float32), "b": np.zeros((2, 3), np.int8)},
            "model-2.safetensors": {"c": np.ones(5, np.float64)},
        },
    )
    return tmp_path


def rewrite_index(directory, text):
    (directory / "model.safetensors.index.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def test_single_file(tmp_path):
    save_file({"a": np.arange(6, dtype=np.float32)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["a"]
    assert checkpoint.nbytes == 24
    assert [file.path.name for file in checkpoint.files] == ["model.safetensors"]
    assert checkpoint.directory == tmp_path


def test_shards(sharded):
    checkpoint = Checkpoint.open(str(sharded))
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert checkpoint.tensors["c"].file.path.name == "model-2.safetensors"
    assert checkpoint.nbytes == 24 + 6 + 40
    assert [file.path.name for file in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]


def test_the_single_file_comes_first_as_in_transformers(sharded):
    save_file({"x": np.zeros(1)}, sharded / "model.safetensors")
    assert set(Checkpoint.open(sharded).tensors) == {"x"}


def test_tensors_that_the_index_leaves_out_count_as_in_transformers(sharded):
    rewrite_index(sharded, json.dumps({"weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors"}}))
    assert set(Checkpoint.open(sharded).tensors) == {"a", "b", "c"}


def test_symlinked_shards_of_the_hub_cache(sharded, tmp_path_factory):
    blobs = tmp_path_factory.mktemp("blobs")
    for shard in sharded.glob("*.safetensors"):
        blob = shard.rename(blobs / f"blob-of-{shard.stem}")
        shard.symlink_to(blob)
    assert set(Checkpoint.open(sharded).tensors) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "shard",
    [
        "../model-1.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "",
        ".",
        "..",
        "a\0b",
        "a\\b",
        "\ud800",
        1,
        None,
    ],
)
def test_shards_outside_the_directory(sharded, shard):
    rewrite_index(sharded, json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(IndexFileError, match="plain file name"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "model-1.safetensors"',
        '{"weight_map": {"a": "model-1.safetensors", "a": "model-1.safetensors"}}',
        '{"weight_map": {}, "weight_map": {"a": "model-1.safetensors"}}',
        b"\xff{}",
        "[" * 100_000,
    ],
)
def test_malformed_indexes(sharded, text):
    rewrite_index(sharded, text)
    with pytest.raises(IndexFileError) as caught:
        Checkpoint.open(sharded)
    assert "index.json" in str(caught.value)


def test_index_too_large(sharded):
    with open(sharded / "model.safetensors.index.json", "ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(IndexFileError, match="too large"):
        Checkpoint.open(sharded)


def test_missing_shard_names_shard_and_index(sharded):
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"model-2\.safetensors.*model\.safetensors\.index\.json"):
        Checkpoint.open(sharded)


def test_mapped_tensor_not_in_its_shard(sharded):
    rewrite_index(sharded, json.dumps({"weight_map": {"a": "model-1.safetensors", "zzz": "model-2.safetensors"}}))
    with pytest.raises(IndexFileError, match="'zzz'"):
        Checkpoint.open(sharded)


def test_tensor_in_two_shards(tmp_path):
    write_shards(tmp_path, {"1.safetensors": {"a": np.zeros(1), "b": np.zeros(1)}, "2.safetensors": {"a": np.zeros(1)}})
    with pytest.raises(IndexFileError, match="in both"):
        Checkpoint.open(tmp_path)


def test_faults_in_a_shard_name_the_shard(sharded):
    (sharded / "model-2.safetensors").write_bytes(pack(one(dtype="F128"), DATA))
    with pytest.raises(HeaderError, match=r"model-2\.safetensors"):
        Checkpoint.open(sharded)


def test_missing_directory(tmp_path):
    with pytest.raises(MissingFileError, match="no such checkpoint directory"):
        Checkpoint.open(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.gguf"])
def test_other_formats_say_how_to_convert(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UnsupportedFormatError, match="save_pretrained"):
        Checkpoint.open(tmp_path)


def test_other_names_are_not_guessed_as_in_transformers(tmp_path):
    save_file({"a": np.zeros(1)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(MissingFileError, match="consolidated"):
        Checkpoint.open(tmp_path)


def test_empty_directory(tmp_path):
    with pytest.raises(MissingFileError, match="no weights"):
        Checkpoint.open(tmp_path)
