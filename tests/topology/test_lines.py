"""Every key of a TOML document is found on its line, however it is written."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.topology.lines import Path, key_lines

VALUES = [
    "1",
    "true",
    "1979-05-27 07:32:00",
    '"a # no comment ] [ = \\" \\\\"',
    "'literal \\ # ]'",
    '"""two\nlines # [x] "quoted" \\""""',
    "'''\nfour\n[not.a.header]\n''''",
    "[1, 2]",
    "[ # first\n  [1], # a ] in a comment\n\n  'x',\n]",
    '{ a = 1, "b.c" = "}" }',
    "[]",
    "{}",
]


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[Path, int]]:
    """A document whose keys are all different, and the line of each."""
    text: list[str] = []
    lines: dict[Path, int] = {}
    arrays: dict[str, int] = {}
    table: Path = ()

    def here() -> int:
        return sum(part.count("\n") for part in text) + 1

    for number in range(draw(st.integers(0, 12))):
        text.append(draw(st.sampled_from(["", "\n", "# a = [\n", "   ", "\t\n"])))
        kind = draw(st.sampled_from(["pair", "pair", "pair", "table", "array", "inner"]))
        if kind == "pair":
            key = draw(st.sampled_from(["k{}", '"k {}"', "'k={}'", "k{} . x"])).format(number)
            parts = {"k{}": (f"k{number}",), '"k {}"': (f"k {number}",), "'k={}'": (f"k={number}",)}
            path = next((p for form, p in parts.items() if form.format(number) == key), (f"k{number}", "x"))
            lines[(*table, *path)] = here()
            text.append(f"{key} = {draw(st.sampled_from(VALUES))}\n")
        elif kind == "table":
            table = (f"t{number}", "inner")
            lines[table] = here()
            text.append(f"[t{number}.inner] # comment\n")
        else:
            name = draw(st.sampled_from(["one", "two"]))
            if kind == "array":
                arrays[name] = arrays.get(name, -1) + 1
                table = (name, arrays[name])
                lines[table] = here()
                text.append(f"[[{name}]]\n")
            elif name in arrays:
                table = (name, arrays[name], f"s{number}")
                lines[table] = here()
                text.append(f"[ {name} . s{number} ]\n")
    return "".join(text), lines


@given(documents())
def test_any_style(case: tuple[str, dict[Path, int]]) -> None:
    """Headers, dotted and quoted keys, strings that look like structure, comments anywhere."""
    text, expected = case
    tomllib.loads(text)
    found = key_lines(text)
    assert {path: found.get(path) for path in expected} == expected


@given(documents())
def test_every_value_has_a_line(case: tuple[str, dict[Path, int]]) -> None:
    """Whatever tomllib finds has a place."""
    found = key_lines(case[0])

    def walk(value: Any, path: Path) -> None:
        assert path == () or path in found
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, (*path, key))
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                walk(inner, (*path, index))

    walk(tomllib.loads(case[0]), ())


def test_elements_of_arrays() -> None:
    """An element has the line it begins on."""
    found = key_lines('sizes = [\n  "4 KiB",\n  # no\n  "2 MiB",\n]\nlast = 1\n')
    assert found["sizes", 0] == 2
    assert found["sizes", 1] == 4
    assert found["last",] == 6


def test_windows_line_ends_and_byte_order_mark() -> None:
    """A file from another system has the same lines."""
    assert key_lines("\ufeffa = 1\r\n\r\nb = 2\r\n") == {("a",): 1, ("b",): 3}


@pytest.mark.parametrize("text", ["a = [", 'a = "', "[", "[[x", "a", "=", "a = {", "]", "'''", "a.b.", '"', "a = [[[["])
@given(extra=st.text(alphabet="[]{}\"'=.,#\n a1\\", max_size=12))
def test_it_ends_on_anything(text: str, extra: str) -> None:
    """Text that is no TOML gets no answer worth having, but it gets one."""
    key_lines(text + extra)
