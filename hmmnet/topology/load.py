"""Topologies from files and presets.

`load` takes what a user types: a preset's name or a path. All mistakes of a file are found in one pass and raised together as
`TopologyError`; `examine` returns them as data, with file and line, for ``hmmnet topo check`` and editors.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from hmmnet.errors import TopologyError
from hmmnet.plugins import MODELS, names

from .check import Where, check_topology
from .document import Document, Record, read_document
from .files import exists, is_file
from .model import DeviceSpec, LinkSpec, MemoryNode, Switch, Topology
from .problems import Problem, closest, no_text
from .routes import Routes

TOPOLOGY_BYTES_MAX = 1 << 20
"""The largest preset has 4 KiB; a file beyond this is no topology."""
LOADED_MAX = 64
"""Machines that are remembered by their text: some hundred kilobytes."""
DEFAULT = "two-gpus"
PRESETS = Path(__file__).with_name("presets")
SCHEMA = Path(__file__).with_name("topology.schema.json")


@dataclass(frozen=True)
class Source:
    """The text of a topology and what to call it in messages; `name` is the machine's name unless the text gives one."""

    text: str
    file: str
    name: str


def preset_names() -> list[str]:
    """The machines that come with hmmnet, the default first."""
    return sorted((entry.stem for entry in PRESETS.glob("*.toml")), key=lambda name: (name != DEFAULT, name))


def installed_models() -> frozenset[str]:
    """Device models that this installation has, plug-ins included (`hmmnet.plugins`)."""
    return frozenset(names(MODELS))


def find(name_or_path: str | Path) -> Source:
    """The text behind a preset's name or a path. A name with a slash or ``.toml`` is a path. Raises TopologyError."""
    word = str(name_or_path)
    if isinstance(name_or_path, str) and "/" not in word and not word.endswith(".toml"):
        entry = PRESETS / f"{word}.toml"
        if is_file(entry):
            return Source(entry.read_text(encoding="utf-8"), f"{word}.toml", word)
        if not is_file(Path(word)):
            raise TopologyError([_unknown_preset(word)])
    return _read(Path(name_or_path))


def own_text(source: Source) -> str:
    """`source` as a file of the user's own: where a preset names its schema beside it, the copy names it where it is."""
    return source.text.replace(f"#:schema ../{SCHEMA.name}", f"#:schema {SCHEMA}", 1)


def _unknown_preset(word: str) -> Problem:
    names = preset_names()
    guess = closest(word, names)
    mend = f'did you mean "{guess}"?' if guess else f"there are {', '.join(names)}; a file's name ends in .toml"
    return Problem(word, 0, "", "", "no preset and no file has this name", mend)


def _read(path: Path) -> Source:
    try:
        with path.open("rb") as file:
            raw = file.read(TOPOLOGY_BYTES_MAX + 1)
    except OSError as error:
        raise TopologyError([Problem(str(path), 0, "", "", f"cannot be read: {error.strerror or error}", _mend_path(path))]) from None
    if len(raw) > TOPOLOGY_BYTES_MAX:
        raise TopologyError([Problem(str(path), 0, "", "", f"larger than {TOPOLOGY_BYTES_MAX >> 20} MiB: this is no topology")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TopologyError([no_text(error, str(path))]) from None
    return Source(text, str(path), path.stem)


def _mend_path(path: Path) -> str:
    if exists(path.parent) and path.parent.is_dir() and not exists(path):
        if path.stem in preset_names():
            return f'the preset of this name is written without .toml: "{path.stem}"'
        guess = closest(path.name, [entry.name for entry in path.parent.iterdir() if entry.suffix == ".toml"])
        if guess is not None:
            return f'did you mean "{path.with_name(guess)}"?'
    return ""


def load(name_or_path: str | Path = DEFAULT, models: Collection[str] | None = None) -> Topology:
    """The machine that a preset or a file describes. Raises TopologyError with every mistake of the file."""
    source = find(name_or_path)
    return _parsed(source.text, source.file, source.name, None if models is None else frozenset(models))


@lru_cache(maxsize=LOADED_MAX)
def _parsed(text: str, file: str, name: str, models: frozenset[str] | None) -> Topology:
    """`parse`, once for the same text: whoever simulates many machines of a file loads it for each."""
    return parse(text, file, name, models)


def parse(text: str, file: str = "topology.toml", name: str = "", models: Collection[str] | None = None) -> Topology:
    """The machine that `text` describes; `file` is what messages call it. Raises TopologyError with every mistake."""
    topology, problems = examine(text, file, name, models)
    if problems or topology is None:
        raise TopologyError(problems)
    return topology


def examine(text: str, file: str, name: str = "", models: Collection[str] | None = None) -> tuple[Topology | None, list[Problem]]:
    """As `parse`, with the mistakes as data, in the order of lines; the machine is None when there are any."""
    document = read_document(text, file)
    problems = list(document.problems)
    topology = _build(document, name)
    problems += check_topology(topology, _InDocument(document), models)
    return (None if problems else _with_nodes(topology)), _in_order(problems)


def _in_order(problems: list[Problem]) -> list[Problem]:
    """By line; what is wrong with all of gpu[0-63] in the same way is said once."""
    first: dict[tuple[object, ...], Problem] = {}
    for problem in problems:
        first.setdefault((problem.line, problem.place, problem.field, problem.cause), problem)
    return sorted(first.values(), key=lambda problem: problem.line)


class _InDocument(Where):
    """Places in a file."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self.file = document.file
        self.complete = document.complete

    def place(self, section: str, number: int, name: str) -> str:
        """As the file calls it, gpu[0-7] and all."""
        del name
        return self._document.records[section][number].place

    def line(self, section: str, number: int, key: str) -> int:
        """The line of `key`, or of the table when the key is not written."""
        return self._document.line(section, self._document.records[section][number].index, key)

    def broken(self, section: str, number: int, key: str) -> bool:
        """Whether the file's value was wrong or missing."""
        return key in self._document.records[section][number].broken


def _build(document: Document, name: str) -> Topology:
    records = document.records
    return Topology(
        name=document.top.get("name") or name or Path(document.file).stem,
        description=document.top.get("description") or "",
        nodes=tuple(MemoryNode(_name(record), record.values["size"]) for record in records["memory"]),
        devices=tuple(_device(record) for record in records["device"]),
        switches=tuple(Switch(_name(record), record.values["kind"]) for record in records["switch"]),
        links=tuple(_link(record) for record in records["link"]),
        personality=document.top.get("personality") or "today",
    )


def _name(record: Record) -> str:
    return str(record.values["name"] or f"{record.section.key} number {record.index + 1}")


def _device(record: Record) -> DeviceSpec:
    values = record.values
    return DeviceSpec(
        name=_name(record),
        model=values["model"],
        memory_bytes=values["memory"],
        kind=values["kind"],
        node=values["node"] or "",
        page_sizes=values["page_sizes"],
        fault_capable=values["fault_capable"],
        atomics=values["atomics"],
        unit=values["unit"],
    )


def _link(record: Record) -> LinkSpec:
    values = record.values
    return LinkSpec(
        name=_name(record),
        a=values["a"] or "",
        b=values["b"] or "",
        kind=values["kind"],
        bandwidth_bytes_per_s=values["bandwidth"],
        latency_s=values["latency"],
        bandwidth_back_bytes_per_s=values["bandwidth_back"],
        count=values["count"],
    )


def _with_nodes(topology: Topology) -> Topology:
    """The same machine with every device's nearest memory node filled in."""
    if all(device.node for device in topology.devices):
        return topology
    routes = Routes(topology) if len(topology.nodes) > 1 else None
    first = topology.nodes[0].name
    nearest = {device.name: (routes.nearest_node(device) if routes else None) or first for device in topology.devices if not device.node}
    devices = tuple(replace(device, node=device.node or nearest[device.name]) for device in topology.devices)
    return replace(topology, devices=devices)
