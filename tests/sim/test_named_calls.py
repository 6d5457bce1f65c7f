"""An error names the call that the user made, whatever it came down to inside."""

from __future__ import annotations

import pytest

import hmmnet
from hmmnet.errors import KernelError
from hmmnet.sim import SimulatedMachine


def test_an_error_says_the_call_that_was_made() -> None:
    """Of `mprotect`, which shares the letters of protections with `mmap`, and of `unplug`, which looks for a device as `open` does."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(1 << 16)
        with pytest.raises(KernelError, match=r"^mprotect: EINVAL: unknown protection 'zz'"):
            await process.mprotect(address, 4096, "zz")
        with pytest.raises(KernelError, match=r"^mprotect: EINVAL: protection is 3"):
            await process.mprotect(address, 4096, 3)  # type: ignore[arg-type]
        with pytest.raises(KernelError, match=r"^mmap: EINVAL: unknown protection 'zz'"):
            await process.mmap(4096, "zz")
        with pytest.raises(KernelError, match=r'^unplug: ENOENT: no device is called "gpu9"'):
            await machine.unplug("gpu9")
        await machine.unplug("gpu0")
        with pytest.raises(KernelError, match=r'^unplug: ENODEV: device "gpu0" is not there'):
            await machine.unplug("gpu0")
        await process.exit()

    hmmnet.simulate(main)
