"""The memory accesses of a kernel, thousands of lanes at a time, and how far each has come.

A kernel yields *requests* (`load`, `store`, `load_range`, `store_range`, `update`); the engine makes an `Access` of each and advances it
until every lane is served. One step is synchronous: look all open lanes up in the mirror, serve those that lead to own memory at once, and
say what is left: lanes that lead to foreign memory (to be done by DMA now, before the mirror can change) and pages that miss (to be
faulted in).

Two shapes. *Lanes* are single elements at arbitrary addresses (pointers): gathered and scattered by numpy. *Ranges* are consecutive bytes:
copied as one slice for each run of frames. Elements are naturally aligned, as GPUs want them, so none straddles two pages.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from hmmnet.errors import HmmnetError
from hmmnet.pages import (
    ADDRESS_BITS,
    FEW,
    PAGE_SHIFT,
    PAGE_SIZE,
    ZERO_FRAME,
    Words,
    all_of,
    any_of,
    distinct,
    is_ascending,
    largest,
    word_of,
)

from .memory import Memory
from .mirror import Mirror, allows, frames_of

Bytes: TypeAlias = npt.NDArray[np.uint8]
Array: TypeAlias = npt.NDArray[Any]

REQUEST_BYTES_MAX = 1 << 30
"""One request of a kernel; kernels work in chunks far below."""
ADDRESS_END = 1 << ADDRESS_BITS
DENSE_LANES = 64
"""Distinct elements a page from which on a foreign page is fetched whole: eight-byte elements would cost twice their size in addresses."""

NO_PAGES = np.zeros(0, np.uint64)
_OFFSET = word_of(PAGE_SIZE - 1)
_SHIFT = word_of(PAGE_SHIFT)
_ZERO = word_of(ZERO_FRAME)


class JobError(HmmnetError):
    """A kernel did something that ends its job: a bad access or a bad argument."""


class AccessError(JobError):
    """An access that cannot be served: nothing mapped there, or no right to it. `address` is the first such byte address.

    `code` is what the host refused it with (a positive errno), 0 where nobody asked the host.
    """

    def __init__(self, address: int, why: str, code: int = 0) -> None:
        self.address = address
        self.code = code
        super().__init__(f"fault at 0x{address:x}: {why}")


@dataclass(frozen=True, eq=False)
class Load:
    """Elements of `dtype` at `addresses` (any order, repeats allowed)."""

    addresses: Words
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Store:
    """`values` to `addresses`; where an address repeats, the last one stays."""

    addresses: Words
    values: Array


@dataclass(frozen=True, eq=False)
class LoadRange:
    """`count` consecutive elements of `dtype` from `start`."""

    start: int
    count: int
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class StoreRange:
    """`values` to consecutive elements from `start`."""

    start: int
    values: Array


@dataclass(frozen=True, eq=False)
class Update:
    """Add `values` to the elements at `addresses`, each atomically; gives what they were. Repeated addresses take turns."""

    addresses: Words
    values: Array


Request: TypeAlias = Load | Store | LoadRange | StoreRange | Update
Steps: TypeAlias = Generator[Request, Array, dict[str, Any]]
"""A running kernel; what it returns are the job's results."""
Kernel: TypeAlias = Callable[..., Steps]


def load(addresses: Words, dtype: Any = "<u8") -> Load:
    """Ask for the elements at `addresses`; the yield gives them as an array."""
    return Load(np.ascontiguousarray(addresses, dtype=np.uint64), np.dtype(dtype))


def store(addresses: Words, values: Array) -> Store:
    """Store `values`, one for each address; their dtype is what is written."""
    return Store(np.ascontiguousarray(addresses, dtype=np.uint64), np.ascontiguousarray(values))


def load_range(start: int, count: int, dtype: Any = "<u8") -> LoadRange:
    """Ask for `count` consecutive elements; the yield gives them as an array."""
    return LoadRange(start, count, np.dtype(dtype))


def store_range(start: int, values: Array) -> StoreRange:
    """Store an array to consecutive addresses."""
    return StoreRange(start, np.ascontiguousarray(values))


def update(addresses: Words, values: Array) -> Update:
    """Ask for atomic additions; the yield gives the values before as an array.

    Only memory of the device itself is updated: a page that lies elsewhere is brought here first, whatever the job's placement, and one
    that cannot come (a page of a file, a pinned one) ends the job.
    """
    return Update(np.ascontiguousarray(addresses, dtype=np.uint64), np.ascontiguousarray(values))


class Foreign(NamedTuple):
    """Elements in memory that is not ours: what to transfer, and where the bytes go (or come from)."""

    pages: Words
    addresses: Words
    size: int
    data: Bytes | None
    """Bytes to write; None for a read."""
    land: Callable[[Bytes], None]
    """Takes the bytes of a read."""


class Step(NamedTuple):
    """What one look at the mirror left over."""

    foreign: list[Foreign]
    missing: Words
    """Pages to be faulted in, ascending, each once."""
    elsewhere: Words = NO_PAGES
    """Pages that are mapped, but must be here for this access."""


class Lanes:
    """Elements at arbitrary addresses."""

    def __init__(self, addresses: Words, size: int, data: Bytes | None) -> None:
        check_addresses(addresses, size)
        self.write = data is not None
        self.size = size
        self.data = np.empty(len(addresses) * size, dtype=np.uint8) if data is None else data
        self._rows = self.data.reshape(len(addresses), size)
        self._addresses = addresses
        self._open: npt.NDArray[np.intp] | None = None
        """Lanes not served yet; None is all of them."""

    @property
    def is_done(self) -> bool:
        """Whether every lane is served (lanes handed out as foreign count as served)."""
        return len(self._addresses) == 0 if self._open is None else len(self._open) == 0

    def first_address(self, page: int) -> int:
        """The lowest byte of `page` that is wanted."""
        return int(self._addresses[self._addresses >> _SHIFT == np.uint64(page)].min())

    def result(self, dtype: np.dtype[Any]) -> Array:
        """What was loaded."""
        return self.data.view(dtype)

    def advance(self, mirror: Mirror, memory: Memory) -> Step:
        """Serve what can be served now."""
        addresses = self._addresses if self._open is None else self._addresses[self._open]
        pages = addresses >> _SHIFT
        entries = mirror.translate(pages)
        allowed = allows(entries, self.write)
        if not any_of(allowed):  # as it mostly is the first time
            return Step([], distinct(pages))
        frames = frames_of(entries)
        physical = frames << _SHIFT | addresses & _OFFSET
        own = allowed & memory.owns(frames)
        if len(addresses) and all_of(own):
            self._serve(memory, physical, self._open)
            self._open = np.zeros(0, dtype=np.intp)
            return Step([], distinct(pages[:0]))
        lanes = np.arange(len(addresses)) if self._open is None else self._open
        if any_of(own):
            self._serve(memory, physical[own], lanes[own])
        if not self.write:
            zero = allowed & (frames == _ZERO)
            self._rows[lanes[zero]] = 0
            away = allowed & ~own & ~zero
        else:
            away = allowed & ~own
        self._open = lanes[~allowed]
        foreign = [self._foreign(pages[away], physical[away], lanes[away])] if any_of(away) else []
        return Step(foreign, distinct(pages[~allowed]))

    def _serve(self, memory: Memory, physical: Words, lanes: npt.NDArray[np.intp] | None) -> None:
        if self.write:
            rows = self._rows if lanes is None else self._rows[lanes]
            memory.store(physical, self.size, rows.reshape(-1))
        elif lanes is None:
            self.data[:] = memory.load(physical, self.size)
        else:
            self._rows[lanes] = memory.load(physical, self.size).reshape(-1, self.size)

    def _foreign(self, pages: Words, physical: Words, lanes: npt.NDArray[np.intp]) -> Foreign:
        if self.write:
            return Foreign(pages, physical, self.size, self._rows[lanes].reshape(-1), _nowhere)
        if is_ascending(physical):
            each, first = physical, np.arange(len(physical))
            back = first
        else:
            each, first, back = np.unique(physical, return_index=True, return_inverse=True)
        numbers = each >> _SHIFT
        first_of_page = np.concatenate(([0], (numbers[1:] != numbers[:-1]).nonzero()[0] + 1))
        whole = numbers[first_of_page]
        if len(each) >= DENSE_LANES * len(whole):
            places = np.searchsorted(whole, physical >> _SHIFT)
            rows = (places * PAGE_SIZE + (physical & _OFFSET).astype(np.intp)) // self.size

            def land_pages(data: Bytes) -> None:
                self._rows[lanes] = data.reshape(-1, self.size)[rows]

            return Foreign(pages[first[first_of_page]], whole << _SHIFT, PAGE_SIZE, None, land_pages)

        def land(data: Bytes) -> None:
            self._rows[lanes] = data.reshape(-1, self.size)[back]

        return Foreign(pages[first], each, self.size, None, land)


class Updates:
    """Atomic additions, in own memory only: loaded and stored in one stretch of code, which nothing else here can come between."""

    write = True

    def __init__(self, addresses: Words, values: Array) -> None:
        check_addresses(addresses, values.dtype.itemsize)
        self._addresses = addresses
        self._values = values
        self._before = np.empty_like(values)
        self._open = np.ones(len(addresses), np.bool_)

    @property
    def is_done(self) -> bool:
        """Whether every addition is done."""
        return not any_of(self._open)

    def first_address(self, page: int) -> int:
        """The lowest byte of `page` that is wanted."""
        return int(self._addresses[self._addresses >> _SHIFT == np.uint64(page)].min())

    def result(self, _: np.dtype[Any]) -> Array:
        """The values before."""
        return self._before

    def advance(self, mirror: Mirror, memory: Memory) -> Step:
        """Do what can be done now."""
        pages = self._addresses >> _SHIFT
        entries = mirror.translate(pages)
        allowed = allows(entries, True)
        frames = frames_of(entries)
        own = allowed & memory.owns(frames)
        size = self._values.dtype.itemsize
        for lane in np.flatnonzero(own & self._open).tolist():
            physical = frames[lane : lane + 1] << _SHIFT | self._addresses[lane : lane + 1] & _OFFSET
            before = memory.load(physical, size).view(self._values.dtype)
            self._before[lane] = before[0]
            memory.store(physical, size, (before + self._values[lane : lane + 1]).view(np.uint8))
        self._open &= ~own
        return Step([], distinct(pages[self._open & ~allowed]), distinct(pages[self._open & allowed]))


class Range:
    """Consecutive bytes [start, start + nbytes)."""

    def __init__(self, start: int, nbytes: int, data: Bytes | None) -> None:
        self.write = data is not None
        self.data = np.empty(nbytes, dtype=np.uint8) if data is None else data
        self._start = start
        self._end = start + nbytes
        self._first = start >> PAGE_SHIFT
        count = ((self._end + PAGE_SIZE - 1) >> PAGE_SHIFT) - self._first if nbytes else 0
        self._open = np.ones(count, dtype=np.bool_)
        """Pages not served yet."""

    @property
    def is_done(self) -> bool:
        """Whether every page is served (pages handed out as foreign count as served)."""
        return not any_of(self._open)

    def first_address(self, page: int) -> int:
        """The lowest byte of `page` that is wanted."""
        return max(self._start, page << PAGE_SHIFT)

    def result(self, dtype: np.dtype[Any]) -> Array:
        """What was loaded."""
        return self.data.view(dtype)

    def advance(self, mirror: Mirror, memory: Memory) -> Step:
        """Serve what can be served now."""
        entries = mirror.range(self._first, self._first + len(self._open))
        allowed = allows(entries, self.write) & self._open
        if not any_of(allowed):  # as it mostly is the first time
            return Step([], self._missing())
        frames = frames_of(entries)
        own = allowed & memory.owns(frames)
        for i, j in runs(own, frames):
            self._copy(memory, int(frames[i]), i, j)
        self._open &= ~allowed
        away = allowed & ~own
        foreign: list[Foreign] = []
        if any_of(away):
            if not self.write:
                zero = away & (frames == _ZERO)
                for i, j in runs(zero):
                    low, high = self._span(i, j)
                    self.data[low:high] = 0
                away &= ~zero
            foreign = [part for i, j in runs(away) for part in self._foreign(frames, i, j)]
        return Step(foreign, self._missing())

    def _missing(self) -> Words:
        """The pages not served yet."""
        return (self._open.nonzero()[0] + self._first).astype(np.uint64) if any_of(self._open) else NO_PAGES

    def _span(self, i: int, j: int) -> tuple[int, int]:
        """The bytes of `data` that pages i to j (of the range) hold."""
        low = max(self._start, (self._first + i) << PAGE_SHIFT)
        high = min(self._end, (self._first + j) << PAGE_SHIFT)
        return low - self._start, high - self._start

    def _copy(self, memory: Memory, frame: int, i: int, j: int) -> None:
        low, high = self._span(i, j)
        offset = ((frame - memory.base) << PAGE_SHIFT) + ((low + self._start) & (PAGE_SIZE - 1))
        there = memory.arena.bytes[offset : offset + high - low]
        if self.write:
            there[:] = self.data[low:high]
        else:
            self.data[low:high] = there

    def _foreign(self, frames: Words, i: int, j: int) -> Iterator[Foreign]:
        """Whole pages as pages; what is left of a first or last page in the largest elements that fit."""
        low, high = self._span(i, j)
        begin, stop = i, j
        if (low + self._start) & (PAGE_SIZE - 1):
            yield self._part(frames, i, low, min(high, self._span(i, i + 1)[1]))
            begin += 1
        if begin < stop and (high + self._start) & (PAGE_SIZE - 1):
            stop -= 1
            yield self._part(frames, stop, self._span(stop, stop + 1)[0], high)
        if begin < stop:
            low, high = self._span(begin, stop)
            pages = np.arange(self._first + begin, self._first + stop, dtype=np.uint64)
            yield self._transfer(pages, frames[begin:stop] << _SHIFT, PAGE_SIZE, low, high)

    def _part(self, frames: Words, i: int, low: int, high: int) -> Foreign:
        address = (int(frames[i]) << PAGE_SHIFT) | ((low + self._start) & (PAGE_SIZE - 1))
        together = address | (high - low)
        size = together & -together
        addresses = np.arange(address, address + high - low, size, dtype=np.uint64)
        pages = np.full(len(addresses), self._first + i, dtype=np.uint64)
        return self._transfer(pages, addresses, size, low, high)

    def _transfer(self, pages: Words, addresses: Words, size: int, low: int, high: int) -> Foreign:
        def land(data: Bytes) -> None:
            self.data[low:high] = data

        return Foreign(pages, addresses, size, self.data[low:high] if self.write else None, land)


Access = Lanes | Range | Updates


def open_access(request: Request) -> Access:
    """The access that a kernel's request asks for. Raises JobError for one that no device would take."""
    if isinstance(request, Load | LoadRange):
        size = request.dtype.itemsize
        count = len(request.addresses) if isinstance(request, Load) else request.count
    elif isinstance(request, Store | StoreRange | Update):
        size = request.values.dtype.itemsize
        count = request.values.size
    else:
        raise JobError(f"a kernel yielded {type(request).__name__}; load, store, load_range, store_range or update is wanted")
    if size == 0 or size > PAGE_SIZE or size & (size - 1):
        raise JobError(f"elements of {size} bytes cannot be accessed; a power of two up to {PAGE_SIZE} is wanted")
    if not 0 <= count * size <= REQUEST_BYTES_MAX:
        raise JobError(f"a request for {count} elements of {size} bytes is over the limit of {REQUEST_BYTES_MAX} bytes")
    if isinstance(request, Load):
        return Lanes(request.addresses, size, None)
    if isinstance(request, Store):
        if request.values.shape != request.addresses.shape:
            raise JobError(f"{request.values.size} values were to be stored at {len(request.addresses)} addresses")
        return Lanes(request.addresses, size, request.values.view(np.uint8).reshape(-1))
    if isinstance(request, Update):
        if request.values.shape != request.addresses.shape:
            raise JobError(f"{request.values.size} values were to be added at {len(request.addresses)} addresses")
        return Updates(request.addresses, request.values)
    check_range(request.start, count * size, size)
    if isinstance(request, LoadRange):
        return Range(request.start, count * size, None)
    return Range(request.start, count * size, request.values.reshape(-1).view(np.uint8))


def check_range(start: int, nbytes: int, size: int) -> None:
    """An aligned range inside the address space. Raises AccessError, JobError."""
    if nbytes and not 0 <= start <= ADDRESS_END - nbytes:
        raise AccessError(max(start, 0), f"[0x{start:x}, +{nbytes}) leaves the {ADDRESS_BITS}-bit address space")
    if start % size:
        raise JobError(f"misaligned address 0x{start:x} for elements of {size} bytes")


def check_addresses(addresses: Words, size: int) -> None:
    """Aligned addresses inside the address space. Raises AccessError, JobError."""
    if len(addresses) == 0:
        return
    if largest(addresses) >= ADDRESS_END:
        bad = int(addresses[int(np.argmax(addresses >= word_of(ADDRESS_END)))])
        raise AccessError(bad, f"the address is beyond the {ADDRESS_BITS}-bit address space")
    crooked = addresses & np.uint64(size - 1)
    if any_of(crooked != 0):
        raise JobError(f"misaligned address 0x{int(addresses[int(np.argmax(crooked != 0))]):x} for elements of {size} bytes")


def runs(mask: npt.NDArray[np.bool_], frames: Words | None = None) -> Iterator[tuple[int, int]]:
    """Runs [i, j) of True in `mask`, cut also where `frames` do not go on by one."""
    if len(mask) <= FEW:
        yield from _few_runs(mask.tolist(), None if frames is None else frames.tolist())
        return
    places = np.flatnonzero(mask)
    if len(places) == 0:
        return
    breaks = np.diff(places) != 1
    if frames is not None:
        breaks |= np.diff(frames[places]) != word_of(1)
    cuts = np.flatnonzero(breaks) + 1
    for part_first, part_end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(places)], strict=True):
        yield int(places[part_first]), int(places[part_end - 1]) + 1


def _few_runs(mask: list[bool], frames: list[int] | None) -> Iterator[tuple[int, int]]:
    """`runs`, looked for one by one."""
    first = None
    for i, chosen in enumerate([*mask, False]):
        if first is not None and not (chosen and (frames is None or frames[i] == frames[i - 1] + 1)):
            yield first, i
            first = None
        if chosen and first is None:
            first = i


def _nowhere(_: Bytes) -> None:
    """A write brings nothing back."""
