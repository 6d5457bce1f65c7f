"""Structured logs: one JSON object a line, one file a process, written so that a full disk cannot stop a machine.

Everybody logs through the standard `logging` (``logging.getLogger("hmmnet.ROOM")``); ``extra={"fields": {...}}`` adds figures by name. A
line holds
``time_s`` (Unix time), ``process``, ``pid``, ``level``, ``logger``, ``text``, the fields, and where there is an exception its ``traceback``
and whether it is a ``crash`` (`hmmnet.errors.is_crash`).

What cannot be written is dropped: the first failure is said on stderr, once, with its cause; the next line that can be written says how
many
were lost. A file has a limit; past it, it becomes the ``.old`` one and a new one begins, so that a process holds at most twice the limit.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hmmnet.errors import is_crash

LOG_BYTES_MAX = 16 << 20
"""Enough for a day of a talkative process; two files of it for each of 64 devices still fit a small disk."""
TEXT_MAX = 16 << 10
"""Characters of one text or traceback; longer ones are cut."""
CUT_SHOWN = 500
"""Bytes that are told of a line that was cut."""
BEGINNING = b'{"time_s": '
"""What each line begins with, and nothing in it holds: quotes of a text are escaped."""
SUFFIX = ".jsonl"
OLD = ".old"
ROOT = "hmmnet"


class JsonLines(logging.Handler):
    """Appends records to a file; never raises and never stops the process for what it cannot write."""

    def __init__(self, path: Path, process: str) -> None:
        super().__init__()
        self.path = path
        self.lost = 0
        self.level_before = logging.NOTSET
        """Of the logger, before this handler was put on it."""
        self.propagate_before = True
        """Likewise: whether the handlers above it hear what it does."""
        self._process = process
        self._said = False
        self._file: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        try:
            line = self._line(record)
        except Exception as error:  # noqa: BLE001 - a text that cannot be formatted is a bug of the caller; it is logged instead of the text
            line = self._encode(
                {
                    "time_s": record.created,
                    "level": "ERROR",
                    "logger": record.name,
                    "text": f"log text {record.msg!r} of {record.pathname}:{record.lineno}: {error!r}",
                }
            )
        try:
            self._write(line)
        except OSError as error:
            self._fail(error)

    def _line(self, record: logging.LogRecord) -> bytes:
        entry: dict[str, Any] = {
            "time_s": round(record.created, 6),
            "level": record.levelname,
            "logger": record.name,
            "text": record.getMessage()[:TEXT_MAX],
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            entry.update({name: value for name, value in fields.items() if name not in entry})
        if record.exc_info and record.exc_info[1] is not None:
            entry["crash"] = is_crash(record.exc_info[1])
            entry["traceback"] = logging.Formatter().formatException(record.exc_info)[-TEXT_MAX:]
        return self._encode(entry)

    def _encode(self, entry: Mapping[str, Any]) -> bytes:
        whole = {"time_s": entry["time_s"], "process": self._process, "pid": os.getpid(), **entry}
        return json.dumps(whole, default=str, ensure_ascii=False).encode("utf-8", "replace") + b"\n"

    def _write(self, line: bytes) -> None:
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        elif os.fstat(self._file).st_size + len(line) > LOG_BYTES_MAX:
            os.close(self._file)
            self._file = None
            self.path.replace(self.path.with_suffix(self.path.suffix + OLD))
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self.lost:
            lost, self.lost = self.lost, 0
            try:
                self._put(
                    self._encode(
                        {
                            "time_s": time.time(),
                            "level": "WARNING",
                            "logger": __name__,
                            "text": f"{lost} lines were lost: they could not be written",
                        }
                    )
                )
            except OSError:
                self.lost = lost
                raise
        self._put(line)

    def _put(self, line: bytes) -> None:
        assert self._file is not None
        written = os.write(self._file, line)
        if written < len(line):  # cut by a full disk: end the line if that is possible; it counts as lost, and who reads says so
            os.write(self._file, b"\n")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _fail(self, error: OSError) -> None:
        self.lost += 1
        if not self._said:
            self._said = True
            with contextlib.suppress(OSError, ValueError):
                print(
                    f"hmmnet: {self._process}: the log cannot be written: {self.path}: {error.strerror}; the machine goes on without",
                    file=sys.stderr,
                )

    def close(self) -> None:
        """See `logging.Handler.close`."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        super().close()


def log_to(folder: Path, process: str, level: int = logging.INFO) -> JsonLines:
    """Send this process's ``hmmnet`` logs to ``folder/PROCESS.jsonl``; the handler, to be taken off again with `stop_logging`."""
    handler = JsonLines(folder / (process + SUFFIX), process)
    logger = logging.getLogger(ROOT)
    handler.level_before, handler.propagate_before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(min(level, logger.level) if logger.level else level)
    logger.propagate = False
    return handler


def stop_logging(handler: JsonLines) -> None:
    """Take a handler of `log_to` off; with the last one the logger is again as the program had set it."""
    logger = logging.getLogger(ROOT)
    files = [other for other in logger.handlers if isinstance(other, JsonLines)]
    if files == [handler]:
        logger.setLevel(handler.level_before)
        logger.propagate = handler.propagate_before
    elif files[:1] == [handler]:
        files[1].level_before, files[1].propagate_before = handler.level_before, handler.propagate_before  # it saw ours, not the program's
    logger.removeHandler(handler)
    handler.close()


def _time_of_day(time_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time_s)) + f".{int(time_s * 1000) % 1000:03d}"


def readable(line: str) -> str:
    """A log line as a person reads it; a line that is no JSON object comes as it is."""
    try:
        entry = json.loads(line)
    except ValueError:
        return line.rstrip("\n")
    if not isinstance(entry, dict):
        return line.rstrip("\n")
    known = {"time_s", "process", "pid", "level", "logger", "text", "crash", "traceback"}
    fields = " ".join(f"{name}={value}" for name, value in entry.items() if name not in known)
    level = str(entry.get("level", "")).lower()
    head = f"{_time_of_day(float(entry.get('time_s', 0)))}  {entry.get('process', '?'):<8}  {level:<7}  {entry.get('text', '')}"
    if fields:
        head += f"  [{fields}]"
    trace = entry.get("traceback")
    return head if not trace else head + "\n" + "\n".join("    " + row for row in str(trace).splitlines())


def tracebacks(folder: Path, processes: Collection[str], *, ended: bool = False, rows: int = 1) -> Iterator[str]:
    """What crashed (`hmmnet.errors.is_crash`) in any life of some processes, as their logs in `folder` tell: the process, what it was
    about, the last `rows` lines of each traceback.

    A line that was cut, by a full disk or the end of its process, may have told of a crash: it is told of, too. One that is just being
    written is left out, unless the processes have `ended`.
    """
    for name in processes:
        for line in _lines(folder / (name + SUFFIX)):
            begin = max(line.rfind(BEGINNING), 0)  # what was cut has no end of its own where there was no room for that either
            entry = _entry(line[begin:])
            cut = line[:begin] if entry is not None else line if ended or line.endswith(b"\n") else b""
            if cut:
                yield f"{name}: a line of its log was cut: {cut[:CUT_SHOWN].decode(errors='replace').rstrip()}"
            if entry is not None and entry.get("crash") is True and "traceback" in entry:
                yield f"{name}: {entry.get('text', '')}: {_last_rows(entry['traceback'], rows)}"


def last_lines(folder: Path, process: str, pid: int, count: int) -> list[str]:
    """The last `count` lines that one life of a process has logged, as a person reads them."""
    own = [line for line in _lines(folder / (process + SUFFIX)) if (entry := _entry(line)) is not None and entry.get("pid") == pid]
    return [readable(line.decode()) for line in own[-count:]]


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None for one that is not whole."""
    if not line.endswith(b"}\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _last_rows(traceback: str, count: int) -> str:
    """The last lines of a traceback, of a group without the frame around it, and without the marks below what is meant."""
    rows = [row.strip(" |") for row in traceback.splitlines() if row.strip(" |+-^~")]
    return " | ".join(rows[-count:])


def _lines(path: Path) -> list[bytes]:
    """What a process has logged, the old file first. One may become the other meanwhile: nothing is read twice, and none may be there."""
    with contextlib.ExitStack() as stack:
        files = []
        for place in (path, path.with_suffix(path.suffix + OLD)):
            with contextlib.suppress(FileNotFoundError):
                files.append(stack.enter_context(place.open("rb")))
        if len({(status.st_dev, status.st_ino) for status in (os.fstat(file.fileno()) for file in files)}) < len(files):
            files.pop()
        return [line for file in reversed(files) for line in file]
