"""Which pages of an interval its device may hold: what the driver's half on the host knows, so that not every event is a message.

A driver's invalidate callback runs on the CPU. That of xe begins with a look at what is bound on the GPU (`tile_present`), and where
nothing is, nothing goes over the bus; amdgpu's looks whether the range is mapped. With many devices in one address space most events are
of pages that most devices do not have, and each message saved is one that whoever changes the page table does not wait for.

Here a page is held from the answer that gave a translation of it (`Subscription.hold`) until an event that covers it has been
acknowledged. What a device gives up by itself it does not tell: it is told once more, and answers at once. So a page that is held may be
mapped nowhere, and a page that is not held is mapped nowhere.
"""

from __future__ import annotations

from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT

_ALL = (1 << HUGE_PAGES) - 1
_LAST = HUGE_PAGES - 1
BLOCKS_MAX = 1 << 16
"""Blocks that are remembered one by one (128 GiB of addresses). A device that asks for more is told of everything."""


class HeldPages:
    """A set of pages: a number of 512 bits for each aligned 2 MiB of which any is in it."""

    __slots__ = ("_blocks", "_everything")

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}
        self._everything = False

    def add(self, start: int, end: int) -> None:
        """[start, end), which is not empty, is held."""
        if self._everything:
            return
        blocks = self._blocks
        first, last, head, tail = _edges(start, end)
        if first == last:
            blocks[first] = blocks.get(first, 0) | head & tail
        else:
            blocks[first] = blocks.get(first, 0) | head
            blocks.update(dict.fromkeys(range(first + 1, last), _ALL))
            blocks[last] = blocks.get(last, 0) | tail
        if len(blocks) > BLOCKS_MAX:
            self._everything = True
            blocks.clear()

    def discard(self, start: int, end: int) -> None:
        """[start, end) is not held any more."""
        if not self._blocks:
            return
        first, last, head, tail = _edges(start, end)
        if first == last:
            self._keep(first, ~(head & tail))
            return
        self._keep(first, ~head)
        self._keep(last, ~tail)
        for block in self._between(first, last):
            self._blocks.pop(block, None)

    def _keep(self, block: int, mask: int) -> None:
        left = self._blocks.get(block, 0) & mask
        if left:
            self._blocks[block] = left
        else:
            self._blocks.pop(block, None)

    def _between(self, first: int, last: int) -> list[int]:
        """The blocks behind `first` and before `last`, or those among them of which anything is held, whichever are fewer."""
        if last - first <= len(self._blocks):
            return list(range(first + 1, last))
        return [block for block in self._blocks if first < block < last]

    def overlaps(self, start: int, end: int) -> bool:
        """Whether a page of [start, end) is held."""
        blocks = self._blocks
        if not blocks:
            return self._everything
        first, last, head, tail = _edges(start, end)
        if first == last:
            return blocks.get(first, 0) & head & tail != 0
        if blocks.get(first, 0) & head or blocks.get(last, 0) & tail:
            return True
        return any(block in blocks for block in self._between(first, last))


def _edges(start: int, end: int) -> tuple[int, int, int, int]:
    """The first and the last block of [start, end), and which pages of each lie in it, as far as the range has another end."""
    first, last = start >> HUGE_SHIFT, end - 1 >> HUGE_SHIFT
    return first, last, _ALL << (start & _LAST) & _ALL, _ALL >> (_LAST - (end - 1 & _LAST))
