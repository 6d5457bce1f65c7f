"""Memory cgroups on real processes: what devices use is charged to the program, and its limit holds for them, too."""

from __future__ import annotations

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import HmmnetError, KernelError, RemoteError

PAGE = 4096
MIB = 1 << 20


async def test_a_job_beyond_the_limit_ends_with_enomem_and_loses_nothing() -> None:
    """The inputs fit, the result does not: the job says which group is full. What was written is there; a larger group has room for all."""
    with trio.fail_after(60):
        async with hmmnet.launch("two-gpus") as machine:
            await machine.create_cgroup("small", MIB + MIB // 2)
            await machine.create_cgroup("large")
            count = MIB // 8
            values = np.arange(count, dtype="<u8")
            for name, fits in (("small", False), ("large", True)):
                process = await machine.process(cgroup=name)
                address = await process.mmap(MIB)
                out = await process.mmap(MIB)
                await process.write(address, values)
                launch = process.launch("vector_add", "gpu0", a=address, b=address, out=out, n=count, dtype="<u8")
                if fits:
                    await launch
                    assert (await process.read_array(out, "<u8", count) == values * 2).all()
                else:
                    with pytest.raises((RemoteError, KernelError), match=r'ENOMEM.*memory cgroup "small"'):
                        await launch
                assert (await process.read_array(address, "<u8", count) == values).all()
                assert await process.migrate(address, MIB, "gpu1") == MIB
                figures = (await machine.report())["cgroups"][name]
                assert figures["current_bytes"] == 2 * MIB if fits else MIB <= figures["current_bytes"] <= MIB + MIB // 2
                assert bool(figures["refused"]) is not fits
                await process.exit()
                assert (await machine.report())["cgroups"][name]["current_bytes"] == 0
            with pytest.raises(HmmnetError, match='no memory cgroup is called "lagre"; there are: small, large'):
                await machine.process(cgroup="lagre")
