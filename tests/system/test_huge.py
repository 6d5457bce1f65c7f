"""Huge pages on GPUs of a real machine: whole where that can be, small where not, right always.

    program --- 8 MiB, MADV_HUGEPAGE ---> host === link === gpu0 (a process)

Oracle: the bytes that were stored; how many pages one CPU access brings home.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np
import pytest

from hmmnet.machine import launch
from hmmnet.pages import HUGE_PAGES, PAGE_SIZE
from hmmnet.program import Process

BLOCK = HUGE_PAGES * PAGE_SIZE
COUNT = 4 * BLOCK // 8


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        yield


async def blocks_on(process: Process, area: int, device: str) -> list[float]:
    """How much of each of four blocks lives on `device`."""
    where = await process.residency(area, 4 * HUGE_PAGES)
    there: list[float] = np.array([owner == device for owner in where.owners])[where.pages].reshape(4, HUGE_PAGES).mean(axis=1).tolist()
    return there


async def test_a_prefetch_takes_huge_pages_and_one_load_brings_one_home() -> None:
    """Four go, by one command; a load of eight bytes brings 2 MiB home; a kernel's faults fetch them again, whole."""
    async with launch("two-gpus", rate=1000.0) as machine:
        process = await machine.create_process()
        area = await process.mmap(4 * BLOCK + BLOCK)
        area = -(-area // BLOCK) * BLOCK
        await process.madvise(area, 4 * BLOCK, "HUGEPAGE")
        values = np.arange(COUNT, dtype="<u8")
        await process.write(area, values)
        assert await process.migrate(area, 4 * BLOCK, "gpu0") == 4 * BLOCK
        assert await blocks_on(process, area, "gpu0") == [1, 1, 1, 1]
        assert await process.load(area + BLOCK + 40) == (BLOCK + 40) // 8
        assert await blocks_on(process, area, "gpu0") == [1, 0, 1, 1]
        await process.launch("reduction", "gpu0", placement="demand-2m", a=area + BLOCK, n=2)
        assert await blocks_on(process, area, "gpu0") == [1, 1, 1, 1]
        assert await process.read(area, 4 * BLOCK) == values.tobytes()
        await process.exit()


@pytest.mark.parametrize("offset", [0, 3])
async def test_what_is_not_whole_goes_small(offset: int) -> None:
    """A range that begins or ends inside a huge page: that one is split, the others are not; nothing is lost."""
    async with launch("two-gpus", rate=1000.0) as machine:
        process = await machine.create_process()
        area = -(-(await process.mmap(5 * BLOCK)) // BLOCK) * BLOCK
        await process.madvise(area, 4 * BLOCK, "HUGEPAGE")
        values = np.arange(COUNT, dtype="<u8")
        await process.write(area, values)
        first = area + offset * PAGE_SIZE
        assert await process.migrate(first, 2 * BLOCK, "gpu0") == 2 * BLOCK
        await process.munmap(area + BLOCK + 16 * PAGE_SIZE, PAGE_SIZE)
        await process.mprotect(area + 8 * PAGE_SIZE, 4 * PAGE_SIZE, "r")
        hole = BLOCK + 16 * PAGE_SIZE
        expected = values.tobytes()
        assert await process.read(area, hole) == expected[:hole]
        hole += PAGE_SIZE
        assert await process.read(area + hole, 4 * BLOCK - hole) == expected[hole:]
        await process.exit()
