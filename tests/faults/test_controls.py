"""How often a fault happens. Oracle: lib/fault-inject.c."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from hmmnet.errors import HmmnetError, WrongUse
from hmmnet.faults import KINDS, MessageFault, Plan, PlanError, PointFault, fault
from hmmnet.faults.catalogue import checked
from hmmnet.faults.controls import Chance, Controls, Tally
from hmmnet.faults.kinds import Kind
from hmmnet.faults.plan import named


def fired(controls: Controls, occurrences: int, nbytes: int = 1, seed: int = 1) -> list[int]:
    """The occurrences, counted from 1, at which it happens."""
    chance = Chance(controls, Random(seed))
    return [number for number in range(1, occurrences + 1) if chance.fires(nbytes)]


@pytest.mark.parametrize(
    ("controls", "expected"),
    [
        (Controls(), [1, 2, 3, 4, 5, 6]),
        (Controls(probability=0.0), []),
        (Controls(interval=2), [2, 4, 6]),
        (Controls(times=2), [1, 2]),
        (Controls(times=0), []),
        (Controls(nth=4), [4]),
        (Controls(nth=4, probability=0.0, times=0), [4]),
        (Controls(space=2), [3, 4, 5, 6]),
        (Controls(interval=3, times=1), [3]),
    ],
)
def test_when_it_happens(controls: Controls, expected: list[int]) -> None:
    """Each attribute by itself, and nth over all others."""
    assert fired(controls, 6) == expected


def test_two_places_of_one_fault_count_together() -> None:
    """What one has seen, the other has not to wait for; each knows how often it was itself."""
    for controls, expected in (
        (Controls(times=1), [True, False, False, False]),
        (Controls(nth=2), [False, True, False, False]),
        (Controls(space=2), [False, False, True, True]),
    ):
        tally = Tally()
        places = [Chance(controls, Random(1), tally) for _ in range(2)]
        assert [places[number % 2].fires() for number in range(4)] == expected
        assert sum(place.fired for place in places) == tally.fired == sum(expected)
        assert tally.seen == 4


def test_space_is_counted_in_bytes() -> None:
    """10 bytes pass, four at a time: three occurrences."""
    assert fired(Controls(space=10), 5, nbytes=4) == [4, 5]


def test_probability_is_a_share_and_repeats_with_the_seed() -> None:
    """About a quarter of many; the same ones from the same seed."""
    first = fired(Controls(probability=0.25), 4000)
    assert 850 < len(first) < 1150
    assert first == fired(Controls(probability=0.25), 4000)
    assert first != fired(Controls(probability=0.25), 4000, seed=2)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"probability": 1.5}, "probability 1.5 is not between 0 and 1"),
        ({"probability": float("nan")}, "not between 0 and 1"),
        ({"interval": 0}, "interval 0 is too small; it begins at 1"),
        ({"nth": -1}, "nth -1 is too small"),
        ({"space": -1}, "space -1 is too small"),
        ({"times": -2}, "times -2 is too small; -1 means without end"),
    ],
)
def test_impossible_controls_are_refused(values: dict[str, float], text: str) -> None:
    """With the value, and what is possible."""
    with pytest.raises(HmmnetError, match=text):
        Controls(**values)  # type: ignore[arg-type]  # as a program without a type checker gives them


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("link.slow", {"times": 1}, "times: it lasts, and has no occurrences to choose from"),
        ("link.down", {"probability": 0.5}, "probability: it lasts"),
        ("clock.skew", {"nth": 2, "factor": 1.1}, "nth: it lasts"),
        ("crash", {"probability": 0.5}, "probability: it happens once, as it is added"),
        ("process.fork", {"nth": 2}, "nth: it happens once, as it is added"),
        ("counter.flood", {"times": 2}, "kind: it can be done in no world: devices here have no access counters"),
        ("row_remap.pending", {"nth": 2, "times": 2}, r"pending: kind: it can be done in no world: memory here has no rows: [^;]*$"),
    ],
)
def test_what_has_no_occurrences_has_no_controls(kind: str, given: dict[str, float], words: str) -> None:
    """They did nothing, and nobody said so."""
    with pytest.raises(HmmnetError, match=words):
        fault(kind, "gpu0", **given)


@pytest.mark.parametrize(("kind", "given"), [("link.latency", {"times": 1}), ("crash", {"times": 1}), ("loss", {"nth": 3})])
def test_what_has_occurrences_has_controls(kind: str, given: dict[str, int]) -> None:
    """And once is what happens at once."""
    assert all(getattr(fault(kind, "gpu0", **given).controls, name) == value for name, value in given.items())


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_a_kind_says_whether_it_takes_controls(kind: Kind) -> None:
    """As making one has it: without a point where it may do without, and with one."""
    given = {one.name: "migrate.mid_copy" if one.form == "point" else "gpu1" for one in kind.parameters if one.default is None}

    if kind.needs_range:
        given["range"] = "0x10000+4KiB"

    def takes(**more: str) -> bool:
        return checked(kind.name, {"nth": 2, **given, **more})[0] is not None

    may_have_point = kind.parameter("point") is not None
    taken = {"always": (True, True), "with point": (False, True), "never": (False, False)}[kind.controlled]
    assert (takes(), takes(point="migrate.mid_copy") if may_have_point else taken[1]) == taken
    assert (kind.why_uncontrolled == "") == (kind.controlled == "always")


@pytest.mark.parametrize(
    ("kind", "given", "fields"),
    [
        ("link.slow", {"factor": 2, "times": 3}, ["factor", "times"]),
        ("link.lanes", {"lanes": 17, "nth": 1, "interval": 2}, ["interval", "lanes", "nth"]),
        ("link.down", {"on": "gpu0->host", "probability": 0.5}, ["on", "probability"]),
        ("clock.jump", {"by": "soon", "times": 0}, ["by", "times"]),
        ("process.mprotect", {"nth": 2}, ["nth", "range"]),
        ("process.mprotect", {"point": "hub.wid", "nth": 2}, ["point"]),
    ],
)
def test_needless_controls_are_told_with_every_other_mistake(kind: str, given: dict[str, Any], fields: list[str]) -> None:
    """By a plan and by whoever makes one fault: not one after the other."""
    with pytest.raises(PlanError) as caught:
        Plan.of([{"kind": kind, **given}])
    assert sorted(problem.field for problem in caught.value.problems) == fields
    with pytest.raises(HmmnetError) as told:
        fault(kind, **given)
    assert all(f"{field}: " in str(told.value) for field in fields)


@pytest.mark.parametrize(
    ("kind", "given", "field", "says"),
    [
        ("link.latency", {"latency": "0 ms"}, "latency", "with latency 0 s and jitter 0 s it does nothing; leave the fault out"),
        ("delay", {"latency": 0}, "latency", "with latency 0 s and jitter 0 s it does nothing"),
        ("point.delay", {"point": "migrate.*", "latency": 0}, "latency", "with latency 0 s and jitter 0 s it does nothing"),
        ("copy.slow", {"latency": 0}, "latency", "with latency 0 s and jitter 0 s it does nothing"),
        ("copy.reorder", {"jitter": 0}, "jitter", "with jitter 0 s it does nothing"),
        ("invalidate.slow", {"latency": 0}, "latency", "with latency 0 s and jitter 0 s it does nothing"),
        ("cpu.starve", {"latency": 0}, "latency", "with latency 0 s it does nothing"),
        ("disk.slow", {"latency": 0}, "latency", "with latency 0 s it does nothing"),
        ("link.slow", {"factor": 1}, "factor", "with factor 1.0 it does nothing"),
        ("link.lanes", {"lanes": 16}, "lanes", "with lanes 16 it does nothing"),
        ("clock.jump", {"by": 0}, "by", "with by 0 s it does nothing"),
        ("clock.skew", {"factor": 1}, "factor", "with factor 1.0 it does nothing"),
        ("ecc.corrected", {"count": 0}, "count", "with count 0 it does nothing"),
        ("page.retire", {"pages": 0}, "pages", "with pages 0 it does nothing"),
        ("buffer.overflow", {"entries": 0}, "entries", "0 where at least 1 is wanted"),
        ("loss", {"probability": 0}, "probability", "0: it never happens; leave the fault out, or say how often"),
        ("alloc.device", {"times": 0}, "times", "0: it never happens"),
    ],
)
def test_what_would_do_nothing_is_refused(kind: str, given: dict[str, Any], field: str, says: str) -> None:
    """In a plan with its field, and of one fault; nobody believes that his program bore it."""
    with pytest.raises(PlanError) as caught:
        Plan.of([{"kind": kind, **given}])
    assert [problem.field for problem in caught.value.problems] == [field]
    with pytest.raises(WrongUse, match=f"^fault {kind}: {field}: {says}"):
        fault(kind, **given)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("link.latency", {"latency": 0, "jitter": "1 us"}),
        ("delay", {"latency": 0, "jitter": 0.001}),
        ("copy.timeout", {"latency": 0}),
        ("ecc.storm", {"latency": 0}),
        ("bounce", {"down": 0}),
        ("clock.skew", {"factor": 0.5}),
    ],
)
def test_what_does_something_is_not(kind: str, given: dict[str, Any]) -> None:
    """Though a value is nought."""
    assert fault(kind, **given).kind.name == kind


def test_faults_made_by_hand_that_do_nothing() -> None:
    """A delay at a point of no time is refused where it is begun; a message that is late is so by a while that it has by itself."""
    with pytest.raises(WrongUse, match="it does nothing"):
        named(PointFault("migrate.mid_copy", "delay"))
    late = named(MessageFault("delay"))
    assert late.effects == [MessageFault("delay", latency_s=0.001)]
    assert named(MessageFault("delay", jitter_s=0.5)).effects == [MessageFault("delay", jitter_s=0.5)]
