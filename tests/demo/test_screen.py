"""The demo's screen: every piece is there, at any width, and a wrong result cannot be overlooked."""

from __future__ import annotations

import io
import random
import time
from typing import cast

import numpy as np
import pytest
from rich.console import Console

from hmmnet.demo.answers import answers_for
from hmmnet.demo.conduct import Conductor, Outcome, Started
from hmmnet.demo.data import Input
from hmmnet.demo.screen import Screen, pages_by_owner, picture
from hmmnet.demo.steps import Demo, Sampled
from hmmnet.demo.story import QUESTIONS
from hmmnet.program import Machine, Residency
from tests.flat_machine import FlatMachine

TEXT = (" ".join(f"word{i % 900}" for i in range(4000))).encode()
LINK = {
    "link": "pcie0",
    "source": "node0",
    "target": "gpu0",
    "capacity_bytes_per_s": 31.5e9,
    "asked_bytes_per_s": 30e9,
    "reached_bytes_per_s": 29e9,
    "kept_up": True,
    "bytes_moved": 1 << 20,
    "transfers": 7,
}


class Reporting(FlatMachine):
    """A machine whose report has links: `links` directions, the last of them behind when `behind`."""

    def __init__(self, links: int = 2, behind: bool = False) -> None:
        super().__init__()
        self.links = [LINK | {"target": f"gpu{i}", "kept_up": not behind or i < links - 1} for i in range(links)]

    async def report(self) -> dict[str, object]:
        return {"links": [*self.links, LINK | {"bytes_moved": 0, "target": "idle"}], "profile": []}


async def shown(machine: FlatMachine, width: int = 80) -> tuple[str, Outcome]:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=width))
    given = Input(TEXT, "some text", 1)
    answers = answers_for(TEXT)
    conductor = Conductor(given, "two-gpus", 7, screen.tell, screen.started, searches=1000)
    screen.reading(given, "two-gpus")
    screen.started(Started("two-gpus", machine.device_names, 0.25, 0.5))
    outcome = await conductor.perform(cast(Machine, machine), answers, time.monotonic())
    screen.finished(outcome)
    return out.getvalue(), outcome


@pytest.mark.parametrize("width", [60, 80, 200])
async def test_every_piece_is_there(width: int) -> None:
    """Questions and answers, both runs, both moves, tables, picture, verdict; no line beyond the terminal."""
    text, outcome = await shown(Reporting(), width)
    assert outcome.correct
    flat = " ".join(text.split())
    for question in QUESTIONS:
        assert " ".join(question.asked.split()) in flat
        assert question.answer in flat
    pieces = ["4,000 words, 900 different", "by demand", "migrated", "home", "right", "Where the pages live", "A gpu0"]
    for piece in pieces if width < 80 else [*pieces, "Host To Device"]:
        assert piece in flat
    assert "node0 > gpu1" in flat
    assert "idle" not in flat
    assert "RIGHT All" in flat
    assert "kept up with the links" in flat
    assert [line for line in text.splitlines() if len(line) > width] == []


async def test_a_wrong_result_is_the_last_word() -> None:
    machine = Reporting()
    machine.error = 1
    text, outcome = await shown(machine)
    assert not outcome.correct
    assert "RIGHT" not in text
    assert "wrong" in text.split("WRONG")[0]
    assert "results are wrong" in " ".join(text.split("WRONG")[1].split())
    assert outcome.as_json()["correct"] is False


async def test_an_emulation_that_fell_behind_says_so() -> None:
    text, _ = await shown(Reporting(behind=True))
    assert "fell behind on node0 > gpu1: transfers" in " ".join(text.split())


def test_everybody_who_holds_a_page_is_in_the_picture() -> None:
    """Also where the host and eight devices share it."""
    devices = tuple(f"gpu{i}" for i in range(8))
    pages = np.arange(-1, 9, dtype=np.int16)  # one each, and one that nobody has touched
    drawn = picture([Sampled("migrated", 0.0, Residency(("node0", *devices), pages))], devices, 80).plain
    columns, legend = drawn.split("H node0")
    assert {letter for letter in columns if letter.isupper()} == set("HABCDEFGI")
    assert "I gpu7" in legend


@pytest.mark.parametrize(("cut", "files", "said"), [(True, 1, "first 4 KiB of big.txt; --limit-mib"), (True, 0, "4 KiB of text: big.txt")])
def test_a_file_that_is_not_read_whole_is_said_to_be_cut(cut: bool, files: int, said: str) -> None:
    """The default's library is no file of the user's: nobody expects the whole of it."""
    out = io.StringIO()
    Screen(Console(file=out, width=100)).reading(Input(b"a " * 2048, "big.txt", files, cut=cut), "two-gpus")
    assert said in out.getvalue()


async def test_many_links_are_cut_to_the_busiest() -> None:
    text, _ = await shown(Reporting(links=40))
    assert "and 28 less busy directions" in text


async def test_owners_stand_in_the_topologys_order() -> None:
    """Host memories, devices, then what was never touched, whatever the order in which zones were numbered."""
    samples: list[Sampled] = []
    machine = FlatMachine()
    demo = Demo(
        cast(Machine, machine),
        lambda e: samples.append(e) if isinstance(e, Sampled) else None,
        TEXT,
        answers_for(TEXT),
        random.Random(1),
        searches=100,
    )
    await demo.run()
    pages = pages_by_owner(samples[-1], ("gpu1", "gpu0"))
    assert list(pages) == ["host", "gpu1", "gpu0", "untouched"]
    assert sum(pages.values()) == len(samples[-1].residency.pages)
