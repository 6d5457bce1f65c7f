"""``hmmnet fault add TARGET NAME=VALUE...`` and the verbs beside it: what they come down to, and mistakes."""

from __future__ import annotations

from typing import Any

import pytest

from hmmnet.cli import exit_code, toxics
from hmmnet.errors import HmmnetError
from hmmnet.faults.catalogue import fault

SIGHTS = toxics.Sights(
    ("gpu0", "gpu1"),
    {"pcie0": frozenset(("node0", "gpu0")), "pcie1": frozenset(("node0", "gpu1")), "nvlink": frozenset(("gpu0", "gpu1"))},
)
DELAY = {"kind": "link.latency", "on": "gpu0<->host", "latency": "5ms", "jitter": "1ms"}


@pytest.mark.parametrize(
    ("line", "made"),
    [
        ("gpu0<->host latency=5ms jitter=1ms", [DELAY]),
        ("gpu0 latency=5ms jitter=1ms times=3", [{**DELAY, "on": link, "times": "3"} for link in ("pcie0", "nvlink")]),
        ("gpu0->host latency=5ms", [{"kind": "link.latency", "on": "gpu0->host", "latency": "5ms"}]),
        ("host->gpu0 jitter=1ms", [{**DELAY, "on": "gpu0<-host", "latency": "0 ms"}]),
        ("gpu1 bandwidth=10%", [{"kind": "link.slow", "on": link, "factor": "0.1"} for link in ("pcie1", "nvlink")]),
        ("gpu1<->host bandwidth=10%", [{"kind": "link.slow", "on": "gpu1<->host", "factor": "0.1"}]),
        ("gpu1->host bandwidth=10%", [{"kind": "link.slow", "on": "gpu1->host", "factor": "0.1"}]),
        ("nvlink jitter=1us", [{"kind": "link.latency", "on": "nvlink", "latency": "0 ms", "jitter": "1us"}]),
        ("pcie0 latency=1us", [{"kind": "link.latency", "on": "pcie0", "latency": "1us"}]),
        ("gpu0<->gpu1 latency=1us", [{"kind": "link.latency", "on": "nvlink", "latency": "1us"}]),
        ("pcie* bandwidth=0.5", [{"kind": "link.slow", "on": "pcie*", "factor": "0.5"}]),
        (
            "gpu0<->host loss=5% reorder=0.25",
            [{"kind": "loss", "on": "gpu0<->host", "probability": 0.05}, {"kind": "reorder", "on": "gpu0<->host", "probability": 0.25}],
        ),
        ("host->gpu1 duplicate=100%", [{"kind": "duplicate", "on": "gpu1<-host", "probability": 1.0}]),
    ],
)
def test_toxics_are_faults_of_the_catalogue(line: str, made: list[dict[str, Any]]) -> None:
    """And the catalogue takes them."""
    target, *words = line.split()
    assert toxics.is_target(target, words)
    found = toxics.faults_for(target, words, SIGHTS)
    assert found == made
    for one in found:
        fault(**one)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("gpu0 latncy=5ms loss=1%", 'there is no toxic "latncy"; did you mean "latency"?'),
        ("gpu0 loss=150%", "loss: '150%' where a part is wanted, such as 5% or 0.05"),
        ("gpu0 loss=0", "loss: '0' where a part is wanted"),
        ("gpu0 latency=5", "latency: '5' where a time with its unit, such as"),
        ("gpu0 latency=5ms latency=6ms", "latency is given twice"),
        ("gpu0 latency=5ms times=x", "times: 'x' is no whole number"),
        ("gpu0 latency=5ms bandwidth=50% times=3", "times cannot stand beside bandwidth: it lasts"),
        ("gpu0<->host", "what is to happen? Give one of latency, jitter"),
        ("gpu0<->host 5ms", '"5ms" is no NAME=VALUE'),
        ("gpu9 latency=5ms", 'nothing here is called "gpu9"; did you mean "gpu'),
        ("gpu0->gpu1 latency=5ms", "nvlink joins gpu0 and gpu1"),
        ("pcie0 loss=5%", "loss: a link has latency, jitter and bandwidth only"),
    ],
)
def test_mistakes_are_named_with_their_mend(line: str, says: str) -> None:
    """Of each word, before anything begins."""
    target, *words = line.split()
    with pytest.raises(HmmnetError) as caught:
        toxics.faults_for(target, words, SIGHTS)
    assert says in str(caught.value)


def test_every_mistake_of_a_line_is_told_without_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing needs to run for it."""
    assert exit_code(["fault", "add", "gpu0<->host", "loss=x", "ltency=1ms"]) == 2
    told = capsys.readouterr().err
    assert "loss: 'x' where a part" in told
    assert 'did you mean "latency"?' in told


def test_what_is_neither_kind_nor_target() -> None:
    """A word without toxics is a kind, and looked for among them."""
    assert not toxics.is_target("point.fial", ["gpu0", "point=device.hello"])
    assert toxics.is_target("gpu0->host", [])


@pytest.mark.parametrize(
    ("verb", "target", "oneway", "made"),
    [
        (toxics.cut, "gpu0", False, {"kind": "partition", "on": "gpu0<->host"}),
        (toxics.cut, "gpu0", True, {"kind": "partition", "on": "gpu0->host"}),
        (toxics.cut, "host->gpu0", True, {"kind": "partition", "on": "gpu0<-host"}),
        (toxics.cut, "pcie0", False, {"kind": "link.down", "on": "pcie0"}),
        (toxics.cut, "gpu1<->gpu0", False, {"kind": "link.down", "on": "nvlink"}),
        (toxics.held, "gpu1", False, {"kind": "hang", "on": "gpu1"}),
        (toxics.held, "gpu1", True, {"kind": "hold", "on": "gpu1->host"}),
    ],
)
def test_verbs_are_faults_of_the_catalogue(verb: Any, target: str, oneway: bool, made: dict[str, Any]) -> None:
    """Both ways, one way, and links."""
    assert verb(target, SIGHTS, oneway=oneway) == [made]
    fault(**made)


@pytest.mark.parametrize(("verb", "target"), [(toxics.cut, "gpu0<->host"), (toxics.cut, "pcie0"), (toxics.held, "gpu0<->host")])
def test_one_way_of_both_is_refused(verb: Any, target: str) -> None:
    """It would say two things at once."""
    with pytest.raises(HmmnetError, match="both"):
        verb(target, SIGHTS, oneway=True)


def test_what_a_verb_undoes() -> None:
    """All of its kinds at the target, however it is written; nothing else; and a word when there is nothing."""
    faults = [
        {"number": 1, "fault": {"kind": "hang", "on": "gpu0"}},
        {"number": 2, "fault": {"kind": "hold", "on": "gpu0->host"}},
        {"number": 3, "fault": {"kind": "partition", "on": "gpu0<->host"}},
        {"number": 4, "fault": {"kind": "hang", "on": "gpu1"}},
        {"number": 5, "fault": {"kind": "link.down", "on": "pcie0"}},
    ]
    assert toxics.ended_by("release", ["gpu0"], faults) == [1, 2]
    assert toxics.ended_by("release", ["gpu1<->host"], faults) == [4]
    assert toxics.ended_by("repair", ["gpu0"], faults) == [3]
    assert toxics.ended_by("repair", ["pcie0"], faults) == [5]
    with pytest.raises(HmmnetError, match=r"nothing to repair at gpu1: no partition or link\.down"):
        toxics.ended_by("repair", ["gpu1"], faults)


def test_each_of_the_links_between_two_devices() -> None:
    """They are cut, slowed and repaired together; of those that are down one may have been repaired by its name."""
    pair = frozenset(("gpu0", "gpu1"))
    two = toxics.Sights(SIGHTS.devices, {"nva": pair, **SIGHTS.links, "nvb": pair})
    links = ("nva", "nvlink", "nvb")
    assert toxics.cut("gpu0<->gpu1", two, oneway=False) == [{"kind": "link.down", "on": link} for link in links]
    slow = toxics.faults_for("gpu1<->gpu0", ["latency=1us", "bandwidth=10%"], two)
    assert slow == [
        made
        for link in links
        for made in (
            {"kind": "link.latency", "on": link, "latency": "1us"},
            {"kind": "link.slow", "on": link, "factor": "0.1"},
        )
    ]
    faults = [{"number": number, "fault": {"kind": "link.down", "on": link}} for number, link in ((3, "nvlink"), (4, "pcie0"), (5, "nvb"))]
    assert toxics.ended_by("repair", two.between("gpu0<->gpu1"), faults) == [3, 5]
    with pytest.raises(HmmnetError, match="nothing to repair at nva, nvlink, nvb: no partition"):
        toxics.ended_by("repair", two.between("gpu0<->gpu1"), [])
    with pytest.raises(HmmnetError, match="nva, nvlink, nvb join gpu0 and gpu1, and are what they are in both directions"):
        toxics.cut("gpu0->gpu1", two, oneway=True)


def test_the_host_alone_is_no_target() -> None:
    """Of every verb and toxic: which device is at the other end is to be said."""
    for verb in (toxics.cut, toxics.held):
        with pytest.raises(HmmnetError, match=r"name the device at the other: DEVICE<->host"):
            verb("host", SIGHTS, oneway=False)
    with pytest.raises(HmmnetError, match=r"name the device at the other: DEVICE<->host"):
        toxics.faults_for("host", ["latency=5ms"], SIGHTS)


@pytest.mark.parametrize("target", ["pcie0", "pcie0<->host"])
def test_a_link_cannot_be_held(target: str) -> None:
    """It is said what it is, and what takes links; a word is never what was meant by itself."""
    with pytest.raises(HmmnetError, match="pcie0 is a link, where a device is wanted: gpu0, gpu1; `hmmnet fault partition` takes links"):
        toxics.held(target, SIGHTS, oneway=False)


def test_devices_that_no_link_joins() -> None:
    """It is said which links there are at them; and what joins two does so in both directions."""
    three = toxics.Sights((*SIGHTS.devices, "gpu2"), {**SIGHTS.links, "pcie2": frozenset(("node0", "gpu2"))})
    with pytest.raises(HmmnetError, match="no link joins gpu0 and gpu2 alone; those at either are pcie0, nvlink, pcie2"):
        toxics.cut("gpu0<->gpu2", three, oneway=False)
    with pytest.raises(HmmnetError, match="nvlink joins gpu0 and gpu1, and is what it is in both directions; write gpu0<->gpu1"):
        toxics.cut("gpu0->gpu1", three, oneway=True)


def test_a_device_that_does_not_run_cannot_be_held() -> None:
    """Nothing would happen: it is said how it ended, and how it is had again. Of several the others can."""
    sights = toxics.Sights(SIGHTS.devices, SIGHTS.links, {"gpu1": "killed by SIGKILL"})
    assert sights.running("gpu*") == ("gpu0",)
    with pytest.raises(HmmnetError, match="gpu1 does not run: killed by SIGKILL; `hmmnet fault bounce gpu1` starts it again, empty"):
        toxics.held("gpu1", sights, oneway=False)


def test_who_was_lost_by_what() -> None:
    """Those whose names a fault has, however it writes them."""
    sights = toxics.Sights(SIGHTS.devices, SIGHTS.links, {"gpu0": "silent", "gpu1": "silent"})
    assert sights.lost_by([{"kind": "partition", "on": "gpu0<->host"}]) == ["gpu0"]
    assert sights.lost_by([{"kind": "hang", "on": "gpu*"}]) == ["gpu0", "gpu1"]
    assert sights.lost_by([{"kind": "link.down", "on": "pcie0"}]) == []


def test_for_how_long_a_device_stays_away() -> None:
    """In real time, which is what one waits for; of faults that start nothing nothing is said."""
    slow = toxics.Sights(SIGHTS.devices, SIGHTS.links, rate=0.002)
    assert (
        toxics.waits({"kind": "bounce", "down": "100ms"}, slow) == " (away for 50 s of real time: this machine's clock runs at 0.002 of it)"
    )
    assert "away for 50 s" in toxics.waits({"kind": "reset", "down": "100ms"}, slow)
    assert toxics.waits({"kind": "reset"}, slow) == " (it starts again at once)"
    assert toxics.waits({"kind": "bounce", "down": "0ms"}, slow) == " (it starts again at once)"
    assert toxics.waits({"kind": "crash"}, slow) == ""
    clock = "of real time: this machine's clock runs at 0.002 of it"
    assert toxics.waits({"kind": "bounce", "down": "100ms", "after": "100ms"}, slow) == f" (begins in 50 s, away for 50 s {clock})"
    later = {"kind": "bounce", "down": "0ms", "after": "100ms"}
    assert toxics.waits(later, slow) == f" (begins in 50 s {clock}; it starts again at once)"


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"kind": "ack.lost"}, "to each, until `hmmnet fault rm 3`: nothing gets through"),
        ({"kind": "replay.lost", "on": "gpu0"}, "to each, until `hmmnet fault rm 3`: nothing gets through"),
        ({"kind": "loss", "on": "gpu0<->host"}, "to each, until `hmmnet fault rm 3`: nothing gets through"),
        ({"kind": "loss", "on": "gpu0<->host", "message": "Inspect"}, "to each, until `hmmnet fault rm 3`"),
        ({"kind": "link.latency", "on": "gpu0<->host", "latency": "5ms"}, "to each, until `hmmnet fault rm 3`"),
        ({"kind": "clock.skew"}, "until `hmmnet fault rm 3`"),
        ({"kind": "partition", "on": "gpu0<->host"}, "until `hmmnet fault repair 'gpu0<->host'`"),
        ({"kind": "hang", "on": "gpu0"}, "until `hmmnet fault release gpu0`"),
        ({"kind": "ack.lost", "times": "1"}, ""),
        ({"kind": "loss", "probability": "0.1"}, ""),
        ({"kind": "loss", "lasts": "1 s"}, ""),
        ({"kind": "crash"}, ""),
        ({"kind": "process.exit"}, ""),
    ],
)
def test_what_ends_a_fault_that_does_not_end_by_itself(made: dict[str, Any], says: str) -> None:
    """As it is added: what is to be done, and whether the machine stands still until then."""
    assert toxics.until(made, 3) == (f" ({says})" if says else "")


def test_a_direction_is_repaired_by_itself() -> None:
    """What is cut from the device to the host is not mended by the other way; both ways, or the device, are either."""
    cut = [{"number": 4, "fault": {"kind": "partition", "on": "gpu1->host"}}]
    with pytest.raises(HmmnetError, match="nothing to repair at host->gpu1"):
        toxics.ended_by("repair", ["host->gpu1"], cut)
    for target in ("gpu1->host", "host<-gpu1", "gpu1<->host", "gpu1"):
        assert toxics.ended_by("repair", [target], cut) == [4]


def test_nothing_is_cut_from_a_device_that_is_lost() -> None:
    """Nobody is there whom it could concern."""
    sights = toxics.Sights(SIGHTS.devices, SIGHTS.links, {"gpu1": "killed by SIGKILL"})
    with pytest.raises(
        HmmnetError, match=r"gpu1 does not run: killed by SIGKILL; `hmmnet fault bounce gpu1` .*; do that first, then partition it"
    ):
        toxics.cut("gpu1", sights, oneway=False)


def test_a_target_alone_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """It is no misspelt kind."""
    assert exit_code(["fault", "add", "gpu0"]) == 2
    assert "what is to happen there is missing, such as latency=5ms" in capsys.readouterr().err
