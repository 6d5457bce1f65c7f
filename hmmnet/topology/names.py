"""Names that stand for many things: ``gpu[0-7]`` is gpu0 to gpu7, ``leaf[00-15]`` keeps its zeros."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

NAMES_MAX = 1024
"""Things one name may stand for: as many as there may be devices."""
NAME_LENGTH_MAX = 64
"""As on the wire; a device's name is also the name of its log file."""
NAMES_SHOWN_MAX = 4
RESERVED = frozenset({"host"})
"""Programs say ``host`` for "whatever host memory is nearest"; the host's own log has that name, too."""

_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]*)\Z")
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)(?:\[([0-9]+)-([0-9]+)\]([A-Za-z0-9_.-]*))?\Z")

T = TypeVar("T")


def expand(text: str) -> list[str]:
    """The names that `text` stands for. Raises ValueError, which says what is wrong and, in a second line, how to mend it."""
    match = _NAME.match(text)
    if match is None:
        raise ValueError(f"{text!r} is no name\nletters, digits, dot, dash and underscore, a letter or digit first; gpu[0-7] for many")
    stem, first, last, tail = match[1], match[2], match[3], match[4]
    if first is None:
        names = [stem]
    else:
        low, high = int(first), int(last)
        if high < low:
            raise ValueError(f"{text!r}: the range ends before it begins")
        if high - low >= NAMES_MAX:
            raise ValueError(f"{text!r} stands for {high - low + 1} things; at most {NAMES_MAX} are possible")
        width = len(first) if first.startswith("0") else 1
        names = [f"{stem}{number:0{width}}{tail}" for number in range(low, high + 1)]
    if len(names[-1]) > NAME_LENGTH_MAX:
        raise ValueError(f"{names[-1]!r} is longer than {NAME_LENGTH_MAX} letters")
    return names


def why_no_single_name(text: str) -> str | None:
    """What is wrong with `text` as the name of one thing; None when it is good."""
    try:
        names = expand(text)
    except ValueError as error:
        return str(error).partition("\n")[0]
    return None if names == [text] else f"{text!r} stands for many things"


def spread(items: Sequence[T], count: int) -> list[T]:
    """`items` repeated in consecutive groups so that there are `count`. Raises ValueError when `count` is no multiple."""
    if count % len(items):
        raise ValueError(f"{len(items)} things cannot be spread evenly over {count}")
    return [item for item in items for _ in range(count // len(items))]


def compact(names: Sequence[str]) -> str:
    """`names` as a file would write them: ``gpu[0-7]`` where they count up, else with commas, of many the first and last."""
    matches = [_NUMBERED.match(name) for name in names]
    first = matches[0]
    if len(names) > 1 and first is not None:
        low = int(first[2])
        if list(names) == [f"{first[1]}{low + i}" for i in range(len(names))]:
            return f"{first[1]}[{low}-{low + len(names) - 1}]"
    return ", ".join(names) if len(names) <= NAMES_SHOWN_MAX else f"{names[0]} ... {names[-1]} ({len(names)})"
