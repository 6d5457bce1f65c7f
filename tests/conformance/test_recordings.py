"""A real kernel's answers, line by line.

              script ──> process in the host ── ioctl ──> dmirror0 dmirror1 (private)
                                                          dmirror2 dmirror3 (coherent)

Oracle: recordings of Linux 6.12 with its own test_hmm module (recordings/, syntax in recordings/SYNTAX.md). All are identical to the
last line.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hmmnet.play.compare import Tally
from hmmnet.play.report import difference_lines
from hmmnet.play.script import Script, read_scripts
from hmmnet.play.world import launcher, play_all, prepare_all
from hmmnet.sim.worlds import WORLDS, WorldName, run_in

RECORDINGS = Path(__file__).parent / "recordings"
SCRIPTS = 1064


def played(chosen: list[Script], world: WorldName, seed: int = 0) -> Tally:
    return run_in(world, play_all, prepare_all(chosen), launcher(world), lambda _: None, seed=seed)


def complaint(tally: Tally) -> str:
    return "\n".join(line for outcome in tally.outcomes if not outcome.identical for line in difference_lines(outcome))


@pytest.mark.timeout(600)  # half a minute, on a busy machine several
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("world", WORLDS)
def test_recordings_are_identical(world: WorldName, *, backwards: bool) -> None:
    """Every script of every file, one after the other on one machine; from the last to the first, too: none needs what another left."""
    every = [script for path in sorted(RECORDINGS.glob("*.traces")) for script in read_scripts(path)]
    assert len(every) == SCRIPTS
    tally = played(every[::-1] if backwards else every, world, seed=int(backwards))
    assert tally.identical == SCRIPTS, complaint(tally)
