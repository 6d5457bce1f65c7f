"""One mistake in a topology: where it stands, what is wrong, how to mend it; and the guess what was meant."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_TOML_LINE = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)\Z")
CLOSE_ENOUGH = 0.6
"""Similarity from which a name is offered as what was meant: "latancy" for "latency", not "bandwidth"."""


@dataclass(frozen=True)
class Problem:
    """A mistake. `line` counts from 1, 0 when it belongs to no line; `place` names the thing (``device "gpu0"``), `field` its key."""

    file: str
    line: int
    place: str
    field: str
    cause: str
    mend: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        text = ": ".join(part for part in (where, self.place, self.field, self.cause) if part)
        return f"{text}; {self.mend}" if self.mend else text

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "file": self.file,
            "line": self.line,
            "place": self.place,
            "field": self.field,
            "cause": self.cause,
            "mend": self.mend,
        }


def syntax_problem(message: str, text: str, file: str, table: str = "[[name]]") -> Problem:
    """What Python's reader of TOML says of `text`, with the line in front; `table` is how one begins in such a file."""
    match = _TOML_LINE.search(message)
    line = 0
    if match is not None:
        line = int(match[1]) if match[1] else text.rstrip().count("\n") + 1
        message = message[: match.start()] + (f" (column {match[2]})" if match[2] else " (at the end of the file)")
    cause = f"no valid TOML: {message[:1].lower()}{message[1:]}"
    return Problem(file, line, "", "", cause, f"text stands in quotes, tables begin with {table}")


def toml_of(text: str, file: str, table: str = "[[name]]") -> dict[str, Any] | Problem:
    """What `text` says, or why it says nothing; `table` as for `syntax_problem`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return syntax_problem(str(error), text, file, table)
    except ValueError:  # of int itself
        return Problem(file, 0, "", "", "a number has thousands of digits", "write one that a machine can have")
    except RecursionError:
        return Problem(file, 0, "", "", "no valid TOML: brackets are nested too deeply", "no value here is more than a list of lists")


def no_text(error: UnicodeDecodeError, file: str) -> Problem:
    """A file is not written in UTF-8, with the line of the first byte that is none."""
    line = error.object.count(b"\n", 0, error.start) + 1
    return Problem(file, line, "", "", f"byte 0x{error.object[error.start]:02x} is no UTF-8", "save the file as UTF-8")


def closest(word: str, known: Iterable[str]) -> str | None:
    """What `word` was probably meant to be, or None."""
    names = list(known)
    by_fold = {name.casefold(): name for name in names}
    if word.casefold() in by_fold:
        return by_fold[word.casefold()]
    found = difflib.get_close_matches(word, names, n=1, cutoff=CLOSE_ENOUGH)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """``did you mean "..."?``, or `otherwise` when nothing is close."""
    guess = closest(word, known)
    return f'did you mean "{guess}"?' if guess is not None else otherwise
