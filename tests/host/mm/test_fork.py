"""fork(2) without memory: there is no child, and the parent is as it was."""

from __future__ import annotations

import errno

import pytest

from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SIZE
from tests.host.scripted_device import running_host

pytestmark = pytest.mark.virtual_time


async def test_a_pinned_page_that_cannot_be_copied() -> None:
    """ENOMEM in the middle of a page table: what was to be shared beside it counts no child, swapped pages neither."""
    async with running_host("gpu0") as (host, _):
        await host.create_cgroup("small", 6 * PAGE_SIZE)
        parent = await host.create_process(cgroup="small")
        address = await parent.mmap(6 * PAGE_SIZE)
        await parent.write(address, b"p" * 6 * PAGE_SIZE)
        held = await parent.get_user_pages(address + 2 * PAGE_SIZE, 2, write=True, pin=True, longterm=True)
        await parent.madvise(address + 5 * PAGE_SIZE, PAGE_SIZE, "PAGEOUT")
        with pytest.raises(KernelError, match="ENOMEM") as failed:
            await parent.fork()
        assert failed.value.code == errno.ENOMEM
        assert host.audit(quiet=True) == []
        await parent.write(address, b"q" * 4 * PAGE_SIZE)
        assert await parent.read(address, 6 * PAGE_SIZE) == b"q" * 4 * PAGE_SIZE + b"p" * 2 * PAGE_SIZE
        await held.put()
        await parent.exit()
        assert host.audit(quiet=True) == []
