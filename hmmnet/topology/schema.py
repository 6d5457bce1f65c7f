"""The file format of a topology: every section and key, once.

The checker (`document`) and the JSON schema for editors both come from the tables below, so they cannot disagree. The schema is
committed as ``topology.schema.json`` beside this file; a file names it in its first line (``#:schema ...``) and editors with a TOML
language server complete and check while one types.

Names may stand for many things: ``gpu[0-7]`` is eight. Where a link's ends stand for different numbers of things the larger number must
be a multiple of the smaller, and consecutive groups go together: ``gpu[0-7]`` to ``leaf[0-1]`` joins the first four GPUs to leaf0.

Run ``python -m hmmnet.topology.schema`` to print the schema.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Form = Literal["name", "reference", "text", "choice", "size", "sizes", "rate", "time", "flag", "number"]

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]*(?:\[[0-9]+-[0-9]+\][A-Za-z0-9_.-]*)?"
SIZE_PATTERN = r"\s*[0-9]+(?:\.[0-9]+)?\s*(?:(?:[kKmMgGtT][iI]?)?B|(?:[kmgt][iI]?)?b)\s*"
RATE_PATTERN = SIZE_PATTERN.removesuffix(r"\s*") + r"/[sS]\s*"
TIME_PATTERN = r"\s*[0-9]+(?:\.[0-9]+)?\s*[nNuUmM]?[sS]\s*"


@dataclass(frozen=True)
class Field:
    """One key: what may stand there, whether it must, and other words by which people call it."""

    key: str
    form: Form
    about: str
    required: bool = False
    default: Any = None
    choices: tuple[str, ...] = ()
    minimum: int = 0
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """An array of tables (``[[key]]``), or the top of the file (key empty)."""

    key: str
    about: str
    fields: tuple[Field, ...]

    def field(self, key: str) -> Field | None:
        """The field called `key`."""
        return self._by_key.get(key)

    @cached_property
    def _by_key(self) -> dict[str, Field]:
        return {field.key: field for field in self.fields}


TOP = Section(
    "",
    "A machine: its host memories, devices, switches, and the links between them.",
    (
        Field("name", "text", "What the machine is called; default: the file's name.", also=("title",)),
        Field("description", "text", "One or two sentences for people.", default="", also=("about", "comment")),
        Field(
            "personality",
            "choice",
            "Whose rules its host keeps: today (the present kernel's), or v25 (those of HMM's first version, 2017).",
            default="today",
            choices=("today", "v25"),
            also=("kernel",),
        ),
    ),
)

MEMORY = Section(
    "memory",
    "A host memory (NUMA node) with its CPU socket and root ports; traffic may pass through.",
    (
        Field("name", "name", "Name, or names such as node[0-1].", required=True),
        Field("size", "size", "How much memory, such as 64 GiB.", required=True, also=("memory", "ram", "capacity", "memory_bytes")),
    ),
)

DEVICE = Section(
    "device",
    "A device that mirrors address spaces and has memory of its own.",
    (
        Field("name", "name", "Name, or names such as gpu[0-7].", required=True),
        Field("model", "text", "Device model: gpu, dmirror, or one that a plug-in brings.", default="gpu"),
        Field(
            "memory",
            "size",
            "Its own memory, such as 16 GiB.",
            required=True,
            also=("size", "ram", "vram", "hbm", "capacity", "memory_bytes"),
        ),
        Field(
            "kind",
            "choice",
            "private: the CPU cannot reach its memory and faults pages home; coherent: the CPU reads it in place.",
            default="private",
            choices=("private", "coherent"),
        ),
        Field("node", "reference", "Nearest memory node; default: the one with the shortest route.", also=("numa", "numa_node", "host")),
        Field(
            "page_sizes",
            "sizes",
            "Sizes that its page table can map; 4 KiB among them. Default: 4 KiB, 64 KiB, 2 MiB (without: no huge pages).",
            default=(4 << 10, 64 << 10, 2 << 20),
            also=("pages", "page_size"),
        ),
        Field(
            "fault_capable",
            "flag",
            "Whether it can fault and retry (false: a job fails at the first page that was not migrated before).",
            default=True,
            also=("faults", "xnack"),
        ),
        Field("atomics", "flag", "Whether it can do atomic operations (false: a job fails at its first atomic update).", default=True),
        Field("unit", "number", "Device number of a dmirror device; counts up along a range of names.", also=("number", "minor")),
    ),
)

SWITCH = Section(
    "switch",
    "Something that only forwards: a PCIe switch, a root port, an NVLink switch plane.",
    (
        Field("name", "name", "Name, or names such as leaf[0-15].", required=True),
        Field("kind", "text", "What it is, for people: pcie, nvswitch, root-port.", default="pcie"),
    ),
)

LINK = Section(
    "link",
    "A link between two things, full duplex.",
    (
        Field("a", "reference", "One end: a name, or names such as gpu[0-7].", required=True, also=("from", "source", "end_a")),
        Field("b", "reference", "The other end.", required=True, also=("to", "target", "end_b")),
        Field("name", "name", "Name; default: both ends joined by a dash."),
        Field("kind", "text", "What it is, for people: pcie4, nvlink4, xgmi, c2c, cxl.", default="pcie", also=("type",)),
        Field("bandwidth", "rate", "From a to b, of one physical link, such as 31.5 GB/s.", required=True, also=("bw", "speed", "rate")),
        Field("bandwidth_back", "rate", "From b to a; default: as from a to b.", also=("bandwidth_reverse",)),
        Field("latency", "time", "One way, such as 500 ns.", default=0.0, also=("delay",)),
        Field("count", "number", "Parallel physical links, used as one.", default=1, minimum=1, also=("lanes", "links", "width")),
    ),
)

SECTIONS = (MEMORY, DEVICE, SWITCH, LINK)


def json_schema() -> dict[str, Any]:
    """The schema, JSON Schema draft 7 (what TOML language servers read)."""
    top = _object(TOP)
    for section in SECTIONS:
        top["properties"][section.key] = {"type": "array", "description": section.about, "items": {"$ref": f"#/definitions/{section.key}"}}
    top["properties"]["memory"]["minItems"] = 1
    top["required"] = ["memory"]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "hmmnet topology",
        **top,
        "definitions": {section.key: _object(section) for section in SECTIONS},
    }


def _object(section: Section) -> dict[str, Any]:
    out: dict[str, Any] = {
        "type": "object",
        "description": section.about,
        "properties": {field.key: _value(field) for field in section.fields},
        "additionalProperties": False,
    }
    required = [field.key for field in section.fields if field.required]
    if required:
        out["required"] = required
    return out


def _value(field: Field) -> dict[str, Any]:
    patterns = {"name": NAME_PATTERN, "reference": NAME_PATTERN, "size": SIZE_PATTERN, "rate": RATE_PATTERN, "time": TIME_PATTERN}
    out: dict[str, Any] = {"description": field.about}
    if field.form in patterns:
        out |= {"type": "string", "pattern": f"^{patterns[field.form]}$"}
    elif field.form == "sizes":
        out |= {"type": "array", "minItems": 1, "items": {"type": "string", "pattern": f"^{SIZE_PATTERN}$"}}
    elif field.form == "flag":
        out |= {"type": "boolean"}
    elif field.form == "number":
        out |= {"type": "integer", "minimum": field.minimum}
    elif field.form == "choice":
        out |= {"type": "string", "enum": list(field.choices)}
    else:
        out |= {"type": "string"}
    if isinstance(field.default, (str, bool, int)):
        out["default"] = field.default
    return out


def schema_text() -> str:
    """The schema as the committed file holds it."""
    return json.dumps(json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
