"""A process that answers like a small kernel: enough to test the player without a machine.

It knows anonymous memory, read and write rights, and for each page on which unit it is. The real comparison is in tests/conformance.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hmmnet.errors import KernelError, SegmentationFault
from hmmnet.pages import PAGE_SIZE, page_range
from hmmnet.program import PM_PRESENT, Handle, IoctlResult, Mapping, MemoryFile, Residency


class FakeHandle:
    """An open unit; commands as test_hmm has them, without rights of device entries."""

    def __init__(self, process: FakeProcess, device: str, number: int) -> None:
        self.process = process
        self.device = device
        self.number = number
        self.mirrored: set[int] = set()

    async def ioctl(self, command: str, address: int, pages: int, data: bytes = b"", flags: int = 0) -> IoctlResult:
        if command == "release":
            self.process.bring_home(self.device)
            return IoctlResult(0, 0)
        if pages == 0:
            raise KernelError(errno.EINVAL, command, "no pages")
        wanted = range(address // PAGE_SIZE, address // PAGE_SIZE + pages)
        result: IoctlResult = getattr(self, command)(wanted, data)
        return result

    def _faults(self, wanted: range) -> int:
        missing = [page for page in wanted if page not in self.mirrored]
        for page in missing:
            if self.process.rights.get(page, "none") == "none":
                raise KernelError(errno.EFAULT, "read", "not mapped")
        self.mirrored.update(missing)
        return int(bool(missing))

    def read(self, wanted: range, data: bytes) -> IoctlResult:
        faults = self._faults(wanted)
        return IoctlResult(len(wanted), faults, b"".join(self.process.page(p) for p in wanted))

    def write(self, wanted: range, data: bytes) -> IoctlResult:
        faults = self._faults(wanted)
        for i, page in enumerate(wanted):
            self.process.memory[page] = data[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
        return IoctlResult(len(wanted), faults)

    def migrate_to_dev(self, wanted: range, data: bytes) -> IoctlResult:
        for page in wanted:
            if page not in self.process.rights:
                raise KernelError(errno.EINVAL, "migrate_vma_setup", "no vma")
            self.process.memory.setdefault(page, bytes(PAGE_SIZE))
            self.process.on[page] = self.device
            self.mirrored.add(page)
        return IoctlResult(len(wanted), 0, b"".join(self.process.page(p) for p in wanted))

    def migrate_to_sys(self, wanted: range, data: bytes) -> IoctlResult:
        here = [page for page in wanted if self.process.on.get(page) == self.device]
        for page in here:
            del self.process.on[page]
            self.mirrored.discard(page)
        return IoctlResult(len(here), 0)

    def snapshot(self, wanted: range, data: bytes) -> IoctlResult:
        def byte(page: int) -> int:
            if page not in self.process.rights:
                return 0xFF
            if page not in self.process.memory:
                return 0
            return 0x22 if page in self.process.on else 0x02

        return IoctlResult(len(wanted), 0, bytes(byte(page) for page in wanted))

    async def close(self) -> None:
        del self.process.handles[self.number]
        self.process.bring_home(self.device)


class FakeProcess:
    """Anonymous private memory of one process."""

    pid = 1

    def __init__(self) -> None:
        self.rights: dict[int, str] = {}
        self.memory: dict[int, bytes] = {}
        self.on: dict[int, str] = {}
        self.handles: dict[int, FakeHandle] = {}
        self.children: list[FakeProcess] = []
        self.exited = False

    def page(self, page: int) -> bytes:
        return self.memory.get(page, bytes(PAGE_SIZE))

    def bring_home(self, device: str) -> None:
        self.on = {page: name for page, name in self.on.items() if name != device}
        for handle in self.handles.values():
            handle.mirrored.clear()

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
        assert address is not None
        assert (populate, shared, file, offset, hugetlb) == (False, False, None, 0, False)
        if length == 0:
            raise KernelError(errno.EINVAL, "mmap", "no length")
        self.rights.update(dict.fromkeys(range(*page_range(address, length)), protection))
        return address

    async def munmap(self, address: int, length: int) -> None:
        for page in range(*page_range(address, length)):
            for table in (self.rights, self.memory, self.on):
                table.pop(page, None)

    async def mprotect(self, address: int, length: int, protection: str) -> None:
        for page in range(*page_range(address, length)):
            if page not in self.rights:
                raise KernelError(errno.ENOMEM, "mprotect", "hole")
            self.rights[page] = protection

    async def madvise(self, address: int, length: int, advice: str) -> None:
        for page in range(*page_range(address, length)):
            self.memory.pop(page, None)

    async def malloc(self, length: int) -> int:
        raise AssertionError("scripts never call malloc")

    def _touch(self, address: int, length: int, right: str) -> range:
        pages = range(*page_range(address, length))
        for page in pages:
            if right not in self.rights.get(page, ""):
                raise SegmentationFault(page * PAGE_SIZE, "no mapping")
            self.memory.setdefault(page, bytes(PAGE_SIZE))
            if self.on.pop(page, None):
                for handle in self.handles.values():
                    handle.mirrored.discard(page)
        return pages

    async def read(self, address: int, length: int) -> bytes:
        pages = self._touch(address, length, "r")
        return b"".join(self.memory[p] for p in pages)[address % PAGE_SIZE :][:length]

    async def write(self, address: int, data: Any) -> None:
        raw = bytes(data)
        pages = self._touch(address, len(raw), "w")
        whole = bytearray(b"".join(self.memory[p] for p in pages))
        whole[address % PAGE_SIZE : address % PAGE_SIZE + len(raw)] = raw
        for i, page in enumerate(pages):
            self.memory[page] = bytes(whole[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])

    async def load(self, address: int, dtype: str = "<u8") -> int | float:
        raise AssertionError("scripts never call load")

    async def store(self, address: int, value: float, dtype: str = "<u8") -> None:
        raise AssertionError("scripts never call store")

    async def read_array(self, address: int, dtype: str, count: int) -> Any:
        return np.frombuffer(await self.read(address, count * np.dtype(dtype).itemsize), dtype)

    async def pagemap(self, address: int, pages: int) -> bytes:
        first = address // PAGE_SIZE
        letters = {True: b"S"[0], False: b"P"[0] | 0x80}
        return bytes(letters[p in self.on] if p in self.memory else b"-"[0] for p in range(first, first + pages))

    async def pagemap_words(self, address: int, pages: int) -> npt.NDArray[np.uint64]:
        first = address >> 12
        return np.arange(first, first + pages, dtype=np.uint64) | np.uint64(PM_PRESENT)

    async def smaps(self) -> list[Mapping]:
        raise AssertionError("scripts never ask for smaps")

    async def oom_score(self) -> int:
        raise AssertionError("scripts never ask the OOM killer")

    async def set_oom_score_adj(self, value: int) -> None:
        raise AssertionError("scripts never ask the OOM killer")

    async def clear_refs(self, *, soft_dirty: bool = True) -> None:
        raise AssertionError("scripts never clear references")

    async def kill(self, *, out_of_memory: bool = False) -> None:
        raise AssertionError("scripts kill nobody")

    async def residency(self, address: int, pages: int) -> Residency:
        raise AssertionError("scripts never ask for residency")

    async def open(self, device: str) -> FakeHandle:
        number = len(self.handles) + 3
        self.handles[number] = FakeHandle(self, device, number)
        return self.handles[number]

    async def launch(self, kernel: str, device: str, placement: str = "demand", **arguments: Any) -> Any:
        raise AssertionError("scripts launch nothing")

    async def migrate(self, address: int, length: int, to: str) -> int:
        raise AssertionError("scripts migrate by ioctl")

    async def fork(self) -> FakeProcess:
        child = FakeProcess()
        child.rights, child.memory, child.handles = dict(self.rights), dict(self.memory), dict(self.handles)
        self.children.append(child)
        return child

    async def exit(self) -> None:
        self.exited = True


@pytest.fixture
def process() -> FakeProcess:
    return FakeProcess()


@pytest.fixture
def device_of() -> Callable[[int], str]:
    def name(unit: int) -> str:
        if unit > 3:
            raise KernelError(errno.ENOENT, "open", f"no device has unit {unit}")
        return f"dmirror{unit}"

    return name
