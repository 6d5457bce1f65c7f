"""Trace files: many kernel scripts in one text, each with what a real kernel answered.

A file is a sequence of ``=== NAME``, the script, ``--- recorded``, the recorded output. The output has one line for each operation,
``LINENO: OP ARGS => RESULT``, with the line's number in the script; trailer lines without a number follow when the kernel or the process
came to harm. A ``KERNEL WARNING`` trailer says that the *kernel* complained (its own bug) and is no part of what the script saw.

Parsing is strict: a script that is not understood whole would be compared wrongly without anybody noticing. Every complaint names file,
line, cause and mend. What an operation's arguments mean is not known here but in `operations`, where each operation registers itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hmmnet.errors import WrongUse

SCRIPT_MARK = "=== "
RECORDED_MARK = "--- recorded"
IGNORED_TRAILERS = frozenset({"KERNEL WARNING"})
TRAILER = re.compile(r"(KERNEL (WARNING|OOPS|CRASH)|END (killed|status|hung)|TIMEOUT)\b")
RECORDED_LINE = re.compile(r"(?P<number>[0-9]+): (?P<operation>.*?) => (?P<result>.*)\Z")
FILE_BYTES_MAX = 64 << 20
"""The five recorded files hold 300 kB each; a file beyond this is something else."""


class ScriptError(WrongUse):
    """A trace file cannot be played; the text is ``FILE:LINE: cause; mend``, without the line where it is 0."""

    def __init__(self, path: Path | str, line: int, problem: str) -> None:
        self.path = str(path)
        self.line = line
        self.problem = problem
        super().__init__(f"{path}:{line}: {problem}" if line else f"{path}: {problem}")


@dataclass(frozen=True)
class Operation:
    """One operation as written: `number` is its line in the script, `file_line` its line in the file, `words` its name and arguments."""

    number: int
    file_line: int
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """The operation as the recorded output repeats it."""
        return " ".join(self.words)


@dataclass(frozen=True)
class Recorded:
    """One line of recorded output. `number` is 0 for a trailer, whose text is in `result`."""

    number: int
    operation: str
    result: str


@dataclass(frozen=True)
class Script:
    """A script with its recording. `path` and `line` say where it begins; `warned`, whether the recorded kernel WARNed."""

    name: str
    path: str
    line: int
    operations: tuple[Operation, ...]
    recorded: tuple[Recorded, ...]
    warned: bool = False


def read_scripts(path: Path) -> list[Script]:
    """All scripts of a trace file, in order. Raises ScriptError."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > FILE_BYTES_MAX:
            raise ScriptError(path, 0, f"the file has {size_bytes >> 20} MiB, more than any trace file (limit {FILE_BYTES_MAX >> 20} MiB)")
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ScriptError(path, 0, f"this is no text (byte {error.start} is not UTF-8); a trace file is wanted") from error
    except OSError as error:
        raise ScriptError(path, 0, f"cannot be read: {error.strerror}") from error
    return parse_scripts(text, path)


def parse_scripts(text: str, path: Path | str = "trace") -> list[Script]:
    """All scripts in `text`; `path` is for messages. Raises ScriptError."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith(SCRIPT_MARK)]
    _check_preamble(lines[: starts[0]] if starts else lines, path, found=bool(starts))
    scripts: list[Script] = []
    seen: dict[str, int] = {}
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        script = _parse_script(lines, start, end, path)
        if script.name in seen:
            raise ScriptError(path, script.line, f"script {script.name!r} stands at line {seen[script.name]} already; give it another name")
        seen[script.name] = script.line
        scripts.append(script)
    return scripts


def _check_preamble(lines: list[str], path: Path | str, *, found: bool) -> None:
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            raise ScriptError(path, number, f"{line[:60]!r} stands before any script; a script begins with a line '=== NAME'")
    if not found:
        raise ScriptError(path, 1, "no script in this file; a script begins with a line '=== NAME'")


def _parse_script(lines: list[str], start: int, end: int, path: Path | str) -> Script:
    name = lines[start][len(SCRIPT_MARK) :].strip()
    if not name:
        raise ScriptError(path, start + 1, "this script has no name; write '=== NAME'")
    try:
        middle = lines.index(RECORDED_MARK, start, end)
    except ValueError:
        problem = f"script {name!r} has no recorded output; a line '{RECORDED_MARK}' and the output must follow the script"
        raise ScriptError(path, start + 1, problem) from None
    operations = tuple(_operations(lines[start + 1 : middle], start + 2))
    recorded = tuple(_recorded(lines[middle + 1 : end], middle + 2, {o.number: o for o in operations}, path))
    warned = any(line.strip() in IGNORED_TRAILERS for line in lines[middle + 1 : end])
    return Script(name, str(path), start + 1, operations, recorded, warned)


def _operations(lines: list[str], first_file_line: int) -> Iterator[Operation]:
    for i, line in enumerate(lines):
        words = line.split()
        if words and not words[0].startswith("#"):
            yield Operation(i + 1, first_file_line + i, tuple(words))


def _recorded(lines: list[str], first_file_line: int, operations: dict[int, Operation], path: Path | str) -> Iterator[Recorded]:
    last = 0
    for file_line, line in enumerate(lines, first_file_line):
        if not line.strip():
            continue
        match = RECORDED_LINE.match(line)
        if match is None:
            if TRAILER.match(line) is None:
                raise ScriptError(path, file_line, f"{line[:60]!r} is no recorded line; 'LINENO: OP ARGS => RESULT' is wanted")
            if line.strip() not in IGNORED_TRAILERS:
                yield Recorded(0, "", line.strip())
            continue
        number = int(match["number"])
        operation = operations.get(number)
        if operation is None:
            raise ScriptError(path, file_line, f"the recording answers line {number} of the script, which holds no operation")
        if operation.text != match["operation"]:
            problem = f"the recording answers {match['operation']!r}, but line {number} of the script is {operation.text!r}"
            raise ScriptError(path, file_line, problem)
        if number <= last:
            raise ScriptError(path, file_line, f"line {number} is answered after line {last}; recorded lines ascend")
        last = number
        yield Recorded(number, operation.text, match["result"])
