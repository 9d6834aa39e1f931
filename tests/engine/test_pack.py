"""Packed checkpoints: what comes back, what a kill leaves, and what a flipped bit does."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.engine import pack_journal, pack_writer
from penstock.engine.llm import DEFAULT_MODEL, LLM
from penstock.engine.model.build import load_model
from penstock.engine.pack import _TensorPacker, pack
from penstock.engine.quality import layer_errors, perplexity
from penstock.engine.sampling_params import SamplingParams
from penstock.engine.verify import verify
from penstock.errors import (
    CheckpointError,
    ChecksumError,
    ConfigError,
    FileChangedError,
    JournalError,
    NoSpaceError,
    OutputError,
    PenstockError,
    ReadError,
)
from penstock.io.checkpoint import Checkpoint
from penstock.offload.codec import Coding, PackOptions
from penstock.offload.decode import read_all, read_tensor
from penstock.offload.encode import DoesNotPay, ExactEncoder
from penstock.offload.manifest import MANIFEST, open_stored, read_manifest
from penstock.offload.tiers import MemoryTiers, Tier

PROMPTS = ["class Point:\n    def __init__(self, x, y):\n", "import os\n\n\ndef read_file(path):\n"]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
TIERS = {"device": ("200MiB", "0"), "host": ("13MiB", "40MiB"), "nvme": ("13MiB", "0")}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The bundled model, packed with every codec."""
    root = tmp_path_factory.mktemp("packed")
    for codec in ("exact", "int8", "int4"):
        pack(DEFAULT_MODEL, root / codec, PackOptions(codec))
    return root


def generate(path, memory="200MiB", host="0", device="cpu", layers=None):
    with LLM(path, device=device, tiers=MemoryTiers(device=memory, host=host), device_layers=layers) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        return outputs, [len(llm.plan.layers_in(tier)) for tier in ("device", "host", "nvme")]


@pytest.fixture(scope="module")
def tokens(device):
    return [output.outputs[0].token_ids for output in generate(DEFAULT_MODEL, device=device)[0]]


@pytest.mark.parametrize("tier", TIERS)
def test_exact_gives_the_same_tokens_from_every_tier(packed, tokens, tier, device):
    outputs, layers = generate(packed / "exact", *TIERS[tier], device=device, layers=None if tier == "device" else 0)
    assert [output.outputs[0].token_ids for output in outputs] == tokens
    assert layers[list(TIERS).index(tier)] > (8 if device == "cpu" else 4)


@pytest.mark.parametrize(("codec", "memory"), [("exact", "200MiB"), ("exact", "14MiB"), ("int4", "14MiB")])
def test_layers_that_stay_on_the_device_keep_no_more_than_they_must(packed, codec, memory, device):
    """Their parameters, where all fit so; else what is packed, and slots. Tokens are those of streamed layers."""
    with LLM(packed / codec, device=device, tiers=MemoryTiers(device=memory, host="0")) as llm:
        stayed = llm.plan.layers_in(Tier.DEVICE)
        mine = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
        layouts = [llm.model.layer_layouts[index] for index in stayed]
        whole = memory == "200MiB"
        assert whole == (llm.plan.num_slots == 0) == (not llm.plan.device_packed)
        assert len(stayed) == 12 if whole or codec == "int4" else 0 < len(stayed) < 12
        find = llm._weights.buffer_of if whole else llm._weights._rest.__getitem__
        kept = sum(find(index).numel() for index in stayed)
        wanted = sum(layout.parameter_nbytes if whole else layout.wire_nbytes for layout in layouts)
        assert kept == llm.plan.device_layer_nbytes == wanted < sum(layout.nbytes for layout in layouts)
    expected = generate(packed / codec, "13MiB", device=device, layers=0)[0]
    assert mine == [output.outputs[0].token_ids for output in expected]


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_integers_are_what_transformers_computes_with_the_decoded_weights(packed, codec, device):
    outputs, _ = generate(packed / codec, "13MiB", device=device, layers=0)
    assert verify(packed / codec, outputs, device=device).passed


def test_exact_restores_every_bit_and_takes_three_quarters(packed):
    source = open_stored(Checkpoint.open(DEFAULT_MODEL))
    made = open_stored(Checkpoint.open(packed / "exact"))
    for name, tensor in read_all(made):
        assert torch.equal(tensor.view(torch.int16), read_tensor(source, name).view(torch.int16)), name
    assert Checkpoint.open(packed / "exact").nbytes <= 0.76 * Checkpoint.open(DEFAULT_MODEL).nbytes


@pytest.mark.parametrize(("codec", "error"), [("exact", 0.0), ("int8", 0.01), ("int4", 0.12)])
def test_the_error_of_every_layer(packed, codec, error):
    errors = layer_errors(DEFAULT_MODEL, packed / codec)
    assert [one.layer for one in errors if one.layer is not None] == list(range(12))
    assert all(one.error <= one.worst_error <= error for one in errors)


def test_perplexity(packed, tmp_path):
    text = tmp_path / "text.py"
    text.write_text(Path(pack_writer.__file__).read_text()[:3000])
    found = perplexity(DEFAULT_MODEL, packed / "int8", text, dtype="float32", device="cpu")
    assert 3 < found.model < 30
    assert abs(found.change) <= 0.005


def test_a_packed_model_is_an_ordinary_directory(packed):
    manifest = read_manifest(packed / "int8")
    stored = load_file(packed / "int8" / "model.safetensors")
    coded = [name for name, record in manifest.tensors.items() if record.coding]
    assert coded
    assert all("norm" not in name and "embed" not in name and "layers." in name for name in coded)
    assert all(stored[f"{name}.int8"].dtype == torch.int8 for name in coded)
    assert (packed / "int8" / "tokenizer.json").read_bytes() == (DEFAULT_MODEL / "tokenizer.json").read_bytes()


# ------------------------------------------------------------------------------------------ what is coded, and how


def bf16_tensors(path: Path, change=None) -> Path:
    """A directory of tensors that are no model; the exact codec needs none."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": (torch.randn(3000 + 517 * i, generator=generator) * 0.02).bfloat16() for i in range(9)}
    tensors["f32"], tensors["small"] = torch.randn(3000, generator=generator), torch.ones(5).bfloat16()
    tensors["empty"] = torch.empty(0, 4).bfloat16()
    tensors.update(change or {})
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    return path


def test_what_would_not_pay_stays_as_it_is(tmp_path):
    noise = torch.randint(-32768, 32767, (6 << 20,), dtype=torch.int16).view(torch.bfloat16)
    late = (torch.randn(6 << 20) * 0.02).bfloat16()
    late[5 << 20 :] = noise[: 1 << 20]
    source = bf16_tensors(tmp_path / "source", {"noise": noise, "late": late})
    report = pack(source, tmp_path / "out", PackOptions("exact"))
    made = open_stored(Checkpoint.open(tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert {name for name, one in manifest.tensors.items() if one.coding is None} == {"noise", "f32", "small", "empty"}
    assert report.num_plain == 4
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(read_tensor(made, name).view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_source_that_becomes_shorter_while_it_is_read_is_named(tmp_path, monkeypatch):
    """A tensor that does not pay after all is read once more."""
    source = bf16_tensors(tmp_path / "source", {"a": torch.ones(5 << 20, dtype=torch.bfloat16)})
    go_plain = _TensorPacker._go_plain

    def cut(self, reason):
        os.truncate(self._entry.file.path, self._entry.offset + 100)
        go_plain(self, reason)

    monkeypatch.setattr(_TensorPacker, "_go_plain", cut)
    monkeypatch.setattr(ExactEncoder, "encode", _refuse_second(ExactEncoder.encode))
    with pytest.raises((ReadError, FileChangedError), match=r"shorter|not the one"):
        pack(source, tmp_path / "out", PackOptions("exact"))


def _refuse_second(encode):
    def refusing(self, piece):
        if self._table is not None:
            raise DoesNotPay("this time")
        return encode(self, piece)

    return refusing


def test_integers_leave_infinite_tensors_alone(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DEFAULT_MODEL, model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name][5, 5] = float("inf")
    save_file(tensors, model / "model.safetensors")
    pack(model, tmp_path / "out", PackOptions("int8", group_size=32, exclude=("*.k_proj.*",)))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.tensors[name].coding is None
    assert manifest.tensors["model.layers.3.self_attn.k_proj.weight"].coding is None
    wanted = Coding("int8", "BF16", (384, 256), 32, symmetric=True)
    assert manifest.tensors["model.layers.2.mlp.up_proj.weight"].coding == wanted
    made = open_stored(Checkpoint.open(tmp_path / "out"))
    assert torch.equal(read_tensor(made, name).view(torch.int16), tensors[name].view(torch.int16))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (PackOptions("exact", group_size=64), ConfigError),
        (PackOptions("int8", group_size=48), ConfigError),
        (PackOptions("exact", exclude=("nothing*",)), ConfigError),
    ],
)
def test_bad_options(tmp_path, options, error):
    with pytest.raises(error):
        pack(bf16_tensors(tmp_path / "source"), tmp_path / "out", options)


def test_refusals(tmp_path, packed, monkeypatch):
    source = bf16_tensors(tmp_path / "source")
    with pytest.raises(ConfigError, match="packed already"):
        pack(packed / "exact", tmp_path / "again", PackOptions("exact"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        pack(source, tmp_path / "full", PackOptions("exact"))
    (tmp_path / "other.part").mkdir()
    (tmp_path / "other.part" / "file").write_text("mine")
    with pytest.raises(OutputError, match="something else"):
        pack(source, tmp_path / "other", PackOptions("exact"))
    with pytest.raises(OutputError, match="no such directory"):
        pack(source, tmp_path / "missing" / "out", PackOptions("exact"))
    usage = shutil.disk_usage(tmp_path)._replace(free=64 << 20)
    monkeypatch.setattr(pack_journal.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NoSpaceError, match="stay free"):
        pack(source, tmp_path / "out", PackOptions("exact"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ kill and resume


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_pack_goes_on_to_the_same_result(tmp_path, monkeypatch):
    """SIGKILL at random calls of the system that change the output, until a run comes through."""
    monkeypatch.setattr(pack_writer, "_SYNC_NBYTES", 8192)
    source = bf16_tensors(
        tmp_path / "source", {"noise": torch.randint(-32768, 32767, (9000,), dtype=torch.int16).view(torch.bfloat16)}
    )
    (source / "config.json").write_text("{}")
    pack(source, tmp_path / "wanted", PackOptions("exact"), shard_nbytes=20_000)
    wanted = contents(tmp_path / "wanted")
    assert len(wanted) > 5
    chance = random.Random(0)
    kills = 0
    for number in range(6):
        out = tmp_path / f"out{number}"
        while not out.exists():
            status = _pack_and_kill(source, out, chance.randrange(1, 60) if chance.random() < 0.8 else 10_000)
            kills += status != 0
        assert contents(out) == wanted
        shutil.rmtree(out)
    assert kills >= 6


def _pack_and_kill(source: Path, out: Path, after: int) -> int:
    """Pack in a child that kills itself at the `after`-th write, sync, rename or unlink."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = after

    def killing(call):
        def run(*args, **kwargs):
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return run

    try:
        for name in ("pwrite", "fdatasync", "fsync", "ftruncate", "rename", "unlink", "replace"):
            setattr(os, name, killing(getattr(os, name)))
        pack(source, out, PackOptions("exact"), shard_nbytes=20_000)
    finally:
        os._exit(0 if out.exists() else 1)


def test_what_was_begun_with_other_options_is_not_gone_on_with(tmp_path):
    source = bf16_tensors(tmp_path / "source")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", PackOptions("exact"), on_progress=stop)
    with pytest.raises(JournalError, match="another options"):
        pack(source, tmp_path / "out", PackOptions("exact", exclude=("w1",)))
    assert pack(source, tmp_path / "out", PackOptions("exact")).num_coded == 9
    assert not (tmp_path / "out.part").exists()


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """A tensor of 160 MiB goes through less than 100 MiB, as the kernel counts them."""
    source = tmp_path / "source"
    source.mkdir()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [80 << 20], "data_offsets": [0, 160 << 20]}}).encode()
    with open(source / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (160 << 20))
    script = (
        "import resource, sys, torch; torch.set_num_threads(1)\n"
        "from penstock.engine.pack import pack\nfrom penstock.offload.codec import PackOptions\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "pack(sys.argv[1], sys.argv[2], PackOptions('exact'))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 100 << 20


# ------------------------------------------------------------------------------------------------- flipped bits


def test_every_flipped_bit_is_found_before_any_token(packed, tmp_path):
    """In small files, headers, the manifest and every kind of part; the tensor, or the file, is named."""
    source = tmp_path / "damaged"
    shutil.copytree(packed / "int4", source)
    shards = Checkpoint.open(source)
    chance = random.Random(1)
    spots = [(source / name, None) for name in ("config.json", "tokenizer.json", MANIFEST)]
    entries = [shards.tensors[name] for name in sorted(shards.tensors)]
    spots += [(entry.file.path, entry) for entry in chance.sample(entries, 8)]
    for path, entry in spots:
        at = (
            chance.randrange(entry.offset, entry.offset + entry.nbytes)
            if entry
            else chance.randrange(path.stat().st_size)
        )
        flip(path, at, chance.randrange(8))
        with pytest.raises(PenstockError) as caught:
            generate(source, "13MiB", layers=0)
        assert path.name in str(caught.value)
        if entry:
            assert isinstance(caught.value, ChecksumError)
            assert repr(entry.name) in str(caught.value)
        flip(path, at, None)
    start = min(entry.offset for entry in entries)
    for _ in range(4):
        flip(shards.files[0].path, chance.randrange(start), chance.randrange(8))
        with pytest.raises(CheckpointError):
            load_model(source)
        flip(shards.files[0].path, None, None)
    assert generate(source, "12MiB", layers=0)[1][2] > 8


_FLIPPED: list[tuple[int, int]] = []


def flip(path: Path, at: int | None, bit: int | None) -> None:
    """Flip a bit; with None flip the last one back. The file's times stay, as with a fault of the disk."""
    status = path.stat()
    if bit is None:
        at, bit = _FLIPPED.pop()
    else:
        _FLIPPED.append((at, bit))
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("tier", TIERS)
def test_a_flipped_bit_is_found_in_every_tier(packed, tmp_path, tier):
    source = tmp_path / "damaged"
    shutil.copytree(packed / "exact", source)
    entry = Checkpoint.open(source).tensors["model.layers.7.mlp.down_proj.weight.exact_extra"]
    flip(entry.file.path, entry.offset, 3)
    with pytest.raises(ChecksumError, match=re.escape(entry.name)):
        generate(source, *TIERS[tier])
