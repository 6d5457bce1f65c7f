"""The worked example does what its README says: the first version fails at the seeds that are named there, shrunk to two jobs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "driver_policy"
README = (HERE / "README.md").read_text()


def said(*command: str, policy: str = "FirstWindow") -> subprocess.CompletedProcess[str]:
    """Run a command of the README in its folder."""
    environment = os.environ | {"WINDOW": policy, "COLUMNS": "80"}
    return subprocess.run([sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True, timeout=100, check=False)


def suite(*arguments: str, policy: str = "FirstWindow") -> subprocess.CompletedProcess[str]:
    """Run its tests."""
    beside = ("-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-p", "no:asyncio", "-p", "no:anyio", "-p", "no:xdist")
    return said("-m", "pytest", "-q", *beside, "test_window.py", *arguments, policy=policy)


def test_what_one_would_test_anyway_passes() -> None:
    """The contract and the author's examples do not see the bug."""
    result = suite("-k", "not ring")
    assert result.returncode == 0, result.stdout
    assert re.search(r"12 passed, 20 deselected", result.stdout)
    assert "12 passed, 20 deselected" in README


def test_seeds_find_it() -> None:
    """Two of twenty, those in the README, with the very lines that it shows."""
    result = suite("-k", "ring")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert re.findall(r"^FAILED .*\[(\w+)\]", result.stdout, flags=re.MULTILINE) == ["seed5", "seed12"]
    shown = README.split("-k ring\n")[1].split("```")[0].splitlines()
    assert [line for line in shown if line not in result.stdout] == []


def test_the_command_that_it_prints_shows_it_again() -> None:
    """Twice, with the same story."""
    first, second = (suite("-k", "ring", "--hmmnet-seed", "12").stdout for _ in range(2))
    assert "1 failed" in first
    assert story(first) == story(second) != []


def story(output: str) -> list[str]:
    """The events that a report ends with."""
    return [line for line in output.splitlines() if " ms  " in line]


def test_it_is_shrunk() -> None:
    """To the two jobs of the README; a seed that does not fail says so in a line."""
    result = said("test_window.py", "12")
    assert result.stdout in README
    assert len(result.stdout.splitlines()) == 3
    fine = said("test_window.py", "3")
    assert fine.returncode == 1
    assert fine.stderr.startswith("test_window.py: nothing to shrink")
    assert said("test_window.py", "12", policy="Window").returncode == 1


def test_the_mended_policy_passes() -> None:
    """All of it, at all seeds."""
    result = suite(policy="Window")
    assert result.returncode == 0, result.stdout
    assert "32 passed" in result.stdout


def test_the_lines_of_both_versions_are_those_of_the_file() -> None:
    """The README quotes the code."""
    code = (HERE / "window.py").read_text()
    for line in re.findall(r"^    (return .*?)\s+# \w*Window$", README, flags=re.MULTILINE):
        assert line in code, line
