"""Kernels that show and change words, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

import hmmnet
from hmmnet.devices.access import JobError
from hmmnet.devices.kernels.probe import SHOWN_MAX, fetch_add, gather, peek, poke
from hmmnet.errors import KernelError, SegmentationFault
from hmmnet.pages import PAGE_SIZE
from hmmnet.sim import SimulatedMachine
from tests.devices.plain_memory import PlainMemory


def test_words_are_shown_and_stored() -> None:
    """peek and gather give what is there, poke puts it there."""
    plain = PlainMemory()
    values = np.arange(100, dtype="<u8") * 7
    at = plain.place(values)
    assert plain.drive(peek(at, 100)) == {"words": values.tobytes()}
    backwards = np.arange(at + 99 * 8, at - 8, -8, dtype="<u8")
    assert plain.drive(gather(backwards.tobytes())) == {"words": values[::-1].tobytes()}
    assert plain.drive(poke(at, values[::-1].tobytes())) == {}
    assert (plain.array(at, 100) == values[::-1]).all()


def test_additions_give_what_was_there() -> None:
    """Also negative ones, and those that wrap."""
    plain = PlainMemory()
    at = plain.place(np.array([5, 6, 0], dtype="<u8"))
    assert plain.drive(fetch_add(at, 3, -1)) == {"words": np.array([5, 6, 0], "<u8").tobytes()}
    assert plain.array(at, 3).tolist() == [4, 5, (1 << 64) - 1]


def test_too_much_is_refused() -> None:
    """An answer has room for so many words; half a word is none."""
    plain = PlainMemory()
    for steps in (peek(0, SHOWN_MAX + 1), gather(bytes(8 * (SHOWN_MAX + 1))), poke(0, b"half")):
        with pytest.raises(JobError, match=r"at most|whole"):
            plain.drive(steps)


def test_atomic_additions_of_cpu_and_devices() -> None:
    """Everybody adds to one word at once; each value is seen by one of them, and nothing is lost."""

    async def main(machine: SimulatedMachine) -> list[int]:
        import trio

        process = await machine.create_process()
        address = await process.mmap(PAGE_SIZE)
        seen: list[int] = []

        async def device(name: str) -> None:
            for _ in range(5):
                try:
                    done = await process.launch("fetch_add", name, a=address)
                except SegmentationFault as error:
                    assert "does not come here" in str(error)  # noqa: PT017 - the others held the page for too long
                else:
                    seen.append(int.from_bytes(done.results["words"], "little"))

        async def cpu() -> None:
            for _ in range(20):
                before = await process.fetch_add(address, 1)  # type: ignore[attr-defined]  # of processes inside the host
                seen.append(before)

        async with trio.open_nursery() as nursery:
            for work in (lambda: device("gpu0"), lambda: device("gpu1"), cpu, cpu):
                nursery.start_soon(work)
        assert await process.load(address) == len(seen)
        with pytest.raises(KernelError, match="aligned"):
            await process.fetch_add(address + 4, 1)  # type: ignore[attr-defined]  # as above
        with pytest.raises(SegmentationFault):
            await process.fetch_add(0x5000, 1)  # type: ignore[attr-defined]  # as above
        await process.exit()
        return seen

    for seed in range(5):
        seen = hmmnet.simulate(main, seed=seed).value
        assert sorted(seen) == list(range(len(seen)))
        assert len(seen) >= 40


def test_a_page_that_cannot_come_is_not_updated() -> None:
    """A page of a file stays where it is: the job ends, naming it, and the word is what it was."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGE_SIZE, shared=True)
        await process.store(address, 3)
        with pytest.raises(SegmentationFault, match="cannot be updated atomically"):
            await process.launch("fetch_add", "gpu0", a=address)
        assert await process.load(address) == 3
        await process.exit()

    hmmnet.simulate(main)
