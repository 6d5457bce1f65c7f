"""Transfers without a flow keep to their links: one after the other, and beside flows at a fair share."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from hmmnet.fabric.arbiter import Arbiter, LinkChange
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.singles import Singles
from hmmnet.fabric.turns import Turn
from hmmnet.topology.load import parse

MACHINE = """
[[memory]]
name = "node0"
size = "1 GiB"
[[switch]]
name = "switch0"
[[device]]
name = "gpu[0-1]"
memory = "1 GiB"
[[link]]
name = "uplink"
a = "node0"
b = "switch0"
bandwidth = "10 MB/s"
latency = "2 ms"
[[link]]
a = "switch0"
b = "gpu[0-1]"
bandwidth = "20 MB/s"
latency = "1 ms"
"""
KB = 1000
MS = 1e-3


def machine() -> tuple[Arbiter, Singles, Singles]:
    """Two devices behind an uplink of 10 bytes a microsecond, 3 ms away from the host."""
    arbiter = Arbiter(parse(MACHINE))
    return arbiter, Singles(arbiter, "gpu0", "node0"), Singles(arbiter, "gpu1", "node0")


def test_alone_a_transfer_takes_its_bytes_and_its_latency() -> None:
    """10 kB at the uplink's 10 MB/s, and 3 ms."""
    _, way, _ = machine()
    turn = way.turn(10 * KB, 5.0)
    assert turn.begin_s == 5.0
    assert turn.due_s == pytest.approx(5.0 + 1 * MS + 3 * MS)


def test_transfers_pass_one_after_the_other() -> None:
    """A hundred that are ready at once are there no earlier than the link allows, latency counted once."""
    _, way, _ = machine()
    turns = [way.turn(10 * KB, 0.0) for _ in range(100)]
    assert [turn.begin_s for turn in turns] == [pytest.approx(i * MS) for i in range(100)]
    assert turns[-1].due_s == pytest.approx(100 * MS + 3 * MS)


def test_a_late_one_does_not_wait_for_a_link_that_is_free_again() -> None:
    """Turns are by absolute times, not by how many came before."""
    _, way, _ = machine()
    way.turn(10 * KB, 0.0)
    assert way.turn(10 * KB, 1.0).begin_s == 1.0


def test_two_devices_take_turns_on_the_link_they_share() -> None:
    """The second device's pages are behind those of the first on the uplink."""
    _, first, second = machine()
    first.turn(10 * KB, 0.0)
    assert second.turn(10 * KB, 0.0).begin_s == pytest.approx(1 * MS)


def test_a_flow_begins_behind_the_turns_already_given() -> None:
    """A stream that opens now cannot use the link in a moment that is promised."""
    arbiter, way, _ = machine()
    way.turn(50 * KB, 0.0)
    flow = arbiter.open_flow("gpu1", "node0", 1 * MS)
    assert flow.grant(10 * KB, 1 * MS).start_s == pytest.approx(5 * MS)


def test_beside_a_flow_turns_are_given_at_half_the_link() -> None:
    """As max-min sharing with one more flow would have it."""
    arbiter, way, _ = machine()
    arbiter.open_flow("gpu1", "node0", 0.0)
    assert way.turn(10 * KB, 0.0).due_s == pytest.approx(2 * MS + 3 * MS)
    assert way.turn(10 * KB, 0.0).begin_s == pytest.approx(2 * MS)


def test_beside_a_flow_two_devices_have_one_share_together() -> None:
    """Whoever comes second waits for the first on the link they share, so that no link carries more than it can."""
    arbiter, first, second = machine()
    flow = arbiter.open_flow("gpu1", "node0", 0.0)
    ways = (first, second)
    last_s = max(ways[i % 2].turn(10 * KB, 0.0).due_s for i in range(100)) - 3 * MS
    assert last_s == pytest.approx(100 * 2 * MS)
    assert 100 * 10 * KB / last_s + flow.bytes_per_s / 2 <= 10e6


def test_while_one_sleeps_the_flow_is_slower() -> None:
    """The sleepers count as one flow, however many; the last to leave gives the link back."""
    arbiter, way, _ = machine()
    flow = arbiter.open_flow("gpu1", "node0", 0.0)
    assert flow.bytes_per_s == 10e6
    with way.held(lambda: 0.0):
        with way.held(lambda: 0.0):
            assert flow.bytes_per_s == 5e6
            assert way.turn(10 * KB, 0.0).due_s == pytest.approx(2 * MS + 3 * MS)
        assert flow.bytes_per_s == 5e6
    assert flow.bytes_per_s == 10e6


def test_holding_does_not_slow_down_who_is_alone() -> None:
    """The sleepers' flow is no competitor of their own turns."""
    _, way, _ = machine()
    with way.held(lambda: 0.0):
        assert way.turn(10 * KB, 0.0).due_s == pytest.approx(1 * MS + 3 * MS)


SLOW = LinkChange(frozenset({("uplink", False)}), factor=1e-3)
PRECISION_S = 1e-3
"""What the clock does not sleep for."""


async def _passes(arbiter: Arbiter, way: Singles, turn: Turn, *changes: tuple[float, LinkChange | None]) -> float:
    """When who sleeps until `turn` is over goes on, and was told that it is; the links change at these times."""
    clock, told = EmulatedClock(1.0, trio.current_time), []

    async def passes() -> None:
        told.append(await way.pass_by(turn, clock))
        assert clock.now() == pytest.approx(told[0], abs=PRECISION_S)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(passes)
        for at_s, change in changes:
            await trio.sleep_until(at_s)
            arbiter.change(1, change, clock.now())
    return told[0]


def _run(arbiter: Arbiter, way: Singles, turn: Turn, *changes: tuple[float, LinkChange | None]) -> float:
    return trio.run(_passes, arbiter, way, turn, *changes, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_turn_on_a_link_that_was_very_slow_is_over_soon_after_that() -> None:
    """1 MB at 10 kB/s, for 4 of 100 s; the rest at 10 MB/s. Whoever comes next is behind it, and no later."""
    arbiter, _, _ = machine()
    arbiter.change(1, SLOW, 0.0)
    way = Singles(arbiter, "gpu0", "node0")
    turn = way.turn(1000 * KB, 0.0)
    assert turn.due_s == pytest.approx(100 + 3 * MS)
    assert _run(arbiter, way, turn, (4.0, None)) == pytest.approx(4.0 + 96 * MS + 3 * MS)
    assert Singles(arbiter, "gpu1", "node0").turn(KB, 4.0).begin_s == pytest.approx(4.0 + 96 * MS)
    assert arbiter.open_flow("gpu1", "node0", 4.0).grant(KB, 4.0).start_s == pytest.approx(4.0 + 96 * MS + 0.1 * MS)


def test_a_turn_on_a_link_that_becomes_slow_takes_longer() -> None:
    """Half of 2 s have passed; and the link is what it was for the last quarter. What is through is on its way as long as before."""
    arbiter, way, _ = machine()
    turn = way.turn(20_000 * KB, 0.0)
    assert _run(arbiter, way, turn, (1.0, SLOW), (501.0, None)) == pytest.approx(501.5 + 3 * MS)
    arbiter, way, _ = machine()
    turn = way.turn(10 * KB, 0.0)
    assert _run(arbiter, way, turn, (2 * MS, SLOW)) == turn.due_s == pytest.approx(4 * MS)


def test_a_turn_that_is_slept_for_later_has_heard_what_changed_until_then() -> None:
    """A CPU pays for what it reached at the end of its access."""
    arbiter, _, _ = machine()
    arbiter.change(1, SLOW, 0.0)
    way = Singles(arbiter, "gpu0", "node0")
    turn = way.turn(1000 * KB, 0.0)
    arbiter.change(1, None, 0.0)
    assert _run(arbiter, way, turn) == pytest.approx(100 * MS + 3 * MS)


def test_a_flow_behind_turns_begins_when_they_have_passed() -> None:
    """It was opened while a link was very slow, for 100 s of turns, and has chunks granted; the link is what it was after 4 s."""
    arbiter, told = machine()[0], []
    arbiter.change(1, SLOW, 0.0)
    Singles(arbiter, "gpu0", "node0").turn(1000 * KB, 0.0)
    flow = arbiter.open_flow("gpu1", "node0", 1.0)
    flow.watch(lambda: told.append(flow.last.start_s))
    for _ in range(2):
        flow.grant(1000 * KB, 1.0)
    assert flow.last.start_s == pytest.approx(200.0)
    arbiter.change(1, None, 4.0)
    assert flow.start_s == pytest.approx(4.0 + 96 * MS)
    assert flow.last == pytest.approx((4.196, 4.296, 4.299))
    assert told[-1] == flow.last.start_s
    assert flow.due_s == pytest.approx(flow.there_s)
