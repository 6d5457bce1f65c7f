"""Frames, and where their struct pages stand: found out once, for all who look at them in one step.

A list of frames says nothing of whether they are neighbours, or of one zone, and finding out takes passes over it that cost as much as the
work itself. A migration asks for five fields of the same frames in one step; it finds out once and hands this around. Whoever frees frames
in between, or takes zones away, makes what was found void: it lives for one step, without a wait in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hmmnet.pages import Words, bits_in_any

from .zones import Index, Zone

_ROWS = np.arange(1 << 16)
_ROWS.flags.writeable = False  # views of it are handed around


def every_row(count: int) -> npt.NDArray[np.intp]:
    """The numbers of `count` rows, to read."""
    return _ROWS[:count] if count <= len(_ROWS) else np.arange(count)


def rows_in(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """np.flatnonzero, in a tenth of the time for all or none, as it mostly is. To read."""
    count = np.count_nonzero(flags)
    if count == 0 or count == len(flags):
        return every_row(int(count))
    return flags.nonzero()[0]


Place = tuple[Zone, slice | npt.NDArray[np.intp], Index]
"""A zone, which of the frames lie there, and where they stand in its arrays."""


class Located:
    """`frames`, which stand at `places`."""

    __slots__ = ("frames", "places")

    def __init__(self, frames: Words, places: list[Place]) -> None:
        self.frames = frames
        self.places = places

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def is_one_run(self) -> bool:
        """Whether one slice of one zone covers them."""
        return len(self.places) == 1 and isinstance(self.places[0][2], slice)

    def groups(self) -> Iterator[Place]:
        """The places; each frame there has a state of its own then (`Zone.unfold`)."""
        for place in self.places:
            if place[0].folded_count:
                place[0].unfold(place[2])
            yield place

    def chosen(self, rows: npt.NDArray[np.intp]) -> Located:
        """Those of them at `rows` (ascending); all are of one zone."""
        if len(rows) == len(self.frames):
            return self
        assert len(self.places) == 1, "frames of several zones are located anew"
        zone, every, where = self.places[0]
        return Located(self.frames[rows], [(zone, every, rows + where.start if isinstance(where, slice) else where[rows])])

    def fields(self, *names: str) -> list[npt.NDArray[Any]]:
        """Struct page fields, each a copy."""
        out: list[npt.NDArray[Any]] = []
        for zone, rows, where in self.places:
            values = [zone.values(name, where) for name in names]
            if isinstance(rows, slice):
                return values
            out = out or [np.zeros(len(self.frames), dtype=some.dtype) for some in values]
            for all_of_it, some in zip(out, values, strict=True):
                all_of_it[rows] = some
        return out or [np.zeros(0, np.int64) for _ in names]

    def seen(self, name: str) -> npt.NDArray[Any]:
        """One field, for who only looks at it now: not copied where it stands together."""
        if len(self.places) == 1:
            zone, _, where = self.places[0]
            return zone.seen(name, where)
        return self.fields(name)[0]

    def most(self, name: str) -> int:
        """The largest value that a field has; 0 for none."""
        return max((int(zone.seen(name, where).max()) for zone, _, where in self.places), default=0)

    def bits_in_any(self, name: str) -> int:
        """The bits that a field has in any of them."""
        found = 0
        for zone, _, where in self.places:
            found |= bits_in_any(zone.seen(name, where))
        return found
