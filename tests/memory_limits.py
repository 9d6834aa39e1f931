"""Memory limits that the kernel enforces, for tests and benchmarks that prove budgets."""

from __future__ import annotations

import os
import resource
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["memory_limit"]


@contextmanager
def memory_limit(nbytes: int) -> Iterator[tuple[str, Callable[[], Any], Path | None]]:
    """Yield the kind of limit, what a child calls to come under it, and the file that says what it took at most.

    A memory control group of version 2 or 1 where one can be made; else the limit on private writable memory.
    """
    name = f"penstock-{uuid.uuid4().hex}"
    for root, limit, peak in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    ):
        group = root / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                (group / limit).write_text(str(nbytes))
                join = group / "cgroup.procs"
                yield f"control group, {limit}", lambda join=join: join.write_text(str(os.getpid())), group / peak
                return
        finally:
            group.rmdir()
    yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes)), None
