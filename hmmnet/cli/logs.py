"""``hmmnet logs``: what host, devices and launcher wrote, in the order of time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .completion import machines, processes

LOOK_S = 0.2
"""Between looks at the files while following."""
LEVELS = ("debug", "info", "warning", "error", "critical")


def logs(
    name: Annotated[
        str | None,
        typer.Argument(
            autocompletion=machines, help='The machine; not needed when there is only one, or for "default".', show_default=False
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on, until Ctrl-C.")] = False,
    process: Annotated[
        str | None, typer.Option("--process", "-p", autocompletion=processes, help="Only this process: host, launcher or a device.")
    ] = None,
    level: Annotated[str, typer.Option(help="Only lines of at least this level: debug, info, warning, error.")] = "debug",
    tail: Annotated[int | None, typer.Option("--tail", "-n", min=0, help="Only the last so many lines.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they are: one JSON object each.")] = False,
) -> int:
    """What host and devices wrote. Works for running machines and for those that failed, until they are cleaned away."""
    from hmmnet.cli import did_you_mean
    from hmmnet.errors import HmmnetError, WrongUse
    from hmmnet.launcher.directory import known_machine

    if level.lower() not in LEVELS:
        raise typer.BadParameter(f'there is no level "{level}"{did_you_mean(level, LEVELS)}; there are: {", ".join(LEVELS)}')
    directory = known_machine(name)
    reader = Reader(directory.logs, process, LEVELS.index(level.lower()))
    if process is not None and process not in reader.processes() and not follow:
        names = reader.processes()
        record = directory.read()
        if record is not None and process in {device.name for device in record.devices}:
            raise HmmnetError(f'device "{process}" of machine "{directory.name}" has written nothing yet')
        raise WrongUse(
            f'machine "{directory.name}" has no logs of "{process}"{did_you_mean(process, names)}; there are: {", ".join(names)}'
        )
    show(reader.read(tail), as_json=as_json)
    while follow:
        time.sleep(LOOK_S)
        show(reader.read(), as_json=as_json)
        if not directory.alive():
            show(reader.read(), as_json=as_json)
            print(f'machine "{directory.name}" has ended', file=sys.stderr)
            return 0
    return 0


def show(lines: Iterator[str], *, as_json: bool) -> None:
    """Print log lines, for a program or for a person."""
    from hmmnet.observe.logs import readable

    for line in lines:
        print(line if as_json else readable(line))
    sys.stdout.flush()


class Reader:
    """All log files of a folder; each `read` gives what came since the last one, in the order of time."""

    def __init__(self, folder: Path, process: str | None, level: int) -> None:
        self._folder = folder
        self._process = process
        self._level = level
        self._offsets: dict[int, int] = {}
        """By inode: how far each file was read. A file that becomes the old one keeps its place."""

    def processes(self) -> list[str]:
        """Whose logs there are."""
        return sorted(path.name.removesuffix(".jsonl") for path in self._folder.glob("*.jsonl"))

    def read(self, tail: int | None = None) -> Iterator[str]:
        """New lines, oldest first; only the last `tail`, if that is given."""
        lines: list[tuple[float, str]] = []
        for path in sorted((*self._folder.glob("*.jsonl*"), *self._folder.glob("*.txt"))):
            if self._process is None or path.name.split(".")[0] == self._process:
                for line in self._new_lines(path):
                    time_s, level = _stamp(line)
                    if level >= self._level:
                        lines.append((time_s, line))
        lines.sort(key=lambda entry: entry[0])
        first = 0 if tail is None else max(0, len(lines) - tail)
        return (line for _, line in lines[first:])

    def _new_lines(self, path: Path) -> list[str]:
        try:
            with path.open("rb") as file:
                inode = path.stat().st_ino
                file.seek(self._offsets.get(inode, 0))
                data = file.read()
        except FileNotFoundError:  # the machine ended between the listing and the look
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offsets[inode] = self._offsets.get(inode, 0) + len(whole)
        return whole.decode("utf-8", "replace").splitlines()


def _stamp(line: str) -> tuple[float, int]:
    """Time and level (as an index of LEVELS) of a line; a line that is no log entry counts as new and important."""
    try:
        entry = json.loads(line)
        level = str(entry["level"]).lower()
        return float(entry["time_s"]), LEVELS.index(level) if level in LEVELS else len(LEVELS)
    except (ValueError, KeyError, TypeError):
        return time.time(), len(LEVELS)
