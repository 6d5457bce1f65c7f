"""Who waits behind others on one link of a way has nothing to do with the rate of the other links: all moments worked out by hand.

    gpu0 --- 20 MB/s ---+
                        switch0 --- 10 MB/s --- node0
    gpu1 --- 20 MB/s ---+

Pages of 10 kB take 1 ms on the uplink, and half of that on a device's own link.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from hmmnet.fabric.arbiter import Arbiter, LinkChange
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.link import Link
from hmmnet.fabric.singles import Singles
from hmmnet.fabric.turns import QUEUE_LOOK, Turn
from hmmnet.topology.load import parse
from tests.fabric.test_singles import KB, MS, machine

OWN, UPLINK = 1, 2
"""Numbers of what happens to gpu0's own link, and to the uplink."""
LINKS = {OWN: ("switch0-gpu0", False), UPLINK: ("uplink", False)}
STORY = [(0.0, OWN, 1e-3), (0.05, OWN, 1.0), (0.06, UPLINK, 1e-3), (0.07, OWN, 1e-3), (20.06, UPLINK, 1.0)]
"""Slow, well again, slow on the other link, then both, then the uplink well: times, links, factors."""


def changed(arbiter: Arbiter, number: int, factor: float, now_s: float) -> None:
    """That link has so much of its bandwidth from now on."""
    arbiter.change(number, None if factor == 1.0 else LinkChange(frozenset({LINKS[number]}), factor=factor), now_s)


def queued() -> tuple[Arbiter, Singles]:
    """A hundred pages of gpu1 are before everybody on the uplink, for 0.1 s; and the way of gpu0."""
    arbiter, way, other = machine()
    for _ in range(100):
        other.turn(10 * KB, 0.0)
    return arbiter, way


def test_a_page_waits_for_the_link_whose_queue_it_is_in() -> None:
    """Behind the queue it takes 1 ms of the uplink and 0.5 of its own link, at the rates of then; 40 ms of the queue are slow for 20 s."""
    arbiter, way = queued()
    page, dues = way.turn(10 * KB, 0.0), []
    for at_s, link, factor in STORY:
        changed(arbiter, link, factor, at_s)
        dues.append(page.due_s - 3 * MS)
    assert dues == pytest.approx([0.1 + 0.5, 0.101, 0.06 + 40 + 1, 0.06 + 40 + 1, 0.06 + 20 + 0.02 + 0.5])
    assert page.begin_s == pytest.approx(20.08)
    assert way.turn(10 * KB, 20.06).begin_s == pytest.approx(20.58), "who comes next is behind it, and no later"


@pytest.mark.parametrize(("behind", "starts"), [(False, [0.1, 0.1, 40.06, 40.06, 20.08]), (True, [0.6, 0.101, 41.06, 41.06, 20.58])])
def test_a_flow_waits_for_the_link_whose_queue_it_is_in(behind: bool, starts: list[float]) -> None:
    """Behind gpu1's pages only, or a page of its own way besides. Its chunk leaves when it begins."""
    arbiter, way = queued()
    if behind:
        way.turn(10 * KB, 0.0)
    flow, told, began = arbiter.open_flow("gpu0", "node0", 0.0), [], []
    flow.watch(lambda: told.append(flow.last.start_s))
    flow.grant(10 * KB, 0.0)
    for at_s, link, factor in STORY:
        changed(arbiter, link, factor, at_s)
        began.append(flow.start_s)
        assert flow.last.start_s == told[-1] == pytest.approx(flow.start_s)
    assert began == pytest.approx(starts)
    assert flow.due_s == pytest.approx(flow.there_s) == pytest.approx(starts[-1] + 0.5 + 3 * MS)


TWO_WAYS = """
[[memory]]
name = "node0"
size = "1 GiB"
[[device]]
name = "gpu[0-1]"
memory = "1 GiB"
[[switch]]
name = "switch[0-1]"
[[link]]
a = "gpu0"
b = "switch0"
bandwidth = "20 MB/s"
latency = "1 ms"
[[link]]
a = "gpu0"
b = "switch1"
bandwidth = "10 MB/s"
latency = "2 ms"
[[link]]
a = "gpu1"
b = "switch0"
bandwidth = "20 MB/s"
latency = "1 ms"
[[link]]
name = "uplink"
a = "switch0"
b = "node0"
bandwidth = "10 MB/s"
latency = "1 ms"
[[link]]
a = "switch1"
b = "node0"
bandwidth = "10 MB/s"
latency = "2 ms"
"""


def test_a_flow_that_takes_another_way_leaves_the_queue() -> None:
    """Over links that are free it begins at once, and what becomes of the queue that it was in is nothing to it."""
    arbiter = Arbiter(parse(TWO_WAYS))
    other = Singles(arbiter, "gpu1", "node0")
    for _ in range(100):
        other.turn(10 * KB, 0.0)
    flow = arbiter.open_flow("gpu0", "node0", 0.0)
    flow.grant(10 * KB, 0.0)
    assert flow.start_s == pytest.approx(0.1)
    down = frozenset({(flow.links[0].name, True), (flow.links[0].name, False)})
    arbiter.change(OWN, LinkChange(down, down=True), 0.01)
    arbiter.change(UPLINK, LinkChange(frozenset({("uplink", True)}), factor=1e-3), 0.02)
    assert flow.start_s == 0.01
    assert flow.due_s == pytest.approx(0.01 + 0.001 + 4 * MS)


async def test_sleepers_follow_a_rate_that_changed_while_their_link_was_down(autojump_clock: trio.testing.MockClock) -> None:
    """Two pages of 100 ms each: what is left takes a hundred times as long from 30 ms on, though a link is down then."""
    arbiter, way, _ = machine()
    clock, dues = EmulatedClock(1.0, trio.current_time), []

    async def sleep() -> None:
        dues.append(await way.pass_by(way.turn(1000 * KB, 0.0), clock))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleep)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(sleep)
        await trio.sleep_until(0.02)
        arbiter.change(OWN, LinkChange(frozenset({LINKS[OWN]}), down=True), 0.02)
        await trio.sleep_until(0.03)
        changed(arbiter, UPLINK, 1e-2, 0.03)
        await trio.sleep_until(0.04)
        changed(arbiter, OWN, 1.0, 0.04)
    assert dues == pytest.approx([0.03 + 7 + 3 * MS, 0.03 + 7 + 10 + 3 * MS], abs=1e-3)


def test_a_flow_that_is_closed_before_it_began_is_told_nothing() -> None:
    """Whoever gave it up has ended what watched it."""
    arbiter, _ = queued()
    flow, told = arbiter.open_flow("gpu0", "node0", 0.0), []
    flow.watch(lambda: told.append(flow.start_s))
    flow.close(0.0)
    changed(arbiter, UPLINK, 1e-3, 0.0)
    assert not told


@pytest.mark.parametrize(("well_s", "begins_s"), [(2.0, 10.0), (9.95, 10.04005)])
def test_a_queue_passes_while_the_links_of_who_waits_are_down(well_s: float, begins_s: float) -> None:
    """gpu0's link is down from 1 s to 10 s, the uplink very slow until 2 s, or 9.95: the queue needs 98 ms from there, or 90.05."""
    arbiter, _ = queued()
    changed(arbiter, UPLINK, 1e-3, 0.0)
    flow = arbiter.open_flow("gpu0", "node0", 0.0)
    flow.grant(10 * KB, 0.0)
    arbiter.change(3, LinkChange(frozenset({LINKS[OWN]}), down=True), 1.0)
    changed(arbiter, UPLINK, 1.0, well_s)
    arbiter.change(3, None, 10.0)
    assert flow.start_s == pytest.approx(well_s + (100 - well_s) * MS)
    assert flow.last.start_s == pytest.approx(begins_s)
    assert flow.due_s == pytest.approx(flow.there_s) == pytest.approx(begins_s + 1 * MS + 3 * MS)


def test_pages_pass_at_the_rate_of_the_link_that_is_narrowest_now() -> None:
    """Ten on one way: the uplink sets their pace until their own link is slow; then that does, for those that have not passed."""
    arbiter, way, _ = machine()
    pages = [way.turn(10 * KB, 0.0) for _ in range(10)]
    changed(arbiter, OWN, 1e-2, 4 * MS)
    assert [page.begin_s for page in pages[:5]] == pytest.approx([0, 1 * MS, 2 * MS, 3 * MS, 4 * MS])
    assert pages[-1].due_s == pytest.approx(4 * MS + 6 * 50 * MS + 3 * MS)
    changed(arbiter, OWN, 1.0, 79 * MS)
    assert pages[5].begin_s == pytest.approx(54 * MS)
    assert pages[-1].due_s == pytest.approx(79 * MS + 0.25 * MS + 4 * MS + 3 * MS), "half of the sixth was left"


def test_sleepers_follow_the_link_that_sets_their_rate() -> None:
    """Three flows to gpu1 leave them 5 MB/s on gpu0's link. An uplink of 8 instead of 10 MB/s is of no matter; half of their link is."""

    async def main() -> None:
        arbiter, way, _ = machine()
        clock = EmulatedClock(1.0, trio.current_time)
        for _ in range(3):
            arbiter.open_flow("gpu0", "gpu1", clock.now())
        told: dict[str, float] = {}

        async def passes(name: str) -> None:
            told[name] = await way.pass_by(way.turn(1000 * KB, 0.0), clock)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(passes, "first")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(passes, "second")
            await trio.sleep_until(0.05)
            changed(arbiter, UPLINK, 0.8, clock.now())
            await trio.sleep_until(0.1)
            changed(arbiter, OWN, 0.5, clock.now())
        assert told == {"first": pytest.approx(0.3 + 3 * MS), "second": pytest.approx(0.7 + 3 * MS)}

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_change_that_matters_to_nobody_moves_nothing() -> None:
    """Half of a millisecond, or a little more, is less than what the uplink takes; and what is ready later leaves later."""
    arbiter, way = queued()
    pages = [way.turn(10 * KB, 0.0), way.turn(10 * KB, 5.0)]
    before = [(page.begin_s, page.passed_s, page.due_s) for page in pages]
    changed(arbiter, OWN, 0.9, 0.0)
    assert [(page.begin_s, page.passed_s, page.due_s) for page in pages] == before
    changed(arbiter, UPLINK, 0.5, 0.0)
    assert [page.begin_s for page in pages] == pytest.approx([0.2, 5.0])


def test_turns_that_have_passed_are_not_kept() -> None:
    """A machine that runs for long keeps those that wait, and a few."""
    arbiter, way, _ = machine()
    for at in range(10 * QUEUE_LOOK):
        turn = way.turn(10 * KB, at * 1 * MS)
    assert len(arbiter.turns) <= QUEUE_LOOK
    assert turn.begin_s == pytest.approx((10 * QUEUE_LOOK - 1) * MS)
    chain, one = 0, turn
    while one._after is not None:
        chain, one = chain + 1, one._after
    assert chain <= QUEUE_LOOK


# --- an oracle: each turn's bytes over each of its links, carried at the rates that those had


@dataclass
class History:
    """What one link carried from when on."""

    rates: list[tuple[float, float]]
    flows: int = 0
    free_s: float = 0.0

    def carried_by(self, nbytes: float, start_s: float) -> float:
        """When it has carried so many from `start_s` on."""
        for (since_s, rate), (until_s, _) in zip(self.rates, [*self.rates[1:], (float("inf"), 0.0)], strict=True):
            if until_s > start_s:
                start_s = max(start_s, since_s)
                if nbytes <= (until_s - start_s) * rate:
                    return start_s + nbytes / rate
                nbytes, start_s = nbytes - (until_s - start_s) * rate, until_s
        raise AssertionError("the last rate holds for ever")


@dataclass
class Given:
    """A turn, or a flow, that came at `now_s`, and what it is to carry over each link."""

    device: int
    now_s: float
    loads: dict[str, float]
    turn: Turn | None = None
    starts: list[float] = field(default_factory=list)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.3 * MS, 2 * MS, 0.1, 30.0]),
        st.sampled_from(["page", "page", "page", "pages", "flow", "slow", "slow"]),
        st.integers(0, 1),
        st.sampled_from([1e-4, 0.1, 0.5, 1.0]),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(EVENTS)
def test_turns_are_what_they_would_be_if_the_rates_had_been_known(events: list[tuple[float, str, int, float]]) -> None:
    """Pages, flows and changes of rates in any order: afterwards every moment is that of an oracle which knows all rates from the start."""
    arbiter, *ways = machine()
    links: dict[str, Link] = {link.name: link for way in ways for link in way.links}
    rated = {name: History([(0.0, link.capacity_bytes_per_s)]) for name, link in links.items()}
    full = {name: link.capacity_bytes_per_s for name, link in links.items()}
    came: list[Given] = []
    flows = []
    now_s = 0.0
    for after_s, what, which, factor in events:
        now_s += after_s
        names = [link.name for link in ways[which].links]
        if what == "flow":
            flows.append((arbiter.open_flow(f"gpu{which}", "node0", now_s), len(came)))
            came.append(Given(which, now_s, dict.fromkeys(names, 0.0)))
            for name in names:
                rated[name].flows += 1
        elif what == "slow":
            name = sorted(links)[which if factor != 0.5 else 2]
            arbiter.change(sorted(links).index(name), LinkChange(frozenset({(name, False)}), factor=factor), now_s)
            rated[name].rates.append((now_s, full[name] * factor))
        else:
            for _ in range(1 if what == "page" else 20):
                loads = {name: 10.0 * KB * (rated[name].flows + 1) for name in names}
                came.append(Given(which, now_s, loads, ways[which].turn(10 * KB, now_s)))
    starts = _oracle(came, rated)
    for given_, (begin_s, passed_s) in zip(came, starts, strict=True):
        if given_.turn is not None:
            assert (given_.turn.begin_s, given_.turn.passed_s) == pytest.approx((begin_s, passed_s), rel=1e-6)
    for flow, at in flows:
        assert flow.start_s == pytest.approx(starts[at][0], rel=1e-6)
    for name, link in links.items():
        assert max(link.free_s, now_s) == pytest.approx(max(rated[name].free_s, now_s), rel=1e-6)


def _oracle(came: list[Given], rated: dict[str, History]) -> list[tuple[float, float]]:
    """When each begins, and has passed."""
    last_s = [0.0, 0.0]
    out = []
    for one in came:
        begin_s = max(one.now_s, *(rated[name].free_s for name in one.loads))
        passed_s = begin_s
        if one.turn is not None:
            begin_s = max(begin_s, last_s[one.device])
            for name, load in one.loads.items():
                rated[name].free_s = rated[name].carried_by(load, begin_s)
            passed_s = last_s[one.device] = max(rated[name].free_s for name in one.loads)
        out.append((begin_s, passed_s))
    return out
