"""Which links a transfer crosses.

A route is the path with the fewest links; among those the *widest* (largest bottleneck capacity in the direction of travel), then the one
with the least latency, then the one whose links come first in the file: always the same answer for the same file. (Ties are settled
at each vertex on the way, as widest-shortest routing does.) Devices are ends, never ways through. Two GPUs with NVLink between them
hence use it, though PCIe through a switch or the root complex is as short.

Routes are found once for each source by a breadth-first search in layers and kept; the largest preset (64 devices) needs a millisecond.
"""

from __future__ import annotations

from typing import NamedTuple

from hmmnet.errors import TopologyError

from .model import DeviceSpec, LinkSpec, Topology


class Hop(NamedTuple):
    """One link of a route; `forward` when it is crossed from its end a to its end b."""

    link: LinkSpec
    forward: bool

    @property
    def capacity_bytes_per_s(self) -> float:
        """What the link carries in the direction of travel."""
        return self.link.capacity_bytes_per_s(self.forward)


class _Path(NamedTuple):
    """The best way to a vertex so far; smaller `key` is better among paths of equal length."""

    key: tuple[float, float, tuple[int, ...]]
    hops: tuple[Hop, ...]


_START = _Path((float("-inf"), 0.0, ()), ())


class Routes:
    """Routes between the memory nodes and devices of one topology."""

    def __init__(self, topology: Topology) -> None:
        self._edges: dict[str, list[tuple[int, Hop, str]]] = {vertex.name: [] for vertex in topology.vertices()}
        self._ends_only = {device.name for device in topology.devices}
        self._topology = topology
        self._found: dict[str, dict[str, _Path]] = {}
        for index, link in enumerate(topology.links):
            self._edges[link.a].append((index, Hop(link, True), link.b))
            self._edges[link.b].append((index, Hop(link, False), link.a))

    def route(self, source: str, target: str) -> tuple[Hop, ...]:
        """The links from `source` to `target`, in order; empty when they are the same. Raises TopologyError when there is no way."""
        hops = self.find(source, target)
        if hops is None:
            raise TopologyError([f'{self._topology.name}: no route from "{source}" to "{target}"; add a [[link]] that joins their parts'])
        return hops

    def find(self, source: str, target: str) -> tuple[Hop, ...] | None:
        """Like `route`, but None when there is no way. Raises KeyError for a name that the topology does not have."""
        if target not in self._edges:
            raise KeyError(target)
        path = self._from(source).get(target)
        return None if path is None else path.hops

    def bandwidth_bytes_per_s(self, source: str, target: str) -> float:
        """The bottleneck of the route; infinite from a vertex to itself."""
        return min((hop.capacity_bytes_per_s for hop in self.route(source, target)), default=float("inf"))

    def latency_s(self, source: str, target: str) -> float:
        """The sum of the latencies along the route."""
        return sum(hop.link.latency_s for hop in self.route(source, target))

    def nearest_node(self, device: DeviceSpec | str) -> str | None:
        """The memory node with the best route, the first in the file among equals; None when no memory is reached."""
        reached = self._from(device if isinstance(device, str) else device.name)
        best: tuple[int, tuple[float, float], str] | None = None
        for node in self._topology.nodes:
            path = reached.get(node.name)
            if path is not None and (best is None or (len(path.hops), path.key[:2]) < best[:2]):
                best = (len(path.hops), path.key[:2], node.name)
        return None if best is None else best[2]

    def _from(self, source: str) -> dict[str, _Path]:
        found = self._found.get(source)
        if found is None:
            found = self._found[source] = self._search(source)
        return found

    def _search(self, source: str) -> dict[str, _Path]:
        if source not in self._edges:
            raise KeyError(source)
        reached = {source: _START}
        layer = {source: _START}
        while layer:
            following: dict[str, _Path] = {}
            for name, path in layer.items():
                if name in self._ends_only and name != source:
                    continue
                for index, hop, end in self._edges[name]:
                    if end in reached:
                        continue
                    longer = _extend(path, index, hop)
                    if end not in following or longer.key < following[end].key:
                        following[end] = longer
            reached.update(following)
            layer = following
        return reached


def _extend(path: _Path, index: int, hop: Hop) -> _Path:
    narrow, latency, indices = path.key
    widest = max(narrow, -hop.capacity_bytes_per_s)
    return _Path((widest, latency + hop.link.latency_s, (*indices, index)), (*path.hops, hop))
