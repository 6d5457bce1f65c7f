"""Plans: read, written, and refused with every mistake."""

from __future__ import annotations

from random import Random

import pytest

from hmmnet.errors import HmmnetError
from hmmnet.faults import FAULTS, Controls, MessageFault, Plan, Way

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
    assert list(plan.faults) == [
        MessageFault("loss", Way("gpu*", to_device=False, to_host=True, channel="control"), Controls(probability=0.05)),
        MessageFault("delay", Way(), Controls(times=3, interval=2), latency_s=0.005, jitter_s=1.5e-6),
    ]
    assert Plan.parse(plan.as_toml()) == plan


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
    """With the file, the number of the fault, and what would do."""
    text = """
[[fault]]
kind = "losss"
[[fault]]
kind = "loss"
on = "gpu0<->gpu1"
[[fault]]
kind = "loss"
probability = 3.0
[[fault]]
kind = "loss"
propability = 0.5
[[fault]]
kind = "delay"
latency = "5"
[[fault]]
kind = "corrupt"
"""
    with pytest.raises(HmmnetError) as caught:
        Plan.parse(text, "my.toml")
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[1] for line in lines] == [f"fault {number}" for number in range(1, 7)]
    words = ('no fault of messages is called "losss"', "is no way", "between 0 and 1", "propability", "a number and a unit", "bulk channel")
    for line, text in zip(lines, words, strict=True):
        assert text in line
    for broken in ("[[fault", "fault = 3", "[[faults]]\nkind = 'loss'"):
        with pytest.raises(HmmnetError, match=r"my\.toml: "):
            Plan.parse(broken, "my.toml")


def test_what_becomes_of_a_message() -> None:
    """Each fault by name."""
    parts = (b"head", bytes(100))
    random = Random(1)
    become = {kind: MessageFault(kind, Way(channel="bulk"), latency_s=0.25).apply([(0.5, parts)], random) for kind in FAULTS}
    assert become["loss"] == become["partition"] == []
    assert become["duplicate"] == [(0.5, parts)] * 2
    assert become["delay"] == become["reorder"] == [(0.75, parts)]
    ((late_s, (head, data)),) = become["corrupt"]
    assert (late_s, head, len(data)) == (0.5, b"head", 100)
    assert sum(byte.bit_count() for byte in data) == 1
