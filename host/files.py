"""Open files of a process: memfd_create(2) and what one does with the descriptor, besides mapping it.

Whose exit closes a descriptor stands in the table of each process that has it: of the one that made it, and of all that this one forked
since. Here, unlike in the kernel, they share the descriptor itself and not only the file behind it: `close` closes it for all of them.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from hmmnet.checks import Arrayable, as_bytes, check_file
from hmmnet.errors import KernelError
from hmmnet.program import MemoryFile, documented_by

from .mm.filemap import File
from .mm.frames import PhysicalMemory
from .mm.memcg import MemoryCgroup
from .mm.relief import KERNEL
from .mm.truncate import punch, truncate

T = TypeVar("T")


@documented_by(MemoryFile)
class MemFd:
    """See `hmmnet.program.MemoryFile`. Its pages come from host memory `node` while that has room, charged to `group`.

    Raises KernelError: EINVAL, EFBIG.
    """

    def __init__(self, memory: PhysicalMemory, length: int, node: int, group: MemoryCgroup | None = None) -> None:
        check_file("memfd_create", 0, length)
        self._file: File | None = File(memory, length)
        self._file.open()
        self._memory = memory
        self._node = node
        self._group = group
        self._tables: list[dict[MemFd, None]] = []

    def enter(self, table: dict[MemFd, None]) -> None:
        """One more process has it, among the files in `table`."""
        table[self] = None
        self._tables.append(table)

    def leave(self, table: dict[MemFd, None]) -> None:
        """The process whose `table` this is exits; the last one closes the file."""
        del table[self]
        self._tables = [other for other in self._tables if other is not table]
        if not self._tables:
            self._close()

    def file(self, call: str) -> File:
        """What is open. Raises KernelError(EBADF)."""
        self._memory.there()
        if self._file is None:
            raise KernelError(errno.EBADF, call, "the file is closed")
        return self._file

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.file("fstat").size

    async def read(self, offset: int, length: int) -> bytes:
        """pread(2)."""
        file = self.file("pread")
        check_file("pread", offset, 0)
        check_file("pread", 0, length)

        async def look() -> bytes:
            return file.read(offset, length)

        return await self._anew(look)

    async def write(self, offset: int, data: Arrayable) -> None:
        """pwrite(2)."""
        file = self.file("pwrite")
        raw = as_bytes(data)
        check_file("pwrite", offset, len(raw))

        async def store() -> None:
            async with file.lock.write():
                file.write(offset, raw, self._node, self._group)

        with file.held():
            await self._anew(store)

    async def punch(self, offset: int, length: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE."""
        file = self.file("fallocate")
        with file.held():
            await self._anew(partial(punch, file, offset, length))

    async def truncate(self, length: int) -> None:
        """ftruncate(2)."""
        check_file("ftruncate", 0, length)
        file = self.file("ftruncate")
        with file.held():
            await self._anew(partial(truncate, file, length))

    async def _anew(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` answers, for which somebody may be killed: pages are made, or read back from swap. Whose call it is nobody knows."""
        return await self._memory.relief.anew(call, KERNEL)

    async def close(self) -> None:
        """close(2)."""
        self._memory.there()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
            for table in self._tables:
                del table[self]
