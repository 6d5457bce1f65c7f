"""On which line each key of a TOML document stands.

``tomllib`` gives values without places. This scanner walks the same text again and notes, for every table, key and array element, the
line on which it begins; it knows TOML's outline (headers, keys, strings, brackets) and not its values. It trusts that ``tomllib``
accepted the text: on anything else its answer is worthless, though it always ends.

A place is a path: ``("link", 2, "bandwidth")`` is the key `bandwidth` of the third ``[[link]]``.
"""

from __future__ import annotations

import tomllib
from bisect import bisect_right
from collections.abc import Iterator, Mapping

Path = tuple[str | int, ...]

_BARE_END = frozenset(" \t.=]")
_VALUE_END = frozenset(",]}\n#")


def key_lines(text: str) -> dict[Path, int]:
    """The line of every path in `text`, counted from 1."""
    return _Scanner(text).scan()


class KeyLines(Mapping[Path, int]):
    """`key_lines` of a text, found out when somebody asks: for a text without mistakes nobody does."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._found: dict[Path, int] | None = None

    def _lines(self) -> dict[Path, int]:
        if self._found is None:
            self._found = key_lines(self._text)
        return self._found

    def __getitem__(self, path: Path) -> int:
        return self._lines()[path]

    def __iter__(self) -> Iterator[Path]:
        return iter(self._lines())

    def __len__(self) -> int:
        return len(self._lines())


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._at = 0
        self._newlines = [i for i, letter in enumerate(self._text) if letter == "\n"]
        self._lines: dict[Path, int] = {}
        self._arrays: dict[Path, int] = {}

    def scan(self) -> dict[Path, int]:
        """Walk the document."""
        table: Path = ()
        while self._skip_to_token():
            if self._peek() == "[":
                table = self._header()
            else:
                self._pair(table)
        return self._lines

    def _peek(self, length: int = 1) -> str:
        return self._text[self._at : self._at + length]

    def _line(self) -> int:
        return bisect_right(self._newlines, self._at - 1) + 1

    def _note(self, path: Path, line: int) -> None:
        for end in range(1, len(path) + 1):
            self._lines.setdefault(path[:end], line)

    def _skip_to_token(self) -> bool:
        """Skip blanks, line ends and comments; False at the end of the text."""
        while self._at < len(self._text):
            letter = self._peek()
            if letter == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif letter.isspace() or letter == "\ufeff":
                self._at += 1
            else:
                return True
        return False

    def _skip_blanks(self) -> None:
        while self._peek() in (" ", "\t"):
            self._at += 1

    def _header(self) -> Path:
        line = self._line()
        double = self._peek(2) == "[["
        self._at += 2 if double else 1
        parts = list(self._key())
        self._at += 2 if double else 1
        path: Path = ()
        for part in parts[:-1]:
            path += (part,)
            if path in self._arrays:
                path += (self._arrays[path] - 1,)
        path += (parts[-1],)
        if double:
            index = self._arrays.get(path, 0)
            self._arrays[path] = index + 1
            self._note(path, line)
            path += (index,)
        self._note(path, line)
        return path

    def _key(self) -> Iterator[str]:
        """The parts of a dotted key; ends before ``=`` or ``]``."""
        while True:
            self._skip_blanks()
            start = self._at
            if self._peek() in ('"', "'"):
                self._string()
                yield _unquote(self._text[start : self._at])
            else:
                while self._at < len(self._text) and self._peek() not in _BARE_END:
                    self._at += 1
                yield self._text[start : self._at]
            self._skip_blanks()
            if self._peek() != ".":
                return
            self._at += 1

    def _pair(self, table: Path) -> None:
        line = self._line()
        path = (*table, *self._key())
        self._note(path, line)
        self._at += 1  # the equals sign
        self._skip_blanks()
        self._value(path)

    def _value(self, path: Path) -> None:
        letter = self._peek()
        if letter in ('"', "'"):
            self._string()
        elif letter == "[":
            self._array(path)
        elif letter == "{":
            self._inline_table(path)
        else:
            while self._at < len(self._text) and self._peek() not in _VALUE_END:
                self._at += 1

    def _array(self, path: Path) -> None:
        self._at += 1
        index = 0
        while self._skip_to_token() and self._peek() != "]":
            if self._peek() == ",":
                self._at += 1
                continue
            began = self._at
            self._note((*path, index), self._line())
            self._value((*path, index))
            self._at += self._at == began  # a stray bracket is no value, and must not stop us
            index += 1
        self._at += 1

    def _inline_table(self, path: Path) -> None:
        self._at += 1
        while self._skip_to_token() and self._peek() != "}":
            if self._peek() == ",":
                self._at += 1
            else:
                self._pair(path)
        self._at += 1

    def _string(self) -> None:
        quote = self._peek()
        mark = quote * 3 if self._peek(3) == quote * 3 else quote
        self._at += len(mark)
        while self._at < len(self._text):
            if quote == '"' and self._peek() == "\\":
                self._at += 2
            elif self._peek(len(mark)) == mark:
                self._at += len(mark)
                for _ in range(2 if len(mark) == 3 else 0):  # up to two quotes may stand right before the closing three
                    self._at += self._peek() == quote
                return
            else:
                self._at += 1


def _unquote(quoted: str) -> str:
    """A quoted key as the string that it means; as it stands when it means none."""
    try:
        return str(tomllib.loads(f"key = {quoted}")["key"])
    except tomllib.TOMLDecodeError:
        return quoted
