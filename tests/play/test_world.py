"""Many scripts on one machine, which is replaced when it cannot be trusted any more."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from hmmnet.errors import HmmnetError, KernelError, PeerLost
from hmmnet.play.compare import Outcome
from hmmnet.play.script import parse_scripts
from hmmnet.play.world import launcher, play_all, prepare_all, real_world, simulated_world

TEXT = "".join(f"=== s{i}\nmmap A 1\nread A 0 0\n--- recorded\n1: mmap A 1 => ok\n2: read A 0 0 => ok 00\n" for i in range(4))


def one_unit(unit: int) -> str:
    if unit:
        raise KernelError(errno.ENOENT, "open", "one unit only")
    return "dmirror0"


class Worlds:
    """Counts machines; the process of script number `bad` loses its host."""

    def __init__(self, new_process: Callable[[], Any], bad: int = -1) -> None:
        self.new_process = new_process
        self.bad = bad
        self.launched = 0
        self.processes = 0

    device_of_unit = staticmethod(one_unit)

    @asynccontextmanager
    async def launch(self) -> Any:
        self.launched += 1
        yield self

    async def create_process(self) -> Any:
        process = self.new_process()
        if self.processes == self.bad:

            async def gone(address: int, length: int) -> bytes:
                raise PeerLost("host is gone")

            process.read = gone
        self.processes += 1
        return process


@pytest.mark.parametrize(("bad", "machines", "identical"), [(-1, 1, 4), (1, 2, 3), (3, 1, 3)])
async def test_a_broken_machine_is_replaced(process: Any, bad: int, machines: int, identical: int) -> None:
    """The script that broke it counts as different, the next one gets a new machine, and each outcome is told as it comes."""
    worlds = Worlds(type(process), bad)
    told: list[Outcome] = []
    tally = await play_all(prepare_all(parse_scripts(TEXT)), worlds.launch, told.append)
    assert (worlds.launched, tally.identical, len(told)) == (machines, identical, 4)
    assert [o.script.name for o in tally.outcomes] == ["s0", "s1", "s2", "s3"]


async def test_no_process_names_the_script(process: Any) -> None:
    """When not even a process can be had, the error says for which script."""
    worlds = Worlds(type(process))

    async def refused() -> Any:
        raise HmmnetError("no memory")

    worlds.create_process = refused  # type: ignore[method-assign]
    with pytest.raises(HmmnetError, match=r"trace:1: no process for script 's0': no memory"):
        await play_all(prepare_all(parse_scripts(TEXT)), worlds.launch, lambda _: None)


def test_worlds_by_name() -> None:
    for world, launch in (("real", real_world), ("sim", simulated_world)):
        named = launcher(world, seed=7)
        assert isinstance(named, partial)
        assert (named.func, named.keywords) == (launch, {"seed": 7})
    with pytest.raises(ValueError, match="there are: real, sim"):
        launcher("unreal")
