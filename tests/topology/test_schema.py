"""The JSON schema that editors use refuses nothing that the checker takes, and takes nothing that the checker's form rules refuse."""

from __future__ import annotations

import copy
import tomllib
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it has no types of its own
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.topology.document import read_document
from hmmnet.topology.load import PRESETS, find, preset_names
from hmmnet.topology.schema import RATE_PATTERN, SECTIONS, SIZE_PATTERN, TIME_PATTERN, json_schema
from hmmnet.units import parse_rate, parse_size, parse_time

SCHEMA = jsonschema.Draft7Validator(json_schema())
SECTION_KEYS = [section.key for section in SECTIONS]


def test_the_schema_is_one() -> None:
    """Valid by its own rules, every key described."""
    jsonschema.Draft7Validator.check_schema(json_schema())
    for section in SECTIONS:
        assert section.about.endswith(".")
        assert all(field.about.endswith(".") for field in section.fields)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name: str) -> None:
    """Each names the schema in its first line, its sources in its head, and is what the schema says."""
    text = find(name).text
    assert text.startswith("#:schema ../topology.schema.json\n")
    assert (PRESETS / "../topology.schema.json").is_file()
    assert "# Sources" in text
    SCHEMA.validate(tomllib.loads(text))


@pytest.mark.parametrize(
    ("pattern", "parse"), [(SIZE_PATTERN, parse_size), (RATE_PATTERN, parse_rate), (TIME_PATTERN, parse_time)], ids=["size", "rate", "time"]
)
@given(data=st.data())
def test_quantities_of_the_schema_can_be_read(pattern: str, parse: Any, data: st.DataObject) -> None:
    """Whatever an editor takes for a quantity is one."""
    parse(data.draw(st.from_regex(pattern, fullmatch=True, alphabet=st.characters(codec="ascii"))))


GOOD = tomllib.loads(find("pcie-switch-4").text)
OTHER_VALUES: st.SearchStrategy[Any] = st.sampled_from([3, -1, True, 2.5, "", "16", "x y", "1 GiB", "1 GB/s", "5 ns", [], {}, ["4 KiB"]])


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """A good document with one change: another value, a key less, a key more."""
    document = copy.deepcopy(GOOD)
    key = draw(st.sampled_from([*SECTION_KEYS, "name"]))
    if key == "name" or draw(st.booleans()):
        document[key] = draw(OTHER_VALUES)
        return document
    table = draw(st.sampled_from(document[key]))
    what = draw(st.sampled_from(["change", "drop", "add"]))
    inner = draw(st.sampled_from(sorted(table)))
    if what == "drop":
        del table[inner]
    else:
        table[inner if what == "change" else draw(st.sampled_from(["atomics", "unit", "count", "kind", "colour", "page_sizes"]))] = draw(
            OTHER_VALUES
        )
    return document


def as_toml(value: Any) -> str:
    """Enough TOML for such documents."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {as_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


@given(changed())
def test_what_the_schema_refuses_the_checker_refuses(document: dict[str, Any]) -> None:
    """One change at a time: an editor never marks what would have loaded."""
    text = "".join(f"{key} = {as_toml(value)}\n" for key, value in document.items())
    assert tomllib.loads(text) == document
    refused = not SCHEMA.is_valid(document)
    problems = read_document(text, "changed.toml").problems
    no_memory = document.get("memory") == []  # the schema asks for one; the checker does when it looks at the whole machine
    assert not refused or problems or no_memory, text
