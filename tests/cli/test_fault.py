"""``hmmnet fault``: what can be looked up, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import hmmnet
from hmmnet.cli import exit_code
from hmmnet.errors import WrongUse
from hmmnet.faults import KINDS, POINTS


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that succeeds prints."""
    assert exit_code(["fault", *words]) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no terminal has no columns; pytest-xdist says that it had."""
    monkeypatch.delenv("COLUMNS", raising=False)


def test_kinds_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, or those that are asked for by name or family; times are seconds."""
    every: list[dict[str, Any]] = json.loads(told(["kinds", "--json"], capsys))
    assert [one["name"] for one in every] == list(KINDS)
    some: list[dict[str, Any]] = json.loads(told(["kinds", "copy.slow", "clocks", "--json"], capsys))
    assert [one["name"] for one in some] == ["copy.slow", "clock.jump", "clock.skew"]
    direction, latency, _ = some[0]["parameters"]
    assert direction["choices"] == ["both", "to_device", "to_host"]
    assert latency == {"name": "latency", "form": "time", "what": "for each chunk", "default": 0.001}


def test_kinds_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """Times have their units, and what every kind has is there, with how it counts."""
    text = told(["kinds", "copy.slow", "crash"], capsys)
    assert "for each chunk (default 1 ms)" in text
    assert "at most so much more (default 0 s)" in text
    assert "times=1 is once in each" in text
    assert "copy.stall" not in text


def test_kinds_name_what_a_parameter_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    """Of very many names how many there are."""
    text = told(["kinds", "loss", "copy.corrupt", "process.madvise"], capsys)
    assert "which messages: any, control, bulk (default any)" in text
    assert "which copies: both, to_device, to_host (default both)" in text
    assert "halves swapped: bit, burst, swap (default bit)" in text
    assert "NOHUGEPAGE" in text
    messages = next(one for one in KINDS["loss"].parameters if one.name == "message")
    assert f"such as Invalidate; `--json` has all {len(messages.choices)}" in text


@pytest.mark.parametrize("words", [["fault", "kinds"], ["fault", "points"], ["selftest", "--list"]])
def test_lists_fit_a_terminal(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eighty columns; in a pipe each entry is one line."""
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_code(words) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80
    monkeypatch.delenv("COLUMNS")
    assert exit_code(words) == 0
    wide = capsys.readouterr().out
    assert wide.split() == narrow.split()
    assert max(map(len, wide.splitlines())) > 80


def test_the_help_says_what_toxics_are_given_in(capsys: pytest.CaptureFixture[str]) -> None:
    """Times, and parts."""
    assert "Bandwidth is the part of it that is left (10% or 0.1)" in " ".join(told(["add", "--help"], capsys).split())


def test_kinds_say_which_take_controls(capsys: pytest.CaptureFixture[str]) -> None:
    """For people where one does not, and why; for programs of each."""
    chosen = ["loss", "link.slow", "process.fork", "crash"]
    lines = [line for line in told(["kinds", *chosen], capsys).splitlines() if line.startswith("    controls ")]
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "none: it lasts, and has no occurrences to choose from",
        "only with a point; without one it happens once, as it is added",
        "none: it happens once, as it is added",
    ]
    every: list[dict[str, Any]] = json.loads(told(["kinds", *chosen, "--json"], capsys))
    assert {one["name"]: one["controls"] for one in every} == dict(zip(chosen, ["always", "never", "with point", "never"], strict=True))


def test_kinds_say_which_can_be_narrowed(capsys: pytest.CaptureFixture[str]) -> None:
    """To processes and addresses: for people where not always, and why; for programs of each."""
    chosen = ["loss", "link.slow", "process.exit", "invalidate.late"]
    said = ("    on,", "    process,", "    range,")
    lines = [line.split(maxsplit=1) for line in told(["kinds", *chosen], capsys).splitlines() if line.startswith(said)]
    assert lines[:3] == [
        ["process,", "range        only with message=Invalidate"],
        ["process,", "range        none: it happens to a whole link"],
        ["on,", "range             only with a point that tells it (`hmmnet fault points`)"],
    ]
    every: list[dict[str, Any]] = json.loads(told(["kinds", *chosen, "--json"], capsys))
    assert {one["name"]: list(one["narrowed_by"].values()) for one in every} == {
        "loss": ["always", "some", "some"],
        "link.slow": ["always", "never", "never"],
        "process.exit": ["some", "always", "some"],
        "invalidate.late": ["always", "always", "always"],
    }
    text = told(["points"], capsys)
    assert "; tells process, range, event" in text
    assert "; tells device, process, range, event" in text
    assert '    on, process, range    none: "host.alloc.frame" does not tell it' in told(["kinds", "alloc.host"], capsys)


@pytest.mark.parametrize("kind", ["loss", "corrupt", "ack.lost", "replay.lost", "copy.lost", "copy.corrupt"])
def test_kinds_say_what_happens_without_end(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is mended by doing it again is in vain while each goes wrong, and how one says less."""
    text = " ".join(told(["kinds", kind], capsys).split())
    assert "by default it happens to each until the fault ends: nothing gets through" in text
    assert "(times=1: to one)" in text


def test_a_kind_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Every wrong word, with what was meant; nothing is listed."""
    assert exit_code(["fault", "kinds", "crsh", "loss", "copyengine"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 'no fault or family is called "crsh"; did you mean "crash"?' in captured.err
    assert 'no fault or family is called "copyengine"; did you mean "copy engine"?' in captured.err


def test_points_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its side and what can be done there."""
    points: list[dict[str, Any]] = json.loads(told(["points", "--json"], capsys))
    assert [point["name"] for point in points] == list(POINTS)
    assert {"name": "hub.wide", "side": "host", "actions": ["fail", "call"]}.items() <= next(
        point for point in points if point["name"] == "hub.wide"
    ).items()


@pytest.mark.parametrize(
    ("verb", "takes"), [("hold", "DEVICE|WAY"), ("release", "DEVICE|WAY"), ("crash", "DEVICE"), ("bounce", "DEVICE"), ("unplug", "DEVICE")]
)
def test_verbs_say_what_they_take(verb: str, takes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A link is none of it."""
    text = told([verb, "--help"], capsys)
    assert takes in text
    assert "link" not in text


def test_several_faults_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By their numbers; none does where one of them is no fault's."""
    left = [1, 2, 4]

    class Broken:
        async def list_faults(self) -> list[dict[str, Any]]:
            return [{"number": number} for number in left]

        async def remove_fault(self, number: int) -> None:
            if number not in left:
                raise WrongUse(f"no fault has number {number}")
            left.remove(number)

    @asynccontextmanager
    async def attach(_: str | None) -> AsyncIterator[Broken]:
        yield Broken()

    monkeypatch.setattr(hmmnet, "attach", attach)
    assert exit_code(["fault", "rm", "1", "3"]) == 2
    assert capsys.readouterr() == ("", "hmmnet fault: no fault has number 3\n")
    assert told(["rm", "4", "1", "4"], capsys) == "fault 4 has ended\nfault 1 has ended\n"
    assert left == [2]
    assert told(["rm", "all"], capsys) == "fault 2 has ended\n"


def test_who_is_lost_is_said_when_a_fault_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """How, and what brings it back; not since when: it may have been lost before."""
    ended: list[int] = []

    class Crashed:
        async def report(self) -> dict[str, Any]:
            gone = {"state": "lost", "last_loss": "killed by SIGKILL"}
            return {"devices": {"gpu0": gone, "gpu1": {"state": "ready", "last_loss": ""}}, "links": [], "rate": 1.0}

        async def list_faults(self) -> list[dict[str, Any]]:
            return [{"number": 2, "fault": {"kind": "partition", "on": "gpu*<->host"}}]

        async def remove_fault(self, number: int) -> None:
            ended.append(number)

    @asynccontextmanager
    async def attach(_: str | None) -> AsyncIterator[Crashed]:
        yield Crashed()

    monkeypatch.setattr(hmmnet, "attach", attach)
    assert told(["repair", "gpu*"], capsys).splitlines() == [
        "fault 2 has ended",
        "gpu0 is lost: killed by SIGKILL; `hmmnet fault bounce gpu0` starts it again, empty",
    ]
    assert ended == [2]


def test_a_device_is_unplugged_that_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By name or pattern. What the machine has not is wrong use, with what was meant; what has gone already is a failure."""
    lost = {"gpu2": "it was unplugged"}

    class Plugged:
        async def report(self) -> dict[str, Any]:
            rows = {
                name: {"state": "lost" if name in lost else "ready", "last_loss": lost.get(name, "")} for name in ("gpu0", "gpu1", "gpu2")
            }
            return {"devices": rows, "links": [{"link": "pcie0", "source": "node0", "target": "gpu0"}], "rate": 1.0}

        async def unplug(self, device: str) -> None:
            lost[device] = "it was unplugged"

    @asynccontextmanager
    async def attach(_: str | None) -> AsyncIterator[Plugged]:
        yield Plugged()

    monkeypatch.setattr(hmmnet, "attach", attach)
    for wrong, says in (
        (
            "gpu9",
            'nothing here is called "gpu9"; did you mean "gpu2"? A target is a device, DEVICE<->host or a link: gpu0, gpu1, gpu2, pcie0',
        ),
        ("nic", 'nothing here is called "nic"; a target is a device, DEVICE<->host or a link: gpu0, gpu1, gpu2, pcie0'),
        ("pcie0", "pcie0 is a link, where a device is wanted: gpu0, gpu1, gpu2"),
    ):
        assert exit_code(["fault", "unplug", wrong]) == 2
        assert says in capsys.readouterr().err
    assert exit_code(["fault", "unplug", "gpu2"]) == 1
    assert "gpu2 does not run: it was unplugged; `hmmnet fault bounce gpu2`" in capsys.readouterr().err
    assert told(["unplug", "gpu*"], capsys) == "gpu0 is unplugged\ngpu1 is unplugged\n"
