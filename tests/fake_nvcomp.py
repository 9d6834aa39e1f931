"""A library with nvCOMP's symbols that works on host memory, installed as pip would do it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from penstock.errors import ConfigError
from penstock.kernels import ans, nvcomp

SOURCE = Path(__file__).with_suffix(".c")


def build(site: Path, *defines: str) -> Path:
    """Make a directory of packages that has the library, for either CUDA; return it."""
    library = site / nvcomp._FILE
    library.parent.mkdir(parents=True)
    compiler = shutil.which("cc")
    assert compiler, "tests of the library need a C compiler"
    subprocess.run(
        [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", *defines, "-o", library, SOURCE], check=True
    )
    for name in nvcomp._PACKAGES.values():
        metadata = site / f"{name.replace('-', '_')}-6.0.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 6.0.0\n")
    return site


@contextmanager
def installed(monkeypatch: Any, site: Path) -> Iterator[None]:
    """Enter to have a directory of packages before all others."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(site))
        nvcomp.open_nvcomp.cache_clear()
        yield
    nvcomp.open_nvcomp.cache_clear()


@contextmanager
def taken_for_a_gpu(monkeypatch: Any, site: Path) -> Iterator[None]:
    """Enter to have what needs a GPU done on the CPU, by the library that works there."""

    @contextmanager
    def no_stream(tensor: torch.Tensor) -> Iterator[int]:
        yield 0

    with installed(monkeypatch, site), monkeypatch.context() as patch:
        patch.setattr(ans, "_stream_of", no_stream)
        patch.setattr(ans, "check_usable", lambda device: None)
        yield


def is_real() -> bool:
    """Say whether there is a GPU and the real library."""
    try:
        ans.find_device()
    except ConfigError:
        return False
    return True
