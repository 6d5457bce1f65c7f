"""Links are shared max-min fairly, grants follow each other exactly, and reports say what was asked and reached."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmmnet.errors import PeerError, TopologyError
from hmmnet.fabric.arbiter import Arbiter, Flow, LinkChange, max_min_rates
from hmmnet.fabric.link import Link, LinkReport
from hmmnet.fabric.pace import CATCH_UP_S
from hmmnet.topology.load import parse

MIB = 1 << 20


MACHINE = """
[[memory]]
name = "node0"
size = "1 GiB"
[[switch]]
name = "switch0"
[[device]]
name = "gpu[0-3]"
memory = "1 GiB"
[[link]]
name = "uplink"
a = "node0"
b = "switch0"
bandwidth = "31.5 GB/s"
latency = "500 ns"
[[link]]
a = "switch0"
b = "gpu[0-3]"
bandwidth = "31.5 GB/s"
latency = "150 ns"
"""


def switch() -> Arbiter:
    """Four GPUs behind one uplink of 31.5 GB/s."""
    return Arbiter(parse(MACHINE))


def test_one_flow_gets_the_narrowest_link() -> None:
    """Alone, a transfer runs at the bottleneck of its route, and arrives the route's latency later."""
    flow = switch().open_flow("node0", "gpu0", 0.0)
    assert flow.bytes_per_s == 31.5e9
    first, second = flow.grant(MIB, 0.0), flow.grant(MIB, 0.0)
    assert first.start_s == 0.0
    assert second.start_s == first.finish_s == pytest.approx(MIB / 31.5e9)
    assert second.arrive_s - second.finish_s == pytest.approx(650e-9)


def test_flows_share_the_uplink_and_give_it_back() -> None:
    """Two GPUs that load at once get half each; when one is done the other has all."""
    arbiter = switch()
    one, two = arbiter.open_flow("node0", "gpu0", 0.0), arbiter.open_flow("node0", "gpu1", 0.0)
    assert one.bytes_per_s == two.bytes_per_s == pytest.approx(31.5e9 / 2)
    two.close(1.0)
    two.close(1.0)
    assert one.bytes_per_s == 31.5e9


def test_directions_do_not_disturb_each_other() -> None:
    """Links are full duplex."""
    arbiter = switch()
    there, back = arbiter.open_flow("node0", "gpu0", 0.0), arbiter.open_flow("gpu1", "node0", 0.0)
    assert there.bytes_per_s == back.bytes_per_s == 31.5e9


def test_a_late_sender_catches_up_within_bounds() -> None:
    """Twenty milliseconds may be made up for; the rest of a delay is lost."""
    flow = switch().open_flow("node0", "gpu0", 0.0)
    flow.grant(MIB, 0.0)
    assert flow.grant(MIB, 0.010, CATCH_UP_S).start_s < 0.010
    assert flow.grant(MIB, 1.0, CATCH_UP_S).start_s == pytest.approx(0.98)


def test_no_route_is_an_error() -> None:
    """A device that nothing is joined to cannot be reached."""
    with pytest.raises(TopologyError, match="no route"):
        parse('[[memory]]\nname = "m"\nsize = "1 GiB"\n[[device]]\nname = "g"\nmemory = "1 GiB"\n')


def report_of(arbiter: Arbiter, link: str, source: str) -> LinkReport:
    """One direction of a link."""
    return next(report for report in arbiter.report() if report.link == link and report.source == source)


def test_report_tells_asked_from_reached() -> None:
    """A transfer that came twice as late as granted has reached half of what was asked, and has not kept up."""
    arbiter = switch()
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    for _ in range(64):
        flow.grant(MIB, 0.0)
    due_s = 64 * MIB / 31.5e9
    flow.close(2 * due_s)
    uplink = report_of(arbiter, "uplink", "node0")
    assert uplink.bytes_moved == 64 * MIB
    assert uplink.asked_bytes_per_s == pytest.approx(31.5e9, rel=1e-2)
    assert uplink.reached_bytes_per_s == pytest.approx(31.5e9 / 2, rel=1e-2)
    assert not uplink.kept_up
    idle = report_of(arbiter, "uplink", "switch0")
    assert idle.kept_up
    assert idle.bytes_moved == 0


def test_time_that_cannot_be_caught_up_with_is_still_late() -> None:
    """A computer that moves a tenth of the link, for long: what was asked stays the link's speed, and the run did not keep up."""
    arbiter = switch()
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    now_s = 0.0
    for _ in range(4096):
        flow.grant(MIB, now_s, CATCH_UP_S)
        now_s += 10 * MIB / 31.5e9
    flow.close(now_s)
    uplink = report_of(arbiter, "uplink", "node0")
    assert uplink.asked_bytes_per_s == pytest.approx(31.5e9, rel=1e-2)
    assert uplink.reached_bytes_per_s == pytest.approx(3.15e9, rel=1e-2)
    assert not uplink.kept_up


def test_a_flow_that_others_slow_down_is_not_late() -> None:
    """Full speed for a half, half of it for the other, as the model says; whether it was granted before or after."""
    arbiter = switch()
    total, speed = 64 * MIB, 31.5e9
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    for _ in range(48):
        flow.grant(MIB, 0.0)
    half_s = total / 2 / speed
    other = arbiter.open_flow("node0", "gpu1", half_s)
    for _ in range(16):
        flow.grant(MIB, half_s)
    assert flow.bytes_per_s == speed / 2
    assert flow.due_s == pytest.approx(3 * half_s + flow.latency_s)
    assert flow.there_s == pytest.approx(flow.due_s)
    flow.close(flow.due_s)
    other.close(flow.due_s)
    assert report_of(arbiter, "uplink", "node0").kept_up
    assert report_of(arbiter, "uplink", "node0").bytes_moved == total


def test_what_has_been_carried_already_is_not_slowed_down() -> None:
    """A flow that the model is done with, but we are not, is due when it was."""
    arbiter = switch()
    flow = arbiter.open_flow("gpu0", "node0", 0.0)
    flow.grant(MIB, 0.0)
    due_s = flow.due_s
    arbiter.open_flow("gpu1", "node0", 10 * due_s)
    assert flow.due_s == pytest.approx(due_s)


CAPACITIES = st.lists(st.integers(1, 100), min_size=1, max_size=6)


@settings(deadline=None)
@given(CAPACITIES, st.data())
def test_rates_are_max_min_fair(capacities: list[int], data: st.DataObject) -> None:
    """No link is over its capacity, and each flow has a full link on which nobody gets more than it."""
    links = [Link(f"l{i}", "a", "b", float(capacity), 0.0) for i, capacity in enumerate(capacities)]
    subsets = st.lists(st.sampled_from(range(len(links))), min_size=1, max_size=len(links), unique=True)
    routes = [tuple(links[i] for i in chosen) for chosen in data.draw(st.lists(subsets, min_size=1, max_size=8))]
    assert_max_min_fair(max_min_rates(routes), routes)


def assert_max_min_fair(rates: Sequence[float], routes: Sequence[tuple[Link, ...]]) -> None:
    """Which rates are, and no others (Bertsekas and Gallager, *Data Networks*, 6.5): each flow has a bottleneck, and no link too much."""
    users: dict[Link, list[float]] = {}
    for rate, route in zip(rates, routes, strict=True):
        for link in route:
            users.setdefault(link, []).append(rate)
    for link, using in users.items():
        assert sum(using) <= link.capacity_bytes_per_s * (1 + 1e-9), f"{link.name} carries more than it can"
    full = {link for link, using in users.items() if sum(using) >= link.capacity_bytes_per_s * (1 - 1e-9)}
    for rate, route in zip(rates, routes, strict=True):
        bottlenecks = [link for link in full.intersection(route) if rate >= max(users[link]) * (1 - 1e-9)]
        assert bottlenecks, f"a flow over {[link.name for link in route]} could have more than {rate:g} B/s"


VERTICES = ("node0", "gpu0", "gpu1", "gpu2", "gpu3")
DEVICE_LINKS = MACHINE.rpartition("31.5 GB/s")
UNEQUAL = DEVICE_LINKS[0] + "20 GB/s" + DEVICE_LINKS[2]
"""Two GPUs fill the uplink, one does not."""
CAPACITY_OF = {"uplink": 31.5e9, **{f"switch0-gpu{i}": 20e9 for i in range(4)}}
EVENTS = st.lists(st.tuples(st.sampled_from(("open", "grant", "close", "slow")), st.integers(0, 99), st.integers(1, 8)), max_size=60)


@settings(deadline=None)
@given(EVENTS)
def test_flows_come_and_go(events: list[tuple[str, int, int]]) -> None:
    """At every moment rates are max-min fair; no byte is lost or counted twice; nothing is due before its links can carry it."""
    arbiter, now_s = Arbiter(parse(UNEQUAL)), 0.0
    flows: list[Flow] = []
    moved: dict[tuple[str, str], int] = {}
    for event, pick, size in events:
        now_s += size * 1e-5
        if event == "open":
            source, target = VERTICES[pick % 5], VERTICES[(pick + 1 + pick // 5 % 4) % 5]
            flows.append(arbiter.open_flow(source, target, now_s))
        elif event == "slow":  # 8 parts of 8: as it was
            change = LinkChange(frozenset({(sorted(CAPACITY_OF)[pick % 5], pick % 2 == 0)}), factor=size / 8)
            arbiter.change(pick % 10, None if size == 8 else change, now_s)
        elif flows:
            flow = flows[pick % len(flows)]
            if event == "close":
                flows.remove(flow)
                flow.close(now_s)
            else:
                flow.grant(size * MIB, now_s, CATCH_UP_S)
                for link in flow.links:
                    moved[link.name, link.source] = moved.get((link.name, link.source), 0) + size * MIB
        assert_max_min_fair([flow.bytes_per_s for flow in flows], [flow.links for flow in flows])
    for flow in flows:
        flow.close(now_s)
    for report in arbiter.report():
        assert report.bytes_moved == moved.get((report.link, report.source), 0)
        assert report.asked_bytes_per_s <= CAPACITY_OF[report.link] * (1 + 1e-9)
        assert report.reached_bytes_per_s <= report.asked_bytes_per_s * (1 + 1e-9)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 400), st.integers(0, 2**32 - 1))
def test_chunks_of_concurrent_flows_fit_the_link(count: int, chunks: int, seed: int) -> None:
    """Sent in time, chunks of flows that share a link never carry more over it than its capacity allows, in any window of time."""
    arbiter = switch()
    flows = [arbiter.open_flow("node0", f"gpu{i % 4}", 0.0) for i in range(count)]
    order = random.Random(seed)
    grants = [order.choice(flows).grant(MIB, 0.0) for _ in range(chunks)]
    spans = sorted((grant.start_s, grant.finish_s) for grant in grants)
    last_s = max(finish for _, finish in spans)
    for moment_s in [last_s * i / 7 for i in range(1, 8)]:
        carried = sum(min(max(moment_s - start, 0.0) / (finish - start), 1.0) * MIB for start, finish in spans)
        assert carried <= 31.5e9 * moment_s * (1 + 1e-6)


# --- links that go down -------------------------------------------------------------------------------------------------------------

TWO_WAYS = """
[[memory]]
name = "node0"
size = "1 GiB"
[[switch]]
name = "switch0"
[[device]]
name = "gpu0"
memory = "1 GiB"
[[link]]
name = "nvlink"
a = "node0"
b = "gpu0"
bandwidth = "100 GB/s"
latency = "100 ns"
[[link]]
name = "uplink"
a = "node0"
b = "switch0"
bandwidth = "10 GB/s"
latency = "500 ns"
[[link]]
name = "pcie"
a = "switch0"
b = "gpu0"
bandwidth = "10 GB/s"
latency = "150 ns"
"""
DOWN = LinkChange(frozenset({("nvlink", True)}), down=True)
"""Either direction is both."""


def moved(arbiter: Arbiter) -> dict[str, int]:
    """Bytes by link, towards the device."""
    return {link.link: link.bytes_moved for link in arbiter.report() if link.source != "gpu0" and link.bytes_moved}


def test_a_flow_under_way_goes_on_over_another_link() -> None:
    """NVLink is lost, PCIe is there: the rate and the latency are its, each link has carried its part, and nobody is counted twice."""
    arbiter = Arbiter(parse(TWO_WAYS))
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    flow.grant(MIB, 0.0)
    arbiter.change(1, DOWN, 0.001)
    assert not flow.stalled
    assert [link.name for link in flow.links] == ["uplink", "pcie"]
    assert flow.bytes_per_s == 10e9
    assert flow.latency_s == pytest.approx(650e-9)
    other = arbiter.open_flow("node0", "gpu0", 0.001)
    assert flow.bytes_per_s == other.bytes_per_s == 5e9
    other.close(0.001)
    flow.grant(2 * MIB, 0.001)
    flow.close(0.002)
    assert moved(arbiter) == {"nvlink": MIB, "uplink": 2 * MIB, "pcie": 2 * MIB}
    assert all(link.flows == 0 for link in arbiter.route("node0", "gpu0"))


def test_a_flow_is_counted_where_it_went() -> None:
    """Of what was granted, the first link has what was through when it went down."""
    arbiter = Arbiter(parse(TWO_WAYS))
    flow = arbiter.open_flow("gpu0", "node0", 0.0)
    flow.grant(200_000_000, 0.0)
    arbiter.change(1, DOWN, 0.001)
    flow.close(0.02)
    carried = {link.link: link.bytes_moved for link in arbiter.report() if link.bytes_moved}
    assert carried == {"nvlink": 100_000_000, "pcie": 100_000_000, "uplink": 100_000_000}
    assert flow.due_s == flow.there_s == pytest.approx(0.001 + 0.01, rel=1e-3)


def test_a_flow_without_any_way_waits_until_its_link_is_up() -> None:
    """Its time goes on from there, and others are not slowed by it meanwhile."""
    arbiter = switch()
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    first = flow.grant(MIB, 0.0)
    arbiter.change(1, LinkChange(frozenset({("switch0-gpu0", False)}), down=True), 0.001)
    was_stalled = flow.stalled
    other = arbiter.open_flow("node0", "gpu1", 0.001)
    assert other.bytes_per_s == 31.5e9
    with pytest.raises(PeerError, match="links are down"):
        arbiter.open_flow("node0", "gpu0", 0.001)
    arbiter.change(1, None, 0.5)
    assert (was_stalled, flow.stalled) == (True, False)
    assert flow.bytes_per_s == other.bytes_per_s == 31.5e9 / 2
    assert flow.grant(MIB, 0.2).start_s == pytest.approx(0.5)
    assert first.start_s == 0.0
    flow.close(0.6)
    other.close(0.6)


SLOW = LinkChange(frozenset({("uplink", True)}), factor=1e-8)
LATE = LinkChange(frozenset({("uplink", True)}), late_s=lambda: 3.0)


def test_what_waits_for_a_link_that_was_very_slow_goes_when_it_is_not() -> None:
    """Grants of then are worth what they would have carried meanwhile; who waits is told."""
    arbiter, told = switch(), []
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    flow.watch(lambda: told.append(flow.last.start_s))
    arbiter.change(1, SLOW, 0.0)
    for _ in range(5):
        flow.grant(MIB, 0.0)
    assert flow.last.start_s > 10_000
    arbiter.change(1, None, 1.0)
    assert flow.there_s == pytest.approx(1.0 + (5 * MIB - 315) / 31.5e9 + flow.latency_s, abs=1e-12)
    assert told == [0.0, flow.last.start_s]
    assert flow.due_s == pytest.approx(flow.there_s)


def test_what_has_not_left_when_its_links_go_down_goes_on_when_they_are_up() -> None:
    """And what has left is through."""
    arbiter = switch()
    down = LinkChange(frozenset({("switch0-gpu0", False)}), down=True)
    arbiter.change(1, SLOW, 0.0)
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    first = flow.grant(315, 0.0)
    arbiter.change(2, down, 0.25)
    arbiter.change(2, None, 2.0)
    assert flow.there_s == first.arrive_s < 1.1
    assert flow.grant(315, 2.0) == pytest.approx((2.0, 3.0, 3.0), abs=1e-5)
    waits = flow.grant(315, 2.0)
    arbiter.change(2, down, 2.5)
    arbiter.change(2, None, 9.0)
    assert flow.last == pytest.approx((9.5, 10.5, 10.5), abs=1e-5), "half of the chunk before it was still to be carried"
    assert waits.start_s == pytest.approx(3.0)
    flow.close(10.5)


def test_nobody_knows_when_what_waits_for_a_link_is_there() -> None:
    """Of five chunks the first has left when the link goes down; the others are there as much later as it was down, one after the other."""
    arbiter, told = switch(), []
    arbiter.change(1, SLOW, 0.0)
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    flow.watch(lambda: told.append(flow.there_s))
    for _ in range(5):
        flow.grant(315, 0.0)
    assert flow.there_s == pytest.approx(5.0, abs=1e-5)
    arbiter.change(2, LinkChange(frozenset({("switch0-gpu0", False)}), down=True), 0.5)
    assert flow.there_s == float("inf")
    arbiter.change(2, None, 60.5)
    assert flow.there_s == flow.due_s == told[-1] == pytest.approx(65.0, abs=1e-5)


def test_what_changes_elsewhere_does_not_end_a_wait_for_a_link() -> None:
    """Another link is slower for a while, and then the uplink: the one on the way is up when it is up."""
    arbiter = switch()
    arbiter.change(1, SLOW, 0.0)
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    for _ in range(2):
        flow.grant(315, 0.0)
    arbiter.change(2, LinkChange(frozenset({("switch0-gpu0", False)}), down=True), 0.5)
    arbiter.change(3, LinkChange(frozenset({("switch0-gpu3", True)}), factor=0.5), 3.0)
    arbiter.change(3, LinkChange(frozenset({("uplink", False)}), factor=0.5), 4.0)
    arbiter.change(2, None, 9.0)
    assert flow.last.start_s >= 9.0
    assert flow.there_s == pytest.approx(flow.last.start_s + 1.0, abs=1e-5)


def test_what_has_left_goes_the_old_way_still() -> None:
    """Links that take longer are of no matter to what is through; and what left by them is there no sooner when they do not any more."""
    arbiter = switch()
    arbiter.change(1, SLOW, 0.0)
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    flow.grant(315, 0.0)
    arbiter.change(2, LATE, 1.5)
    assert flow.there_s == pytest.approx(1.0, abs=1e-5)
    flow.grant(315, 2.0)
    assert flow.there_s == pytest.approx(6.0, abs=1e-5)
    arbiter.change(2, None, 2.75)
    assert flow.last.arrive_s == pytest.approx(3.0, abs=1e-5)
    assert flow.there_s == pytest.approx(5.75, abs=1e-5)


def test_a_flow_that_waits_can_be_closed() -> None:
    """Whoever gives it up is not waited for."""
    arbiter = switch()
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    arbiter.change(1, LinkChange(frozenset({("switch0-gpu0", False)}), down=True), 0.001)
    flow.close(0.002)
    arbiter.change(1, None, 0.5)
    assert arbiter.open_flow("node0", "gpu0", 0.5).bytes_per_s == 31.5e9
