"""Which slots of a ring are free. Pure.

A slot is taken when a chunk is about to be written into it and given back when the chunk is credited, or its stream is over: chunks are
credited in the order of their streams, not of the ring, so the slots need not come back in the order in which they went. The one that came
back last is taken first, because its memory is warmest.
"""

from __future__ import annotations


class Slots:
    """`count` slots, numbered from 0."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many can be taken."""
        return len(self._free)

    @property
    def idle(self) -> bool:
        """Whether none is taken."""
        return len(self._free) == self.count

    def take(self) -> int | None:
        """A free slot, or None."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """What was taken is free again."""
        assert 0 <= slot < self.count, f"slot {slot} is none of {self.count}"
        assert slot not in self._free, f"slot {slot} is free already"
        self._free.append(slot)
