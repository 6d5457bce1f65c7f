"""Frames that wait for mirrors which hear of a change only at its end."""

from __future__ import annotations

import numpy as np

from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.gather import Gather
from hmmnet.host.mm.invariants import check_free
from hmmnet.pages import HUGE_PAGES

from .machine import words


def test_what_is_freed_waits_for_the_changes_of_that_moment() -> None:
    """A release waits for every change that was in progress, and for none that begins later."""
    gather, done = Gather(), list[str]()
    first = gather.begin()
    gather.hold(lambda: done.append("a"))
    second = gather.begin()
    gather.hold(lambda: done.append("b"))
    gather.end(second)
    assert done == []
    third = gather.begin()
    gather.end(first)
    assert done == ["a", "b"]
    gather.hold(lambda: done.append("c"))
    assert gather.holds
    assert gather.waiting == 1
    gather.end(third)
    assert done == ["a", "b", "c"]
    assert not gather.holds


def test_frames_come_back_to_the_allocator_afterwards() -> None:
    """Single frames, lists and whole folios."""
    gather = Gather()
    memory = PhysicalMemory(gather=gather)
    memory.add_node("node0", 4 * HUGE_PAGES)
    free = memory.nodes[0].allocator.free_count
    one, some, head = memory.allocate_bare(), memory.allocate(5), memory.allocate_folio()
    assert one is not None
    assert some is not None
    assert head is not None
    ticket = gather.begin()
    memory.put_one(one)
    memory.put(some)
    memory.put_folios(words(head))
    assert memory.nodes[0].allocator.free_count == free - 6 - HUGE_PAGES
    assert memory.nodes[0].waiting == 6 + HUGE_PAGES
    check_free(memory.nodes[0])
    gather.end(ticket)
    assert memory.nodes[0].allocator.free_count == free
    assert memory.nodes[0].waiting == 0
    check_free(memory.nodes[0])
    late = gather.late(lambda frames: freed.extend(frames.tolist()))
    freed: list[int] = []
    late(words(7))
    ticket = gather.begin()
    late(np.array([8, 9], np.uint64))
    assert freed == [7]
    gather.end(ticket)
    assert freed == [7, 8, 9]
