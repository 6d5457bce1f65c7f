"""Open files of a process: memfd_create(2) and what one does with the descriptor, besides mapping it."""

from __future__ import annotations

import errno

from hmmnet.checks import Arrayable, as_bytes
from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SIZE

from .mm.filemap import File
from .mm.frames import PhysicalMemory
from .mm.truncate import check_size, punch, truncate


class MemFd:
    """A memfd; `hmmnet.program.MemoryFile`. `node` is where its pages come from while there is room."""

    def __init__(self, memory: PhysicalMemory, length: int, node: int) -> None:
        check_size("memfd_create", length)
        self.file = File(memory, length)
        self._node = node

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.file.size

    async def read(self, offset: int, length: int) -> bytes:
        """pread(2)."""
        _check("pread", offset, length)
        return self.file.read(offset, length)

    async def write(self, offset: int, data: Arrayable) -> None:
        """pwrite(2)."""
        raw = as_bytes(data)
        _check("pwrite", offset, len(raw))
        check_size("pwrite", offset + len(raw))
        self.file.write(offset, bytes(raw), self._node)

    async def punch(self, offset: int, length: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE."""
        await punch(self.file, offset, length)

    async def truncate(self, length: int) -> None:
        """ftruncate(2)."""
        await truncate(self.file, length)


def _check(call: str, offset: int, length: int) -> None:
    if offset < 0 or length < 0:
        raise KernelError(errno.EINVAL, call, f"{length} bytes at byte {offset} of a file make no sense (pages have {PAGE_SIZE})")
