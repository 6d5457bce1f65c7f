"""From TOML text to checked values: every key known, every value of the right form, every mistake noted with its line.

This is the first of two passes. Here each table is looked at by itself, against the tables of `schema`; `load` then looks at the machine that
they describe together. Nothing is raised: mistakes are collected, so that a user sees all of a file's at once.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import Any

from hmmnet.units import parse_rate, parse_size, parse_time

from .lines import Path, key_lines
from .problems import Problem, did_you_mean
from .schema import NAME_PATTERN, SECTIONS, TOP, Field, Section

_RANGE = re.compile(r"(.*)\[([0-9]+)-([0-9]+)\](.*)\Z")
EXPANSION_MAX = 4096
"""Things one name may stand for."""


@dataclass(frozen=True)
class Entry:
    """One table of the file: its values by key, with defaults filled in; `at` is its place."""

    section: Section
    at: Path
    values: dict[str, Any]

    @property
    def label(self) -> str:
        """How problems name it."""
        name = self.values.get("name")
        if name is None and self.section.key == "link":
            name = f"{self.values.get('a', '?')} - {self.values.get('b', '?')}"
        return f'{self.section.key} "{name}"' if name else f"{self.section.key} {int(self.at[1]) + 1}"


class Document:
    """A parsed file: `top`, `entries` by section, and `problems` found so far."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.top: dict[str, Any] = {}
        self.entries: dict[str, list[Entry]] = {section.key: [] for section in SECTIONS}
        self._lines: dict[Path, int] = {}
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            self.problem(_line_of(error), "", "", f"not TOML: {error}", "see https://toml.io for the form")
            return
        self._lines = key_lines(text)
        self._read(data)

    def line(self, path: Path) -> int:
        """The line on which `path` stands; that of the nearest thing around it when it is not in the file."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 0)

    def problem(self, line: int, place: str, field: str, cause: str, mend: str = "") -> None:
        """Note a mistake."""
        self.problems.append(Problem(self.file, line, place, field, cause, mend))

    def blame(self, entry: Entry, field: str, cause: str, mend: str = "") -> None:
        """Note a mistake in one key of an entry."""
        self.problem(self.line((*entry.at, field)), entry.label, field, cause, mend)

    def _read(self, data: dict[str, Any]) -> None:
        sections = {section.key: section for section in SECTIONS}
        known = [*sections, *(field.key for field in TOP.fields)]
        for key in data:
            if key not in known:
                self.problem(self.line((key,)), "", key, "unknown key", did_you_mean(key, known, f"known are {', '.join(known)}"))
        top = Entry(TOP, (), {})
        for field in TOP.fields:
            if field.key in data:
                self._value(top, field, data[field.key])
        self.top = top.values
        for key, section in sections.items():
            tables = data.get(key, [])
            if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
                self.problem(self.line((key,)), "", key, "one table, or no table", f"write [[{key}]] with two brackets: there may be several")
                continue
            for index, table in enumerate(tables):
                self.entries[key].append(self._entry(section, (key, index), table))

    def _entry(self, section: Section, at: Path, table: dict[str, Any]) -> Entry:
        entry = Entry(section, at, {})
        for key in ("name", "a", "b"):  # first, so that problems can name the entry
            field = section.field(key)
            if field is not None and isinstance(table.get(key), str):
                entry.values[key] = table[key]
        known = [field.key for field in section.fields]
        for key in table:
            if key not in known:
                other = next((field.key for field in section.fields if key in field.also), None)
                mend = f'did you mean "{other}"?' if other else did_you_mean(key, known, f"known are {', '.join(known)}")
                self.blame(entry, key, f'unknown key "{key}" in {section.key}', mend)
        for field in section.fields:
            if field.key in table:
                self._value(entry, field, table[field.key])
            elif field.required:
                self.problem(self.line(at), entry.label, field.key, "is missing", field.about)
            elif field.default is not None:
                entry.values[field.key] = field.default
        return entry

    def _value(self, entry: Entry, field: Field, value: Any) -> None:
        try:
            entry.values[field.key] = _convert(field, value)
        except ValueError as error:
            entry.values.pop(field.key, None)
            self.blame(entry, field.key, str(error))


def _convert(field: Field, value: Any) -> Any:
    """A checked value. Raises ValueError."""
    if field.form == "flag":
        return _typed(value, bool, "true or false")
    if field.form == "number":
        number: int = _typed(value, int, "a whole number")
        if number < field.minimum:
            raise ValueError(f"{number} is too small, the least is {field.minimum}")
        return number
    if field.form == "sizes":
        return tuple(sorted({parse_size(_typed(size, str, 'a size in quotes, such as "4 KiB"')) for size in _typed(value, list, "a list of sizes")}))
    text: str = _typed(value, str, "text in quotes")
    if field.form == "size":
        return parse_size(text)
    if field.form == "rate":
        return parse_rate(text)
    if field.form == "time":
        return parse_time(text)
    if field.form == "choice" and text not in field.choices:
        raise ValueError(f'"{text}" is none of {", ".join(field.choices)}; {did_you_mean(text, field.choices)}'.rstrip("; "))
    if field.form in {"name", "reference"} and not re.fullmatch(NAME_PATTERN, text):
        raise ValueError(f'"{text}" is no name: letters, digits, ".", "_" and "-", with at most one range such as [0-7]')
    return text


def _typed(value: Any, kind: type, wanted: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} stands where {wanted} is wanted")
    return value


def expand(name: str) -> list[str]:
    """The names that `name` stands for: ``gpu[0-2]`` is gpu0, gpu1, gpu2. Raises ValueError for a range that is empty or too long."""
    match = _RANGE.match(name)
    if match is None:
        return [name]
    head, low, high, tail = match[1], int(match[2]), int(match[3]), match[4]
    if not low <= high < low + EXPANSION_MAX:
        raise ValueError(f'"{name}" stands for {max(0, high - low + 1)} things; a range goes up, and to {EXPANSION_MAX} at most')
    return [f"{head}{number}{tail}" for number in range(low, high + 1)]


def _line_of(error: tomllib.TOMLDecodeError) -> int:
    found = re.search(r"line (\d+)", str(error))
    return int(found[1]) if found else 0
