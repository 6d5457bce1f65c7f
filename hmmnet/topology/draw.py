"""A machine as an SVG picture.

Host memories stand at the top, what hangs below them below, each parent above the middle of its children; what is reached through
devices only (an NVLink switch) stands at the bottom. Links beside that tree are arcs: above the row for host memories, below it for
others. A machine with many devices stacks those of one switch. Links are coloured by kind, and the wider the faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from hmmnet.units import show_size

from .model import DeviceSpec, LinkSpec, MemoryNode, Switch, Topology
from .tree import about, below, link_text, rate_text, uplinks

BOX_WIDTH, BOX_HEIGHT = 124, 44
SMALL_HEIGHT = 22
GAP_X, GAP_Y = 18, 66
MARGIN = 24
COLUMNS_MAX = 10
"""Machines that are wider stack the devices of each switch."""
STACK_GAP = 14
ARC_HEIGHT = 16
"""How much higher an arc is for each box that it passes over."""
COLOURS = {MemoryNode: "#dbe9f6", DeviceSpec: "#fde3c8", Switch: "#e4e4e4"}
COHERENT = "#d5efd3"
LINK_COLOURS = ("#4c78a8", "#54a24b", "#e45756", "#b279a2", "#9d755d", "#8a8a8a")
LABELLED_LINKS_MAX = 12
"""With more links their labels would cover the picture; the legend says the same."""
CHARACTER_WIDTH = 6.3
"""Of the picture's 11-pixel sans-serif, on average; only legends and labels are sized by it."""


@dataclass(frozen=True)
class Box:
    """Where a vertex stands: its centre, and whether it is a small one in a stack."""

    x: float
    y: float
    row: int
    stacked: bool = False

    @property
    def height(self) -> float:
        """Its height."""
        return SMALL_HEIGHT if self.stacked else BOX_HEIGHT

    @property
    def top(self) -> float:
        """Its upper edge."""
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.height / 2


class Layout:
    """Where everything stands. `boxes` by name; `width` and `bottom` of the whole."""

    def __init__(self, topology: Topology, width_min: float = 0.0) -> None:
        self._topology = topology
        self.up = uplinks(topology)
        self._children = below(topology, self.up)
        self._roots = [node.name for node in topology.nodes]
        self._stacks = sum(self._columns(root, False) for root in self._roots) > COLUMNS_MAX
        columns = max(1.0, sum(self._columns(root, self._stacks) for root in self._roots))
        self.width = max(width_min, 2 * MARGIN + columns * (BOX_WIDTH + GAP_X) - GAP_X)
        self._first_x = (self.width - (columns - 1) * (BOX_WIDTH + GAP_X)) / 2
        self._first_y = MARGIN + 34 + self._arcs_above() + BOX_HEIGHT / 2
        self.boxes: dict[str, Box] = {}
        at = 0.0
        for root in self._roots:
            at += self._place(root, at, 0)
        self._place_rest(columns)
        self.bottom = max(box.bottom for box in self.boxes.values())

    def _arcs_above(self) -> float:
        beside = [link for link in self._topology.links if link.a in self._roots and link.b in self._roots]
        return max((self.arc_height(link) for link in beside), default=0.0)

    def arc_height(self, link: LinkSpec) -> float:
        """How far an arc rises above its row, or hangs below it."""
        if link.a in self._roots and link.b in self._roots:
            return 10 + ARC_HEIGHT * abs(self._roots.index(link.a) - self._roots.index(link.b))
        return min(GAP_Y * 0.8, 10 + ARC_HEIGHT * abs(self.boxes[link.a].x - self.boxes[link.b].x) / (BOX_WIDTH + GAP_X))

    def _stack_of(self, name: str) -> list[str]:
        """The children of `name` that stand in one stack."""
        devices = [child for child in self._children[name] if isinstance(self._topology.vertex(child), DeviceSpec)]
        return devices if len(devices) > 1 else []

    def _columns(self, name: str, stacks: bool) -> float:
        stack = self._stack_of(name) if stacks else []
        return max(1.0, sum(self._columns(child, stacks) for child in self._children[name] if child not in stack) + bool(stack))

    def _x(self, column: float) -> float:
        return self._first_x + column * (BOX_WIDTH + GAP_X)

    def _y(self, row: int) -> float:
        return self._first_y + row * (BOX_HEIGHT + GAP_Y)

    def _place(self, name: str, first: float, row: int) -> float:
        """Place `name` and what is below it from column `first` on; how many columns that took."""
        stack = self._stack_of(name) if self._stacks else []
        at = first
        for child in self._children[name]:
            if child not in stack:
                at += self._place(child, at, row + 1)
        for i, child in enumerate(stack):
            y = self._y(row) + BOX_HEIGHT / 2 + STACK_GAP + (i + 0.5) * (SMALL_HEIGHT + 4)
            self.boxes[child] = Box(self._x(at), y, row + 1, stacked=True)
        columns = max(1.0, at - first + bool(stack))
        self.boxes[name] = Box(self._x(first + (columns - 1) / 2), self._y(row), row)
        return columns

    def _place_rest(self, columns: float) -> None:
        """What no memory reaches without passing a device: one more row, spread over the whole width."""
        rest = [vertex.name for vertex in self._topology.vertices() if vertex.name not in self.boxes]
        row = 1 + max((box.row for box in self.boxes.values()), default=-1)
        lowest = max((box.bottom for box in self.boxes.values()), default=self._first_y)
        for i, name in enumerate(rest):
            self.boxes[name] = Box(self._x((i + 0.5) * columns / len(rest) - 0.5), lowest + GAP_Y + BOX_HEIGHT / 2, row)


def svg(topology: Topology) -> str:
    """The machine as a stand-alone SVG document."""
    layout = Layout(topology, 2 * MARGIN + CHARACTER_WIDTH * len(topology.description))
    width = layout.width
    texts = list(dict.fromkeys(link_text(link) for link in topology.links))
    colours = {text: LINK_COLOURS[i % len(LINK_COLOURS)] for i, text in enumerate(texts)}
    height = layout.bottom + (28 if texts else 0) + 18 * len(texts) + MARGIN
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        f'<text x="{MARGIN}" y="{MARGIN + 6}" font-size="16" font-weight="bold">{escape(topology.name)}</text>',
        f'<text x="{MARGIN}" y="{MARGIN + 23}" fill="#555">{escape(topology.description)}</text>',
    ]
    parts += [_line(link, layout, colours[link_text(link)]) for link in topology.links]
    if len(topology.links) <= LABELLED_LINKS_MAX:
        parts += [_rate_label(link, layout) for link in topology.links]
    parts += [_box(topology.vertex(name), box) for name, box in layout.boxes.items()]
    parts += _legend(texts, colours, layout.bottom + 36)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _is_arc(one: Box, other: Box) -> bool:
    return one.row == other.row and not one.stacked and not other.stacked


def _line(link: LinkSpec, layout: Layout, colour: str) -> str:
    upper, lower = sorted((layout.boxes[link.a], layout.boxes[link.b]), key=lambda box: (box.row, box.x))
    if _is_arc(upper, lower):
        edge, sign = (upper.top, -1) if upper.row == 0 else (upper.bottom, 1)
        bend = edge + sign * layout.arc_height(link) * 4 / 3  # a cubic reaches three quarters of its handles' height
        path = f"M{upper.x:.0f},{edge:.0f} C{upper.x:.0f},{bend:.0f} {lower.x:.0f},{bend:.0f} {lower.x:.0f},{edge:.0f}"
    elif lower.stacked and link in (layout.up.get(link.a), layout.up.get(link.b)):
        spine = lower.x - BOX_WIDTH / 2 - 8
        down = f"V{lower.y:.0f} H{lower.x:.0f}"
        if upper.x == lower.x:
            path = f"M{upper.x:.0f},{upper.y:.0f} H{spine:.0f} {down}"
        else:
            path = f"M{upper.x:.0f},{upper.bottom:.0f} L{spine:.0f},{upper.bottom + STACK_GAP:.0f} {down}"
    else:
        path = f"M{upper.x:.0f},{upper.bottom:.0f} L{lower.x:.0f},{lower.top:.0f}"
    title = f"<title>{escape(link.name)}: {escape(link_text(link))}</title>"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{_stroke(link):.1f}">{title}</path>'


def _stroke(link: LinkSpec) -> float:
    """1 pixel for 10 GB/s, 3 for 100, 5 for 1000: the eye compares logarithms."""
    rate = max(link.capacity_bytes_per_s(True), link.capacity_bytes_per_s(False))
    return min(6.0, max(1.0, 1 + 2 * math.log10(rate / 10e9)))


def _rate_label(link: LinkSpec, layout: Layout) -> str:
    one, other = layout.boxes[link.a], layout.boxes[link.b]
    x, y = (one.x + other.x) / 2, (one.y + other.y) / 2
    if _is_arc(one, other):
        y = one.top - layout.arc_height(link) if one.row == 0 else one.bottom + layout.arc_height(link)
    text = rate_text(link)
    width = CHARACTER_WIDTH * len(text) + 4
    return (
        f'<rect x="{x - width / 2:.0f}" y="{y - 7:.0f}" width="{width:.0f}" height="14" rx="3" fill="white"/>'
        f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" fill="#333">{escape(text)}</text>'
    )


def _fit(text: str, letters: int) -> str:
    """`text` cut to `letters`, escaped; the box's title holds all of it."""
    return escape(text if len(text) <= letters else text[: letters - 1] + "\u2026")


def _box(vertex: MemoryNode | DeviceSpec | Switch, box: Box) -> str:
    colour = COHERENT if isinstance(vertex, DeviceSpec) and vertex.kind == "coherent" else COLOURS[type(vertex)]
    left = box.x - BOX_WIDTH / 2
    frame = (
        f'<rect x="{left:.0f}" y="{box.top:.0f}" width="{BOX_WIDTH}" height="{box.height:.0f}" rx="6" fill="{colour}" stroke="#555">'
        f"<title>{escape(vertex.name)}: {escape(about(vertex))}</title></rect>"
    )
    if box.stacked and isinstance(vertex, DeviceSpec):
        return (
            f'{frame}<text x="{left + 8:.0f}" y="{box.y + 4:.0f}" font-weight="bold">{_fit(vertex.name, 9)}</text>'
            f'<text x="{left + BOX_WIDTH - 8:.0f}" y="{box.y + 4:.0f}" text-anchor="end" font-size="10">'
            f"{show_size(vertex.memory_bytes)}</text>"
        )
    return (
        f'{frame}<text x="{box.x:.0f}" y="{box.y - 4:.0f}" text-anchor="middle" font-weight="bold">{_fit(vertex.name, 17)}</text>'
        f'<text x="{box.x:.0f}" y="{box.y + 12:.0f}" text-anchor="middle" font-size="10">{_fit(about(vertex), 22)}</text>'
    )


def _legend(texts: list[str], colours: dict[str, str], first: float) -> list[str]:
    parts = []
    for i, text in enumerate(texts):
        y = first + 18 * i
        parts.append(f'<rect x="{MARGIN}" y="{y - 5:.0f}" width="22" height="3" fill="{colours[text]}"/>')
        parts.append(f'<text x="{MARGIN + 30}" y="{y:.0f}" fill="#444">{escape(text)}</text>')
    return parts
