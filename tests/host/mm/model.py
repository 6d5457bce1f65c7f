"""A reference model of memory that processes and devices share: dictionaries and the plainest words for each rule.

It knows what every page holds for every process, who shares it, and in which memory it is; not how entries say so. A page that it does not
know holds zeros.

    store    a page that others share is copied first, and one that was shared by fork and that somebody refers to now; one on a
             private device comes home, for all who share it
    load     one on a private device comes home
    fork     everything is shared
    migrate  whoever shares the page, it moves for all; what was never touched becomes a page of zeros over there

And it knows which pages the mirror of a device may hold at most. A page comes in when the device faults on it, migrates it, or takes it
exclusively (`see`), and is out for every mirror of the process (`forget`) as soon as an entry leads elsewhere or gives less: the page
moves, for all who share it; a store copies it; it is unmapped, or its rights change; fork makes it read-only; exclusive access begins or
ends. What a device may see of the pages that it does not hold yet is table A3 of the semantics (`hides`, `device_refusal`).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

PAGE = 4096
SEGV, BUS, FINE = "SEGV", "BUS", "fine"
Place = tuple[int, int]
"""A process and a page."""


@dataclass(eq=False)
class Cell:
    """A page of memory: its bytes, the zone it is in, and where it is mapped. It stays where it is while it is `held` (somebody has a
    reference), or a device has it `exclusive`.
    """

    data: bytearray
    zone: int = 0
    places: set[Place] = field(default_factory=set)
    held: int = 0
    exclusive: bool = False
    pinned: int = 0
    """How many of those who hold it have pinned it: fork copies it for the child."""
    sole: bool = True
    """It is one process's own since it was there, or a store found it so (PageAnonExclusive): stores need not ask who refers to it."""


@dataclass
class Model:
    """`private` are the zones that the CPU cannot reach. `rights` are those of mapped pages."""

    private: frozenset[int]
    rights: dict[Place, str] = field(default_factory=dict)
    cells: dict[Place, Cell] = field(default_factory=dict)
    mirrors: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    """The pages that the mirror of a process by the device of a zone may hold at most."""

    # --- what mirrors may hold ----------------------------------------------------------------------------------------------------

    def see(self, place: Place, zone: int) -> None:
        """The device of `zone` has just been given the page."""
        self.mirrors[place[0], zone].add(place[1])

    def forget(self, place: Place) -> None:
        """No mirror of the process holds the page any more."""
        for (process, _), pages in self.mirrors.items():
            if process == place[0]:
                pages.discard(place[1])

    def forget_cell(self, cell: Cell) -> None:
        """No mirror of any process that has the page holds it any more."""
        for place in cell.places:
            self.forget(place)

    def hides(self, place: Place, zone: int) -> bool:
        """Whether a page that is there shows as nothing to the device of `zone`: another has it, privately or exclusively."""
        cell = self.cells.get(place)
        return cell is not None and (cell.exclusive or (cell.zone in self.private and cell.zone != zone))

    def device_refusal(self, place: Place, zone: int, *, write: bool, has: bool) -> int:
        """The errno of a device's fault there; `has`: the page is in the device's own private memory, where a write is not upgraded."""
        if "r" not in self.rights.get(place, ""):
            return errno.EFAULT
        if write and not self.writable(place) and not has:
            return errno.EPERM
        return 0 if has or self.outcome(place, write=write) == FINE else errno.EFAULT

    # --- accesses -----------------------------------------------------------------------------------------------------------------

    def readable(self, place: Place) -> bool:
        """Whether the CPU may load."""
        return self.rights.get(place, "none") != "none"

    def writable(self, place: Place) -> bool:
        """Whether it may store."""
        return "w" in self.rights.get(place, "none")

    def data(self, place: Place) -> bytes:
        """What is there."""
        cell = self.cells.get(place)
        return bytes(PAGE) if cell is None else bytes(cell.data)

    def outcome(self, place: Place, *, write: bool) -> str:
        """How an access of the CPU ends."""
        return FINE if (self.writable(place) if write else self.readable(place)) else SEGV

    def look(self, place: Place) -> bytes:
        """What a load sees, whatever is mapped there."""
        return self.load(place)

    def touch(self, place: Place) -> bytearray:
        """What a store writes to, whatever is mapped there."""
        return self.own(place).data

    def is_alone(self, place: Place) -> bool:
        """Whether a store there is seen by this process only, and where it is, so that an entry may allow it."""
        cell = self.cells.get(place)
        return cell is None or len(cell.places) == 1

    def is_shared(self, place: Place) -> bool:
        """Whether it is a page of memory that is mapped shared."""
        return False

    def put(self, place: Place, cell: Cell) -> Cell:
        """Map `cell`."""
        self.drop(place)
        self.cells[place] = cell
        cell.places.add(place)
        return cell

    def drop(self, place: Place) -> None:
        """Know nothing of the page."""
        cell = self.cells.pop(place, None)
        if cell is not None:
            cell.places.discard(place)

    def zap(self, place: Place) -> None:
        """The page is gone."""
        self.forget(place)
        self.drop(place)

    def load(self, place: Place) -> bytes:
        """CPU load."""
        cell = self.cells.get(place)
        if cell is not None and cell.zone in self.private:
            self.move(cell, 0)
        if cell is not None and cell.exclusive:
            self.forget(place)
            cell.exclusive = False
        return self.data(place)

    def own(self, place: Place) -> Cell:
        """What a store needs: a page that nobody else has, and that the CPU reaches."""
        self.load(place)
        cell = self.cells.get(place)
        if cell is None:
            return self.put(place, Cell(bytearray(PAGE)))
        if len(cell.places) > 1 or (cell.held and not cell.sole):
            self.forget(place)
            return self.put(place, Cell(bytearray(cell.data)))
        cell.sole = True
        return cell

    def move(self, cell: Cell, zone: int) -> None:
        """The page changes its memory."""
        self.forget_cell(cell)
        cell.zone = zone

    def to_device(self, place: Place, zone: int) -> None:
        """A page that may go, goes."""
        cell = self.cells.get(place)
        if cell is None:
            self.put(place, Cell(bytearray(PAGE), zone))
        elif cell.zone == 0 and not cell.held and not cell.exclusive:
            self.move(cell, zone)

    def to_system(self, place: Place, zone: int) -> None:
        """A page of that device comes home."""
        cell = self.cells.get(place)
        if cell is not None and cell.zone == zone and not cell.held and not cell.exclusive:
            self.move(cell, 0)

    def evict(self, zone: int) -> None:
        """Pages of that device come home by their frames, whoever has them, exclusively or not."""
        for place, cell in self.cells.items():
            if cell.zone == zone:
                cell.exclusive = False
                self.to_system(place, zone)

    def fork(self, parent: int, child: int) -> None:
        """The child has what the parent has."""
        for (pid, page), rights in list(self.rights.items()):
            if pid == parent:
                self.rights[child, page] = rights
        for (pid, page), cell in list(self.cells.items()):
            if pid == parent:
                self.forget((pid, page))
                cell.exclusive = cell.sole = False
                self.put((child, page), cell)

    def unmap(self, place: Place) -> None:
        """munmap."""
        self.zap(place)
        self.rights.pop(place, None)

    def exit(self, process: int) -> None:
        """Everything goes."""
        for place in [place for place in self.rights if place[0] == process]:
            self.unmap(place)
        for pages in [pages for (pid, _), pages in self.mirrors.items() if pid == process]:
            pages.clear()

    def protect(self, place: Place, rights: str) -> None:
        """mprotect."""
        if self.rights[place] != rights:
            self.forget(place)
        self.rights[place] = rights

    def refusal(self, process: int, first: int, count: int) -> int:
        """The errno of a call that wants all of a range to be mapped."""
        return 0 if all((process, page) in self.rights for page in range(first, first + count)) else errno.ENOMEM
