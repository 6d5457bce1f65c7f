"""The wire's benchmark runs, in small: it gives the figures that it names. What they reach is for `hmmnet bench` to say, not for a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hmmnet.bench.wire import BENCHMARKS, Pair, control_under_bulk, round_trips, streams


@pytest.mark.parametrize(
    ("measure", "amounts"),
    [(round_trips, {"rounds": 2, "count": 20}), (streams, {"rounds": 2, "frames": 4}), (control_under_bulk, {"rounds": 2, "count": 20})],
)
def test_figures(measure: Callable[..., list[dict[str, Any]]], amounts: dict[str, int]) -> None:
    """Each function gives exactly the figures that the table lists for it, with value, reference and ratio."""
    figures = measure(**amounts)
    assert [figure["name"] for figure in figures] == [name for name, function in BENCHMARKS.items() if function is measure]
    for figure in figures:
        assert set(figure) == {"name", "value", "unit", "reference", "ratio", "goal", "met"}
        assert figure["value"] > 0
        assert figure["reference"] > 0
        assert figure["ratio"] > 0


def test_a_process_that_ends_is_an_error_and_no_hang(tmp_path: object, capfd: pytest.CaptureFixture[str]) -> None:
    """What it measures cannot be had; its own message is on stderr."""
    pair = Pair("nothing", str(tmp_path))
    with pytest.raises((RuntimeError, BrokenPipeError)):
        pair.ask("rtt", 1)
    pair.close()
    assert "nothing_near" in capfd.readouterr().err
