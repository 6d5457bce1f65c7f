"""The sweep: one fault at a time, everywhere."""

from __future__ import annotations

import pytest

from hmmnet.campaign.scenarios import SCENARIOS, scenario
from hmmnet.campaign.sweep import OUTCOMES, Pair, as_json, as_markdown, pairs, sweep, try_pair
from hmmnet.campaign.trial import run_program
from hmmnet.errors import HmmnetError

SAMPLE = 9
"""Every so-and-so-many-th pair of the points of migrations is run here; ``hmmnet sweep all`` runs all of them."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_are_well_without_faults(name: str) -> None:
    """No violation, nothing refused, nothing lost."""
    outcome = run_program(SCENARIOS[name]).outcome
    assert outcome.violations == []
    assert (outcome.refused, outcome.lost) == (0, 0)


@pytest.mark.parametrize("pair", [pair for pair in pairs() if pair.place.startswith(("migrate.", "home."))][::SAMPLE], ids=str)
def test_a_hit_does_no_harm(pair: Pair) -> None:
    """Whatever is hit in the middle of a migration, everything is well in the end."""
    for base in (SCENARIOS["tour"], SCENARIOS["mappings"]):
        assert try_pair(pair, base, 1).wrong == ""


@pytest.mark.parametrize("action", ["crash", "hang"])
def test_a_device_falls_while_the_host_does_its_own(action: str) -> None:
    """At a point that concerns no device one of them crashes or hangs; the host goes on."""
    found = try_pair(Pair("point", "hub.before_range_end", action), SCENARIOS["tour"], 1)
    assert found.hit
    assert found.wrong == ""


def test_a_sweep_ends_when_nothing_is_left() -> None:
    """nth = 1, 2, 3 ... as often as the point is reached; the next run goes by without a hit."""
    pair = Pair("point", "migrate.before_copy", "delay")
    table = sweep([SCENARIOS["mappings"]], chosen=[pair])
    assert table[pair].hits == sum(table[pair].outcomes.values()) > 0
    assert set(table[pair].outcomes) <= set(OUTCOMES)
    assert as_json(table)["coverage"] == 1.0
    assert "`migrate.before_copy`" in as_markdown(table)


def test_unknown_scenario() -> None:
    """Says which there are."""
    with pytest.raises(HmmnetError, match="there are tour"):
        scenario("detour")
