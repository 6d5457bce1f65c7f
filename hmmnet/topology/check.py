"""Whether a machine makes sense: names, ends, routes, address space, unit numbers.

Works on a built `Topology`, so a machine put together in Python is checked by the same rules as a file. A file's reader passes `Where`,
which finds the line, and what is known to be made up (`broken`), about which nothing is said a second time.

A machine without devices is allowed: it is a plain Linux host, against which a workload may be compared. One without memory is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from hmmnet.pages import PAGE_SIZE
from hmmnet.units import show_size

from .model import DEVICES_MAX, MEMORY_BYTES_MAX, MEMORY_NODES_MAX, DeviceSpec, LinkSpec, MemoryNode, Switch, Topology
from .names import RESERVED, compact, why_no_single_name
from .problems import Problem, did_you_mean
from .routes import Routes


class Where:
    """Finds the places of things. This one knows none, for a machine built in Python; a file's reader knows better."""

    file = "topology"
    complete = True
    """Whether everything that the machine has could be read: else nothing is said to be missing."""

    def place(self, section: str, number: int, name: str) -> str:
        """What to call a thing whose own name is `name`."""
        del number
        return f'{section} "{name}"'

    def line(self, section: str, number: int, key: str) -> int:
        """The line of `key` of the thing `number` (counted as the topology does) of `section`; 0 when there is none."""
        del section, number, key
        return 0

    def broken(self, section: str, number: int, key: str) -> bool:
        """Whether that value is made up because the file's was wrong."""
        del section, number, key
        return False


Thing: TypeAlias = MemoryNode | DeviceSpec | Switch | LinkSpec


def _things(topology: Topology) -> dict[str, tuple[Thing, ...]]:
    return {"memory": topology.nodes, "device": topology.devices, "switch": topology.switches, "link": topology.links}


@dataclass(frozen=True)
class _Check:
    topology: Topology
    where: Where

    def problem(self, section: str, number: int, key: str, cause: str, mend: str = "") -> Iterator[Problem]:
        if not self.where.broken(section, number, key):
            place = self.where.place(section, number, _things(self.topology)[section][number].name)
            yield Problem(self.where.file, self.where.line(section, number, key), place, key, cause, mend)

    def general(self, cause: str, mend: str = "") -> Problem:
        return Problem(self.where.file, 0, "", "", cause, mend)


def check_topology(topology: Topology, where: Where | None = None, models: Collection[str] | None = None) -> list[Problem]:
    """Everything that is wrong with `topology`; with `models`, also devices of a model that is not among them."""
    check = _Check(topology, where or Where())
    problems = [*_counts(check), *_names(check), *_values(check), *_units(check)]
    if models is not None:
        problems += _models(check, models)
    if check.where.complete and _names_stand(check):
        problems += [*_nodes(check), *_ends(check)]
        if _ends_stand(check):
            problems += _reach(check)
    return problems


def _counts(check: _Check) -> Iterator[Problem]:
    topology = check.topology
    if not topology.nodes and check.where.complete:
        yield check.general("no host memory", 'add [[memory]] with name = "ram" and size = "64 GiB"')
    if len(topology.nodes) > MEMORY_NODES_MAX:
        yield check.general(f"{len(topology.nodes)} host memories; at most {MEMORY_NODES_MAX} are possible")
    if len(topology.devices) > DEVICES_MAX:
        yield check.general(f"{len(topology.devices)} devices; at most {DEVICES_MAX} are possible")
    total = sum(node.memory_bytes for node in topology.nodes)
    if len(topology.nodes) > 1 and total > MEMORY_BYTES_MAX and all(node.memory_bytes <= MEMORY_BYTES_MAX for node in topology.nodes):
        yield check.general(
            f"the host memories together ({show_size(total)}) are larger than half the address space of the host process",
            f"at most {show_size(MEMORY_BYTES_MAX)}",
        )


def _everything(topology: Topology) -> Iterator[tuple[str, int, str]]:
    for section, things in _things(topology).items():
        for number, thing in enumerate(things):
            yield section, number, thing.name


def _names(check: _Check) -> Iterator[Problem]:
    first: dict[str, tuple[str, int]] = {}
    for section, number, name in _everything(check.topology):
        if check.where.broken(section, number, "name"):
            continue
        if name in RESERVED and section != "memory":
            mend = f'call it something else, such as "{name}0"'
            yield from check.problem(section, number, "name", f'"{name}" means the host itself', mend)
        if (wrong := why_no_single_name(name)) is not None:
            yield from check.problem(section, number, "name", wrong)
        if name in first:
            other, at = first[name]
            line = check.where.line(other, at, "name")
            cause = f'"{name}" is taken by a {other}' + (f" in line {line}" if line else "")
            yield from check.problem(section, number, "name", cause, _other_name(section))
        first.setdefault(name, (section, number))


def _other_name(section: str) -> str:
    if section == "link":
        return "give parallel links names of their own, or one link a count"
    return "names must differ, also between sections"


def _values(check: _Check) -> Iterator[Problem]:
    """What the reader of a file has already refused, for machines built in Python."""
    memories = [("memory", "size", i, node.memory_bytes) for i, node in enumerate(check.topology.nodes)]
    memories += [("device", "memory", i, device.memory_bytes) for i, device in enumerate(check.topology.devices)]
    for section, key, number, size in memories:
        if size <= 0 or size % PAGE_SIZE:
            yield from check.problem(section, number, key, f"{size} bytes is no whole number of 4 KiB pages, or none")
        elif size > MEMORY_BYTES_MAX:
            mend = f"at most {show_size(MEMORY_BYTES_MAX)}"
            yield from check.problem(section, number, key, f"{show_size(size)} is larger than half the address space of a process", mend)
    for number, device in enumerate(check.topology.devices):
        sizes = device.page_sizes
        if PAGE_SIZE not in sizes or list(sizes) != sorted(set(sizes)) or any(size & (size - 1) for size in sizes):
            yield from check.problem("device", number, "page_sizes", "powers of two are wanted, ascending, 4 KiB among them")
    for number, link in enumerate(check.topology.links):
        rates = {"bandwidth": link.bandwidth_bytes_per_s, "bandwidth_back": link.bandwidth_back_bytes_per_s}
        for key, rate in rates.items():
            if rate is not None and not 0 < rate < float("inf"):
                yield from check.problem("link", number, key, f"{rate:g} bytes/s is no bandwidth", "a number above 0 is wanted")
        if not 0 <= link.latency_s < float("inf"):
            yield from check.problem("link", number, "latency", f"{link.latency_s:g} s is no latency")
        if link.count < 1:
            yield from check.problem("link", number, "count", f"{link.count} physical links carry nothing")


def _nodes(check: _Check) -> Iterator[Problem]:
    known = [node.name for node in check.topology.nodes]
    for number, device in enumerate(check.topology.devices):
        if device.node and device.node not in known and known:
            mend = did_you_mean(device.node, known, f"there are {', '.join(known)}")
            yield from check.problem("device", number, "node", f'no host memory is called "{device.node}"', mend)


def _units(check: _Check) -> Iterator[Problem]:
    taken: dict[tuple[str, int], str] = {}
    for number, device in enumerate(check.topology.devices):
        if device.unit is not None:
            owner = taken.setdefault((device.model, device.unit), device.name)
            if owner != device.name:
                yield from check.problem("device", number, "unit", f'unit {device.unit} is taken by "{owner}"')


def _models(check: _Check, models: Collection[str]) -> Iterator[Problem]:
    for number, device in enumerate(check.topology.devices):
        if device.model not in models:
            mend = did_you_mean(device.model, models, f"there are {', '.join(sorted(models))}")
            yield from check.problem("device", number, "model", f'no installed device model is called "{device.model}"', mend)


def _ends(check: _Check) -> Iterator[Problem]:
    names = [vertex.name for vertex in check.topology.vertices()]
    known = set(names)
    unknown: dict[tuple[str, int, str], tuple[int, list[str]]] = {}
    for number, link in enumerate(check.topology.links):
        for key, end in (("a", link.a), ("b", link.b)):
            if end not in known:
                place = check.where.place("link", number, link.name)
                unknown.setdefault((place, check.where.line("link", number, key), key), (number, []))[1].append(end)
        if link.a == link.b and link.a in known and not check.where.broken("link", number, "a"):
            yield from check.problem("link", number, "b", f'the link leads from "{link.a}" to itself')
    for (_, _, key), (number, ends) in unknown.items():
        missing = list(dict.fromkeys(ends))
        yield from check.problem("link", number, key, f'nothing is called "{compact(missing)}"', did_you_mean(missing[0], names))


def _names_stand(check: _Check) -> bool:
    """Whether all names could be read: else what refers to a name may be right."""
    return not any(check.where.broken(section, number, "name") for section, number, _ in _everything(check.topology) if section != "link")


def _ends_stand(check: _Check) -> bool:
    """Whether all ends are known: else "no route" would only repeat it."""
    known = {vertex.name for vertex in check.topology.vertices()}
    ends = all(
        link.a in known and link.b in known and not check.where.broken("link", i, "a") and not check.where.broken("link", i, "b")
        for i, link in enumerate(check.topology.links)
    )
    return ends and bool(check.topology.nodes)


def _reach(check: _Check) -> Iterator[Problem]:
    """Every device and memory must reach every memory; a switch without links is a slip."""
    topology = check.topology
    routes = Routes(topology)
    linked: Counter[str] = Counter()
    for link in topology.links:
        linked.update((link.a, link.b))
    for number, switch in enumerate(topology.switches):
        if not linked[switch.name]:
            yield from check.problem("switch", number, "name", "no link ends at this switch", "link it, or leave it out")
        elif _among_switches(switch.name, topology) and routes.find(topology.nodes[0].name, switch.name) is None:
            mend = "link one of them to the rest, or leave them out"
            yield from check.problem(
                "switch", number, "name", "this switch is linked to switches only, and nothing else is behind them", mend
            )
    home = topology.nodes[0].name
    for section in ("memory", "device"):
        for number, thing in enumerate(_things(topology)[section]):
            if routes.find(home, thing.name) is None:
                mend = _mend_route(thing.name, topology)
                yield from check.problem(section, number, "name", f'no route to the host memory "{home}"', mend)


def _among_switches(name: str, topology: Topology) -> bool:
    return all(isinstance(topology.vertex(link.other(name)), Switch) for link in topology.links_of(name))


def _mend_route(name: str, topology: Topology) -> str:
    links = topology.links_of(name)
    if not links:
        return f'no link ends at "{name}": add [[link]] with a = "{name}" and b = "{topology.nodes[0].name}"'
    return _dead_end(name, links, topology)


def _dead_end(name: str, links: tuple[LinkSpec, ...], topology: Topology) -> str:
    others = ", ".join(f'"{link.other(name)}"' for link in links[:3])
    through = any(isinstance(topology.vertex(link.other(name)), DeviceSpec) for link in links)
    return f"its links lead to {others}, and no further" + ("; devices do not forward" if through else "")
