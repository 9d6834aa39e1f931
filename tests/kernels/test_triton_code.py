"""What machine code the Triton kernels become: its compiler needs no GPU, so this runs wherever Triton is installed.

`JITFunction`'s launch is exchanged for its own `warmup`, under a driver that names another GPU; so the kernels get the
arguments and options that launching code gives them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from penstock.kernels.attention import Rule
from penstock.kernels.exact import choose_table, encode
from penstock.kernels.groupwise import quantise

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter compiles nothing")

SHARED_NBYTES = {86: 99 << 10, 90: 227 << 10}
"""What a block may have, by compute capability: RTX 3090, as later ones and less than A100; H100 and H200."""


@dataclass(frozen=True)
class Elsewhere:
    """Stands for the driver of a GPU that is not there."""

    capability: int

    def get_current_device(self) -> str:
        return f"sm_{self.capability}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        compiler = importlib.import_module("triton.backends.compiler")
        return compiler.GPUTarget("cuda", self.capability, 32)


@pytest.fixture(params=SHARED_NBYTES, ids=lambda capability: f"sm_{capability}")
def compiled(request, monkeypatch, tmp_path):
    """Return a function that calls launching code and returns the kernels that it would have launched, by name."""
    jit = importlib.import_module("triton.runtime.jit")
    made: dict[str, Any] = {}

    def instead(function: Any, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            made[function.__name__] = function.run(*arguments, grid=grid, warmup=True, **options)

        return launch

    def collect(launching: Callable[[], None]) -> dict[str, Any]:
        made.clear()
        launching()
        for kernel in made.values():
            assert kernel.metadata.shared <= SHARED_NBYTES[request.param]
        return dict(made)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Elsewhere(request.param))
    monkeypatch.setattr(jit.JITFunction, "__getitem__", instead)
    return collect


def attend(
    heads: tuple[int, int], sizes: tuple[int, int], *, max_length: int = 2000, offset: int = 0, rule: Rule | None = None
) -> Callable[[], None]:
    """Return a call of paged attention for 3 sequences of a micro-batch with `offset` more tokens.

    `offset` is how far tables lie off 16-byte borders, too.
    """
    kernels = importlib.import_module("penstock.kernels.paged_triton")
    query = torch.empty(heads[0], 3 + offset, sizes[0], dtype=torch.bfloat16).transpose(0, 1)[:3]
    keys = torch.empty(4, 16, heads[1], sizes[0], dtype=torch.bfloat16)
    values = keys[..., : sizes[1]] if sizes[0] > 256 else keys.new_empty(4, 16, heads[1], sizes[1])
    table = torch.zeros(offset + 3 * 40, dtype=torch.int32)[offset:].view(3, 40)
    lengths = torch.ones(offset + 3, dtype=torch.int32)[offset:]
    options: dict[str, Any] = {"rule": rule or Rule(0.3), "max_length": max_length, "workspace_nbytes": 1 << 20}
    out = torch.empty(3, heads[0], sizes[1], dtype=torch.bfloat16)
    return lambda: kernels.attend_paged(query, keys, values, table, lengths, **options, out=out)


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [((64, 8), (128, 128)), ((128, 1), (576, 512)), ((128, 1), (256, 256)), ((71, 1), (64, 64)), ((12, 4), (192, 128))],
)
def test_attention_fits_shared_memory(compiled, heads, sizes) -> None:
    assert set(compiled(attend(heads, sizes))) == {"_attend_part", "_join_parts"}


def test_a_pass_compiles_nothing_that_another_has_not(compiled) -> None:
    """Where tables lie, how long sequences are, what a window is: the code is the same."""
    (first,) = compiled(attend((6, 2), (72, 72), max_length=300, rule=Rule(0.3, window=16))).values()
    (again,) = compiled(attend((6, 2), (72, 72), max_length=17, offset=1, rule=Rule(0.3, window=1))).values()
    assert again is first
    several = compiled(attend((6, 2), (72, 72), max_length=600))
    assert compiled(attend((6, 2), (72, 72), max_length=20_000, offset=3)) == several


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers(compiled, bits: int, symmetric: bool) -> None:
    kernels = importlib.import_module("penstock.kernels.expand_triton")
    made = quantise(torch.ones(8, 192), bits=bits, group_size=64, symmetric=symmetric)
    zero = None if made.zero is None else made.zero[None]
    out = torch.empty(1, 8, 192, dtype=torch.bfloat16)
    call = lambda: kernels.dequantise(made.codes[None], made.scale[None], zero, out, bits=bits, group_size=64)  # noqa: E731
    assert set(compiled(call)) == {"_dequantise"}


def test_exact_weights_compile_once_however_many_exponents_escape(compiled) -> None:
    kernels = importlib.import_module("penstock.kernels.expand_triton")
    values = torch.ones(4096, dtype=torch.bfloat16)
    table = choose_table(values)
    made = encode(values, table)
    found = []
    for escapes in (0, 1, 16, 17):
        extra = torch.zeros(1, escapes, dtype=torch.uint8)
        parts = (made.low[None], made.code[None], table[None], made.start[None], extra)
        found += compiled(lambda parts=parts: kernels.decode_exact(*parts, out=values[None])).values()
    assert len(set(map(id, found))) == 1
