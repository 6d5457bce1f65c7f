"""Transparent huge pages that migrate: whole, in parts, and where there is no large page for them."""

from __future__ import annotations

import time

import numpy as np

from hmmnet.pages import HUGE_PAGES, PAGE_SIZE
from hmmnet.program import Handle

from .case import COMPOUND, FAIL_ALLOC, PMD, TWOMEG, WRITE, CheckFailed, Ground, Numbers, selftest, snapshot, to_device

OFFSETS = (0, 512 << 10, 1 << 20)
"""Bytes into a huge page at which it is cut."""
NUMBERS_PER_BLOCK = TWOMEG // 4
SPECIAL = ord("S")
BENCHMARK_BLOCKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)


@selftest
async def migrate_anon_huge_empty(ground: Ground) -> None:
    """A block that was never touched: zeros on the device."""
    handle = await ground.open()
    address = await ground.map_huge(TWOMEG)
    await to_device(handle, address, np.zeros(NUMBERS_PER_BLOCK, np.uint32))


@selftest
async def migrate_anon_huge_zero(ground: Ground) -> None:
    """The huge zero page: zeros on the device, and memory that can be written at home."""
    handle = await ground.open()
    address = await ground.map_huge(TWOMEG)
    await ground.process.load(address)
    nothing = np.zeros(NUMBERS_PER_BLOCK, np.uint32)
    await to_device(handle, address, nothing)
    await ground.check(address, nothing)
    numbers = await ground.fill(address, HUGE_PAGES)
    await ground.check(address, numbers)


@selftest
async def migrate_anon_huge_free(ground: Ground) -> None:
    """MADV_FREE of a huge page that is on the device does it no harm."""
    handle = await ground.open()
    address = await ground.map_huge(TWOMEG)
    numbers = await ground.fill(address, HUGE_PAGES)
    await to_device(handle, address, numbers)
    await ground.process.madvise(address, TWOMEG, "FREE")
    await ground.check(address, numbers)


@selftest
async def migrate_anon_huge_fault(ground: Ground) -> None:
    """One huge page there, mapped as one, and one home again."""
    handle = await ground.open()
    address = await ground.map_huge(TWOMEG)
    numbers = await ground.fill(address, HUGE_PAGES)
    await to_device(handle, address, numbers)
    await snapshot(handle, address, [ground.local | WRITE | PMD] * HUGE_PAGES)
    seen = {value & 0x7F for value in await ground.process.pagemap(address, HUGE_PAGES)}
    if seen != {ord("P") if ground.coherent else SPECIAL}:
        raise CheckFailed(f"the page map shows {bytes(seen)!r} where the device has the page")
    await ground.check(address, numbers[:1])
    await snapshot(handle, address, [(ground.local if ground.coherent else 0) | WRITE | PMD] * HUGE_PAGES)
    await ground.check(address, numbers)


@selftest
async def migrate_partial_unmap_fault(ground: Ground) -> None:
    """Half of a huge page on the device is unmapped; what is left is right, and comes home."""
    handle = await ground.open()
    for offset in OFFSETS:
        address = await ground.map_huge(TWOMEG)
        numbers = await ground.fill(address, HUGE_PAGES)
        await to_device(handle, address, numbers)
        await ground.process.munmap(address + offset, TWOMEG // 2)
        await ground.check(address, numbers[: offset // 4])
        behind = offset + TWOMEG // 2
        await ground.check(address + behind, numbers[behind // 4 :])
        await ground.process.munmap(address, TWOMEG)


@selftest
async def migrate_remap_fault(ground: Ground) -> None:
    """mremap before the migration and after it, with and without MREMAP_DONTUNMAP, whole and in part, huge pages and small ones."""
    handle = await ground.open()
    for before in (False, True):
        for dontunmap in (False, True):
            for offset in OFFSETS:
                for huge in (True, False):
                    address = await ground.map_huge(TWOMEG) if huge else await ground.map(HUGE_PAGES)
                    numbers = await ground.fill(address, HUGE_PAGES)
                    if not before:
                        await to_device(handle, address, numbers)
                    moved = await _remapped(ground, address + offset, TWOMEG - offset, dontunmap=dontunmap)
                    if before:
                        await to_device(handle, moved, numbers[offset // 4 :])
                    await ground.check(moved, numbers[offset // 4 :])
                    await ground.check(address, numbers[: offset // 4])
                    if dontunmap:
                        await ground.check(address + offset, np.zeros((TWOMEG - offset) // 4, np.uint32))
                    await ground.process.munmap(address, TWOMEG)
                    await ground.process.munmap(moved, TWOMEG - offset)


async def _remapped(ground: Ground, address: int, length: int, *, dontunmap: bool) -> int:
    """Somewhere else."""
    target = await ground.process.mmap(length, "none")
    return await ground.process.mremap(address, length, length, target, dontunmap=dontunmap)


@selftest
async def migrate_anon_huge_err(ground: Ground) -> None:
    """Without a large page on the device, or at home, the migration goes on with small ones."""
    await _without_large_pages(ground, zero=False)


@selftest
async def migrate_anon_huge_zero_err(ground: Ground) -> None:
    """The same for the huge zero page."""
    await _without_large_pages(ground, zero=True)


async def _without_large_pages(ground: Ground, *, zero: bool) -> None:
    handle = await ground.open()
    small, large = [ground.local | WRITE] * HUGE_PAGES, [ground.local | WRITE | PMD] * HUGE_PAGES
    for fails_at_home in (False, True):
        address = await ground.map_huge(TWOMEG)
        numbers = np.zeros(NUMBERS_PER_BLOCK, np.uint32)
        if zero:
            await ground.process.load(address)
        else:
            numbers = await ground.fill(address, HUGE_PAGES)
        await handle.ioctl("flags", 0, 1, flags=COMPOUND | (0 if fails_at_home else FAIL_ALLOC))
        await to_device(handle, address, numbers)
        await snapshot(handle, address, large if fails_at_home else small)
        if fails_at_home:
            await handle.ioctl("flags", 0, 1, flags=COMPOUND | FAIL_ALLOC)
            await handle.ioctl("migrate_to_sys", address, HUGE_PAGES)
            await snapshot(handle, address, [WRITE] * HUGE_PAGES)
        await ground.check(address, numbers)
        await handle.ioctl("flags", 0, 1, flags=COMPOUND)
        await ground.process.munmap(address, TWOMEG)


@selftest
async def benchmark_thp_migration(ground: Ground) -> None:
    """How long huge pages take, there and back, and how long as many small ones: notes, and data that are right."""
    handle = await ground.open()
    for blocks in BENCHMARK_BLOCKS:
        length = int(blocks * TWOMEG)
        times = {huge: await _there_and_back(ground, handle, length, huge=huge) for huge in (True, False)}
        ground.notes.append(
            f"{blocks:g} x 2 MiB: "
            + "; ".join(
                f"{'huge' if huge else 'small'} pages {there * 1e3:.2f} ms out ({length / there / 1e9:.2f} GB/s), "
                f"{back * 1e3:.2f} ms home ({length / back / 1e9:.2f} GB/s)"
                for huge, (there, back) in times.items()
            )
        )


async def _there_and_back(ground: Ground, handle: Handle, length: int, *, huge: bool) -> tuple[float, float]:
    """Seconds that `length` bytes take to the device and home: the second time, when the memory at both ends is in use."""
    address = await ground.map_huge(length) if huge else await ground.map(length // PAGE_SIZE)
    numbers: Numbers = np.arange(length // 4, dtype=np.uint32)
    await ground.process.write(address, numbers)
    there_s = back_s = 0.0
    for _ in range(2):
        begun_s = time.perf_counter()
        await ground.process.migrate(address, length, ground.devices[0])
        there_s = time.perf_counter() - begun_s
        begun_s = time.perf_counter()
        await handle.ioctl("migrate_to_sys", address, length // PAGE_SIZE)
        back_s = time.perf_counter() - begun_s
    await ground.check(address, numbers)
    await ground.process.munmap(address, length)
    return there_s, back_s
