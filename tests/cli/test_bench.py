"""`hmmnet bench`'s table loses no figure, however narrow what it is printed on."""

from __future__ import annotations

import pytest

from hmmnet.bench.measurement import Goal, measured
from hmmnet.cli.bench import print_table

LONG = "migrate.bookkeeping_ns_per_page.262144"


@pytest.mark.parametrize("columns", ["20", "60", "80", "200"])
def test_no_figure_is_cut_short_in_a_pipe(columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line a figure, with its name, reference, ratio, goal and verdict whole."""
    monkeypatch.setenv("COLUMNS", columns)
    print_table([measured(LONG, 123456.7, "us", Goal(0.75, at_least=True), 100000.0, 0.8123)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].split() == [LONG, "1.235e+05", "us", "1e+05", "0.812", ">=", "0.75x", "met"]


def test_a_narrow_terminal_folds_names_and_keeps_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In 60 columns the name goes on in a second line; what was measured is whole."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    print_table([measured(LONG, 123.4, "us", Goal(0.75, at_least=True), 100.0, 0.8123)])
    out = capsys.readouterr().out
    assert "…" not in out
    for part in ("123.4 us", "100", "0.812", ">= 0.75x", "met"):
        assert part in out
    assert "".join(line.split()[0] for line in out.splitlines()[1:]) == LONG


def test_a_small_ratio_has_three_digits(capsys: pytest.CaptureFixture[str]) -> None:
    """Operations of the simulated world beside rounds of an empty loop: not 0.00."""
    print_table([measured("sim.operations_per_s", 5000.0, "1/s", None, 1.9e7, 5000.0 / 1.9e7)])
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "0.000263"
