"""What tests of kernels share: the compiled attention, made once for all of them, and where Triton's kernels run."""

import importlib.util
import os

import pytest
import torch

from penstock.kernels.paged_cpu import CompiledAttention, load_attend_paged


@pytest.fixture(scope="session")
def attend_compiled(kernel_directory):
    kernel = load_attend_paged(kernel_directory)
    assert isinstance(kernel, CompiledAttention), "tests of the kernel need a C compiler"
    return kernel


@pytest.fixture(scope="session")
def triton_device():
    """The GPU; or, where TRITON_INTERPRET=1 is set and Triton is installed, the CPU: Python goes through the kernels.

    What the interpreter cannot show (shared memory, alignment, code that does not compile) `test_triton_code` looks at.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("no CUDA device; TRITON_INTERPRET=1 runs it on the CPU")
    return "cpu"
