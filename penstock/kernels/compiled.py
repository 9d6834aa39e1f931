"""C sources, compiled at their first use on a machine and kept for the next process.

They are compiled for the processor that runs them, so there is nothing to choose at run time, and a cached library is
found by everything that made it: source, flags, compiler and processor. A library ends with a digest of its bytes,
since the loader would believe a damaged one. Whatever fails is logged with its reason, and the caller has a reference.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Source", "load"]

_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
_LAST_FLAGS = ("-lm", "-Wl,-z,nodelete")  # the library's threads outlive whoever opened it
_TARGETS = (("-march=native",), ())
_COMPILE_SECONDS = 120
_DIGEST_NBYTES = hashlib.sha256().digest_size

logger = logging.getLogger("penstock.kernels")


@dataclass(frozen=True, slots=True)
class Source:
    """A C file, and the headers beside it that it includes."""

    path: Path
    headers: tuple[Path, ...] = ()

    def read(self) -> bytes:
        """Return all of the text."""
        return b"\0".join(path.read_bytes() for path in (self.path, *self.headers))


@dataclass(frozen=True, slots=True)
class _Compiler:
    path: str
    version: str


class _CompileError(Exception):
    """The compiler refused; its words are the message."""


def load(source: Source, directory: Path | None, ffi: Any) -> Any | None:
    """Return the library of `source`, opened by `ffi`; compile it unless `directory` has it already.

    Many processes may do so at once. Without a directory that can be written the library is made in a temporary one,
    and not kept. Returns None, and logs why, when there is no compiler or none of its libraries can be loaded.
    """
    compiler = _find_compiler()
    if compiler is None:
        logger.warning(
            "%s is not compiled, torch does its work more slowly: no C compiler found (cc, gcc or clang)",
            source.path.name,
        )
        return None
    reasons = []
    for target in _TARGETS:
        flags = (*_FLAGS, *target)
        try:
            return _open(source, compiler, flags, directory, ffi)
        except (_CompileError, OSError) as error:
            reasons.append(f"{compiler.path} {shlex.join(flags)}: {error}")
            logger.debug("%s: %s", source.path.name, reasons[-1])
    logger.warning(
        "%s cannot be compiled, torch does its work more slowly: %s", source.path.name, reasons[-1].splitlines()[0]
    )
    return None


def _open(source: Source, compiler: _Compiler, flags: tuple[str, ...], directory: Path | None, ffi: Any) -> Any:
    """Open the kept library, or one made there, or one made elsewhere. Raises _CompileError and OSError."""
    name = f"{source.path.stem}-{_key(source, compiler, flags)}.so"
    if directory is not None:
        path = directory / name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not _is_whole(path):
                _compile(source, compiler, flags, path)
            return ffi.dlopen(str(path))
        except (_CompileError, OSError) as error:  # a full disk makes the compiler fail
            logger.warning("%s is not kept for the next run: %s", name, error)
    # An open library stays mapped when its file goes.
    with tempfile.TemporaryDirectory(prefix="penstock-") as temporary:
        path = Path(temporary, name)
        _compile(source, compiler, flags, path)
        return ffi.dlopen(str(path))


def _find_compiler() -> _Compiler | None:
    configured = shlex.split(sysconfig.get_config_var("CC") or "")[:1]
    for name in (*configured, "cc", "gcc", "clang"):
        path = shutil.which(name)
        if path is None:
            continue
        try:
            done = _run([path, "--version"])
        except (OSError, subprocess.SubprocessError) as error:
            logger.debug("%s: %s", path, error)
            continue
        if done.returncode == 0:
            return _Compiler(path, done.stdout)
    return None


def _key(source: Source, compiler: _Compiler, flags: tuple[str, ...]) -> str:
    """Return a name for everything that decides what the compiler makes."""
    parts = (compiler.path, compiler.version, *flags, *_LAST_FLAGS, platform.machine(), _processor())
    digest = hashlib.sha256(source.read())
    for part in parts:
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Return what -march=native looks at: the processor's model and abilities."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return platform.processor()
    names = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU ")
    return "\n".join(line for line in first.splitlines() if line.startswith(names))


def _compile(source: Source, compiler: _Compiler, flags: tuple[str, ...], path: Path) -> None:
    """Make `path`, which appears whole or not at all. Raises _CompileError and OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    hidden = Path(name)
    try:
        command = [compiler.path, *flags, str(source.path), "-o", name, *_LAST_FLAGS]
        try:
            done = _run(command)
        except subprocess.SubprocessError as error:
            raise _CompileError(str(error)) from error
        if done.returncode != 0:
            raise _CompileError(done.stderr.strip() or f"exit status {done.returncode}")
        with hidden.open("r+b") as stream:
            digest = hashlib.sha256(stream.read()).digest()
            stream.write(digest)
        hidden.chmod(0o700)
        hidden.replace(path)
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink()


def _is_whole(path: Path) -> bool:
    """Say whether this is a library as it was made, by this user or root and closed to the others' writing."""
    try:
        data, state = path.read_bytes(), path.stat()
    except FileNotFoundError:
        return False
    if state.st_uid not in {0, os.geteuid()} or state.st_mode & 0o022:
        raise PermissionError(f"{path} can be written by other users")
    if hashlib.sha256(data[:-_DIGEST_NBYTES]).digest() == data[-_DIGEST_NBYTES:]:
        return True
    logger.warning("%s is damaged and will be made again", path)
    return False


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - a list, no shell
        command, capture_output=True, text=True, errors="replace", check=False, timeout=_COMPILE_SECONDS,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
