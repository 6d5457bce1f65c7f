"""The arithmetic of interval notifiers (semantics A6), without anything that waits."""

from __future__ import annotations

import errno
import random

import pytest

from hmmnet.errors import KernelError
from hmmnet.host.held import HeldPages
from hmmnet.host.notifier import SEQUENCE_FIRST, IntervalIndex, MmuNotifier, Subscription
from hmmnet.pages import PAGES_MAX

from .fakes import FakeLink

LINK = FakeLink("gpu0", 64)


def numbers(found: list[Subscription]) -> list[int]:
    return [subscription.number for subscription in found]


@pytest.mark.parametrize(("start", "end"), [(5, 5), (6, 5), (-1, 5), (0, PAGES_MAX + 1)])
def test_impossible_intervals_overflow(start: int, end: int) -> None:
    """An empty or wrapping interval is EOVERFLOW, as in the kernel."""
    with pytest.raises(KernelError) as caught:
        MmuNotifier().insert(start, end, LINK, 1)
    assert caught.value.code == errno.EOVERFLOW


def test_a_dying_address_space_takes_no_subscription() -> None:
    """EINVAL once the mm is being torn down."""
    core = MmuNotifier()
    core.dying = True
    with pytest.raises(KernelError) as caught:
        core.insert(0, 1, LINK, 1)
    assert caught.value.code == errno.EINVAL


def test_a_fresh_subscription_is_not_under_invalidation() -> None:
    """Inserted in a quiet mm it carries an odd value that is not the current one."""
    core = MmuNotifier()
    subscription = core.insert(0, 16, LINK, 1)
    assert subscription.sequence == SEQUENCE_FIRST - 1
    assert not core.must_wait(subscription)


def test_sequence_is_odd_while_an_overlapping_invalidation_runs() -> None:
    """Odd from start to end, even after, and larger than before."""
    core = MmuNotifier()
    subscription = core.insert(10, 20, LINK, 1)
    assert numbers(core.start(19, 30)) == [1]
    assert core.is_invalidating
    subscription.sequence = core.sequence
    assert core.must_wait(subscription)
    assert core.end()
    assert core.sequence == SEQUENCE_FIRST + 2
    assert not core.must_wait(subscription)


def test_an_invalidation_that_touches_nobody_leaves_the_sequence() -> None:
    """Ranges are half open: [20, 30) does not concern [10, 20)."""
    core = MmuNotifier()
    core.insert(10, 20, LINK, 1)
    assert core.start(20, 30) == []
    assert not core.is_invalidating
    assert not core.end()
    assert core.sequence == SEQUENCE_FIRST


def test_nested_invalidations_share_one_odd_period() -> None:
    """The sequence turns even only with the last end."""
    core = MmuNotifier()
    core.insert(0, 100, LINK, 1)
    core.start(0, 10)
    odd = core.sequence
    core.start(50, 60)
    assert core.sequence == odd
    assert not core.end()
    assert core.is_invalidating
    assert core.end()
    assert core.sequence == odd + 1


def test_an_insert_while_odd_is_deferred_and_its_first_reader_waits() -> None:
    """It is not called by nested invalidations, and is in the tree once the sequence is even."""
    core = MmuNotifier()
    core.insert(0, 100, LINK, 1)
    core.start(0, 10)
    late = core.insert(0, 100, LINK, 2)
    assert core.must_wait(late)
    assert numbers(core.start(0, 10)) == [1]
    core.end()
    core.end()
    assert not core.must_wait(late)
    assert numbers(core.start(0, 10)) == [1, 2]


def test_an_insert_during_an_unrelated_invalidation_makes_it_odd() -> None:
    """With nobody concerned before, the newcomer still waits: the invalidation may cover its range."""
    core = MmuNotifier()
    core.start(0, 10)
    newcomer = core.insert(0, 100, LINK, 1)
    assert core.is_invalidating
    assert core.must_wait(newcomer)
    assert core.end()
    assert not core.must_wait(newcomer)


def test_a_remove_while_odd_completes_when_even() -> None:
    """Until then the callback may still run; afterwards never."""
    core = MmuNotifier()
    subscription = core.insert(0, 100, LINK, 1)
    core.start(0, 10)
    pending = core.remove(subscription)
    assert pending == core.sequence
    core.end()
    assert core.sequence != pending
    assert core.start(0, 10) == []


def test_removing_a_deferred_insert_leaves_nothing() -> None:
    """Inserted and removed within one odd period, it never enters the tree."""
    core = MmuNotifier()
    core.insert(0, 100, LINK, 1)
    core.start(0, 10)
    late = core.insert(0, 100, LINK, 2)
    core.remove(late)
    core.end()
    assert numbers(core.start(0, 10)) == [1]


def test_remove_twice_is_harmless() -> None:
    """The second has nothing to do."""
    core = MmuNotifier()
    subscription = core.insert(0, 100, LINK, 1)
    assert core.remove(subscription) is None
    assert core.remove(subscription) is None


@pytest.mark.parametrize("seed", range(5))
def test_index_agrees_with_a_plain_search(seed: int) -> None:
    """Random inserts, removes and lookups of all lengths against a list."""
    chance = random.Random(seed)
    index, plain = IntervalIndex(), list[Subscription]()
    for number in range(300):
        start = chance.randrange(1 << 20)
        subscription = Subscription(number, start, start + 1 + chance.randrange(1 << chance.randrange(1, 20)), LINK, 1)
        index.add(subscription)
        plain.append(subscription)
        if chance.random() < 0.3:
            gone = plain.pop(chance.randrange(len(plain)))
            index.discard(gone)
        low = chance.randrange(1 << 20)
        high = low + 1 + chance.randrange(1 << 12)
        assert index.overlapping(low, high) == [found for found in plain if found.overlaps(low, high)]
        assert {found.number for found in index.around(low)} == {found.number for found in plain if found.overlaps(low, low + 1)}
    assert len(index) == len(plain)


@pytest.mark.parametrize("seed", range(20))
def test_passing_through_is_a_start_and_an_end(seed: int) -> None:
    """Where nobody has to be told: the same sequences as with both in turn. Where somebody has: nothing happened."""
    draw = random.Random(seed)
    short, long = MmuNotifier(), MmuNotifier()
    links = [FakeLink("gpu0", 64), FakeLink("gpu1", 65)]
    passed = refused = 0
    for _ in range(60):
        start = draw.randrange(64)
        end, link, own = start + draw.randrange(1, 16), draw.choice(links), draw.random() < 0.8
        held = draw.choice((None, ((start, end),), ((start, start + 1),), ()))
        for core in (short, long):
            made = core.insert(start, end, link, 1, own, None if held is None else HeldPages())
            for pages in held or ():
                made.hold(*pages)
        page, owner = draw.randrange(80), draw.choice((64, 65, 66))
        hears = [found for found in long.index.overlapping(page, page + 1) if not found.own or found.link.zone != owner]
        told = [found for found in hears if found.concerns(page, page + 1)]
        before = short.sequence
        if short.pass_through(page, owner):
            passed += 1
            assert not told
            long.start(page, page + 1)
            for found in hears:
                found.sequence = long.sequence
            long.end()
        else:
            refused += 1
            assert told
            assert short.sequence == before
        assert short.sequence == long.sequence
        assert [found.sequence for found in short.index.all()] == [found.sequence for found in long.index.all()]
    assert passed > 0
    assert refused > 0
    long.start(0, 1)
    assert not long.pass_through(1000, 64), "another invalidation is active"
