"""The history checker: what it must accept, and what it must name."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from hmmnet.campaign.history import NEVER, ROWS, Clock, History, Words


def words(*values: int) -> Words:
    return np.array(values, np.uint64)


def test_a_load_returns_the_latest_store() -> None:
    """Zero at first; then what was stored; what was overwritten is wrong, and is named with its word."""
    history = History(Clock(), 4)
    load = history.load_begins(0, 4)
    assert history.load_ends(load, words(0, 0, 0, 0)) is None
    history.store_ends(history.store_begins(1, words(11, 12)))
    assert history.load_ends(history.load_begins(0, 4), words(0, 11, 12, 0)) is None
    history.store_ends(history.store_begins(2, words(22)))
    wrong = history.load_ends(history.load_begins(0, 4), words(0, 11, 12, 0))
    assert wrong is not None
    assert (wrong.word, wrong.value) == (2, 12)
    assert "overwritten" in wrong.why
    assert "0x16" in wrong.why


def test_overlapping_accesses_may_go_either_way_but_only_one_way() -> None:
    """During a store a load may return either; once the new value was seen, the old one is wrong, before the store has ended, too."""
    history = History(Clock(), 1)
    store = history.store_begins(0, words(1))
    assert history.load_ends(history.load_begins(0, 1), words(0)) is None
    assert history.load_ends(history.load_begins(0, 1), words(1)) is None
    wrong = history.load_ends(history.load_begins(0, 1), words(0))
    assert wrong is not None
    assert "0x1 before" in wrong.why
    history.store_ends(store)


def test_two_readers_must_agree_on_the_order_of_two_stores() -> None:
    """Two stores at once: one reader sees them in one order, another in the other (a coherence violation)."""
    history = History(Clock(), 1)
    first, second = history.store_begins(0, words(1)), history.store_begins(0, words(2))
    for value in (1, 2):
        assert history.load_ends(history.load_begins(0, 1), words(value)) is None
    assert history.load_ends(history.load_begins(0, 1), words(1)) is not None
    history.store_ends(first)
    history.store_ends(second)


def test_what_is_being_stored_is_not_settled() -> None:
    """Though nobody else is there, and other words are; when it has ended it is, unless it failed."""
    for certain in (True, False):
        history = History(Clock(), 2)
        store = history.store_begins(0, words(5))
        assert history.settled(0, 2)[1].tolist() == [False, True]
        history.store_ends(store, certain=certain)
        assert history.settled(0, 2)[1].tolist() == [certain, True]
        assert history.settled(0, 2)[0].tolist() == [5 * certain, 0]


def test_a_failed_store_has_happened_or_not() -> None:
    """Both are right, but it is one of them from when its error was told; nothing of it comes after another store."""
    for seen in (0, 5):
        history = History(Clock(), 1)
        history.store_ends(history.store_begins(0, words(5)), certain=False)
        assert history.load_ends(history.load_begins(0, 1), words(seen)) is None
        assert history.load_ends(history.load_begins(0, 1), words(5 - seen)) is not None
        history.store_ends(history.store_begins(0, words(6)))
        assert history.load_ends(history.load_begins(0, 1), words(5)) is not None


def test_what_nobody_knows_is_not_judged_until_it_is_known_again() -> None:
    """A wild store silences its words; a known store that begins later ends that, and a store that went on meanwhile still counts."""
    history = History(Clock(), 2)
    slow = history.store_begins(0, words(9))
    history.wild_begins(0, 1)
    history.wild_ends(0, 1)
    assert history.load_ends(history.load_begins(0, 1), words(12345)) is None
    assert not history.settled(0, 1)[1][0]
    history.store_ends(history.store_begins(0, words(7)))
    assert history.load_ends(history.load_begins(0, 1), words(12345)) is not None
    assert history.load_ends(history.load_begins(0, 1), words(7)) is None
    history.store_ends(slow)
    assert history.load_ends(history.load_begins(0, 1), words(9)) is None


def test_more_stores_at_once_than_it_can_follow_silence_the_word() -> None:
    """Rather no word than a false one; later it is judged again."""
    history = History(Clock(), 1)
    stores = [history.store_begins(0, words(i + 1)) for i in range(ROWS + 1)]
    assert history.load_ends(history.load_begins(0, 1), words(77)) is None
    for store in stores:
        history.store_ends(store)
    for value in (100, 101):
        history.store_ends(history.store_begins(0, words(value)))
    assert history.load_ends(history.load_begins(0, 1), words(77)) is not None


def test_a_store_that_is_forgotten_silences_until_it_has_ended() -> None:
    """There was no room for it: a known store that begins and ends meanwhile does not make the word known, for the first may land later."""
    history = History(Clock(), 1)
    stores = [history.store_begins(0, words(i + 1)) for i in range(ROWS + 1)]
    history.store_ends(history.store_begins(0, words(100)))
    for store in stores[1:]:
        history.store_ends(store)
    assert history.load_ends(history.load_begins(0, 1), words(1)) is None
    history.store_ends(stores[0])
    history.store_ends(history.store_begins(0, words(101)))
    history.store_ends(history.store_begins(0, words(102)))
    assert history.load_ends(history.load_begins(0, 1), words(1)) is not None


def test_a_load_across_such_a_silence_is_not_judged() -> None:
    """It began before the word was silenced and ends after it is known again: what it returns may be forgotten."""
    history = History(Clock(), 1)
    oldest = history.load_begins(0, 1)
    for value in range(1, ROWS):
        history.store_ends(history.store_begins(0, words(value)))
    load = history.load_begins(0, 1)
    history.store_ends(history.store_begins(0, words(50)))
    history.load_fails(oldest)
    history.store_ends(history.store_begins(0, words(51)))
    assert history.load_ends(history.load_begins(0, 1), words(77)) is not None
    assert history.load_ends(load, words(ROWS - 1)) is None


def test_settled_words() -> None:
    """One value, when nothing is under way and no other store may come later."""
    history = History(Clock(), 3)
    history.store_ends(history.store_begins(0, words(1, 2)))
    under_way = history.store_begins(1, words(3))
    values, sure = history.settled(0, 3)
    assert values.tolist()[0] == 1
    assert sure.tolist() == [True, False, True]
    history.store_ends(under_way)
    assert history.settled(1, 1)[0].tolist() == [3]


def test_true_registers_are_never_accused() -> None:
    """Random accesses of true registers, each taking effect somewhere between begin and end: no word is wrong. A stale one always is."""
    for seed in range(60):
        history, memory, value = History(Clock(), 3), [0, 0, 0], 0
        under_way: list[list[Any]] = []
        random = Random(seed)
        for _ in range(300):
            word = random.randrange(3)
            if random.random() < 0.4 and len(under_way) < 5:
                value += 1
                kind = random.choice("ls")
                mark: Any = history.load_begins(word, 1) if kind == "l" else history.store_begins(word, words(value))
                under_way.append([kind, word, value, mark, None])
            elif under_way:
                access = random.choice(under_way)
                kind, word, stored, mark, effect = access
                if effect is None:
                    if kind == "s":
                        memory[word] = stored
                    access[4] = memory[word]
                else:
                    under_way.remove(access)
                    if kind == "s":
                        history.store_ends(mark, certain=random.random() < 0.8)
                    else:
                        assert history.load_ends(mark, words(effect)) is None, f"seed {seed}"


def test_what_is_forced_before_a_forgotten_value_is_forgotten_with_it() -> None:
    """Three stores, of which a reader saw the first one last: the second stood before it, however many stores come meanwhile."""
    for certain in (True, False):
        history = History(Clock(), 1)
        first, second = history.store_begins(0, words(1)), history.store_begins(0, words(2))
        history.store_ends(first)
        third = history.store_begins(0, words(3))
        history.store_ends(second, certain=certain)
        load = history.load_begins(0, 1)
        history.store_ends(third)
        assert history.load_ends(load, words(1)) is None  # so: 2, 1, 3
        late = history.load_begins(0, 1)
        history.store_begins(0, words(4))
        wrong = history.load_ends(late, words(2))
        assert wrong is not None
        assert "overwritten before" in wrong.why


@dataclass
class Access:
    """One store or load of a word, and the value; one that is under way, or has failed, need not have happened."""

    store: bool
    value: int
    began: int
    ended: int = NEVER
    happened: bool = False


def explained(accesses: list[Access]) -> bool:
    """Whether some order of all that happened, and of any of the others, gives every load the store before it: by trying them all."""
    tried: set[tuple[frozenset[int], int]] = set()

    def goes_on(done: frozenset[int], value: int) -> bool:
        left = [i for i in range(len(accesses)) if i not in done]
        if not any(accesses[i].happened for i in left):
            return True
        if (done, value) in tried:
            return False
        tried.add((done, value))
        for i in left:
            one = accesses[i]
            too_late = any(one.ended < accesses[j].began for j in done)
            too_early = any(accesses[j].happened and accesses[j].ended < one.began for j in left)
            if not too_late and not too_early and (one.store or one.value == value) and goes_on(done | {i}, one.value):
                return True
        return False

    return goes_on(frozenset(), 0)


def test_it_accuses_exactly_what_no_order_explains() -> None:
    """Up to ten accesses of one word, four at once, of which some stores fail and some loads lie: as trying all orders judges them."""
    verdicts = [0, 0]
    for seed in range(3000):
        random, history, ended, under_way = Random(seed), History(Clock(), 1), list[Access](), list[tuple[Access, Any]]()
        left, stored = random.randrange(3, 11), 0
        while left or under_way:
            if left and (not under_way or (random.random() < 0.5 and len(under_way) < 4)):
                left -= 1
                store = random.random() < 0.45
                stored += store
                mark: Any = history.store_begins(0, words(stored)) if store else history.load_begins(0, 1)
                under_way.append((Access(store, stored, mark.began), mark))
                continue
            one, mark = under_way.pop(random.randrange(len(under_way)))
            ended.append(one)
            if one.store:
                one.happened = random.random() < 0.85
                history.store_ends(mark, certain=one.happened)
                one.ended = history.clock.now
                continue
            one.value, one.happened = random.randrange(max(0, stored - 3), stored + 1), True
            wrong = history.load_ends(mark, words(one.value))
            one.ended = history.clock.now
            right = explained(ended + [other for other, _ in under_way if other.store])
            assert (wrong is None) == right or not history._never_wild, f"seed {seed}: {ended}"
            verdicts[right] += 1
            if wrong is not None:
                break
    assert min(verdicts) > 500


def test_the_short_ways_judge_as_the_long_way_does() -> None:
    """Of the same accesses, some with wrong answers, by a history that takes them where nothing overlaps, and one that never does."""
    random, verdicts = Random(3), [0, 0]
    for _ in range(400):
        short, long = (History(Clock(), 4) for _ in range(2))
        long._never_wild = False
        stored: list[int] = [0]
        stores: list[list[Any]] = []
        loads: list[list[Any]] = []
        wrong: list[Any] = [None, None]
        for value in range(1, 30):
            first, count = random.choice(((0, 4), (0, 2), (1, 3)))
            what = random.choice(("store", "store", "store_begins", "store_ends", "load", "load", "load_begins", "load_ends"))
            if what in {"store", "store_begins"}:
                stored.append(value)
                marks = [history.store_begins(first, np.full(count, value, np.uint64)) for history in (short, long)]
                stores.append(marks)
            elif what in {"load", "load_begins"}:
                loads.append([history.load_begins(first, count) for history in (short, long)])
            if stores and what in {"store", "store_ends"}:
                marks, certain = stores.pop(), random.random() < 0.9
                for history, mark in zip((short, long), marks, strict=True):
                    history.store_ends(mark, certain=certain)
            if loads and what in {"load", "load_ends"}:
                both = loads.pop(0)
                got = np.full(both[0].count, random.choice(stored[-3:]), np.uint64)
                wrong = [history.load_ends(mark, got) for history, mark in zip((short, long), both, strict=True)]
                verdicts[wrong[1] is None] += 1
                assert (wrong[0] is None) == (wrong[1] is None)
                if wrong[1] is not None:
                    break
        assert [mine.tolist() for mine in short.settled(0, 4)] == [theirs.tolist() for theirs in long.settled(0, 4)] or wrong[1] is not None
    assert min(verdicts) > 100, "both happen"


def test_a_look_at_what_is_settled_hides_no_stale_load() -> None:
    """A store of what is there already, at which only `settled` has looked meanwhile, leaves one value, of which loads force something."""
    history = History(Clock(), 2)
    history.store_ends(history.store_begins(1, words(2)))
    again = history.store_begins(1, words(2))
    history.load_begins(0, 1)
    history.settled(1, 1)
    history.store_ends(again)
    history.store_ends(history.store_begins(0, words(4, 5)))
    wrong = history.load_ends(history.load_begins(1, 1), words(2))
    assert wrong is not None
    assert "overwritten with 0x5" in wrong.why
