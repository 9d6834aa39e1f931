"""The portable reference: aiofiles on an event loop of its own.

It reaches the disk's rate only as it is used here: raw files (`buffering=0`) opened with O_DIRECT, `readinto` and not
`read`, blocks of 4 MiB, and an executor of its own, since the event loop's default one has `cpu count + 4` threads. As
seek and readinto share a position, every lane, one coroutine per thread, opens files for itself.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AsyncExitStack
from typing import Any, ClassVar

import aiofiles

from penstock.io.disk import Block, DiskReader
from penstock.io.open_file import OpenFile
from penstock.io.reader import Ticket

__all__ = ["AiofilesReader"]


class AiofilesReader(DiskReader):
    """Transfers blocks with aiofiles in `lanes` coroutines; with `direct=False`, through the page cache on purpose."""

    name: ClassVar[str] = "aiofiles"

    def __init__(self, *, lanes: int = 8, block_bytes: int | None = None, direct: bool = True) -> None:
        super().__init__(block_bytes=block_bytes or 4 << 20, direct=direct)
        self._lanes = lanes
        self._executor = ThreadPoolExecutor(lanes, thread_name_prefix="penstock-aiofiles")
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(self._executor)  # on which aiofiles closes files: its threads end with ours
        self._thread = threading.Thread(target=self._loop.run_forever, name="penstock-aiofiles-loop", daemon=True)
        self._thread.start()
        self._batches: dict[Ticket, tuple[list[Future[None]], set[OpenFile]]] = {}
        self._next_ticket = 0

    def _launch(self, blocks: Sequence[Block]) -> Ticket:
        """Hand the blocks to the lanes and return at once."""
        self._begin(len(blocks))
        queue = deque(blocks)
        lanes = [self._schedule(self._run_lane(queue)) for _ in range(min(self._lanes, len(blocks)))]
        ticket = self._next_ticket
        self._next_ticket += 1
        self._batches[ticket] = lanes, {block.opened for block in blocks}
        return ticket

    def wait(self, ticket: Ticket) -> None:
        """Block until the batch's lanes have ended; raise the first error."""
        self._check_open()
        lanes, files = self._batches.pop(ticket)
        wait(lanes)
        for lane in lanes:
            lane.result()
        self._check_unchanged(files)

    def _schedule(self, lane: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(lane, self._loop)

    async def _run_lane(self, queue: deque[Block]) -> None:
        """Take blocks off the queue until it is empty; after an error, drop what is left of it."""
        async with AsyncExitStack() as stack:
            handles: dict[tuple[OpenFile, bool], Any] = {}
            while queue:
                block = queue.popleft()
                delivered = False
                try:
                    await self._transfer(block, handles, stack)
                    delivered = True
                finally:
                    self._end(block, delivered=delivered)
                    if not delivered:
                        self._drop(queue)

    def _drop(self, queue: deque[Block]) -> None:
        while queue:
            self._end(queue.popleft(), delivered=False)

    async def _transfer(self, block: Block, handles: dict[tuple[OpenFile, bool], Any], stack: AsyncExitStack) -> None:
        done = False
        while not done:
            direct = block.issue()
            key = block.opened, direct
            if key not in handles:
                handles[key] = await stack.enter_async_context(self._open_lane(block.opened))
            handle, offset = handles[key], block.offset
            try:
                await handle.seek(offset)
                result = await (handle.write(block.memory) if block.write else handle.readinto(block.memory))
            except OSError as error:
                result = -(error.errno or errno.EIO)
            done = block.take(result)
            if not direct and not block.write and result > 0:
                os.posix_fadvise(handle.fileno(), offset, result, os.POSIX_FADV_DONTNEED)

    def _open_lane(self, opened: OpenFile) -> Any:
        # The path is ignored: the opener checks that it still names the same file.
        return aiofiles.open(
            opened.file.path,
            "r+b" if opened.write else "rb",
            buffering=0,
            opener=lambda _path, _flags: opened.open_again(),
            loop=self._loop,
            executor=self._executor,
        )

    def _drain(self) -> None:
        wait([lane for lanes, _ in self._batches.values() for lane in lanes])
        self._batches.clear()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._executor.shutdown(wait=True)
