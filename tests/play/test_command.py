"""``hmmnet play`` as a user runs it, on real processes."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from hmmnet.cli.play import driver_bugs_counted
from hmmnet.observe.logs import log_to, stop_logging
from hmmnet.play.compare import Outcome
from hmmnet.play.script import parse_scripts

SCRIPT = """\
=== one
open d0 0
mmap A 2
fill A 0 2 0x10
todev d0 A 0 2
sum A 0 2
--- recorded
1: open d0 0 => ok
2: mmap A 2 => ok
3: fill A 0 2 0x10 => ok
4: todev d0 A 0 2 => ok cpages=2 [u10 u11]
5: sum A 0 2 => [u10 u11]
KERNEL WARNING
=== two
mmap A 1
mmap M 1 thp
uffd A 0 1
read A 0 0
--- recorded
1: mmap A 1 => ok
2: mmap M 1 thp => ok
3: uffd A 0 1 => ok
4: read A 0 0 => BUS
"""


WARNED = """\
=== warned
open d0 0
mmap A 2
fill A 0 2 0x33
mprotect A 0 2 r
todev d0 A 0 2
dwrite d0 A 0 1 1
--- recorded
1: open d0 0 => ok
2: mmap A 2 => ok
3: fill A 0 2 0x33 => ok
4: mprotect A 0 2 r => ok
5: todev d0 A 0 2 => ok cpages=2 [u33 u34]
6: dwrite d0 A 0 1 1 => ERR EFAULT
KERNEL WARNING
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path: sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="hm") as folder:
        (Path(folder) / "good.traces").write_text(SCRIPT)
        (Path(folder) / "bad.traces").write_text(SCRIPT.replace("=> [u10 u11]", "=> [u10 u99]"))
        (Path(folder) / "typo.traces").write_text(SCRIPT.replace("todev d0 A", "todev d1 A"))
        yield Path(folder)


def play(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HMMNET_DIR": str(place / "run"), "COLUMNS": "100"}
    command = [sys.executable, "-m", "hmmnet", "play", *arguments]
    return subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=60, check=False)


def notes(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What it told beside the result, less the seed and how far it was: on a busy machine that comes now and then."""
    return [line for line in done.stderr.splitlines()[2:] if not re.match(r"\d+ of \d+ played", line)]


def test_identical(place: Path) -> None:
    """Exit code 0, and the verdict."""
    done = play(place, "good.traces", "--only", "one")
    assert done.returncode == 0
    assert "identical: the script answers as the recorded kernel did" in done.stdout


def test_what_kernels_warn_about_is_one_line(place: Path) -> None:
    """However often, and not a line of a log each: the script wants it."""
    (place / "warned.traces").write_text(WARNED + WARNED.replace("=== warned", "=== again"))
    done = play(place, "warned.traces", "--world", "sim")
    assert (done.returncode, "all 2 scripts" in done.stdout) == (0, True)
    assert notes(done) == [
        "drivers did 2 times what a kernel WARNs about, in 2 scripts whose recorded kernel WARNed",
    ]


def test_what_no_kernel_warned_about_is_shown(place: Path) -> None:
    """In full, with its script: it is a bug of ours, or of the script."""
    (place / "warned.traces").write_text(WARNED.replace("KERNEL WARNING\n", "") + WARNED.replace("=== warned", "=== again"))
    done = play(place, "warned.traces", "--world", "sim")
    assert done.returncode == 0
    shown, meant = notes(done)
    assert shown.startswith("warned.traces:1: warned: the recorded kernel did not WARN: driver bug on dmirror0, where a kernel WARNs: ")
    assert meant == "drivers did 1 time what a kernel WARNs about, in 1 script whose recorded kernel WARNed"


def test_driver_bugs_are_told_by_script(capsys: pytest.CaptureFixture[str]) -> None:
    """Each text once, with how often; what comes when no script runs is no script's."""
    (warned,), (other, _) = parse_scripts(WARNED, "w.traces"), parse_scripts(SCRIPT.replace("KERNEL WARNING\n", ""), "s.traces")
    log = logging.getLogger("hmmnet.tests")
    with driver_bugs_counted(Console(stderr=True)) as bugs:
        for script, texts in ((warned, "aab"), (other, "cac"), (warned, ""), (other, "")):
            for text in texts:
                log.warning("driver bug %s", text)
            bugs.on_outcome(Outcome(script, 0, 0, ()))
        log.warning("driver bug [late]")
    assert capsys.readouterr().err.splitlines() == [
        "s.traces:1: one: the recorded kernel did not WARN: driver bug c (2 times)",
        "s.traces:1: one: the recorded kernel did not WARN: driver bug a",
        "outside of any script: driver bug [late]",
        "drivers did 3 times what a kernel WARNs about, in 1 script whose recorded kernel WARNed",
    ]


def test_other_news_is_shown_where_nobody_else_hears_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine's log is somebody: what is in it is not on the terminal, too. Nothing of this is left on the logger."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logger, log = logging.getLogger("hmmnet"), logging.getLogger("hmmnet.tests")
    with driver_bugs_counted(Console(stderr=True)):
        log.warning("before")
        log.info("too little")
        handler = log_to(tmp_path, "host")
        log.warning("device gpu0 is gone")
        stop_logging(handler)
        log.warning("after")
    assert capsys.readouterr().err.splitlines() == ["before", "after"]
    assert '"device gpu0 is gone"' in handler.path.read_text()
    assert (logger.handlers, logger.propagate) == ([], True)


def test_a_difference_is_shown_and_counted(place: Path) -> None:
    """Exit code 1; script, line, recorded and got; for programs the same as JSON."""
    done = play(place, "bad.traces")
    assert done.returncode == 1
    for words in ("bad.traces:1", "5: sum A 0 2", "recorded  [u10 u99]", "got       [u10 u11]"):
        assert words in done.stdout
    done = play(place, "bad.traces", "good.traces", "--only", "one", "--json")
    out = json.loads(done.stdout)
    difference = {"script": "one", "file": "bad.traces", "line": 5, "operation": "sum A 0 2", "recorded": "[u10 u99]", "got": "[u10 u11]"}
    assert out == {"scripts": 2, "identical": 1, "lines": 10, "lines_equal": 9, "unsupported_ops": {}, "differences": [difference]}


def test_every_script_of_a_file_is_played(place: Path) -> None:
    """One after the other; all identical is exit code 0."""
    done = play(place, "good.traces", "--json")
    assert done.returncode == 0
    out = json.loads(done.stdout)
    assert (out["scripts"], out["identical"], out["lines"], out["lines_equal"]) == (2, 2, 9, 9)
    assert out["unsupported_ops"] == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.traces"], "missing.traces: cannot be read"),
        (["typo.traces"], "typo.traces:5: script 'one', 'todev d1 A 0 2': no device is called 'd1'; did you mean \"d0\""),
        (["good.traces", "--world", "unreal"], 'there is no "unreal"; did you mean "real"?'),
        (["good.traces", "--only", "onne"], "no script is called 'onne'; did you mean \"one\"?"),
        ([], "Missing argument"),
    ],
)
def test_bad_use(place: Path, arguments: list[str], words: str) -> None:
    """Exit code 2 and one line that names file, line, cause and mend."""
    done = play(place, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
