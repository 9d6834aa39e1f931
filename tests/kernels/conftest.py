"""What tests of kernels share: the compiled attention, made once for all of them."""

import pytest

from penstock.kernels.paged_cpu import CompiledAttention, load_attend_paged


@pytest.fixture(scope="session")
def kernel_directory(tmp_path_factory, worker_id):
    """Where compiled kernels are kept, the same for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "kernels"


@pytest.fixture(scope="session")
def attend_compiled(kernel_directory):
    kernel = load_attend_paged(kernel_directory)
    assert isinstance(kernel, CompiledAttention), "tests of the kernel need a C compiler"
    return kernel
