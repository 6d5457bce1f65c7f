"""``hmmnet replay`` shows the moment at which it went wrong, and marks it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hmmnet.cli import exit_code
from hmmnet.cli import replay as command
from tests.campaign.mutations import retry_check_skipped_by_the_device

REFUSED_SEED = 25
"""A seed at which this planted bug shows itself by a refused access of a device, before anything else goes wrong."""


def test_a_refused_access_is_shown_when_it_was_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And not when figures are summed up at the end: the DMA itself stands above the mark."""
    retry_check_skipped_by_the_device(monkeypatch)
    assert exit_code(["replay", str(REFUSED_SEED)]) == 1
    lines = capsys.readouterr().out.splitlines()
    told = re.compile(r"VIOLATION iommu: (at [0-9.]+ s: )dev\d used \d+ translations")
    ((at, when),) = [(i, match[1]) for i, line in enumerate(lines) if (match := told.match(line))]
    assert re.search(r" Dma(Read|Write) context=", lines[at - 1])
    assert "why='IommuFault" in lines[at + 1]
    assert lines[-1].startswith("iommu: " + when)


def test_a_crash_is_marked_and_has_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Behind the story that led to it: not only its last line."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("hmmnet.campaign.trial.converge", broken)
    assert exit_code(["replay", "0", "--faults", "none", "--operations", "5"]) == 1
    told = capsys.readouterr().out
    assert "\nVIOLATION crash: ZeroDivisionError: planted (test_replay.py:" in told
    assert "Traceback (most recent call last)" in told
    assert "in _live" in told
    assert 'raise ZeroDivisionError("planted")' in told


def test_the_first_of_several_is_marked() -> None:
    """Whoever complained first: the last lines are shown of a run without any."""
    from hmmnet.campaign.crew import Violation
    from hmmnet.campaign.draw import draw
    from hmmnet.campaign.trial import Verdict

    verdict = Verdict(draw(0, "none", 5), lines=[f"{i}.0 line" for i in range(100)])
    assert command.story(verdict, 4) == verdict.lines[-10:]
    verdict.outcome.violations += [Violation("late", "b", 90), Violation("early", "a", 50), Violation("nowhere", "c")]
    assert command.story(verdict, 3) == [*verdict.lines[47:50], "VIOLATION early: a", *verdict.lines[50:56]]


def test_what_is_run_can_be_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file gives the run of the seed; where it cannot be written nothing is run."""
    file = tmp_path / "small.json"
    assert exit_code(["replay", "7", "--operations", "20", "-o", str(file)]) == 0
    first = capsys.readouterr().out
    assert exit_code(["replay", str(file)]) == 0
    assert capsys.readouterr().out == first
    assert exit_code(["replay", "7", "-o", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert (out, "cannot be written" in error) == ("", True)
