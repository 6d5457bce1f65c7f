"""System calls of a process that does nothing but note them: what test doubles of `hmmnet.program.Process` have in common."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from hmmnet.program import PM_PRESENT, Handle, Mapping, MemoryFile


class LoggedReferences:
    """Two pages that are held."""

    count = 2

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    async def read(self, pages: int, first: int = 0) -> bytes:
        return bytes(range(first, first + pages)) * 4096

    async def put(self) -> None:
        self.log.append("put")


class LoggedFaults:
    """One page is missing."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    async def read(self) -> int:
        return 0x5000

    async def copy(self, address: int, data: bytes) -> None:
        self.log.append(("copy", address, data))

    async def close(self) -> None:
        self.log.append("closed")


class PlainFile:
    """A file of bytes."""

    def __init__(self, length: int) -> None:
        self.data = bytearray(length)
        self.holes: list[tuple[int, int]] = []
        self.closed = False

    @property
    def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes | bytearray | memoryview | npt.NDArray[Any]) -> None:
        self.data = self.data.ljust(offset, b"\0")
        self.data[offset : offset + len(data)] = bytes(data)

    async def punch(self, offset: int, length: int) -> None:
        self.holes.append((offset, length))

    async def truncate(self, length: int) -> None:
        self.data = self.data[:length].ljust(length, b"\0")

    async def close(self) -> None:
        self.closed = True


class LoggedCalls:
    """A process that notes its system calls in `log`; its child is another of its kind, with the next number."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.handles: dict[int, Handle] = {}
        self.log: list[Any] = []
        self.children: list[Self] = []
        self.files: list[PlainFile] = []

    async def mmap(
        self,
        length: int,
        protection: str = "rw",
        address: int | None = None,
        *,
        populate: bool = False,
        shared: bool = False,
        file: MemoryFile | Handle | None = None,
        offset: int = 0,
        hugetlb: bool = False,
    ) -> int:
        self.log.append(("mmap", length, protection, address, populate, shared, file, offset, hugetlb))
        return 0x1000

    async def memfd_create(self, length: int) -> MemoryFile:
        self.files.append(PlainFile(length))
        return self.files[-1]

    async def mprotect(self, address: int, length: int, protection: str) -> None:
        self.log.append(("mprotect", address, length, protection))

    async def madvise(self, address: int, length: int, advice: str) -> None:
        self.log.append(("madvise", address, length, advice))

    async def mlock(self, address: int, length: int) -> None:
        self.log.append(("mlock", address, length))

    async def userfaultfd(self, address: int, length: int, *, sigbus: bool = False) -> LoggedFaults:
        self.log.append(("userfaultfd", address, length, sigbus))
        return LoggedFaults(self.log)

    async def munlock(self, address: int, length: int) -> None:
        self.log.append(("munlock", address, length))

    async def mremap(
        self, address: int, old: int, new: int, target: int | None = None, *, may_move: bool = True, dontunmap: bool = False
    ) -> int:
        self.log.append(("mremap", address, old, new, target, may_move, dontunmap))
        return 0x2000

    async def get_user_pages(
        self, address: int, pages: int, *, write: bool = False, pin: bool = False, longterm: bool = False
    ) -> LoggedReferences:
        self.log.append(("get_user_pages", address, pages, write, pin, longterm))
        return LoggedReferences(self.log)

    async def fork(self) -> Self:
        child = type(self)(self.pid + 1)
        child.handles.update(self.handles)
        self.children.append(child)
        return child

    async def exit(self) -> None:
        self.log.append("exit")

    async def pagemap_words(self, address: int, pages: int) -> npt.NDArray[np.uint64]:
        first = address >> 12
        return np.arange(first, first + pages, dtype=np.uint64) | np.uint64(PM_PRESENT)

    async def smaps(self) -> list[Mapping]:
        return [Mapping(0x1000, 0x3000, "rw-p", 8192, 4096, 0, 0, 0, 0)]

    async def clear_refs(self, *, soft_dirty: bool = True) -> None:
        self.log.append(("clear_refs", soft_dirty))

    async def oom_score(self) -> int:
        return 666

    async def set_oom_score_adj(self, value: int) -> None:
        self.log.append(("oom_score_adj", value))

    async def kill(self, *, out_of_memory: bool = False) -> None:
        self.log.append(("kill", out_of_memory))
