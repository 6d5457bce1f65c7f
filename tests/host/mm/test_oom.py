"""Whom the OOM killer chooses.

Oracle: mm/oom_kill.c (oom_badness, oom_evaluate_task) and fs/proc/base.c (proc_oom_score), computed by hand.
"""

from __future__ import annotations

import pytest

from hmmnet.errors import KernelError
from hmmnet.host.mm import oom
from hmmnet.host.mm.space import Space
from hmmnet.pages import HUGE_PAGES

from .files import BASE, PAGE
from .machine import Machine, span

FIRST = BASE // PAGE
TOTAL = 2 * 4096
"""Memory and swap of a `Machine`, in pages."""


async def with_pages(machine: Machine, pages: int) -> Space:
    space = machine.process()
    await space.mmap(max(pages, 1) * PAGE, "rw", BASE)
    await space.store(BASE, b"x" * pages * PAGE)
    return space


async def test_badness_is_what_the_end_of_a_process_gives_back() -> None:
    """Resident pages, on devices too; swap; three levels of page tables. The zero page is nobody's."""
    machine = Machine()
    space = await with_pages(machine, 0)
    assert oom.badness(space.mm, TOTAL) == 0
    await space.load(BASE, 1)
    assert oom.badness(space.mm, TOTAL) == 3
    await space.munmap(BASE, PAGE)
    await space.mmap(1024 * PAGE, "rw", BASE)
    await space.store(BASE, bytes(600 * PAGE))
    assert oom.badness(space.mm, TOTAL) == 600 + 2 + 1 + 1
    await machine.to_device(space, 64, span(FIRST, 50))
    assert oom.badness(space.mm, TOTAL) == 604
    await space.madvise(BASE + 50 * PAGE, 100 * PAGE, "PAGEOUT")
    assert (space.mm.rss, oom.swap_entries(space.mm), oom.badness(space.mm, TOTAL)) == (500, 100, 604)
    assert machine.memory.total_pages == TOTAL


async def test_a_huge_page_has_a_page_table_in_reserve() -> None:
    """Deposited for its splitting: counted as if it were split."""
    machine = Machine()
    space = machine.process()
    await space.mmap(2 * HUGE_PAGES * PAGE, "rw", BASE)
    await space.madvise(BASE, 2 * HUGE_PAGES * PAGE, "HUGEPAGE")
    await space.store(BASE, b"x")
    assert oom.badness(space.mm, TOTAL) == HUGE_PAGES + 3
    await space.split_blocks([FIRST])
    assert oom.badness(space.mm, TOTAL) == HUGE_PAGES + 3


async def test_what_the_owner_says_weighs_in_thousandths_of_all_memory() -> None:
    """From -1000, never, to 1000, before all others; a child inherits it; beyond that is EINVAL, and nothing has changed."""
    machine = Machine()
    space = await with_pages(machine, 100)
    for adj, points in ((0, 103), (10, 103 + 81), (-10, 103 - 82), (1000, 103 + TOTAL), (-999, 103 - 8184)):
        oom.set_score_adj(space.mm, adj)
        assert oom.badness(space.mm, TOTAL) == points, adj
    assert (await machine.fork(space)).mm.oom_score_adj == -999
    oom.set_score_adj(space.mm, -1000)
    assert oom.badness(space.mm, TOTAL) is None
    for bad in (-1001, 1001):
        with pytest.raises(KernelError, match="EINVAL"):
            oom.set_score_adj(space.mm, bad)
    assert space.mm.oom_score_adj == -1000


async def test_the_score_that_proc_shows_goes_from_0_to_2000() -> None:
    """(1000 + badness in thousandths of all) * 2 / 3; 0 for who is never killed."""
    machine = Machine()
    space = await with_pages(machine, 100)
    assert oom.score(space.mm, TOTAL) == (1000 + 103 * 1000 // TOTAL) * 2 // 3 == 674
    oom.set_score_adj(space.mm, 1000)
    assert oom.score(space.mm, TOTAL) == (2000 + 103 * 1000 // TOTAL) * 2 // 3
    oom.set_score_adj(space.mm, -1000)
    assert oom.score(space.mm, TOTAL) == 0


async def test_the_worst_is_chosen_and_the_last_of_equals() -> None:
    """Nobody of none; not who is never killed, nor who is being killed already; who has nothing is better than nobody."""
    machine = Machine()
    assert oom.select([], TOTAL) is None
    small, large, same = await with_pages(machine, 10), await with_pages(machine, 20), await with_pages(machine, 20)
    everybody = [small.mm, large.mm, same.mm]
    assert oom.select(everybody, TOTAL) is same.mm
    oom.set_score_adj(small.mm, 100)
    assert oom.select(everybody, TOTAL) is small.mm
    oom.set_score_adj(small.mm, -1000)
    await same.reap()
    assert oom.select(everybody, TOTAL) is large.mm
    oom.set_score_adj(large.mm, -900)
    assert oom.select(everybody, TOTAL) is large.mm, "however little it has"
    oom.set_score_adj(large.mm, -1000)
    assert oom.select(everybody, TOTAL) is None
