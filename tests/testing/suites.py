"""Test suites of users, run by a pytest of their own."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest

OTHERS = ("trio", "asyncio", "anyio")
"""Plugins that run asynchronous tests."""
BOUND_S = 250
"""A hang, and no slow computer: pytest's own limit is a little more."""
STRICT = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider")


def write(pytester: pytest.Pytester, text: str, name: str = "test_mine.py", ini: str = "") -> Path:
    """A user's test file, and a user's pytest.ini."""
    if not (pytester.path / "pytest.ini").exists() or ini:
        (pytester.path / "pytest.ini").write_text("[pytest]\n" + textwrap.dedent(ini))
    path = pytester.path / name
    path.write_text(textwrap.dedent(text))
    return path


def run(pytester: pytest.Pytester, *arguments: str, beside: Iterable[str] = ("trio",)) -> pytest.RunResult:
    """Run the suite with the plugins `beside`, and everything a warning can be an error."""
    absent = [word for name in OTHERS if name not in beside for word in ("-p", f"no:{name}")]
    return pytester.runpytest_subprocess(*STRICT, *absent, *arguments, timeout=BOUND_S)
