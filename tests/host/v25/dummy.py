"""A v25 driver for tests: a mirror that remembers what it was told, and private memory whose bytes are in a dictionary."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import trio

from hmmnet.arena import Arena
from hmmnet.errors import KernelError
from hmmnet.host import v25
from hmmnet.host.mm.space import Space
from hmmnet.host.personality import V25
from hmmnet.host.v25 import Kernel, VmArea
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, Words
from tests.host.fakes import Bench

Step = Callable[[], Awaitable[None]]


@contextmanager
def refused(code: int, text: str | None = None) -> Iterator[None]:
    """The block raises KernelError with this errno."""
    with pytest.raises(KernelError, match=text) as info:
        yield
    assert info.value.code == code, info.value


class Listener:
    """A mirror's callbacks, in a log that several may share; `during` runs inside each."""

    def __init__(self, name: str = "", log: list[tuple[str, int, int]] | None = None, during: Step | None = None) -> None:
        self.name = name
        self.log: list[tuple[str, int, int]] = [] if log is None else log
        self.during = during
        self.mirror = v25.HmmMirror(self)

    async def sync_cpu_device_pagetables(self, mirror: v25.HmmMirror, update: v25.HmmUpdate, start: int, end: int) -> None:
        assert mirror is self.mirror
        assert update is v25.HMM_UPDATE_INVALIDATE
        if self.during is not None:
            await self.during()
        self.log.append((self.name, start >> PAGE_SHIFT, end >> PAGE_SHIFT))


class Dummy(Listener):
    """A whole driver. `loses` are addresses whose bytes it cannot bring home any more; `refuses` are such that it leaves where they are."""

    def __init__(self, kernel: Kernel, pages: int = 1) -> None:
        super().__init__("dummy")
        self.kernel = kernel
        self.devmem = kernel.hmm_devmem_add(self, kernel.hmm_device_new(self), pages << PAGE_SHIFT)
        self.idle = list(range(self.devmem.pfn_first, self.devmem.pfn_last + 1))
        self.held: dict[int, bytes] = {}
        self.table: dict[int, int] = {}
        self.freed: list[int] = []
        self.counts_at_free: list[int] = []
        self.sources: list[int] = []
        self.loses: set[int] = set()
        self.refuses: set[int] = set()
        self.during_copy: Step = trio.lowlevel.checkpoint
        self.answer = v25.VmFault.NONE
        self.flags = 0
        """Bits of every destination that this driver forgets."""

    async def sync_cpu_device_pagetables(self, mirror: v25.HmmMirror, update: v25.HmmUpdate, start: int, end: int) -> None:
        await super().sync_cpu_device_pagetables(mirror, update, start, end)
        for address in [address for address in self.table if start <= address < end]:
            del self.table[address]

    # --- devmem ---------------------------------------------------------------------------------------------------------------

    def free(self, devmem: v25.HmmDevmem, page: int) -> None:
        self.freed.append(page)
        self.counts_at_free.append(devmem.page_count(page))
        self.held.pop(page, None)
        self.idle.append(page)

    async def fault(self, devmem: v25.HmmDevmem, vma: VmArea, address: int, page: int, flags: int, pmd: int) -> v25.VmFault:
        assert devmem is self.devmem
        assert page in self.held
        assert pmd <= address < pmd + (2 << 20)
        if not self.answer:
            await self.migrate(vma, address, 1, home=True)
        return self.answer

    # --- migration --------------------------------------------------------------------------------------------------------------

    async def migrate(self, vma: VmArea, address: int, pages: int, *, home: bool = False) -> tuple[Words, Words]:
        src, dst = np.zeros(pages, np.uint64), np.zeros(pages, np.uint64)
        await self.kernel.migrate_vma(self, vma, address, address + pages * PAGE_SIZE, src, dst, home)
        return src, dst

    async def alloc_and_copy(self, vma: VmArea, src: Words, dst: Words, start: int, end: int, private: Any) -> None:
        self.sources += src.tolist()
        await self.during_copy()
        for i, word in enumerate(src.tolist()):
            address = start + i * PAGE_SIZE
            frame = v25.migrate_pfn_to_frame(word)
            if not word & v25.MIGRATE_PFN_MIGRATE or address in self.refuses:
                continue
            if private:
                if address in self.loses:
                    dst[i] = v25.MIGRATE_PFN_ERROR
                elif frame in self.held:
                    target = self.kernel.alloc_page_vma(vma)
                    self.kernel.write_page(target, self.held[frame])
                    dst[i] = v25.migrate_pfn(target) | v25.MIGRATE_PFN_LOCKED
            elif frame not in self.held:
                target = self.idle.pop(0)
                self.held[target] = bytes(PAGE_SIZE) if frame is None else self.kernel.read_page(frame)
                dst[i] = (v25.migrate_pfn(target) | v25.MIGRATE_PFN_LOCKED | v25.MIGRATE_PFN_DEVICE) & ~self.flags

    async def finalize_and_map(self, vma: VmArea, src: Words, dst: Words, start: int, end: int, private: Any) -> None:
        for i, word in enumerate(src.tolist()):
            target = v25.migrate_pfn_to_frame(int(dst[i]))
            if target is None or private:
                continue
            if word & v25.MIGRATE_PFN_MIGRATE:
                self.table[start + i * PAGE_SIZE] = target
            else:
                self.held.pop(target)
                self.idle.append(target)


def public(zone: int = 200, pages: int = 64, desc: v25.Desc = v25.Desc.DEVICE_PUBLIC_MEMORY) -> v25.Resource:
    return v25.Resource(zone << ZONE_SHIFT, pages, desc, Arena(zone << ZONE_SHIFT, pages))


class Public(Dummy):
    """A driver whose memory the CPU reaches in place."""

    def __init__(self, kernel: v25.Kernel) -> None:
        super().__init__(kernel)
        self.resource = public()
        self.devmem = self.kernel.hmm_devmem_add_resource(self, self.kernel.hmm_device_new(), self.resource)
        self.idle = list(range(self.devmem.pfn_first, self.devmem.pfn_last + 1))

    async def finalize_and_map(self, vma: v25.VmArea, src: Words, dst: Words, start: int, end: int, private: object) -> None:
        for word in dst[dst != 0].tolist():
            frame = v25.migrate_pfn_to_frame(word)
            assert frame is not None
            if not private:
                self.kernel.write_page(frame, self.held[frame])
        await super().finalize_and_map(vma, src, dst, start, end, private)


class Ground:
    """A host of v25 without sessions, one process, one dummy."""

    def __init__(self, host_pages: int = 4096) -> None:
        self.bench = Bench(host_pages, V25)
        kernel = V25.kernel(self.bench.memory, self.bench.spaces)
        assert kernel is not None
        self.kernel = kernel
        self.space = self.bench.space()
        self.dummy = Dummy(self.kernel)

    async def register(self, *listeners: Listener, space: Space | None = None) -> None:
        space = space or self.space
        async with space.mmap_lock.write():
            for listener in listeners or (self.dummy,):
                await v25.hmm_mirror_register(listener.mirror, space)

    def vma(self, address: int, space: Space | None = None) -> VmArea:
        found = v25.find_vma(space or self.space, address)
        assert found is not None
        return found

    async def to_device(self, address: int, pages: int, space: Space | None = None, dummy: Dummy | None = None) -> tuple[Words, Words]:
        space = space or self.space
        async with space.mmap_lock.read():
            return await (dummy or self.dummy).migrate(self.vma(address, space), address, pages)

    def snapshot(self, address: int, pages: int) -> tuple[VmArea, v25.HmmRange, Words]:
        """Hold the mmap lock."""
        vma, tracked, pfns = self.vma(address), v25.HmmRange(), np.zeros(pages, np.uint64)
        v25.hmm_vma_get_pfns(vma, tracked, address, address + pages * PAGE_SIZE, pfns)
        return vma, tracked, pfns

    async def bits(self, address: int, pages: int, *, write: bool | None = None, block: bool = True) -> list[int]:
        """The words without their frames, of a snapshot or (`write` given) of a fault; begun again while they do not hold."""
        while True:
            async with self.space.mmap_lock.read():
                vma, tracked, pfns = self.vma(address), v25.HmmRange(), np.zeros(pages, np.uint64)
                if write is None:
                    v25.hmm_vma_get_pfns(vma, tracked, address, address + pages * PAGE_SIZE, pfns)
                else:
                    await v25.hmm_vma_fault(vma, tracked, address, address + pages * PAGE_SIZE, pfns, write=write, block=block)
                if v25.hmm_vma_range_done(vma, tracked):
                    return [word & 0x7F for word in pfns.tolist()]
