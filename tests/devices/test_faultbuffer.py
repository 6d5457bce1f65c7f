"""The fault buffer: batches, duplicates, replays."""

from __future__ import annotations

import numpy as np

from hmmnet.devices.faultbuffer import FaultBuffer, Ticket
from hmmnet.errors import HmmnetError, KernelError
from hmmnet.pages import Words


class Replays(list[str]):
    """Names of the tickets that were replayed, in order."""

    def ticket(self, name: str, pages: list[int], write: bool = False, placement: str = "demand") -> Ticket:
        return Ticket(array(pages), write, placement, lambda: self.append(name))


def array(pages: list[int]) -> Words:
    return np.array(pages, dtype=np.uint64)


def test_empty_buffer_has_no_batch() -> None:
    """Nothing missed, nothing to serve."""
    assert FaultBuffer().fetch() is None


def test_duplicates_are_coalesced_and_write_wins() -> None:
    """Two jobs on one page make one fault, which asks for writing when one of them writes."""
    buffer, replays = FaultBuffer(), Replays()
    buffer.push(replays.ticket("a", [3, 5]))
    buffer.push(replays.ticket("b", [1, 5], write=True))
    batch = buffer.fetch()
    assert batch is not None
    assert batch.pages.tolist() == [1, 3, 5]
    assert batch.write.tolist() == [True, False, True]
    assert batch.duplicates == 1
    buffer.finish(batch, {})
    assert replays == ["a", "b"]


def test_batches_are_limited_and_a_ticket_waits_for_all_its_pages() -> None:
    """A large miss takes several passes and is replayed once; the next ticket shares the last pass."""
    buffer, replays = FaultBuffer(), Replays()
    buffer.push(replays.ticket("large", list(range(600))))
    buffer.push(replays.ticket("small", [1000]))
    sizes = []
    while (batch := buffer.fetch()) is not None:
        sizes.append(len(batch.pages))
        buffer.finish(batch, {})
    assert sizes == [256, 256, 89]
    assert replays == ["large", "small"]


def test_placements_do_not_mix() -> None:
    """A batch is one policy's."""
    buffer, replays = FaultBuffer(), Replays()
    buffer.push(replays.ticket("a", [1]))
    buffer.push(replays.ticket("b", [2], placement="remote"))
    buffer.push(replays.ticket("c", [3]))
    first = buffer.fetch()
    second = buffer.fetch()
    assert first is not None
    assert second is not None
    assert (first.placement, first.pages.tolist()) == ("demand", [1, 3])
    assert (second.placement, second.pages.tolist()) == ("remote", [2])


def test_a_fatal_page_ends_its_tickets_only() -> None:
    """Who touched the bad page is replayed at once with the reason; others go on."""
    buffer, replays = FaultBuffer(), Replays()
    reason = HmmnetError("no such page")
    bad = replays.ticket("bad", list(range(300)))
    good = replays.ticket("good", [900])
    buffer.push(bad)
    buffer.push(good)
    batch = buffer.fetch(limit=100)
    assert batch is not None
    buffer.finish(batch, {7: reason})
    assert replays == ["bad"]
    assert bad.fatal == {7: reason}
    batch = buffer.fetch()
    assert batch is not None
    assert batch.pages.tolist() == [900]
    buffer.finish(batch, {})
    assert good.fatal == {}


def test_withdrawn_tickets_are_not_served() -> None:
    """A job that ended leaves nothing behind in the buffer."""
    buffer, replays = FaultBuffer(), Replays()
    ticket = replays.ticket("a", [1])
    buffer.push(ticket)
    buffer.withdraw(ticket)
    assert len(buffer) == 0
    assert buffer.fetch() is None


def test_a_reader_does_not_fail_for_the_writer_beside_it() -> None:
    """Both miss one page; it cannot be had for writing. The writer is told; the reader asks again, and is told only of its own failure."""
    told: list[str] = []
    buffer = FaultBuffer()
    writer = Ticket(np.array([7], np.uint64), True, "demand", lambda: told.append("writer"))
    reader = Ticket(np.array([7], np.uint64), False, "demand", lambda: told.append("reader"))
    buffer.push(writer)
    buffer.push(reader)
    batch = buffer.fetch()
    assert batch is not None
    buffer.finish(batch, {7: KernelError(1, "hmm_range_fault", "read-only")})
    assert told == ["writer", "reader"]
    assert 7 in writer.fatal
    assert reader.fatal == {}
