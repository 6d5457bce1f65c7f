"""Migration from device to device: pages that live on a peer come straight from it, over the links between the two.

migrate_vma takes pages of a device if the driver selects device memory (MIGRATE_VMA_SELECT_DEVICE_PRIVATE, _COHERENT) and the page map has
the driver's owner (`dev_pagemap.owner`; table A4). Drivers give one owner to devices that reach each other: xe to those between which
peer-to-peer DMA is possible (xe_has_interconnect), amdkfd to those of one XGMI hive. So here: devices of one model between which links lead
without passing a host memory have one owner (`dma_map.page_map_owners`). A driver that does not ask for it (test_hmm's selects one kind of
memory, and each of its units is an owner of its own) takes nothing from others: a foreign page stays, or comes home by a fault first.

The destination's driver does the migration, as always; the source hears of it as of any other and drops its entries before it streams. The
pages stay the source's until the last step, so whatever fails, or dies, leaves them where they were: where the source fails, or the
way, they do not move, and the rest of the range goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from hmmnet.errors import Unreachable
from hmmnet.pages import DEVICE_ZONE_MIN, ZONE_SHIFT, Words, distinct, largest, word_of

from .interfaces import DeviceLink, Migration
from .iommu import Domain
from .migrate import MIGRATE, SHIFT, VALID, Copy, Grant, MigrateVma, copy_in, listed

Across = Callable[[DeviceLink, DeviceLink, int, Words, Words, Words], Awaitable[bool]]
"""DMA from the private memory of one device to another: (source, target, the source's context, pages, frames, target frames).

Whether it landed; False when the source could not give the pages, or no link that works leads between the two. Raises what the target's
`copy_in` raises. All lists may be large."""
Rows = npt.NDArray[np.intp]
_ZONE = word_of(ZONE_SHIFT)
_NONE = np.zeros(0, np.uint64)


def alloc_and_copy(links: Mapping[int, DeviceLink], context_of: Callable[[int, int], int], across: Across) -> Copy:
    """How a driver copies to its device, from host memory and from peers. `links` are the living devices by zone.

    Pages that are there already stay, as do those of a device that has gone.
    """

    async def copy(work: MigrateVma, domains: Sequence[Domain], start: int, grant: Grant) -> None:
        assert work.link is not None, "a migration to a device"
        froms, arrived = [], []
        for part in work.parts:
            frames = part.source >> SHIFT
            came = np.zeros(len(frames), np.bool_)
            if largest(frames) < DEVICE_ZONE_MIN << ZONE_SHIFT:  # all from host memory, as mostly
                froms.append(frames)
                arrived.append(came)
                continue
            targets = grant.for_part(part, start)
            going = (part.source & (MIGRATE | VALID) == MIGRATE | VALID) & (targets != 0)
            zones = frames >> _ZONE
            for zone in distinct(zones[going & (zones >= word_of(DEVICE_ZONE_MIN))]).tolist():
                rows = (going & (zones == word_of(zone))).nonzero()[0]
                for domain in domains:
                    domain.suspend(listed(part, part.pages[rows]))
                came[rows] = await bring(work, links.get(zone), part, rows, targets[rows])
                frames[rows[~came[rows]]] = 0
            froms.append(frames)
            arrived.append(came)
        await copy_in(work, domains, start, grant, froms, arrived)

    async def bring(work: MigrateVma, other: DeviceLink | None, part: Migration, rows: Rows, targets: Words) -> bool:
        """The data of `rows` to their targets; whether they came."""
        link = work.link
        if other is None or link is None or other is link:
            return False
        if work.points.armed:
            await work.at("migrate.before_copy")
        frames, to = listed(part, part.source[rows] >> SHIFT), listed(part, targets)
        if other.kind == "coherent":
            with suppress(Unreachable):
                await link.copy_in(frames, to, _NONE)
                return True
            return False
        return await across(other, link, context_of(work.space.number, other.zone), listed(part, part.pages[rows]), frames, to)

    return copy
