"""``hmmnet check``: what it says, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import hmmnet.client
from hmmnet.cli.check import check

WELL: dict[str, Any] = {"complaints": [], "processes": 2, "pages": 1234, "mirrors": 3, "translations": 5678, "unseen": {}}
STALE = "the mirror of gpu1 may write page 0x10 of process 2 as frame 0x4d, the page table has nothing there (I1)"


@pytest.mark.parametrize(
    ("found", "code", "lines"),
    [
        (WELL, 0, ["RIGHT  the invariants hold: 2 processes with 1,234 pages, 3 mirrors with 5,678 translations"]),
        (
            WELL | {"complaints": [STALE]},
            1,
            [f"WRONG  {STALE}", "looked at 2 processes with 1,234 pages, 3 mirrors with 5,678 translations"],
        ),
        (WELL | {"unseen": {"gpu0": "it is gone"}}, 1, ["UNSEEN gpu0 did not tell what its mirror holds: it is gone"]),
    ],
)
def test_what_it_says(
    found: dict[str, Any], code: int, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a person, and the same as JSON for a program."""

    class Machine:
        def check(self) -> dict[str, Any]:
            return found

    @contextmanager
    def attach(name: str | None) -> Iterator[Machine]:
        assert name == "mine"
        yield Machine()

    monkeypatch.setattr(hmmnet.client, "attach", attach)
    assert check("mine") == code
    assert capsys.readouterr().out.splitlines()[: len(lines)] == lines
    assert check("mine", as_json=True) == code
    assert json.loads(capsys.readouterr().out) == found
