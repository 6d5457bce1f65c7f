"""VMAs: split, merge, gaps (mm/vma.c)."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmmnet.errors import KernelError
from hmmnet.host.mm.filemap import File
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.vma import PAGES_TOP, VM_EXEC, VM_READ, VM_WRITE, Vma, VmaTree, protection_flags

RW = VM_READ | VM_WRITE


def tree_of(*vmas: Vma) -> VmaTree:
    tree = VmaTree()
    for vma in vmas:
        tree.add(vma)
    return tree


def shape(tree: VmaTree) -> list[tuple[int, int, int]]:
    return [(vma.start, vma.end, vma.flags) for vma in tree.all()]


def test_protection_names() -> None:
    """Letters in any order, or none; anything else is EINVAL."""
    assert protection_flags("rw") == RW
    assert protection_flags("xr") == VM_READ | VM_EXEC
    assert protection_flags("none") == 0
    for bad in ("", "q", "rq"):
        with pytest.raises(KernelError, match="EINVAL"):
            protection_flags(bad)


def test_neighbours_merge_on_both_sides() -> None:
    """A mapping that closes a gap between two like it becomes one with them."""
    tree = tree_of(Vma(10, 20, RW, 10), Vma(30, 40, RW, 30), Vma(20, 30, RW, 20))
    assert shape(tree) == [(10, 40, RW)]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Vma(20, 30, VM_READ, 20), id="other rights"),
        pytest.param(Vma(20, 30, RW, 5), id="pgoff not consecutive"),
        pytest.param(Vma(20, 30, RW, 20, file=File(PhysicalMemory(), 4096)), id="a file"),
        pytest.param(Vma(20, 30, RW, 20, anon=2), id="another anon_vma"),
        pytest.param(Vma(21, 30, RW, 21), id="a hole between"),
    ],
)
def test_what_differs_stays_apart(other: Vma) -> None:
    """Neighbours merge only if they are equal in everything that is kept."""
    assert len(tree_of(Vma(10, 20, RW, 10, anon=1), other)) == 2


def test_anon_vma_is_taken_over_by_a_merge() -> None:
    """One untouched side takes the anon_vma of the other."""
    tree = tree_of(Vma(10, 20, RW, 10), Vma(20, 30, RW, 20, anon=7))
    assert [vma.anon for vma in tree.all()] == [7]


def test_update_splits_and_merges_back() -> None:
    """Changing the rights of the middle makes three; changing them back makes one."""
    tree = tree_of(Vma(10, 40, RW, 10))

    def with_flags(flags: int):  # type: ignore[no-untyped-def]
        def change(vma: Vma) -> Vma:
            vma.flags = flags
            return vma

        return change

    tree.update(20, 30, with_flags(VM_READ))
    assert shape(tree) == [(10, 20, RW), (20, 30, VM_READ), (30, 40, RW)]
    assert [vma.pgoff for vma in tree.all()] == [10, 20, 30]
    tree.update(20, 30, with_flags(RW))
    assert shape(tree) == [(10, 40, RW)]


def test_remove_splits_at_both_ends() -> None:
    """A removed middle leaves two, and the pieces that went are returned."""
    tree = tree_of(Vma(10, 40, RW, 10), Vma(50, 60, VM_READ, 50))
    gone = tree.remove(35, 55)
    assert [(vma.start, vma.end) for vma in gone] == [(35, 40), (50, 55)]
    assert shape(tree) == [(10, 35, RW), (55, 60, VM_READ)]


def test_find_and_overlap() -> None:
    """Lookups at every edge."""
    tree = tree_of(Vma(10, 20, RW, 10), Vma(30, 40, VM_READ, 30))
    assert [tree.find(page) is None for page in (9, 10, 19, 20, 29, 30, 39, 40)] == [True, False, False, True, True, False, False, True]
    assert [vma.start for vma in tree.overlapping(19, 31)] == [10, 30]
    assert tree.overlapping(20, 30) == tree.overlapping(15, 15) == tree.remove(15, 15) == []
    assert tree.covered_until(10, 35) == 20
    assert tree.covered_until(10, 20) == 20
    assert tree.covered_until(25, 35) == 25


def test_gaps_are_taken_from_the_top() -> None:
    """As get_unmapped_area does; huge sizes are aligned; no room is None."""
    tree = VmaTree()
    first = tree.find_gap(3)
    assert first == PAGES_TOP - 3
    tree.add(Vma(first, first + 3, RW, first))
    huge = tree.find_gap(512)
    assert huge is not None
    assert huge % 512 == 0
    tree.add(Vma(huge, huge + 512, RW, huge))
    assert tree.find_gap(1) == first - 1
    assert tree.find_gap(PAGES_TOP) is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(("map", "unmap", VM_READ, RW)), st.integers(16, 60), st.integers(1, 12)), max_size=30))
def test_tree_equals_a_dictionary(steps: list[tuple[object, int, int]]) -> None:
    """Page by page the tree says what a dictionary says, and no two neighbours could be one."""
    tree = VmaTree()
    pages: dict[int, int] = {}
    for what, start, count in steps:
        if what in {"unmap", "map"}:
            tree.remove(start, start + count)
            for page in range(start, start + count):
                pages.pop(page, None)
        if what == "map":
            tree.add(Vma(start, start + count, RW, start))
            pages.update(dict.fromkeys(range(start, start + count), RW))
        if isinstance(what, int):

            def change(vma: Vma, flags: int = what) -> Vma:
                vma.flags = flags
                return vma

            tree.update(start, start + count, change)
            pages.update({page: what for page in range(start, start + count) if page in pages})
        assert {page: vma.flags for vma in tree.all() for page in range(vma.start, vma.end)} == pages
        vmas = tree.all()
        assert not any(left.merges_with(right) for left, right in pairwise(vmas))
