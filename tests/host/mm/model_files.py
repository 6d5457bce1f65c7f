"""A reference model of files, shared and private mappings, and who has copies: dictionaries, in the plainest words (see `model.py`).

file       a size in pages and what each page holds; one that was never written, or was cut or punched out, is a hole
mapping    a page of a process is anonymous, or leads to a page of a file, shared or private; it may be missing for a userfaultfd
copy       a store to anonymous or private memory makes a page of the process's own, or of all who have shared it since by fork
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .model import BUS, FINE, PAGE, SEGV, Cell, Model, Place


@dataclass(eq=False)
class ModelFile:
    """`pages` up to its end; `data` by page."""

    pages: int
    data: dict[int, bytearray] = field(default_factory=dict)

    def page(self, offset: int) -> bytearray:
        """What is there; a hole is filled."""
        return self.data.setdefault(offset, bytearray(PAGE))

    def cut(self, first: int, end: int) -> None:
        """Pages [first, end) are holes."""
        for offset in [offset for offset in self.data if first <= offset < end]:
            del self.data[offset]


@dataclass(frozen=True)
class Mapped:
    """Where a page of a process leads, if it is not anonymous."""

    file: ModelFile
    offset: int
    shared: bool


@dataclass
class FileModel(Model):
    """`model.Model`, with files. A place without an entry in `leads` is anonymous."""

    leads: dict[Place, Mapped] = field(default_factory=dict)
    missing: set[Place] = field(default_factory=set)
    """Registered with a userfaultfd that answers with SIGBUS."""
    locked: set[Place] = field(default_factory=set)

    def data(self, place: Place) -> bytes:
        """What is there."""
        lead = self.leads.get(place)
        if place in self.cells or lead is None:
            return super().data(place)
        return bytes(lead.file.data.get(lead.offset, bytes(PAGE)))

    def is_alone(self, place: Place) -> bool:
        """A shared mapping may always be written in place; a private one that has no copy yet, never."""
        lead = self.leads.get(place)
        return super().is_alone(place) if lead is None or (not lead.shared and place in self.cells) else lead.shared

    def is_shared(self, place: Place) -> bool:
        """Whether it is a page of memory that is mapped shared."""
        lead = self.leads.get(place)
        return lead is not None and lead.shared

    def to_device(self, place: Place, zone: int) -> None:
        """Pages of files stay; what is missing is not made over there."""
        if place in self.cells or (place not in self.leads and place not in self.missing):
            super().to_device(place, zone)

    def outcome(self, place: Place, *, write: bool) -> str:
        """How an access ends."""
        if not (self.writable(place) if write else self.readable(place)):
            return SEGV
        if place in self.cells:
            return FINE
        lead = self.leads.get(place)
        if lead is None:
            return BUS if place in self.missing else FINE
        if lead.offset >= lead.file.pages or (place in self.missing and lead.offset not in lead.file.data):
            return BUS
        return FINE

    def look(self, place: Place) -> bytes:
        """What a load sees; it fills holes and brings pages home."""
        lead = self.leads.get(place)
        if place not in self.cells and lead is not None:
            return bytes(lead.file.page(lead.offset))
        return self.load(place)

    def touch(self, place: Place) -> bytearray:
        """What a store writes to."""
        lead = self.leads.get(place)
        if lead is None:
            return self.own(place).data
        if lead.shared:
            return lead.file.page(lead.offset)
        if place not in self.cells:
            self.forget(place)
            self.put(place, Cell(bytearray(lead.file.page(lead.offset))))
        return self.own(place).data

    def unmap(self, place: Place) -> None:
        """munmap."""
        super().unmap(place)
        self.leads.pop(place, None)
        self.missing.discard(place)
        self.locked.discard(place)

    def fork(self, parent: int, child: int) -> None:
        """The child's memory is neither locked nor watched; pinned pages are copied for it."""
        super().fork(parent, child)
        for (process, page), lead in list(self.leads.items()):
            if process == parent:
                self.leads[child, page] = lead
        for (process, page), cell in list(self.cells.items()):
            if process == child and cell.pinned:
                self.put((child, page), Cell(bytearray(cell.data)))
                cell.sole = True

    def truncated(self, file: ModelFile, pages: int) -> None:
        """What lies behind is gone, with the copies that processes have made of it."""
        file.cut(pages, file.pages)
        file.pages = pages
        for place, lead in self.leads.items():
            if lead.file is file and lead.offset >= pages:
                self.zap(place)

    def punched(self, file: ModelFile, offset: int) -> None:
        """A page of the file is a hole; copies of it stay."""
        file.cut(offset, offset + 1)
        for place, lead in self.leads.items():
            if lead.file is file and lead.offset == offset and place not in self.cells:
                self.forget(place)
