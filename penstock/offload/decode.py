"""Read tensors of a checkpoint whole, packed or not, with their checksums: for references and reports."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from penstock.errors import ReadError
from penstock.io.files import TensorEntry
from penstock.kernels import ans
from penstock.offload.buffers import DTYPES, expand
from penstock.offload.checks import compare
from penstock.offload.codec import Coding
from penstock.offload.manifest import CodedTensor, Stored

__all__ = ["read_all", "read_tensor"]


def read_tensor(stored: Stored, name: str) -> Tensor:
    """Return the values of one tensor, on the CPU; a GPU decodes those that only it can.

    Raises ReadError, ChecksumError for damaged bytes, and what `ans.find_device` raises.
    """
    source = stored.tensors[name]
    if isinstance(source, TensorEntry):
        return _read(stored, source)
    assert isinstance(source, CodedTensor)
    on_gpu = isinstance(source.coding, Coding) and source.coding.codec == "exact-ans"
    device = ans.find_device() if on_gpu else torch.device("cpu")
    out = torch.empty(1, *source.shape, dtype=DTYPES[source.dtype], device=device)
    expand(source.coding, [_read(stored, part)[None].to(device) for part in source.parts], out)
    return out[0].cpu()


def read_all(stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its name, in the order of the files' bytes."""
    for name in sorted(
        stored.tensors, key=lambda one: (str(stored.tensors[one].file.path), stored.tensors[one].offset)
    ):
        yield name, read_tensor(stored, name)


def _read(stored: Stored, entry: TensorEntry) -> Tensor:
    content = bytearray(entry.nbytes)
    try:
        with entry.file.path.open("rb") as stream:
            stream.seek(entry.offset)
            count = stream.readinto(content)
    except OSError as error:
        raise ReadError(f"cannot be read: {error.strerror}", file=entry.file.path) from error
    if count != entry.nbytes:
        raise ReadError("the file is shorter than its header says", file=entry.file.path)
    check = stored.checks.get(entry.name)
    if check is not None:
        compare(check, zlib.crc32(content))
    if not content:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(content, dtype=torch.uint8).view(DTYPES[entry.dtype]).view(entry.shape)
