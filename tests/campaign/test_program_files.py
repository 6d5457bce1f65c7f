"""Files of programs: what campaigns keep is read again, and of anything else it is said what is wrong, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hmmnet.campaign.draw import MIXES, draw
from hmmnet.campaign.places import pairs
from hmmnet.campaign.program import read
from hmmnet.campaign.scenarios import SCENARIOS
from hmmnet.cli import exit_code


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ('[[fault]]\nkind = "loss"\n', "", "a plan of faults, which says nothing of the work (hmmnet run --faults takes plans)"),
        ('[[device]]\nname = "gpu0"\n', "", "a topology, and no program of a campaign"),
        ("[1]", "", "no program of a campaign: Expected `object`, got `array`"),
        ('{"zzz":' + "[" * 100_000, "", "no program of a campaign: nested too deeply"),
        ("a = " + "[" * 100_000, "", "no program of a campaign: JSON is malformed"),
        (None, "--operations 3", "--operations means nothing with a file, which has its own"),
        (None, "--mix none --devices 2", "--faults, --devices mean nothing with a file"),
    ],
)
@pytest.mark.parametrize("command", ["replay", "shrink"])
def test_a_file_that_is_not_what_is_wanted(
    command: str, text: str | None, options: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said what it is; and which options a file has no use for."""
    file = tmp_path / "given"
    file.write_text(draw(0, "none", 5).text() if text is None else text)
    own = ["-o", str(tmp_path / "short.json")] if command == "shrink" else []
    assert exit_code([command, str(file), *own, *options.split()]) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_a_story_of_one_actor_has_no_plural(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor has one of one operation."""
    file = tmp_path / "one.json"
    program = draw(0, "none", 5)
    file.write_text(msgspec.structs.replace(program, actors=1, steps=(msgspec.structs.replace(program.steps[0], actor=0),)).text())
    assert exit_code(["replay", str(file)]) == 0
    assert "1 operation of 1 actor, digest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"steps": [{"actor": 0, "kind": "load"}, {"actor": 0, "kind": "lode"}]},
            'steps[1].kind: there is no "lode"; did you mean "load"?',
        ),
        ({"regions": [{"kind": "anon", "pages": 1}, {"kind": "stack", "pages": 1}]}, 'regions[1].kind: there is no "stack"'),
        ({"harms": [{"at": 1, "kind": "flood"}]}, 'harms[0].kind: there is no "flood"'),
        ({"harms": [{"at": 1, "kind": "message", "message": "Migrat"}]}, 'harms[0].message: there is no "Migrat"; did you mean "Migrate"?'),
        ({"hits": [{"point": "home.falt", "action": "fail"}]}, 'hits[0].point: there is no "home.falt"; did you mean "home.fault"?'),
        ({"hits": [{"point": "home.fault", "action": "explode"}]}, 'hits[0].action: there is no "explode"'),
        ({"steps": [{"actor": 0}]}, "steps[0]: object missing required field `kind`"),
        ({"steps": [{"actor": 0, "kind": "migrate", "choice": "hole"}]}, 'steps[0].choice: there is no "hole"; did you mean "whole"?'),
        ({"steps": [{"actor": 0, "kind": "protect", "choice": "zz"}]}, 'steps[0].choice: there is no "zz"; there are none, r, rw\n'),
        ({"steps": [{"actor": 0, "kind": "load", "choice": "x"}]}, 'steps[0].choice: there is no "x"; there are none\n'),
        ({"steps": [{"actor": 9, "kind": "load"}]}, "steps[0].actor: there is no actor 9; there are 6 actors, from 0 on"),
        ({"steps": [{"actor": 0, "kind": "load", "count": -1}]}, "steps[0].count: expected `int` >= 1"),
        ({"hits": [{"point": "home.fault", "action": "call", "nth": 1}]}, 'hits[0].action: there is no "call"; there are crash, delay'),
        ({"hits": [{"point": "home.fault", "action": "fail", "nth": -1}]}, "hits[0].nth: expected `int` >= 0"),
        ({"hits": [{"point": "home.fault", "action": "fail", "probability": 7.0}]}, "hits[0].probability: expected `float` <= 1.0"),
        ({"harms": [{"at": 0, "kind": "hang", "seconds": -1.0}]}, "harms[0].seconds: expected `float` >= 0.0"),
        ({"planned": [{"at": -5, "fault": '[[fault]]\nkind = "loss"\n'}]}, "planned[0].at: expected `int` >= 0"),
        ({"planned": [{"at": 5, "fault": '[[fault]]\nkind = "los"\n'}]}, 'planned[0].fault:2: fault 1: kind: no fault is called "los"'),
        ({"faults": ["zzz"]}, "faults[0]:1: no valid TOML"),
        ({"faults": ['[[fault]]\nkind = "disk.slow"\n']}, 'faults[0]: no campaign has the fault "disk.slow": a simulated machine'),
        ({"machine": "x = "}, "machine:1: no valid TOML"),
        ({"machine": '[[memory]]\nname = "node0"\nsize = "4 MiB"\n'}, "machine: no device; write [[device]]"),
        ({"regions": []}, "regions: expected `array` of length >= 1"),
        ({"regions": [{"kind": "anon", "pages": 0}]}, "regions[0].pages: expected `int` >= 1"),
        ({"regions": [{"kind": "anon", "pages": 10**12}]}, "regions[0].pages: expected `int` <= 1024"),
        ({"regions": [{"kind": "huge", "pages": 8}]}, "regions[0].pages: 8 of a huge page; at most 7 are used"),
        ({"actors": 0}, "actors: expected `int` >= 1"),
        ({"actors": 10**9}, "actors: expected `int` <= 1024"),
        ({"victims": 100_000}, "victims: expected `int` <= 64"),
        ({"limit_pages": -1}, "limit_pages: expected `int` >= 0"),
        ({"seed": -3}, "seed: expected `int` >= 0"),
        ({"step": []}, 'there is no key "step", did you mean "steps"?'),
        ({"format": 2, "step": []}, "format 2; this hmmnet reads format 1"),
    ],
)
@pytest.mark.parametrize("command", ["replay", "shrink"])
def test_a_file_with_what_cannot_be(
    command: str, changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the file, the place in it, what is wrong, and what was meant; nothing is run."""
    file = tmp_path / "typo.json"
    file.write_text(json.dumps(msgspec.to_builtins(draw(0, "none", 5)) | changes))
    assert exit_code([command, str(file), *(["-o", str(tmp_path / "short.json")] if command == "shrink" else [])]) == 2
    told = capsys.readouterr().err
    assert str(file) in told
    assert words in told
    assert told.count("\n") == 1


def test_what_is_drawn_and_swept_can_be_read(tmp_path: Path) -> None:
    """Every word that programs of ours use is known."""
    file = tmp_path / "one.json"
    swept = [pair.program(base, 1) for base in SCENARIOS.values() for pair in pairs()[::7]]
    for program in (*(draw(seed, mix) for mix in MIXES for seed in range(10)), *swept):
        file.write_text(program.text())
        assert read(file) == program
