"""``--world sim`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECORDINGS = Path(__file__).parents[1] / "conformance" / "recordings"


def hmmnet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hmmnet", *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_run_prints_the_same_twice_and_the_links_exactly() -> None:
    """Everything that it prints is virtual, so two runs of one seed are equal to the letter; every link kept up."""
    first, again = (hmmnet("run", "list_walk", "--world", "sim", "--seed", "4", "--json") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    report = json.loads(first.stdout)
    assert report["correct"] is True
    assert all(link["kept_up"] for link in report["links"])


def test_demo_is_right_in_virtual_time() -> None:
    """The whole tour, without a process."""
    done = hmmnet("demo", "--world", "sim", "--limit-mib", "1", "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["correct"] is True
    assert outcome["report"]["rate"] == 1.0


def test_play_in_virtual_time() -> None:
    """The same answers."""
    done = hmmnet("play", str(RECORDINGS / "hand.traces"), "--only", "h0*", "--world", "sim", "--seed", "2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "list_walk", "--world", "sim", "--on", "default"], "--world sim goes with neither --on nor --rate"),
        (["run", "list_walk", "--world", "sim", "--rate", "0.5"], "--world sim goes with neither --on nor --rate"),
        (["demo", "--world", "sim", "--rate", "0.5"], "--rate and --world sim exclude each other"),
        (["run", "list_walk", "--world", "simm"], 'there is no "simm"; did you mean "sim"?'),
    ],
)
def test_what_does_not_go_together(arguments: list[str], words: str) -> None:
    """One line on stderr, and no traceback."""
    done = hmmnet(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
