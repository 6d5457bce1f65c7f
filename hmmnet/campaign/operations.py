"""What actors do: one function for each kind of step. A step says where (`region`, `page`, `word`, `count`), with which device, and how.

Every operation is sound whatever others do at the same time, so any can be left out. Those that need memory of their own (lists to walk)
map and unmap it.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import numpy as np
import trio

from hmmnet.errors import BusError, KernelError, SegmentationFault
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Process

from .crew import COUNTERS, LANE_PART, LANE_WORDS, Crew
from .history import Words
from .program import Step
from .regions import RIGHTS, WORD_BYTES, WORDS_PER_PAGE, Region
from .words import STEP_KINDS

Operation: TypeAlias = Callable[[Crew, Step, str], Awaitable[None]]
OPERATIONS: dict[str, Operation] = {}
ANSWERS: dict[str, frozenset[int]] = {}
"""Errnos that are answers like any other, by kind of step."""

LIST_NODES = 24
UNKNOWN = "no such kernel"
CANCELLED_S = 1e-6
"""Virtual seconds, of which a job needs more: its pages come over a link."""
TENTH_US = 1e-7
LOCKED_OUT = (errno.EBUSY, errno.EAGAIN)
NO_RIGHT = (errno.EFAULT, errno.EPERM, errno.EINVAL, errno.ENOENT, errno.ENOMEM)
"""What a range answers that is unmapped, protected, or moved away meanwhile."""


def operation(name: str, *answers: int) -> Callable[[Operation], Operation]:
    """Offer a kind of step, one of `STEP_KINDS`."""
    assert name in STEP_KINDS, f"words.py does not know the kind {name}"

    def offer(function: Operation) -> Operation:
        OPERATIONS[name] = function
        ANSWERS[name] = frozenset(answers)
        return function

    return offer


async def do(crew: Crew, step: Step) -> None:
    """One step, judged."""
    who = f"{step.serial}:{step.kind}"
    noting = crew.noting
    if noting:
        crew.note(
            f"> {who} actor {step.actor} region {step.region} page {step.page} word {step.word} +{step.count} {step.device} {step.choice}"
        )
    done = await crew.attempt(who, lambda: OPERATIONS[step.kind](crew, step, who), ANSWERS[step.kind])
    if noting:
        crew.note(f"< {who} {'done' if done else 'refused'}")
    crew.one_ended(step.kind)


def region_of(crew: Crew, step: Step) -> Region:
    """The region that a step means: never that of the lanes, which have one writer each."""
    return crew.regions[1 + step.region % (len(crew.regions) - 1)]


def device_of(crew: Crew, step: Step) -> str:
    """The device that a step means."""
    names = crew.machine.device_names
    return names[step.device % len(names)]


def is_dmirror(crew: Crew, step: Step) -> bool:
    """Whether the step's device has the test driver's commands."""
    spec = next(spec for spec in crew.machine.topology.devices if spec.name == device_of(crew, step))
    return spec.model == "dmirror"


# --- the CPU ----------------------------------------------------------------------------------------------------------------------


@operation("load")
async def load(crew: Crew, step: Step, who: str) -> None:
    """The CPU loads some words."""
    region = region_of(crew, step)
    await crew.cpu_load(who, region, *region.words(step.page, step.word, step.count))


@operation("store")
async def store(crew: Crew, step: Step, who: str) -> None:
    """The CPU stores some words."""
    region = region_of(crew, step)
    await crew.cpu_store(who, region, *region.words(step.page, step.word, step.count), step.serial)


@operation("add")
async def add(crew: Crew, step: Step, who: str) -> None:
    """The CPU adds one to a counter."""
    await crew.add(who, step.word % COUNTERS, lambda address: crew.process.fetch_add(address, 1))


# --- jobs -------------------------------------------------------------------------------------------------------------------------


async def launched(process: Process, device: str, kernel: str, placement: str = "demand", **arguments: Any) -> Any:
    """What a kernel returns."""
    return (await process.launch(kernel, device, placement or "demand", **arguments)).results


@operation("device_load")
async def device_load(crew: Crew, step: Step, who: str) -> None:
    """A device loads some words."""
    region, device = region_of(crew, step), device_of(crew, step)
    first, count = region.words(step.page, step.word, step.count)

    async def fetch(address: int) -> Words:
        seen = await launched(crew.process, device, "peek", step.choice, a=address, n=count)
        return np.frombuffer(seen["words"], np.uint64)

    await crew.load(f"{who} on {device}", region, first, count, fetch)


@operation("device_gather")
async def device_gather(crew: Crew, step: Step, who: str) -> None:
    """A device loads words by their addresses, backwards."""
    region, device = region_of(crew, step), device_of(crew, step)
    first, count = region.words(step.page, step.word, step.count)

    async def fetch(address: int) -> Words:
        wanted = np.arange(address, address + count * WORD_BYTES, WORD_BYTES, dtype=np.uint64)[::-1]
        seen = await launched(crew.process, device, "gather", step.choice, addresses=wanted.tobytes())
        return np.frombuffer(seen["words"], np.uint64)[::-1]

    await crew.load(f"{who} on {device}", region, first, count, fetch)


@operation("device_store")
async def device_store(crew: Crew, step: Step, who: str) -> None:
    """A device stores some words."""
    region, device = region_of(crew, step), device_of(crew, step)
    first, count = region.words(step.page, step.word, step.count)

    async def put(address: int, values: Words) -> None:
        await launched(crew.process, device, "poke", step.choice, a=address, words=values.tobytes())

    await crew.store(f"{who} on {device}", region, first, crew.values(step.serial, first, count), put)


@operation("device_add")
async def device_add(crew: Crew, step: Step, who: str) -> None:
    """A device adds one to a counter."""
    device = device_of(crew, step)

    async def work(address: int) -> int:
        seen = await launched(crew.process, device, "fetch_add", step.choice, a=address)
        return int.from_bytes(seen["words"], "little")

    def pinned(error: BaseException) -> bool:
        return isinstance(error, SegmentationFault) and "does not come here" in str(error)

    try:
        await crew.add(f"{who} on {device}", step.word % COUNTERS, work, pinned)
    except SegmentationFault as error:
        if not pinned(error):
            raise


@operation("compute")
async def compute(crew: Crew, step: Step, who: str) -> None:
    """A device adds the first two parts of the actor's lane into the third."""
    lanes, base = crew.regions[0], step.actor * LANE_WORDS
    a, b, out = (base + part * LANE_PART for part in range(3))
    (left, sure_left), (right, sure_right) = (lanes.history.settled(first, LANE_PART) for first in (a, b))
    device = device_of(crew, step)

    async def put(_: int, __: Words) -> None:
        places = {"a": lanes.address(a), "b": lanes.address(b), "out": lanes.address(out)}
        await launched(crew.process, device, "vector_add", step.choice, **places, n=LANE_PART, dtype="<u8")

    if sure_left.all() and sure_right.all():
        with crew.deriving(lanes, a, 2 * LANE_PART, out, LANE_PART):
            await crew.store(f"{who} on {device}", lanes, out, left + right, put)
        return
    lanes.history.wild_begins(out, LANE_PART)
    try:
        await put(0, left)
    finally:
        lanes.history.wild_ends(out, LANE_PART)


@operation("lane_store")
async def lane_store(crew: Crew, step: Step, who: str) -> None:
    """The CPU stores into the actor's lane."""
    first = step.word % (2 * LANE_PART)
    await crew.cpu_store(who, crew.regions[0], step.actor * LANE_WORDS + first, min(step.count, LANE_WORDS - first), step.serial)


@operation("reduce")
async def reduce(crew: Crew, step: Step, who: str) -> None:
    """A device sums the actor's lane."""
    lanes, first = crew.regions[0], step.actor * LANE_WORDS
    values, sure = lanes.history.settled(first, LANE_WORDS)
    device = device_of(crew, step)
    seen = await launched(crew.process, device, "reduction", step.choice, a=lanes.address(first), n=LANE_WORDS, dtype="<u8")
    after, still = lanes.history.settled(first, LANE_WORDS)
    expected = int(values.sum(dtype=np.uint64))
    if sure.all() and still.all() and (values == after).all() and seen["sum"] != expected:
        crew.complain("history", f"{who} on {device}: lane {step.actor} sums to {seen['sum']}, its words are {expected} together")


@operation("walk")
async def walk(crew: Crew, step: Step, who: str) -> None:
    """A list in fresh memory is walked by a device: pointers are good everywhere."""
    device, at, began_s = device_of(crew, step), crew.next_base(), trio.current_time()
    crew.apart.add(at)
    await crew.process.mmap(2 * PAGE_SIZE, address=at)
    try:
        nodes = np.zeros((LIST_NODES, 2), np.uint64)
        order = [(step.serial * 7 + 5 * i) % LIST_NODES for i in range(LIST_NODES)]
        for here, following in zip(order, [*order[1:], -1], strict=True):
            nodes[here] = (0 if following < 0 else at + 64 + following * 16, step.serial + here)
        await crew.process.write(at + 64, nodes)
        await crew.process.write(at, np.array([at + 64 + order[0] * 16], np.uint64))
        places = {"heads": at, "n": 1, "out": at + PAGE_SIZE}
        await launched(crew.process, device, "list_walk", step.choice, **places)
        found = await crew.process.load(at + PAGE_SIZE)
        if found != int(nodes[:, 1].sum()):
            crew.complain("history", f"{who} on {device}: a list sums to {found}, its nodes are {int(nodes[:, 1].sum())} together")
    except BusError as error:
        if not crew.is_lost(error, began_s):
            raise
    finally:
        await crew.process.munmap(at, 2 * PAGE_SIZE)


# --- where pages live -------------------------------------------------------------------------------------------------------------


def some_pages(crew: Crew, step: Step) -> tuple[int, int]:
    """(address, bytes) of the pages that a step means, or of its whole region; the lanes and counters take part."""
    regions = [*crew.regions, *([] if crew.counters is None else [crew.counters])]
    region = regions[step.region % len(regions)]
    if step.choice == "whole":
        return region.base, region.span_bytes
    page, count = region.run(step.page, step.count)
    return region.base + region.spread[page] * PAGE_SIZE, count * PAGE_SIZE


@operation("migrate", *NO_RIGHT)
async def migrate(crew: Crew, step: Step, _: str) -> None:
    """Pages move to a device."""
    address, nbytes = some_pages(crew, step)
    await crew.process.migrate(address, nbytes, device_of(crew, step))


@operation("home", *NO_RIGHT)
async def home(crew: Crew, step: Step, _: str) -> None:
    """Pages move home."""
    address, nbytes = some_pages(crew, step)
    await crew.process.migrate(address, nbytes, "host")


@operation("advise", *NO_RIGHT, *LOCKED_OUT)
async def advise(crew: Crew, step: Step, _: str) -> None:
    """madvise that no program sees: paged out, cold, wanted soon, of another size."""
    address, nbytes = some_pages(crew, step)
    await crew.process.madvise(address, nbytes, step.choice or "PAGEOUT")


@operation("drop", *NO_RIGHT)
async def drop(crew: Crew, step: Step, _: str) -> None:
    """MADV_DONTNEED, or a hole in a file: zeros."""
    region = region_of(crew, step)
    page, count = region.run(step.page, step.count)
    await crew.give_up(region, page, count)


# --- mappings ---------------------------------------------------------------------------------------------------------------------


@operation("protect", *NO_RIGHT)
async def protect(crew: Crew, step: Step, _: str) -> None:
    """Rights go, or come back."""
    region = region_of(crew, step)
    page, count = region.run(step.page, step.count)
    protection = step.choice or "rw"
    look = region.look(page * WORDS_PER_PAGE, count * WORDS_PER_PAGE)
    if look.changing("place") or look.changing("rights"):
        return  # somebody else is at it: two at once could not be told apart
    with region.changing("rights", page, count):
        before = region.rights[page : page + count]
        region.rights[page : page + count] = [RIGHTS[protection]] * count
        try:
            await crew.process.mprotect(region.base + region.spread[page] * PAGE_SIZE, count * PAGE_SIZE, protection)
        except KernelError:  # as it begins, or as a whole: nothing of it has happened
            region.rights[page : page + count] = before
            raise


def is_quiet(region: Region) -> bool:
    """Whether no mapping of the region is being changed now."""
    look = region.look(0, region.pages * WORDS_PER_PAGE)
    return not (look.changing("place") or look.changing("rights"))


@operation("move", errno.EFAULT)
async def move(crew: Crew, step: Step, _: str) -> None:
    """The whole region moves to another address (mremap); its pages stay where they are. EFAULT: it is not one mapping any more."""
    region = region_of(crew, step)
    if not is_quiet(region) or len(set(region.rights)) > 1:
        return  # mremap moves one mapping
    target = crew.next_base()
    with region.changing("place"):
        await crew.process.mremap(region.base, region.span_bytes, region.span_bytes, target)
        region.base = target


@operation("unmap")
async def unmap(crew: Crew, step: Step, _: str) -> None:
    """Some pages are unmapped, and mapped again: zeros, or what the file has."""
    region = region_of(crew, step)
    if not is_quiet(region):
        return
    page, count = (0, region.pages) if region.kind in {"huge", "shared"} else region.run(step.page, step.count)
    words = (page * WORDS_PER_PAGE, count * WORDS_PER_PAGE)
    empty = region.file is None
    mark = region.history.store_begins(words[0], np.zeros(words[1], np.uint64)) if empty else None
    at, nbytes = region.base + region.spread[page] * PAGE_SIZE, count * PAGE_SIZE
    if count == region.pages:
        at, nbytes = region.base, region.span_bytes
    with region.changing("place", page, count):
        await crew.process.munmap(at, nbytes)
        await trio.lowlevel.checkpoint()
        await crew.map_again(region, (at - region.base) // PAGE_SIZE, nbytes // PAGE_SIZE)
        region.rights[page : page + count] = [RIGHTS["rw"]] * count
    if mark is not None:
        region.history.store_ends(mark)


@operation("lock", *NO_RIGHT, *LOCKED_OUT)
async def lock(crew: Crew, step: Step, _: str) -> None:
    """mlock and munlock."""
    address, nbytes = some_pages(crew, step)
    try:
        await crew.process.mlock(address, nbytes)
    finally:
        await crew.process.munlock(address, nbytes)


@operation("pin", *NO_RIGHT, errno.EBUSY)
async def pin(crew: Crew, step: Step, who: str) -> None:
    """Pages are pinned: they are the ones that the process sees, and stay, whoever wants to move them.

    EBUSY: for longer than a moment, a page of coherent memory that somebody else holds there (migrate_device_coherent_folio).
    """
    region = region_of(crew, step)
    page, count = region.run(step.page, step.count)
    first, words = page * WORDS_PER_PAGE, count * WORDS_PER_PAGE
    look = region.look(first, words)
    address = region.base + region.spread[page] * PAGE_SIZE
    held = await crew.process.get_user_pages(address, count, write=True, pin=step.choice != "plain", longterm=step.choice == "longterm")
    try:
        if step.choice == "fork" and region.is_private:
            await _pinned_across_fork(crew, step, who, address, region, first)
        with contextlib.suppress(SegmentationFault):
            await crew.process.migrate(address, count * PAGE_SIZE, device_of(crew, step))
        await crew.cpu_store(who, region, first, 4, step.serial)
        if held.count < count or step.choice == "plain":
            return
        mark = region.history.load_begins(first, words)
        got = np.frombuffer(await held.read(count), np.uint64)
        if region.stayed(look) and region.stayed(look, "given_up"):
            wrong = region.history.load_ends(mark, got)
            if wrong is not None:
                crew.complain(
                    "history", f"{who}: pinned word {wrong.word} of region {region.number} is 0x{wrong.value:x}, which {wrong.why}"
                )
        else:
            region.history.load_fails(mark)
    finally:
        await held.put()


async def _pinned_across_fork(crew: Crew, step: Step, who: str, address: int, region: Region, first: int) -> None:
    """What is pinned is copied for a child, which sees nothing of what its parent stores afterwards."""
    child = await crew.process.fork()
    try:
        with contextlib.suppress(SegmentationFault):  # the page has no right, or has moved away
            before = await child.read(address, PAGE_SIZE)
            await crew.cpu_store(who, region, first, 4, step.serial)
            if await child.read(address, PAGE_SIZE) != before:
                crew.complain("history", f"{who}: a child's memory at 0x{address:x} has changed, and the child has not changed it")
    finally:
        await child.exit()


# --- files ------------------------------------------------------------------------------------------------------------------------


@operation("file_read")
async def file_read(crew: Crew, step: Step, who: str) -> None:
    """pread of a file that is mapped."""
    region = region_of(crew, step)
    file = region.file
    if file is None:
        return await load(crew, step, who)
    first, count = region.words(step.page, step.word, step.count)
    mark = region.history.load_begins(first, count)
    try:
        raw = await file.read(first * WORD_BYTES, count * WORD_BYTES)
    except BaseException:
        region.history.load_fails(mark)
        raise
    wrong = region.history.load_ends(mark, np.frombuffer(raw, np.uint64))
    if wrong is not None:
        crew.complain("history", f"{who}: word {wrong.word} of the file is 0x{wrong.value:x}, which {wrong.why}")
    return None


@operation("file_write")
async def file_write(crew: Crew, step: Step, who: str) -> None:
    """pwrite of a file that is mapped."""
    region = region_of(crew, step)
    file = region.file
    if file is None:
        return await store(crew, step, who)
    first, count = region.words(step.page, step.word, step.count)

    async def put(_: int, values: Words) -> None:
        await file.write(first * WORD_BYTES, values.tobytes())

    return await crew.store(who, region, first, crew.values(step.serial, first, count), put, guarded=False)


# --- refused, called away, looked at ----------------------------------------------------------------------------------------------


@operation("unknown_job")
async def unknown_job(crew: Crew, step: Step, who: str) -> None:
    """A job that no device knows is refused, and says so."""
    try:
        await launched(crew.process, device_of(crew, step), UNKNOWN)
    except KernelError as error:
        if error.code != errno.ENOENT:
            raise
    else:
        crew.complain("service", f"{who}: a job was done that does not exist")


@operation("cancelled_job")
async def cancelled_job(crew: Crew, step: Step, who: str) -> None:
    """A load by a device whose program does not want it any more; it ends there, too. What it returns in time must be explainable."""
    with trio.move_on_after(CANCELLED_S):
        await device_load(crew, step, who)


@operation("cancelled", *NO_RIGHT)
async def cancelled(crew: Crew, step: Step, who: str) -> None:
    """Somebody is called away from what it waits for: pages that move, a load, a store."""
    address, nbytes = some_pages(crew, step)
    with trio.move_on_after(TENTH_US * (1 + step.word % 64)):
        if step.choice in {"load", "store"}:
            await OPERATIONS[step.choice](crew, step, who)
        else:
            await crew.process.migrate(address, nbytes, "host" if step.choice == "home" else device_of(crew, step))


@operation("populate", *NO_RIGHT)
async def populate(crew: Crew, step: Step, _: str) -> None:
    """Fresh memory is faulted in at once, with large pages or without, and given back."""
    at, nbytes = crew.next_base(), step.count * PAGE_SIZE
    crew.apart.add(at)
    await crew.process.mmap(nbytes, address=at)
    try:
        if step.choice:
            await crew.process.madvise(at, nbytes, step.choice)
        await crew.process.madvise(at, nbytes, "POPULATE_WRITE")
        await crew.process.migrate(at, nbytes, device_of(crew, step))
    finally:
        await crew.process.munmap(at, nbytes)


@operation("report")
async def report(crew: Crew, _: Step, __: str) -> None:
    """Somebody looks at the figures, and at where pages live."""
    await crew.machine.report()
    lanes = crew.regions[0]
    await crew.process.residency(lanes.base, lanes.pages)
    await crew.process.pagemap(lanes.base, lanes.pages)
