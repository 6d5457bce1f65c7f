"""Files of a test's machine, and what processes see of them."""

from __future__ import annotations

from hmmnet.host.files import MemFd
from hmmnet.host.mm.space import Space
from hmmnet.pages import PAGE_SIZE

from .machine import Machine, page_bytes

PAGE = PAGE_SIZE
BASE = 1 << 30


def memfd(machine: Machine, pages: int) -> MemFd:
    return MemFd(machine.memory, pages * PAGE, 0)


async def filled(machine: Machine, pages: int) -> MemFd:
    """A file whose page i holds the byte i + 1 throughout."""
    file = memfd(machine, pages)
    await file.write(0, b"".join(page_bytes(i + 1) for i in range(pages)))
    return file


async def written(machine: Machine, pages: int = 4) -> Space:
    """A process whose page i, from `BASE` on, holds the byte i + 1 throughout."""
    space = machine.process()
    await space.mmap(pages * PAGE, "rw", BASE)
    await space.store(BASE, b"".join(page_bytes(i + 1) for i in range(pages)))
    return space


async def mapped(space: Space, file: MemFd, pages: int, at: int = BASE, *, shared: bool = True, first: int = 0, rights: str = "rw") -> int:
    return await space.mmap(pages * PAGE, rights, at, shared=shared, file=file.file("mmap"), offset=first * PAGE)


def symbols(space: Space, address: int, pages: int) -> str:
    """pagemap's letters, without the count of mappings."""
    return bytes(value & 0x7F for value in space.pagemap(address, pages)).decode()


def used(machine: Machine) -> int:
    return sum(node.allocator.used_count for node in machine.memory.nodes)
