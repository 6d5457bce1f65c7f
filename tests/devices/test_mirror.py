"""The mirrored page table: sequences, watches, entries, hiding during migration."""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.devices.memory import Memory
from hmmnet.devices.mirror import Mirror, Subscription, allows, frames_of
from hmmnet.pages import HMM_PFN_ERROR, HMM_PFN_VALID, HMM_PFN_WRITE, PAGES_MAX, ZONE_SHIFT, Words, to_wire

ZONE = 70
SYSTEM = 0x5000


@pytest.fixture
def memory() -> Memory:
    return Memory(ZONE, 256)


@pytest.fixture
def mirror(memory: Memory) -> Mirror:
    return Mirror(context=1, process=10, slot=1, memory=memory)


@pytest.fixture
def subscription(mirror: Mirror) -> Subscription:
    mirror.subscribing()
    return mirror.subscribed(5, 0, PAGES_MAX, 3)


def words(*frames: int, write: bool = True) -> Words:
    return np.array(frames, dtype=np.uint64) | np.uint64(HMM_PFN_VALID | (HMM_PFN_WRITE if write else 0))


def pages(*numbers: int) -> Words:
    return np.array(numbers, dtype=np.uint64)


def own_frames(memory: Memory, count: int) -> Words:
    frames = memory.grant(count)
    assert frames is not None
    memory.keep(frames)
    return frames


def test_programs_what_is_usable(mirror: Mirror, subscription: Subscription) -> None:
    """VALID words become entries with their rights; ERROR and empty words change nothing."""
    given = np.array([SYSTEM | HMM_PFN_VALID, 0, HMM_PFN_ERROR, (SYSTEM + 9) | HMM_PFN_VALID | HMM_PFN_WRITE], dtype=np.uint64)
    mirror.program(100, given)
    entries = mirror.range(100, 104)
    assert allows(entries, write=False).tolist() == [True, False, False, True]
    assert allows(entries, write=True).tolist() == [False, False, False, True]
    assert frames_of(entries).tolist() == [SYSTEM, 0, 0, SYSTEM + 9]


def test_read_retry(mirror: Mirror, subscription: Subscription) -> None:
    """Words count unless the subscription has heard of a later sequence, and only if nothing dropped a page meanwhile."""
    watch = mirror.watch(10, 20)
    assert mirror.is_current(subscription, 3, watch, words(SYSTEM))
    assert mirror.is_current(subscription, 4, watch, words(SYSTEM))
    assert not mirror.is_current(subscription, 2, watch, words(SYSTEM))
    mirror.invalidate(5, 1000, 1001, 7)
    assert not mirror.is_current(subscription, 3, watch, words(SYSTEM))
    assert mirror.is_current(subscription, 7, watch, words(SYSTEM))
    mirror.drop_pages(pages(15))
    assert not mirror.is_current(subscription, 7, watch, words(SYSTEM))


def test_what_a_sequence_tells_is_not_told_twice(mirror: Mirror, subscription: Subscription) -> None:
    """Words that come with the sequence of the last invalidation were read after it; what has no sequence makes them stale."""
    watch = mirror.watch(10, 20, 5)
    mirror.invalidate(5, 12, 13, 7)
    assert not mirror.is_current(subscription, 3, watch, words(SYSTEM))
    assert mirror.is_current(subscription, 7, watch, words(SYSTEM))
    mirror.invalidate(99, 12, 13, 9)
    assert not mirror.is_current(subscription, 7, watch, words(SYSTEM))
    watch = mirror.watch(10, 20, 5)
    mirror.clear()
    assert not mirror.is_current(subscription, 7, watch, words(SYSTEM))


def test_what_a_migration_announces_is_not_held_against_it(mirror: Mirror, subscription: Subscription) -> None:
    """Shared pages are cleared in every mirror before they are collected: older words are stale, what the migration brings is good."""
    watch = mirror.watch(10, 20)
    mirror.invalidate(5, 12, 13, 7, announced=True)
    assert not mirror.is_current(subscription, 7, watch, words(SYSTEM))
    assert watch.keeps(pages(11, 12)).tolist() == [True, False]
    assert watch.brings(pages(11, 12)).tolist() == [True, True]
    mirror.invalidate(5, 12, 13, 9)
    assert watch.brings(pages(11, 12)).tolist() == [True, False]


def test_words_from_before_a_copy_out_are_stale(mirror: Mirror, subscription: Subscription, memory: Memory) -> None:
    """A page that a CPU fault is taking home cannot be mapped any more, although no sequence changed; if it stays, it can."""
    frames = own_frames(memory, 1)
    watch = mirror.watch(10, 11)
    assert mirror.is_current(subscription, 3, watch, words(int(frames[0])))
    memory.depart(to_wire(frames), "CopyOut")
    assert not mirror.is_current(subscription, 3, watch, words(int(frames[0])))
    assert mirror.is_current(subscription, 3, mirror.watch(10, 11), words(int(frames[0])))


def test_invalidation_overtakes_the_reply_to_subscribe(mirror: Mirror) -> None:
    """An Invalidate that is handled before the Subscribed reply was read still counts."""
    mirror.subscribing()
    mirror.invalidate(8, 0, 10, 21)
    assert mirror.subscribed(8, 0, 100, 19).sequence == 21


def test_unknown_subscription_still_drops(mirror: Mirror, subscription: Subscription) -> None:
    """A subscription that was just removed may be told once more: the range goes all the same."""
    mirror.program(100, words(SYSTEM))
    mirror.invalidate(99, 100, 101, 5)
    assert not mirror.range(100, 101).any()


def test_invalidation_is_exact_or_inclusive(memory: Memory) -> None:
    """A driver drops [start, end); test_hmm drops the page at `end` too."""
    for inclusive, left in ((False, [True, False, False, True]), (True, [True, False, False, False])):
        mirror = Mirror(1, 1, 1, memory, end_inclusive=inclusive)
        mirror.program(0, words(SYSTEM, SYSTEM + 1, SYSTEM + 2, SYSTEM + 3))
        mirror.invalidate(1, 1, 3, 1)
        assert (mirror.range(0, 4) != 0).tolist() == left


def test_drop_by_frame(mirror: Mirror, subscription: Subscription, memory: Memory) -> None:
    """Only entries that lead to one of the frames go, wherever the hint points."""
    frames = own_frames(memory, 3)
    mirror.program_own(pages(7, 8, 9), frames, np.array([True, True, False]))
    mirror.program(8, words(SYSTEM))
    mirror.drop_frames(pages(7, 8, 9), frames[:2])
    assert (mirror.range(7, 10) != 0).tolist() == [False, True, True]


def test_hide_and_restore(mirror: Mirror, subscription: Subscription, memory: Memory) -> None:
    """Foreign entries are out of the table during a migration; those of pages that stayed and were not dropped come back."""
    frames = own_frames(memory, 1)
    mirror.program(0, words(SYSTEM, SYSTEM + 1, SYSTEM + 2, SYSTEM + 3))
    mirror.program_own(pages(4), frames, np.array([True]))
    hidden = mirror.hide(0, 5)
    assert (mirror.range(0, 5) != 0).tolist() == [False, False, False, False, True]
    mirror.drop(1, 2)
    mirror.restore(hidden, pages(2))
    assert (mirror.range(0, 5) != 0).tolist() == [True, False, False, True, True]
    assert frames_of(mirror.range(0, 1)).tolist() == [SYSTEM]


def test_a_migration_makes_other_words_stale(mirror: Mirror, subscription: Subscription) -> None:
    """Words under way for pages whose entries a migration hides may not be programmed: they may lead to what is leaving."""
    mirror.program(0, words(SYSTEM))
    watch = mirror.watch(0, 1)
    hidden = mirror.hide(0, 4)
    assert not mirror.is_current(subscription, 3, watch, words(SYSTEM))
    mirror.restore(hidden, pages())
    assert mirror.mapped_count() == 1


def test_clear_forgets_everything(mirror: Mirror, subscription: Subscription) -> None:
    """After close or fencing there is no entry, and nothing under way may be programmed."""
    mirror.program(1 << 34, words(SYSTEM))
    watch = mirror.watch(0, 1)
    mirror.clear()
    assert mirror.mapped_count() == 0
    assert not mirror.is_current(subscription, 3, watch, words(SYSTEM))


def test_table_leads_to_frames_of_the_highest_zone(mirror: Mirror) -> None:
    """48-bit frame numbers survive."""
    frame = (4095 << ZONE_SHIFT) | ((1 << ZONE_SHIFT) - 1)
    mirror.program(0, words(frame))
    assert frames_of(mirror.range(0, 1)).tolist() == [frame]
