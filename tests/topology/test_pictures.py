"""Trees, tables and SVG pictures of machines: everything is there, nothing overlaps, what looks alike is drawn once."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console, RenderableType

from hmmnet.topology.draw import BOX_WIDTH, Layout, svg
from hmmnet.topology.load import load, parse, preset_names
from hmmnet.topology.matrix import ends, matrix, route_rows
from hmmnet.topology.tree import link_text, rate_text, terminal_tree

from .machines import link, machine

SVG = "{http://www.w3.org/2000/svg}"


def printed(what: RenderableType) -> list[str]:
    """What a terminal of 100 columns shows."""
    console = Console(width=100, highlight=False)
    with console.capture() as capture:
        console.print(what)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_tree_that_is_all_alike() -> None:
    """Sixty-four GPUs in four lines."""
    assert printed(terminal_tree(load("pcie-64")))[1:] == [
        "└── node0  memory 1 TiB",
        "    └── spine[0-3]  pcie4 switch  pcie4 31.5 GB/s, 302 ns",
        "        └── each with 4: leaf[0-15]  pcie4 switch  pcie4 31.5 GB/s, 105 ns",
        "            └── each with 4: gpu[0-63]  gpu 8 GiB  pcie4 31.5 GB/s, 302 ns",
    ]


def test_links_beside_the_tree() -> None:
    """NVLink and UPI stand behind the names; the NVLink switch hangs on nothing else."""
    assert printed(terminal_tree(load("nvlink-8")))[1:] == [
        "├── node0  memory 512 GiB  + upi to node1: 96 GB/s",
        "│   └── gpu[0-3]  gpu 80 GiB  pcie5 63 GB/s, 500 ns  + nvlink4 to nvswitch: 450 GB/s",
        "├── node1  memory 512 GiB  + upi to node0: 96 GB/s",
        "│   └── gpu[4-7]  gpu 80 GiB  pcie5 63 GB/s, 500 ns  + nvlink4 to nvswitch: 450 GB/s",
        "└── nvswitch  nvswitch  + nvlink4 to 8 others: 3.60 TB/s",
    ]


def test_what_differs_is_drawn_apart() -> None:
    """Two kinds of device at one node; words of a file are no markup."""
    lines = printed(terminal_tree(load("dmirror-4")))
    assert [line.split("  ")[-2:-1] for line in lines[2:]] == [["dmirror 16 GiB"], ["dmirror 16 GiB coherent"]]
    text = 'description = "[red]x[/]"\n[[memory]]\nname = "m"\nsize = "1 GiB"\n[[device]]\nname = "d"\nmodel = "[b]"\nmemory = "1 GiB"\n'
    text += '[[link]]\na = "m"\nb = "d"\nkind = "[i]"\nbandwidth = "1 GB/s"\n'
    shown = "\n".join(printed(terminal_tree(parse(text))))
    for word in ("[red]x[/]", "[b] 1 GiB", "[i] 1 GB/s"):
        assert word in shown


def test_rates_both_ways() -> None:
    """One number when equal, one unit when it is the same."""
    assert rate_text(link("a", "b", 1e9)) == "1 GB/s"
    assert rate_text(link("a", "b", 375e9, bandwidth_back_bytes_per_s=297e9)) == "375 / 297 GB/s"
    assert rate_text(link("a", "b", 1e9, bandwidth_back_bytes_per_s=1e6)) == "1 GB/s / 1 MB/s"


@pytest.mark.parametrize("name", preset_names())
def test_boxes_stand_apart(name: str) -> None:
    """No two boxes of a preset overlap, and all are inside the picture."""
    layout = Layout(load(name))
    assert set(layout.boxes) == {vertex.name for vertex in load(name).vertices()}
    for one, other in itertools.combinations(layout.boxes.values(), 2):
        assert abs(one.x - other.x) >= BOX_WIDTH or one.bottom <= other.top or other.bottom <= one.top
    for box in layout.boxes.values():
        assert BOX_WIDTH / 2 <= box.x <= layout.width - BOX_WIDTH / 2
        assert box.top >= 0
        assert box.bottom <= layout.bottom


@pytest.mark.parametrize("name", preset_names())
def test_svg_is_whole(name: str) -> None:
    """Well-formed, a path with a title for each link, a box with a title for each part."""
    topology = load(name)
    root = ET.fromstring(svg(topology))
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert len(list(root.iter(f"{SVG}path"))) == len(topology.links)
    for link_ in topology.links:
        assert any(title.startswith(f"{link_.name}: ") for title in titles)
    for vertex in topology.vertices():
        assert any(title.startswith(f"{vertex.name}: ") for title in titles)


def test_legend_tells_links_of_one_kind_apart() -> None:
    """What differs in more than its name has a colour of its own, the same in the legend and in the picture."""
    topology = load("pcie-64")
    root = ET.fromstring(svg(topology))
    strokes = {path.get("stroke") for path in root.iter(f"{SVG}path")}
    assert len(strokes) == len({link_text(link) for link in topology.links}) == 2
    assert strokes == {box.get("fill") for box in root.iter(f"{SVG}rect") if box.get("height") == "3"}


def test_parents_stand_above_their_children() -> None:
    """In the middle of them; wide machines stack the devices of a switch."""
    layout = Layout(load("pcie-64"))
    leaf = layout.boxes["leaf5"]
    for name in ("gpu20", "gpu21", "gpu22", "gpu23"):
        assert layout.boxes[name].stacked
        assert layout.boxes[name].x == leaf.x
    assert layout.boxes["node0"].x == pytest.approx((layout.boxes["leaf0"].x + layout.boxes["leaf15"].x) / 2)


def test_svg_of_foreign_names() -> None:
    """Text of a file cannot break out of the picture, and long names are cut in their boxes only."""
    name = "g" * 60
    text = f'description = "<b> & \\"x\\""\n[[memory]]\nname = "m"\nsize = "1 GiB"\n[[device]]\nname = "{name}"\nmemory = "1 GiB"\n'
    text += f'[[link]]\na = "m"\nb = "{name}"\nkind = "</svg>"\nbandwidth = "1 GB/s"\n'
    picture = svg(parse(text))
    ET.fromstring(picture)
    assert "<b>" not in picture
    assert f">{name}<" not in picture
    assert f"<title>{name}: " in picture


def test_svg_of_a_plain_host() -> None:
    """One box, no legend."""
    ET.fromstring(svg(machine([], devices=0)))


def test_matrix() -> None:
    """From row to column in GB/s, both directions by themselves; machines with many ends have none."""
    table = matrix(load("grace-hopper"))
    assert table is not None
    shown = printed(table)
    assert shown[0].split() == ["GB/s", "grace", "hopper"]
    assert shown[1].split() == ["grace", "-", "375"]
    assert shown[3].split() == ["hopper", "297", "-"]
    assert matrix(load("pcie-64")) is None
    assert matrix(machine([], devices=0)) is None


def test_routes_as_data() -> None:
    """Every ordered pair."""
    topology = load("pcie-switch-4")
    rows = route_rows(topology)
    assert len(rows) == len(ends(topology)) * (len(ends(topology)) - 1)
    row = next(row for row in rows if (row["source"], row["target"]) == ("gpu0", "node0"))
    assert row["links"] == ["switch0-gpu0", "uplink"]
    assert row["latency_s"] == pytest.approx(604e-9)
