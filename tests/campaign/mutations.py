"""Bugs planted into our own code, to see whether campaigns find them: each a named function that patches one function of ours.

More of them, on paths that are walked seldom, are in `slips.py`, which also names those that nobody sees, and why.

``python -m tests.campaign.mutations [NAME...]`` looks for the first seed that catches each, and prints the table that
`test_mutations.py` holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
import xxhash

from hmmnet.arena import Arena
from hmmnet.campaign.draw import draw
from hmmnet.campaign.trial import run_program
from hmmnet.devices import access as device_access
from hmmnet.devices import mirror
from hmmnet.devices.bus import Bus
from hmmnet.devices.context import Context
from hmmnet.devices.copyengine import CopyEngines
from hmmnet.devices.engine import Engine
from hmmnet.devices.memory import Memory
from hmmnet.devices.mirror import Mirror, Watch
from hmmnet.devices.models.base import Device
from hmmnet.fabric import receiver
from hmmnet.fabric.stream import ReceiveState, SendState
from hmmnet.host import announce, service
from hmmnet.host import device as host_device
from hmmnet.host.devmem import PageMap
from hmmnet.host.hub import Hub, Invalidation
from hmmnet.host.interfaces import Event
from hmmnet.host.iommu import Domain
from hmmnet.host.link import Acknowledgement
from hmmnet.host.migrate import MigrateVma
from hmmnet.host.mm import collect, fault, few, fork, pte, truncate
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.locks import Gate
from hmmnet.host.mm.memcg import MemoryCgroup
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.swap import Swap
from hmmnet.host.notifier import IntervalIndex, MmuNotifier, Subscription
from hmmnet.host.process import Process
from hmmnet.pages import MIGRATE_PFN_MIGRATE
from hmmnet.wire.exchange import Arrival, Exchange

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]
MUTATIONS: dict[str, Mutation] = {}
SEEDS_MAX = 500
"""A planted bug must be caught within so many seeds."""


def mutation(function: Mutation) -> Mutation:
    """Register a planted bug under its function's name."""
    MUTATIONS[function.__name__] = function
    return function


def nothing(*_: Any, **__: Any) -> None:
    """In place of something."""


async def no_wait(*_: Any, **__: Any) -> None:
    """In place of a wait."""


# --- invalidations ----------------------------------------------------------------------------------------------------------------


def _untold(patch: Patch, *events: Event) -> None:
    """The hub says nothing of some events."""
    told = Hub.invalidate

    def invalidate(self: Hub, event: Event, start: int, end: int, owner: int = -1) -> Any:
        return nullcontext() if event in events else told(self, event, start, end, owner)

    def try_invalidate(self: Hub, start: int, end: int) -> bool:
        return Event.CLEAR in events or Event.MIGRATE in events or quick(self, start, end)

    quick = Hub.try_invalidate
    patch.setattr(Hub, "invalidate", invalidate)
    patch.setattr(Hub, "try_invalidate", try_invalidate)


@mutation
def unmap_is_not_told(patch: Patch) -> None:
    """munmap and mremap announce nothing."""
    _untold(patch, Event.UNMAP)


@mutation
def protection_is_not_told(patch: Patch) -> None:
    """mprotect announces nothing."""
    _untold(patch, Event.PROTECTION_VMA)


@mutation
def fork_is_not_told(patch: Patch) -> None:
    """fork makes the parent's pages read-only without a word."""
    _untold(patch, Event.PROTECTION_PAGE)


@mutation
def clear_is_not_told(patch: Patch) -> None:
    """MADV_DONTNEED and copy-on-write announce nothing."""
    _untold(patch, Event.CLEAR)


@mutation
def migration_is_not_told(patch: Patch) -> None:
    """Other devices hear nothing of a migration."""
    _untold(patch, Event.MIGRATE)


@mutation
def invalidation_drops_nothing(patch: Patch) -> None:
    """A device acknowledges, and keeps its entries."""
    patch.setattr(Mirror, "drop", nothing)


@mutation
def acknowledged_early(patch: Patch) -> None:
    """A device acknowledges while its DMA is under way."""
    patch.setattr(Context, "is_busy", lambda *_: False)
    patch.setattr(Context, "quiesce", no_wait)
    patch.setattr(Domain, "busy", lambda *_: False)


@mutation
def acknowledgement_not_awaited(patch: Patch) -> None:
    """The hub goes on before devices have let go."""
    patch.setattr(Acknowledgement, "finish", no_wait)


@mutation
def one_subscriber_is_forgotten(patch: Patch) -> None:
    """Of several that overlap, the youngest hears nothing."""
    found = IntervalIndex.overlapping
    patch.setattr(IntervalIndex, "overlapping", lambda self, start, end: found(self, start, end)[:1])


@mutation
def removed_subscribers_are_told(patch: Patch) -> None:
    """Who has unsubscribed stays in the tree."""
    patch.setattr(MmuNotifier, "_discard", lambda _, subscription: setattr(subscription, "inserted", False))


# --- what devices hold --------------------------------------------------------------------------------------------------------------


@mutation
def read_pages_are_not_held(patch: Patch) -> None:
    """The device is not told what becomes of pages that a range fault gave it."""
    patch.setattr(Subscription, "hold", lambda *_: None)


@mutation
def moved_pages_are_not_held(patch: Patch) -> None:
    """The device is not told what becomes of pages that have come to it, or are on their way."""
    patch.setattr(host_device.Context, "hold", lambda *_: None)


@mutation
def who_is_not_told_does_not_read_again(patch: Patch) -> None:
    """The sequence of a device that holds nothing of a range stays where it is."""
    real = Invalidation._tell

    def spared(self: Invalidation, found: list[Subscription], sequence: int) -> Any:
        return real(self, [one for one in found if one.concerns(self.start, self.end)], sequence)

    patch.setattr(Invalidation, "_tell", spared)


# --- the retry protocol -----------------------------------------------------------------------------------------------------------


@mutation
def retry_check_skipped_by_the_device(patch: Patch) -> None:
    """The device programs what is stale."""
    patch.setattr(Mirror, "is_current", lambda *_: True)


@mutation
def retry_check_skipped_by_the_host(patch: Patch) -> None:
    """The host answers what is stale."""
    patch.setattr(Hub, "read_retry", lambda *_: False)


@mutation
def moved_pages_are_mapped_though_dropped(patch: Patch) -> None:
    """What was invalidated during a migration is mapped all the same."""
    patch.setattr(Watch, "brings", lambda _, pages: np.ones(len(pages), np.bool_))


@mutation
def hidden_entries_come_back_though_dropped(patch: Patch) -> None:
    """What was invalidated while a page was leaving is back afterwards."""
    patch.setattr(Watch, "keeps", lambda _, pages: np.ones(len(pages), np.bool_))


@mutation
def writing_needs_no_right(patch: Patch) -> None:
    """A device writes through read-only entries."""
    allows = mirror.allows
    patch.setattr(device_access, "allows", lambda entries, _: allows(entries, False))


@mutation
def entries_stay_when_pages_leave(patch: Patch) -> None:
    """A device goes on using frames that were copied out or freed."""
    patch.setattr(Mirror, "drop_frames", nothing)
    patch.setattr(Mirror, "drop_page", nothing)


# --- IOMMU ------------------------------------------------------------------------------------------------------------------------


@mutation
def revoke_forgotten(patch: Patch) -> None:
    """The IOMMU keeps translations after an invalidation."""
    patch.setattr(Domain, "revoke", nothing)


@mutation
def revoke_forgotten_after_migration(patch: Patch) -> None:
    """The IOMMU keeps translations of pages that have migrated."""
    patch.setattr(Domain, "revoke_pages", nothing)


# --- migration --------------------------------------------------------------------------------------------------------------------


@mutation
def migration_entry_not_restored(patch: Patch) -> None:
    """A migration that fails leaves its entries."""
    patch.setattr(MigrateVma, "give_up", nothing)


@mutation
def waiters_not_woken(patch: Patch) -> None:
    """Nobody hears that a migration is over."""
    patch.setattr(Gate, "open", nothing)


@mutation
def pin_check_skipped(patch: Patch) -> None:
    """Pinned pages migrate."""
    patch.setattr(few, "collect", lambda *_: False)
    patch.setattr(collect, "_free_to_go", lambda frames, *_: np.ones(len(frames), np.bool_))


@mutation
def partial_success_ignored(patch: Patch) -> None:
    """A device takes every page that it asked for as moved."""
    asked = Bus.migrate

    async def migrate(self: Bus, message: Any) -> Any:
        reply, words = await asked(self, message)
        return reply, words | np.uint64(MIGRATE_PFN_MIGRATE)

    patch.setattr(Bus, "migrate", migrate)


@mutation
def copies_home_are_zero(patch: Patch) -> None:
    """The bytes do not come along."""
    read = CopyEngines.copy_one

    def copy_one(self: CopyEngines, frame: int) -> Any:
        copied = read(self, frame)
        empty = bytes(len(copied.data))
        return msgspec.structs.replace(copied, data=empty, checksum=xxhash.xxh3_64_intdigest(empty))

    patch.setattr(CopyEngines, "copy_one", copy_one)


@mutation
def frames_are_not_zeroed(patch: Patch) -> None:
    """A new page has what its frame had before."""
    patch.setattr(Arena, "zero", nothing)


@mutation
def granted_frames_leak(patch: Patch) -> None:
    """A device does not take back frames that were not used."""
    patch.setattr(Memory, "give_back", nothing)


# --- the modelled memory ----------------------------------------------------------------------------------------------------------


@mutation
def copy_on_write_not_broken(patch: Patch) -> None:
    """The writer gets the shared page."""

    def break_cow(mm: Any, _: Any, pages: Any) -> None:
        mm.table.scatter(pages, mm.table.gather(pages) | np.uint64(pte.WRITE | pte.ANON_EXCLUSIVE))

    patch.setattr(fault, "break_cow", break_cow)


@mutation
def copy_on_write_copies_nothing(patch: Patch) -> None:
    """The writer gets an empty page."""
    patch.setattr(PhysicalMemory, "copy", nothing)


@mutation
def fork_shares_what_must_be_copied(patch: Patch) -> None:
    """Pinned pages are shared with the child."""

    def shares(parent: Any, _child: Any, _vma: Any, entries: Any, _pages: Any) -> Any:
        for zone, _, at in parent.memory.groups(pte.frames_of(entries)):
            zone.refcount[at] += 1
            zone.mapcount[at] += 1
        return entries & ~np.uint64(pte.WRITE | pte.ANON_EXCLUSIVE)

    patch.setattr(fork, "_copies", shares)


@mutation
def reference_not_dropped(patch: Patch) -> None:
    """Pages that are unmapped keep a reference."""
    patch.setattr(PhysicalMemory, "free_unused", nothing)


@mutation
def pages_not_unpinned(patch: Patch) -> None:
    """Pins are never taken back."""
    patch.setattr(Space, "put_pages", nothing)


@mutation
def charge_not_given_back(patch: Patch) -> None:
    """A memory cgroup is charged for what is free."""
    patch.setattr(MemoryCgroup, "uncharge", nothing)


@mutation
def swapped_pages_are_lost(patch: Patch) -> None:
    """What comes back from swap is empty."""
    patch.setattr(Swap, "load", nothing)


@mutation
def protection_changes_nothing(patch: Patch) -> None:
    """mprotect leaves the entries as they are."""
    patch.setattr(fault, "protect", nothing)


@mutation
def moved_mapping_is_empty(patch: Patch) -> None:
    """mremap leaves the entries behind."""
    patch.setattr(fault, "move_entries", nothing)


@mutation
def zapped_entries_stay(patch: Patch) -> None:
    """MADV_DONTNEED drops nothing."""
    patch.setattr(fault, "zap", nothing)
    patch.setattr(fault, "zap_range", nothing)


@mutation
def punched_pages_stay_mapped(patch: Patch) -> None:
    """A hole in a file is not seen by who maps it."""
    patch.setattr(truncate, "_unmap", no_wait)


@mutation
def additions_are_not_atomic(patch: Patch) -> None:
    """Somebody may come between the load and the store."""

    async def fetch_add(self: Process, address: int, value: int) -> int:
        before = int(await self.load(address))
        await trio.sleep(1e-6)
        await self.store(address, before + value)
        return before

    patch.setattr(Process, "fetch_add", fetch_add)


# --- wires ------------------------------------------------------------------------------------------------------------------------


@mutation
def repeats_take_effect_twice(patch: Patch) -> None:
    """The window of duplicates is one too short."""
    arrived = Exchange.arrived

    def again(self: Exchange, sequence: int, acknowledged: int, now_s: float) -> Arrival:
        last = sequence == self.received and sequence > 0
        arrival = arrived(self, sequence, acknowledged, now_s)
        return Arrival.NEW if last else arrival

    patch.setattr(Exchange, "arrived", again)


@mutation
def gaps_are_passed_over(patch: Patch) -> None:
    """A message that overtakes another is taken, and the other is not."""
    arrived = Exchange.arrived

    def ahead(self: Exchange, sequence: int, acknowledged: int, now_s: float) -> Arrival:
        if sequence > self.received + 1:
            self.received = sequence - 1
        return arrived(self, sequence, acknowledged, now_s)

    patch.setattr(Exchange, "arrived", ahead)


@mutation
def checksums_are_not_checked(patch: Patch) -> None:
    """A damaged chunk is taken."""
    patch.setattr(receiver, "_fits", lambda *_: True)


@mutation
def damaged_chunks_count_as_landed(patch: Patch) -> None:
    """A chunk that was refused is credited."""
    take = ReceiveState.take
    patch.setattr(ReceiveState, "take", lambda self, chunk, _: take(self, chunk, True))


@mutation
def credits_count_twice(patch: Patch) -> None:
    """The sender believes that one chunk more has landed."""

    def credit(self: SendState, credit: Any) -> None:
        taken(self, credit)
        self.landed = min(self.landed + 1, self.chunks)

    taken = SendState.credit
    patch.setattr(SendState, "credit", credit)


# --- lives ------------------------------------------------------------------------------------------------------------------------


@mutation
def lease_ignored_by_the_device(patch: Patch) -> None:
    """A device that hears nothing goes on with its mirror."""
    patch.setattr(Device, "drop_mirrors", nothing)


@mutation
def lost_memory_reads_as_zero(patch: Patch) -> None:
    """Pages of a dead device are not known to be lost."""
    patch.setattr(PhysicalMemory, "zone_lost", nothing)


@mutation
def dead_devices_memory_stays(patch: Patch) -> None:
    """The page map of a dead device never goes away."""
    patch.setattr(PageMap, "bury", lambda _: False)


@mutation
def jobs_never_answer_after_a_fault(patch: Patch) -> None:
    """Who faulted once is not replayed."""

    async def fault_for_ever(*_: Any) -> None:
        await trio.sleep_forever()

    patch.setattr(Engine, "_fault", fault_for_ever)


# --- what else is nasty -----------------------------------------------------------------------------------------------------------


@mutation
def peers_copy_nothing(patch: Patch) -> None:
    """Pages that move from device to device leave their bytes behind."""

    async def copy_across(*_: Any) -> bool:
        return True

    patch.setattr(service, "copy_across", copy_across)


@mutation
def swap_slots_are_not_counted(patch: Patch) -> None:
    """What a child shares in swap goes with the first who lets go of it."""
    patch.setattr(Swap, "share", nothing)


@mutation
def coherent_memory_dies_untold(patch: Patch) -> None:
    """Devices that mirror the coherent memory of one that has died hear nothing of its death."""
    patch.setattr(PageMap, "withdraw", no_wait)


@mutation
def frames_leave_in_their_own_order(patch: Patch) -> None:
    """Pages that are found by their frames are announced as they lie there, and looked up as if they were in order."""
    patch.setattr(announce, "distinct", lambda pages: pages)


@mutation
def children_are_not_wiped(patch: Patch) -> None:
    """MADV_WIPEONFORK does nothing."""
    patch.setattr(fork, "VM_WIPEONFORK", 0)


@mutation
def children_have_what_is_not_theirs(patch: Patch) -> None:
    """MADV_DONTFORK does nothing."""
    patch.setattr(fork, "VM_DONTCOPY", 0)


def caught(name: str, seed: int, mix: str = "all") -> str:
    """Which checker catches the mutation with that seed; nothing if none does."""
    with pytest.MonkeyPatch.context() as patch:
        MUTATIONS[name](patch)
        violations = run_program(draw(seed, mix)).violations
    return violations[0].checker if violations else ""


def first_catch(name: str, limit: int = SEEDS_MAX) -> tuple[int, str] | None:
    """The first seed that catches it, and who does."""
    return next(((seed, checker) for seed in range(limit) if (checker := caught(name, seed))), None)


if __name__ == "__main__":
    from tests.campaign import mutations, slips  # noqa: F401 - slips are entered there, not in the module that runs as a script

    for chosen in sys.argv[1:] or mutations.MUTATIONS:
        print(f"    {chosen!r}: {mutations.first_catch(chosen)},", flush=True)
