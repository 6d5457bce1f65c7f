"""``hmmnet demo`` as a user runs it: real processes, real text.

    python -m hmmnet demo ──> host (in that process) ──> gpu0, gpu1 (processes)

Oracle: collections.Counter and a dict over the same text, in the command itself; here the exit code and what it prints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

TEXT = "the quick brown fox jumps over the lazy dog\n" * 300 + " ".join(f"identifier_{i}" for i in range(3000))


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path: sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="hm") as folder:
        yield Path(folder)


def demo(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HMMNET_DIR": str(place), "COLUMNS": "100"}
    command = [sys.executable, "-m", "hmmnet", "demo", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_on_two_files(place: Path) -> None:
    """Several files after one --input; questions, tables and verdict are printed, nothing stays behind."""
    for name in ("one", "two"):
        (place / name).write_text(TEXT)
    done = demo(place, "--input", str(place / "one"), str(place / "two"), "--rate", "0.01")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("hmmnet demo: a multi-GPU machine in software")
    for piece in ("? What does mirroring give the device?", "Gpu page fault groups", "Where the pages live", "RIGHT All"):
        assert piece in done.stdout
    assert sorted(path.name for path in place.iterdir()) == ["one", "two"]


def test_json(place: Path) -> None:
    """One JSON document on stdout: what was checked, what was moved, and the machine's report."""
    (place / "one").write_text(TEXT)
    done = demo(place, "--json", "--input", str(place / "one"), "--rate", "0.01", "--seed", "9", "--svg", str(place / "where.svg"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "gpu0" in "".join(ET.parse(place / "where.svg").getroot().itertext())
    out = json.loads(done.stdout)
    assert out["correct"] is True
    assert out["input"]["words"] == len(TEXT.split())
    runs = {(step["run"], step["kernel"]): step for step in out["steps"] if step["step"] == "run"}
    assert sum(d["fault_groups"] for d in runs["by demand", "word_count"]["devices"].values()) > 0
    assert sum(d["fault_groups"] for key in runs if key[0] == "migrated" for d in runs[key]["devices"].values()) == 0
    assert all(step["wrong"] == 0 for step in out["steps"] if step["step"] == "check")
    assert {row["kind"] for row in out["report"]["profile"]} >= {"host_to_device", "device_to_host", "cpu_fault", "gpu_fault_group"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "missing"], "missing: No such file"),
        (["--input", "."], "Is a directory"),
        (["--input", "blank"], "blank: holds no word"),
        (["--topology", "two-gpu"], "two-gpus"),
        (["--topology", "plain.toml"], "plain.toml has no devices"),
        (["--rate", "fast"], '"fast" is no rate'),
        (["--limit-mib", "0"], "limit-mib"),
    ],
)
def test_bad_use_is_one_line(place: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Place, cause and mend; no traceback."""
    (place / "blank").write_text(" \n...\n")
    (place / "plain.toml").write_text('name = "plain"\n[[memory]]\nname = "node0"\nsize = "1 GiB"\n')
    monkeypatch.chdir(place)
    done = demo(place, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
