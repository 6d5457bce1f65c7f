"""A process of the machine, inside the host: system calls, memory accesses, jobs (`hmmnet.program.Process`).

Accesses go straight to the address space; one that finds its page mapped costs no suspension. Devices are opened on first use: a context
is a mirror of this address space on one device, shared by every handle and job of the process there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import struct
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import trio

from hmmnet import program
from hmmnet.checks import Arrayable, as_bytes, as_type, as_value, check_pages, check_range, check_whole, not_found, plain_arguments
from hmmnet.errors import HmmnetError, KernelError, PeerError, RemoteError
from hmmnet.observe.counters import GPU_FAULT_GROUP
from hmmnet.pages import HUGE_PAGES, PAGE_SHIFT, PAGE_SIZE, page_range
from hmmnet.program import JobResult, Mapping, MemoryFile, Residency
from hmmnet.wire.messages import ARGUMENT_BYTES_MAX, EndJob, Finished, Launch

from . import explicit
from .contexts import Contexts
from .device import Context
from .files import MemFd
from .handles import Handle, HeldPages, OpenFile
from .homing import Homing
from .mm import oom
from .mm.space import Space
from .mm.syscalls import aligned, whole_pages
from .mm.userfault import UserFault
from .poison import memory_failure

WORD_BYTES = 8
HEAP_BYTES = 1 << 20
"""What the heap maps at a time, at least."""
MALLOC_ALIGN = 64
"""A cache line."""
HUGE_BYTES = HUGE_PAGES * PAGE_SIZE
HOST = "host"
POISON = "HWPOISON"
CODES = {"u1": "B", "u2": "H", "u4": "I", "u8": "Q", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "f4": "f", "f8": "d"}
"""numpy's names of types, and those of `struct`, which makes one number in a fraction of the time."""
SCALARS_MAX = 64
"""Types whose readers are kept."""
FD_FIRST = 3
"""The first file descriptor that open(2) gives out."""
_map_in = msgspec.msgpack.Decoder(dict[str, Any]).decode
"""What a device answers in; made once, which takes longer than to use it."""


@program.documented_by(program.Process)
class Process:
    """See `hmmnet.program.Process`."""

    def __init__(
        self,
        pid: int,
        space: Space,
        contexts: Contexts,
        homing: Homing,
        on_fork: Callable[[Process], Awaitable[Process]],
        on_exit: Callable[[int], None],
        check_advice: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.pid = pid
        self.space = space
        self.contexts = contexts
        self.handles: dict[int, Handle] = {}
        self.files: dict[MemFd, None] = {}
        """Files that it has open."""
        self.ended = False
        """`exit` has begun; nothing new may be asked."""
        self._exiting = trio.Lock()
        self.unmapped = trio.Event()
        """`exit` has given its address space back."""
        self._gone = False
        self._homing = homing
        self._on_fork = on_fork
        self._on_exit = on_exit
        self._check_advice = check_advice
        self._own: dict[str, Context] = {}
        """Contexts that jobs and migrations of this process opened; they stay open until it exits."""
        self._heap = 0
        self._heap_end = 0

    # --- memory ---------------------------------------------------------------------------------------------------------------

    async def mmap(
        self,
        length: int,
        protection: str = "rw",
        address: int | None = None,
        *,
        populate: bool = False,
        shared: bool = False,
        file: MemoryFile | program.Handle | None = None,
        offset: int = 0,
        hugetlb: bool = False,
    ) -> int:
        """See `Process.mmap`. Source: mm/mmap.c, do_mmap."""
        self._alive("mmap")
        check_range("mmap", 0 if address is None else address, length)
        if isinstance(file, Handle):
            file.check_mappable()
            return await self.space.mmap_inserted(length, protection, address, shared=shared)
        if file is not None and not isinstance(file, MemFd):
            raise KernelError(errno.EBADF, "mmap", f"{type(file).__name__} is no file of this machine; take one from memfd_create")
        opened = None if file is None else file.file("mmap")
        if hugetlb:
            if opened is not None:
                raise KernelError(errno.EINVAL, "mmap", "a memfd has no huge pages of the pool; they are for anonymous memory here")
            length = -(-length // HUGE_BYTES) * HUGE_BYTES
            mapped = await self.space.mmap_hugetlb(length, protection, address, shared=shared)
        else:
            mapped = await self.space.mmap(length, protection, address, shared=shared, file=opened, offset=offset)
        if populate:
            with contextlib.suppress(KernelError):  # mm_populate: what cannot be had is had later, or never
                await self.space.populate(mapped >> PAGE_SHIFT, (mapped >> PAGE_SHIFT) + whole_pages("mmap", length))
        return mapped

    async def memfd_create(self, length: int) -> MemFd:
        """See `Process.memfd_create`. Source: mm/memfd.c, memfd_create, and fs/open.c, ftruncate."""
        self._alive("memfd_create")
        made = MemFd(self.space.memory, length, self.space.node, self.space.mm.cgroup)
        made.enter(self.files)
        return made

    async def munmap(self, address: int, length: int) -> None:
        """See `Process.munmap`. Source: mm/vma.c, do_vmi_munmap."""
        await self._begin("munmap", address, length)
        await self.space.munmap(address, length)

    async def mprotect(self, address: int, length: int, protection: str) -> None:
        """See `Process.mprotect`. Source: mm/mprotect.c, do_mprotect_pkey: what lies before a hole is changed."""
        await self._begin("mprotect", address, length)
        await self.space.mprotect(address, length, protection)

    async def madvise(self, address: int, length: int, advice: str) -> None:
        """See `Process.madvise`. Source: mm/madvise.c, do_madvise; mm/memory-failure.c for HWPOISON."""
        await self._begin("madvise", address, length)
        self._check_advice(advice)
        if advice == POISON:
            start = aligned("madvise", address)
            await memory_failure(self._homing.memory, self._homing.spaces, self.space, start, start + whole_pages("madvise", length))
            return
        await self.space.madvise(address, length, advice)

    async def mremap(
        self, address: int, old: int, new: int, target: int | None = None, *, may_move: bool = True, dontunmap: bool = False
    ) -> int:
        """See `Process.mremap`. Source: mm/mremap.c, do_mremap."""
        await self._begin("mremap", address, old)
        return await self.space.mremap(address, old, new, target, may_move=may_move, dontunmap=dontunmap)

    async def _begin(self, call: str, address: int, length: int) -> None:
        """A call begins that has a step boundary (`hmmnet.faults.points`). Raises KernelError(ESRCH); also when it exits there."""
        self._alive(call)
        if self.space.points.armed:
            start, end = page_range(address, length) if length > 0 else (0, 0)
            await self.space.points.at(f"process.{call}", process=self.pid, start=start, pages=end - start)
            self._alive(call)

    async def mlock(self, address: int, length: int) -> None:
        """See `Process.mlock`. Source: mm/mlock.c, do_mlock."""
        self._alive("mlock")
        await self.space.mlock(address, length)

    async def userfaultfd(self, address: int, length: int, *, sigbus: bool = False) -> UserFault:
        """See `Process.userfaultfd`. Source: fs/userfaultfd.c, with UFFDIO_REGISTER_MODE_MISSING."""
        self._alive("userfaultfd")
        return await self.space.userfaultfd(address, length, sigbus=sigbus)

    async def munlock(self, address: int, length: int) -> None:
        """See `Process.munlock`. Source: mm/mlock.c, munlock."""
        self._alive("munlock")
        await self.space.munlock(address, length)

    async def get_user_pages(
        self, address: int, pages: int, *, write: bool = False, pin: bool = False, longterm: bool = False
    ) -> HeldPages:
        """See `Process.get_user_pages`. Source: mm/gup.c, get_user_pages and pin_user_pages."""
        self._alive("get_user_pages")
        check_range("get_user_pages", address, pages)
        frames = await self.space.get_pages(address >> PAGE_SHIFT, pages, write=write, pin=pin, longterm=longterm)
        return HeldPages(self.space, frames, pin=pin)

    async def malloc(self, length: int) -> int:
        """See `Process.malloc`. Source: no system call; a heap in anonymous mappings of `HEAP_BYTES` and more."""
        self._alive("malloc")
        check_whole("malloc", length=length)
        if length < 0:
            raise KernelError(errno.EINVAL, "malloc", f"{length} bytes cannot be had")
        size = -(-max(length, 1) // MALLOC_ALIGN) * MALLOC_ALIGN
        if self._heap_end - self._heap < size:
            mapped = max(HEAP_BYTES, -(-size // PAGE_SIZE) * PAGE_SIZE)
            self._heap = await self.mmap(mapped)
            self._heap_end = self._heap + mapped
        address = self._heap
        self._heap += size
        return address

    async def read(self, address: int, length: int) -> bytes:
        """See `Process.read`. Source: a load of user space; its faults are mm/memory.c, handle_mm_fault."""
        self._alive("read")
        check_range("read", address, length)
        return await self.space.load(address, length) if length else b""

    async def write(self, address: int, data: Arrayable) -> None:
        """See `Process.write`. Source: a store of user space; its faults are mm/memory.c, handle_mm_fault."""
        self._alive("write")
        raw = data if isinstance(data, bytes) else as_bytes(data)
        check_range("write", address, len(raw))
        if len(raw):
            await self.space.store(address, raw)

    async def load(self, address: int, dtype: str = "<u8") -> int | float:
        """See `Process.load`. Source: as `read`."""
        if self.ended:
            self._alive("load")
        try:
            size, value_of = scalar(dtype)
        except TypeError as error:  # what has no hash is no name of a type
            raise KernelError(errno.EINVAL, "load", f"there is no type {dtype!r}: {error}") from error
        check_range("load", address, size)
        return value_of(await self.space.load(address, size))

    async def store(self, address: int, value: float, dtype: str = "<u8") -> None:
        """See `Process.store`. Source: as `write`."""
        self._alive("store")
        raw = as_value("store", value, dtype)
        check_range("store", address, len(raw))
        await self.space.store(address, raw)

    async def fetch_add(self, address: int, value: int) -> int:
        """LOCK XADD of the 64-bit word at `address`, which must be aligned: what it was. Raises SegmentationFault, BusError, KernelError.

        Looked at and changed in one stretch of code; before that the page is faulted in for writing, as often as it is taken away.
        """
        self._alive("fetch_add")
        check_range("fetch_add", address, WORD_BYTES)
        if address % WORD_BYTES:
            raise KernelError(errno.EINVAL, "fetch_add", f"0x{address:x} is not aligned to {WORD_BYTES} bytes")
        while True:
            raw = self.space.try_load(address, WORD_BYTES)
            if raw is not None:
                before = int.from_bytes(raw, "little")
                if self.space.try_store(address, ((before + value) % (1 << 64)).to_bytes(WORD_BYTES, "little")):
                    await trio.lowlevel.checkpoint()
                    return before
            await self.space.touch(address, write=True)

    async def read_array(self, address: int, dtype: str, count: int) -> npt.NDArray[Any]:
        """See `Process.read_array`. Source: as `read`."""
        self._alive("read_array")
        kind = as_type("read_array", dtype)
        check_whole("read_array", count=count)
        return np.frombuffer(bytearray(await self.read(address, count * kind.itemsize)), dtype=kind)

    async def pagemap(self, address: int, pages: int) -> bytes:
        """See `Process.pagemap`. Source: fs/proc/task_mmu.c, pagemap_read, as the trace syntax shortens it."""
        self._alive("pagemap")
        check_pages("pagemap", address, pages)
        return self.space.pagemap(address, pages)

    async def residency(self, address: int, pages: int) -> Residency:
        """See `Process.residency`. Source: none, no kernel tells a program which device has a page."""
        self._alive("residency")
        check_pages("residency", address, pages)
        return self.space.residency(address, pages)

    async def pagemap_words(self, address: int, pages: int) -> npt.NDArray[np.uint64]:
        """See `Process.pagemap_words`. Source: fs/proc/task_mmu.c, pte_to_pagemap_entry."""
        self._alive("pagemap_words")
        check_pages("pagemap_words", address, pages)
        return self.space.pagemap_words(address >> PAGE_SHIFT, (address >> PAGE_SHIFT) + pages)

    async def smaps(self) -> list[Mapping]:
        """See `Process.smaps`. Source: fs/proc/task_mmu.c, show_smap."""
        self._alive("smaps")
        return self.space.smaps()

    async def clear_refs(self, *, soft_dirty: bool = True) -> None:
        """See `Process.clear_refs`. Source: fs/proc/task_mmu.c, clear_refs_write."""
        self._alive("clear_refs")
        await (self.space.clear_soft_dirty() if soft_dirty else self.space.clear_referenced())

    # --- devices --------------------------------------------------------------------------------------------------------------

    async def open(self, device: str) -> Handle:
        """See `Process.open`. Source: lib/test_hmm.c, dmirror_fops_open."""
        self._alive("open")
        file = OpenFile(await self._acquired(device, self.contexts.get_for_file), self.contexts)
        number = next(number for number in itertools.count(FD_FIRST) if number not in self.handles)
        return Handle(self.handles, number, file)

    async def _context(self, device: str, call: str) -> Context:
        """The context that this process keeps open itself."""
        self._alive(call)
        self.contexts.device(device, call)
        context = self._own.get(device)
        if context is None or context.life.leaving or context.life.link.session.lost is not None:
            context = await self._acquired(device, self.contexts.get)
            if self._own.get(device) is context:
                await self.contexts.put(context)  # another task opened it meanwhile, and one use is enough
            self._own[device] = context
        return context

    async def _acquired(self, device: str, get: Callable[[Space, str], Awaitable[Context]]) -> Context:
        """A use of this process's context on a device. Raises KernelError(ESRCH) when the process exits meanwhile."""
        context = await get(self.space, device)
        if self.ended:
            with contextlib.suppress(PeerError):
                await self.contexts.put(context)
            self._alive("open")
        return context

    async def launch(self, kernel: str, device: str, placement: str = "demand", **arguments: Any) -> JobResult:
        """See `Process.launch`. Cancelled, it ends on the device, too.

        Raises SegmentationFault or BusError for an access that could not be served, KernelError(ENOMEM) where memory for it was used up,
        KernelError (ENOENT, EINVAL, E2BIG, ENODEV), RemoteError for a kernel that failed.
        """
        context = await self._context(device, "launch")
        packed = msgspec.msgpack.encode(plain_arguments(kernel, arguments))
        if len(packed) > ARGUMENT_BYTES_MAX:
            why = f"the arguments have {len(packed)} bytes, at most {ARGUMENT_BYTES_MAX} fit; pass addresses"
            raise KernelError(errno.E2BIG, "launch", why)
        life = context.life
        life.jobs += 1
        job = life.jobs
        try:
            done = await life.link.ask(Launch(context.number, job, kernel, packed, placement), Finished)
        except trio.Cancelled:
            life.link.session.note(EndJob(context.number, job))
            raise
        except KernelError as error:
            mended = not_found(error, kernel, placement)
            if mended is None:
                raise
            raise mended from None
        counters = _map_in(done.counters)
        groups = int(counters.get("fault_groups", 0))
        if groups > 0:
            moved = int(counters.get("pages_in", 0)) * PAGE_SIZE
            self.contexts.profile.record(GPU_FAULT_GROUP, moved, float(counters.get("fault_group_s", 0.0)), device, groups)
        if done.error and done.errno == errno.ENOMEM:
            raise KernelError(errno.ENOMEM, "launch", f'kernel {kernel} on device "{device}": {done.error}')
        if done.error and done.fault_address is not None:
            raise self.space.signal_for(done.fault_address, f'kernel {kernel} on device "{device}": {done.error}')
        if done.error:
            raise RemoteError(f'kernel {kernel} on device "{device}" failed: {done.error}')
        return JobResult(_map_in(done.results), counters)

    async def migrate(self, address: int, length: int, to: str) -> int:
        """See `Process.migrate`. Source: mm/migrate_device.c, migrate_vma_setup and what follows it.

        Raises KernelError: EINVAL, ENOENT, ENODEV, ENOMEM; PeerLost.
        """
        self._alive("migrate")
        check_range("migrate", address, length)
        start, end = page_range(address, length)
        if start >= end:
            return 0
        target = self.contexts.links() if to == HOST else await self._context(to, "migrate")
        return await explicit.migrate(self.space, self._homing, start, end, target)

    async def fork(self) -> Process:
        """See `Process.fork`; KernelError(ESRCH), too, when it ends meanwhile. Source: kernel/fork.c, dup_mmap."""
        self._alive("fork")
        child = await self._on_fork(self)
        for number, handle in self.handles.items():
            Handle(child.handles, number, handle.file)
        for file in self.files:
            file.enter(child.files)
        child._heap, child._heap_end = self._heap, self._heap_end  # noqa: SLF001 - one of its own kind
        return child

    async def oom_score(self) -> int:
        """See `Process.oom_score`. Source: fs/proc/base.c, proc_oom_score."""
        self._alive("oom_score")
        return oom.score(self.space.mm, self.space.memory.total_pages)

    async def set_oom_score_adj(self, value: int) -> None:
        """See `Process.set_oom_score_adj`. Source: fs/proc/base.c, oom_score_adj_write."""
        self._alive("set_oom_score_adj")
        check_whole("set_oom_score_adj", value=value)
        oom.set_score_adj(self.space.mm, value)

    async def kill(self, *, out_of_memory: bool = False) -> None:
        """See `Process.kill`. Source: kernel/signal.c, and mm/oom_kill.c, __oom_kill_process."""
        self.space.memory.there()
        if out_of_memory:
            await self.reap()
        self.ended = True
        self.space.kill()
        await self.exit()

    async def reap(self) -> None:
        """The OOM killer's SIGKILL, and its reaper: memory goes at once, whatever the process and its devices are doing."""
        self.ended = True
        self.space.kill()
        await self.space.reap()

    async def exit(self) -> None:
        """See `Process.exit`. Source: kernel/exit.c, do_exit.

        The address space goes first (its mirrors are told once), then the open devices.

        A second call waits for the first, and finishes what a cancelled one has left.
        """
        self.space.memory.there()
        async with self._exiting:
            if self._gone:
                return
            self.ended = True
            if self.space.points.armed:
                await self.space.points.at("process.exit", process=self.pid)
            if not self.unmapped.is_set():
                await self.space.exit()
                self.unmapped.set()
            for opened in list(self.files):
                opened.leave(self.files)
            while self.handles:
                handle = self.handles.pop(next(iter(self.handles)))  # from here on it is closed, for whoever holds it still
                with contextlib.suppress(HmmnetError):  # a device that will not close a dead process's context has nothing left to mirror
                    await handle.file.let_go()
            while self._own:
                _, context = self._own.popitem()
                with contextlib.suppress(HmmnetError):
                    await self.contexts.put(context)
            self._gone = True
            self._on_exit(self.pid)
            self.contexts.process_ended(self.space)

    def _alive(self, call: str) -> None:
        """Raises KernelError(ESRCH) when it has exited, as every call does then but a further `exit` or `kill`; PeerLost with its host."""
        if self.ended:
            self.space.memory.there()
            raise KernelError(errno.ESRCH, call, f"process {self.pid} has exited")


@lru_cache(SCALARS_MAX)
def scalar(dtype: str) -> tuple[int, Callable[[bytes], int | float]]:
    """The size of a numpy type of one value, and what makes the value of its bytes. Raises KernelError(EINVAL)."""
    kind = as_type("load", dtype)
    code = CODES.get(kind.str[1:])
    if code is None:
        return kind.itemsize, lambda raw: np.frombuffer(raw, dtype=kind)[0].item()
    unpack = struct.Struct((">" if kind.str[0] == ">" else "<") + code).unpack
    return kind.itemsize, lambda raw: unpack(raw)[0]
