"""Steps that use a test driver's commands (dmirror's ioctls); on devices of other models they are jobs, or nothing."""

from __future__ import annotations

import contextlib
import errno
from typing import Any

import numpy as np

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.pages import PAGE_SIZE

from .crew import Crew
from .history import Words
from .operations import LOCKED_OUT, NO_RIGHT, device_load, device_of, device_store, is_dmirror, operation, region_of
from .program import Step
from .regions import WORDS_PER_PAGE, Region

COMPOUND = 1 << 8
"""A flag of the test driver: huge pages migrate whole."""


async def _command(crew: Crew, step: Step, command: str, region: Region, page: int, count: int, data: bytes = b"") -> bytes:
    handle = await crew.process.open(device_of(crew, step))
    try:
        return (await handle.ioctl(command, region.base + region.spread[page] * PAGE_SIZE, count, data)).data
    finally:
        with contextlib.suppress(KernelError):
            await handle.close()


@operation("command", *NO_RIGHT, *LOCKED_OUT)
async def command(crew: Crew, step: Step, who: str) -> None:
    """read, read_unlocked, write, migrate_to_dev, migrate_to_sys, snapshot, exclusive or check_exclusive; on other devices a job."""
    if not is_dmirror(crew, step):
        return await (device_store if step.choice == "write" else device_load)(crew, Step(**{**_fields(step), "choice": ""}), who)
    region = region_of(crew, step)
    page, count = region.run(step.page, min(step.count, 4))
    first, words = page * WORDS_PER_PAGE, count * WORDS_PER_PAGE
    if step.choice == "write":

        async def put(_: int, values: Words) -> None:
            await _command(crew, step, "write", region, page, count, values.tobytes())

        return await crew.store(who, region, first, crew.values(step.serial, first, words), put)
    if step.choice in {"read", "read_unlocked", "exclusive", "migrate_to_dev"}:

        async def fetch(_: int) -> Words:
            return np.frombuffer(await _command(crew, step, step.choice, region, page, count), np.uint64)

        try:
            return await crew.load(who, region, first, words, fetch)
        except KernelError as error:  # nobody has what is shared to himself
            if (step.choice, error.code, region.is_private) != ("exclusive", errno.EOPNOTSUPP, False):
                raise
            return None
    await _command(crew, step, step.choice or "snapshot", region, page, count)
    return None


@operation("migrate_large", *NO_RIGHT, *LOCKED_OUT)
async def migrate_large(crew: Crew, step: Step, _: str) -> None:
    """A test driver that takes huge pages whole (HMM_DMIRROR_FLAG_COMPOUND) migrates a region."""
    if not is_dmirror(crew, step):
        return
    region = region_of(crew, step)
    handle = await crew.process.open(device_of(crew, step))
    try:
        await handle.ioctl("flags", 0, 1, flags=COMPOUND)
        await handle.ioctl("migrate_to_dev", region.base, region.span_pages)
    finally:
        with contextlib.suppress(HmmnetError):
            await handle.close()


def _fields(step: Step) -> dict[str, Any]:
    return {name: getattr(step, name) for name in step.__struct_fields__}
