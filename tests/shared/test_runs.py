"""The allocator never hands a frame out twice, forgets none, and prefers few runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmmnet.pages import run_bounds
from hmmnet.runs import MERGE_ONE_BY_ONE_MAX, RunAllocator

BASE, COUNT = 1 << 36, 256


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 90), st.integers(0, 2**32)), max_size=40))
def test_frames_are_handed_out_once(steps: list[tuple[bool, int, int]]) -> None:
    """Frames out plus frames free are all frames, whatever the history; those said to be zero were never out before."""
    allocator, out, touched = RunAllocator(BASE, COUNT), set[int](), set[int]()
    for take, count, chance in steps:
        if take:
            found = allocator.allocate(count)
            assert (found is None) == (count > COUNT - len(out))
            if found is not None:
                frames = [int(frame) for frame in found.frames]
                assert len(set(frames)) == count
                assert not out & set(frames)
                assert not touched & set(frames[len(frames) - found.zeroed :])
                out |= set(frames)
                touched |= set(frames)
        else:
            back = np.random.default_rng(chance).permutation(sorted(out))[:count].astype(np.uint64)
            allocator.free(back)
            out -= {int(frame) for frame in back}
        assert allocator.used_count == len(out)
        assert allocator.free_count == COUNT - len(out)


def test_freed_runs_merge() -> None:
    """Freed in any order, one by one or many at once, neighbours become one run again."""
    for step in (1, 3):
        allocator = RunAllocator(BASE, 4 * MERGE_ONE_BY_ONE_MAX)
        first = allocator.allocate(4 * MERGE_ONE_BY_ONE_MAX)
        assert first is not None
        for start in range(step):
            allocator.free(first.frames[start::step][::-1])
        assert allocator.free_runs == 1
        again = allocator.allocate(4 * MERGE_ONE_BY_ONE_MAX)
        assert again is not None
        assert len(run_bounds(again.frames)) == 2


def test_a_fitting_run_beats_fragments() -> None:
    """One run that fits is taken whole, though smaller pieces lie before it."""
    allocator = RunAllocator(BASE, 64)
    taken = allocator.allocate(64)
    assert taken is not None
    allocator.free(taken.frames[0:4])
    allocator.free(taken.frames[10:30])
    found = allocator.allocate(16)
    assert found is not None
    assert len(run_bounds(found.frames)) == 2


@pytest.mark.parametrize("frames", [[BASE + 5], [BASE - 1], [BASE, BASE]])
def test_wrong_frees_are_caught(frames: list[int]) -> None:
    """Frames that are not out are our own bug, and named as such."""
    allocator = RunAllocator(BASE, 64)
    taken = allocator.allocate(4)
    assert taken is not None
    with pytest.raises(AssertionError):
        allocator.free(np.array(frames, dtype=np.uint64))
        allocator.free(taken.frames)


def test_too_many_is_none() -> None:
    """An allocation that cannot be had leaves everything as it was."""
    allocator = RunAllocator(BASE, 8)
    assert allocator.allocate(9) is None
    assert allocator.free_count == 8


def test_aligned_runs_are_had_together() -> None:
    """From free runs first, as many as each holds, then from frames never used; what is cut off stays free."""
    runs = RunAllocator(3, 4096)
    first = runs.allocate(2045)
    assert first is not None
    runs.free(first.frames[97:1700])  # frames 100 to 1702: two aligned runs of 512
    firsts, fresh = runs.allocate_aligned_runs(512, 4)
    assert firsts.tolist() == [512, 1024, 2048, 2560]
    assert fresh == 2
    assert runs.free_count == 4096 - 2045 + 1603 - 4 * 512
    again, fresh = runs.allocate_aligned_runs(512, 9)
    assert (again.tolist(), fresh) == ([3072, 3584], 2)
    assert runs.allocate_aligned_runs(512, 1)[0].tolist() == []
    for one in (*firsts.tolist(), *again.tolist()):
        runs.free_run(one, one + 512)
    assert runs.free_count == 4096 - 2045 + 1603
