"""The tests of the policy in window.py: the contract of policies, its author's examples, and what it is there for, under twenty seeds.

Directly behind the buffer that jobs work on lies a ring that the CPU polls. It must never move, or each poll is a migration. Strict mode
says so: nothing but the buffer is allowed to move. What jobs do is drawn from the seed, as plain data; so a failure can be made short::

    python test_window.py 13
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import hmmnet
from hmmnet.errors import HmmnetError
from hmmnet.plugins import offered
from hmmnet.sim import SimulatedMachine
from hmmnet.testing import Migrations, PolicyContract, Simulate, shrink

sys.path.insert(0, str(Path(__file__).parent))
import window  # type: ignore[import-not-found]

POLICY: Any = getattr(window, os.environ.get("WINDOW", "Window"))
"""The policy under test; ``WINDOW=FirstWindow`` takes the first version."""
PAGE = 4096
BUFFER, RING = 1 << 32, (1 << 32) + window.BLOCK_PAGES * PAGE
RING_PAGES = 64


# --- the contract, and the author's own examples --------------------------------------------------------------------------------------


class TestContract(PolicyContract):
    """What every policy must do."""

    policy = POLICY


def faults(*pages: int) -> tuple[Any, Any]:
    """Reads of these pages."""
    return np.array(pages, np.uint64), np.zeros(len(pages), np.bool_)


def test_reads_ahead() -> None:
    """A stream gets a window that doubles."""
    policy = POLICY()
    assert policy.ranges(*faults(0)) == [(0, 16)]
    assert policy.ranges(*faults(16)) == [(16, 48)]
    assert policy.ranges(*faults(48)) == [(48, 96)]


def test_stays_in_the_block() -> None:
    """A window ends where the block does."""
    policy = POLICY()
    for page in (416, 432, 464):
        last = policy.ranges(*faults(page))
    assert last == [(464, 512)]


# --- what it is there for -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A device reads pages [first, first + count) of the buffer."""

    device: str
    first: int
    count: int


@dataclass(frozen=True)
class Poll:
    """The CPU writes to the ring, and takes some of the buffer back."""

    first: int
    count: int


def draw(seed: int) -> list[Job | Poll]:
    """Forty operations: jobs that often begin where the last one ended, and polls."""
    random = Random(seed)
    operations: list[Job | Poll] = []
    end = 0
    for _ in range(40):
        first = end if end < window.BLOCK_PAGES and random.random() < 0.5 else random.randrange(window.BLOCK_PAGES)
        count = random.randint(1, min(48, window.BLOCK_PAGES - first))
        if random.random() < 0.7:
            operations.append(Job(random.choice(("gpu0", "gpu1")), first, count))
            end = first + count
        else:
            operations.append(Poll(first, count))
    return operations


async def work(machine: SimulatedMachine, operations: list[Job | Poll], migrations: Migrations) -> None:
    """Carry the operations out; only the buffer may move."""
    process = await machine.create_process()
    await process.mmap((window.BLOCK_PAGES + RING_PAGES) * PAGE, address=BUFFER)
    await process.write(BUFFER, bytes((window.BLOCK_PAGES + RING_PAGES) * PAGE))
    migrations.allow(BUFFER, window.BLOCK_PAGES * PAGE)
    for operation in operations:
        at, length = BUFFER + operation.first * PAGE, operation.count * PAGE
        if isinstance(operation, Job):
            done = await process.launch("reduction", operation.device, "window", a=at, n=length // 8, dtype="<i8")
            assert done.results == {"sum": 0}
        else:
            await process.write(RING, bytes(RING_PAGES * PAGE))
            await process.write(at, bytes(length))


@pytest.mark.seeds(20)
@pytest.mark.strict_migrations
def test_the_ring_never_moves(simulate: Simulate, migrations: Migrations) -> None:
    """Whatever the jobs do."""
    with offered("hmmnet.policies", "window", POLICY):
        simulate(lambda machine: work(machine, draw(simulate.seed), migrations))


# --- making a failure short -----------------------------------------------------------------------------------------------------------


def fails(operations: list[Job | Poll], seed: int) -> bool:
    """Whether these operations move what must not move."""
    migrations = Migrations(strict=True)

    async def main(machine: SimulatedMachine) -> None:
        with machine.host.events.told_to(migrations.hear):
            await work(machine, operations, migrations)

    with offered("hmmnet.policies", "window", POLICY):
        hmmnet.simulate(main, seed=seed)
    return bool(migrations.complaint())


def main(seed: int) -> None:
    """Print the shortest list of operations that fails as those of `seed` do."""
    operations = draw(seed)
    short = shrink(operations, lambda some: fails(some, seed))
    print(f"seed {seed}: {len(operations)} operations, {len(short)} of them fail alone:")
    print(*short, sep="\n")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except (ValueError, IndexError, HmmnetError) as error:
        sys.exit(f"test_window.py: {error}; give the seed of a failed test")
