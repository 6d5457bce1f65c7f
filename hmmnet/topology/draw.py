"""A machine as a picture: a tree for the terminal, an SVG for everything else.

Both show what matters for memory: which memories there are, through what a device is reached, and how fast. The SVG lays the vertices out in
layers by their distance from host memory, so switch trees read downwards, and draws links between devices and switches of one layer as arcs.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from hmmnet.units import show_rate, show_size, show_time

from .model import DeviceSpec, LinkSpec, MemoryNode, Switch, Topology

if TYPE_CHECKING:
    from rich.tree import Tree

BOX_WIDTH, BOX_HEIGHT = 108, 44
GAP_X, GAP_Y = 18, 84
MARGIN = 24
COLOURS = {MemoryNode: "#dbe9f6", DeviceSpec: "#fde3c8", Switch: "#e4e4e4"}
COHERENT = "#d5efd3"
LINK_COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#9d755d", "#8a8a8a")
LABELLED_LINKS_MAX = 12
"""With more links their labels would cover the picture; the legend by kind says the same."""


def about(vertex: MemoryNode | DeviceSpec | Switch) -> str:
    """The second line of a box."""
    if isinstance(vertex, MemoryNode):
        return f"memory {show_size(vertex.memory_bytes)}"
    if isinstance(vertex, DeviceSpec):
        return f"{vertex.model} {show_size(vertex.memory_bytes)}" + (" coherent" if vertex.kind == "coherent" else "")
    return vertex.kind


def link_text(link: LinkSpec) -> str:
    """A link in words: kind, rate in both directions where they differ, latency."""
    forward, back = link.capacity_bytes_per_s(True), link.capacity_bytes_per_s(False)
    rate = show_rate(forward) if forward == back else f"{show_rate(forward)} / {show_rate(back)}"
    return f"{link.kind} {rate}, {show_time(link.latency_s)}"


def terminal_tree(topology: Topology) -> Tree:
    """The machine as a tree that grows from its host memories; what is joined beside the tree stands behind each name."""
    from rich.tree import Tree

    root = Tree(f"[bold]{topology.name}[/]  {topology.description}")
    parents = _parents(topology)
    for name in [vertex.name for vertex in topology.vertices() if vertex.name not in parents]:
        _grow(topology, root.add(_label(topology, name, None, parents)), name, parents)
    return root


def _parents(topology: Topology) -> dict[str, LinkSpec]:
    """For each vertex below a host memory, the link that leads up: breadth first, devices are ends."""
    found: dict[str, LinkSpec] = {}
    layer = [node.name for node in topology.nodes]
    seen = set(layer)
    while layer:
        following = []
        for name in layer:
            for link in topology.links_of(name):
                other = link.other(name)
                if other not in seen:
                    seen.add(other)
                    found[other] = link
                    if not isinstance(topology.vertex(other), DeviceSpec):
                        following.append(other)
        layer = following
    return found


def _grow(topology: Topology, tree: Tree, name: str, parents: dict[str, LinkSpec]) -> None:
    alike: dict[str, list[str]] = {}
    for link in topology.links_of(name):
        below = link.other(name)
        if parents.get(below) is not link:
            continue
        if isinstance(topology.vertex(below), DeviceSpec):
            alike.setdefault(_label(topology, below, link, parents).partition("[/]")[2], []).append(below)
        else:
            _grow(topology, tree.add(_label(topology, below, link, parents)), below, parents)
    for rest, names in alike.items():
        shown = ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]} ({len(names)})"
        tree.add(f"[bold yellow]{shown}[/]{rest}")


def _label(topology: Topology, name: str, up: LinkSpec | None, parents: dict[str, LinkSpec]) -> str:
    vertex = topology.vertex(name)
    colour = "blue" if isinstance(vertex, MemoryNode) else "yellow" if isinstance(vertex, DeviceSpec) else "white"
    text = f"[bold {colour}]{name}[/]  {about(vertex)}"
    if up is not None:
        text += f"  [dim]{link_text(up)}[/]"
    beside: dict[str, list[LinkSpec]] = {}
    for link in topology.links_of(name):
        if link is not up and parents.get(link.other(name)) is not link:
            beside.setdefault(link.kind, []).append(link)
    for kind, links in beside.items():
        ends = links[0].other(name) if len(links) == 1 else f"{len(links)} others"
        rate = sum(link.capacity_bytes_per_s(link.a == name) for link in links)
        text += f"  [dim]+ {kind} to {ends}: {show_rate(rate)}[/]"
    return text


def layers(topology: Topology) -> list[list[str]]:
    """Vertices by their distance in links from host memory; what cannot be reached comes last."""
    found = [[node.name for node in topology.nodes]]
    seen = set(found[0])
    while found[-1]:
        following: list[str] = []
        for name in found[-1]:
            vertex = topology.vertex(name)
            if isinstance(vertex, DeviceSpec):
                continue
            for link in topology.links_of(name):
                other = link.other(name)
                if other not in seen:
                    seen.add(other)
                    following.append(other)
        found.append(following)
    rest = [vertex.name for vertex in topology.vertices() if vertex.name not in seen]
    return [layer for layer in [*found, rest] if layer]


def svg(topology: Topology) -> str:
    """The machine as a stand-alone SVG document."""
    rows = layers(topology)
    widest = max(len(row) for row in rows)
    width = 2 * MARGIN + widest * (BOX_WIDTH + GAP_X) - GAP_X
    width = max(width, 420)
    height = 2 * MARGIN + 30 + len(rows) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 20 * len({link.kind for link in topology.links}) + 30
    places: dict[str, tuple[float, float]] = {}
    for depth, row in enumerate(rows):
        step = (width - 2 * MARGIN) / len(row)
        for i, name in enumerate(row):
            places[name] = (MARGIN + step * (i + 0.5), MARGIN + 30 + depth * (BOX_HEIGHT + GAP_Y) + BOX_HEIGHT / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        f'<text x="{MARGIN}" y="{MARGIN + 4}" font-size="15" font-weight="bold">{escape(topology.name)}</text>',
    ]
    kinds = list(dict.fromkeys(link.kind for link in topology.links))
    colours = {kind: LINK_COLOURS[i % len(LINK_COLOURS)] for i, kind in enumerate(kinds)}
    parts += [_line(link, places, colours[link.kind]) for link in topology.links]
    if len(topology.links) <= LABELLED_LINKS_MAX:
        parts += [_rate_label(link, places) for link in topology.links if places[link.a][1] != places[link.b][1]]
    parts += [_box(topology.vertex(name), x, y) for name, (x, y) in places.items()]
    parts += _legend(topology, height)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _lift(x1: float, x2: float) -> float:
    """How far an arc between two boxes of one layer hangs below them."""
    return BOX_HEIGHT / 2 + 14 + abs(x2 - x1) * 0.06


def _line(link: LinkSpec, places: dict[str, tuple[float, float]], colour: str) -> str:
    (x1, y1), (x2, y2) = places[link.a], places[link.b]
    stroke = min(6.0, 1.5 + link.capacity_bytes_per_s(True) / 100e9)
    path = f"M{x1:.0f},{y1:.0f} L{x2:.0f},{y2:.0f}"
    if y1 == y2:
        path = f"M{x1:.0f},{y1:.0f} Q{(x1 + x2) / 2:.0f},{y1 + 2 * _lift(x1, x2):.0f} {x2:.0f},{y2:.0f}"
    title = f"<title>{escape(link.name)}: {escape(link_text(link))}</title>"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{stroke:.1f}">{title}</path>'


def _rate_label(link: LinkSpec, places: dict[str, tuple[float, float]]) -> str:
    (x1, y1), (x2, y2) = places[link.a], places[link.b]
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    text = show_rate(link.capacity_bytes_per_s(True))
    width = 6.4 * len(text)
    return (
        f'<rect x="{x - width / 2:.0f}" y="{y - 8:.0f}" width="{width:.0f}" height="14" fill="white" opacity="0.9"/>'
        f'<text x="{x:.0f}" y="{y + 3:.0f}" text-anchor="middle" fill="#333">{escape(text)}</text>'
    )


def _box(vertex: MemoryNode | DeviceSpec | Switch, x: float, y: float) -> str:
    colour = COHERENT if isinstance(vertex, DeviceSpec) and vertex.kind == "coherent" else COLOURS[type(vertex)]
    corner = f'x="{x - BOX_WIDTH / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}"'
    return (
        f'<rect {corner} rx="6" fill="{colour}" stroke="#555"/>'
        f'<text x="{x:.0f}" y="{y - 4:.0f}" text-anchor="middle" font-weight="bold">{escape(vertex.name)}</text>'
        f'<text x="{x:.0f}" y="{y + 12:.0f}" text-anchor="middle" font-size="10">{escape(about(vertex))}</text>'
    )


def _legend(topology: Topology, height: float) -> list[str]:
    kinds: dict[str, LinkSpec] = {}
    for link in topology.links:
        kinds.setdefault(link.kind, link)
    first = height - 20 * len(kinds) - 4
    parts = []
    for i, link in enumerate(kinds.values()):
        y = first + 20 * i
        parts.append(f'<rect x="{MARGIN}" y="{y - 6:.0f}" width="22" height="3" fill="{LINK_COLOURS[i % len(LINK_COLOURS)]}"/>')
        parts.append(f'<text x="{MARGIN + 30}" y="{y:.0f}" fill="#444">{escape(link_text(link))}</text>')
    return parts
