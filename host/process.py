"""A process of the machine, inside the host: system calls, memory accesses, jobs (`hmmnet.program.Process`).

Accesses go straight to the address space; one that finds its page mapped costs no suspension. Devices are opened on first use: a context
is a mirror of this address space on one device, shared by every handle and job of the process there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import trio

from hmmnet.errors import HmmnetError, KernelError, PeerError, RemoteError, SegmentationFault
from hmmnet.fabric.dma import BytesSink, BytesSource
from hmmnet.observe.counters import GPU_FAULT_GROUP
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, Words, page_range
from hmmnet.program import IoctlResult, JobResult, Residency
from hmmnet.wire.messages import ARGUMENT_BYTES_MAX, PAGES_PER_MESSAGE_MAX, Finished, Ioctl, IoctlDone, Launch

from .contexts import Contexts
from .device import Context
from .homing import Homing
from .link import SessionLink
from .mm.space import Space

HEAP_BYTES = 1 << 20
"""What the heap maps at a time, at least."""
MALLOC_ALIGN = 64
"""A cache line."""
PREFETCH_PAGES = 1 << 16
"""Pages of one piece of an explicit migration (256 MiB). Long, because one stream is faster than two side by side; the bookkeeping of what
follows hides behind it."""
PIECES_AT_ONCE = 2
STREAMED_OUT = frozenset({"read", "migrate_to_dev", "exclusive"})
"""Commands of a dmirror whose data, a page for each page, come as a stream."""
HOST = "host"
FD_FIRST = 3
"""The first file descriptor that open(2) gives out."""

Arrayable = bytes | bytearray | memoryview | npt.NDArray[Any]

log = logging.getLogger("hmmnet.host")


class OpenFile:
    """An open device, as struct file: the handles that fork makes of one share it, and the last close lets its context go."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.references = 0


class Handle:
    """An open device; see `hmmnet.program.Handle`."""

    def __init__(self, process: Process, number: int, file: OpenFile) -> None:
        self.device = file.context.life.name
        self.number = number
        self.file = file
        self._process = process
        file.references += 1

    async def ioctl(self, command: str, address: int, pages: int, data: bytes = b"", flags: int = 0) -> IoctlResult:
        """Run a device command. Raises KernelError with the command's errno, PeerLost when the device is gone."""
        self._check_open("ioctl")
        if not 0 <= address < 1 << 63 or not 0 <= pages <= PAGES_PER_MESSAGE_MAX:
            raise KernelError(errno.EINVAL, "ioctl", f"0x{address:x} + {pages} pages is no range of an address space")
        context = self.file.context
        wants = command in STREAMED_OUT and context.life.spec.model == "dmirror"
        return await command_device(context, command, address, pages, data, flags, pages if wants else 0)

    async def close(self) -> None:
        """Drop this reference. Raises KernelError(EBADF) when it is closed already."""
        self._check_open("close")
        del self._process.handles[self.number]
        self.file.references -= 1
        if self.file.references == 0:
            await self._process.contexts.put(self.file.context)

    def _check_open(self, call: str) -> None:
        if self._process.handles.get(self.number) is not self:
            raise KernelError(errno.EBADF, call, f"this handle on {self.device} is closed")


class HeldPages:
    """See `hmmnet.program.PageReferences`."""

    def __init__(self, space: Space, frames: Words, *, pin: bool) -> None:
        self.count = len(frames)
        self._space = space
        self._frames = frames
        self._pin = pin

    async def read(self, pages: int, first: int = 0) -> bytes:
        """What they hold. Raises KernelError(EINVAL) when they were let go, or are fewer."""
        if not 0 <= first <= first + pages <= len(self._frames):
            raise KernelError(errno.EINVAL, "read", f"{len(self._frames)} pages are held, not {first} + {pages}")
        data = np.empty(pages * PAGE_SIZE, np.uint8)
        self._space.memory.read(self._frames[first : first + pages], 0, data)
        return data.tobytes()

    async def put(self) -> None:
        """Let them go."""
        frames, self._frames = self._frames, self._frames[:0]
        self._space.put_pages(frames, pin=self._pin)


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
    ) -> None:
        self.pid = pid
        self.space = space
        self.contexts = contexts
        self.handles: dict[int, Handle] = {}
        self.ended = False
        self._homing = homing
        self._on_fork = on_fork
        self._on_exit = on_exit
        self._own: dict[str, Context] = {}
        """Contexts that jobs and migrations of this process opened; they stay open until it exits."""
        self._heap = 0
        self._heap_end = 0

    # --- memory ---------------------------------------------------------------------------------------------------------------

    async def mmap(self, length: int, protection: str = "rw", address: int | None = None, *, populate: bool = False) -> int:
        """mmap(2)."""
        self._alive("mmap")
        mapped = await self.space.mmap(length, protection, address)
        if populate:
            with contextlib.suppress(KernelError):  # mm_populate: what cannot be had is had later, or never
                await self.space.madvise(mapped, length, "POPULATE_WRITE" if "w" in protection else "POPULATE_READ")
        return mapped

    async def munmap(self, address: int, length: int) -> None:
        """munmap(2)."""
        await self.space.munmap(address, length)

    async def mprotect(self, address: int, length: int, protection: str) -> None:
        """mprotect(2)."""
        await self.space.mprotect(address, length, protection)

    async def madvise(self, address: int, length: int, advice: str) -> None:
        """madvise(2)."""
        await self.space.madvise(address, length, advice)

    async def mremap(
        self, address: int, old: int, new: int, target: int | None = None, *, may_move: bool = True, dontunmap: bool = False
    ) -> int:
        """mremap(2)."""
        return await self.space.mremap(address, old, new, target, may_move=may_move, dontunmap=dontunmap)

    async def mlock(self, address: int, length: int) -> None:
        """mlock(2)."""
        await self.space.mlock(address, length)

    async def munlock(self, address: int, length: int) -> None:
        """munlock(2)."""
        await self.space.munlock(address, length)

    async def get_user_pages(
        self, address: int, pages: int, *, write: bool = False, pin: bool = False, longterm: bool = False
    ) -> HeldPages:
        """See `Process.get_user_pages`."""
        self._alive("get_user_pages")
        frames = await self.space.get_pages(address >> PAGE_SHIFT, pages, write=write, pin=pin, longterm=longterm)
        return HeldPages(self.space, frames, pin=pin)

    async def malloc(self, length: int) -> int:
        """`length` bytes, 64-byte aligned. Raises KernelError(ENOMEM)."""
        size = -(-max(length, 1) // MALLOC_ALIGN) * MALLOC_ALIGN
        if self._heap_end - self._heap < size:
            mapped = max(HEAP_BYTES, -(-size // PAGE_SIZE) * PAGE_SIZE)
            self._heap = await self.mmap(mapped)
            self._heap_end = self._heap + mapped
        address = self._heap
        self._heap += size
        return address

    async def read(self, address: int, length: int) -> bytes:
        """CPU load of a range."""
        return await self.space.load(address, length) if length else b""

    async def write(self, address: int, data: Arrayable) -> None:
        """CPU store of a range."""
        raw = as_bytes(data)
        if len(raw):
            await self.space.store(address, raw)

    async def load(self, address: int, dtype: str = "<u8") -> int | float:
        """CPU load of one value."""
        kind = np.dtype(dtype)
        value: int | float = np.frombuffer(await self.space.load(address, kind.itemsize), dtype=kind)[0].item()
        return value

    async def store(self, address: int, value: float, dtype: str = "<u8") -> None:
        """CPU store of one value."""
        await self.space.store(address, np.array([value], dtype=dtype).tobytes())

    async def read_array(self, address: int, dtype: str, count: int) -> npt.NDArray[Any]:
        """CPU load of `count` values."""
        kind = np.dtype(dtype)
        return np.frombuffer(bytearray(await self.read(address, count * kind.itemsize)), dtype=kind)

    async def pagemap(self, address: int, pages: int) -> bytes:
        """A byte a page, see `Process.pagemap`."""
        return self.space.pagemap(address, pages)

    async def residency(self, address: int, pages: int) -> Residency:
        """Where the pages live now."""
        return self.space.residency(address, pages)

    # --- devices --------------------------------------------------------------------------------------------------------------

    async def open(self, device: str) -> Handle:
        """Open a device. Raises KernelError: ENOENT, ENODEV."""
        self._alive("open")
        file = OpenFile(await self.contexts.get(self.space, device))
        number = next(number for number in itertools.count(FD_FIRST) if number not in self.handles)
        handle = self.handles[number] = Handle(self, number, file)
        return handle

    async def _context(self, device: str) -> Context:
        """The context that this process keeps open itself."""
        self._alive("open")
        context = self._own.get(device)
        if context is None or context.life.link.session.lost is not None:
            context = self._own[device] = await self.contexts.get(self.space, device)
        return context

    async def launch(self, kernel: str, device: str, placement: str = "demand", **arguments: Any) -> JobResult:
        """Run a kernel and wait for it.

        Raises SegmentationFault for an access that could not be served, KernelError (ENOENT, EINVAL, ENODEV), RemoteError for a kernel
        that failed.
        """
        context = await self._context(device)
        packed = msgspec.msgpack.encode({name: plain(value) for name, value in arguments.items()})
        if len(packed) > ARGUMENT_BYTES_MAX:
            why = f"the arguments have {len(packed)} bytes, at most {ARGUMENT_BYTES_MAX} fit; pass addresses"
            raise KernelError(errno.E2BIG, "launch", why)
        life = context.life
        life.jobs += 1
        done = await life.link.ask(Launch(context.number, life.jobs, kernel, packed, placement), Finished)
        counters = msgspec.msgpack.decode(done.counters, type=dict[str, Any])
        groups = int(counters.get("fault_groups", 0))
        if groups > 0:
            moved = int(counters.get("pages_in", 0)) * PAGE_SIZE
            self.contexts.profile.record(GPU_FAULT_GROUP, moved, float(counters.get("fault_group_s", 0.0)), device, groups)
        if done.error and done.fault_address:
            raise SegmentationFault(done.fault_address, f'kernel {kernel} on device "{device}": {done.error}')
        if done.error:
            raise RemoteError(f'kernel {kernel} on device "{device}" failed: {done.error}')
        return JobResult(msgspec.msgpack.decode(done.results, type=dict[str, Any]), counters)

    async def migrate(self, address: int, length: int, to: str) -> int:
        """Move pages to a device, or to ``host``; returns how many bytes moved. Raises KernelError(ENOENT, ENODEV, ENOMEM), PeerLost."""
        self._alive("migrate")
        start, end = page_range(address, length)
        if start >= end:
            return 0
        if to == HOST:
            return sum([await self._in_pieces(start, end, partial(self._piece_home, link)) for link in self.contexts.links()])
        return await self._in_pieces(start, end, partial(self._piece_out, await self._context(to)))

    async def _piece_out(self, context: Context, start: int, end: int) -> int:
        return (await command_device(context, "migrate_to_dev", start << PAGE_SHIFT, end - start, b"", 0, 0)).cpages

    async def _piece_home(self, link: SessionLink, start: int, end: int) -> int:
        return (await self._homing.migrate_to_system(self.space, link, start, end)).moved

    async def _in_pieces(self, start: int, end: int, move: Callable[[int, int], Awaitable[int]]) -> int:
        """Move what is mapped in [start, end), a few pieces at a time: while one streams, the next is collected. Returns bytes moved."""
        pieces = iter(
            [
                (low, min(low + PREFETCH_PAGES, end, vma.end))
                for vma in self.space.vmas(start, end)
                for low in range(max(start, vma.start), min(end, vma.end), PREFETCH_PAGES)
            ]
        )
        moved = 0
        failures: list[HmmnetError] = []

        async def work() -> None:
            nonlocal moved
            try:
                for low, high in pieces:
                    if failures:
                        return
                    count = await move(low, high)
                    moved += count
            except HmmnetError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(PIECES_AT_ONCE):
                nursery.start_soon(work)
        if failures:
            raise failures[0]
        return moved * PAGE_SIZE

    async def fork(self) -> Process:
        """fork(2). Raises KernelError: ENOMEM, ESRCH."""
        self._alive("fork")
        child = await self._on_fork(self)
        for number, handle in self.handles.items():
            child.handles[number] = Handle(child, number, handle.file)
        child._heap, child._heap_end = self._heap, self._heap_end  # noqa: SLF001 - one of its own kind
        return child

    async def exit(self) -> None:
        """exit(2): the address space goes first (its mirrors are told once), then the open devices. A second call does nothing."""
        if self.ended:
            return
        self.ended = True
        await self.space.exit()
        closing: list[Callable[[], Awaitable[None]]] = [handle.close for handle in self.handles.values()]
        closing += [partial(self.contexts.put, context) for context in self._own.values()]
        for close in closing:
            with contextlib.suppress(PeerError):  # a device that will not close a dead process's context has nothing left to mirror
                await close()
        self._on_exit(self.pid)
        self.contexts.process_ended(self.space)

    def _alive(self, call: str) -> None:
        if self.ended:
            raise KernelError(errno.ESRCH, call, f"process {self.pid} has exited")


async def command_device(context: Context, command: str, address: int, pages: int, data: bytes, flags: int, pages_out: int) -> IoctlResult:
    """Send a command, with its data on a stream, and take `pages_out` pages of data from another. They cross no link: nothing is paced."""
    link = context.life.link
    if link.session.lost is not None:
        raise link.lost_error()
    link.flush_freed()
    stream_in = link.new_stream() if data else 0
    stream_out = link.new_stream() if pages_out else 0
    message = Ioctl(context.number, command, address, pages, stream_in, stream_out, flags)
    if not pages_out:
        done = await _commanded(link, message, data)
        return IoctlResult(done.cpages, done.faults, done.data)
    out = bytearray(pages_out * PAGE_SIZE)
    async with link.expected(stream_out, BytesSink(out)):
        done = await _commanded(link, message, data)
    return IoctlResult(done.cpages, done.faults, bytes(out))


async def _commanded(link: SessionLink, message: Ioctl, data: bytes) -> IoctlDone:
    """Send a command and its data; a command that fails may never look at them."""
    if not data:
        return await link.session.ask(message, IoctlDone)
    failure: HmmnetError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_send_data, link, message.stream_in, data)
        try:
            done = await link.session.ask(message, IoctlDone)
        except HmmnetError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return done


async def _send_data(link: SessionLink, stream: int, data: bytes) -> None:
    try:
        await link.sender.send(stream, BytesSource(data))
    except PeerError as error:
        log.info("the data of a command to %s were not taken: %s", link.name, error)


def as_bytes(data: Arrayable) -> npt.NDArray[np.uint8]:
    """Whatever a program stores, as bytes, without a copy where it lies in one piece."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(data, dtype=np.uint8)


def plain(value: Any) -> Any:
    """A kernel argument as msgpack can carry it: numpy's numbers become Python's."""
    return value.item() if isinstance(value, np.generic) else value
