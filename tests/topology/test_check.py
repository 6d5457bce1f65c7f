"""Each kind of mistake in a machine: its line, what is wrong, how to mend it, and nothing that merely follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hmmnet.topology.check import check_topology
from hmmnet.topology.load import examine, parse
from hmmnet.topology.model import DEVICES_MAX, MEMORY_BYTES_MAX, MEMORY_NODES_MAX, DeviceSpec, MemoryNode

from .machines import link, machine

GOOD = """\
[[memory]]
name = "node0"
size = "1 GiB"

[[device]]
name = "gpu[0-3]"
memory = "1 GiB"

[[link]]
a = "node0"
b = "gpu[0-3]"
bandwidth = "10 GB/s"
latency = "1 us"
"""


def mistakes(text: str) -> list[tuple[int, str, str, str]]:
    """Line, field, cause and mend of each."""
    topology, problems = examine(text, "file.toml", "test", {"gpu", "dmirror"})
    assert (topology is None) == bool(problems)
    assert [problem.line for problem in problems] == sorted(problem.line for problem in problems)
    return [(problem.line, problem.field, problem.cause, problem.mend) for problem in problems]


CASES = {
    "key": ('memory = "1 GiB"', 'memroy = "1 GiB"', 7, "memroy", "unknown key", 'did you mean "memory"?'),
    "synonym": ('memory = "1 GiB"', 'vram = "1 GiB"', 7, "vram", "unknown key", 'did you mean "memory"?'),
    "unit": ('latency = "1 us"', "latancy_us = 1", 13, "latancy_us", "unknown key", 'latency = "500 ns"'),
    "missing": ('size = "1 GiB"\n', "", 1, "size", "missing", 'add size = "16 GiB"'),
    "bare": ('memory = "1 GiB"', "memory = 16", 7, "memory", "a whole number where a size", ""),
    "empty": ('memory = "1 GiB"', 'memory = "0 B"', 7, "memory", "no memory at all", ""),
    "odd": ('memory = "1 GiB"', 'memory = "5000 B"', 7, "memory", "no whole number of 4 KiB pages", "4 KiB would be"),
    "large": ('size = "1 GiB"', 'size = "65 TiB"', 3, "size", "larger than half the address space", "at most 64 TiB"),
    "zero": ('"10 GB/s"', '"0 GB/s"', 12, "bandwidth", "nothing would ever arrive", "leave the link out"),
    "bits": ('"10 GB/s"', '"10 Gb/s"', 12, "bandwidth", "bits", ""),
    "time": ('"1 us"', '"1"', 13, "latency", "is no time", ""),
    "count": ('latency = "1 us"', "count = 0", 13, "count", "too small", ""),
    "flag": ('memory = "1 GiB"', 'memory = "1 GiB"\natomics = "yes"', 8, "atomics", "text where true or false", ""),
    "choice": ('memory = "1 GiB"', 'memory = "1 GiB"\nkind = "coherant"', 8, "kind", "none of private, coherent", 'mean "coherent"'),
    "sizes": ('memory = "1 GiB"', 'memory = "1 GiB"\npage_sizes = ["64 KiB"]', 8, "page_sizes", "4 KiB is missing", ""),
    "power": ('memory = "1 GiB"', 'memory = "1 GiB"\npage_sizes = ["4 KiB", "12 KiB"]', 8, "page_sizes", "12 KiB is no page size", ""),
    "node": ('memory = "1 GiB"', 'memory = "1 GiB"\nnode = "node1"', 8, "node", "no host memory is called", 'mean "node0"'),
    "model": ('memory = "1 GiB"', 'memory = "1 GiB"\nmodel = "dmiror"', 8, "model", "no installed device model", 'mean "dmirror"'),
    "end": ('a = "node0"', 'a = "nod0"', 10, "a", 'nothing is called "nod0"', 'mean "node0"'),
    "itself": ('b = "gpu[0-3]"', 'b = "node0"', 11, "b", "to itself", ""),
    "uneven": ('a = "node0"', 'a = "gpu[0-2]"', 10, "a", "does not go evenly into 4", ""),
    "route": ('b = "gpu[0-3]"', 'b = "gpu[0-2]"', 6, "name", 'no route to the host memory "node0"', 'no link ends at "gpu3"'),
    "taken": ('name = "gpu[0-3]"', 'name = "node0"', 6, "name", '"node0" is taken by a memory in line 2', "names must differ"),
    "host": ('name = "gpu[0-3]"', 'name = "host"', 6, "name", "means the host itself", '"host0"'),
    "name": ('name = "gpu[0-3]"', 'name = "gpu 0"', 6, "name", "is no name", "letters, digits"),
    "one name": ("[[link]]", '[[link]]\nname = "bus"', 10, "name", "one name for 4 things", "bus-[0-3]"),
    "section": ("[[device]]", "[[devices]]", 5, "devices", "unknown section or key", 'mean "device"'),
    "one table": ("[[memory]]", "[memory]", 1, "memory", "one table where an array", "[[memory]]"),
    "top": ("[[memory]]", 'descripton = "x"\n[[memory]]', 1, "descripton", "unknown section or key", 'mean "description"'),
    "syntax": ('size = "1 GiB"', 'size = "1 GiB', 3, "", "no valid TOML", ""),
    "deep": ("[[memory]]", f"a = {'[' * 5_000}\n[[memory]]", 0, "", "nested too deeply", "list of lists"),
    "digits": ("[[memory]]", f"a = {'9' * 5_000}\n[[memory]]", 0, "", "thousands of digits", "that a machine can have"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_mistake(case: str) -> None:
    """It is found on its line; what else is said concerns names that the mistake took away."""
    old, new, line, field, cause, mend = CASES[case]
    assert mistakes(GOOD) == []
    found = mistakes(GOOD.replace(old, new, 1))
    hits = [one for one in found if one[:2] == (line, field)]
    assert len(hits) == 1, found
    assert cause in hits[0][2]
    assert mend in hits[0][3]
    if case not in {"taken", "host", "itself"}:  # these take gpu0 away, which the link still names
        assert len(found) == 1, found


def test_the_same_mistake_of_many_is_said_once() -> None:
    """gpu[0-3] without a link is one line, not four."""
    found = mistakes(GOOD[: GOOD.index("[[link]]")])
    assert [(line, field) for line, field, _, _ in found] == [(6, "name")]


def test_many_unknown_ends_are_said_once() -> None:
    """As the range that is missing."""
    found = mistakes(GOOD.replace('b = "gpu[0-3]"', 'b = "gpu[0-63]"'))
    assert [(line, cause) for line, _, cause, _ in found] == [(11, 'nothing is called "gpu[4-63]"')]


def test_an_unknown_section_hides_no_other_mistake() -> None:
    """Beside [[fan]], which means nothing, a device without a link is found; not where the section may define what is missed."""
    alone = GOOD[: GOOD.index("[[link]]")]
    assert {field for _, field, _, _ in mistakes(alone + "[[fan]]\nspeed = 3\n")} == {"fan", "name"}
    assert {field for _, field, _, _ in mistakes(alone + '[[fan]]\nname = "hub"\n')} == {"fan"}


def test_no_devices_are_allowed() -> None:
    """A plain host is a machine: what a workload is compared with."""
    topology = parse('[[memory]]\nname = "ram"\nsize = "1 GiB"\n', "plain.toml")
    assert topology.name == "plain"
    assert topology.devices == ()


@pytest.mark.parametrize("text", ["", "# nothing\n", 'name = "x"\n'])
def test_no_memory_is_not(text: str) -> None:
    """Linux needs some, and the mend says how it is written."""
    assert [cause for _, _, cause, _ in mistakes(text)] == ["no host memory"]


def test_a_dead_end() -> None:
    """A device behind a device: the links are there, but devices do not forward."""
    text = GOOD.replace('b = "gpu[0-3]"', 'b = "gpu[0-2]"') + '[[link]]\na = "gpu2"\nb = "gpu3"\nbandwidth = "1 GB/s"\n'
    assert [mend for _, _, _, mend in mistakes(text)] == ['its links lead to "gpu2", and no further; devices do not forward']


def test_a_switch_without_links() -> None:
    """A slip, since it does nothing."""
    assert [cause for _, _, cause, _ in mistakes(GOOD + '[[switch]]\nname = "s"\n')] == ["no link ends at this switch"]
    pair = '[[switch]]\nname = "s"\n[[switch]]\nname = "t"\n[[link]]\na = "s"\nb = "t"\nbandwidth = "1 GB/s"\nlatency = "1 us"\n'
    assert [cause for _, _, cause, _ in mistakes(GOOD + pair)] == [
        "this switch is linked to switches only, and nothing else is behind them"
    ] * 2


def test_parallel_links_need_names() -> None:
    """Two links between the same two would share a name."""
    found = mistakes(GOOD + '[[link]]\na = "node0"\nb = "gpu0"\nbandwidth = "1 GB/s"\n')
    assert [(line, mend) for line, _, _, mend in found] == [(14, "give parallel links names of their own, or one link a count")]


def test_units_of_a_model_differ() -> None:
    """A unit counts up along a range, and belongs to one device."""
    text = GOOD.replace('memory = "1 GiB"', 'memory = "1 GiB"\nmodel = "dmirror"\nunit = 2')
    assert [device.unit for device in parse(text).devices] == [2, 3, 4, 5]
    late = '[[device]]\nname = "late"\nmemory = "1 GiB"\nmodel = "dmirror"\nunit = 5\n'
    joined = '[[link]]\na = "late"\nb = "node0"\nbandwidth = "1 GB/s"\n'
    assert [cause for _, _, cause, _ in mistakes(text + late + joined)] == ['unit 5 is taken by "gpu3"']


def test_the_nearest_memory_is_filled_in() -> None:
    """Two sockets; gpu0 hangs at the second."""
    text = """
memory = [{ name = "node[0-1]", size = "1 GiB" }]
device = [{ name = "gpu0", memory = "1 GiB" }]
link = [{ a = "node0", b = "node1", bandwidth = "9 GB/s" }, { a = "node1", b = "gpu0", bandwidth = "1 GB/s" }]
"""
    assert parse(text).device("gpu0").node == "node1"


def test_machines_built_in_python() -> None:
    """The same rules, without lines."""
    good = machine([link("node0", "gpu0"), link("node0", "gpu1")])
    assert check_topology(good) == []
    assert check_topology(good, models={"gpu"}) == []
    bad = replace(
        good,
        nodes=(MemoryNode("node0", 4097),),
        devices=(DeviceSpec("gpu0", "gpux", MEMORY_BYTES_MAX * 2, page_sizes=(8192,)), DeviceSpec("gpu[0-1]", "gpu", 4096, node="mars")),
        links=(link("node0", "gpu0", 0.0), link("gpu0", "gpu0", latency_s=-1.0), link("gpu[0-1]", "pluto", count=0)),
    )
    fields = {(problem.place, problem.field) for problem in check_topology(bad, models={"gpu"})}
    assert fields == {
        ('memory "node0"', "size"),
        ('device "gpu0"', "memory"),
        ('device "gpu0"', "page_sizes"),
        ('device "gpu0"', "model"),
        ('device "gpu[0-1]"', "name"),
        ('device "gpu[0-1]"', "node"),
        ('link "node0-gpu0"', "bandwidth"),
        ('link "gpu0-gpu0"', "latency"),
        ('link "gpu0-gpu0"', "b"),
        ('link "gpu[0-1]-pluto"', "name"),
        ('link "gpu[0-1]-pluto"', "b"),
        ('link "gpu[0-1]-pluto"', "count"),
    }


def test_how_many_are_possible() -> None:
    """Zones and processes are limited, and so is the host's own address space."""
    many = machine([], nodes=MEMORY_NODES_MAX + 1, devices=DEVICES_MAX + 1)
    causes = [problem.cause for problem in check_topology(many) if not problem.place]
    assert causes == [
        f"{MEMORY_NODES_MAX + 1} host memories; at most {MEMORY_NODES_MAX} are possible",
        f"{DEVICES_MAX + 1} devices; at most {DEVICES_MAX} are possible",
    ]
    wide = replace(
        machine([link("node0", "node1")], nodes=2, devices=0), nodes=tuple(MemoryNode(f"node{i}", MEMORY_BYTES_MAX) for i in range(2))
    )
    assert ["host memories together" in problem.cause for problem in check_topology(wide)] == [True]
