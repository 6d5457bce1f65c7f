"""Every bug shows under the driver that has it and not under the one that has it mended; the oracle is the scenario, which knows neither.

::

    scenario --- commands, jobs, system calls ---> host --- gpu0, gpu1: bug:NAME:buggy, or bug:NAME:fixed
"""

from __future__ import annotations

import json

import pytest

from hmmnet.bugs import BUGS, KINDS, Bug, Kind, Trial, try_bug
from hmmnet.cli import exit_code
from hmmnet.devices.bugs import MODELS
from hmmnet.devices.models import load_model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUGS)
def test_a_bug_shows_where_it_is_and_nowhere_else(name: str, kind: Kind) -> None:
    """Replay one with ``hmmnet bugs NAME --seed SEED``."""
    trial = try_bug(BUGS[name], kind)
    assert trial.as_told, f"{name} {kind}, seed {trial.seed}: {trial.found or 'nothing was found'}"


def test_a_trial_repeats() -> None:
    """One seed, one finding, to the letter."""
    bug = BUGS["read-retry-skipped"]
    first = try_bug(bug, "buggy")
    assert try_bug(bug, "buggy", first.seed) == first


def test_every_bug_has_two_drivers() -> None:
    """And no driver is there for nothing."""
    assert set(MODELS) == {f"bug:{name}:{kind}" for name in BUGS for kind in KINDS}
    for model in MODELS:
        assert load_model(model)
    assert len(BUGS) >= 10


def test_a_trial_that_is_not_as_told() -> None:
    """A bug that hides, and a mended driver that fails."""
    assert not Trial("x", "buggy", "", 0).as_told
    assert not Trial("x", "fixed", "something", 0).as_told


def test_the_command_lists_tells_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """For a person and for a program."""
    assert exit_code(["bugs", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(BUGS)
    assert exit_code(["bugs"]) == 0
    assert all(name in capsys.readouterr().out for name in ["driver-lock-missing"])
    assert exit_code(["bugs", "owner-not-compared"]) == 0
    told = capsys.readouterr()
    assert "seen in callbacks" in told.out
    assert "2 of 2 runs came out as told" in told.out
    assert told.err == ""
    assert exit_code(["bugs", "owner-not-compared", "unregister-without-memory", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["kind"], bool(row["found"]), row["as_told"]) for row in rows] == [("buggy", True, True), ("fixed", False, True)] * 2


def test_an_unknown_bug_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """With what was meant."""
    assert exit_code(["bugs", "owner-not-compare"]) == 2
    assert 'did you mean "owner-not-compared"?' in capsys.readouterr().err


def test_a_bug_that_does_not_show_is_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's exit code says so."""
    monkeypatch.setattr("hmmnet.bugs.try_bug", lambda bug, kind, seed: Trial(bug.name, kind, "", 0))
    assert exit_code(["bugs", "owner-not-compared"]) == 1
    assert "NOT AS TOLD" in capsys.readouterr().out


def test_a_bug_that_a_seed_does_not_show_names_those_that_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the seeds that it is tried with; where no seed would, none is named."""

    def tried(bug: Bug, kind: Kind, seed: int | None = None) -> Trial:
        return Trial(bug.name, kind, "seen" if kind == "buggy" and seed in {2, 5} else "", seed or 0)

    monkeypatch.setattr("hmmnet.bugs.try_bug", tried)
    many = next(bug.name for bug in BUGS.values() if bug.seeds > 5)
    assert exit_code(["bugs", many, "--seed", "0"]) == 1
    assert "it does with --seed 2 or 5 " in " ".join(capsys.readouterr().out.split())
    assert exit_code(["bugs", "owner-not-compared", "--seed", "0"]) == 1
    assert "it does with" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"), [("--seed 3", "name one, or write --all"), ("--all owner-not-compared", "leave one of both out")]
)
def test_an_argument_that_would_be_passed_over_is_refused(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is run."""
    assert exit_code(["bugs", *arguments.split()]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert words in told.err
