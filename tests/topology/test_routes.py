"""Routes are shortest, then widest, never through a device, and always the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.errors import TopologyError
from hmmnet.topology.model import LinkSpec, Topology
from hmmnet.topology.routes import Hop, Routes

from .machines import NVLINK, PCIE, link, machine

NAMES = ["node0", "node1", "gpu0", "gpu1", "gpu2", "switch0", "switch1"]


@st.composite
def machines(draw: st.DrawFn) -> Topology:
    """Any graph over two memories, three devices and two switches."""
    pairs = draw(st.lists(st.sampled_from(list(itertools.combinations(NAMES, 2))), max_size=14))
    rates = st.sampled_from([1e9, 2e9, 4e9])
    links = [
        LinkSpec(f"link{i}", a, b, "x", draw(rates), draw(st.sampled_from([0.0, 1e-6])), draw(st.none() | rates), draw(st.integers(1, 2)))
        for i, (a, b) in enumerate(pairs)
    ]
    return machine(links, nodes=2, devices=3, switches=2)


def simple_paths(topology: Topology, at: str, target: str, seen: tuple[str, ...] = ()) -> Iterator[list[Hop]]:
    """Every path that does not pass a device: the slow way to the same answer."""
    if at == target:
        yield []
        return
    if at.startswith("gpu") and seen:
        return
    for one in topology.links_of(at):
        end = one.other(at)
        if end not in (*seen, at):
            for rest in simple_paths(topology, end, target, (*seen, at)):
                yield [Hop(one, one.a == at), *rest]


def width(hops: list[Hop] | tuple[Hop, ...]) -> float:
    return min((hop.capacity_bytes_per_s for hop in hops), default=float("inf"))


@given(machines(), st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_against_all_paths(topology: Topology, source: str, target: str) -> None:
    """No path is shorter; none of that length is wider; there is a route when there is a path."""
    found = Routes(topology).find(source, target)
    paths = list(simple_paths(topology, source, target))
    assert (found is None) == (not paths)
    if found is None:
        return
    at = source
    for hop in found:
        assert hop.forward == (hop.link.a == at)
        at = hop.link.other(at)
    assert at == target
    shortest = min(map(len, paths))
    assert len(found) == shortest
    assert width(found) == max(width(path) for path in paths if len(path) == shortest)
    assert found == Routes(topology).find(source, target)


def test_nvlink_is_taken_where_both_are_as_short() -> None:
    """
    gpu0 -- switch0 (PCIe) -- gpu1
      +---- switch1 (NVLink) ---+
    """
    topology = machine(
        [
            link("node0", "switch0"),
            *(link("switch0", f"gpu{i}") for i in range(2)),
            *(link(f"gpu{i}", "switch1", NVLINK) for i in range(2)),
        ],
        switches=2,
    )
    routes = Routes(topology)
    assert [hop.link.name for hop in routes.route("gpu0", "gpu1")] == ["gpu0-switch1", "gpu1-switch1"]
    assert routes.bandwidth_bytes_per_s("gpu0", "gpu1") == NVLINK
    assert [hop.forward for hop in routes.route("gpu0", "node0")] == [False, False]
    assert routes.latency_s("node0", "gpu0") == pytest.approx(2e-6)


def test_directions_and_counts() -> None:
    """The way back has its own bandwidth, and parallel links add up."""
    topology = machine([link("node0", "gpu0", 10e9, bandwidth_back_bytes_per_s=4e9, count=3)], devices=1)
    routes = Routes(topology)
    assert routes.bandwidth_bytes_per_s("node0", "gpu0") == 30e9
    assert routes.bandwidth_bytes_per_s("gpu0", "node0") == 12e9


def test_from_a_thing_to_itself() -> None:
    """Nothing to cross."""
    routes = Routes(machine([link("node0", "gpu0")], devices=1))
    assert routes.route("gpu0", "gpu0") == ()
    assert routes.bandwidth_bytes_per_s("gpu0", "gpu0") == float("inf")


def test_devices_do_not_forward() -> None:
    """A chain of GPUs is no way to the host, and the error says what is missing."""
    routes = Routes(machine([link("node0", "gpu0"), link("gpu0", "gpu1")]))
    assert routes.find("gpu0", "gpu1") is not None
    assert routes.find("node0", "gpu1") is None
    with pytest.raises(TopologyError, match=r'no route from "gpu1" to "node0"; add a \[\[link\]\]'):
        routes.route("gpu1", "node0")


@pytest.mark.parametrize(("source", "target"), [("node0", "gpu9"), ("gpu9", "node0")])
def test_unknown_names(source: str, target: str) -> None:
    """A name that the machine does not have is the caller's bug."""
    with pytest.raises(KeyError, match="gpu9"):
        Routes(machine([link("node0", "gpu0")])).route(source, target)


def test_nearest_node() -> None:
    """By hops, then by width, then by the file's order; None when there is none."""
    topology = machine([link("node0", "node1"), link("node1", "gpu0"), link("node0", "gpu1", PCIE), link("node1", "gpu1", NVLINK)], 2, 3)
    routes = Routes(topology)
    assert routes.nearest_node("gpu0") == "node1"
    assert routes.nearest_node(topology.device("gpu1")) == "node1"
    assert routes.nearest_node("gpu2") is None
