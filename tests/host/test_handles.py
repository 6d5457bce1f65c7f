"""Open devices and held pages: whose they are after fork, and when they are let go.

parent ── fork ──> child          both hold file 3, which mirrors the parent
   └──────┬──────────┘
          gpu0 (scripted)
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import KernelError, PeerError
from hmmnet.host.handles import FAIL_ALLOC, Handle, OpenFile, command_device
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.process import Process
from hmmnet.host.service import Host
from hmmnet.host.watchdog import ANSWER_S
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import IoctlResult
from hmmnet.wire.messages import CloseContext, Ioctl, Message, OpenContext

from .scripted_device import ScriptedDevice, running_host, scripted_device

pytestmark = pytest.mark.virtual_time


@asynccontextmanager
async def family() -> AsyncIterator[tuple[Host, ScriptedDevice, Process, Process]]:
    """A process that has gpu0 open, and its child."""
    async with running_host("gpu0") as (host, transport), scripted_device(host, transport, "gpu0") as device:
        parent = await host.create_process()
        await parent.open("gpu0")
        yield host, device, parent, await parent.fork()


def closed(device: ScriptedDevice) -> list[int]:
    """The contexts that the device was told to close."""
    return [message.context for message in device.of(CloseContext) if isinstance(message, CloseContext)]


async def test_a_child_holds_its_parents_files_under_their_numbers() -> None:
    """And opens its own, with a context of its own, under the next free number."""
    async with family() as (_, device, parent, child):
        assert {number: handle.device for number, handle in child.handles.items()} == {3: "gpu0"}
        assert child.handles[3].file is parent.handles[3].file
        own = await child.open("gpu0")
        assert own.number == 4
        assert [(m.context, m.process) for m in device.of(OpenContext) if isinstance(m, OpenContext)] == [(1, parent.pid), (2, child.pid)]
        await child.handles[3].close()
        assert (await child.open("gpu0")).number == 3


class Dmirror:
    """What a handle looks at of a dmirror's file, whose device answers a command when `gate` is set."""

    def __init__(self) -> None:
        self.link = SimpleNamespace(fail_large=set[int]())
        page_map = SimpleNamespace(memory=PhysicalMemory())
        life = SimpleNamespace(name="gpu0", spec=SimpleNamespace(model="dmirror"), link=self.link, page_map=page_map)
        self.file = SimpleNamespace(context=SimpleNamespace(number=7, life=life), references=0)
        self.gate = trio.Event()
        self.took: list[int] = []

    async def command(self, context: object, command: str, address: int, pages: int, data: bytes, flags: int, out: int) -> IoctlResult:
        """The device takes the flags at once, and answers late."""
        self.took.append(flags)
        await self.gate.wait()
        return IoctlResult(0, 0, b"")


@pytest.mark.parametrize("flags", [FAIL_ALLOC, 0])
async def test_flags_that_a_device_has_taken_the_host_takes_too(flags: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever set them and is cancelled before the answer comes waits for it: otherwise the two would go by different ones."""
    dmirror = Dmirror()
    dmirror.link.fail_large = {7} if flags == 0 else set()
    monkeypatch.setattr("hmmnet.host.handles.command_device", dmirror.command)
    handle = Handle({}, 3, cast(OpenFile, dmirror.file))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(handle.ioctl, "flags", 0, 0, b"", flags)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
            assert dmirror.link.fail_large == ({7} if flags == 0 else set()), "nothing was answered yet"
            dmirror.gate.set()
    assert dmirror.took == [flags]
    assert dmirror.link.fail_large == (set() if flags == 0 else {7})


async def test_another_command_may_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing at the host depends on its answer."""
    dmirror = Dmirror()
    monkeypatch.setattr("hmmnet.host.handles.command_device", dmirror.command)
    handle = Handle({}, 3, cast(OpenFile, dmirror.file))
    with trio.move_on_after(0.01) as scope:
        await handle.ioctl("read", 0, 0)
    assert scope.cancelled_caught


@pytest.mark.parametrize("when", ["before it begins", "meanwhile"])
async def test_a_command_whose_data_cannot_come_is_not_waited_for(when: str) -> None:
    """Nobody takes page data any more, and the device does not answer: it has its time to say why, and the caller goes on."""
    async with running_host("gpu0") as (host, transport), scripted_device(host, transport, "gpu0") as device:
        process = await host.create_process()
        context = (await process.open("gpu0")).file.context
        began_s = trio.current_time()

        async def answer(_: Message) -> None:
            if when == "meanwhile":
                context.life.link.receiver.fail("nobody takes it")
            await trio.sleep(10 * ANSWER_S)

        device.session.on(Ioctl, answer)
        if when == "before it begins":
            context.life.link.receiver.fail("nobody takes it")
        with pytest.raises(PeerError, match="nobody takes it"):
            await command_device(context, "echo", 0, 1, b"", 0, 1)
        assert trio.current_time() - began_s == pytest.approx(ANSWER_S, abs=0.5)


async def test_the_last_close_closes() -> None:
    """Each process its own reference: a handle is closed once, the file with the last."""
    async with family() as (_, device, parent, child):
        handle = child.handles[3]
        await handle.close()
        with pytest.raises(KernelError, match="EBADF"):
            await handle.close()
        assert closed(device) == []
        await parent.handles[3].close()
        assert closed(device) == [1]


async def test_a_file_outlives_the_process_that_opened_it() -> None:
    """The parent is gone, the child holds on; when it ends, the file is closed and nobody knows either any more."""
    async with family() as (host, device, parent, child):
        await parent.exit()
        assert closed(device) == []
        await child.exit()
        assert closed(device) == [1]
        assert host.spaces == {}
        assert not any(life.contexts for one in host.devices.values() if (life := one.life) is not None)


async def test_held_pages_show_what_they_hold_until_they_are_put() -> None:
    """Pinned pages stay the parent's: the child gets copies. What was put cannot be read, and putting twice does nothing."""
    async with running_host("gpu0") as (host, _):
        parent = await host.create_process()
        address = await parent.mmap(3 * PAGE_SIZE)
        await parent.write(address, bytes([1]) * PAGE_SIZE + bytes([2]) * PAGE_SIZE)
        held = await parent.get_user_pages(address, 3, write=True, pin=True, longterm=True)
        assert held.count == 3
        child = await parent.fork()
        await parent.write(address + PAGE_SIZE, b"\x09")
        assert (await held.read(1, first=1))[:2] == b"\x09\x02"
        assert await child.read(address + PAGE_SIZE, 1) == b"\x02"
        with pytest.raises(KernelError, match="EINVAL"):
            await held.read(3, first=1)
        await parent.exit()
        assert (await held.read(1))[:1] == b"\x01"
        used = host.memory.nodes[0].allocator.used_count
        await held.put()
        await held.put()
        assert host.memory.nodes[0].allocator.used_count == used - 3
        with pytest.raises(KernelError, match="EINVAL"):
            await held.read(1)


async def test_pages_that_cannot_be_had() -> None:
    """The first one is EFAULT; a later one makes it fewer."""
    async with running_host("gpu0") as (host, _):
        process = await host.create_process()
        address = await process.mmap(2 * PAGE_SIZE)
        assert (await process.get_user_pages(address, 5)).count == 2
        with pytest.raises(KernelError, match="EFAULT"):
            await process.get_user_pages(address + 2 * PAGE_SIZE, 1)


def contexts(host: Host) -> int:
    """How many contexts the host keeps."""
    return sum(len(life.contexts) for one in host.devices.values() if (life := one.life) is not None)


def balance(device: ScriptedDevice) -> int:
    """How many contexts the device was told to open and not to close."""
    return len(device.of(OpenContext)) - len(device.of(CloseContext))


async def test_two_first_uses_at_once_are_one() -> None:
    """Two jobs of a process that has not used the device yet: one context, which its exit closes."""
    async with running_host("gpu0") as (host, transport), scripted_device(host, transport, "gpu0") as device:
        process = await host.create_process()
        address = await process.mmap(PAGE_SIZE)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(process.migrate, address, PAGE_SIZE, "gpu0")
        assert balance(device) == 1
        await process.exit()
        assert (contexts(host), balance(device)) == (0, 0)


async def test_two_last_uses_at_once_close_once() -> None:
    """One task closes the last use while another has, and lets go of, a use of the same context: the device is told once."""
    async with running_host("gpu0") as (host, transport), scripted_device(host, transport, "gpu0") as device:
        process = await host.create_process()

        async def use(before: int, inside: int) -> None:
            for _ in range(before):
                await trio.lowlevel.checkpoint()
            handle = await process.open("gpu0")
            for _ in range(inside):
                await trio.lowlevel.checkpoint()
            await handle.close()

        for before in range(12):
            for inside in range(4):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(use, 0, 0)
                    nursery.start_soon(use, before, inside)
                    nursery.start_soon(use, before + 1, 0)
                assert (contexts(host), balance(device)) == (0, 0), (before, inside)
        await process.exit()


async def test_an_open_that_is_cancelled_leaves_no_context() -> None:
    """However far it had come: what the device has opened is closed with the process at the latest, on both sides."""
    async with running_host("gpu0") as (host, transport), scripted_device(host, transport, "gpu0") as device:
        for turns in range(12):
            process = await host.create_process()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.open, "gpu0")
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            await process.exit()
            assert (contexts(host), balance(device)) == (0, 0), turns
        assert device.of(OpenContext)


async def test_an_open_that_the_exit_overtakes_is_refused() -> None:
    """ESRCH, and nothing stays open; after the exit, too."""
    async with running_host("gpu0") as (host, transport), scripted_device(host, transport, "gpu0") as device:
        process = await host.create_process()
        errors: list[KernelError] = []

        async def late() -> None:
            try:
                await process.open("gpu0")
            except KernelError as error:
                errors.append(error)

        device.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(late)
            while not contexts(host):
                await trio.lowlevel.checkpoint()
            nursery.start_soon(process.exit)
            while not process.ended:
                await trio.lowlevel.checkpoint()
            device.gate.set()
        assert [error.name for error in errors] == ["ESRCH"]
        assert (contexts(host), balance(device), dict(process.handles)) == (0, 0, {})
        with pytest.raises(KernelError, match="ESRCH"):
            await process.open("gpu0")


async def test_a_cancelled_exit_is_finished_by_the_next() -> None:
    """Cancelled while it waits for the address space, it has begun: nothing new is served. Called again, it frees everything."""
    async with running_host("gpu0") as (host, _):
        process = await host.create_process()
        address = await process.mmap(8 * PAGE_SIZE)
        await process.write(address, bytes(8 * PAGE_SIZE))
        async with process.space.mmap_lock.read():
            with trio.move_on_after(0.01) as scope:
                await process.exit()
        assert scope.cancelled_caught
        with pytest.raises(KernelError, match="ESRCH"):
            await process.mmap(PAGE_SIZE)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(process.exit)
        assert host.spaces == {}
        assert sum(node.allocator.used_count for node in host.memory.nodes) == 0
