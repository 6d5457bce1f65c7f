"""The sweep: one fault at a time, everywhere; and COVERAGE.md, which says what came of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from hmmnet.campaign.coverage import FILE, as_json, as_markdown, document, from_json, lacking, read
from hmmnet.campaign.crew import Violation
from hmmnet.campaign.nemesis import GIVES_UP
from hmmnet.campaign.places import NOT_APPLICABLE, Pair, pairs, reason
from hmmnet.campaign.program import Hit
from hmmnet.campaign.scenarios import SCENARIOS, scenario
from hmmnet.campaign.sweep import NTH_MAX, OUTCOMES, Hits, alone, expected, sweep, try_all, try_pair
from hmmnet.campaign.trial import run_program
from hmmnet.campaign.words import CONTROL, FREEZE, UNREADABLE, places
from hmmnet.cli import exit_code
from hmmnet.cli.sweep import roughly
from hmmnet.errors import HmmnetError
from hmmnet.faults.network import BULK_WAYS
from hmmnet.faults.points import POINTS
from hmmnet.wire.messages import Body

SAMPLE = 13
"""Every so-and-so-many-th cell of the table is run again here; ``hmmnet sweep all`` runs all of them."""
TABLE = read(FILE.read_text())
BY_ITSELF = {
    "refusal": {"fail at session.hello"},
    "noise": {"loss"},
    "given_up": {"fail at device.before_ack"},
    "silence": {"hang"},
    "late": {"fail at device.copy_in"},
}
"""Scenarios that break something themselves."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_are_well_without_faults(name: str) -> None:
    """No violation; nothing refused or lost but by what the scenario itself breaks."""
    outcome = alone(SCENARIOS[name])
    assert outcome.violations == []
    if name in BY_ITSELF:
        assert BY_ITSELF[name] <= set(outcome.faults)
    else:
        assert (outcome.refused, outcome.lost) == (0, 0)


# --- COVERAGE.md --------------------------------------------------------------------------------------------------------------------


def test_the_table_has_every_pair_and_each_was_hit() -> None:
    """Every point of the registry and every message of the wire, by every fault that applies: 100 %. A new one has to be swept, too."""
    assert lacking(TABLE) == []
    assert not any("wrong" in outcomes for outcomes in TABLE.values())
    shown = {place for place, _ in TABLE}
    assert shown >= set(POINTS)
    assert {place for place in CONTROL if place not in shown} == {place for place, fault in NOT_APPLICABLE if place != "*" and fault == "*"}
    assert shown >= set(BULK_WAYS)


def test_places_are_the_registries() -> None:
    """No list of messages is kept beside the wire's own; what does not apply is something that there is."""
    assert {kind.__name__ for kind in get_args(Body)} <= set(places())
    assert {"BEAT", "GAP", "BYE", "BYE_ACK", "RESET"} <= set(places())
    assert {place for place, _ in NOT_APPLICABLE} <= {*places(), "*"}
    assert reason("Rate", "loss")
    assert not reason("Invalidate", "loss")


def test_the_legend_gives_every_reason() -> None:
    """What has no row is named below the table, with why."""
    text = FILE.read_text()
    for (place, _), why in NOT_APPLICABLE.items():
        assert place == "*" or f"- `{place}`: {why}." in text


def test_what_is_lacking_is_named() -> None:
    """A pair without a hit, and a cell of nothing."""
    cells = {key: outcomes for key, outcomes in TABLE.items() if key != ("home.fault", "crash")}
    assert lacking({**cells, ("home.fault", "flood"): {"same": 1}, ("GAP", "loss"): {}}) == [
        "GAP loss: not hit",
        "home.fault crash: not hit",
        "home.fault flood: there is no such pair",
    ]


def test_only_who_holds_an_only_copy_can_lose_it() -> None:
    """A device's death, or the end of its lease or session, may cost pages; an error, a delay or a message that is lost never does."""
    lost = {(place, fault) for (place, fault), outcomes in TABLE.items() if outcomes.get("lost")}
    assert {fault for place, fault in lost if place not in GIVES_UP} <= {"crash", FREEZE, "death", *UNREADABLE}


@pytest.mark.parametrize("pair", pairs()[::SAMPLE], ids=lambda pair: f"{pair.place} {pair.fault}")
def test_a_cell_is_what_comes_of_it(pair: Pair) -> None:
    """The first hit in the first scenario that has one, as the table is made: an outcome that the table has."""
    tried = try_all(pair, list(SCENARIOS.values()), 1, first_only=True)
    assert len(tried) == 1
    assert tried[0].found.wrong == ""
    assert tried[0].found.outcome in TABLE[pair.place, pair.fault]


# --- sweeping -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["home.fault", "process.exit"])
def test_a_freeze_outlasts_the_lease_and_a_hang_does_not(place: str) -> None:
    """The host waits for who hangs; who freezes is given up with its pages, also where the program would end before."""
    found = {fault: try_pair(Pair("point", place, fault), SCENARIOS["tour"], 1) for fault in ("hang", FREEZE)}
    assert {fault: (hits.hit, hits.outcome) for fault, hits in found.items()} == {"hang": (True, "same"), FREEZE: (True, "lost")}


def test_a_freeze_goes_on_when_another_hang_is_over() -> None:
    """Who is seen to after a moment is who hangs for a moment."""
    frozen = Pair("point", "migrate.after", FREEZE).program(SCENARIOS["tour"], 1)
    both = msgspec.structs.replace(frozen, hits=(*frozen.hits, Hit("hub.before_range_end", "hang", nth=1)))
    assert [run_program(program).outcome.lost > 0 for program in (frozen, both)] == [True, True]


@pytest.mark.parametrize("fault", ["loss", "delay", "reorder"])
def test_a_refusal_is_waited_for_though_its_stream_was_given_up_before(fault: str) -> None:
    """The bulk channel may be faster than the answer: who migrates hears why, not that a stream is over."""
    found = try_pair(Pair("message", "Failed", fault), SCENARIOS["late"], 1)
    assert (found.hit, found.wrong) == (True, "")


@pytest.mark.parametrize("action", ["crash", "hang", FREEZE])
def test_a_device_falls_while_the_host_does_its_own(action: str) -> None:
    """At a point that concerns no device one of them crashes, hangs or freezes; the host goes on."""
    found = try_pair(Pair("point", "hub.before_range_end", action), SCENARIOS["tour"], 1)
    assert found.hit
    assert found.wrong == ""


def test_a_crash_behind_a_shield_ends_the_device() -> None:
    """DMA for a job is shielded from whoever ends the job; a device that crashes in it is gone all the same, and the run ends."""
    found = try_pair(Pair("point", "device.mid_copy", "crash"), SCENARIOS["tour"], 1)
    assert (found.hit, found.wrong) == (True, "")


def test_a_sweep_ends_when_nothing_is_left() -> None:
    """nth = 1, 2, 3 ... as often as the point is reached; the next run goes by without a hit. On two processes it is the same."""
    chosen = [Pair("point", "migrate.before_copy", "delay"), Pair("message", "Migrate", "loss"), Pair("point", "host.alloc.huge", "fail")]
    base = SCENARIOS["mappings"]
    told: list[tuple[int, int, int]] = []
    table = sweep([base], chosen=chosen, on_done=lambda number, total, tried: told.append((number, total, len(tried))))
    assert [table[pair].hits for pair in chosen] == [alone(base).reached[pair.place] for pair in chosen]
    assert all(set(cell.outcomes) <= set(OUTCOMES) for cell in table.values())
    assert told == [(1, 3, table[chosen[0]].hits), (2, 3, table[chosen[1]].hits), (3, 3, 0)]
    assert as_json(table)["coverage"] == pytest.approx(2 / 3, abs=1e-3)
    assert as_markdown(sweep([base], chosen=chosen, jobs=2)) == as_markdown(table)


@pytest.mark.parametrize("first_only", [False, True])
def test_how_many_runs_it_will_be(first_only: bool) -> None:
    """Is known before: what a scenario comes to by itself."""
    chosen = [pair for pair in pairs() if pair.place in ("migrate.before_finalize", "migrate.after_entry") and pair.fault == "delay"]
    bases = [SCENARIOS["small"], SCENARIOS["exclusive"]]
    runs = sum(cell.hits for cell in sweep(bases, chosen=chosen, first_only=first_only).values())
    assert runs == expected(bases, chosen, NTH_MAX, first_only=first_only) > 0


def test_how_long_it_will_be_is_said_first(capsys: pytest.CaptureFixture[str]) -> None:
    """How many runs, and about how long; of a long one, how to have a shorter one. What is asked for with --json is as it was."""
    assert exit_code(["sweep", "small", "--only", "migrate.before_finalize", "--nth", "1", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["runs"] == 5
    assert re.match(r"5 pairs of place and fault in 1 scenario: at most 5 runs, roughly \d+ s with 1 job\n", told.err)
    assert [roughly(seconds) for seconds in (0.1, 59.0, 90.0, 10_000.0)] == ["1 s", "59 s", "2 min", "3 h"]


def test_a_document_is_read_back() -> None:
    """The table in it is the table that it was made of."""
    pair = Pair("message", "Migrate", "duplicate")
    table = sweep([SCENARIOS["mappings"]], chosen=[pair], nth_max=2)
    text = document(table, "mappings --nth 2")
    assert read(text) == {("Migrate", "duplicate"): {"same": 2}}
    assert "hmmnet sweep mappings --nth 2 -o FILE" in text


def test_pieces_make_one_table(tmp_path: Path) -> None:
    """Two sweeps that wrote JSON, merged: the sum, in the order of pairs; a file that is none is said in one line."""
    files = []
    for number, name in enumerate(("mappings", "files")):
        table = sweep([SCENARIOS[name]], chosen=[Pair("message", "Migrate", "loss")], nth_max=1)
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(as_json(table)))
    merged = from_json([json.loads(file.read_text()) for file in files])
    assert list(merged) == pairs()
    assert merged[Pair("message", "Migrate", "loss")].hits == 2
    output = tmp_path / "table.md"
    assert exit_code(["sweep", *(word for file in files for word in ("--merge", str(file))), "-o", str(output)]) == 0
    assert read(output.read_text())["Migrate", "loss"] == {"same": 2}
    assert exit_code(["sweep", "--merge", str(output)]) == 2


def test_a_program_in_a_file_is_swept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a scenario of the file's name: the same table as the built-in one that it was made of, and with nothing of it changed."""
    file = tmp_path / "mine.json"
    file.write_text(SCENARIOS["small"].text())
    options = ("--only", "migrate.before_finalize", "--nth", "2", "--json")
    assert exit_code(["sweep", str(file), *options]) == 0
    of_file = capsys.readouterr().out
    assert exit_code(["sweep", "small", *options]) == 0
    assert of_file == capsys.readouterr().out
    assert json.loads(of_file)["hit"] == 5


def test_what_a_sweep_finds_has_the_name_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In --json, and where it is told as it is found."""
    file = tmp_path / "mine.json"
    file.write_text(SCENARIOS["small"].text())
    monkeypatch.setattr("hmmnet.campaign.sweep.can_fork", lambda machine: False)
    monkeypatch.setattr(
        "hmmnet.campaign.sweep.try_pair", lambda pair, base, nth: Hits(nth == 1, "wrong" if nth == 1 else "same", "model: x")
    )
    assert exit_code(["sweep", str(file), "--only", "migrate.before_finalize", "--fault", "delay", "--json"]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["cells"][0]["wrong"] == ["mine nth=1: model: x"]
    assert "migrate.before_finalize delay, mine, nth=1: model: x\n" in told.err


def test_a_file_that_cannot_be_swept(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the place and the mend, and exit code 2: no program, one that goes wrong by itself, and a name of nothing."""

    def told(what: Path) -> str:
        assert exit_code(["sweep", str(what)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("hmmnet sweep: ")
        return err.removeprefix("hmmnet sweep: ").rstrip("\n")

    file = tmp_path / "mine.json"
    assert told(file).startswith(f'there is no scenario "{file}", nor such a file; there are tour, ')
    assert told(file).endswith('and all; "hmmnet replay SEED -o FILE" writes a file')
    file.write_text("{}")
    assert (
        told(file) == f"{file}: no program of a campaign: Object missing required field `seed`; hmmnet shrink writes the files wanted here"
    )
    assert told(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    file.write_text(SCENARIOS["small"].text())
    verdict = run_program(SCENARIOS["small"])
    verdict.outcome.violations.append(Violation("model", "a lie", 3))
    monkeypatch.setattr("hmmnet.campaign.trial.run_program", lambda program: verdict)
    mend = f'"hmmnet replay {file}" tells of it; a sweep wants a program in which all is well'
    assert told(file) == f"{file}: without a fault of the sweep: model: a lie; {mend}"


def test_unknown_scenario() -> None:
    """Says which there are."""
    with pytest.raises(HmmnetError, match="There are tour"):
        scenario("detour")
