"""Where the recorded kernel logged a WARN, a driver bug is reported; nowhere else.

Oracle: the ``KERNEL WARNING`` trailers of the recordings. Two drivers WARN. dmirror_do_fault: a range fault for writing came back without
the right to write, because hmm_range_fault does not upgrade a page of the device's own. gup_test: a page that it has just pinned is not
pinned, because nobody counts pins of the zero page.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hmmnet.play.grammar import Step
from hmmnet.play.player import play
from hmmnet.play.script import Script, read_scripts
from hmmnet.play.world import TOPOLOGY, UnitWorld, prepare_all
from hmmnet.sim import run_virtual, simulated
from tests.conformance.test_recordings import RECORDINGS

WARNED = 61
"""Scripts with a warning among the recordings."""
QUIET_EVERY = 6
"""Of the others each sixth is played."""


async def reported(prepared: Sequence[tuple[Script, list[Step]]], log: pytest.LogCaptureFixture) -> dict[str, bool]:
    """For each script whether a driver bug was reported while it ran."""
    found: dict[str, bool] = {}
    async with simulated(TOPOLOGY) as machine:
        world = UnitWorld(machine)
        for script, steps in prepared:
            log.clear()
            await play(script, steps, await world.create_process(), world.device_of_unit)
            found[script.name] = any(record.message.startswith("driver bug") for record in log.records)
    return found


def test_the_kernel_warns_where_a_driver_bug_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Script by script: all of those with a warning, and a sixth of those without."""
    every = {script.name: script for path in sorted(RECORDINGS.glob("*.traces")) for script in read_scripts(path)}
    blocks = [block for path in RECORDINGS.glob("*.traces") for block in path.read_text().split("\n=== ")]
    warned = {block.partition("\n")[0].removeprefix("=== "): "\nKERNEL WARNING" in block for block in blocks}
    assert sum(warned.values()) == WARNED
    chosen = [name for i, name in enumerate(sorted(warned)) if warned[name] or i % QUIET_EVERY == 0]
    found = run_virtual(reported, prepare_all(every[name] for name in chosen), caplog, seed=0, limit_s=float("inf"))
    assert found == {name: warned[name] for name in chosen}
