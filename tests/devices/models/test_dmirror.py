"""The dmirror model against the scripted host: what the kernel's recordings say about its commands, one test a finding.

The script names in the docstrings are those of tests/conformance; there the same is played against the real host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from hmmnet.devices import context
from hmmnet.devices.models import dmirror
from hmmnet.devices.models.dmirror import COMPOUND, EVICT_NAP_S, EVICT_ROUNDS_MAX, WINDOW_PAGES, Dmirror
from hmmnet.errors import KernelError
from hmmnet.pages import HMM_PFN_ERROR, HMM_PFN_ORDER_SHIFT, HMM_PFN_VALID, HMM_PFN_WRITE, PAGE_SIZE, PAGES_MAX, ZONE_SHIFT
from hmmnet.testing.scripted_host import ZONE, ScriptedHost, machine, u64
from hmmnet.wire import messages as m

PAGE = 0x10000000
NONE, READ, WRITE, ERROR, ZERO, LOCAL = 0, 1, 2, 0xFF, 0x10, 0x20


def unit(**spec: Any):  # type: ignore[no-untyped-def]
    return machine(name="unit0", model="dmirror", unit=0, **spec)


def fill(value: int, pages: int) -> bytes:
    return b"".join(bytes([(value + i) & 255]) * PAGE_SIZE for i in range(pages))


async def snapshot(host: ScriptedHost, page: int, pages: int) -> list[int]:
    reply, _ = await host.ioctl("snapshot", page, pages)
    assert reply.cpages == pages
    return list(reply.data)


async def failing(host: ScriptedHost, command: str, page: int, pages: int, data: bytes = b"") -> str:
    with pytest.raises(KernelError) as caught:
        await host.ioctl(command, page, pages, data)
    return caught.value.name


@pytest.mark.parametrize("command", ["read", "read_unlocked"])
async def test_read(command: str) -> None:
    """h01: written, zero and never-touched pages are read in one fault round, and in none the second time."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 4)
        await host.cpu_write(at, fill(0x11, 1))
        await host.cpu_read(at + PAGE_SIZE, 1)
        reply, data = await host.ioctl(command, PAGE, 4)
        assert (reply.cpages, reply.faults) == (4, 1)
        assert data == fill(0x11, 1) + bytes(3 * PAGE_SIZE)
        assert await snapshot(host, PAGE, 4) == [WRITE, ZERO | READ, ZERO | READ, ZERO | READ]
        reply, _ = await host.ioctl(command, PAGE, 4)
        assert reply.faults == 0


async def test_write_is_seen_by_the_cpu() -> None:
    """h02: populated, zero and empty pages; a second write takes no fault."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 4)
        await host.cpu_write(at, fill(0x11, 1))
        await host.cpu_read(at + PAGE_SIZE, 1)
        for faults in (1, 0):
            reply, _ = await host.ioctl("write", PAGE, 4, fill(0x40 + faults, 4))
            assert (reply.cpages, reply.faults) == (4, faults)
            assert await host.cpu_read(at, 4 * PAGE_SIZE) == fill(0x40 + faults, 4)


async def test_write_to_a_read_only_mapping() -> None:
    """h03: EPERM, nothing written; leading pages that are mirrored writable are written before the error."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 2)
        await host.cpu_write(at, fill(0x11, 2))
        await host.mprotect(PAGE, 2, "r")
        assert await failing(host, "write", PAGE, 2, fill(0x40, 2)) == "EPERM"
        await host.mprotect(PAGE, 2, "rw")
        await host.ioctl("write", PAGE, 2, fill(0x40, 2))
        await host.mprotect(PAGE + 1, 1, "r")
        assert await failing(host, "write", PAGE, 2, fill(0x60, 2)) == "EPERM"
        assert await host.cpu_read(at, 2 * PAGE_SIZE) == fill(0x60, 1) + fill(0x41, 1)


async def test_outside_any_mapping() -> None:
    """h05: EFAULT for accesses, EINVAL for migration, ERROR bytes in a snapshot."""
    async with unit() as (host, _):
        assert await failing(host, "read", PAGE, 1) == "EFAULT"
        assert await failing(host, "write", PAGE, 1, fill(1, 1)) == "EFAULT"
        assert await failing(host, "migrate_to_dev", PAGE, 1) == "EINVAL"
        assert await failing(host, "migrate_to_sys", PAGE, 1) == "EINVAL"
        assert await snapshot(host, PAGE, 4) == [ERROR] * 4


async def test_range_off_the_end_of_a_mapping() -> None:
    """h06: migration fails EINVAL, but what lies before the end has moved."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 2)
        await host.cpu_write(at, fill(0x11, 2))
        assert await failing(host, "read", PAGE, 3) == "EFAULT"
        assert await failing(host, "migrate_to_dev", PAGE, 3) == "EINVAL"
        assert await snapshot(host, PAGE, 3) == [LOCAL | WRITE, LOCAL | WRITE, ERROR]
        assert await failing(host, "migrate_to_sys", PAGE, 3) == "EINVAL"
        assert not any(host.on_device(PAGE, 2))


async def test_round_trip() -> None:
    """h07: there and back; cpages of the way home is what moved, the mirror is empty afterwards."""
    async with unit() as (host, device):
        at = host.mmap(PAGE, 4)
        await host.cpu_write(at, fill(0x20, 4))
        reply, data = await host.ioctl("migrate_to_dev", PAGE, 4)
        assert (reply.cpages, data) == (4, fill(0x20, 4))
        assert await snapshot(host, PAGE, 4) == [LOCAL | WRITE] * 4
        reply, _ = await host.ioctl("read", PAGE, 4)
        assert reply.faults == 0
        reply, _ = await host.ioctl("write", PAGE + 1, 2, fill(0x70, 2))
        assert (reply.cpages, reply.faults) == (2, 0)
        reply, _ = await host.ioctl("migrate_to_sys", PAGE, 4)
        assert reply.cpages == 4
        assert await host.cpu_read(at, 4 * PAGE_SIZE) == fill(0x20, 1) + fill(0x70, 2) + fill(0x23, 1)
        reply, _ = await host.ioctl("read", PAGE, 4)
        assert reply.faults == 1
        assert (await host.ioctl("migrate_to_sys", PAGE, 4))[0].cpages == 0
        assert device.memory.used_pages == 0


async def test_empty_and_zero_pages_migrate_as_zeros() -> None:
    """h09: never-touched and zero pages get zeroed device memory, writable."""
    async with unit() as (host, device):
        at = host.mmap(PAGE, 4)
        frames = device.memory.grant(64)
        assert frames is not None
        for frame in frames.tolist():
            device.memory.page_bytes(frame)[:] = 0xEE
        device.memory.keep(u64(range(device.memory.base, device.memory.base + 64)))
        device.memory.free(u64(range(device.memory.base, device.memory.base + 64)).tobytes())
        await host.cpu_read(at + PAGE_SIZE, 1)
        await host.cpu_write(at + 2 * PAGE_SIZE, fill(0x33, 1))
        _, data = await host.ioctl("migrate_to_dev", PAGE, 4)
        assert data == bytes(2 * PAGE_SIZE) + fill(0x33, 1) + bytes(PAGE_SIZE)
        reply, _ = await host.ioctl("write", PAGE, 2, fill(0x61, 2))
        assert reply.faults == 0


async def test_write_to_an_own_read_only_page() -> None:
    """h11: EFAULT, because a range fault does not upgrade the device's own pages."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 2)
        await host.cpu_write(at, fill(0x33, 2))
        await host.mprotect(PAGE, 2, "r")
        await host.ioctl("migrate_to_dev", PAGE, 2)
        assert await snapshot(host, PAGE, 2) == [LOCAL | READ] * 2
        assert await failing(host, "write", PAGE, 1, fill(1, 1)) == "EFAULT"
        assert await host.cpu_read(at, 2 * PAGE_SIZE) == fill(0x33, 2)


async def test_pinned_page() -> None:
    """h31, h32: not mirrored, one pinned page makes it ENOENT though the others moved; mirrored, all looks well though it did not move."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 3)
        await host.cpu_write(at, fill(0x10, 3))
        host.pinned = {PAGE + 1}
        assert await failing(host, "migrate_to_dev", PAGE, 3) == "ENOENT"
        assert await snapshot(host, PAGE, 3) == [LOCAL | WRITE, WRITE, LOCAL | WRITE]
        await host.ioctl("read", PAGE, 3)
        reply, data = await host.ioctl("migrate_to_dev", PAGE, 3)
        assert (reply.cpages, data) == (3, fill(0x10, 3))
        assert await snapshot(host, PAGE + 1, 1) == [WRITE]
        reply, _ = await host.ioctl("write", PAGE + 1, 1, fill(0x66, 1))
        assert reply.faults == 0
        assert await host.cpu_read(at + PAGE_SIZE, PAGE_SIZE) == fill(0x66, 1)


async def test_invalidation_drops_one_page_too_many() -> None:
    """h51: pages 1 and 2 change, the entry of page 3 goes too, that of page 4 stays."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 6)
        await host.cpu_write(at, fill(0x10, 6))
        await host.ioctl("read", PAGE, 6)
        async with host.invalidated(PAGE + 1, PAGE + 3, "clear"):
            pass
        faults = [(await host.ioctl("read", PAGE + page, 1))[0].faults for page in (0, 3, 4, 1, 2)]
        assert faults == [0, 1, 0, 1, 1]


async def test_faulting_goes_in_windows() -> None:
    """h74: a write of 70 pages, read-only from 66 on: the first 64 are faulted in writable, none is written."""
    async with unit() as (host, device):
        at = host.mmap(PAGE, 70)
        await host.mprotect(PAGE + 66, 4, "r")
        assert await failing(host, "write", PAGE, 70, fill(1, 70)) == "EPERM"
        assert await host.cpu_read(at, 70 * PAGE_SIZE) == bytes(70 * PAGE_SIZE)
        assert device.contexts[1].context.mirror.mapped_count() == 64
        assert [fault.pages for fault in host.sent(m.RangeFault)][-2:] == [64, 6]


@pytest.mark.parametrize("command", ["read", "migrate_to_dev", "migrate_to_sys", "snapshot"])
async def test_bad_ranges(command: str) -> None:
    """h64: no pages, an unaligned address, an end beyond the address space: EINVAL."""
    async with unit() as (host, _):
        assert await failing(host, command, PAGE, 0) == "EINVAL"
        for address, pages in ((PAGE * PAGE_SIZE + 8, 1), ((1 << 47) - PAGE_SIZE, 2)):
            with pytest.raises(KernelError, match="EINVAL"):
                await host.session.ask(m.Ioctl(1, command, address, pages), m.IoctlDone)


async def test_large_ranges() -> None:
    """h62: 130 pages, sparse contents."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 130)
        await host.cpu_write(at + 64 * PAGE_SIZE, fill(2, 1))
        _, data = await host.ioctl("migrate_to_dev", PAGE + 60, 10)
        assert data == bytes(4 * PAGE_SIZE) + fill(2, 1) + bytes(5 * PAGE_SIZE)
        assert (await host.ioctl("migrate_to_sys", PAGE, 130))[0].cpages == 10
        assert (await host.ioctl("migrate_to_dev", PAGE, 130))[0].cpages == 130
        await host.cpu_read(at + 65 * PAGE_SIZE, 1)
        assert (await host.ioctl("migrate_to_sys", PAGE, 130))[0].cpages == 129


async def test_closing_sends_every_page_of_the_unit_home() -> None:
    """h45: also those of other processes."""
    async with unit() as (host, device):
        at = host.mmap(PAGE, 3)
        await host.cpu_write(at, fill(0x10, 3))
        await host.ioctl("migrate_to_dev", PAGE, 3)
        await host.open(2, 11)
        await host.close(2)
        assert not any(host.on_device(PAGE, 3))
        assert device.memory.used_pages == 0
        assert await host.cpu_read(at, 3 * PAGE_SIZE) == fill(0x10, 3)


async def evicts_of(host: ScriptedHost) -> int:
    """Requests to evict that a release of the unit costs."""
    before = len(host.sent(m.Evict))
    await host.ioctl("release", 0, 1)
    return len(host.sent(m.Evict)) - before


async def test_busy_pages_are_asked_for_again_after_a_nap(autojump_clock: trio.testing.MockClock) -> None:
    """Nothing goes while another migration has it: a page that is free in the end goes, one that never is is left after 14 rounds."""
    async with unit() as (host, device):
        at = host.mmap(PAGE, 1)
        await host.cpu_write(at, fill(0x10, 1))
        await host.ioctl("migrate_to_dev", PAGE, 1)
        host.pinned = {PAGE}
        began_s = trio.current_time()
        assert await evicts_of(host) == EVICT_ROUNDS_MAX
        assert trio.current_time() - began_s == pytest.approx(EVICT_NAP_S * (2 ** (EVICT_ROUNDS_MAX - 1) - 1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(evicts_of, host)
            await trio.sleep(100 * EVICT_NAP_S)
            assert host.on_device(PAGE, 1) == [True]
            host.pinned = set()
        assert host.on_device(PAGE, 1) == [False]
        assert device.memory.used_pages == 0


async def test_broken_pages_are_not_asked_for_again() -> None:
    """They never go home, and the host says how many there are."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 3)
        await host.cpu_write(at, fill(0x10, 3))
        await host.ioctl("migrate_to_dev", PAGE, 3)
        host.broken = {PAGE + 1}
        assert await evicts_of(host) == 2
        assert host.on_device(PAGE, 3) == [False, True, False]


async def test_broken_pages_keep_no_others_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though they come first, and are as many as are asked for at once."""
    monkeypatch.setattr(dmirror, "EVICT_FRAMES_MAX", 2)
    async with unit() as (host, _):
        at = host.mmap(PAGE, 5)
        await host.cpu_write(at, fill(0x10, 5))
        await host.ioctl("migrate_to_dev", PAGE, 5)
        host.broken = {PAGE, PAGE + 1}
        await host.ioctl("release", 0, 1)
        assert host.on_device(PAGE, 5) == [True, True, False, False, False]


async def test_release_sends_everything_home() -> None:
    """RELEASE evicts by frame; the mirror's entries are gone with the frames."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 3)
        await host.cpu_write(at, fill(0x10, 3))
        await host.ioctl("migrate_to_dev", PAGE, 3)
        await host.ioctl("release", 0, 1)
        assert await snapshot(host, PAGE, 3) == [WRITE] * 3
        assert (await host.ioctl("read", PAGE, 3))[0].faults == 1


async def test_two_contexts_of_one_process_do_not_read_freed_memory() -> None:
    """Not the original's artefact (h77): the second context faults instead."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 2)
        await host.cpu_write(at, fill(0x10, 2))
        await host.open(2, 10)
        await host.ioctl("read", PAGE, 2, context=2)
        await host.ioctl("migrate_to_dev", PAGE, 2)
        reply, data = await host.ioctl("read", PAGE, 2, context=2)
        assert (reply.faults, data) == (1, fill(0x10, 2))


async def test_migration_without_taking_the_data() -> None:
    """As a prefetch, what moved is counted and a page that stays is no error."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 4)
        await host.cpu_write(at, fill(0x10, 4))
        host.pinned = {PAGE}
        reply = await host.session.ask(m.Ioctl(1, "migrate_to_dev", at, 4), m.IoctlDone)
        assert reply.cpages == 3


async def test_other_commands_are_refused() -> None:
    """By name, with the errno that says why."""
    async with unit() as (host, _):
        assert await failing(host, "dance", PAGE, 1) == "EINVAL"


async def test_exclusive_access_lasts_until_it_is_taken_back() -> None:
    """The range reads through the mirror, and check_exclusive says EPERM; the next invalidation ends that, for one page too many."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 4)
        await host.cpu_write(at, fill(0x10, 4))
        done = await host.session.ask(m.Ioctl(1, "exclusive", at, 4), m.IoctlDone)
        assert (done.cpages, done.faults) == (4, 0)
        for page in range(4):
            assert await failing(host, "check_exclusive", PAGE + page, 1) == "EPERM"
        async with host.invalidated(PAGE, PAGE + 1, "clear"):
            pass
        await host.session.ask(m.Ioctl(1, "check_exclusive", at, 2), m.IoctlDone)
        assert await failing(host, "check_exclusive", PAGE, 3) == "EPERM"


async def test_a_window_is_exclusive_wholly_or_not_at_all() -> None:
    """A page that may not be written makes its window EBUSY, the window before keeps what it has; a hole likewise."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, WINDOW_PAGES + 1)
        host.mmap(PAGE + WINDOW_PAGES + 1, 3, "r")
        assert await failing(host, "exclusive", PAGE, WINDOW_PAGES + 4) == "EBUSY"
        assert await failing(host, "check_exclusive", PAGE, 1) == "EPERM"
        await host.session.ask(m.Ioctl(1, "check_exclusive", at + WINDOW_PAGES * PAGE_SIZE, 1), m.IoctlDone)
        assert await failing(host, "exclusive", PAGE + WINDOW_PAGES + 10, 1) == "EBUSY"


async def test_an_answer_that_an_invalidation_overtook_is_asked_for_again() -> None:
    """The pages were taken back before the device looked at the answer: it maps nothing of it."""
    async with unit() as (host, _):
        at = host.mmap(PAGE, 2)
        times = 0

        async def take_back() -> None:
            nonlocal times
            times += 1
            if times == 1:
                async with host.invalidated(PAGE, PAGE + 2, "clear"):
                    pass

        host.pauses[m.MakeExclusive] = take_back
        await host.session.ask(m.Ioctl(1, "exclusive", at, 2), m.IoctlDone)
        assert times == 2
        assert await failing(host, "check_exclusive", PAGE, 2) == "EPERM"


async def test_what_comes_when_all_mirrors_were_dropped_is_asked_for_again() -> None:
    """The end of a lease has no sequence: an answer from before is void all the same."""
    async with unit() as (host, device):
        host.mmap(PAGE, 2)
        times = 0

        async def lease_over() -> None:
            nonlocal times
            times += 1
            if times == 1:
                device.drop_mirrors()

        host.pauses[m.MakeExclusive] = lease_over
        await host.session.ask(m.Ioctl(1, "exclusive", PAGE * PAGE_SIZE, 2), m.IoctlDone)
        assert times == 2


@pytest.mark.parametrize("flags", [0, COMPOUND])
async def test_pages_that_are_always_taken_back_are_ebusy(flags: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers without words are asked for again, but not for ever."""
    asked = 0

    async def answer(_: ScriptedHost, message: m.MakeExclusive) -> m.Exclusive:
        nonlocal asked
        asked += 1
        return m.Exclusive(host.told[message.subscription], b"")

    monkeypatch.setattr(context, "RETRIES_MAX", 5)
    monkeypatch.setattr(ScriptedHost, "_make_exclusive", answer)
    async with unit() as (host, _):
        host.mmap(PAGE, 2)
        await host.ioctl("flags", 0, 1, flags=flags)
        with trio.fail_after(5):
            assert await failing(host, "exclusive", PAGE, 2) == "EBUSY"
        assert asked == 5


async def test_absurd_sizes_are_refused() -> None:
    """A bounce buffer of a tebibyte cannot be had; the device goes on."""
    async with unit() as (host, _):
        for command in ("read", "write", "snapshot"):
            with pytest.raises(KernelError, match="ENOMEM"):
                await host.session.ask(m.Ioctl(1, command, 0, 1 << 28), m.IoctlDone)
        host.mmap(PAGE, 1)
        assert (await host.ioctl("read", PAGE, 1))[0].cpages == 1


async def test_flags_are_kept() -> None:
    """FLAGS sets what later allocations look at."""
    async with unit() as (host, device):
        await host.ioctl("flags", 0, 1, flags=1)
        assert isinstance(device, Dmirror)
        assert device.flags == 1


BAD_RANGES = {"unaligned": (PAGE * PAGE_SIZE + 1, 1), "empty": (PAGE * PAGE_SIZE, 0), "wraps": (PAGE * PAGE_SIZE, PAGES_MAX)}
COMMANDS = (
    "read",
    "read_unlocked",
    "write",
    "migrate_to_dev",
    "migrate_to_sys",
    "snapshot",
    "exclusive",
    "check_exclusive",
    "release",
    "flags",
)


@pytest.mark.parametrize(("address", "pages"), BAD_RANGES.values(), ids=BAD_RANGES)
@pytest.mark.parametrize("command", COMMANDS)
async def test_each_command_looks_at_its_range_first(command: str, address: int, pages: int) -> None:
    """EINVAL, and nothing is done: release sends nobody home, flags sets none."""
    async with unit() as (host, device):
        await host.cpu_write(host.mmap(PAGE, 1), fill(0x11, 1))
        await host.ioctl("migrate_to_dev", PAGE, 1)
        with pytest.raises(KernelError, match=r"ioctl: EINVAL: .* is no aligned, non-empty range"):
            await device.ioctl(m.Ioctl(1, command, address, pages, 0, 0, 1))
        assert isinstance(device, Dmirror)
        assert (device.flags, device.memory.used_pages) == (0, 1)


async def test_permission_bytes() -> None:
    """Every kind of word has its byte."""
    async with unit() as (_, device):
        assert isinstance(device, Dmirror)
        own, other, valid = ZONE << ZONE_SHIFT, (ZONE + 1) << ZONE_SHIFT, HMM_PFN_VALID
        table = {
            0: NONE,
            HMM_PFN_ERROR: ERROR,
            valid: ZERO | READ,
            valid | 5: READ,
            valid | HMM_PFN_WRITE | 5: WRITE,
            valid | own: LOCAL | READ,
            valid | HMM_PFN_WRITE | own: LOCAL | WRITE,
            valid | HMM_PFN_WRITE | other: 0x50 | WRITE,
            valid | HMM_PFN_WRITE | 5 | 9 << HMM_PFN_ORDER_SHIFT: WRITE | 0x04,
            valid | 5 | 18 << HMM_PFN_ORDER_SHIFT: READ | 0x08,
        }
        assert device.permissions(u64(table)).tolist() == list(table.values())
        assert np.all(device.permissions(u64([0, 0])) == 0)
