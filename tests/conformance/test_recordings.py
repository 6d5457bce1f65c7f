"""A real kernel's answers, line by line.

              script ──> process in the host ── ioctl ──> dmirror0 dmirror1 (private)
                                                          dmirror2 dmirror3 (coherent)

Oracle: recordings of Linux 6.12 with its own test_hmm module (recordings/, syntax in recordings/SYNTAX.md). The scripts named here must be
identical to the last line; a name never leaves the list.
"""

from __future__ import annotations

from pathlib import Path

from hmmnet.play.compare import Tally
from hmmnet.play.report import difference_lines
from hmmnet.play.script import Script, read_scripts
from hmmnet.play.world import launcher, play_all, prepare_all

RECORDINGS = Path(__file__).parent / "recordings"

IDENTICAL = [
    "h01-read-anon",
    "h02-write-anon",
    "h03-write-ro-vma",
    "h07-migrate-roundtrip",
    "h09-migrate-empty",
    "h11-migrate-ro-pte",
    "h22-two-devices-mirror",
    "h45-close-evicts",
    "h46-double-map",
    "h60-same-unit-twice",
    "h61-ro-shared-zero-write",
    "h62-big-range",
    "h63-two-vmas",
    "h64-zero-npages",
    "h67-write-only-vma",
    "h74-partial-dwrite",
]
"""Hand scripts that use only anonymous private memory, one process, munmap, mprotect, migration, snapshot and device read and write."""


def further() -> list[str]:
    """Names in identical.txt."""
    return [line for line in (RECORDINGS.parent / "identical.txt").read_text().splitlines() if line and not line.startswith("#")]


def scripts(pattern: str, names: list[str]) -> list[Script]:
    """The scripts of the recordings that match, by name, in the order of the files."""
    found = [script for path in sorted(RECORDINGS.glob(pattern)) for script in read_scripts(path) if script.name in names]
    assert sorted(script.name for script in found) == sorted(names)
    return found


async def played(chosen: list[Script]) -> Tally:
    return await play_all(prepare_all(chosen), launcher("real"), lambda _: None)


def complaint(tally: Tally) -> str:
    return "\n".join(line for outcome in tally.outcomes if not outcome.identical for line in difference_lines(outcome))


async def test_hand_scripts_are_identical() -> None:
    """Every script in IDENTICAL, one after the other on one machine."""
    tally = await played(scripts("hand.traces", IDENTICAL))
    assert tally.identical == len(IDENTICAL), complaint(tally)


async def test_everything_else_that_was_identical_stays_so() -> None:
    """Every script in identical.txt: anonymous private memory with everything that programs and dmirror devices do to it."""
    names = further()
    assert not set(names) & set(IDENTICAL)
    tally = await played(scripts("*.traces", names))
    assert tally.identical == len(names), complaint(tally)
