"""Plans: read, written, and refused with every mistake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from hmmnet import simulate
from hmmnet.errors import HmmnetError
from hmmnet.faults import FAULTS, KINDS, Controls, Fault, MessageFault, Plan, PlanError, PointFault, Way, as_plan, fault
from hmmnet.faults.effects import has_occurrences
from hmmnet.faults.plan import named
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import load

TEXT = """
[[fault]]
kind = "loss"
on = "gpu*->host"
channel = "control"
probability = 0.05

[[fault]]
kind = "delay"
latency = "5 ms"
jitter = "1.5 us"
times = 3
interval = 2
"""


def test_a_plan_is_read_and_written_back() -> None:
    """What was written reads as the same plan."""
    plan = Plan.parse(TEXT)
    assert [effect for one in plan.faults if isinstance(one, Fault) for effect in one.effects] == [
        MessageFault("loss", Way("gpu*", to_device=False, to_host=True, channel="control"), Controls(probability=0.05)),
        MessageFault("delay", Way(), Controls(times=3, interval=2), latency_s=0.005, jitter_s=1.5e-6),
    ]
    assert Plan.parse(plan.as_toml()) == plan
    low = Plan(
        (MessageFault("reorder", Way("gpu0", to_device=False), Controls(nth=3), 0.001), PointFault("migrate.*", "delay", delay_s=0.5))
    )
    assert Plan.parse(low.as_toml()) == Plan(tuple(map(named, low.faults)))
    with pytest.raises(HmmnetError, match="calls a function"):
        Plan((PointFault("migrate.*", "call", call=print),)).as_toml()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_and_read(kind: str) -> None:
    """With all of its parameters."""
    given: dict[str, Any] = {"point": "migrate.mid_copy", "to": "gpu1"}
    needed = {one.name: given[one.name] for one in KINDS[kind].parameters if one.default is None}
    when: dict[str, Any] = {"after": "1 ms"} | ({} if KINDS[kind].once or KINDS[kind].family == "process" else {"lasts": 2.0})
    if KINDS[kind].narrowed_by("range") == "always":
        when |= {"process": 7, "range": "0x10000+8 KiB"}
    made = fault(kind, **when, **needed)
    if any(map(has_occurrences, made.effects)):
        made = fault(kind, **when, probability=0.5, **needed)
    assert (made.start, made.end) == ((0x10000, 0x12000) if "range" in when else (0, 0))
    plan = Plan((made,))
    assert Plan.parse(plan.as_toml()) == plan
    assert KINDS[kind].holds or KINDS[kind].not_in


@pytest.mark.parametrize(
    ("text", "device", "to_device", "to_host"),
    [
        ("gpu0<->host", "gpu0", True, True),
        ("host->gpu0", "gpu0", True, False),
        ("gpu-1 -> host", "gpu-1", False, True),
        ("gpu0<-host", "gpu0", True, False),
        ("host <- gpu?", "gpu?", False, True),
    ],
)
def test_ways(text: str, device: str, to_device: bool, to_host: bool) -> None:
    """Who, and in which direction."""
    way = Way.parse(text)
    assert way == Way(device, to_device, to_host)
    assert Way.parse(str(way)) == way
    assert way.matches(device.replace("?", "7"), "bulk", to_device=True) is to_device
    assert way.matches(device.replace("?", "7"), "bulk", to_device=False) is to_host
    assert not way.matches("nic0", "bulk", to_device=True)


def test_every_mistake_is_named() -> None:
    """With the file, the line, the fault, the field, and what was meant."""
    text = """\
[[fault]]
kind = "losss"

[[fault]]
kind = "loss"
on = "gpu0<->gpu1"

[[fault]]
kind = "loss"
propability = 0.5
nth = -1

[[fault]]
kind = "delay"
latency = "5"

[[fault]]
on = "gpu0"

[[fault]]
kind = "copy.corrupt"
shape = "hole"
range = "here"

[[fault]]
kind = "point.delay"

[[fault]]
kind = "loss"
probability = 3.0
interval = 0
message = "Invalidat"

[[fault]]
kind = "point.delay"
point = "migrate.mid_cop"
latency = "5"
event = "unmapp"

[[fault]]
kind = "link.slow"
factor = 2

[faults]
kind = "loss"
"""
    with pytest.raises(PlanError) as caught:
        Plan.parse(text, "my.toml")
    assert str(caught.value).split("\n") == [
        'my.toml:2: fault 1: kind: no fault is called "losss"; did you mean "loss"?',
        'my.toml:6: fault 2: on: "gpu0<->gpu1" is no way; write DEVICE<->host, DEVICE->host or host->DEVICE, where DEVICE may have * and ?',
        'my.toml:10: fault 3: propability: there is no such parameter; did you mean "probability"?',
        "my.toml:11: fault 3: nth: -1 where a whole number that is not negative is wanted",
        "my.toml:15: fault 4: latency: '5' where a time with its unit, such as \"5 ms\" is wanted",
        'my.toml:17: fault 5: kind: missing, or no text; add kind = "loss", or another of `hmmnet fault kinds`',
        "my.toml:22: fault 6: shape: 'hole' where one of bit, burst, swap is wanted",
        "my.toml:23: fault 6: range: 'here' where addresses are wanted, such as 0x7f0000000000+64KiB",
        "my.toml:25: fault 7: point: missing: a point's name or a pattern of names (see `hmmnet fault points`)",
        "my.toml:30: fault 8: probability: 3.0 is not between 0 and 1",
        "my.toml:31: fault 8: interval: 0 is too small; it begins at 1",
        (
            "my.toml:32: fault 8: message: 'Invalidat' where one of Hello, Welcome, Refused, Done, Failed, ... is wanted; "
            'did you mean "Invalidate"?'
        ),
        'my.toml:36: fault 9: point: no point is called "migrate.mid_cop"; did you mean "migrate.mid_copy"?',
        "my.toml:37: fault 9: latency: '5' where a time with its unit, such as \"5 ms\" is wanted",
        (
            "my.toml:38: fault 9: event: 'unmapp' where one of unmap, clear, protection_vma, protection_page, soft_dirty, ... is wanted; "
            'did you mean "unmap"?'
        ),
        "my.toml:42: fault 10: factor: 2 where a part is wanted, above 0 and at most 1; to take a link away there is link.down",
        'my.toml:44: faults: unknown section or key; did you mean "fault"?',
    ]
    found = [problem.line for problem in caught.value.problems]
    assert found == sorted(found)
    for broken in ("[[fault", "fault = 3", "x = 1"):
        with pytest.raises(HmmnetError, match=r"my\.toml"):
            Plan.parse(broken, "my.toml")
    with pytest.raises(
        HmmnetError, match=r"my\.toml:2: no valid TOML: .* \(column \d+\); text stands in quotes, tables begin with \[\[fault\]\]"
    ):
        Plan.parse("\n[[fault]\n", "my.toml")


@pytest.mark.parametrize(("value", "why"), [("[" * 5_000 + "]" * 5_000, "nested too deeply"), ("9" * 5_000, "thousands of digits")])
def test_toml_that_nobody_can_read_is_a_mistake_of_the_plan(value: str, why: str) -> None:
    """Whatever Python's reader stumbles over."""
    with pytest.raises(PlanError, match=rf"my\.toml: .*{why}"):
        Plan.parse(f"a = {value}", "my.toml")


def test_what_does_not_fit_a_point_is_named_with_its_own_line() -> None:
    """Node, point or time: the one that is wrong, of faults each of whose values could be read."""
    text = """\
[[fault]]
kind = "point.crash"
point = "migrate.mid_copy"
node = "host"

[[fault]]
kind = "point.delay"
latency = "1 ms"
point = "hub.wide"

[[fault]]
kind = "point.delay"
point = "migrate.mid_copy"
latency = inf

[[fault]]
kind = "point.delay"
point = "migrate.mid_copy"
latency = "1 ms"
jitter = inf

[[fault]]
kind = "point.crash"
nth = 2
point = "process.fork"
"""
    with pytest.raises(PlanError) as caught:
        Plan.parse(text, "my.toml")
    assert str(caught.value).split("\n") == [
        "my.toml:4: fault 1: node: no host can crash alone, at a point; a device can: node=gpu0",
        'my.toml:9: fault 2: point: nothing can delay at "hub.wide"; there is call, fail',
        "my.toml:14: fault 3: latency: inf where a finite one is wanted",
        "my.toml:20: fault 4: jitter: inf where a finite one is wanted",
        'my.toml:25: fault 5: point: "process.fork" concerns no device; say which node is to crash, such as node=gpu0',
    ]
    with pytest.raises(HmmnetError, match=r"fault point\.crash: node: no host can crash alone"):
        fault("point.crash", point="migrate.mid_copy", node="host")


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    """And what cannot be read; and what a world cannot do, all of it."""
    path = tmp_path / "plan.toml"
    path.write_text(TEXT, encoding="utf-8")
    assert Plan.load(path) == Plan.parse(TEXT)
    with pytest.raises(HmmnetError, match="cannot be read: No such file"):
        Plan.load(tmp_path / "other.toml")
    plan = Plan((fault("loss"), fault("disk.slow"), fault("restart.kept"), fault("unplug")))
    with pytest.raises(
        PlanError,
        match=r'fault 2: the fault "disk.slow" cannot be done in the sim world: a simulated machine writes no logs$',
    ):
        plan.check("sim")
    with pytest.raises(
        PlanError, match=r'"restart.kept" cannot be done in the real world: a process.*\n.*"unplug" cannot be done in the real world'
    ):
        plan.check("real")


def test_what_a_machine_cannot_have_is_told_at_once_with_lines() -> None:
    """What the world cannot do, and what nothing there is called; a device alone is both its ways."""
    kinds = {"link.slow": "nvlink9", "crash": "gpu9", "loss": "gpu9", "unplug": "gpu0", "delay": "gpu1"}
    text = "".join(f'[[fault]]\nkind = "{kind}"\non = "{on}"\n' for kind, on in kinds.items())
    plan = Plan.parse(text, "my.toml")
    assert [one.on for one in plan.faults if isinstance(one, Fault)][2:] == ["gpu9<->host", "gpu0", "gpu1<->host"]
    with pytest.raises(PlanError) as caught:
        plan.check("real", load("two-gpus"))
    assert str(caught.value).split("\n") == [
        'my.toml:1: fault 1: no link is called "nvlink9"; there are node0-gpu0, node0-gpu1',
        'my.toml:4: fault 2: no device is called "gpu9"; did you mean "gpu1"? There are gpu0, gpu1, host',
        'my.toml:7: fault 3: no device is called "gpu9"; did you mean "gpu1"? There are gpu0, gpu1',
        (
            'my.toml:10: fault 4: the fault "unplug" cannot be done in the real world: '
            "the launcher sees a process end and tells the host: use crash, or a partition"
        ),
    ]
    plan = Plan.of([{"kind": kind, "on": on} for kind, on in kinds.items() if kind == "crash"])
    with pytest.raises(PlanError, match=r'^plan: fault 1: no device is called "gpu9"'):
        plan.check("sim", load("two-gpus"))


VAIN = """\
# nobody has process 4242
[[fault]]
kind = "delay"

[[fault]]
kind = "process.exit"
process = 4242
"""
IN_VAIN = "{}:5: fault 2: there is no process 4242; those that run are none; have it begin later, with after=TIME, or at a point"


def test_what_is_in_vain_from_the_start_is_told_with_its_line(tmp_path: Path) -> None:
    """Where it stands, in a file or in Python; also of a file that is one of several things."""
    file = tmp_path / "vain.toml"
    file.write_text(VAIN)

    async def main(_: SimulatedMachine) -> None:
        raise AssertionError("it does not begin")

    for faults in (file, str(file), Plan.load(file), ["loss", file], [[file], {"delay": 0.1}]):
        with pytest.raises(PlanError) as wrong:
            simulate(main, faults=faults)
        assert str(wrong.value) == IN_VAIN.format(file)
        assert wrong.value.problems[0].line == 5
    with pytest.raises(PlanError, match=r"^faults: fault 2: there is no process 4242; "):
        simulate(main, faults=["loss", {"kind": "process.exit", "process": 4242}])
    with pytest.raises(PlanError, match=r'^both: fault 2: no device is called "gpu9"; '):
        Plan.joined([Plan(), as_plan([{"loss": 0.1}, {"kind": "crash", "on": "gpu9"}])], "both").check("sim", load("two-gpus"))


def test_lines_end_where_the_faults_do() -> None:
    """A list of them has as many items; other faults in an old plan have no lines."""
    plan = Plan.parse('[[fault]]\nkind = "loss"\n\n[[fault]]\nkind = "loss"\nmessage = "Evict"\n', "p.toml")
    assert (list(plan.lines), plan.lines[-1], plan.lines[0:1]) == ([1, 4], 4, [1])
    with pytest.raises(IndexError, match="there are 2 faults"):
        plan.lines[2]
    others = replace(plan, faults=(fault("crash", "gpu9"),))
    with pytest.raises(PlanError, match=r"^p\.toml: fault 1"):
        others.check("sim", load("two-gpus"))


def test_what_becomes_of_a_message() -> None:
    """Each fault by name."""
    parts = (b"head", bytes(100))
    random = Random(1)
    become = {kind: MessageFault(kind, Way(channel="bulk"), latency_s=0.25).apply([(0.5, parts)], random) for kind in FAULTS}
    assert become["loss"] == become["partition"] == become["hold"] == []
    assert become["duplicate"] == [(0.5, parts)] * 2
    assert become["delay"] == become["reorder"] == [(0.75, parts)]
    ((late_s, (head, data)),) = become["corrupt"]
    assert (late_s, head, len(data)) == (0.5, b"head", 100)
    assert sum(byte.bit_count() for byte in data) == 1
    ((_, (_, short)),) = become["truncate"]
    assert len(short) < 100
    ((_, (_, noise)),) = become["garbage"]
    assert len(noise) == 100
    assert noise != data
    ((_, (_, old)),) = become["old_version"]
    assert len(old) == 100


@pytest.mark.parametrize("shape", ["burst", "swap"])
def test_shapes_of_damage(shape: str) -> None:
    """A burst is at most 64 bytes in a row; halves that swap hold the same bytes."""
    whole = bytes(range(100))
    ((_, (raw,)),) = MessageFault("corrupt", Way(channel="bulk"), shape=shape).apply([(0.0, (whole,))], Random(2))
    assert raw != whole
    assert len(raw) == 100
    if shape == "swap":
        assert raw == whole[50:] + whole[:50]
    else:
        places = [i for i in range(100) if raw[i] != whole[i]]
        assert places == list(range(places[0], places[-1] + 1))
