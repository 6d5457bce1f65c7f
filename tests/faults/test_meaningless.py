"""What could be read but can never mean anything is a mistake, with its cause and its mend; nothing stands in a list that never happens."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hmmnet.errors import HmmnetError
from hmmnet.faults import Plan, PlanError, fault
from hmmnet.faults.targets import check_target
from hmmnet.topology.load import load


@pytest.mark.parametrize(
    ("kind", "given", "wrong"),
    [
        ("invalidate.late", {"range": "0x1000+0"}, r"range: '0x1000\+0' is empty, and would narrow nothing; give a length above 0"),
        ("process.exit", {"point": "migrate.after", "range": "0x1000+0KiB"}, "range: .* is empty"),
        ("loss", {"nth": 2, "times": 3}, "times: nth is the one occurrence at which it happens.*; leave one"),
        ("loss", {"nth": 3, "probability": 0}, "probability: nth is the one occurrence"),
        ("loss", {"nth": 3, "interval": 2, "space": 9}, "interval: nth .*; space: nth "),
        ("crash", {"on": "gpu0", "lasts": "5 s"}, "lasts: it happens once, as it begins, and has no end; leave it out"),
        ("bounce", {"down": "100000000s"}, "down: more than 3600 s, which nobody waits for; give less, or have it crash"),
        ("page.retire", {"lasts": "1 s"}, "lasts: it happens once"),
        ("process.exit", {"lasts": "1 s"}, "lasts: it happens once"),
        ("alternate", {"on": "gpu0", "to": "gpu0"}, 'to: "gpu0" is the device that it is on; name another'),
        ("delay", {"latency": math.inf}, "latency: inf where a finite one is wanted"),
        ("clock.skew", {"factor": math.inf}, "factor: inf where a finite one is wanted"),
        ("loss", {"after": math.inf, "lasts": math.inf}, "after: inf .*; lasts: inf "),
    ],
)
def test_what_means_nothing(kind: str, given: dict[str, Any], wrong: str) -> None:
    """From Python, and in a plan."""
    with pytest.raises(HmmnetError, match=wrong):
        fault(kind, **given)
    with pytest.raises(PlanError, match=wrong.partition(";")[0]):
        Plan.of([{"kind": kind, **given}])


def test_what_means_something() -> None:
    """Once is once; a deed at a point ends; another device is another."""
    assert fault("loss", nth=2, times=1).controls.nth == 2
    assert fault("process.exit", point="migrate.after", lasts="1 s").lasts_s == 1.0
    assert fault("alternate", "*", to="gpu0").settings["to"] == "gpu0"


def test_more_pages_than_a_device_has() -> None:
    """Of several devices the one that has most says how many; all of them may go."""
    topology = load("two-gpus")
    has = max(one.memory_bytes for one in topology.devices) >> 12
    check_target(fault("page.retire", "gpu*", pages=has), topology, "sim")
    with pytest.raises(HmmnetError, match=rf"page\.retire: pages: {has + 1} where gpu0 has {has}; give fewer"):
        check_target(fault("page.retire", "gpu*", pages=has + 1), topology, "sim")
