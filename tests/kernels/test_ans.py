"""Every bfloat16 bit pattern survives nvCOMP's ANS: the real one on a GPU, elsewhere what stands for it."""

from __future__ import annotations

import fake_nvcomp
import pytest
import torch
from pretend_cuda import There, pretend_cuda
from torch import Tensor

from penstock.errors import DeviceError, LibraryError
from penstock.kernels import ans, nvcomp
from penstock.kernels.nvcomp import open_nvcomp

PATTERNS = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return fake_nvcomp.build(tmp_path_factory.mktemp("nvcomp") / "site")


@pytest.fixture(params=["fake", "cuda"])
def device(request, monkeypatch, site):
    """The device of the tensors."""
    if request.param == "cuda":
        if not fake_nvcomp.is_real():
            pytest.skip("no CUDA device, or no nvCOMP")
        yield "cuda"
        return
    with fake_nvcomp.taken_for_a_gpu(monkeypatch, site):
        yield "cpu"


def weights(size: int, seed: int = 0) -> Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def rows(tensors: list[Tensor], device: str) -> Tensor:
    """Put tensors of one dtype into a buffer at equal steps, as a layer's layout does."""
    longest = max(one.nbytes for one in tensors)
    step = -(-longest // 256) * 256 + 256
    buffer = torch.full((len(tensors) * step,), 0xA5, dtype=torch.uint8)
    for index, one in enumerate(tensors):
        buffer[index * step : index * step + one.nbytes] = one.cpu().view(torch.uint8)
    return buffer.to(device).as_strided((len(tensors), longest), (step, 1)).view(tensors[0].dtype)


def encoded(tensors: list[Tensor], device: str) -> list[Tensor]:
    """Encode tensors of one size; return the parts of all, as rows."""
    made = [ans.encode(one.to(device)) for one in tensors]
    return [rows([getattr(one, name) for one in made], device) for name in ("low", "size", "data")]


def check(tensors: list[Tensor], device: str) -> None:
    """Encode tensors of one size and decode them as a batch."""
    size = tensors[0].numel()
    parts = encoded(tensors, device)
    out = torch.zeros(len(tensors), size + 128, dtype=torch.bfloat16, device=device)
    ans.decode(*parts, out=out[:, :size])
    for found, wanted in zip(out.cpu(), tensors, strict=True):
        assert torch.equal(found[:size].view(torch.int16), wanted.view(torch.int16))
    assert not out[:, size:].any(), "it wrote behind a row"


@pytest.mark.parametrize("size", [1, 3, 5000, 65535, 65536, 65537, 200_001])
def test_all_patterns(size: int, device: str) -> None:
    """NaNs with their payloads, denormals, infinities and both zeros are among them."""
    shuffled = PATTERNS[torch.randperm(65536, generator=torch.Generator().manual_seed(size))]
    check([values.repeat(4)[:size] for values in (PATTERNS, shuffled, PATTERNS.flip(0))] + [weights(size)], device)


@pytest.mark.parametrize("at_once", [1, 3, 4, 7, 1024])
def test_more_chunks_than_are_decoded_at_once(at_once: int, device: str, monkeypatch) -> None:
    monkeypatch.setattr(ans, "_AT_ONCE", at_once)
    check([weights(3 * ans.CHUNK + 77, seed) for seed in range(3)], device)


def test_parts_of_a_tensor_that_was_encoded_piece_by_piece(device: str) -> None:
    values = weights(5 * ans.CHUNK + 1)
    made = [ans.encode(piece.to(device)) for piece in values.split(2 * ans.CHUNK)]
    low, size, data = (torch.cat([getattr(one, name) for one in made])[None] for name in ("low", "size", "data"))
    out = torch.zeros(1, values.numel(), dtype=torch.bfloat16, device=device)
    ans.decode(low, size, data, out=out)
    assert torch.equal(out[0].cpu(), values)


def test_nothing_and_what_is_only_rehearsed(device: str) -> None:
    """Zeros are no stream of nvCOMP's, so it is not asked to decompress them."""
    ans.decode(*(torch.empty(2, 0, dtype=torch.uint8, device=device) for _ in range(3)), out=PATTERNS[:0].view(2, 0))
    zeros = torch.zeros(2, 70_000, dtype=torch.uint8, device=device)
    out = torch.ones(2, 70_000, dtype=torch.bfloat16, device=device)
    ans.decode(zeros, torch.zeros(2, 2, dtype=torch.int32, device=device), zeros, out=out, launch=False)
    assert bool((out == 1).all())


def test_gaussian_weights_take_two_thirds(device: str) -> None:
    values = weights(1 << 24)
    made = ans.encode(values.to(device))
    share = sum(part.nbytes for part in (made.low, made.size, made.data)) / values.nbytes
    assert share <= (0.68 if device == "cuda" else 0.76)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_decoding_never_waits(device: str) -> None:
    if device != "cuda":
        pytest.skip("the CPU always waits")
    parts = encoded([weights(300_000), weights(300_000, 1)], device)
    out = torch.empty(2, 300_000, dtype=torch.bfloat16, device=device)
    ans.decode(*parts, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ans.decode(*parts, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real device is better")
def test_nothing_mixes_devices_or_waits(site, monkeypatch) -> None:
    tensors = [weights(150_000, seed) for seed in range(2)]
    with fake_nvcomp.taken_for_a_gpu(monkeypatch, site):
        parts = encoded(tensors, "cpu")
    with fake_nvcomp.installed(monkeypatch, site), pretend_cuda(monkeypatch), torch.no_grad():
        there = [part.to("cuda", non_blocking=True) for part in parts]
        out = torch.empty(2, 150_000, dtype=torch.bfloat16, device="cuda")
        assert isinstance(out, There)
        ans.decode(*there, out=out)
    assert torch.equal(out.memory, torch.stack(tensors))


def test_a_chunk_that_cannot_be_decompressed_becomes_nans(site, monkeypatch) -> None:
    values = weights(3 * ans.CHUNK)
    with fake_nvcomp.taken_for_a_gpu(monkeypatch, site):
        made = ans.encode(values)
        made.data[int(made.size[0]) // 32 * 32 + 32] ^= 1
        out = torch.zeros(1, values.numel(), dtype=torch.bfloat16)
        ans.decode(made.low[None], made.size[None], made.data[None], out=out)
    chunks = out.view(3, -1)
    assert bool(chunks[1].isnan().all())
    assert torch.equal(chunks[[0, 2]], values.view(3, -1)[[0, 2]])


def test_what_does_not_come_back_is_not_stored(site, monkeypatch) -> None:
    with fake_nvcomp.taken_for_a_gpu(monkeypatch, site):
        monkeypatch.setattr(ans, "_join", lambda *parts: parts[-1].zero_())
        with pytest.raises(LibraryError, match="not given back"):
            ans.encode(weights(100))


@pytest.mark.parametrize("size", [1, 4096, 65536, 100_001])
@pytest.mark.parametrize("first", [0, 1])
def test_the_kernel_joins_like_the_reference(triton_device, size: int, first: int) -> None:
    kernels = pytest.importorskip("penstock.kernels.expand_triton")
    per_row = -(-size // ans.CHUNK)
    generator = torch.Generator().manual_seed(size)
    low = torch.randint(256, (3, size), generator=generator).to(torch.uint8)
    exponents = torch.randint(256, (3 * per_row - first, ans.CHUNK), generator=generator).to(torch.uint8)
    failed = torch.arange(exponents.shape[0]) % 3 == 1
    wanted, found = (torch.zeros(3, size + 8, dtype=torch.bfloat16) for _ in range(2))
    ans.join_reference(low, exponents, failed, first, out=wanted[:, :size])
    found = found.to(triton_device)
    there = (one.to(triton_device) for one in (low, exponents, failed))
    kernels.join_exponents(*there, first, out=found[:, :size])
    assert torch.equal(found.cpu().view(torch.int16), wanted.view(torch.int16))


# ------------------------------------------------------------------------------------------------------ the library


def test_options_have_the_size_that_the_header_gives_them() -> None:
    assert nvcomp._ffi.sizeof("compress_options") == nvcomp._ffi.sizeof("decompress_options") == 64


def test_a_library_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(nvcomp, "_PACKAGES", {"13": "no-such-package"})
    open_nvcomp.cache_clear()
    with pytest.raises(LibraryError, match=r"not installed.*no-such-package.*penstock\[nvcomp\]"):
        open_nvcomp("13")


def test_a_library_of_another_version(tmp_path, monkeypatch) -> None:
    site = fake_nvcomp.build(tmp_path / "site", "-DVERSION=7000")
    with fake_nvcomp.installed(monkeypatch, site), pytest.raises(LibraryError, match="wanted 6, got 7000"):
        open_nvcomp("13")


def test_a_file_that_is_no_library(tmp_path, monkeypatch) -> None:
    site = fake_nvcomp.build(tmp_path / "site")
    (site / nvcomp._FILE).write_bytes(b"no library")
    with fake_nvcomp.installed(monkeypatch, site), pytest.raises(LibraryError, match="cannot be loaded"):
        open_nvcomp("13")


def test_what_the_library_refuses(site, monkeypatch) -> None:
    with fake_nvcomp.installed(monkeypatch, site), pytest.raises(LibraryError, match="an invalid value"):
        open_nvcomp("13", data_type=3)


def test_other_devices_are_refused() -> None:
    with pytest.raises(DeviceError, match=r"NVIDIA GPUs only.*got cpu.*--codec exact"):
        ans.check_usable(torch.device("cpu"))
