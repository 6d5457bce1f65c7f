"""What a sweep found, as a table: places x faults x outcomes. COVERAGE.md beside this file is one, and `read` reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hmmnet.wire.exchange import LEASE_S

from .nemesis import MEND_S
from .places import NOT_APPLICABLE, SECONDS, Pair, pairs, reason
from .sweep import OUTCOMES, Cell
from .words import places

FILE = Path(__file__).with_name("COVERAGE.md")
NOT_HIT = "not hit"
NEVER = "-"
INTRODUCTION = """# What was hit by what, and how it ended

Made by `hmmnet sweep {arguments} -o FILE`: {hit} of {pairs} pairs were hit, in {runs} runs, each with one fault at one moment.

- *same*: every operation ended as it does without the fault;
- *refused*: some operation ended with an error that says why, and nothing was lost;
- *lost*: pages whose only copy died with a device were lost, and said so;
- a dash: a point where code cannot wait, or cannot fail, has no such fault (`hmmnet fault points`).

At a point *delay* is {delay:g} s, *pause* stops whoever comes there for {pause:g} s, and *hang* stops a device for {hang:g} s,
which is shorter than its lease of {lease:g} s. *freeze* is a hang of {freeze:g} s: the host has given the device up by then, and it
comes back empty. At points that concern no device one of them crashes, hangs or freezes at that moment.

*death*: the device of a message dies when it is sent.
What makes a message unreadable (*truncate*, *garbage*, *old_version*) ends a session, unless it is a request, which can be answered.
"""
_CELL = re.compile(r"(\d+) (same|refused|lost|wrong)")


def as_json(table: dict[Pair, Cell]) -> dict[str, Any]:
    """Plain data: coverage, and a list of cells."""
    hit = sum(cell.hits > 0 for cell in table.values())
    return {
        "pairs": len(table),
        "hit": hit,
        "coverage": round(hit / max(1, len(table)), 4),
        "runs": sum(cell.hits for cell in table.values()),
        "cells": [
            {"kind": pair.kind, "place": pair.place, "fault": pair.fault, "outcomes": dict(cell.outcomes), "wrong": cell.wrong}
            for pair, cell in table.items()
        ],
    }


def from_json(pieces: Iterable[dict[str, Any]]) -> dict[Pair, Cell]:
    """The table of several sweeps (`as_json`), in the order of pairs; those of pairs that there are no more are left out."""
    table = {pair: Cell() for pair in pairs()}
    for cell in (cell for piece in pieces for cell in piece["cells"]):
        found = table.get(Pair(cell["kind"], cell["place"], cell["fault"]))
        if found is not None:
            found.outcomes.update(cell["outcomes"])
            found.wrong += cell["wrong"]
    return table


def as_markdown(table: dict[Pair, Cell]) -> str:
    """The coverage table, protocol points and messages apart: they have different faults."""
    return "\n".join(_part(table, kind) for kind in ("point", "message") if any(pair.kind == kind for pair in table))


def _part(table: dict[Pair, Cell], kind: str) -> str:
    faults = list(dict.fromkeys(pair.fault for pair in table if pair.kind == kind))
    rows = list(dict.fromkeys(pair.place for pair in table if pair.kind == kind))
    cells = {(pair.place, pair.fault): cell for pair, cell in table.items()}
    lines = [f"| {kind} | {' | '.join(faults)} |", f"| --- |{' --- |' * len(faults)}"]
    lines += [f"| `{place}` | {' | '.join(_shown(cells.get((place, fault))) for fault in faults)} |" for place in rows]
    return "\n".join(lines) + "\n"


def _shown(cell: Cell | None) -> str:
    """``12 same, 3 refused``; a dash where the fault does not apply."""
    if cell is None:
        return NEVER
    return ", ".join(f"{cell.outcomes[name]} {name}" for name in OUTCOMES if cell.outcomes[name]) or NOT_HIT


def legend() -> str:
    """What does not apply, and why: beside faults that a place does not know at all."""
    lines = [f"- `{place}`: {why}." for (place, fault), why in NOT_APPLICABLE.items() if place != "*" and fault == "*"]
    lines += [f"- `{place}`, *{fault}*: {why}." for (place, fault), why in NOT_APPLICABLE.items() if "*" not in (place, fault)]
    return "\n".join(lines) + "\n"


def document(table: dict[Pair, Cell], arguments: str) -> str:
    """The Markdown file around a table."""
    data = as_json(table)
    head = INTRODUCTION.format(arguments=arguments, hang=MEND_S, lease=LEASE_S, **SECONDS, **data)
    return f"{head}\n{as_markdown(table)}\nOf the messages these have no row:\n\n{legend()}"


def read(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """The cells of a document: (place, fault) to how often each outcome was. Cells with a dash are left out."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    faults: list[str] = []
    for line in text.splitlines():
        columns = [column.strip() for column in line.strip("|").split("|")] if line.startswith("|") else []
        if not columns or set(columns[0]) == {"-"}:
            continue
        if not columns[0].startswith("`"):
            faults = columns[1:]
            continue
        for fault, cell in zip(faults, columns[1:], strict=True):
            if cell != NEVER:
                found[columns[0].strip("`"), fault] = {name: int(count) for count, name in _CELL.findall(cell)}
    return found


def lacking(cells: dict[tuple[str, str], dict[str, int]]) -> list[str]:
    """Pairs that apply and that `cells` does not show as hit, and cells of what does not exist."""
    wanted = {(place, fault) for place, faults in places().items() for fault in faults if not reason(place, fault)}
    lacks = [f"{place} {fault}: not hit" for place, fault in sorted(wanted) if not sum(cells.get((place, fault), {}).values())]
    return lacks + [f"{place} {fault}: there is no such pair" for place, fault in sorted(set(cells) - wanted)]
