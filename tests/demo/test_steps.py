"""The demo's steps on a machine without processes: told in order, checked, wrong results found."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

from hmmnet.demo.answers import answers_for
from hmmnet.demo.steps import Asked, Built, Checked, Demo, Event, Found, Moved, Ran, Sampled, facts_of
from hmmnet.demo.story import QUESTIONS
from tests.flat_machine import FlatMachine

TEXT = (" ".join(f"word{i % 900}" for i in range(4000))).encode()


async def told(machine: Any) -> tuple[Demo, list[Event]]:
    events: list[Event] = []
    demo = Demo(machine, events.append, TEXT, answers_for(TEXT), random.Random(5), searches=1000)
    await demo.run()
    return demo, events


async def test_every_step_is_told_and_every_result_checked() -> None:
    """Two kernels, twice, on both devices; four checks, nothing wrong; all four questions, each once, in order."""
    demo, events = await told(FlatMachine())
    assert demo.mistakes == []
    assert isinstance(events[0], Built)
    runs = [e for e in events if isinstance(e, Ran)]
    assert [(e.run, e.kernel) for e in runs] == [(r, k) for r in ("by demand", "migrated") for k in ("word_count", "tree_search")]
    assert all(set(e.jobs) == {"gpu0", "gpu1"} and e.seconds > 0 for e in runs)
    checks = [e for e in events if isinstance(e, Checked)]
    assert [(e.results > 0, e.wrong, e.pages_from_devices > 0) for e in checks] == [(True, 0, True)] * 4
    assert [(e.word.startswith("word"), e.count > 0) for e in events if isinstance(e, Found)] == [(True, True)]
    assert [e.question for e in events if isinstance(e, Asked)] == list(QUESTIONS)
    assert [e.to for e in events if isinstance(e, Moved)] == ["host", "devices"]


async def test_pictures_show_where_pages_are() -> None:
    """All at home in the beginning, on the devices after the migration, results home after the CPU read them."""
    _, events = await told(FlatMachine())
    samples = {e.moment: Counter(e.residency.pages.tolist()) for e in events if isinstance(e, Sampled)}
    assert list(samples) == ["built", "by demand", "sent home", "migrated", "ran again", "read by CPU"]
    assert set(samples["built"]) == {0}
    assert samples["migrated"][1] > samples["by demand"][1] > 0
    assert samples["migrated"][1] + samples["migrated"][2] > samples["migrated"][0]
    assert samples["read by CPU"][0] > samples["ran again"][0]


async def test_wrong_results_are_found() -> None:
    """A device that is off by one is caught in all four checks."""
    machine = FlatMachine()
    machine.error = 1
    demo, events = await told(machine)
    assert len(demo.mistakes) == 4
    assert "word_count by demand: " in demo.mistakes[0]
    assert all(e.wrong for e in events if isinstance(e, Checked))


async def test_facts_for_programs() -> None:
    _, events = await told(FlatMachine())
    facts = [f for f in map(facts_of, events) if f]
    assert [f["step"] for f in facts] == ["build", "run", "run", "migrate", "migrate", "run", "run", *["check"] * 4]
    json.dumps(facts)
