"""The bugs, with their stories.

Where a story names a driver, something of this kind was reported or mended there; what runs here is the mechanism, not that driver's code.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from hmmnet.sim import SimulatedMachine

from .scenarios import ends, stale, waiting


@dataclass(frozen=True)
class Bug:
    """`story` says what happened, why, and what mends it; `where` who had it. A race may need several of `seeds` to show."""

    name: str
    title: str
    where: str
    story: str
    scenario: Callable[[SimulatedMachine], Awaitable[None]]
    seeds: int = 1

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"name": self.name, "title": self.title, "where": self.where, "story": self.story}


_LIBRARY = (
    Bug(
        "driver-lock-missing",
        "two devices migrate one range for ever (livelock)",
        "xe, mended in December 2025 with a lock for the whole driver",
        """\
Both GPUs fault on the same range. Each has its driver bind the range all or nothing: fault what is elsewhere home, migrate the whole in,
build the page table, and begin anew if a page went missing meanwhile. A page on the other GPU has to come home first, so whoever begins
takes away what the other one has just finished and not yet used. Both work hard, and neither gets anywhere. One lock around the whole
attempt, for all devices of the driver, lets one of them finish.""",
        waiting.driver_lock_missing,
    ),
    Bug(
        "page-held-over-a-fault",
        "two devices hold a page each and wait for the other's (page-lock hang)",
        "device-to-device migration in xe, switched off in January 2026 after hangs and engine resets",
        """\
A migration locks its page until finalize; whoever faults on it waits. A driver that faults a second page in before it has finished with
the first holds a lock while it waits for another. Two devices that take two pages in opposite order then wait for each other, until
somebody's patience ends and an engine is reset. migrate_vma itself only *tries* to lock, for this reason; a driver must not wait for a page
while it holds one.""",
        waiting.page_held_over_a_fault,
    ),
    Bug(
        "eviction-deadlock",
        "two allocations wait for each other's memory (eviction deadlock)",
        "drivers under oversubscription that allocate chunk by chunk",
        """\
Device memory holds less than two working sets. Each range is pulled in chunk by chunk, and a range that is being pulled may not be
evicted. Both get half of what they need, and wait for memory that only the other one could give. Room has to be made for a whole range
before any of it is taken, in turns.""",
        waiting.eviction_deadlock,
    ),
    Bug(
        "migration-storm",
        "one touched page moves two megabytes, every time (migration storm)",
        "amdkfd with XNACK: a library call took over an hour, 98 % of it in one lock",
        """\
CPU and GPU use different pages of one range. The driver knows ranges only: one page that the CPU took home makes the range mixed, a
mixed range is sent home entirely and brought back entirely. Nothing is wrong with any byte; the machine just does nothing but move
them. Moving what is missing, or resting a range that is fought for, ends it.""",
        waiting.migration_storm,
    ),
    Bug(
        "huge-page-freed-whole",
        "part of a huge page is unmapped, and all of it is freed",
        "the device-private huge pages of 2025, whose self-tests have eight cases for it",
        """\
A huge page on a device is unmapped in part. What is left stays mapped, page by page, and the part that went is given back to the driver.
One that takes the first freed frame for the end of the whole block frees pages that a program still has, and the next migration
overwrites them.""",
        stale.huge_page_freed_whole,
    ),
    Bug(
        "ack-before-dma-ends",
        "memory is freed while DMA to it is under way (teardown)",
        "any driver whose callback returns too soon",
        """\
The callback of an invalidation removes the entries and returns. But a copy engine that looked an entry up before is still at work with
it, and the kernel frees the page when the callback returns. The callback has to wait until what was begun through the old entries is
over.""",
        stale.ack_before_dma_ends,
    ),
    Bug(
        "stale-after-restart",
        "a device comes back from a reset with its old page table",
        "reset paths that keep page tables in memory that survives",
        """\
After a reset the driver finds the page tables where they were, and saves itself the work of building them. What was invalidated while the
device was gone was told to nobody, so the table leads to pages that others have by now. A new life begins with an empty mirror.""",
        stale.stale_after_restart,
    ),
    Bug(
        "unregister-without-memory",
        "a device that never had memory cannot be unregistered",
        "teardown code that takes the last use for granted",
        """\
On close, the driver evicts its memory from the first frame in use to the last. Where nothing ever moved to the device there is no first
frame. The path is taken by every program that opens a device and does not use it, and by no test.""",
        ends.unregister_without_memory,
    ),
    Bug(
        "pages-known-by-number",
        "a lookup is taken for a pin (pin against migrate)",
        "drivers that used get_user_pages and were moved to hmm_range_fault",
        """\
Memory is registered once and written by later messages. get_user_pages pins: what is pinned does not migrate. hmm_range_fault pins nothing;
its answer holds until the next invalidation. A driver that keeps the frame numbers as if they were pinned writes to whoever has the frames
after the next migration. Either pin, and the pages stay, or look into the mirror each time.""",
        stale.pages_known_by_number,
    ),
    Bug(
        "mprotect-there-and-back",
        "a writable page that the device cannot write",
        "lib/test_hmm.c to this day: EFAULT, with a kernel warning",
        """\
mprotect to read-only and back leaves the entry of a page on the device read-only: the kernel upgrades it at the next CPU write. A device's
write faults, but hmm_range_fault reports a device's own page as it is and never upgrades it, so the driver gets the same read-only
entry whatever it asks. The page has to go home, where the fault can be taken, and come back.""",
        ends.mprotect_there_and_back,
    ),
    Bug(
        "read-retry-skipped",
        "a translation is programmed that was dropped on its way",
        "the classic of every first HMM driver",
        """\
hmm_range_fault looks without a lock that an invalidation would need, so its answer may be old when it comes. The sequence tells:
mmu_interval_read_retry, under the same lock as the programming. Without it the callback runs first and finds nothing to remove, and
then the old entry is written, for good.""",
        stale.read_retry_skipped,
        seeds=8,
    ),
    Bug(
        "owner-not-compared",
        "somebody else's migration is ignored as one's own",
        "callbacks that filter MMU_NOTIFY_MIGRATE without looking at the owner",
        """\
A driver that migrates is told of its own migrations, and rightly ignores them. The event carries the owner of the memory that the pages go
to. One that looks at the kind of event only ignores the migrations of every other device too, and goes on reading where the pages were.""",
        stale.owner_not_compared,
    ),
    Bug(
        "free-callback-lost",
        "memory that nobody has, and nobody gets (leak)",
        "drivers that count folio_free instead of frames",
        """\
The last reference to a device page calls the driver's folio_free, from munmap, exit, anywhere. A driver that loses some of these calls has
less memory every day; nothing fails until nothing moves any more. And on unload the module waits for pages for ever.""",
        ends.free_callback_lost,
    ),
)

BUGS = {bug.name: bug for bug in _LIBRARY}
"""All, by name."""
