"""From a TOML document to checked records: the field-by-field half of reading a topology.

Nothing stops at the first mistake. A value that is wrong is reported once and replaced by a harmless one (`Record.broken` remembers it),
so that the rest of the file can still be checked without mistakes that only follow from others. Names that stand for many things are
expanded here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hmmnet.pages import PAGE_SIZE
from hmmnet.units import parse_rate, parse_size, parse_time, show_size

from .lines import KeyLines, Path
from .model import MEMORY_BYTES_MAX
from .names import expand, spread
from .problems import Problem, closest, did_you_mean, toml_of
from .schema import LINK, SECTIONS, TOP, Field, Section

_UNIT_SUFFIX = re.compile(r"_(?:ns|us|ms|s|bytes|[kmgt]i?b(?:ps|_s|_per_s)?|bytes_per_s|[kmgt]bps)\Z", re.IGNORECASE)
_TYPE_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "an array", dict: "a table"}
_WANTED = {
    "name": 'a name in quotes, such as "gpu0"',
    "reference": 'a name in quotes, such as "gpu0"',
    "text": "text in quotes",
    "choice": "text in quotes",
    "size": 'a size with its unit in quotes, such as "16 GiB"',
    "sizes": 'an array of sizes, such as ["4 KiB", "2 MiB"]',
    "rate": 'a rate with its unit in quotes, such as "31.5 GB/s"',
    "time": 'a time with its unit in quotes, such as "500 ns"',
    "flag": "true or false",
    "number": "a whole number",
}
_HARMLESS: Mapping[str, Any] = {"size": PAGE_SIZE, "sizes": (PAGE_SIZE,), "rate": 1.0, "time": 0.0, "flag": True, "number": 1}


@dataclass
class Record:
    """One thing of one section.

    `index` tells which table of the file it came from and `place` what to call that table; `broken` are keys whose values are made up.
    """

    section: Section
    index: int
    place: str
    values: dict[str, Any]
    broken: set[str] = field(default_factory=set)


@dataclass
class Document:
    """A file, read as far as possible."""

    file: str
    top: dict[str, Any] = field(default_factory=dict)
    records: dict[str, list[Record]] = field(default_factory=lambda: {section.key: [] for section in SECTIONS})
    problems: list[Problem] = field(default_factory=list)
    lines: Mapping[Path, int] = field(default_factory=dict)
    complete: bool = True
    """False when a section could not be read at all, so that nobody can say "there is none"."""
    spelled: dict[str, str] = field(default_factory=dict)
    """Sections that the file calls by another word (``devices``): they are reported once and then read as what was meant."""

    def line(self, section: str, index: int, key: str = "") -> int:
        """The line of a key, else of its table."""
        word = self.spelled.get(section, section)
        for path in ((word, index, key), (word, key), (word, index), (word,)):
            if path in self.lines:
                return self.lines[path]
        return 0

    def complain(self, line: int, place: str, key: str, cause: str, mend: str = "") -> None:
        """Note a mistake."""
        self.problems.append(Problem(self.file, line, place, key, cause, mend))


def read_document(text: str, file: str) -> Document:
    """Parse and check `text`, field by field; never raises for what the text holds."""
    document = Document(file)
    data = toml_of(text, file)
    if isinstance(data, Problem):
        document.complete = False
        document.problems.append(data)
        return document
    document.lines = KeyLines(text)
    _read_top(document, data)
    for section in SECTIONS:
        word = document.spelled.get(section.key, section.key)
        for index, table in enumerate(_tables(document, section, word, data.get(word, []))):
            document.records[section.key] += _read_table(document, section, index, table)
    return document


def _read_top(document: Document, data: dict[str, Any]) -> None:
    sections = [section.key for section in SECTIONS]
    known = [*(one.key for one in TOP.fields), *sections]
    for key, value in data.items():
        if key in known:
            continue
        mend = did_you_mean(key, known, f"known are {', '.join(known)}")
        document.complain(document.lines.get((key,), 0), "", key, "unknown section or key", mend)
        if isinstance(value, (list, dict)):
            missing = [section for section in sections if section not in data]
            meant = closest(key, missing)
            if meant is not None and meant not in document.spelled:
                document.spelled[meant] = key
            elif not {"memory", "device"}.isdisjoint(missing) or _names_something(value):
                document.complete = False
    for one in TOP.fields:
        value = data.get(one.key, one.default)
        if value is not None and not isinstance(value, str):
            document.complain(document.lines.get((one.key,), 0), "", one.key, f"{_type_name(value)} where {_WANTED['text']} is wanted")
            value = one.default
        elif one.choices and value not in one.choices:
            cause = f"{value!r} is none of {', '.join(one.choices)}"
            document.complain(document.lines.get((one.key,), 0), "", one.key, cause, did_you_mean(str(value), one.choices))
            value = one.default
        document.top[one.key] = value


def _names_something(value: list[Any] | dict[str, Any]) -> bool:
    """Whether an unknown section may define what others refer to."""
    tables = [value] if isinstance(value, dict) else value
    return any("name" in table for table in tables if isinstance(table, dict))


def _tables(document: Document, section: Section, word: str, value: Any) -> list[dict[str, Any]]:
    """The tables of a section, whatever stands there."""
    mend = f"write [[{section.key}]] before each one"
    if isinstance(value, dict):
        document.complain(document.lines.get((word,), 0), "", word, f"one table where an array of tables is wanted: [{word}]", mend)
        if any(isinstance(inner, dict) for inner in value.values()):
            document.complete = False
            return []
        return [value]
    if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
        document.complete = False
        document.complain(document.lines.get((word,), 0), "", word, f"{_type_name(value)} where an array of tables is wanted", mend)
        return []
    return value


def _read_table(document: Document, section: Section, index: int, table: dict[str, Any]) -> list[Record]:
    reader = _TableReader(document, section, index, table)
    reader.unknown_keys()
    values = {one.key: reader.value(one) for one in section.fields}
    return reader.expanded(values)


class _TableReader:
    """Reads one table of one section."""

    def __init__(self, document: Document, section: Section, index: int, table: dict[str, Any]) -> None:
        self._document = document
        self._section = section
        self._index = index
        self._table = table
        self._unknown = [key for key in table if section.field(key) is None]
        self._broken: set[str] = set()
        self._place = _place(section, index, table)

    def _complain(self, key: str, cause: str, mend: str = "") -> None:
        self._broken.add(key)
        self._document.complain(self._document.line(self._section.key, self._index, key), self._place, key, cause, mend)

    def unknown_keys(self) -> None:
        """Report keys that the section does not have, each with what was probably meant."""
        for key in self._unknown:
            self._complain(key, "unknown key", _mend_key(key, self._section))

    def value(self, one: Field) -> Any:
        """The value of a field, or a harmless one when it is missing or wrong."""
        harmless = _HARMLESS.get(one.form, one.default)
        if one.key not in self._table:
            meant = any(_field_meant(key, self._section) is one for key in self._unknown)
            if one.required and not meant:
                self._complain(one.key, "missing", f"add {one.key} = {_example(one)}")
            if one.required:
                self._broken.add(one.key)
                return harmless
            return one.default
        try:
            return _CONVERT[one.form](one, self._table[one.key])
        except ValueError as error:
            cause, _, mend = str(error).partition("\n")
            self._complain(one.key, cause, mend)
            return harmless

    def expanded(self, values: dict[str, Any]) -> list[Record]:
        """One record for each thing that the table stands for."""
        if self._section is LINK:
            self._name_link(values)
        deciding = ("a", "b") if self._section is LINK else ("name",)
        count = max((len(values[key]) for key in deciding if values[key]), default=1)
        columns = {key: self._column(key, values[key], count) for key in ("name", "a", "b", "node") if key in values}
        if count > 1 and "name" in self._table and values["name"] and len(values["name"]) != count and "name" not in self._broken:
            self._complain("name", f"one name for {count} things", f'write a range, such as "{values["name"][0]}-[0-{count - 1}]"')
        records = []
        for i in range(count):
            one = values | {key: column[i] for key, column in columns.items()}
            if values.get("unit") is not None:
                one["unit"] = values["unit"] + i
            records.append(Record(self._section, self._index, self._place, one, self._broken))
        return records

    def _column(self, key: str, names: list[str] | None, count: int) -> list[str | None]:
        if not names:
            return [None] * count
        try:
            return list(spread(names, count))
        except ValueError:
            self._complain(key, f"{self._table.get(key)!r} stands for {len(names)} things, which does not go evenly into {count}")
            return [names[0]] * count

    def _name_link(self, values: dict[str, Any]) -> None:
        """Links are called after their ends unless they have names."""
        a, b = values["a"], values["b"]
        if values["name"] is not None:
            return
        count = max(len(a or ()), len(b or ()))
        if a and b and count % len(a) == 0 and count % len(b) == 0:
            values["name"] = [f"{one}-{other}" for one, other in zip(spread(a, count), spread(b, count), strict=True)]
        else:
            self._broken.add("name")


def _place(section: Section, index: int, table: dict[str, Any]) -> str:
    name = table.get("name")
    if isinstance(name, str):
        return f'{section.key} "{name}"'
    if section is LINK and isinstance(table.get("a"), str) and isinstance(table.get("b"), str):
        return f'link "{table["a"]}" to "{table["b"]}"'
    return f"{section.key} number {index + 1}"


def _field_meant(key: str, section: Section) -> Field | None:
    """The field that an unknown key was probably meant to be."""
    for one in section.fields:
        if key.casefold() in one.also:
            return one
    guess = closest(_UNIT_SUFFIX.sub("", key), [one.key for one in section.fields])
    return None if guess is None else section.field(guess)


def _mend_key(key: str, section: Section) -> str:
    meant = _field_meant(key, section)
    if meant is None:
        return f"a {section.key} has {', '.join(one.key for one in section.fields)}"
    if _UNIT_SUFFIX.search(key) and meant.form in ("size", "rate", "time"):
        return f'did you mean "{meant.key}"? The unit stands in the value: {meant.key} = {_example(meant)}'
    return f'did you mean "{meant.key}"?'


def _example(one: Field) -> str:
    return {
        "name": '"gpu0"',
        "reference": '"gpu0"',
        "size": '"16 GiB"',
        "rate": '"31.5 GB/s"',
        "time": '"500 ns"',
        "flag": "true",
        "number": "1",
    }.get(one.form, '"..."')


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), "a date or time")


def _want(one: Field, value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise ValueError(f"{_type_name(value)} where {_WANTED[one.form]} is wanted")
    return value


def _names(one: Field, value: Any) -> list[str]:
    return expand(_want(one, value, str))


def _choice(one: Field, value: Any) -> str:
    if _want(one, value, str) not in one.choices:
        raise ValueError(f"{value!r} is none of {', '.join(one.choices)}\n{did_you_mean(value, one.choices)}")
    return str(value)


def _size(one: Field, value: Any) -> int:
    size = parse_size(_want(one, value, str))
    if size == 0:
        raise ValueError(f"{value!r} is no memory at all")
    if size > MEMORY_BYTES_MAX:
        raise ValueError(f"{value!r} is larger than half the address space of a process\nat most {show_size(MEMORY_BYTES_MAX)}")
    if size % PAGE_SIZE:
        raise ValueError(f"{value!r} is no whole number of 4 KiB pages\n{show_size(max(size // PAGE_SIZE, 1) * PAGE_SIZE)} would be")
    return size


def _sizes(one: Field, value: Any) -> tuple[int, ...]:
    sizes = tuple(parse_size(_want(one, item, str)) for item in _want(one, value, list))
    for size in sizes:
        if size < PAGE_SIZE or size & (size - 1):
            raise ValueError(f"{show_size(size)} is no page size: powers of two from 4 KiB on are")
    if PAGE_SIZE not in sizes:
        raise ValueError('4 KiB is missing: it is the host\'s page size, and single pages migrate\nadd "4 KiB"')
    return tuple(sorted(set(sizes)))


def _rate(one: Field, value: Any) -> float:
    rate = parse_rate(_want(one, value, str))
    if rate == 0:
        raise ValueError(f"{value!r}: nothing would ever arrive\ngive it a bandwidth, or leave the link out")
    return rate


def _number(one: Field, value: Any) -> int:
    if _want(one, value, int) < one.minimum:
        raise ValueError(f"{value} is too small: at least {one.minimum} is wanted")
    if value >= 1 << 31:
        raise ValueError(f"{value} is too large")
    return int(value)


_CONVERT: Mapping[str, Callable[[Field, Any], Any]] = {
    "name": _names,
    "reference": _names,
    "text": lambda one, value: _want(one, value, str),
    "choice": _choice,
    "size": _size,
    "sizes": _sizes,
    "rate": _rate,
    "time": lambda one, value: parse_time(_want(one, value, str)),
    "flag": lambda one, value: _want(one, value, bool),
    "number": _number,
}
