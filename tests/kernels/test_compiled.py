"""The cache of compiled kernels: shared by processes, never believed, and never needed."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import cffi
import pytest
import torch
from paged_cases import Case, make, wanted

from penstock.kernels import compiled, paged_cpu
from penstock.kernels.compiled import Source, load
from penstock.kernels.paged_reference import attend_paged

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path):
    """A C file that compiles in no time, with a header."""
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    path = tmp_path / "answer.c"
    path.write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    return Source(path, (tmp_path / "answer.h",))


def open_answer(source, directory):
    ffi = cffi.FFI()
    ffi.cdef("int answer(void);")
    return load(source, directory, ffi)


def kept(directory):
    return sorted(path.name for path in directory.iterdir())


def test_compiled_once(source, tmp_path, monkeypatch):
    directory = tmp_path / "deep" / "cache"
    assert open_answer(source, directory).answer() == 42
    (name,) = kept(directory)
    assert name.startswith("answer-")
    assert stat.S_IMODE((directory / name).stat().st_mode) == 0o700
    monkeypatch.setattr(compiled, "_compile", None)
    assert open_answer(source, directory).answer() == 42


def test_a_change_of_the_source_is_another_library(source, tmp_path):
    directory = tmp_path / "cache"
    open_answer(source, directory)
    source.headers[0].write_text("#define ANSWER 43\n")
    assert open_answer(source, directory).answer() == 43
    assert len(kept(directory)) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "text"])
def test_a_damaged_library_is_made_again(source, tmp_path, damage, caplog):
    directory = tmp_path / "cache"
    open_answer(source, directory)
    (name,) = kept(directory)
    whole = (directory / name).read_bytes()
    middle = len(whole) // 2
    broken = {
        "empty": b"",
        "cut": whole[:middle],
        "text": b"no library",
        "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    }
    other = tmp_path / "other"
    other.mkdir()
    (other / name).write_bytes(broken[damage])
    (other / name).chmod(0o700)
    assert open_answer(source, other).answer() == 42
    assert "damaged" in caplog.text
    assert compiled._is_whole(other / name)


def test_what_others_can_write_is_not_loaded(source, tmp_path, caplog):
    directory = tmp_path / "cache"
    open_answer(source, directory)
    (name,) = kept(directory)
    (directory / name).chmod(0o777)
    assert open_answer(source, directory).answer() == 42
    assert "can be written by other users" in caplog.text


def test_a_cache_that_cannot_be_written(source, tmp_path, caplog):
    """A file where the directory should be: that stops root too."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert open_answer(source, blocked / "cache").answer() == 42
    assert "not kept for the next run" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache(source, tmp_path, caplog):
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o500)
    assert open_answer(source, directory).answer() == 42
    assert "not kept for the next run" in caplog.text


def test_no_cache(source):
    assert open_answer(source, None).answer() == 42


def test_no_compiler(source, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    assert open_answer(source, tmp_path / "cache") is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no C compiler found" in record.getMessage()
    assert not (tmp_path / "cache").exists()


def test_a_compiler_that_refuses(source, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    source.path.write_text("int answer(void) { return nonsense; }\n")
    assert open_answer(source, tmp_path / "cache") is None
    assert "nonsense" in caplog.text
    assert (
        "cannot be compiled" in [record.getMessage() for record in caplog.records if record.levelno > logging.INFO][-1]
    )
    assert kept(tmp_path / "cache") == []


def test_a_compiler_that_is_none(source, tmp_path, monkeypatch, caplog):
    """One that only fails, and one that knows no -march=native: the next compiler, or plain code, is taken."""
    tools = tmp_path / "bin"
    tools.mkdir()
    real = compiled._find_compiler().path
    for name, script in {
        "cc": "exit 1",
        "gcc": f'case " $* " in *march*) echo no such option >&2; exit 1;; esac; PATH=/usr/bin:/bin exec {real} "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setattr(compiled.sysconfig, "get_config_var", lambda _: "cc -pthread")
    monkeypatch.setenv("PATH", str(tools))
    assert open_answer(source, tmp_path / "cache").answer() == 42


def test_without_a_compiler_the_reference_serves(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PATH", "")
    attend = paged_cpu.load_attend_paged(tmp_path / "cache")
    assert attend is attend_paged
    assert "no C compiler found" in caplog.text
    call = make(Case((20, 3)))
    torch.testing.assert_close(call.run(attend), wanted(call))


CHILD = """
import sys
from pathlib import Path
import cffi
from penstock.kernels.compiled import Source, load
ffi = cffi.FFI()
ffi.cdef("int answer(void);")
sys.stdin.read(1)
source = Source(Path(sys.argv[1], "answer.c"), (Path(sys.argv[1], "answer.h"),))
print(load(source, Path(sys.argv[2]), ffi).answer())
"""


def test_many_processes_at_once(source, tmp_path):
    """All start to compile when their inputs close; each gets a library, and one file stays."""
    directory = tmp_path / "cache"
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(directory)]
    children = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for child in children:
        child.stdin.close()
    for child in children:
        with child.stdout:
            assert child.stdout.read() == "42\n"
        assert child.wait() == 0
    assert len(kept(directory)) == 1
