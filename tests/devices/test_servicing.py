"""The bottom half of fault handling: what one pass asks of the host, and what it makes of refusals."""

from __future__ import annotations

import numpy as np
import pytest
import trio

from hmmnet.devices.servicing import LOOK_PIECES_MIN, pieces
from hmmnet.errors import KernelError, PeerError
from hmmnet.pages import PAGE_SIZE, from_wire, to_wire
from hmmnet.testing.scripted_host import ScriptedHost, counters_of, machine, results_of, u64
from hmmnet.wire import messages as m

PAGE = 0x10000
BATCH_PAGES = 16
"""What a fault grows to (policy `demand`)."""


@pytest.mark.parametrize(("pages", "ranges"), [([], []), ([5], [(5, 6)]), ([1, 2, 3], [(1, 4)]), ([1, 3, 4, 9], [(1, 2), (3, 5), (9, 10)])])
def test_pieces(pages: list[int], ranges: list[tuple[int, int]]) -> None:
    """Ascending pages as ranges."""
    assert pieces(u64(pages)) == ranges


async def lists_on(host: ScriptedHost, pages: list[int]) -> int:
    """One list with a node at the beginning of each of `pages`; the address of its head pointer."""
    head = host.mmap(PAGE + 1000, 1)
    addresses = [(PAGE + page) * PAGE_SIZE for page in pages]
    for here, following in zip(addresses, [*addresses[1:], 0], strict=True):
        await host.cpu_write(here, u64([following, 1]).tobytes())
    await host.cpu_write(head, u64([addresses[0]] * 8).tobytes())
    return head


async def test_scattered_misses_are_looked_at_together() -> None:
    """Remote: one snapshot maps what needs no faulting; a page that was not touched is not mapped by it."""
    async with machine() as (host, device):
        at = host.mmap(PAGE, 64)
        await host.cpu_write(at, bytes(64 * PAGE_SIZE))
        wanted = [0, 7, 20, 33, 50]
        assert len(wanted) >= LOOK_PIECES_MIN
        addresses = u64((PAGE + page) * PAGE_SIZE for page in wanted)
        heads = host.mmap(PAGE + 100, 1)
        await host.cpu_write(heads, addresses.tobytes())
        await host.launch("list_walk", "remote", heads=heads, n=len(wanted), out=heads)
        entries = device.contexts[1].context.mirror.range(PAGE, PAGE + 64)
        assert np.flatnonzero(entries).tolist() == wanted
        assert [message.default_flags == 0 for message in host.sent(m.RangeFault)].count(True) == 1


async def test_snapshot_does_not_replace_faulting() -> None:
    """Never-touched pages among the scattered ones are faulted in after the look."""
    async with machine() as (host, _):
        host.mmap(PAGE, 64)
        wanted = u64((PAGE + page) * PAGE_SIZE for page in (1, 9, 30, 40))
        heads = host.mmap(PAGE + 100, 1)
        await host.cpu_write(heads, wanted.tobytes())
        finished = await host.launch("list_walk", "remote", heads=heads, n=4, out=heads)
        assert finished.error == ""
        assert results_of(finished) == {"steps": 1}


async def test_the_first_bad_page_is_found_in_few_requests() -> None:
    """A megabyte of nothing is one fault, at its beginning, and a logarithm of questions."""
    async with machine() as (host, _):
        host.mmap(PAGE, 1)
        finished = await host.launch("reduction", a=PAGE * PAGE_SIZE, n=1 << 17)
        assert finished.fault_address == (PAGE + 1) * PAGE_SIZE
        assert len(host.sent(m.RangeFault)) <= 12


async def test_two_jobs_with_bad_pages_both_end() -> None:
    """Each with its own address."""
    async with machine() as (host, _):
        addresses = []
        for job, address in enumerate((0x7000_0000, 0x7000_0000 + 77 * PAGE_SIZE)):
            addresses.append((await host.launch("reduction", job=job, a=address, n=1)).fault_address)
        assert addresses == [0x7000_0000, 0x7000_0000 + 77 * PAGE_SIZE]


async def test_a_group_shares_one_migration() -> None:
    """Sixteen nodes in one 64 KiB group: the first fault brings them all."""
    async with machine() as (host, _):
        at = host.mmap(PAGE, 16)
        await host.cpu_write(at, bytes(16 * PAGE_SIZE))
        head = await lists_on(host, list(range(16)))
        finished = await host.launch("list_walk", heads=head, n=1, out=head)
        counters = counters_of(finished)
        assert counters["faults"] == 2
        assert [message.pages for message in host.sent(m.Migrate)] == [16, 1, 16], "the head's group holds a hole, the list's does not"


async def test_pages_of_a_vanished_process_end_the_job() -> None:
    """When the host refuses even the subscription, the job ends with its reason instead of waiting."""
    async with machine() as (host, _):
        at = host.mmap(PAGE, 1)

        def refuse(message: m.Subscribe) -> m.Subscribed:
            raise KernelError(22, "mmu_interval_notifier_insert", "the address space is being torn down")

        host.session.on(m.Subscribe, refuse)
        finished = await host.launch("reduction", a=at, n=1)
        assert "torn down" in finished.error


async def test_a_host_that_breaks_the_protocol_ends_the_job() -> None:
    """Words for the wrong number of pages are the host's mistake; the device goes on."""
    async with machine() as (host, _):
        at = host.mmap(PAGE, 1)

        def short(message: m.RangeFault) -> m.RangeFaulted:
            return m.RangeFaulted(host.told[message.subscription], b"")

        host.session.on(m.RangeFault, short)
        finished = await host.launch("reduction", "remote", a=at, n=1)
        assert "0 bytes of words for 1 pages" in finished.error
        assert (await host.figures())["jobs_running"] == 0


@pytest.mark.parametrize("count", [BATCH_PAGES - 1, BATCH_PAGES + 1])
async def test_a_migration_answered_for_more_or_fewer_pages_ends_the_job(count: int) -> None:
    """One page is here, so frames for 15 are offered: 15 words, which could be taken for theirs one for one, are refused, too."""
    async with machine() as (host, _):
        at = host.mmap(PAGE, 1)
        assert (await host.launch("reduction", a=at, n=1)).error == ""
        host.mmap(PAGE + 1, BATCH_PAGES - 1)
        offered: list[int] = []

        def answer(message: m.Migrate) -> m.Migrated:
            offered.append(int(np.count_nonzero(from_wire(message.grant))))
            return m.Migrated(0, to_wire(u64([0] * count)), 0)

        host.session.on(m.Migrate, answer)
        finished = await host.launch("reduction", job=2, a=at + PAGE_SIZE, n=1)
        assert offered == [BATCH_PAGES - 1]
        assert f"has words for {count} pages, not {BATCH_PAGES}" in finished.error
        assert (await host.figures())["jobs_running"] == 0


async def test_a_migration_that_the_host_fails_at_ends_the_jobs_that_wait_for_its_pages() -> None:
    """Two jobs miss in one batch, far apart: only the one whose pages could not come hears of it, the other has its pages."""
    async with machine() as (host, _):
        apart = 64 * BATCH_PAGES
        for page in (PAGE, PAGE + apart):
            await host.cpu_write(host.mmap(page, 1), u64([page] * 8).tobytes())
        refused: list[int] = []

        async def migrate(message: m.Migrate) -> m.Migrated:
            if message.start <= PAGE < message.start + message.pages:
                refused.append(message.start)
                raise PeerError("the copy engine gave up")
            return await host._migrate(message)

        host.session.on(m.Migrate, migrate)
        finished: dict[int, m.Finished] = {}

        async def run(job: int, page: int) -> None:
            finished[job] = await host.launch("reduction", job=job, a=page * PAGE_SIZE, n=1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, 1, PAGE)
            nursery.start_soon(run, 2, PAGE + apart)
        assert (await host.figures())["fault_groups"] == 1
        assert refused
        assert "the copy engine gave up" in finished[1].error
        assert finished[1].fault_address == PAGE * PAGE_SIZE
        assert finished[2].error == ""
        assert results_of(finished[2]) == {"sum": PAGE + apart}
