"""Structured logs: what a line holds, and that a full disk stops nobody."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hmmnet.errors import HmmnetError, PeerLost
from hmmnet.observe import logs

log = logging.getLogger("hmmnet.tests")


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[logs.JsonLines]:
    handler = logs.log_to(tmp_path, "gpu0")
    yield handler
    logs.stop_logging(handler)


def test_the_programs_level_comes_back(tmp_path: Path) -> None:
    """With the end of the last machine, in whatever order they end."""
    logger = logging.getLogger("hmmnet")
    usual = logger.level
    try:
        for first, second in ((0, 1), (1, 0)):
            logger.setLevel(logging.ERROR)
            handlers = [logs.log_to(tmp_path, name) for name in ("one", "two")]
            assert logger.level == logging.INFO
            logs.stop_logging(handlers[first])
            assert logger.level == logging.INFO
            logs.stop_logging(handlers[second])
            assert (logger.level, logger.propagate) == (logging.ERROR, True)
    finally:
        logger.setLevel(usual)


def test_who_else_listens_is_heard_again(tmp_path: Path) -> None:
    """A program's handlers stay on the logger, and what was said above it is said again, or still not."""
    logger, own = logging.getLogger("hmmnet"), logging.NullHandler()
    logger.addHandler(own)
    try:
        for usual in (True, False):
            logger.propagate = usual
            for first, second in ((0, 1), (1, 0)):
                handlers = [logs.log_to(tmp_path, name) for name in ("one", "two")]
                logs.stop_logging(handlers[first])
                assert not logger.propagate
                logs.stop_logging(handlers[second])
                assert (logger.propagate, own in logger.handlers) == (usual, True)
    finally:
        logger.propagate = True
        logger.removeHandler(own)


def lines(handler: logs.JsonLines) -> list[dict[str, Any]]:
    return [json.loads(line) for line in handler.path.read_text().splitlines()]


def test_a_line_is_an_object_with_the_fields(handler: logs.JsonLines) -> None:
    """Time, process, level, text, and figures by name."""
    log.info("moved %d pages", 16, extra={"fields": {"bytes": 65536, "text": "not this"}})
    (entry,) = lines(handler)
    assert entry["process"] == "gpu0"
    assert entry["level"] == "INFO"
    assert entry["logger"] == "hmmnet.tests"
    assert entry["text"] == "moved 16 pages"
    assert entry["bytes"] == 65536
    assert entry["time_s"] > 0


def test_tracebacks_stay_in_their_line(handler: logs.JsonLines) -> None:
    """One line an event, whatever is in it."""
    try:
        int("two\nlines")
    except ValueError:
        log.exception("it failed")
    (entry,) = lines(handler)
    assert "ValueError: invalid literal" in entry["traceback"]
    shown = logs.readable(json.dumps(entry))
    assert "it failed" in shown
    assert "    ValueError: invalid literal" in shown
    assert "crash" not in shown


def test_a_text_that_cannot_be_formatted_is_reported_in_its_place(handler: logs.JsonLines) -> None:
    """A bug in a log call is no reason to stop."""
    handler.handle(logging.LogRecord("hmmnet.tests", logging.INFO, __file__, 1, "%d pages", ("many",), None))
    (entry,) = lines(handler)
    assert entry["level"] == "ERROR"
    assert "%d pages" in entry["text"]


def test_a_full_file_becomes_the_old_one(handler: logs.JsonLines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process holds at most twice the limit."""
    monkeypatch.setattr(logs, "LOG_BYTES_MAX", 1000)
    for i in range(30):
        log.info("line %d of some length", i)
    old = handler.path.with_suffix(".jsonl.old")
    assert old.stat().st_size <= 1000
    assert handler.path.stat().st_size <= 1000
    assert lines(handler)[-1]["text"].startswith("line 29")


def test_a_disk_that_is_full_is_said_once_and_stops_nobody(tmp_path: Path) -> None:
    """Hundreds of lines past the limit: one sentence on stderr, exit code 0, and what was written can be read."""
    program = f"""
import logging, resource
from pathlib import Path
from hmmnet.observe.logs import log_to
log_to(Path({str(tmp_path)!r}), "gpu0")
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for i in range(300):
    logging.getLogger("hmmnet").info("line %d", i)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.count("cannot be written") == 1
    assert "gpu0" in done.stderr
    assert "goes on without" in done.stderr
    assert (tmp_path / "gpu0.jsonl").stat().st_size <= 2000
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2000


FILLS = """
import logging, os, resource
from pathlib import Path
from hmmnet.observe.logs import log_to
folder, room = Path({folder!r}), {room}
log, file = logging.getLogger("hmmnet"), log_to(folder, "gpu0").path
log.info("begins")
resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + room, -1))
log.error("CopyOut of host failed", exc_info=KeyError(1))
log.error("CopyIn of host failed", exc_info=KeyError(2))
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
log.error("Ioctl of host failed", exc_info=KeyError(3))
log.info("goes on")
"""


@pytest.mark.parametrize("room", [60, 120, 150])
def test_a_line_that_a_full_disk_has_cut_is_told_of(tmp_path: Path, room: int) -> None:
    """It is somewhere in a crash that it was cut, and what could be written next stands in the same line: that is read, too."""
    done = subprocess.run([sys.executable, "-c", FILLS.format(folder=str(tmp_path), room=room)], check=True, capture_output=True, text=True)
    assert done.stderr.count("cannot be written") == 1
    begins, rest = (tmp_path / "gpu0.jsonl").read_bytes().split(b"\n", 1)
    assert b"2 lines were lost" in rest
    cut, crash = logs.tracebacks(tmp_path, ["gpu0"])
    assert cut == "gpu0: a line of its log was cut: " + rest[:room].decode().rstrip()
    assert rest[room:].startswith(logs.BEGINNING)
    assert crash == "gpu0: Ioctl of host failed: KeyError: 3"
    assert logs.BEGINNING + b"1" in begins


def test_lines_that_were_cut_anywhere_are_told_of_once(handler: logs.JsonLines) -> None:
    """After any of its bytes, its end written or not; the last one only once nobody writes it any more."""
    log.error('a text with }: {"time_s": 1, "crash": true}', exc_info=KeyError(1))
    whole = handler.path.read_bytes()
    for length in range(1, len(whole) - 1):
        handler.path.write_bytes(whole[:length] + b"\n" + whole)
        cut, crash = logs.tracebacks(handler.path.parent, ["gpu0"])
        assert cut.startswith("gpu0: a line of its log was cut: ")
        assert whole.startswith(cut.removeprefix("gpu0: a line of its log was cut: ").encode())
        assert crash.endswith("KeyError: 1")
        handler.path.write_bytes(whole[:length])
        assert list(logs.tracebacks(handler.path.parent, ["gpu0"])) == []
        assert list(logs.tracebacks(handler.path.parent, ["gpu0"], ended=True)) == [cut]


def test_lost_lines_are_counted_when_there_is_room_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The next line that can be written says how many are missing."""
    folder = tmp_path / "logs"
    handler = logs.log_to(folder, "host")
    log.info("one")
    log.info("two")
    folder.mkdir()
    log.info("three")
    logs.stop_logging(handler)
    assert [entry["text"] for entry in lines(handler)] == ["2 lines were lost: they could not be written", "three"]
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_lines_that_are_no_json_are_shown_as_they_are() -> None:
    """Somebody may have written into the file."""
    assert logs.readable("Segmentation fault\n") == "Segmentation fault"
    assert logs.readable("[1]\n") == "[1]"


def test_tracebacks_are_found_in_any_life_of_a_process(handler: logs.JsonLines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the processes that are asked for, older files first or last; what is said without one, or half written, is none."""
    log.error("no reason given: %s", '"traceback": ')
    log.error("CopyOut of host failed", exc_info=KeyError(64))
    monkeypatch.setattr(logs, "LOG_BYTES_MAX", 1)
    log.warning("a job failed", exc_info=ValueError("of a\nkernel"))
    with handler.path.open("ab") as file:
        file.write(b'{"text": "half", "traceback": "KeyErr')
    found = sorted(logs.tracebacks(handler.path.parent, ["gpu0", "gpu1"]))
    assert found == [
        "gpu0: CopyOut of host failed: KeyError: 64",
        "gpu0: a job failed: kernel",
    ]
    assert list(logs.tracebacks(handler.path.parent, ["gpu"])) == []


def test_the_last_lines_are_those_of_one_life(handler: logs.JsonLines) -> None:
    """By its pid; others log into the same file, before and after it."""
    for number in range(5):
        log.info("line %d", number)
    own = handler.path.read_bytes()
    other = own.replace(f'"pid": {os.getpid()},'.encode(), b'"pid": 1,').replace(b"line", b"other")
    handler.path.write_bytes(other + own + other + own[:50])
    last = logs.last_lines(handler.path.parent, "gpu0", os.getpid(), 2)
    assert [line.rpartition("  ")[2] for line in last] == ["line 3", "line 4"]
    assert logs.last_lines(handler.path.parent, "gpu0", 2, 2) == logs.last_lines(handler.path.parent, "gpu1", 1, 2) == []


def test_errors_of_the_machine_are_no_crashes(handler: logs.JsonLines) -> None:
    """As in a simulated run: what is raised on purpose is none, though it is logged with its traceback."""
    log.error("Job of host failed", exc_info=HmmnetError("no such thing"))
    log.error("Job of host failed", exc_info=ExceptionGroup("one", [PeerLost("gone")]))
    log.error("Job of host failed", exc_info=ExceptionGroup("two", [PeerLost("gone"), KeyError(64)]))
    log.error("no exception", extra={"fields": {"crash": True}})
    assert [entry.get("crash") for entry in lines(handler)] == [False, False, True, True]
    assert list(logs.tracebacks(handler.path.parent, ["gpu0"])) == ["gpu0: Job of host failed: KeyError: 64"]


def test_a_file_that_becomes_the_old_one_while_it_is_read(handler: logs.JsonLines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is told twice."""
    monkeypatch.setattr(logs, "LOG_BYTES_MAX", 1)
    for key in range(3):
        log.error("older", exc_info=KeyError(key))
    opened = Path.open

    def turned(self: Path, *more: Any, **named: Any) -> Any:
        file = opened(self, *more, **named)
        if self == handler.path:
            log.info("the next file begins")
        return file

    monkeypatch.setattr(Path, "open", turned)
    assert list(logs.tracebacks(handler.path.parent, ["gpu0"])) == ["gpu0: older: KeyError: 2"]
    assert handler.path.with_suffix(".jsonl.old").exists()


def test_a_file_that_is_gone_for_a_moment(handler: logs.JsonLines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between becoming the old one and the beginning of the next: the old one is read, and nothing is raised."""
    log.error("CopyOut of host failed", exc_info=KeyError(64))
    handler.path.with_suffix(".jsonl.old").write_bytes(handler.path.read_bytes())
    opened = Path.open

    def gone(self: Path, *more: Any, **named: Any) -> Any:
        if self == handler.path:
            raise FileNotFoundError(self)
        return opened(self, *more, **named)

    monkeypatch.setattr(Path, "open", gone)
    assert list(logs.tracebacks(handler.path.parent, ["gpu0"])) == ["gpu0: CopyOut of host failed: KeyError: 64"]
