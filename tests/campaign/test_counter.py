"""Words that are only added to: each wrong answer is named when no order of the accesses is left, and no right one ever."""

from __future__ import annotations

import math
from collections import Counter as Counts
from dataclasses import dataclass
from random import Random

from hmmnet.campaign.counter import Counter
from hmmnet.campaign.history import Clock


def test_counters() -> None:
    """Additions return each value once, in order; a value that was seen is never gone."""
    counter = Counter(Clock())
    assert counter.add_ends(counter.add_begins(), 0) == ""
    first, second = counter.add_begins(), counter.add_begins()
    assert counter.add_ends(second, 1) == ""
    assert "one is lost" in counter.add_ends(first, 1)
    assert "seen before" in counter.load_ends(counter.clock.tick(), 0)
    assert "more than" in counter.load_ends(counter.clock.tick(), 99)


def test_an_addition_twice() -> None:
    """The second finds more than there can have been."""
    counter = Counter(Clock())
    assert counter.add_ends(counter.add_begins(), 0) == ""
    assert "done twice" in counter.add_ends(counter.add_begins(), 2)


def test_what_failed_counts_once_or_not_at_all() -> None:
    """Before its error, that is: who sees it later must have been able to see it before."""
    for value, right in ((1, True), (2, True), (0, False), (3, False)):
        counter = Counter(Clock())
        assert counter.add_ends(counter.add_begins(), 0) == ""
        counter.add_fails(counter.add_begins())
        assert (counter.is_over(value) == "") == right
    counter = Counter(Clock())
    counter.add_fails(counter.add_begins())
    assert counter.load_ends(counter.clock.tick(), 0) == ""
    assert counter.load_ends(counter.clock.tick(), 1) == "1 fits no order: no addition is left that can have found 0"


def test_who_shows_a_slot_that_nobody_can_have_taken_is_named() -> None:
    """A load sees both of two additions; the one of them that ends later says that it was the third."""
    counter = Counter(Clock())
    assert counter.add_ends(counter.add_begins(), 0) == ""
    second, began = counter.add_begins(), counter.clock.tick()
    assert counter.load_ends(began, 2) == ""
    counter.add_begins()
    assert counter.add_ends(second, 2) == "2 fits no order: no addition is left that can have found 1"


def test_what_was_refused_is_none() -> None:
    """It is not among those that may have been done."""
    counter = Counter(Clock())
    counter.add_refused(counter.add_begins())
    assert counter.load_ends(counter.clock.tick(), 1) == "1 is more than the 0 additions so far"
    assert counter.is_over(0) == ""


@dataclass(eq=False)
class Access:
    """`found` is what it returned; None: nobody knows, and an addition may have been done."""

    adds: bool
    began: int
    ended: float = math.inf
    found: int | None = None


def explained(accesses: list[Access], left: frozenset[int], count: int = 0) -> bool:
    """Whether some order of those that are `left` explains all that returned, the word being `count`. Tries all orders."""
    if all(accesses[one].found is None for one in left):
        return True
    for one in left:
        access = accesses[one]
        before = min((accesses[other].ended for other in left if other != one and accesses[other].found is not None), default=math.inf)
        if access.began < before and access.found in (None, count):
            late = {other for other in left if accesses[other].found is None and accesses[other].ended < access.began}
            if explained(accesses, left - {one} - late, count + access.adds):
                return True
    return False


def test_verdicts_are_those_of_all_orders() -> None:
    """Random histories of additions and loads that overlap, fail and lie: what is named is the first access without any order."""
    verdicts: Counts[bool] = Counts()
    for seed in range(6000):
        random, counter, count = Random(seed), Counter(Clock()), 0
        accesses: list[Access] = []
        under_way: list[tuple[Access, int | None]] = []
        while len(accesses) < 6 or under_way:
            if len(accesses) < 6 and random.random() < 0.5:
                adds = random.random() < 0.6
                access = Access(adds, counter.add_begins() if adds else counter.clock.tick())
                accesses.append(access)
                under_way.append((access, None))
                continue
            if not under_way:
                continue
            at = random.randrange(len(under_way))
            access, done = under_way[at]
            if done is None and random.random() < 0.6:  # it takes effect
                under_way[at] = access, count
                count += access.adds
                continue
            del under_way[at]
            if access.adds and (done is None or random.random() < 0.2):
                counter.add_fails(access.began)
                access.ended = counter.clock.now
                continue
            found = count if done is None else done
            if random.random() < 0.15:
                found = max(0, found + random.choice((-1, 1)))
            access.found = found
            wrong = (counter.add_ends if access.adds else counter.load_ends)(access.began, found)
            access.ended = counter.clock.tick()
            judged = [one for one in accesses if one.adds or one.found is not None]
            right = explained(judged, frozenset(range(len(judged))))
            assert (wrong == "") == right, f"seed {seed}: {wrong or 'nothing'}: {judged}"
            verdicts[right] += 1
            if wrong:
                break
    assert min(verdicts.values()) > 1000
