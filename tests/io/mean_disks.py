"""Disk backends that hear worse than what the kernel said: one script of answers for all of them.

`answers` has one entry per request that ended, in order: None, or a function from the kernel's result, bytes or -errno,
to the one that the backend gets.
"""

import os
from contextlib import asynccontextmanager

from penstock.io.aio_calls import SystemCalls
from penstock.io.aiofiles import AiofilesReader
from penstock.io.libaio import LibaioReader
from penstock.io.threads import ThreadsReader


class MeanCalls(SystemCalls):
    """Real AIO whose answers are worse: `submits` and `results` map what the kernel said to what the reader hears."""

    def __init__(self, submits=(), results=()):
        super().__init__()
        self._submits, self._results = iter(submits), iter(results)

    def submit(self, context, count, iocbs):
        limit = next(self._submits, count)
        return limit if limit < 0 else super().submit(context, min(limit, count), iocbs)

    def getevents(self, context, at_least, at_most, events):
        count = super().getevents(context, at_least, at_most, events)
        for index in range(count):
            change = next(self._results, None)
            if change is not None:
                events[index].result = change(events[index].result)
        return count


class MeanHandle:
    """An aiofiles handle with scripted answers."""

    def __init__(self, handle, hear):
        self._handle, self._hear = handle, hear

    async def seek(self, offset):
        return await self._handle.seek(offset)

    async def readinto(self, memory):
        return self._hear(await self._handle.readinto(memory))

    async def write(self, memory):
        return self._hear(await self._handle.write(memory))

    def fileno(self):
        return self._handle.fileno()


def mean_libaio(answers, block, monkeypatch):
    return LibaioReader(block_bytes=block, calls=MeanCalls(results=answers))


def mean_threads(answers, block, monkeypatch):
    hear = _hearing(answers)
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *call, real=real: hear(real(*call)))
    return ThreadsReader(threads=2, block_bytes=block)


def mean_aiofiles(answers, block, monkeypatch):
    hear = _hearing(answers)
    reader = AiofilesReader(lanes=2, block_bytes=block)
    open_lane = reader._open_lane

    @asynccontextmanager
    async def open_mean_lane(opened):
        async with open_lane(opened) as handle:
            yield MeanHandle(handle, hear)

    monkeypatch.setattr(reader, "_open_lane", open_mean_lane)
    return reader


def _hearing(answers):
    script = iter(answers)

    def hear(result):
        change = next(script, None)
        result = result if change is None else change(result)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    return hear


MEAN_DISKS = {"libaio": mean_libaio, "threads": mean_threads, "aiofiles": mean_aiofiles}
