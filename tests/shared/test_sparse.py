"""A sparse table is a dictionary with zero as its default, for single pages, ranges and scattered pages alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmmnet.pages import FEW, PAGES_MAX
from hmmnet.sparse import LEAF_PAGES, SparseTable

NEAR_EDGES = st.sampled_from([0, 1, 511, 512, LEAF_PAGES - 2, LEAF_PAGES - 1, LEAF_PAGES, 2 * LEAF_PAGES - 1, PAGES_MAX - 9])
STEPS = st.lists(
    st.tuples(st.sampled_from(["set", "write", "scatter", "clear"]), NEAR_EDGES, st.integers(1, 2 * FEW), st.integers(1, 99)), max_size=25
)


@settings(deadline=None)
@given(STEPS)
def test_equals_a_dictionary(steps: list[tuple[str, int, int, int]]) -> None:
    """Any history, read back in every way there is."""
    table, model = SparseTable(), dict[int, int]()
    for what, page, count, value in steps:
        pages = list(range(page, min(page + count, PAGES_MAX)))
        values = [value + i for i in range(len(pages))]
        if what == "set":
            table.set(page, value)
            model[page] = value
        elif what == "clear":
            table.clear(page, page + len(pages))
            for cleared in pages:
                model.pop(cleared, None)
        elif what == "write":
            table.write(page, np.array(values, dtype=np.uint64))
            model.update(zip(pages, values, strict=True))
        else:
            table.scatter(np.array(pages[::-1], dtype=np.uint64), np.array(values, dtype=np.uint64))
            model.update(zip(pages[::-1], values, strict=True))
    for _, page, count, _ in steps:
        pages = list(range(max(page - 3, 0), min(page + count + 3, PAGES_MAX)))
        expected = [model.get(each, 0) for each in pages]
        assert [table.get(each) for each in pages] == expected
        assert table.read(pages[0], pages[-1] + 1).tolist() == expected
        assert table.gather(np.array(pages, dtype=np.uint64)).tolist() == expected
    found = {first + int(i): int(part[i]) for first, part in table.present(0, PAGES_MAX) for i in np.flatnonzero(part)}
    assert found == {page: value for page, value in model.items() if value}
    assert table.occupied(0, PAGES_MAX).tolist() == sorted(found)
    for _, page, _, _ in steps:
        end = min(page + LEAF_PAGES // 2, PAGES_MAX)
        assert table.occupied(page, end).tolist() == sorted(each for each in found if page <= each < end)


def test_whole_leaves_are_given_back() -> None:
    """Clearing everything leaves nothing behind."""
    table = SparseTable()
    table.set(5, 1)
    table.set(LEAF_PAGES * 3 + 7, 2)
    assert table.leaf_count == 2
    table.clear(0, PAGES_MAX)
    assert table.leaf_count == 0


def test_views_are_the_table() -> None:
    """A view within one leaf writes through; across leaves there is none."""
    table = SparseTable()
    view = table.view(10, 20)
    assert view is not None
    view[3] = 42
    assert table.get(13) == 42
    assert table.view(LEAF_PAGES - 1, LEAF_PAGES + 1) is None


@settings(deadline=None)
@given(st.lists(st.integers(0, 4 * 512), min_size=1, max_size=80), st.integers(0, 3))
def test_pages_known_to_ascend_are_written_and_marked_alike(offsets: list[int], leaves: int) -> None:
    """Densely or sparsely, in one leaf or several: the entries are the same, and every block written is marked as such."""
    pages = np.unique(np.array(offsets, np.uint64) * np.uint64(1 + leaves * LEAF_PAGES // 1000))
    tables = SparseTable(), SparseTable()
    for table, ascend in zip(tables, (False, True), strict=True):
        table.take_touched()
        table.scatter(pages, pages + np.uint64(1), ascend=ascend)
    assert tables[0].gather(pages).tolist() == tables[1].gather(pages, ascend=True).tolist() == (pages + np.uint64(1)).tolist()
    told = [{first for first, _ in table.take_touched()[0]} for table in tables]
    assert told[0] <= told[1]
    assert tables[1].occupied(0, PAGES_MAX).tolist() == pages.tolist()


def test_a_few_pages_far_apart_mark_their_own_blocks_only() -> None:
    """Whoever checks the table does not look at the whole leaf for them."""
    table = SparseTable()
    table.scatter(np.array([3, 100_000], np.uint64), 1, ascend=True)
    assert len(table.take_touched()[0]) == 2


def test_who_changes_nothing_leaves_nothing_to_look_at() -> None:
    """Zeros that are cleared, and entries that are read, are no news for who checks the table; what is cleared is."""
    table = SparseTable()
    table.set(7, 42)
    table.take_touched()
    table.clear(8, 12)
    assert [part.tolist() for _, part in table.readable(6, 9)] == [[0, 42, 0]]
    assert not table.changed
    table.clear(6, 9)
    assert [first for first, _ in table.take_touched()[0]] == [0]
    assert table.get(7) == 0


def test_where_there_is_no_leaf_zeros_are_read() -> None:
    """In page order, and none is made for it."""
    table = SparseTable()
    table.set(LEAF_PAGES, 42)
    found = [(first, len(part), part[-1:].tolist()) for first, part in table.readable(LEAF_PAGES - 2, LEAF_PAGES + 1)]
    assert found == [(LEAF_PAGES - 2, 2, [0]), (LEAF_PAGES, 1, [42])]
    assert table.leaf_count == 1


@pytest.mark.parametrize("count", [3, 2 * FEW])
def test_values_are_as_many_as_pages(count: int) -> None:
    """However few: a slip of lengths is no table that is half written."""
    with pytest.raises(ValueError, match=r"shorter|broadcast|bounds|boolean|shape"):
        SparseTable().scatter(np.arange(count, dtype=np.uint64) * np.uint64(700), np.ones(count - 1, np.uint64))
