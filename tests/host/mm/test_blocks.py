"""Large migrations go block by block, with those mappings of others that each block has: what comes of it does not depend on the blocks.

Oracle: the same family with one block for everything, and the bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from hmmnet.host.mm import collect, pte
from hmmnet.host.mm.space import Space
from hmmnet.pages import HUGE_PAGES, Words

from .files import BASE, PAGE
from .machine import Machine, span

FIRST = BASE // PAGE
PAGES = 4 * HUGE_PAGES - 100
PICTURE = pte.KIND | pte.WRITE | pte.ANON_EXCLUSIVE


async def family(machine: Machine) -> tuple[Space, Space]:
    """Parent and child: some shared, some copied by the child, some by the parent, some unmapped in either, some never touched."""
    parent = machine.process()
    await parent.mmap(PAGES * PAGE, "rw", BASE)
    await parent.store(BASE, np.repeat(np.arange(PAGES - 40, dtype=np.uint32), PAGE // 4).view(np.uint8))
    child = await machine.fork(parent)
    for first in (3, 500, 700, 1400):
        await child.store(BASE + first * PAGE, b"c" * 30 * PAGE)
    await parent.store(BASE + 900 * PAGE, b"p" * 60 * PAGE)
    await child.munmap(BASE + 1000 * PAGE, 40 * PAGE)
    await parent.madvise(BASE + 1500 * PAGE, 20 * PAGE, "DONTNEED")
    return parent, child


async def story(machine: Machine, gone: npt.NDArray[np.int64]) -> list[tuple[list[int], bytes]]:
    """There and back, then there once more, `gone` being unmapped under way; each process's entries and bytes after each step."""
    parent, child = await family(machine)
    found: list[tuple[list[int], bytes]] = []

    async def look() -> None:
        for space in (parent, child):
            entries = space.mm.table.read(FIRST, FIRST + PAGES)
            frames = pte.frames_of(entries)
            data = b"".join(machine.bytes_of(frame) if frame else b"-" for frame in frames[::7].tolist())
            found.append(((entries & np.uint64(PICTURE)).tolist(), data))
        machine.check()

    await machine.to_device(parent, 64, span(FIRST, PAGES))
    await look()
    await machine.to_system(child, 64, span(FIRST, 900))
    await look()

    def unmapped(_: Space, pages: Words) -> None:
        for page in pages[np.isin(pages, gone + FIRST)].tolist():
            entry = child.mm.table.get(page)
            if entry & pte.KIND == pte.MIGRATION:
                child.mm.table.set(page, 0)
                child.mm.rss -= 1

    machine.on_copy_out = unmapped
    await machine.to_system(parent, 64, span(FIRST, PAGES))
    machine.on_copy_out = None
    await look()
    return found


@pytest.mark.parametrize("gone", [[], [2, 511, 512, 600, 1023, 1300], list(range(1024, 1200))], ids=["nothing", "some", "many"])
async def test_blocks_make_no_difference(gone: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries, rights and bytes of both processes after every step, with pages unmapped while they were on their way, too."""
    whole = await story(Machine(3 * PAGES, device_pages=3 * PAGES), np.array(gone, np.int64))
    monkeypatch.setattr(collect, "BLOCK_PAGES", HUGE_PAGES)
    blocks = await story(Machine(3 * PAGES, device_pages=3 * PAGES), np.array(gone, np.int64))
    assert [entries for entries, _ in blocks] == [entries for entries, _ in whole]
    assert [data for _, data in blocks] == [data for _, data in whole]
