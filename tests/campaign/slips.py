"""More bugs planted into our own code: slips on the paths that are walked seldom. What an error leaves behind, what is done twice, whose
something is, until when it holds. Each is one line that somebody could forget.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

from hmmnet.devices.access import Updates
from hmmnet.devices.context import Context
from hmmnet.devices.copyengine import CopyEngines
from hmmnet.devices.locks import RangeLock
from hmmnet.devices.memory import Memory
from hmmnet.devices.mirror import Hidden, Mirror
from hmmnet.fabric.stream import ReceiveState
from hmmnet.host import poison
from hmmnet.host.iommu import Domain
from hmmnet.host.landing import HostFrames
from hmmnet.host.link import SessionLink
from hmmnet.host.migrate import Grant
from hmmnet.host.mm import collect, few, finalize, pte
from hmmnet.host.mm.swap import Swap
from hmmnet.host.mm.walk import Walker
from hmmnet.wire.exchange import Arrival, Exchange
from hmmnet.wire.session import Session

from .mutations import Patch, mutation, no_wait, nothing

# --- what an error leaves behind --------------------------------------------------------------------------------------------------


@mutation
def frames_for_home_leak(patch: Patch) -> None:
    """Host frames for pages that could not come home after all keep their reference."""
    patch.setattr(HostFrames, "release", nothing)


@mutation
def frames_stay_offered(patch: Patch) -> None:
    """What a migration did not use stays locked at the host: it can be offered to no other one."""
    patch.setattr(Grant, "release", nothing)


# --- what is done twice, or once too often ----------------------------------------------------------------------------------------


@mutation
def additions_are_repeated(patch: Patch) -> None:
    """An atomic addition of a device whose page had to be fetched first is done once more."""
    advance = Updates.advance
    late: set[int] = set()

    def again(self: Updates, mirror: Mirror, memory: Memory) -> Any:
        step = advance(self, mirror, memory)
        if len(step.missing) or len(step.elsewhere):
            late.add(id(self))
        elif id(self) in late:
            late.discard(id(self))
            before = self._before.copy()
            self._open[:] = True
            advance(self, mirror, memory)
            self._before[:] = before
        return step

    patch.setattr(Updates, "advance", again)


@mutation
def answers_go_to_the_oldest_request(patch: Patch) -> None:
    """Whoever has waited longest gets the answer, whatever it answers."""
    resolve = Session._resolve
    patch.setattr(Session, "_resolve", lambda self, answers, frame: resolve(self, next(iter(self._waiting), answers), frame))


@mutation
def swap_slots_are_never_free(patch: Patch) -> None:
    """Who lets go of a swapped page does not count its slot down."""
    patch.setattr(Swap, "free", nothing)


# --- whose it is ------------------------------------------------------------------------------------------------------------------


@mutation
def pages_of_others_are_readable(patch: Patch) -> None:
    """A device is told frames of private memory that is another device's: owners are not compared."""
    walk = Walker._block

    def block(self: Walker, vma: Any, page: int, entries: Any) -> None:
        private = entries[pte.kinds_of(entries) == pte.DEVICE]
        owner, self.owner = self.owner, int(pte.zones_of(private)[0]) if len(private) else self.owner
        try:
            walk(self, vma, page, entries)
        finally:
            self.owner = owner

    patch.setattr(Walker, "_block", block)


@mutation
def charges_stay_behind(patch: Patch) -> None:
    """A page that migrates leaves its charge with its old frame, which gives it back."""
    patch.setattr(finalize, "CHARGE_MASK", 0)
    patch.setattr(few, "CHARGE_MASK", 0)


# --- what must come along ---------------------------------------------------------------------------------------------------------


@mutation
def soft_dirty_is_lost_on_the_way(patch: Patch) -> None:
    """A migration entry does not remember that its page was stored to."""
    patch.setattr(pte, "CARRIED", pte.CARRIED & ~pte.SOFT_DIRTY)


@mutation
def migration_gives_the_right_to_write(patch: Patch) -> None:
    """A page that has moved is writable, also where it is shared."""
    waiting = collect.waiting
    patch.setattr(collect, "waiting", lambda entries: waiting(entries) | np.uint64(pte.WRITE))


@mutation
def never_touched_pages_are_not_zeroed(patch: Patch) -> None:
    """A device takes pages that have no bytes yet as its frames were left."""
    landing = Memory.landing
    patch.setattr(Memory, "landing", lambda self, targets, zeros: (landing(self, targets, b""), self._listed(zeros, "zeros", 0, 255))[0])


# --- until when it holds ----------------------------------------------------------------------------------------------------------


@mutation
def heartbeats_do_not_renew_the_lease(patch: Patch) -> None:
    """Only frames with numbers are signs of life."""
    arrived = Exchange.arrived

    def deaf(self: Exchange, sequence: int, acknowledged: int, now_s: float) -> Arrival:
        heard_s = self.heard_s
        arrival = arrived(self, sequence, acknowledged, now_s)
        if sequence == 0:
            self.heard_s = heard_s
        return arrival

    patch.setattr(Exchange, "arrived", deaf)


@mutation
def streams_are_over_before_their_last_chunk(patch: Patch) -> None:
    """The receiver does not wait for the last of several chunks."""

    def done(self: ReceiveState) -> bool:
        return self.landed >= max(1, self.chunks - 1)

    patch.setattr(ReceiveState, "done", property(done))


@mutation
def departures_are_not_counted(patch: Patch) -> None:
    """A device maps what it was told of its own page, though that has been copied out meanwhile."""
    patch.setattr(Memory, "stays", lambda _, frames, __: np.ones(len(frames), np.bool_))


@mutation
def dma_of_its_own_is_not_awaited(patch: Patch) -> None:
    """A device migrates pages to which it writes over the link."""
    patch.setattr(Context, "quiesce", no_wait)


@mutation
def poison_is_not_told(patch: Patch) -> None:
    """Memory that breaks stays in the mirrors of devices."""
    patch.setattr(poison, "clear_wherever", no_wait)


@mutation
def pages_are_written_while_they_leave(patch: Patch) -> None:
    """A device goes on using, over the link, pages that it migrates to itself; neither its mirror nor the IOMMU holds it back."""

    def hide(self: Mirror, start: int, end: int) -> Hidden:
        return Hidden(self.watch(start, end), np.zeros(0, np.uint64), np.zeros(0, np.uint64))

    patch.setattr(Mirror, "hide", hide)
    patch.setattr(Domain, "suspend", nothing)


@mutation
def streams_land_after_they_were_given_up(patch: Patch) -> None:
    """Frames that a migration did not use are still written by what was on its way into them."""
    patch.setattr(CopyEngines, "abandon", nothing)


@mutation
def turns_are_not_taken(patch: Patch) -> None:
    """Operations of a device on overlapping ranges go on beside each other."""
    patch.setattr(RangeLock, "hold", lambda *_: nullcontext())


# --- what nobody sees -------------------------------------------------------------------------------------------------------------


@mutation
def leases_are_not_waited_out(patch: Patch) -> None:
    """A device that is lost counts as fenced at once."""

    async def at_once(self: SessionLink) -> None:
        self._fenced.set()

    patch.setattr(SessionLink, "fenced", at_once)


@mutation
def translations_stay_suspended(patch: Patch) -> None:
    """What a device may reach over the link is not given back to it after a migration."""
    patch.setattr(Domain, "resume", nothing)


@mutation
def pages_on_their_way_are_not_suspended(patch: Patch) -> None:
    """A device may reach, over the link, pages that it migrates to itself."""
    patch.setattr(Domain, "suspend", nothing)


UNSEEN = {
    "leases_are_not_waited_out": (
        "what a lost device reaches of others it reaches through the host, which has ended its session; only hardware with ways of "
        "its own could do harm before its lease is over"
    ),
    "translations_stay_suspended": "EAGAIN makes the device ask again, and the answer grants them anew: it costs time",
    "pages_on_their_way_are_not_suspended": (
        "the device's own mirror hides them first: planted together with that in `pages_are_written_while_they_leave`"
    ),
}
"""What cannot be seen by anybody, and why: something else sees to it, too."""
