"""`check` of a running machine: all is well while pages move; what somebody spoils is found, with page, process and frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hmmnet
from hmmnet.devices.models import base
from hmmnet.errors import ProtocolError
from hmmnet.host import audit, checking
from hmmnet.host.mm import pte
from hmmnet.host.process import Process
from hmmnet.pages import HMM_PFN_VALID, HMM_PFN_WRITE, to_wire
from hmmnet.program import Process as AnyProcess
from hmmnet.sim import SimulatedMachine
from hmmnet.wire.messages import PAGES_PER_MESSAGE_MAX, MirrorShown

from .everything import MACHINE, PAGE

PAGES = 32


async def two_mirrors(machine: SimulatedMachine) -> tuple[AnyProcess, int]:
    """A process whose pages both devices map: half in gpu0's memory, the rest where they are."""
    process = await machine.create_process()
    address = await process.mmap(PAGES * PAGE)
    await process.write(address, np.arange(PAGES * PAGE // 8, dtype="<f8"))
    await process.migrate(address, PAGES // 2 * PAGE, "gpu0")
    for device, placement in (("gpu0", "remote"), ("gpu1", "remote")):
        await process.launch("reduction", device, placement=placement, a=address + PAGES // 2 * PAGE, n=PAGES * PAGE // 16)
    return process, address


def checked(main: Any) -> Any:
    """The value of a simulated `main`."""
    return hmmnet.simulate(main, MACHINE).value


@pytest.mark.parametrize("most", [3, PAGES_PER_MESSAGE_MAX])
def test_all_is_well_and_what_was_looked_at(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a mirror fits in a message or not, all of it is looked at."""
    monkeypatch.setattr(base, "PAGES_PER_MESSAGE_MAX", most)
    monkeypatch.setattr(checking, "PAGES_PER_MESSAGE_MAX", most)

    async def main(machine: SimulatedMachine) -> list[dict[str, Any]]:
        before = await machine.check()
        process, _ = await two_mirrors(machine)
        during = await machine.check()
        await process.exit()
        return [before, during, await machine.check()]

    nothing = {"complaints": [], "processes": 0, "pages": 0, "mirrors": 0, "translations": 0, "unseen": {}}
    before, during, after = checked(main)
    assert (before, after) == (nothing, nothing)
    assert during == nothing | {"processes": 1, "pages": PAGES, "mirrors": 2, "translations": PAGES + PAGES // 2}


def test_a_stale_entry_of_a_mirror_is_found() -> None:
    """A device that keeps what it was told to drop, of which its IOMMU domain knows nothing."""

    async def main(machine: SimulatedMachine) -> list[str]:
        process, address = await two_mirrors(machine)
        (opened,) = machine.device("gpu1").contexts.values()
        page = address // PAGE + 3  # in gpu0's memory
        opened.context.mirror.program(page, np.array([77 | HMM_PFN_VALID | HMM_PFN_WRITE], np.uint64))
        found = await machine.check()
        assert (await machine.check())["complaints"] == found["complaints"]
        await process.exit()
        return list(found["complaints"])

    (complaint,) = checked(main)
    assert complaint.startswith("the mirror of gpu1 may write page 0x")
    assert "as frame 0x4d, the page table has 0x" in complaint


def test_what_is_right_again_at_the_next_look_is_no_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page moved while the device's answer was under way."""
    looks: list[int] = []
    stale = audit.stale

    def first_look_only(context: Any, pages: Any, frames: Any, writable: Any) -> Any:
        looks.append(len(pages))
        return np.ones(len(pages), np.bool_) if len(looks) == 1 else stale(context, pages, frames, writable)

    monkeypatch.setattr(audit, "stale", first_look_only)
    monkeypatch.setattr(audit, "domains", lambda _: [])

    async def main(machine: SimulatedMachine) -> dict[str, Any]:
        process, _ = await two_mirrors(machine)
        found = await machine.check()
        await process.exit()
        return found

    assert checked(main)["complaints"] == []
    assert len(looks) == 3, "gpu0 twice, gpu1 once"


def test_the_books_are_looked_at() -> None:
    """A frame that nobody maps and that is not free, with processes and without."""

    async def main(machine: SimulatedMachine) -> list[list[str]]:
        process, address = await two_mirrors(machine)
        assert isinstance(process, Process)
        frame = process.space.entries(np.array([address // PAGE + PAGES - 1], np.uint64)) >> np.uint64(pte.FRAME_SHIFT)
        host: Any = machine.host
        zone = host.memory.zones[0]
        zone.mapcount[zone.at(frame)] += 1
        found = [(await machine.check())["complaints"]]
        zone.mapcount[zone.at(frame)] -= 1
        zone.refcount[1] += 1
        await process.exit()
        found.append((await machine.check())["complaints"])
        zone.refcount[1] -= 1
        return found

    spoilt, left = checked(main)
    assert len(spoilt) == 1
    assert [complaint.partition("\n")[0] for complaint in left] == ["node0: 1 frames have references, 0 are allocated (I3)"]


def test_a_device_that_is_gone_is_told() -> None:
    """It hangs when it is asked, and is given up: what it believes is not known, and does not matter to the rest."""

    async def main(machine: SimulatedMachine) -> dict[str, Any]:
        process, _ = await two_mirrors(machine)
        await machine.hang_device("gpu1")
        found = await machine.check()
        await process.exit()
        return found

    found = checked(main)
    assert found["complaints"] == []
    assert found["mirrors"] == 1
    assert list(found["unseen"]) == ["gpu1"]


@pytest.mark.parametrize(
    ("pages", "entries", "why"),
    [
        (bytes(8), b"", "8 bytes of pages and 0 of entries"),
        (bytes(7), bytes(7), "7 bytes of pages"),
        (to_wire(np.array([5, 5], np.uint64)), bytes(16), "not in ascending order"),
        (to_wire(np.array([3], np.uint64)), bytes(8), "not asked for"),
        (to_wire(np.array([1 << 62], np.uint64)), bytes(8), "not asked for"),
    ],
)
def test_an_answer_that_is_none(pages: bytes, entries: bytes, why: str) -> None:
    """Half a list, pages twice, before the start, or beyond every address space."""
    with pytest.raises(ProtocolError, match=why):
        checking._shown(MirrorShown(pages, entries), 4)
