"""The measuring loop with aiofiles: one coroutine and one raw file per request, in an executor of its own."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiofiles

from penstock.io.window import Job, Meter

__all__ = ["run_aiofiles"]


def run_aiofiles(job: Job, meter: Meter, watch: Callable[[], None]) -> None:
    """Transfer until the meter is done; returns, or raises, when no thread touches the memory any more."""
    # Left last: a cancelled coroutine does not end the read that its thread is in.
    with ThreadPoolExecutor(job.depth, thread_name_prefix="penstock-window", initializer=watch) as executor:
        watch()
        asyncio.run(_run(job, meter, executor))


async def _run(job: Job, meter: Meter, executor: ThreadPoolExecutor) -> None:
    offsets = job.offsets()
    lanes = [
        asyncio.create_task(_run_lane(job, meter, job.piece(index), offsets, executor)) for index in range(job.depth)
    ]
    try:
        await asyncio.wait(lanes, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        # Told to end, not cancelled: a cancelled lane would leave its thread reading, and lose a file being opened.
        meter.done = True
        await asyncio.wait(lanes)
    for lane in lanes:
        lane.result()


async def _run_lane(
    job: Job, meter: Meter, piece: memoryview, offsets: Iterator[int], executor: ThreadPoolExecutor
) -> None:
    async with aiofiles.open(
        job.opened.file.path,
        "r+b" if job.opened.write else "rb",
        buffering=0,
        opener=lambda _path, _flags: job.opened.open_again(),
        executor=executor,
    ) as handle:
        while not meter.done:
            offset = next(offsets)
            began = time.perf_counter()
            result = await _transfer(handle, job, piece, offset)
            ended = time.perf_counter()
            if not meter.done:
                meter.count_timed(result, ended - began)
                meter.goes_on(ended)


async def _transfer(handle: Any, job: Job, piece: memoryview, offset: int) -> int:
    try:
        await handle.seek(offset)
        result = int(await (handle.write(piece) if job.opened.write else handle.readinto(piece)))
    except OSError as error:
        return -(error.errno or errno.EIO)
    if not job.opened.write and not job.opened.direct:
        os.posix_fadvise(handle.fileno(), offset, result, os.POSIX_FADV_DONTNEED)
    return result
