"""Huge pages migrate as one: one word in every list, one entry in every table, and what happens where that cannot go on.

    process --- 2 MiB pages ---> host core --- lists with one word each ---> a device that is a plain object

Oracle: mm/migrate_device.c (migrate_vma_collect_huge_pmd and what follows); the bytes; the invariants after every step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hmmnet.errors import KernelError, PeerLost, ProtocolError
from hmmnet.host.migrate import Grant
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.pages import (
    HUGE_PAGES,
    LARGE,
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    PAGE_SIZE,
    Words,
    page_by_page,
    pages_in,
    words_by_page,
)

from .blocks import BASE, BLOCK, EXPECTED, FIRST, HEADS, contents, go, huge_space, shape, sound
from .fakes import FIRST_FRAME, ZONE, Bench, words


async def test_two_huge_pages_are_two_words_each_way() -> None:
    """Entries, words and frames are one for each; a touch of one page brings its huge page home whole, and no other."""
    bench = Bench()
    space = await huge_space(bench)
    outcome = await go(bench, space)
    assert len(outcome.words) == 2
    assert outcome.moved == 2 * HUGE_PAGES
    assert (outcome.words & np.uint64(MIGRATE_PFN_COMPOUND | MIGRATE_PFN_MIGRATE) == MIGRATE_PFN_COMPOUND | MIGRATE_PFN_MIGRATE).all()
    assert shape(space) == [pte.DEVICE, pte.DEVICE]
    assert bench.host_pages_used() == 0
    assert bench.page_map.used_pages == 2 * HUGE_PAGES
    sound(bench)
    assert await space.load(BASE + 5 * PAGE_SIZE, 8) == (5 * PAGE_SIZE // 8).to_bytes(8, "little")
    assert shape(space) == [pte.PRESENT, pte.DEVICE]
    assert len(bench.link.freed) == HUGE_PAGES
    sound(bench)
    done = await bench.homing.migrate_to_system(space, bench.link, FIRST, FIRST + 2 * HUGE_PAGES)
    assert pages_in(done.words, MIGRATE_PFN_COMPOUND) == 2 * HUGE_PAGES
    assert done.moved == HUGE_PAGES
    assert shape(space) == [pte.PRESENT, pte.PRESENT]
    assert np.array_equal(await contents(space), EXPECTED)
    sound(bench)


async def test_small_pages_between_huge_ones_keep_their_places() -> None:
    """A range of one huge page and 512 small ones, offered a large frame and small ones: words come in order of pages."""
    bench = Bench()
    space = await huge_space(bench)
    await space.split_blocks([FIRST])
    held = await space.get_pages(FIRST + 3, 1)  # so the folio stays one, and none of its pages goes
    frames = np.concatenate((np.arange(FIRST_FRAME, FIRST_FRAME + HUGE_PAGES, dtype=np.uint64), HEADS[1:]))
    outcome = await go(bench, space, frames)
    moved = words_by_page(outcome.words) & np.uint64(MIGRATE_PFN_MIGRATE) != 0
    assert len(outcome.words) == HUGE_PAGES + 1
    assert not moved[:HUGE_PAGES].any()
    assert moved[HUGE_PAGES:].all()
    assert shape(space) == [0, pte.DEVICE]
    space.put_pages(held)
    sound(bench)
    assert np.array_equal(await contents(space), EXPECTED)


async def test_a_large_frame_may_be_filled_page_by_page_one_mapping_after_the_other() -> None:
    """The first page is a mapping by itself, some behind it are held: their frames are idle, and offered again."""
    bench = Bench()
    space = bench.space()
    await space.mmap(BLOCK, "rw", BASE)
    await space.store(BASE, EXPECTED[: BLOCK // 8])
    await space.mprotect(BASE, PAGE_SIZE, "r")
    held = await space.get_pages(FIRST + 3, 13)
    outcome = await go(bench, space, HEADS[:1])
    assert outcome.moved == bench.page_map.used_pages == HUGE_PAGES - 13
    sound(bench)
    space.put_pages(held)
    assert (await go(bench, space, device_frames(3, 13), FIRST + 3)).moved == 13
    sound(bench)
    assert np.array_equal(await contents(space, 1), EXPECTED[: BLOCK // 8])
    assert bench.page_map.used_pages == 0


def device_frames(first: int, count: int) -> Words:
    """Frames of the device, from its first."""
    return np.arange(FIRST_FRAME + first, FIRST_FRAME + first + count, dtype=np.uint64)


@pytest.mark.parametrize("read", [False, True], ids=["never touched", "huge zero page"])
async def test_nothing_yet_becomes_a_huge_page_of_the_device(*, read: bool) -> None:
    """One frame to be zeroed, one entry, and its charge."""
    bench = Bench()
    space = await huge_space(bench, written=False)
    space.mm.cgroup = bench.memory.cgroups.create("some", (HUGE_PAGES + 9) * PAGE_SIZE)
    if read:
        await space.load(BASE, 1)
        await space.load(BASE + BLOCK, 1)
    outcome = await go(bench, space)
    assert outcome.moved == HUGE_PAGES, "the group has no room for a second"
    assert shape(space) == [pte.DEVICE, pte.PRESENT if read else 0]
    assert space.mm.cgroup.usage_pages == HUGE_PAGES
    sound(bench)
    assert await space.load(BASE, BLOCK) == bytes(BLOCK)
    assert space.mm.cgroup.usage_pages == HUGE_PAGES
    await space.munmap(BASE, 2 * BLOCK)
    assert space.mm.cgroup.usage_pages == 0
    sound(bench)


async def test_the_cpu_was_first() -> None:
    """A store to one of two untouched blocks while the device is busy: that block stays what the CPU made of it."""
    bench = Bench()
    space = await huge_space(bench, written=False)

    async def store() -> None:
        assert space.try_store(BASE + BLOCK + 7, b"mine")

    bench.link.during_copy = store
    outcome = await go(bench, space)
    assert outcome.moved == HUGE_PAGES
    assert shape(space) == [pte.DEVICE, pte.PRESENT]
    sound(bench)
    assert await space.load(BASE + BLOCK + 7, 4) == b"mine"


CHANGES: dict[str, Callable[[Space], None]] = {
    "a part unmapped": lambda space: space.mm.table.scatter(np.arange(FIRST + 8, FIRST + 16, dtype=np.uint64), 0),
    "all unmapped": lambda space: space.mm.table.scatter(np.arange(FIRST, FIRST + HUGE_PAGES, dtype=np.uint64), 0),
}
"""What munmap does to migration entries, which it may when the pages' owner is evicted by frame, without the mmap lock."""


@pytest.mark.parametrize("when", ["copy", "table"])
@pytest.mark.parametrize("change", CHANGES)
async def test_a_block_that_is_split_on_its_way_goes_on_page_by_page(change: str, when: str) -> None:
    """Its migration entry was one; now it is 512, or fewer. The other huge page is not concerned."""
    bench = Bench()
    space = await huge_space(bench)
    gone = 8 if change == "a part unmapped" else HUGE_PAGES

    def split() -> None:
        CHANGES[change](space)
        space.mm.rss -= gone
        space.mm.table.set(FIRST + 20, space.mm.table.get(FIRST + 20))

    async def during() -> None:
        split()

    if when == "copy":
        bench.link.during_copy = during
    outcome = await go(bench, space, then=split if when == "table" else None)
    assert shape(space) == [0, pte.DEVICE]
    assert len(words_by_page(outcome.words)) == 2 * HUGE_PAGES
    assert bench.page_map.used_pages == 2 * HUGE_PAGES - gone
    assert bench.host_pages_used() == 0
    sound(bench)
    data = await contents(space)
    kept = np.ones(len(data), np.bool_)
    kept[8 * 512 : 16 * 512] = False
    if change == "all unmapped":
        kept[: BLOCK // 8] = False
    assert np.array_equal(data[kept], EXPECTED[kept])
    assert not data[~kept].any()


@pytest.mark.parametrize("step", ["copy", "table"])
async def test_what_is_given_up_is_as_before(step: str) -> None:
    """The device dies while it is copied to, or before its table is up to date: huge pages, the untouched block, the bytes."""
    bench = Bench()
    space = await huge_space(bench, 3)
    await space.madvise(BASE + 2 * BLOCK, BLOCK, "DONTNEED")

    async def die() -> None:
        raise PeerLost("it burns")

    def die_later() -> None:
        raise PeerLost("it burns")

    if step == "copy":
        bench.link.during_copy = die
    with pytest.raises(PeerLost):
        await go(bench, space, HEADS[:1], then=die_later)
    with pytest.raises(PeerLost):
        await go(bench, space, HEADS, FIRST + HUGE_PAGES, then=die_later)
    assert shape(space, 3) == [pte.PRESENT, pte.PRESENT, 0]
    assert bench.page_map.used_pages == 0
    sound(bench)
    assert np.array_equal(await contents(space), EXPECTED)


async def test_what_others_share_or_hold_is_left_or_goes_page_by_page() -> None:
    """A held page keeps its huge page; a shared huge page goes for both, and is one in both tables."""
    bench = Bench()
    space = await huge_space(bench)
    held = await space.get_pages(FIRST, 1)
    outcome = await go(bench, space)
    assert outcome.moved == HUGE_PAGES
    assert shape(space)[1] == pte.DEVICE
    space.put_pages(held)
    await space.load(BASE + BLOCK, 1)
    child = await space.fork(2, bench.hub(space))
    bench.spaces[2] = child
    outcome = await go(bench, space)
    assert outcome.moved == 2 * HUGE_PAGES
    for one in (space, child):
        assert {int(entry) & (pte.KIND | pte.HUGE) for entry in one.mm.table.read(FIRST, FIRST + HUGE_PAGES)} == {pte.DEVICE | pte.HUGE}
    sound(bench)
    assert np.array_equal(await contents(child), EXPECTED)
    assert np.array_equal(await contents(space), EXPECTED)
    sound(bench)


BAD_OFFERS = {
    "not aligned": words(FIRST_FRAME + 1) | np.uint64(LARGE),
    "twice": HEADS[[0, 0]],
    "a small one inside": np.concatenate((HEADS[:1], words(FIRST_FRAME + 9))),
    "another zone": words((ZONE + 1) << 36) | np.uint64(LARGE),
    "beyond the end": words(FIRST_FRAME + 2 * HUGE_PAGES) | np.uint64(LARGE),
}


@pytest.mark.parametrize("offer", BAD_OFFERS)
async def test_bad_offers_are_refused(offer: str) -> None:
    """A driver's bug: nothing moves, and nothing stays locked."""
    bench = Bench()
    space = await huge_space(bench)
    with pytest.raises(ProtocolError):
        await go(bench, space, BAD_OFFERS[offer])
    assert not bench.page_map.zone.flags.any()
    sound(bench)


async def test_offers_in_use_or_offered_before_are_refused() -> None:
    """Whole or in part, by a large frame or a small one."""
    bench = Bench()
    space = await huge_space(bench)
    await go(bench, space, HEADS[:1])
    for frames in (HEADS[:1], words(FIRST_FRAME + 4)):
        with pytest.raises(ProtocolError, match="in use"):
            await go(bench, space, frames, FIRST + HUGE_PAGES)
    pending = Grant(bench.page_map.zone, HEADS[1:])
    pending.take(FIRST)
    for frames in (HEADS[1:], words(FIRST_FRAME + HUGE_PAGES + 4)):
        with pytest.raises(ProtocolError):
            await go(bench, space, frames, FIRST + HUGE_PAGES)
    pending.release()
    sound(bench)
    assert (await go(bench, space, HEADS[1:], FIRST + HUGE_PAGES)).moved == HUGE_PAGES
    with pytest.raises(ProtocolError, match="not aligned"):
        Grant(Bench().page_map.zone, HEADS[1:]).take(FIRST + 1)


async def test_translations_of_a_moving_huge_page_are_suspended_and_void() -> None:
    """The device maps the pages where they are: while they move that answers EAGAIN, then nothing."""
    bench = Bench()
    space = await huge_space(bench)
    pages = np.arange(FIRST, FIRST + HUGE_PAGES, dtype=np.uint64)
    frames = pte.frames_of(space.mm.table.gather(pages))
    bench.domain.grant(FIRST, frames | np.uint64(3 << 62))
    found = []

    async def access() -> None:
        try:
            bench.domain.check(pages, frames << np.uint64(12), write=False)
        except KernelError as error:
            found.append(error.code)

    bench.link.during_copy = access
    await go(bench, space)
    assert found == [11]
    assert bench.domain.frame(FIRST + 77) is None


def test_lists_say_what_is_large() -> None:
    """Expanded they are lists of pages; counted they are as long as those."""
    mixed = words(7, 1024 | LARGE, 9)
    assert page_by_page(mixed).tolist() == [7, *range(1024, 1536), 9]
    assert pages_in(mixed) == 514
    assert page_by_page(words(1, 2)).tolist() == [1, 2]
    assert len(page_by_page(words())) == 0
    found = words_by_page(words(512 << 6 | 0b10011, 0b10010, 0))
    assert (found[:512] == (np.arange(512, 1024, dtype=np.uint64) << np.uint64(6) | np.uint64(3))).all()
    assert (found[512:1024] == 2).all()
    assert found[1024:].tolist() == [0]
