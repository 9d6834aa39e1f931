"""What tests of kernels share: the compiled attention, made once for all of them."""

import pytest

from penstock.kernels.paged_cpu import CompiledAttention, load_attend_paged


@pytest.fixture(scope="session")
def attend_compiled(kernel_directory):
    kernel = load_attend_paged(kernel_directory)
    assert isinstance(kernel, CompiledAttention), "tests of the kernel need a C compiler"
    return kernel
