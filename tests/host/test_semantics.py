"""`host/SEMANTICS.md` names files and tests that exist; errors say which call failed and why."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "host" / "SEMANTICS.md"
ROWS = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if re.match(r"\| (?!---)", line)]
TABLES = 8


def rows() -> list[tuple[str, list[str], list[str]]]:
    """Each row: its rule, the files and the tests that it names."""
    found = [(rule.strip(), re.findall(r"`([^`]+)`", files), re.findall(r"`([^`]+)`", tests)) for rule, files, tests in ROWS]
    return [row for row in found if row[2]]


def test_every_table_has_rows() -> None:
    """Eight tables, and no row without a file or without a test."""
    assert PAGE.read_text().count("| --- | --- | --- |") == TABLES
    assert len(rows()) == len(ROWS) - TABLES, "a row names no test"
    assert all(files for _, files, _ in rows())


@pytest.mark.parametrize("rule", [row[0] for row in rows()])
def test_a_row_leads_to_files_and_tests(rule: str) -> None:
    """A table that names what has moved is worse than none."""
    for row in rows():
        if row[0] != rule:
            continue
        for name in row[1]:
            assert (ROOT / "host" / name).is_file(), f"{rule}: no file {name}"
        for name in row[2]:
            path, _, test = name.partition("::")
            text = (ROOT / "tests" / path).read_text()
            assert re.search(rf"^(async )?def {test}\(", text, re.MULTILINE), f"{rule}: no test {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "host").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_errors_say_call_and_cause(path: Path) -> None:
    """Every KernelError is made with an errno, the name of the call, and a text that is more than a word."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "KernelError":
            where = f"{path.name}:{node.lineno}"
            assert len(node.args) == 3, where
            call, why = node.args[1:]
            if isinstance(call, ast.Constant):
                assert call.value, where
            if isinstance(why, ast.Constant):
                assert len(str(why.value).split()) > 1, where
