"""Cutting and punching files that somebody has mapped: what goes, what stays, and who is told first.

Oracle: mm/truncate.c, shmem_fallocate; recordings h38 to h41 show the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import BusError, KernelError
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event
from hmmnet.pages import PAGES_MAX
from tests.host.fakes import FakeAcknowledgement, FakeLink

from .files import BASE, PAGE, filled, mapped, symbols, used
from .machine import Machine, page_bytes, span


async def test_behind_the_end_is_sigbus() -> None:
    """Not mapped: SIGSEGV; mapped, but behind the file's end: SIGBUS that names the byte. A file that grows is there."""
    machine = Machine()
    file = await filled(machine, 1)
    space = machine.process()
    await mapped(space, file, 3)
    for access in (space.load(BASE + PAGE + 9, 1), space.store(BASE + PAGE + 9, b"x")):
        with pytest.raises(BusError) as held:
            await access
        assert held.value.address == BASE + PAGE + 9
    assert type(space.signal_for(BASE + PAGE)) is BusError
    await file.truncate(2 * PAGE)
    assert await space.load(BASE + PAGE + 9, 1) == b"\0"
    with pytest.raises(BusError):
        await space.load(BASE + PAGE, 2 * PAGE)


async def test_truncation_takes_private_copies_and_a_hole_does_not() -> None:
    """even_cows: the copy of a page behind the new end is gone, on a device too; a punched page's copy stays."""
    machine = Machine()
    file = await filled(machine, 4)
    space = machine.process()
    await mapped(space, file, 4, shared=False)
    await space.store(BASE, b"a")
    await space.store(BASE + 3 * PAGE, b"d")
    await space.load(BASE + PAGE, 1)
    await machine.to_device(space, 64, span(BASE // PAGE + 3, 1))
    await file.punch(0, 2 * PAGE)
    assert symbols(space, BASE, 4) == "P-pS"
    assert await space.load(BASE, 2) == b"a\x01"
    assert await space.load(BASE + PAGE, 1) == b"\0"
    await file.truncate(2 * PAGE)
    assert symbols(space, BASE, 4) == "Pp--"
    with pytest.raises(BusError):
        await space.load(BASE + 3 * PAGE, 1)
    assert machine.devices[64].freed
    machine.check()


async def test_parts_of_pages() -> None:
    """A size or a hole that ends inside a page zeroes the rest of it, and a page that grows again shows zeros there."""
    machine = Machine()
    file = await filled(machine, 3)
    await file.truncate(2 * PAGE + 100)
    await file.truncate(3 * PAGE)
    assert await file.read(2 * PAGE, PAGE) == b"\x03" * 100 + bytes(PAGE - 100)
    await file.punch(PAGE - 10, PAGE + 20)
    assert await file.read(PAGE - 12, PAGE + 24) == b"\x01\x01" + bytes(PAGE + 20) + b"\x03\x03"
    await file.punch(5, 10)
    assert await file.read(4, 12) == b"\x01" + bytes(10) + b"\x01"
    assert used(machine) == 2


@pytest.mark.parametrize("cut", ["truncate", "punch"])
async def test_mirrors_are_told_before_pages_go(cut: str) -> None:
    """CLEAR for exactly the range, in every process that maps it, while the pages are still there; who maps meanwhile is told, too."""
    machine = Machine()
    file = await filled(machine, 4)
    one, two, late = (machine.process() for _ in range(3))
    links = [FakeLink("gpu0", 64) for _ in range(3)]
    for space, link in zip((one, two, late), links, strict=True):
        assert isinstance(space.hub, Hub)
        space.hub.insert(0, 1 << 30, link, 1)
    await mapped(one, file, 4)
    await mapped(two, file, 3, first=1)
    for space in (one, two):
        await space.load(BASE, 1)
    gate = links[0].hold()
    async with trio.open_nursery() as nursery:
        if cut == "truncate":
            nursery.start_soon(file.truncate, 2 * PAGE)
        else:
            nursery.start_soon(file.punch, 2 * PAGE, 2 * PAGE)
        await wait_all_tasks_blocked()
        assert symbols(one, BASE, 4) == "pppp"
        await mapped(late, file, 4)
        if cut == "punch":
            await late.load(BASE, 1)
            assert symbols(late, BASE, 4) == "pppp"
        gate.set()
    page = BASE // PAGE
    assert [link.told[-1][1:4] for link in links] == [
        (page + 2, page + 4, Event.CLEAR),
        (page + 1, page + 3, Event.CLEAR),
        (page + 2, page + 4, Event.CLEAR),
    ]
    assert symbols(one, BASE, 4) == "pp--"
    assert symbols(two, BASE, 3) == "p--"
    assert symbols(late, BASE, 4) == ("pp--" if cut == "punch" else "----")
    machine.check()


async def test_who_pinned_a_page_keeps_it() -> None:
    """A reference outlives the hole: the pinner goes on seeing the old bytes, the file has new ones."""
    machine = Machine()
    file = await filled(machine, 1)
    space = machine.process()
    await mapped(space, file, 1)
    held = await space.get_pages(BASE // PAGE, 1, pin=True, longterm=True)
    await file.punch(0, PAGE)
    assert await space.load(BASE, 1) == b"\0"
    out = np.empty(PAGE, np.uint8)
    machine.memory.read(held, 0, out)
    assert out.tobytes() == page_bytes(1)
    assert used(machine) == 2
    space.put_pages(held, pin=True)
    assert used(machine) == 1


async def test_madvise_remove_is_a_hole_for_everybody() -> None:
    """In each shared mapping of the range; private ones are EACCES, anonymous and locked ones EINVAL, and a gap is told at the end."""
    machine = Machine()
    file = await filled(machine, 4)
    one, two = machine.process(), machine.process()
    await mapped(one, file, 4)
    await mapped(two, file, 4)
    await two.load(BASE, 4 * PAGE)
    with pytest.raises(KernelError, match="ENOMEM"):
        await one.madvise(BASE + PAGE, 4 * PAGE, "REMOVE")
    assert await two.load(BASE, 4 * PAGE) == page_bytes(1) + bytes(3 * PAGE)
    await mapped(one, file, 1, 2 * BASE, shared=False)
    await one.mmap(PAGE, "rw", 3 * BASE)
    for address, name in ((2 * BASE, "EACCES"), (3 * BASE, "EINVAL")):
        with pytest.raises(KernelError, match=name):
            await one.madvise(address, PAGE, "REMOVE")
    await one.mlock(BASE, PAGE)
    with pytest.raises(KernelError, match="EINVAL"):
        await one.madvise(BASE, PAGE, "REMOVE")
    assert await file.read(0, 1) == b"\x01"
    machine.check()


async def test_a_write_waits_for_a_truncation() -> None:
    """While mirrors are being told, a write behind the new end must not be taken and then dropped with what lay there before."""
    machine = Machine()
    file = await filled(machine, 4)
    space = machine.process()
    await mapped(space, file, 4)
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, 1 << 30, link, 1)
    gate = link.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.truncate, PAGE)
        await wait_all_tasks_blocked()
        nursery.start_soon(file.write, 2 * PAGE, b"kept")
        await wait_all_tasks_blocked()
        assert file.size == PAGE
        gate.set()
    assert file.size == 2 * PAGE + 4
    assert await file.read(PAGE, 2 * PAGE) == bytes(PAGE) + b"kept"
    machine.check()


async def test_a_write_waits_for_a_hole() -> None:
    """While mirrors are being told of a hole, a write there must not be taken and then dropped."""
    machine = Machine()
    file = await filled(machine, 2)
    space = machine.process()
    await mapped(space, file, 2)
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, 1 << 30, link, 1)
    gate = link.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.punch, 0, PAGE)
        await wait_all_tasks_blocked()
        nursery.start_soon(file.write, 0, b"kept")
        await wait_all_tasks_blocked()
        gate.set()
    assert await file.read(0, 5) == b"kept\0"


async def test_a_truncation_that_is_cancelled_leaves_the_pages() -> None:
    """Cancelled while mirrors are told: it has had no effect, and it can be done again."""
    machine = Machine()
    file = await filled(machine, 4)
    space = machine.process()
    await mapped(space, file, 4)
    await space.load(BASE, 1)
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, 1 << 30, link, 1)
    gate = link.hold()
    with trio.move_on_after(0.01) as scope:
        await file.truncate(PAGE)
    assert scope.cancelled_caught
    assert symbols(space, BASE, 4) == "pppp"
    assert file.size == 4 * PAGE
    gate.set()
    assert await space.load(BASE + 3 * PAGE, 1) == b"\x04"
    await file.truncate(PAGE)
    assert symbols(space, BASE, 4) == "p---"
    machine.check()


async def test_remove_is_not_for_devices() -> None:
    """ENODEV, and the driver's pages stay."""
    space = Machine().process()
    await space.mmap_inserted(PAGE, "rw", BASE, shared=True)
    with pytest.raises(KernelError, match="ENODEV"):
        await space.madvise(BASE, PAGE, "REMOVE")
    assert await space.load(BASE, 1) == b"\0"


@dataclass
class Eager(FakeLink):
    """A device that answers an invalidation when somebody has mapped the file once more, or cannot."""

    another: Callable[[], None] = lambda: None

    def invalidate_start(self, *arguments: Any) -> FakeAcknowledgement:
        super().invalidate_start(*arguments)
        eager = self

        class Late(FakeAcknowledgement):
            async def finish(self) -> None:
                if Event.CLEAR in arguments:
                    eager.another()
                for _ in range(20):
                    await trio.lowlevel.checkpoint()

        return Late(self)


@pytest.mark.parametrize("ways", ["mmap", "mremap"])
@pytest.mark.parametrize("cut", ["truncate", "punch"])
async def test_who_maps_a_file_on_and_on_is_not_waited_for(cut: str, ways: str) -> None:
    """Once somebody has come, others wait until the pages are gone, as all do in the kernel; then they find a hole, or the end."""
    machine = Machine()
    file = await filled(machine, 1)
    space = machine.process()
    link = Eager("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, PAGES_MAX, link, 1)
    await mapped(space, file, 1)
    await space.load(BASE, 1)
    mappings = 0

    async def map_again() -> None:
        nonlocal mappings
        mappings += 1
        at = BASE + mappings * 4 * PAGE
        if ways == "mmap":
            await mapped(space, file, 1, at)
        else:  # a second mapping of the same pages
            await space.mremap(BASE, 0, PAGE, at)

    async with trio.open_nursery() as nursery:
        link.another = lambda: nursery.start_soon(map_again) if mappings < 100 else None
        await (file.truncate(0) if cut == "truncate" else file.punch(0, PAGE))
        came = mappings
        link.another = lambda: None
    assert len([told for told in link.told if told[3] is Event.CLEAR]) == came == 2, "of those who came the first was told"
    assert len(list(space.mm.vmas.all())) == 3
    assert not file.file("mmap").mapping.held
    for at in range(3):
        if cut == "punch":
            assert await space.load(BASE + at * 4 * PAGE, 1) == b"\0"
        else:
            with pytest.raises(BusError):
                await space.load(BASE + at * 4 * PAGE, 1)
    machine.check()


@pytest.mark.parametrize("after", ["mmap", "fork", "mremap", "cancel"])
async def test_a_mapping_waits_while_a_file_is_settled(after: str) -> None:
    """Whoever has told everybody holds new mappings off until it is done, or gives up; nothing else waits."""
    machine = Machine()
    file = await filled(machine, 4)
    space = machine.process()
    await mapped(space, file, 2)
    held = file.file("mmap").mapping
    done: list[str] = []

    async def maps() -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            if after == "fork":
                await machine.fork(space)
            elif after == "mremap":
                await space.mremap(BASE, 2 * PAGE, 4 * PAGE)
            else:
                await mapped(space, file, 1, 2 * BASE)
            done.append(after)

    scopes: list[trio.CancelScope] = []
    async with trio.open_nursery() as nursery:
        async with held.write():
            nursery.start_soon(maps)
            await wait_all_tasks_blocked()
            assert done == []
            if after == "cancel":
                scopes[0].cancel()
                await wait_all_tasks_blocked()
                assert await space.load(BASE, 1) == b"\x01", "no lock is left"
    assert done == ([] if after == "cancel" else [after])
    assert not held.held
    machine.check()


async def test_a_mapping_that_is_split_meanwhile_is_no_new_one() -> None:
    """mprotect of its pages, one by one, while mirrors are told: nobody is told twice."""
    machine = Machine()
    file = await filled(machine, 8)
    space = machine.process()
    assert isinstance(space.hub, Hub)
    link = FakeLink("gpu0", 64)
    space.hub.insert(0, 1 << 30, link, 1)
    await mapped(space, file, 8)
    gate = link.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.punch, 0, 8 * PAGE)
        await wait_all_tasks_blocked()
        for page in range(0, 8, 2):
            nursery.start_soon(space.mprotect, BASE + page * PAGE, PAGE, "r")
        await wait_all_tasks_blocked()
        gate.set()
    page = BASE // PAGE
    assert [told[1:3] for told in link.told if told[3] is Event.CLEAR] == [(page, page + 8)]
    assert await space.load(BASE, 1) == b"\0"
    machine.check()
