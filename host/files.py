"""Open files of a process: memfd_create(2) and what one does with the descriptor, besides mapping it."""

from __future__ import annotations

import errno

from hmmnet.checks import Arrayable, as_bytes, check_file
from hmmnet.errors import KernelError

from .mm.filemap import File
from .mm.frames import PhysicalMemory
from .mm.memcg import MemoryCgroup
from .mm.truncate import punch, truncate


class MemFd:
    """See `hmmnet.program.MemoryFile`. Its pages come from host memory `node` while that has room, charged to `group`.

    Raises KernelError: EINVAL, EFBIG.
    """

    def __init__(self, memory: PhysicalMemory, length: int, node: int, group: MemoryCgroup | None = None) -> None:
        check_file("memfd_create", 0, length)
        self._file: File | None = File(memory, length)
        self._node = node
        self._group = group

    def file(self, call: str) -> File:
        """What is open. Raises KernelError(EBADF)."""
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
        return file.read(offset, length)

    async def write(self, offset: int, data: Arrayable) -> None:
        """pwrite(2)."""
        file = self.file("pwrite")
        raw = as_bytes(data)
        check_file("pwrite", offset, len(raw))
        async with file.lock.write():
            file.write(offset, raw, self._node, self._group)

    async def punch(self, offset: int, length: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE."""
        await punch(self.file("fallocate"), offset, length)

    async def truncate(self, length: int) -> None:
        """ftruncate(2)."""
        check_file("ftruncate", 0, length)
        await truncate(self.file("ftruncate"), length)

    async def close(self) -> None:
        """close(2)."""
        self._file = None
