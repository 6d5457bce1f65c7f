"""What may stand in an operation's line, taken from its usage text.

An operation registers itself with the usage that SYNTAX shows, ``dwrite D R p n val``; each word of the usage names a kind of argument and
so is also its parser and the text of its complaints. A word in brackets may be left out, an ``n`` in brackets counts as 1. A word in
brackets that is no kind, ``[fast]``, stands for itself: the argument is whether it is there.

Two kinds of failure are kept apart. A line that the syntax does not know is a mistake of the script (`ScriptError`). A line that the
syntax knows and this player does not (an operation still to be built) is *unsupported*: the script is played up to
there, and the word is counted.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .script import Operation, Script, ScriptError

PAGES_MAX = 16384
"""Limit of the syntax for one operation."""
PROTECTIONS = ("rw", "r", "rx", "w", "none")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADVICE = _names(
    """
    NORMAL RANDOM SEQUENTIAL WILLNEED DONTNEED FREE REMOVE DONTFORK DOFORK MERGEABLE UNMERGEABLE HUGEPAGE NOHUGEPAGE WIPEONFORK KEEPONFORK
    COLD PAGEOUT POPULATE_READ POPULATE_WRITE DONTNEED_LOCKED COLLAPSE
    """
)
SYNTAX_OPERATIONS = _names(
    """
    mmap hole mmapdev munmap mprotect mremap grow madvise mlock munlock memfd ffill fsum fpunch ftrunc uffd
    write read fill sum pte fork exit
    open close dread dwrite todev tosys snap excl chkex release pin unpin pinread gup pup getref putref
    """
)
"""Every operation that the trace syntax has, built or not."""
BINDS: Mapping[str, int] = {"mmap": 1, "hole": 1, "mmapdev": 1, "open": 1, "memfd": 1, "mremap": 5}
"""Operations that give a name to something, and which word the name is."""
BINDS_KIND: Mapping[str, str] = {"open": "D", "memfd": "F"}
"""What they name, if it is not a region."""


class BadArgumentError(Exception):
    """A word does not fit; the text is the cause and the mend."""


@dataclass(frozen=True)
class Unsupported:
    """An operation of the syntax that this player cannot do; `what` names it for counting."""

    what: str


def _number(word: str) -> int:
    try:
        value = int(word, 0)
    except ValueError:
        raise BadArgumentError(f"{word!r} is no number; decimal or 0x hex is wanted") from None
    if value < 0:
        raise BadArgumentError(f"{word!r} is negative")
    return value


def _bounded(limit: int, what: str) -> Callable[[str], int]:
    def parse(word: str) -> int:
        value = _number(word)
        if value > limit:
            raise BadArgumentError(f"{word!r}: {what} (at most {limit})")
        return value

    return parse


def _one_of(choices: tuple[str, ...], what: str) -> Callable[[str], str]:
    def parse(word: str) -> str:
        if word not in choices:
            raise BadArgumentError(f"{word!r} is no {what}{suggestion(word, choices)}; one of {' '.join(choices)}")
        return word

    return parse


def suggestion(word: str, choices: Iterable[str]) -> str:
    """``; did you mean "x"?`` when one of `choices` is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, sorted(choices), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


PARSERS: Mapping[str, Callable[[str], Any]] = {
    "NAME": str,
    "R": str,
    "D": str,
    "F": str,
    "p": _bounded(1 << 20, "a page beyond any region"),
    "n": _bounded(PAGES_MAX, "too many pages for one operation"),
    "m": _bounded(PAGES_MAX, "too many pages for one region"),
    "off": _bounded(4095, "an offset inside a page"),
    "val": _bounded(255, "one byte"),
    "unit": _number,
    "PROT": _one_of(PROTECTIONS, "protection"),
    "ADVICE": _one_of(ADVICE, "advice"),
}
DEFAULTS: Mapping[str, Any] = {"n": 1, "PROT": "rw"}
KINDS: Mapping[str, str] = {"R": "region", "D": "device", "F": "file", "file=F": "file"}


@dataclass(frozen=True)
class Usage:
    """The form of one operation: its name and the kinds of its arguments."""

    name: str
    kinds: tuple[str, ...]
    options: tuple[str, ...] = ()
    """Words ``name=KIND`` that may follow in any order; None for one that does not."""
    flags: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> Usage:
        """Read a usage such as ``mmap NAME n [PROT]``."""
        name, *words = text.split()
        kinds = tuple(word for word in words if word.strip("[]") in PARSERS)
        options = tuple(word.strip("[]") for word in words if "=" in word)
        flags = tuple(word.strip("[]") for word in words[len(kinds) + len(options) :])
        usage = cls(name, kinds, options, flags)
        assert str(usage) == text, f"unknown kind of argument in usage {text!r}"
        return usage

    def __str__(self) -> str:
        return " ".join((self.name, *self.kinds, *(f"[{word}]" for word in (*self.options, *self.flags))))

    def parse(self, words: tuple[str, ...]) -> tuple[Any, ...]:
        """The arguments in `words` (without the operation's name). Raises BadArgumentError."""
        required = sum(not kind.startswith("[") for kind in self.kinds)
        flags = {word for word in words[required:] if word in self.flags}
        options: list[Any] = []
        for option in self.options:
            name, _, kind = option.partition("=")
            given = [word for word in words[required:] if word.startswith(f"{name}=")]
            if len(given) > 1:
                raise BadArgumentError(f"{given[1]!r}: {name} was given before")
            options.append(PARSERS[kind](given[0].partition("=")[2]) if given else None)
            words = (*words[:required], *(word for word in words[required:] if word not in given))
        words = (*words[:required], *(word for word in words[required:] if word not in flags))
        if len(words) > len(self.kinds):
            raise BadArgumentError(f"{words[len(self.kinds)]!r} is one word too many")
        values: list[Any] = []
        for i, kind in enumerate(self.kinds):
            plain = kind.strip("[]")
            if i < len(words):
                values.append(PARSERS[plain](words[i]))
            elif kind.startswith("["):
                values.append(DEFAULTS[plain])
            else:
                raise BadArgumentError(f"argument {plain} is missing")
        return (*values, *options, *(flag in flags for flag in self.flags))


@dataclass(frozen=True)
class Step:
    """A parsed operation: how to do it, or why it cannot be done."""

    operation: Operation
    arguments: tuple[Any, ...] | Unsupported


def parse_steps(script: Script, usages: Mapping[str, Usage]) -> list[Step]:
    """Every operation of `script`, parsed by the usages of those that are built. Raises ScriptError for a line the syntax does not have."""
    steps: list[Step] = []
    names: dict[str, set[str]] = {"R": set(), "D": set(), "F": set()}
    children = 0
    for operation in script.operations:
        try:
            children = _children(operation, children)
            steps.append(Step(operation, _parse(operation, usages, names)))
        except BadArgumentError as error:
            usage = usages.get(operation.words[0])
            form = f"; usage: {usage}" if usage else ""
            where = f"script {script.name!r}, {operation.text!r}"
            raise ScriptError(script.path, operation.file_line, f"{where}: {error}{form}") from None
        _bind(operation, names)
    return steps


def _children(operation: Operation, before: int) -> int:
    """How many children have been forked and not ended after `operation`."""
    after = before + {"fork": 1, "exit": -1}.get(operation.words[0], 0)
    if after < 0:
        raise BadArgumentError("there is no child to exit: no fork comes before")
    return after


def _parse(operation: Operation, usages: Mapping[str, Usage], names: Mapping[str, set[str]]) -> tuple[Any, ...] | Unsupported:
    name = operation.words[0]
    usage = usages.get(name)
    if usage is None:
        if name not in SYNTAX_OPERATIONS:
            raise BadArgumentError(f"unknown operation {name!r}{suggestion(name, SYNTAX_OPERATIONS)}")
        return Unsupported(name)
    arguments = usage.parse(operation.words[1:])
    for kind, value in zip((*usage.kinds, *usage.options), arguments, strict=False):
        if kind in KINDS and value is not None and value not in names[kind[-1]]:
            raise BadArgumentError(f"no {KINDS[kind]} is called {value!r}{suggestion(value, names[kind[-1]])} at this line")
    return arguments


def _bind(operation: Operation, names: Mapping[str, set[str]]) -> None:
    position = BINDS.get(operation.words[0])
    if position is not None and position < len(operation.words):
        names[BINDS_KIND.get(operation.words[0], "R")].add(operation.words[position])
