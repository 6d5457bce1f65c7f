"""Thrashing is found, naps are taken, then pages are pinned, for as long as nvidia-uvm does; and two devices in lockstep get on."""

from __future__ import annotations

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.devices.thrashing import (
    EPOCH_S,
    EVENTS_MIN,
    LAPSE_S,
    NAP_LEAST,
    NAP_MOST,
    PAGES_KEPT,
    PIN_S,
    RESETS_MAX,
    THROTTLES_MAX,
    Thrashing,
    without,
)
from hmmnet.pages import PAGE_SIZE, Words
from hmmnet.sim import SimulatedMachine

SOON_S = LAPSE_S / 100
GROUP = 16 * PAGE_SIZE


def pages(*numbers: int) -> Words:
    """As arrays are handed in."""
    return np.array(numbers, np.uint64)


def until_it_naps(thrashing: Thrashing, page: int, now_s: float) -> tuple[int, float]:
    """Fault on a page again and again: how many faults were served at once, and when the first was not."""
    for served in range(100):
        if thrashing.note_faults(pages(page), now_s).after.any():
            return served, now_s
        now_s += SOON_S
    raise AssertionError("it never naps")


def until_it_is_pinned(thrashing: Thrashing, page: int, now_s: float) -> tuple[int, float]:
    """Fault and nap until the page is pinned: how many naps, and when."""
    for naps in range(100):
        for _ in range(EVENTS_MIN + 1):
            verdict = thrashing.note_faults(pages(page), now_s)
            if verdict.nap_s:
                break
            if len(thrashing.pinned(now_s)):
                return naps, now_s
            now_s += SOON_S
        now_s += verdict.nap_s
        thrashing.napped(pages(page), now_s)
    raise AssertionError("it is never pinned")


def test_a_page_that_is_served_again_and_again_waits() -> None:
    """Three events behind the first fault; a page that faults as seldom as once a lapse is none of them."""
    assert until_it_naps(Thrashing(""), 7, 0.0)[0] == EVENTS_MIN
    slow = Thrashing("")
    assert not any(slow.note_faults(pages(7), turn * LAPSE_S * 1.01).after.any() for turn in range(50))


def test_only_the_page_that_thrashes_waits() -> None:
    """Others of the same batch are served at once."""
    thrashing = Thrashing("")
    now_s = until_it_naps(thrashing, 7, 0.0)[1] + SOON_S
    verdict = thrashing.note_faults(pages(3, 7, 9), now_s)
    assert verdict.after.tolist() == [False, True, False]
    assert NAP_LEAST * LAPSE_S <= verdict.nap_s <= NAP_MOST * LAPSE_S


def test_naps_come_from_the_seed() -> None:
    """The same seed, the same naps; two devices do not nap in lockstep."""
    first, again, other = ([made.draw_nap() for _ in range(8)] for made in map(Thrashing, ("gpu0 1", "gpu0 1", "gpu1 1")))
    assert first == again
    assert first != other


def test_ten_naps_and_the_page_is_pinned_for_150_ms() -> None:
    """Then it may move again, and is watched as before."""
    thrashing = Thrashing("")
    naps, now_s = until_it_is_pinned(thrashing, 7, 0.0)
    assert naps == THROTTLES_MAX
    assert thrashing.pinned(now_s + PIN_S * 0.99).tolist() == [7]
    assert thrashing.pinned(now_s + PIN_S * 1.01).tolist() == []
    assert not thrashing.note_faults(pages(7), now_s + SOON_S).after.any(), "a pinned page does not nap"
    assert until_it_naps(thrashing, 7, now_s + PIN_S + LAPSE_S * 2)[0] == EVENTS_MIN
    assert thrashing.pins == 1


def test_a_quiet_page_begins_anew_a_few_times() -> None:
    """What it was throttled for is forgotten after an epoch, four times; after that its naps add up, and it is pinned sooner."""
    thrashing, now_s = Thrashing(""), 0.0
    for _ in range(RESETS_MAX + 1):
        now_s = until_it_naps(thrashing, 7, now_s + EPOCH_S * 1.1)[1]
    naps, _ = until_it_is_pinned(thrashing, 7, now_s + EPOCH_S * 1.1)
    assert naps == THROTTLES_MAX - 1


def test_as_many_pages_are_remembered_as_faulted_last() -> None:
    """A scan over much memory costs no more; who thrashes now is not forgotten for it."""
    thrashing, now_s = Thrashing(""), 0.0
    for first in range(1000, 1000 + 4 * PAGES_KEPT, 256):
        thrashing.note_faults(np.arange(first, first + 256, dtype=np.uint64), now_s)
        verdict = thrashing.note_faults(pages(7), now_s)
        now_s += SOON_S
        thrashing.napped(pages(7), now_s)
    assert verdict.after.all() or thrashing.pinned(now_s).tolist() == [7]
    assert len(thrashing._served_s) <= PAGES_KEPT


@pytest.mark.parametrize(
    ("ranges", "pinned", "left"),
    [
        ([(0, 16)], (), [(0, 16)]),
        ([(0, 16)], (0, 15), [(1, 15)]),
        ([(0, 4), (8, 12)], (2, 3, 8, 40), [(0, 2), (9, 12)]),
        ([(4, 5)], (4,), []),
    ],
)
def test_pinned_pages_are_cut_out(ranges: list[tuple[int, int]], pinned: tuple[int, ...], left: list[tuple[int, int]]) -> None:
    """Ranges around them stay."""
    assert without(ranges, pages(*pinned)) == left


# --- two devices that want the same -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 3, 11])
def test_two_devices_count_in_the_same_word(seed: int) -> None:
    """In lockstep each would take the page before the other has used it, until an access gives up (a livelock): every addition is done."""

    async def main(machine: SimulatedMachine) -> int:
        process = await machine.create_process()
        address = await process.mmap(PAGE_SIZE)

        async def count(device: str) -> None:
            for _ in range(40):
                await process.launch("fetch_add", device, a=address, n=1)

        async with trio.open_nursery() as nursery:
            for device in machine.device_names:
                nursery.start_soon(count, device)
        total = await process.load(address)
        await process.exit()
        return int(total)

    assert hmmnet.simulate(main, "two-gpus", seed=seed).value == 80


def test_devices_that_want_several_groups_of_each_other_get_on() -> None:
    """Each stores to eight groups in turn: what is stored is there, and pages move far less often than they are used."""
    groups, rounds = 8, 60

    async def main(machine: SimulatedMachine) -> tuple[int, bool]:
        process = await machine.create_process()
        address = await process.mmap(groups * GROUP)
        moved = 0

        async def work(number: int, device: str) -> None:
            nonlocal moved
            order = np.arange(groups) if number == 0 else np.arange(groups)[::-1]
            for turn in range(rounds):
                for group in order.tolist():
                    at = address + group * GROUP + 8 * number
                    done = await process.launch("poke", device, a=at, words=np.array([turn], np.uint64).tobytes())
                    moved += int(done.counters["migrations"])

        async with trio.open_nursery() as nursery:
            for number, device in enumerate(machine.device_names):
                nursery.start_soon(work, number, device)
        words = [await process.load(address + group * GROUP + 8 * number) for group in range(groups) for number in (0, 1)]
        await process.exit()
        return moved, all(int(word) == rounds - 1 for word in words)

    moved, right = hmmnet.simulate(main, "two-gpus", seed=1).value
    assert right
    assert moved < 2 * groups * rounds / 2
