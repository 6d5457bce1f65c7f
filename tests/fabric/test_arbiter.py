"""Links are shared max-min fairly, grants follow each other exactly, and reports say what was asked and reached."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.errors import TopologyError
from hmmnet.fabric.arbiter import Arbiter, max_min_rates
from hmmnet.fabric.link import INTERVALS_MAX, Link, Stretch
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
    return Arbiter(parse(MACHINE), lambda: 1.0)


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
    assert flow.grant(MIB, 0.010).start_s < 0.010
    assert flow.grant(MIB, 1.0).start_s == pytest.approx(0.98)


def test_no_route_is_an_error() -> None:
    """A device that nothing is joined to cannot be reached."""
    with pytest.raises(TopologyError, match="no route"):
        parse('[[memory]]\nname = "m"\nsize = "1 GiB"\n[[device]]\nname = "g"\nmemory = "1 GiB"\n')


def test_report_tells_asked_from_reached() -> None:
    """A transfer that came twice as late as granted has reached half of what was asked, and has not kept up."""
    arbiter = switch()
    flow = arbiter.open_flow("node0", "gpu0", 0.0)
    for _ in range(64):
        flow.grant(MIB, 0.0)
    due_s = 64 * MIB / 31.5e9
    flow.close(2 * due_s)
    uplink = next(report for report in arbiter.report() if report.link == "uplink" and report.source == "node0")
    assert uplink.bytes_moved == 64 * MIB
    assert uplink.asked_bytes_per_s == pytest.approx(31.5e9, rel=1e-2)
    assert uplink.reached_bytes_per_s == pytest.approx(31.5e9 / 2, rel=1e-2)
    assert not uplink.kept_up
    idle = next(report for report in arbiter.report() if report.link == "uplink" and report.source == "switch0")
    assert idle.kept_up
    assert idle.bytes_moved == 0


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=40))
def test_stretch_is_the_length_of_the_union(spans: list[tuple[int, int]]) -> None:
    """Intervals in any order, overlapping or not, count each moment once."""
    stretch = Stretch()
    for start, length in spans:
        stretch.add(float(start), float(start + length))
    assert stretch.length_s == len({moment for start, length in spans for moment in range(start, start + length)})


def test_a_long_run_costs_bounded_memory() -> None:
    """Many separate transfers are summed up."""
    stretch = Stretch()
    for start in range(3 * INTERVALS_MAX):
        stretch.add(float(start), start + 0.5)
    assert len(stretch._starts) <= INTERVALS_MAX
    assert stretch.length_s == pytest.approx(1.5 * INTERVALS_MAX)


CAPACITIES = st.lists(st.integers(1, 100), min_size=1, max_size=6)


@given(CAPACITIES, st.data())
def test_rates_are_max_min_fair(capacities: list[int], data: st.DataObject) -> None:
    """No link is over its capacity, and each flow has a full link on which nobody gets more than it."""
    links = [Link(f"l{i}", "a", "b", float(capacity), 0.0) for i, capacity in enumerate(capacities)]
    subsets = st.lists(st.sampled_from(range(len(links))), min_size=1, max_size=len(links), unique=True)
    routes = [tuple(links[i] for i in chosen) for chosen in data.draw(st.lists(subsets, min_size=1, max_size=8))]
    rates = max_min_rates(routes)
    load_of = {link.name: sum(rate for rate, route in zip(rates, routes, strict=True) if link in route) for link in links}
    for link in links:
        assert load_of[link.name] <= link.capacity_bytes_per_s * (1 + 1e-9)
    for rate, route in zip(rates, routes, strict=True):
        full = [link for link in route if load_of[link.name] >= link.capacity_bytes_per_s * (1 - 1e-9)]
        assert any(rate >= max(r for r, other in zip(rates, routes, strict=True) if link in other) * (1 - 1e-9) for link in full)
