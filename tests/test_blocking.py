"""Blocking calls into a trio loop in a thread: values, errors, Ctrl-C, and loops that end early."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

import hmmnet.blocking
import hmmnet.host.process
import hmmnet.remote
from hmmnet.blocking import Blocking, BlockingMachine, BlockingProcess, only_error
from hmmnet.client import AttachedBlockingMachine, RemoteMachine
from hmmnet.errors import HmmnetError, KernelError
from hmmnet.host.files import MemFd
from hmmnet.host.handles import HeldPages
from hmmnet.host.mm.userfault import UserFault
from hmmnet.machine import LaunchedBlockingMachine, LaunchedMachine
from hmmnet.program import Machine, Process
from hmmnet.sim import SimulatedMachine
from hmmnet.testing.frozen import FrozenMachine


class Inside:
    """What the context manager gives."""

    def __init__(self) -> None:
        self.left = False
        self.cancelled = False
        self.waits = threading.Event()

    async def double(self, value: int) -> int:
        await trio.lowlevel.checkpoint()
        return 2 * value

    async def fail(self) -> None:
        raise KernelError(22, "mmap", "no")

    async def forever(self) -> None:
        self.waits.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled = True


@asynccontextmanager
async def inside(value: Inside) -> AsyncIterator[Inside]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        yield value
        value.left = True
        nursery.cancel_scope.cancel()


def started() -> tuple[Blocking[Inside], Inside]:
    value = Inside()
    loop = Blocking(lambda: inside(value))
    assert loop.start() is value
    return loop, value


def test_calls_return_what_the_coroutine_returns() -> None:
    """And the context is left when stopped."""
    loop, value = started()
    assert loop.call(value.double, 21) == 42
    assert loop.ask(threading.current_thread) is not threading.current_thread()
    loop.stop()
    assert value.left


def test_errors_come_as_they_are() -> None:
    """No group around them, and the loop lives on."""
    loop, value = started()
    with pytest.raises(KernelError, match="EINVAL"):
        loop.call(value.fail)
    assert loop.call(value.double, 1) == 2
    loop.stop()


def test_calls_after_the_end_say_so() -> None:
    """Not a hang."""
    loop, value = started()
    loop.stop()
    with pytest.raises(HmmnetError, match="has ended"):
        loop.call(value.double, 1)


def test_calls_that_wait_when_the_machine_ends_get_an_error() -> None:
    """Another thread may stop the machine."""
    loop, value = started()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            loop.call(value.forever)
        except HmmnetError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert value.waits.wait(5)
    loop.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert len(caught) == 1


def test_ctrl_c_cancels_the_call_and_not_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt in the calling thread when the coroutine has ended, cancelled; the next call works."""
    monkeypatch.setattr("hmmnet.blocking.CANCEL_S_MAX", 30.0)
    loop, value = started()

    def interrupt() -> None:
        value.waits.wait(5)
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        loop.call(value.forever)
    assert value.cancelled
    interrupter.join()
    assert loop.call(value.double, 2) == 4
    loop.stop()


def test_a_start_that_fails_raises_in_the_caller() -> None:
    """The first error, without a group."""

    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            yield

    async def fail() -> None:
        raise HmmnetError("no device came")

    @asynccontextmanager
    async def broken_early() -> AsyncIterator[None]:
        await fail()
        yield

    with pytest.raises(HmmnetError, match="no device came"):
        Blocking(broken_early).start()
    with pytest.raises(HmmnetError, match="no device came"):
        loop = Blocking(broken)
        loop.start()
        loop.stop()


def test_an_end_that_fails_raises_in_the_caller() -> None:
    """What went wrong while leaving is not lost."""

    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        yield
        raise HmmnetError("the zygote is gone")

    loop = Blocking(broken)
    loop.start()
    with pytest.raises(HmmnetError, match="zygote"):
        loop.stop()
    loop.stop()


def test_what_ends_by_itself_is_not_waited_for() -> None:
    """A call that comes behind the end is an error, not a call for ever; why it ended is told at the stop."""
    ended = threading.Event()

    @asynccontextmanager
    async def short() -> AsyncIterator[Inside]:
        async def end() -> None:
            await trio.sleep(0.01)
            raise HmmnetError("it is late")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            try:
                yield Inside()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(ended.wait, 20)

    loop = Blocking(short)
    value = loop.start()
    calling = time.monotonic() + 20
    with pytest.raises(HmmnetError, match=r"the machine (has|was) ended"):
        while time.monotonic() < calling:
            loop.call(value.double, 1)
    with pytest.raises(HmmnetError, match="the machine has ended"):
        loop.call(value.double, 1)
    ended.set()
    with pytest.raises(HmmnetError, match="it is late"):
        loop.stop()


async def test_inside_trio_the_asynchronous_form_is_asked_for() -> None:
    """It would block the loop."""
    with pytest.raises(HmmnetError, match="async with"):
        Blocking(lambda: inside(Inside())).start()


def test_it_works_where_asyncio_runs() -> None:
    """A notebook's cell runs inside an asyncio loop."""

    async def cell() -> int:
        loop, value = started()
        result = loop.call(value.double, 4)
        loop.stop()
        return result

    assert asyncio.run(cell()) == 8


def test_one_leaf_comes_out_of_its_groups() -> None:
    """However deep; several stay together; the caller's own exception goes on by itself."""
    leaf = ValueError("x")
    with pytest.raises(ValueError, match="x"), only_error():
        raise ExceptionGroup("a", [ExceptionGroup("b", [leaf])])
    with pytest.raises(ExceptionGroup), only_error():
        raise ExceptionGroup("a", [leaf, KeyError("y")])
    with only_error(leaf):
        raise ExceptionGroup("a", [leaf])


def failing(how: str) -> None:
    """With ValueError, for which a KeyError is meant to be the reason, or not, or which has come meanwhile."""
    empty: dict[str, None] = {}
    try:
        empty["first"]
    except KeyError as first:
        if how == "meanwhile":
            int("then")
        raise ValueError("then") from (first if how == "from" else None)


@pytest.mark.parametrize("how", ["from", "from None", "meanwhile"])
def test_what_comes_out_of_a_group_tells_what_it_came_of(how: str) -> None:
    """A traceback shows what it would without the groups, and no group."""
    with pytest.raises(ValueError, match="then") as bare:
        failing(how)

    async def nested() -> None:
        with only_error():
            async with trio.open_nursery():
                async with trio.open_nursery():
                    failing(how)

    with pytest.raises(ValueError, match="then") as taken:
        trio.run(nested)
    stories = ["".join(traceback.format_exception(raised.value)) for raised in (bare, taken)]
    assert "first" in stories[0] or how == "from None", "this test's own question"
    for word in ("first", "Group", "direct cause", "During handling"):
        assert (word in stories[1]) == (word in stories[0]), stories[1]
    assert isinstance(taken.value.__context__, KeyError)


@pytest.mark.parametrize(
    "served",
    [
        *(kind for kind in vars(hmmnet.blocking).values() if isinstance(kind, type) and kind.__name__.startswith("Blocking")),
        LaunchedBlockingMachine,
        AttachedBlockingMachine,
        *(kind for kind in vars(hmmnet.remote).values() if isinstance(kind, type) and kind.__module__ == "hmmnet.remote"),
        RemoteMachine,
        LaunchedMachine,
        SimulatedMachine,
        FrozenMachine,
        hmmnet.host.process.Process,
        HeldPages,
        MemFd,
        UserFault,
    ],
)
def test_help_tells_what_a_call_does_and_not_where_that_stands(served: type) -> None:
    """Who asks in a notebook has no source at hand."""
    told = {name: inspect.getdoc(getattr(served, name)) or "" for name in dir(served) if not name.startswith("_")}
    assert {name for name, text in told.items() if not text or text.startswith("See ")} == set()
    assert not (inspect.getdoc(served) or "See ").startswith("See ")


def test_help_of_the_api_without_async_is_that_of_the_api_with_it() -> None:
    """And what is different is added."""
    assert BlockingProcess.write.__doc__ == Process.write.__doc__
    assert BlockingMachine.device_names.__doc__ == Machine.device_names.__doc__
    told = BlockingProcess.userfaultfd.__doc__ or ""
    assert told == inspect.cleandoc(told).rstrip()
    assert told.startswith(inspect.getdoc(Process.userfaultfd) or "-")
    assert told.endswith("\nThe program that fills pages in has to be another thread than the one that waits for them.")
