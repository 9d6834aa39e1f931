"""nvCOMP's ANS, a compressor on NVIDIA GPUs: an optional library, found at run time and called through its C interface.

The library is NVIDIA's, under a licence of its own, so nothing of it is in this package: `pip install penstock[nvcomp]`
installs it. Declarations are those of version 6; another major version may change structures, so it is refused.
Addresses are those of the GPU's memory; what works on a stream returns at once, and allocates nothing.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import cffi

from penstock.errors import LibraryError

__all__ = ["ALIGNMENT", "CHAR", "FLOAT16", "NvcompANS", "open_nvcomp"]

ALIGNMENT = 32
"""Compressed chunks start on multiples of so many bytes: nvCOMP asks for 16, and says that 32 may be faster."""

_PACKAGES = {"12": "nvidia-libnvcomp-cu12", "13": "nvidia-libnvcomp-cu13"}
_FILE = "nvidia/libnvcomp/lib64/libnvcomp.so.6"
_MAJOR = 6
_INSTALL = "Run `pip install penstock[nvcomp]`, or `pip install nvidia-libnvcomp-cu12` for a driver of CUDA 12."

_ffi: Any = cffi.FFI()
_ffi.cdef(
    """
    typedef struct {
        int type; int data_type;
        uint8_t max_sub_chunk_count; uint8_t states_per_lane; uint8_t histogram_reduction_log2; char reserved[53];
    } compress_options;
    typedef struct {
        int backend; int data_type;
        uint8_t max_sub_chunk_count; uint8_t states_per_lane; uint8_t skip_validate; char reserved[53];
    } decompress_options;
    typedef struct { size_t input; size_t output; size_t temp; } alignments;
    typedef struct { uint32_t version; uint32_t cudart_version; } properties;

    int nvcompGetProperties(properties *);
    const char *nvcompGetStatusString(int);

    int nvcompBatchedANSCompressGetRequiredAlignments(compress_options, alignments *);
    int nvcompBatchedANSCompressGetTempSize(
        size_t num_chunks, size_t max_chunk, compress_options, size_t *temp, size_t total, uintptr_t stream);
    int nvcompBatchedANSCompressGetMaxOutputChunkSize(size_t max_chunk, compress_options, size_t *max_output);
    int nvcompBatchedANSCompressAsync(
        uintptr_t sources, uintptr_t source_sizes, size_t max_chunk, size_t num_chunks,
        uintptr_t temp, size_t temp_size, uintptr_t targets, uintptr_t target_sizes,
        compress_options, uintptr_t statuses, uintptr_t stream);

    int nvcompBatchedANSDecompressGetRequiredAlignments(decompress_options, alignments *);
    int nvcompBatchedANSDecompressGetTempSize(
        size_t num_chunks, size_t max_chunk, decompress_options, size_t *temp, size_t total, uintptr_t stream);
    int nvcompBatchedANSDecompressAsync(
        uintptr_t sources, uintptr_t source_sizes, uintptr_t target_rooms, uintptr_t target_sizes, size_t num_chunks,
        uintptr_t temp, size_t temp_size, uintptr_t targets, decompress_options, uintptr_t statuses, uintptr_t stream);
    """
)

CHAR, FLOAT16 = 0, 10
"""Data types: bytes, and halves of any format."""


class NvcompANS:
    """The library. Arrays are given by their addresses: pointers and sizes are 8 bytes each, statuses 4.

    With 1 of `states` instead of 2, chunks are a little smaller and slower; 0 leaves that to nvCOMP.
    """

    def __init__(self, path: Path, data_type: int = CHAR, states: int = 0) -> None:
        try:
            self._library: Any = _ffi.dlopen(str(path))
        except OSError as error:
            raise LibraryError(f"nvCOMP cannot be loaded: {error}", file=path, fix=_INSTALL) from error
        found = _ffi.new("properties *")
        self._check(self._library.nvcompGetProperties(found))
        if found.version // 1000 != _MAJOR:
            raise LibraryError("not a version of nvCOMP that is known", file=path, wanted=_MAJOR, got=found.version)
        self.version = int(found.version)
        options = {"data_type": data_type, "states_per_lane": states}
        self._compressing: Any = _ffi.new("compress_options *", options)[0]
        self._decompressing: Any = _ffi.new("decompress_options *", options)[0]
        self._check_alignments(path)

    def _check_alignments(self, path: Path) -> None:
        for name, options in (("Compress", self._compressing), ("Decompress", self._decompressing)):
            wanted = _ffi.new("alignments *")
            self._check(getattr(self._library, f"nvcompBatchedANS{name}GetRequiredAlignments")(options, wanted))
            if max(wanted.input, wanted.output, wanted.temp) > ALIGNMENT:
                raise LibraryError("nvCOMP asks for wider alignment than is kept", file=path, wanted=ALIGNMENT)

    def max_compressed(self, chunk_nbytes: int) -> int:
        """Return how many bytes a chunk may become."""
        return self._size(self._library.nvcompBatchedANSCompressGetMaxOutputChunkSize, chunk_nbytes, self._compressing)

    def compress_temp(self, num_chunks: int, chunk_nbytes: int) -> int:
        """Return how much memory `compress` needs besides."""
        return self._temp(
            self._library.nvcompBatchedANSCompressGetTempSize, num_chunks, chunk_nbytes, self._compressing
        )

    def decompress_temp(self, num_chunks: int, chunk_nbytes: int) -> int:
        """Return how much memory `decompress` needs besides."""
        ask = self._library.nvcompBatchedANSDecompressGetTempSize
        return self._temp(ask, num_chunks, chunk_nbytes, self._decompressing)

    def compress(
        self,
        sources: int,
        source_sizes: int,
        targets: int,
        *,
        target_sizes: int,
        statuses: int,
        num_chunks: int,
        chunk_nbytes: int,
        temp: int,
        temp_nbytes: int,
        stream: int,
    ) -> None:
        """Compress chunks of at most `chunk_nbytes`; each target has room for `max_compressed`."""
        made = self._library.nvcompBatchedANSCompressAsync(
            sources, source_sizes, chunk_nbytes, num_chunks, temp, temp_nbytes,
            targets, target_sizes, self._compressing, statuses, stream,
        )  # fmt: skip
        self._check(made)

    def decompress(
        self,
        sources: int,
        source_sizes: int,
        targets: int,
        target_rooms: int,
        *,
        target_sizes: int,
        statuses: int,
        num_chunks: int,
        temp: int,
        temp_nbytes: int,
        stream: int,
    ) -> None:
        """Decompress chunks; a status is 0 where that went well."""
        made = self._library.nvcompBatchedANSDecompressAsync(
            sources, source_sizes, target_rooms, target_sizes, num_chunks, temp, temp_nbytes,
            targets, self._decompressing, statuses, stream,
        )  # fmt: skip
        self._check(made)

    def _temp(self, ask: Any, num_chunks: int, chunk_nbytes: int, options: Any) -> int:
        found = _ffi.new("size_t *")
        self._check(ask(num_chunks, chunk_nbytes, options, found, num_chunks * chunk_nbytes, 0))
        return int(found[0])

    def _size(self, ask: Any, *arguments: Any) -> int:
        found = _ffi.new("size_t *")
        self._check(ask(*arguments, found))
        return int(found[0])

    def _check(self, status: int) -> None:
        if status:
            text = _ffi.string(self._library.nvcompGetStatusString(status)).decode(errors="replace")
            raise LibraryError(f"nvCOMP failed: {text}", got=f"status {status}")


@cache
def open_nvcomp(cuda: str | None, data_type: int = CHAR, states: int = 0) -> NvcompANS:
    """Load the library once; of several, the one for the major version `cuda` of CUDA. Raises LibraryError."""
    return NvcompANS(_find(cuda), data_type, states)


def _find(cuda: str | None) -> Path:
    """Find the library by its package's metadata: other packages may own the folder `nvidia`."""
    for name in sorted(_PACKAGES.values(), key=lambda name: name != _PACKAGES.get(cuda or "")):
        try:
            path = Path(str(distribution(name).locate_file(_FILE)))
        except PackageNotFoundError:
            continue
        if path.is_file():
            return path
    raise LibraryError(
        "nvCOMP, which ANS needs, is not installed", wanted=" or ".join(_PACKAGES.values()), fix=_INSTALL
    )
