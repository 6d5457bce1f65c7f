"""Accesses: what one look at the mirror serves, what it leaves over, and what no device would take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hmmnet.devices.access import (
    Access,
    AccessError,
    Foreign,
    JobError,
    Step,
    load,
    load_range,
    open_access,
    runs,
    store,
    store_range,
)
from hmmnet.devices.memory import Memory
from hmmnet.devices.mirror import Mirror
from hmmnet.pages import HMM_PFN_VALID, HMM_PFN_WRITE, PAGE_SIZE, ZERO_FRAME, Words

ZONE = 70
PAGE = 100
"""Where the tests' pages begin."""
AT = PAGE * PAGE_SIZE
SYSTEM = 0x5000


class World:
    """A mirror of pages PAGE.. onto own, foreign, zero and missing frames, and the foreign bytes."""

    def __init__(self) -> None:
        self.memory = Memory(ZONE, 64)
        self.mirror = Mirror(1, 1, 1, self.memory)
        self.foreign = np.random.default_rng(1).integers(0, 256, 64 * PAGE_SIZE).astype(np.uint8)

    def own(self, *pages: int, write: bool = True) -> None:
        frames = self.memory.grant(len(pages))
        assert frames is not None
        self.memory.keep(frames)
        for page, frame in zip(pages, frames.tolist(), strict=True):
            self.memory.page_bytes(frame)[:] = np.random.default_rng(page).integers(0, 256, PAGE_SIZE)
            self._map(page, frame, write)

    def system(self, *pages: int, write: bool = True) -> None:
        for page in pages:
            self._map(page, SYSTEM + page, write)

    def zero(self, *pages: int) -> None:
        for page in pages:
            self._map(page, ZERO_FRAME, write=False)

    def _map(self, page: int, frame: int, write: bool) -> None:
        self.mirror.program(PAGE + page, np.array([frame | HMM_PFN_VALID | (HMM_PFN_WRITE if write else 0)], dtype=np.uint64))

    def advance(self, access: Access) -> Step:
        """One step, its foreign parts done."""
        step = access.advance(self.mirror, self.memory)
        for part in step.foreign:
            self.transfer(part)
        return step

    def transfer(self, part: Foreign) -> None:
        rows = self.foreign.reshape(-1, part.size)
        places = ((part.addresses - np.uint64(SYSTEM * PAGE_SIZE)) // np.uint64(part.size)).astype(np.intp)
        assert ((part.addresses >> np.uint64(12)) - np.uint64(SYSTEM) == part.pages - np.uint64(PAGE)).all(), "pages and addresses disagree"
        if part.data is None:
            part.land(rows[places].reshape(-1))
        else:
            rows[places] = part.data.reshape(-1, part.size)

    def image(self, pages: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes that a program would see."""
        out = np.zeros(pages * PAGE_SIZE, np.uint8)
        frames = self.mirror.range(PAGE, PAGE + pages) >> np.uint64(8)
        for page, frame in enumerate(frames.tolist()):
            piece = out[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            if frame >= self.memory.base:
                piece[:] = self.memory.page_bytes(frame)
            elif frame >= SYSTEM:
                piece[:] = self.foreign[(frame - SYSTEM) * PAGE_SIZE :][:PAGE_SIZE]
        return out


@pytest.fixture
def world() -> World:
    world = World()
    world.own(0, 1)
    world.system(2, 3)
    world.zero(4)
    world.own(5)
    world.system(6)
    return world


def u64(*numbers: int) -> Words:
    return np.array(numbers, dtype=np.uint64)


@pytest.mark.parametrize(
    ("start", "count"), [(0, 7 * 512), (1, 7 * 512 - 2), (511, 3), (1023, 514), (1024, 1), (1030, 4), (0, 0), (1500, 1000)]
)
def test_range_load_over_every_kind_of_page(world: World, start: int, count: int) -> None:
    """Own, foreign and zero pages, whole and in part, come out as the program would see them, in one step."""
    access = open_access(load_range(AT + start * 8, count))
    assert len(world.advance(access).missing) == 0
    assert access.is_done
    assert (access.result(np.dtype("<u8")) == world.image(7).view("<u8")[start : start + count]).all()


@pytest.mark.parametrize(("start", "nbytes"), [(3, 5), (4095, 2), (4000, 9000), (8191, 8194), (2 * 4096 + 1, 4095)])
def test_byte_ranges_of_odd_length(world: World, start: int, nbytes: int) -> None:
    """Ranges of bytes may begin and end anywhere."""
    access = open_access(load_range(AT + start, nbytes, "u1"))
    world.advance(access)
    assert (access.result(np.dtype("u1")) == world.image(7)[start : start + nbytes]).all()


@pytest.mark.parametrize(("start", "nbytes"), [(0, 4 * 4096), (4095, 4098), (8192 + 3, 7), (100, 12000), (4096, 4096)])
def test_range_store(world: World, start: int, nbytes: int) -> None:
    """What is stored is what is seen, and nothing else changes."""
    expected = world.image(7)
    data = np.random.default_rng(9).integers(0, 256, nbytes).astype(np.uint8)
    expected[start : start + nbytes] = data
    access = open_access(store_range(AT + start, data))
    world.advance(access)
    assert access.is_done
    assert (world.image(7) == expected).all()


def test_lanes_load_with_repeats(world: World) -> None:
    """Any addresses in any order, over every kind of page."""
    lanes = np.random.default_rng(4).integers(0, 7 * 512, 5000)
    access = open_access(load(np.uint64(AT) + lanes.astype(np.uint64) * np.uint64(8)))
    step = world.advance(access)
    assert access.is_done
    assert (access.result(np.dtype("<u8")) == world.image(7).view("<u8")[lanes]).all()
    assert sum(len(part.addresses) for part in step.foreign) < 5000, "foreign elements are fetched once, or page by page"


def test_few_lanes_fetch_few_bytes(world: World) -> None:
    """Three words of a foreign page do not fetch the page."""
    access = open_access(load(u64(AT + 2 * PAGE_SIZE, AT + 2 * PAGE_SIZE + 8, AT + 2 * PAGE_SIZE)))
    step = world.advance(access)
    assert [(part.size, len(part.addresses)) for part in step.foreign] == [(8, 2)]


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<u8", "<c16"])
def test_lanes_of_every_size(world: World, dtype: str) -> None:
    """Elements of one to sixteen bytes are loaded and stored."""
    size = np.dtype(dtype).itemsize
    places = np.array([0, 4096 // size - 1, 2 * 4096 // size, 5 * 4096 // size + 3])
    addresses = np.uint64(AT) + (places * size).astype(np.uint64)
    values = (np.arange(4) + 65).astype(dtype)
    world.advance(open_access(store(addresses, values)))
    access = open_access(load(addresses, dtype))
    world.advance(access)
    assert (access.result(np.dtype(dtype)) == values).all()
    assert (world.image(7).view(dtype)[places] == values).all()


def test_last_of_repeated_stores_stays(world: World) -> None:
    """Own memory: the last lane wins."""
    access = open_access(store(u64(AT, AT, AT), u64(1, 2, 3)))
    world.advance(access)
    assert world.image(1).view("<u8")[0] == 3


@pytest.mark.parametrize("make", [lambda at: load(u64(at - PAGE_SIZE, at)), lambda at: load_range(at - PAGE_SIZE, 1024)])
def test_missing_pages_are_named_and_the_rest_is_served(world: World, make: Callable[[int], Any]) -> None:
    """Page 7 is not mapped: the step says so, serves page 6, and finishes when page 7 is there."""
    access = open_access(make(AT + 7 * PAGE_SIZE))
    assert world.advance(access).missing.tolist() == [PAGE + 7]
    assert not access.is_done
    assert access.first_address(PAGE + 7) == AT + 7 * PAGE_SIZE
    world.own(7)
    assert len(world.advance(access).missing) == 0
    assert access.is_done


def test_read_only_pages_miss_for_stores(world: World) -> None:
    """The zero page and a read-only entry may be read, not written."""
    world.own(8, write=False)
    access = open_access(store(u64(AT + 4 * PAGE_SIZE, AT + 8 * PAGE_SIZE), u64(1, 2)))
    assert world.advance(access).missing.tolist() == [PAGE + 4, PAGE + 8]
    assert world.advance(open_access(store_range(AT + 4 * PAGE_SIZE, u64(1)))).missing.tolist() == [PAGE + 4]


@pytest.mark.parametrize(
    ("request_made", "complaint"),
    [
        (load(u64(3)), "misaligned"),
        (load_range(4, 1), "misaligned"),
        (store_range(9, u64(1)), "misaligned"),
        (load_range(0, 1 << 40), "limit"),
        (load_range(0, -1), "limit"),
        (store(u64(0, 8), u64(1)), "1 values"),
        (load(u64(0), "V3"), "3 bytes"),
        (load(u64(0), "V0"), "0 bytes"),
        ("load", "str"),
    ],
)
def test_requests_that_no_device_takes(request_made: Any, complaint: str) -> None:
    """They end the job with the reason."""
    with pytest.raises(JobError, match=complaint):
        open_access(request_made)


@pytest.mark.parametrize(
    "request_made", [load(u64(8, 1 << 47)), load_range((1 << 47) - 8, 2), load_range(-8, 1), store(u64((1 << 64) - 8), u64(1))]
)
def test_addresses_outside_the_address_space_fault(request_made: Any) -> None:
    """They fault at once, with an address."""
    with pytest.raises(AccessError):
        open_access(request_made)


def test_runs_are_cut_by_gaps_and_frames() -> None:
    """A run goes on while both the mask and the frames do."""
    mask = np.array([True, True, True, False, True, True])
    frames = u64(10, 11, 20, 21, 22, 23)
    assert list(runs(mask)) == [(0, 3), (4, 6)]
    assert list(runs(mask, frames)) == [(0, 2), (2, 3), (4, 6)]
    assert list(runs(np.zeros(3, np.bool_))) == []
