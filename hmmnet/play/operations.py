"""The operations of the trace syntax, one registered function each.

To add one, write a function under ``@operation("USAGE")``: it gets the `Stage` it plays on and the parsed arguments, calls the process or
the handle, and returns the text after ``=>``. Kernel errors and signals need no handling: the player spells `KernelError` as ``ERR NAME``,
a `SegmentationFault` as ``SEGV``, a `BusError` as ``BUS``. Parser, counts and complaints follow from the usage.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmmnet.errors import BusError, KernelError, SegmentationFault, SignalError
from hmmnet.pages import PAGE_SIZE, ZERO_FRAME
from hmmnet.program import PM_PFRAME_MASK, PM_PRESENT

from .grammar import Usage
from .stage import Stage
from .tokens import listed, page_token, page_tokens, pagemap_symbol, snapshot_symbol

Play = Callable[..., Awaitable[str]]

log = logging.getLogger("hmmnet.play")


@dataclass(frozen=True)
class Entry:
    """A registered operation."""

    usage: Usage
    play: Play


OPERATIONS: dict[str, Entry] = {}


def operation(usage: str) -> Callable[[Play], Play]:
    """Register the decorated function under `usage` (see `grammar`)."""

    def register(play: Play) -> Play:
        parsed = Usage.of(usage)
        assert parsed.name not in OPERATIONS, f"operation {parsed.name} is registered twice"
        OPERATIONS[parsed.name] = Entry(parsed, play)
        return play

    return register


def usages() -> Mapping[str, Usage]:
    """The usage of every registered operation."""
    return {name: entry.usage for name, entry in OPERATIONS.items()}


def signal_word(error: SignalError) -> str:
    """The signal as a result line spells it."""
    if isinstance(error, BusError):
        return "BUS"
    assert isinstance(error, SegmentationFault)
    return "SEGV"


def pattern(value: int, pages: int) -> npt.NDArray[np.uint8]:
    """What `fill` and `dwrite` store: every byte of page *i* is ``(value + i) & 255``."""
    return np.repeat((value + np.arange(pages)).astype(np.uint8), PAGE_SIZE)


# --- address space ----------------------------------------------------------------------------------------------------------------


@operation("mmap NAME n [PROT] [file=F] [off=n] [hugetlb] [populate] [shared] [thp]")
async def mmap(
    stage: Stage,
    name: str,
    pages: int,
    protection: str,
    file: str | None,
    offset: int | None,
    hugetlb: bool,
    populate: bool,
    shared: bool,
    thp: bool,
) -> str:
    """mmap(2) at the region's place; `thp` is MADV_HUGEPAGE behind it."""
    region = stage.new_region(name, pages)
    mapped = None if file is None else stage.files[file]
    where = (offset or 0) * PAGE_SIZE
    length, process = pages * PAGE_SIZE, stage.process
    await process.mmap(length, protection, region.base, populate=populate, shared=shared, file=mapped, offset=where, hugetlb=hugetlb)
    if thp:
        await process.madvise(region.base, length, "HUGEPAGE")
    return "ok"


@operation("mmapdev NAME D n")
async def mmapdev(stage: Stage, name: str, device: str, pages: int) -> str:
    """mmap(2) of the device file."""
    region = stage.new_region(name, pages)
    await stage.process.mmap(pages * PAGE_SIZE, "rw", region.base, shared=True, file=stage.handle(device))
    return "ok"


@operation("hole NAME n")
async def hole(stage: Stage, name: str, pages: int) -> str:
    """A name for addresses that nothing is mapped at."""
    stage.new_region(name, pages)
    return "ok"


@operation("munmap R p n")
async def munmap(stage: Stage, region: str, page: int, pages: int) -> str:
    """munmap(2)."""
    await stage.process.munmap(stage.address(region, page), pages * PAGE_SIZE)
    return "ok"


@operation("mprotect R p n PROT")
async def mprotect(stage: Stage, region: str, page: int, pages: int, protection: str) -> str:
    """mprotect(2)."""
    await stage.process.mprotect(stage.address(region, page), pages * PAGE_SIZE, protection)
    return "ok"


@operation("mremap R p n m NAME [dontunmap]")
async def mremap(stage: Stage, region: str, page: int, pages: int, new: int, name: str, dontunmap: bool) -> str:
    """mremap(2) with MREMAP_MAYMOVE | MREMAP_FIXED to a new region's place."""
    target = stage.new_region(name, new).base
    await stage.process.mremap(stage.address(region, page), pages * PAGE_SIZE, new * PAGE_SIZE, target, dontunmap=dontunmap)
    return "ok"


@operation("grow R m")
async def grow(stage: Stage, region: str, pages: int) -> str:
    """mremap(2) in place: the one operation that changes a region's size."""
    found = stage.regions[region]
    await stage.process.mremap(found.base, found.pages * PAGE_SIZE, pages * PAGE_SIZE, may_move=False)
    found.pages = pages
    return "ok"


@operation("mlock R p n")
async def mlock(stage: Stage, region: str, page: int, pages: int) -> str:
    """mlock(2)."""
    await stage.process.mlock(stage.address(region, page), pages * PAGE_SIZE)
    return "ok"


@operation("uffd R p n")
async def uffd(stage: Stage, region: str, page: int, pages: int) -> str:
    """userfaultfd(2): register MISSING, with UFFD_FEATURE_SIGBUS."""
    await stage.process.userfaultfd(stage.address(region, page), pages * PAGE_SIZE, sigbus=True)
    return "ok"


@operation("munlock R p n")
async def munlock(stage: Stage, region: str, page: int, pages: int) -> str:
    """munlock(2)."""
    await stage.process.munlock(stage.address(region, page), pages * PAGE_SIZE)
    return "ok"


@operation("madvise R p n ADVICE")
async def madvise(stage: Stage, region: str, page: int, pages: int, advice: str) -> str:
    """madvise(2)."""
    await stage.process.madvise(stage.address(region, page), pages * PAGE_SIZE, advice)
    return "ok"


@operation("memfd NAME n")
async def memfd(stage: Stage, name: str, pages: int) -> str:
    """memfd_create(2) and ftruncate(2)."""
    stage.files[name] = await stage.process.memfd_create(pages * PAGE_SIZE)
    return "ok"


@operation("ffill F p n val")
async def ffill(stage: Stage, file: str, page: int, pages: int, value: int) -> str:
    """pwrite(2), page by page."""
    await stage.files[file].write(page * PAGE_SIZE, pattern(value, pages))
    return "ok"


@operation("fsum F p [n]")
async def fsum(stage: Stage, file: str, page: int, pages: int) -> str:
    """pread(2), page by page up to the end of the file."""
    return f"ok {listed(page_tokens(await stage.files[file].read(page * PAGE_SIZE, pages * PAGE_SIZE)))}"


@operation("fpunch F p n")
async def fpunch(stage: Stage, file: str, page: int, pages: int) -> str:
    """fallocate(2) with FALLOC_FL_PUNCH_HOLE."""
    await stage.files[file].punch(page * PAGE_SIZE, pages * PAGE_SIZE)
    return "ok"


@operation("ftrunc F n")
async def ftrunc(stage: Stage, file: str, pages: int) -> str:
    """ftruncate(2)."""
    await stage.files[file].truncate(pages * PAGE_SIZE)
    return "ok"


# --- CPU access -------------------------------------------------------------------------------------------------------------------


@operation("write R p off val")
async def write(stage: Stage, region: str, page: int, offset: int, value: int) -> str:
    """Store one byte."""
    await stage.process.write(stage.address(region, page) + offset, bytes([value]))
    return "ok"


@operation("read R p off")
async def read(stage: Stage, region: str, page: int, offset: int) -> str:
    """Load one byte."""
    return f"ok {(await stage.process.read(stage.address(region, page) + offset, 1))[0]:02x}"


@operation("fill R p n val")
async def fill(stage: Stage, region: str, page: int, pages: int, value: int) -> str:
    """Store whole pages one by one; a page that faults is counted and passed over."""
    data = pattern(value, pages).reshape(pages, PAGE_SIZE)
    failed = 0
    word = ""
    for i in range(pages):
        try:
            await stage.process.write(stage.address(region, page + i), data[i])
        except SignalError as error:
            failed += 1
            word = word or signal_word(error)
    return f"{word} wrote={pages - failed} failed={failed}" if failed else "ok"


@operation("sum R p [n]")
async def sum_pages(stage: Stage, region: str, page: int, pages: int) -> str:
    """Load whole pages one by one and tell what they hold."""
    tokens: list[str] = []
    for i in range(pages):
        try:
            tokens.append(page_token(await stage.process.read(stage.address(region, page + i), PAGE_SIZE)))
        except SignalError as error:
            tokens.append(signal_word(error))
    return listed(tokens)


@operation("pte R p [n]")
async def pte(stage: Stage, region: str, page: int, pages: int) -> str:
    """/proc/self/pagemap, which touches nothing."""
    return listed([pagemap_symbol(value) for value in await stage.process.pagemap(stage.address(region, page), pages)])


# --- processes --------------------------------------------------------------------------------------------------------------------


@operation("fork")
async def fork(stage: Stage) -> str:
    """fork(2); what follows, up to the exit, is the child's."""
    stage.scenes.append(stage.scene.child(await stage.process.fork()))
    return "child"


@operation("exit")
async def exit_child(stage: Stage) -> str:
    """The child ends, and its parent, which has waited for it, goes on."""
    await stage.scenes.pop().process.exit()
    return "status 0"


# --- page references --------------------------------------------------------------------------------------------------------------


@operation("pin R p n [w] [fast]")
async def pin(stage: Stage, region: str, page: int, pages: int, write: bool, fast: bool) -> str:  # noqa: ARG001 - fast finds the same pages
    """PIN_LONGTERM_TEST_START of gup_test: all pages or none, one pin set at a time."""
    if stage.pinned is not None:
        raise KernelError(errno.EINVAL, "pin", "a pin set is taken; unpin it first")
    if pages == 0:
        raise KernelError(errno.EINVAL, "pin", "no pages are no pin set")
    held = await stage.process.get_user_pages(stage.address(region, page), pages, write=write, pin=True, longterm=True)
    if held.count < pages:
        await held.put()
        raise KernelError(errno.EFAULT, "pin", f"{held.count} of {pages} pages could be had")
    stage.pinned = held
    return "ok"


@operation("unpin")
async def unpin(stage: Stage) -> str:
    """PIN_LONGTERM_TEST_STOP."""
    held, stage.pinned = stage.pinned, None
    if held is not None:
        await held.put()
    return "ok"


@operation("pinread n")
async def pinread(stage: Stage, pages: int) -> str:
    """PIN_LONGTERM_TEST_READ: what the pinned pages hold."""
    if stage.pinned is None:
        raise KernelError(errno.EINVAL, "pinread", "nothing is pinned")
    return f"ok {listed(page_tokens(await stage.pinned.read(min(pages, stage.pinned.count))))}"


async def get_and_put(stage: Stage, region: str, page: int, pages: int, *, write: bool, pin: bool) -> str:
    """Take a reference of each page and drop it at once, up to the first that cannot be had."""
    got = 0
    for i in range(pages):
        try:
            held = await stage.process.get_user_pages(stage.address(region, page + i), 1, write=write, pin=pin)
        except KernelError:
            break
        await held.put()
        got += 1
        if pin and not write:
            await _check_pinned(stage, region, page + i)
    return f"ok got={got}"


async def _check_pinned(stage: Stage, region: str, page: int) -> None:
    """verify_dma_pinned of gup_test, which does not know that the zero page is never counted as pinned: the kernel WARNs (r00879)."""
    word = int((await stage.process.pagemap_words(stage.address(region, page), 1))[0])
    if word & PM_PRESENT and word & PM_PFRAME_MASK == ZERO_FRAME:
        log.warning("driver bug in gup_test, where a kernel WARNs: page %d of %s is the zero page, which no pin counts", page, region)


@operation("gup R p n [w]")
async def gup(stage: Stage, region: str, page: int, pages: int, write: bool) -> str:
    """get_user_pages, and put."""
    return await get_and_put(stage, region, page, pages, write=write, pin=False)


@operation("pup R p n [w]")
async def pup(stage: Stage, region: str, page: int, pages: int, write: bool) -> str:
    """pin_user_pages, and unpin."""
    return await get_and_put(stage, region, page, pages, write=write, pin=True)


@operation("getref R p n")
async def getref(stage: Stage, region: str, page: int, pages: int) -> str:
    """vmsplice(2): plain references that lie in a pipe."""
    held = await stage.process.get_user_pages(stage.address(region, page), pages)
    stage.referenced.append(held)
    return f"ok got={held.count}"


@operation("putref")
async def putref(stage: Stage) -> str:
    """Read the pipe back, which drops the references."""
    tokens: list[str] = []
    referenced, stage.referenced = stage.referenced, []
    for held in referenced:
        tokens += page_tokens(await held.read(held.count))
        await held.put()
    return f"ok {listed(tokens)}"


# --- device (test_hmm ioctls) -----------------------------------------------------------------------------------------------------


@operation("open NAME unit")
async def open_device(stage: Stage, name: str, unit: int) -> str:
    """Open /dev/hmm_dmirrorUNIT."""
    stage.handles[name] = await stage.process.open(stage.device_of(unit))
    return "ok"


@operation("close D")
async def close_device(stage: Stage, name: str) -> str:
    """close(2): the last reference evicts the unit's memory."""
    handle = stage.handle(name)
    del stage.handles[name]
    await handle.close()
    return "ok"


@operation("dread D R p [n]")
async def device_read(stage: Stage, name: str, region: str, page: int, pages: int) -> str:
    """HMM_DMIRROR_READ."""
    done = await stage.handle(name).ioctl("read", stage.address(region, page), pages)
    return f"ok cpages={done.cpages} faults={done.faults} {listed(page_tokens(done.data))}"


@operation("dwrite D R p n val")
async def device_write(stage: Stage, name: str, region: str, page: int, pages: int, value: int) -> str:
    """HMM_DMIRROR_WRITE."""
    data = pattern(value, pages).tobytes()
    done = await stage.handle(name).ioctl("write", stage.address(region, page), pages, data)
    return f"ok cpages={done.cpages} faults={done.faults}"


@operation("todev D R p [n]")
async def migrate_to_device(stage: Stage, name: str, region: str, page: int, pages: int) -> str:
    """HMM_DMIRROR_MIGRATE_TO_DEV; the driver reads the range back through its mirror."""
    done = await stage.handle(name).ioctl("migrate_to_dev", stage.address(region, page), pages)
    return f"ok cpages={done.cpages} {listed(page_tokens(done.data))}"


@operation("tosys D R p [n]")
async def migrate_to_system(stage: Stage, name: str, region: str, page: int, pages: int) -> str:
    """HMM_DMIRROR_MIGRATE_TO_SYS."""
    done = await stage.handle(name).ioctl("migrate_to_sys", stage.address(region, page), pages)
    return f"ok cpages={done.cpages}"


@operation("snap D R p [n]")
async def snapshot(stage: Stage, name: str, region: str, page: int, pages: int) -> str:
    """HMM_DMIRROR_SNAPSHOT; never faults."""
    done = await stage.handle(name).ioctl("snapshot", stage.address(region, page), pages)
    return f"ok cpages={done.cpages} {listed([snapshot_symbol(value) for value in done.data])}"


@operation("excl D R p [n]")
async def exclusive(stage: Stage, name: str, region: str, page: int, pages: int) -> str:
    """HMM_DMIRROR_EXCLUSIVE; the driver reads the range back through its mirror."""
    done = await stage.handle(name).ioctl("exclusive", stage.address(region, page), pages)
    return f"ok cpages={done.cpages} {listed(page_tokens(done.data))}"


@operation("chkex D R p [n]")
async def check_exclusive(stage: Stage, name: str, region: str, page: int, pages: int) -> str:
    """HMM_DMIRROR_CHECK_EXCLUSIVE."""
    await stage.handle(name).ioctl("check_exclusive", stage.address(region, page), pages)
    return "ok"


@operation("release D")
async def release(stage: Stage, name: str) -> str:
    """HMM_DMIRROR_RELEASE: evict and unplug the unit's memory."""
    await stage.handle(name).ioctl("release", 0, 1)
    return "ok"
