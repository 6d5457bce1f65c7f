"""A machine as a tree that grows from its host memories.

Every vertex hangs below the link that leads to host memory on the shortest way; what is joined beside that (NVLink between GPUs,
links between sockets) stands behind each name. Subtrees that look alike are drawn once: a reader wants to see "four switches with
four GPUs each", not sixty-four lines.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from hmmnet.units import show_rate, show_size, show_time

from .model import DeviceSpec, LinkSpec, MemoryNode, Switch, Topology
from .names import compact

if TYPE_CHECKING:
    from rich.tree import Tree


def about(vertex: MemoryNode | DeviceSpec | Switch) -> str:
    """What a vertex is, in a few words."""
    if isinstance(vertex, MemoryNode):
        return f"memory {show_size(vertex.memory_bytes)}"
    if isinstance(vertex, DeviceSpec):
        return f"{vertex.model} {show_size(vertex.memory_bytes)}" + (" coherent" if vertex.kind == "coherent" else "")
    return vertex.kind if "switch" in vertex.kind or "port" in vertex.kind else f"{vertex.kind} switch"


def link_text(link: LinkSpec) -> str:
    """A link in words: kind, rate in both directions where they differ, latency."""
    return f"{link.kind} {rate_text(link)}, {show_time(link.latency_s)}"


def rate_text(link: LinkSpec) -> str:
    """What a link carries, both ways where they differ: ``375 / 297 GB/s``."""
    forward, back = show_rate(link.capacity_bytes_per_s(True)), show_rate(link.capacity_bytes_per_s(False))
    if forward == back:
        return forward
    number, _, unit = forward.partition(" ")
    return f"{number} / {back}" if back.endswith(f" {unit}") else f"{forward} / {back}"


def uplinks(topology: Topology) -> dict[str, LinkSpec]:
    """For each vertex below a host memory, the link that leads up: breadth first, the widest link first, devices are ends."""
    found: dict[str, LinkSpec] = {}
    layer = [node.name for node in topology.nodes]
    seen = set(layer)
    while layer:
        following: dict[str, LinkSpec] = {}
        for name in layer:
            for link in topology.links_of(name):
                other = link.other(name)
                known = following.get(other)
                if other not in seen and (known is None or link.capacity_bytes_per_s(True) > known.capacity_bytes_per_s(True)):
                    following[other] = link
        found |= following
        seen |= set(following)
        layer = [name for name in following if not isinstance(topology.vertex(name), DeviceSpec)]
    return found


def below(topology: Topology, up: dict[str, LinkSpec]) -> dict[str, list[str]]:
    """The children of each vertex, in the order of the file."""
    children: dict[str, list[str]] = {vertex.name: [] for vertex in topology.vertices()}
    for vertex in topology.vertices():
        if vertex.name in up:
            children[up[vertex.name].other(vertex.name)].append(vertex.name)
    return children


def terminal_tree(topology: Topology) -> Tree:
    """The machine for a terminal."""
    from rich.markup import escape
    from rich.tree import Tree

    root = Tree(f"[bold]{escape(topology.name)}[/]  {escape(topology.description)}", guide_style="dim")
    grower = _Grower(topology)
    roots = [vertex.name for vertex in topology.vertices() if vertex.name not in grower.up]
    for names in grower.alike(roots):
        grower.grow(root, names, per_parent=0)
    return root


class _Grower:
    """Adds vertices to a rich tree, alike ones together."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self.up = uplinks(topology)
        self._children = below(topology, self.up)

    def alike(self, names: Sequence[str]) -> list[list[str]]:
        """`names` in groups that would look the same but for their names."""
        groups: dict[Hashable, list[str]] = {}
        for name in names:
            groups.setdefault(self._shape(name), []).append(name)
        return list(groups.values())

    def _shape(self, name: str) -> Hashable:
        inner: dict[Hashable, int] = {}
        for child in self._children[name]:
            shape = self._shape(child)
            inner[shape] = inner.get(shape, 0) + 1
        return self._words(name), tuple(inner.items())

    def grow(self, tree: Tree, names: list[str], per_parent: int) -> None:
        """Add `names`, which are alike and of which each parent has `per_parent` (0: say nothing about that), and what is below."""
        from rich.markup import escape

        vertex = self._topology.vertex(names[0])
        colour = "blue" if isinstance(vertex, MemoryNode) else "yellow" if isinstance(vertex, DeviceSpec) else "white"
        each = f"[dim]each with {per_parent}:[/] " if per_parent and per_parent < len(names) else ""
        branch = tree.add(f"{each}[bold {colour}]{escape(compact(names))}[/]  {self._words(names[0])}")
        for group in self.alike([child for name in names for child in self._children[name]]):
            self.grow(branch, group, len(group) // len(names))

    def _words(self, name: str) -> str:
        """All that is said behind a name, as rich markup."""
        from rich.markup import escape

        text = escape(about(self._topology.vertex(name)))
        up = self.up.get(name)
        if up is not None:
            text += f"  [dim]{escape(link_text(up))}[/]"
        beside: dict[str, list[LinkSpec]] = {}
        for link in self._topology.links_of(name):
            if link is not up and self.up.get(link.other(name)) is not link:
                beside.setdefault(link.kind, []).append(link)
        for kind, links in beside.items():
            ends = links[0].other(name) if len(links) == 1 else f"{len(links)} others"
            rate = sum(link.capacity_bytes_per_s(link.a == name) for link in links)
            text += f"  [dim]+ {escape(kind)} to {ends}: {show_rate(rate)}[/]"
        return text
