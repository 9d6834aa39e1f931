"""Checkpoints packed with nvCOMP's ANS, with the real library on a GPU (`--device cuda`), else one in its place."""

from __future__ import annotations

import json

import fake_nvcomp
import pytest
import torch
from safetensors.torch import save_file

from penstock.cli.main import main
from penstock.engine.executor import Executor
from penstock.engine.llm import DEFAULT_MODEL, LLM
from penstock.engine.model.build import load_model
from penstock.engine.pack import pack
from penstock.engine.quality import layer_errors
from penstock.engine.rehearsal import rehearse
from penstock.engine.sampling_params import SamplingParams
from penstock.engine.verify import verify
from penstock.errors import ConfigError, DeviceError, LibraryError, ModelOutputError
from penstock.io.checkpoint import Checkpoint
from penstock.kernels import ans, nvcomp
from penstock.offload.codec import ANS_CHUNK, Coding, PackOptions
from penstock.offload.decode import read_all, read_tensor
from penstock.offload.manifest import MANIFEST, open_stored, read_manifest
from penstock.offload.records import from_plain, to_plain
from penstock.offload.tiers import MemoryTiers

PROMPTS = ["class Point:\n    def __init__(self, x, y):\n", "import os\n\n\ndef read_file(path):\n"]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
_check_usable = ans.check_usable
TIERS = {"device": ("200MiB", "0"), "host": ("16MiB", "40MiB"), "nvme": ("16MiB", "0")}


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory, device):
    """What the codec runs on."""
    if device == "cuda":
        if not fake_nvcomp.is_real():
            pytest.skip("nvCOMP is not installed")
        yield
        return
    site = fake_nvcomp.build(tmp_path_factory.mktemp("nvcomp") / "site")
    with pytest.MonkeyPatch.context() as patch, fake_nvcomp.taken_for_a_gpu(patch, site):
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory, library):
    path = tmp_path_factory.mktemp("packed") / "out"
    pack(DEFAULT_MODEL, path, PackOptions("exact-ans"))
    return path


def generate(path, memory, host, device):
    with LLM(path, device=device, tiers=MemoryTiers(device=memory, host=host)) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        return outputs, [len(llm.plan.layers_in(tier)) for tier in ("device", "host", "nvme")]


@pytest.mark.parametrize("tier", TIERS)
def test_the_same_tokens_from_every_tier(packed, tier, device):
    outputs, layers = generate(packed, *TIERS[tier], device)
    wanted, _ = generate(DEFAULT_MODEL, *TIERS[tier], device)
    assert [one.outputs[0].token_ids for one in outputs] == [one.outputs[0].token_ids for one in wanted]
    assert layers[list(TIERS).index(tier)] > 0
    assert verify(packed, outputs, device=device).passed


def test_every_bit_comes_back(packed):
    source = open_stored(Checkpoint.open(DEFAULT_MODEL))
    for name, tensor in read_all(open_stored(Checkpoint.open(packed))):
        assert torch.equal(tensor.view(torch.int16), read_tensor(source, name).view(torch.int16)), name
    assert all(one.error == 0 for one in layer_errors(DEFAULT_MODEL, packed))


def test_short_tensors_have_the_code_of_four_bits(packed):
    manifest = read_manifest(packed)
    assert manifest.options == PackOptions("exact-ans")
    codings = [record.coding for record in manifest.tensors.values() if record.coding is not None]
    assert {one.codec for one in codings} == {"exact", "exact-ans"}
    assert all((one.codec == "exact") == (one.size < ANS_CHUNK) for one in codings)


def test_noise_stays_as_it_is_and_other_tensors_do_not(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-32768, 32767, (5 << 20,), dtype=torch.int16, generator=generator).view(torch.bfloat16)
    weights = (torch.randn(5 << 20, generator=generator) * 0.02).bfloat16()
    (tmp_path / "source").mkdir()
    save_file({"noise": noise, "weights": weights}, tmp_path / "source" / "model.safetensors")
    report = pack(tmp_path / "source", tmp_path / "out", PackOptions("exact-ans"))
    assert (report.num_coded, report.num_plain) == (1, 1)
    stored = open_stored(Checkpoint.open(tmp_path / "out"))
    assert torch.equal(read_tensor(stored, "noise").view(torch.int16), noise.view(torch.int16))
    assert torch.equal(read_tensor(stored, "weights"), weights)


def test_weights_that_could_not_be_decompressed_end_the_run(packed, device, monkeypatch):
    join = ans._join
    monkeypatch.setattr(ans, "_join", lambda low, exponents, failed, *rest: join(low, exponents, ~failed, *rest))
    with pytest.raises(ModelOutputError, match="not finite"):
        generate(packed, *TIERS["device"], device)


def test_what_decoding_takes_besides_is_planned_for(packed, device):
    model = load_model(packed, device=device)
    layout = model.layer_layouts[0]
    codings = [one.coding for one in layout.expansions if one.coding.codec == "exact-ans"]
    needed = max(-(-one.size // ANS_CHUNK) for one in codings) * ANS_CHUNK
    plain = load_model(DEFAULT_MODEL, device=device)
    with torch.inference_mode():
        costs = [rehearse(one, Executor(one.layers), sampler_nbytes=0).fixed_nbytes for one in (model, plain)]
    assert costs[0] - costs[1] >= 2 * needed > 0


def test_codings_are_written_and_read():
    coding = Coding("exact-ans", "BF16", (3, 70_000))
    assert from_plain(Coding, to_plain(coding)) == coding
    assert [(part.suffix, part.dtype, part.shape) for part in coding.parts] == [
        ("exact_low", "U8", (210_000,)),
        ("ans_size", "I32", (4,)),
        ("ans_data", "U8", (-1,)),
    ]
    assert coding.fault() is None
    assert Coding("exact-ans", "F16", (3,)).fault() == "dtype F16"
    with pytest.raises(ConfigError, match="no groups"):
        PackOptions("exact-ans", group_size=64).resolved()


def test_a_plan_needs_neither_gpu_nor_library(packed, capsys, monkeypatch):
    monkeypatch.setattr(nvcomp, "_PACKAGES", {"13": "no-such-package"})
    nvcomp.open_nvcomp.cache_clear()
    assert main(["plan", str(packed), "--hardware", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_without_the_library_it_is_named(packed, tmp_path, monkeypatch, device):
    monkeypatch.setattr(nvcomp, "_PACKAGES", {"13": "no-such-package"})
    monkeypatch.setattr(ans, "check_usable", lambda _: nvcomp.open_nvcomp("13"))
    nvcomp.open_nvcomp.cache_clear()
    with pytest.raises(LibraryError, match=r"penstock\[nvcomp\]"):
        generate(packed, *TIERS["device"], device)
    with pytest.raises(LibraryError, match=r"penstock\[nvcomp\]"):
        pack(DEFAULT_MODEL, tmp_path / "out", PackOptions("exact-ans"))
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_is_refused(packed, tmp_path, monkeypatch, capsys):
    """`check_usable` is the real one here; whatever does not need a GPU works."""
    monkeypatch.setattr(ans, "check_usable", _check_usable)
    with pytest.raises(DeviceError, match="NVIDIA GPUs only"):
        LLM(packed, device="cpu")
    if not torch.cuda.is_available():
        assert main(["pack", str(DEFAULT_MODEL), str(tmp_path / "out"), "--codec", "exact-ans"]) == 1
        assert "DeviceError" in capsys.readouterr().err
    assert (packed / MANIFEST).exists()
