"""Every disk backend, memory and files to read."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from reader_backends import ALL_BACKENDS, BACKENDS, identify

from penstock.io.memory import HostMemory


@pytest.fixture(params=BACKENDS)
def make_reader(request):
    """Open readers of one backend: make_reader(block_bytes); they are closed at the end."""
    readers = []

    def make(block_bytes=64 << 10):
        reader = BACKENDS[request.param](block_bytes)
        readers.append(reader)
        return reader

    yield make
    for reader in readers:
        reader.close()


@pytest.fixture(params=ALL_BACKENDS)
def make_any(request):
    """Open readers of one backend or of the fake: make_any(block_bytes); they are closed at the end."""
    with ExitStack() as stack:
        yield lambda block_bytes=64 << 10: stack.enter_context(ALL_BACKENDS[request.param](block_bytes))


@pytest.fixture(scope="module")
def memory():
    """8 MiB of aligned memory; tests slice it."""
    slab = HostMemory(8 << 20)
    yield slab
    slab.close()


@pytest.fixture(scope="session")
def make_file(tmp_path_factory):
    """Write a file of so many random bytes that are on the disk, and return its identity and content."""
    directory = tmp_path_factory.mktemp("disk")
    count = 0

    def make(nbytes, parent=directory):
        nonlocal count
        count += 1
        path = parent / f"file-{os.getpid()}-{count}"
        content = os.urandom(nbytes)
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return identify(path), content

    return make


@pytest.fixture
def shared_memory_directory():
    """A directory on tmpfs."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)
