"""The figures of the simulated world, on few and short programs."""

from __future__ import annotations

import pytest

from hmmnet.bench import sim
from hmmnet.campaign.draw import OPERATIONS
from hmmnet.errors import HmmnetError


def test_long_and_standard_seeds_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim, "LONG_OPERATIONS", 300)
    found = {one.name: one for one in sim.measure(seeds=2, long_seeds=1)}
    assert list(found) == ["sim.operations_per_s", f"sim.operations_per_s.{OPERATIONS}", "sim.seed_ms"]
    assert found["sim.operations_per_s"].goal == ">= 3000"
    assert found[f"sim.operations_per_s.{OPERATIONS}"].goal == ""
    assert all(one.value > 0 and one.reference and one.ratio for one in found.values())


def test_lives_that_go_wrong_are_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not nought operations a second: whoever measures hears what is wrong."""

    def nowhere() -> None:
        raise HmmnetError('no host "modelled" is installed')

    monkeypatch.setattr("hmmnet.sim.machine._host", nowhere)
    with pytest.raises(HmmnetError, match=r'^seed 0 of 200 operations: .*no host "modelled" is installed'):
        sim.measure(seeds=1, long_seeds=0)


def test_a_rate_is_operations_over_seconds() -> None:
    lives = sim._Lives(ours=[1.0, 3.0], loops=[0.5, 0.5], operations=400)
    found = sim._rate("rate", lives, sim.OPERATIONS_GOAL)
    assert (found.value, found.met) == (100.0, False)
