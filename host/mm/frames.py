"""Physical memory: all zones as one, and what happens to frames of several at once.

Reference counts are the kernel's: one for each mapping, one for each holder (a pin, a migration), and for a frame of a device 0 when it
is idle. A frame whose count falls to zero goes back: to the allocator, or, by `on_free` (folio_free), to the driver.

`mapping` and `index` say who may map a frame, for the reverse map: the anon_vma of the VMA that it was made in, and the page where it was
first mapped (`rmap.py`).
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hmmnet.arena import Arena
from hmmnet.errors import HmmnetError, InjectedError, PeerLost
from hmmnet.faults.injector import Points
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    HUGE_PAGES,
    HUGE_SHIFT,
    ZONE_SHIFT,
    ZONES_MAX,
    Words,
    all_of,
    bits_in_any,
    distinct,
    is_one_run,
    runs_of,
    unlike,
    word_of,
)

from .breaking import Breaking
from .contents import Contents
from .located import Located, Place
from .memcg import CHARGE_MASK, MemoryCgroup, MemoryCgroups
from .relief import Relief
from .swap import Swap
from .zones import ANON, COMPOUND, DEVICE_EXTRA_REFERENCES, CpuZone, HostZone, Index, Zone

if TYPE_CHECKING:
    from .filemap import File
    from .gather import Gather
    from .mm import Mm

_STEPS = np.arange(HUGE_PAGES, dtype=np.uint64)


def frames_from(heads: Words) -> Words:
    """All frames of the folios with these heads."""
    return (heads[:, np.newaxis] + _STEPS).reshape(-1)


def positions(where: Index) -> npt.NDArray[np.intp]:
    """Where heads stand, as a list."""
    return np.arange(where.start, where.stop) if isinstance(where, slice) else where


class PhysicalMemory(Contents):
    """All zones of the machine, and the families of processes that the reverse map knows.

    An anon_vma is a number here; which VMAs belong to it stands in the VMAs (`Vma.anon`, `Vma.chain`), all in processes of one family.
    """

    def __init__(self, idle_references: int = 0, gather: Gather | None = None) -> None:
        super().__init__()
        self.idle_references = idle_references
        """References of an idle page of a device."""
        self.gather = gather
        """Where frames wait that became free while a change was not yet told to mirrors; None where mirrors are told first."""
        self.zones: dict[int, Zone] = {}
        self.nodes: list[HostZone] = []
        self.owed: Callable[[], Awaitable[object]] | None = None
        """Time that an access in place takes on its link, to be waited for by whoever made it."""
        self.families: dict[int, list[Mm]] = {}
        self.anon_families: dict[int, int] = {}
        """The family of each anon_vma."""
        self.files: dict[int, File] = {}
        """Files that have frames, by number; frames of their page caches carry it as `mapping`."""
        self.points = Points()
        """Where faults of this memory, and of whatever works on it, are injected."""
        self.cgroups = MemoryCgroups()
        self.relief = Relief(self)
        """Who is killed when there is no frame left."""
        self.emptied: list[Callable[[], None]] = []
        """What is to be looked at when nobody has frames in hand: memory of dead devices of which a page was freed."""
        self.poisoned = 0
        self.breaking = Breaking()
        """Frames that have broken; they stay allocated."""
        self.crashed = ""
        """Why nothing of this can be had any more, once the host has crashed whose memory it is (`there`)."""
        self._numbers = 0
        self._swap: Swap | None = None

    def there(self) -> None:
        """Raises PeerLost when its host has crashed."""
        if self.crashed:
            raise PeerLost(self.crashed)

    @property
    def swap(self) -> Swap:
        """Where pages go that are paged out: as much as the host has memory."""
        if self._swap is None:
            self._swap = Swap(self, sum(zone.count for zone in self.nodes))
        return self._swap

    @property
    def swapped_out(self) -> int:
        """Slots of swap that hold a page."""
        return 0 if self._swap is None else self._swap.used

    @property
    def total_pages(self) -> int:
        """totalram_pages and total_swap_pages, which are as many."""
        return 2 * sum(zone.count for zone in self.nodes)

    def add_node(self, owner: str, pages: int) -> HostZone:
        """A host memory node."""
        zone = HostZone(len(self.nodes), owner, pages)
        assert zone.number < DEVICE_ZONE_MIN, "zone numbers of host memory are used up"
        zone.gather = self.gather
        self.nodes.append(zone)
        self.zones[zone.number] = self.in_place[zone.number] = zone
        return zone

    def add_device(self, number: int, kind: str, owner: str, pages: int, arena: Arena | None = None) -> Zone:
        """The memory of a device appears (memremap_pages). `arena` are the bytes of coherent memory."""
        assert DEVICE_ZONE_MIN <= number < ZONES_MAX, f"zone {number} cannot be a device's"
        assert number not in self.zones, f"zone {number} exists"
        if arena is None:
            zone = Zone(number, kind, owner, pages)
        else:
            zone = self.in_place[number] = CpuZone(number, kind, owner, arena)
        zone.idle_references = self.idle_references
        zone.extra_references = DEVICE_EXTRA_REFERENCES - self.idle_references
        self.zones[number] = zone
        return zone

    @property
    def is_used_up(self) -> bool:
        """Whether no host memory has a frame left."""
        return self.lacks(1)

    def lacks(self, pages: int) -> bool:
        """Whether all host memory together has fewer frames left than `pages`."""
        return self.free_pages < pages

    @property
    def free_pages(self) -> int:
        """How many frames all host memory together has left."""
        return sum(zone.allocator.free_count for zone in self.nodes)

    def peers_of(self, number: int) -> tuple[int, ...]:
        """The zones of other living devices whose page map has the owner of zone `number`'s."""
        own = self.zones.get(number)
        if own is None:
            return ()
        found = self.zones.values()
        return tuple(zone.number for zone in found if zone.pgmap_owner == own.pgmap_owner and zone is not own and not zone.lost)

    def remove_device(self, number: int) -> None:
        """The memory of a device goes away; no frame of it may have a reference (see `Zone.refcount`), but for broken ones."""
        zone = self.zones[number]
        assert not zone.referenced(zone.used.stop).any(), f"zone {number} still has referenced frames"
        del self.zones[number]
        self.in_place.pop(number, None)

    def new_anon_vma(self, family: int) -> int:
        """A new anon_vma for a VMA of a process of `family`."""
        self._numbers += 1
        self.anon_families[self._numbers] = family
        return self._numbers

    def new_file_number(self) -> int:
        """A number for a file, which no anon_vma has."""
        self._numbers += 1
        return self._numbers

    def forget_family(self, family: int) -> None:
        """The last process of a family is gone."""
        del self.families[family]
        for number in [number for number, owner in self.anon_families.items() if owner == family]:
            del self.anon_families[number]

    def bury_emptied(self) -> None:
        """Who unmapped something has nothing in hand any more: memory of dead devices goes that nobody maps now."""
        waiting, self.emptied = self.emptied, []
        for bury in waiting:
            bury()

    def zone_lost(self, number: int, cause: str) -> None:
        """The device died with its memory: from now on an access to a page whose only copy was there is a SIGBUS that names `cause`.

        Coherent memory is private from then on, so that what leads there is no longer present and an access finds out.
        """
        zone = self.zones[number]
        zone.lost = cause
        zone.kind = "private"
        zone.on_free = zone.on_free_one = zone.on_free_folios = None

    def zone(self, frame: int) -> Zone:
        """The zone of one frame."""
        return self.zones[frame >> ZONE_SHIFT]

    def groups(self, frames: Words) -> Iterator[Place]:
        """`frames` by zone: (zone, which of them, where they stand in the zone's arrays). Each has a state of its own then."""
        for zone, rows, where in self.where(frames):
            if zone.folded_count:
                zone.unfold(where)
            yield zone, rows, where

    def where(self, frames: Words) -> list[Place]:
        """`groups` for who does not look at the arrays frame by frame: folded folios stay as they are."""
        if len(frames) == 0:
            return []
        zone = self.zones[int(frames[0]) >> ZONE_SHIFT]
        if is_one_run(frames):
            first = int(frames[0]) - zone.base
            return [(zone, slice(None), slice(first, first + len(frames)))]
        if not unlike(frames) >> ZONE_SHIFT:  # all of one zone
            return [(zone, slice(None), (frames - word_of(zone.base)).view(np.intp))]
        return list(self._by_zone(frames))

    def _by_zone(self, frames: Words) -> Iterator[Place]:
        """`where` for frames of several zones."""
        numbers = frames >> word_of(ZONE_SHIFT)
        for number in distinct(numbers).tolist():
            rows = (numbers == word_of(number)).nonzero()[0]
            zone = self.zones[number]
            yield zone, rows, zone.index_of(frames[rows])

    def located(self, frames: Words) -> Located:
        """Where `frames` stand, for who looks at several things there."""
        return Located(frames, self.where(frames))

    def field(self, frames: Words, name: str) -> npt.NDArray[Any]:
        """One struct page field of each of `frames`, a copy."""
        return self.located(frames).fields(name)[0]

    def fields(self, frames: Words, *names: str) -> list[npt.NDArray[Any]]:
        """`field` for several at once: where the frames are is found out only once."""
        return self.located(frames).fields(*names)

    def most(self, frames: Words, name: str) -> int:
        """The largest value that a struct page field has among `frames`; 0 for none."""
        return self.located(frames).most(name)

    def bits_in_any(self, frames: Words, name: str) -> int:
        """The bits that a struct page field has in any of `frames`."""
        return self.located(frames).bits_in_any(name)

    # --- allocation -------------------------------------------------------------------------------------------------------------

    def node_named(self, owner: str) -> int:
        """The number of the host memory `owner`. Raises HmmnetError when there is none."""
        for zone in self.nodes:
            if zone.owner == owner:
                return zone.number
        raise HmmnetError(f'no host memory is called "{owner}"; there are {", ".join(zone.owner for zone in self.nodes)}')

    def _from(self, node: int) -> Sequence[HostZone]:
        """The nodes in the order in which they are asked for frames: `node` first, as the preferred node of a memory policy."""
        return [*self.nodes[node:], *self.nodes[:node]] if node else self.nodes

    def allocate_charged(self, group: MemoryCgroup | None, count: int, node: int = 0, keep: slice | None = None) -> Words | None:
        """`allocate` for a process of `group`. None when the host is out of memory, or the group at its limit. Raises InjectedError."""
        if self.points.armed:
            self.refuse("host.alloc.frame", count, group)
        if group is None:
            return self.allocate(count, node, keep)
        if not group.try_charge(count):
            return None
        frames = self.allocate(count, node, keep)
        if frames is None:
            group.uncharge(count)
            return None
        for zone, _, where in self.groups(frames):
            zone.flags[where] = group.charge_bits
        return frames

    def lacking(self, point: str, group: MemoryCgroup | None) -> str:
        """Where an allocation for `group` is made to fail: `point`, or its charge; empty if it is not."""
        if group is not None and self.points.fails("memcg.charge"):
            group.refused += 1
            return "memcg.charge"
        return point if self.points.fails(point) else ""

    def refuse_armed(self, point: str, pages: int, group: MemoryCgroup | None) -> None:
        """`refuse` where anything is armed, as mostly nothing is."""
        if self.points.armed:
            self.refuse(point, pages, group)

    def refuse(self, point: str, pages: int, group: MemoryCgroup | None) -> None:
        """Raises InjectedError where an allocation of `pages` for `group` is made to fail at `point`, or its charge."""
        lacking = self.lacking(point, group)
        if lacking:
            raise InjectedError(errno.ENOMEM, "page fault", f"{pages} pages are wanted; {self.points.why(lacking)}")

    def allocate(self, count: int, node: int = 0, keep: slice | None = None) -> Words | None:
        """`count` zeroed host frames with one reference each, in as few runs as can be, from `node` or where there is room.

        Positions `keep` need not be zeroed: the caller overwrites them. None when the host is out of memory.
        """
        for zone in self._from(node):
            frames = zone.allocate(count, keep)
            if frames is not None:
                return frames
        if count > sum(zone.allocator.free_count for zone in self.nodes):
            return self.allocate(count, node, keep) if self._reclaimed() else None
        parts = []
        for zone in self._from(node):
            part = zone.allocate(min(count, zone.allocator.free_count))
            assert part is not None
            parts.append(part)
            count -= len(part)
        return np.concatenate(parts)

    def _reclaimed(self) -> bool:
        """Whether memory has become free that is only in the swap cache."""
        return self._swap is not None and self._swap.shrink() > 0

    def allocate_huge(self, node: int = 0, group: MemoryCgroup | None = None) -> Words | None:
        """`allocate_folio`, frame by frame."""
        head = self.allocate_folio(node, group)
        if head is None:
            return None
        frames = np.arange(head, head + HUGE_PAGES, dtype=np.uint64)
        self.zone(head).at(frames)
        return frames

    def allocate_folio(self, node: int = 0, group: MemoryCgroup | None = None) -> int | None:
        """The head of a folded folio of 512 zeroed host frames with one reference, from `node` or where there is one; None when nowhere.

        `group` is charged; None, too, when it is at its limit.
        """
        if self.points.armed and self.lacking("host.alloc.huge", group):
            return None
        if group is not None and not group.try_charge(HUGE_PAGES):
            return None
        for zone in self._from(node):
            head = zone.allocate_folio()
            if head is not None:
                if group is not None:
                    zone.flags[head - zone.base] = group.charge_bits
                return head
        if group is not None:
            group.uncharge(HUGE_PAGES)
        return None

    def allocate_folios(self, count: int, node: int = 0) -> Words:
        """The heads of up to `count` folded folios with one reference each, from `node` or where there is room, whatever they hold."""
        found = [np.zeros(0, np.uint64)]
        for zone in self._from(node) if not (self.points.armed and self.lacking("host.alloc.huge", None)) else ():
            found.append(zone.allocate_folios(count))
            count -= len(found[-1])
        return np.concatenate(found)

    def allocate_bare(self, node: int = 0) -> int | None:
        """One host frame with one reference, whatever it holds: the caller overwrites it. None when the host is out of memory."""
        for zone in self._from(node):
            frame = zone.allocate_bare()
            if frame is not None:
                return frame
        return self.allocate_bare(node) if self._reclaimed() else None

    def allocate_one(self, mapping: int, index: int, node: int = 0, group: MemoryCgroup | None = None) -> int | None:
        """A zeroed frame that becomes an anonymous page of anon_vma `mapping`, mapped once: `allocate_charged` and `map_new` for one.

        None as there. Raises InjectedError.
        """
        if self.points.armed:
            self.refuse("host.alloc.frame", 1, group)
        if group is not None and not group.try_charge(1):
            return None
        for zone in self._from(node):
            got = zone.allocator.allocate(1)
            if got is not None:
                frame = int(got.frames[0])
                at = frame - zone.base
                if not got.zeroed:
                    zone.zero_one(at)
                zone.refcount[at] = zone.mapcount[at] = 1
                zone.flags[at] = ANON if group is None else ANON | group.charge_bits
                zone.mapping[at] = mapping
                zone.index[at] = index
                return frame
        if group is not None:
            group.uncharge(1)
        return self.allocate_one(mapping, index, node, group) if self._reclaimed() else None

    @property
    def has_folded(self) -> bool:
        """Whether there are folded folios."""
        return any(zone.folded_count for zone in self.zones.values())

    def put(self, frames: Words) -> None:
        """Drop one reference of each of `frames` (distinct); those without any left are freed."""
        for zone, rows, where in self.groups(frames):
            zone.refcount[where] -= 1
            self.free_unused(zone, frames[rows], where)

    def free_unused(self, zone: Zone, frames: Words, where: Index) -> None:
        """Free those of `frames`, at `where` in `zone`, that have no reference."""
        left = zone.refcount[where]
        if not bits_in_any(left):
            self._free(zone, frames, where)
        elif not left.all():
            frames = frames[left == 0]
            self._free(zone, frames, zone.at(frames))

    def put_one(self, frame: int) -> None:
        """`put` for one frame."""
        zone = self._put_one(frame)
        if zone is None:
            return
        if zone.on_free_one is not None:
            zone.on_free_one(frame)
        elif zone.on_free is not None:
            zone.on_free(np.array([frame], np.uint64))

    def put_few(self, frames: Sequence[int]) -> None:
        """`put` without arrays."""
        freed: dict[Callable[[Words], None], list[int]] = {}
        for frame in frames:
            zone = self._put_one(frame)
            if zone is not None and zone.on_free is not None:
                freed.setdefault(zone.on_free, []).append(frame)
        for on_free, some in freed.items():
            on_free(np.array(some, np.uint64))

    def _put_one(self, frame: int) -> Zone | None:
        """Drop one reference of `frame`; the device's zone, whose driver has to be told, if it was the last there."""
        zone = self.zones[frame >> ZONE_SHIFT]
        at = frame - zone.base
        cells = zone.cells
        left = cells.refcount[at] - 1
        cells.refcount[at] = left
        if left:
            return None
        if cells.flags[at] & CHARGE_MASK:
            self.cgroups.uncharge(zone.flags[at])
        cells.flags[at] = 0
        cells.mapping[at] = 0
        if isinstance(zone, HostZone):
            zone.release_one(frame)
            return None
        return zone

    def _free(self, zone: Zone, frames: Words, where: Index) -> None:
        self.cgroups.uncharge(zone.flags[where])
        zone.flags[where] = 0
        zone.mapping[where] = 0
        if isinstance(zone, HostZone) and isinstance(where, slice):
            zone.release_run(zone.base + where.start, zone.base + where.stop)
        elif isinstance(zone, HostZone):
            zone.release(frames)
        elif zone.on_free is not None:
            zone.on_free(frames)

    def uncharge(self, frames: Words) -> None:
        """`frames` are no group's any more, and stay allocated."""
        for zone, _, where in self.groups(frames):
            self.cgroups.uncharge(zone.flags[where])
            zone.flags[where] &= ~np.uint32(CHARGE_MASK)

    # --- mappings ---------------------------------------------------------------------------------------------------------------

    def map_new(self, frames: Words, mapping: int, index: Words) -> None:
        """Frames that were just allocated become anonymous pages of anon_vma `mapping`, mapped once each."""
        for zone, rows, where in self.groups(frames):
            zone.mapcount[where] = 1
            zone.flags[where] |= ANON
            zone.mapping[where] = mapping
            zone.index[where] = index[rows]

    def move_anon(self, frames: Words, mapping: int) -> None:
        """folio_move_anon_rmap: `frames` are their one mapper's alone from now on."""
        for zone, _, where in self.groups(frames):
            zone.mapping[where] = mapping

    def unmap(self, frames: Words) -> None:
        """One mapping of each of `frames` (distinct) goes, with its reference."""
        for zone, rows, where in self.groups(frames):
            zone.mapcount[where] -= 1
            zone.refcount[where] -= 1
            self.free_unused(zone, frames[rows], where)

    def unmap_few(self, frames: list[int]) -> None:
        """`unmap` without arrays, of frames that have states of their own."""
        for frame in frames:
            zone = self.zones[frame >> ZONE_SHIFT]
            zone.cells.mapcount[frame - zone.base] -= 1
        if frames:
            self.put_few(frames)

    # --- folded folios, by their heads --------------------------------------------------------------------------------------------

    def unfold(self, frame: int) -> None:
        """The frames of the folio that `frame` belongs to have states of their own from now on."""
        zone = self.zones[frame >> ZONE_SHIFT]
        if zone.folded_count:
            at = frame - zone.base
            zone.unfold(slice(at, at + 1))

    def folded(self, heads: Words) -> npt.NDArray[np.bool_]:
        """Which of `heads` are those of folded folios."""
        out = np.zeros(len(heads), np.bool_)
        for zone, rows, where in self.where(heads):
            if zone.folded_count:
                out[rows] = zone.folded[positions(where) >> HUGE_SHIFT]
        return out

    def map_new_folio(self, head: int, mapping: int, index: int) -> None:
        """`map_new` for a folded folio that was just allocated: it is a large one."""
        zone = self.zones[head >> ZONE_SHIFT]
        at = head - zone.base
        zone.mapcount[at] = 1
        zone.flags[at] |= np.uint32(ANON | COMPOUND)
        zone.mapping[at] = mapping
        zone.index[at] = index

    def share_folios(self, heads: Words) -> None:
        """One more mapping of each of the folded folios, with its reference."""
        for zone, _, at in self.where(heads):
            zone.refcount[at] += 1
            zone.mapcount[at] += 1

    def unmap_folios(self, heads: Words) -> None:
        """`unmap` for huge pages: one mapping of each goes; those that are not folded lose one of each frame."""
        folded = self.folded(heads)
        if not all_of(folded):
            self.unmap(frames_from(heads[~folded]))
            heads = heads[folded]
        for zone, _, at in self.where(heads):
            zone.mapcount[at] -= 1
        self.put_folios(heads)

    def put_folios(self, heads: Words) -> None:
        """`put` for folded folios."""
        for zone, _, where in self.where(heads):
            at = positions(where)
            zone.refcount[at] -= 1
            unused = at[zone.refcount[at] == 0]
            if len(unused):
                self._free_folios(zone, unused)

    def _free_folios(self, zone: Zone, at: npt.NDArray[np.intp]) -> None:
        self.cgroups.uncharge(zone.flags[at], HUGE_PAGES)
        zone.flags[at] = 0
        zone.mapping[at] = 0
        zone.set_unused(at >> HUGE_SHIFT)
        heads = at.astype(np.uint64) + word_of(zone.base)
        if isinstance(zone, HostZone):
            for start, end in runs_of(np.sort(heads >> word_of(HUGE_SHIFT))):
                zone.release_run(start << HUGE_SHIFT, end << HUGE_SHIFT)
        elif zone.on_free_folios is not None:
            zone.on_free_folios(heads)
        elif zone.on_free is not None:
            zone.on_free(frames_from(heads))
