"""A reference model of memory that processes and devices share: dictionaries and the plainest words for each rule.

It knows what every page holds for every process, who shares it, and in which memory it is; not how entries say so. A page that it does not
know holds zeros.

    store    a page that others share is copied first; one on a private device comes home, for all who share it
    load     one on a private device comes home
    fork     everything is shared
    migrate  whoever shares the page, it moves for all; what was never touched becomes a page of zeros over there
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

PAGE = 4096
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


@dataclass
class Model:
    """`private` are the zones that the CPU cannot reach. `rights` are those of mapped pages."""

    private: frozenset[int]
    rights: dict[Place, str] = field(default_factory=dict)
    cells: dict[Place, Cell] = field(default_factory=dict)

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

    def put(self, place: Place, cell: Cell) -> Cell:
        """Map `cell`."""
        self.drop(place)
        self.cells[place] = cell
        cell.places.add(place)
        return cell

    def drop(self, place: Place) -> None:
        """Unmap."""
        cell = self.cells.pop(place, None)
        if cell is not None:
            cell.places.discard(place)

    def load(self, place: Place) -> bytes:
        """CPU load."""
        cell = self.cells.get(place)
        if cell is not None and cell.zone in self.private:
            cell.zone = 0
        if cell is not None:
            cell.exclusive = False
        return self.data(place)

    def own(self, place: Place) -> Cell:
        """What a store needs: a page that nobody else has, and that the CPU reaches."""
        self.load(place)
        cell = self.cells.get(place)
        if cell is None:
            return self.put(place, Cell(bytearray(PAGE)))
        if len(cell.places) > 1:
            return self.put(place, Cell(bytearray(cell.data)))
        return cell

    def to_device(self, place: Place, zone: int) -> None:
        """A page that may go, goes."""
        cell = self.cells.get(place)
        if cell is None:
            self.put(place, Cell(bytearray(PAGE), zone))
        elif cell.zone == 0 and not cell.held and not cell.exclusive:
            cell.zone = zone

    def to_system(self, place: Place, zone: int) -> None:
        """A page of that device comes home."""
        cell = self.cells.get(place)
        if cell is not None and cell.zone == zone and not cell.held and not cell.exclusive:
            cell.zone = 0

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
                cell.exclusive = False
                self.put((child, page), cell)

    def unmap(self, place: Place) -> None:
        """munmap."""
        self.drop(place)
        self.rights.pop(place, None)

    def exit(self, process: int) -> None:
        """Everything goes."""
        for place in [place for place in self.rights if place[0] == process]:
            self.unmap(place)

    def refusal(self, process: int, first: int, count: int) -> int:
        """The errno of a call that wants all of a range to be mapped."""
        return 0 if all((process, page) in self.rights for page in range(first, first + count)) else errno.ENOMEM
