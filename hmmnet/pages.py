"""Pages, frames and the two kinds of frame words that HMM hands around.

A *page* is a virtual page number: ``address >> PAGE_SHIFT``. A *frame* is a physical page number, unique in the machine: the *zone* (a host
memory node or the memory of one device) in the upper bits, the index inside the zone in the lower 36. Frames of different zones
never collide, so "whose memory is this" is a shift, as ``page_zonenum`` is in the kernel.

Frame words are uint64 so that a range is one array and one array is one message. `HMM_PFN_*` are those of ``hmm_range_fault``
(include/linux/hmm.h); `MIGRATE_PFN_*` those of ``migrate_vma`` (include/linux/migrate.h).
"""

from __future__ import annotations

from functools import lru_cache, reduce
from itertools import pairwise
from operator import and_, lt
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
HUGE_SHIFT = 9
HUGE_PAGES = 1 << HUGE_SHIFT
"""Base pages in a 2 MiB huge page."""

ADDRESS_BITS = 47
"""User addresses end below this, as on x86-64 with four levels."""
PAGES_MAX = 1 << (ADDRESS_BITS - PAGE_SHIFT)

ZONE_SHIFT = 36
"""256 TiB in a zone; 4096 zones. Frame numbers stay below 2**48, physical addresses below 2**60."""
ZONES_MAX = 4096
ZERO_FRAME = 0
"""Frame 0 of zone 0 is the shared zero page; it is never allocated."""
DEVICE_ZONE_MIN = 64
"""Zones below are host memory nodes, zones from here on belong to devices (one for each incarnation)."""

HMM_PFN_VALID = 1 << 63
HMM_PFN_WRITE = 1 << 62
HMM_PFN_ERROR = 1 << 61
HMM_PFN_DMA_MAPPED = 1 << 60
HMM_PFN_P2PDMA = 1 << 59
HMM_PFN_P2PDMA_BUS = 1 << 58
"""How a page is mapped for DMA (`hmmnet.host.dma_map`); hmm_range_fault keeps these bits of the words it is given."""
HMM_PFN_ORDER_SHIFT = 53
HMM_PFN_REQ_FAULT = HMM_PFN_VALID
HMM_PFN_REQ_WRITE = HMM_PFN_WRITE
HMM_PFN_FRAME_MASK = (1 << HMM_PFN_ORDER_SHIFT) - 1

MIGRATE_PFN_VALID = 1 << 0
MIGRATE_PFN_MIGRATE = 1 << 1
MIGRATE_PFN_WRITE = 1 << 3
MIGRATE_PFN_COMPOUND = 1 << 4
"""The word stands for a huge page: there are none for its other 511 pages."""
MIGRATE_PFN_SHIFT = 6

Number = TypeVar("Number", bound=np.integer[Any])
Words: TypeAlias = npt.NDArray[np.uint64]
"""An array of page numbers, frame numbers or frame words: uint64, one dimension."""
NUMBERS_MAX = 1 << 10
"""Numbers that `word_of` keeps: constants, and where memories begin."""


@lru_cache(NUMBERS_MAX)
def word_of(number: int) -> Words:
    """`number` beside arrays of words: without a dimension, and read-only.

    numpy takes an array and such a one in half the time that it takes an array and an np.uint64, and that has to be made first.
    """
    word = np.array(number, np.uint64)
    word.flags.writeable = False
    return word


def zone_of(frame: int) -> int:
    """The zone that `frame` belongs to."""
    return frame >> ZONE_SHIFT


def page_range(address: int, length_bytes: int) -> tuple[int, int]:
    """The pages ``[first, end)`` that ``[address, address + length_bytes)`` touches."""
    return address >> PAGE_SHIFT, (address + length_bytes + PAGE_SIZE - 1) >> PAGE_SHIFT


def to_wire(words: Words) -> bytes:
    """A page list as raw little-endian uint64: a twentieth of the time that a list of integers takes."""
    return words.astype("<u8", copy=False).tobytes()


def from_wire(raw: bytes | memoryview) -> Words:
    """The page list in `raw`, read-only and without a copy. Raises ValueError when the length is no multiple of eight."""
    return np.frombuffer(raw, dtype="<u8")


FEW = 8
"""Numbers up to which Python looks at them one by one: each numpy operation takes 1 to 3 us, however short the arrays are."""
FLAGS_COPIED = 1 << 12
"""Flags up to which a copy as bytes, which are searched in no time, takes less than the way through numpy's reductions."""


def any_of(flags: npt.NDArray[np.bool_]) -> bool:
    """Whether any of `flags` is set: ``flags.any()`` in a tenth of the time for a few."""
    return 1 in flags.tobytes() if len(flags) <= FLAGS_COPIED else bool(flags.any())


def all_of(flags: npt.NDArray[np.bool_]) -> bool:
    """Whether all of `flags` are set: ``flags.all()`` in a tenth of the time for a few."""
    return 0 not in flags.tobytes() if len(flags) <= FLAGS_COPIED else bool(flags.all())


def ascending(words: Words) -> Words:
    """`words` sorted; themselves if they are, as they mostly are: looking costs a fiftieth of sorting."""
    if len(words) <= FEW:
        if len(words) <= 1:
            return words
        numbers = words.tolist()
        return words if sorted(numbers) == numbers else np.sort(words)
    return np.sort(words) if np.count_nonzero(words[1:] < words[:-1]) else words


def distinct(values: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """`values` ascending, each once; themselves if they are, as they mostly are: np.unique takes 25 us for a handful."""
    if is_ascending(values):
        return values
    return np.unique(values) if len(values) > HANDFUL else np.array(sorted(set(values.tolist())), values.dtype)


def is_ascending(values: npt.NDArray[Number]) -> bool:
    """Whether each is larger than the one before."""
    if len(values) <= 1:
        return True
    if len(values) <= FEW:
        numbers = values.tolist()
        return all(map(lt, numbers, numbers[1:]))
    return int(np.count_nonzero(values[1:] > values[:-1])) == len(values) - 1


HANDFUL = 64
"""Numbers up to which Python is faster than numpy at keeping each once."""


def among(values: Words, others: Words) -> npt.NDArray[np.bool_]:
    """Which of `values` are among `others`, mostly a few: np.isin takes 20 us for a handful."""
    if len(others) > FEW:
        return np.isin(values, others)
    found = np.zeros(len(values), np.bool_)
    for other in others.tolist():
        found |= values == other
    return found


LARGE = 1 << 63
"""In a list of pages or frames: this one stands for itself and the 511 that follow, a huge page."""
_LARGE = word_of(LARGE)
_STEPS = np.arange(HUGE_PAGES, dtype=np.uint64)


def has_large(words: Words) -> bool:
    """Whether a list of pages or frames has large ones."""
    if len(words) <= FEW:
        return max(words.tolist(), default=0) >= LARGE
    return int(np.bitwise_or.reduce(words)) >= LARGE


def page_by_page(words: Words) -> Words:
    """A list of pages or frames with the 512 that each large one stands for."""
    if not has_large(words):
        return words
    large = words >= _LARGE
    if all_of(large):
        heads = words & word_of(LARGE - 1)
        found: Words = np.add.outer(heads, _STEPS).reshape(-1)
        return found
    return _spread(words & word_of(LARGE - 1), large, 1)


def words_by_page(words: Words) -> Words:
    """MIGRATE_PFN words with the 512 that each COMPOUND one stands for; of those only VALID ones have frames that count up."""
    if not bits_in_any(words) & MIGRATE_PFN_COMPOUND:
        return words
    compound = words & word_of(MIGRATE_PFN_COMPOUND) != 0
    out = _spread(words & ~word_of(MIGRATE_PFN_COMPOUND), compound, 1 << MIGRATE_PFN_SHIFT)
    valid = out & word_of(MIGRATE_PFN_VALID) != 0
    flat: Words = np.where(valid, out, out & word_of((1 << MIGRATE_PFN_SHIFT) - 1))
    return flat


def _spread(words: Words, large: npt.NDArray[np.bool_], step: int) -> Words:
    counts = np.where(large, HUGE_PAGES, 1)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    spread: Words = np.repeat(words, counts) + (np.arange(len(first)) - first).astype(np.uint64) * word_of(step)
    return spread


def pages_in(words: Words, bit: int = LARGE) -> int:
    """How many pages a list stands for; `bit` marks those that stand for 512."""
    if not bits_in_any(words) & bit:
        return len(words)
    return len(words) + (HUGE_PAGES - 1) * int(np.count_nonzero(words & word_of(bit)))


def bits_in_all(words: npt.NDArray[Number]) -> int:
    """The bits that every one of `words` has; none when there are none."""
    if len(words) <= FEW:
        return reduce(and_, words.tolist()) if len(words) else 0
    return int(np.bitwise_and.reduce(words))


def bits_in_any(words: npt.NDArray[Number]) -> int:
    """The bits that any of `words` has: one pass and no array, where `(words & bit != 0).any()` takes three and two."""
    if len(words) <= FEW:
        bits = 0
        for word in words.tolist():
            bits |= word
        return bits
    return int(np.bitwise_or.reduce(words))


def has_zero(words: npt.NDArray[Number]) -> bool:
    """Whether any of `words` is zero."""
    return 0 in words.tolist() if len(words) <= FEW else int(np.count_nonzero(words)) < len(words)


def largest(words: npt.NDArray[Number]) -> int:
    """The largest of `words`, of which there are some."""
    return max(words.tolist()) if len(words) <= FEW else int(np.maximum.reduce(words))


def smallest(words: npt.NDArray[Number]) -> int:
    """The smallest of `words`, of which there are some."""
    return min(words.tolist()) if len(words) <= FEW else int(np.minimum.reduce(words))


def unlike(words: npt.NDArray[Number]) -> int:
    """The bits in which any two of `words` differ: two passes and no array."""
    return bits_in_any(words) ^ bits_in_all(words) if len(words) > 1 else 0


def run_bounds(frames: Words) -> npt.NDArray[np.intp]:
    """Where consecutive runs of `frames` begin, plus ``len(frames)``: ``[0, ..., n]``; ``[0]`` for an empty list."""
    n = len(frames)
    if n <= FEW:
        numbers = frames.tolist()
        breaks_at = [i for i in range(1, n) if numbers[i] != numbers[i - 1] + 1]
        return np.array([0, *breaks_at, n] if n else [0], np.intp)
    breaks = (frames[1:] != frames[:-1] + word_of(1)).nonzero()[0] + 1
    return np.concatenate((np.zeros(1, np.intp), breaks, np.array([n], np.intp)))


def is_one_run(frames: Words, *, ascend: bool = False) -> bool:
    """Whether `frames` are consecutive, so that one slice covers them. Of those that `ascend` for certain, the ends tell."""
    n = len(frames)
    if n <= 1:
        return n == 1
    first = int(frames[0])
    if int(frames[-1]) - first != n - 1:
        return False
    if ascend or n == 2:
        return True
    if n <= FEW:
        return bool(frames.tolist() == list(range(first, first + n)))
    signed = frames.view(np.int64)  # compared in two thirds of the time; large ones, which would come first, are not among others here
    return all_of(signed[1:] > signed[:-1])  # integers that ascend from the first to the last leave none out


FIRST_LOOK = 1 << 10
"""Pages that mostly tell already whether there are more runs than can be announced one by one."""
EXACT_RUNS_MAX = 64
"""Runs of pages up to which each is announced by itself; beyond, one announcement spans them all."""


def announced_runs(pages: Words, *, ascend: bool = False) -> list[tuple[int, int]]:
    """`pages` as ranges for the hub, or as one that spans them when there are too many. `ascend`: see `is_one_run`."""
    if is_one_run(pages, ascend=ascend):
        return [(int(pages[0]), int(pages[-1]) + 1)]
    pages = pages if ascend else ascending(pages)
    if len(run_bounds(pages[:FIRST_LOOK])) - 1 > EXACT_RUNS_MAX or len(run_bounds(pages)) - 1 > EXACT_RUNS_MAX:
        return [(int(pages[0]), int(pages[-1]) + 1)]
    return runs_of(pages)


def runs_of(pages: Words) -> list[tuple[int, int]]:
    """`pages` (ascending) as ranges [start, end)."""
    if is_one_run(pages):
        return [(int(pages[0]), int(pages[-1]) + 1)]
    bounds = run_bounds(pages).tolist()
    return [(int(pages[low]), int(pages[high - 1]) + 1) for low, high in pairwise(bounds)]
