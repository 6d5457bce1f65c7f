"""What changed in a table since the last look: whoever wrote, and however; and nothing that did not."""

from __future__ import annotations

from random import Random

import numpy as np

from hmmnet.changes import Changes, Seen
from hmmnet.pages import PAGES_MAX
from hmmnet.sparse import LEAF_PAGES, SparseTable


def net(changes: Changes) -> dict[int, tuple[int, int]]:
    """By page, what it had and what it has, where that differs; entries come to the sum of what came and went."""
    before: dict[int, int] = {}
    now: dict[int, int] = {}
    for page, old, new in zip(*(words.tolist() for words in changes), strict=True):
        before[page] = before.get(page, 0) + old
        now[page] = now.get(page, 0) + new
    return {page: (before[page], now[page]) for page in before if before[page] != now[page]}


def write(table: SparseTable, random: Random) -> None:
    """One of the ways to write."""
    first = random.choice((0, LEAF_PAGES, 7 * LEAF_PAGES)) + random.choice((0, 500, 511, 1024, LEAF_PAGES - 3))
    some, value = first + random.randrange(5), random.randrange(3)
    way = random.randrange(7)
    if way == 0:
        table.set(some, value)
    elif way == 1:
        table.write(first, np.full(9, value, np.uint64))
    elif way == 2:
        table.scatter(np.array([some, some + 700], np.uint64), value)
    elif way == 3:
        table.clear(first, some + 1)
    elif way == 4:
        table.clear(first // LEAF_PAGES * LEAF_PAGES, (first // LEAF_PAGES + 1) * LEAF_PAGES)
    elif way == 5:
        for _, part in table.segments(first, some + 1):
            part[:] = value
    else:
        for _, part in table.present(0, PAGES_MAX):
            part[part != 0] = value


def test_changes_are_what_differs_from_the_last_look() -> None:
    """By every way to write, several at once, leaves given back and made anew."""
    random, table = Random(1), SparseTable()
    seen = Seen(table)
    had: dict[int, int] = {}
    for _ in range(400):
        for _ in range(random.randrange(4)):
            write(table, random)
        pages = table.occupied(0, PAGES_MAX)
        has = dict(zip(pages.tolist(), table.gather(pages).tolist(), strict=True))
        differs = {page: (had.get(page, 0), has.get(page, 0)) for page in had.keys() | has.keys() if had.get(page) != has.get(page)}
        assert net(seen.changes()) == differs
        assert sorted(seen.all().tolist()) == sorted(has.values())
        had = has


def test_what_was_there_before_the_first_look_is_a_change() -> None:
    """Also if somebody else has looked before."""
    table = SparseTable()
    table.set(5, 7)
    assert net(Seen(table).changes()) == net(Seen(table).changes()) == {5: (0, 7)}


def test_reading_is_no_change_and_no_mark() -> None:
    """Nor is a write of what is there."""
    table = SparseTable()
    table.write(3, np.array([1, 2], np.uint64))
    seen = Seen(table)
    seen.changes()
    table.read(0, 2 * LEAF_PAGES)
    table.gather(np.array([3, 9], np.uint64))
    table.occupied(0, PAGES_MAX)
    list(table.existing(0, PAGES_MAX))
    assert table.take_touched() == ([], set())
    table.set(3, 1)
    assert net(seen.changes()) == {}


def test_touched_pages_are_those_with_entries() -> None:
    """For who keeps no copy."""
    table = SparseTable()
    table.write(510, np.array([1, 0, 3], np.uint64))
    assert sorted(table.take_touched_pages().tolist()) == [510, 512]
    assert table.take_touched_pages().tolist() == []
    table.touch()
    assert sorted(table.take_touched_pages().tolist()) == [510, 512]
