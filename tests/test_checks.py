"""What a program asks for that cannot be: a KernelError that says what, before anything is allocated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest

import hmmnet
from hmmnet.checks import LOOK_PAGES_MAX, check_pages, check_range, plain_arguments
from hmmnet.errors import HmmnetError, KernelError, SegmentationFault
from hmmnet.host.process import Process
from hmmnet.pages import PAGES_MAX
from tests.host.scripted_device import running_host

pytestmark = pytest.mark.virtual_time


@pytest.mark.parametrize(("address", "length"), [(-1, 1), (0, -1)])
def test_ranges(address: int, length: int) -> None:
    """Negative ones are none."""
    with pytest.raises(KernelError, match=f"read: EINVAL: {length} bytes at {address:#x} are no range"):
        check_range("read", address, length)


@pytest.mark.parametrize(("address", "pages"), [(-1, 1), (0, -1), (0, PAGES_MAX + 1), (0, LOOK_PAGES_MAX + 1)])
def test_page_counts(address: int, pages: int) -> None:
    """Negative, beyond the address space, or more than is told at once."""
    with pytest.raises(KernelError, match="pagemap: EINVAL"):
        check_pages("pagemap", address, pages)


@pytest.mark.parametrize("value", [10**30, object(), {1: {2: object()}}])
def test_arguments_that_no_message_holds(value: object) -> None:
    """The argument is named."""
    with pytest.raises(KernelError, match="EINVAL: argument n of reduction cannot be sent to a device"):
        plain_arguments("reduction", {"a": np.uint64(3), "n": value})


@pytest.fixture
async def process() -> AsyncIterator[Process]:
    async with running_host("gpu0") as (host, _):
        yield await host.create_process()


async def test_a_load_beyond_the_address_space_is_a_signal(process: Process) -> None:
    """At the first byte that is not mapped, however long it is."""
    address = await process.mmap(4096)
    for start, length in ((address, 1 << 46), (1 << 47, 8), (1 << 70, 8)):
        with pytest.raises(SegmentationFault) as caught:
            await process.read(start, length)
        assert caught.value.address == (address + 4096 if start == address else start)


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.read(-5, 1),
        lambda p: p.read(4096, -1),
        lambda p: p.write(-5, b"x"),
        lambda p: p.load(-8),
        lambda p: p.store(-8, 1),
        lambda p: p.read_array(4096, "<f8", -3),
        lambda p: p.pagemap(0, 1 << 40),
        lambda p: p.residency(0, -1),
        lambda p: p.get_user_pages(-1, 2),
        lambda p: p.malloc(-1),
        lambda p: p.mmap(-1),
        lambda p: p.munmap(4096, -4096),
        lambda p: p.migrate(4096, -1, "gpu0"),
    ],
)
async def test_every_call_of_a_process_checks(process: Process, call: Callable[[Process], Awaitable[object]]) -> None:
    """EINVAL, and no Python error of another kind."""
    with pytest.raises(KernelError, match="EINVAL"):
        await call(process)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p.malloc(1.5), "length is 1.5; a whole number"),
        (lambda p: p.malloc("x"), "length is 'x'; a whole number"),
        (lambda p: p.read("x", 8), "address is 'x'; a whole number"),
        (lambda p: p.memfd_create(1.5), "length is 1.5; a whole number"),
        (lambda p: p.get_user_pages(4096, 1.5), "length is 1.5; a whole number"),
        (lambda p: p.pagemap(4096, 1.5), "pages is 1.5; a whole number"),
        (lambda p: p.mmap(4.0), "length is 4.0; a whole number"),
        (lambda p: p.mmap(4096, None), "protection is None; use letters"),
        (lambda p: p.mmap(4096, file="x"), "str is no file of this machine"),
        (lambda p: p.store(4096, 1.5), "1.5 does not fit in type '<u8'"),
        (lambda p: p.store(4096, 1 << 64), "is no value of type '<u8'"),
        (lambda p: p.store(4096, 1, "fish"), "is no value of type 'fish'"),
        (lambda p: p.store(4096, None, "O"), "None is no value of type 'O'"),
        (lambda p: p.load(4096, "fish"), "load: EINVAL: there is no type 'fish'"),
        (lambda p: p.load(4096, ["<u8"]), r"load: EINVAL: there is no type \['<u8'\]"),
        (lambda p: p.load(4096, "O"), "load: EINVAL: no value of type 'O' lies in memory"),
        (lambda p: p.load(4096, "V0"), "load: EINVAL: no value of type 'V0' lies in memory"),
        (lambda p: p.read_array(4096, "fish", 3), "read_array: EINVAL: there is no type 'fish'"),
        (lambda p: p.read_array(4096, "<u8", None), "read_array: EINVAL: count is None; a whole number"),
        (lambda p: p.madvise(4096, 1, "dontneed"), "unknown advice 'dontneed'; there are NORMAL, .*DONTNEED"),
    ],
)
async def test_values_of_the_wrong_kind(process: Process, call: Callable[[Process], Awaitable[object]], words: str) -> None:
    """A KernelError that names the argument; what comes next is as it was."""
    with pytest.raises(KernelError, match=words):
        await call(process)
    address = await process.malloc(8)
    assert isinstance(address, int)
    await process.store(address, 1.5, "<f8")
    assert await process.load(address, "<f8") == 1.5


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"transport": "udp"}, "no transport 'udp'; there are ring, ipc, tcp, cable"), ({"rate": "x"}, "a rate of 'x' is none: write auto")],
)
def test_a_launch_that_cannot_be(wrong: dict[str, Any], words: str) -> None:
    """Told at once, before anything starts."""
    with pytest.raises(HmmnetError, match=words):
        hmmnet.launch("two-gpus", **wrong)
    with pytest.raises(HmmnetError, match="topology is None; a preset's name"):
        hmmnet.launch(None)  # type: ignore[arg-type]  # as somebody without a type checker calls it
