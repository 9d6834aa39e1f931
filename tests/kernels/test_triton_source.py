"""What Triton's compiler refuses, looked for in the source, since most machines that run the tests have no Triton."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

import pytest

from penstock import kernels

FILES = sorted(Path(next(iter(kernels.__path__))).glob("*_triton.py"))


def kernels_of(tree: ast.Module) -> list[ast.FunctionDef]:
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [one for one in functions if any("triton.jit" in ast.unparse(mark) for mark in one.decorator_list)]


def imported_kernels(tree: ast.Module) -> set[str]:
    """Return the names of kernels that come from other files of kernels."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("_triton"):
            file = next(one for one in FILES if one.stem == (node.module or "").rpartition(".")[2])
            there = {kernel.name for kernel in kernels_of(ast.parse(file.read_text()))}
            names |= there & {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_kernels_name_nothing_that_the_compiler_cannot_see(file: Path) -> None:
    """It looks up every name, those of annotations too, and takes modules, other kernels and constexprs."""
    tree = ast.parse(file.read_text())
    found = kernels_of(tree)
    assert found
    known = {"tl", "triton", *vars(builtins), *(kernel.name for kernel in found), *imported_kernels(tree)}
    for kernel in found:
        names = [node for node in ast.walk(kernel) if isinstance(node, ast.Name)]
        known_here = (
            known
            | {one.arg for one in kernel.args.args}
            | {name.id for name in names if isinstance(name.ctx, ast.Store)}
        )
        unknown = {name.id for name in names} - known_here
        assert not unknown, f"{kernel.name} names {unknown}"
