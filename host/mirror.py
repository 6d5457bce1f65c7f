"""hmm_range_fault for a device: look at a range of the CPU page table, fault in what is wanted, and say from when the answer is good.

The look itself (table A3) is `AddressSpace.walk`, one vectorised step. Here is the loop around it, as drivers write it with
hmm_range_fault_unlocked_timeout: note the subscription's sequence, take the mmap lock for reading, walk, fault the pages that are wanted
and not there, walk again, until nothing is left to fault. Faulting may sleep (on a migration entry, on a page that comes home from another
device), and while it sleeps the range may be invalidated under us: then everything read so far is stale, and the loop starts over, until
the time is up (EBUSY).

The answer carries the sequence. The device compares it with that of the last invalidation that it was told of, in the same step in which it
programs its table; that comparison is mmu_interval_read_retry, across two processes.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.errors import KernelError
from hmmnet.pages import HUGE_PAGES, Words, any_of

from .hub import Hub
from .interfaces import AddressSpace, Walk
from .mm.userfault import MissingPage
from .notifier import Subscription

ROUNDS_MAX = 64
"""Rounds of faulting in one walk before it counts as stale: each page wants one fault, or few when others take it away again."""


@dataclass(frozen=True)
class Request:
    """What a driver asks: pages [start, start + pages); flags as in struct hmm_range; `owner` is dev_private_owner."""

    start: int
    pages: int
    owner: int
    default_flags: int = 0
    flags_mask: int = 0
    inputs: Words | None = None
    node: int | None = None
    """The host memory nearest to the device: pages that nobody has touched yet are made there, as by a driver's thread on that node."""

    unlocked: bool = False
    """The mmap lock may be dropped while a userfaultfd's owner fills a page in (hmm_range_fault_unlocked); such pages are EFAULT else."""

    @property
    def end(self) -> int:
        """The page behind the last."""
        return self.start + self.pages


async def range_fault(space: AddressSpace, hub: Hub, subscription: Subscription, request: Request, timeout_s: float) -> tuple[int, Words]:
    """The HMM_PFN words of a range and the sequence that they are good for (hmm_range_fault_unlocked_timeout).

    `timeout_s` is on trio's clock (``math.inf``: none). It holds over all rounds that end because the range changed, and begins anew when a
    fault had to drop the lock, which is progress. Raises KernelError: EBUSY when the time is up, EFAULT, EPERM, ENOMEM as table A3, EFAULT
    too when the OOM killer has been here, EINTR when the process is killed while its lock is waited for.
    """
    points = hub.points
    deadline = trio.current_time() + timeout_s
    while True:
        if trio.current_time() > deadline:
            why = f"pages 0x{request.start:x}+{request.pages} kept changing until the time was up"
            raise KernelError(errno.EBUSY, "hmm_range_fault", why)
        if points.armed:
            await _at("retry.before_read_begin", hub, subscription, request)
        sequence = await hub.read_begin(subscription)
        try:
            if points.armed:
                await _at("retry.after_read_begin", hub, subscription, request)
            async with space.read_killable():
                words = await _walk(space, hub, subscription, request, sequence)
        except MissingPage as missing:
            if not request.unlocked:
                raise
            await missing.registration.wait(missing.page)
            deadline = trio.current_time() + timeout_s
            continue
        except KernelError as error:
            if not await space.relieved(error):
                raise
            deadline = trio.current_time() + timeout_s
            continue
        if points.armed:
            await _at("retry.before_read_retry", hub, subscription, request)
        if words is not None and not hub.read_retry(subscription, sequence):
            return sequence, words


async def _at(name: str, hub: Hub, subscription: Subscription, request: Request) -> None:
    """A step boundary (`hmmnet.faults.points`)."""
    await hub.points.at(name, device=subscription.link.name, process=hub.process, start=request.start, pages=request.pages)


async def _walk(space: AddressSpace, hub: Hub, subscription: Subscription, request: Request, sequence: int) -> Words | None:
    """hmm_range_fault under the mmap lock; None when the range went stale."""
    for _ in range(ROUNDS_MAX):
        walk = space.walk(request.start, request.end, request.inputs, request.default_flags, request.flags_mask, request.owner)
        if not any_of(walk.read):
            if walk.errno:
                why = space.why_not(walk.failed, write=walk.errno == errno.EPERM, start=request.start, end=request.end)
                raise KernelError(walk.errno, "hmm_range_fault", why)
            return walk.words
        await space.fault_in(*_faulted_along(space, request, walk), request.node)
        if hub.points.armed:
            await _at("retry.between_faults", hub, subscription, request)
        if hub.read_retry(subscription, sequence):
            return None
    return None


def _faulted_along(space: AddressSpace, request: Request, walk: Walk) -> tuple[Words, npt.NDArray[np.bool_]]:
    """The pages that hmm_vma_fault faults for a walk, and which of them for writing.

    It does not stop at the page that is missing: it faults everything from there to the end of the page table (2 MiB), the VMA or the
    range, in the way that the first page wants. More than a detail: pages of the caller's own device behind a missing page come home.
    """
    wanted = walk.read.nonzero()[0]
    stop = walk.failed if walk.errno else request.end
    pages: list[Words] = []
    write: list[npt.NDArray[np.bool_]] = []
    i = 0
    while i < len(wanted):
        first = request.start + int(wanted[i])
        end = min(stop, first // HUGE_PAGES * HUGE_PAGES + HUGE_PAGES, max(space.vma_end(first), first + 1))
        pages.append(np.arange(first, end, dtype=np.uint64))
        write.append(np.full(end - first, walk.write[wanted[i]]))
        i = int(np.searchsorted(wanted, end - request.start))
    return np.concatenate(pages), np.concatenate(write)
