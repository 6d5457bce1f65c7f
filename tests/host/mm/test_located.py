"""Frames whose places were found out once answer as those do that look each time."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.located import every_row, rows_in
from hmmnet.pages import HUGE_PAGES

from .machine import words


def memory_with(*nodes: int) -> PhysicalMemory:
    memory = PhysicalMemory()
    for i, pages in enumerate(nodes):
        memory.add_node(f"node{i}", pages)
    for zone in memory.nodes:
        zone.mapcount[:] = np.arange(zone.count) % 7
        zone.index[:] = np.arange(zone.count) + 1000 * zone.number
    return memory


def lists(memory: PhysicalMemory) -> list[list[int]]:
    """Frames that are one run, lie scattered, or in several zones."""
    random, bases = Random(7), [zone.base for zone in memory.nodes]
    run = list(range(bases[0] + 5, bases[0] + 40))
    scattered = random.sample(range(bases[1], bases[1] + 64), 20)
    return [run, scattered, [*scattered, *random.sample(run, 10)]]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_located_frames_tell_what_each_frame_tells(which: int) -> None:
    """Fields, the largest, bits in any, one field to look at: against one look a frame."""
    memory = memory_with(64, 64)
    frames = lists(memory)[which]
    each = [(memory.zone(frame), frame - memory.zone(frame).base) for frame in frames]
    there = memory.located(words(*frames))
    assert len(there) == len(frames)
    assert there.is_one_run == (which == 0)
    mapcount, index = there.fields("mapcount", "index")
    assert mapcount.tolist() == there.seen("mapcount").tolist() == [int(zone.mapcount[at]) for zone, at in each]
    assert index.tolist() == [int(zone.index[at]) for zone, at in each]
    assert there.most("mapcount") == max(mapcount.tolist())
    assert there.bits_in_any("mapcount") == int(np.bitwise_or.reduce(mapcount))


@pytest.mark.parametrize("which", [0, 1])
def test_some_of_located_frames_are_located(which: int) -> None:
    """No second look is needed for a part; all of them are themselves."""
    memory = memory_with(64, 64)
    frames = words(*lists(memory)[which])
    there = memory.located(frames)
    assert there.chosen(every_row(len(frames))) is there
    rows = np.array([1, 4, 5, 11])
    assert there.chosen(rows).fields("index")[0].tolist() == memory.field(frames[rows], "index").tolist()
    assert there.chosen(rows).frames.tolist() == frames[rows].tolist()


def test_frames_of_several_zones_are_not_chosen_from() -> None:
    """Who has those locates what it chose anew."""
    memory = memory_with(64, 64)
    with pytest.raises(AssertionError, match="several zones"):
        memory.located(words(*lists(memory)[2])).chosen(np.array([0, 1]))


def test_folded_folios_are_seen_page_by_page_and_written_out_for_groups() -> None:
    """Who looks sees each frame's state; who changes them one by one has the folio unfolded first."""
    memory = memory_with(4 * HUGE_PAGES)
    head = memory.allocate_folio()
    assert head is not None
    memory.map_new_folio(head, 3, 7)
    zone, frames = memory.nodes[0], np.arange(head, head + HUGE_PAGES, dtype=np.uint64)
    there = memory.located(frames)
    assert set(there.seen("mapcount").tolist()) == {1}
    assert there.fields("index")[0].tolist() == list(range(7, 7 + HUGE_PAGES))
    assert zone.folded_count == 1
    for _, _, where in there.groups():
        assert set(zone.mapcount[where].tolist()) == {1}
    assert zone.folded_count == 0


@pytest.mark.parametrize("flags", [[], [0, 0], [1, 1, 1], [0, 1, 0, 1]])
def test_rows_in_is_flatnonzero(flags: list[int]) -> None:
    """For none, all, and some."""
    some = np.array(flags, np.bool_)
    assert rows_in(some).tolist() == np.flatnonzero(some).tolist()


def test_more_rows_than_are_kept_are_made() -> None:
    """There is no limit to how many."""
    assert every_row((1 << 16) + 1)[-1] == 1 << 16
