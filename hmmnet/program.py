"""What the CPU side of a workload holds: a `Process` of the emulated machine.

The same interface is served in two ways: by the host itself when the program runs inside it (tests, the demo, notebooks), and over a
client session when it runs elsewhere. Addresses are plain integers, valid on the CPU and on every device: that is the point of HMM.
"""

from __future__ import annotations

import inspect
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

C = TypeVar("C", bound=type)


def documented_by(protocol: type) -> Callable[[C], C]:
    """For a class that serves `protocol`: what its docstrings only point to ("See `Process.read`.") stands in them, for help()."""

    def document(served: C) -> C:
        for name, member in [("", served), *vars(served).items()]:
            said, place = member.__doc__ or "", f"{protocol.__name__}.{name}" if name else f"{protocol.__module__}.{protocol.__name__}"
            pointer = f"See `{place}`"
            if said.startswith(pointer):
                told = (getattr(protocol, name) if name else protocol).__doc__
                more = inspect.cleandoc(said.removeprefix(pointer).lstrip(";. "))
                member.__doc__ = f"{inspect.cleandoc(told or '')}\n{more[:1].upper()}{more[1:]}" if more else told
        return served

    return document


@dataclass(frozen=True)
class JobResult:
    """How a job on a device ended: what its kernel returned, and the job's counters (fault groups, bytes moved, seconds)."""

    results: abc.Mapping[str, Any]
    counters: abc.Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class IoctlResult:
    """What a device command reports: pages collected, fault rounds, and data (page bytes, or one byte a page for a snapshot)."""

    cpages: int
    faults: int
    data: bytes = b""


@dataclass(frozen=True)
class Residency:
    """Where the pages of a range live: the owners' names and, for each page, an index into them (-1: never touched, -2: in transit)."""

    owners: tuple[str, ...]
    pages: npt.NDArray[np.int16]


PM_PFRAME_MASK = (1 << 55) - 1
PM_SOFT_DIRTY = 1 << 55
PM_MMAP_EXCLUSIVE = 1 << 56
PM_UFFD_WP = 1 << 57
PM_GUARD_REGION = 1 << 58
PM_FILE = 1 << 61
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63
"""Words of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst): below bit 55 a frame number, or a slot of swap."""


@dataclass(frozen=True)
class Mapping:
    """One mapping as /proc/PID/smaps shows it: byte addresses [start, end), rights as ``rw-p``, and how many bytes of it are what.

    `rss` are resident pages wherever they live, on devices too; `anonymous` those of them that belong to no file; `referenced` those
    accessed since that was cleared; `swap` what was paged out; `anon_huge_pages` what is mapped by 2 MiB; `locked` (mlock) is `rss` or 0.
    """

    start: int
    end: int
    rights: str
    rss: int
    anonymous: int
    referenced: int
    swap: int
    anon_huge_pages: int
    locked: int


@runtime_checkable
class Handle(Protocol):
    """An open device, as a file descriptor on its device node; it mirrors the address space of the process that opened it.

    That stays so when a child inherits it: used in the child, it acts on the memory of the process that opened it.
    """

    device: str
    number: int
    """The file descriptor: its key in `Process.handles`."""

    async def ioctl(self, command: str, address: int, pages: int, data: bytes = b"", flags: int = 0) -> IoctlResult:
        """Run a device command on ``pages`` pages from byte address `address`. Raises KernelError with the command's errno."""
        ...

    async def close(self) -> None:
        """Drop this reference; the last one of a dmirror unit evicts the unit's memory in every process."""
        ...


@runtime_checkable
class PageReferences(Protocol):
    """References to the pages of a process, as get_user_pages gives them: while they are held, the pages stay where they are."""

    count: int
    """How many pages were had."""

    async def read(self, pages: int, first: int = 0) -> bytes:
        """What `pages` pages from the `first` on hold now, whatever the process maps there by now. Raises KernelError(EINVAL)."""
        ...

    async def put(self) -> None:
        """Let the pages go. Once; a second call does nothing."""
        ...


@runtime_checkable
class MemoryFile(Protocol):
    """A file in memory, as memfd_create(2) gives it: pages that processes can map, shared or private. Lengths and offsets are in bytes.

    It lasts as long as somebody has it: this object until `close`, or a mapping. Whatever is asked after `close` is KernelError(EBADF).
    """

    @property
    def size(self) -> int:
        """Its length; `write` beyond the end and `truncate` change it."""
        ...

    async def read(self, offset: int, length: int) -> bytes:
        """pread(2): fewer bytes at the end of the file; holes read as zero. Raises KernelError(EINVAL)."""
        ...

    async def write(self, offset: int, data: bytes | bytearray | memoryview | npt.NDArray[Any]) -> None:
        """pwrite(2): whoever maps the file sees it, devices too. Raises KernelError: EINVAL, EFBIG, ENOMEM."""
        ...

    async def punch(self, offset: int, length: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE: it reads as zero then; whole pages are freed, mirrors told. KernelError(EINVAL)."""
        ...

    async def truncate(self, length: int) -> None:
        """ftruncate(2): an access to a mapped page behind the end is SIGBUS from then on. Raises KernelError: EINVAL, EFBIG."""
        ...

    async def close(self) -> None:
        """close(2). A second time does nothing."""
        ...


@runtime_checkable
class UserFaults(Protocol):
    """Missing pages of a range, to be filled in by a program; devices that fault with the mmap lock dropped wait for it as CPUs do."""

    async def read(self) -> int:
        """Wait for somebody who touches a missing page; its address. Raises KernelError(EBADF) when this is closed."""
        ...

    async def copy(self, address: int, data: bytes) -> None:
        """UFFDIO_COPY: fill in whole pages; who waited for them goes on. Raises KernelError: EINVAL, ENOENT, EEXIST, ENOMEM."""
        ...

    async def close(self) -> None:
        """Missing pages are zero again; who waits goes on. A second time does nothing."""
        ...


@runtime_checkable
class Process(Protocol):
    """A process of the emulated machine: system calls, memory accesses, jobs. All lengths are in bytes."""

    pid: int

    @property
    def handles(self) -> abc.Mapping[int, Handle]:
        """The open devices by file descriptor; a child has those of its parent under the same numbers."""
        ...

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
        """Map memory; `protection` of ``rw r rx w none``; at `address` (MAP_FIXED) or where there is room.

        Anonymous, or `file` from byte `offset` on; private, or `shared` (MAP_SHARED) with forked children and with all who map the file.
        An open dmirror device can be mapped like a file: pages that the driver makes and inserts (VM_MIXEDMAP); other devices are ENODEV.
        `populate` faults it in at once as far as that goes (MAP_POPULATE). `hugetlb`: anonymous private memory in pages of 2 MiB
        (MAP_HUGETLB), `length` rounded up; for transparent huge pages see `madvise`. Raises KernelError as mmap(2).
        """
        ...

    async def memfd_create(self, length: int) -> MemoryFile:
        """A new file of `length` bytes, all zero. Raises KernelError: EINVAL, EFBIG."""
        ...

    async def munmap(self, address: int, length: int) -> None:
        """munmap(2) of whole pages; those that devices have are freed there. Raises KernelError(EINVAL)."""
        ...

    async def mprotect(self, address: int, length: int, protection: str) -> None:
        """mprotect(2); `protection` as for `mmap`. Raises KernelError: EINVAL, ENOMEM (part of it is not mapped)."""
        ...

    async def madvise(self, address: int, length: int, advice: str) -> None:
        """madvise(2); `advice` without the MADV_ prefix. HWPOISON breaks the memory under the range: whoever touches it gets SIGBUS.

        GUARD_INSTALL makes it SIGSEGV (and EFAULT for a device) until GUARD_REMOVE. Raises KernelError as madvise(2).
        """
        ...

    async def mremap(
        self, address: int, old: int, new: int, target: int | None = None, *, may_move: bool = True, dontunmap: bool = False
    ) -> int:
        """mremap(2) of `old` bytes to `new`; to `target` (MREMAP_FIXED) when that is given. Returns where they are.

        Raises KernelError as mremap(2).
        """
        ...

    async def mlock(self, address: int, length: int) -> None:
        """mlock(2): fault the range in and keep it. Raises KernelError as mlock(2)."""
        ...

    async def userfaultfd(self, address: int, length: int, *, sigbus: bool = False) -> UserFaults:
        """userfaultfd(2): whoever touches a missing page of the range waits until it is filled in; with `sigbus` it is SIGBUS.

        Raises KernelError: EINVAL (unaligned, nothing mapped, not for this memory), EBUSY.
        """
        ...

    async def munlock(self, address: int, length: int) -> None:
        """munlock(2). Raises KernelError(ENOMEM) where nothing is mapped."""
        ...

    async def get_user_pages(
        self, address: int, pages: int, *, write: bool = False, pin: bool = False, longterm: bool = False
    ) -> PageReferences:
        """References to `pages` pages (`pin`: FOLL_PIN, `write`: FOLL_WRITE, `longterm`: FOLL_LONGTERM), fewer where one cannot be had.

        Pages that a device has come home first. Raises KernelError(EFAULT) when not even the first can be had.
        """
        ...

    async def malloc(self, length: int) -> int:
        """`length` bytes, 64-byte aligned, in memory that the process maps as needed; never freed singly.

        Raises KernelError: ENOMEM, EINVAL.
        """
        ...

    async def read(self, address: int, length: int) -> bytes:
        """CPU load of `length` bytes; faults are taken. Raises SegmentationFault, BusError, KernelError(EINVAL)."""
        ...

    async def write(self, address: int, data: bytes | bytearray | memoryview | npt.NDArray[Any]) -> None:
        """CPU store of a range; faults are taken. Raises SegmentationFault, BusError; leading pages may have been written by then."""
        ...

    async def load(self, address: int, dtype: str = "<u8") -> int | float:
        """CPU load of one value of a numpy `dtype`. Raises SegmentationFault, BusError, KernelError(EINVAL)."""
        ...

    async def store(self, address: int, value: float, dtype: str = "<u8") -> None:
        """CPU store of one value of a numpy `dtype`. Raises SegmentationFault, BusError, KernelError(EINVAL) where it does not fit."""
        ...

    async def read_array(self, address: int, dtype: str, count: int) -> npt.NDArray[Any]:
        """CPU load of `count` values of a numpy `dtype`: an array of one dimension, a copy.

        Raises SegmentationFault, BusError, KernelError(EINVAL).
        """
        ...

    async def pagemap(self, address: int, pages: int) -> bytes:
        """One letter a page as the trace syntax shows them: ``-`` none, ``P`` present, ``S`` special; upper bits: +0x80 mapped exactly
        once ("x"), and lower-case letter for file pages. Raises KernelError(EINVAL) for pages that no address space has.
        """
        ...

    async def residency(self, address: int, pages: int) -> Residency:
        """Where `pages` pages from `address` on live now; nothing is touched. Raises KernelError(EINVAL) as `pagemap`."""
        ...

    async def pagemap_words(self, address: int, pages: int) -> npt.NDArray[np.uint64]:
        """/proc/PID/pagemap: a PM_* word for each of `pages` pages from `address` on. A page of a device is PM_SWAP, not PM_PRESENT.

        An array of one dimension. Raises KernelError(EINVAL) as `pagemap`.
        """
        ...

    async def smaps(self) -> list[Mapping]:
        """/proc/PID/smaps: every mapping, in order of addresses."""
        ...

    async def clear_refs(self, *, soft_dirty: bool = True) -> None:
        """/proc/PID/clear_refs: no page counts as written (soft-dirty) from now on, or, with `soft_dirty` false, as accessed."""
        ...

    async def open(self, device: str) -> Handle:
        """Open a device: from now on it mirrors this address space. Raises KernelError: ENOENT, ENODEV (it is lost)."""
        ...

    async def launch(self, kernel: str, device: str, placement: str = "demand", **arguments: Any) -> JobResult:
        """Run a kernel on this process's addresses and wait for it. The device is opened on first use.

        `placement`: ``demand`` migrates what the job faults on, in groups of 64 KiB (``demand-2m``: of 2 MiB), ``remote`` never migrates
        (system memory is read over the link). Raises KernelError: ENOENT (no such kernel or device), EINVAL (no such placement), ENODEV
        (the device is lost); SegmentationFault and BusError for what the job accesses; RemoteError when the kernel itself fails;
        PeerLost when the device dies meanwhile.
        """
        ...

    async def migrate(self, address: int, length: int, to: str) -> int:
        """Move pages to device `to` (or ``host``); returns how many bytes moved. Pages that cannot move stay; no error.

        Whole pages move: those that [address, address + length) touches, so that memory of malloc can be named as it is. Up to the first
        that is not mapped, not readable, or mapped so that it cannot migrate at all (hugetlb, a device's own memory): what lies before it
        moves, and then KernelError(EINVAL) names address and mapping, as migrate_vma ends there. Raises KernelError(ENOENT, ENODEV,
        ENOMEM), too.
        """
        ...

    async def fork(self) -> Process:
        """fork(2): a child that shares every page until one of the two stores, and inherits the open handles.

        Raises KernelError(ENOMEM).
        """
        ...

    async def exit(self) -> None:
        """exit(2): unmap everything and close all handles. A second time does nothing."""
        ...

    async def oom_score(self) -> int:
        """/proc/PID/oom_score: how much killing it would help when memory is used up, from 0 to 2000."""
        ...

    async def set_oom_score_adj(self, value: int) -> None:
        """/proc/PID/oom_score_adj: from 1000 (before all others) to -1000 (never). Children inherit it. Raises KernelError(EINVAL)."""
        ...

    async def kill(self, *, out_of_memory: bool = False) -> None:
        """SIGKILL: the process ends whatever it is doing; a device that waits on its behalf gets EINTR.

        `out_of_memory`: as the kernel's OOM killer does it, which reaps the memory before the process gets round to ending: until it has,
        missing pages are SIGBUS for it and EFAULT for devices.
        """
        ...


@runtime_checkable
class Machine(Protocol):
    """A running machine as a workload sees it: its devices by name, and processes to be made."""

    @property
    def device_names(self) -> tuple[str, ...]:
        """The devices of the topology, in its order."""
        ...

    def emulated_s(self) -> float:
        """The machine's clock, in emulated seconds."""
        ...

    async def create_process(self, node: str = "", cgroup: str = "") -> Process:
        """A new, empty process. Its memory comes from host memory `node` (default: the topology's first) while that has room.

        Its pages, and those of its children, are charged to memory cgroup `cgroup` (default: to nobody). Raises HmmnetError when there is
        no such memory, or group.
        """
        ...

    async def create_cgroup(self, name: str, limit_bytes: int | None = None) -> None:
        """A memory cgroup: its processes have at most `limit_bytes` (memory.max, whole pages), wherever the pages live; beyond is ENOMEM.

        ``report()["cgroups"][name]`` tells what it has. Raises HmmnetError for a name that is taken, and for a negative limit.
        """
        ...

    async def oom_kill(self, cgroup: str = "") -> int:
        """Have the kernel kill the process, of `cgroup` or of all, whose end frees most memory, weighed by oom_score_adj; its pid.

        Raises HmmnetError when there is no such group, KernelError(ESRCH) when there is nobody to kill.
        """
        ...

    async def unplug(self, device: str) -> None:
        """Hot removal: everything in the device's memory goes home, the memory goes away, and the device is told goodbye.

        Raises KernelError(ENOENT, ENODEV), and HmmnetError, naming who holds how much, when pages cannot come home; the device then stays.
        """
        ...

    async def report(self) -> dict[str, Any]:
        """What the run did so far: per link asked, reached and whether the emulation kept up; counters of the profile; devices."""
        ...

    async def check(self) -> dict[str, Any]:
        """The invariants of page tables, frames, IOMMU and every device's mirror, now: ``complaints`` says what is wrong, mostly nothing.

        ``processes pages mirrors translations`` say what was looked at, ``unseen`` which devices did not tell, and why.
        """
        ...
