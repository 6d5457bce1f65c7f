"""Jobs on a gpu over the wire: faults, migration, remote access, errors, all against the scripted host."""

from __future__ import annotations

import errno
from typing import Any

import msgspec
import numpy as np
import pytest
import trio

from hmmnet.devices.bus import SELECT_COMPOUND
from hmmnet.errors import KernelError
from hmmnet.testing.scripted_host import counters_of, machine, results_of, u64, until
from hmmnet.wire import messages as m
from hmmnet.workloads.structures import build_lists, build_tree

BLOCK = 0x20000
"""A page at which an aligned huge page begins."""
PAGE = 0x10000
"""The first page of the tests' mapping; aligned to a fault group."""


async def test_vector_add_by_demand_faults() -> None:
    """Operands migrate by faults, never-touched result pages too; the CPU reads the sum."""
    async with machine() as (host, _):
        n = 3000
        a, b = np.arange(n) * 1.0, np.arange(n)[::-1] * 2.0
        at, bt, out = host.mmap(PAGE, 6), host.mmap(PAGE + 16, 6), host.mmap(PAGE + 32, 6)
        await host.cpu_write(at, a.tobytes())
        await host.cpu_write(bt, b.tobytes())
        finished = await host.launch("vector_add", a=at, b=bt, out=out, n=n)
        assert finished.error == ""
        assert all(host.on_device(PAGE, 6) + host.on_device(PAGE + 16, 6) + host.on_device(PAGE + 32, 6))
        assert (np.frombuffer(await host.cpu_read(out, n * 8), "<f8") == a + b).all()
        counters = counters_of(finished)
        assert counters["pages_in"] == 18
        assert counters["faults"] == 18
        assert counters["fault_groups"] == 3
        assert counters["remote_read_bytes"] == 0


async def test_remote_placement_moves_nothing() -> None:
    """System memory is read and written where it is, by DMA."""
    async with machine() as (host, _):
        n = 3000
        at, out = host.mmap(PAGE, 6), host.mmap(PAGE + 16, 6)
        await host.cpu_write(at, np.arange(n, dtype="<i8").tobytes())
        finished = await host.launch("vector_add", placement="remote", a=at, b=at, out=out, n=n, dtype="<i8")
        assert finished.error == ""
        assert not any(host.on_device(PAGE, 22))
        assert (np.frombuffer(await host.cpu_read(out, n * 8), "<i8") == np.arange(n) * 2).all()
        counters = counters_of(finished)
        assert counters["migrations"] == 0
        assert counters["remote_read_bytes"] >= 2 * n * 8
        assert counters["remote_written_bytes"] == n * 8


async def test_pinned_pages_are_used_where_they_are() -> None:
    """What refuses to migrate is mapped over the link, and the rest of the group moves."""
    async with machine() as (host, _):
        at = host.mmap(PAGE, 16)
        await host.cpu_write(at, np.ones(16 * 512, dtype="<i8").tobytes())
        host.pinned = {PAGE + 3, PAGE + 4}
        finished = await host.launch("reduction", a=at, n=16 * 512)
        assert results_of(finished) == {"sum": 16 * 512}
        assert host.on_device(PAGE, 16) == [page not in (3, 4) for page in range(16)]
        assert counters_of(finished)["remote_read_bytes"] == 2 * 4096


async def test_a_migration_goes_on_behind_pages_that_cannot_move() -> None:
    """Memory for 16 pages, and the first 16 of 64 are pinned: the frames that they did not take go to those behind."""
    async with machine(memory_bytes=16 << 12) as (host, _):
        at = host.mmap(PAGE, 64)
        await host.cpu_write(at, np.ones(64 * 512, dtype="<i8").tobytes())
        host.pinned = set(range(PAGE, PAGE + 16))
        reply, _ = await host.ioctl("migrate_to_dev", PAGE, 64)
        assert reply.cpages == 16
        assert host.on_device(PAGE, 64) == [16 <= i < 32 for i in range(64)]


async def test_a_device_that_cannot_fault_fails_loudly() -> None:
    """At the first page that is not mapped, with the mend; after a migration the job runs, and without a fault."""
    async with machine(fault_capable=False) as (host, _):
        at = host.mmap(PAGE, 4)
        await host.cpu_write(at, np.ones(4 * 512, dtype="<i8").tobytes())
        finished = await host.launch("reduction", a=at, n=4 * 512)
        assert "cannot fault" in finished.error
        assert "migrate it there before" in finished.error
        assert finished.fault_address == at
        assert not any(host.on_device(PAGE, 4))
        await host.ioctl("migrate_to_dev", PAGE, 4)
        finished = await host.launch("reduction", a=at, n=4 * 512)
        assert results_of(finished) == {"sum": 4 * 512}
        assert counters_of(finished)["faults"] == 0


async def test_growth_into_a_hole_falls_back_to_the_faulted_pages() -> None:
    """A mapping of three pages in the middle of a 64 KiB group still migrates."""
    async with machine() as (host, _):
        at = host.mmap(PAGE + 5, 3)
        await host.cpu_write(at, np.full(3 * 512, 2, dtype="<i8").tobytes())
        finished = await host.launch("reduction", a=at, n=3 * 512)
        assert results_of(finished) == {"sum": 3 * 1024}
        assert all(host.on_device(PAGE + 5, 3))


async def test_a_fault_on_an_unmapped_address_ends_the_job_with_the_address() -> None:
    """The job is told where; the device goes on."""
    async with machine() as (host, _):
        at = host.mmap(PAGE, 2)
        finished = await host.launch("reduction", a=at, n=3 * 512)
        assert finished.fault_address == (PAGE + 2) * 4096
        assert f"0x{finished.fault_address:x}" in finished.error
        assert results_of(await host.launch("reduction", a=at, n=2 * 512)) == {"sum": 0}


async def test_a_lane_fault_names_the_exact_address() -> None:
    """A wild pointer is named to the byte."""
    async with machine() as (host, _):
        heads = host.mmap(PAGE, 1)
        wild = 0x7000_0000_1238
        await host.cpu_write(heads, u64([wild]).tobytes())
        finished = await host.launch("list_walk", heads=heads, n=1, out=heads)
        assert finished.fault_address == wild


async def test_a_store_to_read_only_memory_is_fatal() -> None:
    """EPERM, with the address, and nothing is written."""
    async with machine() as (host, _):
        at, out = host.mmap(PAGE, 1), host.mmap(PAGE + 16, 1, "r")
        finished = await host.launch("vector_add", a=at, b=at, out=out, n=4)
        assert finished.fault_address == out
        assert "EPERM" in finished.error


async def test_a_write_to_an_own_read_only_page_breaks_the_sharing_at_home() -> None:
    """hmm_range_fault does not upgrade own pages: the page goes home, becomes writable there, and the store goes through."""
    async with machine() as (host, _):
        at = host.mmap(PAGE, 1)
        await host.cpu_write(at, np.arange(512, dtype="<i8").tobytes())
        await host.launch("reduction", a=at, n=512)
        await host.mprotect(PAGE, 1, "r")
        await host.mprotect(PAGE, 1, "rw")
        assert host.on_device(PAGE) == [True]
        finished = await host.launch("vector_add", a=at, b=at, out=at, n=512, dtype="<i8")
        assert finished.error == ""
        assert (np.frombuffer(await host.cpu_read(at, 4096), "<i8") == np.arange(512) * 2).all()


async def test_many_jobs_at_once_share_faults() -> None:
    """Eight jobs on the same data: each page faults in once."""
    async with machine() as (host, device):
        n = 64 * 512
        at = host.mmap(PAGE, 64)
        await host.cpu_write(at, np.ones(n, dtype="<i8").tobytes())
        sums = []

        async def one(job: int) -> None:
            sums.append(results_of(await host.launch("reduction", job=job, a=at, n=n))["sum"])

        async with trio.open_nursery() as nursery:
            for job in range(8):
                nursery.start_soon(one, job)
        assert sums == [n] * 8
        assert (await host.figures())["pages_in"] == 64
        assert device.memory.used_pages == 64


async def test_ping_pong_loses_nothing() -> None:
    """The CPU takes pages home while jobs add to them: every increment counts."""
    async with machine() as (host, _):
        at, one = host.mmap(PAGE, 8), host.mmap(PAGE + 16, 8)
        await host.cpu_write(one, np.ones(8 * 512, dtype="<i8").tobytes())
        rounds = 10
        with trio.move_on_after(20) as scope:
            async with trio.open_nursery() as nursery:

                async def disturb() -> None:
                    for step in range(1000):
                        await host.cpu_read(at + step % 8 * 4096, 8)
                        await trio.lowlevel.checkpoint()

                nursery.start_soon(disturb)
                for _ in range(rounds):
                    finished = await host.launch("vector_add", a=at, b=one, out=at, n=8 * 512, dtype="<i8")
                    assert finished.error == ""
                nursery.cancel_scope.cancel()
        assert not scope.cancelled_caught
        assert (np.frombuffer(await host.cpu_read(at, 8 * 4096), "<i8") == rounds).all()


async def test_full_memory_maps_the_rest_remotely() -> None:
    """A device of 32 pages runs over 64: what does not fit stays at home and is used there."""
    async with machine(memory_bytes=32 << 12) as (host, device):
        at = host.mmap(PAGE, 64)
        await host.cpu_write(at, np.ones(64 * 512, dtype="<i8").tobytes())
        finished = await host.launch("reduction", a=at, n=64 * 512)
        assert results_of(finished) == {"sum": 64 * 512}
        assert sum(host.on_device(PAGE, 64)) == 32
        assert device.memory.free_pages == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"a": 0}, "missing a required argument"),
        ({"a": 0, "n": 1, "x": 2}, "unexpected keyword"),
        ({"a": 8, "n": "many"}, "argument n"),
        ({"a": 3, "n": 1}, "misaligned"),
    ],
)
async def test_bad_arguments_end_the_job(arguments: dict[str, object], complaint: str) -> None:
    """The kernel's own complaint comes back; nothing crashes."""
    async with machine() as (host, _):
        finished = await host.launch("reduction", **arguments)  # type: ignore[arg-type]
        assert complaint in finished.error


@pytest.mark.parametrize("placement", ["demand", "remote"])
async def test_pointer_kernels_on_a_device(placement: str) -> None:
    """Lanes that run out one by one, down to none: lists and a tree, in own and in foreign memory."""
    async with machine() as (host, _):
        random = np.random.default_rng(7)
        nodes_at, heads_at, out_at = host.mmap(PAGE, 64), host.mmap(PAGE + 64, 16), host.mmap(PAGE + 80, 16)
        values = random.integers(0, 1 << 62, 3000, dtype=np.uint64)
        lengths = np.bincount(random.integers(0, 200, 3000), minlength=200)
        lists = build_lists(nodes_at, values, lengths, random.permutation(3000))
        await host.cpu_write(nodes_at, lists.nodes.tobytes())
        await host.cpu_write(heads_at, lists.heads.tobytes())
        finished = await host.launch("list_walk", placement, heads=heads_at, n=200, out=out_at)
        assert finished.error == ""
        sums = [int(part.sum(dtype=np.uint64)) for part in np.split(values, np.cumsum(lengths)[:-1])]
        assert np.frombuffer(await host.cpu_read(out_at, 1600), "<u8").tolist() == sums
        keys = np.unique(values)
        tree = build_tree(nodes_at, keys[:1024], keys[:1024], random.permutation(1024))
        await host.cpu_write(nodes_at, tree.nodes.tobytes())
        await host.cpu_write(heads_at, keys[:1024].tobytes())
        finished = await host.launch("tree_search", placement, root=tree.root, keys=heads_at, n=1024, out=out_at)
        assert finished.error == ""
        assert results_of(finished)["found"] == 1024
        assert (np.frombuffer(await host.cpu_read(out_at, 8192), "<u8") == keys[:1024]).all()


@pytest.mark.parametrize("kernel", ["reduction", "vector_add", "list_walk", "tree_search", "word_count"])
async def test_kernels_of_nothing(kernel: str) -> None:
    """No elements, no access, no error."""
    arguments: dict[str, dict[str, Any]] = {
        "reduction": {"a": 0, "n": 0},
        "vector_add": {"a": 0, "b": 0, "out": 0, "n": 0},
        "list_walk": {"heads": 0, "n": 0, "out": 0},
        "tree_search": {"root": 0, "keys": 0, "n": 0, "out": 0},
        "word_count": {"text": 0, "length": 0, "words": 0, "n": 0, "out": 0},
    }
    async with machine() as (host, _):
        assert (await host.launch(kernel, **arguments[kernel])).error == ""


async def test_close_ends_running_jobs() -> None:
    """A list that bites its own tail runs until its context is closed; the device is usable afterwards."""
    async with machine() as (host, device):
        at = host.mmap(PAGE, 1)
        await host.cpu_write(at, u64([at + 16, 0, at + 16, 1]).tobytes())
        errors = []

        async def endless() -> None:
            try:
                await host.launch("list_walk", heads=at, n=1, out=at)
            except KernelError as error:
                errors.append(error.name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(endless)
            await until(lambda: device.contexts[1].engine.running > 0)
            await host.close()
        assert errors == ["EBADF"]
        assert device.contexts == {}
        await host.open(2, 10)
        assert (await host.figures())["contexts"] == 1


async def test_an_end_right_behind_the_launch_finds_the_job() -> None:
    """Both arrive in one go: the job is known from the launch's arrival, and ends although the host never answers its faults."""
    async with machine() as (host, device):
        at = host.mmap(PAGE, 4)
        never = trio.Event()
        host.pauses[m.RangeFault] = host.pauses[m.Migrate] = never.wait
        asked = host.session.begin(m.Launch(1, 77, "reduction", msgspec.msgpack.encode({"a": at, "n": 4 * 512}), "demand"))
        host.session.note(m.EndJob(1, 77))
        with trio.fail_after(5), pytest.raises(KernelError, match="EINTR"):
            await asked.wait()
        assert device.contexts[1].jobs == {}
        never.set()


async def test_a_device_without_atomics_refuses_atomic_updates_by_name() -> None:
    """EOPNOTSUPP with the device and the key; nothing was added, plain loads go on. The same job runs where there are atomics."""
    for atomics in (False, True):
        async with machine(atomics=atomics) as (host, _):
            at = host.mmap(PAGE, 1)
            await host.cpu_write(at, np.arange(4, dtype="<u8").tobytes())
            finished = await host.launch("fetch_add", a=at, n=4, by=5)
            if atomics:
                assert finished.error == ""
            else:
                assert finished.errno == errno.EOPNOTSUPP
                assert f'device "{host.spec["name"]}" has no atomic operations (atomics = false)' in finished.error
                assert finished.fault_address is None
            added = 5 if atomics else 0
            assert (np.frombuffer(await host.cpu_read(at, 32), "<u8") == np.arange(4) + added).all()
            assert (await host.launch("peek", a=at, n=4)).error == ""


@pytest.mark.parametrize("tries", [1, 2])
async def test_what_the_last_try_did_is_done(tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one finds the page there: who may try twice has added, and says so; who may not has added nothing."""
    monkeypatch.setattr("hmmnet.devices.engine.UPDATE_REPLAYS_MAX", tries)
    async with machine() as (host, _):
        at = host.mmap(PAGE, 1)
        await host.cpu_write(at, bytes(8))
        finished = await host.launch("fetch_add", a=at, n=1, by=5)
        done = tries == 2
        assert ("does not come here" not in finished.error) is done
        assert await host.cpu_read(at, 8) == (5 * done).to_bytes(8, "little")


async def test_without_pages_of_2_mib_huge_pages_are_not_asked_for() -> None:
    """Neither by a prefetch nor by a fault does the driver say COMPOUND; demand-2m is refused with what the device can map."""
    for sizes in ((4096, 65536), (4096, 65536, 2 << 20)):
        async with machine(page_sizes=sizes) as (host, device):
            at = host.mmap(BLOCK, 512)
            await host.cpu_write(at, np.ones(512 * 512, dtype="<i8").tobytes())
            asked: list[bool] = []
            context = device.contexts[1].context
            plain = context._migrate_offered

            async def offered(
                start: int, end: int, cause: str, *, compound: bool, select: int, plain: Any = plain, asked: list[bool] = asked
            ) -> Any:
                asked.append(compound)
                assert compound == bool(select & SELECT_COMPOUND)
                return await plain(start, end, cause, compound=compound, select=select)

            context._migrate_offered = offered
            await host.ioctl("migrate_to_dev", BLOCK, 256)
            assert (await host.launch("reduction", a=at, n=512 * 512)).error == ""
            assert len(asked) >= 2
            assert set(asked) == {2 << 20 in sizes}
            if 2 << 20 in sizes:
                assert (await host.launch("reduction", placement="demand-2m", a=at, n=1)).error == ""
            else:
                with pytest.raises(KernelError, match=r'EOPNOTSUPP.*demand-2m" wants pages of 2 MiB; page_sizes of .* are 4 KiB, 64 KiB'):
                    await host.launch("reduction", placement="demand-2m", a=at, n=1)
