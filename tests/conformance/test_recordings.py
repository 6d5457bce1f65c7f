"""A real kernel's answers, line by line.

              script ──> process in the host ── ioctl ──> dmirror0 dmirror1 (private)
                                                          dmirror2 dmirror3 (coherent)

Oracle: recordings of Linux 6.12 with its own test_hmm module (recordings/, syntax in recordings/SYNTAX.md). All are identical to the
last line.
"""

from __future__ import annotations

from pathlib import Path

from hmmnet.play.compare import Tally
from hmmnet.play.report import difference_lines
from hmmnet.play.script import Script, read_scripts
from hmmnet.play.world import launcher, play_all, prepare_all

RECORDINGS = Path(__file__).parent / "recordings"
SCRIPTS = 1064


async def played(chosen: list[Script]) -> Tally:
    return await play_all(prepare_all(chosen), launcher("real"), lambda _: None)


def complaint(tally: Tally) -> str:
    return "\n".join(line for outcome in tally.outcomes if not outcome.identical for line in difference_lines(outcome))


async def test_recordings_are_identical() -> None:
    """Every script of every file, one after the other on one machine."""
    every = [script for path in sorted(RECORDINGS.glob("*.traces")) for script in read_scripts(path)]
    assert len(every) == SCRIPTS
    tally = await played(every)
    assert tally.identical == SCRIPTS, complaint(tally)
