"""A topology is loaded whole or not at all: every mistake of a file comes at once, with its line and its mend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hmmnet.errors import TopologyError
from hmmnet.topology import draw, schema
from hmmnet.topology.load import load, parse, preset_names
from hmmnet.topology.routes import Routes

GOOD = """
[[memory]]
name = "ram"
size = "1 GiB"
[[device]]
name = "gpu[0-1]"
memory = "1 GiB"
[[link]]
a = "ram"
b = "gpu[0-1]"
bandwidth = "10 GB/s"
"""

BAD = """\
name = "x"
[[memory]]
name = "ram"
size = "1 PiB"
[[device]]
name = "gpu0"
memory = "200 TiB"
kinda = "private"
[[device]]
name = "gpu0"
memory = "4 GiB"
[[link]]
a = "ram"
b = "gpu1"
bandwidth = "0 GB/s"
latancy = "1 us"
"""


@pytest.mark.parametrize("name", ["two-gpus", "pcie-switch-4", "nvlink-8", "grace-hopper", "mi300a-4", "pcie-64", "dmirror-4"])
def test_presets(name: str) -> None:
    """Each preset loads, is named after its file, and every device reaches every memory both ways."""
    assert name in preset_names()
    topology = load(name)
    assert topology.name == name
    routes = Routes(topology)
    for device in topology.device_names:
        for node in topology.nodes:
            assert routes.route(node.name, device)
            assert routes.route(device, node.name)


def test_all_mistakes_at_once() -> None:
    """Seven mistakes, each with file, line, thing, key and, where there is one, what was meant."""
    with pytest.raises(TopologyError) as caught:
        parse(BAD, "bad.toml")
    problems = caught.value.problems
    wanted = [
        (4, "PiB"),
        (7, "address space"),
        (8, 'mean "kind"'),
        (10, "taken"),
        (14, 'mean "gpu0"'),
        (15, "arrive"),
        (16, 'mean "latency"'),
    ]
    assert len(problems) == len(wanted)
    for problem, (line, text) in zip(problems, wanted, strict=True):
        assert str(problem).startswith(f"bad.toml:{line}: ")
        assert text in str(problem)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('b = "gpu[0-1]"', 'b = "gpu0"', "gpu1"),
        ("10 GB/s", "fast", "rate"),
        ("[[link]]", "[[lnik]]", "link"),
        ('size = "1 GiB"', "", "size"),
        ('"ram"\nsize', '"ram\nsize', "bad.toml:3"),
    ],
)
def test_one_mistake(old: str, new: str, text: str) -> None:
    """No route, no rate, an unknown section, a missing key, no TOML: the message names it."""
    parse(GOOD, "good.toml")
    with pytest.raises(TopologyError) as caught:
        parse(GOOD.replace(old, new), "bad.toml")
    assert text in str(caught.value)


def test_names_that_are_no_topology(tmp_path: Path) -> None:
    """A slip in a preset's name is guessed; a file that is not there is named."""
    with pytest.raises(TopologyError, match=r'did you mean "two-gpus"'):
        load("two-gpu")
    with pytest.raises(TopologyError, match=r"missing\.toml"):
        load(tmp_path / "missing.toml")


def test_the_committed_schema_is_the_checkers() -> None:
    """Editors read what the checker checks; run ``python -m hmmnet.topology.schema`` after a change."""
    assert schema.__file__ is not None
    committed = Path(schema.__file__).with_name("topology.schema.json").read_text()
    assert json.loads(committed) == schema.json_schema()


@pytest.mark.parametrize("name", ["two-gpus", "nvlink-8", "pcie-64"])
def test_pictures_show_every_part(name: str) -> None:
    """Each memory, device and switch has its box."""
    picture = draw.svg(load(name))
    assert picture.lstrip().startswith("<svg")
    for vertex in load(name).vertices():
        assert f">{vertex.name}<" in picture
