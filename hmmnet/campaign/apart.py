"""Steps in memory of their own: system calls that nobody could do to memory that others use, each with what plain Python says of it.

Each maps its memory at an address that nothing had before (`Crew.next_base`) and unmaps it. A SIGSEGV there is a violation, unless the
step is made to get one: nobody else changes that memory.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import numpy as np
import trio

from hmmnet.blocking import only_error
from hmmnet.errors import BusError, HmmnetError, KernelError, SegmentationFault
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import PM_SOFT_DIRTY, Process, UserFaults

from .crew import REGION_STRIDE, Crew
from .history import Words
from .operations import NO_RIGHT, device_of, is_dmirror, launched, operation
from .program import Step
from .regions import WORD_BYTES, WORDS_PER_PAGE

PAGES = 4
ENDS = 100
"""Bytes of a file's last page."""
BLOCK_PAGES = 512
UNLOCKED_TRIES = 10
"""Of a second each: more than the host waits for anybody."""
TREE_NODES = 31
NOT_FOUND = (1 << 64) - 1
ZEROS = np.zeros(PAGES * WORDS_PER_PAGE, np.uint64)


@contextlib.asynccontextmanager
async def memory(crew: Crew, pages: int = PAGES, process: Process | None = None, **how: Any) -> AsyncIterator[int]:
    """Fresh memory while the block runs; its address. `how` are arguments of mmap."""
    at, owner = crew.next_base(), process or crew.process
    crew.apart.add(at)
    await owner.mmap(pages * PAGE_SIZE, address=at, **how)
    try:
        yield at
    finally:
        await owner.munmap(at, REGION_STRIDE)


def data(crew: Crew, step: Step, pages: int = PAGES) -> Words:
    """What the step stores."""
    return crew.values(step.serial, 0, pages * WORDS_PER_PAGE)


async def seen_by_cpu(process: Process, address: int, count: int) -> Words:
    """Words as the CPU loads them."""
    return np.frombuffer(await process.read(address, count * WORD_BYTES), np.uint64)


async def seen_by_device(process: Process, device: str, address: int, count: int, placement: str = "") -> Words:
    """Words as a device loads them."""
    return np.frombuffer((await launched(process, device, "peek", placement, a=address, n=count))["words"], np.uint64)


async def compare(crew: Crew, who: str, expected: Words, seen: Awaitable[Words]) -> None:
    """Words must be what they must be."""
    found = await seen
    wrong = found != expected
    if wrong.any():
        word = int(wrong.argmax())
        crew.complain("history", f"{who}: word {word} of memory of its own is 0x{int(found[word]):x}, not 0x{int(expected[word]):x}")


async def refused(crew: Crew, who: str, work: Awaitable[Any], *errors: type[BaseException]) -> None:
    """It must end in one of those errors; an error that is none of them goes on."""
    try:
        await work
    except errors:
        return
    crew.complain("rights", f"{who}: was done, and cannot be")


# --- mappings ---------------------------------------------------------------------------------------------------------------------


@operation("resize")
async def resize(crew: Crew, step: Step, who: str) -> None:
    """mremap of pages that a device has: ``grow`` and ``shrink``, or ``dontunmap``, which leaves an empty mapping behind."""
    process, device, values = crew.process, device_of(crew, step), data(crew, step)
    async with memory(crew) as at:
        await process.write(at, values)
        await process.migrate(at, step.count * PAGE_SIZE, device)
        await _resized[step.choice or "grow"](crew, who, device, at, values)


async def _grow(crew: Crew, who: str, device: str, at: int, values: Words) -> None:
    target = crew.next_base()
    crew.apart.add(target)
    await crew.process.mremap(at, PAGES * PAGE_SIZE, 2 * PAGES * PAGE_SIZE, target)
    try:
        await compare(crew, who, values, seen_by_device(crew.process, device, target, len(values)))
        await compare(crew, who, np.concatenate((values, ZEROS)), seen_by_cpu(crew.process, target, 2 * len(values)))
        await refused(crew, who, crew.process.read(at, WORD_BYTES), SegmentationFault)
    finally:
        await crew.process.munmap(target, 2 * PAGES * PAGE_SIZE)


async def _shrink(crew: Crew, who: str, device: str, at: int, values: Words) -> None:
    half = len(values) // 2
    await crew.process.mremap(at, PAGES * PAGE_SIZE, PAGES * PAGE_SIZE // 2)
    await refused(crew, who, seen_by_device(crew.process, device, at + half * WORD_BYTES, 1), SegmentationFault)
    await compare(crew, who, values[:half], seen_by_cpu(crew.process, at, half))
    await refused(crew, who, crew.process.read(at + half * WORD_BYTES, WORD_BYTES), SegmentationFault)


async def _dontunmap(crew: Crew, who: str, device: str, at: int, values: Words) -> None:
    target = crew.next_base()
    crew.apart.add(target)
    await crew.process.mremap(at, PAGES * PAGE_SIZE, PAGES * PAGE_SIZE, target, dontunmap=True)
    try:
        await compare(crew, who, ZEROS, seen_by_device(crew.process, device, at, len(values)))
        await compare(crew, who, values, seen_by_cpu(crew.process, target, len(values)))
        await compare(crew, who, ZEROS, seen_by_cpu(crew.process, at, len(values)))
    finally:
        await crew.process.munmap(target, PAGES * PAGE_SIZE)


_resized = {"": _grow, "grow": _grow, "shrink": _shrink, "dontunmap": _dontunmap}


@operation("inherit", errno.ENOMEM)
async def inherit(crew: Crew, step: Step, who: str) -> None:
    """A child has what its parent says (MADV_DONTFORK, MADV_WIPEONFORK), of pages that a device has."""
    process, device, values = crew.process, device_of(crew, step), data(crew, step, 3)
    async with memory(crew, 3) as at:
        await process.write(at, values)
        await process.migrate(at, 3 * PAGE_SIZE, device)
        await process.madvise(at, PAGE_SIZE, "DONTFORK")
        await process.madvise(at + PAGE_SIZE, PAGE_SIZE, "WIPEONFORK")
        child = await process.fork()
        try:
            await refused(crew, who, child.read(at, WORD_BYTES), SegmentationFault)
            look = seen_by_cpu if step.choice != "device" else _on(device)
            await compare(crew, who, ZEROS[:WORDS_PER_PAGE], look(child, at + PAGE_SIZE, WORDS_PER_PAGE))
            await compare(crew, who, values[2 * WORDS_PER_PAGE :], look(child, at + 2 * PAGE_SIZE, WORDS_PER_PAGE))
            await compare(crew, who, values, seen_by_cpu(process, at, len(values)))
        finally:
            await child.exit()


def _on(device: str) -> Any:
    return lambda process, address, count: seen_by_device(process, device, address, count)


@operation("let_free")
async def let_free(crew: Crew, step: Step, who: str) -> None:
    """MADV_FREE: each page is what it was, or zeros; once it is stored to again it stays."""
    process, device, values = crew.process, device_of(crew, step), data(crew, step)
    async with memory(crew) as at:
        await process.write(at, values)
        await process.migrate(at, step.count * PAGE_SIZE, device)
        await process.madvise(at, PAGES * PAGE_SIZE, "FREE")
        await process.write(at, values[:8])
        if step.choice:
            await process.madvise(at, PAGES * PAGE_SIZE, step.choice)
        pages = (await seen_by_cpu(process, at, len(values))).reshape(PAGES, WORDS_PER_PAGE)
        for page, (found, stored) in enumerate(zip(pages, values.reshape(PAGES, WORDS_PER_PAGE), strict=True)):
            rest = slice(8 if page == 0 else 0, None)
            if not ((found[rest] == stored[rest]).all() or not found[rest].any()):
                crew.complain("history", f"{who}: page {page} after MADV_FREE is neither what it was nor zeros")
        if not (pages[0, :8] == values[:8]).all():
            crew.complain("history", f"{who}: what was stored after MADV_FREE is gone")


@operation("poison")
async def poison(crew: Crew, step: Step, who: str) -> None:
    """MADV_HWPOISON: whoever touches the page gets SIGBUS, the next page is well, and a new mapping is, too."""
    process, device, values = crew.process, device_of(crew, step), data(crew, step, 2)
    async with memory(crew, 2) as at:
        await process.write(at, values)
        await process.migrate(at, 2 * PAGE_SIZE, device)
        await process.madvise(at, PAGE_SIZE, "HWPOISON")
        await refused(crew, who, process.read(at, WORD_BYTES), BusError)
        await refused(crew, who, seen_by_device(process, device, at, 1), BusError)
        rest = values[WORDS_PER_PAGE:]
        await compare(crew, who, rest, seen_by_cpu(process, at + PAGE_SIZE, len(rest)))
        await process.mmap(PAGE_SIZE, address=at)
        await compare(crew, who, ZEROS[:WORDS_PER_PAGE], seen_by_cpu(process, at, WORDS_PER_PAGE))


@operation("hugetlb", errno.ENOMEM)
async def hugetlb(crew: Crew, step: Step, who: str) -> None:
    """A page of 2 MiB that never migrates is used by a device where it is. ENOMEM: there is no such page."""
    process, device, values = crew.process, device_of(crew, step), data(crew, step, 1)
    async with memory(crew, BLOCK_PAGES, hugetlb=True) as at:
        there = at + step.page * 64 * PAGE_SIZE
        try:
            await process.write(there, values)
        except BusError:
            return  # the pool is empty
        await refused(crew, who, process.migrate(at, PAGE_SIZE, device), KernelError)
        await compare(crew, who, values, seen_by_device(process, device, there, len(values), step.choice))
        await launched(process, device, "poke", step.choice, a=there, words=(values + np.uint64(1)).tobytes())
        await compare(crew, who, values + np.uint64(1), seen_by_cpu(process, there, len(values)))


@operation("soft_dirty")
async def soft_dirty(crew: Crew, step: Step, who: str) -> None:
    """/proc/PID/clear_refs and pagemap: a page is marked as written once it is written, wherever it was meanwhile.

    But for a fork: pages that are on a device lose the mark (copy_nonpresent_pte), so these are for no child.
    """
    process, device, values = crew.process, device_of(crew, step), data(crew, step)
    async with memory(crew) as at:
        await process.madvise(at, PAGES * PAGE_SIZE, "DONTFORK")
        await process.write(at, values)
        await _clear(crew)
        clears, alone = crew.clears, not crew.clearing
        await process.write(at + PAGE_SIZE, values[:4])
        marked = (await process.pagemap_words(at, PAGES)) & np.uint64(PM_SOFT_DIRTY) != 0
        await process.migrate(at, PAGES * PAGE_SIZE, device)
        moved = (await process.pagemap_words(at, PAGES)) & np.uint64(PM_SOFT_DIRTY) != 0
        if alone and crew.clears == clears and not (marked.tolist() == moved.tolist() == [False, True, False, False]):
            crew.complain("history", f"{who}: page 1 was written; soft-dirty are {marked.tolist()}, and {moved.tolist()} on {device}")


async def _clear(crew: Crew) -> None:
    """Everything of the process counts as not written. A write of somebody else may be under way, and clear what we write after ours."""
    crew.clears += 1
    crew.clearing += 1
    try:
        await crew.process.clear_refs()
    finally:
        crew.clears += 1
        crew.clearing -= 1


# --- files ------------------------------------------------------------------------------------------------------------------------


@operation("truncate", errno.ENOMEM)
async def truncate(crew: Crew, step: Step, who: str) -> None:
    """A mapped file is cut: behind its end is SIGBUS for the CPU and for devices; what grows again is zero."""
    process, device, values = crew.process, device_of(crew, step), data(crew, step)
    file = await process.memfd_create(PAGES * PAGE_SIZE)
    try:
        async with memory(crew, file=file, shared=True) as at:
            await process.write(at, values)
            await compare(crew, who, values, seen_by_device(process, device, at, len(values), step.choice))
            length = PAGE_SIZE + ENDS * WORD_BYTES
            await file.truncate(length)
            await refused(crew, who, process.read(at + 2 * PAGE_SIZE, WORD_BYTES), BusError)
            await refused(crew, who, seen_by_device(process, device, at + 2 * PAGE_SIZE, 1), BusError)
            await file.truncate(PAGES * PAGE_SIZE)
            kept = np.where(np.arange(len(values)) < length // WORD_BYTES, values, np.uint64(0))
            await compare(crew, who, kept, seen_by_device(process, device, at, len(values), step.choice))
            await compare(crew, who, kept, seen_by_cpu(process, at, len(values)))
    finally:
        await file.close()


@operation("private_file", errno.ENOMEM)
async def private_file(crew: Crew, step: Step, who: str) -> None:
    """What CPU and device store to a private mapping of a file is there, moves to devices, and is not in the file."""
    process, device, values = crew.process, device_of(crew, step), data(crew, step)
    file = await process.memfd_create(PAGES * PAGE_SIZE)
    try:
        await file.write(0, values)
        async with memory(crew, file=file) as at:
            await compare(crew, who, values, seen_by_device(process, device, at, len(values), step.choice))
            own = values.copy()
            own[8:16] += np.uint64(1 << 32)
            await process.write(at + 8 * WORD_BYTES, own[8:16])
            second = slice(WORDS_PER_PAGE, WORDS_PER_PAGE + 8)
            own[second] += np.uint64(1 << 33)
            await launched(process, device, "poke", step.choice, a=at + PAGE_SIZE, words=own[second].tobytes())
            await process.migrate(at, PAGES * PAGE_SIZE, device)
            await compare(crew, who, own, seen_by_device(process, device, at, len(values)))
            await compare(crew, who, own, seen_by_cpu(process, at, len(values)))
            await compare(crew, who, values, _of_file(file, len(values)))
    finally:
        await file.close()


async def _of_file(file: Any, count: int) -> Words:
    return np.frombuffer(await file.read(0, count * WORD_BYTES), np.uint64)


@operation("device_pages", errno.ENOMEM, errno.ENODEV)
async def device_pages(crew: Crew, step: Step, who: str) -> None:
    """Pages that a test driver makes and maps (VM_MIXEDMAP) are the CPU's and the devices'; other devices are no files to map."""
    process, device, values = crew.process, device_of(crew, step), data(crew, step, 2)
    handle = await process.open(device)
    try:
        async with memory(crew, 2, file=handle, shared=True) as at:
            if not is_dmirror(crew, step):
                crew.complain("service", f"{who}: {device} was mapped, and has nothing to map")
            await process.write(at, values)
            await compare(crew, who, values, seen_by_device(process, device, at, len(values), step.choice))
            await compare(crew, who, values, seen_by_cpu(process, at, len(values)))
    finally:
        await handle.close()


# --- faults that programs answer ----------------------------------------------------------------------------------------------------


@operation("user_fault", errno.ENOMEM)
async def user_fault(crew: Crew, step: Step, who: str) -> None:
    """userfaultfd: missing pages are filled in by a program while the CPU, or a device, waits for them."""
    process, device, values = crew.process, device_of(crew, step), data(crew, step)
    async with memory(crew) as at:
        faults = await process.userfaultfd(at, PAGES * PAGE_SIZE)
        try:
            if step.choice != "cpu":
                await refused(crew, who, seen_by_device(process, device, at, 1), SegmentationFault)  # a job holds the mmap lock
            with only_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_fill, faults, at, values)
                    unlocked = step.choice != "cpu" and is_dmirror(crew, step)
                    look = seen_unlocked(process, device, at, PAGES) if unlocked else seen_by_cpu(process, at, len(values))
                    await compare(crew, who, values, look)
                    nursery.cancel_scope.cancel()
            await process.migrate(at, PAGES * PAGE_SIZE, device)
            await compare(crew, who, values, seen_by_cpu(process, at, len(values)))
        finally:
            await faults.close()


async def seen_unlocked(process: Process, device: str, address: int, pages: int) -> Words:
    """Words as a test driver loads them that drops the mmap lock (hmm_range_fault_unlocked_timeout).

    EBUSY says that the time was up, which somebody else's invalidation can take that waits for a device's lease to be over: try again.
    """
    handle = await process.open(device)
    try:
        for left in reversed(range(UNLOCKED_TRIES)):
            try:
                return np.frombuffer((await handle.ioctl("read_unlocked", address, pages)).data, np.uint64)
            except KernelError as error:
                if error.code != errno.EBUSY or not left:
                    raise
        raise AssertionError("the last try returns or raises")
    finally:
        with contextlib.suppress(HmmnetError):
            await handle.close()


async def _fill(faults: UserFaults, at: int, values: Words) -> None:
    """Whoever touches a missing page gets its words."""
    while True:
        address = await faults.read()
        page = (address - at) // PAGE_SIZE
        try:
            await faults.copy(at + page * PAGE_SIZE, values[page * WORDS_PER_PAGE : (page + 1) * WORDS_PER_PAGE].tobytes())
        except KernelError as error:
            if error.code not in (errno.EEXIST, errno.ENOENT):  # it was there already; the mapping is gone
                raise  # and nobody waits any more


# --- processes --------------------------------------------------------------------------------------------------------------------


@operation("stranger", errno.ENOMEM)
async def stranger(crew: Crew, step: Step, who: str) -> None:
    """Another process, in a memory cgroup of its own, has other data at addresses that the actors use, on the same devices."""
    device, values, group = device_of(crew, step), data(crew, step, 2), f"stranger {step.serial}"
    await crew.machine.create_cgroup(group, 64 * PAGE_SIZE)
    other, at = await crew.machine.create_process(cgroup=group), crew.regions[1].base
    try:
        await other.mmap(2 * PAGE_SIZE, address=at)
        await other.write(at, values)
        await other.migrate(at, 2 * PAGE_SIZE, device)
        await compare(crew, who, values, seen_by_device(other, device, at, len(values), step.choice))
        await launched(other, device, "poke", step.choice, a=at, words=(values[:8] + np.uint64(1)).tobytes())
        values[:8] += np.uint64(1)
        await compare(crew, who, values, seen_by_cpu(other, at, len(values)))
        await refused(crew, who, other.read(at + 2 * PAGE_SIZE, WORD_BYTES), SegmentationFault)
    finally:
        await other.exit()


@operation("oom", errno.ENOMEM)
async def oom(crew: Crew, step: Step, who: str) -> None:
    """Of a group of two the kernel kills the one that offers itself (oom_score_adj); the other goes on."""
    device, values, group = device_of(crew, step), data(crew, step, 2), f"oom {step.serial}"
    await crew.machine.create_cgroup(group, None)
    both = [await crew.machine.create_process(cgroup=group) for _ in range(2)]
    stays, goes = both
    try:
        for one in both:
            await one.mmap(2 * PAGE_SIZE, address=REGION_STRIDE)
            await one.write(REGION_STRIDE, values)
            await one.migrate(REGION_STRIDE, PAGE_SIZE, device)
        await goes.set_oom_score_adj(1000)
        if await goes.oom_score() <= await stays.oom_score():
            crew.complain("service", f"{who}: who offers itself has no higher score")
        killed = await crew.machine.oom_kill(group)
        if killed != goes.pid:
            crew.complain("service", f"{who}: process {killed} was killed, not {goes.pid}")
        await refused(crew, who, goes.read(REGION_STRIDE, WORD_BYTES), KernelError, SegmentationFault, BusError)
        await compare(crew, who, values, seen_by_device(stays, device, REGION_STRIDE, len(values), step.choice))
        await compare(crew, who, values, seen_by_cpu(stays, REGION_STRIDE, len(values)))
    finally:
        for one in both:
            await one.exit()


# --- jobs -------------------------------------------------------------------------------------------------------------------------


@operation("tree", *NO_RIGHT)
async def tree(crew: Crew, step: Step, who: str) -> None:
    """A device searches a tree that the CPU has built."""
    process, device = crew.process, device_of(crew, step)
    async with memory(crew, 2) as at:
        nodes = _balanced(at, TREE_NODES, step.serial)
        wanted = np.arange(TREE_NODES + 3, dtype=np.uint64)
        keys, out = at + PAGE_SIZE, at + PAGE_SIZE + 1024
        await process.write(at, nodes)
        await process.write(keys, wanted)
        await launched(process, device, "tree_search", step.choice, root=at + TREE_NODES // 2 * 32, keys=keys, n=len(wanted), out=out)
        found = np.where(wanted < TREE_NODES, wanted + np.uint64(step.serial), np.uint64(NOT_FOUND))
        await compare(crew, who, found, seen_by_cpu(process, out, len(wanted)))


def _balanced(at: int, count: int, serial: int) -> Words:
    """Nodes (key, left, right, value) in order of their keys, which are 0, 1, 2 ...; the value of each is its key and `serial`."""
    nodes = np.zeros((count, 4), np.uint64)
    nodes[:, 0] = np.arange(count)
    nodes[:, 3] = nodes[:, 0] + np.uint64(serial)

    def link(low: int, high: int) -> int:
        """The root of nodes [low, high)."""
        if low >= high:
            return 0
        middle = (low + high) // 2
        nodes[middle, 1], nodes[middle, 2] = link(low, middle), link(middle + 1, high)
        return at + middle * 32

    link(0, count)
    return nodes


@operation("words", *NO_RIGHT)
async def words(crew: Crew, step: Step, who: str) -> None:
    """A device counts words of a text."""
    from hmmnet.words import fnv1a

    process, device = crew.process, device_of(crew, step)
    text = b" ".join(b"w%d" % (number * number % 7) for number in range(600 + step.serial % 50))
    split = text.split()
    table = sorted((fnv1a(word), word) for word in set(split))
    async with memory(crew, 2) as at:
        hashes, out = at + PAGE_SIZE, at + PAGE_SIZE + 512
        await process.write(at, text)
        await process.write(hashes, np.array([key for key, _ in table], np.uint64))
        places = {"text": at, "length": len(text), "words": hashes, "n": len(table), "out": out}
        await launched(process, device, "word_count", step.choice, **places)
        expected = np.array([split.count(word) for _, word in table], np.uint64)
        await compare(crew, who, expected, seen_by_cpu(process, out, len(table)))


@operation("look")
async def look(crew: Crew, step: Step, who: str) -> None:
    """What /proc shows, and the machine's own check of itself, while others work."""
    end = 0
    for mapping in await crew.process.smaps():
        if mapping.start < end or not 0 <= mapping.rss + mapping.swap <= mapping.end - mapping.start:
            crew.complain("service", f"{who}: smaps shows {mapping}, the mapping before it ends at 0x{end:x}")
        end = mapping.end
    region = crew.regions[1 + step.region % (len(crew.regions) - 1)]
    await crew.process.pagemap_words(region.base, region.span_pages)
    await crew.process.residency(region.base, region.span_pages)
    await crew.process.oom_score()
    checked = await crew.machine.check()
    for complaint in checked["complaints"]:
        crew.complain("invariants", f"{who}: {complaint}")
