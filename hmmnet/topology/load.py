"""Topologies by name or path, checked whole.

All mistakes of a file are reported at once (`TopologyError.problems`), each with file, line, thing, key, cause and mend. What is checked beyond the
form: names are unique, link ends exist, nothing links to itself, every rate is more than zero, memories are whole pages and fit an
address space, and every device has a way to its memory node, both directions.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from hmmnet.errors import TopologyError
from hmmnet.pages import PAGE_SIZE

from .document import Document, Entry, expand
from .model import DEVICES_MAX, MEMORY_BYTES_MAX, MEMORY_NODES_MAX, DeviceSpec, LinkSpec, MemoryNode, Switch, Topology
from .problems import Problem, did_you_mean
from .routes import Routes

FILE_BYTES_MAX = 1 << 20


def preset_names() -> list[str]:
    """The machines that come with hmmnet, the default first."""
    names = sorted(entry.name.removesuffix(".toml") for entry in resources.files(__package__).joinpath("presets").iterdir() if entry.name.endswith(".toml"))
    return sorted(names, key=lambda name: name != "two-gpus")


def read_source(name_or_path: str | Path) -> tuple[str, str]:
    """The text of a topology and the name of its file. Raises TopologyError when there is none."""
    wanted = str(name_or_path)
    if wanted in preset_names():
        return resources.files(__package__).joinpath("presets", f"{wanted}.toml").read_text(), f"{wanted}.toml"
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.exists():
        mend = did_you_mean(wanted, preset_names(), f"presets are {', '.join(preset_names())}; a file ends in .toml")
        raise TopologyError([f'no topology is called "{wanted}"; {mend}'])
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise TopologyError([f"{path}: larger than {FILE_BYTES_MAX} bytes, so hardly a topology"])
        return path.read_text(), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError([f"{path}: cannot be read: {error}"]) from error


def load(name_or_path: str | Path) -> Topology:
    """The topology of a preset's name or of a TOML file. Raises TopologyError with every mistake."""
    text, file = read_source(name_or_path)
    return parse(text, file)


def parse(text: str, file: str = "<text>") -> Topology:
    """The topology in `text`; `file` is how mistakes name it. Raises TopologyError."""
    topology, problems = examine(text, file)
    if topology is None:
        raise TopologyError([str(problem) for problem in problems])
    return topology


def examine(text: str, file: str) -> tuple[Topology | None, list[Problem]]:
    """As `parse`, with the mistakes as data; the topology is None when there are any."""
    document = Document(text, file)
    builder = _Builder(document)
    topology = builder.build()
    if not document.problems:
        builder.check_routes(topology)
    problems = sorted(document.problems, key=lambda problem: problem.line)
    return (None if problems else topology), problems


def check_topology(topology: Topology) -> None:
    """Check a machine built by hand. Raises TopologyError with every mistake."""
    problems = [f'{topology.name}: link "{link.name}": bandwidth must be more than zero' for link in topology.links if link.bandwidth_bytes_per_s <= 0]
    names = [vertex.name for vertex in topology.vertices()]
    problems += [f'{topology.name}: the name "{name}" is used more than once' for name in sorted({name for name in names if names.count(name) > 1})]
    problems += [
        f'{topology.name}: link "{link.name}": its end "{end}" does not exist' for link in topology.links for end in (link.a, link.b) if end not in names
    ]
    if not problems:
        problems = [f"{topology.name}: {text}" for _, text in _unreachable(topology)]
    if problems:
        raise TopologyError(problems)


def _unreachable(topology: Topology) -> list[tuple[DeviceSpec, str]]:
    routes = Routes(topology)
    found = []
    for device in topology.devices:
        for node in topology.nodes:
            if routes.find(node.name, device.name) is None or routes.find(device.name, node.name) is None:
                found.append((device, f'no route between memory "{node.name}" and device "{device.name}"'))
    return found


class _Builder:
    """The second pass: from a document's entries to a machine."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._named: dict[str, Entry] = {}
        self._device_entries: dict[str, Entry] = {}

    def build(self) -> Topology:
        """The machine, as far as it can be made; problems go to the document."""
        document = self._document
        nodes = tuple(node for entry in document.entries["memory"] for node in self._nodes(entry))
        devices = tuple(device for entry in document.entries["device"] for device in self._devices(entry))
        switches = tuple(switch for entry in document.entries["switch"] for switch in self._switches(entry))
        self._count(len(nodes), len(devices))
        links = tuple(link for entry in document.entries["link"] for link in self._links(entry))
        self._unique_links(links)
        name = document.top.get("name") or Path(document.file).stem
        topology = Topology(name, document.top.get("description", ""), nodes, devices, switches, links)
        if document.problems:
            return topology
        return self._with_nodes(topology)

    def _count(self, nodes: int, devices: int) -> None:
        document = self._document
        if not document.entries["memory"] and not document.problems:
            document.problem(0, "", "memory", "the machine has no host memory", 'add [[memory]] with a name and a size, such as "16 GiB"')
        if nodes > MEMORY_NODES_MAX:
            document.problem(0, "", "memory", f"{nodes} host memories; {MEMORY_NODES_MAX} is the most")
        if devices > DEVICES_MAX:
            document.problem(0, "", "device", f"{devices} devices; {DEVICES_MAX} is the most")

    def _names(self, entry: Entry, key: str = "name") -> list[str]:
        try:
            return expand(entry.values[key]) if key in entry.values else []
        except ValueError as error:
            self._document.blame(entry, key, str(error))
            return []

    def _new_names(self, entry: Entry) -> list[str]:
        names = self._names(entry)
        for name in names:
            other = self._named.setdefault(name, entry)
            if other is not entry:
                line = self._document.line((*other.at, "name"))
                self._document.blame(entry, "name", f'the name "{name}" is taken (line {line})', "names are shared by memories, devices and switches")
        return names

    def _memory(self, entry: Entry, key: str) -> int:
        size: int = entry.values.get(key, PAGE_SIZE)
        if size < PAGE_SIZE or size % PAGE_SIZE:
            self._document.blame(entry, key, f"{size} bytes are not whole pages of {PAGE_SIZE}")
        if size > MEMORY_BYTES_MAX:
            self._document.blame(entry, key, f"{size} bytes are larger than the address space", f"the most is {MEMORY_BYTES_MAX >> 40} TiB")
        return size

    def _nodes(self, entry: Entry) -> list[MemoryNode]:
        size = self._memory(entry, "size")
        return [MemoryNode(name, size) for name in self._new_names(entry)]

    def _switches(self, entry: Entry) -> list[Switch]:
        return [Switch(name, entry.values.get("kind", "pcie")) for name in self._new_names(entry)]

    def _devices(self, entry: Entry) -> list[DeviceSpec]:
        values: dict[str, Any] = entry.values
        size = self._memory(entry, "memory")
        sizes = values.get("page_sizes", (PAGE_SIZE,))
        if PAGE_SIZE not in sizes:
            self._document.blame(entry, "page_sizes", "4 KiB is not among them", "Linux hands out base pages: a device must map them")
        names = self._new_names(entry)
        for name in names:
            self._device_entries[name] = entry
        unit = values.get("unit")
        return [
            DeviceSpec(
                name,
                values.get("model", "gpu"),
                size,
                values.get("kind", "private"),
                values.get("node", ""),
                sizes,
                values.get("fault_capable", True),
                values.get("atomics", True),
                None if unit is None else unit + index,
            )
            for index, name in enumerate(names)
        ]

    def _links(self, entry: Entry) -> list[LinkSpec]:
        ends = [self._ends(entry, key) for key in ("a", "b")]
        for key in ("bandwidth", "bandwidth_back"):
            if entry.values.get(key, 1.0) <= 0:
                self._document.blame(entry, key, "a link that carries nothing is no link", "give a rate, or take the link away")
        if not ends[0] or not ends[1]:
            return []
        more, fewer = max(map(len, ends)), min(map(len, ends))
        if more % fewer:
            self._document.blame(entry, "b", f"{len(ends[0])} ends a do not share out evenly over {len(ends[1])} ends b")
            return []
        return [link for i in range(more) for link in self._link(entry, ends[0][i * len(ends[0]) // more], ends[1][i * len(ends[1]) // more], more > 1)]

    def _ends(self, entry: Entry, key: str) -> list[str]:
        names = self._names(entry, key)
        for name in names:
            if name not in self._named:
                self._document.blame(entry, key, f'there is no "{name}"', did_you_mean(name, self._named))
        return [name for name in names if name in self._named]

    def _link(self, entry: Entry, a: str, b: str, several: bool) -> list[LinkSpec]:
        values = entry.values
        if a == b:
            self._document.blame(entry, "b", f'both ends are "{a}"', "a link joins two things")
            return []
        name = values.get("name")
        if name is None or several:
            name = f"{name}:{a}-{b}" if name else f"{a}-{b}"
        rate, back = values.get("bandwidth", 1.0), values.get("bandwidth_back")
        return [LinkSpec(name, a, b, values.get("kind", "pcie"), rate, values.get("latency", 0.0), back, values.get("count", 1))]

    def _unique_links(self, links: tuple[LinkSpec, ...]) -> None:
        seen: set[str] = set()
        for link in links:
            if link.name in seen:
                self._document.problem(0, f'link "{link.name}"', "name", "two links have this name", "name one of them, or use count")
            seen.add(link.name)

    def _with_nodes(self, topology: Topology) -> Topology:
        """Fill in each device's nearest memory node; check those that were named."""
        routes = Routes(topology)
        names = [node.name for node in topology.nodes]
        devices = []
        for device in topology.devices:
            if device.node and device.node not in names:
                self._document.blame(self._device_entries[device.name], "node", f'no memory is called "{device.node}"', did_you_mean(device.node, names))
            node = device.node or routes.nearest_node(device) or names[0]
            devices.append(DeviceSpec(**{**vars(device), "node": node}))
        return Topology(topology.name, topology.description, topology.nodes, tuple(devices), topology.switches, topology.links)

    def check_routes(self, topology: Topology) -> None:
        """Every device reaches every host memory, or says why that cannot be meant."""
        blamed: set[int] = set()
        for device, text in _unreachable(topology):
            entry = self._device_entries[device.name]
            if id(entry) not in blamed:
                blamed.add(id(entry))
                self._document.blame(entry, "name", text, "add a [[link]] that joins their parts")
