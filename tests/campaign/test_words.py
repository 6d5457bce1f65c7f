"""The words of programs, and that the rooms of a campaign stand above each other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import hmmnet.campaign
from hmmnet.campaign import real, steps, trial
from hmmnet.campaign.operations import OPERATIONS
from hmmnet.campaign.words import STEP_KINDS

ROOM = Path(hmmnet.campaign.__file__).parent


def imported(file: Path) -> set[str]:
    """The files of the room that `file` imports when it runs: in functions, too, but not what only type checkers read."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {name.name for name in node.names}
    return found


def test_every_kind_of_step_has_its_operation() -> None:
    """What a file may name is what there is, for programs in simulation and on real processes alike."""
    assert real.do is trial.do is steps.do  # type: ignore[attr-defined]  # names that the two import and do not offer
    assert set(OPERATIONS) == set(STEP_KINDS)
    assert len(set(STEP_KINDS)) == len(STEP_KINDS)


def test_no_file_of_the_room_imports_itself_by_a_detour() -> None:
    """An order of all files in which each imports only what stands before it."""
    graph = {file.stem: imported(file) for file in ROOM.glob("*.py")}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("words") < order.index("program") < order.index("places") < order.index("sweep")
    assert order.index("program") < order.index("trial")
